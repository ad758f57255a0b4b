"""The same bits from run to run on a GPU, where several kernels add in whatever order they come to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.errors import ConfigError

# cuBLAS adds in one order only where each stream has workspaces of a fixed size; flash-attention where it is
# told so, by a variable that transformers reads.
VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
_MARK = "does not have a deterministic implementation"


@contextmanager
def determinism(config: RunConfig, device: torch.device) -> Iterator[None]:
    """With `run.deterministic`, has a GPU compute the same bits in every run; to be begun before it is used.

    A CPU does so in any case, and Triton's kernels of adapters add in a fixed order.

    Raises:
        ConfigError: something that was chosen cannot.
    """
    if not config.run.deterministic or device.type != "cuda":
        yield
        return
    for variable, value in VARIABLES.items():
        os.environ.setdefault(variable, value)
    settings: Any = torch.utils.deterministic
    before, fills = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Nothing is read before it is written; filling it would cost a pass over all memory.
    settings.fill_uninitialized_memory = False
    try:
        yield
    except RuntimeError as error:
        operator, mark, _ = str(error).partition(_MARK)
        if not mark:
            raise
        problem = (
            f"run.deterministic: true given; {operator.strip()}, which this model or setting needs, has no "
            "deterministic implementation on CUDA; set it to false, or choose another implementation "
            "(model.attention, quantization.mode, the model)"
        )
        raise ConfigError([problem]) from error
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = fills
