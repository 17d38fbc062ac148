"""start: a data stage begins without threads for matrices and without collecting garbage, and works with it.

Of Arrow's memory it keeps none that is free.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from conftest import ROOT

DATA_STAGES = ["clean", "dedup", "add_bos_eos", "tokenize_text", "group_blocks"]


def run(program: str, **environment: str) -> str:
    """Return what a Python program prints in the root of the repository."""
    # What pytest itself has set for its tests is not what a user's shell holds.
    ours = ("OPENBLAS_NUM_THREADS", "ARROW_DEFAULT_MEMORY_POOL")
    env = {name: value for name, value in os.environ.items() if name not in ours} | environment
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout.splitlines()[-1]


HELP = """
import contextlib, gc, os, runpy, sys
sys.path.insert(0, "stages")
from kit import start
real, late = start.lean, []
def lean():
    late.append("numpy" in sys.modules or "pyarrow" in sys.modules)
    real()
start.lean = lean
sys.argv = ["stages/NAME.py", "--help"]
with contextlib.suppress(SystemExit):
    runpy.run_path("stages/NAME.py", run_name="__main__")
import pyarrow as pa
print(late, os.environ.get("OPENBLAS_NUM_THREADS"), gc.isenabled(), pa.default_memory_pool().backend_name == "system")
"""


@pytest.mark.parametrize("name", DATA_STAGES)
def test_a_data_stage_imports_numpy_without_threads_and_without_garbage_collection(name: str) -> None:
    """And before numpy is there: later the threads would run already. Arrow's memory is the system's."""
    assert run(HELP.replace("NAME", name)) == "[False] 1 False True"


@pytest.mark.parametrize("name", ["train_model", "evaluate_model", "check_params"])
def test_a_stage_that_needs_the_threads_keeps_them(name: str) -> None:
    """Also where it imports a data stage, as check_params does."""
    assert run(HELP.replace("NAME", name)) == "[] None True False"


def test_importing_a_data_stage_changes_nothing() -> None:
    program = 'import gc, os, sys; sys.path.insert(0, "stages"); import clean, dedup\n'
    assert run(program + 'print(gc.isenabled(), os.environ.get("OPENBLAS_NUM_THREADS"))') == "True None"


def test_the_threads_that_a_user_asks_for_are_given() -> None:
    program = 'import os, sys; sys.path.insert(0, "stages"); from kit.start import lean; lean()\n'
    assert run(program + 'print(os.environ["OPENBLAS_NUM_THREADS"])', OPENBLAS_NUM_THREADS="2") == "2"


def test_the_work_itself_has_a_collector() -> None:
    """Which need not go through what the imports have brought."""
    program = """
import gc, sys, types
sys.path.insert(0, "stages")
from kit.start import lean
lean()
from kit import stage
sys.modules["check_params"] = types.SimpleNamespace(check=lambda: None)
sys.argv = ["stages/clean.py", "name"]
stage.cli(lambda name: print(gc.isenabled(), gc.get_freeze_count() > 10_000), None)
"""
    assert run(program) == "True True"
