"""`lineage erase`: a canary with an exact and a near twin is located, excluded and gone, and no twin is promoted."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from lineage import trace
from lineage.erase import apply, cluster, exclude, plan, prove
from lineage.questions import Lineage
from lineage.verify import Stage

import clean
import dedup
import exclusions
import varied
from conftest import repro, write
from kit import arrow
from test_lineage_trace import project, written


@pytest.mark.slow
def test_a_canary_with_an_exact_and_a_near_twin_is_gone_and_no_twin_promoted(
    varied_project: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(varied_project, tmp_path / "project", symlinks=True))
    raw = root / "data/raw/packed.txt"
    lines = raw.read_text(encoding="utf-8").splitlines()
    raw.write_text("\n".join([*lines, varied.canary("packed")]) + "\n", encoding="utf-8")  # an exact copy of line 6
    repro(root, "group_blocks@packs")
    before = Lineage(root)
    identity = before.why("data/raw/packed.txt", 6)[0]["doc_id"]

    # From any of the three, whole or by the first half of its id, the same three are found.
    found = plan(before, identity)
    assert [(one["line"], one["verdict"]) for one in found["documents"]] == [
        (6, "in the training blocks, no model yet"),
        (45, "dropped by dedup"),
        (49, "dropped by dedup"),
    ]
    near = found["documents"][1]["doc_id"]
    assert plan(before, near)["documents"] == plan(before, identity[:16])["documents"] == found["documents"]
    assert found["documents"][0]["blocks"]
    assert "data/marked/packs/packed/data-00000.arrow" in found["shards"]
    assert {"dedup@packs", "tokenize_text@packed", "group_blocks@packs"} <= set(found["redo"])
    assert not any(name.endswith(("@docs", "@talk", "@csv")) for name in found["redo"])
    assert found["seconds_last_time"] > 0
    assert not prove(before, identity)["absent"]

    added = apply(before, identity)
    records = {before.why("data/raw/packed.txt", line)[0]["raw_id"] for line in (6, 45, 49)}
    assert set(added["added"]) == {identity, near} | records
    assert apply(before, near)["added"] == []
    text = (root / "data/exclusions.txt").read_text(encoding="utf-8")
    assert text.startswith((varied_project / "data/exclusions.txt").read_text(encoding="utf-8"))
    assert "Canary" not in text  # keyed hashes, never text, nor what could be made of a guessed one
    assert identity not in text
    proof = prove(before, identity)  # excluded, but not rebuilt
    assert not proof["absent"]
    assert proof["longest_run"] >= 30

    repro(root, *(f"group_blocks@{phase}" for phase in before.phases))
    after = Lineage(root)
    assert {after.why("data/raw/packed.txt", line)[0]["rule"] for line in (6, 45, 49)} == {"excluded"}
    for one in (identity, near):
        proof = prove(after, one)
        assert proof["absent"] and proof["own_absent"] and proof["shared_units"] == 0
        assert proof["containment"] == 0
        assert "not reached" in proof["limits"]
    assert not any(
        varied.canary("packed")[:40] in str(piece["text"])
        for split in ("train", "eval")
        for block in range(after.phases["packs"].layout(split).blocks)
        for piece in after.block("packs", block, split)["pieces"]
    )
    assert after.why("data/raw/packed.txt", 5)[0]["verdict"] in ("in the training blocks, no model yet", "held out")


def test_the_plan_names_first_step_and_the_models_of_later_phases(finished: Path) -> None:
    lineage = Lineage(finished)
    source = lineage.phases["pretrain"].sources[1]
    rows = [lineage.record(source, row) for row in range(len(source.ledger))]
    trained = max((row for row in rows if row["verdict"] == "trained"), key=lambda row: len(row["blocks"]))
    assert len({tuple(block["steps"]) for block in trained["blocks"]}) > 1
    found = plan(lineage, trained["doc_id"])
    assert [one["model"] for one in found["models"]] == ["models/pretrain/merged", "models/chat/merged"]
    assert found["documents"][0]["first_step"] == min(s for block in trained["blocks"] for s in block["steps"])
    assert found["documents"][0]["blocks"] == sorted({block["block"] for block in trained["blocks"]})
    records = [arrow.read_json(finished / f"metrics/runs/{name}.json") for name in found["redo"]]
    assert found["seconds_last_time"] == pytest.approx(sum(record["seconds"] for record in records), abs=0.1)
    assert {"train_model@pretrain", "train_model@chat", "clean@tiny_text"} & set(found["redo"]) == {
        "train_model@pretrain",
        "train_model@chat",
    }


def test_exports_are_redone_and_one_that_was_not_keeps_a_document_from_being_gone(finished: Path) -> None:
    lineage = Lineage(finished)
    for name, phase in (("old", "chat"), ("other", "elsewhere")):
        model = {f"models/{phase}/merged": {"md5": "0.dir"}}
        lineage.stages[f"export_model@{name}"] = Stage("export_model", name, "", model, {}, {})
    identity = lineage.why("data/raw/tiny_notes.txt", 3)[0]["doc_id"]
    assert [name for name in plan(lineage, identity)["redo"] if name.startswith("export")] == ["export_model@old"]
    said = prove(lineage, identity)["models"]
    assert said.startswith("not rebuilt: models/exports/old: models/chat/merged has changed since export_model@old ran")


def test_an_export_that_nothing_renews_keeps_a_document_from_being_gone(workspace: Path) -> None:
    (workspace / "models/exports/given").mkdir(parents=True)
    lineage = Lineage(workspace)
    proof = prove(lineage, lineage.why("data/raw/tiny_notes.txt", 3)[0]["doc_id"])
    assert "models/exports/given: params.yaml does not name it" in proof["models"]


def test_a_copy_of_a_near_twin_that_names_no_twin_itself_is_found_by_its_id(tmp_path: Path) -> None:
    """As copies in another phase are."""
    lineage = project(
        tmp_path, ["one text", "near text", "near text", "other"], ["train", "dropped", "dropped", "train"]
    )
    rows = arrow.table(tmp_path / "data/dedup/p/s").to_pylist()
    rows[1]["twin"] = "s/0"
    with arrow.Writer(tmp_path / "data/dedup/p/s", dedup.DECISIONS) as out:
        out.write(pa.Table.from_pylist(rows, dedup.DECISIONS))
    for row in rows[:3]:
        assert [number for _, number in cluster(lineage, row["doc_id"].hex())] == [0, 1, 2]


def test_near_twins_that_were_both_kept_are_found(tmp_path: Path) -> None:
    """A chain whose ends are less alike than the threshold: dedup takes all of it out with any of it."""
    lineage = project(tmp_path, ["alone", "one text", "near text", "far text"], ["train", "train", "dropped", "train"])
    rows = arrow.table(tmp_path / "data/dedup/p/s").to_pylist()
    for row in rows[1:]:
        row["cluster"] = "s/1"
    rows[2]["twin"] = "s/1"
    with arrow.Writer(tmp_path / "data/dedup/p/s", dedup.DECISIONS, batch_rows=2) as out:
        out.write(pa.Table.from_pylist(rows, dedup.DECISIONS))
    for row in rows[1:]:
        assert [number for _, number in cluster(lineage, row["doc_id"].hex())] == [1, 2, 3]
    assert [number for _, number in cluster(lineage, rows[0]["doc_id"].hex())] == [0]


def test_a_proof_of_a_text_that_is_in_no_record_needs_the_text(varied_project: Path) -> None:
    with pytest.raises(SystemExit, match="give its text"):
        prove(Lineage(varied_project), "0" * 32)
    with pytest.raises(SystemExit, match="give all 32 digits"):
        prove(Lineage(varied_project), "0" * 16, "Its text.")
    kept = varied.canary("line")
    proof = prove(Lineage(varied_project), "0" * 32, f"Something else. {kept} And an end.")
    assert not proof["absent"]
    assert proof["runs"][0]["file"] == "data/raw/line.txt"
    assert proof["containment"] > 0.5


def excluded(root: Path, documents: list[str], gone: int = 1) -> tuple[Lineage, str]:
    """Return a project whose first documents are dropped, the very first of them excluded, and the id of that one."""
    lineage = project(root, documents, ["dropped"] * gone + ["train"] * (len(documents) - gone))
    write(root / "data/exclusions.txt", "# none\n")
    exclude(root, {clean.doc_id(documents[0])})
    return lineage, clean.doc_id(documents[0]).hex()


def test_what_only_the_document_had_and_what_others_say_too_are_two_verdicts(tmp_path: Path) -> None:
    """As statutes share their formulas: whoever is erased, they stay."""
    draw = random.Random(6)
    own, formula = written(draw, 50), written(draw, 40)
    others = [f"{written(draw, 30)} {formula} {written(draw, 9)}" for _ in range(2)]
    proof = prove(*excluded(tmp_path / "formula", [f"{own} {formula}", *others]))
    assert (proof["absent"], proof["own_absent"]) == (False, True)
    assert (proof["own_units"], proof["shared_units"]) == (50, 40)
    assert [(run["units"], run["documents"]) for run in proof["runs"]] == [(40, 2)]
    # Nothing of it is its own where another one holds the whole of it.
    proof = prove(*excluded(tmp_path / "whole", [f"{own} {formula}", *others, f"Again: {own} {formula} {own[:90]}"]))
    assert (proof["own_absent"], proof["own_units"], proof["containment"]) == (False, 0, 1.0)
    proof = prove(*excluded(tmp_path / "none", [own, *others]))
    assert (proof["absent"], proof["own_absent"], proof["shared_units"]) == (True, True, 0)
    assert proof["most_like"] is None
    # It is kept, or it is not excluded.
    lineage, identity = excluded(tmp_path / "kept", [own, *others], gone=0)
    assert (prove(lineage, identity)["own_absent"], prove(lineage, identity)["shared_units"]) == (False, 0)
    lineage = project(tmp_path / "unlisted", [own, *others], ["dropped", "train", "train"])
    write(tmp_path / "unlisted/data/exclusions.txt", "# none\n")
    assert not prove(lineage, "0" * 32, own)["own_absent"]


def test_a_document_that_is_not_kept_costs_nothing_and_one_that_no_step_showed_has_no_first_step(
    varied_project: Path,
) -> None:
    lineage = Lineage(varied_project)
    dropped, kept = (lineage.why("data/raw/packed.txt", line)[0]["doc_id"] for line in (46, 5))
    assert (plan(lineage, dropped)["redo"], plan(lineage, dropped)["models"]) == ([], [])
    assert "group_blocks@packs" in plan(lineage, kept)["redo"]
    assert plan(lineage, kept)["documents"][0]["first_step"] is None


def test_a_proof_compares_all_that_may_hold_a_part_and_trace_says_when_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one that holds what seemed its own comes last of those that share a long formula."""
    monkeypatch.setattr(trace, "CANDIDATES", 5)
    draw = random.Random(8)
    own, formula = written(draw, 40), written(draw, 120)
    others = [f"{written(draw, 30)} {formula}" for _ in range(8)]
    lineage, identity = excluded(tmp_path, [f"{own} {formula}", *others, f"Taken: {own}"])
    assert (prove(lineage, identity)["own_absent"], prove(lineage, identity)["own_units"]) == (False, 0)
    assert not capsys.readouterr().err
    assert {run["units"] for run in trace.trace(lineage, f"{own} {formula}")} == {160, 120}
    assert "10 documents may share a run with it; the 5 that share most were compared" in capsys.readouterr().err


