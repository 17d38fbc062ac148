"""dvc.yaml tells the truth: its dependencies, parameters, outputs and words are those of the code.

What DVC does not know it does not see change, and then it hands out a result that belongs to other inputs. The left
side of every comparison is dvc.yaml as DVC itself resolves it; the right side is read from the code, or observed by
calling each stage's `main` up to the point where its work would begin.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import functools
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from dvc.dependency.param import ParamsDependency
from dvc.repo import Repo
from pydantic import BaseModel
from ruamel.yaml import YAML

import chat_templates
import clean_rules
import params_schema
import raw_params
from conftest import ROOT, copy_project, git
from kit import params, stage, stage_code

STAGES = ROOT / "stages"
TEXT = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]  # before `foreach` is resolved
NAMES = sorted(TEXT)
SCRIPTS = sorted(path.stem for path in STAGES.glob("*.py"))
KIT = sorted(path.stem for path in (STAGES / "kit").glob("*.py"))
KIT_IMPORTS = {
    "model": {"base"},
    "stage": {"digests", "params", "stage_code"},
    "stage_code": {"digests"},
}  # within kit/; all others import none
SIBLINGS = sorted(set(SCRIPTS) - set(NAMES))  # parts of stages, e.g. train_loop of train_model
EXAMPLES = [
    path for path in sorted([*STAGES.rglob("*.py"), *(ROOT / "lineage").glob("*.py")]) if ">>> " in path.read_text()
]
UNCACHED_OUTS = {"describe_model"}  # small text that belongs to Git
DATA_STAGES = ["clean", "dedup", "train_tokenizer", "add_bos_eos", "tokenize_text", "group_blocks"]
HEAVY = {"torch", "transformers", "datasets", "peft", "pandas", "accelerate", "bitsandbytes"}
LATE = {  # imported inside a `main`
    "adapters", "document_masks", "kit.model", "loss_head", "merge_weights", "optimizers", "plan", "train_loop",
}  # fmt: skip
LIGHT = {"numpy", "pyarrow", "pydantic", "pydantic_core", "ruamel", "tokenizers"}  # all others are imported when needed
# What is no input, and the modules that may ask for it: for processes, encoders, temporary names, logs; never for a
# result, for neither DVC nor .memo/ would know.
OUTSIDE = {
    "environ", "getenv", "time", "time_ns", "monotonic", "perf_counter", "now", "today", "utcnow", "getpid", "urandom",
    "uuid1", "uuid4", "gethostname", "cpu_count", "hash",
}  # fmt: skip
ASKERS = {
    "distributed", "fast_encoder", "train_loop", "kit/digests", "kit/memo", "kit/model", "kit/params", "kit/stage",
    "kit/stage_code", "kit/start",
}  # fmt: skip
DYNAMIC = {"import_module", "__import__", "exec", "run_path", "run_module"}
START_SECONDS = 0.6  # of CPU; the budget is 0.35 s of wall time on a quiet machine, which `make bench` measures
IMPORT = "{questions_per_entry: 1}"
BASE = "{repo_id: owner/name, revision: 4f42c91d806a19ae1a46af6c3fb5f4990d884cd6}"


class Item(NamedTuple):
    """One stage of dvc.yaml for one entry of params.yaml, as DVC resolves it; paths relative to the root."""

    stage: str
    item: str
    cmd: str
    desc: str
    code: set[str]
    inputs: set[str]
    keys: set[str]
    outs: set[str]
    metrics: set[str]
    plots: set[str]
    uncached: set[str]


class Observed(NamedTuple):
    """What a stage asked `stage.run` for."""

    name: str
    inputs: set[str]
    outputs: set[str]


class WorkBegins(BaseException):
    """Raised in place of the work of a stage."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project whose params.yaml has an entry in `bases` and `exports`, so that every stage exists."""
    folder = copy_project(tmp_path_factory.mktemp("contract") / "project")
    git(folder, "init", "--quiet")
    path = folder / "params.yaml"
    text = path.read_text(encoding="utf-8")
    some = re.findall(r"(?m)^phases:.*\n(?:[ \t]*(?:#.*)?\n)*  (\w+):", text)[0]
    text = re.sub(r"(?m)^imports: \{\}", f"imports: {{example: {IMPORT}}}", text)
    text = re.sub(r"(?m)^bases: \{\}", f"bases: {{example: {BASE}}}", text)
    text = re.sub(r"(?m)^exports: \{\}", f"exports: {{example: {{phase: {some}, format: nf4}}}}", text)
    path.write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def items(root: Path) -> list[Item]:
    """All stages of dvc.yaml for all entries of params.yaml."""
    with Repo(str(root)) as repo:
        return [resolved(one, root) for one in repo.index.stages]


