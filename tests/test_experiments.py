"""A search over settings with DVC's experiments: queued, run, and listed with their metrics."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from dvc.repo import Repo

from conftest import dvc, git

RATE = "phases.chat.train_model.learning_rate"
LOSS = "metrics/chat/evaluation.json:merged.loss"
RAW = ("data/raw/tiny_text", "data/raw/tiny_notes.txt", "data/raw/tiny_qa")


def test_dvc_sees_the_pointers_to_raw_text(project: Path) -> None:
    """`dvc add data/raw/...` leaves a pointer that Git keeps and DVC finds again: push, pull and experiments need it.

    DVC looks into no folder that a line of .gitignore could mean, and `/data/*` could mean `data/`.
    """
    git(project, "init", "--quiet")
    (project / "data/raw/laws").mkdir(parents=True)
    (project / "data/raw/laws/1.txt").write_text("law")
    assert dvc(project, "add", "data/raw/laws").returncode == 0
    git(project, "add", "--all")
    assert "data/raw/laws.dvc" in git(project, "ls-files").splitlines()
    assert "data/raw/laws/1.txt" not in git(project, "ls-files").splitlines()
    with Repo(str(project)) as repo:
        assert "laws.dvc" in {Path(one.addressing).name for one in repo.index.stages}


@pytest.mark.slow
def test_two_queued_experiments_are_run_and_listed(workspace: Path) -> None:
    """Each runs what depends on its setting and nothing else, apart from the workspace, and shows its own loss."""
    assert dvc(workspace, "add", *RAW).returncode == 0
    git(workspace, "add", "--all")
    git(workspace, "commit", "--quiet", "--message", "pointers to the raw text")
    params = (workspace / "params.yaml").read_bytes()
    for rate in ("0.02", "0.04"):
        queued = dvc(workspace, "exp", "run", "--queue", "--name", f"rate-{rate[2:]}", "-S", f"{RATE}={rate}")
        assert queued.returncode == 0, queued.stdout
    done = dvc(workspace, "exp", "run", "--run-all", GIT_COMMITTER_NAME="test", GIT_COMMITTER_EMAIL="test@localhost")
    assert done.returncode == 0, done.stdout
    assert (workspace / "params.yaml").read_bytes() == params
    shown = dvc(workspace, "exp", "show", "--csv", "--only-changed", "--sort-by", LOSS)
    rows = {row["Experiment"] or row["typ"]: row for row in csv.DictReader(io.StringIO(shown.stdout))}
    found = {name: (rows[name][RATE], rows[name]["State"]) for name in ("rate-02", "rate-04")}
    assert found == {"rate-02": ("0.02", "Success"), "rate-04": ("0.04", "Success")}, shown.stdout
    losses = [float(rows[name][LOSS]) for name in ("baseline", "rate-02", "rate-04")]
    assert len(set(losses)) == 3, "three settings, three losses"
    assert "metrics/pretrain/evaluation.json:merged.loss" not in rows["rate-02"], "the other phase did not run"
    applied = dvc(workspace, "exp", "apply", "rate-02")
    assert applied.returncode == 0, applied.stdout
    assert "0.02" in (workspace / "params.yaml").read_text(encoding="utf-8")
    assert "up to date" in dvc(workspace, "status").stdout
