"""clean: every raw record is kept or dropped, and found again; the same bytes on any machine, for any workers."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import clean
import tiny
from clean import Params, clean_file, normalise
from conftest import Runner, copy_project
from kit import arrow

FORMATS: dict[str, Any] = {
    "document": {"format": "text", "sample_by": "document"},
    "line": {"format": "text", "sample_by": "line"},
    "jsonl": {"format": "jsonl", "text_column": "body"},
    "alpaca": {"format": "alpaca"},
}
# Files that a careless reader changes: each golden digest below is the digest of what becomes of them.
TEXTS = {
    "crlf.txt": b"one\r\ntwo\r\n",
    "cr.txt": b"one\rtwo\r",
    "emoji.md": "👩‍👩‍👧 \U0001f30a\n".encode(),
    "nfd.txt": "Cafe\u0301 \u1112\u1161\u11ab\n".encode(),
    "中文/法律 第一条.txt": "第一条　为了保护……\n\n第二条\n".encode(),
    "中文/deeper/UPPER.TXT": b"x\n",
    "empty.txt": b"",
    "blank.txt": b" \n\t\n\xe3\x80\x80\n",
    "one byte.txt": b"a",
    "special.txt": b"</s><s> <|im_end|> {{ bos_token }}\n",
    "bom.txt": b"\xef\xbb\xbfmarked",
    "only bom.txt": b"\xef\xbb\xbf",
    "separators.txt": "a\u2028b\x0bc\x0cd\x85e\x00f".encode(),
    "no end.txt": b"first\nlast",
    "megabyte.txt": "".join(f"{number} {'река ' * 20}\n" for number in range(6_000)).encode(),
    ".hidden.txt": b"never read \xff",
}
ROWS = [
    {"body": "é\r\n", "instruction": " Add. ", "input": "2+2\r\n", "output": "4\n", "other": [1, None]},
    {"body": "Cafe\u0301", "instruction": "Say hi", "input": "", "output": "</s> 你好 \U0001f30a"},
    {"body": " \t", "instruction": "Nothing?", "input": "", "output": "\u3000"},
]
JSONL = {
    "rows.jsonl": b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in ROWS) + b"\n\n   \n",
    "b/more 行.JSONL": json.dumps(ROWS[1], ensure_ascii=False).encode(),
}
# SHA-256 of the only shard of each folder. When the format is meant to change: set TERROIR_NEW_GOLDEN=1, run
# `pytest tests/test_clean.py -k golden`, and copy the printed lines here; say in docs/decisions.md why old bytes end.
GOLDEN = {
    "alpaca/documents/data-00000.arrow": "1070dbd4c41dfcfd83d3d09ae4baae367378a1fc035fd442dfae4f96ad9a72b3",
    "alpaca/ledger/data-00000.arrow": "3036d40e202362a4d261f48afc1818876960532183a22a43259888a16d0c1c6b",
    "document/documents/data-00000.arrow": "b4183b1f16b88d771d91bb6a8fd2257c9707b4f292eba621b069cd6ca9896c14",
    "document/ledger/data-00000.arrow": "52dd6bbd751dc0a95471071a226f5af5d7c6c55f4affbf7ffde4361c0da3ac9d",
    "jsonl/documents/data-00000.arrow": "94fa8d4cb71ea190287410629d65b060ee3f44d8f2e1cad6af12752372499e94",
    "jsonl/ledger/data-00000.arrow": "ee76d239193b9476a045dcde790c6f867f0fbb65657de9155d47d18ff350cf9a",
    "line/documents/data-00000.arrow": "85bfd7c19cb5188d067a189c88fa2b94a0c949424c7162434e7b7afa853e3671",
    "line/ledger/data-00000.arrow": "fdc80542b0eef15103a398cb5c1a96d79dae9b1c25c14fe553cecbc6aa15808c",
}


def params(name: str, **more: Any) -> Params:
    return Params.model_validate({"license": "unknown", **FORMATS[name], **more})


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def write_sources(project: Path, **groups: dict[str, Any]) -> None:
    """Write a params.yaml whose sources are `groups`: name -> its `clean` group; each reads data/raw/NAME."""
    tiny.params_yaml(project, p={"base": "models/configs/llama_small"})
    content = json.loads((project / "params.yaml").read_text())
    content["sources"] = {
        name: {"phase": "p", "path": f"data/raw/{name}", "clean": {"license": "unknown", **group}}
        for name, group in groups.items()
    }
    (project / "params.yaml").write_text(json.dumps(content))


def tree(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def cleaned(data: bytes, name: str, **more: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return documents and ledger rows of one file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.txt")
        path.write_bytes(data)
        documents, ledger = clean_file(path, "a.txt", params(name, **more))
    return documents.to_pylist(), ledger.to_pylist()


def contents(data: bytes, name: str, **more: Any) -> list[Any]:
    column = "messages" if name == "alpaca" else "text"
    return [document[column] for document in cleaned(data, name, **more)[0]]


def test_the_worked_example_of_the_docstring() -> None:
    documents, ledger = cleaned(b"Caf\xc3\xa9\r\n\nlast", "line")
    assert [(d["text"], d["start"], d["end"], d["line"]) for d in documents] == [("Café", 0, 7, 1), ("last", 8, 12, 3)]
    assert [(row["start"], row["end"], row["line"], row["rule"]) for row in ledger] == [
        (0, 7, 1, None),
        (7, 8, 2, "empty"),
        (8, 12, 3, None),
    ]


def test_an_alpaca_row_becomes_the_prompt_of_s4() -> None:
    """Instruction, line break, input, stripped as a whole; the answer is left as it is, but for NFC and line ends."""
    data = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    assert contents(data, "alpaca") == [
        [{"role": "user", "content": "Add. \n2+2"}, {"role": "assistant", "content": "4\n"}],
        [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "</s> 你好 \U0001f30a"}],
    ]
    assert [row["rule"] for row in cleaned(data, "alpaca")[1]] == [None, None, "empty"]


def test_text_is_changed_in_unicode_form_and_line_ends_only() -> None:
    """Spaces, blank lines, control characters and look-alikes of special tokens stay; a BOM goes."""
    assert contents(TEXTS["nfd.txt"], "document") == ["Caf\u00e9 \ud55c\n"]
    assert contents(b"\xef\xbb\xbf \t<s>\r\n\r\n\x00\x0b\rz ", "document") == [" \t<s>\n\n\x00\x0b\nz "]
    assert contents("a\u2028b\x0bc\x85d\n\ufeffe".encode(), "line") == ["a\u2028b\x0bc\x85d", "\ufeffe"]


def test_short_documents_are_dropped_with_their_length() -> None:
    """White space does not count: `min_chars` 3 keeps "a b c" and drops "a b"."""
    documents, ledger = cleaned(b"a b c\na b\n", "line", min_chars=3)
    assert [document["text"] for document in documents] == ["a b c"]
    assert [(row["rule"], row["evidence"], row["n_chars"]) for row in ledger] == [
        (None, None, 5),
        ("min_chars", "2 < 3", 0),
    ]


@given(st.text())
def test_normalise_is_idempotent(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)
    assert "\r" not in normalise(text)


@given(
    text=st.text(st.sampled_from("a\r\n \u0301é中\U0001f30a\ufeff\x85\u2028"), max_size=30),
    name=st.sampled_from(["document", "line", "jsonl"]),
)
def test_byte_ranges_tile_the_file_and_each_kept_record_is_found_by_its_place(text: str, name: str) -> None:
    """No gap, no overlap; the bytes at a place are the record, its line is right, its document has that very text."""
    if name == "jsonl":
        text = "".join(json.dumps({"body": line}) + end for line in text.split("\n") for end in ("\r\n", "\n\n"))
    data = text.encode()
    documents, ledger = cleaned(data, name)
    assert [row["start"] for row in ledger] == [0, *(row["end"] for row in ledger[:-1])][: len(ledger)]
    assert (ledger[-1]["end"] if ledger else 0) == len(data)
    for row in ledger:
        assert row["raw_id"] == hashlib.sha256(data[row["start"] : row["end"]]).digest()[:16]
        assert row["line"] == data[: row["start"]].count(b"\n") + 1
    for document in documents:
        raw = data[document["start"] : document["end"]].decode()
        raw = raw if document["start"] else raw.removeprefix("\ufeff")
        expected = json.loads(raw)["body"] if name == "jsonl" else raw.rstrip("\r\n") if name == "line" else raw
        assert document["text"] == normalise(expected)
    kept = [(row["doc_id"], row["start"]) for row in ledger if row["rule"] is None]
    assert kept == [(document["doc_id"], document["start"]) for document in documents]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same corpus in two projects: another path, other mtimes, files written in another order; two of 9 MB."""
    big = {f"big/{name}.txt": f"line of {name}\r\n".encode() * 800_000 for name in "ab"}
    assert all(len(data) > clean.TASK_BYTES for data in big.values())  # so that workers get a group each
    projects = []
    for machine, order in enumerate((1, -1)):
        project = copy_project(tmp_path_factory.mktemp("machine") / ("long" * machine + "project"))
        for name in FORMATS:
            files = {"document": {**TEXTS, **big}, "line": TEXTS}.get(name, JSONL)
            write_files(project / "data/raw" / name, dict(list(files.items())[::order]))
        for path in (project / "data/raw").rglob("*"):
            os.utime(path, (10**9 * (machine + 1),) * 2)
        write_sources(project, **FORMATS)
        projects.append(project)
    return projects


