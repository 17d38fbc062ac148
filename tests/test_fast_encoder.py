"""fast_encoder: the ids of `tokenizers`, whatever the text; a tokenizer of another shape is left to `tokenizers`."""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gigatoken
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import fast_encoder
import train_tokenizer
from conftest import ROOT
from fast_encoder import SEPARATOR, FastEncoder, UnfitError, read_recipe
from kit.tokenizer import BYTE_TO_UNICODE
from split_patterns import BYTE_LEVEL, LLAMA_3, O200K, QWEN_2

FAST = ["gigatoken", "tiktoken"]
CORPUS = [
    "The quick brown fox's 1234 jumps, we'll see; HTTPServer v2.0 -- it's 'quoted'.\n\n\tdef f(x): return x  # ok\r\n",
    "第一条　为了保护公民的合法权益，根据宪法，制定本法。第二条 中华人民共和国公民 2024年。",
    "naïve café résumé e\u0301 ﬁne Ünïcödé 한국어 カタカナ ไทย العربية 👩\u200d👩\u200d👧 🇨🇳 <|im_start|> </s> <s>",
]
# Where tiers would differ: classes of characters, ends of white space, marks, look-alikes, letters of Unicode 17.
PIECES = [
    *("<s>", "</s>", "<|im_end|>", "'s", "'LL", "'", " ", "  ", "\n", "\r\n", "\t", "\x00", "\x7f", "\x85", "\xa0"),
    *("\u3000", "\u200d", "\ufeff", "a", "Z", "ǅ", "ª", "ß", "ſ", "K", "e\u0301", "é", "\u0301", "\u0e33", "\u093e"),
    *(
        "1",
        "12345",
        "١",
        "½",
        "Ⅷ",
        "一",
        "法律",
        "𠀀",
        "\U000323b0",
        "\u1acf",
        "\ua7ce",
        "👍🏽",
        "가",
        "가",
        "/",
        ".",
        "!!",
    ),
    *(SEPARATOR, "\ufffd", "\ue000", "\U0010fffe", "<tool>"),
]
TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map("".join)
SPLITS = {"byte_level": BYTE_LEVEL, "llama_3": LLAMA_3, "qwen_2": QWEN_2, "o200k": O200K}


def config(regex: str = BYTE_LEVEL, **changes: Any) -> dict[str, Any]:
    """Return the tokenizer.json of a byte-level BPE of 600 entries, as train_tokenizer makes it, with another split."""
    params = train_tokenizer.Params(mode="train", vocab_size=600, min_frequency=1)
    content: dict[str, Any] = json.loads(train_tokenizer.train(iter(CORPUS), params).to_str())
    return {**content, "pre_tokenizer": pre_tokenizer(regex), **changes}


def pre_tokenizer(regex: str, **changes: Any) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex == BYTE_LEVEL}
    if regex == BYTE_LEVEL:
        return {**level, **changes}
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False, **changes}
    return {"type": "Sequence", "pretokenizers": [split, level]}


def tokenizer(content: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(content))


def reference(case: str | dict[str, Any], texts: list[str]) -> list[list[int]]:
    """Return the ids that `tokenizers` gives with the tokenizer of a case, or a tokenizer.json."""
    plain = tokenizer_of(case) if isinstance(case, str) else tokenizer(case)
    plain.encode_special_tokens = True
    return [encoding.ids for encoding in plain.encode_batch(texts, add_special_tokens=False)]


@functools.cache
def tokenizer_of(case: str) -> Tokenizer:
    return tokenizer(CASES[case])


def rows(encoder: FastEncoder, texts: list[str]) -> list[list[int]]:
    ids, lengths = encoder.encode(pa.array(texts, pa.string()))
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if texts else []


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FastEncoder]:
    """Make the encoder of a tokenizer.json with one tier asked for."""

    def make(content: dict[str, Any], name: str) -> FastEncoder:
        monkeypatch.setenv("TERROIR_ENCODER", name)
        return FastEncoder(tokenizer(content))

    return make


def model(merges: list[tuple[str, str]], **changes: Any) -> dict[str, Any]:
    """Return a tokenizer.json of the bytes and some merges, without special tokens."""
    entries = [*BYTE_TO_UNICODE.values(), *dict.fromkeys(left + right for left, right in merges)]
    content = config(added_tokens=[], post_processor=None)
    vocab = {spelling: number for number, spelling in enumerate(entries)}
    return {**content, "model": {**content["model"], "vocab": vocab, "merges": merges}, **changes}


