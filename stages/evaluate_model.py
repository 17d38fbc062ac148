"""Evaluate base, trained and merged model of a phase on its held-out documents.

Reads:  data/clean/PHASE, data/dedup/PHASE, data/tokens/PHASE, models/PHASE/trained, models/PHASE/merged, the `base`
Writes: metrics/PHASE/evaluation.json   bits per byte, loss, perplexity of each model; order-0, gzip and xz as a scale
Params: phases.PHASE.evaluate_model

Bits per byte do not depend on the tokenizer: the negative log2-likelihood of all learned tokens over the UTF-8 bytes of
the learned text. Every learned token is predicted once: a document of tokens t0 ... t9 and max_length 4 is read as

    t0 t1 t2 t3 | t3 t4 t5 t6 | t6 t7 t8 t9      predicting 1-3, 4-6, 7-9; t0 (BOS) is given

A masked model has no bits per byte: loss and share of right guesses are of the same masked tokens for each model.

For conversations only what the assistant says counts, given everything before it.
"""

from __future__ import annotations

import gzip
import lzma
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from kit import arrow, stage
from kit.params import Phase, phase_sources, read_params
from kit.tokenizer import Vocabulary
from masking import Masking


class Params(BaseModel):
    """`phases.PHASE.evaluate_model`: how held-out text is read, which prompts are answered."""

    model_config = ConfigDict(extra="forbid")

    max_length: int = Field(ge=8, description="tokens that the model sees at once, at most what it was trained on")
    per_device_eval_batch_size: int = Field(16, ge=1, description="pieces of a document computed at once")
    prompts: list[str] = Field([], description="texts that the merged model continues, or questions that it answers")
    max_new_tokens: int = Field(60, ge=1, description="length of a generated answer")


def windows(length: int, max_length: int) -> list[tuple[int, int]]:
    """Return (first, last) of the pieces of a document; each begins with the last token of the one before.

    >>> windows(10, 4)
    [(0, 4), (3, 7), (6, 10)]
    """
    return [(first, min(first + max_length, length)) for first in range(0, max(length - 1, 1), max_length - 1)]


