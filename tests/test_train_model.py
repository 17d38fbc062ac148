"""train_model: the right tokens are learned, in the frozen order, to the same bits after a kill and on every run."""

from __future__ import annotations

import inspect
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

import adapters
import bpe_training
import loss_head
import optimizers
import plan
import tiny
import train_loop
import train_tokenizer
from block_order import BlockOrder, block_receipt, step_receipt
from conftest import Runner, copy_project, kill_at
from group_blocks import blocks_schema
from kit import arrow
from kit.model import IGNORED, Blocks, load_model, max_positions, mean_loss, new_tokens, objective
from kit.tokenizer import BYTE_TO_UNICODE, Vocabulary
from test_loss_head import Waits
from train_model import SCHEDULES, WITHOUT_WARMUP, Params, examples, spelled, total_steps


def open_blocks(folder: Path) -> Blocks:
    return Blocks(arrow.table(folder), arrow.manifest(folder)["counts"]["tokens"])


def params(**changes: Any) -> Params:
    return Params.model_validate({**tiny.TRAIN, **changes})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A config for random weights with the tokenizer beside it (in tokenizer/)."""
    tiny.tokenizer(tmp_path / "tokenizer")
    return tiny.base(tmp_path / "base")


@pytest.fixture
def weights(base: Path, tmp_path: Path) -> Path:
    """A base with weights."""
    model = train_loop.prepare_model(base, tmp_path / "tokenizer", params())
    train_loop.save(model, tmp_path / "tokenizer", base, params(), tmp_path / "weights")
    return tmp_path / "weights"


def test_labels_are_the_ids_but_padding_and_prompts_have_none(tmp_path: Path) -> None:
    """The EOS of an answer is an id like any other and learned; only marks and the count of tokens take labels away."""
    folder = tiny.blocks(tmp_path / "blocks", 12, masked=True, padding=3)
    table, blocks = arrow.table(folder), open_blocks(folder)
    ids, learn = table["input_ids"].to_pylist(), table["learn"].to_pylist()
    order = [11, 0, 7, 4, 5]
    batch = blocks.__getitems__(order)
    for row, index in enumerate(order):
        assert batch["input_ids"][row].tolist() == ids[index]
        for place, (identity, marked) in enumerate(zip(ids[index], learn[index], strict=True)):
            padding = index == 11 and place >= tiny.BLOCK_SIZE - 3
            assert batch["labels"][row][place] == (identity if marked and not padding else IGNORED)
    assert len(blocks) == 12
    assert torch.equal(blocks[4]["labels"], batch["labels"][3])


def test_all_tokens_are_learned_without_marks(tmp_path: Path) -> None:
    batch = open_blocks(tiny.blocks(tmp_path / "blocks", 3, padding=2)).__getitems__([0, 2])
    assert torch.equal(batch["labels"][0], batch["input_ids"][0])
    assert batch["labels"][1].tolist()[-2:] == [IGNORED, IGNORED]


def test_the_number_of_steps() -> None:
    assert total_steps(params(max_steps=None, num_train_epochs=1, global_batch_size=16), 1000) == 63
    assert total_steps(params(max_steps=None, num_train_epochs=0.5), 1000) == 125
    assert total_steps(params(max_steps=7), 1000) == 7


def test_steps_take_the_blocks_of_the_frozen_order(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps of four blocks over twenty blocks: the second epoch begins inside step 6, and no step is shorter."""
    seen: list[list[int]] = []
    blocks = open_blocks(tiny.blocks(tmp_path / "train", 20))
    held_out = open_blocks(tiny.blocks(tmp_path / "eval", 5))
    original = Blocks.__getitems__
    monkeypatch.setattr(
        Blocks, "__getitems__", lambda self, rows: (self is blocks and seen.append(rows), original(self, rows))[1]
    )
    model = train_loop.prepare_model(base, tmp_path / "tokenizer", params())
    order = BlockOrder(20, seed=0)
    curves = train_loop.train(model, blocks, held_out, order, 6, params(), tmp_path / "work", "test").curves
    assert [row for rows in seen[:6] for row in rows] == [order.block(position) for position in range(24)]
    assert [row["step"] for row in curves["train"]] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in curves["eval"]] == [0, 3, 6]
    assert curves["train"][-1]["loss"] < curves["train"][0]["loss"]


def test_accumulating_gradients_changes_nothing_but_rounding(base: Path, tmp_path: Path) -> None:
    """Four blocks at once or one by one: the mean is over all learned tokens of the step, however they are spread."""
    blocks = open_blocks(tiny.blocks(tmp_path / "train", 20, masked=True))
    results = []
    for size in (4, 1):
        settings = params(per_device_train_batch_size=size, max_steps=2)
        model = train_loop.prepare_model(base, tmp_path / "tokenizer", settings)
        train_loop.train(model, blocks, blocks, BlockOrder(20, 0), 2, settings, tmp_path / f"work{size}", "test")
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(results[0], results[1], atol=1e-4)


def test_a_model_whose_own_loss_is_no_causal_one_learns_what_llama_does(tmp_path: Path) -> None:
    """BART's decoder does not shift the labels (it would learn to repeat) and adds up the means of small batches."""
    tiny.tokenizer(tmp_path / "tokenizer")
    shape = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 48, "dropout": 0.0}
    base = tiny.base(tmp_path / "base", model_type="bart", architectures=["BartForCausalLM"], **shape)
    blocks = open_blocks(tiny.blocks(tmp_path / "train", 20, masked=True))
    losses, results = [], []
    for size in (4, 1):
        settings = params(per_device_train_batch_size=size, max_steps=1, learning_rate=0.1, optim="sgd")
        model = train_loop.prepare_model(base, tmp_path / "tokenizer", settings)
        batch = blocks.__getitems__([BlockOrder(20, 0).block(place) for place in range(4)])
        with torch.no_grad():
            logits = model.eval()(input_ids=batch["input_ids"]).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).item()
        work = tmp_path / f"work{size}"
        trained = train_loop.train(model, blocks, blocks, BlockOrder(20, 0), 1, settings, work, "test")
        losses.append(trained.curves["train"][0]["loss"])
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert losses == pytest.approx([expected, expected], rel=1e-5)
    assert torch.allclose(results[0], results[1], atol=1e-6)


def test_mean_loss_counts_each_learned_token_once(base: Path, tmp_path: Path) -> None:
    blocks = open_blocks(tiny.blocks(tmp_path / "blocks", 7, masked=True))
    model = train_loop.prepare_model(base, tmp_path / "tokenizer", params())
    total, tokens = 0.0, 0
    for index in range(7):
        batch = blocks.__getitems__([index])
        scores = torch.log_softmax(model(input_ids=batch["input_ids"]).logits[0], dim=-1)
        for place, label in enumerate(batch["labels"][0].tolist()[1:]):
            if label != IGNORED:
                total, tokens = total - scores[place, label].item(), tokens + 1
    assert mean_loss(model, blocks, batch_size=3) == pytest.approx(total / tokens, rel=1e-5)


