"""Find near duplicates: documents that share most of their runs of words or characters (MinHash and LSH).

    row  text                                          cluster  twin  similarity
    0    The cat sat on the mat, and then it slept.    0        -1    0
    1    Rivers of Europe, by length.                  1        -1    0
    2    the cat sat on the mat and then it slept!     0        0     1

A document is read as units (stages/text_units.py). Documents are compared as sets of runs of `ngram` units, of which a
shorter document is a single one.

Two signatures agree in a slot with the probability that is the Jaccard similarity of the sets. Each run is dealt into a
slot by its hash, and the least hash stays (one-permutation hashing: Li, Owen and Zhang, 2012); an empty slot copies
another (optimal densification: Shrivastava, 2017); 16 bits are kept (b-bit MinHash: Li and König, 2010).

A signature depends on the text and the parameters, and on no batch, worker, platform or version of a library.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

import disk_rows
import text_units
from text_units import Array, Column, mix, pieces, runs

Signatures: TypeAlias = Array | disk_rows.Rows  # uint16 (n, num_perm), in memory or on disk

BLOCK = 2**12  # signatures handled at a time
LEADERS = 64  # members of a bucket or cluster that all others are compared with, lest many make quadratic work
EMPTY = np.uint32(2**32 - 1)
NO_SIGNATURE = np.uint16(2**16 - 1)  # in every slot of a document without units


class Params(BaseModel):
    """Which documents are near duplicates."""

    model_config = ConfigDict(extra="forbid")

    threshold: float = Field(0.8, gt=0, le=1, description="least Jaccard similarity of near duplicates")
    ngram: int = Field(5, ge=1, le=64, description="units in a run: words, or characters of scripts without spaces")
    num_perm: Literal[64, 128, 256] = Field(
        128, description="slots of a signature, 2 bytes each; estimates err by 0.4 / sqrt(num_perm) at similarity 0.8"
    )
    exact: bool = Field(True, description="where the estimate leaves a doubt, decide on the exact similarity")


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
    for begin in range(0, len(hashes), text_units.WINDOW):  # once, but for a document longer than a window
        dealt = hashes[begin : begin + text_units.WINDOW]
        inside = np.diff(np.minimum(np.maximum(edges, begin), begin + len(dealt)))
        row = np.repeat(np.arange(0, len(slots), k), inside)
        np.minimum.at(slots, row + (dealt >> np.uint32(33 - k.bit_length())), dealt)
    return slots.reshape(len(counts), k)


@cache
def _preferences(k: int) -> tuple[Array, Array]:
    """Return for each slot all slots in a random order that begins with itself, int64 (k, k), and its inverse.

    The inverse, uint16 (k, k): at [t, s] the place of t in the order of s, times k, plus t. The least names the first.
    """
    keys = mix(np.arange(1, k * k + 1, dtype=np.uint32)).reshape(k, k)
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
        keys.append(mix(in_bands @ factors))
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
    texts: disk_rows.Texts,
    gone: Array | None = None,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return the kept document that each one of `company` duplicates, int32 (c,), its similarity, float32; else -1, 0.

    Rows stand in order of priority. The first of a cluster is kept, and so is each that is as near as the threshold to
    none that is kept before it: every document that goes has a near twin that stays, not one at the far end of a chain.
    Those that are `gone`, bool (c,), are kept by nobody and no one's twin.

    `texts`: those of `company`, when params.exact. Similarities are estimates, but exact where the estimate lies within
    the `doubt` of the threshold.
    """
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


def jaccard(texts: disk_rows.Texts, left: Array, right: Array, params: Params) -> npt.NDArray[np.float64]:
    """Return the Jaccard similarity of the texts in rows left[i] and right[i], (len(left),); 0 for two empty sets.

    Exact but for runs that share a hash of 32 bits: of a million different ones, about 100 do.
    """
    if len(left) == 0:
        return np.zeros(0)
    result = np.zeros(len(left))
    work = np.cumsum(texts.sizes(left) + texts.sizes(right))
    window = text_units.WINDOW
    for part in np.split(np.arange(len(left)), np.searchsorted(work, np.arange(window, work[-1:].sum(), window))):
        if len(part) == 0:
            continue
        rows, place = np.unique(np.append(left[part], right[part]), return_inverse=True)
        found = [runs(units, counts, params.ngram) for _, units, counts in pieces(texts.take(rows))]
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


def _distinct(values: Array) -> Array:
    """Return the different values, sorted; a tenth of the time of np.unique, which in numpy 2.4 builds a hash table."""
    values = np.sort(values)
    return values[np.append(True, values[1:] != values[:-1])[: len(values)]]
