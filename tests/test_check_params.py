"""check_params: a mistake in params.yaml gets one sentence, what, where and what to do, before any stage works."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

import check_params
import params_schema
import score_report
import train_model
from conftest import ROOT, Runner, write
from kit import params

TEXT = """\
imports: {}
bases: {}
exports: {}
sources:
  laws:
    phase: law
    path: data/raw/laws
    clean:
      format: text
      license: CC0-1.0
phases:
  law:
    base: models/configs/llama_small
    dedup: {eval_fraction: 0.05}
    train_tokenizer: {mode: train, vocab_size: 300}
    group_blocks: {block_size: 16}
    train_model: {max_steps: 1, global_batch_size: 1, per_device_train_batch_size: 1, learning_rate: 1e-3}
    merge_lora: {}
    evaluate_model: {max_length: 16}
"""
SECOND = TEXT[TEXT.index("  law:\n    base") :].replace("law:", "chat:", 1)
CHATS = "  chats:\n    phase: chat\n    path: data/raw/chats\n    clean: {format: text, license: CC0-1.0}\n"
BASE = "models/configs/llama_small"


def said(text: str) -> str | None:
    """Return what `check` says about a params.yaml in the current folder, or None when it is in order."""
    Path("params.yaml").write_text(text, encoding="utf-8")
    try:
        check_params.check()
    except SystemExit as sentence:
        return str(sentence)
    return None


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with nothing but a base."""
    write(tmp_path / "models/configs/llama_small/config.json", '{"model_type": "llama"}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


# name -> (what stands in the file, what stands there by mistake, the sentence)
MISTAKES = {
    "a misspelt section": ("sources:", "soruces:", r"line 4: unknown key `soruces`; did you mean `sources`\?"),
    "a misspelt key": (
        "format:",
        "fromat:",
        r"line 9: unknown key `sources\.laws\.clean\.fromat`; did you mean `format`\?",
    ),
    "a misspelt stage": ("dedup:", "dedupe:", r"line 14: unknown key `phases\.law\.dedupe`; did you mean `dedup`\?"),
    "a misspelt key in braces": (
        "eval_fraction",
        "eval_fracton",
        r"line 14: unknown key .* did you mean `eval_fraction`\?",
    ),
    "a key like no other": (
        "license: CC0-1.0",
        "license: CC0-1.0\n      zzz: 1",
        "line 11: unknown key .* known keys here: collected_on, columns",
    ),
    "a wrong type": (
        "block_size: 16",
        "block_size: many",
        r"line 16: `phases\.law\.group_blocks\.block_size` is 'many': input should be a valid integer",
    ),
    "a half block": ("block_size: 16", "block_size: 16.5", "line 16: .* is 16.5: input should be a valid integer"),
    "a value too small": (
        "block_size: 16",
        "block_size: 4",
        "line 16: .* is 4: input should be greater than or equal to 8",
    ),
    "all held out": ("eval_fraction: 0.05", "eval_fraction: 1", "line 14: .* is 1: input should be less than 1"),
    "a seed beyond 64 bits": (
        "eval_fraction: 0.05",
        "seed: 18446744073709551616",
        "line 14: .* input should be less than",
    ),
    "a misspelt score": (
        "max_length: 16",
        'max_length: 16, require: ["token_accuracy > 0", "chnge.bits_per_byte < 0"]',
        r"phases\.law\.evaluate_model\.require names chnge\.bits_per_byte, which is no score of this phase; "
        r"did you mean `change\.bits_per_byte`\?",
    ),
    "a score of another objective": (
        "max_length: 16",
        "max_length: 16, require: [masked_loss < 3]",
        "require names masked_loss, which is no score of this phase",
    ),
    "a score of another phase's source": (
        "max_length: 16",
        "max_length: 16, require: [sources.rules.merged < 3]",
        r"did you mean `sources\.laws\.merged`\?",
    ),
    "no number in a requirement": (
        "max_length: 16",
        "max_length: 16, require: [loss < 1.2.3]",
        "line 19: .*'loss < 1.2.3' is no requirement: write a score",
    ),
    "a task that nobody wrote": (
        "max_length: 16",
        "max_length: 16, lm_eval_tasks: [quiz]",
        "lm_eval_tasks names quiz, but no .yaml file in data/benchmarks has `task: quiz`; add it, or remove the name",
    ),
    "a word not in the list": ("format: text", "format: doc", "line 9: .* is 'doc': input should be 'text'"),
    "a misspelt rule": (
        "format: text",
        "format: text\n      rules: [nfcc]",
        "line 10: .*no rule `nfcc`; did you mean `nfc`",
    ),
    "a misspelt key of a rule": (
        "format: text",
        "format: text\n      rules: [{rule: length, min_char: 3}]",
        r"line 10: .*rules\.0`: the rule `length` has no key `min_char`; did you mean `min_chars`\?",
    ),
    "no licence": (
        "      license: CC0-1.0\n",
        "",
        r"line 8: the key `sources\.laws\.clean\.license` is missing; add it",
    ),
    "a blank licence": ("license: CC0-1.0", "license: ' '", "line 10: .*license` is ' ': string should match pattern"),
    "an empty licence": ("license: CC0-1.0", "license: ''", "line 10: .* should have at least 1 character"),
    "a list for a mapping": ("sources:\n", "sources: []\nx:\n", "unknown key `x`"),
    "nothing for a mapping": (
        "imports: {}",
        "imports:",
        "line 1: `imports` is None: input should be a valid dictionary",
    ),
    "a path upwards": (
        "data/raw/laws",
        "data/raw/../../laws",
        "line 7: .*`sources.laws.path`.* leads out of the repository",
    ),
    "an absolute path": (
        "data/raw/laws",
        "/srv/laws",
        "line 7: .*'/srv/laws' leads out of the repository; copy or link",
    ),
    "a path from home": ("data/raw/laws", "~/laws", "line 7: .*'~/laws' leads out of the repository"),
    "a base outside": ("models/configs/llama_small", "../llama", "line 13: .*`phases.law.base`.* leads out"),
    "an empty path": ("data/raw/laws", "''", "line 7: .* should have at least 1 character"),
    "a name with a slash": ("  laws:", "  a/b:", "line 5: .*the name `a/b` becomes a folder: use lower-case letters"),
    "a name in capitals": ("  laws:", "  Laws:", "line 5: .*the name `Laws` becomes a folder"),
    "a name that begins with _": ("  laws:", "  _laws:", "line 5: .*the name `_laws` becomes a folder"),
    "a name of 101 letters": ("  laws:", f"  {'a' * 101}:", "becomes a folder: use .*, 100 at most"),
    "an unknown phase": (
        "phase: law",
        "phase: lwa",
        r"sources\.laws\.phase is `lwa`, not a key of `phases`; did you mean `law`\?",
    ),
    "a phase like no other": ("phase: law", "phase: zzz", "is `zzz`, not a key of `phases`; the phases are law"),
    "a phase without sources": (
        "phases:\n",
        "phases:\n" + SECOND,
        "phase `chat` has no source; give a source `phase: chat` or remove",
    ),
    "a base phase that is not there": (
        "base: models/configs/llama_small",
        "base: models/lwa/merged",
        r"there is no phase `lwa`; did you mean `law`\?",
    ),
    "a base that nothing brings": (
        "base: models/configs/llama_small",
        "base: models/base/bloom",
        r"phases\.law\.base is models/base/bloom, which is not there and .* does not bring; the bases are none",
    ),
    "a base without a name": (
        "base: models/configs/llama_small",
        "base: models/base",
        "does not bring; the bases are none",
    ),
    "a base of the configs": (
        "base: models/configs/llama_small",
        "base: models/configs/llama_smal",
        r"phases\.law\.base is models/configs/llama_smal, which is not there; did you mean `llama_small`\?",
    ),
    "a base of the Hub": (
        "base: models/configs/llama_small",
        "base: Qwen/Qwen3-0.6B",
        "which is no folder here; of an open model name `repo_id` and `revision` under `bases`, and take",
    ),
    "a benchmark that is not there": (
        "    dedup: {eval_fraction: 0.05}\n",
        "    dedup: {eval_fraction: 0.05, decontaminate: {quiz: {}}}\n",
        r"phases\.law\.dedup\.decontaminate names quiz, but neither data/benchmarks/quiz\.jsonl nor \.txt is there",
    ),
    "a general text that is not there": (
        "{max_length: 16}",
        "{max_length: 16, general: [quiz]}",
        r"phases\.law\.evaluate_model\.general names quiz, but neither data/benchmarks/quiz\.jsonl nor \.txt is there",
    ),
    "a number in quotes": ("vocab_size: 300", "vocab_size: '300'", r"line 15: `.*vocab_size` is '300': .* integer"),
    "conversations beside a text": (
        "phases:\n",
        "  more:\n    phase: law\n    path: data/raw/more\n"
        "    clean: {format: jsonl, record: messages, license: CC0-1.0}\nphases:\n",
        "this phase holds conversations; name a chat_template",
    ),
    "a phase on itself": (
        "base: models/configs/llama_small",
        "base: models/law/merged",
        "the phases law build on each other",
    ),
    "two phases on each other, and one on them": (
        TEXT[TEXT.index("phases:\n") :],
        CHATS
        + CHATS.replace("chat", "talk")
        + TEXT[TEXT.index("phases:\n") :].replace(BASE, "models/chat/merged")
        + SECOND.replace(BASE, "models/talk/trained")
        + SECOND.replace("chat:", "talk:").replace(BASE, "models/chat/merged"),
        "the phases law and chat and talk build on each other; one of them must start from another base",
    ),
    "a new tokenizer for a model of another phase": (
        "phases:\n",
        "  chats:\n    phase: chat\n    path: data/raw/chats\n    clean: {format: text, license: CC0-1.0}\nphases:\n"
        + SECOND.replace("models/configs/llama_small", "models/law/merged"),
        r"phases\.chat\.train_tokenizer: models/law/merged knows the tokens of its own tokenizer and no new ones; set",
    ),
    "a template for a tokenizer that an earlier phase trains without its tokens": (
        "phases:\n",
        "  chats:\n    phase: chat\n    path: data/raw/chats\n    clean: {format: text, license: CC0-1.0}\nphases:\n"
        + SECOND.replace("models/configs/llama_small", "models/law/merged").replace(
            "{mode: train, vocab_size: 300}", "{mode: reuse, chat_template: chatml}"
        ),
        r"phases\.chat\.train_tokenizer: chat_template chatml needs the special tokens <\|im_end\|> and "
        r"<\|im_start\|>; name them in phases\.law\.train_tokenizer\.special_tokens \(it trains the tokenizer\), set "
        "mode to extend, or choose human_assistant or default, which need none",
    ),
    "conversations without a template": (
        "format: text",
        "format: jsonl\n      record: messages",
        r"phases\.law\.train_tokenizer: this phase holds conversations; name a chat_template, one of human_assistant",
    ),
    "a masked model without a mask": (
        "max_steps: 1",
        "max_steps: 1, objective: mlm",
        r"phases\.law\.train_tokenizer: `objective: mlm` needs a mask_token; add one",
    ),
    "a rule for a source that is none": (
        "block_size: 16",
        "block_size: 16, mode: line, long_documents: {law: drop}",
        r"phases\.law\.group_blocks\.long_documents names law, no source of this phase; its sources: laws",
    ),
    "a weight for a source that is none": (
        "block_size: 16",
        "block_size: 16, weights: {law: 2}",
        r"phases\.law\.group_blocks\.weights names law, no source of this phase; its sources: laws",
    ),
    "the first of all sources, that is none": (
        "eval_fraction: 0.05",
        "eval_fraction: 0.05, priority: [law]",
        r"phases\.law\.dedup: `priority` names `law`, which is no source of this phase; did you mean `laws`\?",
    ),
    "a word for one source that is none": (
        "block_size: 16",
        "block_size: 16, mode: line, long_documents: {laws: cut}",
        r"line 16: `phases\.law\.group_blocks\.long_documents\.laws` is 'cut': input should be 'split', 'truncate' or",
    ),
    "a rule with a list for its name": (
        "format: text",
        "format: text\n      rules: [{rule: [length]}]",
        r"there is no rule `\['length'\]`; did you mean `length`",
    ),
    "a rule with text for a number": (
        "format: text",
        "format: text\n      rules: [{rule: length, min_chars: '8'}]",
        "input should be a valid integer",
    ),
    "a rule that keeps nothing": (
        "format: text",
        "format: text\n      rules: [{rule: length, min_chars: 9, max_chars: 8}]",
        "no text has 9 chars at least and 8 at most; correct one of them",
    ),
    "a sign of two uses": (
        "format: text",
        "format: csv\n      quotechar: ','",
        "',' cannot be both what separates fields and what stands around them",
    ),
    "a line end between fields": (
        "format: text",
        'format: csv\n      delimiter: "\\n"',
        "`delimiter` cannot be a line end or NUL; name the sign that stands in the file",
    ),
    "a key twice": ("phases:\n", "phases:\n  law: {}\n", "line 13, column 3: not valid YAML .*duplicate key"),
    "a stage left out": ("    dedup: {eval_fraction: 0.05}\n", "", r"line 12: the key `phases\.law\.dedup` is missing"),
    "no steps": (
        "max_steps: 1",
        "max_steps: 0",
        "line 17: .*max_steps` is 0: input should be greater than or equal to 1",
    ),
    "LoRA's rank by its name": (
        "max_steps: 1",
        "max_steps: 1, lora: {rank: 8, lora_alpha: 16, target_modules: [q_proj]}",
        r"line 17: unknown key `phases\.law\.train_model\.lora\.rank`; .*`r`|known keys here: .*\br\b",
    ),
    "an unknown template": (
        "vocab_size: 300",
        "vocab_size: 300, chat_template: llama9",
        "there is no chat_template `llama9`; known: human_assistant",
    ),
    "a tab": ("  laws:", "\tlaws:", "line 5, column 1: not valid YAML"),
    "a day that there is not": ("CC0-1.0", "2026-02-30", r"looks like a date and is none \(day is out of .* quotes"),
    "a day without quotes": (
        "license: CC0-1.0",
        "license: CC0-1.0\n      collected_on: 2026-02-28",
        r"line 11: `sources\.laws\.clean\.collected_on`: put the day in quotes: '2026-02-28'; DVC cannot",
    ),
    "a control character": ("CC0-1.0", "CC0\x01", "not valid YAML .*unacceptable character #x0001.*remove it"),
    "no closing brace": ("block_size: 16}", "block_size: 16", r"line 17, column \d+: not valid YAML"),
    "reuse with a size": (
        "mode: train",
        "mode: reuse",
        "line 15: .*`phases.law.train_tokenizer`.* leave `vocab_size` out",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_gets_one_sentence_with_its_line(here: Path, case: str) -> None:
    old, new, sentence = MISTAKES[case]
    assert TEXT.count(old) >= 1
    found = said(TEXT.replace(old, new, 1))
    assert found is not None
    assert "\n" not in found
    assert found.startswith("params.yaml")
    assert re.search(sentence, found), found


@pytest.mark.parametrize("name", ["base", "configs", "exports", "runs", "tokenizers"])
def test_a_phase_is_not_called_like_a_folder_that_has_a_use(here: Path, name: str) -> None:
    text = TEXT.replace(
        "phases:\n", CHATS.replace("chat\n", f"{name}\n") + "phases:\n" + SECOND.replace("chat:", f"{name}:")
    )
    assert re.search(f"a phase cannot be called `{name}`: the folder of that name has a use already", said(text) or "")


def test_params_in_order_pass(here: Path) -> None:
    assert said(TEXT) is None
    assert said((ROOT / "params.yaml").read_text(encoding="utf-8")) is None


def test_what_an_evaluation_will_measure_may_be_required(here: Path) -> None:
    write(here / "data/benchmarks/novel-1.txt", "Call me Ishmael.\n")
    write(here / "data/benchmarks/quiz.yaml", "task: quiz\n")
    names = ["loss", "trained.loss", "change.bits_per_byte", "sources.laws.base", "general.novel-1.merged"]
    names += ["quantized.nf4.perplexity", "scale.gzip", "tasks.merged.quiz.exact_match,strict-match"]
    require = [f"{name} >= -1.5e+3" for name in [*names, "generated.merged.chrf", "contamination.clean.merged"]]
    asked = {"general": ["novel-1"], "quantized": ["nf4"], "lm_eval_tasks": ["quiz"], "require": require}
    assert said(TEXT.replace("{max_length: 16}", json.dumps({"max_length": 16, **asked}))) is None


def test_the_worked_example_of_the_docstring(here: Path) -> None:
    text = "\n" * 11 + TEXT[TEXT.index("sources:") :].replace("sources:", "soruces:") + "imports: {}\nbases: {}\n"
    assert said(text) == "params.yaml line 12: unknown key `soruces`; did you mean `sources`?"


def test_the_order_of_keys_decides_nothing(here: Path) -> None:
    """DVC calls a stage up to date whose keys have another order; peft takes the first pattern that fits."""
    lora = "lora: {target_modules: [q_proj], rank_pattern: {%s}}"
    found = []
    for patterns in ("q_proj: 4, 0.q_proj: 2", "0.q_proj: 2, q_proj: 4"):
        text = TEXT.replace("learning_rate: 1e-3", f"learning_rate: 1e-3, {lora % patterns}")
        assert said(text) is None
        trained = params.read_params("phases.law.train_model", train_model.Params)
        assert trained.lora
        found.append(list(trained.lora.arguments()["rank_pattern"].items()))
    assert found == [[("0.q_proj", 2), ("q_proj", 4)]] * 2
    mixed = {"b": [{"z": 1, "y": 2}], 10: 0, 9: 0, "a": {"d": 1, "c": {"f": 0, "e": 0}}}
    assert json.dumps(params._by_name(mixed)) == (
        '{"9": 0, "10": 0, "a": {"c": {"e": 0, "f": 0}, "d": 1}, "b": [{"y": 2, "z": 1}]}'
    )


def test_a_number_is_read_as_dvc_reads_it(here: Path) -> None:
    """YAML 1.2: 1e-3 is a number, `no` is text, and 010 is ten. What is used is what stands there: no 1e3 for 1000."""
    assert said(TEXT.replace("license: CC0-1.0", "license: no")) is None
    assert said(TEXT.replace("block_size: 16", "block_size: 010")) is None
    for wrong in ("1e3", '"16"', "true"):
        found = said(TEXT.replace("block_size: 16", f"block_size: {wrong}"))
        assert found and "block_size` is" in found and "input should be a valid integer" in found


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "expected keys such as `sources:` and `phases:`, found none"),
        (b"sources: \xff", "byte 9 is not UTF-8; save the file as UTF-8"),
    ],
)
def test_a_file_that_is_no_params_is_refused(here: Path, text: bytes, sentence: str) -> None:
    (here / "params.yaml").write_bytes(text)
    with pytest.raises(SystemExit, match=sentence):
        check_params.check()


