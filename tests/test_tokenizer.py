"""kit/tokenizer.py: the special tokens are those that the settings name, and nothing is made into one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tokenizers import Tokenizer

import tiny
from add_bos_eos import SEGMENT
from kit.tokenizer import Vocabulary
from tokenize_text import Encoder


def with_settings(folder: Path, **changes: Any) -> Path:
    """Write a tokenizer whose tokenizer_config.json has these values."""
    path = tiny.tokenizer(folder) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize("role", ["bos_token", "eos_token", "pad_token", "mask_token"])
@pytest.mark.parametrize(
    "value", [5, 0, True, False, 1.5, [], ["</s>"], {}, {"id": 5}, {"content": 5}, {"content": None}]
)
def test_a_special_token_that_is_no_text_is_refused(tmp_path: Path, role: str, value: Any) -> None:
    """`eos_token: 5` would become the token "5", which the vocabulary may well have."""
    folder = with_settings(tmp_path / "tokenizer", **{role: value})
    with pytest.raises(ValueError) as error:
        Vocabulary(folder).named(role)
    assert str(error.value) == (
        f"{folder}/tokenizer_config.json: {role} is {json.dumps(value)}; write the token there as a string or as an "
        "object with the string as `content`, or null for none."
    )


@pytest.mark.parametrize("value", ["<s>", {"content": "<s>", "lstrip": False}])
def test_a_special_token_is_a_string_or_an_object_with_it(tmp_path: Path, value: Any) -> None:
    vocabulary = Vocabulary(with_settings(tmp_path / "tokenizer", bos_token=value))
    assert vocabulary.special == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    assert vocabulary.special_ids["bos_token_id"] == vocabulary.id("<s>")


@pytest.mark.parametrize("value", [None, ""])
def test_a_special_token_may_be_none(tmp_path: Path, value: Any) -> None:
    """Qwen's bases have no bos_token: null."""
    vocabulary = Vocabulary(with_settings(tmp_path / "tokenizer", bos_token=value))
    assert vocabulary.special == {"eos_token": "</s>", "pad_token": "<pad>"}


def test_truncation_and_padding_of_the_file_are_left_out(tmp_path: Path) -> None:
    """A model's file may hold those of its training: a benchmark would be judged by its first tokens, or by <pad>."""
    folder = tiny.tokenizer(tmp_path / "tokenizer")
    own = Vocabulary(folder).tokenizer
    ids = own.encode("the quick brown fox").ids
    own.enable_truncation(2)
    own.enable_padding(length=50)
    own.save(str(folder / "tokenizer.json"))
    assert len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode("the quick brown fox").ids) == 50
    assert Vocabulary(folder).tokenizer.encode("the quick brown fox").ids == ids


def test_the_size_of_a_vocabulary_with_gaps_is_beyond_its_last_id(tmp_path: Path) -> None:
    """The width of ids and the rows of an embedding follow from it."""
    folder = tiny.tokenizer(tmp_path / "tokenizer")
    before = Vocabulary(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    assert before.size == before.tokenizer.get_vocab_size() == 1 + max(vocabulary.values())
    vocabulary[before.tokenizer.encode("I").tokens[-1]] = 70_000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert Vocabulary(folder).size == 70_001
    segments = pa.array([[{"text": "I", "special": False, "learn": True}]], pa.list_(SEGMENT))
    assert Encoder(folder).encode(segments)[0].to_pylist() == [[70_000]]
