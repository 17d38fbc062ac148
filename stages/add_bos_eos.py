"""Put each document between BOS and EOS, and render each conversation with the chat template, as marked segments.

Reads:  data/clean/PHASE/SOURCE/documents, data/dedup/PHASE/SOURCE, models/tokenizers/PHASE
Writes: data/marked/PHASE/SOURCE   the documents of the train and eval splits as lists of segments
Params: none of its own (the tokenizer says what BOS, EOS and the chat template are)

A segment is a piece of text with two marks: `special`, one special token, and `learn`, the model is trained to write
it. Special tokens exist in no other way, so text that merely looks like one stays text. Example (* special, + learn):

    text "Hi</s>"                      ->  *+"<s>"  +"Hi</s>"  *+"</s>"
    user "2+2?", assistant "4"         ->  *"<s>"  "Human: 2+2?\\n\\nAssistant: "  +"4"  *+"</s>"

Neighbours with equal marks are one segment, so the prompt is tokenised in one piece, as it is when the model is used.
Both kinds end with the tokenizer's `eos_token`, which under a template with a token of its own is that token.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from chat_segments import Marker
from kit import arrow, stage
from kit.arrow import compute as pc
from kit.memo import Memo, cuts, row_hashes
from kit.params import Source, read_params

SEGMENT = pa.struct([("text", pa.string()), ("special", pa.bool_()), ("learn", pa.bool_())])
MARKED = pa.schema(
    [
        pa.field("doc_id", pa.binary(16)),
        pa.field("split", pa.string()),  # train or eval
        pa.field("segments", pa.list_(SEGMENT)),
    ]
)
SPLITS = pa.array(["train", "eval", "dropped"])
ROWS = 256  # of a batch, and rows that are Python objects at a time
SHARD_BYTES = 2**20  # of conversations, about: a tenth of a second of work


def segments_of_texts(marker: Marker, texts: pa.StringArray) -> pa.ListArray:
    """Return the segments of plain documents, as `marker.document` gives them, without an object per document."""
    frame = marker.document("")  # of each document: the special tokens, and the place of its text
    take = np.tile(np.arange(len(frame)), (len(texts), 1))
    take[:, [segment.special for segment in frame].index(False)] = len(frame) + np.arange(len(texts))
    parts = pa.concat_arrays([pa.array([segment.text for segment in frame]), texts]).take(pa.array(take.ravel()))
    marks = [np.tile([getattr(s, name) for s in frame], len(texts)) for name in ("special", "learn")]
    return _lists(parts, *marks, lengths=np.full(len(texts), len(frame)))


def segments_of_messages(marker: Marker, messages: pa.ListArray, doc_ids: pa.FixedSizeBinaryArray) -> pa.ListArray:
    """Return the segments of conversations. Raises ValueError naming the one that the template does not suit."""
    rows = []
    for doc_id, conversation in zip(doc_ids.to_pylist(), messages.to_pylist(), strict=True):
        try:
            rows.append(marker.conversation(conversation))
        except ValueError as error:
            begin = conversation[0]["content"][:40] if conversation else ""
            raise ValueError(f"document {doc_id.hex()} ({begin!r}): {error}") from None
    text, special, learn = zip(*(segment for row in rows for segment in row), strict=True) if rows else ((), (), ())
    return _lists(pa.array(text, pa.string()), special, learn, lengths=np.array([len(row) for row in rows], dtype=int))


def _lists(text: pa.StringArray, *marks: object, lengths: np.ndarray) -> pa.ListArray:
    columns = [text, *(pa.array(mark, pa.bool_()) for mark in marks)]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.StructArray.from_arrays(columns, fields=list(SEGMENT)))


def marked(marker: Marker, batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the kept rows of a batch (doc_id, text or messages, split) as a batch of MARKED."""
    kept = batch.filter(pc.not_equal(batch["split"], "dropped"))
    if "text" in kept.schema.names:
        segments = segments_of_texts(marker, kept["text"])
    else:
        segments = segments_of_messages(marker, kept["messages"], kept["doc_id"])
    return pa.RecordBatch.from_arrays([kept["doc_id"], kept["split"], segments], schema=MARKED)


def identities(folder: Path) -> str:
    """Return a digest of the doc_ids of a folder, in order."""
    digest = hashlib.sha256()
    for batch in arrow.batches(folder, ["doc_id"]):
        digest.update(row_bytes(batch["doc_id"]))
    return digest.hexdigest()


def row_bytes(doc_ids: pa.FixedSizeBinaryArray) -> memoryview:
    return memoryview(doc_ids.buffers()[1])[16 * doc_ids.offset : 16 * (doc_ids.offset + len(doc_ids))]


def split_codes(decisions: Path) -> np.ndarray:
    """Return the place in SPLITS of each row's split, one byte each: all that is held of every row."""
    codes = [pc.index_in(batch["split"], SPLITS).to_numpy() for batch in arrow.batches(decisions, ["split"])]
    return np.concatenate([code.astype(np.uint8) for code in codes] or [np.array([], np.uint8)])