def resolved(one: Any, root: Path) -> Item:
    """Return what DVC holds of a stage."""
    keys = {key for dep in one.deps if isinstance(dep, ParamsDependency) for key in dep.params}
    deps = {_relative(dep, root) for dep in one.deps if not isinstance(dep, ParamsDependency)}
    code = {path for path in deps if path.startswith("stages/")}
    outs = {_relative(out, root) for out in one.outs if not out.metric and not out.plot}
    metrics = {_relative(out, root) for out in one.outs if out.metric}
    plots = {_relative(out, root) for out in one.outs if out.plot}
    uncached = {_relative(out, root) for out in one.outs if not out.use_cache}
    name, _, item = one.name.partition("@")
    return Item(name, item, one.cmd, one.desc or "", code, deps - code, keys, outs, metrics, plots, uncached)


def _relative(output: Any, root: Path) -> str:
    return os.path.relpath(output.fs_path, root)


@pytest.fixture(scope="module")
def observed(root: Path) -> dict[tuple[str, str], Observed]:
    """What the `main` of every stage but check_params asks of `stage.run`, for every entry of params.yaml."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        everything = params.load()
        return {
            (name, item): observe(name, item)
            for name in NAMES
            if name != "check_params"
            for item in everything[TEXT[name]["foreach"].strip("${}")]
        }


def observe(name: str, item: str) -> Observed:
    """Call `main(item)` of a stage in the current folder until its work would begin."""
    found: list[Observed] = []

    @contextlib.contextmanager
    def run(stage: str, item: str, inputs: list[str], outputs: list[str]) -> Iterator[Any]:
        paths = [{os.path.normpath(path) for path in side} for side in (inputs, outputs)]
        found.append(Observed(f"{stage}@{item}", *paths))
        raise WorkBegins
        yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "run", run)
        with contextlib.suppress(WorkBegins):
            importlib.import_module(name).main(item)
    assert len(found) == 1, f"{name}: main() did not come to its stage.run"
    return found[0]


@functools.cache
def closure(module: str) -> list[Path]:
    """Return a module under stages/, e.g. `clean` or `kit/arrow`, and all that it imports there."""
    return stage_code.code_files(STAGES / f"{module}.py")


def modules_of(name: str) -> list[str]:
    """Return a stage and the siblings that it imports."""
    imported = {path.stem for path in closure(name) if path.parent == STAGES}
    return [name, *(sibling for sibling in SIBLINGS if sibling in imported)]


def tree(module: str) -> ast.Module:
    return ast.parse((STAGES / f"{module}.py").read_text(encoding="utf-8"))


def docstring(name: str) -> str:
    return ast.get_docstring(tree(name)) or ""


class Read(NamedTuple):
    """One call `read_params(key, model)` in the code of a stage, and the fields that are taken from the result."""

    key: str
    model: str
    fields: set[str]


def reads(module: str) -> list[Read]:
    """Return what a module reads through read_params; `${key}` stands for the placeholder of an f-string."""
    nodes = list(ast.walk(tree(module)))
    calls = [node for node in nodes if isinstance(node, ast.Call) and _called(node) == "read_params"]
    variables = {
        target.id: assign.value
        for assign in nodes
        if isinstance(assign, ast.Assign)
        for target in assign.targets
        if isinstance(target, ast.Name) and assign.value in calls
    }
    fields: dict[int, set[str]] = {id(call): set() for call in calls}
    for node in nodes:
        if isinstance(node, ast.Attribute):
            value = variables.get(node.value.id) if isinstance(node.value, ast.Name) else node.value
            if id(value) in fields:
                fields[id(value)].add(node.attr)
    return [Read(_key(call.args[0]), ast.unparse(call.args[1]).split(".")[-1], fields[id(call)]) for call in calls]


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def _key(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    assert isinstance(node, ast.JoinedStr), f"line {node.lineno}: the key must be a literal or an f-string"
    parts = [part.value if isinstance(part, ast.Constant) else "${key}" for part in node.values]
    assert parts.count("${key}") == 1, f"line {node.lineno}: the key must hold one placeholder"
    return "".join(map(str, parts))


@pytest.mark.parametrize("name", NAMES)
def test_stage_has_a_script_and_a_test(name: str) -> None:
    """Stage = script = test file."""
    assert (STAGES / f"{name}.py").is_file()
    assert (ROOT / "tests" / f"test_{name}.py").is_file()


@pytest.mark.parametrize("name", SIBLINGS)
def test_script_that_is_no_stage_is_part_of_one(name: str) -> None:
    """Nothing in stages/ is dead. What `make repro` alone runs decides no result."""
    is_command = f"python stages/{name}.py" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert any(name in modules_of(stage)[1:] for stage in NAMES) or is_command, f"nothing runs stages/{name}.py"


def test_command_is_the_script_with_the_item(items: list[Item]) -> None:
    """`clean@laws` runs `python stages/clean.py laws`."""
    for one in items:
        assert one.cmd == f"exec python stages/{one.stage}.py {one.item}".strip()


@pytest.mark.parametrize("name", NAMES)
def test_description_is_the_first_sentence_of_the_docstring(name: str) -> None:
    """`dvc stage list` and `--help` say the same."""
    desc = TEXT[name]["do"]["desc"] if "do" in TEXT[name] else TEXT[name]["desc"]
    assert desc == re.split(r"(?<=\.)\s", docstring(name), maxsplit=1)[0].replace("\n", " ")


@pytest.mark.parametrize("name", NAMES)
def test_docstring_says_what_is_read_and_written(name: str) -> None:
    """Each stage says what it reads and writes."""
    for word in ("Reads:", "Writes:"):
        assert word in docstring(name), f"the docstring of stages/{name}.py has no {word}"


@pytest.mark.parametrize("name", NAMES)
def test_code_dependencies_are_the_imports(name: str, items: list[Item]) -> None:
    """Every module under stages/ that a stage imports, at any depth, is a dependency, and no other is."""
    imported = {path.relative_to(ROOT).as_posix() for path in closure(name)}
    found = [one.code for one in items if one.stage == name]
    assert found
    for code in found:
        assert code == imported


def test_code_is_imported_in_ways_that_can_be_followed() -> None:
    """No relative and no dynamic import of our own modules: `code_files` would not see them.

    kit/stage.py calls check_params by name, which can only refuse; the others ask for modules of CPython or of an
    optional package by a name in a variable, which never begins with a name of ours.
    """
    allowed = {"stages/import_python_docs.py", "stages/raw_records.py"}
    for path in sorted(STAGES.rglob("*.py")):
        module = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{module}, line {node.lineno}: relative"
            if not isinstance(node, ast.Call) or _called(node) not in DYNAMIC:
                continue
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            if name is None:
                assert module in allowed, f"{module}, line {node.lineno}: what is imported here?"
            elif (module, name) != ("stages/kit/stage.py", "check_params"):
                assert str(name).split(".")[0] not in {*SCRIPTS, "kit"}, f"{module}, line {node.lineno}"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "check_params"])
def test_params_are_the_keys_that_are_read(name: str, items: list[Item]) -> None:
    """A group is a DVC param; `phase`, `path` and `base` are, too, or stand as `${item...}` in a dependency or output.

    Either way a changed value makes the stage run again.
    """
    text = TEXT[name]["do"]
    paths = json.dumps([text.get(kind, []) for kind in ("deps", "outs", "metrics", "plots")])
    groups: set[str] = set()
    for read in (read for module in modules_of(name) for read in reads(module)):
        if read.model not in ("Source", "Phase"):
            groups.add(read.key)
            continue
        assert read.fields, f"{name}: the {read.model} is passed on whole; take its fields where it is read"
        for field in read.fields:
            declared = f"${{item.{field}}}" in paths or f"{read.key}.{field}" in text.get("params", [])
            assert declared, f"{name} reads `{read.key}.{field}`, which dvc.yaml does not tell DVC"
    groups |= {key for key in text.get("params", []) if key.rsplit(".", 1)[-1] in ("phase", "path", "base")}
    assert set(text.get("params", [])) == groups
    for one in items:
        if one.stage == name:
            assert one.keys == {key.replace("${key}", one.item) for key in groups}


def test_params_of_a_stage_are_read_as_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run record names the value of each, without parsing dvc.yaml."""
    monkeypatch.chdir(ROOT)
    for name, text in TEXT.items():
        assert stage.declared_params(name) == text.get("do", text).get("params", []), name
    assert stage.declared_params("no_such_stage") == []


