"""Rebuild random blocks from the raw bytes alone, with the pipeline's own functions: read, clean, mark, encode, cut.

And judge random records anew, dropped ones, too: the rule, its evidence, what was changed, the identity.

verify.py checks everything that can be checked without the project; this is what it cannot do: formats that need a
library, all rules, chat templates, and encoding.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

import clean
import raw_formats
import raw_params
import raw_records
from add_bos_eos import SEGMENT
from chat_segments import Marker
from document_turns import rule_of
from lineage.questions import Answer, Lineage, Phase, Source
from raw_shards import Piece
from tokenize_text import Encoder


def replay(lineage: Lineage, phases: list[str], number: int, seed: int) -> list[Answer]:
    """Return for each phase and split how many of up to `number` random blocks came out as they are stored.

    `wrong` names the blocks that did not, with what is different. Raises SystemExit when a raw file is not there.
    """
    found = []
    for name in phases:
        phase, draw = lineage.phases[name], random.Random(f"{seed} {name}")
        documents = functools.cache(functools.partial(document, phase))
        for split in ("train", "eval"):
            blocks = phase.layout(split).blocks
            chosen = sorted(draw.sample(range(blocks), min(number, blocks)))
            wrong = [text for block in chosen if (text := _difference(phase, split, block, documents))]
            found.append({"phase": name, "split": split, "blocks": blocks, "rebuilt": len(chosen), "wrong": wrong})
    return found


def records(lineage: Lineage, number: int, seed: int) -> list[Answer]:
    """Return for each source how many of up to `number` random records are judged today as the ledger says.

    `wrong` names those that are not, with what is different. Raises SystemExit when a raw file is not there.
    """
    found = []
    for source in lineage.sources:
        draw, size = random.Random(f"{seed} {source.phase} {source.name}"), len(source.ledger)
        by_file: dict[str, list[Answer]] = {}
        for row in sorted(draw.sample(range(size), min(number, size))):
            record = source.record(row)
            by_file.setdefault(record["file"], []).append(record)
        wrong = [text for file, rows in by_file.items() for text in _misjudged(source, file, rows)]
        judged = sum(map(len, by_file.values()))
        found.append({"phase": source.phase, "source": source.name, "records": size, "judged": judged, "wrong": wrong})
    return found


def _misjudged(source: Source, file: str, rows: list[Answer]) -> Iterator[str]:
    """Yield what is wrong with rows of the ledger that are of one file, in their order."""
    path, params = source.lineage.root / source.path(file), _params(source)
    if not path.exists():
        raise SystemExit(f"{path} is not there; nothing can be judged without the raw files.")
    parts: list[raw_records.Part | None] = [None]
    if raw_params.cuttable(path, params):
        parts = [raw_records.Part(row["start"], row["end"], row["number"]) for row in rows]
    read = (record for part in parts for record in raw_formats.records(path, params, part))
    for row in rows:
        place = f"{source.path(file)}:{row['number']}"
        found = next((one for one in read if (one.start, one.number) == (row["start"], row["number"])), None)
        if found is None:
            yield f"{place}: there is no record in the raw file"
            return
        judged = clean.row_of(Piece(file, path, 0, None), found, params)
        own = dict(zip(clean.RECORDS.names, judged, strict=False))
        kept = {**row, "doc_id": None}
        if row["document"] is not None:
            kept["doc_id"] = source.documents.row(row["document"])["doc_id"]
        for name in ("end", "raw_id", "rule", "evidence", "changes", "doc_id"):
            if own[name] != kept[name]:
                yield f"{place}: its {name} is {_plain(own[name])} today, {_plain(kept[name])} in the ledger"
                break


def _plain(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else repr(value)


def _difference(phase: Phase, split: str, block: int, documents: Any) -> str | None:
    """Return what is different between a block as it is stored and as it is rebuilt, None when nothing is."""
    layout = phase.layout(split)
    stored = phase.blocks(split).row(block)
    ids, learn = [], []
    for piece in layout.block(block):
        own_ids, own_learn, place = documents(piece.source, piece.row)
        rule = rule_of(layout.grouping["long_documents"], piece.source)
        if rule == "truncate" and len(own_ids) > layout.size:
            own_ids = [*own_ids[: layout.size - 1], _encoder(phase).vocabulary.special_ids["eos_token_id"]]
        ids += own_ids[piece.start : piece.start + piece.length]
        learn += own_learn[piece.start : piece.start + piece.length]
        if ids != stored["input_ids"][: len(ids)]:
            return f"block {block}: the tokens of {place} are not those of the block"
    if "learn" in stored and stored["learn"][: len(learn)] != learn:
        return f"block {block}: what is learned is not what the raw bytes give"
    return None


def document(phase: Phase, source_name: str, row: int) -> tuple[list[int], list[bool], str]:
    """Return ids and marks of a row of data/tokens, made from its raw bytes, and its file and line."""
    source = next(one for one in phase.sources if one.name == source_name)
    kept = source.documents.row(source.kept_documents.row(row))
    place = f"{source.path(kept['file'])}:{kept['number']}"
    content, _, drop = clean.judge(_content(source, kept), _params(source))
    if drop:
        return [], [], f"{place} (dropped by {drop[0]} today)"
    marker = _marker(phase)
    rendered = marker.document(content) if isinstance(content, str) else marker.conversation(content)
    segments = pa.array([[segment._asdict() for segment in rendered]], pa.list_(SEGMENT))
    ids, learn = _encoder(phase).encode(segments)
    numbers = ids[0].as_py()
    return numbers, [True] * len(numbers) if learn is None else learn[0].as_py(), place


def _content(source: Source, kept: Answer) -> raw_records.Content:
    """Return what the raw file holds where a document came from, not cleaned."""
    path = source.lineage.root / source.path(kept["file"])
    params = _params(source)
    if not path.exists():
        raise SystemExit(f"{path} is not there; nothing can be rebuilt without the raw files.")
    part = None
    if raw_params.cuttable(path, params):
        part = raw_records.Part(kept["start"], kept["end"], kept["number"])
    for record in raw_formats.records(path, params, part):
        if record.number == kept["number"] and record.start == kept["start"]:
            return record.content
    raise SystemExit(f"{path} has no record at {kept['number']}: it is not the file that was read; see `verify`.")


@functools.lru_cache(maxsize=64)
def _params(source: Source) -> clean.Params:
    params = clean.Params(**source.params)
    for rule in params.rules:
        rule.load()
    return params


def _tokenizer(phase: Phase) -> Path:
    return phase.lineage.root / "models/tokenizers" / phase.name


@functools.lru_cache(maxsize=8)
def _marker(phase: Phase) -> Marker:
    return Marker(_tokenizer(phase))


@functools.lru_cache(maxsize=8)
def _encoder(phase: Phase) -> Encoder:
    return Encoder(_tokenizer(phase))
