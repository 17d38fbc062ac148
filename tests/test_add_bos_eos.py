"""add_bos_eos: what is special and what is learned is decided by the template, never by what the messages say."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

import add_bos_eos
import tiny
from add_bos_eos import MARKED, segments_of_messages
from chat_segments import Marker, Segment, end_of_answer, merged
from chat_templates import TEMPLATES
from clean import MESSAGES
from conftest import Runner, with_other_content, write
from kit import arrow, stage
from tokenize_text import Encoder

BOS, EOS = Segment("<s>", True, False), Segment("</s>", True, True)
Messages = list[dict[str, str]]
# What a message could say to break out of it: special tokens, the stand-ins of the code, template syntax, the prompt.
TRICKS = [
    "</s>",
    "<s>",
    "<pad>",
    "\ue0000\ue001",
    "\ue0001\ue001",
    "\ue000",
    "{{ eos_token }}",
    "{% endfor %}",
    "Human: ",
    "4",
    "\n\n",
    " ",
]
TRICKY = st.lists(st.sampled_from(TRICKS) | st.text(max_size=3), min_size=1).map("".join).filter(bool)
CHATML = (
    "{% for message in messages %}{{ '<s>' + message.role + '\n' + message.content + '</s>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def turns(*contents: str) -> Messages:
    """Return a conversation that the user begins."""
    return [{"role": ("user", "assistant")[place % 2], "content": content} for place, content in enumerate(contents)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer") / "t")


@pytest.fixture(scope="module")
def marker(folder: Path) -> Marker:
    return Marker(folder)


def with_template(folder: Path, template: str, **settings: str | None) -> Marker:
    """Return a marker for the same tokenizer with another template."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = arrow.read_json(folder / "tokenizer_config.json")
    arrow.write_json(folder / "tokenizer_config.json", {**config, **settings})
    return Marker(folder)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A tokenizer folder to be edited."""
    return tiny.tokenizer(tmp_path / "t")


def test_the_worked_example_of_the_docstring(marker: Marker) -> None:
    assert marker.document("Hi</s>") == [Segment("<s>", True, True), Segment("Hi</s>", False, True), EOS]
    assert marker.conversation(turns("2+2?", "4")) == [
        BOS,
        Segment("Human: 2+2?\n\nAssistant: ", False, False),
        Segment("4", False, True),
        EOS,
    ]


def test_a_document_begins_with_no_bos_when_the_tokenizer_has_none(own: Path) -> None:
    assert with_template(own, "", bos_token=None).document("Hi") == [Segment("Hi", False, True), EOS]


@given(texts=st.lists(TRICKY | st.just(""), max_size=5), bos=st.sampled_from(["<s>", None]))
def test_documents_at_once_are_the_documents_one_by_one(folder: Path, texts: list[str], bos: str | None) -> None:
    marker = Marker(folder)
    marker.bos = bos
    found = add_bos_eos.segments_of_texts(marker, pa.array(texts, pa.string()))
    assert found.type == add_bos_eos.MARKED.field("segments").type
    assert found.to_pylist() == [[segment._asdict() for segment in marker.document(text)] for text in texts]


def test_a_template_prints_nothing_for_a_token_that_the_tokenizer_lacks(own: Path) -> None:
    """Not the word None: Qwen's tokenizers have no BOS."""
    marker = with_template(own, TEMPLATES["human_assistant"], bos_token=None)
    assert marker.conversation(turns("2+2?", "4"))[0].text == "Human: 2+2?\n\nAssistant: "


@pytest.mark.parametrize("role", ["unk_token", "sep_token", "cls_token", "mask_token"])
def test_a_template_prints_each_token_that_the_settings_name(own: Path, role: str) -> None:
    """As `transformers` prints it: not those alone that begin, end or fill up documents."""
    template = EACH + "{{ message.content + eos_token + " + role + " }}{% endfor %}"
    marker = with_template(own, template, **{role: "<pad>"})
    assert "".join(segment.text for segment in marker.conversation(turns("2+2?", "4"))) == "2+2?</s><pad>4</s><pad>"
    theirs = AutoTokenizer.from_pretrained(own).apply_chat_template(turns("2+2?", "4"), tokenize=False)
    assert theirs == "2+2?</s><pad>4</s><pad>"


