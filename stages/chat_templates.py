"""Chat templates by name: how a conversation becomes text, which special tokens that takes, which one ends a turn.

    special_tokens("chatml")                   ->  ["<|im_start|>", "<|im_end|>"]
    end_of_turn("chatml", "</s>")              ->  "<|im_end|>"
    end_of_turn("human_assistant", "</s>")     ->  "</s>"

Every template takes the roles system, user, assistant and tool, in any order and number, prints each content as it is,
and ends an answer with a special token, which becomes the tokenizer's `eos_token`: what ends an answer is what a model
stops at, as in the instruct models of Llama 3 and Qwen. One answer, rendered (* the token that ends it):

    human_assistant   Human: 2+2?\\n\\nAssistant: 4</s>*
    default           ### User:\\n2+2?\\n\\n### Assistant:\\n4</s>*
    chatml, qwen      <|im_start|>user\\n2+2?<|im_end|>\\n<|im_start|>assistant\\n4<|im_end|>*\\n
    llama3            <|start_header_id|>user<|end_header_id|>\\n\\n2+2?<|eot_id|>...<|end_header_id|>\\n\\n4<|eot_id|>*

human_assistant, default and llama3 begin with the BOS that the tokenizer names. qwen differs from chatml in what a tool
says: it stands in a turn of the user, between <tool_response> and </tool_response>.
"""

from __future__ import annotations

import json
from pathlib import Path

from kit import arrow
from kit.base import read_settings
from kit.tokenizer import Vocabulary

_EACH = "{% for message in messages %}"
_CHATML_TURN = "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
_CHATML_END = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

TEMPLATES = {
    # The prompt of S4-style instruction tuning: question, blank line, "Assistant: ", then the answer and EOS.
    "human_assistant": (
        "{{ bos_token }}" + _EACH + "{% if message.role == 'system' %}{{ message.content + '\\n\\n' }}"
        "{% elif message.role == 'assistant' %}{{ 'Assistant: ' + message.content + eos_token }}"
        "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
        "{% else %}{{ {'user': 'Human', 'tool': 'Tool'}[message.role] + ': ' + message.content + '\\n\\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
    ),
    # For base models: needs no token that a plain tokenizer lacks.
    "default": (
        "{{ bos_token }}" + _EACH + "{{ '### ' + message.role | capitalize + ':\\n' + message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% if message.role != 'assistant' or not loop.last %}{{ '\\n\\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
    ),
    "chatml": _EACH + _CHATML_TURN + _CHATML_END,
    "qwen": (
        _EACH + "{% if message.role == 'tool' %}"
        "{% if loop.first or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
        "{{ '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}"
        "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
        "{% else %}" + _CHATML_TURN + "{% endif %}" + _CHATML_END
    ),
    "llama3": (
        "{{ bos_token }}" + _EACH + "{{ '<|start_header_id|>' + {'tool': 'ipython'}.get(message.role, message.role)"
        " + '<|end_header_id|>\\n\\n' + message.content + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
}
_SPECIAL = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "qwen": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}


def special_tokens(name: str | None) -> list[str]:
    """Return the special tokens that a template prints by their text; the last one ends a turn."""
    return list(_SPECIAL.get(name or "", []))


def end_of_turn(name: str | None, eos_token: str) -> str:
    """Return the token that ends an answer: the template's own, or the tokenizer's `eos_token`."""
    return [eos_token, *special_tokens(name)][-1]


def install(folder: Path, name: str) -> None:
    """Write a template into a tokenizer folder, and make the token that ends its turns the folder's `eos_token`.

    Its tokens become special, where the tokenizer has them as others. Raises ValueError when it lacks one.
    """
    added = Vocabulary(folder).tokenizer.get_added_tokens_decoder().values()
    missing = [token for token in special_tokens(name) if token not in {one.content for one in added}]
    if missing:
        fitting = [other for other in TEMPLATES if not special_tokens(other)]
        raise ValueError(
            f"chat_template {name} needs the special tokens {' and '.join(missing)}, which the tokenizer lacks; choose "
            f"{' or '.join(fitting)}, which need none, or train_tokenizer.mode extend, which adds them."
        )
    if any(one.content in special_tokens(name) and not one.special for one in added):
        make_special(folder, special_tokens(name))
    (folder / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    # The base's own template goes: of two, programs disagree which one counts.
    settings(folder, chat_template=None, **({"eos_token": end_of_turn(name, "")} if special_tokens(name) else {}))


def make_special(folder: Path, texts: list[str]) -> None:
    """Let tokens of a tokenizer folder be special ones: no text makes them."""
    path, settings_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    tokenizer_settings = arrow.read_json(settings_path)
    listed = tokenizer_settings.get("added_tokens_decoder") or {}  # `transformers` reads both
    for token in [*content["added_tokens"], *listed.values()]:
        token["special"] = token.get("special", False) or token["content"] in texts
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    if listed:
        arrow.write_json(settings_path, tokenizer_settings)


def settings(folder: Path, **changes: str | None) -> None:
    """Change what the settings of a tokenizer folder say; None takes a key out."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        before = read_settings(folder / name) if (folder / name).is_file() else {}
        after = {key: value for key, value in {**before, **changes}.items() if key not in changes or value is not None}
        if before and after != before:
            arrow.write_json(folder / name, after)
