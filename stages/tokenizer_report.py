"""The part of train_tokenizer that measures: how well a tokenizer fits the text of each source.

It reads a sample of each source (see `Sample`), of a long text the beginning, one batch at a time, and keeps one count
for each entry, so its memory grows neither with the corpus nor with the largest document.

    "the cat 猫は" in 7 tokens: 14 bytes -> 2 bytes per token; 2 words and 2 characters -> fertility 1.75
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from kit import arrow
from kit.tokenizer import UNICODE_TO_BYTE
from rule_base import UNITS

BATCH = 64  # documents read, and texts encoded, at once
CHARACTERS = 2**20  # of a text that are measured, and of texts encoded at once; `tokenizers` takes some 100 bytes each
LONGEST, UNUSED = 20, 100


class Sample:
    """A part of documents that their content alone decides: those of the lowest ids until `size` bytes are reached.

    doc_id is a hash of the content, so neither the order nor the neighbours of a document decide, and the draw is even.
    """

    def __init__(self, size: int | None) -> None:
        self.size = size
        self._heap: list[tuple[bytes, int]] = []  # the greatest id first: see _turned
        self._bytes = 0
        self.limit: bytes | None = None  # ids up to this one are in the sample, None: all

    def offer(self, doc_id: bytes, n_bytes: int) -> None:
        """Tell of a document. All are to be told of before `holds` is asked."""
        if self.size is None or (self.limit is not None and doc_id >= self.limit):
            return
        heapq.heappush(self._heap, (_turned(doc_id), n_bytes))
        self._bytes += n_bytes
        while self._bytes - self._heap[0][1] >= self.size:
            turned, gone = heapq.heappop(self._heap)
            self._bytes -= gone
            self.limit = _turned(turned)  # and none after it

    def holds(self, doc_id: bytes) -> bool:
        """Return whether the document is in the sample."""
        return self.limit is None or doc_id < self.limit


def _turned(doc_id: bytes) -> bytes:
    return bytes(255 - byte for byte in doc_id)


def documents(clean: Path, dedup: Path, splits: tuple[str, ...]) -> Iterator[tuple[bytes, list[str]]]:
    """Yield doc_id and texts of the documents of one source: its text, or what each side of the conversation says."""
    decided = arrow.table(dedup, ["split"])["split"]
    first = 0
    for whole in arrow.batches(clean / "documents"):
        column = "text" if "text" in whole.schema.names else "messages"
        for start in range(0, whole.num_rows, BATCH):
            batch = whole.slice(start, BATCH)
            chosen = decided.slice(first + start, batch.num_rows).to_pylist()
            rows = (batch["doc_id"].to_pylist(), batch[column].to_pylist(), chosen)
            for doc_id, content, split in zip(*rows, strict=True):
                if split in splits:
                    yield doc_id, [content] if column == "text" else [message["content"] for message in content]
        first += whole.num_rows


def drawn(
    sources: list[tuple[Path, Path]], splits: tuple[str, ...], size: int | None
) -> Iterator[tuple[bytes, list[str]]]:
    """Yield the documents of a sample of `size` bytes (None: all) of the sources, given as clean and dedup folders."""
    sample = Sample(size)
    if size is not None:
        for clean, dedup in sources:
            for doc_id, texts in documents(clean, dedup, splits):
                sample.offer(doc_id, sum(len(text.encode("utf-8")) for text in texts))
    for clean, dedup in sources:
        for doc_id, texts in documents(clean, dedup, splits):
            if sample.holds(doc_id):
                yield doc_id, texts


def units(text: str) -> int:
    """Return the number of words, and of characters where words have no spaces between them.

    >>> units("the cat 猫は!")
    4
    """
    return sum(1 for _ in UNITS.finditer(text))


class Report:
    """What is measured of one tokenizer, source by source."""

    def __init__(self, tokenizer: Tokenizer, reference: Tokenizer | None) -> None:
        self.tokenizer, self.reference = tokenizer, reference
        for each in (tokenizer, reference):
            if each:
                each.encode_special_tokens = True  # as tokenize_text reads plain text
                each.no_truncation()
                each.no_padding()
        ids = tokenizer.get_vocab(with_added_tokens=True).values()
        self.used = np.zeros(max(ids, default=0) + 1, np.int64)
        self.sources: dict[str, dict[str, Any]] = {}
        self.failures: list[str] = []  # the first few doc_ids whose text does not come back
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        self.special = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self.special_in_text: list[str] = []  # the first few special tokens that stand in texts, with the doc_id

    def read(self, source: str, rows: Iterator[tuple[bytes, list[str]]]) -> None:
        """Measure the documents (doc_id, texts) of a source."""
        totals = dict.fromkeys(("documents", "bytes", "units", "tokens", "reference", "failures", "special"), 0)
        waiting: list[tuple[bytes, str]] = []
        for doc_id, texts in rows:
            totals["documents"] += 1
            for text in texts:
                waiting.append((doc_id, text[:CHARACTERS]))
                if len(waiting) >= BATCH or sum(len(text) for _, text in waiting) >= CHARACTERS:
                    self._measure(waiting, totals)
                    waiting = []
        self._measure(waiting, totals)
        tokens = totals["tokens"]
        self.sources[source] = {
            "documents": totals["documents"],
            "bytes": totals["bytes"],
            "tokens": tokens,
            "bytes_per_token": _ratio(totals["bytes"], tokens),
            "fertility": _ratio(tokens, totals["units"]),
            **({"reference_bytes_per_token": _ratio(totals["bytes"], totals["reference"])} if self.reference else {}),
            "round_trip_failures": totals["failures"],
            "texts_with_special_tokens": totals["special"],
        }

    def _measure(self, rows: list[tuple[bytes, str]], totals: dict[str, int]) -> None:
        texts = [text for _, text in rows]
        encoded = [one.ids for one in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        decoded = self.tokenizer.decode_batch(encoded, skip_special_tokens=False)
        for (doc_id, text), ids, back in zip(rows, encoded, decoded, strict=True):
            self.used += np.bincount(np.array(ids, np.int64), minlength=len(self.used))
            totals["tokens"] += len(ids)
            totals["bytes"] += len(text.encode("utf-8"))
            totals["units"] += units(text)
            if found := self.special.search(text):
                totals["special"] += 1
                self.special_in_text = [*self.special_in_text, f"{found[0]!r} in document {doc_id.hex()}"][:3]
            if text != back:
                totals["failures"] += 1
                self.failures = list(dict.fromkeys([*self.failures, doc_id.hex()]))[:3]
        if self.reference:
            totals["reference"] += sum(map(len, self.reference.encode_batch_fast(texts, add_special_tokens=False)))

    def result(self) -> dict[str, Any]:
        """Return the whole report; lists stay out of the table of `dvc metrics show`."""
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        added = {token.content for token in self.tokenizer.get_added_tokens_decoder().values()}
        pieces = [(text, number) for text, number in vocabulary.items() if text not in added]
        unused = [(text, number) for text, number in sorted(pieces, key=itemgetter(1)) if not self.used[number]]
        shown = [number for text, number in unused if text not in UNICODE_TO_BYTE]  # any text must be spelt: no waste
        longest = heapq.nsmallest(LONGEST, pieces, key=lambda piece: (-len(piece[0]), piece[1]))
        total = {name: sum(row[name] for row in self.sources.values()) for name in ("bytes", "tokens")}
        return {
            "vocabulary": len(vocabulary),
            "unused": len(unused),
            "unused_share": round(len(unused) / max(1, len(pieces)), 6),
            "bytes_per_token": _ratio(total["bytes"], total["tokens"]),
            "round_trip_failures": sum(row["round_trip_failures"] for row in self.sources.values()),
            "texts_with_special_tokens": sum(row["texts_with_special_tokens"] for row in self.sources.values()),
            "sources": [{"source": name, **row} for name, row in sorted(self.sources.items())],
            "longest": [self._spelt(number) for _, number in longest],
            "unused_entries": [self._spelt(number) for number in shown[:UNUSED]],
        }

    def _spelt(self, number: int) -> str:
        spelt: str = self.tokenizer.decode([number], skip_special_tokens=False)
        return spelt


def _ratio(above: int, below: int) -> float:
    return round(above / below, 6) if below else 0.0
