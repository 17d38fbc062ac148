"""kit/digests.py: a digest follows names and bytes alone, and what is remembered of them is true."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT, leftovers, write
from kit import digests, stage

files = st.dictionaries(
    st.from_regex(r"[a-c]{1,2}(/[a-cé]{1,2})?\.txt", fullmatch=True), st.binary(max_size=20), min_size=1, max_size=5
)


def fill(folder: Path, content: dict[str, bytes]) -> None:
    for name, data in content.items():
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


def test_link_to_a_file_and_a_linked_input_are_read(here: Path) -> None:
    """The content counts: a file that is a link, and an input that is itself a link to a folder."""
    plain = digests.digest(Path("input"))
    Path("input/a.txt").rename("a.txt")
    Path("input/a.txt").symlink_to("../a.txt")
    Path("linked").symlink_to("input")
    assert digests.digest(Path("input")) == digests.digest(Path("linked")) == plain
    write(here / "a.txt", "ho")
    assert digests.digest(Path("linked")) != plain


@settings(max_examples=60, deadline=None)
@given(content=files, seed=st.integers(0, 99))
def test_digest_follows_names_and_bytes_alone(content: dict[str, bytes], seed: int) -> None:
    """Order of creation, time stamps, place, links, threads: none matters. A byte or a name does."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        first, second = Path(one, "a"), Path(other, "deep/b")
        fill(first, content)
        plain = digests.digest(first)
        names = list(content)
        random.Random(seed).shuffle(names)
        fill(second, {name: content[name] for name in names})
        for path in second.rglob("*.txt"):
            os.utime(path, (seed, seed))
        assert digests.digest(second, threads=1 + seed % 9) == plain
        changed = sorted(path for path in second.rglob("*.txt") if path.is_file())[0]
        changed.write_bytes(changed.read_bytes() + b".")
        assert digests.digest(second) != plain
        changed.write_bytes(changed.read_bytes()[:-1])
        changed.rename(changed.with_name("renamed.txt"))
        assert digests.digest(second) != plain


def test_digest_does_not_follow_the_order_of_a_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems list the same folder in different orders."""
    plain = digests.digest(Path("input"))
    listed = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(listed(self, pattern))))
    assert digests.digest(Path("input")) == plain


def test_digest_separates_files(here: Path) -> None:
    """Bytes that move from one file to the next, or into a name, are a change."""
    found = set()
    for number, content in enumerate([{"a": b"xy", "b": b""}, {"a": b"x", "b": b"y"}, {"ab": b"xy"}, {"a/b": b"xy"}]):
        fill(here / str(number), content)
        found.add(digests.digest(here / str(number)))
    assert len(found) == 4


def test_digest_ignores_what_dvc_ignores(here: Path) -> None:
    """Byte code and what a killed stage left beside a folder are no input; an empty folder is none either."""
    plain = digests.digest(Path("input"))
    write(here / "input/__pycache__/a.cpython-311.pyc", "byte code")
    write(here / "input/.tmp-laws/documents/data-00000.arrow", "half")
    write(here / "input/.tmp-old-laws/documents/data-00000.arrow", "old")
    (here / "input/empty").mkdir()
    assert digests.digest(Path("input")) == plain
    ignored = (ROOT / ".dvcignore").read_text().split()
    assert {"__pycache__", ".tmp-*"} <= set(ignored)


def test_digest_of_a_folder_below_an_ignored_name(here: Path) -> None:
    """What is above the folder does not matter: a stage digests its own temporary output."""
    shutil.copytree("input", ".tmp-x/__pycache__")
    assert digests.digest(Path(".tmp-x/__pycache__")) == digests.digest(Path("input"))


def test_digest_knows_odd_names(here: Path) -> None:
    """File names that are not UTF-8 have a digest, too."""
    Path("odd").mkdir()
    Path(os.fsdecode(b"odd/caf\xe9.txt")).write_text("x")
    assert len(digests.digest(Path("odd"))) == 64


# --- digests that are remembered ---------------------------------------------------------------------------------


@pytest.fixture
def read(here: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files other than code that were read for their SHA-256; those of a byte and more are remembered."""
    paths: list[str] = []
    digest = digests._file_digest
    monkeypatch.setattr(digests, "REMEMBERED", 1)
    monkeypatch.setattr(stage, "REMEMBERED", 1)
    monkeypatch.setattr(
        digests,
        "_file_digest",
        lambda path: (paths.append(str(path)) if path.suffix != ".py" else None, digest(path))[1],
    )
    return paths


def inputs_of_a_run(inputs: tuple[str, ...] = ("input",), out: str = "out/x", said: str = "HI") -> dict[str, str]:
    """Run a stage and return the digests of its inputs as it has them; a wrong one fails."""
    shutil.rmtree(".work/seen", ignore_errors=True)  # a stage would refuse what only its change time tells apart
    with stage.run("shout", "x", list(inputs), [out]) as run:
        write(run.outputs[0] / "text", said)
        found = dict(run.digests)
    assert found == {path: digests.digest(Path(path)) for path in inputs}
    return found


@pytest.fixture
def noting(here: Path) -> None:
    disk = subprocess.run(["stat", "--file-system", "--format=%T", "."], capture_output=True, text=True, check=True)
    if disk.stdout.strip() == "tmpfs":
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
    assert found == {path: digests.digest(Path(path)) for path in ("input", "out/x")}


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


