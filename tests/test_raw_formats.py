"""raw_formats: every byte of a raw file is in one record, good or bad, and nothing that stands in a file raises."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import re
import sys
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

import raw_formats
import table_formats
from kit import arrow
from raw_formats import records
from raw_params import SUFFIXES, UNITS, Params, cuttable, unit
from raw_records import COMPRESSIONS, Record

TILED = ("text", "jsonl", "json", "csv", "tsv", "html")
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}
# Texts that a careless reader cuts or changes.
TEXTS = ["a\u2028b\x85c\x0bd", 'say "hi", twice\r\nor\tonce', "第一条　上\U0001f30a上A上", "nul \x00 and \ufeff", "x"]
AWKWARD = st.text(st.sampled_from('a"\n\r,\t \u4e0aA\U0001f30a\ufeff\x00\x85\u2028[]{}:'), max_size=40)
ENCODINGS = st.sampled_from(["utf-8", "gb18030", "utf-16"])


def params(name: str, **more: Any) -> Params:
    return Params.model_validate({"format": name, **more})


def read(data: bytes, name: str, packed: str = "", **more: Any) -> list[Record]:
    """Return the records of a file of these bytes, and check what holds for every file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a" + SUFFIXES[name][0] + packed)
        path.write_bytes(PACKERS[packed](data))
        found = list(records(path, params(name, **more)))
    check(found, data if name in TILED else None, more.get("encoding", "utf-8"))
    return found


def check(found: list[Record], data: bytes | None, encoding: str = "utf-8") -> None:
    """Check that the ranges tile `data`, or that there are none; that numbers, raw bytes and errors are as promised."""
    assert found
    if data is None:
        assert [(record.start, record.end, record.number) for record in found] == [
            (None, None, number) for number in range(1, len(found) + 1)
        ]
    else:
        ends = [record.end for record in found]
        assert [record.start for record in found] == [0, *ends[:-1]]
        assert ends[-1] == len(data)
        for record in found:
            assert record.raw == data[record.start : record.end]
            before = data[: record.start].decode(encoding, "replace") if encoding != "utf-8" else data[: record.start]
            assert record.number == len(re.findall("\n" if isinstance(before, str) else b"\n", before)) + 1
    for record in found:
        if record.error is not None:
            assert record.content == ""
            assert re.fullmatch(r"[^\n]+[^.\n]", record.error) and len(record.error) <= 300
            record.error.encode()


def contents(found: list[Record]) -> list[Any]:
    assert [record.error for record in found if record.error] == []
    return [record.content for record in found]


def turns(*parts: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in parts]


# Worked examples ------------------------------------------------------------------------------------------------------


def test_the_worked_example_of_the_module() -> None:
    assert read(b'id,body\r\n1,"a\nb"\r\n2\r\n', "csv", columns={"text": "body"}) == [
        Record(0, 18, 1, b'id,body\r\n1,"a\nb"\r\n', "a\nb", None),
        Record(18, 21, 4, b"2\r\n", "", "line 4: it has 1 field, the header names 2"),
    ]


def test_a_json_array_is_cut_at_its_objects() -> None:
    found = read(b'[{"text": "a"}, {"text": "b"}]', "json")
    assert [(record.start, record.end, record.content) for record in found] == [(0, 16, "a"), (16, 30, "b")]
    found = read(b'\xef\xbb\xbf [\n {"text": "\xc3\xa9"},\n\n {"text": "b",\n "z": NaN}\n]\n', "json")
    assert [(record.number, record.content) for record in found] == [(1, "é"), (4, "b")]
    assert contents(read(b' {"text": "one object"}\n', "json")) == ["one object"]
    assert contents(read(b" [ ]\n", "json")) == [""]


def test_html_is_what_a_browser_shows() -> None:
    def shown(page: str) -> Any:
        return contents(read(page.encode(), "html"))[0]

    assert shown("<h1>A</h1><p>b <b>c</b><br>d<table><tr><td>1<td>2</table>") == "A\nb c\nd\n1\t2"
    assert shown("<title>t</title><script>x</script><!-- y --><p> a&lt;b&nbsp;\n c <i> d</i>e ") == "a<b\xa0 c de"
    assert shown("<pre>\n if x:\n\n   y </pre>after<ul><li>1</li><li>2</ul>") == " if x:\n\n   y\nafter\n1\n2"
    assert shown("<div>" * 5_000 + "deep") == "deep"
    assert shown("no tags") == "no tags"
    assert shown("a<p hidden>b<b>c</b></p><p style='color: red; Display: none'>d</p><p style='x'>e") == "a\ne"
    assert shown("") == ""
    assert (
        shown("4.2<sub>x</sub> 10<sup>9</sup>/L, 10<sup>-<b>3</b></sup>, a<sup>th</sup> b") == "4.2x 10⁹/L, 10⁻³, ath b"
    )


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        ("<tr><td></td><td>20.00</td><td></td><td>1,480.00</td></tr>", "\t20.00\t\t1,480.00"),
        ("<tr><td></td><td></td><td>7</td><td></td><tr><th>a<td>b", "\t\t7\t\na\tb"),
        ("<tr><td><p>a</p></td><td><p>b</p><p>c</p></td><td><p></p></td><td><p>d</p></td></tr>", "a\tb\nc\t\td"),
        ("<tr><td>a<td><table><tr><td><td>b<tr><td>c</table><td>d<tr><td>e<td>f", "a\t\n\tb\nc\td\ne\tf"),
        ("<tr hidden><td>x<tr><td hidden>y<td>a<td>b", "a\tb"),
    ],
)
def test_a_cell_of_html_stays_in_its_column(rows: str, shown: str) -> None:
    """Also where it or its neighbours are empty, or hold paragraphs, as Word and Excel write them."""
    assert contents(read(f"<p>x<table>{rows}</table>".encode(), "html"))[0].removeprefix("x\n") == shown


def test_separators_begin_documents_and_stay_in_them() -> None:
    data = "\ufeff# 一\r\ntext\r\n# 二\n## 三\n".encode()
    found = read(data, "text", sample_by="separator", separator="^# ")
    assert [(record.number, record.content) for record in found] == [(1, "# 一\r\ntext\r\n"), (3, "# 二\n## 三\n")]
    assert contents(read(b"intro\n---\na\n---\n", "text", sample_by="separator", separator="^---$")) == [
        "intro\n",
        "---\na\n",
        "---\n",
    ]
    assert contents(read(b"ab", "text", sample_by="separator", separator="(?=b)")) == ["a", "b"]
    windows = "\ufeff一\r\n---\r\n二\r\n\r\n---\r\n".encode()
    for separator in ("^---$", r"^---\r$", r"^---\r?$"):
        found = read(windows, "text", sample_by="separator", separator=separator)
        assert [(record.number, record.content) for record in found] == [
            (1, "一\r\n"),
            (2, "---\r\n二\r\n\r\n"),
            (5, "---\r\n"),
        ]


def test_lines_end_at_line_feeds_only() -> None:
    data = "\ufeffone\r\n\na\u2028b\x85c\rd\x0ce\ufeff\n\x00".encode()
    assert contents(read(data, "text", sample_by="line")) == ["one", "", "a\u2028b\x85c\rd\x0ce\ufeff", "\x00"]


@pytest.mark.parametrize("mark", ["utf-16-le", "utf-16-be"])
def test_a_line_feed_of_utf_16_is_a_code_unit(mark: str) -> None:
    """The bytes of U+4E0A U+0041, of U+0A00 and of U+000A all hold 0x0A; only the last is a line end."""
    lines = ["上A", "\u0a00\u0a0a", "", "\U0001f30a", "上" * 70]
    data = "\ufeff".encode(mark) + "\n".join(lines).encode(mark)
    found = read(data, "text", sample_by="line", encoding="utf-16")
    assert contents(found) == lines
    assert [record.end for record in found[:2]] == [8, 14]


def test_gb18030_offsets_are_those_of_the_file() -> None:
    """Two bytes for 中, four for an emoji; a trailing byte is never taken for a line feed."""
    data = '[{"text": "中\U0001f30a"}, {"text": "b"}]'.encode("gb18030")
    assert [record.end for record in read(data, "json", encoding="gb18030")] == [21, 35]


def test_placeholders_are_filled_once_and_in_every_turn() -> None:
    fill = {"name": "{{author}}", "author": "Terroir", "a.b": "dot"}
    data = b'{"prompt": "{{name}} {{author}} {{x}} {name} {{a.b}} {{aXb}}", "completion": "I am {{name}}"}'
    assert contents(read(data, "jsonl", record="prompt_completion", fill=fill)) == [
        turns(("user", "{{author}} Terroir {{x}} {name} dot {{aXb}}"), ("assistant", "I am {{author}}"))
    ]
    wrong = b'{"messages": [{"role": "assistant", "content": "I am {{author}}", "weight": 0}]}'
    assert contents(read(wrong, "jsonl", record="messages", fill=fill)) == [
        [{"role": "assistant", "content": "I am Terroir", "learn": False}]
    ]
    assert contents(read(b"{{author}}", "text", fill=fill)) == ["Terroir"]
    (spaced,) = read(b"{{ author }} {{\tauthor}} {{\nauthor}} {{user-name }}", "text", fill=fill)
    assert (spaced.content, spaced.filled) == ("Terroir Terroir {{\nauthor}} {{user-name }}", ("author", "author"))
    assert raw_formats.unnamed(spaced, fill) == "user-name"
    assert raw_formats.unnamed(spaced._replace(content="{{name}} {{x}}"), fill) == "x"


