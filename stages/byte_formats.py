"""Formats whose records have a place in bytes: text, JSON, csv and HTML; each is (source, params, codec) -> records."""

from __future__ import annotations

import csv
import json
import re
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, BinaryIO

from raw_params import DELIMITERS, Params
from raw_records import Content, Record, decode, library, lines_of, raised, record_of
from raw_rows import columns_of, content_of, record_of_row

RESTARTS = 100  # in a csv file, after a row that is wrong: each may read on to the end of the file
SPACE = re.compile(r"[ \t\r\n]*")  # of JSON
NOT_SHOWN = {"head", "script", "style", "noscript", "template"}
BLOCKS = {
    "address", "article", "aside", "blockquote", "body", "br", "dd", "details", "div", "dl", "dt", "fieldset",
    "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav",
    "ol", "option", "p", "pre", "section", "summary", "table", "textarea", "tr", "ul",
}  # fmt: skip


csv.field_size_limit(2**31 - 1)  # 131,072 characters otherwise, less than a law


def read_text(source: BinaryIO, params: Params, codec: str) -> Iterator[Record]:
    """One record for the file, for each line (without its line end), or for each part that begins with a separator."""
    if params.sample_by == "line":
        for start, line, raw in lines_of(source, codec):
            yield record_of(raw, codec, start, line, lambda text, line: text.rstrip("\r\n"))
        return
    data = source.read()
    whole = record_of(data, codec, 0, 1, lambda text, line: text)
    if params.separator is None or whole.error:
        yield whole
        return
    text = data.decode(codec)
    begins = 1 if text.startswith("\ufeff") else 0  # where ^ matches: behind the byte order mark
    cuts = [0, *(place for place in matches(params.separator, text, begins) if place > begins), len(text)]
    start, line = 0, 1
    for part in (text[begin:end] for begin, end in pairwise(cuts)):
        raw = data[start : start + len(part.encode(codec))]  # each codec here writes the bytes that it has read
        yield record_of(raw, codec, start, line, lambda text, line: text)
        start, line = start + len(raw), line + part.count("\n")


def matches(separator: str, text: str, begin: int) -> Iterator[int]:
    r"""Yield where matches of a separator begin; its $ stands before CR LF, too, unless it names \r itself."""
    lines, returns = text, list[int]()
    if "\r\n" in text and "\r" not in separator and r"\r" not in separator:
        lines = text.replace("\r\n", "\n")
        found = re.finditer("\r\n", text)
        returns = [match.start() - number for number, match in enumerate(found)]  # their places in `lines`
    for match in re.compile(separator, re.MULTILINE).finditer(lines, begin):
        yield match.start() + bisect_left(returns, match.start())


def read_jsonl(source: BinaryIO, params: Params, codec: str) -> Iterator[Record]:
    decoder = _Json()

    def parse(text: str, line: int) -> Content:
        text = text.rstrip("\r\n")
        if not text or text.isspace():
            return ""
        row = decoder.only(text, 0, line)
        if line == 1 and text.strip() == "[":
            raise ValueError("line 1 begins an array, which `format: json` reads")
        return content_of(row, params, f"line {line}")

    for start, line, raw in lines_of(source, codec):
        yield record_of(raw, codec, start, line, parse)


def read_json(source: BinaryIO, params: Params, codec: str) -> Iterator[Record]:
    """One record for each object of the array: from its first byte (the first one: from the file's) to the next one's.

    b'[{"text": "a"}, {"text": "b"}]' gives "a" at bytes 0-16 and "b" at 16-30.
    """
    data = source.read()
    whole = record_of(data, codec, 0, 1, lambda text, line: "")
    text = "" if whole.error else data.decode(codec)
    if re.fullmatch(r"\ufeff?[ \t\r\n]*(\[[ \t\r\n]*\][ \t\r\n]*)?", text):
        yield whole
        return
    start, line, begin = 0, 1, 0
    for at, end, row in _json_values(text):
        raw = data[start : start + len(text[begin:end].encode(codec))]
        place = f"line {line + text.count(chr(10), begin, at)}"
        yield record_of_row(start, start + len(raw), line, raw, row, params, place)
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