def test_params_are_read_in_one_way() -> None:
    """Only kit/params.py and the check of the whole file take values from params.yaml: DVC would not know of others.

    kit/stage.py and check_runs.py compare the file with itself.
    """
    for module in sorted(
        {*SCRIPTS, *(f"kit/{name}" for name in KIT)}
        - {"check_params", "check_runs", "params_schema", "kit/params", "kit/stage"}
    ):
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ImportFrom) and node.module == "kit.params":
                allowed = {"Phase", "Source", "phase_sources", "read_params"}
                assert {alias.name for alias in node.names} <= allowed, f"stages/{module}.py, line {node.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("open", "Path"):
                assert not any("params.yaml" in ast.unparse(argument) for argument in node.args), module


@pytest.mark.parametrize("module", sorted({*SCRIPTS, *(f"kit/{name}" for name in KIT)} - ASKERS))
def test_nothing_but_inputs_is_asked_for(module: str) -> None:
    """No environment, clock, machine or hash of Python's, which is another in each process."""
    for node in ast.walk(tree(module)):
        names = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
        names |= {node.attr} if isinstance(node, ast.Attribute) else set()
        names |= {_called(node)} if isinstance(node, ast.Call) else set()
        assert not names & OUTSIDE, f"stages/{module}.py, line {getattr(node, 'lineno', 0)}: {names & OUTSIDE}"


