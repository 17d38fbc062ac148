"""What a training will need, before it is begun: parameters, steps, and memory by part. Nothing is loaded or computed.

    plan = make(base, tokenizer, params, block_size, steps)     # params: train_model's
    print(plan)
    plan.refuse()                                               # SystemExit when it cannot fit

The model is built of torch's fake tensors, which have shapes and no values: a 7 B model takes no memory. A forward pass
of fake blocks then tells each tensor that is kept for the gradient, whatever the architecture. Not counted: buffers
that live shorter than a layer, and what the allocator holds back. The peaks of five small trainings on a CPU (all
weights, checkpointing, LoRA, a large vocabulary, Muon) were 4 % below to 24 % above it, so that it refuses too little.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from kit.model import new_tokens  # first: it says that nothing is to be fetched

# isort: split
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.initialization import no_init_weights
from transformers.integrations import moe

import adapters
import optimizers
from adapter_params import Quantization
from kit.base import check_base, has_weights, read_config
from kit.tokenizer import Vocabulary
from loss_head import bare, chunk_rows

if TYPE_CHECKING:
    from train_model import Params

MIB = 2**20
# Bytes of optimizer state a trained parameter: moments in float32, in blocks of 8 bits with their scales, or none.
STATE_BYTES = {"sgd": 0.0, "lion": 4.0, "rmsprop": 4.0, "adagrad": 4.0, "ademamix": 12.0, "adamw": 8.0}
EIGHT_BITS = 1.02 / 4  # of a float32: 8 bits and one float32 scale for 256 values


@dataclass
class Plan:
    """The numbers; memory in bytes by part."""

    parameters: int
    trained: int
    tokens_per_step: int
    steps: int
    memory: dict[str, float]
    device: str
    free: float

    @property
    def needed(self) -> float:
        """Bytes, all parts together."""
        return sum(self.memory.values())

    def __str__(self) -> str:
        lines = [
            f"parameters   {self.parameters:,}, trained {self.trained:,} ({self.trained / self.parameters:.2%})",
            f"steps        {self.steps:,} of {self.tokens_per_step:,} tokens, "
            f"{self.steps * self.tokens_per_step:,} in all",
            f"device       {self.device}, {self.free / MIB:,.0f} MiB free",
            f"memory       {self.needed / MIB:,.0f} MiB, an estimate:",
        ]
        return "\n".join([*lines, *(f"  {part:<11}{size / MIB:>10,.0f} MiB" for part, size in self.memory.items())])

    def refuse(self) -> None:
        """Raise SystemExit when the memory that is needed is more than there is."""
        if self.needed <= self.free:
            return
        most = max((size, part) for part, size in self.memory.items() if part != "program")[1]
        remedy = {
            "activations": "lower per_device_train_batch_size, or set gradient_checkpointing",
            "weights": "take a smaller base, or hold it in 4 bits with quantization and lora",
            "loss": "lower per_device_train_batch_size",
        }.get(most, "train an adapter (lora), or take an optimizer with 8 bits")
        raise SystemExit(
            f"this training needs about {self.needed / MIB:,.0f} MiB ({most} most of all) and the {self.device} has "
            f"{self.free / MIB:,.0f} free; {remedy}."
        )


def quantised_bits(quantization: Quantization | None) -> float:
    """Return the bits of a weight in the base: 4 and a scale for each 64, which double quantisation stores in 8 bits.

    >>> round(quantised_bits(Quantization(bnb_4bit_use_double_quant=True)), 3)
    4.127
    """
    if quantization is None:
        return 32.0
    if quantization.load_in_8bit:
        return 8.0
    return 4 + (8 / 64 + 32 / (64 * 256) if quantization.bnb_4bit_use_double_quant else 32 / 64)


def optimizer_bytes(name: str, trained: list[tuple[torch.Size, bool]]) -> float:
    """Return the bytes of optimizer state for `trained` parameters: (shape, is a matrix of a layer)."""
    total = 0.0
    kind = name.removeprefix("paged_")
    for shape, inner in trained:
        count = shape.numel()
        if kind == "muon":
            total += count * (4 if inner else 8)
        elif kind == "adafactor":
            total += 4 * (count if len(shape) < 2 else sum(count // size for size in shape[-2:]))
        else:
            per = next((size for prefix, size in STATE_BYTES.items() if kind.startswith(prefix)), 8.0)
            # bitsandbytes keeps what has less than 4,096 values in 32 bits.
            total += count * per * (EIGHT_BITS if "8bit" in kind and count >= 4096 else 1)
    return total


class _FakeMode(FakeTensorMode):
    """Tensors without values; a copy of one, as peft makes of `modules_to_save`, is of the same mode."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _FakeMode:
        return self