def test_units() -> None:
    assert [unit(params(name)) for name in SUFFIXES] == ["line"] * 5 + ["row", "row", "page", "paragraph", "line"]


# Conversations --------------------------------------------------------------------------------------------------------

CALLS = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}]
CONVERSATIONS: dict[str, tuple[str, dict[str, Any], list[dict[str, str]]]] = {
    "alpaca": (
        "alpaca",
        {"instruction": "Add.", "input": "2+2", "output": "4", "system": "Brief.", "history": [["1+1", "2"]]},
        turns(("system", "Brief."), ("user", "1+1"), ("assistant", "2"), ("user", "Add.\n2+2"), ("assistant", "4")),
    ),
    "alpaca without what it may lack": (
        "alpaca",
        {"instruction": " Add.", "input": None, "output": " 4\n", "system": "", "history": None},
        turns(("user", "Add."), ("assistant", " 4\n")),
    ),
    "messages with tools": (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": "Brief."},
                {"role": "user", "content": "Rain today?"},
                {"role": "assistant", "content": None, "tool_calls": CALLS},
                {"role": "tool", "content": "no", "tool_call_id": "1"},
                {"role": "assistant", "content": "No.", "function_call": {"name": "log"}},
            ]
        },
        turns(
            ("system", "Brief."),
            ("user", "Rain today?"),
            ("assistant", json.dumps(CALLS, ensure_ascii=False)),
            ("tool", "no"),
            ("assistant", 'No.\n{"name": "log"}'),
        ),
    ),
    "messages with the functions that may be called": (
        "messages",
        {
            "messages": [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "No."}],
            "tools": [{"type": "function", "function": {"name": "天气"}}],
        },
        turns(
            ("system", '[{"type": "function", "function": {"name": "天气"}}]'), ("user", "Rain?"), ("assistant", "No.")
        ),
    ),
    "functions of several fields": (
        "messages",
        {
            "messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1", "x": {"b": 2}}, {"id": "2"}]}],
            "tools": [{"name": "sum", "x": {"a": 1}}, {"name": "time"}],
        },
        turns(
            ("system", '[{"name": "sum", "x": {"a": 1}}, {"name": "time"}]'),
            ("assistant", '[{"id": "1", "x": {"b": 2}}, {"id": "2"}]'),
        ),
    ),
    "calls that stand there as JSON text": (
        "messages",
        {
            "messages": [
                {"role": "assistant", "content": "Hm.", "tool_calls": '[{"id": "天气"}]'},
                {"role": "assistant", "content": None, "tool_calls": "[]", "function_call": '{"name": "log"}'},
                {"role": "assistant", "content": "No.", "tool_calls": "null", "function_call": " "},
            ]
        },
        turns(("assistant", 'Hm.\n[{"id": "天气"}]'), ("assistant", '{"name": "log"}'), ("assistant", "No.")),
    ),
    "thoughts that are none": (
        "messages",
        {
            "messages": [
                {"role": "user", "content": "2+2?", "reasoning_content": "Hm."},
                {"role": "assistant", "content": "<think>\nA\n</think>\n\n4", "reasoning_content": "A"},
                {"role": "assistant", "content": " ", "reasoning_content": "B"},
                {"role": "assistant", "content": "4", "reasoning_content": " "},
            ],
            "tools": "null",
        },
        turns(("user", "2+2?"), ("assistant", "<think>\nA\n</think>\n\n4"), ("assistant", " "), ("assistant", "4")),
    ),
    "a prompt with examples": (
        "prompt_completion",
        {
            "prompt": [
                {"role": "user", "content": "1+1"},
                {"role": "assistant", "content": "2"},
                {"role": "user", "content": "2+2"},
            ],
            "completion": [{"role": "assistant", "content": "4"}],
        },
        [
            {"role": "user", "content": "1+1"},
            {"role": "assistant", "content": "2", "learn": False},
            {"role": "user", "content": "2+2"},
            {"role": "assistant", "content": "4"},
        ],
    ),
    "thoughts": (
        "messages",
        {
            "messages": [
                {"role": "user", "content": "2+2?", "reasoning_content": None},
                {"role": "assistant", "content": "4", "reasoning_content": "\nTwo and two.\n"},
            ]
        },
        turns(("user", "2+2?"), ("assistant", "<think>\nTwo and two.\n</think>\n\n4")),
    ),
    "answers that are not learned": (
        "messages",
        {
            "messages": [
                {"role": "user", "content": "2+2?", "weight": 0},
                {"role": "assistant", "content": "5", "weight": 0},
                {"role": "assistant", "content": "4", "weight": 1},
            ]
        },
        [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "5", "learn": False},
            {"role": "assistant", "content": "4"},
        ],
    ),
    "an answer without loss": (
        "sharegpt",
        {"conversations": [{"from": "gpt", "value": "5", "loss": False}, {"from": "gpt", "value": "4", "loss": True}]},
        [{"role": "assistant", "content": "5", "learn": False}, {"role": "assistant", "content": "4"}],
    ),
    "sharegpt with the functions that may be called": (
        "sharegpt",
        {"system": "Brief.", "tools": '[{"name": "rain"}]', "conversations": [{"from": "gpt", "value": "No."}]},
        turns(("system", 'Brief.\n\n[{"name": "rain"}]'), ("assistant", "No.")),
    ),
    "a system text of the row, before that of the messages": (
        "messages",
        {"system": "Brief.", "messages": turns(("system", "Kind."), ("assistant", "No.")), "tools": [{"name": "rain"}]},
        turns(("system", 'Brief.\n\nKind.\n\n[{"name": "rain"}]'), ("assistant", "No.")),
    ),
    "the same system text twice": (
        "sharegpt",
        {"system": "Brief.", "conversations": [{"from": "system", "value": "Brief."}, {"from": "gpt", "value": "No."}]},
        turns(("system", "Brief."), ("assistant", "No.")),
    ),
    "a system turn without words": (
        "messages",
        {"system": " ", "messages": turns(("system", ""), ("user", "Rain?"), ("assistant", "No."))},
        turns(("user", "Rain?"), ("assistant", "No.")),
    ),
    "prompt and completion with system and history": (
        "prompt_completion",
        {"system": "Brief.", "history": [["1+1", "2"]], "prompt": "2+2", "completion": "4"},
        turns(("system", "Brief."), ("user", "1+1"), ("assistant", "2"), ("user", "2+2"), ("assistant", "4")),
    ),
    "sharegpt with no function": (
        "sharegpt",
        {"tools": "[]", "conversations": [{"from": "gpt", "value": "No."}]},
        turns(("assistant", "No.")),
    ),
    "sharegpt": (
        "sharegpt",
        {
            "system": "Brief.",
            "conversations": [
                {"from": "human", "value": "Rain?"},
                {"from": "function_call", "value": "{}"},
                {"from": "observation", "value": "no"},
                {"from": "gpt", "value": "No."},
            ],
        },
        turns(("system", "Brief."), ("user", "Rain?"), ("assistant", "{}"), ("tool", "no"), ("assistant", "No.")),
    ),
    "prompt and completion": (
        "prompt_completion",
        {"prompt": "2+2", "completion": "4"},
        turns(("user", "2+2"), ("assistant", "4")),
    ),
    "prompt of messages": (
        "prompt_completion",
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "2+2"}], "completion": "4"},
        turns(("system", "s"), ("user", "2+2"), ("assistant", "4")),
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_become_messages_in_every_format_that_can_hold_them(name: str) -> None:
    record, row, expected = CONVERSATIONS[name]
    assert contents(read(json.dumps(row).encode(), "jsonl", record=record)) == [expected]
    assert contents(read(json.dumps([row]).encode(), "json", record=record)) == [expected]
    assert contents(read(table_bytes([row], "parquet"), "parquet", record=record)) == [expected]
    assert contents(read(table_bytes([row], "arrow"), "arrow", record=record)) == [expected]


def test_what_may_be_missing_can_be_left_out_or_have_another_name() -> None:
    answer = {"role": "assistant", "content": "4", "thinking": "2 and 2."}
    data = json.dumps({"messages": [answer], "tools": 3, "functions": [{"name": "sum"}]}).encode()
    plain = turns(("assistant", "4"))
    assert contents(read(data, "jsonl", record="messages", columns={"tools": None})) == [plain]
    columns = {"tools": "functions", "reasoning_content": "thinking"}
    assert contents(read(data, "jsonl", record="messages", columns=columns)) == [
        turns(("system", '[{"name": "sum"}]'), ("assistant", "<think>\n2 and 2.\n</think>\n\n4"))
    ]
    thought = json.dumps({"messages": [{**answer, "reasoning_content": "2 and 2."}]}).encode()
    assert contents(read(thought, "jsonl", record="messages", columns={"reasoning_content": None})) == [plain]
    with pytest.raises(ValueError, match="leaves out `messages`, which record messages needs"):
        params("jsonl", record="messages", columns={"messages": None})


def test_a_table_row_without_functions_has_the_bytes_of_one_in_a_table_without_that_column() -> None:
    """An exclusion names a row by its raw_id, a hash of them."""
    row = {"messages": [{"role": "assistant", "content": "4"}]}
    (plain,) = read(table_bytes([row], "parquet"), "parquet", record="messages")
    (null, _) = read(
        table_bytes([{**row, "tools": None}, {**row, "tools": "[]"}], "parquet"), "parquet", record="messages"
    )
    assert plain.raw == null.raw == b'{"messages": [{"content": "4", "role": "assistant"}]}'


