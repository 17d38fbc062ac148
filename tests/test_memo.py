"""Memory of shards: a hit is what would be worked out, order and workers do not matter, damage is noticed."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kit.memo
from kit import stage
from kit.memo import Memo, cuts, row_hashes


def shout(text: str) -> bytes:
    if text == "bad":
        raise SystemExit("a.txt: bad; mend it.")
    return text.upper().encode()


def clock(text: str) -> bytes:
    return os.urandom(8)


def done(memo: Memo, texts: Iterable[str], workers: int = 1) -> list[bytes]:
    shards = ((hashlib.sha256(text.encode()).hexdigest(), text) for text in texts)
    return list(memo.map(shards, shout, workers, stage.die_with_parent))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order_and_are_remembered(tmp_path: Path, workers: int) -> None:
    """The second time nothing is worked out; what a run did not need is forgotten at its end."""
    texts = [f"text {number}" for number in range(30)]
    memo = Memo(tmp_path / "memo", "key")
    assert done(memo, texts, workers) == [text.upper().encode() for text in texts]
    assert (memo.hits, memo.misses) == (0, 30)
    memo = Memo(tmp_path / "memo", "key")
    assert done(memo, [*texts[:10], "new", *texts[20:]], workers)[10] == b"NEW"
    assert (memo.hits, memo.misses) == (20, 1)
    memo.sweep()
    assert len(list((tmp_path / "memo").iterdir())) == 21


def test_another_key_remembers_nothing(tmp_path: Path) -> None:
    done(Memo(tmp_path, "key"), ["a"])
    memo = Memo(tmp_path, "other key")
    assert done(memo, ["a"]) == [b"A"]
    assert (memo.hits, memo.misses) == (0, 1)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "swapped"])
def test_a_damaged_result_is_worked_out_again(tmp_path: Path, damage: str) -> None:
    """Also one that is whole, but that of another shard."""
    done(Memo(tmp_path, "key"), ["a long text", "b"])
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        if data.endswith(b"A LONG TEXT"):
            changed = {
                "flipped": data[:-1] + b"U",
                "cut": data[:-1],
                "empty": b"",
                "swapped": next(other.read_bytes() for other in tmp_path.iterdir() if other != path),
            }
            path.write_bytes(changed[damage])
    memo = Memo(tmp_path, "key")
    assert done(memo, ["a long text", "b"]) == [b"A LONG TEXT", b"B"]
    assert (memo.hits, memo.misses) == (1, 1)


def test_a_result_that_may_not_be_kept_is_worked_out_each_time(tmp_path: Path) -> None:
    for _ in range(2):
        memo = Memo(tmp_path, "key")
        shards = [("1", "a"), ("2", "b")]
        kept = list(memo.map(shards, shout, 1, stage.die_with_parent, keep=lambda result: result != b"A"))
        assert kept == [b"A", b"B"]
    assert (memo.hits, memo.misses) == (1, 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_result_that_depends_on_more_than_its_key_is_found(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One hit in a hundred is worked out again, others each time; here all of them."""
    shards = [(str(number), "") for number in range(4)]
    list(Memo(tmp_path, "key").map(shards, clock, workers, stage.die_with_parent))
    drawn = [sum(Memo(tmp_path, "key")._is_checked(str(number)) for number in range(10_000)) for _ in range(2)]
    assert all(50 < count < 200 for count in drawn)
    monkeypatch.setattr(kit.memo, "CHECKED", 1.0)
    with pytest.raises(ValueError, match=r"came out differently: .* delete \.memo and run again"):
        list(Memo(tmp_path, "key").map(shards, clock, workers, stage.die_with_parent))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_sentence_from_a_worker_arrives(tmp_path: Path, workers: int) -> None:
    """What was finished before it stays remembered, so mending one file does not cost the others."""
    with pytest.raises(SystemExit, match="mend it"):
        done(Memo(tmp_path, "key"), [*map(str, range(20)), "bad"], workers)
    memo = Memo(tmp_path, "key")
    assert len(done(memo, map(str, range(20)), workers)) == 20
    assert memo.hits > 10


def die(text: str) -> bytes:
    os.kill(os.getpid(), signal.SIGKILL)
    return b""


def test_a_killed_worker_is_a_sentence(tmp_path: Path) -> None:
    """As the kernel kills one that takes too much memory."""
    with pytest.raises(ValueError, match=r"a worker process was killed, .*TERROIR_WORKERS=1"):
        list(Memo(tmp_path, "key").map([("a", "a"), ("b", "b")], die, 2, stage.die_with_parent))


ROWS = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 5_000)), max_size=200)


@given(ROWS, st.integers(1, 10_000), st.lists(st.integers(0, 200), max_size=8))
def test_cuts_cover_all_rows_and_are_bounded(rows: list[tuple[int, int]], size: int, split: list[int]) -> None:
    """The last cut is the number of rows; no shard is empty or, if it has two rows, above twice its size.

    The same for rows in several batches.
    """
    identities, sizes = (np.array([row[at] for row in rows], dtype=np.int64) for at in (0, 1))
    ends = cuts([(identities.astype(np.uint32), sizes)], size)
    batches = np.split(np.stack([identities, sizes]), sorted(split), axis=1)
    assert cuts(((batch[0], batch[1]) for batch in batches), size) == ends
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
        ends = cuts([(identities[kept], sizes[kept])], 8_000)
        return {tuple(kept[start:end]) for start, end in zip([0, *ends], ends, strict=False)}

    whole = shards(None)
    assert 20 < len(whole) < 35
    changed = [len(whole - shards(row)) for row in rows[::7]]
    assert min(changed) >= 1
    assert np.mean(changed) < 2


def test_row_hashes_are_the_first_bytes_of_identities() -> None:
    import pyarrow as pa

    identities = pa.array([bytes([number] * 16) for number in range(5)], pa.binary(16))
    assert row_hashes(identities[2:]).tolist() == [0x02020202, 0x03030303, 0x04040404]
