"""merge_lora: base + adapter in one model, to the bit of peft's own merge where that is right, or nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import merge_weights
import tiny
from conftest import Runner
from kit.model import grow, without_repacking
from kit.tokenizer import Vocabulary
from merge_weights import Adapter, merge

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCABULARY = 64
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 2}
LAYERS = {"intermediate_size": 48, "num_hidden_layers": 2}
# architecture -> (its class, its config, target_modules, modules_to_save)
MODELS: dict[str, tuple[str, dict[str, Any], list[str], list[str]]] = {
    "llama": ("LlamaForCausalLM", {**SMALL, **LAYERS, "num_key_value_heads": 2}, ["q_proj", "down_proj"], ["lm_head"]),
    "bloom": ("BloomForCausalLM", {**SMALL, "n_layer": 2, "n_head": 2}, ["query_key_value"], ["word_embeddings"]),
    "qwen2": (
        "Qwen2ForCausalLM",
        {**SMALL, **LAYERS, "num_key_value_heads": 1},
        ["k_proj", "up_proj"],
        ["lm_head", "embed_tokens"],
    ),
    "roberta": (
        "RobertaForMaskedLM",
        {**SMALL, **LAYERS, "max_position_embeddings": 40, "type_vocab_size": 1},
        ["query", "dense"],
        ["lm_head"],
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 40},
        ["c_attn", "c_proj"],
        ["wte"],
    ),
}
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
EXTRAS = ("plain", "modules_to_save", "added")
ADDED = 5
IDS = torch.arange(3, 19)[None]
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_key_value_heads": 2}
# Whose files name tensors otherwise than the model, or hold each expert as its own.
RENAMED: dict[str, tuple[str, dict[str, Any], list[str], list[str]]] = {
    "gpt_neox": ("GPTNeoXForCausalLM", {**SMALL, **LAYERS}, ["query_key_value", "lm_head"], []),
    "granitemoe": ("GraniteMoeForCausalLM", {**SMALL, **LAYERS, **EXPERTS}, ["q_proj", "o_proj"], []),
    "mixtral": ("MixtralForCausalLM", {**SMALL, **LAYERS, **EXPERTS}, ["q_proj", "o_proj"], []),
}


def model_class(architecture: str) -> Any:
    return getattr(transformers, {**MODELS, **RENAMED}[architecture][0])


def make_base(
    folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any
) -> Path:
    torch.manual_seed(0)
    cls = model_class(architecture)
    model = cls(cls.config_class(**{**{**MODELS, **RENAMED}[architecture][1], **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they begin as zeros, which hide what is lost
            torch.nn.init.normal_(parameter, std=0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def load(base: Path, dtype: torch.dtype = torch.float32, extra: str = "plain") -> Any:
    name = json.loads((base / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(base, dtype=dtype)
    if extra == "added":
        model.resize_token_embeddings(VOCABULARY + ADDED, mean_resizing=False)
    return model


def make_adapter(base: Path, folder: Path, extra: str = "plain", **options: Any) -> Path:
    """An adapter that has been trained, as far as one can see: every trainable parameter has moved."""
    causal = "ForMaskedLM" not in (base / "config.json").read_text()
    options = {"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM" if causal else None, **options}
    kind = AdaLoraConfig if "init_r" in options else LoraConfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights: that is what is tested
        model = get_peft_model(load(base, extra=extra), kind(**options))
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.05
        model.save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def compare(
    base: Path, adapter: Path, tmp_path: Path, dtype: torch.dtype = torch.float32, extra: str = "plain"
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return our tensors and those that peft's merge saves; ours compute, read back, what base + adapter does."""
    (tmp_path / "ours").mkdir()
    merge(base, adapter, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(load(base, dtype, extra), adapter).eval()
        with torch.no_grad():
            expected = peft(input_ids=IDS).logits.float()
        peft.merge_and_unload().save_pretrained(tmp_path / "peft")
    merged = load(tmp_path / "ours", dtype).eval()
    with torch.no_grad():
        found = merged(input_ids=IDS).logits.float()
    assert (expected - found).abs().max() < (1e-5 if dtype == torch.float32 else 0.02)
    return tensors(tmp_path / "ours"), tensors(tmp_path / "peft")


def test_the_example_of_the_docstring(tmp_path: Path) -> None:
    pair = {"A": torch.tensor([[1.0, 1.0]]), "B": torch.tensor([[1.0], [0.0]])}
    adapter = {f"base_model.model.w.lora_{part}.weight": value for part, value in pair.items()}
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 2}')
    assert Adapter(tmp_path).merged("w.weight", torch.eye(2)).tolist() == [[3, 2], [0, 1]]


