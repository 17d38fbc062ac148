"""Check the whole of params.yaml and what earlier settings left behind, before any stage works.

Reads:  params.yaml, the groups that the other stages declare, the names of the folders in data/ and models/
Writes: nothing; a mistake ends in one sentence

Every stage runs this check first, too. It can only refuse: no value reaches a stage through it.

Example: `soruces:` in params.yaml

    params.yaml line 12: unknown key `soruces`; did you mean `sources`?
"""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

import clean
import dedup
import evaluate_model
import group_blocks
import import_base
import import_python_docs
import merge_lora
import train_model
import train_tokenizer
from kit import params


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_]*", text):
        raise ValueError(f"the name `{text}` becomes a folder: use lower-case letters, digits and _")
    return text


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or path.startswith("~"):
        raise ValueError(
            f"the path {path!r} leads out of the repository; copy or link the files into data/raw and name that"
        )
    return path


Name = Annotated[str, AfterValidator(_name)]
Inside = Annotated[str, AfterValidator(_inside)]


class Source(params.Source):
    """One entry of `sources`."""

    model_config = ConfigDict(extra="forbid")

    path: Inside = Field(min_length=1)
    clean: clean.Params


class Phase(params.Phase):
    """One entry of `phases`."""

    model_config = ConfigDict(extra="forbid")

    base: Inside = Field(min_length=1)
    dedup: dedup.Params
    train_tokenizer: train_tokenizer.Params
    group_blocks: group_blocks.Params
    train_model: train_model.Params
    merge_lora: merge_lora.Params
    evaluate_model: evaluate_model.Params


class Everything(BaseModel):
    """The whole of params.yaml."""

    model_config = ConfigDict(extra="forbid")

    imports: dict[Name, import_python_docs.Params]
    bases: dict[Name, import_base.Params]
    sources: dict[Name, Source]
    phases: dict[Name, Phase]


def check() -> None:
    """Raise SystemExit with one sentence when params.yaml, or what it left behind, is not fit to work with."""
    content = params.load()
    everything = params.validate(content, Everything)
    check_references(everything)
    check_leftovers(everything)


def check_references(everything: Everything) -> None:
    """Raise SystemExit when a source names no phase, a phase has no source, or phases build on each other in a ring."""
    phases = everything.phases
    for name, source in everything.sources.items():
        if source.phase not in phases:
            raise SystemExit(
                f"params.yaml: sources.{name}.phase is `{source.phase}`, not a key of `phases`; "
                f"{_near(source.phase, phases)}"
            )
    for name, phase in phases.items():
        if not any(source.phase == name for source in everything.sources.values()):
            raise SystemExit(
                f"params.yaml: phase `{name}` has no source; give a source `phase: {name}` or remove the phase."
            )
        sources = sorted(key for key, source in everything.sources.items() if source.phase == name)
        if strangers := sorted(phase.group_blocks.weights.keys() - set(sources)):
            raise SystemExit(
                f"params.yaml: phases.{name}.group_blocks.weights names {strangers[0]}, no source of this phase; "
                f"its sources: {', '.join(sources)}."
            )
        if name in ("configs", "base", "tokenizers", "runs"):
            raise SystemExit(
                f"params.yaml: a phase cannot be called `{name}`: the folder of that name has a use already."
            )
        built_on = [name]
        while (parts := PurePosixPath(phase.base).parts)[:1] == ("models",) and parts[2:] in (
            ("merged",),
            ("trained",),
        ):
            if parts[1] not in phases:
                raise SystemExit(
                    f"params.yaml: phases.{name}.base is {phase.base}, but there is no phase `{parts[1]}`; "
                    f"{_near(parts[1], phases)}"
                )
            if parts[1] in built_on:
                raise SystemExit(
                    f"params.yaml: the phases {' and '.join(built_on)} build on each other; "
                    "one of them must start from another base."
                )
            built_on.append(parts[1])
            phase = phases[parts[1]]


def check_leftovers(everything: Everything) -> None:
    """Raise SystemExit when data/ or models/ holds the output of a source or phase that is gone from params.yaml."""
    wanted = {f"{source.phase}/{name}" for name, source in everything.sources.items()}
    for stage in ("clean", "dedup", "marked", "tokens"):
        for path in sorted(Path("data", stage).glob("*/*")):
            if path.is_dir() and not path.name.startswith(".") and f"{path.parent.name}/{path.name}" not in wanted:
                raise SystemExit(
                    f"{path} belongs to no source in params.yaml, but would still be read; delete it: rm -r {path}"
                )
    folders = [Path("data/blocks"), Path("models/tokenizers"), Path("models")]
    for path in sorted(path for folder in folders for path in folder.glob("*")):
        known = (
            {*everything.phases, "configs", "base", "tokenizers"} if path.parent.name == "models" else everything.phases
        )
        if path.is_dir() and not path.name.startswith(".") and path.name not in known:
            raise SystemExit(f"{path} belongs to no phase in params.yaml; delete it: rm -r {path}")


def _near(name: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean `{near[0]}`?" if near else f"the phases are {', '.join(known) or 'none'}."


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        raise SystemExit(print(__doc__))
    check()
    print("params.yaml: in order")
