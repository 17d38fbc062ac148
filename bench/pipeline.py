"""Measure what a user of the default pipeline waits for, against the budgets; exit 1 when one is missed.

    start of a data stage to first work    0.35 s   (median of 5, each data stage)
    the default from an empty folder       360 s    (one run, 2 CPU cores)
    `dvc repro` when nothing is to do      2 s      (median of 3)

Seconds on a shared machine drift; read them beside the machine's load.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Runs a stage script up to the point where it would begin to work.
TO_FIRST_WORK = """
import runpy, sys
sys.path.insert(0, "stages")
from kit import stage
def first_work(*args, **named):
    raise SystemExit(42)
stage.run = first_work
runpy.run_path(sys.argv[0], run_name="__main__")
"""
DATA_STAGES = {
    "import_python_docs": "python",
    "clean": "python_reference",
    "dedup": "pretrain",
    "train_tokenizer": "pretrain",
    "add_bos_eos": "python_reference",
    "tokenize_text": "python_reference",
    "group_blocks": "pretrain",
}


def seconds(command: list[str], folder: Path, expected: int = 0) -> float:
    """Return the wall seconds of a command; raise SystemExit with its output when it fails."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    taken = time.perf_counter() - started
    if done.returncode != expected:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return taken


def start_seconds(stage: str, item: str) -> float:
    """Return the median seconds from the start of the interpreter to a stage's first work."""
    program = TO_FIRST_WORK.replace("sys.argv[0]", repr(f"stages/{stage}.py"))
    command = [sys.executable, "-c", f"import sys; sys.argv = ['stages/{stage}.py', '{item}']\n{program}"]
    return statistics.median(seconds(command, ROOT, expected=42) for _ in range(5))


def main() -> None:
    missed = []

    def report(what: str, value: float, budget: float) -> None:
        missed.extend([what] if value > budget else [])
        print(
            f"{what:45} {value:7.2f} s   budget {budget:6.2f} s   {'MISSED' if value > budget else 'kept'}", flush=True
        )

    for stage, item in DATA_STAGES.items():
        report(f"start of {stage}", start_seconds(stage, item), 0.35)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # What a user gets: the committed files, and an empty cache.
        seconds(["git", "clone", "--quiet", str(ROOT), "."], folder)
        report("the default, from nothing", seconds(["dvc", "repro"], folder), 360)
        report(
            "`dvc repro` with nothing to do", statistics.median(seconds(["dvc", "repro"], folder) for _ in range(3)), 2
        )
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
