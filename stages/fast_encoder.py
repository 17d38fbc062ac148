r"""Encode texts to the ids that `tokenizers` gives, 10 to 100 times faster where that is proved.

The reference is `encode_batch_fast(texts, add_special_tokens=False)` with `encode_special_tokens = True`: text that
looks like a special token is text. Three tiers, MB of English (Chinese) per CPU second:

    gigatoken   300 (30 to 60)     tiktoken   17 (13)     hf, the reference   3 (3.5)

A tier is taken when its library has the version that was compared, the tokenizer has a shape that `read_recipe` lets
through, and `probes`, encoded with the real vocabulary, give the reference's ids. Even then some texts go to the
reference (`reserved`). TERROIR_ENCODER names the fastest tier to try; no result depends on it.

Example, a tokenizer with <s> = 0, each byte + 1, then 257 "ll", 258 "llo":

    FastEncoder(tokenizer).encode(pa.array(["hello", "", "<s>"]))  ->  [105, 102, 258, 61, 116, 63], lengths [3, 0, 3]
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unicodedata import is_normalized

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer, models, pre_tokenizers

from han_cuts import MARK, Cuts
from kit.arrow import compute as pc
from kit.stage_code import version
from kit.tokenizer import BYTE_TO_UNICODE, size
from split_patterns import BYTE_LEVEL, LLAMA_3, O200K, QWEN_2

# Equal ids were shown for these versions alone. With another one the tier is left out until tests/test_fast_encoder.py
# has passed with it and the number here is changed.
COMPARED = {"tokenizers": "0.23.3", "gigatoken": "0.10.0", "tiktoken": "0.14.0"}

# Of the split patterns that were compared, too. cl100k is not among them: Oniguruma reads its {1,3}+ as a repeated
# group, the others as a possessive quantifier ("1234" differs).
SPLITS = (LLAMA_3, QWEN_2, O200K)
# gigatoken classes letters by Unicode 17, tokenizers and tiktoken by 16: of all code points these 4,699 split otherwise
# (a test goes through every one). Rare names are written with some of them, the Han from 323B0.
UNICODE_17 = (
    "088F 0C5C 0CDC 1ACF-1ADD 1AE0-1AEB A7CE-A7CF A7D2 A7D4 A7F1 10940-10959 10EC5-10EC7 10EFA-10EFB 11B60-11B67 "
    "11DB0-11DDB 11DE0-11DE9 16EA0-16EB8 16EBB-16ED3 16FF2-16FF6 187F8-187FF 18D09-18D1E 18D80-18DF2 1E6C0-1E6DE "
    "1E6E0-1E6F5 1E6FE-1E6FF 2B73A-2B73F 2CEA2-2CEAD 323B0-33479"
)
SPANS = [(int(span.split("-")[0], 16), int(span.split("-")[-1], 16)) for span in UNICODE_17.split()]
# Texts are encoded in one call, joined by this code point, which is no character and a special token of the engine's.
SEPARATOR = "\U0010ffff"
# gigatoken 0.10 never forgets a word: up to 2 bytes of memory per byte of Chinese. Starting anew costs 0.04 s (16,384
# entries) to 0.3 s, so it is for 2 kB of text an entry.
RENEW_AFTER = 64 * 2**20  # bytes of text at most
PART = 2**20  # bytes of text encoded at once: it stays in the processor's cache; `tokenizers` takes 130 bytes per token

_TO_LATIN_1 = {ord(character): byte for byte, character in BYTE_TO_UNICODE.items()}

Engine = Callable[[bytes], np.ndarray]  # texts joined by SEPARATOR -> the own numbers of their tokens, uint32


class UnfitError(ValueError):
    """Why a tier cannot be used; the message becomes part of `FastEncoder.reason`."""


@dataclass(frozen=True)
class Recipe:
    """A byte-level BPE in numbers of its own: 0 to 255 are the bytes, the merged tokens follow in order of merging.

    So a token's number is its rank, which is what both libraries take it for. SEPARATOR has the number after the last.
    """

    pattern: str  # how text is split before merging
    number: dict[str, int]  # the spelling of each token -> its own number
    merges: list[tuple[str, str]]
    ids: np.ndarray  # own number -> the tokenizer's id
    literal: list[str]  # added tokens that are not special: `tokenizers` finds them in plain text
    nfc: bool


def _require(what: str, value: object, *allowed: object) -> None:
    if not any(type(value) is type(option) and value == option for option in allowed):
        raise UnfitError(f"{what} is {json.dumps(value)[:60]}")


def read_recipe(tokenizer: Tokenizer) -> Recipe:
    """Return the recipe of a tokenizer whose shape is on the list of those that were compared, or raise UnfitError."""
    config = json.loads(tokenizer.to_str())
    model, pre = config["model"], config["pre_tokenizer"] or {"type": None}
    _require("model.type", model["type"], "BPE")
    # dropout is random, the others change which pieces exist; gigatoken reads none of them but byte_fallback.
    for key in ("dropout", "unk_token"):
        _require(f"model.{key}", model[key], None)
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        _require(f"model.{key}", model[key], None, "")
    for key in ("fuse_unk", "byte_fallback"):
        _require(f"model.{key}", model[key], False)
    for key in ("truncation", "padding"):
        _require(key, config[key], None)
    # The NFC of `tokenizers` is of an old Unicode and not imitated: a text that is not in NFC is reserved.
    _require("normalizer", config["normalizer"], None, {"type": "NFC"})
    pattern = BYTE_LEVEL
    if pre["type"] == "Sequence" and [step["type"] for step in pre["pretokenizers"]] == ["Split", "ByteLevel"]:
        first, pre = pre["pretokenizers"]
        # gigatoken looks at the pattern alone: it takes each behaviour for Isolated, and invert for false.
        _require("Split.behavior", first["behavior"], "Isolated")
        _require("Split.invert", first["invert"], False)
        _require("Split.pattern", first["pattern"], *({"Regex": known} for known in SPLITS))
        pattern = first["pattern"]["Regex"]
    # gigatoken takes no pre-tokenizer at all for ByteLevel, and never splits twice.
    _require("pre_tokenizer", pre["type"], "ByteLevel")
    _require("ByteLevel.add_prefix_space", pre["add_prefix_space"], False)
    _require("ByteLevel.use_regex", pre["use_regex"], pattern == BYTE_LEVEL)

    number, merges = {spelling: byte for byte, spelling in sorted(BYTE_TO_UNICODE.items())}, []
    for left, right in model["merges"]:
        if left not in number or right not in number:
            raise UnfitError(f"the merges do not stand in the order of their tokens ({left!r} with {right!r})")
        if left + right not in number:  # a later merge to the same token never happens: `_check_proper`
            number[left + right] = len(number)
            merges.append((left, right))
    lost = [spelling for spelling in number if spelling not in model["vocab"]]
    if lost:
        raise UnfitError(f"the vocabulary lacks bytes ({len(lost)}, the first spelt {lost[0]!r})")
    _check_proper(number, merges)
    if model["ignore_merges"] and len(number) < len(model["vocab"]):
        raise UnfitError("with ignore_merges the vocabulary has tokens that no merge makes")
    ids = np.array([model["vocab"][spelling] for spelling in number])
    special = {token["id"]: token["content"] for token in config["added_tokens"] if token["special"]}
    if reached := special.keys() & set(ids.tolist()):
        raise UnfitError(f"plain text can become the special token {special[min(reached)]!r}")
    literal = [token["content"] for token in config["added_tokens"] if not token["special"]]
    nfc = config["normalizer"] is not None
    if nfc and not all(is_normalized("NFC", content) for content in literal):
        raise UnfitError("an added token is not in NFC, and the normalizer is")
    return Recipe(pattern, number, merges, ids, literal, nfc)


def _check_proper(number: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Raise UnfitError unless each token's own bytes encode to it.

    tiktoken joins two neighbours whenever together they spell a token, `tokenizers` only where a merge lists this pair.
    Both do the same if the bytes of a token, encoded alone, give the token: then any two neighbours that spell it are
    the pair of its merge, as no other pair of tokens comes about from these bytes.
    """
    plain = Tokenizer(models.BPE(number, merges))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # a spelling has no white space
    if plain.encode_batch_fast([" ".join(number)])[0].ids != list(range(len(number))):  # two thirds of `encode`
        raise UnfitError("the merges do not make each token of its own bytes")


