"""bench/: each benchmark that can be quick still runs to its end on what the stages write today.

Whether a budget is kept is for `make bench` on a quiet machine to say, not for a test.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from conftest import ROOT

SMALL = {
    "clean_to_blocks --quick": "bytes of a token",
    "look_ups 20000": "fingerprints   Chinese",
    "near_duplicates 1": "Chinese .* times rensa",
    "train_tokenizer 0.3 0.1": "chinese .* CPU ratio",
}


@pytest.mark.slow
@pytest.mark.parametrize("command", SMALL)
def test_a_benchmark_runs_to_its_end(command: str) -> None:
    name, *arguments = command.split()
    run = [sys.executable, f"bench/{name}.py", *arguments]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    assert re.search(SMALL[command], done.stdout), done.stdout + done.stderr
