"""Texts as units, and runs of units as hashes: what two texts have in common, for every stage that asks.

    spans("It's 3.")[1]              ->   [(0, 2), (3, 4), (5, 6)]      units "it", "s", "3"
    for row, units, counts in pieces(texts): ...                        the same as hashes, some documents at a time
    whole_runs(units, 8)             ->   a hash for each run of 8 units

A run of letters and digits is a unit (a word), and so is each character of a script without spaces (Chinese, Japanese,
Thai, Lao, Khmer, Burmese, Yi), in any mixture: nothing turns on which script prevails. Case, full-width forms,
punctuation, symbols and white space do not count.

All hashes are arithmetic modulo 2**32 of our own over a frozen table of characters: they depend on the text, and on no
batch, worker, platform or version of a library.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kit.arrow import compute as pc

Column: TypeAlias = pa.Array | pa.ChunkedArray
Array: TypeAlias = npt.NDArray[Any]

WINDOW = 2**18  # bytes hashed at a time; from 2**17 to 2**19 equally fast, 2**16 a third slower
WITHOUT_SPACES = [(0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0xA4CF), (0xF900, 0xFAFF)]
WITHOUT_SPACES += [(0xFF66, 0xFF9F), (0xD800, 0xDFFF)]  # the last: surrogates, thus rare ideographs and emoji


def texts_of(documents: pa.RecordBatch, system: bool = True) -> pa.StringArray:
    """Return what each document of a batch says: its `text`, or the contents of its `messages`, a line each.

    system: also what its system turns say.
    """
    if "text" in documents.schema.names:
        return documents["text"]
    messages = documents["messages"]
    said, offsets = pc.struct_field(messages.values, "content").fill_null(""), messages.offsets
    if not system:
        chosen = pc.not_equal(pc.struct_field(messages.values, "role"), "system")
        before = np.append(0, np.cumsum(chosen.to_numpy(zero_copy_only=False)))
        said, offsets = said.filter(chosen), pa.array(before[offsets.to_numpy()].astype(np.int32))
    return pc.binary_join(pa.ListArray.from_arrays(offsets, said), "\n")


@cache
def _alphabet() -> tuple[Array, int]:
    """Return a code per UTF-16 code unit, uint16 (65536,), and the first code of those that are units by themselves.

    0 separates; then come letters and digits; then what stands alone. Categories are those of Unicode 3.2, which Python
    keeps beside its current ones and will not change; what came later counts as letters.
    """
    category = unicodedata.ucd_3_2_0.category
    alone = np.zeros(2**16, bool)
    for first, last in WITHOUT_SPACES:
        alone[first : last + 1] = True
    folded = np.arange(2**16)
    for unit in (*range(0x3400), *range(0xF900, 0x10000)):  # between: ideographs, Hangul, surrogates, private use
        if category(chr(unit)) in ("Cc", "Cf") or category(chr(unit))[0] in "ZPS":
            folded[unit] = 0
        else:
            lower = chr(unit - 0xFEE0 if 0xFF10 <= unit <= 0xFF5A else unit).lower()
            folded[unit] = ord(lower) if len(lower) == 1 else unit
    alone[folded == 0] = False
    codes = np.zeros(2**16, np.uint16)
    letters, others = np.unique(folded[~alone & (folded > 0)]), np.unique(folded[alone])
    codes[letters] = np.arange(1, len(letters) + 1)
    codes[others] = np.arange(len(letters) + 1, len(letters) + len(others) + 1)
    return codes[folded], len(letters) + 1


@cache
def _powers() -> tuple[Array, Array]:
    """Return the powers of a multiplier good modulo 2**32 (L'Ecuyer, 1999) and of its inverse, uint32 (WINDOW,)."""
    factors = np.repeat(np.array([[2891336453], [pow(2891336453, -1, 2**32)]], np.uint32), WINDOW, axis=1)
    factors[:, 0] = 1
    powers, inverses = np.multiply.accumulate(factors, axis=1, dtype=np.uint32)
    return powers, inverses


def _codes(text: str) -> tuple[Array, Array | None]:
    """Return the codes of a text, uint8 (n,) if it is ASCII, else uint16, and where its characters begin and it ends.

    None instead of the latter where each character has one code, thus where none is beyond U+FFFF.
    """
    if text.isascii():
        codes = _alphabet()[0][:256].astype(np.uint8).tobytes()
        return np.frombuffer(text.encode("ascii").translate(codes), np.uint8), None
    units = np.frombuffer(text.encode("utf-16-le"), "<u2")
    starts = None if len(units) == len(text) else np.append(np.flatnonzero((units & 0xFC00) != 0xDC00), len(units))
    return _alphabet()[0].take(units), starts


def mix(hashes: Array) -> Array:
    """Return uint32 hashes each bit of which depends on all bits (the finaliser of MurmurHash3, by Appleby)."""
    hashes = hashes ^ (hashes >> np.uint32(16))
    hashes *= np.uint32(0x85EBCA6B)
    hashes ^= hashes >> np.uint32(13)
    hashes *= np.uint32(0xC2B2AE35)
    hashes ^= hashes >> np.uint32(16)
    return hashes


def _prefix(values: Array) -> Array:
    """Return the polynomial in the first 0, 1, ... n values, uint32 (n + 1,).

    The hash of values[i:j] is (prefix[j] - prefix[i]) * inverses[i], the same wherever they stand.
    """
    sums = np.empty(len(values) + 1, np.uint32)
    sums[0] = 0
    terms = sums[1:]
    terms[:] = values
    terms *= _powers()[0][: len(values)]
    np.add.accumulate(terms, out=terms)
    return sums


def _units(code: Array, edges: Array) -> tuple[Array, Array, Array]:
    """Hash the units of documents that stand one after the other.

    code: of their characters, uint8 or uint16 (n,), n <= WINDOW. edges: where each begins and the last ends, (d + 1,).
    Returns a hash per unit, uint32; the number of them per document, int64 (d,); and where each unit begins.
    """
    begins, alone = _begins(code)
    inside = edges[edges < len(code)]
    begins[inside] = code[inside] > 0
    starts = np.flatnonzero(begins if alone is None else begins | alone)
    sums = _prefix(code).take(np.append(starts, len(code)))  # what lies between a unit and the next one adds 0
    hashes = mix((sums[1:] - sums[:-1]) * _powers()[1].take(starts))
    return hashes, np.diff(np.searchsorted(starts, edges)), starts


def _begins(code: Array) -> tuple[Array, Array | None]:
    """Return where a word begins, bool (n,), and what stands alone, or None when nothing can."""
    alone = code >= _alphabet()[1] if code.dtype == np.uint16 else None
    word = code > 0 if alone is None else (code > 0) & ~alone
    word[1:] &= ~word[:-1]
    return word, alone


def spans(text: str) -> tuple[list[bytes], list[tuple[int, int]]]:
    """Return the units of a text, equal where they are, and where each begins and ends in its UTF-16.

    >>> spans("It's 3.")[1]
    [(0, 2), (3, 4), (5, 6)]
    """
    code = _codes(text)[0].astype(np.uint16)
    begins, alone = _begins(code)
    assert alone is not None
    starts = np.flatnonzero(begins | alone)
    ends = np.flatnonzero((code > 0) & (alone | np.append((code[1:] == 0) | alone[1:], True)[: len(code)])) + 1
    places = list(zip(starts.tolist(), ends.tolist(), strict=True))
    return [code[begin:end].tobytes() for begin, end in places], places


def runs(units: Array, counts: Array, ngram: int) -> tuple[Array, Array]:
    """Return a hash per unit, uint32, and their number per document, int64 (d,).

    units: of documents that stand one after the other; counts: their number per document. The hash is that of the run
    that begins there, or of the document's last run when none does; a document shorter than a run is one. A hash may
    come several times.
    """
    if len(units) > WINDOW:  # one long document
        hashes = whole_runs(units, ngram)
        return hashes, np.array([len(hashes)])
    bounds = np.append(0, np.cumsum(counts))
    end = bounds[1:][counts > 0]
    last = np.maximum(end - ngram, bounds[:-1][counts > 0])
    run = np.zeros_like(units)
    if len(units) >= ngram:
        run[: len(units) - ngram + 1] = whole_runs(units, ngram)  # right but where it reaches into the next document
    sums = _prefix(units)
    run[last] = mix((sums[end] - sums[last]) * _powers()[1].take(last))
    beyond = end[:, None] - np.arange(1, ngram)
    wrong = beyond > last[:, None]
    run[beyond[wrong]] = np.repeat(run[last], wrong.sum(axis=1))
    return run, counts


def whole_runs(units: Array, ngram: int) -> Array:
    """Return the hash of each run of units, uint32 (len(units) - ngram + 1,), whatever documents they belong to."""
    hashes = np.empty(len(units) - ngram + 1, np.uint32)
    step = WINDOW - ngram + 1
    for begin in range(0, len(hashes), step):
        sums = _prefix(units[begin : begin + WINDOW])
        part = hashes[begin : begin + step]
        part[:] = mix((sums[ngram:] - sums[:-ngram]) * _powers()[1][: len(part)])
    return hashes


def run_hashes(units: Array, starts: Array, ngram: int) -> Array:
    """Return the hash of the runs that begin at these units, uint32 (len(starts),)."""
    hashes = np.zeros(len(starts), np.uint32)
    for place in range(ngram):
        hashes += units[starts + place] * _powers()[0][place]
    return mix(hashes)


def pieces(texts: Column) -> Iterator[tuple[int, Array, Array]]:
    """Yield the units of as many documents at a time as fill a window, or of one longer document.

    Each: row of the first document, hashes uint32, their number per document int64.
    """
    row = 0
    for chunk in texts.chunks if isinstance(texts, pa.ChunkedArray) else [texts]:
        chunk = chunk.fill_null("") if chunk.null_count else chunk
        edges = np.append(0, np.cumsum(byte_lengths(chunk), dtype=np.int64))
        begin = 0
        while begin < len(chunk):
            end = int(np.searchsorted(edges, edges[begin] + WINDOW, "right")) - 1
            end = max(begin + 1, min(end, begin + 2048))  # of short documents, as many as have their slots in the cache
            documents = chunk.slice(begin, end - begin).to_pylist()
            borders = np.cumsum([0, *map(len, documents)])
            code, starts = _codes("".join(documents))
            if len(code) > WINDOW:
                hashes = _long(code)
                yield row + begin, hashes, np.array([len(hashes)])
            else:
                yield row + begin, *_units(code, borders if starts is None else starts[borders])[:2]
            begin = end
        row += len(chunk)


def unit_hashes(text: str) -> Array:
    """Return the hash of each unit of one text, uint32."""
    found = [units for _, units, _ in pieces(pa.array([text], pa.string()))]
    return np.concatenate([np.zeros(0, np.uint32), *found])


def byte_lengths(texts: pa.Array) -> Array:
    """Return the UTF-8 bytes of each text, 0 for null, (n,)."""
    return pc.binary_length(texts).fill_null(0).to_numpy()


def _long(code: Array) -> Array:
    """Return the hashes of the units of one document longer than a window, uint32.

    A window that ends inside the document leaves its last unit, which may go on, to the next one. A word as long as a
    window is cut there.
    """
    hashes, begin = [], 0
    while begin + WINDOW < len(code):
        units, _, starts = _units(code[begin : begin + WINDOW], np.array([0, WINDOW]))
        goes_on = len(starts) > 1
        hashes.append(units[:-1] if goes_on else units)
        begin += int(starts[-1]) if goes_on else WINDOW
    hashes.append(_units(code[begin:], np.array([0, len(code) - begin]))[0])
    return np.concatenate(hashes)


def stands_alone(unit: bytes) -> bool:
    """Return whether a unit of `spans` is a character of a script without spaces."""
    return int.from_bytes(unit, sys.byteorder) >= _alphabet()[1] if len(unit) == 2 else False
