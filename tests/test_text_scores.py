"""text_scores: ROUGE-L and chrF of known pairs, on Chinese, too; intervals that cover what they should."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from text_scores import chrf, chrf_counts, exact_match, interval, rouge_l

WORDS = st.lists(st.sampled_from(["the", "cat", "sat", "mat", "法", "律"]), max_size=12)

# By rouge-score 0.1.2 (rougeL, no stemmer) and sacrebleu 2.6.0 (chrF2); rouge-score has no units for Chinese, so those
# two are 2 x common / (characters of both): 5 of 6 and 7; 12 of 16 and 17 without punctuation.
GOLDEN = [
    ("the cat sat", "the cat sat down", 0.857143, 0.660176),
    ("Return a new list.", "Return a list of the names.", 0.600000, 0.351440),
    ("自然人的权利", "自然人享有权利", 0.769231, 0.243498),
    ("第一条 为了保护民事主体的合法权益", "第一条 为保护公民的合法权益，制定本法", 0.727273, 0.293882),
    # By hand: runs that one side is too short for do not count; p = 1 and r = (2/3 + 1/2) / 2, and the other way round.
    ("ab", "abc", 0.0, 7 / 11),
    ("abc", "ab", 0.0, 7 / 8),
    ("", "the cat", 0.0, 0.0),
    ("the cat", "", 0.0, 0.0),
    ("", "", 0.0, 0.0),
]


@pytest.mark.parametrize(("answer", "expected", "rouge", "character_f"), GOLDEN)
def test_known_pairs(answer: str, expected: str, rouge: float, character_f: float) -> None:
    assert rouge_l(answer, expected) == pytest.approx(rouge, abs=1e-6)
    assert float(chrf(chrf_counts(answer, expected))) == pytest.approx(character_f, abs=1e-6)


def test_chrf_of_several_answers_is_of_their_sums() -> None:
    """As sacrebleu's corpus score of these pairs; of the last, runs longer than the expected text do not count."""
    pairs = [(answer, expected) for answer, expected, *_ in GOLDEN[:4]] + [("the cat sat on the mat", "a b")]
    assert float(chrf(sum(chrf_counts(*pair) for pair in pairs))) == pytest.approx(0.376000, abs=1e-6)


@given(WORDS, WORDS)
def test_rouge_l_against_the_table_of_the_textbook(left: list[str], right: list[str]) -> None:
    table = np.zeros((len(left) + 1, len(right) + 1), int)
    for i, one in enumerate(left):
        for j, other in enumerate(right):
            table[i + 1, j + 1] = table[i, j] + 1 if one == other else max(table[i, j + 1], table[i + 1, j])
    expected = 2 * table[-1, -1] / max(len(left) + len(right), 1)
    assert rouge_l(" ".join(left), " ".join(right)) == pytest.approx(expected)


@given(st.text())
def test_a_perfect_answer_has_the_highest_scores(text: str) -> None:
    assert exact_match(f" {text}\n", text) == 1.0
    assert rouge_l(text, text) in (0.0, 1.0)  # 0: no word in it
    assert float(chrf(chrf_counts(text, text))) == pytest.approx(1.0 if text.split() else 0.0)


def test_exact_match_is_exact() -> None:
    assert exact_match("Yes", "yes") == exact_match("Yes.", "Yes") == 0.0


def test_an_interval_covers_the_truth_and_narrows() -> None:
    """95 of 100 intervals of a known mean hold it, give or take; four times the documents halve the width."""
    random = np.random.default_rng(1)
    widths, covered = {}, 0
    for size in (25, 100):
        found = [interval(random.normal(5, 2, (size, 1)), lambda s, n=size: s[:, 0] / n, 400, 0) for _ in range(100)]
        covered += sum(low <= 5 <= high for low, high in found)
        widths[size] = np.mean([high - low for low, high in found])
    assert 176 <= covered <= 199
    assert widths[25] / widths[100] == pytest.approx(2, rel=0.1)
    assert widths[100] == pytest.approx(2 * 1.96 * 2 / 10, rel=0.05)


def test_an_interval_is_of_the_ratio_of_sums_and_of_the_seed() -> None:
    """A document counts by its size: ten equal ratios have no spread, however long each document is."""
    rows = np.array([[n * 3.0, n] for n in range(1, 11)])

    def ratio(sums: np.ndarray) -> np.ndarray:
        return sums[:, 0] / sums[:, 1]

    assert interval(rows, ratio, 100, 0) == [3.0, 3.0]
    rows[:, 0] += np.arange(10) % 3
    assert interval(rows, ratio, 100, 0) == interval(rows, ratio, 100, 0) != interval(rows, ratio, 100, 1)
