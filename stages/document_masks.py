"""Documents that share a block do not see each other: each is computed as if it stood alone.

    documents = begins(table, rows)                   # bool (rows, block_size): where a document begins
    positions(documents)                              # 0 1 2 0 1 0 for documents of 3, 2 and 1 tokens
    check(model)                                      # once, before training: refuses a model that mixes them
    data = Separated(blocks, table, way(model), bos)  # batches with what the model needs beside the ids

Example, block_size 6, `starts` [0 3 5]: documents of 3 and 2 tokens and padding, which counts as one more document.

    position_ids 0 1 2 0 1 0     and no label at places 0: no token is predicted from another document's last one

Causal models with position_ids (Llama, Qwen2, Mistral, ...) get these alone: transformers finds the documents in them
and masks the rest, sliding windows included, but only without an attention_mask and a cache (measured on 5.23: else it
masks nothing and says nothing). BLOOM has no positions; it gets the whole mask, and its ALiBi distances begin anew with
each document. Encoders (RoBERTa, BERT) get mask and positions. A whole mask counts for all layers, so that of
ModernBERT's sliding layers is narrowed to their window. What a model makes of it is not believed but tested.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from kit.model import IGNORED
from loss_head import bare, in_eval_mode

REMEDY = "set train_model.mask_documents to false; group_blocks.mode line keeps documents apart without it."


def begins(columns: pa.Table, rows: np.ndarray, bos: int | None = None) -> np.ndarray:
    """Return where documents begin in blocks `rows`: bool (len(rows), block_size), the first place always.

    From the column `starts`, whose last number is the begin of the padding; blocks of mode concat have none, there a
    document begins with each `bos`, which stands nowhere else: special tokens cannot be written in a text.
    """
    block_size = columns.schema.field("input_ids").type.list_size
    chosen = columns.take(pa.array(rows))
    found = np.zeros((len(rows), block_size), bool)
    if "starts" in columns.schema.names:
        starts = chosen["starts"].combine_chunks()
        row = np.repeat(np.arange(len(rows)), starts.value_lengths().to_numpy())
        place = starts.flatten().to_numpy()
        inside = place < block_size
        found[row[inside], place[inside]] = True
    elif bos is not None:
        ids = chosen["input_ids"].combine_chunks().flatten().to_numpy().reshape(-1, block_size)
        found = ids == bos
    else:
        raise ValueError("these blocks neither have `starts` nor a token that begins each document.")
    found[:, 0] = True
    return found


def positions(found: np.ndarray) -> np.ndarray:
    """Return the place of each token in its document: int64 (rows, block_size).

    >>> positions(np.array([[True, False, False, True, False, True]])).tolist()
    [[0, 1, 2, 0, 1, 0]]
    """
    places = np.arange(found.shape[1])
    return places - np.maximum.accumulate(np.where(found, places, 0), axis=1)


def visible(place: torch.Tensor, causal: bool) -> torch.Tensor:
    """Return which token sees which: bool (rows, 1, block_size, block_size), of `positions`."""
    document = (place == 0).cumsum(1)
    seen = document[:, :, None] == document[:, None, :]
    return (seen.tril() if causal else seen)[:, None]


def window(model: Any) -> int:
    """Return how far the sliding layers of `model` see to each side where the mask that it is given says nothing of it.

    That is where it gets a whole mask; 0 where there are none.
    """
    layers = getattr(model.config, "layer_types", None) or ()
    return model.config.sliding_window if "sliding_attention" in layers else 0


class Way(NamedTuple):
    """What a model needs to keep documents apart."""

    causal: bool
    mask: bool  # the whole mask, as it does not find the documents itself
    position_ids: bool
    first_position: int  # RoBERTa counts from padding_idx + 1
    boolean: bool  # sdpa takes a mask of bool, eager adds one of float


def way(model: Any) -> Way:
    """Return what `model` (bare, or wrapped by peft) needs.

    BLOOM's ALiBi is taught where documents begin, sliding layers what their window leaves of a mask.
    """
    inner = bare(model)
    causal = getattr(inner, "loss_type", None) != "ForMaskedLM"
    takes = "position_ids" in inspect.signature(inner.base_model.forward).parameters
    embeddings: Any = getattr(inner.base_model, "embeddings", None)
    counted = hasattr(embeddings, "create_position_ids_from_input_ids")
    if causal and not takes and not hasattr(inner.base_model, "build_alibi_tensor"):
        raise SystemExit(
            f"mask_documents: {type(inner).__name__} has no positions that begin anew with each document; {REMEDY}"
        )
    if hasattr(inner.base_model, "build_alibi_tensor"):
        inner.base_model.build_alibi_tensor = functools.partial(_alibi, type(inner.base_model).build_alibi_tensor)
    mask = not (causal and takes)
    if mask and (size := window(inner)):
        forward = type(inner.base_model).forward.__get__(inner.base_model)
        inner.base_model.forward = functools.wraps(forward)(functools.partial(_narrowed, forward, size))
    return Way(
        causal=causal,
        mask=mask,
        position_ids=takes,
        first_position=embeddings.padding_idx + 1 if counted else 0,
        boolean=inner.config._attn_implementation == "sdpa",
    )


def _alibi(original: Any, mask: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Return BLOOM's bias of each key, (rows * heads, 1, block_size), by its place in its document.

    Absolute places would do, too, as a softmax does not see what all keys of a row share; but 700 has only steps of 4
    in bfloat16. A token sees as many tokens as it has before it, and itself, so its place is in the mask.
    """
    if mask.dim() == 2:
        return original(None, mask, heads, dtype)
    place = (mask[:, 0] == 0).sum(-1) - 1
    ones = torch.ones_like(place)
    slopes = original(None, ones, heads, torch.float32).view(len(place), heads, 1, -1)[..., 1:2]  # a key at place 1
    return (slopes * place[:, None, None, :]).flatten(0, 1).to(dtype)


