"""Formats whose records have no place in bytes: Parquet, Arrow, PDF and Word; each is (path, params) -> records."""

from __future__ import annotations

import io
import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from raw_params import Params
from raw_records import Record, foreign, library, raised, seekable, sentence
from raw_rows import columns_of, record_of_row, string_of

CANONICAL = json.JSONEncoder(ensure_ascii=False, sort_keys=True, default=str).encode
LENIENT = ("utf-8", "surrogatepass")
ROWS = 256  # of Parquet and Arrow, turned into Python values at a time
# Signs of the font Symbol by the last byte of their code: https://www.unicode.org/Public/MAPPINGS/VENDORS/ADOBE/symbol.txt
SYMBOL = {number: chr(number) for number in (*range(0x28, 0x2A), *range(0x2C, 0x3C), 0x3D, 0x3E)}
SYMBOL |= dict(zip(range(0x41, 0x5B), "ΑΒΧΔΕΦΓΗΙϑΚΛΜΝΟΠΘΡΣΤΥςΩΞΨΖ", strict=True))
SYMBOL |= dict(zip(range(0x61, 0x7B), "αβχδεφγηιϕκλμνοπθρστυϖωξψζ", strict=True))
SYMBOL |= {0x2B: "+", 0x2D: "−", 0xA3: "≤", 0xA5: "∞", 0xB0: "°", 0xB1: "±", 0xB3: "≥", 0xB4: "×", 0xB7: "•", 0xB8: "÷"}
SYMBOL |= {0xAB: "↔", 0xAC: "←", 0xAD: "↑", 0xAE: "→", 0xAF: "↓", 0xB9: "≠", 0xBA: "≡", 0xBB: "≈", 0xBC: "…", 0xD6: "√"}
IDENTITY = ("/Identity-H", "/Identity-V")  # codes are numbers of glyphs: only ToUnicode knows more
# Of what pypdf warns of: its modules that pass over a part, what these do mend, and what is not where it should be.
LOSSES = ("pypdf.filters", "pypdf._page", "pypdf._utils", "pypdf.generic._data_structures")
MENDED = ("Multiple definitions", "Stream length not defined")
ABSENT = ("not defined.", "skipping the entry.")
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
            except (ValueError, KeyError, OverflowError, pa.ArrowException):  # in one of them; find out in which
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
    # A map is {"city": "x"}, as JSON has it, and not a list of pairs; JSON knows no keys but strings.
    named = not re.search(r"\bmap<(?!string|large_string)", " ".join(map(str, rows.schema.types)))
    return rows.to_pylist(maps_as_pydicts="strict" if named else None)


def _value(row: pa.RecordBatch) -> Any:
    try:
        return _values(row)[0]
    # Overflow: a date beyond the year 9999; Key: a map that has a key twice
    except (ValueError, KeyError, OverflowError, pa.ArrowException) as error:
        return ValueError(f"the row cannot be read ({error})")


def read_pdf(path: Path, params: Params) -> Iterator[Record]:
    """One record for each page; a page without text, e.g. a scanned one, is blank."""
    pypdf = library("pypdf", "pdf")
    said = _Errors()  # pypdf warns of every flaw that it can mend, and only says what it cannot
    with seekable(path) as file, said:
        reader = foreign(pypdf.PdfReader, file)
        if reader.is_encrypted and not reader.decrypt(""):
            raise ValueError("it opens with a password only; save a copy without one")
        sound = set[int]()
        pages = foreign(lambda: len(reader.pages))
        declared = foreign(lambda: int(reader.root_object["/Pages"].get("/Count", 0)))
        if declared != pages or not pages:
            said.found.insert(0, f"of {declared} pages {pages} can be found")
        lost = said.found[:1]
        for number in range(1, pages + 1):
            try:
                said.found.clear()
                text = foreign(lambda at: _page_text(reader.pages[at], sound, said.found), number - 1)
                text = string_of(text, "its text")
                if said.found:
                    raise ValueError(said.found[0])
                yield Record(None, None, number, text.encode(), text, None)
            except ValueError as error:
                yield Record(None, None, number, b"", "", sentence(f"page {number} cannot be read ({error})"))
        if lost:
            raise ValueError(lost[0])


