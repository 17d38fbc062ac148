"""distributed: the same blocks a step for any number of processes; a worker knows that it is one."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import distributed


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "NUM_PROCESSES", "ACCELERATE_CONFIG_FILE", distributed.WORKER):
        monkeypatch.delenv(name, raising=False)


@given(rows=st.integers(1, 5), world=st.integers(1, 4), times=st.integers(1, 4), steps=st.integers(1, 3))
def test_a_step_has_the_same_blocks_for_any_number_of_processes(rows: int, world: int, times: int, steps: int) -> None:
    """The batches of the stream go to the processes in turn, as accelerate's BatchSamplerShard deals them."""
    size = rows * world * times
    batches = [list(range(first, first + rows)) for first in range(0, steps * size, rows)]
    count = distributed.accumulation(size, rows, world)
    for step in range(steps):
        fed = [
            batches[world * batch + rank] for rank in range(world) for batch in range(step * count, (step + 1) * count)
        ]
        assert sorted(block for batch in fed for block in batch) == list(range(step * size, (step + 1) * size))


def test_the_example() -> None:
    assert doctest.testmod(distributed).failed == 0


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"global_batch_size 8 is no multiple of 4 blocks .* on each of 4 processes"):
        distributed.accumulation(8, 4, 4)


def test_who_starts_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not distributed.wanted() and distributed.first() and distributed.processes() == 1
    monkeypatch.setenv("NUM_PROCESSES", "2")
    assert distributed.wanted()
    assert distributed.command("x.py", "chat")[1:] == [
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "x.py", "chat"
    ]  # fmt: skip
    monkeypatch.setenv(distributed.WORKER, str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    assert not distributed.wanted() and not distributed.first()
    monkeypatch.setenv("NUM_PROCESSES", "two")
    with pytest.raises(SystemExit, match="NUM_PROCESSES is 'two'"):
        distributed.processes()


def test_a_config_file_goes_to_accelerate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_CONFIG_FILE", str(tmp_path / "no.yaml"))
    with pytest.raises(SystemExit, match="which is no file"):
        distributed.command("x.py")
    (tmp_path / "no.yaml").write_text("")
    assert distributed.command("x.py")[2:4] == ["accelerate.commands.launch", "--config_file"]


def test_a_worker_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(distributed, "command", lambda *_: ["false"])
    with pytest.raises(SystemExit, match=r"x\.py chat: a worker failed"):
        distributed.train(tmp_path, "x.py", "chat")
