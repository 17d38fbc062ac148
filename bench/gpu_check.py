"""Measure training on this machine's CUDA device, in under 8 minutes: one table of tokens/s, MFU and peak memory.

    python bench/gpu_check.py              # refuses without CUDA, exit 2
    python bench/gpu_check.py --smoke      # toy sizes, on a CPU too: that it runs, not how fast

Cases: QLoRA with a paged optimizer, LoRA in bfloat16, and 124 M and 350 M parameters from random weights in bfloat16.
Sides, one process each: ours (what the stage runs, layers compiled where all weights are trained), stock Trainer with
the same model, data and optimizer, and for the two from scratch a compiled raw loop. The losses must be equal.
MFU: 6 (an adapter on a frozen base: 4) floating-point operations for each weight that is multiplied and token, and
12 * layers * width * block for attention, divided by what a square bfloat16 GEMM reaches in the same run.
Budgets, of the two from scratch: 1.5 times stock Trainer, 0.95 of the raw loop, MFU 0.5. Exit 1 below them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "stages"))
SECONDS = 8 * 60 - 20
BUDGETS = {"stock": 1.5, "raw": 0.95, "mfu": 0.5}
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}
BITS = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
STEPS, WARM_UP = 12, 6


def config(width: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    """Return a Llama of `width`: a feed-forward of 8/3 the width, rounded up to 64."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": -(-8 * width // 3 // 64) * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "vocab_size": vocabulary,
    }


CASES: dict[str, dict[str, Any]] = {
    "QLoRA 1.3B, paged_adamw_32bit": {
        "config": config(2048, 24, 16, 32000), "rows": 8,
        "params": {"lora": LORA, "quantization": BITS, "optim": "paged_adamw_32bit"},
    },
    "LoRA 1.3B, bf16": {"config": config(2048, 24, 16, 32000), "rows": 8, "params": {"lora": LORA}},
    "124M from scratch, bf16": {"config": config(768, 12, 12, 50304), "rows": 32, "params": {}},
    "350M from scratch, bf16": {"config": config(1024, 24, 16, 50304), "rows": 16, "params": {}},
}  # fmt: skip


def case(name: str, smoke: bool) -> tuple[dict[str, Any], int, Any]:
    """Return config, length of a block and parameters of train_model; in a smoke test of toy size."""
    from train_model import Params

    one, steps = CASES[name], WARM_UP + (2 if smoke else STEPS)
    rows = 2 if smoke else one["rows"]
    params = {
        "max_steps": steps,
        "global_batch_size": rows,
        "per_device_train_batch_size": rows,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": steps,
        "eval_steps": 10_000,
        "save_steps": 10_000 * steps,
        "bf16": True,
        "torch_compile": "lora" not in one["params"] and not smoke,
        **one["params"],
    }
    return config(64, 2, 2, 300) if smoke else one["config"], 32 if smoke else 1024, Params.model_validate(params)


def now() -> float:
    """Return the time when all that was asked of the device is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def prepare(folder: Path, name: str, smoke: bool) -> None:
    """Write blocks, tokenizer and base of a case; an adapter's base has weights."""
    from train_speed import write

    shape, block, params = case(name, smoke)
    write(folder, shape, block, params)
    if params.lora:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(folder / "base")


def marks(steps: int) -> tuple[list[float], Any]:
    """Return a list and a callback that notes in it when the warm-up and the last step end."""
    found: list[float] = []

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (WARM_UP, steps):
            found.append(now())

    return found, on_step_end


def ours(folder: Path, params: Any) -> tuple[list[float], float]:
    """Train as the stage does; return the marks and the mean loss."""
    import train_loop
    from block_order import BlockOrder

    found, on_step_end = marks(params.max_steps)
    train_loop.Reporter.on_step_end = on_step_end  # type: ignore[method-assign]
    train_loop.BlockTrainer.evaluate = lambda *_, **__: {}  # type: ignore[method-assign,assignment]
    model = train_loop.prepare_model(folder / "base", folder / "tokenizer", params)
    data = train_loop.seen(folder / "blocks", folder / "tokenizer", params, model)
    order, work = BlockOrder(len(data), params.seed), folder / "work"
    done = train_loop.train(model, data, data, order, params.max_steps, params, work, "ours")
    return found, done.curves["train"][-1]["loss"]


def plain(folder: Path, params: Any) -> Any:
    """Return the same model with its own loss, and torch as it comes."""
    import torch

    import train_loop

    train_loop.loss_head.install = lambda model: False
    changed = params.model_copy(update={"torch_compile": False})
    model = train_loop.prepare_model(folder / "base", folder / "tokenizer", changed)
    torch.use_deterministic_algorithms(False)
    return model