class _Errors(logging.Handler):
    """Collects what pypdf logs of text that it passes over, or of an encoding that it takes for another one."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []
        self.logger = logging.getLogger("pypdf")

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        is_loss = (record.name in LOSSES and not text.startswith(MENDED)) or text.endswith(ABSENT)
        if is_loss or record.levelno >= logging.ERROR:
            self.found.append(text)

    def __enter__(self) -> None:
        self.logger.setLevel(logging.WARNING)
        self.logger.propagate = False
        self.logger.addHandler(self)

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)


def _page_text(page: Any, sound: set[int], flaws: list[str]) -> str:
    """Return the text of a page and add what is wrong with it to `flaws`, for example that glyph numbers are no text.

    `sound`: streams that pages before it share and that need no second look. Raises zlib.error for damaged content, of
    which pypdf takes what is left.
    """
    for stream in _streams(page):
        filters = stream.get("/Filter")
        is_deflated = filters == "/FlateDecode" or (isinstance(filters, list) and filters[:1] == ["/FlateDecode"])
        if is_deflated and id(stream) not in sound:
            inflate = zlib.decompressobj()
            inflate.decompress(stream._data)
            if not inflate.eof:
                raise zlib.error("its content is cut")
            sound.add(id(stream))

    def drawn(text: str, _transform: Any, _matrix: Any, font: Any, _size: float) -> None:
        if font and text.strip() and "/ToUnicode" not in font and font.get("/Encoding") in IDENTITY:
            flaws.append(
                f"its font {str(font.get('/BaseFont'))[1:]} does not say which characters its glyphs are; OCR would"
            )

    return str(page.extract_text(visitor_text=drawn))


def _streams(page: Any) -> Iterator[Any]:
    """Yield the streams that can hold text of a page: its own, and the forms that it names, one inside another."""
    contents = page.get("/Contents")
    contents = contents.get_object() if contents is not None else None
    for part in contents if isinstance(contents, list) else [contents]:
        stream = part.get_object() if part is not None else None
        if hasattr(stream, "_data"):
            yield stream
    waiting, known = [page.get("/Resources")], set[int]()
    while waiting:
        resources = waiting.pop()
        forms = resources.get_object().get("/XObject") if resources is not None else None
        for value in forms.get_object().values() if forms is not None else ():
            form = value.get_object()
            if form.get("/Subtype") == "/Form" and id(form) not in known:
                known.add(id(form))
                waiting.append(form.get("/Resources"))
                yield form


def read_docx(path: Path, params: Params) -> Iterator[Record]:
    """One record for each paragraph of the body, or table: its rows are lines, tabs separate their cells.

    A table counts as one paragraph. Text boxes belong to the paragraph that holds them; tracked changes count as made.
    Headers, footers, footnotes and comments are not read.
    """
    docx = library("docx", "docx")
    outermost = "[not(ancestor::w:p) and not(ancestor::w:tbl)]"
    with seekable(path) as file:
        blocks = f".//w:p{outermost} | .//w:tbl{outermost} | .//w:altChunk"
        found = foreign(lambda: docx.Document(file).element.body.xpath(blocks))
        for number, block in enumerate(found, start=1):
            if block.tag.endswith("}altChunk"):
                why = f"paragraph {number} is a document in the document, which is not read; save the file anew in Word"
                yield Record(None, None, number, b"", "", why)
                continue
            rows = block.xpath(".//w:tr[not(ancestor::w:tr)]") if block.tag.endswith("}tbl") else []
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
    return "\n".join(_said(part.xpath(f".//w:r[not({gone})]")) for part in paragraphs)


def _said(runs: list[Any]) -> str:
    """Return the text of the runs of a paragraph; a line ends with each paragraph of a text box in it."""
    pieces: list[str] = []
    host = last = next(runs[0].iterancestors("{*}p"), None) if runs else None
    for run in runs:
        if text := _run_text(run):
            home = next(run.iterancestors("{*}p"))
            if last is not host and home is not last:
                pieces.append("\n")
            pieces.append(text)
            last = home
    return "".join(pieces)


def _run_text(run: Any) -> str:
    """Return what python-docx calls the text of a run, with signs of the font Symbol, and raised digits as such."""
    kinds = " | ".join(f"w:{name}" for name in ("br", "cr", "noBreakHyphen", "ptab", "sym", "t", "tab"))
    text = "".join(_sign(part) if part.tag.endswith("}sym") else str(part) for part in run.xpath(kinds))
    return raised(text) if run.xpath("w:rPr/w:vertAlign[@w:val='superscript']") else text


def _sign(part: Any) -> str:
    """Return the character of a w:sym; one that only its font knows is U+FFFD, so that it is seen to be missing."""
    space = part.tag.removesuffix("sym")
    font, code = (part.get(f"{space}{name}", "") for name in ("font", "char"))
    number = int(code, 16) & 0xFF if re.fullmatch("[0-9A-Fa-f]{1,6}", code) else 0
    return SYMBOL.get(number, "\ufffd") if font == "Symbol" else "\ufffd"
