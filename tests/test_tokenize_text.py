"""tokenize_text: special ids stand where a special segment stood, and nowhere else; no character is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import tiny
import train_tokenizer
from add_bos_eos import MARKED, Marker
from conftest import Runner, write
from kit import arrow
from tokenize_text import Encoder

# What looks like a special token, whole and in parts, between text of any kind.
SPECIALS = ["<s>", "</s>", "<pad>", "<|im_end|>", "<|im_start|>", "<", "/s>", "|>", "\u0120", "\u010a"]
TRICKY = st.lists(st.sampled_from(SPECIALS) | st.text(max_size=4), min_size=1).map("".join).filter(bool)


class Chain:
    """From text or messages to ids, as the two stages do it."""

    def __init__(self, folder: Path) -> None:
        self.marker, self.encoder = Marker(folder), Encoder(folder)

    def ids(self, content: str | list[dict[str, str]]) -> tuple[list[int], list[bool]]:
        mark = self.marker.document if isinstance(content, str) else self.marker.conversation
        (ids,), (learn,) = self.encoder.encode([[segment._asdict() for segment in mark(content)]])
        return ids.tolist(), learn.tolist()

    def text(self, ids: list[int]) -> str:
        return str(self.encoder.tokenizer.decode(ids, skip_special_tokens=False))


def write_tokenizer(folder: Path, *specials: str, **settings: str | None) -> Path:
    """Write the tiny tokenizer with more special tokens and with other settings."""
    tiny.tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(list(specials))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = arrow.read_json(folder / "tokenizer_config.json")
    arrow.write_json(folder / "tokenizer_config.json", {**config, **settings})
    return folder


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """<s> 0, </s> 1, <pad> 2, and two more that no setting names, at 300 and 301."""
    return Chain(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t", "<|im_start|>", "<|im_end|>"))


def write_marked(project: Path, *rows: tuple[str, list[tuple[str, bool, bool]]]) -> None:
    """Write params.yaml and what add_bos_eos leaves for the source p_text: (split, segments) for each row."""
    tiny.params_yaml(project, p={"base": "models/configs/llama_small"})
    keys = ("text", "special", "learn")
    values = [
        {"doc_id": bytes([row]) * 16, "split": split, "segments": [dict(zip(keys, s, strict=True)) for s in segments]}
        for row, (split, segments) in enumerate(rows)
    ]
    with arrow.Writer(project / "data/marked/p/p_text", MARKED, batch_rows=2) as out:
        out.write(pa.Table.from_pylist(values, MARKED))


def test_the_worked_example_of_the_docstring(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "t")
    bytes_alone = train_tokenizer.Params(mode="train", vocab_size=259)
    train_tokenizer.train(iter([]), bytes_alone).save(str(folder / "tokenizer.json"))
    assert Chain(folder).ids("Hi") == ([0, 42, 75, 1], [True] * 4)


@given(text=TRICKY)
def test_a_document_has_one_bos_one_eos_and_gives_its_text_back(chain: Chain, text: str) -> None:
    """On ids, whatever the text pretends to be: the five special ids stand at its two ends only."""
    ids, learn = chain.ids(text)
    assert (ids[0], ids[-1]) == (0, 1)
    assert not {0, 1, 2, 300, 301} & set(ids[1:-1])
    assert chain.text(ids[1:-1]) == text
    assert learn == [True] * len(ids)


@given(rounds=st.lists(st.tuples(TRICKY, TRICKY), min_size=1, max_size=3), system=st.none() | TRICKY)
def test_of_a_conversation_exactly_the_answers_and_their_eos_are_learned(
    chain: Chain, rounds: list[tuple[str, str]], system: str | None
) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in rounds:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ids, learn = chain.ids(messages)
    assert [place for place, identity in enumerate(ids) if identity in (0, 1, 2, 300, 301)] == [
        0,
        *(place for place, identity in enumerate(ids) if identity == 1),
    ]
    learned, spans = [identity for identity, mark in zip(ids, learn, strict=True) if mark], []
    while learned:
        end = learned.index(1)
        spans.append(chain.text(learned[:end]))
        learned = learned[end + 1 :]
    assert spans == [answer for _, answer in rounds]
    assert not any(mark and not learn[place + 1] for place, mark in enumerate(learn) if ids[place] != 1)
    expected = "".join(s.text for s in chain.marker.conversation(messages))
    assert chain.text(ids) == expected


@given(texts=st.lists(TRICKY, min_size=1, max_size=5))
def test_the_ids_do_not_depend_on_the_batch(chain: Chain, texts: list[str]) -> None:
    segments = [[segment._asdict() for segment in chain.marker.document(text)] for text in texts]
    together = [ids.tolist() for ids in chain.encoder.encode(segments)[0]]
    assert together == [chain.ids(text)[0] for text in texts]


@pytest.mark.parametrize(("entries", "kind"), [(2**16, pa.uint16()), (2**16 + 1, pa.uint32())])
def test_ids_take_two_bytes_up_to_65536_entries_then_four(
    project: Path, run_stage: Runner, entries: int, kind: pa.DataType
) -> None:
    """The last id of the vocabulary is written and read back; it is the largest that two bytes hold, or one more."""
    folder = write_tokenizer(project / "models/tokenizers/p", *(f"<{number}>" for number in range(entries - 300)))
    last = f"<{entries - 301}>"
    write_marked(project, ("train", [("<s>", True, True), ("a", False, True), (last, True, True)]))
    finished = run_stage(project, "tokenize_text", "p_text")
    assert finished.returncode == 0, finished.stderr
    table = arrow.table(project / "data/tokens/p/p_text")
    assert table.schema.field("input_ids").type == pa.list_(kind)
    assert table["input_ids"][0].as_py()[-1] == entries - 1
    assert Encoder(folder).vocabulary.size == entries


@pytest.mark.parametrize("learned", [True, False])
def test_the_command_writes_learn_only_where_something_is_not_learned(
    project: Path, run_stage: Runner, learned: bool
) -> None:
    """And counts the tokens of each split; equal bytes for other numbers of threads and another hash seed."""
    write_tokenizer(project / "models/tokenizers/p")
    ends = [("<s>", True, True), ("</s>", True, True)]
    rows: list[tuple[str, list[Any]]] = [("train", [ends[0], ("zq", False, True), ends[1]])] * 4
    rows.append(("eval", [ends[0], ("zzz", False, learned), ends[1]]))
    write_marked(project, *rows)
    folder, results = project / "data/tokens/p/p_text", []
    for threads, seed in (("1", "0"), ("3", "1")):
        finished = run_stage(project, "tokenize_text", "p_text", TERROIR_WORKERS=threads, PYTHONHASHSEED=seed)
        assert finished.returncode == 0, finished.stderr
        results.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert results[0] == results[1]
    table = arrow.table(folder)
    assert ("learn" in table.schema.names) is not learned
    if not learned:
        assert table["learn"].to_pylist() == [[True] * 4] * 4 + [[True, False, False, False, True]]
    counts = {"rows": 5, "train": 16, "eval": 5, "learned": 21 if learned else 18}
    assert arrow.manifest(folder)["counts"] == counts


PLAIN, END = {"id": 260, "special": True}, {"id": 1, "special": False}
UNFIT: dict[str, tuple[dict[str, str | None], list[dict[str, Any]], str]] = {
    "no EOS": ({"eos_token": None}, [], "names no eos_token"),
    "text becomes a special token": ({}, [PLAIN], "plain text becomes its special token"),
    "a special token that is not marked": ({}, [END], "its tokenizer.json does not"),
    "both, so that the numbers agree": ({}, [END, PLAIN], "is unfit"),
    "a token that is not there": ({"eos_token": "<end>"}, [], "has no token '<end>'"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_tokenizer_that_cannot_keep_special_tokens_apart_is_refused(
    project: Path, run_stage: Runner, case: str
) -> None:
    """In one sentence; the tokens of the last good run stay as they were."""
    settings, changes, sentence = UNFIT[case]
    folder = write_tokenizer(project / "models/tokenizers/p", **settings)
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode([PLAIN["id"]])
    content = json.loads((folder / "tokenizer.json").read_text())
    names = {identity: name for name, identity in content["model"]["vocab"].items()}
    for change in changes:
        others = [token for token in content["added_tokens"] if token["id"] != change["id"]]
        changed = {**content["added_tokens"][0], **change, "content": names[change["id"]]}
        content["added_tokens"] = [*others, changed]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    eos = settings.get("eos_token") or "</s>"
    write_marked(project, ("train", [("<s>", True, True), (text, False, True), (eos, True, True)]))
    write(project / "data/tokens/p/p_text/manifest.json", "of the last good run")
    finished = run_stage(project, "tokenize_text", "p_text")
    assert (finished.returncode, len(finished.stderr.splitlines())) == (1, 1), finished.stderr
    assert sentence in finished.stderr
    assert (project / "data/tokens/p/p_text/manifest.json").read_text() == "of the last good run"
