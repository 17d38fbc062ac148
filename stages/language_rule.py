"""The rule of `clean` that drops a record by its language."""

from __future__ import annotations

import importlib
import re
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field

from rule_base import HAN, KANA, UNITS, DroppingRule, Outcome

WINDOW = 700  # characters that are looked at, at the start, the middle and the end of a record


@lru_cache(maxsize=1)
def _language_model() -> Any:
    try:
        langid = importlib.import_module("py3langid.langid")
    except ModuleNotFoundError:
        raise ValueError("the rule `language` needs the package py3langid; install it: pip install py3langid") from None
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


class LanguageRule(DroppingRule):
    """The share of the units that are in the wanted languages.

    Han, kana and Hangul are told by their script (a twentieth of kana makes Han Japanese), other words by the model
    inside py3langid (naive Bayes over byte n-grams, 139 languages; BSD-3-Clause, 4.6 MB, needs only NumPy). Words that
    it cannot tell count as wanted where a wanted language is written in words.

    LanguageRule(languages=["zh"]).apply("The word 条 means article in the Chinese of statutes.").drop
    -> '0.1 < 0.5 of the units in zh (zh 0.10, en 0.90)'
    """

    rule: Literal["language"] = "language"
    languages: list[str] = Field(min_length=1, description="ISO 639 codes, e.g. [zh, en]; zh is Chinese in any form")
    min_share: float = Field(0.5, ge=0, le=1, description="share of the units (words, Chinese characters) in them")
    min_confidence: float = Field(0.5, ge=0, le=1, description="of the model, below which it cannot be told")

    def load(self) -> None:
        unknown = sorted(set(self.languages) - {*_language_model().labels})
        if unknown:
            raise ValueError(f"py3langid does not know {', '.join(unknown)}; write ISO 639 codes such as zh, en, ja")

    def apply(self, text: str) -> Outcome:
        shares = language_shares(text, self.min_confidence)
        wanted = {*self.languages, "und"} if {*self.languages} - {"zh", "ja", "ko"} else {*self.languages}
        found = sum(share for language, share in shares.items() if language in wanted)
        if found >= self.min_share or not shares:
            return Outcome(text, 0, None)
        all_shares = ", ".join(f"{language} {share:.2f}" for language, share in shares.items())
        names = " and ".join(self.languages)
        return Outcome(text, 0, f"{found:.2g} < {self.min_share:g} of the units in {names} ({all_shares})")


def language_shares(text: str, min_confidence: float) -> dict[str, float]:
    """Return the share of the units by language, by code; `und`: cannot be told. Empty for a text without letters."""
    if len(text) > 3 * WINDOW:
        middle = len(text) // 2 - WINDOW // 2
        text = "\n".join([text[:WINDOW], text[middle : middle + WINDOW], text[-WINDOW:]])
    han, kana, hangul = (len(re.findall(f"[{script}]", text)) for script in (HAN, KANA, "\uac00-\ud7a3"))
    units = {"ja": han + kana, "zh": 0} if 20 * kana > han + kana else {"zh": han, "ja": kana}
    units["ko"] = len(re.findall("[\uac00-\ud7a3]+", text)) if hangul else 0
    rest = re.sub(f"[{HAN}{KANA}\uac00-\ud7a3]+", " ", text)
    if words := sum(not unit.isdecimal() for unit in UNITS.findall(rest)):
        language, confidence = _language_model().classify(rest)
        told = language if confidence >= min_confidence else "und"
        units[told] = units.get(told, 0) + words
    total = sum(units.values())
    return {language: n / total for language, n in sorted(units.items()) if n}
