"""Turn raw files into documents, with a ledger row for every raw record.

Reads:  the source's `path` in data/raw (a file or a folder)
Writes: data/clean/PHASE/SOURCE/documents   kept records, in the order of file name and place in the file
        data/clean/PHASE/SOURCE/ledger      every raw record: where it stands, kept or dropped, by which rule
        data/clean/PHASE/SOURCE/source.json licence, owner, origin, language and the counts of each file
Params: sources.SOURCE.clean

Example, `format: text`, `sample_by: line`, the file a.txt being b"Caf\\xc3\\xa9\\r\\n\\nlast":

    documents: "Café" (bytes 0-7, line 1), "last" (bytes 8-12, line 3)
    ledger:    those two with rule null, and bytes 7-8, line 2 with rule `empty`

The byte ranges of the ledger tile each file: nothing lies outside a record. A conversation (Alpaca columns) becomes
messages: the user says instruction and input, joined by a line break and stripped; the assistant says output.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import unicodedata
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from kit import arrow, stage
from kit.params import Source, read_params

PLACE = [
    pa.field("file", pa.string()),  # relative to the source's path; the file's own name when that is a file
    pa.field("start", pa.int64()),  # first byte of the record, and the byte after its last: line ends included
    pa.field("end", pa.int64()),
    pa.field("line", pa.int32()),  # 1-based line on which it starts
]
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
TEXT_DOCUMENTS = pa.schema([pa.field("doc_id", pa.binary(16)), *PLACE, pa.field("text", pa.string())])
CHAT_DOCUMENTS = pa.schema([pa.field("doc_id", pa.binary(16)), *PLACE, pa.field("messages", MESSAGES)])
LEDGER = pa.schema(
    [
        *PLACE,
        pa.field("raw_id", pa.binary(16)),  # of the record's bytes as they stand in the file
        pa.field("doc_id", pa.binary(16)),  # null: dropped
        pa.field("rule", pa.string()),  # null: kept
        pa.field("evidence", pa.string()),
        pa.field("n_chars", pa.int64()),  # of the cleaned text, 0 when dropped
    ]
)
SUFFIXES = {"text": (".txt", ".md"), "jsonl": (".jsonl",), "alpaca": (".jsonl",)}
TASK_BYTES = 8 * 2**20  # files are handed to a worker in groups of about this size


class Params(BaseModel):
    """`sources.SOURCE.clean`: how the raw files are read, what is kept, where they come from."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["text", "jsonl", "alpaca"] = Field(
        description="text: .txt or .md; jsonl: one JSON object a line, its text in `text_column`; "
        "alpaca: the columns instruction, input, output, one JSON object a line"
    )
    sample_by: Literal["document", "line"] = Field(
        "document", description="text only: one file is one document, or each line is"
    )
    text_column: str = Field("text", min_length=1, description="jsonl only: the field that holds the text")
    ignore: list[str] = Field(
        [".*"], description="file names to leave out, as shell patterns; any other file must be readable"
    )
    min_chars: int = Field(1, ge=1, description="documents with fewer characters (white space not counted) are dropped")
    license: str = Field(
        min_length=1, description="SPDX identifier or name of the licence; `unknown` says so explicitly"
    )
    owner: str = Field("unknown", description="who holds the rights")
    origin: str = Field("unknown", description="where the text was taken from")
    language: str = Field("unknown", description="BCP 47 tags, e.g. `en` or `zh`")


class Record(NamedTuple):
    """A raw record: its place in the file and its bytes."""

    start: int
    end: int
    line: int
    raw: bytes


class Drop(NamedTuple):
    """Why a record is not kept."""

    rule: str
    evidence: str


def records(path: Path, params: Params) -> Iterator[Record]:
    """Yield the raw records of a file; their byte ranges follow each other without a gap."""
    if params.format == "text" and params.sample_by == "document":
        raw = path.read_bytes()
        yield Record(0, len(raw), 1, raw)
        return
    start = 0
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            yield Record(start, start + len(raw), line, raw)
            start += len(raw)