def _narrowed(forward: Any, size: int, *args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """Call `forward` with a mask of each kind of layer, where there is a whole one."""
    if attention_mask is None or attention_mask.dim() < 4:
        return forward(*args, attention_mask=attention_mask, **kwargs)
    places = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    far = (places[:, None] - places).abs() > size
    hidden = False if attention_mask.dtype == torch.bool else torch.finfo(attention_mask.dtype).min
    masks = {"full_attention": attention_mask, "sliding_attention": attention_mask.masked_fill(far, hidden)}
    return forward(*args, attention_mask=masks, **kwargs)


def inputs(place: torch.Tensor, how: Way) -> dict[str, Any]:
    """Return what a model gets beside the ids: position_ids, a mask, or both; never a cache."""
    found: dict[str, Any] = {"use_cache": False} if how.causal else {}
    if how.position_ids:
        found["position_ids"] = place + how.first_position
    if how.mask:
        seen = visible(place, how.causal)
        hidden = torch.finfo(torch.float32).min
        found["attention_mask"] = seen if how.boolean else torch.zeros(seen.shape).masked_fill_(~seen, hidden)
    return found


class Separated(torch.utils.data.Dataset[dict[str, Any]]):
    """Blocks as `Blocks` or `MaskedBlocks` give them, with what the model needs to keep their documents apart."""

    def __init__(self, blocks: Any, columns: pa.Table, how: Way, bos: int | None = None) -> None:
        """`columns`: the table of the blocks; `bos`: the token that begins a document, for blocks without `starts`."""
        self.blocks, self.columns, self.how, self.bos = blocks, columns, how, bos
        self.block_size, self.causal = blocks.block_size, blocks.causal

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """Return blocks as one batch: ids, labels and `inputs`."""
        return self.at(indices, indices)

    def at(self, indices: list[int], positions_of_stream: list[int]) -> dict[str, Any]:
        """Return blocks as one batch, as they are at these positions of the stream."""
        batch = self.blocks.__getitems__(indices) if self.causal else self.blocks.at(indices, positions_of_stream)
        return self.apart(batch, indices)

    def apart(self, batch: dict[str, Any], indices: list[int]) -> dict[str, Any]:
        """Return a batch of these blocks with what keeps documents apart."""
        place = torch.from_numpy(positions(begins(self.columns, np.asarray(indices), self.bos)))
        if self.causal:  # no token is predicted from another document's last one
            batch = {**batch, "labels": batch["labels"].masked_fill(place == 0, IGNORED)}
        return {**batch, **inputs(place, self.how)}


def check_begins(columns: pa.Table, counts: dict[str, int], bos: int | None) -> None:
    """Raise SystemExit when `bos` does not stand once in each document of a stream; `counts`: those of the manifest."""
    if "starts" in columns.schema.names:
        return
    found = sum(int((chunk.flatten().to_numpy() == bos).sum()) for chunk in columns["input_ids"].chunks)
    documents, dropped = counts["documents"], counts.get("dropped_tokens", 0)
    if not documents - dropped <= found <= documents:
        raise SystemExit(
            f"mask_documents: {documents:,} documents have {found:,} tokens that begin one, so the blocks do not tell "
            "where each begins; set group_blocks.mode to best_fit, which writes it down."
        )


@torch.no_grad()
def check(model: Any) -> None:
    """Raise SystemExit when `model` computes two documents of one block otherwise than each alone.

    The error of the block's logits is held against the error without any mask: a share needs no unit, and is the same
    for random weights and trained ones. Of float32 it is 3e-5 or less; short convolutions that run on into the next
    document (Inkling) make it 0.03.
    """
    inner = bare(model)
    how = way(model)
    weight = inner.get_input_embeddings().weight
    lengths = (7 + (window(inner) if how.mask else 0), 6, 3)
    ids = torch.randint(len(weight), (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    place = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None]
    # As one document: what a model that finds no begin in `inputs` computes.
    mixed = inputs(torch.arange(sum(lengths))[None], how)
    try:
        with in_eval_mode(inner):
            alone = torch.cat([_logits(inner, one, {}) for one in ids.split(lengths, 1)], 1)
            errors = [(_logits(inner, ids, given) - alone).abs().max().item() for given in (inputs(place, how), mixed)]
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f"mask_documents: {type(inner).__name__} takes no such mask ({error}); {REMEDY}") from None
    exact = all(parameter.dtype == torch.float32 for parameter in inner.parameters())  # 0.01: a GPU may take TF32
    if not errors[0] <= (0.01 if exact else 0.05) * errors[1]:
        raise SystemExit(
            f"mask_documents: {type(inner).__name__} does not keep the documents of a block apart (their logits are "
            f"off by {errors[0]:.2g}, by {errors[1]:.2g} without masks); {REMEDY}"
        )


def _logits(model: Any, ids: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    device = model.get_input_embeddings().weight.device
    moved = {name: value.to(device) if torch.is_tensor(value) else value for name, value in given.items()}
    found: torch.Tensor = model(input_ids=ids.to(device), **moved).logits.float()
    return found
