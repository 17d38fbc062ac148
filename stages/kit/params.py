"""Read params.yaml: typed values for a stage, one sentence for a mistake.

A stage states the keys it reads as a pydantic model and asks for one group of the file:

    read_params("phases.chat.dedup", Params)   ->   Params(eval_fraction=0.05, seed=0)

The file is read as YAML 1.2, as DVC reads it (`no` is text, `1e-4` is a number).
"""

from __future__ import annotations

import difflib
import functools
import os
import typing
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

# A plugin could change what is valid, and looking for one in every installed package takes 15 ms.
os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"
PARAMS = Path("params.yaml")
Model = TypeVar("Model", bound=BaseModel)


class Source(BaseModel):
    """`sources.NAME`: one raw text source; its other keys are groups named after the stage that reads them."""

    model_config = ConfigDict(extra="ignore")

    phase: str = Field(description="the phase that is trained on it, a key of `phases`")
    path: str = Field(min_length=1, description="file or folder, relative to the root of the repository")


class Phase(BaseModel):
    """`phases.NAME`: one model; its other keys are groups named after the stage that reads them."""

    model_config = ConfigDict(extra="ignore")

    base: str = Field(min_length=1, description="folder with config.json (random weights) or with a whole model")


def load() -> dict[str, Any]:
    """Return the whole of params.yaml in the current folder as plain dicts, lists and scalars."""
    if not PARAMS.is_file():
        raise SystemExit("params.yaml is not in the current folder: run this from the root of the repository.")
    try:
        content = parsed(PARAMS.read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SystemExit(f"params.yaml{where}: not valid YAML ({error.problem}); mend the line.") from None
    except YAMLError as error:  # of no line: a control character
        raise SystemExit(f"params.yaml: not valid YAML ({str(error).splitlines()[0]}); remove it.") from None
    except UnicodeDecodeError as error:
        raise SystemExit(f"params.yaml: byte {error.start} is not UTF-8; save the file as UTF-8.") from None
    except ValueError as error:  # of a date or time that there is not
        raise SystemExit(f"params.yaml: a value looks like a date and is none ({error}); put it in quotes.") from None
    if not isinstance(content, dict):
        raise SystemExit("params.yaml: expected keys such as `sources:` and `phases:`, found none.")
    return content


@functools.lru_cache(maxsize=8)
def parsed(text: str) -> Any:
    """Return the content of a YAML text; a stage asks several times for the same, 25 ms each."""
    return YAML(typ="safe").load(text)


def read_params(key: str, model: type[Model]) -> Model:
    """Return the group at the dotted `key`, e.g. `phases.chat.dedup`, as an instance of `model`, its mappings by name.

    Raises SystemExit with one sentence when the group is missing (the known names are listed) or invalid.
    """
    group: Any = load()
    walked: list[str] = []
    for part in key.split("."):
        if not isinstance(group, dict) or part not in group:
            known = ", ".join(sorted(map(str, group))) if isinstance(group, dict) and group else "nothing"
            place = ".".join(walked) or "the top level"
            raise SystemExit(f"params.yaml: there is no `{part}` in {place}; it holds {known}.")
        group = group[part]
        walked.append(part)
    return validate(_by_name(group), model, walked)


def _by_name(value: Any) -> Any:
    """Return `value` with the keys of each mapping sorted: DVC does not look at their order, so it decides nothing."""
    if isinstance(value, dict):
        return {key: _by_name(value[key]) for key in sorted(value, key=lambda key: (type(key).__name__, key))}
    return [_by_name(one) for one in value] if isinstance(value, list) else value


def phase_sources(phase: str, folder: Path) -> list[str]:
    """Return the names of the sources of `phase`, sorted; `folder` holds one sub-folder for each and no other.

    The names come from params.yaml: a source that was removed there leaves its folder behind, and reading the folder
    would bring the text back.
    """
    names = sorted(name for name, source in load()["sources"].items() if source["phase"] == phase)
    for path in sorted(folder.iterdir()):
        if path.name not in names and not path.name.startswith("."):
            raise SystemExit(f"{path} belongs to no source of phase {phase} in params.yaml; delete it: rm -r {path}")
    return names


def validate(group: Any, model: type[Model], at: list[str] | None = None) -> Model:
    """Return `group` as a `model`; raise SystemExit naming the first wrong key and its line.

    A number in quotes is text, and none.
    """
    try:
        return model.model_validate(group, strict=True)
    except ValidationError as error:
        raise SystemExit(_sentence(error, model, at or [])) from None


def _sentence(error: ValidationError, model: type[BaseModel], at: list[str]) -> str:
    # An unknown key comes first: its twin, the missing key, is only its consequence.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    # Where a key may be one of two kinds there is an error for each: the one that goes deeper knows what was meant.
    alike = [e for e in error.errors() if _keys(e["loc"])[: len(_keys(first["loc"]))] == _keys(first["loc"])]
    first = max(alike, key=lambda e: len(_keys(e["loc"])))
    location = [*at, *_keys(first["loc"])]
    key, message = ".".join(location), first["msg"]
    line = _line(location)
    where = f"params.yaml line {line}" if line else "params.yaml"
    if first["type"] == "extra_forbidden":
        known = _known_keys(model, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.55)
        hint = f"did you mean `{near[0]}`?" if near else f"known keys here: {', '.join(known)}."
        return f"{where}: unknown key `{key}`; {hint}"
    if first["type"] == "missing":
        return f"{where}: the key `{key}` is missing; add it (README.md and the stage's --help say what it means)."
    if first["type"] == "value_error":
        return f"{where}: `{key}`: {message.removeprefix('Value error, ')}" if key else f"{where}: {message}"
    return f"{where}: `{key}` is {first['input']!r}: {message[0].lower()}{message[1:]}."


def _keys(location: tuple[int | str, ...]) -> list[str]:
    """Return the keys of an error's location, without pydantic's names of kinds: `[key]`, `dict[str,int]`."""
    return [str(part) for part in location if "[" not in str(part)]


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the keys that `model` allows at `location`, following nested models and dicts of models."""
    kind: Any = model
    for part in location:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[str(part)].annotation
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        inner = [arg for arg in typing.get_args(kind) if isinstance(arg, type) and issubclass(arg, BaseModel)]
        if typing.get_origin(kind) is not dict and inner:
            kind = inner[0]
    return sorted(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _line(location: list[str]) -> int | None:
    """Return the 1-based line of the deepest key of `location` that stands in params.yaml."""
    node: Any = YAML(typ="rt", pure=True).compose(PARAMS.read_text(encoding="utf-8"))
    line = None
    for part in location:
        pairs = node.value if node is not None and node.id == "mapping" else []
        found = [(name, value) for name, value in pairs if name.value == part]
        if not found:
            break
        line, node = found[0][0].start_mark.line + 1, found[0][1]
    return line
