"""group_blocks: cut at the manifest's tokens, the blocks are the documents in order; no token is lost or moved."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lineage import verify
from tokenizers import Tokenizer

import document_turns
import group_blocks
import tiny
from conftest import Runner, copy_project, write
from group_blocks import LEFT_OUT, Grouper, LeftOut, Params, blocks_schema, group
from kit import arrow
from kit.model import IGNORED, Blocks
from tokenize_text import tokens_schema

EOS = 65534
PAD = 65535  # the largest id of two bytes, so that an id that wraps round is seen
# A document: its split, and (id, learned) for each of its tokens.
DOCUMENT = st.tuples(
    st.sampled_from(["train", "train", "eval"]),
    st.lists(st.tuples(st.integers(0, 65534), st.booleans()), min_size=1, max_size=40),
)
# clean refuses a source without a document, and dedup keeps the first of copies: only later sources may be empty.
SOURCES = st.tuples(st.lists(DOCUMENT, min_size=1, max_size=8), st.lists(DOCUMENT, max_size=8)).map(list)
Documents = list[tuple[str, list[tuple[int, bool]]]]


def lists(values: list[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    """Return arrays of any lengths as one Arrow list column."""
    offsets = np.concatenate([[0], np.cumsum([len(value) for value in values])]).astype(np.int32)
    flat = np.concatenate(values) if values else np.array([], dtype=np.int64)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat).cast(kind))


class Grouped(NamedTuple):
    """What a folder of blocks holds."""

    ids: list[list[int]]
    learn: list[list[bool]]
    starts: list[list[int]]
    counts: dict[str, int]
    digest: str
    left_out: list[dict[str, Any]]
    shown: dict[str, tuple[int, int]]


def identity(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()[:16]


def write_tokens(folder: Path, documents: Documents, learn: bool = True, batch_rows: int = 256, first: int = 0) -> Path:
    """Write a folder as tokenize_text leaves it; `first` numbers the documents' identities."""
    schema = tokens_schema(pa.uint16(), learn)
    columns = [
        pa.array([identity(first + number) for number in range(len(documents))], pa.binary(16)),
        pa.array([split for split, _ in documents], pa.string()),
        pa.array([[token for token, _ in tokens] for _, tokens in documents], pa.list_(pa.uint16())),
        pa.array([[mark for _, mark in tokens] for _, tokens in documents], pa.list_(pa.bool_())),
    ]
    counts = {"train": 0, "eval": 0}
    for split, tokens in documents:
        counts[split] += len(tokens)
    with arrow.Writer(folder, schema, batch_rows=batch_rows) as out:
        out.write(pa.Table.from_arrays(columns[: len(schema)], schema=schema))
        out.counts = counts
    return folder


def grouped(
    sources: list[Documents],
    block_size: int,
    mode: str = "concat",
    last_block: str = "pad",
    split: str = "train",
    batch_rows: int = 256,
    **options: Any,
) -> Grouped:
    """Group a split of `sources`, which are called 0, 1, ...; `batch_rows` of the tokens folders."""
    given = Params.model_construct(**{**Params(block_size=8).model_dump(), "block_size": block_size, **options})
    given.mode, given.last_block = mode, last_block  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as name:
        folders, first = [], 0
        for number, source in enumerate(sources):
            folders.append(write_tokens(Path(name, str(number)), source, batch_rows=batch_rows, first=first))
            first += len(source)
        out = arrow.Writer(Path(name, "out"), blocks_schema(pa.uint16(), block_size, True, starts=mode != "concat"))
        listed = arrow.Writer(Path(name, "left_out"), LEFT_OUT)
        left_out = LeftOut(listed if given.leaves_out else None, given, EOS)
        grouper = Grouper(out, block_size, PAD)
        shown = group(folders, split, given, grouper, left_out)
        n_documents = sum(one.documents for one in shown.values())
        out.close(tokens=grouper.tokens, dropped_tokens=left_out.tokens, documents=n_documents)
        listed.close()
        table = arrow.table(Path(name, "out")).to_pydict()
        return Grouped(
            table["input_ids"],
            table["learn"],
            table.get("starts", []),
            out.counts,
            hashlib.sha256(Path(name, "out", "data-00000.arrow").read_bytes()).hexdigest(),
            arrow.table(Path(name, "left_out")).to_pylist(),
            {name: (one.documents, one.tokens) for name, one in shown.items()},
        )


def train_documents(sources: list[Documents]) -> list[list[tuple[int, bool]]]:
    return [tokens for source in sources for split, tokens in source if split == "train"]


def flat(blocks: Grouped) -> list[tuple[int, bool]]:
    """Return (id, learned) of all places of all blocks, in order."""
    return [pair for row in zip(blocks.ids, blocks.learn, strict=True) for pair in zip(*row, strict=True)]


