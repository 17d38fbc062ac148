"""clean: every raw record is kept or dropped, and found again; the same bytes on any machine, for any workers."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pyarrow import compute, parquet
from ruamel.yaml import YAML

import clean
import clean_rules
import list_rules
import raw_shards
import tiny
from clean import Params, Piece, doc_id
from conftest import Runner, copy_project
from kit import arrow

FORMATS: dict[str, Any] = {
    "document": {"format": "text", "sample_by": "document"},
    "line": {"format": "text", "sample_by": "line"},
    "jsonl": {"format": "jsonl", "columns": {"text": "body"}},
    "alpaca": {"format": "jsonl", "record": "alpaca"},
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
    "alpaca/documents/data-00000.arrow": "b99116fc66b0d6c82ccaa7edcef828d488dda2209422cdd717ce0667404a61ff",
    "alpaca/ledger/data-00000.arrow": "31a86aad42d2d991ceef1c658a17a7d29e4396937eb23ebca4810690797f04fd",
    "document/documents/data-00000.arrow": "f043cef2797831ace3acc631969bb1113d08662f4f4820f6ec87113f981f1c41",
    "document/documents/data-00001.arrow": "71f467bc9244fcf86a8a8eb8124f4f26d4888d948a24d64bbd6cd9095520c13d",
    "document/documents/data-00002.arrow": "46f725ced6072655ada06c83f5261ee82659591111259dfff5bf8c91aab69a80",
    "document/ledger/data-00000.arrow": "0f530d54ad8a68f0b08289cce9d139ae16489467d542ce5debcae0d908a5d48d",
    "jsonl/documents/data-00000.arrow": "db7b8407f9a55b0c3cfc0d5c0985ff8a21c39025a618593475b958cc0e67f1cd",
    "jsonl/ledger/data-00000.arrow": "9c2766eb33fbdeaac353b44cd9fcb202c29fd56a000081e8d9538d1e8bfbc716",
    "line/documents/data-00000.arrow": "42bbd1b0839f2521f10b460b64f35646a401994200caa23c53b34ea41bbba6aa",
    "line/ledger/data-00000.arrow": "ef3a58b39a38a637eb31aeaa48411a0c75ff3ea8a539df54239d207a1b7e4e59",
}


def params(name: str, **more: Any) -> Params:
    return Params.model_validate({"license": "unknown", **FORMATS[name], **more})


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def write_sources(project: Path, **groups: dict[str, Any]) -> None:
    """Write a params.yaml whose sources are `groups`: name -> its `clean` group; each reads data/raw/NAME."""
    tokenizer = {"mode": "train", "vocab_size": 300, "chat_template": "human_assistant"}
    tiny.params_yaml(project, p={"base": "models/configs/llama_small", "train_tokenizer": tokenizer})
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
        batches = clean.cleaned([Piece("a.txt", path, 0, None)], params(name, **more))
        rows = [row for batch, _ in batches for row in batch.to_pylist()]
    return [row for row in rows if row["doc_id"]], rows


def contents(data: bytes, name: str, **more: Any) -> list[Any]:
    column = "messages" if name == "alpaca" else "text"
    return [document[column] for document in cleaned(data, name, **more)[0]]


def test_the_worked_example_of_the_docstring() -> None:
    documents, ledger = cleaned(b"Cafe\xcc\x81\r\n\nlast", "line")
    assert [(d["text"], d["start"], d["end"], d["number"]) for d in documents] == [
        ("Café", 0, 8, 1),
        ("last", 9, 13, 3),
    ]
    assert [(row["start"], row["end"], row["number"], row["rule"], row["changes"]) for row in ledger] == [
        (0, 8, 1, None, "nfc 1"),
        (8, 9, 2, "empty", None),
        (9, 13, 3, None, None),
    ]


def by_role(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content, "learn": None}


def test_an_alpaca_row_becomes_the_prompt_of_s4() -> None:
    """Instruction, line break, input, stripped as a whole; the answer is left as it is, but for the rules."""
    data = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    assert contents(data, "alpaca") == [
        [by_role("user", "Add.\n2+2"), by_role("assistant", "4\n")],
        [by_role("user", "Say hi"), by_role("assistant", "</s> 你好 \U0001f30a")],
    ]
    assert [row["rule"] for row in cleaned(data, "alpaca")[1]] == [None, None, "empty"]


def test_rules_of_the_source_are_applied_in_order() -> None:
    """Without rules nothing changes and only blank records go; every change and every drop has its name."""
    text = "e\u0301 \t<s>\r\n\x00z \n"
    assert contents(text.encode(), "document", rules=[]) == [text]
    assert contents(text.encode(), "document") == ["\u00e9 \t<s>\nz\n"]
    (row,) = cleaned(b"\xef\xbb\xbf" + text.encode(), "document")[1]
    changes = {"byte_order_mark": 1, "newlines": 1, "control_characters": 1, "nfc": 1, "whitespace": 1}
    assert row["changes"] == ", ".join(f"{name} {count}" for name, count in changes.items())
    for codec in ("gb18030", "utf-16-le", "utf-16-be"):
        data = "\ufeff第一条".encode(codec)
        (row,) = cleaned(data, "document", rules=[], encoding=codec.removesuffix("-le").removesuffix("-be"))[1]
        assert (row["text"], row["changes"]) == ("第一条", "byte_order_mark 1")
    rows = cleaned("\ufeffa\n\ufeffb\n".encode(), "line", rules=[])[1]  # the second is none
    assert [(row["text"], row["changes"]) for row in rows] == [("a", "byte_order_mark 1"), ("\ufeffb", None)]
    (row,) = cleaned("锘挎".encode("gb18030"), "document", rules=[], encoding="gb18030")[1]  # EF BB BF E6
    assert (row["text"], row["changes"]) == ("锘挎", None)
    (row,) = cleaned(b"ab", "document", rules=[{"rule": "length", "min_chars": 3}])[1]
    assert (row["rule"], row["evidence"], row["doc_id"]) == ("length", "2 < 3 characters", None)


@pytest.mark.parametrize("rules", [[], ["nfc"], clean_rules.DEFAULT_RULES])
def test_nothing_blank_is_kept_whatever_the_rules(rules: list[Any]) -> None:
    """An empty document is no text; a question without an answer teaches nothing."""
    assert [row["rule"] for row in cleaned("a\n \n\u3000\n".encode(), "line", rules=rules)[1]] == [
        None,
        "empty",
        "empty",
    ]
    data = json.dumps({"instruction": "Why?", "input": "", "output": " "}).encode()
    assert [row["rule"] for row in cleaned(data, "alpaca", rules=rules)[1]] == ["empty"]
    said = [("user", "Log it."), ("assistant", "{}"), ("tool", ""), ("assistant", "Done.")]  # a tool may say nothing
    data = json.dumps({"messages": [{"role": role, "content": text} for role, text in said]}).encode()
    (row,) = cleaned(data, "jsonl", record="messages", columns={}, rules=rules)[0]
    assert [(turn["role"], turn["content"]) for turn in row["messages"]] == said


def test_a_conversation_of_which_nothing_is_learned_is_dropped() -> None:
    """It would be in the blocks, be paid for, and teach nothing; a question after the last answer stays."""
    asked, answer = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
    wrong = {"role": "assistant", "content": "5", "weight": 0}
    rows = [[asked, answer], [asked], [asked, wrong], [asked, wrong, asked, answer, asked]]
    data = b"".join(json.dumps({"messages": messages}).encode() + b"\n" for messages in rows)
    documents, ledger = cleaned(data, "jsonl", record="messages", columns={})
    assert [row["rule"] for row in ledger] == [None, "no_answer", "no_answer", None]
    assert ledger[1]["evidence"] == "the assistant says nothing that is learned"
    assert [message["learn"] for message in documents[1]["messages"]] == [None, False, None, None, None]
    said = [asked, {"role": "assistant", "content": "5"}, asked, answer, asked]
    assert documents[1]["doc_id"] == doc_id(said), "the same words are one document, whatever of it is learned"


def test_what_cannot_be_read_is_dropped_only_when_the_source_says_so() -> None:
    """`on_error: drop` counts it in the ledger, with the sentence that `fail` would have stopped with."""
    data = b'{"body": "a"}\n{"body": 1}\n\xff\n{"body": "b"}\n'
    with pytest.raises(SystemExit, match=r"a\.txt: line 2: the field `body` is 1, expected a string; .*on_error: drop"):
        cleaned(data, "jsonl")
    documents, ledger = cleaned(data, "jsonl", on_error="drop")
    assert [document["text"] for document in documents] == ["a", "b"]
    assert [(row["number"], row["rule"], row["evidence"]) for row in ledger if row["rule"]] == [
        (2, "unreadable", "line 2: the field `body` is 1, expected a string"),
        (3, "unreadable", "byte 26 (line 3) is not UTF-8"),
    ]


def test_a_conversation_whose_turns_do_not_alternate_is_a_row_of_the_ledger() -> None:
    """As ShareGPT has them; the templates of Llama 2 and Gemma would stop add_bos_eos."""
    rows = [[("human", "2+2?"), ("gpt", "4")], [("gpt", "I am here."), ("human", "2+2?"), ("gpt", "4")]]
    lines = [json.dumps({"conversations": [{"from": who, "value": said} for who, said in row]}) for row in rows]
    given = {"record": "sharegpt", "columns": {}, "rules": ["turns"]}
    documents, ledger = cleaned("\n".join(lines).encode(), "jsonl", **given)
    assert [row["number"] for row in documents] == [1]
    assert [(row["rule"], row["evidence"]) for row in ledger] == [
        (None, None),
        ("turns", "message 1 is of assistant, the first"),
    ]
    with pytest.raises(ValueError, match="the rule `turns` is for conversations, and `record: text` reads none"):
        params("line", rules=["turns"])


AWKWARD = st.lists(st.text(st.sampled_from("a\r\n \t\u0301é中\u3000\x00"), max_size=6), min_size=1, max_size=5)


@given(texts=AWKWARD, rules=st.sampled_from([[], ["length"], clean_rules.DEFAULT_RULES, ["whitespace", "newlines"]]))
@example(["a\x00\u0301"], clean_rules.DEFAULT_RULES)
def test_a_record_is_judged_the_same_beside_any_others(texts: list[str], rules: list[Any]) -> None:
    """What all records of a group spare a rule is what it would not have done to any of them."""
    given = params("line", rules=rules)
    idle = clean_rules.idle_rules(texts, given.rules)
    turns = [{"role": "user", "content": text} for text in texts]
    for content in [*texts, turns, turns[:1], turns[1:] or turns]:
        assert clean.judge(content, given, idle) == clean.judge(content, given)


@given(texts=AWKWARD, name=st.sampled_from(["line", "jsonl", "alpaca"]))
def test_how_records_are_grouped_decides_nothing(texts: list[str], name: str) -> None:
    lines = [json.dumps({"body": text, "instruction": text, "input": "", "output": "a" + text}) for text in texts]
    data = "\n".join(texts if name == "line" else lines).encode()
    with pytest.MonkeyPatch.context() as patch:
        rows = []
        for group, batch in ((1, 1), (10, 40), (2**16, 2**20)):
            patch.setattr(clean, "GROUP_BYTES", group)
            patch.setattr(clean, "BATCH_BYTES", batch)
            rows.append(cleaned(data, name)[1])
    assert rows[0] == rows[1] == rows[2]


@given(st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "tool"]), "content": st.text()})))
@example([{"role": "user", "content": "".join(map(chr, (*range(0x3000), 0xFFFF, 0x1F30A)))}])
def test_the_identity_of_a_conversation_is_that_of_its_json(messages: list[dict[str, str]]) -> None:
    """As json.dumps writes it; exclusions and `.memo` of years ago name documents by it."""
    text = json.dumps(messages, ensure_ascii=False, sort_keys=True)
    assert doc_id(messages) == hashlib.sha256(text.encode()).digest()[:16]


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
        assert row["number"] == data[: row["start"]].count(b"\n") + 1
    for document in documents:
        raw = data[document["start"] : document["end"]].decode()
        raw = raw if document["start"] else raw.removeprefix("\ufeff")
        expected = json.loads(raw)["body"] if name == "jsonl" else raw.rstrip("\r\n") if name == "line" else raw
        assert document["text"] == clean_rules.apply_rules(expected, params(name).rules)[0]
        assert document["doc_id"] == doc_id(document["text"])
    kept = [(row["doc_id"], row["start"]) for row in ledger if row["rule"] is None]
    assert kept == [(document["doc_id"], document["start"]) for document in documents]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same corpus in two projects: another path, other mtimes, files written in another order; two of 9 MB."""
    big = {f"big/{name}.txt": f"line of {name}\r\n".encode() * 800_000 for name in "ab"}
    assert all(len(data) > raw_shards.SHARD_BYTES for data in big.values())  # so that workers get a group each
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
    golden = {name: digest for name, digest in trees[0].items() if name.endswith(".arrow")}
    if os.environ.get("TERROIR_NEW_GOLDEN"):
        print(json.dumps(golden, indent=4))
    assert golden == GOLDEN


