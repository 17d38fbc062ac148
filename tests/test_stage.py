"""kit/stage.py keeps its contract: whatever happens to a stage, an output is whole and belongs to its inputs.

Most tests run a small real stage as a process of its own, because that is what is killed, stopped or run twice.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT, alive, git, wait_for, write
from kit import stage

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
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
# A stage that waits in the middle of its work until the test lets it go on.
WAIT = 'Path("waiting").touch()\nwhile not Path("go").exists(): time.sleep(0.02)'
PATIENCE = 60.0  # seconds until a test gives up on something that takes one

files = st.dictionaries(
    st.from_regex(r"[a-c]{1,2}(/[a-cé]{1,2})?\.txt", fullmatch=True), st.binary(max_size=20), min_size=1, max_size=5
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the stage `shout`, kit/stage.py and an input."""
    root = tmp_path / "place"
    (root / "stages/kit").mkdir(parents=True)
    shutil.copyfile(ROOT / "stages/kit/stage.py", root / "stages/kit/stage.py")
    write(root / "stages/check_params.py", "def check() -> None: ...\n")
    write(root / "input/a.txt", "hi")
    write(root / "input/deep/b.txt", "unused")
    return root


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder as current one, for calls within this process."""
    write_script(place)
    monkeypatch.chdir(place)
    monkeypatch.setattr(stage, "STAGES", place / "stages")
    return place


def write_script(place: Path, body: str = "pass") -> None:
    """Write the stage with `body` in the middle of its work."""
    write(place / "stages/shout.py", SCRIPT.replace("#BODY#", body.replace("\n", "\n        ")))


def start(place: Path, body: str = "pass", name: str = "x", **environment: str) -> subprocess.Popen[str]:
    """Start the stage."""
    write_script(place, body)
    return subprocess.Popen(
        [sys.executable, "stages/shout.py", name],
        cwd=place,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def shout(place: Path, body: str = "pass", name: str = "x", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the stage."""
    process = start(place, body, name, **environment)
    out, err = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess([], process.returncode, out, err)


def published(place: Path, name: str = "x") -> str | None:
    """Return the text of the output, or None."""
    path = place / "out" / name / "text"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def leftovers(place: Path) -> list[str]:
    """Return temporary files and folders."""
    return sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.match(".tmp-*") or p.match("*.tmp"))


