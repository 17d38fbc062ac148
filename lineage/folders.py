"""Arrow folders read at one row, and small indexes of them, so that a look-up does not scan.

    folder = Folder(Path("data/clean/pretrain/laws/ledger"), index_folder)
    folder.row(9_999_999)            ->   {"file": "...", "number": 17, ...}       one batch is read

An index is a few numbers for each batch of 1,024 or 256 rows (where it lies, what it begins with, sums up to it), and
for identities a sorted list of 8-byte prefixes with their rows. It is built at the first question, kept in
.work/lineage under the digest of the folder's manifest and of the code that builds it, and mapped: a question touches a
few pages. Deleting .work is always safe.
"""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kit.stage_code import STAGES, code_files

Array = npt.NDArray[Any]
Columns = dict[str, Array]
BUILDERS = ("group_blocks", "text_units")  # in stages/: with what they import, all of it that indexes follow from


@functools.cache
def code() -> bytes:
    """Return the SHA-256 of the code that indexes follow from: this package's, and that of BUILDERS."""
    files = {*Path(__file__).parent.glob("*.py")}.union(*(code_files(STAGES / f"{name}.py") for name in BUILDERS))
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in sorted(files))).digest()


def present(root: Path, name: str) -> Path:
    """Return the path of a file. Raises SystemExit where it is not there."""
    if not (root / name).is_file():
        raise SystemExit(f"{name} is not there; run `dvc repro`, or `dvc checkout` to bring it back.")
    return root / name


def read_json(root: Path, name: str) -> dict[str, Any]:
    """Return a JSON file that holds an object. Raises SystemExit where it is not there."""
    found: dict[str, Any] = json.loads(present(root, name).read_text(encoding="utf-8"))
    return found


