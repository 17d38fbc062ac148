"""The loss of a language model without the logits of the whole batch.

    install(model)                                  # before Trainer, after LoRA; True when it is in place
    model(input_ids=ids, labels=labels).loss        # the model's own loss, `logits` is None
    model(input_ids=ids, labels=labels, learned=learned(labels.numpy(), shift=True)).loss    # no wait for a GPU
    model(input_ids=ids).logits                     # untouched without labels

The logits of 8 blocks of 1,024 tokens and a vocabulary of 32,000 are 1.05 GB in float32, their gradient as much. Here
only the positions with a label go through the head, about a thousand at a time, and each chunk's gradient is taken
while its logits are still there (as in Hsu et al., "Liger Kernel", 2024). What is kept has the size of the hidden
states and of the head's weight.

torch 2.13 has `torch.nn.functional.linear_cross_entropy`; older ones do not, and it computes the gradient of a frozen
head, too, so there is one way for all versions: ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import masking_utils
from transformers.modeling_outputs import CausalLMOutput, MaskedLMOutput

from kit.model import IGNORED

CHUNK_VALUES = 2**25  # logits held at once: 128 MiB in float32; with fewer the products are slower
LEAST_ROWS = 256  # fewer make each chunk wait for the memory of the head's gradient, however large the vocabulary
WHOLE_ROWS = 64  # products of 393 rows take 4 % longer than of 384


def chunk_rows(vocabulary: int) -> int:
    """Return how many positions go through the head at once; of the vocabulary alone, so sums have a fixed order."""
    return max(LEAST_ROWS, CHUNK_VALUES // vocabulary // WHOLE_ROWS * WHOLE_ROWS)


class _SummedLoss(torch.autograd.Function):
    """Sum of the cross entropies of `hidden @ weight.T + bias`, its gradients taken chunk by chunk on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        learning: bool,
    ) -> torch.Tensor:
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        wanted = [learning and needed for needed in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            offset = None if bias is None else bias.to(dtype)
            tensors = (hidden, weight, bias)
            grads = [torch.zeros_like(t) if want else None for t, want in zip(tensors, wanted, strict=True)]
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            rows = chunk_rows(len(weight))
            for first in range(0, len(hidden), rows):
                part = hidden[first : first + rows].to(dtype)
                target = targets[first : first + rows, None]
                logits = functional.linear(part, matrix, offset)
                at_target, highest = logits.gather(1, target).sum(dtype=torch.float32), logits.amax(-1)
                in_place = logits if logits.dtype == torch.float32 else None
                scores = torch.softmax(logits, -1, dtype=torch.float32, out=in_place)
                # The highest probability is 1 / sum(exp(logits - highest)): the loss takes no second pass of exp.
                total += highest.sum(dtype=torch.float32) - scores.amax(-1).log().sum() - at_target
                if any(wanted):  # probabilities, minus one at the target, are the gradient of the logits
                    scores.scatter_add_(1, target, scores.new_full(target.shape, -1.0))
                    _accumulate(grads, scores.to(dtype), part, matrix, first)
                del logits, in_place, scores  # before the next chunk's, not after
        ctx.save_for_backward(*(grad for grad in grads if grad is not None))
        ctx.given = [grad is not None for grad in grads]
        return total

    @staticmethod
    def backward(ctx: Any, *scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        # In place: the gradient of the head's weight is as large as the weight, and nobody reads it again.
        found = [next(saved).mul_(scale[0]) if given else None for given in ctx.given]
        return (*found, None, None)


def _accumulate(
    grads: list[torch.Tensor | None], scores: torch.Tensor, part: torch.Tensor, matrix: torch.Tensor, first: int
) -> None:
    """Add what the gradient `scores` of a chunk's logits gives for hidden states, weight and bias."""
    hidden, weight, bias = grads
    if hidden is not None:
        hidden[first : first + len(part)] = scores @ matrix
    if weight is not None:
        if weight.dtype == scores.dtype:
            weight.addmm_(scores.T, part)
        else:
            weight += scores.T @ part
    if bias is not None:
        bias += scores.sum(0, dtype=torch.float32)


def summed_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the sum of the cross entropies, nats, float32.

    `hidden`: (n, hidden size), `weight`: (vocabulary, hidden size), `targets`: int64 (n), none of them IGNORED.
    The gradient can be taken once: it is computed on the way and scaled in place.
    """
    return _SummedLoss.apply(hidden, weight, bias, targets, torch.is_grad_enabled())


def learned(labels: np.ndarray, shift: bool) -> np.ndarray:
    """Return the places, in rows laid end to end, whose hidden states predict a label; `shift`: that of the next token.

    Worked out where the labels are made: a GPU would have to be waited for, as it alone would know how many there are.

    >>> learned(np.array([[7, IGNORED, 8], [IGNORED, 9, IGNORED]]), shift=True)
    array([1, 3])
    """
    found = labels != IGNORED
    if shift:
        found = np.roll(found, -1, axis=1)
        found[:, -1] = False
    return np.flatnonzero(found)


@contextmanager
def _instead(layer: nn.Module, work: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Let `layer` do `work` when it is called."""
    layer.forward = work
    try:
        yield
    finally:
        del layer.forward  # the class's own again


class _Head:
    """What a model does after its layers: the module `whole` (RoBERTa: dense, norm) that ends in the `linear` layer."""

    def __init__(self, model: Any) -> None:
        layer = model.get_output_embeddings()
        # peft's modules_to_save: a trained copy stands in for the original.
        self.linear = layer.modules_to_save[layer.active_adapter] if hasattr(layer, "modules_to_save") else layer
        self.whole = next(
            (child for child in model.children() if any(module is layer for module in child.modules())), None
        )
        self.layer, self.shift = layer, getattr(model, "loss_type", None) != "ForMaskedLM"

    def before_linear(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.whole is self.layer:
            return hidden
        assert self.whole is not None
        with _instead(self.layer, lambda given: given):
            return self.whole(hidden)

    def loss(self, hidden: torch.Tensor, labels: torch.Tensor, places: torch.Tensor | None, items: Any) -> torch.Tensor:
        """Return the mean loss, over the labels of this batch or over `items` of them (of all accumulated batches)."""
        if places is None:
            places = torch.from_numpy(learned(labels.numpy(force=True), self.shift))
        places = places.to(hidden.device)
        chosen = hidden.flatten(0, 1).index_select(0, places)
        targets = labels.flatten().index_select(0, places + self.shift)
        linear, given = self.linear, self.before_linear(chosen)
        # Called, not only read: so DeepSpeed gathers its weights, here and in the backward pass, as any layer's.
        with _instead(linear, lambda given: summed_loss(given, linear.weight, targets, linear.bias)):
            total = linear(given)
        return total / (max(len(targets), 1) if items is None else items)


def _one_document(position_ids: torch.Tensor) -> None:
    """Stand in for transformers' `find_packed_sequence_indices` where the model counts the positions itself."""


def _several_documents(position_ids: torch.Tensor) -> torch.Tensor:
    """Do what `find_packed_sequence_indices` does: number the documents of each row, by where positions begin anew."""
    return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def _forward(model: Any, head: _Head, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `model.forward` with our loss where there are labels."""

    @functools.wraps(original)
    def forward(
        *args: Any,
        labels: torch.Tensor | None = None,
        learned: torch.Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return original(*args, **kwargs)
        kwargs.setdefault("use_cache", False)
        # transformers asks the device at every step whether there are several; the caller knows.
        found = _several_documents if kwargs.get("position_ids") is not None else _one_document
        with mock.patch.object(masking_utils, "find_packed_sequence_indices", found):
            hidden = model.base_model(*args, **kwargs)[0]
        loss = head.loss(hidden, labels.to(hidden.device), learned, num_items_in_batch)
        return (CausalLMOutput if head.shift else MaskedLMOutput)(loss=loss)

    return forward


@torch.no_grad()
def _why_not(model: Any, head: _Head, forward: Callable[..., Any]) -> str | None:
    """Return what the model does that our loss would miss, or None: asked of the model itself, not of a list of names.

    A hook replaces what the linear layer returns by known numbers: they must be the logits, so nothing caps or scales
    them. Then both losses of a short text must be the same, so nothing is added to it.
    """
    if type(head.linear) is not nn.Linear or head.whole is None:
        return f"its output layer is a {type(head.linear).__name__}"
    device = head.linear.weight.device
    vocabulary = len(head.linear.weight)
    ids = torch.tensor([[5, 1, 4, 2, 3, 0]], device=device) % vocabulary
    known = torch.arange(vocabulary, device=device, dtype=torch.float32).expand(*ids.shape, vocabulary)
    hook = head.layer.register_forward_hook(lambda *_: known)
    try:
        logits = model(input_ids=ids).logits
    finally:
        hook.remove()
    if not torch.equal(logits.float(), known):
        return "it changes the logits after its output layer"
    given = model(input_ids=ids, labels=ids)
    if getattr(given, "aux_loss", None) is not None:  # may be too small to be seen below, and still move the router
        return "it adds a loss of its router"
    theirs = given.loss
    try:
        ours = forward(input_ids=ids, labels=ids).loss
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, RuntimeError):  # ELECTRA makes hidden states smaller between, XLM's layer wants labels
        return "its output layer takes something else than its base model gives"
    if not torch.isclose(ours, theirs.float(), rtol=1e-2 if head.linear.weight.dtype != torch.float32 else 1e-4):
        return f"its loss of a short text is {theirs:.6f}, not {ours:.6f}"
    return None


def install(model: Any) -> bool:
    """Let `model` (bare, or wrapped by peft) compute its loss by chunks, when that is proven to be its own loss.

    Else the model keeps its way, with one printed line.
    """
    inner = bare(model)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return _refused("a prompt is learned before its input")
    if inner.get_output_embeddings() is None or inner.base_model is inner:
        return _refused("it has no output layer after its base model")
    head, original = _Head(inner), inner.forward
    forward = _forward(inner, head, original)
    with in_eval_mode(inner):  # else dropout would make both losses differ
        reason = _why_not(inner, head, forward)
    if reason:
        return _refused(reason)
    inner.forward = forward
    inner.accepts_loss_kwargs = True  # Trainer then gives the number of labels in all accumulated batches
    return True


@torch.no_grad()
def counts_itself(model: Any) -> bool:
    """Return whether a causal model's own loss is over `num_items_in_batch` labels, where it is told so.

    Some (BART, TrOCR) take the number and do nothing with it: over accumulated batches their means would be summed up.
    """
    inner = bare(model)
    ids = torch.tensor([[5, 1, 4, 2, 3, 0]], device=inner.get_input_embeddings().weight.device)
    try:
        with in_eval_mode(inner):
            mean, total = (inner(input_ids=ids, labels=ids, **given).loss for given in ({}, {"num_items_in_batch": 1}))
    except TypeError:
        return False
    return bool(total > 2 * mean)  # of five labels


def installed(model: Any) -> bool:
    """Return whether `model` computes its loss by chunks."""
    return bare(model).__dict__.get("accepts_loss_kwargs", False)


def bare(model: Any) -> Any:
    """Return the model inside of peft's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def in_eval_mode(model: Any) -> Iterator[None]:
    """Leave the training mode of each module meanwhile: no dropout, so no random number of the training is used up."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def mean_loss(model: Any, blocks: Any, batch_size: int) -> float:
    """Return what kit/model.py's `mean_loss` does, without logits, and with one wait for the device.

    AdaLoRA adds the size of its matrices to a loss, which is none of the text's, so there the model inside is asked;
    elsewhere the outer one, as FSDP gathers weights when that is called.
    """
    training = model.training
    inner = bare(model) if hasattr(model.base_model, "rankallocator") else model
    model.eval()
    device = inner.get_input_embeddings().weight.device
    total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    for first in range(0, len(blocks), batch_size):
        batch = blocks.__getitems__(list(range(first, min(first + batch_size, len(blocks)))))
        places = learned(batch["labels"].numpy(), blocks.causal)
        given = {**batch, "learned": torch.from_numpy(places)}
        given = {name: value.to(device) if torch.is_tensor(value) else value for name, value in given.items()}
        total += inner(**given, num_items_in_batch=1).loss
        tokens += len(places)
    model.train(training)
    if not tokens:
        raise ValueError("the held-out blocks have no learned token to evaluate.")
    return total.item() / tokens


def _refused(reason: str) -> bool:
    print(f"the model computes its loss from all logits, with more memory: {reason}.", flush=True)
    return False
