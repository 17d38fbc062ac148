"""Turn marked segments into token ids.

Reads:  data/marked/PHASE/SOURCE, models/tokenizers/PHASE
Writes: data/tokens/PHASE/SOURCE   ids of each document; `learn` only where some ids are not to be learned
Params: none (the tokenizer decides)

Example, a tokenizer with <s> = 0, </s> = 1, <pad> = 2 and the bytes from 3 on (* special, + learn):

    *+"<s>"  +"Hi"  *+"</s>"     ->  input_ids [0, 42, 75, 1]

A plain segment is encoded with the parsing of special tokens off; a special segment is one id. That no id of a special
token stands anywhere else is checked for every document before anything is published. Each file of marked documents
gives one of tokens, and what an earlier run has made of the same bytes is taken from .memo/.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # before numpy is imported
    from kit.start import lean

    lean()

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from fast_encoder import FastEncoder, interleave
from kit import arrow, malloc, stage
from kit.arrow import compute as pc
from kit.memo import Made, Memo
from kit.params import Source, read_params
from kit.tokenizer import Vocabulary

PART_BYTES = 2**20  # of text encoded at a time


def tokens_schema(ids: pa.DataType, learn: bool) -> pa.Schema:
    """Return the schema of a tokens folder."""
    columns = [("doc_id", pa.binary(16)), ("split", pa.string()), ("input_ids", pa.list_(ids))]
    return pa.schema([*columns, ("learn", pa.list_(pa.bool_()))] if learn else columns)


class Work(NamedTuple):
    """A shard of marked rows, to be encoded."""

    path: Path
    guard: stage.Guard
    tokenizer: Path
    masked: bool  # whether any segment of the source is not to be learned


class Encoder:
    """Encodes segments with the tokenizer of a folder."""

    def __init__(self, folder: Path) -> None:
        self.vocabulary = Vocabulary(folder)
        self.fast = FastEncoder(self.vocabulary.tokenizer)
        self.dtype = pa.from_numpy_dtype(self.fast.dtype)
        bare, self.at_start = without_prefix(self.vocabulary.tokenizer)
        self.bare = FastEncoder(bare) if bare else None
        special = [self.vocabulary.id(token) for token in self.vocabulary.special_texts]
        if not special:
            raise ValueError(f"{folder}/tokenizer.json names no special token; take another one, or mode: train.")
        self.is_special = np.zeros(self.vocabulary.size, dtype=bool)
        self.is_special[special] = True
        # They stand together at one end of most vocabularies, so that most ids need no look into the table.
        self.first, self.last = (self.fast.dtype(end) for end in (min(special), max(special)))

    def encode(self, segments: pa.ListArray) -> tuple[pa.ListArray, pa.ListArray | None]:
        """Return the ids and the learn marks of each document, lists of equal length; None: all is learned."""
        flat, ends = segments.flatten(), segments.offsets.to_numpy() - segments.offsets[0].as_py()
        text, learn = flat.field("text"), flat.field("learn").to_numpy(zero_copy_only=False)
        special = flat.field("special").to_numpy(zero_copy_only=False)
        names = text.filter(pa.array(special)).dictionary_encode()
        known = np.full(len(text), -1)
        numbers = np.array([self.vocabulary.id(name) for name in names.dictionary.to_pylist()], dtype=np.int64)
        known[special] = numbers[names.indices.to_numpy()]
        inside = self._inside(special, ends) if self.bare else np.zeros(len(text), bool)
        if self.bare and inside.any():
            others = self.fast.encode(text.filter(pa.array(~inside)), known[~inside])
            ids, lengths = interleave(inside, self.bare.encode(text.filter(pa.array(inside))), others)
        else:
            ids, lengths = self.fast.encode(text, known)
        reach = np.cumsum(lengths)
        near = np.flatnonzero(ids - self.first <= self.last - self.first)  # what is below wraps round
        found = near[self.is_special[ids[near]]]
        if wrong := np.setxor1d(found, reach[special] - 1).tolist():
            token = self.vocabulary.tokenizer.id_to_token(int(ids[wrong[0]]))
            raise ValueError(
                f"{self.vocabulary.folder} is unfit: either plain text becomes its special token {token!r}, or it "
                f"names {token!r} as special while its tokenizer.json does not; choose another token or tokenizer."
            )
        # Where each document ends among the ids.
        offsets = pa.array(np.append(0, reach)[ends].astype(np.int32))
        lists = pa.ListArray.from_arrays(offsets, pa.array(ids))
        if learn.all():
            return lists, None
        return lists, pa.ListArray.from_arrays(offsets, pa.array(np.repeat(learn, lengths)))

    def _inside(self, special: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Return which segments (bool) get no space before them, for the whole text would have none there.

        Those that go on after plain text; where a text has one at its very beginning alone (`at_start`), all of a
        conversation but its first segment. ends: where the documents begin, and the last ends.
        """
        plain = ~special
        first = np.zeros(len(special) + 1, bool)
        first[ends[:-1]] = True
        if not self.at_start:
            return plain & np.append(False, plain[:-1]) & ~first[:-1]
        reach = np.append(0, np.cumsum(plain))[ends]  # a text is one segment, between BOS and EOS
        return plain & np.repeat(np.diff(reach) > 1, np.diff(ends)) & ~first[:-1]


