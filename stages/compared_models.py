"""Base, trained and merged model of a phase, one after the other: their scores and what they write. Part of
evaluate_model.

    load("trained", base, models, vocabulary)   ->  the base with its adapter, or the trained model
    written(model, ...)["greedy"]               ->  a text for each prompt
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import generation
import model_scores
import score_report
from held_out import Document
from kit import arrow
from kit.tokenizer import Vocabulary
from masking import Masking
from text_scores import Array

if TYPE_CHECKING:
    from evaluate_model import Params

# Arguments of transformers' BitsAndBytesConfig; bf16 needs none.
FEWER_BITS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"},
}


def load(name: str, base: Path, models: Path, vocabulary: Vocabulary) -> Any:
    """Return base, trained or merged model; trained is its base (4 bits if it was) with the adapter, if it has one."""
    from kit.model import device, load_model, start

    start(0)
    size, special = vocabulary.size, vocabulary.special_ids
    about = arrow.read_json(models / "trained/training.json")
    kind = about.get("objective", "clm")
    if name == "base":
        return load_model(base, size, special, tokenizer=models / "merged", kind=kind).to(device())
    if name == "merged" or not (models / "trained/adapter_config.json").is_file():
        return load_model(models / name, size, special).to(device())
    from peft import PeftModel

    model = load_model(base, size, special, about["quantization"], models / "trained", kind)
    model = PeftModel.from_pretrained(model, str(models / "trained"))
    return model if about["quantization"] else model.to(device())


def quantized(name: str, merged: Path, vocabulary: Vocabulary) -> Any:
    """Return the merged model in fewer bits, as it would be served; computed in float32 but for bf16."""
    import torch

    from kit.model import device, load_model, start

    start(0)
    model = load_model(merged, vocabulary.size, vocabulary.special_ids, FEWER_BITS[name])
    return model if FEWER_BITS[name] else model.to(device(), torch.bfloat16)


def same_weights(files: dict[str, dict[str, str]], left: Path, right: Path) -> bool:
    """Return whether two model folders hold the same model, given the SHA-256 of their files."""
    kept = [
        {
            name: digest
            for name, digest in files[str(folder)].items()
            if name.endswith(".safetensors") or name == "config.json"
        }
        for folder in (left, right)
    ]
    return kept[0] == kept[1]


def score(model: Any, documents: Sequence[Document], params: Params, masking: Masking | None) -> Array:
    """Return nats, predicted tokens, right guesses and bytes of each document, (documents, 4).

    Raises SystemExit when the model has fewer positions than max_length.
    """
    from kit.model import max_positions

    limit = max_positions(model)
    if limit is not None and params.max_length > limit:
        raise SystemExit(
            f"evaluate_model.max_length is {params.max_length:,} but the model has positions for {limit:,}; lower it."
        )
    settings = params.max_length, params.per_device_eval_batch_size
    sums = (
        model_scores.guesses(model, documents, *settings, masking)
        if masking
        else model_scores.likelihoods(model, documents, *settings)
    )
    return np.column_stack([sums, [len(one.said.encode()) for one in documents]])


def pseudo_perplexity(model: Any, documents: Sequence[Document], params: Params, masking: Masking) -> float:
    """Return the perplexity of a masked model that guesses single tokens."""
    settings = params.max_length, params.per_device_eval_batch_size
    sums = model_scores.pseudo_likelihoods(model, documents, *settings, masking, params.pseudo_perplexity_tokens)
    nats, tokens, _ = sums.sum(axis=0)
    return round(math.exp(nats / tokens), 4) if tokens else math.nan


def written(model: Any, tokenizer: Any, documents: Sequence[Document], params: Params) -> dict[str, list[Any]]:
    """Return what a model writes: to the prompts, greedily and sampled, and to held-out questions.

    A masked model fills the gaps of the prompts.
    """
    from kit.model import max_positions

    if tokenizer.mask_token and "MaskedLM" in type(model).__name__:
        filled = generation.fill(model, tokenizer, params.prompts)
        return {"greedy": [text for text, _ in filled], "candidates": [tokens for _, tokens in filled]}
    prompts = [generation.prompt_ids(prompt, tokenizer) for prompt in params.prompts]
    sampling = {"temperature": params.temperature, "top_p": params.top_p}
    longest = (max_positions(model) or params.max_length + params.max_new_tokens) - params.max_new_tokens
    asked = generation.questions(documents, tokenizer, params.generated_rows, longest)
    return {
        "greedy": generation.write(model, tokenizer, prompts, params.max_new_tokens),
        "sampled": generation.write(model, tokenizer, prompts, params.max_new_tokens, 1, sampling, params.seed),
        "questions": asked,
        "answers": generation.write(
            model, tokenizer, [one.ids for one in asked], params.max_new_tokens, params.per_device_eval_batch_size
        ),
    }


def answers(prompts: list[str], base: dict[str, list[Any]], merged: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Return a row for each prompt: what the merged model writes, and beside it the base."""
    rows = [
        {"prompt": prompt, "answer": merged["greedy"][n], "base": base["greedy"][n]} for n, prompt in enumerate(prompts)
    ]
    for kind in ("sampled", "candidates"):
        if kind in merged:
            for row, one, other in zip(rows, merged[kind], base[kind], strict=True):
                row |= {kind: one, f"base_{kind}": other}
    return rows


def answered(
    base: dict[str, list[Any]], merged: dict[str, list[Any]], tokenizer: Any, params: Params
) -> dict[str, Any]:
    """Return exact match, ROUGE-L and chrF of the answers to held-out questions, their intervals, and the answers."""
    if not merged.get("questions"):
        return {}
    expected = [question.answer for question in merged["questions"]]
    result: dict[str, Any] = {"intervals": {}}
    for name, texts in (("base", base["answers"]), ("merged", merged["answers"])):
        sums = np.array([score_report.of_answer(*pair) for pair in zip(texts, expected, strict=True)])
        result[name] = score_report.scores(sums, score_report.WRITTEN)
        result["intervals"][name] = score_report.intervals(
            sums, score_report.WRITTEN, params.bootstrap_samples, params.seed
        )
    asked = [tokenizer.decode(question.ids, skip_special_tokens=True) for question in merged["questions"]]
    columns = zip(asked, expected, base["answers"], merged["answers"], strict=True)
    result["rows"] = [dict(zip(("question", "expected", "base", "merged"), row, strict=True)) for row in columns]
    return result