def test_of_several_rounds_each_answer_and_its_eos_are_learned_and_nothing_else(marker: Marker) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *turns("1", "one", "2", "two")]
    assert marker.conversation(messages) == [
        BOS,
        Segment("Be brief.\n\nHuman: 1\n\nAssistant: ", False, False),
        Segment("one", False, True),
        EOS,
        Segment("\n\nHuman: 2\n\nAssistant: ", False, False),
        Segment("two", False, True),
        EOS,
    ]


def test_an_answer_that_is_not_to_be_learned_is_read_and_not_learned(marker: Marker) -> None:
    wrong, right = turns("1", "two"), turns("No.", "one")
    assert marker.conversation([wrong[0], {**wrong[1], "learn": False}, right[0], {**right[1], "learn": None}]) == [
        BOS,
        Segment("Human: 1\n\nAssistant: two", False, False),
        Segment("</s>", True, False),
        Segment("\n\nHuman: No.\n\nAssistant: ", False, False),
        Segment("one", False, True),
        EOS,
    ]


def test_of_a_template_with_marked_roles_an_answer_is_learned_up_to_its_end_only(own: Path) -> None:
    """Not the line break that follows, nor the special token that begins the next round."""
    assert with_template(own, CHATML).conversation(turns("1", "one", "2")) == [
        BOS,
        Segment("user\n1", False, False),
        Segment("</s>", True, False),
        Segment("\n", False, False),
        BOS,
        Segment("assistant\n", False, False),
        Segment("one", False, True),
        EOS,
        Segment("\n", False, False),
        BOS,
        Segment("user\n2", False, False),
        Segment("</s>", True, False),
        Segment("\n", False, False),
    ]


def test_of_two_special_tokens_that_begin_alike_the_longer_is_meant(own: Path) -> None:
    """As `tokenizers` reads them."""
    tokenizer = Tokenizer.from_file(str(own / "tokenizer.json"))
    tokenizer.add_special_tokens(["</s>2"])
    tokenizer.save(str(own / "tokenizer.json"))
    marker = with_template(own, "{% for message in messages %}{{ message.content + '</s>2' }}{% endfor %}")
    first, second = Segment("</s>2", True, False), Segment("</s>2", True, True)
    assert marker.conversation(turns("1", "one"))[1:] == [first, Segment("one", False, True), second]
    assert [tokenizer.encode(segment.text).tokens[1:] for segment in (first, second)] == [["</s>2"]] * 2


