"""Which tokens of a block a masked model has to guess, and what it sees in their place. Part of train_model.

    masking = Masking(Vocabulary(folder), probability=0.15, whole_words=False, seed=0)
    inputs, chosen = masking(ids, learned, positions)     # three arrays of shape (blocks, block_size), one of (blocks,)

Of the words of a block each is chosen with `probability`; of its tokens 80 % become the mask, 10 % a random token, 10 %
stay as they are (Devlin et al., "BERT", 2019, section 3.1). Special tokens and padding are never chosen. A block in
which chance chose nothing gives its luckiest word, so every block is learned from.

A word is one token, or with `whole_words` a run of tokens between two borders of the text, as its bytes say:

    - before a space, and where letters, digits and other signs meet:      don|'|t| stop|,| 42
    - before each Chinese character; the tokens that make up one character, or one token of several, stay together

The numbers are drawn by plain integer arithmetic from (seed, position in the stream of blocks, place in the block):
each epoch masks a block anew, a resumed run masks as an uninterrupted one, and no library's generator can change it.
"""

from __future__ import annotations

import unicodedata

import numpy as np
import numpy.typing as npt

from kit.tokenizer import UNICODE_TO_BYTE, Vocabulary

Array = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
BLANK, SPACE, LETTER, DIGIT, OTHER, HAN, PART, SPECIAL = range(8)  # of a character; PART: the rest of a cut one
HAN_RANGES = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))


def uniform(seed: int, positions: Array, length: int, purpose: int) -> npt.NDArray[np.float64]:
    """Return numbers in [0, 1), of shape (len(positions), length): SplitMix64 of seed, position, place and purpose."""
    rows = _mix(_mix(np.uint64(seed) + np.zeros(1, np.uint64)) ^ positions.astype(np.uint64))
    places = np.arange(length, dtype=np.uint64) * np.uint64(4) + np.uint64(purpose)
    draws = _mix(rows[:, None] ^ _mix(places)[None]) >> np.uint64(11)
    return draws.astype(np.float64) * 2.0**-53


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Masking:
    """Masks blocks of one tokenizer. Raises SystemExit when it has no mask token."""

    def __init__(self, vocabulary: Vocabulary, probability: float, whole_words: bool, seed: int) -> None:
        self.probability, self.whole_words, self.seed = probability, whole_words, seed
        token = vocabulary.named("mask_token")
        if not token:
            raise SystemExit(
                f"{vocabulary.folder} names no mask_token, which `objective: mlm` needs; "
                "set train_tokenizer.mask_token."
            )
        self.mask = vocabulary.id(token)
        self.special = np.zeros(vocabulary.size, bool)
        self.special[[vocabulary.id(text) for text in vocabulary.special_texts]] = True
        self.ordinary = np.flatnonzero(~self.special)
        if whole_words:
            self.first, self.last = _kinds(vocabulary, self.special)

    def __call__(self, ids: Array, learned: Bools, positions: Array) -> tuple[Array, Bools]:
        """Return what the model sees in place of `ids`, and which of them it has to guess; only `learned` ones."""
        length = ids.shape[1]
        eligible = learned & ~self.special[ids]
        draw = uniform(self.seed, positions, length, 0)
        if self.whole_words:
            begins = np.maximum.accumulate(np.where(self.starts(ids), np.arange(length), 0), axis=1)
            draw = np.take_along_axis(draw, begins, axis=1)
        chosen = eligible & (draw < self.probability)
        luckiest = np.where(eligible, draw, 2.0).min(axis=1, keepdims=True)
        chosen |= eligible & (draw == luckiest) & ~chosen.any(axis=1, keepdims=True)
        become = uniform(self.seed, positions, length, 1)
        random = self.ordinary[(uniform(self.seed, positions, length, 2) * len(self.ordinary)).astype(np.int64)]
        inputs = np.where(chosen & (become < 0.8), self.mask, ids)
        return np.where(chosen & (become >= 0.8) & (become < 0.9), random, inputs), chosen

    def starts(self, ids: Array) -> Bools:
        """Return which tokens of `ids` begin a word."""
        first, before = self.first[ids], np.pad(self.last[ids][:, :-1], ((0, 0), (1, 0)), constant_values=SPECIAL)
        always = np.isin(first, (BLANK, SPACE, HAN, SPECIAL))
        return (first != PART) & (always | ((first != before) & (before != BLANK)))


def _kinds(vocabulary: Vocabulary, special: Bools) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return the kind of the first and of the last character of each token."""
    first, last = np.full(vocabulary.size, SPECIAL, np.uint8), np.full(vocabulary.size, SPECIAL, np.uint8)
    alphabet = UNICODE_TO_BYTE if "ByteLevel" in vocabulary.tokenizer.to_str() else {}
    for piece, number in vocabulary.tokenizer.get_vocab().items():
        if not special[number]:
            first[number], last[number] = _ends(piece, alphabet)
    return first, last


def _ends(piece: str, alphabet: dict[str, int]) -> tuple[int, int]:
    """Return the kinds of the ends of a token as it stands in tokenizer.json.

    >>> _ends("##ing", {}), _ends("▁the", {}), _ends("42", {}) == (DIGIT, DIGIT)
    ((6, 2), (0, 2), True)
    """
    if alphabet and all(sign in alphabet for sign in piece):
        raw = bytes(alphabet[sign] for sign in piece)
        text = raw.decode("utf-8", "ignore")
        begin = PART if 0x80 <= raw[0] < 0xC0 else _kind(text[0]) if text else _lead(raw)
        # A token may end inside a character; what comes then is PART, and goes with it.
        return begin, _kind(text[-1]) if text else PART if begin == PART else _lead(raw)
    if len(piece) == 6 and piece.startswith("<0x"):  # a byte that SentencePiece had no token for
        byte = int(piece[3:5], 16)
        return (PART, PART) if 0x80 <= byte < 0xC0 else (_lead(bytes([byte])),) * 2
    text = piece.removeprefix("##").replace("▁", " ")
    return PART if piece.startswith("##") else _kind(text[:1]), _kind(text[-1:])


def _lead(raw: bytes) -> int:
    """Return the kind that the beginning of a cut character stands for: three bytes and more are taken as Han."""
    return _kind(chr(raw[0])) if raw[0] < 0x80 else HAN if raw[0] >= 0xE0 else LETTER


def _kind(sign: str) -> int:
    if sign == " ":
        return BLANK
    if not sign or sign.isspace():
        return SPACE
    if any(begin <= ord(sign) <= end for begin, end in HAN_RANGES):
        return HAN
    category = unicodedata.category(sign)[0]
    return LETTER if category in "LM" else DIGIT if category == "N" else OTHER
