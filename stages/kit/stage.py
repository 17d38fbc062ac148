"""The contract that every stage keeps: an output is whole, belongs to the inputs that were read, or is not there.

    with stage.run("clean", "laws", inputs=["data/raw/laws"], outputs=["data/clean/pretrain/laws"]) as run:
        (folder,) = run.outputs              # an empty temporary folder beside the target
        ...                                  # write into it
        run.balance("records", read=10, kept=8, dropped=2)
        run.count(records=10, kept=8)

In this order: one writer per output (flock), inputs digested with SHA-256 (of large files remembered in .work/digests),
work in temporary folders, fsync, run record, inputs, code and parameters compared with the start (DVC hashes them only
after the command, so an edit meanwhile would tie the new ones to the old output), rename. A stage that is killed, fails
or fills the disk leaves the previous output as it was.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import hashlib
import importlib
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from kit.digests import (
    REMEMBERED,
    SEEN,
    WORK,
    Seen,
    State,
    above,
    combined,
    digest,
    file_digests,
    folder_states,
    input_digests,
    just_written,
    read_note,
    remember,
    seen,
    settled,
    state,
    taken_for_old,
    unseen,
    write_note,
)
from kit.params import parsed
from kit.stage_code import STAGES, code_digest, code_digests, run_otherwise, versions

RECORDS = Path("metrics/runs")
PARAMS, PIPELINE = Path("params.yaml"), Path("dvc.yaml")
T = TypeVar("T")
CLOCK_REALTIME_COARSE = 5  # linux/time.h; Python 3.11 has no name for it


class _Start(NamedTuple):
    """What decides beside the inputs, as it was when the process began: it may change while large inputs are hashed."""

    code: dict[Path, str]
    params: bytes

    @classmethod
    def of(cls, script: Path) -> _Start:
        return cls(code_digests(script), PARAMS.read_bytes() if PARAMS.is_file() else b"")


_start: _Start | None = None  # as `cli` found it


def cli(main: Callable[..., None], doc: str | None, **flags: Callable[[str], Any] | None) -> None:
    """Run a stage's `main` on the name given on the command line; `--help` prints `doc`.

    `flags`: what may stand behind the name, `show=int` for `--show 3`, `plan=None` for `--plan`, and goes to `main` by
    its name. Validates the whole of params.yaml first. A mistake of the user ends in one sentence and exit status 1; an
    error inside a library keeps its traceback.
    """
    given = _flags(sys.argv[2:], flags)
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help") or given is None:
        script = Path(sys.argv[0]).name
        optional = "".join(f" [--{flag}{' N' if kind else ''}]" for flag, kind in flags.items())
        print(f"usage: python stages/{script} NAME{optional}\n\n{(doc or '').strip()}{_keys(main)}")
        raise SystemExit(0 if "-h" in sys.argv or "--help" in sys.argv else 2)
    die_with_parent()
    global _start
    _start = _Start.of(STAGES / Path(sys.argv[0]).name)
    if sentence := run_otherwise(_start.code):
        raise SystemExit(sentence)
    # By name at run time: the check can only refuse and never changes a result, so it is no dependency of a stage.
    importlib.import_module("check_params").check()
    name = f"{Path(sys.argv[0]).stem}@{sys.argv[1]}"
    gc.freeze()  # what the imports brought stays to the end: no search for garbage need go through it
    gc.enable()
    try:
        main(sys.argv[1], **given)
    except KeyboardInterrupt:
        raise SystemExit(
            f"{name}: interrupted; nothing was published: run again, which goes on from the finished shards (.memo) or "
            "the last checkpoint (.work) of a stage that keeps them, and begins any other anew."
        ) from None
    except Exception as error:
        if _disk_is_full(error):
            raise SystemExit(
                f"{name}: no space left on the disk while writing; nothing was published: "
                "free some space (`dvc gc --workspace` drops unused cache, .memo may be deleted) and run again."
            ) from None
        if reason := _memory_is_full(error):
            raise SystemExit(f"{name}: {reason}; nothing was published: {_less_memory(main)}, and run again.") from None
        if not _is_mistake(error):
            raise
        raise SystemExit(f"{name}: {error}") from None


def _keys(main: Callable[..., None]) -> str:
    """Return what the class Params beside `main` says of each key in params.yaml."""
    params = main.__globals__.get("Params")
    lines = []
    for name, field in params.model_fields.items() if params else ():
        default = "" if field.is_required() else f" (default: {json.dumps(field.get_default(), default=str)})"
        choices = [f"[{', '.join(found)}]"] if (found := _choices(field.annotation)) else []
        said = " ".join([f"{name}{default}:", *choices, str(field.description)])
        lines += ["", *textwrap.wrap(said, 110, subsequent_indent="    ")]
    return "\n\nKeys in params.yaml:\n" + "\n".join(lines) if lines else ""


def _choices(annotation: Any) -> list[str]:
    """Return the words that a key may have, where its type names them; null is its default or said beside it.

    >>> _choices(Literal["a", "b"] | None), _choices(list[str])
    (['a', 'b'], [])
    """
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    is_union = get_origin(annotation) in (Union, UnionType)
    return [choice for one in get_args(annotation) for choice in _choices(one)] if is_union else []


def _flags(words: list[str], flags: dict[str, Callable[[str], Any] | None]) -> dict[str, Any] | None:
    """Return the values of `flags` in the words of a command line, None when another word stands there."""
    found: dict[str, Any] = {}
    while words:
        word, *words = words
        if word[:2] != "--" or word[2:] not in flags:
            return None
        kind = flags[word[2:]]
        try:
            found[word[2:]] = kind(words.pop(0)) if kind else True
        except (IndexError, ValueError):
            return None
    return found


def _is_mistake(error: Exception) -> bool:
    """Return whether a stage raised this ValueError in so many words; one out of `int(text)` is a bug.

    Of an error in a worker process the pool brings the traceback as text.
    """
    remote = type(error.__cause__).__name__ == "_RemoteTraceback"
    text = str(error.__cause__) if remote else "".join(traceback.format_exception(error, chain=False))
    path, line = re.findall(r'^  File "(.+)", line \d+, in .*\n +(.*)$', text, re.MULTILINE)[-1]
    return isinstance(error, ValueError) and STAGES in Path(path).resolve().parents and line.startswith("raise ")


def _disk_is_full(error: Exception) -> bool:
    """Return whether `error` says so: by number, or as safetensors and tokenizers (Rust) or torch.save (C++) put it."""
    text = str(error)
    by_number = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return by_number or "No space left on device" in text or "inline_container.cc" in text


def _memory_is_full(error: Exception) -> str | None:
    """Return how `error` says so (Python, NumPy, Arrow, torch on a CPU or a GPU, a killed worker), None for others."""
    if type(error).__name__ == "BrokenProcessPool":
        return "the system killed a worker process, most often because no memory is left"
    text = str(error)
    if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory|ALLOC_FAILED", text):
        return None
    said = ". ".join(text.split(". ")[:2]).rstrip(".")  # torch goes on with a page about its allocator
    return f"no memory left ({said})" if said else "no memory left"


def _less_memory(main: Callable[..., None]) -> str:
    """Return what needs less memory: batch sizes that change results by rounding alone, or fewer worker processes."""
    fields = main.__globals__["Params"].model_fields if "Params" in main.__globals__ else ()
    sizes = [name for name in fields if re.fullmatch("per_device_.*batch_size", name)]
    return f"lower {' or '.join(sizes)}" if sizes else "set TERROIR_WORKERS to fewer processes, or free some memory"


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies: a killed `dvc repro` must not leave a second writer."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        # Only a worker needs the module, and it has it; the start of a stage does not wait 11 ms for it.
        processes = sys.modules.get("multiprocessing.process")
        parent = processes.parent_process() if processes else None
        if parent and os.getppid() != parent.pid:
            os._exit(1)  # a worker that was orphaned before it could ask; it would hold the lock for ever


def workers() -> int:
    """Return the number of worker processes: TERROIR_WORKERS, or the cores of this machine. No result depends on it."""
    text = os.environ.get("TERROIR_WORKERS", "")
    if text and not (text.isdecimal() and int(text) > 0):
        raise SystemExit(f"TERROIR_WORKERS is {text!r}: set it to a whole number of processes, 1 or more.")
    return int(text) if text else len(os.sched_getaffinity(0))


class Guard(NamedTuple):
    """Says whether files of an input were written since the stage began; goes to the workers with their work.

    If they were, what was read of them belongs to other bytes than those of the digests, and must not be remembered.
    """

    root: Path  # of the input
    paths: list[Path]
    states: dict[str, State]  # of the files there, when the stage began
    folders: dict[str, tuple[int, int, int]]  # the states of those that hold them
    refusal: str

    def of(self, paths: list[Path]) -> Guard:
        """Return a guard of some of the files."""
        states = {name: self.states[name] for name in map(str, paths) if name in self.states}
        folders = {name: self.folders[name] for name in above(self.root, states)}
        return Guard(self.root, paths, states, folders, self.refusal)

    def holds(self, ctimes: bool = True) -> bool:
        """Return whether files and folders are as they were; without `ctimes`, those of files may be others."""
        with contextlib.suppress(FileNotFoundError):
            count = None if ctimes else -1
            now = {one[0]: one[:count] for path in self.paths for one in state(path)}
            before = {name: one[:count] for name, one in self.states.items()}
            return now == before and folder_states(self.folders) == self.folders
        return False

    def check(self) -> None:
        """Raise SystemExit when the files, just read, are not as they were; the sentence is that of `run`."""
        if not self.holds():
            raise SystemExit(self.refusal)


def guard(root: Path, refusal: str) -> Guard:
    """Return the guard of a whole input, as it is now.

    It waits until the kernel's clock of ctimes, which stands still for some milliseconds, is beyond all of them: each
    later change has another one.
    """
    for _ in range(50):  # a ctime of the future, as another machine may give, must not hold it up
        now = time.clock_gettime_ns(CLOCK_REALTIME_COARSE)
        states = {one[0]: one for one in state(root)}
        found = Guard(root, [root], states, folder_states(above(root, states)), refusal)
        if max([*(one[5] for one in states.values()), *(one[2] for one in found.folders.values())], default=0) < now:
            break
        time.sleep(0.001)
    return found


class Run:
    """What a stage holds while it works: temporary outputs, the key of its inputs, counts for the record."""

    def __init__(self, stage: str, item: str, inputs: list[Path], outputs: list[Path]) -> None:
        self.stage, self.item = stage, item
        self.code, self.params = _start or _Start.of(STAGES / f"{stage}.py")
        self.versions = versions(STAGES / f"{stage}.py")  # a stage adds those that only its parameters ask for
        self.inputs, self.targets = inputs, outputs
        self.outputs = [target.with_name(f".tmp-{target.name}") for target in outputs]
        self.record = RECORDS / f".tmp-{self.name}.json"
        self.guards = {str(path): guard(path, self.refusal(str(path))) for path in inputs}
        self.files = {
            path: input_digests(one.root, list(one.states.values()), workers()) for path, one in self.guards.items()
        }
        self.digests = {path: combined(files) for path, files in self.files.items()}
        self._look_at_what_dvc_does_not_see()
        self.counts: dict[str, int] = {}
        self.metrics: dict[str, float] = {}

    def _look_at_what_dvc_does_not_see(self) -> None:
        """Raise SystemExit about a file whose change DVC does not see: it would tie the old MD5 to the new output."""
        found: Seen = {}
        for path, one in self.guards.items():
            found |= (inside := seen(one.states.values(), self.files[path], one.root))
            if sentence := unseen(path, inside):
                raise SystemExit(sentence)
        for module, sha256 in self.code.items():
            name = module.relative_to(STAGES.parent)
            found |= seen([(str(name), *state(module)[0][1:])], {"": sha256}, name)
        note = SEEN / f"{self.name}.json"
        if sentence := taken_for_old(read_note(note), found):
            raise SystemExit(sentence)
        write_note(note, found)  # also of a run that fails: DVC has looked at the files by then

    @property
    def name(self) -> str:
        """DVC's name of the stage, e.g. `clean@laws`."""
        return f"{self.stage}@{self.item}" if self.item else self.stage

    def count(self, **counts: int) -> None:
        """Note numbers of things for the closing line and the run record."""
        self.counts.update(counts)

    def metric(self, **metrics: float) -> None:
        """Note measures of quality, which `dvc metrics show` lists, too."""
        self.metrics.update(metrics)

    def balance(self, unit: str, read: int, **parts: int) -> None:
        """Raise when `read` is not the sum of `parts`: nothing is published that has lost a record, byte or token."""
        if read != sum(parts.values()):
            shares = " + ".join(f"{count} {part}" for part, count in parts.items())
            raise ValueError(f"{read} {unit} were read but {shares} came out; nothing was published (this is a bug).")

    def key(self, params: Any) -> str:
        """Return a digest of everything that decides the result: inputs, code, library versions and `params`."""
        return self.recipe([self.digests, params])

    def recipe(self, params: Any) -> str:
        """Return a digest of code, library versions and `params`: what decides the result for a part of the inputs."""
        parts = [code_digest(self.code), self.versions, params]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def refusal(self, what: str) -> str:
        """Return the sentence about an input, a module or a parameter that changed."""
        return (
            f"{self.name}: {what} changed while the stage ran; nothing was published: "
            "let the change finish and run again."
        )

    def changed(self) -> str | None:
        """Return the first input, module or parameter that is no longer what the stage read, or None.

        Of an input the states are compared: no program sets the change time (ctime) of a file or folder but the kernel,
        at each write. One with the old content again is refused, too: nobody knows what was read in between. A file of
        which nothing but the ctime is another has new links or rights, as in a cache that several projects share, so
        its content decides.
        """
        inputs = (
            path
            for path, one in self.guards.items()
            if not one.holds() and not (one.holds(ctimes=False) and digest(one.root, workers()) == self.digests[path])
        )
        code = (f"stages/{path.relative_to(STAGES)}" for path, found in self.code.items() if digest(path) != found)
        keys = changed_params(self.stage, self.item, self.params)
        return next(itertools.chain(inputs, code, keys), None)

    def work_folder(self, params: Any) -> Path:
        """Return `.work/<stage>/<key>/`, the place of checkpoints: another input, code or parameter, another folder."""
        folder = WORK / self.name / self.key(params)[:32]
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def progress(self, items: Iterable[T], total: int, unit: str) -> Iterator[T]:
        """Yield `items`, showing a bar on a terminal and a line every 15 seconds in a log."""
        if sys.stderr.isatty():
            from rich.progress import track

            yield from track(items, description=self.name, total=total)
            return
        started = spoken = time.monotonic()
        for done, item in enumerate(items):
            if time.monotonic() - spoken > 15:
                spoken = time.monotonic()
                print(f"{self.name}: {done:,} of {total:,} {unit}, {spoken - started:.0f} s", flush=True)
            yield item


