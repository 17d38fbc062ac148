"""stages/check_runs.py: what DVC calls up to date is of the files, code and parameters as they are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import copy_project, dvc, git, repro, with_notes, write
from test_check_params import TEXT

SIGN = "and then again what you wanted to run.\n"


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with one source, cleaned by DVC. To be read, never written."""
    project = copy_project(tmp_path_factory.mktemp("runs") / "project")
    write(project / "params.yaml", TEXT)
    write(project / "data/raw/laws/a.txt", "text of a law")
    git(project, "init", "--quiet")
    repro(project, "clean@laws")
    return project


@pytest.fixture
def laws(cleaned: Path, tmp_path: Path) -> Path:
    """A copy of it, to be edited; it was moved to another disk, so to say: all states of files are new."""
    return Path(shutil.copytree(cleaned, tmp_path / "project"))


def check(project: Path) -> tuple[str, str]:
    """Return what the check prints, and what it refuses for."""
    command = [sys.executable, "stages/check_runs.py"]
    finished = subprocess.run(
        command, cwd=project, capture_output=True, text=True, check=False, env=with_notes(project)
    )
    assert finished.returncode == bool(finished.stderr), finished.stderr
    return finished.stdout, finished.stderr


def store(path: Path, text: str) -> None:
    """Write text of the same size under the old inode and time, as a tar with fixed times does."""
    before = path.stat()
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        ("echo new >data/raw/laws/b.txt", "data/raw/laws/b.txt"),
        ("echo '# new' >>stages/clean_rules.py", "stages/clean_rules.py"),
        ("sed -i 's/CC0-1.0/MIT/' params.yaml", "sources.laws.clean in params.yaml"),
    ],
)
def test_what_came_while_the_stage_ended_is_said(laws: Path, edit: str, what: str) -> None:
    """After the stage has looked and before DVC hashes: no stage would read it. What the sentence says mends it.

    The run cache, which others may share, keeps what it knows of other stages.
    """
    pipeline = (laws / "dvc.yaml").read_text(encoding="utf-8")
    stage = "python stages/clean.py ${key}"
    write(laws / "dvc.yaml", pipeline.replace(f"exec {stage}", f"{stage} && sh edit"))
    write(laws / "edit", f"test -e edited || {{ touch edited; {edit}; }}\n")
    repro(laws, "clean@laws")
    _, refused = check(laws)
    assert refused.startswith(f"clean@laws: DVC takes {what} for what the stage has read, which it has not; run\n")
    runs = laws / ".dvc/cache/runs"
    old = [path for path in runs.rglob("*") if path.is_file()]
    write(other := runs / "ab/abc/def", old[0].read_text(encoding="utf-8").replace("@laws.json", "@laws_new.json"))
    command, end = refused.splitlines()[1:]
    assert end == "and then again what you wanted to run."
    subprocess.run(command, shell=True, cwd=laws, check=True, env=with_notes(laws))
    assert check(laws) == ("", "")
    left = {path for path in runs.rglob("*") if path.is_file()}
    assert other in left and len(left) == 2  # and that of the last run


def test_a_path_that_was_edited_while_dvc_ran_is_said(laws: Path) -> None:
    """DVC has read params.yaml at its own start, and ties the old path to what the stage reads in the new one."""
    write(laws / "data/raw/other/a.txt", "text of another")
    pipeline = (laws / "dvc.yaml").read_text(encoding="utf-8")
    write(laws / "dvc.yaml", pipeline.replace("exec python stages/clean.py", "sh edit && python stages/clean.py"))
    write(laws / "edit", "test -e edited || { touch edited; sed -i s#data/raw/laws#data/raw/other# params.yaml; }\n")
    repro(laws, "clean@laws")
    assert check(laws) == ("", "")  # the new path DVC has yet to read
    write(laws / "params.yaml", TEXT)
    assert "sources.laws.path" in dvc(laws, "status", "clean@laws").stdout
    repro(laws, "clean@laws")
    assert check(laws) == ("", "")
    assert b"text of a law" in (laws / "data/clean/law/laws/documents/data-00000.arrow").read_bytes()