def test_a_run_from_another_folder_is_refused(here: Path) -> None:
    with pytest.raises(SystemExit, match=r"params\.yaml is not in the current folder: run this from the root"):
        check_params.check()


@pytest.mark.parametrize(
    "path", [f"data/{stage}/law/gone" for stage in ("clean", "sources", "dedup", "marked", "tokens")]
)
def test_the_folder_of_a_source_that_was_removed_is_refused(here: Path, path: str) -> None:
    """A stage that reads the phase's folder would bring its text back."""
    write(here / path / "manifest.json", "{}")
    assert said(TEXT) == f"{path} belongs to no source in params.yaml, but would still be read; delete it: rm -r {path}"


@pytest.mark.parametrize("path", ["data/blocks/gone", "models/tokenizers/gone", "models/gone"])
def test_the_folder_of_a_phase_that_was_removed_is_refused(here: Path, path: str) -> None:
    write(here / path / "x", "")
    assert said(TEXT) == f"{path} belongs to no phase in params.yaml; delete it: rm -r {path}"


def test_all_that_is_left_over_is_named_at_once(here: Path) -> None:
    paths = ["data/tokens/law/gone", "models/gone", "models/exports/old"]
    for path in paths:
        write(here / path / "x", "")
    assert str(said(TEXT)).endswith(f"delete it and 2 more: rm -r {' '.join(paths)}")


def test_an_export_that_was_removed_is_refused(here: Path) -> None:
    """It would be given away as it was, whatever is taken out of its model."""
    write(here / "models/exports/old/model.gguf", "")
    sentence = "models/exports/old belongs to no export in params.yaml, and no stage renews it; "
    assert said(TEXT) == sentence + "delete it: rm -r models/exports/old"


def test_folders_of_this_params_yaml_and_hidden_ones_are_no_leftovers(here: Path) -> None:
    """What a killed stage left (.tmp-*) is its own business; imported bases and configs belong to no phase."""
    for path in ("data/clean/law/laws", "data/clean/law/.tmp-laws", "data/blocks/law", "models/law/trained"):
        write(here / path / "x", "")
    for path in ("models/base/bloom", "models/configs/x", "models/tokenizers/law", "models/.tmp-x"):
        write(here / path / "x", "")
    assert said(TEXT) is None


MUTATIONS: list[Callable[[list[str], int, str], Any]] = [
    lambda lines, at, word: lines.pop(at),
    lambda lines, at, word: lines.insert(at, lines[0]),
    lambda lines, at, word: lines.__setitem__(at, lines[at].split(":")[0] + ": " + word),
    lambda lines, at, word: lines.__setitem__(at, lines[at] + word),
    lambda lines, at, word: lines.__setitem__(at, "  " + lines[at]),
]
WORDS = [
    "null",
    "[]",
    "{}",
    "-1",
    "no",
    "'",
    "&a",
    "*a",
    "<<: *x",
    ": ",
    "- ",
    "\t",
    "!!python/object x",
    "{a: b}",
    "? ",
    "1: 2",
    ".inf",
    "9" * 30,
]


