"""Find near duplicates: documents that share most of their runs of words or characters (MinHash and LSH).

    row  text                                          cluster  twin  similarity
    0    The cat sat on the mat, and then it slept.    0        -1    0
    1    Rivers of Europe, by length.                  1        -1    0
    2    the cat sat on the mat and then it slept!     0        0     1

A document is read as units: a run of letters and digits is one (a word), and each character of a script without spaces
(Chinese, Japanese, Thai, Lao, Khmer, Burmese, Yi) is one, in any mixture: nothing turns on which script prevails. Case,
full-width forms, punctuation, symbols and white space do not count. Documents are compared as sets of runs of `ngram`
units, of which a shorter document is a single one.

Two signatures agree in a slot with the probability that is the Jaccard similarity of the sets. Each run is dealt into a
slot by its hash, and the least hash stays (one-permutation hashing: Li, Owen and Zhang, 2012); an empty slot copies
another (optimal densification: Shrivastava, 2017); 16 bits are kept (b-bit MinHash: Li and König, 2010).

All hashes are arithmetic modulo 2**32 of our own over a frozen table of characters: a signature depends on the text and
the parameters, and on no batch, worker, platform or version of a library.
"""

from __future__ import annotations

import itertools
import sys
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

import disk_rows
from kit.arrow import compute as pc

Column: TypeAlias = pa.Array | pa.ChunkedArray
Array: TypeAlias = npt.NDArray[Any]
Signatures: TypeAlias = Array | disk_rows.Rows  # uint16 (n, num_perm), in memory or on disk

BLOCK = 2**12  # signatures handled at a time
WINDOW = 2**18  # bytes hashed at a time; from 2**17 to 2**19 equally fast, 2**16 a third slower
LEADERS = 64  # members of a bucket or cluster that all others are compared with, lest many make quadratic work
EMPTY = np.uint32(2**32 - 1)
NO_SIGNATURE = np.uint16(2**16 - 1)  # in every slot of a document without units
WITHOUT_SPACES = [(0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0xA4CF), (0xF900, 0xFAFF)]
WITHOUT_SPACES += [(0xFF66, 0xFF9F), (0xD800, 0xDFFF)]  # the last: surrogates, thus rare ideographs and emoji


class Params(BaseModel):
    """Which documents are near duplicates."""

    model_config = ConfigDict(extra="forbid")

    threshold: float = Field(0.8, gt=0, le=1, description="least Jaccard similarity of near duplicates")
    ngram: int = Field(5, ge=1, le=64, description="units in a run: words, or characters of scripts without spaces")
    num_perm: Literal[64, 128, 256] = Field(
        128, description="slots of a signature, 2 bytes each; estimates err by 0.4 / sqrt(num_perm) at similarity 0.8"
    )
    exact: bool = Field(True, description="where the estimate leaves a doubt, decide on the exact similarity")


# -- Texts to hashes of runs -----------------------------------------------------------------------------------------


def texts_of(documents: pa.RecordBatch) -> pa.StringArray:
    """Return what each document of a batch says: its `text`, or the contents of its `messages`, a line each."""
    if "text" in documents.schema.names:
        return documents["text"]
    messages = documents["messages"]
    said = pc.struct_field(messages.values, "content").fill_null("")
    return pc.binary_join(pa.ListArray.from_arrays(messages.offsets, said), "\n")


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


def _mix(hashes: Array) -> Array:
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
    hashes = _mix((sums[1:] - sums[:-1]) * _powers()[1].take(starts))
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
    run[last] = _mix((sums[end] - sums[last]) * _powers()[1].take(last))
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
        part[:] = _mix((sums[ngram:] - sums[:-ngram]) * _powers()[1][: len(part)])
    return hashes


def run_hashes(units: Array, starts: Array, ngram: int) -> Array:
    """Return the hash of the runs that begin at these units, uint32 (len(starts),)."""
    hashes = np.zeros(len(starts), np.uint32)
    for place in range(ngram):
        hashes += units[starts + place] * _powers()[0][place]
    return _mix(hashes)


