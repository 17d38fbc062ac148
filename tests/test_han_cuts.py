"""han_cuts: a Chinese text is cut where no token can join two characters; its ids stay those of `tokenizers`."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import han_cuts
from fast_encoder import FastEncoder
from han_cuts import Cuts
from kit.tokenizer import BYTE_TO_UNICODE
from split_patterns import BYTE_LEVEL, LLAMA_3, O200K, QWEN_2
from test_fast_encoder import model, pre_tokenizer, reference, rows, tokenizer

# Characters that share their first bytes, their last ones, both or none; the first and the last of the block.
HAN = "一丁丂中仁法沕沥河律\u5f8c\u4e40\u5000\u9fff"
TEXT = st.text(alphabet=HAN + "，aB 1\n\u3400\u4dbf\ua000🌊é", max_size=30)


@pytest.fixture(autouse=True)
def _however_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut all that may be cut."""
    monkeypatch.setattr(han_cuts, "_is_chinese", lambda text: True)


def joins(token: bytes, left: str, right: str) -> bool:
    """Return whether a token can stand across the place between two characters, whatever is around them."""
    a, b = left.encode(), right.encode()
    return any(
        (a.endswith(token[:at]) or token[:at].endswith(a)) and (b.startswith(token[at:]) or token[at:].startswith(b))
        for at in range(1, len(token))
    )


def test_the_worked_example() -> None:
    assert Cuts(["法律".encode()]).cut("宪法法律".encode()) == ("宪\r法\r法律".encode(), 2)


def test_only_between_chinese_characters() -> None:
    """And not where the mark would not be told from the text's own."""
    cuts = Cuts([])
    for text in ("", "abc", "é，法a法 法", "\u3400\u4dbf\ua000", "\U000323b0法"):
        assert cuts.cut(text.encode()) == (text.encode(), 0)
    assert cuts.cut("法律\r\n".encode()) == ("法律\r\n".encode(), 0)


def test_a_text_of_other_letters_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert Cuts([]).cut(("a" * 1000 + "法律").encode())[1] == 0
    assert Cuts([]).cut(("a" * 100 + "法律" * 100).encode())[1] == 199


@given(tokens=st.lists(st.tuples(TEXT, st.integers(0, 5), st.integers(0, 5)), max_size=8), text=TEXT)
@settings(max_examples=200)
@example(tokens=[("法律", 2, 2)], text="河律法律法律沕")
def test_no_cut_where_a_token_can_join_and_else_a_cut(tokens: list[tuple[str, int, int]], text: str) -> None:
    """Also of tokens that begin or end within a character. Two pairs may share a place in the table: seldom."""
    found = [text.encode()[first : len(text.encode()) - last] for text, first, last in tokens]
    found = [token for token in found if token]
    cut = Cuts(found).cut(text.encode())[0].decode()
    assert cut.replace("\r", "") == text
    at = -1
    for left, right in itertools.pairwise(text):
        at += 1 + (cut[at + 1] == "\r")
        may = "\u4e00" <= left <= "\u9fff" and "\u4e00" <= right <= "\u9fff"
        joined = any(joins(token, left, right) for token in found)
        if cut[at + 1] == "\r":
            assert may and not joined
        elif may and not joined:
            collides(found, left, right)


def collides(tokens: list[bytes], left: str, right: str) -> None:
    """Assert that another pair of characters, which a token joins, has the same place in the table."""
    here = han_cuts._hash(np.array([ord(left)], np.uint32), np.array([ord(right)], np.uint32))
    for lefts, rights in han_cuts._joined(tokens):
        if lefts.size and (han_cuts._hash(lefts[:, :, None], rights[:, None, :]) == here).any():
            return
    raise AssertionError(f"no cut between {left} and {right}")