@pytest.mark.parametrize("name", ["parquet", "arrow"])
def test_a_map_of_a_table_is_an_object(tmp_path: Path, name: str) -> None:
    """As Spark writes the arguments of a call; a list of pairs would be learned as one."""
    arguments = pa.map_(pa.string(), pa.string())
    calls = pa.list_(pa.struct([("name", pa.string()), ("arguments", arguments)]))
    kind = pa.list_(pa.struct([("role", pa.string()), ("tool_calls", calls)]))
    rows = [
        [{"role": "assistant", "tool_calls": [{"name": "rain", "arguments": pairs}]}]
        for pairs in ([("city", "北京")], [("city", "x"), ("city", "y")])
    ]
    table = pa.table({"messages": pa.array(rows, kind)})
    path = tmp_path / f"a.{name}"
    with path.open("wb") as file:
        if name == "parquet":
            parquet.write_table(table, file)
        else:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
    good, bad = records(path, params(name, record="messages"))
    assert good.content == turns(("assistant", '[{"name": "rain", "arguments": {"city": "北京"}}]'))
    assert bad.number == 2 and "the row cannot be read" in str(bad.error)


def test_a_map_with_keys_that_json_does_not_know_stays_a_list_of_pairs() -> None:
    calls = pa.list_(pa.map_(pa.binary(), pa.int8()))
    kind = pa.list_(pa.struct([("role", pa.string()), ("tool_calls", calls)]))
    table, sink = (
        pa.table({"messages": pa.array([[{"role": "assistant", "tool_calls": [[(b"k", 1)]]}]], kind)}),
        io.BytesIO(),
    )
    parquet.write_table(table, sink)
    assert contents(read(sink.getvalue(), "parquet", record="messages")) == [turns(("assistant", "[[[\"b'k'\", 1]]]"))]


def test_the_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "Rain "}, {"type": "text", "text": "today?"}]
    row = {"messages": [{"role": "user", "content": parts}]}
    assert contents(read(json.dumps(row).encode(), "jsonl", record="messages")) == [turns(("user", "Rain today?"))]


def test_conversations_from_csv() -> None:
    data = b"question,context,answer\n2+2,,4\n"
    columns = {"instruction": "question", "input": "context", "output": "answer"}
    assert contents(read(data, "csv", record="alpaca", columns=columns)) == [turns(("user", "2+2"), ("assistant", "4"))]


BAD_ROWS = {
    '{"messages": [{"role": "robot", "content": ""}]}': 'message 1, has the role "robot", expected one of system, ',
    '{"messages": [{"role": ["user"], "content": ""}]}': "message 1, has the role a list, expected",
    '{"messages": [{"role": "assistant", "refusal": "No."}]}': "message 1, has no `content`",
    '{"messages": [{"content": "a"}]}': "message 1, has the role null, expected",
    '{"messages": []}': "line 1: the field `messages` is an empty conversation",
    '{"messages": "a"}': 'the field `messages` is "a", expected a list of messages',
    '{"messages": ["a"]}': 'message 1, is "a", expected an object with `role` and `content`',
    '{"messages": [{"role": "user", "content": 5}]}': "message 1, `content` is 5, expected a string",
    '{"messages": [{"role": "user", "content": null}]}': "message 1, `content` is null, expected a string",
    '{"messages": [{"role": "user", "content": 5, "tool_calls": [1]}]}': "message 1, `content` is 5, expected a string",
    '{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}': "message 1, has the weight 0.5, expected 1",
    '{"messages": [{"role": "user", "content": "a", "loss": "no"}]}': 'message 1, has the loss "no", expected 1',
    '{"messages": [{"role": "assistant", "content": "a", "reasoning_content": 5}]}': "`reasoning_content` is 5, expec",
    '{"messages": [{"role": "assistant", "content": "a", "reasoning_content": "\\ud800"}]}': "half of a surrogate pair",
    '{"messages": [{"role": "assistant", "content": "", "tool_calls": ["\\ud800"]}]}': "half of a surrogate pair",
    '{"messages": [{"role": "assistant", "content": "a", "tool_calls": 5}]}': "message 1, has the tool_calls 5, expect",
    '{"messages": [{"role": "assistant", "content": "a", "function_call": "f("}]}': 'has the function_call "f(", expec',
    '{"messages": [{"role": "user", "content": "a"}], "tools": 5}': "the field `tools` is 5, expected a list of",
    '{"messages": [{"role": "user", "content": "a"}], "tools": ["saw"]}': "field `tools` is a list, expected a list",
    '{"messages": [{"role": "user", "content": "a"}], "tools": "saw"}': 'the field `tools` is "saw", expected a list',
    '{"messages": [{"role": "user", "content": "a"}], "tools": [{"a": "\\ud800"}]}': "half of a surrogate pair",
    '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}': 'is of type "image_url" and has no text',
    '{"messages": [{"role": "user", "content": ["a", {}]}]}': "message 1, part 2 is an object and has no text",
    '{"messages": [{"role": "user", "content": [{"text": "\\ud800"}]}]}': "message 1, part 1 holds half of a surrogate",
    '{"messages": [{"role": "user", "content": "a"}], "kto_tag": false}': "`kto_tag` says that the answer is a bad",
    '[{"messages": []}]': "line 1 is JSON but not an object with named fields; an array of objects is `format: json`",
    '{"messages": [{"role": "user", "content": "\\udc00"}]}': "message 1, `content` holds half of a surrogate pair",
    '{"conversations": []}': "line 1 has no field `messages`; it has conversations",
    '{"\\ud800": []}': "line 1 has no field `messages`; it has \\ud800",
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_what_is_wrong_with_a_conversation_is_said(row: str) -> None:
    (record,) = read(row.encode(), "jsonl", record="messages")
    assert record.error and BAD_ROWS[row] in record.error


@pytest.mark.parametrize(
    ("kind", "turn", "right"),
    [
        ("sharegpt", {"role": "user", "content": "a"}, "`record: messages` and `columns: {messages: conversations}`"),
        ("messages", {"from": "human", "value": "a"}, "`record: sharegpt` and `columns: {conversations: chats}`"),
    ],
)
def test_messages_of_the_other_kind_are_named(kind: str, turn: dict[str, Any], right: str) -> None:
    """Much data has OpenAI's role and content under ShareGPT's `conversations`; what is advised reads it."""
    columns = {"messages": "chats"} if kind == "messages" else {}
    row = json.dumps({"chats" if columns else "conversations": [turn]}).encode()
    (record,) = read(row, "jsonl", record=kind, columns=columns)
    assert record.error and right in record.error
    other = re.fullmatch(r".*`record: (\w+)` and `columns: {(\w+): (\w+)}`", record.error)
    assert other
    (record,) = read(row, "jsonl", record=other[1], columns={other[2]: other[3]})
    assert record.content == turns(("user", "a"))


@pytest.mark.parametrize(
    ("row", "params", "error"),
    [
        ({"label": False}, {}, "line 1: the field `label` says that the answer is a bad one, and it would be learned"),
        ({"label": "False"}, {}, "let `on_error: drop` do so (`columns: {label: null}`: not read)"),
        ({"good": False}, {"columns": {"label": "good"}}, "line 1: the field `good` says that the answer is a bad one"),
        ({"label": False}, {"columns": {"label": None}}, None),
        *(({"label": label}, {}, None) for label in (True, None, 0, "no", "true")),
    ],
)
def test_an_answer_that_is_called_bad_is_not_learned(row: dict[str, Any], params: dict[str, Any], error: str) -> None:
    """Rows of TRL for KTO: every second answer is one that the model must not give."""
    (record,) = read(json.dumps({"prompt": "a", "completion": "b", **row}).encode(), "jsonl", **PAIR, **params)
    assert (error in record.error) if record.error else error is None


PAIR = {"record": "prompt_completion"}
ASK, SAY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("prompt", "completion", "is_right"),
    [("a", [ASK, SAY], False), ([ASK], [ASK, SAY], False), ([ASK], [SAY], True), ([ASK, SAY], [ASK, SAY], True)],
)
def test_a_whole_conversation_is_no_completion(prompt: Any, completion: list[Any], is_right: bool) -> None:
    """`chosen` of a set of preferences often holds the question once more."""
    row = json.dumps({"prompt": prompt, "chosen": completion}).encode()
    (record,) = read(row, "jsonl", **PAIR, columns={"completion": "chosen"})
    assert (record.error is None) == is_right
    if not is_right:
        assert "begins with a question behind that of the prompt" in str(record.error)
        assert "`columns: {messages: chosen}`" in str(record.error)


def test_quotes_are_text_without_a_quotechar() -> None:
    """One that opens a field takes all lines up to the next one; tables of sentences mean none of it."""
    data = b'id\ttext\n1\t"Well," he said\n2\t"quoted"\n3\tit is 6"\n'
    assert contents(read(data, "tsv", quotechar=None)) == ['"Well," he said', '"quoted"', 'it is 6"']
    (wrong, *_) = read(data, "tsv")
    assert wrong.error and wrong.error.endswith("; `quotechar: null` takes quotes as text")
    assert contents(read(b"text\n'a\nb'\n", "csv", quotechar="'")) == ["a\nb"]


