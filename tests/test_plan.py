"""plan: counts are those of the real model, memory follows formulas of the field, what cannot fit is refused."""

from __future__ import annotations

import dataclasses
import doctest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import plan
import tiny
from plan import Plan, describe, make, optimizer_bytes, refuse


def params(**changes: Any) -> Any:
    given = {
        "per_device_train_batch_size": 4,
        "global_batch_size": 8,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "lora": None,
        "quantization": None,
    }
    return SimpleNamespace(**{**given, **changes})


LORA = SimpleNamespace(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["q_proj", "down_proj"])
DOUBLE = SimpleNamespace(bnb_4bit_use_double_quant=True)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.base(tmp_path / "base")


def test_numbers_of_a_full_training(base: Path) -> None:
    real = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    count = sum(p.numel() for p in real.parameters())
    found = make(base, 300, params(), 16, 10)
    assert (found.parameters, found.trained, found.tokens_per_step, found.steps) == (count, count, 128, 10)
    assert found.memory["weights"] == found.memory["gradients"] == 4 * count
    assert found.memory["optimizer"] == 8 * count
    text = describe(found)
    assert f"{count:,}, trained {count:,} (100.00%)" in text and "10 of 128 tokens, 1,280 in all" in text


def kept(model: Any, rows: int) -> int:
    """Bytes that autograd holds after a real forward pass."""
    own = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = model.base_model(input_ids=torch.zeros(rows, 16, dtype=torch.long), use_cache=False)
    assert alive[0].requires_grad
    return sum(sizes.values())


def test_activations_are_those_that_a_real_pass_keeps(base: Path) -> None:
    real = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).train()
    head = make(base, 300, params(), 16, 10).memory["activations"]
    assert head == pytest.approx(kept(real, 4), rel=0.02)
    twice = make(base, 300, params(per_device_train_batch_size=8), 16, 10).memory["activations"]
    assert twice == pytest.approx(2 * head, rel=0.05)
    less = make(base, 300, params(gradient_checkpointing=True), 16, 10).memory["activations"]
    assert less < 0.7 * head


def test_an_adapter_on_a_base_of_4_bits(base: Path) -> None:
    found = make(base, 300, params(lora=LORA, quantization=DOUBLE), 16, 10)
    layers = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    trained = 2 * 2 * ((64 + 64) + (128 + 64))
    assert found.trained == trained
    rest = found.parameters - layers
    assert found.memory["weights"] == pytest.approx(layers * 4.127 / 8 + 4 * rest, rel=1e-3)
    assert found.memory["optimizer"] == 8 * trained
    plain = make(base, 300, params(lora=LORA), 16, 10)
    assert plain.memory["weights"] > 2 * found.memory["weights"] - 8 * rest


def test_states_of_optimizers() -> None:
    matrix, norm = torch.Size([1024, 512]), torch.Size([512])
    both = [(matrix, True), (norm, False)]
    assert optimizer_bytes("adamw_torch_fused", both) == 8 * (1024 * 512 + 512)
    assert optimizer_bytes("muon", both) == 4 * 1024 * 512 + 8 * 512
    assert optimizer_bytes("adafactor", both) == 4 * (1024 + 512 + 512)
    assert optimizer_bytes("paged_adamw_8bit", both) == pytest.approx(2.04 * 1024 * 512 + 8 * 512)
    assert optimizer_bytes("paged_adamw_32bit", both) == optimizer_bytes("adamw_torch", both)
    assert optimizer_bytes("lion_32bit", both) == 4 * (1024 * 512 + 512)
    assert optimizer_bytes("sgd", both) == 0


def test_seven_billion_parameters_take_no_memory_to_plan(tmp_path: Path) -> None:
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    big = tiny.base(tmp_path / "big", **shape, num_key_value_heads=32, tie_word_embeddings=False)
    found = make(big, 32000, params(per_device_train_batch_size=1), 1024, 10)
    assert found.parameters == 6_738_415_616  # Llama 2 7B
    assert found.memory["optimizer"] == 8 * 6_738_415_616
    with pytest.raises(SystemExit, match=r"needs about [\d,]+ MiB \(optimizer most of all\).*train an adapter"):
        refuse(dataclasses.replace(found, free=23 * 2**30))


def test_what_fits_is_not_refused(base: Path) -> None:
    found = make(base, 300, params(), 16, 10)
    refuse(dataclasses.replace(found, free=found.needed + 1))
    with pytest.raises(SystemExit, match="lower per_device_train_batch_size, or set gradient_checkpointing"):
        refuse(Plan(1, 1, 1, 1, {"program": 9, "activations": 5.0, "weights": 1.0}, "CPU", 3))


def test_the_machine_has_memory() -> None:
    name, free, program = plan._device()
    assert name and free > program >= 0


def test_the_bits_of_a_quantised_weight() -> None:
    assert doctest.testmod(plan).failed == 0
    assert plan.quantised_bits(SimpleNamespace(bnb_4bit_use_double_quant=False)) == 4.5
    assert plan.quantised_bits(SimpleNamespace(load_in_8bit=True)) == 8
