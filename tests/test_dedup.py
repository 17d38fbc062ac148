"""dedup: each document is on one side or dropped, its twin named; no text on both sides; new documents move no old."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import clean
import tiny
from conftest import Runner, write
from dedup import Params, decide, split_point
from kit import arrow

IDS = st.binary(min_size=16, max_size=16)
# A pool of six, so that documents meet again in and across sources.
SOURCES = st.dictionaries(st.sampled_from("abc"), st.lists(st.sampled_from([bytes([n]) * 16 for n in range(6)])))


def splits(doc_ids: dict[str, list[bytes]], params: Params | None = None) -> dict[str, list[str]]:
    return {source: table["split"].to_pylist() for source, table in decide(doc_ids, params or Params()).items()}


def sides(doc_ids: dict[str, list[bytes]], params: Params) -> dict[bytes, set[str]]:
    """Return the splits in which each document stands, over all sources."""
    found: dict[bytes, set[str]] = {}
    for source, names in splits(doc_ids, params).items():
        for identity, name in zip(doc_ids[source], names, strict=True):
            found.setdefault(identity, set()).add(name)
    return found


def different(doc_ids: dict[str, list[bytes]]) -> int:
    return len({identity for ids in doc_ids.values() for identity in ids})


def test_the_worked_example_of_the_docstring() -> None:
    """Its "say": with this seed the hash of "two" falls into the eval share."""
    one, two, three = (clean.doc_id(text) for text in ("one", "two", "three"))
    params = next(
        params
        for params in (Params(eval_fraction=0.3, seed=seed) for seed in range(1000))
        if [split_point(text, params.seed) < 0.3 for text in (one, two, three)] == [False, True, False]
    )
    tables = decide({"a": [one, two], "b": [two, three]}, params)
    assert tables["a"]["split"].to_pylist() == ["train", "eval"]
    assert tables["b"].to_pylist() == [
        {"doc_id": two, "split": "dropped", "rule": "exact_duplicate", "twin": "a/1", "similarity": 1.0},
        {"doc_id": three, "split": "train", "rule": None, "twin": None, "similarity": None},
    ]


@given(SOURCES, st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_a_text_is_kept_once_and_its_copies_name_it(
    doc_ids: dict[str, list[bytes]], eval_fraction: float, seed: int
) -> None:
    """The first in the order of sources and rows is kept; both splits hold something."""
    assume(different(doc_ids) >= 2)
    tables = decide(doc_ids, Params(eval_fraction=eval_fraction, seed=seed))
    kept: dict[bytes, str] = {}
    used = set()
    for source, ids in doc_ids.items():
        assert tables[source]["doc_id"].to_pylist() == ids
        for row, decision in enumerate(tables[source].to_pylist()):
            if decision["split"] == "dropped":
                assert (decision["twin"], decision["rule"]) == (kept[decision["doc_id"]], "exact_duplicate")
            else:
                assert decision["doc_id"] not in kept
                assert (decision["twin"], decision["rule"]) == (None, None)
                kept[decision["doc_id"]] = f"{source}/{row}"
                used.add(decision["split"])
    assert used == {"train", "eval"}


@given(
    st.lists(IDS, unique=True, min_size=2, max_size=30),
    st.dictionaries(st.sampled_from("0az"), st.lists(IDS, max_size=10)),
    st.integers(0, 9),
)
def test_new_documents_move_no_old_one(old: list[bytes], new: dict[str, list[bytes]], seed: int) -> None:
    """Whatever is added, before or after: an old text stays on the side where its point alone put it."""
    params = Params(eval_fraction=0.5, seed=seed)
    natural = {identity: {"eval" if split_point(identity, seed) < 0.5 else "train"} for identity in old}
    assume(len({*map(str, natural.values())}) == 2)  # no stand-in for an empty split
    assert sides({"m": old}, params) == natural
    after = sides(dict(sorted({"m": old, **new}.items())), params)
    assert {identity: after[identity] - {"dropped"} for identity in old} == natural


def test_a_lone_stand_in_for_an_empty_split_is_the_only_one_that_moves() -> None:
    """Three documents, none in a share of 1 %: the nearest is held out until one with a lower point comes."""
    ids = sorted((bytes([n]) * 16 for n in range(50)), key=lambda identity: split_point(identity, 0))
    params = Params(eval_fraction=0.001)
    assert splits({"a": ids[2:5]}, params) == {"a": ["eval", "train", "train"]}
    assert splits({"a": ids[1:5]}, params) == {"a": ["eval", "train", "train", "train"]}
    assert splits({"a": ids[-3:]}, Params(eval_fraction=0.9999)) == {"a": ["eval", "eval", "train"]}


@pytest.mark.parametrize("eval_fraction", [0.01, 0.05, 0.5])
def test_the_held_out_share_is_the_fraction(eval_fraction: float) -> None:
    """Within four standard deviations of a fair draw, for 20,000 documents."""
    ids = [number.to_bytes(16, "big") for number in range(20_000)]
    share = splits({"a": ids}, Params(eval_fraction=eval_fraction))["a"].count("eval") / len(ids)
    assert abs(share - eval_fraction) < 4 * (eval_fraction * (1 - eval_fraction) / len(ids)) ** 0.5


def test_another_seed_holds_out_other_documents() -> None:
    ids = [bytes([number]) * 16 for number in range(200)]
    found = {tuple(splits({"a": ids}, Params(eval_fraction=0.5, seed=seed))["a"]) for seed in range(5)}
    assert len(found) == 5


@pytest.mark.parametrize("doc_ids", [{}, {"a": []}, {"a": [bytes(16)], "b": [bytes(16)]}])
def test_fewer_than_two_different_documents_are_refused(doc_ids: dict[str, list[bytes]]) -> None:
    with pytest.raises(ValueError, match="fewer than two different documents"):
        decide(doc_ids, Params())


def test_the_command_takes_the_sources_of_params_yaml_and_refuses_a_stranger(project: Path, run_stage: Runner) -> None:
    """Two sources with a text in common; then one is removed from params.yaml and its folder would bring it back."""
    for name, text in (("a", "one\ntwo\n"), ("b", "two\nthree\n")):
        write(project / f"data/raw/{name}/x.txt", text)
    tiny.params_yaml(project, p={"base": "models/configs/llama_small"})
    settings = json.loads((project / "params.yaml").read_text())
    group = {"format": "text", "sample_by": "line", "license": "unknown"}
    settings["sources"] = {name: {"phase": "p", "path": f"data/raw/{name}", "clean": group} for name in "ba"}
    (project / "params.yaml").write_text(json.dumps(settings))
    for name in "ba":
        assert run_stage(project, "clean", name).returncode == 0
    finished = run_stage(project, "dedup", "p")
    assert finished.returncode == 0, finished.stderr
    dropped = arrow.table(project / "data/dedup/p/b").to_pylist()[0]
    assert (dropped["split"], dropped["twin"]) == ("dropped", "a/1")
    before = (project / "data/dedup/p/a/manifest.json").read_bytes()

    del settings["sources"]["b"]
    (project / "params.yaml").write_text(json.dumps(settings))
    finished = run_stage(project, "dedup", "p")
    assert (finished.returncode, len(finished.stderr.splitlines())) == (1, 1), finished.stderr
    assert "data/clean/p/b belongs to no source" in finished.stderr
    assert "rm -r data/clean/p/b" in finished.stderr
    assert (project / "data/dedup/p/a/manifest.json").read_bytes() == before
