"""The rules of `clean`: each takes a text and returns it cleaned, with the count of changes, or why to drop the record.

    rules: [{rule: nfc}, {rule: pii, kinds: [email, mobile]}, {rule: length, min_chars: 8}]

    "邮箱zhang@qq.com，电话13812345678。"  ->  "邮箱<EMAIL>，电话<PHONE>。", {"pii": 2}, None
    "第一条"                               ->  None, {}, ("length", "3 < 8 characters")

A rule is a function of its parameters, of the list it names, and of the text: no clock, no order of records. A changing
rule applied twice gives what it gave once (a user's regular expression may not). No rule counts words by spaces: a
character of a script without spaces is one unit, elsewhere a word is. White space never counts as a character.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from typing import Annotated, Any, get_args

from pydantic import PlainValidator, SerializeAsAny

from changing_rules import (
    BoilerplateRule,
    ControlCharactersRule,
    FullWidthRule,
    NewlinesRule,
    UnicodeRule,
    WhitespaceRule,
)
from dropping_rules import (
    LengthRule,
    RepeatedLinesRule,
    RepeatedNgramsRule,
    ReplacementCharactersRule,
    ShareRule,
    TurnsRule,
)
from language_rule import LanguageRule
from list_rules import BadWordsRule, ListRule, RegularExpressionRule
from pii_rule import PiiRule
from raw_records import Message
from rule_base import BaseRule, Joined

RULES: dict[str, type[BaseRule]] = {
    name: kind
    for kind in (
        NewlinesRule,
        UnicodeRule,
        ControlCharactersRule,
        WhitespaceRule,
        FullWidthRule,
        BoilerplateRule,
        PiiRule,
        BadWordsRule,
        RegularExpressionRule,
        LengthRule,
        RepeatedLinesRule,
        RepeatedNgramsRule,
        ShareRule,
        ReplacementCharactersRule,
        TurnsRule,
        LanguageRule,
    )
    for name in get_args(kind.model_fields["rule"].annotation)
}
# Control characters before the normal form: what they parted may compose.
DEFAULT_RULES: list[Any] = ["newlines", "control_characters", "nfc", "whitespace", "length"]


def parse(rule: Any) -> BaseRule:
    """Return the rule that params.yaml names: `nfc` or `{rule: nfc}`, with its parameters.

    Not a union of pydantic's: that would build all sixteen at the start of each stage, 40 ms.
    """
    if isinstance(rule, BaseRule):
        return rule
    given = {"rule": rule} if isinstance(rule, str) else rule
    name = given.get("rule") if isinstance(given, dict) else None
    if name is None:
        raise ValueError(f"a rule is a name, or {{rule: NAME, ...}}; the names are {', '.join(RULES)}")
    if not isinstance(name, str) or name not in RULES:
        near = difflib.get_close_matches(str(name), RULES, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"the rules are {', '.join(RULES)}"
        raise ValueError(f"there is no rule `{name}`; {hint}")
    kind = RULES[name]
    for key in given:
        if key not in kind.model_fields:
            near = difflib.get_close_matches(str(key), kind.model_fields, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"it has {', '.join(kind.model_fields)}"
            raise ValueError(f"the rule `{name}` has no key `{key}`; {hint}")
    return kind.model_validate(given, strict=True)


Rule = Annotated[SerializeAsAny[BaseRule], PlainValidator(parse)]

Messages = Sequence[Message]


def apply_rules(
    text: str, rules: Sequence[Rule], idle: Collection[int] = ()
) -> tuple[str | None, dict[str, int], tuple[str, str] | None]:
    """Return the text after all rules or None, the changes by rule, and the rule and evidence if it is dropped.

    `idle`: places of rules that have nothing to do with the text as it comes; once it is changed, they may have.

    >>> apply_rules("\\ufeff第一条 \\r\\n", [parse(rule) for rule in DEFAULT_RULES])
    ('第一条\\n', {'newlines': 1, 'control_characters': 1, 'whitespace': 1}, None)
    """
    changes: dict[str, int] = {}  # no Counter: its update takes longer than most rules
    if len(idle) == len(rules):
        return text, changes, None
    for number, rule in enumerate(rules):
        if number in idle and not changes:
            continue
        text, changed, drop = rule.apply(text)
        if drop:
            return None, changes, (rule.rule, drop)
        if changed:
            changes[rule.rule] = changes.get(rule.rule, 0) + changed
    return text, changes, None


def apply_to_messages(
    messages: Messages, rules: Sequence[Rule], idle: Collection[int] = ()
) -> tuple[list[Message] | None, dict[str, int], tuple[str, str] | None]:
    """Return what `apply_rules` does for a conversation: each content is changed, all contents joined are judged.

    For repetition each is judged by itself: an answer may take up its question. A message that a rule leaves empty
    drops the conversation: an answer without its question teaches nothing.

    >>> apply_to_messages([{"role": "user", "content": "第 1 页"}], [BoilerplateRule()])
    (None, {'boilerplate': 1}, ('boilerplate', 'message 1 (user) became empty'))
    """
    changes: dict[str, int] = {}
    now = list(messages)
    if len(idle) == len(rules):
        return now, changes, None
    for number, rule in enumerate(rules):
        if number in idle and not changes:
            continue
        if rule.drops:
            if drop := rule.verdict([(message["role"], message["content"]) for message in now]):
                return None, changes, (rule.rule, drop)
            continue
        for i, message in enumerate(now):
            text, changed, _ = rule.apply(message["content"])
            if not changed:
                continue
            changes[rule.rule] = changes.get(rule.rule, 0) + changed
            if message["content"].strip() and not text.strip():
                return None, changes, (rule.rule, f"message {i + 1} ({message['role']}) became empty")
            now[i] = {**message, "content": text}
    return now, changes, None


def idle_rules(texts: Sequence[str], rules: Sequence[Rule]) -> set[int]:
    """Return the places of the rules that are sure to change and to drop none of `texts`, blank ones aside.

    A rule looks at all of them in a few microseconds, as long as `apply` takes for one. The texts can be the messages
    of conversations: what a rule knows of messages also holds of the text that these are when joined by LF.

    >>> idle_rules(["第一条", "第二条 "], [parse(rule) for rule in DEFAULT_RULES])  # all but `whitespace`
    {0, 1, 2, 4}
    """
    joined = Joined(texts)
    return {number for number, rule in enumerate(rules) if rule.is_idle(joined)}


def files(rules: Sequence[Rule]) -> list[str]:
    """Return the lists in `FOLDER` that the rules read, sorted: they decide the result as the parameters do."""
    return sorted({rule.file for rule in rules if isinstance(rule, ListRule)})
