"""Check that a finished project, or an evidence pack, is what its papers say: from the raw bytes to the model.

    python lineage/verify.py [PHASE] [--root FOLDER] [--key PUBLIC.pem] [--json]     exit status 1: something is wrong

It needs Python and pyarrow, no network and nothing of the project's own code, and trusts neither file times nor
dvc.lock: every byte of every input and output is read and hashed. Then each artefact is held against the one before:

    dvc.lock, run records, manifests      say the digests of the same bytes; code and params.yaml are those of dvc.lock
    raw -> ledger                         the records tile their files, each raw_id is the hash of the record's bytes
    ledger -> documents                   kept rows are the documents, doc_id is the hash of the text; the text is what
                                          the raw bytes say, where this program can read the format and apply the rules
    documents -> decisions                one for each, no text kept twice or on both sides, twins are there
    documents -> marked -> tokens         the segments hold the texts unchanged, the ids decode to the segments
    tokens -> blocks                      every block rebuilt, all ids, marks and padding compared
    blocks -> receipts                    what each training step was fed, computed anew from the blocks and the order
    model                                 tokenizer and base are those that were named; merged follows from trained
    attestations (in a pack)              say what dvc.lock, run records and digests do; with --key, each is signed

It stops where a library would be needed: text of PDF, Word and HTML files, rules of cleaning beyond line ends, Unicode
forms and white space, chat templates, encoding (ids are decoded instead), the sums of a merge. Each place where it
stops is listed. The hashes show that files and papers belong together; somebody who may change all of them can forge
all of them alike, unless digests or signatures are kept elsewhere.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import functools
import hashlib
import hmac
import io
import json
import re
import signal
import sys
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

RECORDS = "metrics/runs"
# Names in a folder that are none of its content, beside what begins with ".tmp-".
LEFT_OUT = {"__pycache__", ".dvc", ".git", ".hg", ".memo", ".venv", ".work"}
RULES, BENCHMARKS = "data/rules", "data/benchmarks"
EXCLUSIONS, EXCLUSIONS_KEY = "data/exclusions.txt", "data/exclusions.key"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TRAINING_FILES = ("training.json", "receipts.bin", "README.md")  # of models/PHASE/trained alone
MASK = 2**64 - 1


class Finding(NamedTuple):
    """What one check found: status is ok, FAILED, or stops (not checked from here on)."""

    status: str
    check: str
    path: str
    detail: str


class Report:
    """The findings so far."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def ok(self, check: str, path: str, detail: str = "") -> None:
        self.findings.append(Finding("ok", check, path, detail))

    def fail(self, check: str, path: str, detail: str) -> None:
        self.findings.append(Finding("FAILED", check, path, detail))

    def stops(self, check: str, path: str, detail: str) -> None:
        self.findings.append(Finding("stops", check, path, detail))

    def failed(self, path: str) -> bool:
        """Return whether something is wrong with this file or folder, or in it."""
        return any(f.status == "FAILED" and (f.path == path or f.path.startswith(path + "/")) for f in self.findings)


class Wrong(Exception):  # noqa: N818 (a finding, no error of this program)
    """A check that failed, in a sentence."""


# --- YAML, as far as params.yaml and dvc.lock use it: block and flow collections, quoted and plain scalars, comments

NUMBER = re.compile(r"[-+]?(\d[\d_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)", re.ASCII)
FLOAT = re.compile(r"[-+]?(\.\d[\d_]*|\d[\d_]*(\.[\d_]*)?)([eE][-+]?\d+)?", re.ASCII)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "e": "\x1b", "a": "\a", "b": "\b", "v": "\v", "f": "\f"}
ESCAPES |= {"_": "\xa0", "N": "\x85", "L": "\u2028", "P": "\u2029"}


def scalar(text: str) -> Any:
    """Return a plain scalar of YAML 1.2.

    >>> scalar("1e-4"), scalar("no"), scalar("~"), scalar("010"), scalar("0o10"), scalar("1_000")
    (0.0001, 'no', None, 10, 8, 1000)
    """
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text.lower() in ("true", "false") and text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if NUMBER.fullmatch(text):
        digits = text.replace("_", "")
        return int(digits, 0) if digits.lstrip("+-")[:2] in ("0x", "0o", "0b") else int(digits)
    if FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", text):
        return float(text.replace(".", ""))
    return text


class Flow:
    """A reader of one line of YAML: flow collections and scalars."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def value(self, ends: str) -> Any:
        """Return the value at hand, which a character of `ends` or the end of the text closes."""
        self.space()
        sign = self.text[self.at : self.at + 1]
        if sign == "{":
            return dict(self.items("}", pairs=True))
        if sign == "[":
            return list(self.items("]", pairs=False))
        if sign in ("'", '"') and sign:
            return self.quoted(sign)
        begin = self.at
        while self.at < len(self.text) and self.text[self.at] not in ends:
            if ends and self.text[self.at] == ":" and self.text[self.at + 1 : self.at + 2] in ("", " ", *ends):
                break
            self.at += 1
        return scalar(self.text[begin : self.at].strip(" \t"))

    def items(self, close: str, pairs: bool) -> Iterator[Any]:
        self.at += 1
        while True:
            self.space()
            if self.at >= len(self.text):
                raise ValueError(f"`{close}` is missing")
            if self.text[self.at] == close:
                self.at += 1
                return
            key = self.value(",]}")
            self.space()
            if pairs:
                found = None
                if self.text[self.at : self.at + 1] == ":":
                    self.at += 1
                    found = self.value(",]}")
                    self.space()
                yield key, found
            else:
                yield key
            if self.text[self.at : self.at + 1] == ",":
                self.at += 1

    def quoted(self, quote: str) -> str:
        self.at += 1
        parts: list[str] = []
        while self.at < len(self.text):
            sign = self.text[self.at]
            self.at += 1
            if sign == quote == "'" and self.text[self.at : self.at + 1] == "'":
                parts.append("'")
                self.at += 1
            elif sign == quote:
                return "".join(parts)
            elif sign == "\\" and quote == '"':
                code = self.text[self.at]
                width = {"x": 2, "u": 4, "U": 8}.get(code, 0)
                digits = self.text[self.at + 1 : self.at + 1 + width]
                parts.append(chr(int(digits, 16)) if width else ESCAPES.get(code, code))
                self.at += 1 + width
            else:
                parts.append(sign)
        raise ValueError(f"a closing {quote} is missing")

    def space(self) -> None:
        while self.at < len(self.text) and self.text[self.at] in " \t\n":
            self.at += 1


def without_comment(line: str) -> str:
    """Return a line without the comment at its end.

    >>> without_comment("path: 'a # b'  # c")
    "path: 'a # b'"
    """
    quote = ""
    for at, sign in enumerate(line):
        if quote:
            quote = "" if sign == quote and not (quote == '"' and line[at - 1] == "\\") else quote
        elif sign in "'\"" and (at == 0 or line[at - 1] in " [{,:"):
            quote = sign
        elif sign == "#" and (at == 0 or line[at - 1] in " \t"):
            return line[:at].rstrip(" \t")
    return line.rstrip(" \t")


ODD = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]")  # some of them end a line, to some readers
KEY = re.compile(
    r"""((?:'(?:[^']|'')*'|"(?:[^"\\]|\\.)*"|[^ \t'"\[\]{},#&*!|>%@`-][^#]*?|-[^ \t#][^#]*?))[ \t]*:(?:[ \t]+|$)"""
)


class Yaml:
    """Reads a block of YAML. Raises ValueError naming the line where it is more than this reader knows."""

    def __init__(self, text: str) -> None:
        lines = enumerate(text.split("\n"), start=1)
        self.raw = text.split("\n")
        stripped = [(number, without_comment(line)) for number, line in lines]
        self.lines = [(number, len(s) - len(s.lstrip(" ")), s.strip(" \t")) for number, s in stripped if s.strip(" \t")]
        self.at = 0

    def read(self) -> Any:
        found = self.block(0) if self.lines else None
        if self.at < len(self.lines):
            raise ValueError(f"line {self.lines[self.at][0]} is indented otherwise than the lines before it")
        return found

    def block(self, indent: int) -> Any:
        """Return the value whose lines begin at the current one, at least `indent` deep."""
        number, depth, text = self.lines[self.at]
        if depth < indent:
            return None
        if text == "-" or text.startswith("- "):
            return self.sequence(depth)
        if KEY.match(text):
            return self.mapping(depth)
        self.at += 1
        if text[0] not in "[{'\"" and (text[-1] == ":" or ": " in text):
            raise ValueError(f"line {number}: a key that is not read here")
        return self.inline(text, depth - 1, number)

    def sequence(self, depth: int) -> list[Any]:
        found = []
        while self.at < len(self.lines):
            number, here, text = self.lines[self.at]
            if here != depth or not (text == "-" or text.startswith("- ")):
                break
            rest = text[1:].lstrip(" \t")
            if rest:
                # What stands behind the dash is a block of its own, as deep as its first character.
                self.lines[self.at] = (number, depth + len(text) - len(rest), rest)
            else:
                self.at += 1
            found.append(self.block(depth + 1) if self.at < len(self.lines) else None)
        return found

    def mapping(self, depth: int) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        while self.at < len(self.lines):
            number, here, text = self.lines[self.at]
            match = KEY.match(text) if here == depth else None
            if not match:
                break
            key = Flow(match[1]).value("")
            if key in found:
                raise ValueError(f"line {number}: the key {key} stands there twice")
            rest = text[match.end() :]
            self.at += 1
            if rest:
                found[key] = self.inline(rest, depth, number)
                continue
            dash = self.at < len(self.lines) and self.lines[self.at][2][:2] in ("-", "- ")
            deeper = self.at < len(self.lines) and self.lines[self.at][1] >= depth + (0 if dash else 1)
            found[key] = self.block(depth if dash else depth + 1) if deeper else None
        return found

    def inline(self, text: str, depth: int, number: int) -> Any:
        """Return the value that begins behind a key, with the deeper lines that go on with it."""
        if text[0] in "&*!?%@`" or ODD.search(self.raw[number - 1]):
            raise ValueError(f"line {number}: anchors, tags, odd keys and invisible characters are not read here")
        if text[0] in "|>":
            return self.literal(text, depth, number)
        while self.at < len(self.lines) and self.lines[self.at][1] > depth:
            # A double-quoted line that ends with a backslash goes on without a space.
            text = text[:-1] if text.endswith("\\") and text[0] == '"' else text + " "
            text += self.lines[self.at][2].removeprefix("\\")
            self.at += 1
        if text[0] not in "[{'\"":
            if ": " in text or text.endswith(":"):
                raise ValueError(f"line {number}: a colon that is not read here")
            return scalar(text)
        flow = Flow(text)
        found = flow.value(",]}")
        if rest := flow.text[flow.at :].strip(" \t"):
            raise ValueError(f"line {number}: {rest[:20]!r} stands behind the value")
        return found

    def literal(self, text: str, depth: int, number: int) -> str:
        taken: list[str] = []
        while self.at < len(self.lines) and self.lines[self.at][1] > depth:
            self.at += 1
        last = self.lines[self.at - 1][0]
        taken = self.raw[number:last]
        width = min(len(line) - len(line.lstrip(" ")) for line in taken if line.strip(" \t"))
        joined = ("\n" if text[0] == "|" else " ").join(line[width:] for line in taken)
        return joined if text[1:2] == "-" else joined + "\n"


