"""Measure training on this machine's CUDA device, in under 8 minutes: one table of tokens/s, MFU and peak memory.

    python bench/gpu_check.py              # refuses without CUDA
    python bench/gpu_check.py --smoke      # toy sizes, on a CPU too: that it runs, not how fast

Cases: QLoRA with a paged optimizer, LoRA in bfloat16, and 124 M and 350 M parameters from random weights in bfloat16.
Sides, by turns in one process each: ours (Trainer, loss by chunks, fused optimizer, no synchronisation between logs),
stock Trainer with the same model, data and optimizer, and for the two from scratch a compiled raw loop without Trainer.
MFU: 6 (an adapter on a frozen base: 4) floating-point operations for each weight that is multiplied and token, and
12 * layers * width * block for attention, divided by what a square bfloat16 GEMM reaches in the same run.
Budgets (DESIGN section 8): 1.5 times stock Trainer, 0.95 of the raw loop, MFU 0.5; from scratch. Exit 1 below them.
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
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def shape(width: int, layers: int, heads: int, vocabulary: int) -> dict[str, int]:
    """Return a Llama of `width`: a feed-forward of 8/3 the width, rounded up to 64."""
    return {
        "hidden_size": width,
        "intermediate_size": -(-8 * width // 3 // 64) * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
    }


CASES: dict[str, dict[str, Any]] = {
    "QLoRA 1.3B, paged_adamw_32bit": {
        "shape": shape(2048, 24, 16, 32000), "rows": 8, "block": 1024, "lora": True, "bits": 4,
        "optim": "paged_adamw_32bit",
    },
    "LoRA 1.3B, bf16": {
        "shape": shape(2048, 24, 16, 32000), "rows": 8, "block": 1024, "lora": True, "optim": "adamw_torch_fused",
    },
    "124M from scratch, bf16": {
        "shape": shape(768, 12, 12, 50304), "rows": 32, "block": 1024, "optim": "adamw_torch_fused", "raw": True,
    },
    "350M from scratch, bf16": {
        "shape": shape(1024, 24, 16, 50304), "rows": 16, "block": 1024, "optim": "adamw_torch_fused", "raw": True,
    },
}  # fmt: skip
STEPS, WARM_UP = 12, 6


def case(name: str, smoke: bool) -> dict[str, Any]:
    """Return the settings of a case; in a smoke test of the same kind, but of toy size."""
    found = dict(CASES[name])
    if smoke:
        found |= {"shape": shape(64, 2, 2, 300), "rows": 2, "block": 32}
        if found["optim"].startswith("paged"):
            found["optim"] = "adamw_torch_fused"  # paging is CUDA's
    return found


def device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(settings: dict[str, Any], folder: Path) -> Any:
    """Return the model of a case, on the device; an adapter's base in bfloat16 or 4 bits, frozen."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**settings["shape"], max_position_embeddings=settings["block"], tie_word_embeddings=True)
    config.use_cache = False
    if not settings.get("lora"):
        with device():
            return LlamaForCausalLM(config)
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    base = folder / "base"
    if not base.exists():
        with device():
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": device()}}
    if settings.get("bits"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model: Any = AutoModelForCausalLM.from_pretrained(base, **options)
    if settings.get("bits"):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.05, target_modules=TARGETS)
    return get_peft_model(model, lora)


