"""kit/arrow: the same rows are the same bytes however they arrive, and `datasets` opens them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import add_bos_eos
import clean
import dedup
import group_blocks
import tokenize_text
from kit import arrow

NUMBERS = pa.schema([("n", pa.int32())])
# Every type that a stage writes, and nulls where Arrow allows them.
ROW = {
    "doc_id": st.none() | st.binary(min_size=16, max_size=16),
    "text": st.none() | st.text(max_size=4),
    "rule": st.none() | st.text(max_size=1),
    "flag": st.none() | st.booleans(),
    "similarity": st.none() | st.floats(0, 1, width=32),
    "input_ids": st.none() | st.lists(st.integers(0, 2**16 - 1), max_size=5),
    "learn": st.none() | st.lists(st.none() | st.booleans(), max_size=5),
    "block": st.lists(st.booleans(), min_size=3, max_size=3),
    "segments": st.none()
    | st.lists(st.none() | st.fixed_dictionaries({"text": st.text(max_size=3), "special": st.booleans()}), max_size=3),
}
SCHEMA = pa.schema(
    [
        ("doc_id", pa.binary(16)),
        ("text", pa.string()),
        ("rule", pa.dictionary(pa.int8(), pa.string())),
        ("flag", pa.bool_()),
        ("similarity", pa.float32()),
        ("input_ids", pa.list_(pa.uint16())),
        ("learn", pa.list_(pa.bool_())),
        ("block", pa.list_(pa.bool_(), 3)),
        ("segments", pa.list_(pa.struct([("text", pa.string()), ("special", pa.bool_())]))),
    ]
)
IDENTITY = {"doc_id": bytes(range(16))}
PLACE = {"file": "a/文 1.txt", "start": 0, "end": 9, "number": 1}
MESSAGES = [
    {"role": "user", "content": "2+2?", "learn": None},
    {"role": "assistant", "content": "5", "learn": False},
]
TOKENS = {**IDENTITY, "split": "train", "input_ids": [0, 65535, 1]}
NOTES = {"rule": "empty", "evidence": "é", "changes": None}
LEDGER = {"file": "a/文 1.txt", "end": 9, "number": 1, "raw_id": bytes(16), **NOTES}
REASON = {"rule": "exact_duplicate", "twin": "a/1", "similarity": 1.0, "cluster": "a/1", "evidence": None}
DECISION = {**IDENTITY, "split": "dropped", **REASON}
KINDS: dict[str, tuple[pa.Schema, dict[str, Any]]] = {
    "text documents": (clean.TEXT_DOCUMENTS, {**IDENTITY, **PLACE, "text": "Hi </s>\n"}),
    "chat documents": (clean.CHAT_DOCUMENTS, {**IDENTITY, **PLACE, "messages": MESSAGES}),
    "ledger": (clean.LEDGER, LEDGER),
    "dedup": (dedup.DECISIONS, DECISION),
    "marked": (
        add_bos_eos.MARKED,
        {**IDENTITY, "split": "eval", "segments": [{"text": "<s>", "special": True, "learn": False}]},
    ),
    "tokens": (tokenize_text.tokens_schema(pa.uint16(), learn=False), TOKENS),
    "tokens with learn": (
        tokenize_text.tokens_schema(pa.uint32(), learn=True),
        {**TOKENS, "learn": [False, True, True]},
    ),
    "blocks": (group_blocks.blocks_schema(pa.uint16(), 3, learn=False), {"input_ids": [0, 65535, 1]}),
    "blocks with learn": (
        group_blocks.blocks_schema(pa.uint32(), 3, learn=True),
        {"input_ids": [0, 2**31, 1], "learn": [False, True, True]},
    ),
}


def written(tables: list[pa.Table], schema: pa.Schema = SCHEMA, **options: int) -> dict[str, bytes]:
    """Return the files of a folder into which `tables` were written one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        with arrow.Writer(Path(folder), schema, **options) as out:
            for table in tables:
                out.write(table)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def numbers(*values: int) -> pa.Table:
    return pa.table({"n": pa.array(values, pa.int32())})