def read_yaml(path: Path) -> Any:
    """Return what a YAML file says."""
    try:
        return Yaml(path.read_text(encoding="utf-8")).read()
    except (ValueError, IndexError, RecursionError) as error:
        raise Wrong(f"cannot be read: {error}") from None


# --- Digests


class Digests:
    """SHA-256, MD5 and size of files, each read once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.known: dict[str, tuple[str, str, int]] = {}

    def read(self, paths: list[str]) -> None:
        """Read all files below these paths."""
        new = sorted({file for path in paths for file in self.files(path)} - self.known.keys())
        with ThreadPoolExecutor(8) as pool:
            self.known.update(zip(new, pool.map(self._read, new), strict=True))

    def _read(self, name: str) -> tuple[str, str, int]:
        sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
        with (self.root / name).open("rb") as file:
            while block := file.read(2**20):
                sha256.update(block)
                md5.update(block)
                size += len(block)
        return sha256.hexdigest(), md5.hexdigest(), size

    def files(self, path: str) -> list[str]:
        """Return the files at or below a path, in the order of its run record."""
        if (self.root / path).is_file():
            return [path]
        found = [p.relative_to(self.root) for p in (self.root / path).rglob("*") if p.is_file()]
        kept = [p for p in found if not any(part in LEFT_OUT or part.startswith(".tmp-") for part in p.parts)]
        return [p.as_posix() for p in sorted(kept, key=lambda p: p.parts)]

    def sha256(self, path: str) -> str:
        """Return the digest of a file or folder as run records say it."""
        if (self.root / path).is_file():
            return self.known[path][0]
        pairs = [[file[len(path) + 1 :], self.known[file][0]] for file in self.files(path)]
        return hashlib.sha256(json.dumps(pairs, ensure_ascii=False).encode("utf-8", "surrogateescape")).hexdigest()

    def md5(self, path: str) -> dict[str, Any]:
        """Return what dvc.lock says of a file or folder."""
        if (self.root / path).is_file():
            return {"hash": "md5", "md5": self.known[path][1], "size": self.known[path][2]}
        files = self.files(path)
        listing = [{"md5": self.known[file][1], "relpath": file[len(path) + 1 :]} for file in files]
        listing.sort(key=lambda entry: entry["relpath"])
        digest = hashlib.md5(json.dumps(listing, sort_keys=True).encode(), usedforsecurity=False).hexdigest()
        size = sum(self.known[file][2] for file in files)
        return {"hash": "md5", "md5": f"{digest}.dir", "size": size, "nfiles": len(files)}


# --- The project, as dvc.lock describes it


class Stage(NamedTuple):
    """One entry of dvc.lock."""

    name: str
    item: str
    cmd: str
    deps: dict[str, dict[str, Any]]
    outs: dict[str, dict[str, Any]]
    params: dict[str, Any]

    @property
    def inputs(self) -> list[str]:
        """What it reads that is not code."""
        return [path for path in self.deps if not path.startswith("stages/")]

    @property
    def group(self) -> dict[str, Any]:
        """The values of its group of params.yaml; beside it may stand a path."""
        return next((value for value in self.params.values() if isinstance(value, dict)), {})


def read_lock(root: Path) -> dict[str, Stage]:
    """Return the stages of dvc.lock by name. Raises Wrong where it is not what DVC writes."""
    content = read_yaml(root / "dvc.lock")
    if not isinstance(content, dict) or content.get("schema") != "2.0" or not isinstance(content.get("stages"), dict):
        raise Wrong("is not a dvc.lock of schema 2.0")
    found = {}
    for full, entry in content["stages"].items():
        if not isinstance(entry, dict) or entry.keys() - {"cmd", "deps", "params", "outs"}:
            raise Wrong(f"{full}: {sorted(entry)} are not the keys of a stage")
        sides = []
        for side in ("deps", "outs"):
            paths = {}
            for one in entry.get(side) or []:
                if not isinstance(one, dict) or one.keys() - {"path", "hash", "md5", "size", "nfiles", "isexec"}:
                    raise Wrong(f"{full}: {one} is no entry of {side}")
                paths[str(one["path"])] = {key: value for key, value in one.items() if key not in ("path", "isexec")}
            sides.append(paths)
        name, _, item = full.partition("@")
        if (entry.get("params") or {}).keys() - {"params.yaml"}:
            raise Wrong(f"{full}: its parameters are of {', '.join(entry['params'])}, not of params.yaml")
        given = (entry.get("params") or {}).get("params.yaml") or {}
        found[full] = Stage(name, item, str(entry.get("cmd")), sides[0], sides[1], given)
    return found


def in_pipeline(root: Path, lock: dict[str, Stage]) -> tuple[dict[str, Stage], list[str]]:
    """Return the stages whose item params.yaml names, and the names of the others: DVC keeps what it once ran."""
    try:
        params = read_yaml(root / "params.yaml")
    except (Wrong, OSError):
        return lock, []  # check_params says so
    sections = params.values() if isinstance(params, dict) else ()
    items = {str(item) for section in sections if isinstance(section, dict) for item in section}
    gone = sorted(
        name
        for name, stage in lock.items()
        if stage.item and stage.item not in items and stage.cmd == f"exec python stages/{stage.name}.py {stage.item}"
    )
    return {name: stage for name, stage in lock.items() if name not in gone}, gone


class Source(NamedTuple):
    """A source with its place in the pipeline."""

    name: str
    phase: str
    raw: str
    params: dict[str, Any]
    about: dict[str, Any]

    def folder(self, kind: str) -> str:
        tail = {"documents": "/documents", "ledger": "/ledger"}.get(kind, "")
        return f"data/{'clean' if tail else kind}/{self.phase}/{self.name}{tail}"


class Project:
    """What is to be checked: the stages of dvc.lock, all or those that a phase rests on."""

    def __init__(self, root: Path, phase: str | None) -> None:
        self.root = root
        lock, self.gone = in_pipeline(root, read_lock(root))
        self.all = lock
        phases = [stage.item for stage in lock.values() if stage.name == "dedup"]
        if phase is not None and phase not in phases:
            raise SystemExit(f"dvc.lock has no phase {phase}; it has {', '.join(sorted(phases)) or 'none'}.")
        self.stages = lock if phase is None else self._below(lock, phase)
        self.whole = phase is None
        self.phases = sorted(stage.item for stage in self.stages.values() if stage.name == "dedup")
        self.digests = Digests(root)

    @staticmethod
    def _below(lock: dict[str, Stage], phase: str) -> dict[str, Stage]:
        def makes(stage: Stage, path: str) -> bool:
            return any(out == path or path.startswith(out + "/") or out.startswith(path + "/") for out in stage.outs)

        chosen = {name for name, stage in lock.items() if stage.item == phase and stage.name != "clean"}
        waiting = list(chosen)
        while waiting:
            for path in lock[waiting.pop()].inputs:
                new = [name for name, stage in lock.items() if name not in chosen and makes(stage, path)]
                chosen.update(new)
                waiting += new
        return {name: stage for name, stage in lock.items() if name in chosen}

    def sources(self, phase: str) -> list[Source]:
        """Return the sources of a phase, by name."""
        found = []
        for stage in self.stages.values():
            out = next((path for path in stage.outs if path.startswith(f"data/clean/{phase}/")), None)
            if stage.name == "clean" and out:
                raw = next(path for path in stage.inputs if path != RULES)
                about = (self.root / "data/sources" / phase / stage.item / "source.json").read_text(encoding="utf-8")
                found.append(Source(stage.item, phase, raw, stage.group, json.loads(about)))
        return sorted(found, key=lambda source: source.name)

    def group(self, stage: str, item: str) -> dict[str, Any]:
        """Return the parameters of a stage as dvc.lock has them."""
        found = self.stages.get(f"{stage}@{item}")
        return found.group if found else {}

    def batches(self, folder: str, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the batches of an Arrow folder; every value is checked to lie where its offsets say."""
        for shard in self.manifest(folder)["shards"]:
            with pa.memory_map(str(self.root / folder / shard["name"])) as file, pa.ipc.open_stream(file) as stream:
                for batch in stream:
                    batch.validate(full=True)
                    yield batch.select(columns) if columns else batch

    def manifest(self, folder: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.root / folder / "manifest.json").read_text(encoding="utf-8"))
        return found


# --- Papers against bytes


def check_lock(project: Project, report: Report) -> None:
    """dvc.lock names the bytes that lie there, for inputs, code and outputs."""
    said: dict[str, dict[str, Any]] = {}
    wrong: dict[str, tuple[str, list[str]]] = {}
    for name, stage in project.stages.items():
        expected = f"exec python stages/{stage.name}.py{' ' * bool(stage.item)}{stage.item}"
        if stage.cmd != expected:
            report.fail("dvc.lock", "dvc.lock", f"{name}: the command is `{stage.cmd}`, not `{expected}`")
        for path, entry in {**stage.deps, **stage.outs}.items():
            if said.setdefault(path, entry) != entry:
                report.fail("dvc.lock", path, f"dvc.lock has another digest of it at {name} than at a stage before")
            if not (project.root / path).exists():
                wrong.setdefault(path, ("it is not there", []))[1].append(name)
            elif (found := project.digests.md5(path)) != entry:
                wrong.setdefault(path, (_differing(entry, found), []))[1].append(name)
    for path, (what, names) in wrong.items():
        entry = said[path]
        for file in inside(project, path, str(entry.get("md5"))):
            report.fail("dvc.lock", file, f"it is another file than DVC has listed for {path}")
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        report.fail("dvc.lock", path, f"{what}, as dvc.lock says at {names[0]}{others}")
    intact = [name for name, stage in project.stages.items() if not wrong.keys() & {*stage.deps, *stage.outs}]
    for name in intact:
        report.ok(
            "dvc.lock", name, f"{len(project.stages[name].deps)} inputs, {len(project.stages[name].outs)} outputs"
        )


def inside(project: Project, folder: str, md5: str) -> list[str]:
    """Return the files of a folder that are not those of DVC's listing of it, where the cache holds that listing."""
    listing = project.root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    if not md5.endswith(".dir") or not listing.is_file() or not (project.root / folder).is_dir():
        return []
    content = listing.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5.removesuffix(".dir"):
        return []
    said = {f"{folder}/{entry['relpath']}": entry["md5"] for entry in json.loads(content)}
    found = {file: project.digests.known[file][1] for file in project.digests.files(folder)}
    return sorted(file for file in said.keys() | found.keys() if said.get(file) != found.get(file))


def _differing(said: dict[str, Any], found: dict[str, Any]) -> str:
    key = next(key for key in ("hash", "md5", "size", "nfiles") if said.get(key) != found.get(key))
    return f"its {key} is {found.get(key)} and not {said.get(key)}"


def check_params(project: Project, report: Report) -> None:
    """The values in dvc.lock are those of params.yaml."""
    try:
        params = read_yaml(project.root / "params.yaml")
    except (Wrong, OSError) as error:
        report.stops("params.yaml", "params.yaml", f"{error}; its values are not compared with dvc.lock")
        return
    wrong = 0
    for name, stage in project.stages.items():
        for key, value in stage.params.items():
            group: Any = params
            for part in key.split("."):
                group = group.get(part) if isinstance(group, dict) else None
            if group != value:
                wrong += 1
                report.fail("params.yaml", "params.yaml", f"{key} is not what dvc.lock says at {name}")
    if not wrong:
        report.ok("params.yaml", "params.yaml", "its values are those of dvc.lock")


