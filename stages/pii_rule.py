"""The rule of `clean` that puts placeholders for what points to a person: addresses, and numbers with check digits.

Every number with a check digit is checked, so that other long numbers (the articles of a law, file numbers) survive.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from typing import Literal, get_args

from pydantic import Field

from rule_base import WORD_CHARACTER, BaseRule, Outcome, Span, substitute

Kind = Literal["email", "ip", "phone", "mobile", "id_card", "credit_code", "bank_card"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PLACEHOLDER = {kind: f"<{kind.upper()}>" for kind in KINDS} | {"mobile": "<PHONE>"}
HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F) if chr(code) not in "，：；！？"}
FULL_WIDTH_DIGIT = re.compile("[０-９＠]")
GAP = " \u00a0\u2010-\u2014\u3000\uff0d-"  # a space or hyphen may stand between the groups of a number
LABELS = ("tel", "fax", "phone", "mobile", "id")  # words that a number may follow without a gap
_LABEL = "|".join(f"(?<=(?<![A-Za-z])(?i:{label}).)" for label in LABELS)
# Where a number of seven digits, or a dotted quad, starts: not inside another word, not after a decimal point.
CANDIDATE = re.compile(
    rf"[0-9(（+ANY](?:(?<=[(（+])|(?<![0-9A-Za-z].)(?<![0-9]\..)|(?<=\\[nrt].)|(?<=\\u[0-9A-Fa-f]{{4}}.)|{_LABEL})"
    rf"(?:(?:[.+()）{GAP}]{{0,2}}[0-9]){{6}}|[0-9]{{0,2}}(?:\.[0-9]{{1,3}}){{3}})"
)
EMAIL_DOMAIN = re.compile(r"@(?![1-4]x\.)(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9])")  # not logo@2x.png
EMAIL_LOCAL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._%+'-]{0,62}[A-Za-z0-9_+-])?\Z")
IPV6_HEAD = re.compile(r"(?<![0-9A-Za-z:])(?:[0-9A-Fa-f]{1,4})?\Z")
IPV6_TAIL = re.compile(r":[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:.]*")
NUMBERED = re.compile(r"(?:\b(?:v|ver|version|release|section|clause|chapter)|[§№第]|版本号?)[.:：]?\s?\Z", re.I)
HEADING = re.compile(r"\n[#\s]*\Z")
MONEY = re.compile(r"(?:[¥￥$€£]|(?<![A-Za-z])(?:USD|RMB|CNY|HKD|EUR|GBP|JPY)|人民币|美元|港币|欧元)[ \u00a0\u3000]?\Z")
AMOUNT = re.compile(  # on the same line; 股票, 圆通 and 元旦 are no units
    r"[ \u00a0\u3000]?[百千万亿]*(?:元(?![旦月年素件宵首器])|圆(?![通满形])|股(?![票东权份本价息市改民比指])|[吨亩%％]"
    r"|美[元金]|港[元币]|[欧日]元|英镑|[千毫微]克|毫[升米]|公斤|平方|立方|公顷|千瓦时|人次"
    r"|(?:[mk]g|ml|yuan|dollars?|euros?|USD|RMB|CNY|HKD|EUR|GBP|JPY)\b)"
)
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
# Of a Chinese landline; 0123-20180312 is a date in a file number, and 0830 1200 1330 1730 are times of day.
CITY = r"0(?:10|2\d|[3-9]\d\d)"
NO_DATE = r"(?!20\d\d(?:0[1-9]|1[0-2])[0-3]\d)"
LANDLINE = rf"(?:[(（]{CITY}[)）]~?|{CITY}~{NO_DATE})(?:\d{{7,8}}|[2-8]\d{{2,3}}~\d{{4}})"
AREA = r"[(（]0[1-9]\d{1,3}[)）]~?\d{3,4}~?\d{3,4}"  # British or Chinese, set off from the number by brackets
BRITISH = r"0(?:2\d~\d{4}~?\d{4}|1\d1~\d{3}~?\d{4}|11\d~\d{3}~?\d{4}|[17]\d{3}~\d{3}~?\d{3})"
END = r"(?!-\d|~\d{4}(?!\d))"  # of a number that is no row of groups
CARD = r"(?<!(?<!\d)\d{4}~)\d{4}(~)\d{4}\1\d{4}\1\d{4}"
# The first that fits wins. A longer row of such groups, years for example, is neither a card nor a phone number. What
# an end of a row needs to its left it also needs to its right, or a row would be eaten group by group, a pass for each.
NUMBERS: tuple[tuple[Kind, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("id_card", _number(r"[1-9]\d{5}~?(?:18|19|20)\d{6}~?\d{3}[\dXx]"), is_id_card),
    ("credit_code", _number(r"[1-9ANY][1-9]\d{6}[0-9A-HJ-NP-RTUWXYa-hj-np-rtuwxy]{10}"), is_credit_code),
    ("bank_card", _number(r"\d{13,19}|\d{6}~\d{13}|3\d{3}(~)\d{6}\1\d{4,5}"), is_bank_card),
    ("bank_card", _number(CARD + r"\1\d{1,3}(?!~\d{4}(?!\d))"), is_bank_card),
    ("bank_card", _number(CARD + r"(?!~\d{4}(?!\d))"), is_bank_card),
    ("mobile", _number(r"(?:\(?(?:\+|00)?86\)?~?)?1[3-9]\d(?:\d{8}|(~)\d{4}\1\d{4})"), _any),
    ("mobile", _number(rf"(?<!\d[-.])1[3-9]\d-{NO_DATE}\d{{8}}(?!-\d)"), _any),
    ("phone", _number(PLUS), _any),  # the lengths of North America, Britain, China; else 9 to 14 digits (ITU-T E.164)
    ("phone", _number(r"(?<!\d[-.])(?:1[ .-])?(?:\(\d{3}\) ?|[2-9]\d\d[.-])\d{3}[.-]\d{4}(?!-\d)"), _any),
    ("phone", _number(rf"(?<!\d[-.]){LANDLINE}-\d{{1,5}}(?!-\d)"), _any),
    ("phone", _number(rf"(?<!\d[-.])(?:(?:00)?86~{CITY.replace('0', '0?', 1)}~\d{{7,8}}|{LANDLINE}){END}"), _any),
    ("phone", _number(rf"(?<!\d[-.])(?:{AREA}|{BRITISH}){END}"), lambda number: 10 <= len(number) <= 12),
    ("ip", _number(r"\d{1,3}(?:\.\d{1,3}){3}"), is_ipv4),
)


class PiiRule(BaseRule):
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
                new, found, _ = substitute(new, find(half, self.kinds))
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
