"""train_tokenizer: any text comes back from its ids; only the train split is read; `transformers` sees the same."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import Strip
from tokenizers.normalizers import NFKC
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

import tiny
from chat_templates import TEMPLATES
from clean import CHAT_DOCUMENTS, TEXT_DOCUMENTS
from conftest import Runner, write
from dedup import DECISIONS
from kit import arrow
from kit.tokenizer import Vocabulary
from tokenizer_report import drawn
from train_tokenizer import Params, config, train

NEWLINE = b"\n"
CORPUS = [
    "the cat sat on the mat\r\n",
    "法律 第一条 法律\n",
    "naïve cafe\u0301 \U0001f30a",
    "Human: Assistant: </s><s>",
] * 3
PLACE = {"file": "a.txt", "start": 0, "end": 1, "line": 1}


def params(**more: Any) -> Params:
    return Params.model_validate({"mode": "train", "vocab_size": 320, "min_frequency": 1, **more})


def trained(documents: list[str], **more: Any) -> Tokenizer:
    return train(iter(documents), params(**more))


TOKENIZER = trained(CORPUS)


def write_phase(project: Path, settings: dict[str, Any], **texts: str) -> None:
    """Write params.yaml, and what clean and dedup leave for one source: a text for each split of `texts`."""
    tiny.params_yaml(project, p={"base": "models/base/b", "train_tokenizer": settings})
    if not (config := project / "models/base/b/config.json").is_file():
        write(config, '{"model_type": "llama"}')
    rows = [{"doc_id": text[:16].ljust(16).encode()[:16], **PLACE, "text": text} for text in texts.values()]
    with arrow.Writer(project / "data/clean/p/p_text/documents", TEXT_DOCUMENTS) as out:
        out.write(pa.Table.from_pylist(rows, TEXT_DOCUMENTS))
    decisions = [{"doc_id": row["doc_id"], "split": split} for row, split in zip(rows, texts, strict=True)]
    with arrow.Writer(project / "data/dedup/p/p_text", DECISIONS) as out:
        out.write(pa.Table.from_pylist(decisions, DECISIONS))


def test_the_worked_example_of_the_docstring() -> None:
    tokenizer = trained(["aaaa aaaa"] * 2, vocab_size=263, min_frequency=2)
    assert [tokenizer.id_to_token(number) for number in (0, 1, 2, 259, 260)] == ["<s>", "</s>", "<pad>", "aa", "aaaa"]
    assert {tokenizer.id_to_token(number) for number in range(3, 259)} == set(ByteLevel.alphabet())
    assert tokenizer.encode("aaaa", add_special_tokens=False).ids == [260]


@given(st.text() | st.text(st.sampled_from("法\ue000\U0001f30a\u0301\x00\r\n\t '</s>")))
def test_any_text_comes_back_from_its_ids(text: str) -> None:
    """Byte for byte, with control characters, emoji, unknown scripts, look-alikes of special tokens."""
    TOKENIZER.encode_special_tokens = True
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert not {0, 1, 2} & set(ids)


def test_all_256_bytes_have_an_id() -> None:
    """So nothing is ever unknown, not even with an empty corpus."""
    tokenizer = trained([])
    assert tokenizer.get_vocab_size() == 256 + 3
    assert trained([], bos_token="</s>", pad_token="</s>").get_vocab_size() == 256 + 1


@given(st.lists(st.text(st.sampled_from("ab é中 \n'")), max_size=12), st.randoms(use_true_random=False))
def test_the_order_of_the_documents_does_not_matter(documents: list[str], shuffle: random.Random) -> None:
    other = list(documents)
    shuffle.shuffle(other)
    assert trained(documents).to_str() == trained(other).to_str()


def test_only_the_train_split_is_read_and_both_sides_of_a_conversation(tmp_path: Path) -> None:
    rows = [{"doc_id": bytes(16), **PLACE, "text": split} for split in ("train", "eval", "dropped", "train")]
    messages = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]
    chats = [{"doc_id": bytes(16), **PLACE, "messages": messages}] * 2
    for name, schema, documents, splits in (
        ("texts", TEXT_DOCUMENTS, rows, ["train", "eval", "dropped", "train"]),
        ("chats", CHAT_DOCUMENTS, chats, ["eval", "train"]),
    ):
        with arrow.Writer(tmp_path / "clean" / name / "documents", schema, batch_rows=2) as out:
            out.write(pa.Table.from_pylist(documents, schema))
        with arrow.Writer(tmp_path / "dedup" / name, DECISIONS) as out:
            out.write(pa.Table.from_pylist([{"split": split} for split in splits], DECISIONS))
    sources = [(tmp_path / "clean" / name, tmp_path / "dedup" / name) for name in ("texts", "chats")]
    found = [text for _, texts in drawn(sources, ("train",), None) for text in texts]
    assert found == ["train", "train", "ask", "say"]


def test_the_command_gives_the_same_bytes_for_any_hash_seed_and_threads(project: Path, run_stage: Runner) -> None:
    """And no trace of the held-out documents: "evaluation" is no token, "training" is."""
    texts = {"train": "training " * 9, "eval": "evaluation " * 9, "dropped": "dropped " * 9}
    write_phase(project, {"mode": "train", "vocab_size": 300}, **texts)
    results = []
    for seed, threads in (("0", "1"), ("1", "3")):
        environment = {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads, "TERROIR_WORKERS": threads}
        finished = run_stage(project, "train_tokenizer", "p", **environment)
        assert finished.returncode == 0, finished.stderr
        results.append({path.name: path.read_bytes() for path in (project / "models/tokenizers/p").iterdir()})
    assert results[0] == results[1]
    assert sorted(results[0]) == ["tokenizer.json", "tokenizer_config.json"]
    vocabulary = json.loads(results[0]["tokenizer.json"])["model"]["vocab"]
    assert "training" in vocabulary
    assert {token for token in vocabulary if "eval" in token or "drop" in token} == set()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer") / "t")


def test_transformers_opens_it_with_the_same_special_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.chat_template == TEMPLATES["human_assistant"]
    assert len(tokenizer) == 300 == Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()


@pytest.mark.parametrize("text", ["", " two  spaces\n", "it is n't , is it ?", "法律 \U0001f30a"])
def test_a_plain_prompt_begins_with_one_bos_and_reads_back(folder: Path, text: str) -> None:
    """As the training documents do; decoding changes no space."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[1:])
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_reuse_copies_the_tokenizer_of_the_base_and_may_add_a_template(project: Path, run_stage: Runner) -> None:
    """Byte for byte, its own template too, unless `chat_template` names another."""
    base, result = tiny.tokenizer(project / "models/base/b"), project / "models/tokenizers/p"
    (base / "chat_template.jinja").write_text("its own")
    (base / "config.json").write_text('{"model_type": "llama"}')
    expected = {path.name: path.read_bytes() for path in base.iterdir() if path.name != "config.json"}
    for template in (None, "human_assistant"):
        write_phase(project, {"mode": "reuse", "chat_template": template}, train="a", eval="b")
        finished = run_stage(project, "train_tokenizer", "p")
        assert finished.returncode == 0, finished.stderr
        if template:
            expected["chat_template.jinja"] = TEMPLATES[template].encode()
        assert {path.name: path.read_bytes() for path in result.iterdir()} == expected


