"""The part of train_model that needs torch: model, Trainer, checkpoints, curves.

transformers' Trainer runs the steps; ours are the order of the blocks, which blocks make a step, a token-exact
evaluation and the marker that says a checkpoint is whole.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kit.model import (
    IGNORED,
    Blocks,
    MaskedBlocks,
    device,
    load_model,
    max_positions,
    mean_loss,
    new_tokens,
    start,
)  # first: it says that nothing is to be fetched

# isort: split
import accelerate.optimizer
import torch
from accelerate.utils import DistributedType
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import adapters
import distributed
import document_masks
import loss_head
import optimizers
import seen_blocks
from block_order import RECEIPT_BYTES, BlockOrder, block_receipt, step_receipt
from document_masks import Separated
from kit import arrow, malloc
from kit.tokenizer import FILES as TOKENIZER_FILES
from kit.tokenizer import Vocabulary

if TYPE_CHECKING:
    from train_model import Params

# At each step accelerate looks twice on the disk for a package, 0.4 ms: half of what Trainer adds to a plain loop.
accelerate.optimizer.is_lomo_available = lambda: False

MARKER = "whole"  # written last into a checkpoint
TRAINED = "trained.pt"  # in a checkpoint: what the model learned, as it stands
RECEIPTS = "receipts.bin"
Curves = dict[str, list[dict[str, float]]]
Data = Blocks | MaskedBlocks | Separated


def keep_memory() -> None:
    """Let the C library keep what one step frees for the next: giving it back and asking anew costs 5 % of a step."""
    if device().type == "cpu":
        malloc.thresholds(mmap=2**30, trim=2**31 - 1)


def why_not_compiled() -> str | None:
    """Return why torch.compile would fail here, at the first step and with pages of a compiler's messages, or None.

    On a CPU it writes C++; torch 2.13 names its own libraries to the linker without quotes.
    """
    if device().type != "cpu":
        return None
    compiler, place = os.environ.get("CXX", "g++"), str(Path(torch.__file__).parent)
    if not shutil.which(compiler):
        return f"on a CPU it needs the C++ compiler {compiler}, which is not installed"
    return f"on a CPU it cannot use a PyTorch whose path has a space ({place})" if " " in place else None


def prepare_model(base: Path, tokenizer: Path, params: Params, steps: int | None = None) -> Any:
    """Return the model to train: all weights trainable, or a frozen base with an adapter for `steps` steps."""
    if params.torch_compile and (reason := why_not_compiled()):
        raise SystemExit(f"torch_compile: {reason}; mend that, or set it to false.")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    keep_memory()
    start(params.seed)
    quantization = params.quantization.arguments() if params.quantization else None
    vocabulary = Vocabulary(tokenizer)
    model: Any = load_model(base, vocabulary.size, vocabulary.special_ids, quantization, tokenizer, params.objective)
    if quantization:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if params.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if params.lora:
        if params.gradient_checkpointing:
            model.enable_input_require_grads()
        model = adapters.add(model, params, steps or params.max_steps or 1, bool(new_tokens(base, tokenizer)))
    model = model if quantization else model.to(device())
    if quantization:
        check_quantised(model)
    if params.mask_documents:
        document_masks.check(model)
    loss_head.install(model)
    if params.torch_compile:
        loss_head.bare(model).base_model.compile(dynamic=False)
    return model


@torch.no_grad()
def check_quantised(model: Any) -> None:
    """Raise SystemExit when `model` cannot be run with its layers in 4 or 8 bits, as at its first step it would.

    Some architectures multiply by a layer's weight themselves, and so by packed bytes (Mamba); 8 bits take no input of
    four dimensions (DeepSeek V3).
    """
    try:
        with loss_head.in_eval_mode(model):
            model(input_ids=torch.zeros((1, 8), dtype=torch.long, device=device()))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model's own code raises
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SystemExit(
            f"quantization: {type(loss_head.bare(model)).__name__} cannot be run with its layers in these bits "
            f"({reason}); set the other of load_in_4bit and load_in_8bit, or leave quantization out."
        ) from None


def seen(folder: Path, tokenizer: Path, params: Params, model: Any = None) -> Data:
    """Return the blocks of one split as the objective shows them to `model`; without one, ids and labels are right."""
    vocabulary = Vocabulary(tokenizer)
    blocks: Data = seen_blocks.seen(folder, vocabulary, params.model_dump(), params.seed)
    if not params.mask_documents:
        return blocks
    table, bos = arrow.table(folder), vocabulary.special_ids.get("bos_token_id")
    document_masks.check_begins(table, arrow.manifest(folder)["counts"], bos)
    nothing = document_masks.Way(blocks.causal, mask=False, position_ids=False, first_position=0, boolean=False)
    return Separated(blocks, table, document_masks.way(model) if model else nothing, bos)


class Stream(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The blocks of all steps, one after the other, as `BlockOrder` says; a receipt is kept of each that was fed."""

    def __init__(self, blocks: Data, order: BlockOrder, length: int, chunked: bool = False) -> None:
        """`chunked`: loss_head computes the loss, and is told where."""
        self.blocks, self.order, self.length, self.chunked = blocks, order, length, chunked
        self.receipts: dict[int, bytes] = {}  # by position

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        """Return the blocks at these positions as one batch."""
        rows = [self.order.block(position) for position in positions]
        plain = self.blocks.blocks if isinstance(self.blocks, Separated) else self.blocks
        batch = plain.__getitems__(rows) if isinstance(plain, Blocks) else plain.at(rows, positions)
        # Of the blocks as they are stored: whoever checks a receipt needs not know whether documents were kept apart.
        ids, labels = (batch[name].numpy().astype("<i4") for name in ("input_ids", "labels"))
        for place, position in enumerate(positions):
            self.receipts[position] = block_receipt(rows[place], ids[place].tobytes(), labels[place].tobytes())
        if isinstance(self.blocks, Separated):
            batch = self.blocks.apart(batch, rows)
        if self.chunked:
            batch["learned"] = torch.from_numpy(loss_head.learned(batch["labels"].numpy(), self.blocks.causal))
        return batch


