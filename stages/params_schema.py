"""What params.yaml may say: one model for the whole file, and what its parts must say of each other.

    validate(params.load())   ->   Everything, or SystemExit with one sentence

It imports every stage for its class Params, so it is slow to import; stages/check_params.py does so once for each
state of params.yaml and of the code.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from ruamel.yaml import YAML

import clean
import decontaminate
import dedup
import evaluate_model
import export_model
import group_blocks
import harness
import import_base
import import_python_docs
import merge_lora
import score_report
import train_model
import train_tokenizer
from chat_templates import TEMPLATES, special_tokens
from kit import params
from kit.base import check_base

# Types of models whose config.json calls max_position_embeddings so; others may have the key and no table of positions.
N_POSITIONS = ("codegen", "ctrl", "gpt2", "gpt_bigcode", "gptj", "openai-gpt")


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_]{0,99}", text):
        raise ValueError(f"the name `{text}` becomes a folder: use lower-case letters, digits and _, 100 at most")
    return text


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or path.startswith("~"):
        raise ValueError(
            f"the path {path!r} leads out of the repository; copy or link the files into data/raw, a model into "
            "models/base, and name that"
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
    exports: dict[Name, export_model.Params]
    sources: dict[Name, Source]
    phases: dict[Name, Phase]


def validate(content: dict[str, Any]) -> Everything:
    """Return the content of params.yaml as models; raise SystemExit with one sentence for the first mistake."""
    everything = params.validate(content, Everything)
    check_references(everything)
    return everything


def check_references(everything: Everything) -> None:
    """Raise SystemExit when one names no phase, a phase has no source or base, or phases build in a ring."""
    phases = everything.phases
    users = [(f"sources.{name}", source.phase) for name, source in everything.sources.items()]
    users += [(f"exports.{name}", export.phase) for name, export in everything.exports.items()]
    for name, used in users:
        if used not in phases:
            raise SystemExit(f"params.yaml: {name}.phase is `{used}`, not a key of `phases`; {_near(used, phases)}")
    for name, phase in phases.items():
        if not any(source.phase == name for source in everything.sources.values()):
            raise SystemExit(
                f"params.yaml: phase `{name}` has no source; give a source `phase: {name}` or remove the phase."
            )
        sources = sorted(key for key, source in everything.sources.items() if source.phase == name)
        long_documents = phase.group_blocks.long_documents
        rules = {} if isinstance(long_documents, str) else long_documents
        for key, given in (("weights", phase.group_blocks.weights), ("long_documents", rules)):
            if strangers := sorted(given.keys() - set(sources)):
                raise SystemExit(
                    f"params.yaml: phases.{name}.group_blocks.{key} names {strangers[0]}, no source of this phase; "
                    f"its sources: {', '.join(sources)}."
                )
        try:
            dedup.in_order(sources, phase.dedup.priority)
        except ValueError as error:
            raise SystemExit(f"params.yaml: phases.{name}.dedup: {error}") from None
        named = [("dedup.decontaminate", benchmark) for benchmark in phase.dedup.decontaminate]
        named += [("evaluate_model.general", benchmark) for benchmark in phase.evaluate_model.general]
        for key, benchmark in named:
            files = [decontaminate.FOLDER / f"{benchmark}{suffix}" for suffix in (".jsonl", ".txt")]
            if not any(file.is_file() for file in files):
                raise SystemExit(
                    f"params.yaml: phases.{name}.{key} names {benchmark}, but neither {files[0]} nor .txt is there; "
                    "put it there, or remove the name."
                )
        if flaw := _unfit_evaluation(phase, sources):
            raise SystemExit(f"params.yaml: phases.{name}.evaluate_model.{flaw}")
        if name in ("configs", "base", "tokenizers", "exports", "runs"):
            raise SystemExit(
                f"params.yaml: a phase cannot be called `{name}`: the folder of that name has a use already."
            )
        built_on = [name]
        while _is_model_of_a_phase(parts := PurePosixPath(phase.base).parts):
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
        if not Path(phase.base).exists() and (wrong := _no_base(parts, everything)):
            raise SystemExit(f"params.yaml: phases.{built_on[-1]}.base is {phase.base}, which is {wrong}")
        if flaw := _too_long(phases[name], Path(phase.base)):
            raise SystemExit(f"params.yaml: phases.{name}.{flaw}")
    for name, phase in phases.items():
        sources_of = [source for source in everything.sources.values() if source.phase == name]
        if flaw := _unfit_tokenizer(phase, sources_of) or _unfit_template(phase, phases):
            raise SystemExit(f"params.yaml: phases.{name}.train_tokenizer: {flaw}")
    for phase in phases.values():
        parts = PurePosixPath(phase.base).parts
        if not _is_model_of_a_phase(parts) and not _is_imported(parts, everything):  # of their bytes DVC knows
            check_base(Path(phase.base))


def _unfit_evaluation(phase: Phase, sources: list[str]) -> str | None:
    """Return the rest of the sentence about a score or task that there is none of: found out before the training."""
    asked = phase.evaluate_model
    kind = phase.train_model.objective
    known = score_report.possible(kind, sources, asked.general, asked.quantized, asked.lm_eval_tasks)
    for text in asked.require:
        name = text.split("<")[0].split(">")[0].strip()
        if not any(fnmatch.fnmatchcase(name, one) for one in known):
            near = difflib.get_close_matches(name, known, n=1)
            rest = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(known)}."
            return f"require names {name}, which is no score of this phase; {rest}"
    for task in asked.lm_eval_tasks:
        files = sorted(harness.FOLDER.rglob("*.yaml"))
        if not any(task in file.read_text(encoding="utf-8", errors="replace") for file in files):
            return (
                f"lm_eval_tasks names {task}, but no .yaml file in {harness.FOLDER} has `task: {task}`; add it, "
                "or remove the name."
            )
    return None


def _unfit_tokenizer(phase: Phase, sources: list[Source]) -> str | None:
    """Return the rest of the sentence about a new tokenizer that this phase cannot use: found out before any work."""
    made = phase.train_tokenizer
    if made.mode != "train":
        return None
    if _is_model_of_a_phase(PurePosixPath(phase.base).parts):
        return f"{phase.base} knows the tokens of its own tokenizer and no new ones; set mode to reuse or extend."
    if made.chat_template is None and any(source.clean.record != "text" for source in sources):
        return f"this phase holds conversations; name a chat_template, one of {', '.join(TEMPLATES)}."
    if made.mask_token is None and phase.train_model.objective == "mlm":
        return "`objective: mlm` needs a mask_token; add one, e.g. <mask>."
    return None


def _unfit_template(phase: Phase, phases: dict[str, Phase]) -> str | None:
    """Return the rest of the sentence about a template whose tokens a tokenizer that an earlier phase trains lacks."""
    template = phase.train_tokenizer.chat_template
    missing = set(special_tokens(template))
    while phase.train_tokenizer.mode != "train" and _is_model_of_a_phase(parts := PurePosixPath(phase.base).parts):
        if phase.train_tokenizer.mode == "extend":
            missing -= set(special_tokens(phase.train_tokenizer.chat_template))
        phase, trainer = phases[parts[1]], parts[1]
        if phase.train_tokenizer.mode == "train" and (missing := missing - set(phase.train_tokenizer.specials)):
            fitting = [name for name in TEMPLATES if not special_tokens(name)]
            return (
                f"chat_template {template} needs the special tokens {' and '.join(sorted(missing))}; name them in "
                f"phases.{trainer}.train_tokenizer.special_tokens (it trains the tokenizer), set mode to extend, or "
                f"choose {' or '.join(fitting)}, which need none."
            )
    return None


def _too_long(phase: Phase, base: Path) -> str | None:
    """Return the rest of the sentence about a length that the base, if it lies here, has no positions for.

    train_model and evaluate_model say so, too, of any model, but after the trainings of all earlier phases.
    """
    try:
        config = json.loads((base / "config.json").read_bytes())
        kind = config.get("model_type", "")
        limit = int(config["n_positions" if kind in N_POSITIONS else "max_position_embeddings"])
        if "roberta" in kind or kind == "camembert":  # it counts positions from the one after padding's
            limit -= int(config.get("pad_token_id", 1)) + 1
    except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError):  # the stages will know
        return None
    lengths = {
        "group_blocks.block_size": phase.group_blocks.block_size,
        "evaluate_model.max_length": phase.evaluate_model.max_length,
    }
    for key, length in lengths.items():
        if length > limit and not _will_be_fetched(base):
            return f"{key} is {length:,} but {base} has positions for {limit:,}; lower it."
    return None


def _will_be_fetched(base: Path) -> bool:
    """Return whether import_base will put another model there than the one that lies there, as dvc.lock has it."""
    bases = params.load()["bases"]
    if base.parent != Path("models/base") or base.name not in bases:
        return False
    lock = Path("dvc.lock")
    stages = (YAML(typ="safe").load(lock.read_bytes()) if lock.is_file() else None) or {}
    fetched = stages.get("stages", {}).get(f"import_base@{base.name}", {}).get("params", {}).get("params.yaml", {})
    return bool(fetched.get(f"bases.{base.name}") != bases[base.name])


def _is_model_of_a_phase(parts: tuple[str, ...]) -> bool:
    return parts[:1] == ("models",) and parts[2:] in (("merged",), ("trained",))


def _no_base(parts: tuple[str, ...], everything: Everything) -> str | None:
    """Return the rest of the sentence about a base that is not there; None when a stage will bring it."""
    if parts[:2] == ("models", "base"):
        near = _near(parts[-1], everything.bases, "bases")
        known = _is_imported(parts, everything)
        return None if known else f"not there and which `bases` does not bring; {near}"
    if parts[:2] == ("models", "configs"):
        configs = {path.name: path for path in sorted(Path("models/configs").glob("*"))}
        return f"not there; {_near(parts[-1], configs, 'configs')}"
    return "no folder here; of an open model name `repo_id` and `revision` under `bases`, and take models/base/NAME."


def _is_imported(parts: tuple[str, ...], everything: Everything) -> bool:
    return parts in [("models", "base", name) for name in everything.bases]


def _near(name: str, known: dict[str, Any], kind: str = "phases") -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean `{near[0]}`?" if near else f"the {kind} are {', '.join(known) or 'none'}."
