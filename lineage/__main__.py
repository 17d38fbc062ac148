"""`python -m lineage`: the questions as commands."""

from __future__ import annotations

import json
import os
import secrets
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

app = typer.Typer(
    help="Where a token came from, and what became of a line: questions about a finished project, from its root.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # a mistake is one line, not a box
)
AsJson = Annotated[bool, typer.Option("--json", help="print the answer as JSON")]
Limit = Annotated[int, typer.Option(min=1, help="at most so many")]


def _lineage() -> Any:
    from lineage.questions import Lineage

    lineage = Lineage(Path())
    if unbuilt := lineage.outdated.unbuilt():
        names = ", ".join(unbuilt)
        print(
            f"nothing is said of what params.yaml names and was never built: {names}; run `dvc repro`", file=sys.stderr
        )
    return lineage


def _print(answer: Any, as_json: bool, limit: int = 0) -> None:
    """Print an answer: JSON, or its values with its lists as tables."""
    if as_json:
        print(json.dumps(answer, indent=1, ensure_ascii=False))
        return
    from lineage.tables import show

    show(answer, limit)


@app.command()
def why(place: Annotated[str, typer.Argument(metavar="FILE:LINE")], as_json: AsJson = False) -> None:
    """Was this record kept, by which rule was it dropped, in which blocks, steps and models is it?"""
    file, _, number = place.rpartition(":")
    if not file or not number.isdecimal():
        raise SystemExit(f"{place!r}: write FILE:LINE, e.g. data/raw/laws/a.md:12 (or row, page, paragraph).")
    _print(_lineage().why(file, int(number)), as_json)


@app.command(context_settings={"ignore_unknown_options": True})  # -1 is a number, and refused as one
def block(
    phase: str,
    number: Annotated[int, typer.Argument(min=0)],
    split: Annotated[Literal["train", "eval"], typer.Option()] = "train",
    as_json: AsJson = False,
) -> None:
    """What stands in a block, from which file and line, and at which steps was it shown?"""
    _print(_lineage().block(phase, number, split), as_json)


@app.command()
def where(
    what: Annotated[str, typer.Argument(metavar="ID|FILE|TEXT")], limit: Limit = 20, as_json: AsJson = False
) -> None:
    """Which records does a doc_id or raw_id, a raw file, or a part of a text lead to?"""
    _print(_lineage().where(what, limit), as_json)


@app.command()
def steps(identity: Annotated[str, typer.Argument(metavar="ID")], as_json: AsJson = False) -> None:
    """At which steps of which training was a document shown?"""
    _print(_lineage().steps(identity), as_json)


@app.command()
def model(phase: str, as_json: AsJson = False) -> None:
    """Everything that went into a model, down to the lineage horizon."""
    _print(_lineage().model(phase), as_json)


@app.command()
def diff(rev1: str, rev2: Annotated[str, typer.Argument()] = "", limit: Limit = 20, as_json: AsJson = False) -> None:
    """Which documents and tokens came in and went out between two commits (REV2: else the workspace)?"""
    from lineage.diff import compare

    if not rev2:
        _lineage()
    _print(compare(Path(), rev1, rev2 or None, limit), as_json, limit)


@app.command()
def sample(
    seed: Annotated[int, typer.Option("--seed")] = 0,
    number: Annotated[int, typer.Option("-n", min=1)] = 5,
    as_json: AsJson = False,
) -> None:
    """An auditor's random sample: raw text beside cleaned text, the same on every machine."""
    _print(_lineage().sample(seed, number), as_json)


