"""What of a document or conversation is special and what is learned: the part of add_bos_eos that renders.

marker = Marker(Path("models/tokenizers/chat"))
marker.document("Hi")                     ->  *+"<s>"  +"Hi"  *+"</s>"          (* special, + learn)
marker.conversation([user "2+2?", assistant "4"])
                                          ->  *"<s>"  "Human: 2+2?\\n\\nAssistant: "  +"4"  *+"</s>"
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kit import arrow
from kit.tokenizer import Vocabulary
from thoughts import BEGIN, THOUGHT, begins

ROLES = ("system", "user", "assistant", "tool")
ANOTHER = "set chat_template in the phase's train_tokenizer"
# What `tokenizers` takes for white space beside a token with lstrip or rstrip: Unicode's White_Space.
WHITE_SPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029"
)
WHITE_SPACE += "\u202f\u205f\u3000"
OTHER_TOKENS = ("unk_token", "sep_token", "cls_token", "mask_token")


class Segment(NamedTuple):
    """A piece of a document with its marks."""

    text: str
    special: bool
    learn: bool


class Marker:
    """Turns documents and conversations into segments, as one tokenizer folder says."""

    def __init__(self, tokenizer: Path) -> None:
        vocabulary = Vocabulary(tokenizer)
        self.folder = tokenizer
        # A template may print each token that the settings name, not those alone that documents need.
        others = {role: text for role in OTHER_TOKENS if (text := vocabulary.named(role))}
        self.special = {**vocabulary.special, **others}
        self.bos, self.eos = self.special.get("bos_token"), self.special["eos_token"]
        # The longest first: of two tokens that begin alike, the longer is meant.
        specials = sorted(vocabulary.special_texts, key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, specials)) or "(?!)")  # of none nothing
        added = vocabulary.tokenizer.get_added_tokens_decoder().values()
        self.not_special = [token.content for token in added if not token.special]
        strips = {token.content: (token.lstrip, token.rstrip) for token in added if token.special}
        self._strips = {text: sides for text, sides in strips.items() if any(sides)}  # of most tokenizers none
        self._skeletons: dict[tuple[tuple[str, bool], ...], tuple[list[str], list[int]]] = {}
        self._template = None
        if (template := chat_template(tokenizer)) is not None:
            from jinja2 import TemplateError, nodes  # 22 ms that a source of plain text does not wait for
            from jinja2.ext import Extension
            from jinja2.sandbox import ImmutableSandboxedEnvironment

            class Generation(Extension):
                """{% generation %} ... {% endgeneration %}, with which some templates mark answers; all are learned."""

                tags = {"generation"}  # noqa: RUF012

                def parse(self, parser: Any) -> Any:
                    line = next(parser.stream).lineno
                    return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

            # The options with which `transformers` renders a template; anything else moves line breaks. It has no
            # strftime_now, for the day is no input: Llama 3.2 then prints its own date, others refuse.
            extensions = ["jinja2.ext.loopcontrols", Generation]
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
            environment.filters["tojson"] = _to_json
            environment.globals["raise_exception"] = _refuse
            try:
                self._template = environment.from_string(template)
            except TemplateError as error:
                raise ValueError(f"the chat template of {tokenizer} cannot be rendered here: {error}.") from None

    def document(self, text: str) -> list[Segment]:
        """Return BOS, the text, EOS, all of it learned; no BOS when the tokenizer has none."""
        ends = [Segment(self.bos, True, True)] if self.bos else []
        return [*ends, Segment(text, False, True), Segment(self.eos, True, True)]

    def conversation(self, messages: list[dict[str, Any]]) -> list[Segment]:
        """Return the rendered conversation; what the assistant says, and the token that ends it, is learned.

        What the template puts before an answer, but not into the prompt that asks for one, the model has to write, so
        it is part of the answer: the space of "ASSISTANT: 4" behind a prompt that ends with "ASSISTANT:", the empty
        thought of Qwen3; so are spaces between an answer and EOS (Llama 2). Of messages whose `learn` is False nothing
        is learned. Each content is rendered as a stand-in and put back afterwards, so no content can change the
        template's course or be taken for a special token; of a thought before an answer the tags stay, for some
        templates look for them. Raises ValueError when the template does not use each content just once, in order and
        unchanged, or does not end an answer with a special token, or when a special token takes white space from a
        content.
        """
        # A template sees what it would see of a chat: not what is learned.
        shown = [{"role": message["role"], "content": message["content"]} for message in messages]
        shape = tuple((turn["role"], turn["role"] == "assistant" and begins(turn["content"])) for turn in shown)
        if shape not in self._skeletons:
            self._skeletons[shape] = self._skeleton(shape)
        own, leads = self._skeletons[shape]
        said = [message["content"] for message in messages]
        parts = [own[0], *(part for pair in zip(said, own[1:], strict=True) for part in pair)]
        if (rendered := self.render(shown)) != "".join(parts):
            raise ValueError(_changed(shown, parts, rendered))
        segments: list[Segment] = []
        contents: set[int] = set()
        after, learned = False, False  # of the message before: whether it is an answer, whether it is learned
        for message, text, lead in zip(messages, own, leads, strict=False):
            words, answer = message["content"], message["role"] == "assistant"
            learn = answer and message.get("learn") is not False
            end = len(text) - lead if lead > 0 else len(text)
            segments += self._template_text(text[:end], after, learned)
            if lead > 0:
                segments += [piece._replace(learn=learn) for piece in self._template_text(text[end:], False)]
            if lead < 0:
                contents.add(len(segments))
                segments.append(Segment(words[:-lead], False, False))
            contents.add(len(segments))
            segments.append(Segment(words[-lead:] if lead < 0 else words, False, learn))
            after, learned = answer, learn
        segments += self._template_text(own[-1], after, learned)
        return merged(self._stripped(segments, contents) if self._strips else segments)

    def _stripped(self, segments: list[Segment], contents: set[int]) -> list[Segment]:
        """Return the segments without the white space that special tokens take from beside them (lstrip, rstrip: Phi).

        The tokenizer of the finished model leaves it out, too. Raises ValueError when it belongs to a content.
        """
        for place, segment in enumerate(segments):
            for step, strips in zip(
                (-1, 1), self._strips.get(segment.text, ()) if segment.special else (), strict=False
            ):
                at = place + step
                while strips and 0 <= at < len(segments) and not segments[at].special:
                    text = segments[at].text
                    kept = text.lstrip(WHITE_SPACE) if step > 0 else text.rstrip(WHITE_SPACE)
                    if kept != text and at in contents:
                        raise ValueError(
                            f"the tokenizer's {segment.text} takes white space from the message beside it; clean the "
                            "messages before: {rule: whitespace, strip: true}."
                        )
                    segments[at] = segments[at]._replace(text=kept)
                    at = at + step if not kept else -1
        return segments

    def _skeleton(self, shape: tuple[tuple[str, bool], ...]) -> tuple[list[str], list[int]]:
        """Return the template's own text before, between and after the contents of messages, and each one's lead.

        shape: of each message its role, and whether it begins with a thought. For the lead see `_leads`.
        """
        if self._template is None:
            raise ValueError(
                f"{self.folder} has no chat template but the source holds conversations; "
                "set chat_template in the phase's train_tokenizer."
            )
        if unknown := [role for role, _ in shape if role not in ROLES]:
            raise ValueError(f"a message has the role {unknown[0]!r}; known roles: {', '.join(ROLES)}.")
        stand_ins = [f"\ue000{place}\ue001" for place in range(len(shape))]
        contents = [
            f"{THOUGHT.format(text)}{text}" if thinks else text
            for text, (_, thinks) in zip(stand_ins, shape, strict=True)
        ]
        messages = [{"role": role, "content": content} for content, (role, _) in zip(contents, shape, strict=True)]
        whole = rendered = self.render(messages)
        for number, (text, content) in enumerate(zip(stand_ins, contents, strict=True), start=1):
            if text != content and content not in rendered:
                raise ValueError(
                    f"the chat template does not print the thought of message {number} as it stands there; many "
                    "leave out thoughts before the last question: leave out all with `columns: {reasoning_content: "
                    "null}`, or cut the conversations behind their first answer."
                )
            rendered = rendered.replace(content, text, 1)
        pieces = re.split("\ue000(\\d+)\ue001", rendered)
        if pieces[1::2] != [str(place) for place in range(len(shape))]:
            raise ValueError(
                f"the chat template leaves out, repeats or reorders messages; no loss mask can be exact; {ANOTHER}."
            )
        return pieces[::2], list(self._leads(messages, whole))

    def _leads(self, messages: list[dict[str, str]], whole: str) -> Iterator[int]:
        """Yield of each message how many characters before its content the model is to write, too; 0 for most.

        That is what stands between the prompt for an answer (`add_generation_prompt`) and the answer. Below 0: so many
        of its own characters stand in the prompt (<think>). 0 where the conversation is not printed as the prompt is.
        """
        asked = ""
        with contextlib.suppress(ValueError):
            asked = self.render(messages, True)
        ending = asked.removeprefix(whole) if asked.startswith(whole) else ""
        end = 0
        for number, message in enumerate(messages):
            begin, before = whole.index(message["content"], end), end
            end, lead = begin + len(message["content"]), 0
            # Where the prompt's ending stands before it, as in most templates, the prompt need not be rendered.
            if message["role"] == "assistant" and not (ending and whole.endswith(ending, before, begin)):
                with contextlib.suppress(ValueError):  # a template may refuse a conversation that begins with an answer
                    prompt = self.render(messages[:number], True)
                    lead = begin - len(prompt)
                    text = whole[len(prompt) : begin]
                    if not whole.startswith(prompt) or not -len(BEGIN) <= lead <= begin - before:
                        lead = 0
                    elif text.strip() and prompt == self.render(messages[:number]):
                        lead = 0  # a template that knows no prompt: what names the speaker is not part of what is said
            yield lead

    def render(self, messages: list[dict[str, str]], prompt: bool = False) -> str:
        """Return what the template prints of messages, "" where there is none; prompt: and what asks for an answer."""
        if self._template is None:
            return ""
        try:
            # As `transformers` does: a token that the tokenizer lacks is undefined and prints nothing, never "None".
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **self.special
            )
        except Exception as error:  # a template is a program and can fail in any way
            why = str(error).rstrip(".")
            raise ValueError(
                f"the chat template refuses a conversation: {why}; take such ones out (the rule `turns` of clean "
                f"does where roles do not alternate), or {ANOTHER}."
            ) from None

    def _template_text(self, text: str, after_answer: bool, learn: bool = False) -> Iterator[Segment]:
        """Yield the template's own text cut at special tokens; after an answer some of them end it: see `_end`."""
        gap = self._gap(text) if after_answer else 0
        if after_answer and not self._specials.match(text, gap):
            raise ValueError(
                "the chat template does not end an answer with a special token, so the model would never stop; "
                f"{ANOTHER}."
            )
        position, end = 0, self._end(text, gap) if learn else 0
        for match in self._specials.finditer(text):
            if match.start() > position:
                yield Segment(text[position : match.start()], False, match.start() < end)
            yield Segment(match.group(), True, match.start() < end)
            position = match.end()
        if position < len(text):
            yield Segment(text[position:], False, False)

    def _gap(self, text: str) -> int:
        """Return how many spaces stand between an answer and EOS: one in Llama 2, which the model is to write, too."""
        gap = len(text) - len(text.lstrip(" "))
        match = self._specials.match(text, gap)
        return gap if match and match.group() == self.eos and not self._specials.match(text) else 0

    def _end(self, text: str, gap: int) -> int:
        """Return how much of what follows an answer ends it: a special token, and those right behind it up to EOS.

        At EOS a model stops, so it is learned: <|END_RESPONSE|><|END_OF_TURN_TOKEN|>.
        """
        first, place = 0, gap
        while (match := self._specials.match(text, place)) and match.group():
            place = match.end()
            first = first or place
            if match.group() == self.eos:
                return place
        return first