def packed_pieces(blocks: Grouped) -> list[list[tuple[int, bool]]]:
    """Return what stands between the starts of each block, in order; behind the last start there is padding alone."""
    found = []
    for ids, learn, starts in zip(blocks.ids, blocks.learn, blocks.starts, strict=True):
        pairs = list(zip(ids, learn, strict=True))
        assert starts[0] == 0
        found += [pairs[start:end] for start, end in itertools.pairwise(starts)]
        assert pairs[starts[-1] :] == [(PAD, False)] * (len(ids) - starts[-1])
    return found


EXAMPLE: Documents = [("train", [(n, True) for n in ids]) for ids in ([0, 5, 6, 1], [0, 7, 1])]


@pytest.mark.parametrize(
    ("mode", "documents", "ids", "starts"),
    [
        ("concat", EXAMPLE, [[0, 5, 6, 1], [0, 7, 1, PAD]], []),
        ("line", EXAMPLE, [[0, 5, 6, 1], [0, 7, 1, PAD]], [[0, 4], [0, 3]]),
        ("best_fit", [EXAMPLE[1], ("train", [(9, True)])], [[0, 7, 1, 9]], [[0, 3, 4]]),
    ],
)
def test_the_worked_example_of_the_docstring(
    mode: str, documents: Documents, ids: list[list[int]], starts: list[list[int]]
) -> None:
    found = grouped([documents], 4, mode)
    assert (found.ids, found.starts) == (ids, starts)
    assert found.counts["tokens"] == sum(len(tokens) for _, tokens in documents)


@given(sources=SOURCES, block_size=st.integers(1, 50))
def test_blocks_cut_at_the_tokens_of_the_manifest_are_the_documents_in_order(
    sources: list[Documents], block_size: int
) -> None:
    """Each id with its learn mark; padding at the end alone, less than a block of it, and not learned."""
    blocks = grouped(sources, block_size)
    stream = [pair for tokens in train_documents(sources) for pair in tokens]
    assert flat(blocks)[: blocks.counts["tokens"]] == stream
    padding = flat(blocks)[len(stream) :]
    assert padding == [(PAD, False)] * len(padding)
    assert len(padding) < block_size
    assert blocks.counts == {
        "rows": len(blocks.ids),
        "tokens": len(stream),
        "dropped_tokens": 0,
        "documents": len(train_documents(sources)),
    }


@given(sources=SOURCES, block_size=st.integers(1, 50))
def test_a_dropped_last_block_is_counted(sources: list[Documents], block_size: int) -> None:
    blocks = grouped(sources, block_size, last_block="drop")
    stream = [pair for tokens in train_documents(sources) for pair in tokens]
    assert flat(blocks) == stream[: len(stream) - len(stream) % block_size]
    assert blocks.counts["dropped_tokens"] == len(stream) % block_size
    assert blocks.counts["tokens"] == len(flat(blocks))


@given(sources=SOURCES, block_size=st.integers(1, 50), mode=st.sampled_from(["line", "best_fit"]))
def test_whole_documents_stand_between_the_starts_of_their_blocks(
    sources: list[Documents], block_size: int, mode: str
) -> None:
    """Every piece once; a document longer than a block in pieces of it; what is not between starts is padding."""
    blocks = grouped(sources, block_size, mode)
    documents = train_documents(sources)
    expected = [tokens[at : at + block_size] for tokens in documents for at in range(0, len(tokens), block_size)]
    found = packed_pieces(blocks)
    assert (found if mode == "line" else sorted(found)) == (expected if mode == "line" else sorted(expected))
    assert blocks.counts["tokens"] == sum(map(len, documents))
    assert blocks.counts["documents"] == len(documents)


@given(
    sources=SOURCES,
    block_size=st.integers(1, 20),
    mode=st.sampled_from(["concat", "line", "best_fit"]),
    batch_rows=st.integers(1, 5),
)
@settings(max_examples=50)
def test_batch_boundaries_do_not_matter(sources: list[Documents], block_size: int, mode: str, batch_rows: int) -> None:
    """Nor do those of the sources: one source with all documents gives the bytes of two."""
    expected = grouped(sources, block_size, mode)
    assert grouped(sources, block_size, mode, batch_rows=batch_rows) == expected
    assert grouped([[document for source in sources for document in source]], block_size, mode)[:5] == expected[:5]


LONG = st.fixed_dictionaries({"mode": st.sampled_from(["line", "best_fit"]), "block_size": st.integers(1, 30)})


@given(sources=SOURCES, given_=LONG)
def test_a_truncated_document_keeps_its_eos_and_what_is_cut_is_counted(
    sources: list[Documents], given_: dict[str, Any]
) -> None:
    """EOS stands in the place of the last token, with its mark; without an answer before it, it is left out."""
    size, documents = given_["block_size"], train_documents(sources)
    blocks = grouped(sources, long_documents="truncate", **given_)
    expected = [
        tokens if len(tokens) <= size else [*tokens[: size - 1], (EOS, tokens[size - 1][1])]
        for tokens in documents
        if len(tokens) <= size or any(learn for _, learn in tokens[: size - 1])
    ]
    assert sorted(packed_pieces(blocks)) == sorted(expected)
    assert blocks.counts["tokens"] == sum(map(len, expected))
    assert blocks.counts["tokens"] + blocks.counts["dropped_tokens"] == sum(map(len, documents))
    assert blocks.counts["documents"] == len(documents)
    listed = [(row["tokens"], row["left_out"], row["rule"]) for row in blocks.left_out]
    assert listed == [
        (len(tokens), len(tokens) - size, "truncate")
        if any(learn for _, learn in tokens[: size - 1])
        else (len(tokens), len(tokens), "no_answer")
        for tokens in documents
        if len(tokens) > size
    ]