def pieces(texts: Column) -> Iterator[tuple[int, Array, Array]]:
    """Yield the units of as many documents at a time as fill a window, or of one longer document.

    Each: row of the first document, hashes uint32, their number per document int64.
    """
    row = 0
    for chunk in texts.chunks if isinstance(texts, pa.ChunkedArray) else [texts]:
        chunk = chunk.fill_null("") if chunk.null_count else chunk
        edges = np.append(0, np.cumsum(_byte_lengths(chunk), dtype=np.int64))
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


def _byte_lengths(texts: pa.Array) -> Array:
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


def _distinct(values: Array) -> Array:
    """Return the different values, sorted; a tenth of the time of np.unique, which in numpy 2.4 builds a hash table."""
    values = np.sort(values)
    return values[np.append(True, values[1:] != values[:-1])[: len(values)]]


def stands_alone(unit: bytes) -> bool:
    """Return whether a unit of `spans` is a character of a script without spaces."""
    return int.from_bytes(unit, sys.byteorder) >= _alphabet()[1] if len(unit) == 2 else False


# -- Hashes to signatures --------------------------------------------------------------------------------------------


def signatures(texts: Column, params: Params) -> npt.NDArray[np.uint16]:
    """Return the signature of each text, uint16 (len(texts), num_perm); the share of equal slots estimates Jaccard.

    A text without units, or null, has 65535 in every slot. Any cut of the texts into batches gives the same rows.
    """
    result = np.empty((len(texts), params.num_perm), np.uint16)
    for row, units, counts in pieces(texts):
        result[row : row + len(counts)] = sign(units, counts, params)
    return result


def sign(units: Array, counts: Array, params: Params) -> npt.NDArray[np.uint16]:
    """Return the signatures of the documents of a piece, uint16 (len(counts), num_perm)."""
    slots = _slots(*runs(units, counts, params.ngram), params.num_perm)
    sparse = np.flatnonzero((slots == EMPTY).any(axis=1) & (counts > 0))
    if len(sparse):
        slots[sparse] = _densify(slots[sparse])
    return (slots & np.uint32(0xFFFF)).astype(np.uint16)


def _slots(hashes: Array, counts: Array, k: int) -> Array:
    """Return the least hash in each slot, uint32 (documents, k), or EMPTY. The high bits of a hash name its slot."""
    slots = np.full(len(counts) * k, EMPTY)
    edges = np.append(0, np.cumsum(counts))
    for begin in range(0, len(hashes), WINDOW):  # once, but for a document longer than a window
        dealt = hashes[begin : begin + WINDOW]
        inside = np.diff(np.minimum(np.maximum(edges, begin), begin + len(dealt)))
        row = np.repeat(np.arange(0, len(slots), k), inside)
        np.minimum.at(slots, row + (dealt >> np.uint32(33 - k.bit_length())), dealt)
    return slots.reshape(len(counts), k)


@cache
def _preferences(k: int) -> tuple[Array, Array]:
    """Return for each slot all slots in a random order that begins with itself, int64 (k, k), and its inverse.

    The inverse, uint16 (k, k): at [t, s] the place of t in the order of s, times k, plus t. The least names the first.
    """
    keys = _mix(np.arange(1, k * k + 1, dtype=np.uint32)).reshape(k, k)
    np.fill_diagonal(keys, 0)
    order = np.argsort(keys, axis=1, kind="stable")
    return order, (np.argsort(order, axis=1).T * k + np.arange(k)[:, None]).astype(np.uint16)


def _densify(slots: Array) -> Array:
    """Return rows of slots whose empty ones copy the first full one in their order. Each row has a full one."""
    number = np.count_nonzero(slots != EMPTY, axis=1)
    many = number > slots.shape[1] // 4
    result = np.empty_like(slots)
    result[many] = _walk(slots[many])
    result[~many] = _pick(slots[~many], number[~many])
    return result


def _walk(slots: Array) -> Array:
    """Densify by looking from slot to slot: the quicker way where many are full."""
    k = slots.shape[1]
    order, _ = _preferences(k)
    result = slots.copy()
    empty = np.flatnonzero(slots == EMPTY)
    for step in range(1, k):
        if len(empty) == 0:
            break
        slot = empty % k
        value = slots.take(empty - slot + order[:, step].take(slot))
        result.reshape(-1)[empty] = value
        empty = empty[value == EMPTY]
    return result


