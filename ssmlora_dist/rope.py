"""RoPE settings by which a model takes longer inputs than it was trained on, by transformers' names."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ssmlora_dist.errors import ModelError

_SHARED = ("rope_type", "factor", "rope_theta")
# Of each type, what it needs and what it may have beyond the shared ones.
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": ((), ()),
    "yarn": (
        (),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "llama3": (("low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
}
_DYNAMIC = (
    '"dynamic" given; allowed: "linear", "yarn", "llama3": with dynamic frequencies, which follow the '
    "longest input seen so far, a row's numbers would depend on the rows before and beside it, and on what "
    'of it is cached; choose "yarn"'
)


class RopeParameters(BaseModel):
    """Scaling of the model's RoPE, in place of its own; what is not given is transformers' default.

    Positions reach `factor` times as far as those that the model was trained on. In models whose kinds of
    layers have a RoPE of their own, those with a sliding window keep theirs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    rope_type: Literal["linear", "yarn", "llama3"]
    """`linear` (position interpolation), `yarn` or `llama3`."""
    factor: float = Field(ge=1)
    """How many times as far positions reach as those that the model was trained on."""
    rope_theta: float | None = Field(default=None, gt=1)
    """Base of the frequencies; null: the model's own."""
    original_max_position_embeddings: int | None = Field(default=None, ge=1)
    """Positions that the model was trained on, for `yarn` and `llama3`; null: as its configuration says."""
    attention_factor: float | None = Field(default=None, gt=0)
    """Of `yarn`: factor of the rotated queries and keys; null: what follows from `factor`."""
    beta_fast: float | None = Field(default=None, gt=0)
    """Of `yarn`: rotations above which a frequency is kept; null: 32."""
    beta_slow: float | None = Field(default=None, gt=0)
    """Of `yarn`: rotations below which a frequency is interpolated; null: 1."""
    mscale: float | None = Field(default=None, gt=0)
    """Of `yarn`, beside `mscale_all_dim`: weighs log(factor) in the attention factor."""
    mscale_all_dim: float | None = Field(default=None, gt=0)
    """Of `yarn`, beside `mscale`: the same, in the divisor."""
    truncate: bool | None = None
    """Of `yarn`: whether the range between the two betas ends at whole dimensions; null: true."""
    low_freq_factor: float | None = Field(default=None, gt=0)
    """Of `llama3`: wavelengths over the original positions divided by this are interpolated."""
    high_freq_factor: float | None = Field(default=None, gt=0)
    """Of `llama3`: wavelengths under the original positions divided by this are kept."""

    @field_validator("rope_type", mode="before")
    @classmethod
    def _has_no_memory(cls, rope_type: Any) -> Any:
        if rope_type == "dynamic":
            raise ValueError(_DYNAMIC)
        return rope_type

    @model_validator(mode="after")
    def _check(self) -> RopeParameters:
        needed, optional = _FIELDS[self.rope_type]
        problems = [
            f'`{name}` {value!r} given, which "{self.rope_type}" does not read; remove it'
            for name, value in self.given.items()
            if name not in (*_SHARED, *needed, *optional)
        ]
        problems += [
            f'`{name}` is missing, which "{self.rope_type}" needs (Llama 3.1: 1 for low, 4 for high); add it'
            for name in needed
            if name not in self.given
        ]
        for low, low_default, high, high_default in (
            ("beta_slow", 1.0, "beta_fast", 32.0),
            ("low_freq_factor", math.nan, "high_freq_factor", math.nan),
        ):
            least, most = self.given.get(low, low_default), self.given.get(high, high_default)
            if least >= most:
                problems.append(
                    f"`{low}` {least:g} given or default; allowed: less than `{high}` {most:g}; lower it"
                )
        if (self.mscale is None) != (self.mscale_all_dim is None):
            problems.append("`mscale` and `mscale_all_dim` count only together; give both or neither")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def given(self) -> dict[str, Any]:
        """What is given, in JSON types: what is recorded with an adapter."""
        return self.model_dump(exclude_none=True)


def read_rope(values: Any, where: str) -> RopeParameters:
    """A setting from plain values.

    Raises:
        ModelError: it is none, naming `where` it stands.
    """
    try:
        return RopeParameters.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        path = ".".join(map(str, (where, *problem["loc"])))
        raise ModelError(f"{path}: {problem['msg'].removeprefix('Value error, ')}; correct it") from error
