"""Decide for each document of a phase: train, eval, or dropped as a duplicate with its twin named.

Reads:  data/clean/PHASE/*/documents, data/exclusions.txt
Writes: data/dedup/PHASE/SOURCE   one row per row of that source's documents, in the same order
Params: phases.PHASE.dedup

Example, sources a and b of one phase:

    a: "one", "two"    b: "two", "three"
    dedup/a: train, eval            (say the hash of "two" falls into the eval share)
    dedup/b: dropped, train         rule exact_duplicate, twin a/1, similarity 1.0

Exact duplicates have equal content; near ones (stages/near_duplicates.py) share most of their runs of words or
characters, and a cluster of them is on one side as a whole. A doc_id in data/exclusions.txt drops its document with its
whole cluster, so that no twin takes its place.

Sources are taken in the order of their names. Which split a document falls into depends on its content and the seed
alone: the same text is never on both sides, and new documents move no old one (save the one document that stands in
for an empty split of a tiny phase).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from kit import arrow, stage
from kit.params import phase_sources, read_params
from near_duplicates import Params as NearParams
from near_duplicates import clusters, near_twins, signatures

DECISIONS = pa.schema(
    [
        pa.field("doc_id", pa.binary(16)),
        pa.field("split", pa.string()),  # train, eval or dropped
        pa.field("rule", pa.string()),  # why it is dropped, else null
        pa.field("twin", pa.string()),  # the kept document, as source/row
        pa.field("similarity", pa.float32()),  # to the twin, 0 to 1
    ]
)

EXCLUSIONS = "data/exclusions.txt"


class Params(BaseModel):
    """`phases.PHASE.dedup`: how much is held out."""

    model_config = ConfigDict(extra="forbid")

    eval_fraction: float = Field(0.05, gt=0, lt=1, description="share of the documents held out for evaluation")
    near_duplicates: NearParams | None = Field(
        None, description="drop near duplicates, too (`{}` for the usual threshold of 0.8); null: exact ones alone"
    )
    seed: int = Field(0, ge=0, lt=2**64, description="another seed holds out other documents")


def split_point(doc_id: bytes, seed: int) -> float:
    """Return where a document stands in [0, 1): below `eval_fraction` it is held out.

    >>> split_point(bytes(16), 0) == split_point(bytes(16), 0) != split_point(bytes(16), 1)
    True
    """
    key = hashlib.sha256(seed.to_bytes(8, "little") + doc_id).digest()[:7]
    return (int.from_bytes(key, "little") >> 3) / 2**53  # 53 bits: exact as a float


class Near(NamedTuple):
    """What the near-duplicate search says of the different documents, in order: see stages/near_duplicates.py."""

    cluster: Sequence[int]  # the first document of its cluster
    twin: Sequence[int]  # the kept document that it duplicates, or -1
    similarity: Sequence[float]


def decide(
    doc_ids: dict[str, list[bytes]],
    params: Params,
    near: Near | None = None,
    excluded: frozenset[bytes] = frozenset(),
) -> dict[str, pa.Table]:
    """Return one table of decisions per source. `doc_ids`: the ids of each source's documents, in order.

    The split is drawn for a cluster of near duplicates as a whole. An excluded document takes its cluster with it. No
    split stays empty: when no cluster falls into the eval share, the one nearest to it is held out; when all do, the
    last one is trained on. Raises ValueError when there are fewer than two clusters to choose from.
    """
    first: dict[bytes, str] = {}
    for source, ids in doc_ids.items():
        for row, identity in enumerate(ids):
            first.setdefault(identity, f"{source}/{row}")
    different = list(first)
    cluster = {identity: different[c] for identity, c in zip(different, near.cluster, strict=True)} if near else {}
    # A cluster goes by its least id, whichever of its documents came first.
    leader: dict[bytes, bytes] = {}
    for identity in different:
        root = cluster.setdefault(identity, identity)
        leader[root] = min(identity, leader.get(root, identity))
    gone = {cluster[identity] for identity in different if identity in excluded}
    points = {root: split_point(leader[root], params.seed) for root in leader if root not in gone}
    if len(points) < 2:
        raise ValueError("the phase has fewer than two different documents, so none can be held out; add text.")
    ranked = sorted(points, key=points.__getitem__)
    number = sum(point < params.eval_fraction for point in points.values())
    held_out = set(ranked[: min(max(number, 1), len(ranked) - 1)])

    twins = {}
    if near:
        found = zip(different, near.twin, near.similarity, strict=True)
        twins = {identity: (first[different[twin]], float(s)) for identity, twin, s in found if twin >= 0}
    tables = {}
    for source, ids in doc_ids.items():
        rows: list[dict[str, Any]] = []
        for row, identity in enumerate(ids):
            decision: dict[str, Any] = {"doc_id": identity, "split": "dropped"}
            if cluster[identity] in gone:
                decision["rule"] = "excluded"
            elif first[identity] != f"{source}/{row}":
                decision |= {"rule": "exact_duplicate", "twin": first[identity], "similarity": 1.0}
            elif identity in twins:
                twin, similarity = twins[identity]
                decision |= {"rule": "near_duplicate", "twin": twin, "similarity": similarity}
            else:
                decision["split"] = "eval" if cluster[identity] in held_out else "train"
            rows.append(decision)
        tables[source] = pa.Table.from_pylist(rows, DECISIONS)
    return tables


def different_texts(folders: dict[str, Path]) -> pa.ChunkedArray:
    """Return the text of each different document of the sources, in order; of a conversation, its messages joined."""
    seen: set[bytes] = set()
    chunks = []
    for folder in folders.values():
        for batch in arrow.batches(folder):
            new = []
            for row, identity in enumerate(batch["doc_id"].to_pylist()):
                if identity not in seen:
                    seen.add(identity)
                    new.append(row)
            chosen = batch.take(pa.array(new, pa.int64()))
            if "text" in chosen.schema.names:
                chunks.append(chosen["text"])
            else:
                said = chosen["messages"].to_pylist()
                chunks.append(pa.array(["\n".join(m["content"] for m in messages) for messages in said], pa.string()))
    return pa.chunked_array(chunks, pa.string())


def read_exclusions(path: Path) -> frozenset[bytes]:
    """Return the document ids of an exclusions file: 32 hexadecimal digits a line, `#` begins a comment."""
    ids = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.split("#", 1)[0].strip()
        if text and not re.fullmatch("[0-9a-f]{32}", text):
            raise SystemExit(f"{path} line {number}: {text[:40]!r} is no doc_id; write its 32 hexadecimal digits.")
        ids.update([bytes.fromhex(text)] if text else [])
    return frozenset(ids)


def main(phase: str) -> None:
    params = read_params(f"phases.{phase}.dedup", Params)
    clean = Path("data/clean", phase)
    with stage.run("dedup", phase, [str(clean), EXCLUSIONS], [f"data/dedup/{phase}"]) as run:
        (folder,) = run.outputs
        folders = {source: clean / source / "documents" for source in phase_sources(phase, clean)}
        ids = {s: arrow.table(documents, ["doc_id"])["doc_id"].to_pylist() for s, documents in folders.items()}
        near = None
        if params.near_duplicates:
            texts = different_texts(folders)
            signed = signatures(texts, params.near_duplicates)
            cluster = clusters(signed, params.near_duplicates)
            twins, similarities = near_twins(signed, cluster, params.near_duplicates, texts)
            near = Near(cluster.tolist(), twins.tolist(), similarities.tolist())
        total: Counter[str] = Counter()
        for source, decisions in decide(ids, params, near, read_exclusions(Path(EXCLUSIONS))).items():
            counts = Counter(decisions["split"].to_pylist())
            rules = Counter(decisions["rule"].to_pylist())
            kept = counts["train"] + counts["eval"]
            run.balance(f"documents of {source}", len(ids[source]), kept=kept, dropped=counts["dropped"])
            total.update({**counts, **{rule: count for rule, count in rules.items() if rule}})
            with arrow.Writer(folder / source, DECISIONS) as out:
                out.write(decisions)
                out.counts = {"train": counts["train"], "eval": counts["eval"], "dropped": counts["dropped"]}
        run.count(documents=sum(map(len, ids.values())), train=total["train"], eval=total["eval"])
        run.count(**{rule: total[rule] for rule in ("exact_duplicate", "near_duplicate", "excluded")})


if __name__ == "__main__":
    stage.cli(main, __doc__)
