"""Find the documents that hold an item of a benchmark: a run of its words, or the whole of a short one.

    data/benchmarks/quiz.jsonl, line 7    {"question": "Which of the two rivers ... is the longer one?", ...}
    a document                            "... Someone asked: which of the two rivers ... is the longer one ..."
    evidence                              data/benchmarks/quiz.jsonl line 7: which of the two rivers ... is the long

Text is read as units: a word is one, and so is a Chinese character (stages/text_units.py says it all); case and
punctuation do not count. A run of 13 words in common is contamination, as for GPT-3 (Brown et al., 2020, appendix C);
of an item with more characters than words, 20, which say as much: in 1,000 instructions each, xz needs 13.9 bits for a
word and 9.1 for a character. A shorter item must be there as a whole, and must have 8 units: fewer say nothing. Every
hit of a hash is compared with the text before it counts. No rule of `clean` has read the benchmark, so an item is
looked for as it is and as `clean` may have left a copy of it: without invisible characters, in NFC, NFD, NFKC.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

import text_units

Array = npt.NDArray[Any]
FOLDER = Path("data/benchmarks")
WORDS, CHARACTERS = 13, 20  # units in a run that is no accident
SHORTEST = 8  # units; every longer run is looked up by its first 8
EVIDENCE_CHARS = 80
# Soft hyphen, zero width space, word joiner, BOM, bidi marks: within a word, where they would cut it in two.
INVISIBLE = re.compile("[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]")


class Params(BaseModel):
    """A benchmark: the file of that name, .jsonl or .txt (an item a line), in data/benchmarks."""

    model_config = ConfigDict(extra="forbid")

    fields: list[str] = Field(
        ["text"], min_length=1, description="jsonl only: the fields that are looked for, each by itself, e.g. question"
    )
    ngram: int = Field(WORDS, ge=SHORTEST, le=64, description="words in a run that is contamination")
    character_ngram: int = Field(
        CHARACTERS,
        ge=SHORTEST,
        le=64,
        description="the same in characters, for items mostly in Chinese, Japanese, Thai ...",
    )


class Item(NamedTuple):
    """A text of a benchmark that no document may hold."""

    benchmark: str
    place: str  # file and line
    text: str
    run: int  # units in a row that are contamination


class Hit(NamedTuple):
    """Why a document goes."""

    benchmark: str
    evidence: str


def read(name: str, params: Params) -> Iterator[Item]:
    """Yield the items of a benchmark, those of fewer than SHORTEST units with run 0."""
    paths = [path for suffix in (".jsonl", ".txt") if (path := FOLDER / f"{name}{suffix}").is_file()]
    if len(paths) != 1:
        found = f"there are {paths[0]} and {paths[1]}: keep one" if paths else "neither is there: put one there"
        raise SystemExit(f"the benchmark `{name}` is {FOLDER}/{name}.jsonl or .txt; {found}.")
    for number, raw in enumerate(paths[0].read_bytes().splitlines(), start=1):
        place = f"{paths[0]} line {number}"
        try:
            line = raw.decode("utf-8-sig").strip()
            row = json.loads(line) if line and paths[0].suffix == ".jsonl" else line
            json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair has no units
        except (ValueError, RecursionError) as error:
            raise SystemExit(f"{place} cannot be read ({error}); mend the line.") from None
        for text in [row] if isinstance(row, str) else _texts(row, params.fields, place, name):
            units, _ = text_units.spans(text)
            characters = sum(text_units.stands_alone(unit) for unit in units)
            whole = params.character_ngram if characters > len(units) / 2 else params.ngram
            if units:
                yield Item(name, place, text, min(whole, len(units)) if len(units) >= SHORTEST else 0)


def forms(item: Item) -> Iterator[Item]:
    """Yield an item as it is, and as `clean` may have left a copy of it, where that is another text."""
    number = len(text_units.spans(item.text)[0])
    visible = INVISIBLE.sub("", item.text)
    normal: list[Any] = ["NFC", "NFD", "NFKC"]
    for text in dict.fromkeys([item.text, *(unicodedata.normalize(form, visible) for form in normal)]):
        units = number if text == item.text else len(text_units.spans(text)[0])
        run = units if item.run == number else min(item.run, units)  # of a short item all of it
        if units >= SHORTEST:
            yield item._replace(text=text, run=run)


def _texts(row: Any, fields: list[str], place: str, name: str) -> list[str]:
    """Return the named fields of a row."""
    if not isinstance(row, dict):
        raise SystemExit(f"{place} is JSON but not an object with named fields; mend the line.")
    for field in fields:
        if not isinstance(row.get(field), str):
            raise SystemExit(
                f"{place} has no text in the field `{field}`; its fields are {', '.join(row)}: "
                f"name those to look for in decontaminate.{name}.fields."
            )
    return [row[field] for field in fields]


class Index:
    """The runs of all items, to be looked up by hash and confirmed in the text."""

    def __init__(self, items: list[Item]) -> None:
        self.items = [form for item in items if item.run for form in forms(item)]
        rows: dict[int, list[int]] = {}
        for row, item in enumerate(self.items):
            rows.setdefault(item.run, []).append(row)
        self._known: dict[int, tuple[Array, Array, Array]] = {}  # by length of run: keys uint64, sorted; item; place
        first = [np.zeros(0, np.uint32)]
        for run, owners in sorted(rows.items()):
            keys, of, place = self._of_length(run, owners)
            order = np.lexsort((place, of, keys))
            order = order[np.append(True, keys[order][1:] != keys[order][:-1])]  # each run once, of the first item
            self._known[run] = (keys[order], of[order], place[order])
            first.append((keys >> np.uint64(32)).astype(np.uint32))
        self._first = np.unique(np.concatenate(first))
        # True for at most one hash in 64: a look here is ten times as fast as one into the sorted list.
        self._shift = np.uint32(32 - min(max(len(self._first).bit_length() + 6, 16), 26))
        self._table = np.zeros(2 ** (32 - int(self._shift)), bool)
        self._table[self._first >> self._shift] = True

    def _of_length(self, run: int, owners: list[int]) -> tuple[Array, Array, Array]:
        """Return the key of each run of this length in these items, the item, and the unit where it begins."""
        keys, items, places = [], [], []
        row = 0
        texts = pa.array([self.items[owner].text for owner in owners], pa.string())
        for _, units, counts in text_units.pieces(texts):
            begin = np.cumsum(counts) - counts
            number = counts - run + 1
            place = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
            start = np.repeat(begin, number) + place
            keys.append(run_keys(units, start, run))
            items.append(np.repeat(owners[row : row + len(counts)], number))
            places.append(place)
            row += len(counts)
        return np.concatenate(keys), np.concatenate(items), np.concatenate(places)

    def find(self, units: Array, counts: Array, texts: pa.Array) -> Iterator[tuple[int, Hit]]:
        """Yield the documents of a piece that hold an item: place in the piece, and the first item.

        units, counts: see text_units.pieces. texts: of these documents, in order; more may follow.
        """
        if not self.items:
            return
        documents, *columns = self._candidates(units, counts)
        edges = np.flatnonzero(np.append(True, documents[1:] != documents[:-1])[: len(documents)])
        for begin, end in itertools.pairwise([*edges.tolist(), len(documents)]):
            text = texts[int(documents[begin])].as_py()
            hit = self._confirm(text, zip(*(column[begin:end].tolist() for column in columns), strict=True))
            if hit:
                yield int(documents[begin]), hit

    def _candidates(self, units: Array, counts: Array) -> tuple[Array, Array, Array, Array]:
        """Return (document, item, place in the item, place in the document) of each known run in a piece of documents.

        Sorted by document, then item.
        """
        edges = np.append(0, np.cumsum(counts))
        whole = len(units) - SHORTEST + 1
        found: list[tuple[Array, ...]] = [(np.zeros(0, np.int64),) * 4]
        start = np.zeros(0, np.int64)
        if whole > 0:
            hashes = text_units.whole_runs(units, SHORTEST)
            start = np.flatnonzero(self._table.take(hashes >> self._shift, mode="clip"))
            known = self._first.take(np.searchsorted(self._first, hashes[start]), mode="clip")
            start = start[known == hashes[start]]
        document = np.searchsorted(edges, start, "right") - 1
        for run, (known, item, place) in self._known.items():
            inside = start + run <= edges[document + 1]
            begin, of = start[inside], document[inside]
            keys = run_keys(units, begin, run)
            at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
            hit = known[at] == keys
            found.append((of[hit], item[at[hit]], place[at[hit]], (begin - edges[of])[hit]))
        columns = [np.concatenate(column) for column in zip(*found, strict=True)]
        order = np.lexsort((columns[3], columns[1], columns[0]))
        return tuple(column[order] for column in columns)  # type: ignore[return-value]

    def _confirm(self, text: str, candidates: Iterable[tuple[int, ...]]) -> Hit | None:
        """Return the first candidate (item, place in the item, place in the text) that is no accident of the hash."""
        units, places = text_units.spans(text)
        for row, there, here in candidates:
            item = self.items[row]
            if units[here : here + item.run] == text_units.spans(item.text)[0][there : there + item.run]:
                begin, end = places[here][0], places[here + item.run - 1][1]
                said = text.encode("utf-16-le")[2 * begin : 2 * end].decode("utf-16-le", "ignore")
                return Hit(item.benchmark, f"{item.place}: {' '.join(said.split())[:EVIDENCE_CHARS]}")
        return None


def run_keys(units: Array, starts: Array, run: int) -> Array:
    """Return a hash of the run that begins at each of these units, uint64: of its first SHORTEST units, and of all."""
    first, whole = (text_units.run_hashes(units, starts, number) for number in (SHORTEST, run))
    return first.astype(np.uint64) << np.uint64(32) | whole
