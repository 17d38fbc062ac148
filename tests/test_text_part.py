"""stages/text_part.py: of a model of several parts, a plain causal model that computes what its language model does."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import text_part
import tiny
import train_loop
from conftest import ROOT
from kit.base import INDEX, SINGLE, check_base
from kit.model import load_model
from kit.tokenizer import Vocabulary
from merge_weights import merge
from test_train_model import params, run_training

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "vocab_size": 300,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_channels": 3,
}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
}
# Each way of naming the tensors; outputs that are the embeddings, and ones that are not; experts stored one by one.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("Gemma3ForCausalLM", SLIDING),
    "qwen3_5": ("Qwen3_5ForCausalLM", LINEAR),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", {**LINEAR, **EXPERTS}),
    "mistral3": ("MistralForCausalLM", {"model_type": "mistral"}),
    "idefics3": ("LlamaForCausalLM", {"model_type": "llama"}),
    "llava": ("LlamaForCausalLM", {"model_type": "llama"}),
}
NO_CAUSAL = "qwen3_vl"


def composite(kind: str, folder: Path, **shards: Any) -> Any:
    """Write a small model of several parts, with a tokenizer; return it."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](
        text_config={**TEXT, **MODELS.get(kind, ("", {}))[1]}, vision_config=VISION
    )
    model = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config).eval()
    model.save_pretrained(folder, **shards)
    (folder / "processor_config.json").write_text("{}")
    tokenizer = tiny.tokenizer(folder.parent / "tokenizer")
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    return model


def loaded(folder: Path) -> Any:
    vocabulary = Vocabulary(folder)
    return load_model(folder, vocabulary.size, vocabulary.special_ids).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return torch.as_tensor(model(input_ids=torch.arange(3, 35)[None]).logits)


