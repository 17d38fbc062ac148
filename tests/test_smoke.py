"""The real `dvc repro`, from raw text to an answering model: twice on a tiny pipeline, and on the default one.

The tiny pipeline (tests/tiny.yaml) has the default's phases: a Llama from random weights, then QLoRA on it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from conftest import ROOT, copy_project, dvc, finish, git, ran, repro
from kit import arrow, digests
from kit.tokenizer import Vocabulary

ARROW = ["clean/{}/documents", "clean/{}/ledger", "dedup/{}", "marked/{}", "tokens/{}"]
SOURCES = ["pretrain/tiny_text", "pretrain/tiny_notes", "chat/tiny_qa"]
FOLDERS = [f"data/{path.format(source)}" for source in SOURCES for path in ARROW] + [
    f"data/blocks/{phase}/{split}" for phase in ("pretrain", "chat") for split in ("train", "eval")
]
MODELS = ["models/pretrain/trained", "models/pretrain/merged", "models/chat/merged"]
MINUTES = 12  # the default's budget is 6 on 2 quiet cores


def outputs(folder: Path) -> dict[str, str]:
    """Return path and digest of every output in dvc.lock but the run records, which hold times."""
    stages = YAML(typ="safe").load(folder / "dvc.lock")["stages"].values()
    outs = {out["path"]: out["md5"] for one in stages for out in one.get("outs", [])}
    return {path: md5 for path, md5 in outs.items() if not path.startswith("metrics/runs/")}


def counts(folder: Path) -> dict[str, int]:
    """Return the counts in the manifest of an Arrow folder."""
    found: dict[str, int] = arrow.manifest(folder)["counts"]
    return found


def tokens(folder: Path, source: str) -> list[dict[str, Any]]:
    """Return the rows of a tokens folder."""
    rows: list[dict[str, Any]] = arrow.table(folder / "data/tokens" / source).to_pylist()
    return rows


def test_repro_runs_every_stage_once(finished: Path) -> None:
    """From nothing, each stage of dvc.yaml runs for each of its entries, and check_params comes first."""
    log = (finished.parent / "repro.log").read_text(encoding="utf-8")
    found = re.findall(r"^Running stage '([^']+)'", log, re.MULTILINE)
    assert found[0] == "check_params"
    assert sorted(found) == sorted(YAML(typ="safe").load(finished / "dvc.lock")["stages"])
    assert len(found) == 1 + 3 * 3 + 2 * 7


def test_second_repro_runs_nothing(finished: Path) -> None:
    """Nothing is stale after a run, and nothing that Git keeps has changed."""
    output = repro(finished)
    assert ran(output) == set()
    assert "Data and pipelines are up to date." in output
    assert git(finished, "status", "--porcelain") == ""


def test_outputs_are_equal_elsewhere(twins: tuple[Path, Path]) -> None:
    """Another folder, an empty cache, another number of workers and hash seed: every output has the same digest.

    Text, tokenizers, blocks, weights, curves and evaluation; model cards, too, and the digests that they quote.
    """
    one, other = map(outputs, twins)
    assert one == other
    assert len(one) == 4 * 3 + 2 * 12  # clean, sources, marked, tokens of a source; twelve of a phase
    assert len(set(one.values())) > len(one) / 2


def test_nothing_is_left_behind(twins: tuple[Path, Path]) -> None:
    """No temporary file and no checkpoint stays; Git is not offered any data."""
    for folder in twins:
        assert [str(path) for path in folder.rglob(".tmp-*")] == []
        ours = {
            "checked",
            "digests",
            "imports",
            "locks",
            "ran",
            "seen",
            "lineage",
        }  # the last: other tests asked questions
        assert {path.name for path in (folder / ".work").iterdir()} <= ours
        tracked = set(git(folder, "ls-files").splitlines())
        made = {path for path in tracked if path.startswith(("data/", "models/pretrain", "models/chat"))}
        assert made == {"data/benchmarks/README.md", "data/exclusions.txt", "data/rules/README.md"}
        assert "metrics/pretrain/evaluation.json" in tracked
        assert git(folder, "status", "--porcelain") == ""


def test_a_stage_opens_nothing_that_dvc_does_not_know(twins: tuple[Path, Path]) -> None:
    """What it read besides would change and no stage would run again. Of the check of all of params.yaml: bases."""
    folder = twins[1]
    stages = YAML(typ="safe").load(folder / "dvc.lock")["stages"]
    is_config = re.compile(r"models/.*/config\.json").fullmatch
    for name, entry in stages.items():
        opened = set((folder.parent.parent / "opened" / name).read_text(encoding="utf-8").split("\n")) - {""}
        assert "params.yaml" in opened, name
        known = {each["path"] for side in ("deps", "outs") for each in entry.get(side, [])}
        known |= {"params.yaml", "dvc.yaml", ".dvcignore", ".git", ".work", ".memo", "stages"}
        others = {path for path in opened if not known & {path, *map(str, Path(path).parents)}}
        strange = {path for path in others if "/.tmp-" not in path and not is_config(path)}
        assert not strange, f"{name} opens {sorted(strange)[:3]}"


def test_outputs_name_no_place_and_no_host(finished: Path) -> None:
    """No cached output holds an absolute path of the machine that made it."""
    for top in ("data", "models", "reports", "plots", "metrics"):
        for path in (finished / top).rglob("*"):
            if path.is_file() and "raw" not in path.parts:
                assert str(finished.parent).encode() not in path.read_bytes(), path


@pytest.mark.parametrize("path", FOLDERS)
def test_datasets_opens_every_arrow_folder(finished: Path, path: str) -> None:
    """`datasets.load_from_disk` gives the rows that the manifest counts, in the same order."""
    from datasets import load_from_disk

    found = load_from_disk(str(finished / path))
    assert len(found) == counts(finished / path)["rows"] > 0
    assert found[0] == arrow.table(finished / path).slice(0, 1).to_pylist()[0]
    assert sorted(found.column_names) == sorted(arrow.manifest(finished / path)["schema"])


def test_no_arrow_folder_was_forgotten(finished: Path) -> None:
    """The list above is what the pipeline wrote."""
    written = [path.parent.relative_to(finished).as_posix() for path in (finished / "data").rglob("manifest.json")]
    assert sorted(FOLDERS) == sorted(written)


def test_run_records_name_what_lies_on_the_disk(finished: Path) -> None:
    """The digests of outputs are worked out while they are written; reading them again gives the same."""
    records = sorted((finished / "metrics/runs").glob("*.json"))
    assert len(records) > 10
    for record in records:
        for line in arrow.read_json(record)["outputs"]:
            path, digest = line.split(" sha256:")
            assert digests.digest(finished / path) == digest, record.name


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_is_lost_between_stages(finished: Path, source: str) -> None:
    """in = kept + dropped, from raw bytes to tokens."""
    phase = source.split("/")[0]
    ledger = arrow.table(finished / "data/clean" / source / "ledger").to_pylist()
    about = arrow.read_json(finished / "data/sources" / source / "source.json")
    ends = {row["file"]: row["end"] for row in ledger}  # the last of each file's, whose records tile it
    assert sum(ends.values()) == about["bytes"]
    assert len(ledger) == about["records"] == about["kept"] + about["dropped"]
    documents = counts(finished / "data/clean" / source / "documents")["rows"]
    assert len(ledger) == documents + sum(row["rule"] is not None for row in ledger)
    dedup = counts(finished / "data/dedup" / source)
    assert documents == dedup["train"] + dedup["eval"] + dedup["dropped"]
    assert counts(finished / "data/marked" / source)["rows"] == dedup["train"] + dedup["eval"]
    assert len(tokens(finished, source)) == dedup["train"] + dedup["eval"]
    for split in ("train", "eval"):
        parts = [counts(finished / "data/tokens" / other)[split] for other in SOURCES if other.startswith(phase)]
        blocks = counts(finished / "data/blocks" / phase / split)
        assert sum(parts) == blocks["tokens"] + blocks["dropped_tokens"]


@pytest.mark.parametrize("source", SOURCES)
def test_each_document_has_one_bos_and_one_eos(finished: Path, source: str) -> None:
    """First and last id, and nowhere else, though the raw text is full of `<s>` and `</s>`."""
    vocabulary = Vocabulary(finished / "models/tokenizers" / source.split("/")[0])
    bos, eos, pad = (vocabulary.special_ids[f"{role}_token_id"] for role in ("bos", "eos", "pad"))
    for row in tokens(finished, source):
        ids = row["input_ids"]
        assert (ids[0], ids[-1]) == (bos, eos)
        assert not {bos, eos, pad} & set(ids[1:-1])


def test_only_the_answers_are_learned(finished: Path) -> None:
    """The learned tokens of a conversation are the answer and EOS, to the byte."""
    vocabulary = Vocabulary(finished / "models/tokenizers/chat")
    documents = arrow.table(finished / "data/clean/chat/tiny_qa/documents").to_pylist()
    answer = {row["doc_id"]: row["messages"][-1]["content"] for row in documents}
    for row in tokens(finished, "chat/tiny_qa"):
        learned = [token for token, learn in zip(row["input_ids"], row["learn"], strict=True) if learn]
        assert vocabulary.tokenizer.decode(learned, skip_special_tokens=False) == answer[row["doc_id"]] + "</s>"


@pytest.mark.parametrize("model", MODELS)
def test_transformers_opens_tokenizer_and_model(finished: Path, model: str) -> None:
    """The tokenizer agrees with the pipeline's ids, the model computes, and both name the same special tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished / model)
    loaded = AutoModelForCausalLM.from_pretrained(finished / model)
    row = tokens(finished, "pretrain/tiny_notes")[0]
    text = arrow.table(finished / "data/clean/pretrain/tiny_notes/documents")["text"][0].as_py()
    assert tokenizer(text)["input_ids"] == row["input_ids"][:-1]
    assert torch.isfinite(loaded(torch.tensor([row["input_ids"]])).logits).all()
    assert loaded.config.eos_token_id == tokenizer.eos_token_id == row["input_ids"][-1]
    assert loaded.config.bos_token_id == tokenizer.bos_token_id == row["input_ids"][0]


