"""Adapted models of every form: I1, I2, what is written and read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ssmlora_dist import AdapterConfig, add_adapters, load_adapter, save_adapter
from ssmlora_dist.adapters.health import watch_state
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.adapters.layers import LoRALinear
from ssmlora_dist.adapters.placement import time_axes
from ssmlora_dist.batches import Batch
from ssmlora_dist.errors import AdapterError
from ssmlora_dist.models.loss import CausalLMLoss, checkpoint_layers
from ssmlora_dist.ops import registry
from tests.own_forms import Fading, Mixing
from tests.tiny import adapted_model, dropout_seeds, randomize_adapters, tiny_model, token_ids

OWN = ("constant", "gated", "lora", "rolled", "ssmlora", Fading.name, Mixing.name)
every_form = pytest.mark.parametrize("form", OWN)


def config_of(form: str, **settings: Any) -> AdapterConfig:
    return AdapterConfig(rank=3, method=form, every_layer=("o_proj",), every_layer_method=form, **settings)


def training_results(config: AdapterConfig, dtype: torch.dtype, checkpointing: bool) -> dict[str, Tensor]:
    """Loss and the gradient of every parameter."""
    model = adapted_model(config=config, dtype=dtype, num_layers=4)
    if checkpointing:
        checkpoint_layers(model)
    tokens = token_ids(3, 7)
    loss = CausalLMLoss(model.train(), chunk_size=5)(
        Batch.of(tokens, input_ids=tokens, dropout_seeds=dropout_seeds([4, 5, 6], 7))
    )
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in adapter_parameters(model).items()}}


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_i1_a_freshly_adapted_model_is_the_base_model(form: str, dtype: torch.dtype) -> None:
    tokens = token_ids(2, 9)
    with torch.no_grad():
        expected = tiny_model(dtype=dtype, num_layers=4)(tokens, use_cache=False).logits
        model = add_adapters(tiny_model(dtype=dtype, num_layers=4), config_of(form, dropout=0.2)).train()
        assert torch.equal(model(tokens, use_cache=False).logits, expected)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient", ["full", "detached"])
def test_i2_checkpointing_changes_no_bit(form: str, dtype: torch.dtype, gradient: Any) -> None:
    config = config_of(form, dropout=0.3, state_gradient=gradient)
    wanted = training_results(config, dtype, checkpointing=False)
    got = training_results(config, dtype, checkpointing=True)
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []
    silent = {name.rpartition(".")[2] for name, g in wanted.items() if not g.abs().max() > 0}
    # What multiplies the state received has no gradient in the first module of an axis.
    assert silent <= {"state_transition", "state_rates", "state_mix"}


@every_form
def test_an_adapter_comes_back_as_it_was(form: str, tmp_path: Path) -> None:
    config = config_of(form)
    model, tokens = adapted_model(config=config, num_layers=4).eval(), token_ids(2, 7)
    save_adapter(model, tmp_path)
    loaded = load_adapter(tiny_model(num_layers=4), tmp_path).eval()
    assert torch.equal(loaded(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == (
        "LORA" if form == "lora" else "SSMLORA"
    )
    assert (
        not {"form_settings", "form_module"}
        & json.loads((tmp_path / "ssmlora.json").read_text())["adapter"].keys()
    )


@pytest.mark.parametrize("form", ["gated", "constant"])
def test_a_closed_form_trains_lora_as_lora_does(form: str) -> None:
    """Loss and gradients of a model in which only LoRA's own matrices have moved, bit for bit."""
    results = []
    for method in (form, "lora"):
        model = add_adapters(tiny_model(num_layers=4), config_of(method)).train()
        generator = torch.Generator().manual_seed(8)
        for name, parameter in adapter_parameters(model).items():
            if "lora_B" in name:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(drawn)
        tokens = token_ids(2, 7)
        loss = CausalLMLoss(model, chunk_size=5)(Batch.of(tokens, input_ids=tokens))
        loss.backward()
        gradients = {name: p.grad for name, p in adapter_parameters(model).items() if "lora_" in name}
        results.append({"loss": loss.detach(), **gradients})
    assert results[0].keys() == results[1].keys()
    assert [name for name in results[0] if not torch.equal(results[0][name], results[1][name])] == []


