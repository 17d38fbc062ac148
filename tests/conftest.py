"""Shared by all tests: stages/ is importable, and a workspace is a copy of the project in a temporary folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "stages"))
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
# `python` of a stage's command is the python that runs the tests.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

Runner = Callable[..., subprocess.CompletedProcess[str]]


def copy_project(target: Path) -> Path:
    """Copy what Git would clone into `target`: code, dvc.yaml, configs; no data, no cache, no environment."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("stages", "models/configs"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    (target / ".dvc").mkdir()
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "dvc.yaml", "params.yaml"):
        shutil.copyfile(ROOT / name, target / name)
    return target


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project without data."""
    return copy_project(tmp_path / "project")


@pytest.fixture
def run_stage() -> Runner:
    """Run `python stages/NAME.py ARGUMENTS` in a folder and return the finished process."""

    def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, f"stages/{arguments[0]}.py", *arguments[1:]]
        return subprocess.run(
            command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )

    return run