@given(
    rows=st.lists(st.fixed_dictionaries(ROW), max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    batch_rows=st.sampled_from([1, 3, 8, 16]),
)
def test_the_same_rows_are_the_same_bytes_for_any_chunking(
    rows: list[dict[str, Any]], cuts: list[int], batch_rows: int
) -> None:
    """Whole, as slices, as tables of their own or as one table of many chunks; empty pieces included."""
    bounds = sorted({0, len(rows), *(min(cut, len(rows)) for cut in cuts)})
    ranges = [*itertools.pairwise(bounds), (0, 0)]
    whole = pa.Table.from_pylist(rows, SCHEMA)
    apart = [pa.Table.from_pylist(rows[start:end], SCHEMA) for start, end in ranges]
    expected = written([whole], batch_rows=batch_rows, shard_bytes=4000)
    for pieces in ([whole.slice(start, end - start) for start, end in ranges], apart, [pa.concat_tables(apart)]):
        assert written(pieces, batch_rows=batch_rows, shard_bytes=4000) == expected


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int8(), pa.string())])
def test_a_batch_carries_no_bytes_of_the_rows_beside_it(kind: pa.DataType) -> None:
    """Arrow would write up to 64 bytes beyond the end of a slice; an erased neighbour must leave no trace."""
    rows = pa.table({"text": pa.array(["public", "secret"], kind)})
    files = written([rows], rows.schema, batch_rows=1, shard_bytes=1)
    encoded = bytes(arrow.encode(rows.slice(0, 1), rows.schema)) if kind == pa.string() else b"public"
    for content in (files["data-00000.arrow"], encoded):
        assert b"public" in content
        assert b"secret" not in content


@pytest.mark.parametrize(("beyond", "shards"), [(0, [8, 5]), (1, [12, 1])])
def test_batches_have_fixed_rows_and_shards_end_at_the_limit(tmp_path: Path, beyond: int, shards: list[int]) -> None:
    """A shard is closed at the first batch end at or beyond `shard_bytes`; the last batch takes what is left."""
    end_mark = 8
    two_batches = len(written([numbers(*range(8))], NUMBERS, batch_rows=4)["data-00000.arrow"]) - end_mark
    with arrow.Writer(tmp_path, NUMBERS, batch_rows=4, shard_bytes=two_batches + beyond) as out:
        out.write(numbers(*range(13)))
    assert [batch.num_rows for batch in arrow.batches(tmp_path)] == [4, 4, 4, 1]
    found = arrow.manifest(tmp_path)["shards"]
    assert [(shard["name"], shard["rows"]) for shard in found] == list(
        zip(["data-00000.arrow", "data-00001.arrow"], shards, strict=True)
    )


def test_whole_shards_make_a_folder_and_those_without_rows_are_left_out(tmp_path: Path) -> None:
    """From memory, from a file, or none at all."""
    shards = [arrow.encode(numbers(*values), NUMBERS) for values in ((1, 2), (), (3,))]
    (tmp_path / "made").write_bytes(shards[2])
    with arrow.Shards(tmp_path / "some", NUMBERS) as some, arrow.Shards(tmp_path / "none", NUMBERS) as none:
        for out in (some, none):
            out.add(shards[1], 0)
        some.add(shards[0], 2)
        some.add(tmp_path / "made", 1, hashlib.sha256(shards[2]).hexdigest())
    for name, values, rows in (("some", [1, 2, 3], [2, 1]), ("none", [], [0])):
        manifest = arrow.manifest(tmp_path / name)
        assert arrow.table(tmp_path / name)["n"].to_pylist() == values
        assert (manifest["counts"], [shard["rows"] for shard in manifest["shards"]]) == ({"rows": sum(rows)}, rows)
        for shard in manifest["shards"]:
            assert shard["sha256"] == hashlib.sha256((tmp_path / name / shard["name"]).read_bytes()).hexdigest()


