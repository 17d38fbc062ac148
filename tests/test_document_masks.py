"""document_masks: a document in a block has the logits and gives the gradients that it has alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM

import document_masks
import loss_head
from document_masks import Separated, begins, check, check_begins, inputs, positions, visible, way
from group_blocks import blocks_schema
from kit import arrow
from kit.model import IGNORED, Blocks, MaskedBlocks

SHAPE = {
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BLOOM = {"vocab_size": 120, "hidden_size": 32, "n_layer": 2, "n_head": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SHAPE,
    "qwen2": SHAPE,
    "mistral": {**SHAPE, "sliding_window": 4},
    "bloom": BLOOM,
    "roberta": {**SHAPE, "max_position_embeddings": 66},
    "bert": SHAPE,
    "modernbert": {**SHAPE, "local_attention": 8, "bos_token_id": 2, "cls_token_id": 2, "sep_token_id": 3},
}
MASKED = ("roberta", "bert", "modernbert")
CASES = [(name, how) for name in MODELS for how in ("eager", "sdpa") if (name, how) != ("bloom", "sdpa")]
STARTS = [[0, 5, 12, 16], [0, 16], [0, 9, 13]]  # documents of 5, 7 and 4; 16; 9 and 4 with 3 of padding


def build(name: str, attention: str = "eager") -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**MODELS[name], attn_implementation=attention)
    factory = AutoModelForMaskedLM if name in MASKED else AutoModelForCausalLM
    model = factory.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)  # attention that a wrong mask would change
    return model


def blocks(folder: Path, starts: list[list[int]] | None = STARTS) -> tuple[Blocks, pa.Table]:
    random = np.random.default_rng(0)
    ids = random.integers(4, 120, (3, 16)).astype(np.uint16)
    for row, places in enumerate(STARTS):
        ids[row, places[:-1]] = 2  # BOS
        ids[row, places[-1] :] = 1
    columns = [pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), 16)]
    if starts:
        columns.append(pa.array(starts, pa.list_(pa.uint32())))
    schema = blocks_schema(pa.uint16(), 16, learn=False, starts=starts is not None)
    with arrow.Writer(folder, schema) as out:
        out.write(pa.Table.from_arrays(columns, schema=schema))
        out.counts = {"tokens": sum(places[-1] for places in STARTS)}
    table = arrow.table(folder)
    return Blocks(table, arrow.manifest(folder)["counts"]["tokens"]), table


def documents() -> list[tuple[int, int, int]]:
    """Return row, begin and end of each document."""
    return [(row, a, b) for row, places in enumerate(STARTS) for a, b in itertools.pairwise(places)]


@pytest.mark.parametrize(("name", "attention"), CASES)
@pytest.mark.parametrize("chunked", [False, True], ids=["stock", "loss_head"])
def test_a_block_gives_what_its_documents_give_alone(name: str, attention: str, chunked: bool, tmp_path: Path) -> None:
    """Logits, the summed loss and the gradient of every weight, to 3e-5."""
    model = build(name, attention)
    if chunked:  # ModernBERT keeps its own loss
        chunked = loss_head.install(model)
        assert chunked == (name != "modernbert")
    loaded, table = blocks(tmp_path / "blocks")
    batch = Separated(loaded, table, way(model)).__getitems__([0, 1, 2])
    if not way(model).causal:
        batch["labels"][:, ::3] = IGNORED
    labels = batch.pop("labels")
    logits = model(**batch).logits
    if chunked or way(model).causal:
        total = model(**batch, labels=labels, num_items_in_batch=torch.tensor(40.0)).loss
    else:
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 40
    total.backward()
    together = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = torch.zeros(())
    for row, begin, end in documents():
        ids = batch["input_ids"][row : row + 1, begin:end]
        single = model(input_ids=ids).logits
        assert torch.allclose(logits[row, begin:end], single[0], atol=3e-5, rtol=1e-5)
        target = labels[row, begin + 1 : end] if way(model).causal else labels[row, begin:end]
        scores = single[0, :-1] if way(model).causal else single[0]
        one = torch.nn.functional.cross_entropy(scores, target, reduction="sum") / 40
        one.backward()
        alone += one.detach()
    assert torch.isclose(total.detach(), alone, atol=1e-5)
    for key, parameter in model.named_parameters():
        if key in together:
            assert torch.allclose(together[key], parameter.grad, atol=3e-5, rtol=1e-5), key


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_the_check_lets_these_models_pass(name: str, attention: str) -> None:
    check(build(name, attention))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_the_check_judges_fresh_weights_and_bfloat16(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    factory = AutoModelForMaskedLM if name in MASKED else AutoModelForCausalLM
    model = factory.from_config(CONFIG_MAPPING[name](**MODELS[name]), dtype=dtype)
    state = torch.get_rng_state()
    check(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", MODELS)
def test_the_check_refuses_a_model_that_mixes_documents(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers does, silently, when an attention_mask is passed, too."""
    ignored = {"attention_mask": torch.ones(1, 16)}
    monkeypatch.setattr(
        document_masks, "inputs", lambda place, how: {k: v for k, v in ignored.items() if place.shape[1] == 16}
    )
    with pytest.raises(SystemExit, match="does not keep the documents of a block apart"):
        check(build(name))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_window_is_kept_within_a_document(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers takes a whole mask for that of all layers, ModernBERT's would look over the document."""
    model = build("modernbert", attention)
    assert document_masks.window(model) == 4
    monkeypatch.setattr(document_masks, "_narrowed", lambda forward, _, *args, **kwargs: forward(*args, **kwargs))
    with pytest.raises(SystemExit, match="does not keep the documents of a block apart"):
        check(build("modernbert", attention))


@pytest.mark.parametrize("name", ["deberta-v2", "longformer"])
def test_a_model_that_takes_no_such_mask_is_refused(name: str) -> None:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**SHAPE, attention_window=4, relative_attention=True, pos_att_type="c2p|p2c")
    with pytest.raises(SystemExit, match=r"takes no such mask \(.*set train_model\.mask_documents to false"):
        check(AutoModelForMaskedLM.from_config(config))


