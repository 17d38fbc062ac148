"""Measure training on a CPU against stock Trainer and against a loop without Trainer; exit 1 when a budget is missed.

    budgets: 1.2 times the tokens per CPU second of stock Trainer, at most 1 ms of host time a step above a raw loop

Speed: ours is what the stage runs (train_loop.train). Stock is what run_clm.py does: Trainer with its defaults, a saved
dataset of list columns, default_data_collator, the model's own loss. Same weights, blocks, order and optimizer; the
losses of all steps must be equal. The loss is what can be saved: the budget is for the default's Llama with 32,000
tokens in its vocabulary; with the default's own 4,096 the products of the layers leave less, and a RoBERTa that learns
15 % of its tokens more: both are reported.
Host time: CPU time at a size where nearly nothing is computed, against a plain loop with the same loss and optimizer.

Both sides live at once and take turns of a few steps, so that whatever else the machine does hits both. What counts is
the best turn of each: other programs can only slow one down.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "stages"))
SPEED, HOST_MS = 1.2, 1.0
LLAMA = json.loads((ROOT / "models/configs/llama_small/config.json").read_text(encoding="utf-8"))
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
CASES: dict[str, dict[str, Any]] = {
    "clm": {"config": {**LLAMA, "vocab_size": 32000}, "block": 256, "rows": 8, "turns": 12, "steps": 1},
    "small": {"config": LLAMA, "block": 256, "rows": 8, "turns": 12, "steps": 1},
    "mlm": {
        "config": {
            "architectures": ["RobertaForMaskedLM"], "model_type": "roberta", "hidden_size": 256, "vocab_size": 4096,
            "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
            "max_position_embeddings": 260, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
        "block": 128, "rows": 16, "turns": 12, "steps": 1,
    },
    "host": {
        "config": {**LLAMA, **TINY, "num_key_value_heads": 1, "vocab_size": 64}, "block": 16, "rows": 8, "turns": 20,
        "steps": 50,
    },
}  # fmt: skip
WARM_UP = 2


def settings(case: str) -> dict[str, Any]:
    """Return the parameters of train_model."""
    one = CASES[case]
    return {
        "objective": "mlm" if case == "mlm" else "clm",
        "max_steps": WARM_UP + one["turns"] * one["steps"],
        "global_batch_size": one["rows"],
        "per_device_train_batch_size": one["rows"],
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 10_000 if case == "host" else 1,
        "save_steps": 10_000,
        "eval_steps": 10_000,
    }


def write(folder: Path, config: dict[str, Any], block: int, params: Any) -> None:
    """Write config, tokenizer, and the same blocks as a blocks folder and as a saved dataset in the order of ours."""
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models

    import train_loop
    from block_order import BlockOrder
    from group_blocks import blocks_schema
    from kit import arrow

    disable_progress_bars()
    (folder / "base").mkdir(parents=True)
    (folder / "base/config.json").write_text(json.dumps(config))
    size, rows = config["vocab_size"], params.global_batch_size * 8
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
    names = [*special.values(), *(f"w{number}" for number in range(size - 4))]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, "<pad>"))
    tokenizer.add_special_tokens(list(special.values()))
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer/tokenizer.json"))
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(special))
    ids = np.random.default_rng(0).zipf(1.3, rows * block) % (size - 4) + 4
    schema = blocks_schema(pa.uint16(), block, learn=False)
    with arrow.Writer(folder / "blocks", schema) as out:
        values = pa.FixedSizeListArray.from_arrays(pa.array(ids.astype(np.uint16)), block)
        out.write(pa.Table.from_arrays([values], schema=schema))
        out.counts = {"tokens": len(ids)}
    data = train_loop.seen(folder / "blocks", folder / "tokenizer", params)
    stream = train_loop.Stream(data, BlockOrder(rows, params.seed), params.max_steps * params.global_batch_size)
    batch = stream.__getitems__(list(range(len(stream))))
    Dataset.from_dict({name: values.numpy() for name, values in batch.items()}).save_to_disk(folder / "dataset")


def turns(case: str) -> Callable[..., None]:
    """Return a callback `on_step_end` that waits for its turn on stdin and answers with the seconds that it took."""
    marks: list[float] = []
    steps = CASES[case]["steps"]
    cpu = time.thread_time if case == "host" else time.process_time  # of the thread that drives, or of all

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step - WARM_UP
        if done < 0 or done % steps:
            return
        if marks:
            took = [now - before for now, before in zip((cpu(), time.perf_counter()), marks, strict=True)]
            print(json.dumps([seconds / steps for seconds in took]), flush=True)
        else:
            print("ready", flush=True)
        sys.stdin.readline()
        marks[:] = cpu(), time.perf_counter()

    return on_step_end


def ours(case: str, folder: Path) -> list[float]:
    """Train as the stage does, by turns; return the losses."""
    import train_loop
    from block_order import BlockOrder
    from train_model import Params

    params = Params.model_validate(settings(case))
    train_loop.Reporter.on_step_end = turns(case)  # type: ignore[method-assign]
    model = train_loop.prepare_model(folder / "base", folder / "tokenizer", params)
    data = train_loop.seen(folder / "blocks", folder / "tokenizer", params, model)
    train_loop.BlockTrainer.evaluate = lambda *_, **__: {}  # type: ignore[method-assign,assignment]
    order = BlockOrder(len(data), params.seed)
    done = train_loop.train(model, data, data, order, params.max_steps or 1, params, folder / "work", "ours")
    return [row["loss"] for row in done.curves["train"]]


def stock(case: str, folder: Path) -> list[float]:
    """Train with stock Trainer, by turns; return the losses."""
    import torch
    from datasets import load_from_disk
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        default_data_collator,
    )
    from transformers.trainer_callback import PrinterCallback

    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if case == "mlm" else AutoModelForCausalLM
    options = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = auto.from_config(AutoConfig.from_pretrained(folder / "base", **options), dtype=torch.float32)
    given = settings(case)
    for name in ("objective", "global_batch_size"):
        del given[name]
    given |= {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "dataloader_pin_memory": False}
    arguments = TrainingArguments(output_dir=str(folder / "stock"), save_strategy="no", **given)
    callback = type("Turns", (TrainerCallback,), {"on_step_end": turns(case)})()

    class Ordered(Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = Ordered(
        model=model,
        args=arguments,
        train_dataset=load_from_disk(folder / "dataset"),
        data_collator=default_data_collator,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def raw(case: str, folder: Path) -> list[float]:
    """Train in a plain loop with the same model, loss, batches and optimizer, by turns."""
    from types import SimpleNamespace

    import torch

    import loss_head
    import train_loop
    from train_model import Params

    params = Params.model_validate(settings(case))
    model = train_loop.prepare_model(folder / "base", folder / "tokenizer", params).train()
    data = train_loop.seen(folder / "blocks", folder / "tokenizer", params, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    wait = turns(case)
    for step in range(params.max_steps or 1):
        first = step * CASES[case]["rows"] % len(data)
        batch = data.__getitems__(list(range(first, first + CASES[case]["rows"])))
        batch["learned"] = torch.from_numpy(loss_head.learned(batch["labels"].numpy(), shift=True))
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wait(None, None, SimpleNamespace(global_step=step + 1), None)
    return []


class Side:
    """A child process that takes turns."""

    def __init__(self, side: str, case: str, folder: Path) -> None:
        # Threads that wait give their core to the other side at once.
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, side, case, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.said()

    def said(self) -> Any:
        """Return the next thing that is no message of the training."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line == "ready\n":
                return None
            if line.startswith("["):
                return json.loads(line)
        raise SystemExit("a side ended early; nothing was measured.")

    def turn(self, wait: bool = True) -> Any:
        """Let it run until the next turn and return the seconds a step, CPU and wall."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.said() if wait else None


def measure(case: str, sides: tuple[str, str], folder: Path) -> tuple[list[list[float]], list[list[list[float]]]]:
    """Return the losses of both sides, and for each turn of each its CPU and wall seconds a step."""
    folder = folder / case
    folder.mkdir()
    subprocess.run([sys.executable, __file__, "write", case, str(folder)], check=True)
    running = [Side(side, case, folder) for side in sides]
    found = [[side.turn() for side in running] for _ in range(CASES[case]["turns"])]
    losses = [side.turn() for side in running]
    for side in running:
        side.process.wait()
    return losses, [list(column) for column in zip(*found, strict=True)]


def main() -> None:
    missed = False
    with tempfile.TemporaryDirectory() as name:
        titles = {"clm": "Llama, vocabulary 32,000", "small": "Llama of the default", "mlm": "RoBERTa, 15 % learned"}
        for case, title in titles.items():
            losses, (mine, theirs) = measure(case, ("ours", "stock"), Path(name))
            if any(abs(a - b) > 1e-3 for a, b in zip(*losses, strict=True)):
                raise SystemExit(f"{title}: the losses differ, {losses}; nothing was measured.")
            tokens = CASES[case]["rows"] * CASES[case]["block"]
            (cpu, their_cpu), (wall, their_wall) = (
                [tokens / min(turn[i] for turn in side) for side in (mine, theirs)] for i in (0, 1)
            )
            budget = f", budget {SPEED}" if case == "clm" else ""
            print(
                f"{title}, {tokens:,} tokens a step, losses equal: {cpu:,.0f} tokens per CPU second, stock Trainer "
                f"{their_cpu:,.0f}; {cpu / their_cpu:.2f} times{budget} ({wall / their_wall:.2f} by the clock)",
                flush=True,
            )
            missed |= case == "clm" and cpu / their_cpu < SPEED
        _, (mine, theirs) = measure("host", ("ours", "raw"), Path(name))
        host, plain = (min(turn[0] for turn in side) * 1000 for side in (mine, theirs))
        print(f"host time of a step: {host - plain:.2f} ms above the {plain:.2f} ms of a raw loop, budget {HOST_MS}")
        missed |= host - plain > HOST_MS
    raise SystemExit(missed)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        given = sys.argv[2], Path(sys.argv[3])
        if sys.argv[1] == "write":
            from train_model import Params

            case, folder = given
            write(folder, CASES[case]["config"], CASES[case]["block"], Params.model_validate(settings(case)))
        else:
            print(json.dumps({"ours": ours, "stock": stock, "raw": raw}[sys.argv[1]](*given)), flush=True)
    else:
        main()
