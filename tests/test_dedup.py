"""dedup: each document is on one side or dropped, its twin named; no text on both sides; new documents move no old."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from lineage.erase import exclude
from pydantic import ValidationError

import clean
import exclusions
import tiny
from conftest import Runner, git, ran, repro, write
from decontaminate import Hit
from dedup import (
    PART,
    RULES,
    Near,
    Params,
    all_texts,
    decide,
    identify,
    in_order,
    read_ids,
    split_points,
    table,
)
from kit import arrow
from near_duplicates import Company, clusters, jaccard, near_twins, signatures
from near_duplicates import Params as NearParams
from test_near_duplicates import spooled

IDS = st.binary(min_size=16, max_size=16)
# A pool of six, so that documents meet again in and across sources.
SOURCES = st.dictionaries(st.sampled_from("abc"), st.lists(st.sampled_from([bytes([n]) * 16 for n in range(6)])))


def split_point(identity: bytes, seed: int) -> float:
    """Return where one document stands, by the definition: 53 bits of a SHA-256, the lowest of 7 bytes first."""
    key = hashlib.sha256(seed.to_bytes(8, "little") + identity).digest()[:7]
    point = (int.from_bytes(key, "little") >> 3) / 2**53
    assert split_points(np.frombuffer(identity, np.uint8).reshape(1, 16), seed).tolist() == [point]
    return point


def decisions(
    doc_ids: dict[str, list[bytes]],
    params: Params,
    near: Near | None = None,
    excluded: frozenset[bytes] = frozenset(),
    contaminated: Iterable[int] = (),
) -> dict[str, pa.Table]:
    """Return one table of decisions per source; `contaminated` are rows of documents that are no copies."""
    ids = np.frombuffer(b"".join(itertools.chain(*doc_ids.values())), np.uint8).reshape(-1, 16)
    found = decide(ids, identify(ids), params, near, excluded, contaminated)
    starts = dict(zip(doc_ids, np.cumsum([0, *map(len, doc_ids.values())]).tolist(), strict=False))
    hits = dict.fromkeys(range(len(ids)), Hit("quiz", "quiz.txt line 1: what is"))
    return {
        source: table(pa.array(doc_ids[source], pa.binary(16)), start, found, starts, hits)
        for source, start in starts.items()
    }


def splits(doc_ids: dict[str, list[bytes]], params: Params | None = None) -> dict[str, list[str]]:
    return {source: rows["split"].to_pylist() for source, rows in decisions(doc_ids, params or Params()).items()}


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
    tables = decisions({"a": [one, two], "b": [two, three]}, params)
    assert tables["a"]["split"].to_pylist() == ["train", "eval"]
    none = {"cluster": None, "evidence": None}
    assert tables["b"].to_pylist() == [
        {"doc_id": two, "split": "dropped", "rule": "exact_duplicate", "twin": "a/1", "similarity": 1.0, **none},
        {"doc_id": three, "split": "train", "rule": None, "twin": None, "similarity": None, **none},
    ]


@given(SOURCES, st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_a_text_is_kept_once_and_its_copies_name_it(
    doc_ids: dict[str, list[bytes]], eval_fraction: float, seed: int
) -> None:
    """The first in the order of sources and rows is kept; both splits hold something."""
    assume(different(doc_ids) >= 2)
    tables = decisions(doc_ids, Params(eval_fraction=eval_fraction, seed=seed))
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
        decisions(doc_ids, Params())


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


def phase_of_lines(project: Path, sources: dict[str, list[str]], run_stage: Runner, **settings: Any) -> dict[str, Any]:
    """Make a phase `p` of sources whose lines are documents, clean them, and return params.yaml, written."""
    tiny.params_yaml(project, p={"base": "models/configs/llama_small", "dedup": settings})
    content: dict[str, Any] = json.loads((project / "params.yaml").read_text())
    group = {"format": "text", "sample_by": "line", "license": "unknown"}
    content["sources"] = {name: {"phase": "p", "path": f"data/raw/{name}", "clean": group} for name in sources}
    (project / "params.yaml").write_text(json.dumps(content))
    for name, lines in sources.items():
        write(project / f"data/raw/{name}/x.txt", "".join(f"{line}\n" for line in lines))
        finished = run_stage(project, "clean", name)
        assert finished.returncode == 0, finished.stderr
    return content


def decided(project: Path, run_stage: Runner) -> dict[str, list[dict[str, Any]]]:
    """Run dedup and return the rows of each source, with which what is counted must agree."""
    finished = run_stage(project, "dedup", "p")
    assert finished.returncode == 0, finished.stderr
    found = {folder.name: arrow.table(folder).to_pylist() for folder in (project / "data/dedup/p").iterdir()}
    total: Counter[str] = Counter()
    for name, rows in found.items():
        splits = Counter(row["split"] for row in rows)
        counts = {"rows": len(rows), **{split: splits[split] for split in ("train", "eval", "dropped")}}
        assert arrow.manifest(project / "data/dedup/p" / name)["counts"] == counts
        total.update(splits, documents=len(rows))
        total.update(row["rule"] for row in rows if row["rule"])
    (counts,) = arrow.read_json(project / "metrics/runs/dedup@p.json")["counts"]
    names = ["documents", "train", "eval", *RULES.values(), *(name for name in counts if ":" in name)]
    assert {name: counts[name] for name in names} == {name: total[name] for name in names}
    return found


def searched(texts: Any, params: NearParams) -> Near:
    """Return what the search says of a column of texts."""
    signed = signatures(texts, params)
    company = clusters(signed, params)
    return Near(company, *near_twins(signed, company, params, spooled(texts)))


def with_near(texts: dict[str, list[str]], near: NearParams | None, excluded: frozenset[bytes] = frozenset()) -> Any:
    """Return the decisions about texts, by the real search."""
    ids = {source: [clean.doc_id(text) for text in said] for source, said in texts.items()}
    seen: set[str] = set()
    once = [None if text in seen else seen.add(text) or text for said in texts.values() for text in said]
    found = searched(pa.chunked_array([pa.array(once)]), near) if near else None
    tables = decisions(ids, Params(eval_fraction=0.5, near_duplicates=near), found, excluded)
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
    found = searched(texts, NearParams(threshold=0.7))
    assert found.company.rows.tolist() == list(range(len(OTHERS), len(OTHERS) + len(chain)))
    assert set(found.company.cluster.tolist()) == {len(OTHERS)}
    for seed in range(20):
        rows = decisions(ids, Params(eval_fraction=0.5, seed=seed), found)["a"].to_pylist()
        sides = {row["split"] for row in rows[len(OTHERS) :]} - {"dropped"}
        assert len(sides) == 1
        assert sum(row["split"] != "dropped" for row in rows[len(OTHERS) :]) > 1
        assert [row["cluster"] for row in rows] == [None] * len(OTHERS) + [f"a/{len(OTHERS)}"] * len(chain)


def test_a_cluster_of_which_nobody_stays_is_no_stand_in_for_an_empty_split() -> None:
    ids = sorted((bytes([n]) * 16 for n in range(50)), key=lambda identity: split_point(identity, 0))
    pair = Near(Company(np.array([0, 1], np.int32), np.zeros(2, np.int32)), np.full(2, -1, np.int32), np.zeros(2))
    for gone in ids[0], ids[1]:
        rows = decisions({"a": ids[:4]}, Params(eval_fraction=1e-9), pair, frozenset([gone]))
        assert rows["a"]["split"].to_pylist() == ["dropped", "dropped", "eval", "train"]


def test_a_copy_is_in_the_cluster_of_its_first() -> None:
    near = LAW.replace("公民", "国民", 1)
    rows = with_near({"a": [*OTHERS, near, OTHERS[0]], "b": [LAW, near, "alone"]}, NearParams())
    assert [row["cluster"] for row in rows["a"]] == [None] * len(OTHERS) + ["a/8", None]
    assert [row["cluster"] for row in rows["b"]] == ["a/8", "a/8", None]


def test_documents_beyond_those_that_are_read_at_a_time_are_decided_in_their_rows() -> None:
    ids = [number.to_bytes(16, "little") for number in range(PART + 600)]
    excluded, contaminated, copied = PART + 100, PART + 200, PART + 300
    rows = decisions({"a": [*ids, ids[copied]]}, Params(), None, frozenset([ids[excluded]]), [contaminated])["a"]
    rules = {row: rule for row, rule in enumerate(rows["rule"].to_pylist()) if rule}
    assert rules == {excluded: "excluded", contaminated: "decontaminate:quiz", len(ids): "exact_duplicate"}
    assert rows["twin"].to_pylist()[-1] == f"a/{copied}"


def test_a_cluster_is_one_to_choose_from() -> None:
    """It goes by its least id: the points of its other documents neither stand in for an empty split nor count."""
    none = np.full(2, -1, np.int32), np.zeros(2, np.float32)
    pair = Near(Company(np.array([0, 1], np.int32), np.zeros(2, np.int32)), *none)
    ids = sorted(bytes([n]) * 16 for n in range(60))
    low, high, other = next(
        (x, y, z)
        for x, y, z in itertools.permutations(ids, 3)
        if x < y and split_point(y, 0) < split_point(z, 0) < split_point(x, 0)
    )
    for order in ([low, high], [high, low]):
        tables = decisions({"a": [*order, other]}, Params(eval_fraction=1e-9), pair)
        assert tables["a"]["split"].to_pylist() == ["train", "train", "eval"]
        with pytest.raises(ValueError, match="fewer than two different documents"):
            decisions({"a": order}, Params(), pair)


def test_an_excluded_document_takes_its_cluster_with_it() -> None:
    """Neither its exact nor its near twin takes its place."""
    near = LAW.replace("公民", "国民", 1)
    for victim in (LAW, near):
        rows = with_near({"a": [*OTHERS, LAW], "b": [near, LAW]}, NearParams(), frozenset([clean.doc_id(victim)]))
        assert [row["rule"] for row in (rows["a"][8], *rows["b"])] == ["excluded"] * 3
        assert all(row["split"] != "dropped" for row in rows["a"][:8])


def test_an_exclusions_file_tells_nothing_without_its_key(tmp_path: Path) -> None:
    """Who guesses a text finds nothing of it there, and two projects name it otherwise."""
    identity = clean.doc_id("a text that somebody may guess")
    written = []
    for name in ("one", "two"):
        write(tmp_path / name / "data/exclusions.txt", "# why\n")
        exclude(tmp_path / name, {identity})
        found = exclusions.read(tmp_path / name / "data/exclusions.txt")
        assert (len(found), identity in found, clean.doc_id("another") in found) == (1, True, False)
        written.append((tmp_path / name / "data/exclusions.txt").read_text())
    assert all(text.startswith("# why\nkey ") for text in written)
    assert not set(written[0].split()) & set(written[1].split()) - {"#", "why", "key"}
    for text in ("a text that somebody may guess", identity.hex()):
        said = text.encode()
        hashes = [hash_of(data).hexdigest() for hash_of in (hashlib.sha256, hashlib.md5) for data in (said, identity)]
        assert not any(digest[:16] in whole for whole in written for digest in hashes)
    assert (tmp_path / "one/data/exclusions.key").stat().st_mode & 0o077 == 0
    before = (tmp_path / "one/data/exclusions.key").read_text()
    exclude(tmp_path / "one", {identity, clean.doc_id("another")})
    assert (tmp_path / "one/data/exclusions.key").read_text() == before
    assert len(exclusions.read(tmp_path / "one/data/exclusions.txt")) == 2


def test_the_key_of_the_exclusions_stays_out_of_git(project: Path) -> None:
    write(project / "data/exclusions.key", "")
    git(project, "init", "--quiet")
    assert git(project, "status", "--porcelain", "--ignored", "data/exclusions.key").startswith("!!")


def entries(key: bytes, *ids: bytes) -> str:
    return "".join(f"{line}\n" for line in (f"key {exclusions.key_id(key)}", *(exclusions.mark(key, i) for i in ids)))


KEY, OTHER_KEY = bytes(range(32)), bytes(32)


@pytest.mark.parametrize(
    ("text", "key", "said"),
    [
        (entries(KEY, b"i"), None, r"exclusions.key is missing, without which .*exclusions.txt cannot be read"),
        (
            entries(KEY, b"i"),
            OTHER_KEY.hex(),
            r"exclusions.key is key \w{16}, but .*exclusions.txt was made with \w{16};",
        ),
        (entries(KEY, b"i").partition("\n")[2], KEY.hex(), "was made with one that it does not name"),
        (entries(KEY, b"i"), "secret", "exclusions.key is no key: 64 hexadecimal digits"),
        (entries(KEY, b"i"), KEY.hex() + "00", "exclusions.key is no key: 64 hexadecimal digits"),
        (entries(KEY, b"i"), "密" * 64, "exclusions.key is no key: 64 hexadecimal digits"),
        (entries(KEY, b"i").rstrip() + "0", KEY.hex(), "exclusions.txt line 2: '[0-9a-f]+' is no entry"),
        (entries(KEY, b"i") + entries(OTHER_KEY, b"j"), KEY.hex(), "exclusions.txt line 3: it names a second key"),
        ("ab" * 16, KEY.hex(), "exclusions.txt line 1: a plain doc_id would tell .* lineage erase apply abab"),
        (f"{entries(KEY, b'i')}no id\n", KEY.hex(), "exclusions.txt line 3: 'no id' is no entry"),
        ("# 按要求\n", None, "exclusions.txt: byte 2 is not UTF-8; save the file as UTF-8"),
    ],
)
def test_exclusions_that_cannot_be_read_are_refused_not_passed_over(
    tmp_path: Path, text: str, key: str | None, said: str
) -> None:
    (tmp_path / "exclusions.txt").write_bytes(text.encode("gb18030"))
    if key is not None:
        write(tmp_path / "exclusions.key", key)
    with pytest.raises(SystemExit, match=said):
        exclusions.read(tmp_path / "exclusions.txt")


def test_what_an_editor_makes_of_the_exclusions_is_read_and_without_entries_no_key_is_needed(tmp_path: Path) -> None:
    text = entries(KEY, b"i").upper().replace("KEY", "key").replace("\n", "  # asked by the owner\r\n")
    write(tmp_path / "exclusions.txt", f"\ufeff# of an editor on Windows\r\n{text}")
    write(tmp_path / "exclusions.key", KEY.hex().upper() + "\r\n")
    assert b"i" in exclusions.read(tmp_path / "exclusions.txt")
    write(tmp_path / "none/exclusions.txt", "# why\n\n")
    assert len(exclusions.read(tmp_path / "none/exclusions.txt")) == 0


def test_dedup_refuses_another_key_and_goes_on_with_the_right_one(project: Path, run_stage: Runner) -> None:
    phase_of_lines(project, {"a": OTHERS[:4]}, run_stage)
    exclude(project, {clean.doc_id(OTHERS[0])})
    path = project / "data/exclusions.key"
    key = path.read_text()
    for wrong in (None, OTHER_KEY.hex()):
        path.unlink(missing_ok=True)
        if wrong:
            write(path, wrong)
        refused = run_stage(project, "dedup", "p")
        assert refused.returncode != 0
        assert refused.stderr.count("\n") == 1
        assert not (project / "data/dedup/p").exists()
    write(path, key)
    assert [row["rule"] for row in decided(project, run_stage)["a"]].count("excluded") == 1


def test_an_excluded_id_that_no_document_has_is_counted(project: Path, run_stage: Runner) -> None:
    """An id of a removed document, or of another phase, is in order; a slip of the pen shows in the counts."""
    phase_of_lines(project, {"a": [OTHERS[0], "", *OTHERS[1:4]], "b": OTHERS[4:]}, run_stage)
    exclude(project, {clean.doc_id(OTHERS[5]), b"\xab" * 16})
    assert [row["rule"] for row in decided(project, run_stage)["b"]] == [None, "excluded", None, None]
    counts = arrow.read_json(project / "metrics/runs/dedup@p.json")["counts"][0]
    assert (counts["exclusions"], counts["exclusions_not_here"], counts["excluded"]) == (2, 1, 1)


def test_an_excluded_record_stays_out_whatever_the_rules_make_of_it(project: Path, run_stage: Runner) -> None:
    """With its copies: the same text, also from another record."""
    content = phase_of_lines(project, {"a": [*OTHERS[:4], "a\u00a0secret "], "b": ["a\u00a0secret"]}, run_stage)
    raw_id = arrow.table(project / "data/clean/p/a/ledger").to_pylist()[4]["raw_id"]
    exclude(project, {raw_id})
    for rules, documents in (([], 1), (["full_width"], 1), (["nfkc", "whitespace"], 2)):
        for source in content["sources"].values():
            source["clean"]["rules"] = rules
        (project / "params.yaml").write_text(json.dumps(content))
        for name in content["sources"]:
            assert run_stage(project, "clean", name).returncode == 0
        found = [row for rows in decided(project, run_stage).values() for row in rows]
        taken = [row["doc_id"] for row in found if row["rule"] == "excluded"]
        texts = {row["doc_id"]: row["text"] for n in "ab" for row in rows_of(project, n)}
        assert ["secret" in texts[one] for one in taken] == [True] * documents, rules
        counts = arrow.read_json(project / "metrics/runs/dedup@p.json")["counts"][0]
        assert (counts["exclusions"], counts["exclusions_not_here"]) == (1, 0)


def rows_of(project: Path, source: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = arrow.table(project / f"data/clean/p/{source}/documents").to_pylist()
    return rows


def test_conversations_are_compared_by_all_that_is_said_but_for_system_turns(tmp_path: Path) -> None:
    said = [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]]
    said.append([{"role": "system", "content": "Brief."}, *said[0], {"role": "system", "content": "Now."}, *said[0]])
    place = {"file": "f", "start": 0, "end": 1, "line": 1}
    rows = [{"doc_id": bytes([n]) * 16, **place, "messages": messages} for n, messages in enumerate(said)]
    for name in ("x", "y"):
        with arrow.Writer(tmp_path / name, clean.CHAT_DOCUMENTS) as out:
            out.write(pa.Table.from_pylist(rows, clean.CHAT_DOCUMENTS))
    folders = {"x": tmp_path / "x", "y": tmp_path / "y"}
    ids = read_ids(folders, tmp_path)
    assert ids[:].tolist() == [[0] * 16, [1] * 16] * 2
    copies = identify(ids, tmp_path)
    assert (copies.rows.tolist(), copies.first.tolist()) == ([2, 3], [0, 1])
    whole, compared = (
        [text for some in side for text in some.to_pylist()]
        for side in zip(*all_texts(folders, copies.rows), strict=True)
    )
    assert whole == ["Q\nA", "Brief.\nQ\nA\nNow.\nQ\nA", None, None]
    assert compared == ["Q\nA", "Q\nA\nQ\nA", None, None]


QUIZ = "Which of the two rivers that cross the old town is the longer one by far, and why?"


def test_a_system_turn_that_all_share_makes_no_twins_of_them(project: Path, run_stage: Runner) -> None:
    """Nor does one list of functions for all; a benchmark's item in a system turn is still found."""
    shared = " ".join(f"word{number}" for number in range(300))
    rows = [
        [
            {"role": "system", "content": shared + f" {QUIZ}" * (number == 7)},
            {"role": "user", "content": f"What is {number}?"},
            {"role": "assistant", "content": f"A number, {number * 7919} less than another."},
        ]
        for number in range(40)
    ]
    write(project / "data/benchmarks/quiz.txt", f"{QUIZ}\n")
    how = {"near_duplicates": {}, "decontaminate": {"quiz": {}}}
    tokenizer = {"mode": "train", "vocab_size": 300, "chat_template": "human_assistant"}
    tiny.params_yaml(project, p={"base": "models/configs/llama_small", "dedup": how, "train_tokenizer": tokenizer})
    content = json.loads((project / "params.yaml").read_text())
    content["sources"]["p_text"]["clean"] = {"format": "jsonl", "record": "messages", "license": "unknown"}
    write(project / "params.yaml", json.dumps(content))
    write(project / "data/raw/x/x.jsonl", "".join(json.dumps({"messages": row}) + "\n" for row in rows))
    assert run_stage(project, "clean", "p_text").returncode == 0
    found = decided(project, run_stage)["p_text"]
    assert [row["rule"] for row in found] == [None] * 7 + ["decontaminate:quiz"] + [None] * 32
    assert {row["split"] for row in found} == {"train", "eval", "dropped"}