@given(st.lists(TRICKY, min_size=2, max_size=6).filter(lambda contents: len(contents) % 2 == 0))
def test_no_content_changes_what_is_special_or_learned(marker: Marker, contents: list[str]) -> None:
    """The marks are those of harmless contents; the contents stand in the segments as they are."""
    harmless = marker.conversation(turns(*(f"{place}" for place in range(len(contents)))))
    found = marker.conversation(turns(*contents))
    assert [segment[1:] for segment in found] == [segment[1:] for segment in harmless]
    assert [segment.text for segment in found if segment.learn and not segment.special] == contents[1::2]
    assert [segment.text for segment in found if segment.special] == ["<s>", *["</s>"] * (len(contents) // 2)]
    asked = "\n\nHuman: ".join(f"{question}\n\nAssistant: " for question in contents[::2])
    assert "".join(s.text for s in found if not s.special and not s.learn) == f"Human: {asked}"


@given(st.lists(st.builds(Segment, st.text(max_size=2), st.just(False), st.booleans()), max_size=8))
def test_merging_keeps_text_and_marks(segments: list[Segment]) -> None:
    """Character by character; and no two neighbours are left that could be one."""
    result = merged(segments)
    assert [(c, s.learn) for s in result for c in s.text] == [(c, s.learn) for s in segments for c in s.text]
    assert all(left.learn != right.learn for left, right in itertools.pairwise(result))
    assert all(segment.text for segment in result)


EACH = "{% for message in messages %}"
END = "{{ eos_token }}{% endfor %}"
REFUSED = {
    "drops the system turn": (EACH + "{% if not loop.first %}{{ message.content }}{% endif %}" + END, "leaves out"),
    "repeats": (EACH + "{{ message.content + message.content }}" + END, "repeats"),
    "reorders": ("{% for message in messages|reverse %}{{ message.content }}" + END, "reorders"),
    "trims": (EACH + "{{ message.content | trim }}" + END, "against `trim`, {rule: whitespace, strip: true}"),
    "follows the content": (
        EACH + "{% if '4' in message.content %}!{% endif %}{{ message.content }}" + END,
        "changes what message 2 \\(assistant\\) says; clean it before",
    ),
    "has no end": (EACH + "{{ message.content + '\n' }}{% endfor %}", "does not end an answer with a special token"),
    "ends the answer later": (EACH + "{{ message.content + '\n' }}" + END, "does not end an answer"),
    "raises": ("{{ raise_exception('roles must alternate') }}", "refuses a conversation: roles must alternate"),
    "fails in an expression": (EACH + "{{ message.content + 1 }}" + END, "refuses a conversation: can only concat"),
    "asks for today's date": ("{{ strftime_now('%d') }}", "refuses a conversation: 'strftime_now' is undefined"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_allows_no_exact_mask_is_refused(own: Path, case: str) -> None:
    template, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence) as refusal:
        with_template(own, template).conversation(turns(" 2+2?\n", "4 "))
    assert "; " in str(refusal.value)  # and what to do


def test_what_a_template_changes_is_named(own: Path) -> None:
    """Llama 3.1 prints what a tool gives as JSON: with quotes in it, that is another text."""
    said = "{{ message.content | tojson if message.role == 'tool' else message.content }}"
    marker = with_template(own, EACH + "{{ '<s>' + message.role + ':' }}" + said + END)
    call, words = turns("1?", "one")
    plain, quoted = ({"role": "tool", "content": content} for content in ("1", 'a "b"'))
    with pytest.raises(
        ValueError, match=r"changes what message 3 \(tool\) says; take .* by {rule: turns, tool: false}"
    ):
        marker.conversation([call, words, quoted, words])
    with pytest.raises(ValueError, match=r"changes what message 1 \(user\) says; clean it before"):
        with_template(own, EACH + "{{ message.content | trim }}{{ '<s>' }}" + "{% endfor %}").conversation(
            turns("1 ", "2")
        )
    assert marker.conversation([call, words, plain, words])


def test_a_template_that_can_do_without_todays_date_prints_its_own(own: Path) -> None:
    """As that of Llama 3.2: the same rows give the same tokens on another day."""
    date = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}26 Jul 2024{% endif %}"
    marker = with_template(own, date + CHATML)
    assert marker.conversation(turns("1", "one"))[0].text == "26 Jul 2024"


def test_the_conversation_that_a_template_does_not_suit_is_named(own: Path) -> None:
    marker = with_template(own, REFUSED[next(iter(REFUSED))][0])
    messages = pa.array([turns(" 2+2?\n", "4 ")], MESSAGES)
    with pytest.raises(ValueError, match=rf"document {'ab' * 16} \(' 2\+2\?\\n'\): the chat template"):
        segments_of_messages(marker, messages, pa.array([b"\xab" * 16], pa.binary(16)))


def test_a_template_that_cannot_be_parsed_is_refused_with_its_file(own: Path) -> None:
    with pytest.raises(ValueError, match=r"the chat template of .*/t cannot be rendered here: unexpected"):
        with_template(own, "{% for message in messages %}{{")


def test_a_template_may_mark_what_the_assistant_says(own: Path) -> None:
    """As that of SmolLM3 does, and as transformers renders it."""
    turn = "{{ '<s>' + message.role + ':' }}{% generation %}{{ message.content + eos_token }}{% endgeneration %}\n"
    marker = with_template(own, "{% for message in messages %}" + turn + "{% endfor %}")
    said = turns("2+2?", "4")
    theirs = AutoTokenizer.from_pretrained(own).apply_chat_template(said, tokenize=False)
    assert "".join(segment.text for segment in marker.conversation(said)) == theirs
    assert [segment.text for segment in marker.conversation(said) if segment.learn] == ["4", "</s>"]


def test_a_list_of_templates_without_names_is_refused(own: Path) -> None:
    (own / "chat_template.jinja").unlink()
    config = arrow.read_json(own / "tokenizer_config.json")
    arrow.write_json(own / "tokenizer_config.json", {**config, "chat_template": [{"name": "default"}]})
    with pytest.raises(ValueError, match="not of objects with `name` and `template`"):
        Marker(own)


def test_a_missing_template_is_refused_with_what_to_set(own: Path) -> None:
    (own / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"has no chat template.*set chat_template in the phase's train_tokenizer"):
        Marker(own).conversation(turns("a", "b"))


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{% if tools is not none %}TOOLS{% endif %}" + CHATML,  # `tools` is None, not undefined
        EACH + "{{ message.content }}{{ eos_token }}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
        "  {% if true %}\n" + EACH + "\n  {{ message.content }}{{ eos_token }}\n  {% endfor %}\n{% endif %}\n",
        "{{ {'法': ['<b>']} | tojson(indent=1) }}" + CHATML,  # Jinja's own would escape both
    ],
)
def test_templates_are_rendered_as_transformers_renders_them(own: Path, template: str) -> None:
    """With its line break rules, its loop controls and its arguments."""
    messages = turns("1 {{ 2 }}", "one", "\n3 ", "three")
    segments = with_template(own, template).conversation(messages)
    expected = AutoTokenizer.from_pretrained(own).apply_chat_template(messages, tokenize=False)
    assert "".join(segment.text for segment in segments) == expected


