"""The code of a stage: the modules under stages/ that it imports, their digest, the versions of its libraries.

    code_files(STAGES / "clean.py")   ->  [stages/changing_rules.py, ..., stages/kit/arrow.py, ...]
    code_digest(STAGES / "clean.py")  ->  SHA-256 over all of them
    versions(STAGES / "clean.py")     ->  {"python": "3.11.9", "numpy": "2.3.4", ...}

All of it follows from the import statements in their text, also those inside functions; a dynamic import is not seen.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import re
import sys
from collections.abc import Iterator
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


def code_digest(script: Path) -> str:
    """Return the SHA-256 over the stage's code and all it imports from stages/."""
    parts = [[p.relative_to(STAGES).as_posix(), digest(p)] for p in code_files(script)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


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