def _build(base: Path, size: int, masked: bool) -> Any:
    config = read_config(base)
    config.vocab_size = max(size, config.vocab_size if has_weights(base) else 0)
    factory = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    with no_init_weights():  # there are no values to draw: some models would ask for one
        model = factory.from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model.train()


def _adapt(model: Any, params: Params, steps: int, more_tokens: bool) -> Any:
    assert params.lora
    # Where the matrices begin does not change their size, and needs values.
    plain = params.lora.model_copy(update={"init_lora_weights": True})
    # Everything is where it belongs, and torch 2.13 cannot move a module of fake tensors.
    with mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # by a copy of one
        return adapters.add(model, params.model_copy(update={"lora": plain}), steps, more_tokens)


def kept_for_gradients(model: Any, rows: int, block_size: int) -> tuple[float, float]:
    """Return the bytes that a forward pass of the layers keeps, and those of one layer's input; call in a fake mode."""
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    found: dict[int, tuple[Any, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = (storage, storage.nbytes())
        return tensor

    inner = bare(model)
    inner.config.use_cache = False
    ids = torch.zeros(rows, block_size, dtype=torch.long)
    # Of experts, torch 2.13 knows the shapes in bfloat16 alone; transformers' own product keeps the same.
    grouped = mock.patch.object(moe, "_can_use_grouped_mm", lambda *_: False)
    with grouped, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = inner.base_model(input_ids=ids)[0]
    return float(sum(size for _, size in found.values())), float(hidden.numel() * 4)


def make(base: Path, tokenizer: Path, params: Params, block_size: int, steps: int) -> Plan:
    """Return the plan of a training of `base` in `steps` steps, with blocks of `block_size` tokens."""
    check_base(base)
    rows, size = params.per_device_train_batch_size, Vocabulary(tokenizer).size
    with _FakeMode():
        model = _build(base, size, params.objective == "mlm")
        outer = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer}
        linear = {
            id(module.weight)
            for module in model.modules()
            if isinstance(module, torch.nn.Linear) and id(module.weight) not in outer
        }
        quantised = sum(p.numel() for p in model.parameters() if id(p) in linear) if params.quantization else 0
        inner = optimizers.inner_matrices(model)
        largest = max((p.numel() for p in model.parameters() if id(p) in linear), default=0)
        if params.lora:
            model = _adapt(model, params, steps, bool(new_tokens(base, tokenizer)))
        trained = [(p.shape, id(p) in inner) for p in model.parameters() if p.requires_grad]
        every = sum(p.numel() for p in model.parameters())
        activations, layer_input = kept_for_gradients(model, rows, block_size)
        layers = model.config.num_hidden_layers
        hidden_size = model.config.hidden_size
    of_a_layer = activations / layers
    if params.gradient_checkpointing:
        activations = of_a_layer + layers * layer_input
    if params.bf16:
        activations *= 0.6  # matmuls keep 2 bytes, norms and softmax 4
    head = 2 * 4 * chunk_rows(size) * size + 4 * rows * block_size * hidden_size
    head += 0 if params.lora else 4 * size * hidden_size  # the gradient of its weight, before it is added up
    count = sum(shape.numel() for shape, _ in trained)
    weights = quantised * quantised_bits(params.quantization) / 8 + 4 * (every - quantised)
    device, free, program = _device()
    memory = {
        "program": program,
        "weights": weights,
        "gradients": 4.0 * count,
        "optimizer": optimizer_bytes(params.optim, trained),
        "activations": activations,
        "backward": of_a_layer + (4.0 * largest if quantised else 0.0),  # a layer's gradients, its weights in 32 bits
        "loss": float(head),
    }
    return Plan(every, count, params.global_batch_size * block_size, steps, memory, device, free)


def _device() -> tuple[str, float, float]:
    """Return the name of the device, its free bytes (with those this process has), and what the program takes."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return torch.cuda.get_device_name(), float(free), 0.0
    own = _kib(Path("/proc/self/status"), "VmRSS") * 1024.0
    available = _kib(Path("/proc/meminfo"), "MemAvailable") * 1024.0
    for limit, used in _cgroups():
        available = min(available, limit - used)
    return "CPU", available + own, own


def _kib(path: Path, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text() if path.is_file() else "", re.MULTILINE)
    return int(found[1]) if found else 2**40


def _cgroups() -> Iterator[tuple[float, float]]:
    """Yield limit and use of a container's memory, where it has a limit."""
    folder = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        if (folder / limit).is_file() and (text := (folder / limit).read_text().strip()).isdecimal():
            yield float(text), float((folder / used).read_text())