@contextlib.contextmanager
def run(stage: str, item: str, inputs: list[str], outputs: list[str]) -> Iterator[Run]:
    """Run the body of a stage under the contract above. `inputs` and `outputs` are paths relative to the root."""
    started = time.monotonic()
    with contextlib.ExitStack() as locks:
        for output in outputs:
            locks.enter_context(_lock(Path(output)))
        try:
            current = Run(stage, item, [Path(path) for path in inputs], [Path(path) for path in outputs])
        except FileNotFoundError as error:
            gone = f"{error.filename} went away while it was read; let the change finish and run again."
            raise SystemExit(f"{stage}@{item}: {gone}") from None
        for target, temporary in zip(current.targets, current.outputs, strict=True):
            _recover(target)
            _remove(temporary)
            temporary.mkdir(parents=True)
        try:
            yield current
            for temporary in current.outputs:
                _sync(temporary)
            written = _record(current, time.monotonic() - started)
            # Last, for DVC hashes the inputs soon after: an edit between the two is not seen.
            if changed := current.changed():
                raise SystemExit(current.refusal(changed))
            for target, temporary in zip(current.targets, current.outputs, strict=True):
                _publish(temporary, target)
            current.record.replace(RECORDS / f"{current.name}.json")
            remember(written)
        except Exception:  # of whatever kind: what was not there when it was to be read
            if changed := current.changed():
                raise SystemExit(current.refusal(changed)) from None
            raise
        finally:
            for temporary in [*current.outputs, current.record]:
                _remove(temporary)
            for target in current.targets:
                _recover(target)
    shown = ", ".join(
        f"{_plain(value)} {name.replace('_', ' ')}" for name, value in {**current.counts, **current.metrics}.items()
    )
    print(f"{current.name}: {shown} ({time.monotonic() - started:.1f} s)", flush=True)


