"""Tasks of lm-evaluation-harness on a model, from files of this repository. Part of evaluate_model.

    data/benchmarks/quiz.yaml    {task: quiz, dataset_path: json, test_split: test,
                                  dataset_kwargs: {data_files: {test: data/benchmarks/quiz.jsonl}},
                                  output_type: multiple_choice, doc_to_text: "{{question}}", ...}
    scores(model, tokenizer, ["quiz"], 16)   ->   {"quiz": {"acc": 0.71}}

The harness is an extra (`pip install '.[harness]'`): its own tasks come from the Hub, so none of them is known here.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path("data/benchmarks")


def scores(model: Any, tokenizer: Any, tasks: list[str], batch_size: int) -> dict[str, dict[str, float]]:
    """Return the metrics of each task, of a chat model through its template.

    Raises SystemExit when the harness is not installed, ValueError when there is no such task.
    """
    try:
        # By name: none of these has types, and the harness is seldom installed.
        lm_eval = importlib.import_module("lm_eval")
        models = importlib.import_module("lm_eval.models.huggingface")
        lm_eval_tasks = importlib.import_module("lm_eval.tasks")
    except ImportError:
        raise SystemExit(
            "evaluate_model.lm_eval_tasks needs lm-evaluation-harness: pip install '.[harness]', or leave the key out."
        ) from None
    datasets = importlib.import_module("datasets")
    manager = lm_eval_tasks.TaskManager(include_path=str(FOLDER), include_defaults=False)
    if strangers := sorted(set(tasks) - set(manager.all_tasks)):
        known = ", ".join(manager.all_tasks) or "none"
        raise ValueError(f"evaluate_model.lm_eval_tasks names {strangers[0]}; tasks in {FOLDER}/*.yaml: {known}.")
    before = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory() as cache:  # its own cache knows a file by name and time, not by content
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        found = lm_eval.simple_evaluate(
            model=models.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=tasks,
            task_manager=manager,
            apply_chat_template=bool(tokenizer.chat_template),
            bootstrap_iters=0,
            log_samples=False,
        )
        datasets.config.HF_DATASETS_CACHE = before
    return {
        task: {
            name.removesuffix(",none"): round(value, 6)
            for name, value in sorted(metrics.items())
            if isinstance(value, float | int) and "stderr" not in name and name not in ("sample_len",)
        }
        for task, metrics in found["results"].items()
    }
