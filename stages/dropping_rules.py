"""The rules of `clean` that drop a record: by length, repetition, shares of characters, order of turns."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from rule_base import UNITS, WORD, DroppingRule, Joined, Outcome


class LengthRule(DroppingRule):
    """Length in characters (white space not counted) and in lines that are not blank.

    >>> LengthRule(min_chars=8).apply("第一条 总则").drop
    '5 < 8 characters'
    """

    rule: Literal["length"] = "length"
    min_chars: int = Field(1, ge=0, description="characters at least, white space not counted")
    max_chars: int | None = Field(None, ge=1, description="characters at most")
    min_lines: int = Field(0, ge=0, description="lines at least, blank ones not counted")
    max_lines: int | None = Field(None, ge=1, description="lines at most")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        for unit in ("chars", "lines"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if most is not None and most < least:
                raise ValueError(f"no text has {least} {unit} at least and {most} at most; correct one of them")
        return self

    def apply(self, text: str) -> Outcome:
        return Outcome(text, 0, self._evidence(text))

    def is_idle(self, joined: Joined) -> bool:
        """A text that is not blank has one character and one line at least."""
        return self.min_chars <= 1 and self.min_lines <= 1 and self.max_chars is None and self.max_lines is None

    def _evidence(self, text: str) -> str | None:
        if self.max_chars is not None or len("".join(text[: 4 * self.min_chars + 64].split())) < self.min_chars:
            n_chars = len("".join(text.split()))
            if n_chars < self.min_chars:
                return f"{n_chars} < {self.min_chars} characters"
            if self.max_chars is not None and n_chars > self.max_chars:
                return f"{n_chars} > {self.max_chars} characters"
        if self.min_lines or self.max_lines is not None:
            n_lines = sum(not line.isspace() for line in text.split("\n") if line)
            if n_lines < self.min_lines:
                return f"{n_lines} < {self.min_lines} lines"
            if self.max_lines is not None and n_lines > self.max_lines:
                return f"{n_lines} > {self.max_lines} lines"
        return None


def _over(share: float, most: float, what: str) -> str | None:
    return f"{share:.4g} > {most:g} of the {what}" if share > most else None


class RepeatedLinesRule(DroppingRule):
    r"""Lines that stood in the record before, as shares of all lines and of their characters.

    Lines without a letter or digit (blank, rules, brackets of code) are not counted. Thresholds: Rae et al. 2021
    (Gopher, arXiv 2112.11446), table A1, "duplicate line fraction" and "duplicate line character fraction".

    >>> RepeatedLinesRule().apply("登录\n第一条 总则\n登录\n登录").drop
    '0.5 > 0.3 of the lines'
    """

    by_message = True  # an answer may take up its question
    rule: Literal["repeated_lines"] = "repeated_lines"
    max_lines: float = Field(0.30, ge=0, le=1, description="share of the lines that repeat an earlier line")
    max_chars: float = Field(0.20, ge=0, le=1, description="share of the characters that stand in such lines")

    def apply(self, text: str) -> Outcome:
        lines = [line for line in map(str.strip, text.split("\n")) if WORD.search(line)]
        first = set(lines)
        if len(first) == len(lines):
            return Outcome(text, 0, None)
        chars = 1 - sum(map(len, first)) / sum(map(len, lines))
        drop = _over(1 - len(first) / len(lines), self.max_lines, "lines")
        return Outcome(text, 0, drop or _over(chars, self.max_chars, "characters in lines"))


# n: share; of one unit there are no runs.
Shares = dict[Annotated[int, Field(ge=2, le=64)], Annotated[float, Field(ge=0, le=1)]]


class RepeatedNgramsRule(DroppingRule):
    """Runs of n units that repeat: as shares of the characters of all units (punctuation and space not counted).

    A text of words: the commonest run (`top_words`), and every run but its first occurrence (`words`), overlaps counted
    once; thresholds and method of Rae et al. 2021 (Gopher), table A1, made for web pages. A text mostly of characters
    (Chinese): runs of characters, `characters`. No web threshold holds there: over 950 Chinese statutes table A1 drops
    931 on characters and more than half on words; FineWeb-2's values for Chinese drop a third. The highest share among
    them is 0.56 at 10 and 0.44 at 20, while spam repeats nearly all of itself.

    >>> RepeatedNgramsRule(min_units=8).apply("点击这里立即购买" * 10).drop
    '0.9 > 0.7 of the characters in repeated runs of 10'
    """

    by_message = True
    rule: Literal["repeated_ngrams"] = "repeated_ngrams"
    top_words: Shares = Field({2: 0.20, 3: 0.18, 4: 0.16}, description="n: share of the commonest run")
    words: Shares = Field(
        {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}, description="n: share of repeated runs of words"
    )
    characters: Shares = Field({10: 0.70, 20: 0.60}, description="n: share of repeated runs of characters")
    min_units: int = Field(50, ge=2, description="shorter records are kept; Gopher asks for 50 words, too")

    def apply(self, text: str) -> Outcome:
        units = UNITS.findall(text)
        if len(units) < self.min_units:
            return Outcome(text, 0, None)
        return Outcome(text, 0, self._evidence(units))

    def _evidence(self, units: list[str]) -> str | None:
        lengths = np.fromiter(map(len, units), np.int64, len(units))
        ends = np.concatenate([[0], np.cumsum(lengths)])
        by_words = ends[-1] > 2 * len(units)  # more characters than two a unit: most units are words
        top, repeated = (self.top_words, self.words) if by_words else ({}, self.characters)
        numbers: dict[str, int] = {}
        ids = np.fromiter((numbers.setdefault(unit, len(numbers)) for unit in units), np.int64, len(units))
        starts, runs = np.arange(len(ids)), ids  # of the runs of n units that occur again
        for n in range(2, max([0, *top, *repeated]) + 1):
            inside = starts + n <= len(ids)
            starts, runs = starts[inside], runs[inside]
            _, first, runs, counts = np.unique(
                runs * len(numbers) + ids[starts + n - 1], return_index=True, return_inverse=True, return_counts=True
            )
            again = counts[runs] > 1
            if not again.any():
                return None
            if n in top:
                share = float(((ends[starts + n] - ends[starts])[first] * counts)[counts > 1].max() / ends[-1])
                if evidence := _over(share, top[n], f"characters in the commonest run of {n}"):
                    return evidence
            if n in repeated:
                later = np.delete(starts, first)  # runs keep their order: the first of each is its earliest
                covered = np.bincount(later, minlength=len(ids) + 1) - np.bincount(later + n, minlength=len(ids) + 1)
                share = float(lengths[np.cumsum(covered[:-1]) > 0].sum() / ends[-1])
                if evidence := _over(share, repeated[n], f"characters in repeated runs of {n}"):
                    return evidence
            starts, runs = starts[again], runs[again]
        return None


class ShareRule(DroppingRule):
    """Symbols (Unicode categories P and S) or decimal digits (一二三 are letters) among the characters.

    Over 3,400 laws, speeches, web pages and chat answers the highest shares were 0.71 (one drawn flow chart, then 0.48)
    and 0.50 (a multiplication table); of the laws 0.23 and 0.13.

    >>> ShareRule(rule="symbol_share").apply("|---|---|\\n| 条 | 款 |").drop
    '0.8571 > 0.5 of the characters'
    >>> ShareRule(rule="digit_share").apply("2018 年 1,234,567").drop
    '0.7857 > 0.5 of the characters'
    """

    rule: Literal["symbol_share", "digit_share"]
    max_share: float = Field(0.50, ge=0, le=1, description="share of the characters, white space not counted")

    def apply(self, text: str) -> Outcome:
        counts = Counter(text)
        total = sum(n for character, n in counts.items() if not character.isspace())
        wanted = ("P", "S") if self.rule == "symbol_share" else ("Nd",)
        found = sum(n for character, n in counts.items() if unicodedata.category(character).startswith(wanted))
        return Outcome(text, 0, _over(found / total, self.max_share, "characters") if total else None)


class ReplacementCharactersRule(DroppingRule):
    r"""U+FFFD, the trace of bytes that some tool could not decode.

    >>> ReplacementCharactersRule().apply("第\ufffd\ufffd条").drop
    '2 > 0 replacement characters'
    """

    rule: Literal["replacement_characters"] = "replacement_characters"
    max_count: int = Field(0, ge=0, description="replacement characters that a record may have")

    def apply(self, text: str) -> Outcome:
        count = text.count("\ufffd")
        evidence = f"{count} > {self.max_count} replacement characters"
        return Outcome(text, 0, evidence if count > self.max_count else None)

    def is_idle(self, joined: Joined) -> bool:
        return "\ufffd" not in joined.text


# Who may speak behind whom; behind None: first.
TURNS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


class TurnsRule(DroppingRule):
    """Conversations that are not a system turn or none, and then user and assistant by turns, the user first.

    Many chat templates refuse all others (Llama 2, Mistral, Gemma), at which `add_bos_eos` stops. What tools give
    stands behind an answer, and another answer behind that. The last turn may be anybody's.

    >>> TurnsRule().verdict([("user", "2+2?"), ("assistant", "4"), ("assistant", "Or 5.")])
    'message 3 is of assistant, behind one of assistant'
    """

    rule: Literal["turns"] = "turns"
    system: bool = Field(True, description="false: a system turn drops the conversation, for templates that know none")
    tool: bool = Field(True, description="false: a tool turn drops the conversation, for templates that know none")

    def apply(self, text: str) -> Outcome:
        return Outcome(text, 0, None)  # a text has no turns

    def verdict(self, turns: Sequence[tuple[str, str]]) -> str | None:
        before = None
        for number, (role, _) in enumerate(turns, start=1):
            if role not in TURNS[before]:
                return f"message {number} is of {role}, " + (f"behind one of {before}" if before else "the first")
            if (role == "system" and not self.system) or (role == "tool" and not self.tool):
                return f"message {number} is of {role}"
            before = role
        return None