def parse(record: Record, params: Params) -> str | list[dict[str, str]]:
    """Return the text or the messages of a raw record, cleaned; a blank line gives an empty text.

    Raises ValueError saying what is wrong and at which byte or line.
    """
    raw = record.raw.removeprefix(b"\xef\xbb\xbf") if record.start == 0 else record.raw
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = record.end - len(raw) + error.start
        raise ValueError(f"byte {at} (line {record.line + raw[: error.start].count(10)}) is not UTF-8") from None
    if params.format == "text":
        return normalise(text.rstrip("\r\n") if params.sample_by == "line" else text)
    if not text.strip():
        return ""
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {record.line}, column {error.colno} is not JSON ({error.msg})") from None
    except (RecursionError, ValueError) as error:  # nested a thousand deep, or a number of thousands of digits
        raise ValueError(f"line {record.line} is JSON beyond what Python reads ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"line {record.line} is JSON but not an object with named fields")
    if params.format == "jsonl":
        return normalise(_field(row, params.text_column, record.line))
    question = "\n".join(_field(row, name, record.line) for name in ("instruction", "input")).strip()
    return [
        {"role": "user", "content": normalise(question)},
        {"role": "assistant", "content": normalise(_field(row, "output", record.line))},
    ]


def _field(row: dict[str, Any], name: str, line: int) -> str:
    if name not in row:
        raise ValueError(f"line {line} has no field `{name}`; it has {', '.join(sorted(row)) or 'none'}")
    if not isinstance(row[name], str):
        raise ValueError(f"line {line}: the field `{name}` is {json.dumps(row[name])[:40]}, expected a string")
    try:
        row[name].encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"line {line}: the field `{name}` holds half of a surrogate pair") from None
    return str(row[name])


def normalise(text: str) -> str:
    """Return `text` in Unicode NFC with LF line ends.

    >>> normalise("Cafe\u0301\\r\\n")
    'Café\\n'
    """
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))


def judge(content: str | list[dict[str, str]], params: Params) -> Drop | None:
    """Return why the content is dropped, or None when it is kept."""
    parts = [content] if isinstance(content, str) else [message["content"] for message in content]
    if not all(part.strip() for part in parts):
        return Drop("empty", "nothing but white space")
    n_chars = sum(len("".join(part.split())) for part in parts)
    if n_chars < params.min_chars:
        return Drop("min_chars", f"{n_chars} < {params.min_chars}")
    return None


def doc_id(content: str | list[dict[str, str]]) -> bytes:
    """Return the identity of a document: the first 16 bytes of the SHA-256 of its content."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).digest()[:16]


def clean_file(root: Path, file: str, params: Params) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Return the documents and the ledger rows of one file. Raises SystemExit naming file and place."""
    schema, column = documents_schema(params), "text" if params.format != "alpaca" else "messages"
    kept: list[dict[str, Any]] = []
    ledger: list[dict[str, Any]] = []
    path = root / file if root.is_dir() else root
    for record in records(path, params):
        try:
            content = parse(record, params)
        except ValueError as error:
            raise SystemExit(f"{path}: {error}; mend the file, or leave it out with `ignore`.") from None
        place = {"file": file, "start": record.start, "end": record.end, "line": record.line}
        row = {**place, "raw_id": hashlib.sha256(record.raw).digest()[:16], "n_chars": 0}
        drop = judge(content, params)
        if drop:
            ledger.append({**row, "rule": drop.rule, "evidence": drop.evidence})
            continue
        identity = doc_id(content)
        parts = [content] if isinstance(content, str) else [message["content"] for message in content]
        ledger.append({**row, "doc_id": identity, "n_chars": sum(map(len, parts))})
        kept.append({"doc_id": identity, **place, column: content})
    return pa.RecordBatch.from_pylist(kept, schema), pa.RecordBatch.from_pylist(ledger, LEDGER)


def documents_schema(params: Params) -> pa.Schema:
    """Return the schema of `documents`: `text` or `messages`, by format."""
    return CHAT_DOCUMENTS if params.format == "alpaca" else TEXT_DOCUMENTS


