"""The part of train_model that needs torch: model, Trainer, checkpoints, curves.

transformers' Trainer runs the steps; ours are the order of the blocks, which blocks make a step, a token-exact
evaluation and the marker that says a checkpoint is whole.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.model import (
    Blocks,
    device,
    load_model,
    mean_loss,
    new_tokens,
    start,
)  # first: it says that nothing is to be fetched

# isort: split
import torch
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from block_order import BlockOrder
from kit.arrow import write_json
from kit.tokenizer import FILES as TOKENIZER_FILES
from kit.tokenizer import Vocabulary

if TYPE_CHECKING:
    from train_model import Params

MARKER = "whole"  # written last into a checkpoint
Curves = dict[str, list[dict[str, float]]]


def prepare_model(base: Path, tokenizer: Path, params: Params) -> Any:
    """Return the model to train: all weights trainable, or a frozen base with a LoRA adapter."""
    start(params.seed)
    quantization = params.quantization.model_dump() if params.quantization else None
    vocabulary = Vocabulary(tokenizer)
    if params.lora and new_tokens(base, tokenizer):
        raise SystemExit(
            f"{tokenizer} has more tokens than {base}: an adapter neither learns their embeddings nor can be merged "
            "with them yet; leave `lora` out in this phase, or set train_tokenizer.mode to reuse."
        )
    model: Any = load_model(base, vocabulary.size, vocabulary.special_ids, quantization, tokenizer)
    if quantization:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=params.gradient_checkpointing)
    if params.lora:
        model = add_adapter(model, params)
    elif params.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model if quantization else model.to(device())


def add_adapter(model: PreTrainedModel, params: Params) -> Any:
    """Return `model` with a new LoRA adapter. Raises SystemExit when the target modules match no layer."""
    from peft import LoraConfig, get_peft_model

    assert params.lora
    linear = sorted(
        {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    )
    targets = params.lora.target_modules
    missing = [] if isinstance(targets, str) else [target for target in targets if target not in linear]
    if missing:
        raise SystemExit(
            f"lora.target_modules: the model has no layer {', '.join(missing)}; it has {', '.join(linear)}."
        )
    config = LoraConfig(task_type="CAUSAL_LM", **params.lora.model_dump())
    return get_peft_model(model, config)


class InOrder(Sampler[int]):
    """Yields the blocks of all steps, one after the other, as `BlockOrder` says."""

    def __init__(self, order: BlockOrder, length: int) -> None:
        self.order, self.length = order, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return map(self.order.block, range(self.length))


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the weight matrices of the layers, AdamW for all other parameters, as one optimizer to Trainer.

    Muon: Jordan et al., 2024; the update is scaled to AdamW's size (Liu et al., "Muon is Scalable", 2025, equation 4),
    so both go by one learning rate.
    """

    def __init__(self, model: Any, params: Params) -> None:
        outer = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
        inner: list[torch.nn.Parameter] = []
        rest: list[torch.nn.Parameter] = []
        for parameter in model.parameters():
            matrix = parameter.ndim == 2 and id(parameter) not in outer
            (inner if matrix else rest).append(parameter)
        options = {"lr": params.learning_rate, "weight_decay": params.weight_decay}
        betas = (params.adam_beta1, params.adam_beta2)
        self.parts = {
            "muon": torch.optim.Muon(inner, adjust_lr_fn="match_rms_adamw", **options),
            "adamw": torch.optim.AdamW(rest, betas=betas, lr=params.learning_rate, weight_decay=0.0, fused=True),
        }
        # The groups are shared with the parts: what a scheduler writes here, they see.
        super().__init__([group for part in self.parts.values() for group in part.param_groups], {})

    def step(self, closure: Any = None) -> None:
        """Take one step of each part."""
        for part in self.parts.values():
            part.step(closure)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each part under its name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]


