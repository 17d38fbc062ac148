"""Work done before: results by shard, so that one new file among thousands costs its own shard only.

    memo = Memo(Path(".memo/clean@laws"), key)         # key: digest of code, parameters and library versions
    for result in memo.map(shards, work, workers=2, initializer=die_with_parent):
        ...                                            # bytes, in the order of the shards
    memo.sweep()                                       # forget what this run did not need

A shard is (digest of its content, what `work` needs); `work` is a pure function from that to bytes. The output of a
stage is always put together anew from all results, so a stale row cannot survive, and deleting .memo/ is always safe.
A result stands behind a SHA-256 over its name and itself: one that was tampered with is computed again. One hit in a
hundred, others in each run, is computed anyway and compared, to find a stage whose result depends on something that its
key does not name.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

T = TypeVar("T")
CHECKED = 0.01  # share of the hits that are computed again
SHARD_BYTES = 4 * 2**20


class Memo:
    """Results of one stage and item, in `folder`, valid for one `key`."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.hits = self.misses = 0
        self._used: set[str] = set()
        self._salt = os.urandom(8)

    def map(
        self,
        shards: Iterable[tuple[str, T]],
        work: Callable[[T], bytes],
        workers: int,
        initializer: Callable[[], None],
        keep: Callable[[bytes], bool] = lambda result: True,
    ) -> Iterator[bytes]:
        """Yield `work(what)` for each shard (digest, what), in order, from memory or from `workers` processes.

        A result that `keep` refuses is not remembered. At most two shards per worker are held at a time, one when there
        is but one worker. Raises ValueError when a result computed again differs.
        """
        import multiprocessing  # with the pool, 25 ms that the start of other stages does not wait for
        from concurrent.futures import Future, ProcessPoolExecutor

        pool: Executor | None = None
        waiting: deque[tuple[str, bytes | None, Future[bytes] | None]] = deque()
        try:
            for digest, what in shards:
                name = hashlib.sha256(f"{self.key} {digest}".encode()).hexdigest()
                known = self._read(name)
                future: Future[bytes] | None = None
                if known is None or self._is_checked(name):
                    if workers > 1:
                        pool = pool or ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), initializer)
                        future = pool.submit(work, what)
                    else:
                        future = Future()
                        future.set_result(work(what))
                waiting.append((name, known, future))
                while len(waiting) >= (2 * workers if workers > 1 else 1):
                    yield self._finish(*waiting.popleft(), keep)
            while waiting:
                yield self._finish(*waiting.popleft(), keep)
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)

    def sweep(self) -> None:
        """Remove the results that this run did not use."""
        for path in self.folder.glob("*"):
            if path.name not in self._used:
                path.unlink()

    def _finish(
        self, name: str, known: bytes | None, future: Future[bytes] | None, keep: Callable[[bytes], bool]
    ) -> bytes:
        from concurrent.futures import BrokenExecutor

        self._used.add(name)
        if future is None:
            assert known is not None
            self.hits += 1
            return known
        try:
            result = future.result()
        except BrokenExecutor:
            raise ValueError(
                "a worker process was killed, most likely because memory ran out; free some, or take fewer workers "
                "(TERROIR_WORKERS=1), and run again."
            ) from None
        if known is None:
            self.misses += 1
            if keep(result):
                self._write(name, result)
        elif known != result:
            raise ValueError(
                f"{self.folder / name} was computed again and came out differently: the stage reads something that its "
                "key does not name (this is a bug); delete .memo and run again."
            )
        else:
            self.hits += 1
        return result

    def _is_checked(self, name: str) -> bool:
        draw = hashlib.sha256(self._salt + name.encode()).digest()[:4]
        return int.from_bytes(draw, "little") / 2**32 < CHECKED

    def _read(self, name: str) -> bytes | None:
        try:
            with (self.folder / name).open("rb", buffering=0) as file:
                digest, result = file.read(32), file.read()
        except FileNotFoundError:
            return None
        return result if _checksum(name, result) == digest else None

    def _write(self, name: str, result: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".tmp-{name}"
        with temporary.open("wb") as file:
            file.write(_checksum(name, result))
            file.write(result)
        temporary.replace(self.folder / name)


def _checksum(name: str, result: bytes) -> bytes:
    """Return the SHA-256 of name and result: neither a damaged result nor that of another shard passes."""
    digest = hashlib.sha256(name.encode())
    digest.update(result)
    return digest.digest()


def cuts(batches: Iterable[tuple[np.ndarray, np.ndarray]], shard_bytes: int = SHARD_BYTES) -> list[int]:
    """Return where each shard ends, as row numbers, the last being the number of rows.

    A batch is (identities, uint32 hash of each row's content; sizes, its bytes); how rows are batched decides nothing.
    Three quarters of a shard are taken as they come; then a row ends it with probability size / (a quarter of
    shard_bytes), decided by its own hash: a row that comes or goes moves the cuts beside it and seldom others. A shard
    of two rows or more has at most twice `shard_bytes`.
    """
    spread = max(1, shard_bytes // 4)
    result: list[int] = []
    row = begin = taken = 0  # first row of the batch, of the shard in hand; bytes of the latter in earlier batches
    for identities, sizes in batches:
        ends = np.flatnonzero(identities.astype(np.float64) / 2**32 < sizes / spread) + 1
        reach = np.cumsum(sizes, dtype=np.int64)
        at = 0
        while at < len(sizes):
            before = int(reach[at - 1] if at else 0) - taken
            enough = max(at, int(np.searchsorted(reach, before + shard_bytes - spread)))
            possible = ends[np.searchsorted(ends, enough, side="right") :][:1].tolist()
            too_much = int(np.searchsorted(reach, before + 2 * shard_bytes, side="right"))
            if too_much < len(sizes):
                possible.append(max(too_much, at + 1 if begin == row + at else at))
            if not possible:
                taken = int(reach[-1]) - before
                break
            at, taken = min(possible), 0
            begin = row + at
            result.append(begin)
        row += len(sizes)
    return [*result, row] if begin < row else result


def row_hashes(identities: Any) -> np.ndarray:
    """Return the first 4 bytes of each of an Arrow array of 16-byte identities, uint32."""
    flat = np.frombuffer(identities.buffers()[1], dtype=np.uint32)
    return flat.reshape(-1, 4)[identities.offset : identities.offset + len(identities), 0]
