"""Memory of shards: a hit is what would be worked out, order and workers do not matter, damage is noticed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

import kit.memo
from kit import stage
from kit.memo import Made, Memo


def shout(text: str) -> Made:
    if text == "bad":
        raise SystemExit("a.txt: bad; mend it.")
    notes: dict[str, str] = {}

    def parts() -> Iterator[tuple[str, bytes]]:
        yield "loud", text.upper().encode()
        notes["text"] = text  # with the last file
        yield "size", b"%d" % len(text)

    return Made(parts(), notes)


def clock(text: str) -> Made:
    return Made([("now", os.urandom(8))], {})


def noted_clock(text: str) -> Made:
    return Made([("now", b"same")], {"now": os.urandom(8).hex()})


def pair(text: str) -> Made:
    return Made([("pair", b"same")], {"pair": (1, 2)})


def done(memo: Memo, texts: Iterable[str], workers: int = 1) -> list[bytes]:
    shards = ((hashlib.sha256(text.encode()).hexdigest(), text) for text in texts)
    found = []
    for result in memo.map(shards, shout, workers, stage.die_with_parent):
        content = {part: path.read_bytes() for part, path in result.files.items()}
        assert content["size"] == b"%d" % len(result.notes["text"])
        assert {part: hashlib.sha256(data).hexdigest() for part, data in content.items()} == result.sha256
        found.append(content["loud"])
    return found


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
    (tmp_path / "memo/.tmp-of-one-that-was-killed").touch()
    memo.sweep()
    assert len(list((tmp_path / "memo").iterdir())) == 2 * 21 + 1
    assert len(Memo(tmp_path / "memo", "key")._index) == 21


def test_another_key_remembers_nothing(tmp_path: Path) -> None:
    done(Memo(tmp_path / "memo", "key"), ["a"])
    memo = Memo(tmp_path / "memo", "other key")
    assert done(memo, ["a"]) == [b"A"]
    assert (memo.hits, memo.misses) == (0, 1)


@pytest.mark.parametrize("swept", [True, False], ids=["swept", "killed before"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "swapped", "gone", "flipped, old times"])
def test_a_damaged_result_is_worked_out_again(tmp_path: Path, damage: str, swept: bool) -> None:
    """Also one that is whole, but that of another shard, and one whose time of change was put back."""
    memo = Memo(tmp_path / "memo", "key")
    done(memo, ["a long text", "b"])
    if swept:
        memo.sweep()
    paths = sorted((tmp_path / "memo").glob("*.loud"))
    (victim,) = (path for path in paths if path.read_bytes() == b"A LONG TEXT")
    (other,) = set(paths) - {victim}
    before = victim.stat()
    if damage == "swapped":
        shutil.copyfile(other, victim)
    elif damage == "gone":
        victim.unlink()
    else:
        victim.write_bytes({"cut": b"A LONG TEX", "empty": b""}.get(damage, b"A LONG TEXU"))
    if damage == "flipped, old times":
        os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
    memo = Memo(tmp_path / "memo", "key")
    assert done(memo, ["a long text", "b"]) == [b"A LONG TEXT", b"B"]
    assert (memo.hits, memo.misses) == (1, 1)


def test_what_was_seen_whole_and_not_written_since_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what was written in the moment of the end, or before the machine was started anew."""
    read: list[Path] = []
    digest = kit.memo._digest
    monkeypatch.setattr(kit.memo, "_digest", lambda path: (read.append(path), digest(path))[1])
    monkeypatch.setattr(kit.memo, "CHECKED", 0)

    def files_read() -> int:
        read.clear()
        memo = Memo(tmp_path / "memo", "key")
        assert done(memo, ["a", "b"]) == [b"A", b"B"]
        memo.sweep()
        return len(read)

    done(memo := Memo(tmp_path / "memo", "key"), ["a", "b"])
    time.sleep(0.05)
    memo.sweep()
    assert files_read() == 0
    monkeypatch.setattr(kit.memo, "_started", lambda: "another start")
    assert files_read() == 4
    time.sleep(0.05)
    assert files_read() == 0
    monkeypatch.setattr(kit.memo, "_started", lambda: "")  # a system that tells none
    assert [files_read(), files_read()] == [4, 4]


def test_a_file_that_is_written_in_the_moment_of_the_end_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a tick of the disk's clock a second write leaves no trace."""
    state = kit.memo._state
    monkeypatch.setattr(kit.memo, "_state", lambda path: (*state(path)[:4], 0, 17))  # the clock stands still
    done(memo := Memo(tmp_path / "memo", "key"), ["a"])
    memo.sweep()
    (victim,) = (tmp_path / "memo").glob("*.loud")
    victim.write_bytes(b"B")
    memo = Memo(tmp_path / "memo", "key")
    assert done(memo, ["a"]) == [b"A"]
    assert memo.misses == 1


