"""tokenize_text: special ids stand where a special segment stood, and nowhere else; no character is lost."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend, Replace, Sequence
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, WhitespaceSplit
from tokenizers.pre_tokenizers import Sequence as Cuts
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer

import tiny
import tokenize_text
import train_tokenizer
from add_bos_eos import MARKED
from chat_segments import Marker
from conftest import Runner, with_other_content, write
from kit import arrow, memo
from tokenize_text import Encoder

SEGMENTS = MARKED.field("segments").type
# What looks like a special token, whole and in parts, between text of any kind.
SPECIALS = ["<s>", "</s>", "<pad>", "<|im_end|>", "<|im_start|>", "<", "/s>", "|>", "\u0120", "\u010a"]
TRICKY = st.lists(st.sampled_from(SPECIALS) | st.text(max_size=4), min_size=1).map("".join).filter(bool)


class Chain:
    """From text or messages to ids, as the two stages do it."""

    def __init__(self, folder: Path) -> None:
        self.marker, self.encoder = Marker(folder), Encoder(folder)

    def ids(self, content: str | list[dict[str, str]]) -> tuple[list[int], list[bool]]:
        mark = self.marker.document if isinstance(content, str) else self.marker.conversation
        ids, learn = self.encoder.encode(pa.array([[segment._asdict() for segment in mark(content)]], SEGMENTS))
        return ids.to_pylist()[0], learn.to_pylist()[0] if learn else [True] * len(ids[0])

    def text(self, ids: list[int]) -> str:
        return str(self.encoder.vocabulary.tokenizer.decode(ids, skip_special_tokens=False))


def write_tokenizer(folder: Path, *specials: str, **settings: str | None) -> Path:
    """Write the tiny tokenizer with more special tokens and with other settings."""
    tiny.tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(list(specials))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = arrow.read_json(folder / "tokenizer_config.json")
    arrow.write_json(folder / "tokenizer_config.json", {**config, **settings})
    return folder


MARK = "\u2581"  # SentencePiece's sign for a space
PREFIXES: dict[str, tuple[Any, Any]] = {
    "normalizer": (Sequence([Prepend(MARK), Replace(" ", MARK)]), None),
    "always": (None, Metaspace(MARK, prepend_scheme="always", split=False)),
    "first": (None, Metaspace(MARK, prepend_scheme="first", split=False)),
    "byte level": (None, ByteLevel(add_prefix_space=True)),
}


@pytest.mark.parametrize("case", PREFIXES)
def test_a_space_that_a_tokenizer_puts_before_each_text_is_not_put_before_an_answer(tmp_path: Path, case: str) -> None:
    """As those of Llama 2, TinyLlama and Mistral: the ids are those of the whole text, which has it at most once."""
    normalizer, cut = PREFIXES[case]
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    if normalizer:
        tokenizer.normalizer = normalizer
    if cut:
        tokenizer.pre_tokenizer = cut
    specials = ["<unk>", "<s>", "</s>"]
    texts = ["the quick brown fox user assistant", "brown fox", "\n"] * 9  # no merge across a line break
    tokenizer.train_from_iterator(texts, BpeTrainer(vocab_size=120, special_tokens=specials, show_progress=False))
    folder = tmp_path / "t"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    arrow.write_json(folder / "tokenizer_config.json", {**config, "unk_token": "<unk>"})
    turn = "{{ message.role + '\n' + message.content + '</s>' }}"
    theirs = AutoTokenizer.from_pretrained(folder)
    for begin in ("", "<s>"):
        template = begin + "{% for message in messages %}" + turn + "{% endfor %}"
        theirs.chat_template = template + "{% if add_generation_prompt %}assistant\n{% endif %}"
        (folder / "chat_template.jinja").write_text(theirs.chat_template)
        said = ["the quick", "brown fox", "brown", "the fox"]
        messages = [{"role": ("user", "assistant")[at % 2], "content": words} for at, words in enumerate(said)]
        chain = Chain(folder)
        ids, learn = chain.ids(messages)
        assert ids == theirs.apply_chat_template(messages, return_dict=False)
        prompt = theirs.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        assert learn.index(True) == len(prompt)
        # A text has it, and what is encoded together has what each has alone.
        mark = [chain.marker.conversation(messages), chain.marker.document("the fox"), chain.marker.document("brown")]
        rows = pa.array([[segment._asdict() for segment in row] for row in mark], SEGMENTS)
        found, _ = chain.encoder.encode(rows)
        bos, eos = theirs.convert_tokens_to_ids(["<s>", "</s>"])
        texts = [[bos, *theirs.encode(text, add_special_tokens=False), eos] for text in ("the fox", "brown")]
        assert found.to_pylist() == [ids, *texts]
        assert chain.encoder.encode(rows[1:])[0].to_pylist() == texts


def test_a_space_that_a_tokenizer_puts_before_each_word_stays(tmp_path: Path) -> None:
    """As those of XGLM and XLM-R: they first cut at white space, which is gone when the space is put."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = Cuts([WhitespaceSplit(), Metaspace(MARK, prepend_scheme="always")])
    trainer = BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox user: assistant:"] * 9, trainer)
    folder = tmp_path / "t"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    arrow.write_json(folder / "tokenizer_config.json", {**config, "unk_token": "<unk>"})
    turn = "{{ message.role + ': ' + message.content + '</s>' }}"
    (folder / "chat_template.jinja").write_text("{% for message in messages %}" + turn + "{% endfor %}")
    messages = [{"role": "user", "content": "the quick"}, {"role": "assistant", "content": "brown fox"}]
    ids, _ = Chain(folder).ids(messages)
    assert ids == AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, return_dict=False)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """<s> 0, </s> 1, <pad> 2, and two more that no setting names, at 300 and 301."""
    return Chain(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t", "<|im_start|>", "<|im_end|>"))


def write_marked(project: Path, *rows: tuple[str, list[tuple[str, bool, bool]]]) -> None:
    """Write params.yaml and what add_bos_eos leaves for the source p_text: (split, segments) for each row."""
    tiny.params_yaml(project, p={"base": "models/configs/llama_small"})
    keys = ("text", "special", "learn")
    values = [
        {
            "doc_id": row.to_bytes(16, "little"),
            "split": split,
            "segments": [dict(zip(keys, s, strict=True)) for s in segments],
        }
        for row, (split, segments) in enumerate(rows)
    ]
    with arrow.Writer(project / "data/marked/p/p_text", MARKED, batch_rows=2) as out:
        out.write(pa.Table.from_pylist(values, MARKED))
        out.counts = {"segments_not_learned": sum(not learn for _, segments in rows for *_, learn in segments)}


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
    segments = pa.array([[s._asdict() for s in chain.marker.document(text)] for text in ["first", *texts]], SEGMENTS)
    together = chain.encoder.encode(segments.slice(1))[0].to_pylist()
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
    """And counts the tokens of each split; equal bytes for other numbers of workers, hash seeds and encoders."""
    write_tokenizer(project / "models/tokenizers/p")
    ends = [("<s>", True, True), ("</s>", True, True)]
    rows: list[tuple[str, list[Any]]] = [("train", [ends[0], ("zq", False, True), ends[1]])] * 4
    rows.append(("eval", [ends[0], ("zzz", False, learned), ends[1]]))
    write_marked(project, *rows)
    folder, results = project / "data/tokens/p/p_text", []
    for workers, seed, engine in (("1", "0", "gigatoken"), ("2", "1", "tiktoken"), ("5", "2", "hf")):
        settings = {"TERROIR_WORKERS": workers, "PYTHONHASHSEED": seed, "TERROIR_ENCODER": engine}
        finished = run_stage(project, "tokenize_text", "p_text", **settings)
        assert finished.returncode == 0, finished.stderr
        results.append(contents(folder))
        shutil.rmtree(project / ".memo")
    assert results[0] == results[1] == results[2]
    table = arrow.table(folder)
    assert ("learn" in table.schema.names) is not learned
    if not learned:
        assert table["learn"].to_pylist() == [[True] * 4] * 4 + [[True, False, False, False, True]]
    counts = {"rows": 5, "train": 16, "eval": 5, "learned": 21 if learned else 18}
    assert arrow.manifest(folder)["counts"] == counts


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Source:
    """A source of 3 MB in shards of 40 documents, tokenised in this process; `seen` counts the shards worked on."""

    def __init__(self, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.project, self.folder = project, project / "data/tokens/p/p_text"
        write_tokenizer(project / "models/tokenizers/p")
        tiny.params_yaml(project, p={"base": "models/configs/llama_small"})
        self.real, self.seen = tokenize_text.tokenise_shard, 0
        self.learn_of: dict[int, bool] = {}
        self.shards = [list(range(first, first + 40)) for first in range(0, 1000, 40)]
        monkeypatch.chdir(project)
        monkeypatch.setattr(memo, "CHECKED", 0)

    def write(self) -> None:
        """Write what add_bos_eos leaves for the rows of `shards`; the text of a row follows from its number."""
        with arrow.Shards(self.project / "data/marked/p/p_text", MARKED) as out:
            for shard in self.shards:
                rows = [
                    {
                        "doc_id": hashlib.sha256(bytes([row % 256, row // 256])).digest()[:16],
                        "split": "eval" if row % 10 == 0 else "train",
                        "segments": [
                            {"text": "<s>", "special": True, "learn": True},
                            {
                                "text": f"row {row} 法律 " * (row % 200 + 1),
                                "special": False,
                                "learn": self.learn_of.get(row, True),
                            },
                            {"text": "</s>", "special": True, "learn": True},
                        ],
                    }
                    for row in shard
                ]
                out.add(arrow.encode(pa.Table.from_pylist(rows, MARKED), MARKED, 16), len(rows))
            out.counts = {"segments_not_learned": len(self.learn_of)}

    def run(self, workers: int = 1) -> int:
        """Run the stage; return the number of shards that were worked on (known for one worker)."""
        self.write()
        self.seen = 0
        tokenize_text.encoder.cache_clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TERROIR_WORKERS", str(workers))
            if workers == 1:
                patch.setattr(tokenize_text, "tokenise_shard", self.counted)
            tokenize_text.main("p_text")
        return self.seen

    def counted(self, work: tokenize_text.Work) -> memo.Made:
        self.seen += 1
        return self.real(work)

    def from_nothing(self, workers: int = 1) -> dict[str, bytes]:
        """Return what a run without memory writes."""
        shutil.rmtree(self.project / ".memo", ignore_errors=True)
        self.run(workers)
        return contents(self.folder)


@pytest.fixture
def source(project: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    return Source(project, monkeypatch)


def test_the_bytes_do_not_depend_on_the_workers_nor_on_the_parts(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERROIR_ENCODER", "tiktoken")  # beside gigatoken, so little work has one worker
    first = source.from_nothing(1)
    assert source.seen == 25
    assert [source.from_nothing(workers) for workers in (2, 5)] == [first, first]
    source.learn_of[400] = False  # in one part of its shard alone
    masked = source.from_nothing(1)
    monkeypatch.setattr(tokenize_text, "PART_BYTES", 100)
    assert source.from_nothing(1) == masked != first


def test_one_more_document_costs_its_own_shard(source: Source) -> None:
    """The files of all others are the same; the result is that of a run from nothing."""
    source.run()
    before = contents(source.folder)
    assert source.run() == 0
    source.shards[12].insert(7, 1001)
    assert source.run() == 1
    found = contents(source.folder)
    assert {name for name in found if found[name] != before[name]} == {
        "data-00012.arrow",
        "manifest.json",
        "state.json",
    }
    assert found == source.from_nothing()
    source.shards.insert(0, [1002])
    assert source.run() == 1
    found = contents(source.folder)
    assert found["data-00001.arrow"] == before["data-00000.arrow"]
    assert found == source.from_nothing()


def test_a_document_of_the_same_id_with_other_marks_or_split_is_done_again(source: Source) -> None:
    """What decides is the content of the rows, not doc_id: the chat template marks them, and dedup splits them."""
    source.learn_of[3] = False
    source.run()
    source.learn_of[400] = False
    assert source.run() == 1
    found = contents(source.folder)
    table = arrow.table(source.folder)
    assert [row for row in range(1000) if not all(table["learn"][row].as_py())] == [3, 400]
    assert table["learn"][399].as_py() == [True] * len(table["input_ids"][399])
    counts = arrow.manifest(source.folder)["counts"]
    not_learned = sum(len(table["input_ids"][row]) - 2 for row in (3, 400))
    assert counts["train"] + counts["eval"] - counts["learned"] == not_learned
    assert found == source.from_nothing()


def test_where_the_first_segment_is_not_learned_each_shard_has_the_column(source: Source) -> None:
    source.run()
    source.learn_of[400] = False
    assert source.run() == 25
    assert arrow.table(source.folder)["learn"].null_count == 0


def test_marks_that_the_manifest_does_not_count_are_not_lost_in_silence(source: Source) -> None:
    source.learn_of[400] = False
    source.write()
    path = source.project / "data/marked/p/p_text/manifest.json"
    path.write_text(path.read_text().replace('"segments_not_learned": 1', '"segments_not_learned": 0'))
    with pytest.raises(ValueError, match="segments that are not learned"):
        tokenize_text.main("p_text")
    assert not source.folder.exists()


def test_another_tokenizer_gets_nothing_from_memory(source: Source) -> None:
    source.run()
    assert source.run() == 0
    path = source.project / "models/tokenizers/p/tokenizer.json"
    path.write_text(path.read_text() + "\n")
    assert source.run() == 25


@pytest.mark.parametrize("what", ["shard", "tokenizer"])
def test_what_was_read_while_it_changed_does_not_come_back(
    source: Source, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Nothing is published; when the old input is back, so are its tokens and not those of the other one."""
    whole = source.from_nothing()
    shutil.rmtree(source.project / ".memo")
    monkeypatch.setenv("TERROIR_WORKERS", "1")
    tokenize_text.encoder.cache_clear()
    tokenizer = source.project / "models/tokenizers/p/tokenizer.json"
    other_ids = json.loads(tokenizer.read_text())
    vocabulary = other_ids["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    marked = sorted((source.project / "data/marked/p/p_text").glob("*.arrow"))
    victim, other = {
        "shard": (marked[3], marked[4].read_bytes()),
        "tokenizer": (tokenizer, json.dumps(other_ids).encode()),
    }[what]
    name = "tokenise_shard" if what == "shard" else "Encoder"
    with monkeypatch.context() as patch:
        patch.setattr(tokenize_text, name, with_other_content(victim, other, getattr(tokenize_text, name)))
        with pytest.raises(SystemExit, match="changed while the stage ran; nothing was published"):
            tokenize_text.main("p_text")
        assert contents(source.folder) == whole
    tokenize_text.encoder.cache_clear()
    tokenize_text.main("p_text")
    assert contents(source.folder) == whole


def test_what_was_tampered_with_is_computed_again(source: Source) -> None:
    whole = source.from_nothing()
    victims = sorted((source.project / ".memo").rglob("*.tokens"))[:3]
    for number, path in enumerate(victims):
        content = bytearray(path.read_bytes())
        content[len(content) // 2 + number] ^= 1
        path.write_bytes(content if number else b"")
    assert source.run() == 3
    assert contents(source.folder) == whole


def test_a_document_that_is_lost_stops_the_stage(source: Source) -> None:
    real = source.real

    def counts_less(work: tokenize_text.Work) -> memo.Made:
        made = real(work)
        made.notes["rows"] -= work.path.name == "data-00003.arrow"
        return made

    source.real = counts_less
    with pytest.raises(ValueError, match="1000 documents were read but 999 tokenised came out"):
        source.run()
    assert not source.folder.exists()


def test_a_source_without_documents_gives_no_rows(source: Source) -> None:
    source.shards = []
    assert source.run() == 0
    counts = {"rows": 0, "train": 0, "eval": 0, "learned": 0}
    assert arrow.manifest(source.folder)["counts"] == counts


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
