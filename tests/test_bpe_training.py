"""bpe_training: the merges are those of Hugging Face's BpeTrainer; an extended tokenizer keeps what the base did."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import bpe_training
from bpe_training import ALPHABET, PATTERNS, count_words, extend, learn, pre_tokenizer, train

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
DESIGNED = [
    "aaaa aaaa aaa aa a aaaaaaa",
    "abab ababab abba baab",
    "It's the cat's; we'll say 'tis 12345 times, I'VE said.\r\n\r\n\tTHE END  \n",
    "第一条 为了保护法律，根据宪法，制定本法。第二条　法律、法规１２３",
    "ひらがなカタカナー々〆 한국어 ไทย عربى हिन्दी",
    "naïve cafe\u0301 \U0001f30a\U0001f468\u200d\U0001f469 ſ 'ſ \u2028\x00\x1f\xa0",
    "<s> </s> <mask> [[[ ((( --",
    "",
    "x",
]


def of_peer(documents: list[str], vocab_size: int, min_frequency: int, name: str, specials: list[Any]) -> str:
    """Return tokenizer.json as BpeTrainer makes it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(name)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return str(tokenizer.to_str())


def of_ours(documents: list[str], vocab_size: int, min_frequency: int, name: str, specials: list[Any]) -> str:
    tokenizer = train(count_words(documents, name), vocab_size, min_frequency, specials)
    tokenizer.pre_tokenizer = pre_tokenizer(name)
    return str(tokenizer.to_str())


def test_the_worked_example_of_the_docstring() -> None:
    texts = list(ALPHABET)
    a, b = texts.index("a"), texts.index("b")
    ids, lengths, counts = (bpe_training.np.array(row) for row in ([a, a, a, a, a, b], [4, 2], [2, 1]))
    assert learn(ids, lengths, counts, texts, 10, 2) == [("a", "a"), ("aa", "aa")]
    assert texts[256:] == ["aa", "aaaa"]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("min_frequency", [1, 2, 5])
