"""How probable held-out documents are to a model, document by document. Part of evaluate_model.

Every learned token is predicted once: a document of tokens t0 ... t9 and max_length 4 is read as

    t0 t1 t2 t3 | t3 t4 t5 t6 | t6 t7 t8 t9      predicting 1-3, 4-6, 7-9; t0 (BOS) is given

A masked model reads t0 ... t3 | t4 ... t7 | t8 t9 and guesses the tokens that are masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from held_out import Document
from masking import Masking

Array = npt.NDArray[np.float64]


def windows(length: int, max_length: int) -> list[tuple[int, int]]:
    """Return (first, last) of the pieces of a document; each begins with the last token of the one before.

    >>> windows(10, 4)
    [(0, 4), (3, 7), (6, 10)]
    """
    return [(first, min(first + max_length, length)) for first in range(0, max(length - 1, 1), max_length - 1)]


def likelihoods(model: Any, documents: Sequence[Document], max_length: int, batch_size: int) -> Array:
    """Return for each document (nats, tokens, right), (documents, 3), over all learned tokens but its first.

    nats: the sum of -ln p(token | what stands before it); right: tokens that were the most probable ones.
    """
    import torch

    from kit.model import IGNORED, device

    pieces = [
        (row, document.ids[first:last].astype(np.int64), document.learned[first:last])
        for row, document in enumerate(documents)
        for first, last in windows(len(document.ids), max_length)
        if document.learned[first + 1 : last].any()
    ]
    pieces.sort(key=lambda piece: len(piece[1]))  # neighbours of like length need little padding
    sums = np.zeros((len(documents), 3))
    model.eval()
    for part in _batches([len(ids) for _, ids, _ in pieces], max_length * batch_size):
        batch = pieces[part]
        longest = len(batch[-1][1])
        inputs = torch.zeros(len(batch), longest, dtype=torch.long)
        labels = torch.full((len(batch), longest), IGNORED)
        for row, (_, ids, learned) in enumerate(batch):
            inputs[row, : len(ids)] = torch.from_numpy(ids)
            labels[row, : len(ids)] = torch.from_numpy(np.where(learned, ids, IGNORED))
        chosen = labels[:, 1:] != IGNORED
        with torch.inference_mode():
            # Padding stands behind, where a causal model cannot see it.
            logits = model(input_ids=inputs.to(device())).logits[:, :-1][chosen.to(device())]
        _add(sums, [owner for owner, _, _ in batch], chosen.numpy(), logits, labels[:, 1:][chosen])
    return sums


def _batches(lengths: list[int], tokens: int) -> Iterator[slice]:
    """Yield slices of pieces, sorted by length, that have at most `tokens` tokens when each is as long as the last."""
    start = 0
    for end, length in enumerate(lengths):
        if end > start and length * (end + 1 - start) > tokens:
            yield slice(start, end)
            start = end
    if lengths:
        yield slice(start, len(lengths))


def _add(sums: Array, owners: list[int], chosen: npt.NDArray[np.bool_], logits: Any, wanted: Any) -> None:
    """Add (nats, tokens, right) of the chosen places (rows, length) to the documents that the rows belong to."""
    import torch

    wanted = wanted.to(logits.device)
    nats = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none").double().cpu().numpy()
    right = (logits.argmax(-1) == wanted).cpu().numpy()
    of = np.repeat(owners, chosen.sum(axis=1))
    for column, values in enumerate((nats, np.ones(len(of)), right)):
        np.add.at(sums[:, column], of, values)


def guesses(model: Any, documents: Sequence[Document], max_length: int, batch_size: int, masking: Masking) -> Array:
    """Return for each document (nats, tokens, right), (documents, 3), of what `masking` hides from a masked model.

    The same is hidden from each model.
    """
    owners, pieces = _cut(documents, max_length)
    sums = np.zeros((len(documents), 3))
    numbers = sorted(range(len(pieces)), key=lambda number: len(pieces[number][0]))
    for part in _batches([len(pieces[number][0]) for number in numbers], max_length * batch_size):
        batch = numbers[part]
        ids, filled, learned = _padded([pieces[number] for number in batch])
        inputs, chosen = masking(ids, learned, np.array(batch))
        _add(sums, [owners[number] for number in batch], chosen, *_masked(model, inputs, filled, chosen, ids))
    return sums


def pseudo_likelihoods(
    model: Any, documents: Sequence[Document], max_length: int, batch_size: int, masking: Masking, tokens: int
) -> Array:
    """Return for each document (nats, tokens, right), (documents, 3), each token hidden alone from a masked model.

    exp(nats / tokens) is the pseudo-perplexity (Salazar et al., 2020). A token costs a whole pass, so of all learned
    ones only `tokens` are taken, at equal distances.
    """
    owners, pieces = _cut(documents, max_length)
    eligible = [np.flatnonzero(learned & ~masking.special[ids]) for ids, learned in pieces]
    ends = np.cumsum([0, *map(len, eligible)])
    total = int(ends[-1])
    places = np.unique(np.linspace(0, total - 1, min(tokens, total)).round().astype(int))
    sums = np.zeros((len(documents), 3))
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        numbers = np.searchsorted(ends, batch, "right") - 1
        ids, filled, _ = _padded([pieces[number] for number in numbers])
        chosen = np.zeros(ids.shape, bool)
        hidden = [eligible[number][place - ends[number]] for number, place in zip(numbers, batch, strict=True)]
        chosen[np.arange(len(batch)), hidden] = True
        inputs = np.where(chosen, masking.mask, ids)
        _add(sums, [owners[number] for number in numbers], chosen, *_masked(model, inputs, filled, chosen, ids))
    return sums


Piece = tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]


def _cut(documents: Sequence[Document], max_length: int) -> tuple[list[int], list[Piece]]:
    """Return the documents in pieces of max_length tokens, and the document of each."""
    owners, pieces = [], []
    for row, document in enumerate(documents):
        for first in range(0, len(document.ids), max_length):
            part = slice(first, first + max_length)
            owners.append(row)
            pieces.append((document.ids[part].astype(np.int64), document.learned[part]))
    return owners, pieces


def _padded(pieces: list[Piece]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return ids, which of them are no padding, and which are learned; (pieces, length of the longest)."""
    shape = len(pieces), max(len(ids) for ids, _ in pieces)
    ids, filled, learned = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool)
    for row, (piece, marks) in enumerate(pieces):
        ids[row, : len(piece)], filled[row, : len(piece)], learned[row, : len(piece)] = piece, 1, marks
    return ids, filled, learned


def _masked(model: Any, inputs: Any, filled: Any, chosen: Any, ids: Any) -> tuple[Any, Any]:
    """Return logits and ids of the chosen tokens."""
    import torch

    from kit.model import device

    model.eval()
    seen, mask, places, wanted = (torch.from_numpy(each).to(device()) for each in (inputs, filled, chosen, ids))
    with torch.inference_mode():
        return model(input_ids=seen, attention_mask=mask).logits[places], wanted[places]
