"""After an edit, what runs again: all that depends on it, and nothing else.

Every test edits a copy of the finished tiny pipeline (tests/tiny.yaml) and asks the real `dvc`. check_params runs after
any edit of params.yaml or of code; it can only refuse, so the sets below leave it out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import networkx
import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from conftest import alive, dvc, git, ran, repro, wait_for, write
from kit import arrow

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:dvc")

Edit = Callable[[Path], None]
PHASES, SOURCES = ("pretrain", "chat"), ("tiny_text", "tiny_notes", "tiny_qa")
PATIENCE = 120.0

# Python runs it at its start, in every stage: once a file of the folder HOLD_AT is opened, it waits.
PAUSE = """
import os, sys, time
done = False
def pause(event, arguments):
    global done
    if event == "open" and not done and str(arguments[0]).startswith(os.environ["HOLD_AT"]):
        done = True
        with open(os.environ["HOLD"] + "/pids", "a") as file:
            file.write(f"{os.getpid()} ")
        while not os.path.exists(os.environ["HOLD"] + "/go"):
            time.sleep(0.02)
sys.addaudithook(pause)
"""


def each(*names: str, of: tuple[str, ...]) -> set[str]:
    """Return stage@item for all names and items."""
    return {f"{name}@{item}" for name in names for item in of}


def stale(folder: Path) -> set[str]:
    """Return the stages that `dvc status` finds changed, without check_params."""
    with Repo(str(folder)) as repo:  # what the command calls, without half a second for its start
        return {name.split(":")[-1] for name in repo.status()} - {"check_params"}


def reach(folder: Path, stages: set[str]) -> set[str]:
    """Return `stages` and all that may follow from them: their descendants in DVC's graph."""
    with Repo(str(folder)) as repo:
        graph = repo.index.graph  # its edges lead from a stage to those that it needs
        named = {one.name: one for one in graph}
        return stages | {one.name for name in stages for one in networkx.ancestors(graph, named[name])}


def runs(folder: Path, *targets: str) -> set[str]:
    """Run `dvc repro` up to `targets` and return the stages that ran, without check_params."""
    return ran(repro(folder, *targets)) - {"check_params"}


def lock(folder: Path) -> dict[str, Any]:
    """Return the stages of dvc.lock."""
    stages: dict[str, Any] = YAML(typ="safe").load(folder / "dvc.lock")["stages"]
    return stages


def digests(folder: Path) -> dict[str, str]:
    """Return path and digest of the outputs under data/ and models/ in dvc.lock."""
    outs = {out["path"]: out["md5"] for one in lock(folder).values() for out in one.get("outs", [])}
    return {path: md5 for path, md5 in outs.items() if path.startswith(("data/", "models/"))}


def param(key: str, value: Any) -> Edit:
    """Return the edit that sets a dotted key of params.yaml; None removes it."""

    def edit(folder: Path) -> None:
        yaml = YAML()
        content = yaml.load(folder / "params.yaml")
        *parents, last = key.split(".")
        group = content
        for name in parents:
            group = group[name]
        if value is None:
            del group[last]
        else:
            group[last] = value
        yaml.dump(content, folder / "params.yaml")

    return edit


def append(path: str, text: str) -> Edit:
    """Return the edit that adds text at the end of a file."""

    def edit(folder: Path) -> None:
        write(folder / path, (folder / path).read_bytes().decode() + text if (folder / path).exists() else text)

    return edit


def comment(path: str) -> Edit:
    """Return the edit that adds a comment to a module."""
    return append(path, "# another comment\n")


def touch_everything(folder: Path) -> None:
    """Give every raw file and every module a new time stamp."""
    for top in ("data/raw", "stages", "models/configs"):
        for path in (folder / top).rglob("*"):
            os.utime(path, (1e9, 1e9))