def test_the_rows_of_a_batch_are_part_of_the_format(tmp_path: Path) -> None:
    """Other numbers would give every folder other bytes."""
    with arrow.Writer(tmp_path, NUMBERS) as out:
        out.write(numbers(*range(2100)))
    assert [batch.num_rows for batch in arrow.batches(tmp_path)] == [1024, 1024, 52]
    encoded = pa.ipc.open_stream(arrow.encode(numbers(*range(600)), NUMBERS))
    assert [batch.num_rows for batch in encoded] == [256, 256, 88]


def test_a_reader_gets_the_columns_that_it_asks_for(tmp_path: Path) -> None:
    rows = pa.table({"a": [1], "b": [2], "c": [3]})
    with arrow.Writer(tmp_path, rows.schema) as out:
        out.write(rows)
    assert arrow.table(tmp_path, ["c", "a"]).to_pydict() == {"c": [3], "a": [1]}
    assert [batch.to_pydict() for batch in arrow.batches(tmp_path, ["c", "a"])] == [{"c": [3], "a": [1]}]


def test_a_shard_that_fills_with_the_last_row_leaves_no_empty_one_behind(tmp_path: Path) -> None:
    with arrow.Writer(tmp_path, NUMBERS, batch_rows=2, shard_bytes=1) as out:
        out.write(numbers(*range(4)))
    assert [shard["rows"] for shard in arrow.manifest(tmp_path)["shards"]] == [2, 2]


def test_manifest_has_counts_schema_and_the_digest_of_each_shard(tmp_path: Path) -> None:
    with arrow.Writer(tmp_path, NUMBERS, batch_rows=2, shard_bytes=1) as out:
        out.write(numbers(1, 2, 3))
        out.counts = {"tokens": 7}
    manifest = arrow.manifest(tmp_path)
    assert manifest["counts"] == {"rows": 3, "tokens": 7}
    assert manifest["schema"] == {"n": "int32"}
    for shard in manifest["shards"]:
        assert shard["sha256"] == hashlib.sha256((tmp_path / shard["name"]).read_bytes()).hexdigest()


def test_the_fingerprint_follows_the_content_alone(tmp_path: Path) -> None:
    """`datasets` keys its caches on it: equal for equal rows and counts elsewhere, different for other rows."""
    prints = []
    for name, values in (("a", (1, 2)), ("b", (1, 2)), ("c", (1, 3))):
        with arrow.Writer(tmp_path / name, NUMBERS) as out:
            out.write(numbers(*values))
            out.counts = dict(sorted({"x": 1, "y": 2}.items(), reverse=name == "b"))
        prints.append(datasets.load_from_disk(str(tmp_path / name))._fingerprint)
    assert prints[0] == prints[1] != prints[2]


# `datasets` opens no empty column of dictionaries, but a ledger has rows: `clean` refuses a source without any.
@pytest.mark.parametrize(
    ("kind", "count"), [pair for pair in itertools.product(KINDS, [0, 1, 5]) if pair != ("ledger", 0)]
)
def test_datasets_opens_every_kind_of_folder(tmp_path: Path, kind: str, count: int) -> None:
    """`load_from_disk` gives the rows back with their types, over shards, and opens a folder without rows."""
    schema, row = KINDS[kind]
    with arrow.Writer(tmp_path, schema, batch_rows=2, shard_bytes=1) as out:
        out.write(pa.Table.from_pylist([row] * count, schema))
    opened = datasets.load_from_disk(str(tmp_path))
    assert opened.to_list() == [row] * count
    types = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in schema.types]
    assert (
        opened.features.arrow_schema.types == types
    )  # `datasets` knows no dictionaries, it reads them as their values
    assert arrow.table(tmp_path).to_pylist() == [row] * count


def test_rows_of_another_schema_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected n: int32"):
        arrow.Writer(tmp_path, NUMBERS).write(pa.table({"n": pa.array([1], pa.int64())}))


