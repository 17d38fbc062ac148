"""The tensors of merge_lora: an adapter folded into the weight files of its base, one tensor in memory at a time.

A weight W becomes, as peft 0.21 computes it and to the same bits (product and sum in float32, rounded once):

    LoRA           W + s B A, s = alpha / r
    rsLoRA         the same, s = alpha / sqrt(r): Kalajdzievski, 2023, arXiv 2312.03732
    DoRA           m (W + s B A) / |W + s B A|, norms of the rows, m the magnitudes: Liu et al., 2024, arXiv 2402.09353
    AdaLoRA        W + alpha / r B (E A), E a value for each row of A: Zhang et al., 2023, arXiv 2303.10512
    whole tensor   the adapter's own: modules_to_save, biases, embeddings that have grown

`layers` and `whole` say which tensors of the adapter belong to which weight; `merge` writes the files.
"""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.pytorch_utils import Conv1D

from kit import arrow, malloc
from kit.base import INDEX, SINGLE, copy_bytes, tensors, weight_files, write_header
from kit.model import new_tokens

PREFIX = "base_model.model."
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What an adapter may say and still be a sum: every other setting that is on is refused.
COVERED = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
    # how it was trained, not what it is
    "beta1",
    "beta2",
    "deltaT",
    "init_r",
    "loftq_config",
    "megatron_core",
    "orth_reg_weight",
    "qalora_group_size",
    "target_r",
    "tfinal",
    "tinit",
    "total_step",
}


def check_adapter(config: dict[str, Any]) -> None:
    """Raise ValueError when the adapter is of a kind that this merge does not cover."""
    if config.get("peft_type") not in ("LORA", "ADALORA"):
        raise ValueError(f"the adapter is of type {config.get('peft_type')}, only LORA and ADALORA can be merged.")
    for name in sorted(config.keys() - COVERED):
        if config[name] not in (None, False, [], {}):
            raise ValueError(f"the adapter has {name} {config[name]!r}, which cannot be merged; train without it.")
    if str(config.get("init_lora_weights")).lower().startswith(("pissa", "olora", "corda", "lora_ga", "loftq")):
        raise ValueError(
            f"the adapter was begun by {config['init_lora_weights']}, which takes a part out of the base's weights; "
            "save it with path_initial_model_for_weight_conversion, so that it stands on the base itself."
        )


