"""import_base: a model at one commit, or one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

import tiny
from conftest import Runner
from import_base import Params

COMMIT = "4f42c91d806a19ae1a46af6c3fb5f4990d884cd6"


@pytest.mark.parametrize("revision", ["main", "v1.0", COMMIT[:12]])
def test_only_a_full_commit_will_do(revision: str) -> None:
    """A branch or tag would be another model tomorrow, under the same name."""
    with pytest.raises(ValidationError, match="revision"):
        Params(repo_id="owner/name", revision=revision)


def test_without_a_connection_one_sentence_and_the_old_base_stays(project: Path, run_stage: Runner) -> None:
    tiny.base(project / "models/configs/tiny")
    tiny.params_yaml(project, pretrain={"base": "models/configs/tiny"})
    content = json.loads((project / "params.yaml").read_text())
    content["bases"] = {"small": {"repo_id": "owner/name", "revision": COMMIT}}
    (project / "params.yaml").write_text(json.dumps(content))
    old = project / "models/base/small"
    old.mkdir(parents=True)
    (old / "keep").write_text("old")
    # A closed port of this machine stands for a Hub out of reach.
    done = run_stage(
        project, "import_base", "small", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_CACHE=str(project / "hub")
    )
    assert done.returncode == 1
    assert "import_base@small: owner/name at 4f42c91d806a could not be fetched" in done.stderr
    assert "Traceback" not in done.stderr
    assert (old / "keep").read_text() == "old"
