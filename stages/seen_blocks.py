"""The blocks of one split as a model is shown them: as they are stored, or with tokens hidden that it has to guess.
Part of train_model, merge_lora and export_model.

    seen(Path("data/blocks/chat/eval"), vocabulary, {"objective": "mlm", "mlm_probability": 0.15, ...})
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit import arrow
from kit.tokenizer import Vocabulary
from masking import Masking

if TYPE_CHECKING:
    from kit.model import Blocks, MaskedBlocks


def seen(folder: Path, vocabulary: Vocabulary, about: dict[str, Any], seed: int = 0) -> Blocks | MaskedBlocks:
    """Return the blocks of one split as the objective shows them.

    `about`: objective, mlm_probability and whole_word_mask, from params.yaml or the training.json of a trained model.
    """
    from kit.model import Blocks, MaskedBlocks

    blocks = Blocks(arrow.table(folder), arrow.manifest(folder)["counts"]["tokens"])
    if about.get("objective") != "mlm":
        return blocks
    return MaskedBlocks(blocks, Masking(vocabulary, about["mlm_probability"], about["whole_word_mask"], seed))