MODELS = ("train_model", "merge_lora", "evaluate_model")
BY_SOURCE, BY_PHASE = ("clean", "add_bos_eos", "tokenize_text"), ("dedup", "train_tokenizer", "group_blocks")
EVERYTHING = each(*BY_SOURCE, of=SOURCES) | each(*BY_PHASE, *MODELS, "describe_model", of=PHASES)
OF_CHAT = {one for one in EVERYTHING if one.endswith(("@chat", "@tiny_qa"))}
NEW_ROW = '{"instruction": "Is the Po long?", "input": "", "output": "It is."}\n'

EDITS: list[tuple[str, Edit, set[str]]] = [
    ("all time stamps", touch_everything, set()),
    ("what a kill left", append("data/clean/pretrain/.tmp-tiny_text/documents/data-00000.arrow", "x"), set()),
    ("byte code", append("stages/kit/__pycache__/stage.cpython-39.pyc", "x"), set()),
    ("comment in params.yaml", append("params.yaml", "# a comment\n"), set()),
    ("comment in train_loop", comment("stages/train_loop.py"), each("train_model", of=PHASES)),
    ("comment in kit/stage", comment("stages/kit/stage.py"), EVERYTHING),
    ("licence", param("sources.tiny_qa.clean.license", "MIT"), {"clean@tiny_qa"}),
    ("held-out share", param("phases.chat.dedup.eval_fraction", 0.3), {"dedup@chat"}),
    ("chat template", param("phases.chat.train_tokenizer.chat_template", None), {"train_tokenizer@chat"}),
    ("block size", param("phases.chat.group_blocks.block_size", 64), {"group_blocks@chat"}),
    ("learning rate", param("phases.chat.train_model.learning_rate", 0.1), {"train_model@chat"}),
    ("prompts", param("phases.chat.evaluate_model.prompts", ["Why?"]), {"evaluate_model@chat"}),
    (
        "shape of the first model",
        append("models/configs/tiny/config.json", "\n"),
        each("train_tokenizer", *MODELS, of=("pretrain",)),
    ),
    ("new document", append("data/raw/tiny_text/new.txt", "The Po.\n"), {"clean@tiny_text"}),
    ("file that is the source", append("data/raw/tiny_notes.txt", "Note 21\n"), {"clean@tiny_notes"}),
]


@pytest.mark.parametrize(("edit", "expected"), [pair[1:] for pair in EDITS], ids=[name for name, *_ in EDITS])
def test_edit_makes_stale_what_reads_it(workspace: Path, edit: Edit, expected: set[str]) -> None:
    """`dvc status` names exactly the stages that read what was edited; of the others, only descendants may follow.

    `pretrain` is made before `chat`: what is stale in chat alone never leads to a stage of pretrain.
    """
    edit(workspace)
    assert stale(workspace) == expected
    if expected and expected <= OF_CHAT:
        reached = reach(workspace, expected)
        assert reached <= OF_CHAT
        assert "describe_model@chat" in reached
        if expected == {"evaluate_model@chat"}:
            assert "train_model@chat" not in reached


def test_comment_in_clean_runs_clean_alone(workspace: Path) -> None:
    """clean runs again and gives equal bytes; DVC sees that, and nothing after it runs."""
    before = digests(workspace)
    comment("stages/clean.py")(workspace)
    output = repro(workspace)
    assert ran(output) == {"check_params", *each("clean", of=SOURCES)}
    assert "Stage 'dedup@pretrain' didn't change, skipping" in output
    assert digests(workspace) == before


def test_corrected_licence_runs_clean_and_the_card(workspace: Path) -> None:
    """A note about a source decides no document: nothing is trained or evaluated again."""
    param("sources.tiny_qa.clean.license", "MIT")(workspace)
    assert runs(workspace) == {"clean@tiny_qa", "describe_model@chat"}
    assert "MIT" in (workspace / "reports/chat/model_card.md").read_text()


def test_project_that_moves_runs_nothing(workspace: Path, tmp_path: Path) -> None:
    """No output depends on where the repository lies, nor on the number of workers."""
    moved = Path(shutil.move(workspace, tmp_path / "elsewhere/project"))
    assert ran(repro(moved, TERROIR_WORKERS="2", PYTHONHASHSEED="7")) == set()


