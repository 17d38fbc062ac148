"""Write the model card of a phase: what it was trained on, how well it does, and the digests that prove it.

Reads:  data/sources, data/clean, data/dedup, data/tokens and data/blocks of PHASE, metrics/PHASE,
        models/PHASE/merged, models/PHASE/trained/training.json
Writes: reports/PHASE/model_card.md    in the form of a Hugging Face model card
        reports/PHASE/generations.md   what base and merged model wrote, one under the other
        reports/PHASE/funnel.json      records, bytes and tokens into and out of each stage, for each source
        reports/PHASE/sources.json     source register: licence, owner, origin, share of tokens; the fields of the EU's
                                       summary of training content and of the Chinese collection record
        reports/PHASE/croissant.json   Croissant 1.1 with PROV-O for the blocks
        reports/PHASE/dataset_card.md  the blocks in the form of a Hugging Face dataset card: stages/dataset_card.py
Params: none

Example of the data table, one line a source:

    | source | bytes     | records | dropped | duplicates | in_benchmarks | excluded | train | eval | tokens    |
    | laws   | 9,876,543 | 1,000   | 12      | 2          | 1             | 0        | 940   | 45   | 2,900,000 |
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import croissant
import dataset_card
import source_register
from kit import arrow, stage
from kit.params import Phase, phase_sources, read_params

# Where the records of a source went, as the card's table names it.
WENT = ("dropped", "duplicates", "in_benchmarks", "excluded", "train", "eval")


def data_rows(phase: str, funnels: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per source: origin, licence, owner and the conserved counts of each stage."""
    rows = []
    for source, funnel in funnels.items():
        out = funnel["dedup"]["dropped"]
        in_benchmarks = sum(number for rule, number in out.items() if rule.startswith("decontaminate:"))
        about = source_register.read_about(phase, source)
        ledger = arrow.manifest(Path("data/clean", phase, source, "ledger"))["counts"]
        dedup = arrow.manifest(Path("data/dedup", phase, source))["counts"]
        tokens = arrow.manifest(Path("data/tokens", phase, source))["counts"]
        rows.append(
            {
                "source": source,
                **{name: about[name] for name in ("license", "owner", "origin", "language")},
                "bytes": about["bytes"],
                "records": ledger["rows"],
                "dropped": ledger["rows"] - ledger["kept"],
                "duplicates": dedup["dropped"] - in_benchmarks - out.get("excluded", 0),
                "in_benchmarks": in_benchmarks,
                "excluded": out.get("excluded", 0),
                "train": dedup["train"],
                "eval": dedup["eval"],
                "tokens": tokens["train"] + tokens["eval"],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows with equal keys as a Markdown table; whole numbers with thousands separators."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        lines.append("| " + " | ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()) + " |")
    return "\n".join(lines)


def task(model: Path) -> str:
    """Return what the Hub calls what a model does, by the architecture that its config.json names."""
    named = arrow.read_json(model / "config.json").get("architectures") or [""]
    return "fill-mask" if named[0].endswith("ForMaskedLM") else "text-generation"


def card(
    phase: str,
    base: str,
    rows: list[dict[str, Any]],
    evaluation: dict[str, Any],
    shown: str,
    digests: dict[str, str],
    pipeline_tag: str = "text-generation",
) -> str:
    """Return the text of the model card."""
    total = Counter({name: sum(row[name] for row in rows) for name in ("records", "train", "eval", "tokens")})
    models = [{"model": name, **evaluation[name]} for name in ("base", "trained", "merged")]
    scale = ", ".join(f"{name} {value:.3f}" for name, value in sorted(evaluation["scale"].items()))
    languages = dataset_card.languages(rows)
    licenses = sorted({row["license"] for row in rows})
    origins = [{name: row[name] for name in ("source", "license", "owner", "origin", "language")} for row in rows]
    funnel = [
        {name: value for name, value in row.items() if name not in ("license", "owner", "origin", "language")}
        for row in rows
    ]
    answers = "\n\n".join(f"> {a['prompt']}\n\n```text\n{a['answer'].strip()}\n```" for a in evaluation["answers"])
    chained = PurePosixPath(base).parts
    lineage = (
        f" It goes on from phase `{chained[1]}`, whose text and licences are in reports/{chained[1]}/model_card.md."
        if chained[-1] == "merged"
        else ""
    )
    front = {"library_name": "transformers", "pipeline_tag": pipeline_tag, "tags": ["terroir"]}
    front |= {"language": languages} if languages else {}
    return "\n".join(
        [
            "---",
            *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in sorted(front.items())),
            "---",
            f"# {phase}",
            "",
            f"Trained by Terroir from `{base}`. Its text: {total['tokens']:,} tokens in "
            f"{total['train'] + total['eval']:,} documents, of which {total['eval']:,} are held out. {shown}{lineage}",
            "",
            "## Data",
            "",
            table(origins),
            "",
            f"Nothing leaves without a count: records = {' + '.join(WENT)}.",
            "",
            table(funnel),
            "",
            f"Licences of these sources: {', '.join(licenses)}. Check them"
            f"{f', and those of phase `{chained[1]}`,' if lineage else ''} before the model is given away.",
            "",
            "## Evaluation on the held-out documents",
            "",
            table(models),
            "",
            *([f"Scale, bits per byte of the same text: {scale}.", ""] if "bits_per_byte" in models[0] else []),
            *(["## Answers to the fixed prompts", "", answers, ""] if answers else []),
            f"In reports/{phase} of its project: funnel.json (where each record, byte and token went), sources.json "
            "(the register of sources), croissant.json (the blocks). There `python -m lineage` traces a line, block, "
            "step or sentence.",
            "",
            "## Digests (SHA-256)",
            "",
            table([{"path": f"`{path}`", "digest": f"`{value}`"} for path, value in sorted(digests.items())]),
            "",
        ]
    )


