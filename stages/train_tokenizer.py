"""Make the tokenizer of a phase: train one on its documents, extend the one of its base, or take that as it is.

Reads:  data/clean/PHASE and data/dedup/PHASE (to learn, the train split alone), the phase's `base` folder
Writes: models/tokenizers/PHASE            tokenizer.json, tokenizer_config.json, chat_template.jinja
        metrics/tokenizers/PHASE/tokenizer.json   how well it fits each source
Params: phases.PHASE.train_tokenizer

`mode: train` gives a byte-level BPE: any text comes back from its ids byte for byte, no unknown token is needed.
`mode: extend` goes on with the training of the base's byte-level BPE: its ids and its merges stay, new ones follow, and
train_model gives each new token the mean of the embeddings of what the base made of it.
`mode: reuse` copies the base's tokenizer. `chat_template` names a template of stages/chat_templates.py, or is
left out to keep the base's own; it travels with the model, so chatting and training see the same text. Where there are
conversations and the own one ends answers with a token at which the base does not stop (Qwen's base models), that
becomes the eos_token. Tokens with which it marks turns (<｜User｜> of DeepSeek-V3) become special: no message has
one.

Example: two documents "aaaa aaaa", vocabulary 263, specials <s> </s> <pad>

    ids 0-2 the specials, 3-258 the bytes, 259 "aa", 260 "aaaa", ...; "aaaa" -> [260]

A text that does not come back from its ids fails the stage; a base may mean it so (lower case, NFKC, a space put before
it), so where it has such a thing, and for `reuse`, the number is reported.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from tokenizers import AddedToken, Tokenizer, decoders, processors

import bpe_training
from chat_segments import end_of_answer, only_in_prompt, turn_tokens
from chat_templates import TEMPLATES, end_of_turn, install, make_special, settings, special_tokens
from kit import arrow, stage
from kit.base import has_weights, read_settings
from kit.params import Phase, phase_sources, read_params
from kit.tokenizer import FILES, Vocabulary
from tokenizer_report import Report, drawn


class Reference(BaseModel):
    """A tokenizer to compare with. It is no dependency that DVC knows, so its digest is part of the parameters."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(min_length=1, description="folder with a tokenizer.json, e.g. models/base/NAME")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of that tokenizer.json")


class Params(BaseModel):
    """`phases.PHASE.train_tokenizer`: a new vocabulary, the base's with more entries, or the base's."""

    model_config = ConfigDict(extra="forbid")

    mode: Literal["train", "extend", "reuse"] = Field(
        description="train: byte-level BPE on this phase; extend: `new_tokens` more than the base's; reuse: the base's"
    )
    vocab_size: int | None = Field(None, ge=257, le=2**20, description="train: entries, specials included")
    new_tokens: int | None = Field(None, ge=1, le=2**20, description="extend: entries added to the base's")
    min_frequency: int = Field(2, ge=1, description="train, extend: a pair is merged when it occurs at least so often")
    pre_tokenizer: Literal["byte_level", "llama3", "o200k"] = Field(
        "byte_level",
        description="train: how text is cut into words, which no merge crosses. byte_level: GPT-2's; llama3, o200k: "
        "published with these models, digits in threes, 18 % more bytes per token on Chinese laws",
    )
    sample_bytes: int | None = Field(
        100_000_000, ge=1, description="train, extend: UTF-8 bytes of text to learn from, drawn by content; null: all"
    )
    bos_token: str = Field("<s>", min_length=1, description="train: the token that begins each document")
    eos_token: str = Field("</s>", min_length=1, description="train: the token that ends each document")
    pad_token: str = Field("<pad>", min_length=1, description="train: the token that fills up the last block")
    unk_token: str | None = Field(None, min_length=1, description="train: named for models that expect one; never used")
    mask_token: str | None = Field(
        None, min_length=1, description="train: what a masked model sees in place of a token"
    )
    special_tokens: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="train: more tokens that no text makes, in the order of their ids; those above follow"
    )
    chat_template: str | None = Field(None, description=f"one of {', '.join(TEMPLATES)}; null keeps the base's own")
    report_bytes: int | None = Field(
        8_000_000, ge=1, description="UTF-8 bytes of each source that the report reads, drawn by content; null: all"
    )
    report_reference: Reference | None = Field(None, description="a tokenizer to compare with; extend: the base's")

    @property
    def specials(self) -> list[str]:
        """The special tokens of a trained tokenizer in the order of their ids."""
        # Where the chat template ends a turn by a token of its own, that is the EOS.
        eos = end_of_turn(self.chat_template, self.eos_token)
        roles = [self.bos_token, eos, self.pad_token, self.unk_token, self.mask_token]
        return list(dict.fromkeys([*self.special_tokens, *filter(None, roles), *special_tokens(self.chat_template)]))

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        size, specials = self.vocab_size, self.specials
        if self.mode == "train" and size is None:
            raise ValueError("mode train needs `vocab_size`, e.g. 8192")
        if self.mode == "train" and size is not None and size < 256 + len(specials):
            raise ValueError(f"vocab_size {size} has no room for 256 bytes and {len(specials)} specials")
        if self.mode != "train" and size is not None:
            raise ValueError(
                f"mode {self.mode} takes the base's vocabulary: leave `vocab_size` out, or choose mode train"
            )
        if self.mode == "extend" and self.new_tokens is None:
            raise ValueError("mode extend needs `new_tokens`, the number of entries to add to the base's, e.g. 1000")
        if self.mode != "extend" and self.new_tokens is not None:
            raise ValueError(f"`new_tokens` is for mode extend; mode {self.mode} adds none")
        if self.mask_token and self.mask_token in (self.bos_token, self.eos_token, self.pad_token, self.unk_token):
            raise ValueError(f"mask_token {self.mask_token} has another use already; name one of its own")
        made = {"bos_token", "eos_token", "pad_token", "unk_token", "mask_token", "special_tokens", "pre_tokenizer"}
        if self.mode != "train" and (given := sorted(made & self.model_fields_set)):
            raise ValueError(f"mode {self.mode} takes {', '.join(given)} from the base: leave it out")
        if self.chat_template is not None and self.chat_template not in TEMPLATES:
            raise ValueError(f"there is no chat_template `{self.chat_template}`; known: {', '.join(TEMPLATES)}")
        end = end_of_turn(self.chat_template, self.eos_token)
        if "eos_token" in self.model_fields_set and end != self.eos_token:
            raise ValueError(f"chat_template {self.chat_template} ends documents with {end}: leave `eos_token` out")
        return self