def test_a_little_of_the_document_before_is_too_much() -> None:
    """As where attention is kept apart, but a short convolution runs on; 0.03 of what no mask at all would do."""
    model = build("llama")
    check(model)
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, __, made: made + 0.01 * made.roll(1, 1))
    with pytest.raises(SystemExit, match="does not keep the documents of a block apart"):
        check(model)


def test_a_state_that_runs_through_the_block_is_refused() -> None:
    """Mamba has no attention to mask."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING["mamba"](vocab_size=120, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(SystemExit, match=r"set train_model\.mask_documents to false"):
        check(AutoModelForCausalLM.from_config(config))


def test_the_first_token_of_a_document_is_not_predicted(tmp_path: Path) -> None:
    loaded, table = blocks(tmp_path / "blocks")
    batch = Separated(loaded, table, way(build("llama"))).__getitems__([2, 0])
    ids = batch["input_ids"]
    expected = ids.clone()
    expected[0, [0, 9, 13, 14, 15]] = IGNORED
    expected[1, [0, 5, 12]] = IGNORED
    assert torch.equal(batch["labels"], expected)
    assert batch["position_ids"].tolist()[0] == [*range(9), *range(4), *range(3)]
    assert batch["use_cache"] is False


def test_blocks_of_a_stream_have_their_begins_in_the_tokens(tmp_path: Path) -> None:
    """A document that began in the block before goes on as one of its own."""
    _, packed = blocks(tmp_path / "packed")
    _, stream = blocks(tmp_path / "stream", starts=None)
    rows = np.arange(3)
    found, expected = begins(stream, rows, bos=2), begins(packed, rows)
    assert np.array_equal(found[:2], expected[:2])  # in the last one, padding hangs on to its document, unlearned
    assert begins(stream, rows, bos=3).sum() == 3
    with pytest.raises(ValueError, match="neither have `starts`"):
        begins(stream, rows)


def test_a_document_of_one_token_may_end_a_block() -> None:
    ids = pa.FixedSizeListArray.from_arrays(pa.array([2, 7, 7, 2, 2, 7, 1, 1]), 4)
    columns = pa.table({"input_ids": ids, "starts": [[0, 3, 4], [0, 2]]})
    found = begins(columns, np.arange(2))
    assert found.tolist() == [[True, False, False, True], [True, False, True, False]]


def test_a_stream_that_does_not_tell_its_documents_is_refused(tmp_path: Path) -> None:
    """A chat template without BOS, or one that puts it before each turn."""
    _, stream = blocks(tmp_path / "stream", starts=None)
    check_begins(stream, {"documents": 6}, bos=2)
    check_begins(stream, {"documents": 9, "dropped_tokens": 16}, bos=2)
    for counts, bos in (({"documents": 7}, 2), ({"documents": 5}, 2), ({"documents": 6}, 3), ({"documents": 6}, None)):
        with pytest.raises(SystemExit, match=r"do not tell where each begins; set group_blocks\.mode to best_fit"):
            check_begins(stream, counts, bos)
    check_begins(blocks(tmp_path / "packed")[1], {"documents": 99}, bos=None)


def test_masked_blocks_keep_their_masking_of_the_position(tmp_path: Path) -> None:
    loaded, table = blocks(tmp_path / "blocks")
    chosen = np.zeros((1, 16), bool)
    chosen[0, 1] = True
    masked = MaskedBlocks(loaded, lambda ids, learned, positions: (np.where(chosen, positions[0], ids), chosen))
    data = Separated(masked, table, way(build("roberta")))
    batch = data.at([0], [77])
    assert batch["input_ids"][0, 1] == 77 and batch["labels"][0, 1] == loaded[0]["input_ids"][1]
    assert (batch["labels"] != IGNORED).sum() == 1 and batch["attention_mask"].shape == (1, 1, 16, 16)
    assert torch.equal(data.__getitems__([2])["input_ids"], data.at([2], [2])["input_ids"])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_positions_and_masks_follow_the_lengths(lengths: list[int]) -> None:
    found = np.zeros((1, sum(lengths)), bool)
    found[0, np.cumsum([0, *lengths[:-1]])] = True
    place = positions(found)
    assert place[0].tolist() == [place for length in lengths for place in range(length)]
    document = np.repeat(np.arange(len(lengths)), lengths)
    seen = visible(torch.from_numpy(place), causal=False)[0, 0].numpy()
    assert np.array_equal(seen, document[:, None] == document)
    assert np.array_equal(visible(torch.from_numpy(place), causal=True)[0, 0].numpy(), np.tril(seen))


def test_alibi_begins_anew_and_padding_masks_go_the_models_own_way() -> None:
    model = build("bloom")
    how = way(model)
    place = torch.tensor([[0, 1, 2, 0, 1]])
    alibi = model.base_model.build_alibi_tensor(inputs(place, how)["attention_mask"], 2, torch.float32)
    single = model.base_model.build_alibi_tensor(torch.ones(1, 3), 2, torch.float32)
    assert torch.equal(alibi[:, :, :3], single) and torch.equal(alibi[:, :, 3:], single[:, :, :2])