def test_the_source_of_higher_priority_keeps_its_documents(project: Path, run_stage: Runner) -> None:
    """Of equal and of near-equal documents; the others follow by name, whatever the order in params.yaml."""
    near = LAW.replace("公民", "国民", 1)
    sources = {"c": [near, *OTHERS[:4]], "a": [*OTHERS[4:], LAW], "b": [LAW]}
    content = phase_of_lines(project, sources, run_stage, near_duplicates={})
    dropped = {"b": ("exact_duplicate", "a/4"), "c": ("near_duplicate", "a/4")}
    rows = decided(project, run_stage)
    for source in "bc":
        row = rows[source][0]
        assert (row["rule"], row["twin"]) == dropped[source]
    content["phases"]["p"]["dedup"]["priority"] = ["c", "b"]
    (project / "params.yaml").write_text(json.dumps(content))
    rows = decided(project, run_stage)
    assert rows["c"][0]["rule"] is None
    for source, place in (("a", 4), ("b", 0)):
        row = rows[source][place]
        assert (row["rule"], row["twin"]) == ("near_duplicate", "c/0")
        assert row["similarity"] < 1
    content["phases"]["p"]["dedup"]["priority"] = ["c", "bb"]
    (project / "params.yaml").write_text(json.dumps(content))
    finished = run_stage(project, "dedup", "p")
    said = "`priority` names `bb`, which is no source of this phase; did you mean `b`?"
    assert finished.stderr == f"params.yaml: phases.p.dedup: {said}\n"