def changed_params(stage: str, item: str, before: bytes) -> Iterator[str]:
    """Yield the keys that dvc.yaml gives this stage and whose values in params.yaml are others than before.

    Only these: while a long training runs, other phases may be edited.
    """
    now = PARAMS.read_bytes() if PARAMS.is_file() else b""
    if now == before:
        return
    from ruamel.yaml.error import YAMLError

    try:
        then, new = param_digests(stage, item, before), param_digests(stage, item, now)
    except (YAMLError, ValueError):
        yield "params.yaml"  # somebody is writing it
        return
    yield from (f"{key} in params.yaml" for key in then if then[key] != new[key])


def param_digests(stage: str, item: str, text: bytes) -> dict[str, str]:
    """Return the SHA-256 of the value of each key that dvc.yaml gives this stage in a params.yaml.

    Equal where DVC finds no change: it does not look at the order of keys, and 1, 1.0 and true are equal in Python.
    """
    content = parsed(text.decode("utf-8"))
    found = {}
    for key in (one.replace("${key}", item) for one in declared_params(stage)):
        value = content
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        found[key] = hashlib.sha256(json.dumps(_canonical(value)).encode()).hexdigest()
    return found


def declared_params(stage: str) -> list[str]:
    """Return what stands under `params` of a stage in dvc.yaml; read as lines, in a fiftieth of the time."""
    text = PIPELINE.read_text(encoding="utf-8") if PIPELINE.is_file() else ""
    block = re.search(rf"^  {re.escape(stage)}:\n((?:    .*\n)*)", text, re.MULTILINE)
    if block and "params:" not in block[1]:
        return []
    if lines := block and re.search(r"^ +params:\n((?: +- .*\n)+)", block[1], re.MULTILINE):
        return re.findall(r"- (\S+)", lines[1])
    from ruamel.yaml.error import YAMLError

    with contextlib.suppress(YAMLError, TypeError, KeyError, AttributeError):  # DVC itself will say what is wrong there
        found = parsed(text)["stages"][stage]
        return list(found.get("do", found).get("params", []))
    return []


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return sorted([type(key).__name__, str(key), _canonical(inside)] for key, inside in value.items())
    if isinstance(value, list):
        return [_canonical(inside) for inside in value]
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return int(value) if is_whole else value if isinstance(value, str | float | None) else str(value)