class Receipts:
    """The receipts of all steps so far, of which each process knows those of its own blocks."""

    def __init__(self, stream: Stream, global_batch_size: int) -> None:
        self.stream, self.size, self.steps = stream, global_batch_size, b""

    def up_to(self, step: int) -> bytes:
        """Return 16 bytes for each step from 1 to `step`. All processes must ask together."""
        first = len(self.steps) // RECEIPT_BYTES
        fed = self.stream.receipts
        if torch.distributed.is_initialized():
            parts: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, fed)
            fed = {position: receipt for part in parts for position, receipt in part.items()}
        for number in range(first, step):
            places = range(number * self.size, (number + 1) * self.size)
            self.steps += step_receipt(number + 1, (fed[place] for place in places))
        self.stream.receipts = {p: r for p, r in self.stream.receipts.items() if p >= step * self.size}
        return self.steps


class BlockTrainer(Trainer):
    """Trainer that feeds blocks in their frozen order and evaluates token by token."""

    def __init__(self, params: Params, **options: Any) -> None:
        # A model that keeps its own loss may take the mean of means of small batches, or their sum, or (BART, TrOCR)
        # not shift the labels, and so learn to repeat what it sees.
        self.chunked = loss_head.installed(options["model"])
        own: dict[str, Any] = {}
        if not self.chunked and params.objective == "mlm":
            own["compute_loss_func"] = masked_loss
        elif not self.chunked and not loss_head.counts_itself(options["model"]):
            own["compute_loss_func"] = causal_loss
        super().__init__(**own, **options)
        if own.get("compute_loss_func") is causal_loss:
            self._loss_shifts_labels = True  # so the first label of each block is not counted either
        self.params = params

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer: Any = self.optimizer or optimizers.create(self.model, self.params, self.args)
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        # All steps are one epoch to Trainer: epochs are arithmetic of the order, and no step is cut short between them.
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        # A step in which no token is learned has loss 0, not 0 / 0.
        items = super()._get_num_items_in_batch(batch_samples, device)
        return items.clamp(min=1) if isinstance(items, torch.Tensor) else items

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # Trainer's would count all parameters at each step

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Not as `save_pretrained` writes it: experts and some other weights have other names and shapes in its files,
        # and Trainer, which goes on from those, passes over what it does not find in the model without a word.
        if state_dict is None:
            if self.args.should_save:
                Path(str(output_dir)).mkdir(parents=True, exist_ok=True)
                torch.save(adapters.state(self.model), Path(str(output_dir), TRAINED))
        else:
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint, TRAINED)
        if path.is_file():
            adapters.restore(self.model, torch.load(path, map_location=device(), weights_only=True))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        # Of accelerate, FSDP would return losses of 16 bits, and DeepSpeed hold weights of 16 bits.
        bf16 = bool(distributed.sharing()) and self.params.bf16 and has_bf16()
        return torch.autocast(device().type, torch.bfloat16) if bf16 else nullcontext()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        loss = loss_head.mean_loss if self.chunked else mean_loss
        with self.autocast_smart_context_manager() if distributed.sharing() else self.accelerator.autocast():
            metrics = {"eval_loss": loss(self.model, self.eval_dataset, self.args.per_device_eval_batch_size)}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def masked_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Return the loss of the tokens that were to be guessed, over the number of them in the whole step."""
    logits = outputs.logits.float().flatten(0, 1)
    total = torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / num_items_in_batch


def causal_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Return the loss of each token from those before it, over the number of them in the whole step."""
    logits = outputs.logits[:, :-1].float().flatten(0, 1)
    wanted = labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
    return total / num_items_in_batch


