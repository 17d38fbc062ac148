"""What lies in the folder of a base model, looked at without torch: weights, a config alone, or something damaged.

    check_base(Path("models/base/qwen3"))    # SystemExit with one sentence where a part is missing or damaged
    has_weights(Path("models/configs/llama_small"))   ->   False: a config.json alone, so random weights

A base comes from elsewhere and by hand, so it is looked at before any stage works and not after hours of data stages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # the first wins, as in transformers
FOREIGN = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")  # weights in files that are not read
AGAIN = "fetch the file again (a Git LFS pointer is not the file)"


def check_base(base: Path) -> None:
    """Raise SystemExit when `base` is no config.json alone and no model with all of its weights."""
    if not (base / "config.json").is_file():
        raise SystemExit(
            f"{base} has no config.json: `base` is a folder with a config.json alone (random weights) or with a whole "
            "model, e.g. models/configs/llama_small or models/PHASE/merged."
        )
    config = read_settings(base / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise SystemExit(f"{base}/config.json names no model_type, so it is no model's; {AGAIN}.")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise SystemExit(
            f"{base} holds weights that were quantised ({method or 'unnamed'}), which can neither be trained "
            "nor merged into; take the model in 16 or 32 bits, of which `quantization` makes 4 or 8."
        )
    if has_weights(base):
        for file in [base / SINGLE] if (base / SINGLE).is_file() else _shards(base):
            _check_weights(file)
    elif others := sorted(path.name for path in base.iterdir() if path.suffix in FOREIGN):
        # Else it would begin with random weights, and nobody would know.
        raise SystemExit(
            f"{base} has its weights in {others[0]}, and only .safetensors are read; open the model with transformers "
            "and write it anew with save_pretrained, or remove that file to begin with random weights."
        )


def read_settings(path: Path) -> dict[str, Any]:
    """Return a JSON object that came with a base. Raises SystemExit when the file holds none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"{path} holds no JSON object ({error}); {AGAIN}.") from None


def has_weights(base: Path) -> bool:
    """Return whether a model folder holds weights, or a list of them, and not a config.json alone."""
    return (base / INDEX).is_file() or any(base.glob("*.safetensors"))


def _shards(base: Path) -> list[Path]:
    """Return the files that the index names."""
    if not (base / INDEX).is_file():
        other = min(path.name for path in base.glob("*.safetensors"))
        raise SystemExit(
            f"{base} has its weights in {other}, and those of transformers' form are in {SINGLE}, or in files that "
            f"{INDEX} names; fetch these, too."
        )
    named = read_settings(base / INDEX).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise SystemExit(f"{base}/{INDEX} names no weights; {AGAIN}.")
    files = [base / name for name in sorted(set(named.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise SystemExit(f"{base} has no {missing[0]}{more}, which {INDEX} names; fetch what is missing.")
    return files


def _check_weights(file: Path) -> None:
    """Raise SystemExit when the header of a weight file does not fit its size: of the values it can say nothing."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy"):
            pass
    except (OSError, SafetensorError) as error:
        raise SystemExit(f"{file} holds no weights that can be read ({error}); {AGAIN}.") from None
