"""Find which documents a text was written off from: verbatim runs of at least 16 units, longest first.

    "... and the cat sat on the mat, ... (16 words of a document) ..."
    ->   [{"units": 19, "text": "the cat sat on ...", "status": "trained", "documents": 1, "file": ..., "line": 12}]

A unit is a word, or one character of a script without spaces; case, punctuation and white space do not count (as in
stages/text_units.py). Of each document the hashes of 8 units in a row are winnowed: of any 9 that follow each
other the least is kept (Schleimer, Wilkerson and Aiken, "Winnowing", 2003), so that two texts that share 16 units share
at least one fingerprint. What a fingerprint finds is compared with the document itself before it counts, and no match
goes beyond a document's end. All documents are looked at, also those that dedup dropped: what stands in them alone is
reported as dropped. What clean dropped is no document; `why` knows it.

The index lies in .work/lineage/fingerprints, a file for each shard of about 4 MB of documents, named after the ids of
its documents, which are hashes of their content, and the code: a new document costs its own shard.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import multiprocessing
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from lineage.folders import Array, Columns, code
from lineage.questions import Answer, Lineage, Source
from text_units import pieces, spans, texts_of, unit_hashes, whole_runs

RUN, WINDOW = 8, 9
SHORTEST = RUN + WINDOW - 1  # units that two texts must share to be found in any case
BYTES = 4.25  # of a fingerprint in the index; see `_build`
ENOUGH = 4  # fingerprints that a document must share to be read
CANDIDATES = 2000  # documents that `trace` compares with the text, those with the most common fingerprints first


def fingerprints(texts: pa.Array) -> tuple[Array, Array]:
    """Return the winnowed hashes of the texts and their rows, each pair once, sorted: uint32 both.

    >>> hashes, rows = fingerprints(pa.array(["a b c", " ".join("abcdefghijklmnopq")]))
    >>> len(hashes), set(rows.tolist())
    (2, {1})
    """
    pairs = [np.zeros(0, np.uint64)]
    for row, units, counts in pieces(texts):
        if len(units) < SHORTEST:
            continue
        hashes, ends = whole_runs(units, RUN), np.cumsum(counts)
        # A window lies in one document.
        inside = np.arange(SHORTEST, len(units) + 1) <= np.repeat(ends, counts)[: len(units) - SHORTEST + 1]
        least = _least(hashes)[inside]
        places = least[np.diff(least, prepend=-1) > 0]  # they ascend
        rows = row + np.searchsorted(ends, places, side="right")
        pairs.append(hashes[places].astype(np.uint64) << np.uint64(32) | rows.astype(np.uint64))
    found = np.unique(np.concatenate(pairs))
    return (found >> np.uint64(32)).astype(np.uint32), found.astype(np.uint32)


def _least(hashes: Array) -> Array:
    """Return the place of the least hash of each window, of equal ones the first: int64 (len(hashes) - WINDOW + 1,).

    >>> _least(np.array([3, 1, 2, 1, 5, 5, 5, 5, 5, 5, 5], np.uint32)).tolist()
    [1, 1, 3]
    """
    keys = hashes.astype(np.uint64) << np.uint64(32) | np.arange(len(hashes), dtype=np.uint64)
    width = 1
    while width < WINDOW:
        step = min(width, WINDOW - width)
        keys = np.minimum(keys[:-step], keys[step:])
        width += step
    return keys.astype(np.uint32).astype(np.int64)


class Shard(NamedTuple):
    """Neighbouring documents of a source."""

    first: int  # row
    last: int
    path: Path


class Index:
    """The fingerprints of one source's documents, built where they are missing."""

    def __init__(self, source: Source, workers: int) -> None:
        self.source = source
        self.folder = source.lineage.root / ".work/lineage/fingerprints"
        self.shards = list(self._shards())
        missing = [shard for shard in self.shards if not shard.path.is_file()]
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)
            work = [(source.documents.path, source.documents.cache.root, *shard) for shard in missing]
            if workers > 1 and len(missing) > 1:
                with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
                    list(pool.map(_build, work))
            else:
                list(map(_build, work))

    def _shards(self) -> Iterator[Shard]:
        found = self.source.documents.index("shards", self._ends)
        ends = found["end"].tolist()
        for first, last, digest in zip([0, *ends], ends, found["digest"], strict=False):
            yield Shard(first, last, self.folder / digest.tobytes().hex())

    def _ends(self) -> Columns:
        """Return where the shards of the documents end, and the digests of the ids in them."""
        folder, digests = self.source.documents, []
        ends = np.cumsum([shard["rows"] for shard in folder.manifest["shards"]])
        for first, last in zip([0, *ends], ends, strict=False):
            digest = hashlib.sha256(code())
            for batch, begin, end in _parts(folder, int(first), int(last)):
                digest.update(memoryview(batch["doc_id"].buffers()[1])[16 * begin : 16 * end])
            digests.append(digest.digest()[:16])
        return {"end": ends, "digest": np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)}

    def candidates(self, hashes: Array) -> Iterator[tuple[int, int]]:
        """Yield (row, fingerprints in common) of the documents that share fingerprints with a text."""
        for shard in self.shards:
            found = look_up(shard.path, hashes)
            if not len(found):
                continue
            rows, counts = np.unique(found, return_counts=True)
            yield from zip((rows + shard.first).tolist(), counts.tolist(), strict=True)

    def size(self) -> int:
        return sum(shard.path.stat().st_size for shard in self.shards)


