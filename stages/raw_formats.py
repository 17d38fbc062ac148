"""Read raw files: each format gives records, a place, the bytes that stand there and the text or messages in them.

Example, `format: csv`, `columns: {text: body}`, the file of 21 bytes b'id,body\\r\\n1,"a\\nb"\\r\\n2\\r\\n':

    Record(0, 18, 1, b'id,body\\r\\n1,"a\\nb"\\r\\n', "a\\nb", None)           the header belongs to the first record
    Record(18, 21, 4, b"2\\r\\n", "", "line 4: it has 1 field, the header names 2")

What holds for every format:

- Nothing that stands in a file raises: what cannot be read is a record with `error`, and reading goes on where it can.
- text, jsonl, json, csv, tsv and html: byte ranges tile the decompressed file, whatever is wrong with it, so that every
  byte is in one record; `number` is the line on which the range starts. What stands around records belongs to one
  beside it: a csv header to the first row; of a json array, `[` to the first object, commas and `]` to the one before.
- Lines end at LF only (CR LF leaves its CR to the line; U+2028 and the like end none). A blank line is a record.
- A file has at least one record: that of an empty file, or of a table without rows, has the content "".
- A name that ends in .gz or .zst is decompressed; damage in it spoils the last record that was begun, and no other.
- Memory: a line, a csv row or 256 rows of a Parquet row group at a time; for text by document or separator, json and
  html the whole file; for a compressed Parquet, Arrow, PDF or Word file its copy in the folder of temporary files.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

import byte_formats
import table_formats
from raw_params import UNITS, WHOLE, Params, unit
from raw_records import BLOCK_BYTES, Content, Decompressed, Part, Record, sentence

FORMATS = {
    "text": byte_formats.read_text,
    "jsonl": byte_formats.read_jsonl,
    "json": byte_formats.read_json,
    "csv": byte_formats.read_csv,
    "tsv": byte_formats.read_csv,
    "html": byte_formats.read_html,
}
TABLES = {
    "parquet": table_formats.read_parquet,
    "arrow": table_formats.read_arrow,
    "pdf": table_formats.read_pdf,
    "docx": table_formats.read_docx,
}


def records(path: Path, params: Params, part: Part | None = None) -> Iterator[Record]:
    """Yield the records of one file, or of one folder of `save_to_disk`, in their order; see the top of this file.

    Places are those in the whole file, also when only a `part` of it is read. Raises SystemExit when the library for
    pdf, docx or html is missing, and for nothing else.
    """
    end = None if params.format in UNITS else 0
    number = 0
    pattern = re.compile("|".join(r"\{\{[ \t]*" + re.escape(name) + r"[ \t]*\}\}" for name in params.fill))
    try:
        found = TABLES[params.format](path, params) if params.format in UNITS else _tiled(path, params, part)
        if (params.format, params.sample_by) in WHOLE:
            found = table_formats.whole(found)
        for record in found:
            end, number = record.end, record.number
            yield _filled(record, pattern, params.fill) if params.fill else record
        if not number:
            yield Record(end, end, 1, b"", "", None)
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:  # MemoryError: a length in Arrow is damaged
        # Never the path: the ledger holds this sentence, and is the same on every machine.
        why = (error.strerror if isinstance(error, OSError) else None) or str(error).split("\n")[0].rstrip(". ")
        where = f"from {unit(params)} {number + 1} on, " if number else ""
        yield Record(end, end, number + 1, b"", "", sentence(f"{where}the file cannot be read ({why})"))


def unnamed(record: Record, fill: dict[str, str]) -> str | None:
    """Return the first placeholder that stands in a record and that `fill` does not name."""
    texts = [record.content] if isinstance(record.content, str) else [turn["content"] for turn in record.content]
    found = (name for text in texts for name in re.findall(r"\{\{[ \t]*(\w[\w .-]*?)[ \t]*\}\}", text))
    return next((name for name in found if name not in fill), None)


def _filled(record: Record, pattern: re.Pattern[str], fill: dict[str, str]) -> Record:
    names: list[str] = []

    def put(match: re.Match[str]) -> str:
        names.append(match[0][2:-2].strip())
        return fill[names[-1]]

    if isinstance(record.content, str):
        content: Content = pattern.sub(put, record.content)
    else:
        content = [{**turn, "content": pattern.sub(put, turn["content"])} for turn in record.content]
    return record._replace(content=content, filled=tuple(names))


def _tiled(path: Path, params: Params, part: Part | None) -> Iterator[Record]:
    """Yield the records of a format with byte places; the last one takes the blame for a damaged compression."""
    with Decompressed(path, part) as raw, io.BufferedReader(raw, BLOCK_BYTES) as source:
        codec: str = params.encoding
        if codec == "utf-16":
            mark = source.peek(2)[:2]
            codec = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}.get(mark, "")
            if not codec and mark:  # guessing would turn UTF-8 into Chinese without an error
                data = source.read()
                yield Record(0, len(data), 1, data, "", "the file is declared UTF-16 but has no byte order mark")
                return
        last: Record | None = None
        for record in FORMATS[params.format](source, params, codec or "utf-8"):
            if last:
                yield last
            last = record
        if last and not raw.damage:
            yield last
        elif raw.damage:
            last = last or Record(0, 0, 1, b"", "", None)
            by_line = params.format in ("jsonl", "csv", "tsv") or params.sample_by == "line"
            if by_line and last.raw.endswith("\n".encode(codec)):  # nothing is cut but what would follow
                yield last
                lines = last.raw.decode(codec, "replace").count("\n")
                last = Record(last.end, last.end, last.number + lines, b"", "", None)
            yield last._replace(content="", error=raw.damage)
