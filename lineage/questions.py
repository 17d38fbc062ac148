"""The questions themselves: each answer is plain Python values, the same from the command line with --json.

    lineage = Lineage(Path("."))
    lineage.why("data/raw/laws/a.md", 12)    ->   [{"verdict": "trained", "blocks": [...], "models": [...], ...}]
    lineage.block("pretrain", 7)             ->   {"steps": [3], "pieces": [{"file": ..., "line": 1, ...}, ...]}

What was made of what is read from dvc.lock, the artefacts' manifests and the artefacts, not from params.yaml, which may
have been edited since.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from block_order import RECEIPT_BYTES, BlockOrder
from lineage import verify
from lineage.folders import Array, Cache, Chosen, Folder, Ids, Places, present, read_json
from lineage.layout import Layout, Piece
from lineage.outdated import Outdated
from source_register import left_out

Answer = dict[str, Any]
MOST = 20  # records of one line
IDENTITY = re.compile("([0-9a-fA-F]{2}){8,16}")  # a doc_id or raw_id, or its beginning


class Source:
    """One source: its raw files, ledger, documents, decisions and tokens, and the ways between their rows."""

    def __init__(self, lineage: Lineage, name: str, phase: str, raw: str, params: dict[str, Any]) -> None:
        self.lineage, self.name, self.phase, self.raw, self.params = lineage, name, phase, raw, params

    def _folder(self, kind: str, *below: str, made_by: str = "") -> Folder:
        self.lineage.check(made_by)
        return Folder(self.lineage.root.joinpath("data", kind, self.phase, self.name, *below), self.lineage.cache)

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        below = f"{self.phase}/{self.name}/source.json"
        earlier = f"data/clean/{below}"  # in commits before there was data/sources
        there = (self.lineage.root / earlier).is_file()
        return read_json(self.lineage.root, earlier if there else f"data/sources/{below}")

    @functools.cached_property
    def ledger(self) -> Folder:
        return self._folder("clean", "ledger")

    @functools.cached_property
    def documents(self) -> Folder:
        return self._folder("clean", "documents")

    @functools.cached_property
    def decisions(self) -> Folder:
        found = self._folder("dedup", made_by=f"dedup@{self.phase}")
        if "cluster" not in found.manifest["schema"]:
            raise SystemExit(f"{found.name} was made by an earlier dedup, which named no clusters; run `dvc repro`.")
        return found

    @functools.cached_property
    def tokens(self) -> Folder:
        found = self._folder("tokens", made_by=f"tokenize_text@{self.name}")
        if len(found) != (kept := int(self.kept_documents.before[-1])):
            raise SystemExit(f"{found.name} has {len(found)} documents of {kept} that dedup kept; run `dvc repro`.")
        return found

    @functools.cached_property
    def places(self) -> Places:
        return Places(self.ledger)

    @functools.cached_property
    def doc_ids(self) -> Ids:
        return Ids(self.documents, "doc_id")

    @functools.cached_property
    def raw_ids(self) -> Ids:
        return Ids(self.ledger, "raw_id")

    @functools.cached_property
    def kept_records(self) -> Chosen:
        return Chosen(self.ledger, "kept", _has_document)

    @functools.cached_property
    def kept_documents(self) -> Chosen:
        return Chosen(self.decisions, "kept", _is_kept)

    def record(self, row: int) -> Answer:
        """Return a row of the ledger, with where it starts and, for a kept one, `document`: its row."""
        record = self.ledger.row(row)
        before = self.ledger.row(row - 1) if row else {"file": None}
        start = before["end"] if before["file"] == record["file"] else 0
        return {
            **record,
            "start": None if record["end"] is None else start,
            "document": self.kept_records.place(row),
        }

    def path(self, file: str) -> str:
        """Return the path of a raw file from the root of the project."""
        return (
            self.raw
            if Path(self.raw).name == file and not (self.lineage.root / self.raw / file).exists()
            else f"{self.raw}/{file}"
        )

    def content(self, row: int) -> str:
        """Return the text of a document, a conversation as lines of `role: content`."""
        document = self.documents.row(row)
        if "text" in document:
            return str(document["text"])
        return "\n".join(f"{message['role']}: {message['content']}" for message in document["messages"])

    def raw_text(self, record: Answer) -> str | None:
        """Return what stands in the raw file where a record was read, None where this format needs its own reader."""
        path = self.lineage.root / self.path(record["file"])
        if record["start"] is not None and path.is_file():
            with verify.opened(path) as handle:
                if path.suffix.lower() in verify.COMPRESSIONS:
                    handle.read(record["start"])
                else:
                    handle.seek(record["start"])
                raw = handle.read(record["end"] - record["start"])
            return bytes(raw).decode(self.about["encoding"], "replace")
        if not path.exists():
            return None
        import raw_formats
        import raw_params

        given = {key: self.params[key] for key in raw_params.Params.model_fields if key in self.params}
        for found in raw_formats.records(path, raw_params.Params(**given)):
            if found.number == record["number"]:
                return found.raw.decode("utf-8", "replace")
        return None


def _begin(record: Answer) -> tuple[str, int]:
    return record["file"], record["number"]


def _has_document(batch: pa.RecordBatch) -> Array:
    found: Array = batch["rule"].is_null().to_numpy(zero_copy_only=False)
    return found


def _is_kept(batch: pa.RecordBatch) -> Array:
    found: Array = pc.not_equal(batch["split"], "dropped").to_numpy(zero_copy_only=False)
    return found


class Phase:
    """One phase: its sources, its blocks, and the order in which its training showed them."""

    def __init__(self, lineage: Lineage, name: str, sources: list[Source]) -> None:
        self.lineage, self.name, self.sources = lineage, name, sources
        stage = lineage.stages.get(f"train_model@{name}")
        self.params: dict[str, Any] = stage.group if stage else {}
        known = (f"data/blocks/{name}", f"models/tokenizers/{name}")
        self.base = next((path for path in stage.inputs if path not in known), None) if stage else None

    @functools.cached_property
    def steps(self) -> int:
        """Steps of the training, as its receipts count them; 0 before it, and where it was one on other blocks."""
        path = self.lineage.root / "models" / self.name / "trained/receipts.bin"
        return path.stat().st_size // RECEIPT_BYTES if path.is_file() and not self.other_blocks else 0

    @property
    def other_blocks(self) -> bool:
        """Whether the training that dvc.lock knows was shown other blocks than those that are there now."""
        return self.lineage.outdated.read_other(f"train_model@{self.name}", f"data/blocks/{self.name}")

    @functools.cached_property
    def state(self) -> str | None:
        """Say why the merged model is not the one that the project as it stands would give; None: it is."""
        model = f"models/{self.name}/merged"
        if f"merge_lora@{self.name}" not in self.lineage.stages:
            return "not made yet; run `dvc repro`"
        if not (self.lineage.root / model / "config.json").is_file():
            return "not there; run `dvc repro`, or `dvc checkout` to bring it back"
        why = self.lineage.outdated.why(f"merge_lora@{self.name}")
        return f"of an older state: {why}; run `dvc repro`" if why else None

    @property
    def batch(self) -> int:
        return int(self.params.get("global_batch_size", 16))

    @property
    def has_older_model(self) -> bool:
        """Whether a model is there that is not the one that the project as it stands would give."""
        return bool(self.state) and (self.lineage.root / "models" / self.name / "merged/config.json").is_file()

    @functools.lru_cache(maxsize=2)  # noqa: B019 (as long-lived as the program)
    def layout(self, split: str) -> Layout:
        self.lineage.check(f"group_blocks@{self.name}")
        tokens = {source.name: source.tokens for source in self.sources}
        return Layout(self.lineage.root, self.lineage.cache, self.name, split, tokens)

    def blocks(self, split: str) -> Folder:
        """Return the blocks of a split."""
        return Folder(self.lineage.root / "data/blocks" / self.name / split, self.lineage.cache)

    @functools.lru_cache(maxsize=1024)  # noqa: B019
    def steps_of(self, block: int) -> list[int]:
        """Return the steps, from 1, at which the training showed a block of the train split."""
        blocks = self.layout("train").blocks
        order = BlockOrder(blocks, int(self.params.get("seed", 0)))
        shown = self.steps * self.batch
        places = (order.position(block, epoch) for epoch in range(-(-shown // blocks)))
        return [place // self.batch + 1 for place in places if place < shown]


class Lineage:
    """All that can be asked of the project in a folder. Raises SystemExit when it is no finished project."""

    def __init__(self, root: Path) -> None:
        if not (root / "dvc.lock").is_file():
            raise SystemExit(
                "there is no dvc.lock here: run this from the root of a project that `dvc repro` has finished."
            )
        self.root, self.cache = root, Cache(root)
        try:
            self.stages, _ = verify.in_pipeline(root, verify.read_lock(root))
        except verify.Wrong as error:
            raise SystemExit(f"dvc.lock {error}; `git checkout dvc.lock` brings back the last good one.") from None
        by_phase: dict[str, list[Source]] = {}
        for stage in self.stages.values():
            out = next((path for path in stage.outs if path.startswith("data/clean/")), None)
            if stage.name == "clean" and out:
                phase = out.split("/")[2]
                raw = next(path for path in stage.inputs if path != verify.RULES)
                by_phase.setdefault(phase, []).append(Source(self, stage.item, phase, raw, stage.group))
        self.phases = {
            name: Phase(self, name, sorted(sources, key=lambda source: source.name))
            for name, sources in sorted(by_phase.items())
        }
        self.sources = [source for phase in self.phases.values() for source in phase.sources]

    def phase(self, name: str) -> Phase:
        if name not in self.phases:
            raise SystemExit(f"dvc.lock has no phase {name!r}; it has {', '.join(self.phases) or 'none'}.")
        return self.phases[name]

    @functools.cached_property
    def outdated(self) -> Outdated:
        return Outdated(self.root, self.stages)

    def check(self, stage: str) -> None:
        """Raise SystemExit when what a stage wrote belongs to other rows than those that are there now."""
        if stage in self.stages and (said := self.outdated.others(stage)):
            raise SystemExit(f"{said}, so that they do not belong together; run `dvc repro`.")

    # Records --------------------------------------------------------------------------------------------------------

    def why(self, file: str, number: int) -> list[Answer]:
        """Return what became of the record that stands at a line (row, page, paragraph) of a raw file.

        One answer for each source that reads the file and each record that begins there. Raises SystemExit when there
        is none.
        """
        found: list[Answer] = []
        for source, name in self._files(file):
            row = source.places.find(name, number)
            if row is None or number > self._last_line(source, source.record(row)):
                continue
            rows = [row]
            # Of a JSON array, many records may begin on one line.
            while rows[0] and len(rows) < MOST and _begin(source.ledger.row(rows[0] - 1)) == (name, number):
                rows.insert(0, rows[0] - 1)
            found += [answer for answer in (self.record(source, one) for one in rows) if answer not in found]
        if found:
            return found
        if any(True for source, name in self._files(file) for _ in source.places.rows(name)):
            raise SystemExit(f"{file}:{number}: no source has a record there; `where {file}` lists those of the file.")
        raise SystemExit(f"{file} is no raw file of a source; {self._raws()}")

    def _raws(self) -> str:
        """Return what the sources read, as the end of a sentence."""
        raws = ", ".join(sorted({source.raw for source in self.sources}))
        return f"name a file of {raws}; one that is new is known after `dvc repro`, one left out by `ignore` is not."

    def _files(self, file: str) -> Iterator[tuple[Source, str]]:
        """Yield the sources that may hold a raw file, and the name by which the ledger calls it."""
        path = file.removeprefix("./")
        for source in self.sources:
            names = {path: None}
            for whole in (path, f"data/raw/{path}"):
                if whole == source.raw:
                    names[Path(path).name] = None
                elif whole.startswith(f"{source.raw}/"):
                    names[whole[len(source.raw) + 1 :]] = None
            # An é may be one character or two, by the system that wrote the name and by the keyboard that asks.
            forms = (normalize(form, name) for name in names for form in ("NFC", "NFD"))
            yield from ((source, name) for name in dict.fromkeys((*names, *forms)))

    def _last_line(self, source: Source, record: Answer) -> int:
        if (
            source.about["unit"] != "line"
            or source.params.get("sample_by") == "line"
            or source.about["format"] == "jsonl"
        ):
            return int(record["number"])
        text = self._raw(source, record)
        return 2**31 if text is None else int(record["number"]) + max(text.removesuffix("\n").count("\n"), 0)

    def _raw(self, source: Source, record: Answer) -> str | None:
        try:
            return source.raw_text(record)
        except (OSError, pa.ArrowException):
            return None

    def record(self, source: Source, row: int) -> Answer:
        """Return all that is known of a row of a ledger."""
        record = source.record(row)
        place = {"file": source.path(record["file"]), source.about["unit"]: record["number"]}
        if record["start"] is not None:  # a page of a PDF has none, nor a row of Parquet
            place["bytes"] = [record["start"], record["end"]]
        answer: Answer = {"phase": source.phase, "source": source.name, **place}
        answer |= {"raw_id": record["raw_id"].hex(), "changes": record["changes"]}
        if record["document"] is None:
            return {**answer, "verdict": "dropped by clean", "rule": record["rule"], "evidence": record["evidence"]}
        return {**answer, **self.document(source, record["document"])}

    def document(self, source: Source, row: int) -> Answer:
        """Return what became of a document: dropped, held out, or trained on, and where."""
        decision = source.decisions.row(row)
        answer: Answer = {"doc_id": decision["doc_id"].hex(), "document": f"{source.name}/{row}"}
        if decision["split"] == "dropped":
            answer |= {"verdict": "dropped by dedup", "rule": decision["rule"], "evidence": decision["evidence"]}
            if decision["twin"]:
                answer |= {"twin": self._twin(source.phase, decision["twin"]), "similarity": decision["similarity"]}
            if decision["cluster"]:
                answer |= {"cluster": self._twin(source.phase, decision["cluster"])}
            return answer
        if f"tokenize_text@{source.name}" not in self.stages:
            return {**answer, "split": decision["split"], "verdict": "kept, not tokenised yet"}
        tokens = source.kept_documents.place(row)
        assert tokens is not None
        batch = source.tokens.batch_of(tokens)
        lengths = source.tokens.batch(batch)["input_ids"].offsets
        inside = tokens - int(source.tokens.starts[batch])
        answer |= {"split": decision["split"], "tokens": lengths[inside + 1].as_py() - lengths[inside].as_py()}
        phase = self.phases[source.phase]
        if f"group_blocks@{phase.name}" not in self.stages:
            return {**answer, "verdict": "kept, not grouped into blocks yet"}
        blocks: list[dict[str, Any]] = []
        for piece in phase.layout(decision["split"]).document(source.name, tokens):
            shown = phase.steps_of(piece.block) if decision["split"] == "train" else []
            blocks.append(
                {
                    "block": piece.block,
                    "place": piece.place,
                    "from": piece.start,
                    "tokens": piece.length,
                    "steps": shown,
                }
            )
        first = min((step for block in blocks for step in block["steps"]), default=None)
        reached = np.zeros(answer["tokens"], bool)  # of its tokens: which any step showed
        for block in blocks:
            reached[block["from"] : block["from"] + block["tokens"]] |= bool(block["steps"])
        n_reached = int(reached.sum())
        if decision["split"] == "eval":
            verdict = "held out"
        elif not blocks:
            verdict = "left out of the blocks"
        elif phase.other_blocks:
            verdict = "in the training blocks of now; the model was trained on others, which may have held it"
        elif not phase.steps:
            made = f"train_model@{phase.name}" in self.stages
            verdict = f"in the training blocks, {'the model is not there' if made else 'no model yet'}"
        else:
            verdict = "trained" if n_reached == len(reached) else f"not reached in {phase.steps} steps"
            if 0 < n_reached < len(reached):
                verdict = f"trained in part: {n_reached} of its {len(reached)} tokens in {phase.steps} steps"
        saw = first is not None or (phase.other_blocks and decision["split"] == "train")
        return {
            **answer,
            "verdict": verdict,
            "blocks": blocks,
            "models": self._models(source.phase, first) if saw else [],
        }

    def _twin(self, phase: str, name: str) -> Answer:
        source_name, _, row = name.rpartition("/")
        source = next(one for one in self.phases[phase].sources if one.name == source_name)
        document = source.documents.row(int(row))
        return {"document": name, "file": source.path(document["file"]), source.about["unit"]: document["number"]}

    def _models(self, phase: str, first_step: int | None) -> list[Answer]:
        """Return the models that saw something of a phase from a step on: its own, and those that go on from it.

        Without a step: those of older blocks, of which it is not known whether it was among them.
        """
        step = {} if first_step is None else {"first_step": first_step}
        found: list[Answer] = [{**self._model(phase), **step}]
        found += [{**self._model(later), "goes_on_from": self.phases[later].base} for later in self.descendants(phase)]
        return found

    def _model(self, phase: str) -> Answer:
        """Return a model by name, with what is to be said where it is not that of the project as it stands."""
        state = self.phases[phase].state
        return {"phase": phase, "model": f"models/{phase}/merged", **({"state": state} if state else {})}

    def descendants(self, phase: str) -> list[str]:
        """Return the phases whose base is a model of this one, directly or not."""
        found = []
        for name, one in self.phases.items():
            if one.base and one.base.startswith(f"models/{phase}/") and name != phase:
                found += [name, *self.descendants(name)]
        return found

    # Blocks and steps -----------------------------------------------------------------------------------------------

    def block(self, phase: str, number: int, split: str = "train") -> Answer:
        """Return what stands in a block, and the steps that showed it."""
        of = self.phase(phase)
        try:
            pieces = of.layout(split).block(number)
        except IndexError as error:
            raise SystemExit(f"phase {phase}, split {split}: {error}.") from None
        steps = of.steps_of(number) if split == "train" else []
        return {
            "phase": phase,
            "split": split,
            "block": number,
            "steps": steps,
            **({"model": of.state} if of.other_blocks else {}),
            "pieces": [self._piece(of, p) for p in pieces],
        }

    def _piece(self, phase: Phase, piece: Piece) -> Answer:
        source = next(one for one in phase.sources if one.name == piece.source)
        row = source.kept_documents.row(piece.row)
        document = source.documents.row(row)
        batch = source.tokens.batch_of(piece.row)
        ids = source.tokens.batch(batch)["input_ids"][piece.row - int(source.tokens.starts[batch])].values
        text = self._decode(phase.name, ids.slice(piece.start, piece.length).to_pylist())
        return {
            "place": piece.place, "tokens": piece.length, "from": piece.start, "of": len(ids), "source": source.name,
            "file": source.path(document["file"]), source.about["unit"]: document["number"],
            "doc_id": document["doc_id"].hex(), "text": text,
        }  # fmt: skip

    def _decode(self, phase: str, ids: list[int]) -> str:
        return str(self._tokenizer(phase).decode(ids, skip_special_tokens=False))

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def _tokenizer(self, phase: str) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(present(self.root, f"models/tokenizers/{phase}/tokenizer.json")))

    def steps(self, identity: str) -> list[Answer]:
        """Return the training steps that showed a document, in each phase that holds it."""
        found = []
        for source, row in self.identified(identity):
            answer = self.document(source, row)
            at = [
                {"step": step, "block": block["block"]} for block in answer.get("blocks", []) for step in block["steps"]
            ]
            at.sort(key=lambda one: (one["step"], one["block"]))
            found.append(
                {"phase": source.phase, "document": answer["document"], "verdict": answer["verdict"], "steps": at}
            )
        return found

    # Looking for something ------------------------------------------------------------------------------------------

    def where(self, what: str, limit: int = 20) -> list[Answer]:
        """Return the records that an id, a raw file, or a text leads to, at most `limit` of them."""
        if not what.strip():
            raise SystemExit("nothing to look for; give an id, a raw file of a source, or a part of a text.")
        if IDENTITY.fullmatch(what):
            found = [self.record(source, row) for source, row in self._records(what)]
            if found:
                return found[:limit]
        rows = ((source, row) for source, name in self._files(what) for row in source.places.rows(name))
        found = [self.record(*one) for one in itertools.islice(rows, limit)]
        if found:
            return found
        for source, row in self._holding(what):
            found.append(self.record(source, source.kept_records.row(row)))
            if len(found) == limit:
                break
        if not found:
            raise SystemExit(
                f"{what[:60]!r} is no id, no part of a document, and no raw file of a source; {self._raws()}"
            )
        return found

    def _records(self, identity: str) -> list[tuple[Source, int]]:
        """Return the records with an id, once each: where cleaning changed nothing, doc_id and raw_id are one."""
        found = [(source, source.kept_records.row(row)) for source, row in self.identified(identity, missing=False)]
        found += [(source, row) for source in self.sources for row in source.raw_ids(bytes.fromhex(identity))]
        return list({(source.name, row): (source, row) for source, row in found}.values())

    def identified(self, identity: str, missing: bool = True) -> list[tuple[Source, int]]:
        """Return the documents with an id; SystemExit when it is none, or `missing` and no document has it."""
        if not IDENTITY.fullmatch(identity):
            raise SystemExit(
                f"{identity!r} is no doc_id: 32 hexadecimal digits, or the first 16 of them, as "
                "`python -m lineage why FILE:LINE` and `where TEXT` give them."
            )
        found = [(source, row) for source in self.sources for row in source.doc_ids(bytes.fromhex(identity))]
        if missing and not found:
            raise SystemExit(f"no document has the id {identity}.")
        return found

    def _holding(self, text: str) -> Iterator[tuple[Source, int]]:
        """Yield the documents that hold a text: found by its fingerprints; for a short one all are looked at."""
        from lineage.trace import holding

        for source in self.sources:
            rows = holding(source, text, os.cpu_count() or 1)
            if rows is None:
                rows = self._scan(source, text)
            else:
                rows = (row for row in rows if self._holds(source.documents.row(row), text))
            yield from ((source, row) for row in rows)

    def _holds(self, document: Answer, text: str) -> bool:
        said = [document["text"]] if "text" in document else [message["content"] for message in document["messages"]]
        return any(text in one for one in said)

    def _scan(self, source: Source, text: str) -> Iterator[int]:
        for number, batch in enumerate(source.documents.all()):
            if "text" in batch.schema.names:
                hits = pc.match_substring(batch["text"], text).to_numpy(zero_copy_only=False)
            else:
                said = pc.match_substring(batch["messages"].flatten().field("content"), text)
                parents = pc.list_parent_indices(batch["messages"]).filter(said).to_numpy()
                hits = np.bincount(parents, minlength=batch.num_rows) > 0
            for inside in np.flatnonzero(hits).tolist():
                yield int(source.documents.starts[number]) + inside

    # Models ---------------------------------------------------------------------------------------------------------

    def model(self, phase: str) -> Answer:
        """Return everything that went into a model, down to where knowledge ends: the lineage horizon."""
        chain, name = [], self.phase(phase).name
        if f"train_model@{phase}" not in self.stages:
            raise SystemExit(f"phase {phase} has no model yet: dvc.lock has no train_model@{phase}; run `dvc repro`.")
        horizon: Answer = {}
        while True:
            of = self.phases[name]
            chain.append(self._training(of))
            parts = Path(of.base or "").parts
            if parts[:1] == ("models",) and len(parts) == 3 and f"train_model@{parts[1]}" in self.stages:
                name = parts[1]
                continue
            weights = bool(of.base) and any((self.root / str(of.base)).glob("*.safetensors"))
            said = "its publisher's word: what it was trained on is not known here" if weights else "random weights"
            horizon = {"base": of.base, "horizon": said}
            break
        return {**self._model(phase), "trainings": chain, **horizon}

    def _training(self, of: Phase) -> Answer:
        self.check(f"train_model@{of.name}")
        present(self.root, f"models/{of.name}/trained/receipts.bin")
        sources = []
        layout, out = of.layout("train"), left_out(self.root / "data/blocks" / of.name)
        for source in of.sources:
            shown = layout.grouping["train"].get(source.name, {"documents": 0, "tokens": 0, "weight": 1.0})
            counts = {"records": source.about["records"], "documents": source.about["kept"]}
            held = shown["tokens"] - out["train", source.name]
            counts |= {"train": shown["documents"], "tokens": held, "weight": shown["weight"]}
            names = ("license", "owner", "origin", "language", "collected_on")
            sources.append({"source": source.name, "raw": source.raw, **{n: source.about[n] for n in names}, **counts})
        total = sum(source["tokens"] for source in sources)
        for row in sources:
            row["share"] = round(row["tokens"] / total, 6) if total else 0.0
        seen = min(of.steps * of.batch, layout.blocks)
        return {
            "phase": of.name, "base": of.base, "tokenizer": f"models/tokenizers/{of.name}", "steps": of.steps,
            "blocks": layout.blocks, "blocks_shown": seen, "tokens_shown": of.steps * of.batch * layout.size,
            "seed": int(of.params.get("seed", 0)), "sources": sources,
        }  # fmt: skip

    # A sample -------------------------------------------------------------------------------------------------------

    def sample(self, seed: int, number: int) -> list[Answer]:
        """Return records drawn from all ledgers, raw text beside cleaned text: the same ones on every machine."""
        sizes = [len(source.ledger) for source in self.sources]
        ends, total = np.cumsum(sizes).tolist(), sum(sizes)
        drawn: dict[int, None] = {}
        count = 0
        while len(drawn) < min(number, total):
            key = hashlib.sha256(f"{seed} {count}".encode()).digest()
            drawn[int.from_bytes(key, "little") % total] = None
            count += 1
        found = []
        for row in drawn:
            at = next(n for n, end in enumerate(ends) if row < end)
            source, inside = self.sources[at], row - (ends[at] - sizes[at])
            record = source.record(inside)
            answer = self.record(source, inside)
            cleaned = None if record["document"] is None else source.content(record["document"])
            found.append({**answer, "raw": self._raw(source, record), "cleaned": cleaned})
        return found
