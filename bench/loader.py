"""Measure how fast blocks become batches, against Hugging Face's list columns; exit 1 when the budget is missed.

    budget: 50 times the tokens per CPU second

Both give the same batches in the same random order: int64 `input_ids` and `labels`. Theirs is what run_clm.py trains
from, a saved `Dataset` with list columns for ids, attention mask and labels, and `default_data_collator`. Ours is
kit/model.py's `Blocks`. Equality first, then both by turns, each in a process of its own, after a first batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "stages"))
BUDGET = 50
BLOCKS, BLOCK_SIZE, BATCH = 2048, 1024, 16
TURNS = 3


def write(folder: Path) -> None:
    """Write the same blocks as a blocks folder and as a saved dataset with list columns."""
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset, disable_progress_bars
    from datasets.table import InMemoryTable

    from group_blocks import blocks_schema
    from kit import arrow

    disable_progress_bars()
    ids = np.random.default_rng(0).integers(0, 50000, BLOCKS * BLOCK_SIZE).astype(np.uint16)
    schema = blocks_schema(pa.uint16(), BLOCK_SIZE, learn=False)
    with arrow.Writer(folder / "ours", schema) as out:
        out.write(pa.Table.from_arrays([pa.FixedSizeListArray.from_arrays(pa.array(ids), BLOCK_SIZE)], schema=schema))
        out.counts = {"tokens": len(ids)}
    offsets = pa.array(np.arange(BLOCKS + 1, dtype=np.int32) * BLOCK_SIZE)
    columns = {
        "input_ids": pa.array(ids.astype(np.int32)),
        "attention_mask": pa.array(np.ones(len(ids), np.int8)),
        "labels": pa.array(ids.astype(np.int64)),
    }
    lists = {name: pa.ListArray.from_arrays(offsets, values) for name, values in columns.items()}
    Dataset(InMemoryTable(pa.table(lists))).save_to_disk(folder / "theirs")


def loader(side: str, folder: Path) -> Callable[[list[int]], dict[str, Any]]:
    """Return what gives the batch of a list of block numbers."""
    if side == "ours":
        from kit import arrow
        from kit.model import Blocks

        return Blocks(arrow.table(folder / "ours"), arrow.manifest(folder / "ours")["counts"]["tokens"]).__getitems__
    from datasets import load_from_disk
    from transformers import default_data_collator

    rows: Any = load_from_disk(folder / "theirs")
    return lambda numbers: default_data_collator(rows.__getitems__(numbers))


def child(side: str, folder: Path, epochs: int) -> None:
    """Print the CPU and wall seconds of `epochs` passes, or with 0 a digest of all batches of one."""
    load = loader(side, folder)
    numbers = random.Random(0).sample(range(BLOCKS), BLOCKS)
    batches = [numbers[first : first + BATCH] for first in range(0, BLOCKS, BATCH)]
    load(batches[0])
    if not epochs:
        digest = hashlib.sha256()
        for batch in batches:
            found = load(batch)
            for name in ("input_ids", "labels"):
                digest.update(str((found[name].dtype, found[name].shape)).encode() + found[name].numpy().tobytes())
        print(json.dumps(digest.hexdigest()))
        return
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(epochs):
        for batch in batches:
            load(batch)
    print(json.dumps([time.process_time() - cpu, time.perf_counter() - wall]))


def run(side: str, folder: Path, epochs: int) -> Any:
    """Return what a child process prints last; one thread, as a loader beside a training has."""
    command = [sys.executable, __file__, side, str(folder), str(epochs)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        if run("ours", folder, 0) != run("theirs", folder, 0):
            raise SystemExit("the batches differ; nothing was measured.")
        epochs = {"ours": 50, "theirs": 1}
        speeds: dict[str, list[tuple[float, float]]] = {side: [] for side in epochs}
        for _ in range(TURNS):
            for side, passes in epochs.items():
                seconds = run(side, folder, passes)
                speeds[side].append(tuple(passes * BLOCKS * BLOCK_SIZE / 1e6 / one for one in seconds))
    (cpu, wall), (their_cpu, their_wall) = (
        [statistics.median(column) for column in zip(*rows, strict=True)] for rows in speeds.values()
    )
    print(f"batches of {BATCH} x {BLOCK_SIZE}, equal; million tokens per CPU second (per second), median of {TURNS}:")
    print(f"  list columns {their_cpu:.2f} ({their_wall:.2f}), Blocks {cpu:.0f} ({wall:.0f})")
    print(f"  {cpu / their_cpu:.0f} times, budget {BUDGET}")
    raise SystemExit(0 if cpu / their_cpu >= BUDGET else 1)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        child(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
