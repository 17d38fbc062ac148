"""masking: what a masked model guesses is frozen, fair, and never a special token, padding or half a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from kit.tokenizer import Vocabulary
from masking import Masking

Make = Callable[..., Masking]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """A byte-level BPE with the special tokens of RoBERTa, ids 0 to 4."""
    return Vocabulary(tiny.masked_tokenizer(tmp_path_factory.mktemp("masking") / "tokenizer"))


def text_blocks(vocabulary: Vocabulary, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(5, vocabulary.size, (rows, length))


def test_the_draw_is_frozen(vocabulary: Vocabulary) -> None:
    """Were it another one, a run that goes on would mask otherwise than it began, and receipts would prove nothing."""
    ids = np.arange(5, 45)[None].repeat(2, 0)
    inputs, chosen = Masking(vocabulary, 0.15, False, 7)(ids, np.ones_like(ids, bool), np.array([3, 4]))
    assert [np.flatnonzero(row).tolist() for row in chosen] == CHOSEN
    assert inputs[chosen].tolist() == SEEN


def test_four_of_five_become_the_mask_and_one_of_ten_another_token(vocabulary: Vocabulary) -> None:
    ids = text_blocks(vocabulary, 400, 128)
    masking = Masking(vocabulary, 0.15, False, 0)
    inputs, chosen = masking(ids, np.ones_like(ids, bool), np.arange(400))
    assert chosen.mean() == pytest.approx(0.15, abs=0.005)
    assert (inputs[chosen] == masking.mask).mean() == pytest.approx(0.8, abs=0.02)
    assert (inputs[chosen] == ids[chosen]).mean() == pytest.approx(0.1, abs=0.015)
    assert (inputs[~chosen] == ids[~chosen]).all()
    assert not masking.special[inputs[chosen & (inputs != masking.mask)]].any()


@settings(max_examples=40)
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.booleans(), st.floats(0.01, 0.99))
def test_special_tokens_and_padding_are_never_chosen_and_each_block_has_one(
    vocabulary: Vocabulary, seed: int, position: int, words: bool, probability: float
) -> None:
    ids = np.array([[0, 9, 3, 1, 8, 2, 2, 2], [0, 2, 2, 2, 2, 2, 2, 2], [0, 30, 1, 0, 31, 1, 2, 2]])
    learned = np.ones_like(ids, bool)
    learned[2, 4] = False  # said by a user: seen, not guessed
    masking = Masking(vocabulary, probability, words, seed)
    inputs, chosen = masking(ids, learned, np.array([position, position + 1, position + 2]))
    assert chosen[0].any() and not chosen[0][[0, 2, 3, 5, 6, 7]].any()
    assert not chosen[1].any()
    assert chosen[2].tolist() == [False, True, *[False] * 6]
    assert (inputs[~chosen] == ids[~chosen]).all()


def test_a_block_is_masked_by_its_position_alone(vocabulary: Vocabulary) -> None:
    """Not by what stands in the same batch; in the next epoch it stands at another position and is masked anew."""
    ids, positions = text_blocks(vocabulary, 6, 32), np.array([5, 9, 2, 77, 8, 1])
    masking = Masking(vocabulary, 0.15, True, 0)
    together = masking(ids, np.ones_like(ids, bool), positions)
    for row in range(6):
        alone = masking(ids[[row]], np.ones((1, 32), bool), positions[[row]])
        assert np.array_equal(alone[0][0], together[0][row]) and np.array_equal(alone[1][0], together[1][row])
    later = masking(ids, np.ones_like(ids, bool), positions + 100)
    assert not np.array_equal(later[1], together[1])
    other = Masking(vocabulary, 0.15, True, 1)(ids, np.ones_like(ids, bool), positions)
    assert not np.array_equal(other[1], together[1])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the quick foxes", ["the", " quick", " foxes"]),
        ("don't stop, 42km", ["don", "'", "t", " stop", ",", " 42", "km"]),
        ("一第二章", ["一", "第", "二", "章"]),
        ("fox 猫 fox", ["fox", " ", "猫", " fox"]),
        ("café\nnew", ["café", "\n", "new"]),
    ],
)
def test_words(vocabulary: Vocabulary, text: str, words: list[str]) -> None:
    """Whatever the pieces: a run of bytes that make up one character is never split, and no word of letters is."""
    ids = np.array([vocabulary.tokenizer.encode(text, add_special_tokens=False).ids])
    begins = np.flatnonzero(Masking(vocabulary, 0.15, True, 0).starts(ids)[0])
    parts = np.split(ids[0], begins[1:])
    assert [vocabulary.tokenizer.decode(part.tolist()) for part in parts] == words


def test_a_word_is_chosen_whole(vocabulary: Vocabulary) -> None:
    text = "the quick brown foxes jump, 法律第二章 over windows and rivers " * 20
    ids = np.array([vocabulary.tokenizer.encode(text, add_special_tokens=False).ids])
    masking = Masking(vocabulary, 0.3, True, 0)
    _, chosen = masking(ids, np.ones_like(ids, bool), np.array([0]))
    words = np.cumsum(masking.starts(ids)[0])
    for word in np.unique(words):
        assert len(set(chosen[0][words == word])) == 1
    assert len(np.unique(words)) < ids.shape[1] and 0.2 < chosen.mean() < 0.4


def test_a_tokenizer_without_a_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"names no mask_token, .*; set train_tokenizer\.mask_token"):
        Masking(Vocabulary(tiny.tokenizer(tmp_path / "tokenizer")), 0.15, False, 0)


def test_pieces_of_other_tokenizers() -> None:
    """WordPiece marks what goes on, SentencePiece what begins, and single bytes it has no token for."""
    from masking import BLANK, DIGIT, HAN, LETTER, PART, _ends

    assert _ends("##ing", {}) == (PART, LETTER)
    assert _ends("▁the", {}) == (BLANK, LETTER)
    assert _ends("4a2", {}) == (DIGIT, DIGIT)
    assert _ends("法律", {}) == (HAN, HAN)
    assert _ends("कि", {}) == (LETTER, LETTER)  # its last sign is a mark, category M
    assert _ends("<0xE6>", {}) == (HAN, HAN)
    assert _ends("<0xB3>", {}) == (PART, PART)
    assert _ends("<0xDF>", {}) == (LETTER, LETTER)  # two bytes: Greek, Cyrillic, Arabic
    assert _ends("<0xE0>", {}) == (HAN, HAN)


def test_pieces_of_byte_level_tokenizers() -> None:
    """A token may begin or end inside a character; one that was added stands there as it is."""
    from kit.tokenizer import UNICODE_TO_BYTE
    from masking import HAN, LETTER, PART, _ends

    signs = {byte: sign for sign, byte in UNICODE_TO_BYTE.items()}
    pieces = {b"a\xe6": (LETTER, LETTER), b"\xe6\xb3": (HAN, HAN), b"\xb3": (PART, PART), b"\xd0": (LETTER, LETTER)}
    pieces |= {b"\x95a": (PART, LETTER), "法a".encode(): (HAN, LETTER)}
    for raw, ends in pieces.items():
        assert _ends("".join(signs[byte] for byte in raw), UNICODE_TO_BYTE) == ends, raw
    assert _ends("a法", UNICODE_TO_BYTE) == (LETTER, HAN)


CHOSEN = [[2, 3, 14, 19, 30, 33, 37], [19, 36]]
SEEN = [4, 4, 4, 4, 35, 4, 42, 76, 41]