def without_prefix(tokenizer: Tokenizer) -> tuple[Tokenizer | None, bool]:
    """Return the tokenizer without the space that it puts before a text, and whether it puts it at the beginning alone.

    None where it puts none. So do Llama 2's and most of SentencePiece's: what is cut where an answer begins would have
    one too many, for "Assistant: 4" is no "Assistant:  4". One that is put before each word that another step has cut
    (XGLM, XLM-R) stays.
    """
    schemes = set()

    def bare(step: dict[str, Any] | None, cut: bool = False) -> dict[str, Any] | None:
        if step is None:
            return None
        if "normalizers" in step:
            return {**step, "normalizers": [one for one in map(bare, step["normalizers"]) if one]}
        if "pretokenizers" in step:
            steps = enumerate(step["pretokenizers"])
            return {**step, "pretokenizers": [bare(one, cut or place > 0) for place, one in steps]}
        if cut and (step.get("prepend_scheme") == "always" or step.get("add_prefix_space")):
            return step
        if step["type"] == "Prepend":
            schemes.add("always")
            return None
        if step["type"] == "Metaspace" and step["prepend_scheme"] != "never":
            schemes.add(step["prepend_scheme"])
            return {**step, "prepend_scheme": "never"}
        if step.get("add_prefix_space"):
            schemes.add("always")
            return {**step, "add_prefix_space": False}
        return step

    own = {"normalizer": tokenizer.normalizer, "pre_tokenizer": tokenizer.pre_tokenizer}
    parts = {name: bare(json.loads(part.__getstate__())) if part else None for name, part in own.items()}
    if not schemes:  # of most, and the whole of a large one takes 0.3 s to write
        return None, False
    return Tokenizer.from_str(json.dumps({**json.loads(tokenizer.to_str()), **parts})), schemes == {"first"}


@functools.cache
def encoder(tokenizer: Path) -> Encoder:
    """Return the encoder of a tokenizer folder; a worker inherits that of the process that forked it."""
    return Encoder(tokenizer)


