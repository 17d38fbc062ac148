"""What a raw record is, and how the bytes of a file are read: decompressed, cut into lines, decoded.

What holds for every format stands in stages/raw_formats.py.
"""

from __future__ import annotations

import importlib
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NotRequired, TypedDict

import pyarrow as pa


class Message(TypedDict):
    """A turn of a conversation."""

    role: str  # system, user, assistant, tool
    content: str
    learn: NotRequired[bool]  # False: an answer that is not to be learned; all others are


Content = str | list[Message]
Parse = Callable[[str, int], Content]  # of a decoded record and its line; raises ValueError with the whole sentence
# The package that reads a format, or judges by a rule: no library of every stage, so `clean` notes its version.
LIBRARIES = {"pdf": "pypdf", "docx": "python-docx", "html": "selectolax", "language": "py3langid"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BLOCK_BYTES = 2**20
RAISED = str.maketrans("0123456789+-\u2212()", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁽⁾")


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


class Decompressed(io.RawIOBase):
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
        if self.compression and not path.stat().st_size:  # also of nothing, a compressed file has a head
            self.damage = (
                f"the {self.compression} stream is cut or damaged after byte 0 of its content (no bytes at all)"
            )

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
def seekable(path: Path) -> Iterator[BinaryIO]:
    """Open a file whose reader jumps about in it; of a compressed one, a decompressed copy."""
    if path.suffix.lower() not in COMPRESSIONS:
        with path.open("rb") as file:
            yield file
        return
    with Decompressed(path) as source, tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(source, copy, BLOCK_BYTES)
        if source.damage:
            raise ValueError(source.damage)
        copy.seek(0)
        yield copy


def lines_of(source: Any, codec: str) -> Iterator[tuple[int, int, bytes]]:
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


def decode(raw: bytes, codec: str, start: int, line: int) -> str:
    """Return the text of bytes that stand at `start`, without a byte order mark; raise ValueError naming the byte."""
    try:
        text = raw.decode(codec)
    except UnicodeDecodeError as error:
        line += raw[: error.start].decode(codec, "replace").count("\n")
        name = codec.upper().removesuffix("-LE").removesuffix("-BE")
        raise ValueError(f"byte {start + error.start} (line {line}) is not {name}") from None
    if codec == "gb18030" and _is_utf8(raw):
        raise ValueError(f"line {line} is UTF-8, though it can be read as GB18030, too")
    return text.removeprefix("\ufeff") if start == 0 else text


def _is_utf8(raw: bytes) -> bool:
    """Return whether bytes are UTF-8 with some characters that are not ASCII: 16 of two bytes, or 5 of three.

    One pair of bytes of GB18030 in seven is a character of UTF-8, too, and three pairs are hardly ever two of three
    bytes; so many in a row never are by accident.
    """
    try:
        text = raw.decode()
        return sum(one > "\x7f" for one in text) >= 16 or sum(one > "\u07ff" for one in text) >= 5
    except UnicodeDecodeError:
        return False


def record_of(raw: bytes, codec: str, start: int, line: int, parse: Parse) -> Record:
    """Return the record of bytes that stand at `start`, with what `parse` makes of their text."""
    try:
        return Record(start, start + len(raw), line, raw, parse(decode(raw, codec, start, line), line), None)
    except (ValueError, RecursionError) as error:
        return Record(start, start + len(raw), line, raw, "", sentence(error))


def raised(text: str) -> str:
    """Return superscript digits and signs as such characters, for 10<sup>9</sup> is no 109; other text as it is."""
    return text.translate(RAISED) if all(ord(one) in RAISED for one in text) else text


def sentence(error: object) -> str:
    """Return an error as one line that UTF-8 can hold, also where it quotes names from a file."""
    return " ".join(str(error).split())[:300].encode("utf-8", "backslashreplace").decode()


def library(module: str, name: str) -> Any:
    """Return the module with which a format is read; raise SystemExit naming its package when it is not installed."""
    package = LIBRARIES[name]
    try:
        return importlib.import_module(module)
    except ImportError:
        raise SystemExit(
            f"format {name} needs the package {package}; install it or the whole extra: pip install '.[documents]'"
        ) from None


def foreign(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a library that meets damaged files with errors of every kind, and raise ValueError for them."""
    try:
        return call(*arguments)
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
