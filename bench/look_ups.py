"""Measure look-ups in the lineage of a large corpus: 10 million records when not given.

    why, where ID|FILE|TEXT, steps, block       95 of 100 under 50 ms, each answer compared with what was written
    the ledger                                  40 bytes a record, with the names of files and what the rules say
    the index of ids and places                 built once; seconds and bytes are printed
    the index of fingerprints (trace)           10 MB of text in a CPU second, 3 bytes a token; English and Chinese

    python bench/look_ups.py [RECORDS]

The artefacts are written directly, with random ids: no stage would change what a look-up costs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

# Before this folder, where a file is called near_duplicates, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stages"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lineage import trace
from lineage.questions import Lineage
from lineage.verify import mix_all

# isort: split
import clean
import dedup
import train_tokenizer
from corpus import chinese, english
from kit import arrow
from tokenize_text import tokens_schema

ROOT = Path(__file__).resolve().parents[1]
BUDGET_MS = 50.0
LEDGER_BYTES = 40
LINES = 1000  # of a file
LOOKUPS = 200
CHUNK = 100_000
STEPS, BATCH, BLOCK = 5000, 64, 1024
LOCK = """schema: '2.0'
stages:
  clean@big:
    cmd: exec python stages/clean.py big
    deps:
    - path: data/raw/big
      hash: md5
      md5: '0'
    params:
      params.yaml:
        sources.big.clean:
          format: jsonl
          license: unknown
    outs:
    - path: data/clean/p/big
      hash: md5
      md5: '0'
  tokenize_text@big:
    cmd: exec python stages/tokenize_text.py big
    outs:
    - path: data/tokens/p/big
      hash: md5
      md5: '0'
  group_blocks@p:
    cmd: exec python stages/group_blocks.py p
    outs:
    - path: data/blocks/p
      hash: md5
      md5: '0'
  train_model@p:
    cmd: exec python stages/train_model.py p
    deps:
    - path: models/configs/llama_small
      hash: md5
      md5: '0'
    params:
      params.yaml:
        phases.p.train_model:
          global_batch_size: 64
          seed: 3
    outs:
    - path: models/p/trained
      hash: md5
      md5: '0'
