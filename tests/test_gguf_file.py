"""gguf_file, gguf_check: each weight in llama.cpp's order, the same tokens and logits there, or a refusal in words."""

from __future__ import annotations

import json
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import gguf_check
import gguf_file
import tiny
import train_tokenizer
from chat_templates import TEMPLATES
from kit import arrow
from kit.model import Blocks
from kit.tokenizer import Vocabulary

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install '.[gguf]'")
SMALL = {
    "vocab_size": 303,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA_31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name -> architecture, its config, how llama.cpp names it
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**SMALL, "num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    "llama_grouped": (
        "LlamaForCausalLM",
        {**SMALL, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    ),
    "llama_31": ("LlamaForCausalLM", {**SMALL, "num_key_value_heads": 2, "rope_parameters": LLAMA_31}),
    "llama_wide": ("LlamaForCausalLM", {**SMALL, "num_key_value_heads": 2, "head_dim": 32}),
    "qwen2": ("Qwen2ForCausalLM", {**SMALL, "num_key_value_heads": 2, "rope_theta": 1e6}),
    "qwen3": ("Qwen3ForCausalLM", {**SMALL, "num_key_value_heads": 2, "head_dim": 32}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 303, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "bloom_12_heads": ("BloomForCausalLM", {"vocab_size": 303, "hidden_size": 96, "n_layer": 2, "n_head": 12}),
}
BITS = {"bf16": torch.bfloat16, "f16": torch.float16}
TEXT = "the quick brown fox isn't over 12345 lazy dogs; they'LL say: 法律第一百二十三条另有规定的。 naïve café?! \n\n"


def make(
    folder: Path,
    name: str = "llama",
    dtype: torch.dtype = torch.float32,
    cut: str = "byte_level",
    template: str = "chatml",
    **changes: Any,
) -> Path:
    """Write a merged model: weights, tokenizer, chat template; three rows of the embedding belong to no token."""
    kind, config = MODELS[name]
    folder.mkdir(parents=True)
    params = train_tokenizer.Params(
        mode="train", vocab_size=300, min_frequency=1, chat_template=template, pre_tokenizer=cut
    )
    train_tokenizer.train(iter([TEXT * 3]), params).save(str(folder / "tokenizer.json"))
    arrow.write_json(folder / "tokenizer_config.json", train_tokenizer.config(params))
    train_tokenizer.install(folder, template)
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**{**config, **changes}))
    for parameter in model.parameters():  # norms begin as ones and biases as zeros, which hide what is lost
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.1)
    model.generation_config.eos_token_id = [Vocabulary(folder).special_ids["eos_token_id"], 7, 9]
    model.to(dtype).save_pretrained(folder)
    return folder


def written(folder: Path, bits: str = "bf16") -> Any:
    gguf_file.write(folder, folder / "model.gguf", "small", bits)
    return gguf.GGUFReader(folder / "model.gguf")


def values(reader: Any) -> dict[str, np.ndarray]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}