def test_a_kept_run_is_found_behind_many_that_were_dropped(tmp_path: Path) -> None:
    draw = random.Random(7)
    parts = [written(draw, 40) for _ in range(30)]
    held = " ".join(parts[3].split()[5:25])
    documents = [" ".join(parts), *(f"{part} {written(draw, 5)}" for part in parts), f"{written(draw, 9)} {held} end"]
    proof = prove(*excluded(tmp_path, documents, gone=31))
    assert (proof["absent"], proof["own_absent"], proof["longest_run"]) == (False, True, 20)


LOST = f"key {'ab' * 8}"


@pytest.mark.parametrize("before", ["", "# why", "# why\n", f"{LOST}\n", f"\ufeff# why\r\n {LOST.title()}  # lost"])
def test_what_is_excluded_is_read_again_whatever_stood_in_the_file(tmp_path: Path, before: str) -> None:
    """A last line without an end, or the name of a key of which no entry is left; the key that is there is kept."""
    write(tmp_path / "data/exclusions.txt", before)
    exclude(tmp_path, {b"one"})
    key = (tmp_path / "data/exclusions.key").read_text()
    assert (tmp_path / "data/exclusions.key").stat().st_mode & 0o777 == 0o600
    path = tmp_path / "data/exclusions.txt"
    path.write_text(path.read_text(encoding="utf-8").rstrip(), encoding="utf-8")
    answer = exclude(tmp_path, {b"one", b"two"})
    assert (answer["added"], answer["were_there"]) == ([b"two".hex()], [b"one".hex()])
    found = exclusions.read(path)
    assert (len(found), b"one" in found, b"two" in found) == (2, True, True)
    assert path.read_text(encoding="utf-8").count("why") == before.count("why")
    write(path, "")  # all entries taken back
    exclude(tmp_path, {b"two"})
    assert (len(exclusions.read(path)), (tmp_path / "data/exclusions.key").read_text()) == (1, key)


