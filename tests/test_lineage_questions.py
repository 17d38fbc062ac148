"""Every line's fate, every block's documents, every document's steps: both ways, for each format and kind of block."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from lineage import folders, tables, verify
from lineage.__main__ import _counted
from lineage.diff import at_revision, cache_folder, compare
from lineage.erase import exclude
from lineage.questions import Lineage
from lineage.replay import _encoder, records, replay
from lineage.trace import content_of, trace

import tiny
import varied
from block_order import BlockOrder
from conftest import ROOT, copy_project, git, repro, write
from document_turns import rule_of
from kit import arrow, stage_code

SPLITS = ("train", "eval")
LATER = {stage_code.STAGES / name for name in ("generation.py", "kit/model.py")}  # `trace --generate`: no index of it


@pytest.fixture(scope="module")
def project(varied_project: Path) -> Path:
    """A source of each format, a victim of each rule, blocks of each kind; grouped, not trained."""
    return varied_project


@pytest.fixture(scope="module")
def lineage(project: Path) -> Lineage:
    return Lineage(project)


@pytest.fixture(scope="module")
def trained(finished: Path) -> Lineage:
    """The finished tiny project; its index goes beside it into .work, which Git ignores."""
    return Lineage(finished)


def lineage_command(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lineage", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=environment)


def ask(root: Path, *arguments: str, status: int = 0) -> Any:
    """Return the JSON that a command prints, or its message when it is to fail."""
    done = lineage_command(root, *arguments, *([] if status else ["--json"]))
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status else json.loads(done.stdout)


def rewritten(folder: Path, edit: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Write an Arrow folder anew with edited rows."""
    table = arrow.table(folder)
    schema, rows, counts = table.schema, table.to_pylist(), arrow.manifest(folder)["counts"]
    del table
    edit(rows)
    with arrow.Writer(folder, schema) as out:
        out.write(pa.Table.from_pylist(rows, schema))
        out.counts = counts


# --- Blocks and documents


@pytest.mark.parametrize("which", [pytest.param("lineage", marks=pytest.mark.slow), "trained"])
def test_a_block_is_made_of_the_documents_that_the_layout_says_and_back(
    which: str, request: pytest.FixtureRequest
) -> None:
    """All modes, weights, splits: the pieces' tokens are the block's, and each piece is found from its document."""
    of: Lineage = request.getfixturevalue(which)
    pieces = 0
    for phase in of.phases.values():
        sources = {source.name: source for source in phase.sources}
        eos = _encoder(phase).vocabulary.special_ids["eos_token_id"]
        for split in SPLITS:
            layout, from_blocks, tokens = phase.layout(split), set(), 0
            for number in range(layout.blocks):
                stored = phase.blocks(split).row(number)["input_ids"]
                for piece in layout.block(number):
                    document = sources[piece.source].tokens.row(piece.row)
                    part = document["input_ids"][piece.start : piece.start + piece.length]
                    rule = rule_of(layout.grouping["long_documents"], piece.source)
                    if rule == "truncate" and len(document["input_ids"]) > layout.size:
                        part = [*part[:-1], eos]
                    assert stored[piece.place : piece.place + piece.length] == part
                    from_blocks.add(piece)
                    tokens += piece.length
            assert tokens == layout.filled
            rows = [
                (s.name, row)
                for s in phase.sources
                for row in range(len(s.tokens))
                if s.tokens.row(row)["split"] == split
            ]
            assert {piece for source, row in rows for piece in layout.document(source, row)} == from_blocks
            pieces += len(from_blocks)
    assert pieces > 200


def test_an_index_is_built_anew_for_other_files_and_for_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an edit of the packing, or of how texts are cut, made wrong is no answer; nor does an old index stay."""
    write(tmp_path / "depends.json", "1")
    built = itertools.count()

    def get() -> int:
        found = folders.Cache(tmp_path).get("a/b", [tmp_path / "depends.json"], lambda: {"n": np.array([next(built)])})
        return int(found["n"][0])

    assert (get(), get()) == (0, 0)
    write(tmp_path / "depends.json", "2")
    assert get() == 1
    monkeypatch.setattr(folders, "code", lambda: b"edited")
    assert (get(), get()) == (2, 2)
    assert len(list((tmp_path / ".work/lineage/a%b").iterdir())) == 1
    monkeypatch.undo()
    builders = {path for name in folders.BUILDERS for path in stage_code.code_files(stage_code.STAGES / f"{name}.py")}
    for module in ("folders", "layout", "trace"):
        named = stage_code._imported((ROOT / f"lineage/{module}.py").read_bytes())
        used = {stage_code.STAGES / f"{name.replace('.', '/')}.py" for name in named} - LATER
        assert {path for path in used if path.is_file()} <= builders, module


def test_two_questions_at_once_build_one_index(tmp_path: Path) -> None:
    """The second one finds it there when it is to put its own in place, and takes it."""
    write(tmp_path / "depends.json", "1")

    def get(then: Callable[[], object]) -> int:
        def build() -> dict[str, Any]:
            then()
            return {"n": np.array([7])}

        return int(folders.Cache(tmp_path).get("a/b", [tmp_path / "depends.json"], build)["n"][0])

    assert get(lambda: get(lambda: None)) == 7
    assert [len(list(path.iterdir())) for path in (tmp_path / ".work/lineage/a%b").iterdir()] == [1]


def test_random_blocks_come_out_of_the_raw_files_alike(lineage: Lineage) -> None:
    found = replay(lineage, list(lineage.phases), 300, seed=5)
    assert not any(one["wrong"] for one in found)
    assert sum(one["rebuilt"] for one in found) >= 250
    assert {one["phase"] for one in found} == {"docs", "packs", "talk"}


@pytest.mark.parametrize(
    ("column", "said"), [("input_ids", "the tokens of data/raw/"), ("learn", "what is learned is not")]
)
def test_a_block_that_is_not_what_the_raw_files_give_is_named(
    project: Path, tmp_path: Path, column: str, said: str
) -> None:
    root = Path(shutil.copytree(project, tmp_path / "project", symlinks=True))

    def alter(rows: list[dict[str, Any]]) -> None:
        rows[3][column][2] = rows[3][column][2] + 1 if column == "input_ids" else not rows[3][column][2]

    rewritten(root / "data/blocks/talk/train", alter)
    wrong = [said for one in replay(Lineage(root), ["talk"], 300, seed=5) for said in one["wrong"]]
    assert len(wrong) == 1 and wrong[0].startswith(f"block 3: {said}")


def test_random_records_are_judged_anew_and_a_forged_reason_is_found(
    lineage: Lineage, project: Path, tmp_path: Path
) -> None:
    """Kept and dropped, of every format; papers and digests say nothing of why a record was dropped."""
    found = records(lineage, 200, seed=5)
    assert not any(one["wrong"] for one in found)
    assert all(one["judged"] == one["records"] for one in found)
    assert len(found) == len([*varied.FORMATS, *varied.CHATS])
    assert not any(one["wrong"] for one in records(lineage, 5, seed=5))  # some of those that stand on one line

    root = Path(shutil.copytree(project, tmp_path / "project", symlinks=True))
    folder = root / "data/clean/packs/packed/ledger"
    for line, name, value, said in (
        (41, "rule", "symbol_share", "packed.txt:41: its rule is 'length' today, 'symbol_share' in the ledger"),
        (41, "evidence", "9 < 10 characters", "packed.txt:41: its evidence is '5 < 10 characters' today"),
        (48, "changes", None, "packed.txt:48: its changes is 'pii 1' today, None in the ledger"),
        (5, "raw_id", bytes(16), "packed.txt:5: its raw_id is "),
    ):
        table = arrow.table(folder)
        rows, schema, counts = table.to_pylist(), table.schema, arrow.manifest(folder)["counts"]
        del table
        with arrow.Writer(folder, schema) as out:
            changed = [{**row, name: value} if row["number"] == line else row for row in rows]
            out.write(pa.Table.from_pylist(changed, schema))
            out.counts = counts
        wrong = [text for one in records(Lineage(root), 200, seed=5) for text in one["wrong"]]
        assert len(wrong) == 1 and said in wrong[0]
        with arrow.Writer(folder, schema) as out:
            out.write(pa.Table.from_pylist(rows, schema))
            out.counts = counts

    # Of a format whose records are found by reading the file; of a document that is another one than its record gives.
    for place, name, value, said in (
        ("docs/csv/ledger", "end", 1, r"rows\.csv:\d+: its end is \d+ today, 1 in the ledger"),
        ("docs/csv/ledger", "number", 999, r"rows\.csv:999: there is no record in the raw file"),
        ("docs/csv/documents", "doc_id", bytes(16), rf"rows\.csv:\d+: its doc_id is \w+ today, {'0' * 32} in"),
    ):
        before = arrow.table(root / "data/clean" / place).to_pylist()
        rewritten(root / "data/clean" / place, lambda rows, name=name, value=value: rows[-1].update({name: value}))
        (wrong,) = (text for one in records(Lineage(root), 200, seed=5) for text in one["wrong"])
        assert re.search(said, wrong), wrong
        rewritten(root / "data/clean" / place, lambda rows, before=before: rows.__setitem__(slice(None), before))


def test_each_block_is_shown_once_in_an_epoch_and_steps_are_the_order_s_inverse(trained: Lineage) -> None:
    for name, phase in trained.phases.items():
        blocks = phase.layout("train").blocks
        order = BlockOrder(blocks, 0)
        expected: dict[int, list[int]] = {block: [] for block in range(blocks)}
        for place in range(phase.steps * phase.batch):
            expected[order.block(place)].append(place // phase.batch + 1)
        assert {block: phase.steps_of(block) for block in range(blocks)} == expected
        shown = Counter(step for steps in expected.values() for step in steps)
        assert shown == dict.fromkeys(range(1, phase.steps + 1), phase.batch)
        assert all(trained.block(name, block)["steps"] == steps for block, steps in list(expected.items())[:5])


# --- Canaries and victims

LINES = {  # file and line (row, paragraph) of the canary: the sixth record
    "text": ("text/05.txt", 1),
    "line": ("line.txt", 6),
    "separator": ("separator/book.md", 21),
    "jsonl": ("jsonl/rows.jsonl.gz", 6),
    "json": ("json/rows.json", 17),
    "csv": ("csv/rows.csv", 12),
    "tsv": ("tsv/rows.tsv", 7),
    "parquet": ("parquet/rows.parquet", 6),
    "arrow": ("arrow/rows.arrow", 6),
    "html": ("html/05.html", 1),
    "docx": ("docx/notes.docx", 6),
    "packed": ("packed.txt", 6),
    "messages": ("messages/rows.jsonl", 6),
    "alpaca": ("alpaca/rows.json", 1),
    "pairs": ("pairs/rows.csv", 7),
}


@pytest.mark.parametrize("name", [*varied.FORMATS, *varied.CHATS])
def test_a_canary_of_each_format_comes_back_at_its_file_and_line_and_blocks(name: str, lineage: Lineage) -> None:
    file, number = LINES[name]
    (found,) = lineage.where(varied.canary(name))
    unit = {"parquet": "row", "arrow": "row", "docx": "paragraph"}.get(name, "line")
    assert (found["file"], found["source"]) == (f"data/raw/{file}", name)
    assert abs(found[unit] - number) <= (1 if name == "json" else 0)
    assert ("bytes" in found) == (unit == "line")  # and no `None, None`
    here = lineage.why(f"data/raw/{file}", found[unit])
    assert found in here and len(here) == (12 if name == "alpaca" else 1)  # all of its records stand on one line
    assert found in lineage.why(file.removeprefix(f"{name}/"), found[unit])
    # The weight of csv is a half, and its canary is in the half that is not shown.
    expected = ("left out of the blocks",) if name == "csv" else ("in the training blocks, no model yet", "held out")
    assert found["verdict"] in expected
    phase = lineage.phases[found["phase"]]
    text = ""
    for block in found["blocks"]:
        pieces = lineage.block(phase.name, block["block"], found["split"])["pieces"]
        text += next(p["text"] for p in pieces if p["doc_id"] == found["doc_id"] and p["from"] == block["from"])
    end = -20 if name == "packed" else None  # longer than a block there, and cut
    assert varied.canary(name)[:end] in text or name == "csv"


def test_the_canaries_come_back_with_the_steps_and_models_that_saw_them(project: Path, tmp_path: Path) -> None:
    """The phases are not trained; what a training of two epochs and a bit would leave is written beside them."""
    root = Path(shutil.copytree(project, tmp_path / "project", symlinks=True))
    batch, seen = 16, 0
    for name, phase in Lineage(root).phases.items():
        steps = 2 * phase.layout("train").blocks // batch + 2
        write(root / f"models/{name}/trained/receipts.bin", "-" * 16 * steps)
    lineage = Lineage(root)
    for name in (*varied.FORMATS, *varied.CHATS):
        (found,) = lineage.where(varied.canary(name))
        phase = lineage.phases[found["phase"]]
        order = BlockOrder(phase.layout("train").blocks, 0)
        shown = [order.block(place) for place in range(phase.steps * batch)]
        if found["split"] == "eval" or not found["blocks"]:
            assert not found["models"] and not any(block["steps"] for block in found["blocks"])
            continue
        for block in found["blocks"]:
            assert block["steps"] == [n // batch + 1 for n, one in enumerate(shown) if one == block["block"]]
            assert len(block["steps"]) >= 2
        first = min(step for block in found["blocks"] for step in block["steps"])
        model = {"phase": phase.name, "model": f"models/{phase.name}/merged", "state": "not made yet; run `dvc repro`"}
        assert found["models"] == [{**model, "first_step": first}]
        reached = {n for block in found["blocks"] for n in range(block["from"], block["from"] + block["tokens"])}
        part = f"trained in part: {len(reached)} of its {found['tokens']} tokens in {phase.steps} steps"
        assert found["verdict"] == ("trained" if len(reached) == found["tokens"] else part)
        seen += 1
    assert seen >= 10


VICTIMS = {  # what a record must say to be dropped by a rule, and what the ledger says of it
    "length": ("Short.", "6 < 10 characters"),
    "symbol_share": ("€$%&§!?*+#@~^°|<>{}[]=/" * 3, "of the characters"),
    "digit_share": ("1234567890 " * 8 + "words", "of the characters"),
    "repeated_lines": ("The same line again.\n" * 20, "."),
    "repeated_ngrams": ("one two three four five six seven eight nine ten " * 30, "."),
    "replacement_characters": ("It was \ufffd\ufffd\ufffd\ufffd and so on, \ufffd\ufffd\ufffd said he.", "."),
    "bad_words": ("A sentence in which the word gadzooks stands.", "the first 'gadzooks'"),
    "regular_expression": ("A sentence with the number AB-1234 of a case.", "the first 'AB-1234'"),
    "empty": (" \n\t ", "white space"),
}


def test_a_victim_of_every_dropping_rule_comes_back_with_its_rule_and_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import clean
    import clean_rules

    root = copy_project(tmp_path / "project")
    write(root / "data/rules/bad.txt", "gadzooks\n")
    write(root / "data/rules/cases.txt", "AB-\\d+\n")
    rules: list[dict[str, Any]] = [
        {"rule": "length", "min_chars": 10},
        {"rule": "replacement_characters"},
        {"rule": "bad_words", "file": "bad.txt"},
        {"rule": "regular_expression", "file": "cases.txt"},
        {"rule": "repeated_lines"},
        {"rule": "repeated_ngrams"},
        {"rule": "digit_share", "max_share": 0.5},
        {"rule": "symbol_share", "max_share": 0.4},
    ]
    dropping = {name for name in clean_rules.RULES if clean_rules.parse(params_of(name)).drops}
    dropping -= {"language", "turns"}  # an optional extra; of conversations alone
    assert dropping == {rule["rule"] for rule in rules}, "a new dropping rule needs a victim here"
    kept = "A sentence like any other, about nothing at all."
    lines = [json.dumps({"text": text}) for text, _ in VICTIMS.values()]
    write(root / "data/raw/v/rows.jsonl", "\n".join([json.dumps({"text": kept}), *lines, "{broken"]) + "\n")
    tiny.params_yaml(root, p={"base": "models/configs/llama_small"})
    content = json.loads((root / "params.yaml").read_text())
    how = {"format": "jsonl", "on_error": "drop", "rules": rules, "license": "unknown"}
    content["sources"] = {"s": {"phase": "p", "path": "data/raw/v", "clean": how}}
    (root / "params.yaml").write_text(json.dumps(content))
    monkeypatch.chdir(root)
    clean.main("s")
    (root / "dvc.lock").write_text(LOCK)
    lineage = Lineage(root)
    expected = {**{rule: said for rule, (_, said) in VICTIMS.items()}, "unreadable": "line 11"}
    for line, (rule, said) in enumerate(expected.items(), start=2):
        (found,) = lineage.why("data/raw/v/rows.jsonl", line)
        assert (found["verdict"], found["rule"]) == ("dropped by clean", rule)
        assert re.search(said, found["evidence"])


def params_of(rule: str) -> dict[str, Any]:
    """Return a rule with what it must be told, as params.yaml writes it."""
    more = {"bad_words": {"file": "f"}, "regular_expression": {"file": "f"}, "boilerplate": {"patterns": ["x"]}}
    return {"rule": rule, **more.get(rule, {}), **({"languages": ["en"]} if rule == "language" else {})}


LOCK = """schema: '2.0'
stages:
  clean@s:
    cmd: exec python stages/clean.py s
    deps:
    - path: data/raw/v
      hash: md5
      md5: '0'
    outs:
    - path: data/clean/p/s
      hash: md5
      md5: '0'