def test_golden_digests_for_any_workers_paths_times_and_hash_seeds(machines: list[Path], run_stage: Runner) -> None:
    """What a careless reader changes comes out as the same bytes as when this test was written, everywhere."""
    trees = []
    for project, workers, seed, names in (
        (machines[0], "1", "0", FORMATS),
        (machines[1], "2", "1", FORMATS),
        (machines[0], "5", "2", ["document"]),  # the source that has work for more than one process
    ):
        for name in names:
            finished = run_stage(project, "clean", name, TERROIR_WORKERS=workers, PYTHONHASHSEED=seed)
            assert finished.returncode == 0, finished.stderr
        trees.append(tree(project / "data/clean/p"))
    assert trees[0] == trees[1] == trees[2]
    golden = {name: digest for name, digest in trees[0].items() if name.endswith("data-00000.arrow")}
    if os.environ.get("TERROIR_NEW_GOLDEN"):
        print(json.dumps(golden, indent=4))
    assert golden == GOLDEN


def test_the_published_folder_accounts_for_every_record(machines: list[Path], run_stage: Runner) -> None:
    """source.json counts bytes, records and kept of each file, as the ledger does; nothing of a file is missing."""
    project = machines[1]
    for name in FORMATS:
        assert run_stage(project, "clean", name).returncode == 0
        folder, raw = project / "data/clean/p" / name, project / "data/raw" / name
        files = arrow.read_json(folder / "source.json")["files"]
        visible = sorted(str(p.relative_to(raw)) for p in raw.rglob("*") if p.is_file() and p.name != ".hidden.txt")
        assert list(files) == visible
        ledger, documents = arrow.table(folder / "ledger").to_pylist(), arrow.table(folder / "documents")
        for file, counts in files.items():
            rows = [row for row in ledger if row["file"] == file]
            kept = sum(row["rule"] is None for row in rows)
            assert counts == {"bytes": (raw / file).stat().st_size, "records": len(rows), "kept": kept}
            assert sum(row["end"] - row["start"] for row in rows) == counts["bytes"]
            assert documents["file"].to_pylist().count(file) == kept
        counts = arrow.manifest(folder / "ledger")["counts"]
        dropped = sum(count for rule, count in counts.items() if rule.startswith("dropped_"))
        assert counts["rows"] == len(ledger) == counts["kept"] + dropped
        assert counts["kept"] == documents.num_rows