def test_paths_are_those_read_and_written(items: list[Item], observed: dict[tuple[str, str], Observed]) -> None:
    """Inputs are the dependencies; outputs are the outs, or the folders of uncached metrics and plots."""
    for one in items:
        if one.stage == "check_params":
            continue
        seen = observed[one.stage, one.item]
        record = f"metrics/runs/{one.stage}@{one.item}.json"
        declared = one.outs | {os.path.dirname(path) for path in (one.metrics | one.plots) - {record}}  # noqa: PTH120
        assert seen.name == f"{one.stage}@{one.item}"
        assert seen.inputs == one.inputs, seen.name
        assert seen.outputs == declared, seen.name


def test_every_entry_was_observed(items: list[Item], observed: dict[tuple[str, str], Observed]) -> None:
    """The comparison above left no stage out."""
    assert {(one.stage, one.item) for one in items} == {*observed, ("check_params", "")}
    assert {one.stage for one in items} == set(NAMES)


def test_no_folder_has_two_writers(items: list[Item]) -> None:
    """A stage replaces its output folder as a whole, so no other stage writes into or above it."""
    written = [Path(path) for one in items for path in one.outs]
    for one in items:
        shown = {path for path in one.metrics | one.plots if not path.startswith("metrics/runs/")}
        written += [Path(parent) for parent in {os.path.dirname(path) for path in shown}]  # noqa: PTH120
    for folder in written:
        assert not any(folder in (other, *other.parents) for other in written if other is not folder), folder