"""


def test_lines_within_a_record_lead_to_it_and_lines_beyond_the_file_to_none(lineage: Lineage) -> None:
    first = lineage.why("data/raw/text/05.txt", 1)
    assert lineage.why("data/raw/text/05.txt", 4) == first
    assert lineage.why("data/raw/separator/book.md", 22)[0]["line"] == 21
    for file, number in (
        ("data/raw/text/05.txt", 5),
        ("data/raw/line.txt", 13),
        ("data/raw/line.txt", 0),
    ):
        with pytest.raises(SystemExit, match=f"no source has a record there; `where {file}` lists"):
            lineage.why(file, number)
    for file in ("no.txt", "data/raw/text/no.txt", "data/raw/text", ""):
        with pytest.raises(
            SystemExit, match=r"no raw file of a source; name a file of data/raw/alpaca, .*tsv; one that is new"
        ):
            lineage.why(file, 1)


def test_without_the_raw_file_a_record_of_one_line_holds_no_other_line(
    lineage: Lineage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that may be longer the nearest is named."""
    monkeypatch.setattr(lineage, "_raw", lambda *_: None)
    assert lineage.why("data/raw/text/05.txt", 99)[0]["line"] == 1
    for file in ("data/raw/line.txt", "data/raw/jsonl/rows.jsonl.gz"):
        with pytest.raises(SystemExit, match="no source has a record there"):
            lineage.why(file, 99)


