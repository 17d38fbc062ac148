"""loss_head: loss and gradients of the model's own head, in a fraction of its memory, or the model's own way."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM

import loss_head
from kit.model import IGNORED, mean_loss

SHAPE = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODELS: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "llama-tied": {**WIDE, "tie_word_embeddings": True},
    "qwen2": WIDE,
    "qwen3": {**WIDE, "head_dim": 16},
    "mistral": WIDE,
    "bloom": {"vocab_size": 120, "hidden_size": 32, "n_layer": 2, "n_head": 2},
    "gpt2": {"vocab_size": 120, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "phi": WIDE,  # a bias in the head
    "roberta": {**WIDE, "max_position_embeddings": 66, "pad_token_id": 1},
    "bert": WIDE,
}
UNLIKE: dict[str, dict[str, Any]] = {
    "gemma2": {**WIDE, "head_dim": 16, "query_pre_attn_scalar": 16},  # caps its logits
    "cohere": {**WIDE, "pad_token_id": 0},  # scales them
    "granite": {**WIDE, "logits_scaling": 8.0},
    "mixtral": {**WIDE, "num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 1e-4},
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    kind = name.removesuffix("-tied")
    options = {**MODELS, **UNLIKE}[name]
    config = CONFIG_MAPPING[kind](**options)
    factory = AutoModelForMaskedLM if kind in ("roberta", "bert") else AutoModelForCausalLM
    model = factory.from_config(config, dtype=torch.float32)
    for name_, parameter in model.named_parameters():
        if name_.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def batch(masked: bool = True) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 120, (3, 24))
    labels = ids.clone()
    if masked:
        labels[torch.rand(3, 24) < 0.6] = IGNORED
    return {"input_ids": ids, "labels": labels}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run(model: Any, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(2)  # dropout
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, atol=1e-5, rtol=1e-5), name


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_model(name: str) -> None:
    """Also with the number of labels in all accumulated batches, as Trainer gives it."""
    model, given_batch = build(name), batch()
    loss, theirs = run(model, **given_batch)
    plain = model(input_ids=given_batch["input_ids"]).logits
    assert loss_head.install(model)
    ours, found = run(model, **given_batch)
    assert torch.isclose(ours, loss, atol=1e-6)
    assert_same(found, theirs)
    shift = name not in ("roberta", "bert")
    count = int((given_batch["labels"][:, 1:] if shift else given_batch["labels"]).ne(IGNORED).sum())
    fraction, found = run(model, **given_batch, num_items_in_batch=torch.tensor(4 * count))
    assert torch.isclose(fraction, loss / 4, atol=1e-6)
    assert_same(found, {key: value / 4 for key, value in theirs.items()})
    del model.forward
    assert model(**given_batch).logits.shape == plain.shape


def test_without_labels_the_logits_are_there() -> None:
    model, ids = build("llama").eval(), batch()["input_ids"]
    before = model(input_ids=ids).logits
    loss_head.install(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model(input_ids=ids, labels=ids).logits is None


@pytest.mark.parametrize("name", UNLIKE)
def test_a_model_that_changes_its_logits_keeps_its_own_loss(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = build(name)
    before = model(**batch()).loss
    assert not loss_head.install(model)
    reason = "it adds a loss of its router" if name == "mixtral" else "it changes the logits after its output layer"
    assert reason in capsys.readouterr().out
    assert torch.equal(model(**batch()).loss, before)


@pytest.mark.parametrize("name", ["electra", "xlm"])
def test_a_masked_model_whose_head_takes_other_than_its_hidden_states_keeps_its_own_loss(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """ELECTRA's generators make them smaller between; XLM's layer computes its loss itself."""
    own = {"electra": {**WIDE, "embedding_size": 16}, "xlm": {"vocab_size": 120, "emb_dim": 32, "n_layers": 2}}
    config = CONFIG_MAPPING[name](**own[name], **({"n_heads": 2, "pad_index": 2} if name == "xlm" else {}))
    model = AutoModelForMaskedLM.from_config(config)
    assert not loss_head.install(model)
    assert "takes something else than its base model gives" in capsys.readouterr().out
    assert model(**batch()).loss is not None


def test_memory_that_runs_out_is_no_reason_of_the_model() -> None:
    model = build("llama")

    def full(**given: Any) -> Any:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        loss_head._why_not(model, loss_head._Head(model), full)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}])
def test_adapters_learn_the_same(options: dict[str, Any]) -> None:
    """A frozen head gets no gradient; one that is trained beside the adapter (modules_to_save) gets its own."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.1, target_modules=["q_proj", "down_proj"], **options)
    model = get_peft_model(build("llama"), config)
    loss, theirs = run(model, **batch())
    assert loss_head.install(model)
    ours, found = run(model, **batch())
    assert torch.isclose(ours, loss, atol=1e-6)
    assert_same(found, theirs)
    assert any("lm_head" in name for name in found) == (options == {"modules_to_save": ["lm_head"]})


def test_an_adapter_on_the_head_keeps_the_models_own_loss() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"]))
    assert not loss_head.install(model)