def report(project: Path) -> dict[str, Any]:
    return arrow.read_json(project / "metrics/tokenizers/p/tokenizer.json")


def test_the_report_stands_beside_every_tokenizer(project: Path, run_stage: Runner) -> None:
    """By source, of both splits that are kept; nothing of a dropped document."""
    tiny.tokenizer(project / "models/base/b")
    for settings in ({"mode": "train", "vocab_size": 300}, {"mode": "reuse"}, {"mode": "extend", "new_tokens": 5}):
        write_phase(project, settings, train="training " * 9, eval="evaluation " * 9, dropped="dropped " * 9)
        finished = run_stage(project, "train_tokenizer", "p")
        assert finished.returncode == 0, finished.stderr
        row = report(project)["sources"][0]
        assert (row["documents"], row["bytes"], row["round_trip_failures"]) == (2, 9 * 20, 0)
        assert row["fertility"] == round(row["tokens"] / 18, 6)
        assert ("reference_bytes_per_token" in row) == (settings["mode"] == "extend")
    assert row["bytes_per_token"] > row["reference_bytes_per_token"]


def test_a_base_is_extended_in_place_of_its_file_alone(project: Path, run_stage: Runner) -> None:
    base = tiny.tokenizer(project / "models/base/b")
    write_phase(project, {"mode": "extend", "new_tokens": 5}, train="contract " * 9, eval="evaluation " * 90)
    results = []
    for seed, threads in (("0", "1"), ("1", "3")):
        environment = {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads, "TERROIR_WORKERS": threads}
        assert run_stage(project, "train_tokenizer", "p", **environment).returncode == 0
        results.append({path.name: path.read_bytes() for path in (project / "models/tokenizers/p").iterdir()})
    assert results[0] == results[1]
    own = {path.name: path.read_bytes() for path in base.iterdir() if path.name != "config.json"}
    assert {name for name in own if own[name] != results[0][name]} == {"tokenizer.json"}
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (base, project / "models/tokenizers/p"))
    assert (len(before), len(after)) == (300, 305)
    assert before.all_special_ids == after.all_special_ids
    text = "contract, evaluation </s>"
    assert after.decode(after(text, add_special_tokens=False).input_ids) == text
    assert set(after("contract").input_ids) & set(range(300, 305))
    # Nothing of the eval split, though each of its pairs is ten times as frequent.
    assert all(token in "Ġcontract" for token in after.convert_ids_to_tokens(range(300, 305)))