def train(documents: Iterable[str], params: Params) -> Tokenizer:
    """Return a byte-level BPE trained on `documents`; the same documents in any order give the same tokenizer."""
    assert params.vocab_size is not None
    # A mask stands in place of a word with the space before it, so that space is part of it.
    specials = [AddedToken(t, lstrip=t == params.mask_token, special=True, normalized=False) for t in params.specials]
    words = bpe_training.count_words(documents, params.pre_tokenizer)
    tokenizer = bpe_training.train(words, params.vocab_size, params.min_frequency, specials)
    tokenizer.pre_tokenizer = bpe_training.pre_tokenizer(params.pre_tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    # Only callers of the finished model rely on it: a plain prompt then begins as the training documents did.
    bos = params.bos_token
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def config(params: Params) -> dict[str, Any]:
    """Return tokenizer_config.json for a trained tokenizer, as `AutoTokenizer` reads it."""
    optional = {"unk_token": params.unk_token, "mask_token": params.mask_token}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": params.bos_token,
        "eos_token": end_of_turn(params.chat_template, params.eos_token),
        "pad_token": params.pad_token,
        **{role: token for role, token in optional.items() if token},
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def reference(params: Params, base: Path) -> Tokenizer | None:
    """Return the tokenizer that the report compares with. Raises SystemExit when it is not the one of the digest."""
    if params.report_reference:
        path = Path(params.report_reference.path, "tokenizer.json")
        if not path.is_file():
            raise SystemExit(f"{path}, the report_reference, is not there; put it there or leave the key out.")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != params.report_reference.sha256:
            raise SystemExit(
                f"{path} is not the report_reference of params.yaml; if this one is meant, set its sha256 to {digest}."
            )
        return Tokenizer.from_file(str(path))
    return Vocabulary(base).tokenizer if params.mode == "extend" else None


def without_dropout(path: Path) -> bool:
    """Take dropout out of a tokenizer.json, where it has any: the same text would have other ids each time."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not content["model"].get("dropout"):
        return False
    content["model"]["dropout"] = None
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    return True


def unknown_stop(folder: Path, base: Path) -> str | None:
    """Return the token that ends an answer in the folder's chat template; None where the base stops at it already."""
    end, vocabulary = end_of_answer(folder), Vocabulary(folder)
    if end is None or end == vocabulary.special["eos_token"]:
        return None
    path = next((base / name for name in ("generation_config.json", "config.json") if (base / name).is_file()), None)
    stops = read_settings(path).get("eos_token_id") if path else None
    return None if vocabulary.id(end) in (stops if isinstance(stops, list) else [stops]) else end


def keeps_all(tokenizer: Tokenizer) -> bool:
    """Return whether each text comes back from its ids: nothing changes it, stands before it or is stripped."""
    content = json.loads(tokenizer.to_str())
    stripped = any(token["lstrip"] or token["rstrip"] for token in content["added_tokens"])
    prefixed = '"add_prefix_space": true' in json.dumps(content["pre_tokenizer"])
    return not (content["normalizer"] or stripped or prefixed)


def main(phase: str) -> None:
    params = read_params(f"phases.{phase}.train_tokenizer", Params)
    base = Path(read_params(f"phases.{phase}", Phase).base)
    clean, dedup = Path("data/clean", phase), Path("data/dedup", phase)
    outputs = [f"models/tokenizers/{phase}", f"metrics/tokenizers/{phase}"]
    with stage.run("train_tokenizer", phase, [str(clean), str(dedup), str(base)], outputs) as run:
        folder, metrics = run.outputs
        about = base / "config.json"
        if params.mode == "train" and about.is_file() and arrow.read_json(about).get("model_type") == "qwen2":
            # transformers 5 takes the cuts and the NFC of Qwen 2 for such a model, whatever lies beside it.
            raise SystemExit(
                f"{base} is a qwen2, which transformers opens with Qwen 2's own way to cut words; take "
                f"a qwen3, or set phases.{phase}.train_tokenizer.mode to reuse."
            )
        if params.mode == "train" and has_weights(base):
            raise SystemExit(
                f"{base} has weights, which know the tokens of its own tokenizer and no new ones: set "
                f"phases.{phase}.train_tokenizer.mode to reuse or extend, or take a base of config.json alone."
            )
        sources = {name: (clean / name, dedup / name) for name in phase_sources(phase, clean)}
        learned = drawn(list(sources.values()), ("train",), params.sample_bytes)
        documents = (text for _, texts in learned for text in texts)
        entries = 0  # learned, with the special tokens and bytes of a new tokenizer
        if params.mode == "train":
            tokenizer = train(documents, params)
            tokenizer.save(str(folder / "tokenizer.json"))
            arrow.write_json(folder / "tokenizer_config.json", config(params))
            entries = tokenizer.get_vocab_size()
        else:
            Vocabulary(base)  # refuses what cannot be read, by its own name
            for name in FILES:
                if (base / name).is_file():
                    shutil.copyfile(base / name, folder / name)
            if without_dropout(folder / "tokenizer.json"):
                print(f"{run.name}: the dropout of the base's tokenizer is left out", flush=True)
        if params.new_tokens:
            extended, entries = bpe_training.extend(
                (folder / "tokenizer.json").read_text(encoding="utf-8"),
                documents,
                params.new_tokens,
                params.min_frequency,
                str(base),
            )
            # Plain text never makes them, so a template may bring its own.
            extended.add_special_tokens(special_tokens(params.chat_template))
            extended.save(str(folder / "tokenizer.json"))
        schemas = [arrow.manifest(documents / "documents")["schema"] for documents, _ in sources.values()]
        conversations = any("messages" in schema for schema in schemas)
        if params.chat_template:
            install(folder, params.chat_template)
        elif params.mode != "train" and conversations:
            if markers := turn_tokens(folder):
                print(
                    f"{run.name}: the base's chat template marks turns with {' '.join(markers)}, which the tokenizer "
                    "does not name as special; they become so, so that no message makes them"
                )
                make_special(folder, markers)
            if end := unknown_stop(folder, base):
                print(f"{run.name}: the base's chat template ends answers with {end}, so it becomes the eos_token")
                settings(folder, eos_token=end)
            if prompt := only_in_prompt(folder):
                print(
                    f"{run.name}: the base's chat template asks for an answer with {json.dumps(prompt)}, behind which "
                    "no answer without a thought stands in training; for such answers name a chat_template"
                )
        vocabulary = Vocabulary(folder)
        if entries < (asked := params.vocab_size or params.new_tokens or 0):
            print(f"{run.name}: the text gave {entries:,} entries only, of {asked:,} asked for")
        report = Report(vocabulary.tokenizer, reference(params, base))
        for name, (source_clean, source_dedup) in sources.items():
            report.read(name, drawn([(source_clean, source_dedup)], ("train", "eval"), params.report_bytes))
        result = report.result()
        if failures := result["round_trip_failures"]:
            what = f"{failures} texts do not come back from their ids, e.g. of document {', '.join(report.failures)}"
            if params.mode == "train" or (params.mode == "extend" and keeps_all(vocabulary.tokenizer)):
                raise ValueError(f"{what}; nothing was published (this is a bug).")
            print(f"{run.name}: {what}: the base's tokenizer is made so", flush=True)
        if number := result["texts_with_special_tokens"]:
            print(
                f"{run.name}: {number:,} texts hold the name of a special token, e.g. {report.special_in_text[0]}: it "
                "is learned as the text that it is, while the finished tokenizer reads the token",
                flush=True,
            )
        arrow.write_json(metrics / "tokenizer.json", result, only_ascii=True)
        run.count(vocabulary=vocabulary.size)


if __name__ == "__main__":
    stage.cli(main, __doc__)
