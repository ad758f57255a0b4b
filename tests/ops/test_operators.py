"""Which of an operator's two implementations runs on a GPU, and what the plain one asks of it."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssmlora_dist.ops import operators
from ssmlora_dist.ops.dropout import dropout
from ssmlora_dist.ops.form import Form
from ssmlora_dist.ops.ssmlora import SSMLoRA
from ssmlora_dist.ops.ssmlora.state_step import state_backward, state_forward
from tests.ops.test_forms import FORMS, SEEDS, by_form, draw

pytest.importorskip("triton")
CPU = torch.device("cpu")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    tries = operators._runs_kernels
    tries.cache_clear()
    yield monkeypatch
    tries.cache_clear()


def fail_to_build(*_: Any) -> None:
    """As Triton 3.7 where there is no compiler, and where Python.h is missing."""
    raise subprocess.CalledProcessError(1, ["/usr/bin/gcc", "/tmp/cuda_utils.c"])


def test_without_a_compiler_the_plain_operators_run_with_one_warning(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr("ssmlora_dist.ops.triton_dropout.dropout", fail_to_build)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert [operators._runs_kernels(CPU, torch.float32) for _ in range(3)] == [False] * 3
    assert len(told) == 1
    assert "/usr/bin/gcc" in str(told[0].message)
    assert "install gcc and python3-dev" in str(told[0].message)


def test_one_rank_of_a_node_warns(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr("ssmlora_dist.ops.triton_dropout.dropout", fail_to_build)
    launch = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in launch.items():
        fresh.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not operators._runs_kernels(CPU, torch.float32)


def test_a_kernel_that_runs_is_taken_and_lack_of_memory_says_nothing_of_it(
    fresh: pytest.MonkeyPatch,
) -> None:
    tried: list[Tensor] = []

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    fresh.setattr("ssmlora_dist.ops.triton_dropout.dropout", fail)
    with pytest.raises(torch.OutOfMemoryError):
        operators._runs_kernels(CPU, torch.float32)
    fresh.setattr("ssmlora_dist.ops.triton_dropout.dropout", lambda x, *_: tried.append(x))
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
        assert operators._runs_kernels(CPU, dtype)
    assert [x.dtype for x in tried] == [torch.float32, torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_run_on_every_gpu(fresh: pytest.MonkeyPatch) -> None:
    for index in range(torch.cuda.device_count()):
        assert operators._runs_kernels(torch.device("cuda", index), torch.float32)


@pytest.mark.parametrize("runs", [True, False])
def test_kernels_are_launched_on_the_tensor_s_device(runs: bool, fresh: pytest.MonkeyPatch) -> None:
    """Triton takes the current one, whose kernels read another's memory by luck or not at all."""
    current = [torch.device("cuda", 0)]

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(chosen)
        yield
        current.pop()

    kernels = SimpleNamespace(takes=lambda tensor: True, plain=lambda tensor: ("kernel", current[-1]))
    fresh.setattr("torch.cuda.device", device)
    fresh.setattr(operators, "_triton_kernels", lambda module: kernels)
    fresh.setattr(operators, "_runs_kernels", lambda device, dtype: runs)

    def plain(tensor: Any) -> tuple[str, torch.device]:
        return "plain", current[-1]

    second = SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.float32)
    expected = ("kernel", second.device) if runs else ("plain", current[0])
    assert operators._fastest(plain, "kernels")(second) == expected
    assert len(current) == 1


PLAIN = {function.__name__: function for function in (dropout, state_forward, state_backward)}


class Waits(TorchDispatchMode):
    """Writes down what would have the host wait for a GPU: values it reads, shapes that depend on them."""

    ALWAYS: ClassVar[set[str]] = {
        "_local_scalar_dense",
        "equal",
        "is_nonzero",
        "item",
        "masked_select",
        "nonzero",
        "_unique2",
        "unique_dim",
    }

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition(".")[0].partition("::")
        if space == "ssmlora":
            # Not as one operator, into which nobody sees.
            with self:
                return PLAIN[name](*args)
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in self.ALWAYS or by_mask:
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, {}) for kind in FORMS),
        *((SSMLoRA, {"normalization": "rms"}), (SSMLoRA, {"normalization": "none", "carry": "raw"})),
    ],
)
def test_plain_forms_never_wait_for_the_device(kind: type[Form], settings: dict[str, Any]) -> None:
    form = kind(rank=4, axis=1, num_axes=3, **settings)
    leaves = draw(form, 7, torch.float32)
    with Waits() as waits:
        outputs = by_form(form, leaves, SEEDS)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    assert waits.found == []


def test_waiting_is_seen() -> None:
    x = torch.arange(3.0)
    with Waits() as waits:
        assert float(x[1]) == 1.0
        x[x > 1]
        x.nonzero()
    assert waits.found == ["aten::_local_scalar_dense", "aten::index.Tensor", "aten::nonzero"]
