"""group_blocks: every token in exactly one block, in order, and padding that nothing learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import group_blocks
import tiny
from conftest import Runner
from group_blocks import Grouper, Params, blocks_schema, concatenate, pack
from kit import arrow
from kit.model import IGNORED, Blocks
from tokenize_text import lists, tokens_schema

PAD = 2
DOCUMENTS = st.lists(st.lists(st.integers(3, 60_000), min_size=1, max_size=40), min_size=1, max_size=20)


def write_tokens(folder: Path, documents: list[list[int]], batch_rows: int = 256, split: str = "train") -> Path:
    """A tokens folder; a token is learned when it is even; every fifth document belongs to the other split."""
    schema = tokens_schema(pa.uint16(), learn=True)
    ids = [np.array(document) for document in documents]
    splits = [split if row % 5 != 4 else "eval" for row in range(len(documents))]
    columns = [
        pa.array([bytes(16)] * len(ids), pa.binary(16)),
        pa.array(splits),
        lists(ids, pa.uint16()),
        lists([document % 2 == 0 for document in ids], pa.bool_()),
    ]
    with arrow.Writer(folder, schema, batch_rows=batch_rows) as out:
        out.write(pa.Table.from_arrays(columns, schema=schema))
        out.counts = {s: sum(len(d) for d, of in zip(ids, splits, strict=True) if of == s) for s in ("train", "eval")}
    return folder


def train_part(documents: list[list[int]]) -> list[list[int]]:
    return [document for row, document in enumerate(documents) if row % 5 != 4]


def group(folder: Path, tokens: list[Path], mode: str, block_size: int, last_block: str = "pad") -> dict[str, int]:
    """Write the train blocks of `tokens` into `folder`; return the manifest's counts."""
    out = arrow.Writer(folder, blocks_schema(pa.uint16(), block_size, True, mode != "concat"))
    grouper = Grouper(out, block_size, PAD)
    dropped = 0
    if mode == "concat":
        documents, read = concatenate(tokens, "train", grouper)
        dropped = grouper.finish(last_block)
    else:
        documents, read = pack(tokens, "train", mode, grouper, rows_at_once=3)
    out.close(tokens=read - dropped, dropped_tokens=dropped, documents=documents)
    return out.counts


@given(DOCUMENTS, st.integers(8, 64), st.integers(1, 7))
def test_a_stream_is_cut_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], block_size: int, batch_rows: int
) -> None:
    """For any documents, block size and batches of the input: the blocks, cut at the count, are the documents."""
    folder = tmp_path_factory.mktemp("concat")
    tokens = write_tokens(folder / "tokens", documents, batch_rows)
    counts = group(folder / "blocks", [tokens], "concat", block_size)
    table = arrow.table(folder / "blocks")
    ids = [token for row in table["input_ids"].to_pylist() for token in row]
    learn = [mark for row in table["learn"].to_pylist() for mark in row]
    expected = [token for document in train_part(documents) for token in document]
    assert ids[: counts["tokens"]] == expected
    assert learn[: counts["tokens"]] == [token % 2 == 0 for token in expected]
    assert set(ids[counts["tokens"] :]) <= {PAD} and not any(learn[counts["tokens"] :])
    assert len(ids) - counts["tokens"] < block_size


@pytest.mark.parametrize("mode", ["best_fit", "line"])
@given(documents=DOCUMENTS, block_size=st.integers(8, 64), batch_rows=st.integers(1, 7))
def test_pieces_stay_whole_and_none_is_lost(
    tmp_path_factory: pytest.TempPathFactory, mode: str, documents: list[list[int]], block_size: int, batch_rows: int
) -> None:
    folder = tmp_path_factory.mktemp(mode)
    tokens = write_tokens(folder / "tokens", documents, batch_rows)
    group(folder / "blocks", [tokens], mode, block_size)
    found = []
    for row in arrow.table(folder / "blocks").to_pylist():
        assert row["starts"][0] == 0 and row["starts"][-1] <= block_size
        assert set(row["input_ids"][row["starts"][-1] :]) <= {PAD} and not any(row["learn"][row["starts"][-1] :])
        for first, last in zip(row["starts"], row["starts"][1:], strict=False):
            piece = row["input_ids"][first:last]
            assert row["learn"][first:last] == [token % 2 == 0 for token in piece]
            found.append(piece)
        assert mode == "best_fit" or len(row["starts"]) == 2
    cut = [d[i : i + block_size] for d in train_part(documents) for i in range(0, len(d), block_size)]
    assert sorted(found) == sorted(cut)
    assert mode == "best_fit" or found == cut


