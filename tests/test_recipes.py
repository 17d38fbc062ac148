"""recipes/: each file is a whole params.yaml that check_params accepts, with the settings of its system."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from ruamel.yaml import YAML

import check_params
from conftest import ROOT, copy_project, git, repro
from kit.params import load

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
NAMES = ["alpaca_qlora", "continue_qlora", "domain_chat", "kantai_bert", "scratch_llama", "self_cognition_lora"]


def recipe(name: str) -> dict[str, Any]:
    content: dict[str, Any] = YAML(typ="safe").load(ROOT / f"recipes/{name}.yaml")
    return content


def install(name: str, folder: Path) -> Path:
    copy_project(folder)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    shutil.copyfile(ROOT / f"recipes/{name}.yaml", folder / "params.yaml")
    return folder


def test_there_is_a_recipe_for_each_system() -> None:
    assert RECIPES == NAMES


def test_a_recipe_replaces_no_params_that_git_does_not_hold(tmp_path: Path) -> None:
    """One that was committed, and one that is another recipe, can be had again."""
    for name in ("Makefile", "params.yaml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "x")

    def make(name: str) -> str:
        command = ["make", "--old-file=setup", "recipe", f"NAME={name}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        content = (tmp_path / "params.yaml").read_bytes()
        assert (done.returncode == 0) == (content == (tmp_path / f"recipes/{name}.yaml").read_bytes())
        return done.stdout

    for name in ("kantai_bert", "scratch_llama"):
        assert "changes" not in make(name)
    with (tmp_path / "params.yaml").open("a") as file:
        file.write("# mine\n")
    assert "params.yaml has changes that Git does not hold and that would be lost; commit it first" in make(
        "kantai_bert"
    )
    git(tmp_path, "commit", "--quiet", "--all", "--message", "mine")
    assert "changes" not in make("kantai_bert")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_in_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(install(name, tmp_path / "project"))
    check_params.check()
    check_params.check_raw(load())  # as in a new clone, where the imports have not run
    assert not load()["bases"]  # nothing is downloaded
    for phase in load()["phases"].values():
        made = re.fullmatch(r"models/(\w+)/merged", phase["base"])
        assert (made and made[1] in load()["phases"]) or Path(phase["base"], "config.json").is_file()
    for source in load()["sources"].values():
        assert source["path"].startswith("data/raw/python_") or Path(source["path"]).is_dir()


def test_the_values_of_the_systems() -> None:
    continued = recipe("continue_qlora")["phases"]["domain"]["train_model"]
    targets = {"q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "down_proj", "up_proj"}
    lora = continued["lora"]
    assert (lora["r"], lora["lora_alpha"], lora["lora_dropout"], set(lora["target_modules"])) == (8, 16, 0.05, targets)
    assert continued["quantization"]["bnb_4bit_quant_type"] == "nf4"
    assert continued["quantization"]["bnb_4bit_use_double_quant"]
    alpaca = recipe("alpaca_qlora")["phases"]["chat"]
    train = alpaca["train_model"]
    assert (train["per_device_train_batch_size"], train["global_batch_size"]) == (4, 4 * 8)
    assert train["optim"] == "paged_adamw_32bit" and train["gradient_checkpointing"]
    assert train["lora"]["target_modules"] == ["query_key_value"]
    assert alpaca["train_tokenizer"]["chat_template"] == "human_assistant"
    kantai = recipe("kantai_bert")["phases"]["kantai"]
    assert (kantai["train_model"]["objective"], kantai["train_model"]["mlm_probability"]) == ("mlm", 0.15)
    assert (kantai["group_blocks"]["block_size"], kantai["group_blocks"]["mode"]) == (128, "line")
    assert kantai["train_tokenizer"]["special_tokens"] == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert recipe("self_cognition_lora")["phases"]["chat"]["train_model"]["lora"]["target_modules"] == "all-linear"


def test_kantai_bert_has_its_parameters() -> None:
    """84,095,008 with the pooler, which transformers gave masked models, too, until it was found that none uses it."""
    config = transformers.AutoConfig.from_pretrained(ROOT / "models/configs/kantai_bert")
    with torch.device("meta"):
        model = transformers.RobertaForMaskedLM(config)
        pooler = transformers.RobertaModel(config, add_pooling_layer=True).pooler
    without = sum(parameter.numel() for parameter in model.parameters())
    assert without == 83_504_416
    assert without + sum(parameter.numel() for parameter in pooler.parameters()) == 84_095_008


def test_the_questions_about_the_assistant_have_both_names() -> None:
    lines = (ROOT / "recipes/self_cognition/self_cognition.jsonl").read_text(encoding="utf-8").splitlines()
    assert 10 <= len(lines) <= 20
    for line in lines:
        assert [message["role"] for message in json.loads(line)["messages"]] == ["user", "assistant"]
        assert set(re.findall(r"{{(.*?)}}", line)) <= {"name", "author"}
    for name in ("name", "author"):
        assert sum(f"{{{{{name}}}}}" in line for line in lines) > len(lines) // 2


# Llama, RoBERTa, BLOOM and Qwen; the others differ from these by their text, and are run by hand.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["scratch_llama", "kantai_bert", "alpaca_qlora", "self_cognition_lora"])
def test_a_recipe_runs_as_it_stands_but_for_its_steps(name: str, tmp_path: Path) -> None:
    """And its model is used as its system is: text is generated, or a mask filled."""
    folder = install(name, tmp_path / "project")
    text = re.sub(r"max_steps: \d+", "max_steps: 2", (folder / "params.yaml").read_text(encoding="utf-8"))
    text = re.sub(r"(logging|eval|save)_steps: \d+", r"\1_steps: 1", text)
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    git(folder, "init", "--quiet")
    repro(folder)
    for phase, settings in recipe(name)["phases"].items():
        merged = str(folder / "models" / phase / "merged")
        if settings["train_model"].get("objective") == "mlm":
            found = transformers.pipeline("fill-mask", model=merged)("A <mask> is called.", top_k=3)
            assert len(found) == 3 and found[0]["score"] >= found[2]["score"] > 0
            assert all("mask" not in each["sequence"] for each in found)
            continue
        write = transformers.pipeline("text-generation", model=merged)
        asked = [{"role": "user", "content": "What is a list?"}] if write.tokenizer.chat_template else "The list is"
        answer = write(asked, do_sample=True, min_new_tokens=8, max_new_tokens=8)[0]["generated_text"]
        assert answer[-1]["role"] == "assistant" if isinstance(asked, list) else answer.startswith("The list is")
        assert len(answer) > len(asked)