def test_a_store_into_a_small_mapped_file_is_seen_by_the_stage_that_reads_it(here: Path, noting: None) -> None:
    """Its SHA-256 is not remembered, but the stage and its workers ask its times whether it stayed as it was."""
    assert Path("input/a.txt").stat().st_size < digests.REMEMBERED
    with Path("input/a.txt").open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[:] = b"ho"  # from here on no store would show, but for what the stage does
        with (
            pytest.raises(SystemExit, match="input changed while the stage ran"),
            stage.run("shout", "x", ["input"], ["out/x"]) as run,
        ):
            write(run.outputs[0] / "text", "HO")
            mapped[:] = b"no"
            run.guards["input"].check()


@pytest.mark.parametrize("count", [2, 100])
def test_all_pages_of_settled_files_are_written_out(here: Path, noting: None, count: int) -> None:
    """Of a few files one by one, of many all at once."""
    for number in range(count):
        write(here / f"many/{number:03}", "hi")
    with Path("many/001").open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[:] = b"ho"
        before = digests.settled(digests.state(Path("many")))
        mapped[:] = b"no"
        assert [one for one in before if one not in digests.state(Path("many"))] == [before[1]]


def test_an_edit_in_the_same_moment_is_seen(here: Path, read: list[str]) -> None:
    """A file system's clock stands still for some milliseconds; what changed in the last of them is not trusted."""
    for number in range(20):
        Path("input/a.txt").write_text(f"{number:3}")
        states = digests.state(Path("input"))
        settled = digests.settled(states)
        Path("input/a.txt").write_text(f"{number:3}"[::-1])
        assert not set(settled) & set(digests.state(Path("input/a.txt")))


def test_what_is_of_a_later_time_or_another_disk_than_the_clock_is_not_noted(here: Path, noting: None) -> None:
    (name, device, *middle, changed) = digests.state(Path("input/a.txt"))[0]
    assert len(digests.settled([(name, device, *middle, changed)])) == 1
    assert digests.settled([(name, device, *middle, changed + 10**12)]) == []
    assert digests.settled([(name, device + 1, *middle, changed)]) == []


def test_what_could_not_be_written_out_is_not_noted(
    here: Path, read: list[str], noting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = digests.state(Path("input"))
    assert digests.settled(states) == states

    def refused(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink() == Path("input/a.txt").resolve():
            raise OSError("no fsync here")

    monkeypatch.setattr(digests.os, "fsync", refused)
    assert digests.settled(states) == []


def test_a_file_that_changes_while_it_is_read_is_not_noted(
    here: Path, monkeypatch: pytest.MonkeyPatch, read: list[str], noting: None
) -> None:
    """Else what was read of the one content would be believed of the other."""
    path, digest = Path("input/a.txt"), digests._file_digest

    def changed_before_it_is_read(file: Path) -> str:
        path.write_text("ho")
        return digest(file)

    states = digests.state(path)
    with monkeypatch.context() as patch:
        patch.setattr(digests, "_file_digest", changed_before_it_is_read)
        digests.input_digests(path, states, 1)
    assert str(path) not in digests.read_note(digests.DIGESTS)
    digests.input_digests(path, digests.state(path), 1)
    assert str(path) in digests.read_note(digests.DIGESTS)


def test_a_file_that_may_not_be_read_is_one_sentence(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        SystemExit, match=r"^input/a.txt may not be read; give yourself the right \(chmod u\+r input/a.txt\)"
    ):
        digests.digest(Path("input"))


def test_a_folder_that_may_not_be_read_is_one_sentence(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python lists a tree without it, and all that it holds would be missing in silence."""
    right = digests.os.access
    monkeypatch.setattr(digests.os, "access", lambda path, mode: path.name != "deep" and right(path, mode))
    with pytest.raises(SystemExit, match=r"^input/deep may not be read; .* \(chmod u\+rx input/deep\) and run again"):
        digests.digest(Path("input"))
    write(here / "input/.git/deep/a", "")
    before = digests.digest(Path("input/a.txt"))
    monkeypatch.setattr(digests.os, "access", lambda path, mode: path.name != ".git")
    assert digests.file_digests(Path("input"))["a.txt"] == before


def test_a_damaged_note_is_not_believed(here: Path, read: list[str], noting: None) -> None:
    inputs_of_a_run()
    content = digests.DIGESTS.read_bytes()
    wrong = content.replace(digests.digest(Path("input/a.txt")).encode(), b"0" * 64)
    assert wrong != content
    for bad in (wrong, b"", b"no", content[:-9]):
        digests.DIGESTS.write_bytes(bad)
        inputs_of_a_run()


def test_small_files_are_not_noted_and_gone_ones_forgotten(
    here: Path, noting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred thousand small files would make the note longer to read than they are."""
    write(here / "input/large", "x" * digests.REMEMBERED)
    inputs_of_a_run()
    assert set(digests.read_note(digests.DIGESTS)) == {"input/large"}
    (here / "input/large").unlink()
    inputs_of_a_run(said="x" * digests.REMEMBERED)
    assert set(digests.read_note(digests.DIGESTS)) == {"out/x/text"}
    assert leftovers(here) == []
    assert sorted(path.name for path in digests.WORK.iterdir()) == ["digests", "imports", "locks", "seen"]