def sentence(finished: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that a refused stage prints to stderr."""
    assert finished.returncode == 1, (finished.returncode, finished.stderr)
    assert len(finished.stderr.splitlines()) == 1, finished.stderr
    return finished.stderr


# --- one run -----------------------------------------------------------------------------------------------------


def test_output_is_published_whole(place: Path) -> None:
    """The example of the docstring: the folder is there, a line says the counts, nothing else is left."""
    finished = shout(place)
    assert finished.returncode == 0, finished.stderr
    assert published(place) == "HI"
    assert finished.stdout.startswith("shout@x: 2 letters, 0.5000 loudness (")
    assert leftovers(place) == []


def test_output_replaces_the_previous_one_as_a_whole(place: Path) -> None:
    """No file of an earlier output stays beside the new ones."""
    write(place / "out/x/old", "of an earlier run")
    shout(place)
    assert sorted(path.name for path in (place / "out/x").iterdir()) == ["text"]


def test_help_names_the_keys_of_the_stage(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import dedup

    monkeypatch.setattr(sys, "argv", ["stages/dedup.py", "--help"])
    with pytest.raises(SystemExit):
        stage.cli(dedup.main, dedup.__doc__)
    assert "eval_fraction (default: 0.05): share of the documents held out for evaluation" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_is_the_docstring(place: Path, arguments: list[str]) -> None:
    """`--help` ends well, a call without a name does not; both say what the stage does."""
    write_script(place)
    command = [sys.executable, "stages/shout.py", *arguments]
    finished = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert finished.returncode == (0 if arguments else 2)
    assert finished.stdout.startswith("usage: python stages/shout.py NAME\n\nShout what the input says.\n")
    assert not (place / "out").exists()


def test_params_are_checked_first(place: Path) -> None:
    """A mistake in params.yaml stops a stage before it touches anything."""
    write(place / "stages/check_params.py", "def check():\n    raise SystemExit('params.yaml line 1: a mistake')\n")
    assert sentence(shout(place)) == "params.yaml line 1: a mistake\n"
    assert not (place / "out").exists()


def test_several_outputs_are_published_together(here: Path) -> None:
    """A stage may write more than one folder."""
    with stage.run("shout", "x", ["input"], ["out/a", "out/b"]) as run:
        for folder in run.outputs:
            write(folder / "text", folder.name)
    assert (here / "out/a/text").is_file()
    assert (here / "out/b/text").is_file()


def test_a_failure_publishes_none_of_several_outputs(here: Path) -> None:
    """When the second folder could not be written, the first stays as it was, too."""
    write(here / "out/a/text", "old")
    with pytest.raises(RuntimeError), stage.run("shout", "x", ["input"], ["out/a", "out/b"]) as run:
        write(run.outputs[0] / "text", "new")
        raise RuntimeError
    assert (here / "out/a/text").read_text() == "old"
    assert not (here / "out/b").exists()
    assert leftovers(here) == []


# --- inputs that change, are missing or empty --------------------------------------------------------------------


@pytest.mark.parametrize(
    "edit",
    [
        'Path("input/a.txt").write_text("ho")',
        'Path("input/deep/c.txt").write_text("added")',
        'Path("input/deep/b.txt").unlink()',
        'Path("input/deep/b.txt").rename("input/deep/c.txt")',
        'Path("input/a.txt").write_text("ho"); os.utime("input/a.txt", (1, 1))',
    ],
    ids=["edited", "added", "removed", "renamed", "edited, size and mtime kept"],
)
def test_input_changed_while_it_was_read_is_refused(place: Path, edit: str) -> None:
    """DVC hashes inputs after the command: it would tie the new input to an output made from the old one."""
    shout(place)
    write(place / "input/a.txt", "he")
    os.utime(place / "input/a.txt", (1, 1))
    refused = sentence(shout(place, edit))
    assert refused.startswith("shout@x: input changed while the stage ran; nothing was published")
    assert published(place) == "HI"
    assert leftovers(place) == []


@pytest.mark.parametrize("module", ["shout", "kit/stage", "helper"])
def test_code_changed_while_the_stage_ran_is_refused(place: Path, module: str) -> None:
    """Code is an input, too: DVC would tie the new code to the output of the old one."""
    write(place / "stages/helper.py", "")
    edit = f"import helper; file = open('stages/{module}.py', 'a'); file.write('# new'); file.close()"
    assert sentence(shout(place, edit)).startswith(f"shout@x: stages/{module}.py changed while the stage ran;")
    assert published(place) is None


def test_other_code_may_change_while_the_stage_runs(place: Path) -> None:
    """A module that the stage does not import is none of its inputs."""
    write(place / "stages/other.py", "")
    assert shout(place, "Path('stages/other.py').write_text('new = 1')").returncode == 0


PIPELINE = "stages: {shout: {foreach: '${loud}', do: {cmd: x, params: ['loud.${key}.how', volume]}}}\n"
PARAMS = "volume: 1\nloud:\n  x: {how: 1, who: 1}\n  y: {how: 1}\n"


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("x: {how: 1", "x: {how: 2", "loud.x.how"),
        ("volume: 1", "volume: [1]", "volume"),
        ("  x: {how: 1, who: 1}", "  x:", "loud.x.how"),
        ("volume", "{", None),
    ],
)
def test_param_changed_while_the_stage_ran_is_refused(place: Path, old: str, new: str, key: str | None) -> None:
    """The parameters of the stage are inputs, too; DVC would write the new values beside the old output."""
    write(place / "dvc.yaml", PIPELINE)
    write(place / "params.yaml", PARAMS)
    refused = sentence(shout(place, f"Path('params.yaml').write_text({PARAMS.replace(old, new)!r})"))
    what = f"{key} in params.yaml" if key else "params.yaml"
    assert refused.startswith(f"shout@x: {what} changed while the stage ran; nothing was published")
    assert published(place) is None


@pytest.mark.parametrize(
    ("old", "new"), [("y: {how: 1", "y: {how: 2"), ("who: 1", "who: 2"), ("volume", "# note\nvolume")]
)
def test_other_params_may_change_while_the_stage_runs(place: Path, old: str, new: str) -> None:
    """While one phase trains for hours, the next is written."""
    write(place / "dvc.yaml", PIPELINE)
    write(place / "params.yaml", PARAMS)
    assert shout(place, f"Path('params.yaml').write_text({PARAMS.replace(old, new)!r})").returncode == 0


def test_input_changed_at_the_very_end_is_refused(place: Path) -> None:
    """To write a large output to the disk takes a while: the comparison comes after it."""
    late = "record = stage._record\nstage._record = lambda *a: (record(*a), Path('input/a.txt').write_text('ho'))"
    assert "input changed while the stage ran" in sentence(shout(place, late))
    assert published(place) is None


def test_input_that_is_gone_at_the_end_is_refused(place: Path) -> None:
    """Deleting the whole input in the middle is a change, too."""
    shout(place)
    refused = sentence(shout(place, "import shutil; shutil.rmtree('input')"))
    assert "input does not exist" in refused
    assert published(place) == "HI"


def test_input_that_is_only_touched_is_accepted(place: Path) -> None:
    """A new time stamp is no change."""
    assert shout(place, 'os.utime("input/a.txt", (1, 1))').returncode == 0


def test_missing_or_empty_input_is_named(place: Path) -> None:
    """The sentence says which path, and who writes it."""
    shutil.rmtree(place / "input")
    assert "input does not exist; put the files there, or run the stage that writes it" in sentence(shout(place))
    (place / "input/deep").mkdir(parents=True)
    assert "input is empty" in sentence(shout(place))
    assert published(place) is None


def test_link_to_a_file_and_a_linked_input_are_read(here: Path) -> None:
    """The content counts: a file that is a link, and an input that is itself a link to a folder."""
    plain = stage.digest(Path("input"))
    Path("input/a.txt").rename("a.txt")
    Path("input/a.txt").symlink_to("../a.txt")
    Path("linked").symlink_to("input")
    assert stage.digest(Path("input")) == stage.digest(Path("linked")) == plain
    write(here / "a.txt", "ho")
    assert stage.digest(Path("linked")) != plain


# --- stages that end badly ---------------------------------------------------------------------------------------


def test_an_interrupted_stage_ends_in_a_sentence(place: Path) -> None:
    assert sentence(shout(place, "raise KeyboardInterrupt")) == (
        "shout@x: interrupted; nothing was published, and the next run goes on from here.\n"
    )


STOPPED = ["raise RuntimeError('bug')", "raise SystemExit('sentence')", "raise KeyboardInterrupt", "sys.exit(3)"]
KILLED = [f"(folder / 'half').touch()\n{KILL}", "os.kill(os.getpid(), signal.SIGTERM)", "os._exit(1)"]


@pytest.mark.parametrize("end", STOPPED + KILLED)
def test_stage_that_ends_badly_leaves_the_previous_output(place: Path, end: str) -> None:
    """Error, Ctrl-C, kill: the old output is there, nobody takes the half-written one for it, the next run works."""
    shout(place)
    record = (place / "metrics/runs/shout@x.json").read_bytes()
    write(place / "input/a.txt", "ho")
    assert shout(place, end).returncode != 0
    assert published(place) == "HI"
    assert (place / "metrics/runs/shout@x.json").read_bytes() == record
    assert leftovers(place) == ([] if end in STOPPED else ["out/.tmp-x"])
    assert shout(place).returncode == 0
    assert published(place) == "HO"
    assert not (place / "out/x/half").exists(), "nothing of the killed run gets into the next output"
    assert leftovers(place) == []


# The renames of `_publish`, in the order in which they happen; the process dies right after the one named.
DIE_AFTER_RENAME = """
rename = Path.rename
def fatal(self, target):
    rename(self, target)
    if {condition}: os.kill(os.getpid(), signal.SIGKILL)
    return target
Path.rename = fatal
"""


def test_kill_between_the_two_renames_is_recovered(place: Path) -> None:
    """The old output stands aside under another name; the next run brings it back before it does anything else."""
    shout(place)
    write(place / "input/a.txt", "ho")
    killed = shout(place, DIE_AFTER_RENAME.format(condition="'.tmp-old-' in str(target)"))
    assert killed.returncode == -signal.SIGKILL
    assert leftovers(place) == ["metrics/runs/.tmp-shout@x.json", "out/.tmp-old-x", "out/.tmp-x"]
    assert shout(place, "raise SystemExit('sentence')").returncode == 1  # even when the next run comes to nothing
    assert published(place) == "HI"
    assert leftovers(place) == []
    assert shout(place).returncode == 0
    assert published(place) == "HO"


def test_failure_between_the_two_renames_is_undone(place: Path) -> None:
    """When the new output cannot take its place, the old one is put back at once."""
    shout(place)
    write(place / "input/a.txt", "ho")
    fail = (
        "rename = Path.rename\n"
        "def failing(self, target):\n"
        "    if str(target) == 'out/x' and self.name == '.tmp-x': raise OSError(5, 'Input/output error')\n"
        "    return rename(self, target)\n"
        "Path.rename = failing"
    )
    assert shout(place, fail).returncode == 1
    assert published(place) == "HI"
    assert leftovers(place) == []


def test_kill_after_the_renames_leaves_the_new_output(place: Path) -> None:
    """What stands aside then is old: the next run removes it and never brings it back."""
    shout(place)
    write(place / "input/a.txt", "ho")
    shout(place, DIE_AFTER_RENAME.format(condition="str(target) == 'out/x'"))
    assert published(place) == "HO"
    assert "out/.tmp-old-x" in leftovers(place)
    shout(place, "raise SystemExit('sentence')")
    assert published(place) == "HO"
    assert leftovers(place) == []


def test_output_that_dvc_removed_is_not_missed(place: Path) -> None:
    """`dvc repro` deletes the outputs of a stage before it runs it."""
    shout(place)
    shutil.rmtree(place / "out")
    assert shout(place).returncode == 0
    assert published(place) == "HI"


def test_lost_records_stop_a_stage(place: Path) -> None:
    """`balance` holds: 10 read, 8 kept and 1 dropped is an error, and nothing is published."""
    shout(place)
    refused = sentence(shout(place, "run.balance('records', read=10, kept=8, dropped=1)"))
    assert refused.startswith("shout@x: 10 records were read but 8 kept + 1 dropped came out; nothing was published")
    assert published(place) == "HI"
    assert shout(place, "run.balance('records', read=10, kept=8, dropped=2)").returncode == 0


@given(parts=st.dictionaries(st.sampled_from("abc"), st.integers(0, 9)), extra=st.integers(-3, 3))
def test_balance_is_exact(parts: dict[str, int], extra: int) -> None:
    """It refuses when and only when the sum differs."""
    run = object.__new__(stage.Run)
    if extra:
        with pytest.raises(ValueError, match="were read but"):
            run.balance("rows", sum(parts.values()) + extra, **parts)
    else:
        run.balance("rows", sum(parts.values()), **parts)


# --- what the user sees ------------------------------------------------------------------------------------------


def test_mistake_found_by_a_stage_is_one_sentence(place: Path) -> None:
    """A ValueError raised under stages/ is for the user; the stage's name stands before it."""
    assert sentence(shout(place, "raise ValueError('the text is too short; add some')")) == (
        "shout@x: the text is too short; add some\n"
    )


@pytest.mark.parametrize("error", ["int('x')", "import json; json.loads('{')", "raise KeyError('x')", "(1).x"])
def test_bug_keeps_its_traceback(place: Path, error: str) -> None:
    """What a library or the interpreter raises is nobody's sentence: the place of the bug must be seen."""
    finished = shout(place, error)
    assert finished.returncode == 1
    assert "Traceback (most recent call last)" in finished.stderr


FULL = [
    "raise OSError(28, 'No space left on device')",
    "open('/dev/full', 'w', buffering=1).write('text\\n')",  # what the kernel itself says
    "raise Exception('No space left on device (os error 28)')",  # tokenizers and safetensors, written in Rust
    "raise RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534')",  # torch.save
    "raise OSError(122, 'Disk quota exceeded')",
    "raise OSError(28, 'Auf dem Gerät ist kein Speicherplatz mehr verfügbar')",  # the system speaks the user's language
]


@pytest.mark.parametrize("error", FULL)
def test_full_disk_is_one_sentence(place: Path, error: str) -> None:
    """Every library has its own words for it; the user gets one, and the previous output."""
    shout(place)
    write(place / "input/a.txt", "ho")
    refused = sentence(shout(place, error))
    assert refused.startswith("shout@x: no space left on the disk while writing; nothing was published")
    assert published(place) == "HI"
    assert leftovers(place) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root and the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize(
    "write_much",
    [
        '(folder / "big").write_bytes(bytes(2**21))',
        "import pyarrow as pa; pa.OSFile(str(folder / 'big'), 'wb').write(bytes(2**21))",
        "import numpy; from safetensors.numpy import save_file; save_file({'a': numpy.zeros(2**18)}, folder / 'big')",
    ],
    ids=["python", "pyarrow", "safetensors"],
)
def test_disk_that_is_really_full(place: Path, small_disk: Path, write_much: str) -> None:
    """Writing beyond the end of a small disk: one sentence, the old output, and room to work again."""
    root = Path(shutil.copytree(place, small_disk / "place"))
    assert shout(root).returncode == 0
    write(root / "input/a.txt", "ho")
    assert "no space left on the disk" in sentence(shout(root, write_much))
    assert published(root) == "HI"
    assert leftovers(root) == []
    assert shout(root).returncode == 0
    assert published(root) == "HO"


def test_disk_full_while_the_record_is_written(place: Path) -> None:
    """The run record is written before the output is published: the sentence that nothing changed stays true."""
    shout(place)
    write(place / "input/a.txt", "ho")
    break_record = (
        "write_text = Path.write_text\n"
        "def full(self, *a, **k):\n"
        "    if 'runs' in self.parts: raise OSError(28, 'No space left on device')\n"
        "    return write_text(self, *a, **k)\n"
        "Path.write_text = full"
    )
    assert "nothing was published" in sentence(shout(place, break_record))
    assert published(place) == "HI"
    assert leftovers(place) == []


@pytest.mark.parametrize("text", ["abc", "0", "-1", "1.5", "²", " "])
def test_wrong_number_of_workers_is_refused(place: Path, text: str) -> None:
    """TERROIR_WORKERS is a whole number from 1."""
    assert sentence(shout(place, TERROIR_WORKERS=text)) == (
        f"TERROIR_WORKERS is {text!r}: set it to a whole number of processes, 1 or more.\n"
    )


def test_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable, or the cores that this process may use."""
    monkeypatch.setenv("TERROIR_WORKERS", "3")
    assert stage.workers() == 3
    monkeypatch.setenv("TERROIR_WORKERS", "")
    assert stage.workers() == len(os.sched_getaffinity(0))


def test_progress_yields_everything_and_speaks_now_and_then(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a log: every item in order, and a line at most every 15 seconds."""
    now = 0.0

    def tick() -> float:
        nonlocal now
        now += 4
        return now

    with stage.run("shout", "x", ["input"], ["out/x"]) as run:
        write(run.outputs[0] / "text", "HI")
        monkeypatch.setattr(time, "monotonic", tick)
        assert list(run.progress(range(10), 10, "files")) == list(range(10))
    lines = [line for line in capsys.readouterr().out.splitlines() if " of " in line]
    assert lines[0] == "shout@x: 3 of 10 files, 20 s"
    assert 2 <= len(lines) <= 3


# --- two at once -------------------------------------------------------------------------------------------------


def test_second_writer_is_refused(place: Path) -> None:
    """Two runs of one stage would mix their files: the second names the process that works."""
    first = start(place, WAIT)
    wait_for((place / "waiting").exists)
    refused = sentence(shout(place, WAIT))
    assert refused.startswith(f"out/x is being written by process {first.pid}; wait until it ends, or stop it")
    (place / "go").touch()
    assert first.wait(PATIENCE) == 0
    assert published(place) == "HI"


def test_second_writer_waits_for_one_that_is_about_to_end(place: Path) -> None:
    """The stage of a `dvc repro` that was killed a moment ago is given two seconds."""
    first = start(place, WAIT)
    wait_for((place / "waiting").exists)
    second = start(place, WAIT)
    time.sleep(0.5)
    (place / "go").touch()
    assert second.wait(PATIENCE) == 0, second.communicate()
    assert first.wait(PATIENCE) == 0


def test_two_items_of_a_stage_run_side_by_side(place: Path) -> None:
    """The lock is on the output, not on the stage."""
    wait = "if name == 'x':\n    " + WAIT.replace("\n", "\n    ")
    first = start(place, wait, name="x")
    wait_for((place / "waiting").exists)
    assert shout(place, wait, name="y").returncode == 0
    (place / "go").touch()
    assert first.wait(PATIENCE) == 0
    assert (published(place, "x"), published(place, "y")) == ("HI", "HI")


def test_lock_of_a_killed_process_is_free(place: Path) -> None:
    """A lock is held by a living process or by none; the number that it left behind means nothing."""
    first = start(place, WAIT)
    wait_for((place / "waiting").exists)
    first.kill()
    first.wait(PATIENCE)
    assert shout(place).returncode == 0


POOL = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
with ProcessPoolExecutor(2, multiprocessing.get_context("fork"), stage.die_with_parent) as pool:
    for _ in range(2): pool.submit(time.sleep, 600)
    while len(pool._processes) < 2: time.sleep(0.01)
    time.sleep(0.2)
    Path("pids.new").write_text(" ".join(map(str, [os.getpid(), *pool._processes])))
    Path("pids.new").rename("pids")
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, 'stages/shout.py', 'x'])"