@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True)])
def test_white_space_that_a_special_token_takes_is_left_out(own: Path, sides: tuple[bool, bool]) -> None:
    """As the tokenizer of the finished model does (those of Phi 3 and 4); but none of what the messages say."""
    tokenizer = Tokenizer.from_file(str(own / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<end>", lstrip=sides[0], rstrip=sides[1], normalized=False)])
    tokenizer.save(str(own / "tokenizer.json"))
    marker = with_template(own, EACH + "{{ '\u3000\n<end> \n' + message.content + '<end> \x1f<end>' }}{% endfor %}")
    messages = turns("the quick", "brown fox")
    segments = [segment._asdict() for segment in marker.conversation(messages)]
    ids, _ = Encoder(own).encode(pa.array([segments], MARKED.field("segments").type))
    assert ids.to_pylist()[0] == AutoTokenizer.from_pretrained(own).apply_chat_template(messages, return_dict=False)
    with pytest.raises(ValueError, match=r"<end> takes white space from the message beside it; .*strip: true"):
        marker.conversation(turns("\tthe quick ", "brown"))


@pytest.mark.parametrize("template", [TEMPLATES["human_assistant"], CHATML])
@pytest.mark.parametrize("question", ["2+2?", "the quick brown fox\n", "法律 第一条？ \U0001f30a", " jumps over  "])
def test_the_prompt_has_the_ids_that_it_has_when_the_model_is_used(own: Path, template: str, question: str) -> None:
    """`apply_chat_template(add_generation_prompt=True)` gives the ids that stand before the first learned one."""
    marker = with_template(own, template)
    segments = [segment._asdict() for segment in marker.conversation(turns(question, "4"))]
    ids, learn = Encoder(own).encode(pa.array([segments], MARKED.field("segments").type))
    tokenizer = AutoTokenizer.from_pretrained(own)
    prompt = tokenizer.apply_chat_template(turns(question), add_generation_prompt=True, return_dict=False)
    assert learn
    assert ids.to_pylist()[0][: learn.to_pylist()[0].index(True)] == prompt


# What stands before an answer, and what of it the prompt has: "ASSISTANT:" as Vicuna; nothing as Mistral; a header that
# no prompt prints; the empty thought of Qwen3; a token of Command R7B; the <think> of QwQ.
LEADS = {
    "a space": ("ASSISTANT: ", "{{ 'ASSISTANT:' }}", ["user: 1ASSISTANT:", " quick", "</s>"]),
    "a space and no prompt": (" ", "", ["user: 1", " quick", "</s>"]),
    "a name and no prompt": ("ASSISTANT: ", "", ["user: 1ASSISTANT: ", "quick", "</s>"]),
    "another prompt": ("ASSISTANT: ", "{{ 'BOT: ' }}", ["user: 1ASSISTANT: ", "quick", "</s>"]),
    "a thought": ("A\n<think>\n\n</think>\n\n", "{{ 'A\n' }}", ["user: 1A\n", "<think>\n\n</think>\n\nquick", "</s>"]),
    "a token": ("A<pad>", "A", ["user: 1A", "<pad>", "quick", "</s>"]),
}


@pytest.mark.parametrize("case", LEADS)
def test_what_stands_before_an_answer_and_not_in_its_prompt_is_learned(own: Path, case: str) -> None:
    """So the answer has the ids that it has behind the prompt, and the model is taught to write its first space."""
    before, prompt, expected = LEADS[case]
    template = (
        "{% for message in messages %}{% if message.role == 'assistant' %}{{ " + repr(before) + " }}{% else %}"
        "{{ message.role + ': ' }}{% endif %}{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )
    marker = with_template(own, template)
    segments = marker.conversation(turns("1", "quick"))
    assert [segment.text for segment in segments] == expected
    assert [segment.learn for segment in segments] == [False, *[True] * (len(expected) - 1)]
    again = marker.conversation(turns("1", "quick", "1", "quick"))
    assert again == [*segments, *segments]
    unlearned = marker.conversation([turns("1")[0], {**turns("1", "quick")[1], "learn": False}])
    assert not any(segment.learn for segment in unlearned)
    tokenizer = AutoTokenizer.from_pretrained(own)
    whole = tokenizer.apply_chat_template(turns("1", "quick"), return_dict=False)
    ids, _ = Encoder(own).encode(pa.array([[segment._asdict() for segment in segments]], MARKED.field("segments").type))
    assert (ids.to_pylist()[0] == whole) == (case not in ("a name and no prompt", "another prompt"))


def test_what_of_a_thought_stands_in_the_prompt_is_not_learned(own: Path) -> None:
    """As QwQ asks for an answer."""
    template = CHATML.replace("'<s>assistant\n' }}{% endif", "'<s>assistant\n<think>\n' }}{% endif")
    found = with_template(own, template).conversation(turns("2+2?", "<think>\n2\n</think>\n\n4"))
    assert found[-4:-1] == [
        Segment("assistant\n<think>\n", False, False),
        Segment("2\n</think>\n\n4", False, True),
        EOS,
    ]


def test_an_answer_ends_with_all_special_tokens_up_to_eos(own: Path) -> None:
    """As <|END_RESPONSE|><|END_OF_TURN_TOKEN|> of Command R7B; where no EOS follows at once, with the first."""
    each = "{% for message in messages %}{{ message.content }}"
    found = with_template(own, each + "{{ '<pad></s><s>' }}{% endfor %}").conversation(turns("1", "one", "2"))
    assert [segment.text for segment in found if segment.learn] == ["one", "<pad>", "</s>"]
    found = with_template(own, each + "{{ '<pad><s>\n</s>' }}{% endfor %}").conversation(turns("1", "one", "2"))
    assert [segment.text for segment in found if segment.learn] == ["one", "<pad>"]


# Meta's own, as tokenizer_config.json has it, without the system turn.
LLAMA_2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + "
    "message['content'].strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + "
    "message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def test_a_space_between_an_answer_and_eos_is_learned(own: Path) -> None:
    """As Llama 2 has it: the model has to write it before it stops. Not where another token follows it."""
    marker = with_template(own, LLAMA_2)
    messages = turns("2+2?", "the quick", "Sure?", "fox")
    prompt = [BOS, Segment("[INST] 2+2? [/INST]", False, False)]
    again = [BOS, Segment("[INST] Sure? [/INST]", False, False)]
    segments = marker.conversation(messages)
    assert segments == [
        *prompt,
        Segment(" the quick ", False, True),
        EOS,
        *again,
        Segment(" fox ", False, True),
        EOS,
    ]
    ids, _ = Encoder(own).encode(pa.array([[s._asdict() for s in segments]], MARKED.field("segments").type))
    assert ids.to_pylist()[0] == AutoTokenizer.from_pretrained(own).apply_chat_template(messages, return_dict=False)
    unlearned = marker.conversation([messages[0], {**messages[1], "learn": False}])
    assert not any(segment.learn for segment in unlearned)
    assert end_of_answer(own) == "</s>"
    with pytest.raises(ValueError, match="does not end an answer"):
        with_template(own, LLAMA_2.replace("eos_token", "bos_token")).conversation(messages)


def test_the_command_leaves_out_what_is_dropped_and_refuses_decisions_about_other_documents(
    project: Path, run_stage: Runner
) -> None:
    """The text "two" stands in the source twice; then the documents change and dedup is not run again."""
    tiny.params_yaml(project, p={"base": "models/configs/llama_small"})
    settings = json.loads((project / "params.yaml").read_text())
    settings["sources"]["p_text"]["clean"]["sample_by"] = "line"
    (project / "params.yaml").write_text(json.dumps(settings))
    write(project / "data/raw/x/a.txt", "one\ntwo\ntwo\nthree\n")
    tiny.tokenizer(project / "models/tokenizers/p")
    for script, name in (("clean", "p_text"), ("dedup", "p"), ("add_bos_eos", "p_text")):
        finished = run_stage(project, script, name)
        assert finished.returncode == 0, finished.stderr
    marked = arrow.table(project / "data/marked/p/p_text").to_pylist()
    assert ["".join(s["text"] for s in row["segments"]) for row in marked] == [
        f"<s>{text}</s>" for text in ("one", "two", "three")
    ]
    assert {row["split"] for row in marked} == {"train", "eval"}
    characters = len("onetwothree") + 3 * len("<s></s>")
    counts = {"rows": 3, "characters": characters, "segments_not_learned": 0}
    assert arrow.manifest(project / "data/marked/p/p_text")["counts"] == counts

    write(project / "data/raw/x/a.txt", "one\ntwo\ntwo\nfour\n")
    assert run_stage(project, "clean", "p_text").returncode == 0
    finished = run_stage(project, "add_bos_eos", "p_text")
    assert (finished.returncode, len(finished.stderr.splitlines())) == (1, 1), finished.stderr
    assert "data/dedup/p/p_text decides about other documents than data/clean/p/p_text" in finished.stderr
    assert arrow.table(project / "data/marked/p/p_text").to_pylist() == marked


def chat_project(project: Path, contents: list[tuple[str, str]]) -> None:
    """Write a chat source and what clean and dedup leave for it: (split, answer) for each document."""
    tiny.params_yaml(project, p={"base": "models/configs/llama_small"})
    if not (project / "models/tokenizers/p").exists():
        tiny.tokenizer(project / "models/tokenizers/p")
    identities = pa.array([hashlib.sha256(answer.encode()).digest()[:16] for _, answer in contents], pa.binary(16))
    messages = pa.array([turns("why?", answer) for _, answer in contents], MESSAGES)
    splits = pa.array([split for split, _ in contents])
    rows = pa.table({"doc_id": identities, "messages": messages})
    with arrow.Shards(project / "data/clean/p/p_text/documents", rows.schema) as out:
        for shard in shards_of(contents):
            out.add(arrow.encode(rows.take(pa.array(shard, pa.int64())), rows.schema), len(shard))
    rows = pa.table({"doc_id": identities, "split": splits})
    with arrow.Writer(project / "data/dedup/p/p_text", rows.schema) as out:
        out.write(rows)


def shards_of(contents: list[tuple[str, str]]) -> list[list[int]]:
    """Return the rows of each shard: an answer that begins with a number below 3,000 is in that of its hundred."""
    numbers = [int(answer.split()[0]) // 100 if answer[0].isdigit() else 7 for _, answer in contents]
    return [
        [row for row, number in enumerate(numbers) if number == shard] for shard in range(max(numbers, default=0) + 1)
    ]


def result(project: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (project / "data/marked/p/p_text").iterdir()}


def remembered(project: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (project / ".memo/add_bos_eos@p_text").iterdir()}


# As Qwen3's and DeepSeek-R1's own templates: a thought stays where it answers the last question, or nowhere.
ANSWER = "{% set said = message.content %}{% if '</think>' in said %}{% set thought = said.split('</think>')[0]"
ANSWER += ".split('<think>')[-1].strip('\n') %}{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
KEPT = EACH + ANSWER + "{{ '<s>' + message.role + '\n' }}{% if loop.last %}{{ '<think>\n' + (thought or '') + "
KEPT += "'\n</think>\n\n' }}{% endif %}{{ said + '</s>' }}{% endfor %}"
LEFT_OUT = EACH + ANSWER + "{{ '<s>' + message.role + '\n' + said + '</s>' }}{% endfor %}"


def test_a_thought_is_learned_with_the_answer_behind_it(own: Path) -> None:
    """Though the template takes it out of the content and puts it back."""
    thought = "<think>\n2 and </s> 2\n</think>\n\n4"
    marker = with_template(own, KEPT)
    assert marker.conversation(turns("2+2?", thought))[-3:] == [
        Segment("assistant\n", False, False),
        Segment(thought, False, True),
        EOS,
    ]
    # Without a thought the template prints an empty one, which is its own text.
    assert marker.conversation(turns("2+2?", "4"))[-3:] == [
        Segment("assistant\n<think>\n\n</think>\n\n", False, False),
        Segment("4", False, True),
        EOS,
    ]
    with pytest.raises(ValueError, match=r"the thought of message 2 as it stands there; .*reasoning_content: null"):
        marker.conversation(turns("2+2?", thought, "3+3?", "6"))
    with pytest.raises(ValueError, match="the thought of message 2 as it stands there"):
        with_template(own, LEFT_OUT).conversation(turns("2+2?", thought))
    with pytest.raises(ValueError, match="a thought is <think>, line break, thought"):
        marker.conversation(turns("2+2?", "<think>2 and 2</think>4"))


def test_what_is_learned_is_remembered_with_the_words(project: Path, run_stage: Runner) -> None:
    """The doc_id is that of the words alone, so an answer that is no longer to be learned keeps it."""
    contents = [("train", "4"), ("eval", "5")]
    chat_project(project, contents)
    assert run_stage(project, "add_bos_eos", "p_text").returncode == 0
    before = result(project)
    # Of each document BOS and the question; then also the answer, which is one segment with it, and EOS.
    assert arrow.manifest(project / "data/marked/p/p_text")["counts"]["segments_not_learned"] == 4
    folder = project / "data/clean/p/p_text/documents"
    rows = arrow.table(folder).to_pylist()
    rows[0]["messages"][1]["learn"] = False
    schema = arrow.table(folder).schema
    shutil.rmtree(folder)
    with arrow.Writer(folder, schema) as out:
        out.write(pa.Table.from_pylist(rows, schema))
    assert run_stage(project, "add_bos_eos", "p_text").returncode == 0
    assert result(project) != before
    (segments, _) = arrow.table(project / "data/marked/p/p_text")["segments"].to_pylist()
    assert not any(segment["learn"] for segment in segments)
    assert arrow.manifest(project / "data/marked/p/p_text")["counts"]["segments_not_learned"] == 5


@pytest.mark.parametrize("documents", [0, 10])
def test_each_document_is_accounted_for(project: Path, monkeypatch: pytest.MonkeyPatch, documents: int) -> None:
    """A source without documents gives no rows; where one is lost on the way, nothing is published."""
    chat_project(project, MANY[:documents])
    monkeypatch.chdir(project)
    monkeypatch.setenv("TERROIR_WORKERS", "1")
    real = add_bos_eos.marked
    monkeypatch.setattr(add_bos_eos, "marked", lambda marker, batch: real(marker, batch)[1:])
    if documents:
        with pytest.raises(ValueError, match=r"10 documents were read but 6 kept \+ 3 dropped came out"):
            add_bos_eos.main("p_text")
        assert not (project / "data/marked/p/p_text").exists()
    else:
        add_bos_eos.main("p_text")
        counts = {"rows": 0, "characters": 0, "segments_not_learned": 0}
        assert arrow.manifest(project / "data/marked/p/p_text")["counts"] == counts


MANY = [(("train", "eval", "dropped")[number % 3], f"{number} " * 800) for number in range(3000)]


@pytest.mark.parametrize("batch_rows", [1, 100, 257, 1024])
def test_what_is_made_of_a_shard_does_not_depend_on_where_its_batches_end(
    tmp_path: Path, folder: Path, batch_rows: int
) -> None:
    answers = [f"{number} yes" for number in range(1000)]
    identities = pa.array([hashlib.sha256(answer.encode()).digest()[:16] for answer in answers], pa.binary(16))
    rows = pa.table({"doc_id": identities, "messages": pa.array([turns("why?", a) for a in answers], MESSAGES)})
    splits = np.array([0, 1, 2, 0] * 250, np.uint8)
    found = []
    for name, size in (("a", 256), ("b", batch_rows)):
        path = tmp_path / name
        path.write_bytes(arrow.encode(rows, rows.schema, size))
        guard = stage.guard(path, "")
        found.append(add_bos_eos.mark_shard(add_bos_eos.Work(path, guard, splits, folder, "")))
    assert found[0] == found[1]
    assert found[0].notes["rows"] == pa.ipc.open_stream(dict(found[0].parts)["marked"]).read_all().num_rows == 750


@pytest.mark.parametrize("what", ["documents", "tokenizer"])
def test_what_was_read_while_it_changed_does_not_come_back(
    project: Path, run_stage: Runner, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Nothing is published; when the old input is back, so is what was made of it."""
    chat_project(project, MANY[:300])
    assert run_stage(project, "add_bos_eos", "p_text").returncode == 0
    whole = result(project)
    shutil.rmtree(project / ".memo")
    monkeypatch.chdir(project)
    monkeypatch.setenv("TERROIR_WORKERS", "1")
    add_bos_eos._marker.cache_clear()
    shards = sorted((project / "data/clean/p/p_text/documents").glob("*.arrow"))
    template = project / "models/tokenizers/p/chat_template.jinja"
    victim, other, name = {
        "documents": (shards[0], shards[1].read_bytes(), "mark_shard"),
        "tokenizer": (template, TEMPLATES["default"].encode(), "Marker"),
    }[what]
    with monkeypatch.context() as patch:
        patch.setattr(add_bos_eos, name, with_other_content(victim, other, getattr(add_bos_eos, name)))
        with pytest.raises(SystemExit, match="changed while the stage ran; nothing was published"):
            add_bos_eos.main("p_text")
    add_bos_eos._marker.cache_clear()
    add_bos_eos.main("p_text")
    assert result(project) == whole


def test_of_many_conversations_one_new_costs_its_shard_and_gives_the_bytes_of_a_build_from_nothing(
    project: Path, run_stage: Runner
) -> None:
    """For 1, 2 and 5 workers; a decision that changes counts as new; a forged memory is not believed."""
    chat_project(project, MANY)
    assert run_stage(project, "add_bos_eos", "p_text", TERROIR_WORKERS="2").returncode == 0
    first, first_shards = result(project), remembered(project)
    assert len(first_shards) == 30 + 1  # and their index
    assert arrow.manifest(project / "data/marked/p/p_text")["counts"]["rows"] == 2000

    changed = [*MANY[:700], ("train", "new"), *MANY[700:]]
    changed[2000] = ({"train": "eval"}.get(changed[2000][0], "train"), changed[2000][1])
    chat_project(project, changed)
    assert run_stage(project, "add_bos_eos", "p_text", TERROIR_WORKERS="1").returncode == 0
    second, second_shards = result(project), remembered(project)
    assert len(second_shards.items() & first_shards.items()) == 28
    assert sum(second[name] == first[name] for name in first if name.endswith(".arrow")) == 28
    assert second != first

    victim = project / ".memo/add_bos_eos@p_text" / min(second_shards)
    victim.write_bytes(victim.read_bytes().replace(b"Human", b"Robot"))
    assert run_stage(project, "add_bos_eos", "p_text", TERROIR_WORKERS="1").returncode == 0
    assert result(project) == second
    assert b"Robot" not in victim.read_bytes()

    shutil.rmtree(project / ".memo")
    assert run_stage(project, "add_bos_eos", "p_text", TERROIR_WORKERS="5").returncode == 0
    assert result(project) == second

    tokenizer = project / "models/tokenizers/p/chat_template.jinja"
    tokenizer.write_text(TEMPLATES["default"])
    assert run_stage(project, "add_bos_eos", "p_text").returncode == 0
    assert remembered(project).keys() & second_shards.keys() == {"index.jsonl"}
    assert "### Assistant" in str(arrow.table(project / "data/marked/p/p_text")[0:1].to_pylist())
