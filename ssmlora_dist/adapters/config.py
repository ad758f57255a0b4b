"""What an adapter is made of: the one configuration object of the public interface."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Method = Literal["ssmlora", "lora"]
StateGradient = Literal["full", "detached"]
Carry = Literal["normalized", "raw"]
Normalization = Literal["minmax", "rms", "none"]
DTypeName = Literal["float32", "bfloat16", "float16", "float64"]
ALL_LINEAR = "all-linear"


class AdapterConfig(BaseModel):
    """Where adapters sit and how their state runs through depth (DESIGN section 2).

    `alternate` lists projections of which each layer gets one, in turn: layer i gets
    `alternate[i % len(alternate)]`. `every_layer` names those adapted in each layer that has them: a
    list, `"all-linear"` (all linear layers of a decoder layer but routers and what `alternate` names), or a
    regular expression that matches full names as a whole, such as `".*attn.(q|v)_proj"`. By PEFT's rules a
    name stands for the paths that end in it: `q_proj` for `self_attn.q_proj`. With
    `method="ssmlora"` the alternating modules are time modules; those of every layer are plain LoRA unless
    `every_layer_method="ssmlora"`. With `method="lora"` all of them are plain LoRA.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    method: Method = "ssmlora"
    """`ssmlora` (arXiv 2502.04958) or `lora`."""
    rank: int = Field(default=8, ge=1, le=1024)
    """R, the inner width of every adapter."""
    alpha: float = Field(default=16.0, gt=0)
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability; on the normalised state of a time module, on the input of a plain LoRA module."""
    alternate: tuple[str, ...] = ("q_proj", "v_proj")
    """Projections that take turns over the layers, such as `["q_proj", "v_proj"]`."""
    every_layer: tuple[str, ...] | str = ()
    """Projections adapted in each layer: names, `"all-linear"`, or a regular expression for full names."""
    every_layer_method: Method = "lora"
    """What the modules of `every_layer` are: `lora` or `ssmlora`."""
    state_gradient: StateGradient = "full"
    """`full` sends gradients through the state into earlier layers; `detached` stops them at every module."""
    carry: Carry = "normalized"
    """What the next module on the axis receives: the `normalized` state n, or the `raw` state h."""
    normalization: Normalization = "minmax"
    """`minmax` (the paper's), `rms` or `none`, over the rank, per token."""
    state_input_scale: float = Field(default=0.1, gt=0)
    """`state_input` starts at this multiple of the identity; never 0."""
    state_dtype: DTypeName | None = None
    """Dtype of the state between layers; null takes the compute dtype."""

    @model_validator(mode="after")
    def _check(self) -> AdapterConfig:
        if not self.alternate and not self.every_layer:
            raise ValueError("names no module to adapt: list projections in `alternate` or in `every_layer`")
        if isinstance(self.every_layer, str) and self.every_layer != ALL_LINEAR:
            try:
                re.compile(self.every_layer)
            except re.error as error:
                raise ValueError(
                    f"`every_layer` is no regular expression ({error}); mend it, or list names"
                ) from error
        named = self.alternate + (self.every_layer if isinstance(self.every_layer, tuple) else ())
        repeated = sorted({name for name in named if named.count(name) > 1})
        if repeated:
            raise ValueError(f"names {', '.join(repeated)} more than once over `alternate` and `every_layer`")
        if self.method == "lora" and self.every_layer_method == "ssmlora":
            raise ValueError('`every_layer_method` "ssmlora" needs `method` "ssmlora"')
        return self

    @property
    def targets(self) -> tuple[str, ...]:
        """All projections named, in order."""
        return self.alternate + self.listed

    @property
    def listed(self) -> tuple[str, ...]:
        """`every_layer` as names, which `projections.resolve` makes of what is no list."""
        assert isinstance(self.every_layer, tuple), "resolved against a model"
        return self.every_layer

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank
