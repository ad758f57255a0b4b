"""What an adapter is made of: the one configuration object of the public interface."""

from __future__ import annotations

import difflib
import functools
import math
import re
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from ssmlora_dist.ops.form import Form
from ssmlora_dist.ops.registry import form_named

StateGradient = Literal["full", "detached"]
Carry = Literal["normalized", "raw", "none"]
Normalization = Literal["minmax", "rms", "none"]
Placement = Literal["pattern", "probe"]
DTypeName = Literal["float32", "bfloat16", "float16", "float64"]
ALL_LINEAR = "all-linear"
_PLACE = re.compile(r"([0-9]{1,6})\.(\S+)")
_SLICE = re.compile(r"(-?[0-9]{1,6})?:(-?[0-9]{1,6})?(:(-?[0-9]{1,6})?)?")


class AdapterConfig(BaseModel):
    """Where adapters sit and how their state runs through depth (DESIGN section 2).

    `alternate` lists projections of which each layer gets one, in turn: the i-th layer that is adapted gets
    `alternate[i % len(alternate)]`. `every_layer` names those adapted in each layer that has them: a
    list, `"all-linear"` (all linear layers of a decoder layer but routers and what `alternate` names), or a
    regular expression that matches full names as a whole, such as `".*attn.(q|v)_proj"`. By PEFT's rules a
    name stands for the paths that end in it: `q_proj` for `self_attn.q_proj`. The alternating modules are of
    the form `method`, those of every layer of the form `every_layer_method`: names of forms that are
    registered, see `register_form`. `layers` restricts both to some of the decoder layers. `places` are there
    instead of all three: listed, or chosen by a probe before training. `modules_to_save` names modules by the
    same rule anywhere in the model: a copy of each is trained, and the base model's stays as it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    method: str = "ssmlora"
    """Form of the state: `ssmlora` (arXiv 2502.04958), `lora` or another that is registered (README)."""
    rank: int = Field(default=8, ge=1, le=1024)
    """R, the inner width of every adapter."""
    alpha: float = Field(default=16.0, gt=0)
    """The adapter's output is scaled by alpha / rank; with `rslora` by alpha / sqrt(rank)."""
    rslora: bool = False
    """Rank-stabilised scaling, alpha / sqrt(rank) (arXiv 2312.03732)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability; on the normalised state, or on the input of a plain LoRA module."""
    alternate: tuple[str, ...] = ("q_proj", "v_proj")
    """Projections that take turns over the adapted layers, such as `["q_proj", "v_proj"]`."""
    every_layer: tuple[str, ...] | str = ()
    """Projections adapted in each layer: names, `"all-linear"`, or a regular expression for full names."""
    every_layer_method: str = "lora"
    """Form of the modules of `every_layer`."""
    layers: tuple[int, ...] | str | None = None
    """Decoder layers that are adapted: indices (-1 is the last) or a slice (`"-10:"`, `"::2"`); null: all."""
    places: tuple[str, ...] = ()
    """Exact places, of the form `method`, such as `["12.q_proj"]`: a layer's index, a dot, a projection."""
    placement: Placement = "pattern"
    """`pattern`: as said above; `probe`: gradients on training data choose `places` before training."""
    probe_parameters: int | None = Field(default=None, ge=1)
    """Parameters that a probe may spend; null: as many as the pattern has."""
    probe_batches: int = Field(default=4, ge=1)
    """Micro-batches of which a probe takes the gradients."""
    modules_to_save: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), exclude_if=lambda value: not value
    )
    """Modules trained whole beside the adapters, such as `["embed_tokens", "norm"]`; no linear layers."""
    state_gradient: StateGradient = "full"
    """`full` sends gradients through the state into earlier layers; `detached` stops them at every module."""
    carry: Carry = "normalized"
    """What the next module receives: the `normalized` state n, the `raw` state h, or zeros (`none`)."""
    normalization: Normalization = "minmax"
    """`minmax` (the paper's), `rms` or `none`, over the rank, per token."""
    state_input_scale: float = Field(default=0.1, gt=0)
    """`state_input` starts at this multiple of the identity; never 0."""
    state_dtype: DTypeName | None = None
    """Dtype of the state between layers; null takes the compute dtype."""
    form_settings: dict[str, Any] = Field(default={}, exclude_if=lambda value: not value)
    """What the forms of this adapter can be told beyond the settings above."""
    form_module: str | None = Field(default=None, min_length=1, exclude_if=lambda value: value is None)
    """Python file (`forms/mine.py`) or module that registers forms of your own; imported before a run."""

    @field_validator("method", "every_layer_method")
    @classmethod
    def _is_registered(cls, name: str) -> str:
        form_named(name)
        return name

    @field_validator("layers")
    @classmethod
    def _is_a_slice(cls, layers: tuple[int, ...] | str | None) -> tuple[int, ...] | str | None:
        if isinstance(layers, str) and not _SLICE.fullmatch(layers):
            raise ValueError(
                f'{layers[:40]!r} given; allowed: a list of indices or a slice, such as "0:8", "-10:" or '
                '"::2"; write one of these, or null for all layers'
            )
        return layers

    @field_validator("places")
    @classmethod
    def _are_places(cls, places: tuple[str, ...]) -> tuple[str, ...]:
        for each in places:
            if not _PLACE.fullmatch(each):
                raise ValueError(
                    f'{each[:40]!r} given; allowed: LAYER.PROJECTION, such as "12.q_proj"; write the index '
                    "of the decoder layer from 0, a dot and the name"
                )
        if repeated := sorted({each for each in places if places.count(each) > 1}):
            raise ValueError(f"names {', '.join(repeated)} more than once; name each place once")
        return places

    @model_validator(mode="after")
    def _check(self) -> AdapterConfig:
        if not self.alternate and not self.every_layer and not self.places:
            raise ValueError(
                "names no module to adapt: list projections in `alternate` or in `every_layer`, or `places`"
            )
        self._check_places()
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
        if form_named(self.every_layer_method).has_state and not form_named(self.method).has_state:
            raise ValueError(
                f'`every_layer_method` "{self.every_layer_method}" has a state, so it needs `method` to be a '
                f'form with one, and "{self.method}" has none; set `method` to "{self.every_layer_method}"'
            )
        self._check_settings()
        return self

    def _check_places(self) -> None:
        """Refuses what would have no say beside exact places, or without a probe."""
        if self.placement != "probe":
            for name, default in WITHOUT_PROBE.items():
                if getattr(self, name) != default:
                    raise ValueError(
                        f'`{name}` {getattr(self, name)} given with `placement` "{self.placement}"; allowed: '
                        'only with "probe"; remove it, or set `placement`'
                    )
        if not self.places or self.placement == "probe":
            return
        given = [
            f"`{name}`"
            for name in ("alternate", "every_layer", "layers")
            if getattr(self, name) and getattr(self, name) != type(self).model_fields[name].default
        ]
        if given:
            raise ValueError(
                f"`places` given beside {' and '.join(given)}; exact places are all that is adapted: drop "
                f"{' and '.join(given)}, or drop `places`"
            )

    def _check_settings(self) -> None:
        """Refuses what no form here would read, and what a form refuses."""
        forms = {name: form_named(name) for name in (self.method, self.every_layer_method)}
        named = " and ".join(f'"{name}"' for name in forms)
        for name, default in _SHARED.items():
            is_read = any(name in settings_of(form) for form in forms.values())
            if name == "carry" and self.carry == "none":
                is_read = any(form.has_state for form in forms.values())
            if getattr(self, name) != default and not is_read:
                raise ValueError(
                    f"`{name}` {getattr(self, name)!r} given, which {named} does not read; leave it out, or "
                    "choose a `method` that reads it"
                )
        known = [name for form in forms.values() for name in settings_of(form) if name not in _SHARED]
        for name in self.form_settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                allowed = f"allowed: {', '.join(known)}" if known else f"{named} has none of its own"
                remedy = f"did you mean {near[0]}?" if near else "remove it"
                raise ValueError(f"`form_settings` has {name!r}; {allowed}; {remedy}")
        for name in forms:
            self.form(name)

    def form(self, name: str, axis: int = 0, num_axes: int = 1) -> Form:
        """The form of that name as it is set here.

        Raises:
            ValueError: it refuses a setting.
        """
        form = form_named(name)
        given = self.form_settings | {shared: getattr(self, shared) for shared in _SHARED}
        if self.carry == "none":
            del given["carry"]
        settings = {key: given[key] for key in settings_of(form) if key in given}
        try:
            return _builder(name).validate_python(
                {"rank": self.rank, "axis": axis, "num_axes": num_axes, **settings}
            )
        except ValidationError as error:
            problem = error.errors()[0]
            key = problem["loc"][0] if problem["loc"] else "form_settings"
            raise ValueError(
                f'`{key}` {given.get(str(key))!r} given, which "{name}" refuses: {problem["msg"]}; correct it'
            ) from None

    @property
    def targets(self) -> tuple[str, ...]:
        """All projections named, in order; of places each once."""
        if self.places:
            return tuple(dict.fromkeys(name for _, name in map(split_place, self.places)))
        return self.alternate + self.listed

    @property
    def is_unprobed(self) -> bool:
        """Whether the places are still to be chosen."""
        return self.placement == "probe" and not self.places

    @property
    def until_probed(self) -> AdapterConfig:
        """What is counted and planned with before the places are chosen: the pattern that is configured."""
        if not self.is_unprobed:
            return self
        return self.model_copy(update=WITHOUT_PROBE)

    @property
    def methods(self) -> tuple[str, ...]:
        """The forms that adapters are of."""
        if self.places or self.is_unprobed:
            return (self.method,)
        named = ((self.method, self.alternate), (self.every_layer_method, self.every_layer))
        return tuple(dict.fromkeys(method for method, names in named if names))

    @property
    def listed(self) -> tuple[str, ...]:
        """`every_layer` as names, which `projections.resolve` makes of what is no list."""
        assert isinstance(self.every_layer, tuple), "resolved against a model"
        return self.every_layer

    @property
    def layer_indices(self) -> tuple[int, ...] | None:
        """`layers` as `projections.resolve` makes them; None: all."""
        assert not isinstance(self.layers, str), "resolved against a model"
        return self.layers

    @property
    def scaling(self) -> float:
        """See `scaling_of`."""
        return scaling_of(self.alpha, self.rank, self.rslora)


def scaling_of(alpha: float, rank: int, rslora: bool) -> float:
    """What an adapter's output is multiplied with: alpha / rank, of rsLoRA alpha / sqrt(rank)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def split_place(text: str) -> tuple[int, str]:
    """The layer and the projection of `"12.q_proj"`."""
    index, _, name = text.partition(".")
    return int(index), name


WITHOUT_PROBE = {
    name: AdapterConfig.model_fields[name].default
    for name in ("placement", "probe_parameters", "probe_batches")
}
"""The settings of `AdapterConfig` as they are where nothing is to be chosen."""
# Settings of `AdapterConfig` that forms may read, with what they are by default.
_SHARED = {
    name: AdapterConfig.model_fields[name].default for name in ("carry", "normalization", "state_input_scale")
}


def settings_of(form: type[Form]) -> list[str]:
    """The names of a form's settings."""
    return [field.name for field in fields(form) if field.name not in _SIZES]


_SIZES = [field.name for field in fields(Form)]


@functools.cache
def _builder(name: str) -> TypeAdapter[Form]:
    return TypeAdapter(form_named(name))