def test_dvc_sees_the_priority_and_no_order_of_sources(project: Path, run_stage: Runner) -> None:
    """DVC compares dicts without their order, lists with it: so the order that decides is a list."""
    sources = {"a": ["one", "two"], "b": ["two", "three"]}
    content = phase_of_lines(project, sources, run_stage, priority=["b", "a"])
    git(project, "init", "--quiet")
    repro(project, "dedup")
    content["sources"] = dict(reversed(content["sources"].items()))
    (project / "params.yaml").write_text(json.dumps(content))
    assert "dedup@p" not in ran(repro(project, "dedup"))
    content["phases"]["p"]["dedup"]["priority"] = ["a", "b"]
    (project / "params.yaml").write_text(json.dumps(content))
    assert "dedup@p" in ran(repro(project, "dedup"))
    write(project / "data/benchmarks/quiz.txt", "one two three four five six seven eight\n")
    assert "dedup@p" in ran(repro(project, "dedup"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"priority": ["a", "a"]},
        {"decontaminate": {"../x": {}}},
        {"decontaminate": ["x"]},
        {"eval_fraction": 0},
        {"eval_fraction": 1},
    ],
)
def test_wrong_parameters_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Params(**wrong)


@given(SOURCES, st.permutations("abc"))
def test_priority_decides_which_copy_is_kept(doc_ids: dict[str, list[bytes]], priority: list[str]) -> None:
    """The split of a text and the number of dropped copies are the same for any order."""
    assume(different(doc_ids) >= 2)
    order = in_order(sorted(doc_ids), [name for name in priority if name in doc_ids])
    tables = decisions({name: doc_ids[name] for name in order}, Params())
    for identity in {*itertools.chain(*doc_ids.values())}:
        kept = [
            name for name in order for row in tables[name].to_pylist() if row["doc_id"] == identity and not row["rule"]
        ]
        assert kept == [next(name for name in order if identity in doc_ids[name])]
    assert sides({name: doc_ids[name] for name in order}, Params()) == sides(doc_ids, Params())