@pytest.mark.parametrize(
    ("line", "verdict", "rule", "evidence"),
    [
        (41, "dropped by clean", "length", "5 < 10 characters"),
        (42, "dropped by clean", "empty", "nothing but white space"),
        (43, "dropped by clean", "symbol_share", "of the characters"),
        (44, "dropped by dedup", "exact_duplicate", None),
        (45, "dropped by dedup", "near_duplicate", None),
        (46, "dropped by dedup", "excluded", None),
        (47, "dropped by dedup", "decontaminate:quiz", "data/benchmarks/quiz.txt line 1"),
    ],
)
def test_a_victim_of_each_rule_comes_back_with_rule_evidence_and_twin(
    lineage: Lineage, line: int, verdict: str, rule: str, evidence: str | None
) -> None:
    (found,) = lineage.why("data/raw/packed.txt", line)
    assert (found["verdict"], found["rule"]) == (verdict, rule)
    assert "blocks" not in found
    if evidence:
        assert evidence in found["evidence"]
    twins = {44: 4, 45: 6}
    assert found.get("twin", {}).get("line") == twins.get(line)
    assert not lineage.steps(found["doc_id"])[0]["steps"] if "doc_id" in found else True


def test_what_the_rules_changed_is_said(lineage: Lineage) -> None:
    assert lineage.why("data/raw/packed.txt", 48)[0]["changes"] == "pii 1"
    assert lineage.why("data/raw/text/05.txt", 1)[0]["changes"] == "newlines 3, nfc 1, whitespace 1"


@pytest.mark.parametrize(("name", "reach"), [("docs", 0.5), ("packs", 1.0)])
def test_a_document_is_trained_when_each_of_its_tokens_was_shown(project: Path, name: str, reach: float) -> None:
    """Once is enough of what has a weight above 1; of a long document that was cut the rest never was."""
    fresh = Lineage(project)
    phase = fresh.phases[name]
    shown = int(reach * phase.layout("train").blocks)
    phase.__dict__.update(steps=1, steps_of=lambda block: [1] if block < shown else [])
    seen = Counter()
    for source in phase.sources:
        for row in range(len(source.documents)):
            found = fresh.document(source, row)
            if found.get("split") == "train" and found["blocks"]:
                reached = {n for b in found["blocks"] if b["steps"] for n in range(b["from"], b["from"] + b["tokens"])}
                part = f"trained in part: {len(reached)} of its {found['tokens']} tokens in 1 steps"
                whole = "trained" if len(reached) == found["tokens"] else part
                assert found["verdict"] == (whole if reached else "not reached in 1 steps")
                seen[whole == "trained", all(b["steps"] for b in found["blocks"])] += 1
    assert seen[True, False] if name == "docs" else seen[False, True]


def test_models_are_those_trained_on_it_and_those_that_go_on_from_them(trained: Lineage) -> None:
    seen = Counter()
    for source in trained.sources:
        for row in range(len(source.ledger)):
            found = trained.record(source, row)
            steps = sorted(step for block in found.get("blocks", []) for step in block["steps"])
            models = [(one["phase"], one.get("first_step")) for one in found.get("models", [])]
            chained = [("chat", None)] if source.phase == "pretrain" else []
            assert models == ([(source.phase, steps[0]), *chained] if steps else [])
            assert not any("state" in one for one in found.get("models", []))
            shown = {
                n for b in found.get("blocks", []) if b["steps"] for n in range(b["from"], b["from"] + b["tokens"])
            }
            whole = len(shown) == found.get("tokens")
            assert found["verdict"].startswith("trained") == bool(steps)
            assert found["verdict"].startswith("trained in part") == (bool(steps) and not whole)
            seen[re.sub(r"\d+", "N", found["verdict"])] += 1
    assert seen.keys() == {
        "trained",
        "trained in part: N of its N tokens in N steps",
        "held out",
        "not reached in N steps",
        "dropped by clean",
        "dropped by dedup",
    }