# Where peft saves another model than it merged: the bias of a tied output, trained on its own, is left out.
LOST_BY_PEFT = {("roberta", True, "modules_to_save"): {"lm_head.decoder.bias"}}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        *(pytest.param(name, torch.float32, id=f"{name}-fp32") for name in MODELS),
        pytest.param("llama", torch.bfloat16, id="llama-bf16"),
        *(
            pytest.param(name, torch.bfloat16, id=f"{name}-bf16", marks=pytest.mark.slow)
            for name in MODELS
            if name != "llama"
        ),
    ],
)
def test_every_value_is_the_one_of_pefts_merge(
    tmp_path: Path, architecture: str, dtype: torch.dtype, kind: str, tied: bool, extra: str
) -> None:
    _, _, targets, saved = MODELS[architecture]
    base = make_base(tmp_path / "base", architecture, dtype, tie_word_embeddings=tied)
    options = {**KINDS[kind], "target_modules": targets}
    if extra == "modules_to_save":
        options["modules_to_save"] = saved
    adapter = make_adapter(base, tmp_path / "adapter", extra, **options)
    ours, theirs = compare(base, adapter, tmp_path, dtype, extra)
    assert ours.keys() - LOST_BY_PEFT.get((architecture, tied, extra), set()) == theirs.keys()
    different = {name for name in theirs if not torch.equal(ours[name], theirs[name])}
    # A grown output without ties: peft leaves the unused second bias at its old length and cannot load what it saved.
    assert different == ({"lm_head.bias"} if (architecture, tied, extra) == ("roberta", False, "added") else set())
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert config["vocab_size"] == VOCABULARY + (ADDED if extra == "added" else 0)
    assert config["tie_word_embeddings"] is (tied and extra != "modules_to_save")


NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "architecture", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bloom", "qwen2", "roberta"))]
)
def test_a_merge_into_4_bits_restored_computes_what_base_and_adapter_do(
    tmp_path: Path, architecture: str, kind: str, tied: bool, extra: str
) -> None:
    """What peft's adapter on bitsandbytes' base computes, the merged model computes without either."""
    _, _, targets, saved = MODELS[architecture]
    base = make_base(tmp_path / "base", architecture, tie_word_embeddings=tied)
    options = {**KINDS[kind], "target_modules": targets}
    if extra == "modules_to_save":
        # peft cannot keep a whole lm_head of RoBERTa, whose inner layer is of 4 bits.
        options["modules_to_save"] = ["word_embeddings"] if architecture == "roberta" else saved
    adapter = make_adapter(base, tmp_path / "adapter", extra, **options)
    (tmp_path / "ours").mkdir()
    merge(base, adapter, tmp_path / "ours", NF4)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        settings = transformers.BitsAndBytesConfig(**NF4)
        model = model_class(architecture).from_pretrained(base, dtype=torch.float32, quantization_config=settings)
        without_repacking(model)
        if extra == "added":
            model.resize_token_embeddings(VOCABULARY + ADDED, mean_resizing=False)
        expected = PeftModel.from_pretrained(model, adapter).eval()(input_ids=IDS).logits
        found = load(tmp_path / "ours").eval()(input_ids=IDS).logits
        unquantised = PeftModel.from_pretrained(load(base, extra=extra), adapter).eval()(input_ids=IDS).logits
    assert (expected - found).abs().max() < 1e-4
    assert (expected - unquantised).abs().max() > 1e-3, "4 bits lose something"


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3}},
        {"rank_pattern": {"k_proj": 4}, "use_rslora": True},
        {"trainable_token_indices": [3, 5]},
        {"trainable_token_indices": {"embed_tokens": [3, 5]}, "use_dora": True},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"]},
        {"init_r": 4, "total_step": 10},
        {"init_r": 4, "total_step": 10, "rank_pattern": None},
        {"target_modules": "all-linear"},
        {"layers_to_transform": [1]},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_other_settings_give_pefts_values(tmp_path: Path, options: dict[str, Any], tied: bool) -> None:
    """Weights of bfloat16 in many small files: the rounding is the same, and the index fits."""
    base = make_base(tmp_path / "base", "qwen2", torch.bfloat16, "5KB", tie_word_embeddings=tied)
    adapter = make_adapter(base, tmp_path / "adapter", **{"target_modules": ["q_proj", "k_proj"], **options})
    ours, theirs = compare(base, adapter, tmp_path, torch.bfloat16)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    index = json.loads((tmp_path / "ours/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == ours.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in ours.values())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_on_a_tied_embedding_unties_it(tmp_path: Path, kind: str) -> None:
    """peft adds it to the output, too, and so merges another model; ours computes what base + adapter does."""
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"], **KINDS[kind])
    ours, theirs = compare(base, adapter, tmp_path)
    assert ours.keys() - theirs.keys() == {"lm_head.weight"}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_adalora_after_ranks_were_taken_away(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    config = AdaLoraConfig(
        init_r=4, target_r=1, tinit=1, tfinal=1, total_step=6, lora_alpha=8, target_modules=["q_proj"]
    )
    model = get_peft_model(load(base), config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(6):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "adapter")
    kept = [value.shape[0] for name, value in tensors(tmp_path / "adapter").items() if name.endswith("lora_A")]
    assert sum(kept) == 2  # of 8
    ours, theirs = compare(base, tmp_path / "adapter", tmp_path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_base_whose_files_name_the_model_without_its_head(tmp_path: Path) -> None:
    """As BLOOM's on the Hub: `h.0...` for `transformer.h.0...`; each tensor keeps the name that it has there."""
    base = make_base(tmp_path / "base", "bloom")
    bare = {name.removeprefix("transformer."): value for name, value in tensors(base).items()}
    save_file(bare, base / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["query_key_value"])
    ours, theirs = compare(base, adapter, tmp_path)
    assert ours.keys() == bare.keys()
    assert all(torch.equal(value, theirs[f"transformer.{name}"]) for name, value in ours.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RENAMED)
def test_names_that_transformers_changes_on_loading(tmp_path: Path, name: str, kind: str) -> None:
    """GPT-NeoX stores its head as embed_out, Mixtral a tensor for each expert: the files keep names and tensors."""
    base = make_base(tmp_path / "base", name, shard="20KB", tie_word_embeddings=False)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=RENAMED[name][2], **KINDS[kind])
    ours, theirs = compare(base, adapter, tmp_path)
    assert ours.keys() == theirs.keys() == tensors(base).keys()
    assert all(torch.equal(ours[each], theirs[each]) for each in ours)


def test_an_adapter_on_a_tensor_that_is_stored_in_parts_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mixtral")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    whole = load_file(adapter / "adapter_model.safetensors")
    whole["base_model.model.model.layers.0.mlp.experts.down_proj"] = torch.zeros(4, 32, 48)
    save_file(whole, adapter / "adapter_model.safetensors")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"stores model\.layers\.0\.mlp\.experts\.down_proj in another form"):
        merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_both_kinds_in_one_adapter(tmp_path: Path, kind: str) -> None:
    """GPT-2's layers have a column for each output, its head a row; peft's config says of all what the last one is."""
    base = make_base(tmp_path / "base", "gpt2", tie_word_embeddings=False)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["c_attn", "c_proj", "lm_head"], **KINDS[kind])
    ours, theirs = compare(base, adapter, tmp_path)
    assert all(torch.equal(ours[each], theirs[each]) for each in theirs)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "the adapter has lora_bias True, which cannot be merged"),
        ({"init_lora_weights": "pissa", "target_modules": ["q_proj"]}, "begun by pissa.*path_initial_model"),
    ],
)
def test_what_is_not_covered_is_refused_in_words(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    with pytest.raises(ValueError, match=sentence):
        merge(base, adapter, tmp_path)


def test_another_kind_of_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="of type LOHA, only LORA and ADALORA"):
        merge_weights.check_adapter({"peft_type": "LOHA"})


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    (tmp_path / "out").mkdir()
    with pytest.raises(
        ValueError, match=r"down_proj.weight has shape \[32, 64\], but the adapter was made for \[32, 48\]"
    ):
        merge(make_base(tmp_path / "wider", intermediate_size=64), adapter, tmp_path / "out")
    with pytest.raises(ValueError, match=r"has no weight for model\.layers\.1"):
        merge(make_base(tmp_path / "shallow", num_hidden_layers=1), adapter, tmp_path / "out")


