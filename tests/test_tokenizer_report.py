"""tokenizer_report: the sample follows from content alone; every number is the one that counting by hand gives."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import tiny
from clean import TEXT_DOCUMENTS
from dedup import DECISIONS
from kit import arrow
from tokenizer_report import Report, Sample, documents, drawn, units

PLACE = {"file": "a.txt", "start": 0, "end": 1, "line": 1}


def words(*names: str) -> Tokenizer:
    """Return a tokenizer that knows these words and loses spaces and capitals."""
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(["?", *names])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def source(folder: Path, texts: list[str], split: str = "train", batch_rows: int = 3) -> tuple[Path, Path]:
    """Write documents of one split, or of splits in turn; doc_id is the beginning of the text."""
    rows = [{"doc_id": text[:16].ljust(16).encode()[:16], **PLACE, "text": text} for text in texts]
    with arrow.Writer(folder / "clean/documents", TEXT_DOCUMENTS, batch_rows=batch_rows) as out:
        out.write(pa.Table.from_pylist(rows, TEXT_DOCUMENTS))
    with arrow.Writer(folder / "dedup", DECISIONS, batch_rows=2) as out:
        splits = [
            {"doc_id": row["doc_id"], "split": one}
            for row, one in zip(rows, itertools.cycle(split.split()), strict=False)
        ]
        out.write(pa.Table.from_pylist(splits, DECISIONS))
    return folder / "clean", folder / "dedup"


def test_the_worked_example_of_the_docstring() -> None:
    text = "the cat 猫は"
    report = Report(tiny_tokenizer([text] * 3), None)
    report.read("s", iter([(bytes(16), [text])]))
    (row,) = report.result()["sources"]
    assert (row["bytes"], units(text)) == (14, 4)
    assert row["bytes_per_token"] == round(14 / row["tokens"], 6)
    assert row["fertility"] == round(row["tokens"] / 4, 6)


def tiny_tokenizer(texts: list[str]) -> Tokenizer:
    return tiny.train_tokenizer.train(iter(texts), tiny.train_tokenizer.Params(mode="train", vocab_size=270))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        (" ,.!\n", 0),
        ("don't stop_it 12,345", 6),
        ("第一条，法律。", 5),
        ("カタカナ ひら 漢字abc", 9),
        ("한국어 문장", 2),
        ("ภาษา", 4),
        ("naïve cafe\u0301", 2),
        ("\U00020000\U000323b0", 2),
    ],
)
def test_units_are_words_or_characters(text: str, expected: int) -> None:
    assert units(text) == expected


@given(
    st.lists(st.tuples(st.binary(min_size=16, max_size=16), st.integers(0, 50)), unique_by=lambda row: row[0]),
    st.integers(1, 400),
    st.randoms(use_true_random=False),
)
def test_a_sample_is_the_lowest_ids_that_reach_the_size(
    rows: list[tuple[bytes, int]], size: int, shuffle: random.Random
) -> None:
    """In any order; all when they do not reach it; at least one, however long."""
    expected, total = set(), 0
    for doc_id, n_bytes in sorted(rows):
        if total < size:
            expected.add(doc_id)
            total += n_bytes
    shuffle.shuffle(rows)
    sample = Sample(size)
    for doc_id, n_bytes in rows:
        sample.offer(doc_id, n_bytes)
    assert {doc_id for doc_id, _ in rows if sample.holds(doc_id)} == expected
    assert len(sample._heap) <= len(expected)


def test_a_sample_is_drawn_across_sources(tmp_path: Path) -> None:
    sources = [source(tmp_path / name, [f"{n:02}{name} 法律条" for n in range(9)]) for name in "ab"]
    found = [texts[0][:3] for _, texts in drawn(sources, ("train",), 39)]
    assert found == ["00a", "01a", "00b"]
    assert len(list(drawn(sources, ("train",), None))) == 18


def test_only_the_asked_splits_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each document by its own decision, wherever batches end."""
    monkeypatch.setattr("tokenizer_report.BATCH", 2)
    mixed = source(tmp_path / "c", list("abcdefgh"), "train eval dropped")
    assert [texts for _, texts in documents(*mixed, ("train",))] == [["a"], ["d"], ["g"]]
    assert [texts for _, texts in documents(*mixed, ("train", "eval"))] == [[one] for one in "abdegh"]
    one, other = source(tmp_path / "a", ["x"], "eval"), source(tmp_path / "b", ["y"], "dropped")
    assert [texts for _, texts in documents(*one, ("train", "eval"))] == [["x"]]
    assert list(documents(*other, ("train", "eval"))) == []