@pytest.mark.parametrize("damage", [b"", b"\xff", b"x {}\n", None])
def test_a_damaged_index_is_not_believed(tmp_path: Path, damage: bytes | None) -> None:
    memo = Memo(tmp_path / "memo", "key")
    done(memo, ["a", "b"])
    memo.sweep()
    index = tmp_path / "memo/index.jsonl"
    lines = index.read_bytes().splitlines(keepends=True)
    changed = lines[0].replace(b'"text": "', b'"text": "c') if damage is None else damage
    index.write_bytes(changed + lines[1])
    memo = Memo(tmp_path / "memo", "key")
    assert done(memo, ["a", "b"]) == [b"A", b"B"]
    assert (memo.hits, memo.misses) == ((1, 1) if damage in (b"", b"x {}\n", None) else (0, 2))


def test_one_hit_in_a_hundred_is_worked_out_again_others_each_time(tmp_path: Path) -> None:
    memos = [Memo(tmp_path / "memo", "key") for _ in range(2)]
    drawn = [{number for number in range(10_000) if memo._is_checked(str(number))} for memo in memos]
    assert all(50 < len(numbers) < 200 for numbers in drawn)
    assert len(drawn[0] & drawn[1]) < 20


@pytest.mark.parametrize("work", [clock, noted_clock, pair])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_result_that_depends_on_more_than_its_key_is_found(
    tmp_path: Path, workers: int, work: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In files or notes, each time; here all hits are worked out again. A tuple, a list to JSON, is no change."""
    shards = [(str(number), "") for number in range(4)]
    monkeypatch.setattr(kit.memo, "CHECKED", 1.0)
    found = None if work is pair else pytest.raises(ValueError, match="came out differently")
    for expected in (None, found, found):
        memo = Memo(tmp_path / "memo", "key")
        with expected or contextlib.nullcontext():
            list(memo.map(shards, work, workers, stage.die_with_parent))
    assert memo.hits == (4 if work is pair else 1)  # one that is worked out again is a hit all the same


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "memo").write_text("")
    with pytest.raises(SystemExit, match=r"memo cannot be made \(File exists\); remove what stands there"):
        done(Memo(tmp_path / "memo", "key"), ["a"])


def test_a_folder_that_cannot_be_tidied_costs_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memo = Memo(tmp_path / "memo", "key")
    done(memo, ["a"])
    (tmp_path / "memo/odd").mkdir()

    def read_only(path: Path, target: Path) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", read_only)
        memo.sweep()
    assert Memo(tmp_path / "memo", "key").find(hashlib.sha256(b"a").hexdigest())  # nor what was known
    memo.sweep()
    memo = Memo(tmp_path / "memo", "key")
    assert done(memo, ["a"]) == [b"A"]
    assert memo.hits == 1


@pytest.mark.parametrize("workers", [1, 3])
def test_a_sentence_from_a_worker_arrives(tmp_path: Path, workers: int) -> None:
    """What was finished before it stays remembered, so mending one file does not cost the others."""
    with pytest.raises(SystemExit, match="mend it"):
        done(Memo(tmp_path / "memo", "key"), [*map(str, range(20)), "bad"], workers)
    memo = Memo(tmp_path / "memo", "key")
    assert len(done(memo, map(str, range(20)), workers)) == 20
    assert memo.hits > 10


def test_a_worker_is_prepared_before_it_works(tmp_path: Path) -> None:
    """As `die_with_parent` does, without which the workers of a killed stage work on."""
    shards = [(str(number), "text") for number in range(4)]
    list(Memo(tmp_path / "memo", "key").map(shards, shout, 2, lambda: (tmp_path / str(os.getpid())).touch()))
    assert {path.name for path in tmp_path.iterdir()} - {"memo", str(os.getpid())}


def die(text: str) -> Made:
    os.kill(os.getpid(), signal.SIGKILL)
    return Made([], {})


def test_a_killed_worker_is_a_sentence(tmp_path: Path) -> None:
    """As the kernel kills one that takes too much memory."""
    with pytest.raises(ValueError, match=r"a worker process was killed, .*TERROIR_WORKERS=1"):
        list(Memo(tmp_path / "memo", "key").map([("a", "a"), ("b", "b")], die, 2, stage.die_with_parent))