@pytest.mark.parametrize("cause", ["normalizer", "prefix", "stripped", "decoder"])
@pytest.mark.parametrize("settings", [{"mode": "extend", "new_tokens": 5}, {"mode": "reuse"}])
def test_a_text_that_does_not_come_back_is_told_or_stops_the_stage(
    project: Path, run_stage: Runner, settings: dict[str, Any], cause: str
) -> None:
    """A base with NFKC makes full-width letters small, and means to; a fault of ours would look like a bad decoder.

    So does one that puts a space before each text, or strips one before an added token.
    """
    base = tiny.tokenizer(project / "models/base/b")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    if cause == "normalizer":
        tokenizer.normalizer = NFKC()
    elif cause == "prefix":
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    elif cause == "stripped":
        tokenizer.add_tokens([AddedToken("ＡＢＣ", lstrip=True)])
    else:
        tokenizer.decoder = Strip("\uff21", 1, 0)
    tokenizer.save(str(base / "tokenizer.json"))
    write_phase(project, settings, train="ＡＢＣ " * 9, eval="plain")
    finished = run_stage(project, "train_tokenizer", "p")
    failed = " do not come back from their ids, e.g. of document "
    if settings["mode"] == "reuse" or cause != "decoder":
        assert finished.returncode == 0, finished.stderr
        assert failed in finished.stdout
        assert report(project)["round_trip_failures"] == (2 if cause == "prefix" else 1)
    else:
        assert (finished.returncode, len(finished.stderr.splitlines())) == (1, 1), finished.stderr
        assert failed + "ＡＢＣ Ａ".encode()[:16].hex() in finished.stderr
        assert not (project / "models/tokenizers/p").exists()


def test_a_sample_is_enough_to_learn_from(project: Path, run_stage: Runner) -> None:
    """One document, the one of the lowest id, is all that 5 bytes need, to learn from and to report."""
    write_phase(
        project, {"mode": "train", "vocab_size": 300, "sample_bytes": 5, "report_bytes": 5}, train="bbbb " * 9, eval="e"
    )
    documents, decisions = (
        arrow.table(project / "data" / path) for path in ("clean/p/p_text/documents", "dedup/p/p_text")
    )
    rows = [{**documents.to_pylist()[0], "text": "aaaa " * 9, "doc_id": bytes(16)}, *documents.to_pylist()]
    splits = [{**decisions.to_pylist()[0], "doc_id": bytes(16)}, *decisions.to_pylist()]
    for path, schema, content in (
        ("clean/p/p_text/documents", TEXT_DOCUMENTS, rows),
        ("dedup/p/p_text", DECISIONS, splits),
    ):
        with arrow.Writer(project / "data" / path, schema) as out:
            out.write(pa.Table.from_pylist(content, schema))
    finished = run_stage(project, "train_tokenizer", "p")
    assert finished.returncode == 0, finished.stderr
    vocabulary = arrow.read_json(project / "models/tokenizers/p/tokenizer.json")["model"]["vocab"]
    assert "aaaa" in vocabulary
    assert "bb" not in vocabulary
    assert report(project)["sources"][0]["documents"] == 1