def _check_version(name: str) -> None:
    found = version(name)
    if not found:
        raise UnfitError("not installed")
    if found != COMPARED[name]:
        raise UnfitError(f"{name} {found} was not compared, {COMPARED[name]} was")


def _gigatoken(recipe: Recipe) -> Engine:
    import gigatoken

    split: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if recipe.pattern != BYTE_LEVEL:
        first = {"type": "Split", "pattern": {"Regex": recipe.pattern}, "behavior": "Isolated", "invert": False}
        split = {"type": "Sequence", "pretokenizers": [first, {**split, "use_regex": False}]}
    model = {"type": "BPE", "vocab": recipe.number, "merges": recipe.merges}
    options = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    separator = {"id": len(recipe.number), "content": SEPARATOR, "special": True, **options}
    text = json.dumps({"model": model, "pre_tokenizer": split, "added_tokens": [separator], "normalizer": None})
    renew_after = min(RENEW_AFTER, 2048 * len(recipe.number))
    encoder, left = gigatoken.Tokenizer.from_json(text), renew_after
    cuts = Cuts(spelling.translate(_TO_LATIN_1).encode("latin-1") for spelling in recipe.number)

    def encode(joined: bytes) -> np.ndarray:
        if recipe.pattern == O200K:
            return whole(joined)
        cut, marks = cuts.cut(joined)
        numbers = whole(cut)
        return numbers[numbers != MARK] if marks else numbers

    def whole(joined: bytes) -> np.ndarray:
        nonlocal encoder, left
        left -= len(joined)
        if left < 0:
            encoder, left = gigatoken.Tokenizer.from_json(text), renew_after - len(joined)
        return encoder.encode(joined)  # on this thread, so it survives a fork

    return encode