def _parts(folder: Any, first: int, last: int) -> Iterator[tuple[pa.RecordBatch, int, int]]:
    """Yield the batches that hold the rows from `first` to before `last`, and which rows of them do."""
    at = folder.batch_of(first) if last > first else 0
    while first < last:
        begin, end = (int(n) for n in folder.starts[at : at + 2])
        yield folder.batch(at), first - begin, min(last, end) - begin
        first, at = end, at + 1


def _build(work: tuple[Path, Path, int, int, Path]) -> None:
    """Write the fingerprints of a shard: a directory by the first bits of the hash, the next 16 bits, and the rows.

    16 rows share an entry of the directory, so a fingerprint takes 2 + 2 + 1/4 bytes, 2 more where rows need 32 bits.
    """
    from lineage.folders import Cache, Folder

    path, root, first, last, target = work
    folder = Folder(path, Cache(root))
    texts = []
    for batch, begin, end in _parts(folder, first, last):
        texts.append(texts_of(batch.slice(begin, end - begin)))
    hashes, rows = fingerprints(pa.chunked_array(texts, pa.string()))
    bits = max(0, int(len(hashes) // 16).bit_length() - 1)
    directory = np.searchsorted(
        hashes >> np.uint32(32 - bits) if bits else np.zeros_like(hashes), np.arange(2**bits + 1)
    )
    rest = (hashes << np.uint32(bits) >> np.uint32(16)).astype(np.uint16)
    narrow = last - first <= 2**16
    head = np.array([len(hashes), bits, narrow, 0], np.uint32)
    content = [head, directory.astype(np.uint32), rows.astype(np.uint16 if narrow else np.uint32), rest]
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    temporary.write_bytes(b"".join(part.tobytes() for part in content))
    temporary.replace(target)


@functools.lru_cache(maxsize=4096)
def _open(path: Path) -> tuple[int, Array, Array, Array]:
    """Return the bits, the directory, the rows and the rest of a shard's hashes, mapped."""
    with path.open("rb") as file:
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    size, bits, narrow, _ = (int(n) for n in data[:16].view(np.uint32))
    directory = data[16 : 16 + 4 * (2**bits + 1)].view(np.uint32)
    at, width = 16 + directory.nbytes, 2 if narrow else 4
    rows = data[at : at + width * size].view(np.uint16 if narrow else np.uint32)
    return bits, directory, rows, data[at + width * size :].view(np.uint16)


def look_up(path: Path, hashes: Array) -> Array:
    """Return the rows of a shard that have fingerprints with these hashes, as often as they have them."""
    bits, directory, rows, rest = _open(path)
    found = [np.zeros(0, np.int64)]
    for number in np.unique(hashes).tolist():
        bucket = number >> (32 - bits) if bits else 0
        begin, end = int(directory[bucket]), int(directory[bucket + 1])
        same = rest[begin:end] == (number << bits & 0xFFFFFFFF) >> 16
        found.append(rows[begin:end][same].astype(np.int64))
    return np.concatenate(found)


class Span(NamedTuple):
    """A run of units that a text and a document share."""

    begin: int  # units of the text
    end: int
    start: int  # first unit in the document
    source: Source
    row: int


def matches(text: list[bytes], document: list[bytes]) -> Iterator[tuple[int, int, int]]:
    """Yield begin and end in the text and begin in the document of the longest common runs, of SHORTEST units or more.

    >>> list(matches(list(b"xabcdefghijklmnopqy"), list(b"zzabcdefghijklmnopqz")))
    [(1, 18, 2)]
    """
    places: dict[tuple[bytes, ...], list[int]] = defaultdict(list)
    for at in range(len(text) - SHORTEST + 1):
        places[tuple(text[at : at + SHORTEST])].append(at)
    if not places:
        return
    done: dict[int, int] = {}  # diagonal: where its last match ended in the document
    for at in range(len(document) - SHORTEST + 1):
        for begin in places.get(tuple(document[at : at + SHORTEST]), ()):
            if done.get(at - begin, -1) > at:
                continue
            length = SHORTEST
            while (
                begin + length < len(text)
                and at + length < len(document)
                and text[begin + length] == document[at + length]
            ):
                length += 1
            done[at - begin] = at + length
            yield begin, begin + length, at


Runs = dict[tuple[int, int, str], list[Span]]  # begin and end in the text, split of the documents


def trace(lineage: Lineage, text: str, phase: str | None = None, limit: int = 20, workers: int = 1) -> list[Answer]:
    """Return the runs of a text that stand in documents, the longest first; see the top of this file.

    `phase`: only the documents of this phase and of those it goes on from. A run that lies within a longer one is left
    out, but for one that was trained on within one that was dropped. A text of fewer than SHORTEST units has no run.
    """
    candidates = candidates_of(lineage, text, phase, workers)
    if len(candidates) > CANDIDATES:
        print(
            f"{len(candidates):,} documents may share a run with it; the {CANDIDATES:,} that share most were compared.",
            file=sys.stderr,
        )
    return answers(text, runs_of(text, candidates[:CANDIDATES]), limit)


def candidates_of(lineage: Lineage, text: str, phase: str | None = None, workers: int = 1) -> list[tuple[Source, int]]:
    """Return the documents that may share a run with a text, those with the most common fingerprints first."""
    if len(spans(text)[0]) < SHORTEST:
        return []
    hashes = np.unique(whole_runs(unit_hashes(text), RUN))
    found: list[tuple[int, Source, int]] = []
    for source in lineage.sources if phase is None else _sources(lineage, phase):
        found += [(count, source, row) for row, count in Index(source, workers).candidates(hashes)]
    found.sort(key=lambda one: (-one[0], one[1].phase, one[1].name, one[2]))
    return [(source, row) for _, source, row in found]


def runs_of(text: str, candidates: list[tuple[Source, int]], dropped: bool = True) -> Runs:
    """Return all runs of a text with the documents that hold them; `dropped`: also those that dedup dropped."""
    units = spans(text)[0]
    runs: Runs = defaultdict(list)
    for source, row in candidates:
        split = str(source.decisions.row(row)["split"])
        if dropped or split != "dropped":
            for begin, end, start in matches(units, spans(content_of(source, row))[0]):
                runs[begin, end, split].append(Span(begin, end, start, source, row))
    return runs


def answers(text: str, runs: Runs, limit: int) -> list[Answer]:
    """Return the longest runs, without those that lie within one that says as much."""
    places = spans(text)[1]
    chosen = sorted(runs, key=lambda key: (key[0] - key[1], key[0], {"train": 0, "eval": 1}.get(key[2], 2)))
    found: list[Answer] = []
    taken: list[tuple[int, int, str]] = []
    for begin, end, split in chosen:
        better = {"train": ("train",), "eval": ("train", "eval"), "dropped": ("train", "eval", "dropped")}[split]
        if any(a <= begin and end <= b and other in better for a, b, other in taken):
            continue
        taken.append((begin, end, split))
        found.append(_answer(text, places, runs[begin, end, split], split))
        if len(found) == limit:
            break
    return found


_index = functools.lru_cache(maxsize=64)(Index)  # of a source, which is as long-lived as the question


def holding(source: Source, text: str, workers: int = 1) -> Iterator[int] | None:
    """Yield the documents that hold a text and may be found by its fingerprints; None: it is too short for that.

    Its first and last unit may be parts of longer ones. A document that holds the others has all their fingerprints.
    """
    places = spans(text)[1][1:-1]
    if len(places) < SHORTEST:
        return None
    # Half a character beyond U+FFFF may stay at an end: left out, as the unit that it was.
    inner = text.encode("utf-16-le")[2 * places[0][0] : 2 * places[-1][1]].decode("utf-16-le", "ignore")
    if len(spans(inner)[0]) < SHORTEST:
        return None
    own = np.unique(fingerprints(pa.array([inner]))[0])[:ENOUGH]
    return (row for row, count in _index(source, workers).candidates(own) if count >= len(own))


def _sources(lineage: Lineage, phase: str) -> list[Source]:
    wanted = [phase, *(name for name in lineage.phases if phase in lineage.descendants(name))]
    lineage.phase(phase)
    return [source for source in lineage.sources if source.phase in wanted]


def content_of(source: Source, row: int) -> str:
    """Return what a document says: its text, or its messages a line each."""
    document = source.documents.row(row)
    return str(document["text"]) if "text" in document else "\n".join(m["content"] for m in document["messages"])


def _answer(text: str, places: list[tuple[int, int]], found: list[Span], split: str) -> Answer:
    """Return a run with the first of the documents that hold it."""
    first = min(found, key=lambda span: (span.source.phase, span.source.name, span.row))
    utf16 = text.encode("utf-16-le")
    words = utf16[2 * places[first.begin][0] : 2 * places[first.end - 1][1]].decode("utf-16-le", "replace")
    document = first.source.documents.row(first.row)
    content = content_of(first.source, first.row)
    before = content.encode("utf-16-le")[: 2 * spans(content)[1][first.start][0]].decode("utf-16-le", "replace")
    unit = first.source.about["unit"]
    # In JSON a line break of the text is none of the file, and one of a page is none of its HTML.
    in_lines = "text" in document and first.source.about["format"] in ("text", "csv", "tsv")
    line = document["number"] + (before.count("\n") if in_lines else 0)
    status = {"train": "in the training text", "eval": "held out, not trained", "dropped": "dropped, not trained"}[
        split
    ]
    if split == "train":
        status = str(first.source.lineage.document(first.source, first.row)["verdict"])
    return {
        "units": first.end - first.begin, "text": words, "status": status,
        "documents": len({(span.source.name, span.source.phase, span.row) for span in found}),
        "phase": first.source.phase, "source": first.source.name, "file": first.source.path(document["file"]),
        unit: line, "doc_id": document["doc_id"].hex(),
    }  # fmt: skip


def generated(root: Path, phase: str, prompt: str, tokens: int) -> str:
    """Return what the merged model of a phase writes behind a prompt, always its likeliest token."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = root / "models" / phase / "merged"
    if not (folder / "config.json").is_file():
        raise SystemExit(f"{folder} is not there; train phase {phase} first.")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from generation import prompt_ids, tokenizer_of, write
    from kit.model import device, max_positions, objective

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if objective(folder) == "mlm":
        raise SystemExit(f"{folder} is a masked model, which writes no text; give trace a text.")
    tokenizer, model = tokenizer_of(folder), AutoModelForCausalLM.from_pretrained(folder).to(device())
    ids = prompt_ids(prompt, tokenizer)
    room = (max_positions(model) or len(ids) + tokens) - len(ids)
    if room < 1:
        raise SystemExit(f"the prompt has {len(ids)} tokens, for which {folder} has no room; give a shorter one.")
    return write(model, tokenizer, [ids], min(tokens, room))[0]
