"""A small checkpoint to write, and what is needed to write it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmlora_dist.adapters.config import AdapterConfig
from ssmlora_dist.training.checkpoints import Checkpoint, write_checkpoint

SEED = 11
ADAPTER = AdapterConfig(rank=2, alternate=("q_proj", "v_proj"))
BASE = {"path": "org/base", "compute_dtype": "float32", "tokenizer": None}
CONFIG = {
    "run": {"name": "run", "seed": 3},
    "training": {"max_steps": 40, "learning_rate": 1e-4 / 3},
    "adapter": ADAPTER.model_dump(mode="json"),
}


def tensors(step: int) -> dict[str, Tensor]:
    """Adapter parameters of two layers, other ones at every step."""
    generator = torch.Generator().manual_seed(SEED + step)
    shapes = {"lora_A.weight": (2, 6), "lora_B.weight": (6, 2), "state_transition": (2, 2)}
    return {
        f"model.layers.{layer}.self_attn.{projection}.{key}": torch.randn(shape, generator=generator)
        for layer, projection in enumerate(ADAPTER.alternate)
        for key, shape in shapes.items()
    }


def checkpoint(step: int = 10, **changes: Any) -> Checkpoint:
    parameters = tensors(step)
    whole = Checkpoint(
        step=step,
        parameters=parameters,
        moments={
            kind: {name: tensor * factor for name, tensor in parameters.items()}
            for kind, factor in (("exp_avg", 0.1), ("exp_avg_sq", 1e-30))
        },
        progress={"samples": 16 * step, "optimizer_steps": step - 1, "losses": [0.1, 1 / 3], "mlflow": None},
        config=CONFIG,
        contents={"began": "2026-03-04T05:06:07", "validation": "feed" * 16},
        base_fingerprint="f00d" * 16,
    )
    return replace(whole, **changes)


def write(directory: Path, step: int = 10, **changes: Any) -> Path:
    """Writes a checkpoint as a run does."""
    return write_checkpoint(directory, checkpoint(step, **changes), ADAPTER, BASE)


def same(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints are equal in every bit."""

    def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return a.keys() == b.keys() and all(
            a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
        )

    return (
        replace(one, parameters={}, moments={}) == replace(other, parameters={}, moments={})
        and equal(one.parameters, other.parameters)
        and one.moments.keys() == other.moments.keys()
        and all(equal(one.moments[kind], other.moments[kind]) for kind in one.moments)
    )


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below `directory`, hidden ones too."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