def adapter_gradients(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    return [p.grad.clone() for name, p in sorted(model.named_parameters()) if "lora_B" in name]


def test_an_evaluation_does_not_cripple_the_gradients_of_a_quantised_base(weights: Path, tmp_path: Path) -> None:
    """bitsandbytes 0.50 repacks 4-bit weights at their first use in eval mode on some CPUs, and then lets no gradient
    through: the adapters of the lower layers would stop learning without a word."""
    settings = params(lora={**tiny.LORA, "lora_dropout": 0.0}, quantization=tiny.QUANTIZATION)
    model = train_loop.prepare_model(weights, tmp_path / "tokenizer", settings)
    blocks = open_blocks(tiny.blocks(tmp_path / "blocks", 6))
    batch = blocks.__getitems__([0, 1, 2])
    before = adapter_gradients(model, batch)
    mean_loss(model, blocks, 3)
    after = adapter_gradients(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in before)


def test_gradients_of_a_quantised_base_are_those_of_its_dequantised_weights(weights: Path, tmp_path: Path) -> None:
    import bitsandbytes

    settings = params(lora={**tiny.LORA, "lora_dropout": 0.0}, quantization=tiny.QUANTIZATION)
    model = train_loop.prepare_model(weights, tmp_path / "tokenizer", settings)
    batch = open_blocks(tiny.blocks(tmp_path / "blocks", 6)).__getitems__([0, 1, 2])
    quantised = adapter_gradients(model, batch)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, bitsandbytes.nn.Linear4bit):
                dense = torch.nn.Linear(child.in_features, child.out_features, bias=False)
                weight = bitsandbytes.functional.dequantize_4bit(child.weight.data, child.weight.quant_state)
                dense.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
                setattr(module, name, dense)
    for ours, reference in zip(quantised, adapter_gradients(model, batch), strict=True):
        assert torch.allclose(ours, reference, atol=1e-6)


def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest(base: Path, tmp_path: Path) -> None:
    model = train_loop.prepare_model(base, tmp_path / "tokenizer", params(optim="muon"))
    optimizer = optimizers.MuonWithAdamW(model, params(optim="muon"))
    shapes = {
        name: [tuple(p.shape) for g in part.param_groups for p in g["params"]] for name, part in optimizer.parts.items()
    }
    assert len(shapes["muon"]) == 2 * 7 and all(len(shape) == 2 and 300 not in shape for shape in shapes["muon"])
    assert sorted(shapes["adamw"]) == [(64,)] * 5 + [(300, 64)]
    settings = params(optim="muon", learning_rate=0.25, adam_beta1=0.5, adam_beta2=0.75)
    (group,) = optimizers.MuonWithAdamW(model, settings).parts["adamw"].param_groups
    assert (group["lr"], group["betas"]) == (0.25, (0.5, 0.75))
    shape = {"vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
    positions = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gpt2"](**shape))
    parts = optimizers.MuonWithAdamW(positions, params(optim="muon")).parts
    assert positions.transformer.wpe.weight in {p for g in parts["adamw"].param_groups for p in g["params"]}
    optimizer.param_groups[0]["lr"] = 0.5  # as a scheduler does
    assert optimizer.parts["muon"].param_groups[0]["lr"] == 0.5
    batch = open_blocks(tiny.blocks(tmp_path / "blocks", 4)).__getitems__([0, 1])
    model(**batch).loss.backward()
    optimizer.step()
    again = optimizers.MuonWithAdamW(model, params(optim="muon"))
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] == 0.5
    assert str(again.state_dict()) == str(optimizer.state_dict())


def make_project(project: Path, **changes: Any) -> None:
    tiny.phase(project, "pretrain")
    tiny.params_yaml(project, pretrain={"base": "models/configs/tiny", "train_model": {**tiny.TRAIN, **changes}})


def published(project: Path, name: str = "pretrain") -> dict[str, bytes]:
    folder = project / "models" / name / "trained"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_step_of_muon_is_as_large_as_one_of_adamw_and_tables_do_not_decay(base: Path, tmp_path: Path) -> None:
    """0.2 lr in the mean (Liu et al. 2025), so both go by one learning rate; 1 / 8 lr unscaled at 64 x 64."""
    settings = params(optim="muon", learning_rate=0.01, weight_decay=0.0)
    model = train_loop.prepare_model(base, tmp_path / "tokenizer", settings)
    matrix, table = model.model.layers[0].self_attn.q_proj.weight, model.get_input_embeddings().weight
    matrix.grad, table.grad = torch.randn(matrix.shape), torch.zeros_like(table)
    before = matrix.detach().clone(), table.detach().clone()
    optimizers.MuonWithAdamW(model, settings).step()
    assert 0.15 < float((matrix.detach() - before[0]).square().mean().sqrt()) / 0.01 < 0.25
    optimizers.MuonWithAdamW(model, params(optim="muon", weight_decay=0.5)).step()
    assert torch.equal(table, before[1])