def test_a_rarer_pair_than_min_frequency_is_not_merged(project: Path, run_stage: Runner) -> None:
    """Each pair of letters of "contract" stands 9 times; how many entries are missing then is said."""
    assert trained(["contract " * 9], min_frequency=9).get_vocab_size() > 259
    assert trained(["contract " * 9], min_frequency=10).get_vocab_size() == 259
    tiny.tokenizer(project / "models/base/b")
    for least, wanted, made in ((10, 8, 0), (9, 8, 7), (9, 7, 7)):
        write_phase(project, {"mode": "extend", "new_tokens": wanted, "min_frequency": least}, train="contract " * 9)
        finished = run_stage(project, "train_tokenizer", "p")
        assert finished.returncode == 0, finished.stderr
        assert (f"the text gave {made} entries only, of {wanted}" in finished.stdout) == (made < wanted)
        assert Vocabulary(project / "models/tokenizers/p").size == 300 + made


def test_a_reference_is_known_by_its_digest(project: Path, run_stage: Runner) -> None:
    """DVC does not watch it, so another file in its place is refused."""
    base = tiny.tokenizer(project / "models/base/b")
    content = (base / "tokenizer.json").read_bytes()
    reference = {"path": "models/base/b", "sha256": hashlib.sha256(content).hexdigest()}
    write_phase(project, {"mode": "train", "vocab_size": 400, "report_reference": reference}, train="training " * 9)
    finished = run_stage(project, "train_tokenizer", "p")
    assert finished.returncode == 0, finished.stderr
    row = report(project)["sources"][0]
    assert row["reference_bytes_per_token"] < row["bytes_per_token"]
    (base / "tokenizer.json").write_bytes(content + NEWLINE)
    finished = run_stage(project, "train_tokenizer", "p")
    assert (finished.returncode, len(finished.stderr.splitlines())) == (1, 1), finished.stderr
    assert f"set its sha256 to {hashlib.sha256(content + NEWLINE).hexdigest()}" in finished.stderr


def test_special_tokens_stand_first_in_their_order(tmp_path: Path) -> None:
    """RoBERTa's five; a mask takes the space before it, as the word did in whose place it stands."""
    order = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    settings = params(special_tokens=order, unk_token="<unk>", mask_token="<mask>")
    tokenizer = train(iter(CORPUS), settings)
    assert [tokenizer.id_to_token(number) for number in range(6)] == [*order, "!"]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    arrow.write_json(tmp_path / "tokenizer_config.json", config(settings))
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert (found.mask_token, found.unk_token, found.mask_token_id, found.pad_token_id) == ("<mask>", "<unk>", 4, 1)
    ids = [found(text, add_special_tokens=False).input_ids for text in ("the", " sat", "the <mask> sat")]
    assert ids[2] == [*ids[0], 4, *ids[1]]
    assert sorted(found.all_special_ids) == [0, 1, 2, 3, 4]


