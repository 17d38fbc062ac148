"""What each source gave, conserved from stage to stage, and who says so: the part of describe_model that counts.

    funnel of a source       clean   10 records, 900 bytes   -> 8 documents, 700 bytes; dropped: length 2
                             dedup    8 documents, 700 bytes -> train 6, eval 1; dropped: near_duplicate 1
                             tokens   7 documents            -> 210 tokens
                             blocks   210 tokens, shown 1 time -> train 180, eval 30

    register of a source     origin, owner, licence, language, day of collection, purpose; files, bytes, tokens, share

Bytes are those of the raw files as they lie on the disk, later of the UTF-8 texts. What params.yaml does not say stands
there as `unknown`: a blank must be filled by a person, not by a program.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kit import arrow
from kit.arrow import compute as pc

ABOUT = ("origin", "owner", "license", "language", "collected_on", "purpose", "format", "record")


def text_bytes(batch: pa.RecordBatch) -> np.ndarray:
    """Return the UTF-8 bytes of each document of a batch; of a conversation, those that its messages say."""
    if "text" in batch.schema.names:
        sizes: np.ndarray = pc.binary_length(batch["text"]).to_numpy(zero_copy_only=False)
        return sizes
    messages = batch["messages"]
    said = pc.binary_length(messages.flatten().field("content")).to_numpy(zero_copy_only=False)
    reach = np.concatenate([[0], np.cumsum(said, dtype=np.int64)])
    return np.diff(reach[messages.offsets.to_numpy() - messages.offsets[0].as_py()])


def decided(folder: Path) -> Iterator[tuple[str, str | None]]:
    """Yield split and rule of each document."""
    for batch in arrow.batches(folder, ["split", "rule"]):
        yield from zip(batch["split"].to_pylist(), batch["rule"].to_pylist(), strict=True)


def left_out(blocks: Path) -> Counter[tuple[str, str]]:
    """Return how many tokens `long_documents` kept out of the blocks of a phase, by split and source."""
    if not (blocks / "left_out").is_dir():
        return Counter()
    listed = arrow.table(blocks / "left_out", ["split", "source", "left_out"])
    sums = listed.group_by(["split", "source"]).aggregate([("left_out", "sum")]).to_pylist()
    return Counter({(row["split"], row["source"]): row["left_out_sum"] for row in sums})


def read_about(phase: str, source: str) -> dict[str, Any]:
    """Return what is declared about a source, how it was read, and its counts."""
    return dict(arrow.read_json(Path("data/sources", phase, source, "source.json")))


def funnel(phase: str, source: str, grouping: dict[str, Any]) -> dict[str, Any]:
    """Return the counts of one source at each stage. Raises ValueError where what goes in is not what comes out."""
    clean, decisions = Path("data/clean", phase, source), Path("data/dedup", phase, source)
    about = read_about(phase, source)
    ledger = arrow.manifest(clean / "ledger")["counts"]
    rules = {name.removeprefix("dropped_"): n for name, n in ledger.items() if name.startswith("dropped_")}
    personal = 0
    for batch in arrow.batches(clean / "ledger", ["changes"]):
        personal += int(
            pc.sum(pc.match_substring_regex(batch["changes"].cast(pa.string()), r"(^|, )pii ")).as_py() or 0
        )
    documents, size = Counter[str](), Counter[str]()
    verdicts = decided(decisions)
    for batch in arrow.batches(clean / "documents"):
        for n_bytes in text_bytes(batch).tolist():
            split, rule = next(verdicts)
            name = split if rule is None else rule
            documents[name] += 1
            size[name] += n_bytes
    tokens = arrow.manifest(Path("data/tokens", phase, source))["counts"]
    dropped = {name: n for name, n in sorted(documents.items()) if name not in ("train", "eval")}
    out = left_out(Path("data/blocks", phase))
    blocks = {
        split: grouping[split].get(source, {"documents": 0, "tokens": 0, "weight": 1.0}) for split in ("train", "eval")
    }
    found = {
        "clean": {
            "records_in": ledger["rows"], "bytes_in": about["bytes"], "documents_out": ledger["kept"],
            "bytes_out": size.total(), "dropped": rules, "changed": about["changed"], "personal_information": personal,
        },
        "dedup": {
            "documents_in": documents.total(), "bytes_in": size.total(),
            "train": documents["train"], "train_bytes": size["train"],
            "eval": documents["eval"], "eval_bytes": size["eval"],
            "dropped": dropped, "dropped_bytes": sum(size[name] for name in dropped),
        },
        "tokens": {"documents_in": tokens["rows"], **{name: tokens[name] for name in ("train", "eval", "learned")}},
        "blocks": {
            split: {
                "tokens_in": tokens[split], "tokens_shown": one["tokens"], "left_out": out[split, source],
                "weight": one["weight"], "documents": one["documents"],
            }
            for split, one in blocks.items()
        },
    }  # fmt: skip
    _conserved(source, found, next(verdicts, None) is None)
    return found


def _conserved(source: str, found: dict[str, Any], is_whole: bool) -> None:
    clean, dedup, tokens = found["clean"], found["dedup"], found["tokens"]
    pairs = {
        "records of clean": (clean["records_in"], clean["documents_out"] + sum(clean["dropped"].values())),
        "documents of dedup": (clean["documents_out"], dedup["documents_in"]),
        "documents after dedup": (
            dedup["documents_in"],
            dedup["train"] + dedup["eval"] + sum(dedup["dropped"].values()),
        ),
        "bytes after dedup": (dedup["bytes_in"], dedup["train_bytes"] + dedup["eval_bytes"] + dedup["dropped_bytes"]),
        "documents of tokens": (dedup["train"] + dedup["eval"], tokens["documents_in"]),
    }
    for split, one in found["blocks"].items():
        if one["weight"] == 1:
            pairs[f"{split} tokens of blocks"] = one["tokens_in"], one["tokens_shown"]
    for name, (before, after) in pairs.items():
        if before != after or not is_whole:
            raise ValueError(f"{source}: {name}: {before} went in, {after} came out; nothing was published (a bug).")


def totals(phase: str, grouping: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return what the blocks of a phase hold of what their sources showed. Raises ValueError where tokens are lost."""
    found = {}
    for split in ("train", "eval"):
        counts = arrow.manifest(Path("data/blocks", phase, split))["counts"]
        shown = sum(one["tokens"] for one in grouping[split].values())
        if shown != counts["tokens"] + counts["dropped_tokens"]:
            raise ValueError(f"{phase}: {shown} {split} tokens were shown, its blocks account for others (a bug).")
        padding = counts["rows"] * grouping["block_size"] - counts["tokens"]
        left = counts["dropped_tokens"]
        found[split] = {
            "shown": shown,
            "in_blocks": counts["tokens"],
            "left_out": left,
            "blocks": counts["rows"],
            "padding": padding,
        }
    return found


