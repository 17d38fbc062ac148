"""The card of a phase's blocks in the form of a Hugging Face dataset card: the part of describe_model for data.

Beside a copy of data/blocks/PHASE, as README.md, it makes that folder a dataset that `datasets.load_dataset` opens: the
header says which files are which split. A licence that the Hub does not list stands there as `other`, with its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kit import arrow

LICENSES = (
    "afl-3.0", "agpl-3.0", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0",
    "cc-by-nc-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
    "gfdl", "gpl-3.0", "isc", "lgpl-3.0", "mit", "mpl-2.0", "odbl", "odc-by", "pddl", "unknown", "unlicense",
)  # fmt: skip
COLUMNS = {
    "input_ids": "the token ids of a block, all of one length",
    "learn": "whether a token is learned; the words of a user are read and not learned",
    "starts": "where each document of a block begins and, last, where padding does",
}


def size_category(rows: int) -> str:
    """Return the Hub's name for a number of rows.

    >>> size_category(999), size_category(1000), size_category(25_000_000)
    ('n<1K', '1K<n<10K', '10M<n<100M')
    """
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    at = sum(rows >= 10 ** (power + 3) for power in range(len(names)))
    return f"n<{names[0]}" if not at else f"n>{names[-1]}" if at == len(names) else f"{names[at - 1]}<n<{names[at]}"


def languages(entries: list[dict[str, Any]]) -> list[str]:
    """Return the languages of the sources as the Hub names them, without script and region.

    >>> languages([{"language": "zh-Hans, en"}, {"language": "unknown"}])
    ['en', 'zh']
    """
    tags = {tag for entry in entries for tag in re.split(r"[,\s]+", entry["language"]) if tag not in ("", "unknown")}
    return sorted({tag.split("-")[0].lower() for tag in tags})


def header(phase: str, entries: list[dict[str, Any]], blocks: dict[str, dict[str, int]], task: str) -> dict[str, Any]:
    """Return the fields of the card's head."""
    names = sorted({entry["license"] for entry in entries})
    listed = sorted({name.lower() for name in names})
    files = [{"split": split, "path": f"{split}/data-*.arrow"} for split in blocks if blocks[split]["blocks"]]
    found: dict[str, Any] = {
        "configs": [{"config_name": "default", "data_files": files}],
        "license": listed if set(listed) <= set(LICENSES) else "other",
        "pretty_name": f"Blocks of {phase}",
        "size_categories": [size_category(sum(one["blocks"] for one in blocks.values()))],
        "tags": ["terroir", "tokenized"],
        "task_categories": [task],
    }
    if found["license"] == "other":
        found["license_name"] = ", ".join(names)
    return found | ({"language": languages(entries)} if languages(entries) else {})


def card(
    phase: str,
    entries: list[dict[str, Any]],
    blocks: dict[str, dict[str, int]],
    grouping: dict[str, Any],
    digest: str,
    task: str,
    table: Callable[[list[dict[str, Any]]], str],
) -> str:
    """Return the text of the card. digest: of data/blocks/PHASE; table: makes Markdown of rows."""
    columns = sorted(arrow.manifest(Path("data/blocks", phase, "train"))["schema"])
    names = ("source", "license", "owner", "origin", "language", "collected_on", "train_tokens", "share_of_tokens")
    replaced = sum(entry["records_with_personal_information_replaced"] for entry in entries)
    head = header(phase, entries, blocks, task)
    return "\n".join(
        [
            "---",
            *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in sorted(head.items())),
            "---",
            f"# Blocks of {phase}",
            "",
            f"What the model of phase `{phase}` was trained on and is evaluated on: blocks of {grouping['block_size']} "
            f"token ids of its own tokenizer, models/tokenizers/{phase}, grouped by `{grouping['mode']}`.",
            "",
            *(f"- `{name}`: {COLUMNS[name]}" for name in columns),
            "",
            "## Splits",
            "",
            table([{"split": split, **one} for split, one in blocks.items()]),
            "",
            "## Sources",
            "",
            table([{name: entry[name] for name in names} for entry in entries]),
            "",
            "What params.yaml does not say is `unknown`. Check the licences before the blocks are given away: ids "
            "decode to the text.",
            "",
            f"Records in which personal information was replaced: {replaced:,}. The rules of each source stand in "
            "params.yaml and what they dropped in funnel.json; `python -m lineage` says where each token came from.",
            "",
            "## Identity",
            "",
            f"data/blocks/{phase}: SHA-256 `{digest}`, each shard's own in croissant.json.",
            "",
        ]
    )
