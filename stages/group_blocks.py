"""Group the tokens of a phase into blocks of equal length, losing none.

Reads:  data/tokens/PHASE, models/tokenizers/PHASE
Writes: data/blocks/PHASE/train and data/blocks/PHASE/eval
Params: phases.PHASE.group_blocks

Example, block_size 4, documents [0 5 6 1] and [0 7 1] of one split, padding id 2:

    buffer  0 5 6 1 0 7 1      ->  block 0: 0 5 6 1
    rest    0 7 1              ->  block 1: 0 7 1 2    (manifest: 7 tokens, so the 2 is padding without loss)

Each split is one stream: sources in the order of their names, documents in order. Tokens beyond the manifest's
`tokens` are padding; nothing else says so, and the loader gives them no loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from kit import arrow, stage
from kit.params import phase_sources, read_params
from kit.tokenizer import Vocabulary


class Params(BaseModel):
    """`phases.PHASE.group_blocks`: the length of a block and what becomes of the last one."""

    model_config = ConfigDict(extra="forbid")

    block_size: int = Field(ge=8, le=2**20, description="tokens in a block")
    last_block: Literal["pad", "drop"] = Field(
        "pad", description="pad: the last block is filled up without loss; drop: its tokens are left out and counted"
    )


def blocks_schema(ids: pa.DataType, block_size: int, learn: bool) -> pa.Schema:
    """Return the schema of a blocks folder; `learn` stands there only where some tokens have no loss."""
    columns = [("input_ids", pa.list_(ids, block_size))]
    return pa.schema([*columns, ("learn", pa.list_(pa.bool_(), block_size))] if learn else columns)


class Grouper:
    """Cuts one stream of tokens into blocks and writes them; holds at most one block and one batch."""

    def __init__(self, out: arrow.Writer, block_size: int) -> None:
        self.out, self.block_size = out, block_size
        self.ids = np.array([], dtype=out.schema.field("input_ids").type.value_type.to_pandas_dtype())
        self.learn = np.array([], dtype=bool)
        self.tokens = 0

    def add(self, ids: np.ndarray, learn: np.ndarray) -> None:
        """Append tokens to the stream and write the blocks that are full."""
        self.tokens += len(ids)
        self.ids, self.learn = np.concatenate([self.ids, ids]), np.concatenate([self.learn, learn])
        full = len(self.ids) - len(self.ids) % self.block_size
        if full:
            self._write(full)

    def finish(self, last_block: str, pad: int) -> int:
        """Pad or drop what is left; return the number of dropped tokens."""
        rest = len(self.ids)
        if not rest or last_block == "drop":
            return rest
        missing = self.block_size - rest
        self.ids = np.concatenate([self.ids, np.full(missing, pad, dtype=self.ids.dtype)])
        self.learn = np.concatenate([self.learn, np.zeros(missing, dtype=bool)])
        self._write(self.block_size)
        return 0

    def _write(self, tokens: int) -> None:
        columns = [self.ids[:tokens], self.learn[:tokens]][: len(self.out.schema)]
        arrays = [pa.FixedSizeListArray.from_arrays(pa.array(column), self.block_size) for column in columns]
        self.out.write(pa.Table.from_arrays(arrays, schema=self.out.schema))
        self.ids, self.learn = self.ids[tokens:], self.learn[tokens:]


def split_batch(batch: pa.RecordBatch, split: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Return ids, learn marks and the number of the documents of `split` in a batch of a tokens folder."""
    chosen = batch.filter(pa.array([value == split for value in batch["split"].to_pylist()]))
    ids = chosen["input_ids"].flatten().to_numpy()
    if "learn" not in batch.schema.names:
        return ids, np.ones(len(ids), dtype=bool), chosen.num_rows
    return ids, chosen["learn"].flatten().to_numpy(zero_copy_only=False), chosen.num_rows


def main(phase: str) -> None:
    params = read_params(f"phases.{phase}.group_blocks", Params)
    tokens, tokenizer = Path("data/tokens", phase), Path("models/tokenizers", phase)
    with stage.run("group_blocks", phase, [str(tokens), str(tokenizer)], [f"data/blocks/{phase}"]) as run:
        (folder,) = run.outputs
        sources = phase_sources(phase, tokens)
        vocabulary = Vocabulary(tokenizer)
        pad = vocabulary.id(vocabulary.special.get("pad_token", vocabulary.special["eos_token"]))  # without loss
        folders = [tokens / source for source in sources]
        manifests = [arrow.manifest(path) for path in folders]
        learn = any("learn" in manifest["schema"] for manifest in manifests)
        ids = next(arrow.batches(folders[0])).schema.field("input_ids").type.value_type
        for split in ("train", "eval"):
            expected = sum(manifest["counts"][split] for manifest in manifests)
            out = arrow.Writer(folder / split, blocks_schema(ids, params.block_size, learn))
            grouper, documents = Grouper(out, params.block_size), 0
            for path in run.progress(folders, len(folders), "sources"):
                for batch in arrow.batches(path):
                    *stream, count = split_batch(batch, split)
                    grouper.add(*stream)
                    documents += count
            dropped = grouper.finish(params.last_block, pad)
            kept = grouper.tokens - dropped
            out.close(tokens=kept, dropped_tokens=dropped, documents=documents)
            padding = out.rows * params.block_size - kept
            run.balance(f"{split} tokens", expected, kept=kept, dropped=dropped)
            if not out.rows or (split == "train" and grouper.tokens < params.block_size):
                raise SystemExit(
                    f"phase {phase}: the {split} split has {grouper.tokens:,} tokens, too few for a block of "
                    f"{params.block_size:,}; lower phases.{phase}.group_blocks.block_size or add text."
                )
            run.count(**{f"{split}_blocks": out.rows, f"{split}_tokens": kept, f"{split}_padding": padding})


if __name__ == "__main__":
    stage.cli(main, __doc__)
