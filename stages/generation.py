"""What a model writes: continued prompts, answers to held-out questions, filled gaps. Part of evaluate_model.

Greedy unless `sampling` gives temperature and top_p; a sampled text depends on the seed, on nothing before it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from held_out import Document
from kit.tokenizer import Vocabulary

TOP = 5  # candidates shown for a gap


class Question(NamedTuple):
    """A held-out conversation up to its last answer."""

    ids: list[int]
    answer: str


def tokenizer_of(folder: Path, texts: Sequence[str] = ()) -> Any:
    """Return the tokenizer of a model folder as transformers gives it to every user of the model.

    Raises ValueError when it makes other tokens of `texts` than the tokenizer.json beside the model does: transformers
    5 gives a model of type qwen2 the words and the NFC of Qwen 2, whatever it was trained with.
    """
    from transformers import AutoTokenizer

    given, own = AutoTokenizer.from_pretrained(folder), Vocabulary(folder).tokenizer
    both = given.backend_tokenizer, own
    given.backend_tokenizer.no_truncation()  # as of `own`; transformers sets both anew whenever it encodes
    given.backend_tokenizer.no_padding()
    for text in texts:
        theirs, ours = (one.encode(text, add_special_tokens=False).ids for one in both)
        if theirs != ours:
            raise ValueError(
                f"transformers opens {folder} with a {type(given).__name__}, which makes other tokens of "
                f"{json.dumps(text[:60], ensure_ascii=False)} than the tokenizer that the model learned with; take a "
                "base of another model_type (qwen3 instead of qwen2), or the tokenizer of such a base (mode: reuse)."
            )
    return given


def questions(documents: Sequence[Document], tokenizer: Any, number: int, longest: int) -> list[Question]:
    """Return `number` of the conversations whose question has at most `longest` tokens, at equal distances.

    All that was rendered before the last learned run of tokens is the question, as training showed it.
    """
    fit = []
    for document in documents:
        begins = np.flatnonzero(document.learned & ~np.append(False, document.learned[:-1]))
        if document.conversation and len(begins) and 0 < begins[-1] <= longest:
            fit.append((document, int(begins[-1])))
    rows = np.unique(np.linspace(0, len(fit) - 1, min(number, len(fit))).round().astype(int))
    found = []
    for document, begin in (fit[row] for row in rows):
        answer = document.ids[begin:][document.learned[begin:]].tolist()
        found.append(Question(document.ids[:begin].tolist(), tokenizer.decode(answer, skip_special_tokens=True)))
    return found


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """Return a prompt as tokens: a question in the chat template where there is one, else BOS and the text."""
    if tokenizer.chat_template:
        said = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.encode(prompt)


def write(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 1,
    sampling: dict[str, float] | None = None,
    seed: int = 0,
) -> list[str]:
    """Return what the model writes behind each prompt, without special tokens."""
    import torch

    from kit.model import device

    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    options: dict[str, Any] = {"do_sample": True, **sampling} if sampling else {"do_sample": False}
    answers = []
    threads = torch.get_num_threads()
    # A step computes one token, too little to share: 16 answers of the default took 0.8 CPU seconds, with 2 threads 10.
    torch.set_num_threads(1)
    model.eval()
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        longest = max(map(len, batch))
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in batch])  # padding is in front
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        torch.manual_seed(seed)
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids.to(device()),
                attention_mask=mask.to(device()),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                **options,
            )
        answers += [tokenizer.decode(row[longest:], skip_special_tokens=True) for row in found.tolist()]
    torch.set_num_threads(threads)
    return answers


def fill(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return each prompt with its gap filled, and the most probable tokens for it with their probabilities.

    Raises ValueError when a prompt has no gap, or several.
    """
    import torch

    from kit.model import device

    filled = []
    model.eval()
    for prompt in prompts:
        if prompt.count(tokenizer.mask_token) != 1:
            raise ValueError(f"the prompt {prompt!r} of a masked model needs one {tokenizer.mask_token} to fill in.")
        ids = torch.tensor([tokenizer.encode(prompt)], device=device())
        gap = int((ids[0] == tokenizer.mask_token_id).nonzero())
        with torch.inference_mode():
            best = model(input_ids=ids).logits[0, gap].float().softmax(-1).topk(TOP)
        chances, tokens = best.values.tolist(), best.indices.tolist()
        ids[0, gap] = tokens[0]
        candidates = [
            f"{tokenizer.decode([token])} {chance:.4f}" for token, chance in zip(tokens, chances, strict=True)
        ]
        filled.append((tokenizer.decode(ids[0].tolist(), skip_special_tokens=True), candidates))
    return filled