# Each pair of bytes but two of other characters than ASCII is a token: ids then tell of each place where text is split.
PAIRS = [(a, b) for (x, a), (y, b) in itertools.product(BYTE_TO_UNICODE.items(), repeat=2) if min(x, y) < 128]
TOOL = {"content": "<tool>", "special": False, "single_word": False, "lstrip": False, "rstrip": False}
CASES = {
    **{name: model(PAIRS, pre_tokenizer=pre_tokenizer(regex)) for name, regex in SPLITS.items()},
    "trained": config(),
    "nfc": config(QWEN_2, normalizer={"type": "NFC"}),
    "ignore_merges": model([("a", "b"), ("ab", "c"), ("\u0120", "abc")], pre_tokenizer=pre_tokenizer(LLAMA_3)),
    "literal": config(added_tokens=[*config()["added_tokens"], {**TOOL, "id": 600, "normalized": False}]),
}
CASES["ignore_merges"]["model"]["ignore_merges"] = True


@functools.cache
def encoder(case: str, name: str) -> FastEncoder:
    """Return the encoder of a case, which must be of the tier that is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERROIR_ENCODER", name)
        found = FastEncoder(tokenizer(CASES[case]))
    assert found.name == name, found.reason
    return found


def test_the_worked_example_of_the_docstring() -> None:
    vocab = {spelling: byte + 1 for byte, spelling in BYTE_TO_UNICODE.items()}
    vocab = {"<s>": 0, **dict(sorted(vocab.items(), key=lambda item: item[1])), "ll": 257, "llo": 258}
    content = config()
    content["model"] |= {"vocab": vocab, "merges": [["l", "l"], ["ll", "o"]]}
    content["added_tokens"] = content["added_tokens"][:1]
    ids, lengths = FastEncoder(tokenizer({**content, "post_processor": None})).encode(pa.array(["hello", "", "<s>"]))
    assert ids.tolist() == [105, 102, 258, 61, 116, 63]
    assert lengths.tolist() == [3, 0, 3]


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("case", CASES)
@given(texts=st.lists(TEXT, max_size=6))
@example(texts=[])
@example(texts=["", "", SEPARATOR, SEPARATOR + "a" + SEPARATOR, ""])
@example(texts=["\U000323b0a", "plain", "\u1acf 1"])
@example(texts=["<tool>", "a<tool>b <s>", "e\u0301 é", "plain"])
def test_a_fast_tier_gives_the_ids_of_tokenizers(case: str, name: str, texts: list[str]) -> None:
    """Also for several texts at once, of which some only the reference may encode."""
    assert rows(encoder(case, name), texts) == reference(case, texts)


@pytest.mark.parametrize("name", FAST)
def test_the_texts_may_be_a_part_of_a_longer_array(name: str) -> None:
    texts = pa.array(["first", "it's 法律", "", "last\U000323b0", "more"])
    ids, lengths = encoder("byte_level", name).encode(texts.slice(1, 3))
    wanted = reference("byte_level", texts.slice(1, 3).to_pylist())
    assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == wanted


@pytest.mark.parametrize("name", [*FAST, "hf"])
@given(texts=st.lists(TEXT, max_size=6), size=st.integers(1, 60))
def test_the_ids_do_not_depend_on_how_much_is_encoded_at_once(name: str, texts: list[str], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_encoder, "PART", size)
        assert rows(encoder("trained", name), texts) == reference("trained", texts)


@pytest.mark.parametrize("name", [*FAST, "hf"])
@given(segments=st.lists(TEXT | st.integers(0, 2), max_size=9), size=st.integers(1, 60))
@example(segments=[0, 1, 2], size=60)
@example(segments=["plain", "beside plain", 1, "", "", 0], size=60)
@example(segments=[0, "\U000323b0", 1, 0, "plain", "\U000323b0", "plain", 1], size=60)
def test_special_tokens_stand_where_they_are_known(name: str, segments: list[str | int], size: int) -> None:
    """Whatever stands around them, also texts that only the reference may encode; their own text is not read."""
    # The text of a special token may hold what only the reference may encode.
    texts = pa.array(["<s>\U000323b0" if isinstance(segment, int) else segment for segment in segments], pa.string())
    known = np.array([segment if isinstance(segment, int) else -1 for segment in segments], dtype=np.int64)
    plain = iter(reference("trained", [segment for segment in segments if isinstance(segment, str)]))
    wanted = [[segment] if isinstance(segment, int) else next(plain) for segment in segments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_encoder, "PART", size)
        ids, lengths = encoder("trained", name).encode(texts, known)
    assert ids.tolist() == [number for row in wanted for number in row]
    assert lengths.tolist() == [len(row) for row in wanted]


@pytest.mark.parametrize(
    "case", ["byte_level", *(pytest.param(n, marks=pytest.mark.slow) for n in SPLITS if n != "byte_level")]
)
def test_every_code_point_is_split_as_tokenizers_splits_it(case: str) -> None:
    """By gigatoken, which classes characters itself. Between the planes 3 and 14 no character is assigned."""
    codes = [*range(0xD800), *range(0xE000, 0x34000), *range(0x34000, 0x110000, 997), *range(0xE0000, 0xE0200)]
    frames = ("a{}b", "1{}.", "A{}B", " {}\n", "\n{}'s", "x'{}e")
    texts = [
        "".join(frame.format(chr(code)) for code in codes[start : start + 64] for frame in frames)
        for start in range(0, len(codes), 64)
    ]
    found = encoder(case, "gigatoken")
    reserved = found._reserved(pa.array(texts))
    assert reserved.mean() < 0.05
    assert rows(found, texts) == reference(case, texts)


@pytest.mark.parametrize("case", SPLITS)
def test_letters_of_unicode_17_are_left_to_tokenizers(case: str) -> None:
    """gigatoken takes them for letters, tokenizers does not yet; when it does, the list can go."""
    codes = [code for first, last in fast_encoder.SPANS for code in range(first, last + 1)]
    texts = pa.array([f"a{chr(code)}b" for code in codes])
    found = encoder(case, "gigatoken")
    assert len(codes) == 4699
    assert found._reserved(texts).all()
    assert found._fast(texts, np.full(len(texts), -1))[0].tolist() != [
        i for ids in reference(case, texts.to_pylist()) for i in ids
    ]


def test_long_runs_are_encoded(engine: Callable[..., FastEncoder]) -> None:
    """tiktoken gives up on the blanks; then the reference does it."""
    texts = [" " * 999_999 + "x", "法" * 20_000, "ab" * 50_000, "\n" * 50_000]
    blanks = texts[0].encode()
    with pytest.raises(ValueError, match="Max stack size"):
        encoder("byte_level", "tiktoken").engine(blanks)  # type: ignore[misc]
    for name in FAST:
        assert rows(encoder("byte_level", name), texts) == reference("byte_level", texts), name


def test_gigatoken_begins_anew_before_its_memory_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_encoder, "RENEW_AFTER", 1000)
    real, made = gigatoken.Tokenizer.from_json, []
    new = SimpleNamespace(from_json=lambda text: made.append(text) or real(text))
    monkeypatch.setattr(gigatoken, "Tokenizer", new)
    found = FastEncoder(tokenizer(CASES["trained"]))
    assert found.name == "gigatoken"
    rows(found, ["a" * 999])
    before = len(made)
    for number in range(30):
        texts = [f"word{number} 法律 " * 20]
        assert rows(found, texts) == reference("trained", texts)
    # 260 or 280 bytes each: a new one for the first and for each third after it.
    assert len(made) - before == 10
    assert set(made) == {made[0]}


def changed(**model: Any) -> dict[str, Any]:
    content = config()
    return {**content, "model": {**content["model"], **model}}


def name_of(entry: int) -> str:
    return next(name for name, number in config()["model"]["vocab"].items() if number == entry)


def without_the_byte_a() -> dict[str, Any]:
    vocab = {name: number for name, number in config()["model"]["vocab"].items() if "a" not in name}
    merges = [pair for pair in config()["model"]["merges"] if "a" not in "".join(pair)]
    return changed(vocab=vocab, merges=merges)


def improper() -> dict[str, Any]:
    """The token "abc" is made of "ab" and "c", but "bc" is merged first: it never comes about in `tokenizers`."""
    return model([("b", "c"), ("a", "b"), ("ab", "c")])


def out_of_order() -> dict[str, Any]:
    content = improper()
    content["model"]["merges"] = [("ab", "c"), ("a", "b"), ("b", "c")]
    return content


CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CJK = {"type": "Split", "pattern": {"Regex": r"\p{Han}"}, "behavior": "Isolated", "invert": False}
SEQUENCE: list[Any] = [CJK, {**pre_tokenizer(BYTE_LEVEL)}]
TRUNCATION = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    **{"strategy": {"Fixed": 500}, "direction": "Right", "pad_to_multiple_of": None},
    **{"pad_id": 2, "pad_type_id": 0, "pad_token": "<pad>"},
}
UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": (changed(dropout=0.1), "model.dropout is 0.1"),
    "unk_token": (changed(unk_token="a"), "model.unk_token"),
    "continuing_subword_prefix": (changed(continuing_subword_prefix="##", merges=[]), "continuing_subword_prefix"),
    "end_of_word_suffix": (changed(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "fuse_unk": (changed(fuse_unk=True), "fuse_unk"),
    "byte_fallback": (changed(byte_fallback=True), "byte_fallback"),
    "another model": (config(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}), "model.type"),
    "NFKC": (config(normalizer={"type": "NFKC"}), "normalizer"),
    "lower case": (config(normalizer={"type": "Lowercase"}), "normalizer"),
    "two normalizers": (config(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]}), "normalizer"),
    "prefix space": (config(pre_tokenizer=pre_tokenizer(BYTE_LEVEL, add_prefix_space=True)), "add_prefix_space"),
    "no regex": (config(pre_tokenizer=pre_tokenizer(BYTE_LEVEL, use_regex=False)), "use_regex"),
    "no split at all": (config(pre_tokenizer=None), "pre_tokenizer is null"),
    "white space": (config(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer"),
    "removed": (config(pre_tokenizer=pre_tokenizer(LLAMA_3, behavior="Removed")), "Split.behavior"),
    "inverted": (config(pre_tokenizer=pre_tokenizer(LLAMA_3, invert=True)), "Split.invert"),
    "a plain string": (config(pre_tokenizer=pre_tokenizer(LLAMA_3, pattern={"String": " "})), "Split.pattern"),
    "cl100k": (config(CL100K), "Split.pattern"),
    "CJK, then ByteLevel": (config(pre_tokenizer={"type": "Sequence", "pretokenizers": SEQUENCE}), "Split.pattern"),
    "two splits": (
        config(pre_tokenizer={"type": "Sequence", "pretokenizers": [CJK, *pre_tokenizer(LLAMA_3)["pretokenizers"]]}),
        "pre_tokenizer",
    ),
    "a missing byte": (without_the_byte_a(), "lacks bytes"),
    "a token that does not come about": (improper(), "do not make each token"),
    "merges out of order": (out_of_order(), "order of their tokens"),
    "a vocabulary without merges": (changed(ignore_merges=True), "no merge makes"),
    "text becomes special": (
        config(added_tokens=[{**config()["added_tokens"][0], "id": 300, "content": name_of(300)}]),
        "can become",
    ),
    "truncation": (config(truncation=TRUNCATION), "truncation"),
    "padding": (config(padding=PADDING), "padding"),
    "an added token that NFC changes": (
        config(
            normalizer={"type": "NFC"},
            added_tokens=[*config()["added_tokens"], {**TOOL, "id": 600, "content": "e\u0301", "normalized": True}],
        ),
        "an added token is not in NFC",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_tokenizer_of_another_shape_is_refused(case: str) -> None:
    content, reason = UNFIT[case]
    with pytest.raises(UnfitError, match=reason):
        read_recipe(tokenizer(content))


@pytest.mark.parametrize("case", sorted(UNFIT.keys() - {"dropout", "truncation", "padding"}))
def test_and_is_left_to_tokenizers(case: str) -> None:
    """The texts go the same way as ever; `reason` says why for both tiers."""
    content, reason = UNFIT[case]
    found = FastEncoder(tokenizer(content))
    assert found.name == "hf"
    assert len(found.reason.split("; tiktoken: ")) == 2 and reason in found.reason
    assert rows(found, CORPUS) == reference(content, CORPUS)


@pytest.mark.parametrize("name", [*FAST, "hf"])
def test_truncation_and_padding_take_and_add_no_token(engine: Callable[..., FastEncoder], name: str) -> None:
    """As transformers leaves them in the tokenizer.json of a model that was trained with them."""
    found = engine(config(truncation=TRUNCATION, padding=PADDING), name)
    assert found.name == name, found.reason
    assert rows(found, CORPUS) == reference("trained", CORPUS)


@pytest.mark.parametrize("right", [0, 2])
@pytest.mark.parametrize("name", FAST)
def test_a_tier_that_differs_on_one_designed_text_is_not_taken(
    name: str, right: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it is right for two calls, those with and without Chinese words, and then remembers a word wrongly."""
    real, calls = fast_encoder.ENGINES[name], itertools.count(1)

    def wrong(recipe: fast_encoder.Recipe) -> fast_encoder.Engine:
        encode = real(recipe)

        def engine(joined: bytes) -> np.ndarray:
            numbers = encode(joined).copy()
            places = np.flatnonzero(numbers == recipe.number["Z"])
            if next(calls) > right:
                numbers[places[-1:]] = recipe.number["Y"]  # one token of thousands, of the same length
            return numbers

        return engine

    monkeypatch.setitem(fast_encoder.ENGINES, name, wrong)
    monkeypatch.setenv("TERROIR_ENCODER", name)
    found = FastEncoder(tokenizer(CASES["byte_level"]))
    assert found.name != name
    assert f"{name}: other ids than tokenizers" in found.reason
    assert rows(found, ["Z a Z"]) == reference("byte_level", ["Z a Z"])


