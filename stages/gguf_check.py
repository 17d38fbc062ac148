"""What llama.cpp makes of a GGUF file: tokens that must be the tokenizer's, and the loss. Part of export_model.

    check(Path("model.gguf"), Path("models/chat/merged"), held_out, 2.31)   ->  2.32

llama-cpp-python stands in no list of packages: pip compiles it where somebody installs it.
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kit.tokenizer import Vocabulary

if TYPE_CHECKING:
    import torch

TEXTS = (
    "It isn't far: they'll walk 12, 345 or 67890 steps.",
    "第一百二十三条　法律另有规定的，依照其规定。（2024年）",
    "  two spaces,\ttab,\r\n\r\n  line breaks   and the end  ",
    "naïve café, ÀÉÎ, Ünïcode; 🙂👍🏽 x² ½ ١٢٣ हिन्दी",
    "f(x) = {'a': [1.5e-3, None]}  # __init__ <s></s>",
)
LOSS = 0.1  # nats. Rounding to 8 bits costs less than 0.02 in the tests; a tensor in a wrong place costs whole nats.


class LlamaCpp:
    """A GGUF file as kit.model.mean_loss calls a model: ids to logits, computed by llama.cpp on the CPU."""

    training = False

    def __init__(self, path: Path, block_size: int) -> None:
        import llama_cpp  # type: ignore[import-not-found, unused-ignore]

        from kit.model import CPU_THREADS

        threads = {"n_threads": CPU_THREADS, "n_threads_batch": CPU_THREADS}
        sizes = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), block_size)
        self.llama = llama_cpp.Llama(str(path), logits_all=True, verbose=False, **sizes, **threads)

    def __call__(self, input_ids: torch.Tensor) -> Any:
        import torch

        rows = []
        for ids in input_ids.tolist():
            self.llama.reset()
            self.llama.eval(ids)
            rows.append(torch.from_numpy(self.llama.scores[: len(ids)].copy()))
        return SimpleNamespace(logits=torch.stack(rows).to(input_ids.device))

    def eval(self) -> None:
        """Do nothing: it is never trained."""

    def train(self, mode: bool) -> None:
        """Do nothing: it is never trained."""

    def close(self) -> None:
        """Give its memory back: when Python ends that is too late, and llama_cpp prints a traceback."""
        self.llama.close()

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a plain text, without BOS."""
        found: list[int] = self.llama.tokenize(text.encode(), add_bos=False, special=False)
        return found


def check(path: Path, merged: Path, blocks: Any, expected: float) -> float:
    """Return the loss of held-out blocks as llama.cpp computes it.

    Raises ValueError when it is not `expected`, the loss of the model in bfloat16, within LOSS, or when llama.cpp makes
    other tokens of TEXTS or of the text of the blocks than the tokenizer does.
    """
    from kit.model import mean_loss

    tokenizer = Vocabulary(merged).tokenizer
    tokenizer.encode_special_tokens = True  # "</s>" in a text is text
    held_out = (tokenizer.decode(blocks[number]["input_ids"].tolist()) for number in range(len(blocks)))
    with closing(LlamaCpp(path, blocks.block_size)) as model:
        for text in (*TEXTS, *held_out):
            if model.ids(text) != tokenizer.encode(text, add_special_tokens=False).ids:
                raise ValueError(
                    f"llama.cpp makes other tokens of {json.dumps(text[:60], ensure_ascii=False)} than the tokenizer; "
                    "nothing was published: take bf16."
                )
        loss = round(mean_loss(model, blocks, 1), 6)
    if not abs(loss - expected) <= LOSS:
        raise ValueError(
            f"llama.cpp computes a loss of {loss:.4f}, the model in bfloat16 has {expected:.4f}; nothing was "
            "published: take bf16 (this is a bug)."
        )
    return loss