class BlockTrainer(Trainer):
    """Trainer that feeds blocks in their frozen order and evaluates token by token."""

    def __init__(self, order: BlockOrder, n_blocks: int, params: Params, **options: Any) -> None:
        super().__init__(**options)
        self.order, self.n_blocks, self.params = order, n_blocks, params

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.params.optim == "muon":
            self.optimizer: Any = MuonWithAdamW(self.model, self.params)
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        # All steps are one epoch to Trainer: epochs are arithmetic of the order, and no step is cut short between them.
        return InOrder(self.order, self.n_blocks)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        metrics = {"eval_loss": mean_loss(self.model, self.eval_dataset, self.args.per_device_eval_batch_size)}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Reporter(TrainerCallback):
    """Prints a line now and then, stops on a loss that is no number, marks checkpoints as whole."""

    def __init__(self, name: str, tokens_per_step: int) -> None:
        self.name, self.tokens_per_step = name, tokens_per_step
        self.first_step, self.started, self.spoken = 0, 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step, self.started = state.global_step, time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        loss = logs.get("loss", logs.get("eval_loss"))
        if loss is not None and not math.isfinite(loss):
            raise SystemExit(
                f"{self.name}: the loss is {loss} at step {state.global_step}; lower learning_rate or max_grad_norm. "
                f"The checkpoints before it are in {args.output_dir}."
            )
        now = time.monotonic()
        if loss is None or (not sys.stdout.isatty() and now - self.spoken < 15 and state.global_step < state.max_steps):
            return
        self.spoken = now
        steps, seconds = state.global_step - self.first_step, max(now - self.started, 1e-9)
        left = seconds / steps * (state.max_steps - state.global_step) if steps else 0.0
        kind = "eval loss" if "eval_loss" in logs else "loss"
        rate = f", lr {logs['learning_rate']:.2e}" if "learning_rate" in logs else ""
        speed = f", {steps * self.tokens_per_step / seconds:,.0f} tokens/s, {left:.0f} s left" if steps else ""
        print(f"{self.name}: step {state.global_step} of {state.max_steps}, {kind} {loss:.4f}{rate}{speed}", flush=True)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / MARKER).touch()


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest whole checkpoint in `folder`, after removing those that a kill left half-written."""
    whole: list[Path] = []
    for path in folder.glob("checkpoint-*"):
        if (path / MARKER).exists():
            whole.append(path)
        else:
            shutil.rmtree(path)
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def train(
    model: Any, blocks: Blocks, held_out: Blocks, order: BlockOrder, steps: int, params: Params, work: Path, name: str
) -> Curves:
    """Train `model` in place for `steps` optimizer steps, going on from a whole checkpoint in `work`.

    Returns the curves: `train` rows with step, loss, learning_rate, grad_norm, and `eval` rows with step, loss; losses
    are nats per learned token.
    """
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        optim="adamw_torch_fused",
        gradient_accumulation_steps=params.global_batch_size // params.per_device_train_batch_size,
        eval_strategy="steps",
        eval_on_start=True,
        save_strategy="steps",
        save_total_limit=2,
        disable_tqdm=not sys.stderr.isatty(),
        logging_nan_inf_filter=False,  # it waits for the device at every step
        remove_unused_columns=False,
        use_cpu=device().type == "cpu",
        dataloader_pin_memory=device().type == "cuda",
        **params.model_dump(
            exclude={
                "num_train_epochs",
                "max_steps",
                "global_batch_size",
                "gradient_checkpointing",
                "optim",
                "lora",
                "quantization",
            }
        ),
    )
    trainer = BlockTrainer(
        order=order,
        n_blocks=steps * params.global_batch_size,
        params=params,
        model=model,
        args=arguments,
        train_dataset=blocks,
        eval_dataset=held_out,
        data_collator=lambda batch: batch,  # Blocks gives whole batches
        callbacks=[Reporter(name, params.global_batch_size * blocks.block_size)],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(work)
    if checkpoint:
        print(f"{name}: going on from step {checkpoint.rsplit('-', 1)[1]}", flush=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    if steps % params.eval_steps:
        trainer.evaluate()
    return {
        "train": _curve(trainer.state.log_history, "loss", "learning_rate", "grad_norm"),
        "eval": _curve(trainer.state.log_history, "eval_loss"),
    }


def _curve(history: list[dict[str, float]], *names: str) -> list[dict[str, float]]:
    """Return one row per step of those that hold `names`; a resumed run evaluates its first step twice."""
    rows = {
        row["step"]: {name.removeprefix("eval_"): row[name] for name in names} for row in history if names[0] in row
    }
    return [{"step": step, **rows[step]} for step in sorted(rows)]


def last_losses(curves: Curves) -> dict[str, float]:
    """Return the last training and evaluation loss, nats per learned token."""
    return {f"{split}_loss": round(rows[-1]["loss"], 6) for split, rows in curves.items() if rows}


def sizes(model: Any) -> dict[str, int]:
    """Return the numbers of parameters, all and trained."""
    parameters = list(model.parameters())
    # A packed 4-bit weight holds two values in a byte.
    count = [p.numel() * (2 if p.__class__.__name__ == "Params4bit" else 1) for p in parameters]
    trained = sum(n for n, p in zip(count, parameters, strict=True) if p.requires_grad)
    return {"parameters": sum(count), "trained_parameters": trained}


def save(model: Any, tokenizer: Path, base: Path, params: Params, folder: Path) -> None:
    """Write the model, or its adapter, and the tokenizer into `folder`, the same bytes for the same weights.

    training.json says what an adapter needs to be loaded as it was trained: its base and the base's quantization.
    """
    model.save_pretrained(folder)
    write_json(folder / "training.json", {"base": str(base), **params.model_dump(include={"quantization"})})
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    config = folder / "adapter_config.json"
    if config.is_file():
        # peft writes sets in the order of their hashes, which differs from run to run.
        content = {k: sorted(v) if isinstance(v, list) else v for k, v in json.loads(config.read_text()).items()}
        config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)


def write_curves(curves: Curves, folder: Path) -> None:
    """Write train.csv and eval.csv for `dvc plots`."""
    for split, rows in curves.items():
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