def test_the_published_folder_accounts_for_every_record(machines: list[Path], run_stage: Runner) -> None:
    """source.json counts files, bytes and records as the ledger does; nothing of a file is missing."""
    project = machines[1]
    for name in FORMATS:
        assert run_stage(project, "clean", name).returncode == 0
        folder, raw = project / "data/clean/p" / name, project / "data/raw" / name
        about = arrow.read_json(project / "data/sources/p" / name / "source.json")
        visible = sorted(str(p.relative_to(raw)) for p in raw.rglob("*") if p.is_file() and p.name != ".hidden.txt")
        ledger, documents = arrow.table(folder / "ledger").to_pylist(), arrow.table(folder / "documents")
        assert list(dict.fromkeys(row["file"] for row in ledger)) == visible
        for file in visible:
            rows = [row for row in ledger if row["file"] == file]
            assert rows[-1]["end"] == (raw / file).stat().st_size
            assert documents["file"].to_pylist().count(file) == sum(row["rule"] is None for row in rows)
        counts = arrow.manifest(folder / "ledger")["counts"]
        dropped = sum(count for rule, count in counts.items() if rule.startswith("dropped_"))
        assert about["bytes"] == sum((raw / file).stat().st_size for file in visible)
        assert about["files"] == len(visible)
        assert about["records"] == counts["rows"] == len(ledger) == counts["kept"] + dropped
        assert about["kept"] == counts["kept"] == documents.num_rows
        assert about["dropped"] == dropped


