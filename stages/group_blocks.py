"""Group the tokens of a phase into blocks of equal length, losing none.

Reads:  data/tokens/PHASE, models/tokenizers/PHASE
Writes: data/blocks/PHASE/train and data/blocks/PHASE/eval
        data/blocks/PHASE/grouping.json   what each source gave, and the parameters that say where it stands
        data/blocks/PHASE/left_out        what `long_documents: truncate` or `drop` left out, a row each time
Params: phases.PHASE.group_blocks

Example, block_size 4, documents [0 5 6 1] and [0 7 1] of one split, padding id 2:

    mode concat     0 5 6 1 0 7 1  ->  0 5 6 1 | 0 7 1 2      (manifest: 7 tokens, so the 2 is padding)
    mode line       each document in blocks of its own, here the same two, with `starts` [0 4] and [0 3]
    mode best_fit   whole documents together where they fit: documents of 3 and 1 share a block, `starts` [0 3 4]

concat is for text: one stream a split, only the last block has padding, and the manifest's `tokens` says where it
begins. line is for one example a block, best_fit (stages/packing.py) for conversations; there a document longer than a
block goes on in another one (or is cut or dropped, by parameter), `starts` holds the begin of each piece and, last, the
number of tokens. Padding has no loss.

Documents come by source name and row; with `weights` the train documents come again, in turns (document_turns.py).
Which block holds what follows from that order, the lengths in data/tokens and grouping.json: by cumulative sums for
concat, by `windows` and `packing.layout` for the other modes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

if __name__ == "__main__":  # before numpy is imported
    from kit.start import lean

    lean()

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from document_turns import Documents, documents, expected_tokens, nothing_learned, rule_of, windows
from kit import arrow, stage
from kit.params import phase_sources, read_params
from kit.tokenizer import Vocabulary
from packing import layout

LEFT_OUT = pa.schema(
    [
        pa.field("doc_id", pa.binary(16)),
        pa.field("split", pa.string()),
        pa.field("source", pa.string()),
        pa.field("rule", pa.string()),  # truncate, drop, or no_answer: cut, it would have nothing to learn
        pa.field("tokens", pa.uint32()),  # of the document
        pa.field("left_out", pa.uint32()),  # of these, not in a block
    ]
)


LongRule = Literal["split", "truncate", "drop"]


class Params(BaseModel):
    """`phases.PHASE.group_blocks`: the length of a block, what shares one, how often a source is shown."""

    model_config = ConfigDict(extra="forbid")

    block_size: int = Field(ge=8, le=2**20, description="tokens in a block")
    mode: Literal["concat", "best_fit", "line"] = Field(
        "concat", description="concat: one stream, cut; best_fit: whole documents, packed; line: one document a block"
    )
    last_block: Literal["pad", "drop"] = Field(
        "pad", description="concat only. pad: the last block is filled up; drop: its tokens are left out and counted"
    )
    long_documents: LongRule | dict[str, LongRule] = Field(
        "split",
        description="best_fit and line, a document longer than a block. split: it goes on in another; truncate: cut, "
        "its EOS is the last token, and left out where no answer is before that; drop: left out. What is left out is "
        "counted and listed. Or by source, e.g. {qa: truncate}; others are split",
    )
    weights: dict[str, Annotated[float, Field(gt=0, le=1000)]] = Field(
        {},
        description="times that the train documents of a source are shown in one pass over the blocks; "
        "1.5: all, and half of them again; 0.5: half of them; 1 when not named",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        if self.mode != "concat" and self.last_block == "drop":
            raise ValueError(f"last_block: drop is for mode concat; mode {self.mode} pads each block and drops nothing")
        if self.mode == "concat" and self.leaves_out:
            raise ValueError(
                f"long_documents: {self.long_documents} is for modes best_fit and line; mode concat cuts no document "
                "short, it goes on in the next block"
            )
        return self

    @property
    def leaves_out(self) -> bool:
        """Whether documents that are longer than a block are not split, of some source."""
        rules = self.long_documents
        return any(rule != "split" for rule in ([rules] if isinstance(rules, str) else rules.values()))


def blocks_schema(ids: pa.DataType, block_size: int, learn: bool, starts: bool = False) -> pa.Schema:
    """Return the schema of a blocks folder; `learn` and `starts` stand there only where they are needed."""
    columns = [("input_ids", pa.list_(ids, block_size))]
    columns += [("learn", pa.list_(pa.bool_(), block_size))] if learn else []
    columns += [("starts", pa.list_(pa.uint32()))] if starts else []
    return pa.schema(columns)


class Grouper:
    """Writes blocks of one length: tokens as a stream that is cut, or as pieces that stay together."""

    def __init__(self, out: arrow.Writer, block_size: int, pad: int) -> None:
        self.out, self.block_size, self.pad = out, block_size, pad
        self.dtype = out.schema.field("input_ids").type.value_type.to_pandas_dtype()
        self.marked = "learn" in out.schema.names
        self.tokens = 0  # in blocks
        self._ids, self._learn = np.array([], self.dtype), np.array([], bool)

    def stream(self, ids: np.ndarray, learn: np.ndarray | None) -> None:
        """Append tokens to the stream and write the blocks that are full; less than one block is kept back."""
        learn = np.ones(len(ids) if self.marked else 0, bool) if learn is None else learn
        head = (self.block_size - len(self._ids)) % self.block_size if len(self._ids) else 0
        if len(ids) < head:
            self._ids, self._learn = np.concatenate([self._ids, ids]), np.concatenate([self._learn, learn])
            return
        if head:
            self._write(np.concatenate([self._ids, ids[:head]]), np.concatenate([self._learn, learn[:head]]))
        end = len(ids) - (len(ids) - head) % self.block_size
        if end > head:
            self._write(ids[head:end], learn[head:end])  # from where it lies: no copy but the one into the file
        self._ids, self._learn = ids[end:].copy(), learn[end:].copy()
        self.tokens += end - head + (self.block_size if head else 0)

    def finish(self, last_block: str) -> int:
        """Pad or drop what is left of the stream; return the number of dropped tokens."""
        left = len(self._ids)
        if not left or last_block == "drop":
            return left
        ids = np.full(self.block_size, self.pad, self.dtype)
        ids[:left] = self._ids
        learn = np.zeros(self.block_size, bool)
        learn[: len(self._learn)] = self._learn
        self._write(ids, learn)
        self.tokens += left
        return 0

    def packed(self, window: Documents, mode: str) -> None:
        """Write documents as `packing.layout` places them."""
        begins = np.cumsum(window.lengths) - window.lengths
        document, start, length, block, place = layout(window.lengths, self.block_size, mode)
        blocks = int(block[-1]) + 1
        ids = np.full(blocks * self.block_size, self.pad, self.dtype)
        learn = np.zeros(blocks * self.block_size if self.marked else 0, bool)
        source, target = begins[document] + start, block * self.block_size + place
        for at, to, count in zip(source.tolist(), target.tolist(), length.tolist(), strict=True):
            ids[to : to + count] = window.ids[at : at + count]
            if self.marked:
                learn[to : to + count] = True if window.learn is None else window.learn[at : at + count]
        first = np.flatnonzero(place == 0)
        ends = np.append(first[1:], len(place)) - 1
        # The pieces of a block begin at their places, and one more number says where its padding begins.
        starts = np.insert(place, ends + 1, place[ends] + length[ends]).astype(np.uint32)
        offsets = np.append(first, len(place)) + np.arange(blocks + 1)
        self._write(ids, learn, pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(starts)))
        self.tokens += int(length.sum())

    def _write(self, ids: np.ndarray, learn: np.ndarray, starts: pa.Array | None = None) -> None:
        columns = [pa.FixedSizeListArray.from_arrays(pa.array(ids), self.block_size)]
        if self.marked:
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(learn), self.block_size))
        if starts is not None:
            columns.append(starts)
        self.out.write(pa.Table.from_arrays(columns, schema=self.out.schema))


class LeftOut:
    """Cuts documents longer than a block or takes them out, as `long_documents` says, and lists them each time."""

    def __init__(self, out: arrow.Writer | None, params: Params, eos: int) -> None:
        """`out` takes the list; with `split` nothing is left out and there is none."""
        self.out, self.params, self.block_size, self.eos = out, params, params.block_size, eos
        self.tokens = 0

    def __call__(self, found: Documents, split: str) -> Documents:
        """Return what goes into blocks of neighbouring documents of a source."""
        rule, long = rule_of(self.params.long_documents, found.source), found.lengths > self.block_size
        if self.out is None or rule == "split" or not long.any():
            return found
        gone = long
        if rule == "truncate":
            gone = long & nothing_learned(found.learn, found.lengths, self.block_size - 1)
        lengths = found.lengths[long]
        left_out = np.where(gone[long], lengths, lengths - self.block_size)
        self.tokens += int(left_out.sum())
        fixed = [pa.array([text] * len(lengths)) for text in (split, found.source)]
        why = ["drop" if rule == "drop" else "no_answer" if one else "truncate" for one in gone[long].tolist()]
        numbers = [pa.array(values.astype(np.uint32)) for values in (lengths, left_out)]
        columns = [found.doc_ids.filter(pa.array(long)), *fixed, pa.array(why), *numbers]
        self.out.write(pa.Table.from_arrays(columns, schema=LEFT_OUT))
        begins = np.cumsum(found.lengths) - found.lengths
        place = np.arange(len(found.ids)) - np.repeat(begins, found.lengths)
        kept = np.repeat(~gone, found.lengths) & (place < self.block_size)
        ids = found.ids[kept]
        # EOS takes the place and the mark of the token there: in an answer it is learned, in a question it is not.
        ids[(place == self.block_size - 1)[kept] & np.repeat(long, found.lengths)[kept]] = self.eos
        learn = None if found.learn is None else found.learn[kept]
        lengths = np.minimum(found.lengths, self.block_size)[~gone]
        return found._replace(doc_ids=found.doc_ids.filter(pa.array(~gone)), lengths=lengths, ids=ids, learn=learn)


def window_tokens(block_size: int) -> int:
    """Return how many tokens are packed at a time: blocks enough that the space left in the last ones is nothing."""
    return max(2**21, 256 * block_size)


class Shown(BaseModel):
    """What a source gives to a split: its documents and tokens, each counted as often as it is shown."""

    weight: float
    documents: int = 0
    tokens: int = 0


def group(folders: list[Path], split: str, params: Params, grouper: Grouper, left_out: LeftOut) -> dict[str, Shown]:
    """Write all blocks of `split`; return what each source gave, before anything was left out."""
    weights = params.weights if split == "train" else {}
    shown = {folder.name: Shown(weight=weights.get(folder.name, 1.0)) for folder in folders}

    def counted() -> Iterator[Documents]:
        for found in documents(folders, split, weights):
            shown[found.source].documents += len(found.lengths)
            shown[found.source].tokens += len(found.ids)
            yield left_out(found, split)

    if params.mode == "concat":
        for found in counted():
            grouper.stream(found.ids, found.learn)
        left_out.tokens += grouper.finish(params.last_block)
    else:
        for window in windows(counted(), window_tokens(params.block_size)):
            grouper.packed(window, params.mode)
    return shown


def main(phase: str) -> None:
    params = read_params(f"phases.{phase}.group_blocks", Params)
    tokens, tokenizer = Path("data/tokens", phase), Path("models/tokenizers", phase)
    with stage.run("group_blocks", phase, [str(tokens), str(tokenizer)], [f"data/blocks/{phase}"]) as run:
        (folder,) = run.outputs
        folders = [tokens / source for source in phase_sources(phase, tokens)]
        vocabulary = Vocabulary(tokenizer)
        eos = vocabulary.id(vocabulary.special["eos_token"])
        pad = vocabulary.id(vocabulary.special.get("pad_token", vocabulary.special["eos_token"]))
        manifests = [arrow.manifest(path) for path in folders]
        learn = any("learn" in manifest["schema"] for manifest in manifests)
        first = next(batch for path in folders for batch in arrow.batches(path))  # dedup may have left a source nothing
        ids = first.schema.field("input_ids").type.value_type
        schema = blocks_schema(ids, params.block_size, learn, starts=params.mode != "concat")
        grouping: dict[str, Any] = params.model_dump()
        listed = arrow.Writer(folder / "left_out", LEFT_OUT) if params.leaves_out else None
        for split in ("train", "eval"):
            out, left_out = arrow.Writer(folder / split, schema), LeftOut(listed, params, eos)
            grouper = Grouper(out, params.block_size, pad)
            shown = group(folders, split, params, grouper, left_out)
            grouping[split] = {name: one.model_dump() for name, one in shown.items()}
            n_documents = sum(one.documents for one in shown.values())
            out.close(tokens=grouper.tokens, dropped_tokens=left_out.tokens, documents=n_documents)
            expected = 0
            for path, manifest in zip(folders, manifests, strict=True):
                once, tokens_shown = expected_tokens(path, split, shown[path.name].weight)
                run.balance(f"{split} tokens of {path.name}", manifest["counts"][split], found=once)
                expected += tokens_shown
            run.balance(f"{split} tokens", expected, kept=grouper.tokens, dropped=left_out.tokens)
            if not out.rows or (split == "train" and grouper.tokens + left_out.tokens < params.block_size):
                key = "long_documents" if listed else "last_block"
                beside = f" beside {left_out.tokens:,} that `{key}` leaves out" if left_out.tokens else ""
                how = "raise" if listed and left_out.tokens else "lower"
                raise SystemExit(
                    f"phase {phase}: the {split} split has {grouper.tokens:,} tokens{beside}, too few for a block of "
                    f"{params.block_size:,}; {how} phases.{phase}.group_blocks.block_size or add text"
                    f"{f', or change `{key}`' * bool(beside)}."
                )
            padding = out.rows * params.block_size - grouper.tokens
            run.count(**{f"{split}_blocks": out.rows, f"{split}_tokens": grouper.tokens, f"{split}_padding": padding})
            if left_out.tokens:
                run.count(**{f"{split}_left_out": left_out.tokens})
            if split == "train" and params.weights:
                run.count(**{f"{name}_tokens": one.tokens for name, one in shown.items()})
        if listed:
            listed.close()
        arrow.write_json(folder / "grouping.json", grouping)


if __name__ == "__main__":
    stage.cli(main, __doc__)
