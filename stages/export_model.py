"""Write a merged model in fewer bits, with its tokenizer and card: a folder to serve or to give away.

Reads:  models/PHASE/merged, models/PHASE/trained/training.json, data/blocks/PHASE/eval, reports/PHASE/model_card.md
Writes: models/exports/NAME   a model folder that transformers opens, or model.gguf for llama.cpp; the card as README.md
Params: exports.NAME

Example, two entries in params.yaml and what `dvc metrics show` then says of the default's chat model:

    exports:
      chat_nf4: {phase: chat, format: nf4}      ->  eval_loss_bf16, eval_loss, mebibytes_merged, mebibytes
      chat_gguf: {phase: chat, format: gguf_q8_0}

The loss is that of the held-out blocks, of the model in bfloat16 and of the folder as it was written, opened anew: a
GGUF by llama.cpp, where llama-cpp-python is installed. What has been exported goes to the Hub, as a private repository
with the card as its page, by `python stages/export_model.py chat_nf4 --push OWNER/REPOSITORY`.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

import gguf_check
import gguf_file
import seen_blocks
from kit import arrow, stage
from kit.params import read_params
from kit.tokenizer import Vocabulary

# What is given away computes in bfloat16, as it will be served; `quantized` of evaluate_model computes in float32, so
# that its scores differ by the weights alone.
BITSANDBYTES: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
}
NOT_CARRIED = ("config.json", "generation_config.json", "README.md")  # written anew


class Params(BaseModel):
    """`exports.NAME`: which model, in how many bits."""

    model_config = ConfigDict(extra="forbid")

    phase: str = Field(description="the phase whose merged model is written, a key of `phases`")
    format: Literal["bf16", "int8", "nf4", "torchao_int8", "gguf_bf16", "gguf_f16", "gguf_q8_0"] = Field(
        description="bf16: 16 bits; int8, nf4: matrices in 8 or 4 bits by bitsandbytes; torchao_int8: in 8 by torchao, "
        "an extra package; gguf_...: one file for llama.cpp, matrices in 16 bits or in 8 (q8_0), extra package gguf"
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

    from kit.model import objective, without_repacking

    auto = AutoModelForMaskedLM if objective(folder) == "mlm" else AutoModelForCausalLM
    model, found = auto.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True, **given)
    if missing := sorted(found["missing_keys"]):  # transformers draws them at random
        raise ValueError(f"transformers, which wrote it, finds no {missing[0]} in it")
    without_repacking(model.eval())
    return model


def loss_of(folder: Path, bits: str, held: Any) -> float:
    """Return the loss of an export, opened anew: nats per token. Raises SystemExit when it is of no use.

    bitsandbytes' layers do not suit every architecture: Mamba multiplies by the packed bytes, int8 takes no four
    dimensions (DeepSeek V3), and transformers 5.23 does not find again what it wrote of Llama 4.
    """
    import torch

    from kit.model import device, mean_loss

    try:
        return round(mean_loss(load(folder, device_map={"": device()}), held, 8), 6)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model's own code raises
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SystemExit(
            f"the model cannot be used as {bits} ({reason}); export it as bf16, or in another format."
        ) from None


def megabytes(folder: Path) -> float:
    """Return the size of the weights of a model folder in MiB."""
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf")]
    return round(sum(path.stat().st_size for path in files) / 2**20, 2)


def sort_metadata(file: Path) -> None:
    """Sort the notes in the header of a safetensors file: of several, as torchao makes, the order is random."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise ValueError(f"{file.name}: its header cannot be written in order; nothing was published (a bug).")
        stream.seek(8)
        stream.write(text.ljust(length))


def write(merged: Path, bits: str, folder: Path) -> None:
    """Write the model of a folder in fewer bits, with its tokenizer. Raises SystemExit when that is not possible."""
    model = load(merged, **options(bits))
    changed = "bitsandbytes" if bits in BITSANDBYTES else "torchao"
    kinds = {type(part).__module__ for module in model.modules() for part in (module, *module.parameters(False))}
    if bits != "bf16" and not any(changed in kind for kind in kinds):
        raise SystemExit(f"{merged} has no layer that can be quantised; export it as bf16.")
    model.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        sort_metadata(path)
    for path in sorted(merged.iterdir()):
        if path.name not in NOT_CARRIED and ".safetensors" not in path.name:
            shutil.copyfile(path, folder / path.name)


def upload(folder: Path, repository: str) -> None:
    """Put an exported folder on the Hub. Raises SystemExit when there is none, or the Hub does not take it."""
    if not (folder / "README.md").is_file():
        raise SystemExit(f"there is no {folder} to push; `dvc repro export_model@{folder.name}` writes it.")
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        told = HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Export {folder.name}")
    except Exception as error:  # the client's own, its HTTP library's, the network's
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SystemExit(
            f"{folder} could not be put on the Hub as {repository} ({reason}); see to the connection, the name and the "
            "token (`hf auth login`), and run again."
        ) from None
    print(f"{folder} is now at {told}")


def main(name: str, push: str = "") -> None:
    if push:
        upload(Path("models/exports", name), push)
        return
    params = read_params(f"exports.{name}", Params)
    merged, blocks = Path("models", params.phase, "merged"), Path("data/blocks", params.phase, "eval")
    about, card = Path("models", params.phase, "trained/training.json"), Path("reports", params.phase, "model_card.md")
    inputs = [str(path) for path in (merged, blocks, about, card)]
    with stage.run("export_model", name, inputs, [f"models/exports/{name}"]) as run:
        from kit.model import device, mean_loss, start

        (folder,) = run.outputs
        start(0)
        in_one_file = params.format.startswith("gguf_")
        if in_one_file:
            gguf_file.write(merged, folder / "model.gguf", name, params.format.removeprefix("gguf_"))
        else:
            write(merged, params.format, folder)
        shutil.copyfile(card, folder / "README.md")
        held = seen_blocks.seen(blocks, Vocabulary(merged), arrow.read_json(about))
        loss = round(mean_loss(load(merged, device_map={"": device()}), held, 8), 6)
        run.metric(eval_loss_bf16=loss)
        if not in_one_file:
            run.metric(eval_loss=loss_of(folder, params.format, held))
        elif importlib.util.find_spec("llama_cpp"):
            run.metric(eval_loss=gguf_check.check(folder / "model.gguf", merged, held, loss))
        else:
            note: dict[str, Any] = {"eval_loss": "not checked: llama-cpp-python is not installed"}
            run.metric(**note)
        run.metric(mebibytes_merged=megabytes(merged), mebibytes=megabytes(folder))


if __name__ == "__main__":
    stage.cli(main, __doc__, push=str)