@pytest.mark.parametrize("optim", ["adamw_torch_fused", pytest.param("muon", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, run_stage: Runner, optim: str) -> None:
    """SIGKILL between two checkpoints; the second run says where it goes on and publishes what a whole one does."""
    whole, killed = copy_project(tmp_path / "whole"), copy_project(tmp_path / "killed")
    for project in (whole, killed):
        make_project(project, optim=optim, max_steps=40, save_steps=5, logging_steps=5, eval_steps=10)
    assert run_stage(whole, "train_model", "pretrain").returncode == 0
    kill_at(killed, ".work/train_model@pretrain/*/checkpoint-1[05]/whole", "train_model", "pretrain")
    assert not (killed / "models/pretrain/trained").exists()
    again = run_stage(killed, "train_model", "pretrain", PYTHONHASHSEED="7")
    assert "going on from step" in again.stdout, again.stdout + again.stderr
    assert published(whole) == published(killed)
    for curve in ("train.csv", "eval.csv"):
        assert (whole / "plots/pretrain" / curve).read_text() == (killed / "plots/pretrain" / curve).read_text()
    assert not (killed / ".work/train_model@pretrain").exists()


@pytest.mark.slow
def test_an_adapter_has_the_same_bytes_on_every_run(tmp_path: Path, weights: Path, run_stage: Runner) -> None:
    """QLoRA with dropout; peft writes sets in the order of their hashes, so the hash seed differs here."""
    results = []
    for seed in ("1", "2"):
        project = copy_project(tmp_path / seed)
        tiny.phase(project, "chat", masked=True)
        shutil.copytree(weights, project / "models/base/weights")
        settings = {**tiny.TRAIN, "lora": tiny.LORA, "quantization": tiny.QUANTIZATION}
        tiny.params_yaml(project, chat={"base": "models/base/weights", "train_model": settings})
        done = run_stage(project, "train_model", "chat", PYTHONHASHSEED=seed)
        assert done.returncode == 0, done.stderr
        results.append(published(project, "chat"))
    assert results[0] == results[1]
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "training.json"} <= results[0].keys()


def test_a_half_written_checkpoint_is_not_taken(tmp_path: Path) -> None:
    for step, whole in ((2, True), (10, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / train_loop.MARKER).touch()
    assert train_loop.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert not (tmp_path / "checkpoint-12").exists()


def test_a_loss_that_is_no_number_stops_the_run(base: Path, tmp_path: Path) -> None:
    model = train_loop.prepare_model(base, tmp_path / "tokenizer", params())
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = float("nan")
    blocks = open_blocks(tiny.blocks(tmp_path / "train", 20))
    with pytest.raises(SystemExit, match="the loss is nan at step 0; lower learning_rate"):
        train_loop.train(model, blocks, blocks, BlockOrder(20, 0), 6, params(), tmp_path / "work", "test")


def test_layers_that_do_not_exist_are_named_with_those_that_do(base: Path, tmp_path: Path) -> None:
    settings = params(lora={**tiny.LORA, "target_modules": ["query_key_value"]})
    with pytest.raises(SystemExit, match=r"no layer query_key_value; it has down_proj, .*gate_proj, .*q_proj"):
        train_loop.prepare_model(base, tmp_path / "tokenizer", settings)


def test_an_adapter_that_could_not_be_merged_is_refused_before_the_training(base: Path, tmp_path: Path) -> None:
    """The experts of a layer are one tensor, of which peft takes all with `all-linear`."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "model_type": "mixtral"}
    tiny.base(tmp_path / "experts", **experts, architectures=["MixtralForCausalLM"])
    for dropout, named in ((0.0, "gate_up_proj"), (0.1, "layers with experts")):
        settings = params(lora={"target_modules": "all-linear", "lora_dropout": dropout})
        with pytest.raises(SystemExit, match=rf"{named} are experts, .* whose adapter cannot be merged; name linear"):
            train_loop.prepare_model(tmp_path / "experts", tmp_path / "tokenizer", settings)
    settings = params(lora={"target_modules": ["q_proj"]})
    assert train_loop.prepare_model(tmp_path / "experts", tmp_path / "tokenizer", settings)


def test_a_layer_that_is_linear_by_name_alone_gets_no_adapter(tmp_path: Path) -> None:
    """Llama 4's router returns two tensors, and peft's traceback would come with the first step."""
    experts = {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "model_type": "llama4_text",
        "intermediate_size_mlp": 32,
    }
    base = tiny.base(tmp_path / "base", **experts, architectures=["Llama4ForCausalLM"])
    tokenizer = tiny.tokenizer(tmp_path / "tokenizer")
    with pytest.raises(SystemExit, match=r"router are no plain linear layers, .*; name linear layers"):
        train_loop.prepare_model(base, tokenizer, params(lora={"target_modules": "all-linear"}))
    assert train_loop.prepare_model(base, tokenizer, params(lora={"target_modules": ["q_proj", "gate_proj"]}))


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_base_that_cannot_be_run_in_few_bits_is_refused_before_the_training(tmp_path: Path, bits: str) -> None:
    """Mamba multiplies by the weight of a layer itself, which then holds packed bytes."""
    config = tiny.base(tmp_path / "config", model_type="mamba", state_size=8, architectures=["MambaForCausalLM"])
    tokenizer, base = tiny.tokenizer(tmp_path / "tokenizer"), tmp_path / "base"
    train_loop.save(train_loop.prepare_model(config, tokenizer, params()), tokenizer, config, params(), base)
    settings = params(lora={"target_modules": ["in_proj"]}, quantization={bits: True})
    with pytest.raises(SystemExit, match=r"quantization: MambaForCausalLM cannot be run .* these bits \(.*\); set the"):
        train_loop.prepare_model(base, tokenizer, settings)


def test_a_base_without_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"empty has no config\.json: `base` is a folder"):
        load_model(tmp_path / "empty", 300, {})


def test_weights_in_other_files_are_not_taken_for_none(weights: Path) -> None:
    """Else the training would begin with random weights, and nobody would know."""
    torch.save(load_file(weights / "model.safetensors"), weights / "pytorch_model.bin")
    load_model(weights, 300, {"eos_token_id": 1})
    (weights / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"its weights in pytorch_model\.bin, and only \.safetensors are read"):
        load_model(weights, 300, {})


def test_weights_that_the_base_lacks_are_not_drawn(weights: Path) -> None:
    tensors = load_file(weights / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    save_file(tensors, weights / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        SystemExit, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight and 1 more, which a Ll"
    ):
        load_model(weights, 300, {})


def test_another_end_leaves_the_rest_of_a_generation_config_as_it_is(weights: Path, tmp_path: Path) -> None:
    """transformers saves what is contradictory as it was loaded, but refuses it with another eos_token_id."""
    given = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "max_length": 50, "early_stopping": True}
    arrow.write_json(weights / "generation_config.json", {**given, "eos_token_id": 7})
    load_model(weights, 300, {"eos_token_id": 1}).save_pretrained(tmp_path / "saved")
    kept = arrow.read_json(tmp_path / "saved/generation_config.json")
    assert {**given, "eos_token_id": [1, 7]}.items() <= kept.items()


def test_more_tokens_than_embeddings_are_refused(weights: Path) -> None:
    with pytest.raises(SystemExit, match="embeddings for 300 tokens but the tokenizer has 301"):
        load_model(weights, 301, {})


def test_random_weights_cannot_be_quantised(base: Path) -> None:
    with pytest.raises(SystemExit, match="has no weights to quantise"):
        load_model(base, 300, {}, {"load_in_4bit": True})


def test_random_weights_carry_the_special_ids_of_the_tokenizer(base: Path, tmp_path: Path) -> None:
    vocabulary = Vocabulary(tmp_path / "tokenizer")
    model = load_model(base, vocabulary.size, vocabulary.special_ids)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (0, 1, 2)
    assert model.get_input_embeddings().weight.shape == (vocabulary.size, 64)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_train_epochs": 1.0}, "either `max_steps` or `num_train_epochs`"),
        ({"max_steps": None}, "either `max_steps` or `num_train_epochs`"),
        ({"global_batch_size": 6}, "no multiple of per_device_train_batch_size"),
        ({"save_steps": 3, "logging_steps": 2}, "save_steps 3 is no multiple of logging_steps 2"),
        ({"quantization": {}}, "add `lora`"),
        ({"quantization": {"load_in_4bit": True, "load_in_8bit": True}, "lora": tiny.LORA}, "in 4 bits or in 8"),
        ({"quantization": {}, "lora": {**tiny.LORA, "init_lora_weights": "pissa"}}, "a quantised one does not allow"),
        ({"quantization": {"load_in_8bit": True}, "lora": {**tiny.LORA, "use_dora": True}}, "use_dora does not work"),
        ({"lora": {**tiny.LORA, "init_lora_weights": "olora", "use_dora": True}}, "does not go with use_dora"),
        ({"lora": {**tiny.LORA, "adalora": {}}}, "knows no r; leave that out"),
        ({"lora": {"target_modules": "all-linear", "adalora": {"target_r": 20}}}, "target_r is larger than"),
        ({"lora": {"target_modules": "all-linear", "adalora": {"tinit": 3, "tfinal": 3}}}, "leave none of 6 steps"),
        ({"fp16": True, "bf16": True}, "exclude each other"),
        ({"optim": "galore_adamw"}, "Input should be"),
        ({"optim": "muon", "lora": tiny.LORA}, "optim muon is for weights trained from random ones"),
        ({"learning_rate": 0}, "greater than 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        params(**changes)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def extended(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A base with weights and its tokenizer, embeddings tied or not, and the same tokenizer with 9 tokens more."""
    own = tiny.tokenizer(tmp_path / "own")
    config = tiny.base(tmp_path / "config", tie_word_embeddings=request.param)
    train_loop.save(train_loop.prepare_model(config, own, params()), own, config, params(), tmp_path / "weights")
    longer = Path(shutil.copytree(own, tmp_path / "longer"))
    text = (own / "tokenizer.json").read_text()
    documents = ["brown bears, brown foxes and 法律法律" for _ in range(3)]
    bpe_training.extend(text, documents, 9, 2, "own")[0].save(str(longer / "tokenizer.json"))
    return tmp_path / "weights", longer


def test_new_tokens_begin_as_the_mean_of_their_pieces(extended: tuple[Path, Path]) -> None:
    """In the input and in the output embeddings; no other row changes, and both stay tied, or untied."""
    weights, longer = extended
    before, after = AutoModelForCausalLM.from_pretrained(weights), train_loop.prepare_model(weights, longer, params())
    base, tokenizer = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in extended)
    layers = [(each.get_input_embeddings().weight, each.get_output_embeddings().weight) for each in (before, after)]
    assert [after.config.vocab_size, *(weight.shape[0] for weight in layers[1])] == [309] * 3
    tied = [weights[0].data_ptr() == weights[1].data_ptr() for weights in layers]
    assert tied == [before.config.tie_word_embeddings] * 2
    for old, new in zip(*layers, strict=True):
        assert torch.equal(old, new[:300])
        whole = [number for number in range(300, 309) if "\ufffd" not in tokenizer.decode([number])]
        assert len(whole) > 4
        for number in whole:
            pieces = base.encode(tokenizer.decode([number]), add_special_tokens=False).ids
            assert len(pieces) > 1
            assert torch.equal(new[number], old[pieces].mean(0))
    if not tied[0]:
        assert not torch.equal(layers[1][0], layers[1][1])


def test_new_tokens_that_fit_into_the_rows_are_not_left_as_padding(extended: tuple[Path, Path], tmp_path: Path) -> None:
    """Some bases have more rows than tokens; those rows were never trained."""
    weights, longer = extended
    model = AutoModelForCausalLM.from_pretrained(weights)
    model.resize_token_embeddings(320)
    model.save_pretrained(tmp_path / "padded")
    shutil.copyfile(weights / "tokenizer.json", tmp_path / "padded/tokenizer.json")
    grown = train_loop.prepare_model(weights, longer, params()).get_input_embeddings().weight
    padded = train_loop.prepare_model(tmp_path / "padded", longer, params()).get_input_embeddings().weight
    assert padded.shape[0] == 320
    assert torch.equal(padded[:309], grown)


def test_a_longer_vocabulary_is_trained_saved_and_loaded(extended: tuple[Path, Path], tmp_path: Path) -> None:
    """The new rows learn; transformers opens the result with as many embeddings as tokens."""
    weights, longer = extended
    model = train_loop.prepare_model(weights, longer, params())
    begun = model.get_input_embeddings().weight[300:].clone()
    train, held_out = tiny.blocks(tmp_path / "train", 8), tiny.blocks(tmp_path / "eval", 2)
    blocks = open_blocks(train)
    blocks._chunks = [np.where(np.arange(tiny.BLOCK_SIZE) % 2, 308, chunk) for chunk in blocks._chunks]
    train_loop.train(
        model, blocks, open_blocks(held_out), BlockOrder(8, 0), 2, params(max_steps=2), tmp_path / "w", "t"
    )
    train_loop.save(model, longer, weights, params(), tmp_path / "trained")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "trained")
    assert loaded.get_input_embeddings().weight.shape[0] == len(tokenizer) == loaded.config.vocab_size == 309
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert not torch.equal(loaded.get_input_embeddings().weight[308], begun[8])
    loaded(torch.tensor([tokenizer("brown 法律").input_ids]))


