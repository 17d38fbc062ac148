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
import importlib
import ipaddress
import re
import unicodedata
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from functools import lru_cache
from operator import ne
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, PrivateAttr, SerializeAsAny, model_validator

FOLDER = Path("data/rules")  # of the lists that rules name: an input of `clean`, kept in Git

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


class _Rule(BaseModel):
    """A rule with its parameters."""

    model_config = ConfigDict(extra="forbid", defer_build=True)
    rule: str = Field(description="name of the rule; alone, it may stand without its braces")

    @property
    def drops(self) -> bool:
        """Whether it judges the record (and never changes it), or changes the text (and never drops it)."""
        return False

    def load(self) -> None:
        """Read the list or the model that the rule needs. Raises ValueError in a sentence when it is not to be had."""

    @abstractmethod
    def apply(self, text: str) -> Outcome: ...


class _DroppingRule(_Rule):
    @property
    def drops(self) -> bool:
        return True


def _substitute(text: str, spans: Iterable[Span]) -> Outcome:
    """Replace `spans`, which follow each other; putting back what stood there is not a change."""
    parts, end, changes = [], 0, 0
    for start, stop, put in spans:
        parts += [text[end:start], put]
        changes += text[start:stop] != put
        end = stop
    return Outcome("".join([*parts, text[end:]]) if changes else text, changes, None)


# --- Rules that change the text


class NewlinesRule(_Rule):
    r"""Line ends become LF.

    >>> NewlinesRule().apply("甲\r\n乙\r丙").text
    '甲\n乙\n丙'
    """

    rule: Literal["newlines"] = "newlines"

    def apply(self, text: str) -> Outcome:
        if "\r" not in text:
            return Outcome(text, 0, None)
        return Outcome(text.replace("\r\n", "\n").replace("\r", "\n"), text.count("\r"), None)


# A normal form never reaches over these: each run of other characters (with the ASCII letter or Han character that it
# may modify) is normalised by itself.
NORMAL_RUN = re.compile("[\x00-\x7f\u4e00-\u9fff]?[^\x00-\x7f\u4e00-\u9fff]+")


class UnicodeRule(_Rule):
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


SEPARATOR = "\x0b\x0c\x1c-\x1e\x85\u2028\u2029"  # they end a line or a page: deleting them would join two words
INVISIBLE = (  # C0, C1, soft hyphen, zero width space, bidi marks, word joiner, BOM, annotation marks, noncharacters
    "\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f"
    "\ufdd0-\ufdef\ufeff\ufff9-\ufffb\ufffe\uffff"
)
TAGS = "\U000e0001\U000e0020-\U000e007f"  # they spell the flags of Scotland and others, and elsewhere hidden text
CONTROL = re.compile(f"[{SEPARATOR}{INVISIBLE}{TAGS}\u200c\u200d]")
# Joiners shape Indic and Arabic script and tie emoji: they go only where both neighbours are Latin, CJK or space.
PLAIN = "\x00-\u02ff\u2000-\u200b\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff00-\uffef"
IDLE_JOINER = re.compile(f"(?<![^{PLAIN}])[\u200c\u200d]+(?![^{PLAIN}])")
ASCII_CONTROL = bytes(code for code in range(128) if CONTROL.match(chr(code)))
TO_LINE_FEED = re.compile(f"[{SEPARATOR}]")
TO_NOTHING = re.compile(f"[{INVISIBLE}]+|(?<![\U0001f3f4{TAGS}])[{TAGS}]+")


class ControlCharactersRule(_Rule):
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
        new = IDLE_JOINER.sub("", TO_NOTHING.sub("", new))
        changes = len(text) - len(new) + lines
        return Outcome(new if changes else text, changes, None)


HORIZONTAL_SPACE = " \t\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
SPACES = frozenset(HORIZONTAL_SPACE)


