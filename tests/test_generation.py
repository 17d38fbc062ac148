"""generation: prompts are continued as training showed them, the same each time, alone or in a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import train_loop
from generation import fill, prompt_ids, questions, tokenizer_of, write
from held_out import Document
from kit.model import load_model, start
from kit.tokenizer import Vocabulary
from train_model import Params as TrainParams


def saved(folder: Path, masked: bool = False) -> tuple[Any, Any]:
    """Return a model with random weights, and its tokenizer, both from a folder as merge_lora leaves it."""
    tokenizer = (tiny.masked_tokenizer if masked else tiny.tokenizer)(folder / "tokenizer")
    base = (tiny.roberta if masked else tiny.base)(folder / "base")
    settings = TrainParams(max_steps=1, learning_rate=1, objective="mlm" if masked else "clm")
    model = train_loop.prepare_model(base, tokenizer, settings)
    train_loop.save(model, tokenizer, base, settings, folder / "merged")
    start(0)
    vocabulary = Vocabulary(folder / "merged")
    return load_model(folder / "merged", vocabulary.size, vocabulary.special_ids), tokenizer_of(
        folder / "merged", ["the fox"]
    )


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen2"])
def test_a_tokenizer_that_transformers_replaces_is_found(tmp_path: Path, kind: str) -> None:
    """It gives a qwen2 the words of Qwen 2, where a digit is a word: "1234" comes out otherwise than it was learned.

    Truncation in the file is no difference.
    """
    folder = tiny.tokenizer(tmp_path / "merged")
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "vocab_size": 300}))
    tokenizer_of(folder, ["the fox"])
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"].append(["1", "2"])
    content["model"]["vocab"]["12"] = 300
    content["truncation"] = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content))
    if kind != "qwen2":
        assert tokenizer_of(folder, ["the fox", "12"]).encode("12", add_special_tokens=False) == [300]
        return
    with pytest.raises(ValueError, match='with a Qwen2Tokenizer, which makes other tokens of "12" than the tokenizer'):
        tokenizer_of(folder, ["the fox", "12"])


def test_greedy_text_is_the_pipelines(tmp_path: Path) -> None:
    """As transformers' own text-generation pipeline writes it, and the same in a batch with longer prompts."""
    from transformers import pipeline

    model, tokenizer = saved(tmp_path)
    with torch.no_grad():  # at random, the last token decides almost alone, and padding would not be noticed
        for name, values in model.named_parameters():
            values.mul_(6 if "proj" in name else 1)
    prompts = ["the fox", "the quick brown fox jumps over", "法律"]
    ids = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    alone = write(model, tokenizer, ids, 8)
    assert write(model, tokenizer, ids, 8, batch_size=3) == alone
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    for prompt, text in zip(prompts, alone, strict=True):
        asked = [{"role": "user", "content": prompt}]
        assert pipe(asked, do_sample=False, max_new_tokens=8, return_full_text=False)[0]["generated_text"] == text
    tokenizer.chat_template = None
    assert prompt_ids("the fox", tokenizer)[0] == tokenizer.bos_token_id
    assert tokenizer.decode(prompt_ids("the fox", tokenizer)[1:]) == "the fox"


def test_sampled_text_depends_on_the_seed_alone(tmp_path: Path) -> None:
    model, tokenizer = saved(tmp_path)
    ids = [prompt_ids(prompt, tokenizer) for prompt in ("the fox", "the dog")]
    sampling = {"temperature": 1.0, "top_p": 1.0}
    both = write(model, tokenizer, ids, 8, 1, sampling, seed=1)
    assert write(model, tokenizer, ids[1:], 8, 1, sampling, seed=1) == both[1:]
    assert write(model, tokenizer, ids, 8, 1, sampling, seed=2) != both


def test_questions_end_where_the_last_answer_begins(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tiny.tokenizer(tmp_path / "tokenizer"), [])
    end = tokenizer.eos_token_id

    def conversation(*marks: int, conversation: bool = True) -> Document:
        ids = np.array([*tokenizer.encode("the fox jumps over the lazy dog")[: len(marks) - 1], end])
        return Document("qa", ids, np.array(marks, bool), "", "", conversation)

    one, two = conversation(0, 0, 1, 1), conversation(0, 1, 0, 0, 1, 1)
    found = questions([one, two], tokenizer, 10, 100)
    assert [len(question.ids) for question in found] == [2, 4]
    assert found[0].answer == tokenizer.decode(one.ids[2:3])
    assert [len(question.ids) for question in questions([one, two], tokenizer, 10, 3)] == [2], "too long a question"
    text = conversation(0, 1, 1, conversation=False)
    assert questions([text, conversation(1, 1), conversation(0, 0)], tokenizer, 10, 100) == []
    many = [conversation(*[0] * n, 1) for n in range(1, 6)]
    assert [len(question.ids) for question in questions(many, tokenizer, 3, 100)] == [1, 3, 5], "at equal distances"
    assert questions(many, tokenizer, 0, 100) == []


def test_a_masked_model_fills_gaps_as_the_pipeline_does(tmp_path: Path) -> None:
    from transformers import pipeline

    model, tokenizer = saved(tmp_path, masked=True)
    ((text, candidates),) = fill(model, tokenizer, ["the <mask> fox"])
    expected = pipeline("fill-mask", model=model, tokenizer=tokenizer)("the <mask> fox", top_k=5)
    assert text == expected[0]["sequence"]
    assert [one.rsplit(" ", 1)[1] for one in candidates] == [f"{one['score']:.4f}" for one in expected]
    with pytest.raises(ValueError, match="'the fox' of a masked model needs one <mask> to fill in"):
        fill(model, tokenizer, ["the fox"])
