"""Scores of a written answer against the expected one, and how sure a mean is. Part of evaluate_model.

    rouge_l("the cat sat", "the cat sat down")            ->  0.857143
    rouge_l("自然人的权利", "自然人享有权利")              ->  0.769231   (of Chinese each character is a unit)
    chrf(chrf_counts("the cat sat", "the cat sat down"))  ->  0.660176

Units are those of text_units: a word is one, and so is each character of a script without spaces; case and
punctuation do not count for ROUGE-L. Peers split on everything but a-z and 0-9, so any two Chinese texts score 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

import text_units

Array = npt.NDArray[np.float64]
CHRF_ORDER, CHRF_BETA = 6, 2  # Popovic, "chrF", 2015: runs of 1 to 6 characters, recall twice as important
LEVEL = 0.95


def exact_match(answer: str, expected: str) -> float:
    """Return 1.0 when both are the same but for white space around them."""
    return float(answer.strip() == expected.strip())


def rouge_l(answer: str, expected: str) -> float:
    """Return the F1 of the longest common subsequence of units (Lin, "ROUGE", 2004); 0.0 without any unit in common.

    >>> round(rouge_l("the cat sat", "the cat sat down"), 6)
    0.857143
    """
    found, wanted = (text_units.spans(text)[0] for text in (answer, expected))
    return 2 * _common(found, wanted) / max(len(found) + len(wanted), 1)


def _common(left: list[bytes], right: list[bytes]) -> int:
    """Return the length of the longest common subsequence, a bit for each unit of `left` (Hyyrö, 2004)."""
    places: dict[bytes, int] = {}
    for place, unit in enumerate(left):
        places[unit] = places.get(unit, 0) | 1 << place
    full = (1 << len(left)) - 1
    rows = full
    for unit in right:
        hits = rows & places.get(unit, 0)
        rows = (rows + hits | rows - hits) & full
    return len(left) - rows.bit_count()


def chrf_counts(answer: str, expected: str) -> Array:
    """Return (runs in the answer, runs in the expected text, runs in common) for each length of run, (6, 3).

    White space does not count. Summed over answers they give the score of all of them.
    """
    texts = ["".join(text.split()) for text in (answer, expected)]
    rows = []
    for length in range(1, CHRF_ORDER + 1):
        found, wanted = (Counter(text[n : n + length] for n in range(len(text) - length + 1)) for text in texts)
        # Runs longer than the expected text cannot be right or wrong: sacrebleu counts none of them.
        rows.append((found.total() if wanted else 0, wanted.total(), (found & wanted).total()))
    return np.array(rows, float)


def chrf(counts: Array) -> Array:
    """Return the chrF2, 0 to 1, of counts (..., 6, 3): F2 of the mean precision and the mean recall.

    A length that one side has no run of is left out, as sacrebleu does.
    """
    found, wanted, common = np.moveaxis(counts, -1, 0)
    known = (found > 0) & (wanted > 0)
    lengths = np.maximum(known.sum(-1), 1)
    precision = np.where(known, common / np.maximum(found, 1), 0).sum(-1) / lengths
    recall = np.where(known, common / np.maximum(wanted, 1), 0).sum(-1) / lengths
    weighed = CHRF_BETA**2 * precision + recall
    return np.divide((1 + CHRF_BETA**2) * precision * recall, weighed, out=np.zeros_like(weighed), where=weighed > 0)


def interval(rows: Array, measure: Callable[[Array], Array], samples: int, seed: int) -> list[float]:
    """Return the 95 % interval of `measure` under another choice of documents (Efron's percentile bootstrap).

    rows: sums of each document, (documents, ...). `measure` takes sums over documents (samples, ...) to (samples,); so
    a ratio of sums is resampled as a whole. The same seed draws the same documents for each model, so that intervals
    of a difference are paired.
    """
    random = np.random.default_rng(seed)
    flat = rows.reshape(len(rows), -1)
    sums = np.empty((samples, flat.shape[1]))
    for sample in range(samples):
        times = np.bincount(random.integers(len(flat), size=len(flat)), minlength=len(flat))
        sums[sample] = (times[:, None] * flat).sum(axis=0)
    tail = (1 - LEVEL) / 2
    ends = np.quantile(measure(sums.reshape(samples, *rows.shape[1:])), [tail, 1 - tail])
    return [round(float(end), 6) for end in ends]
