"""What every rule of `clean` is made of: its outcome, its two kinds, and which characters are words.

A rule takes a text and returns an Outcome: the text, the count of places changed, or why the record is dropped. See
stages/clean_rules.py for the list of rules and how they are applied.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

Span = tuple[int, int, str]  # start, end, and what takes the place

# Scripts without spaces, where a character is a unit: Thai to Khmer, kana, Han (with radicals, 々〇 and later planes).
HAN = "\u2e80-\u2fdf\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
KANA = "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"
UNSPACED = f"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff{KANA}{HAN}"
UNITS = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
WORD = re.compile(r"[^\W_]")
WORD_CHARACTER = re.compile(rf"[^\W_{UNSPACED}]")


class Outcome(NamedTuple):
    """What a rule made of a text."""

    text: str  # the same object when nothing was changed
    changes: int  # places changed; 0: none
    drop: str | None  # the evidence, e.g. "0.41 > 0.3 of the characters"; None: kept


class Joined:
    """Texts that follow each other, an LF behind each, in the forms in which a rule can look at all of them at once."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.text = "\n".join([*texts, ""])

    @cached_property
    def codes(self) -> np.ndarray:
        """Of ASCII the characters, uint8; of other text the units of UTF-16, uint16."""
        if self.text.isascii():
            return np.frombuffer(self.text.encode(), np.uint8)
        return np.frombuffer(self.text.encode("utf-16-le", "surrogatepass"), np.dtype("<u2"))

    @cached_property
    def line_ends(self) -> np.ndarray:
        """Where LF stands in `codes`, int64."""
        return np.flatnonzero(self.codes == ord("\n"))


class BaseRule(BaseModel):
    """A rule with its parameters."""

    model_config = ConfigDict(extra="forbid", defer_build=True)
    rule: str = Field(description="name of the rule; alone, it may stand without its braces")

    by_message: ClassVar[bool] = False  # of one that drops: whether it judges each message of a conversation, or all

    @property
    def drops(self) -> bool:
        """Whether it judges the record (and never changes it), or changes the text (and never drops it)."""
        return False

    def load(self) -> None:
        """Read the list or the model that the rule needs. Raises ValueError in a sentence when it is not to be had."""

    @abstractmethod
    def apply(self, text: str) -> Outcome: ...

    def verdict(self, turns: Sequence[tuple[str, str]]) -> str | None:
        """Of a rule that drops: return why a conversation of (role, content) is dropped; None: it is kept."""
        if not self.by_message:
            return self.apply("\n".join(content for _, content in turns)).drop
        for number, (role, content) in enumerate(turns, start=1):
            if drop := self.apply(content).drop:
                return f"message {number} ({role}): {drop}"
        return None

    def is_idle(self, joined: Joined) -> bool:
        """Whether `apply` is sure to change and to drop none of the texts, blank ones aside; False: not known."""
        return False


class DroppingRule(BaseRule):
    @property
    def drops(self) -> bool:
        return True


def substitute(text: str, spans: Iterable[Span]) -> Outcome:
    """Replace `spans`, which follow each other; putting back what stood there is not a change."""
    parts, end, changes = [], 0, 0
    for start, stop, put in spans:
        parts += [text[end:start], put]
        changes += text[start:stop] != put
        end = stop
    return Outcome("".join([*parts, text[end:]]) if changes else text, changes, None)


def expression(source: str, where: str) -> re.Pattern[str]:
    """Return a user's regular expression, compiled. Raises ValueError in a sentence that begins with `where`."""
    try:
        pattern = re.compile(source, re.MULTILINE)
    except re.error as error:
        raise ValueError(f"{where}: {source!r} is not a regular expression ({error}); mend it") from None
    if pattern.fullmatch(""):
        raise ValueError(f"{where}: {source!r} matches nothing at all as well; make it ask for one character")
    return pattern
