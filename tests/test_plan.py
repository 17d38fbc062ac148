"""plan: counts are those of the real model, memory follows formulas of the field, what cannot fit is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import plan
import tiny
import train_loop
import train_model
from adapter_params import Quantization
from conftest import Runner
from kit.tokenizer import Vocabulary
from plan import Plan, make, optimizer_bytes
from train_model import Params


def params(**changes: Any) -> Params:
    return Params.model_validate({**tiny.TRAIN, "global_batch_size": 8, **changes})


LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A config for random weights with the tokenizer, of 300 entries, beside it (in tokenizer/)."""
    tiny.tokenizer(tmp_path / "tokenizer")
    return tiny.base(tmp_path / "base")


def made(base: Path, settings: Params) -> Plan:
    return make(base, base.parent / "tokenizer", settings, 16, 10)


def test_numbers_of_a_full_training(base: Path) -> None:
    real = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    count = sum(p.numel() for p in real.parameters())
    found = made(base, params())
    assert (found.parameters, found.trained, found.tokens_per_step, found.steps) == (count, count, 128, 10)
    assert found.memory["weights"] == found.memory["gradients"] == 4 * count
    assert found.memory["optimizer"] == 8 * count
    text = str(found)
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
    head = made(base, params()).memory["activations"]
    assert head == pytest.approx(kept(real, 4), rel=0.02)
    twice = made(base, params(per_device_train_batch_size=8)).memory["activations"]
    assert twice == pytest.approx(2 * head, rel=0.05)
    less = made(base, params(gradient_checkpointing=True)).memory["activations"]
    assert less < 0.7 * head
    assert made(base, params(bf16=True)).memory["activations"] == pytest.approx(0.6 * head)


def test_an_adapter_on_a_base_of_4_bits(base: Path) -> None:
    found = made(base, params(lora=LORA, quantization=tiny.QUANTIZATION))
    layers = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    trained = 2 * 2 * ((64 + 64) + (128 + 64))
    assert found.trained == trained
    rest = found.parameters - layers
    assert found.memory["weights"] == pytest.approx(layers * 4.127 / 8 + 4 * rest, rel=1e-3)
    assert found.memory["optimizer"] == 8 * trained
    plain = made(base, params(lora=LORA))
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


def test_muon_has_no_table_of_positions_in_the_plan_either(tmp_path: Path) -> None:
    """GPT-2 of one layer: 4 bytes for each number of its 12 x 32 x 32 matrices, 8 for all others."""
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "num_hidden_layers": 1, "hidden_size": 32}
    base = tiny.base(tmp_path / "base", model_type="gpt2", architectures=["GPT2LMHeadModel"], **shape)
    found = make(base, tiny.tokenizer(tmp_path / "tokenizer"), params(optim="muon"), 16, 1)
    assert found.memory["optimizer"] == 8 * found.parameters - 4 * 12 * 32 * 32


def test_seven_billion_parameters_take_no_memory_to_plan(tmp_path: Path) -> None:
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    big = tiny.base(tmp_path / "big", **shape, num_key_value_heads=32, tie_word_embeddings=False, vocab_size=32000)
    save_file({}, big / "model.safetensors")  # so its vocabulary is the base's
    tokenizer = tiny.tokenizer(tmp_path / "tokenizer")
    found = make(big, tokenizer, params(per_device_train_batch_size=1), 1024, 10)
    assert found.parameters == 6_738_415_616  # Llama 2 7B
    assert found.memory["optimizer"] == 8 * 6_738_415_616
    with pytest.raises(SystemExit, match=r"needs about [\d,]+ MiB \(optimizer most of all\).*train an adapter"):
        dataclasses.replace(found, free=23 * 2**30).refuse()


def test_what_fits_is_not_refused(base: Path) -> None:
    found = made(base, params())
    dataclasses.replace(found, free=found.needed + 1).refuse()
    with pytest.raises(SystemExit, match="lower per_device_train_batch_size, or set gradient_checkpointing"):
        Plan(1, 1, 1, 1, {"program": 9, "activations": 5.0, "weights": 1.0}, "CPU", 3).refuse()


def test_the_machine_has_memory_and_a_container_what_its_limit_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    name, free, program = plan._device()
    assert name and free > program >= 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(plan, "_cgroups", lambda: iter([(5e6, 4e6), (9e6, 2e6)]))
    _, free, program = plan._device()
    assert free == program + 1e6


