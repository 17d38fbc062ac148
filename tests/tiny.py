"""The smallest whole thing that the model stages can work on: tokenizer, config, blocks, params.yaml."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import train_tokenizer
from chat_templates import install
from group_blocks import blocks_schema
from kit import arrow

BLOCK_SIZE = 16
TRAIN = {
    "max_steps": 6,
    "global_batch_size": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "eval_steps": 3,
    "save_steps": 2,
}
LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"]}
QUANTIZATION = {"bnb_4bit_compute_dtype": "float32"}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "vocab_size": 300,
}


def tokenizer(folder: Path, chat_template: str = "human_assistant") -> Path:
    """Write a byte-level BPE of 300 entries, with a chat template."""
    params = train_tokenizer.Params(mode="train", vocab_size=300, min_frequency=1, chat_template=chat_template)
    folder.mkdir(parents=True)
    texts = ["the quick brown fox jumps over the lazy dog " * 3, "Human: Assistant: 法律 第一条"]
    train_tokenizer.train(iter(texts), params).save(str(folder / "tokenizer.json"))
    arrow.write_json(folder / "tokenizer_config.json", train_tokenizer.config(params))
    install(folder, chat_template)
    return folder


def masked_tokenizer(folder: Path) -> Path:
    """Write a byte-level BPE of 320 entries, or all that its text gives, with the special tokens of RoBERTa."""
    specials = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    params = train_tokenizer.Params(mode="train", vocab_size=320, min_frequency=1, mask_token="<mask>", **specials)
    folder.mkdir(parents=True)
    text = "the quick brown fox jumps over the lazy dog, 第一条 river lamp under tree house window garden "
    train_tokenizer.train(iter([text * 3]), params).save(str(folder / "tokenizer.json"))
    arrow.write_json(folder / "tokenizer_config.json", train_tokenizer.config(params))
    return folder


def blocks(folder: Path, rows: int, masked: bool = False, padding: int = 3) -> Path:
    """Write random blocks, the last one with `padding`; `masked`: about half of the tokens are not learned."""
    random = np.random.default_rng(rows)
    ids = random.integers(3, 300, (rows, BLOCK_SIZE)).astype(np.uint16)
    columns = [pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), BLOCK_SIZE)]
    if masked:
        marks = random.random(rows * BLOCK_SIZE) < 0.5
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(marks), BLOCK_SIZE))
    schema = blocks_schema(pa.uint16(), BLOCK_SIZE, masked)
    with arrow.Writer(folder, schema, batch_rows=5) as out:
        out.write(pa.Table.from_arrays(columns, schema=schema))
        out.counts = {"tokens": rows * BLOCK_SIZE - padding}
    return folder


def base(folder: Path, **changes: Any) -> Path:
    """Write a config.json for random weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


ROBERTA = {
    "architectures": ["RobertaForMaskedLM"],
    "model_type": "roberta",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": BLOCK_SIZE + 3,
    "type_vocab_size": 1,
}


def roberta(folder: Path, **changes: Any) -> Path:
    """Write a config.json for a masked model with random weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**ROBERTA, **changes}))
    return folder


def params_yaml(project: Path, **phases: dict[str, Any]) -> None:
    """Write a params.yaml with one source for each of `phases`: name -> `base` and groups, the rest is filled in."""
    groups = {
        "dedup": {},
        "train_tokenizer": {"mode": "train", "vocab_size": 300},
        "group_blocks": {"block_size": BLOCK_SIZE},
        "train_model": TRAIN,
        "merge_lora": {},
        "evaluate_model": {"max_length": BLOCK_SIZE},
    }
    content = {
        "imports": {},
        "bases": {},
        "exports": {},
        "sources": {
            f"{name}_text": {"phase": name, "path": "data/raw/x", "clean": {"format": "text", "license": "unknown"}}
            for name in phases
        },
        "phases": {name: {**groups, **given} for name, given in phases.items()},
    }
    (project / "params.yaml").write_text(json.dumps(content))  # JSON is YAML


def phase(project: Path, name: str, masked: bool = False) -> None:
    """Write the tokenizer and the blocks of a phase into a project, and the config models/configs/tiny."""
    if not (project / "models/configs/tiny").exists():
        base(project / "models/configs/tiny")
    tokenizer(project / "models/tokenizers" / name)
    blocks(project / "data/blocks" / name / "train", 20, masked)
    blocks(project / "data/blocks" / name / "eval", 5, masked)
