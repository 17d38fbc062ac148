"""The documents of a split in the order in which group_blocks writes them: who comes when, and how often.

    sources a (weight 2) with documents 1 2, b (weight 1.5) with 3 4, of which the draw takes 4:

    turn 0   1 2 3 4        all sources by name, all documents by row
    turn 1   1 2 4          those that are shown twice

Nothing but the weights and the documents' own identities decides, so the order can be told from data/tokens and
grouping.json alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from kit import arrow
from kit.arrow import compute as pc


class Documents(NamedTuple):
    """Neighbouring documents of one source: their tokens one after the other, without a Python object for each."""

    turn: int  # the pass over the sources, from 0
    source: str
    doc_ids: pa.FixedSizeBinaryArray
    lengths: np.ndarray  # int64
    ids: np.ndarray
    learn: np.ndarray | None  # bool; None: all are learned


def times(doc_ids: pa.FixedSizeBinaryArray, weight: float) -> np.ndarray:
    """Return how often each document is shown: the whole part of `weight`, and once more for a drawn share of them.

    The draw is the document's own: its identity is a hash of its content, of which the last 8 bytes decide.
    """
    points = np.frombuffer(doc_ids.buffers()[1], "<u8").reshape(-1, 2)
    points = points[doc_ids.offset : doc_ids.offset + len(doc_ids), 1] / 2.0**64
    return int(weight) + (points < weight % 1)


def documents(folders: list[Path], split: str, weights: dict[str, float]) -> Iterator[Documents]:
    """Yield the documents of `split`, memory-mapped, turn by turn; each takes part in as many as `times` says."""
    of = {folder: weights.get(folder.name, 1.0) for folder in folders}
    for number in itertools.count():
        shown = [folder for folder in folders if of[folder] > number]
        if not shown:
            return
        for folder in shown:
            for batch in arrow.batches(folder):
                wanted = pc.equal(batch["split"], split).to_numpy(zero_copy_only=False)
                if of[folder] != 1:
                    wanted = wanted & (times(batch["doc_id"], of[folder]) > number)
                if wanted.any():
                    yield _chosen(number, folder.name, batch, wanted)


def _chosen(turn: int, source: str, batch: pa.RecordBatch, wanted: np.ndarray) -> Documents:
    """Return the wanted rows of a batch: views of it when all are, else one copy of each run of neighbours."""
    offsets = batch["input_ids"].offsets.to_numpy().astype(np.int64)
    lengths, offsets = np.diff(offsets), offsets - offsets[0]
    ids, learn = batch["input_ids"].flatten().to_numpy(), None
    if "learn" in batch.schema.names:
        learn = batch["learn"].flatten().to_numpy(zero_copy_only=False)
    if wanted.all():
        return Documents(turn, source, batch["doc_id"], lengths, ids, learn)
    runs = offsets[np.flatnonzero(np.diff(wanted, prepend=False, append=False))].reshape(-1, 2).tolist()
    ids = np.concatenate([ids[first:last] for first, last in runs])
    if learn is not None:
        learn = np.concatenate([learn[first:last] for first, last in runs])
    return Documents(turn, source, batch["doc_id"].filter(pa.array(wanted)), lengths[wanted], ids, learn)


def part(found: Documents, first: int, last: int) -> Documents:
    """Return the documents from `first` to before `last`."""
    begin, end = int(found.lengths[:first].sum()), int(found.lengths[:last].sum())
    learn = None if found.learn is None else found.learn[begin:end]
    doc_ids = found.doc_ids.slice(first, last - first)
    return found._replace(doc_ids=doc_ids, lengths=found.lengths[first:last], ids=found.ids[begin:end], learn=learn)


def nothing_learned(learn: np.ndarray | None, lengths: np.ndarray, first: int) -> np.ndarray:
    """Return of which documents, one after the other, none of the first so many tokens is learned, bool (n,).

    >>> nothing_learned(np.array([False, False, True, True]), np.array([3, 1]), 2)
    array([ True, False])
    """
    if learn is None:
        return np.zeros(len(lengths), bool)
    reach, ends = np.append(0, np.cumsum(learn)), np.cumsum(lengths)
    begins = ends - lengths
    return reach[begins + np.minimum(lengths, first)] == reach[begins]


def rule_of(long_documents: str | Mapping[str, str], source: str) -> str:
    """Return what becomes of documents of a source that are longer than a block: split, truncate or drop."""
    return long_documents if isinstance(long_documents, str) else long_documents.get(source, "split")


def windows(stream: Iterator[Documents], tokens: int) -> Iterator[Documents]:
    """Yield the documents in groups of one turn; a group ends with the document that brings it to `tokens`.

    What packs documents sees one group at a time, so memory does not grow with the corpus, and a document that is shown
    again is never in a block with itself.
    """
    waiting: list[Documents] = []
    size = 0
    for found in stream:
        if waiting and waiting[0].turn != found.turn:
            yield _joined(waiting)
            waiting, size = [], 0
        while len(found.lengths):
            rows = len(found.lengths)
            last = min(rows, int(np.searchsorted(np.cumsum(found.lengths), tokens - size)) + 1)
            head, found = part(found, 0, last), part(found, last, rows)
            waiting.append(head)
            size += len(head.ids)
            if size >= tokens:
                yield _joined(waiting)
                waiting, size = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(parts: list[Documents]) -> Documents:
    learn = None
    if any(one.learn is not None for one in parts):
        learn = np.concatenate([np.ones(len(one.ids), bool) if one.learn is None else one.learn for one in parts])
    lengths, ids = (np.concatenate([getattr(one, name) for one in parts]) for name in ("lengths", "ids"))
    return Documents(parts[0].turn, "", pa.concat_arrays([one.doc_ids for one in parts]), lengths, ids, learn)


def expected_tokens(folder: Path, split: str, weight: float) -> tuple[int, int]:
    """Return the tokens that the documents of `split` hold, once, and as often as each is shown."""
    once = shown = 0
    for batch in arrow.batches(folder):
        lengths = np.diff(batch["input_ids"].offsets.to_numpy()).astype(np.int64)
        lengths *= pc.equal(batch["split"], split).to_numpy(zero_copy_only=False)
        once += int(lengths.sum())
        shown += int((lengths * times(batch["doc_id"], weight)).sum())
    return once, shown