class WhitespaceRule(_Rule):
    r"""Space at the end of lines goes, and blank lines beyond `max_blank_lines`; indents and inner spaces stay.

    >>> WhitespaceRule().apply("　　第一条 \n\n\n\n\n第二条\t").text
    '　　第一条\n\n\n第二条'
    """

    rule: Literal["whitespace"] = "whitespace"
    max_blank_lines: int = Field(2, ge=0, description="blank lines in a row that stay")

    def apply(self, text: str) -> Outcome:
        most = "\n" * (self.max_blank_lines + 1)
        lines = text.split("\n")
        # Lines are fewer than characters: twice as fast as to search the text for each kind of space.
        if {line[-1:] for line in lines}.isdisjoint(SPACES) and ("" not in lines or most + "\n" not in text):
            return Outcome(text, 0, None)
        stripped = [line.rstrip(HORIZONTAL_SPACE) for line in lines]
        changes = sum(map(ne, lines, stripped))
        new = "\n".join(stripped) if changes else text
        if most + "\n" in new:
            new, runs = re.subn(most + "\n+", most, new)
            changes += runs
        return Outcome(new, changes, None)


CHINESE_MARKS = "！＂＇（），－．／：；？［］｛｝～"
FULL_WIDTH = re.compile("[\uff01-\uff5e]")
FULL_WIDTH_SIGN = re.compile(f"[\uff01-\uff5e](?<![{CHINESE_MARKS}])")


class FullWidthRule(_Rule):
    r"""Full-width letters, digits and signs become ASCII; Chinese punctuation stays unless asked.

    >>> FullWidthRule().apply("ＧＤＰ增长６％，（见表１）").text
    'GDP增长6%，（见表1）'
    """

    rule: Literal["full_width"] = "full_width"
    punctuation: bool = Field(False, description=f"also the marks of Chinese text: {CHINESE_MARKS}")

    def apply(self, text: str) -> Outcome:
        pattern = FULL_WIDTH if self.punctuation else FULL_WIDTH_SIGN
        return Outcome(*pattern.subn(lambda match: chr(ord(match[0]) - 0xFEE0), text), None)


# Whole lines of web pages and scanned books. Short patterns that a sentence can start with ask for more of the line:
# a statute may begin "版权所有者", a contents page is headed "目录", a dialogue says "Next".
BOILERPLATE = re.compile(
    r"""
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
    | (?:(?:home|prev(?:ious)?|next|log\ ?in|sign\ (?:in|up)|subscribe|sitemap|contact(?:\ us)?|about(?:\ us)?
        |privacy(?:\ policy)?|terms(?:\ of\ (?:service|use))?)\s?[|/·»«<>-]\s?){1,9}[\w ]{0,20}
    """,
    re.IGNORECASE | re.VERBOSE,
)
MAX_BOILERPLATE = 200  # characters of a line that can be boilerplate


class BoilerplateRule(_Rule):
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
        own = [_pattern(source, f"patterns, number {n}") for n, source in enumerate(self.patterns, start=1)]
        self._patterns = [*([BOILERPLATE] if self.built_in else []), *own]
        return self

    def apply(self, text: str) -> Outcome:
        lines = text.split("\n")
        kept = [line for line in lines if len(line) > MAX_BOILERPLATE or not self._is_boilerplate(line.strip())]
        changes = len(lines) - len(kept)
        return Outcome("\n".join(kept) if changes else text, changes, None)

    def _is_boilerplate(self, line: str) -> bool:
        return any(pattern.fullmatch(line) for pattern in self._patterns) if line else False


# --- PII: every number with a check digit is checked, so that other long numbers survive