def _pick(slots: Array, number: Array) -> Array:
    """Densify by comparing the places of all full slots, whose number is given: the quicker way where few are full."""
    k = slots.shape[1]
    _, places = _preferences(k)
    full = np.flatnonzero(slots != EMPTY) % k
    first = np.cumsum(number) - number
    best = np.full(slots.shape, 2**16 - 1, np.uint16)
    for step in range(number.max(initial=0)):
        row = np.flatnonzero(number > step)
        best[row] = np.minimum(best[row], places.take(full.take(first[row] + step), axis=0))
    return slots.take((best & np.uint16(k - 1)) + np.arange(0, slots.size, k)[:, None])


# -- Signatures to clusters and twins --------------------------------------------------------------------------------


def bands(params: Params) -> tuple[int, int]:
    """Return (bands, slots per band): the longest bands of which a pair at the threshold shares one with 0.98.

    A pair of similarity s shares one of b bands of r slots with probability 1 - (1 - s**r)**b (Leskovec, Rajaraman and
    Ullman, "Mining of massive datasets", 3.4).
    """
    for slots in range(params.num_perm, 1, -1):
        number = params.num_perm // slots
        if 1 - (1 - params.threshold**slots) ** number >= 0.98:
            return number, slots
    return params.num_perm, 1


def estimates(signatures: Signatures, left: Array, right: Array) -> npt.NDArray[np.float64]:
    """Return the share of slots in which the rows left[i] and right[i] agree, (len(left),)."""
    share = np.zeros(len(left))
    for part in (slice(begin, begin + BLOCK) for begin in range(0, len(left), BLOCK)):
        share[part] = (signatures[left[part]] == signatures[right[part]]).mean(axis=1)
    return share


def doubt(params: Params) -> float:
    """Return how far from the threshold t an estimate decides nothing: 2 errors of sqrt(t (1 - t) / num_perm)."""
    return float(2 * (params.threshold * (1 - params.threshold) / params.num_perm) ** 0.5)


class Company(NamedTuple):
    """The documents that share their cluster with another; all others are alone."""

    rows: Array  # ascending, int32 (c,)
    cluster: Array  # the least row of its cluster, int32 (c,)


def clusters(signatures: Signatures, params: Params, folder: Path | None = None) -> Company:
    """Return the clusters of two documents and more.

    Pairs that share a band and whose estimate reaches the threshold connect; with `exact`, those in doubt, too: of a
    pair at the threshold it is below half of the time. The order of the documents decides nothing but the name.
    A document without units stays alone. Keys of bands wait in nameless files in `folder`.
    """
    # First who shares a band with whom, for only these have to be kept in mind; few do.
    keys, empty = _band_keys(signatures, params, folder)
    shared, ends = disk_rows.Rows(folder, 2, np.uint32), [0]
    meets = np.zeros(len(signatures), bool)
    for band in range(bands(params)[0]):
        buckets = disk_rows.Buckets(folder, 2, len(signatures))
        for begin in range(0, len(keys), BLOCK):
            key = keys[begin : begin + BLOCK][:, band]
            keyed = np.column_stack([key, np.arange(begin, begin + len(key), dtype=np.uint32)])
            buckets.append(keyed[~empty[begin : begin + BLOCK]])
        for keyed in buckets:
            keyed = keyed[np.argsort(keyed[:, 0], kind="stable")]
            equal = keyed[1:, 0] == keyed[:-1, 0]
            again = keyed[np.append(False, equal) | np.append(equal, False)]
            if len(again):
                meets[again[:, 1]] = True
                shared.append(again)
                ends.append(len(shared))
    members = np.flatnonzero(meets).astype(np.int32)
    del meets, empty
    parent = np.arange(len(members), dtype=np.int32)
    for begin, end in itertools.pairwise(ends):
        names, rows = shared[begin:end].T
        _connect(names, np.searchsorted(members, rows), parent, members, signatures, params)
    root = _find(parent, np.arange(len(parent)))
    company = np.bincount(root, minlength=len(root))[root] > 1
    return Company(members[company], members[root[company]])