def read_csv(source: Any, params: Params, codec: str) -> Iterator[Record]:
    """One record for each row, of one line or more; fields in quotes may hold line ends.

    Where a row of more lines is wrong, e.g. by a quote that nobody closes, its first line is a record and reading goes
    on behind it.
    """
    file = lines_of(source, codec)
    taken: list[tuple[int, int, bytes]] = []  # lines of the row in hand
    again: deque[tuple[int, int, bytes]] = deque()  # lines to be read once more
    wrong: list[str] = []
    restarts = 0

    def lines() -> Iterator[str]:
        while one := again.popleft() if again else next(file, None):
            taken.append(one)
            start, line, raw = one
            try:
                text = decode(raw, codec, start, line)
            except ValueError as error:  # a generator that raises has ended, and with it the file
                wrong.append(str(error))
                text = raw.decode(codec, "replace")
            yield text

    def reader() -> Iterator[list[str]]:
        return csv.reader(
            lines(),
            delimiter=params.delimiter or DELIMITERS[params.format],
            quotechar=params.quotechar,
            quoting=csv.QUOTE_MINIMAL if params.quotechar else csv.QUOTE_NONE,
            strict=True,
        )

    rows = reader()
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
            why, fields = str(error).split(" - ")[0], []
            is_quote = why.startswith(("unexpected end", "'"))  # none that closes, or text behind it
            hint = "; `quotechar: null` takes quotes as text" if is_quote else ""
            sentence = f"the row of {place} is not {params.format.upper()} ({why}){hint}"
            if len(taken) > 1 and header is not None and restarts < RESTARTS and not source.raw.damage:
                restarts += 1
                again.extendleft(reversed(taken[1:]))
                rows, wrong[:] = reader(), [sentence]
                del taken[1:]
            else:
                wrong.append(sentence)
        raw, height = before + b"".join(raw for _, _, raw in taken), skipped + len(taken)
        taken.clear()
        if header is None:
            header, before, skipped = fields, raw, height
            try:
                columns_of(params, header)
            except ValueError as error:
                problem = str(error).replace("it", "the header", 1)
                near = next((one for one in ";\t|," if one in header[0]), None) if len(header) == 1 else None
                problem += f"; are its columns apart by `delimiter: {json.dumps(near)}`?" if near else ""
                problem = problem if header else "the first line is blank, where the names of the columns are expected"
            continue
        flaw = problem
        if not flaw and len(fields) != len(header):
            flaw = f"it has {len(fields)} field{'s' * (len(fields) > 1)}, the header names {len(header)}"
        if wrong or not fields:
            yield Record(start, start + len(raw), line, raw, "", wrong[0] if wrong else None)
        else:
            row = ValueError(f"{place}: {flaw}") if flaw else dict(zip(header, fields, strict=True))
            yield record_of_row(start, start + len(raw), line, raw, row, params, place)
        start, line, before, skipped = start + len(raw), line + height, b"", 0
        wrong.clear()
    if before:  # a header and nothing else
        yield Record(0, len(before), 1, before, "", wrong[0] if wrong else None)


def read_html(source: BinaryIO, params: Params, codec: str) -> Iterator[Record]:
    parser = library("selectolax.lexbor", "html").LexborHTMLParser
    yield record_of(source.read(), codec, 0, 1, lambda text, line: _visible(parser(text).root))


def _is_hidden(attributes: dict[str, str | None]) -> bool:
    return "hidden" in attributes or "display:none" in (attributes.get("style") or "").replace(" ", "").lower()


def _visible(root: Any) -> str:
    """Return the text that a browser shows: a line for each block, a tab before each further cell of a table row.

    Raised digits and signs stay so.

    <h1>A</h1><p>b <b>c</b><br>d<table><tr><td>1<td>2</table> gives "A\\nb c\\nd\\n1\\t2".
    """
    pieces, preformatted, above = ["\n"], 0, 0
    rows = [(0, 0)]  # of tables one in another: where the row begins in `pieces`, and its cells so far
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
                pieces.append(raised(text) if above else text)
            continue
        if tag in NOT_SHOWN or not node.is_element_node or _is_hidden(node.attributes):
            continue
        begins_cell = pieces[-1] == "\t" and not closes and tag != "tr"  # its first block stands on the row's line
        if tag in BLOCKS and pieces[-1] != "\n" and not begins_cell:
            pieces[-1] = pieces[-1].removesuffix(" ") or "\n"
            pieces.append("\n")
        if tag in ("pre", "textarea"):
            preformatted += -1 if closes else 1
        above += (-1 if closes else 1) * (tag == "sup")
        if closes and tag == "tr":
            rows.pop()
        if not closes:
            if tag == "tr":
                rows.append((len(pieces), 0))
            elif tag in ("td", "th"):
                start, cells = rows.pop()
                if cells and len(pieces) > start and pieces[-1] == "\n":  # the end of a block in the cell before
                    pieces.pop()
                if cells:
                    pieces.append("\t")
                rows.append((start, cells + 1))
            waiting.append((node, True))
            waiting.extend([(child, False) for child in node.iter(include_text=True)][::-1])
    return "".join(pieces).strip("\n")