BAD_BASES = {
    "no tokenizer": (
        {},
        "models/base/b has no tokenizer.json; `train_tokenizer` writes it (mode: train makes a new one)",
    ),
    "no settings": ({"tokenizer.json": TOKENIZER.to_str()}, "has no tokenizer_config.json"),
    "no EOS": (
        {"tokenizer.json": TOKENIZER.to_str(), "tokenizer_config.json": '{"bos_token": "<s>"}'},
        "names no eos_token, so no document would have an end",
    ),
    "EOS as a number": (
        {"tokenizer.json": TOKENIZER.to_str(), "tokenizer_config.json": '{"eos_token": 5}'},
        "models/base/b/tokenizer_config.json: eos_token is 5; write the token there as a string",
    ),
    "a Git LFS pointer": (
        {"tokenizer.json": "version https://git-lfs", "tokenizer_config.json": '{"eos_token": "</s>"}'},
        "models/base/b holds no tokenizer that can be read",
    ),
    "a form of before tokenizer.json": (
        {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": '{"eos_token": "</s>"}'},
        "models/base/b has no tokenizer.json but a vocab.json; open it with transformers' AutoTokenizer",
    ),
    "settings that are a list": (
        {"tokenizer.json": TOKENIZER.to_str(), "tokenizer_config.json": "[1]"},
        "models/base/b holds no tokenizer that can be read",
    ),
}


@pytest.mark.parametrize("case", BAD_BASES)
def test_a_base_without_a_fit_tokenizer_gets_one_sentence(project: Path, run_stage: Runner, case: str) -> None:
    """And the tokenizer of the last good run stays as it was."""
    files, sentence = BAD_BASES[case]
    write_phase(project, {"mode": "reuse"}, train="a", eval="b")
    for name, text in {"config.json": '{"model_type": "llama"}', **files}.items():
        write(project / "models/base/b" / name, text)
    write(project / "models/tokenizers/p/tokenizer.json", "of the last good run")
    finished = run_stage(project, "train_tokenizer", "p")
    assert (finished.returncode, len(finished.stderr.splitlines())) == (1, 1), finished.stderr
    assert sentence in finished.stderr
    assert [path.read_text() for path in (project / "models/tokenizers/p").iterdir()] == ["of the last good run"]


@pytest.mark.parametrize("settings", [{"mode": "extend", "new_tokens": 5}, {"mode": "reuse"}])
def test_dropout_of_a_base_is_left_out(project: Path, run_stage: Runner, settings: dict[str, Any]) -> None:
    """With it the same text has other ids each time. Weights, and a qwen2, are no hindrance to these modes."""
    base = tiny.tokenizer(project / "models/base/b")
    save_file({}, base / "model.safetensors")
    write(base / "config.json", '{"model_type": "qwen2"}')
    content = json.loads((base / "tokenizer.json").read_text())
    write_phase(project, settings, train="the cat sat on the mat, the cat " * 9, eval="plain")
    made = []
    for dropout in (None, 0.5):
        content["model"]["dropout"] = dropout
        (base / "tokenizer.json").write_text(json.dumps(content))
        finished = run_stage(project, "train_tokenizer", "p")
        assert ("the dropout of the base's tokenizer is left out" in finished.stdout) == bool(dropout)
        made.append(json.loads((project / "models/tokenizers/p/tokenizer.json").read_text()))
    assert made[0] == made[1]
    text = "the cat sat on the mat"
    assert len({tuple(Vocabulary(base).tokenizer.encode(text).ids) for _ in range(20)}) == 1


@pytest.mark.parametrize(
    ("kind", "weights", "sentence"),
    [
        ("qwen2", False, "models/base/b is a qwen2"),  # transformers would replace it
        ("llama", True, "models/base/b has weights, which know the tokens of its own tokenizer"),
    ],
)
def test_no_tokenizer_is_trained_for_a_base_that_needs_its_own(
    project: Path, run_stage: Runner, kind: str, weights: bool, sentence: str
) -> None:
    write_phase(project, {"mode": "train", "vocab_size": 300}, train="a", eval="b")
    write(project / "models/base/b/config.json", json.dumps({"model_type": kind}))
    if weights:
        save_file({}, project / "models/base/b/model.safetensors")
    finished = run_stage(project, "train_tokenizer", "p")
    assert (finished.returncode, len(finished.stderr.splitlines())) == (1, 1), finished.stderr
    assert sentence in finished.stderr


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mode": "train"}, "mode train needs `vocab_size`"),
        ({"mode": "train", "vocab_size": 300, "mask_token": "<s>"}, "mask_token <s> has another use already"),
        ({"mode": "train", "vocab_size": 258}, "no room for 256 bytes and 3 specials"),
        ({"mode": "reuse", "vocab_size": 300}, "leave `vocab_size` out"),
        (
            {"mode": "train", "vocab_size": 300, "eos_token": "<e>", "chat_template": "chatml"},
            "chatml ends documents with <.im_end.>: leave `eos_token` out",
        ),
        ({"mode": "extend"}, "mode extend needs `new_tokens`"),
        (
            {"mode": "train", "vocab_size": 300, "new_tokens": 5},
            "`new_tokens` is for mode extend; mode train adds none",
        ),
        ({"mode": "extend", "new_tokens": 5, "vocab_size": 300}, "mode extend takes the base's vocabulary"),
        ({"mode": "extend", "new_tokens": 5, "pre_tokenizer": "llama3"}, "takes pre_tokenizer from the base"),
        ({"mode": "reuse", "bos_token": "<s>"}, "takes bos_token from the base"),
        ({"mode": "train", "vocab_size": 259, "special_tokens": ["<a>"]}, "no room for 256 bytes and 4 specials"),
        ({"mode": "reuse", "chat_template": "chatml2"}, "no chat_template `chatml2`; known: human_assistant"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Params.model_validate(settings)