def test_a_quote_that_nobody_closes_is_one_row() -> None:
    """Also one that is closed by another row's, with text behind it: the rows between them are rows."""
    rows = [b"%d,text %d\n" % (number, number) for number in range(300)]
    rows[100], rows[200] = b'100,"an inch sign\n', b'200,say "hi" there\n'
    for count, why in ((300, "',' expected"), (200, "unexpected end of data")):
        found = read(b"".join([b"id,text\n", *rows[:count]]), "csv")
        (wrong,) = (record for record in found if record.error)
        assert wrong.error and why in wrong.error and (wrong.number, wrong.raw) == (102, rows[100])
        assert len(found) == count
    many = read(b"text\n" + b'"a\n' * 300, "csv")
    assert [len(record.raw) for record in many] == [8, *[3] * 99, *[6] * 100]


def test_fields_may_be_separated_otherwise() -> None:
    assert contents(read(b"id;text\n1;eins, zwei\n", "csv", delimiter=";")) == ["eins, zwei"]


def test_a_history_may_be_json_text() -> None:
    """As a cell of csv holds it."""
    rows = 'instruction,input,output,history\nq,,a,"[[""1+1"", ""2""]]"\nq,,a,[]\nq,,a,\n'
    asked = turns(("user", "1+1"), ("assistant", "2"))
    alone = turns(("user", "q"), ("assistant", "a"))
    assert contents(read(rows.encode(), "csv", record="alpaca")) == [asked + alone, alone, alone]


def test_a_history_must_be_pairs() -> None:
    for history in ("5", '"ab"', "[[1]]", '["ab"]', '{"a": 1}'):
        data = '{"instruction": "a", "input": "", "output": "b", "history": %s}' % history  # noqa: UP031
        (record,) = read(data.encode(), "jsonl", record="alpaca")
        assert record.error and "expected a list of pairs" in record.error


# Each format, plain and compressed ------------------------------------------------------------------------------------


def table_bytes(rows: list[dict[str, Any]], name: str) -> bytes:
    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    if name == "parquet":
        parquet.write_table(table, sink, row_group_size=2)
    else:
        opened = pa.ipc.new_file if name == "arrow file" else pa.ipc.new_stream
        with opened(sink, table.schema) as writer:
            writer.write_table(table, 2)
    return sink.getvalue()


def pdf_bytes(pages: list[str]) -> bytes:
    """Return a PDF that shows one ASCII text a page."""
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, text in enumerate(pages):
        font, content = "<< /Font << /F 3 0 R >> >>", f"BT /F 12 Tf 9 99 Td ({text}) Tj ET"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 200] /Resources {font} /Contents {5 + 2 * number} 0 R >>"
        )
        objects.append(f"<< /Length {len(content)} >> stream\n{content}\nendstream")
    data, places = "%PDF-1.4\n", []
    for number, text in enumerate(objects, start=1):
        places.append(len(data))
        data += f"{number} 0 obj {text} endobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    trailer = f"trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF\n"
    return f"{data}xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{trailer}".encode()


def docx_bytes(body: str) -> bytes:
    """Return a Word file made by python-docx whose body is this XML."""
    docx = pytest.importorskip("docx", reason="the extra `documents` is not installed")
    plain, changed = io.BytesIO(), io.BytesIO()
    docx.Document().save(plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(changed, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name == "word/document.xml":
                data = re.sub(rb"<w:body>.*</w:body>", f"<w:body>{body}</w:body>".encode(), data, flags=re.DOTALL)
            target.writestr(name, data)
    return changed.getvalue()


def paragraph(text: str) -> str:
    return f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>"


def csv_bytes(delimiter: str) -> bytes:
    sink = io.StringIO()
    csv.writer(sink, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([["text"], *([text] for text in TEXTS)])
    return sink.getvalue().encode()


def designed(name: str) -> tuple[str, bytes, list[str]]:
    """Return format, bytes and the expected contents of a file that holds TEXTS."""
    rows = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
    if name == "pdf":
        pytest.importorskip("pypdf", reason="the extra `documents` is not installed")
        return name, pdf_bytes(["Page one", "Page two"]), ["Page one", "Page two"]
    if name == "docx":
        return name, docx_bytes(paragraph("一") + paragraph("b &lt; c")), ["一", "b < c"]
    if name == "html":
        pytest.importorskip("selectolax", reason="the extra `documents` is not installed")
        return name, "<p>一<p>b".encode(), ["一\nb"]
    files = {
        "text": "\n".join(TEXTS).encode(),
        "jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "json": json.dumps(rows, indent=1, ensure_ascii=False).encode(),
        "csv": csv_bytes(","),
        "tsv": csv_bytes("\t"),
    }
    expected = ["\n".join(TEXTS)] if name == "text" else TEXTS
    return name.split()[0], files[name] if name in files else table_bytes(rows, name), expected


@pytest.mark.parametrize("packed", ["", *COMPRESSIONS])
@pytest.mark.parametrize("name", [*SUFFIXES, "arrow file"])
def test_a_file_of_each_format_and_compression(name: str, packed: str) -> None:
    form, data, expected = designed(name)
    assert contents(read(data, form, packed)) == expected


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16"])
@pytest.mark.parametrize("name", TILED)
def test_a_file_of_each_encoding(name: str, encoding: str) -> None:
    form, data, expected = designed(name)
    marked = data.decode() if encoding == "utf-16" else "\ufeff" + data.decode()  # Python writes a mark for UTF-16
    assert contents(read(marked.encode(encoding), form, encoding=encoding)) == expected


@pytest.mark.parametrize("name", [*SUFFIXES])
def test_a_file_without_a_record_is_a_blank_record_or_an_error(name: str) -> None:
    """Zero bytes are no Parquet, Arrow, PDF or Word file; of the others they are an empty one."""
    (record,) = read(b"", name)
    assert (record.content, bool(record.error)) == ("", name in UNITS)


def test_a_table_without_rows_and_a_header_without_rows_are_a_blank_record() -> None:
    sink = io.BytesIO()
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), sink)
    assert read(sink.getvalue(), "parquet") == [Record(None, None, 1, b"", "", None)]
    assert read(b"text\n", "csv") == [Record(0, 5, 1, b"text\n", "", None)]


def test_a_row_is_told_by_the_columns_that_are_read() -> None:
    """Their JSON, keys sorted, is what `raw_id` is the digest of: a new column elsewhere changes nothing."""
    rows = [{"id": 1, "body": "é\ud7ff", "when": "now"}]
    found = read(table_bytes(rows, "parquet"), "parquet", columns={"text": "body"})
    assert found == [Record(None, None, 1, '{"body": "é\ud7ff"}'.encode(), "é\ud7ff", None)]


def test_times_and_bytes_beside_the_text_are_no_traceback(tmp_path: Path) -> None:
    """A date that Python cannot hold is an error of its row; in a tool call a time is written as it is printed."""
    path = tmp_path / "a.arrow"

    def found(kind: str, column: pa.Array) -> list[Record]:
        table = pa.table({kind: column})
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
        return list(records(path, params("arrow", record=kind)))

    for kind, far in (
        (pa.date32(), pa.array([2**30, 5], pa.int32())),
        (pa.duration("s"), pa.array([2**62, 5], pa.int64())),
    ):
        bad, other = found("text", far.view(kind))
        assert "the row cannot be read" in str(bad.error) and "expected a string" in str(other.error)
    calls = [{"id": "1", "at": datetime.datetime(2026, 1, 2), "key": b"k"}]
    rows = [[{"role": "assistant", "content": None, "tool_calls": calls}]]
    (record,) = found("messages", pa.array(rows))
    assert record.content == turns(("assistant", '[{"id": "1", "at": "2026-01-02 00:00:00", "key": "b\'k\'"}]'))


def test_a_folder_of_save_to_disk_is_read_as_one_table(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(700)]
    datasets.Dataset.from_dict({"id": range(700), "text": texts}).save_to_disk(tmp_path / "theirs", num_shards=3)
    found = list(records(tmp_path / "theirs", params("arrow")))
    check(found, None)
    assert contents(found) == texts
    schema = pa.schema([("text", pa.string())])
    with arrow.Writer(tmp_path / "ours", schema, batch_rows=300) as writer:
        writer.write(pa.table({"text": texts}))
    assert contents(list(records(tmp_path / "ours", params("arrow")))) == texts
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "splits")
    (record,) = records(tmp_path / "splits", params("arrow"))
    assert record.error and "no state.json" in record.error and "one split" in record.error
    state = (tmp_path / "splits/train/state.json").read_text()
    (tmp_path / "splits/train/state.json").write_text(state.replace("data-00000", "../test/data-00000"))
    (record,) = records(tmp_path / "splits/train", params("arrow"))
    assert record.error and "names ../test/data-00000-of-00001.arrow, which is not in the folder" in record.error
    (tmp_path / "theirs" / "data-00001-of-00003.arrow").unlink()
    *good, bad = records(tmp_path / "theirs", params("arrow"))
    assert len(good) == 234
    assert bad.error == "from row 235 on, the file cannot be read (No such file or directory)"