def test_what_holds_a_benchmark_item_goes_and_its_near_twin_stays(project: Path, run_stage: Runner) -> None:
    """Each by its own text: of a pair the one without the item stays, though the other stands before it."""
    words = [f"word{number}" for number in range(200)]
    item = " ".join(words[20:40])
    clear = " ".join([*words[:30], "other", *words[31:]])
    sources = {"a": [*OTHERS, " ".join(words), clear], "b": [" ".join(words), f"Well. {item.upper()}!"]}
    quiz = [{"question": question, "text": "no"} for question in (item, "Why?")]
    write(project / "data/benchmarks/quiz.jsonl", "".join(json.dumps(row) + "\n" for row in quiz))
    content = phase_of_lines(
        project, sources, run_stage, near_duplicates={}, decontaminate={"quiz": {"fields": ["question"]}}
    )
    found = decided(project, run_stage)
    rows = found["a"]
    rule, place = "decontaminate:quiz", "data/benchmarks/quiz.jsonl line 1: "
    assert [row["rule"] for row in rows] == [None] * 8 + [rule, None]
    assert (rows[8]["split"], rows[8]["twin"], rows[8]["similarity"]) == ("dropped", None, None)
    assert rows[8]["evidence"] == place + " ".join(words[20:33])[:80]
    assert [(row["rule"], row["evidence"][: len(place)]) for row in found["b"]] == [(rule, place)] * 2
    (counts,) = json.loads((project / "metrics/runs/dedup@p.json").read_text())["counts"]
    assert (counts["decontaminate:quiz"], counts["items of quiz"], counts["items of quiz too short"]) == (3, 2, 1)
    # Exclusion comes first, and takes the cluster; and without the benchmark the other twin is the duplicate.
    exclude(project, {clean.doc_id(clear)})
    found = decided(project, run_stage)
    assert [row["rule"] for row in found["a"][8:]] == ["excluded", "excluded"]
    assert [row["rule"] for row in found["b"]] == ["excluded", rule]
    write(project / "data/exclusions.txt", "")
    content["phases"]["p"]["dedup"]["decontaminate"] = {}
    (project / "params.yaml").write_text(json.dumps(content))
    assert [row["rule"] for row in decided(project, run_stage)["a"][8:]] == [None, "near_duplicate"]