def raw_files(root: Path, params: Params) -> list[str]:
    """Return the files to read, relative to `root`, sorted; the file's own name when `root` is one.

    Raises SystemExit for a file of another kind, and for what is neither file nor folder, e.g. a link to a folder.
    """
    folder, names = root.parent, [root.name]
    if root.is_dir():
        folder, names = root, sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))
        names = [name for name in names if not any(fnmatch(part, p) for part in name.split("/") for p in params.ignore)]
        names = [name for name in names if (folder / name).is_symlink() or not (folder / name).is_dir()]
    for name in names:
        if not (folder / name).is_file():
            raise SystemExit(
                f"{folder / name} is a link to a folder, or to nothing; put the files there, or name it in `ignore`."
            )
        if not name.lower().endswith(SUFFIXES[params.format]):
            raise SystemExit(
                f"{folder / name}: format {params.format} reads {' and '.join(SUFFIXES[params.format])} files; "
                "move it elsewhere or name it in `ignore`, so that nothing is left out in silence."
            )
        if name != name.encode(errors="replace").decode():
            raise SystemExit(f"{folder / name}: the file's name is not UTF-8, so the ledger cannot name it; rename it.")
    if not names:
        raise SystemExit(f"{root} holds no file to read; put {' or '.join(SUFFIXES[params.format])} files there.")
    return names


def _clean_group(root: Path, files: list[str], params: Params) -> list[tuple[pa.RecordBatch, pa.RecordBatch]]:
    return [clean_file(root, file, params) for file in files]


def cleaned(root: Path, files: list[str], params: Params) -> Iterator[tuple[pa.RecordBatch, pa.RecordBatch]]:
    """Yield what `clean_file` gives for each of `files`, in order, from as many processes as `stage.workers()`."""
    groups: list[list[str]] = [[]]
    size = 0
    for file in files:
        length = (root / file if root.is_dir() else root).stat().st_size
        if groups[-1] and size + length > TASK_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += length
    if len(groups) == 1 or stage.workers() == 1:
        yield from (clean_file(root, file, params) for file in files)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(stage.workers(), context, stage.die_with_parent) as pool:
        for future in [pool.submit(_clean_group, root, group, params) for group in groups]:
            yield from future.result()


def main(name: str) -> None:
    params = read_params(f"sources.{name}.clean", Params)
    where = read_params(f"sources.{name}", Source)
    root = Path(where.path)
    with stage.run("clean", name, [where.path], [f"data/clean/{where.phase}/{name}"]) as run:
        (folder,) = run.outputs
        files = raw_files(root, params)
        per_file: dict[str, dict[str, int]] = {}
        dropped: Counter[str] = Counter()
        documents = arrow.Writer(folder / "documents", documents_schema(params), batch_rows=256)
        ledger = arrow.Writer(folder / "ledger", LEDGER)
        for file, (kept, rows) in zip(
            files, run.progress(cleaned(root, files, params), len(files), "files"), strict=True
        ):
            ends = rows["end"].to_pylist()
            size = (root / file if root.is_dir() else root).stat().st_size
            counts = Counter(rows["rule"].to_pylist())
            run.balance(f"bytes of {file}", size, recorded=sum(ends) - sum(rows["start"].to_pylist()))
            run.balance(f"records of {file}", rows.num_rows, kept=kept.num_rows, dropped=rows.num_rows - counts[None])
            dropped.update(rule for rule in counts.elements() if rule)
            per_file[file] = {"bytes": size, "records": rows.num_rows, "kept": kept.num_rows}
            documents.write(kept)
            ledger.write(rows)
        documents.close()
        ledger.close(kept=documents.rows, **{f"dropped_{rule}": count for rule, count in sorted(dropped.items())})
        run.balance("records", ledger.rows, kept=documents.rows, dropped=dropped.total())
        if not documents.rows:
            raise SystemExit(
                f"{root}: none of its {ledger.rows} records was kept ({dict(dropped)}); see the rules in {name}.clean."
            )
        about = params.model_dump(include={"license", "owner", "origin", "language", "format"})
        arrow.write_json(folder / "source.json", {**about, "files": per_file})
        run.count(files=len(files), records=ledger.rows, kept=documents.rows, dropped=dropped.total())


if __name__ == "__main__":
    stage.cli(main, __doc__)
