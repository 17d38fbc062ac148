"""Turn raw files into documents, with a ledger row for every raw record.

Reads:  the source's `path` in data/raw (a file or a folder), the lists in data/rules that its rules name
Writes: data/clean/PHASE/SOURCE/documents       kept records, in the order of file name and place in the file
        data/clean/PHASE/SOURCE/ledger          every raw record: where it stands, kept or dropped, by which rule
        data/sources/PHASE/SOURCE/source.json   licence, owner, origin and so on, how it was read, counts: apart, so
                                                that of later stages a corrected note re-runs describe_model alone
Params: sources.SOURCE.clean

Example, `format: text`, `sample_by: line`, the file a.txt being b"Cafe\\xcc\\x81\\r\\n\\nlast":

    documents: "Café" (bytes 0-8, line 1), "last" (bytes 9-13, line 3)
    ledger:    those two with rule null, the first with changes "nfc 1"; bytes 8-9, line 2 with rule `empty`

What a record is in each format, and its place, says raw_formats.py; what is done to it, clean_rules.py. A conversation
becomes messages (raw_rows.py); one without an answer to learn is dropped by `no_answer`. Work goes by shards of about 4
MB, each a file of `documents`, that .memo/ remembers, so a new file costs its own shard. A csv, json, html, PDF, Word,
Parquet or compressed file is one shard; of a large one, which is read as a stream, the documents are cut.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

if __name__ == "__main__":  # before numpy is imported
    from kit.start import lean

    lean()

import numpy as np
import pyarrow as pa
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import to_json

import byte_formats
import clean_rules
import list_rules
import raw_formats
import raw_params
import raw_records
import raw_shards
from kit import arrow, stage
from kit.arrow import compute as pc
from kit.memo import Made, Memo, Result
from kit.params import Source, read_params
from raw_shards import Piece, Shard, paths, raw_files, shards
from record_places import Account, moved, shard_key

PLACE = [
    pa.field("file", pa.string()),  # relative to the source's path; the file's own name when that is a file
    pa.field("start", pa.int64()),  # first byte in the (decompressed) file, and the byte after the last; null where a
    pa.field("end", pa.int64()),  # record is a row, page or paragraph
    pa.field("number", pa.int32()),  # 1-based, of the line on which it starts, or of the row, page, paragraph
]
# learn: false is an answer that is not to be learned; null says that the role decides.
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("learn", pa.bool_())]))
TEXT_DOCUMENTS = pa.schema([pa.field("doc_id", pa.binary(16)), *PLACE, pa.field("text", pa.string())])
CHAT_DOCUMENTS = pa.schema([pa.field("doc_id", pa.binary(16)), *PLACE, pa.field("messages", MESSAGES)])
LEDGER_ROWS = 4096  # in a batch, each with dictionaries of its own
LEDGER = pa.schema(
    [
        pa.field("file", pa.dictionary(pa.int16(), pa.string())),
        pa.field("end", pa.int64()),  # as in PLACE; it starts where the record before it in the file ends, or at 0
        pa.field("number", pa.int32()),
        pa.field("raw_id", pa.binary(16)),  # of the record's bytes as they stand in the file
        pa.field("rule", pa.dictionary(pa.int8(), pa.string())),  # null: kept, and the next one of the documents
        pa.field("evidence", pa.dictionary(pa.int16(), pa.string())),
        pa.field("changes", pa.dictionary(pa.int16(), pa.string())),  # e.g. "nfc 1, pii 2"; null: nothing changed
    ]
)
IDS = [pa.field(name, pa.binary(16)) for name in ("raw_id", "doc_id")]
REASONS = [pa.field(name, pa.string()) for name in ("rule", "evidence", "changes")]
RECORDS = pa.schema([*PLACE, *IDS, *REASONS])  # what is known of a record before documents and ledger part
NOTED = pa.schema([*PLACE, IDS[0], *REASONS])  # of them, in `.memo/`
BATCH_BYTES = 2**20  # of text, held as Python values at a time
GROUP_BYTES = 2**16  # of raw records that the rules look at together: more would only leave the processor's cache

# By encoding: in GB18030 the three bytes of UTF-8's mark begin a Chinese character or two.
BYTE_ORDER_MARKS = {
    "utf-8": (b"\xef\xbb\xbf",),
    "gb18030": (b"\x84\x31\x95\x33",),
    "utf-16": (b"\xff\xfe", b"\xfe\xff"),
}


def _text_of_day(day: Any) -> Any:
    """Return a year, which YAML reads as a number, as text; of a date of YAML, DVC ends with a traceback."""
    if isinstance(day, datetime.date):
        raise ValueError(f"put the day in quotes: '{day:%Y-%m-%d}'; DVC cannot take a date of YAML")
    return str(day) if isinstance(day, int) else day


def _is_day(day: str) -> str:
    """Return a day, month or year that there is, or `unknown`."""
    try:
        datetime.date.fromisoformat("2000-01-01" if day == "unknown" else day + "-01-01"[len(day) - 4 :])
    except ValueError as error:
        raise ValueError(f"there is no such day: {day}; correct it") from error
    return day


Day = Annotated[
    str, BeforeValidator(_text_of_day), Field(pattern=r"^(unknown|\d{4}(-\d\d){0,2})$"), AfterValidator(_is_day)
]


class Params(raw_params.Params):
    """`sources.SOURCE.clean`: how the raw files are read, what is kept, where they come from."""

    ignore: list[str] = Field(
        [],
        description="files to leave out, as shell patterns of a name, a folder's name or a path below `path`; hidden "
        "ones (.*) always are, and any other file must be readable",
    )
    on_error: Literal["fail", "drop"] = Field(
        "fail", description="a record that cannot be read stops the stage, or is dropped by the rule `unreadable`"
    )
    rules: list[clean_rules.Rule] = Field(
        clean_rules.DEFAULT_RULES,
        validate_default=True,
        description="applied in order; a name, or {rule: name, ...}: see stages/*_rule*.py",
    )
    license: str = Field(
        min_length=1, pattern=r"\S", description="SPDX identifier or name of the licence; `unknown` says so explicitly"
    )
    owner: str = Field("unknown", description="who holds the rights")
    origin: str = Field("unknown", description="where the text was taken from")
    language: str = Field("unknown", description="BCP 47 tags, e.g. `en` or `zh`")
    collected_on: Day = Field("unknown", description="e.g. '2026-11-21' (in quotes) or 2026")
    purpose: str = Field("unknown", description="what the text was collected for")

    @model_validator(mode="after")
    def _rules_suit(self) -> Params:
        if self.record == "text" and any(rule.rule == "turns" for rule in self.rules):
            raise ValueError("the rule `turns` is for conversations, and `record: text` reads none; remove it")
        return self


NOTES = ("license", "owner", "origin", "language", "collected_on", "purpose")  # they change no document
ABOUT = (*NOTES, "format", "record", "encoding")


class Work(NamedTuple):
    """A shard."""

    shard: Shard
    params: Params
    guard: stage.Guard  # of their files
    elsewhere: Result | None  # of the same bytes at another place in the file


def libraries(params: Params) -> dict[str, str]:
    """Return the version of each library that only this format and these rules need; `Run.versions` has the others."""
    import importlib.metadata  # 17 ms that the start of other stages does not wait for

    known = raw_records.LIBRARIES
    needed = {known[name] for name in (params.format, *(rule.rule for rule in params.rules)) if name in known}
    found = {name: next(iter(importlib.metadata.distributions(name=name)), None) for name in sorted(needed)}
    return {name: dist.version for name, dist in found.items() if dist}  # the first is the one that is imported


def documents_schema(params: Params) -> pa.Schema:
    """Return the schema of `documents`: `text` or `messages`, by kind of record."""
    return TEXT_DOCUMENTS if params.record == "text" else CHAT_DOCUMENTS


def doc_id(content: raw_records.Content) -> bytes:
    """Return the identity of a document: the first 16 bytes of the SHA-256 of its content, as `_in_bytes` writes it."""
    return hashlib.sha256(_in_bytes(content)).digest()[:16]


def _in_bytes(content: raw_records.Content) -> bytes:
    """Return a text in UTF-8; messages as json.dumps writes them with sorted keys, not escaped, in a tenth of its time.

    Not what is learned of them: the same words are one document, on one side of the split, excluded together.

    >>> _in_bytes([{"role": "user", "content": "说\\n"}]).decode()
    '[{"content": "说\\\\n", "role": "user"}]'
    """
    if isinstance(content, str):
        return content.encode()
    turns = [b'{"content": %b, "role": "%b"}' % (to_json(turn["content"]), turn["role"].encode()) for turn in content]
    return b"[%b]" % b", ".join(turns)


def judge(
    content: raw_records.Content, params: Params, idle: Collection[int] = ()
) -> tuple[Any, dict[str, int], tuple[str, str] | None]:
    """Return the cleaned content or None, the changes by rule, and the rule and evidence when it is dropped.

    Whatever the rules are, nothing blank is kept, neither an empty text nor a message without words but a tool's, and
    no conversation of which nothing is learned. `idle`: see `clean_rules.idle_rules`.

    >>> judge([{"role": "user", "content": "Why?"}], Params(format="jsonl", license="unknown", rules=[]))[2]
    ('no_answer', 'the assistant says nothing that is learned')
    """
    new: Any
    if isinstance(content, str):
        blank = _is_blank(content)
        new, changes, drop = clean_rules.apply_rules(content, [] if blank else params.rules, idle)
        blank = drop is None and (_is_blank(new) if changes else blank)
    else:
        blanks = [number for number, message in enumerate(content, start=1) if _is_blank(message["content"])]
        new, changes, drop = clean_rules.apply_to_messages(content, params.rules, () if blanks else idle)
        if drop:
            return None, changes, drop
        for number in blanks:
            if (role := content[number - 1]["role"]) != "tool":
                return None, changes, ("empty", f"message {number} ({role}) is nothing but white space")
        if not any(_is_learned(message) for message in content):
            return None, changes, ("no_answer", "the assistant says nothing that is learned")
        return new, changes, None
    return (None, changes, ("empty", "nothing but white space")) if blank else (new, changes, drop)


def _is_learned(message: raw_records.Message) -> bool:
    return message["role"] == "assistant" and message.get("learn") is not False


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


Found = tuple[Piece, raw_records.Record]


def cleaned(pieces: list[Piece], params: Params) -> Iterator[tuple[pa.RecordBatch, bool]]:
    """Yield the ledger rows of pieces, with the text or messages of the kept ones, in batches of about 1 MB.

    `start`, `end` and `number` count from the beginning of the piece. With each batch: whether it is right for another
    place in the file, too, which is not so when an error in it names a line. Raises SystemExit for an error that is to
    stop.
    """
    rows: list[tuple[Any, ...]] = []
    group: list[Found] = []
    size, group_size, movable = 0, 0, True
    for piece in pieces:
        part = None if piece.end is None else raw_records.Part(piece.start, piece.end, piece.before + 1)
        for record in raw_formats.records(piece.path, params, part):
            if record.error and params.on_error == "fail":
                hint = ""
                if params.encoding.upper() in record.error:
                    hint = (
                        ", name its `encoding` (gb18030, utf-16; any other: `iconv -f windows-1252 -t utf-8 OLD > NEW`)"
                    )
                elif " has no column " in record.error or " has no field " in record.error:
                    hint = ", name what it has in `columns`"
                raise SystemExit(
                    f"{piece.path}: {record.error}; mend the file{hint}, leave it out with `ignore`, or drop what "
                    "cannot be read with `on_error: drop`."
                )
            if params.fill and (name := raw_formats.unnamed(record, params.fill)):
                raise SystemExit(
                    f"{piece.path}: {raw_params.unit(params)} {record.number} holds {{{{{name}}}}}, which `fill` does "
                    f"not name; give it a value, or {name}: '{{{{{name}}}}}' to keep it as it is."
                )
            movable = movable and not (record.error and piece.start)
            group.append((piece, record))
            group_size += len(record.raw)
            if group_size >= GROUP_BYTES:
                rows += rows_of(group, params)
                size += group_size
                group, group_size = [], 0
                if size >= BATCH_BYTES:
                    yield _batch(rows, params), movable
                    rows, size, movable = [], 0, True
    if group:
        rows += rows_of(group, params)
    if rows:
        yield _batch(rows, params), movable


def rows_of(group: list[Found], params: Params) -> list[tuple[Any, ...]]:
    """Return `row_of` each record, the rules looking at all of them first: at those of ASCII, and at the others."""
    texts: dict[bool, list[str]] = {True: [], False: []}
    kinds = []
    for _, record in group:
        content = record.content
        if isinstance(content, str):
            kind = content.isascii()
            texts[kind].append(content)
        else:
            kind = all(message["content"].isascii() for message in content)
            texts[kind] += [message["content"] for message in content]
        kinds.append(kind)
    # It takes four times the memory of the texts, so a book of megabytes, which can only be the last one, goes without.
    look = len(group[-1][1].raw) < BATCH_BYTES
    idle = {kind: clean_rules.idle_rules(texts[kind], params.rules) if look else () for kind in texts}
    return [row_of(piece, record, params, idle[kind]) for (piece, record), kind in zip(group, kinds, strict=True)]


def row_of(piece: Piece, record: raw_records.Record, params: Params, idle: Collection[int] = ()) -> tuple[Any, ...]:
    """Return what `RECORDS` names of a record, and its cleaned content: messages, or a text in UTF-8."""
    start, end, number, raw, content, error, filled = record
    kept: Any
    kept, changes, drop = (None, {}, ("unreadable", error)) if error else judge(content, params, idle)
    if start == 0 and raw.startswith(BYTE_ORDER_MARKS[params.encoding]):
        changes = {"byte_order_mark": 1, **changes}
    if filled:
        changes = {f"fill:{name}": filled.count(name) for name in sorted(set(filled))} | changes
    noted = ", ".join(f"{name} {count}" for name, count in changes.items()) if changes else None
    number -= piece.before
    if start is not None and end is not None:
        start, end = start - piece.start, end - piece.start
    identity, rule, evidence = None, None, None
    if drop:
        rule, evidence = drop
    else:
        said = _in_bytes(kept)
        identity = hashlib.sha256(said).digest()[:16]
        kept = said if isinstance(kept, str) else kept
    return piece.file, start, end, number, hashlib.sha256(raw).digest()[:16], identity, rule, evidence, noted, kept


def in_fill(changes: str) -> list[str]:
    """Return the placeholders that a ledger row's changes name.

    >>> in_fill("fill:name 2, nfc 1")
    ['name']
    """
    return re.findall(r"fill:([^{}]+?) \d+(?:, |$)", changes)


def _rows_schema(params: Params) -> pa.Schema:
    return pa.schema([*RECORDS, documents_schema(params)[-1]])


def _batch(rows: list[tuple[Any, ...]], params: Params) -> pa.RecordBatch:
    schema = _rows_schema(params)
    *known, contents = zip(*rows, strict=True)
    arrays = [pa.array(column, field.type) for column, field in zip(known, schema, strict=False)]
    if params.record == "text":
        arrays.append(pa.array(contents, pa.binary()).view(pa.string()))
    else:
        arrays.append(pa.array(contents, MESSAGES))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def clean_shard(work: Work) -> Made:
    """Return the files `documents` and `ledger` of a shard, numbered; in the latter places count from its beginning."""
    first, params = work.shard.pieces[0], work.params
    notes: dict[str, Any] = {"content": work.shard.content, "start": first.start, "before": first.before}
    schema = documents_schema(params)
    if work.shard.large:
        notes |= {"rows": [], "movable": False}
        return Made(streamed(work, notes["rows"]), notes)
    if work.elsewhere:
        there = work.elsewhere.notes
        documents = pa.ipc.open_stream(work.elsewhere.files["documents-00000"].read_bytes()).read_all()
        documents = moved(documents, first.start - there["start"], first.before - there["before"])
        ledger = work.elsewhere.files["ledger-00000"].read_bytes()
        notes = {**there, **notes}
    else:
        found = list(cleaned(work.shard.pieces, params))
        rows = pa.Table.from_batches([batch for batch, _ in found])
        documents = moved(kept(rows, schema), first.start, first.before)
        work.guard.check()
        notes |= {"rows": [documents.num_rows], "movable": all(movable for _, movable in found)}
        ledger = arrow.encode(rows.select(NOTED.names), NOTED, LEDGER_ROWS)
    return Made([("documents-00000", arrow.encode(documents, schema)), ("ledger-00000", ledger)], notes)


def kept(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the documents among records."""
    documents = rows.filter(rows["doc_id"].is_valid()) if rows["doc_id"].null_count else rows
    return documents.select(schema.names)