Kind = Literal["email", "ip", "phone", "mobile", "id_card", "credit_code", "bank_card"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PLACEHOLDER = {kind: f"<{kind.upper()}>" for kind in KINDS} | {"mobile": "<PHONE>"}
HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F) if chr(code) not in "，：；！？"}
FULL_WIDTH_DIGIT = re.compile("[０-９＠]")
GAP = " \u00a0\u2010-\u2013\u3000-"  # a space or hyphen may stand between the groups of a number
# Where a number of seven digits, or a dotted quad, starts: not inside a word, not after a decimal point.
CANDIDATE = re.compile(
    r"[0-9(（+ANY](?:(?<=[(（+])|(?<![0-9A-Za-z].)(?<![0-9]\..))"
    rf"(?:(?:[.+()）{GAP}]{{0,2}}[0-9]){{6}}|[0-9]{{0,2}}(?:\.[0-9]{{1,3}}){{3}})"
)
EMAIL_DOMAIN = re.compile(r"@(?![1-4]x\.)(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9])")  # not logo@2x.png
EMAIL_LOCAL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._%+'-]{0,62}[A-Za-z0-9_+-])?\Z")
IPV6_HEAD = re.compile(r"(?<![0-9A-Za-z:])(?:[0-9A-Fa-f]{1,4})?\Z")
IPV6_TAIL = re.compile(r":[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:.]*")
NUMBERED = re.compile(r"(?:\b(?:v|ver|version|release|section|clause|chapter)|[§№第]|版本号?)[.:：]?\s?\Z", re.I)
HEADING = re.compile(r"\n[#\s]*\Z")
MONEY = re.compile(r"[¥￥$€£]\s?\Z")
AMOUNT = re.compile(r"\s?[百千万亿]*(?:[元圆股吨亩%％]|美[元金]|港[元币]|[欧日]元|英镑|千克|公斤|平方|立方|公顷)")
# GB/T 2260: the provinces, Taiwan 71, Hong Kong 81, Macao 82; 83 on the residence permits of Taiwan residents.
PROVINCES = {
    str(code)
    for low, high in ((11, 15), (21, 23), (31, 37), (41, 46), (50, 54), (61, 65), (71, 71), (81, 83))
    for code in range(low, high + 1)
}
CREDIT_CODE_ALPHABET = "0123456789ABCDEFGHJKLMNPQRTUWXY"
CARD_ISSUERS = (  # first prefix, last prefix, lengths; ISO/IEC 7812 numbers in use
    ("4", "4", {13, 16, 19}),  # Visa
    ("51", "55", {16}),  # Mastercard
    ("2221", "2720", {16}),
    ("62", "62", {16, 17, 18, 19}),  # UnionPay
    ("8100", "8171", {16, 17, 18, 19}),
    ("9558", "9559", {19}),  # Chinese debit cards before UnionPay
    ("34", "34", {15}),  # American Express
    ("37", "37", {15}),
    ("3528", "3589", {16, 17, 18, 19}),  # JCB
    ("300", "305", {14, 16, 19}),  # Diners
    ("36", "36", {14, 16, 19}),
    ("38", "39", {14, 16, 19}),
    ("6011", "6011", {16, 19}),  # Discover
    ("644", "659", {16, 19}),
    ("5018", "5038", {16, 18, 19}),  # Maestro, Dankort
    ("6759", "6763", {16, 18, 19}),
    ("2200", "2204", {16, 17, 18, 19}),  # Mir
)


def is_id_card(number: str) -> bool:
    """Check the 18 characters of a Chinese identity number: province, date of birth, check character.

    GB 11643-1999; the check is ISO 7064 MOD 11-2. A permanent residence card (2023) has a 9 before the province.
    """
    try:
        date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    province = number[1:3] if number[0] == "9" else number[:2]
    total = sum(int(digit) * pow(2, 17 - i, 11) for i, digit in enumerate(number[:17]))
    return province in PROVINCES and number[17] == "10X98765432"[total % 11]


def is_credit_code(number: str) -> bool:
    """Check the 18 characters of a unified social credit code: place, check character (GB 32100-2015, MOD 31-3)."""
    total = sum(CREDIT_CODE_ALPHABET.index(character) * pow(3, i, 31) for i, character in enumerate(number[:17]))
    return number[2:4] in PROVINCES | {"10"} and number[17] == CREDIT_CODE_ALPHABET[-total % 31]


def is_bank_card(number: str) -> bool:
    """Check 13 to 19 digits: a known issuer's prefix and length, the Luhn digit (ISO/IEC 7812-1, annex B)."""
    if not any(low <= number[: len(low)] <= high and len(number) in sizes for low, high, sizes in CARD_ISSUERS):
        return False
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in number[-2::-2])
    return (sum(map(int, number[::-2])) + doubled) % 10 == 0