@pytest.mark.filterwarnings("ignore::ruamel.yaml.error.ReusedAnchorWarning")
@given(
    st.lists(
        st.tuples(st.sampled_from(MUTATIONS), st.integers(0, 10**6), st.sampled_from(WORDS)), min_size=1, max_size=3
    )
)
def test_no_damage_to_the_file_ends_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[Callable[..., Any], int, str]]
) -> None:
    """Lines lost, doubled, moved, values replaced: order, or one sentence."""
    lines = TEXT.splitlines()
    for edit, at, word in edits:
        edit(lines, at % len(lines), word)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.getbasetemp())
        found = said("\n".join(lines))
    assert found is None or ("\n" not in found and len(found) > 20)


@pytest.mark.parametrize(
    ("old", "new", "arguments", "sentence"),
    [
        ("format:", "fromat:", ("clean", "laws"), "did you mean `format`?"),
        ("max_steps", "max_step", ("clean", "laws"), "did you mean `max_steps`?"),  # a group of another stage
        ("phase: law", "phase: lwa", ("tokenize_text", "laws"), "did you mean `law`?"),
        ("x", "x", ("clean", "lawz"), "there is no `lawz` in sources; it holds laws"),
        ("x", "x", ("dedup", "pretrain"), "there is no `pretrain` in phases; it holds law"),
        ("x", "x", ("clean", "laws"), "data/raw/laws does not exist; put the files there"),
        (
            "x",
            "x",
            ("dedup", "law"),
            "data/clean/law does not exist; put the files there, or run the stage that writes it",
        ),
    ],
)
def test_a_stage_command_ends_with_the_sentence_alone(
    project: Path, run_stage: Runner, old: str, new: str, arguments: tuple[str, str], sentence: str
) -> None:
    """Exit status 1, nothing on stdout, no traceback, and no folder begun."""
    write(project / "params.yaml", TEXT.replace(old, new, 1))
    data = sorted((project / "data").iterdir())
    finished = run_stage(project, *arguments)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert len(finished.stderr.splitlines()) == 1, finished.stderr
    assert sentence in finished.stderr
    assert sorted((project / "data").iterdir()) == data


