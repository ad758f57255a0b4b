"""`run.deterministic`: what it sets on a GPU and nowhere else, and what cannot be so."""

from __future__ import annotations

import os

import pytest
import torch

from ssmlora_dist.config.loading import load_config
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.errors import ConfigError
from ssmlora_dist.training.determinism import VARIABLES, determinism

from ..launch.processes import DEBUG_TINY

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def config(deterministic: bool) -> RunConfig:
    return load_config(DEBUG_TINY, [f"run.deterministic={str(deterministic).lower()}"], device_type="cpu")


@pytest.fixture(autouse=True)
def _untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        # So that what is set is taken back.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)


@pytest.mark.parametrize(("asked", "device"), [(True, GPU), (True, CPU), (False, GPU)])
def test_a_gpu_computes_in_one_order_where_it_is_asked_for(asked: bool, device: torch.device) -> None:
    expected = asked and device.type == "cuda"
    with determinism(config(asked), device):
        assert torch.are_deterministic_algorithms_enabled() == expected
        assert torch.utils.deterministic.fill_uninitialized_memory != expected
        assert [os.environ.get(name) for name in VARIABLES] == (
            list(VARIABLES.values()) if expected else [None, None]
        )
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with determinism(config(True), GPU):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_what_cannot_be_deterministic_is_refused_by_name() -> None:
    """As torch 2.13 says it of transformers' grouped experts."""
    said = "_histc_cuda does not have a deterministic implementation, but you set 'torch.use_determ...'"
    with (
        pytest.raises(ConfigError, match=r"run.deterministic: true given; _histc_cuda, which"),
        determinism(config(True), GPU),
    ):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="odd"), determinism(config(True), GPU):
        raise RuntimeError("odd")
