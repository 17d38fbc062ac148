"""How a row of a raw file becomes a text or a conversation: the columns of each kind of record, and their checks."""

from __future__ import annotations

import json
from typing import Any

from raw_params import COLUMNS, Params
from raw_records import Content, Record, sentence

ROLES = {  # developer: the system turn of OpenAI's reasoning models; human, gpt, observation: of ShareGPT
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}


def columns_of(params: Params, present: list[str]) -> list[str]:
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


def record_of_row(
    start: int | None, end: int | None, number: int, raw: bytes, row: Any, params: Params, place: str
) -> Record:
    """Return the record of a row, or of the ValueError that stands for it; `place` is how an error calls it."""
    try:
        return Record(start, end, number, raw, content_of(row, params, place), None)
    except (ValueError, RecursionError) as error:  # nested as deep as JSON can be read, but not written again
        return Record(start, end, number, raw, "", sentence(error))


def content_of(row: Any, params: Params, place: str) -> Content:
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
        return {"role": role, "content": string_of(*field(standard))}

    if params.record == "text":
        return string_of(*field("text"))
    if params.record == "messages":
        return _turns(*field("messages"), "role", "content")
    turns: list[dict[str, str]] = []
    if params.record == "prompt_completion":
        for role, standard in (("user", "prompt"), ("assistant", "completion")):
            value, where = field(standard)
            if isinstance(value, list):
                turns += _turns(value, where, "role", "content")
            else:
                turns.append({"role": role, "content": string_of(value, where)})
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
        turns.append({"role": "user", "content": string_of(pair[0], where)})
        turns.append({"role": "assistant", "content": string_of(pair[1], where)})
    value, where = field("input")
    question = string_of(*field("instruction")) + "\n" + string_of("" if value is None else value, where)
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
        if message.get("weight") not in (None, 1):  # of OpenAI's fine-tuning: 0 is not to be learned
            raise ValueError(f"{here} has the weight {_short(message['weight'])}: all answers here are learned alike")
        if isinstance(text, list):  # parts, as OpenAI writes them; pictures and sound have no text
            parts = [part.get("text") if isinstance(part, dict) else part for part in text]
            text = "".join(string_of(part, f"{here} part {at}") for at, part in enumerate(parts, start=1))
        if calls := message.get("tool_calls") or message.get("function_call"):
            said = string_of("" if text is None else text, f"{here} `{text_key}`")
            text = "\n".join(filter(None, (said, json.dumps(calls, ensure_ascii=False, default=str))))
        turns.append({"role": ROLES[role], "content": string_of(text, f"{here} `{text_key}`")})
    return turns


def string_of(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} is {_short(value)}, expected a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where} holds half of a surrogate pair") from None
    return value


def _short(value: Any) -> str:
    kind = "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else None
    return kind or json.dumps(value[:40] if isinstance(value, str) else value, default=str)[:40]