def test_another_tokenizer_is_no_extension(weights: Path, tmp_path: Path) -> None:
    """Its ids mean something else, so they get no rows of the base."""
    other = train_tokenizer.Params(mode="train", vocab_size=310, min_frequency=1)
    other_folder = Path(shutil.copytree(tmp_path / "tokenizer", tmp_path / "other"))
    train_tokenizer.train(iter(["entirely other words " * 9]), other).save(str(other_folder / "tokenizer.json"))
    assert new_tokens(weights, other_folder) == {}


class KilledError(Exception):
    """Stands for a kill in tests that stay in one process."""


def run_training(
    base: Path, tokenizer: Path, settings: Params, work: Path, stop: int | None = None
) -> tuple[Any, train_loop.Trained]:
    """Train on 20 blocks; with `stop` the process "dies" in that step and what a new one would do is done."""
    folders = [work / "train", work / "eval"]
    if not folders[0].exists():
        tiny.blocks(folders[0], 20, masked=settings.objective == "clm")
        tiny.blocks(folders[1], 5)
    for attempt in ("killed", "whole") if stop else ("whole",):
        model = train_loop.prepare_model(base, tokenizer, settings)
        train, held_out = (train_loop.seen(folder, tokenizer, settings, model) for folder in folders)
        with pytest.MonkeyPatch.context() as patch:
            if attempt == "killed":
                patch.setattr(train_loop.Reporter, "on_step_end", dies_at(stop), raising=False)
            arguments = (model, train, held_out, BlockOrder(20, 0), settings.max_steps, settings, work / "w", "test")
            try:
                done = train_loop.train(*arguments)
            except KilledError:
                assert train_loop.last_checkpoint(work / "w")
    return model, done


def dies_at(step: int | None) -> Any:
    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise KilledError

    return on_step_end


def learned(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


ALL = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
ADALORA = {
    "lora_alpha": 4,
    "target_modules": "all-linear",
    "adalora": {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1},
}
ADAPTERS = {
    "lora": {**ALL, "lora_dropout": 0.1},
    "rslora": {**ALL, "use_rslora": True},
    "dora": {**ALL, "use_dora": True},
    "pissa": {**ALL, "init_lora_weights": "pissa"},
    "pissa_patterns": {
        **ALL,
        "init_lora_weights": "pissa_niter_4",
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"q_proj": 5},
    },
    "olora_rslora": {**ALL, "init_lora_weights": "olora", "use_rslora": True},
    "adalora": ADALORA,
    "loraplus_bias": {**ALL, "loraplus_lr_ratio": 16, "bias": "all"},
    "modules_to_save": {**ALL, "modules_to_save": ["embed_tokens"]},
}
EIGHT_BIT = {"load_in_8bit": True}


@pytest.mark.parametrize(
    ("kind", "quantization"),
    [*((kind, None) for kind in ADAPTERS), ("lora", EIGHT_BIT), ("adalora", EIGHT_BIT), ("dora", tiny.QUANTIZATION)],
)
def test_base_and_saved_adapter_are_the_trained_model(
    weights: Path, tmp_path: Path, kind: str, quantization: dict[str, Any] | None
) -> None:
    """Also where the begin of the adapter changed the base (PiSSA, OLoRA), and where ranks were taken away."""
    settings = params(lora=ADAPTERS[kind], quantization=quantization)
    model, _ = run_training(weights, tmp_path / "tokenizer", settings, tmp_path / "run")
    train_loop.save(model, tmp_path / "tokenizer", weights, settings, tmp_path / "trained")
    ids = torch.arange(3, 35)[None]
    again = load_model(weights, 300, Vocabulary(weights).special_ids, quantized(settings))
    with torch.no_grad():
        before = again(ids).logits
        loaded = PeftModel.from_pretrained(again, str(tmp_path / "trained")).eval()(ids).logits
        trained = model.eval()(ids).logits
    assert (trained - loaded).abs().max() < 1e-5
    assert (trained - before).abs().max() > 1e-3
    config = arrow.read_json(tmp_path / "trained/adapter_config.json")
    if settings.lora and settings.lora.changes_the_base:
        assert config["init_lora_weights"] is True and config["r"] == 4
    if kind == "adalora":
        assert sum(map(sum, config["rank_pattern"].values())) == 2 * 14  # target_r of each of 14 layers


def quantized(settings: Params) -> dict[str, Any] | None:
    return settings.quantization.arguments() if settings.quantization else None


@pytest.mark.parametrize("kind", ["adalora", "pissa", "lora"])
def test_an_adapter_goes_on_to_the_same_bits(weights: Path, tmp_path: Path, kind: str) -> None:
    """AdaLoRA remembers how much each rank mattered, and which were taken away: a checkpoint holds that, too."""
    settings = params(lora=ADAPTERS[kind])
    whole, first = run_training(weights, tmp_path / "tokenizer", settings, tmp_path / "whole")
    again, second = run_training(weights, tmp_path / "tokenizer", settings, tmp_path / "killed", stop=5)
    assert torch.equal(learned(whole), learned(again))
    assert first == second and len(first.receipts) == 16 * 6
    if kind == "adalora":
        assert whole.peft_config["default"].rank_pattern == again.peft_config["default"].rank_pattern


@pytest.mark.parametrize("optim", ["adamw_torch", pytest.param("muon", marks=pytest.mark.slow)])
def test_a_mixture_of_experts_goes_on_to_the_same_bits(tmp_path: Path, optim: str) -> None:
    """Its files hold each expert by itself, the model all of a layer in one tensor."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "model_type": "mixtral"}
    base = tiny.base(tmp_path / "base", **experts, architectures=["MixtralForCausalLM"])
    tokenizer, settings = tiny.tokenizer(tmp_path / "tokenizer"), params(optim=optim)
    whole, first = run_training(base, tokenizer, settings, tmp_path / "whole")
    again, second = run_training(base, tokenizer, settings, tmp_path / "killed", stop=5)
    assert torch.equal(learned(whole), learned(again))
    assert first == second


def test_a_checkpoint_holds_buffers() -> None:
    model, other = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    model(torch.tensor([[1.0, 2.0], [3.0, 8.0]]))
    adapters.restore(other, adapters.state(model))
    assert torch.equal(other.running_mean, model.running_mean) and other.running_mean[1] == 0.5


def test_loraplus_has_the_rates_and_the_decay_that_are_set(base: Path, tmp_path: Path) -> None:
    """B learns 16 times as fast as A; an adapter of the embeddings by the rate of all, where peft's own is 1e-6."""
    lora = {"r": 2, "loraplus_lr_ratio": 16, "target_modules": ["q_proj", "embed_tokens"]}
    settings = params(lora=lora, learning_rate=0.01, weight_decay=0.1)
    model = train_loop.prepare_model(base, tmp_path / "tokenizer", settings)
    arguments = TrainingArguments(str(tmp_path / "w"), learning_rate=0.01, weight_decay=0.1, use_cpu=True)
    optimizer = optimizers.create(model, settings, arguments)
    assert optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        re.findall(r"lora_(?:embedding_)?[AB]", names[id(p)])[0]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    slow, fast = (0.01, 0.1), (0.16, 0.1)
    assert found == {"lora_A": slow, "lora_B": fast, "lora_embedding_A": slow, "lora_embedding_B": slow}
    assert optimizers.create(model, params(lora={"r": 2, "target_modules": ["q_proj"]}), arguments) is None