def is_ipv4(address: str) -> bool:
    """Check a dotted quad: no leading zero, not loopback, mask or multicast, and not all below ten as in 1.2.3.4."""
    octets = [int(octet) for octet in address.split(".")]
    written_so = ".".join(map(str, octets)) == address
    return written_so and max(octets) <= 255 and max(octets) >= 10 and octets[0] not in {0, 127} and octets[0] < 224


def _number(source: str) -> re.Pattern[str]:
    """Compile the shape of a number; ~ stands for a gap. Neither letters nor digits nor decimals may follow it."""
    return re.compile(f"(?:{source.replace('~', f'[{GAP}]')})(?![0-9A-Za-z]|(?<=[0-9])\\.[0-9])", re.ASCII)


def _any(_: str) -> bool:
    return True


PLUS = r"\+(?:1(?:!\d){10}|(?:44|86)(?:!\d){9,11}|[2-9](?:!\d){8,13})".replace("!", "(?:~|[()]){0,3}")
AREA = r"(?:[(（]0[1-9]\d{1,3}[)）]~?|0[1-9]\d{1,3}~)"  # of a British or Chinese landline, set off from the number
CARD = r"(?<!(?<!\d)\d{4}~)\d{4}(~)\d{4}\1\d{4}\1\d{4}"
# The first that fits wins. A longer row of such groups, years for example, is neither a card nor a phone number. What
# an end of a row needs to its left it also needs to its right, or a row would be eaten group by group, a pass for each.
NUMBERS: tuple[tuple[Kind, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("id_card", _number(r"[1-9]\d{5}~?(?:18|19|20)\d{6}~?\d{3}[\dXx]"), is_id_card),
    ("credit_code", _number(r"[1-9ANY][1-9]\d{6}[0-9A-HJ-NP-RTUWXY]{10}"), is_credit_code),
    ("bank_card", _number(r"\d{13,19}|\d{6}~\d{13}|3\d{3}(~)\d{6}\1\d{4,5}"), is_bank_card),
    ("bank_card", _number(CARD + r"\1\d{1,3}(?!~\d{4}(?!\d))"), is_bank_card),
    ("bank_card", _number(CARD + r"(?!~\d{4}(?!\d))"), is_bank_card),
    ("mobile", _number(r"(?:\(?(?:\+|00)?86\)?~?)?1[3-9]\d(?:\d{8}|(~)\d{4}\1\d{4})"), _any),
    ("phone", _number(PLUS), _any),  # the lengths of North America, Britain, China; else 9 to 14 digits (ITU-T E.164)
    ("phone", _number(r"(?<!\d[-.])(?:1[ .-])?(?:\(\d{3}\) ?|[2-9]\d\d[.-])\d{3}[.-]\d{4}(?!-\d)"), _any),
    ("phone", _number(rf"(?<!\d[-.]){AREA}\d{{3,4}}~?\d{{3,4}}(?!-\d)"), lambda number: 10 <= len(number) <= 12),
    ("ip", _number(r"\d{1,3}(?:\.\d{1,3}){3}"), is_ipv4),
)


class PiiRule(_Rule):
    r"""Personal data become placeholders; what has a check digit is redacted only when the digit is right.

    >>> PiiRule().apply("张三，身份证１１０１０５１９４９１２３１００２Ｘ，电话138-1234-5678，zhang@qq.com").text
    '张三，身份证<ID_CARD>，电话<PHONE>，<EMAIL>'
    >>> PiiRule().apply("第一百二十三条　2018年3月11日起处罚款15000000000元，见附件110105194912310021").changes
    0

    email: with a top-level domain. ip: IPv4 and IPv6, but no loopback, mask, version or heading (v10.2.3.4, 1.2.3.4).
    mobile: Chinese, 11 digits, with +86 or without. phone: +country numbers; American, British and Chinese landline
    numbers only with their separators. id_card, credit_code, bank_card: see `is_id_card` and its neighbours.
    """

    rule: Literal["pii"] = "pii"
    kinds: list[Kind] = Field(
        list(KINDS), min_length=1, description="what becomes <EMAIL>, <IP>, <PHONE> (two kinds), <ID_CARD> and so on"
    )

    def apply(self, text: str) -> Outcome:
        new, changes = text, 0
        while True:  # a replacement can free its neighbour: until nothing is found, so that a second run finds nothing
            before = changes
            for find in (_emails, _ipv6, _numbers):
                # Full-width digits are looked at as half-width ones: the same length, so the places are the same.
                half = new if new.isascii() or not FULL_WIDTH_DIGIT.search(new) else new.translate(HALF_WIDTH)
                new, found, _ = _substitute(new, find(half, self.kinds))
                changes += found
            if changes == before:
                return Outcome(new, changes, None)


def _emails(text: str, kinds: Sequence[str]) -> Iterator[Span]:
    end = 0
    for match in EMAIL_DOMAIN.finditer(text) if "email" in kinds and "@" in text else ():
        local = EMAIL_LOCAL.search(text, max(end, match.start() - 64), match.start())
        if local:
            end = match.end()
            yield local.start(), end, PLACEHOLDER["email"]


def _ipv6(text: str, kinds: Sequence[str]) -> Iterator[Span]:
    for match in IPV6_TAIL.finditer(text) if "ip" in kinds and ":" in text else ():
        head = IPV6_HEAD.search(text, max(0, match.start() - 5), match.start())
        start = head.start() if head else match.start()
        address = re.sub(r"\.+\Z|(?<!:):\Z", "", text[start : match.end()])
        end = start + len(address)
        groups = [group for group in address.split(":") if group]
        # At least three groups and a long one: ::1, times and slices such as [::2] say nothing of a person.
        if head is None or len(groups) < 3 or max(map(len, groups)) < 3 or WORD_CHARACTER.match(text, end):
            continue
        try:
            ipaddress.IPv6Address(address)
        except ValueError:
            continue
        yield start, end, PLACEHOLDER["ip"]


def _numbers(text: str, kinds: Sequence[str]) -> Iterator[Span]:
    end = 0
    while candidate := CANDIDATE.search(text, end):
        start = candidate.start()
        end = start + 1
        for kind, pattern, check in NUMBERS:
            match = pattern.match(text, start) if kind in kinds else None
            if match and check(re.sub("[^0-9A-Z.]", "", match[0].upper())) and _names_something(text, match, kind):
                end = match.end()
                yield start, end, PLACEHOLDER[kind]
                break


def _names_something(text: str, match: re.Match[str], kind: str) -> bool:
    """Tell the number of a person or machine from an amount, a round figure, a version, a heading, a file number."""
    before, after = text[max(0, match.start() - 12) : match.start()], text[match.end() : match.end() + 1]
    if NUMBERED.search(before):
        return False
    if kind == "ip":
        line = before if match.start() > 12 else "\n" + before
        is_heading = HEADING.search(line) and all(int(octet) < 100 for octet in match[0].split("."))
        return not is_heading and after not in tuple("节条款章版")
    is_amount = MONEY.search(before) or AMOUNT.match(text, match.end())
    return not is_amount and not re.sub("[^0-9A-Z]", "", match[0]).endswith("000000")


# --- Rules with lists of the user, read from a file when params.yaml is read


def _pattern(source: str, where: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(source, re.MULTILINE)
    except re.error as error:
        raise ValueError(f"{where}: {source!r} is not a regular expression ({error}); mend it") from None
    if pattern.fullmatch(""):
        raise ValueError(f"{where}: {source!r} matches nothing at all as well; make it ask for one character")
    return pattern


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


class _ListRule(_Rule):
    file: str = Field(
        pattern=r"^[\w-][\w. -]*$", description="a list in data/rules: UTF-8, one entry a line, # for comments"
    )
    action: Literal["drop", "remove", "mask"] = Field("drop", description="of the record, or of each place found")
    max_count: int = Field(0, ge=0, description="drop: places that a record may have")
    mask: str = Field("***", min_length=1, description="mask: what is put in each place")
    _loaded: list[re.Pattern[str]] | None = PrivateAttr(None)

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
            new, found_here, _ = _substitute(new, ((start, end, put) for start, end in self._places(new, pattern)))
            changes += found_here
        return Outcome(new, changes, None)

    def _places(self, text: str, pattern: re.Pattern[str]) -> Iterator[tuple[int, int]]:
        yield from (match.span() for match in pattern.finditer(text) if match[0])


class RegularExpressionRule(_ListRule):
    r"""Regular expressions from a file, one a line, applied in order; ^ and $ are the ends of a line.

    With `（.{1,12}号令）` in rules/numbers.txt and `action: remove`:
    "关于修改条例的决定（国务院令第687号令）" -> "关于修改条例的决定"
    """

    rule: Literal["regular_expression"] = "regular_expression"

    def _compiled(self) -> list[re.Pattern[str]]:
        return [_pattern(entry, where) for entry, where in _entries(self.file)]


class BadWordsRule(_ListRule):
    r"""Words from a file, in any case; words of spaced scripts whole, of Chinese and its like wherever they stand.

    With "ass" and "傻瓜" in rules/words.txt and `action: mask`:
    "你这个傻瓜! What an ass, not a class." -> "你这个***! What an ***, not a class."
    """

    rule: Literal["bad_words"] = "bad_words"

    def _compiled(self) -> list[re.Pattern[str]]:
        trees: dict[bool, dict[str, Any]] = {}
        for entry, where in _entries(self.file):
            word = _lower(entry)
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
    sources = [re.escape(character) + _alternatives(branch[character]) for character in sorted(branch, reverse=True)]
    return sources[0] if len(sources) == 1 else f"(?:{'|'.join(sources)})" if sources else ""


# --- Rules that drop the record


class LengthRule(_DroppingRule):
    """Length in characters (white space not counted) and in lines that are not blank.

    >>> LengthRule(min_chars=8).apply("第一条 总则").drop
    '5 < 8 characters'
    """

    rule: Literal["length"] = "length"
    min_chars: int = Field(1, ge=0, description="characters at least, white space not counted")
    max_chars: int | None = Field(None, ge=1, description="characters at most")
    min_lines: int = Field(0, ge=0, description="lines at least, blank ones not counted")
    max_lines: int | None = Field(None, ge=1, description="lines at most")

    def apply(self, text: str) -> Outcome:
        return Outcome(text, 0, self._evidence(text))

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


class RepeatedLinesRule(_DroppingRule):
    r"""Lines that stood in the record before, as shares of all lines and of their characters.

    Lines without a letter or digit (blank, rules, brackets of code) are not counted. Thresholds: Rae et al. 2021
    (Gopher, arXiv 2112.11446), table A1, "duplicate line fraction" and "duplicate line character fraction".

    >>> RepeatedLinesRule().apply("登录\n第一条 总则\n登录\n登录").drop
    '0.5 > 0.3 of the lines'
    """

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


class RepeatedNgramsRule(_DroppingRule):
    """Runs of n units that repeat: as shares of the characters of all units (punctuation and space not counted).

    A text of words: the commonest run (`top_words`), and every run but its first occurrence (`words`), overlaps counted
    once; thresholds and method of Rae et al. 2021 (Gopher), table A1, made for web pages. A text mostly of characters
    (Chinese): runs of characters, `characters`. No web threshold holds there: over 950 Chinese statutes table A1 drops
    931 on characters and more than half on words; FineWeb-2's values for Chinese drop a third. The highest share among
    them is 0.56 at 10 and 0.44 at 20, while spam repeats nearly all of itself.

    >>> RepeatedNgramsRule(min_units=8).apply("点击这里立即购买" * 10).drop
    '0.9 > 0.7 of the characters in repeated runs of 10'
    """

    rule: Literal["repeated_ngrams"] = "repeated_ngrams"
    top_words: dict[int, float] = Field({2: 0.20, 3: 0.18, 4: 0.16}, description="n: share of the commonest run")
    words: dict[int, float] = Field(
        {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}, description="n: share of repeated runs of words"
    )
    characters: dict[int, float] = Field({10: 0.70, 20: 0.60}, description="n: share of repeated runs of characters")
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


class ShareRule(_DroppingRule):
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


class ReplacementCharactersRule(_DroppingRule):
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


WINDOW = 700  # characters that are looked at, at the start, the middle and the end of a record


@lru_cache(maxsize=1)
def _language_model() -> Any:
    try:
        langid = importlib.import_module("py3langid.langid")
    except ModuleNotFoundError:
        raise ValueError("the rule `language` needs the package py3langid; install it: pip install py3langid") from None
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


class LanguageRule(_DroppingRule):
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


# --- The list of a source

RULES: dict[str, type[_Rule]] = {
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
        LanguageRule,
    )
    for name in get_args(kind.model_fields["rule"].annotation)
}
# Control characters before the normal form: what they parted may compose.
DEFAULT_RULES: list[Any] = ["newlines", "control_characters", "nfc", "whitespace", "length"]


def parse(rule: Any) -> _Rule:
    """Return the rule that params.yaml names: `nfc` or `{rule: nfc}`, with its parameters.

    Not a union of pydantic's: that would build all fifteen at the start of each stage, 40 ms.
    """
    if isinstance(rule, _Rule):
        return rule
    given = {"rule": rule} if isinstance(rule, str) else rule
    name = given.get("rule") if isinstance(given, dict) else None
    if not isinstance(given, dict) or name not in RULES:
        near = difflib.get_close_matches(str(name), RULES, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"the rules are {', '.join(RULES)}"
        raise ValueError(f"there is no rule `{name}`; {hint}")
    kind = RULES[name]
    for key in given:
        if key not in kind.model_fields:
            near = difflib.get_close_matches(str(key), kind.model_fields, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"it has {', '.join(kind.model_fields)}"
            raise ValueError(f"the rule `{name}` has no key `{key}`; {hint}")
    return kind.model_validate(given)


Rule = Annotated[SerializeAsAny[_Rule], PlainValidator(parse)]

Messages = Sequence[dict[str, str]]


def apply_rules(text: str, rules: Sequence[Rule]) -> tuple[str | None, dict[str, int], tuple[str, str] | None]:
    """Return the text after all rules or None, the changes by rule, and the rule and evidence if it is dropped.

    >>> apply_rules("\\ufeff第一条 \\r\\n", [parse(rule) for rule in DEFAULT_RULES])
    ('第一条\\n', {'newlines': 1, 'control_characters': 1, 'whitespace': 1}, None)
    """
    changes: dict[str, int] = {}  # no Counter: its update takes longer than most rules
    for rule in rules:
        text, changed, drop = rule.apply(text)
        if drop:
            return None, changes, (rule.rule, drop)
        if changed:
            changes[rule.rule] = changes.get(rule.rule, 0) + changed
    return text, changes, None


def apply_to_messages(
    messages: Messages, rules: Sequence[Rule]
) -> tuple[list[dict[str, str]] | None, dict[str, int], tuple[str, str] | None]:
    """Return what `apply_rules` does for a conversation: each content is changed, all contents joined are judged.

    A message that a rule leaves empty drops the conversation: an answer without its question teaches nothing.

    >>> apply_to_messages([{"role": "user", "content": "第 1 页"}], [BoilerplateRule()])
    (None, {'boilerplate': 1}, ('boilerplate', 'message 1 (user) became empty'))
    """
    changes: Counter[str] = Counter()
    now = list(messages)
    for rule in rules:
        if rule.drops:
            _, _, drop = rule.apply("\n".join(message["content"] for message in now))
            if drop:
                return None, dict(changes), (rule.rule, drop)
            continue
        for i, message in enumerate(now):
            text, changed, _ = rule.apply(message["content"])
            if not changed:
                continue
            changes[rule.rule] += changed
            if message["content"].strip() and not text.strip():
                return None, dict(changes), (rule.rule, f"message {i + 1} ({message['role']}) became empty")
            now[i] = {**message, "content": text}
    return now, dict(changes), None


def files(rules: Sequence[Rule]) -> list[str]:
    """Return the lists in `FOLDER` that the rules read, sorted: they decide the result as the parameters do."""
    return sorted({rule.file for rule in rules if isinstance(rule, _ListRule)})
