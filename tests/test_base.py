"""kit/base.py: a base that is damaged, not whole or of another kind is one sentence, before any stage works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import check_params
import tiny
from kit.base import INDEX, SINGLE, check_base, has_weights
from kit.model import load_model, read_config
from kit.tokenizer import Vocabulary

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4821\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with weights and tokenizer."""
    root = tmp_path_factory.mktemp("base")
    config, tokenizer = tiny.base(root / "config"), tiny.tokenizer(root / "whole")
    vocabulary = Vocabulary(tokenizer)
    load_model(config, vocabulary.size, vocabulary.special_ids).save_pretrained(root / "whole")
    return root / "whole"


@pytest.fixture
def base(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "base"))


def edit(path: Path, **keys: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def shards(base: Path, *kept: str) -> None:
    """Name two files in an index and keep those of `kept`."""
    weights = load_file(base / SINGLE)
    (base / SINGLE).unlink()
    names, parts = sorted(weights), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    halves = dict(zip(parts, (names[:3], names[3:]), strict=True))
    for part in kept:
        save_file({name: weights[name] for name in halves[part]}, base / part, {"format": "pt"})
    index = {name: part for part, half in halves.items() for name in half}
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "pointer": (
        lambda b: (b / SINGLE).write_bytes(LFS),
        "model.safetensors holds no weights .*pointer",
    ),
    "cut": (lambda b: cut(b / SINGLE, -100), "model.safetensors holds no weights .* not fully covered"),
    "empty": (lambda b: cut(b / SINGLE, 0), "model.safetensors holds no weights that can be read"),
    "no shard": (shards, "no model-00001-of-00002.safetensors and 1 more, which model.safetensors.index.json names"),
    "a shard": (
        lambda b: shards(b, "model-00001-of-00002.safetensors"),
        "has no model-00002-of-00002.safetensors",
    ),
    "index": (lambda b: (shards(b), cut(b / INDEX, 40)), "index.json holds no JSON object"),
    "empty index": (lambda b: (shards(b), (b / INDEX).write_text('{"weight_map": {}}')), "index.json names no weights"),
    "other form": (lambda b: (b / SINGLE).rename(b / "consolidated.safetensors"), "has its weights in consolidated"),
    "pickled": (lambda b: (b / SINGLE).rename(b / "pytorch_model.bin"), "in pytorch_model.bin, and only .safetensors"),
    "config": (lambda b: (b / "config.json").write_bytes(LFS), "config.json holds no JSON object .*pointer"),
    "no type": (lambda b: (b / "config.json").write_text("[]"), "config.json names no model_type"),
    "no config": (lambda b: (b / "config.json").unlink(), "has no config.json"),
    "quantised": (
        lambda b: edit(b / "config.json", quantization_config={"quant_method": "awq"}),
        r"were quantised \(awq\), which can neither be trained nor merged into; take the model in 16 or 32 bits",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_base_is_refused_before_any_stage(
    base: Path, project: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Not by a traceback at the training, nor with random weights where they should have been."""
    damage, sentence = DAMAGED[kind]
    damage(base)
    shutil.copytree(base, project / "models/base/own")
    with pytest.raises(SystemExit, match=sentence):
        check_base(base)
    tiny.params_yaml(project, pretrain={"base": "models/base/own"})
    monkeypatch.chdir(project)
    with pytest.raises(SystemExit, match=sentence):
        check_params.check()


def test_whole_bases_pass(base: Path, tmp_path: Path) -> None:
    check_base(tiny.base(tmp_path / "config"))
    assert not has_weights(tmp_path / "config")
    check_base(base)
    before, vocabulary = load_file(base / SINGLE), Vocabulary(base)
    shards(base, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    check_base(base)
    assert has_weights(base)
    loaded = load_model(base, vocabulary.size, vocabulary.special_ids).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            {"model_type": "qwen99"},
            r"transformers 5\.\S+ has no model of type qwen99, and code",
        ),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "has no model of type own"),
        ({"num_hidden_layers": "2"}, r"config\.json: .*'num_hidden_layers' expected int, got str .*; correct it"),
    ],
)
def test_a_config_that_transformers_does_not_read_is_one_sentence(
    base: Path, keys: dict[str, object], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code beside the weights is not run, and nobody is asked at a prompt whether it may be."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt"))
    edit(base / "config.json", **keys)
    with pytest.raises(SystemExit, match=sentence):
        read_config(base)


def test_weights_of_another_shape_are_named(base: Path) -> None:
    vocabulary = Vocabulary(base)
    hidden = json.loads((base / "config.json").read_text())["hidden_size"]
    edit(base / "config.json", hidden_size=2 * hidden)
    with pytest.raises(
        SystemExit, match=rf"have the shape \[\d+, {hidden}\], and its config.json asks for \[\d+, {2 * hidden}\]"
    ):
        load_model(base, vocabulary.size, vocabulary.special_ids)


def test_weights_that_are_not_used_are_said(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A config with fewer layers than the weights have is another model."""
    vocabulary = Vocabulary(base)
    load_model(base, vocabulary.size, vocabulary.special_ids)
    assert capsys.readouterr().out == ""
    edit(base / "config.json", num_hidden_layers=1)
    load_model(base, vocabulary.size, vocabulary.special_ids)
    assert "base has weights that a LlamaForCausalLM does not use: model.layers.1." in capsys.readouterr().out
