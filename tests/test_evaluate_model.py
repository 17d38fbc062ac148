"""evaluate_model: what the scores are of, what is compared with what, and what fails a run."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

import clean
import dedup
import held_out
import score_report
import tiny
from compared_models import same_weights, score
from conftest import Runner
from evaluate_model import Params
from held_out import Document
from kit import arrow
from kit.tokenizer import Vocabulary
from score_report import contaminated, evaluation, missed

SPECIAL = {"bos_token_id": 0, "eos_token_id": 1}
PLACE = {"file": "a", "start": 0, "end": 1, "line": 1}


def document(source: str, said: str = "abcd") -> Document:
    return Document(source, np.arange(3), np.ones(3, bool), said, said)


def sums(*rows: tuple[float, int, int, int]) -> np.ndarray:
    return np.array(rows, float)


MODELS = {
    "base": sums((80, 10, 1, 40), (20, 10, 0, 40), (9, 3, 3, 10)),
    "trained": sums((40, 10, 3, 40), (10, 10, 4, 40), (12, 3, 1, 10)),
    "merged": sums((40, 10, 3, 40), (20, 10, 4, 40), (12, 3, 1, 10)),
}
DOCUMENTS = [document("laws"), document("cases"), document("novel")]


def test_the_scores() -> None:
    """By hand: 60 nats over 20 tokens and 80 bytes, 7 of 20 right; the general text is not among them."""
    result = evaluation(DOCUMENTS, MODELS, ["novel"], "clm", 200, 0)
    assert result["merged"] == {
        "bits_per_byte": pytest.approx(60 / math.log(2) / 80, abs=1e-6),
        "loss": 3.0,
        "perplexity": pytest.approx(math.exp(3), abs=1e-6),
        "token_accuracy": 0.35,
    }
    assert result["change"] == {"bits_per_byte": pytest.approx(-40 / math.log(2) / 80, abs=1e-6)}
    assert result["sources"]["laws"]["merged"] == pytest.approx(1 / math.log(2), abs=1e-6)
    assert set(result["sources"]) == {"laws", "cases"}
    assert result["general"]["novel"] == {
        "base": pytest.approx(0.9 / math.log(2), abs=1e-6),
        "trained": pytest.approx(1.2 / math.log(2), abs=1e-6),
        "merged": pytest.approx(1.2 / math.log(2), abs=1e-6),
    }


def test_intervals_are_of_documents_and_those_of_the_change_are_paired() -> None:
    """Where each document gains the same, the change has no spread, however much the documents differ."""
    random = np.random.default_rng(0)
    base = np.column_stack([random.uniform(1, 100, 30), np.full(30, 10), np.zeros(30), np.full(30, 40)])
    models = {"base": base, "trained": base, "merged": base - [2, 0, 0, 0]}
    found = evaluation([document("laws")] * 30, models, [], "clm", 300, 0)["intervals"]
    low, high = found["base"]["bits_per_byte"]
    assert high - low > 0.1
    assert found["change"]["bits_per_byte"] == [round(-0.05 / math.log(2), 6)] * 2
    assert found["merged"]["token_accuracy"] == [0.0, 0.0]


def test_a_document_without_a_predicted_token_changes_nothing() -> None:
    more = {name: np.vstack([rows, [0, 0, 0, 7]]) for name, rows in MODELS.items()}
    before = evaluation(DOCUMENTS, MODELS, ["novel"], "clm", 200, 0)
    assert evaluation([*DOCUMENTS, document("empty")], more, ["novel"], "clm", 200, 0) == before
    nothing = {name: np.zeros((1, 4)) for name in MODELS}
    with pytest.raises(ValueError, match="no held-out document has a token to predict"):
        evaluation([document("laws")], nothing, [], "clm", 200, 0)


def test_a_masked_model_has_no_bits_per_byte() -> None:
    result = evaluation(DOCUMENTS, MODELS, ["novel"], "mlm", 200, 0)
    assert result["merged"] == {"masked_loss": 3.0, "masked_accuracy": 0.35}
    assert result["change"] == {"masked_loss": -2.0}


def test_scores_with_and_without_contaminated_documents() -> None:
    shares = np.array([0.1, 0.2, 0.9])
    found = contaminated(DOCUMENTS, MODELS, shares, 0.2, ["novel"], "clm")
    assert found["documents"] == [1, 2] and found["share_of_documents"] == 0.5
    assert found["general"] == ["novel: 1 of 1"]
    assert [(row["source"], row["share"]) for row in found["worst"]] == [("novel", 0.9), ("cases", 0.2)]
    assert found["clean"]["base"] == pytest.approx(2 / math.log(2), abs=1e-6)
    assert "clean" not in contaminated(DOCUMENTS, MODELS, np.ones(3), 0.2, ["novel"], "clm")
    # Neither a general text that stands nowhere is among the clean ones, nor one of which nothing is predicted.
    general = contaminated(DOCUMENTS, MODELS, np.array([0.1, 0.2, 0]), 0.2, ["novel"], "clm")
    assert general["clean"] == found["clean"]
    more = {name: np.vstack([rows, [0, 0, 0, 7]]) for name, rows in MODELS.items()}
    shares = np.array([1, 1, 1, 0])
    assert "clean" not in contaminated([*DOCUMENTS, document("empty")], more, shares, 0.2, ["novel"], "clm")


def test_requirements() -> None:
    result = {**evaluation(DOCUMENTS, MODELS, ["novel"], "clm", 200, 0), "scale": {"gzip": 3.0}}
    assert missed(result, ["bits_per_byte < 1.1", "change.bits_per_byte< -0.5", "general.novel.merged <= 1.8"]) is None
    assert missed(result, ["loss <= 3.0", "token_accuracy>=0.35", "scale.gzip > 2e0"]) is None
    assert missed(result, ["loss < 4", "loss < 3"]) == "loss is 3.0000 but evaluate_model.require wants `loss < 3`"
    tasks = {"merged": {"quiz-2": {"exact_match,strict-match": 0.4}}}  # names of files and of the harness
    wanted = Params(max_length=8, require=["tasks.merged.quiz-2.exact_match,strict-match >= 0.4"]).require
    assert missed({**result, "tasks": tasks}, wanted) is None
    with pytest.raises(ValueError, match=r"names bits_per_bite, which is no score; there are base\.bits_per_byte"):
        missed(result, ["bits_per_bite < 3"])
    for text in ("bits_per_byte 3", "bits_per_byte == 3", "bits_per_byte < low", "bits_per_byte < 1.2.3", "< 3"):
        with pytest.raises(ValidationError, match="is no requirement: write a score"):
            Params(max_length=8, require=[text])


def test_the_plot_has_a_row_for_each_model_and_baseline() -> None:
    result = evaluation(DOCUMENTS, MODELS, ["novel"], "clm", 200, 0)
    result |= {"scale": {"gzip": 3.0}, "contamination": {"clean": {"merged": 1.5}}}
    rows = {name: rest for name, *rest in score_report.rows(result)}
    assert rows["gzip"] == [3.0, 3.0, 3.0]
    assert rows["merged"][0] == result["merged"]["bits_per_byte"]
    assert rows["merged"][1:] == result["intervals"]["merged"]["bits_per_byte"]
    assert {"merged, laws", "base, novel", "merged, not contaminated"} <= rows.keys()
    # A source that is the only one has the scores of all.
    one = evaluation(DOCUMENTS[::2], {name: of[::2] for name, of in MODELS.items()}, ["novel"], "clm", 200, 0)
    names = [name for name, *_ in score_report.rows({**one, "scale": {}, "contamination": {}})]
    assert names == [*MODELS, *(f"{model}, novel" for model in MODELS)]


def test_answers_are_scored() -> None:
    rows = np.array([score_report.of_answer("the cat", "the cat"), score_report.of_answer("", "a dog")])
    found = score_report.scores(rows, score_report.WRITTEN)
    assert found["exact_match"] == found["rouge_l"] == 0.5
    assert 0 < found["chrf"] < 1


def test_held_out_text_and_tokens_are_of_the_same_documents(tmp_path: Path) -> None:
    """Of a conversation only the answers that are learned count as bytes, as only they count as tokens."""
    said = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "B", "learn": False},
        {"role": "assistant", "content": "A"},
    ]
    rows = [{"doc_id": bytes([n]) * 16, **PLACE, "messages": said} for n in range(3)]
    with arrow.Writer(tmp_path / "clean/chat/documents", clean.CHAT_DOCUMENTS, batch_rows=1) as out:
        out.write(pa.Table.from_pylist(rows, clean.CHAT_DOCUMENTS))
    splits = [{"doc_id": bytes([n]) * 16, "split": split} for n, split in enumerate(("eval", "dropped", "train"))]
    with arrow.Writer(tmp_path / "dedup/chat", dedup.DECISIONS) as out:
        out.write(pa.Table.from_pylist(splits, dedup.DECISIONS))
    schema = pa.schema([("split", pa.string()), ("input_ids", pa.list_(pa.uint16())), ("learn", pa.list_(pa.bool_()))])
    tokens = [
        {"split": split, "input_ids": [0, n + 5], "learn": [False, True]} for n, split in enumerate(["eval", "train"])
    ]
    with arrow.Writer(tmp_path / "tokens/chat", schema) as out:
        out.write(pa.Table.from_pylist(tokens, schema))
    folders = [tmp_path / name for name in ("clean", "dedup", "tokens")]
    (found,) = held_out.held_out(*folders, ["chat"], SPECIAL)
    assert (found.text, found.said, found.conversation) == ("Q\nB\nA", "A", True)
    assert (found.ids.tolist(), found.learned.tolist()) == ([0, 5], [False, True])
    assert held_out.held_out(*folders, ["chat"], {"eos_token_id": 9})[0].ids.tolist() == [0, 5], (
        "its first token is given anyway"
    )
    texts = held_out.train_texts(*folders[:2], ["chat"])
    assert [text for batch in texts for text in batch.to_pylist()] == ["Q\nB\nA"]
    assert held_out.train_bytes(*folders[:2], ["chat"], 100) == b"A\n"
    assert held_out.train_bytes(*folders[:2], ["chat"], 1) == b"A"
    assert held_out.train_bytes(*folders[:2], ["chat", "chat"], 2) == b"AA", "of each source as much"


def test_without_a_bos_the_first_token_of_a_text_is_predicted_as_well(tmp_path: Path) -> None:
    """Else its bytes would count and its nats would not."""
    rows = [{"doc_id": bytes(16), **PLACE, "text": "ab"}]
    with arrow.Writer(tmp_path / "clean/laws/documents", clean.TEXT_DOCUMENTS) as out:
        out.write(pa.Table.from_pylist(rows, clean.TEXT_DOCUMENTS))
    with arrow.Writer(tmp_path / "dedup/laws", dedup.DECISIONS) as out:
        out.write(pa.Table.from_pylist([{"doc_id": bytes(16), "split": "eval"}], dedup.DECISIONS))
    schema = pa.schema([("split", pa.string()), ("input_ids", pa.list_(pa.uint16()))])
    with arrow.Writer(tmp_path / "tokens/laws", schema) as out:
        out.write(pa.Table.from_pylist([{"split": "eval", "input_ids": [5, 6, 1]}], schema))
    folders = [tmp_path / name for name in ("clean", "dedup", "tokens")]
    (plain,) = held_out.held_out(*folders, ["laws"], {"eos_token_id": 1}, causal=False)
    assert plain.ids.tolist() == [5, 6, 1]
    (found,) = held_out.held_out(*folders, ["laws"], {"eos_token_id": 1})
    assert (found.ids.tolist(), found.learned.tolist()) == ([1, 5, 6, 1], [False, True, True, True])
    assert held_out.held_out(*folders, ["laws"], SPECIAL)[0].ids.tolist() == [5, 6, 1]


def test_general_texts_hold_no_special_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/benchmarks").mkdir(parents=True)
    (tmp_path / "data/benchmarks/novel.jsonl").write_text(
        '{"text": "the fox</s>"}\n\n{"text": "法律"}\n', encoding="utf-8"
    )
    vocabulary = Vocabulary(tiny.tokenizer(tmp_path / "tokenizer"))
    first, second = held_out.general("novel", vocabulary)
    assert first.ids[0] == second.ids[0] == vocabulary.special_ids["bos_token_id"]
    assert vocabulary.special_ids["eos_token_id"] not in first.ids
    assert vocabulary.tokenizer.decode(first.ids[1:]) == "the fox</s>"
    assert (first.source, first.said, first.learned.tolist()[:2]) == ("novel", "the fox</s>", [False, True])


def test_a_model_is_scored_once_when_nothing_was_merged() -> None:
    """Equal weights and config; the papers beside them may differ. An adapter is never the merged model."""
    files = {"model.safetensors": "a", "config.json": "b", "training.json": "c"}
    known = {"one": files, "two": {**files, "training.json": "d"}, "other": {**files, "model.safetensors": "e"}}
    known["adapter"] = {"adapter_model.safetensors": "a", "config.json": "b"}
    assert same_weights(known, Path("one"), Path("two"))
    assert not same_weights(known, Path("one"), Path("other"))
    assert not same_weights(known, Path("one"), Path("adapter"))


def test_a_model_is_not_asked_beyond_its_positions() -> None:
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64), named_modules=list)
    with pytest.raises(SystemExit, match=r"max_length is 65 but the model has positions for 64; lower it"):
        score(model, [], Params(max_length=65), None)


def edit(workspace: Path, phase: str, **settings: Any) -> None:
    """Change the settings of evaluate_model in params.yaml."""
    from ruamel.yaml import YAML

    yaml = YAML()
    path = workspace / "params.yaml"
    content = yaml.load(path)
    content["phases"][phase]["evaluate_model"].update(settings)
    yaml.dump(content, path)


def test_a_requirement_that_is_missed_fails_the_stage_and_leaves_what_was_there(
    workspace: Path, run_stage: Runner
) -> None:
    """The numbers are printed, the exit status is 1, nothing is published; met, the new evaluation is."""
    path = workspace / "metrics/chat/evaluation.json"
    before = path.read_bytes(), (workspace / "metrics/chat/scores.csv").read_bytes()
    limit = arrow.read_json(path)["merged"]["loss"]
    (workspace / "data/benchmarks/novel.txt").write_text("Call me Ishmael. Some years ago I went to sea.\n河流入海。\n")
    edit(workspace, "chat", require=["token_accuracy >= 0", f"loss < {limit / 2}"], general=["novel"])
    failed = run_stage(workspace, "evaluate_model", "chat")
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert f"evaluate_model@chat: loss is {limit:.4f} but evaluate_model.require wants `loss < " in failed.stderr
    assert "merged, novel" in failed.stdout and f"{limit:.4f}" in failed.stdout
    assert (path.read_bytes(), (workspace / "metrics/chat/scores.csv").read_bytes()) == before
    edit(workspace, "chat", require=[f"loss < {2 * limit}"], quantized=["bf16", "int8", "nf4"])
    assert run_stage(workspace, "evaluate_model", "chat").returncode == 0
    found = arrow.read_json(path)
    assert found["general"]["novel"].keys() == {"base", "trained", "merged"}
    lost = {bits: abs(scores["loss"] - limit) for bits, scores in found["quantized"].items()}
    assert lost.keys() == {"bf16", "int8", "nf4"} and all(0 < value < 0.05 for value in lost.values())
    assert {name: found[name] for name in ("base", "merged")} == {
        name: json.loads(before[0])[name] for name in ("base", "merged")
    }, "equal to the last digit, with a general text beside it"
    # What may be required is what there is: params.yaml is refused for any other name before a phase is trained.
    sources = [path.name for path in (workspace / "data/clean/chat").iterdir()]
    names = score_report.possible("clm", sources, ["novel"], ["bf16", "int8", "nf4"], [])
    assert sorted(names) == sorted({**score_report.numbers(found), **found["merged"]})


def test_metrics_of_two_runs_are_equal_to_the_last_digit(twins: tuple[Path, Path]) -> None:
    """Of losses, proofs of merges and scores; what differs is the time, the memory and the commit."""

    def measured(folder: Path) -> dict[str, Any]:
        found = {path.stem: arrow.read_json(path) for path in sorted((folder / "metrics").rglob("*.json"))}
        return {
            name: {key: value for key, value in record.items() if key not in ("seconds", "peak_memory_mib", "git")}
            for name, record in found.items()
        }

    one, other = map(measured, twins)
    assert one == other
    assert one["merge_lora@chat"]["logit_difference_max"] > 0 and one["train_model@pretrain"]["eval_loss"] > 0


def test_what_an_evaluation_holds(finished: Path) -> None:
    for phase in ("pretrain", "chat"):
        found = arrow.read_json(finished / f"metrics/{phase}/evaluation.json")
        assert found["scale"].keys() == {"order0", "gzip", "xz", "ngram"}
        assert found["merged"].keys() == {"bits_per_byte", "loss", "perplexity", "token_accuracy"}
        low, high = found["intervals"]["merged"]["bits_per_byte"]
        assert low <= found["merged"]["bits_per_byte"] <= high
        assert {"prompt", "answer", "base", "sampled", "base_sampled"} == found["answers"][0].keys()
        with (finished / f"metrics/{phase}/scores.csv").open(encoding="utf-8") as file:
            rows = {row["name"]: row for row in csv.DictReader(file)}
        assert float(rows["merged"]["score"]) == found["merged"]["bits_per_byte"]
    assert found["generated"]["merged"].keys() == {"exact_match", "rouge_l", "chrf"}
    assert {"tiny_text", "tiny_notes"} == arrow.read_json(finished / "metrics/pretrain/evaluation.json")[
        "sources"
    ].keys()
    assert "generated" in found and len(found["generated"]["rows"]) > 3
    assert all(row["expected"].startswith("It is ") for row in found["generated"]["rows"])
    text = (finished / "reports/chat/generations.md").read_text(encoding="utf-8")
    assert "## How long is the Rhine?" in text
