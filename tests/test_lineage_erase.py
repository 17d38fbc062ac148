"""`lineage erase`: a canary with an exact and a near twin is located, excluded and gone, and no twin is promoted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from lineage.erase import apply, cluster, plan, prove
from lineage.questions import Lineage

import dedup
import varied
from conftest import repro
from kit import arrow
from test_lineage_trace import project


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

    repro(root, "group_blocks@packs")
    after = Lineage(root)
    assert {after.why("data/raw/packed.txt", line)[0]["rule"] for line in (6, 45, 49)} == {"excluded"}
    for one in (identity, near):
        proof = prove(after, one)
        assert proof["absent"]
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
    trained = next(row for row in rows if row["verdict"] == "trained")
    found = plan(lineage, trained["doc_id"])
    assert [one["model"] for one in found["models"]] == ["models/pretrain/merged", "models/chat/merged"]
    assert found["documents"][0]["first_step"] == min(s for block in trained["blocks"] for s in block["steps"])
    assert {"train_model@pretrain", "train_model@chat", "clean@tiny_text"} & set(found["redo"]) == {
        "train_model@pretrain",
        "train_model@chat",
    }


def test_a_copy_of_a_near_twin_that_names_no_twin_itself_is_found_by_its_id(tmp_path: Path) -> None:
    """As copies in another phase are."""
    lineage = project(
        tmp_path, ["one text", "near text", "near text", "other"], ["train", "dropped", "dropped", "train"]
    )
    rows = arrow.table(tmp_path / "data/dedup/p/s").to_pylist()
    rows[1]["twin"] = "s/0"
    with arrow.Writer(tmp_path / "data/dedup/p/s", dedup.DECISIONS) as out:
        out.write(pa.Table.from_pylist(rows, dedup.DECISIONS))
    assert [row for _, row in cluster(lineage, rows[0]["doc_id"].hex())] == [0, 1, 2]


def test_a_proof_of_a_text_that_is_in_no_record_needs_the_text(varied_project: Path) -> None:
    with pytest.raises(SystemExit, match="give its text"):
        prove(Lineage(varied_project), "0" * 32)
    kept = varied.canary("line")
    proof = prove(Lineage(varied_project), "0" * 32, f"Something else. {kept} And an end.")
    assert not proof["absent"]
    assert proof["runs"][0]["file"] == "data/raw/line.txt"
    assert proof["containment"] > 0.5
