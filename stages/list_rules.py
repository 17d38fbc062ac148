"""The rules of `clean` with lists of the user: words and regular expressions, read from files in data/rules."""

from __future__ import annotations

import re
import unicodedata
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from rule_base import WORD_CHARACTER, BaseRule, Outcome, expression, substitute

FOLDER = Path("data/rules")  # of the lists that rules name: an input of `clean`, kept in Git


def _entries(file: str) -> list[tuple[str, str]]:
    """Return the entries of a list, each with where it stands. Raises ValueError in a sentence."""
    path = FOLDER / file
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); write it, one entry a line") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    entries = [(line.strip(), f"{path} line {n}") for n, line in enumerate(lines, start=1)]
    entries = [(entry, where) for entry, where in entries if entry and not entry.startswith("#")]
    if not entries:
        raise ValueError(f"{path} has no entry; write one a line (lines that start with # are comments)")
    return entries


class ListRule(BaseRule):
    file: str = Field(
        pattern=r"^[\w-][\w. -]*$", description="a list in data/rules: UTF-8, one entry a line, # for comments"
    )
    action: Literal["drop", "remove", "mask"] = Field("drop", description="of the record, or of each place found")
    max_count: int = Field(0, ge=0, description="drop: places that a record may have")
    mask: str = Field("***", min_length=1, description="mask: what is put in each place")
    _loaded: list[re.Pattern[str]] | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _agree(self) -> ListRule:
        for key, action in (("max_count", "drop"), ("mask", "mask")):
            if key in self.model_fields_set and self.action != action:
                raise ValueError(f"`{key}` is for action {action} and does nothing with {self.action}; remove it")
        return self

    @property
    def _patterns(self) -> list[re.Pattern[str]]:
        """The list, read when it is first needed: every stage checks params.yaml, only `clean` opens the lists."""
        if self._loaded is None:
            self._loaded = self._compiled()
        return self._loaded

    def load(self) -> None:
        self._patterns  # noqa: B018

    @abstractmethod
    def _compiled(self) -> list[re.Pattern[str]]: ...

    @property
    def drops(self) -> bool:
        return self.action == "drop"

    def apply(self, text: str) -> Outcome:
        if self.action == "drop":
            found = [text[start:end] for pattern in self._patterns for start, end in self._places(text, pattern)]
            evidence = f"{len(found)} > {self.max_count} places, the first {found[0][:40]!r}" if found else None
            return Outcome(text, 0, evidence if len(found) > self.max_count else None)
        new, changes, put = text, 0, self.mask if self.action == "mask" else ""
        for pattern in self._patterns:
            new, found_here, _ = substitute(new, ((start, end, put) for start, end in self._places(new, pattern)))
            changes += found_here
        return Outcome(new, changes, None)

    def _places(self, text: str, pattern: re.Pattern[str]) -> Iterator[tuple[int, int]]:
        yield from (match.span() for match in pattern.finditer(text) if match[0])


class RegularExpressionRule(ListRule):
    r"""Regular expressions from a file, one a line, applied in order; ^ and $ are the ends of a line.

    Blanks around an expression are not part of it; write \s or [ ] for one that is.

    With `（.{1,12}号令）` in rules/numbers.txt and `action: remove`:
    "关于修改条例的决定（国务院令第687号令）" -> "关于修改条例的决定"
    """

    rule: Literal["regular_expression"] = "regular_expression"

    def _compiled(self) -> list[re.Pattern[str]]:
        return [expression(entry, where) for entry, where in _entries(self.file)]


class BadWordsRule(ListRule):
    r"""Words from a file, in any case; words of spaced scripts whole, of Chinese and its like wherever they stand.

    A blank between two words stands for any white space.

    With "ass" and "傻瓜" in rules/words.txt and `action: mask`:
    "你这个傻瓜! What an ass, not a class." -> "你这个***! What an ***, not a class."
    """

    rule: Literal["bad_words"] = "bad_words"

    def _compiled(self) -> list[re.Pattern[str]]:
        trees: dict[bool, dict[str, Any]] = {}
        entries = _entries(self.file)
        # A list whose letters are decomposed (NFD) would find nothing in a text behind the rule nfc.
        entries += [(unicodedata.normalize("NFC", entry), where) for entry, where in entries]
        for entry, where in entries:
            word = " ".join(_lower(entry).split())
            if len(word) > 100 or (self.action == "mask" and set(word) & set(_lower(self.mask))):
                raise ValueError(f"{where}: a word has 100 characters at most, and none of the mask {self.mask!r}")
            branch = trees.setdefault(WORD_CHARACTER.match(word[-1]) is not None, {})
            for character in word:
                branch = branch.setdefault(character, {})
            branch[""] = {}
        end = f"(?!{WORD_CHARACTER.pattern})"
        return [re.compile(_alternatives(tree) + end * spaced) for spaced, tree in sorted(trees.items())]

    def apply(self, text: str) -> Outcome:
        outcome = total = super().apply(text)
        while outcome.changes:  # a removed word can leave another one behind
            outcome = super().apply(outcome.text)
            total = Outcome(outcome.text, total.changes + outcome.changes, None)
        return total

    def _places(self, text: str, pattern: re.Pattern[str]) -> Iterator[tuple[int, int]]:
        lower, end = _lower(text), 0
        while match := pattern.search(lower, end):
            start = match.start()
            inside_word = start and WORD_CHARACTER.match(lower[start]) and WORD_CHARACTER.match(lower[start - 1])
            end = start + 1 if inside_word else match.end()
            if not inside_word:
                yield start, end


def _lower(text: str) -> str:
    """Return `text` in lower case, at the same length (İ has a lower case of two characters, and stays)."""
    lower = text.lower()
    return lower if len(lower) == len(text) else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def _alternatives(branch: dict[str, Any]) -> str:
    """Return a regular expression for the words of a tree of characters, longest first; 10,000 words cost as 10 do."""
    sources = [
        (r"\s+" if character == " " else re.escape(character)) + _alternatives(branch[character])
        for character in sorted(branch, reverse=True)
    ]
    return sources[0] if len(sources) == 1 else f"(?:{'|'.join(sources)})" if sources else ""
