"""SHA-256 of files and folders, and what is remembered of them from run to run, in .work/.

    digest(Path("data/raw/laws"))        ->  SHA-256 of the sorted (relative path, SHA-256) pairs
    file_digests(Path("data/raw/laws"))  ->  {"a.txt": SHA-256 of its bytes, "deep/b.txt": ...}
    state(Path("data/raw/laws"))         ->  name, device, inode, size, mtime and ctime of each file

What is remembered, in .work/digests, is believed of a file whose state is the same: such a file is not read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shlex
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

WORK = Path(".work")
DIGESTS = WORK / "digests"
REMEMBERED = 2**20  # bytes of a file whose SHA-256 is remembered; a smaller one is read in no time
OWN_IGNORED = {"__pycache__", ".tmp-*", ".work", ".memo", ".venv", ".git"}  # the project's own lines of .dvcignore
LEFT_OUT = {*OWN_IGNORED, ".dvc", ".hg"}  # of any folder: that, and what DVC itself ignores
RECENT = 600 * 10**9  # ns; the kernel writes a changed page to the disk long before
# Name, device, inode, size, mtime and ctime of a file.
State = tuple[str, int, int, int, int, int]


def digest(path: Path, threads: int = 1) -> str:
    """Return the SHA-256 of a file, or of the sorted (relative path, SHA-256) pairs of a folder; see `file_digests`."""
    return combined(file_digests(path, threads=threads))


def file_digests(path: Path, known: dict[Path, str] | None = None, threads: int = 1) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder by relative path, sorted; of a file, its own by the name "".

    `known`: files that need not be read. No more than 8 `threads` are started.

    Left out is what DVC leaves out: byte code, what a killed stage left behind, .git, links to folders. Raises
    SystemExit when the path is missing or the folder holds no file, or one that may not be read.
    """
    files = [path] if path.is_file() else _all_files(path)
    if not files:
        state = "is empty" if path.is_dir() else "does not exist"
        raise SystemExit(f"{path} {state}; put the files there, or run the stage that writes it (`dvc repro`).")
    names = ["" if file == path else file.relative_to(path).as_posix() for file in files]
    if len(files) == 1:  # as of each module: threads take longer to start
        return {names[0]: (known or {}).get(files[0]) or _file_digest(files[0])}
    with ThreadPoolExecutor(max_workers=min(8, threads)) as pool:
        digests = pool.map(lambda file: (known or {}).get(file) or _file_digest(file), files)
        return dict(zip(names, digests, strict=True))


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except PermissionError:
        raise SystemExit(_may_not_be_read(path, "r")) from None


def _may_not_be_read(path: Path, right: str) -> str:
    return f"{path} may not be read; give yourself the right (chmod u+{right} {shlex.quote(str(path))}) and run again."


def combined(files: dict[str, str]) -> str:
    """Return the one digest of what `file_digests` found."""
    pairs = json.dumps(list(files.items()), ensure_ascii=False)
    return files.get("") or hashlib.sha256(pairs.encode("utf-8", "surrogateescape")).hexdigest()


