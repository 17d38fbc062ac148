"""bench/gpu_check.py: one sentence without CUDA, and at toy sizes a row for every side of every case."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from conftest import ROOT

sys.path.append(str(ROOT / "bench"))  # last: some files there are called like stages
import gpu_check


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "bench/gpu_check.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_refuses_in_one_sentence() -> None:
    done = run()
    assert done.returncode == 2 and done.stderr.startswith("no CUDA device: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_smoke_test_has_a_row_for_each_side() -> None:
    done = run("--smoke")
    assert done.returncode == 0, done.stderr
    rows = [[word.strip() for word in line.split("|")[1:4]] for line in done.stdout.splitlines() if "| " in line][1:]
    sides = ["ours", "stock", "ours", "stock", *["ours", "stock", "raw"] * 2]
    assert [side for _, side, _ in rows] == sides and all(int(speed.replace(",", "")) > 0 for _, _, speed in rows)


def test_a_budget_that_is_missed_is_named() -> None:
    """1.5 times stock, 0.95 of the raw loop, half of the GEMM's speed."""
    sides = {side: {"speed": speed, "flops": 2.0} for side, speed in (("ours", 150), ("stock", 100), ("raw", 150))}
    assert gpu_check.missed("x", sides, peak=600) == []
    assert gpu_check.missed("x", sides, peak=601) == ["x: mfu 0.50 < 0.5"]
    sides["stock"]["speed"], sides["raw"]["speed"] = 101, 160
    assert gpu_check.missed("x", sides, peak=600) == ["x: stock 1.49 < 1.5", "x: raw 0.94 < 0.95"]


def test_the_operations_of_a_token() -> None:
    """GPT-2 small's size: 6 for each of 123.5 million multiplied weights, and attention over 1,024 tokens."""
    shape = gpu_check.config(768, 12, 12, 50304)
    weights = 12 * (4 * 768**2 + 3 * 768 * 2048) + 768 * 50304
    assert gpu_check.flops_per_token(shape, 1024, lora=False) == 6 * weights + 12 * 12 * 768 * 1024
    assert gpu_check.flops_per_token(shape, 1024, lora=True) == 4 * weights + 12 * 12 * 768 * 1024