def chat_template(tokenizer: Path) -> str | None:
    """Return the chat template of a tokenizer folder: its file, else its settings, else None.

    In tokenizer_config.json a template is a string, or one of a list of {name, template}, where "default" counts.
    """
    file = tokenizer / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    given = arrow.read_json(tokenizer / "tokenizer_config.json").get("chat_template")
    if not isinstance(given, list):
        return given
    try:
        named = {template["name"]: template["template"] for template in given}
    except (KeyError, TypeError):
        raise ValueError(
            f"{tokenizer}/tokenizer_config.json: chat_template is a list, not of objects with `name` and `template`; "
            "write the template that counts into chat_template.jinja."
        ) from None
    if "default" not in named:
        raise ValueError(
            f"{tokenizer}/tokenizer_config.json names the chat templates {', '.join(named)} but no default; "
            "write the one that counts into chat_template.jinja, or set chat_template in the phase's train_tokenizer."
        )
    return str(named["default"])


def end_of_answer(tokenizer: Path) -> str | None:
    """Return the token that the chat template of a tokenizer folder puts behind an answer.

    None where it has no template, or one that takes no question and answer.
    """
    try:
        said = Marker(tokenizer).conversation([{"role": role, "content": "Hi"} for role in ("user", "assistant")])
    except ValueError:  # `add_bos_eos` says why, if there are conversations
        return None
    return next(segment.text for segment in reversed(said) if segment.special and segment.learn)


