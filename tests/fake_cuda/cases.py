"""Traced steps of tiny models, each made once."""

from __future__ import annotations

import functools
import json
import shutil
from typing import Any

import pytest

from ssmlora_dist.config.loading import load_config
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.fake_cuda.step import Traced, trace_step
from tests.decoders import bare_config

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="fake CUDA needs the C++ compiler g++, which is not installed"
)
MODES = ("nf4", "fp4", "int8", "none")
TOKENS, ROWS, PADDING = 24, 2, 5
# Fused projections, where there are no others.
PROJECTIONS = {
    "gpt_neox": ["query_key_value", "dense"],
    "phi3": ["qkv_proj", "o_proj"],
    "persimmon": ["query_key_value", "dense"],
}
SHIPPED = ("o_proj", "gate_proj", "up_proj", "down_proj")
"""Beside q_proj and v_proj, in turn, in `configs/llama_ssmlora.json`."""


def config_of(model_type: str = "llama", shapes: dict[str, Any] | None = None, **settings: Any) -> RunConfig:
    """The shipped configuration for a tiny model; `section__key` sets `section.key`."""
    given = {
        "model.path": None,
        "model.init": "random",
        "model.tokenizer": "bytes",
        "model.compute_dtype": "bfloat16",
        "model.config": shapes or bare_config(model_type),
        "adapter.every_layer": [],
        "adapter.alternate": PROJECTIONS.get(model_type, ["q_proj", "v_proj"]),
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    overrides = [f"{name}={json.dumps(value)}" for name, value in given.items()]
    return load_config("configs/llama_ssmlora.json", overrides, world_size=1, check_files=False)


@functools.cache
def traced(
    model_type: str = "llama",
    num_layers: int = 2,
    *,
    tokens: int = TOKENS,
    rows: int = ROWS,
    padding: int = PADDING,
    supervised: int | None = None,
    micro_batches: int = 1,
    num_ranks: int | None = None,
    device: str = "cuda",
    fake: bool = True,
    **settings: Any,
) -> Traced:
    """A step of `config_of`."""
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return trace_step(
        config_of(model_type, **given),
        num_layers=num_layers,
        tokens=tokens,
        rows=rows,
        supervised=supervised,
        padding=padding,
        micro_batches=micro_batches,
        num_ranks=num_ranks,
        device=device,
        fake=fake,
    )