def test_the_bits_of_a_quantised_weight() -> None:
    assert plan.quantised_bits(Quantization(bnb_4bit_use_double_quant=False)) == 4.5
    assert plan.quantised_bits(Quantization(load_in_8bit=True)) == 8


@pytest.mark.parametrize(
    "lora",
    [
        {**LORA, "init_lora_weights": "pissa"},
        {"target_modules": "all-linear", "adalora": {}},
        {**LORA, "modules_to_save": ["embed_tokens", "lm_head"]},  # copies of what has no values
    ],
)
def test_every_kind_of_adapter_has_the_size_of_the_real_one(base: Path, lora: dict[str, Any]) -> None:
    settings = params(lora=lora)
    real = train_loop.prepare_model(base, base.parent / "tokenizer", settings, 10)
    found = made(base, settings)
    assert {"parameters": found.parameters, "trained_parameters": found.trained} == train_loop.sizes(real)


def test_layers_that_do_not_exist_are_named_without_loading_the_base(base: Path) -> None:
    with pytest.raises(SystemExit, match="the model has no layer query_key_value; it has down_proj"):
        made(base, params(lora={**LORA, "target_modules": ["query_key_value"]}))


@pytest.mark.parametrize("kind", ["bloom", "gpt2", "mistral", "qwen2", "qwen3"])
def test_other_architectures_have_a_plan(kind: str, tmp_path: Path) -> None:
    base, tokenizer = tmp_path / "base", tiny.tokenizer(tmp_path / "tokenizer")
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    CONFIG_MAPPING[kind](**shape).save_pretrained(base)
    found = make(base, tokenizer, params(), 16, 10)
    real = train_loop.prepare_model(base, tokenizer, params())
    assert found.parameters == train_loop.sizes(real)["parameters"] and found.memory["activations"] > 0


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts_has_a_plan_and_the_activations_of_a_real_pass(kind: str, tmp_path: Path) -> None:
    tiny.tokenizer(tmp_path / "tokenizer")
    experts = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    folder = tiny.base(tmp_path / kind, model_type=kind, architectures=None, **experts)
    real = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).train()
    found = made(folder, params(per_device_train_batch_size=4))
    assert found.parameters == sum(p.numel() for p in real.parameters())
    assert found.memory["activations"] == pytest.approx(kept(real, 4), rel=0.02)


def test_a_modernbert_has_a_plan(tmp_path: Path) -> None:
    """Its weights are drawn by a function that looks at values, of which fake tensors have none."""
    tiny.masked_tokenizer(tmp_path / "tokenizer")
    config = {"architectures": ["ModernBertForMaskedLM"], "model_type": "modernbert", "pad_token_id": 1}
    folder = tiny.base(tmp_path / "base", **config)
    size = Vocabulary(tmp_path / "tokenizer").size
    real = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(folder, vocab_size=size))
    assert made(folder, params(objective="mlm")).parameters == sum(p.numel() for p in real.parameters())


def test_a_masked_model_has_a_plan(tmp_path: Path) -> None:
    base, tokenizer = tiny.roberta(tmp_path / "base"), tiny.masked_tokenizer(tmp_path / "tokenizer")
    settings = params(objective="mlm")
    found = make(base, tokenizer, settings, 16, 10)
    assert found.parameters == train_loop.sizes(train_loop.prepare_model(base, tokenizer, settings))["parameters"]


def test_the_command_line_plans_and_trains_nothing(project: Path, run_stage: Runner) -> None:
    tiny.phase(project, "pretrain")
    train = {**tiny.TRAIN, "max_steps": None, "num_train_epochs": 2}
    tiny.params_yaml(project, pretrain={"base": "models/configs/tiny", "train_model": train})
    done = run_stage(project, "train_model", "pretrain", "--plan")
    assert done.returncode == 0, done.stderr
    assert "steps        10 of 64 tokens, 640 in all" in done.stdout and "MiB free" in done.stdout
    assert not (project / "models/pretrain").exists() and not (project / ".work/train_model@pretrain").exists()


def test_what_cannot_fit_is_refused_before_the_base_is_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.phase(tmp_path, "pretrain")
    monkeypatch.setattr(plan, "_device", lambda: ("CPU", 1.0, 0.0))
    monkeypatch.setattr(train_loop, "prepare_model", lambda *_: pytest.fail("the base was loaded"))
    outputs = [tmp_path / "trained", tmp_path / "plots"]
    with pytest.raises(SystemExit, match=r"needs about [\d,]+ MiB .* has 0 free; "):
        train_model.compute("pretrain", base, params(), outputs, tmp_path / "work", "test")