def test_merged_models_answer(finished: Path) -> None:
    """The text-generation pipeline continues a text, and answers a question through the chat template.

    After six steps they say nothing of sense; the default's answers are looked at below.
    """
    from transformers import pipeline

    options = {"min_new_tokens": 5, "max_new_tokens": 5, "do_sample": False, "return_tensors": True}
    text = pipeline("text-generation", model=str(finished / "models/pretrain/merged"))
    prompt = text.tokenizer("The river")["input_ids"]
    found = text("The river", **options)[0]["generated_token_ids"]
    assert found[:-5] == prompt
    chat = pipeline("text-generation", model=str(finished / "models/chat/merged"))
    question = [{"role": "user", "content": "How long is the Rhine?"}]
    rendered = chat.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert rendered == "<s>Human: How long is the Rhine?\n\nAssistant: "
    found = chat(question, **options)[0]["generated_token_ids"]
    assert found[:-5] == chat.tokenizer(rendered, add_special_tokens=False)["input_ids"], "BOS stands there once"


def test_model_card_quotes_true_digests(finished: Path) -> None:
    """Each digest in a model card is that of the folder as it lies there; what was shown is what the receipts count."""
    for phase in ("pretrain", "chat"):
        card = (finished / f"reports/{phase}/model_card.md").read_text(encoding="utf-8")
        quoted = re.findall(r"^\| `([\w/]+)` \| `([0-9a-f]{64})` \|$", card, re.MULTILINE)
        assert len(quoted) >= 6
        steps = (finished / f"models/{phase}/trained/receipts.bin").stat().st_size // 16
        epoch = counts(finished / f"data/blocks/{phase}/train")["rows"]
        assert re.search(rf"showed [\d,]+ blocks of \d+ tokens in {steps:,} steps; an epoch has {epoch:,}\.", card)
        for path, digest in quoted:
            assert digests.digest(finished / path) == digest, path


