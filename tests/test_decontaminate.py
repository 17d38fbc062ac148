"""decontaminate: a document that holds an item of a benchmark is found, named by file and line, and no other is."""

from __future__ import annotations

import itertools
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import text_units
from changing_rules import ControlCharactersRule, UnicodeRule
from conftest import write
from decontaminate import EVIDENCE_CHARS, SHORTEST, Hit, Index, Item, Params, read

WORDS = [f"w{number}" for number in range(40)]
CHARACTERS = [chr(0x4E00 + number) for number in range(40)]


def items(*texts: str, run: int = 13) -> list[Item]:
    """Return items as `read` makes them of lines of a file."""
    units = [len(text_units.spans(text)[0]) for text in texts]
    runs = [min(run, count) if count >= SHORTEST else 0 for count in units]
    return [Item("quiz", f"quiz.txt line {n}", text, r) for n, (text, r) in enumerate(zip(texts, runs, strict=True), 1)]


def find(index: Index, texts: list[str]) -> dict[int, Hit]:
    """Return the hit of each document that has one."""
    column = pa.array(texts, pa.string())
    return {
        row + place: hit
        for row, units, counts in text_units.pieces(column)
        for place, hit in index.find(units, counts, column[row:])
    }


def holds(text: str, item: Item) -> bool:
    """Return whether a text holds an item, the plain way."""
    there, here = text_units.spans(item.text)[0], text_units.spans(text)[0]
    runs = {tuple(there[i : i + item.run]) for i in range(len(there) - item.run + 1)}
    return item.run > 0 and any(tuple(here[i : i + item.run]) in runs for i in range(len(here) - item.run + 1))


def test_the_example() -> None:
    """Case and punctuation do not count; the evidence is what the document says, cut at 80 characters."""
    question = "Which of the two rivers that meet at Koblenz, the Rhine or the Moselle, is the longer one?"
    said = (
        "Someone asked: “which of the two rivers that meet at Koblenz – the RHINE or the Moselle – is the longer one”."
    )
    found = find(Index(items(question)), ["Nothing.", said, "the Rhine or the Moselle, is the longer one"])
    assert list(found) == [1]
    place, _, span = found[1].evidence.partition(": ")
    assert (found[1].benchmark, place) == ("quiz", "quiz.txt line 1")
    assert span in said
    assert span.startswith("which of the two rivers that meet")
    assert len(span) <= EVIDENCE_CHARS