def test_raw_folder_that_moves_runs_clean_alone(workspace: Path) -> None:
    """The same files under another `path` are the same text: clean runs and gives equal bytes."""
    (workspace / "data/raw/tiny_text").rename(workspace / "data/raw/laws")
    param("sources.tiny_text.path", "data/raw/laws")(workspace)
    assert runs(workspace, "group_blocks@pretrain") == {"clean@tiny_text"}
    assert stale(workspace) == set()


def test_renamed_raw_file_runs_what_names_it(workspace: Path) -> None:
    """The file's name stands in documents and ledger: what reads them runs, up to where bytes are equal again."""
    before = digests(workspace)
    (workspace / "data/raw/tiny_text/07.txt").rename(workspace / "data/raw/tiny_text/07 renamed.txt")
    expected = {"clean@tiny_text", "dedup@pretrain", "train_tokenizer@pretrain", "add_bos_eos@tiny_text"}
    assert runs(workspace, "train_model@pretrain") == expected
    changed = {path for path, md5 in digests(workspace).items() if before[path] != md5}
    assert changed == {"data/clean/pretrain/tiny_text"}


def test_new_document_runs_the_data_stages_of_its_phase(workspace: Path) -> None:
    """Its phase is made anew, from its source on; other sources of other phases keep their stages and bytes."""
    before = digests(workspace)
    append("data/raw/tiny_qa/qa.jsonl", NEW_ROW)(workspace)
    assert runs(workspace, "group_blocks@chat") <= OF_CHAT
    after = digests(workspace)
    changed = {path for path in after if before[path] != after[path]}
    assert changed >= {"data/clean/chat/tiny_qa", "data/dedup/chat", "data/tokens/chat/tiny_qa", "data/blocks/chat"}
    assert all("chat" in path for path in changed)
    assert stale(workspace) == each("train_model", "merge_lora", "evaluate_model", "describe_model", of=("chat",))


def test_param_set_back_is_restored_without_a_run(workspace: Path) -> None:
    """DVC's run cache knows every stage that once ran: undoing an experiment costs nothing."""
    before, record = digests(workspace), (workspace / "metrics/runs/dedup@chat.json").read_bytes()
    param("phases.chat.dedup.seed", 1)(workspace)
    assert runs(workspace, "dedup@chat") == {"dedup@chat"}
    assert digests(workspace) != before
    param("phases.chat.dedup.seed", 0)(workspace)
    output = repro(workspace)
    assert ran(output) <= {"check_params"}
    assert "Stage 'dedup@chat' is cached - skipping run, checking out outputs" in output
    assert digests(workspace) == before
    assert (workspace / "metrics/runs/dedup@chat.json").read_bytes() == record


def test_clone_with_the_cache_runs_nothing(workspace: Path, tmp_path: Path) -> None:
    """A colleague's clone with the same cache and raw text has all results with `dvc repro`, and Git is clean."""
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(workspace), str(clone))
    shutil.copytree(workspace / ".dvc/cache", clone / ".dvc/cache")
    shutil.copytree(workspace / "data/raw", clone / "data/raw")
    assert ran(repro(clone)) == set()
    assert digests(clone) == digests(workspace)
    assert git(clone, "status", "--porcelain") == ""


# --- mistakes ----------------------------------------------------------------------------------------------------


def refused(folder: Path, *arguments: str) -> str:
    """Run `dvc repro`, which must fail without a traceback, and return what it prints."""
    finished = dvc(folder, "repro", *arguments)
    assert finished.returncode != 0, finished.stdout
    assert "Traceback" not in finished.stdout, finished.stdout
    return finished.stdout


