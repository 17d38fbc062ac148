"""export_model: a folder that transformers opens, smaller, with tokenizer and card, and what it loses measured."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import export_model
import tiny
from conftest import Runner
from kit import arrow


@pytest.fixture
def merged(project: Path) -> Path:
    """A project with a merged model, its card and held-out blocks."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny.phase(project, "chat", masked=True)
    folder = Path(shutil.copytree(project / "models/tokenizers/chat", project / "models/chat/merged"))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny.base(project / "models/configs/other", tie_word_embeddings=False))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (project / "models/chat/trained").mkdir()
    arrow.write_json(project / "models/chat/trained/training.json", {"base": "x", "quantization": None})
    (project / "reports/chat").mkdir(parents=True)
    (project / "reports/chat/model_card.md").write_text("# chat\n")
    return project


def export(project: Path, run_stage: Runner, bits: str) -> dict[str, Any]:
    tiny.params_yaml(project, chat={"base": "models/configs/tiny"})
    content = json.loads((project / "params.yaml").read_text())
    content["exports"] = {"small": {"phase": "chat", "format": bits}}
    (project / "params.yaml").write_text(json.dumps(content))
    done = run_stage(project, "export_model", "small")
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(arrow.read_json(project / "metrics/runs/export_model@small.json"))


@pytest.mark.parametrize(("bits", "loss"), [("bf16", 1e-9), ("int8", 0.02), ("nf4", 0.2)])
def test_the_folder_opens_and_its_loss_is_measured(merged: Path, run_stage: Runner, bits: str, loss: float) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    measured = export(merged, run_stage, bits)
    folder = merged / "models/exports/small"
    assert (folder / "README.md").read_text() == "# chat\n"
    assert AutoTokenizer.from_pretrained(folder).chat_template
    ids = torch.tensor([[1, 5, 9, 12]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits.float()
        whole = AutoModelForCausalLM.from_pretrained(merged / "models/chat/merged")(input_ids=ids).logits
    assert logits.shape == whole.shape
    assert abs(measured["eval_loss"] - measured["eval_loss_bf16"]) <= loss
    assert (bits == "bf16") == (measured["eval_loss"] == measured["eval_loss_bf16"])
    assert measured["mebibytes"] < measured["mebibytes_merged"]
    quantized = arrow.read_json(folder / "config.json").get("quantization_config", {})
    assert quantized.get("load_in_8bit", False) == (bits == "int8")
    assert quantized.get("load_in_4bit", False) == (bits == "nf4")


def test_the_same_bytes_again(merged: Path, run_stage: Runner) -> None:
    def digests() -> list[str]:
        export(merged, run_stage, "nf4")
        return list(arrow.read_json(merged / "metrics/runs/export_model@small.json")["outputs"])

    assert digests() == digests()


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=r"torchao_int8 needs torchao: pip install '\.\[export\]', or take int8"):
        export_model.options("torchao_int8")
