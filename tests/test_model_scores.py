"""model_scores: each learned token is predicted once, and the sums are what the definitions say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import compared_models
import score_report
import tiny
import train_loop
from evaluate_model import Params
from held_out import Document
from kit.tokenizer import Vocabulary
from masking import Masking
from model_scores import _batches, guesses, likelihoods, pseudo_likelihoods, windows
from train_model import Params as TrainParams


def document(ids: np.ndarray, learned: np.ndarray | None = None) -> Document:
    return Document("laws", ids, np.ones(len(ids), bool) if learned is None else learned, "", "")


def causal(folder: Path) -> Any:
    tiny.tokenizer(folder / "tokenizer")
    settings = TrainParams(max_steps=1, learning_rate=1)
    return train_loop.prepare_model(tiny.base(folder / "base"), folder / "tokenizer", settings).eval()


def masked(folder: Path) -> tuple[Any, Vocabulary]:
    tokenizer = tiny.masked_tokenizer(folder / "tokenizer")
    settings = TrainParams(max_steps=1, learning_rate=1, objective="mlm")
    return train_loop.prepare_model(tiny.roberta(folder / "base"), tokenizer, settings).eval(), Vocabulary(tokenizer)


@given(st.integers(1, 200), st.integers(2, 50))
def test_windows_predict_each_token_but_the_first_once(length: int, max_length: int) -> None:
    predicted = [place for first, last in windows(length, max_length) for place in range(first + 1, last)]
    assert predicted == list(range(1, length))
    assert all(last - first <= max_length for first, last in windows(length, max_length))


def test_the_example_of_the_docstring() -> None:
    assert windows(10, 4) == [(0, 4), (3, 7), (6, 10)]


@given(st.lists(st.integers(1, 9)).map(sorted), st.integers(9, 40))
def test_batches_hold_every_piece_and_no_more_tokens_than_allowed(lengths: list[int], tokens: int) -> None:
    found = list(_batches(lengths, tokens))
    assert [length for part in found for length in lengths[part]] == lengths
    assert all(len(lengths[part]) * lengths[part][-1] <= tokens for part in found)


def test_likelihood_is_the_sum_over_learned_tokens(tmp_path: Path) -> None:
    """Of each document, against a plain loop without batches, padding or windows sorted by length."""
    model = causal(tmp_path)
    random = np.random.default_rng(3)
    documents = [
        document(random.integers(0, 300, length).astype(np.uint16), random.random(length) < share)
        for length, share in ((1, 1.0), (2, 1.0), (8, 1.0), (9, 0.5), (40, 0.3), (23, 0.0))
    ]
    expected = np.zeros((len(documents), 3))
    for row, (_, ids, learned, *_) in enumerate(documents):
        for first, last in windows(len(ids), 8):
            piece = torch.from_numpy(ids[first:last].astype(np.int64))
            with torch.no_grad():
                scores = torch.log_softmax(model(input_ids=piece[None]).logits[0], dim=-1)
            for place in range(1, len(piece)):
                if learned[first + place]:
                    right = scores[place - 1].argmax() == piece[place]
                    expected[row] += -scores[place - 1, piece[place]].item(), 1, right.item()
    for batch_size in (1, 3, 16):
        found = likelihoods(model, documents, 8, batch_size)
        assert found == pytest.approx(expected, rel=1e-5)
    # What the model itself thinks most probable is right.
    ids = [1]
    for _ in range(6):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert likelihoods(model, [document(np.array(ids))], 8, 1)[0, 1:].tolist() == [6, 6]


def test_each_learned_token_counts_where_it_stands_alone_in_its_window(tmp_path: Path) -> None:
    model = causal(tmp_path)
    alone = [document(np.arange(12, dtype=np.uint16), np.arange(12) == place) for place in range(12)]
    assert likelihoods(model.train(), alone, 4, 2)[:, 1].tolist() == [0.0] + [1.0] * 11
    assert not model.training  # no dropout


def test_a_uniform_model_has_the_bits_of_its_vocabulary(tmp_path: Path) -> None:
    model = causal(tmp_path)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    total = likelihoods(model, [document(np.arange(11, dtype=np.uint16))], 8, 16)
    assert total[0, 0] == pytest.approx(10 * math.log(300), rel=1e-6)


def test_bits_per_byte_are_of_bytes_and_of_the_whole_text(tmp_path: Path) -> None:
    """By hand, over several windows: 18 tokens of a model that knows nothing, 7 bytes of UTF-8."""
    model = causal(tmp_path)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    text = Document("laws", np.arange(19), np.ones(19, bool), "法律a", "法律a")
    sums = compared_models.score(model, [text], Params(max_length=8), None)
    assert sums[0, 1:].tolist()[0] == 18 and sums[0, 3] == 7
    found = score_report.scores(sums, score_report.MEASURES["clm"])
    assert found["bits_per_byte"] == pytest.approx(18 * math.log2(300) / 7, abs=1e-5)
    assert found["perplexity"] == pytest.approx(300, rel=1e-5)


def test_a_masked_model_guesses_each_chosen_token_once(tmp_path: Path) -> None:
    """Against a plain loop without batches or padding; a model that knows nothing has the loss of its vocabulary."""
    model, vocabulary = masked(tmp_path)
    random, masking = np.random.default_rng(3), Masking(vocabulary, 0.3, True, 0)
    documents = [document(random.integers(5, 300, n).astype(np.uint16)) for n in (3, 8, 9, 21)]
    expected, number = np.zeros((4, 3)), 0
    for row, (_, ids, marks, *_) in enumerate(documents):
        for first in range(0, len(ids), 8):
            piece, learned = ids[None, first : first + 8].astype(np.int64), marks[None, first : first + 8]
            inputs, chosen = masking(piece, learned, np.array([number]))
            with torch.no_grad():
                scores = torch.log_softmax(model(torch.from_numpy(inputs)).logits[0], dim=-1)
            for place in np.flatnonzero(chosen[0]):
                right = int(scores[place].argmax() == piece[0, place])
                expected[row] += -scores[place, piece[0, place]].item(), 1, right
            number += 1
    assert guesses(model, documents, 8, 3, masking) == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    blind = guesses(model, documents, 8, 16, masking).sum(axis=0)
    assert blind[0] / blind[1] == pytest.approx(math.log(vocabulary.size), rel=1e-5)


def test_pseudo_perplexity_hides_one_token_at_a_time(tmp_path: Path) -> None:
    """All of them, or some at equal distances; special tokens and those that are not learned are never hidden."""
    model, vocabulary = masked(tmp_path)
    masking, random = Masking(vocabulary, 0.3, False, 0), np.random.default_rng(3)
    ids = random.integers(5, 300, 21)
    ids[[0, 20]] = vocabulary.special_ids["bos_token_id"], vocabulary.special_ids["eos_token_id"]
    learned = np.arange(21) != 4
    documents = [document(ids, learned), document(random.integers(5, 300, 3))]
    expected = np.zeros(3)
    for place in (n for n in range(1, 20) if n != 4):
        first = place // 8 * 8
        piece = torch.from_numpy(ids[None, first : first + 8].copy())
        piece[0, place - first] = masking.mask
        with torch.no_grad():
            scores = torch.log_softmax(model(piece).logits[0, place - first], dim=-1)
        expected += -scores[ids[place]].item(), 1, int(scores.argmax() == ids[place])
    assert pseudo_likelihoods(model, documents, 8, 5, masking, 10_000)[0] == pytest.approx(expected, rel=1e-5)
    assert pseudo_likelihoods(model, documents, 8, 5, masking, 10_000)[:, 1].tolist() == [18, 3]
    assert pseudo_likelihoods(model, documents, 8, 5, masking, 7)[:, 1].tolist() == [6, 1]
    assert pseudo_likelihoods(model, [], 8, 5, masking, 7).shape == (0, 3)
