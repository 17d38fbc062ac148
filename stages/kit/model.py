"""Models and blocks for the stages that compute: loaded the same way, so that the same inputs give the same bits.

    start(seed=0)                              # before anything else of torch
    model = load_model(Path("models/configs/llama_small"), vocabulary.size, vocabulary.special_ids)
    blocks = Blocks(arrow.table(folder), arrow.manifest(folder)["counts"]["tokens"])
    blocks[[0, 7]]   ->   {"input_ids": int64 (2, block_size), "labels": int64 (2, block_size)}

Imports torch and transformers at the top: a stage imports this module inside its `main`, so `--help` stays light.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # every model is a folder of this repository, nothing is fetched while computing
# bitsandbytes asks for a kernel from the Hub; transformers renames arguments that peft still uses. Neither is a mistake
# of the user, and a warning that is always there hides the one that matters.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers import logging as transformers_logging

from kit.base import check_base, has_weights, read_config

IGNORED = -100  # the label that `torch.nn.functional.cross_entropy` gives no loss
CPU_THREADS = 2  # sums are split over the threads, so their number is part of a CPU result and is not left to the host


def start(seed: int) -> None:
    """Seed torch and numpy, fix the number of CPU threads, ask torch for deterministic kernels."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not torch.cuda.is_available():
        torch.set_num_threads(CPU_THREADS)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # each new tensor with NaN: that finds bugs of torch
    torch.manual_seed(seed)
    np.random.seed(seed)


