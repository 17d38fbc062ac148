"""Arrow folders: written to the same bytes every time, opened by `datasets.load_from_disk`.

A folder holds shards `data-00000.arrow`, ... (Arrow IPC streams), the two small files that `datasets` needs
(state.json, dataset_info.json) and manifest.json: the schema, the counts and the SHA-256 of each shard. Nothing in it
depends on clock, host, path, or on how the rows arrived: the writer cuts batches at a fixed number of rows.

    with Writer(folder, schema) as out:
        out.write(table)                     # any number of rows, any number of times
    out.rows                                 # rows written
    [batch.num_rows for batch in batches(folder)]      -> [1024, 1024, 17]
"""

from __future__ import annotations

import hashlib
import json
import mmap
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

BATCH_ROWS = 1024
SHARD_BYTES = 256 * 2**20


class _Compute:
    """`pyarrow.compute`, imported at its first use: 40 ms that the start of a stage does not wait for."""

    def __getattr__(self, name: str) -> Any:
        import pyarrow.compute

        return getattr(pyarrow.compute, name)


compute = _Compute()


class Writer:
    """Write rows of one schema into a folder as Arrow IPC streams with fixed batch rows.

    `batch_rows`: rows per record batch, part of the format: another number gives other bytes. A shard is closed at the
    first batch end at or beyond `shard_bytes`. `counts` given to `close` stand in the manifest beside `rows`.

    Of a column of type dictionary, given as such or as values, each batch has a dictionary of its own values alone.
    """

    def __init__(
        self, folder: Path, schema: pa.Schema, batch_rows: int = BATCH_ROWS, shard_bytes: int = SHARD_BYTES
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.schema = folder, schema
        self._given = pa.schema([field.with_type(_values(field.type)) for field in schema])
        self.batch_rows, self.shard_bytes = batch_rows, shard_bytes
        self.rows = 0
        self.counts: dict[str, int] = {}
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self._shards: list[dict[str, Any]] = []
        self._sink: pa.OSFile | None = None
        self._stream: pa.ipc.RecordBatchStreamWriter | None = None
        self._shard_rows = 0
        self._closed = False

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
            # New arrays, also of one chunk: of a slice, Arrow writes some bytes of the neighbouring rows, too.
            columns = [pa.concat_arrays(column.chunks) for column in rows.columns]
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
        self._sink = pa.OSFile(str(self.folder / f"data-{len(self._shards):05d}.arrow"), "wb")
        self._stream = pa.ipc.new_stream(self._sink, self.schema)
        self._shard_rows = 0
        return self._stream

    def _close_shard(self) -> None:
        if self._stream is None or self._sink is None:
            return
        self._stream.close()
        self._sink.close()
        path = self.folder / f"data-{len(self._shards):05d}.arrow"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._shards.append({"name": path.name, "rows": self._shard_rows, "sha256": digest})
        self._stream = self._sink = None

    def close(self, **counts: int) -> None:
        """Write what waits, then the small files; an empty folder still holds one shard without rows."""
        if self._waiting_rows:
            self._flush(self._waiting_rows)
        if self._stream is None and not self._shards:
            self._open_shard()
        self._close_shard()
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
    for shard in manifest(folder)["shards"]:
        with (folder / shard["name"]).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for batch in pa.ipc.open_stream(pa.py_buffer(mapped)):
            yield batch.select(columns) if columns else batch
            # All of them: those of an earlier batch may have been touched once more.
            if hasattr(mapped, "madvise"):
                mapped.madvise(mmap.MADV_DONTNEED)


def table(folder: Path, columns: list[str] | None = None) -> pa.Table:
    """Return an Arrow folder as one memory-mapped table."""
    content = manifest(folder)
    sources = [pa.memory_map(str(folder / shard["name"])) for shard in content["shards"]]
    whole = pa.concat_tables([pa.ipc.open_stream(source).read_all() for source in sources])
    return whole.select(columns) if columns else whole


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
    """Finds no pandas. pyarrow would import it, where `datasets` has brought it, to convert its first list.

    That is 0.3 s of each stage, for types that no stage has. pyarrow looks once, so it is made to look below, at no
    pandas; afterwards `to_pandas` and other importers find it as ever.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name, name=name)


sys.meta_path.insert(0, _NoPandas())
pa.array([0])
sys.meta_path.pop(0)