def test_dvc_shows_metrics_and_curves(workspace: Path) -> None:
    """`dvc metrics show`, `dvc metrics diff`, `dvc plots show` and `dvc dag` say what a user asks them."""
    shown = json.loads(dvc(workspace, "metrics", "show", "--json").stdout)[""]["data"]
    evaluation = shown["metrics/chat/evaluation.json"]["data"]
    assert {"base", "trained", "merged", "scale"} <= evaluation.keys()
    assert shown["metrics/runs/train_model@chat.json"]["data"]["eval_loss"] > 0
    path = workspace / "metrics/chat/evaluation.json"
    arrow.write_json(path, {**arrow.read_json(path), "merged": {"loss": 0.5}})
    diff = json.loads(dvc(workspace, "metrics", "diff", "--json").stdout)
    assert diff["metrics/chat/evaluation.json"]["merged.loss"]["new"] == 0.5
    assert diff["metrics/chat/evaluation.json"]["merged.loss"]["old"] == evaluation["merged"]["loss"]
    plots = dvc(workspace, "plots", "show")
    assert plots.returncode == 0, plots.stdout
    page = (workspace / "dvc_plots/index.html").read_text(encoding="utf-8")
    for phase in ("pretrain", "chat"):
        assert f"{phase}: training loss, nats per token" in page
        assert f"{phase}: held-out loss, nats per token" in page
    first = (workspace / "plots/pretrain/train.csv").read_text().splitlines()
    assert len(first) == 1 + 6
    assert first[1].split(",")[1][:6] in page, "the curve's points stand in the page"
    dag = dvc(workspace, "dag", "--mermaid").stdout
    assert dag.count("-->") > 20
    assert '"train_model@chat"' in dag