def test_an_item_is_found_behind_long_documents_and_the_first_benchmark_by_name_is_named(
    project: Path, run_stage: Runner
) -> None:
    """More text than is read at a time; in whichever order params.yaml names them, which DVC does not see."""
    long = [" ".join(f"{number * factor:x}" for number in range(50_000)) for factor in (7919, 104729)]
    for name in ("quiz", "exam"):
        write(project / f"data/benchmarks/{name}.txt", f"{QUIZ}\n")
    lines = [*long, "short", f"Asked: {QUIZ}", "last"]
    content = phase_of_lines(project, {"a": lines}, run_stage)
    for names in (["quiz", "exam"], ["exam", "quiz"]):
        content["phases"]["p"]["dedup"] = {"decontaminate": {name: {} for name in names}}
        (project / "params.yaml").write_text(json.dumps(content))
        found = decided(project, run_stage)["a"]
        assert [row["rule"] for row in found] == [None, None, None, "decontaminate:exam", None]


WORDS = [f"w{number}" for number in range(40)]


def versions(edits: list[tuple[int, list[int]]]) -> list[str]:
    """Return texts, each an earlier one with the words at these places replaced."""
    texts = [[f"{word}x{n % 3}" for n in range(5) for word in WORDS]]
    for number, (source, places) in enumerate(edits):
        texts.append(list(texts[source % len(texts)]))
        for place in places:
            texts[-1][place] = f"edit{number}"
    return [" ".join(words) for words in texts]