def test_a_ledger_row_is_found_by_file_and_line(machines: list[Path], run_stage: Runner) -> None:
    """Why is line 3 of this file not in the data?"""
    project = machines[1]
    assert run_stage(project, "clean", "jsonl").returncode == 0
    ledger = arrow.table(project / "data/clean/p/jsonl/ledger").to_pylist()
    before, row = (row for row in ledger if row["file"] == "rows.jsonl" and row["number"] in (2, 3))
    assert (row["rule"], row["evidence"]) == ("empty", "nothing but white space")
    raw = (project / "data/raw/jsonl/rows.jsonl").read_bytes()[before["end"] : row["end"]]
    assert json.loads(raw) == ROWS[2]


@pytest.mark.parametrize(("name", "files"), [("line", 3), ("document", 5000)])
def test_the_ledger_takes_forty_bytes_a_record_beyond_what_it_quotes(
    project: Path, monkeypatch: pytest.MonkeyPatch, name: str, files: int
) -> None:
    """Names of files and what the rules say stand once in a batch; a file of its own for each record costs the most."""
    monkeypatch.chdir(project)
    lines = 6000 if name == "line" else 1
    for file in range(files):
        text = b"".join(b"%d, %d: cafe\xcc\x81\n" % (line, file) + b"x\n" * (line % 9 == 0) for line in range(lines))
        write_files(project / "data/raw/s", {f"part/{file:05}.txt": text if lines > 1 or file % 9 else b"x"})
    write_sources(project, s={**FORMATS[name], "rules": ["nfc", {"rule": "length", "min_chars": 2}]})
    clean.main("s")
    folder = project / "data/clean/p/s/ledger"
    quoted, seen = 0, set()
    for batch in arrow.batches(folder):
        for column in ("file", "rule", "evidence", "changes"):
            texts = batch[column].dictionary.to_pylist()
            quoted += sum(len(text.encode()) for text in texts)
            seen.update(texts)
    assert {"length", "1 < 2 characters", "nfc 1"} <= seen
    size = sum(path.stat().st_size for path in folder.glob("*.arrow"))
    assert size - quoted <= 40 * arrow.manifest(folder)["counts"]["rows"]


def test_a_source_may_be_one_file(project: Path, run_stage: Runner) -> None:
    """The ledger then names the file by its own name."""
    write_files(project / "data/raw", {"a": b"", "notes.md": b"text"})
    write_sources(project, a={"format": "text"})
    settings = project / "params.yaml"
    settings.write_text(settings.read_text().replace("data/raw/a", "data/raw/notes.md"))
    assert run_stage(project, "clean", "a").returncode == 0
    assert arrow.table(project / "data/clean/p/a/documents")["file"].to_pylist() == ["notes.md"]


