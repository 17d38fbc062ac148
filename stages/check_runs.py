"""Check that what DVC calls up to date is of the files, code and parameters as they are; `make repro` asks it twice.

Reads:  metrics/runs, .work/seen (what each stage read), and of inputs and code what is no longer in the state of then
Writes: nothing but new states of files with the old bytes (.work/seen); what is wrong ends in one sentence

DVC looks at inode, size and time of a file, hashes inputs, code and parameters after a stage has ended, leaves out what
.dvcignore names, and takes over what lies there at `dvc commit`. So it can take for old what is new (a text unpacked
with a fixed time), for read what no stage has read (a file that came in while the stage ended), or for written what no
stage has written.

Example: a text came into data/raw/laws in that moment

    clean@laws: DVC takes data/raw/laws/new.txt for what the stage has read, which it has not; run
    find -L data/raw/laws ... && cache=$(dvc cache dir) && grep ... "$cache/runs" ... && dvc repro -sf clean@laws
    and then again what you wanted to run.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kit import params
from kit.digests import SEEN, Seen, combined, holds_files, read_note, seen_since, taken_for_old, unseen, write_note
from kit.stage import PARAMS, RECORDS, param_digests, workers
from kit.stage_code import STAGES, code_digest, code_digests, version, versions


class Record(NamedTuple):
    """What metrics/runs/STAGE@ITEM.json says of a run whose inputs and outputs are still there."""

    stage: str
    item: str
    inputs: dict[str, str]  # SHA-256 by path
    outputs: dict[str, str]
    params: dict[str, str]  # SHA-256 of the value by key
    code: list[str]
    versions: list[tuple[str, str, str]]  # name, " ", number

    @property
    def name(self) -> str:
        return f"{self.stage}@{self.item}"

    @property
    def script(self) -> Path:
        return STAGES / f"{self.stage}.py"


def check_runs() -> None:
    """Raise SystemExit when DVC takes for old what is new, or for read what no stage has read."""
    ran = list(records())
    before = {record.name: read_note(SEEN / f"{record.name}.json") for record in ran}
    known = {path: line for note in before.values() for path, line in note.items()}
    now: dict[str, Seen] = {}  # by input: one that several stages read is looked at once
    doubts = {record.name: doubt for record in ran if (doubt := _doubt(record, before[record.name], known, now))}
    # A stage that wrote something else comes before those that have read it: to run them again would mend nothing.
    written = {record.name: doubt for record in ran if (doubt := _not_written(record, now))}
    doubts = written | {name: doubt for name, doubt in doubts.items() if name not in written}
    if not doubts:
        return
    status = subprocess.run([sys.executable, "-m", "dvc", "status", "--json"], capture_output=True, check=False)
    if status.returncode:
        said = status.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise SystemExit(
            f"{next(iter(doubts))} needs a look at what DVC knows, but `dvc status` fails ({said[0]}); run again."
        )
    out_of_date = json.loads(status.stdout)
    wrong = {name: doubt for name, doubt in doubts.items() if name not in out_of_date}
    if wrong:
        name, doubt = next(iter(wrong.items()))
        more = f" (and {len(wrong) - 1} more stages)" if len(wrong) > 1 else ""
        raise SystemExit(f"{name}{more}: {doubt}")


def records() -> Iterator[Record]:
    """Yield what is known of the runs of stages that params.yaml still names."""
    content = params.load()
    items = {name for kind in ("sources", "phases", "imports", "bases", "exports") for name in content[kind]}
    for path in sorted(RECORDS.glob("*.json")):
        stage, _, item = path.stem.partition("@")
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            inputs, outputs, keys = (
                dict(line.rsplit(" sha256:", 1) for line in about[part]) for part in ("inputs", "outputs", "params")
            )
            found = [line.partition(" ") for line in about["versions"]]
            record = Record(stage, item, inputs, outputs, keys, about["code"], found)
        except (ValueError, KeyError):  # in the middle of a merge
            continue
        names = (*record.inputs, *record.outputs)
        if item in items and record.script.is_file() and all(holds_files(Path(name)) for name in names):
            yield record


def _doubt(record: Record, before: Seen, known: Seen, now: dict[str, Seen]) -> str | None:
    """Return a sentence about what is other than what the stage read, which is wrong if DVC calls it up to date.

    `before`: the note of the stage; `known`: all notes; `now`: what was found of inputs, and will be.
    """
    found: Seen = {}
    changed: dict[str, str] = {}  # what, by what must have a new time to be hashed again
    for path, sha256 in record.inputs.items():
        if path not in now:
            now[path] = seen_since(Path(path), known, workers())
        if sentence := unseen(path, now[path]):
            return sentence
        found |= now[path]
        if combined({name[len(path) + 1 :]: _sha256(line) for name, line in now[path].items()}) != sha256:
            changed[path] = next((name for name, line in now[path].items() if _is_other(before, name, line)), path)
    code = code_digests(record.script)
    for module in code:
        found |= seen_since(module.relative_to(STAGES.parent), known, 1)
    if [f"sha256:{code_digest(code)}"] != record.code:
        modules = [str(module.relative_to(STAGES.parent)) for module in code]
        changed["stages"] = next((name for name in modules if _is_other(before, name, found[name])), "stages")
    for key, sha256 in param_digests(record.stage, record.item, PARAMS.read_bytes()).items():
        if record.params.get(key) != sha256:
            changed[key] = f"{key} in params.yaml"
    if not changed:
        if found.items() - before.items():
            write_note(SEEN / f"{record.name}.json", found)  # not to be read again
        return None
    folders = " ".join(shlex.quote(path) for path in changed if Path(path).exists())
    touch = f"find -L {folders} -type f -exec touch {{}} + && " if folders else ""
    first = f"DVC takes {next(iter(changed.values()))} for what the stage has read, which it has not; "
    return taken_for_old(before, found) or first + _again(touch, record)


def _not_written(record: Record, now: dict[str, Seen]) -> str | None:
    """Return a sentence about an output that another stage reads and that is not what this one wrote.

    By `dvc commit` or a damaged cache; DVC itself sees the output of no other stage.
    """
    for output, sha256 in record.outputs.items():
        for path in (Path(output), *Path(output).parents):
            if str(path) in now:
                inside = {
                    name[len(output) + 1 :]: _sha256(line)
                    for name, line in now[str(path)].items()
                    if name.startswith(f"{output}/")
                }
                if combined(inside) != sha256:
                    first = f"DVC takes {output} for what the stage has written, which it has not; "
                    # What is read-only in its cache DVC believes, and would put it in the place of the new output.
                    return first + _again('chmod -R u+w "$(dvc cache dir)" && ', record)
    return None


def _again(first: str, record: Record) -> str:
    """Return the end of a sentence: the command that computes anew and leaves nothing of before in DVC's run cache.

    What is there names the outputs of a run, of which the record is this stage's alone.
    """
    forget = f'grep -rlsZF {RECORDS}/{record.name}.json "$cache/runs" | xargs -0r rm -f'
    return (
        f"run\n{first}cache=$(dvc cache dir) && {forget} && dvc repro -sf {record.name}\n"
        "and then again what you wanted to run."
    )


def _is_other(before: Seen, name: str, line: str) -> bool:
    return _sha256(before.get(name, "")) != _sha256(line)


def _sha256(line: str) -> str:
    return line.rpartition(" ")[2]


def made_otherwise() -> str | None:
    """Return a sentence about what was made with other versions than those of today: DVC does not look at them."""
    names: list[str] = []
    changes: dict[str, str] = {}
    for record in records():
        now = {name: version(name) or number for name, _, number in record.versions} | versions(record.script)
        other = {name: number for name, _, number in record.versions if number != now[name]}
        if other:
            names.append(record.name)
            changes |= {name: f"{name} {number}, now {now[name]}" for name, number in other.items()}
    if not names:
        return None
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"{names[0]}{more} ran with other versions ({'; '.join(changes.values())}), which DVC does not look at: what "
        "is not out of date stays as it is; `dvc repro --force` makes all anew."
    )


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        raise SystemExit(print(__doc__))
    try:
        check_runs()
    except FileNotFoundError as error:
        gone = f"{error.filename} went away while it was read; let the change finish and run again."
        raise SystemExit(gone) from None
    if note := made_otherwise():
        print(note)