@pytest.mark.parametrize(
    "text",
    [
        "Le dejeuner etait pre\u0302t de\u0300s le lever du soleil et la fore\u0302t pre\u0300s du cha\u0302teau",
        "Le dejeuner etait pr\u00eat d\u00e8s le lever du so\u00adleil et la for\u00eat pr\u00e8s du cha\u200bteau",
        "カ\u3099ラスの本はと\u3099こて\u3099す",  # shorter than a run: all of it
        "ガラスの本はどこです",
        "\ufeffThe first of twelve words that \ufb01nd no other file but this one here now",
    ],
)
def test_a_copy_is_found_in_the_form_that_clean_gave_it(text: str) -> None:
    """The benchmark is read as it is, while the rules of `clean` have normalised a copy of it among the documents."""
    index = Index(items(text))
    for form in ("NFC", "NFD", "NFKC"):
        plain = ControlCharactersRule().apply(text).text
        copies = [text, UnicodeRule(rule="nfc").apply(text).text, unicodedata.normalize(form, plain)]  # type: ignore[arg-type]
        assert list(find(index, [f"Well, {copy} it was." for copy in copies])) == [0, 1, 2], form
    assert not find(index, [text[: len(text) // 2]])


def test_the_first_item_of_the_file_is_named() -> None:
    """Not the one that stands first in the document, nor the last of those that share a run."""
    index = Index(items(" ".join(WORDS[:15]), " ".join(WORDS[2:17]), " ".join(WORDS[20:35])))
    found = find(index, [" ".join(WORDS[2:15]), " ".join([*WORDS[20:35], *WORDS[:15]]), " ".join(WORDS[2:16])])
    assert [found[row].evidence.partition(":")[0] for row in range(3)] == ["quiz.txt line 1"] * 3


def test_the_evidence_is_cut_from_the_document_whatever_stands_before_it() -> None:
    """Characters beyond U+FFFF count as two in the places of units."""
    said = " ".join(WORDS[:13])
    assert find(Index(items(" ".join(WORDS))), [f"🌊🌊 {said} 🌊"])[0].evidence == f"quiz.txt line 1: {said}"


def test_a_large_benchmark_has_each_of_its_items() -> None:
    """More than are hashed at a time."""
    rng = random.Random(2)
    texts = [" ".join(f"{rng.getrandbits(24):x}" for _ in range(13)) for _ in range(5000)]
    found = find(Index(items(*texts)), [texts[0], texts[2500], texts[-1]])
    assert [found[row].evidence.partition(":")[0] for row in found] == [f"quiz.txt line {n}" for n in (1, 2501, 5000)]


@given(st.lists(st.lists(st.sampled_from(WORDS[:3]), max_size=20), max_size=4), st.data())
def test_found_is_what_the_plain_way_finds(benchmark: list[list[str]], data: st.DataObject) -> None:
    """A tiny vocabulary, so that runs meet often; whole short items, too; the first item of the file is named."""
    known = items(*(" ".join(words) for words in benchmark if words))
    texts = data.draw(st.lists(st.lists(st.sampled_from(WORDS[:3]), max_size=40).map(" ".join), max_size=5))
    found = find(Index(known), texts)
    for row, text in enumerate(texts):
        expected = next((item.place for item in known if holds(text, item)), None)
        assert (found[row].evidence.split(":")[0] if row in found else None) == expected


@pytest.mark.parametrize(("pool", "glue", "least"), [(WORDS, " ", 13), (CHARACTERS, "", 20)])
def test_one_unit_less_is_no_hit(pool: list[str], glue: str, least: int, tmp_path: Path) -> None:
    """13 words in a row are contamination and 12 are not; 20 Chinese characters, not 19."""
    write(tmp_path / "data/benchmarks/quiz.txt", glue.join(pool[:30]) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        index = Index([*read("quiz", Params())])
    for begin in (0, 3, 30 - least):
        part = [*pool[30:40], *pool[begin : begin + least], *pool[30:40]]
        assert list(find(index, [glue.join(part), glue.join(part[:-11]), glue.join(part[11:])])) == [0]


@pytest.mark.parametrize(
    ("item", "run"),
    [
        (" ".join(WORDS[:30]), 9),
        ("".join(CHARACTERS[:30]), 11),
        (" ".join([*WORDS[:15], *CHARACTERS[:15]]), 9),
        (" ".join([*WORDS[:15], *CHARACTERS[:16]]), 11),
        (" ".join(WORDS[:SHORTEST]), SHORTEST),
        (" ".join(WORDS[: SHORTEST - 1]), 0),
    ],
    ids=["words", "characters", "half of each", "more characters", "short", "too short"],
)
def test_how_long_a_run_of_an_item_counts(item: str, run: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the parameters say for words, or for characters where they are more than half."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data/benchmarks/quiz.txt", item)
    assert [found.run for found in read("quiz", Params(ngram=9, character_ngram=11))] == [run]


@pytest.mark.parametrize("count", [SHORTEST - 1, SHORTEST, 12])
def test_a_short_item_is_found_as_a_whole_or_not_at_all(count: int) -> None:
    short = items(" ".join(WORDS[:count]))
    texts = [" ".join(["so", *WORDS[:count], "on"]), " ".join(WORDS[: count - 1]), " ".join(WORDS[1:count])]
    assert list(find(Index(short), texts)) == ([0] if count >= SHORTEST else [])


def test_nothing_reaches_into_the_next_document() -> None:
    """The two halves of an item in two documents that stand one after the other."""
    index = Index(items(" ".join(WORDS[:13])))
    assert find(index, [" ".join(WORDS[:6]), " ".join(WORDS[6:13])]) == {}


def test_a_document_longer_than_a_window() -> None:
    rng = random.Random(1)
    text = " ".join(f"{rng.getrandbits(24):x}" for _ in range(text_units.WINDOW // 3))
    index = Index(items(" ".join(WORDS[:20])))
    assert find(index, ["a", text, "b"]) == {}
    assert list(find(index, ["a", f"{text} {' '.join(WORDS[:20])} {text}", "b"])) == [1]


def test_an_accident_of_the_hash_is_no_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    """All hashes equal: every run is a candidate, and only the true one counts."""
    monkeypatch.setattr(text_units, "mix", lambda hashes: np.zeros_like(hashes))
    index = Index(items(" ".join(WORDS[:15]), " ".join(WORDS[20:35])))
    assert find(index, [" ".join(WORDS[5:25]), " ".join(WORDS[10:20])]) == {}


@given(st.lists(st.integers(0, 3), max_size=3))
def test_no_batch_shows(cuts: list[int]) -> None:
    texts = [" ".join(WORDS[:14]), "nothing", " ".join(WORDS[20:40])]
    index = Index(items(" ".join(WORDS[1:14]), " ".join(WORDS[25:40])))
    edges = [0, *sorted(cuts), 3]
    parts: dict[int, Hit] = {}
    for begin, end in itertools.pairwise(edges):
        parts |= {begin + row: hit for row, hit in find(index, texts[begin:end]).items()}
    assert parts == find(index, texts)
    assert list(parts) == [0, 2]


def test_a_jsonl_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each named field is an item by itself; empty ones are none; lines are numbered as in the file."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": " ".join(WORDS[:20]), "answer": "Yes"}, {"question": "".join(CHARACTERS), "answer": ""}]
    write(tmp_path / "data/benchmarks/quiz.jsonl", "\ufeff" + "\r\n\r\n".join(map(json.dumps, rows)))  # of Windows
    found = [*read("quiz", Params(fields=["question", "answer"]))]
    assert [(item.place, item.run) for item in found] == [
        ("data/benchmarks/quiz.jsonl line 1", 13),
        ("data/benchmarks/quiz.jsonl line 1", 0),
        ("data/benchmarks/quiz.jsonl line 3", 20),
    ]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("quiz.csv", "a", r"the benchmark `quiz` is data/benchmarks/quiz.jsonl or .txt; neither is there"),
        ("quiz.jsonl", '{"text": "a"}\n{"text"', r"quiz.jsonl line 2 cannot be read \(.*\); mend the line"),
        ("quiz.jsonl", '{"text": "\\ud83d a"}', r"quiz.jsonl line 1 cannot be read \(.*surrogates.*\); mend the line"),
        ("quiz.jsonl", "[" * 100_000, r"quiz.jsonl line 1 cannot be read \(.*recursion.*\); mend the line"),
        ("quiz.jsonl", "[1]", r"quiz.jsonl line 1 is JSON but not an object with named fields"),
        ("quiz.jsonl", '{"question": "a"}', r"line 1 has no text in the field `text`; its fields are question: name"),
        ("quiz.jsonl", '{"text": 1}', r"line 1 has no text in the field `text`"),
    ],
)
def test_a_wrong_benchmark_is_one_sentence(
    name: str, content: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data/benchmarks" / name, content)
    with pytest.raises(SystemExit, match=sentence):
        list(read("quiz", Params()))


def test_two_files_of_one_benchmark_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one of them would be left out silently."""
    monkeypatch.chdir(tmp_path)
    for suffix in ("jsonl", "txt"):
        write(tmp_path / f"data/benchmarks/quiz.{suffix}", "")
    with pytest.raises(SystemExit, match=r"there are .*quiz.jsonl and .*quiz.txt: keep one"):
        list(read("quiz", Params()))


@pytest.mark.parametrize("wrong", [{"ngram": SHORTEST - 1}, {"character_ngram": SHORTEST - 1}, {"fields": []}])
def test_wrong_parameters_are_refused(wrong: dict[str, Any]) -> None:
    """Runs shorter than what every run is looked up by would be found nowhere."""
    with pytest.raises(ValidationError):
        Params(**wrong)
