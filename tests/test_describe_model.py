"""describe_model: the card tells the licence, the funnel and the digests, and its numbers add up."""

from __future__ import annotations

from typing import Any

from describe_model import card, generations, table

ROW: dict[str, Any] = {
    "source": "laws",
    "license": "CC0-1.0",
    "owner": "the state",
    "origin": "gazette",
    "language": "zh",
    "bytes": 1234567,
    "records": 10,
    "dropped": 1,
    "duplicates": 2,
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
    text = card("chat", "models/pretrain/merged", [ROW], EVALUATION, {"models/chat/merged": "ab" * 32})
    assert text.startswith("---\n")
    assert '\nlanguage: ["zh"]\n' in text
    assert "| laws | CC0-1.0 | the state | gazette | zh |" in text
    assert "| laws | 1,234,567 | 10 | 1 | 2 | 6 | 1 | 5,000 |" in text
    assert "see [its card](../pretrain/model_card.md)" in text
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
