"""Answers as text: single values first, then each list of equal things as a table. Plain where it is no terminal.

What is too long to be read is cut and said to be: a cell, a table of many rows.
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

SHOWN = 80  # characters of a cell
ROWS = 40  # of a table: a long law stands in hundreds of blocks
WIDE = 10_000  # columns of a pipe: no line is broken


def show(answer: Any, limit: int = 0) -> None:
    """Print an answer or a list of them. `limit`: how many rows of a table were asked for, where that is more."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
    answers = answer if isinstance(answer, list) else [answer]
    for number, one in enumerate(answers):
        if number:
            console.print()
        _one(console, one, max(ROWS, limit))


def _one(console: Console, answer: dict[str, Any], shown: int, of: str = "") -> None:
    tables = {key: value for key, value in answer.items() if _is_table(value)}
    plain = {key: value for key, value in answer.items() if key not in tables and value is not None}
    width = max(map(len, plain), default=0)
    for key, value in plain.items():
        console.print(Text(f"{key:{width}}  {_cell(value)}"))
    for key, rows in tables.items():
        names = list(dict.fromkeys(name for row in rows for name in row))
        console.print(Text(key.replace("_", " ") + of, style="italic"))  # as a title it would be as narrow as its table
        table = Table(box=None, pad_edge=False)
        for name in names:
            table.add_column(name, justify="right" if all(isinstance(row.get(name), int) for row in rows) else "left")
        for row in rows[:shown]:
            table.add_row(*(Text(_short(_cell(row.get(name)))) for name in names))
        console.print(table)
        if len(rows) > shown:
            console.print(f"… and {len(rows) - shown:,} more; --json prints all")
        for row in rows[:shown]:
            if below := {name: value for name, value in row.items() if _is_table(value)}:
                _one(console, below, shown, f" of {_cell(next(iter(row.values())))}")


def _short(text: str) -> str:
    """Return a text as one short line; --json has the whole of it."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if _is_table(value):
        return f"{len(value)} below"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool) or not isinstance(value, int):
        return str(value)
    return f"{value:,}"