def cut_lines(work: tuple[Path, stage.Guard]) -> Made:
    """Return where a file of lines is cut, as notes alone."""
    path, guard = work
    found = list(raw_shards.line_shards(path))
    guard.check()
    return Made([], {"lines": found})


def streamed(work: Work, counts: list[int]) -> Iterator[tuple[str, pa.Buffer]]:
    """Yield the files of a shard that is too large to be held, documents cut by content; `counts` takes their rows."""
    schema = documents_schema(work.params)
    waiting, records = schema.empty_table(), NOTED.empty_table()
    ledgers = itertools.count()

    def documents(rows: pa.Table) -> tuple[str, pa.Buffer]:
        counts.append(rows.num_rows)
        return f"documents-{len(counts) - 1:05}", arrow.encode(rows, schema)

    def ledger() -> tuple[str, pa.Buffer]:
        return f"ledger-{next(ledgers):05}", arrow.encode(records, NOTED, LEDGER_ROWS)

    for batch, _ in cleaned(work.shard.pieces, work.params):
        rows = pa.Table.from_batches([batch])
        waiting = pa.concat_tables([waiting, kept(rows, schema)])
        records = pa.concat_tables([records, rows.select(NOTED.names)])
        if waiting.nbytes >= 3 * raw_shards.SHARD_BYTES:
            *whole, waiting = by_content(waiting)  # the last one may go on
            yield from map(documents, whole)
        if records.num_rows >= 16 * LEDGER_ROWS:
            yield ledger()
            records = NOTED.empty_table()
    work.guard.check()
    yield from map(documents, by_content(waiting))
    yield ledger()


