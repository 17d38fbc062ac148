"""data/exclusions.txt: documents that no phase may use, named so that only who has the project's key can tell which.

    key 3fd54e1a9c0b7d22                                                # which key it is
    9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08    # HMAC-SHA-256 of a doc_id or raw_id

A doc_id changes with the rules of `clean`, so `lineage erase apply` names the record, too: its raw_id is a hash of its
bytes in the raw file. Plain ids would show to everybody who has a text that it was taken out. The key lies beside the
file in data/exclusions.key (64 hexadecimal digits), which Git ignores: `lineage erase apply` makes it with the first
entry. Give it to those who run the pipeline. A file without entries needs none.
"""

from __future__ import annotations

import hmac
import re
from pathlib import Path

FILE, KEY = "data/exclusions.txt", "data/exclusions.key"


class Exclusions:
    """What a file excludes: `doc_id in exclusions`, `raw_id in exclusions`, and how many."""

    def __init__(self, key: bytes, marks: frozenset[str]) -> None:
        self.key, self.marks = key, marks

    def __contains__(self, identity: bytes) -> bool:
        return bool(self.marks) and mark(self.key, identity) in self.marks

    def __len__(self) -> int:
        return len(self.marks)


def mark(key: bytes, identity: bytes) -> str:
    """Return what stands in the file for a document or a record.

    >>> mark(bytes(32), bytes(16))[:16], mark(bytes([1] * 32), bytes(16))[:16]
    ('853c7403937d8b62', '4445762421861c5c')
    """
    return hmac.digest(key, identity, "sha256").hex()


def key_id(key: bytes) -> str:
    """Return what a key is called: no 16 bytes of a doc_id are these."""
    return mark(key, b"which key is this")[:16]


def read_key(path: Path) -> bytes:
    text = path.read_text(encoding="ascii", errors="replace").strip()
    if not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise SystemExit(f"{path} is no key: 64 hexadecimal digits; take the file from whoever made {Path(FILE).name}.")
    return bytes.fromhex(text)


def read(path: Path) -> Exclusions:
    """Return what a file excludes; its key lies beside it. Raises SystemExit for a missing or another key."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8.") from None
    named, marks = "", set()
    for number, line in enumerate(lines, start=1):
        text = line.split("#", 1)[0].strip().lower()
        if found := re.fullmatch("key ([0-9a-f]{16})", text):
            if named not in ("", found[1]):
                raise SystemExit(
                    f"{path} line {number}: it names a second key, as after a merge of two first exclusions; keep the "
                    "lines of one, and its file beside it, and `lineage erase apply` the documents of the other again."
                )
            named = found[1]
        elif re.fullmatch("[0-9a-f]{64}", text):
            marks.add(text)
        elif re.fullmatch("[0-9a-f]{32}", text):
            raise SystemExit(
                f"{path} line {number}: a plain doc_id would tell who has the text that it was taken out; remove the "
                f"line and run `python -m lineage erase apply {text}`."
            )
        elif text:
            raise SystemExit(
                f"{path} line {number}: {text[:40]!r} is no entry; `python -m lineage erase apply ID` writes them."
            )
    beside = path.with_name(Path(KEY).name)
    if not marks:
        return Exclusions(b"", frozenset())
    if not beside.is_file():
        raise SystemExit(
            f"{beside} is missing, without which {path} cannot be read; it is not in Git: take it from whoever ran "
            "`lineage erase apply`."
        )
    key = read_key(beside)
    if key_id(key) != named:
        raise SystemExit(
            f"{beside} is key {key_id(key)}, but {path} was made with {named or 'one that it does not name'}; take "
            "that key from whoever ran `lineage erase apply`."
        )
    return Exclusions(key, frozenset(marks))