def _record(current: Run, seconds: float) -> dict[str, tuple[State, str]]:
    """Write what becomes metrics/runs/<stage>@<item>.json: what went in, by which code, how long and how large.

    Counts, digests and versions stand in lists, which DVC leaves out of `dvc metrics show`: its table keeps the
    metrics, the time and the memory. Returns state and SHA-256 of the large new files by the name they will have.
    """
    large = settled([one for folder in current.outputs for one in state(folder) if one[3] >= REMEMBERED])
    written: dict[str, tuple[State, str]] = {}
    outputs = []
    for target, temporary in zip(current.targets, current.outputs, strict=True):
        files = file_digests(temporary, just_written(temporary), workers())
        outputs.append(f"{target} sha256:{combined(files)}")
        for one in large:
            if temporary in Path(one[0]).parents:
                relative = Path(one[0]).relative_to(temporary)
                name = str(target / relative)
                written[name] = ((name, *one[1:]), files[relative.as_posix()])
    record = {
        **current.metrics,
        "counts": [current.counts],
        "seconds": round(seconds, 2),
        "peak_memory_mib": _peak_memory_kib() // 1024,
        "inputs": [f"{path} sha256:{value}" for path, value in sorted(current.digests.items())],
        "outputs": outputs,
        "code": [f"sha256:{code_digest(current.code)}"],
        "params": [
            f"{key} sha256:{value}" for key, value in param_digests(current.stage, current.item, current.params).items()
        ],
        "git": _git_state(),
        "versions": [f"{name} {version}" for name, version in current.versions.items()],
    }
    RECORDS.mkdir(parents=True, exist_ok=True)
    current.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return written


