"""kit/stage.py keeps its contract: whatever happens to a stage, an output is whole and belongs to its inputs.

Most tests run a small real stage as a process of its own, because that is what is killed, stopped or run twice.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import alive, git, leftovers, wait_for, write, write_script
from kit import digests, stage, stage_code
from kit.digests import digest

KILL = "os.kill(os.getpid(), signal.SIGKILL)"
# A stage that waits in the middle of its work until the test lets it go on.
WAIT = 'Path("waiting").touch()\nwhile not Path("go").exists(): time.sleep(0.02)'
PATIENCE = 60.0  # seconds until a test gives up on something that takes one


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


def test_help_names_the_words_that_a_key_may_have() -> None:
    import clean

    said = " ".join(stage._keys(clean.main).split())
    assert 'encoding (default: "utf-8"): [utf-8, gb18030, utf-16] of text' in said
    assert "sample_by (default: null): [document, line, separator] document:" in said
    assert 'owner (default: "unknown"): who holds the rights' in said


def test_what_is_published_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (path := tmp_path / "deep/model.safetensors").touch(0o600)
    before = os.umask(0o027)
    try:
        stage._sync(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


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
        'Path("input/a.txt").write_text("ho"); Path("input/a.txt").write_text("he")',
        'Path("input/deep").rename("out/deep"); Path("out/deep").rename("input/deep")',
        'Path("input").rename("away"); Path("away").rename("input")',
        'Path("input/a.txt").rename("away"); Path("input/a.txt").read_text()',
        "import shutil; shutil.rmtree('input')",
        'os.utime("input/a.txt", (2, 2))',
    ],
    ids=[
        *("edited", "added", "removed", "renamed", "edited, size and mtime kept"),
        *("edited and back", "a folder exchanged and back", "all exchanged and back", "away when it was to be read"),
        *("gone", "touched: nobody knows whether it had its content all the time"),
    ],
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


@pytest.mark.parametrize("module", ["shout", "kit/stage", "kit/digests", "helper"])
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


@pytest.mark.parametrize("module", ["shout", "helper", "kit/digests"])
def test_code_changed_after_python_has_read_it_is_refused(place: Path, module: str) -> None:
    """While the stage still imports what it needs: the record would name the new code, and memo and DVC believe it."""
    write(place / "stages/helper.py", "")
    edit = f"import helper, time; time.sleep(0.03); file = open('stages/{module}.py', 'a'); file.write('# new')"
    write(place / "stages/check_params.py", "def check() -> None: ...\n")
    write_script(place, "pass")
    script = place / "stages/shout.py"
    script.write_text(script.read_text().replace("import os,", f"{edit}; file.close()\nimport os,"))
    command = [sys.executable, "stages/shout.py", "x"]
    finished = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    said = f"stages/{module}.py changed while the stage started; nothing was done: run again.\n"
    assert sentence(finished) == said
    assert published(place) is None


def test_what_is_remembered_is_of_the_code_that_runs(place: Path) -> None:
    """A memo entry under the key of code that was written since would be found by the next run."""
    write(place / "stages/helper.py", "")
    edit = "import helper; before, path = run.recipe(1), Path('stages/helper.py'); path.write_text('# new')"
    assert shout(place, f"{edit}; assert run.recipe(1) == before; path.write_text('')").returncode == 0


def test_code_of_the_future_is_no_change(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another machine's clock may give; it would be one for as long."""
    monkeypatch.setattr(stage_code, "STAGES", place / "stages")
    (module := place / "stages/helper.py").write_text("")
    assert "helper.py changed while the stage started" in str(stage_code.run_otherwise([module]))
    now = time.time_ns()
    monkeypatch.setattr(stage_code.time, "time_ns", lambda: now - 3600 * 10**9)
    assert stage_code.run_otherwise([module]) is None


@pytest.mark.parametrize("mode", ["timestamp", "unchecked-hash"])
def test_byte_code_of_another_text_is_refused(place: Path, mode: str) -> None:
    """Python compares size and second alone, and of one kind of byte code nothing."""
    helper, body = place / "stages/helper.py", "import helper; (folder / 'text').write_text(helper.SAID)"
    write(helper, "SAID = 'old'")
    compiled = place / "stages/__pycache__"
    subprocess.run([sys.executable, "-m", "compileall", "-q", "--invalidation-mode", mode, helper], check=True)
    assert shout(place, body).returncode == 0 and published(place) == "old"
    before = helper.stat()
    helper.write_text("SAID = 'new'")
    os.utime(helper, ns=(before.st_atime_ns, before.st_mtime_ns + 100_000 if mode == "timestamp" else 1))
    refused = sentence(shout(place, body))
    assert refused.startswith("stages/helper.py has another text than the byte code that Python keeps of it")
    assert "remove the byte code (rm -r stages/__pycache__) and run again" in refused
    assert published(place) == "old"
    shutil.rmtree(compiled)
    assert shout(place, body).returncode == 0 and published(place) == "new"