def test_stage_and_its_workers_die_with_the_parent(place: Path) -> None:
    """A killed `dvc repro` leaves no stage behind that goes on writing, and no worker of one."""
    write_script(place, POOL)
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=place)
    wait_for((place / "pids").exists)
    pids = [int(pid) for pid in (place / "pids").read_text().split()]
    assert len(pids) == 3
    assert all(map(alive, pids))
    parent.kill()
    parent.wait(PATIENCE)
    try:
        wait_for(lambda: not any(map(alive, pids)), seconds=1.0)
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)
    assert shout(place).returncode == 0
    assert leftovers(place) == []


def test_worker_that_is_orphaned_at_birth_ends(place: Path) -> None:
    """The stage may die between the fork of a worker and the worker's request to die with it.

    Such a worker would wait for work for ever, and hold the lock of the output with it.
    """
    orphan = (
        "import multiprocessing\n"
        "def work():\n"
        "    while os.getppid() == multiprocessing.parent_process().pid: time.sleep(0.01)\n"
        "    Path('orphaned').touch()\n"
        "    stage.die_with_parent()\n"
        "    Path('lives').touch()\n"
        "if not os.fork():\n"
        "    multiprocessing.get_context('fork').Process(target=work).start()\n"
        "    os._exit(0)\n"
        "while not Path('orphaned').exists(): time.sleep(0.01)\n"
        "time.sleep(0.5)"
    )
    assert shout(place, orphan).returncode == 0
    assert not (place / "lives").exists()


