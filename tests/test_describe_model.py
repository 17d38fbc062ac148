"""describe_model: the card tells the licence, the funnel and the digests, and its numbers add up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import croissant
import dataset_card
import source_register
import varied
from describe_model import WENT, card, data_rows, generations, table, task
from kit import arrow

ROW: dict[str, Any] = {
    "source": "laws",
    "license": "CC0-1.0",
    "owner": "the state",
    "origin": "gazette",
    "language": "zh",
    "bytes": 1234567,
    "records": 10,
    "dropped": 1,
    "duplicates": 1,
    "in_benchmarks": 1,
    "excluded": 0,
    "train": 6,
    "eval": 1,
    "tokens": 5000,
}
EVALUATION: dict[str, Any] = {
    **{name: {"bits_per_byte": 2.5, "loss": 6.0, "perplexity": 400.0} for name in ("base", "trained", "merged")},
    "scale": {"order0": 4.9, "gzip": 3.1, "xz": 2.9},
    "answers": [{"prompt": "Q?", "answer": "A."}],
}


def test_a_table() -> None:
    assert table([{"a": 1234, "b": "x"}]) == "| a | b |\n|---|---|\n| 1,234 | x |"


def test_the_card() -> None:
    shown = "Training showed 640 blocks."
    text = card("chat", "models/pretrain/merged", [ROW], EVALUATION, shown, {"models/chat/merged": "ab" * 32})
    assert "Its text: 5,000 tokens in 7 documents, of which 1 are held out. Training showed 640 blocks. It goes" in text
    assert text.startswith("---\n")
    assert '\nlanguage: ["zh"]\n' in text
    assert "| laws | CC0-1.0 | the state | gazette | zh |" in text
    assert "| laws | 1,234,567 | 10 | 1 | 1 | 1 | 0 | 6 | 1 | 5,000 |" in text
    assert "whose text and licences are in reports/pretrain/model_card.md." in text
    assert "Licences of these sources: CC0-1.0. Check them, and those of phase `pretrain`, before" in text
    assert "](" not in text  # the card goes out with exports, where nothing lies beside it
    assert f"| `models/chat/merged` | `{'ab' * 32}` |" in text
    assert "> Q?" in text and "A." in text


def test_what_the_models_wrote_stands_side_by_side() -> None:
    """Indented, so that a fence or a heading in a text ends nothing; a prompt of two lines is one heading."""
    answers = [{"prompt": "Q\n1?", "answer": "```\n# A", "base": "B", "sampled": "S", "base_sampled": "T"}]
    rows = [{"question": "Why?", "expected": "E", "base": "F", "merged": "G"}]
    text = generations("chat", {"answers": answers, "generated": {"rows": rows}})
    assert text.startswith(
        "# chat: what the models write\n\n## Q 1?\n\nbase:\n\n    B\n\nmerged:\n\n    ```\n    # A\n"
    )
    assert "base, sampled:\n\n    T\n\nmerged, sampled:\n\n    S\n" in text
    assert "## Why?\n\nbase:\n\n    F\n\nexpected:\n\n    E\n\nmerged:\n\n    G\n" in text
    filled = [
        {"prompt": "a <mask>", "answer": "a b", "base": "a c", "candidates": ["b 0.5"], "base_candidates": ["c 1"]}
    ]
    assert "merged, most probable:\n\n    b 0.5\n" in generations("m", {"answers": filled, "generated": {}})


def described(root: Path, phase: str) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Return funnels, sums of the blocks, register and Croissant of a phase of a project, the current folder."""
    grouping = arrow.read_json(root / "data/blocks" / phase / "grouping.json")
    sources = sorted(path.name for path in (root / "data/clean" / phase).iterdir())
    funnels = {source: source_register.funnel(phase, source, grouping) for source in sources}
    entries = source_register.register(phase, funnels)
    return (
        funnels,
        source_register.totals(phase, grouping),
        entries,
        croissant.describe(phase, entries, grouping, "ab" * 32),
    )