@pytest.mark.parametrize("path", ["data/raw/s/", "./data/raw/s", "data/raw//s"])
def test_a_path_may_be_spelt_in_any_way(project: Path, run_stage: Runner, path: str) -> None:
    write_files(project / "data/raw/s", {"a.txt": b"a"})
    write_sources(project, s={"format": "text"})
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("data/raw/s", path))
    finished = run_stage(project, "clean", "s")
    assert finished.returncode == 0, finished.stderr
    assert path in params.read_text()


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
        {"format": "jsonl", "record": "alpaca"},
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
        "line 1, column 1 is JSON beyond what Python reads",
    ),
    "a number too long": (
        {"format": "jsonl"},
        {"x.jsonl": b'{"n": ' + b"1" * 5000 + b"}"},
        "line 1, column 1 is JSON beyond what Python reads",
    ),
    "a file of another kind": (
        {"format": "text"},
        {"a.txt": b"a", "b.pdf": b"%PDF"},
        r"raw/s/b.pdf: format text reads .txt, .txt.gz, .*, .md.*`ignore`",
    ),
    "a folder that DVC passes over": (
        {"format": "text"},
        {"a.txt": b"a", "__pycache__/b.txt": b"b"},
        "raw/s/__pycache__/b.txt: DVC does not track what lies in __pycache__; rename the folder",
    ),
    "a name that is not UTF-8": ({"format": "text"}, {os.fsdecode(b"\xff.txt"): b"a"}, "name is not UTF-8.*rename"),
    "nothing but ignored files": (
        {"format": "text"},
        {".hidden.txt": b"a"},
        "raw/s holds no file to read; put .txt,",
    ),
    "nothing kept": (
        {"format": "text"},
        {"a.txt": b" \n"},
        r"raw/s: none of its 1 records was kept, by empty \(1\): nothing but white space; see sources.s.clean in",
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


def test_a_separator_that_cuts_nothing_is_refused(project: Path, run_stage: Runner) -> None:
    """Misspelt, it would leave each file one document; one match is enough, also where a file begins."""
    write_files(project / "data/raw/s", {"a.txt": b"one\n", "b.txt": b"# 1\r\nx\r\n"})
    for separator, status in (("^## ", 1), ("^# .$", 0)):
        write_sources(project, s={"format": "text", "sample_by": "separator", "separator": separator})
        finished = run_stage(project, "clean", "s")
        assert finished.returncode == status, finished.stderr
        assert ("sources.s.clean.separator: `^## ` stands in no file of data/raw/s" in finished.stderr) == bool(status)


def test_filled_placeholders_are_noted_and_one_that_stands_nowhere_is_refused(project: Path, run_stage: Runner) -> None:
    """A misspelt name in `fill` would leave its placeholders in the text, and the model would learn them."""
    write_files(project / "data/raw/s", {"a.txt": b"I am {{name}}, {{name}} by {{author}}.\nnone\n"})
    fill = {"name": "Terra", "author": "Terroir"}
    write_sources(project, s={"format": "text", "sample_by": "line", "fill": fill})
    assert run_stage(project, "clean", "s").returncode == 0
    ledger = arrow.table(project / "data/clean/p/s/ledger")
    assert ledger["changes"].to_pylist() == ["fill:author 1, fill:name 2", None]  # whatever order `fill` has
    write_sources(project, s={"format": "text", "sample_by": "line", "fill": {"name": "Terra"}})
    finished = run_stage(project, "clean", "s")
    assert "raw/s/a.txt: line 1 holds {{author}}, which `fill` does not name; give it a value, or" in finished.stderr
    write_sources(project, s={"format": "text", "sample_by": "line", "fill": {**fill, "author": "{{author}}"}})
    assert run_stage(project, "clean", "s").returncode == 0
    assert "by {{author}}." in arrow.table(project / "data/clean/p/s/documents")["text"][0].as_py()
    write_sources(project, s={"format": "text", "sample_by": "line", "fill": {**fill, "auhtor": "x"}})
    finished = run_stage(project, "clean", "s")
    assert finished.returncode == 1
    assert "sources.s.clean.fill: {{auhtor}} stands in no record of data/raw/s; correct or" in finished.stderr


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
    """By name, by a folder's name or by path; hidden ones always, whatever else is left out."""
    kept = ["a.txt", "drafts/2/h.txt", "drafts/g.txt", "new/old.txt"]
    write_files(tmp_path, dict.fromkeys([*kept, "b.pdf", "old/c.txt", ".git/d.txt", "new/.e/f.txt"], b""))

    def found(*patterns: str) -> tuple[list[str], int]:
        return raw_shards.raw_files(tmp_path, params("document"), ["*.pdf", "old", *patterns])

    assert found() == (kept, 2)
    assert found("drafts/*.txt") == (["a.txt", "new/old.txt"], 4)
    assert found("drafts/2") == (["a.txt", "drafts/g.txt", "new/old.txt"], 3)


def test_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_files(tmp_path, dict.fromkeys(("b.txt", "a/z.txt", "B.txt", "a.txt", "中.txt"), b"x"))
    assert raw_shards.raw_files(tmp_path, params("document"), [])[0] == [
        "B.txt",
        "a.txt",
        "a/z.txt",
        "b.txt",
        "中.txt",
    ]


# --- shards and what is remembered of them ---------------------------------------------------------------------------


@pytest.fixture
def small_shards(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which a shard has 2 kB, a larger file is cut, and one that cannot be cut is read as a stream."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(raw_shards, "SHARD_BYTES", 2_000)
    monkeypatch.setattr(clean, "BATCH_BYTES", 1_000)
    return project


def build(project: Path, name: str = "s") -> tuple[dict[str, str], int, int]:
    """Run the stage in this process; return the digests of its output, its shards, and those not remembered."""
    clean.main(name)
    (counts,) = arrow.read_json(project / f"metrics/runs/clean@{name}.json")["counts"]
    return tree(project / "data/clean/p" / name), counts["shards"], counts["shards"] - counts["shards_remembered"]


def content(project: Path) -> list[Any]:
    """Return documents and ledger as rows, in whichever files they stand."""
    return [arrow.table(project / "data/clean/p/s" / name).to_pylist() for name in ("documents", "ledger")]


LANGUAGE = {"rule": "language", "languages": ["en"], "min_share": 0.0}
LINES = [json.dumps({"body": f"line {number} " + "word " * (number % 40)}).encode() + b"\n" for number in range(600)]


@pytest.mark.parametrize("workers", ["1", "2", "5"])
def test_cut_and_whole_files_give_the_same_bytes(
    small_shards: Path, workers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large files in parts by any number of workers, or all at once: places count from the beginning of the file.

    Which file of `documents` a row stands in follows from the size of a shard, and nothing else does.
    """
    files = {"big.jsonl": b"\xef\xbb\xbf" + b"".join(LINES), "z.jsonl": LINES[0], "a/b.jsonl": b"".join(LINES[:20])}
    write_files(small_shards / "data/raw/s", files)
    write_sources(small_shards, s=FORMATS["jsonl"])
    monkeypatch.setenv("TERROIR_WORKERS", workers)
    digests, shards, _ = build(small_shards)
    found = content(small_shards)
    assert shards > 10
    monkeypatch.setenv("TERROIR_WORKERS", "1")
    shutil.rmtree(small_shards / ".memo")
    assert build(small_shards) == (digests, shards, shards)
    monkeypatch.undo()
    monkeypatch.chdir(small_shards)
    shutil.rmtree(small_shards / ".memo")
    assert build(small_shards)[1] == 1
    assert content(small_shards) == found


def test_a_file_that_cannot_be_cut_is_read_as_a_stream(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One too large to be held gives the same rows as one that is not, between the same neighbours.

    It is cut by content, too: a row that comes leaves most files of `documents` as they are. It is remembered whole.
    """
    rows = b"".join(b'%d,"a\nb %d"\r\n' % (number, number) for number in range(900))
    write_files(
        small_shards / "data/raw/s", {"a.csv": b"id,body\n1,x\n", "b.csv": b"id,body\n" + rows, "c.csv": b"body\ny"}
    )
    write_sources(small_shards, s={"format": "csv", "columns": {"text": "body"}})
    digests, shards, _ = build(small_shards)
    assert shards == 3
    found = content(small_shards)
    for size, ledger_rows in ((1, 4096), (700, 1), (5_000, 10), (2**20, 4096)):
        monkeypatch.setattr(clean, "BATCH_BYTES", size)
        shutil.rmtree(small_shards / ".memo")
        assert build(small_shards) == (digests, 3, 3)
        monkeypatch.setattr(clean, "LEDGER_ROWS", ledger_rows)  # of the files in .memo
        shutil.rmtree(small_shards / ".memo")
        build(small_shards)
        assert content(small_shards) == found
        monkeypatch.setattr(clean, "LEDGER_ROWS", 4096)
    (small_shards / "data/raw/s/d.csv").write_bytes(b"body\nnew\n")
    assert build(small_shards)[1:] == (3, 1)
    (small_shards / "data/raw/s/d.csv").unlink()
    assert build(small_shards) == (digests, 3, 1)
    assert all(sum(map(len, texts)) <= 2 * 2_000 for texts in texts_of_shards(small_shards))
    before = ids_of_shards(small_shards)
    source = small_shards / "data/raw/s/b.csv"
    source.write_bytes(source.read_bytes().replace(b'5,"a\nb 5"\r\n', b'5,"a\nb 5"\r\n5,"new"\r\n', 1))
    build(small_shards)
    after = ids_of_shards(small_shards)
    assert len(before) > 5
    assert len(set(after) - set(before)) <= 2
    source.write_bytes(b"id,body\n" + rows)
    monkeypatch.undo()
    monkeypatch.chdir(small_shards)
    build(small_shards)
    assert content(small_shards) == found
    assert len(found[0]) == 902


@pytest.mark.parametrize("format_", ["json", "jsonl", "tsv", "parquet", "arrow"])
def test_a_large_file_of_any_format_is_read_alike_whole_and_as_a_stream(
    small_shards: Path, format_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With records that are dropped, and a small file before and behind it; JSON of lines is of UTF-16."""
    texts = ["", *(f"text {number} " + "word " * (number % 50) for number in range(300)), " ", "last"]
    rows = pa.table({"body": texts, "more": list(range(len(texts)))})
    (folder := small_shards / "data/raw/s").mkdir(parents=True)
    for name, part in (("a", rows.slice(1, 2)), ("b", rows), ("c", rows.slice(0, 1)), ("d", rows.slice(3, 1))):
        path = folder / f"{name}.{format_}"
        if format_ == "json":
            path.write_text(json.dumps(part.to_pylist()))
        elif format_ == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in part.to_pylist()), encoding="utf-16")
        elif format_ == "tsv":
            lines = ["body\tmore", *(f"{row['body']}\t{row['more']}" for row in part.to_pylist())]
            path.write_text("\n".join(lines))
        elif format_ == "parquet":
            parquet.write_table(part, path, row_group_size=70)
        else:
            with pa.ipc.new_file(path, part.schema) as out:
                out.write_table(part, max_chunksize=70)
    encoding = {"encoding": "utf-16"} if format_ == "jsonl" else {}
    write_sources(small_shards, s={"format": format_, "columns": {"text": "body"}, **encoding})
    _, shards, _ = build(small_shards)
    found = content(small_shards)
    assert max(sum(map(len, texts)) for texts in texts_of_shards(small_shards)) <= 2 * 2_000
    assert len(found[1]) == 2 + 303 + 1 + 1 and len(found[0]) == 2 + 301 + 1
    monkeypatch.setattr(raw_shards, "SHARD_BYTES", 2**22)
    build(small_shards)
    assert content(small_shards) == found
    assert shards >= 3


@pytest.mark.parametrize("workers", ["1", "2", "5"])
def test_a_compressed_file_is_cut_by_what_it_holds(
    small_shards: Path, workers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few bytes on the disk may be a hundred times as many in memory."""
    monkeypatch.setenv("TERROIR_WORKERS", workers)
    packed = gzip.compress(b"".join(LINES))
    assert 500 < len(packed) < 8_000 < len(b"".join(LINES))
    write_files(small_shards / "data/raw/s", {"a.jsonl.gz": packed, "b.jsonl": LINES[0]})
    write_sources(small_shards, s=FORMATS["jsonl"])
    digests, shards, _ = build(small_shards)
    assert shards == 2
    assert all(sum(map(len, texts)) <= 2 * 2_000 for texts in texts_of_shards(small_shards))
    assert build(small_shards) == (digests, 2, 0)
    monkeypatch.setenv("TERROIR_WORKERS", "1")
    shutil.rmtree(small_shards / ".memo")
    assert build(small_shards) == (digests, 2, 2)
    (small_shards / "data/raw/s/a.jsonl.gz").unlink()
    write_files(small_shards / "data/raw/s", {"a.jsonl": b"".join(LINES)})
    found = content(small_shards)
    build(small_shards)
    for mine, other in zip(content(small_shards), found, strict=True):
        assert mine == [{**row, "file": row["file"].removesuffix(".gz")} for row in other]


def test_conversations_of_a_stream_are_cut_by_what_they_say(small_shards: Path) -> None:
    rows = [{"instruction": f"{n} " + "word " * (n % 40), "input": "", "output": "yes"} for n in range(300)]
    write_files(small_shards / "data/raw/s", {"a.json": json.dumps(rows).encode()})
    write_sources(small_shards, s={"format": "json", "record": "alpaca"})
    assert build(small_shards)[1] == 1
    paths = arrow.shard_paths(small_shards / "data/clean/p/s/documents")
    shards = [[turns for b in arrow.shard_batches(path) for turns in b["messages"].to_pylist()] for path in paths]
    sizes = [sum(len(turn["content"]) for turns in shard for turn in turns) for shard in shards]
    assert len(sizes) > 5 and 1_500 <= min(sizes[:-1]) <= max(sizes) <= 2 * 2_000
    assert sum(map(len, shards)) == len(rows)


def texts_of_shards(project: Path) -> list[list[str]]:
    paths = arrow.shard_paths(project / "data/clean/p/s/documents")
    return [[i.as_py() for b in arrow.shard_batches(path) for i in b["text"]] for path in paths]


def ids_of_shards(project: Path) -> list[tuple[bytes, ...]]:
    paths = arrow.shard_paths(project / "data/clean/p/s/documents")
    return [tuple(i.as_py() for b in arrow.shard_batches(path) for i in b["doc_id"]) for path in paths]


def edited(lines: list[bytes]) -> list[bytes]:
    return [*lines[:300], b'{"body": "a new line"}\n', *lines[300:]]


@pytest.mark.parametrize(
    "change",
    [
        edited,
        lambda lines: lines[:300] + lines[301:],
        lambda lines: [b'{"body": "first"}\n', *lines],
        lambda lines: [lines[0].replace(b": ", b":") + b"\n", *lines[1:]],  # as many bytes, one line more
    ],
)
def test_a_changed_line_of_a_large_file_costs_its_shard(small_shards: Path, change: Any) -> None:
    """One line comes or goes: its shard is read again, at most a neighbour too; the bytes are those of a new build."""
    raw = small_shards / "data/raw/s/big.jsonl"
    write_files(small_shards / "data/raw/s", {"big.jsonl": b"".join(LINES)})
    write_sources(small_shards, s=FORMATS["jsonl"])
    build(small_shards)
    raw.write_bytes(b"".join(change(LINES)))
    digests, shards, new = build(small_shards)
    assert shards > 10
    assert 1 <= new <= 2
    shutil.rmtree(small_shards / ".memo")
    assert build(small_shards) == (digests, shards, shards)


def test_where_a_large_file_is_cut_is_remembered_with_its_content(
    small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unchanged it is not read again; another file gives other cuts."""
    seen: list[str] = []
    cut = raw_shards.line_shards
    monkeypatch.setattr(raw_shards, "line_shards", lambda path: (seen.append(path.name), cut(path))[1])
    write_files(small_shards / "data/raw/s", {"a.jsonl": b"".join(LINES), "b.jsonl": b"".join(LINES[::-1])})
    write_sources(small_shards, s=FORMATS["jsonl"])
    digests, *_ = build(small_shards)
    assert seen == ["a.jsonl", "b.jsonl"]
    monkeypatch.setattr("kit.memo.CHECKED", 0)
    assert build(small_shards)[0] == digests
    assert seen == ["a.jsonl", "b.jsonl"]
    write_files(small_shards / "data/raw/s", {"b.jsonl": b"".join(LINES[1:])})
    digests, *_ = build(small_shards)
    assert seen == ["a.jsonl", "b.jsonl", "b.jsonl"]
    assert len((small_shards / ".memo/clean@s.lines/index.jsonl").read_text().splitlines()) == 2
    shutil.rmtree(small_shards / ".memo")
    assert build(small_shards)[0] == digests


def test_a_byte_order_mark_is_one_only_where_the_file_begins(small_shards: Path) -> None:
    """The same lines further on are other documents, so what is remembered of the first ones is not theirs."""
    lines = [f"line {number} ".encode() * 9 + b"\n" for number in range(99)]
    data = b"\xef\xbb\xbf" + b"".join(lines)
    write_files(small_shards / "data/raw/s", {"big.txt": data})
    write_sources(small_shards, s={**FORMATS["line"], "rules": []})
    build(small_shards)
    _, end, *_ = next(iter(raw_shards.line_shards(small_shards / "data/raw/s/big.txt")))
    write_files(small_shards / "data/raw/s", {"big.txt": data[:end] + data})
    assert build(small_shards)[2] == 1
    marked = [row["number"] for row in content(small_shards)[0] if row["text"].startswith("\ufeff")]
    assert marked == [data[:end].count(b"\n") + 1]


def test_a_new_or_removed_file_among_hundreds_costs_its_shard(small_shards: Path) -> None:
    """Nothing is remembered of a file that is gone; a renamed one is read again, for its name stands in each row."""
    raw = small_shards / "data/raw/s"
    write_files(raw, {f"{number:03}.txt": f"text {number} ".encode() * 20 for number in range(300)})
    write_sources(small_shards, s=FORMATS["document"])
    first, shards, new = build(small_shards)
    assert shards == new > 20
    assert build(small_shards) == (first, shards, 0)
    write_files(raw, {"150a.txt": b"one more"})
    digests, shards, new = build(small_shards)
    assert 1 <= new <= 2
    assert digests != first
    (raw / "150a.txt").unlink()
    digests, _, new = build(small_shards)
    assert digests == first
    assert 1 <= new <= 2
    assert len(list((small_shards / ".memo/clean@s").iterdir())) <= 2 * shards + 1
    (raw / "299.txt").rename(raw / "300.txt")
    assert build(small_shards)[2] == 1
    assert [row["file"] for row in content(small_shards)[0][-2:]] == ["298.txt", "300.txt"]


def test_a_change_of_rules_code_or_lists_leaves_nothing_remembered(
    small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key names them all."""
    write_files(small_shards / "data/raw/s", {"big.jsonl": b"".join(LINES)})
    words = small_shards / "data/rules/words.txt"
    words.write_text("word")
    group = {**FORMATS["jsonl"], "rules": [{"rule": "bad_words", "file": "words.txt", "action": "mask"}]}
    write_sources(small_shards, s=group)
    first, shards, new = build(small_shards)
    assert shards == new
    words.write_text("line")
    second, shards, new = build(small_shards)
    assert shards == new
    assert second != first
    write_sources(small_shards, s=FORMATS["jsonl"])
    assert build(small_shards)[1:] == (shards, shards)
    monkeypatch.setattr("kit.stage.code_digest", lambda digests: "other code")
    assert build(small_shards)[1:] == (shards, shards)


def test_another_licence_or_purpose_reads_nothing_again(small_shards: Path) -> None:
    """They stand in source.json, apart from what later stages read, and decide about no document."""
    write_files(small_shards / "data/raw/s", {"big.jsonl": b"".join(LINES)})
    write_sources(small_shards, s=FORMATS["jsonl"])
    first, shards, _ = build(small_shards)
    notes = {"license": "MIT", "owner": "o", "origin": "g", "language": "en", "collected_on": "2026", "purpose": "p"}
    write_sources(small_shards, s={**FORMATS["jsonl"], **notes})
    second, *rest = build(small_shards)
    assert (second, *rest) == (first, shards, 0)
    assert arrow.read_json(small_shards / "data/sources/p/s/source.json").items() >= notes.items()


@pytest.mark.parametrize(
    ("name", "data", "group", "library"),
    [
        ("a.html", b"<p>hello</p>", {"format": "html"}, "selectolax"),
        ("a.txt", b"hello world of words", {"format": "text", "rules": [LANGUAGE]}, "py3langid"),
    ],
)
def test_another_version_of_a_reader_leaves_nothing_remembered(
    project: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes, group: dict[str, Any], library: str
) -> None:
    monkeypatch.chdir(project)
    write_files(project / "data/raw/s", {name: data})
    write_sources(project, s=group)
    assert build(project)[2] == 1
    assert build(project)[2] == 0
    record = arrow.read_json(project / "metrics/runs/clean@s.json")
    assert library in [one.partition(" ")[0] for one in record["versions"]]
    distribution = types.SimpleNamespace(name=library, version="99")
    monkeypatch.setattr("importlib.metadata.distributions", lambda name: [distribution])
    assert build(project)[2] == 1


def test_each_format_that_needs_a_library_names_it_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the package is called, which the module may not be."""
    named = [types.SimpleNamespace(name=name, version="9") for name in ("pypdf", "python-docx", "selectolax")]
    monkeypatch.setattr("importlib.metadata.distributions", lambda name: [one for one in named if one.name == name])
    given = [Params.model_validate({"format": name, "license": "unknown"}) for name in ("pdf", "docx", "html", "jsonl")]
    assert [clean.libraries(one) for one in given] == [{"pypdf": "9"}, {"python-docx": "9"}, {"selectolax": "9"}, {}]


@pytest.mark.parametrize(
    ("written", "read"), [("2026", "2026"), ("2026-11", "2026-11"), ("'2026-11-21'", "2026-11-21")]
)
def test_a_year_or_month_may_be_written_without_quotes(written: str, read: str) -> None:
    """YAML makes a number of the first."""
    value = YAML(typ="safe").load(written)
    assert params("document", collected_on=value).collected_on == read


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("2026-11-21", "put the day in quotes: '2026-11-21'"),
        ("'2026-02-30'", "there is no such day: 2026-02-30"),
        ("'2026-13'", "there is no such day: 2026-13"),
        ("'21.11.2026'", "should match pattern"),
    ],
)
def test_what_is_no_day_is_refused(written: str, sentence: str) -> None:
    """Of the first YAML makes a date, at which `dvc repro` ends with an unexpected error of its own."""
    with pytest.raises(ValueError, match=sentence):
        params("document", collected_on=YAML(typ="safe").load(written))


def test_a_tampered_memory_is_worked_out_again(small_shards: Path) -> None:
    """A flipped bit does not reach the output."""
    write_files(small_shards / "data/raw/s", {"big.jsonl": b"".join(LINES)})
    write_sources(small_shards, s=FORMATS["jsonl"])
    digests, shards, _ = build(small_shards)
    victim = sorted((small_shards / ".memo/clean@s").iterdir())[0]
    data = bytearray(victim.read_bytes())
    data[-100] ^= 1
    victim.write_bytes(data)
    assert build(small_shards) == (digests, shards, 1)


def test_a_list_that_is_written_while_it_is_read_is_not_believed(
    small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = small_shards / "data/rules/words.txt"
    words.write_text("word")
    write_files(small_shards / "data/raw/s", {"big.jsonl": b"".join(LINES)})
    group = {**FORMATS["jsonl"], "rules": [{"rule": "bad_words", "file": "words.txt", "action": "mask"}]}
    write_sources(small_shards, s=group)
    load = list_rules.ListRule.load

    def other_list(rule: Any) -> None:
        words.write_text("line")
        load(rule)
        words.write_text("word")

    with monkeypatch.context() as patch:
        patch.setattr(list_rules.ListRule, "load", other_list)
        with pytest.raises(SystemExit, match="data/rules changed while the stage ran; nothing was published"):
            build(small_shards)
    digests, shards, new = build(small_shards)
    assert shards == new
    shutil.rmtree(small_shards / ".memo")
    assert build(small_shards)[0] == digests


@pytest.mark.parametrize(
    ("module", "reader", "name", "lines"),
    [
        (clean, "cleaned", "b.jsonl", LINES[:9]),
        (clean, "cleaned", "b.jsonl", LINES),
        (clean, "cleaned", "b.jsonl.gz", LINES),
        (raw_shards, "line_shards", "b.jsonl", LINES),
    ],
    ids=["whole files", "a cut file", "a stream", "where a file is cut"],
)
def test_what_was_read_while_a_file_changed_is_not_remembered(
    small_shards: Path, monkeypatch: pytest.MonkeyPatch, module: Any, reader: str, name: str, lines: list[bytes]
) -> None:
    """Nothing is published; when the edit is undone, its text does not come back under the digest of the old one."""

    def packed(text: bytes) -> bytes:
        return gzip.compress(text, mtime=0) if name.endswith(".gz") else text

    raw = small_shards / "data/raw/s"
    write_files(raw, {"a.jsonl": LINES[0], name: packed(b"".join(lines))})
    write_sources(small_shards, s=FORMATS["jsonl"])
    monkeypatch.setenv("TERROIR_WORKERS", "1")
    digests, _, _ = build(small_shards)
    shutil.rmtree(small_shards / ".memo")
    read = getattr(module, reader)

    def edits_first(what: Any, *more: Any) -> Any:
        if name == (what.name if reader == "line_shards" else what[-1].file):
            write_files(small_shards, {"new": packed(b"".join(lines).replace(b"line", b"LINE"))})
            (small_shards / "new").replace(raw / name)  # as editors save
        return read(what, *more)

    monkeypatch.setattr(module, reader, edits_first)
    with pytest.raises(SystemExit, match="data/raw/s changed while the stage ran"):
        build(small_shards)
    monkeypatch.setattr(module, reader, read)
    write_files(raw, {name: packed(b"".join(lines))})
    assert build(small_shards)[0] == digests


@pytest.mark.parametrize("batch", [1, 1_000])
def test_errors_in_a_part_name_the_line_of_the_file(
    small_shards: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """Also after lines before them have come or gone: a sentence with a line in it is never remembered."""
    monkeypatch.setattr(clean, "GROUP_BYTES", 1)
    monkeypatch.setattr(clean, "BATCH_BYTES", batch)
    raw = small_shards / "data/raw/s"
    lines = [*LINES[:500], b'{"body": 1}\n', *LINES[500:]]
    write_files(raw, {"big.jsonl": b"".join(lines)})
    write_sources(small_shards, s={**FORMATS["jsonl"], "on_error": "drop"})
    for data, line in ((lines, 501), ([LINES[0], *lines], 502), (lines[7:], 494)):
        write_files(raw, {"big.jsonl": b"".join(data)})
        build(small_shards)
        ledger = arrow.table(small_shards / "data/clean/p/s/ledger").to_pylist()
        assert [(row["number"], row["evidence"]) for row in ledger if row["rule"]] == [
            (line, f"line {line}: the field `body` is 1, expected a string")
        ]
    write_sources(small_shards, s=FORMATS["jsonl"])
    with pytest.raises(SystemExit, match=r"big\.jsonl: line 494: the field `body` is 1"):
        build(small_shards)


@pytest.mark.parametrize(
    ("loses", "sentence"),
    [
        (lambda rows: rows[:-1], "45 bytes of b.jsonl were read but 20 recorded came out"),
        (lambda rows: rows[:2] + rows[3:], "75 bytes of a.jsonl were read but"),
        (lambda rows: rows[:1] + rows[2:], "25 bytes of a.jsonl between records were read but"),
        (lambda rows: [row for row in rows if row[0].file != "b.jsonl"], "2 files were read but 1 recorded came out"),
    ],
    ids=["the last record", "the last of a file", "one within a file", "a file"],
)
def test_a_reader_that_loses_a_record_publishes_nothing(
    small_shards: Path, monkeypatch: pytest.MonkeyPatch, loses: Any, sentence: str
) -> None:
    """No reader does; should one, the account of bytes and files says so."""
    files = {"a.jsonl": b"".join(LINES[:3]), "b.jsonl": b"".join(LINES[:2])}
    write_files(small_shards / "data/raw/s", files)
    write_sources(small_shards, s=FORMATS["jsonl"])
    monkeypatch.setenv("TERROIR_WORKERS", "1")
    read = clean.rows_of
    monkeypatch.setattr(clean, "rows_of", lambda group, params: read(loses(group), params))
    with pytest.raises(ValueError, match=rf"^{sentence}.*; nothing was published"):
        build(small_shards)
    assert not (small_shards / "data/clean/p/s").exists()


# --- malformed files -------------------------------------------------------------------------------------------------


def table_bytes(name: str) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.table({name: ["a", "b"]}), sink)
    return sink.getvalue()


def stream_bytes() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"text": ["a", "b"]})
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


# format and more, the file, what the sentence says, and the records (kept, dropped) with `on_error: drop`
MALFORMED: dict[str, tuple[dict[str, Any], str, bytes, str, tuple[int, int]]] = {
    "truncated gzip": (
        {"format": "text", "sample_by": "line"},
        "a.txt.gz",
        gzip.compress(b"one\ntwo\n" * 999)[:-20],
        "gzip stream is cut or damaged",
        (1, 1),
    ),
    "gzip that is none": ({"format": "text"}, "a.txt.gz", b"plain text", "gzip stream is cut or damaged", (0, 1)),
    "zstd cut": (
        {"format": "jsonl"},
        "a.jsonl.zst",
        pa.compress(b'{"text": "a"}\n' * 99, "zstd", asbytes=True)[:-9],
        "zstd stream is cut or damaged",
        (0, 1),
    ),
    "lone surrogate in JSON": (
        {"format": "jsonl"},
        "a.jsonl",
        b'{"text": "\\ud800"}\n{"text": "b"}\n',
        "line 1: the field `text` holds half of a surrogate pair",
        (1, 1),
    ),
    "surrogate in UTF-8": (
        {"format": "text", "sample_by": "line"},
        "a.txt",
        b"ok\n\xed\xa0\x80\n",
        r"byte 3 \(line 2\) is not UTF-8",
        (1, 1),
    ),
    "GB18030 not declared": (
        {"format": "text"},
        "a.txt",
        "第一条".encode("gb18030"),
        r"byte 0 \(line 1\) is not UTF-8",
        (0, 1),
    ),
    "UTF-16 without its mark": (
        {"format": "text", "encoding": "utf-16"},
        "a.txt",
        "ab".encode("utf-16-le"),
        "no byte order mark",
        (0, 1),
    ),
    "ragged csv": (
        {"format": "csv"},
        "a.csv",
        b"id,text\n1,a\n2\n3,c,d\n4,e\n",
        "line 3: it has 1 field, the header names 2",
        (2, 2),
    ),
    "csv with an open quote": ({"format": "csv"}, "a.csv", b'text\na\n"b\nc\n', "is not CSV", (1, 1)),
    "csv without the column": ({"format": "csv"}, "a.csv", b"id\n1\n", "no column `text`, only id", (0, 1)),
    "Parquet without the column": (
        {"format": "parquet"},
        "a.parquet",
        table_bytes("txt"),
        "no column `text`, only txt",
        (0, 1),
    ),
    "truncated Parquet": (
        {"format": "parquet"},
        "a.parquet",
        table_bytes("text")[:-30],
        "the file cannot be read",
        (0, 1),
    ),
    "truncated Arrow": ({"format": "arrow"}, "a.arrow", stream_bytes()[:-8], "without Arrow's end mark", (2, 1)),
    "truncated JSON": ({"format": "json"}, "a.json", b'[{"text": "a"}, {"text": "b', "is not JSON", (1, 1)),
    "JSON with a name twice": (
        {"format": "jsonl"},
        "a.jsonl",
        b'{"text": "a", "text": "b"}\n',
        "holds `text` twice",
        (0, 1),
    ),
    "two JSON values on a line": (
        {"format": "jsonl"},
        "a.jsonl",
        b'{"text": "a"} {"text": "b"}\n',
        "Extra data",
        (0, 1),
    ),
    "an unknown role": (
        {"format": "jsonl", "record": "messages"},
        "a.jsonl",
        b'{"messages": [{"role": "bot", "content": "a"}]}\n',
        'has the role "bot", expected one of',
        (0, 1),
    ),
    "PDF that is none": ({"format": "pdf"}, "a.pdf", b"%PDF-1.4 nothing", "the file cannot be read", (0, 1)),
    "Word that is none": ({"format": "docx"}, "a.docx", b"PK nothing", "the file cannot be read", (0, 1)),
    "HTML in another encoding": ({"format": "html"}, "a.html", b"<p>\xff</p>", "is not UTF-8", (0, 1)),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_stops_the_stage_or_is_counted(
    project: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """One sentence that names file and place; with `on_error: drop` a ledger row, and the good records stay."""
    group, file, data, sentence, (kept, dropped) = MALFORMED[case]
    monkeypatch.chdir(project)
    write_files(project / "data/raw/s", {file: data})
    write_sources(project, s=group)
    with pytest.raises(SystemExit, match=f"data/raw/s/{file}: .*{sentence}") as error:
        clean.main("s")
    assert "\n" not in str(error.value)
    assert not (project / "data/clean/p/s").exists()
    write_sources(project, s={**group, "on_error": "drop"})
    if kept:
        clean.main("s")
        ledger = arrow.table(project / "data/clean/p/s/ledger").to_pylist()
        (bad, *_) = [row for row in ledger if row["rule"]]
        assert bad["rule"] == "unreadable"
        assert re.search(sentence, bad["evidence"])
        assert arrow.table(project / "data/clean/p/s/documents").num_rows == len(ledger) - dropped
        assert sum(row["rule"] is not None for row in ledger) == dropped
    else:
        with pytest.raises(
            SystemExit, match=rf"none of its {dropped} records was kept, by unreadable \({dropped}\): .*{sentence}"
        ):
            clean.main("s")


def test_nul_bytes_are_removed_and_noted(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    write_files(
        project / "data/raw/s", {"a.txt": b"a\0b\0", "b.txt": b"b", "c.txt": b"c", "empty.txt": b"", "d.pdf": b""}
    )
    write_sources(project, s={"format": "text", "ignore": ["*.pdf"]})
    clean.main("s")
    (counts,) = arrow.read_json(project / "metrics/runs/clean@s.json")["counts"]
    noted = {"files": 4, "records": 4, "kept": 3, "dropped": 1, "changed": 1, "ignored_files": 1}
    assert counts.items() >= noted.items()
    assert arrow.read_json(project / "data/sources/p/s/source.json")["changed"] == 1
    rows = arrow.table(project / "data/clean/p/s/ledger").to_pylist()
    assert [(row["rule"], row["changes"]) for row in rows] == [
        (None, "control_characters 2"),
        (None, None),
        (None, None),
        ("empty", None),
    ]
    assert arrow.table(project / "data/clean/p/s/documents")["text"].to_pylist() == ["ab", "b", "c"]


@pytest.mark.slow
def test_a_line_of_200_megabytes_is_one_record(project: Path, run_stage: Runner) -> None:
    (project / "data/raw/s").mkdir(parents=True)
    with (project / "data/raw/s/a.jsonl").open("wb") as file:
        file.write(b'{"text": "first"}\n{"text": "')
        for _ in range(200):
            file.write(b"0123456789abcdef" * 2**16)
        file.write(b'"}\n{"text": "last"}\n')
    write_sources(project, s={"format": "jsonl"})
    finished = run_stage(project, "clean", "s")
    assert finished.returncode == 0, finished.stderr
    ledger = arrow.table(project / "data/clean/p/s/ledger").to_pylist()
    assert [(row["number"], row["rule"]) for row in ledger] == [(1, None), (2, None), (3, None)]
    documents = arrow.table(project / "data/clean/p/s/documents")
    assert compute.utf8_length(documents["text"]).to_pylist() == [5, 200 * 2**20, 4]


def test_a_loop_of_folders_is_refused(project: Path, run_stage: Runner) -> None:
    write_files(project / "data/raw/s", {"deep/a.txt": b"a"})
    (project / "data/raw/s/deep/up").symlink_to("..")
    write_sources(project, s={"format": "text"})
    finished = run_stage(project, "clean", "s")
    assert (finished.returncode, len(finished.stderr.splitlines())) == (1, 1), finished.stderr
    assert "data/raw/s/deep/up is a link to a folder" in finished.stderr


def test_a_file_that_may_not_be_read_is_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, who may read everything: the refusal of the system is acted."""
    write_files(project / "data/raw/s", {"secret.txt": b"a", "a.txt": b"a"})
    write_sources(project, s={"format": "text"})
    monkeypatch.chdir(project)
    path_open = Path.open

    def refuse(path: Path, *args: Any, **named: Any) -> Any:
        if path.name == "secret.txt":
            raise PermissionError(13, "Permission denied")
        return path_open(path, *args, **named)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SystemExit, match=r"data/raw/s/secret.txt may not be read; give yourself the right"):
        clean.main("s")


# --- folders of `datasets` -------------------------------------------------------------------------------------------


def test_a_folder_of_save_to_disk_is_read_as_one_file(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source itself, folders within it, and splits of a DatasetDict: rows are counted through their shards."""
    import datasets

    monkeypatch.chdir(project)
    rows = datasets.Dataset.from_dict({"text": [f"row {number}" for number in range(7)]})
    rows.save_to_disk("data/raw/one", num_shards=2)
    datasets.DatasetDict({"train": rows, "test": rows.select([3])}).save_to_disk("data/raw/two")
    write_sources(project, one={"format": "arrow"}, two={"format": "arrow"})
    clean.main("one")
    clean.main("two")
    found = arrow.table(project / "data/clean/p/one/ledger").to_pylist()
    assert [(row["file"], row["number"], row["end"]) for row in found] == [("one", n, None) for n in range(1, 8)]
    found = arrow.table(project / "data/clean/p/two/ledger").to_pylist()
    assert [row["file"] for row in found] == ["test", *["train"] * 7]
    assert arrow.read_json(project / "data/sources/p/two/source.json")["unit"] == "row"
    for pattern in ("test/*", "test"):
        write_sources(project, two={"format": "arrow", "ignore": [pattern]})
        clean.main("two")
        assert set(arrow.table(project / "data/clean/p/two/ledger")["file"].to_pylist()) == {"train"}
    (project / "data/raw/two/train/cache-1.arrow").write_bytes(b"of datasets' own")
    write_sources(project, two={"format": "arrow", "ignore": ["cache-*"]})
    clean.main("two")
    write_sources(project, two={"format": "arrow", "ignore": ["train/data-*"]})
    with pytest.raises(SystemExit, match=r"train/data-00000.*: `ignore` names it, but the folder is read as a whole"):
        clean.main("two")
    for pattern in ("*.json", "train/state.json"):
        write_sources(project, two={"format": "arrow", "ignore": [pattern]})
        with pytest.raises(SystemExit, match=r"/state.json: `ignore` names it, but the folder is read as a whole"):
            clean.main("two")


def test_the_names_in_a_folder_of_save_to_disk_decide_which_rows_are_read(small_shards: Path) -> None:
    """state.json names files: where two change names, the same bytes are other rows."""
    import datasets

    folder = small_shards / "data/raw/s"
    rows = datasets.Dataset.from_dict({"text": ["a text", "another text"]})
    rows.save_to_disk(str(folder), num_shards=2)
    write_sources(small_shards, s={"format": "arrow"})
    build(small_shards)
    first, second = sorted(folder.glob("data-*"))
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    assert build(small_shards)[2] == 1
    assert [row["text"] for row in content(small_shards)[0]] == ["another text", "a text"]