def test_the_steps_of_a_document_are_those_of_its_blocks(trained: Lineage) -> None:
    source = trained.phases["pretrain"].sources[1]
    rows = [trained.record(source, row) for row in range(len(source.ledger))]
    found = next(row for row in rows if row["verdict"] == "trained")
    (answer,) = trained.steps(found["doc_id"])
    assert [(one["step"], one["block"]) for one in answer["steps"]] == sorted(
        (step, block["block"]) for block in found["blocks"] for step in block["steps"]
    )
    with pytest.raises(SystemExit, match="no document has the id"):
        trained.steps("0" * 32)
    with pytest.raises(SystemExit, match="is no doc_id"):
        trained.steps("xyz")


def test_an_id_leads_to_its_records_whole_or_by_its_first_half(lineage: Lineage) -> None:
    (dropped,) = lineage.why("data/raw/packed.txt", 41)
    assert lineage.where(dropped["raw_id"]) == [dropped]
    unchanged = next(one for one in lineage.sample(0, 500) if one.get("doc_id") == one["raw_id"])
    found = [str(one) for one in lineage.where(unchanged["doc_id"])]
    assert len(found) == len(set(found)) > 0
    other = f"{dropped['raw_id'][:-1]}{'0' if dropped['raw_id'][-1] != '0' else '1'}"
    with pytest.raises(SystemExit, match="is no id, no part of a document"):
        lineage.where(other)  # its first half is that of a record, the whole is not
    with pytest.raises(SystemExit, match="is no id, no part of a document"):
        lineage.where("6222021234567890123")  # an odd number of digits is a text
    copies = lineage.where(lineage.why("data/raw/packed.txt", 44)[0]["doc_id"][:16])
    assert [one["line"] for one in copies] == [4, 44]


def test_a_file_leads_to_its_records_and_a_text_to_all_that_hold_it(lineage: Lineage) -> None:
    assert [one["line"] for one in lineage.where("data/raw/line.txt", 50)] == list(range(1, 13))
    assert len(lineage.where("docx/notes.docx", 5)) == 5
    assert len({one["source"] for one in lineage.where("Canary of", 50)}) == 16 - 1
    with pytest.raises(SystemExit, match=r"is no id, no part of a document, and no raw file of a source; name a file"):
        lineage.where("nobody wrote this")
    with pytest.raises(SystemExit, match="nothing to look for"):
        lineage.where(" ")


def test_a_file_that_two_sources_read_leads_to_the_records_of_both(lineage: Lineage, monkeypatch: Any) -> None:
    line, packed = (next(one for one in lineage.sources if one.name == name) for name in ("line", "packed"))
    monkeypatch.setattr(lineage, "_files", lambda _: iter([(line, "line.txt"), (packed, "packed.txt")]))
    assert Counter(one["source"] for one in lineage.where("line.txt", 20)) == {"line": 12, "packed": 8}


def test_a_model_says_all_that_went_in_down_to_the_horizon(trained: Lineage) -> None:
    found = trained.model("chat")
    assert [one["phase"] for one in found["trainings"]] == ["chat", "pretrain"]
    assert (found["base"], found["horizon"]) == ("models/configs/tiny", "random weights")
    for one in found["trainings"]:
        assert sum(source["share"] for source in one["sources"]) == pytest.approx(1, abs=1e-5)
        assert one["blocks_shown"] == min(one["steps"] * 4, one["blocks"])
        layout = trained.phases[one["phase"]].layout("train")
        assert sum(source["tokens"] for source in one["sources"]) == layout.filled


def test_of_more_than_an_epoch_each_block_was_shown_and_a_phase_goes_on_from_the_one_it_names(trained: Lineage) -> None:
    fresh = Lineage(trained.root)
    fresh.phases["chat"].__dict__["steps"] = 1000
    chat = fresh.model("chat")["trainings"][0]
    assert (chat["blocks_shown"], chat["tokens_shown"]) == (chat["blocks"], 1000 * 4 * 32)
    assert fresh.descendants("pretrain") == ["chat"]
    fresh.phases["chat"].base = "models/pretrained/merged"
    assert fresh.descendants("pretrain") == []


def test_a_trace_of_a_phase_looks_at_its_documents_and_at_those_it_goes_on_from(trained: Lineage) -> None:
    own = [content_of(trained.phases[name].sources[-1], 1) for name in ("pretrain", "chat")]
    question, answer = trained.phases["chat"].sources[0].documents.row(1)["messages"]
    assert own[1] == f"{question['content']}\n{answer['content']}"
    for name, seen in (("pretrain", {"pretrain"}), ("chat", {"pretrain", "chat"}), (None, {"pretrain", "chat"})):
        assert {run["phase"] for run in trace(trained, "\n".join(own), name)} == seen
    with pytest.raises(SystemExit, match=r"dvc\.lock has no phase 'x'"):
        trace(trained, own[0], "x")


# --- What is of an older state


def trained_line(of: Lineage) -> dict[str, Any]:
    """Return the first line of tiny_notes.txt that was trained on."""
    answers = (of.why("data/raw/tiny_notes.txt", line)[0] for line in range(1, 21))
    return next(answer for answer in answers if answer["verdict"] == "trained")


def edit(root: Path, old: str, new: str) -> Lineage:
    text = (root / "params.yaml").read_text()
    assert text.count(old) >= 1
    (root / "params.yaml").write_text(text.replace(old, new, 1))
    return Lineage(root)


def test_what_was_left_out_of_blocks_is_no_share_of_a_model(trained: Lineage, monkeypatch: pytest.MonkeyPatch) -> None:
    name = trained.phases["pretrain"].sources[0].name
    before = trained.model("pretrain")["trainings"][0]["sources"][0]["tokens"]
    monkeypatch.setattr("lineage.questions.left_out", lambda blocks: Counter({("train", name): 7, ("eval", name): 5}))
    assert trained.model("pretrain")["trainings"][0]["sources"][0]["tokens"] == before - 7