@pytest.mark.parametrize("mode", ["timestamp", "checked-hash", "unchecked-hash"])
def test_byte_code_of_the_same_text_is_compared_once(place: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the project has new change times throughout; byte code of another Python is none of this one."""
    monkeypatch.setattr(stage_code, "STAGES", place / "stages")
    monkeypatch.setattr(stage_code, "_begun", time.time_ns)
    paths = sorted((place / "stages").rglob("*.py"))
    subprocess.run(
        [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", mode, place / "stages"], check=True
    )
    for path in paths:
        path.chmod(0o600)
    time.sleep(0.02)
    assert stage_code.run_otherwise(paths) is None
    monkeypatch.setattr(stage_code.marshal, "loads", lambda content: pytest.fail("compared again"))
    if mode != "checked-hash":
        assert stage_code.run_otherwise(paths) is None
    for path in paths:
        path.chmod(0o644)
        compiled = next((path.parent / "__pycache__").glob(f"{path.stem}.*"))
        compiled.write_bytes(b"1234" + compiled.read_bytes()[4:])
        path.chmod(0o600)
    assert stage_code.run_otherwise(paths) is None


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


@pytest.mark.parametrize("edited", ["params.yaml", "stages/helper.py"])
def test_what_changed_while_the_inputs_were_hashed_is_refused(place: Path, edited: str) -> None:
    """Large ones take minutes; the stage has its parameters already, and its code."""
    write(place / "dvc.yaml", PIPELINE)
    write(place / "params.yaml", PARAMS)
    write(place / "stages/helper.py", "")
    new = {"params.yaml": PARAMS.replace("x: {how: 1", "x: {how: 2")}.get(edited, "new = 1")
    edit = f"import helper; hashed = stage.input_digests; write = lambda: Path({edited!r}).write_text({new!r})"
    script = f"{edit}\n    stage.input_digests = lambda *a: (hashed(*a), write())[0]\n    with stage.run("
    write_script(place, "pass")
    path = place / "stages/shout.py"
    path.write_text(path.read_text().replace("with stage.run(", script, 1))
    command = [sys.executable, "stages/shout.py", "x"]
    what = {"params.yaml": "loud.x.how in params.yaml"}.get(edited, edited)
    before = (place / edited).read_text()
    for script in (path.read_text(), path.read_text().replace("write())[0]", "[])[0]")):
        path.write_text(script)
        (place / edited).write_text(before)
        refused = sentence(subprocess.run(command, cwd=place, capture_output=True, text=True, check=False))
        assert refused.startswith(f"shout@x: {what} changed while the stage ran; nothing was published")
        # The second time already while params.yaml is checked, before the stage has read its own keys.
        edit = f"from pathlib import Path\ndef check() -> None: Path({edited!r}).write_text({new!r})\n"
        write(place / "stages/check_params.py", edit)


def test_input_changed_at_the_very_end_is_refused(place: Path) -> None:
    """To write a large output to the disk takes a while: the comparison comes after it."""
    late = "record = stage._record\nstage._record = lambda *a: (record(*a), Path('input/a.txt').write_text('ho'))"
    assert "input changed while the stage ran" in sentence(shout(place, late))
    assert published(place) is None


def test_a_change_right_after_the_beginning_is_seen(here: Path) -> None:
    """In the same tick of the file system's clock, where it would keep the ctime (Linux before 6.13)."""
    for number in range(20):
        Path("input/a.txt").write_text(f"{number:3}")
        guard = stage.guard(Path("input"), "")
        Path("input/a.txt").write_text(f"{number:3}"[::-1])
        assert not guard.holds()
        Path("input/deep").rename("away")
        Path("away").rename("input/deep")
        guard = stage.guard(Path("input"), "")
        Path("input/deep").rename("away")
        Path("away").rename("input/deep")
        assert not guard.holds()


def test_a_guard_is_of_a_tick_that_is_over(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the clock is not beyond the latest ctime, what was found is looked at again."""
    clock = [0, 0, 2**62]

    def tick(_: int) -> int:
        Path("input/a.txt").write_text(f"{len(clock)}")
        return clock.pop(0)

    monkeypatch.setattr(stage.time, "clock_gettime_ns", tick)
    assert stage.guard(Path("input"), "").holds() and clock == []
    monkeypatch.setattr(stage.time, "clock_gettime_ns", lambda _: 0)
    assert stage.guard(Path("input"), "").holds()  # a ctime of the future does not hold it up for ever


@pytest.mark.parametrize("edit", ['os.link("input/a.txt", "out/a.txt")', 'os.chmod("input/a.txt", 0o444)'])
def test_new_links_and_rights_are_no_change(place: Path, edit: str) -> None:
    """Where projects share a cache of hard links, what another one takes from it sets a ctime."""
    shout(place)
    assert shout(place, edit).returncode == 0


def test_a_file_that_goes_away_at_the_beginning_is_one_sentence(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the listing of an input and the reading of it."""
    listed = digests._all_files
    monkeypatch.setattr(digests, "_all_files", lambda folder: [*listed(folder), folder / "gone"])
    sentence = "shout@x: input/gone went away while it was read; let the change finish and run again."
    with pytest.raises(SystemExit, match=sentence), stage.run("shout", "x", ["input"], ["out/x"]):
        pass


def test_missing_or_empty_input_is_named(place: Path) -> None:
    """The sentence says which path, and who writes it."""
    shutil.rmtree(place / "input")
    assert "input does not exist; put the files there, or run the stage that writes it" in sentence(shout(place))
    (place / "input/deep").mkdir(parents=True)
    assert "input is empty" in sentence(shout(place))
    assert published(place) is None


# --- inputs whose changes DVC does not see -----------------------------------------------------------------------


def test_other_bytes_under_the_old_time_are_refused(place: Path) -> None:
    """DVC would tie its old MD5 to the new output. With a new time, as by `touch`, the file is read."""
    assert shout(place).returncode == 0
    file = place / "input/a.txt"
    before = file.stat()
    with file.open("r+b") as opened:
        opened.write(b"ho")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):  # a refusal is not the last word that is remembered
        assert "input/a.txt has other bytes than when it was last read" in sentence(shout(place))
    assert published(place) == "HI"
    file.touch()
    assert shout(place).returncode == 0
    assert published(place) == "HO"


def test_other_bytes_than_those_of_a_run_that_failed_are_refused(place: Path) -> None:
    """DVC has hashed what that run was to read, and would tie it to this output. It is so with code, too."""
    assert shout(place, "raise SystemExit('no')").returncode == 1
    for path, new in (("input/a.txt", "ho"), ("stages/kit/digests.py", None)):
        file = place / path
        before, old = file.stat(), file.read_bytes()
        file.write_bytes(new.encode() if new else old.replace(b"states of", b"States of", 1))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert f"{path} has other bytes than when it was last read" in sentence(shout(place))
        file.write_bytes(old)
    assert published(place) is None
    assert shout(place).returncode == 0


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (".dvcignore", "# ours\n.work\ndeep/\n", "input/deep/b.txt: .dvcignore names it"),
        ("input/deep/.dvcignore", "b.txt\n", "input/deep/.dvcignore hides files"),
        ("input/deep/.dvc/config", "", "input/deep is a DVC repository of its own"),
    ],
)
def test_what_dvc_does_not_see_is_refused(place: Path, name: str, text: str, words: str) -> None:
    """The stage would read it, and DVC would call the output up to date whatever becomes of it."""
    write(place / name, text)
    assert words in sentence(shout(place))
    assert published(place) is None
    (place / name).unlink()
    if name.endswith("config"):
        (place / name).parent.rmdir()
    assert shout(place).returncode == 0


