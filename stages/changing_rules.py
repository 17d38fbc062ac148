"""The rules of `clean` that change a text: line ends, normal forms, invisible characters, space, boilerplate."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from operator import ne
from typing import Any, Literal

import numpy as np
from pydantic import Field, PrivateAttr, model_validator

from rule_base import BaseRule, Joined, Outcome, expression


class NewlinesRule(BaseRule):
    r"""Line ends become LF.

    >>> NewlinesRule().apply("甲\r\n乙\r丙").text
    '甲\n乙\n丙'
    """

    rule: Literal["newlines"] = "newlines"

    def apply(self, text: str) -> Outcome:
        if "\r" not in text:
            return Outcome(text, 0, None)
        return Outcome(text.replace("\r\n", "\n").replace("\r", "\n"), text.count("\r"), None)

    def is_idle(self, joined: Joined) -> bool:
        return "\r" not in joined.text


# A normal form never reaches over these: each run of other characters (with the ASCII letter or Han character that it
# may modify) is normalised by itself.
NORMAL_RUN = re.compile("[\x00-\x7f\u4e00-\u9fff]?[^\x00-\x7f\u4e00-\u9fff]+")


class UnicodeRule(BaseRule):
    r"""A Unicode normal form; `nfkc` also folds full-width, ligature and superscript forms, and Chinese punctuation.

    >>> UnicodeRule(rule="nfc").apply("Cafe\u0301，３㎏").text
    'Café，３㎏'
    >>> UnicodeRule(rule="nfkc").apply("Cafe\u0301，３㎏").text
    'Café,3kg'
    """

    rule: Literal["nfc", "nfkc", "nfd"] = "nfc"

    def apply(self, text: str) -> Outcome:
        form: Any = self.rule.upper()
        new = unicodedata.normalize(form, text)
        if new == text:
            return Outcome(text, 0, None)
        runs = NORMAL_RUN.findall(text)
        return Outcome(new, sum(unicodedata.normalize(form, run) != run for run in runs), None)

    def is_idle(self, joined: Joined) -> bool:
        form: Any = self.rule.upper()
        return unicodedata.is_normalized(form, joined.text)


SEPARATOR = "\x0b\x0c\x1c-\x1e\x85\u2028\u2029"  # they end a line or a page: deleting them would join two words
INVISIBLE = (  # C0, C1, soft hyphen, zero width space, bidi marks, word joiner, BOM, annotation marks, noncharacters
    "\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f"
    "\ufdd0-\ufdef\ufeff\ufff9-\ufffb\ufffe\uffff"
)
TAGS = "\U000e0001\U000e0020-\U000e007f"  # they spell the flags of Scotland and others, and elsewhere hidden text
CONTROL = re.compile(f"[{SEPARATOR}{INVISIBLE}{TAGS}\u200c\u200d]")
# Joiners shape Indic and Arabic script and tie emoji: they go only where both neighbours are Latin, CJK or space, or
# will be when NFC has composed them: else a second run would find what the first one left.
PLAIN = (
    "\x00-\u036f\u0374\u037e\u0387\u1100-\u11ff\u1e00-\u1eff\u1fef\u1ffd\u2000-\u200b\u212a\u212b\u2329\u232a\u2adc"
    "\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
)
IDLE_JOINER = f"(?<![^{PLAIN}])[\u200c\u200d]+(?![^{PLAIN}])"  # compiled when first needed, 4 ms
ASCII_CONTROL = bytes(code for code in range(128) if CONTROL.match(chr(code)))
TO_LINE_FEED = re.compile(f"[{SEPARATOR}]")
TO_NOTHING = re.compile(f"[{INVISIBLE}]+|(?<![\U0001f3f4{TAGS}])[{TAGS}]+")


class ControlCharactersRule(BaseRule):
    r"""Invisible characters go; those that end a line or page become LF; tab, LF, CR and shaping joiners stay.

    >>> ControlCharactersRule().apply("\ufeff第\u200b一\x00条\x0c第二条").text
    '第一条\n第二条'
    """

    rule: Literal["control_characters"] = "control_characters"

    def apply(self, text: str) -> Outcome:
        # bytes.translate looks at 1 GB/s, a regular expression at a quarter of that
        plain = text.isascii() and len(text.encode().translate(None, ASCII_CONTROL)) == len(text)
        if plain or not CONTROL.search(text):
            return Outcome(text, 0, None)
        new, lines = TO_LINE_FEED.subn("\n", text)
        new = re.sub(IDLE_JOINER, "", TO_NOTHING.sub("", new))
        changes = len(text) - len(new) + lines
        return Outcome(new if changes else text, changes, None)

    def is_idle(self, joined: Joined) -> bool:
        codes = joined.codes
        if codes.dtype == np.uint8:  # modulo 256, what stands before the space comes out above 0x7f - 0x20
            only_line_ends = np.count_nonzero(codes - 0x20 >= 0x7F - 0x20) == len(joined.line_ends)
            if only_line_ends:
                return True
        return not _control_units().take(codes).any()  # half as long as [codes]


@cache
def _control_units() -> np.ndarray:
    """Return for each unit of UTF-16 whether it is, or begins, what CONTROL finds."""
    every = np.arange(2**16, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
    units = np.zeros(2**16, dtype=bool)
    units[[match.start() for match in CONTROL.finditer(every)]] = True
    units[0xDB40] = True  # begins U+E0000 to U+E03FF, the tags among them
    return units


HORIZONTAL_SPACE = " \t\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
SPACE_UNITS = np.isin(np.arange(2**16), [ord(space) for space in HORIZONTAL_SPACE])  # by unit of UTF-16


class WhitespaceRule(BaseRule):
    r"""Space at the end of lines goes, and blank lines beyond `max_blank_lines`; indents and inner spaces stay.

    >>> WhitespaceRule().apply("　　第一条 \n\n\n\n\n第二条\t").text
    '　　第一条\n\n\n第二条'
    """

    rule: Literal["whitespace"] = "whitespace"
    max_blank_lines: int = Field(2, ge=0, description="blank lines in a row that stay")
    strip: bool = Field(
        False,
        description="also all white space at both ends of a text or message, as chat templates with `trim` need it",
    )

    def apply(self, text: str) -> Outcome:
        most = "\n" * (self.max_blank_lines + 1)
        lines = text.split("\n")  # fewer than characters: twice as fast as to search the text for each kind of space
        stripped = [line.rstrip(HORIZONTAL_SPACE) for line in lines]
        changes = 0 if stripped == lines else sum(map(ne, lines, stripped))
        new = "\n".join(stripped) if changes else text
        if most + "\n" in new:
            new, runs = re.subn(most + "\n+", most, new)
            changes += runs
        if self.strip and (inside := new.strip()) != new:
            new, changes = inside, changes + 1
        return Outcome(new, changes, None)

    def is_idle(self, joined: Joined) -> bool:
        if self.strip:
            return False
        ends, run = joined.line_ends, self.max_blank_lines + 1
        before = joined.codes[ends - 1]  # of an LF at the very beginning: the one at the end
        return not SPACE_UNITS[before].any() and not (ends[run:] - ends[:-run] == run).any()


CHINESE_MARKS = "！＂＇（），－．／：；？［］｛｝～"
FULL_WIDTH = re.compile("[\uff01-\uff5e]")
FULL_WIDTH_SIGN = re.compile(f"[\uff01-\uff5e](?<![{CHINESE_MARKS}])")


class FullWidthRule(BaseRule):
    r"""Full-width letters, digits and signs become ASCII; Chinese punctuation stays unless asked.

    >>> FullWidthRule().apply("ＧＤＰ增长６％，（见表１）").text
    'GDP增长6%，（见表1）'
    """

    rule: Literal["full_width"] = "full_width"
    punctuation: bool = Field(False, description=f"also the marks of Chinese text: {CHINESE_MARKS}")

    def apply(self, text: str) -> Outcome:
        pattern = FULL_WIDTH if self.punctuation else FULL_WIDTH_SIGN
        return Outcome(*pattern.subn(lambda match: chr(ord(match[0]) - 0xFEE0), text), None)

    def is_idle(self, joined: Joined) -> bool:
        return joined.text.isascii()


# Whole lines of web pages and scanned books. Short patterns that a sentence can start with ask for more of the line:
# a statute may begin "版权所有者", a contents page is headed "目录", a dialogue says "Next".
BOILERPLATE = r"""
      copyright\s?(?:©|\(c\)|\d{4}).{0,80} | [©ⓒ].{0,80} | .{0,60}\ball\ rights\ reserved\b.{0,40}
    | 版[权權]所有(?:[\s:：©,，.。!！|-].{0,60}|(?:翻印|违者|侵权|不得转载|未经许可).{0,60})?
    | .{0,3}(?:ICP[备证備證]\s?(?:字?第)?\d{6,}号?|公网安备).{0,60}
    | [<«＜\[【]?(?:(?:[上下]一[页頁篇章]|[首尾末]页|返?回到?(?:顶部|首页|列表|目录))[\s|/<>«»＜＞·[\]【】-]*){1,6}
    | [上下]一篇\s?[:：].{0,80} | (?:当前|您(?:现|所)?在?的?)位置\s?[:：].{0,80}
    | (?:(?:打印|关闭)(?:本页|窗口)|字[号体][:：]?\s?大\s?中\s?小|分享到[:：]?|加入收藏|设为首页)(?:[\s|【】·].{0,30})?
    | 责任?编辑?[:：].{1,20} | (?:浏览|阅读|点击)(?:次数|量|数)[:：]\s?\d+\s?次?
    | (?:扫一扫|长按识别|扫描(?:[上下]方)?二维码).{0,30}(?:关注|分享|公众号|下载).{0,20}
    | (?:点击)?(?:查看|阅读|展开)(?:更多|全文|原文|详情)[>》…]{0,3} | 本(?:网站|站)使用\s?cookies?.{0,80}
    | [-–—·~]\s?\d{1,4}\s?[-–—·~] | 第\s?\d{1,4}\s?页(?:\s?[,，/／]?\s?共\s?\d{1,4}\s?页)?
    | page\s\d{1,4}(?:\s(?:of|/)\s\d{1,4})?
    | (?:this|our)\ (?:web)?site\ uses\ cookies.{0,160} | we\ (?:and\ our\ partners\ )?use\ cookies.{0,160}
    | (?:accept|reject|allow|manage)\ (?:all\ )?cookies | (?:cookie|privacy)\ (?:policy|settings|preferences|notice)
    | back\ to\ top | skip\ to\ (?:main\ )?content | read\ more[.…»>]{0,3} | print\ this\ page | share\ on\ \w{1,20}
    | (?:LINK\s?[|·»«<>]\s?){1,9}[\w ]{0,20} | LINK(?:\s[/-]\sLINK){1,9}
    """.replace(
    "LINK",
    r"(?:home|prev(?:ious)?|next|log\ ?in|sign\ (?:in|up)|subscribe|sitemap|contact(?:\ us)?|about(?:\ us)?"
    r"|privacy(?:\ policy)?|terms(?:\ of\ (?:service|use))?)",
)
MAX_BOILERPLATE = 200  # characters of a line that can be boilerplate


class BoilerplateRule(BaseRule):
    r"""Lines that are nothing but boilerplate go: page numbers, navigation, cookie banners, rights notices.

    >>> BoilerplateRule(patterns=["来源.*"]).apply("版权所有者应当……\n版权所有 某网站\n上一页 下一页\n来源网络").text
    '版权所有者应当……'
    """

    rule: Literal["boilerplate"] = "boilerplate"
    built_in: bool = Field(True, description="use the patterns of this module")
    patterns: list[str] = Field([], description="more patterns, each for a whole line (space at its ends not counted)")
    _patterns: list[re.Pattern[str]] = PrivateAttr([])

    @model_validator(mode="after")
    def _compile(self) -> BoilerplateRule:
        own = [expression(source, f"patterns, number {n}") for n, source in enumerate(self.patterns, start=1)]
        self._patterns = [*([re.compile(BOILERPLATE, re.IGNORECASE | re.VERBOSE)] if self.built_in else []), *own]
        return self

    def apply(self, text: str) -> Outcome:
        lines = text.split("\n")
        kept = [line for line in lines if len(line) > MAX_BOILERPLATE or not self._is_boilerplate(line.strip())]
        changes = len(lines) - len(kept)
        return Outcome("\n".join(kept) if changes else text, changes, None)

    def _is_boilerplate(self, line: str) -> bool:
        return any(pattern.fullmatch(line) for pattern in self._patterns) if line else False