def test_the_command_says_that_all_is_in_order(project: Path, run_stage: Runner) -> None:
    finished = run_stage(project, "check_params")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout == "params.yaml: in order\n"


def test_a_folder_of_no_source_of_the_phase_is_no_input(here: Path) -> None:
    """A stage that read it would bring back the text of a source that was removed. What is hidden is no source."""
    assert said(TEXT) is None
    for name in ("laws", ".tmp-laws"):
        (here / "data/clean/law" / name).mkdir(parents=True)
    assert params.phase_sources("law", Path("data/clean/law")) == ["laws"]
    (here / "data/clean/law/old").mkdir()
    with pytest.raises(
        SystemExit, match=r"data/clean/law/old belongs to no source of phase law .* rm -r data/clean/law/old"
    ):
        params.phase_sources("law", Path("data/clean/law"))


def test_raw_files_that_are_not_there_are_said(project: Path, run_stage: Runner) -> None:
    """By the command alone, and not of what an import writes; DVC would name a file and no source."""
    write(project / "params.yaml", TEXT)
    finished = run_stage(project, "check_params")
    assert (finished.returncode, finished.stdout) == (1, "")
    assert "sources.laws.path: data/raw/laws does not exist; put the files there, correct" in finished.stderr
    write(project / "data/raw/laws.dvc", "")
    assert "data/raw/laws does not exist; run `dvc pull`." in run_stage(project, "check_params").stderr
    write(project / "data/raw/laws/a.txt", "text")
    assert run_stage(project, "check_params").returncode == 0
    (project / "data/raw/laws/.git").mkdir()
    (project / "data/raw/laws/.git/lock").symlink_to("gone")  # DVC does not look there
    (project / "data/raw/laws/deep").mkdir()
    (project / "data/raw/laws/deep/link.txt").symlink_to("../a.txt")
    assert run_stage(project, "check_params").returncode == 0
    strange: dict[str, tuple[Callable[[Path], Any], str]] = {
        "deep/.#a b": (
            lambda path: path.symlink_to("me@host"),
            "'data/raw/laws/deep/.#a b' leads nowhere, on which DVC",
        ),
        "pipe": (os.mkfifo, "data/raw/laws/pipe is a pipe or a device, on which DVC stops; remove it."),
        "\udcff.txt": (Path.touch, r"the name b'data/raw/laws/\xff.txt' is not UTF-8, on which DVC stops; rename it."),
    }
    for name, (make, sentence) in strange.items():
        make(place := project / "data/raw/laws" / name)
        assert f"sources.laws.path: {sentence}" in run_stage(project, "check_params").stderr
        place.unlink()
    for path, status in (("docs_qa", 0), ("docs_reference/modules", 0), ("docs_more", 1)):
        imported = TEXT.replace("imports: {}", "imports: {docs: {questions_per_entry: 1}}").replace(
            "data/raw/laws", f"data/raw/{path}"
        )
        write(project / "params.yaml", imported)
        assert run_stage(project, "check_params").returncode == status, path


