"""Group the tokens of a phase into blocks of equal length, losing none.

Reads:  data/tokens/PHASE, models/tokenizers/PHASE
Writes: data/blocks/PHASE/train and data/blocks/PHASE/eval
Params: phases.PHASE.group_blocks

Example, block_size 4, documents [0 5 6 1] and [0 7 1] of one split, padding id 2:

    mode concat     0 5 6 1 0 7 1  ->  0 5 6 1 | 0 7 1 2      (manifest: 7 tokens, so the 2 is padding)
    mode line       each document in blocks of its own, here the same two, with `starts` [0 4] and [0 3]
    mode best_fit   whole documents together where they fit: documents of 3 and 1 share a block, `starts` [0 3 4]

concat is for text: one stream a split, sources in the order of their names, documents in order; only the last block has
padding, and the manifest's `tokens` says where it begins. line is for one example a block, best_fit (stages/packing.py)
for conversations; there a document longer than a block goes on in another one, `starts` holds the begin of each piece
and, last, the number of tokens. Padding has no loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from kit import arrow, stage
from kit.params import phase_sources, read_params
from kit.tokenizer import Vocabulary
from packing import best_fit, in_order, pieces

Flat = tuple[np.ndarray, np.ndarray]  # ids and learn marks of neighbouring documents, of equal length


class Params(BaseModel):
    """`phases.PHASE.group_blocks`: the length of a block and what shares one."""

    model_config = ConfigDict(extra="forbid")

    block_size: int = Field(ge=8, le=2**20, description="tokens in a block")
    mode: Literal["concat", "best_fit", "line"] = Field(
        "concat", description="concat: one stream, cut; best_fit: whole documents, packed; line: one document a block"
    )
    last_block: Literal["pad", "drop"] = Field(
        "pad", description="concat only. pad: the last block is filled up; drop: its tokens are left out and counted"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        if self.mode != "concat" and self.last_block == "drop":
            raise ValueError(f"last_block: drop is for mode concat; mode {self.mode} pads each block and drops nothing")
        return self


def blocks_schema(ids: pa.DataType, block_size: int, learn: bool, starts: bool = False) -> pa.Schema:
    """Return the schema of a blocks folder; `learn` and `starts` stand there only where they are needed."""
    columns = [("input_ids", pa.list_(ids, block_size))]
    columns += [("learn", pa.list_(pa.bool_(), block_size))] if learn else []
    columns += [("starts", pa.list_(pa.uint32()))] if starts else []
    return pa.schema(columns)


class Grouper:
    """Writes blocks of one length; what is added as a stream is cut, what is added as pieces stays together."""

    def __init__(self, out: arrow.Writer, block_size: int, pad: int) -> None:
        self.out, self.block_size, self.pad = out, block_size, pad
        self.dtype = out.schema.field("input_ids").type.value_type.to_pandas_dtype()
        self._rest: Flat = (np.array([], dtype=self.dtype), np.array([], dtype=bool))

    def stream(self, flat: Flat) -> None:
        """Append tokens to the stream and write the blocks that are full; less than one block is kept back."""
        ids, learn = (np.concatenate([rest, new]) for rest, new in zip(self._rest, flat, strict=True))
        full = len(ids) - len(ids) % self.block_size
        self._write(ids[:full], learn[:full])
        self._rest = ids[full:], learn[full:]

    def finish(self, last_block: str) -> int:
        """Pad or drop what is left of the stream; return the number of dropped tokens."""
        ids, learn = self._rest
        if not len(ids) or last_block == "drop":
            return len(ids)
        missing = self.block_size - len(ids)
        ids = np.concatenate([ids, np.full(missing, self.pad, dtype=self.dtype)])
        self._write(ids, np.concatenate([learn, np.zeros(missing, dtype=bool)]))
        return 0

    def packed(self, blocks: list[list[Flat]]) -> None:
        """Write one block for each list of pieces, padded."""
        ids = np.full((len(blocks), self.block_size), self.pad, dtype=self.dtype)
        learn = np.zeros((len(blocks), self.block_size), dtype=bool)
        starts = []
        for row, block in enumerate(blocks):
            place = [0]
            for piece_ids, piece_learn in block:
                ids[row, place[-1] : place[-1] + len(piece_ids)] = piece_ids
                learn[row, place[-1] : place[-1] + len(piece_ids)] = piece_learn
                place.append(place[-1] + len(piece_ids))
            starts.append(place)
        self._write(ids.ravel(), learn.ravel(), pa.array(starts, pa.list_(pa.uint32())))

    def _write(self, ids: np.ndarray, learn: np.ndarray, starts: pa.Array | None = None) -> None:
        names = self.out.schema.names
        columns = [pa.FixedSizeListArray.from_arrays(pa.array(ids), self.block_size)]
        if "learn" in names:
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(learn), self.block_size))
        if "starts" in names:
            columns.append(starts)
        self.out.write(pa.Table.from_arrays(columns, schema=self.out.schema))


def flat(batch: pa.RecordBatch) -> Flat:
    """Return the ids and learn marks of a batch of a tokens folder, one document after the other."""
    ids = batch["input_ids"].flatten().to_numpy()
    if "learn" not in batch.schema.names:
        return ids, np.ones(len(ids), dtype=bool)
    return ids, batch["learn"].flatten().to_numpy(zero_copy_only=False)


def rows_of(batch: pa.RecordBatch, split: str) -> np.ndarray:
    """Return the row numbers of the documents of `split`."""
    return np.flatnonzero(batch["split"].to_numpy(zero_copy_only=False) == split)


def concatenate(folders: list[Path], split: str, grouper: Grouper) -> tuple[int, int]:
    """Feed the documents of `split` to the stream; return the numbers of documents and tokens."""
    documents = tokens = 0
    for folder in folders:
        for batch in arrow.batches(folder):
            rows = rows_of(batch, split)
            chosen = batch if len(rows) == batch.num_rows else batch.take(pa.array(rows))
            documents += len(rows)
            stream = flat(chosen)
            tokens += len(stream[0])
            grouper.stream(stream)
    return documents, tokens


def pack(folders: list[Path], split: str, mode: str, grouper: Grouper, rows_at_once: int = 1024) -> tuple[int, int]:
    """Write the documents of `split` in whole pieces; return the numbers of documents and tokens.

    Only the place and length of each document is held, the tokens stay in the memory-mapped files.
    """
    chunks: list[pa.RecordBatch] = []
    places = []
    for folder in folders:
        for batch in arrow.batches(folder):
            rows = rows_of(batch, split)
            offsets = batch["input_ids"].offsets.to_numpy().astype(np.int64)
            first = offsets[rows] - offsets[0]
            places.append(np.stack([np.full(len(rows), len(chunks)), first, offsets[rows + 1] - offsets[rows]], axis=1))
            chunks.append(batch)
    where = np.concatenate(places)
    cut = pieces(where[:, 2], grouper.block_size)
    block_of = np.arange(len(cut)) if mode == "line" else in_order(best_fit(cut[:, 2], grouper.block_size))
    order = np.argsort(block_of, kind="stable")
    for blocks in _gathered(chunks, where, cut[order], block_of[order], rows_at_once):
        grouper.packed(blocks)
    return len(where), int(where[:, 2].sum())


def _gathered(
    chunks: list[pa.RecordBatch], where: np.ndarray, cut: np.ndarray, block_of: np.ndarray, rows_at_once: int
) -> Iterator[list[list[Flat]]]:
    """Yield lists of blocks, each a list of pieces; `cut` and `block_of` are in the order of the blocks."""
    opened: dict[int, Flat] = {}
    blocks: list[list[Flat]] = []
    last = -1
    for (document, start, length), block in zip(cut.tolist(), block_of.tolist(), strict=True):
        if block != last:
            if len(blocks) == rows_at_once:
                yield blocks
                blocks = []
                opened.clear()
            blocks.append([])
            last = block
        chunk, first, _ = where[document].tolist()
        if chunk not in opened:
            opened[chunk] = flat(chunks[chunk])
        ids, learn = opened[chunk]
        blocks[-1].append((ids[first + start : first + start + length], learn[first + start : first + start + length]))
    if blocks:
        yield blocks


def main(phase: str) -> None:
    params = read_params(f"phases.{phase}.group_blocks", Params)
    tokens, tokenizer = Path("data/tokens", phase), Path("models/tokenizers", phase)
    with stage.run("group_blocks", phase, [str(tokens), str(tokenizer)], [f"data/blocks/{phase}"]) as run:
        (folder,) = run.outputs
        folders = [tokens / source for source in phase_sources(phase, tokens)]
        vocabulary = Vocabulary(tokenizer)
        pad = vocabulary.id(vocabulary.special.get("pad_token", vocabulary.special["eos_token"]))
        manifests = [arrow.manifest(path) for path in folders]
        learn = any("learn" in manifest["schema"] for manifest in manifests)
        ids = next(arrow.batches(folders[0])).schema.field("input_ids").type.value_type
        schema = blocks_schema(ids, params.block_size, learn, starts=params.mode != "concat")
        for split in ("train", "eval"):
            expected = sum(manifest["counts"][split] for manifest in manifests)
            out = arrow.Writer(folder / split, schema)
            grouper = Grouper(out, params.block_size, pad)
            if params.mode == "concat":
                documents, read = concatenate(folders, split, grouper)
                dropped = grouper.finish(params.last_block)
            else:
                documents, read = pack(folders, split, params.mode, grouper)
                dropped = 0
            out.close(tokens=read - dropped, dropped_tokens=dropped, documents=documents)
            run.balance(f"{split} tokens", expected, kept=read - dropped, dropped=dropped)
            if not out.rows or (split == "train" and read < params.block_size):
                raise SystemExit(
                    f"phase {phase}: the {split} split has {read:,} tokens, too few for a block of "
                    f"{params.block_size:,}; lower phases.{phase}.group_blocks.block_size or add text."
                )
            padding = out.rows * params.block_size - (read - dropped)
            run.count(**{f"{split}_blocks": out.rows, f"{split}_tokens": read - dropped, f"{split}_padding": padding})


if __name__ == "__main__":
    stage.cli(main, __doc__)