def test_without_a_carry_every_module_receives_zeros() -> None:
    model = adapted_model(config=AdapterConfig(rank=4, carry="none"), num_layers=4)
    received: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.register_forward_pre_hook(
                lambda module, _: received.append(module.call.read(module.form).abs().max())
            )
    model(token_ids(2, 7), use_cache=False)
    assert received == [0] * 4


def test_a_form_that_reads_all_axes_receives_what_each_handed_on() -> None:
    model = adapted_model(config=config_of(Mixing.name), num_layers=3)
    shapes: list[tuple[int, ...]] = []
    filled: list[list[bool]] = []

    def see(module: Any, _: Any) -> None:
        state = module.call.read(module.form)
        shapes.append(tuple(state.shape))
        filled.append((state.abs().amax((0, 1, 3)) > 0).tolist())

    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.register_forward_pre_hook(see)
    model(token_ids(2, 7), use_cache=False)
    assert set(shapes) == {(2, 7, 3, 3)}
    # q and o in layer 0, v and o in layer 1, q and o in layer 2; the axes are q, v, o.
    q, v, o = (True, False, False), (False, True, False), (False, False, True)
    seen = [set(), {q}, {q, o}, {q, v, o}, {q, v, o}, {q, v, o}]
    assert filled == [[any(axes) for axes in zip(*given, strict=True)] or [False] * 3 for given in seen]


def test_each_form_measures_its_own_health() -> None:
    config = AdapterConfig(
        rank=4,
        method="gated",
        every_layer=("o_proj",),
        every_layer_method=Fading.name,
        form_settings={"decay": 0.5},
    )
    model = adapted_model(config=config, num_layers=4)
    with watch_state(model, time_axes(config), torch.device("cpu")) as health:
        model(token_ids(2, 7), use_cache=False)
    metrics = health.metrics(health.sums.tolist())
    figures = [f"state_{figure}_{axis}" for axis in ("q_proj", "v_proj") for figure in ("rms", "gate")]
    assert sorted(metrics) == sorted([*figures, "state_size_o_proj"])
    assert all(value > 0 for value in metrics.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "gatd"}, r'"gatd" given; allowed: .*did you mean "gated"'),
        ({"every_layer_method": "lorra"}, r'"lorra" given; allowed: .*did you mean "lora"'),
        (
            {"method": "lora", "carry": "raw"},
            "`carry` 'raw' given, which \"lora\" does not read; leave",
        ),
        ({"method": "lora", "carry": "none"}, "`carry` 'none' given, which \"lora\" does not read"),
        ({"method": "gated", "normalization": "rms"}, "`normalization` 'rms' given, which \"gated\" and"),
        ({"method": "constant", "state_input_scale": 0.2}, "`state_input_scale` 0.2 given"),
        ({"form_settings": {"decay": 0.5}}, '`form_settings` has \'decay\'; "ssmlora" and "lora" has none'),
        (
            {"method": "fading", "form_settings": {"decy": 0.5}},
            "'decy'; allowed: decay; did you mean decay",
        ),
        ({"method": "fading", "form_settings": {"decay": 2}}, "a decay lies between 0 and 1"),
        ({"method": "fading", "form_settings": {"decay": "fast"}}, "`decay` 'fast' given, which \"fading\""),
    ],
)
def test_what_a_form_does_not_read_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AdapterConfig(**settings)


def test_what_one_form_of_two_reads_is_taken() -> None:
    config = AdapterConfig(method="gated", every_layer=("o_proj",), every_layer_method="ssmlora", carry="raw")
    assert config.form("ssmlora", axis=2, num_axes=3).carry == "raw"  # type: ignore[attr-defined]


def test_an_adapter_of_an_unknown_form_says_how_to_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And imports nothing."""
    config = AdapterConfig(method=Fading.name, rank=4, form_module="forms/mine.py")
    model = add_adapters(tiny_model(num_layers=2), config)
    randomize_adapters(model)
    save_adapter(model, tmp_path)
    known = {name: form for name, form in registry._forms.items() if name != Fading.name}
    monkeypatch.setattr(registry, "_forms", known)
    with pytest.raises(AdapterError, match=r'"fading" is not registered.*forms/mine\.py.*--form-module'):
        load_adapter(tiny_model(num_layers=2), tmp_path)