def test_installing_uses_up_no_random_numbers_and_no_mode() -> None:
    model = build("llama")
    model.model.layers[0].eval()
    state = torch.get_rng_state()
    loss_head.install(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training


def test_the_same_bits_on_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_head, "chunk_rows", lambda vocabulary: 64)  # more than one chunk
    results = []
    for _ in range(2):
        model = build("llama-tied")
        loss_head.install(model)
        results.append(run(model, input_ids=torch.arange(3 * 48).reshape(3, 48) % 120, labels=torch.ones(3, 48).long()))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], gradient) for name, gradient in results[1][1].items())


def test_a_batch_without_labels_has_no_loss_and_no_gradient() -> None:
    model = build("llama")
    loss_head.install(model)
    ids = batch()["input_ids"]
    loss, found = run(model, input_ids=ids, labels=torch.full_like(ids, IGNORED))
    assert loss == 0 and all(not gradient.any() for gradient in found.values())


@settings(max_examples=40)
@given(
    rows=st.integers(1, 300),
    vocabulary=st.integers(2, 90),
    bias=st.booleans(),
    frozen=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_chunks_sum_up_to_the_whole(rows: int, vocabulary: int, bias: bool, frozen: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 8, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, 8, generator=generator, requires_grad=not frozen)
    offset = torch.randn(vocabulary, generator=generator, requires_grad=True) if bias else None
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    leaves = [t for t in (hidden, weight, offset) if t is not None and t.requires_grad]
    with mock.patch.object(loss_head, "chunk_rows", lambda vocabulary: 70):
        ours = loss_head.summed_loss(hidden, weight, targets, offset)
    logits = functional.linear(hidden, weight, offset)
    theirs = functional.cross_entropy(logits, targets, reduction="sum")
    # A row's loss is the difference of two numbers as large as its logits, each rounded: up to 2.8 steps, measured.
    step = torch.finfo(torch.float32).eps * logits.detach().abs().max()
    assert (ours - theirs).abs() <= 8 * rows * step
    for one, other in zip(
        torch.autograd.grad(0.5 * ours, leaves), torch.autograd.grad(0.5 * theirs, leaves), strict=True
    ):
        assert torch.allclose(one, other, atol=2e-5, rtol=1e-4)


def test_under_autocast_the_head_multiplies_in_bfloat16_and_sums_in_float32() -> None:
    model = build("llama")
    reference = copy.deepcopy(model)
    loss_head.install(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours, found = run(model, **batch())
        theirs, expected = run(reference, **batch())
    assert ours.dtype == torch.float32 and torch.isclose(ours, theirs.float(), rtol=1e-2)
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.allclose(found[name], gradient, atol=1e-2), name


def test_evaluation_needs_no_gradient() -> None:
    model = build("llama").eval()
    loss = model(**batch()).loss
    loss_head.install(model)
    with torch.no_grad():
        ours = model(**batch()).loss
    assert not ours.requires_grad and torch.isclose(ours, loss, atol=1e-6)


def test_places_are_those_that_predict_a_label() -> None:
    labels = batch()["labels"]
    places = loss_head.learned(labels.numpy(), shift=True)
    rows, columns = torch.nonzero(labels[:, 1:] != IGNORED, as_tuple=True)
    assert places.tolist() == (rows * 24 + columns).tolist()
    assert (
        loss_head.learned(labels.numpy(), shift=False).tolist()
        == torch.nonzero(labels.flatten() != IGNORED).flatten().tolist()
    )


class Waits(TorchDispatchMode):
    """Counts what makes a program wait for its GPU: a size or a value that depends on the numbers in a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
        if func is torch.ops.aten.index.Tensor:  # by numbers it does not
            waits = any(places is not None and places.dtype == torch.bool for places in args[1])
        if waits:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "roberta"])
def test_a_step_does_not_wait_for_the_device(name: str) -> None:
    model, given_batch = build(name), batch()
    loss_head.install(model)
    places = torch.from_numpy(loss_head.learned(given_batch["labels"].numpy(), name == "llama"))
    torch.manual_seed(2)  # dropout
    with Waits() as waits:
        told = model(**given_batch, learned=places, num_items_in_batch=torch.tensor(7)).loss
        told.backward()
        assert waits.found == []
        told.item()
        assert len(waits.found) == 1
    torch.manual_seed(2)
    assert torch.equal(told, model(**given_batch, num_items_in_batch=torch.tensor(7)).loss)


def test_the_loss_of_many_blocks_is_the_one_of_their_logits() -> None:
    """AdaLoRA's term for orthogonal matrices is part of what is trained, none of what is measured."""
    from peft import AdaLoraConfig, get_peft_model

    class Some:
        causal = True

        def __len__(self) -> int:
            return 3

        def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
            return {key: values[rows] for key, values in batch().items()}

    options = {"init_r": 4, "target_r": 2, "total_step": 9, "orth_reg_weight": 0.5, "target_modules": ["q_proj"]}
    model = get_peft_model(build("llama"), AdaLoraConfig(task_type="CAUSAL_LM", **options))
    theirs = mean_loss(model, Some(), 2)
    stock, gradients_of_stock = run(model, **batch())
    assert loss_head.install(model)
    assert loss_head.mean_loss(model, Some(), 2) == pytest.approx(theirs, rel=1e-6)
    ours, found = run(model, **batch())
    assert ours > theirs + 0.01 and torch.isclose(ours, stock, atol=1e-6)
    assert_same(found, gradients_of_stock)