def _tiktoken(recipe: Recipe) -> Engine:
    import tiktoken

    ranks = {spelling.translate(_TO_LATIN_1).encode("latin-1"): rank for spelling, rank in recipe.number.items()}
    special = {SEPARATOR: len(ranks)}
    encoding = tiktoken.Encoding("own", pat_str=recipe.pattern, mergeable_ranks=ranks, special_tokens=special)
    return lambda joined: encoding.encode_to_numpy(joined.decode(), allowed_special="all")


ENGINES: dict[str, Callable[[Recipe], Engine]] = {"gigatoken": _gigatoken, "tiktoken": _tiktoken}

KINDS = ("a", "Z", "7", "!", "'", "s", " ", "\n", "\r", "\t", "法", "é", "\u0301", "\xa0", "/", "\u3000", "🌊")
PROBES = (
    *("", "a", " ", "\n", "\x00", "\x00\x01\x1f\x7f\x80\x9f", "\ufeffmark", "\ufffd\ufffe\uffff", SEPARATOR * 2),
    *("It's we'll I'VE you'Re 'tis 'S x'd don’t", "HTTPServer iPhone McDonald ǅ ǅungla ªº", "e\u0301 é Å \u212b ﬁ"),
    *("第一条　为了保护公民的合法权益,根据宪法,制定本法。\n\n  第二条 ", "㐀䶵𠀀𪜶鿿﨎", "你好world你好123"),
    *("한국어 カタカナ ひらがな ไทย हिन्दी العربية עברית", "1234567890 ١٢٣ ⅷ ½ 一二三 １２３"),
    *("👩\u200d👩\u200d👧🏽 🇨🇳 ❤\ufe0f", "é\u0301 n\u0303 가 가 ﬃ Ω"),
    *("a  b   c\t\t\nd \n \r\n\r\n e ", " " * 300 + "x", "\n" * 300, "\u2028\u2029\x85\x0b\x0c", "\t \t \n"),
    *("ab" * 600, "法" * 700, "." * 500, "7" * 400, "e" + "\u0301" * 300, "👍" * 200, "-=" * 300 + "\r\n/"),
    *("http://a.b/c?d=e&f#g //x/\n/", "def f(x):\n    return x**2  # ok\n", "<|im_start|>user\n{{ x }}</s>"),
)


def probes(tokenizer: Tokenizer) -> list[str]:
    """Return texts that betray a tier which splits, merges or numbers otherwise; each token of the vocabulary is in."""
    pairs = [f"{a}{b}{c}" for a, b, c in itertools.product(KINDS, KINDS, KINDS[::6])]
    texts = [*PROBES, *("".join(pairs[start : start + 9]) for start in range(0, len(pairs), 9))]
    # Neighbours of what only gigatoken knows: old letters and code points without a character.
    for code in {code for first, last in SPANS for code in (first - 1, last + 1)}:
        texts.append(f"a{chr(code)}b 1{chr(code)} !{chr(code)}{chr(code)}\n{chr(code)}")
    for token in list(tokenizer.get_added_tokens_decoder().values())[:30]:
        texts += [token.content, f"a{token.content}b {token.content} {token.content * 2}\n"]
    ids = range(size(tokenizer))
    return texts + [
        tokenizer.decode(list(ids[start : start + 50]), skip_special_tokens=False) for start in range(0, len(ids), 50)
    ]