def _band_keys(signatures: Signatures, params: Params, folder: Path | None) -> tuple[disk_rows.Rows, Array]:
    """Return a hash of each band of each row, uint32 (n, bands), and whether the row is that of a text without units.

    Unlike rows that share a hash cost a comparison, no more.
    """
    number, slots = bands(params)
    factors = np.multiply.accumulate(np.full(slots, 2891336453, np.uint32), dtype=np.uint32)
    keys, empty = disk_rows.Rows(folder, number, np.uint32), np.zeros(len(signatures), bool)
    for begin in range(0, len(signatures), BLOCK):
        block = signatures[begin : begin + BLOCK]
        in_bands = block[:, : number * slots].astype(np.uint32).reshape(len(block), number, slots)
        keys.append(_mix(in_bands @ factors))
        suspect = np.flatnonzero(block[:, 0] == NO_SIGNATURE)
        empty[begin + suspect] = (block[suspect] == NO_SIGNATURE).all(axis=1)
    return keys, empty


def _connect(keys: Array, rows: Array, parent: Array, members: Array, signatures: Signatures, params: Params) -> None:
    """Unite the near rows of each bucket; keys: of the buckets, ascending; rows: in them, ascending.

    rows, parent: places in `members`, whose signatures stand in the rows that it names.

    One member after the other is compared with all later ones that are not yet in its cluster, so that the clusters are
    those of all pairs whatever their order. Ends after LEADERS members, or when a bucket is one cluster.
    """
    for place in range(LEADERS):
        if len(rows) == 0:
            return
        first = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
        sizes = np.diff(np.append(first, len(keys)))
        roots = _find(parent, rows)
        apart = (np.minimum.reduceat(roots, first) != np.maximum.reduceat(roots, first)) & (sizes > place + 1)
        still = np.repeat(apart, sizes)
        keys, rows, roots, sizes = keys[still], rows[still], roots[still], sizes[apart]
        leader = np.repeat(np.cumsum(sizes) - sizes + place, sizes)
        later = np.flatnonzero((np.arange(len(rows)) > leader) & (roots != roots[leader]))
        left, right = rows[leader[later]], rows[later]
        near = estimates(signatures, members[left], members[right]) >= params.threshold - params.exact * doubt(params)
        _unite(parent, left[near], right[near])


def _compare(groups: Array, rows: Array, alike: Callable[[Array, Array], Array]) -> None:
    """Compare the first member of each group with the others; those unlike it do the same among themselves.

    groups, rows: sorted by group, then row. alike(firsts, others) -> bool each. Ends after LEADERS rounds.
    """
    for _ in range(LEADERS):
        if len(rows) == 0:
            return
        first = np.append(True, groups[1:] != groups[:-1])
        leader = rows[first][np.cumsum(first) - 1]
        other = np.flatnonzero(~first)
        other = other[~alike(leader[other], rows[other])]
        groups, rows = groups[other], rows[other]


def _find(parent: Array, rows: Array) -> Array:
    """Return the root of each row in a forest where parents stand before their children, and let it be the parent."""
    root = parent[rows]
    while not np.array_equal(above := parent[root], root):
        root = above
    parent[rows] = root
    return root


def _unite(parent: Array, left: Array, right: Array) -> None:
    """Join the trees of left[i] and right[i]; the lesser root stays one."""
    while len(left):
        left, right = _find(parent, left), _find(parent, right)
        left, right = np.minimum(left, right)[left != right], np.maximum(left, right)[left != right]
        np.minimum.at(parent, right, left)


