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

import csv
import importlib
import io
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

Content = str | list[dict[str, str]]  # a text, or messages with role (system, user, assistant, tool) and content
Parse = Callable[[str, int], Content]  # of a decoded record and its line; raises ValueError with the whole sentence

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES: dict[str, tuple[str, ...]] = {
    name: tuple(suffix + packed for suffix in suffixes for packed in ("", *COMPRESSIONS))
    for name, suffixes in {
        "text": (".txt", ".md", ".markdown"),
        "jsonl": (".jsonl", ".ndjson", ".json"),  # much JSON of one object a line is called .json
        **{name: (f".{name}",) for name in ("json", "csv", "tsv", "parquet", "arrow", "pdf", "docx")},
        "html": (".html", ".htm"),
    }.items()
}
UNITS = {"parquet": "row", "arrow": "row", "pdf": "page", "docx": "paragraph"}  # all others: line
# The columns of each kind of row: those that it must have, and those that it may have.
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text": (("text",), ()),
    "alpaca": (("instruction", "input", "output"), ("system", "history")),
    "messages": (("messages",), ()),
    "sharegpt": (("conversations",), ("system",)),
    "prompt_completion": (("prompt", "completion"), ()),
}
ROLES = {  # developer: the system turn of OpenAI's reasoning models; human, gpt, observation: of ShareGPT
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
BLOCK_BYTES = 2**20
SPACE = re.compile(r"[ \t\r\n]*")  # of JSON
CANONICAL = json.JSONEncoder(ensure_ascii=False, sort_keys=True, default=str).encode
ROWS = 256  # of Parquet and Arrow, turned into Python values at a time
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"  # pyarrow, datasets and arrow-rs all close a stream with it
NOT_SHOWN = {"head", "script", "style", "noscript", "template"}
BLOCKS = {
    "address", "article", "aside", "blockquote", "body", "br", "dd", "details", "div", "dl", "dt", "fieldset",
    "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav",
    "ol", "option", "p", "pre", "section", "summary", "table", "textarea", "tr", "ul",
}  # fmt: skip

csv.field_size_limit(2**31 - 1)  # 131,072 characters otherwise, less than a law


class Record(NamedTuple):
    """A raw record: its place in the file, its bytes, and what is in it or what is wrong with it."""

    start: int | None  # first byte in the decompressed file, and the byte after the last; None: a row, page, paragraph
    end: int | None
    number: int  # 1-based, of what `unit` says
    raw: bytes  # as it stands there; a row: JSON of the columns that are read; a page, a paragraph: its text in UTF-8
    content: Content  # not cleaned; "" for a blank line
    error: str | None  # one sentence without a full stop; `content` is then ""
    filled: tuple[str, ...] = ()  # the placeholders of `fill` that stood there, one for each place


class Part(NamedTuple):
    """Whole lines of a file that `cuttable` allows to be read apart: a later process need not read what is before."""

    start: int  # first byte, and the byte after the last
    end: int
    line: int  # 1-based number of the first


class Params(BaseModel):
    """How the files of a source become records."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "pdf", "docx", "html"] = Field(
        description="jsonl: one JSON object a line; json: an array of objects, or one; arrow: one file, or a folder of "
        "`save_to_disk`; pdf: a page is a record; docx: a paragraph or table is; html: the file is, as its visible text"
    )
    record: Literal["text", "alpaca", "messages", "sharegpt", "prompt_completion"] = Field(
        "text", description="what a row is: a text in the column `text`, or a conversation (not text, pdf, docx, html)"
    )
    sample_by: Literal["document", "line", "separator"] = Field(
        "document", description="text only: one file is one document, or each line is, or each part from a `separator`"
    )
    separator: str | None = Field(
        None,
        description="sample_by separator only: regular expression (^ and $ at each line), each match begins a document "
        "and stays in it, e.g. `^# `",
    )
    columns: dict[str, str] = Field(
        {}, description="standard name -> name in the file, e.g. {text: body} or {instruction: question}"
    )
    encoding: Literal["utf-8", "gb18030", "utf-16"] = Field(
        "utf-8", description="of text, jsonl, json, csv, tsv and html; utf-16 must begin with its byte order mark"
    )
    fill: dict[str, str] = Field(
        {}, description="placeholder -> value: {name: Terra} puts Terra where the content says {{name}}"
    )

    @model_validator(mode="after")
    def _agree(self) -> Params:
        known = [name for names in COLUMNS[self.record] for name in names]
        if self.format in ("text", "pdf", "docx", "html") and (self.record != "text" or self.columns):
            raise ValueError(f"format {self.format} has no rows; `record` and `columns` are for formats that have")
        if self.format in ("csv", "tsv") and self.record in ("messages", "sharegpt"):
            raise ValueError(f"a cell of {self.format} is a text, and record {self.record} needs lists; use jsonl")
        if self.format != "text" and self.sample_by != "document":
            raise ValueError(f"`sample_by` is for format text only; drop it for format {self.format}")
        if (self.separator is None) == (self.sample_by == "separator"):
            raise ValueError("`sample_by: separator` and a `separator` go together; one of them is missing")
        if self.format in UNITS and self.encoding != "utf-8":
            raise ValueError(f"format {self.format} knows its own encoding; drop `encoding`")
        for name in self.columns:
            if name not in known:
                raise ValueError(f"`columns` names `{name}`, but record {self.record} reads {', '.join(known)}")
        for name in self.fill:
            if not re.fullmatch(r"[^{}]+", name):
                raise ValueError(f"`fill` names `{name}`; write the name without its braces")
        try:
            if self.separator is not None and re.search(self.separator, "", re.MULTILINE):
                raise ValueError(f"the separator {self.separator} matches the empty text, so it would cut anywhere")
        except re.error as error:
            raise ValueError(f"the separator {self.separator} is not a regular expression ({error})") from None
        return self


def unit(params: Params) -> str:
    """Return what `Record.number` counts: line, row, page or paragraph."""
    return UNITS.get(params.format, "line")


def cuttable(path: Path, params: Params) -> bool:
    """Return whether each line of the file is a record whatever stands in the lines around it, at a known place."""
    by_line = params.format == "jsonl" or (params.format == "text" and params.sample_by == "line")
    return by_line and params.encoding != "utf-16" and path.suffix.lower() not in COMPRESSIONS


def records(path: Path, params: Params, part: Part | None = None) -> Iterator[Record]:
    """Yield the records of one file, or of one folder of `save_to_disk`, in their order; see the top of this file.

    Places are those in the whole file, also when only a `part` of it is read. Raises SystemExit when the library for
    pdf, docx or html is missing, and for nothing else.
    """
    end = None if params.format in UNITS else 0
    number = 0
    pattern = re.compile("|".join(r"\{\{" + re.escape(name) + r"\}\}" for name in params.fill))
    try:
        found = TABLES[params.format](path, params) if params.format in UNITS else _tiled(path, params, part)
        for record in found:
            end, number = record.end, record.number
            yield _filled(record, pattern, params.fill) if params.fill else record
        if not number:
            yield Record(end, end, 1, b"", "", None)
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:  # MemoryError: a length in Arrow is damaged
        # Never the path: the ledger holds this sentence, and is the same on every machine.
        why = (error.strerror if isinstance(error, OSError) else None) or str(error).split("\n")[0].rstrip(". ")
        where = f"from {unit(params)} {number + 1} on, " if number else ""
        yield Record(end, end, number + 1, b"", "", _sentence(f"{where}the file cannot be read ({why})"))


def _filled(record: Record, pattern: re.Pattern[str], fill: dict[str, str]) -> Record:
    names: list[str] = []

    def put(match: re.Match[str]) -> str:
        names.append(match[0][2:-2])
        return fill[names[-1]]

    if isinstance(record.content, str):
        content: Content = pattern.sub(put, record.content)
    else:
        content = [{**turn, "content": pattern.sub(put, turn["content"])} for turn in record.content]
    return record._replace(content=content, filled=tuple(names))


# Bytes ----------------------------------------------------------------------------------------------------------------


class _Decompressed(io.RawIOBase):
    """The bytes of a file, decompressed. Where it is cut or damaged it ends, and `damage` says why."""

    def __init__(self, path: Path, part: Part | None = None) -> None:
        self.path, self.compression = path, COMPRESSIONS.get(path.suffix.lower())
        self.start, end, self.line = part or (0, None, 1)
        self.left = None if end is None else end - self.start
        self.stream = self._open()
        if part:
            self.stream.seek(self.start)
        self.size = 0
        self.damage: str | None = None

    def _open(self) -> Any:
        file = self.path.open("rb")
        return pa.input_stream(file, compression=self.compression) if self.compression else file  # each closes `file`

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.damage:
            return 0
        try:
            data = self.stream.read(len(buffer) if self.left is None else min(len(buffer), self.left - self.size))
        except OSError as error:
            data = self._rescued(len(buffer))
            kind = f"{self.compression} stream" if self.compression else "file"
            self.damage = f"the {kind} is cut or damaged after byte {self.size + len(data)} of its content ({error})"
        buffer[: len(data)] = data
        self.size += len(data)
        return len(data)

    def _rescued(self, size: int) -> bytes:
        """Return the bytes before the damage: a read that fails has lost what it had, reads of one byte lose none."""
        self.stream.close()
        self.stream, data = self._open(), bytearray()
        try:
            for length in [size] * (self.size // size) + [self.size % size]:
                self.stream.read(length)
            while byte := self.stream.read(1):
                data += byte
        except OSError:
            pass
        return bytes(data)

    def close(self) -> None:
        self.stream.close()
        super().close()


@contextmanager
def _seekable(path: Path) -> Iterator[BinaryIO]:
    """Open a file whose reader jumps about in it; of a compressed one, a decompressed copy."""
    if path.suffix.lower() not in COMPRESSIONS:
        with path.open("rb") as file:
            yield file
        return
    with _Decompressed(path) as source, tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(source, copy, BLOCK_BYTES)
        if source.damage:
            raise ValueError(source.damage)
        copy.seek(0)
        yield copy


def _tiled(path: Path, params: Params, part: Part | None = None) -> Iterator[Record]:
    """Yield the records of a format with byte places; the last one takes the blame for a damaged compression."""
    with _Decompressed(path, part) as raw, io.BufferedReader(raw, BLOCK_BYTES) as source:
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


def _lines(source: Any, codec: str) -> Iterator[tuple[int, int, bytes]]:
    """Yield start, number and bytes of each line. It ends at LF, in UTF-16 a pair of bytes at an even place."""
    start = source.raw.start
    lines = _utf16_lines(source, codec) if codec.startswith("utf-16") else source
    for number, line in enumerate(lines, start=source.raw.line):
        yield start, number, line
        start += len(line)


def _utf16_lines(source: BinaryIO, codec: str) -> Iterator[bytes]:
    newline = "\n".encode(codec)
    begun: list[bytes] = []
    while block := source.read(BLOCK_BYTES):
        start = at = 0
        while (at := block.find(newline, at)) >= 0:
            if at % 2:  # e.g. the low byte of U+4E0A and the high byte of U+0041
                at += 1
                continue
            at += 2
            yield b"".join([*begun, block[start:at]])
            begun, start = [], at
        begun.append(block[start:])
    if rest := b"".join(begun):
        yield rest


def _decode(raw: bytes, codec: str, start: int, line: int) -> str:
    """Return the text of bytes that stand at `start`, without a byte order mark; raise ValueError naming the byte."""
    try:
        text = raw.decode(codec)
    except UnicodeDecodeError as error:
        line += raw[: error.start].decode(codec, "replace").count("\n")
        name = codec.upper().removesuffix("-LE").removesuffix("-BE")
        raise ValueError(f"byte {start + error.start} (line {line}) is not {name}") from None
    return text.removeprefix("\ufeff") if start == 0 else text


def _record(raw: bytes, codec: str, start: int, line: int, parse: Parse) -> Record:
    """Return the record of bytes that stand at `start`, with what `parse` makes of their text."""
    try:
        return Record(start, start + len(raw), line, raw, parse(_decode(raw, codec, start, line), line), None)
    except (ValueError, RecursionError) as error:
        return Record(start, start + len(raw), line, raw, "", _sentence(error))


def _sentence(error: object) -> str:
    """Return an error as one line that UTF-8 can hold, also where it quotes names from a file."""
    return " ".join(str(error).split())[:300].encode("utf-8", "backslashreplace").decode()


# Formats with byte places: (source, params, codec) -> records ---------------------------------------------------------


def _text(source: BinaryIO, params: Params, codec: str) -> Iterator[Record]:
    """One record for the file, for each line (without its line end), or for each part that begins with a separator."""
    if params.sample_by == "line":
        for start, line, raw in _lines(source, codec):
            yield _record(raw, codec, start, line, lambda text, line: text.rstrip("\r\n"))
        return
    data = source.read()
    whole = _record(data, codec, 0, 1, lambda text, line: text)
    if params.separator is None or whole.error:
        yield whole
        return
    text = data.decode(codec)
    begins = 1 if text.startswith("\ufeff") else 0  # where ^ matches: behind the byte order mark
    matches = re.compile(params.separator, re.MULTILINE).finditer(text, begins)
    cuts = [0, *(match.start() for match in matches if match.start() > begins), len(text)]
    start, line = 0, 1
    for part in (text[begin:end] for begin, end in pairwise(cuts)):
        raw = data[start : start + len(part.encode(codec))]  # each codec here writes the bytes that it has read
        yield _record(raw, codec, start, line, lambda text, line: text)
        start, line = start + len(raw), line + part.count("\n")


def _jsonl(source: BinaryIO, params: Params, codec: str) -> Iterator[Record]:
    decoder = _Json()

    def parse(text: str, line: int) -> Content:
        text = text.rstrip("\r\n")
        return "" if not text or text.isspace() else _content(decoder.only(text, 0, line), params, f"line {line}")

    for start, line, raw in _lines(source, codec):
        yield _record(raw, codec, start, line, parse)


def _json(source: BinaryIO, params: Params, codec: str) -> Iterator[Record]:
    """One record for each object of the array: from its first byte (the first one: from the file's) to the next one's.

    b'[{"text": "a"}, {"text": "b"}]' gives "a" at bytes 0-16 and "b" at 16-30.
    """
    data = source.read()
    whole = _record(data, codec, 0, 1, lambda text, line: "")
    text = "" if whole.error else data.decode(codec)
    if re.fullmatch(r"\ufeff?[ \t\r\n]*(\[[ \t\r\n]*\][ \t\r\n]*)?", text):
        yield whole
        return
    start, line, begin = 0, 1, 0
    for at, end, row in _json_values(text):
        raw = data[start : start + len(text[begin:end].encode(codec))]
        place = f"line {line + text.count(chr(10), begin, at)}"
        yield _row(start, start + len(raw), line, raw, row, params, place)
        start, line, begin = start + len(raw), line + text.count("\n", begin, end), end


def _json_values(text: str) -> Iterator[tuple[int, int, Any]]:
    """Yield each value of an array, or the only one: where it begins, where its range ends, and it or a ValueError."""
    decoder = _Json()
    at = _space(text, 1 if text.startswith("\ufeff") else 0)
    if not text.startswith("[", at):
        yield at, len(text), decoder.only(text, at, 1)
        return
    at = _space(text, at + 1)
    while True:
        row, end = decoder.value(text, at, 1)
        after = _space(text, end)
        if not text.startswith(",", after):
            break
        following = _space(text, after + 1)
        yield at, following, row
        at = following
    closed = text.startswith("]", after) and _space(text, after + 1) == len(text)
    yield at, len(text) if closed else after, row
    if not closed and (after < len(text) or not isinstance(row, ValueError)):
        place = _place(text, after, 1)
        yield after, len(text), ValueError(f"{place} is not JSON (expecting a comma, or ] and the end of the file)")


def _space(text: str, at: int) -> int:
    """Return where the white space at `at` ends."""
    match = SPACE.match(text, at)
    assert match
    return match.end()


def _place(text: str, at: int, line: int) -> str:
    return f"line {line + text.count(chr(10), 0, at)}, column {at - text.rfind(chr(10), 0, at)}"


class _Json:
    """Decodes JSON as Python does (NaN is a number), and notices a name that an object holds twice."""

    def __init__(self) -> None:
        self.twice: list[str] = []
        self.decode = json.JSONDecoder(object_pairs_hook=self._object).raw_decode

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            names = [name for name, _ in pairs]
            self.twice.append(max(names, key=names.count))
        return row

    def value(self, text: str, at: int, line: int) -> tuple[Any, int]:
        """Return the value at `at` or a ValueError, and where it ends: the end of the text when it never does."""
        self.twice.clear()
        try:
            row, end = self.decode(text, at)
        except json.JSONDecodeError as error:
            return ValueError(f"{_place(text, error.pos, line)} is not JSON ({error.msg})"), len(text)
        except (RecursionError, ValueError) as error:  # nested a thousand deep, or a number of thousands of digits
            return ValueError(f"{_place(text, at, line)} is JSON beyond what Python reads ({error})"), len(text)
        if self.twice:
            return ValueError(f"{_place(text, at, line)} is an object that holds `{self.twice[0]}` twice"), end
        return row, end

    def only(self, text: str, at: int, line: int) -> Any:
        """Return the value behind which nothing stands, or a ValueError."""
        row, end = self.value(text, _space(text, at), line)
        after = end if end == len(text) else _space(text, end)
        return row if after == len(text) else ValueError(f"{_place(text, after, line)} is not JSON (Extra data)")


def _csv(source: BinaryIO, params: Params, codec: str) -> Iterator[Record]:
    """One record for each row, of one line or more; fields in quotes may hold line ends. Tabs separate those of tsv."""
    taken: list[bytes] = []  # lines of the row in hand
    wrong: list[str] = []

    def lines() -> Iterator[str]:
        for start, line, raw in _lines(source, codec):
            taken.append(raw)
            try:
                text = _decode(raw, codec, start, line)
            except ValueError as error:  # a generator that raises has ended, and with it the file
                wrong.append(str(error))
                text = raw.decode(codec, "replace")
            yield text

    rows = csv.reader(lines(), delimiter="\t" if params.format == "tsv" else ",", strict=True)
    header: list[str] | None = None
    before, skipped, problem = b"", 0, ""  # the header's bytes and lines, until a row has taken them, and its flaw
    start, line = 0, 1
    while True:
        place = f"line {line + skipped}"
        try:
            fields = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            wrong.append(f"the row of {place} is not {params.format.upper()} ({str(error).split(' - ')[0]})")
            fields = []
        raw, height = before + b"".join(taken), skipped + len(taken)
        taken.clear()
        if header is None:
            header, before, skipped = fields, raw, height
            try:
                _names(params, header)
            except ValueError as error:
                problem = str(error).replace("it", "the header", 1)
            continue
        flaw = problem
        if not flaw and len(fields) != len(header):
            flaw = f"it has {len(fields)} field{'s' * (len(fields) > 1)}, the header names {len(header)}"
        if wrong or not fields:
            yield Record(start, start + len(raw), line, raw, "", wrong[0] if wrong else None)
        else:
            row = ValueError(f"{place}: {flaw}") if flaw else dict(zip(header, fields, strict=True))
            yield _row(start, start + len(raw), line, raw, row, params, place)
        start, line, before, skipped = start + len(raw), line + height, b"", 0
        wrong.clear()
    if before:  # a header and nothing else
        yield Record(0, len(before), 1, before, "", wrong[0] if wrong else None)


def _html(source: BinaryIO, params: Params, codec: str) -> Iterator[Record]:
    parser = _library("selectolax.lexbor", "html", "selectolax").LexborHTMLParser
    yield _record(source.read(), codec, 0, 1, lambda text, line: _visible(parser(text).root))


def _visible(root: Any) -> str:
    """Return the text that a browser shows: a line for each block, a tab before each further cell of a table row.

    <h1>A</h1><p>b <b>c</b><br>d<table><tr><td>1<td>2</table> gives "A\\nb c\\nd\\n1\\t2".
    """
    pieces, preformatted = ["\n"], 0
    waiting = [(root, False)] if root is not None else []
    while waiting:
        node, closes = waiting.pop()
        tag = node.tag
        if node.is_text_node:
            text = node.text_content or ""
            if not preformatted:
                text = re.sub(r"[ \t\n\f\r]+", " ", text)
                text = text.lstrip(" ") if pieces[-1][-1] in " \n\t" else text
            if text:
                pieces.append(text)
            continue
        if tag in NOT_SHOWN or not node.is_element_node:
            continue
        if tag in BLOCKS and pieces[-1] != "\n":
            pieces[-1] = pieces[-1].removesuffix(" ") or "\n"
            pieces.append("\n")
        if tag in ("pre", "textarea"):
            preformatted += -1 if closes else 1
        if not closes:
            if tag in ("td", "th") and pieces[-1] != "\n":
                pieces.append("\t")
            waiting.append((node, True))
            waiting.extend([(child, False) for child in node.iter(include_text=True)][::-1])
    return "".join(pieces).strip("\n")


# Formats without byte places: (path, params) -> records ---------------------------------------------------------------


def _parquet(path: Path, params: Params) -> Iterator[Record]:
    from pyarrow import parquet  # 30 ms that the start of other stages does not wait for

    with _seekable(path) as file, parquet.ParquetFile(file, pre_buffer=False, page_checksum_verification=True) as table:
        names = _names(params, table.schema_arrow.names)
        yield from _rows(table.iter_batches(ROWS, columns=names, use_threads=False), params)  # a fork loses threads


def _arrow(path: Path, params: Params) -> Iterator[Record]:
    """Rows of an Arrow file or stream; of a folder of `save_to_disk`, those of its files, counted through."""
    if not path.is_dir():
        yield from _rows(_arrow_batches(path, params), params)
        return
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = [path / item["filename"] for item in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError("no state.json names its data files; of a DatasetDict take the folder of one split") from None
    yield from _rows(chain.from_iterable(_arrow_batches(file, params) for file in files), params)


def _arrow_batches(path: Path, params: Params) -> Iterator[pa.RecordBatch]:
    with _seekable(path) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
        names = _names(params, reader.schema.names)
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
            except (ValueError, pa.ArrowException):  # in one of them; find out in which
                values = [_value(rows.slice(at, 1)) for at in range(rows.num_rows)]
            for value in values:
                raw = b"" if isinstance(value, ValueError) else CANONICAL(value).encode("utf-8", "surrogatepass")
                yield _row(None, None, number, raw, value, params, f"row {number}")
                number += 1


def _values(rows: pa.RecordBatch) -> list[Any]:
    rows.validate(full=True)  # offsets too: Arrow would follow a bad one out of its memory
    return rows.to_pylist()


def _value(row: pa.RecordBatch) -> Any:
    try:
        return _values(row)[0]
    except (ValueError, pa.ArrowException) as error:
        return ValueError(f"the row cannot be read ({error})")


def _pdf(path: Path, params: Params) -> Iterator[Record]:
    """One record for each page; a page without text, e.g. a scanned one, is blank."""
    pypdf = _library("pypdf", "pdf", "pypdf")
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of every flaw that it can mend
    with _seekable(path) as file:
        reader = _foreign(pypdf.PdfReader, file)
        for number in range(1, _foreign(lambda: len(reader.pages)) + 1):
            try:
                text = _string(_foreign(lambda at: reader.pages[at].extract_text(), number - 1), "its text")
                yield Record(None, None, number, text.encode(), text, None)
            except ValueError as error:
                yield Record(None, None, number, b"", "", _sentence(f"page {number} cannot be read ({error})"))


def _docx(path: Path, params: Params) -> Iterator[Record]:
    """One record for each paragraph of the body, or table: its rows are lines, tabs separate their cells.

    A table counts as one paragraph. Text boxes belong to the paragraph that holds them; tracked changes count as made.
    Headers, footers, footnotes and comments are not read.
    """
    docx = _library("docx", "docx", "python-docx")
    outermost = "[not(ancestor::w:p) and not(ancestor::w:tbl)]"
    with _seekable(path) as file:
        body = _foreign(docx.Document, file).element.body
        for number, block in enumerate(body.xpath(f".//w:p{outermost} | .//w:tbl{outermost}"), start=1):
            rows = block.xpath(".//w:tr[not(ancestor::w:tr)]")
            lines = ["\t".join(map(_runs, row.xpath(".//w:tc[not(ancestor::w:tc)]"))) for row in rows] or [_runs(block)]
            text = "\n".join(lines)
            yield Record(None, None, number, text.encode(), text, None)


def _runs(block: Any) -> str:
    """Return the text of a Word paragraph, or of a table's cell with a line for each of its paragraphs."""
    gone = "ancestor::w:moveFrom or ancestor::*[local-name()='Fallback']"  # both stand elsewhere once more
    paragraphs = block.xpath(".//w:p[not(ancestor::w:p)]") or [block]
    return "\n".join("".join(run.text for run in part.xpath(f".//w:r[not({gone})]")) for part in paragraphs)


def _library(module: str, name: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise SystemExit(
            f"format {name} needs the package {package}; install it or the whole extra: pip install '.[documents]'"
        ) from None


def _foreign(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a library that meets damaged files with errors of every kind, and raise ValueError for them."""
    try:
        return call(*arguments)
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


# Rows -> texts and conversations --------------------------------------------------------------------------------------


def _names(params: Params, present: list[str]) -> list[str]:
    """Return the columns to read of those that a table has; raise ValueError when one is missing or stands twice."""
    required, optional = COLUMNS[params.record]
    names = []
    for standard in required + optional:
        name = params.columns.get(standard, standard)
        if name in present:
            names.append(name)
        elif standard in required or standard in params.columns:
            raise ValueError(f"it has no column `{name}`, only {', '.join(present) or 'none'}")
        if present.count(name) > 1:
            raise ValueError(f"it has the column `{name}` twice")
    return names


def _row(start: int | None, end: int | None, number: int, raw: bytes, row: Any, params: Params, place: str) -> Record:
    """Return the record of a row, or of the ValueError that stands for it; `place` is how an error calls it."""
    try:
        return Record(start, end, number, raw, _content(row, params, place), None)
    except (ValueError, RecursionError) as error:  # nested as deep as JSON can be read, but not written again
        return Record(start, end, number, raw, "", _sentence(error))


def _content(row: Any, params: Params, place: str) -> Content:
    """Return the text or the messages of a row. Raises ValueError saying what is wrong with it.

    alpaca {"instruction": "Add.", "input": "2+2", "output": "4", "system": "Brief.", "history": [["1+1", "2"]]} gives
    system "Brief.", user "1+1", assistant "2", user "Add.\\n2+2", assistant "4".
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"{place} is JSON but not an object with named fields")

    def field(standard: str) -> tuple[Any, str]:
        """Return the value, None for an optional field that is not there, and what an error calls it."""
        name = params.columns.get(standard, standard)
        if name not in row and (standard in COLUMNS[params.record][0] or standard in params.columns):
            raise ValueError(f"{place} has no field `{name}`; it has {', '.join(sorted(row)) or 'none'}")
        return row.get(name), f"{place}: the field `{name}`"

    def turn(role: str, standard: str) -> dict[str, str]:
        return {"role": role, "content": _string(*field(standard))}

    if params.record == "text":
        return _string(*field("text"))
    if params.record == "messages":
        return _turns(*field("messages"), "role", "content")
    turns: list[dict[str, str]] = []
    if params.record == "prompt_completion":
        for role, standard in (("user", "prompt"), ("assistant", "completion")):
            value, where = field(standard)
            turns += _turns(value, where, "role", "content") if isinstance(value, list) else [turn(role, standard)]
        return turns
    if field("system")[0]:
        turns.append(turn("system", "system"))
    if params.record == "sharegpt":
        return turns + _turns(*field("conversations"), "from", "value")
    pairs, where = field("history")
    pairs = pairs or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"{where} is {_short(pairs)}, expected a list of pairs of question and answer")
    for pair in pairs:
        turns.append({"role": "user", "content": _string(pair[0], where)})
        turns.append({"role": "assistant", "content": _string(pair[1], where)})
    value, where = field("input")
    question = _string(*field("instruction")) + "\n" + _string("" if value is None else value, where)
    return [*turns, {"role": "user", "content": question.strip()}, turn("assistant", "output")]


def _turns(value: Any, where: str, role_key: str, text_key: str) -> list[dict[str, str]]:
    """Return a list of messages with our roles. Tool calls become JSON text behind what the turn says.

    {"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]} gives assistant '[{"id": "1"}]'.
    """
    if not isinstance(value, list):
        raise ValueError(f"{where} is {_short(value)}, expected a list of messages")
    if not value:
        raise ValueError(f"{where} is an empty conversation")
    turns = []
    for number, message in enumerate(value, start=1):
        here = f"{where}, message {number},"
        if not isinstance(message, dict):
            raise ValueError(f"{here} is {_short(message)}, expected an object with `{role_key}` and `{text_key}`")
        role, text = message.get(role_key), message.get(text_key)
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"{here} has the {role_key} {_short(role)}, expected one of {', '.join(ROLES)}")
        if isinstance(text, list):  # parts, as OpenAI writes them; pictures and sound have no text
            parts = [part.get("text") if isinstance(part, dict) else part for part in text]
            text = "".join(_string(part, f"{here} part {at}") for at, part in enumerate(parts, start=1))
        if calls := message.get("tool_calls") or message.get("function_call"):
            said = _string("" if text is None else text, f"{here} `{text_key}`")
            text = "\n".join(filter(None, (said, json.dumps(calls, ensure_ascii=False))))
        turns.append({"role": ROLES[role], "content": _string(text, f"{here} `{text_key}`")})
    return turns


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} is {_short(value)}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half of a surrogate pair") from None
    return value


def _short(value: Any) -> str:
    kind = "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else None
    return kind or json.dumps(value[:40] if isinstance(value, str) else value, default=str)[:40]


FORMATS = {"text": _text, "jsonl": _jsonl, "json": _json, "csv": _csv, "tsv": _csv, "html": _html}
TABLES = {"parquet": _parquet, "arrow": _arrow, "pdf": _pdf, "docx": _docx}
