"""`lineage trace`: every verbatim run of 16 units is found, in its document and line; nothing else is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lineage import folders, trace
from lineage.questions import Lineage

import clean
import dedup
import tiny
from kit import arrow
from test_lineage_questions import LOCK, ask
from text_units import spans

WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("l", "n", "r", "s", "", "th")]


def project(root: Path, documents: list[str], splits: list[str], sizes: Sequence[int] = ()) -> Lineage:
    """Write what a source leaves before it is tokenised: documents, one a file, and the decisions about them.

    sizes: how many documents each shard has; in one shard without.
    """
    home = root / "data/clean/p/s"
    ids = [clean.doc_id(text) for text in documents]
    names = [f"{number:05}.txt" for number in range(len(ids))]
    places = {
        "file": names,
        "start": [0] * len(ids),
        "end": [len(t.encode()) for t in documents],
        "number": [1] * len(ids),
    }
    rows = pa.table({"doc_id": ids, **places, "text": documents}, clean.TEXT_DOCUMENTS)
    with arrow.Shards(home / "documents", clean.TEXT_DOCUMENTS) as out:
        for size in sizes or [len(ids)]:
            out.add(arrow.encode(rows.slice(out.rows, size), clean.TEXT_DOCUMENTS, 16), size)
    decided = [
        {"doc_id": i, "split": s, "rule": "near_duplicate" if s == "dropped" else None}
        for i, s in zip(ids, splits, strict=True)
    ]
    with arrow.Writer(root / "data/dedup/p/s", dedup.DECISIONS) as writer:
        writer.write(pa.Table.from_pylist(decided, dedup.DECISIONS))
    (root / "data/sources/p/s").mkdir(parents=True, exist_ok=True)
    arrow.write_json(root / "data/sources/p/s/source.json", {"unit": "line", "format": "text"})
    (root / "dvc.lock").write_text(LOCK.replace("data/raw/v", "data/raw/s"))
    return Lineage(root)


def written(draw: random.Random, words: int) -> str:
    signs = [" ", " ", " ", ", ", ".\n"]
    return "".join(draw.choice(WORDS) + draw.choice(signs) for _ in range(words)) + "."


def statuses(found: list[dict[str, Any]]) -> set[str]:
    return {one["status"] for one in found}


def test_100_kept_100_dropped_and_100_fresh_passages(tmp_path: Path) -> None:
    draw = random.Random(0)
    documents = [written(draw, draw.randint(20, 300)) for _ in range(200)]
    lineage = project(tmp_path, documents, ["train"] * 100 + ["dropped"] * 100)
    for number, text in enumerate(documents):
        places = spans(text)[1]
        begin = draw.randrange(len(places) - 15)
        end = draw.randint(begin + 16, len(places))
        passage = text[places[begin][0] : places[end - 1][1]]
        # Another case and other punctuation, in new company.
        found = trace.trace(lineage, f"{written(draw, 10)} {passage.upper().replace(',', ' -')} {written(draw, 10)}")
        assert statuses(found) == {"kept, not tokenised yet" if number < 100 else "dropped, not trained"}
        assert (found[0]["file"], found[0]["documents"]) == (f"data/raw/s/{number:05}.txt", 1)
        assert found[0]["line"] == 1 + text[: places[begin][0]].count("\n")
        assert found[0]["units"] >= end - begin
    for _ in range(100):
        assert trace.trace(lineage, written(draw, 200)) == []


def test_a_part_of_a_text_leads_to_all_documents_that_hold_it_by_index_or_by_a_look_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut anywhere, in words, too. A text of 18 units and more is found without reading what does not hold it."""
    draw = random.Random(5)
    shared = written(draw, 60)
    documents = [written(draw, draw.randint(5, 80)) for _ in range(60)]
    documents += [f"{written(draw, 9)} {shared} {written(draw, number)}" for number in range(5)]
    documents += ["".join(chr(draw.randrange(0x4E00, 0x9000)) for _ in range(60)), "Mixed 中文 " + shared[:90] + "等等"]
    documents += [
        "".join(chr(draw.randrange(0x1F600, 0x1F640)) for _ in range(60)) for _ in range(5)
    ]  # pairs in UTF-16
    lineage = project(tmp_path, documents, ["train"] * len(documents))
    whole = 0
    for text in [shared, *draw.choices(documents, k=300)]:
        begin = draw.randrange(len(text))
        part = text[begin : begin + draw.randint(1, len(text))]
        with monkeypatch.context() as patch:
            if len(spans(part)[0]) >= (20 if part[0] >= "\U00010000" else 18):  # two units each in UTF-16
                whole += 1
                patch.setattr(lineage, "_scan", None)
            found = [row for _, row in lineage._holding(part)]
        assert found == [row for row, document in enumerate(documents) if part in document]
    assert whole > 50
    assert list(lineage._holding(written(draw, 40))) == []