def turn_tokens(tokenizer: Path) -> list[str]:
    """Return the tokens with which the chat template of a tokenizer folder marks turns, and that are no special ones.

    <｜User｜> of DeepSeek-V3, <|im_start|> of some who added it to Mistral: a message that says so would begin a turn.
    Not the tags of a thought, which the model writes; nor what is no name in brackets, as the line breaks of Gemma.
    """
    try:
        marker = Marker(tokenizer)
    except ValueError:  # as for `end_of_answer`
        return []
    printed = ""
    for roles in (("user", "assistant", "user"), ("system", "user")):  # some know no system turn
        with contextlib.suppress(ValueError):
            printed += marker.render([{"role": role, "content": "Hi"} for role in roles], prompt=True)
    own = [text for text in marker.not_special if text in printed and text not in THOUGHT]
    return [text for text in own if re.fullmatch(r"<\S+>|\[\S+\]", text)]


def only_in_prompt(tokenizer: Path) -> str:
    """Return how the prompt for an answer ends where no answer of a conversation stands behind that; else "".

    <think> and a line break of DeepSeek-R1, whose conversations hold no thoughts.
    """
    said = [{"role": role, "content": "Hi"} for role in ("user", "assistant")]
    try:
        marker = Marker(tokenizer)
        marker.conversation(said)
        prompt, whole = marker.render(said[:1], prompt=True), marker.render(said)
    except ValueError:  # as for `end_of_answer`
        return ""
    return prompt[_alike(prompt, whole) :]