def test_who_is_excluded_by_the_record_alone_is_excluded(workspace: Path) -> None:
    """Other rules of `clean` give its text another doc_id."""
    lineage = Lineage(workspace)
    row = lineage.why("data/raw/tiny_notes.txt", 3)[0]
    assert prove(lineage, row["doc_id"])["excluded"].startswith("it does not stand in")
    exclude(workspace, {bytes.fromhex(row["raw_id"])})
    assert prove(lineage, row["doc_id"])["excluded"].startswith("it stands in")


def test_tokens_and_blocks_that_were_not_made_anew_keep_a_document_from_being_gone(
    varied_project: Path, tmp_path: Path
) -> None:
    """No phase of it has a model; `dedup` alone has run again."""
    root = Path(shutil.copytree(varied_project, tmp_path / "project", symlinks=True))
    identity = Lineage(root).why("data/raw/packed.txt", 5)[0]["doc_id"]
    apply(Lineage(root), identity)
    repro(root, "dedup@packs")
    proof = prove(Lineage(root), identity)
    assert (proof["absent"], proof["own_absent"], proof["longest_run"]) == (False, False, 0)
    assert "data/tokens/packs/packed: data/dedup/packs has" in proof["models"]


def test_a_model_that_was_not_trained_again_keeps_a_document_from_being_gone(workspace: Path) -> None:
    lineage = Lineage(workspace)
    row = lineage.why("data/raw/tiny_notes.txt", 3)[0]
    identity = row["doc_id"]
    assert set(apply(lineage, identity)["added"]) == {identity, row["raw_id"]} and row["raw_id"] != identity
    repro(workspace, "group_blocks@pretrain")
    proof = prove(Lineage(workspace), identity)
    assert proof["exact"] == "no kept document has this id"
    assert (proof["absent"], proof["own_absent"]) == (False, False)
    assert proof["models"].startswith("not rebuilt: chat: of an older state: ")
    # What was trained is as old where nothing is merged.
    for phase in ("pretrain", "chat"):
        shutil.rmtree(workspace / "models" / phase / "merged")
    said = prove(Lineage(workspace), identity)["models"]
    assert "models/pretrain/trained: data/blocks/pretrain has changed since" in said and "models/chat/trained: " in said
    tokenised = ("models/tokenizers/chat", *(f"data/{kind}/chat" for kind in ("marked", "tokens", "blocks")))
    for folder in ("models/pretrain", "models/chat", *tokenised):
        shutil.rmtree(workspace / folder)
    proof = prove(Lineage(workspace), identity)
    assert (proof["models"], proof["own_absent"]) == ("none is of an older state", True)