def test_receipts_say_what_was_fed(base: Path, tmp_path: Path) -> None:
    """Computed again from blocks and order alone; the same for any number of blocks at once."""
    settings = params(max_steps=6)
    _, done = run_training(base, tmp_path / "tokenizer", settings, tmp_path / "run")
    blocks, order = open_blocks(tmp_path / "run/train"), BlockOrder(20, 0)
    expected = b""
    for step in range(6):
        rows = [order.block(position) for position in range(step * 4, step * 4 + 4)]
        batch = blocks.__getitems__(rows)
        ids, labels = (batch[name].numpy().astype("<i4") for name in ("input_ids", "labels"))
        parts = [block_receipt(row, ids[i].tobytes(), labels[i].tobytes()) for i, row in enumerate(rows)]
        expected += step_receipt(step + 1, parts)
    assert done.receipts == expected
    one_by_one = params(max_steps=6, per_device_train_batch_size=1)
    _, other = run_training(base, tmp_path / "tokenizer", one_by_one, tmp_path / "one_by_one")
    assert other.receipts == expected


def test_receipts_of_several_processes_are_those_of_one(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Each knows those of its own blocks; what the others know is gathered."""
    blocks, order = open_blocks(tiny.blocks(tmp_path / "blocks", 20)), BlockOrder(20, 0)
    streams = [train_loop.Stream(blocks, order, 24) for _ in range(3)]
    for place in range(24):
        streams[0].__getitems__([place])
        streams[1 + place // 2 % 2].__getitems__([place])
    expected = train_loop.Receipts(streams[0], 4).up_to(6)
    distributed = train_loop.torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    both = [streams[1].receipts, streams[2].receipts]
    monkeypatch.setattr(distributed, "all_gather_object", lambda parts, own: parts.__setitem__(slice(None), both))
    assert train_loop.Receipts(streams[1], 4).up_to(6) == expected


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A RoBERTa for random weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("masked")
    return tiny.roberta(folder / "base"), tiny.masked_tokenizer(folder / "tokenizer")


def test_a_masked_model_goes_on_to_the_same_bits(masked: tuple[Path, Path], tmp_path: Path) -> None:
    """Each step masks by its position, so a run that goes on masks what an uninterrupted one does."""
    settings = params(objective="mlm", whole_word_mask=True)
    whole, first = run_training(*masked, settings, tmp_path / "whole")
    again, second = run_training(*masked, settings, tmp_path / "killed", stop=5)
    assert torch.equal(learned(whole), learned(again))
    assert first == second
    assert len(first.receipts) == 16 * 6
    train_loop.save(whole, masked[1], masked[0], settings, tmp_path / "trained")
    assert objective(tmp_path / "trained") == "mlm"
    about = arrow.read_json(tmp_path / "trained/training.json")
    assert (about["objective"], about["mlm_probability"], about["whole_word_mask"]) == ("mlm", 0.15, True)


def test_a_masked_model_accumulates_to_the_same_step(masked: tuple[Path, Path], tmp_path: Path) -> None:
    """The mean is over all guessed tokens of the step; RoBERTa's own loss would be a mean of means."""
    base = tiny.roberta(tmp_path / "base", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    results = []
    for size in (4, 1):
        settings = params(objective="mlm", per_device_train_batch_size=size, max_steps=2)
        model, _ = run_training(base, masked[1], settings, tmp_path / f"{size}")
        results.append(learned(model))
    assert torch.allclose(results[0], results[1], atol=1e-4)


def test_a_masked_model_sees_no_padding_and_learns_none(masked: tuple[Path, Path], tmp_path: Path) -> None:
    settings = params(objective="mlm")
    blocks = train_loop.seen(tiny.blocks(tmp_path / "b", 3, padding=6), masked[1], settings)
    batch = blocks.__getitems__([2])
    assert batch["attention_mask"][0].tolist() == [1] * 10 + [0] * 6
    assert (batch["labels"][0, 10:] == IGNORED).all() and (batch["labels"] != IGNORED).any()
    model = train_loop.prepare_model(*masked, settings).eval()
    padded = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :10]
    assert torch.allclose(padded, model(batch["input_ids"][:, :10]).logits, atol=1e-5)


def test_a_masked_model_has_fewer_positions_than_its_table(masked: tuple[Path, Path]) -> None:
    """RoBERTa counts from the id of its padding, and one more."""
    model = train_loop.prepare_model(*masked, params(objective="mlm"))
    pad = Vocabulary(masked[1]).special_ids["pad_token_id"]
    assert max_positions(model) == tiny.ROBERTA["max_position_embeddings"] - pad - 1 == tiny.BLOCK_SIZE
    ids = torch.full((1, tiny.BLOCK_SIZE), 9)
    model(ids)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, tiny.BLOCK_SIZE + 1), 9))


def test_an_objective_that_the_base_does_not_have_is_refused(masked: tuple[Path, Path], base: Path) -> None:
    with pytest.raises(SystemExit, match="is a masked model; set `objective: mlm`"):
        train_loop.prepare_model(*masked, params())
    with pytest.raises(SystemExit, match="no masked model of type llama; set another `objective`"):
        train_loop.prepare_model(base, masked[1], params(objective="mlm"))


def test_blocks_beyond_the_positions_are_refused(tmp_path: Path) -> None:
    tiny.tokenizer(tmp_path / "tokenizer")
    short = tiny.base(tmp_path / "short", max_position_embeddings=8)
    with pytest.raises(SystemExit, match=r"blocks have 16 tokens but the model has positions for 8; lower"):
        run_training(short, tmp_path / "tokenizer", params(), tmp_path / "run")


def test_blocks_that_teach_nothing_are_refused(base: Path, tmp_path: Path) -> None:
    blocks = open_blocks(tiny.blocks(tmp_path / "b", 4, masked=True))
    assert blocks.learned() and blocks._learn is not None
    blocks._learn[:] = False
    model = train_loop.prepare_model(base, tmp_path / "tokenizer", params())
    with pytest.raises(SystemExit, match="no token of the training blocks is learned"):
        train_loop.train(model, blocks, blocks, BlockOrder(4, 0), 2, params(), tmp_path / "w", "test")


