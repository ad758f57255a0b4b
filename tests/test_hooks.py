"""What hooks on frozen layers have kept stays as it was: deltas are added in place where nobody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ssmlora_dist import AdapterConfig, add_adapters
from ssmlora_dist.adapters.layers import LoRALinear
from ssmlora_dist.batches import Batch
from ssmlora_dist.models.loss import CausalLMLoss, checkpoint_layers
from ssmlora_dist.ops.lora import LoRA
from ssmlora_dist.quantization import quantize_linear
from tests.tiny import adapted_model, dropout_seeds, layers_of, randomize_adapters, tiny_model, token_ids

CONFIGS = {
    "lora": AdapterConfig(rank=4, method="lora", alternate=(), every_layer=("q_proj", "k_proj", "down_proj")),
    "ssmlora": AdapterConfig(rank=4, every_layer=("k_proj", "down_proj"), every_layer_method="ssmlora"),
    "dropout": AdapterConfig(rank=4, dropout=0.3, every_layer=("k_proj", "down_proj")),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
storages = pytest.mark.parametrize("storage", ["none", "nf4"])
NUM_LAYERS = 2
TOKENS = token_ids(2, 7)
SEEDS = {"dropout_seeds": dropout_seeds([5, 6], 7)}


def model_of(config: AdapterConfig, storage: str = "none") -> Any:
    return adapted_model(config=config, quantization=storage, num_layers=NUM_LAYERS).train()


def frozen_layers(model: Any) -> list[Any]:
    return [module.base_layer for module in model.modules() if isinstance(module, LoRALinear)]


def results(model: Any) -> list[Tensor]:
    """The loss and all gradients."""
    loss = CausalLMLoss(model, chunk_size=4)(Batch.of(TOKENS, input_ids=TOKENS, **SEEDS))
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


def assert_equal(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert [i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if not torch.equal(a, b)] == []


class Kept:
    """Tensors that somebody holds, each with what it was when it was taken."""

    def __init__(self, form: Callable[[Tensor], Any] = lambda tensor: tensor) -> None:
        self.form = form
        self.pairs: list[tuple[Any, Tensor]] = []

    def keep(self, tensor: Tensor) -> None:
        self.pairs.append((self.form(tensor), tensor.detach().clone()))

    def assert_unchanged(self) -> None:
        assert self.pairs
        changed = [i for i, (held, was) in enumerate(self.pairs) if not was.equal(torch.as_tensor(held))]
        assert changed == [], f"of {len(self.pairs)}"


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda output: output,
    "detached": lambda output: output.detach(),
    "numpy": lambda output: output.detach().numpy(),
}


@contextmanager
def each_layer(layers: list[Any], register: str, hook: Callable[..., Any], **options: Any) -> Iterator[None]:
    handles = [getattr(layer, register)(hook, **options) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@configs
@pytest.mark.parametrize(
    ("storage", "form"), [("none", "itself"), ("none", "detached"), ("none", "numpy"), ("nf4", "itself")]
)
@pytest.mark.parametrize("grad", [False, True])
def test_the_output_that_a_forward_hook_keeps(
    config: AdapterConfig, storage: str, form: str, grad: bool
) -> None:
    model = model_of(config, storage)
    kept = Kept(FORMS[form])
    with each_layer(frozen_layers(model), "register_forward_hook", lambda *given: kept.keep(given[-1])):
        if grad:
            expected = results(model_of(config, storage))
            assert_equal(results(model), expected)
        else:
            with torch.no_grad():
                expected = [model_of(config, storage)(TOKENS, use_cache=False, **SEEDS).logits]
                assert_equal([model(TOKENS, use_cache=False, **SEEDS).logits], expected)
    kept.assert_unchanged()


@configs
def test_the_output_that_a_hook_of_all_modules_keeps(config: AdapterConfig) -> None:
    model, kept = model_of(config), Kept()

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, nn.Linear):
            kept.keep(output)

    handle = torch_module.register_module_forward_hook(hook)
    try:
        assert_equal(results(model), results(model_of(config)))
    finally:
        handle.remove()
    kept.assert_unchanged()


@configs
def test_hooks_that_were_there_before_the_adapter(config: AdapterConfig) -> None:
    model, kept = tiny_model(num_layers=NUM_LAYERS), Kept()
    layers = [layer.get_submodule(f"self_attn.{name}_proj") for layer in layers_of(model) for name in "qkv"]
    with each_layer(layers, "register_forward_hook", lambda *given: kept.keep(given[-1])):
        add_adapters(model, config)
        randomize_adapters(model)
        model.train()
        assert_equal(results(model), results(model_of(config)))
    kept.assert_unchanged()


@configs
def test_part_of_an_output_can_be_kept_and_used(config: AdapterConfig) -> None:
    """A loss on features: what autograd has saved for it must be as it was."""
    model, features = model_of(config), []
    with each_layer(
        frozen_layers(model),
        "register_forward_hook",
        lambda *given: features.append(given[-1].square().sum()),
    ):
        loss = CausalLMLoss(model, chunk_size=4)(Batch.of(TOKENS, input_ids=TOKENS, **SEEDS))
    (loss + torch.stack(features).sum()).backward()
    view = Kept(lambda output: output[..., :3])
    with each_layer(frozen_layers(model), "register_forward_hook", lambda *given: view.keep(given[-1])):
        results(model)
    assert all(was[..., :3].equal(held) for held, was in view.pairs)


@storages
@configs
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradients_that_a_backward_hook_keeps(
    config: AdapterConfig, storage: str, checkpointing: bool
) -> None:
    model, kept = model_of(config, storage), Kept()
    if checkpointing:
        checkpoint_layers(model)

    def hook(_: nn.Module, received: Any, sent: Any) -> None:
        for gradient in (*received, *sent):
            if gradient is not None:
                kept.keep(gradient)

    with each_layer(frozen_layers(model), "register_full_backward_hook", hook):
        assert_equal(results(model), results(model_of(config, storage)))
    kept.assert_unchanged()


@storages
@configs
def test_the_gradient_that_a_tensor_hook_keeps(config: AdapterConfig, storage: str) -> None:
    model, kept = model_of(config, storage), Kept()

    def hook(_: nn.Module, inputs: Any) -> None:
        if inputs[0].requires_grad:
            inputs[0].register_hook(kept.keep)

    with each_layer(frozen_layers(model), "register_forward_pre_hook", hook):
        assert_equal(results(model), results(model_of(config, storage)))
    kept.assert_unchanged()


class Remembering(nn.Linear):
    """Gives the same tensor to all who ask for the same input."""

    known: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.known is None or self.known[0] is not x:
            self.known = (x, super().forward(x))
        output: Tensor = self.known[1]
        return output


class Passing(nn.Linear):
    """Gives its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("kind", [Remembering, Passing])
