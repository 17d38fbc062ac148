"""Merge an adapter into its base: a model of the base's structure, proven to compute the same.

Reads:  models/PHASE/trained, the phase's `base` folder, data/blocks/PHASE/eval
Writes: models/PHASE/merged   a whole model with its tokenizer; a phase without an adapter passes through
Params: phases.PHASE.merge_lora (what is merged, the adapter's own settings decide)

For a layer with weight W and adapter B A, merged is W + lora_alpha / r * (B A): Hu et al., "LoRA", 2021, section 4.1.

Example: W = [[1, 0], [0, 1]], A = [[1, 1]], B = [[1], [0]], r 1, lora_alpha 2   ->   [[3, 2], [0, 1]]

The files are written tensor by tensor (stages/merge_weights.py), so one weight at a time is in memory. The proof: base
+ adapter and merged model see the same held-out blocks; when their logits differ by more than TOLERANCE, or by half as
much as the adapter changed them, nothing is published.

An adapter that was trained on 4 bits can be merged into the weights as they were before (`base: original`) or as it saw
them (`dequantized`). Which is better is a matter of the text, so the eval loss of both is measured.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

import seen_blocks
from kit import arrow, stage
from kit.base import tensors, weight_files
from kit.params import Phase, read_params
from kit.tokenizer import Vocabulary

if TYPE_CHECKING:
    import torch

# Of the largest difference of logits, over the largest logit where that is beyond 1. float32: rounding alone gives some
# 1e-5. The others round each merged weight to 11 or 8 bits.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
PROOF_BLOCKS = 4
TRAINING = ("training.json", "receipts.bin", "README.md")  # of the training, not of the model


class Params(BaseModel):
    """`phases.PHASE.merge_lora`: what the adapter is added to."""

    model_config = ConfigDict(extra="forbid")

    base: Literal["original", "dequantized"] = Field(
        "original",
        description="of an adapter trained with `quantization`. original: the base's own weights; dequantized: what "
        "4 bits left of them, as the adapter saw them",
    )


def stop_at(folder: Path, end: int) -> None:
    """Let generation stop at the id `end`, too: a chat template may end answers with a token that is new to a base."""
    path = folder / "generation_config.json"
    config = arrow.read_json(path if path.is_file() else folder / "config.json")
    ends = config.get("eos_token_id")
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if end not in known:
        kept = (
            config
            if path.is_file()
            else {key: config[key] for key in ("bos_token_id", "pad_token_id") if key in config}
        )
        arrow.write_json(path, {**kept, "eos_token_id": [end, *known]})


def load(folder: Path, vocabulary: Vocabulary, quantization: dict[str, Any] | None = None) -> Any:
    """Return the model of a folder in float32, or what `quantization` leaves of it."""
    from kit.model import load_model

    if quantization:  # the matrices of 4 bits, computed with in float32: as exact as the merged model
        quantization = {**quantization, "bnb_4bit_compute_dtype": "float32"}
    return load_model(folder, vocabulary.size, vocabulary.special_ids, quantization, vocabulary.folder)


def look(model: Any, blocks: Any) -> tuple[torch.Tensor, float]:
    """Return the logits of the first blocks and the mean loss of all."""
    import torch

    from kit.model import mean_loss

    model.eval()
    batch = blocks.__getitems__(list(range(min(PROOF_BLOCKS, len(blocks)))))
    inputs = {name: values.to(model.device) for name, values in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**inputs).logits.float().cpu()
    return logits, mean_loss(model, blocks, 16)


def prove(
    base: Path, adapter: Path, merged: Path, blocks: Any, quantization: dict[str, Any] | None, dtype: str
) -> dict[str, float]:
    """Return how far the logits, and the eval loss, of the merged model are from those of base + adapter.

    `quantization` is that of the base in the comparison, `dtype` the one the merged model is stored in. Raises
    ValueError when the difference is beyond TOLERANCE[dtype], or half as large as what the adapter does.
    """
    from peft import PeftModel

    vocabulary = Vocabulary(merged)
    model = PeftModel.from_pretrained(load(base, vocabulary, quantization), str(adapter))
    before, loss_before = look(model, blocks)
    with model.disable_adapter():
        plain, _ = look(model, blocks)
    del model
    after, loss_after = look(load(merged, vocabulary), blocks)
    difference = (before - after).abs()
    worst, mean, effect = float(difference.max()), float(difference.mean()), float((before - plain).abs().mean())
    tolerance = TOLERANCE[dtype] * max(1.0, float(before.abs().max()))
    if not worst <= tolerance:
        raise ValueError(
            f"the merged model's logits differ by {worst:.2e} from base + adapter, more than {tolerance:.2e}; "
            "nothing was published."
        )
    if worst > TOLERANCE["float32"] and mean > effect / 2:
        raise ValueError(
            f"of what the adapter does ({effect:.2e} in the mean logit) {mean:.2e} is lost in the rounding of the "
            f"merged weights to {dtype}; train longer, or convert the base to float32; nothing was published."
        )
    return {
        "logit_difference_max": worst,
        "logit_difference_mean": mean,
        "logit_effect_mean": effect,
        "eval_loss_adapter": round(loss_before, 6),
        "eval_loss_merged": round(loss_after, 6),
    }


def stored_dtype(folder: Path) -> str:
    """Return the coarsest dtype among the weights of a model folder."""
    from merge_weights import DTYPES

    found = {entry["dtype"] for file in weight_files(folder) for entry in tensors(file)[1].values()}
    names = {str(DTYPES[each]).removeprefix("torch.") for each in found if each in DTYPES}
    return next((each for each in ("bfloat16", "float16") if each in names), "float32")


def main(phase: str) -> None:
    params = read_params(f"phases.{phase}.merge_lora", Params)
    base, trained = Path(read_params(f"phases.{phase}", Phase).base), Path("models", phase, "trained")
    blocks = Path("data/blocks", phase, "eval")
    with stage.run("merge_lora", phase, [str(base), str(trained), str(blocks)], [f"models/{phase}/merged"]) as run:
        (folder,) = run.outputs
        if not (trained / "adapter_config.json").is_file():
            carry(trained, folder)
            run.count(merged_tensors=0)
            return
        from kit.model import mean_loss, start  # first: it says that nothing is to be fetched

        # isort: split
        from merge_weights import merge

        start(0)
        about = arrow.read_json(trained / "training.json")
        quantization = about["quantization"] or {}
        in_4_bits = bool(quantization.get("load_in_4bit"))
        if params.base == "dequantized" and not in_4_bits:
            raise SystemExit(
                f"phases.{phase}.merge_lora.base is dequantized, but the adapter was not trained on 4 bits; "
                "set it to original."
            )
        seen = quantization if params.base == "dequantized" else None
        run.count(merged_tensors=merge(base, trained, folder, seen))
        carry(trained, folder)
        vocabulary = Vocabulary(folder)
        stop_at(folder, vocabulary.special_ids["eos_token_id"])
        held = seen_blocks.seen(blocks, vocabulary, about)
        run.metric(**prove(base, trained, folder, held, seen, stored_dtype(base)))
        if in_4_bits:
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-other-") as name:
                merge(base, trained, Path(name), None if seen else quantization)
                loss = round(mean_loss(load(Path(name), vocabulary), held, 16), 6)
            losses = [loss, run.metrics["eval_loss_merged"]]
            original, dequantized = losses if seen else losses[::-1]
            run.metric(eval_loss_merged_original=original, eval_loss_merged_dequantized=dequantized)


def carry(trained: Path, folder: Path) -> None:
    """Copy what is no adapter, tokenizer and chat template or a whole model, from `trained` into `folder`."""
    for path in sorted(trained.iterdir()):
        if not path.name.startswith("adapter_") and path.name not in TRAINING:
            arrow.copy(path, folder / path.name)


if __name__ == "__main__":
    stage.cli(main, __doc__)
