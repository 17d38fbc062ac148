"""A project with a source of each raw format, a victim of each kind of rule, and blocks of each kind: not trained."""

from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from conftest import copy_project, git, repro, write

FORMATS = ("text", "line", "separator", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "html", "docx", "packed")
CHATS = ("messages", "alpaca", "pairs")
NOUNS = "river stone garden lamp winter ledger harbour copper window basket thunder meadow saddle pepper"
NOUNS += " lantern orchard anchor marble feather kettle compass shelter barrel cotton ribbon mirror candle"
WORDS = NOUNS.split()


def canary(name: str) -> str:
    """Return a sentence that stands in one record of the source `name` alone."""
    draw = random.Random(name)
    return f"Canary of {name}: " + " ".join(draw.choices(WORDS, k=30)) + "."


def texts(name: str, number: int = 12) -> list[str]:
    """Return texts of one line; the canary is the sixth."""
    draw = random.Random(f"texts of {name}")
    found = [f"{name} {n}: " + " ".join(draw.choices(WORDS, k=draw.randint(8, 40))) + "." for n in range(number)]
    found[5] = canary(name)
    return found


def write_project(folder: Path) -> Path:
    """Write the project; see `PLACES` for where its canaries stand."""
    copy_project(folder)
    raw = folder / "data/raw"
    for number, text in enumerate(texts("text")):
        write(raw / f"text/{number:02}.txt", f"First line.\r\n\r\n{text}\r\nCafe\u0301 {number}.  \n")
    write(raw / "line.txt", "\n".join(texts("line")) + "\n")
    write(
        raw / "separator/book.md", "".join(f"# Part {n}\n{text}\n\nEnd.\n" for n, text in enumerate(texts("separator")))
    )
    rows = [{"body": text, "n": n} for n, text in enumerate(texts("jsonl"))]
    (raw / "jsonl").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (raw / "jsonl/rows.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    write(raw / "json/rows.json", json.dumps([{"text": text} for text in texts("json")], indent=1))
    write(
        raw / "csv/rows.csv",
        "id,text\r\n" + "".join(f'{n},"{text}\nsecond ""line"""\r\n' for n, text in enumerate(texts("csv"))),
    )
    write(raw / "tsv/rows.tsv", "id\ttext\n" + "".join(f"{n}\t{text}\n" for n, text in enumerate(texts("tsv"))))
    table = pa.table({"text": texts("parquet"), "other": list(range(12))})
    (raw / "parquet").mkdir()
    parquet.write_table(table, raw / "parquet/rows.parquet", row_group_size=5)
    (raw / "arrow").mkdir()
    with pa.ipc.new_stream(str(raw / "arrow/rows.arrow"), pa.schema([("text", pa.string())])) as stream:
        stream.write_table(pa.table({"text": texts("arrow")}), max_chunksize=5)
    for number, text in enumerate(texts("html")):
        write(raw / f"html/{number:02}.html", f"<html><body><h1>Page</h1><p>{text}</p></body></html>")
    write_docx(raw / "docx/notes.docx", texts("docx"))
    victims = [
        *texts("packed", 40), "short", "", "€$%&§!?*+#@~^°|<>{}[]=/" * 3, texts("packed", 40)[3],
        texts("packed", 40)[5].replace("Canary", "The canary"), "Excluded: " + canary("excluded"),
        "Asked: " + canary("quiz"), "Written " + "to someone@example.org and to nobody else in the town.",
    ]  # fmt: skip
    write(raw / "packed.txt", "\n".join(victims) + "\n")
    turns = [
        [{"role": "user", "content": f"Question {n}? {text}"}, {"role": "assistant", "content": f"Answer: {text}"}]
        for n, text in enumerate(texts("messages"))
    ]
    turns[1][0]["content"] += " " + " ".join(NOUNS.split() * 6)  # longer than a block, so its answer is cut off
    turns[2] += [{**turns[2][1], "content": "No.", "weight": 0}, *turns[3]]
    write(raw / "messages/rows.jsonl", "".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    alpaca = [{"instruction": f"Do {n}.", "input": "", "output": text} for n, text in enumerate(texts("alpaca"))]
    write(raw / "alpaca/rows.json", json.dumps(alpaca))
    pairs = "".join(f"ask {n},{text}\n" for n, text in enumerate(texts("pairs")))
    write(raw / "pairs/rows.csv", "prompt,completion\n" + pairs)
    write(folder / "data/benchmarks/quiz.txt", canary("quiz") + "\n")
    write(folder / "params.yaml", json.dumps(params(), indent=1))
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "a varied project")
    return folder


def params() -> dict[str, Any]:
    """Return params.yaml: `docs` as a stream with weights, `packs` packed, `talk` a line a block."""
    how: dict[str, dict[str, Any]] = {
        "text": {"format": "text"},
        "line": {"format": "text", "sample_by": "line"},
        "separator": {"format": "text", "sample_by": "separator", "separator": "^# "},
        "jsonl": {"format": "jsonl", "columns": {"text": "body"}},
        **{name: {"format": name} for name in ("json", "csv", "tsv", "parquet", "arrow", "html", "docx")},
        "packed": {
            "format": "text",
            "sample_by": "line",
            "rules": [
                "newlines",
                "pii",
                {"rule": "length", "min_chars": 10},
                {"rule": "symbol_share", "max_share": 0.4},
            ],
        },
        "messages": {"format": "jsonl", "record": "messages"},
        "alpaca": {"format": "json", "record": "alpaca"},
        "pairs": {"format": "csv", "record": "prompt_completion"},
    }
    files = {"line": "line.txt", "packed": "packed.txt"}
    phase = {"packed": "packs", **dict.fromkeys(CHATS, "talk")}
    sources = {
        name: {
            "phase": phase.get(name, "docs"),
            "path": f"data/raw/{files.get(name, name)}",
            "clean": {**given, "license": "CC0-1.0"},
        }
        for name, given in how.items()
    }
    groups: dict[str, dict[str, Any]] = {
        "docs": {"block_size": 24, "weights": {"line": 2.5, "csv": 0.5}},
        "packs": {"block_size": 40, "mode": "best_fit", "long_documents": {"packed": "truncate"}},
        "talk": {"block_size": 200, "mode": "line", "long_documents": {"messages": "truncate", "alpaca": "drop"}},
    }
    phases = {
        name: {
            "base": "models/configs/llama_small",
            "dedup": {"eval_fraction": 0.2, "near_duplicates": {"threshold": 0.7}, "decontaminate": {"quiz": {}}},
            "train_tokenizer": {"mode": "train", "vocab_size": 400, "chat_template": "human_assistant"},
            "group_blocks": group,
            "train_model": {"max_steps": 1, "learning_rate": 0.01, "save_steps": 10},
            "merge_lora": {},
            "evaluate_model": {"max_length": 32},
        }
        for name, group in groups.items()
    }
    return {"imports": {}, "bases": {}, "exports": {}, "sources": sources, "phases": phases}


def write_docx(path: Path, paragraphs: list[str]) -> None:
    import docx

    document = docx.Document()
    for text in paragraphs:
        document.add_paragraph(text)
    out = io.BytesIO()
    document.save(out)
    path.parent.mkdir()
    path.write_bytes(out.getvalue())


def build(folder: Path) -> Path:
    """Write the project, exclude one document of it, and run everything up to the blocks."""
    write_project(folder)
    from lineage.erase import exclude

    from clean import doc_id

    exclude(folder, {doc_id("Excluded: " + canary("excluded"))})
    repro(folder, *(f"group_blocks@{name}" for name in params()["phases"]))
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "its results")
    return folder
