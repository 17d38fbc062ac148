"""Train a byte-level BPE against Hugging Face's BpeTrainer: the same bytes first, then CPU seconds; exit 1 below 3x.

The text is made here: words of a Zipf distribution, in documents, once as English looks (words of letters between
spaces) and once as Chinese does (clauses of common characters between marks). Both sides run as child processes, in
turn, and each reads the same file. The ratio is of the medians of user + system time, the start of Python included,
so English, which is quick for both, gains with its size: a user trains on up to 100 MB (sample_bytes).

    python bench/train_tokenizer.py [MB of English, MB of Chinese]
"""

from __future__ import annotations

import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGET, ROUNDS, VOCAB_SIZE, MIN_FREQUENCY = 3.0, 3, 16_384, 2
MEGABYTES = {"english": 30.0, "chinese": 12.0}
SPECIALS = ["<s>", "</s>", "<pad>"]
GAP = "\x1e"  # between documents in the file


def text(language: str, n_bytes: int) -> str:
    """Return about `n_bytes` of documents: 1,500 words each, drawn from 60,000 with a probability of 1 / rank."""
    draw = random.Random(language)
    if language == "english":
        words = ["".join(draw.choices("etaoinshrdlcumwfgypbvk", k=draw.randint(2, 11))) for _ in range(60_000)]
    else:
        characters = [chr(0x4E00 + draw.randrange(6000)) for _ in range(3000)]
        weights = [1 / (rank + 5) for rank in range(3000)]
        words = ["".join(draw.choices(characters, weights, k=draw.choice((1, 2, 2, 2, 3, 4)))) for _ in range(60_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    documents, size = [], 0
    while size < n_bytes:
        chosen = draw.choices(words, weights, k=1500)
        if language == "english":
            document = " ".join(
                word + draw.choice(("", "", "", "", "", ",", ".", ".\n", f" {size % 97}")) for word in chosen
            )
        else:
            document = "".join(word + draw.choice(("", "", "", "", "，", "。", "。\n", "、")) for word in chosen)
        documents.append(document)
        size += len(document.encode("utf-8"))
    return GAP.join(documents)


def ours(documents: list[str]) -> str:
    """Return tokenizer.json as train_tokenizer makes it, without what it adds to the training."""
    sys.path.insert(0, str(ROOT / "stages"))
    import bpe_training

    words = bpe_training.count_words(iter(documents), "byte_level")
    tokenizer = bpe_training.train(words, VOCAB_SIZE, MIN_FREQUENCY, SPECIALS)
    tokenizer.pre_tokenizer = bpe_training.pre_tokenizer("byte_level")
    return str(tokenizer.to_str())


def peer(documents: list[str]) -> str:
    """Return tokenizer.json as BpeTrainer makes it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=MIN_FREQUENCY,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(documents), trainer)
    return str(tokenizer.to_str())


def seconds(side: str, source: Path, result: Path) -> tuple[float, float]:
    """Return CPU and wall seconds of one side in a process of its own."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, __file__, side, str(source), str(result)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.perf_counter() - started


def main(sizes: dict[str, float]) -> None:
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        for language, megabytes in sizes.items():
            source = Path(folder, f"{language}.txt")
            source.write_text(text(language, int(megabytes * 1e6)), encoding="utf-8")
            taken: dict[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
            for _ in range(ROUNDS):
                for side, times in taken.items():
                    times.append(seconds(side, source, Path(folder, side)))
            if Path(folder, "ours").read_bytes() != Path(folder, "peer").read_bytes():
                raise SystemExit(f"{language}: the tokenizers differ, so there is nothing to compare.")
            (cpu, wall), (cpu_of_peer, wall_of_peer) = (
                [statistics.median(column) for column in zip(*rows, strict=True)] for rows in taken.values()
            )
            ratio = cpu_of_peer / cpu
            missed += [language] if ratio < BUDGET else []
            print(
                f"{language:8} {megabytes:3.0f} MB, {VOCAB_SIZE:,} entries   "
                f"CPU {cpu:6.2f} s, BpeTrainer {cpu_of_peer:6.2f} s   "
                f"wall {wall:6.2f} s, {wall_of_peer:6.2f} s   CPU ratio {ratio:.2f}   budget {BUDGET:.1f}   "
                f"{'MISSED' if ratio < BUDGET else 'kept'}",
                flush=True,
            )
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    if sys.argv[1:2] in (["ours"], ["peer"]):
        make = ours if sys.argv[1] == "ours" else peer
        documents = Path(sys.argv[2]).read_text(encoding="utf-8").split(GAP)
        Path(sys.argv[3]).write_text(make(documents), encoding="utf-8")
    else:
        main(dict(zip(MEGABYTES, map(float, sys.argv[1:] or MEGABYTES.values()), strict=True)))
