"""Decide for each document of a phase: train, eval, or dropped as a duplicate with its twin named.

Reads:  data/clean/PHASE/*/documents, data/benchmarks, data/exclusions.txt (and, with entries there, the ledgers)
Writes: data/dedup/PHASE/SOURCE   one row per row of that source's documents, in the same order
Params: phases.PHASE.dedup

Example, sources a and b of one phase:

    a: "one", "two"    b: "two", "three"
    dedup/a: train, eval            (say the hash of "two" falls into the eval share)
    dedup/b: dropped, train         rule exact_duplicate, twin a/1, similarity 1.0

A document is dropped by the first of these rules that holds:

    excluded            it, its raw record, or a document in its cluster of near duplicates stands in
                        data/exclusions.txt (stages/exclusions.py): no twin takes its place
    decontaminate:NAME  its text holds an item of the benchmark NAME (stages/decontaminate.py); a near twin without may
                        stay
    exact_duplicate     an earlier document, which is kept, says the same, whatever of it is learned
    near_duplicate      an earlier document, which is kept, shares most of its runs of words, but for those of system
                        turns (stages/near_duplicates.py)

Earlier is a document of a source of higher priority, or one higher up in the same source. The sources in `priority`
come first, in that order, then the others by name; the order in which params.yaml lists them decides nothing.

The split is drawn for a cluster as a whole, from content and seed alone: the same text is never on both sides, and new
documents move no old one (save the one that stands in for an empty split of a tiny phase, and what they unite into one
cluster). Ids, signatures and texts wait on disk; what stays in memory is 2 bytes a document, and 40 of one with a twin.
"""

from __future__ import annotations

import difflib
import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

if __name__ == "__main__":  # before numpy is imported
    from kit.start import lean

    lean()

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, field_validator

import decontaminate
import exclusions
import near_duplicates
import text_units
from decontaminate import Params as BenchmarkParams
from disk_rows import Buckets, Rows, Texts
from exclusions import Exclusions
from kit import arrow, stage
from kit.arrow import compute as pc
from kit.params import phase_sources, read_params
from near_duplicates import Company
from near_duplicates import Params as NearParams

Array = npt.NDArray[Any]
Ids = Array | Rows  # uint8 (n, 16), in memory or on disk
DECISIONS = pa.schema(
    [
        pa.field("doc_id", pa.binary(16)),
        pa.field("split", pa.string()),  # train, eval or dropped
        pa.field("rule", pa.string()),  # why it is dropped, else null
        pa.field("twin", pa.string()),  # the kept document, as source/row
        pa.field("similarity", pa.float32()),  # to the twin, 0 to 1
        pa.field("cluster", pa.string()),  # of near duplicates: its first document, as source/row; null: it is alone
        pa.field("evidence", pa.string()),  # of decontaminate: file and line of the item, and what is in common
    ]
)
PART = 2**14  # ids read at a time
TRAIN, EVAL, EXCLUDED, CONTAMINATED, EXACT, NEAR = range(6)
RULES = {EXCLUDED: "excluded", EXACT: "exact_duplicate", NEAR: "near_duplicate"}


class Params(BaseModel):
    """`phases.PHASE.dedup`: what is dropped, and how much is held out."""

    model_config = ConfigDict(extra="forbid")

    eval_fraction: float = Field(0.05, gt=0, lt=1, description="share of the documents held out for evaluation")
    near_duplicates: NearParams | None = Field(
        None, description="drop near duplicates, too (`{}` for the usual threshold of 0.8); null: exact ones alone"
    )
    priority: list[str] = Field(
        [], description="sources whose documents are kept before those of the next and of all others, which go by name"
    )
    decontaminate: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], BenchmarkParams] = Field(
        {}, description="benchmarks of which no document may hold an item, e.g. {quiz: {fields: [question]}}"
    )
    seed: int = Field(0, ge=0, lt=2**64, description="another seed holds out other documents")

    @field_validator("priority")
    @classmethod
    def _once(cls, names: list[str]) -> list[str]:
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"`{twice[0]}` stands there twice; name each source once.")
        return names