def test_what_was_committed_and_never_written_is_said(laws: Path) -> None:
    """`dvc commit -f` takes over what lies there, under other parameters, or another output; .work may be deleted."""
    documents = laws / "data/clean/law/laws/documents/data-00000.arrow"
    ruled = TEXT.replace("license:", "rules: [nfc, {rule: length, min_chars: 3}]\n      license:")
    write(laws / "params.yaml", ruled)
    dvc(laws, "commit", "-f", "clean@laws")
    shutil.rmtree(laws / ".work")
    _, refused = check(laws)
    assert refused.startswith(
        "clean@laws: DVC takes sources.laws.clean in params.yaml for what the stage has read, which"
    )
    subprocess.run(refused.splitlines()[1], shell=True, cwd=laws, check=True, env=with_notes(laws))
    write(laws / "data/raw/laws/b.txt", "text of another")
    repro(laws, "dedup@law")
    assert check(laws) == ("", "")
    documents.write_bytes(documents.read_bytes().replace(b"text of a law", b"text of a jaw"))
    dvc(laws, "commit", "-f", "clean@laws", "dedup@law")
    _, refused = check(laws)
    assert refused.startswith(
        "clean@laws (and 1 more stages): DVC takes data/clean/law/laws for what the stage has written, which it has not"
    )
    subprocess.run(refused.splitlines()[1], shell=True, cwd=laws, check=True, env=with_notes(laws))
    repro(laws, "dedup@law")
    assert check(laws) == ("", "")
    assert b"text of a law" in documents.read_bytes()


def test_what_a_failed_stage_leaves_is_no_fault(laws: Path) -> None:
    """DVC removes the outputs before it starts a stage: the folder above them is empty."""
    write(laws / "data/raw/laws/b.txt", "text of another")
    repro(laws, "dedup@law")
    shutil.rmtree(laws / "data/clean/law/laws")
    assert check(laws) == ("", "")


def test_what_dvc_will_run_again_is_no_fault(laws: Path) -> None:
    """A file, a parameter and code that were edited since: DVC sees them, and nothing is refused before it runs."""
    assert check(laws) == ("", "")
    write(laws / "params.yaml", TEXT.replace("data/raw/laws", "./data/raw//laws/"))
    repro(laws, "clean@laws")
    assert check(laws) == ("", "")
    for path, old, new in (
        ("data/raw/laws/a.txt", "law", "jaw of another kind"),
        ("params.yaml", "CC0-1.0", "MIT"),
        ("stages/clean_rules.py", "import annotations", "import annotations  # new"),
    ):
        file = laws / path
        write(file, file.read_text(encoding="utf-8").replace(old, new))
        assert check(laws) == ("", "")
    write(laws / "dvc.yaml", "stages: {")
    _, refused = check(laws)
    assert re.match(
        r"clean@laws needs a look at what DVC knows, but `dvc status` fails \(.*dvc.yaml.*\); run again", refused
    )


@pytest.mark.parametrize("path", ["data/raw/laws/a.txt", "stages/clean_rules.py"])
def test_what_dvc_takes_for_the_old_is_said(laws: Path, path: str) -> None:
    """Of the same inode, size and time: `dvc repro` alone would start no stage. New rights alone are no change."""
    assert check(laws) == ("", "")
    assert "up to date" in dvc(laws, "status", "clean@laws").stdout  # it has looked at the files of this copy
    file = laws / path
    text = file.read_text(encoding="utf-8")
    for mode in (0o600, 0o644):
        file.chmod(mode)
        assert check(laws) == ("", "")
    store(file, text.replace("a", "e", 1))
    assert check(laws)[1].startswith(
        f"clean@laws: {path} has other bytes than when it was last read, but the same inode, size and time"
    )
    store(file, text)
    assert check(laws) == ("", "")


