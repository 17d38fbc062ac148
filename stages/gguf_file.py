"""A model folder as one GGUF file, which llama.cpp, Ollama and LM Studio open. Part of export_model.

    write(Path("models/chat/merged"), Path("model.gguf"), "chat", "q8_0")

The package `gguf` of llama.cpp's makers knows the format, the names of tensors and the numbers of fewer bits; their
converter, a script in no package, knows published tokenizers by a hash, so it refuses one that was trained here. Here
the way that a tokenizer cuts words is read from its file, and what llama.cpp cannot do alike is refused.

Weights of two dimensions get the format asked for, the others float32, as llama.cpp wants them:

    q_proj, k_proj of a Llama   rows of a head from x1 x2 x3 y1 y2 y3 to x1 y1 x2 y2 x3 y3: pairs to rotate lie together
    query_key_value of a BLOOM  rows from q k v of each head to all q, all k, all v
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit import arrow
from kit.base import weight_files
from kit.tokenizer import Vocabulary
from split_patterns import BYTE_LEVEL, LLAMA_3, QWEN_2

if TYPE_CHECKING:
    import torch

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "BloomForCausalLM": "bloom",
}
STRANGE = ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "unk_token")
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
# How a tokenizer cuts text, and whether a word that is an entry is taken whole -> llama.cpp's name for it. o200k is not
# among them: llama.cpp's reads a capital beyond A to Z as any letter, "aÉb" as one word.
CUTS = {
    (BYTE_LEVEL, False): "gpt-2",
    (LLAMA_3, False): "smaug-bpe",
    (LLAMA_3, True): "llama-bpe",
    (QWEN_2, False): "qwen2",
    (BLOOM, False): "bloom",
}


def package() -> Any:
    """Return the module gguf. Raises SystemExit when it is not installed."""
    try:
        import gguf  # type: ignore[import-not-found, unused-ignore]
    except ModuleNotFoundError:
        raise SystemExit("the formats gguf_... need the package gguf: pip install '.[gguf]', or take bf16.") from None
    return gguf


def cut(tokenizer: dict[str, Any]) -> str:
    """Return llama.cpp's name for the way that a tokenizer.json cuts words. Raises SystemExit when it has none."""
    model, steps = tokenizer["model"], tokenizer["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    pattern = steps[0].get("pattern", {}).get("Regex") if split.items() <= steps[0].items() else BYTE_LEVEL
    last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": pattern == BYTE_LEVEL}
    found = CUTS.get((pattern, bool(model.get("ignore_merges"))))
    alike = [
        model["type"] == "BPE" and not any(model.get(key) for key in STRANGE),
        last.items() <= steps[-1].items() and len(steps) == (1 if pattern == BYTE_LEVEL else 2),
        tokenizer["normalizer"] in (None, {"type": "NFC"}),
        not any(t["lstrip"] or t["rstrip"] or t["single_word"] for t in tokenizer["added_tokens"] if not t["special"]),
    ]
    if not found or not all(alike):
        raise SystemExit(
            "llama.cpp would make other tokens of a text than this tokenizer does: it knows byte-level BPE that cuts "
            "words as GPT-2 (pre_tokenizer: byte_level), Llama 3, Qwen 2 or BLOOM does; take one of these, or bf16."
        )
    return found


def describe(writer: Any, config: Any) -> None:
    """Note the shape of a model. Raises SystemExit when llama.cpp would compute something else."""
    usual = {"hidden_act": "silu", "use_sliding_window": False, "apply_residual_connection_post_layernorm": False}
    rope = getattr(config, "rope_parameters", None) or {}
    strange = [f"{key} {getattr(config, key)}" for key, value in usual.items() if getattr(config, key, value) != value]
    if rope.get("rope_type", "default") not in ("default", *(["llama3"] if config.model_type == "llama" else [])):
        strange.append(f"rope_type {rope['rope_type']}")
    if strange:
        raise SystemExit(f"a GGUF of this model would not say {strange[0]}; take bf16, int8 or nf4.")
    heads, hidden = config.num_attention_heads, config.hidden_size
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(hidden)
    writer.add_head_count(heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "bloom":
        writer.add_context_length(getattr(config, "seq_length", 2048))  # it has no table of positions
        writer.add_feed_forward_length(4 * hidden)
        writer.add_head_count_kv(heads)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    size = getattr(config, "head_dim", None) or hidden // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)


def tokens(writer: Any, gguf: Any, merged: Path, rows: int) -> None:
    """Note the tokenizer: as many entries as the embedding has rows, special tokens, merges and chat template."""
    vocabulary = Vocabulary(merged)
    content = json.loads(vocabulary.tokenizer.to_str())  # older files leave out what is usual
    texts = {number: text for text, number in vocabulary.tokenizer.get_vocab().items()}
    added = {token["id"]: token["special"] for token in content["added_tokens"]}
    kinds = gguf.TokenType
    types = [
        (kinds.CONTROL if added[n] else kinds.USER_DEFINED)
        if n in added
        else kinds.NORMAL
        if n in texts
        else kinds.UNUSED
        for n in range(rows)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut(content))
    writer.add_token_list([texts.get(number, f"[PAD{number}]") for number in range(rows)])
    writer.add_token_types(types)
    special = gguf.SpecialVocab(merged, load_merges=True, n_vocab=rows)
    roles = special.special_token_ids
    roles |= {role.removesuffix("_token_id"): number for role, number in vocabulary.special_ids.items()}
    around = vocabulary.tokenizer.encode("").ids  # what a plain prompt is put between
    begins = around[:1] == [roles.get("bos")] and chats_begin(merged)
    special.add_special_token = {"bos": begins, "eos": around[begins:][-1:] == [roles["eos"]]}  # they may be one token
    path = merged / "generation_config.json"
    ends = arrow.read_json(path).get("eos_token_id") if path.is_file() else None
    others = [each for each in (ends if isinstance(ends, list) else []) if each != roles["eos"]]
    if len(others) > 2:
        raise SystemExit(f"{path} names {len(others) + 1} tokens that end an answer, a GGUF can name three; take bf16.")
    roles |= dict(zip(("eot", "eom"), others, strict=False))  # answers stop at these, too
    special.add_to_gguf(writer, quiet=True)


def chats_begin(merged: Path) -> bool:
    """Return whether a conversation begins with BOS, as far as there is a template for one.

    llama.cpp puts BOS before every prompt or before none, and takes away a template's own where it does: where texts
    begin with BOS and conversations do not (chatml), a chat model would read what it never did in training.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    if not tokenizer.chat_template:
        return True
    prompt = [{"role": "user", "content": "a"}]
    try:
        rendered = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program and can fail in any way
        raise SystemExit(
            f"{merged}: its chat template refuses a question ({str(error).rstrip('.')}): nobody could chat with it; "
            "set chat_template in the phase's train_tokenizer, or export it as bf16."
        ) from None
    return str(rendered).startswith(tokenizer.bos_token)


def turned(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Return a weight or bias with its rows in the order that llama.cpp reads."""
    heads, shape = config.num_attention_heads, weight.shape
    part = name.rsplit(".", 2)[-2]
    if config.model_type == "llama" and part in ("q_proj", "k_proj"):
        heads = heads if part == "q_proj" else config.num_key_value_heads
        return weight.reshape(heads, 2, -1, *shape[1:]).swapaxes(1, 2).reshape(shape)
    if part == "query_key_value":
        return weight.reshape(heads, 3, -1, *shape[1:]).swapaxes(0, 1).reshape(shape)
    return weight


def rope_factors(config: Any) -> torch.Tensor | None:
    """Return by what llama.cpp divides the angles of a Llama 3.1: none of them where there is no scaling."""
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") == "default":
        return None
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    steps = 2 * torch.arange(len(scaled)) / (2 * len(scaled))
    return config.rope_parameters["rope_theta"] ** -steps / scaled


def write(merged: Path, path: Path, name: str, bits: str) -> None:
    """Write the model of a folder as a GGUF file, one tensor in memory at a time; `bits`: bf16, f16 or q8_0.

    Raises SystemExit for what llama.cpp cannot compute, or tokenise, alike.
    """
    gguf = package()
    from safetensors import safe_open
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(merged)
    kind = (config.architectures or ["none"])[0]
    if kind not in ARCHITECTURES:
        raise SystemExit(f"a GGUF is made of {', '.join(ARCHITECTURES)}, not of a {kind}; take bf16, int8 or nf4.")
    writer = gguf.GGUFWriter(None, ARCHITECTURES[kind])
    writer.add_type("model")
    writer.add_name(name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{bits.upper()}"])
    describe(writer, config)
    tokens(writer, gguf, merged, config.vocab_size)

    wanted, types = gguf.GGMLQuantizationType[bits.upper()], gguf.GGMLQuantizationType
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[kind].upper()], config.num_hidden_layers)
    found = []
    for file in weight_files(merged):
        with safe_open(file, "pt") as weights:
            for stored in sorted(weights.keys()):
                if stored == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                known = names.get_name(stored.removeprefix("transformer."), try_suffixes=(".weight", ".bias"))
                if known is None:
                    raise SystemExit(f"llama.cpp has no place for {stored} of {merged}; take bf16, int8 or nf4.")
                shape = weights.get_slice(stored).get_shape()
                fits = len(shape) > 1 and shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
                found.append(
                    (file, stored, known, shape, wanted if fits else types.F32 if len(shape) == 1 else types.F16)
                )
    factors = rope_factors(config)
    for _, _, known, shape, of in found:
        add(writer, gguf, known, shape, of)
    if factors is not None:
        add(writer, gguf, "rope_freqs.weight", list(factors.shape), types.F32)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for file, stored, _, _, of in found:
        with safe_open(file, "pt") as weights:
            weight = turned(stored, weights.get_tensor(stored).float(), config)
        writer.write_tensor_data(gguf.quants.quantize(weight.contiguous().numpy(), of))
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    writer.close()


def add(writer: Any, gguf: Any, name: str, shape: list[int], of: Any) -> None:
    """Note a tensor that will follow."""
    import numpy as np

    values, size = gguf.GGML_QUANT_SIZES[of]
    writer.add_tensor_info(name, shape, np.dtype(np.float32), int(np.prod(shape)) // values * size, of)
