"""Put each document between BOS and EOS, and render each conversation with the chat template, as marked segments.

Reads:  data/clean/PHASE/SOURCE/documents, data/dedup/PHASE/SOURCE, models/tokenizers/PHASE
Writes: data/marked/PHASE/SOURCE   the documents of the train and eval splits as lists of segments
Params: none of its own (the tokenizer says what BOS, EOS and the chat template are)

A segment is a piece of text with two marks: `special`, one special token, and `learn`, the model is trained to write
it. Special tokens exist in no other way, so text that merely looks like one stays text. Example (* special, + learn):

    text "Hi</s>"                      ->  *+"<s>"  +"Hi</s>"  *+"</s>"
    user "2+2?", assistant "4"         ->  *"<s>"  "Human: 2+2?\\n\\nAssistant: "  +"4"  *+"</s>"

Neighbours with equal marks are one segment, so the prompt is tokenised in one piece, as it is when the model is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kit import arrow, stage
from kit.params import Source, read_params
from kit.tokenizer import Vocabulary

SEGMENTS = pa.list_(pa.struct([("text", pa.string()), ("special", pa.bool_()), ("learn", pa.bool_())]))
MARKED = pa.schema(
    [
        pa.field("doc_id", pa.binary(16)),
        pa.field("split", pa.string()),  # train or eval
        pa.field("segments", SEGMENTS),
    ]
)


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
        self.special = vocabulary.special
        self.bos, self.eos = self.special.get("bos_token"), self.special["eos_token"]
        # The longest first: of two tokens that begin alike, the longer is meant.
        specials = sorted(vocabulary.special_texts, key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, specials)))
        template = tokenizer / "chat_template.jinja"
        self._template = None
        if template.is_file():
            # The options with which `transformers` renders a template; anything else moves line breaks.
            extensions = ["jinja2.ext.loopcontrols"]
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
            environment.globals["raise_exception"] = _refuse
            try:
                self._template = environment.from_string(template.read_text(encoding="utf-8"))
            except TemplateError as error:
                raise ValueError(f"{template} is no template that can be rendered here: {error}") from None

    def document(self, text: str) -> list[Segment]:
        """Return BOS, the text, EOS, all of it learned; no BOS when the tokenizer has none."""
        ends = [Segment(self.bos, True, True)] if self.bos else []
        return [*ends, Segment(text, False, True), Segment(self.eos, True, True)]

    def conversation(self, messages: list[dict[str, str]]) -> list[Segment]:
        """Return the rendered conversation; what the assistant says, and the token that ends it, is learned.

        Each content is rendered as a stand-in and put back afterwards, so no content can change the template's course
        or be taken for a special token. Raises ValueError when the template does not use each content just once, in
        order and unchanged, or does not end an answer with a special token.
        """
        if self._template is None:
            raise ValueError(
                f"{self.folder} has no chat_template.jinja but the source holds conversations; "
                "set chat_template in the phase's train_tokenizer."
            )
        stand_ins = [f"\ue000{place}\ue001" for place in range(len(messages))]
        hidden = [{**message, "content": mark} for message, mark in zip(messages, stand_ins, strict=True)]
        pieces = re.split("\ue000(\\d+)\ue001", self._render(hidden))
        if pieces[1::2] != [str(place) for place in range(len(messages))]:
            raise ValueError("the chat template leaves out, repeats or reorders messages; no loss mask can be exact.")
        if "".join(_filled(pieces, messages)) != self._render(messages):
            raise ValueError("the chat template changes what the messages say; clean the text instead.")
        segments = list(self._template_text(pieces[0], after_answer=False))
        for place, text in zip(pieces[1::2], pieces[2::2], strict=True):
            message = messages[int(place)]
            answer = message["role"] == "assistant"
            segments.append(Segment(message["content"], False, answer))
            segments += self._template_text(text, answer)
        return merged(segments)

    def _render(self, messages: list[dict[str, str]]) -> str:
        assert self._template
        try:
            # As `transformers` does: a token that the tokenizer lacks is undefined and prints nothing, never "None".
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=False, **self.special
            )
        except Exception as error:  # a template is a program and can fail in any way
            raise ValueError(f"the chat template refuses a conversation: {error}.") from None

    def _template_text(self, text: str, after_answer: bool) -> Iterator[Segment]:
        """Yield the template's own text cut at special tokens; the first one after an answer ends it."""
        if after_answer and not self._specials.match(text):
            raise ValueError(
                "the chat template does not end an answer with a special token, so the model would never stop."
            )
        position = 0
        for match in self._specials.finditer(text):
            if match.start() > position:
                yield Segment(text[position : match.start()], False, False)
            yield Segment(match.group(), True, after_answer and match.start() == 0)
            position = match.end()
        if position < len(text):
            yield Segment(text[position:], False, False)


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


def _filled(pieces: list[str], messages: list[dict[str, str]]) -> Iterator[str]:
    for number, piece in enumerate(pieces):
        yield messages[int(piece)]["content"] if number % 2 else piece


def _refuse(message: str) -> None:
    raise TemplateError(message)


def main(name: str) -> None:
    phase = read_params(f"sources.{name}", Source).phase
    documents, decisions = Path("data/clean", phase, name, "documents"), Path("data/dedup", phase, name)
    tokenizer = Path("models/tokenizers", phase)
    inputs = [str(documents), str(decisions), str(tokenizer)]
    with stage.run("add_bos_eos", name, inputs, [f"data/marked/{phase}/{name}"]) as run:
        (folder,) = run.outputs
        marker = Marker(tokenizer)
        if arrow.table(documents, ["doc_id"]) != arrow.table(decisions, ["doc_id"]):
            raise SystemExit(f"{decisions} decides about other documents than {documents} holds; run `dvc repro`.")
        splits = arrow.table(decisions, ["split"])["split"].to_pylist()
        read, dropped, characters = 0, 0, 0
        with arrow.Writer(folder, MARKED, batch_rows=256) as out:
            rows = arrow.manifest(documents)["counts"]["rows"]
            for batch in run.progress(arrow.batches(documents), -(-rows // 256), "batches"):
                here = splits[read : read + batch.num_rows]
                read += batch.num_rows
                dropped += here.count("dropped")
                conversation = "messages" in batch.schema.names
                contents = batch.column("messages" if conversation else "text").to_pylist()
                mark = marker.conversation if conversation else marker.document
                marked = [
                    {"doc_id": identity, "split": split, "segments": [s._asdict() for s in mark(content)]}
                    for identity, split, content in zip(batch["doc_id"].to_pylist(), here, contents, strict=True)
                    if split != "dropped"
                ]
                characters += sum(len(s["text"]) for row in marked for s in row["segments"])
                out.write(pa.Table.from_pylist(marked, MARKED))
            run.balance("documents", len(splits), kept=out.rows, dropped=dropped)
            out.counts = {"characters": characters}
        run.count(documents=read, marked=out.rows, dropped=dropped, characters=characters)


if __name__ == "__main__":
    stage.cli(main, __doc__)