@pytest.mark.parametrize(("kind", "line"), [("text", 4), ("csv", 4), ("jsonl", 1), ("json", 1)])
def test_the_line_of_a_run_is_one_of_the_raw_file(tmp_path: Path, kind: str, line: int) -> None:
    """JSON writes a text in one line whatever breaks it has; else a record that comes later would be named."""
    paragraphs = [written(random.Random(number), 30).replace("\n", " ") for number in range(4)]
    lineage = project(tmp_path, ["\n".join(paragraphs)], ["train"])
    lineage.sources[0].about["format"] = kind
    (run,) = trace.trace(lineage, paragraphs[3])
    assert (run["line"], run["file"]) == (line, "data/raw/s/00000.txt")


def test_a_match_ends_with_its_document_and_frequency_counts_documents(tmp_path: Path) -> None:
    draw = random.Random(1)
    one, other, shared = (written(draw, 40) for _ in range(3))
    documents = [one, other, f"new {shared} here", f"and {shared} there, {shared} again"]
    lineage = project(tmp_path, documents, ["train"] * 4)
    found = trace.trace(lineage, one + " " + other)
    assert trace.trace(lineage, one + " " + other, limit=1) == found[:1]
    assert [(run["units"], run["file"]) for run in found] == [
        (40, "data/raw/s/00000.txt"),
        (40, "data/raw/s/00001.txt"),
    ]
    (run,) = trace.trace(lineage, "before " + shared)
    assert (run["documents"], run["file"]) == (2, "data/raw/s/00002.txt")


def test_a_shorter_run_that_was_trained_on_is_told_beside_a_longer_one_that_was_dropped(tmp_path: Path) -> None:
    draw = random.Random(2)
    head, tail = written(draw, 30), written(draw, 30)
    lineage = project(tmp_path, [head, head + " " + tail], ["train", "dropped"])
    found = trace.trace(lineage, head + " " + tail)
    assert [(run["units"], run["status"]) for run in found] == [
        (60, "dropped, not trained"),
        (30, "kept, not tokenised yet"),
    ]
    # The other way round the dropped one says nothing new.
    lineage = project(tmp_path / "other", [head + " " + tail, head], ["train", "dropped"])
    assert [run["units"] for run in trace.trace(lineage, head + " " + tail)] == [60]


def test_chinese_is_matched_by_character(tmp_path: Path) -> None:
    draw = random.Random(3)
    law = "".join(chr(draw.randrange(0x4E00, 0x9000)) for _ in range(200))
    lineage = project(tmp_path, [law, "something else"], ["train", "train"])
    (run,) = trace.trace(lineage, "他说：" + law[50:58] + "，" + law[58:66] + "。")
    assert (run["units"], run["text"]) == (16, law[50:58] + "，" + law[58:66])
    assert trace.trace(lineage, "他说：" + law[50:65]) == []


def test_a_text_of_fewer_than_16_units_is_refused(tmp_path: Path) -> None:
    assert trace.trace(project(tmp_path, ["x"], ["train"]), "one two three") == []
    assert "the text has 3 words" in ask(tmp_path, "trace", "one two three", status=1)
    assert "the text has 1 word (" in ask(tmp_path, "trace", "one", status=1)