def test_word_tables_boxes_and_changes() -> None:
    """Nothing of the body is left out or said twice."""
    cell = "<w:tc>{}</w:tc>".format
    box = (
        '<w:p><w:r><w:t>around </w:t></w:r><w:r><mc:AlternateContent xmlns:mc="http://schemas.openxmlformats.org/'
        'markup-compatibility/2006"><mc:Choice Requires="wps"><w:txbxContent>{0}</w:txbxContent></mc:Choice>'
        "<mc:Fallback><w:txbxContent>{0}</w:txbxContent></mc:Fallback></mc:AlternateContent></w:r></w:p>"
    ).format(paragraph("box"))
    changes = (
        "<w:p><w:r><w:t>a</w:t><w:tab/></w:r><w:ins><w:r><w:t>new</w:t></w:r></w:ins>"
        "<w:del><w:r><w:delText>old</w:delText></w:r></w:del>"
        "<w:moveFrom><w:r><w:t>moved</w:t></w:r></w:moveFrom><w:moveTo><w:r><w:t> moved</w:t></w:r></w:moveTo></w:p>"
    )
    table = f"<w:tbl><w:tr>{cell(paragraph('1') + paragraph('2'))}{cell(paragraph('3'))}</w:tr>"
    table += f"<w:tr>{cell('<w:p/>')}{cell(paragraph('4'))}</w:tr></w:tbl>"
    control = f"<w:sdt><w:sdtContent>{paragraph('in a control')}</w:sdtContent></w:sdt>"
    found = read(docx_bytes(paragraph("one") + table + control + "<w:p/>" + box + changes), "docx")
    assert contents(found) == ["one", "1\n2\t3\n\t4", "in a control", "", "around box", "a\tnew moved"]


def test_what_a_word_file_says_in_other_ways_is_read_or_refused() -> None:
    """Text boxes with tables and paragraphs, signs of the font Symbol, raised digits; a document in the document."""

    def box(inside: str) -> str:
        return f"<w:p><w:r><w:t>host</w:t></w:r><w:r><w:txbxContent>{inside}</w:txbxContent></w:r></w:p>"

    table = f"<w:tbl><w:tr><w:tc>{paragraph('1')}</w:tc><w:tc>{paragraph('2')}</w:tc></w:tr></w:tbl>"
    signs = '<w:sym w:font="Symbol" w:char="F06D"/><w:t>g </w:t><w:sym w:font="Wingdings" w:char="F0FE"/>'
    raised = "<w:r><w:rPr><w:vertAlign w:val='superscript'/></w:rPr><w:t>{}</w:t></w:r>".format
    dose = f"<w:p><w:r><w:t>5 </w:t>{signs}<w:t xml:space='preserve'> 10</w:t></w:r>{raised('-9')}{raised('th')}</w:p>"
    body = box(paragraph("a") + paragraph("b")) + box(table) + dose + '<w:altChunk r:id="x"/>' + paragraph("end")
    *found, torn, end = read(docx_bytes(body), "docx")
    assert [record.content for record in found] == ["hosta\nb", "host1\n2", "5 μg \ufffd 10⁻⁹th"]
    assert torn.error and torn.error.startswith("paragraph 4 is a document in the document, which is not read")
    assert (end.number, end.content) == (5, "end")


@pytest.mark.parametrize("root", ["<w:document xmlns:w='{}'/>", "<other/>"])
def test_a_word_file_without_a_body_is_a_sentence(root: str) -> None:
    docx = pytest.importorskip("docx", reason="the extra `documents` is not installed")
    space = docx.oxml.ns.nsmap["w"]
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(docx_bytes(""))) as source, zipfile.ZipFile(changed, "w") as target:
        for name in source.namelist():
            target.writestr(name, root.format(space) if name == "word/document.xml" else source.read(name))
    (record,) = read(changed.getvalue(), "docx")
    assert record.error and record.error.startswith("the file cannot be read (")


def test_a_page_of_which_a_part_is_lost_is_an_error() -> None:
    """pypdf goes on behind a bit that is flipped, and takes an encoding that it does not know for another one."""
    pypdf = pytest.importorskip("pypdf", reason="the extra `documents` is not installed")
    words = " ".join(f"statement{number} balance{number * 7}" for number in range(200))
    writer = pypdf.PdfWriter(io.BytesIO(pdf_bytes(["one", words, "three"])))
    for page in writer.pages:
        page.compress_content_streams()
    writer.write(sink := io.BytesIO())
    whole = sink.getvalue()
    assert contents(read(whole, "pdf")) == ["one", words, "three"]
    begins = [match.end() for match in re.finditer(rb"[^d]stream\r?\n", whole)]
    place = (begins[1] + whole.index(b"endstream", begins[1])) // 2
    flipped, blank = bytearray(whole), bytearray(whole)
    flipped[place] ^= 4
    blank[begins[1] : begins[1] + 4] = b"abcd"
    for data in (flipped, blank):
        one, two, three = read(bytes(data), "pdf")
        assert (one.content, two.content, three.content) == ("one", "", "three")
        assert two.error and two.error.startswith("page 2 cannot be read (")
    page = pypdf.PdfWriter(sink).pages[1]
    stream = page["/Contents"].get_object()
    stream._data = stream._data[:-20]
    page.indirect_reference.pdf.write(cut := io.BytesIO())
    assert read(cut.getvalue(), "pdf")[1].error == "page 2 cannot be read (error: its content is cut)"
    name, generic = pypdf.generic.NameObject, pypdf.generic
    for key, value in (("/Subtype", "/Type0"), ("/Encoding", "/GBKp-EUC-H"), ("/BaseFont", "/Song")):
        writer.pages[1]["/Resources"]["/Font"]["/F"].get_object()[name(key)] = name(value)
    kind = generic.DictionaryObject({name("/Type"): name("/Font"), name("/Subtype"): name("/CIDFontType0")})
    font = writer.pages[1]["/Resources"]["/Font"]["/F"].get_object()
    font[name("/DescendantFonts")] = generic.ArrayObject([kind])
    writer.write(sink := io.BytesIO())
    assert "GBKp-EUC-H" in str(read(sink.getvalue(), "pdf")[1].error)


def test_a_form_of_a_pdf_of_which_a_part_is_lost_is_an_error() -> None:
    """What is signed, stamped or merged lies in forms, one inside another, and the page itself only calls them."""
    pypdf = pytest.importorskip("pypdf", reason="the extra `documents` is not installed")
    generic, name = pypdf.generic, pypdf.generic.NameObject
    writer = pypdf.PdfWriter(io.BytesIO(pdf_bytes(["one", "two", "three"])))
    form = {name("/Type"): name("/XObject"), name("/Subtype"): name("/Form")}
    inner, outer = generic.DecodedStreamObject(), generic.DecodedStreamObject()
    inner.set_data(b"BT /F 12 Tf 9 50 Td (" + b" ".join(b"row%d" % n for n in range(300)) + b") Tj ET")
    inner = inner.flate_encode()
    outer.set_data(b"/In Do")
    called = generic.DictionaryObject({name("/In"): writer._add_object(inner)})
    inner.update({**form, name("/Resources"): writer.pages[1]["/Resources"]})
    outer.update({**form, name("/Resources"): generic.DictionaryObject({name("/XObject"): called})})
    place = writer._add_object(outer)
    for page in writer.pages[1:3]:
        page["/Resources"][name("/XObject")] = generic.DictionaryObject({name("/Out"): place})
        page["/Contents"].get_object().set_data(b"/Out Do")
    writer.write(sink := io.BytesIO())
    assert [len(content.split()) for content in contents(read(sink.getvalue(), "pdf"))] == [1, 300, 300]
    whole = inner._data
    inner._data = whole[:-20]
    writer.write(sink := io.BytesIO())
    one, two, three = read(sink.getvalue(), "pdf")
    assert one.error is None
    assert two.error == "page 2 cannot be read (error: its content is cut)"
    assert three.error == "page 3 cannot be read (error: its content is cut)"
    inner._data = whole
    outer.set_data(b"/In Do ) Tj")  # pypdf leaves out what it cannot parse, and its log says so
    writer.write(sink := io.BytesIO())
    one, two, three = read(sink.getvalue(), "pdf")
    assert one.error is None and two.error and "Impossible to decode XFormObject /Out" in two.error
    outer.set_data(b"/In Do")
    called[name("/Out")] = place  # a ring
    outer.set_data(b"/In Do /Out Do")
    writer.write(sink := io.BytesIO())
    assert "cyclic form" in str(read(sink.getvalue(), "pdf")[1].error)


def test_pages_of_a_pdf_that_cannot_be_found_are_an_error() -> None:
    """pypdf passes over an object that is not there, and over one that it cannot parse: both were fewer pages."""
    pytest.importorskip("pypdf", reason="the extra `documents` is not installed")
    whole = pdf_bytes(["one", "two", "three"])
    for damaged in (
        whole.replace(b"/Kids [4 0 R 6 0 R", b"/Kids [4 0 R 9 9 R"),
        whole.replace(b"6 0 obj << /Type", b"6 0 obj << /Ty<e"),
    ):
        *some, last = read(damaged, "pdf")
        assert [record.content for record in some] == ["one", "three"] and not any(record.error for record in some)
        assert (last.number, last.error) == (3, "from page 3 on, the file cannot be read (of 3 pages 2 can be found)")
        assert "of 3 pages 2" in str(read(damaged, "pdf", sample_by="document")[0].error)
    _, two, _ = read(whole.replace(b"/Contents 7 0 R", b"/Contents 9 9 R"), "pdf")
    assert two.error == "page 2 cannot be read (Object 9 9 not defined.)"
    (none,) = read(whole.replace(b"[4 0 R 6 0 R 8 0 R] /Count 3", b"[] /Count 0"), "pdf")
    assert none.error == "the file cannot be read (of 0 pages 0 can be found)"


