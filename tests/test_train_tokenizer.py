"""train_tokenizer: any text comes back from its ids; only the train split is read; `transformers` sees the same."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

import tiny
from add_bos_eos import Marker
from clean import CHAT_DOCUMENTS, TEXT_DOCUMENTS
from conftest import Runner, write
from dedup import DECISIONS
from kit import arrow
from train_tokenizer import TEMPLATES, Params, train, train_documents

CORPUS = [
    "the cat sat on the mat\r\n",
    "法律 第一条 法律\n",
    "naïve cafe\u0301 \U0001f30a",
    "Human: Assistant: </s><s>",
] * 3
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?\nSay </s> {{ messages }}"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "再来 \ue000"},
    {"role": "assistant", "content": "五\n"},
]
PLACE = {"file": "a.txt", "start": 0, "end": 1, "line": 1}


def params(**more: Any) -> Params:
    return Params.model_validate({"mode": "train", "vocab_size": 320, "min_frequency": 1, **more})


def trained(documents: list[str], **more: Any) -> Tokenizer:
    return train(iter(documents), params(**more))


TOKENIZER = trained(CORPUS)


def write_phase(project: Path, settings: dict[str, Any], **texts: str) -> None:
    """Write params.yaml, and what clean and dedup leave for one source: a text for each split of `texts`."""
    tiny.params_yaml(project, p={"base": "models/base/b", "train_tokenizer": settings})
    rows = [{"doc_id": text[:16].ljust(16).encode(), **PLACE, "text": text} for text in texts.values()]
    with arrow.Writer(project / "data/clean/p/p_text/documents", TEXT_DOCUMENTS) as out:
        out.write(pa.Table.from_pylist(rows, TEXT_DOCUMENTS))
    decisions = [{"doc_id": row["doc_id"], "split": split} for row, split in zip(rows, texts, strict=True)]
    with arrow.Writer(project / "data/dedup/p/p_text", DECISIONS) as out:
        out.write(pa.Table.from_pylist(decisions, DECISIONS))


def test_the_worked_example_of_the_docstring() -> None:
    tokenizer = trained(["aaaa aaaa"] * 2, vocab_size=263, min_frequency=2)
    assert [tokenizer.id_to_token(number) for number in (0, 1, 2, 259, 260)] == ["<s>", "</s>", "<pad>", "aa", "aaaa"]
    assert {tokenizer.id_to_token(number) for number in range(3, 259)} == set(ByteLevel.alphabet())
    assert tokenizer.encode("aaaa", add_special_tokens=False).ids == [260]


@given(st.text() | st.text(st.sampled_from("法\ue000\U0001f30a\u0301\x00\r\n\t '</s>")))
def test_any_text_comes_back_from_its_ids(text: str) -> None:
    """Byte for byte, with control characters, emoji, unknown scripts, look-alikes of special tokens."""
    TOKENIZER.encode_special_tokens = True
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert not {0, 1, 2} & set(ids)


def test_all_256_bytes_have_an_id() -> None:
    """So nothing is ever unknown, not even with an empty corpus."""
    tokenizer = trained([])
    assert tokenizer.get_vocab_size() == 256 + 3
    assert trained([], bos_token="</s>", pad_token="</s>").get_vocab_size() == 256 + 1


@given(st.lists(st.text(st.sampled_from("ab é中 \n'")), max_size=12), st.randoms(use_true_random=False))
def test_the_order_of_the_documents_does_not_matter(documents: list[str], shuffle: random.Random) -> None:
    other = list(documents)
    shuffle.shuffle(other)
    assert trained(documents).to_str() == trained(other).to_str()


def test_only_the_train_split_is_read_and_both_sides_of_a_conversation(tmp_path: Path) -> None:
    rows = [{"doc_id": bytes(16), **PLACE, "text": split} for split in ("train", "eval", "dropped", "train")]
    messages = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]
    chats = [{"doc_id": bytes(16), **PLACE, "messages": messages}] * 2
    for name, schema, documents, splits in (
        ("texts", TEXT_DOCUMENTS, rows, ["train", "eval", "dropped", "train"]),
        ("chats", CHAT_DOCUMENTS, chats, ["eval", "train"]),
    ):
        with arrow.Writer(tmp_path / "clean" / name / "documents", schema, batch_rows=2) as out:
            out.write(pa.Table.from_pylist(documents, schema))
        with arrow.Writer(tmp_path / "dedup" / name, DECISIONS) as out:
            out.write(pa.Table.from_pylist([{"split": split} for split in splits], DECISIONS))
    found = list(train_documents(tmp_path / "clean", tmp_path / "dedup", ["texts", "chats"]))
    assert found == ["train", "train", "ask", "say"]


def test_the_command_gives_the_same_bytes_for_any_hash_seed_and_threads(project: Path, run_stage: Runner) -> None:
    """And no trace of the held-out documents: "evaluation" is no token, "training" is."""
    texts = {"train": "training " * 9, "eval": "evaluation " * 9, "dropped": "dropped " * 9}
    write_phase(project, {"mode": "train", "vocab_size": 300}, **texts)
    write(project / "models/base/b/config.json", "{}")
    results = []
    for seed, threads in (("0", "1"), ("1", "3")):
        environment = {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads, "TERROIR_WORKERS": threads}
        finished = run_stage(project, "train_tokenizer", "p", **environment)
        assert finished.returncode == 0, finished.stderr
        results.append({path.name: path.read_bytes() for path in (project / "models/tokenizers/p").iterdir()})
    assert results[0] == results[1]
    assert sorted(results[0]) == ["tokenizer.json", "tokenizer_config.json"]
    vocabulary = json.loads(results[0]["tokenizer.json"])["model"]["vocab"]
    assert "training" in vocabulary
    assert {token for token in vocabulary if "eval" in token or "drop" in token} == set()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer") / "t")


def test_transformers_opens_it_with_the_same_special_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.chat_template == TEMPLATES["human_assistant"]
    assert len(tokenizer) == 300 == Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()


@pytest.mark.parametrize("text", ["", " two  spaces\n", "it is n't , is it ?", "法律 \U0001f30a"])
def test_a_plain_prompt_begins_with_one_bos_and_reads_back(folder: Path, text: str) -> None:
    """As the training documents do; decoding changes no space."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[1:])
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("length", [2, 3, 5])
def test_each_template_is_rendered_by_transformers_as_the_segments_say(folder: Path, name: str, length: int) -> None:
    """One question, with a system turn before it, and two rounds; contents with line breaks, jinja and special text."""
    messages = CONVERSATION[1:3] if length == 2 else CONVERSATION[:length]
    (folder / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    segments = Marker(folder).conversation(messages)
    rendered = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
    assert "".join(segment.text for segment in segments) == rendered


def test_reuse_copies_the_tokenizer_of_the_base_and_may_add_a_template(project: Path, run_stage: Runner) -> None:
    """Byte for byte, its own template too, unless `chat_template` names another."""
    base, result = tiny.tokenizer(project / "models/base/b"), project / "models/tokenizers/p"
    (base / "chat_template.jinja").write_text("its own")
    (base / "config.json").write_text("{}")
    expected = {path.name: path.read_bytes() for path in base.iterdir() if path.name != "config.json"}
    for template in (None, "human_assistant"):
        write_phase(project, {"mode": "reuse", "chat_template": template}, train="a", eval="b")
        finished = run_stage(project, "train_tokenizer", "p")
        assert finished.returncode == 0, finished.stderr
        if template:
            expected["chat_template.jinja"] = TEMPLATES[template].encode()
        assert {path.name: path.read_bytes() for path in result.iterdir()} == expected


BAD_BASES = {
    "no tokenizer": ({}, "models/base/b has no tokenizer.json to reuse; set phases.p.train_tokenizer.mode to train"),
    "no settings": ({"tokenizer.json": TOKENIZER.to_str()}, "has no tokenizer_config.json"),
    "no EOS": (
        {"tokenizer.json": TOKENIZER.to_str(), "tokenizer_config.json": '{"bos_token": "<s>"}'},
        "names no eos_token, so no document would have an end",
    ),
    "a Git LFS pointer": (
        {"tokenizer.json": "version https://git-lfs", "tokenizer_config.json": '{"eos_token": "</s>"}'},
        "holds no tokenizer that can be read",
    ),
}


@pytest.mark.parametrize("case", BAD_BASES)
def test_a_base_without_a_fit_tokenizer_gets_one_sentence(project: Path, run_stage: Runner, case: str) -> None:
    """And the tokenizer of the last good run stays as it was."""
    files, sentence = BAD_BASES[case]
    write_phase(project, {"mode": "reuse"}, train="a", eval="b")
    for name, text in {"config.json": "{}", **files}.items():
        write(project / "models/base/b" / name, text)
    write(project / "models/tokenizers/p/tokenizer.json", "of the last good run")
    finished = run_stage(project, "train_tokenizer", "p")
    assert (finished.returncode, len(finished.stderr.splitlines())) == (1, 1), finished.stderr
    assert sentence in finished.stderr
    assert [path.read_text() for path in (project / "models/tokenizers/p").iterdir()] == ["of the last good run"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mode": "train"}, "mode train needs `vocab_size`"),
        ({"mode": "train", "vocab_size": 258}, "no room for 256 bytes and 3 specials"),
        ({"mode": "reuse", "vocab_size": 300}, "leave `vocab_size` out"),
        ({"mode": "reuse", "chat_template": "chatml2"}, "no chat_template `chatml2`; known: human_assistant"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Params.model_validate(settings)
