"""Which documents stand in a block, and in which blocks a document stands, without a column for it in the blocks.

    layout = Layout(Path("."), cache, "pretrain", "train", tokens)     tokens: the tokens folder of each source
    layout.block(7)                  ->   [Piece(source="laws", row=12, start=0, length=200, block=7, place=56), ...]
    layout.document("laws", 12)      ->   the same pieces, from the other side

In a stream (mode concat) both are sums of lengths, kept for each batch; packed blocks are laid out anew, once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from document_turns import nothing_learned, rule_of, times
from group_blocks import window_tokens
from lineage.folders import Array, Cache, Columns, Folder, read_json
from packing import layout


class Piece(NamedTuple):
    """A part of a document in a block."""

    source: str
    row: int  # of the document in data/tokens
    start: int  # in the document, tokens
    length: int
    block: int
    place: int  # in the block


class Layout:
    """The blocks of one split of a phase."""

    def __init__(self, root: Path, cache: Cache, phase: str, split: str, tokens: dict[str, Folder]) -> None:
        folder = f"data/blocks/{phase}"
        self.grouping = read_json(root, f"{folder}/grouping.json")
        self.split, self.tokens, self.sources = split, tokens, sorted(tokens)
        self.size, self.stream = int(self.grouping["block_size"]), self.grouping["mode"] == "concat"
        self.weights = self.grouping["weights"] if split == "train" else {}
        blocks = read_json(root, f"{folder}/{split}/manifest.json")
        self.blocks, self.filled = int(blocks["counts"]["rows"]), int(blocks["counts"]["tokens"])
        others = [root / folder / "grouping.json", *(tokens[source].path / "manifest.json" for source in self.sources)]
        build = self._sums if self.stream else self._pieces
        self.index = cache.get(f"{folder}/{split}/layout", others, build)

    def block(self, number: int) -> list[Piece]:
        """Return the pieces of a block in their order. Raises IndexError when there is no such block."""
        if not 0 <= number < self.blocks:
            raise IndexError(f"there is no block {number}; they are numbered from 0 to {self.blocks - 1}")
        if not self.stream:
            first, last = (int(np.searchsorted(self.index["block"], n)) for n in (number, number + 1))
            return [self._piece(at) for at in range(first, last)]
        begin, end = number * self.size, min((number + 1) * self.size, self.filled)
        at = int(np.searchsorted(self.index["start"], begin, side="right")) - 1
        found = []
        while at < len(self.index["key"]) and int(self.index["start"][at]) < end:
            turn, source, batch = _parts(int(self.index["key"][at]))
            name = self.sources[source]
            rows, lengths = self._wanted(name, batch, turn)
            ends = int(self.index["start"][at]) + np.cumsum(lengths)
            for place in np.flatnonzero((ends > begin) & (ends - lengths < end)).tolist():
                first = max(int(ends[place] - lengths[place]), begin)
                length = min(int(ends[place]), end) - first
                skipped = first - int(ends[place] - lengths[place])
                found.append(Piece(name, int(rows[place]), skipped, length, number, first - begin))
            at += 1
        return found

    def document(self, source: str, row: int) -> list[Piece]:
        """Return all pieces of a document, in the order of the blocks."""
        number = self.sources.index(source)
        if not self.stream:
            key = number << 32 | row
            order = self.index["order"]
            first, last = (int(np.searchsorted(self.index["sorted"], k)) for k in (key, key + 1))
            return sorted((self._piece(int(at)) for at in order[first:last]), key=lambda piece: piece.block)
        batch = self.tokens[source].batch_of(row)
        found: list[Piece] = []
        turn = 0
        while self.weights.get(source, 1.0) > turn:
            at = int(np.searchsorted(self.index["key"], np.uint64(turn << 48 | number << 32 | batch)))
            if at < len(self.index["key"]) and int(self.index["key"][at]) == turn << 48 | number << 32 | batch:
                rows, lengths = self._wanted(source, batch, turn)
                for place in np.flatnonzero(rows == row).tolist():
                    begin = int(self.index["start"][at]) + int(lengths[:place].sum())
                    found += self._cut(source, row, begin, int(lengths[place]))
            turn += 1
        return found

    def _cut(self, source: str, row: int, begin: int, length: int) -> Iterator[Piece]:
        at, end = begin, min(begin + length, self.filled)
        while at < end:
            block, place = divmod(at, self.size)
            here = min(self.size - place, end - at)
            yield Piece(source, row, at - begin, here, block, place)
            at += here

    def _piece(self, at: int) -> Piece:
        key, start, length, block, place = (int(self.index[n][at]) for n in ("key", "from", "length", "block", "place"))
        return Piece(self.sources[key >> 32], key & 0xFFFFFFFF, start, length, block, place)

    @functools.lru_cache(maxsize=8)  # noqa: B019 (as long-lived as the program; a file's documents are neighbours)
    def _wanted(self, source: str, batch: int, turn: int) -> tuple[Array, Array]:
        """Return the rows of a batch of tokens that take part in a turn, and their lengths."""
        rows = self.tokens[source].batch(batch)
        wanted = pc.equal(rows["split"], self.split).to_numpy(zero_copy_only=False)
        if source in self.weights:
            wanted = wanted & (times(rows["doc_id"], self.weights[source]) > turn)
        chosen = np.flatnonzero(wanted)
        return chosen + int(self.tokens[source].starts[batch]), np.diff(rows["input_ids"].offsets.to_numpy())[chosen]

    def _unanswered(self, rows: pa.RecordBatch) -> Array:
        """Return which rows of data/tokens have nothing to learn before the last token of a block."""
        learn = rows["learn"].flatten().to_numpy(zero_copy_only=False) if "learn" in rows.schema.names else None
        return nothing_learned(learn, np.diff(rows["input_ids"].offsets.to_numpy()), self.size - 1)

    def _turns(self) -> Iterator[tuple[int, int, int, Array, Array]]:
        """Yield turn, source, batch, rows and lengths, in the order in which documents are grouped."""
        turn = 0
        while shown := [n for n, source in enumerate(self.sources) if self.weights.get(source, 1.0) > turn]:
            for number in shown:
                source = self.sources[number]
                for batch in range(len(self.tokens[source].starts) - 1):
                    rows, lengths = self._wanted(source, batch, turn)
                    if len(rows):
                        yield turn, number, batch, rows, lengths.astype(np.int64)
            turn += 1

    def _sums(self) -> Columns:
        keys, sums = [], []
        for turn, number, batch, _, lengths in self._turns():
            keys.append(turn << 48 | number << 32 | batch)
            sums.append(int(lengths.sum()))
        return {"key": np.array(keys, np.uint64), "start": np.cumsum([0, *sums])}

    def _pieces(self) -> Columns:
        mode, most = self.grouping["mode"], window_tokens(self.size)
        of_turn: dict[int, list[tuple[Array, Array]]] = {}
        for turn, number, batch, rows, lengths in self._turns():
            rule, long = rule_of(self.grouping["long_documents"], self.sources[number]), lengths > self.size
            if rule == "truncate" and long.any():
                tokens = self.tokens[self.sources[number]]
                long &= self._unanswered(tokens.batch(batch))[rows - int(tokens.starts[batch])]
            kept = ~long if rule in ("drop", "truncate") else np.ones(len(rows), bool)
            lengths = np.minimum(lengths, self.size) if rule == "truncate" else lengths
            of_turn.setdefault(turn, []).append((np.int64(number) << 32 | rows[kept], lengths[kept]))
        columns: dict[str, list[Array]] = {name: [] for name in ("key", "from", "length", "block", "place")}
        blocks = 0
        for parts in of_turn.values():
            keys, lengths = (np.concatenate(side) for side in zip(*parts, strict=True))
            reach, begin = np.cumsum(lengths), 0
            while begin < len(keys):
                before = int(reach[begin - 1]) if begin else 0
                end = min(int(np.searchsorted(reach, before + most)) + 1, len(keys))
                document, start, length, block, place = layout(lengths[begin:end], self.size, mode)
                made = (keys[begin:end][document], start, length, block + blocks, place)
                for name, values in zip(columns, made, strict=True):
                    columns[name].append(values)
                blocks += int(block[-1]) + 1
                begin = end
        found = {name: np.concatenate(values or [np.zeros(0, np.int64)]) for name, values in columns.items()}
        order = np.argsort(found["key"], kind="stable")
        return {**found, "order": order, "sorted": found["key"][order]}


def _parts(key: int) -> tuple[int, int, int]:
    return key >> 48, key >> 32 & 0xFFFF, key & 0xFFFFFFFF
