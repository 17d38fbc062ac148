"""Measure the memory of merging an adapter, against peft's merge_and_unload; exit 1 when the budget is missed.

    budget: 0.3 times the peak memory above `import torch`, the same bits

The base is a Llama of random bfloat16 weights, some 500 MB in two files; the adapter is LoRA of rank 8 on all of its
projections. peft loads both, merges and saves, as its documentation says. Ours is stages/merge_weights.py. Each runs in
a process of its own, by turns; the peak is the kernel's (VmHWM), less that of a process that imports torch alone.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "stages"))
BUDGET = 0.3
TURNS = 3
SHAPE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 24, "vocab_size": 32000}
HEADS = {"num_attention_heads": 12, "num_key_value_heads": 12, "tie_word_embeddings": False}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write(folder: Path) -> None:
    """Write the base and an adapter whose matrices are not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS)).to(torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="400MB")
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(folder / "adapter")


def merge(side: str, folder: Path) -> None:
    """Merge base and adapter into folder/SIDE."""
    target = folder / side
    if side == "ours":
        import merge_weights

        target.mkdir(exist_ok=True)
        merge_weights.merge(folder / "base", folder / "adapter", target)
    elif side == "peft":
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().save_pretrained(target)
    else:
        import torch


def child(side: str, folder: Path) -> None:
    """Do the work of one side; print its peak memory in MiB and its seconds."""
    started = time.perf_counter()
    if side == "write":
        write(folder)
    else:
        merge(side, folder)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak
    print(json.dumps([int(peak[1]) / 1024, time.perf_counter() - started]))


def run(side: str, folder: Path) -> tuple[float, float]:
    """Return what a child process prints last."""
    done = subprocess.run([sys.executable, __file__, side, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed: {done.stderr[-2000:]}")
    peak, seconds = json.loads(done.stdout.splitlines()[-1])
    return peak, seconds


def differences(folder: Path) -> int:
    """Return the number of tensors that are not the same in both results."""
    import torch
    from safetensors import safe_open

    sides = []
    for side in ("ours", "peft"):
        files = [safe_open(path, "pt") for path in sorted((folder / side).glob("*.safetensors"))]
        sides.append({name: file for file in files for name in file.keys()})  # noqa: SIM118  (not a dict)
    ours, theirs = sides
    shared = ours.keys() & theirs.keys()
    different = sum(not torch.equal(ours[name].get_tensor(name), theirs[name].get_tensor(name)) for name in shared)
    return different + len(ours.keys() ^ theirs.keys())


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run("write", folder)
        size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors")) / 1e6
        rows: dict[str, list[tuple[float, float]]] = {"torch": [], "ours": [], "peft": []}
        for _ in range(TURNS):
            for side, found in rows.items():
                found.append(run(side, folder))
        if found_different := differences(folder):
            raise SystemExit(f"{found_different} tensors differ; nothing was measured.")
    peaks, seconds = (
        {side: statistics.median(row[column] for row in found) for side, found in rows.items()} for column in (0, 1)
    )
    ours, theirs = peaks["ours"] - peaks["torch"], peaks["peft"] - peaks["torch"]
    print(f"merging LoRA into {size:.0f} MB, equal to the bit; peak MiB above `import torch`, median of {TURNS}:")
    print(f"  peft {theirs:.0f} in {seconds['peft']:.1f} s, merge_weights {ours:.0f} in {seconds['ours']:.1f} s")
    print(f"  {ours / theirs:.2f} times, budget {BUDGET}")
    raise SystemExit(0 if ours <= BUDGET * theirs else 1)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        child(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
