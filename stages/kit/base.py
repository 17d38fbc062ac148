"""What lies in the folder of a base model, looked at without torch: weights, a config alone, or something damaged.

    check_base(Path("models/base/qwen3"))    # SystemExit with one sentence where a part is missing or damaged
    has_weights(Path("models/configs/llama_small"))   ->   False: a config.json alone, so random weights
    reads_more_than_text(Path("models/base/gemma"))   ->   True: it has a language model, and a part that sees images
    read_config(Path("models/base/qwen3"))   ->   the config as transformers reads it (which imports torch)

A base comes from elsewhere and by hand, so it is looked at before any stage works and not after hours of data stages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # the first wins, as in transformers
FOREIGN = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")  # weights in files that are not read
AGAIN = "fetch the file again (a Git LFS pointer is not the file)"


def check_base(base: Path) -> None:
    """Raise SystemExit when `base` is no config.json alone and no language model with all of its weights."""
    check_whole(base)
    if reads_more_than_text(base):
        raise SystemExit(
            f"{base} is of type {read_settings(base / 'config.json')['model_type']}, which reads more than text, and "
            "what is trained is a language model: for that part alone set `text_only: true` under `bases`, or write it "
            f"into a folder of its own by `python stages/text_part.py {base} {base}_text` and take that as `base`."
        )


def reads_more_than_text(base: Path) -> bool:
    """Return whether a language model is but a part of the model: its config.json has a config for each part."""
    return isinstance(read_settings(base / "config.json").get("text_config"), dict)


def check_whole(base: Path) -> None:
    """Raise SystemExit when `base` is no config.json alone and no model with all of its weights, of any kind."""
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
        for file in weight_files(base):
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


def read_config(base: Path, **given: Any) -> Any:
    """Return the config of `base` with some keys given. Raises SystemExit when transformers makes none of it."""
    import transformers

    kind = read_settings(base / "config.json")["model_type"]
    if kind not in transformers.CONFIG_MAPPING:
        raise SystemExit(
            f"{base}: transformers {transformers.__version__} has no model of type {kind}, and code that lies beside "
            "weights is never run; take another base."
        )
    try:
        return transformers.AutoConfig.from_pretrained(base, trust_remote_code=False, **given)
    except Exception as error:  # also what a class of one model raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SystemExit(f"{base}/config.json: {reason.rstrip('.')}; correct it.") from None


def tensors(file: Path) -> tuple[int, dict[str, Any]]:
    """Return where the data of a safetensors file begins, and its header: name -> dtype, shape, data_offsets."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header


def write_header(writer: BinaryIO, header: dict[str, Any]) -> None:
    """Write the length and the header of a safetensors file, after which its data begins, at a multiple of 8 bytes."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    writer.write(len(text).to_bytes(8, "little") + text)


def copy_bytes(reader: BinaryIO, writer: BinaryIO, first: int, last: int) -> None:
    """Copy the bytes from `first` to `last`, a piece at a time."""
    reader.seek(first)
    while first < last:
        writer.write(piece := reader.read(min(last - first, 2**22)))
        first += len(piece)


def weight_files(base: Path) -> list[Path]:
    """Return the safetensors files of a model with weights. Raises SystemExit when one of them is missing."""
    return [base / SINGLE] if (base / SINGLE).is_file() else _shards(base)


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