@app.command()
def trace(
    text: Annotated[str, typer.Argument(help="a text; `-` reads it from standard input")] = "",
    prompt: Annotated[str, typer.Option(help="trace what the model of --phase writes behind this")] = "",
    phase: Annotated[str, typer.Option(help="only documents that this phase and those before it were made of")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """Which runs of 16 words or more (characters of Chinese) of a text stand in the training data, verbatim?"""
    from lineage.trace import SHORTEST, generated
    from lineage.trace import trace as find
    from text_units import spans

    if bool(text) == bool(prompt) or (prompt and not phase):
        raise SystemExit("give either a text, or --prompt with --phase, the phase whose model is to answer.")
    lineage = _lineage()
    if prompt:
        text = generated(Path(), lineage.phase(phase).name, prompt, max_new_tokens)
    text = sys.stdin.read() if text == "-" else text
    if not prompt and (units := len(spans(text)[0])) < SHORTEST:
        raise SystemExit(f"the text has {_counted(units, 'word')} (characters of Chinese); {SHORTEST} are needed.")
    found = find(lineage, text, phase or None, limit, os.cpu_count() or 1)
    _print({"text": text, "runs": found} if prompt else found, as_json)
    if not found and not as_json:
        print("no run of 16 units stands in a document")


@app.command()
def pack(target: Path, as_json: AsJson = False) -> None:
    """Write an evidence pack (tar) that lineage/verify.py accepts without the project."""
    from lineage.pack import pack as write

    digest, files, signed = write(_lineage().root, target)
    _print({"pack": str(target), "files": files, "signed": signed, "sha256": digest}, as_json)


eraser = typer.Typer(no_args_is_help=True, help="Take a document out of every model: plan, apply, prove.")
app.add_typer(eraser, name="erase")
Identity = Annotated[str, typer.Argument(metavar="ID")]


@eraser.command("plan")
def erase_plan(identity: Identity, as_json: AsJson = False) -> None:
    """Where do a document and its copies stand, which models saw them, what must be redone?"""
    from lineage.erase import plan

    _print(plan(_lineage(), identity), as_json)


@eraser.command("apply")
def erase_apply(identity: Identity, as_json: AsJson = False) -> None:
    """Add a document and its copies to data/exclusions.txt, each as a hash with the project's key."""
    from lineage.erase import apply

    _print(apply(_lineage(), identity), as_json)


@eraser.command("prove")
def erase_prove(
    identity: Identity,
    text: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="the document's text, where the raw files no longer have it"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Is a document, or a run of 16 words of it, in anything that is kept now? Exit status 1 when it is.

    absent: nothing of it is. own_absent: nothing that it alone had; others share what is left.
    """
    from lineage.erase import prove

    try:
        content = text.read_text(encoding="utf-8") if text else None
    except UnicodeDecodeError as error:
        raise SystemExit(f"{text}: byte {error.start} is not UTF-8; save the text as UTF-8.") from None
    found = prove(_lineage(), identity, content)
    _print(found, as_json)
    raise typer.Exit(not found["absent"])


@app.command()
def verify(
    phase: Annotated[str, typer.Argument()] = "",
    blocks: Annotated[
        int,
        typer.Option(
            min=0, help="random blocks of each split, and records of each source, to make anew from the raw files"
        ),
    ] = 100,
    seed: Annotated[int | None, typer.Option(help="of the random blocks; another one each time if not given")] = None,
    as_json: AsJson = False,
) -> None:
    """Re-read every byte and check the chain from the raw files to the model; rebuild random blocks from raw bytes.

    The first is lineage/verify.py, which runs without the project, too; the second uses the project's own stages.
    """
    from lineage import verify as program

    report = program.verify(Path(), phase or None)
    if not report.failed("dvc.lock"):
        lineage = _lineage()
        if blocks and not any(finding.status == "FAILED" for finding in report.findings):
            _replay(lineage, report, phase, blocks, secrets.randbelow(2**32) if seed is None else seed)
    if as_json:
        print(json.dumps([finding._asdict() for finding in report.findings], indent=1, ensure_ascii=False))
    else:
        print(program.show(report))
    raise typer.Exit(any(finding.status == "FAILED" for finding in report.findings))


def _replay(lineage: Any, report: Any, phase: str, blocks: int, seed: int) -> None:
    from lineage.replay import records, replay

    lineage.sources = [source for source in lineage.sources if phase in ("", source.phase)]
    for one in records(lineage, blocks, seed):
        there = _counted(one["records"], "record")
        made = f"{one['judged']:,} of {there} judged anew by the project's rules (seed {seed})"
        _told(report, "raw -> ledger", f"data/clean/{one['phase']}/{one['source']}", one["wrong"], made)
    grouped = [name for name in lineage.phases if f"group_blocks@{name}" in lineage.stages and phase in ("", name)]
    for one in replay(lineage, grouped, blocks, seed):
        made = f"{one['rebuilt']:,} of {_counted(one['blocks'], 'block')}, by the project's own stages (seed {seed})"
        _told(report, "raw -> blocks", f"data/blocks/{one['phase']}/{one['split']}", one["wrong"], made)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _told(report: Any, step: str, path: str, wrong: list[str], made: str) -> None:
    for text in wrong:
        report.fail(step, path, text)
    if not wrong:
        report.ok(step, path, made)


if __name__ == "__main__":
    app()