@given(sources=SOURCES, given_=LONG, rule=st.sampled_from(["truncate", "drop"]))
def test_one_source_may_lose_what_another_keeps(sources: list[Documents], given_: dict[str, Any], rule: str) -> None:
    """Of source 0 as if it were alone, of source 1 all of each document, in pieces."""
    size = given_["block_size"]
    blocks = grouped(sources, long_documents={"0": rule}, **given_)
    alone = packed_pieces(grouped([sources[0]], long_documents=rule, **given_))
    pieces = [tokens[at : at + size] for tokens in train_documents(sources[1:]) for at in range(0, len(tokens), size)]
    assert sorted(packed_pieces(blocks)) == sorted([*alone, *pieces])
    assert {row["source"] for row in blocks.left_out} <= {"0"}
    everything = sum(map(len, train_documents(sources)))
    assert blocks.counts["tokens"] + blocks.counts["dropped_tokens"] == everything
    assert blocks.counts["dropped_tokens"] == sum(row["left_out"] for row in blocks.left_out)


RULE = st.sampled_from(["split", "truncate", "drop"])


@given(sources=SOURCES, given_=LONG, rules=RULE | st.dictionaries(st.sampled_from("01"), RULE))
def test_verify_rebuilds_the_same_blocks(sources: list[Documents], given_: dict[str, Any], rules: Any) -> None:
    """By its own code, from the same documents."""
    blocks = grouped(sources, long_documents=rules, **given_)
    names = (identity(number) for number in itertools.count())
    documents = [
        verify.Document(
            doc_id, str(number), 0, pa.array([i for i, _ in tokens], pa.uint16()), pa.array([m for _, m in tokens])
        )
        for number, source in enumerate(sources)
        for (split, tokens), doc_id in zip(source, names, strict=False)
        if split == "train"
    ]
    grouping, rows = {**given_, "long_documents": rules}, list[dict[str, Any]]()
    shortened = verify._shortened(
        iter([documents]), grouping, EOS, lambda **row: rows.append({**row, "split": "train"})
    )
    made = list(verify._packed(shortened, grouping, PAD))
    assert rows == blocks.left_out
    assert [ids.to_pylist() for ids, *_ in made] == blocks.ids
    assert [learn.to_pylist() for _, learn, *_ in made] == blocks.learn
    assert [starts for *_, starts, _ in made] == blocks.starts
    assert sum(tokens for *_, tokens in made) == blocks.counts["tokens"]


@given(sources=SOURCES, given_=LONG)
def test_a_dropped_document_is_counted_and_listed(sources: list[Documents], given_: dict[str, Any]) -> None:
    size, documents = given_["block_size"], train_documents(sources)
    blocks = grouped(sources, long_documents="drop", **given_)
    assert sorted(packed_pieces(blocks)) == sorted(tokens for tokens in documents if len(tokens) <= size)
    assert blocks.counts["tokens"] + blocks.counts["dropped_tokens"] == sum(map(len, documents))
    numbered = [
        (number, tokens) for number, (split, tokens) in enumerate(itertools.chain(*sources)) if split == "train"
    ]
    assert [(row["doc_id"], row["left_out"], row["rule"]) for row in blocks.left_out] == [
        (identity(number), len(tokens), "drop") for number, tokens in numbered if len(tokens) > size
    ]


