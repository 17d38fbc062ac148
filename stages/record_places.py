"""Where records stand: counted from the beginning of their shard, as .memo/ remembers them, or from that of their file.

of the shard            its records             in the file
start 100, before 7     bytes 0-8, line 1       bytes 100-108, line 8
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa

import raw_params
import raw_records
from kit import stage
from kit.arrow import compute as pc


def shard_key(content: str, start: int, before: int) -> str:
    """Return the digest of a shard with its place in the file, which stands in its documents."""
    return hashlib.sha256(f"{content} {start} {before}".encode()).hexdigest() if start else content


def moved(documents: pa.Table, start: int, lines: int) -> pa.Table:
    """Return documents whose places are `start` bytes and `lines` lines further on."""
    if start or lines:
        for name, further in (("start", start), ("end", start), ("number", lines)):
            column = documents[name]
            there = pc.add(column, pa.scalar(further, column.type))
            documents = documents.set_column(documents.schema.get_field_index(name), documents.field(name), there)
    return documents


class Account:
    """Puts rows in their place in the file, checking that those of a file tile it and that no file is missing."""

    def __init__(self, run: stage.Run, root: Path, params: raw_params.Params) -> None:
        self.run, self.tiled = run, raw_params.unit(params) == "line"
        states = run.guards[str(root)].states.values()
        folder = root if root.is_dir() else root.parent
        self.sizes = {Path(name).relative_to(folder).as_posix(): size for name, _, _, size, *_ in states}
        self.file, self.end = "", 0  # in hand, and where its last record ended
        self.files = 0

    def place(self, rows: pa.RecordBatch, start: int, before: int) -> pa.RecordBatch:
        """Return rows of a shard that begins at byte `start` of its file, after `before` lines, with places there."""
        names = rows["file"]
        is_new = np.ones(rows.num_rows, dtype=bool)
        is_new[0] = names[0].as_py() != self.file
        is_new[1:] = pc.not_equal(names[1:], names[:-1]).to_numpy(zero_copy_only=False)
        new = np.flatnonzero(is_new)
        self.files += len(new)
        if self.tiled:
            begins, ends = (rows.column(name).to_numpy() + start for name in ("start", "end"))
            previous = np.concatenate([[self.end], ends[:-1]])
            for at in new.tolist():
                self.close(names[at - 1].as_py() if at else self.file, int(previous[at]))
            gaps = int(np.abs(np.where(is_new, 0, previous) - begins).sum())
            self.run.balance(f"bytes of {names[0].as_py()} between records", gaps)
            numbers = rows["number"].to_numpy() + np.int32(before)
            placed = [names, pa.array(begins), pa.array(ends), pa.array(numbers, pa.int32())]
            rows = pa.RecordBatch.from_arrays([*placed, *rows.columns[4:]], schema=rows.schema)
            self.end = int(ends[-1])
        self.file = names[-1].as_py()
        return rows

    def close(self, file: str, end: int) -> None:
        """Check that a file was read to its end, where its size says where that is."""
        if self.tiled and file and Path(file).suffix.lower() not in raw_records.COMPRESSIONS:
            self.run.balance(f"bytes of {file}", self.sizes[file], recorded=end)