@pytest.mark.slow
def test_what_a_model_writes_is_traced_to_the_document_that_it_learned_by_heart(tmp_path: Path) -> None:
    """A tiny Llama that has seen one text until it knows it; then a prompt, its answer and where that stands."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    text = "the quick brown fox jumps over the lazy dog and the lazy fox over the brown dog jumps quick over the fox"
    project(tmp_path, ["something else that nobody wrote", "A title.\n" + text], ["train", "train"])
    folder = tmp_path / "models/p/merged"
    (tiny.tokenizer(folder) / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode(text)])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**tiny.CONFIG, "max_position_embeddings": 128}))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(400):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.02:
            break
    model.save_pretrained(folder)

    found = ask(tmp_path, "trace", "--prompt", "the quick brown", "--phase", "p")
    assert text.startswith("the quick brown" + found["text"][:60])
    (run,) = found["runs"]
    assert (run["file"], run["line"], run["documents"]) == ("data/raw/s/00001.txt", 2, 1)
    assert run["units"] >= 16
    assert " ".join(run["text"].split()) in text
    short = ask(tmp_path, "trace", "--prompt", "the quick brown", "--phase", "p", "--max-new-tokens", "4")
    assert short["text"] and short["runs"] == []
    assert "for which" in ask(tmp_path, "trace", "--prompt", text * 9, "--phase", "p", status=1)
    config = (folder / "config.json").read_text().replace("LlamaForCausalLM", "RobertaForMaskedLM")
    (folder / "config.json").write_text(config)
    assert "is a masked model" in ask(tmp_path, "trace", "--prompt", "the", "--phase", "p", status=1)


units = st.lists(st.sampled_from("abcdefgh"), min_size=16, max_size=40)


@given(units, units, st.lists(st.sampled_from("xyz"), max_size=9), st.lists(st.sampled_from("uvw"), max_size=9))
def test_texts_that_share_16_units_share_a_fingerprint(
    shared: list[str], other: list[str], before: list[str], behind: list[str]
) -> None:
    pair = pa.array([" ".join(before + shared), " ".join(other), " ".join(other[:3] + shared + behind)])
    hashes, rows = trace.fingerprints(pair)
    assert set(hashes[rows == 0]) & set(hashes[rows == 2])
    alone, _ = trace.fingerprints(pair.slice(2))
    assert sorted(hashes[rows == 2]) == sorted(alone)  # neighbours do not matter


@given(st.lists(st.sampled_from("ab"), max_size=60), st.lists(st.sampled_from("ab"), max_size=60))
def test_matches_are_all_longest_common_runs(text: list[str], document: list[str]) -> None:
    a, b = ([one.encode() for one in side] for side in (text, document))
    expected = set()
    for i in range(len(a)):
        for j in range(len(b)):
            if i and j and a[i - 1] == b[j - 1]:
                continue
            length = 0
            while i + length < len(a) and j + length < len(b) and a[i + length] == b[j + length]:
                length += 1
            if length >= trace.SHORTEST:
                expected.add((i, i + length, j))
    assert set(trace.matches(a, b)) == expected


def test_of_a_shard_of_more_than_65536_documents_the_last_one_is_named(tmp_path: Path) -> None:
    text = written(random.Random(0), 20)
    target = tmp_path / "index"
    rows = pa.table({"text": ["x"] * 2**16 + [text]})

    class Documents:
        starts = np.array([0, len(rows)])
        batch_of = staticmethod(lambda row: 0)
        batch = staticmethod(lambda number: rows.combine_chunks().to_batches()[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lineage.folders.Folder", lambda *_: Documents())
        trace._build((tmp_path, tmp_path, 0, len(rows), target))
    assert set(trace.look_up(target, trace.fingerprints(pa.array([text]))[0]).tolist()) == {2**16}


def test_the_index_is_exact_sharded_and_built_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(4)
    documents = [written(draw, draw.randint(20, 300)) for _ in range(300)]
    lineage = project(tmp_path / "one", documents, ["train"] * 300, [20] * 15)
    index = trace.Index(lineage.sources[0], workers=2)
    assert len(index.shards) == 15
    hashes, rows = trace.fingerprints(pa.array(documents))
    for number in draw.sample(range(len(hashes)), 200):
        found = {row for row, _ in index.candidates(hashes[number : number + 1])}
        assert set(rows[hashes == hashes[number]].tolist()) <= found
        assert len(found) <= 3  # 16 + a few bits of the hash are kept: hardly ever another row
    before = {shard.path: shard.path.stat().st_mtime_ns for shard in index.shards}
    tokens = sum(len(text.split()) for text in documents)
    assert index.size() < 3 * tokens

    documents.insert(150, written(draw, 100))
    (tmp_path / "one/data").rename(tmp_path / "old")
    lineage = project(tmp_path / "one", documents, ["train"] * 301, [20] * 7 + [21] + [20] * 7)
    index = trace.Index(lineage.sources[0], workers=1)
    new = [shard for shard in index.shards if before.get(shard.path) != shard.path.stat().st_mtime_ns]
    assert new == [index.shards[7]]
    assert np.sum([shard.last - shard.first for shard in index.shards]) == 301
    # Other code may cut texts into other units.
    for module in (folders, trace):
        monkeypatch.setattr(module, "code", lambda: b"edited")
    edited = trace.Index(Lineage(tmp_path / "one").sources[0], workers=1)
    assert not {shard.path for shard in edited.shards} & {shard.path for shard in index.shards}
