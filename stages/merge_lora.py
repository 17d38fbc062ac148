"""Merge an adapter into its base: a model of the base's structure, proven to compute the same.

Reads:  models/PHASE/trained, the phase's `base` folder, data/blocks/PHASE/eval
Writes: models/PHASE/merged   a whole model with its tokenizer; a phase without an adapter passes through
Params: none (the adapter's own settings decide)

For a layer with weight W and adapter B A, merged is W + lora_alpha / r * (B A): Hu et al., "LoRA", 2021, section 4.1.

Example: W = [[1, 0], [0, 1]], A = [[1, 1]], B = [[1], [0]], r 1, lora_alpha 2   ->   [[3, 2], [0, 1]]

The base's weight files are copied and the changed tensors are rewritten in place, so one layer at a time is in memory.
The proof: base + adapter and merged model see the same held-out blocks; when their logits differ by more than
TOLERANCE nothing is published. The base is the unquantised one, also when the adapter was trained on 4 bits.
"""

from __future__ import annotations

import json
import mmap
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit import arrow, stage
from kit.params import Phase, read_params
from kit.tokenizer import Vocabulary

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-3  # of logits in float32, where rounding alone gives some 1e-5
PROOF_BLOCKS = 4
PREFIX, SUFFIX_A, SUFFIX_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def check_adapter(config: dict[str, Any]) -> None:
    """Raise ValueError when the adapter is of a kind that this merge does not cover."""
    plain = {"use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "bias": "none"}
    for name, value in plain.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"the adapter has {name} {config[name]!r}, which cannot be merged yet; train with {value!r}."
            )
    for name in ("modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices", "layer_replication"):
        if config.get(name):
            raise ValueError(f"the adapter has {name}, which cannot be merged yet; train without it.")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"the adapter is of type {config.get('peft_type')}, only LORA can be merged.")


def tensors(file: Path) -> tuple[int, dict[str, Any]]:
    """Return where the data of a safetensors file begins, and its header: name -> dtype, shape, data_offsets."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header


def merge_file(file: Path, deltas: dict[str, tuple[torch.Tensor, torch.Tensor]], scaling: float) -> list[str]:
    """Add scaling * B @ A to the tensors of a safetensors file in place; return the names of those changed.

    `deltas`: tensor name -> (A of shape (r, in), B of shape (out, r)). Raises ValueError when the shapes do not fit.
    """
    import torch

    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    begin, header = tensors(file)
    changed = sorted(deltas.keys() & header.keys())
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as data:
        for name in changed:
            a, b = deltas[name]
            entry = header[name]
            if tuple(entry["shape"]) != (b.shape[0], a.shape[1]):
                raise ValueError(
                    f"{name} has shape {entry['shape']} but the adapter was made for {[b.shape[0], a.shape[1]]}."
                )
            if entry["dtype"] not in kinds:
                raise ValueError(f"{name} is stored as {entry['dtype']}; only {', '.join(kinds)} can be merged.")
            first, last = entry["data_offsets"]
            raw = bytearray(data[begin + first : begin + last])
            weight = torch.frombuffer(raw, dtype=kinds[entry["dtype"]]).view(entry["shape"])
            # As peft 0.21 merges: the sum in float32, rounded once to the weight's dtype. So both give the same bits.
            weight += (b.float() @ a.float()) * scaling
            data[begin + first : begin + last] = bytes(raw)
        data.flush()
    return changed


def merge(base: Path, adapter: Path, folder: Path) -> int:
    """Write base + adapter into `folder`; return the number of merged tensors. Raises ValueError for a misfit."""
    from safetensors.torch import load_file

    config = arrow.read_json(adapter / "adapter_config.json")
    check_adapter(config)
    weights = load_file(adapter / "adapter_model.safetensors")
    deltas = {}
    for name, a in weights.items():
        if name.endswith(SUFFIX_A):
            layer = name.removeprefix(PREFIX).removesuffix(SUFFIX_A)
            deltas[f"{layer}.weight"] = (a, weights[name.removesuffix(SUFFIX_A) + SUFFIX_B])
    if len(weights) != 2 * len(deltas):
        raise ValueError(f"{adapter} holds tensors besides lora_A and lora_B pairs; they would be lost.")
    merged: list[str] = []
    for path in sorted(base.iterdir()):
        if path.suffix in (".json", ".safetensors") and not path.name.startswith("tokenizer"):
            shutil.copyfile(path, folder / path.name)
        if path.suffix == ".safetensors":
            merged += merge_file(folder / path.name, deltas, config["lora_alpha"] / config["r"])
    if len(merged) != len(deltas):
        raise ValueError(
            f"{base} has no weight for {', '.join(sorted(deltas.keys() - set(merged))[:3])} of the adapter."
        )
    return len(merged)


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


def prove(base: Path, adapter: Path, merged: Path, blocks_folder: Path) -> dict[str, float]:
    """Return the largest and mean logit difference, and the eval loss, of base + adapter and of the merged model.

    Raises ValueError when the largest difference is beyond TOLERANCE or the merged model lacks a tensor.
    """
    from kit.model import Blocks, load_model, mean_loss, start  # first: it says that nothing is to be fetched

    # isort: split
    import torch
    from peft import PeftModel

    start(0)
    vocabulary = Vocabulary(merged)
    blocks = Blocks(arrow.table(blocks_folder), arrow.manifest(blocks_folder)["counts"]["tokens"])
    ids = blocks.__getitems__(list(range(min(PROOF_BLOCKS, len(blocks)))))["input_ids"]
    logits, losses = [], []
    for folder in (base, merged):
        model: Any = load_model(folder, vocabulary.size, vocabulary.special_ids)
        if folder == base:
            model = PeftModel.from_pretrained(model, str(adapter))
        model.eval()
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
        losses.append(mean_loss(model, blocks, 16))
    difference = (logits[0] - logits[1]).abs()
    worst = float(difference.max())
    if not worst <= TOLERANCE:
        raise ValueError(f"the merged model's logits differ by {worst:.2e} from base + adapter, more than {TOLERANCE}.")
    return {
        "logit_difference_max": worst,
        "logit_difference_mean": float(difference.mean()),
        "eval_loss_adapter": round(losses[0], 6),
        "eval_loss_merged": round(losses[1], 6),
    }


def main(phase: str) -> None:
    base, trained = Path(read_params(f"phases.{phase}", Phase).base), Path("models", phase, "trained")
    blocks = Path("data/blocks", phase, "eval")
    with stage.run("merge_lora", phase, [str(base), str(trained), str(blocks)], [f"models/{phase}/merged"]) as run:
        (folder,) = run.outputs
        for path in sorted(trained.iterdir()):
            if not path.name.startswith("adapter_") and path.name not in ("training.json", "README.md"):
                shutil.copyfile(path, folder / path.name)
        if (trained / "adapter_config.json").is_file():
            run.count(merged_tensors=merge(base, trained, folder))
            stop_at(folder, Vocabulary(folder).special_ids["eos_token_id"])
            run.metric(**prove(base, trained, folder, blocks))
        else:
            run.count(merged_tensors=0)


if __name__ == "__main__":
    stage.cli(main, __doc__)
