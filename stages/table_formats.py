"""Formats whose records have no place in bytes: Parquet, Arrow, PDF and Word; each is (path, params) -> records."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from raw_params import Params
from raw_records import Record, foreign, library, seekable, sentence
from raw_rows import columns_of, record_of_row, string_of

CANONICAL = json.JSONEncoder(ensure_ascii=False, sort_keys=True, default=str).encode
LENIENT = ("utf-8", "surrogatepass")
ROWS = 256  # of Parquet and Arrow, turned into Python values at a time
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"  # pyarrow, datasets and arrow-rs all close a stream with it


def read_parquet(path: Path, params: Params) -> Iterator[Record]:
    from pyarrow import parquet  # 30 ms that the start of other stages does not wait for

    with seekable(path) as file, parquet.ParquetFile(file, pre_buffer=False, page_checksum_verification=True) as table:
        names = columns_of(params, table.schema_arrow.names)
        yield from _rows(table.iter_batches(ROWS, columns=names, use_threads=False), params)  # a fork loses threads


def read_arrow(path: Path, params: Params) -> Iterator[Record]:
    """Rows of an Arrow file or stream; of a folder of `save_to_disk`, those of its files, counted through."""
    if not path.is_dir():
        yield from _rows(_arrow_batches(path, params), params)
        return
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        names = [str(item["filename"]) for item in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError("no state.json names its data files; of a DatasetDict take the folder of one split") from None
    if elsewhere := [name for name in names if Path(name).name != name]:
        raise ValueError(f"state.json names {elsewhere[0]}, which is not in the folder")
    yield from _rows(chain.from_iterable(_arrow_batches(path / name, params) for name in names), params)


def _arrow_batches(path: Path, params: Params) -> Iterator[pa.RecordBatch]:
    with seekable(path) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
        names = columns_of(params, reader.schema.names)
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            yield batch.select(names)
        if not is_file:
            file.seek(-len(ARROW_END), io.SEEK_END)
            if file.read() != ARROW_END:
                raise ValueError("it ends without Arrow's end mark, so rows may be missing")


def _rows(batches: Iterable[pa.RecordBatch], params: Params) -> Iterator[Record]:
    number = 1
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS):
            rows = batch.slice(start, ROWS)
            try:
                values = _values(rows)
            except (ValueError, OverflowError, pa.ArrowException):  # in one of them; find out in which
                values = [_value(rows.slice(at, 1)) for at in range(rows.num_rows)]
            for value in values:
                raw = b"" if isinstance(value, ValueError) else CANONICAL(_named(value, params)).encode(*LENIENT)
                yield record_of_row(None, None, number, raw, value, params, f"row {number}")
                number += 1


def _named(row: dict[str, Any], params: Params) -> dict[str, Any]:
    """Return a row without `tools` where it has none: the raw_ids of files of before that column was read stay."""
    tools = params.columns.get("tools", "tools")
    return {name: value for name, value in row.items() if value is not None or name != tools}


def _values(rows: pa.RecordBatch) -> list[Any]:
    rows.validate(full=True)  # offsets too: Arrow would follow a bad one out of its memory
    return rows.to_pylist()


def _value(row: pa.RecordBatch) -> Any:
    try:
        return _values(row)[0]
    except (ValueError, OverflowError, pa.ArrowException) as error:  # Overflow: a date beyond the year 9999
        return ValueError(f"the row cannot be read ({error})")


def read_pdf(path: Path, params: Params) -> Iterator[Record]:
    """One record for each page; a page without text, e.g. a scanned one, is blank."""
    pypdf = library("pypdf", "pdf", "pypdf")
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of every flaw that it can mend
    with seekable(path) as file:
        reader = foreign(pypdf.PdfReader, file)
        for number in range(1, foreign(lambda: len(reader.pages)) + 1):
            try:
                text = string_of(foreign(lambda at: reader.pages[at].extract_text(), number - 1), "its text")
                yield Record(None, None, number, text.encode(), text, None)
            except ValueError as error:
                yield Record(None, None, number, b"", "", sentence(f"page {number} cannot be read ({error})"))


def read_docx(path: Path, params: Params) -> Iterator[Record]:
    """One record for each paragraph of the body, or table: its rows are lines, tabs separate their cells.

    A table counts as one paragraph. Text boxes belong to the paragraph that holds them; tracked changes count as made.
    Headers, footers, footnotes and comments are not read.
    """
    docx = library("docx", "docx", "python-docx")
    outermost = "[not(ancestor::w:p) and not(ancestor::w:tbl)]"
    with seekable(path) as file:
        body = foreign(docx.Document, file).element.body
        for number, block in enumerate(body.xpath(f".//w:p{outermost} | .//w:tbl{outermost}"), start=1):
            rows = block.xpath(".//w:tr[not(ancestor::w:tr)]")
            lines = ["\t".join(map(_runs, row.xpath(".//w:tc[not(ancestor::w:tc)]"))) for row in rows] or [_runs(block)]
            text = "\n".join(lines)
            yield Record(None, None, number, text.encode(), text, None)


def whole(records: Iterator[Record]) -> Iterator[Record]:
    """Yield all pages or paragraphs of a file as one record, line after line, or the first one that is an error."""
    found = list(records)
    if wrong := [record for record in found if record.error]:
        yield wrong[0]
    elif found:
        text = "\n".join(str(record.content) for record in found)
        yield Record(None, None, 1, text.encode(), text, None)


def _runs(block: Any) -> str:
    """Return the text of a Word paragraph, or of a table's cell with a line for each of its paragraphs."""
    gone = "ancestor::w:moveFrom or ancestor::*[local-name()='Fallback']"  # both stand elsewhere once more
    paragraphs = block.xpath(".//w:p[not(ancestor::w:p)]") or [block]
    return "\n".join("".join(run.text for run in part.xpath(f".//w:r[not({gone})]")) for part in paragraphs)