def test_run_record_is_an_uncached_metric(items: list[Item]) -> None:
    """Each stage declares metrics/runs/STAGE@ITEM.json: in Git, shown by `dvc metrics show`, kept out of the cache.

    Metrics and plots without a cache leave the run cache on; a plain output without a cache switches it off.
    """
    for one in items:
        if one.stage == "check_params":
            assert not one.outs | one.metrics | one.plots
            continue
        assert f"metrics/runs/{one.stage}@{one.item}.json" in one.metrics
        assert one.metrics | one.plots <= one.uncached
        plain = one.outs & one.uncached
        assert plain == (one.outs if one.stage in UNCACHED_OUTS else set()), one.stage


def test_check_params_depends_on_the_whole_file(items: list[Item]) -> None:
    """A change anywhere in params.yaml is checked before other stages are asked."""
    (check,) = (one for one in items if one.stage == "check_params")
    assert check.inputs == {"params.yaml"}
    assert NAMES[0] in TEXT and next(iter(TEXT)) == "check_params"


def test_nothing_hides_a_change_from_dvc() -> None:
    """No `persist`, no `always_changed`, no `frozen`, no `wdir`: each would keep stale rows or void the run cache."""
    words = {"persist", "always_changed", "frozen", "wdir", "no_exec"}
    found = words & set(re.findall(r"[a-z_]+(?=:)", (ROOT / "dvc.yaml").read_text(encoding="utf-8")))
    assert not found


@pytest.mark.parametrize("name", KIT)
def test_kit_module_is_shared_and_alone(name: str) -> None:
    """A module of kit/ imports nothing of ours but what KIT_IMPORTS says, and at least three stages use it."""
    path = STAGES / "kit" / f"{name}.py"
    allowed = {STAGES / "kit" / f"{one}.py" for one in KIT_IMPORTS.get(name, ())}
    assert set(closure(f"kit/{name}")) == {path, *allowed}, "another module is imported than KIT_IMPORTS says"
    users = [one for one in NAMES if one != "check_params" and path in closure(one)]
    assert len(users) >= 3, f"kit/{name}.py is used by {', '.join(users) or 'no stage'}"


def test_names_shadow_no_module() -> None:
    """stages/ is first on the path of each stage: a `tokenize.py` there would replace Python's own for every library.

    kit/ has no __init__.py, so an installed package `kit` would win over it.
    """
    taken = sys.stdlib_module_names | importlib.metadata.packages_distributions().keys()
    ours = {*SCRIPTS, "kit"}
    assert not ours & taken


@pytest.mark.parametrize("module", sorted({*SCRIPTS, *(f"kit/{name}" for name in KIT)} - {"kit/model", *LATE}))
def test_the_top_of_a_module_imports_what_every_install_has(module: str) -> None:
    """Neither an extra, which may not be installed, nor what each start would wait for."""
    for node in tree(module).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        others = {name.split(".")[0] for name in names} - {*sys.stdlib_module_names, *SCRIPTS, "kit"}
        assert others <= LIGHT, f"stages/{module}.py, line {node.lineno}: {others - LIGHT}"