def test_a_model_of_older_params_says_so_and_so_does_the_one_that_goes_on_from_it(workspace: Path) -> None:
    before = trained_line(Lineage(workspace))
    lineage = edit(workspace, "max_steps: 6", "max_steps: 7")
    found = trained_line(lineage)
    why = "phases.pretrain.train_model in params.yaml has changed since train_model@pretrain ran"
    state = f"of an older state: {why}; run `dvc repro`"
    assert [one.pop("state") for one in found["models"]] == [state, state]
    assert found == before  # what it was shown has not changed
    assert lineage.model("chat")["state"] == state
    # Of the later phase alone; code, too; and what is not there.
    edit(workspace, "max_steps: 7", "max_steps: 6")
    found = trained_line(edit(workspace, "max_steps: 4", "max_steps: 5"))
    assert ["state" in one for one in found["models"]] == [False, True]
    edit(workspace, "max_steps: 5", "max_steps: 4")
    with (workspace / "data/exclusions.txt").open("a") as file:
        file.write("# a line more\n")
    (model, _) = trained_line(Lineage(workspace))["models"]
    assert model["state"].startswith("of an older state: data/exclusions.txt has changed since dedup@pretrain ran")
    shutil.rmtree(workspace / "models/chat/merged")
    assert trained_line(Lineage(workspace))["models"][1]["state"].startswith("not there; run `dvc repro`")


def test_a_model_of_other_blocks_is_not_said_to_have_been_shown_these(workspace: Path) -> None:
    """dvc.lock keeps a training that has not run since the blocks were made anew."""
    edit(workspace, "group_blocks: {block_size: 32", "group_blocks: {block_size: 24")
    repro(workspace, "group_blocks@pretrain")
    lineage = Lineage(workspace)
    answers = [lineage.why("data/raw/tiny_notes.txt", line)[0] for line in range(1, 21)]
    found = [one for one in answers if one.get("split") == "train"]
    said = "data/blocks/pretrain has changed since train_model@pretrain ran"
    for one in found:
        assert one["verdict"].startswith("in the training blocks of now; the model was trained on others, which")
        assert not any(block["steps"] for block in one["blocks"])
        assert [model["model"] for model in one["models"]] == ["models/pretrain/merged", "models/chat/merged"]
        assert all(said in model["state"] and "first_step" not in model for model in one["models"])
    held_out = next(one for one in answers if one.get("split") == "eval")
    assert (held_out["verdict"], held_out["models"]) == ("held out", [])
    assert said in lineage.block("pretrain", 0)["model"]
    with pytest.raises(SystemExit, match=f"{said}, so that they do not belong together; run `dvc repro`"):
        lineage.model("chat")


def test_rows_that_do_not_belong_together_are_not_joined(workspace: Path) -> None:
    """`clean` has run again and `dedup` has not; then `dedup` and not `tokenize_text`."""
    path = workspace / "data/raw/tiny_notes.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    write(path, "\n".join(["A line that comes first.", *lines]) + "\n")
    repro(workspace, "--single-item", "clean@tiny_notes")
    said = "data/clean/pretrain has changed since dedup@pretrain ran, so that they do not belong together"
    with pytest.raises(SystemExit, match=said):
        Lineage(workspace).why("data/raw/tiny_notes.txt", 3)
    repro(workspace, "--single-item", "dedup@pretrain")
    with pytest.raises(SystemExit, match=r"data/tokens/pretrain/tiny_notes has \d+ documents of \d+ that dedup kept"):
        Lineage(workspace).why("data/raw/tiny_notes.txt", 3)


def test_a_training_that_is_not_checked_out_is_none_that_was_never_made(workspace: Path) -> None:
    shutil.rmtree(workspace / "models/pretrain/trained")
    (found, *_) = (
        one
        for n in range(1, 21)
        for one in Lineage(workspace).why("data/raw/tiny_notes.txt", n)
        if one["split"] == "train"
    )
    assert (found["verdict"], found["models"]) == ("in the training blocks, the model is not there", [])


def test_a_phase_without_a_model_says_so(lineage: Lineage) -> None:
    with pytest.raises(SystemExit, match=r"phase docs has no model yet: dvc\.lock has no train_model@docs; run `dvc"):
        lineage.model("docs")


def test_a_source_that_was_never_built_is_told_with_each_answer(workspace: Path) -> None:
    edit(
        workspace,
        "sources:\n",
        "sources:\n  new: {phase: pretrain, path: data/raw/n, clean: {format: text, license: CC0-1.0}}\n",
    )
    said = "nothing is said of what params.yaml names and was never built: new; run `dvc repro`\n"
    for question in (["why", "data/raw/tiny_notes.txt:1"], ["verify"], ["sample"], ["pack", "../x.tar"]):
        done = lineage_command(workspace, *question)
        assert done.stderr == said, done.stderr
    assert lineage_command(workspace, "why", "data/raw/n/a.txt:1").stderr.startswith(said)
    found = trained_line(Lineage(workspace))
    assert "names sources of pretrain that were never cleaned: new" in found["models"][0]["state"]


def test_what_is_not_there_is_one_sentence(workspace: Path) -> None:
    lineage = Lineage(workspace)
    for file, question in (
        ("models/tokenizers/pretrain/tokenizer.json", lambda: lineage.block("pretrain", 0)),
        ("data/blocks/pretrain/grouping.json", lambda: Lineage(workspace).block("pretrain", 0)),
        ("data/tokens/chat/tiny_qa/data-00000.arrow", lambda: Lineage(workspace).block("chat", 0)),
        ("data/sources/chat/tiny_qa/source.json", lambda: Lineage(workspace).model("chat")),
        ("models/pretrain/trained/receipts.bin", lambda: Lineage(workspace).model("pretrain")),
        ("data/exclusions.txt", lambda: exclude(workspace, set())),
    ):
        (workspace / file).unlink()
        with pytest.raises(SystemExit, match=f"{file} is not there; run `dvc repro`, or `dvc checkout`"):
            question()


