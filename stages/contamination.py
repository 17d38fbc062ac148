"""How much of a held-out document stands in the training text as well. Part of evaluate_model.

    trained on    "... a generator is a function which returns a generator iterator, it looks like a normal ..."
    held out      "A generator is a function which returns a generator iterator. It looks like a normal one"
    share         0.94: all but the last of its 16 words lie in runs of 13 words that both have

A unit is a word, or a character of a script without spaces (stages/text_units.py); a run has 13 words or 20
characters, as in decontaminate, and 8 units in a document that is shorter. The share of units that lie in a common run
is what Llama 2 reports as contamination (Touvron et al., 2023, appendix A.6), which calls a sample clean below 0.2.

Runs are compared by 64 bits of hash. Memory holds the held-out runs; the training text streams through.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import text_units
from decontaminate import CHARACTERS, SHORTEST, WORDS, run_keys

Array = npt.NDArray[Any]


def shares(held_out: list[str], train: Iterable[pa.Array]) -> npt.NDArray[np.float64]:
    """Return for each held-out text the share of its units in a run that a training text has, too."""
    texts = [text_units.unit_hashes(text) for text in held_out]
    lengths = np.array([_length(text) for text in held_out], int)
    runs = {}
    for length in sorted(set(lengths.tolist()) - {0}):
        rows = np.flatnonzero(lengths == length)
        keys = np.unique(
            np.concatenate([run_keys(texts[row], np.arange(len(texts[row]) - length + 1), length) for row in rows])
        )
        runs[length] = keys, np.zeros(len(keys), bool)
    if not runs:
        return np.zeros(len(held_out))
    # A run begins with one of these 8 units; a look into a table of bits is ten times as fast as a search.
    first = np.zeros(2**22, bool)
    for keys, _ in runs.values():
        first[(keys >> np.uint64(42)).astype(np.int64)] = True
    for batch in train:
        for _, units, counts in text_units.pieces(batch):
            if len(units) >= SHORTEST:
                _mark(units, counts, runs, first)
    return np.array([_share(units, length, runs) for units, length in zip(texts, lengths.tolist(), strict=True)])


def _length(text: str) -> int:
    """Return the units of a run in this text, 0 when it is too short to say anything."""
    units = text_units.spans(text)[0]
    alone = sum(map(text_units.stands_alone, units))
    whole = CHARACTERS if alone > len(units) / 2 else WORDS
    return whole if len(units) >= whole else SHORTEST if len(units) >= SHORTEST else 0


def _mark(units: Array, counts: Array, runs: dict[int, tuple[Array, Array]], first: Array) -> None:
    """Mark the runs that these training texts hold."""
    ends = np.cumsum(counts)
    starts = np.flatnonzero(first[text_units.whole_runs(units, SHORTEST) >> np.uint32(10)])
    end = ends[np.searchsorted(ends, starts, "right")]
    for length, (known, seen) in runs.items():
        keys = run_keys(units, starts[starts + length <= end], length)
        place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        seen[place[known[place] == keys]] = True


def _share(units: Array, length: int, runs: dict[int, tuple[Array, Array]]) -> float:
    if not length:
        return 0.0
    known, seen = runs[length]
    starts = np.arange(len(units) - length + 1)
    common = starts[seen[np.searchsorted(known, run_keys(units, starts, length))]]
    edges = np.zeros(len(units) + 1, int)
    np.add.at(edges, common, 1)
    np.add.at(edges, common + length, -1)
    return float((np.cumsum(edges)[:-1] > 0).mean())
