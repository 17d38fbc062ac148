"""contamination: the share of a held-out text that stands in the training text, in words and in characters."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import text_units
from contamination import shares

HELD_OUT = "A generator is a function which returns a generator iterator. It looks like a normal one"
TRAIN = "They say: a generator is a function which returns a generator iterator, it looks like a normal thing."
STATUTE = "第一条为了保护民事主体的合法权益调整民事关系维护社会和经济秩序"


def of(text: str, *train: str) -> float:
    return float(shares([text], [pa.array(train, pa.string())])[0])


def test_the_example() -> None:
    assert of(HELD_OUT, TRAIN) == pytest.approx(15 / 16)


def test_what_counts_as_common() -> None:
    """13 words or 20 characters in a row, or 8 units of a text that has fewer; nothing of one that says nothing."""
    words = [f"w{number}" for number in range(30)]
    assert of(" ".join(words), " ".join(words[4:16])) == 0.0
    assert of(" ".join(words), " ".join(words[4:17])) == pytest.approx(13 / 30)
    assert of(" ".join(words), " ".join(words[:13]), " ".join(words[17:])) == pytest.approx(26 / 30)
    assert of(STATUTE, STATUTE[3:22]) == 0.0
    assert of(STATUTE, STATUTE[3:23]) == pytest.approx(20 / len(STATUTE))
    assert of(" ".join(words[:8]), " ".join(words[:9])) == 1.0
    assert of(" ".join(words[:7]), " ".join(words)) == 0.0
    assert of("", TRAIN) == of(HELD_OUT) == of(HELD_OUT, "") == 0.0


def test_a_run_across_two_training_texts_is_none() -> None:
    words = HELD_OUT.split()
    assert of(HELD_OUT, " ".join(words[:8]), " ".join(words[8:])) == 0.0


def test_two_texts_share_a_run() -> None:
    """A run that several held-out texts have counts for each; batches of the training text do not matter."""
    found = shares([HELD_OUT, HELD_OUT, "other"], [pa.array(["x"]), pa.array([], pa.string()), pa.array([TRAIN])])
    assert found.tolist() == pytest.approx([15 / 16, 15 / 16, 0])


UNITS = st.lists(st.sampled_from(["a", "b", "法"]), max_size=60)


@given(st.lists(UNITS, max_size=3), st.lists(UNITS, max_size=3))
def test_against_a_plain_search(held_out: list[list[str]], train: list[list[str]]) -> None:
    def plain(text: list[str]) -> float:
        length = 20 if text.count("法") > len(text) / 2 else 13
        length = length if len(text) >= length else 8
        known = {tuple(one[n : n + length]) for one in train for n in range(len(one) - length + 1)}
        covered = np.zeros(len(text), bool)
        for n in range(len(text) - length + 1):
            if tuple(text[n : n + length]) in known:
                covered[n : n + length] = True
        return float(covered.mean()) if len(text) else 0.0

    texts = [" ".join(text) for text in held_out]
    found = shares(texts, [pa.array([" ".join(text) for text in train], pa.string())])
    assert found.tolist() == pytest.approx([plain(text) for text in held_out])


def test_a_text_longer_than_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_units, "WINDOW", 64)
    assert of(HELD_OUT, "so it goes " * 20 + TRAIN + " so it goes" * 20) == pytest.approx(15 / 16)