def test_counts_are_those_of_a_count_by_hand() -> None:
    report = Report(words("the", "cat", "sat"), words("the cat"))
    report.read("one", iter([(b"\x01" * 16, ["the cat", "the"]), (b"\x02" * 16, ["The dog"])]))
    report.read("two", iter([]))
    result = report.result()
    one, two = result["sources"]
    assert one == {
        "source": "one",
        "documents": 2,
        "bytes": 17,
        "tokens": 5,
        "bytes_per_token": 3.4,
        "fertility": 1.0,
        "reference_bytes_per_token": 3.4,
        "round_trip_failures": 2,  # a space is lost, "The" is written small, "dog" is unknown
        "texts_with_special_tokens": 0,
    }
    assert (two["source"], two["bytes_per_token"]) == ("two", 0.0)
    assert (result["vocabulary"], result["unused"], result["unused_share"]) == (4, 1, 0.25)
    assert result["longest"] == ["the", "cat", "sat", "?"]
    assert result["unused_entries"] == ["sat"]
    assert report.failures == ["01" * 16, "02" * 16]


def test_truncation_and_padding_of_a_tokenizer_change_nothing() -> None:
    """A published tokenizer.json may hold those of its training; the whole text is measured, by both."""
    tokenizer, reference = (Tokenizer.from_str(words("the cat", "sat").to_str()) for _ in range(2))
    for each in (tokenizer, reference):
        each.enable_truncation(1)
        each.enable_padding(length=50)
    report = Report(tokenizer, reference)
    report.read("s", iter([(bytes(16), ["sat sat sat"])]))
    (row,) = report.result()["sources"]
    assert (row["tokens"], row["bytes_per_token"], row["reference_bytes_per_token"]) == (3, 3.666667, 3.666667)


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"the number {n} 法律" for n in range(40)]
    tokenizer = tiny_tokenizer(texts)
    results = []
    for batch in (1, 7, 1000):
        monkeypatch.setattr("tokenizer_report.BATCH", batch)
        report = Report(tokenizer, None)
        report.read("s", ((bytes(16), [text]) for text in texts))
        results.append(report.result())
    assert results[0] == results[1] == results[2]
    assert results[0]["round_trip_failures"] == 0


def test_of_a_long_text_the_beginning_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more at once, so that memory does not grow with a document."""
    monkeypatch.setattr("tokenizer_report.CHARACTERS", 40)
    texts = ["the cat sat. " * 50, *["the cat"] * 30, "the cat sat. " * 50]
    report, measured = Report(tiny_tokenizer(texts), None), list[int]()
    measure = report._measure
    monkeypatch.setattr(
        report, "_measure", lambda rows, totals: (measured.append(sum(len(t) for _, t in rows)), measure(rows, totals))
    )
    report.read("s", iter((bytes(16), [text]) for text in texts))
    (row,) = report.result()["sources"]
    assert (row["documents"], row["bytes"]) == (32, 2 * 40 + 30 * 7)
    assert max(measured) < 40 + 40


def test_text_that_looks_like_a_special_token_is_text() -> None:
    report = Report(tiny_tokenizer(["abc"]), None)
    report.read("s", iter([(bytes(16), ["</s>", "s"])]))
    result = report.result()
    assert result["sources"][0]["tokens"] == 5
    assert result["texts_with_special_tokens"] == result["sources"][0]["texts_with_special_tokens"] == 1
    assert report.special_in_text == [f"'</s>' in document {'00' * 16}"]
    assert result["unused"] > 200 and result["unused_entries"] == []  # bytes, which any text must find