def test_a_step_that_teaches_nothing_changes_no_loss(base: Path, tmp_path: Path) -> None:
    """A block of one long prompt is no reason to stop with a loss that is no number."""
    blocks, held_out = (open_blocks(tiny.blocks(tmp_path / n, 4, masked=True)) for n in ("b", "c"))
    assert blocks._learn is not None
    blocks._learn[BlockOrder(4, 0).block(0)] = False
    settings = params(global_batch_size=1, per_device_train_batch_size=1, max_steps=2)
    model = train_loop.prepare_model(base, tmp_path / "tokenizer", settings)
    done = train_loop.train(model, blocks, held_out, BlockOrder(4, 0), 2, settings, tmp_path / "w", "test")
    assert done.curves["train"][0]["loss"] == 0.0 < done.curves["train"][1]["loss"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU does")
def test_what_a_cpu_lacks(base: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """fp16 is refused; pages and, on some CPUs, bf16 are replaced, with a line and a note for the metrics."""
    with pytest.raises(SystemExit, match="fp16 needs a GPU"):
        run_training(base, tmp_path / "tokenizer", params(fp16=True), tmp_path / "fp16")
    monkeypatch.setattr(train_loop, "has_bf16", lambda: False)
    settings = params(optim="paged_adamw_32bit", bf16=True, max_steps=2)
    model, done = run_training(base, tmp_path / "tokenizer", settings, tmp_path / "paged")
    assert done.notes == {"optimizer_without_pages": 1, "float32_instead_of_bf16": 1}
    printed = capsys.readouterr().out
    assert "paged_adamw_32bit needs a GPU; adamw_torch_fused is used instead." in printed
    assert "bf16 needs AVX512_BF16, AMX or a newer GPU; float32 is used instead." in printed
    plain, _ = run_training(base, tmp_path / "tokenizer", params(max_steps=2), tmp_path / "plain")
    assert torch.equal(learned(model), learned(plain))


@pytest.mark.skipif(not train_loop.has_bf16(), reason="no bfloat16 in this hardware")
def test_bf16_where_the_hardware_has_it(base: Path, tmp_path: Path) -> None:
    """The weights stay in float32; the products are rounded, so the losses differ a little."""
    model, done = run_training(base, tmp_path / "tokenizer", params(bf16=True), tmp_path / "a")
    _, plain = run_training(base, tmp_path / "tokenizer", params(), tmp_path / "b")
    assert {p.dtype for p in model.parameters()} == {torch.float32} and done.notes == {}
    ours, theirs = (each.curves["train"][0]["loss"] for each in (done, plain))
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.01)


OPTIMIZERS = typing.get_args(Params.model_fields["optim"].annotation)


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"muon"}))
def test_every_optimizer_of_the_list_takes_a_step(name: str, tmp_path: Path) -> None:
    used = optimizers.available(name, cuda=False)
    assert "paged" not in used
    layer = torch.nn.Linear(64, 80)
    before = layer.weight.detach().clone()
    kind, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(str(tmp_path), optim=used, use_cpu=True))
    optimizer = kind(list(layer.parameters()), **options)
    for _ in range(2):
        layer(torch.ones(2, 64)).square().mean().backward()
        optimizer.step()
    assert torch.isfinite(layer.weight).all() and not torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("warmup_stable_decay", {"num_decay_steps": 2}),
        ("inverse_sqrt", {}),
        ("reduce_lr_on_plateau", {"patience": 1}),
    ],
)
def test_schedules(base: Path, tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    """warmup_steps below 1 is a share of the steps, as in TrainingArguments."""
    warmup = 0 if name in WITHOUT_WARMUP else 0.5
    settings = params(lr_scheduler_type=name, lr_scheduler_kwargs=arguments, warmup_steps=warmup, max_steps=4)
    _, done = run_training(base, tmp_path / "tokenizer", settings, tmp_path / "run")
    rates = [row["learning_rate"] for row in done.curves["train"]]
    if not warmup:
        assert rates == [0.01] * 4
    else:
        assert rates[:2] == [0.0, 0.005] and max(rates) == 0.01
    if name == "cosine_with_min_lr":
        assert 0.001 < rates[-1] < 0.01


def test_schedules_take_what_transformers_gives_them() -> None:
    """A misspelt argument is found before the phases that come first are trained, not by a TypeError after them."""
    assert set(SCHEDULES) == set(typing.get_args(Params.model_fields["lr_scheduler_type"].annotation))
    settled = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for name, (known, needed) in SCHEDULES.items():
        made = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
        made = torch.optim.lr_scheduler.ReduceLROnPlateau if name == "reduce_lr_on_plateau" else made
        arguments = inspect.signature(made).parameters
        assert set(known) == arguments.keys() - settled and set(needed) <= set(known)
        without = [key for key in arguments if arguments[key].default is inspect.Parameter.empty and key not in settled]
        assert set(without) <= set(needed)
    wrong = {
        "cosine_with_min_lr": [{}, {"min_lr_ratio": 0.1}, {"min_lr": 0.0, "min_lr_rate": 0.1}],
        "warmup_stable_decay": [{}, {"num_decay_steps": 2, "min_lr_rate": 0.1}],
        "constant_with_warmup": [{"num_cycles": 1}],
    }
    for name, cases in wrong.items():
        for arguments in cases:
            with pytest.raises(ValidationError, match=r"the schedule \w+ (needs|does not know)"):
                params(lr_scheduler_type=name, lr_scheduler_kwargs=arguments)
    for name in WITHOUT_WARMUP:
        with pytest.raises(ValidationError, match=f"the schedule {name} has no warm-up; leave warmup_steps out"):
            params(lr_scheduler_type=name, warmup_steps=2)


def test_training_stops_when_the_evaluation_loss_rises(base: Path, tmp_path: Path, capsys: Any) -> None:
    """The weights of the best evaluation are published; a run that goes on stops where the whole one does."""
    settings = params(
        max_steps=30, eval_steps=2, learning_rate=0.3, lr_scheduler_type="constant", early_stopping_patience=2
    )
    model, done = run_training(base, tmp_path / "tokenizer", settings, tmp_path / "whole")
    losses = {row["step"]: row["loss"] for row in done.curves["eval"]}
    best = min(losses, key=losses.__getitem__)
    assert done.steps == best + 4 < 30 and len(done.receipts) == 16 * done.steps
    assert done.notes["best_step"] == best
    assert f"stopping at step {done.steps}, the weights of step {best} are kept" in capsys.readouterr().out
    assert mean_loss(model, open_blocks(tmp_path / "whole/eval"), 16) == pytest.approx(losses[best], rel=1e-6)
    again, other = run_training(base, tmp_path / "tokenizer", settings, tmp_path / "killed", stop=done.steps - 1)
    assert torch.equal(learned(model), learned(again)) and other == done
    late, third = run_training(base, tmp_path / "tokenizer", settings, tmp_path / "whole")  # killed after it stopped
    assert torch.equal(learned(model), learned(late)) and third == done


def test_the_best_weights_without_stopping(base: Path, tmp_path: Path) -> None:
    settings = params(eval_steps=2, learning_rate=0.3, lr_scheduler_type="constant", load_best_model_at_end=True)
    model, done = run_training(base, tmp_path / "tokenizer", settings, tmp_path / "run")
    lowest = min(row["loss"] for row in done.curves["eval"])
    assert done.steps == 6 and lowest < done.curves["eval"][-1]["loss"]
    assert mean_loss(model, open_blocks(tmp_path / "run/eval"), 16) == pytest.approx(lowest, rel=1e-6)


@pytest.mark.parametrize("quantization", [None, tiny.QUANTIZATION])
def test_gradient_checkpointing_changes_no_gradient(weights: Path, tmp_path: Path, quantization: Any) -> None:
    """Below a frozen embedding, too, where no input has a gradient unless it is asked for."""
    batch = open_blocks(tiny.blocks(tmp_path / "b", 4)).__getitems__([0, 1])
    found = []
    for checkpointing in (False, True):
        settings = params(lora=ALL, quantization=quantization, gradient_checkpointing=checkpointing)
        model = train_loop.prepare_model(weights, tmp_path / "tokenizer", settings)
        assert model.base_model.model.is_gradient_checkpointing is checkpointing
        found.append(adapter_gradients(model, batch))
    assert all(torch.allclose(a, b, atol=1e-6) and a.abs().max() > 0 for a, b in zip(*found, strict=True))


def test_names_that_match_no_layer_to_save_are_refused(base: Path, tmp_path: Path) -> None:
    settings = params(lora={**ALL, "modules_to_save": ["classifier"]})
    with pytest.raises(SystemExit, match=r"lora\.modules_to_save: the model has no layer classifier; it has down_proj"):
        train_loop.prepare_model(base, tmp_path / "tokenizer", settings)


def test_an_adapter_learns_new_tokens(extended: tuple[Path, Path], tmp_path: Path) -> None:
    """Their embeddings are trained and saved whole; where input and output are one, so they stay."""
    weights, longer = extended
    tied = arrow.read_json(weights / "config.json")["tie_word_embeddings"]
    settings = params(lora=ALL, max_steps=2)
    model, _ = run_training(weights, longer, settings, tmp_path / "run")
    planned = plan.make(weights, longer, settings, 16, 2)
    assert (planned.parameters, planned.trained) == tuple(train_loop.sizes(model).values())
    train_loop.save(model, longer, weights, settings, tmp_path / "trained")
    saved = load_file(tmp_path / "trained/adapter_model.safetensors")
    whole = sorted(name.split(".")[-2] for name, tensor in saved.items() if tensor.shape == (309, 64))
    assert whole == ["embed_tokens", "lm_head"]
    vocabulary = Vocabulary(longer)
    again = load_model(weights, vocabulary.size, vocabulary.special_ids, None, tmp_path / "trained")
    before = again.get_input_embeddings().weight.clone()
    loaded = PeftModel.from_pretrained(again, str(tmp_path / "trained")).eval()
    ids = torch.arange(290, 309)[None]
    with torch.no_grad():
        assert torch.allclose(model.eval()(ids).logits, loaded(ids).logits, atol=1e-6)
    after = loaded.get_input_embeddings().weight
    assert not torch.equal(after, before) and after.shape == (309, 64)
    assert (after.data_ptr() == loaded.get_output_embeddings().weight.data_ptr()) == tied


def test_examples_show_what_is_learned(tmp_path: Path, masked: tuple[Path, Path]) -> None:
    vocabulary = Vocabulary(tiny.tokenizer(tmp_path / "tokenizer"))
    blocks, order = open_blocks(tiny.blocks(tmp_path / "b", 4, masked=True)), BlockOrder(4, 0)
    (text,) = examples(blocks, order, vocabulary, 1)
    batch = blocks.__getitems__([order.block(0)])
    ids, labels = batch["input_ids"][0].tolist(), [IGNORED, *batch["labels"][0].tolist()[1:]]
    words = [vocabulary.tokenizer.id_to_token(number) for number in ids]
    marked = [f"[{word}]" if label != IGNORED else word for word, label in zip(words, labels, strict=True)]
    count = sum(label != IGNORED for label in labels)
    assert text == f"block {order.block(0)}: 16 tokens, {count} learned\n{' '.join(marked)}\n"
    settings = params(objective="mlm", mlm_probability=0.5)
    guessed = train_loop.seen(tiny.blocks(tmp_path / "c", 4), masked[1], settings)
    shown = "".join(examples(guessed, order, Vocabulary(masked[1]), 4))
    assert "[<mask> -> " in shown and len(list(examples(guessed, order, Vocabulary(masked[1]), 9))) == 4


def test_tokens_are_shown_as_one_can_read_them() -> None:
    """As the vocabulary spells them, but for those that its bytes spell as æ³ķ."""
    words = [b" the", "法".encode(), " 法".encode(), "法".encode()[:2]]
    entries = ["".join(BYTE_TO_UNICODE[byte] for byte in word) for word in words]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(entries)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    assert [spelled(tokenizer, number) for number in range(4)] == ["Ġthe", "法", " 法", "æ³"]


def test_the_command_line_shows_examples(project: Path, run_stage: Runner) -> None:
    make_project(project)
    shown = run_stage(project, "train_model", "pretrain", "--show", "2")
    assert shown.returncode == 0 and shown.stdout.count("16 tokens") == 2, shown.stderr
    assert not (project / "models/pretrain").exists()
    for words in (["--shwo", "2"], ["--show"], ["--show", "two"], ["--show", "0"]):
        wrong = run_stage(project, "train_model", "pretrain", *words)
        assert wrong.returncode == 2 and wrong.stdout.startswith(
            "usage: python stages/train_model.py NAME [--show N] [--plan]\n"
        )
    reader, closed = os.pipe()
    os.close(reader)
    command = [sys.executable, "stages/train_model.py", "pretrain", "--show", "2"]
    headed = subprocess.run(command, cwd=project, stdout=closed, stderr=subprocess.PIPE, check=False)  # as by `| head`
    os.close(closed)
    assert (headed.returncode, headed.stderr) == (-signal.SIGPIPE, b"")


@pytest.mark.parametrize("changes", [{}, {"lora": ALL}, {"mask_documents": True}], ids=["whole", "lora", "masks"])
def test_only_a_logging_step_waits_for_the_device(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Loss, gradient norm and the number of tokens stay where they are computed until they are shown."""
    settings = params(
        max_steps=6, logging_steps=3, eval_steps=6, save_steps=6, per_device_train_batch_size=2, **changes
    )
    waits, seen = Waits(), {}

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seen[state.global_step] = list(waits.found)
        waits.found.clear()

    monkeypatch.setattr(train_loop.Reporter, "on_step_end", on_step_end, raising=False)
    packed(tmp_path / "run/train", 20)
    packed(tmp_path / "run/eval", 5)
    with waits:
        run_training(base, tmp_path / "tokenizer", settings, tmp_path / "run")
    assert [seen[step] for step in (2, 3, 5, 6)] == [[]] * 4
    assert seen[4]  # what step 3 logged


def packed(folder: Path, rows: int) -> Path:
    """Write blocks of two documents each, of 1 to 15 tokens."""
    random = np.random.default_rng(rows)
    ids = random.integers(3, 300, (rows, tiny.BLOCK_SIZE)).astype(np.uint16)
    starts = [[0, int(random.integers(1, tiny.BLOCK_SIZE)), tiny.BLOCK_SIZE] for _ in range(rows)]
    schema = blocks_schema(pa.uint16(), tiny.BLOCK_SIZE, learn=False, starts=True)
    columns = [pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), tiny.BLOCK_SIZE), pa.array(starts)]
    with arrow.Writer(folder, schema) as out:
        out.write(pa.Table.from_arrays([columns[0], columns[1].cast(schema.field("starts").type)], schema=schema))
        out.counts = {"tokens": rows * tiny.BLOCK_SIZE}
    return folder


def test_documents_of_a_block_are_trained_as_if_each_stood_alone(base: Path, tmp_path: Path) -> None:
    """Whole training: the losses of packed blocks are those of a block for each document."""
    for name in ("packed/plain", "packed", "whole", "killed"):
        train, held_out = packed(tmp_path / name / "train", 20), packed(tmp_path / name / "eval", 5)
    settings = params(mask_documents=True, max_steps=3, logging_steps=1)
    _, done = run_training(base, tmp_path / "tokenizer", settings, tmp_path / "packed")
    model = train_loop.prepare_model(base, tmp_path / "tokenizer", settings)
    for folder, loss in ((held_out, done.curves["eval"][0]["loss"]), (train, None)):
        table = arrow.table(folder)
        total, tokens = 0.0, 0
        rows = range(5) if loss else [BlockOrder(20, 0).block(position) for position in range(4)]
        for row in rows:
            ids, starts = table["input_ids"][row].as_py(), table["starts"][row].as_py()
            for first, last in itertools.pairwise(starts):
                if last - first > 1:
                    alone = torch.tensor([ids[first:last]])
                    total += model.eval()(input_ids=alone, labels=alone).loss.item() * (last - first - 1)
                    tokens += last - first - 1
        expected = done.curves["train"][0]["loss"] if loss is None else loss
        assert expected == pytest.approx(total / tokens, abs=1e-5)
    _, plain = run_training(base, tmp_path / "tokenizer", params(max_steps=3), tmp_path / "packed/plain")
    assert plain.receipts == done.receipts and plain.curves != done.curves
    again, other = run_training(base, tmp_path / "tokenizer", params(mask_documents=True), tmp_path / "whole")
    killed, third = run_training(base, tmp_path / "tokenizer", params(mask_documents=True), tmp_path / "killed", stop=5)
    assert torch.equal(learned(again), learned(killed)) and other == third


@pytest.mark.slow  # compiling takes half a minute
@pytest.mark.skipif(train_loop.why_not_compiled() is not None, reason=str(train_loop.why_not_compiled()))
@pytest.mark.parametrize("changes", [{}, {"lora": ALL}], ids=["whole", "lora"])
def test_compiled_layers_learn_the_same(base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    losses = []
    for compiled in (False, True):
        settings = params(torch_compile=compiled, **changes)
        model, done = run_training(base, tmp_path / "tokenizer", settings, tmp_path / str(compiled))
        losses.append([row["loss"] for rows in done.curves.values() for row in rows])
        train_loop.save(model, tmp_path / "tokenizer", base, settings, tmp_path / f"{compiled}/saved")
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    saved = [load_file(next((tmp_path / f"{name}/saved").glob("*.safetensors"))) for name in (False, True)]
    assert saved[0].keys() == saved[1].keys()


@pytest.mark.parametrize(
    ("compiler", "place", "message"),
    [("no-compiler", "/a", "the C\\+\\+ compiler no-compiler"), ("sh", "/a b", r"path has a space \(/a b/torch\)")],
)
def test_what_cannot_be_compiled_is_said_before_training(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, place: str, message: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(torch, "__file__", f"{place}/torch/__init__.py")
    with pytest.raises(SystemExit, match=f"torch_compile: .*{message}"):
        train_loop.prepare_model(base, tmp_path / "tokenizer", params(torch_compile=True))


def test_a_training_shorter_than_logging_steps_has_a_curve(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is evaluated once at its end."""
    settings = params(max_steps=2, logging_steps=10, save_steps=10)
    _, done = run_training(base, tmp_path / "tokenizer", settings, tmp_path / "run")
    assert [row["step"] for row in done.curves["train"]] == [2]
    assert capsys.readouterr().out.count("step 2 of 2, eval loss") == 1
    train_loop.write_curves(done.curves, tmp_path)


def test_the_learning_rate_has_a_plot_of_its_own(tmp_path: Path) -> None:
    row = {"step": 1, "loss": 2.0, "learning_rate": 0.1, "grad_norm": 3.0}
    train_loop.write_curves({"train": [row], "eval": [{"step": 0, "loss": 2.5}]}, tmp_path)
    written = {path.name: path.read_text() for path in sorted(tmp_path.iterdir())}
    assert written == {
        "eval.csv": "step,loss\n0,2.5\n",
        "learning_rate.csv": "step,learning_rate\n1,0.1\n",
        "train.csv": "step,loss,learning_rate,grad_norm\n1,2.0,0.1,3.0\n",
    }


def test_the_terminal_shows_how_far_it_is(base: Path, tmp_path: Path, capsys: Any) -> None:
    """Loss, learning rate, speed and time left; without a terminal every 15 seconds, and at the end."""
    run_training(base, tmp_path / "tokenizer", params(lr_scheduler_type="constant"), tmp_path / "run")
    number = r"[\d,.]+"
    line = rf"test: step 6 of 6, loss {number}, lr 1\.00e-02, {number} tokens/s, 0 s left"
    assert re.search(line, capsys.readouterr().out)


def test_a_gradient_that_is_no_number_stops_the_run_and_keeps_its_checkpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In words, with the step: step 2's checkpoint is there to go on from."""
    original = train_loop.BlockTrainer._clip_grad_norm

    def broken(self: Any, model: Any) -> Any:
        norm = original(self, model)
        return norm * float("inf") if self.state.global_step == 3 else norm

    monkeypatch.setattr(train_loop.BlockTrainer, "_clip_grad_norm", broken)
    with pytest.raises(SystemExit, match=r"test: the norm of the gradients is inf at step 4; lower learning_rate"):
        run_training(base, tmp_path / "tokenizer", params(), tmp_path / "run")
    assert train_loop.last_checkpoint(tmp_path / "run/w") == str(tmp_path / "run/w/checkpoint-2")


def test_a_masked_model_on_a_base_of_4_bits_learns(masked: tuple[Path, Path], tmp_path: Path) -> None:
    settings = params(objective="mlm")
    model = train_loop.prepare_model(*masked, settings)
    train_loop.save(model, masked[1], masked[0], settings, tmp_path / "weights")
    lora = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]}
    settings = params(objective="mlm", lora=lora, quantization=tiny.QUANTIZATION)
    model, done = run_training(tmp_path / "weights", masked[1], settings, tmp_path / "run")
    assert learned(model).abs().sum() > 0 and done.steps == 6
    assert all(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)