EDITS = st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(0, 199), max_size=9)), min_size=3, max_size=14)


@given(EDITS, st.permutations(range(20)), st.integers(0, 5))
def test_no_order_decides_the_side_and_no_near_twin_is_on_the_other(
    edits: list[tuple[int, list[int]]], order: list[int], seed: int
) -> None:
    """Versions of versions of a text: clusters and sides follow from content; what is dropped has a kept twin."""
    texts = [*OTHERS[:3], *dict.fromkeys(versions(edits))]
    near = NearParams()
    found: list[dict[str, str]] = []
    for arranged in (texts, [texts[place] for place in order if place < len(texts)]):
        column = pa.array(arranged)
        search = searched(column, near)
        cluster = np.arange(len(arranged))
        cluster[search.company.rows] = search.company.cluster
        ids = {"a": [clean.doc_id(text) for text in arranged]}
        rows = decisions(ids, Params(eval_fraction=0.5, seed=seed), search)["a"].to_pylist()
        kept = [number for number, row in enumerate(rows) if row["rule"] is None]
        for number, row in enumerate(rows):
            if row["rule"]:
                assert int(row["twin"].removeprefix("a/")) in kept
                assert row["similarity"] >= near.threshold
                assert int(row["twin"].removeprefix("a/")) < number
        pairs = np.array([(a, b) for a in kept for b in kept if rows[a]["split"] > rows[b]["split"]]).reshape(-1, 2).T
        assert (jaccard(spooled(column), *pairs, near) < 0.9).all()
        names = {name: clean.doc_id(arranged[name]) for name in set(cluster.tolist())}
        members = {name: min(ids["a"][row] for row in np.flatnonzero(cluster == name)) for name in names}
        found.append({arranged[row]: members[int(cluster[row])] for row in range(len(arranged))})
    if len(found[1]) == len(found[0]):
        assert found[0] == found[1]


