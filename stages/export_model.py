"""Write a merged model in fewer bits, with its tokenizer and card: a folder to serve or to give away.

Reads:  models/PHASE/merged, models/PHASE/trained/training.json, data/blocks/PHASE/eval, reports/PHASE/model_card.md
Writes: models/exports/NAME   a model folder that transformers opens, the card as README.md
Params: exports.NAME

Example, the two lines in params.yaml and what `dvc metrics show` then says of the default's chat model:

    exports:
      chat_nf4: {phase: chat, format: nf4}      ->  eval_loss_bf16, eval_loss, mebibytes_merged, mebibytes

The loss is that of the held-out blocks, of the model in bfloat16 and of the folder as it was written, opened anew. To
put it on the Hub: `hf upload OWNER/NAME models/exports/chat_nf4`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kit import arrow, stage
from kit.params import read_params
from kit.tokenizer import Vocabulary
from merge_lora import held_out

BITSANDBYTES: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
}
NOT_CARRIED = ("config.json", "generation_config.json", "README.md")  # written anew


class Params(BaseModel):
    """`exports.NAME`: which model, in how many bits."""

    model_config = ConfigDict(extra="forbid")

    phase: str = Field(description="the phase whose merged model is written, a key of `phases`")
    format: Literal["bf16", "int8", "nf4", "torchao_int8"] = Field(
        description="bf16: 16 bits; int8, nf4: matrices in 8 or 4 bits by bitsandbytes; torchao_int8: in 8 by torchao, "
        "an extra package"
    )


def options(bits: str) -> dict[str, Any]:
    """Return what `from_pretrained` needs to quantise. Raises SystemExit when a package is missing."""
    from kit.model import device

    if bits == "bf16":
        return {}
    if bits in BITSANDBYTES:
        from transformers import BitsAndBytesConfig

        return {"quantization_config": BitsAndBytesConfig(**BITSANDBYTES[bits]), "device_map": {"": device()}}
    try:
        from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-not-found, unused-ignore]
    except ModuleNotFoundError:
        raise SystemExit("the format torchao_int8 needs torchao: pip install '.[export]', or take int8.") from None
    from transformers import TorchAoConfig

    return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()), "device_map": {"": device()}}


def load(folder: Path, **given: Any) -> Any:
    """Return the model of a folder as those see it who serve it: its own dtypes, or bfloat16 and `given`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    from kit.model import objective

    auto = AutoModelForMaskedLM if objective(folder) == "mlm" else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.bfloat16, **given).eval()


def megabytes(folder: Path) -> float:
    """Return the size of the weights of a model folder in MiB."""
    return round(sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**20, 2)


def main(name: str) -> None:
    params = read_params(f"exports.{name}", Params)
    merged, blocks = Path("models", params.phase, "merged"), Path("data/blocks", params.phase, "eval")
    about, card = Path("models", params.phase, "trained/training.json"), Path("reports", params.phase, "model_card.md")
    inputs = [str(path) for path in (merged, blocks, about, card)]
    with stage.run("export_model", name, inputs, [f"models/exports/{name}"]) as run:
        from kit.model import device, mean_loss, start

        (folder,) = run.outputs
        start(0)
        model = load(merged, **options(params.format))
        changed = "bitsandbytes" if params.format in BITSANDBYTES else "torchao"
        kinds = {type(part).__module__ for module in model.modules() for part in (module, *module.parameters(False))}
        if params.format != "bf16" and not any(changed in kind for kind in kinds):
            raise SystemExit(f"{merged} has no layer that can be quantised; export it as bf16.")
        model.save_pretrained(folder)
        for path in sorted(merged.iterdir()):
            if path.name not in NOT_CARRIED and ".safetensors" not in path.name:
                shutil.copyfile(path, folder / path.name)
        shutil.copyfile(card, folder / "README.md")
        del model
        held = held_out(blocks, Vocabulary(merged), arrow.read_json(about))
        for key, written in (("eval_loss_bf16", merged), ("eval_loss", folder)):
            run.metric(**{key: round(mean_loss(load(written, device_map={"": device()}), held, 8), 6)})
        run.metric(mebibytes_merged=megabytes(merged), mebibytes=megabytes(folder))


if __name__ == "__main__":
    stage.cli(main, __doc__)
