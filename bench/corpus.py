"""Text for the benchmarks, the same for the same seed, and a project that holds it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "stages"))
DATA_STAGES = ("clean", "dedup", "add_bos_eos", "tokenize_text", "group_blocks")
PHASE = {
    "base": "models/base",
    "dedup": {},
    "train_tokenizer": {"mode": "reuse"},
    "group_blocks": {"block_size": 1024},
    "train_model": {"max_steps": 1, "global_batch_size": 1, "per_device_train_batch_size": 1, "learning_rate": 1e-3},
    "merge_lora": {},
    "evaluate_model": {"max_length": 1024},
}


def _ranks(words: int) -> np.ndarray:
    """Return the cumulated share of words by rank: Zipf's law as Mandelbrot flattened it, 1 / (rank + 2.7)."""
    return np.cumsum(1 / (np.arange(words) + 2.7)) / np.sum(1 / (np.arange(words) + 2.7))


def english(n_bytes: int, seed: int, fewest: int = 100, most: int = 1_500) -> Iterator[str]:
    """Yield documents of so many words, about `n_bytes` in all; word frequencies fall like English ones."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    shares = 0.8 ** np.arange(26)
    lengths = rng.integers(1, 12, 30_000)
    drawn = rng.choice(letters, lengths.sum(), p=shares / shares.sum())
    words = ["".join(part) for part in np.split(drawn, np.cumsum(lengths)[:-1])]
    ranks = _ranks(len(words))
    while n_bytes > 0:
        drawn = np.searchsorted(ranks, rng.random(int(rng.integers(fewest, most))))
        chosen = [words[rank] for rank in drawn.tolist()]
        lines = [" ".join(chosen[at : at + 17]).capitalize() + "." for at in range(0, len(chosen), 17)]
        text = "\n".join(lines) + "\n"
        n_bytes -= len(text)
        yield text


def chinese(n_bytes: int, seed: int) -> Iterator[str]:
    """Yield documents of 200 to 4,000 characters, about `n_bytes` in all, mostly of words of two that recur."""
    rng = np.random.default_rng(seed)
    characters = np.minimum(rng.exponential(350, (40_000, 2)), 6_000).astype(int)
    words = [chr(0x4E00 + first) + chr(0x4E00 + second) for first, second in characters.tolist()]
    ranks = _ranks(len(words))
    while n_bytes > 0:
        drawn = np.searchsorted(ranks, rng.random(int(rng.integers(100, 2_000))))
        chosen = [words[rank] for rank in drawn.tolist()]
        parts = ["".join(chosen[at : at + 6]) for at in range(0, len(chosen), 6)]
        text = "，".join(parts) + "。\n"
        n_bytes -= 3 * len(text)
        yield text


def conversations(n_bytes: int, seed: int) -> Iterator[dict[str, str]]:
    """Yield questions of a line with answers of a few, 640 bytes each, about `n_bytes` in all."""
    for text in english(n_bytes, seed, 40, 170):
        question, answer = text.split("\n", 1)
        yield {"prompt": question, "completion": answer}


class Cost(NamedTuple):
    """What a process and its children took."""

    cpu: float  # seconds, user and system
    wall: float  # seconds
    peak: int  # MiB, as the stage's own run record says


def project(folder: Path, tokenizer: Path, record: str = "text", near: bool = False) -> Path:
    """Make a project with one source `text` (jsonl, data/raw/text) and a base whose tokenizer is reused.

    record: what a row is, as in params.yaml. near: whether dedup looks for near duplicates, too.
    """
    shutil.copytree(ROOT / "stages", folder / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("data/rules", "data/benchmarks"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, folder / name)
    (folder / "data/raw/text").mkdir(parents=True)
    shutil.copyfile(ROOT / "data/exclusions.txt", folder / "data/exclusions.txt")
    shutil.copyfile(ROOT / "dvc.yaml", folder / "dvc.yaml")
    config = json.loads((ROOT / "models/configs/llama_small/config.json").read_text(encoding="utf-8"))
    (folder / "models/base").mkdir(parents=True)
    (folder / "models/base/config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    for path in tokenizer.iterdir():
        shutil.copyfile(path, folder / "models/base" / path.name)
    how = {"format": "jsonl", "record": record, "license": "unknown"}
    source = {"phase": "p", "path": "data/raw/text", "clean": how}
    phase = PHASE | {"dedup": {"near_duplicates": {}} if near else {}}
    if record != "text":
        phase |= {"train_tokenizer": {"mode": "reuse", "chat_template": "default"}}
    content = {"imports": {}, "bases": {}, "exports": {}, "sources": {"text": source}, "phases": {"p": phase}}
    (folder / "params.yaml").write_text(json.dumps(content))
    return folder


def make_tokenizer(folder: Path, documents: Iterator[str], vocab_size: int) -> Path:
    """Train a tokenizer and write it as a base carries it."""
    import train_tokenizer

    folder.mkdir()
    params = train_tokenizer.Params(mode="train", vocab_size=vocab_size)
    train_tokenizer.train(documents, params).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(train_tokenizer.config(params)))
    return folder


def write_jsonl(path: Path, rows: Iterator[str] | Iterator[dict[str, str]]) -> None:
    """Write one row a line, a document as {"text": ...}."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"text": row} if isinstance(row, str) else row, ensure_ascii=False) + "\n")


def run_stage(folder: Path, stage: str, **environment: str) -> Cost:
    """Run a stage of the project in a process of its own; raise SystemExit when it fails."""
    item = "text" if stage in ("clean", "add_bos_eos", "tokenize_text") else "p"
    started = time.perf_counter()
    arguments = [sys.executable, f"stages/{stage}.py", item]
    null = os.open(os.devnull, os.O_WRONLY)
    here = Path.cwd()
    os.chdir(folder)
    try:
        pid = os.posix_spawn(
            sys.executable, arguments, {**os.environ, **environment}, file_actions=[(os.POSIX_SPAWN_DUP2, null, 1)]
        )
    finally:
        os.chdir(here)
        os.close(null)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{stage} failed in {folder}")
    record = json.loads((folder / f"metrics/runs/{stage}@{item}.json").read_text())
    return Cost(usage.ru_utime + usage.ru_stime, time.perf_counter() - started, record["peak_memory_mib"])