def register(phase: str, funnels: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry a source: what is declared about it, how much there is of it, its share of what blocks hold."""
    train = {name: one["blocks"]["train"] for name, one in funnels.items()}
    held = {name: counts["tokens_shown"] - counts["left_out"] for name, counts in train.items()}
    total = sum(held.values())
    entries = []
    for source, one in sorted(funnels.items()):
        about = read_about(phase, source)
        entries.append(
            {
                "source": source,
                **{name: about[name] for name in ABOUT},
                **{name: about[name] for name in ("files", "bytes", "records")},
                "train_documents": one["dedup"]["train"],
                "train_tokens": held[source],
                "share_of_tokens": round(held[source] / total, 6) if total else 0.0,
                "records_with_personal_information_replaced": one["clean"]["personal_information"],
            }
        )
    return entries


def summary(phase: str, base: str, entries: list[dict[str, Any]], excluded: int) -> dict[str, Any]:
    """Return the fields that the EU's summary of training content asks for and that a pipeline can know.

    Regulation (EU) 2024/1689, article 53(1)(d), template of the Commission (July 2025): general information with one of
    three sizes, list of data sources, aspects of data processing. `excluded`: documents that data/exclusions.txt has
    taken out.
    """
    tokens = sum(entry["train_tokens"] for entry in entries)
    ranges = ((10**9, "less than 1 billion"), (10**13, "1 billion to 10 trillion"))
    days = sorted(entry["collected_on"] for entry in entries if entry["collected_on"] != "unknown")
    replaced = "records_with_personal_information_replaced"
    asked = {"name": "source", "description": "origin", "rights_holder": "owner", "licence": "license"}
    asked |= {"period_of_collection": "collected_on", "share_of_tokens": "share_of_tokens"}
    return {
        "general_information": {
            "provider": "unknown",
            "model": phase,
            "modified_model": base,
            "modality": "text",
            "size": next((text for limit, text in ranges if tokens < limit), "more than 10 trillion"),
            "tokens": tokens,
            "latest_data_acquisition": days[-1] if days and len(days) == len(entries) else "unknown",
            "languages": sorted({entry["language"] for entry in entries}),
        },
        "data_sources": [{"kind": "unknown", **{new: entry[old] for new, old in asked.items()}} for entry in entries],
        "data_processing": {
            "reservation_of_rights": "unknown",
            "documents_excluded_on_request": excluded,
            replaced: sum(entry[replaced] for entry in entries),
        },
    }


def collection_record(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the record of collection that China's basic requirements for generative services ask for, a row a source.

    TC260-003, section 5.1, on the sources of a corpus: where each comes from, with its licence or the authorisation for
    its use. GB/T 45654-2025 has followed it as a national standard.
    """
    names = {
        "source": "name",
        "origin": "origin",
        "collected_on": "collected_on",
        "purpose": "purpose",
        "owner": "owner",
    }
    names |= {"license": "licence_or_authorisation", "language": "language", "records": "records", "bytes": "bytes"}
    return [{new: entry[old] for old, new in names.items()} for entry in entries]