def stock(folder: Path, params: Any) -> tuple[list[float], float]:
    """Train with stock Trainer; return the marks and the mean loss."""
    import torch
    from datasets import load_from_disk
    from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
    from transformers.trainer_callback import PrinterCallback

    import optimizers
    import train_loop

    class Ordered(Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    found, on_step_end = marks(params.max_steps)
    arguments = TrainingArguments(
        output_dir=str(folder / "stock"),
        max_steps=params.max_steps,
        per_device_train_batch_size=params.per_device_train_batch_size,
        optim=optimizers.available(params.optim, torch.cuda.is_available()),
        learning_rate=params.learning_rate,
        lr_scheduler_type=params.lr_scheduler_type,
        logging_steps=params.logging_steps,
        bf16=train_loop.has_bf16(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Ordered(
        model=plain(folder, params),
        args=arguments,
        train_dataset=load_from_disk(folder / "dataset"),
        data_collator=default_data_collator,
        callbacks=[type("Clock", (TrainerCallback,), {"on_step_end": on_step_end})()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return found, next(row["loss"] for row in trainer.state.log_history if "loss" in row)


def raw(folder: Path, params: Any) -> tuple[list[float], float]:
    """Train in a plain loop: compiled model, autocast, fused AdamW, clipped gradients; return marks and mean loss."""
    from types import SimpleNamespace

    import torch
    from datasets import load_from_disk

    import train_loop

    model = plain(folder, params).train()
    model.config.use_cache = False
    device = next(model.parameters()).device
    step_of = torch.compile(model, dynamic=False) if torch.cuda.is_available() else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=params.learning_rate, weight_decay=0.0, fused=True)
    rows = load_from_disk(folder / "dataset").with_format("torch")["input_ids"][:].to(device)
    found, on_step_end = marks(params.max_steps)
    losses = []
    for step in range(params.max_steps):
        batch = rows[step * params.global_batch_size : (step + 1) * params.global_batch_size]
        with torch.autocast(device.type, torch.bfloat16, enabled=train_loop.has_bf16()):
            loss = step_of(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        on_step_end(None, None, SimpleNamespace(global_step=step + 1), None)
    return found, float(torch.stack(losses).mean())


def flops_per_token(shape: dict[str, Any], block: int, lora: bool) -> float:
    """Return the floating-point operations of one token, forward and backward (Chowdhery et al., PaLM, appendix B).

    A frozen weight needs no gradient of its own: 4 operations for it, not 6. The output layer counts, embeddings not.
    """
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    weights = layers * (4 * width**2 + 3 * width * shape["intermediate_size"]) + width * shape["vocab_size"]
    return float((4 if lora else 6) * weights + 12 * layers * width * block)


def gemm(smoke: bool) -> float:
    """Return the floating-point operations per second of a square bfloat16 matrix product."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, times = (256, 3) if smoke else (8192, 30)
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    begin = now()
    for _ in range(times):
        left @ right
    return 2 * size**3 * times / (now() - begin)


def child(name: str, side: str, folder: Path, smoke: bool) -> dict[str, float]:
    """Run one side of one case in this process."""
    import torch

    if side == "gemm":
        return {"flops": gemm(smoke)}
    if side == "write":
        prepare(folder, name, smoke)
        return {}
    shape, block, params = case(name, smoke)
    (begin, end), loss = {"ours": ours, "stock": stock, "raw": raw}[side](folder, params)
    tokens = (params.max_steps - WARM_UP) * params.global_batch_size * block
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    flops = flops_per_token(shape, block, params.lora is not None)
    return {"speed": tokens / (end - begin), "loss": loss, "mib": peak, "flops": flops}


def spawn(name: str, side: str, folder: Path, smoke: bool, left: float) -> dict[str, float]:
    """Return what a child process of one side prints last."""
    command = [sys.executable, __file__, "--child", name, side, str(folder), *(["--smoke"] if smoke else [])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=left, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, {side}: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def missed(title: str, found: dict[str, dict[str, float]], peak: float) -> list[str]:
    """Return the budgets that `ours` does not hold, as text."""
    mine = found["ours"]
    shares = {side: mine["speed"] / found[side]["speed"] for side in ("stock", "raw")}
    shares["mfu"] = mine["speed"] * mine["flops"] / peak
    return [f"{title}: {key} {shares[key]:.2f} < {BUDGETS[key]}" for key in BUDGETS if shares[key] < BUDGETS[key]]


def main(smoke: bool) -> None:
    import torch

    if not smoke and not torch.cuda.is_available():
        print("no CUDA device: this measures a GPU; `--smoke` only shows that it runs.", file=sys.stderr)
        raise SystemExit(2)
    end, below = time.monotonic() + SECONDS, []
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        peak = spawn("-", "gemm", Path(place), smoke, end - time.monotonic())["flops"]
        print(f"GEMM in bfloat16: {peak / 1e12:.3g} TFLOP/s\n")
        print("| case | side | tokens/s | times stock | MFU | peak MiB |\n|---|---|---|---|---|---|", flush=True)
        for number, title in enumerate(CASES):
            sides = ["ours", "stock", *([] if "lora" in CASES[title]["params"] else ["raw"])]
            folder = Path(place, str(number))
            try:
                spawn(title, "write", folder, smoke, end - time.monotonic())
                found = {side: spawn(title, side, folder, smoke, end - time.monotonic()) for side in sides}
            except (subprocess.TimeoutExpired, ValueError):
                raise SystemExit(f"{title}: not done within 8 minutes; the rows above are whole.") from None
            losses = [row["loss"] for row in found.values()]
            if not all(math.isclose(losses[0], loss, rel_tol=0.02) for loss in losses):
                raise SystemExit(f"{title}: the losses differ, {losses}; nothing of it was measured.")
            for side, row in found.items():
                times, mfu = row["speed"] / found["stock"]["speed"], row["speed"] * row["flops"] / peak
                shown = f"{row['speed']:,.0f} | {times:.2f} | {mfu:.2f} | {row['mib']:,.0f}"
                print(f"| {title} | {side} | {shown} |", flush=True)
            if "raw" in found:
                below += missed(title, found, peak)
    print("\n" + ("toy sizes: no budget" if smoke else "; ".join(below) or "budgets held"))
    raise SystemExit(1 if below and not smoke else 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="toy sizes, on a CPU too")
    parser.add_argument("--child", nargs=3, metavar=("CASE", "SIDE", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.child[0], given.child[1], Path(given.child[2]), given.smoke)))
    else:
        main(given.smoke)
