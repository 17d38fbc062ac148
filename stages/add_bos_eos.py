"""Put each document between BOS and EOS, and render each conversation with the chat template, as marked segments.

Reads:  data/clean/PHASE/SOURCE/documents, data/dedup/PHASE/SOURCE, models/tokenizers/PHASE
Writes: data/marked/PHASE/SOURCE   the documents of the train and eval splits as lists of segments
Params: none of its own (the tokenizer says what BOS, EOS and the chat template are)

A segment is a piece of text with two marks: `special`, one special token, and `learn`, the model is trained to write
it. Special tokens exist in no other way, so text that merely looks like one stays text. Example (* special, + learn):

    text "Hi</s>"                      ->  *+"<s>"  +"Hi</s>"  *+"</s>"
    user "2+2?", assistant "4"         ->  *"<s>"  "Human: 2+2?\\n\\nAssistant: "  +"4"  *+"</s>"

Neighbours with equal marks are one segment, so the prompt is tokenised in one piece, as it is when the model is used.
Texts end with the tokenizer's `eos_token`, answers with the token of the template: the same one, but under a base's own
template at whose token the base stops, too (Gemma).

Each file of documents gives one of marked documents; what an earlier run has made of the same documents with the same
splits is taken from .memo/.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # before numpy is imported
    from kit.start import lean

    lean()

import numpy as np
import pyarrow as pa

from chat_segments import Marker
from kit import arrow, stage
from kit.arrow import compute as pc
from kit.memo import Made, Memo
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


def row_bytes(doc_ids: pa.FixedSizeBinaryArray) -> memoryview:
    return memoryview(doc_ids.buffers()[1])[16 * doc_ids.offset : 16 * (doc_ids.offset + len(doc_ids))]


def split_codes(decisions: Path) -> tuple[np.ndarray, str]:
    """Return the place in SPLITS of each row's split, one byte each, and a digest of the doc_ids."""
    codes, digest = [np.array([], np.uint8)], hashlib.sha256()
    for batch in arrow.batches(decisions, ["doc_id", "split"]):
        digest.update(row_bytes(batch["doc_id"]))
        codes.append(pc.index_in(batch["split"], SPLITS).to_numpy().astype(np.uint8))
    return np.concatenate(codes), digest.hexdigest()


class Work(NamedTuple):
    """A shard of documents, to be marked."""

    path: Path
    guard: stage.Guard
    splits: np.ndarray  # as `split_codes` returns them
    tokenizer: Path
    digest: str  # of the tokenizer


def identities(documents: Path) -> tuple[list[tuple[Path, int, str]], str]:
    """Return path, rows and digest of the content of each shard of documents that has rows, and a digest of all ids.

    The content is what the doc_ids name and, of messages, which are not to be learned.
    """
    found, total = [], hashlib.sha256()
    columns = [name for name in ("doc_id", "messages") if name in arrow.manifest(documents)["schema"]]
    for path in arrow.shard_paths(documents):
        own, rows = hashlib.sha256(), 0
        for batch in arrow.shard_batches(path, columns):
            own.update(row_bytes(batch["doc_id"]))
            if "messages" in columns:
                learn = pc.struct_field(batch["messages"].flatten(), "learn").fill_null(True)
                own.update(learn.to_numpy(zero_copy_only=False).tobytes())
            total.update(row_bytes(batch["doc_id"]))
            rows += batch.num_rows
        if rows:
            found.append((path, rows, own.hexdigest()))
    return found, total.hexdigest()


@functools.cache
def _marker(tokenizer: Path, digest: str) -> Marker:
    return Marker(tokenizer)


def mark_shard(work: Work) -> Made:
    """Return the marked rows of a shard."""
    marker, batches, first = _marker(work.tokenizer, work.digest), [], 0
    for batch in arrow.shard_batches(work.path):
        column = "messages" if "messages" in batch.schema.names else "text"
        for at in range(0, batch.num_rows, ROWS):
            part = batch.select(["doc_id", column]).slice(at, ROWS)
            here = work.splits[first : first + part.num_rows]
            batches.append(marked(marker, part.append_column("split", SPLITS.take(pa.array(here)))))
            first += part.num_rows
    rows = pa.Table.from_batches(batches)
    segments = pa.chunked_array([segments.flatten() for segments in rows["segments"].chunks], SEGMENT)
    text, learn = (pc.struct_field(segments, name) for name in ("text", "learn"))
    notes = {
        "rows": rows.num_rows,
        "characters": pc.sum(pc.utf8_length(text)).as_py() or 0,
        "segments_not_learned": len(learn) - (pc.sum(learn).as_py() or 0),
    }
    work.guard.check()
    return Made([("marked", arrow.encode(rows, MARKED))], notes)


def main(name: str) -> None:
    phase = read_params(f"sources.{name}", Source).phase
    documents, decisions = Path("data/clean", phase, name, "documents"), Path("data/dedup", phase, name)
    tokenizer = Path("models/tokenizers", phase)
    inputs = [str(documents), str(decisions), str(tokenizer)]
    with stage.run("add_bos_eos", name, inputs, [f"data/marked/{phase}/{name}"]) as run:
        (folder,) = run.outputs
        splits, decided = split_codes(decisions)
        found, ids = identities(documents)
        if ids != decided:
            raise SystemExit(f"{decisions} decides about other documents than {documents} holds; run `dvc repro`.")
        dropped = int((splits == SPLITS.index("dropped").as_py()).sum())
        digest = run.digests[str(tokenizer)]
        content = arrow.manifest(documents)["schema"]
        memo = Memo(Path(".memo") / run.name, run.recipe([digest, sorted(content)]))
        ends = np.cumsum([rows for _, rows, _ in found], dtype=np.int64)
        parts = np.split(splits, ends[:-1])
        guard = run.guards[str(documents)]
        _marker(tokenizer, digest)  # workers inherit it
        run.guards[str(tokenizer)].check()
        shards = (
            (
                f"{ids} {hashlib.sha256(part.tobytes()).hexdigest()}",
                Work(path, guard.of([path]), part, tokenizer, digest),
            )
            for (path, _, ids), part in zip(found, parts, strict=False)
        )
        done = memo.map(shards, mark_shard, stage.workers(), stage.die_with_parent)
        counts: Counter[str] = Counter(characters=0, segments_not_learned=0)
        with arrow.Shards(folder, MARKED) as out:
            for result in run.progress(done, len(found), "shards"):
                out.add(result.files["marked"], result.notes["rows"], result.sha256["marked"])
                counts.update({name: result.notes[name] for name in counts})
            run.balance("documents", len(splits), kept=out.rows, dropped=dropped)
            out.counts = dict(counts)
        memo.sweep()
        run.count(documents=len(splits), marked=out.rows, dropped=dropped, characters=counts["characters"])


if __name__ == "__main__":
    stage.cli(main, __doc__)