def test_glyphs_of_a_pdf_that_nobody_names_are_an_error() -> None:
    """Identity-H without ToUnicode: pypdf takes the numbers of glyphs for characters, so 法律 was AB or worse."""
    pypdf = pytest.importorskip("pypdf", reason="the extra `documents` is not installed")
    generic, name = pypdf.generic, pypdf.generic.NameObject
    entries = {"/Type": "/Font", "/Subtype": "/Type0", "/BaseFont": "/ABCDEF+SimSun", "/Encoding": "/Identity-H"}
    font = generic.DictionaryObject({name(key): name(value) for key, value in entries.items()})
    below = generic.DictionaryObject({name("/Type"): name("/Font"), name("/Subtype"): name("/CIDFontType2")})
    font[name("/DescendantFonts")] = generic.ArrayObject([below])
    writer = pypdf.PdfWriter(io.BytesIO(pdf_bytes(["one", "two", "three"])))
    for page, drawn in ((writer.pages[1], b"<00410042> Tj"), (writer.pages[2], b"")):  # named and not used: no flaw
        page["/Resources"]["/Font"][name("/Song")] = font
        content = page["/Contents"].get_object()
        content.set_data(content.get_data().replace(b" ET", b" /Song 12 Tf " + drawn + b" ET"))
    writer.write(sink := io.BytesIO())
    one, two, three = read(sink.getvalue(), "pdf")
    assert (one.content, two.content, three.content) == ("one", "", "three")
    assert two.error == (
        "page 2 cannot be read (its font ABCDEF+SimSun does not say which characters its glyphs are; OCR would)"
    )
    codes = b"1 begincodespacerange <0000> <ffff> endcodespacerange 2 beginbfchar <0041> <6CD5> <0042> <5F8B> endbfchar"
    stream = generic.StreamObject()
    stream.set_data(codes)
    font[name("/ToUnicode")] = stream
    writer.write(sink := io.BytesIO())
    assert contents(read(sink.getvalue(), "pdf")) == ["one", "two法律", "three"]


def test_a_pdf_with_a_password_is_called_so() -> None:
    pypdf = pytest.importorskip("pypdf", reason="the extra `documents` is not installed")
    for password, error in (
        ("", None),
        ("secret", "the file cannot be read (it opens with a password only; save a copy"),
    ):
        writer = pypdf.PdfWriter(io.BytesIO(pdf_bytes(["one"])))
        writer.encrypt(password, "owner", algorithm="RC4-128")
        writer.write(sink := io.BytesIO())
        (record,) = read(sink.getvalue(), "pdf")
        assert record.error == error or (error and str(record.error).startswith(error))
        assert record.content == ("" if error else "one")