def test_other_lines_of_dvcignore_do_no_harm(place: Path) -> None:
    """What they name is no input, or hidden, which no stage reads; nor a .dvc of this repository or an input's own."""
    write(place / ".dvcignore", "node_modules\n.cache\n")
    write(place / "input/.cache/c.txt", "hidden")
    write(place / "input/.dvc/config", "")
    write(place / ".dvc/config", "")
    assert shout(place).returncode == 0
    assert digests.unseen("input", ["input/a.txt"]) is None


def test_git_merges_no_lock_by_lines(tmp_path: Path) -> None:
    """The parameter of one branch and the input of another, put together by Git, are a run that never was."""
    lock = ["deps: old", *"abcdefgh", "params: old"]
    shutil.copyfile(Path(__file__).parents[1] / ".gitattributes", tmp_path / ".gitattributes")
    write(tmp_path / "dvc.lock", "\n".join(lock))
    git(tmp_path, "init", "--quiet")
    for branch, at in ((None, 0), ("one", 0), ("two", -1)):
        if branch:
            git(tmp_path, "checkout", "--quiet", "-b", branch, "start")
            write(tmp_path / "dvc.lock", "\n".join(lock).replace(lock[at], lock[at].replace("old", branch)))
        git(tmp_path, "add", "--all")
        git(tmp_path, "commit", "--quiet", "--message", branch or "start")
        if not branch:
            git(tmp_path, "branch", "start")
    ours = (tmp_path / "dvc.lock").read_text()
    with pytest.raises(subprocess.CalledProcessError):
        git(tmp_path, "merge", "--quiet", "one")
    assert (tmp_path / "dvc.lock").read_text() == ours
    git(tmp_path, "merge", "--abort")
    git(tmp_path, "merge", "--quiet", "-X", "ours", "one")
    assert (tmp_path / "dvc.lock").read_text() == ours


