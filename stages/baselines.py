"""How well a text is predicted by what is no language model: the scale for bits per byte. Part of evaluate_model.

    scale(b"ab" * 500, b"ab" * 5000)   ->  {"order0": 1.0, "gzip": 0.24, "xz": 0.64, "ngram": 0.001}

order0, gzip and xz see the held-out text alone; ngram counts in the training text, as the model learns from it.
"""

from __future__ import annotations

import gzip
import lzma
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
NAMES = ("order0", "gzip", "xz", "ngram")
ORDER = 6  # bytes of a run: at most 8 fit into a key
TRAIN_BYTES = 2**24  # counted of the training text: of Chinese statutes 4 MiB give 1.76 bits, 16 MiB 1.39 in 6.5 s


def scale(text: bytes, train: bytes) -> dict[str, float]:
    """Return the bits per byte of `text` for its own order-0 byte model, gzip -9, xz -9e and an n-gram model."""
    shares = np.array(list(Counter(text).values())) / len(text)
    return {
        "order0": round(float(-(shares * np.log2(shares)).sum()), 6),
        "gzip": round(8 * len(gzip.compress(text, 9, mtime=0)) / len(text), 6),
        "xz": round(8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text), 6),
        "ngram": round(ngram(train, text), 6),
    }


def ngram(train: bytes, text: bytes, order: int = ORDER) -> float:
    """Return the bits per byte of `text` for byte runs counted in `train`, interpolated down to 1/256.

    p(c | h) = (count(h c) + types(h) p(c | shorter h)) / (count(h) + types(h))   (Witten and Bell, 1991)
    """
    chance = np.full(len(text), 1 / 256)
    for length in range(1, order + 1):
        if min(len(train), len(text)) < length:
            break
        known, counts = _counted(_keys(train, length))
        begins = np.flatnonzero(np.append(True, known[1:] >> 8 != known[:-1] >> 8))
        contexts, total = known[begins] >> 8, np.add.reduceat(counts, begins)
        types = np.diff(np.append(begins, len(known)))
        keys = _keys(text, length)
        of = _find(contexts, keys >> 8)
        seen = of >= 0
        run = _find(known, keys)
        count = np.where(run >= 0, counts[run], 0)
        lower = chance[length - 1 :]
        lower[seen] = (count[seen] + types[of[seen]] * lower[seen]) / (total[of[seen]] + types[of[seen]])
    return float(-np.log2(chance).sum() / len(text))


def _keys(text: bytes, length: int) -> Array:
    """Return each run of `length` bytes as one number, uint64 (len(text) - length + 1,)."""
    values = np.frombuffer(text, np.uint8)
    number = len(values) - length + 1
    keys = np.zeros(number, np.uint64)
    for place in range(length):
        keys <<= np.uint64(8)
        keys |= values[place : place + number]
    return keys


def _counted(keys: Array) -> tuple[Array, Array]:
    """Return the different keys, sorted, and how often each is there; sorts what it is given."""
    keys.sort()  # in place, without a second 8 bytes for each byte of text
    begins = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
    return keys[begins], np.diff(np.append(begins, len(keys)))


def _find(known: Array, keys: Array) -> Array:
    """Return the place of each key among `known`, which are sorted, or -1."""
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[place] == keys, place, -1)
