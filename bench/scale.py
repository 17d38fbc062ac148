"""Measure what the data stages cost when 1 % of the documents are new, and what memory they take at ten times the text.

    outputs after the change             the same bytes as a build from nothing
    peak memory at ten times the text    at most 10 % more, each stage, for documents of 4,500 bytes and of 640
    CPU seconds of the change            at most 0.35 of a build from nothing

Memory is measured for English text and for half as many megabytes of conversations, with near duplicates. Files have
1.5 MB: of larger ones a shard is larger, up to twice its usual size, and so is what is held of it. The tokenizer is one
that the phase reuses: with one trained anew, every token may change.

    python bench/scale.py [MEGABYTES]     of English text, then ten times that; 60 when not given
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from corpus import DATA_STAGES, Cost, conversations, english, make_tokenizer, project, run_stage, write_jsonl

FILE_BYTES = 3 * 2**19
MEMORY, CHANGE = 1.10, 0.35


def corpus(folder: Path, rows: Callable[[int, int], Iterator[Any]], n_bytes: int) -> None:
    for number in range(n_bytes // FILE_BYTES):
        write_jsonl(folder / f"data/raw/text/{number:04}.jsonl", rows(FILE_BYTES, number))


def outputs(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of everything that the data stages wrote."""
    files = (path for path in sorted((folder / "data").rglob("*")) if path.is_file() and "raw" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def all_stages(folder: Path) -> dict[str, Cost]:
    """Run the data stages in order; the tokenizer is copied, which costs nothing worth a line."""
    costs = {"clean": run_stage(folder, "clean"), "dedup": run_stage(folder, "dedup")}
    run_stage(folder, "train_tokenizer")
    return costs | {stage: run_stage(folder, stage) for stage in DATA_STAGES[2:]}


def memory(root: Path, tokenizer: Path, record: str, megabytes: int) -> list[str]:
    """Print the peak memory of each stage at `megabytes` and at ten times as many; return the budgets missed."""
    rows = english if record == "text" else conversations
    found = []
    for times in (1, 10):
        folder = project(root / f"{record}-{times}", tokenizer, record, near=True)
        corpus(folder, rows, times * megabytes * 2**20)
        found.append(all_stages(folder))
        shutil.rmtree(folder)
    print(f"peak memory in MiB   {record}: {megabytes} MB, {10 * megabytes} MB, ratio   (at most {MEMORY})")
    for stage in DATA_STAGES:
        little, much = (costs[stage].peak for costs in found)
        print(f"  {stage:15} {little:6} {much:6} {much / little:6.2f}", flush=True)
    return [f"memory of {s}, {record}" for s in DATA_STAGES if found[1][s].peak > MEMORY * found[0][s].peak]


def change(root: Path, tokenizer: Path, megabytes: int) -> list[str]:
    """Print what 1 % of new documents cost each stage against a build from nothing; return the budgets missed."""
    folder = project(root / "change", tokenizer)
    corpus(folder, english, megabytes * 2**20)
    all_stages(folder)
    write_jsonl(folder / "data/raw/text/new.jsonl", english(megabytes * 2**20 // 100, 1_000))
    once = all_stages(folder)
    found = outputs(folder)
    shutil.rmtree(folder / ".memo")
    for path in (folder / "data").iterdir():
        if path.name not in ("raw", "rules", "benchmarks") and path.is_dir():
            shutil.rmtree(path)
    whole = all_stages(folder)
    if outputs(folder) != found:
        raise SystemExit("the outputs after the change are not those of a build from nothing")
    print(f"CPU seconds, {megabytes} MB   change, from nothing, ratio   (in all at most {CHANGE})")
    for stage in DATA_STAGES:
        print(f"  {stage:15} {once[stage].cpu:6.2f} {whole[stage].cpu:6.2f} {once[stage].cpu / whole[stage].cpu:6.2f}")
    one, all_ = (sum(cost.cpu for cost in costs.values()) for costs in (once, whole))
    print(f"  {'in all':15} {one:6.2f} {all_:6.2f} {one / all_:6.2f}", flush=True)
    shutil.rmtree(folder)
    return ["the change"] if one / all_ > CHANGE else []


def main() -> None:
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tokenizer = make_tokenizer(root / "tokenizer", english(4 * 2**20, 99), 8192)
        missed = memory(root, tokenizer, "text", megabytes)
        missed += memory(root, tokenizer, "prompt_completion", megabytes // 2)
        missed += change(root, tokenizer, 10 * megabytes)
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