def test_removed_source_leaves_no_text_behind(workspace: Path) -> None:
    """Its folders would still be read by the phase: `dvc repro` refuses until they are deleted, and says how."""
    param("sources.tiny_notes", None)(workspace)
    before = lock(workspace)
    sentence = "data/clean/pretrain/tiny_notes belongs to no source in params.yaml"
    assert sentence in refused(workspace)
    assert lock(workspace) == before
    for _ in range(9):  # what a user does who follows the sentence
        check = [sys.executable, "stages/check_params.py"]
        advice = subprocess.run(check, cwd=workspace, capture_output=True, text=True, check=False).stderr
        if not advice:
            break
        folders = advice.split("rm -r ")[1].split()
        assert all(re.fullmatch(r"data/\w+/pretrain/tiny_notes", folder) for folder in folders), advice
        for folder in folders:
            shutil.rmtree(workspace / folder)
    assert {"dedup@pretrain", "train_tokenizer@pretrain"} <= runs(workspace, "group_blocks@pretrain")
    rows = arrow.manifest(workspace / "data/tokens/pretrain/tiny_text")["counts"]["rows"]
    blocks = [arrow.manifest(workspace / "data/blocks/pretrain" / split) for split in ("train", "eval")]
    assert sum(manifest["counts"]["documents"] for manifest in blocks) == rows


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (
            append("params.yaml", "phasess: {}\n"),
            r"params\.yaml line \d+: unknown key `phasess`; did you mean `phases`\?",
        ),
        (param("sources.tiny_qa.path", "../secret"), r"params\.yaml line \d+: .*leads out of the repository"),
    ],
    ids=["misspelt group", "path outside"],
)
def test_mistake_in_params_stops_repro(workspace: Path, edit: Edit, sentence: str) -> None:
    """One sentence from the stage, one line from DVC; nothing ran and nothing changed."""
    before = digests(workspace)
    edit(workspace)
    output = refused(workspace)
    assert len(re.findall(sentence, output)) == 1, output
    assert digests(workspace) == before
    git(workspace, "checkout", "--quiet", "params.yaml")
    assert stale(workspace) == set()


def test_missing_raw_folder_stops_repro(workspace: Path) -> None:
    """The path that is missing is named."""
    (workspace / "data/raw/tiny_qa").rename(workspace / "data/raw/other")
    assert "data/raw/tiny_qa" in refused(workspace)
    (workspace / "data/raw/other").rename(workspace / "data/raw/tiny_qa")
    assert runs(workspace) == set()


def test_output_of_a_failed_stage_comes_back(workspace: Path) -> None:
    """DVC deletes outputs before it runs a stage; after a failure `dvc checkout` brings the previous ones back."""
    good = (workspace / "data/raw/tiny_qa/qa.jsonl").read_bytes()
    before = (workspace / "data/clean/chat/tiny_qa/documents/data-00000.arrow").read_bytes()
    append("data/raw/tiny_qa/qa.jsonl", "{not JSON\n")(workspace)
    assert "data/raw/tiny_qa/qa.jsonl: line 61" in refused(workspace, "clean@tiny_qa")
    assert dvc(workspace, "checkout").returncode == 0
    assert (workspace / "data/clean/chat/tiny_qa/documents/data-00000.arrow").read_bytes() == before
    (workspace / "data/raw/tiny_qa/qa.jsonl").write_bytes(good)
    assert runs(workspace, "clean@tiny_qa") == set()


# --- in the middle of a stage ------------------------------------------------------------------------------------