def device() -> torch.device:
    """Return the first CUDA device, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def objective(base: Path) -> str:
    """Return `mlm` when the config of `base` names the architecture of a masked model, else `clm`."""
    architectures = json.loads((base / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    return "mlm" if architectures[0].endswith("ForMaskedLM") else "clm"


def max_positions(model: Any) -> int | None:
    """Return the longest block that `model` has positions for, or None where it has no table of them (ALiBi)."""
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if limit and name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(limit) - module.padding_idx - 1  # RoBERTa counts positions from the one after padding's
    return limit


def new_tokens(base: Path, tokenizer: Path) -> dict[int, list[int]]:
    """Return each id that the tokenizer in `tokenizer` adds to the one in `base`, and the ids of its pieces there.

    Empty when `base` has no tokenizer, or another one: its ids mean something else.
    """
    files = [folder / "tokenizer.json" for folder in (base, tokenizer)]
    if not files[0].is_file() or files[0].read_bytes() == files[1].read_bytes():
        return {}
    before, after = (Tokenizer.from_file(str(file)) for file in files)
    known, vocabulary = before.get_vocab(), after.get_vocab()
    if any(vocabulary.get(text) != number for text, number in known.items()):
        return {}
    added = sorted((number, text) for text, number in vocabulary.items() if text not in known)
    return {number: [piece.id for piece in before.model.tokenize(text)] for number, text in added}


@torch.no_grad()
def grow(model: PreTrainedModel, size: int, added: dict[int, list[int]]) -> None:
    """Give `model` rows for `size` tokens; a row of `added` is the mean of its pieces' rows, or of all if it has none.

    So a new token begins as what the model took its text for (rather than at random), in input and output alike.
    """
    if model.get_input_embeddings().weight.shape[0] < size:
        model.resize_token_embeddings(size, mean_resizing=False)
    output = model.get_output_embeddings()
    rows = [model.get_input_embeddings().weight, *([] if output is None else [output.weight, output.bias])]
    for each in {id(values): values for values in rows if values is not None}.values():  # once, where both are tied
        mean = each[: min(added)].mean(0)
        for number, pieces in added.items():
            each[number] = each[pieces].mean(0) if pieces else mean


def load_model(
    base: Path,
    size: int,
    special_ids: dict[str, int],
    quantization: dict[str, Any] | None = None,
    tokenizer: Path | None = None,
    kind: str | None = None,
) -> PreTrainedModel:
    """Return the model of `base` in float32: its weights, or random ones (seeded) when it is a config.json alone.

    Random weights get `size` embeddings and the `special_ids` of the tokenizer in their config; weights must have a row
    for each of the tokenizer's `size` entries, unless the folder `tokenizer` holds an extension of the base's own: see
    `grow`. `quantization`: arguments of transformers' BitsAndBytesConfig. `kind`: clm for a causal model, mlm for a
    masked one; by default what the config says.
    """
    check_base(base)
    own = objective(base)
    kind = kind or own
    auto = AutoModelForMaskedLM if kind == "mlm" else AutoModelForCausalLM
    if kind == "clm" and own == "mlm":  # a causal loss would be 0: each token sees the next one
        raise SystemExit(f"{base} is a masked model; set `objective: mlm`, or take a causal model as `base`.")
    if not has_weights(base):
        if quantization:
            raise SystemExit(f"{base} has no weights to quantise; leave `quantization` out for training from scratch.")
        config = read_config(base, vocab_size=size, **special_ids)
        _check_kind(base, config, auto)
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
        return model
    options: dict[str, Any] = {}
    if quantization:
        from transformers import BitsAndBytesConfig

        options = {"quantization_config": BitsAndBytesConfig(**quantization), "device_map": {"": device()}}
    _check_kind(base, read_config(base), auto)
    options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}  # ours are sentences
    model, found = auto.from_pretrained(base, dtype=torch.float32, trust_remote_code=False, **options)
    _check_whole(base, type(model).__name__, found)
    if quantization and not any("bitsandbytes" in type(module).__module__ for module in model.modules()):
        raise SystemExit(f"{base} has no layer that can be quantised; leave `quantization` out.")
    without_repacking(model)
    if tokenizer and (added := new_tokens(base, tokenizer)):
        grow(model, size, added)
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < size:
        raise SystemExit(
            f"{base} has embeddings for {rows:,} tokens but the tokenizer has {size:,}; "
            "set train_tokenizer.mode to reuse, or to extend."
        )
    # A chat template may end answers with a token that the base did not stop at; where the base stopped it still stops.
    if (generation := getattr(model, "generation_config", None)) is not None:  # a masked model has none
        end, ends = special_ids["eos_token_id"], generation.eos_token_id
        known = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if end not in known:
            generation.eos_token_id = [end, *known]
            # One that was changed is checked strictly when it is saved, at the first checkpoint, but the rest
            # is the base's, and a temperature beside `do_sample: false` (Llama 2) is no reason to fail.
            generation._original_object_hash = hash(generation)
    return model


def without_repacking(model: Any) -> None:
    """Let bitsandbytes compute with 4-bit weights as they are stored, on every CPU.

    On CPUs with AVX512-BF16 version 0.50 repacks a weight at its first use in eval mode. From then on no gradient
    passes through the layer, so one evaluation would silently cripple the training after it; sums are others than on
    other machines; and rows that are no multiple of a block of 64 are an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _check_whole(base: Path, kind: str, found: dict[str, Any]) -> None:
    """Raise SystemExit when weights are missing or of another shape, which transformers would draw at random."""
    if wrong := sorted(found["mismatched_keys"]):
        name, theirs, ours = wrong[0]
        raise SystemExit(
            f"{base}: the weights of {name} have the shape {list(theirs)}, and its config.json asks for {list(ours)}; "
            "fetch both from one place."
        )
    if missing := sorted(found["missing_keys"]):
        raise SystemExit(
            f"{base} has no weights for {_first(missing)}, which a {kind} needs; "
            "take a base that was saved as one, or set another `objective`."
        )
    if unused := sorted(found["unexpected_keys"]):
        print(f"{base} has weights that a {kind} does not use: {_first(unused)}.", flush=True)


