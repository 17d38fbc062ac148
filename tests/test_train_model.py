"""train_model: the right tokens are learned, in the frozen order, to the same bits after a kill and on every run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import bpe_training
import tiny
import train_loop
import train_tokenizer
from block_order import BlockOrder
from conftest import Runner, copy_project
from kit import arrow
from kit.model import IGNORED, Blocks, load_model, mean_loss, new_tokens
from kit.tokenizer import Vocabulary
from train_model import Params, total_steps


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
    curves = train_loop.train(model, blocks, held_out, order, 6, params(), tmp_path / "work", "test")
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
    optimizer = train_loop.MuonWithAdamW(model, params(optim="muon"))
    shapes = {
        name: [tuple(p.shape) for g in part.param_groups for p in g["params"]] for name, part in optimizer.parts.items()
    }
    assert len(shapes["muon"]) == 2 * 7 and all(len(shape) == 2 and 300 not in shape for shape in shapes["muon"])
    assert sorted(shapes["adamw"]) == [(64,)] * 5 + [(300, 64)]
    optimizer.param_groups[0]["lr"] = 0.5  # as a scheduler does
    assert optimizer.parts["muon"].param_groups[0]["lr"] == 0.5
    batch = open_blocks(tiny.blocks(tmp_path / "blocks", 4)).__getitems__([0, 1])
    model(**batch).loss.backward()
    optimizer.step()
    again = train_loop.MuonWithAdamW(model, params(optim="muon"))
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] == 0.5
    assert str(again.state_dict()) == str(optimizer.state_dict())


def make_project(project: Path, **changes: Any) -> None:
    tiny.phase(project, "pretrain")
    tiny.params_yaml(project, pretrain={"base": "models/configs/tiny", "train_model": {**tiny.TRAIN, **changes}})


def published(project: Path, name: str = "pretrain") -> dict[str, bytes]:
    folder = project / "models" / name / "trained"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "muon"])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, run_stage: Runner, optim: str) -> None:
    """SIGKILL between two checkpoints; the second run says where it goes on and publishes what a whole one does."""
    whole, killed = copy_project(tmp_path / "whole"), copy_project(tmp_path / "killed")
    for project in (whole, killed):
        make_project(project, optim=optim, max_steps=40, save_steps=5, logging_steps=5, eval_steps=10)
    assert run_stage(whole, "train_model", "pretrain").returncode == 0
    process = subprocess.Popen(
        [sys.executable, "stages/train_model.py", "pretrain"], cwd=killed, stdout=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not list(killed.glob(".work/train_model@pretrain/*/checkpoint-1[05]/whole")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (killed / "models/pretrain/trained").exists()
    again = run_stage(killed, "train_model", "pretrain", PYTHONHASHSEED="7")
    assert "going on from step" in again.stdout, again.stdout + again.stderr
    assert published(whole) == published(killed)
    for curve in ("train.csv", "eval.csv"):
        assert (whole / "plots/pretrain" / curve).read_text() == (killed / "plots/pretrain" / curve).read_text()
    assert not (killed / ".work/train_model@pretrain").exists()


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
    with pytest.raises(SystemExit, match=r"no layer query_key_value; it has down_proj, gate_proj, .*q_proj"):
        train_loop.prepare_model(base, tmp_path / "tokenizer", settings)


def test_a_base_without_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"empty has no config\.json: `base` is a folder"):
        load_model(tmp_path / "empty", 300, {})


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


def test_an_adapter_with_new_tokens_is_refused(extended: tuple[Path, Path]) -> None:
    """LoRA leaves embeddings as they are: the new ones would never be learned."""
    with pytest.raises(SystemExit, match=r"more tokens than .*; leave `lora` out"):
        train_loop.prepare_model(*extended, params(lora=tiny.LORA))


def test_another_tokenizer_is_no_extension(weights: Path, tmp_path: Path) -> None:
    """Its ids mean something else, so they get no rows of the base."""
    other = train_tokenizer.Params(mode="train", vocab_size=310, min_frequency=1)
    other_folder = Path(shutil.copytree(tmp_path / "tokenizer", tmp_path / "other"))
    train_tokenizer.train(iter(["entirely other words " * 9]), other).save(str(other_folder / "tokenizer.json"))
    assert new_tokens(weights, other_folder) == {}
