"""The parameters of adapters and of quantised bases, under the names of peft and bitsandbytes. Part of train_model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

ADALORA_LEAVES_OUT = ("r", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern")


class AdaLora(BaseModel):
    """Arguments of peft's AdaLoraConfig besides those of LoraConfig; `total_step` is the number of steps."""

    model_config = ConfigDict(extra="forbid")

    init_r: int = Field(12, ge=1, description="rank of each layer at the beginning")
    target_r: int = Field(8, ge=1, description="mean rank of a layer in the end")
    tinit: int = Field(0, ge=0, description="steps before ranks are taken away")
    tfinal: int = Field(0, ge=0, description="steps at the end in which the ranks stay")
    deltaT: int = Field(1, ge=1, description="steps from one allocation of ranks to the next")  # noqa: N815 (peft)
    beta1: float = Field(0.85, gt=0, lt=1, description="smoothing of the sensitivity")
    beta2: float = Field(0.85, gt=0, lt=1, description="smoothing of its uncertainty")
    orth_reg_weight: float = Field(0.5, ge=0, description="weight of the loss that keeps the matrices orthogonal")


class Lora(BaseModel):
    """Arguments of peft's LoraConfig; rsLoRA, DoRA, PiSSA, LoRA+ and AdaLoRA are settings of it."""

    model_config = ConfigDict(extra="forbid")

    r: int = Field(8, ge=1, description="rank of the two added matrices")
    lora_alpha: int = Field(16, ge=1, description="their product is scaled by lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the first matrix")
    target_modules: list[str] | Literal["all-linear"] = Field(description="names of the layers, or `all-linear`")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r), for high ranks")
    use_dora: bool = Field(False, description="learn length and direction of each weight apart (DoRA)")
    init_lora_weights: (
        Literal[True, "gaussian", "orthogonal", "pissa", "olora"]
        | Annotated[str, StringConstraints(pattern=r"^pissa_niter_[1-9][0-9]*$")]
    ) = Field(True, description="begin of the matrices. pissa: the base's largest singular values, which learn faster")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="which biases are trained, too")
    modules_to_save: list[str] | None = Field(
        None, description="layers that are trained and saved whole; with new tokens the embeddings are added"
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="layer name -> another r; of several that fit the first in the alphabet"
    )
    alpha_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="layer name -> another lora_alpha, chosen likewise"
    )
    loraplus_lr_ratio: float | None = Field(
        None, ge=1, description="learning rate of the second matrix over that of the first (LoRA+), e.g. 16"
    )
    adalora: AdaLora | None = Field(None, description="move ranks to the layers that need them; instead of `r`")

    @property
    def changes_the_base(self) -> bool:
        """Whether the begin of the matrices is taken out of the base's weights."""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights.startswith(("pissa", "olora"))

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of peft's LoraConfig, or of its AdaLoraConfig."""
        own = self.model_dump(exclude={"loraplus_lr_ratio", "adalora"})
        if self.adalora:
            own = {name: own[name] for name in ("lora_alpha", "lora_dropout", "target_modules", "bias")}
            own |= {"modules_to_save": self.modules_to_save, **self.adalora.model_dump()}
        return own

    @model_validator(mode="after")
    def _consistent(self) -> Lora:
        set_here = {name for name in self.model_fields_set if getattr(self, name) not in (None, False, {})}
        if self.adalora and (others := set_here & set(ADALORA_LEAVES_OUT)):
            raise ValueError(f"adalora sets the ranks itself and knows no {', '.join(sorted(others))}; leave that out")
        if self.adalora and self.adalora.target_r > self.adalora.init_r:
            raise ValueError("adalora.target_r is larger than adalora.init_r; ranks are only taken away")
        if self.changes_the_base:
            others = set_here & {"use_dora", "modules_to_save"} | ({"bias"} if self.bias != "none" else set())
            if self.use_rslora:
                others |= set_here & {"rank_pattern", "alpha_pattern"}
            if others:
                raise ValueError(
                    f"init_lora_weights {self.init_lora_weights} changes the base and is saved as plain LoRA, which "
                    f"does not go with {', '.join(sorted(others))}; leave one of them out"
                )
        return self


class Quantization(BaseModel):
    """Arguments of transformers' BitsAndBytesConfig."""

    model_config = ConfigDict(extra="forbid")

    load_in_4bit: bool | None = Field(None, description="hold the base in 4 bits; so it is when nothing is said")
    load_in_8bit: bool = Field(False, description="hold the base in 8 bits (LLM.int8) instead")
    llm_int8_threshold: float = Field(6.0, ge=0, description="8 bits: activations beyond it are computed in 16 bits")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="nf4: quantiles of a normal distribution")
    bnb_4bit_use_double_quant: bool = Field(True, description="quantise the scales too, 0.4 bits a weight less")
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="dtype of matmuls"
    )

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the kind that is used."""
        if self.load_in_8bit:
            return self.model_dump(include={"load_in_8bit", "llm_int8_threshold"})
        names = {"bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"}
        return {"load_in_4bit": True, **self.model_dump(include=names)}

    @model_validator(mode="after")
    def _consistent(self) -> Quantization:
        if self.load_in_8bit == bool(self.load_in_4bit) and self.load_in_4bit is not None:
            raise ValueError("a base is held in 4 bits or in 8; set one of load_in_4bit and load_in_8bit to true")
        return self