@pytest.mark.parametrize("first", range(3))
@pytest.mark.parametrize("last", range(3))
def test_a_token_that_begins_or_ends_within_a_character(first: int, last: int) -> None:
    """It joins all characters that have the bytes which it holds, and no other."""
    cuts = Cuts(["法律".encode()[first : 6 - last]])
    alike = {0: "法", 1: "糕", 2: "敕"}[first] + {0: "律", 1: "徊", 2: "忀"}[last]
    for text, n in (("法律", 0), (alike, 0), ("法一", 1), ("一律", 1)):
        assert cuts.cut(text.encode())[1] == n, text


def test_a_cut_that_changes_ids_is_found_by_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("TERROIR_ENCODER", "gigatoken")
    a, b, c = (BYTE_TO_UNICODE[byte] for byte in "法".encode())
    content = model([(a, b), (a + b, c), (a + b + c, a + b + c)])
    assert FastEncoder(tokenizer(content)).name == "gigatoken"
    real = Cuts.__init__
    monkeypatch.setattr(Cuts, "__init__", lambda self, tokens: real(self, []))
    assert "gigatoken: other ids than tokenizers" in FastEncoder(tokenizer(content)).reason


def test_a_vocabulary_of_too_many_pairs_cuts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(han_cuts, "MOST", 10)
    assert Cuts(["河律".encode()[2:]]).cut("法法法".encode())[1] == 0


def merges() -> st.SearchStrategy[list[tuple[str, str]]]:
    """Draw merges of bytes into tokens of Chinese text that often begin or end within a character."""

    def made(picks: list[tuple[str, int, int]]) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        known = set(BYTE_TO_UNICODE.values())
        for text, first, length in picks:
            spelling = "".join(BYTE_TO_UNICODE[byte] for byte in text.encode())[first : first + length]
            for end in range(2, len(spelling) + 1):  # each token of the one before and a byte
                if spelling[:end] not in known:
                    found.append((spelling[: end - 1], spelling[end - 1]))
                    known.add(spelling[:end])
        return found

    pick = st.tuples(st.text(alphabet=HAN, min_size=1, max_size=3), st.integers(0, 4), st.integers(2, 7))
    return st.lists(pick, min_size=1, max_size=5).map(made)


@pytest.mark.parametrize("regex", [BYTE_LEVEL, LLAMA_3, QWEN_2, O200K], ids=["byte", "llama", "qwen", "o200k"])
@given(pairs=merges(), texts=st.lists(TEXT, min_size=1, max_size=4))
@settings(max_examples=40)
@example(pairs=[("a", "b")], texts=["a法律Bd", "法律，法律\n", "a法律法"])
def test_the_ids_are_those_of_tokenizers(regex: str, pairs: list[tuple[str, str]], texts: list[str]) -> None:
    content: dict[str, Any] = model(pairs, pre_tokenizer=pre_tokenizer(regex))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERROIR_ENCODER", "gigatoken")
        found = FastEncoder(tokenizer(content))
    if found.name == "gigatoken":  # else the merges do not make each token of its bytes
        assert rows(found, texts) == reference(content, texts)


def test_text_of_o200k_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pattern takes lower and upper case apart, and a character that is neither on either side."""
    monkeypatch.setenv("TERROIR_ENCODER", "gigatoken")
    monkeypatch.setattr(Cuts, "cut", lambda self, text: pytest.fail("cut"))
    content = model([("a", "b")], pre_tokenizer=pre_tokenizer(O200K))
    found = FastEncoder(tokenizer(content))
    assert found.name == "gigatoken"
    assert rows(found, ["a法律Bd"]) == reference(content, ["a法律Bd"])


def test_text_is_cut_by_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the tests above would show nothing."""
    seen = []
    real = Cuts.cut

    def cut(self: Cuts, text: bytes) -> tuple[bytes, int]:
        seen.append(real(self, text)[1])
        return real(self, text)

    monkeypatch.setattr(Cuts, "cut", cut)
    found = FastEncoder(tokenizer(model([("a", "b")])))
    found.encode(pa.array(["宪法法律"]))
    assert found.name == "gigatoken" and seen[-1] == 3
