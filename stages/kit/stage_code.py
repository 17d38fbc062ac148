"""The code of a stage: the modules under stages/ that it imports, their digests, the versions of its libraries.

    code_files(STAGES / "clean.py")    ->  [stages/changing_rules.py, ..., stages/kit/arrow.py, ...]
    code_digests(STAGES / "clean.py")  ->  {stages/changing_rules.py: SHA-256 of its text, ...}
    versions(STAGES / "clean.py")      ->  {"python": "3.11.9", "numpy": "2.3.4", ...}

All of it follows from the import statements in their text, also those inside functions; a dynamic import is not seen.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.util
import json
import marshal
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from kit.digests import WORK, digest, read_note, write_note

STAGES = Path(__file__).resolve().parents[1]
# Libraries whose version can change a result; transformers calls the first four by itself.
BESIDE_TORCH = ("accelerate", "bitsandbytes", "peft", "safetensors")
OTHERS = "gguf gigatoken jinja2 numpy pyarrow pydantic_core tokenizers torch torchao transformers"
SHAPING = sorted((*BESIDE_TORCH, *OTHERS.split()))


def code_files(script: Path) -> list[Path]:
    """Return `script` and every module under stages/ that it imports, at any depth, sorted."""
    return _imports(script)[0]


def code_digests(script: Path) -> dict[Path, str]:
    """Return the SHA-256 of the stage's code and of each module that it imports from stages/."""
    return {path: digest(path) for path in code_files(script)}


def code_digest(digests: dict[Path, str]) -> str:
    """Return the one SHA-256 over what `code_digests` found."""
    parts = [[path.relative_to(STAGES).as_posix(), found] for path, found in digests.items()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def run_otherwise(paths: Iterable[Path]) -> str | None:
    """Return a sentence about the first of these modules of which this process may run another text than lies there.

    For Python has read them already, some tenths of a second ago. And it takes byte code for that of a module when only
    the size and the second of the last change are the same.
    """
    begun, now = _begun(), time.time_ns()
    for path in paths:
        changed, name = path.stat().st_ctime_ns, path.relative_to(STAGES.parent)
        compiled = Path(importlib.util.cache_from_source(str(path)))
        if begun < changed < now:  # not one of the future, as another machine may give
            with contextlib.suppress(OSError):  # of which text it is, nobody knows
                compiled.unlink()
            return f"{name} changed while the stage started; nothing was done: run again."
        if compiled.is_file() and _is_stale(compiled, path):
            folder = compiled.relative_to(STAGES.parent) if STAGES in compiled.parents else compiled
            return (
                f"{name} has another text than the byte code that Python keeps of it, but the same size and time, so "
                f"the old code would run; remove the byte code (rm -r {folder.parent}) and run again."
            )
    return None


def _begun() -> int:
    """Return when this process began, in nanoseconds as `time.time_ns`, at most a hundredth of a second too late."""
    about = Path("/proc/self/stat")
    if not about.is_file():
        return time.time_ns()
    ticks = int(about.read_bytes().rpartition(b")")[2].split()[19])  # since the machine began; field 22 in proc(5)
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME) + (ticks + 1) * 10**9 // os.sysconf("SC_CLK_TCK")


def _is_stale(compiled: Path, path: Path) -> bool:
    """Return whether Python would take byte code of another text for that of a module: its header is of PEP 552."""
    stat = path.stat()
    if compiled.stat().st_ctime_ns > stat.st_ctime_ns + 10**7:  # made since the last change; a clock's tick apart
        return False
    content = compiled.read_bytes()
    flags, seconds, size = (int.from_bytes(content[place : place + 4], "little") for place in (4, 8, 12))
    is_named = (seconds, size) == (int(stat.st_mtime) & 0xFFFFFFFF, stat.st_size & 0xFFFFFFFF)
    if content[:4] != importlib.util.MAGIC_NUMBER or not (is_named if flags == 0 else flags == 1):
        return False
    if marshal.loads(content[16:]) != compile(path.read_bytes(), str(path), "exec", dont_inherit=True):  # noqa: S302
        return True
    with contextlib.suppress(OSError):
        os.utime(compiled)  # not to be compared again
    return False


def versions(script: Path) -> dict[str, str]:
    """Return the versions of Python and of the installed libraries that can shape what this stage writes.

    By the imports in its code, not by what happens to be imported so far: two runs must give the same answer.
    """
    packages = _imports(script)[1]
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in SHAPING:
        if (name in packages or ("torch" in packages and name in BESIDE_TORCH)) and (number := version(name)):
            found[name] = number
    return found


def version(name: str) -> str | None:
    """Return the version of an installed library, None where there is none.

    Read where `importlib.metadata` reads it, whose import takes 17 ms; what is not there in the one usual place is left
    to it.
    """
    places = dict.fromkeys(sys.path)
    found = [path for place in places for path in Path(place).glob(f"{name}-*.dist-info/METADATA")]
    line = re.search(rb"^Version: (\S+)$", found[0].read_bytes(), re.MULTILINE) if len(found) == 1 else None
    if line:
        return line[1].decode()
    import importlib.metadata

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


@functools.cache
def _imports(script: Path) -> tuple[list[Path], set[str]]:
    """Return `script` and what it imports from stages/, at any depth, sorted, and the other packages they name.

    Found out once in a run: which modules they import changes only when one of them changes, and is then seen. What a
    module names stands in .work/imports under the SHA-256 of its text, for to parse them all takes 20 to 60 ms.
    """
    note = WORK / "imports" / f"{script.stem}.json"
    known, names = read_note(note), {}
    code = hashlib.sha256(sys.version.encode() + Path(__file__).read_bytes())
    found: set[Path] = set()
    waiting = [script.resolve()]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        text, key = path.read_bytes(), code.copy()
        key.update(text)
        name = key.hexdigest()
        named = names[name] = known[name] if name in known else _imported(text)
        candidates = (STAGES / f"{module.replace('.', '/')}.py" for module in named)
        waiting.extend(candidate for candidate in candidates if candidate.is_file())
    if names != known and WORK.is_dir():
        write_note(note, names)
    return sorted(found), {module.split(".")[0] for named in names.values() for module in named}


def _imported(text: bytes) -> list[str]:
    """Return the names in the import statements of a module, sorted; of `from a import b` both a and a.b."""
    names: set[str] = set()
    for node in _statements(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return sorted(names)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all statements in a module; `ast.walk` would also visit each expression, where no import can stand."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, field, []):
            yield child
            yield from _statements(child)
