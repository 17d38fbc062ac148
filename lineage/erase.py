"""Take a document out of every model: where it is, how to exclude it, and what can be said afterwards.

    python -m lineage erase plan  3f2a...     its copies and its cluster, where they stand, what must be redone
    python -m lineage erase apply 3f2a...     they go into data/exclusions.txt, keyed; then `dvc repro`
    python -m lineage erase prove 3f2a...     after that: is it, or a run of 16 units of it, in anything that was kept?

The promise is: located, removed, rebuilt. A model that was given away, DVC's cache, Git's history, backups, the raw
file itself and what data/clean and .memo hold while it is there are not reached from here; and no proof of absence sees
a text that says the same in other words.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

import numpy as np
import pyarrow as pa

import exclusions
from lineage.folders import Folder, present
from lineage.questions import Answer, Lineage, Source
from lineage.trace import Index, answers, candidates_of, content_of, fingerprints, runs_of
from lineage.verify import RECORDS
from text_units import spans

LIMITS = (
    "not reached: the raw file, and what data/clean (and so a pack) and .memo hold of it until that is gone and "
    "`dvc repro` has run; DVC's cache (`dvc gc`), Git's history, backups, models that were given away; "
    "not seen: the same content in other words, or in runs of fewer than 16 words (characters of Chinese)"
)
CLUSTER_STAGES = ("dedup", "train_tokenizer", "add_bos_eos", "tokenize_text", "group_blocks")
HOLDING = (*CLUSTER_STAGES[1:], "train_model")  # what they wrote holds text, or what was learned of it
MODEL_STAGES = ("train_model", "merge_lora", "evaluate_model", "describe_model")


def cluster(lineage: Lineage, identity: str) -> list[tuple[Source, int]]:
    """Return the documents with an id, with their copies and all of their clusters of near duplicates, in every phase.

    So many does dedup take out with it. Raises SystemExit when no document has the id.
    """
    waiting = lineage.identified(identity)
    named, together = _by(lineage, "twin"), _by(lineage, "cluster")
    found: dict[tuple[str, str, int], tuple[Source, int]] = {}
    while waiting:
        source, row = waiting.pop()
        if (source.phase, source.name, row) in found:
            continue
        found[source.phase, source.name, row] = source, row
        decision = source.decisions.row(row)
        waiting += lineage.identified(decision["doc_id"].hex())
        waiting += named.get((source.phase, f"{source.name}/{row}"), [])
        waiting += together.get((source.phase, decision["cluster"]), [])
        if decision["twin"]:
            name, _, number = decision["twin"].rpartition("/")
            waiting += [(s, int(number)) for s in lineage.phases[source.phase].sources if s.name == name]
    return [found[key] for key in sorted(found)]


def _by(lineage: Lineage, column: str) -> dict[tuple[str, str], list[tuple[Source, int]]]:
    """Return the documents that name another one in a column of decisions, by phase and name of that one."""
    found: dict[tuple[str, str], list[tuple[Source, int]]] = {}
    for source in lineage.sources:
        for number, batch in enumerate(source.decisions.all()):
            there = np.flatnonzero(batch[column].is_valid().to_numpy(zero_copy_only=False))
            for inside in there.tolist():
                key = source.phase, batch[column][inside].as_py()
                found.setdefault(key, []).append((source, int(source.decisions.starts[number]) + inside))
    return found


def plan(lineage: Lineage, identity: str) -> Answer:
    """Return where a document and its copies stand, which models saw it, and what taking it out costs."""
    members = cluster(lineage, identity)
    documents, files, models = [], set(), {}
    phases: set[str] = set()
    for source, row in members:
        answer = lineage.record(source, source.kept_records.row(row))
        blocks, unit = answer.get("blocks", []), source.about["unit"]
        documents.append(
            {
                **{name: answer[name] for name in ("phase", "document", "doc_id", "file", unit, "verdict")},
                "tokens": answer.get("tokens", 0),
                "blocks": sorted({block["block"] for block in blocks}),
                "first_step": min((step for block in blocks for step in block["steps"]), default=None),
            }
        )
        files |= _shards(source, row)
        for model in answer.get("models", []):
            models[model["model"]] = model
        if answer.get("split"):
            phases |= {source.phase, *lineage.descendants(source.phase)}
    redo, seconds = _cost(lineage, phases)
    return {
        "documents": documents, "models": list(models.values()), "shards": sorted(files),
        "redo": redo, "seconds_last_time": round(seconds, 1), "limits": LIMITS,
    }  # fmt: skip


def _shards(source: Source, row: int) -> set[str]:
    """Return the Arrow files that hold a document."""

    def shard(folder: Folder, number: int) -> str:
        return (
            f"{folder.name}/{folder.manifest['shards'][int(folder.batches['shard'][folder.batch_of(number)])]['name']}"
        )

    found = {
        shard(source.documents, row),
        shard(source.decisions, row),
        shard(source.ledger, source.kept_records.row(row)),
    }
    kept = source.kept_documents.place(row)
    if kept is not None and f"tokenize_text@{source.name}" in source.lineage.stages:
        marked = Folder(source.lineage.root / "data/marked" / source.phase / source.name, source.lineage.cache)
        found |= {shard(marked, kept), shard(source.tokens, kept)}
    return found


def _cost(lineage: Lineage, phases: set[str]) -> tuple[list[str], float]:
    """Return the stages that must run again, and the seconds that they took the last time."""
    items = {(stage, phase) for phase in phases for stage in (*CLUSTER_STAGES, *MODEL_STAGES)}
    items |= {(stage, s.name) for s in lineage.sources if s.phase in phases for stage in CLUSTER_STAGES}
    merged = {f"models/{phase}/merged" for phase in phases}
    items |= {(s.name, s.item) for s in lineage.stages.values() if s.name == "export_model" and merged & s.deps.keys()}
    names = [name for name, stage in lineage.stages.items() if (stage.name, stage.item) in items]
    seconds = 0.0
    for name in names:
        path = lineage.root / RECORDS / f"{name}.json"
        seconds += json.loads(path.read_text(encoding="utf-8"))["seconds"] if path.is_file() else 0.0
    return names, seconds


def apply(lineage: Lineage, identity: str) -> Answer:
    """Exclude a document and its twins, and their records, which other rules leave what they are: see `exclude`."""
    members = cluster(lineage, identity)
    ids = {source.decisions.row(row)["doc_id"] for source, row in members} | {_raw_id(*one) for one in members}
    return {**exclude(lineage.root, ids), "next": "dvc repro, then erase prove"}


def exclude(root: Path, ids: set[bytes]) -> Answer:
    """Add ids to data/exclusions.txt; those that stand there stay as they are. The first one makes the key."""
    path, key_path = present(root, exclusions.FILE), root / exclusions.KEY
    there = exclusions.read(path)
    text = path.read_text(encoding="utf-8-sig")
    if there:
        key = there.key
    else:
        if not key_path.is_file():
            descriptor = os.open(key_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32) + "\n")
        key = exclusions.read_key(key_path)
        text = "".join(
            line
            for line in text.splitlines(keepends=True)
            if not line.split("#", 1)[0].strip().lower().startswith("key ")
        )
        text += "\n" * (not text.endswith("\n")) + f"key {exclusions.key_id(key)}\n"
    new = sorted(one for one in ids if one not in there)
    if new:
        temporary = path.with_name(f".tmp-{path.name}")
        marks = sorted(exclusions.mark(key, one) for one in new)
        temporary.write_text(
            text + "\n" * (not text.endswith("\n")) + "".join(f"{m}\n" for m in marks), encoding="utf-8"
        )
        temporary.replace(path)
    return {
        "added": [one.hex() for one in new],
        "were_there": sorted(one.hex() for one in ids if one in there),
        "key": f"{exclusions.KEY}, which is not in Git: keep it, and give it to those who run the pipeline",
    }


def prove(lineage: Lineage, identity: str, text: str | None = None) -> Answer:
    """Return whether a document, or a part of it, is in what is kept now, with what this does not see.

    absent: nothing of it is, down to runs of 16 units. own_absent: nothing is that it alone had; what is left of it are
    `shared_units` that stand in other kept documents too, as formulas do, and `own_units` stand in none of them. Both
    need that it is excluded, and that no tokens, blocks or model are of an older state.

    `text`: the document's, needed where its record is no longer in the raw files. Raises SystemExit without it then.
    """
    members = lineage.identified(identity, missing=False)
    if not members and len(identity) < 32:
        raise SystemExit(f"no document has the id {identity} any more; give all 32 digits of it, and --text FILE.")
    if text is None:
        if not members:
            raise SystemExit(f"no document has the id {identity} any more; give its text with --text FILE.")
        text = content_of(*members[0])
    doc_id = members[0][0].decisions.row(members[0][1])["doc_id"] if members else bytes.fromhex(identity)
    kept = [f"{source.phase}: {source.name}/{row}" for source, row in members if _is_kept(source, row)]
    # Of all of them, for the last one may hold what the document alone seemed to have.
    holders = runs_of(text, candidates_of(lineage, text), dropped=False)
    runs = answers(text, holders, limit=20)
    shared = np.zeros(len(spans(text)[0]), bool)
    for (begin, end, _), found in holders.items():
        shared[begin:end] |= any((span.source, span.row) not in members for span in found)
    own = int((~shared).sum())
    older = [f"{name}: {phase.state}" for name, phase in lineage.phases.items() if phase.has_older_model]
    folders = [path.name for path in (lineage.root / "models/exports").glob("[!.]*") if path.is_dir()]
    exports: dict[str, str | None] = dict.fromkeys(sorted(folders), "params.yaml does not name it")
    exports |= {s.item: lineage.outdated.why(name) for name, s in lineage.stages.items() if s.name == "export_model"}
    older += [f"models/exports/{item}: {why}" for item, why in exports.items() if why]
    for name, stage in lineage.stages.items():
        held = [out for out in stage.outs if out.startswith(("data/", "models/")) and (lineage.root / out).exists()]
        if stage.name in HOLDING and held and (why := lineage.outdated.why(name)):
            older.append(f"{held[0]}: {why}")
    most, where = _containment(lineage, text)
    listed = exclusions.read(present(lineage.root, exclusions.FILE))
    is_listed = doc_id in listed or any(_raw_id(*one) in listed for one in members)
    gone = is_listed and not kept and not older
    return {
        "absent": gone and not runs,
        "own_absent": gone and own > 0,
        "own_units": own, "shared_units": len(shared) - own,
        "exact": "no kept document has this id" if not kept else f"kept: {', '.join(kept)}",
        "runs": runs,
        "longest_run": max((run["units"] for run in runs), default=0),
        "containment": round(most, 4), "most_like": where or None,
        "excluded": f"it {'stands' if is_listed else 'does not stand'} in {exclusions.FILE}",
        "models": f"not rebuilt: {', '.join(older)}" if older else "none is of an older state",
        "limits": LIMITS,
    }  # fmt: skip


def _raw_id(source: Source, row: int) -> bytes:
    raw_id: bytes = source.ledger.row(source.kept_records.row(row))["raw_id"]
    return raw_id


def _is_kept(source: Source, row: int) -> bool:
    return bool(source.decisions.row(row)["split"] != "dropped")


def _containment(lineage: Lineage, text: str) -> tuple[float, str]:
    """Return the largest share of a text's winnowed fingerprints that one kept document has, and which."""
    own = np.unique(fingerprints(pa.array([text]))[0])
    best = (0.0, "")
    for source in lineage.sources if len(own) else []:
        for row, count in Index(source, 1).candidates(own):
            if count / len(own) > best[0] and _is_kept(source, row):
                # The index keeps a part of each hash.
                there = np.intersect1d(own, fingerprints(pa.array([content_of(source, row)]))[0])
                if (share := len(there) / len(own)) > best[0]:
                    best = share, f"{source.phase}: {source.name}/{row}"
    return best
