"""How a row of a raw file becomes a text or a conversation: the columns of each kind of record, and their checks."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from raw_params import COLUMNS, LEAVABLE, UNITS, VERDICTS, Params
from raw_records import Content, Message, Record, sentence
from thoughts import THOUGHT

ROLES = {  # developer: the system turn of OpenAI's reasoning models; human, gpt, observation: of ShareGPT
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}

# Who speaks, in the other kind of messages: the key, the kind of record, its column.
OTHER_KEYS = {"role": ("from", "sharegpt", "conversations"), "from": ("role", "messages", "messages")}
WEIGHTS = ("weight", "loss")  # of a message: OpenAI's fine-tuning, ms-swift


def columns_of(params: Params, present: list[str]) -> list[str]:
    """Return the columns to read of those that a table has; raise ValueError when one is missing or stands twice."""
    required, optional = COLUMNS[params.record]
    names = []
    for standard in required + optional:
        name = params.columns.get(standard, standard)
        if name is None:
            continue
        if name in present:
            names.append(name)
        elif standard in required or standard in params.columns:
            # A blank in a name would not be seen without quotes.
            shown = ", ".join(one if one.isprintable() and one == one.strip() else repr(one) for one in present)
            raise ValueError(f"it has no column `{name}`, only {shown}" if present else "it has no columns")
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
    system "Brief.", user "1+1", assistant "2", user "Add.\\n2+2", assistant "4". A row's `system` stands before what a
    system turn says, its `tools` become JSON text behind that; a system turn without words is none. Answers in
    a `prompt` of messages are examples, not learned.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        hint = "; an array of objects is `format: json`" if isinstance(row, list) and params.format == "jsonl" else ""
        raise ValueError(f"{place} is JSON but not an object with named fields{hint}")

    def field(standard: str) -> tuple[Any, str]:
        """Return the value, None for an optional field that is not there, and what an error calls it."""
        name = params.columns.get(standard, standard)
        if name is None:
            return None, ""
        if name not in row and (standard in COLUMNS[params.record][0] or standard in params.columns):
            others = [
                kind for kind, (needed, _) in COLUMNS.items() if kind != params.record and row.keys() >= set(needed)
            ]
            hint = f", as `record: {others[0]}` needs" if others else ""
            if standard in LEAVABLE:
                hint += f"; `columns: {{{standard}: null}}` says that there is none"
            raise ValueError(f"{place} has no field `{name}`; it has {', '.join(sorted(row)) or 'none'}{hint}")
        return row.get(name), f"{place}: the field `{name}`"

    def turn(role: str, standard: str) -> Message:
        return {"role": role, "content": string_of(*field(standard))}

    if params.record == "text":
        return string_of(*field("text"))
    for standard in (name for name in VERDICTS if name in COLUMNS[params.record][1]):
        value, where = field(standard)
        if value is False or (isinstance(value, str) and value.strip().lower() == "false"):
            raise ValueError(
                f"{where} says that the answer is a bad one, and it would be learned; take the row out, "
                f"or let `on_error: drop` do so (`columns: {{{standard}: null}}`: not read)"
            )
    if params.record == "messages":
        turns = _turns(*field("messages"), "role", "content", params)
    elif params.record == "sharegpt":
        turns = _turns(*field("conversations"), "from", "value", params)
    elif params.record == "prompt_completion":
        turns = _asked(*field("history"))
        for role, standard in (("user", "prompt"), ("assistant", "completion")):
            value, where = field(standard)
            if isinstance(value, list):
                said = _turns(value, where, "role", "content", params)
                if standard == "completion" and said[0]["role"] == "user" and turns[-1]["role"] == "user":
                    name = params.columns.get(standard, standard)
                    raise ValueError(
                        f"{where} begins with a question behind that of the prompt; if it is the whole conversation, "
                        f"read it by `record: messages` and `columns: {{messages: {name}}}`"
                    )
                turns += [_not_learned(turn) for turn in said] if standard == "prompt" else said
            else:
                turns.append({"role": role, "content": string_of(value, where)})
    else:
        value, where = field("input")
        question = string_of(*field("instruction")) + "\n" + string_of("" if value is None else value, where)
        turns = [*_asked(*field("history")), {"role": "user", "content": question.strip()}, turn("assistant", "output")]
    turns = [turn for turn in turns if turn["role"] != "system" or turn["content"].strip()]
    system = string_of(*field("system")) if field("system")[0] else ""
    tools = _tools(*field("tools"), params) if "tools" in COLUMNS[params.record][1] else ""
    if not (system.strip() or tools):
        return turns
    own, rest = (turns[0]["content"], turns[1:]) if turns and turns[0]["role"] == "system" else ("", turns)
    parts = filter(str.strip, dict.fromkeys((system, own, tools)))
    return [{"role": "system", "content": "\n\n".join(parts)}, *rest]


def _asked(pairs: Any, where: str) -> list[Message]:
    """Return the turns of a `history`: pairs, or JSON text of them, as a cell of csv holds it."""
    if isinstance(pairs, str):
        with contextlib.suppress(ValueError, RecursionError):
            pairs = json.loads(pairs) if pairs.strip() else []
    pairs = pairs or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"{where} is {_short(pairs)}, expected a list of pairs of question and answer")
    said = [(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [{"role": role, "content": string_of(text, where)} for role, text in said]


def _not_learned(turn: Message) -> Message:
    return {**turn, "learn": False} if turn["role"] == "assistant" else turn


def _tools(tools: Any, where: str, params: Params) -> str:
    """Return the functions that may be called as text; "" where there are none.

    As JSON text like the calls themselves: so rules clean them, and the ledger accounts for them, as for all text.
    """
    text, found = _json(tools, params)
    if not found:
        return ""
    if not all(isinstance(one, dict) for one in (found if isinstance(found, list) else [found])):
        raise ValueError(
            f"{where} is {_short(tools)}, expected a list of functions (`columns: {{tools: null}}`: not read)"
        )
    return string_of(text, where)


def _turns(value: Any, where: str, role_key: str, text_key: str, params: Params) -> list[Message]:
    """Return a list of messages with our roles. Tool calls become JSON text behind what the turn says.

    Of an assistant                                gives
    "content": null, "tool_calls": [{"id": "1"}]   [{"id": "1"}]
    "content": "4", "reasoning_content": "2+2"     <think>\\n2+2\\n</think>\\n\\n4
    "content": "5", "weight": 0                    5, not learned
    """
    if not isinstance(value, list):
        raise ValueError(f"{where} is {_short(value)}, expected a list of messages")
    if not value:
        raise ValueError(f"{where} is an empty conversation")
    turns: list[Message] = []
    for number, message in enumerate(value, start=1):
        here = f"{where}, message {number},"
        if not isinstance(message, dict):
            raise ValueError(f"{here} is {_short(message)}, expected an object with `{role_key}` and `{text_key}`")
        role, text = message.get(role_key), message.get(text_key)
        other, kind, column = OTHER_KEYS[role_key]
        if role is None and other in message and params.record in ("messages", "sharegpt"):
            own = OTHER_KEYS[other][2]
            raise ValueError(
                f"{here} has `{other}` and no `{role_key}`; read it by `record: {kind}` and "
                f"`columns: {{{column}: {params.columns.get(own, own)}}}`"
            )
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"{here} has the {role_key} {_short(role)}, expected one of {', '.join(ROLES)}")
        if isinstance(text, list):  # parts, as OpenAI writes them; pictures and sound have no text
            text = "".join(_part(part, f"{here} part {at}") for at, part in enumerate(text, start=1))
        if calls := _calls(message, here, params):
            said = string_of("" if text is None else text, f"{here} `{text_key}`")
            text = "\n".join(filter(None, (said, calls)))
        if text is None and text_key not in message:
            raise ValueError(f"{here} has no `{text_key}`")
        text = string_of(text, f"{here} `{text_key}`")
        if ROLES[role] == "assistant":
            text = _thought(message, here, params, text) + text
        turn: Message = {"role": ROLES[role], "content": text}
        turns.append(_not_learned(turn) if 0 in [_weight(message, name, here) for name in WEIGHTS] else turn)
    return turns


def _calls(message: dict[str, Any], here: str, params: Params) -> str:
    """Return the functions that a message calls as JSON text, also where they stand there as such; "" for none."""
    for name in ("tool_calls", "function_call"):
        if not (value := message.get(name)):
            continue
        text, found = _json(value, params)
        if found and not isinstance(found, list | dict):
            raise ValueError(f"{here} has the {name} {_short(value)}, expected calls of functions")
        if found:
            return text
    return ""


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and not isinstance(part.get("text"), str):
        kind = part.get("type")
        raise ValueError(f"{where} is {f'of type {_short(kind)}' if kind else 'an object'} and has no text")
    return string_of(part["text"] if isinstance(part, dict) else part, where)


def _thought(message: dict[str, Any], here: str, params: Params, said: str) -> str:
    """Return what an assistant thought, as it stands before what it said; "" if that is blank or has it already."""
    name = params.columns.get("reasoning_content", "reasoning_content")
    thought = message.get(name) if name else None
    text = string_of(thought, f"{here} `{name}`").strip() if thought is not None else ""
    return THOUGHT.format(text) if text and said.strip() and not said.lstrip().startswith("<think>") else ""


def _weight(message: dict[str, Any], name: str, here: str) -> Any:
    if message.get(name) not in (None, 0, 1):
        raise ValueError(f"{here} has the {name} {_short(message[name])}, expected 1 (learned) or 0 (not learned)")
    return message.get(name)


def _json(value: Any, params: Params) -> tuple[str, Any]:
    """Return calls or functions as JSON text, and what it says; of a text that is no JSON, that text.

    Without nulls from a table, where each has the fields of all others. A text, as many tables hold it, stays as it is.
    """
    if not isinstance(value, str):
        value = _without_nulls(value) if params.format in UNITS else value
        return json.dumps(value, ensure_ascii=False, default=str), value
    try:
        return value, json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value, value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


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
