"""Evaluate base, trained and merged model of a phase on its held-out documents.

Reads:  data/clean/PHASE, data/dedup/PHASE, data/tokens/PHASE, models/PHASE/trained, models/PHASE/merged, the `base`,
        data/benchmarks (the texts of `general`)
Writes: metrics/PHASE/evaluation.json   base, trained, merged: bits per byte, loss, perplexity, token accuracy;
                                        change, intervals, sources, contamination, general, quantized, tasks,
                                        generated, answers, scale
        metrics/PHASE/scores.csv        bits per byte of each model and baseline with its interval, for `dvc plots`
Params: phases.PHASE.evaluate_model

Bits per byte do not depend on the tokenizer: the negative log2-likelihood of all learned tokens over the UTF-8 bytes of
the learned text. Of a conversation only what the assistant says counts, given everything before it. A masked model has
no bits per byte: its loss and share of right guesses are of the same masked tokens for each model.

    change.bits_per_byte            -1.31    merged minus base: below 0 it has learned
    intervals.merged.bits_per_byte  [1.89, 2.05]    95 %, documents drawn anew; of `change`, the same for both models
    general.NAME.merged             the same score on texts that are not of the domain: what was forgotten
    contamination.clean.merged      the same without the documents that stand largely in the training text

`require: ["bits_per_byte < 3", "change.bits_per_byte < 0"]` fails the stage with the numbers printed, unpublished.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

import baselines
import compared_models
import contamination
import generation
import harness
import held_out
import score_report
from kit import arrow, stage
from kit.params import Phase, phase_sources, read_params
from kit.tokenizer import Vocabulary
from masking import Masking
from score_report import MODELS, REQUIREMENT


def _requirement(text: str) -> str:
    if not REQUIREMENT.fullmatch(text):
        raise ValueError(f"{text!r} is no requirement: write a score, <, <=, > or >=, and a number: bits_per_byte < 3")
    return text


class Params(BaseModel):
    """`phases.PHASE.evaluate_model`: how held-out text is read, what is generated, what the result must reach."""

    model_config = ConfigDict(extra="forbid")

    max_length: int = Field(ge=8, description="tokens that the model sees at once, at most what it was trained on")
    per_device_eval_batch_size: int = Field(
        16, ge=1, description="pieces of max_length tokens computed at once, of shorter ones more"
    )
    prompts: list[str] = Field([], description="texts that base and merged model continue, or questions they answer")
    max_new_tokens: int = Field(60, ge=1, description="length of a generated answer, tokens")
    temperature: float = Field(0.8, gt=0, description="of the sampled answers to the prompts")
    top_p: float = Field(0.95, gt=0, le=1, description="share of probability that sampled tokens are drawn from")
    seed: int = Field(0, ge=0, description="of sampled answers and of the documents drawn for the intervals")
    generated_rows: int = Field(
        16, ge=0, description="held-out conversations answered for exact match, ROUGE-L and chrF; 0: none"
    )
    pseudo_perplexity_tokens: int = Field(
        256, ge=0, description="masked models: tokens hidden one at a time, a pass each; 0: none"
    )
    general: list[str] = Field(
        [], description="files in data/benchmarks (.txt, or .jsonl with `text`) that show what was forgotten"
    )
    quantized: list[Literal["bf16", "int8", "nf4"]] = Field(
        [], description="the merged model in fewer bits (bitsandbytes), scored: what is lost when it is served so"
    )
    lm_eval_tasks: list[str] = Field(
        [], description="tasks of lm-evaluation-harness (an extra), each in a .yaml file in data/benchmarks"
    )
    contaminated_share: float = Field(
        0.2, gt=0, le=1, description="share of a document in the training text from which it counts as contaminated"
    )
    bootstrap_samples: int = Field(1000, ge=100, description="draws of documents for each 95 % interval")
    require: list[Annotated[str, AfterValidator(_requirement)]] = Field(
        [], description="e.g. `bits_per_byte < 3` (of merged) or `change.bits_per_byte < 0`: else the stage fails"
    )


def main(phase: str) -> None:
    params = read_params(f"phases.{phase}.evaluate_model", Params)
    base, models = Path(read_params(f"phases.{phase}", Phase).base), Path("models", phase)
    clean, dedup, tokens = (Path("data", name, phase) for name in ("clean", "dedup", "tokens"))
    inputs = [clean, dedup, tokens, base, models / "trained", models / "merged", Path("data/benchmarks")]
    with stage.run("evaluate_model", phase, [str(path) for path in inputs], [f"metrics/{phase}"]) as run:
        (folder,) = run.outputs
        sources = phase_sources(phase, clean)
        about = arrow.read_json(models / "trained/training.json")
        kind = about.get("objective", "clm")
        vocabulary = Vocabulary(models / "merged")
        own = held_out.held_out(clean, dedup, tokens, sources, vocabulary.special_ids, causal=kind == "clm")
        tokenizer = generation.tokenizer_of(models / "merged", [one.text for one in own])
        documents = own + [one for name in params.general for one in held_out.general(name, vocabulary)]
        shares = contamination.shares([one.text for one in documents], held_out.train_texts(clean, dedup, sources))
        masking = None
        if kind == "mlm":
            masking = Masking(vocabulary, about["mlm_probability"], about["whole_word_mask"], seed=0)

        sums: dict[str, np.ndarray] = {}
        texts: dict[str, dict[str, Any]] = {}
        pseudo: dict[str, float] = {}
        tasks: dict[str, dict[str, dict[str, float]]] = {}
        for name in run.progress(MODELS, len(MODELS), "models"):
            model = compared_models.load(name, base, models, vocabulary)
            if name == "merged" and compared_models.same_weights(run.files, models / "trained", models / "merged"):
                sums[name] = sums["trained"]
            else:
                sums[name] = compared_models.score(model, documents, params, masking)
            if name != "trained":
                texts[name] = compared_models.written(model, tokenizer, own, params)
                if params.lm_eval_tasks:
                    batch_size = params.per_device_eval_batch_size
                    tasks[name] = harness.scores(model, tokenizer, params.lm_eval_tasks, batch_size)
            if masking and params.pseudo_perplexity_tokens:
                pseudo[name] = compared_models.pseudo_perplexity(model, own, params, masking)

        draws = params.bootstrap_samples, params.seed
        result = score_report.evaluation(documents, sums, params.general, kind, *draws)
        result["quantized"] = {}
        for bits in run.progress(params.quantized, len(params.quantized), "quantised models"):
            model = compared_models.quantized(bits, models / "merged", vocabulary)
            served = compared_models.score(model, own, params, masking)
            result["quantized"][bits] = score_report.scores(served, score_report.MEASURES[kind])
        for name, value in pseudo.items():
            result[name]["pseudo_perplexity"] = value
        limit = params.contaminated_share
        result["contamination"] = score_report.contaminated(documents, sums, shares, limit, params.general, kind)
        result["answers"] = compared_models.answers(params.prompts, texts["base"], texts["merged"])
        result["generated"] = compared_models.answered(texts["base"], texts["merged"], tokenizer, params)
        result["tasks"] = tasks
        result["scale"] = {}
        if kind == "clm":
            said = "\n".join(one.said for one in own).encode()
            result["scale"] = baselines.scale(said, held_out.train_bytes(clean, dedup, sources, baselines.TRAIN_BYTES))
        print(score_report.show(result), flush=True)
        if sentence := score_report.missed(result, params.require):
            raise ValueError(
                f"{sentence}; no evaluation was published: train further, or require less (DVC has removed the "
                "previous one; with what gave it in params.yaml, `dvc repro` brings it back from its cache)."
            )
        arrow.write_json(folder / "evaluation.json", result, only_ascii=True)
        with (folder / "scores.csv").open("w", newline="", encoding="utf-8") as file:
            lines = [("name", "score", "low", "high"), *score_report.rows(result)]
            csv.writer(file, lineterminator="\n").writerows(lines)
        counts = sums["merged"][: len(own)].sum(axis=0)
        run.count(documents=len(own), bytes=int(counts[3]), tokens=int(counts[1]))


if __name__ == "__main__":
    stage.cli(main, __doc__)