class Held:
    """A `dvc repro` whose stage waits in the middle of writing its output."""

    def __init__(self, folder: Path, target: str, at: str) -> None:
        self.hold = folder.parent / "hold"
        write(self.hold / "sitecustomize.py", PAUSE)
        environment = {"PYTHONPATH": str(self.hold), "HOLD": str(self.hold), "HOLD_AT": at}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro", target],
            cwd=folder,
            env={**os.environ, **environment, "DVC_SITE_CACHE_DIR": str(folder.parent / f"{folder.name}.dvc-notes")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wait_for(lambda: (self.hold / "pids").exists() and bool((self.hold / "pids").read_text()))
        self.stage = int((self.hold / "pids").read_text())

    def release(self) -> str:
        """Let the stage go on; return what `dvc repro` printed when it has ended."""
        (self.hold / "go").touch()
        return self.process.communicate(timeout=PATIENCE)[0]


@pytest.fixture
def held(workspace: Path) -> Iterator[Callable[[], Held]]:
    """Start `dvc repro clean@tiny_qa` on new text and hold the stage while it writes."""
    started: list[Held] = []

    def start() -> Held:
        append("data/raw/tiny_qa/qa.jsonl", NEW_ROW)(workspace)
        started.append(Held(workspace, "clean@tiny_qa", "data/clean/chat/.tmp-tiny_qa"))
        return started[-1]

    yield start
    for one in started:
        (one.hold / "go").touch()
        one.process.kill()
        one.process.wait()


def test_killed_repro_leaves_no_second_writer(workspace: Path, held: Callable[[], Held]) -> None:
    """While a stage works no other process gets at its output; it dies with `dvc repro`, and the next one finishes."""
    one = held()
    second = [sys.executable, "stages/clean.py", "tiny_qa"]
    by_hand = subprocess.run(second, cwd=workspace, capture_output=True, text=True, check=False)
    assert by_hand.returncode == 1
    assert by_hand.stderr.startswith(f"data/clean/chat/tiny_qa is being written by process {one.stage};")
    assert alive(one.stage)
    one.process.kill()
    one.process.wait(PATIENCE)
    wait_for(lambda: not alive(one.stage), seconds=2)
    assert (workspace / "data/clean/chat/.tmp-tiny_qa").exists()
    assert runs(workspace, "clean@tiny_qa") == {"clean@tiny_qa"}
    assert not (workspace / "data/clean/chat/.tmp-tiny_qa").exists()
    assert arrow.table(workspace / "data/clean/chat/tiny_qa/documents").num_rows == 61


def test_input_edited_during_repro_is_refused(workspace: Path, held: Callable[[], Held]) -> None:
    """DVC would hash the edited input and tie it to the output of the old one: dvc.lock must not lie."""
    one = held()
    before = lock(workspace)
    append("data/raw/tiny_qa/qa.jsonl", NEW_ROW.replace("Po", "Arno"))(workspace)
    output = one.release()
    assert one.process.returncode != 0
    assert "clean@tiny_qa: data/raw/tiny_qa changed while the stage ran; nothing was published" in output
    assert lock(workspace) == before
    assert runs(workspace, "clean@tiny_qa") == {"clean@tiny_qa"}
    assert arrow.table(workspace / "data/clean/chat/tiny_qa/documents").num_rows == 62


LONG = [{"rule": "length", "min_chars": 60}]


@pytest.mark.parametrize(
    ("edit", "name"),
    [
        (param("sources.tiny_qa.clean.rules", LONG), "sources.tiny_qa.clean in params.yaml"),
        (comment("stages/clean.py"), "stages/clean.py"),
    ],
    ids=["params", "code"],
)
def test_params_and_code_edited_during_repro(workspace: Path, held: Callable[[], Held], edit: Edit, name: str) -> None:
    """DVC reads them after the command, too, and would tie the new ones to the output of the old."""
    one = held()
    before = lock(workspace)
    edit(workspace)
    assert f"clean@tiny_qa: {name} changed while the stage ran; nothing was published" in one.release()
    assert one.process.returncode != 0
    assert lock(workspace) == before
    assert runs(workspace, "clean@tiny_qa") == {"clean@tiny_qa"}
    kept = arrow.table(workspace / "data/clean/chat/tiny_qa/documents").num_rows
    assert (kept < 61) == ("params" in name)


def test_other_params_edited_during_repro(workspace: Path, held: Callable[[], Held]) -> None:
    """While one stage works, the parameters of others may be written: nothing that ran is lost or stale."""
    one = held()
    param("phases.chat.train_model.learning_rate", 0.1)(workspace)
    assert "61 kept" in one.release()
    assert one.process.returncode == 0
    assert "clean@tiny_qa" not in stale(workspace)