def fields(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def test_the_rows_of_a_head_lie_in_pairs(tmp_path: Path) -> None:
    """Element by element: of x1..x8 y1..y8, the halves that Llama's rotation pairs, llama.cpp wants x1 y1 x2 y2 ..."""
    folder = make(tmp_path / "m", "llama_grouped")
    before, after = load_file(folder / "model.safetensors"), values(written(folder, "f16"))
    for part, name, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        for kind in ("weight", "bias"):
            old = before[f"model.layers.1.self_attn.{part}.{kind}"].half().float().numpy()
            new = after[f"blk.1.{name}.{kind}"]
            if kind == "bias":
                old = before[f"model.layers.1.self_attn.{part}.{kind}"].numpy()
            for head in range(heads):
                for pair in range(8):
                    for half in range(2):
                        assert np.array_equal(new[head * 16 + 2 * pair + half], old[head * 16 + 8 * half + pair])


def test_a_bloom_has_all_queries_first(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "bloom", torch.bfloat16)
    before, after = load_file(folder / "model.safetensors"), values(written(folder))
    for kind in ("weight", "bias"):
        old = before[f"transformer.h.1.self_attention.query_key_value.{kind}"].float().numpy()
        new = after[f"blk.1.attn_qkv.{kind}"]
        for head in range(4):
            for which in range(3):
                for row in range(16):
                    assert np.array_equal(new[which * 64 + head * 16 + row], old[head * 48 + which * 16 + row])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_every_tensor_is_there_with_its_values(tmp_path: Path, name: str, bits: str, tied: bool) -> None:
    """Nothing is turned in a Qwen; a tied output is not written twice; what has one dimension stays float32."""
    folder = make(tmp_path / "m", name, tie_word_embeddings=tied)
    before = load_file(folder / "model.safetensors")
    twice = {"lm_head.weight": before["model.embed_tokens.weight"].clone(), **before}  # as some bases store a tied one
    save_file(twice, folder / "model.safetensors", {"format": "pt"})
    after = values(written(folder, bits))
    assert len(before) == len(after)
    assert ("output.weight" in after) is not tied
    names = {
        "embed_tokens": "token_embd",
        "q_proj": "attn_q",
        "down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, value in before.items():
        for old, new in names.items():
            if found := re.fullmatch(rf"model\.(?:layers\.(\d)\..*)?{old}\.(weight|bias)", name):
                expected = value if value.ndim == 1 else value.to(BITS[bits]).float()
                there = f"{new}.{found[2]}" if found[1] is None else f"blk.{found[1]}.{new}.{found[2]}"
                assert np.array_equal(after[there], expected.numpy()), there


def test_8_bits_are_near_and_smaller(tmp_path: Path) -> None:
    """Rows that are no multiple of 32 stay in 16 bits."""
    folder = make(tmp_path / "m", intermediate_size=80)
    reader = written(folder, "q8_0")
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert (kinds["token_embd.weight"], kinds["blk.0.ffn_up.weight"], kinds["blk.0.ffn_down.weight"]) == (
        "Q8_0",
        "Q8_0",
        "F16",
    )
    assert kinds["output_norm.weight"] == "F32"
    old = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].numpy()
    assert 0 < np.abs(values(reader)["token_embd.weight"] - old).max() < 0.005


def test_what_the_file_says_of_the_model(tmp_path: Path) -> None:
    found = fields(written(make(tmp_path / "m", "llama_31", max_position_embeddings=128, rms_norm_eps=1e-5)))
    said = {name.removeprefix("llama."): value for name, value in found.items() if name.startswith("llama.")}
    assert said == {
        "block_count": 2,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "context_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "attention.key_length": 16,
        "attention.value_length": 16,
        "rope.freq_base": 500000.0,
        "rope.dimension_count": 16,
        "vocab_size": 303,
    }
    assert (found["general.architecture"], found["general.name"]) == ("llama", "small")


def test_what_the_file_says_of_the_tokenizer(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    found = {k.removeprefix("tokenizer."): v for k, v in fields(written(folder)).items() if k.startswith("tokenizer.")}
    vocabulary = Vocabulary(folder)
    ids, texts, kinds = vocabulary.special_ids, found["ggml.tokens"], found["ggml.token_type"]
    assert (found["ggml.bos_token_id"], found["ggml.eos_token_id"]) == (ids["bos_token_id"], ids["eos_token_id"])
    assert found["ggml.padding_token_id"] == ids["pad_token_id"]
    assert (found["ggml.eot_token_id"], found["ggml.eom_token_id"]) == (7, 9)  # generation stops there, too
    assert (found["ggml.add_bos_token"], found["ggml.add_eos_token"]) == (False, False)  # chatml: see below
    assert found["chat_template"] == (folder / "chat_template.jinja").read_text(encoding="utf-8")
    assert [texts[i] for i in range(300)] == [vocabulary.tokenizer.id_to_token(i) for i in range(300)]
    assert texts[300:] == ["[PAD300]", "[PAD301]", "[PAD302]"] and kinds[300:] == [5, 5, 5]
    assert [n for n, kind in enumerate(kinds) if kind == 3] == sorted(map(vocabulary.id, vocabulary.special_texts))
    merges = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    assert found["ggml.merges"] == [" ".join(pair) for pair in merges]


@pytest.mark.parametrize("template", [*TEMPLATES, None])
def test_llama_cpp_begins_a_conversation_as_training_did(tmp_path: Path, template: str | None) -> None:
    """BOS before every prompt or before none: what the template says decides, of a model without one the tokenizer."""
    folder = make(tmp_path / "m", template=template or "default")
    if template is None:
        (folder / "chat_template.jinja").unlink()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = tokenizer.apply_chat_template(said)["input_ids"] if template else tokenizer("a")["input_ids"]
    assert fields(written(folder))["tokenizer.ggml.add_bos_token"] == (ids[0] == tokenizer.bos_token_id)


def test_a_template_that_refuses_a_question_is_one_sentence(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", template="default")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no.') }}")
    with pytest.raises(SystemExit, match=r"template refuses a question \(no\): nobody could .*; set chat_template"):
        written(folder)


def test_the_same_bytes_again_and_in_small_files(tmp_path: Path) -> None:
    one = make(tmp_path / "one")
    written(one)
    first = (one / "model.gguf").read_bytes()
    model = transformers.AutoModelForCausalLM.from_pretrained(one)
    (one / "model.safetensors").unlink()
    model.save_pretrained(one, max_shard_size="20KB")
    assert len(list(one.glob("*.safetensors"))) > 2
    assert values(written(one)).keys() == values(gguf.GGUFReader(one / "model.gguf")).keys()
    second = (one / "model.gguf").read_bytes()
    written(one)
    assert (one / "model.gguf").read_bytes() == second and len(second) == len(first)


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("llama", {"hidden_act": "gelu"}, "would not say hidden_act gelu"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "say rope_type yarn"),
        ("qwen2", {"rope_parameters": LLAMA_31}, "say rope_type llama3"),
        ("qwen2", {"use_sliding_window": True}, "say use_sliding_window True"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "say apply_residual_connection_post"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], sentence: str
) -> None:
    folder = make(tmp_path / "m", name, **changes)
    with pytest.raises(SystemExit, match=sentence):
        written(folder)


def test_a_masked_model_is_refused(tmp_path: Path) -> None:
    tiny.roberta(tmp_path / "m")
    with pytest.raises(SystemExit, match="not of a RobertaForMaskedLM; take bf16, int8 or nf4"):
        written(tmp_path / "m")


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}},
        {"pre_tokenizer": {**BYTE_LEVEL, "use_regex": False}},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
            }
        },
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Lowercase"}},
        {"model": {"type": "BPE", "ignore_merges": True}},
        {"model": {"type": "BPE", "byte_fallback": True}},
        {"model": {"type": "Unigram"}},
        {"added_tokens": [{"special": False, "lstrip": True, "rstrip": False}]},
    ],
    ids=str,
)
def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(changes: dict[str, Any]) -> None:
    known = {"pre_tokenizer": BYTE_LEVEL, "normalizer": None, "model": {"type": "BPE"}, "added_tokens": []}
    assert gguf_file.cut(known) == "gpt-2"
    with pytest.raises(SystemExit, match="would make other tokens of a text"):
        gguf_file.cut({**known, **changes})


