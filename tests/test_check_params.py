"""check_params: a mistake in params.yaml ends in one sentence that names line, key and remedy, before anything runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import check_params
from conftest import ROOT, Runner

DEFAULT = (ROOT / "params.yaml").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def check(text: str) -> None:
    Path("params.yaml").write_text(text, encoding="utf-8")
    check_params.check()


def edited(old: str, new: str) -> str:
    assert old in DEFAULT, f"params.yaml no longer holds {old!r}"
    return DEFAULT.replace(old, new, 1)


def test_the_default_is_in_order() -> None:
    check(DEFAULT)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("sources:  ", "soruces:  ", r"line \d+: unknown key `soruces`; did you mean `sources`\?"),
        (
            "learning_rate: 6e-3",
            "learing_rate: 6e-3",
            r"`phases.pretrain.train_model.learing_rate`; did you mean `learning_rate`",
        ),
        (
            "      r: 16",
            "      rank: 16",
            r"unknown key `phases.chat.train_model.lora.rank`; did you mean `r`|known keys here: .*\br\b",
        ),
        (
            "max_steps: 180",
            "max_steps: many",
            r"`phases.pretrain.train_model.max_steps` is 'many': input should be a valid integer",
        ),
        (
            "max_steps: 180",
            "max_steps: 0",
            r"`phases.pretrain.train_model.max_steps` is 0: input should be greater than or equal to 1",
        ),
        ("eval_fraction: 0.05", "eval_fraction: 1.5", r"eval_fraction` is 1.5: input should be less than 1"),
        ("block_size: 256", "block_size: 2", r"block_size` is 2: input should be greater than or equal to 8"),
        ("mode: train, ", "mode: trian, ", r"mode` is 'trian': input should be 'train' or 'reuse'"),
        ("vocab_size: 4096, ", "", r"mode train needs `vocab_size`"),
        ("vocab_size: 4096", "vocab_size: 257", r"vocab_size 257 has no room for 256 bytes and 3 specials"),
        (
            "chat_template: human_assistant",
            "chat_template: llama9",
            r"there is no chat_template `llama9`; known: .*human_assistant",
        ),
        ("    phase: chat\n", "    phase: chatt\n", r"sources.python_qa.phase is `chatt`.*did you mean `chat`\?"),
        ("path: data/raw/python_qa", "path: ../elsewhere", r"the path '../elsewhere' leads out of the repository"),
        ("path: data/raw/python_qa", "path: /etc", r"the path '/etc' leads out of the repository"),
        ("path: data/raw/python_qa", "path: ~/text", r"the path '~/text' leads out of the repository"),
        (
            "base: models/pretrain/merged",
            "base: models/pretrian/merged",
            r"no phase `pretrian`; did you mean `pretrain`\?",
        ),
        ("base: models/pretrain/merged", "base: models/chat/merged", r"phases chat build on each other"),
        ("      license: PSF-2.0\n", "", r"the key `sources.python_reference.clean.license` is missing; add it"),
        ("  python_qa:\n", "  Python QA:\n", r"the name `Python QA` becomes a folder: use lower-case"),
        ("sources:  ", "sources: [  ", r"params.yaml line \d+, column \d+: not valid YAML"),
        ("    dedup: {eval_fraction: 0.05, seed: 0}\n", "", r"the key `phases.pretrain.dedup` is missing"),
    ],
)
def test_a_mistake_is_one_sentence(old: str, new: str, sentence: str) -> None:
    with pytest.raises(SystemExit) as caught:
        check(edited(old, new))
    message = str(caught.value.code)
    assert re.search(sentence, message), message
    assert "\n" not in message and message.startswith("params.yaml")


def test_the_line_is_the_one_of_the_key() -> None:
    text = edited("learning_rate: 6e-3", "learing_rate: 6e-3")
    line = 1 + text[: text.index("learing_rate")].count("\n")
    with pytest.raises(SystemExit, match=f"line {line}:"):
        check(text)


def test_a_phase_without_sources() -> None:
    start = DEFAULT.index("  python_qa:")
    with pytest.raises(SystemExit, match="phase `chat` has no source; give a source `phase: chat`"):
        check(DEFAULT[:start] + DEFAULT[DEFAULT.index("phases:  ") :])


@pytest.mark.parametrize("stage", ["clean", "dedup", "marked", "tokens"])
def test_what_a_removed_source_left_behind(stage: str) -> None:
    (Path("data") / stage / "pretrain/old").mkdir(parents=True)
    with pytest.raises(SystemExit, match=rf"data/{stage}/pretrain/old belongs to no source.*rm -r data/{stage}"):
        check(DEFAULT)


@pytest.mark.parametrize("folder", ["models/old", "models/tokenizers/old", "data/blocks/old"])
def test_what_a_removed_phase_left_behind(folder: str) -> None:
    Path(folder).mkdir(parents=True)
    with pytest.raises(SystemExit, match=f"{folder} belongs to no phase.*rm -r {folder}"):
        check(DEFAULT)


def test_what_belongs_there_is_left_alone() -> None:
    for folder in ("data/clean/pretrain/python_reference", "models/pretrain/trained", "models/tokenizers/chat"):
        Path(folder).mkdir(parents=True)
    check(DEFAULT)


def test_yaml_is_read_as_dvc_reads_it() -> None:
    """YAML 1.2: `1e-4` is a number, `no` is text."""
    from kit.params import load

    Path("params.yaml").write_text("a: 1e-4\nb: no\nc: 010\n")
    assert load() == {"a": 1e-4, "b": "no", "c": 10}


def test_an_unknown_phase_or_source_on_the_command_line(project: Path, run_stage: Runner) -> None:
    done = run_stage(project, "dedup", "pretrian")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "params.yaml: there is no `pretrian` in phases; it holds chat, pretrain." in done.stderr


def test_every_stage_refuses_before_it_works(project: Path, run_stage: Runner) -> None:
    """A mistake in a group that the stage itself does not read."""
    path = project / "params.yaml"
    path.write_text(path.read_text().replace("learning_rate", "learing_rate"))
    done = run_stage(project, "clean", "python_qa")
    assert done.returncode == 1 and "did you mean `learning_rate`?" in done.stderr


def test_outside_of_the_repository(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"params\.yaml is not in the current folder"):
        check_params.check()
