"""dedup: each document is on one side or dropped, its twin named; no text on both sides; new documents move no old."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import clean
import tiny
from conftest import Runner, write
from dedup import Near, Params, decide, different_texts, read_exclusions, split_point
from kit import arrow
from near_duplicates import Params as NearParams
from near_duplicates import clusters, near_twins, signatures

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


def with_near(texts: dict[str, list[str]], near: NearParams | None, excluded: frozenset[bytes] = frozenset()) -> Any:
    """Return the decisions about texts, by the real search."""
    ids = {source: [clean.doc_id(text) for text in said] for source, said in texts.items()}
    different = list(dict.fromkeys(text for said in texts.values() for text in said))
    found = None
    if near:
        signed = signatures(pa.chunked_array([pa.array(different)]), near)
        cluster = clusters(signed, near)
        twins, similarities = near_twins(signed, cluster, near, pa.chunked_array([pa.array(different)]))
        found = Near(cluster.tolist(), twins.tolist(), similarities.tolist())
    tables = decide(ids, Params(eval_fraction=0.5, near_duplicates=near), found, excluded)
    return {source: table.to_pylist() for source, table in tables.items()}


LAW = "第一条 为了保护公民、法人和其他组织的合法权益,监督行政机关依法履行职责,根据宪法,制定本法。" * 3
OTHERS = [f"Section {n}: the {word} shall be {word} before the court." for n, word in enumerate("abcdefgh")]


def test_a_near_duplicate_is_dropped_and_names_its_twin() -> None:
    """The first in the order of sources is kept; the similarity is the share of common runs, and exact ones stay 1."""
    near = LAW.replace("公民", "国民", 1)
    rows = with_near({"a": [*OTHERS, LAW], "b": [near, LAW]}, NearParams())["b"]
    assert (rows[0]["split"], rows[0]["rule"], rows[0]["twin"]) == ("dropped", "near_duplicate", "a/8")
    assert 0.8 <= rows[0]["similarity"] < 1
    assert (rows[1]["rule"], rows[1]["twin"], rows[1]["similarity"]) == ("exact_duplicate", "a/8", 1.0)
    kept = with_near({"a": [*OTHERS, LAW], "b": [near, LAW]}, None)["b"]
    assert kept[0]["split"] != "dropped"


def test_a_cluster_is_on_one_side() -> None:
    """A chain whose ends are less alike than the threshold: both ends stay, and stay together, for any seed."""
    words = [f"word{n}" for n in range(60)]
    chain = [" ".join(words[start : start + 40]) for start in (0, 3, 6, 9, 12)]
    ids = {"a": [clean.doc_id(text) for text in [*OTHERS, *chain]]}
    texts = pa.chunked_array([pa.array([*OTHERS, *chain])])
    near = NearParams(threshold=0.7)
    signed = signatures(texts, near)
    cluster = clusters(signed, near)
    twins, similarities = near_twins(signed, cluster, near, texts)
    assert len(set(cluster[len(OTHERS) :].tolist())) == 1
    for seed in range(20):
        found = Near(cluster.tolist(), twins.tolist(), similarities.tolist())
        rows = decide(ids, Params(eval_fraction=0.5, seed=seed), found)["a"].to_pylist()
        sides = {row["split"] for row in rows[len(OTHERS) :]} - {"dropped"}
        assert len(sides) == 1
        assert sum(row["split"] != "dropped" for row in rows[len(OTHERS) :]) > 1


def test_an_excluded_document_takes_its_cluster_with_it() -> None:
    """Neither its exact nor its near twin takes its place."""
    near = LAW.replace("公民", "国民", 1)
    for victim in (LAW, near):
        rows = with_near({"a": [*OTHERS, LAW], "b": [near, LAW]}, NearParams(), frozenset([clean.doc_id(victim)]))
        assert [row["rule"] for row in (rows["a"][8], *rows["b"])] == ["excluded"] * 3
        assert all(row["split"] != "dropped" for row in rows["a"][:8])


def test_an_exclusions_file(tmp_path: Path) -> None:
    write(tmp_path / "exclusions.txt", f"# why\n\n{'ab' * 16}  # asked by the owner\n")
    assert read_exclusions(tmp_path / "exclusions.txt") == {b"\xab" * 16}
    write(tmp_path / "exclusions.txt", f"{'ab' * 16}\nno id\n")
    with pytest.raises(SystemExit, match=r"exclusions.txt line 2: 'no id' is no doc_id; write its 32 hex"):
        read_exclusions(tmp_path / "exclusions.txt")


def test_conversations_are_compared_by_all_that_is_said(tmp_path: Path) -> None:
    said = [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]] * 2
    place = {"file": "f", "start": 0, "end": 1, "line": 1}
    rows = [{"doc_id": bytes([n]) * 16, **place, "messages": messages} for n, messages in enumerate(said)]
    for name in ("x", "y"):
        with arrow.Writer(tmp_path / name, clean.CHAT_DOCUMENTS) as out:
            out.write(pa.Table.from_pylist(rows, clean.CHAT_DOCUMENTS))
    texts = different_texts({"x": tmp_path / "x", "y": tmp_path / "y"})
    assert texts.to_pylist() == ["Q\nA", "Q\nA"]