def test_a_tier_that_fails_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even with a panic, which is no Exception in Python; but who presses Ctrl-C means the stage."""

    class Panic(BaseException):
        pass

    def fails(recipe: fast_encoder.Recipe) -> fast_encoder.Engine:
        raise error

    monkeypatch.setitem(fast_encoder.ENGINES, "gigatoken", fails)
    error: BaseException = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        FastEncoder(tokenizer(CASES["byte_level"]))
    error = Panic("in Rust")
    found = FastEncoder(tokenizer(CASES["byte_level"]))
    assert (found.name, found.reason) == ("tiktoken", "gigatoken: Panic('in Rust')")


def test_tokens_that_lose_a_byte_or_a_text_are_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TERROIR_ENCODER", raising=False)
    found = FastEncoder(tokenizer(CASES["byte_level"]))
    real = found.engine
    assert real
    last = len(found.bytes) - 1  # SEPARATOR's, which has no bytes
    for wrong in (lambda n: n[:-1], lambda n: n[n != last], lambda n: np.append(n, n[:0].dtype.type(last))):
        found.engine = lambda joined, wrong=wrong: wrong(real(joined))  # type: ignore[misc]
        with pytest.raises(ValueError, match=r"gigatoken made .* bytes of .*TERROIR_ENCODER=hf"):
            rows(found, ["one text", "another one"])
    found.engine = lambda joined: np.append(real(joined), np.uint32(last + 1))
    with pytest.raises(IndexError, match="out of bounds"):
        rows(found, ["one text"])


@pytest.mark.parametrize("name", ["tokenizers", *FAST])
def test_another_version_is_not_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fast_encoder.COMPARED, name, "0.0.1")
    monkeypatch.setenv("TERROIR_ENCODER", "tiktoken" if name == "tiktoken" else "gigatoken")
    found = FastEncoder(tokenizer(CASES["trained"]))
    assert "was not compared, 0.0.1 was" in found.reason
    assert found.name == {"tokenizers": "hf", "gigatoken": "tiktoken", "tiktoken": "hf"}[name]


def test_without_the_libraries_tokenizers_does_it() -> None:
    """In a process that cannot find them, as after an installation without the extra `fast`."""
    program = """
