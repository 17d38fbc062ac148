"""What a phase is judged on: held-out documents as text and as tokens, general texts, its training text. Part of
evaluate_model.

    documents = held_out(clean, dedup, tokens, ["laws", "cases"], ids)    # data/clean/P, dedup/P, tokens/P
    documents[0]   ->   Document("laws", ids=[0, 512, ..., 1], learned=[True, True, ..., True], text="...", said="...")

Of a conversation only what the assistant says is learned: it alone counts as tokens and as bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import decontaminate
import text_units
from kit import arrow
from kit.tokenizer import Vocabulary


class Document(NamedTuple):
    """A held-out document. `ids` and `learned` have one entry for each token, the first is given to the model."""

    source: str
    ids: npt.NDArray[Any]
    learned: npt.NDArray[np.bool_]
    text: str  # all of it, of a conversation each message
    said: str  # what is learned of it
    conversation: bool = False


def held_out(
    clean: Path, dedup: Path, tokens: Path, sources: list[str], special_ids: dict[str, int], causal: bool = True
) -> list[Document]:
    """Return the held-out documents of a phase, by source, in the order of their files.

    special_ids: of the tokenizer. Where it has no BOS, EOS is given to a causal model before a text, as in a block it
    stands between two: else the first token would be given and its bytes counted, which flatters such a tokenizer.
    """
    begin = special_ids["eos_token_id"] if causal and "bos_token_id" not in special_ids else None
    documents = []
    for source in sources:
        rows = zip(_tokens(tokens / source), _texts(clean, dedup, source, "eval"), strict=True)
        for (ids, learned), texts in rows:
            if begin is not None and learned[0]:
                ids, learned = np.insert(ids, 0, begin), np.insert(learned, 0, False)
            documents.append(Document(source, ids, learned, *texts))
    return documents


def general(name: str, vocabulary: Vocabulary) -> list[Document]:
    """Return the texts of a file in data/benchmarks as documents of a source of that name, tokenised.

    The first token is BOS, or EOS where the tokenizer has none: given, not predicted.
    """
    vocabulary.tokenizer.encode_special_tokens = True  # "</s>" in a text is text
    first = vocabulary.special_ids.get("bos_token_id", vocabulary.special_ids["eos_token_id"])
    documents = []
    for item in decontaminate.read(name, decontaminate.Params.model_validate({})):
        ids = np.array([first, *vocabulary.tokenizer.encode(item.text, add_special_tokens=False).ids])
        learned = np.arange(len(ids)) > 0
        documents.append(Document(name, ids, learned, item.text, item.text))
    return documents


def train_texts(clean: Path, dedup: Path, sources: list[str]) -> Iterator[pa.Array]:
    """Yield the whole texts that were trained on, some at a time."""
    for source in sources:
        for batch in _rows(clean, dedup, source, "train"):
            yield text_units.texts_of(batch)


def train_bytes(clean: Path, dedup: Path, sources: list[str], at_most: int) -> bytes:
    """Return the beginning of what is learned of each source, `at_most` bytes in all, an equal part for each."""
    parts = []
    for source in sources:
        text = b""
        for _, said, _ in _texts(clean, dedup, source, "train"):
            text += said.encode() + b"\n"
            if len(text) * len(sources) >= at_most:
                break
        parts.append(text[: at_most // len(sources)])
    return b"".join(parts)


def _rows(clean: Path, dedup: Path, source: str, split: str) -> Iterator[pa.RecordBatch]:
    """Yield the documents of one split, some at a time."""
    splits = arrow.table(dedup / source, ["split"])["split"]
    row = 0
    for batch in arrow.batches(clean / source / "documents"):
        of = splits.slice(row, len(batch)).to_pylist()
        row += len(batch)
        columns = [name for name in ("text", "messages") if name in batch.schema.names]
        yield batch.select(columns).filter(pa.array([each == split for each in of], pa.bool_()))


def _texts(clean: Path, dedup: Path, source: str, split: str) -> Iterator[tuple[str, str, bool]]:
    """Yield each document of one split: the whole, what is learned of it, whether it is a conversation."""
    for batch in _rows(clean, dedup, source, split):
        for row in batch.to_pylist():
            yield _whole(row), _learned(row), "messages" in row


def _whole(row: dict[str, Any]) -> str:
    return row["text"] if "text" in row else "\n".join(message["content"] or "" for message in row["messages"])


def _learned(row: dict[str, Any]) -> str:
    if "text" in row:
        return str(row["text"])
    answers = (message for message in row["messages"] if message["role"] == "assistant")
    return "".join(message["content"] for message in answers if message["learn"] is not False)


def _tokens(folder: Path) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]]:
    """Yield ids and learn marks of each held-out document."""
    for batch in arrow.batches(folder):
        learn = batch["learn"] if "learn" in batch.schema.names else None
        for row, split in enumerate(batch["split"].to_pylist()):
            if split == "eval":
                ids = batch["input_ids"][row].values.to_numpy()
                yield ids, np.ones(len(ids), bool) if learn is None else np.array(learn[row].as_py(), bool)