"""


def place(number: int) -> tuple[str, int]:
    """Return the file and the line of a record."""
    return f"part/{number // LINES:07}.jsonl", number % LINES + 1


def identities(draw: np.random.Generator, rows: int) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), rows, [None, pa.py_buffer(draw.bytes(16 * rows))])


def texts(numbers: Any) -> pa.Array:
    """Return a text of 24 words of 5 letters for each record: the same one whenever it is asked for."""
    state = numbers.astype(np.uint64)[:, None] * np.uint64(64) + np.arange(24, dtype=np.uint64)[None]
    words = mix_all(pa.array(state.ravel())).to_numpy().reshape(state.shape)
    letters = (words[..., None] >> (np.arange(5, dtype=np.uint64) * np.uint64(8))) % np.uint64(26)
    content = np.full((*words.shape, 6), ord(" "), np.uint8)
    content[..., :5] = letters.astype(np.uint8) + ord("a")
    offsets = np.arange(len(numbers) + 1, dtype=np.int32) * (24 * 6)
    return pa.StringArray.from_buffers(len(numbers), pa.py_buffer(offsets), pa.py_buffer(content.tobytes()))


def build(root: Path, records: int) -> dict[str, Any]:
    """Write ledger, documents, decisions, tokens; return ids by record of some of them."""
    draw = np.random.default_rng(7)
    home = root / "data/clean/p/big"
    schemas = {
        "ledger": (home / "ledger", clean.LEDGER, clean.LEDGER_ROWS),
        "documents": (home / "documents", clean.TEXT_DOCUMENTS, 256),
        "decisions": (root / "data/dedup/p/big", dedup.DECISIONS, 1024),
        "tokens": (root / "data/tokens/p/big", tokens_schema(pa.uint16(), False), 256),
    }
    out = {name: arrow.Writer(folder, schema, batch_rows=rows) for name, (folder, schema, rows) in schemas.items()}
    known: dict[int, bytes] = {}
    total = 0
    for begin in range(0, records, CHUNK):
        rows = min(CHUNK, records - begin)
        numbers = np.arange(begin, begin + rows)
        files = pa.array([place(number)[0] for number in range(begin, begin + rows, LINES)]).take(
            pa.array(numbers // LINES - begin // LINES)
        )
        lines = pa.array((numbers % LINES + 1).astype(np.int32))
        starts = pa.array((numbers % LINES) * 300)
        ends = pa.array((numbers % LINES) * 300 + 300)
        kept = numbers % 10 != 9  # each tenth is dropped by clean, each hundredth document by dedup
        ids = identities(draw, rows)
        reasons = pa.array(["length"] * rows, mask=kept), pa.array(["3 < 8 characters"] * rows, mask=kept)
        nothing = pa.nulls(rows, pa.string())
        columns = [files, ends, lines, identities(draw, rows), *reasons, nothing]
        out["ledger"].write(pa.table(columns, clean.LEDGER.names))
        chosen = pa.array(kept)
        columns = [one.filter(chosen) for one in (ids, files, starts, ends, lines)]
        written = texts(begin + np.flatnonzero(kept))
        out["documents"].write(pa.table([*columns, written], clean.TEXT_DOCUMENTS))
        stays = numbers[kept] % 100 != 50
        splits = pa.array(["train", "dropped"]).take(pa.array((~stays).astype(np.int8)))
        none = [pa.nulls(len(stays), field.type) for field in list(dedup.DECISIONS)[3:]]
        rule = pa.array(["excluded"] * len(stays), mask=stays)
        out["decisions"].write(pa.table([columns[0], splits, rule, *none], dedup.DECISIONS))
        lengths = numbers[kept][stays] % 90 + 10
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        lists = pa.ListArray.from_arrays(offsets, pa.array(np.full(int(lengths.sum()), 40, np.uint16)))
        of_kept = [columns[0].filter(pa.array(stays)), splits.filter(pa.array(stays)), lists]
        out["tokens"].write(pa.table(of_kept, tokens_schema(pa.uint16(), False)))
        total += int(lengths.sum())
        known |= {int(n): ids[int(n) - begin].as_py() for n in draw.choice(numbers, 3) if n % 10 != 9}
    for writer in out.values():
        writer.close()
    blocks = -(-total // BLOCK)
    shown = {"big": {"documents": len(out["tokens"].counts), "tokens": total, "weight": 1.0}}
    grouping = {"block_size": BLOCK, "mode": "concat", "long_documents": "split", "last_block": "pad", "weights": {}}
    (root / "data/blocks/p/train").mkdir(parents=True)
    arrow.write_json(root / "data/blocks/p/grouping.json", {**grouping, "train": shown, "eval": {}})
    arrow.write_json(root / "data/blocks/p/train/manifest.json", {"counts": {"rows": blocks, "tokens": total}})
    (root / "models/p/trained").mkdir(parents=True)
    (root / "models/p/trained/receipts.bin").write_bytes(bytes(16 * STEPS))
    params = train_tokenizer.Params(mode="train", vocab_size=300, min_frequency=1)
    (root / "models/tokenizers/p").mkdir(parents=True)
    train_tokenizer.train(iter(["some text"] * 3), params).save(str(root / "models/tokenizers/p/tokenizer.json"))
    (root / "data/sources/p/big").mkdir(parents=True)
    arrow.write_json(root / "data/sources/p/big/source.json", {"unit": "line", "format": "jsonl", "encoding": "utf-8"})
    (root / "dvc.lock").write_text(LOCK)
    return {"known": known, "blocks": blocks, "ledger": size(home / "ledger") / records}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def verdict(number: int, found: dict[str, Any]) -> None:
    """Raise unless an answer is that of the record."""
    file, line = place(number)
    assert (found["file"], found["line"]) == (f"data/raw/big/{file}", line)
    if number % 10 == 9:
        assert (found["rule"], found["evidence"]) == ("length", "3 < 8 characters")
    elif number % 100 == 50:
        assert found["rule"] == "excluded"
    else:
        assert found["tokens"] == number % 90 + 10 == sum(block["tokens"] for block in found["blocks"])


def trace_index(language: str, texts: list[str]) -> bool:
    """Print what fingerprints of texts cost; return whether a budget is missed."""
    column = pa.array(texts)
    params = train_tokenizer.Params(mode="train", vocab_size=8192)
    tokenizer = train_tokenizer.train(iter(texts[:400]), params)
    tokens = sum(len(one.ids) for one in tokenizer.encode_batch(texts[:100]))
    share = sum(len(text.encode()) for text in texts[:100]) / tokens  # bytes of text in a token
    started = time.process_time()
    hashes, _ = trace.fingerprints(column)
    seconds, text_bytes = time.process_time() - started, column.nbytes
    speed, cost = text_bytes / 1e6 / seconds, len(hashes) * trace.BYTES * share / text_bytes
    print(f"fingerprints   {language}: {speed:.1f} MB a CPU second (budget 10), {cost:.2f} bytes a token (budget 3)")
    return speed < 10 or cost > 3


def milliseconds(work: Callable[[Any], None], things: list[Any]) -> tuple[list[float], float]:
    """Return the times of the questions, ascending, and the mean CPU time of one: what a quiet machine takes."""
    found, used = [], time.process_time()
    for thing in things:
        started = time.perf_counter()
        work(thing)
        found.append((time.perf_counter() - started) * 1e3)
    return sorted(found), (time.process_time() - used) * 1e3 / len(things)


def main() -> None:
    records = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".tmp-bench-") as name:
        root = Path(name)
        written = build(root, records)
        ledger = written["ledger"]
        print(f"{records:,} records, {written['blocks']:,} blocks")
        print(f"the ledger: {ledger:.1f} bytes a record, names and evidence included (budget {LEDGER_BYTES})")
        started = time.perf_counter()
        lineage = Lineage(root)
        known = sorted(written["known"].items())
        lineage.why(*place(known[0][0]))
        lineage.where(known[0][1].hex())
        lineage.block("p", 0)
        seconds, index = time.perf_counter() - started, size(root / ".work")
        print(f"the index: {seconds:.1f} s, once; {index / records:.1f} bytes a record")
        started = time.perf_counter()
        lineage.where(texts(np.array([0]))[0].as_py())
        seconds, index = time.perf_counter() - started, size(root / ".work") - index
        print(f"fingerprints: {seconds:.1f} s, once; {index / records:.1f} bytes a record of 24 words")
        lineage = Lineage(root)
        draw = np.random.default_rng(11)
        numbers = draw.integers(0, records, LOOKUPS).tolist()
        kept = [n - (n % 10 == 9) for n in numbers]
        some = [known[n] for n in draw.integers(0, len(known), LOOKUPS).tolist()]
        blocks = draw.integers(0, written["blocks"], LOOKUPS).tolist()

        def steps(one: tuple[int, bytes]) -> None:
            found = lineage.steps(one[1].hex())[0]["steps"]
            assert all(1 <= step["step"] <= STEPS for step in found)

        def block(number: int) -> None:
            found = lineage.block("p", number)
            assert sum(piece["tokens"] for piece in found["pieces"]) == BLOCK or number == written["blocks"] - 1

        questions: dict[str, tuple[Callable[[Any], None], list[Any]]] = {
            "why FILE:LINE": (lambda n: verdict(n, lineage.why(*place(n))[0]), numbers),
            "where ID": (lambda one: verdict(one[0], lineage.where(one[1].hex())[0]), some),
            "where TEXT": (lambda n: verdict(n, lineage.where(texts(np.array([n]))[0].as_py()[3:-9])[0]), kept),
            "where FILE": (lambda n: verdict(n - n % LINES, lineage.where(place(n)[0])[0]), numbers),
            "steps ID": (steps, some),
            "block": (block, blocks),
        }
        missed = ledger > LEDGER_BYTES
        for question, (work, things) in questions.items():
            times, cpu = milliseconds(work, things)
            high = times[int(len(times) * 0.95)]
            missed |= high > BUDGET_MS
            middle = times[len(times) // 2]
            print(
                f"{question:14} median {middle:6.2f} ms, 95 of 100 within {high:6.2f} ms (budget {BUDGET_MS:.0f}); "
                f"CPU {cpu:.2f} ms"
            )
    for language, make in (("English", english), ("Chinese", chinese)):
        missed |= trace_index(language, list(make(16 * 2**20, 5)))
    raise SystemExit(missed and "the budget is missed")


if __name__ == "__main__":
    main()
