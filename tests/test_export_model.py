"""export_model: a folder that transformers opens, smaller, with tokenizer and card, and what it loses measured."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import export_model
import gguf_file
import tiny
from conftest import Runner, ran, repro
from kit import arrow
from kit.model import Blocks


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


@pytest.mark.parametrize(
    ("bits", "loss"), [("bf16", 1e-9), pytest.param("int8", 0.02, marks=pytest.mark.slow), ("nf4", 0.2)]
)
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


@pytest.mark.parametrize("bits", ["gguf_bf16", "gguf_q8_0"])
def test_a_file_for_llama_cpp(merged: Path, run_stage: Runner, bits: str) -> None:
    """One file beside the card, and its loss by llama.cpp."""
    for package in ("gguf", "llama_cpp"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    measured = export(merged, run_stage, bits)
    folder = merged / "models/exports/small"
    assert {path.name for path in folder.iterdir()} == {"README.md", "model.gguf"}
    assert measured["mebibytes"] < measured["mebibytes_merged"]
    assert 0 < abs(measured["eval_loss"] - measured["eval_loss_bf16"]) < 0.02


def test_without_llama_cpp_a_file_is_written_and_said_to_be_unchecked(merged: Path, run_stage: Runner) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: pip install '.[gguf]'")
    script = merged / "stages/export_model.py"
    script.write_text(script.read_text().replace('find_spec("llama_cpp")', 'find_spec("llama_cpp_hidden")'))
    assert export(merged, run_stage, "gguf_f16")["eval_loss"] == "not checked: llama-cpp-python is not installed"


@pytest.mark.parametrize("bits", [pytest.param("nf4", marks=pytest.mark.slow), "torchao_int8", "gguf_q8_0"])
def test_the_same_bytes_again(merged: Path, run_stage: Runner, bits: str) -> None:
    if package := bits.partition("_")[0] if "_" in bits else None:
        pytest.importorskip(package, reason=f"{package} is not installed")

    def digests() -> list[str]:
        export(merged, run_stage, bits)
        return list(arrow.read_json(merged / "metrics/runs/export_model@small.json")["outputs"])

    assert digests() == digests()


def test_8_bits_by_torchao(merged: Path, run_stage: Runner) -> None:
    """A folder that transformers opens again; embeddings stay as they are."""
    pytest.importorskip("torchao", reason="torchao is not installed: pip install '.[export]'")
    from transformers import AutoModelForCausalLM

    measured = export(merged, run_stage, "torchao_int8")
    folder = merged / "models/exports/small"
    assert 0 < abs(measured["eval_loss"] - measured["eval_loss_bf16"]) < 0.02
    assert measured["mebibytes"] < measured["mebibytes_merged"]
    assert arrow.read_json(folder / "config.json")["quantization_config"]["quant_method"] == "torchao"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model.model.layers[0].mlp.up_proj.weight).__module__.startswith("torchao")


def test_4_bits_of_a_narrow_model_are_measured_on_any_cpu(tmp_path: Path) -> None:
    """bitsandbytes' way for CPUs with AVX512-BF16 breaks down where rows are shorter than a block."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny.base(tmp_path / "config", hidden_size=32))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "merged")
    (tmp_path / "small").mkdir()
    export_model.write(tmp_path / "merged", "nf4", tmp_path / "small")
    with torch.no_grad():
        assert export_model.load(tmp_path / "small")(torch.arange(6)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "bits", "reason"),
    [
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "nf4", "[Ee]xpected"),
        (
            {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "num_local_experts": 2},
            "int8",
            "not implemented for 'Char'",
        ),
    ],
)
def test_what_cannot_be_used_in_fewer_bits_is_one_sentence(
    tmp_path: Path, changes: dict[str, Any], bits: str, reason: str
) -> None:
    """bitsandbytes quantises what these architectures do not use as a layer; nothing is published."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny.base(tmp_path / "config", **changes))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "merged")
    (tmp_path / "small").mkdir()
    export_model.write(tmp_path / "merged", bits, tmp_path / "small")
    held = Blocks(arrow.table(tiny.blocks(tmp_path / "eval", 2)), 30)
    with pytest.raises(SystemExit, match=rf"the model cannot be used as {bits} \(.*{reason}.*\); export it as bf16"):
        export_model.loss_of(tmp_path / "small", bits, held)


def test_weights_that_an_export_lacks_are_not_drawn(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny.base(tmp_path / "config"))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "merged")
    tensors = load_file(tmp_path / "merged/model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "merged/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"finds no model\.norm\.weight in it"):
        export_model.load(tmp_path / "merged")


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit, match=r"need the package gguf: pip install '\.\[gguf\]', or take bf16"):
        gguf_file.write(Path("merged"), Path("model.gguf"), "small", "bf16")
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=r"torchao_int8 needs torchao: pip install '\.\[export\]', or take int8"):
        export_model.options("torchao_int8")


def test_a_folder_is_pushed_with_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a private repository; what the Hub refuses is one sentence."""
    import huggingface_hub

    asked: list[tuple[str, Any]] = []

    class Hub:
        def create_repo(self, repository: str, **options: Any) -> None:
            asked.append((repository, options))

        def upload_folder(self, **options: Any) -> str:
            if options["repo_id"] == "me/other":
                raise huggingface_hub.errors.OfflineModeIsEnabled("the network is switched off\nsee HF_HUB_OFFLINE")
            asked.append((options["repo_id"], sorted(path.name for path in options["folder_path"].iterdir())))
            return "https://hub/me/small"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "models/exports/small"
    with pytest.raises(SystemExit, match="there is no models/exports/small to push; `dvc repro export_model@small`"):
        export_model.main("small", push="me/small")
    folder.mkdir(parents=True)
    for name in ("README.md", "model.gguf"):
        (folder / name).write_text("x")
    export_model.main("small", push="me/small")
    assert asked == [
        ("me/small", {"private": True, "exist_ok": True}),
        ("me/small", ["README.md", "model.gguf"]),
    ]
    with pytest.raises(
        SystemExit, match=r"on the Hub as me/other \(the network is switched off\); see to the connection"
    ):
        export_model.main("small", push="me/other")


def test_a_push_without_a_network_is_one_sentence(merged: Path, run_stage: Runner) -> None:
    export(merged, run_stage, "bf16")
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"}
    done = run_stage(merged, "export_model", "small", "--push", "me/small", **nowhere)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "models/exports/small could not be put on the Hub as me/small (" in done.stderr
    done = run_stage(merged, "export_model", "small", "--push", "me/small", HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_dvc_makes_an_export_after_all_that_it_reads(workspace: Path) -> None:
    """Its inputs lie inside the folders of three other stages; a change above them goes through each of these."""
    from ruamel.yaml import YAML

    path = workspace / "params.yaml"
    content = YAML().load(path)
    content["exports"] = {"small": {"phase": "chat", "format": "nf4"}}
    content["phases"]["chat"]["train_model"]["learning_rate"] = 1.5e-3
    YAML().dump(content, path)
    order = re.findall(r"Running stage '(\w+)@", repro(workspace, "export_model@small"))
    assert order == ["train_model", "merge_lora", "evaluate_model", "describe_model", "export_model"]
    card = (workspace / "reports/chat/model_card.md").read_bytes()
    assert (workspace / "models/exports/small/README.md").read_bytes() == card
    assert not ran(repro(workspace, "export_model@small"))
    content["exports"]["small"]["format"] = "int8"
    YAML().dump(content, path)
    assert ran(repro(workspace, "export_model@small")) == {"export_model@small"}