def test_a_sample_is_the_same_on_another_machine_and_shows_raw_beside_cleaned(
    twins: tuple[Path, Path], lineage: Lineage
) -> None:
    one, other = (ask(root, "sample", "--seed", "3", "-n", "7") for root in twins)
    assert one == other
    assert len({(row["file"], row["line"]) for row in one}) == 7
    assert one != ask(twins[0], "sample", "--seed", "4", "-n", "7")
    everything = lineage.sample(0, 1000)
    assert len(everything) == sum(len(source.ledger) for source in lineage.sources)
    for row in everything:
        assert row["raw"] is not None
        if row["source"] in ("line", "docx"):
            assert row["raw"].rstrip("\n") == row["cleaned"]
        if row["verdict"] == "dropped by clean":
            assert row["cleaned"] is None


# --- Two commits


def test_diff_says_what_came_in_and_went_out(project: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(project, tmp_path / "project", symlinks=True))
    before = git(root, "rev-parse", "HEAD").strip()
    assert not any(one["documents_in"] or one["documents_out"] for one in compare(root, before, None)["sources"])
    path = root / "data/raw/packed.txt"
    lines = path.read_text(encoding="utf-8").split("\n")
    new = "A wholly new line about nothing in particular, of which nobody has heard."
    write(path, "\n".join([*lines[1:-1], lines[2], new]) + "\n")  # the first goes, a copy and a new one come
    repro(root, "tokenize_text@packed")
    found = compare(root, before, None)
    changed = [one for one in found["sources"] if one["documents_in"] or one["documents_out"]]
    assert [(one["source"], one["documents_in"], one["documents_out"]) for one in changed] == [("packed", 1, 1)]
    assert [(one["number"], one["on_the_other_side"]) for one in found["out"]] == [(1, "not among the documents")]
    assert len(found["in"]) == 1
    gone = Lineage(at_revision(root, before)).why("data/raw/packed.txt", 1)
    assert gone[0]["doc_id"] == found["out"][0]["doc_id"]
    with pytest.raises(SystemExit, match=r"Git has no dvc.lock there"):
        compare(root, "nonsense", None)


