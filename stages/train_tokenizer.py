"""Make the tokenizer of a phase: train one on its documents, or take the one that its base carries.

Reads:  data/clean/PHASE and data/dedup/PHASE (the train split alone), the phase's `base` folder
Writes: models/tokenizers/PHASE   tokenizer.json, tokenizer_config.json, chat_template.jinja
Params: phases.PHASE.train_tokenizer

`mode: train` gives a byte-level BPE: any text comes back from its ids byte for byte, no unknown token is needed.
`mode: reuse` copies the base's tokenizer. `chat_template` names a template of this file, or is left out to keep the
base's own; it travels with the model, so chatting and training see the same text.

Example: two documents "aaaa aaaa", vocabulary 263, specials <s> </s> <pad>

    ids 0-2 the specials, 3-258 the bytes, 259 "aa", 260 "aaaa", ...; "aaaa" -> [260]
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from kit import arrow, stage
from kit.params import Phase, phase_sources, read_params
from kit.tokenizer import FILES, Vocabulary

TEMPLATES = {
    # The prompt of S4-style instruction tuning: question, blank line, "Assistant: ", then the answer and EOS.
    "human_assistant": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message.role == 'system' %}{{ message.content + '\\n\\n' }}"
        "{% elif message.role == 'user' %}{{ 'Human: ' + message.content + '\\n\\nAssistant: ' }}"
        "{% else %}{{ message.content + eos_token }}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endif %}"
        "{% endfor %}"
    ),
}


class Params(BaseModel):
    """`phases.PHASE.train_tokenizer`: a new vocabulary, or the base's."""

    model_config = ConfigDict(extra="forbid")

    mode: Literal["train", "reuse"] = Field(description="train: byte-level BPE on this phase; reuse: the base's own")
    vocab_size: int | None = Field(None, ge=257, le=2**20, description="train: entries, specials included")
    min_frequency: int = Field(2, ge=1, description="train: a pair is merged when it occurs at least so often")
    bos_token: str = Field("<s>", min_length=1, description="train: the token that begins each document")
    eos_token: str = Field("</s>", min_length=1, description="train: the token that ends each document")
    pad_token: str = Field("<pad>", min_length=1, description="train: the token that fills up the last block")
    chat_template: str | None = Field(None, description=f"one of {', '.join(TEMPLATES)}; null keeps the base's own")

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        specials = [self.bos_token, self.eos_token, self.pad_token]
        if self.mode == "train" and self.vocab_size is None:
            raise ValueError("mode train needs `vocab_size`, e.g. 8192")
        if self.mode == "train" and self.vocab_size is not None and self.vocab_size < 256 + len(set(specials)):
            raise ValueError(
                f"vocab_size {self.vocab_size} has no room for 256 bytes and {len(set(specials))} specials"
            )
        if self.mode == "reuse" and self.vocab_size is not None:
            raise ValueError("mode reuse takes the base's vocabulary: leave `vocab_size` out, or choose mode train")
        if self.chat_template is not None and self.chat_template not in TEMPLATES:
            raise ValueError(f"there is no chat_template `{self.chat_template}`; known: {', '.join(TEMPLATES)}")
        return self


def train(documents: Iterator[str], params: Params) -> Tokenizer:
    """Return a byte-level BPE trained on `documents`; the same documents in any order give the same tokenizer."""
    assert params.vocab_size is not None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    specials = list(dict.fromkeys([params.bos_token, params.eos_token, params.pad_token]))
    trainer = trainers.BpeTrainer(
        vocab_size=params.vocab_size,
        min_frequency=params.min_frequency,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    # Only callers of the finished model rely on it: a plain prompt then begins as the training documents did.
    bos = params.bos_token
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def config(params: Params) -> dict[str, Any]:
    """Return tokenizer_config.json for a trained tokenizer, as `AutoTokenizer` reads it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": params.bos_token,
        "eos_token": params.eos_token,
        "pad_token": params.pad_token,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def train_documents(clean: Path, dedup: Path, sources: list[str]) -> Iterator[str]:
    """Yield the texts of the train split; of a conversation, what each side says."""
    for source in sources:
        documents = arrow.batches(clean / source / "documents")
        splits = iter(arrow.table(dedup / source, ["split"])["split"].to_pylist())
        for batch in documents:
            column = "text" if "text" in batch.schema.names else "messages"
            for content in batch.column(column).to_pylist():
                if next(splits) != "train":
                    continue
                yield from [content] if column == "text" else (message["content"] for message in content)


def main(phase: str) -> None:
    params = read_params(f"phases.{phase}.train_tokenizer", Params)
    base = read_params(f"phases.{phase}", Phase).base
    clean, dedup = Path("data/clean", phase), Path("data/dedup", phase)
    with stage.run("train_tokenizer", phase, [str(clean), str(dedup), base], [f"models/tokenizers/{phase}"]) as run:
        (folder,) = run.outputs
        if params.mode == "reuse":
            if not (Path(base) / "tokenizer.json").is_file():
                raise SystemExit(
                    f"{base} has no tokenizer.json to reuse; set phases.{phase}.train_tokenizer.mode to train."
                )
            for name in FILES:
                if (Path(base) / name).is_file():
                    shutil.copyfile(Path(base) / name, folder / name)
        else:
            tokenizer = train(train_documents(clean, dedup, phase_sources(phase, clean)), params)
            tokenizer.save(str(folder / "tokenizer.json"))
            arrow.write_json(folder / "tokenizer_config.json", config(params))
        if params.chat_template:
            (folder / "chat_template.jinja").write_text(TEMPLATES[params.chat_template], encoding="utf-8")
        size = Vocabulary(folder).size
        if params.mode == "train" and params.vocab_size and size < params.vocab_size:
            print(f"{run.name}: the text gave {size:,} entries only, of {params.vocab_size:,} asked for")
        run.count(vocabulary=size)


if __name__ == "__main__":
    stage.cli(main, __doc__)