def test_a_base_without_a_layer_to_quantise_is_refused(
    masked: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers passes over a model in which bitsandbytes knows no layer, and would train it in 32 bits."""
    settings = params(objective="mlm")
    train_loop.save(train_loop.prepare_model(*masked, settings), masked[1], masked[0], settings, tmp_path / "weights")
    whole, found = AutoModelForMaskedLM.from_pretrained(tmp_path / "weights", output_loading_info=True)
    monkeypatch.setattr(AutoModelForMaskedLM, "from_pretrained", lambda *_, **__: (whole, found))
    settings = params(objective="mlm", lora=ALL, quantization=tiny.QUANTIZATION)
    with pytest.raises(SystemExit, match="has no layer that can be quantised; leave `quantization` out"):
        train_loop.prepare_model(tmp_path / "weights", masked[1], settings)


BLOOM = {"architectures": ["BloomForCausalLM"], "model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 2}


@pytest.mark.parametrize("kind", ["bloom", "roberta"])
def test_documents_are_masked_on_a_quantised_base_with_checkpointing(
    kind: str, tmp_path: Path, masked: tuple[Path, Path]
) -> None:
    """A whole mask and ALiBi by document through adapters; the loss is that of each document alone."""
    if kind == "bloom":
        base, tokenizer = tmp_path / "base", tiny.tokenizer(tmp_path / "tokenizer")
        base.mkdir()
        arrow.write_json(base / "config.json", {**BLOOM, "vocab_size": 300})
        changes: dict[str, Any] = {"lora": {**ALL, "target_modules": ["query_key_value"]}}
    else:
        base, tokenizer = tiny.roberta(tmp_path / "base"), masked[1]
        changes = {"objective": "mlm", "lora": {**ALL, "target_modules": ["query", "value"]}}
    plain = params(objective=changes.get("objective", "clm"))
    train_loop.save(train_loop.prepare_model(base, tokenizer, plain), tokenizer, base, plain, tmp_path / "weights")
    settings = params(
        mask_documents=True, gradient_checkpointing=True, quantization=tiny.QUANTIZATION, max_steps=4, **changes
    )
    packed(tmp_path / "run/train", 20)
    packed(tmp_path / "run/eval", 5)
    model, done = run_training(tmp_path / "weights", tokenizer, settings, tmp_path / "run")
    assert learned(model).isfinite().all() and len(done.curves["train"]) == 4
    if kind == "roberta":
        return  # its masking follows the block
    table = arrow.table(tmp_path / "run/eval")
    total, tokens = 0.0, 0
    for row in range(5):
        ids, starts = table["input_ids"][row].as_py(), table["starts"][row].as_py()
        for first, last in itertools.pairwise(starts):
            if last - first > 1:
                alone = torch.tensor([ids[first:last]])
                total += model.eval()(input_ids=alone, labels=alone).loss.item() * (last - first - 1)
                tokens += last - first - 1
    data = train_loop.seen(tmp_path / "run/eval", tokenizer, settings, model)
    assert loss_head.mean_loss(model, data, 3) == pytest.approx(total / tokens, abs=1e-5)
    assert mean_loss(model, data, 3) == pytest.approx(total / tokens, abs=1e-5)
