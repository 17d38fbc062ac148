"""Adapters on a frozen base, with peft: made, kept in checkpoints, saved so that base + adapter is what was trained.

Part of train_model. LoRA, rsLoRA, DoRA, AdaLoRA, and starts such as PiSSA that change the base: these are saved as
plain LoRA of twice the rank, A B - A0 B0, which fits the base as it was (peft's conversion).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from train_model import Params

NO_ADAPTER = (
    "lora.target_modules: {} are {}, whose adapter cannot be merged; "
    "name linear layers, e.g. those of the attention: [q_proj, k_proj, v_proj, o_proj]."
)


def add(model: PreTrainedModel, params: Params, steps: int, new_tokens: bool) -> Any:
    """Return `model`, frozen, with a new adapter; with `new_tokens` its embeddings are trained and saved whole.

    Raises SystemExit when a name matches no layer, or peft refuses the settings.
    """
    from peft import AdaLoraConfig, LoraConfig, get_peft_model  # 4 seconds that a full training does not wait for

    assert params.lora
    options = params.lora.arguments()
    embeddings = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module]
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    tied = len({id(module.weight) for module in embeddings}) < len(embeddings)
    if new_tokens:
        # A low-rank change of all rows is no way to learn a new one; where both are tied, one is enough.
        needed = [names[id(module)] for module in embeddings[: 1 if tied else 2]]
        options["modules_to_save"] = sorted({*(options["modules_to_save"] or []), *needed})
    if tied and names[id(embeddings[0])] in (options["modules_to_save"] or []):
        options["ensure_weight_tying"] = True
    check_names(model, options)
    options["task_type"] = "CAUSAL_LM" if params.objective == "clm" else None
    try:
        if params.lora.adalora:
            adapted: Any = get_peft_model(model, AdaLoraConfig(total_step=steps, **options))
        else:
            adapted = get_peft_model(model, LoraConfig(**options))
    except ValueError as error:
        if "ParamWrapper" in str(error):  # peft's adapter of experts, of which `all-linear` has them too
            raise SystemExit(NO_ADAPTER.format("layers with experts", "experts, one tensor for all of them")) from None
        raise SystemExit(
            f"lora: {str(error).splitlines()[0].rstrip('.')}; change phases.PHASE.train_model.lora."
        ) from None
    check_layers(adapted)
    if params.lora.changes_the_base:
        adapted.initial = tempfile.TemporaryDirectory()  # lives as long as the model
        adapted.save_pretrained(Path(adapted.initial.name, "initial"))
    return adapted


def check_names(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Raise SystemExit when `target_modules` or `modules_to_save` name no layer of `model`; those it has are listed."""
    layers = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, Conv1D)
    candidates = [name for name, module in model.named_modules() if isinstance(module, layers)]
    every = [name for name, module in model.named_modules() if next(module.parameters(), None) is not None]
    for key, known in (("target_modules", candidates), ("modules_to_save", every)):
        wanted = [] if isinstance(options[key], str) or not options[key] else options[key]
        missing = [name for name in wanted if not any(n == name or n.endswith(f".{name}") for n in known)]
        if missing:
            shown = sorted({name.rsplit(".", 1)[-1] for name in candidates})
            raise SystemExit(f"lora.{key}: the model has no layer {', '.join(missing)}; it has {', '.join(shown)}.")


def check_layers(adapted: Any) -> None:
    """Raise SystemExit when the adapter is on what merge_lora cannot add up: said now, and not after the training.

    Or on a layer that is no linear one but for its weights, as Llama 4's router, which returns two tensors.
    """
    experts = sorted(adapted.peft_config["default"].target_parameters or [])  # what peft makes of names of experts
    found = [name for name, tensor in adapted.named_parameters() if ".lora_" in name and tensor.ndim > 2]
    if found := experts or [name.split(".lora_")[0].rsplit(".", 1)[-1] for name in found]:
        kind = "experts, one tensor for all of them" if experts else "convolutions"
        raise SystemExit(NO_ADAPTER.format(", ".join(found[:3]), kind))
    for name, layer in adapted.named_modules():
        own = getattr(layer, "base_layer", None)
        if isinstance(own, torch.nn.Linear) and type(own).__module__.startswith("transformers.models."):
            with torch.no_grad():
                result = own(own.weight.new_zeros(1, own.in_features))
            if not isinstance(result, torch.Tensor):
                raise SystemExit(NO_ADAPTER.format(name.rsplit(".", 1)[-1], "no plain linear layers"))


def save(model: Any, folder: Path, weights: dict[str, Any] | None = None) -> None:
    """Write the adapter, or the model, into `folder`; an adapter as one that fits the unchanged base.

    `weights`: those of the whole model, where this process holds a part of them alone.
    """
    options: dict[str, Any] = {"save_embedding_layers": False}  # peft would add those of a base that got new tokens
    if initial := getattr(model, "initial", None):
        options["path_initial_model_for_weight_conversion"] = str(Path(initial.name, "initial"))
    given = {}
    if weights is not None:  # gathered one by one, a tied weight under each of its names
        tied = getattr(model, "all_tied_weights_keys", {})
        given["state_dict"] = {name: weight for name, weight in weights.items() if name not in tied}
    model.save_pretrained(folder, **given, **(options if hasattr(model, "peft_config") else {}))


def allocate(model: Any, step: int) -> None:
    """Let AdaLoRA move its ranks after optimizer step `step` (from 0), before the gradients are cleared."""
    if hasattr(model.base_model, "rankallocator"):
        model.base_model.update_and_allocate(step)


def state(model: Any) -> dict[str, Any]:
    """Return all that training changes, as it stands: trainable parameters, buffers, and what AdaLoRA remembers."""
    found: dict[str, Any] = {
        "parameters": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
        "buffers": dict(model.named_buffers()),
    }
    if allocator := getattr(getattr(model, "base_model", None), "rankallocator", None):
        # peft's own checkpoints leave it out, and cut the pruned ranks off, so that no training can go on from them.
        found["rank_pattern"] = model.peft_config["default"].rank_pattern
        found["importance"] = [allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc]
    return found


@torch.no_grad()
def restore(model: Any, found: dict[str, Any]) -> None:
    """Take back what `state` gave."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(found["parameters"][name])
    for name, buffer in model.named_buffers():
        buffer.copy_(found["buffers"][name])
    if "importance" in found:
        model.peft_config["default"].rank_pattern = found["rank_pattern"]
        allocator = model.base_model.rankallocator
        allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc = found["importance"]