@given(
    sources=SOURCES,
    weights=st.lists(st.sampled_from([0.2, 0.5, 1.0, 1.5, 2.0, 3.0]), min_size=2, max_size=2),
    mode=st.sampled_from(["concat", "line", "best_fit"]),
)
def test_documents_are_shown_as_often_as_weights_say_all_of_them_before_one_again(
    sources: list[Documents], weights: list[float], mode: str
) -> None:
    """Turn by turn; whole weights exactly, the rest by a draw that is the document's own; eval is never weighted."""
    named = {str(number): weight for number, weight in enumerate(weights)}
    blocks = grouped(sources, 16, mode, weights=named)
    numbers = iter(range(1000))
    often = []
    for source, weight in zip(sources, weights, strict=True):
        for split, tokens in source:
            identities = pa.array([identity(next(numbers))], pa.binary(16))
            if split == "train":
                often.append((int(document_turns.times(identities, weight)[0]), tokens))
                assert int(weight) <= often[-1][0] <= -(-weight // 1)
    expected = [tokens for turn in range(3) for count, tokens in often if count > turn]
    if mode == "concat":
        assert flat(blocks)[: blocks.counts["tokens"]] == [pair for tokens in expected for pair in tokens]
    pieces = [tokens[at : at + 16] for tokens in expected for at in range(0, len(tokens), 16)]
    if mode == "line":
        assert packed_pieces(blocks) == pieces
    if mode == "best_fit":
        assert sorted(packed_pieces(blocks)) == sorted(pieces)
    assert blocks.counts["tokens"] == sum(map(len, expected)) == sum(tokens for _, tokens in blocks.shown.values())
    assert blocks.counts["documents"] == len(expected)
    assert grouped(sources, 16, mode, weights=named, split="eval")[:5] == grouped(sources, 16, mode, split="eval")[:5]


def test_no_block_holds_a_document_twice() -> None:
    """best_fit would put the two halves of a block together; each turn is packed by itself."""
    blocks = grouped([[("train", [(number, True)] * 8) for number in range(5)]], 16, "best_fit", weights={"0": 2.0})
    assert [len({*ids}) for ids in blocks.ids] == [2, 2, 2, 2, 2, 2]


def test_a_share_of_a_source_is_drawn_by_content() -> None:
    """Near the share; the same documents for a smaller share too, so that raising a weight takes nothing away."""
    identities = pa.array([identity(number) for number in range(10000)], pa.binary(16))
    tenth, third = (document_turns.times(identities, weight) for weight in (0.1, 1.3))
    assert 900 < tenth.sum() < 1100
    assert 12800 < third.sum() < 13200
    assert {*np.flatnonzero(tenth)} <= {*np.flatnonzero(third == 2)}
    assert (document_turns.times(identities[100:200], 0.1) == tenth[100:200]).all()
    # The last 8 bytes decide, and a whole weight leaves nothing to draw.
    ends = pa.array([b"\xff" * 8 + bytes(8), bytes(8) + b"\xff" * 8], pa.binary(16))
    assert [document_turns.times(ends, weight).tolist() for weight in (0.5, 2.0)] == [[1, 0], [2, 2]]


@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), max_size=6),
    turns=st.lists(st.integers(0, 1), min_size=6, max_size=6).map(sorted),
    tokens=st.integers(1, 20),
)
def test_windows_keep_order_and_end_at_a_document_and_a_turn(
    lengths: list[list[int]], turns: list[int], tokens: int
) -> None:
    """As soon as they hold `tokens`, wherever the batches end."""
    stream, count = [], 0
    for turn, some in zip(turns, lengths, strict=False):
        total = sum(some)
        ids, identities = np.arange(count, count + total), pa.array([identity(n) for n in some], pa.binary(16))
        stream.append(document_turns.Documents(turn, "s", identities, np.array(some), ids, None))
        count += total
    windows = list(document_turns.windows(iter(stream), tokens))
    assert [one for window in windows for one in window.ids] == list(range(count))
    assert [one for window in windows for one in window.lengths] == [one for some in lengths for one in some]
    for window, following in itertools.pairwise(windows):
        assert window.lengths.sum() == len(window.ids)
        assert window.lengths[:-1].sum() < tokens
        assert len(window.ids) >= tokens or following.turn > window.turn


def test_several_windows_hold_every_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """And for other batches the same bytes."""
    monkeypatch.setattr(group_blocks, "window_tokens", lambda block_size: 50)
    documents: Documents = [("train", [(number, True)] * (number % 13 + 1)) for number in range(200)]
    blocks = grouped([documents], 16, "best_fit")
    assert sorted(packed_pieces(blocks)) == sorted(tokens for _, tokens in documents)
    assert grouped([documents], 16, "best_fit", batch_rows=7) == blocks


def test_what_belongs_to_another_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode best_fit pads each block and drops nothing"):
        Params(block_size=8, mode="best_fit", last_block="drop")
    with pytest.raises(ValueError, match="long_documents: truncate is for modes best_fit and line"):
        Params(block_size=8, long_documents="truncate")
    with pytest.raises(ValueError, match="mode concat cuts no document short"):
        Params(block_size=8, long_documents={"a": "split", "b": "drop"})
    assert not Params(block_size=8, long_documents={"a": "split"}).leaves_out


@pytest.mark.parametrize(
    ("group", "key", "how"),
    [
        ({"last_block": "drop"}, "last_block", "lower"),
        ({"mode": "line", "long_documents": "drop"}, "long_documents", "raise"),
    ],
)
def test_a_split_that_is_left_out_as_a_whole_is_not_called_empty(
    project: Path, run_stage: Runner, group: dict[str, str], key: str, how: str
) -> None:
    tiny.params_yaml(project, p={"base": "models/configs/llama_small", "group_blocks": {"block_size": 8, **group}})
    tiny.tokenizer(project / "models/tokenizers/p")
    rows: Documents = [("train", [(5, True)] * 8)] * 2 + [("eval", [(5, True)] * (9 if "mode" in group else 7))]
    write_tokens(project / "data/tokens/p/p_text", rows, learn=False)
    finished = run_stage(project, "group_blocks", "p")
    said = (
        f"the eval split has 0 tokens beside {len(rows[2][1])} that `{key}` leaves out, too few for a block of 8; {how}"
    )
    assert said in finished.stderr