def test_a_folder_whose_writer_failed_has_no_manifest(tmp_path: Path) -> None:
    """So nothing can read it: the reader names the stage that has not finished."""
    with pytest.raises(RuntimeError), arrow.Writer(tmp_path, NUMBERS) as out:
        out.write(numbers(1))
        raise RuntimeError
    with pytest.raises(SystemExit, match=r"manifest\.json is missing.*dvc repro"):
        arrow.table(tmp_path)


def test_a_batch_beyond_two_gibibytes_is_halved_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow's offsets have 32 bits; here they are said to reach 3 values. pyarrow alone drops what lies beyond."""
    concatenate = pa.concat_arrays

    def narrow(chunks: list[pa.Array]) -> pa.Array:
        if sum(map(len, chunks)) > 3:
            raise pa.ArrowInvalid("offset overflow while concatenating arrays")
        return concatenate(chunks)

    monkeypatch.setattr(pa, "concat_arrays", narrow)
    with arrow.Writer(tmp_path, NUMBERS, batch_rows=8) as out:
        out.write(numbers(*range(10)))
    assert arrow.table(tmp_path)["n"].to_pylist() == list(range(10))
    assert arrow.manifest(tmp_path)["shards"][0]["rows"] == 10


def test_json_is_sorted_and_readable_in_any_language(tmp_path: Path) -> None:
    keys = ["文", "a", "b"]
    random.Random(0).shuffle(keys)
    arrow.write_json(tmp_path / "x.json", dict.fromkeys(keys, "é"))
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert list(json.loads(text)) == sorted(keys)
    assert "é" in text
    assert arrow.read_json(tmp_path / "x.json") == dict.fromkeys(keys, "é")


def test_a_second_writer_replaces_what_the_folder_said(tmp_path: Path) -> None:
    for values in ((1, 2), (3,)):
        with arrow.Writer(tmp_path, NUMBERS) as out:
            out.write(numbers(*values))
    assert arrow.table(tmp_path)["n"].to_pylist() == [3]


def test_metrics_are_ascii(tmp_path: Path) -> None:
    """DVC refuses a metrics file whose beginning is mostly Chinese as binary."""
    content = {"longest": ["法律第一条" * 100]}
    arrow.write_json(tmp_path / "metrics.json", content, only_ascii=True)
    assert (tmp_path / "metrics.json").read_bytes().isascii()
    assert arrow.read_json(tmp_path / "metrics.json") == content


def _files(folder: Path) -> tuple[Path, Path]:
    """Return a file, and where its copy goes: over a longer one."""
    source, target = folder / "source", folder / "target"
    source.write_bytes(b"\0new" * 10_000)
    target.write_bytes(b"what was there, longer" * 10_000)
    return source, target


def test_a_copy_is_whole_and_its_own(tmp_path: Path) -> None:
    """On whatever file system the tests run. Nor does a copy change the state by which .memo/ knows a file."""
    source, target = _files(tmp_path)
    before = source.stat()
    arrow.copy(source, target)
    after = source.stat()
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
    assert target.read_bytes() == b"\0new" * 10_000
    target.write_bytes(b"written to")
    assert source.read_bytes() == b"\0new" * 10_000


def test_a_copy_shares_blocks_where_the_file_system_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is asked to take those of the source, and nothing is copied after that."""
    source, target = _files(tmp_path)
    asked = []

    def clone(out: Any, request: int, file: int) -> int:
        asked.append((os.fstat(out.fileno()).st_ino, request, os.fstat(file).st_ino))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", clone)
    arrow.copy(source, target)
    assert asked == [(target.stat().st_ino, 0x40049409, source.stat().st_ino)]
    assert target.read_bytes() == b""


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY, errno.EINVAL])
def test_elsewhere_a_copy_is_one_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ext4, two file systems, a kernel or a system that does not know the request."""
    source, target = _files(tmp_path)

    def refuse(*_: Any) -> int:
        raise OSError(number, "refused")

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    arrow.copy(source, target)
    assert target.read_bytes() == b"\0new" * 10_000