def tokenise_shard(work: Work) -> Made:
    """Turn a shard of marked rows into rows of tokens."""
    rows = pa.ipc.open_stream(pa.memory_map(str(work.path))).read_all().combine_chunks()
    # A part after the other: what encoding needs beside the ids stays small.
    parts = [encoder(work.tokenizer).encode(part) for part in parts_of(rows["segments"].chunk(0))]
    ids = pa.chunked_array([ids for ids, _ in parts])
    columns, learned = [rows["doc_id"], rows["split"], ids], [learn for _, learn in parts]
    if work.masked:
        learned = [all_learned(ids) if learn is None else learn for ids, learn in parts]
        columns.append(pa.chunked_array(learned))
    elif any(learn is not None for learn in learned):
        raise ValueError(f"{work.path} has segments that are not learned, but its manifest.json counts none (a bug).")
    lengths, train = pc.list_value_length(ids), pc.equal(rows["split"], "train")
    notes = {
        "rows": rows.num_rows,
        "train": pc.sum(lengths.filter(train)).as_py() or 0,
        "eval": pc.sum(lengths.filter(pc.invert(train))).as_py() or 0,
        "learned": sum(int(pc.sum(learn.values).as_py() or 0) for learn in learned if learn is not None),
    }
    if not work.masked:
        notes["learned"] = notes["train"] + notes["eval"]
    schema = tokens_schema(ids.type.value_type, work.masked)
    content = arrow.encode(pa.table(columns, schema=schema), schema)
    work.guard.check()
    return Made([("tokens", content)], notes)


def parts_of(segments: pa.ListArray) -> Iterator[pa.ListArray]:
    """Yield the rows in parts of about PART_BYTES of text, at least one."""
    text = segments.values.field("text")
    reach = np.frombuffer(text.buffers()[1], np.int32)[text.offset :][segments.offsets.to_numpy()].astype(np.int64)
    begin = 0
    while begin == 0 or begin < len(segments):
        end = max(begin + 1, int(np.searchsorted(reach, reach[begin] + PART_BYTES, "right")) - 1)
        yield segments.slice(begin, end - begin)
        begin = end


def all_learned(ids: pa.ListArray) -> pa.ListArray:
    """Return the learn marks of documents of which all is learned."""
    return pa.ListArray.from_arrays(ids.offsets, pa.array(np.ones(len(ids.values), dtype=bool)))


def main(name: str) -> None:
    # Large buffers go back to the system once they are free, else 64 MB of English take 226 MiB and not 200.
    malloc.thresholds(mmap=8 * 2**20, trim=16 * 2**20)
    phase = read_params(f"sources.{name}", Source).phase
    marked, tokenizer = Path("data/marked", phase, name), Path("models/tokenizers", phase)
    with stage.run("tokenize_text", name, [str(marked), str(tokenizer)], [f"data/tokens/{phase}/{name}"]) as run:
        (folder,) = run.outputs
        manifest = arrow.manifest(marked)
        masked = manifest["counts"]["segments_not_learned"] > 0
        memo = Memo(Path(".memo") / run.name, run.recipe([run.digests[str(tokenizer)], masked]))
        paths = [marked / shard["name"] for shard in manifest["shards"] if shard["rows"]]
        guard = run.guards[str(marked)]
        work = (Work(path, guard.of([path]), tokenizer, masked) for path in paths)
        shards = ((run.files[str(marked)][one.path.name], one) for one in work)
        dtype = encoder(tokenizer).dtype
        run.guards[str(tokenizer)].check()
        # Beside gigatoken a process is worth its start from some 64 MB on.
        worth = len(paths) // 16 if encoder(tokenizer).fast.name == "gigatoken" else len(paths)
        workers = max(1, min(stage.workers(), worth))
        counts = Counter(train=0, eval=0, learned=0)
        with arrow.Shards(folder, tokens_schema(dtype, masked)) as out:
            done = memo.map(shards, tokenise_shard, workers, stage.die_with_parent)
            for result in run.progress(done, len(paths), "shards"):
                out.add(result.files["tokens"], result.notes["rows"], result.sha256["tokens"])
                counts.update({name: result.notes[name] for name in counts})
            run.balance("documents", manifest["counts"]["rows"], tokenised=out.rows)
            out.counts = dict(counts)
        memo.sweep()
        run.count(documents=out.rows, tokens=counts["train"] + counts["eval"], learned=counts["learned"])


if __name__ == "__main__":
    stage.cli(main, __doc__)