class Cache:
    """Named arrays that depend on some files alone, in .work/lineage."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / ".work/lineage"

    def get(self, name: str, depends_on: list[Path], build: Callable[[], Columns]) -> Columns:
        """Return the arrays that `build` returned for the present content of these (small) files."""
        digest = hashlib.sha256(code())
        for path in depends_on:
            digest.update(path.read_bytes())
        home = self.folder / name.replace("/", "%")
        target = home / digest.hexdigest()[:32]
        if not target.is_dir():
            made = build()
            temporary = home / f".tmp-{target.name}-{os.getpid()}"
            temporary.mkdir(parents=True, exist_ok=True)  # of a killed process of the same number
            for column, values in made.items():
                np.save(temporary / f"{column}.npy", values)
            earlier = [path for path in home.glob("[!.]*") if path != target]
            try:
                temporary.rename(target)
            except OSError:  # another process that was asked at the same time was first
                shutil.rmtree(temporary)
                if not target.is_dir():
                    raise
            for path in earlier:
                shutil.rmtree(path, ignore_errors=True)
        return {path.stem: np.load(path, mmap_mode="r") for path in target.glob("*.npy")}


class Folder:
    """An Arrow folder with the place of each batch."""

    def __init__(self, path: Path, cache: Cache) -> None:
        self.path, self.cache = path, cache
        self.name = path.relative_to(cache.root).as_posix()
        self.manifest = read_json(cache.root, f"{self.name}/manifest.json")
        self._maps: dict[int, tuple[pa.Buffer, pa.Schema]] = {}
        self._last: tuple[int, pa.RecordBatch] | None = None
        self.batches = self.index("batches", self._batches)
        self.starts = self.batches["start"]  # first row of each batch, and the number of rows

    def __len__(self) -> int:
        return int(self.starts[-1])

    def index(self, name: str, build: Callable[[], Columns], *others: Path) -> Columns:
        """Return arrays that depend on this folder (and other small files) alone."""
        return self.cache.get(f"{self.name}/{name}", [self.path / "manifest.json", *others], build)

    def batch_of(self, row: int) -> int:
        """Return the number of the batch that holds a row."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def batch(self, number: int) -> pa.RecordBatch:
        """Return one batch, mapped; one with dictionaries is a copy."""
        if self._last is None or self._last[0] != number:
            buffer, schema = self._shard(int(self.batches["shard"][number]))
            begin, end = (int(self.batches[name][number]) for name in ("offset", "end"))
            if any(pa.types.is_dictionary(kind) for kind in schema.types):
                parts = [schema.serialize(), *(buffer[a:b] for a, b in self.batches["dictionaries"][number].tolist())]
                batch = pa.ipc.open_stream(b"".join([*parts, buffer[begin:end]])).read_next_batch()
            else:
                batch = pa.ipc.read_record_batch(pa.ipc.read_message(buffer[begin:end]), schema)
            self._last = number, batch
        return self._last[1]

    def all(self) -> Iterator[pa.RecordBatch]:
        """Yield all batches."""
        return (self.batch(number) for number in range(len(self.starts) - 1))

    def row(self, number: int) -> dict[str, Any]:
        """Return one row as Python values. Raises IndexError beyond the last."""
        if not 0 <= number < len(self):
            raise IndexError(f"{self.name} has no row {number}")
        at = self.batch_of(number)
        found: dict[str, Any] = self.batch(at).slice(number - int(self.starts[at]), 1).to_pylist()[0]
        return found

    def _shard(self, number: int) -> tuple[pa.Buffer, pa.Schema]:
        if number not in self._maps:
            path = present(self.cache.root, f"{self.name}/{self.manifest['shards'][number]['name']}")
            with path.open("rb") as file:
                buffer = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            self._maps[number] = buffer, pa.ipc.read_schema(pa.ipc.read_message(buffer))
        return self._maps[number]

    def _batches(self) -> Columns:
        """Walk over the heads of the messages, not over rows. A dictionary holds for all batches up to the next one."""
        shards, places, starts, dictionaries = [], [], [0], []
        for number in range(len(self.manifest["shards"])):
            buffer, schema = self._shard(number)
            source = pa.BufferReader(buffer)
            reader = pa.ipc.MessageReader.open_stream(source)
            latest = [(0, 0)] * sum(pa.types.is_dictionary(kind) for kind in schema.types)
            while True:
                at = source.tell()
                try:
                    message = reader.read_next_message()
                except StopIteration:
                    break
                if message.type == "dictionary":
                    latest[_first(message)] = at, source.tell()
                elif message.type == "record batch":
                    shards.append(number)
                    places.append((at, source.tell()))
                    dictionaries.append(list(latest))
                    starts.append(starts[-1] + _first(message))
        offsets = np.array(places, np.int64).reshape(-1, 2)
        return {
            "shard": np.array(shards, np.int32),
            "offset": offsets[:, 0],
            "end": offsets[:, 1],
            "start": np.array(starts),
            "dictionaries": np.array(dictionaries, np.int64),
        }


def _first(message: pa.Message) -> int:
    """Return the first field of a message's head: rows of a record batch, number of a dictionary, which pyarrow keeps.

    Arrow's Message.fbs, in FlatBuffers: a table begins with the distance back to its vtable, where the offset of each
    field stands, 0 for a field that has its default.
    """
    data = bytes(message.metadata)

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], "little", signed=size > 2)

    def field(table: int, place: int) -> int:
        away = number(table - number(table, 4) + 4 + 2 * place, 2)
        return away and table + away

    head = field(number(0, 4), 2)
    found = field(head + number(head, 4), 0)
    return number(found, 8) if found else 0


class Ids:
    """Which rows of a folder hold an identity of 16 bytes."""

    def __init__(self, folder: Folder, column: str) -> None:
        self.folder, self.column = folder, column
        found = folder.index(column, self._build)
        self.prefixes, self.rows = found["prefix"], found["row"]

    def __call__(self, identity: bytes) -> list[int]:
        """Return the rows, ascending; `identity` may be the first 8 bytes or more of it."""
        prefix = np.uint64(int.from_bytes(identity[:8], "big"))
        begin, end = (int(np.searchsorted(self.prefixes, prefix, side=side)) for side in ("left", "right"))
        rows = sorted(int(row) for row in self.rows[begin:end])
        return [row for row in rows if self.folder.row(row)[self.column][: len(identity)] == identity]

    def _build(self) -> Columns:
        prefixes, rows = [], []
        for number, batch in enumerate(self.folder.all()):
            column = batch[self.column]
            flat = np.frombuffer(column.buffers()[1], ">u8").reshape(-1, 2)[column.offset :][: len(column), 0]
            there = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
            prefixes.append(flat[there].astype(np.uint64))
            rows.append((there + self.folder.starts[number]).astype(np.uint32))
        flat = np.concatenate(prefixes or [np.zeros(0, np.uint64)])
        order = np.argsort(flat, kind="stable")
        return {"prefix": flat[order], "row": np.concatenate(rows or [np.zeros(0, np.uint32)])[order]}