# --- digests -----------------------------------------------------------------------------------------------------


def fill(folder: Path, content: dict[str, bytes]) -> None:
    for name, data in content.items():
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


@settings(max_examples=60, deadline=None)
@given(content=files, seed=st.integers(0, 99))
def test_digest_follows_names_and_bytes_alone(content: dict[str, bytes], seed: int) -> None:
    """Order of creation, time stamps, place, links, workers: none matters. A byte or a name does."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        first, second = Path(one, "a"), Path(other, "deep/b")
        fill(first, content)
        plain = stage.digest(first)
        names = list(content)
        random.Random(seed).shuffle(names)
        fill(second, {name: content[name] for name in names})
        for path in second.rglob("*.txt"):
            os.utime(path, (seed, seed))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TERROIR_WORKERS", str(1 + seed % 9))
            assert stage.digest(second) == plain
        changed = sorted(path for path in second.rglob("*.txt") if path.is_file())[0]
        changed.write_bytes(changed.read_bytes() + b".")
        assert stage.digest(second) != plain
        changed.write_bytes(changed.read_bytes()[:-1])
        changed.rename(changed.with_name("renamed.txt"))
        assert stage.digest(second) != plain


def test_digest_does_not_follow_the_order_of_a_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems list the same folder in different orders."""
    plain = stage.digest(Path("input"))
    listed = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(listed(self, pattern))))
    assert stage.digest(Path("input")) == plain