def merged(segments: list[Segment]) -> list[Segment]:
    """Return `segments` with plain neighbours of the same `learn` joined and empty ones left out.

    >>> merged([Segment("a", False, False), Segment("b", False, False), Segment("c", False, True)])
    [Segment(text='ab', special=False, learn=False), Segment(text='c', special=False, learn=True)]
    """
    result: list[Segment] = []
    for segment in segments:
        last = result[-1] if result else None
        if last and not last.special and not segment.special and last.learn == segment.learn:
            result[-1] = last._replace(text=last.text + segment.text)
        elif segment.text:
            result.append(segment)
    return result


def _alike(one: str, other: str) -> int:
    """Return with how many equal characters both texts begin."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _changed(messages: list[dict[str, str]], parts: list[str], rendered: str) -> str:
    """Return what is wrong with a conversation that is not rendered as `parts`: text, content, text, content, text."""
    same = _alike("".join(parts), rendered)
    ends = itertools.accumulate(
        len(text) + len(content) for text, content in zip(parts[::2], parts[1::2], strict=False)
    )
    place = next((number for number, end in enumerate(ends) if same < end), len(messages) - 1)
    role = messages[place]["role"]
    what = (
        f"take conversations with tools out by {{rule: turns, tool: false}}, or {ANOTHER}"
        if role == "tool"  # Llama 3.1 prints it as JSON
        else "clean it before: against `trim`, {rule: whitespace, strip: true}; a thought is <think>, line break, "
        "thought, line break, </think>, empty line"
    )
    return f"the chat template changes what message {place + 1} ({role}) says; {what}."


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})  # as `transformers`; Jinja's own escapes for HTML


def _refuse(message: str) -> None:
    raise ValueError(message)