def check_records(project: Project, report: Report) -> None:
    """Run records name the digests of the bytes and of the code, and the inputs that dvc.lock names."""
    for name, stage in project.stages.items():
        if stage.name == "check_params":
            continue
        path = f"{RECORDS}/{name}.json"
        try:
            record = json.loads((project.root / path).read_text(encoding="utf-8"))
            sides = {side: dict(line.rsplit(" sha256:", 1) for line in record[side]) for side in ("inputs", "outputs")}
            code = record["code"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            report.fail("run record", path, f"it cannot be read ({error})")
            continue
        before = len(report.findings)
        for side, paths in sides.items():
            for each, digest in paths.items():
                if not (project.root / each).exists():
                    report.fail("run record", each, f"{path} names it among its {side} but it is not there")
                elif project.digests.sha256(each) != digest:
                    report.fail("run record", each, f"its bytes are not those of {path}")
        if set(sides["inputs"]) != set(stage.inputs):
            odd = sorted(set(sides["inputs"]) ^ set(stage.inputs))
            report.fail("run record", path, f"it and dvc.lock name other inputs: {', '.join(odd)}")
        files = sorted((p for p in stage.deps if p.startswith("stages/")), key=lambda p: p.split("/"))
        if any(report.failed(file) for file in files):
            report.stops("run record", path, "the code that it names is not here to be compared")
        else:
            pairs = [[file.removeprefix("stages/"), project.digests.sha256(file)] for file in files]
            if code != [f"sha256:{hashlib.sha256(json.dumps(pairs).encode()).hexdigest()}"]:
                report.fail("run record", path, "it was written by other code than dvc.lock names")
        if len(report.findings) == before:
            report.ok("run record", name, f"{len(sides['inputs'])} inputs, {len(sides['outputs'])} outputs")


def check_manifests(project: Project, report: Report) -> None:
    """Each Arrow folder of the pipeline holds the shards, rows and columns of its manifest, and nothing else."""
    outs = {out for stage in project.stages.values() for out in stage.outs if out.startswith("data/")}
    outs = {out for out in outs if not out.startswith("data/raw")}
    files = [file for out in outs for file in project.digests.files(out)]
    folders = sorted({file.rsplit("/", 1)[0] for file in files if file.endswith((".arrow", "manifest.json"))})
    for folder in folders:
        try:
            _check_manifest(project, folder)
            report.ok("manifest", folder, f"{project.manifest(folder)['counts']['rows']:,} rows")
        except Wrong as error:
            report.fail("manifest", folder, str(error))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
            report.fail("manifest", folder, f"it cannot be read ({_short(error)})")


def _check_manifest(project: Project, folder: str) -> None:
    content = project.manifest(folder)
    text = (project.root / folder / "manifest.json").read_text(encoding="utf-8")
    if text != json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n":
        raise Wrong("manifest.json is not in the form in which it is written: it was edited")
    names = [shard["name"] for shard in content["shards"]]
    expected = {f"{folder}/{name}" for name in (*names, "manifest.json", "state.json", "dataset_info.json")}
    if odd := set(project.digests.files(folder)) ^ expected:
        raise Wrong(f"{sorted(odd)[0]} is not there, or not in its manifest")
    rows = 0
    for shard in content["shards"]:
        if project.digests.known[f"{folder}/{shard['name']}"][0] != shard["sha256"]:
            raise Wrong(f"{shard['name']} is not the file that manifest.json names")
        with pa.OSFile(str(project.root / folder / shard["name"])) as file, pa.ipc.open_stream(file) as stream:
            if {field.name: str(field.type) for field in stream.schema} != content["schema"]:
                raise Wrong(f"{shard['name']} has other columns than manifest.json says")
            found = sum(batch.num_rows for batch in stream)
        if found != shard["rows"]:
            raise Wrong(f"{shard['name']} has {found} rows, manifest.json says {shard['rows']}")
        rows += found
    if content["counts"]["rows"] != rows:
        raise Wrong(f"its shards have {rows} rows, manifest.json counts {content['counts']['rows']}")
    state = json.loads((project.root / folder / "state.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    if state.get("_fingerprint") != digest or [f["filename"] for f in state["_data_files"]] != names:
        raise Wrong("state.json is not that of manifest.json")
    if (project.root / folder / "dataset_info.json").read_text() != "{}\n":
        raise Wrong("dataset_info.json is not empty")


def check_strangers(project: Project, report: Report) -> None:
    """No folder of the pipeline holds what no stage has written."""
    outs = {out for stage in project.all.values() for out in (*stage.outs, *stage.deps)}
    # The run records of what params.yaml no longer names stay in Git, and are listed with their stages as not checked.
    outs |= {f"{RECORDS}/{name}.json" for name in project.gone}
    kinds = ("clean", "sources", "dedup", "marked", "tokens", "blocks")
    for top in (*(f"data/{kind}" for kind in kinds), "models", RECORDS):
        for file in project.digests.files(top):
            if not any(file == out or file.startswith(out + "/") for out in outs) and "/configs/" not in file:
                why = "no stage that dvc.lock and params.yaml name has written it; of an earlier state? delete it"
                report.fail("dvc.lock", file, why)


# --- raw -> ledger -> documents


def raw_files(project: Project, source: Source) -> dict[str, Path]:
    """Return the files of a source by the name that the ledger gives them."""
    root = project.root / source.raw
    is_arrow = source.about["format"] == "arrow"
    if root.is_file() or (is_arrow and (root / "state.json").is_file()):
        return {root.name: root}
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        inside = any(name.startswith(known + "/") for known in found)
        if (is_arrow and (path / "state.json").is_file()) or (path.is_file() and not inside):
            found[name] = path
    return found


def opened(path: Path) -> Any:
    """Return a file to be read, decompressed."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    return pa.input_stream(str(path), compression=compression) if compression else path.open("rb")


class Content:
    """The bytes of a raw file, decompressed, one after the other; of a damaged one as many as can be had."""

    def __init__(self, path: Path) -> None:
        self.path, self.stream, self.at, self.damaged = path, opened(path), 0, False

    def read(self, size: int) -> bytes:
        try:
            data = b"" if self.damaged else bytes(self.stream.read(size))
        except OSError:
            self.damaged, self.stream, rest = True, opened(self.path), bytearray()
            with contextlib.suppress(OSError):
                self.stream.read(self.at)
                while len(rest) < size and (byte := self.stream.read(1)):  # a read that fails loses all it had
                    rest += byte
            data = bytes(rest)
        self.at += len(data)
        return data


def check_raw(project: Project, source: Source, report: Report) -> None:
    """Every record of the raw files stands in the ledger, with the hash of its bytes; kept ones are the documents."""
    folder = source.folder("ledger")
    tiled, table = source.about["unit"] == "line", source.about["format"] in ("parquet", "arrow")
    counted = source.about["format"] in ("text", "jsonl") and source.about["encoding"] != "utf-16"
    replay = Replay(source)
    rows: Counter[str] = Counter()
    documents = _rows(project.batches(source.folder("documents")))
    files, last, rebuilt = raw_files(project, source), "", 0
    for file, ledger in groupby(_rows(project.batches(folder)), key=lambda row: row["file"]):
        path = files.get(file)
        if path is None or file <= last:
            raise Wrong(f"it names {file}, which " + ("stands there twice" if path else f"is not in {source.raw}"))
        last = file
        rows["files"] += 1
        at, line, handle = 0, 1, Content(path) if tiled else None
        values = _table_rows(path, source) if table else None
        for row in ledger:
            raw, problem = None, ""
            row["start"] = at if tiled else None
            if handle:
                raw = handle.read(max(row["end"] - at, 0))
                if counted and row["number"] != line:
                    problem = f"{folder} calls line {line} of {file} line {row['number']}"
                line += raw.count(b"\n")
                if at + len(raw) != row["end"]:
                    problem = f"ends at byte {at + len(raw)}, {folder} has a record at {at} to {row['end']}"
            elif values is not None:
                raw = next(values, b"")
            if row["start"] == 0 and raw:
                replay.begin(raw)
            at = row["end"]
            if raw is not None and not problem and hashlib.sha256(raw).digest()[:16] != row["raw_id"]:
                problem = f"{source.about['unit']} {row['number']} is not the record whose raw_id {folder} holds"
            if problem:
                where = source.raw if path.name == Path(source.raw).name else f"{source.raw}/{file}"
                report.fail("raw -> ledger", where, problem)
                raw = handle = values = None  # one finding for a file
            rows["records"] += 1
            rows["changed"] += row["changes"] is not None
            if row["rule"] is not None:
                rows[f"dropped_{row['rule']}"] += 1
                rows["dropped"] += 1
                continue
            rows["kept"] += 1
            rebuilt += replay.document(row, raw, next(documents, None))
        if handle and handle.read(1):
            report.fail("raw -> ledger", f"{source.raw}/{file}", f"it goes on after its last record, at byte {at}")
        rows["bytes"] += sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())
    if next(documents, None):
        raise Wrong("there are more documents than kept records")
    _counts(project, source, rows)
    report.ok(
        "raw -> ledger", folder, f"{rows['records']:,} records of {rows['files']:,} files, {rows['bytes']:,} bytes"
    )
    if not (tiled or table):
        report.stops("raw -> ledger", folder, f"records of {source.about['format']} files are not read anew")
    report.ok("ledger -> documents", source.folder("documents"), f"{rows['kept']:,} documents, text and identity")
    if replay.left:
        why = ", ".join(f"{count:,} {reason}" for reason, count in sorted(replay.left.items()))
        report.stops("raw -> documents", source.folder("documents"), f"not rebuilt from raw bytes: {why}")
    if rebuilt:
        report.ok("raw -> documents", source.folder("documents"), f"{rebuilt:,} texts rebuilt from raw bytes")


def _counts(project: Project, source: Source, rows: Counter[str]) -> None:
    manifest = dict(project.manifest(source.folder("ledger"))["counts"])
    found = {name: count for name, count in rows.items() if name.startswith("dropped_")}
    if manifest != {"rows": rows["records"], "kept": rows["kept"], **found}:
        raise Wrong(f"its manifest counts {manifest}, its rows say {dict(rows)}")
    for name in ("records", "kept", "dropped", "files", "bytes", "changed"):
        if source.about[name] != rows[name]:
            raise Wrong(f"source.json says {source.about[name]} {name}, there are {rows[name]}")


def _rows(batches: Iterator[pa.RecordBatch]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        for begin in range(0, batch.num_rows, 64):
            yield from batch.slice(begin, 64).to_pylist()


NAMES = {
    "text": ("text",),
    "alpaca": ("instruction", "input", "output", "system", "history", "kto_tag"),
    "messages": ("messages", "system", "tools", "kto_tag"),
    "sharegpt": ("conversations", "system", "tools", "kto_tag"),
    "prompt_completion": ("prompt", "completion", "system", "history", "tools", "label"),
}
# So many of them, from the first on, a row must have, else the first one; null in `columns` leaves one out.
NEEDED = {"alpaca": 3, "prompt_completion": 2}
CANONICAL = json.JSONEncoder(ensure_ascii=False, sort_keys=True, default=str).encode


def _table_rows(path: Path, source: Source) -> Iterator[bytes]:
    """Yield the bytes that stand for each row of a Parquet or Arrow file: JSON of the columns that are read.

    Of a row that cannot be read there are none; where the file cannot be read any further it ends.
    """
    columns = source.params.get("columns") or {}
    names = NAMES[source.about["record"]]
    wanted = [columns.get(name, name) for name in names]
    tools = columns.get("tools", "tools")
    unreadable = (ValueError, KeyError, OverflowError, pa.ArrowException)

    def values(rows: pa.RecordBatch) -> list[Any]:
        rows.validate(full=True)
        named = not re.search(r"\bmap<(?!string|large_string)", " ".join(map(str, rows.schema.types)))
        return list(rows.to_pylist(maps_as_pydicts="strict" if named else None))  # a map is an object

    must = {*names[: NEEDED.get(source.about["record"], 1)], *columns}
    needed = {column for name, column in zip(names, wanted, strict=True) if column and name in must}

    def chosen(present: list[str]) -> list[str]:
        """Return the columns that are read; none can be where one is missing or stands twice."""
        found = [column for column in wanted if column in present]
        if not needed <= set(found) or any(present.count(column) > 1 for column in found):
            raise ValueError("it has not the columns")
        return found

    with contextlib.suppress(OSError, MemoryError, *unreadable):
        for batch in _table_batches(path, source.about["format"], chosen):
            for begin in range(0, batch.num_rows, 256):
                rows = batch.slice(begin, 256)
                try:
                    found = values(rows)
                except unreadable:
                    found = []
                    for at in range(rows.num_rows):
                        try:
                            found += values(rows.slice(at, 1))
                        except unreadable:
                            found.append(None)
                for row in found:
                    named = {name: value for name, value in (row or {}).items() if value is not None or name != tools}
                    yield b"" if row is None else CANONICAL(named).encode("utf-8", "surrogatepass")


def _table_batches(path: Path, kind: str, chosen: Callable[[list[str]], list[str]]) -> Iterator[pa.RecordBatch]:
    if path.is_dir():
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for item in state["_data_files"]:
            yield from _table_batches(path / item["filename"], kind, chosen)
        return
    with opened(path) as handle:
        file = pa.BufferReader(handle.read()) if path.suffix.lower() in COMPRESSIONS else pa.memory_map(str(path))
    if kind == "parquet":
        from pyarrow import parquet

        table = parquet.ParquetFile(file, page_checksum_verification=True)
        yield from table.iter_batches(256, columns=chosen(table.schema_arrow.names))
        return
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
    names = chosen(reader.schema.names)
    for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
        yield batch.select(names)


SPACES = " \t\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
RULES_HERE = {"newlines", "nfc", "nfkc", "nfd", "whitespace"}


class Replay:
    """Makes documents of raw bytes anew, for the formats and rules that the standard library can follow."""

    def __init__(self, source: Source) -> None:
        self.source, self.format, self.record = source, source.about["format"], source.about["record"]
        self.codec = source.about["encoding"]
        rules = source.params.get("rules") or ["newlines", "control_characters", "nfc", "whitespace", "length"]
        self.rules = [rule if isinstance(rule, dict) else {"rule": rule} for rule in rules]
        self.columns = source.params.get("columns") or {}
        self.left: Counter[str] = Counter()
        self.header: list[str] = []
        self.by_line = source.params.get("sample_by") == "line"

    def document(self, row: dict[str, Any], raw: bytes | None, document: dict[str, Any] | None) -> bool:
        """Check the document of a kept row; return whether it was also rebuilt from `raw`."""
        where = f"{row['file']}:{row['number']}"
        if document is None:
            raise Wrong(f"{where} is kept but there is no document of it")
        for name in ("file", "start", "end", "number"):
            if document[name] != row[name]:
                raise Wrong(f"{where}: the document in its place has another {name}")
        content = document["text"] if "text" in document else document["messages"]
        if isinstance(content, str):
            text = content
        else:
            text = CANONICAL([{"role": turn["role"], "content": turn["content"]} for turn in content])
        if hashlib.sha256(text.encode("utf-8")).digest()[:16] != document["doc_id"]:
            raise Wrong(f"{where}: the document's text is not the one that its doc_id names")
        parts = [content] if isinstance(content, str) else [message["content"] for message in content]
        if raw is None:
            self.left["of which the raw bytes are not read here"] += 1
            return False
        changed = {part.rsplit(" ", 1)[0] for part in (row["changes"] or "").split(", ") if part}
        if beyond := changed - RULES_HERE - {"byte_order_mark"}:
            self.left[f"changed by {', '.join(sorted(beyond))}"] += 1
            return False
        if self.source.params.get("fill"):
            self.left["with `fill`"] += 1
            return False
        found = self.content(raw, row["start"] in (0, None))
        if found is None:
            self.left[f"of format {self.format}, record {self.record}"] += 1
            return False
        if [self.apply(part, changed) for part in found] != parts:
            raise Wrong(f"{where}: the document is not what the raw bytes say")
        return True

    def content(self, raw: bytes, is_first: bool) -> list[str] | None:
        """Return the texts that the bytes of a record hold, None where this program does not know."""
        if self.format in ("parquet", "arrow"):
            return self.texts(json.loads(raw.decode("utf-8", "surrogatepass")))
        if self.codec == "utf-16" or self.format == "html":
            return None
        text = raw.decode(self.codec)
        text = text.removeprefix("\ufeff") if is_first else text
        if self.format == "text":
            return [text.rstrip("\r\n") if self.by_line else text]
        if self.format in ("csv", "tsv"):
            fields = list(self.reader(text))[-1]
            return self.texts(dict(zip(self.header, fields, strict=True))) if fields else [""]
        if not text.strip():
            return [""]
        begin = text.index("{")
        return self.texts(json.JSONDecoder().raw_decode(text, begin)[0])

    def begin(self, raw: bytes) -> None:
        """Take the header of a csv file from its first record, which may be dropped."""
        if self.format in ("csv", "tsv") and self.codec != "utf-16":
            with contextlib.suppress(csv.Error):
                self.header = next(self.reader(raw.decode(self.codec, "replace").removeprefix("\ufeff")), [])

    def reader(self, text: str) -> Iterator[list[str]]:
        quote = self.source.params.get("quotechar", '"')
        return csv.reader(
            io.StringIO(text, newline=""),
            delimiter=self.source.params.get("delimiter") or ("\t" if self.format == "tsv" else ","),
            quotechar=quote,
            quoting=csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE,
            strict=True,
        )

    def texts(self, row: dict[str, Any]) -> list[str] | None:
        """Return the contents of a row in their order."""

        def field(name: str) -> Any:
            return row.get(self.columns.get(name, name))

        if self.record == "text":
            return [field("text")]
        if self.record != "alpaca" and field("tools") not in (None, "", "[]", []):
            return None
        system = [field("system")] if str(field("system") or "").strip() else []
        if self.record in ("alpaca", "prompt_completion") and field("history"):
            return None
        if self.record == "alpaca":
            return [*system, f"{field('instruction')}\n{field('input') or ''}".strip(), field("output")]
        if self.record == "prompt_completion":
            said = [field("prompt"), field("completion")]
            return [*system, *said] if all(isinstance(text, str) for text in said) else None
        key = "content" if self.record == "messages" else "value"
        turns = field("messages" if self.record == "messages" else "conversations")
        known = {"role", "from", key, "weight", "loss"}
        if not isinstance(turns, list) or any(turn[name] is not None for turn in turns for name in turn.keys() - known):
            return None
        said = [(turn.get("role", turn.get("from")) in ("system", "developer"), turn[key]) for turn in turns]
        if not all(isinstance(text, str) for _, text in said):
            return None
        said = [(is_system, text) for is_system, text in said if text.strip() or not is_system]
        return None if system and said and said[0][0] else [*system, *(text for _, text in said)]

    def apply(self, text: str, changed: set[str]) -> str:
        """Return the text after the rules that changed the record."""
        for rule in self.rules:
            name = rule["rule"]
            if name not in changed:
                continue
            if name == "newlines":
                text = text.replace("\r\n", "\n").replace("\r", "\n")
            elif name == "whitespace":
                most = "\n" * (int(rule.get("max_blank_lines", 2)) + 1)
                text = re.sub(most + "\n+", most, "\n".join(line.rstrip(SPACES) for line in text.split("\n")))
                text = text.strip() if rule.get("strip") else text
            else:
                text = unicodedata.normalize(name.upper(), text)
        return text


# --- documents -> decisions


def exclusions(project: Project, report: Report) -> tuple[bytes, set[str]] | None:
    """Return the key and the keyed hashes of the excluded documents, None without any, or without the key."""
    lines = (project.root / EXCLUSIONS).read_text(encoding="utf-8-sig").splitlines()
    texts = [text for line in lines if (text := line.split("#", 1)[0].strip().lower())]
    marks = {text for text in texts if not text.startswith("key ")}
    if not marks:
        return None
    if not (project.root / EXCLUSIONS_KEY).is_file():
        report.stops("documents -> decisions", EXCLUSIONS, f"{EXCLUSIONS_KEY} is not here, so no entry can be compared")
        return None
    key = bytes.fromhex((project.root / EXCLUSIONS_KEY).read_text(encoding="ascii").strip())
    if f"key {hmac.digest(key, b'which key is this', 'sha256').hex()[:16]}" not in texts:
        raise Wrong(f"{EXCLUSIONS_KEY} is another key than the one that {EXCLUSIONS} names")
    return key, marks


def check_decisions(project: Project, phase: str, sources: list[Source], report: Report) -> None:
    """Each document has one decision; nothing is kept twice, on both sides, or although it is excluded.

    A cluster of near duplicates goes out as a whole, or stands on the side that the least of its ids draws.
    """
    params = project.group("dedup", phase)
    fraction, seed = float(params.get("eval_fraction", 0.05)), int(params.get("seed", 0))
    excluded = exclusions(project, report)
    kept: dict[bytes, str] = {}
    twins: list[tuple[str, dict[str, Any]]] = []
    rows_of: dict[str, int] = {}
    clusters: dict[str, tuple[set[str], bytes]] = {}  # what became of its documents, the least id
    outside = 0

    def is_held_out(doc_id: bytes) -> bool:
        key = hashlib.sha256(seed.to_bytes(8, "little") + doc_id).digest()[:7]
        return (int.from_bytes(key, "little") >> 3) / 2**53 < fraction

    for source in sources:
        folder, counts = source.folder("dedup"), Counter[str]()
        documents = _rows(project.batches(source.folder("documents"), ["doc_id"]))
        ledger = _rows(project.batches(source.folder("ledger"), ["raw_id", "rule"]))
        records = (row["raw_id"] for row in ledger if row["rule"] is None)
        for number, row in enumerate(_rows(project.batches(folder))):
            document, raw_id = next(documents, None), next(records, b"") if excluded else b""
            where = f"{source.name}/{number}"
            if document is None or document["doc_id"] != row["doc_id"]:
                raise Wrong(f"{where} decides about another document than the one that stands there")
            counts[row["split"]] += 1
            if (row["split"] == "dropped") != (row["rule"] is not None) or row["split"] not in (
                "train",
                "eval",
                "dropped",
            ):
                raise Wrong(f"{where} is {row['split']} with the rule {row['rule']}")
            if cluster := row["cluster"]:
                fates, least = clusters.get(cluster, (set(), row["doc_id"]))
                fates.add(row["rule"] if row["rule"] == "excluded" else row["split"])
                clusters[cluster] = fates, min(least, row["doc_id"])
            if row["split"] == "dropped":
                if row["twin"] is not None:
                    twins.append((where, row))
                continue
            if excluded:
                marks = {hmac.digest(excluded[0], one, "sha256").hex() for one in (row["doc_id"], raw_id)}
                if marks & excluded[1]:
                    raise Wrong(f"{where} is kept although {EXCLUSIONS} names it")
            if row["doc_id"] in kept:
                raise Wrong(f"{where} is kept although {kept[row['doc_id']]} has the same text")
            kept[row["doc_id"]] = where
            outside += not cluster and is_held_out(row["doc_id"]) != (row["split"] == "eval")
        if next(documents, None):
            raise Wrong(f"{source.name} has more documents than decisions")
        rows_of[source.name] = counts.total()
        manifest = project.manifest(folder)["counts"]
        if manifest != {"rows": counts.total(), **{name: counts[name] for name in ("train", "eval", "dropped")}}:
            raise Wrong(f"the manifest of {folder} counts {manifest}, its rows say {dict(counts)}")
    by_place = {place: identity for identity, place in kept.items()}
    for where, row in twins:
        if row["twin"] not in by_place:
            raise Wrong(f"{where} was dropped for {row['twin']}, which is not kept")
        if row["rule"] == "exact_duplicate" and by_place[row["twin"]] != row["doc_id"]:
            raise Wrong(f"{where} was dropped as equal to {row['twin']}, which has another text")
    for cluster, (fates, least) in clusters.items():
        if len(fates - {"dropped"}) > 1:
            raise Wrong(f"the near duplicates of {cluster} are {' and '.join(sorted(fates - {'dropped'}))}")
        outside += bool(fates & {"train", "eval"}) and is_held_out(least) != ("eval" in fates)
    if outside > 1:  # one may stand in for an empty split
        raise Wrong(f"{outside} documents are on another side of the split than seed and eval_fraction say")
    folder = f"data/dedup/{phase}"
    report.ok("documents -> decisions", folder, f"{sum(rows_of.values()):,} documents, {len(kept):,} kept, each once")
    if params.get("near_duplicates") is not None:
        report.stops("documents -> decisions", folder, "near duplicates are not searched")


# --- documents -> marked -> tokens


def byte_alphabet() -> dict[str, int]:
    """Return the signs in which a byte-level tokenizer writes the 256 bytes: printable ones as themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}


class Tokenizer:
    """The pieces of a byte-level tokenizer, as bytes; special ones behind a byte that UTF-8 does not know."""

    def __init__(self, folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        self.special = {t["content"]: t["id"] for t in content["added_tokens"] if t["special"]}
        roles = {role: settings.get(role) for role in ("bos_token", "eos_token", "pad_token")}
        self.roles = {r: t["content"] if isinstance(t, dict) else t for r, t in roles.items() if t}
        self.pieces: pa.Array | None = None
        kinds = json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
        if "ByteLevel" not in kinds or content.get("normalizer") or content["model"].get("type") != "BPE":
            return
        alphabet = byte_alphabet()
        pieces: dict[int, bytes] = {}
        for text, number in content["model"]["vocab"].items():
            pieces[number] = bytes(alphabet[s] for s in text) if all(s in alphabet for s in text) else text.encode()
        for token in content["added_tokens"]:
            pieces[token["id"]] = b"\xff" * token["special"] + token["content"].encode()
        self.pieces = pa.array([pieces.get(number, b"\xff?") for number in range(max(pieces) + 1)], pa.large_binary())

    def id(self, role: str) -> int:
        """Return the id of eos_token or pad_token; a tokenizer without the latter pads with the former."""
        return int(self.special[self.roles.get(role) or self.roles["eos_token"]])


def check_marked(project: Project, source: Source, tokenizer: Tokenizer, report: Report) -> None:
    """The segments hold the kept documents, in order and unchanged, and the ids decode to the segments."""
    marked, tokens = source.folder("marked"), source.folder("tokens")
    kept = _kept(project, source)
    ids = _slices(project.batches(tokens))
    counts: Counter[str] = Counter()
    for batch in project.batches(marked):
        for begin in range(0, batch.num_rows, 256):
            part = batch.slice(begin, 256)
            _same_text(source, part, [next(kept, None) for _ in range(part.num_rows)], tokenizer)
            counts["rows"] += part.num_rows
            segments = part["segments"].flatten()
            counts["characters"] += pc.sum(pc.utf8_length(segments.field("text"))).as_py() or 0
            counts["segments_not_learned"] += len(segments) - (pc.sum(segments.field("learn")).as_py() or 0)
            encoded = ids(part.num_rows)
            for name in ("doc_id", "split"):
                if not part[name].equals(encoded[name]):
                    raise Wrong(f"{tokens} holds other documents than {marked}, near row {counts['rows']}")
            _same_tokens(source, part["segments"], encoded, tokenizer, counts["rows"] - part.num_rows)
            lengths = pc.list_value_length(encoded["input_ids"])
            for split in ("train", "eval"):
                chosen = lengths.filter(pc.equal(encoded["split"], split))
                counts[split] += pc.sum(chosen).as_py() or 0
            learned = encoded["learn"].flatten() if "learn" in encoded.schema.names else None
            counts["learned"] += (pc.sum(lengths) if learned is None else pc.sum(learned)).as_py() or 0
    if next(kept, None):
        raise Wrong(f"{marked} lacks documents that {source.folder('dedup')} keeps")
    if ids(1).num_rows:
        raise Wrong(f"{tokens} holds more documents than {marked}")
    in_marked, in_tokens = ("rows", "characters", "segments_not_learned"), ("rows", "train", "eval", "learned")
    for folder, names in ((marked, in_marked), (tokens, in_tokens)):
        manifest = project.manifest(folder)["counts"]
        if manifest != {name: counts[name] for name in names}:
            raise Wrong(f"the manifest of {folder} counts {manifest}, its rows say {dict(counts)}")
    report.ok("documents -> marked", marked, f"{counts['rows']:,} documents, unchanged between their special tokens")
    if source.about["record"] != "text":
        report.stops("documents -> marked", marked, "the chat template's own words are not rendered anew")
    total = f"{counts['train'] + counts['eval']:,} tokens"
    if tokenizer.pieces is None:
        report.stops("marked -> tokens", tokens, f"{total}: only byte-level tokenizers are decoded here")
    else:
        report.ok("marked -> tokens", tokens, f"{total} decode to the text of their documents")


def _kept(project: Project, source: Source) -> Iterator[dict[str, Any]]:
    decisions = _rows(project.batches(source.folder("dedup"), ["split"]))
    for document in _rows(project.batches(source.folder("documents"))):
        split = next(decisions)["split"]
        if split != "dropped":
            yield {**document, "split": split}


def _slices(batches: Iterator[pa.RecordBatch]) -> Callable[[int], pa.RecordBatch]:
    """Return a function that gives the next n rows, fewer at the end, as one batch."""
    waiting: list[pa.RecordBatch] = []

    def take(rows: int) -> pa.RecordBatch:
        while sum(batch.num_rows for batch in waiting) < rows and (batch := next(batches, None)) is not None:
            waiting.append(batch)
        if not waiting:
            return pa.RecordBatch.from_arrays([], names=[])
        whole = pa.concat_batches(waiting) if len(waiting) > 1 else waiting[0]
        waiting[:] = [whole.slice(rows)] if whole.num_rows > rows else []
        return whole.slice(0, rows)

    return take


def _same_text(
    source: Source, part: pa.RecordBatch, documents: list[dict[str, Any] | None], tokenizer: Tokenizer
) -> None:
    for row, document in zip(part.to_pylist(), documents, strict=True):
        if document is None or document["doc_id"] != row["doc_id"] or document["split"] != row["split"]:
            raise Wrong(f"{source.folder('marked')} holds other documents than {source.folder('dedup')} keeps")
        where = f"{source.folder('marked')}: document {row['doc_id'].hex()}"
        for segment in row["segments"]:
            if segment["special"] and segment["text"] not in tokenizer.special:
                raise Wrong(f"{where} has the special segment {segment['text']!r}, which is no special token")
        plain = [segment for segment in row["segments"] if not segment["special"]]
        if "text" in document:
            if row["segments"][-1]["text"] != tokenizer.roles.get("eos_token"):
                raise Wrong(f"{where} does not end with the end token")
            if [segment["text"] for segment in plain] != [document["text"]]:
                raise Wrong(f"{where} has another text than in {source.folder('documents')}")
            continue
        for segment, following in zip(row["segments"], [*row["segments"][1:], None], strict=True):
            if segment["learn"] and not segment["special"] and not (following and following["learn"]):
                raise Wrong(f"{where} has an answer without a token that ends it")
        messages = document["messages"]
        answers = [message["role"] == "assistant" and message.get("learn") is not False for message in messages]
        if (missing := _missing(plain, [message["content"] for message in messages])) is not None:
            raise Wrong(f"{where} lacks the words of {messages[missing]['role']}")
        for learn in (True, False):
            # A template may ask for an answer with <think>, which then is not learned.
            own = [message["content"] for message, answer in zip(messages, answers, strict=True) if answer == learn]
            own = [content.removeprefix("<think>\n") for content in own] if learn else own
            if _missing([segment for segment in plain if segment["learn"] == learn], own) is not None:
                raise Wrong(f"{where} learns other words than those of the assistant")


def _missing(segments: list[dict[str, Any]], words: list[str]) -> int | None:
    """Return the place of the first of `words` that does not stand in the segments behind the one before it."""
    text, at = "".join(segment["text"] for segment in segments), 0
    for place, word in enumerate(words):
        if (found := text.find(word, at)) < 0:
            return place
        at = found + len(word)
    return None


def _same_tokens(
    source: Source, segments: pa.ListArray, encoded: pa.RecordBatch, tokenizer: Tokenizer, row: int
) -> None:
    """Raise unless each document's ids decode to its segments, and the learned ones to the learned segments."""
    if tokenizer.pieces is None or not encoded.num_rows:
        return
    flat, ids = segments.flatten(), encoded["input_ids"].flatten()
    text = flat.field("text").cast(pa.large_binary())
    mark = pa.array([b"", b"\xff"], pa.large_binary()).take(flat.field("special").cast(pa.int8()))
    said = pc.binary_join_element_wise(mark, text, pa.scalar(b"", pa.large_binary()))
    learned = (
        [None, flat.field("learn")],
        [None, encoded["learn"].flatten() if "learn" in encoded.schema.names else None],
    )
    offsets = [segments.offsets.to_pylist(), encoded["input_ids"].offsets.to_pylist()]
    offsets = [[at - side[0] for at in side] for side in offsets]
    pieces = tokenizer.pieces.take(ids.cast(pa.int64()))
    for said_mask, id_mask in zip(*learned, strict=True):
        sides = []
        for values, mask, ends in ((said, said_mask, offsets[0]), (pieces, id_mask, offsets[1])):
            if mask is not None:
                empty = pa.scalar(b"", pa.large_binary())
                values = pc.if_else(mask, values, empty)
            lists = pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), values)
            sides.append(pc.binary_join(lists, pa.scalar(b"", pa.large_binary())))
        if not sides[0].equals(sides[1]):
            bad = pc.index(pc.equal(*sides), False).as_py()
            identity = encoded["doc_id"][bad].as_py().hex()
            raise Wrong(
                f"{source.folder('tokens')} row {row + bad}, document {identity}: its ids decode to another text"
            )


# --- tokens -> blocks


class Document(NamedTuple):
    """A document's turn in the stream of a split."""

    doc_id: bytes
    source: str
    turn: int
    ids: pa.Array
    learn: pa.Array


def stream(project: Project, sources: list[Source], split: str, weights: dict[str, float]) -> Iterator[list[Document]]:
    """Yield the documents of a split in the order in which they are grouped, some at a time."""
    turn = 0
    while shown := [source for source in sources if weights.get(source.name, 1.0) > turn]:
        for source in shown:
            weight = weights.get(source.name, 1.0)
            for batch in project.batches(source.folder("tokens")):
                rows = []
                for row, (name, identity) in enumerate(zip(batch["split"], batch["doc_id"], strict=True)):
                    point = int.from_bytes(identity.as_py()[8:], "little") / 2.0**64
                    if name.as_py() == split and int(weight) + (point < weight % 1) > turn:
                        rows.append(row)
                ids, offsets = batch["input_ids"].flatten(), batch["input_ids"].offsets.to_pylist()
                learn = batch["learn"].flatten() if "learn" in batch.schema.names else None
                first = offsets[0]
                found = []
                for row in rows:
                    begin, size = offsets[row] - first, offsets[row + 1] - offsets[row]
                    marks = learn.slice(begin, size) if learn is not None else pa.array([True] * size, pa.bool_())
                    doc_id = batch["doc_id"][row].as_py()
                    found.append(Document(doc_id, source.name, turn, ids.slice(begin, size), marks))
                yield found
        turn += 1


def check_blocks(project: Project, phase: str, sources: list[Source], tokenizer: Tokenizer, report: Report) -> None:
    """Every block holds the tokens that the documents give, in the order and layout that the parameters say."""
    folder = f"data/blocks/{phase}"
    grouping = json.loads((project.root / folder / "grouping.json").read_text(encoding="utf-8"))
    params = project.group("group_blocks", phase)
    for name, value in params.items():
        if grouping.get(name) != value:
            raise Wrong(f"{folder}/grouping.json says {name} {grouping.get(name)}, dvc.lock says {value}")
    pad, eos = tokenizer.id("pad_token"), tokenizer.id("eos_token")
    is_listed = (project.root / folder / "left_out").is_dir()
    listed = _rows(project.batches(f"{folder}/left_out")) if is_listed else iter(())

    def leave(**row: Any) -> None:
        if (stored := next(listed, None)) != row:
            told = "nothing" if stored is None else f"{stored['left_out']} tokens of {stored['doc_id'].hex()}"
            raise Wrong(
                f"{folder}/left_out names {told} where `{row['rule']}` leaves out {row['left_out']} tokens of document "
                f"{row['doc_id'].hex()} ({split})"
            )

    for split in ("train", "eval"):
        weights = grouping["weights"] if split == "train" else {}
        given = {
            source.name: {"documents": 0, "tokens": 0, "weight": weights.get(source.name, 1)} for source in sources
        }
        documents = _counted(stream(project, sources, split, weights), given)
        if grouping["mode"] == "concat":
            made: Iterator[Any] = _concat(documents, grouping, pad)
        else:
            made = _packed(_shortened(documents, grouping, eos, functools.partial(leave, split=split)), grouping, pad)
        counts = _compare(project, f"{folder}/{split}", made, grouping)
        manifest = project.manifest(f"{folder}/{split}")["counts"]
        for name, one in given.items():
            if grouping[split].get(name) != one:
                raise Wrong(f"{folder}/grouping.json says of {name} ({split}) {grouping[split].get(name)}, not {one}")
        shown = sum(one["tokens"] for one in grouping[split].values())
        if manifest["tokens"] != counts["tokens"] or manifest["tokens"] + manifest["dropped_tokens"] != shown:
            raise Wrong(f"{folder}/{split}: its counts of tokens do not add up to those of its documents")
        text = f"{counts['blocks']:,} blocks rebuilt, {counts['tokens']:,} tokens"
        report.ok("tokens -> blocks", f"{folder}/{split}", text)
    if more := next(listed, None):
        raise Wrong(
            f"{folder}/left_out names document {more['doc_id'].hex()} ({more['split']}), which is in the blocks"
        )


def _counted(documents: Iterator[list[Document]], counts: dict[str, dict[str, float]]) -> Iterator[list[Document]]:
    """Yield the documents, and add them and their tokens to the counts of their sources."""
    for some in documents:
        for one in some:
            counts[one.source]["documents"] += 1
            counts[one.source]["tokens"] += len(one.ids)
        yield some


def _shortened(
    documents: Iterator[list[Document]], grouping: dict[str, Any], eos: int, leave: Callable[..., None]
) -> Iterator[list[Document]]:
    """Yield what `long_documents` leaves of documents; `leave` is told what it leaves out of each."""
    size, rules = grouping["block_size"], grouping["long_documents"]
    for some in documents:
        found = []
        for one in some:
            rule = rules if isinstance(rules, str) else rules.get(one.source, "split")
            if len(one.ids) > size and rule != "split":
                if rule == "truncate" and not pc.any(one.learn.slice(0, size - 1)).as_py():
                    rule = "no_answer"
                stays = size if rule == "truncate" else 0
                tokens = len(one.ids)
                leave(doc_id=one.doc_id, source=one.source, rule=rule, tokens=tokens, left_out=tokens - stays)
                if not stays:
                    continue
                cut = pa.concat_arrays([one.ids.slice(0, size - 1), pa.array([eos], one.ids.type)])
                one = one._replace(ids=cut, learn=one.learn.slice(0, size))
            found.append(one)
        yield found


def _concat(
    documents: Iterator[list[Document]], grouping: dict[str, Any], pad: int
) -> Iterator[tuple[pa.Array, pa.Array, None, int]]:
    """Yield blocks of one stream: ids, marks, no starts, tokens that are no padding."""
    size, waiting, length = grouping["block_size"], [], 0
    for some in documents:
        waiting += [(one.ids, one.learn) for one in some]
        length += sum(len(one.ids) for one in some)
        if length >= size:
            ids, learn = (pa.concat_arrays(list(side)) for side in zip(*waiting, strict=True))
            whole = length - length % size
            for at in range(0, whole, size):
                yield ids.slice(at, size), learn.slice(at, size), None, size
            waiting, length = [(ids.slice(whole), learn.slice(whole))], length - whole
    if length and grouping["last_block"] == "pad":
        ids, learn = (pa.concat_arrays(list(side)) for side in zip(*waiting, strict=True))
        yield *_filled(ids, learn, size, pad), None, length


def _filled(ids: pa.Array, learn: pa.Array, size: int, pad: int) -> tuple[pa.Array, pa.Array]:
    left = size - len(ids)
    return (
        pa.concat_arrays([ids, pa.array([pad] * left, ids.type)]),
        pa.concat_arrays([learn, pa.array([False] * left, pa.bool_())]),
    )


def _packed(
    documents: Iterator[list[Document]], grouping: dict[str, Any], pad: int
) -> Iterator[tuple[pa.Array, pa.Array, list[int], int]]:
    """Yield blocks of whole documents: ids, marks, where pieces begin and padding does, tokens."""
    size = grouping["block_size"]
    most = max(2**21, 256 * size)

    def windows() -> Iterator[list[Document]]:
        window: list[Document] = []
        length = 0
        for some in documents:
            for one in some:
                if window and window[0].turn != one.turn:
                    yield window
                    window, length = [], 0
                window.append(one)
                length += len(one.ids)
                if length >= most:
                    yield window
                    window, length = [], 0
        if window:
            yield window

    for window in windows():
        pieces = [
            (n, at, min(size, len(one.ids) - at)) for n, one in enumerate(window) for at in range(0, len(one.ids), size)
        ]
        for block in _layout([length for *_, length in pieces], size, grouping["mode"]):
            chosen = [(window[n], at, length) for n, at, length in (pieces[place] for place in block)]
            ids = pa.concat_arrays([one.ids.slice(at, length) for one, at, length in chosen])
            learn = pa.concat_arrays([one.learn.slice(at, length) for one, at, length in chosen])
            starts = [0]
            for *_, length in chosen:
                starts.append(starts[-1] + length)
            yield *_filled(ids, learn, size, pad), starts, len(ids)


def _layout(lengths: list[int], size: int, mode: str) -> list[list[int]]:
    """Return the pieces of each block: best-fit decreasing, blocks in the order of their first piece."""
    if mode == "line":
        return [[piece] for piece in range(len(lengths))]
    spaces: list[list[int]] = [[] for _ in range(size + 1)]
    blocks: list[list[int]] = []
    bits = 0
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        length = lengths[piece]
        if fitting := bits >> length:
            space = length + (fitting & -fitting).bit_length() - 1
            block = spaces[space].pop()
            if not spaces[space]:
                bits ^= 1 << space
        else:
            space, block = size, len(blocks)
            blocks.append([])
        blocks[block].append(piece)
        if space > length:
            spaces[space - length].append(block)
            bits |= 1 << (space - length)
    return sorted(sorted(block) for block in blocks)


def _compare(project: Project, folder: str, made: Iterator[Any], grouping: dict[str, Any]) -> Counter[str]:
    counts: Counter[str] = Counter()
    size = grouping["block_size"]
    for batch in project.batches(folder):
        ids = batch["input_ids"].flatten()
        learn = batch["learn"].flatten() if "learn" in batch.schema.names else None
        starts = batch["starts"].to_pylist() if "starts" in batch.schema.names else None
        for row in range(batch.num_rows):
            expected = next(made, None)
            where = f"block {counts['blocks']}"
            if expected is None:
                raise Wrong(f"{folder}: there is no text for {where} and those after it")
            own_ids, own_learn, own_starts, tokens = expected
            if not ids.slice(row * size, size).equals(own_ids):
                raise Wrong(f"{folder}: {where} holds other tokens than the documents give")
            if learn is not None and not learn.slice(row * size, size).equals(own_learn):
                raise Wrong(f"{folder}: {where} has other marks of what is learned than the documents give")
            if starts is not None and starts[row] != own_starts:
                raise Wrong(f"{folder}: {where} says other beginnings of documents than there are")
            counts["blocks"] += 1
            counts["tokens"] += tokens
    if next(made, None) is not None:
        raise Wrong(f"{folder}: blocks are missing at the end")
    return counts


# --- blocks -> receipts -> model


def mix(value: int) -> int:
    """Return 64 well-mixed bits: the finaliser of SplitMix64."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def block_at(position: int, blocks: int, seed: int) -> int:
    """Return which block the training shows at a place of the endless stream of epochs: a Feistel network."""
    half = max(1, ((blocks - 1).bit_length() + 1) // 2)
    epoch, place = divmod(position, blocks)
    base = mix(mix(seed) ^ epoch)
    while True:
        left, right = place >> half, place & ((1 << half) - 1)
        for number in range(8):
            left, right = right, left ^ (mix(mix(base + number) ^ right) & ((1 << half) - 1))
        place = left << half | right
        if place < blocks:
            return place


def check_receipts(project: Project, phase: str, report: Report) -> None:
    """Each receipt of the training is that of the blocks that the order shows at its step."""
    path, folder = f"models/{phase}/trained/receipts.bin", f"data/blocks/{phase}/train"
    params = project.group("train_model", phase)
    receipts = (project.root / path).read_bytes()
    record = json.loads((project.root / f"{RECORDS}/train_model@{phase}.json").read_text(encoding="utf-8"))
    steps, size = len(receipts) // 16, int(params.get("global_batch_size", 16))
    if len(receipts) % 16 or steps != record["counts"][0]["steps"]:
        raise Wrong(f"{path} has {len(receipts)} bytes, 16 for each of {record['counts'][0]['steps']} steps are due")
    about = json.loads((project.root / f"models/{phase}/trained/training.json").read_text(encoding="utf-8"))
    if (about["steps"], about["blocks"]) != (steps, steps * size):
        raise Wrong(f"models/{phase}/trained/training.json tells of other steps or blocks than {path}")
    masking = Masking(project.root / f"models/tokenizers/{phase}", params) if params.get("objective") == "mlm" else None
    tokens = project.manifest(folder)["counts"]["tokens"]
    batches = list(project.batches(folder))  # mapped, not held
    ends = list(accumulate(batch.num_rows for batch in batches))
    known: dict[int, bytes] = {}
    for step in range(steps):
        shown = [block_at(step * size + place, ends[-1], int(params.get("seed", 0))) for place in range(size)]
        fed = b""
        for position, block in enumerate(shown, start=step * size):
            if masking or block not in known:
                at = bisect_right(ends, block)
                row = batches[at].slice(block - (ends[at] - batches[at].num_rows), 1)
                seen = _seen(row, block, tokens, masking, position)
                known[block] = hashlib.sha256(block.to_bytes(8, "little") + seen).digest()[:16]
            fed += known[block]
        if hashlib.sha256((step + 1).to_bytes(8, "little") + fed).digest()[:16] != receipts[16 * step : 16 * step + 16]:
            raise Wrong(
                f"{path}: the receipt of step {step + 1} is not that of blocks {', '.join(map(str, shown[:4]))} ..."
            )
    seen_share = min(steps * size / ends[-1], 1.0)
    report.ok(
        "blocks -> receipts", path, f"{steps:,} steps of {size} blocks ({seen_share:.0%} of the blocks were shown)"
    )


def _seen(row: pa.RecordBatch, block: int, tokens: int, masking: Masking | None, position: int) -> bytes:
    """Return what a model is shown of a block: ids and labels as int32; -100 where nothing is learned."""
    ids = row["input_ids"].flatten().cast(pa.int32())
    filled = tokens - block * len(ids)
    if "starts" in row.schema.names:
        filled = row["starts"][0].values[-1].as_py()
    learned = pc.less(pa.array(range(len(ids))), filled)
    if "learn" in row.schema.names:
        learned = pc.and_(learned, row["learn"].flatten())
    inputs = ids
    if masking:
        inputs, learned = masking(ids, learned, position)
    labels = pc.if_else(learned, ids, pa.scalar(-100, pa.int32()))
    return _int32(inputs) + _int32(labels)


def _int32(values: pa.Array) -> bytes:
    return values.buffers()[1].slice(4 * values.offset, 4 * len(values)).to_pybytes()


# --- What a masked model has to guess: the arithmetic of the training, over whole blocks


def mix_all(values: pa.Array) -> pa.Array:
    """Return `mix` of each value of a uint64 array."""
    one = pa.scalar(0x9E3779B97F4A7C15, pa.uint64())
    values = pc.add(values, one)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = pc.bit_wise_xor(values, pc.shift_right(values, pa.scalar(shift, pa.uint64())))
        values = pc.multiply(values, pa.scalar(factor, pa.uint64()))
    return pc.bit_wise_xor(values, pc.shift_right(values, pa.scalar(31, pa.uint64())))


BLANK, SPACE, LETTER, DIGIT, OTHER, HAN, PART, SPECIAL = range(8)  # of a character; PART: the rest of a cut one
HAN_RANGES = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))


class Masking:
    """Which tokens of a block a masked model had to guess, and what it saw in their place."""

    def __init__(self, tokenizer: Path, params: dict[str, Any]) -> None:
        self.probability, self.seed = float(params.get("mlm_probability", 0.15)), int(params.get("seed", 0))
        text = (tokenizer / "tokenizer.json").read_text(encoding="utf-8")
        content = json.loads(text)
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        ids = {**vocabulary, **{token["content"]: token["id"] for token in content["added_tokens"]}}
        special = {token["id"] for token in content["added_tokens"] if token["special"]}
        token = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))["mask_token"]
        self.mask = pa.scalar(ids[token["content"] if isinstance(token, dict) else token], pa.int32())
        self.ordinary = pa.array([number for number in range(len(ids)) if number not in special], pa.int32())
        self.special = pa.array(sorted(special), pa.int32())
        self.kinds: list[pa.Array] = []
        if params.get("whole_word_mask"):
            alphabet = byte_alphabet() if "ByteLevel" in text else {}
            ends = {number: _ends(piece, alphabet) for piece, number in ids.items() if number not in special}
            both = [ends.get(number, (SPECIAL, SPECIAL)) for number in range(len(ids))]
            self.kinds = [pa.array(side, pa.uint8()) for side in zip(*both, strict=True)]

    def __call__(self, ids: pa.Array, learned: pa.Array, position: int) -> tuple[pa.Array, pa.Array]:
        eligible = pc.and_(learned, pc.invert(pc.is_in(ids, self.special)))
        draw = self._uniform(position, len(ids), 0)
        if self.kinds:
            places = pa.array(range(len(ids)), pa.int64())
            draw = draw.take(pc.cumulative_max(pc.if_else(self._starts(ids), places, 0)))
        chosen = pc.and_(eligible, pc.less(draw, self.probability))
        if not pc.any(chosen).as_py():
            chosen = pc.and_(eligible, pc.equal(draw, pc.min(pc.if_else(eligible, draw, 2.0))))
        become = self._uniform(position, len(ids), 1)
        other = pc.multiply(self._uniform(position, len(ids), 2), float(len(self.ordinary))).cast(
            pa.int64(), safe=False
        )
        random = pc.and_(chosen, pc.and_(pc.greater_equal(become, 0.8), pc.less(become, 0.9)))
        inputs = pc.if_else(pc.and_(chosen, pc.less(become, 0.8)), self.mask, ids)
        return pc.if_else(random, self.ordinary.take(other), inputs), chosen

    def _uniform(self, position: int, length: int, purpose: int) -> pa.Array:
        """Return numbers in [0, 1) of seed, position in the stream of blocks, place and purpose."""
        places = mix_all(pa.array([4 * place + purpose for place in range(length)], pa.uint64()))
        row = pa.scalar(mix(mix(self.seed) ^ position), pa.uint64())
        draws = pc.shift_right(mix_all(pc.bit_wise_xor(places, row)), pa.scalar(11, pa.uint64()))
        return pc.multiply(draws.cast(pa.float64()), 2.0**-53)

    def _starts(self, ids: pa.Array) -> pa.Array:
        """Return which tokens begin a word."""
        first, last = (kind.take(ids) for kind in self.kinds)
        before = pa.concat_arrays([pa.array([SPECIAL], pa.uint8()), last.slice(0, len(last) - 1)])
        always = pc.is_in(first, pa.array([BLANK, SPACE, HAN, SPECIAL], pa.uint8()))
        border = pc.and_(pc.not_equal(first, before), pc.not_equal(before, BLANK))
        return pc.and_(pc.not_equal(first, PART), pc.or_(always, border))


def _ends(piece: str, alphabet: dict[str, int]) -> tuple[int, int]:
    """Return the kinds of the first and the last character of a token."""
    if alphabet and all(sign in alphabet for sign in piece):
        raw = bytes(alphabet[sign] for sign in piece)
        text = raw.decode("utf-8", "ignore")
        first = PART if 0x80 <= raw[0] < 0xC0 else _kind(text[0]) if text else _lead(raw[0])
        return first, _kind(text[-1]) if text else PART if first == PART else _lead(raw[0])
    if len(piece) == 6 and piece.startswith("<0x"):
        byte = int(piece[3:5], 16)
        return (PART, PART) if 0x80 <= byte < 0xC0 else (_lead(byte), _lead(byte))
    text = piece.removeprefix("##").replace("\u2581", " ")
    return PART if piece.startswith("##") else _kind(text[:1]), _kind(text[-1:])


def _lead(byte: int) -> int:
    return _kind(chr(byte)) if byte < 0x80 else HAN if byte >= 0xE0 else LETTER


def _kind(sign: str) -> int:
    if sign == " ":
        return BLANK
    if not sign or sign.isspace():
        return SPACE
    if any(begin <= ord(sign) <= end for begin, end in HAN_RANGES):
        return HAN
    return {"L": LETTER, "M": LETTER, "N": DIGIT}.get(unicodedata.category(sign)[0], OTHER)


def check_model(project: Project, phase: str, report: Report) -> None:
    """The model carries the tokenizer of its phase; its base is the one that was named; merged follows from trained."""
    trained, merged = f"models/{phase}/trained", f"models/{phase}/merged"
    sha256 = project.digests.sha256
    for file in project.digests.files(f"models/tokenizers/{phase}"):
        name = file.rsplit("/", 1)[1]
        for folder in (trained, merged):
            here = f"{folder}/{name}"
            if not (project.root / here).is_file() or sha256(here) != sha256(file):
                raise Wrong(f"{here} is not the {name} of models/tokenizers/{phase}")
    about = json.loads((project.root / trained / "training.json").read_text(encoding="utf-8"))
    stage = project.stages[f"train_model@{phase}"]
    if about["base"] not in stage.deps:
        raise Wrong(f"{trained}/training.json names the base {about['base']}, dvc.lock another one")
    adapter = (project.root / trained / "adapter_config.json").is_file()
    names = {file.rsplit("/", 1)[1] for file in project.digests.files(trained)} - set(TRAINING_FILES)
    for name in sorted(
        n for n in names if not n.startswith("adapter_") and not (adapter and n == "generation_config.json")
    ):
        if not (project.root / merged / name).is_file() or sha256(f"{merged}/{name}") != sha256(f"{trained}/{name}"):
            raise Wrong(f"{merged}/{name} is not that of {trained}")
    report.ok(
        "trained -> merged", merged, "tokenizer and files of the training" if adapter else "the files of the training"
    )
    if adapter:
        report.stops(
            "trained -> merged", merged, "base + adapter is not added up anew; merge_lora compares their logits"
        )
    if about["base"].startswith("models/base/"):
        report.stops("base", about["base"], "lineage horizon: what this model was trained on is its publisher's word")


# --- Attestations: in-toto statements in DSSE envelopes, signed with ed25519 (RFC 8032)

STATEMENT = "https://in-toto.io/Statement/v1"
PROVENANCE = "https://slsa.dev/provenance/v1"
PAYLOAD = "application/vnd.in-toto+json"
# A name, not an address: what a build of this type is says docs/lineage.md.
BUILD = "https://terroir.invalid/dvc-stage/v1"
ED_P, ED_L = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493
ED_D = -121665 * pow(121666, -1, ED_P) % ED_P
Point = tuple[int, int, int, int]  # extended homogeneous coordinates


def _add(a: Point, b: Point) -> Point:
    low, high = (a[1] - a[0]) * (b[1] - b[0]) % ED_P, (a[1] + a[0]) * (b[1] + b[0]) % ED_P
    t, z = 2 * a[3] * b[3] * ED_D % ED_P, 2 * a[2] * b[2] % ED_P
    e, f, g, h = high - low, z - t, z + t, high + low
    return e * f % ED_P, g * h % ED_P, f * g % ED_P, e * h % ED_P


def _times(number: int, point: Point) -> Point:
    found: Point = (0, 1, 1, 0)
    while number:
        found = _add(found, point) if number & 1 else found
        point, number = _add(point, point), number >> 1
    return found


def _same(a: Point, b: Point) -> bool:
    return (a[0] * b[2] - b[0] * a[2]) % ED_P == 0 and (a[1] * b[2] - b[1] * a[2]) % ED_P == 0


def _point(content: bytes) -> Point | None:
    y = int.from_bytes(content, "little")
    sign, y = y >> 255, y & (2**255 - 1)
    square = (y * y - 1) * pow(ED_D * y * y + 1, -1, ED_P) % ED_P
    x = pow(square, (ED_P + 3) // 8, ED_P)
    if (x * x - square) % ED_P:
        x = x * pow(2, (ED_P - 1) // 4, ED_P) % ED_P
    if y >= ED_P or (x * x - square) % ED_P or (x == 0 and sign):
        return None
    x = ED_P - x if x & 1 != sign else x
    return x, y, 1, x * y % ED_P


def is_signed(key: bytes, message: bytes, signature: bytes) -> bool:
    """Return whether an ed25519 signature (64 bytes) of a message is that of a public key (32 bytes)."""
    if len(key) != 32 or len(signature) != 64:
        return False
    a, r, s = _point(key), _point(signature[:32]), int.from_bytes(signature[32:], "little")
    if a is None or r is None or s >= ED_L:
        return False
    h = int.from_bytes(hashlib.sha512(signature[:32] + key + message).digest(), "little") % ED_L
    y = 4 * pow(5, -1, ED_P) % ED_P
    base = _point(y.to_bytes(32, "little"))
    assert base
    return _same(_times(s, base), _add(r, _times(h, a)))


def payload_bytes(kind: str, body: bytes) -> bytes:
    """Return what a DSSE signature is over: the pre-authentication encoding of type and payload."""
    return b"DSSEv1 %d %s %d %s" % (len(kind.encode()), kind.encode(), len(body), body)


def public_key(path: Path) -> bytes:
    """Return the 32 bytes of an ed25519 public key: PEM, or 64 hexadecimal digits. Raises SystemExit for another."""
    text = path.read_text(encoding="ascii", errors="replace")
    body = re.sub(r"-----[A-Z ]+-----", "", text).replace("\n", "").strip()
    if re.fullmatch("[0-9a-fA-F]{64}", body):
        return bytes.fromhex(body)
    try:
        content = base64.b64decode(body, validate=True)
    except ValueError:
        content = b""
    if len(content) != 44 or content[:12] != bytes.fromhex("302a300506032b6570032100"):
        raise SystemExit(f"{path} is no ed25519 public key: PEM as `openssl pkey -pubout` writes it, or 64 hex digits.")
    return content[12:]


def statement(name: str, stage: Stage, digests: Digests, record: dict[str, Any]) -> dict[str, Any]:
    """Return the in-toto statement of a stage: its outputs as subjects, its inputs and code as dependencies."""

    def described(path: str) -> list[dict[str, Any]]:
        return [{"name": file, "digest": {"sha256": digests.known[file][0]}} for file in digests.files(path)]

    subjects = [one for path in stage.outs if not path.startswith(f"{RECORDS}/") for one in described(path)]
    commit = record.get("git") or []
    dependencies = [one for path in stage.deps for one in described(path)]
    if commit:
        dependencies.append({"name": "git", "digest": {"gitCommit": commit[0]}, "annotations": {"state": commit[1]}})
    return {
        "_type": STATEMENT,
        "subject": subjects,
        "predicateType": PROVENANCE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD,
                "externalParameters": {"stage": name, "command": stage.cmd, "parameters": stage.params},
                "internalParameters": {"versions": record.get("versions", []), "counts": record.get("counts", [])},
                "resolvedDependencies": dependencies,
            },
            "runDetails": {"builder": {"id": BUILD}},
        },
    }


def told(root: Path, name: str) -> dict[str, Any]:
    """Return the run record of a stage, empty without one."""
    path = root / RECORDS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def check_attestations(project: Project, report: Report, key: bytes | None) -> None:
    """Each statement names the bytes that are here, and is signed with the key where one is given."""
    folder = project.root / "attestations"
    if not folder.is_dir():
        if key:
            report.fail("attestations", "attestations", "a key was given, but there are none")
        return
    known = {f"{name}.json" for name in (*project.all, *project.gone)}
    for path in sorted(one.name for one in folder.iterdir() if one.name not in known):
        report.fail("attestations", f"attestations/{path}", "it is of no stage that dvc.lock names")
    for name, stage in project.stages.items():
        path = f"attestations/{name}.json"
        attempt(report, "attestations", path, [], _check_attestation, project, name, stage, path, report, key)
    if key is None:
        report.stops(
            "attestations", "attestations", "signatures are not checked: give the signer's public key with --key"
        )


def _check_attestation(project: Project, name: str, stage: Stage, path: str, report: Report, key: bytes | None) -> None:
    content = json.loads((project.root / path).read_text(encoding="utf-8"))
    body = base64.b64decode(content["payload"], validate=True)
    if key:
        message = payload_bytes(content["payloadType"], body)
        if not any(is_signed(key, message, base64.b64decode(one["sig"])) for one in content["signatures"]):
            raise Wrong("it is not signed with this key")
    said = json.loads(body)
    definition = said["predicate"]["buildDefinition"]
    if definition["externalParameters"] != {"stage": name, "command": stage.cmd, "parameters": stage.params}:
        raise Wrong("it names another stage, command or parameters than dvc.lock")
    records = f"{RECORDS}/"
    sides = (("subject", said["subject"], stage.outs), ("input", definition["resolvedDependencies"], stage.deps))
    before = len(report.findings)
    for side, listed, paths in sides:
        files = {file for one in paths if not one.startswith(records) for file in project.digests.files(one)}
        named = {one["name"]: one["digest"].get("sha256") for one in listed if one["name"] != "git"}
        if odd := sorted(files ^ named.keys()):
            raise Wrong(f"{odd[0]} is no {side} of it, or not there")
        for file, digest in named.items():
            if project.digests.known[file][0] != digest:
                report.fail("attestations", file, f"it is not the file that {path} names as {side}")
    if len(report.findings) > before:
        return
    made = json.loads(json.dumps(statement(name, stage, project.digests, told(project.root, name))))
    if content["payloadType"] != PAYLOAD or said != made:
        raise Wrong(f"it says otherwise than dvc.lock and {RECORDS}/{name}.json")
    report.ok("attestations", path, "signed with this key" if key else "its digests are those of the bytes")


# --- All of it


def _short(error: object) -> str:
    return " ".join(str(error).split())[:160]


def attempt(report: Report, check: str, path: str, needs: list[str], work: Callable[..., Any], *about: Any) -> Any:
    """Return what one check returns; what rests on bytes that are not those of the papers is not even tried."""
    if broken := [need for need in needs if report.failed(need)]:
        report.stops(check, path, f"{broken[0]} is not what its papers say")
        return None
    try:
        return work(*about)
    except Wrong as error:
        report.fail(check, path, str(error))
    except Exception as error:  # whatever a damaged file brings about is a finding, as are those that come after it
        report.fail(check, path, f"it cannot be read as it should be ({type(error).__name__}: {_short(error)})")
    return None


def verify(root: Path, phase: str | None = None, key: bytes | None = None) -> Report:
    """Return what all checks found; `key`: of who signed the attestations. Raises SystemExit without a dvc.lock."""
    report = Report()
    if not (root / "dvc.lock").is_file():
        raise SystemExit(f"{root} has no dvc.lock: run this in a project that `dvc repro` has finished, or in a pack.")
    try:
        project = Project(root, phase)
    except Wrong as error:
        report.fail("dvc.lock", "dvc.lock", str(error))
        return report
    paths = {path for stage in project.stages.values() for path in (*stage.deps, *stage.outs)}
    paths |= {f"{RECORDS}/{name}.json" for name in project.stages if name != "check_params"}
    project.digests.read(sorted(path for path in paths if (root / path).exists()))
    if project.gone:
        what = ", ".join(project.gone)
        report.stops(
            "dvc.lock", "dvc.lock", f"params.yaml does not name these any more, nothing of them is checked: {what}"
        )
    check_lock(project, report)
    check_params(project, report)
    check_records(project, report)
    check_manifests(project, report)
    check_attestations(project, report, key)
    if project.whole:
        check_strangers(project, report)
    for name in project.phases:
        _check_phase(project, name, report)
    return report


def _check_phase(project: Project, phase: str, report: Report) -> None:
    kinds = ("sources", "clean", "dedup", "tokens", "blocks")
    declared, clean, decisions, tokens, blocks = (f"data/{kind}/{phase}" for kind in kinds)
    trained, merged, at = f"models/{phase}/trained", f"models/{phase}/merged", f"models/tokenizers/{phase}"
    sources = attempt(report, "sources", declared, [], project.sources, phase) or []
    for source in sources:
        needs = [source.folder(kind) for kind in ("ledger", "documents", "sources")]
        attempt(report, "raw -> documents", needs[0], needs, check_raw, project, source, report)
    if sources and f"dedup@{phase}" in project.stages:
        needs = [clean, decisions, EXCLUSIONS]
        attempt(report, "documents -> decisions", decisions, needs, check_decisions, project, phase, sources, report)
    if (project.root / at).is_dir() and (
        tokenizer := attempt(report, "tokenizer", at, [at], Tokenizer, project.root / at)
    ):
        for source in sources:
            needs = [source.folder(kind) for kind in ("documents", "dedup", "marked", "tokens")]
            attempt(report, "documents -> tokens", needs[3], needs, check_marked, project, source, tokenizer, report)
        attempt(
            report,
            "tokens -> blocks",
            blocks,
            [tokens, blocks],
            check_blocks,
            project,
            phase,
            sources,
            tokenizer,
            report,
        )
    if f"train_model@{phase}" in project.stages:
        attempt(
            report, "blocks -> receipts", trained, [f"{blocks}/train", trained], check_receipts, project, phase, report
        )
    if f"merge_lora@{phase}" in project.stages:
        attempt(report, "trained -> merged", merged, [trained, merged, at], check_model, project, phase, report)


def show(report: Report) -> str:
    """Return the findings as lines of text: what failed first, papers that are right summed up."""
    lines = []
    papers = Counter(f.check for f in report.findings if f.status == "ok")
    summed = ("dvc.lock", "run record", "manifest", "attestations")
    for check in summed:
        if check == "attestations" and not papers[check]:
            continue
        lines.append(f"ok      {check:23} {papers[check]} agree with the bytes")
    for finding in report.findings:
        if finding.status != "ok" or finding.check not in summed:
            lines.append(f"{finding.status:7} {finding.check:23} {finding.path}: {finding.detail}")
    lines.sort(key=lambda line: not line.startswith("FAILED"))
    failed = sum(f.status == "FAILED" for f in report.findings)
    stops = sum(f.status == "stops" for f in report.findings)
    verdict = f"{failed} FAILED" if failed else "all that was checked is as it is said"
    return "\n".join([*lines, f"{verdict}; {len(report.findings)} checks, {stops} places where it stops"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", nargs="?", help="check only what this phase rests on")
    parser.add_argument("--root", type=Path, default=Path(), help="the project or pack (default: this folder)")
    parser.add_argument("--key", type=Path, help="public ed25519 key of the pack's signer, PEM or hexadecimal")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    given = parser.parse_args()
    report = verify(given.root, given.phase, public_key(given.key) if given.key else None)
    if given.json:
        print(json.dumps([finding._asdict() for finding in report.findings], indent=1, ensure_ascii=False))
    else:
        print(show(report))
    sys.exit(any(finding.status == "FAILED" for finding in report.findings))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    main()
