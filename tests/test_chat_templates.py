"""chat_templates: each template prints every role, is what transformers prints, and stops where the model must stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

import tiny
from add_bos_eos import MARKED
from chat_segments import ROLES, Marker, chat_template, end_of_answer, only_in_prompt, turn_tokens
from chat_templates import TEMPLATES, end_of_turn, install, settings, special_tokens
from conftest import Runner, write
from kit import arrow
from kit.model import load_model
from kit.tokenizer import Vocabulary
from merge_lora import stop_at
from tokenize_text import Encoder
from train_tokenizer import unknown_stop

Messages = list[dict[str, str]]
CONVERSATION: Messages = [
    {"role": role, "content": content}
    for role, content in (
        ("system", "Be brief."),
        ("user", "2+2?"),
        ("assistant", "call(2+2)"),
        ("tool", "4"),
        ("tool", "four"),
        ("assistant", "4!"),
        ("user", "Sure?"),
        ("assistant", "Yes."),
    )
]
# What the formats are: ChatML (OpenAI, 2023), Qwen 2.5's tool turns in it, Llama 3.1's headers and its role for tools.
PRINTED = {
    "human_assistant": (
        "<s>Be brief.\n\nHuman: 2+2?\n\nAssistant: call(2+2)</s>\n\nTool: 4\n\nTool: four\n\nAssistant: 4!</s>\n\n"
        "Human: Sure?\n\nAssistant: Yes.</s>"
    ),
    "default": (
        "<s>### System:\nBe brief.\n\n### User:\n2+2?\n\n### Assistant:\ncall(2+2)</s>\n\n### Tool:\n4\n\n"
        "### Tool:\nfour\n\n### Assistant:\n4!</s>\n\n### User:\nSure?\n\n### Assistant:\nYes.</s>"
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\ncall(2+2)<|im_end|>\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>tool\nfour<|im_end|>\n"
        "<|im_start|>assistant\n4!<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    ),
    "qwen": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\ncall(2+2)<|im_end|>\n<|im_start|>user\n<tool_response>\n4\n</tool_response>\n"
        "<tool_response>\nfour\n</tool_response><|im_end|>\n<|im_start|>assistant\n4!<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\ncall(2+2)<|eot_id|>"
        "<|start_header_id|>ipython<|end_header_id|>\n\n4<|eot_id|>"
        "<|start_header_id|>ipython<|end_header_id|>\n\nfour<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n4!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
    ),
}
ENDS = {
    "human_assistant": "</s>",
    "default": "</s>",
    "chatml": "<|im_end|>",
    "qwen": "<|im_end|>",
    "llama3": "<|eot_id|>",
}
LOOKALIKES = ["</s>", "<s>", "<tool_response>", "\ue0000\ue001", "{{ eos_token }}", "Human: ", "\n", " "]
TRICKS = [*special_tokens("chatml"), *special_tokens("llama3"), *LOOKALIKES]
TRICKY = st.lists(st.sampled_from(TRICKS) | st.text(max_size=3), min_size=1).map("".join).filter(bool)
ANY_TURNS = st.lists(st.tuples(st.sampled_from(ROLES), TRICKY), min_size=1, max_size=7)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each template a tokenizer that was trained for it."""
    return {name: tiny.tokenizer(tmp_path_factory.mktemp(name) / "t", name) for name in TEMPLATES}


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path]) -> dict[str, tuple[Marker, Encoder, Any]]:
    return {
        name: (Marker(folder), Encoder(folder), AutoTokenizer.from_pretrained(folder))
        for name, folder in folders.items()
    }


