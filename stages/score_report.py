"""From sums over documents to the scores, intervals and requirements of an evaluation. Part of evaluate_model.

    sums["merged"]        (documents, 4): nats, predicted tokens, right guesses, bytes
    evaluation(...)   ->  {"merged": {"bits_per_byte": 1.97, ...}, "change": {"bits_per_byte": -1.31}, "intervals": ...}

Documents are what is drawn anew for an interval, as they are independent and their tokens are not.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import baselines
import text_scores
from held_out import Document
from text_scores import Array

Measures = dict[str, Callable[[Array], Array]]
MODELS = ("base", "trained", "merged")
# Of sums over documents (..., 4): nats, tokens, right guesses, bytes. The first is the one that is compared.
MEASURES: dict[str, Measures] = {
    "clm": {
        "bits_per_byte": lambda sums: sums[..., 0] / math.log(2) / sums[..., 3],
        "loss": lambda sums: sums[..., 0] / sums[..., 1],
        "perplexity": lambda sums: np.exp(sums[..., 0] / sums[..., 1]),
        "token_accuracy": lambda sums: sums[..., 2] / sums[..., 1],
    },
    "mlm": {
        "masked_loss": lambda sums: sums[..., 0] / sums[..., 1],
        "masked_accuracy": lambda sums: sums[..., 2] / sums[..., 1],
    },
}
WRITTEN: Measures = {
    "exact_match": lambda sums: sums[..., 0] / sums[..., 2],
    "rouge_l": lambda sums: sums[..., 1] / sums[..., 2],
    "chrf": lambda sums: text_scores.chrf(sums[..., 3:].reshape(*sums.shape[:-1], text_scores.CHRF_ORDER, 3)),
}
WORST = 10  # documents shown of those that stand in the training text
COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
REQUIREMENT = re.compile(r"\s*([^\s<>=]+)\s*(<=?|>=?)\s*(-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*")


def scores(sums: Array, measures: Measures) -> dict[str, float]:
    """Return each measure of documents (documents, columns)."""
    return {name: round(float(measure(sums.sum(axis=0))), 6) for name, measure in measures.items()}


def intervals(sums: Array, measures: Measures, samples: int, seed: int) -> dict[str, list[float]]:
    """Return the interval of each measure."""
    return {name: text_scores.interval(sums, measure, samples, seed) for name, measure in measures.items()}


def compared(sums: dict[str, Array], rows: npt.NDArray[np.bool_], kind: str) -> dict[str, float]:
    """Return the first measure of each model over some of the documents."""
    (name, measure), *_ = MEASURES[kind].items()
    return {model: scores(sums[model][rows], {name: measure})[name] for model in MODELS}


def evaluation(
    documents: Sequence[Document], sums: dict[str, Array], general: list[str], kind: str, samples: int, seed: int
) -> dict[str, Any]:
    """Return the scores of each model on the held-out documents, by source and on the `general` sources.

    sums: (documents, 4) of each model. Raises ValueError when no token was predicted.
    """
    measures = MEASURES[kind]
    of = np.array([document.source for document in documents])
    # A document of which nothing is learned says nothing, but could be all that is drawn.
    some = sums["base"][:, 1] > 0
    own = some & ~np.isin(of, general)
    if not own.any():
        raise ValueError("no held-out document has a token to predict; raise dedup.eval_fraction or bring more text.")
    name, measure = next(iter(measures.items()))
    both = np.concatenate([sums["merged"], sums["base"]], axis=1)[own]
    change: Measures = {name: lambda sums: measure(sums[..., :4]) - measure(sums[..., 4:])}
    result: dict[str, Any] = {model: scores(sums[model][own], measures) for model in MODELS}
    result["change"] = scores(both, change)
    result["intervals"] = {model: intervals(sums[model][own], measures, samples, seed) for model in MODELS}
    result["intervals"]["change"] = intervals(both, change, samples, seed)
    for group, names in (("sources", sorted(set(of[own].tolist()))), ("general", general)):
        result[group] = {one: compared(sums, some & (of == one), kind) for one in names if (some & (of == one)).any()}
    return result


def contaminated(
    documents: Sequence[Document], sums: dict[str, Array], shares: Array, limit: float, general: list[str], kind: str
) -> dict[str, Any]:
    """Return how many held-out documents stand in the training text, and the scores without them.

    shares: of each document, the part that stands there; `limit`: the share from which it counts.
    """
    of = np.array([document.source for document in documents])
    own, high = ~np.isin(of, general), shares >= limit
    worst = sorted(np.flatnonzero(high).tolist(), key=lambda row: (-shares[row], row))[:WORST]
    result: dict[str, Any] = {
        "share_of_documents": round(float(high[own].mean()), 6),
        "documents": [int(high[own].sum()), int(own.sum())],
        "general": [f"{name}: {int(high[of == name].sum())} of {int((of == name).sum())}" for name in general],
        "worst": [
            {"source": str(of[row]), "share": round(float(shares[row]), 4), "text": documents[row].text[:80]}
            for row in worst
        ],
    }
    rest = own & ~high & (sums["base"][:, 1] > 0)
    return {**result, "clean": compared(sums, rest, kind)} if rest.any() else result


def of_answer(answer: str, expected: str) -> Array:
    """Return the sums of one answer for WRITTEN: exact match, ROUGE-L, 1, and the counts of chrF."""
    one = [text_scores.exact_match(answer, expected), text_scores.rouge_l(answer, expected), 1.0]
    return np.concatenate([one, text_scores.chrf_counts(answer, expected).ravel()])


def missed(result: dict[str, Any], require: list[str]) -> str | None:
    """Return a sentence on the first requirement that the scores do not meet, or None.

    Raises ValueError when there is no such score.
    """
    known = {**numbers(result), **numbers(result["merged"])}
    for text in require:
        match = REQUIREMENT.fullmatch(text)
        assert match
        name, sign, limit = match.groups()
        if name not in known:
            raise ValueError(f"evaluate_model.require names {name}, which is no score; there are {', '.join(known)}.")
        if not COMPARISONS[sign](known[name], float(limit)):
            return f"{name} is {known[name]:.4f} but evaluate_model.require wants `{text.strip()}`"
    return None


def possible(
    kind: str, sources: list[str], general: list[str], quantized: Sequence[str], tasks: list[str]
) -> list[str]:
    """Return the dotted names of all scores that such an evaluation can have, with * for tasks and their measures.

    A source without held-out text, for example, has none in the end: then `missed` says so.
    """
    measures = list(MEASURES[kind])
    of_model = [*measures, "pseudo_perplexity"] if kind == "mlm" else measures
    names = [*of_model, f"change.{measures[0]}", *(f"{model}.{name}" for model in MODELS for name in of_model)]
    for group in (*(f"sources.{name}" for name in sources), *(f"general.{name}" for name in general)):
        names += [f"{group}.{model}" for model in MODELS]
    names += [f"quantized.{bits}.{name}" for bits in quantized for name in measures]
    names += ["contamination.share_of_documents", *(f"contamination.clean.{model}" for model in MODELS)]
    names += [f"tasks.{model}.*" for model in ("base", "merged") if tasks]  # of a group, those of its tasks
    if kind == "clm":
        names += [f"scale.{name}" for name in baselines.NAMES]
        names += [f"generated.{model}.{name}" for model in ("base", "merged") for name in WRITTEN]
    return names


def numbers(content: dict[str, Any], before: str = "") -> dict[str, float]:
    """Return the numbers of nested dicts by dotted name, as `dvc metrics show` does."""
    found: dict[str, float] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{before}{name}.")
        elif isinstance(value, (int, float)):
            found[before + name] = value
    return found


def rows(result: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """Return (name, score, low, high) of the baselines and of each model; baselines have no interval."""
    (measure,) = result["change"]
    found = [(name, value, value, value) for name, value in result["scale"].items()]
    found += [(name, result[name][measure], *result["intervals"][name][measure]) for name in MODELS]
    groups = {**result["sources"], **result["general"]} if len(result["sources"]) > 1 else result["general"]
    groups = {**groups, "not contaminated": result["contamination"].get("clean", {})}
    return found + [(f"{model}, {name}", v, v, v) for name, values in groups.items() for model, v in values.items()]


def show(result: dict[str, Any]) -> str:
    """Return the scores of the models as lines of a table."""
    names = list(result["merged"])
    lines = [" " * 8 + "".join(f"{name:>19}" for name in names)]
    lines += [f"{model:8}" + "".join(f"{result[model][name]:19.4f}" for name in names) for model in MODELS]
    return "\n".join([*lines, *(f"{name}: {score:.4f}" for name, score, *_ in rows(result) if name not in MODELS)])