def near_twins(
    signatures: Signatures,
    company: Company,
    params: Params,
    texts: Column | disk_rows.Texts | None = None,
    gone: Array | None = None,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return the kept document that each one of `company` duplicates, int32 (c,), its similarity, float32; else -1, 0.

    Rows stand in order of priority. The first of a cluster is kept, and so is each that is as near as the threshold to
    none that is kept before it: every document that goes has a near twin that stays, not one at the far end of a chain.
    Those that are `gone`, bool (c,), are kept by nobody and no one's twin.

    `texts`: those of the signatures, of `company` alone at least; needed when params.exact. Similarities are estimates,
    but exact where the estimate lies within the `doubt` of the threshold.
    """
    if params.exact and texts is None:
        raise ValueError(
            "near_twins needs the texts to settle what the signatures leave in doubt; or set exact: false."
        )
    rows = company.rows
    twin, similarity = np.full(len(rows), -1, np.int32), np.zeros(len(rows), np.float32)

    def alike(left: Array, right: Array) -> Array:
        found = estimates(signatures, rows[left], rows[right])
        if params.exact:
            open_ = np.flatnonzero(np.abs(found - params.threshold) <= doubt(params))
            found[open_] = jaccard(texts, rows[left[open_]], rows[right[open_]], params)
        near = found >= params.threshold
        twin[right[near]], similarity[right[near]] = rows[left[near]], found[near]
        return near

    places = np.flatnonzero(np.ones(len(rows), bool) if gone is None else ~gone)
    places = places[np.argsort(company.cluster[places], kind="stable")]
    _compare(company.cluster[places], places, alike)
    return twin, similarity


def jaccard(
    texts: Column | disk_rows.Texts | None, left: Array, right: Array, params: Params
) -> npt.NDArray[np.float64]:
    """Return the Jaccard similarity of the texts in rows left[i] and right[i], (len(left),); 0 for two empty sets.

    Exact but for runs that share a hash of 32 bits: of a million different ones, about 100 do.
    """
    if len(left) == 0:
        return np.zeros(0)
    assert texts is not None
    result = np.zeros(len(left))
    work = np.cumsum(_sizes(texts, left) + _sizes(texts, right))
    for part in np.split(np.arange(len(left)), np.searchsorted(work, np.arange(WINDOW, work[-1:].sum(), WINDOW))):
        if len(part) == 0:
            continue
        rows, place = np.unique(np.append(left[part], right[part]), return_inverse=True)
        found = [runs(units, counts, params.ngram) for _, units, counts in pieces(_take(texts, rows))]
        hashes, counts = (np.concatenate([piece[i] for piece in found]) for i in (0, 1))
        size = counts[place]  # of the left documents, then of the right ones
        first = (np.cumsum(counts) - counts)[place] - (np.cumsum(size) - size)
        pair = np.tile(np.arange(len(part), dtype=np.uint64), 2)
        side = np.repeat(np.array([0, 1], np.uint64), len(part))
        member = hashes[np.repeat(first, size) + np.arange(size.sum())]
        key = _distinct(np.repeat(pair << 33 | side, size) | member.astype(np.uint64) << 1)
        shared = key[1:][key[1:] >> 1 == key[:-1] >> 1]
        both, common = (np.bincount((keys >> 33).astype(np.int64), minlength=len(part)) for keys in (key, shared))
        result[part] = common / np.maximum(both - common, 1)
    return result


def _sizes(texts: Column | disk_rows.Texts, rows: Array) -> Array:
    """Return the UTF-8 bytes of the texts in these rows."""
    if isinstance(texts, disk_rows.Texts):
        return texts.sizes(rows)
    chunks = texts.chunks if isinstance(texts, pa.ChunkedArray) else [texts]
    return np.concatenate([_byte_lengths(chunk) for chunk in chunks], dtype=np.int64)[rows]


def _take(texts: Column | disk_rows.Texts, rows: Array) -> pa.Array:
    """Return the texts in these rows, ascending. (`take` of a chunked array would first join all its chunks.)"""
    if isinstance(texts, disk_rows.Texts):
        return texts.take(rows)
    chunks = texts.chunks if isinstance(texts, pa.ChunkedArray) else [texts]
    cuts = np.cumsum([0, *map(len, chunks)])
    ends = np.searchsorted(rows, cuts)
    hit = np.flatnonzero(np.diff(ends))
    return pa.concat_arrays([chunks[i].take(pa.array(rows[ends[i] : ends[i + 1]] - cuts[i])) for i in hit])