class Adapter:
    """The tensors of a peft adapter, read one by one, under the names of the base's weights.

    layers: weight -> part (`A`, `B`, `E`, `magnitude`, `embedding_A`, `embedding_B`, `tokens`) -> name in the file
    whole:  weight -> name in the file
    """

    def __init__(self, folder: Path) -> None:
        self.config = arrow.read_json(folder / "adapter_config.json")
        check_adapter(self.config)
        self.columns: set[str] | None = (
            None  # weights with a column for each output; None: what the adapter says of all
        )
        self.file = safe_open(folder / "adapter_model.safetensors", "pt")
        self.layers: dict[str, dict[str, str]] = {}
        self.whole: dict[str, str] = {}
        part = re.compile(r"(.+)\.(?:lora_(A|B|E|embedding_A|embedding_B|magnitude)(?:_vector)?|token_adapter\.(t)\w+)")
        for name in self.file.keys():  # noqa: SIM118  (not a dict)
            stem = name.removeprefix(PREFIX)
            if found := part.fullmatch(stem.removesuffix(".weight")):
                layer = found[1].removesuffix(".base_layer")
                self.layers.setdefault(f"{layer}.weight", {})[found[2] or "tokens"] = name
            elif "lora_" in stem:
                raise ValueError(f"the adapter holds {name}, which cannot be merged.")
            else:
                self.whole[stem.replace(".base_layer.", ".")] = name

    def shape(self, name: str) -> list[int]:
        """Return the shape of a tensor without reading it."""
        shape: list[int] = self.file.get_slice(name).get_shape()
        return shape

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return the merged tensor `name`; its dtype is that of the base's `weight`. Raises ValueError for a misfit."""
        if name in self.whole:
            weight = self.file.get_tensor(self.whole[name]).to(weight.dtype)
        parts = {part: self.file.get_tensor(key) for part, key in self.layers.get(name, {}).items()}
        if "tokens" in parts:
            return weight.index_copy(0, torch.tensor(self._token_ids(name)), parts["tokens"].to(weight.dtype))
        if not parts:
            return weight
        delta = self._delta(name.removesuffix(".weight"), parts)
        if delta.shape != weight.shape:
            raise ValueError(
                f"{name} has shape {list(weight.shape)}, but the adapter was made for {list(delta.shape)}."
            )
        if "magnitude" not in parts:
            if "embedding_A" in parts:  # rounded before the sum, too
                delta = delta.to(weight.dtype)
            return delta.add_(weight).to(weight.dtype)
        columns = "embedding_A" in parts or self._turned(name)  # an output is a column there
        total = weight + delta if columns else delta.add_(weight)  # the order in which a norm is summed follows weight
        factor = parts["magnitude"].float() / torch.linalg.norm(total.T if columns else total, dim=1)
        return total.mul_(factor.view(1, -1) if columns else factor.view(-1, 1)).to(weight.dtype)

    def _delta(self, layer: str, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        config, values = self.config, {part: tensor.float() for part, tensor in parts.items()}
        turned = self._turned(f"{layer}.weight")
        if "E" in values:
            product = values["B"] @ (values["A"] * values["E"])
            rank = torch.tensor([float(config["init_r"])])
            scaling = config["lora_alpha"] if config["lora_alpha"] > 0 else float(config["init_r"])
            return (product.T if turned else product) * scaling / (rank + 1e-5)
        if "embedding_A" in values:
            a, b, turned = values["embedding_A"], values["embedding_B"], True
        else:
            a, b = values["A"], values["B"]
        if a.ndim != 2:
            raise ValueError(
                f"{layer} is a convolution, whose adapter cannot be merged; leave it out of target_modules."
            )
        alpha = pattern(config.get("alpha_pattern"), layer, config["lora_alpha"])
        rank = pattern(config.get("rank_pattern"), layer, config["r"])
        product = b @ a
        product.mul_(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
        return product.T if turned else product

    def _turned(self, name: str) -> bool:
        # peft writes down what its last layer was: of a GPT-2 with an adapter on the head, too, that is False for all.
        return bool(self.config.get("fan_in_fan_out")) if self.columns is None else name in self.columns

    def _token_ids(self, name: str) -> list[int]:
        indices = self.config["trainable_token_indices"]
        if isinstance(indices, list):
            return indices
        layer = name.removesuffix(".weight")
        return next(ids for key, ids in indices.items() if layer == key or layer.endswith(f".{key}"))


def pattern(patterns: dict[str, float] | None, layer: str, otherwise: float) -> float:
    """Return the value of the first pattern that matches the end of a layer's name, as peft reads rank_pattern.

    >>> pattern({"q_proj": 4}, "model.layers.0.self_attn.q_proj", 8)
    4
    """
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", layer)), otherwise)


def skeleton(folder: Path) -> Any:
    """Return the model of a config.json without memory for its weights."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or ["none"])[0]
    with torch.device("meta"):
        if hasattr(transformers, name):
            return getattr(transformers, name)(config)
        return transformers.AutoModelForCausalLM.from_config(config)


def quantized_weights(model: Any) -> set[str]:
    """Return the names of the weights that BitsAndBytesConfig makes 4 bit of."""
    from transformers import BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = get_keys_to_not_convert(model)
    model = replace_with_bnb_linear(model, kept, BitsAndBytesConfig(load_in_4bit=True))
    return {f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


def through_4_bits(weight: torch.Tensor, quantization: dict[str, Any]) -> torch.Tensor:
    """Return a weight as it is after quantisation and back, in float32; `quantization`: of BitsAndBytesConfig."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight.float().contiguous(),
        compress_statistics=quantization["bnb_4bit_use_double_quant"],
        quant_type=quantization["bnb_4bit_quant_type"],
    )
    restored: torch.Tensor = dequantize_4bit(packed, state)
    return restored


def grown(weight: torch.Tensor, size: int, added: dict[int, list[int]]) -> torch.Tensor:
    """Return an embedding with `size` rows at least and those of `added` as `kit.model.grow` makes them."""
    rows = weight.float()
    if len(rows) < size:
        rows = torch.cat([rows, rows.new_zeros(size - len(rows), *rows.shape[1:])])
    mean = rows[: min(added)].mean(0)
    for number, pieces in added.items():
        rows[number] = rows[pieces].mean(0) if pieces else mean
    return rows.to(weight.dtype)


class Merge:
    """What becomes of each tensor of a base: kept, changed, new, or tied to another."""

    def __init__(self, base: Path, trained: Path, quantization: dict[str, Any] | None) -> None:
        self.base, self.adapter, self.quantization = base, Adapter(trained), quantization
        self.headers = {path: tensors(path) for path in weight_files(base)}
        model = skeleton(base)
        self.config = arrow.read_json(base / "config.json")
        modules = {id(module): name for name, module in model.named_modules()}
        self.adapter.columns = {
            f"{modules[id(layer)]}.weight" for layer in model.modules() if isinstance(layer, Conv1D)
        }
        self.expected = set(model.state_dict())
        self.converted: set[str] = set()  # what transformers makes of several stored tensors, as of the experts'
        conversions = get_model_conversion_mapping(model)
        self.place = {
            self._of_model(name, model.base_model_prefix, conversions): (path, name)
            for path, (_, header) in self.headers.items()
            for name in header
        }
        self.tied: dict[str, str] = dict(model.all_tied_weights_keys)  # e.g. lm_head.weight -> embed_tokens.weight
        pairs = model._tied_weights_keys or {}  # whether or not the base ties them
        self._check_names(pairs)
        output = model.get_output_embeddings()
        self.input = f"{modules[id(model.get_input_embeddings())]}.weight"
        last = [] if output is None else [f"{modules[id(output)]}.{each}" for each in ("weight", "bias")]
        self.embeddings = {self.input, *last, *(pairs[name] for name in last if name in pairs)}
        self.added = new_tokens(base, trained)
        self.size = max(self.added, default=-1) + 1
        self.through_4_bits = quantized_weights(model) if quantization else set()
        touched = self.adapter.layers.keys() | self.adapter.whole.keys() | self.through_4_bits
        if others := sorted(touched & self.converted):
            raise ValueError(f"{base} stores {others[0]} in another form than the model, which cannot be merged.")
        self.untied = {} if self._stay_tied() else self.tied

    def _of_model(self, name: str, prefix: str, conversions: list[Any]) -> str:
        """Return what the model calls a stored tensor: its name may lack, or add, the prefix of the headless model.

        Some names are of older versions of the model, and transformers changes them when it loads.
        """
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        renamings = [each for each in conversions if not isinstance(each, WeightConverter)]
        renamed, pattern = rename_source_key(name, renamings, converters)
        for each in (name, renamed):
            bare = each.removeprefix(f"{prefix}.")
            if found := next((one for one in (each, f"{prefix}.{each}", bare) if one in self.expected), None):
                if pattern is None or each == name:
                    return found
                self.converted.add(found)
        return name

    def _check_names(self, pairs: dict[str, str]) -> None:
        adapter = self.adapter
        if strangers := sorted((adapter.layers.keys() | adapter.whole.keys()) - self.expected):
            raise ValueError(f"{self.base} has no weight for {', '.join(strangers[:3])} of the adapter.")
        for target, source in pairs.items():
            # Of a grown output, peft saves the bias that the layer uses and forgets the one that it is tied to.
            if target in adapter.whole and source not in adapter.whole and source in self.place:
                path, stored = self.place[source]
                if adapter.shape(adapter.whole[target]) != self.headers[path][1][stored]["shape"]:
                    adapter.whole[source] = adapter.whole[target]

    def _touched(self, name: str) -> bool:
        return name in self.adapter.layers or name in self.adapter.whole

    def _stay_tied(self) -> bool:
        """Return whether tensors that are one in the base are still one; else each is written for itself."""
        for target, source in self.tied.items():
            if not self._touched(target) and not self._touched(source):
                continue
            if self.adapter.config.get("ensure_weight_tying") or "tokens" in self.adapter.layers.get(source, {}):
                continue
            if not torch.equal(self.value(target), self.value(source)):
                return False
        return True

    def value(self, name: str) -> torch.Tensor:
        """Return the merged tensor `name`, of the dtype of the base's."""
        there = name if name in self.place else self.tied.get(name, name)
        path, stored = self.place[there]
        begin, header = self.headers[path]
        entry = header[stored]
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{stored} is stored as {entry['dtype']}; only {', '.join(DTYPES)} can be merged.")
        first, last = entry["data_offsets"]
        with path.open("rb") as stream:
            stream.seek(begin + first)
            stream.readinto(memoryview((raw := torch.empty(last - first, dtype=torch.uint8)).numpy()))
        weight = raw.view(DTYPES[entry["dtype"]]).view(entry["shape"])
        if self._grows(name):
            weight = grown(weight, self.size, self.added)
        if name in self.through_4_bits:
            assert self.quantization
            dtype = weight.dtype
            return self.adapter.merged(name, through_4_bits(weight, self.quantization)).to(dtype)
        return self.adapter.merged(name, weight)

    def _grows(self, name: str) -> bool:
        return bool(self.added) and name in self.embeddings and name not in self.adapter.whole

    def changes(self, name: str) -> bool:
        """Return whether a tensor of the base becomes another one."""
        source = name if self.untied else self.tied.get(name, name)
        return self._touched(source) or self._grows(source) or source in self.through_4_bits

    def shape(self, name: str, before: list[int]) -> list[int]:
        """Return the shape of the merged tensor `name`, which had the shape `before`."""
        if name in self.adapter.whole:
            return self.adapter.shape(self.adapter.whole[name])
        return [max(self.size, before[0]), *before[1:]] if self._grows(name) else before

    def write(self, folder: Path) -> int:
        """Write the model into `folder`; return the number of tensors that the adapter changed."""
        for name in ("config.json", "generation_config.json"):
            if (self.base / name).is_file():
                shutil.copyfile(self.base / name, folder / name)
        last = list(self.headers)[-1]
        new = sorted(set(self.untied) - set(self.place))
        for path in self.headers:
            self._write_file(path, folder / path.name, new if path == last else [])
        self._write_config(folder)
        self._write_index(folder, new, last.name)
        check_tensors(folder, {*self.place, *new, *self.converted})
        return len(self.adapter.layers.keys() | self.adapter.whole.keys())

    def _write_file(self, path: Path, target: Path, new: list[str]) -> None:
        begin, before = self.headers[path]
        names = {stored: name for name, (place, stored) in self.place.items() if place == path}
        header: dict[str, Any] = {}
        end = 0
        for stored in [*sorted(before, key=lambda each: before[each]["data_offsets"]), *new]:
            name = names.get(stored, stored)
            source = name if stored in before and self.untied else self.tied.get(name, name)
            place, stored_there = self.place[name if stored in before else self.tied[name]]
            entry = self.headers[place][1][stored_there]
            changes = stored not in before or self.changes(name)
            shape = self.shape(name if name in self.untied else source, entry["shape"]) if changes else entry["shape"]
            length = entry["data_offsets"][1] - entry["data_offsets"][0]
            size = length // max(1, math.prod(entry["shape"])) * math.prod(shape)
            header[stored] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [end, end + size]}
            end += size
        with path.open("rb") as reader, target.open("wb") as writer:
            write_header(writer, header)
            for stored in header:
                name = names.get(stored, stored)
                if stored not in before or self.changes(name):
                    tensor = self.value(name if self.untied else self.tied.get(name, name))
                    if list(tensor.shape) != header[stored]["shape"]:
                        raise ValueError(f"{name}: {list(tensor.shape)} instead of {header[stored]['shape']}.")
                    writer.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
                else:
                    copy_bytes(reader, writer, *(begin + offset for offset in before[stored]["data_offsets"]))

    def _write_config(self, folder: Path) -> None:
        path, stored = self.place[self.input]
        rows = self.headers[path][1][stored]["shape"][0]
        if (after := self.shape(self.input, [rows])[0]) != rows:
            if self.config.get("vocab_size") != rows:
                raise ValueError(f"{self.base}/config.json does not say vocab_size {rows:,}, which would have to grow.")
            self.config["vocab_size"] = after
        if self.untied:
            self.config["tie_word_embeddings"] = False
        arrow.write_json(folder / "config.json", self.config)

    def _write_index(self, folder: Path, new: list[str], last: str) -> None:
        if (self.base / INDEX).is_file() and not (self.base / SINGLE).is_file():
            index = arrow.read_json(self.base / INDEX)
            index["weight_map"].update(dict.fromkeys(new, last))
            sizes = (each["data_offsets"] for path in self.headers for each in tensors(folder / path.name)[1].values())
            index["metadata"]["total_size"] = sum(end - begin for begin, end in sizes)
            arrow.write_json(folder / INDEX, index)


def check_tensors(folder: Path, present: set[str]) -> None:
    """Raise ValueError when a folder lacks a tensor that its config.json asks for, or has one of another shape."""
    model = skeleton(folder)
    shapes = {name: header["shape"] for path in weight_files(folder) for name, header in tensors(path)[1].items()}
    for name, tensor in model.state_dict().items():
        if name not in present and name not in model.all_tied_weights_keys:
            raise ValueError(f"{name}, which {folder.name}/config.json asks for, is in no weight file.")
        if name in shapes and shapes[name] != list(tensor.shape):
            raise ValueError(f"{name} has shape {shapes[name]}, but config.json asks for {list(tensor.shape)}.")


def merge(base: Path, trained: Path, folder: Path, quantization: dict[str, Any] | None = None) -> int:
    """Write base + adapter into `folder`; return the number of tensors that the adapter changed.

    `quantization`: of BitsAndBytesConfig; with it the base's weights go through 4 bits first, as in the training.
    Raises ValueError when adapter and base do not fit.
    """
    malloc.thresholds(mmap=2**20)  # each tensor goes back to the system when it is written: 46 MB less
    return Merge(base, trained, quantization).write(folder)