def test_the_card_calls_a_duplicate_only_what_is_one(varied_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds an item of a benchmark, or was taken out by name, is another thing, and each has its own column."""
    monkeypatch.chdir(varied_project)
    rows = data_rows("packs", described(varied_project, "packs")[0])
    for row in rows:
        rules = [one["rule"] or "" for one in arrow.table(Path("data/dedup/packs", row["source"])).to_pylist()]
        assert row["duplicates"] == sum(rule.endswith("_duplicate") for rule in rules)
        assert row["in_benchmarks"] == sum(rule.startswith("decontaminate:") for rule in rules)
        assert row["excluded"] == rules.count("excluded")
        assert row["records"] == sum(row[name] for name in WENT)
    (packed,) = (row for row in rows if row["source"] == "packed")
    assert packed["in_benchmarks"] and packed["excluded"] and packed["duplicates"]


@pytest.mark.parametrize("phase", ["docs", "packs", "talk"])
def test_the_funnel_reconciles_records_bytes_and_tokens(
    varied_project: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """Counted anew from the rows of every folder, for every format and kind of block."""
    monkeypatch.chdir(varied_project)
    funnels, blocks, entries, _ = described(varied_project, phase)
    for source, one in funnels.items():
        ledger = arrow.table(Path("data/clean", phase, source, "ledger")).to_pylist()
        documents = arrow.table(Path("data/clean", phase, source, "documents")).to_pylist()
        decisions = arrow.table(Path("data/dedup", phase, source)).to_pylist()
        tokens = arrow.table(Path("data/tokens", phase, source)).to_pylist()
        texts = [d["text"] if "text" in d else "".join(m["content"] for m in d["messages"]) for d in documents]
        kept = [len(t.encode()) for t, d in zip(texts, decisions, strict=True) if d["split"] == "train"]
        assert one["clean"]["records_in"] == len(ledger)
        assert one["clean"]["documents_out"] == one["dedup"]["documents_in"] == len(documents)
        assert one["clean"]["bytes_out"] == sum(len(text.encode()) for text in texts)
        assert (one["dedup"]["train"], one["dedup"]["train_bytes"]) == (len(kept), sum(kept))
        for split in ("train", "eval"):
            lengths = [len(row["input_ids"]) for row in tokens if row["split"] == split]
            assert one["tokens"][split] == one["blocks"][split]["tokens_in"] == sum(lengths)
    for split in ("train", "eval"):
        rows = arrow.table(Path("data/blocks", phase, split)).num_rows
        size = arrow.read_json(Path("data/blocks", phase, "grouping.json"))["block_size"]
        assert blocks[split]["in_blocks"] + blocks[split]["padding"] == rows * size
        assert sum(one["blocks"][split]["tokens_shown"] for one in funnels.values()) == blocks[split]["shown"]
        assert blocks[split]["shown"] == blocks[split]["in_blocks"] + blocks[split]["left_out"]
    assert sum(entry["share_of_tokens"] for entry in entries) == pytest.approx(1, abs=1e-5)
    assert sum(entry["train_tokens"] for entry in entries) == blocks["train"]["in_blocks"]
    assert (blocks["train"]["left_out"] > 0) == (phase != "docs")


def test_what_was_dropped_stands_in_the_funnel_by_rule(varied_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(varied_project)
    funnels, _, entries, _ = described(varied_project, "packs")
    clean, dedup = funnels["packed"]["clean"], funnels["packed"]["dedup"]
    assert clean["dropped"] == {"empty": 1, "length": 1, "symbol_share": 1}
    assert dedup["dropped"] == {"decontaminate:quiz": 1, "exact_duplicate": 1, "excluded": 1, "near_duplicate": 1}
    assert clean["personal_information"] == 1
    summary = source_register.summary("packs", "models/base/x", entries, 1)
    assert summary["data_processing"]["documents_excluded_on_request"] == 1
    assert summary["data_processing"]["records_with_personal_information_replaced"] == 1
    assert summary["general_information"]["latest_data_acquisition"] == "unknown"
    for days, latest in ((["2024-03-01", "2025-01-31"], "2025-01-31"), (["2024-03-01", "unknown"], "unknown")):
        two = [{**entries[0], "collected_on": day, "train_tokens": 500_000_000} for day in days]
        about = source_register.summary("packs", "models/base/x", two, 1)["general_information"]
        assert (about["latest_data_acquisition"], about["size"]) == (latest, "1 billion to 10 trillion")
    (row,) = source_register.collection_record(entries)
    assert (row["name"], row["licence_or_authorisation"], row["origin"]) == ("packed", "CC0-1.0", "unknown")


def test_the_bytes_of_a_part_of_a_batch_are_its_own() -> None:
    said = [[{"content": text} for text in texts] for texts in (["法律", "a"], ["bc"], [], ["d", "ef"])]
    batch = pa.record_batch({"messages": said})
    assert source_register.text_bytes(batch).tolist() == [7, 2, 0, 3]
    assert source_register.text_bytes(batch.slice(1, 3)).tolist() == [2, 0, 3]


def test_a_lost_document_is_never_published(varied_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(varied_project)
    decided = source_register.decided
    monkeypatch.setattr(source_register, "decided", lambda folder: [*decided(folder), ("train", None)].__iter__())
    with pytest.raises(ValueError, match="went in"):
        described(varied_project, "packs")


@pytest.mark.parametrize(
    ("stage", "key", "said"),
    [
        ("clean", "records_in", "records of clean: 6 went in, 5 came out"),
        ("clean", "documents_out", "records of clean: 5 went in, 6 came out"),
        ("dedup", "documents_in", "documents of dedup: 4 went in, 5 came out"),
        ("dedup", "train", "documents after dedup: 4 went in, 5 came out"),
        ("dedup", "eval_bytes", "bytes after dedup: 40 went in, 41 came out"),
        ("tokens", "documents_in", "documents of tokens: 3 went in, 4 came out"),
        ("blocks", "tokens_shown", "train tokens of blocks: 7 went in, 8 came out"),
    ],
)
def test_what_does_not_add_up_is_never_published(stage: str, key: str, said: str) -> None:
    found: dict[str, Any] = {
        "clean": {"records_in": 5, "documents_out": 4, "dropped": {"length": 1}},
        "dedup": {"documents_in": 4, "train": 2, "eval": 1, "dropped": {"exact_duplicate": 1}}
        | {"bytes_in": 40, "train_bytes": 20, "eval_bytes": 10, "dropped_bytes": 10},
        "tokens": {"documents_in": 3},
        "blocks": {"train": {"weight": 1, "tokens_in": 7, "tokens_shown": 7}},
    }
    source_register._conserved("laws", found, True)
    with pytest.raises(ValueError, match=r"laws: .* went in"):
        source_register._conserved("laws", found, False)
    place = found[stage]["train"] if stage == "blocks" else found[stage]
    place[key] += 1
    with pytest.raises(ValueError, match=f"laws: {said}; nothing was published"):
        source_register._conserved("laws", found, True)
    found["blocks"]["train"]["weight"] = 2  # shown twice
    if stage == "blocks":
        source_register._conserved("laws", found, True)


@pytest.mark.parametrize("phase", ["packs", "talk"])
def test_what_blocks_leave_out_is_what_they_leave_out_of_their_sources(
    varied_project: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    monkeypatch.chdir(varied_project)
    grouping = arrow.read_json(Path(f"data/blocks/{phase}/grouping.json"))
    by_source, all_ = source_register.left_out(Path("data/blocks", phase)), source_register.totals(phase, grouping)
    for split in ("train", "eval"):
        assert all_[split]["left_out"] == sum(n for (of, _), n in by_source.items() if of == split)
    assert all_["train"]["left_out"]
    grouping["eval"][next(iter(grouping["eval"]))]["tokens"] += 1
    with pytest.raises(ValueError, match="eval tokens were shown, its blocks account for others"):
        source_register.totals(phase, grouping)


@pytest.mark.parametrize("phase", ["docs", "packs", "talk"])
def test_the_croissant_names_every_shard_with_its_digest_and_every_source(
    varied_project: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    monkeypatch.chdir(varied_project)
    _, _, entries, found = described(varied_project, phase)
    files = [one for one in found["distribution"] if one["@type"] == "cr:FileObject"]
    shards = sorted(
        path.as_posix() for path in Path("data/blocks", phase).glob("*/data-*.arrow") if "left" not in str(path)
    )
    assert sorted(one["contentUrl"] for one in files) == shards
    assert all(one["contentSize"] == f"{Path(one['contentUrl']).stat().st_size} B" for one in files)
    assert {one["@id"].rsplit(":", 1)[1] for one in found["prov:wasDerivedFrom"]} == {one["source"] for one in entries}
    columns = set(arrow.manifest(Path("data/blocks", phase, "train"))["schema"])
    assert {field["@id"].split("/")[1] for field in found["recordSet"][0]["field"]} == columns
    assert found["conformsTo"] == "http://mlcommons.org/croissant/1.1"


@pytest.mark.parametrize("phase", ["docs", "packs", "talk"])
def test_the_dataset_card_is_what_the_hub_reads_and_opens_the_blocks(
    varied_project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, phase: str
) -> None:
    """`huggingface_hub` reads its header back; as README.md in the folder of blocks it makes `load_dataset` work."""
    from datasets import load_dataset
    from huggingface_hub import DatasetCard

    monkeypatch.chdir(varied_project)
    _, blocks, entries, _ = described(varied_project, phase)
    entries[0] |= {"language": "zh-Hans, en", "records_with_personal_information_replaced": 3}
    grouping = arrow.read_json(Path("data/blocks", phase, "grouping.json"))
    given = (phase, entries, blocks, grouping, "ab" * 32, "text-generation", table)
    text = dataset_card.card(*given)
    read = DatasetCard(text)
    assert (read.data.license, read.data.language) == (["cc0-1.0"], ["en", "zh"])
    assert read.data.size_categories == ["n<1K"]
    assert read.data.to_dict()["configs"][0]["data_files"][0] == {"split": "train", "path": "train/data-*.arrow"}
    assert str(read).count("\n---\n") == 1 and str(read).startswith("---\n")
    assert "was replaced: 3." in text and f"| {entries[0]['source']} | CC0-1.0 |" in text
    entries[0] |= {"license": "PSF-2.0"}
    other = DatasetCard(dataset_card.card(*given)).data
    assert other.license == "other"
    names = sorted({"PSF-2.0", *(entry["license"] for entry in entries)})
    assert other.to_dict()["license_name"] == ", ".join(names)
    shutil.copytree(Path("data/blocks", phase), tmp_path / "blocks")
    (tmp_path / "blocks/README.md").write_text(text)
    opened = load_dataset(str(tmp_path / "blocks"), cache_dir=str(tmp_path / "cache"))
    for split in ("train", "eval"):
        rows = arrow.table(Path("data/blocks", phase, split))
        assert opened[split].num_rows == rows.num_rows == blocks[split]["blocks"]
        assert opened[split]["input_ids"][:] == rows["input_ids"].to_pylist()


def test_the_cards_of_a_masked_model_say_so(tmp_path: Path) -> None:
    for architecture, said in (("RobertaForMaskedLM", "fill-mask"), ("LlamaForCausalLM", "text-generation")):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        assert task(tmp_path) == said


def test_mlcroissant_finds_no_error_in_it(
    varied_project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mlcroissant = pytest.importorskip(
        "mlcroissant", reason="the validator of Croissant is no dependency of this project"
    )
    monkeypatch.chdir(varied_project)
    for phase in varied.params()["phases"]:
        path = tmp_path / f"{phase}.json"
        path.write_text(json.dumps(described(varied_project, phase)[3]))
        metadata = mlcroissant.Dataset(jsonld=path).metadata
        assert not metadata.ctx.issues.errors
        missing = [str(one) for one in metadata.ctx.issues.warnings]
        assert all("citeAs" in one or "datePublished" in one for one in missing), missing