class Reporter(TrainerCallback):
    """Prints a line now and then, stops on a loss that is no number, marks checkpoints as whole."""

    def __init__(self, name: str, tokens_per_step: int, receipts: Receipts) -> None:
        self.name, self.tokens_per_step, self.receipts = name, tokens_per_step, receipts
        self.first_step, self.started, self.spoken = 0, 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step, self.started = state.global_step, time.monotonic()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        adapters.allocate(model, state.global_step + 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        loss = logs.get("loss", logs.get("eval_loss"))
        norm = logs.get("grad_norm", 0.0)
        if loss is not None and not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"the norm of the gradients is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
            raise SystemExit(
                f"{self.name}: {what} at step {state.global_step}; lower learning_rate or max_grad_norm. "
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
        receipts = self.receipts.up_to(state.global_step)
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / RECEIPTS).write_bytes(receipts)
            (folder / MARKER).write_text(form(args))


class KeepBest(TrainerCallback):
    """Keeps the weights of the lowest evaluation loss, and stops when `patience` evaluations brought no lower one.

    What it knows stands in the history of losses, which each checkpoint holds; so a resumed run stops where an
    uninterrupted one does.
    """

    def __init__(self, name: str, patience: int | None) -> None:
        self.name, self.patience = name, patience

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        best, since = best_step(state.log_history)
        path = best_weights(args.output_dir, best)
        if best == state.global_step and args.should_save:
            torch.save(adapters.state(model), path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        if self.patience is not None and since >= self.patience and state.global_step < state.max_steps:
            print(
                f"{self.name}: the evaluation loss is not lower than at step {best} for {since} evaluations; "
                f"stopping at step {state.global_step}, the weights of step {best} are kept.",
                flush=True,
            )
            # No checkpoint here: a run that goes on from one would not know that it has stopped.
            control.should_training_stop, control.should_save = True, False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = best_weights(args.output_dir, best_step(state.log_history)[0])
        for path in Path(args.output_dir).glob("best-*.pt") if args.should_save else []:
            if path != kept:
                path.unlink()


def best_step(history: list[dict[str, float]]) -> tuple[int, int]:
    """Return the step of the lowest evaluation loss, and how many evaluations came after it."""
    losses = {int(row["step"]): row["eval_loss"] for row in history if "eval_loss" in row}
    best = min(losses, key=lambda step: (losses[step], step))
    return best, sum(step > best for step in losses)


def best_weights(folder: str, step: int) -> Path:
    """Return where the weights of the best evaluation stand."""
    return Path(folder, f"best-{step}.pt")


def form(settings: TrainingArguments) -> str:
    """Return what a checkpoint of these settings is made of, where only the same can go on from it."""
    if settings.deepspeed_plugin:
        return f"DeepSpeed ZeRO {settings.deepspeed_plugin.zero_stage}, {distributed.processes()} processes"
    return distributed.sharing()


def check_form(checkpoint: Path, settings: TrainingArguments) -> None:
    """Raise SystemExit when `checkpoint` was written otherwise: Trainer would go on without the optimizer's state."""
    theirs, ours = ((text or "whole models") for text in ((checkpoint / MARKER).read_text(), form(settings)))
    if theirs != ours:
        raise SystemExit(
            f"the checkpoints of this training are those of {theirs}, from which {ours} cannot go on; "
            f"start it as before, or remove {checkpoint.parent} to begin anew."
        )


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest whole checkpoint in `folder`, after removing those that a kill left half-written."""
    whole: list[Path] = []
    for path in folder.glob("checkpoint-*"):
        if (path / MARKER).exists():
            whole.append(path)
        else:
            shutil.rmtree(path)
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


class Trained(NamedTuple):
    """What a training leaves besides the model."""

    curves: Curves
    receipts: bytes
    steps: int
    notes: dict[str, int]
    sizes: dict[str, int]
    weights: dict[str, Any] | None = None  # where several processes hold a part of them each


def check(model: Any, blocks: Data, params: Params) -> None:
    """Raise SystemExit when the blocks are too long for the model or teach nothing, or the hardware lacks a dtype."""
    limit = max_positions(model)
    if limit is not None and blocks.block_size > limit:
        raise SystemExit(
            f"the blocks have {blocks.block_size:,} tokens but the model has positions for {limit:,}; "
            "lower group_blocks.block_size."
        )
    while not isinstance(blocks, Blocks):
        blocks = blocks.blocks
    if not blocks.learned():
        raise SystemExit(
            "no token of the training blocks is learned: every label is masked; see whether the conversations of this "
            "phase have assistant turns, and `--show 3`."
        )
    if params.fp16 and device().type == "cpu":
        raise SystemExit("fp16 needs a GPU: a CPU computes it slowly and has no loss scaling; use bf16, or neither.")


def check_parts(params: Params) -> None:
    """Raise SystemExit when `params` ask for what cannot be had where each process holds a part of the weights."""
    best = params.load_best_model_at_end or params.early_stopping_patience is not None
    if best or (params.lora and (params.lora.adalora or params.lora.changes_the_base)):
        raise SystemExit(
            "adalora, pissa, olora, load_best_model_at_end and early stopping need the whole weights in each process; "
            "leave FSDP and DeepSpeed out, or these."
        )
    # Muon and Adafactor look at matrices, 8 bits at blocks of values; bitsandbytes does not know FSDP's tensors.
    if params.fp16 or params.optim not in ("adamw_torch_fused", "adamw_torch", "sgd"):
        raise SystemExit(
            "FSDP and DeepSpeed train with optim adamw_torch_fused, adamw_torch or sgd here, and without fp16; "
            "take one of these, and bf16, or leave FSDP and DeepSpeed out."
        )


def has_bf16() -> bool:
    """Return whether this hardware multiplies bfloat16 matrices; elsewhere that is slower than float32."""
    if device().type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def arguments(
    params: Params, steps: int, work: Path, resumed: bool, name: str
) -> tuple[TrainingArguments, dict[str, int]]:
    """Return what Trainer needs to know, and notes on what this machine does otherwise than `params` say."""
    times = distributed.accumulation(
        params.global_batch_size, params.per_device_train_batch_size, distributed.processes()
    )
    notes = {}
    optim = optimizers.available(params.optim, device().type == "cuda")
    if optim != params.optim:
        print(f"{name}: {params.optim} needs a GPU; {optim} is used instead.", flush=True)
        notes["optimizer_without_pages"] = 1
    bf16 = params.bf16 and has_bf16()
    if bf16 != params.bf16:
        print(f"{name}: bf16 needs AVX512_BF16, AMX or a newer GPU; float32 is used instead.", flush=True)
        notes["float32_instead_of_bf16"] = 1
    taken = {
        "optim": "adamw_torch_fused" if optim == "muon" else optim,
        "bf16": bf16 and not distributed.sharing(),
        "gradient_accumulation_steps": times,
        "logging_steps": min(params.logging_steps, steps),  # the curve of a short training has its last step
    }
    ours = {
        "objective", "mlm_probability", "whole_word_mask", "num_train_epochs", "max_steps", "global_batch_size",
        "gradient_checkpointing", "optim", "bf16", "load_best_model_at_end", "early_stopping_patience", "lora",
        "quantization", "mask_documents", "torch_compile", "logging_steps",
    }  # fmt: skip
    settings = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        eval_strategy="steps",
        eval_on_start=not resumed,
        save_strategy="steps",
        save_total_limit=2,
        disable_tqdm=not sys.stderr.isatty(),
        logging_nan_inf_filter=False,  # it waits for the device at every step
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        use_cpu=device().type == "cpu",
        dataloader_pin_memory=device().type == "cuda",
        **taken,
        **params.model_dump(exclude=ours),
    )
    if settings.deepspeed_plugin:
        distributed.as_one_process(settings.deepspeed_plugin.deepspeed_config, bf16)
    return settings, notes


def train(
    model: Any,
    blocks: Data,
    held_out: Data,
    order: BlockOrder,
    steps: int,
    params: Params,
    work: Path,
    name: str,
) -> Trained:
    """Train `model` in place for `steps` optimizer steps, going on from a whole checkpoint in `work`.

    The curves: `train` rows with step, loss, learning_rate, grad_norm, and `eval` rows with step, loss; losses are nats
    per learned token.
    """
    check(model, blocks, params)
    checkpoint = last_checkpoint(work)
    settings, notes = arguments(params, steps, work, bool(checkpoint), name)
    stream = Stream(blocks, order, steps * params.global_batch_size, loss_head.installed(model))
    receipts = Receipts(stream, params.global_batch_size)
    callbacks: list[TrainerCallback] = [Reporter(name, params.global_batch_size * blocks.block_size, receipts)]
    best = params.load_best_model_at_end or params.early_stopping_patience is not None
    if best:
        callbacks.append(KeepBest(name, params.early_stopping_patience))
    trainer = BlockTrainer(
        params=params,
        model=model,
        args=settings,
        train_dataset=stream,
        eval_dataset=held_out,
        data_collator=lambda batch: batch,  # Blocks gives whole batches
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    sharded = trainer.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if sharded:
        check_parts(params)
    count = sizes(model)
    if checkpoint:
        check_form(Path(checkpoint), settings)
        print(f"{name}: going on from step {checkpoint.rsplit('-', 1)[1]}", flush=True)
        receipts.steps = Path(checkpoint, RECEIPTS).read_bytes()
    trainer.train(resume_from_checkpoint=checkpoint)  # evaluates after the last step, too
    done = trainer.state.global_step
    if best:
        step, _ = best_step(trainer.state.log_history)
        notes["best_step"] = step
        if step != done:
            state = torch.load(best_weights(str(work), step), map_location=device(), weights_only=True)
            adapters.restore(model, state)
    curves = {
        "train": _curve(trainer.state.log_history, "loss", "learning_rate", "grad_norm"),
        "eval": _curve(trainer.state.log_history, "eval_loss"),
    }
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    return Trained(curves, receipts.up_to(done), done, notes, count, weights)


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


def save(
    model: Any,
    tokenizer: Path,
    base: Path,
    params: Params,
    folder: Path,
    weights: dict[str, Any] | None = None,
    steps: int = 0,
) -> None:
    """Write the model, or its adapter, and the tokenizer into `folder`, the same bytes for the same weights.

    training.json says what an adapter needs to be loaded as it was trained, its base and the base's quantization, and
    how much was shown: steps, and blocks with repetitions.
    """
    adapters.save(model, folder, weights)
    masked = {"objective", "mlm_probability", "whole_word_mask"} if params.objective == "mlm" else set()
    quantization = params.quantization.arguments() if params.quantization else None
    about = {"base": str(base), "quantization": quantization, **params.model_dump(include=masked)}
    about |= {"steps": steps, "blocks": steps * params.global_batch_size}
    arrow.write_json(folder / "training.json", about)
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
    """Write train.csv, eval.csv and learning_rate.csv for `dvc plots`, which draws one curve of a file."""
    rates = [{"step": row["step"], "learning_rate": row["learning_rate"]} for row in curves["train"]]
    for name, rows in {**curves, "learning_rate": rates}.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
