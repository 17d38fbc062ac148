"""Train the model of a phase on its blocks: all weights, or an adapter on a frozen base.

Reads:  data/blocks/PHASE, models/tokenizers/PHASE, the phase's `base` folder
Writes: models/PHASE/trained          a whole model, or an adapter, with the tokenizer beside it
        plots/PHASE/train.csv, eval.csv   loss, learning rate and gradient norm by step
Params: phases.PHASE.train_model (the keys of TrainingArguments, LoraConfig and BitsAndBytesConfig)

A base that is a config.json alone starts from random weights, anything else goes on from its own. With `lora` only the
adapter is trained, with `quantization` on a base held in 4 bits (QLoRA).

Example: 1,000 blocks of 256, global_batch_size 16, num_train_epochs 1 -> 63 steps of 4,096 tokens; the last step takes
its 8 missing blocks from the beginning of the next epoch, so that every step has the same shape.

Checkpoints stand in .work/train_model@PHASE/<key of all inputs>: a run that was killed goes on from the last whole one,
bit for bit on a CPU, and a run with any other input, parameter or code begins anew.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from block_order import BlockOrder
from kit import arrow, stage
from kit.params import Phase, read_params


class Lora(BaseModel):
    """Arguments of peft's LoraConfig."""

    model_config = ConfigDict(extra="forbid")

    r: int = Field(8, ge=1, description="rank of the two added matrices")
    lora_alpha: int = Field(16, ge=1, description="their product is scaled by lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the first matrix")
    target_modules: list[str] | Literal["all-linear"] = Field(description="names of the layers, or `all-linear`")


class Quantization(BaseModel):
    """Arguments of transformers' BitsAndBytesConfig."""

    model_config = ConfigDict(extra="forbid")

    load_in_4bit: Literal[True] = Field(True, description="hold the base in 4 bits")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="nf4: quantiles of a normal distribution")
    bnb_4bit_use_double_quant: bool = Field(True, description="quantise the scales too, 0.4 bits a weight less")
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="dtype of matmuls"
    )


class Params(BaseModel):
    """`phases.PHASE.train_model`: how long, how fast, which weights. Names as in transformers' TrainingArguments."""

    model_config = ConfigDict(extra="forbid")

    num_train_epochs: float | None = Field(None, gt=0, description="times that every block is shown; or `max_steps`")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; or `num_train_epochs`")
    global_batch_size: int = Field(16, ge=1, description="blocks in an optimizer step")
    per_device_train_batch_size: int = Field(16, ge=1, description="blocks computed at once; the rest is accumulated")
    per_device_eval_batch_size: int = Field(16, ge=1, description="blocks computed at once in evaluation")
    optim: Literal["adamw_torch_fused", "muon"] = Field(
        "adamw_torch_fused",
        description="muon: orthogonalised updates for the weight matrices, AdamW for embeddings and norms; "
        "for training from random weights",
    )
    learning_rate: float = Field(gt=0, description="the highest of the schedule")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "cosine", description="course of the learning rate after the warm-up"
    )
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises from 0")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW, not on biases and norms")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="of AdamW")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    gradient_checkpointing: bool = Field(False, description="compute activations twice, hold fewer")
    logging_steps: int = Field(10, ge=1, description="steps between two points of the training curve")
    eval_steps: int = Field(50, ge=1, description="steps between two points of the evaluation curve")
    save_steps: int = Field(100, ge=1, description="steps between two checkpoints")
    seed: int = Field(0, ge=0, description="of random weights, block order and dropout")
    lora: Lora | None = Field(None, description="train an adapter; null trains all weights")
    quantization: Quantization | None = Field(None, description="base in 4 bits; needs `lora`")

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise ValueError("give either `max_steps` or `num_train_epochs`")
        if self.global_batch_size % self.per_device_train_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is no multiple of per_device_train_batch_size "
                f"{self.per_device_train_batch_size}"
            )
        if self.save_steps % self.logging_steps:
            raise ValueError(
                f"save_steps {self.save_steps} is no multiple of logging_steps {self.logging_steps}: "
                "a resumed run could not continue the curve"
            )
        if self.optim == "muon" and self.lora:
            raise ValueError("optim muon is for weights trained from random ones; use adamw_torch_fused with `lora`")
        if self.quantization and not self.lora:
            raise ValueError("a quantised base cannot be trained itself: add `lora`")
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


def main(phase: str) -> None:
    params = read_params(f"phases.{phase}.train_model", Params)
    base = Path(read_params(f"phases.{phase}", Phase).base)
    blocks, tokenizer = Path("data/blocks", phase), Path("models/tokenizers", phase)
    inputs = [str(blocks), str(tokenizer), str(base)]
    with stage.run("train_model", phase, inputs, [f"models/{phase}/trained", f"plots/{phase}"]) as run:
        import train_loop  # torch and transformers: 5 seconds that `--help` and a misspelt key do not wait for

        model_folder, plots = run.outputs
        train, held_out = (
            train_loop.Blocks(arrow.table(blocks / split), arrow.manifest(blocks / split)["counts"]["tokens"])
            for split in ("train", "eval")
        )
        model = train_loop.prepare_model(base, tokenizer, params)
        steps = total_steps(params, len(train))
        order = BlockOrder(len(train), params.seed)
        checkpoints = run.work_folder(params.model_dump())
        curves = train_loop.train(model, train, held_out, order, steps, params, checkpoints, run.name)
        train_loop.save(model, tokenizer, base, params, model_folder)
        train_loop.write_curves(curves, plots)
        tokens = steps * params.global_batch_size * train.block_size
        run.count(steps=steps, tokens=tokens, **train_loop.sizes(model))
        run.metric(**train_loop.last_losses(curves))
    shutil.rmtree(checkpoints.parent)  # only now: a kill before the model is published must not cost the training


if __name__ == "__main__":
    stage.cli(main, __doc__)