def test_diff_counts_tokens_sides_and_says_why_a_document_is_not_kept(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two documents that are dropped now, and one that has changed its side."""
    root = Path(shutil.copytree(project, tmp_path / "project", symlinks=True))
    kept = [row for row in arrow.table(root / "data/dedup/packs/packed").to_pylist() if row["split"] != "dropped"]
    gone, moved = [row["doc_id"] for row in kept[1:3]], kept[0]["doc_id"]
    lengths = [len(row["input_ids"]) for row in arrow.table(root / "data/tokens/packs/packed").to_pylist()[1:3]]

    def decide(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if row["doc_id"] in gone:
                row.update(split="dropped", rule="excluded")
            if row["doc_id"] == moved:
                row["split"] = "eval" if row["split"] == "train" else "train"

    rewritten(root / "data/dedup/packs/packed", decide)
    rewritten(root / "data/tokens/packs/packed", lambda rows: rows.__delitem__(slice(1, 3)))
    monkeypatch.setattr("lineage.diff.at_revision", lambda _, revision: {"then": project, "now": root}[revision])
    names = ("documents_in", "tokens_in", "documents_out", "tokens_out", "other_split", "tokens_of_the_others")
    found, back = compare(root, "then", "now"), compare(root, "now", "then", limit=1)
    for answer, counts in ((found, [0, 0, 2, sum(lengths), 1, 0]), (back, [2, sum(lengths), 0, 0, 1, 0])):
        (one,) = (one for one in answer["sources"] if one["documents_in"] or one["documents_out"])
        assert [one["source"], *(one[name] for name in names)] == ["packed", *counts]
    assert [(one["doc_id"], one["tokens"], one["on_the_other_side"]) for one in found["out"]] == [
        (identity.hex(), length, "excluded") for identity, length in zip(gone, lengths, strict=True)
    ]
    assert [(one["doc_id"], one["on_the_other_side"]) for one in back["in"]] == [(gone[0].hex(), "excluded")]


def test_the_data_of_a_revision_are_those_of_its_lock_in_the_cache_that_dvc_uses(tmp_path: Path) -> None:
    """A branch that has moved is other data; `dvc config --local` goes before what Git holds."""
    found: list[Path] = []
    for number in (1, 2):
        write(tmp_path / "dvc.lock", f"schema: '2.0'\nstages: {{}}\n# {number}\n")
        write(tmp_path / "params.yaml", "{}\n")
        if number == 1:
            git(tmp_path, "init", "--quiet")
        git(tmp_path, "add", "--all")
        git(tmp_path, "commit", "--quiet", "--message", "a state")
        found.append(at_revision(tmp_path, "HEAD"))
        assert f"# {number}" in (found[-1] / "dvc.lock").read_text()
    assert at_revision(tmp_path, "HEAD~1") == found[0] != found[1]
    assert cache_folder(tmp_path) == tmp_path / ".dvc/cache/files/md5"
    write(tmp_path / ".dvc/config", "[cache]\n    dir = ../shared\n")
    assert cache_folder(tmp_path) == tmp_path / ".dvc/../shared/files/md5"
    write(tmp_path / ".dvc/config.local", "[cache]\n    dir = /mnt/cache\n")
    assert cache_folder(tmp_path) == Path("/mnt/cache/files/md5")


def test_a_commit_before_there_was_data_sources_is_read(workspace: Path) -> None:
    """Then source.json lay beside the documents."""
    below = "chat/tiny_qa/source.json"
    (workspace / "data/sources" / below).rename(workspace / "data/clean" / below)
    (source,) = Lineage(workspace).phases["chat"].sources
    assert source.about["format"] == "jsonl"


# --- The command line


def test_commands_print_json_and_tables_and_mistakes_are_one_sentence(trained: Lineage) -> None:
    root = trained.root
    (found,) = ask(root, "why", "data/raw/tiny_notes.txt:22")
    assert (found["rule"], found["twin"]["line"]) == ("exact_duplicate", 1)
    assert ask(root, "block", "pretrain", "3")["pieces"]
    assert ask(root, "where", "data/raw/tiny_notes.txt", "--limit", "3")[2]["line"] == 3
    assert ask(root, "steps", found["doc_id"])
    assert ask(root, "model", "chat")["trainings"]
    report = ask(root, "verify", "--blocks", "5")
    assert {one["status"] for one in report} == {"ok", "stops"}
    (made,) = (one["detail"] for one in report if one["path"] == "data/blocks/chat/eval" and "stages" in one["detail"])
    blocks = trained.phases["chat"].layout("eval").blocks
    assert made.startswith(f"{min(5, blocks)} of {blocks} block{'s' * (blocks > 1)}, by")
    assert [_counted(number, "block") for number in (0, 1, 1000)] == ["0 blocks", "1 block", "1,000 blocks"]
    assert (
        ask(root, "why", "x", status=1)
        == "'x': write FILE:LINE, e.g. data/raw/laws/a.md:12 (or row, page, paragraph).\n"
    )
    assert re.fullmatch(
        r"phase pretrain, split train: there is no block 999; .*\n", ask(root, "block", "pretrain", "999", status=1)
    )
    assert "dvc.lock has no phase 'x'; it has chat, pretrain." in ask(root, "model", "x", status=1)
    shown = lineage_command(root, "block", "pretrain", "0").stdout
    assert "data/raw/tiny_notes.txt" in shown
    assert "\x1b" not in shown


def test_a_name_is_found_however_its_accents_are_written() -> None:
    """macOS writes an e and an accent where most keyboards give one character."""
    one, two = "data/raw/r\u00e9sum\u00e9.txt", "data/raw/re\u0301sume\u0301.txt"
    lineage: Any = SimpleNamespace(sources=[SimpleNamespace(raw="data/raw")])
    for name in (one, two):
        found = [called for _, called in Lineage._files(lineage, name)]
        assert found[0] == name
        assert {one[9:], two[9:]} <= set(found)


def test_a_long_table_is_cut_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Also the tables below its rows: those of rows that are not shown are not, either."""
    row = {"steps": [{"step": 1}]}
    for rows, lines, last in ((tables.ROWS, 1, ""), (tables.ROWS + 1234, 2, "… and 1,234 more; --json prints all\n")):
        tables.show({"blocks": [{"block": f"b{number}", **row} for number in range(rows)]})
        printed = capsys.readouterr().out
        assert printed.count("steps of b") == tables.ROWS
        assert (last in printed) and printed.count("more; --json") == lines - 1
    tables.show({"blocks": [{"block": number} for number in range(tables.ROWS + 9)]}, tables.ROWS + 5)
    assert "… and 4 more; --json" in capsys.readouterr().out  # of as many as were asked for


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sample", "-n", "-3"], "'-n'.*greater than or equal to 1"),
        (["sample", "-n", "0"], "'-n'.*greater than or equal to 1"),
        (["where", "river", "--limit", "0"], "'--limit'.*greater than or equal to 1"),
        (["diff", "HEAD", "--limit", "-1"], "'--limit'.*greater than or equal to 1"),
        (["block", "pretrain", "-1"], "'number'.*greater than or equal to 0"),
        (["block", "pretrain", "0", "--split", "test"], "'test' is not one of 'train', 'eval'"),
        (["verify", "--blocks", "-1"], "'--blocks'.*greater than or equal to 0"),
        (["trace", "--prompt", "x", "--phase", "chat", "--max-new-tokens", "0"], "greater than or equal to 1"),
        (["erase", "prove", "0" * 32, "--text", "no.txt"], "file 'no.txt' does not exist"),
        (["erase", "prove", "0" * 32, "--text", "models/chat/merged/model.safetensors"], "is not UTF-8; save the text"),
        (["pack", ""], r"\. can be no file; name one in a folder that is there"),
        (["pack", "no/such/x.tar"], "no/such/x.tar can be no file; name one in a folder that is there"),
        (["diff", " "], "no commit is named; give one that Git knows"),
        (["where", ""], "nothing to look for; give an id"),
        (["why", "data/raw/no.txt:1"], "data/raw/no.txt is no raw file of a source; name a file of data/raw/tiny_"),
    ],
)
def test_a_wrong_word_is_one_line_and_no_traceback(trained: Lineage, words: list[str], said: str) -> None:
    done = lineage_command(trained.root, *words)
    assert done.returncode in (1, 2) and not done.stdout
    assert re.search(said, done.stderr.splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr


# --- verify, on formats and layouts that the tiny project has not


def test_verify_rebuilds_formats_and_layouts_of_every_kind_and_says_where_it_stops(project: Path) -> None:
    report = verify.verify(project)
    assert not [finding for finding in report.findings if finding.status == "FAILED"]
    rebuilt = {
        f.path.split("/")[3]: f.detail for f in report.findings if (f.status, f.check) == ("ok", "raw -> documents")
    }
    assert rebuilt.keys() == {*varied.FORMATS, *varied.CHATS} - {"html", "docx"}
    assert rebuilt["text"] == "12 texts rebuilt from raw bytes"
    cut = arrow.table(project / "data/blocks/talk/left_out").to_pylist()
    assert [(row["source"], row["rule"], row["tokens"] == row["left_out"]) for row in cut] == [
        ("messages", "no_answer", True)
    ], "what stands in each block is told though a conversation of its split stands in none"
    stops = {f.path.split("/")[3] for f in report.findings if (f.status, f.check) == ("stops", "raw -> documents")}
    assert stops == {"html", "docx", "packed"}
    assert {"data/blocks/docs/train", "data/blocks/packs/train", "data/blocks/talk/eval"} <= {
        f.path for f in report.findings if (f.status, f.check) == ("ok", "tokens -> blocks")
    }
