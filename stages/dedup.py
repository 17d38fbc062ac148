"""Decide for each document of a phase: train, eval, or dropped as a duplicate with its twin named.

Reads:  data/clean/PHASE/*/documents
Writes: data/dedup/PHASE/SOURCE   one row per row of that source's documents, in the same order
Params: phases.PHASE.dedup

Example, sources a and b of one phase:

    a: "one", "two"    b: "two", "three"
    dedup/a: train, eval            (say the hash of "two" falls into the eval share)
    dedup/b: dropped, train         rule exact_duplicate, twin a/1, similarity 1.0

Sources are taken in the order of their names. Which split a document falls into depends on its content and the seed
alone: the same text is never on both sides, and new documents move no old one (save the one document that stands in
for an empty split of a tiny phase).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from kit import arrow, stage
from kit.params import phase_sources, read_params

DECISIONS = pa.schema(
    [
        pa.field("doc_id", pa.binary(16)),
        pa.field("split", pa.string()),  # train, eval or dropped
        pa.field("rule", pa.string()),  # why it is dropped, else null
        pa.field("twin", pa.string()),  # the kept document, as source/row
        pa.field("similarity", pa.float32()),  # to the twin, 0 to 1
    ]
)


class Params(BaseModel):
    """`phases.PHASE.dedup`: how much is held out."""

    model_config = ConfigDict(extra="forbid")

    eval_fraction: float = Field(0.05, gt=0, lt=1, description="share of the documents held out for evaluation")
    seed: int = Field(0, ge=0, lt=2**64, description="another seed holds out other documents")


def split_point(doc_id: bytes, seed: int) -> float:
    """Return where a document stands in [0, 1): below `eval_fraction` it is held out.

    >>> split_point(bytes(16), 0) == split_point(bytes(16), 0) != split_point(bytes(16), 1)
    True
    """
    key = hashlib.sha256(seed.to_bytes(8, "little") + doc_id).digest()[:7]
    return (int.from_bytes(key, "little") >> 3) / 2**53  # 53 bits: exact as a float


def decide(doc_ids: dict[str, list[bytes]], params: Params) -> dict[str, pa.Table]:
    """Return one table of decisions per source. `doc_ids`: the ids of each source's documents, in order.

    No split stays empty: when no document falls into the eval share, the one nearest to it is held out; when all do,
    the last one is trained on. Raises ValueError when there are fewer than two different documents.
    """
    first: dict[bytes, str] = {}
    for source, ids in doc_ids.items():
        for row, identity in enumerate(ids):
            first.setdefault(identity, f"{source}/{row}")
    if len(first) < 2:
        raise ValueError("the phase has fewer than two different documents, so none can be held out; add text.")
    points = {identity: split_point(identity, params.seed) for identity in first}
    ranked = sorted(points, key=points.__getitem__)
    number = sum(point < params.eval_fraction for point in points.values())
    held_out = set(ranked[: min(max(number, 1), len(ranked) - 1)])
    tables = {}
    for source, ids in doc_ids.items():
        rows: list[dict[str, Any]] = []
        for row, identity in enumerate(ids):
            twin = first[identity]
            if twin == f"{source}/{row}":
                rows.append({"doc_id": identity, "split": "eval" if identity in held_out else "train"})
            else:
                reason = {"rule": "exact_duplicate", "twin": twin, "similarity": 1.0}
                rows.append({"doc_id": identity, "split": "dropped", **reason})
        tables[source] = pa.Table.from_pylist(rows, DECISIONS)
    return tables


def main(phase: str) -> None:
    params = read_params(f"phases.{phase}.dedup", Params)
    clean = Path("data/clean", phase)
    with stage.run("dedup", phase, [str(clean)], [f"data/dedup/{phase}"]) as run:
        (folder,) = run.outputs
        sources = phase_sources(phase, clean)
        ids = {s: arrow.table(clean / s / "documents", ["doc_id"])["doc_id"].to_pylist() for s in sources}
        total: Counter[str] = Counter()
        for source, decisions in decide(ids, params).items():
            counts = Counter(decisions["split"].to_pylist())
            kept = counts["train"] + counts["eval"]
            run.balance(f"documents of {source}", len(ids[source]), kept=kept, dropped=counts["dropped"])
            total.update(counts)
            with arrow.Writer(folder / source, DECISIONS) as out:
                out.write(decisions)
                out.counts = {"train": counts["train"], "eval": counts["eval"], "dropped": counts["dropped"]}
        run.count(documents=total.total(), train=total["train"], eval=total["eval"], dropped=total["dropped"])


if __name__ == "__main__":
    stage.cli(main, __doc__)