def rows(documents: Path, splits: np.ndarray) -> Iterator[pa.RecordBatch]:
    """Yield the documents (doc_id, text or messages, split), at most ROWS at a time."""
    first = 0
    for batch in arrow.batches(documents):
        column = "messages" if "messages" in batch.schema.names else "text"
        for at in range(0, batch.num_rows, ROWS):
            part = batch.select(["doc_id", column]).slice(at, ROWS)
            yield part.append_column("split", SPLITS.take(pa.array(splits[first : first + part.num_rows])))
            first += part.num_rows


def ends_of_shards(documents: Path) -> list[int]:
    """Return where each shard of conversations ends, as row numbers: cut by content."""
    return cuts(
        ((row_hashes(b["doc_id"]), message_bytes(b["messages"])) for b in arrow.batches(documents)), SHARD_BYTES
    )


def shards(documents: Path, splits: np.ndarray, ends: list[int]) -> Iterator[tuple[str, pa.Buffer]]:
    """Yield (digest, rows as an Arrow stream) of each shard; a digest covers content (as doc_id) and split of a row."""
    waiting = rows(documents, splits)
    rest, first = next(waiting), 0
    for last in ends:
        sink, digest = pa.BufferOutputStream(), hashlib.sha256(splits[first:last].tobytes())
        with pa.ipc.new_stream(sink, rest.schema) as stream:
            while first < last:
                rest = rest if rest.num_rows else next(waiting)
                part = rest.slice(0, last - first)
                stream.write_batch(part)
                digest.update(row_bytes(part["doc_id"]))
                rest, first = rest.slice(part.num_rows), first + part.num_rows
        yield digest.hexdigest(), sink.getvalue()


def message_bytes(messages: pa.ListArray) -> np.ndarray:
    """Return the bytes that the messages of each conversation say."""
    content = messages.values.field("content")
    reach = np.frombuffer(content.buffers()[1], np.int32)[content.offset :][messages.offsets.to_numpy()]
    return np.diff(reach)


@functools.cache
def _marker(tokenizer: Path, digest: str) -> Marker:
    return Marker(tokenizer)


def _work(tokenizer: Path, digest: str, shard: pa.Buffer) -> bytes:
    # Whole first: where the batches of the source ended must not show in what is remembered.
    table = pa.ipc.open_stream(shard).read_all().combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, MARKED) as stream:
        for batch in table.to_batches(max_chunksize=ROWS):
            stream.write_batch(marked(_marker(tokenizer, digest), batch))
    return sink.getvalue().to_pybytes()


def results(run: stage.Run, documents: Path, splits: np.ndarray, tokenizer: Path) -> Iterator[pa.RecordBatch]:
    """Yield the marked batches of all documents: plain text as it comes, conversations shard by shard from the memo.

    Plain text has no memo: 2,200 MB are marked in a CPU second, and 800 MB of results read and compared with their
    SHA-256.
    """
    if "text" in arrow.manifest(documents)["schema"]:
        marker = Marker(tokenizer)
        for batch in run.progress(rows(documents, splits), -(-len(splits) // ROWS), "batches"):
            yield marked(marker, batch)
        return
    digest = run.digests[str(tokenizer)]
    memo = Memo(Path(".memo") / run.name, run.recipe([digest]))
    work, ends = functools.partial(_work, tokenizer, digest), ends_of_shards(documents)
    done = memo.map(shards(documents, splits, ends), work, stage.workers(), stage.die_with_parent)
    for result in run.progress(done, len(ends), "shards"):
        yield from pa.ipc.open_stream(result)
    memo.sweep()


def main(name: str) -> None:
    phase = read_params(f"sources.{name}", Source).phase
    documents, decisions = Path("data/clean", phase, name, "documents"), Path("data/dedup", phase, name)
    tokenizer = Path("models/tokenizers", phase)
    inputs = [str(documents), str(decisions), str(tokenizer)]
    with stage.run("add_bos_eos", name, inputs, [f"data/marked/{phase}/{name}"]) as run:
        (folder,) = run.outputs
        if identities(documents) != identities(decisions):
            raise SystemExit(f"{decisions} decides about other documents than {documents} holds; run `dvc repro`.")
        splits = split_codes(decisions)
        dropped, characters = int((splits == SPLITS.index("dropped").as_py()).sum()), 0
        with arrow.Writer(folder, MARKED, batch_rows=ROWS) as out:
            for batch in results(run, documents, splits, tokenizer):
                characters += pc.sum(pc.utf8_length(batch["segments"].flatten().field("text"))).as_py() or 0
                out.write(batch)
            run.balance("documents", len(splits), kept=out.rows, dropped=dropped)
            out.counts = {"characters": characters}
        run.count(documents=len(splits), marked=out.rows, dropped=dropped, characters=characters)


if __name__ == "__main__":
    stage.cli(main, __doc__)