def test_a_missing_tensor_is_found(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    weights = tensors(base)
    del weights["model.norm.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"model\.norm\.weight, which out/config\.json asks for, is in no weight file"):
        merge(base, adapter, tmp_path / "out")


def test_new_rows_are_those_that_train_model_gives() -> None:
    model = load_config("llama")
    weight = model.get_input_embeddings().weight.detach().clone()
    added = {VOCABULARY: [3, 4], VOCABULARY + 1: []}
    grow(model, VOCABULARY + 2, added)
    assert torch.equal(merge_weights.grown(weight, VOCABULARY + 2, added), model.get_input_embeddings().weight)


def load_config(architecture: str) -> Any:
    torch.manual_seed(0)
    cls = model_class(architecture)
    return cls(cls.config_class(**MODELS[architecture][1], tie_word_embeddings=True))


def prepare(project: Path, dtype: torch.dtype = torch.float32, quantization: dict[str, Any] | None = None) -> Path:
    """A project with a base in models/base/llama and a trained adapter for phase chat, which is returned."""
    tiny.phase(project, "chat", masked=True)
    tiny.params_yaml(project, chat={"base": "models/base/llama"})
    base = make_base(project / "models/base/llama", dtype=dtype, vocab_size=300, bos_token_id=0)
    trained = make_adapter(base, project / "models/chat/trained", target_modules=["q_proj", "v_proj", "down_proj"])
    for path in (project / "models/tokenizers/chat").iterdir():
        (trained / path.name).write_bytes(path.read_bytes())
    (trained / "training.json").write_text(json.dumps({"quantization": quantization}))
    return trained


def record(project: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((project / "metrics/runs/merge_lora@chat.json").read_text())
    return found


def test_the_stage_publishes_a_whole_model_with_its_proof(project: Path, run_stage: Runner) -> None:
    prepare(project)
    done = run_stage(project, "merge_lora", "chat")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (project / "models/chat/merged").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert {"tokenizer_config.json", "chat_template.jinja"} <= names
    assert not {"adapter_config.json", "adapter_model.safetensors", "training.json", "README.md"} & names
    ends = json.loads((project / "models/chat/merged/generation_config.json").read_text())["eos_token_id"]
    assert Vocabulary(project / "models/tokenizers/chat").special_ids["eos_token_id"] in ends
    found = record(project)
    assert 0 < found["logit_difference_max"] < 1e-4 < found["logit_effect_mean"]
    assert found["eval_loss_merged"] == pytest.approx(found["eval_loss_adapter"], abs=1e-5)
    assert "eval_loss_merged_original" not in found


def test_a_base_of_bfloat16_passes_within_its_rounding(project: Path, run_stage: Runner) -> None:
    prepare(project, torch.bfloat16)
    done = run_stage(project, "merge_lora", "chat")
    assert done.returncode == 0, done.stderr
    assert 1e-4 < record(project)["logit_difference_max"] < 0.1
    assert all(value.dtype == torch.bfloat16 for value in tensors(project / "models/chat/merged").values())


@pytest.mark.parametrize(
    ("choice", "dtype", "rounding"),
    [
        ("original", torch.bfloat16, 0.05),
        ("dequantized", torch.float32, 1e-4),
        pytest.param("original", torch.float32, 1e-4, marks=pytest.mark.slow),
        pytest.param("dequantized", torch.bfloat16, 0.05, marks=pytest.mark.slow),
    ],
)
def test_an_adapter_on_4_bits_is_merged_into_either_base_and_both_are_measured(
    project: Path, run_stage: Runner, choice: str, dtype: torch.dtype, rounding: float
) -> None:
    """The one that it was trained on computes what base + adapter did; the other is near."""
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    prepare(project, dtype, {**quantization, "bnb_4bit_compute_dtype": "float32"})
    content = json.loads((project / "params.yaml").read_text())
    content["phases"]["chat"]["merge_lora"] = {"base": choice}
    (project / "params.yaml").write_text(json.dumps(content))
    done = run_stage(project, "merge_lora", "chat")
    assert done.returncode == 0, done.stderr
    found = record(project)
    assert found["logit_difference_max"] < rounding
    assert found["eval_loss_merged"] == found[f"eval_loss_merged_{choice}"]
    assert found["eval_loss_merged_original"] != found["eval_loss_merged_dequantized"]
    assert found["eval_loss_merged_original"] == pytest.approx(found["eval_loss_merged_dequantized"], abs=0.05)
    before, after = tensors(project / "models/base/llama"), tensors(project / "models/chat/merged")
    untargeted = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(before[untargeted], after[untargeted]) is (choice == "original")
    assert sorted(path.name for path in (project / "models/chat").iterdir()) == ["merged", "trained"]


def test_an_adapter_that_is_lost_in_the_rounding_is_not_published(project: Path, run_stage: Runner) -> None:
    """It has learned so little that bfloat16 cannot hold it: within the tolerance, and yet another model."""
    trained = prepare(project, torch.bfloat16)
    base, adapter = project / "models/base/llama/model.safetensors", trained / "adapter_model.safetensors"
    large = {name: value * 8 if value.ndim > 1 else value for name, value in load_file(base).items()}
    little = {name: value * 0.003 if "lora_B" in name else value for name, value in load_file(adapter).items()}
    save_file(large, base, {"format": "pt"})
    save_file(little, adapter, {"format": "pt"})
    done = run_stage(project, "merge_lora", "chat")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "is lost in the rounding of the merged weights to bfloat16; train longer, or convert" in done.stderr
    assert not (project / "models/chat/merged").exists()


def test_dequantized_needs_4_bits(project: Path, run_stage: Runner) -> None:
    prepare(project)
    content = json.loads((project / "params.yaml").read_text())
    content["phases"]["chat"]["merge_lora"] = {"base": "dequantized"}
    (project / "params.yaml").write_text(json.dumps(content))
    done = run_stage(project, "merge_lora", "chat")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "base is dequantized, but the adapter was not trained on 4 bits; set it to original" in done.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('(math.sqrt(rank) if config.get("use_rslora") else rank)', "1.0"),
        ("return delta.add_(weight).to(weight.dtype)", "return weight"),
    ],
    ids=["another scaling", "no adapter"],
)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_merge_that_computes_something_else_is_not_published(
    project: Path, run_stage: Runner, old: str, new: str, dtype: torch.dtype
) -> None:
    """The merge is broken on purpose: the proof finds it and the old model stays."""
    prepare(project, dtype)
    merged = project / "models/chat/merged"
    merged.mkdir()
    (merged / "keep").write_text("old")
    script = project / "stages/merge_weights.py"
    assert script.read_text().count(old) == 1
    script.write_text(script.read_text().replace(old, new))
    done = run_stage(project, "merge_lora", "chat")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "nothing was published" in done.stderr
    assert [path.name for path in merged.iterdir()] == ["keep"]


def test_a_merge_that_is_killed_leaves_the_model_before(project: Path, run_stage: Runner) -> None:
    prepare(project)
    assert run_stage(project, "merge_lora", "chat").returncode == 0
    before = {path.name: path.read_bytes() for path in (project / "models/chat/merged").iterdir()}
    process = subprocess.Popen(
        [sys.executable, "stages/merge_lora.py", "chat"], cwd=project, env=dict(os.environ), stderr=subprocess.DEVNULL
    )
    half = project / "models/chat/.tmp-merged/model.safetensors"
    while not half.exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in (project / "models/chat/merged").iterdir()} == before
    assert run_stage(project, "merge_lora", "chat").returncode == 0
    assert {path.name: path.read_bytes() for path in (project / "models/chat/merged").iterdir()} == before


def test_a_phase_without_an_adapter_passes_through(project: Path, run_stage: Runner) -> None:
    trained = prepare(project)
    for path in trained.glob("adapter_*"):
        path.unlink()
    make_base(trained)
    assert run_stage(project, "merge_lora", "chat").returncode == 0
    merged = project / "models/chat/merged"
    assert (merged / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert not (merged / "training.json").exists()
