"""Train the model of a phase on its blocks: all weights, or an adapter on a frozen base.

Reads:  data/blocks/PHASE, models/tokenizers/PHASE, the phase's `base` folder
Writes: models/PHASE/trained          a whole model, or an adapter, with the tokenizer beside it
        models/PHASE/trained/receipts.bin   16 bytes a step that prove what was fed: see block_order.py
        plots/PHASE/train.csv, eval.csv   loss, learning rate and gradient norm by step
        plots/PHASE/learning_rate.csv
Params: phases.PHASE.train_model (the keys of TrainingArguments, LoraConfig and BitsAndBytesConfig)

A base that is a config.json alone starts from random weights, anything else goes on from its own. With `lora` only the
adapter is trained, with `quantization` on a base held in 4 or 8 bits (QLoRA). `objective: mlm` trains a masked model
(stages/masking.py). `python stages/train_model.py PHASE --show 3` prints three blocks, what is learned in [brackets];
`--plan` prints parameters, steps and memory, and refuses what cannot fit. With NUM_PROCESSES or ACCELERATE_CONFIG_FILE
in the environment several processes train (docs/accelerate).

Example: 1,000 blocks of 256, global_batch_size 16, num_train_epochs 1 -> 63 steps of 4,096 tokens; the last step takes
its 8 missing blocks from the beginning of the next epoch, so that every step has the same shape.

Checkpoints stand in .work/train_model@PHASE/<key of all inputs>: a run that was killed goes on from the last whole one,
bit for bit on a CPU, and a run with any other input, parameter or code begins anew.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

import distributed
from adapter_params import Lora, Quantization
from block_order import BlockOrder
from kit import arrow, stage
from kit.params import Phase, read_params
from kit.tokenizer import Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from plan import Plan


# What each schedule of transformers takes in lr_scheduler_kwargs; of a second list it needs exactly one.
SCHEDULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": ((), ()),
    "cosine": (("num_cycles",), ()),
    "cosine_with_restarts": (("num_cycles",), ()),
    "polynomial": (("lr_end", "power"), ()),
    "constant": ((), ()),
    "constant_with_warmup": ((), ()),
    "inverse_sqrt": (("timescale",), ()),
    "reduce_lr_on_plateau": (
        ("mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lr", "eps"),
        (),
    ),
    "cosine_with_min_lr": (("num_cycles", "min_lr", "min_lr_rate"), ("min_lr", "min_lr_rate")),
    "cosine_warmup_with_min_lr": (
        ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
        ("min_lr", "min_lr_rate"),
    ),
    "warmup_stable_decay": (
        ("num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"),
        ("num_decay_steps",),
    ),
}
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau")


class Params(BaseModel):
    """`phases.PHASE.train_model`: how long, how fast, which weights. Names as in transformers' TrainingArguments."""

    model_config = ConfigDict(extra="forbid")

    objective: Literal["clm", "mlm"] = Field(
        "clm", description="clm: each token from those before it; mlm: masked tokens from those around them (BERT)"
    )
    mlm_probability: float = Field(0.15, gt=0, lt=1, description="mlm: share of the words that are to be guessed")
    whole_word_mask: bool = Field(False, description="mlm: all tokens of a word or none; see stages/masking.py")
    num_train_epochs: float | None = Field(None, gt=0, description="times that every block is shown; or `max_steps`")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; or `num_train_epochs`")
    global_batch_size: int = Field(16, ge=1, description="blocks in an optimizer step")
    per_device_train_batch_size: int = Field(16, ge=1, description="blocks computed at once; the rest is accumulated")
    per_device_eval_batch_size: int = Field(16, ge=1, description="blocks computed at once in evaluation")
    optim: Literal[
        "adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop", "ademamix", "ademamix_8bit",
        "adamw_bnb_8bit", "lion_8bit", "lion_32bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
        "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit",
        "paged_lion_8bit", "muon",
    ] = Field(
        "adamw_torch_fused",
        description="the optimizer; paged: its state moves to the host when the GPU is full, without a GPU the same "
        "one without pages is taken. muon: orthogonalised updates for the weight matrices, AdamW for embeddings and "
        "norms, for training from random weights",
    )  # fmt: skip
    learning_rate: float = Field(gt=0, description="the highest of the schedule")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
        "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
    ] = Field("cosine", description="course of the learning rate after the warm-up")  # fmt: skip
    lr_scheduler_kwargs: dict[str, float | int | str] = Field(
        {}, description="arguments of the schedule, e.g. {min_lr_rate: 0.1} of cosine_with_min_lr"
    )
    warmup_steps: float = Field(
        0, ge=0, description="steps over which the learning rate rises from 0; below 1: that share of all steps"
    )
    weight_decay: float = Field(0.0, ge=0, description="of AdamW, not on biases and norms")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="of AdamW")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    fp16: bool = Field(False, description="16 bit floats with loss scaling, on a GPU")
    bf16: bool = Field(
        False, description="bfloat16 matmuls, where the hardware has them; elsewhere float32, and a line says so"
    )
    gradient_checkpointing: bool = Field(False, description="compute activations twice, hold fewer")
    torch_compile: bool = Field(
        False,
        description="fuse the small operations of the layers; takes a minute at the start, for a GPU or a long run",
    )
    logging_steps: int = Field(10, ge=1, description="steps between two points of the training curve")
    eval_steps: int = Field(50, ge=1, description="steps between two points of the evaluation curve")
    save_steps: int = Field(100, ge=1, description="steps between two checkpoints")
    load_best_model_at_end: bool = Field(False, description="publish the weights of the lowest evaluation loss")
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="stop after so many evaluations without a lower loss, and publish the weights of the lowest",
    )
    seed: int = Field(0, ge=0, description="of random weights, block order and dropout")
    mask_documents: bool = Field(
        False,
        description="documents that share a block do not see each other, and the first token of each is not learned; "
        "for group_blocks.mode best_fit",
    )
    lora: Lora | None = Field(None, description="train an adapter; null trains all weights")
    quantization: Quantization | None = Field(None, description="base in 4 or 8 bits; needs `lora`")

    @model_validator(mode="after")
    def _schedule(self) -> Params:
        name, given = self.lr_scheduler_type, self.lr_scheduler_kwargs
        known, needed = SCHEDULES[name]
        if strangers := sorted(given.keys() - set(known)):
            raise ValueError(
                f"lr_scheduler_kwargs names {strangers[0]}, which the schedule {name} does not know; "
                f"it knows {', '.join(known) or 'none'}"
            )
        if needed and len(given.keys() & set(needed)) != 1:
            one = f"one of {' and '.join(needed)}" if len(needed) > 1 else needed[0]
            raise ValueError(f"the schedule {name} needs {one} in lr_scheduler_kwargs")
        if name in WITHOUT_WARMUP and self.warmup_steps:
            other = ", or take constant_with_warmup" if name == "constant" else ""
            raise ValueError(f"the schedule {name} has no warm-up; leave warmup_steps out{other}")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise ValueError("give either `max_steps` or `num_train_epochs`")
        if self.global_batch_size % self.per_device_train_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is no multiple of per_device_train_batch_size "
                f"{self.per_device_train_batch_size}; change one of them"
            )
        if self.save_steps % self.logging_steps:
            raise ValueError(
                f"save_steps {self.save_steps} is no multiple of logging_steps {self.logging_steps}, so a resumed run "
                "could not continue the curve; change one of them"
            )
        if self.optim == "muon" and self.lora:
            raise ValueError("optim muon is for weights trained from random ones; use adamw_torch_fused with `lora`")
        if self.quantization and not self.lora:
            raise ValueError("a quantised base cannot be trained itself: add `lora`")
        if self.quantization and self.lora and self.lora.changes_the_base:
            raise ValueError(
                f"init_lora_weights {self.lora.init_lora_weights} takes the matrices out of the base, which a "
                "quantised one does not allow; leave `quantization` or init_lora_weights out"
            )
        if self.quantization and self.quantization.load_in_8bit and self.lora and self.lora.use_dora:
            raise ValueError(
                "use_dora does not work on a base in 8 bits (bitsandbytes 0.50); hold it in 4, or leave it out"
            )
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16 exclude each other")
        adalora = self.lora and self.lora.adalora
        if adalora and self.max_steps is not None and adalora.tinit + adalora.tfinal >= self.max_steps:
            raise ValueError(
                f"lora.adalora: tinit {adalora.tinit} and tfinal {adalora.tfinal} leave none of {self.max_steps} steps "
                "in which ranks are taken away"
            )
        return self


