"""A tokenizer folder, read without transformers: the tokenizer and the special tokens that its settings name.

vocabulary = Vocabulary(Path("models/tokenizers/pretrain"))
vocabulary.special    ->  {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
vocabulary.id("<s>")  ->  0
BYTE_TO_UNICODE[0x20]  ->  "Ġ"     " the" is "Ġthe" in a byte-level vocabulary
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

OTHER_FORMS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")  # not read here
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
ROLES = ("bos_token", "eos_token", "pad_token")
# The character that stands for each byte in a byte-level vocabulary (GPT-2's bytes_to_unicode): itself where it is
# printable in Latin-1, else the next one from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_TO_UNICODE = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(_OTHERS)}
UNICODE_TO_BYTE = {character: byte for byte, character in BYTE_TO_UNICODE.items()}


def size(tokenizer: Tokenizer) -> int:
    """Return the number of ids, from 0 to the last one; a vocabulary with gaps has fewer entries."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


class Vocabulary:
    """What tokenizer.json and tokenizer_config.json say.

    Raises SystemExit when a file is missing or no eos_token is named: no document would have an end; ValueError when a
    special token is named by no text.
    """

    def __init__(self, folder: Path) -> None:
        for name in FILES[:2]:
            if not (folder / name).is_file():
                other = next((form for form in OTHER_FORMS if (folder / form).is_file()), None)
                raise SystemExit(
                    f"{folder} has no {name} but a {other}; open it with transformers' AutoTokenizer, and write it "
                    "there with save_pretrained."
                    if other
                    else f"{folder} has no {name}; `train_tokenizer` writes it (mode: train makes a new one)."
                )
        self.folder = folder
        try:
            self._settings = dict(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")))
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            if getattr(self.tokenizer.model, "dropout", None):  # it would cut the same text otherwise each time
                self.tokenizer.model.dropout = None
            self.tokenizer.no_truncation()  # what is counted, learned or judged is the whole text and no more
            self.tokenizer.no_padding()
        except Exception as error:  # `tokenizers` raises a bare Exception
            raise SystemExit(
                f"{folder} holds no tokenizer that can be read ({error}); fetch the files again (a Git LFS pointer is "
                "not the file), or set train_tokenizer.mode to train."
            ) from None
        self.size = size(self.tokenizer)
        added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
        self.special = {role: text for role in ROLES if (text := self.named(role))}
        self.special_texts = [token["content"] for token in added if token["special"]]
        if "eos_token" not in self.special:
            raise SystemExit(
                f"{folder}/tokenizer_config.json names no eos_token, so no document would have an end; name one there, "
                "or set train_tokenizer.mode to train."
            )

    def named(self, role: str) -> str | None:
        """Return the text of the token that tokenizer_config.json names as e.g. `mask_token`; None for none.

        Raises ValueError when what stands there is no text.
        """
        token = self._settings.get(role)
        text = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(text, str):
            raise ValueError(
                f"{self.folder}/tokenizer_config.json: {role} is {json.dumps(token, ensure_ascii=False)}; write the "
                "token there as a string or as an object with the string as `content`, or null for none."
            )
        return text or None

    def id(self, token: str) -> int:
        """Return the id of a token. Raises ValueError when there is none."""
        identity = self.tokenizer.token_to_id(token)
        if identity is None:
            raise ValueError(f"{self.folder} has no token {token!r}, though its settings or chat template name it.")
        return int(identity)

    @property
    def special_ids(self) -> dict[str, int]:
        """The ids under the names of a model's config.json: bos_token_id, eos_token_id, pad_token_id."""
        return {f"{role}_id": self.id(token) for role, token in self.special.items()}