def test_a_block_larger_than_the_corpus_is_refused_and_the_previous_blocks_stay(
    project: Path, run_stage: Runner
) -> None:
    """The sentence says how many tokens there are and which key to change."""
    tiny.params_yaml(project, p={"base": "models/configs/llama_small", "group_blocks": {"block_size": 16}})
    tiny.tokenizer(project / "models/tokenizers/p")
    write(project / "data/blocks/p/train/manifest.json", "of the last good run")
    too_few: dict[str, Documents] = {
        "the train split has 15 tokens": [("train", [(5, True)] * 15), ("eval", [(5, True)])],
        "the eval split has 0 tokens": [("train", [(5, True)] * 16)],
    }
    for sentence, documents in too_few.items():
        write_tokens(project / "data/tokens/p/p_text", documents, learn=False)
        finished = run_stage(project, "group_blocks", "p")
        assert (finished.returncode, len(finished.stderr.splitlines())) == (1, 1), finished.stderr
        assert f"{sentence}, too few for a block of 16; lower phases.p.group_blocks.block_size" in finished.stderr
        assert (project / "data/blocks/p/train/manifest.json").read_text() == "of the last good run"


@pytest.mark.parametrize("mode", ["concat", "line", "best_fit"])
def test_the_command_writes_both_splits_and_stops_when_a_token_is_lost(
    project: Path, run_stage: Runner, mode: str
) -> None:
    """Lost: the manifest of the tokens counts one more than the folder holds. Then nothing new is published."""
    group = {"block_size": 16, "mode": mode}
    tiny.params_yaml(project, p={"base": "models/configs/llama_small", "group_blocks": group})
    tiny.tokenizer(project / "models/tokenizers/p")
    tokens = project / "data/tokens/p/p_text"
    write_tokens(tokens, [("train", [(5, True)] * 20), ("eval", [(6, True)] * 9), ("train", [(7, False)] * 5)])
    assert run_stage(project, "group_blocks", "p").returncode == 0
    counts = [arrow.manifest(project / "data/blocks/p" / split)["counts"] for split in ("train", "eval")]
    assert [(c["tokens"], c["documents"]) for c in counts] == [(25, 2), (9, 1)]
    before = (project / "data/blocks/p/train/manifest.json").read_bytes()

    manifest = arrow.read_json(tokens / "manifest.json")
    manifest["counts"]["train"] += 1
    arrow.write_json(tokens / "manifest.json", manifest)
    finished = run_stage(project, "group_blocks", "p")
    assert finished.returncode == 1
    assert "26 train tokens of p_text were read but 25 found came out; nothing was published" in finished.stderr
    assert (project / "data/blocks/p/train/manifest.json").read_bytes() == before


