"""Measure the loss by chunks against the model's own loss: memory and speed; exit 1 when the budget is missed.

    budget: 0.3 times the peak memory of the loss, vocabulary 32,000

Memory: the head alone on 4 x 512 hidden states, forward and backward, what a child process holds above what it held
before. Speed: tokens per CPU second of `Trainer` with the same model, blocks and settings, stock against
`loss_head`, by turns; a ratio that is reported, as it depends on how much of the model is its head. Equality first.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "stages"))
MEMORY_BUDGET = 0.3
TURNS = 3
SIZES = {
    "tiny": {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "batch": 8},
    "30M": {"vocab_size": 32000, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 10, "batch": 2},
}
BLOCK_SIZE, STEPS, WARM_UP = 256, 4, 1


def peak_kib() -> int:
    """Return the most that this process has held in memory."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def head_memory(side: str) -> dict[str, Any]:
    """Return MiB above the start for one forward and backward of the head, and the loss."""
    import torch
    from torch.nn import functional

    import loss_head

    torch.set_num_threads(2)
    torch.manual_seed(0)
    hidden = torch.randn(2048, 512, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(32000, 512) * 0.02)
    targets = torch.randint(32000, (2048,))
    small = torch.randn(8, 8, requires_grad=True)
    functional.cross_entropy(small @ small.T, torch.arange(8)).backward()  # what torch itself needs
    before = peak_kib()
    if side == "ours":
        loss = loss_head.summed_loss(hidden, weight, targets) / 2048
    else:
        loss = functional.cross_entropy(functional.linear(hidden, weight).float(), targets)
    loss.backward()
    return {"mib": (peak_kib() - before) / 1024, "loss": float(loss.detach()), "grad": float(weight.grad.norm())}


def speed(side: str, size: str, folder: Path) -> dict[str, Any]:
    """Return tokens per CPU second of a few Trainer steps after a warm-up, and the last loss."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    import loss_head
    from kit.model import start

    start(0)
    shape = dict(SIZES[size])
    rows = shape.pop("batch")
    config = LlamaConfig(
        **shape, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True
    )
    model = LlamaForCausalLM(config)
    random = np.random.default_rng(0)
    ids = torch.from_numpy(random.integers(0, shape["vocab_size"], ((STEPS + WARM_UP) * rows, BLOCK_SIZE)))
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *given: Any, **kwargs: Any) -> None:
            marks.append(time.process_time())

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS + WARM_UP,
        per_device_train_batch_size=rows,
        learning_rate=1e-3,
        logging_steps=1,
        logging_nan_inf_filter=side != "ours",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    if side == "ours":
        assert loss_head.install(model)
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Clock()])
    trainer.remove_callback(PrinterCallback)
    before = peak_kib()
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    seconds = marks[-1] - marks[WARM_UP - 1]
    tokens = STEPS * rows * BLOCK_SIZE
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "speed": tokens / seconds,
        "loss": losses[-1],
        "mib": (peak_kib() - before) / 1024,
        "parameters": parameters,
    }


def child(*arguments: str) -> dict[str, Any]:
    """Return what a child process prints last."""
    command = [sys.executable, __file__, *arguments]
    # Freed arrays go back at once: else the allocator's reserve is measured.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    ours, theirs = child("memory", "ours"), child("memory", "stock")
    if abs(ours["loss"] - theirs["loss"]) > 1e-5 or abs(ours["grad"] - theirs["grad"]) > 1e-5:
        raise SystemExit("the losses differ; nothing was measured.")
    ratio = ours["mib"] / theirs["mib"]
    print(
        f"head alone, 2,048 positions, vocabulary 32,000: {ours['mib']:.0f} MiB, stock {theirs['mib']:.0f}; "
        f"{ratio:.2f} times, budget {MEMORY_BUDGET}"
    )
    for size in SIZES:
        found: dict[str, list[dict[str, Any]]] = {"ours": [], "stock": []}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(TURNS):
                for side, rows in found.items():
                    rows.append(child("speed", side, size, folder))
        if abs(found["ours"][0]["loss"] - found["stock"][0]["loss"]) > 1e-3:
            raise SystemExit(f"{size}: the losses differ; nothing was measured.")
        fast, stock = (max(row["speed"] for row in rows) for rows in found.values())  # a busy machine only slows
        memory, stock_memory = (statistics.median(row["mib"] for row in rows) for rows in found.values())
        print(
            f"{size} ({found['ours'][0]['parameters']:,} parameters): {fast:,.0f} tokens per CPU second, stock Trainer "
            f"{stock:,.0f}, {fast / stock:.2f} times; training holds {memory:.0f} MiB, stock {stock_memory:.0f}, "
            f"{memory / stock_memory:.2f} times"
        )
    raise SystemExit(0 if ratio <= MEMORY_BUDGET else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        print(json.dumps(head_memory(sys.argv[2])))
    elif sys.argv[1:2] == ["speed"]:
        print(json.dumps(speed(sys.argv[2], sys.argv[3], Path(sys.argv[4]))))
    else:
        main()