def test_a_file_that_was_in_order_is_not_checked_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was checked is remembered by the bytes of params.yaml and of the code: a change of either is checked."""
    checked = []
    monkeypatch.setattr(params_schema, "validate", lambda content: checked.append(content["sources"]["laws"]["phase"]))
    assert said(TEXT) is None and said(TEXT) is None
    assert checked == ["law"]
    said(TEXT + "# a comment\n")
    assert len(checked) == 2
    shutil.copytree(ROOT / "stages", here / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(check_params, "STAGES", here / "stages")
    said(TEXT + "# a comment\n")
    assert len(checked) == 2, "the same code at another place is the same code"
    with (here / "stages/kit/arrow.py").open("a", encoding="utf-8") as file:
        file.write("#\n")
    said(TEXT + "# a comment\n")
    assert len(checked) == 3


def test_the_benchmarks_project_is_in_order(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bench/ writes a params.yaml of its own, which a new key without a default would break."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "bench")])
    (here / "tokenizer").mkdir()
    monkeypatch.chdir(importlib.import_module("corpus").project(here / "project", here / "tokenizer"))
    check_params.check()


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "max_position_embeddings": 16},
        {"model_type": "gpt2", "n_positions": 16},
        {"model_type": "roberta", "max_position_embeddings": 18},
        {"model_type": "camembert", "max_position_embeddings": 18},
        {"model_type": "xlm-roberta", "max_position_embeddings": 16, "pad_token_id": -1},
    ],
)
@pytest.mark.parametrize("key", ["block_size", "max_length"])
def test_a_length_beyond_the_positions_of_the_base_is_found_before_any_training(
    here: Path, key: str, config: dict[str, Any]
) -> None:
    """Also of a phase that builds on another one, and when the base comes later than params.yaml was checked."""
    text = TEXT + SECOND.replace("models/configs/llama_small", "models/law/merged").replace(f"{key}: 16", f"{key}: 17")
    text = text.replace(
        "sources:", "sources:\n  talks: {phase: chat, path: data/raw/talks, clean: {format: text, license: unknown}}"
    )
    chat = text.index("  chat:\n")
    text = text[:chat] + text[chat:].replace("{mode: train, vocab_size: 300}", "{mode: reuse}")
    assert said(text) is None
    file = here / "models/configs/llama_small/config.json"
    write(file, json.dumps(config))
    found = said(text)
    assert found
    assert re.search(rf"phases\.chat\.\w+\.{key} is 17 but models/configs/llama_small has positions for 16", found)
    more = {name: value + 1 if name.endswith(("positions", "embeddings")) else value for name, value in config.items()}
    write(file, json.dumps(more))
    assert said(text) is None


def test_a_base_without_a_table_of_positions_takes_any_length(here: Path) -> None:
    """Or with one of which the config alone does not tell."""
    file = here / "models/configs/llama_small/config.json"
    for text in (
        '{"model_type": "bloom", "n_positions": 8}',
        '{"model_type": "llama", "max_position_embeddings": Infinity}',
        '{"model_type": "llama", "max_position_embeddings": null}',
        '{"model_type": "gpt2", "max_position_embeddings": 8}',
    ):
        write(file, text)
        assert said(TEXT) is None, text


def test_the_positions_are_of_the_base_that_will_be_fetched(here: Path) -> None:
    """Of another commit than the one that lies here nothing is known yet, and it could never come."""
    base = "bases: {big: {repo_id: a/b, revision: '" + "1" * 40 + "'}}"
    text = TEXT.replace("bases: {}", base).replace("models/configs/llama_small", "models/base/big")
    text = text.replace("{mode: train, vocab_size: 300}", "{mode: reuse}")
    write(here / "models/base/big/config.json", '{"max_position_embeddings": 8}')
    lock = f"stages: {{import_base@big: {{params: {{params.yaml: {{bases.big: {base[13:-1]}}}}}}}}}"
    assert said(text) is None
    write(here / "dvc.lock", lock)
    assert "block_size is 16 but models/base/big has positions for 8; lower it" in str(said(text + "#"))
    assert said(text.replace("1" * 40, "2" * 40)) is None


def test_a_damaged_note_of_what_was_checked_is_no_traceback(here: Path) -> None:
    assert said(TEXT) is None
    check_params.CHECKED.write_bytes(b"\xff\xfe")
    assert said(TEXT) is None
    check_params.CHECKED.unlink()
    check_params.CHECKED.mkdir()  # as on a full disk, nothing can be noted
    assert said(TEXT) is None


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (
            "{mode: train, vocab_size: 300, special_tokens: [<|im_start|>, <|im_end|>]}",
            "{mode: reuse, chat_template: qwen}",
        ),
        ("{mode: train, vocab_size: 300, chat_template: qwen}", "{mode: reuse, chat_template: chatml}"),
        ("{mode: train, vocab_size: 300}", "{mode: extend, new_tokens: 9, chat_template: chatml}"),
        ("{mode: train, vocab_size: 300}", "{mode: reuse, chat_template: default}"),
    ],
)
def test_a_template_whose_tokens_an_earlier_phase_makes_is_in_order(here: Path, first: str, then: str) -> None:
    second = SECOND.replace("models/configs/llama_small", "models/law/merged").replace(
        "{mode: train, vocab_size: 300}", then
    )
    source = (
        "  chats:\n    phase: chat\n    path: data/raw/chats\n    clean: {format: text, license: CC0-1.0}\nphases:\n"
    )
    text = TEXT.replace("{mode: train, vocab_size: 300}", first).replace("phases:\n", source + second)
    assert said(text) is None


def test_a_mistake_is_refused_each_time(here: Path) -> None:
    """Only a file in order is remembered, and folders of removed sources are looked for in any case."""
    wrong = TEXT.replace("phase: law", "phase: lwa")
    first = said(wrong)
    assert first and said(wrong) == first
    assert said(TEXT) is None
    (here / "data/clean/law/gone/documents").mkdir(parents=True)
    assert said(TEXT) is None  # `dvc checkout` empties folders, and leaves those above
    write(here / "data/clean/law/gone/documents/x", "")
    assert "belongs to no source" in str(said(TEXT))
    write(here / "data/marked/law/gone/x", "")
    assert str(said(TEXT)).endswith("delete it and 1 more: rm -r data/clean/law/gone data/marked/law/gone")


def test_an_export_names_a_phase(here: Path) -> None:
    right = TEXT.replace("exports: {}", "exports: {small: {phase: law, format: nf4}}")
    assert said(right) is None
    assert said(right.replace("phase: law, f", "phase: lwa, f")) == (
        "params.yaml: exports.small.phase is `lwa`, not a key of `phases`; did you mean `law`?"
    )
    assert "`exports.small.format` is 'q4'" in str(said(right.replace("nf4", "q4")))


def test_the_settings_in_the_readme_are_in_order() -> None:
    """Each YAML block of phases in the README is what the stages take."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Settings that decide the result")[1].split("\n## ")[0]
    blocks = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    assert blocks
    for block in blocks:
        groups = YAML(typ="safe").load(textwrap.dedent(block))
        assert set(groups) == {"dedup", "train_tokenizer", "group_blocks"}
        for name, group in groups.items():
            params_schema.Phase.model_fields[name].annotation.model_validate(group)  # type: ignore[union-attr]


def test_the_settings_in_the_docs_are_in_order() -> None:
    """Each line of a phase in docs/evaluation.md is what the stages take, and what it requires is measured."""
    lines = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8").splitlines()
    groups = [YAML(typ="safe").load(line) for line in lines if re.match("    (dedup|evaluate_model):", line)]
    assert len(groups) == 3
    required = []
    for ((name, group),) in map(dict.items, groups):
        found = params_schema.Phase.model_fields[name].annotation.model_validate(group)  # type: ignore[union-attr]
        required += [text.split()[0] for text in getattr(found, "require", [])]
    assert len(required) == 3 and set(required) <= set(score_report.possible("clm", [], ["NAME"], [], []))