def state(path: Path) -> list[State]:
    """Return the state of a file, or of each file that `digest` reads in a folder."""
    found = []
    for file in [path] if path.is_file() else _all_files(path):
        stat = file.stat()
        found.append((str(file), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return found


def above(path: Path, files: Iterable[str]) -> set[str]:
    """Return the folders of an input, itself included, that hold these of its files."""
    found: set[str] = set()
    for name in files:
        while len(name := os.path.dirname(name)) >= len(str(path)) and name not in found:  # noqa: PTH120 (much faster)
            found.add(name)
    return found


def folder_states(names: Iterable[str]) -> dict[str, tuple[int, int, int]]:
    """Return device, inode and ctime of folders: while another stands in its place, no file's own state changes."""
    stats = {name: Path(name).stat() for name in names}
    return {name: (stat.st_dev, stat.st_ino, stat.st_ctime_ns) for name, stat in stats.items()}


def _all_files(folder: Path) -> list[Path]:
    """Return the files in a folder; raise SystemExit about one in it that may not be read, which rglob passes over."""
    files = []
    for path in (folder, *folder.rglob("*")):  # a folder before what is in it
        if path.is_file():
            files.append(path)
        elif path.is_dir() and not (
            path.is_symlink() or os.access(path, os.R_OK | os.X_OK) or _ignored(path.relative_to(folder))
        ):
            raise SystemExit(_may_not_be_read(path, "rx"))
    return sorted(path for path in files if not _ignored(path.relative_to(folder)))


def holds_files(path: Path) -> bool:
    """Return whether a file is there, or a folder with at least one that `digest` reads."""
    inside = (one for one in path.rglob("*") if one.is_file() and not _ignored(one.relative_to(path)))
    return path.is_file() or next(inside, None) is not None


def _ignored(path: Path) -> bool:
    return any(part in LEFT_OUT or part.startswith(".tmp-") for part in path.parts)


def unseen(root: str, names: Iterable[str]) -> str | None:
    """Return a sentence about one of these files of an input whose changes DVC does not see, None where it sees all.

    It leaves out what .dvcignore names, and a folder in the input that is a DVC repository of its own; of an input that
    is one as a whole it sees all. Hidden files no stage reads.
    """
    visible = [name for name in names if "/." not in f"/{name}"]
    inside = {os.path.dirname(name) for name in visible} - {""}  # noqa: PTH120 (much faster)
    for folder in sorted({parent for name in inside for parent in (Path(name), *Path(name).parents[:-1])}):
        if (folder / ".dvc").is_dir() and folder != Path(root):
            return (
                f"{folder} is a DVC repository of its own, and this one's DVC sees no change in it; "
                "put a copy of its files without .dvc in its place."
            )
        if (folder / ".dvcignore").is_file():
            return (
                f"{folder}/.dvcignore hides files, and DVC sees no change in them; remove it and name them in `ignore` "
                "of their source, or move them elsewhere."
            )
    note = Path(".dvcignore")
    lines = note.read_text(encoding="utf-8").splitlines() if note.is_file() else []
    if {line.strip() for line in lines if line.strip() and not line.startswith("#")} <= OWN_IGNORED:
        return None
    from pathspec import GitIgnoreSpec  # comes with DVC, which reads the file by it

    found = next(iter(GitIgnoreSpec.from_lines(lines).match_files(visible)), None)
    return found and (
        f"{found}: .dvcignore names it, so DVC sees no change in it; take the line out of .dvcignore and name it in "
        "`ignore` of its source, or move it elsewhere."
    )


SEEN = WORK / "seen"  # what a stage last read
# Of a file as a stage last read it: "inode size mtime ctime SHA-256", in one text, for there may be many files.
Seen = dict[str, str]


def seen(states: Iterable[State], files: dict[str, str], root: Path) -> Seen:
    """Return the states of an input's files, with what `file_digests` found of them."""
    named = ((one, one[0][len(str(root)) + 1 :]) for one in states)  # "" of the input itself
    return {one[0]: " ".join(map(str, (*one[2:], files[inside]))) for one, inside in named if inside in files}


def taken_for_old(before: dict[str, Any], now: Seen) -> str | None:
    """Return a sentence about the first file that has other bytes than before and that DVC takes for the one of before.

    DVC looks at inode, size and mtime. `before`: what `seen` returned, from a note.
    """
    for name, found in now.items():
        (*then, _, then_sha256), (*shown, _, sha256) = before.get(name, "- -").split(" "), found.split(" ")
        if then == shown and then_sha256 != sha256:
            return (
                f"{name} has other bytes than when it was last read, but the same inode, size and time, so DVC takes "
                f"it for the old file; give it a new time (touch {shlex.quote(name)}) and run again."
            )
    return None


def seen_since(path: Path, before: dict[str, Any], threads: int) -> Seen:
    """Return what `seen` does of an input as it is now; a file in the state of before is not read again."""
    states = state(path)
    same = {one[0]: sha256 for one in states if (sha256 := _as_before(one, before.get(one[0], "")))}
    files = file_digests(path, {Path(name): sha256 for name, sha256 in same.items()}, threads)
    return seen(states, files, path)


def _as_before(now: State, before: str) -> str | None:
    """Return the SHA-256 of a file that is in the state of before."""
    then, _, sha256 = before.rpartition(" ")
    return sha256 if then == " ".join(map(str, now[2:])) else None


def just_written(folder: Path) -> dict[Path, str]:
    """Return the SHA-256 of the shards of new Arrow folders, which their writer worked out for the manifest."""
    found: dict[Path, str] = {}
    for first in folder.rglob("data-00000.arrow"):
        manifest = json.loads((first.parent / "manifest.json").read_text(encoding="utf-8"))
        found |= {first.parent / shard["name"]: shard["sha256"] for shard in manifest["shards"]}
    return found


def input_digests(path: Path, states: list[State], threads: int) -> dict[str, str]:
    """Return what `file_digests` does; a large file that an earlier stage read or wrote is not read again.

    As good as reading it where `settled` says so: there each write changes a time that no program can set. Small files
    are read each time, but settled, too, where they are recent: a stage looks at the times alone to see whether they
    change while it works.
    """
    known = read_note(DIGESTS)
    same = {Path(now[0]): known[now[0]][1] for now in states if known.get(now[0], [None])[0] == list(now)}
    recent = time.time_ns() - RECENT
    new = [now for now in states if Path(now[0]) not in same and (now[3] >= REMEMBERED or now[5] > recent)]
    quiet = [now for now in settled(new) if now[3] >= REMEMBERED]
    found = file_digests(path, same, threads)
    after = {now[0]: now for now in state(path)} if quiet else {}
    remember(
        {
            now[0]: (now, found["" if now[0] == str(path) else Path(now[0]).relative_to(path).as_posix()])
            for now in quiet
            if after.get(now[0]) == now
        }
    )
    return found


def remember(new: dict[str, tuple[State, str]]) -> None:
    """Note states and SHA-256 of files beside those of others that are still there."""
    if new:
        known = {name: entry for name, entry in (read_note(DIGESTS) | new).items() if Path(name).is_file()}
        write_note(DIGESTS, known)


def settled(states: list[State]) -> list[State]:
    """Return those files whose next change is sure to show in their change time (ctime).

    The clock of a disk stands still for some milliseconds: a file may change again within them and keep its ctime. So
    this waits until the clock is beyond the latest ctime. A page that another process has mapped is written out first,
    for only the first store into it after that sets the ctime. Where no such store does (tmpfs), nothing is returned.
    """
    if not states:
        return []
    with contextlib.suppress(OSError):  # a full disk: nothing is remembered
        WORK.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=WORK, buffering=0) as clock:
            clock.write(b"0")
            now = os.fstat(clock.fileno())
            latest = max(now.st_ctime_ns, *(one[5] for one in states))
            with mmap.mmap(clock.fileno(), 1) as mapped:
                for _ in range(20):  # a tick takes 4 to 10 ms
                    os.fsync(clock.fileno())
                    time.sleep(0.001)
                    mapped[0] ^= 1
                    now = os.fstat(clock.fileno())
                    if now.st_ctime_ns > latest:
                        break
        quiet = [one for one in states if one[1] == now.st_dev and now.st_ctime_ns > latest]
        if len(quiet) > 64:  # one by one, each may wait for the disk
            os.sync()
            return quiet
        for name, *_ in quiet:
            with Path(name).open("rb") as file:
                os.fsync(file.fileno())
        return quiet
    return []


def read_note(note: Path) -> dict[str, Any]:
    """Return what `write_note` wrote; nothing when it is damaged."""
    try:
        digest, content = note.read_bytes().split(b"\n", 1)
    except (OSError, ValueError):
        return {}
    return json.loads(content) if _noted(content) == digest else {}


def write_note(note: Path, entries: dict[str, Any]) -> None:
    """Write JSON into a file of .work/, with a digest of itself."""
    content = json.dumps(entries, sort_keys=True).encode()
    temporary = note.with_name(f".tmp-{note.name}-{os.getpid()}")
    with contextlib.suppress(OSError):  # a full disk: nothing is remembered
        note.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(_noted(content) + b"\n" + content)
            temporary.replace(note)
        finally:
            temporary.unlink(missing_ok=True)


def _noted(content: bytes) -> bytes:
    return hashlib.sha256(b"states and SHA-256, 1\n" + content).hexdigest().encode()  # another layout, another number
