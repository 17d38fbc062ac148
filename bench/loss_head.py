"""Measure the loss by chunks against the logits of all positions: memory; exit 1 when the budget is missed.

    budget: 0.3 times the peak memory of the loss, vocabulary 32,000

The head alone on 2,048 hidden states of 512, forward and backward: what a child process holds above what it held
before, by turns. Losses and gradients must be equal. bench/train_speed.py measures the time, in a training.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "stages"))
BUDGET = 0.3
POSITIONS, WIDTH, VOCABULARY = 2048, 512, 32000
TURNS = 3


def peak_kib() -> int:
    """Return the most that this process has held in memory."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def child(side: str) -> dict[str, Any]:
    """Return MiB above the start for forward and backward of the head, and the loss and gradients."""
    import torch
    from torch.nn import functional

    import loss_head

    torch.set_num_threads(2)
    torch.manual_seed(0)
    hidden = torch.randn(POSITIONS, WIDTH, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(VOCABULARY, WIDTH) * 0.02)
    targets = torch.randint(VOCABULARY, (POSITIONS,))
    small = torch.randn(8, 8, requires_grad=True)
    functional.cross_entropy(small @ small.T, torch.arange(8)).backward()  # what torch itself needs
    before = peak_kib()
    if side == "ours":
        loss = loss_head.summed_loss(hidden, weight, targets) / POSITIONS
    else:
        loss = functional.cross_entropy(functional.linear(hidden, weight).float(), targets)
    loss.backward()
    assert weight.grad is not None and hidden.grad is not None
    found = [float(value) for value in (loss.detach(), weight.grad.norm(), hidden.grad.norm())]
    return {"mib": (peak_kib() - before) / 1024, "found": found}


def run(side: str) -> dict[str, Any]:
    """Return what a child process prints."""
    # Freed arrays go back at once: else the allocator's reserve is measured.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, side]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    pairs = [(run("ours"), run("stock")) for _ in range(TURNS)]
    for pair in pairs:
        if any(abs(a - b) > 1e-5 for a, b in zip(*(side["found"] for side in pair), strict=True)):
            raise SystemExit("loss or gradients differ; nothing was measured.")
    mib, their_mib = (statistics.median(pair[side]["mib"] for pair in pairs) for side in (0, 1))
    print(
        f"head of {POSITIONS:,} positions, vocabulary {VOCABULARY:,}: {mib:.0f} MiB, with all logits {their_mib:.0f}; "
        f"{mib / their_mib:.2f} times, budget {BUDGET}"
    )
    raise SystemExit(0 if mib / their_mib <= BUDGET else 1)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(child(sys.argv[1])))
    else:
        main()