class Chosen:
    """The rows of a folder that another folder holds: kept records among all, tokenised documents among all.

    `is_chosen(batch)` returns which rows of a batch are; the other folder holds them in the same order.
    """

    def __init__(self, folder: Folder, name: str, is_chosen: Callable[[pa.RecordBatch], Array]) -> None:
        self.folder, self.is_chosen = folder, is_chosen
        self.before = folder.index(name, self._build)["before"]  # of each batch, how many are chosen before it
        # The records of a file, which are asked for one after the other, are neighbours.
        self._of = functools.lru_cache(maxsize=4)(lambda at: is_chosen(folder.batch(at)))

    def place(self, row: int) -> int | None:
        """Return which row of the other folder is this one, None when it is not there."""
        at = self.folder.batch_of(row)
        chosen = self._of(at)
        inside = row - int(self.folder.starts[at])
        return int(self.before[at]) + int(chosen[:inside].sum()) if chosen[inside] else None

    def row(self, place: int) -> int:
        """Return which row of this folder is a row of the other."""
        at = int(np.searchsorted(self.before, place, side="right")) - 1
        chosen = np.flatnonzero(self._of(at))
        return int(self.folder.starts[at]) + int(chosen[place - int(self.before[at])])

    def _build(self) -> Columns:
        counts = [int(self.is_chosen(batch).sum()) for batch in self.folder.all()]
        return {"before": np.cumsum([0, *counts])}


class Places:
    """The ledger's rows by file and number."""

    def __init__(self, ledger: Folder) -> None:
        self.ledger = ledger
        found = ledger.index("places", self._build)
        self.files, self.ends, self.numbers = found["files"], found["ends"], found["number"]

    def find(self, file: str, number: int) -> int | None:
        """Return the row of the last record of `file` that begins at `number` or before."""
        at = self._batch(file, number)
        if at < 0:
            return None
        batch = self.ledger.batch(at)
        rows = np.flatnonzero(_equal(batch["file"], file))
        rows = rows[batch["number"].to_numpy()[rows] <= number]
        return int(self.ledger.starts[at]) + int(rows[-1]) if len(rows) else None

    def rows(self, file: str) -> Iterator[int]:
        """Yield all rows of a file, in order."""
        for at in range(max(self._batch(file, 0), 0), len(self.numbers)):
            if self._first(at)[0] > file.encode():
                return
            yield from (
                np.flatnonzero(_equal(self.ledger.batch(at)["file"], file)) + int(self.ledger.starts[at])
            ).tolist()

    def _batch(self, file: str, number: int) -> int:
        """Return the last batch whose first row does not stand behind a place, -1 when all do."""
        key = (file.encode(), number)
        low, high = 0, len(self.numbers)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self._first(middle) <= key else (low, middle)
        return low - 1

    def _first(self, batch: int) -> tuple[bytes, int]:
        begin = int(self.ends[batch - 1]) if batch else 0
        return self.files[begin : int(self.ends[batch])].tobytes(), int(self.numbers[batch])

    def _build(self) -> Columns:
        firsts = [(batch["file"][0].as_py().encode(), batch["number"][0].as_py()) for batch in self.ledger.all()]
        return {
            "files": np.frombuffer(b"".join(file for file, _ in firsts), np.uint8),
            "ends": np.cumsum([len(file) for file, _ in firsts]),
            "number": np.array([number for _, number in firsts], np.int32),
        }


def _equal(column: pa.Array, value: str) -> Array:
    import pyarrow.compute as pc

    found: Array = pc.equal(column, value).to_numpy(zero_copy_only=False)
    return found
