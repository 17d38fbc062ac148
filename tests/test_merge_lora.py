"""merge_lora: base + adapter in one model, to the bit of peft's own merge, or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import merge_lora
import tiny
from conftest import Runner

TARGETS = ["q_proj", "v_proj", "down_proj"]


def make_base(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**{k: v for k, v in {**tiny.CONFIG, **changes}.items() if k not in ("architectures",)})
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def make_adapter(base: Path, folder: Path, **changes: Any) -> Path:
    """An adapter whose B is not zero."""
    options = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def test_the_example_of_the_docstring(tmp_path: Path) -> None:
    save_file({"w.weight": torch.eye(2), "other": torch.ones(3)}, tmp_path / "model.safetensors")
    delta = (torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [0.0]]))
    changed = merge_lora.merge_file(tmp_path / "model.safetensors", {"w.weight": delta}, scaling=2.0)
    assert changed == ["w.weight"]
    merged = load_file(tmp_path / "model.safetensors")
    assert merged["w.weight"].tolist() == [[3, 2], [0, 1]]
    assert merged["other"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["5GB", "100KB"])
def test_every_value_is_the_one_of_pefts_merge(tmp_path: Path, dtype: torch.dtype, tied: bool, shard: str) -> None:
    base = make_base(tmp_path / "base", dtype, shard, tie_word_embeddings=tied)
    adapter = make_adapter(base, tmp_path / "adapter")
    (tmp_path / "ours").mkdir()
    assert merge_lora.merge(base, adapter, tmp_path / "ours") == 2 * len(TARGETS)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    ours, theirs, before = tensors(tmp_path / "ours"), tensors(tmp_path / "peft"), tensors(base)
    assert ours.keys() == theirs.keys() == before.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    changed = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert changed == {name for name in ours if any(target in name for target in TARGETS)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"use_rslora": True}, "use_rslora True"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    ],
)
def test_other_kinds_of_adapters_are_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    base = make_base(tmp_path / "base", tie_word_embeddings=False)
    adapter = make_adapter(base, tmp_path / "adapter", **changes)
    with pytest.raises(ValueError, match=f"the adapter has {sentence}.*cannot be merged yet"):
        merge_lora.merge(base, adapter, tmp_path)


def test_an_adapter_for_another_shape_or_model_is_refused(tmp_path: Path) -> None:
    adapter = make_adapter(make_base(tmp_path / "base"), tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    wide = make_base(tmp_path / "wide", intermediate_size=256)
    with pytest.raises(ValueError, match=r"down_proj.weight has shape \[64, 256\] but the adapter was made for"):
        merge_lora.merge(wide, adapter, tmp_path / "out")
    short = make_base(tmp_path / "short", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"has no weight for model\.layers\.1"):
        merge_lora.merge(short, adapter, tmp_path / "out")


def prepare(project: Path) -> tuple[Path, Path]:
    """A project with a base in models/base/llama and a trained adapter for phase chat."""
    tiny.phase(project, "chat", masked=True)
    tiny.params_yaml(project, chat={"base": "models/base/llama"})
    base = make_base(project / "models/base/llama", vocab_size=300)
    trained = make_adapter(base, project / "models/chat/trained")
    for path in (project / "models/tokenizers/chat").iterdir():
        (trained / path.name).write_bytes(path.read_bytes())
    (trained / "training.json").write_text("{}")
    return base, trained


def test_the_stage_publishes_a_whole_model_with_its_proof(project: Path, run_stage: Runner) -> None:
    prepare(project)
    done = run_stage(project, "merge_lora", "chat")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (project / "models/chat/merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not {"adapter_config.json", "adapter_model.safetensors", "training.json", "README.md"} & names
    record = json.loads((project / "metrics/runs/merge_lora@chat.json").read_text())
    assert 0 < record["logit_difference_max"] < 1e-4
    assert record["eval_loss_merged"] == pytest.approx(record["eval_loss_adapter"], abs=1e-5)


def test_a_merge_that_computes_something_else_is_not_published(project: Path, run_stage: Runner) -> None:
    """The scaling is broken on purpose: the proof finds it and the old model stays."""
    prepare(project)
    old = project / "models/chat/merged"
    old.mkdir()
    (old / "keep").write_text("old")
    script = project / "stages/merge_lora.py"
    script.write_text(script.read_text().replace('config["lora_alpha"] / config["r"]', "1.0"))
    done = run_stage(project, "merge_lora", "chat")
    assert done.returncode == 1
    assert "logits differ by" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in old.iterdir()] == ["keep"]


def test_a_phase_without_an_adapter_passes_through(project: Path, run_stage: Runner) -> None:
    _, trained = prepare(project)
    for path in trained.glob("adapter_*"):
        path.unlink()
    make_base(trained)
    assert run_stage(project, "merge_lora", "chat").returncode == 0
    merged = project / "models/chat/merged"
    assert (merged / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert not (merged / "training.json").exists()