def total_steps(params: Params, n_blocks: int) -> int:
    """Return the number of optimizer steps: `max_steps`, or enough to show each block `num_train_epochs` times.

    >>> total_steps(Params(num_train_epochs=1, global_batch_size=16, learning_rate=1e-3), 1000)
    63
    """
    if params.max_steps is not None:
        return params.max_steps
    assert params.num_train_epochs is not None
    return -(-round(params.num_train_epochs * n_blocks) // params.global_batch_size)


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as one can read it: as the vocabulary spells it, or its text where that is not ASCII.

    Of byte-level tokens that is 法 instead of æ³ķ; half a character stays as it is spelled.
    """
    text = tokenizer.decode([token], skip_special_tokens=False)
    return str(tokenizer.id_to_token(token)) if text.isascii() or "\ufffd" in text else text


def examples(blocks: Any, order: BlockOrder, vocabulary: Vocabulary, number: int) -> Iterator[str]:
    """Yield the first blocks of the order as text, token by token: [learned], or what stands there [seen -> learned].

    A causal model learns a token from those before it, so the first one of a block is never learned.
    """
    from kit.model import IGNORED

    for position in range(min(number, order.n_blocks)):
        block = order.block(position)
        batch = blocks.at([block], [position]) if hasattr(blocks, "at") else blocks.__getitems__([block])
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        if blocks.causal:
            labels[0] = IGNORED
        words = []
        for seen, label in zip(ids, labels, strict=True):
            here, wanted = (spelled(vocabulary.tokenizer, number) for number in (seen, max(label, 0)))
            words.append(here if label < 0 else f"[{here}]" if seen == label else f"[{here} -> {wanted}]")
        yield f"block {block}: {len(ids)} tokens, {sum(label >= 0 for label in labels)} learned\n{' '.join(words)}\n"


def needs(base: Path, tokenizer: Path, blocks: Path, params: Params) -> Plan:
    """Return what a training will need."""
    import plan

    table = arrow.table(blocks)
    block_size = table.schema.field("input_ids").type.list_size
    return plan.make(base, tokenizer, params, block_size, total_steps(params, len(table)))


def compute(
    phase: str, base: Path, params: Params, outputs: list[Path], checkpoints: Path, name: str
) -> dict[str, Any]:
    """Train in this process and write the model and the curves; return the counts and metrics of the run record."""
    import train_loop  # torch and transformers: 5 seconds that `--help` and a misspelt key do not wait for

    model_folder, plots = outputs
    blocks, tokenizer = Path("data/blocks", phase), Path("models/tokenizers", phase)
    n_blocks = len(arrow.table(blocks / "train"))
    steps = total_steps(params, n_blocks)
    if distributed.processes() == 1:
        needs(base, tokenizer, blocks / "train", params).refuse()
    model = train_loop.prepare_model(base, tokenizer, params, steps)
    train, held_out = (train_loop.seen(blocks / split, tokenizer, params, model) for split in ("train", "eval"))
    trained = train_loop.train(
        model, train, held_out, BlockOrder(n_blocks, params.seed), steps, params, checkpoints, name
    )
    if distributed.first():
        train_loop.save(model, tokenizer, base, params, model_folder, trained.weights, trained.steps)
        (model_folder / train_loop.RECEIPTS).write_bytes(trained.receipts)
        train_loop.write_curves(trained.curves, plots)
    tokens = trained.steps * params.global_batch_size * train.block_size
    counts = {"steps": trained.steps, "tokens": tokens, **trained.sizes}
    return {"counts": counts, "metrics": {**train_loop.last_losses(trained.curves), **trained.notes}}


def _blocks(text: str) -> int:
    """Return the N of `--show N`. Raises ValueError below 1: without blocks to show it would train."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def main(phase: str, show: int = 0, plan: bool = False) -> None:
    params = read_params(f"phases.{phase}.train_model", Params)
    base = Path(read_params(f"phases.{phase}", Phase).base)
    blocks, tokenizer = Path("data/blocks", phase), Path("models/tokenizers", phase)
    if show:
        import train_loop

        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
        train = train_loop.seen(blocks / "train", tokenizer, params)
        print(*examples(train, BlockOrder(len(train), params.seed), Vocabulary(tokenizer), show), sep="\n")
        return
    if plan:
        needed = needs(base, tokenizer, blocks / "train", params)
        print(needed)
        needed.refuse()
        return
    if told := distributed.worker():  # the stage that started it holds the lock, checks the inputs and publishes
        if not distributed.first():
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (to the end of the process)
        found = compute(phase, base, params, [Path(path) for path in told["outputs"]], Path(told["work"]), told["name"])
        distributed.finish(Path(told["work"]), found)
    inputs = [str(blocks), str(tokenizer), str(base)]
    with stage.run("train_model", phase, inputs, [f"models/{phase}/trained", f"plots/{phase}"]) as run:
        checkpoints = run.work_folder(params.model_dump())
        if distributed.wanted():
            # Here, for each worker would say the same.
            rows, world = params.per_device_train_batch_size, distributed.processes()
            distributed.accumulation(params.global_batch_size, rows, world)
            told = {"outputs": [str(path) for path in run.outputs], "work": str(checkpoints), "name": run.name}
            done = distributed.train(run.name, checkpoints, told, __file__, phase)
        else:
            done = compute(phase, base, params, run.outputs, checkpoints, run.name)
        run.count(**done["counts"])
        run.metric(**done["metrics"])
    shutil.rmtree(checkpoints.parent)  # only now: a kill before the model is published must not cost the training


if __name__ == "__main__":
    stage.cli(main, __doc__, show=_blocks, plan=None)
