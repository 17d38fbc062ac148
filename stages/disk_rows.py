"""Rows that wait on disk, so that the memory of a stage does not grow with its corpus: ids, signatures, texts.

    signatures = Rows(folder, 128, np.uint16)
    signatures.append(some)                 # (n, 128); again and again
    signatures[10:20], signatures[[7, 3]]   # (10, 128), (2, 128)

The files have no name and vanish with the process. They are read, not mapped: mapped pages count as memory in use.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Array = npt.NDArray[Any]
NEAR = 16  # rows apart: nearer ones are read in one go, with what lies between
TOGETHER = 256  # rows asked for that are read in one go at most
ROWS = 2**16  # dealt into buckets at a time


class Rows:
    """Rows of `width` numbers of type `dtype`, in a nameless file in `folder` (None: where temporary files go)."""

    def __init__(self, folder: Path | None, width: int, dtype: npt.DTypeLike) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (it lives as long as this)
        self._width, self._dtype, self._length = width, np.dtype(dtype), 0

    def __len__(self) -> int:
        return self._length

    def append(self, rows: Array) -> None:
        """Add rows, (n, width), at the end."""
        _write(self._file.fileno(), memoryview(np.asarray(rows, self._dtype).tobytes()))
        self._length += len(rows)

    def __getitem__(self, rows: slice | Array) -> Array:
        """Return the rows of a slice without a step, or those of these numbers, in any order."""
        if isinstance(rows, slice):
            begin, end, _ = rows.indices(len(self))
            return self._read(begin, end)
        order = np.argsort(rows, kind="stable")
        wanted = np.asarray(rows)[order]
        result = np.empty((len(wanted), self._width), self._dtype)
        far = np.flatnonzero(np.diff(wanted) > NEAR) + 1
        cuts = np.unique(np.concatenate([[0], far, np.arange(0, len(wanted), TOGETHER), [len(wanted)]])).tolist()
        for begin, end in itertools.pairwise(cuts):
            if begin < end:
                part = wanted[begin:end]
                result[order[begin:end]] = self._read(int(part[0]), int(part[-1]) + 1)[part - part[0]]
        return result

    def _read(self, begin: int, end: int) -> Array:
        size = self._width * self._dtype.itemsize
        content = os.pread(self._file.fileno(), max(end - begin, 0) * size, begin * size)
        return np.frombuffer(content, self._dtype).reshape(-1, self._width)


class Buckets:
    """Rows of uint32 dealt into files by the high bits of their first number, so that equal ones lie together.

    expected: rows that will come; a file is for 2**16 of them, at most 64 files are open.
    """

    def __init__(self, folder: Path | None, width: int, expected: int) -> None:
        self._bits = min(6, max(0, (expected >> 16).bit_length()))
        self._files = [Rows(folder, width, np.uint32) for _ in range(1 << self._bits)]
        self._waiting: list[Array] = []

    def append(self, rows: Array) -> None:
        """Add rows, uint32 (n, width)."""
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= ROWS:
            self._deal()

    def __iter__(self) -> Iterator[Array]:
        """Yield the rows of one file after the other, those of each in the order in which they came."""
        self._deal()
        for file in self._files:
            if len(file):
                yield file[:]

    def _deal(self) -> None:
        if not self._waiting:
            return
        rows, self._waiting = np.concatenate(self._waiting), []
        number = rows[:, 0].astype(np.uint64) >> np.uint64(32 - self._bits)
        order = np.argsort(number, kind="stable")
        edges = np.searchsorted(number[order], np.arange(len(self._files) + 1))
        for file, (begin, end) in zip(self._files, itertools.pairwise(edges.tolist()), strict=True):
            file.append(rows[order[begin:end]])


class Texts:
    """The texts of some rows of a column, ascending, in a nameless file in `folder` (None: as of Rows)."""

    def __init__(self, folder: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (it lives as long as this)
        self._rows = np.zeros(0, np.int64)
        self._ends = np.zeros(0, np.int64)
        self._waiting: list[tuple[Array, Array]] = []
        self._size = 0

    def append(self, texts: pa.Array, chosen: Array, begin: int) -> None:
        """Add the texts at the places `chosen`, ascending, as rows begin + chosen, each beyond all added before."""
        wide = pa.types.is_large_string(texts.type)
        edges = np.frombuffer(texts.buffers()[1], np.int64 if wide else np.int32)[texts.offset :]
        content = memoryview(texts.buffers()[2] or b"")
        starts, ends = edges[chosen], edges[chosen + 1]
        pieces = [content[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        _write(self._file.fileno(), memoryview(b"".join(pieces)))
        self._waiting.append((begin + chosen, self._size + np.cumsum(ends - starts, dtype=np.int64)))
        self._size += int((ends - starts).sum(dtype=np.int64))

    def sizes(self, rows: Array) -> Array:
        """Return the UTF-8 bytes of the texts in these rows."""
        begin, end = self._places(rows)
        return end - begin

    def take(self, rows: Array) -> pa.Array:
        """Return the texts in these rows."""
        places = zip(*(place.tolist() for place in self._places(rows)), strict=True)
        return pa.array([os.pread(self._file.fileno(), end - begin, begin) for begin, end in places], pa.string())

    def _places(self, rows: Array) -> tuple[Array, Array]:
        if self._waiting:
            self._rows = np.concatenate([self._rows, *(rows for rows, _ in self._waiting)])
            self._ends = np.concatenate([self._ends, *(ends for _, ends in self._waiting)])
            self._waiting = []
        at = np.searchsorted(self._rows, rows)
        return np.append(0, self._ends)[at], self._ends[at]


def _write(descriptor: int, content: memoryview) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