def _first(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")


def _check_kind(base: Path, config: Any, auto: Any) -> None:
    if type(config) not in auto._model_mapping:
        kind = "masked" if auto is AutoModelForMaskedLM else "causal"
        raise SystemExit(
            f"{base}: transformers has no {kind} model of type {config.model_type}; set another `objective`, or take "
            "another base."
        )


class Blocks(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The blocks of one split, memory-mapped; labels are derived: the ids, or IGNORED where nothing is learned."""

    causal = True  # a token is predicted from those before it

    def __init__(self, columns: pa.Table, tokens: int) -> None:
        """`columns`: the table of a blocks folder; `tokens`: the count of its manifest, what lies beyond is padding."""
        self.tokens = tokens
        self.block_size = columns.schema.field("input_ids").type.list_size
        chunks = [chunk.flatten().to_numpy() for chunk in columns["input_ids"].chunks]
        self._chunks = [chunk.reshape(-1, self.block_size) for chunk in chunks]
        self._starts = np.cumsum([0, *map(len, self._chunks)])
        # Arrow packs these as bits; unpacked they cost 1 byte a token, and only where a prompt is masked.
        self._learn: np.ndarray | None = None
        if "learn" in columns.schema.names:
            flat = columns["learn"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            self._learn = flat.reshape(-1, self.block_size)

        # Packed blocks say where each piece begins and, last, where padding does.
        self._ends: np.ndarray | None = None
        if "starts" in columns.schema.names:
            starts = columns["starts"].combine_chunks()
            self._ends = starts.flatten().to_numpy()[starts.offsets.to_numpy()[1:] - starts.offsets.to_numpy()[0] - 1]

    def filled(self, rows: np.ndarray) -> np.ndarray:
        """Return how many tokens of each block are no padding: in a stream, only the last block has any."""
        if self._ends is not None:
            return self._ends[rows].astype(np.int64)
        return np.clip(self.tokens - rows * self.block_size, 0, self.block_size)

    def learned(self) -> bool:
        """Return whether any token has a label."""
        return bool(len(self)) and (bool(self.tokens) if self._learn is None else bool(self._learn.any()))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Return blocks as one batch: `input_ids` and `labels`, int64 of shape (len(indices), block_size)."""
        rows = np.asarray(indices)
        chunk = np.searchsorted(self._starts, rows, side="right") - 1
        ids = np.stack([self._chunks[c][row - self._starts[c]] for c, row in zip(chunk, rows, strict=True)])
        input_ids = torch.from_numpy(ids.astype(np.int64))
        labels = input_ids.clone()
        if self._learn is not None:
            labels[~torch.from_numpy(self._learn[rows])] = IGNORED
        filled = self.filled(rows)
        if (filled < self.block_size).any():  # seldom in a stream: comparing each token would double the time
            labels[torch.arange(self.block_size) >= torch.from_numpy(filled)[:, None]] = IGNORED
        return {"input_ids": input_ids, "labels": labels}


class MaskedBlocks(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Blocks as a masked model sees them: `labels` only where it has to guess, `attention_mask` 0 on padding.

    `masking(ids, learned, positions)` returns what stands in place of the ids, and which are to be guessed.
    """

    causal = False  # a token is guessed in its own place

    def __init__(self, blocks: Blocks, masking: Callable[..., tuple[np.ndarray, np.ndarray]]) -> None:
        self.blocks, self.masking, self.block_size = blocks, masking, blocks.block_size

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Return blocks as one batch, masked as at the positions of their own numbers: each time alike."""
        return self.at(indices, indices)

    def at(self, indices: list[int], positions: list[int]) -> dict[str, torch.Tensor]:
        """Return blocks as one batch, masked as at these positions of the stream."""
        batch = self.blocks.__getitems__(indices)
        ids, learned = batch["input_ids"].numpy(), (batch["labels"] != IGNORED).numpy()
        inputs, chosen = self.masking(ids, learned, np.asarray(positions))
        filled = torch.from_numpy(self.blocks.filled(np.asarray(indices)))[:, None]
        return {
            "input_ids": torch.from_numpy(inputs),
            "labels": torch.where(torch.from_numpy(chosen), batch["input_ids"], IGNORED),
            "attention_mask": (torch.arange(self.block_size) < filled).long(),
        }


@torch.no_grad()
def mean_loss(model: Any, blocks: Any, batch_size: int) -> float:
    """Return the mean loss over all learned tokens of `Blocks` or `MaskedBlocks`, nats: each token counts once."""
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for first in range(0, len(blocks), batch_size):
        batch = blocks.__getitems__(list(range(first, min(first + batch_size, len(blocks)))))
        labels = batch.pop("labels").to(device())
        inputs = {name: values.to(device()) if torch.is_tensor(values) else values for name, values in batch.items()}
        logits = model(**inputs).logits
        if blocks.causal:
            labels, logits = labels[:, 1:], logits[:, :-1]
        total += torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
        tokens += int((labels != IGNORED).sum())
    model.train(training)
    if not tokens:
        raise ValueError("the held-out blocks have no learned token to evaluate.")
    return total / tokens