@pytest.mark.parametrize("mode", ["concat", "line", "best_fit"])
def test_it_stops_when_a_document_is_lost_on_the_way_to_the_blocks(
    project: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = {"block_size": 16, "mode": mode}
    tiny.params_yaml(project, p={"base": "models/configs/llama_small", "group_blocks": group})
    tiny.tokenizer(project / "models/tokenizers/p")
    rows: Documents = [("train", [(5, True)] * 20), ("eval", [(6, True)] * 9), ("train", [(7, True)] * 5)]
    write_tokens(project / "data/tokens/p/p_text", rows, batch_rows=1)
    monkeypatch.chdir(project)
    monkeypatch.setattr(group_blocks, "documents", lambda *given: itertools.islice(document_turns.documents(*given), 1))
    with pytest.raises(ValueError, match=r"25 train tokens were read but 20 kept \+ 0 dropped came out"):
        group_blocks.main("p")


def test_a_split_of_which_little_is_left_is_not_called_too_small(project: Path, run_stage: Runner) -> None:
    """Its text would fill a block, but for a document that was too long for one."""
    group = {"block_size": 16, "mode": "line", "long_documents": "drop"}
    tiny.params_yaml(project, p={"base": "models/configs/llama_small", "group_blocks": group})
    tiny.tokenizer(project / "models/tokenizers/p")
    rows: Documents = [("train", [(5, True)] * 20), ("train", [(5, True)] * 5), ("eval", [(6, True)] * 9)]
    write_tokens(project / "data/tokens/p/p_text", rows)
    finished = run_stage(project, "group_blocks", "p")
    assert finished.returncode == 0, finished.stderr
    assert arrow.manifest(project / "data/blocks/p/train")["counts"]["tokens"] == 5


@pytest.mark.parametrize("mode", ["concat", "line", "best_fit"])
def test_texts_beside_conversations_are_learned_whole(project: Path, run_stage: Runner, mode: str) -> None:
    """Also in a split that has no conversation: a source of texts has no marks of its own."""
    group = {"block_size": 16, "mode": mode}
    tiny.params_yaml(project, p={"base": "models/configs/llama_small", "group_blocks": group})
    params = json.loads((project / "params.yaml").read_text())
    params["sources"]["chats"] = params["sources"]["p_text"]
    (project / "params.yaml").write_text(json.dumps(params))
    tiny.tokenizer(project / "models/tokenizers/p")
    write_tokens(project / "data/tokens/p/chats", [("train", [(5, False), (6, True)] * 4)])
    write_tokens(
        project / "data/tokens/p/p_text", [(split, [(7, True)] * 9) for split in ("train", "eval")], learn=False
    )
    finished = run_stage(project, "group_blocks", "p")
    assert finished.returncode == 0, finished.stderr
    for split, learned in (("train", {6: 4, 7: 9}), ("eval", {7: 9})):
        blocks = arrow.table(project / "data/blocks/p" / split).to_pylist()
        marked = [pair for block in blocks for pair in zip(block["input_ids"], block["learn"], strict=True)]
        assert Counter(identity for identity, learn in marked if learn) == learned


def test_without_a_padding_token_eos_fills_the_last_block(project: Path, run_stage: Runner) -> None:
    tiny.params_yaml(project, p={"base": "models/configs/llama_small", "group_blocks": {"block_size": 16}})
    tiny.tokenizer(project / "models/tokenizers/p")
    config = arrow.read_json(project / "models/tokenizers/p/tokenizer_config.json")
    del config["pad_token"]
    arrow.write_json(project / "models/tokenizers/p/tokenizer_config.json", config)
    write_tokens(project / "data/tokens/p/p_text", [("train", [(5, True)] * 20), ("eval", [(6, True)] * 9)])
    finished = run_stage(project, "group_blocks", "p")
    assert finished.returncode == 0, finished.stderr
    ids = arrow.table(project / "data/blocks/p/train")["input_ids"].to_pylist()
    assert ids == [[5] * 16, [5] * 4 + [1] * 12]  # 1 is EOS


def test_the_window_in_which_documents_are_packed_is_frozen() -> None:
    """Another one would put the documents of every large phase into other blocks."""
    assert [group_blocks.window_tokens(size) for size in (8, 8192, 2**14)] == [2**21, 2**21, 2**22]


def test_a_source_without_documents_gives_nothing(project: Path, run_stage: Runner) -> None:
    """Its first one in the order of names, all copies of what another source holds."""
    tiny.params_yaml(project, p={"base": "models/configs/llama_small", "group_blocks": {"block_size": 16}})
    params = json.loads((project / "params.yaml").read_text())
    params["sources"]["empty"] = params["sources"]["p_text"]
    (project / "params.yaml").write_text(json.dumps(params))
    tiny.tokenizer(project / "models/tokenizers/p")
    write_tokens(project / "data/tokens/p/empty", [])
    write_tokens(project / "data/tokens/p/p_text", [("train", [(5, True)] * 20), ("eval", [(6, True)] * 9)])
    finished = run_stage(project, "group_blocks", "p")
    assert finished.returncode == 0, finished.stderr
    shown = arrow.read_json(project / "data/blocks/p/grouping.json")["train"]
    assert (shown["empty"]["tokens"], shown["p_text"]["tokens"]) == (0, 20)


def test_the_command_writes_what_places_and_counts_follow_from(project: Path, run_stage: Runner) -> None:
    """Parameters, and for each source of each split its weight, documents and tokens; the run record counts them."""
    group = {"block_size": 16, "mode": "best_fit", "long_documents": "truncate", "weights": {"p_text": 2}}
    tiny.params_yaml(project, p={"base": "models/configs/llama_small", "group_blocks": group})
    tiny.tokenizer(project / "models/tokenizers/p")
    write_tokens(
        project / "data/tokens/p/p_text",
        [("train", [(5, True)] * 20), ("eval", [(6, True)] * 9), ("train", [(7, False)])],
    )
    finished = run_stage(project, "group_blocks", "p")
    assert finished.returncode == 0, finished.stderr
    folder = project / "data/blocks/p"
    assert arrow.read_json(folder / "grouping.json") == {
        **Params(**group).model_dump(),
        "train": {"p_text": {"weight": 2.0, "documents": 4, "tokens": 42}},
        "eval": {"p_text": {"weight": 1.0, "documents": 1, "tokens": 9}},
    }
    assert arrow.table(folder / "left_out").to_pylist() == 2 * [
        {"doc_id": identity(0), "split": "train", "source": "p_text", "rule": "truncate", "tokens": 20, "left_out": 4}
    ]
    counts = {"rows": 4, "tokens": 34, "dropped_tokens": 8, "documents": 4}
    assert arrow.manifest(folder / "train")["counts"] == counts
    table = arrow.table(folder / "train").to_pydict()
    assert table["input_ids"] == 2 * [[5] * 15 + [1], [7] + [2] * 15]  # 1 is EOS, 2 is padding
    assert arrow.read_json(project / "metrics/runs/group_blocks@p.json")["counts"] == [
        {"train_blocks": 4, "train_tokens": 34, "train_padding": 30, "train_left_out": 8, "p_text_tokens": 42}
        | {"eval_blocks": 1, "eval_tokens": 9, "eval_padding": 7}
    ]


def test_a_weight_for_no_source_of_the_phase_is_refused(project: Path, run_stage: Runner) -> None:
    group = {"block_size": 16, "weights": {"p_txt": 2}}
    tiny.params_yaml(project, p={"base": "models/configs/llama_small", "group_blocks": group})
    finished = run_stage(project, "check_params")
    assert (finished.returncode, len(finished.stderr.splitlines())) == (1, 1), finished.stderr
    assert "phases.p.group_blocks.weights names p_txt, no source of this phase; its sources: p_text" in finished.stderr


def test_the_loader_gives_padding_no_loss(tmp_path: Path) -> None:
    """Also padding in the middle of the folder, whose place `starts` tells; the 3 is marked as not learned."""
    documents: Documents = [
        ("train", [(4, True)] * 3),
        ("train", [(6, True)] * 9),
        ("train", [(8, True), (3, False)]),
    ]
    out = arrow.Writer(tmp_path / "blocks", blocks_schema(pa.uint16(), 8, True, starts=True))
    tokens = document_turns.documents([write_tokens(tmp_path / "tokens", documents)], "train", {})
    Grouper(out, 8, PAD).packed(next(document_turns.windows(tokens, 1000)), "line")
    out.close(tokens=14)
    labels = Blocks(arrow.table(tmp_path / "blocks"), 14).__getitems__([3, 0, 1, 2])["labels"].tolist()
    x = IGNORED
    assert labels == [[8] + [x] * 7, [4] * 3 + [x] * 5, [6] * 8, [6] + [x] * 7]


BLOCK_SIZE = 24
# The whole chain. A corpus with every awkward thing, in four sources of one phase; `b_copies` holds nothing new.
LINES = [
    "plain text",
    "CRLF\r",
    "</s><s> <|im_end|>",
    "法律 第一条　为了",
    "\U0001f30a naïve",
    "cafe\u0301",
    "{{ x }} \ue0000\ue001",
]
TEXTS = [f"{line}\n{number} {line}" for number in range(30) for line in LINES]
CHATS = [(f"{number}? {line}", f"{line}!{number}") for number in range(20) for line in LINES]
GROUPS: dict[str, dict[str, Any]] = {
    "a_files": {"format": "text", "sample_by": "document"},
    "b_copies": {"format": "text", "sample_by": "document"},
    "c_lines": {"format": "jsonl"},
    "d_chat": {"format": "jsonl", "record": "alpaca"},
}
STAGES = ["clean", "dedup", "train_tokenizer", "add_bos_eos", "tokenize_text", "group_blocks"]
HEAVY = {"torch", "transformers", "datasets", "peft", "pandas", "accelerate"}
# Runs a stage as the command does, then says which heavy modules it has imported.
WRAPPER = f"""
import atexit, runpy, sys
atexit.register(lambda: print("HEAVY", sorted({HEAVY!r} & sys.modules.keys())))
sys.path.insert(0, "stages")
sys.argv = ["stages/" + sys.argv[1] + ".py", sys.argv[2]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def write_corpus(project: Path) -> None:
    for number, text in enumerate(TEXTS):
        write(project / f"data/raw/a_files/{number:04}.txt", text)
        if number % 7 == 0:
            write(project / f"data/raw/b_copies/{number}.md", text)
    rows = [json.dumps({"text": f"row {text}"}) for text in TEXTS]
    write(project / "data/raw/c_lines/x.jsonl", "\n".join([*rows, "", rows[0]]))
    chats = [json.dumps({"instruction": question, "input": "", "output": answer}) for question, answer in CHATS]
    write(project / "data/raw/d_chat/x.jsonl", "\n".join(chats))
    tiny.params_yaml(
        project,
        p={
            "base": "models/configs/llama_small",
            "dedup": {"eval_fraction": 0.1},
            "train_tokenizer": {"mode": "train", "vocab_size": 500, "chat_template": "human_assistant"},
            "group_blocks": {"block_size": BLOCK_SIZE},
        },
    )
    content = json.loads((project / "params.yaml").read_text())
    content["sources"] = {
        name: {"phase": "p", "path": f"data/raw/{name}", "clean": {"license": "unknown", **group}}
        for name, group in GROUPS.items()
    }
    (project / "params.yaml").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A project after the six data stages, and what each stage printed last: the heavy modules that it imported."""
    project = copy_project(tmp_path_factory.mktemp("chain") / "project")
    write_corpus(project)
    heavy = {}
    for stage in STAGES:
        for name in ["p"] if stage in ("dedup", "train_tokenizer", "group_blocks") else GROUPS:
            command = [sys.executable, "-c", WRAPPER, stage, name]
            finished = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
            assert finished.returncode == 0, finished.stderr
            heavy[stage] = finished.stdout.splitlines()[-1]
    return project, heavy


def spelled(tokenizer: Tokenizer) -> dict[int, bytes]:
    """Return the bytes of each id of a byte-level tokenizer: a block may begin inside a character."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    letters = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    special = {"<s>", "</s>", "<pad>"}
    return {
        identity: token.encode() if token in special else bytes(letters[letter] for letter in token)
        for token, identity in tokenizer.get_vocab().items()
    }


def kept_text(project: Path, split: str) -> bytes:
    """Return what the blocks of a split must say, from the kept documents and what dedup decided about them."""
    said = []
    for source in GROUPS:
        documents = arrow.table(project / "data/clean/p" / source / "documents").to_pylist()
        decisions = arrow.table(project / "data/dedup/p" / source).to_pylist()
        for document, decision in zip(documents, decisions, strict=True):
            if decision["split"] != split:
                continue
            if "text" in document:
                said.append(f"<s>{document['text']}</s>")
            else:
                question, answer = (message["content"] for message in document["messages"])
                said.append(f"<s>Human: {question}\n\nAssistant: {answer}</s>")
    return "".join(said).encode()


def test_random_blocks_of_the_whole_chain_spell_the_kept_text_at_their_place(
    chain: tuple[Path, dict[str, str]],
) -> None:
    """Block n spells exactly the bytes after those of the blocks before it; together they are the whole text."""
    project, _ = chain
    pieces = spelled(Tokenizer.from_file(str(project / "models/tokenizers/p/tokenizer.json")))
    for split in ("train", "eval"):
        folder = project / "data/blocks/p" / split
        tokens, expected = arrow.manifest(folder)["counts"]["tokens"], kept_text(project, split)
        blocks = arrow.table(folder)["input_ids"].to_pylist()
        sizes = [sum(len(pieces[identity]) for identity in block) for block in blocks]
        places = np.concatenate([[0], np.cumsum(sizes)])
        for number in random.Random(0).choices(range(len(blocks)), k=100):
            ids = blocks[number][: tokens - number * BLOCK_SIZE]
            said = b"".join(pieces[identity] for identity in ids)
            assert said == expected[places[number] : places[number] + len(said)]
        padding = pieces[2] * (len(blocks) * BLOCK_SIZE - tokens)
        assert b"".join(pieces[identity] for block in blocks for identity in block) == expected + padding


def test_the_chain_keeps_every_text_once(chain: tuple[Path, dict[str, str]]) -> None:
    """Each text of the corpus is in one split; a source of copies leaves nothing behind; counts agree end to end."""
    project, _ = chain
    said = kept_text(project, "train") + kept_text(project, "eval")
    for text in {*TEXTS, *(f"row {text}" for text in TEXTS)}:
        cleaned = text.replace("\r\n", "\n").replace("\r", "\n").replace("e\u0301", "é").encode()
        assert said.count(b"<s>" + cleaned + b"</s>") == 1
    assert arrow.manifest(project / "data/tokens/p/b_copies")["counts"]["rows"] == 0
    blocks = [arrow.manifest(project / "data/blocks/p" / split)["counts"] for split in ("train", "eval")]
    tokens = [arrow.manifest(project / "data/tokens/p" / source)["counts"] for source in GROUPS]
    assert [counts["tokens"] for counts in blocks] == [sum(c[split] for c in tokens) for split in ("train", "eval")]
    assert sum(counts["documents"] for counts in blocks) == sum(counts["rows"] for counts in tokens)


def test_learn_marks_of_a_mixed_phase_follow_their_tokens(chain: tuple[Path, dict[str, str]]) -> None:
    """Texts are learned whole, conversations in their answers; the loader sees it after grouping."""
    project, _ = chain
    pieces = spelled(Tokenizer.from_file(str(project / "models/tokenizers/p/tokenizer.json")))
    table = arrow.table(project / "data/blocks/p/train").to_pydict()
    pairs = [pair for row in zip(table["input_ids"], table["learn"], strict=True) for pair in zip(*row, strict=True)]
    quiet = b"".join(pieces[identity] for identity, mark in pairs if not mark)
    decisions = arrow.table(project / "data/dedup/p/d_chat")["split"].to_pylist()
    documents = arrow.table(project / "data/clean/p/d_chat/documents")["messages"].to_pylist()
    asked = [d[0]["content"] for d, split in zip(documents, decisions, strict=True) if split == "train"]
    prompts = "".join(f"<s>Human: {question}\n\nAssistant: " for question in asked).encode()
    assert quiet.removesuffix(b"<pad>" * quiet.count(b"<pad>")) == prompts


@pytest.mark.parametrize("stage", STAGES)
def test_a_data_stage_has_imported_nothing_heavy_when_it_ends(chain: tuple[Path, dict[str, str]], stage: str) -> None:
    """Torch alone costs 1.5 seconds and 200 MB; a stage that imports it in a function pays as well."""
    assert chain[1][stage] == "HEAVY []"


@pytest.mark.parametrize("wrong", [{"block_size": 7}, {"weights": {"a": 0}}, {"weights": {"a": 1001}}], ids=str)
def test_numbers_out_of_bounds_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="should be"):
        Params(**{"block_size": 8, **wrong})
