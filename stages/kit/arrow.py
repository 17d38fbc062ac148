"""Arrow folders: written to the same bytes every time, opened by `datasets.load_from_disk`.

A folder holds shards `data-00000.arrow`, ... (Arrow IPC streams), the two small files that `datasets` needs
(state.json, dataset_info.json) and manifest.json: the schema, the counts and the SHA-256 of each shard. Nothing in it
depends on clock, host, path, or on how the rows arrived: the writer cuts batches at a fixed number of rows.

    with Writer(folder, schema) as out:
        out.write(table)                     # any number of rows, any number of times
    out.rows                                 # rows written
    with Shards(folder, schema) as out:
        out.add(path, rows, sha256)          # a whole shard, `encode(table, schema)` in a file
    [batch.num_rows for batch in batches(folder)]      -> [1024, 1024, 17]
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import shutil
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

BATCH_ROWS = 1024
SHARD_BYTES = 256 * 2**20
FICLONE = 0x40049409  # of linux/fs.h; elsewhere no file knows this request


class _Compute:
    """`pyarrow.compute`, imported at its first use: 40 ms that the start of a stage does not wait for."""

    def __getattr__(self, name: str) -> Any:
        import pyarrow.compute

        return getattr(pyarrow.compute, name)


compute = _Compute()


class Folder:
    """An Arrow folder in the making; `close`, or the end of `with`, writes its small files. `rows`: added so far."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.schema = folder, schema
        self.rows = 0
        self.counts: dict[str, int] = {}
        self._shards: list[dict[str, Any]] = []
        self._closed = False

    def close(self, **counts: int) -> None:
        """Write the small files; `counts` stand in the manifest beside `rows`."""
        self._closed = True
        self.counts = {"rows": self.rows, **counts}
        manifest = {"counts": self.counts, "schema": _schema_json(self.schema), "shards": self._shards}
        # `datasets` keys its own caches on the fingerprint, so it must follow the content and nothing else.
        fingerprint = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
        state: dict[str, Any] = {
            "_data_files": [{"filename": shard["name"]} for shard in self._shards],
            "_fingerprint": fingerprint,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        write_json(self.folder / "state.json", state)
        write_json(self.folder / "dataset_info.json", {})
        write_json(self.folder / "manifest.json", manifest)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._closed:
            self.close(**self.counts)

    def _next(self) -> Path:
        return self.folder / f"data-{len(self._shards):05d}.arrow"

    def _add(self, rows: int, sha256: str) -> None:
        self._shards.append({"name": self._next().name, "rows": rows, "sha256": sha256})


class Shards(Folder):
    """An Arrow folder put together from whole shards, each a file: where the rows of one change, the others stay."""

    def add(self, content: Path | pa.Buffer, rows: int, sha256: str | None = None) -> None:
        """Add what `encode` returned, or a file of it whose SHA-256 is known. A shard without rows is left out."""
        if not rows:
            return
        if isinstance(content, Path):
            assert sha256
            copy(content, self._next())
        else:
            self._next().write_bytes(content)
            sha256 = hashlib.sha256(content).hexdigest()
        self._add(rows, sha256)
        self.rows += rows

    def close(self, **counts: int) -> None:
        """Write the small files; an empty folder still holds one shard without rows."""
        if not self._shards:
            empty = encode(self.schema.empty_table(), self.schema)
            self._next().write_bytes(empty)
            self._add(0, hashlib.sha256(empty).hexdigest())
        super().close(**counts)


class Writer(Folder):
    """Write rows of one schema into a folder as Arrow IPC streams with fixed batch rows.

    `batch_rows`: rows per record batch, part of the format: another number gives other bytes. A shard is closed at the
    first batch end at or beyond `shard_bytes`. `counts` given to `close` stand in the manifest beside `rows`.

    Of a column of type dictionary, given as such or as values, each batch has a dictionary of its own values alone.
    """

    def __init__(
        self, folder: Path, schema: pa.Schema, batch_rows: int = BATCH_ROWS, shard_bytes: int = SHARD_BYTES
    ) -> None:
        super().__init__(folder, schema)
        self._given = pa.schema([field.with_type(_values(field.type)) for field in schema])
        self.batch_rows, self.shard_bytes = batch_rows, shard_bytes
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self._sink: pa.OSFile | None = None
        self._stream: pa.ipc.RecordBatchStreamWriter | None = None
        self._shard_rows = 0

    def write(self, rows: pa.Table | pa.RecordBatch) -> None:
        """Add rows; columns and types must be the schema's."""
        table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
        if table.schema == self.schema:
            table = table.cast(self._given)
        if table.schema != self._given:
            raise ValueError(f"{self.folder.name}: rows have columns {table.schema}, expected {self._given}.")
        self._waiting.append(table)
        self._waiting_rows += table.num_rows
        self.rows += table.num_rows
        if self._waiting_rows >= self.batch_rows:
            self._flush(self._waiting_rows - self._waiting_rows % self.batch_rows)

    def _flush(self, rows: int) -> None:
        table = pa.concat_tables(self._waiting)
        for start in range(0, rows, self.batch_rows):
            self._write_rows(table.slice(start, min(self.batch_rows, rows - start)))
        self._waiting, self._waiting_rows = [table.slice(rows)], table.num_rows - rows

    def _write_rows(self, rows: pa.Table) -> None:
        """Write rows as one batch, or as halves when a column holds more than the 2 GiB that its offsets reach."""
        try:
            columns = _fresh(rows)
        except pa.ArrowInvalid:
            if rows.num_rows < 2:
                raise
            half = rows.num_rows // 2
            self._write_rows(rows.slice(0, half))
            self._write_rows(rows.slice(half))
            return
        columns = [_encoded(column, field.type) for column, field in zip(columns, self.schema, strict=True)]
        self._write_batch(pa.RecordBatch.from_arrays(columns, schema=self.schema))

    def _write_batch(self, batch: pa.RecordBatch) -> None:
        stream = self._stream or self._open_shard()
        stream.write_batch(batch)
        self._shard_rows += batch.num_rows
        assert self._sink is not None
        if self._sink.tell() >= self.shard_bytes:
            self._close_shard()

    def _open_shard(self) -> pa.ipc.RecordBatchStreamWriter:
        self._sink = pa.OSFile(str(self._next()), "wb")
        self._stream = pa.ipc.new_stream(self._sink, self.schema)
        self._shard_rows = 0
        return self._stream

    def _close_shard(self) -> None:
        if self._stream is None or self._sink is None:
            return
        self._stream.close()
        self._sink.close()
        with self._next().open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._add(self._shard_rows, digest)
        self._stream = self._sink = None

    def close(self, **counts: int) -> None:
        """Write what waits, then the small files; an empty folder still holds one shard without rows."""
        if self._waiting_rows:
            self._flush(self._waiting_rows)
        if self._stream is None and not self._shards:
            self._open_shard()
        self._close_shard()
        super().close(**counts)


def encode(rows: pa.Table, schema: pa.Schema, batch_rows: int = 256) -> pa.Buffer:
    """Return rows as an Arrow IPC stream with `batch_rows` rows a batch, in a buffer that is no larger."""
    batches = [
        pa.RecordBatch.from_arrays(_fresh(rows.slice(start, batch_rows)), schema=schema)
        for start in range(0, rows.num_rows, batch_rows)
    ]
    counter = pa.MockOutputStream()
    for sink in (counter, None):
        buffer = None if sink else pa.allocate_buffer(counter.size())
        with pa.ipc.new_stream(sink or pa.FixedSizeBufferWriter(buffer), schema) as out:
            for batch in batches:
                out.write_batch(batch)
    return buffer


def _fresh(rows: pa.Table) -> list[pa.Array]:
    """Return the columns as new arrays, also of one chunk: of a slice, Arrow writes bytes of the neighbours, too."""
    return [pa.concat_arrays(column.chunks) for column in rows.columns]


def manifest(folder: Path) -> dict[str, Any]:
    """Return manifest.json of an Arrow folder: `counts`, `schema`, `shards`."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise SystemExit(f"{path} is missing: the stage that writes {folder} has not finished; run `dvc repro`.")
    return read_json(path)


def batches(folder: Path, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of an Arrow folder in order, memory-mapped: untouched columns cost nothing.

    The pages read so far are handed back when the next batch is asked for: memory does not grow with the folder;
    a batch that is kept stays valid, its pages are read again when they are touched.
    """
    for path in shard_paths(folder):
        yield from shard_batches(path, columns)


def shard_batches(path: Path, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of one shard, as `batches` does."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for batch in pa.ipc.open_stream(pa.py_buffer(mapped)):
        yield batch.select(columns) if columns else batch
        # All of them: those of an earlier batch may have been touched once more.
        if hasattr(mapped, "madvise"):
            mapped.madvise(mmap.MADV_DONTNEED)


def shard_paths(folder: Path) -> list[Path]:
    """Return the files that hold the rows of an Arrow folder, in order."""
    return [folder / shard["name"] for shard in manifest(folder)["shards"]]


def table(folder: Path, columns: list[str] | None = None) -> pa.Table:
    """Return an Arrow folder as one memory-mapped table."""
    sources = [pa.memory_map(str(path)) for path in shard_paths(folder)]
    whole = pa.concat_tables([pa.ipc.open_stream(source).read_all() for source in sources])
    return whole.select(columns) if columns else whole


def copy(source: Path, target: Path) -> None:
    """Copy a file in neither time nor space where the file system can (XFS, Btrfs), else byte by byte.

    Both own the same blocks then, until one of them is written to and gets its own: no write reaches the other file, as
    it would through a hard link. Raises OSError.
    """
    with source.open("rb") as file, target.open("wb") as out, contextlib.suppress(OSError):
        fcntl.ioctl(out, FICLONE, file.fileno())
        return
    shutil.copyfile(source, target)


def write_json(path: Path, content: Any, only_ascii: bool = False) -> None:
    """Write JSON with sorted keys, so that equal content is equal bytes.

    `only_ascii`: for metrics. DVC takes a file for binary when a third of its beginning is not ASCII, and fails.
    """
    path.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=only_ascii) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file that holds an object."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _values(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _encoded(values: pa.Array, kind: pa.DataType) -> pa.Array:
    return values.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else values


def _schema_json(schema: pa.Schema) -> dict[str, str]:
    return {field.name: str(field.type) for field in schema}


class _NoPandas(MetaPathFinder):
    """Says that pandas is not installed, while pyarrow converts its first list.

    At that moment pyarrow imports pandas if it can (`datasets` requires it, so it is there), to know its types: 0.3 s
    of each stage, and no stage has such types. It tries only once, which happens below; afterwards `to_pandas` and
    everybody else find pandas as ever.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name, name=name)


sys.meta_path.insert(0, _NoPandas())
pa.array([0])
sys.meta_path.pop(0)
