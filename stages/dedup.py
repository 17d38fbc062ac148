"""Decide for each document of a phase: train, eval, or dropped as a duplicate with its twin named.

Reads:  data/clean/PHASE/*/documents, data/exclusions.txt, data/benchmarks
Writes: data/dedup/PHASE/SOURCE   one row per row of that source's documents, in the same order
Params: phases.PHASE.dedup

Example, sources a and b of one phase:

    a: "one", "two"    b: "two", "three"
    dedup/a: train, eval            (say the hash of "two" falls into the eval share)
    dedup/b: dropped, train         rule exact_duplicate, twin a/1, similarity 1.0

A document is dropped by the first of these rules that holds:

    excluded            its doc_id, or that of one in its cluster of near duplicates, stands in data/exclusions.txt: no
                        twin takes its place
    decontaminate:NAME  its text holds an item of the benchmark NAME (stages/decontaminate.py); a near twin without may
                        stay
    exact_duplicate     an earlier document, which is kept, has equal content
    near_duplicate      an earlier document, which is kept, shares most of its runs of words (stages/near_duplicates.py)

Earlier is a document of a source of higher priority, or one higher up in the same source. The sources in `priority`
come first, in that order, then the others by name; the order in which params.yaml lists them decides nothing.

The split is drawn for a cluster as a whole, from content and seed alone: the same text is never on both sides, and new
documents move no old one (save the one that stands in for an empty split of a tiny phase, and what they unite into one
cluster). Signatures and texts wait on disk; what stays in memory is some 50 bytes a document.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, field_validator

import decontaminate
import near_duplicates
from decontaminate import Params as BenchmarkParams
from disk_rows import Rows, Texts
from kit import arrow, stage
from kit.arrow import compute as pc
from kit.params import phase_sources, read_params
from near_duplicates import Params as NearParams

Array = npt.NDArray[Any]
DECISIONS = pa.schema(
    [
        pa.field("doc_id", pa.binary(16)),
        pa.field("split", pa.string()),  # train, eval or dropped
        pa.field("rule", pa.string()),  # why it is dropped, else null
        pa.field("twin", pa.string()),  # the kept document, as source/row
        pa.field("similarity", pa.float32()),  # to the twin, 0 to 1
        pa.field("evidence", pa.string()),  # of decontaminate: file and line of the item, and what is in common
    ]
)
EXCLUSIONS = "data/exclusions.txt"
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


class Documents(NamedTuple):
    """The documents of a phase, in order of priority."""

    ids: Array  # uint8 (n, 16)
    first: Array  # the first row of equal content, int32 (n,)
    rank: Array  # place of the id among all, int32 (n,)


class Near(NamedTuple):
    """What the near-duplicate search says of the different documents, in order: see stages/near_duplicates.py."""

    cluster: Array  # the first document of its cluster
    twin: Array  # the kept document that it duplicates, or -1
    similarity: Array


class Decisions(NamedTuple):
    """What becomes of each document, in order."""

    verdict: Array  # TRAIN, EVAL, or why it is dropped, int8 (n,)
    twin: Array  # row of the kept document, int32 (n,), or -1
    similarity: Array  # float32 (n,)


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


def split_point(doc_id: bytes, seed: int) -> float:
    """Return where a document stands in [0, 1): below `eval_fraction` it is held out.

    >>> split_point(bytes(16), 0) == split_point(bytes(16), 0) != split_point(bytes(16), 1)
    True
    """
    key = hashlib.sha256(seed.to_bytes(8, "little") + doc_id).digest()[:7]
    return (int.from_bytes(key, "little") >> 3) / 2**53  # 53 bits: exact as a float


def identify(ids: Array) -> Documents:
    """Return which documents are equal. ids: uint8 (n, 16)."""
    high, low = ids.view(">u8").T
    order = np.lexsort((low, high)).astype(np.int32)  # stable: of equal ids the first row comes first
    new = np.zeros(len(ids), bool)
    new[:1] = True
    for half in (high, low):
        ordered = half[order]
        new[1:] |= ordered[1:] != ordered[:-1]
    first, rank = np.empty(len(ids), np.int32), np.empty(len(ids), np.int32)
    rank[order] = np.cumsum(new, dtype=np.int32)
    first[order] = order[new][rank[order] - 1]
    return Documents(ids, first, rank)


def decide(
    documents: Documents,
    params: Params,
    near: Near | None = None,
    excluded: frozenset[bytes] = frozenset(),
    contaminated: Array | None = None,
) -> Decisions:
    """Return what becomes of each document. near, contaminated (rows): of the different documents, in order.

    No split stays empty: when no cluster falls into the eval share, the one nearest to it is held out; when all do, the
    last one is trained on. Raises ValueError when there are fewer than two clusters to choose from.
    """
    ids, first, rank = documents
    is_first = first == np.arange(len(ids), dtype=np.int32)
    different = np.flatnonzero(is_first).astype(np.int32)
    cluster = near.cluster if near else np.arange(len(different), dtype=np.int32)
    verdict = np.full(len(different), TRAIN, np.int8)
    twin, similarity = np.full(len(different), -1, np.int32), np.zeros(len(different), np.float32)
    if near:
        found = np.flatnonzero(near.twin >= 0)
        verdict[found], twin[found], similarity[found] = NEAR, different[near.twin[found]], near.similarity[found]
    if contaminated is not None:
        verdict[contaminated] = CONTAMINATED
    if excluded:
        named = [place for place, row in enumerate(different) if ids[row].tobytes() in excluded]
        verdict[np.isin(cluster, cluster[named])] = EXCLUDED

    # A cluster goes by its least id, whichever of its documents came first.
    least = np.full(len(different), len(ids) + 1, np.int32)
    np.minimum.at(least, cluster, rank[different])
    kept = np.zeros(len(different), bool)
    kept[cluster[verdict == TRAIN]] = True
    held_out = _draw(ids, different[(rank[different] == least[cluster]) & kept[cluster]], params)
    del least
    kept[cluster[np.searchsorted(different, held_out)]] = False
    verdict[(verdict == TRAIN) & ~kept[cluster]] = EVAL

    place = (np.cumsum(is_first, dtype=np.int32) - 1)[first]
    result = Decisions(verdict[place], twin[place], similarity[place])
    copies = np.flatnonzero(~is_first & (result.verdict <= EVAL))  # other copies share the fate of the first
    result.verdict[copies], result.twin[copies], result.similarity[copies] = EXACT, first[copies], 1
    return result


def _draw(ids: Array, rows: Array, params: Params) -> Array:
    """Return those of these documents whose cluster is held out; at least one, and not all."""
    if len(rows) < 2:
        raise ValueError("the phase has fewer than two different documents, so none can be held out; add text.")
    held_out = np.zeros(len(rows), bool)
    nearest, last = (2.0, 0), (-1.0, 0)
    for place, row in enumerate(rows):
        point = split_point(ids[row].tobytes(), params.seed)
        held_out[place] = point < params.eval_fraction
        nearest, last = min(nearest, (point, place)), max(last, (point, place))
    if not held_out.any():
        held_out[nearest[1]] = True
    elif held_out.all():
        held_out[last[1]] = False
    return rows[held_out]


def read_exclusions(path: Path) -> frozenset[bytes]:
    """Return the document ids of an exclusions file: 32 hexadecimal digits a line, `#` begins a comment."""
    ids = set()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8.") from None
    for number, line in enumerate(lines, start=1):
        text = line.split("#", 1)[0].strip().lower()
        if text and not re.fullmatch("[0-9a-f]{32}", text):
            raise SystemExit(f"{path} line {number}: {text[:40]!r} is no doc_id; write its 32 hexadecimal digits.")
        ids.update([bytes.fromhex(text)] if text else [])
    return frozenset(ids)


def read_ids(folders: dict[str, Path]) -> Array:
    """Return the ids of the documents of the sources, in order, uint8 (n, 16)."""
    batches = (batch["doc_id"] for folder in folders.values() for batch in arrow.batches(folder, ["doc_id"]))
    ids = np.empty((sum(arrow.manifest(folder)["counts"]["rows"] for folder in folders.values()), 16), np.uint8)
    row = 0
    for batch in batches:
        flat = np.frombuffer(batch.buffers()[1], np.uint8).reshape(-1, 16)
        ids[row : row + len(batch)] = flat[batch.offset : batch.offset + len(batch)]
        row += len(batch)
    return ids


def different_texts(folders: dict[str, Path], first: Array) -> Iterator[pa.Array]:
    """Yield the texts of the different documents, in order, some at a time; of a conversation, its messages joined."""
    row = 0
    for folder in folders.values():
        for batch in arrow.batches(folder):
            new = np.flatnonzero(first[row : row + len(batch)] == np.arange(row, row + len(batch)))
            chosen = batch if len(new) == len(batch) else batch.take(pa.array(new))
            row += len(batch)
            if "text" in chosen.schema.names:
                yield chosen["text"]
            else:
                messages = chosen["messages"]
                said = pc.struct_field(messages.values, "content").fill_null("")
                yield pc.binary_join(pa.ListArray.from_arrays(messages.offsets, said), "\n")


def search(
    folders: dict[str, Path], first: Array, params: Params, items: list[decontaminate.Item], work: Path
) -> tuple[Near | None, dict[int, decontaminate.Hit]]:
    """Return the near duplicates among the different documents, and which hold an item of a benchmark.

    work: the folder of temporary files.
    """
    settings = params.near_duplicates
    if not settings and not items:
        return None, {}
    index = decontaminate.Index(items)
    signatures = Rows(work, settings.num_perm if settings else 0, np.uint16)
    hits: dict[int, decontaminate.Hit] = {}
    begin = 0
    for texts in different_texts(folders, first):
        for row, units, counts in near_duplicates.pieces(texts):
            if settings:
                signatures.append(near_duplicates.sign(units, counts, settings))
            hits |= {begin + row + place: hit for place, hit in index.find(units, counts, texts[row:])}
        begin += len(texts)
    if not settings:
        return None, hits
    cluster = near_duplicates.clusters(signatures, settings)
    gone = np.zeros(len(cluster), bool)
    gone[list(hits)] = True
    company = near_duplicates.in_company(cluster)
    waiting = Texts(work)
    begin = 0
    for texts in different_texts(folders, first) if settings.exact else []:
        waiting.append(texts, np.flatnonzero(company[begin : begin + len(texts)]), begin)
        begin += len(texts)
    return Near(cluster, *near_duplicates.near_twins(signatures, cluster, settings, waiting, gone)), hits


def by_row(hits: dict[int, decontaminate.Hit], first: Array) -> dict[int, decontaminate.Hit]:
    """Return hits by row of all documents, given those by number of the different ones; copies share them."""
    if not hits:
        return {}
    different = np.flatnonzero(first == np.arange(len(first)))
    found = {int(different[number]): hit for number, hit in hits.items()}
    return {int(row): found[int(first[row])] for row in np.flatnonzero(np.isin(first, [*found]))}


def table(
    ids: pa.Array, begin: int, decisions: Decisions, starts: dict[str, int], hits: dict[int, decontaminate.Hit]
) -> pa.Table:
    """Return the decisions about the documents with these ids, of which the first is row `begin` of all.

    starts: the first row of each source, ascending. hits: by row of all.
    """
    names, firsts = list(starts), list(starts.values())
    rows = []
    columns = (column[begin : begin + len(ids)].tolist() for column in decisions)
    for row, (identity, verdict, twin, similarity) in enumerate(zip(ids.to_pylist(), *columns, strict=True), begin):
        split = {TRAIN: "train", EVAL: "eval"}.get(verdict, "dropped")
        decision = {"doc_id": identity, "split": split, "rule": RULES.get(verdict)}
        if verdict == CONTAMINATED:
            decision |= {"rule": f"decontaminate:{hits[row].benchmark}", "evidence": hits[row].evidence}
        elif verdict in (EXACT, NEAR):
            source = bisect_right(firsts, twin) - 1
            decision |= {"twin": f"{names[source]}/{twin - firsts[source]}", "similarity": similarity}
        rows.append(decision)
    return pa.Table.from_pylist(rows, DECISIONS)


def main(phase: str) -> None:
    params = read_params(f"phases.{phase}.dedup", Params)
    clean = Path("data/clean", phase)
    inputs = [str(clean), EXCLUSIONS, str(decontaminate.FOLDER)]
    with stage.run("dedup", phase, inputs, [f"data/dedup/{phase}"]) as run:
        (folder,) = run.outputs
        sources = in_order(phase_sources(phase, clean), params.priority)
        folders = {source: clean / source / "documents" for source in sources}
        items = [item for name, how in sorted(params.decontaminate.items()) for item in decontaminate.read(name, how)]
        documents = identify(read_ids(folders))
        near, hits = search(folders, documents.first, params, items, folder)
        excluded = read_exclusions(Path(EXCLUSIONS))
        decisions = decide(documents, params, near, excluded, np.fromiter(hits, np.int64))
        of_all = by_row(hits, documents.first)
        sizes = [arrow.manifest(path)["counts"]["rows"] for path in folders.values()]
        starts = dict(zip(sources, np.cumsum([0, *sizes]).tolist(), strict=False))
        total: Counter[str] = Counter()
        for (source, start), size in zip(starts.items(), sizes, strict=True):
            counts: Counter[str] = Counter()
            with arrow.Writer(folder / source, DECISIONS) as out:
                for batch in arrow.batches(folders[source], ["doc_id"]):
                    decided = table(batch["doc_id"], start + out.rows, decisions, starts, of_all)
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
        here = len({row.tobytes() for row in documents.ids if row.tobytes() in excluded}) if excluded else 0
        run.count(exclusions=len(excluded), exclusions_not_here=len(excluded) - here)
        for name in sorted(params.decontaminate):
            mine = [item for item in items if item.benchmark == name]
            short = sum(item.run == 0 for item in mine)
            run.count(**{f"decontaminate:{name}": total[f"decontaminate:{name}"]})
            run.count(**{f"items of {name}": len(mine), f"items of {name} too short": short})


if __name__ == "__main__":
    stage.cli(main, __doc__)
