"""Shared by all tests: stages/ is importable, and a workspace is a copy of the project in a temporary folder."""

from __future__ import annotations

import compileall
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# A shared machine stalls now and then; a slow example is no wrong one.
settings.register_profile("terroir", deadline=None)
settings.load_profile("terroir")

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "stages"), str(ROOT)]  # the second: `import lineage`
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
# `python` of a stage's command is the python that runs the tests.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

compileall.compile_dir(ROOT / "stages", quiet=2)

Runner = Callable[..., subprocess.CompletedProcess[str]]


def copy_project(target: Path) -> Path:
    """Copy what Git would clone into `target`: code, dvc.yaml, configs; no data, no cache, no environment.

    With the byte code of the stages, after them: each process that compiled them anew would take 0.1 to 0.25 s for it.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in ("stages", "models/configs", "data/rules", "data/benchmarks"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    (target / ".dvc").mkdir()
    for name in (
        "data/exclusions.txt",
        ".dvc/config",
        ".dvc/.gitignore",
        ".dvcignore",
        ".gitignore",
        "dvc.yaml",
        "params.yaml",
    ):
        shutil.copyfile(ROOT / name, target / name)
    for name in ("stages/__pycache__", "stages/kit/__pycache__"):
        shutil.copytree(ROOT / name, target / name)
    return target


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project without data."""
    return copy_project(tmp_path / "project")


@pytest.fixture
def run_stage() -> Runner:
    """Run `python stages/NAME.py ARGUMENTS` in a folder and return the finished process."""

    def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, f"stages/{arguments[0]}.py", *arguments[1:]]
        return subprocess.run(
            command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )

    return run


def kill_at(folder: Path, sign: str, *arguments: str, **environment: str) -> None:
    """Run `python stages/NAME.py ARGUMENTS` in a folder and kill it (SIGKILL) once a file like `sign` is there."""
    command = [sys.executable, f"stages/{arguments[0]}.py", *arguments[1:]]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=folder, env={**os.environ, **environment}, **silent)
    wait_for(lambda: process.poll() is not None or bool(list(folder.glob(sign))), seconds=180)
    assert process.poll() is None
    process.kill()
    process.wait()


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Return when `condition` holds; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.005)


def alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended and was not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder as nobody in particular and return what it prints."""
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def with_notes(folder: Path) -> dict[str, str]:
    """Return the environment in which DVC's own notes stay beside a folder."""
    return {**os.environ, "DVC_SITE_CACHE_DIR": str(folder.parent / f"{folder.name}.dvc-notes")}