def test_a_whole_pdf_or_word_file_is_one_record() -> None:
    """A page that cannot be read is an error of the whole; a file without any is blank, as it is page by page."""
    page, torn = Record(None, None, 1, b"a", "a", None), Record(None, None, 2, b"", "", "page 2 cannot be read")
    assert list(table_formats.whole(iter([page, torn, page]))) == [torn]
    found = read(docx_bytes(paragraph("one") + "<w:p/>" + paragraph("两")), "docx", sample_by="document")
    assert found == [Record(None, None, 1, "one\n\n两".encode(), "one\n\n两", None)]
    assert contents(read(docx_bytes(""), "docx", sample_by="document")) == [""]
    pytest.importorskip("pypdf", reason="the extra `documents` is not installed")
    data = pdf_bytes(["Page one", "Page two"])
    assert contents(read(data, "pdf", sample_by="document")) == ["Page one\nPage two"]


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module, package in (
        ("pdf", "pypdf", "pypdf"),
        ("docx", "docx", "python-docx"),
        ("html", "selectolax.lexbor", "selectolax"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(SystemExit, match=f"format {name} needs the package {package}; install"):
            read(b"a", name)


# Properties -----------------------------------------------------------------------------------------------------------


@given(text=AWKWARD, encoding=ENCODINGS, separator=st.sampled_from([None, "上", "^a", "(?<=\n)", "\r\n|\\[", "[^a]$"]))
def test_text_is_cut_without_loss(text: str, encoding: str, separator: str | None) -> None:
    """The contents, with the line ends that reading by line takes off, are the file without its mark."""
    data = text.encode(encoding)
    expected = text if encoding == "utf-16" else text.removeprefix("\ufeff")
    more = {"sample_by": "separator", "separator": separator} if separator else {}
    found = contents(read(data, "text", encoding=encoding, **more))
    assert "".join(found) == expected
    if separator:
        lines = expected if "\r" in separator else expected.replace("\r\n", "\n")
        begins = [m.start() for m in re.finditer(separator, lines, re.MULTILINE) if m.start()]
        assert len(found) == len(set(begins)) + 1
    lines = expected.split("\n")
    lines = [line.rstrip("\r") for line in (lines if lines[-1] or len(lines) == 1 else lines[:-1])]
    assert contents(read(data, "text", sample_by="line", encoding=encoding)) == lines or expected == ""


@given(
    rows=st.lists(st.dictionaries(st.sampled_from(["text", "b", "中"]), AWKWARD)), encoding=ENCODINGS, data=st.data()
)
def test_json_is_read_as_the_standard_library_reads_it(rows: list[dict[str, str]], encoding: str, data: Any) -> None:
    space = st.sampled_from(["", " ", "\n", "\r\n\t"])
    plain = data.draw(st.booleans())
    texts = [json.dumps(row, ensure_ascii=plain) for row in rows]
    expected = [(row.get("text", ""), "text" not in row) for row in rows]
    array = data.draw(space) + "[" + ",".join(data.draw(space) + text + data.draw(space) for text in texts) + " ]\n"
    found = read(array.encode(encoding), "json", encoding=encoding)
    assert [(record.content, bool(record.error)) for record in found] == (expected or [("", False)])
    blank = data.draw(st.sampled_from(["\n", "\r\n", " \t\n"]))
    found = read("".join(text + "\r\n" + blank for text in texts).encode(encoding), "jsonl", encoding=encoding)
    assert [(record.content, bool(record.error)) for record in found[::2]] == (expected or [("", False)])
    assert not any(record.content or record.error for record in found[1::2])


@given(
    rows=st.lists(st.tuples(AWKWARD, AWKWARD)),
    end=st.sampled_from(["\n", "\r\n"]),
    encoding=ENCODINGS,
    name=st.sampled_from(["csv", "tsv"]),
)
def test_csv_is_read_as_it_was_written(rows: list[tuple[str, str]], end: str, encoding: str, name: str) -> None:
    sink = io.StringIO()
    delimiter = "," if name == "csv" else "\t"
    csv.writer(sink, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([("text", "b"), *rows])
    found = read(sink.getvalue().encode(encoding), name, encoding=encoding)
    assert contents(found) == ([text for text, _ in rows] or [""])


@given(
    data=AWKWARD.map(str.encode) | st.binary(max_size=40),
    name=st.sampled_from(TILED),
    encoding=ENCODINGS,
    sample_by=st.sampled_from(["document", "line"]),
)
def test_no_bytes_raise_and_all_are_accounted_for(data: bytes, name: str, encoding: str, sample_by: str) -> None:
    """`read` checks it."""
    by = {"sample_by": sample_by} if name == "text" else {}
    found = read(data, name, encoding=encoding, **by)
    assert found == read(data, name, ".zst", encoding=encoding, **by)


@given(cut=st.floats(0, 1), flip=st.booleans(), packed=st.sampled_from([".gz", ".zst"]), document=st.booleans())
def test_damage_spoils_what_it_reaches(cut: float, flip: bool, packed: str, document: bool) -> None:
    """Of a cut or changed compressed file, the records before the damage are those of the whole one."""
    lines = b"".join(f"line {number} {hash_of(number)}\n".encode() for number in range(3_000))
    whole = PACKERS[packed](lines)
    at = int(cut * (len(whole) - 1))
    damaged = whole[:at] + (bytes([whole[at] ^ 1]) + whole[at + 1 :] if flip else b"")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a.txt{packed}")
        path.write_bytes(damaged)
        *good, last = records(path, params("text", sample_by="document" if document else "line"))
    if last.error is None:  # a flag that matters to nobody was flipped
        assert flip
        return
    assert "is cut or damaged" in last.error and folder not in last.error
    data = b"".join(record.raw for record in [*good, last])
    check([*good, last], data)
    if not flip:
        assert lines.startswith(data)
        assert [record.raw for record in good] == lines[: good[-1].end if good else 0].splitlines(keepends=True)
    assert not (document and good)


def hash_of(number: int) -> str:
    return f"{number * 2654435761 % 2**64:016x}"


# Malformed files ------------------------------------------------------------------------------------------------------

ROW = b'{"text": "good"}\n'
GOOD = (None, "good")


def bad_utf8_table() -> bytes:
    column = pa.Array.from_buffers(pa.string(), 3, pa.array([b"good", b"\xff", b"good"]).buffers())
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, pa.schema([("text", pa.string())])) as writer:
        writer.write_batch(pa.record_batch({"text": column}))
    return sink.getvalue()


def flipped_table() -> bytes:
    """Return a Parquet file in which one letter is not the one that was written."""
    sink = io.BytesIO()
    table = pa.table({"text": ["good"]})
    plain: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    parquet.write_table(table, sink, write_page_checksum=True, **plain)
    return sink.getvalue().replace(b"good", b"food")


# name: format, bytes, more parameters, and of each record the error (a pattern) or the content.
MALFORMED: dict[str, tuple[str, bytes, dict[str, Any], list[tuple[str | None, str]]]] = {
    "NUL bytes are content": ("text", b"a\x00b\x00", {}, [(None, "a\x00b\x00")]),
    "not UTF-8": ("text", b"ab\ncd\xffe", {}, [(r"byte 5 \(line 2\) is not UTF-8$", "")]),
    "not UTF-8, by line": (
        "text",
        b"good\ncd\xffe\ngood",
        {"sample_by": "line"},
        [GOOD, (r"^byte 7 \(line 2\) is not UTF-8$", ""), GOOD],
    ),
    "UTF-8 that GB18030 can read": (
        "text",
        "第一条中华人民共和国公民在法律面前一律平等制".encode(),
        {"encoding": "gb18030"},
        [("line 1 is UTF-8, though it can be read as GB18030", "")],
    ),
    "UTF-8 of a few quotes": (
        "text",
        "\u201cyes\u201da \u201cno\u201db \u2013c".encode(),
        {"encoding": "gb18030"},
        [("line 1 is UTF-8, though it can be read as GB18030", "")],
    ),
    "not GB18030": ("text", b"ab\xff", {"encoding": "gb18030"}, [(r"byte 2 \(line 1\) is not GB18030", "")]),
    "UTF-16 without its mark": ("text", b"a\0b\0", {"encoding": "utf-16"}, [("no byte order mark", "")]),
    "UTF-16 with half a unit": (
        "text",
        b"\xff\xfea\0b",
        {"encoding": "utf-16"},
        [(r"byte 4 \(line 1\) is not UTF-16$", "")],
    ),
    "UTF-16 with half a pair": (
        "text",
        "\ufeffa\n".encode("utf-16-be") + b"\xd8\x00\n\0good".replace(b"good", "good".encode("utf-16-be")),
        {"encoding": "utf-16"},
        [(r"byte 6 \(line 2\) is not UTF-16$", "")],
    ),
    "jsonl: not JSON": (
        "jsonl",
        ROW + b'{"text": }\n' + ROW,
        {},
        [GOOD, (r"line 2, column 10 is not JSON \(Exp", ""), GOOD],
    ),
    "jsonl: no end": ("jsonl", ROW + b'{"text": "a', {}, [GOOD, (r"line 2, column 10 is not JSON \(Unterminated", "")]),
    "jsonl: no value": ("jsonl", b'{"text":\r\n', {}, [(r"line 1, column 9 is not JSON \(Expecting value\)", "")]),
    "jsonl: two values": ("jsonl", b"{} {}\n", {}, [(r"line 1, column 4 is not JSON \(Extra data\)", "")]),
    "jsonl: a list": ("jsonl", ROW + b"[]\n", {}, [GOOD, ("^line 2 is JSON .* named fields; an array", "")]),
    "jsonl: no such field": ("jsonl", b'{"txt": "", "a": 1}', {}, [("line 1 has no field `text`; it has a, txt", "")]),
    "jsonl: not a string": ("jsonl", b'{"text": 5}', {}, [("line 1: the field `text` is 5, expected a string", "")]),
    "jsonl: half a pair": (
        "jsonl",
        b'{"text": "\\ud800"}',
        {},
        [("the field `text` holds half of a surrogate pair", "")],
    ),
    "jsonl: a name twice": ("jsonl", b'{"text": "a", "text": "b"}\n' + ROW, {}, [("holds `text` twice", ""), GOOD]),
    "jsonl: a deep name twice": ("jsonl", b'{"text": "a", "m": [{"b": 1, "b": 2}]}', {}, [("holds `b` twice", "")]),
    "jsonl: nested too deep": ("jsonl", b"[" * 100_000 + b"\n" + ROW, {}, [("beyond what Python reads", ""), GOOD]),
    "jsonl: too long a number": ("jsonl", b"9" * 5_000 + b"\n" + ROW, {}, [("beyond what Python reads", ""), GOOD]),
    "jsonl: NaN elsewhere": ("jsonl", b'{"text": "good", "n": NaN, "i": -Infinity}', {}, [GOOD]),
    "jsonl in UTF-16": (
        "jsonl",
        ROW.decode().encode("utf-16"),
        {},
        [("byte 0 .line 1. is not UTF-8", ""), ("line 2, column 1 is not JSON", "")],
    ),
    "json: jsonl": ("json", ROW + ROW, {}, [(r"line 2, column 1 is not JSON \(Extra data\)", "")]),
    "json: cut": (
        "json",
        b"[" + ROW + b"," + ROW,
        {},
        [GOOD, GOOD, ("line 3, column 1 is not JSON .expecting a comma", "")],
    ),
    "json: cut in a value": ("json", b"[" + ROW + b', {"te', {}, [GOOD, ("line 2, column 4 is not JSON", "")]),
    "json: a comma too many": ("json", b"[" + ROW + b",]", {}, [GOOD, ("line 2, column 2 is not JSON", "")]),
    "json: no comma": (
        "json",
        b"[" + ROW + ROW + b"]",
        {},
        [GOOD, ("line 2, column 1 is not JSON .expecting a comma", "")],
    ),
    "json: text behind": ("json", b"[" + ROW + b"] x", {}, [GOOD, ("line 2, column 1 is not JSON", "")]),
    "json: a number": (
        "json",
        b"[" + ROW + b", 5,\n" + ROW + b"]",
        {},
        [GOOD, ("line 2 is JSON but not an obj", ""), GOOD],
    ),
    "json: a string": ("json", b'[\n\n"a"]', {}, [("line 3 is JSON but not an object", "")]),
    "json: a name twice": (
        "json",
        b"[" + ROW + b', {"text": "", "text": ""},' + ROW + b"]",
        {},
        [GOOD, ("line 2, column 3 is an object that holds `text` twice", ""), GOOD],
    ),
    "json: not UTF-8": ("json", b'["\xff"]', {}, [(r"byte 2 \(line 1\) is not UTF-8", "")]),
    "csv: ragged": (
        "csv",
        b"text,b\ngood,1\na\nb,1,2\n\ngood,2\n",
        {},
        [GOOD, ("line 3: it has 1 field, the header names 2", ""), ("line 4: it has 3 fields", ""), (None, ""), GOOD],
    ),
    "csv: no such column": (
        "csv",
        b"id\n1\n2\n",
        {},
        [("line 2: the header has no column `text`, only id", ""), ("line 3: the header has no", "")],
    ),
    "csv: a blank in a name": ("csv", b"id, text\n1,2\n", {}, [("no column `text`, only id, ' text'$", "")]),
    "csv: another delimiter": (
        "csv",
        b"id;text\n1;2\n",
        {},
        [('id;text; are its .* `delimiter: ";"`[?]$', "")],
    ),
    "csv: tabs": ("csv", b"id\ttext\n1\t2\n", {}, [('are its columns apart by `delimiter: "\\\\t"`[?]$', "")]),
    "csv: a book for a header": (
        "csv",
        b"word " * 9_999 + b"word\n1\n",
        {},
        [("no column `text`, only word word", "")],
    ),
    "csv: no such column, of one that may be missing": (
        "csv",
        b"instruction,input,output\nq,,a\n",
        {"record": "alpaca", "columns": {"history": "chat"}},
        [("line 2: the header has no column `chat`, only instruction, input, output", "")],
    ),
    "jsonl: no such field, of one that may be missing": (
        "jsonl",
        b'{"instruction": "q", "input": "", "output": "a"}\n',
        {"record": "alpaca", "columns": {"history": "chat"}},
        [("line 1 has no field `chat`; it has input, instruction, output", "")],
    ),
    "jsonl: an array": (
        "jsonl",
        b'[\n{"text": "a"}\n]\n',
        {},
        [("line 1 begins an array, which `format: json` reads", ""), (None, "a"), ("line 3, column 1 is not JSON", "")],
    ),
    "jsonl: rows of another kind": (
        "jsonl",
        b'{"instruction": "a", "input": "b", "output": "c"}\n',
        {"record": "messages"},
        [("no field `messages`; it has input, instruction, output, as `record: alpaca` needs", "")],
    ),
    "csv: a blank line before the header": (
        "csv",
        b"\ntext\na\n",
        {},
        [("line 2: the first line is blank, where the names of", ""), ("line 3: the first line is", "")],
    ),
    "csv: a column twice": ("csv", b"text,text\na,b\n", {}, [("line 2: the header has the column `text` twice", "")]),
    "csv: a quote that never ends": (
        "csv",
        b'text\ngood\n"a\nb\n',
        {},
        [GOOD, ("the row of line 3 is not CSV .unexpected end", ""), (None, "b")],
    ),
    "csv: text behind a quote": ("csv", b'text\n"a"b\ngood\n', {}, [("the row of line 2 is not CSV", ""), GOOD]),
    "csv: a lone CR": (
        "csv",
        b"text\na\rb\ngood\n",
        {},
        [("the row of line 2 is not CSV .new-line character seen in unquoted field.$", ""), GOOD],
    ),
    "csv: not UTF-8": ("csv", b"text\n\xff\ngood\n", {}, [("byte 5 .line 2. is not UTF-8", ""), GOOD]),
    "csv: a header that is not UTF-8": ("csv", b"text,\xff\ngood,\n", {}, [("byte 5 .line 1. is not UTF-8", "")]),
    "parquet: no such column": (
        "parquet",
        table_bytes([{"id": 1, "body": "a"}], "parquet"),
        {},
        [(r"^the file cannot be read \(it has no column `text`, only id, body\)$", "")],
    ),
    "parquet: cut": (
        "parquet",
        table_bytes([{"text": "a"}], "parquet")[:-9],
        {},
        [("the file cannot be read .*Parquet", "")],
    ),
    "parquet: a changed letter": ("parquet", flipped_table(), {}, [("the file cannot be read .*checksum", "")]),
    "parquet: a column of numbers": (
        "parquet",
        table_bytes([{"text": 5}], "parquet"),
        {},
        [("row 1: the field `text` is 5", "")],
    ),
    "parquet: null": (
        "parquet",
        table_bytes([{"text": "good"}, {"text": None}], "parquet"),
        {},
        [GOOD, ("row 2: the field `text` is null, expected a string", "")],
    ),
    "arrow: cut in a batch": (
        "arrow",
        table_bytes([{"text": "good"}] * 4, "arrow")[:-80],
        {},
        [GOOD, GOOD, ("from row 3 on, the file", "")],
    ),
    "arrow: cut behind a batch": (
        "arrow",
        table_bytes([{"text": "good"}], "arrow")[:-8],
        {},
        [GOOD, ("from row 2 on.*without Arrow's end mark", "")],
    ),
    "arrow: not UTF-8": ("arrow", bad_utf8_table(), {}, [GOOD, ("the row cannot be read .*Invalid UTF8", ""), GOOD]),
    "arrow: text": ("arrow", b"text, not Arrow", {}, [("the file cannot be read", "")]),
    "pdf: text": ("pdf", b"text, not a PDF", {}, [("the file cannot be read .PdfStreamError", "")]),
    "docx: text": ("docx", b"text, not a Word file", {}, [("the file cannot be read .BadZipFile", "")]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_errors_and_good_records(name: str) -> None:
    form, data, more, expected = MALFORMED[name]
    found = read(data, form, **more)
    assert [record.content for record in found] == [content for _, content in expected]
    for record, (error, _) in zip(found, expected, strict=True):
        assert (record.error is None) == (error is None)
        assert re.search(error or "", record.error or ""), record.error


def test_a_cut_gzip_gives_the_lines_before_the_cut(tmp_path: Path) -> None:
    """The last line begun is the error; where the cut falls between two lines, the error has no bytes."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(ROW + b'{"text": "0123456789"}\n')[:-12])
    *good, last = records(path, params("jsonl"))
    assert [record.content for record in good] == ["good"]
    assert last.end is not None and (last.start, last.number) == (len(ROW), 2)
    assert last.raw == b'{"text": "0123456789"}'[: last.end - len(ROW)]
    assert (
        last.error
        == f"the gzip stream is cut or damaged after byte {last.end} of its content (Truncated compressed stream)"
    )
    path.write_bytes(gzip.compress(ROW + ROW) + b"behind")
    *good, last = records(path, params("jsonl"))
    assert [record.content for record in good] == ["good", "good"]
    assert (last.start, last.end, last.number, last.raw) == (34, 34, 3, b"")
    path.write_bytes(ROW)
    (record,) = records(path, params("jsonl"))
    assert record[:5] == (0, 0, 1, b"", "") and "gzip stream is cut or damaged after byte 0" in str(record.error)
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b'text\n"one\ntwo\nthree"\n', 0)[:-10])  # in a row of several lines
    (record,) = records(path, params("csv"))
    assert "gzip stream is cut" in str(record.error) and record.raw.startswith(b'text\n"one\ntwo\n')
    path = tmp_path / "a.parquet.gz"
    path.write_bytes(gzip.compress(table_bytes([{"text": "good"}], "parquet"))[:-4])  # all of the table, not its size
    (record,) = records(path, params("parquet"))
    assert "gzip stream is cut or damaged" in str(record.error)


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_compressed_file_of_no_bytes_is_damaged_and_one_of_no_content_is_empty(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"a.txt{packed}"
    for data, error in (
        (b"", "stream is cut or damaged after byte 0 of its content (no bytes at all)"),
        (PACKERS[packed](b""), "None"),
    ):
        path.write_bytes(data)
        (record,) = records(path, params("text"))
        assert error in str(record.error)
        assert record[:5] == (0, 0, 1, b"", "")


def test_several_gzip_members_and_zstd_frames_are_one_file(tmp_path: Path) -> None:
    for packed in COMPRESSIONS:
        path = tmp_path / f"a.jsonl{packed}"
        path.write_bytes(PACKERS[packed](ROW) + PACKERS[packed](ROW))
        assert contents(list(records(path, params("jsonl")))) == ["good", "good"]


def test_a_file_that_may_not_be_opened_is_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its path: the sentence goes into the ledger, which is the same on every machine."""
    path = tmp_path / "a.txt"
    for name in ("text", "parquet"):
        (record,) = records(path, params(name))
        assert record.error == "the file cannot be read (No such file or directory)"
        (record,) = records(tmp_path, params(name))
        assert record.error == "the file cannot be read (Is a directory)"
    path.symlink_to(path)
    (record,) = records(path, params("text"))
    assert record.error == "the file cannot be read (Too many levels of symbolic links)"

    def forbidden(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", forbidden)
    assert list(records(path, params("jsonl"))) == [
        Record(0, 0, 1, b"", "", "the file cannot be read (Permission denied)")
    ]


def test_a_damaged_length_in_arrow_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow says MemoryError when a changed byte makes it ask for more than there is (found by changing bytes)."""

    def greedy(*_: Any) -> None:
        raise MemoryError("malloc of size 9 failed")

    monkeypatch.setitem(raw_formats.TABLES, "arrow", greedy)
    (record,) = read(b"", "arrow")
    assert record.error == "the file cannot be read (malloc of size 9 failed)"


# Size -----------------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """50 MB of lines, in 20 MB; a reader that gathers them would need more than 50."""
    line = json.dumps({"text": "长 text " * 600}).encode() + b"\n"
    files = {
        "jsonl": [line] * (50_000_000 // len(line)),
        "csv": [b"text\n", *[b'"' + b"long text " * 500 + b'\n"\n'] * 10_000],
    }
    for name, lines in files.items():
        path = tmp_path / f"a.{name}.gz"
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.writelines(lines)
        size = sum(map(len, lines))
        assert size > 49_000_000
        lines.clear()
        tracemalloc.start()
        last = None
        for last in records(path, params(name)):
            assert last.error is None
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert last and last.end == size
        assert peak < 20_000_000, name


def test_one_long_line() -> None:
    """Longer than any buffer, and than the field limit of the csv module; compressed, too."""
    text = "长 line " * 2_000_000
    assert contents(read(text.encode(), "text", ".zst", sample_by="line")) == [text]
    assert contents(read(text.encode("utf-16"), "text", sample_by="line", encoding="utf-16")) == [text]
    assert contents(read(json.dumps({"text": text}).encode(), "jsonl")) == [text]
    assert contents(read(f"text\n{text}\n".encode(), "csv")) == [text]


# Parameters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "sentence"),
    [
        ({"format": "text", "record": "alpaca"}, "format text has no rows"),
        ({"format": "pdf", "columns": {"text": "a"}}, "format pdf has no rows"),
        ({"format": "html", "record": "messages"}, "format html has no rows"),
        ({"format": "csv", "record": "messages"}, "a cell of csv is a text, and record messages needs lists"),
        ({"format": "tsv", "record": "sharegpt"}, "a cell of tsv is a text, and record sharegpt needs lists"),
        ({"format": "jsonl", "sample_by": "line"}, "`sample_by: line` is not for format jsonl"),
        ({"format": "docx", "sample_by": "line"}, "`sample_by: line` is not for format docx"),
        ({"format": "text", "sample_by": "separator"}, "`sample_by: separator` and a `separator` go together"),
        ({"format": "text", "separator": "^#"}, "`sample_by: separator` and a `separator` go together"),
        ({"format": "text", "sample_by": "separator", "separator": "("}, r"separator \( is not a regular expression"),
        ({"format": "text", "sample_by": "separator", "separator": "a*"}, r"separator a\* matches the empty text"),
        ({"format": "parquet", "encoding": "utf-16"}, "format parquet knows its own encoding"),
        ({"format": "jsonl", "columns": {"txt": "a"}}, "`columns` names `txt`, but record text reads text"),
        ({"format": "jsonl", "fill": {"{{a}}": "b"}}, "write the name without its braces and blanks"),
        ({"format": "jsonl", "fill": {" a": "b"}}, "write the name without its braces and blanks"),
        ({"format": "jsonl", "quotechar": None}, "`quotechar` is for csv and tsv; format jsonl has none"),
        ({"format": "csv", "quotechar": "\0"}, "`quotechar` cannot be a line end or NUL"),
        ({"format": "tsv", "quotechar": "\t"}, "cannot be both what separates fields and what stands around them"),
        ({"format": "text", "delimiter": ";"}, "`delimiter` is for csv and tsv; format text has none"),
        (
            {"format": "jsonl", "record": "alpaca", "columns": {"input": "instruction"}},
            "`columns` reads `instruction` as `input` and as `instruction`; give each its own, or null for one",
        ),
        ({"format": "jsonl", "text_column": "a"}, "Extra inputs"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(group: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Params.model_validate(group)


def test_a_compressed_file_has_no_lines_to_cut_at_however_its_name_is_written() -> None:
    assert cuttable(Path("A.JSONL"), Params(format="jsonl"))
    assert not any(cuttable(Path(f"a.jsonl{end}"), Params(format="jsonl")) for end in (".gz", ".GZ", ".zst"))


def test_every_parameter_is_described_and_every_format_has_its_suffixes() -> None:
    assert all(field.description for field in Params.model_fields.values())
    assert SUFFIXES["html"] == (".html", ".html.gz", ".html.zst", ".htm", ".htm.gz", ".htm.zst")
    assert set(SUFFIXES) == {*raw_formats.FORMATS, *raw_formats.TABLES}
    assert set(raw_formats.TABLES) == set(UNITS)