class Copies(NamedTuple):
    """The documents whose content an earlier one has."""

    rows: Array  # ascending, int32 (c,)
    first: Array  # the first row of that content, int32 (c,)


class Near(NamedTuple):
    """What the near-duplicate search says of the documents in company: see stages/near_duplicates.py."""

    company: Company
    twin: Array  # the kept document that it duplicates, or -1
    similarity: Array


class Decisions(NamedTuple):
    """What becomes of each document."""

    verdict: Array  # TRAIN, EVAL, or why it is dropped, int8 (n,)
    rows: Array  # of the duplicates, ascending, int32 (d,)
    twin: Array  # row of the kept document, int32 (d,)
    similarity: Array  # float32 (d,)
    company: Company  # with the copies of its documents


def in_order(sources: list[str], priority: list[str]) -> list[str]:
    """Return the sources, those of `priority` first. Raises ValueError when it names another.

    >>> in_order(["a", "b", "c"], ["c"])
    ['c', 'a', 'b']
    """
    for name in priority:
        if name not in sources:
            near = difflib.get_close_matches(name, sources, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"they are {', '.join(sources)}."
            raise ValueError(f"`priority` names `{name}`, which is no source of this phase; {hint}")
    return [*priority, *(name for name in sources if name not in priority)]


def split_points(ids: Array, seed: int) -> npt.NDArray[np.float64]:
    """Return where documents stand in [0, 1): those below `eval_fraction` are held out. ids: uint8 (n, 16).

    >>> split_points(np.zeros((1, 16), np.uint8), 0)
    array([0.33866446])
    """
    content, key = ids.tobytes(), seed.to_bytes(8, "little")
    hashes = [hashlib.sha256(key + content[at : at + 16]).digest()[:8] for at in range(0, len(content), 16)]
    # 53 bits of the first 7 bytes: exact as a float.
    return (np.frombuffer(b"".join(hashes), "<u8") << np.uint64(8) >> np.uint64(11)) / 2**53


def identify(ids: Ids, folder: Path | None = None) -> Copies:
    """Return which documents are equal to an earlier one. folder: of temporary files."""
    buckets = Buckets(folder, 5, len(ids))
    for begin, part in _parts(ids):
        row = np.arange(begin, begin + len(part), dtype=np.uint32)
        buckets.append(np.column_stack([np.ascontiguousarray(part).view(np.uint32), row]))
    found = [np.zeros((0, 2), np.uint32)]
    for bucket in buckets:
        high, low = np.ascontiguousarray(bucket[:, :4]).view(np.uint64).T
        order = np.lexsort((low, high))  # stable: of equal ids the first row comes first
        same = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
        place = np.arange(len(order))
        first = np.maximum.accumulate(np.where(np.append(False, same), 0, place))
        copies = np.flatnonzero(first < place)
        found.append(np.stack([bucket[order[copies], 4], bucket[order[first[copies]], 4]], axis=1))
    pairs = np.concatenate(found).astype(np.int32)
    rows, first = pairs[np.argsort(pairs[:, 0])].T
    return Copies(rows, first)


def _parts(ids: Ids) -> Iterator[tuple[int, Array]]:
    """Yield the first row and the ids of some documents at a time."""
    for begin in range(0, len(ids), PART):
        yield begin, ids[begin : begin + PART]


def decide(
    ids: Ids,
    copies: Copies,
    params: Params,
    near: Near | None,
    excluded: frozenset[bytes],
    contaminated: Iterable[int],
) -> Decisions:
    """Return what becomes of each document. excluded: their ids. contaminated: rows, without copies.

    No split stays empty: when no cluster falls into the eval share, the one nearest to it is held out; when all do, the
    last one is trained on. Raises ValueError when there are fewer than two clusters to choose from.
    """
    verdict = np.full(len(ids), TRAIN, np.int8)
    verdict[copies.rows] = EXACT
    none = np.zeros(0, np.int32)
    (rows, cluster), twin, similarity = near or (Company(none, none), none, np.zeros(0, np.float32))
    verdict[rows[twin >= 0]] = NEAR
    verdict[np.fromiter(contaminated, np.int64)] = CONTAMINATED
    if excluded:
        for begin, part in _parts(ids):
            named = [begin + place for place, one in enumerate(part) if one.tobytes() in excluded]
            verdict[named] = EXCLUDED
            verdict[rows[np.isin(cluster, cluster[np.isin(rows, named)])]] = EXCLUDED

    drawn = verdict == TRAIN
    kept = np.isin(cluster, cluster[drawn[rows]])  # of whose cluster somebody stays
    drawn[rows] = False
    drawn[(least := _least(ids, rows, cluster))[kept]] = True
    _draw(ids, drawn, params)
    drawn[rows] = drawn[least]
    verdict[drawn & (verdict == TRAIN)] = EVAL
    del drawn

    fate = verdict[copies.first]
    verdict[copies.rows] = np.where(fate <= EVAL, EXACT, fate)  # other copies share the fate of the first
    of_first = np.searchsorted(rows, copies.first[fate == NEAR])
    exact, again = copies.rows[fate <= EVAL], copies.rows[fate == NEAR]
    own = np.flatnonzero(verdict[rows] == NEAR)
    duplicates = np.concatenate([exact, again, rows[own]])
    order = np.argsort(duplicates)
    twins = np.concatenate([copies.first[fate <= EVAL], twin[of_first], twin[own]])
    similarities = np.concatenate([np.ones(len(exact), np.float32), similarity[of_first], similarity[own]])
    return Decisions(
        verdict, duplicates[order], twins[order], similarities[order], _with_copies(Company(rows, cluster), copies)
    )


def _with_copies(company: Company, copies: Copies) -> Company:
    """Return the company with the copies of its documents."""
    there = np.isin(copies.first, company.rows)
    found = company.cluster[np.searchsorted(company.rows, copies.first[there])]
    rows, cluster = np.append(company.rows, copies.rows[there]), np.append(company.cluster, found)
    order = np.argsort(rows)
    return Company(rows[order], cluster[order])


def _least(ids: Ids, rows: Array, cluster: Array) -> Array:
    """Return for each of these rows the one of its cluster with the least id: that one stands for it in the draw."""
    high, low = ids[rows].view(">u8").T
    order = np.lexsort((low, high, cluster))
    name = cluster[order]
    first = np.flatnonzero(np.append(True, name[1:] != name[:-1])[: len(name)])
    return rows[order[first]][np.searchsorted(name[first], cluster)]


def _draw(ids: Ids, drawn: Array, params: Params) -> None:
    """Leave of the documents that `drawn`, bool (n,), marks those that are held out; at least one, and not all."""
    nearest, last = (2.0, 0), (-1.0, 0)
    before = int(drawn.sum())
    if before < 2:
        raise ValueError("the phase has fewer than two different documents, so none can be held out; add text.")
    for begin, part in _parts(ids):
        places = np.flatnonzero(drawn[begin : begin + len(part)])
        points = split_points(part[places], params.seed)
        drawn[begin + places] = points < params.eval_fraction
        if len(places):
            low, high = points.argmin(), points.argmax()
            nearest = min(nearest, (float(points[low]), begin + int(places[low])))
            last = max(last, (float(points[high]), begin + int(places[high])))
    if not drawn.any():
        drawn[nearest[1]] = True
    elif drawn.sum() == before:
        drawn[last[1]] = False


def taken_out(clean: Path, sources: list[str], ids: Ids, excluded: Exclusions) -> tuple[frozenset[bytes], int]:
    """Return the ids of the documents that an entry names, by doc_id or by the raw_id in the ledger; entries found."""
    documents, found, row = set(), set(), 0
    for source in sources if excluded else ():
        for batch in arrow.batches(clean / source / "ledger", ["raw_id", "rule"]):
            kept = batch["raw_id"].filter(batch["rule"].is_null()).to_pylist()
            for doc_id, raw_id in zip((one.tobytes() for one in ids[row : row + len(kept)]), kept, strict=True):
                if marked := {one for one in (doc_id, raw_id) if one in excluded}:
                    documents.add(doc_id)
                    found |= marked
            row += len(kept)
    return frozenset(documents), len(found)


def read_ids(folders: dict[str, Path], work: Path) -> Rows:
    """Return the ids of the documents of the sources, in order, uint8 (n, 16), in a nameless file in `work`."""
    ids = Rows(work, 16, np.uint8)
    for folder in folders.values():
        for batch in arrow.batches(folder, ["doc_id"]):
            flat = np.frombuffer(batch["doc_id"].buffers()[1], np.uint8).reshape(-1, 16)
            ids.append(flat[batch["doc_id"].offset :][: batch.num_rows])
    return ids


def all_texts(folders: dict[str, Path], copies: Array) -> Iterator[tuple[pa.Array, pa.Array]]:
    """Yield the texts of all documents, in order, some at a time; of a conversation, its messages joined.

    Beside them the texts that make twins, without system turns: one that all conversations share would make twins of
    them all. Those in the rows `copies`, ascending, are null: whoever looks for duplicates has nothing to look for in
    them.
    """
    row = 0
    for folder in folders.values():
        for batch in arrow.batches(folder):
            found = [text_units.texts_of(batch)]
            if "messages" in batch.schema.names:
                found.append(text_units.texts_of(batch, system=False))
            begin, end = np.searchsorted(copies, [row, row + len(batch)])
            if begin < end:
                is_copy = np.zeros(len(batch), bool)
                is_copy[copies[begin:end] - row] = True
                found = [pc.if_else(pa.array(is_copy), None, texts) for texts in found]
            yield found[0], found[-1]
            row += len(batch)


def search(
    folders: dict[str, Path], copies: Copies, params: Params, items: list[decontaminate.Item], work: Path
) -> tuple[Near | None, dict[int, decontaminate.Hit]]:
    """Return the near duplicates among the documents that are no copies, and which hold an item of a benchmark.

    work: the folder of temporary files.
    """
    settings = params.near_duplicates
    if not settings and not items:
        return None, {}
    index = decontaminate.Index(items)
    signatures = Rows(work, settings.num_perm if settings else 0, np.uint16)
    hits: dict[int, decontaminate.Hit] = {}
    begin = 0
    for texts, said in all_texts(folders, copies.rows):
        for row, units, counts in text_units.pieces(texts) if items or said is texts else []:
            if settings and said is texts:
                signatures.append(near_duplicates.sign(units, counts, settings))
            hits |= {begin + row + place: hit for place, hit in index.find(units, counts, texts[row:])}
        if settings and said is not texts:
            for _, units, counts in text_units.pieces(said):
                signatures.append(near_duplicates.sign(units, counts, settings))
        begin += len(texts)
    if not settings:
        return None, hits
    company = near_duplicates.clusters(signatures, settings, work)
    waiting = Texts(work)
    begin = 0
    for _, said in all_texts(folders, copies.rows) if settings.exact else []:
        first, last = np.searchsorted(company.rows, [begin, begin + len(said)])
        waiting.append(said, company.rows[first:last] - begin, begin)
        begin += len(said)
    gone = np.isin(company.rows, np.fromiter(hits, np.int64))
    return Near(company, *near_duplicates.near_twins(signatures, company, settings, waiting, gone)), hits


def table(
    ids: pa.Array, begin: int, decisions: Decisions, starts: dict[str, int], hits: dict[int, decontaminate.Hit]
) -> pa.Table:
    """Return the decisions about the documents with these ids, of which the first is row `begin` of all.

    starts: the first row of each source, ascending. hits: by row of all.
    """
    names, firsts = list(starts), list(starts.values())
    verdict = decisions.verdict[begin : begin + len(ids)]
    first, last = np.searchsorted(decisions.rows, [begin, begin + len(ids)])
    duplicate = slice(first, last)
    first, last = np.searchsorted(decisions.company.rows, [begin, begin + len(ids)])
    together = slice(first, last)

    def named(rows: Array) -> pa.Array:
        """Return the names of documents, as source/row."""
        sources = [bisect_right(firsts, row) - 1 for row in rows.tolist()]
        each = zip(sources, rows.tolist(), strict=True)
        return pa.array([f"{names[source]}/{row - firsts[source]}" for source, row in each], pa.string())

    found = [hits[begin + row] for row in np.flatnonzero(verdict == CONTAMINATED).tolist()]
    rules = pa.array([RULES.get(number) for number in range(6)], pa.string()).take(pa.array(verdict))
    if found:
        contaminated = pa.array([f"decontaminate:{hit.benchmark}" for hit in found], pa.string())
        rules = pc.replace_with_mask(rules, pa.array(verdict == CONTAMINATED), contaminated)

    def spread(values: pa.Array, rows: Array) -> pa.Array:
        """Return the values in their rows, null in all others."""
        place = np.full(len(ids), -1)
        place[rows] = np.arange(len(rows))
        return values.take(pa.array(place, mask=place < 0))

    own = decisions.rows[duplicate] - begin
    columns = [
        ids,
        pa.array(["train", "eval", "dropped"]).take(pa.array(np.minimum(verdict, 2))),
        rules,
        spread(named(decisions.twin[duplicate]), own),
        spread(pa.array(decisions.similarity[duplicate]), own),
        spread(named(decisions.company.cluster[together]), decisions.company.rows[together] - begin),
        spread(pa.array([hit.evidence for hit in found], pa.string()), np.flatnonzero(verdict == CONTAMINATED)),
    ]
    return pa.Table.from_arrays(columns, schema=DECISIONS)


def main(phase: str) -> None:
    params = read_params(f"phases.{phase}.dedup", Params)
    clean = Path("data/clean", phase)
    inputs = [str(clean), exclusions.FILE, str(decontaminate.FOLDER)]
    with stage.run("dedup", phase, inputs, [f"data/dedup/{phase}"]) as run:
        (folder,) = run.outputs
        sources = in_order(phase_sources(phase, clean), params.priority)
        folders = {source: clean / source / "documents" for source in sources}
        items = [item for name, how in sorted(params.decontaminate.items()) for item in decontaminate.read(name, how)]
        excluded = exclusions.read(Path(exclusions.FILE))  # first: a missing key is said at once
        ids = read_ids(folders, folder)
        copies = identify(ids, folder)
        near, hits = search(folders, copies, params, items, folder)
        gone, here = taken_out(clean, sources, ids, excluded)
        decisions = decide(ids, copies, params, near, gone, hits)
        if hits:  # copies share them
            pairs = zip(copies.rows.tolist(), copies.first.tolist(), strict=True)
            hits |= {row: hits[first] for row, first in pairs if first in hits}
        sizes = [arrow.manifest(path)["counts"]["rows"] for path in folders.values()]
        starts = dict(zip(sources, np.cumsum([0, *sizes]).tolist(), strict=False))
        total: Counter[str] = Counter()
        for (source, start), size in zip(starts.items(), sizes, strict=True):
            counts: Counter[str] = Counter()
            with arrow.Writer(folder / source, DECISIONS) as out:
                for batch in arrow.batches(folders[source], ["doc_id"]):
                    decided = table(batch["doc_id"], start + out.rows, decisions, starts, hits)
                    counts.update(decided["split"].to_pylist())
                    total.update(decided["rule"].drop_null().to_pylist())
                    out.write(decided)
                out.counts = {split: counts[split] for split in ("train", "eval", "dropped")}
            run.balance(
                f"documents of {source}", size, kept=counts["train"] + counts["eval"], dropped=counts["dropped"]
            )
            total.update(counts)
        run.count(documents=sum(sizes), train=total["train"], eval=total["eval"])
        run.count(**{rule: total[rule] for rule in RULES.values()})
        # An id of another phase is in order; one that no phase has is a slip of the pen or the proof of an erasure.
        run.count(exclusions=len(excluded), exclusions_not_here=len(excluded) - here)
        for name in sorted(params.decontaminate):
            mine = [item for item in items if item.benchmark == name]
            short = sum(item.run == 0 for item in mine)
            run.count(**{f"decontaminate:{name}": total[f"decontaminate:{name}"]})
            run.count(**{f"items of {name}": len(mine), f"items of {name} too short": short})


if __name__ == "__main__":
    stage.cli(main, __doc__)