def held_out_tokens(folder: Path, sources: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids and learn marks of each held-out document."""
    for source in sources:
        for batch in arrow.batches(folder / source):
            learn = batch["learn"].to_pylist() if "learn" in batch.schema.names else None
            for row, split in enumerate(batch["split"].to_pylist()):
                if split == "eval":
                    ids = batch["input_ids"][row].values.to_numpy()
                    marks = np.array(learn[row]) if learn else np.ones(len(ids), dtype=bool)
                    yield ids, marks


def held_out_text(clean: Path, dedup: Path, sources: list[str]) -> Iterator[str]:
    """Yield the text of each held-out document, or what the assistant says in it."""
    for source in sources:
        splits = arrow.table(dedup / source, ["split"])["split"].to_pylist()
        rows = arrow.table(clean / source / "documents")
        chosen = rows.filter([split == "eval" for split in splits])
        if "text" in chosen.schema.names:
            yield from chosen["text"].to_pylist()
        else:
            for messages in chosen["messages"].to_pylist():
                yield "".join(message["content"] for message in messages if message["role"] == "assistant")


def scale(text: bytes) -> dict[str, float]:
    """Return the bits per byte of `text` for its own order-0 byte model, gzip -9 and xz -9e: what is easy to reach."""
    shares = np.array(list(Counter(text).values())) / len(text)
    return {
        "order0": round(float(-(shares * np.log2(shares)).sum()), 6),
        "gzip": round(8 * len(gzip.compress(text, 9, mtime=0)) / len(text), 6),
        "xz": round(8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text), 6),
    }


def negative_log_likelihood(model: Any, documents: list[tuple[np.ndarray, np.ndarray]], params: Params) -> float:
    """Return the sum over all learned tokens, but each document's first, of -ln p(token | what stands before it)."""
    import torch

    from kit.model import IGNORED, device

    model.eval()
    pieces = [
        (ids[first:last], marks[first:last])
        for ids, marks in documents
        for first, last in windows(len(ids), params.max_length)
        if marks[first + 1 : last].any()
    ]
    pieces.sort(key=lambda piece: len(piece[0]))  # neighbours of like length need little padding
    total = 0.0
    for start in range(0, len(pieces), params.per_device_eval_batch_size):
        batch = pieces[start : start + params.per_device_eval_batch_size]
        longest = max(len(ids) for ids, _ in batch)
        inputs = torch.zeros(len(batch), longest, dtype=torch.long)
        labels = torch.full((len(batch), longest), IGNORED, dtype=torch.long)
        for row, (ids, marks) in enumerate(batch):
            inputs[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            labels[row, : len(ids)] = torch.from_numpy(np.where(marks, ids.astype(np.int64), IGNORED))
        with torch.no_grad():
            # Padding stands behind, where a causal model cannot see it.
            logits = model(input_ids=inputs.to(device())).logits[:, :-1].float()
        targets = labels[:, 1:].to(device())
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
    return total


def guesses(
    model: Any, documents: list[tuple[np.ndarray, np.ndarray]], params: Params, masking: Any
) -> dict[str, float]:
    """Return loss and share of right guesses of a masked model on the documents, masked alike for each model."""
    import torch

    from kit.model import device

    model.eval()
    step = params.max_length
    pieces = [
        (i, m[n : n + step]) for ids, m in documents for n in range(0, len(ids), step) for i in [ids[n : n + step]]
    ]
    numbers = sorted(range(len(pieces)), key=lambda number: len(pieces[number][0]))
    total, right, tokens = 0.0, 0, 0
    for start in range(0, len(pieces), params.per_device_eval_batch_size):
        chosen_numbers = numbers[start : start + params.per_device_eval_batch_size]
        shape = len(chosen_numbers), len(pieces[chosen_numbers[-1]][0])
        ids, filled, learned = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool)
        for row, number in enumerate(chosen_numbers):
            piece, marks = pieces[number]
            ids[row, : len(piece)], filled[row, : len(piece)], learned[row, : len(piece)] = piece, 1, marks
        inputs, chosen = masking(ids, learned, np.array(chosen_numbers))
        places = [torch.from_numpy(values).to(device()) for values in (inputs, filled, chosen, ids)]
        with torch.no_grad():
            logits = model(input_ids=places[0], attention_mask=places[1]).logits[places[2]].float()
        wanted = places[3][places[2]]
        total += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
        right += int((logits.argmax(-1) == wanted).sum())
        tokens += len(wanted)
    return {"masked_loss": round(total / tokens, 6), "masked_accuracy": round(right / tokens, 6)}


def answers(folder: Path, params: Params) -> list[dict[str, str]]:
    """Return each prompt with what the merged model writes, greedily, through the text-generation pipeline."""
    from transformers import AutoTokenizer, pipeline

    from kit.model import objective

    if not params.prompts:
        return []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if objective(folder) == "mlm":
        if strangers := [prompt for prompt in params.prompts if prompt.count(tokenizer.mask_token) != 1]:
            raise ValueError(
                f"the prompt {strangers[0]!r} of a masked model needs one {tokenizer.mask_token} to fill in."
            )
        fill = pipeline("fill-mask", model=str(folder), tokenizer=tokenizer)
        return [{"prompt": prompt, "answer": fill(prompt, top_k=1)[0]["sequence"]} for prompt in params.prompts]
    generate = pipeline("text-generation", model=str(folder), tokenizer=tokenizer)
    rows = []
    for prompt in params.prompts:
        asked: Any = [{"role": "user", "content": prompt}] if tokenizer.chat_template else prompt
        found = generate(asked, do_sample=False, max_new_tokens=params.max_new_tokens, return_full_text=False)
        rows.append({"prompt": prompt, "answer": found[0]["generated_text"]})
    return rows


def load_trained(base: Path, trained: Path, vocabulary: Vocabulary) -> Any:
    """Return the model as it was trained: the whole one, or its base (4 bits if it was) with the adapter."""
    from kit.model import load_model

    if not (trained / "adapter_config.json").is_file():
        return load_model(trained, vocabulary.size, vocabulary.special_ids)
    from peft import PeftModel

    about = arrow.read_json(trained / "training.json")
    kind = about.get("objective", "clm")
    model = load_model(base, vocabulary.size, vocabulary.special_ids, about["quantization"], trained, kind)
    return PeftModel.from_pretrained(model, str(trained))


def main(phase: str) -> None:
    params = read_params(f"phases.{phase}.evaluate_model", Params)
    base, models = Path(read_params(f"phases.{phase}", Phase).base), Path("models", phase)
    clean, dedup, tokens = (Path("data", name, phase) for name in ("clean", "dedup", "tokens"))
    inputs = [clean, dedup, tokens, base, models / "trained", models / "merged"]
    with stage.run("evaluate_model", phase, [str(path) for path in inputs], [f"metrics/{phase}"]) as run:
        (folder,) = run.outputs
        sources = phase_sources(phase, clean)
        documents = list(held_out_tokens(tokens, sources))
        text = "\n".join(held_out_text(clean, dedup, sources)).encode("utf-8")
        n_bytes = len(text) - len(documents) + 1  # without the line breaks between the documents
        n_tokens = sum(int(marks[1:].sum()) for _, marks in documents)

        from kit.model import load_model, start

        vocabulary = Vocabulary(models / "merged")
        about = arrow.read_json(models / "trained/training.json")
        kind = about.get("objective", "clm")
        masking = (
            Masking(vocabulary, about["mlm_probability"], about["whole_word_mask"], seed=0) if kind == "mlm" else None
        )
        result: dict[str, Any] = {"scale": scale(text)}
        loaders = {
            "base": lambda: load_model(
                base, vocabulary.size, vocabulary.special_ids, tokenizer=models / "merged", kind=kind
            ),
            "trained": lambda: load_trained(base, models / "trained", vocabulary),
            "merged": lambda: load_model(models / "merged", vocabulary.size, vocabulary.special_ids),
        }
        for name, load in run.progress(loaders.items(), len(loaders), "models"):
            start(0)
            if masking:
                result[name] = guesses(load(), documents, params, masking)
                continue
            nll = negative_log_likelihood(load(), documents, params)
            result[name] = {
                "bits_per_byte": round(nll / math.log(2) / n_bytes, 6),
                "loss": round(nll / n_tokens, 6),
                "perplexity": round(math.exp(nll / n_tokens), 4),
            }
        result["answers"] = answers(models / "merged", params)
        arrow.write_json(folder / "evaluation.json", result, only_ascii=True)
        run.count(documents=len(documents), bytes=n_bytes, tokens=n_tokens)


if __name__ == "__main__":
    stage.cli(main, __doc__)
