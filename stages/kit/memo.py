"""Work done before: the files of each shard, so that one new file among thousands costs its own shard only.

    memo = Memo(Path(".memo/clean@laws"), key)         # key: digest of code, parameters and library versions
    for result in memo.map(shards, work, workers=2, initializer=die_with_parent):
        out.add(result.files["documents"], ...)        # in the order of the shards
    memo.sweep()                                       # forget what this run did not need

A shard is (digest of its content, what `work` needs); `work` is a pure function from that to what shall stand in files.
The worker writes them, and the stage copies them into its output as they are: a stale row cannot survive, and deleting
.memo/ is always safe. index.jsonl holds the SHA-256 of each file. One whose size, inode and times are those of when it
was seen whole, since this machine was started, is not read again (decay of the disk is left to `lineage verify`); any
other is, and where it was tampered with it is computed again. One shard in a hundred, others in each run, is computed
anyway and compared, to find a stage whose result depends on something that its key does not name.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

T = TypeVar("T")
State = tuple[str, int, int, int, int, int]  # of a file: start of the machine, device, inode, size, mtime and ctime
BOOT = Path("/proc/sys/kernel/random/boot_id")  # what lies on the disk after a crash is another matter
CHECKED = 0.01  # share of the hits that are computed again
INDEX = "index.jsonl"


class Made(NamedTuple):
    """What `work` made of a shard: names and contents of files, each of which is made when the one before is written.

    notes: what the stage wants to know without reading the files, as JSON can hold it; complete with the last file.
    """

    parts: Iterable[tuple[str, Any]]  # bytes or a buffer
    notes: dict[str, Any]


class Result(NamedTuple):
    """The files of a shard, by part."""

    files: dict[str, Path]
    sha256: dict[str, str]
    notes: dict[str, Any]


class _Done(NamedTuple):
    sha256: dict[str, str]
    notes: dict[str, Any]


class Memo:
    """Results of one stage and item, in `folder`, valid for one `key`."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.hits = self.misses = 0
        self._index = dict(_read_index(folder / INDEX))
        self._seen: dict[str, State] = {}  # of files that are whole, by name
        self._used: set[str] = set()
        self._salt = os.urandom(8)

    def map(
        self,
        shards: Iterable[tuple[str, T]],
        work: Callable[[T], Made],
        workers: int,
        initializer: Callable[[], None],
    ) -> Iterator[Result]:
        """Yield what `work` made of each shard (digest, what), in order, from memory or from `workers` processes.

        At most two shards per worker are under way at a time, one when there is but one worker. Raises ValueError when
        a result computed again differs.
        """
        import multiprocessing  # with the pool, 25 ms that the start of other stages does not wait for
        from concurrent.futures import Future, ProcessPoolExecutor

        pool: Executor | None = None
        waiting: deque[tuple[str, Result | None, Future[_Done] | None]] = deque()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"{self.folder} cannot be made ({error.strerror}); remove what stands there.") from None
        try:
            for digest, what in shards:
                name = self._name(digest)
                known = self.find(digest)
                future: Future[_Done] | None = None
                if known is None or self._is_checked(name):
                    target = self.folder / name if known is None else None
                    if workers > 1:
                        pool = pool or ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), initializer)
                        future = pool.submit(_make, work, what, target)
                    else:
                        future = Future()
                        future.set_result(_make(work, what, target))
                waiting.append((name, known, future))
                while len(waiting) >= (2 * workers if workers > 1 else 1):
                    yield self._finish(*waiting.popleft())
            while waiting:
                yield self._finish(*waiting.popleft())
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)

    def find(self, digest: str) -> Result | None:
        """Return what is remembered of a shard, if its files are whole."""
        name = self._name(digest)
        entry = self._index.get(name)
        if entry is None:
            return None
        result = Result({part: self._path(name, part) for part in entry["files"]}, {}, entry["notes"])
        for part, path in result.files.items():
            result.sha256[part], seen = entry["files"][part]
            try:
                now = _state(path)
                if list(now) != seen and _digest(path) != result.sha256[part]:
                    return None
            except OSError:
                return None
            self._seen[path.name] = now
        return result

    def notes(self) -> Iterator[dict[str, Any]]:
        """Yield the notes of all that is remembered, also for other keys."""
        return (entry["notes"] for entry in self._index.values())

    def sweep(self) -> None:
        """Remove what this run did not use, and note the states of files that are whole, as far as it can be done."""
        with contextlib.suppress(OSError):
            self._sweep()

    def _sweep(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("*"):
            if path.is_file() and path.name.split(".")[0] not in self._used and path.name != INDEX:
                path.unlink()
        temporary = self.folder / f".tmp-{INDEX}"
        with temporary.open("wb") as file:
            now = _state(temporary)[-1]  # a later write of a file that was last changed before has another ctime
            for name in sorted(self._used):
                files = self._index[name]["files"]
                for part, (sha, _) in files.items():
                    state = self._seen[self._path(name, part).name]
                    files[part] = [sha, state if state[0] and state[-1] < now else None]
                file.write(_line(name, self._index[name]))
        temporary.replace(self.folder / INDEX)

    def _name(self, digest: str) -> str:
        return hashlib.sha256(f"{self.key} {digest}".encode()).hexdigest()

    def _path(self, name: str, part: str) -> Path:
        return self.folder / f"{name}.{part}"

    def _finish(self, name: str, known: Result | None, future: Future[_Done] | None) -> Result:
        from concurrent.futures import BrokenExecutor

        self._used.add(name)
        self.hits += known is not None
        if future is None:
            assert known is not None
            return known
        try:
            done = future.result()
        except BrokenExecutor:
            raise ValueError(
                "a worker process was killed, most likely because memory ran out; free some, or take fewer workers "
                "(TERROIR_WORKERS=1), and run again."
            ) from None
        if known:
            if (done.sha256, done.notes) != (known.sha256, known.notes):
                raise ValueError(
                    f"{self.folder / name} was computed again and came out differently: the stage reads something that "
                    "its key does not name (this is a bug); delete .memo and run again."
                )
            return known
        self.misses += 1
        result = Result({part: self._path(name, part) for part in done.sha256}, done.sha256, done.notes)
        self._index[name] = {"files": {part: [sha, None] for part, sha in done.sha256.items()}, "notes": done.notes}
        for path in result.files.values():
            self._seen[path.name] = _state(path)
        with (self.folder / INDEX).open("ab") as file:  # what a killed stage has finished stays remembered
            file.write(_line(name, self._index[name]))
        return result

    def _is_checked(self, name: str) -> bool:
        draw = hashlib.sha256(self._salt + name.encode()).digest()[:4]
        return int.from_bytes(draw, "little") / 2**32 < CHECKED


def _make(work: Callable[[T], Made], what: T, target: Path | None) -> _Done:
    """Do the work on a shard and write its parts, `target`.PART, unless it is None.

    One after the other: they count once their line stands in the index, which is written behind them.
    """
    made = work(what)
    digests = {}
    for part, content in made.parts:
        if target:
            temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
            with temporary.open("wb") as file:
                file.write(content)
            temporary.replace(target.with_name(f"{target.name}.{part}"))
        digests[part] = hashlib.sha256(content).hexdigest()
    return _Done(digests, json.loads(json.dumps(made.notes)))


def _state(path: Path) -> State:
    stat = path.stat()
    return _started(), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@functools.cache
def _started() -> str:
    """Return a name of the last start of this machine; "" where there is none, and no state is noted."""
    return BOOT.read_text().strip() if BOOT.is_file() else ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _line(name: str, entry: dict[str, Any]) -> bytes:
    content = json.dumps([name, entry], sort_keys=True)
    return f"{hashlib.sha256(content.encode()).hexdigest()} {content}\n".encode()


def _read_index(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the names and entries of an index; a line that was damaged is nothing that is known."""
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        digest, _, content = line.partition(b" ")
        if hashlib.sha256(content).hexdigest().encode() == digest:
            yield json.loads(content)