@pytest.mark.parametrize("vocab_size", [256 + 5, 256 + 6, 300, 2000])
def test_the_whole_tokenizer_is_that_of_the_peer(
    name: str, min_frequency: int, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vocabulary, ids, merges, special tokens, in one comparison of bytes; places merged one by one and by numpy."""
    documents = DESIGNED * 3 + DESIGNED[3:5]
    expected = of_peer(documents, vocab_size, min_frequency, name, SPECIALS)
    for few in (0, 3, 32):
        monkeypatch.setattr(bpe_training, "FEW", few)
        assert of_ours(documents, vocab_size, min_frequency, name, SPECIALS) == expected


def test_a_vocabulary_that_may_go_beyond_16_bits_is_that_of_the_peer() -> None:
    documents = [" ".join(f"{number:x}y{number * number:x}" for number in range(1, 20_000, 3))] * 2
    assert of_ours(documents, 70_000, 2, "byte_level", SPECIALS) == of_peer(
        documents, 70_000, 2, "byte_level", SPECIALS
    )


@pytest.mark.parametrize("few", [0, 32])
@pytest.mark.parametrize("known", [2**16 - 5, 2**16 - 1, 70_000])
def test_ids_beyond_16_bits_are_merged_as_small_ones(monkeypatch: pytest.MonkeyPatch, known: int, few: int) -> None:
    """Ids of the last four of so many known tokens; the first to be merged gets the id after them."""
    monkeypatch.setattr(bpe_training, "FEW", few)
    words = [[0, 1], [0, 1, 2], [0, 1, 2, 3], [3, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3]]
    ids, lengths = np.array(list(itertools.chain(*words)), np.int32), np.array([len(word) for word in words], np.int64)
    texts = [f"<{number}>" for number in range(known)]
    frequencies = np.array([9, 7, 5, 3, 1], np.int64)
    small = learn(ids, lengths, frequencies, texts[-4:], 5, 1)
    assert len(small) == 5
    assert learn(ids + known - 4, lengths, frequencies, texts, 5, 1) == small


@settings(max_examples=150)
@given(
    st.lists(st.text(st.sampled_from("ab")) | st.text(st.sampled_from("abc 法律é\n'1")) | st.text(), max_size=10),
    st.integers(257, 330),
    st.integers(0, 3),
    st.sampled_from(sorted(PATTERNS)),
    st.sampled_from([0, 3, 32]),
)
def test_random_text_gives_the_merges_of_the_peer(
    documents: list[str], vocab_size: int, min_frequency: int, name: str, few: int
) -> None:
    """Few letters make ties and rows of one letter."""
    expected = of_peer(documents, vocab_size, min_frequency, name, ["<s>"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe_training, "FEW", few)
        assert of_ours(documents, vocab_size, min_frequency, name, ["<s>"]) == expected


@pytest.mark.parametrize("name", PATTERNS)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("'sS tl\r\n 1aA法"), max_size=30)))
def test_words_are_those_of_the_pre_tokenizer(name: str, documents: list[str]) -> None:
    exact = pre_tokenizer(name)
    expected: Counter[str] = Counter()
    for document in documents:
        expected.update(document[first:last] for _, (first, last) in exact.pre_tokenize_str(document))
    for chunk, installed in ((1, True), (9, False), (bpe_training.CHUNK, True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bpe_training, "CHUNK", chunk)
            if not installed:
                patch.setattr(bpe_training.importlib.util, "find_spec", lambda name: None)
            assert count_words(documents, name) == expected


def test_gigatoken_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gigatoken")
    count_words(["a word"], "byte_level")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("name", PATTERNS)
def test_characters_of_which_one_library_knows_more_are_cut_as_the_peer_cuts(
    name: str, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Letters of Unicode 17, among them 4,298 Chinese characters: not every library has heard of them."""
    if not installed:
        monkeypatch.setattr(bpe_training.importlib.util, "find_spec", lambda name: None)
    new = "\u088f\ua7ce\U00010940\U000323b0\U00033479"
    documents = [f"a{character}b {character}{character}1" for character in new]
    assert of_ours(documents, 300, 1, name, []) == of_peer(documents, 300, 1, name, [])


@pytest.mark.parametrize("special", ["the", "\u0120the"])
def test_text_makes_no_special_token(special: str) -> None:
    """BpeTrainer gives such a merge the id of the special token: plain text would end a document."""
    documents = ["the cat on the mat of the king"] * 3
    tokenizer = Tokenizer.from_str(of_ours(documents, 300, 1, "byte_level", [special]))
    peer = Tokenizer.from_str(of_peer(documents, 300, 1, "byte_level", [special]))
    for each, found in ((tokenizer, False), (peer, True)):
        each.encode_special_tokens = True
        assert (each.token_to_id(special) in each.encode(documents[0]).ids) == found
    assert tokenizer.token_to_id(special) == 0


def test_a_special_token_that_is_a_byte_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' is a byte of any text"):
        train(Counter(), 300, 1, ["a"])


# The base of mode extend: pairs of a name and a tokenizer.json.
CORPUS = ["the cat sat on the mat\r\n", "法律 第一条 法律\n", "naïve café \U0001f30a", "def f(x): return 12345"] * 3
DOMAIN = ["contract law, contract lawyers and the law of contracts", "合同法 合同双方 合同法律", "naïve contract"] * 4


def bases() -> dict[str, str]:
    """Return the shapes that published tokenizers have."""
    gpt2 = json.loads(of_peer(CORPUS, 300, 1, "byte_level", ["<|endoftext|>"]))
    gpt2["decoder"] = json.loads(decoders.ByteLevel().__getstate__())
    llama3 = json.loads(of_peer(CORPUS, 300, 1, "llama3", []))
    llama3["decoder"] = gpt2["decoder"]
    llama3["model"]["ignore_merges"] = True
    tokenizer = Tokenizer.from_str(json.dumps(llama3))
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer.normalizer = normalizers.NFC()
    old = json.loads(json.dumps(gpt2))
    old["model"]["merges"] = [" ".join(pair) for pair in old["model"]["merges"]]  # as older files have them
    return {"gpt2": json.dumps(gpt2), "llama3": tokenizer.to_str(), "old": json.dumps(old)}


BASES = bases()


@pytest.mark.parametrize("name", BASES)
def test_ids_stay_and_new_tokens_follow(name: str) -> None:
    base = Tokenizer.from_str(BASES[name])
    extended, number = extend(BASES[name], DOMAIN, 20, 2, "b")
    before, after = base.get_vocab(), extended.get_vocab()
    assert {text: after[text] for text in before} == before
    assert number == len(after) - len(before) == 20
    assert sorted(after.values()) == list(range(len(after)))
    assert {text for text in after if text not in before} & {"contract", "Ġcontract", "Ġlaw"}
    assert base.get_added_tokens_decoder() == extended.get_added_tokens_decoder()
    # And once more from the file, as every later stage reads it.
    assert Tokenizer.from_str(extended.to_str()).get_vocab() == after


@pytest.mark.parametrize("name", BASES)
@settings(max_examples=60)
@given(st.text() | st.text(st.sampled_from("contrlaw 合同法律é<think>\n1")))
def test_new_tokens_put_together_what_the_base_cuts(name: str, text: str) -> None:
    """The new ids, each replaced by its pieces, are the ids of the base; the text comes back from both."""
    base, extended = Tokenizer.from_str(BASES[name]), Tokenizer.from_str(EXTENDED[name])
    base.encode_special_tokens = extended.encode_special_tokens = True
    merges = json.loads(EXTENDED[name])["model"]["merges"][-20:]
    pieces = {tuple(pair.split() if isinstance(pair, str) else pair) for pair in merges}
    halves = {left + right: (left, right) for left, right in pieces}

    def cut(token: str) -> list[str]:
        return [piece for half in halves[token] for piece in cut(half)] if token in halves else [token]

    whole = extended.encode(text, add_special_tokens=False)
    assert [piece for token in whole.tokens for piece in cut(token)] == base.encode(
        text, add_special_tokens=False
    ).tokens
    assert extended.decode(whole.ids, skip_special_tokens=False) == base.decode(
        base.encode(text, add_special_tokens=False).ids, skip_special_tokens=False
    )


EXTENDED = {name: str(extend(base, DOMAIN, 20, 2, "b")[0].to_str()) for name, base in BASES.items()}


def test_extending_goes_on_where_training_stopped() -> None:
    """A base of 300 extended to 340 on its own corpus is the tokenizer of 340 that is trained at once."""
    base = of_peer(CORPUS, 300, 2, "byte_level", [])
    extended, _ = extend(base, CORPUS, 40, 2, "b")
    whole = json.loads(of_peer(CORPUS, 340, 2, "byte_level", []))["model"]
    assert json.loads(extended.to_str())["model"]["merges"] == whole["merges"]
    assert extended.get_vocab() == whole["vocab"]


def test_new_tokens_are_learned_as_the_base_normalizes() -> None:
    base = Tokenizer.from_str(BASES["gpt2"])
    base.normalizer = normalizers.Lowercase()
    extended, number = extend(base.to_str(), ["ZQ"], 20, 1, "b")
    assert (number, extended.encode("ZQ").tokens) == (1, ["zq"])


def test_the_text_decides_how_many_tokens_there_are() -> None:
    assert extend(BASES["gpt2"], ["zq"], 20, 1, "b")[1] == 1
    assert extend(BASES["gpt2"], ["zq"], 20, 2, "b")[1] == 0
    assert extend(BASES["gpt2"], [], 20, 2, "b")[1] == 0


@given(st.randoms(use_true_random=False))
def test_the_order_of_the_documents_does_not_matter(shuffle: Any) -> None:
    documents = list(DOMAIN)
    shuffle.shuffle(documents)
    assert extend(BASES["llama3"], documents, 20, 2, "b")[0].to_str() == EXTENDED["llama3"]


def changed(**model: Any) -> str:
    content = json.loads(BASES["gpt2"])
    content["model"].update(model)
    return json.dumps(content)


def without_first_id() -> str:
    content = json.loads(BASES["gpt2"])
    content["model"]["vocab"] = {text: number + 1 for text, number in content["model"]["vocab"].items()}
    content["added_tokens"] = []
    return json.dumps(content)


BAD = {
    "of type WordPiece": Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")).to_str(),
    "of type Unigram": Tokenizer(models.Unigram([("a", 0.0)], unk_id=0)).to_str(),
    "no byte-level pre-tokenizer": json.dumps({**json.loads(BASES["gpt2"]), "pre_tokenizer": None}),
    "has no byte-level pre-tokenizer": changed(byte_fallback=True),
    "marks the parts of words": changed(end_of_word_suffix="</w>"),
    "gaps between its ids": without_first_id(),
}


@pytest.mark.parametrize("sentence", BAD)
def test_what_is_no_byte_level_bpe_is_refused(sentence: str) -> None:
    with pytest.raises(ValueError, match=f"models/b/tokenizer.json .*{sentence}.*mode to reuse"):
        extend(BAD[sentence], DOMAIN, 20, 2, "models/b")


def test_a_special_token_that_would_be_found_in_plain_text_is_refused() -> None:
    """With ignore_merges a whole word that stands in the vocabulary is taken, and there it must stand for its id."""
    tokenizer = Tokenizer.from_str(BASES["llama3"])
    tokenizer.add_special_tokens(["[[["])
    with pytest.raises(ValueError, match=r"'\[\[\[' would be found in plain text"):
        extend(tokenizer.to_str(), DOMAIN, 20, 2, "b")


def test_plain_text_makes_no_special_token_of_the_base() -> None:
    """Not even where the text has it as a word."""
    base = Tokenizer.from_str(BASES["gpt2"])
    base.add_special_tokens(["contract", "<|end|>"])
    tokenizer, _ = extend(base.to_str(), DOMAIN, 40, 2, "b")
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode("contract <|end|>" + DOMAIN[0], add_special_tokens=False).ids
    assert [tokenizer.token_to_id(text) for text in ("contract", "<|end|>")] == [300, 301]
    assert not {300, 301} & set(ids)
    assert max(ids) > 301


def test_no_character_class_is_missing() -> None:
    """What a probe is for: each place of a pattern where a character may stand is in it."""
    for name in PATTERNS:
        cut = {character: count_words([bpe_training.PROBE.replace("_", character)], name) for character in "a1 \n,é中"}
        assert len({tuple(sorted(words)) for words in cut.values()}) == 7
