"""raw_shards: cuts follow the content, so that what comes or goes moves the cuts beside it and seldom others."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import raw_shards
from raw_shards import cuts, row_hashes


@given(st.lists(st.binary(max_size=30), max_size=200), st.booleans())
@example([b"x"] * 200, True)  # of which none ends a shard
def test_shards_of_lines_tile_the_file_and_know_their_first_line(lines: list[bytes], ended: bool) -> None:
    data = b"\n".join([line.replace(b"\n", b"") for line in lines]) + b"\n" * ended
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_shards, "SHARD_BYTES", 100)
        path = Path(name, "a.txt")
        path.write_bytes(data)
        at = 0
        for start, end, before, _ in raw_shards.line_shards(path):
            assert start == at < end < start + 2 * 100 + 31
            assert start == 0 or data[start - 1 : start] == b"\n"
            assert before == data[:start].count(b"\n")
            at = end
        assert at == len(data)


ROWS = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 5_000)), max_size=200)


@given(ROWS, st.integers(1, 10_000))
def test_cuts_cover_all_rows_and_are_bounded(rows: list[tuple[int, int]], size: int) -> None:
    """The last cut is the number of rows; no shard is empty or, if it has two rows, above twice its size."""
    identities, sizes = (np.array([row[at] for row in rows], dtype=np.int64) for at in (0, 1))
    ends = cuts(identities.astype(np.uint32), sizes, size)
    assert ends == sorted(set(ends))
    assert (ends[-1] if ends else 0) == len(rows)
    for start, end in zip([0, *ends], ends, strict=False):
        assert end == start + 1 or sizes[start:end].sum() <= 2 * size


def test_a_new_row_moves_the_cuts_beside_it_and_seldom_others() -> None:
    """Of about 25 shards, one row that comes or goes changes fewer than two on average."""
    random = np.random.default_rng(0)
    identities = random.integers(0, 2**32, 2_001, dtype=np.uint32)
    sizes = random.integers(50, 150, 2_001)
    rows = list(range(2_001))

    def shards(left_out: int | None) -> set[tuple[int, ...]]:
        kept = [row for row in rows if row != left_out]
        ends = cuts(identities[kept], sizes[kept], 8_000)
        return {tuple(kept[start:end]) for start, end in zip([0, *ends], ends, strict=False)}

    whole = shards(None)
    assert 20 < len(whole) < 35
    changed = [len(whole - shards(row)) for row in rows[::7]]
    assert min(changed) >= 1
    assert np.mean(changed) < 2


def test_row_hashes_are_the_first_bytes_of_identities() -> None:
    identities = pa.array([bytes([number] * 16) for number in range(5)], pa.binary(16))
    assert row_hashes(identities[2:]).tolist() == [0x02020202, 0x03030303, 0x04040404]
