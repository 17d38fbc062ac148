"""Measure what the data stages cost when 1 % of the documents are new, and what memory they take at ten times the text.

    outputs after the change             the same bytes as a build from nothing
    peak memory at ten times the text    at most 10 % more, each stage; dedup 20 %, for it keeps 50 bytes a document
    CPU seconds of the change            at most 0.6 of a build from nothing

The tokenizer is one that the phase reuses: with one trained anew, every token may change.

    python bench/scale.py [MEGABYTES]     of English text in 40 files, then ten times that; 60 when not given
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

from corpus import DATA_STAGES, ROOT, Cost, english, project, run_stage, write_jsonl

sys.path.insert(0, str(ROOT / "stages"))

import train_tokenizer

FILES = 40
MEMORY = dict.fromkeys(DATA_STAGES, 1.10) | {"dedup": 1.20}
CHANGE = 0.60


def make_tokenizer(folder: Path) -> Path:
    """Train a tokenizer of 8,192 entries and write it as a base carries it."""
    folder.mkdir()
    params = train_tokenizer.Params(mode="train", vocab_size=8192)
    train_tokenizer.train(english(4 * 2**20, 99), params).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(train_tokenizer.config(params)))
    return folder


def corpus(folder: Path, n_bytes: int) -> None:
    for number in range(FILES):
        write_jsonl(folder / f"data/raw/text/{number:03}.jsonl", english(n_bytes // FILES, number))


def outputs(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of everything that the data stages wrote."""
    files = (path for path in sorted((folder / "data").rglob("*")) if path.is_file() and "raw" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def all_stages(folder: Path) -> dict[str, Cost]:
    """Run the data stages in order; the tokenizer is copied, which costs nothing worth a line."""
    costs = {"clean": run_stage(folder, "clean"), "dedup": run_stage(folder, "dedup")}
    run_stage(folder, "train_tokenizer")
    return costs | {stage: run_stage(folder, stage) for stage in DATA_STAGES[2:]}


def main() -> None:
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    missed = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tokenizer = make_tokenizer(root / "tokenizer")
        small, large = project(root / "small", tokenizer), project(root / "large", tokenizer)
        corpus(small, megabytes * 2**20)
        corpus(large, 10 * megabytes * 2**20)
        little, much = all_stages(small), all_stages(large)
        print(f"peak memory in MiB   {megabytes} MB of text, {10 * megabytes} MB, ratio")
        for stage in DATA_STAGES:
            ratio = much[stage].peak / little[stage].peak
            missed += [f"memory of {stage}"] if ratio > MEMORY[stage] else []
            print(
                f"  {stage:15} {little[stage].peak:6} {much[stage].peak:6} {ratio:6.2f}   at most {MEMORY[stage]:.2f}"
            )
        write_jsonl(large / "data/raw/text/new.jsonl", english(megabytes * 2**20 // 10, 1_000))
        change = all_stages(large)
        found = outputs(large)
        shutil.rmtree(large / ".memo")
        for path in (large / "data").iterdir():
            if path.name not in ("raw", "rules", "benchmarks") and path.is_dir():
                shutil.rmtree(path)
        whole = all_stages(large)
        if outputs(large) != found:
            raise SystemExit("the outputs after the change are not those of a build from nothing")
        print(f"CPU seconds          change, from nothing, ratio (in all at most {CHANGE})")
        for stage in DATA_STAGES:
            one, all_ = change[stage].cpu, whole[stage].cpu
            print(f"  {stage:15} {one:6.2f} {all_:6.2f} {one / all_:6.2f}")
        one, all_ = (sum(cost.cpu for cost in costs.values()) for costs in (change, whole))
        print(f"  {'in all':15} {one:6.2f} {all_:6.2f} {one / all_:6.2f}")
        missed += ["the change"] if one / all_ > CHANGE else []
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
