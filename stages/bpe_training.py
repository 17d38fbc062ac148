"""The part of train_tokenizer that learns merges: Hugging Face's byte-level BPE, from counted words, in less time.

Words are what a pre-tokenizer cuts; no merge crosses their borders. They are counted once, each kind stands once in one
flat array, and a merge touches only the places where its pair stands, all of them in a few numpy calls. Ties go to the
smaller ids, as in tokenizers' BpeTrainer, so merges and ids are the same; tests and bench/train_tokenizer.py compare.

    words {"aaaa": 2, "ab": 1}, least 2      "a" "a" stands 6 times (a row of 4 has 3)   -> merge "aa", id 256
    words [aa, aa] x 2, [a, b] x 1           "aa" "aa" stands 2 times                    -> merge "aaaa", id 257
                                             "a" "b" stands once, less than 2            -> no more
"""

from __future__ import annotations

import contextlib
import heapq
import importlib.util
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from kit.tokenizer import BYTE_TO_UNICODE, UNICODE_TO_BYTE
from split_patterns import BYTE_LEVEL, LLAMA_3, O200K

PATTERNS = {"byte_level": BYTE_LEVEL, "llama3": LLAMA_3, "o200k": O200K}
ALPHABET = sorted(UNICODE_TO_BYTE)  # the 256 bytes in the order of their ids
# A character in place of each _: beside letters, a digit, marks, spaces, itself, and where a contraction may stand.
PROBE = "a_b A_B 1_2 !_! __  _ \n_\n '_ '_e 'r_ 'l_"

CHUNK = 2**24  # characters counted at once
FEW = 32  # places of a pair up to which a loop is quicker than numpy


def pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer of that name, a key of PATTERNS."""
    if name == "byte_level":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    split = pre_tokenizers.Split(Regex(PATTERNS[name]), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def count_words(documents: Iterable[str], name: str) -> Counter[str]:
    """Return how often each word stands in `documents`, cut as `pre_tokenizer(name)` cuts.

    The pre-tokenizer is slow: gigatoken, where it is installed, cuts as GPT-2 does in a twentieth of its time, `regex`
    cuts by any pattern in a third. They know other versions of Unicode: each character is first shown to both sides,
    and a document that holds one on which they differ is cut by the pre-tokenizer itself.
    """
    exact = pre_tokenizer(name)
    cut, count = _quick(name)
    words: Counter[str] = Counter()
    alike: set[str] = set()
    unlike: set[str] = set()
    waiting: list[str] = []
    size = 0
    ascii_ones = set(map(chr, range(128)))
    for document in documents:
        characters = ascii_ones if document.isascii() else set(document)  # the first of the two costs nothing
        for character in characters - alike - unlike:
            probe = PROBE.replace("_", character)
            (alike if cut(probe) == _cut(exact, probe) else unlike).add(character)
        if unlike and characters & unlike:
            words.update(_cut(exact, document))
            continue
        waiting.append(document)
        size += len(document)
        if size >= CHUNK:
            count(waiting, words)
            waiting, size = [], 0
    count(waiting, words)
    return words


def _quick(name: str) -> tuple[Callable[[str], list[str]], Callable[[list[str], Counter[str]], None]]:
    """Return two functions: cut a text into words, and add the words of documents to a count."""
    if name == "byte_level" and importlib.util.find_spec("gigatoken"):
        from gigatoken.gigatoken_rs import pretokenized_counts, pretokenizer

        def add(documents: list[str], words: Counter[str]) -> None:
            if documents:  # byte 255, which UTF-8 does not use, keeps them apart
                with _no_stderr():
                    found = pretokenized_counts(b"\xff".join(text.encode("utf-8") for text in documents), b"\xff")
                for word, times in found:
                    words[word.decode("utf-8")] += times

        return lambda text: [word.decode("utf-8") for word in pretokenizer(text.encode("utf-8"))], add
    import regex  # type: ignore[import-untyped]

    findall = regex.compile(PATTERNS[name]).findall

    def update(documents: list[str], words: Counter[str]) -> None:
        for text in documents:
            words.update(findall(text))

    return findall, update


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Keep quiet what a library written in Rust says about its progress."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _cut(exact: pre_tokenizers.PreTokenizer, text: str) -> list[str]:
    return [text[first:last] for _, (first, last) in exact.pre_tokenize_str(text)]


def train(words: Counter[str], vocab_size: int, min_frequency: int, specials: list[Any]) -> Tokenizer:
    """Return a byte-level BPE of `vocab_size` entries: `specials` first, the 256 bytes, then what merges make.

    Text never makes a special token: a pair that would is passed over (BpeTrainer gives it the special token's id).
    Raises ValueError when a special token is one of the bytes.
    """
    names = [str(getattr(special, "content", special)) for special in specials]
    if taken := set(names) & set(ALPHABET):
        raise ValueError(f"the special token {min(taken)!r} is a byte of any text; give it a longer name.")
    texts = [*names, *ALPHABET]
    ids = {text: number for number, text in enumerate(texts)}
    byte_ids = np.array([ids[BYTE_TO_UNICODE[byte]] for byte in range(256)], np.int32)
    encoded = [word.encode("utf-8") for word in words]
    symbols = byte_ids[np.frombuffer(b"".join(encoded), np.uint8)]
    lengths = np.array([len(word) for word in encoded], np.int64)
    frequencies = np.array(list(words.values()), np.int64)
    merges = learn(symbols, lengths, frequencies, texts, vocab_size - len(texts), min_frequency)
    tokenizer = Tokenizer(models.BPE(vocab={text: number for number, text in enumerate(texts)}, merges=merges))
    tokenizer.add_special_tokens(specials)
    return tokenizer


def learn(
    ids: np.ndarray, lengths: np.ndarray, frequencies: np.ndarray, texts: list[str], wanted: int, least: int
) -> list[tuple[str, str]]:
    """Return up to `wanted` merges of pairs that stand at least `least` times.

    `ids`: the symbols of all words, one word after the other, int32; `lengths`, `frequencies`: symbols of each word and
    how often it stands; `texts`: what each id means. A new token is appended to `texts`; its id is its place there. A
    pair that would make a text which `texts` holds already, e.g. a special token, is passed over. Two merges never make
    the same token: a stretch of bytes into which no token reaches from outside is put together by its bytes alone.
    """
    least = max(1, least)
    size = len(ids) + len(lengths) + 1
    # numpy sorts 16 bits by radix, several times faster than wider numbers.
    kind = np.uint16 if len(texts) + wanted < 2**16 - 2 else np.uint32
    gap = np.iinfo(kind).max  # between two words
    dead = gap - 1  # the second half of a merged pair
    symbols: Any = np.full(size, gap, kind)
    weights: Any = np.zeros(size, np.int64)
    filled = np.ones(size, bool)
    filled[0] = filled[np.cumsum(lengths + 1)] = False
    symbols[filled], weights[filled] = ids, np.repeat(frequencies, lengths)
    index = np.int32 if size < 2**31 else np.int64
    after: Any = np.arange(1, size + 1, dtype=index)
    before: Any = np.arange(-1, size - 1, dtype=index)

    totals: dict[int, int] = {}  # pair as left << 32 | right -> how often it stands
    where: dict[int, Any] = {}  # the same -> the places of its left half, ascending, some out of date
    heap: list[tuple[int, int]] = []  # (-count, pair), counts out of date at most too high

    def gain(starts: np.ndarray, others: np.ndarray, pair: int, shift: int) -> None:
        """Note the new pairs of `pair` with `others << shift`; one that stands less than `least` times never counts."""
        order = np.argsort(others, kind="stable")
        starts, others = starts[order], others[order]
        edges = _edges(others)
        sums = np.add.reduceat(weights[starts], edges)
        often = np.flatnonzero(sums >= least)
        ends = np.append(edges, len(others))
        rows = zip(others[edges[often]].tolist(), sums[often].tolist(), edges[often], ends[often + 1], strict=True)
        for other, count, first, last in rows:
            key = pair | other << shift
            totals[key], where[key] = count, starts[first:last]
            heapq.heappush(heap, (-count, key))

    def lose(places: np.ndarray, others: np.ndarray, pair: int, shift: int) -> None:
        order = np.argsort(others, kind="stable")
        others = others[order]
        edges = _edges(others)
        lost = np.add.reduceat(weights[places[order]], edges)
        for other, amount in zip(others[edges].tolist(), lost.tolist(), strict=True):
            key = pair | other << shift
            if key in totals:
                totals[key] -= amount

    symbol, weight = memoryview(symbols), memoryview(weights)
    follower, leader = memoryview(after), memoryview(before)

    def merge_few(at: list[int], left: int, right: int, new: int) -> None:
        """Do for a few places, one by one, what numpy does below for many at once."""
        gained: dict[int, int] = {}
        places: dict[int, list[int]] = {}

        def change(lost: int, won: int, place: int) -> None:
            if lost in totals:
                totals[lost] -= weight[at_place]
            elif lost in gained:  # won at the place before, where two merged pairs touch
                gained[lost] -= weight[at_place]
            gained[won] = gained.get(won, 0) + weight[at_place]
            places.setdefault(won, []).append(place)

        for at_place in at:
            second = follower[at_place]
            if symbol[at_place] != left or symbol[second] != right:
                continue
            third, previous = follower[second], leader[at_place]
            symbol[at_place], symbol[second] = new, dead
            follower[at_place], leader[third] = third, at_place
            if (behind := symbol[third]) != gap:
                change(right << 32 | behind, new << 32 | behind, at_place)
            if (ahead := symbol[previous]) != gap:
                change(ahead << 32 | left, ahead << 32 | new, previous)
        for pair, count in gained.items():
            if count >= least:
                totals[pair], where[pair] = count, places[pair]
                heapq.heappush(heap, (-count, pair))

    starts = np.flatnonzero(filled[:-1] & filled[1:]).astype(index)
    starts = starts[np.argsort(symbols[starts], kind="stable")]
    for group in np.split(starts, _edges(symbols[starts])[1:]) if len(starts) else []:
        gain(group, symbols[group + 1], int(symbols[group[0]]) << 32, 0)
    merges: list[tuple[str, str]] = []
    known = set(texts)
    while len(merges) < wanted and heap:
        negative, pair = heapq.heappop(heap)
        count = totals[pair]
        if count != -negative:
            if count >= least:
                heapq.heappush(heap, (-count, pair))
            continue
        left, right = pair >> 32, pair & 0xFFFFFFFF
        at = where.pop(pair)
        del totals[pair]
        text = texts[left] + texts[right]
        if text in known:
            continue
        new = len(texts)
        texts.append(text)
        known.add(text)
        merges.append((texts[left], texts[right]))

        if len(at) <= FEW:
            merge_few(at if isinstance(at, list) else at.tolist(), left, right, new)
            continue
        at = at[symbols[at] == left]
        second = after[at]
        fits = symbols[second] == right
        at, second = at[fits], second[fits]
        if left == right:  # of a row of equal symbols, the first two, the next two, ...
            number = np.arange(len(at))
            in_row = np.concatenate(([False], second[:-1] == at[1:]))
            first = (number - np.maximum.accumulate(np.where(in_row, 0, number))) % 2 == 0
            at, second = at[first], second[first]
        third, previous = after[second], before[at]
        symbols[second] = dead
        behind, ahead = symbols[third], symbols[previous]
        follows, leads = behind != gap, ahead < dead  # where two merged pairs touch, `behind` alone counts the place
        after_it, before_it = at[follows], at[leads]
        if len(after_it):
            lose(after_it, behind[follows], right << 32, 0)
        if len(before_it):
            lose(before_it, ahead[leads], left, 32)
        symbols[at] = new
        after[at], before[third] = third, at
        if len(after_it):
            gain(after_it, symbols[third[follows]], new << 32, 0)
        if len(before_it):
            gain(previous[leads], ahead[leads], new, 32)
    return merges


def _edges(values: np.ndarray) -> np.ndarray:
    """Return where each run of equal values begins."""
    return np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))


def why_not_extensible(tokenizer: dict[str, Any]) -> str | None:
    """Return why merges cannot be appended to what a tokenizer.json holds, None when it is a byte-level BPE."""
    model, steps = tokenizer["model"], tokenizer["pre_tokenizer"] or {}
    if model["type"] != "BPE":
        return f"is of type {model['type']}"
    last = steps["pretokenizers"][-1] if steps.get("type") == "Sequence" else steps
    if last.get("type") != "ByteLevel" or model.get("byte_fallback"):
        return "has no byte-level pre-tokenizer"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "marks the parts of words"
    ids = sorted({*model["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])})
    return None if ids == list(range(len(ids))) else "has gaps between its ids"


def extend(
    base: str, documents: Iterable[str], new_tokens: int, min_frequency: int, where: str
) -> tuple[Tokenizer, int]:
    """Return the tokenizer of `base`, a tokenizer.json without dropout, with new tokens, and how many there are.

    Its training goes on: merges learned on `documents`, as the base cuts them, are appended to its own. So a text is
    cut as ever first and then put together further, ids stay, and any text comes back. A pair that makes a known token
    is passed over: each new token has one merge. Raises ValueError when the base is no byte-level BPE.
    """
    content = json.loads(base)
    if reason := why_not_extensible(content):
        raise ValueError(
            f"{where}/tokenizer.json {reason}: only a byte-level BPE can be extended; "
            "set train_tokenizer.mode to reuse."
        )
    tokenizer, model = Tokenizer.from_str(base), content["model"]
    words: Counter[str] = Counter()
    for document in documents:
        text = tokenizer.normalizer.normalize_str(document) if tokenizer.normalizer else document
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    pieces = [[token.id for token in tokenizer.model.tokenize(word)] for word in words]
    ids = np.fromiter(itertools.chain.from_iterable(pieces), np.int32)
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    texts = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = learn(ids, lengths, np.fromiter(words.values(), np.int64, len(words)), texts, new_tokens, min_frequency)
    outside = [token for token in tokenizer.get_added_tokens_decoder().values() if token.content not in model["vocab"]]
    for token in outside if model.get("ignore_merges") else []:  # a word that stands in the vocabulary is taken whole
        if [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(token.content)] == [token.content]:
            raise ValueError(
                f"{where}: the added token {token.content!r} would be found in plain text; it cannot be extended."
            )
    # Added tokens, too: a loaded tokenizer would number those that do not stand here from the new end on.
    model["vocab"] = {text: number for number, text in enumerate(texts)}
    pairs = [
        f"{left} {right}" if model["merges"] and isinstance(model["merges"][0], str) else [left, right]
        for left, right in merges
    ]
    model["merges"] = model["merges"] + pairs
    extended = Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
    assert all(extended.token_to_id(text) == number for text, number in vocabulary.items())
    return extended, len(merges)