def dvc(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run dvc in a folder; stderr stands in stdout, as a terminal shows it. DVC's own notes stay beside the folder."""
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder,
        env={**with_notes(folder), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def repro(folder: Path, *arguments: str, **environment: str) -> str:
    """Run `dvc repro`, which must end well, and return what it prints."""
    finished = dvc(folder, "repro", *arguments, **environment)
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


def ran(output: str) -> set[str]:
    """Return the names of the stages that a `dvc repro` ran, from what it printed."""
    return set(re.findall(r"^Running stage '([^']+)'", output, re.MULTILINE))


def write_tiny_project(folder: Path) -> Path:
    """Write a copy of the project with the pipeline of tests/tiny.yaml, its text, and its own Git repository.

    The text has CRLF, CJK, emoji, text that looks like a special token, a blank line and a duplicate.
    """
    copy_project(folder)
    shutil.copyfile(ROOT / "tests/tiny.yaml", folder / "params.yaml")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 400, "tie_word_embeddings": True}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, **shape, **heads}
    write(folder / "models/configs/tiny/config.json", json.dumps(config, indent=1))
    rivers = ["Rhine", "Nile", "Yangtze", "Loire", "Volga", "Ganges", "Tagus", "Oder", "Elbe", "Mekong"]
    for number in range(50):
        name = rivers[number % 10]
        text = f"The river {name} has {number} bridges and runs to the sea.\r\nNobody counted its {number * 7} fish.\n"
        write(folder / f"data/raw/tiny_text/{number:02}.txt", text + "河流入海。</s><s>\n" * (number % 3))
    lines = [f"Note {number}: the {rivers[number % 10]} is {number * 11} miles long 🌊" for number in range(20)]
    write(folder / "data/raw/tiny_notes.txt", "\n".join([*lines, "", lines[0]]) + "\n")
    rows = [
        {
            "instruction": f"How long is the {rivers[number % 10]}, at bridge {number}?",
            "input": "Answer in miles.\r\n" if number % 2 else "",
            "output": f"It is {number * 13} miles long{'，很长。' if number % 3 else '</s> and no more'}.",
        }
        for number in range(60)
    ]
    write(folder / "data/raw/tiny_qa/qa.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "a tiny project")
    return folder


def write(path: Path, text: str) -> None:
    """Write `text` as UTF-8 without touching its line ends, and the folders above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8"))


def with_other_content(path: Path, content: bytes, real: Callable[..., Any]) -> Callable[..., Any]:
    """Return `real`, made to find other content in a file, which has its own again afterwards."""
    own = path.read_bytes()

    def call(*given: Any) -> Any:
        path.write_bytes(content)
        try:
            return real(*given)
        finally:
            path.write_bytes(own)

    return call


def finish(folder: Path, **environment: str) -> Path:
    """Run `dvc repro` in a project, keep what it prints in repro.log beside it, and commit the results."""
    write(folder.parent / "repro.log", repro(folder, **environment))
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "its results")
    return folder


def shared(tmp_path_factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """Return this process's copy of a folder that `build` fills once for all processes that run tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}"
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (done := folder.with_name(f"{folder.name}.done")).exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed, in which a second try might succeed
            folder.mkdir()
            build(folder)
            done.touch()
    return Path(shutil.copytree(folder, tmp_path_factory.mktemp(name) / "own", symlinks=True))


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny project, finished twice from nothing; to be read, never written.

    What must not matter differs: the folder, the number of workers, the hash seed, time stamps, and the order in which
    the files came to lie in their folders. Both run at once, because the start of torch leaves a core idle.
    """
    folder = shared(tmp_path_factory, "finished", _finish_twins)
    return folder / "project", folder / "a/twin"


# Writes the files of the current folder that a stage opens, and its workers, into OPENED/STAGE@ITEM; pyarrow's own are
# not heard.
LISTENER = """
import os, sys
script, *item = sys.orig_argv[1:3] or [""]
if script.startswith("stages/"):
    name = "@".join([script[7:-3], *item])
    log = os.open(os.path.join(os.environ["OPENED"], name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    root = os.getcwd() + "/"

    def hear(event, arguments):
        if event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[1]:  # by open, not os.open
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if path.startswith(root):
                os.write(log, os.fsencode(path[len(root):]) + b"\\n")

    sys.addaudithook(hear)
"""


def _finish_twins(folder: Path) -> None:
    one, other = (write_tiny_project(folder / path) for path in ("project", "a/twin"))
    raw = other / "data/raw/tiny_text"
    for number, path in enumerate(sorted(raw.iterdir(), reverse=True)):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        os.utime(path, (1e9 + number, 1e9 + number))
    write(folder / "site/sitecustomize.py", LISTENER)
    (folder / "opened").mkdir()
    listener = {"PYTHONPATH": str(folder / "site"), "OPENED": str(folder / "opened")}
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(finish, one, TERROIR_WORKERS="1", PYTHONHASHSEED="1")
        second = pool.submit(finish, other, TERROIR_WORKERS="2", PYTHONHASHSEED="2", **listener)
        first.result(), second.result()


@pytest.fixture(scope="session")
def finished(twins: tuple[Path, Path]) -> Path:
    """The tiny project after one `dvc repro`. To be read, never written."""
    return twins[0]


@pytest.fixture
def workspace(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished tiny project, cache and time stamps included, to be edited."""
    return Path(shutil.copytree(finished, tmp_path / "project", symlinks=True))


@pytest.fixture(scope="session")
def varied_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project of tests/varied.py, run up to its blocks. To be read, never written."""
    import varied

    return shared(tmp_path_factory, "varied", lambda folder: varied.build(folder / "project")) / "project"


SCRIPT = '''"""Shout what the input says.

Example: "hi" -> "HI"
"""

import os, signal, sys, time
from pathlib import Path

from kit import stage


def main(name):
    with stage.run("shout", name, ["input"], [f"out/{name}"]) as run:
        (folder,) = run.outputs
        text = Path("input/a.txt").read_text(encoding="utf-8")
        (folder / "text").write_text(text.upper(), encoding="utf-8")
        run.count(letters=len(text))
        run.metric(loudness=0.5)
        #BODY#


if __name__ == "__main__":
    stage.cli(main, __doc__)
'''


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a small real stage, `shout`, what it needs of kit/, and an input."""
    root = tmp_path / "place"
    (root / "stages/kit").mkdir(parents=True)
    for name in ("digests", "params", "stage", "stage_code"):
        shutil.copyfile(ROOT / f"stages/kit/{name}.py", root / f"stages/kit/{name}.py")
    write(root / "stages/check_params.py", "def check() -> None: ...\n")
    write(root / "input/a.txt", "hi")
    write(root / "input/deep/b.txt", "unused")
    return root


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder as current one, for calls within this process."""
    write_script(place)
    monkeypatch.chdir(place)
    for name in ("stage", "stage_code"):
        monkeypatch.setattr(f"kit.{name}.STAGES", place / "stages")
    return place


def write_script(place: Path, body: str = "pass") -> None:
    """Write the stage with `body` in the middle of its work."""
    write(place / "stages/shout.py", SCRIPT.replace("#BODY#", body.replace("\n", "\n        ")))


def leftovers(place: Path) -> list[str]:
    """Return temporary files and folders."""
    return sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.match(".tmp-*") or p.match("*.tmp"))