def test_digest_separates_files(here: Path) -> None:
    """Bytes that move from one file to the next, or into a name, are a change."""
    found = set()
    for number, content in enumerate([{"a": b"xy", "b": b""}, {"a": b"x", "b": b"y"}, {"ab": b"xy"}, {"a/b": b"xy"}]):
        fill(here / str(number), content)
        found.add(stage.digest(here / str(number)))
    assert len(found) == 4


def test_digest_ignores_what_dvc_ignores(here: Path) -> None:
    """Byte code and what a killed stage left beside a folder are no input; an empty folder is none either."""
    plain = stage.digest(Path("input"))
    write(here / "input/__pycache__/a.cpython-311.pyc", "byte code")
    write(here / "input/.tmp-laws/documents/data-00000.arrow", "half")
    write(here / "input/.tmp-old-laws/documents/data-00000.arrow", "old")
    (here / "input/empty").mkdir()
    assert stage.digest(Path("input")) == plain
    ignored = (ROOT / ".dvcignore").read_text().split()
    assert {"__pycache__", ".tmp-*"} <= set(ignored)


def test_digest_of_a_folder_below_an_ignored_name(here: Path) -> None:
    """What is above the folder does not matter: a stage digests its own temporary output."""
    shutil.copytree("input", ".tmp-x/__pycache__")
    assert stage.digest(Path(".tmp-x/__pycache__")) == stage.digest(Path("input"))