def batches(settings: dict[str, Any], steps: int) -> Any:
    """Return random blocks, int64 (steps * rows, block)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    size = (steps * settings["rows"], settings["block"])
    return torch.randint(settings["shape"]["vocab_size"], size, generator=generator)


def now() -> float:
    """Return the time at which the device has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def trainer_run(settings: dict[str, Any], side: str, folder: Path, steps: int) -> tuple[float, float]:
    """Return seconds for the steps after the warm-up, and the last loss."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    import loss_head

    model = build(settings, folder)
    if side == "ours":
        loss_head.install(model)
    ids = batches(settings, steps)
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *given: Any, **kwargs: Any) -> None:
            if state.global_step in (WARM_UP, steps):
                marks.append(now())

    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(ids)

        def __getitem__(self, index: int) -> Any:
            row = ids[index].tolist()  # as a list column of datasets gives it
            return {"input_ids": row, "labels": row}

    class Whole(Rows):
        def __getitems__(self, rows: list[int]) -> Any:
            return {"input_ids": ids[rows], "labels": ids[rows]}

    ours = side == "ours"
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=settings["rows"],
        optim=settings["optim"],
        learning_rate=1e-4,
        bf16=torch.cuda.is_available(),
        logging_steps=steps,
        logging_nan_inf_filter=not ours,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        torch_compile=ours and torch.cuda.is_available() and bool(settings.get("raw")),
    )
    options: dict[str, Any] = {"data_collator": lambda batch: batch} if ours else {}
    data = Whole() if ours else Rows()
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Clock()], **options)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return marks[1] - marks[0], next(row["loss"] for row in trainer.state.log_history if "loss" in row)


def raw_run(settings: dict[str, Any], folder: Path, steps: int) -> tuple[float, float]:
    """Return the same of a plain loop: compiled model, autocast, fused AdamW, clipped gradients, nothing else."""
    import torch

    model = build(settings, folder).train()
    step_of = torch.compile(model) if torch.cuda.is_available() else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = batches(settings, steps).to(device())
    losses, begin = [], 0.0
    for step in range(steps):
        if step == WARM_UP:
            begin = now()
        rows = ids[step * settings["rows"] : (step + 1) * settings["rows"]]
        with torch.autocast(device().type, torch.bfloat16, enabled=torch.cuda.is_available()):
            loss = step_of(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    seconds = now() - begin
    return seconds, float(torch.stack(losses).mean())


def flops_per_token(settings: dict[str, Any]) -> float:
    """Return the floating-point operations of one token, forward and backward (Chowdhery et al., PaLM, appendix B).

    A frozen weight needs no gradient of its own: 4 operations for it, not 6. The output layer counts, embeddings not.
    """
    given = settings["shape"]
    width, layers = given["hidden_size"], given["num_hidden_layers"]
    weights = layers * (4 * width**2 + 3 * width * given["intermediate_size"]) + width * given["vocab_size"]
    return float((4 if settings.get("lora") else 6) * weights + 12 * layers * width * settings["block"])


def gemm(smoke: bool) -> float:
    """Return the floating-point operations per second of a square bfloat16 matrix product."""
    import torch

    size, times = (256, 3) if smoke else (8192, 30)
    left, right = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
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
    settings, steps = case(name, smoke), WARM_UP + (2 if smoke else STEPS)
    seconds, loss = raw_run(settings, folder, steps) if side == "raw" else trainer_run(settings, side, folder, steps)
    tokens = (steps - WARM_UP) * settings["rows"] * settings["block"]
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    return {"speed": tokens / seconds, "loss": loss, "mib": peak, "flops": flops_per_token(settings)}


def spawn(name: str, side: str, folder: Path, smoke: bool, left: float) -> dict[str, float]:
    """Return what a child process of one side prints last."""
    command = [sys.executable, __file__, "--child", name, side, str(folder), *(["--smoke"] if smoke else [])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=left, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, {side}: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(smoke: bool) -> None:
    import torch

    if not smoke and not torch.cuda.is_available():
        raise SystemExit(
            "no CUDA device: this measures a GPU; `python bench/gpu_check.py --smoke` only shows that it runs."
        )
    end = time.monotonic() + SECONDS
    print(
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, torch {torch.__version__}", flush=True
    )
    missed = []
    with tempfile.TemporaryDirectory() as name:
        peak = spawn("-", "gemm", Path(name), smoke, end - time.monotonic())["flops"]
        print(f"GEMM in bfloat16: {peak / 1e12:.3g} TFLOP/s\n")
        print("| case | side | tokens/s | times stock | MFU | peak MiB |\n|---|---|---|---|---|---|")
        for number, title in enumerate(CASES):
            sides = ["ours", "stock", *(["raw"] if CASES[title].get("raw") else [])]
            folder = Path(name, str(number))
            folder.mkdir()
            try:
                found = {side: spawn(title, side, folder, smoke, end - time.monotonic()) for side in sides}
            except (subprocess.TimeoutExpired, ValueError):
                raise SystemExit(f"{title}: not done within 8 minutes; the rows above are whole.") from None
            losses = [row["loss"] for row in found.values()]
            if not all(math.isclose(losses[0], loss, rel_tol=0.02) for loss in losses):
                raise SystemExit(f"{title}: the losses differ, {losses}; nothing of it was measured.")
            for side, row in found.items():
                times, mfu = row["speed"] / found["stock"]["speed"], row["speed"] * row["flops"] / peak
                print(
                    f"| {title} | {side} | {row['speed']:,.0f} | {times:.2f} | {mfu:.2f} | {row['mib']:,.0f} |",
                    flush=True,
                )
            if "raw" in found:
                ours = found["ours"]
                shares = {side: ours["speed"] / found[side]["speed"] for side in ("stock", "raw")}
                shares["mfu"] = ours["speed"] * ours["flops"] / peak
                missed += [
                    f"{title}: {key} {shares[key]:.2f} < {BUDGETS[key]}"
                    for key in BUDGETS
                    if shares[key] < BUDGETS[key]
                ]
    print("\n" + ("; ".join(missed) if missed and not smoke else "toy sizes: no budget" if smoke else "budgets held"))
    raise SystemExit(1 if missed and not smoke else 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="toy sizes, on a CPU too")
    parser.add_argument("--child", nargs=3, metavar=("CASE", "SIDE", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.child[0], given.child[1], Path(given.child[2]), given.smoke)))
    else:
        main(given.smoke)
