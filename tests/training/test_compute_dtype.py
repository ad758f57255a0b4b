"""What "auto" becomes in a run: by the machine, by the other ranks, by the checkpoint that is continued."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.distributed.context import DistributedContext
from ssmlora_dist.errors import ConfigError
from ssmlora_dist.tracking import Console
from ssmlora_dist.training import compute_dtype
from ssmlora_dist.training.compute_dtype import settle_compute_dtype


class Ranks(DistributedContext):
    """As many processes as there are choices, each of which would take one alone."""

    def gather(self, value: Any) -> list[Any]:
        return list(self.choices)

    choices: tuple[str, ...] = ()


def ranks(*choices: str) -> Ranks:
    context = Ranks(0, len(choices), 0, torch.device("cpu"))
    object.__setattr__(context, "choices", choices)
    return context


def config(model: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": "run"},
            "model": {"path": "org/base"} | (model or {}),
            "data": {"train": {"format": "text", "path": "text.txt"}},
            "training": {"max_steps": 1},
        }
        | sections
    )


@pytest.mark.parametrize(
    ("choices", "kept", "expected", "says"),
    [
        (["bfloat16"], None, "bfloat16", "bfloat16 (auto: the device multiplies it natively)"),
        (["float32"], None, "float32", "float32 (auto: this CPU does not multiply bfloat16 natively)"),
        (
            ["float16"],
            None,
            "float16",
            "float16 (auto: the device does not multiply bfloat16 natively; the loss",
        ),
        (["bfloat16", "float16"], None, "float16", "they would take bfloat16 or float16"),
        (["bfloat16", "float32", "bfloat16", "bfloat16"], None, "float32", "what all ranks can do"),
        (["float32"], "bfloat16", "bfloat16", "was trained in, though float32 would be faster here"),
        (["bfloat16"], "float32", "float32", "was trained in, though bfloat16 would be faster here"),
        (["bfloat16"], "bfloat16", "bfloat16", "bfloat16 (auto: what the adapter was trained in)"),
    ],
)
def test_auto(
    choices: list[str], kept: Any, expected: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settled = settle_compute_dtype(config(), ranks(*choices), Console(), kept=kept)
    assert settled.model.compute_dtype == expected
    assert settled == config({"compute_dtype": expected})
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_a_named_one_stays(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    named = config({"compute_dtype": name})
    assert settle_compute_dtype(named, ranks("float32", "bfloat16"), Console(), kept="float32") is named
    assert capsys.readouterr().out == ""


def test_this_rank_says_what_its_machine_does_best(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(compute_dtype, "machine_dtype", lambda device_type: f"{device_type}'s")
    monkeypatch.setattr(Ranks, "gather", lambda _, value: said.append(value) or ["float32"])
    settle_compute_dtype(config(), ranks("float32"), Console(enabled=False))
    assert said == ["cpu's"]


def test_what_does_not_go_with_it_is_refused_as_if_it_had_been_named() -> None:
    stages = config(
        parallel={"pipeline_stages": 2}, adapter={"state_dtype": "bfloat16"}, training={"max_steps": 1}
    )
    context = ranks("bfloat16", "bfloat16")
    assert settle_compute_dtype(stages, context, Console(enabled=False)).model.compute_dtype == "bfloat16"
    with pytest.raises(ConfigError) as refused:
        settle_compute_dtype(stages, context, Console(enabled=False), kept="float32")
    assert 'adapter.state_dtype: "bfloat16" given with compute_dtype "float32"' in str(refused.value)
    assert "what the adapter was trained in" in str(refused.value)


@pytest.mark.parametrize(
    ("device", "named", "choices", "warned"),
    [
        ("cuda", "bfloat16", ["bfloat16", "float16"], "rank 1's GPU does not multiply it natively"),
        ("cuda", "bfloat16", ["bfloat16", "bfloat16"], ""),
        ("cuda", "float16", ["float16", "float16"], ""),
        # CPUs of the tests.
        ("cpu", "bfloat16", ["float32", "float32"], ""),
    ],
)
def test_bfloat16_on_gpus_without_it_is_said(
    device: str,
    named: str,
    choices: list[str],
    warned: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compute_dtype, "machine_dtype", lambda device_type: choices[0])
    context = ranks(*choices)
    object.__setattr__(context, "device", torch.device(device))
    given = config({"compute_dtype": named})
    assert settle_compute_dtype(given, context, Console()) is given
    shown = capsys.readouterr().err
    assert warned in shown
    assert bool(warned) == bool(shown)
