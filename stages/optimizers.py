"""The optimizer of a training run: one of TrainingArguments' names, LoRA+ groups, or Muon. Part of train_model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainingArguments

if TYPE_CHECKING:
    from train_model import Params


def available(name: str, cuda: bool) -> str:
    """Return the optimizer that runs here: pages of optimizer state move between a GPU and its host, and need both.

    AdamW falls back to torch's fused one, of the same formula; another one to itself without pages.
    """
    if cuda or not name.startswith("paged_"):
        return name
    if name.startswith("paged_adamw"):
        return "adamw_torch_fused"
    return "ademamix" if name == "paged_ademamix_32bit" else name.removeprefix("paged_")


def create(model: Any, params: Params, arguments: TrainingArguments) -> torch.optim.Optimizer | None:
    """Return the optimizer where it is not one that Trainer makes by itself, else None."""
    if params.optim == "muon":
        return MuonWithAdamW(model, params)
    if not params.lora or params.lora.loraplus_lr_ratio is None:
        return None
    from peft.optimizers import create_loraplus_optimizer

    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    return create_loraplus_optimizer(
        model,
        kind,
        loraplus_lr_ratio=params.lora.loraplus_lr_ratio,
        loraplus_weight_decay=params.weight_decay,
        loraplus_lr_embedding=params.learning_rate,
        **options,
    )


def inner_matrices(model: Any) -> set[int]:
    """Return the ids of the weight matrices of the layers: all but the output layer's, and tables.

    Tables are those of tokens, of positions and of token types.
    """
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    outer = {id(table.weight) for table in [*tables, model.get_output_embeddings()] if table is not None}
    return {id(parameter) for parameter in model.parameters() if parameter.ndim == 2} - outer


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the weight matrices of the layers, AdamW for all other parameters, as one optimizer to Trainer.

    Muon: Jordan et al., 2024; the update is scaled to AdamW's size (Liu et al., "Muon is Scalable", 2025, equation 4),
    so both go by one learning rate.
    """

    def __init__(self, model: Any, params: Params) -> None:
        matrices = inner_matrices(model)
        inner = [parameter for parameter in model.parameters() if id(parameter) in matrices]
        rest = [parameter for parameter in model.parameters() if id(parameter) not in matrices]
        options = {"lr": params.learning_rate, "weight_decay": params.weight_decay}
        betas = (params.adam_beta1, params.adam_beta2)
        self.parts = {
            "muon": torch.optim.Muon(inner, adjust_lr_fn="match_rms_adamw", **options),
            "adamw": torch.optim.AdamW(rest, betas=betas, lr=params.learning_rate, weight_decay=0.0, fused=True),
        }
        # The groups are shared with the parts: what a scheduler writes here, they see.
        super().__init__([group for part in self.parts.values() for group in part.param_groups], {})

    def step(self, closure: Any = None) -> None:
        """Take one step of each part."""
        for part in self.parts.values():
            part.step(closure)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each part under its name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]