def test_the_table_of_the_docstring() -> None:
    assert special_tokens("chatml") == ["<|im_start|>", "<|im_end|>"]
    assert special_tokens("default") == special_tokens(None) == []
    assert {name: end_of_turn(name, "</s>") for name in TEMPLATES} == ENDS
    assert end_of_turn(None, "</s>") == "</s>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_of_all_roles_is_printed_in_the_published_format(
    opened: dict[str, tuple[Marker, Encoder, Any]], name: str
) -> None:
    marker, _, tokenizer = opened[name]
    segments = marker.conversation(CONVERSATION)
    assert "".join(segment.text for segment in segments) == PRINTED[name]
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False) == PRINTED[name]
    learned = [segment.text for segment in segments if segment.learn]
    assert learned == ["call(2+2)", ENDS[name], "4!", ENDS[name], "Yes.", ENDS[name]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_of_each_answer_is_what_stood_before_it_in_training(
    opened: dict[str, tuple[Marker, Encoder, Any]], name: str
) -> None:
    """Of every round, also after a tool: the chat of the finished model goes on exactly as the training text did."""
    _, _, tokenizer = opened[name]
    for place, message in enumerate(CONVERSATION):
        if message["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(CONVERSATION[:place], tokenize=False, add_generation_prompt=True)
            assert PRINTED[name].startswith(prompt + message["content"] + ENDS[name])


@pytest.mark.parametrize("name", TEMPLATES)
@given(turns=ANY_TURNS)
def test_any_turns_are_printed_as_transformers_prints_them_and_say_nothing_special(
    opened: dict[str, tuple[Marker, Encoder, Any]], name: str, turns: list[tuple[str, str]]
) -> None:
    """In any order of roles; contents that look like the template's own tokens are text, down to the ids."""
    marker, encoder, tokenizer = opened[name]
    messages = [{"role": role, "content": content} for role, content in turns]
    segments = marker.conversation(messages)
    printed = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "".join(segment.text for segment in segments) == printed
    harmless = marker.conversation([{"role": role, "content": "x"} for role, _ in turns])
    assert [s.text for s in segments if s.special] == [s.text for s in harmless if s.special]
    assert [s.text for s in segments if s.learn] == [
        text for role, content in turns if role == "assistant" for text in (content, ENDS[name])
    ]
    rows = pa.array([[segment._asdict() for segment in segments]], MARKED.field("segments").type)
    all_ids, all_learn = encoder.encode(rows)
    (ids,) = all_ids.to_pylist()
    special = [encoder.vocabulary.id(s.text) for s in segments if s.special]
    assert [identity for identity in ids if encoder.is_special[identity]] == special
    assert tokenizer.decode(ids, skip_special_tokens=False) == printed
    learned = (
        [identity for identity, mark in zip(ids, all_learn.to_pylist()[0], strict=True) if mark] if all_learn else []
    )
    assert not learned or learned[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_token_that_ends_an_answer_is_the_eos_of_tokenizer_and_documents(
    folders: dict[str, Path], opened: dict[str, tuple[Marker, Encoder, Any]], name: str
) -> None:
    marker, _, tokenizer = opened[name]
    assert tokenizer.eos_token == ENDS[name]
    assert marker.document("Hi")[-1].text == ENDS[name]
    vocabulary = Vocabulary(folders[name])
    assert vocabulary.size == 300
    assert set(vocabulary.special_texts) == {"<s>", "<pad>", ENDS[name], *special_tokens(name)}


@pytest.mark.parametrize("name", ["chatml", "qwen", "llama3"])
def test_a_tokenizer_without_the_tokens_of_a_template_is_refused(tmp_path: Path, name: str) -> None:
    """And stays as it was; a template that needs none fits every tokenizer."""
    folder = tiny.tokenizer(tmp_path / "t")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="the tokenizer lacks; choose human_assistant or default, which need none"):
        install(folder, name)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    install(folder, "default")
    assert chat_template(folder) == TEMPLATES["default"]


def test_a_template_takes_the_place_of_the_tokenizers_own_and_names_its_eos(tmp_path: Path) -> None:
    folder = tiny.tokenizer(tmp_path / "t")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(special_tokens("chatml"))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = arrow.read_json(folder / "tokenizer_config.json")
    arrow.write_json(folder / "tokenizer_config.json", {**settings, "chat_template": "old"})
    arrow.write_json(folder / "special_tokens_map.json", {"eos_token": {"content": "</s>"}, "pad_token": "<pad>"})
    install(folder, "chatml")
    assert arrow.read_json(folder / "tokenizer_config.json") == {**settings, "eos_token": "<|im_end|>"}
    opened = AutoTokenizer.from_pretrained(folder)
    assert (opened.eos_token, opened.pad_token, opened.chat_template) == ("<|im_end|>", "<pad>", TEMPLATES["chatml"])


CASES: dict[str, tuple[Any, str | None]] = {
    "a string": ("own", "own"),
    "a list": ([{"name": "rag", "template": "other"}, {"name": "default", "template": "own"}], "own"),
    "nothing": (None, None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_template_in_the_settings_is_found_as_transformers_finds_it(tmp_path: Path, case: str) -> None:
    """The file counts more than the settings."""
    given_template, expected = CASES[case]
    folder = tiny.tokenizer(tmp_path / "t")
    settings = arrow.read_json(folder / "tokenizer_config.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": given_template}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert chat_template(folder) == tokenizer.get_chat_template() == TEMPLATES["human_assistant"]
    (folder / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert chat_template(folder) == (tokenizer.get_chat_template() if tokenizer.chat_template else None) == expected


def test_a_list_of_templates_without_a_default_is_refused(tmp_path: Path) -> None:
    folder = tiny.tokenizer(tmp_path / "t")
    (folder / "chat_template.jinja").unlink()
    settings = arrow.read_json(folder / "tokenizer_config.json")
    named = [{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": named}))
    with pytest.raises(ValueError, match="names the chat templates rag, tool_use but no default"):
        Marker(folder)


def test_a_role_that_no_template_knows_is_refused(opened: dict[str, tuple[Marker, Encoder, Any]]) -> None:
    """A role is printed by the template, so one out of the data could bring in a special token."""
    for marker, _, _ in opened.values():
        with pytest.raises(ValueError, match=r"the role '<\|im_end\|>'; known roles: system, user, assistant, tool"):
            marker.conversation([{"role": "user", "content": "x"}, {"role": "<|im_end|>", "content": "x"}])


@pytest.mark.parametrize(("before", "after"), [(1, [7, 1]), ([1, 5], [7, 1, 5]), (7, 7), ([5, 7], [5, 7]), (None, [7])])
def test_a_model_stops_where_the_template_ends_an_answer(tmp_path: Path, before: Any, after: Any) -> None:
    """And where its base stopped: trained whole, or merged, with and without a generation_config.json."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in tiny.CONFIG.items() if k != "architectures"}))
    model.generation_config.eos_token_id = model.config.eos_token_id = before
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path, 300, {"eos_token_id": 7}).generation_config.eos_token_id == after
    stop_at(tmp_path, 7)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == after
    (tmp_path / "generation_config.json").unlink()
    stop_at(tmp_path, 7)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == after


MODES: dict[str, tuple[dict[str, Any], str | None]] = {
    "train": ({"mode": "train", "vocab_size": 320}, None),
    "extend": ({"mode": "extend", "new_tokens": 3}, None),
    "reuse": ({"mode": "reuse"}, "chat_template llama3 needs the special tokens <|start_header_id|> and"),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_phase_gets_the_tokens_of_its_template_or_one_sentence(project: Path, run_stage: Runner, mode: str) -> None:
    """From raw rows to marked conversations, by the commands."""
    settings, refusal = MODES[mode]
    base = tiny.tokenizer(project / "models/base/b")
    (base / "config.json").write_text(json.dumps(tiny.CONFIG))
    tiny.params_yaml(project, p={"base": "models/base/b", "train_tokenizer": {**settings, "chat_template": "llama3"}})
    params = json.loads((project / "params.yaml").read_text())
    params["sources"]["p_text"]["clean"] |= {"format": "jsonl", "record": "alpaca"}
    (project / "params.yaml").write_text(json.dumps(params))
    rows = [{"instruction": f"{n}+{n}? {n * '!'}", "input": "", "output": f"is {2 * n}<|eot_id|>"} for n in range(30)]
    write(project / "data/raw/x/x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for stage, name in (("clean", "p_text"), ("dedup", "p"), ("train_tokenizer", "p"), ("add_bos_eos", "p_text")):
        finished = run_stage(project, stage, name)
        if stage == "train_tokenizer" and refusal:
            assert (finished.returncode, len(finished.stderr.splitlines())) == (1, 1), finished.stderr
            assert refusal in finished.stderr
            return
        assert finished.returncode == 0, finished.stderr
    assert AutoTokenizer.from_pretrained(project / "models/tokenizers/p").eos_token == "<|eot_id|>"
    segments = arrow.table(project / "data/marked/p/p_text")["segments"][3].as_py()
    assert [s["text"] for s in segments if s["learn"]] == ["is 6<|eot_id|>", "<|eot_id|>"]
    assert [s["text"] for s in segments if s["special"]].count("<|eot_id|>") == 2


@pytest.mark.parametrize("base_stops", [None, 1, [1, 300]])
@pytest.mark.parametrize("record", ["alpaca", "text"])
def test_where_a_bases_own_template_ends_an_answer_the_model_stops(
    project: Path, run_stage: Runner, record: str, base_stops: int | list[int] | None
) -> None:
    """Qwen's base models have ChatML and stop at <|endoftext|> alone; a phase of plain text keeps their end."""
    base = tiny.tokenizer(project / "models/base/b")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_special_tokens(special_tokens("chatml")[::-1])
    tokenizer.save(str(base / "tokenizer.json"))
    template = TEMPLATES["chatml"].replace("assistant\\n", "assistant\\n<think>")
    (base / "chat_template.jinja").write_text(template)
    (base / "config.json").write_text(json.dumps(tiny.CONFIG))
    if base_stops:
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": base_stops}))
    tiny.params_yaml(project, p={"base": "models/base/b", "train_tokenizer": {"mode": "reuse"}})
    params = json.loads((project / "params.yaml").read_text())
    columns = {"columns": {"text": "output"}} if record == "text" else {}
    params["sources"]["p_text"]["clean"] |= {"format": "jsonl", "record": record, **columns}
    (project / "params.yaml").write_text(json.dumps(params))
    rows = [{"instruction": f"{n}+{n}? {n * '!'}", "input": "", "output": f"is {2 * n} by all"} for n in range(30)]
    write(project / "data/raw/x/x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for stage, name in (("clean", "p_text"), ("dedup", "p"), ("train_tokenizer", "p"), ("add_bos_eos", "p_text")):
        finished = run_stage(project, stage, name)
        assert finished.returncode == 0, finished.stderr
        assert ('asks for an answer with "<think>"' in finished.stdout) == (
            stage == "train_tokenizer" and record != "text"
        )
    folder, new = project / "models/tokenizers/p", record == "alpaca" and base_stops != [1, 300]
    assert AutoTokenizer.from_pretrained(folder).eos_token == ("<|im_end|>" if new else "</s>")
    assert AutoTokenizer.from_pretrained(folder).chat_template == template
    stops = {Vocabulary(folder).special_ids["eos_token_id"], *(base_stops if isinstance(base_stops, list) else [])}
    segments = arrow.table(project / "data/marked/p/p_text")["segments"][3].as_py()
    assert Vocabulary(folder).id([s["text"] for s in segments if s["learn"]][-1]) in stops


@pytest.mark.parametrize("file", ["generation_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["version https://git-lfs.github.com/spec/v1", "[1]"])
def test_settings_of_a_base_that_are_no_object_are_named(tmp_path: Path, file: str, content: str) -> None:
    folder, base = tiny.tokenizer(tmp_path / "t", "chatml"), tmp_path / "b"
    settings(folder, eos_token="</s>")
    base.mkdir()
    for each in (folder, base):
        (each / file).write_text(content)
    with pytest.raises(SystemExit, match=f"/{file} holds no JSON object .*; fetch the file again"):
        unknown_stop(folder, base)
        settings(folder, eos_token="<|im_end|>")


def test_a_tokenizer_without_a_special_token_ends_no_answer(tmp_path: Path) -> None:
    folder = tiny.tokenizer(tmp_path / "t")
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, "added_tokens": []}))
    assert end_of_answer(folder) is None
    with pytest.raises(ValueError, match="does not end an answer"):
        Marker(folder).conversation(CONVERSATION[1:3])
    with pytest.raises(ValueError, match=r"tokenizer\.json names no special token"):
        Encoder(folder)


PROMPTS = {
    "as chatml": ("", '{{ "<|im_start|>assistant\\n" }}', ""),
    "less than there": ("<think>", '{{ "<|im_start|>assistant\\n" }}', ""),
    "none": ("", "", ""),
    "more, as DeepSeek-R1": ("", '{{ "<|im_start|>assistant\\n<think>" }}', "<think>"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_a_prompt_that_no_conversation_holds_is_found(tmp_path: Path, case: str) -> None:
    """Of a base's own template: what asks for an answer there is not what stood before it in training."""
    before, prompt, found = PROMPTS[case]
    folder = tiny.tokenizer(tmp_path / "t", "chatml")
    turn = "{{ '<|im_start|>' + message.role + '\n' + ('" + before + "' if message.role == 'assistant' else '') }}"
    turn += "{{ message.content + '<|im_end|>\n' }}"
    template = "{% for message in messages %}" + turn + "{% endfor %}{% if add_generation_prompt %}" + prompt
    (folder / "chat_template.jinja").write_text(template + "{% endif %}")
    assert only_in_prompt(folder) == found
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert only_in_prompt(folder) == ""


# As DeepSeek-V3's <｜User｜>; a thought's tags, line breaks (Gemma) and what no turn has stay what they are.
MARKERS = ["<｜User｜>", "<｜Assistant｜>"]
OTHERS = ["<think>", "</think>", "\n\n", "<tool_call>"]
MARKED_TURNS = (
    "{% for message in messages %}{{ {'user': '<｜User｜>', 'assistant': '<｜Assistant｜><think>\n</think>\n\n'}"
    "[message.role] + message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


def with_plain_tokens(folder: Path) -> Path:
    """Return a tokenizer folder whose template marks turns with tokens that are no special ones."""
    tiny.tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKERS + OTHERS])
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {str(n): {"content": t.content, "special": t.special} for n, t in _added(tokenizer).items()}
    settings = arrow.read_json(folder / "tokenizer_config.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "added_tokens_decoder": added}))
    (folder / "chat_template.jinja").write_text(MARKED_TURNS)
    return folder


def _added(tokenizer: Tokenizer) -> dict[int, AddedToken]:
    found: dict[int, AddedToken] = tokenizer.get_added_tokens_decoder()
    return found


def test_tokens_that_mark_turns_and_are_not_special_are_found(tmp_path: Path) -> None:
    folder = with_plain_tokens(tmp_path / "t")
    assert turn_tokens(folder) == MARKERS
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert turn_tokens(folder) == []
    (folder / "chat_template.jinja").unlink()
    assert turn_tokens(folder) == []


def test_tokens_of_a_named_template_become_special(tmp_path: Path) -> None:
    """As of those who added <|im_start|> to a base as an ordinary token; all else stays as it is."""
    folder = with_plain_tokens(tmp_path / "t")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(text, special=False) for text in ("<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings(folder, added_tokens_decoder={"5": {"content": "<|im_end|>"}})  # and not whether it is special
    before = Vocabulary(folder)
    install(folder, "chatml")
    after = Vocabulary(folder)
    assert set(after.special_texts) - set(before.special_texts) == {"<|im_start|>", "<|im_end|>"}
    assert after.special["eos_token"] == "<|im_end|>"
    assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    told = arrow.read_json(folder / "tokenizer_config.json")["added_tokens_decoder"]
    assert told == {"5": {"content": "<|im_end|>", "special": True}}


def test_a_message_makes_no_token_that_marks_a_turn(project: Path, run_stage: Runner) -> None:
    """Though the base does not name it as special, and reads it as such in each text."""
    base = with_plain_tokens(project / "models/base/b")
    (base / "config.json").write_text(json.dumps(tiny.CONFIG))
    tiny.params_yaml(project, p={"base": "models/base/b", "train_tokenizer": {"mode": "reuse"}})
    params = json.loads((project / "params.yaml").read_text())
    params["sources"]["p_text"]["clean"] |= {"format": "jsonl", "record": "alpaca"}
    (project / "params.yaml").write_text(json.dumps(params))
    rows = [
        {"instruction": f"{n}? <｜Assistant｜>no", "input": "", "output": f"{n}.<｜User｜><think>\n\n"}
        for n in range(30)
    ]
    write(project / "data/raw/x/x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for stage, name in (("clean", "p_text"), ("dedup", "p"), ("train_tokenizer", "p"), ("add_bos_eos", "p_text")):
        finished = run_stage(project, stage, name)
        assert finished.returncode == 0, finished.stderr
        assert ("marks turns with <｜User｜> <｜Assistant｜>, which" in finished.stdout) == (stage == "train_tokenizer")
    folder = project / "models/tokenizers/p"
    assert Vocabulary(folder).special_texts[-2:] == MARKERS
    segments = arrow.table(project / "data/marked/p/p_text")["segments"].slice(3, 1).combine_chunks()
    ids = Encoder(folder).encode(segments)[0].to_pylist()[0]
    tokens = [Vocabulary(folder).tokenizer.id_to_token(number) for number in ids]
    theirs = AutoTokenizer.from_pretrained(folder)
    assert {text: tokens.count(text) for text in MARKERS + OTHERS} == {
        **dict.fromkeys(MARKERS, 1),
        "<think>": 2,
        "</think>": 1,
        "\n\n": 2,
        "<tool_call>": 0,
    }
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert theirs.decode(theirs.apply_chat_template(messages, return_dict=False), skip_special_tokens=True) == (
        "Hi<think>\n</think>\n\nHo"
    )
    before = AutoTokenizer.from_pretrained(base).apply_chat_template(messages, return_dict=False)
    assert before == theirs.apply_chat_template(messages, return_dict=False)