@pytest.mark.parametrize("mode", ["concat", "best_fit", "line"])
def test_batches_of_the_input_leave_no_trace(tmp_path: Path, mode: str) -> None:
    documents = [list(range(3, 3 + n)) for n in (5, 40, 1, 17, 8, 30, 2, 2, 64, 9)]
    results = []
    for batch_rows in (1, 3, 256):
        folder = tmp_path / str(batch_rows)
        group(folder / "blocks", [write_tokens(folder / "tokens", documents, batch_rows)], mode, 16)
        results.append({path.name: path.read_bytes() for path in (folder / "blocks").iterdir()})
    assert results[0] == results[1] == results[2]


def test_the_loader_gives_padding_no_loss(tmp_path: Path) -> None:
    """Also padding in the middle of the folder, whose place only `starts` tells."""
    documents = [[4, 6, 8], [10, 12], [14] * 9, [16, 3]]
    counts = group(tmp_path / "blocks", [write_tokens(tmp_path / "tokens", documents)], "line", 8)
    batch = Blocks(arrow.table(tmp_path / "blocks"), counts["tokens"]).__getitems__([1, 0, 3, 4])
    x = IGNORED
    assert batch["labels"].tolist() == [
        [10, 12, x, x, x, x, x, x],
        [4, 6, 8, x, x, x, x, x],
        [14, x, x, x, x, x, x, x],
        [16, x, x, x, x, x, x, x],  # 3 is odd: not learned
    ]


def test_the_last_block_can_be_dropped_and_is_counted(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", [[4] * 10, [5] * 9])
    counts = group(tmp_path / "blocks", [tokens], "concat", 8, last_block="drop")
    assert counts == {"rows": 2, "tokens": 16, "dropped_tokens": 3, "documents": 2}


def test_dropping_is_for_the_stream_alone() -> None:
    with pytest.raises(ValidationError, match="last_block: drop is for mode concat"):
        Params(block_size=8, mode="line", last_block="drop")


def prepare(project: Path, documents: list[list[int]], **changes: Any) -> None:
    tiny.tokenizer(project / "models/tokenizers/pretrain")
    tiny.base(project / "models/configs/tiny")
    write_tokens(project / "data/tokens/pretrain/pretrain_text", documents)
    groups = {"group_blocks": {"block_size": 16, **changes}}
    tiny.params_yaml(project, pretrain={"base": "models/configs/tiny", **groups})


def test_the_stage(project: Path, run_stage: Runner) -> None:
    prepare(project, [[5] * 20] * 10, mode="best_fit")
    done = run_stage(project, "group_blocks", "pretrain")
    assert done.returncode == 0, done.stderr
    assert arrow.manifest(project / "data/blocks/pretrain/train")["counts"]["tokens"] == 160
    assert arrow.manifest(project / "data/blocks/pretrain/eval")["counts"]["tokens"] == 40


def test_a_block_larger_than_the_corpus_is_refused_and_the_old_blocks_stay(project: Path, run_stage: Runner) -> None:
    prepare(project, [[5] * 20] * 10, block_size=4096)
    old = project / "data/blocks/pretrain/keep"
    old.mkdir(parents=True)
    done = run_stage(project, "group_blocks", "pretrain")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "the train split has 160 tokens, too few for a block of 4,096; lower phases.pretrain.group_blocks"
        in done.stderr
    )
    assert old.exists()


def test_a_lost_token_stops_the_stage(project: Path, run_stage: Runner) -> None:
    """The manifest counts one more than the folder holds: nothing is published."""
    prepare(project, [[5] * 20] * 10)
    path = project / "data/tokens/pretrain/pretrain_text/manifest.json"
    path.write_text(path.read_text().replace('"train": 160', '"train": 161'))
    done = run_stage(project, "group_blocks", "pretrain")
    assert done.returncode == 1
    assert "161 train tokens were read but 160 kept + 0 dropped came out; nothing was published" in done.stderr
    assert not (project / "data/blocks/pretrain").exists()


def test_the_example_of_the_docstring(tmp_path: Path) -> None:
    assert "0 5 6 1 | 0 7 1 2" in (group_blocks.__doc__ or "")
    tokens = write_tokens(tmp_path / "tokens", [[10, 5, 6, 11], [10, 7, 11]])
    group(tmp_path / "blocks", [tokens], "concat", 4)
    assert arrow.table(tmp_path / "blocks")["input_ids"].to_pylist() == [[10, 5, 6, 11], [10, 7, 11, PAD]]
