"""bench/gpu_check.py: one sentence without CUDA, and at toy sizes a row for every side of every case."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from conftest import ROOT


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "bench/gpu_check.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_refuses_in_one_sentence() -> None:
    done = gpu_check()
    assert done.returncode == 1 and done.stderr.startswith("no CUDA device: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_smoke_test_has_a_row_for_each_side() -> None:
    done = gpu_check("--smoke")
    assert done.returncode == 0, done.stderr
    rows = [
        line.split(" | ")[:2]
        for line in done.stdout.splitlines()
        if (line.startswith("| ") and "bf16" in line) or "paged" in line
    ]
    assert [side for _, side in rows] == ["ours", "stock", "ours", "stock", *["ours", "stock", "raw"] * 2]