def test_o200k_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="would make other tokens of a text"):
        written(make(tmp_path / "m", cut="o200k"))


# ---------------------------------------------------------------- what llama.cpp makes of it

try:
    import llama_cpp  # noqa: F401

    installed = True
except ImportError:
    installed = False
needs_llama_cpp = pytest.mark.skipif(not installed, reason="llama-cpp-python is not installed")


def blocks(folder: Path, rows: int = 4) -> Blocks:
    return Blocks(arrow.table(tiny.blocks(folder, rows)), rows * tiny.BLOCK_SIZE - 3)


@needs_llama_cpp
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same_logits(tmp_path: Path, name: str, tied: bool) -> None:
    """Positions beyond the first few show a rotation that is wrong; 16 bits of keys and values cost the rest."""
    folder = make(tmp_path / "m", name, torch.float16, tie_word_embeddings=tied)
    written(folder, "f16")
    ids = torch.randint(3, 300, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    found = gguf_check.LlamaCpp(folder / "model.gguf", 48)(ids).logits
    assert expected.abs().max() > 1
    assert (expected - found).abs().max() < 0.01 * expected.abs().max()


PIECES = [*"aB1 ９\n\r\t.'-法。éİß,!?…([|", "'ll", "'S", "  ", "123", "<s>", "</s>", "\u3000", "🙂", "e\u0301", "\xa0"]


@needs_llama_cpp
@pytest.mark.parametrize(("pattern", "ignore_merges"), gguf_file.CUTS, ids=gguf_file.CUTS.values())
def test_llama_cpp_makes_the_same_tokens(tmp_path: Path, pattern: str, ignore_merges: bool) -> None:
    """Each way to cut that the file can name, on a vocabulary whose merges it was not trained with."""
    folder = make(tmp_path / "m")
    content = arrow.read_json(folder / "tokenizer.json")
    content["model"]["ignore_merges"] = ignore_merges
    if pattern != gguf_file.BYTE_LEVEL:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        steps = [split, {**BYTE_LEVEL, "use_regex": False}]
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    arrow.write_json(folder / "tokenizer.json", content)
    assert fields(written(folder))["tokenizer.ggml.pre"] == gguf_file.CUTS[pattern, ignore_merges]
    model, tokenizer = (
        gguf_check.LlamaCpp(folder / "model.gguf", 16),
        Tokenizer.from_file(str(folder / "tokenizer.json")),
    )
    tokenizer.encode_special_tokens = True

    @settings(max_examples=1000, database=None)
    @given(st.one_of(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.text(max_size=20)))
    def same(text: str) -> None:
        assert model.ids(text) == tokenizer.encode(text, add_special_tokens=False).ids

    same()
    for text in gguf_check.TEXTS:
        assert model.ids(text) == tokenizer.encode(text, add_special_tokens=False).ids


@needs_llama_cpp
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_becomes_the_same_tokens(tmp_path: Path, template: str) -> None:
    """Through the chat template in the file, special tokens as such and BOS once."""
    folder = make(tmp_path / "m", template=template)
    written(folder)
    said = [{"role": "user", "content": "the fox </s>?"}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    with closing(gguf_check.LlamaCpp(folder / "model.gguf", 64)) as model:
        model.llama.create_chat_completion(said, max_tokens=1, temperature=0)
        assert model.llama.input_ids[: len(expected)].tolist() == expected
        assert model.llama.n_tokens in (len(expected), len(expected) + 1)


@needs_llama_cpp
@pytest.mark.parametrize(("bits", "lost"), [("bf16", 0.01), ("f16", 0.01), ("q8_0", 0.02)])
def test_the_loss_is_the_models(tmp_path: Path, bits: str, lost: float) -> None:
    from kit.model import load_model, mean_loss

    folder = make(tmp_path / "m")
    written(folder, bits)
    vocabulary, held = Vocabulary(folder), blocks(tmp_path / "b")
    expected = mean_loss(load_model(folder, vocabulary.size, vocabulary.special_ids), held, 2)
    assert 0 < abs(gguf_check.check(folder / "model.gguf", folder, held, expected) - expected) < lost
    with pytest.raises(ValueError, match=r"llama\.cpp computes a loss of .* nothing was published"):
        gguf_check.check(folder / "model.gguf", folder, held, expected + 0.2)


@needs_llama_cpp
def test_another_tokenizer_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "m", cut="llama3")
    monkeypatch.setattr(gguf_file, "cut", lambda tokenizer: "gpt-2")
    written(folder)
    with pytest.raises(ValueError, match=r"llama\.cpp makes other tokens of .* nothing was published"):
        gguf_check.check(folder / "model.gguf", folder, blocks(tmp_path / "b"), 0.0)
