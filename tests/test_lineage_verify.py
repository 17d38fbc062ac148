"""`lineage verify`: whatever is altered between raw bytes and model is found and named, papers rewritten or not."""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lineage import verify
from lineage.erase import exclude
from lineage.pack import pack
from lineage.questions import Lineage
from ruamel.yaml import YAML

import clean
import raw_params
import raw_rows
import tiny
from block_order import BlockOrder, block_receipt, step_receipt
from conftest import ROOT, copy_project
from kit import arrow
from kit.tokenizer import Vocabulary
from masking import Masking
from test_clean import write_files, write_sources

STRUCTURE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def project(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished tiny project; each test puts back what it has altered."""
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("verify") / "project", symlinks=True))


@pytest.fixture
def altered(project: Path) -> Iterator[Path]:
    """The project, to be edited: all small files are put back afterwards."""
    files = {path: path.read_bytes() for path in project.rglob("*") if path.is_file() and ".dvc" not in path.parts}
    yield project
    for path in project.rglob("*"):
        if path.is_file() and ".dvc" not in path.parts and path not in files:
            path.unlink()
    for path, content in files.items():
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def failures(root: Path, phase: str | None = None) -> dict[str, str]:
    """Return what failed, by path."""
    return {f.path: f"{f.check}: {f.detail}" for f in verify.verify(root, phase).findings if f.status == "FAILED"}


def kinds(root: Path) -> dict[str, Path]:
    """Return one file of each kind: equal paths but for the names of phase and source."""
    found: dict[str, Path] = {}
    names = {"pretrain", "chat", "tiny_text", "tiny_notes", "tiny_qa"}
    for top in ("data", "models", "metrics", "plots", "reports", "stages", "params.yaml", "dvc.lock"):
        for path in sorted((root / top).rglob("*") if (root / top).is_dir() else [root / top]):
            parts = path.relative_to(root).parts
            used = parts[:2] != ("models", "configs") or parts[2:3] == ("tiny",)  # others are of no model here
            if path.is_file() and path.stat().st_size and "__pycache__" not in parts and path.suffix and used:
                kind = "/".join("*" if part in names else part for part in parts if parts[1:2] != ("raw",))
                kind = kind or "raw" + path.suffix
                kind = "metrics/runs/" + path.name.split("@")[0] if parts[:2] == ("metrics", "runs") else kind
                found.setdefault("stages/*.py" if parts[0] == "stages" else kind, path)
    return found


def test_a_finished_project_is_right_as_a_whole_and_phase_by_phase(project: Path) -> None:
    for phase in (None, "pretrain", "chat"):
        report = verify.verify(project, phase)
        assert not [f for f in report.findings if f.status == "FAILED"]
        assert {"raw -> documents", "marked -> tokens", "tokens -> blocks", "blocks -> receipts"} <= {
            f.check for f in report.findings if f.status == "ok"
        }
    # chat goes on from pretrain, so both are checked; pretrain knows nothing of chat.
    assert not any("chat" in f.path for f in verify.verify(project, "pretrain").findings)


def test_one_flipped_bit_in_any_kind_of_artefact_is_named_though_its_time_is_restored(project: Path) -> None:
    chosen = kinds(project)
    assert len(chosen) > 50
    missed = []
    for kind, path in chosen.items():
        content, times = path.read_bytes(), path.stat()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        path.write_bytes(flipped)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        name = path.relative_to(project).as_posix()
        # A digest or size in dvc.lock that is wrong is named with the file that it is of.
        found = {path if not said.startswith(kind) else kind: said for path, said in failures(project).items()}
        if not any(name == path or name.startswith(path + "/") for path in found):
            missed.append(kind)
        path.write_bytes(content)
    assert not missed


def test_a_flipped_bit_in_a_raw_file_is_named_with_its_line(altered: Path) -> None:
    path = altered / "data/raw/tiny_qa/qa.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[6] = lines[6].replace(b"long", b"lonf")
    path.write_bytes(b"\n".join(lines))
    found = failures(altered)
    assert "line 7 is not the record" in found["data/raw/tiny_qa/qa.jsonl"]


@pytest.mark.parametrize(
    ("edit", "path"),
    [
        (("md5: ", "md5: 0"), "named"),
        (("size: ", "size: 1"), "named"),
        (("stages/clean.py tiny_qa", "stages/clean.py tiny_qb"), "dvc.lock"),
        (("seed: 0", "seed: 1"), "params.yaml"),
        (
            ("    - path: stages/kit/memo.py\n      hash: md5\n", "    - path: stages/kit/nemo.py\n      hash: md5\n"),
            "named",
        ),
        (("schema: '2.0'", "schema: '1.0'"), "dvc.lock"),
        (("  dedup@chat:", "  dedup@chatt:"), "named"),
    ],
)
def test_a_hand_edited_dvc_lock_is_found(altered: Path, edit: tuple[str, str], path: str) -> None:
    lock = altered / "dvc.lock"
    text = lock.read_text()
    assert edit[0] in text
    lock.write_text(text.replace(*edit, 1))
    found = failures(altered)
    assert found
    assert path == "named" or any(path.startswith(name) for name in found)


def test_a_stage_or_an_input_taken_out_of_dvc_lock_is_found(altered: Path) -> None:
    lock = altered / "dvc.lock"
    text = lock.read_text()
    begin = text.index("  evaluate_model@chat:")
    end = text.index("\n  ", text.index("    outs:", begin) + 10)
    while text[end + 3] == " ":
        end = text.index("\n  ", end + 1)
    lock.write_text(text[:begin] + text[end + 1 :])
    assert "metrics/runs/evaluate_model@chat.json" in failures(altered)

    begin = text.index("    - path: data/exclusions.txt")
    lock.write_text(text[:begin] + text[text.index("    - path", begin + 10) :])
    assert "other inputs: data/exclusions.txt" in str(failures(altered))


def test_a_hand_edited_manifest_is_found(altered: Path) -> None:
    path = altered / "data/tokens/chat/tiny_qa/manifest.json"
    content = json.loads(path.read_text())
    content["counts"]["train"] += 1
    arrow.write_json(path, content)
    assert "data/tokens/chat/tiny_qa" in failures(altered)


def test_swapped_inputs_are_found(altered: Path) -> None:
    first, second = (altered / f"data/raw/tiny_text/0{number}.txt" for number in (1, 2))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    assert {"data/raw/tiny_text/01.txt", "data/raw/tiny_text/02.txt"} <= failures(altered).keys()


def test_a_stranger_among_the_outputs_is_found(altered: Path) -> None:
    (altered / "data/blocks/chat-old").mkdir()
    (altered / "data/blocks/chat-old/data.arrow").write_bytes(b"x")
    found, shown = failures(altered), verify.show(verify.verify(altered))
    shutil.rmtree(altered / "data/blocks/chat-old")
    assert shown.startswith("FAILED")
    assert "data/blocks/chat-old/data.arrow" in found


def test_a_listing_in_the_cache_that_is_not_the_one_of_dvc_lock_accuses_no_file(tmp_path: Path) -> None:
    content = json.dumps([{"md5": "0" * 32, "relpath": "a"}]).encode()
    md5 = hashlib.md5(content).hexdigest()
    (tmp_path / "d").mkdir()
    project = cast(Any, SimpleNamespace(root=tmp_path, digests=verify.Digests(tmp_path)))
    for said, found in ((md5, ["d/a"]), ("ab" * 16, [])):
        listing = tmp_path / f".dvc/cache/files/md5/{said[:2]}/{said[2:]}.dir"
        listing.parent.mkdir(parents=True)
        listing.write_bytes(content)
        assert verify.inside(project, "d", f"{said}.dir") == found


def test_a_value_that_lies_beyond_its_buffer_is_not_read(tmp_path: Path) -> None:
    """Its offsets say so; a digest of the same hand does not."""
    batch = pa.record_batch({"text": ["a" * 501, "b" * 702]})
    with pa.OSFile(str(tmp_path / "x"), "wb") as file, pa.ipc.new_stream(file, batch.schema) as stream:
        stream.write_batch(batch)
    old, new = (np.array([0, 501, end], "<i4").tobytes() for end in (1203, 9999))
    replaced(tmp_path / "x", old, new)()
    project = SimpleNamespace(root=tmp_path, manifest=lambda folder: {"shards": [{"name": "x"}]})
    with pytest.raises(pa.ArrowInvalid):
        list(verify.Project.batches(cast(Any, project), "."))


# --- A forger who rewrites the papers, too: manifests, run records and dvc.lock agree with the altered bytes.


def papers(root: Path) -> dict[str, str]:
    """Return all digests that papers name: SHA-256 and MD5 of every input and output, with its size."""
    stages = verify.read_lock(root)
    paths = sorted({path for stage in stages.values() for path in (*stage.deps, *stage.outs)})
    paths += sorted({out.rsplit("/", 1)[0] for out in paths if out.startswith(("plots/", "metrics/"))})
    digests = verify.Digests(root)
    digests.read(paths)
    found = {f"{path} sha256:": digests.sha256(path) for path in paths}
    for path in paths:
        entry = digests.md5(path)
        found[f"{path} md5:"] = f"md5: {entry['md5']}\n      size: {entry['size']}"
    return found


def forge(root: Path, alter: Callable[[], object]) -> None:
    """Alter artefacts, and write every digest anew wherever papers name the old one."""
    for round_ in range(3):  # run records are outputs themselves; then dvc.lock
        before = papers(root)
        if not round_:
            alter()
        after = papers(root)
        changed = {before[key]: after[key] for key in before if before[key] != after[key]}
        for path in [*(root / "metrics/runs").glob("*.json"), root / "dvc.lock"]:
            text = path.read_text()
            for old, new in changed.items():
                text = text.replace(old, new)
            path.write_text(text)
        if round_ == 0:
            lock_before = before
    final = papers(root)
    text = (root / "dvc.lock").read_text()
    for key, old in lock_before.items():
        text = text.replace(old, final[key])
    (root / "dvc.lock").write_text(text)


def rewrite(folder: Path, edit: Callable[[list[dict[str, Any]]], Any], **more: int) -> Callable[[], None]:
    """Return what rewrites an Arrow folder with edited rows, its manifest made for them, but for `more` of a count."""

    def work() -> None:
        table = arrow.table(folder)
        schema, rows, counts = table.schema, table.to_pylist(), arrow.manifest(folder)["counts"]
        del table
        edit(rows)
        for path in folder.iterdir():
            path.unlink()
        with arrow.Writer(folder, schema) as out:
            out.write(pa.Table.from_pylist(rows, schema))
            out.counts = {name: count + more.get(name, 0) for name, count in counts.items() if name != "rows"}

    return work


def test_papers_alone_can_be_forged_and_then_nothing_is_missed_but_nothing_claimed(altered: Path) -> None:
    """The helper of the next tests does what it says: the papers agree after it."""
    forge(altered, lambda: (altered / "plots/chat/train.csv").write_text("step,loss\n1,0.0\n"))
    assert not failures(altered)


def swap(rows: list[dict[str, Any]], name: str) -> None:
    rows[0][name], rows[1][name] = rows[1][name], rows[0][name]


def other_text(rows: list[dict[str, Any]]) -> None:
    rows[0]["text"] = rows[0]["text"].replace("bridges", "ferries")


def other_text_and_id(rows: list[dict[str, Any]]) -> None:
    other_text(rows)
    rows[0]["doc_id"] = hashlib.sha256(rows[0]["text"].encode()).digest()[:16]


def skip_record(rows: list[dict[str, Any]]) -> None:
    del rows[3]


def keep_the_duplicate(rows: list[dict[str, Any]]) -> None:
    row = next(row for row in rows if row["split"] == "dropped")
    row.update(split="train", rule=None, twin=None, similarity=None)


def other_side(rows: list[dict[str, Any]]) -> None:
    for now, then in (("train", "eval"), ("eval", "train")):
        for row in [row for row in rows if row["split"] == now][-1:]:
            row["split"] = f"to {then}"
    for row in rows:
        row["split"] = row["split"].removeprefix("to ")


def cluster_of_two_sides(rows: list[dict[str, Any]]) -> None:
    for side in ("train", "eval"):
        next(row for row in rows if row["split"] == side)["cluster"] = "tiny_text/0"


def clusters_on_the_other_side(rows: list[dict[str, Any]]) -> None:
    for place, row in enumerate([row for row in rows if row["split"] == "train"][:6]):
        row.update(split="eval", cluster=f"tiny_text/{place // 2}")
    for row in [row for row in rows if row["split"] == "eval" and not row["cluster"]][:6]:
        row.update(split="train")


def cluster_of_which_one_is_excluded(rows: list[dict[str, Any]]) -> None:
    next(row for row in rows if row["split"] == "dropped").update(rule="excluded", twin=None, cluster="tiny_notes/0")
    next(row for row in rows if row["split"] == "train")["cluster"] = "tiny_notes/0"


def segment(rows: list[dict[str, Any]]) -> None:
    rows[0]["segments"][1]["text"] += "!"


def learn_the_question(rows: list[dict[str, Any]]) -> None:
    next(s for s in rows[0]["segments"] if not s["learn"] and not s["special"])["learn"] = True


def without_bos(rows: list[dict[str, Any]]) -> None:
    rows[0]["input_ids"] = rows[0]["input_ids"][1:]


def other_id(rows: list[dict[str, Any]]) -> None:
    rows[2]["input_ids"][5] += 1


def other_mark(rows: list[dict[str, Any]]) -> None:
    rows[0]["learn"][4] = not rows[0]["learn"][4]


def off_by_one(rows: list[dict[str, Any]]) -> None:
    flat = [number for row in rows for number in row["input_ids"]]
    size = len(rows[0]["input_ids"])
    flat = flat[1:] + flat[:1]
    for place, row in enumerate(rows):
        row["input_ids"] = flat[place * size : (place + 1) * size]


def again(rows: list[dict[str, Any]]) -> None:
    rows.append(rows[-1])


def other_twin(rows: list[dict[str, Any]], twin: str) -> None:
    next(row for row in rows if row["split"] == "dropped")["twin"] = twin


def other_question(rows: list[dict[str, Any]]) -> None:
    next(s for s in rows[0]["segments"] if not s["learn"] and not s["special"])["text"] = "Human: Why?\n\nAssistant: "


FORGERIES = [
    ("data/clean/pretrain/tiny_text/documents", again, "more documents than kept records"),
    ("data/dedup/pretrain/tiny_text", lambda rows: rows[0].update(rule="length"), "with the rule length"),
    ("data/dedup/pretrain/tiny_text", lambda rows: rows.pop(), "has more documents than decisions"),
    ("data/dedup/pretrain/tiny_notes", lambda rows: other_twin(rows, "tiny_notes/99"), "which is not kept"),
    ("data/dedup/pretrain/tiny_notes", lambda rows: other_twin(rows, "tiny_notes/5"), "which has another text"),
    ("data/marked/pretrain/tiny_text", lambda rows: rows[0]["segments"][0].update(text="<x>"), "is no special token"),
    ("data/marked/pretrain/tiny_text", lambda rows: rows[0]["segments"].pop(), "does not end with the end token"),
    ("data/marked/chat/tiny_qa", other_question, "lacks the words of user"),
    ("data/tokens/pretrain/tiny_text", again, "holds more documents than data/marked"),
    ("data/blocks/pretrain/train", again, "there is no text for block"),
    ("data/clean/pretrain/tiny_text/documents", other_text, "not the one that its doc_id names"),
    ("data/clean/pretrain/tiny_text/documents", other_text_and_id, "is not what the raw bytes say"),
    ("data/clean/pretrain/tiny_text/documents", skip_record, "has another file"),
    ("data/clean/pretrain/tiny_text/ledger", lambda rows: swap(rows, "raw_id"), "line 1 is not the record"),
    ("data/clean/pretrain/tiny_text/ledger", lambda rows: rows.append(rows[0]), "00.txt, which stands there twice"),
    ("data/clean/pretrain/tiny_text/ledger", skip_record, "the document in its place has another file"),
    ("data/clean/chat/tiny_qa/ledger", skip_record, "calls line 4 of qa.jsonl line 5"),
    ("data/clean/pretrain/tiny_notes/ledger", lambda rows: rows[20].update(number=7), "calls line 21 of"),
    ("data/dedup/pretrain/tiny_notes", keep_the_duplicate, "has the same text"),
    ("data/dedup/pretrain/tiny_text", other_side, "another side of the split"),
    ("data/dedup/pretrain/tiny_text", cluster_of_two_sides, "near duplicates of tiny_text/0 are eval and train"),
    ("data/dedup/pretrain/tiny_text", clusters_on_the_other_side, "another side of the split"),
    ("data/dedup/pretrain/tiny_notes", cluster_of_which_one_is_excluded, "tiny_notes/0 are excluded and train"),
    ("data/dedup/pretrain/tiny_text", lambda rows: swap(rows, "doc_id"), "decides about another document"),
    ("data/marked/pretrain/tiny_text", segment, "another text than in"),
    ("data/marked/pretrain/tiny_text", skip_record, "holds other documents"),
    ("data/marked/chat/tiny_qa", learn_the_question, "learns other words"),
    ("data/tokens/pretrain/tiny_text", other_id, "decode to another text"),
    ("data/tokens/pretrain/tiny_text", without_bos, "decode to another text"),
    ("data/tokens/chat/tiny_qa", other_mark, "decode to another text"),
    ("data/tokens/pretrain/tiny_text", skip_record, "holds other documents"),
    ("data/blocks/pretrain/train", lambda rows: swap(rows, "input_ids"), "block 0 holds other tokens"),
    ("data/blocks/pretrain/train", off_by_one, "block 0 holds other tokens"),
    ("data/blocks/pretrain/eval", lambda rows: rows.pop(), "blocks are missing"),
    ("data/blocks/chat/train", other_mark, "other marks of what is learned"),
]  # fmt: skip


@pytest.mark.parametrize(("folder", "edit", "said"), FORGERIES, ids=[f"{f[5:]}-{s[:22]}" for f, _, s in FORGERIES])
def test_altered_rows_are_found_though_every_paper_agrees(
    altered: Path, folder: str, edit: Callable[[list[dict[str, Any]]], Any], said: str
) -> None:
    forge(altered, rewrite(altered / folder, edit))
    found = verify.verify(altered, folder.split("/")[2]).findings
    assert not [f for f in found if f.status == "FAILED" and f.check in ("dvc.lock", "run record", "params.yaml")]
    assert said in str([f.detail for f in found if f.status == "FAILED"])


def test_one_document_may_stand_in_for_an_empty_split_and_two_may_not(altered: Path) -> None:
    def check() -> None:
        rewrite(altered / "data/dedup/pretrain/tiny_text", to_eval, train=-1, eval=1)()
        project = verify.Project(altered, None)
        verify.check_decisions(project, "pretrain", project.sources("pretrain"), verify.Report())

    def to_eval(rows: list[dict[str, Any]]) -> None:
        next(row for row in rows if row["split"] == "train")["split"] = "eval"

    check()
    with pytest.raises(verify.Wrong, match="2 documents are on another side"):
        check()


def test_a_document_that_neither_segments_nor_tokens_hold_is_missed(altered: Path) -> None:
    folders = [altered / f"data/{kind}/pretrain/tiny_text" for kind in ("marked", "tokens")]
    forge(altered, lambda: [rewrite(folder, lambda rows: rows.pop())() for folder in folders])
    assert "data/marked/pretrain/tiny_text lacks documents that data/dedup" in str(list(failures(altered).values()))


@pytest.mark.parametrize(
    ("folder", "count", "said"),
    [
        ("data/clean/pretrain/tiny_text/ledger", "kept", "its manifest counts"),
        ("data/dedup/pretrain/tiny_text", "eval", "the manifest of data/dedup/pretrain/tiny_text counts"),
        ("data/marked/chat/tiny_qa", "characters", "the manifest of data/marked/chat/tiny_qa counts"),
        ("data/tokens/chat/tiny_qa", "learned", "the manifest of data/tokens/chat/tiny_qa counts"),
        ("data/blocks/chat/train", "dropped_tokens", "do not add up to those of its documents"),
    ],
)
def test_a_count_that_is_not_that_of_the_rows_is_found(altered: Path, folder: str, count: str, said: str) -> None:
    forge(altered, rewrite(altered / folder, lambda rows: None, **{count: 1}))
    assert said in str(list(failures(altered).values()))


def test_a_manifest_says_what_its_folder_holds(altered: Path) -> None:
    """Each of these alone, its state.json made for it; digests in dvc.lock, which would differ, are not looked at."""
    folder = "data/tokens/chat/tiny_qa"
    paths = [altered / folder / name for name in ("manifest.json", "state.json", "dataset_info.json")]
    before = [path.read_bytes() for path in paths]
    edits: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
        ("is not the file that manifest.json names", lambda content: content["shards"][0].update(sha256="0" * 64)),
        ("has other columns than manifest.json says", lambda content: content["schema"].update(split="int8")),
        (r"has \d+ rows, manifest.json says 1$", lambda content: content["shards"][0].update(rows=1)),
        (r"its shards have \d+ rows, manifest.json counts 1$", lambda content: content["counts"].update(rows=1)),
        ("data-00001.arrow is not there, or not in its manifest", lambda content: content["shards"].append(SHARD)),
    ]
    for said, edit in edits:
        content, state = json.loads(before[0]), json.loads(before[1])
        edit(content)
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        arrow.write_json(paths[0], content)
        arrow.write_json(paths[1], {**state, "_fingerprint": digest})
        assert_wrong(altered, folder, said)
        for path, own in zip(paths, before, strict=True):
            path.write_bytes(own)
    for number, old, new, said in (
        (0, b"{\n", b"{ \n", "is not in the form in which it is written"),
        (1, b'"_fingerprint": "', b'"_fingerprint": "0', "state.json is not that of manifest.json"),
        (1, b"data-00000", b"data-00001", "state.json is not that of manifest.json"),
        (2, b"{}", b"{ }", "dataset_info.json is not empty"),
    ):
        replaced(paths[number], old, new)()
        assert_wrong(altered, folder, said)
        paths[number].write_bytes(before[number])
    (altered / folder / "notes.txt").write_text("x")
    assert_wrong(altered, folder, "notes.txt is not there, or not in its manifest")


SHARD = {"name": "data-00001.arrow", "rows": 0, "sha256": "0" * 64}


def assert_wrong(root: Path, folder: str, said: str) -> None:
    project = verify.Project(root, None)
    project.digests.read([folder])
    with pytest.raises(verify.Wrong, match=said):
        verify._check_manifest(project, folder)


def replaced(path: Path, old: bytes, new: bytes) -> Callable[[], None]:
    content = path.read_bytes()
    assert old in content
    return lambda: write(path, content.replace(old, new, 1))


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("data/raw/tiny_text/03.txt", b"bridges", b"ferries", "line 1 is not the record whose raw_id"),
        ("metrics/runs/clean@tiny_qa.json", b"tiny_qa sha256:", b"tiny_qa sha256:0", "its bytes are not those of"),
        ("metrics/runs/clean@tiny_qa.json", b'  "sha256:', b'  "sha256:0', "was written by other code than dvc.lock"),
        ("data/raw/tiny_text/03.txt", b" fish.\n", b" fish.\nmore", "it goes on after its last record, at byte"),
        ("data/raw/tiny_text/03.txt", b" fish.\n", b"", "ends at byte"),
        ("data/blocks/pretrain/grouping.json", b'"block_size": 32', b'"block_size": 33', "says block_size 33, "),
        ("data/sources/chat/tiny_qa/source.json", b'"dropped": 0', b'"dropped": 1', "source.json says 1 dropped"),
        ("data/sources/chat/tiny_qa/source.json", b'"utf-8"', b'"uuf-8"', "cannot be read as it should be (Look"),
        ("data/blocks/chat/grouping.json", b'"tokens"', b'"takens"', "says of tiny_qa (eval)"),
        ("models/pretrain/trained/training.json", b"models/configs/tiny", b"models/configs/tine", "names the base"),
        ("models/pretrain/trained/training.json", b'"blocks": ', b'"blocks": 1', "tells of other steps or blocks"),
        ("models/pretrain/merged/config.json", b'"model_type"', b'"model_tipe"', "merged/config.json is not that of"),
        ("models/chat/trained/tokenizer.json", b"version", b"versian", "is not the tokenizer.json of"),
    ],
)
def test_altered_files_are_found_though_every_paper_agrees(
    altered: Path, file: str, old: bytes, new: bytes, said: str
) -> None:
    forge(altered, replaced(altered / file, old, new))
    assert said in str(list(failures(altered).values()))


def lose_one_left_out(rows: list[dict[str, Any]]) -> None:
    del rows[0]


def one_more_left_out(rows: list[dict[str, Any]]) -> None:
    rows.append(rows[-1])


def more_left_out(rows: list[dict[str, Any]]) -> None:
    rows[0]["left_out"] += 1


def test_what_was_left_out_of_blocks_and_what_each_source_gave_is_counted_anew(
    varied_project: Path, tmp_path: Path
) -> None:
    """Shares of sources, in the register and the model card, are made of these numbers alone."""
    root = Path(shutil.copytree(varied_project, tmp_path / "project", symlinks=True))
    folder, grouping = root / "data/blocks/packs/left_out", root / "data/blocks/docs/grouping.json"
    rows = arrow.table(folder).to_pylist()

    def check(phase: str) -> None:
        project = verify.Project(root, None)
        tokenizer = verify.Tokenizer(root / "models/tokenizers" / phase)
        verify.check_blocks(project, phase, project.sources(phase), tokenizer, verify.Report())

    for edit, said in (
        (lose_one_left_out, "where `truncate` leaves out"),
        (one_more_left_out, "which is in the blocks"),
        (more_left_out, f"names {rows[0]['left_out'] + 1} tokens of {rows[0]['doc_id'].hex()} where `truncate` leaves"),
    ):
        rewrite(folder, edit)()
        with pytest.raises(verify.Wrong, match=said):
            check("packs")
        rewrite(folder, lambda now: now.__setitem__(slice(None), rows))()
        check("packs")
    content = json.loads(grouping.read_text())
    content["train"]["line"]["tokens"] += 10
    content["train"]["csv"]["tokens"] -= 10
    check("docs")
    arrow.write_json(grouping, content)
    with pytest.raises(verify.Wrong, match=r"grouping.json says of csv \(train\)"):
        check("docs")
    rewrite(root / "data/blocks/packs/train", lambda rows: rows[0]["starts"].__setitem__(1, rows[0]["starts"][1] - 1))()
    with pytest.raises(verify.Wrong, match="block 0 says other beginnings of documents than there are"):
        check("packs")


def test_an_excluded_document_that_is_kept_is_found_another_key_too_and_a_missing_one_is_said(altered: Path) -> None:
    decisions = arrow.table(altered / "data/dedup/pretrain/tiny_text").to_pylist()
    kept = next(row["doc_id"] for row in decisions if row["split"] == "train")
    forge(altered, lambda: exclude(altered, {kept}))
    assert "is kept although data/exclusions.txt names it" in str(failures(altered))
    ledger = arrow.table(altered / "data/clean/pretrain/tiny_text/ledger").to_pylist()
    place = [row["doc_id"] for row in decisions].index(kept)

    def name_the_record() -> None:
        (altered / "data/exclusions.txt").write_text("")
        exclude(altered, {[row["raw_id"] for row in ledger if row["rule"] is None][place]})

    forge(altered, name_the_record)
    assert "is kept although data/exclusions.txt names it" in str(failures(altered))
    key = altered / "data/exclusions.key"
    key.write_text("00" * 32)
    assert "data/exclusions.key is another key" in str(failures(altered))
    key.unlink()
    assert not failures(altered)
    stops = [f.detail for f in verify.verify(altered).findings if f.path == "data/exclusions.txt"]
    assert stops[-1] == "data/exclusions.key is not here, so no entry can be compared"


def test_an_altered_receipt_and_an_altered_weight_are_found_though_every_paper_agrees(altered: Path) -> None:
    path = altered / "models/chat/trained/receipts.bin"
    content = bytearray(path.read_bytes())
    content[16 * 2 + 5] ^= 4
    forge(altered, lambda: write(path, bytes(content)))
    assert "receipt of step 3" in str(failures(altered))

    for other in (content[:-16], content + b"\0"):
        forge(altered, lambda other=other: write(path, bytes(other)))
        assert f"has {len(other)} bytes, 16 for each of 4 steps are due" in str(failures(altered))

    path = altered / "models/pretrain/merged/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    forge(altered, lambda: write(path, bytes(content)))
    assert "merged/model.safetensors is not that of models/pretrain/trained" in str(failures(altered))


# --- Receipts


MLM = {"objective": "mlm", "mlm_probability": 0.3, "whole_word_mask": True}


@pytest.mark.parametrize(("marks", "objective"), [(False, {}), (True, {}), (False, MLM), (True, {"objective": "mlm"})])
def test_receipts_of_1000_steps_are_computed_anew_and_one_altered_token_is_caught(
    tmp_path: Path, marks: bool, objective: dict[str, Any]
) -> None:
    """Against the functions of block_order.py and masking.py that the training uses."""
    folder = tiny.blocks(tmp_path / "data/blocks/p/train", 90, marks)
    table, order = arrow.table(folder), BlockOrder(90, seed=7)
    ids = np.array(table["input_ids"].to_pylist(), "<i4")
    learned = np.array(table["learn"].to_pylist()) if marks else np.ones_like(ids, bool)
    learned[-1, -3:] = False  # padding
    masking = None
    if objective:
        vocabulary = Vocabulary(tiny.masked_tokenizer(tmp_path / "models/tokenizers/p"))
        ids %= vocabulary.size
        del table
        rewrite(folder, lambda rows: [row.update(input_ids=n.tolist()) for row, n in zip(rows, ids, strict=True)])()
        masking = Masking(
            vocabulary, objective.get("mlm_probability", 0.15), bool(objective.get("whole_word_mask")), seed=7
        )

    def shown(place: int) -> bytes:
        block = order.block(place)
        inputs, own = ids[block], learned[block]
        if masking:
            (inputs,), (own,) = masking(ids[[block]].astype(np.int64), learned[[block]], np.array([place]))
        labels = np.where(own, ids[block], -100)
        return block_receipt(block, inputs.astype("<i4").tobytes(), labels.astype("<i4").tobytes())

    receipts = b"".join(
        step_receipt(step, [shown(place) for place in range(4 * step - 4, 4 * step)]) for step in range(1, 1001)
    )
    path = tmp_path / "models/p/trained/receipts.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(receipts)
    arrow.write_json(path.with_name("training.json"), {"steps": 1000, "blocks": 4000})
    (tmp_path / "metrics/runs").mkdir(parents=True)
    arrow.write_json(tmp_path / "metrics/runs/train_model@p.json", {"counts": [{"steps": 1000}]})
    params = "".join(f"          {name}: {json.dumps(value)}\n" for name, value in objective.items())
    (tmp_path / "dvc.lock").write_text(
        "schema: '2.0'\nstages:\n  train_model@p:\n    cmd: x\n    params:\n      params.yaml:\n"
        f"        phases.p.train_model:\n          global_batch_size: 4\n          seed: 7\n{params}"
    )
    report = verify.Report()
    verify.check_receipts(verify.Project(tmp_path, None), "p", report)
    assert report.findings[0].detail == "1,000 steps of 4 blocks (100% of the blocks were shown)"

    table = None
    rewrite(folder, lambda rows: rows[50]["input_ids"].__setitem__(3, rows[50]["input_ids"][3] ^ 1))()
    first = next(place // 4 + 1 for place in range(400) if order.block(place) == 50)
    with pytest.raises(verify.Wrong, match=f"the receipt of step {first} is not that of blocks"):
        verify.check_receipts(verify.Project(tmp_path, None), "p", report)


PIECES = {
    "bytes": ["a", "Ġthe", "ing", "7", ",", "ĠĠ", "Ċ", "ç", "¬", "¬¬", "ç¬¬", "Ġç", "é", "Ã©", "<mask>", "Ð"],
    "pieces": ["a", "the", "##ing", "7", ",", "第", "##一", "é", "\t", "д", "<mask>", "一条"],
    "sentence": ["▁", "▁the", "ing", "▁7", "42", ",", "第", "<0xE7>", "<0xAC>", "<0x41>", "é", "▁▁", "<mask>"],
}


@given(st.data())
@pytest.mark.parametrize("kind", PIECES)
def test_what_a_masked_model_guesses_is_drawn_as_in_the_training(kind: str, data: st.DataObject) -> None:
    """For byte-level, WordPiece and SentencePiece tokens, whole words or not."""
    vocabulary = {piece: number for number, piece in enumerate(["<pad>", "</s>", *PIECES[kind]])}
    added = [{"id": vocabulary[text], "content": text, "special": True} for text in ("<pad>", "</s>", "<mask>")]
    more = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    words = data.draw(st.booleans())
    params = {"mlm_probability": data.draw(st.floats(0.01, 0.99)), "whole_word_mask": words}
    params |= {"seed": data.draw(st.integers(0, 2**63 - 1))}
    ids = data.draw(st.lists(st.integers(0, len(vocabulary) - 1), min_size=1, max_size=40))
    learned = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    position = data.draw(st.integers(0, 2**40))
    with TemporaryDirectory() as name:
        folder = Path(name)
        content = {
            "version": "1.0",
            "added_tokens": [{**token, **more} for token in added],
            "normalizer": None,
            "post_processor": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
            if kind == "bytes"
            else None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<pad>"},
        }
        (folder / "tokenizer.json").write_text(json.dumps(content))
        settings = {"eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        theirs = Masking(Vocabulary(folder), params["mlm_probability"], words, params["seed"])
        inputs, chosen = theirs(np.array([ids]), np.array([learned]), np.array([position]))
        ours = verify.Masking(folder, params)(pa.array(ids, pa.int32()), pa.array(learned), position)
    assert [side.to_pylist() for side in ours] == [inputs[0].tolist(), chosen[0].tolist()]


# --- The program itself


SCALARS = "0o17 010 0x1F +0x1f -0o7 0b11 1_000 -1_0 1_0.5_0 0o9 0x 1e3 1.e3 .5 5. -0 +12 .inf -.Inf 1__ no True ~ 1e +"


@pytest.mark.parametrize("text", SCALARS.split())
def test_a_plain_scalar_is_what_dvc_reads(text: str) -> None:
    """DVC reads YAML 1.2 by ruamel.yaml: 010 is ten, 0o10 eight."""
    found, expected = verify.scalar(text), YAML(typ="safe").load(text)
    assert (found, type(found)) == (expected, type(expected))


def test_the_yaml_reader_reads_what_the_project_writes() -> None:
    for path in [*ROOT.glob("*.yaml"), ROOT / "dvc.lock", *ROOT.glob("recipes/*.yaml"), ROOT / "tests/tiny.yaml"]:
        expected = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
        assert verify.read_yaml(path) == expected, path


@given(STRUCTURE)
def test_the_yaml_reader_reads_whatever_dvc_would_write(content: Any) -> None:
    yaml = YAML()
    yaml.default_flow_style = False
    out = StringIO()
    yaml.dump({"key": content}, out)
    try:
        found = verify.Yaml(out.getvalue()).read()
    except ValueError:
        return  # it says that it cannot read this; it must never read it wrongly
    assert found == YAML(typ="safe").load(out.getvalue())


def test_it_needs_nothing_but_python_and_pyarrow_and_runs_from_anywhere(project: Path) -> None:
    tree = ast.parse((ROOT / "lineage/verify.py").read_text(encoding="utf-8"))
    imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {str(n.module).split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported - sys.stdlib_module_names == {"pyarrow"}
    for phase in ([], ["chat"]):
        command = [sys.executable, "-P", str(ROOT / "lineage/verify.py"), *phase, "--root", str(project)]
        finished = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert "all that was checked is as it is said" in finished.stdout
    shell = f"{shlex.join([sys.executable, str(ROOT / 'lineage/verify.py'), '--root', str(project)])} | true"
    assert subprocess.run(shell, shell=True, capture_output=True, text=True, check=False).stderr == ""


def test_what_params_no_longer_names_is_listed_and_not_checked(altered: Path) -> None:
    """DVC keeps in dvc.lock what it once ran, e.g. the default after `make recipe`."""
    lock = altered / "dvc.lock"
    content = YAML(typ="safe").load(lock)
    content["stages"]["clean@gone"] = {
        "cmd": "exec python stages/clean.py gone",
        "deps": [{"path": "data/raw/gone", "hash": "md5", "md5": "0" * 32, "size": 1}],
        "outs": [{"path": "data/clean/pretrain/gone", "hash": "md5", "md5": "0" * 32, "size": 1}],
    }
    with lock.open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(content, file)
    (altered / "metrics/runs/clean@gone.json").write_text("{}\n", encoding="utf-8")
    report = verify.verify(altered)
    assert not [one for one in report.findings if one.status == "FAILED"]
    assert any(one.status == "stops" and "clean@gone" in one.detail for one in report.findings)
    assert "gone" not in {source.name for source in Lineage(altered).sources}
    pack(altered, altered / "evidence.tar")  # does not ask for data/clean/pretrain/gone


LINES = b"".join(b'{"text": "line %d of a file, %d"}\n' % (number, number**5) for number in range(3000))
TABLE = {"text": ["one", None, "three", ""]}
TURNS = [[{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]] * 2


def parquet(**columns: Any) -> bytes:
    pq.write_table(pa.table(columns), sink := pa.BufferOutputStream())
    return bytes(sink.getvalue())


# Arguments of calls as a map, in the third row with a key twice.
CALLS = [
    [{"role": "user", "content": "1+1", "calls": None}, {"role": "assistant", "content": "2", "calls": calls}]
    for calls in (None, [("n", "1")], [("n", "1"), ("n", "2")])
]
MAPS = pa.struct([("role", pa.string()), ("content", pa.string()), ("calls", pa.map_(pa.string(), pa.string()))])


def stream(**columns: list[Any]) -> bytes:
    table = pa.table(columns)
    with pa.ipc.new_stream(sink := pa.BufferOutputStream(), table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    ("files", "group", "rebuilt"),
    [
        ({"a.csv": b"id,text\n1,\n2,two\n"}, {"format": "csv"}, 1),
        ({"a.csv": b"id,text\n1,call 13800138000\n2,two\n"}, {"format": "csv", "rules": [{"rule": "pii"}]}, 1),
        ({"a.csv": b"id,text\n1,one\n", "b.csv": b"text,id\n,9\nfour,4\n"}, {"format": "csv"}, 2),
        ({"a.csv": b"id,text\n1\n2,two\n3,a,b\n4,four"}, {"format": "csv"}, 2),
        ({"a.csv": b'id,text\n1,"o\nne\n2,two\n'}, {"format": "csv"}, 1),
        ({"a.csv": b"\xff,text\n1,one\n2,two\n"}, {"format": "csv"}, 1),
        ({"a.jsonl": LINES[:30] + b"\n[1]\n\xff\n" + LINES[30:300]}, {"format": "jsonl"}, None),
        ({"a.jsonl.gz": gzip.compress(LINES)[:20_000]}, {"format": "jsonl"}, None),
        ({"a.txt.gz": gzip.compress(LINES)[:20_000], "b.txt": b"two"}, {"format": "text"}, 1),
        ({"a.jsonl.gz": gzip.compress(LINES) + b"more"}, {"format": "jsonl"}, None),
        ({"a.jsonl.gz": b"", "b.jsonl": LINES[:32]}, {"format": "jsonl"}, None),
        ({"a.parquet": parquet(**TABLE), "b.parquet": parquet(text=["four"])}, {"format": "parquet"}, 3),
        ({"a.parquet": parquet(**TABLE)[:-9], "b.parquet": parquet(text=["four"])}, {"format": "parquet"}, 1),
        ({"a.parquet": parquet(other=["x"]), "b.parquet": parquet(text=["four"])}, {"format": "parquet"}, 1),
        ({"a.arrow": stream(**TABLE)}, {"format": "arrow"}, 2),
        ({"a.arrow": stream(**TABLE)[:-8]}, {"format": "arrow"}, 2),
        ({"a.arrow": stream(**TABLE).replace(b"three", b"thr\xffe")}, {"format": "arrow"}, 1),
        ({"a.parquet": parquet(messages=TURNS, system=["Brief."] * 2)}, {"format": "parquet", "record": "messages"}, 2),
        (
            {"a.parquet": parquet(messages=pa.array(CALLS, pa.list_(MAPS))), "b.parquet": parquet(messages=TURNS)},
            {"format": "parquet", "record": "messages"},
            3,
        ),
        (
            {"a.parquet": parquet(prompt=["1"], completion=["2"], system=["Brief."], history=[[["a", "b"]]])},
            {"format": "parquet", "record": "prompt_completion"},
            0,
        ),
    ],
)
def test_what_is_damaged_or_has_more_columns_is_read_as_the_pipeline_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], group: dict[str, Any], rebuilt: int | None
) -> None:
    """With `on_error: drop`, a project of such files is as right as any other."""
    monkeypatch.chdir(copy_project(tmp_path / "project"))
    write_files(Path("data/raw/s"), files)
    write_sources(Path(), s={"on_error": "drop", **group})
    clean.main("s")
    about = json.loads(Path("data/sources/p/s/source.json").read_text(encoding="utf-8"))
    checked = verify.Project.__new__(verify.Project)
    checked.root, report = Path(), verify.Report()
    verify.check_raw(checked, verify.Source("s", "p", "data/raw/s", group, about), report)
    assert [finding for finding in report.findings if finding.status == "FAILED"] == []
    found = next((f.detail for f in report.findings if (f.status, f.check) == ("ok", "raw -> documents")), "0 texts")
    kept = about["kept"] if rebuilt is None else rebuilt
    assert found.startswith(f"{kept:,} texts")
    assert about["dropped"] or len(files) == 1


def said(*turns: tuple[str, str], role: str = "role", text: str = "content") -> list[dict[str, str]]:
    return [{role: who, text: what} for who, what in turns]


READ = [
    ("alpaca", {"instruction": "Add.", "input": "1+1", "output": "2", "system": "Brief."}),
    ("alpaca", {"instruction": "Add.", "input": "", "output": "2", "system": " "}),
    ("prompt_completion", {"prompt": "1+1", "completion": "2", "system": "Brief."}),
    ("messages", {"messages": said(("user", "1+1"), ("assistant", "2")), "system": "Brief."}),
    ("messages", {"messages": said(("system", ""), ("user", "1+1"), ("tool", ""), ("assistant", "2"))}),
    ("messages", {"messages": said(("system", "Kind."), ("user", "1+1"), ("assistant", "2"))}),
    ("sharegpt", {"conversations": said(("gpt", "2"), role="from", text="value"), "system": "Brief."}),
]
LEFT_OUT = [  # to `python -m lineage verify`
    ("alpaca", {"instruction": "Add.", "input": "", "output": "2", "history": [["1+1", "2"]]}),
    ("prompt_completion", {"prompt": "1+1", "completion": "2", "history": [["1+1", "2"]]}),
    ("messages", {"messages": said(("system", "Kind."), ("assistant", "2")), "system": "Brief."}),
]


@pytest.mark.parametrize(("record", "row"), [*READ, *LEFT_OUT])
def test_a_row_says_what_the_pipeline_reads_in_it_or_is_left_out(record: Any, row: dict[str, Any]) -> None:
    source = SimpleNamespace(about={"format": "jsonl", "record": record, "encoding": "utf-8"}, params={})
    found = verify.Replay(cast(Any, source)).texts(row)
    read: Any = raw_rows.content_of(row, raw_params.Params(format="jsonl", record=record), "line 1")
    assert found == (None if (record, row) in LEFT_OUT else [turn["content"] for turn in read])