def _peak_memory_kib() -> int:
    """Return the most that this process, or a worker that has ended, held in memory."""
    status = Path("/proc/self/status")
    own = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    # Elsewhere: a process inherits the ru_maxrss of the one that started it, so this may be `dvc`'s own.
    own_kib = int(own[1]) if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(own_kib, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def _git_state() -> list[str]:
    """Return [commit, "clean" or "dirty"], or [] outside a Git repository or where no git is installed."""
    if not shutil.which("git"):
        return []
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if commit.returncode:
        return []
    status = subprocess.run(
        ["git", "status", "--porcelain", "--", "stages", "params.yaml", "dvc.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    return [commit.stdout.strip(), "dirty" if status.stdout.strip() else "clean"]


@contextlib.contextmanager
def _lock(output: Path) -> Iterator[None]:
    folder = WORK / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / str(output).replace("/", "%")
    try:
        file = path.open("a+")
    except PermissionError:
        raise SystemExit(
            f"{path} belongs to another user; make it yours (sudo chown -R $USER .) and run again."
        ) from None
    with file:
        for attempt in range(20):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # The writer may be a stage whose `dvc repro` was killed a moment ago: it is about to end.
                if attempt == 19:
                    file.seek(0)
                    raise SystemExit(
                        f"{output} is being written by process {file.read().strip() or 'unknown'}; "
                        "wait until it ends, or stop it, and run again."
                    ) from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _publish(temporary: Path, target: Path) -> None:
    old = target.with_name(f".tmp-old-{target.name}")
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    _remove(old)


def _recover(target: Path) -> None:
    """Bring back the previous output when a run ended between the two renames of `_publish`."""
    old = target.with_name(f".tmp-old-{target.name}")
    if old.exists() and not target.exists():
        old.rename(target)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()


def _sync(folder: Path) -> None:
    """Bring a folder to the disk, with the rights of any new file: safetensors gives none to others."""
    os.umask(mask := os.umask(0o022))
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(0o666 & ~mask)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)