def test_digest_knows_odd_names(here: Path) -> None:
    """File names that are not UTF-8 have a digest, too."""
    Path("odd").mkdir()
    Path(os.fsdecode(b"odd/caf\xe9.txt")).write_text("x")
    assert len(stage.digest(Path("odd"))) == 64


# --- keys of checkpoints -----------------------------------------------------------------------------------------


# --- digests that are remembered ---------------------------------------------------------------------------------


@pytest.fixture
def read(here: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files other than code that were read for their SHA-256; those of a byte and more are remembered."""
    paths: list[str] = []
    digest = stage._file_digest
    monkeypatch.setattr(stage, "REMEMBERED", 1)
    monkeypatch.setattr(
        stage, "_file_digest", lambda path: (paths.append(str(path)) if path.suffix != ".py" else None, digest(path))[1]
    )
    return paths


def inputs_of_a_run(inputs: tuple[str, ...] = ("input",), out: str = "out/x", said: str = "HI") -> dict[str, str]:
    """Run a stage and return the digests of its inputs as it has them; a wrong one fails."""
    with stage.run("shout", "x", list(inputs), [out]) as run:
        write(run.outputs[0] / "text", said)
        found = dict(run.digests)
    assert found == {path: stage.digest(Path(path)) for path in inputs}
    return found


@pytest.fixture
def noting(here: Path) -> None:
    if not stage._settled(stage.state(Path("input"))):
        pytest.skip("a store through a mapping changes no time here (tmpfs), so nothing is noted")


def test_what_was_read_or_written_before_is_not_read_again(here: Path, read: list[str], noting: None) -> None:
    """Neither an input that another run read, nor the output of a stage as the input of the next."""
    for path in ("input/a.txt", "input/deep/b.txt"):
        os.utime(path)
    inputs_of_a_run()
    assert "input/a.txt" in read
    read.clear()
    with stage.run("shout", "y", ["input", "out/x"], ["out/y"]) as run:
        write(run.outputs[0] / "text", "HI")
        found = dict(run.digests)
        assert read == []
    assert found == {path: stage.digest(Path(path)) for path in ("input", "out/x")}


@pytest.mark.parametrize(
    "edit",
    [
        lambda path: path.write_text("ho"),
        lambda path: path.write_text("longer"),
        lambda path: (path.unlink(), path.write_text("ho")),
        lambda path: (write(path.with_name("new"), "ho"), path.with_name("new").rename(path)),
        lambda path: path.write_text("hi"),
    ],
    ids=["in place", "longer", "anew", "renamed", "same again"],
)
@pytest.mark.parametrize("name", ["input/a.txt", "out/x/text"])
def test_what_has_changed_is_read_again(here: Path, read: list[str], name: str, edit: Callable[[Path], object]) -> None:
    """At once after the run, with size and time stamps as before."""
    inputs_of_a_run()
    inputs_of_a_run(("input", "out/x"), "out/y")
    before = Path(name).stat()
    edit(Path(name))
    os.utime(name, ns=(before.st_atime_ns, before.st_mtime_ns))
    read.clear()
    inputs_of_a_run(("input", "out/x"), "out/y")
    assert read.count(name) == 2  # by the stage and by the test


def test_no_store_into_a_mapped_file_is_missed(here: Path, read: list[str]) -> None:
    """The kernel notes the first store into a page alone, until the page is written out: the stage sees to that."""
    with Path("input/a.txt").open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        for content in (b"ho", b"ha", b"he"):
            mapped[:] = content
            inputs_of_a_run()
            mapped[:] = b"no"
            inputs_of_a_run()


def test_an_edit_in_the_same_moment_is_seen(here: Path, read: list[str]) -> None:
    """A file system's clock stands still for some milliseconds; what changed in the last of them is not trusted."""
    for number in range(100):
        Path("input/a.txt").write_text(f"{number:3}")
        states = stage.state(Path("input"))
        settled = stage._settled(states)
        Path("input/a.txt").write_text(f"{number:3}"[::-1])
        assert not set(settled) & set(stage.state(Path("input/a.txt")))


def test_what_could_not_be_written_out_is_not_noted(
    here: Path, read: list[str], noting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = stage.state(Path("input"))
    assert stage._settled(states) == states

    def refused(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink() == Path("input/a.txt").resolve():
            raise OSError("no fsync here")

    monkeypatch.setattr(stage.os, "fsync", refused)
    assert stage._settled(states) == []


def test_a_damaged_note_is_not_believed(here: Path, read: list[str], noting: None) -> None:
    inputs_of_a_run()
    content = stage.DIGESTS.read_bytes()
    wrong = content.replace(stage.digest(Path("input/a.txt")).encode(), b"0" * 64)
    assert wrong != content
    for bad in (wrong, b"", b"no", content[:-9]):
        stage.DIGESTS.write_bytes(bad)
        inputs_of_a_run()


def test_small_files_are_not_noted_and_gone_ones_forgotten(
    here: Path, noting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred thousand small files would make the note longer to read than they are."""
    write(here / "input/large", "x" * stage.REMEMBERED)
    inputs_of_a_run()
    assert set(stage._remembered(stage.DIGESTS)) == {"input/large"}
    (here / "input/large").unlink()
    inputs_of_a_run(said="x" * stage.REMEMBERED)
    assert set(stage._remembered(stage.DIGESTS)) == {"out/x/text"}
    assert leftovers(here) == []
    assert sorted(path.name for path in stage.WORK.iterdir()) == ["digests", "imports", "locks"]


def test_work_folder_follows_inputs_code_and_params(here: Path) -> None:
    """The same inputs, code and parameters give the same folder; another of any, another folder."""

    def folder(params: dict[str, int]) -> Path:
        found: list[Path] = []
        with stage.run("shout", "x", ["input"], ["out/x"]) as run:
            write(run.outputs[0] / "text", "HI")
            found.append(run.work_folder(params))
        return found[0]

    first = folder({"a": 1, "b": 2})
    assert first.is_dir()
    assert first.parent == Path(".work/shout@x")
    os.utime("input/a.txt", (1, 1))
    assert folder({"b": 2, "a": 1}) == first
    assert folder({"a": 1, "b": 3}) != first
    write(here / "input/a.txt", "ho")
    changed = folder({"a": 1, "b": 2})
    assert changed != first
    write(here / "input/a.txt", "hi")
    assert folder({"a": 1, "b": 2}) == first
    write_script(here, "pass  # another comment")
    assert folder({"a": 1, "b": 2}) != first
    write_script(here)
    write(here / "stages/kit/stage.py", (here / "stages/kit/stage.py").read_text() + "# another comment\n")
    assert folder({"a": 1, "b": 2}) != first


def test_code_files_are_the_imports_at_any_depth(here: Path) -> None:
    """Every form of import is followed, also inside functions; other modules are not ours."""
    write(here / "stages/one.py", "import os\nimport two as t\nfrom kit import stage\nimport yaml.nodes\n")
    write(here / "stages/two.py", "def f():\n    from three import name\n    import kit.five\n")
    write(here / "stages/three.py", "from kit.four import name\nimport one\n")
    for name in ("kit/four", "kit/five", "six"):
        write(here / f"stages/{name}.py", "")
    found = [path.relative_to(here / "stages").as_posix() for path in stage.code_files(here / "stages/one.py")]
    assert found == ["kit/five.py", "kit/four.py", "kit/stage.py", "one.py", "three.py", "two.py"]
    before = stage.code_digest(here / "stages/one.py")
    write(here / "stages/six.py", "changed = True\n")
    assert stage.code_digest(here / "stages/one.py") == before
    write(here / "stages/kit/four.py", "changed = True\n")
    assert stage.code_digest(here / "stages/one.py") != before


def test_versions_follow_from_the_code_alone(here: Path) -> None:
    """What another module happened to import before must not decide whether work is known: two runs would differ."""
    write(here / "stages/one.py", "import two\n")
    write(here / "stages/two.py", "def f():\n    import jinja2\n    import not_installed\n")
    assert "numpy" in sys.modules
    assert list(stage.versions(here / "stages/one.py")) == ["python", "jinja2"]
    write(here / "stages/three.py", "def f():\n    import torch\n")
    names = {"python", "torch", "accelerate", "bitsandbytes", "peft", "safetensors"}
    assert set(stage.versions(here / "stages/three.py")) == names


def test_what_a_module_imports_is_remembered_by_its_text(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another text is read anew, whatever size and times it has, and so is all where the note is damaged."""
    script, note = here / "stages/one.py", here / ".work/imports/one.json"
    write(script, "import two")
    write(here / "stages/two.py", "")
    write(here / "stages/six.py", "")
    (here / ".work").mkdir(exist_ok=True)

    def files() -> list[str]:
        stage._imports.cache_clear()
        return [path.name for path in stage.code_files(script)]

    assert files() == ["one.py", "two.py"]
    assert note.is_file()
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_imported", lambda text: pytest.fail("read again"))
        assert files() == ["one.py", "two.py"]
    before = script.stat()
    write(script, "import six")
    os.utime(script, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files() == ["one.py", "six.py"]
    content = note.read_bytes()
    assert b'["six"]' in content
    note.write_bytes(content.replace(b'["six"]', b'["two"]'))
    assert files() == ["one.py", "six.py"]
    note.write_bytes(b"no note at all")
    assert files() == ["one.py", "six.py"]


@pytest.mark.parametrize("name", [*stage.SHAPING, "not-installed", "ruamel.yaml"])
def test_version_is_what_importlib_says(name: str) -> None:
    import importlib.metadata

    try:
        wanted = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        wanted = None
    assert stage.version(name) == wanted


def test_version_of_two_installations_is_what_importlib_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first on the path counts, for it is the one that is imported."""
    import importlib.metadata

    for place, number in (("first", "1.2"), ("second", "3.4")):
        write(tmp_path / place / f"twice-{number}.dist-info/METADATA", f"Name: twice\nVersion: {number}\n")
        monkeypatch.syspath_prepend(tmp_path / place)
    assert stage.version("twice") == importlib.metadata.version("twice") == "3.4"


# --- the run record ----------------------------------------------------------------------------------------------


def record(place: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((place / "metrics/runs/shout@x.json").read_text(encoding="utf-8"))
    return content


def test_run_record_says_what_went_in_and_came_out(place: Path) -> None:
    """Digests of inputs, outputs and code, counts, versions; metrics, time and memory as plain numbers for DVC."""
    shout(place)
    content = record(place)
    assert content["loudness"] == 0.5
    assert content["counts"] == [{"letters": 2}]
    assert content["inputs"] == [f"input sha256:{stage.digest(place / 'input')}"]
    assert content["outputs"] == [f"out/x sha256:{stage.digest(place / 'out/x')}"]
    assert content["versions"] == [f"python {'.'.join(map(str, sys.version_info[:3]))}"]
    assert content["git"] == []
    seconds, memory = content["seconds"], content["peak_memory_mib"]
    assert isinstance(seconds, float)
    assert 0 <= seconds < PATIENCE
    assert isinstance(memory, int)
    assert 5 < memory < 100
    numbers = {name for name, value in content.items() if isinstance(value, int | float)}
    assert numbers == {"loudness", "seconds", "peak_memory_mib"}, "what `dvc metrics show` lists"


def test_peak_memory_is_that_of_the_stage(place: Path) -> None:
    """Not that of the process that started it, which Linux hands down in `ru_maxrss`; and workers count."""
    write_script(place)
    parent = "import subprocess, sys; big = b'x' * 2**28; subprocess.run([sys.executable, 'stages/shout.py', 'x'])"
    subprocess.run([sys.executable, "-c", parent], cwd=place, check=True, capture_output=True)
    assert isinstance(memory := record(place)["peak_memory_mib"], int)
    assert memory < 100
    worker = (
        "import multiprocessing\n"
        "worker = multiprocessing.get_context('fork').Process(target=lambda: b'x' * 2**28)\n"
        "worker.start(); worker.join()"
    )
    shout(place, worker)
    assert isinstance(memory := record(place)["peak_memory_mib"], int)
    assert 256 < memory < 400


def test_run_record_names_no_place_and_no_host(place: Path) -> None:
    """It is kept in Git, and shared."""
    shout(place)
    text = (place / "metrics/runs/shout@x.json").read_text()
    for private in (str(place), os.uname().nodename, str(Path.home())):
        assert private == "/" or private not in text


def test_run_record_knows_the_state_of_git(place: Path) -> None:
    """The commit, and whether code or params.yaml differ from it; other files do not matter."""
    write(place / "params.yaml", "a: 1\n")
    write_script(place)
    git(place, "init", "--quiet")
    assert shout(place).returncode == 0
    assert record(place)["git"] == [], "no commit yet"
    write(place / ".gitignore", "__pycache__\n")
    write(place / "notes.md", "not code")
    git(place, "add", "stages", "params.yaml", "notes.md", ".gitignore")
    git(place, "commit", "--quiet", "--message", "first")
    commit = git(place, "rev-parse", "HEAD").strip()
    shout(place)
    assert record(place)["git"] == [commit, "clean"]
    write(place / "notes.md", "still not code")
    shout(place)
    assert record(place)["git"] == [commit, "clean"]
    write(place / "stages/new.py", "")
    shout(place)
    assert record(place)["git"] == [commit, "dirty"], "a module that no commit has"
    (place / "stages/new.py").unlink()
    write(place / "params.yaml", "a: 2\n")
    shout(place)
    assert record(place)["git"] == [commit, "dirty"]
    git(place, "add", "params.yaml")
    shout(place)
    assert record(place)["git"] == [commit, "dirty"], "added is not committed"
    git(place, "checkout", "--quiet", "HEAD", "params.yaml")
    shout(place, "pass  # a comment")
    assert record(place)["git"] == [commit, "dirty"]


def test_stage_works_without_git(place: Path) -> None:
    """A container that only trains may have no git: the record then knows no commit."""
    finished = shout(place, PATH="/nonexistent")
    assert finished.returncode == 0, finished.stderr
    assert record(place)["git"] == []
