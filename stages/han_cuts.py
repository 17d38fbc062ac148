r"""Cut runs of Chinese characters where no token can join them, so that a BPE engine meets words that it knows.

No blank ends a word in Chinese: what stands between two marks of punctuation is one word to the engine, new nearly
every time, and each is merged from its 30 bytes. Between most characters no merge can take place, for the vocabulary
has no token with the end of the one and the begin of the other. A carriage return put there gives the same tokens and
one for itself in between:

    Cuts(tokens with 法律).cut("宪法法律".encode())  ->  ("宪\r法\r法律".encode(), 2)

Why the tokens are the same: a merge across a place makes a token that holds the bytes on both sides of it; where there
is no such token, what is left and what is right of it is merged independently. And Chinese characters are letters that
the split patterns take with any letters before and after; a carriage return ends such a run and stands alone. That does
not hold for the pattern of o200k, which tells upper from lower case: "a法律Bd" is "a法律" and "Bd", but "律Bd" is one.

Per CPU second 57 MB instead of 24 of random words with 16,384 entries, 28 instead of 22 of laws whose own tokenizer has
as many. With 100,000 entries most characters are joined by some token: no gain, and 3 % for having looked.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from kit.arrow import compute as pc

MARK = 13  # carriage return
FIRST, LAST = 0x4E00, 0x9FFF  # three bytes of UTF-8 each, the first from E4 to E9; all of them are letters
BITS = 23  # of the table of pairs; with 20 a quarter of the cuts is lost to pairs that share a place
FEW = 16  # of 61st bytes, one in so many, or more, must begin a Chinese character: cutting is not worth it for fewer
MOST = 2**23  # pairs to enter for tokens that begin or end within a character; with more of them nothing is cut


class Cuts:
    """Knows between which Chinese characters no token of a vocabulary (each as its bytes) can stand."""

    def __init__(self, tokens: Iterable[bytes]) -> None:
        # By the hash of two characters: 0 where a token may join them. Two that collide are not cut, which is no error.
        self.free = np.ones(2**BITS, dtype=np.uint8)
        rest = 0
        for left, right in _joined(tokens):
            rest += left.size * right.shape[1]
            if rest > MOST:
                self.free[:] = 0
                break
            self.free[_hash(left[:, :, None], right[:, None, :])] = 0
        self.table = pa.array(self.free)

    def cut(self, text: bytes) -> tuple[bytes, int]:
        """Return a text (UTF-8) with a carriage return wherever it may be cut, and how many there are; 0: as it was."""
        if not _is_chinese(text) or bytes([MARK]) in text:
            return text, 0
        codes = np.frombuffer(text.decode().encode("utf-16-le"), dtype=np.uint16)
        if len(codes) < 2:
            return text, 0
        chinese = codes - np.uint16(FIRST) <= LAST - FIRST  # what is below wraps round
        places = chinese[:-1] & chinese[1:]
        wide = codes.astype(np.uint32)
        free = pc.take(self.table, pa.array(_hash(wide[:-1], wide[1:])), boundscheck=False)
        places &= np.frombuffer(free.buffers()[1], dtype=bool)
        pairs, kept = np.full((len(codes), 2), MARK, dtype=np.uint16), np.ones((len(codes), 2), dtype=bool)
        pairs[:, 0], kept[:-1, 1], kept[-1, 1] = codes, places, False
        return pairs[kept].tobytes().decode("utf-16-le").encode(), int(np.count_nonzero(places))


def _is_chinese(text: bytes) -> bool:
    """Return whether enough of a sample of bytes begin a Chinese character; ids do not depend on it."""
    sample = np.frombuffer(text, dtype=np.uint8)[::61]
    return bool(FEW * np.count_nonzero(_leads(sample)) >= len(sample) > 0)


def _hash(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the places of pairs of code points (uint32) in the table."""
    found: np.ndarray = left * np.uint32(0x9E3779B1) + right * np.uint32(0x85EBCA77)
    return found >> np.uint32(32 - BITS)


def _leads(text: np.ndarray) -> np.ndarray:
    """Return which bytes begin a character from U+4000 to U+9FFF (bool)."""
    return text - np.uint8(0xE4) <= 0xE9 - 0xE4  # what is below wraps round


def _joined(tokens: Iterable[bytes]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Yield the pairs of Chinese characters that tokens join: two rows of code points, each of one with each of other.

    A token may begin within the left character, so that only its last one or two bytes are given, and end within the
    right one.
    """
    end = b"\xff\xff\xff"  # no byte of UTF-8
    text = np.frombuffer(end + end.join(token for token in tokens if not token.isascii()) + end, dtype=np.uint8)
    around = [text[3 + shift : len(text) - 3 + shift] for shift in range(-3, 3)]
    third, second, _, lead, next_, after = around
    inside, leads = [(byte & 0xC0) == 0x80 for byte in around], [_leads(byte) for byte in around]
    low = [byte.astype(np.uint32) & 0x3F for byte in around]
    starts = leads[3] & inside[2]
    # What is given of a character, and the rest of it that may be anything.
    lefts = [
        (leads[0] & inside[1], (third.astype(np.uint32) & 15) << 12 | low[1] << 6 | low[2], np.zeros(1)),
        ((third == 255) & inside[1], low[1] << 6 | low[2], np.arange(4, 10) << 12),
        (second == 255, low[2], np.arange(0x100, 0x280) << 6),
    ]
    rights = [
        (inside[4] & inside[5], (lead.astype(np.uint32) & 15) << 12 | low[4] << 6 | low[5], np.zeros(1)),
        (inside[4] & (after == 255), (lead.astype(np.uint32) & 15) << 12 | low[4] << 6, np.arange(64)),
        (next_ == 255, (lead.astype(np.uint32) & 15) << 12, np.arange(4096)),
    ]
    for is_left, left, before in lefts:
        for is_right, right, behind in rights:
            these = starts & is_left & is_right
            pairs = np.unique(left[these].astype(np.uint64) << np.uint64(16) | right[these])
            yield (
                (pairs >> np.uint64(16)).astype(np.uint32)[:, None] + before.astype(np.uint32),
                (pairs & np.uint64(0xFFFF)).astype(np.uint32)[:, None] + behind.astype(np.uint32),
            )