# --- stages that end badly ---------------------------------------------------------------------------------------


def test_an_interrupted_stage_ends_in_a_sentence(place: Path) -> None:
    """True of every stage: most keep nothing of what they had done."""
    assert sentence(shout(place, "raise KeyboardInterrupt")) == (
        "shout@x: interrupted; nothing was published: run again, which goes on from the finished shards (.memo) or "
        "the last checkpoint (.work) of a stage that keeps them, and begins any other anew.\n"
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


MEMORY = [
    ("raise MemoryError", "no memory left"),
    ("import numpy; numpy.empty(2**58)", "no memory left (Unable to allocate 2.00 EiB for an array with shape"),
    ("import pyarrow; pyarrow.allocate_buffer(2**60)", "no memory left (malloc of size 1152921504606846976 failed)"),
    ("import torch; torch.empty(2**60)", "you tried to allocate 4611686018427387904 bytes)"),
    (
        "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has')",
        "no memory left (CUDA out of memory. Tried to allocate 2.00 GiB)",
    ),
    (
        "from concurrent.futures import ProcessPoolExecutor; ProcessPoolExecutor(1).submit(os._exit, 9).result()",
        "the system killed a worker process, most often because no memory is left",
    ),
]


@pytest.mark.parametrize(("error", "words"), MEMORY, ids=["python", "numpy", "arrow", "torch", "cuda", "worker"])
def test_no_memory_is_one_sentence(place: Path, error: str, words: str) -> None:
    shout(place)
    write(place / "input/a.txt", "ho")
    refused = sentence(shout(place, error))
    assert words in refused
    assert refused.endswith(
        "; nothing was published: set TERROIR_WORKERS to fewer processes, or free some memory, and run again.\n"
    )
    assert published(place) == "HI"
    assert leftovers(place) == []


def test_a_training_without_memory_names_the_sizes_that_do_not_change_what_is_learned() -> None:
    import train_model

    assert stage._less_memory(train_model.main) == "lower per_device_train_batch_size or per_device_eval_batch_size"


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


# --- keys of checkpoints -----------------------------------------------------------------------------------------


def test_work_folder_follows_inputs_code_and_params(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same inputs, code, parameters and library versions give the same folder; another of any, another folder."""

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
    with monkeypatch.context() as patch:
        patch.setattr(stage, "versions", lambda script: {"python": "4.0.0"})
        assert folder({"a": 1, "b": 2}) != first
    assert folder({"a": 1, "b": 2}) == first
    write_script(here, "pass  # another comment")
    assert folder({"a": 1, "b": 2}) != first
    write_script(here)
    write(here / "stages/kit/stage.py", (here / "stages/kit/stage.py").read_text() + "# another comment\n")
    assert folder({"a": 1, "b": 2}) != first


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
    assert content["inputs"] == [f"input sha256:{digest(place / 'input')}"]
    assert content["outputs"] == [f"out/x sha256:{digest(place / 'out/x')}"]
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


def test_parameters_are_equal_where_dvc_finds_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path / "dvc.yaml",
        "stages:\n  shout:\n    do:\n      params:\n        - a.${key}\n        - b\n      outs: [c]\n",
    )

    def found(text: str) -> dict[str, str]:
        return stage.param_digests("shout", "x", text.encode())

    first = found("a: {x: {k: 1, l: [1, {m: yes, 3: 0.5}]}, y: 1}")
    assert first.keys() == {"a.x", "b"}
    assert found("a: {y: 2, x: {l: [1.0, {3: 0.5, m: yes}], k: true}}\nb: null") == first
    for other in (
        "{k: 2, l: [1, {m: yes, 3: 0.5}]}",
        '{k: "1", l: [1, {m: yes, 3: 0.5}]}',
        "{k: 1, l: [{m: yes, 3: 0.5}, 1]}",
    ):
        now = found(f"a: {{x: {other}}}")
        assert now["a.x"] != first["a.x"] and now["b"] == first["b"]
    before = b"a: {x: 1}\nb: 1\n"
    write(tmp_path / "params.yaml", "a: {x: 1, y: 1}\nb: 2\n")
    assert list(stage.changed_params("shout", "x", before)) == ["b in params.yaml"]
    write(tmp_path / "params.yaml", "a: {x: 1")
    assert list(stage.changed_params("shout", "x", before)) == ["params.yaml"]