def test_data_stages_import_nothing_heavy() -> None:
    """Importing any module of stages/ but those of LATE loads no torch, transformers, datasets, pandas.

    It costs 0.7 to 6 seconds, which `--help`, a misspelt key and every data stage would wait for.
    """
    modules = [*SCRIPTS, *(f"kit.{name}" for name in KIT)]
    modules = [name for name in modules if name not in LATE]
    code = (
        "import importlib, sys\n"
        f"sys.path.insert(0, {str(STAGES)!r})\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        f"    found = sorted({HEAVY} & sys.modules.keys())\n"
        "    assert not found, f'{name} imports {found}'\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("name", DATA_STAGES)
def test_data_stage_starts_quickly(name: str, root: Path) -> None:
    """From `python stages/NAME.py` to the first work: imports, the check of params.yaml, the stage's own parameters."""
    item = next(iter(YAML(typ="safe").load(root / "params.yaml")[TEXT[name]["foreach"].strip("${}")]))
    code = (
        "import os, runpy, sys\n"
        "sys.path.insert(0, 'stages')\n"
        "from kit import stage\n"
        "stage.run = lambda *a, **k: (print('work', flush=True), os._exit(0))\n"
        f"sys.argv = ['stages/{name}.py', '{item}']\n"
        f"runpy.run_path('stages/{name}.py', run_name='__main__')\n"
    )
    seconds = []
    for _ in range(5):  # the least of five, of CPU time: others use this machine, too
        before = os.times()
        finished = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
        after = os.times()
        seconds.append(after.children_user - before.children_user + after.children_system - before.children_system)
        assert finished.stdout == "work\n", finished.stderr
        if seconds[-1] < START_SECONDS:
            return
    pytest.fail(f"{name} took {min(seconds):.2f} s to start")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_in_docstrings_are_true(path: Path) -> None:
    """What stands behind >>> gives what stands below it."""
    module = path.relative_to(STAGES if STAGES in path.parents else ROOT).with_suffix("")
    assert doctest.testmod(importlib.import_module(".".join(module.parts))).failed == 0


def test_every_parameter_is_described() -> None:
    """`--help` sends the reader to the class Params: each field says what it does, each group has a docstring."""
    bare = []
    for model in [*models(params_schema.Everything), *clean_rules.RULES.values()]:
        if not (model.__doc__ or "").strip():
            bare.append(model.__name__)
        for name, field in model.model_fields.items():
            inherited = [base.model_fields[name] for base in model.__mro__[1:] if name in _fields(base)]
            if not inner(field.annotation) and not any(one.description for one in (field, *inherited)):
                bare.append(f"{model.__module__}.{model.__name__}.{name}")
    assert not bare, f"no description: {', '.join(bare)}"


def test_every_group_refuses_unknown_keys() -> None:
    """A misspelt key is never ignored: each model of the file forbids extra keys."""
    open_models = [m.__name__ for m in models(params_schema.Everything) if m.model_config.get("extra") != "forbid"]
    assert not open_models


def models(model: type[BaseModel]) -> list[type[BaseModel]]:
    """Return a model and those that its fields hold, at any depth."""
    parts = [part for field in model.model_fields.values() for part in inner(field.annotation)]
    return [model, *(found for part in parts for found in models(part))]


def inner(kind: Any) -> list[type[BaseModel]]:
    """Return the models in a type such as `Lora | None` or `dict[str, Source]`."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [model for argument in typing.get_args(kind) for model in inner(argument)]


def _fields(base: type) -> dict[str, Any]:
    return getattr(base, "model_fields", {})


def test_readme_lists_every_stage() -> None:
    """The README's table has one row for each stage, in the order of dvc.yaml."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", readme, re.MULTILINE)
    assert [row for row in rows if row in TEXT] == list(TEXT)


def test_readme_names_every_choice() -> None:
    """Each rule, kind of file, kind of record and chat template that params.yaml may name."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = {*clean_rules.RULES, *raw_params.SUFFIXES, *chat_templates.TEMPLATES}
    names.update(typing.get_args(raw_params.Params.model_fields["record"].annotation))
    assert not {name for name in names if not re.search(rf"\b{name}\b", readme)}