class FastEncoder:
    """Encodes texts with the fastest tier that gives the reference's ids.

    `name` is the tier that was taken; `reason` says, for each faster one, why it was not. Raises SystemExit when
    TERROIR_ENCODER names no tier.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Each worker encodes on its own, and after a fork the threads of `tokenizers` are gone.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.dtype = np.uint16 if size(tokenizer) <= 2**16 else np.uint32
        tiers = [*ENGINES, "hf"]
        wanted = os.environ.get("TERROIR_ENCODER") or tiers[0]
        if wanted not in tiers:
            raise SystemExit(f"TERROIR_ENCODER is {wanted!r}: set it to {', '.join(tiers[:-1])} or {tiers[-1]}.")
        self.name = "hf"
        self.engine: Engine | None = None
        refused = []
        for name in tiers[tiers.index(wanted) : -1]:
            try:
                self._take(name)
                break
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a panic in Rust is no Exception
                self.name, self.engine = "hf", None
                refused.append(f"{name}: {error if isinstance(error, UnfitError) else repr(error)}")
        self.reason = "; ".join(refused)

    def _take(self, name: str) -> None:
        """Take a tier and prove it on `probes`, or raise UnfitError."""
        _check_version("tokenizers")
        _check_version(name)
        recipe = read_recipe(self.tokenizer)
        self.engine, self.name, self.nfc = ENGINES[name](recipe), name, recipe.nfc
        # By the engine's number, of which the last is SEPARATOR's.
        self.ids = pa.array(np.append(recipe.ids, 0).astype(self.dtype))
        self.bytes = pa.array([*map(len, recipe.number), 0], pa.uint16())
        # The letters of Unicode 17 are no problem of tiktoken, but rare enough.
        spans = [*SPANS, (ord(SEPARATOR), ord(SEPARATOR))]
        classes = "".join(rf"\x{{{first:X}}}-\x{{{last:X}}}" for first, last in spans)
        self.pattern = "|".join([f"[{classes}]", *map(re.escape, recipe.literal)])
        # Each text that matches has one of these bytes; to find that none has them takes a tenth of the time.
        leads = {chr(end).encode()[:1] for span in spans for end in span}
        self.hints = [*sorted(leads), *(content.encode() for content in recipe.literal)]
        texts = pa.array(probes(self.tokenizer))
        right = self._reference(texts)
        # Twice, for both libraries remember words; those with Chinese words apart, for only Chinese text is cut.
        words = pc.match_substring_regex(texts, r"[\x{4E00}-\x{9FFF}]{2}").to_numpy(zero_copy_only=False)
        apart = interleave(words, *(self.encode(texts.filter(pa.array(rows))) for rows in (words, ~words)))
        for found in (apart, self.encode(texts)):
            if not all(map(np.array_equal, found, right)):
                raise UnfitError("other ids than tokenizers for the designed texts")

    def encode(self, texts: pa.Array, known: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts (a string array without nulls) one after the other, and how many each has.

        known: of each text its id where it is one special token, else -1 (int64); None: each text is plain.
        ids: uint16 up to 65,536 entries, else uint32; lengths: int64. Raises ValueError when the tokens of a fast tier
        do not have as many bytes as the texts.
        """
        known = np.full(len(texts), -1) if known is None else known
        reach = np.cumsum(pc.binary_length(texts).to_numpy(), dtype=np.int64)
        total = int(reach[-1]) if len(reach) else 0
        # A text across a border begins a part.
        ends = np.unique([0, *np.searchsorted(reach, np.arange(PART, total, PART)), len(texts)]).tolist()
        parts = [
            self._part(texts.slice(begin, end - begin), known[begin:end]) for begin, end in itertools.pairwise(ends)
        ]
        if len(parts) == 1:
            return parts[0]
        ids, lengths = zip((np.zeros(0, dtype=self.dtype), np.zeros(0, dtype=np.int64)), *parts, strict=True)
        return np.concatenate(ids), np.concatenate(lengths)

    def _part(self, texts: pa.Array, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        plain = known < 0
        reserved = plain & self._reserved(texts) if self.engine else plain
        return self._mixed(texts, known, reserved) if reserved.any() else self._fast(texts, known)

    def _mixed(self, texts: pa.Array, known: np.ndarray, reserved: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Leave the `reserved` texts to the reference."""
        rest = self._reference(texts.filter(pa.array(reserved)))
        return interleave(reserved, rest, self._fast(texts.filter(pa.array(~reserved)), known[~reserved]))

    def _reserved(self, texts: pa.Array) -> np.ndarray:
        """Return which texts only the reference may encode (bool).

        Those with SEPARATOR, a letter of Unicode 17, an added token that is not special, or still to be brought to NFC.
        """
        rows, text = np.zeros(len(texts), dtype=bool), utf8(texts).tobytes()
        if any(hint in text for hint in self.hints):
            rows |= pc.match_substring_regex(texts, self.pattern).to_numpy(zero_copy_only=False)
        if self.nfc and not is_normalized("NFC", text.decode()):
            rows |= np.array([not is_normalized("NFC", text) for text in texts.to_pylist()], dtype=bool)
        return rows

    def _fast(self, texts: pa.Array, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        special = known >= 0
        if special.all():
            return known.astype(self.dtype), np.ones(len(known), dtype=np.int64)
        assert self.engine
        # SEPARATOR stands in the place of a special token, and behind a text that another one follows.
        followed = np.append(~(special[:-1] | special[1:]), False)
        joined = pc.if_else(pa.array(special), SEPARATOR, texts)
        if followed.any():
            joined = pc.binary_join_element_wise(joined, pc.if_else(pa.array(followed), SEPARATOR, ""), "")
        try:
            numbers = self.engine(utf8(joined).tobytes())
        except ValueError:  # tiktoken's regular expressions give up on a million blanks in a row
            return self._mixed(texts, known, ~special)
        places, marked = np.flatnonzero(numbers == len(self.ids) - 1), special | followed
        # Arrow takes by uint32 as it stands; numpy makes 8 bytes of each number first: five times the CPU seconds.
        taken, numbers = pc.take(self.ids, pa.array(numbers)), pa.array(numbers)
        found = pc.sum(pc.take(self.bytes, numbers, boundscheck=False)).as_py() or 0
        wanted = int(pc.binary_length(texts).to_numpy()[~special].sum())
        if (len(places), found) != (np.count_nonzero(marked), wanted):
            raise ValueError(f"{self.name} made {found:,} bytes of {wanted:,}; set TERROIR_ENCODER=hf and report it.")
        ids = np.frombuffer(taken.buffers()[1], dtype=self.dtype)
        ids[places[special[marked]]] = known[special]
        # A text ends at the next SEPARATOR, or with the part.
        ends = np.append(places, len(ids))[np.cumsum(marked) - marked] + special
        lengths = np.diff(ends, prepend=0)
        lengths[1:] -= followed[:-1]
        return np.delete(ids, places[followed[marked]]) if followed.any() else ids, lengths

    def _reference(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        encoded = self.tokenizer.encode_batch_fast(texts.to_pylist(), add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=self.dtype) for encoding in encoded]
        return np.concatenate([np.zeros(0, dtype=self.dtype), *ids]), np.array([len(i) for i in ids], dtype=np.int64)


def interleave(
    chosen: np.ndarray, these: tuple[np.ndarray, np.ndarray], others: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and lengths of rows of which the `chosen` (bool) come from `these`, the rest from `others`.

    >>> interleave(np.array([True, False]), (np.array([7]), np.array([1])), (np.array([8, 9]), np.array([2])))
    (array([7, 8, 9]), array([1, 2]))
    """
    lengths = np.zeros(len(chosen), dtype=np.int64)
    lengths[chosen], lengths[~chosen] = these[1], others[1]
    place = np.repeat(chosen, lengths)
    ids = np.empty(len(place), dtype=others[0].dtype)
    ids[place], ids[~place] = these[0], others[0]
    return ids, lengths


def utf8(texts: pa.Array) -> np.ndarray:
    """Return the bytes of a string array (uint8), without a copy."""
    _, offsets, text = texts.buffers()
    if text is None or not len(texts):
        return np.zeros(0, dtype=np.uint8)
    ends = np.frombuffer(offsets, dtype=np.int32)
    return np.frombuffer(text, dtype=np.uint8)[ends[texts.offset] : ends[texts.offset + len(texts)]]
