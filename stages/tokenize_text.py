"""Turn marked segments into token ids.

Reads:  data/marked/PHASE/SOURCE, models/tokenizers/PHASE
Writes: data/tokens/PHASE/SOURCE   ids of each document; `learn` only where some ids are not to be learned
Params: none (the tokenizer decides)

Example, a tokenizer with <s> = 0, </s> = 1, <pad> = 2 and the bytes from 3 on (* special, + learn):

    *+"<s>"  +"Hi"  *+"</s>"     ->  input_ids [0, 42, 75, 1]

A plain segment is encoded with the parsing of special tokens off; a special segment is one id. That no id of a special
token stands anywhere else is checked for every document before anything is published.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kit import arrow, stage
from kit.params import Source, read_params
from kit.tokenizer import Vocabulary


class Encoder:
    """Encodes segments with the tokenizer of a folder."""

    def __init__(self, folder: Path) -> None:
        self.vocabulary = Vocabulary(folder)
        self.tokenizer = self.vocabulary.tokenizer
        self.tokenizer.encode_special_tokens = True  # text that looks like a special token is encoded as text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.specials = np.array([self.vocabulary.id(token) for token in self.vocabulary.special_texts])

    @property
    def dtype(self) -> pa.DataType:
        """uint16 up to 65,536 entries, else uint32."""
        return pa.uint16() if self.vocabulary.size <= 2**16 else pa.uint32()

    def encode(self, documents: list[list[dict[str, Any]]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the ids (int64) and the learn marks (bool) of each document, one array each, of equal length."""
        plain = [s["text"] for segments in documents for s in segments if not s["special"]]
        encoded = iter(self.tokenizer.encode_batch_fast(plain, add_special_tokens=False))
        all_ids, all_learn = [], []
        for segments in documents:
            pieces = [[self.vocabulary.id(s["text"])] if s["special"] else next(encoded).ids for s in segments]
            ids = np.concatenate([np.array(piece, dtype=np.int64) for piece in pieces])
            lengths = [len(piece) for piece in pieces]
            wrong = np.isin(ids, self.specials) != np.repeat([s["special"] for s in segments], lengths)
            if wrong.any():
                token = self.tokenizer.id_to_token(int(ids[wrong][0]))
                raise ValueError(
                    f"{self.vocabulary.folder} is unfit: either plain text becomes its special token {token!r}, or it "
                    f"names {token!r} as special while its tokenizer.json does not; choose another token or tokenizer."
                )
            all_ids.append(ids)
            all_learn.append(np.repeat([s["learn"] for s in segments], lengths))
        return all_ids, all_learn


def tokens_schema(ids: pa.DataType, learn: bool) -> pa.Schema:
    """Return the schema of a tokens folder."""
    columns = [("doc_id", pa.binary(16)), ("split", pa.string()), ("input_ids", pa.list_(ids))]
    return pa.schema([*columns, ("learn", pa.list_(pa.bool_()))] if learn else columns)


def lists(values: list[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    """Return arrays of any lengths as one Arrow list column."""
    offsets = np.concatenate([[0], np.cumsum([len(value) for value in values])]).astype(np.int32)
    flat = np.concatenate(values) if values else np.array([], dtype=np.int64)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat).cast(kind))


def masked(folder: Path) -> bool:
    """Return whether any segment of a marked folder is not to be learned."""
    for batch in arrow.batches(folder, ["segments"]):
        if not np.all(batch["segments"].flatten().field("learn").to_numpy(zero_copy_only=False)):
            return True
    return False


def main(name: str) -> None:
    phase = read_params(f"sources.{name}", Source).phase
    marked, tokenizer = Path("data/marked", phase, name), Path("models/tokenizers", phase)
    os.environ["RAYON_NUM_THREADS"] = str(stage.workers())
    with stage.run("tokenize_text", name, [str(marked), str(tokenizer)], [f"data/tokens/{phase}/{name}"]) as run:
        (folder,) = run.outputs
        encoder = Encoder(tokenizer)
        schema = tokens_schema(encoder.dtype, masked(marked))
        rows, tokens, learned = arrow.manifest(marked)["counts"]["rows"], {"train": 0, "eval": 0}, 0
        with arrow.Writer(folder, schema, batch_rows=256) as out:
            for batch in run.progress(arrow.batches(marked), -(-rows // 256), "batches"):
                ids, learn = encoder.encode(batch["segments"].to_pylist())
                columns = [batch["doc_id"], batch["split"], lists(ids, encoder.dtype), lists(learn, pa.bool_())]
                out.write(pa.Table.from_arrays(columns[: len(schema)], schema=schema))
                for split, document, marks in zip(batch["split"].to_pylist(), ids, learn, strict=True):
                    tokens[split] += len(document)
                    learned += int(marks.sum())
            run.balance("documents", rows, tokenised=out.rows)
            out.counts = {**tokens, "learned": learned}
        run.count(documents=out.rows, tokens=tokens["train"] + tokens["eval"], learned=learned)


if __name__ == "__main__":
    stage.cli(main, __doc__)
