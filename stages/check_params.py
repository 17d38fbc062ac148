"""Check the whole of params.yaml and what earlier settings left behind, before any stage works.

Reads:  params.yaml, the groups that the other stages declare, config.json of the bases, dvc.lock (which of them will be
        fetched anew), the names of the folders in data/ and models/
Writes: nothing; a mistake ends in one sentence

Every stage runs this check first, too. It can only refuse: no value reaches a stage through it. As a command it also
looks whether the raw files are there.

Example: `soruces:` in params.yaml

    params.yaml line 12: unknown key `soruces`; did you mean `sources`?
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic

from kit import params
from kit.digests import LEFT_OUT, WORK
from kit.stage_code import STAGES

CHECKED = WORK / "checked"  # says which params.yaml was last found in order, and by which code
BESIDE = ("configs", "base", "tokenizers", "exports")  # in models/, and no phase


def check() -> None:
    """Raise SystemExit with one sentence when params.yaml, or what it left behind, is not fit to work with."""
    content = params.load()
    state = _state()
    if not CHECKED.is_file() or CHECKED.read_bytes() != state.encode():
        import params_schema  # with every stage: 0.15 s, which a stage does not wait for

        params_schema.validate(content)
        with contextlib.suppress(OSError):  # a full disk: nothing is remembered
            CHECKED.parent.mkdir(exist_ok=True)
            CHECKED.write_bytes(state.encode())
    check_leftovers(content)


def _state() -> str:
    """Return the SHA-256 of what decides whether params.yaml is in order: its bytes, the code, library, bases."""
    digest = hashlib.sha256(f"{sys.version} pydantic {pydantic.VERSION}".encode())
    bases = [path for kind in ("base", "configs") for path in sorted(Path("models", kind).glob("[!.]*/config.json"))]
    for path in [params.PARAMS, *bases, *sorted(STAGES.rglob("*.py"))]:
        try:
            content = path.read_bytes()
        except OSError:  # of a base that may not be read, or goes away: its stage will say so
            continue
        digest.update(f"\n{path.relative_to(STAGES) if path.is_absolute() else path} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def check_leftovers(content: dict[str, Any]) -> None:
    """Raise SystemExit when data/ or models/ holds the output of what is gone from params.yaml."""
    wanted = {f"{source['phase']}/{name}" for name, source in content["sources"].items()}
    kinds = ("clean", "sources", "dedup", "marked", "tokens")
    found = [path for name in kinds for path in sorted(Path("data", name).glob("*/*"))]
    left = [path for path in found if f"{path.parent.name}/{path.name}" not in wanted]
    gone = [(path, "no source in params.yaml, but would still be read") for path in left if _is_output(path)]
    for folder in ("data/blocks", "models/tokenizers", "models"):
        kept = {*content["phases"], *(BESIDE if folder == "models" else ())}
        left = [path for path in sorted(Path(folder).glob("*")) if path.name not in kept]
        gone += [(path, "no phase in params.yaml") for path in left if _is_output(path)]
    left = [path for path in sorted(Path("models/exports").glob("*")) if path.name not in content["exports"]]
    gone += [(path, "no export in params.yaml, and no stage renews it") for path in left if _is_output(path)]
    if gone:
        raise SystemExit(f"{gone[0][0]} belongs to {gone[0][1]}; {_remove([path for path, _ in gone])}")


def check_raw(content: dict[str, Any]) -> None:
    """Raise SystemExit when raw files are not there and no import writes them: DVC itself would name no source.

    Also about what lies among them and stops DVC without a word of what and where, or for ever (a pipe).
    """
    written = {Path("data/raw", f"{name}_{kind}") for name in content["imports"] for kind in ("reference", "qa")}
    for name, source in content["sources"].items():
        path = Path(source["path"])
        if not (path.exists() or written & {path, *path.parents}):
            tracked = any(one.with_name(f"{one.name}.dvc").is_file() for one in (path, *path.parents) if one.name)
            how = "run `dvc pull`" if tracked else "put the files there, correct the path, or remove the source"
            raise SystemExit(f"sources.{name}.path: {path} does not exist; {how}.")
        if flaw := next(_stops_dvc(path), None):
            raise SystemExit(f"sources.{name}.path: {flaw}.")


def _stops_dvc(path: Path) -> Iterator[str]:
    """Yield a sentence, without its end, about each thing at a raw path that is no file or has no name in UTF-8."""
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(set(folders) - LEFT_OUT)
        for name in sorted(names):
            file = Path(folder, name)
            if not file.is_file():
                what = "leads nowhere" if file.is_symlink() else "is a pipe or a device"
                yield f"{shlex.quote(str(file))} {what}, on which DVC stops; remove it"
            elif re.search("[\udc80-\udcff]", str(file)):  # how Python writes a byte that is not UTF-8
                yield f"the name {os.fsencode(file)!r} is not UTF-8, on which DVC stops; rename it"


def _is_output(path: Path) -> bool:
    return not path.name.startswith(".") and any(file.is_file() for file in path.rglob("*"))


def _remove(paths: list[Path]) -> str:
    what = f"it and {len(paths) - 1} more" if len(paths) > 1 else "it"
    return f"delete {what}: rm -r {' '.join(map(str, paths))}"


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        raise SystemExit(print(__doc__))
    check()
    check_raw(params.load())  # not in `check`: a stage that works on what is cached needs no raw files
    print("params.yaml: in order")
