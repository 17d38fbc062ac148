"""evaluate_model: each learned token is predicted once, and bits per byte are what the definition says."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import evaluate_model
import tiny
import train_loop
from evaluate_model import Params, negative_log_likelihood, scale, windows
from kit.tokenizer import Vocabulary
from masking import Masking
from train_model import Params as TrainParams


@given(st.integers(1, 200), st.integers(2, 50))
def test_windows_predict_each_token_but_the_first_once(length: int, max_length: int) -> None:
    predicted = [place for first, last in windows(length, max_length) for place in range(first + 1, last)]
    assert predicted == list(range(1, length))
    assert all(last - first <= max_length for first, last in windows(length, max_length))


def test_the_example_of_the_docstring() -> None:
    assert windows(10, 4) == [(0, 4), (3, 7), (6, 10)]


def test_the_scale() -> None:
    """Order 0: two bytes, equally often, are one bit each. Random bytes cannot be compressed, repeated ones can."""
    assert scale(b"ab" * 500)["order0"] == 1.0
    noise = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8).tobytes()
    assert 7.9 < scale(noise)["order0"] <= 8.0 < scale(noise)["xz"] < 8.1
    assert scale(b"law " * 5000)["gzip"] < 0.1


def test_likelihood_is_the_sum_over_learned_tokens(tmp_path: Path) -> None:
    """Against a plain loop without batches, padding or windows sorted by length."""
    tiny.tokenizer(tmp_path / "tokenizer")
    model = train_loop.prepare_model(
        tiny.base(tmp_path / "base"), tmp_path / "tokenizer", TrainParams(max_steps=1, learning_rate=1)
    )
    random = np.random.default_rng(3)
    documents = [
        (random.integers(0, 300, length).astype(np.uint16), random.random(length) < share)
        for length, share in ((1, 1.0), (2, 1.0), (8, 1.0), (9, 0.5), (40, 0.3), (23, 0.0))
    ]
    expected = 0.0
    for ids, marks in documents:
        for first, last in windows(len(ids), 8):
            piece = torch.from_numpy(ids[first:last].astype(np.int64))
            with torch.no_grad():
                scores = torch.log_softmax(model(input_ids=piece[None]).logits[0], dim=-1)
            for place in range(1, len(piece)):
                if marks[first + place]:
                    expected -= scores[place - 1, piece[place]].item()
    settings = Params(max_length=8, per_device_eval_batch_size=3)
    assert negative_log_likelihood(model, documents, settings) == pytest.approx(expected, rel=1e-5)


def test_a_uniform_model_has_the_bits_of_its_vocabulary(tmp_path: Path) -> None:
    tiny.tokenizer(tmp_path / "tokenizer")
    settings = TrainParams(max_steps=1, learning_rate=1)
    model = train_loop.prepare_model(tiny.base(tmp_path / "base"), tmp_path / "tokenizer", settings)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    ids = np.arange(11, dtype=np.uint16)
    total = negative_log_likelihood(model, [(ids, np.ones(11, dtype=bool))], Params(max_length=8))
    assert total == pytest.approx(10 * math.log(300), rel=1e-6)


def test_held_out_text_and_tokens_are_of_the_same_documents(tmp_path: Path) -> None:
    """Of a conversation only what the assistant says counts as bytes, as only that counts as tokens."""
    import pyarrow as pa

    import clean
    import dedup
    from kit import arrow

    place = {"file": "a", "start": 0, "end": 1, "line": 1}
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    rows = [{"doc_id": bytes([n]) * 16, **place, "messages": said} for n in range(3)]
    with arrow.Writer(tmp_path / "clean/chat/documents", clean.CHAT_DOCUMENTS) as out:
        out.write(pa.Table.from_pylist(rows, clean.CHAT_DOCUMENTS))
    splits = [{"doc_id": bytes([n]) * 16, "split": split} for n, split in enumerate(("eval", "dropped", "train"))]
    with arrow.Writer(tmp_path / "dedup/chat", dedup.DECISIONS) as out:
        out.write(pa.Table.from_pylist(splits, dedup.DECISIONS))
    assert list(evaluate_model.held_out_text(tmp_path / "clean", tmp_path / "dedup", ["chat"])) == ["A"]


def test_a_masked_model_guesses_each_chosen_token_once(tmp_path: Path) -> None:
    """Against a plain loop without batches or padding; a model that knows nothing has the loss of its vocabulary."""
    tokenizer = tiny.masked_tokenizer(tmp_path / "tokenizer")
    settings = TrainParams(max_steps=1, learning_rate=1, objective="mlm")
    model = train_loop.prepare_model(tiny.roberta(tmp_path / "base"), tokenizer, settings).eval()
    random, masking = np.random.default_rng(3), Masking(Vocabulary(tokenizer), 0.3, True, 0)
    documents = [(random.integers(5, 300, n).astype(np.uint16), np.ones(n, dtype=bool)) for n in (3, 8, 9, 21)]
    total, right, tokens, number = 0.0, 0, 0, 0
    for ids, marks in documents:
        for first in range(0, len(ids), 8):
            piece, learned = ids[None, first : first + 8].astype(np.int64), marks[None, first : first + 8]
            inputs, chosen = masking(piece, learned, np.array([number]))
            with torch.no_grad():
                scores = torch.log_softmax(model(torch.from_numpy(inputs)).logits[0], dim=-1)
            for place in np.flatnonzero(chosen[0]):
                total -= scores[place, piece[0, place]].item()
                right += int(scores[place].argmax() == piece[0, place])
                tokens += 1
            number += 1
    found = evaluate_model.guesses(model, documents, Params(max_length=8, per_device_eval_batch_size=3), masking)
    assert found["masked_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["masked_accuracy"] == pytest.approx(right / tokens, abs=1e-6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    blind = evaluate_model.guesses(model, documents, Params(max_length=8), masking)
    assert blind["masked_loss"] == pytest.approx(math.log(Vocabulary(tokenizer).size), rel=1e-5)


def test_a_masked_model_fills_its_prompts(tmp_path: Path) -> None:
    tokenizer = tiny.masked_tokenizer(tmp_path / "tokenizer")
    settings = TrainParams(max_steps=1, learning_rate=1, objective="mlm")
    model = train_loop.prepare_model(tiny.roberta(tmp_path / "base"), tokenizer, settings)
    train_loop.save(model, tokenizer, tmp_path / "base", settings, tmp_path / "merged")
    (row,) = evaluate_model.answers(tmp_path / "merged", Params(max_length=8, prompts=["the <mask> fox"]))
    assert row["answer"].startswith("the") and row["answer"].endswith("fox")
    with pytest.raises(ValueError, match="'the fox' of a masked model needs one <mask> to fill in"):
        evaluate_model.answers(tmp_path / "merged", Params(max_length=8, prompts=["the fox"]))