def by_content(documents: pa.Table) -> list[pa.Table]:
    """Return documents in shards; none where there are none."""
    rows = documents.combine_chunks()
    if not rows.num_rows:
        return []
    identities = raw_shards.row_hashes(rows["doc_id"].chunk(0))
    ends = raw_shards.cuts(identities, text_bytes(rows[-1].chunk(0)), raw_shards.SHARD_BYTES)
    return [rows.slice(begin, end - begin) for begin, end in itertools.pairwise([0, *ends])]


def text_bytes(content: pa.Array) -> np.ndarray:
    """Return the bytes (int64) of each text, or of what the messages of each conversation say."""
    if pa.types.is_string(content.type):
        return pc.binary_length(content).to_numpy().astype(np.int64)
    reach = np.cumsum(np.append(0, pc.binary_length(content.values.field("content")).to_numpy()), dtype=np.int64)
    return np.diff(reach[content.offsets.to_numpy()])


def _stands(params: Params, root: Path, files: list[str]) -> bool:
    """Return whether the separator of texts matches anywhere, perhaps where each file begins."""
    found = (record.content for file in files for record in raw_formats.records(paths(root, file)[0], params))
    return any(True for text in found for _ in byte_formats.matches(str(params.separator), str(text), 0))


def main(name: str) -> None:
    params = read_params(f"sources.{name}.clean", Params)
    where = read_params(f"sources.{name}", Source)
    root = Path(where.path)
    outputs = [f"data/{kind}/{where.phase}/{name}" for kind in ("clean", "sources")]
    with stage.run("clean", name, [str(root), str(list_rules.FOLDER)], outputs) as run:
        folder, beside = run.outputs
        for rule in params.rules:
            rule.load()
        run.guards[str(list_rules.FOLDER)].check()
        run.versions |= libraries(params)
        files, ignored = raw_files(root, params, params.ignore)
        lists = run.files[str(list_rules.FOLDER)]
        memo = Memo(
            Path(".memo") / run.name,
            run.recipe(
                [
                    params.model_dump(exclude=set(NOTES)),
                    [[file, lists[file]] for file in clean_rules.files(params.rules)],
                ]
            ),
        )
        guard = run.guards[str(root)]
        # A large file that has not changed is not read to be cut again.
        ends = Memo(Path(".memo") / f"{run.name}.lines", run.recipe("lines"))

        def lines(path: Path, sha256: str | None) -> list[raw_shards.LineShard]:
            work = [(str(sha256), (path, guard.of([path])))]
            (result,) = ends.map(work, cut_lines, 1, stage.die_with_parent)
            return [(start, end, before, digest) for start, end, before, digest in result.notes["lines"]]

        account = Account(run, root, params)
        dropped: Counter[str] = Counter()
        changed = moves = 0
        filled: set[str] = set()
        example: list[str] = []
        schema = documents_schema(params)
        documents = arrow.Shards(folder / "documents", schema)
        ledger = arrow.Writer(folder / "ledger", LEDGER, batch_rows=LEDGER_ROWS)
        size = sum(path.stat().st_size for file in files for path in paths(root, file))
        places = {note["content"]: (note["start"], note["before"]) for note in memo.notes() if note.get("movable")}

        def work() -> Iterator[tuple[str, Work]]:
            nonlocal moves
            for shard in shards(root, files, run.files[str(root)], params, lines):
                first, content = shard.pieces[0], shard.content
                key = shard_key(content, first.start, first.before)
                elsewhere = None
                if content in places and not memo.find(key):
                    elsewhere = memo.find(shard_key(content, *places[content]))
                    moves += elsewhere is not None
                inside = [path for piece in shard.pieces for path in paths(root, piece.file)]
                yield key, Work(shard, params, guard.of(inside), elsewhere)

        def note(records: pa.RecordBatch, start: int = 0, before: int = 0) -> None:
            nonlocal changed
            rows = account.place(records, start, before)
            ledger.write(rows.select(LEDGER.names))
            dropped.update(rule for rule in rows["rule"].to_pylist() if rule)
            if dropped and not example:
                example.extend(rows["evidence"].drop_null()[:1].to_pylist())
            changed += rows.num_rows - rows["changes"].null_count
            if params.fill:
                filled.update(name for noted in rows["changes"].drop_null().to_pylist() for name in in_fill(noted))

        done = memo.map(work(), clean_shard, stage.workers(), stage.die_with_parent)
        for result in run.progress(done, -(-size // raw_shards.SHARD_BYTES), "shards"):
            counts = iter(result.notes["rows"])
            for part in sorted(result.files):
                if part.startswith("documents"):
                    documents.add(result.files[part], next(counts), result.sha256[part])
                else:
                    for batch in pa.ipc.open_stream(result.files[part].read_bytes()):
                        note(batch, result.notes["start"], result.notes["before"])
        account.close(account.file, account.end)
        if idle := [name for name in params.fill if name not in filled]:
            raise SystemExit(
                f"sources.{name}.clean.fill: {{{{{idle[0]}}}}} stands in no record of {root}; correct or remove it."
            )
        run.balance("files", len(files), recorded=account.files)
        documents.close()
        ledger.close(kept=documents.rows, **{f"dropped_{rule}": count for rule, count in sorted(dropped.items())})
        run.balance("records", ledger.rows, kept=documents.rows, dropped=dropped.total())
        if not documents.rows:
            raise SystemExit(
                f"{root}: none of its {ledger.rows} records was kept, by "
                f"{', '.join(f'{rule} ({count})' for rule, count in dropped.most_common())}: {example[0]}; "
                f"see sources.{name}.clean in params.yaml."
            )
        if params.separator and ledger.rows == len(files) and not _stands(params, root, files):
            raise SystemExit(
                f"sources.{name}.clean.separator: `{params.separator}` stands in no file of {root}, so each is one "
                "record; correct it, or say that this is meant with `sample_by: document`."
            )
        counts = {"files": len(files), "records": ledger.rows, "kept": documents.rows, "dropped": dropped.total()}
        about = params.model_dump(include=set(ABOUT))
        about |= {**counts, "bytes": size, "changed": changed, "unit": raw_params.unit(params)}
        arrow.write_json(beside / "source.json", about)
        memo.sweep()
        ends.sweep()
        run.count(**counts, ignored_files=ignored, changed=changed)
        run.count(shards=memo.hits + memo.misses, shards_remembered=memo.hits + moves)


if __name__ == "__main__":
    stage.cli(main, __doc__)