import sys
sys.path.insert(0, "stages")
sys.modules["gigatoken"] = sys.modules["tiktoken"] = None
from kit import stage_code
real = stage_code.version
stage_code.version = lambda name: None if name in ("gigatoken", "tiktoken") else real(name)
from fast_encoder import FastEncoder
from tokenizers import Tokenizer
found = FastEncoder(Tokenizer.from_str(sys.stdin.read()))
print(found.name, found.reason, sep="|")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(CASES["byte_level"]), cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "hf|gigatoken: not installed; tiktoken: not installed\n", done.stderr


def test_an_unknown_tier_is_refused(engine: Callable[..., FastEncoder]) -> None:
    with pytest.raises(SystemExit, match="TERROIR_ENCODER is 'fast': set it to gigatoken, tiktoken or hf"):
        engine(CASES["byte_level"], "fast")


@given(
    texts=st.lists(st.text(alphabet="ab c法", min_size=1, max_size=40), min_size=1, max_size=30),
    size=st.integers(259, 340),
    split=st.sampled_from(["byte_level", "llama3", "o200k"]),
)
@settings(max_examples=30)
def test_the_tokenizers_of_train_tokenizer_qualify(texts: list[str], size: int, split: Any) -> None:
    """Each of them, whatever it was trained on, and both tiers give its ids."""
    params = train_tokenizer.Params(mode="train", vocab_size=size, min_frequency=1, pre_tokenizer=split)
    trained = train_tokenizer.train(iter(texts), params)
    wanted = reference(json.loads(trained.to_str()), texts)
    for name in FAST:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TERROIR_ENCODER", name)
            found = FastEncoder(trained)
        assert (found.name, found.reason) == (name, "")
        assert rows(found, texts) == wanted