def generations(phase: str, evaluation: dict[str, Any]) -> str:
    """Return what base and merged model wrote to the fixed prompts and to held-out questions, as Markdown."""
    titles = {
        "base": "base",
        "answer": "merged",
        "base_sampled": "base, sampled",
        "sampled": "merged, sampled",
        "base_candidates": "base, most probable",
        "candidates": "merged, most probable",
        "expected": "expected",
        "merged": "merged",
    }
    lines = [f"# {phase}: what the models write", ""]
    for row in [*evaluation["answers"], *evaluation["generated"].get("rows", [])]:
        lines += [f"## {' '.join((row.get('prompt') or row['question']).split())}", ""]
        for name, title in titles.items():
            if name in row:
                text = row[name] if isinstance(row[name], str) else "\n".join(row[name])
                # Indented, not fenced: a model may write fences.
                lines += [f"{title}:", "", *(f"    {line}" for line in text.split("\n")), ""]
    return "\n".join(lines)


def main(phase: str) -> None:
    base = read_params(f"phases.{phase}", Phase).base
    inputs = [f"data/{name}/{phase}" for name in ("sources", "clean", "dedup", "tokens", "blocks")]
    trained = Path("models", phase, "trained/training.json")
    inputs += [f"metrics/{phase}", f"models/{phase}/merged", str(trained)]
    with stage.run("describe_model", phase, inputs, [f"reports/{phase}"]) as run:
        (folder,) = run.outputs
        sources = phase_sources(phase, Path("data/clean", phase))
        grouping = arrow.read_json(Path("data/blocks", phase, "grouping.json"))
        funnels = {source: source_register.funnel(phase, source, grouping) for source in sources}
        rows = data_rows(phase, funnels)
        for row in rows:
            run.balance(f"records of {row['source']}", row["records"], **{name: row[name] for name in WENT})
        blocks = source_register.totals(phase, grouping)
        entries = source_register.register(phase, funnels)
        excluded = sum(one["dedup"]["dropped"].get("excluded", 0) for one in funnels.values())
        summary = source_register.summary(phase, base, entries, excluded)
        listed = {"register": entries, "eu_training_content_summary": summary}
        listed["collection_record"] = source_register.collection_record(entries)
        described = croissant.describe(phase, entries, grouping, run.digests[f"data/blocks/{phase}"])
        arrow.write_json(folder / "funnel.json", {"sources": funnels, "blocks": blocks})
        arrow.write_json(folder / "sources.json", listed)
        arrow.write_json(folder / "croissant.json", described)
        evaluation = arrow.read_json(Path("metrics", phase, "evaluation.json"))
        does = task(Path("models", phase, "merged"))
        training = arrow.read_json(trained)
        epoch = arrow.manifest(Path("data/blocks", phase, "train"))["counts"]["rows"]
        shown = (
            f"Training showed {training['blocks']:,} blocks of {grouping['block_size']:,} tokens in "
            f"{training['steps']:,} steps; an epoch has {epoch:,}."
        )
        text = card(phase, base, rows, evaluation, shown, run.digests, does)
        (folder / "model_card.md").write_text(text, encoding="utf-8")
        of_blocks = dataset_card.card(
            phase, entries, blocks, grouping, run.digests[f"data/blocks/{phase}"], does, table
        )
        (folder / "dataset_card.md").write_text(of_blocks, encoding="utf-8")
        (folder / "generations.md").write_text(generations(phase, evaluation), encoding="utf-8")
        run.count(sources=len(rows), records=sum(row["records"] for row in rows))


if __name__ == "__main__":
    stage.cli(main, __doc__)
