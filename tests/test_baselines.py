"""baselines: what an order-0 model, compressors and an n-gram model need for a byte."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines import ngram, scale

TEXT = b"the law of the river is the river of the law " * 3


def test_the_scale() -> None:
    """Order 0: two bytes, equally often, are one bit each. Random bytes cannot be compressed, repeated ones can."""
    assert scale(b"ab" * 500, b"ab" * 5000) == {"order0": 1.0, "gzip": 0.24, "xz": 0.64, "ngram": 0.001}
    noise = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8).tobytes()
    assert 7.9 < scale(noise, b"")["order0"] <= 8.0 < scale(noise, b"")["xz"] < 8.1
    assert scale(b"law " * 5000, b"")["gzip"] < 0.1


def test_an_ngram_model_that_saw_nothing_is_uniform() -> None:
    assert ngram(b"", TEXT) == 8.0


def slow(train: bytes, text: bytes, order: int) -> float:
    """The formula of the docstring, byte by byte."""
    after: dict[bytes, Counter[int]] = defaultdict(Counter)
    for length in range(order):
        for place in range(length, len(train)):
            after[train[place - length : place]][train[place]] += 1
    bits = 0.0
    for place, byte in enumerate(text):
        chance = 1 / 256
        for length in range(min(order, place + 1)):
            seen = after.get(text[place - length : place], Counter())
            if seen:
                chance = (seen[byte] + len(seen) * chance) / (seen.total() + len(seen))
        bits -= math.log2(chance)
    return bits / len(text)


@given(st.binary(max_size=60), st.binary(min_size=1, max_size=40), st.integers(1, 8))
def test_the_ngram_model_is_witten_bell(train: bytes, text: bytes, order: int) -> None:
    for known in (train, train + text, TEXT):
        assert ngram(known, text, order) == pytest.approx(slow(known, text, order), rel=1e-9)


def test_probabilities_of_the_ngram_model_sum_to_one() -> None:
    """p(text) is the sum over all bytes of p(text byte)."""

    def probability(text: bytes) -> float:
        return float(2 ** -(ngram(TEXT, text) * len(text)))

    before = b"the law of the ri"
    assert sum(probability(before + bytes([byte])) for byte in range(256)) == pytest.approx(probability(before))