def test_a_layer_that_holds_its_output_itself(kind: Any) -> None:
    base = kind(8, 8).requires_grad_(False)
    layer = LoRALinear(base, LoRA(rank=2), 4.0)
    layer.reset_parameters(torch.Generator().manual_seed(1))
    nn.init.ones_(layer.lora_B.weight)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    was = x.clone()
    delta = layer.scaling * x @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    frozen = x if kind is Passing else F.linear(x, base.weight, base.bias)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(layer(x), frozen + delta)
    assert torch.equal(x, was)


def test_a_layer_that_sends_its_gradient_on_as_it_is() -> None:
    layer = LoRALinear(Passing(8, 8), LoRA(rank=2), 4.0)
    layer.reset_parameters(torch.Generator().manual_seed(1))
    nn.init.ones_(layer.lora_B.weight)
    x = torch.randn(3, 8).requires_grad_()
    received = torch.randn(3, 8)
    was = received.clone()
    layer(x).backward(received)
    assert torch.equal(received, was)
    torch.testing.assert_close(x.grad, was + layer.scaling * was @ layer.lora_B.weight @ layer.lora_A.weight)


class Through(torch.autograd.Function):
    """What DeepSpeed's hooks of ZeRO 3 make of an output."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


HOOKS: dict[str, Callable[..., Any]] = {
    "a_hook_that_looks": lambda *given: None,
    "hooks_of_zero_3": lambda *given: Through.apply(given[-1]),
}


@storages
@configs
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_where_nobody_holds_the_output_nothing_is_allocated(
    config: AdapterConfig, storage: str, hook: Callable[..., Any]
) -> None:
    model, addresses = model_of(config, storage), []
    layers = frozen_layers(model)
    adapters = [module for module in model.modules() if isinstance(module, LoRALinear)]

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        addresses.append(output.data_ptr())

    with (
        each_layer(layers, "register_forward_hook", hook),
        each_layer(layers, "register_forward_hook", note),
        each_layer(adapters, "register_forward_hook", note),
    ):
        model(TOKENS, use_cache=False, **SEEDS)
        with torch.no_grad():
            model(TOKENS, use_cache=False, **SEEDS)
    frozen, adapted = addresses[0::2], addresses[1::2]
    assert len(frozen) == 2 * len(adapters)
    assert frozen == adapted


@pytest.mark.parametrize("shape", [(6, 64), (2, 3, 64)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("storage", ["none", "nf4"])
def test_where_nobody_holds_the_gradient_nothing_is_allocated(
    storage: str, bias: bool, shape: tuple[int, ...]
) -> None:
    base = nn.Linear(64, 64, bias=bias).requires_grad_(False)
    if storage == "nf4":
        base = quantize_linear(base, mode="nf4", compute_dtype=torch.float32)
    layer, addresses = LoRALinear(base, LoRA(rank=2), 4.0), []

    def note(gradient: Tensor) -> None:
        addresses.append(gradient.data_ptr())

    def look(read: Tensor) -> None:
        read.register_hook(note)

    x = torch.randn(shape).requires_grad_() * 1
    look(x)
    with each_layer([base], "register_forward_pre_hook", lambda _, x: look(x[0])):
        layer(x).sum().backward()
    assert len(addresses) == 2
    assert addresses[0] == addresses[1]
