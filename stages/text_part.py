"""Write the language model of a base that also reads images or sound as a base of its own.

    python stages/text_part.py /models/gemma-3-4b-it models/base/gemma

Gemma 3 and 4, Qwen 3.5, Mistral 3, Llama 4, LLaVA and others are published as several parts. Text is what is trained
here, so of these the language model is taken: the result is a plain causal model, which trains, merges and is exported
like any other, and reads text alone. Its tensors are those of the base byte by byte, under the names of the plain
model; what belongs to another part is left out, and so are the settings for images and sound.

import_base does the same to a model of the Hub with `text_only: true`. The target must not be there yet.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from kit import arrow
from kit.base import (
    INDEX,
    SINGLE,
    check_whole,
    copy_bytes,
    has_weights,
    read_config,
    reads_more_than_text,
    tensors,
    weight_files,
    write_header,
)

# language_model.model.layers.0, model.language_model.layers.0 and model.text_model.layers.0 are all model.layers.0.
PART = re.compile(r"(?:model\.)?(?:language_model|text_model)\.(?=.)")
OUTPUT = "lm_head."  # often beside the parts, though it is the language model's
OF_PARTS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json")


def plain_name(stored: str, prefix: str) -> str | None:
    """Return what a plain model with the base model `prefix` calls a tensor; None for one of another part.

    >>> plain_name("language_model.model.norm.weight", "model"), plain_name("vision_tower.norm.weight", "model")
    ('model.norm.weight', None)
    >>> plain_name("model.language_model.norm.weight", "model"), plain_name("lm_head.weight", "model")
    ('model.norm.weight', 'lm_head.weight')
    """
    if stored.startswith(OUTPUT):
        return stored
    if not (part := PART.match(stored)):
        return None
    rest = stored[part.end() :]
    return rest if rest.startswith((f"{prefix}.", OUTPUT)) else f"{prefix}.{rest}"


def language_model(base: Path) -> tuple[Any, Any]:
    """Return the config of `base`, of which `text_config` is a part, and the class of the plain causal model.

    Raises SystemExit when `base` has no other part, or transformers no causal model for the language model.
    """
    if not reads_more_than_text(base):
        raise SystemExit(f"{base} is a language model and has no other part; take it as it is, without text_only.")
    from transformers import AutoModelForCausalLM

    config = read_config(base)
    if type(config.text_config) not in AutoModelForCausalLM._model_mapping:
        raise SystemExit(
            f"{base}: transformers has no causal model of type {config.text_config.model_type}, which is the language "
            f"model of a {config.model_type}; take a language model of the same family."
        )
    return config, AutoModelForCausalLM._model_mapping[type(config.text_config)]


def take(base: Path, folder: Path) -> dict[str, int]:
    """Write the language model of `base` into the empty `folder`; return how many `tensors` are its, or `left_out`.

    Raises SystemExit when `base` is not whole, has no other part, or transformers has no causal model for the part.
    """
    check_whole(base)
    whole, made = language_model(base)
    config, ties = whole.text_config, bool(whole.tie_word_embeddings)  # whatever the part itself says of ties
    counts = {"tensors": 0, "left_out": 0}
    if has_weights(base):
        counts = _write_weights(base, folder, made.base_model_prefix)
        ties = ties and _tied(folder, made._tied_weights_keys or {})
    config.architectures, config.dtype, config.tie_word_embeddings = [made.__name__], config.dtype or whole.dtype, ties
    config.save_pretrained(folder)
    for path in sorted(base.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ("config.json", INDEX, *OF_PARTS):
            arrow.copy(path, folder / path.name)
    if has_weights(base):
        _check(base, folder)
    return counts


def _write_weights(base: Path, folder: Path, prefix: str) -> dict[str, int]:
    """Write the tensors of the language model under their plain names; return how many there are, and are not taken."""
    files = weight_files(base)
    placed: dict[str, str] = {}
    total = left_out = 0
    for file in files:
        start, header = tensors(file)
        names = {stored: name for stored in header if (name := plain_name(stored, prefix))}
        left_out += len(header) - len(names)
        if not names:
            continue
        entries, end = {}, 0
        order = sorted(names, key=lambda stored: header[stored]["data_offsets"])
        for stored in order:
            first, last = header[stored]["data_offsets"]
            entries[names[stored]] = {**header[stored], "data_offsets": [end, end := end + last - first]}
        if len(entries) < len(names) or entries.keys() & placed.keys():
            raise SystemExit(f"{file} stores a tensor of the language model that is there twice; take another base.")
        total += end
        placed.update(dict.fromkeys(entries, file.name))
        with file.open("rb") as reader, (folder / file.name).open("wb") as writer:
            write_header(writer, entries)
            for stored in order:
                copy_bytes(reader, writer, *(start + offset for offset in header[stored]["data_offsets"]))
    if files != [base / SINGLE]:
        arrow.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})
    return {"tensors": len(placed), "left_out": left_out}


def _tied(folder: Path, pairs: dict[str, str]) -> bool:
    """Return whether no output of a folder differs from the input that `pairs` ties it to, as transformers looks at it.

    `pairs`: e.g. {"lm_head.weight": "model.embed_tokens.weight"}. A published config may say that both are one while
    the files hold two.
    """
    import torch
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as weights:
            found |= {name: weights.get_tensor(name) for name in weights.keys() if name in {*pairs, *pairs.values()}}  # noqa: SIM118
    return all(torch.equal(found[one], found[other]) for one, other in pairs.items() if {one, other} <= found.keys())


def _check(base: Path, folder: Path) -> None:
    """Raise SystemExit when a plain model does not find all of its weights in `folder`; reads no values."""
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options: dict[str, Any] = {"device_map": "meta", "trust_remote_code": False, "ignore_mismatched_sizes": True}
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    if lacking := sorted(found["missing_keys"]) or sorted(name for name, *_ in found["mismatched_keys"]):
        raise SystemExit(
            f"{base}: its language model cannot be taken, {lacking[0]} and {len(lacking) - 1:,} other weights of a "
            f"{type(model).__name__} are not in its files, or have another shape; take a language model of the family."
        )


def main(base: Path, folder: Path) -> None:
    if folder.exists():
        raise SystemExit(f"{folder} is there already; name a folder that is not.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-text-part-") as name:
        part = Path(name) / "part"
        part.mkdir()
        counts = take(base, part)
        part.rename(folder)
    print(
        f"{folder}: the language model of {base}, {counts['tensors']:,} tensors; {counts['left_out']:,} of other parts "
        "were left out."
    )


if __name__ == "__main__":
    if len(sys.argv) != 3 or "--help" in sys.argv:
        print(f"usage: python stages/text_part.py BASE FOLDER\n\n{__doc__.strip()}")
        raise SystemExit(0 if "--help" in sys.argv or "-h" in sys.argv else 2)
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except OSError as error:
        raise SystemExit(f"text_part: {error}; nothing was written.") from None