def edit(path: Path, **keys: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("nothing is fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("kind", MODELS)
def test_the_plain_model_computes_what_the_whole_one_does(tmp_path: Path, kind: str) -> None:
    """To the bit, from the same bytes; of the other parts nothing is left."""
    whole = composite(kind, tmp_path / "whole")
    text_part.main(tmp_path / "whole", tmp_path / "text")
    part = loaded(tmp_path / "text")
    assert type(part).__name__ == MODELS[kind][0]
    assert torch.equal(logits(part), logits(whole))
    assert part.config.tie_word_embeddings == whole.config.tie_word_embeddings
    assert part.num_parameters() < whole.num_parameters()

    stored, taken = (load_file(tmp_path / name / SINGLE) for name in ("whole", "text"))
    values = sorted(value.numpy().tobytes() for name, value in stored.items() if text_part.plain_name(name, "model"))
    assert sorted(value.numpy().tobytes() for value in taken.values()) == values
    assert 0 < len(taken) < len(stored)
    assert {path.name for path in (tmp_path / "text").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir() if path.name != "processor_config.json"
    }


@pytest.mark.usefixtures("offline")
def test_several_files_stay_several_and_those_of_other_parts_alone_are_gone(tmp_path: Path) -> None:
    whole = composite("gemma3", tmp_path / "whole", max_shard_size="40KB")
    text_part.main(tmp_path / "whole", tmp_path / "text")
    assert torch.equal(logits(loaded(tmp_path / "text")), logits(whole))
    index = json.loads((tmp_path / "text" / INDEX).read_text())
    files = {path.name: load_file(path) for path in (tmp_path / "text").glob("*.safetensors")}
    assert {name: file for file, held in files.items() for name in held} == index["weight_map"]
    assert 1 < len(files) < len(list((tmp_path / "whole").glob("*.safetensors")))
    size = sum(value.nbytes for held in files.values() for value in held.values())
    assert index["metadata"]["total_size"] == size


@pytest.mark.parametrize("equal", [True, False], ids=["one", "two"])
def test_an_output_that_the_files_hold_beside_the_embeddings(tmp_path: Path, equal: bool) -> None:
    """The config says that both are one: true only where they are equal, as transformers reads the whole model."""
    composite("gemma3", tmp_path / "whole")
    weights = load_file(tmp_path / "whole" / SINGLE)
    embeddings = next(value for name, value in weights.items() if name.endswith("embed_tokens.weight"))
    weights["language_model.lm_head.weight"] = embeddings.clone() if equal else embeddings + 1
    save_file(weights, tmp_path / "whole" / SINGLE, {"format": "pt"})
    whole = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    text_part.main(tmp_path / "whole", tmp_path / "text")
    part = loaded(tmp_path / "text")
    assert torch.equal(logits(part), logits(whole))
    assert part.config.tie_word_embeddings is equal


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5", "mistral3"])
@pytest.mark.parametrize("settings", [{}, {"lora": tiny.LORA}], ids=["full", "lora"])
def test_the_plain_model_is_trained_and_merged_like_any_other(
    tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    composite(kind, tmp_path / "whole")
    base, trained, merged = (tmp_path / name for name in ("text", "trained", "merged"))
    text_part.main(tmp_path / "whole", base)
    model, _ = run_training(base, tmp_path / "tokenizer", params(**settings), tmp_path / "work")
    train_loop.save(model, tmp_path / "tokenizer", base, params(**settings), trained)
    if settings:
        merged.mkdir()
        merge(base, trained, merged)
        for file in (tmp_path / "tokenizer").iterdir():
            shutil.copyfile(file, merged / file.name)
    after = logits(loaded(merged if settings else trained))
    torch.testing.assert_close(after, logits(model.eval()), rtol=0, atol=1e-5)
    assert (after - logits(loaded(base))).abs().max() > 0.01


def test_of_a_config_alone_the_part_is_a_config_alone(tmp_path: Path) -> None:
    composite("gemma3", tmp_path / "whole")
    (tmp_path / "whole" / SINGLE).unlink()
    text_part.main(tmp_path / "whole", tmp_path / "text")
    assert not list((tmp_path / "text").glob("*.safetensors"))
    assert type(loaded(tmp_path / "text")).__name__ == "Gemma3ForCausalLM"


def without_a_norm(whole: Path) -> None:
    weights = load_file(whole / SINGLE)
    del weights[next(name for name in weights if name.endswith("language_model.model.norm.weight"))]
    save_file(weights, whole / SINGLE, {"format": "pt"})


def two_names(whole: Path) -> None:
    weights = load_file(whole / SINGLE)
    weights["model.language_model.norm.weight"] = torch.zeros(64)
    save_file(weights, whole / SINGLE, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            without_a_norm,
            "cannot be taken, model.norm.weight and 0 other weights of a Gemma3ForCausalLM are not in its",
        ),
        (two_names, "a tensor of the language model that is there twice"),
        (lambda whole: edit(whole / "config.json", tie_word_embeddings=False), "cannot be taken, lm_head.weight"),
        (lambda whole: edit(whole / "config.json", quantization_config={"quant_method": "fp8"}), "quantised .fp8."),
        (lambda whole: (whole / SINGLE).write_bytes(b"version https"), "holds no weights that can be read"),
    ],
)
def test_what_is_not_whole_is_one_sentence_and_nothing_is_written(tmp_path: Path, damage: Any, sentence: str) -> None:
    composite("gemma3", tmp_path / "whole")
    damage(tmp_path / "whole")
    with pytest.raises(SystemExit, match=sentence):
        text_part.main(tmp_path / "whole", tmp_path / "out" / "text")
    assert not list((tmp_path / "out").iterdir())


def test_a_part_that_is_no_causal_model_is_refused(tmp_path: Path) -> None:
    composite(NO_CAUSAL, tmp_path / "whole")
    with pytest.raises(
        SystemExit, match="no causal model of type qwen3_vl_text, which is the language model of a qwen3"
    ):
        text_part.main(tmp_path / "whole", tmp_path / "text")


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    composite("gemma3", tmp_path / "whole")
    (tmp_path / "text").mkdir()
    with pytest.raises(SystemExit, match="text is there already; name a folder that is not"):
        text_part.main(tmp_path / "whole", tmp_path / "text")
    assert not list((tmp_path / "text").iterdir())


def test_the_advice_of_the_refusal_can_be_followed(tmp_path: Path) -> None:
    """A base of several parts is refused with a command; that writes a base that is taken, and is needed once."""
    composite("gemma3", tmp_path / "whole")
    with pytest.raises(SystemExit, match="of type gemma3, which reads more than text") as refused:
        check_base(tmp_path / "whole")
    words = str(refused.value).split("`python ")[1].split("`")[0].split()
    for expected, end in (
        (0, "of other parts were left out.\n"),
        (1, "is there already; name a folder that is not.\n"),
    ):
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == expected and (done.stdout or done.stderr).endswith(end), done.stderr
        assert "Traceback" not in done.stderr
    check_base(Path(words[-1]))
    with pytest.raises(SystemExit, match="is a language model and has no other part"):
        text_part.main(Path(words[-1]), tmp_path / "again")
