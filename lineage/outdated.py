"""What of a project is of an older state of it, as far as dvc.lock tells without reading what it names.

    Outdated(root, stages).why("merge_lora@chat")
    ->   "phases.pretrain.train_model in params.yaml has changed since train_model@pretrain ran"    None: nothing has

dvc.lock keeps what a stage read and wrote when it last ran, whatever has become of its inputs since. Sizes and numbers
of files stand for the digest of a folder that several stages write. Raw text is not looked at: `dvc status` does that.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lineage.verify import Stage, Wrong, read_yaml

SMALL = 2**20  # bytes of a file that is read to see whether it has changed: code, exclusions


class Outdated:
    """Compares the stages of dvc.lock with each other, with params.yaml, and with small files."""

    def __init__(self, root: Path, stages: dict[str, Stage]) -> None:
        self.root, self.stages = root, stages
        self.makers = {path: name for name, stage in stages.items() for path in stage.outs}
        self.why = functools.cache(self._why)

    def others(self, name: str) -> str | None:
        """Return what a stage read that is by now other data, None: nothing. Its rows belong to none that lie there."""
        changed = (path for path in self.stages[name].deps if self.read_other(name, path))
        return next((f"{path} has changed since {name} ran" for path in changed), None)

    def read_other(self, name: str, path: str) -> bool:
        """Return whether a stage has run that read something else in a path than what was written there last."""
        entry = self.stages[name].deps.get(path, {}) if name in self.stages else {}
        return bool(entry) and any(entry.get(key) != value for key, value in self._now(path).items())

    def unbuilt(self) -> dict[str, str]:
        """Return the sources that params.yaml names and dvc.lock does not, with their phases."""
        named = self._params.get("sources")
        return {
            str(name): str(source.get("phase"))
            for name, source in (named.items() if isinstance(named, dict) else ())
            if isinstance(source, dict) and f"clean@{name}" not in self.stages
        }

    def _why(self, name: str) -> str | None:
        """Return why a stage, or one before it, would run again, the nearest first; None: nothing says so."""
        waiting, seen = [name], {name}
        phases = self.unbuilt()
        for one in waiting:
            stage = self.stages[one]
            if said := self.others(one) or next(self._edited(one), None):
                return said
            if stage.name == "dedup" and stage.item in phases.values():
                new = ", ".join(source for source, phase in phases.items() if phase == stage.item)
                return f"params.yaml names sources of {stage.item} that were never cleaned: {new}"
            before = {maker for path in stage.deps for out, maker in self.makers.items() if _overlap(path, out)}
            waiting += sorted(before - seen)
            seen |= before
        return None

    def _now(self, path: str) -> dict[str, Any]:
        """Return what dvc.lock says of a path where stages write it; {} where none does, or a part of it alone."""
        if path in self.makers:
            entry = self.stages[self.makers[path]].outs[path]
            return {"md5": entry.get("md5")}
        inside = [self.stages[maker].outs[out] for out, maker in self.makers.items() if out.startswith(path + "/")]
        return {key: sum(entry.get(key, 1) for entry in inside) for key in ("size", "nfiles")} if inside else {}

    def _edited(self, name: str) -> Iterator[str]:
        """Yield the parameters and the small files that are others by now."""
        stage = self.stages[name]
        for key, value in stage.params.items() if self._params else ():
            group: Any = self._params
            for part in key.split("."):
                group = group.get(part) if isinstance(group, dict) else None
            if group != value:
                yield f"{key} in params.yaml has changed since {name} ran"
        for path, entry in stage.deps.items():
            if path in self.makers or "nfiles" in entry or entry.get("size", SMALL) >= SMALL:
                continue
            if self._md5(path) not in (None, entry.get("md5")):
                yield f"{path} has changed since {name} ran"

    @functools.cached_property
    def _params(self) -> dict[str, Any]:
        try:
            found = read_yaml(self.root / "params.yaml")
        except (Wrong, OSError):
            return {}
        return found if isinstance(found, dict) else {}

    @functools.cache  # noqa: B019 (as long-lived as the program)
    def _md5(self, path: str) -> str | None:
        """Return the MD5 of a file, None where it is not there: what is left of a project may be asked, too."""
        file = self.root / path
        return hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest() if file.is_file() else None


def _overlap(path: str, out: str) -> bool:
    return path == out or path.startswith(out + "/") or out.startswith(path + "/")