def test_memory_does_not_grow_with_the_corpus(project: Path, run_stage: Runner) -> None:
    """Ten times the documents: at most a tenth more memory at the peak."""
    tiny.params_yaml(project, p={"base": "models/configs/llama_small", "dedup": {"near_duplicates": {}}})
    (source,) = json.loads((project / "params.yaml").read_text())["sources"]
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"{number * 7919:x}" for number in range(20_000)])
    originals = [" ".join(vocabulary[rng.integers(20_000, size=600)]) for _ in range(100)]
    peaks = []
    for count in (2_000, 20_000):
        with arrow.Writer(project / f"data/clean/p/{source}/documents", clean.TEXT_DOCUMENTS) as out:
            for begin in range(0, count, 100):
                texts = [" ".join(vocabulary[rng.integers(20_000, size=600)]) for _ in range(90)]
                texts += [f"{text} again {begin}" for text in originals[begin // 10 % 100 :][:10]]
                place = {"file": "f", "start": 0, "end": 1, "line": 1}
                rows = [{"doc_id": clean.doc_id(text), **place, "text": text} for text in texts]
                out.write(pa.Table.from_pylist(rows, clean.TEXT_DOCUMENTS))
        finished = run_stage(project, "dedup", "p")
        assert finished.returncode == 0, finished.stderr
        peaks.append(json.loads((project / "metrics/runs/dedup@p.json").read_text())["peak_memory_mib"])
    assert peaks[1] <= 1.1 * peaks[0], peaks