def test_a_ledger_row_is_found_by_file_and_line(machines: list[Path], run_stage: Runner) -> None:
    """Why is line 3 of this file not in the data?"""
    project = machines[1]
    assert run_stage(project, "clean", "jsonl").returncode == 0
    ledger = arrow.table(project / "data/clean/p/jsonl/ledger").to_pylist()
    (row,) = (row for row in ledger if row["file"] == "rows.jsonl" and row["line"] == 3)
    assert (row["rule"], row["doc_id"], row["evidence"]) == ("empty", None, "nothing but white space")
    raw = (project / "data/raw/jsonl/rows.jsonl").read_bytes()[row["start"] : row["end"]]
    assert json.loads(raw) == ROWS[2]


def test_a_source_may_be_one_file(project: Path, run_stage: Runner) -> None:
    """The ledger then names the file by its own name."""
    write_files(project / "data/raw", {"a": b"", "notes.md": b"text"})
    write_sources(project, a={"format": "text"})
    settings = project / "params.yaml"
    settings.write_text(settings.read_text().replace("data/raw/a", "data/raw/notes.md"))
    assert run_stage(project, "clean", "a").returncode == 0
    assert arrow.table(project / "data/clean/p/a/documents")["file"].to_pylist() == ["notes.md"]


BAD: dict[str, tuple[dict[str, Any], dict[str, bytes], str]] = {
    "invalid UTF-8": ({"format": "text"}, {"b/bad.txt": b"ab\ncd\xffe"}, r"b/bad.txt: byte 5 \(line 2\) is not UTF-8"),
    "invalid UTF-8 after a BOM": ({"format": "text"}, {"bad.txt": b"\xef\xbb\xbfa\xff"}, r"bad.txt: byte 4 \(line 1\)"),
    "a line that is not JSON": (
        {"format": "jsonl"},
        {"x.jsonl": b'{"text": "a"}\n\n{"text" "b"}\n'},
        r"x.jsonl: line 3, column 9 is not JSON",
    ),
    "a list": ({"format": "jsonl"}, {"x.jsonl": b"[1]\n"}, "x.jsonl: line 1 is JSON but not an object"),
    "another field": (
        {"format": "jsonl"},
        {"x.jsonl": b'{"txt": "a"}\n'},
        "x.jsonl: line 1 has no field `text`; it has txt",
    ),
    "no input column": (
        {"format": "alpaca"},
        {"x.jsonl": b'{"instruction": "a", "output": "b"}\n'},
        "line 1 has no field `input`",
    ),
    "a number": (
        {"format": "jsonl"},
        {"x.jsonl": b'{"text": 5}\n'},
        "line 1: the field `text` is 5, expected a string",
    ),
    "half a surrogate": (
        {"format": "jsonl"},
        {"x.jsonl": b'{"text": "\\ud800"}\n'},
        "line 1: the field `text` holds half of a surrogate",
    ),
    "JSON too deep": (
        {"format": "jsonl"},
        {"x.jsonl": b'{"text": ' + b"[" * 10**5},
        "line 1 is JSON beyond what Python reads",
    ),
    "a number too long": (
        {"format": "jsonl"},
        {"x.jsonl": b'{"n": ' + b"1" * 5000 + b"}"},
        "line 1 is JSON beyond what Python reads",
    ),
    "a file of another kind": (
        {"format": "text"},
        {"a.txt": b"a", "b.pdf": b"%PDF"},
        r"raw/s/b.pdf: format text reads .txt and .md files.*`ignore`",
    ),
    "a name that is not UTF-8": ({"format": "text"}, {os.fsdecode(b"\xff.txt"): b"a"}, "name is not UTF-8.*rename"),
    "nothing but ignored files": (
        {"format": "text"},
        {".hidden.txt": b"a"},
        "raw/s holds no file to read; put .txt or .md",
    ),
    "nothing kept": (
        {"format": "text"},
        {"a.txt": b" \n"},
        r"raw/s: none of its 1 records was kept \(\{'empty': 1\}\)",
    ),
    "an empty folder": ({"format": "text"}, {}, "raw/s is empty; put the files there"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_source_gets_one_sentence_and_the_previous_output_stays(
    project: Path, run_stage: Runner, case: str
) -> None:
    """What is wrong, in which file, on which line; no traceback; the folder of the last good run is untouched."""
    group, files, sentence = BAD[case]
    (project / "data/raw/s").mkdir(parents=True)
    write_sources(project, s=group)
    write_files(project / "data/raw/s", files)
    write_files(project / "data/clean/p/s", {"documents/manifest.json": b"of the last good run"})
    before = tree(project / "data/clean")
    finished = run_stage(project, "clean", "s")
    assert finished.returncode == 1
    assert len(finished.stderr.splitlines()) == 1, finished.stderr
    assert re.search(sentence, finished.stderr), finished.stderr
    assert tree(project / "data/clean") == before


def test_a_bad_file_in_a_worker_gets_the_same_sentence(machines: list[Path], tmp_path: Path, run_stage: Runner) -> None:
    """The files before and after it are larger than a task, so another process reads it."""
    project = Path(shutil.copytree(machines[0], tmp_path / "project"))
    write_files(project / "data/raw/document", {"big/aa.txt": b"\xff"})
    finished = run_stage(project, "clean", "document", TERROIR_WORKERS="3")
    assert (finished.returncode, len(finished.stderr.splitlines())) == (1, 1), finished.stderr
    assert "data/raw/document/big/aa.txt: byte 0 (line 1) is not UTF-8" in finished.stderr


@pytest.mark.parametrize("target", ["../../elsewhere", "../../nowhere"])
def test_a_link_that_is_no_file_is_refused_not_passed_over(project: Path, run_stage: Runner, target: str) -> None:
    """A walk through the folder does not follow it, so the text behind it would be left out in silence."""
    write_files(project / "data", {"elsewhere/b.txt": b"b", "raw/s/a.txt": b"a"})
    (project / "data/raw/s/link").symlink_to(target)
    write_sources(project, s={"format": "text"})
    finished = run_stage(project, "clean", "s")
    assert (finished.returncode, len(finished.stderr.splitlines())) == (1, 1), finished.stderr
    assert "data/raw/s/link is a link to a folder, or to nothing" in finished.stderr


def test_ignore_leaves_out_files_and_whole_folders(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.txt": b"", "b.pdf": b"", "old/c.txt": b"", ".git/d.txt": b"", "new/old.txt": b""})
    files = clean.raw_files(tmp_path, params("document", ignore=["*.pdf", "old", ".*"]))
    assert files == ["a.txt", "new/old.txt"]


def test_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_files(tmp_path, dict.fromkeys(("b.txt", "a/z.txt", "B.txt", "a.txt", "中.txt"), b"x"))
    assert clean.raw_files(tmp_path, params("document")) == ["B.txt", "a.txt", "a/z.txt", "b.txt", "中.txt"]