@pytest.mark.slow
def test_default_pipeline(tmp_path: Path) -> None:
    """The embedded default, as a stranger starts it: in time, as good as promised, and twice the same.

    Data and tokenizers equal the committed dvc.lock where it was written by this version of Python (whose documentation
    is the text); models are compared between two runs, because other CPUs round otherwise.
    """
    folders = [copy_project(tmp_path / name) for name in ("one", "other")]
    for folder in folders:
        git(folder, "init", "--quiet")
    wall, cpu = time.monotonic(), cpu_seconds()
    finish(folders[0], TERROIR_WORKERS="2", PYTHONHASHSEED="1")
    seconds = min(time.monotonic() - wall, cpu_seconds() - cpu)  # others may use this machine: then CPU time tells
    assert ran(repro(folders[0])) == set()
    check_quality(folders[0])
    found = outputs(folders[0])
    record = ROOT / "metrics/runs/import_python_docs@python.json"
    if record.is_file() and arrow.read_json(record)["versions"][0] == stage_python(folders[0]):
        committed = outputs(ROOT)
        assert {k: v for k, v in found.items() if is_data(k)} == {k: v for k, v in committed.items() if is_data(k)}
    finish(folders[1], TERROIR_WORKERS="1", PYTHONHASHSEED="2")
    assert outputs(folders[1]) == found
    assert seconds <= 60 * MINUTES
    for folder in folders:
        shutil.rmtree(folder)


def cpu_seconds() -> float:
    """Return the CPU seconds of all processes that this one started and that have ended."""
    return os.times().children_user + os.times().children_system


def stage_python(folder: Path) -> str:
    versions: list[str] = arrow.read_json(folder / "metrics/runs/import_python_docs@python.json")["versions"]
    return versions[0]


def is_data(path: str) -> bool:
    return path.startswith(("data/", "models/tokenizers/"))


def check_quality(folder: Path) -> None:
    """The pretrained model beats simple compressors, the chat phase lowers the loss, and both models answer."""
    pretrain = arrow.read_json(folder / "metrics/pretrain/evaluation.json")
    for name in ("order0", "gzip", "xz"):
        assert pretrain["merged"]["bits_per_byte"] < pretrain["scale"][name]
    chat = arrow.read_json(folder / "metrics/chat/evaluation.json")
    assert chat["merged"]["loss"] < chat["base"]["loss"]
    for evaluation in (pretrain, chat):
        assert evaluation["answers"]
        assert all(answer["answer"].strip() for answer in evaluation["answers"])