def test_the_old_text_under_the_time_of_the_new_is_said(laws: Path) -> None:
    """Where the stage did not run in between, for DVC took its result from the run cache: no note tells."""
    raw = laws / "data/raw/laws/a.txt"
    os.utime(raw, (1, 1))
    assert check(laws) == ("", "")
    for text, seconds in (("text of a jaw", 2), ("text of a law", 3)):
        raw.write_text(text)
        os.utime(raw, (seconds, seconds))
        last = repro(laws, "clean@laws")
    assert "is cached" in last
    store(raw, "text of a jaw")
    _, refused = check(laws)
    assert refused.startswith("clean@laws: DVC takes data/raw/laws for what the stage has read")
    subprocess.run(refused.splitlines()[1], shell=True, cwd=laws, check=True, env=with_notes(laws))
    assert check(laws) == ("", "")
    assert b"text of a jaw" in (laws / "data/clean/law/laws/documents/data-00000.arrow").read_bytes()
    raw.write_text("text of a law")
    os.utime(raw, (4, 4))
    assert "clean@laws" in dvc(laws, "status", "clean@laws").stdout


def test_a_file_with_the_old_bytes_is_read_once(laws: Path) -> None:
    """After `touch` or `dvc checkout`; and what no stage reads, as .git of a source that is a clone, is no change."""
    raw, note = laws / "data/raw/laws/a.txt", laws / ".work/seen/clean@laws.json"
    assert check(laws) == ("", "")
    first = note.read_bytes()
    write(laws / "data/raw/laws/.git/HEAD", "ref")
    assert check(laws) == ("", "") and note.read_bytes() == first
    os.utime(raw, (1, 1))
    assert check(laws) == ("", "") and (second := note.read_bytes()) != first
    assert check(laws) == ("", "") and note.read_bytes() == second


def test_without_notes_all_is_read(laws: Path) -> None:
    """They may be deleted; what came by `dvc pull` has none."""
    shutil.rmtree(laws / ".work")
    assert check(laws) == ("", "")
    assert (laws / ".work/seen/clean@laws.json").is_file()
    assert "up to date" in dvc(laws, "status", "clean@laws").stdout
    store(laws / "data/raw/laws/a.txt", "text of a jaw")
    shutil.rmtree(laws / ".work")
    assert check(laws)[1].startswith("clean@laws: DVC takes data/raw/laws/a.txt for what the stage has read")


def test_files_that_dvc_does_not_see_are_said(laws: Path) -> None:
    """What came under .dvcignore, or below a .dvc of its own: no stage would ever start for it."""
    write(laws / "data/raw/laws/deep/.dvc/config", "")
    assert check(laws) == ("", "")
    write(laws / "data/raw/laws/deep/b.txt", "new")
    assert "clean@laws: data/raw/laws/deep is a DVC repository of its own" in check(laws)[1]
    shutil.rmtree(laws / "data/raw/laws/deep")
    with (laws / ".dvcignore").open("a") as file:
        file.write("b.txt\n")
    assert check(laws) == ("", "")
    write(laws / "data/raw/laws/b.txt", "new")
    assert "clean@laws: data/raw/laws/b.txt: .dvcignore names it, so DVC sees no change in it" in check(laws)[1]


def test_other_versions_are_said(laws: Path) -> None:
    """DVC calls it up to date. What is not here, as in a fresh clone, will be made or fetched anyway."""
    record = laws / "metrics/runs/clean@laws.json"
    write(record, re.sub(r"pyarrow [\d.]+", "pyarrow 1.2", record.read_text(encoding="utf-8")))
    assert re.match(r"clean@laws ran with other versions \(pyarrow 1\.2, now \d.*--force", check(laws)[0])
    write(record, re.sub(r'"pyarrow [\d.]+"', '"pytest 1.2"', record.read_text(encoding="utf-8")))
    assert "(pytest 1.2, now " in check(laws)[0]  # as of the library of a format, which no import names
    record.rename(gone := record.with_name("clean@gone.json"))
    assert check(laws) == ("", "")  # no source of params.yaml any more
    gone.rename(record)
    (laws / "data/clean").rename(laws / "kept")
    assert check(laws) == ("", "")
    (laws / "kept").rename(laws / "data/clean")
    assert check(laws)[0]
    write(record, "<<<<<<< ours\n")
    assert check(laws) == ("", "")
