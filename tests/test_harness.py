"""harness: lm-evaluation-harness runs tasks that lie in this repository, offline."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import harness
from test_generation import saved

TASK = """\
task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: data/benchmarks/quiz.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""


def test_a_missing_harness_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match=r"needs lm-evaluation-harness: pip install '\.\[harness\]'"):
        harness.scores(None, None, ["quiz"], 1)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="not installed: lm_eval (extra `harness`)")
def test_a_task_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is asked which of two answers is likelier; swapped labels give one minus the share of right ones.

    The file of questions keeps its name and its length: no cache may bring the old ones back.
    """
    model, tokenizer = saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/benchmarks").mkdir(parents=True)
    (tmp_path / "data/benchmarks/quiz.yaml").write_text(TASK)
    found = []
    for swapped in (0, 1):
        rows = [
            {"question": f"the fox {n}", "choices": ["the lazy dog", f"jumps {n}"], "label": (n + swapped) % 2}
            for n in range(6)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data/benchmarks/quiz.jsonl").write_text(text)
        found.append(harness.scores(model, tokenizer, ["quiz"], 2))
    assert found[0].keys() == {"quiz"} and found[0]["quiz"].keys() == {"acc"}
    assert found[0]["quiz"]["acc"] + found[1]["quiz"]["acc"] == pytest.approx(1)
    with pytest.raises(ValueError, match=r"names exam; tasks in data/benchmarks/\*\.yaml: quiz\."):
        harness.scores(model, tokenizer, ["exam"], 2)
