"""MLPs and norms in tiles of tokens: what they compute, how often, and which decoders have any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmlora_dist import AdapterConfig
from ssmlora_dist.adapters.state import disabled_adapters
from ssmlora_dist.adapters.tiling import Tiled, find_mlp, tile_layers, untiled_layers
from ssmlora_dist.batches import Batch
from ssmlora_dist.models import decoder_layers, empty_model, structure_of
from ssmlora_dist.models.loss import CausalLMLoss, checkpoint_layers
from ssmlora_dist.ops.dropout import token_seeds
from tests.decoders import TESTED, bare_config
from tests.tiny import FAMILY_NAMES, adapted_model, layers_of, token_ids

# Float32 products of other shapes and sums over tokens in another order, divided by the spread of a state; of
# the largest number.
TOLERANCE = 1e-4
# Time modules in front of, within and behind the MLP, and dropout in all of them.
EVERYWHERE = AdapterConfig(
    rank=4,
    alternate=("q_proj", "down_proj"),
    every_layer=("gate_proj", "up_proj"),
    every_layer_method="ssmlora",
    dropout=0.3,
)
# Two samples in the first row, one in the second.
BATCH = Batch.of(
    token_ids(2, 9),
    lengths=((4, 5), (9,)),
    input_ids=token_ids(2, 9),
    position_ids=torch.tensor([[*range(4), *range(5)], [*range(9)]]),
    dropout_seeds=torch.stack([torch.cat([token_seeds(1, 4), token_seeds(2, 5)]), token_seeds(3, 9)]),
)
Prepare = Callable[[Any], object]


def tiled(tile_size: int, num_tiles: int | None = None, **checkpoints: Any) -> Prepare:
    def prepare(model: Any) -> None:
        if checkpoints:
            checkpoint_layers(model, **checkpoints)
        behind = map(model.get_submodule, structure_of(model).after)
        tile_layers(decoder_layers(model), tile_size, num_tiles, behind)

    return prepare


# Tiles of 4 tokens of 2 rows of 9, of one of each, and more tiles than tokens; checkpoints around some.
WAYS: dict[str, Prepare] = {
    "tiles": tiled(8),
    "a token of each row": tiled(2, num_kept=0),
    "more tiles than tokens": tiled(8, 11, layers_per_checkpoint=4, offload=True),
}


def trained(prepare: Prepare, **settings: Any) -> dict[str, Tensor]:
    """The loss, the gradients, and what the last layer but one hands on."""
    model = adapted_model(**{"config": EVERYWHERE, "num_layers": 4} | settings).train()
    prepare(model)
    handed: list[tuple[Tensor, Tensor]] = []
    hook = layers_of(model)[-1].register_forward_pre_hook(lambda _, args: handed.append(args[0]))
    loss = CausalLMLoss(model, 5)(BATCH)
    hook.remove()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    inputs = handed[0]
    hidden_BSD, state_BSAR = inputs.inputs if hasattr(inputs, "calls") else inputs
    return {"loss": loss.detach(), "hidden": hidden_BSD.detach(), "state": state_BSAR.detach(), **found}


def assert_near(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    largest = max(tensor.abs().max() for name, tensor in wanted.items() if "." in name)
    for name, tensor in wanted.items():
        scale = largest if "." in name else tensor.abs().max()
        error = ((got[name] - tensor).abs().max() / scale).item()
        assert error <= TOLERANCE, f"{name} differs by {error:.1e}"


@pytest.mark.parametrize("way", ["tiles", "a token of each row"])
@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_tiles_do_not_show(model_type: str, way: str) -> None:
    quantization = "none" if way == "tiles" else "nf4"
    wanted = trained(lambda _: None, model_type=model_type, quantization=quantization)
    assert_near(trained(WAYS[way], model_type=model_type, quantization=quantization), wanted)


def test_tiles_do_not_show_where_layers_share_a_checkpoint() -> None:
    # Of a group only the first layer's inputs are handed on.
    wanted, got = (trained(way) for way in (lambda _: None, WAYS["more tiles than tokens"]))
    assert_near({**got, "hidden": wanted["hidden"], "state": wanted["state"]}, wanted)


def test_norms_that_are_trained_learn_from_every_tile() -> None:
    whole = EVERYWHERE.model_copy(update={"modules_to_save": ("input_layernorm", "norm")})
    wanted, got = (trained(way, config=whole) for way in (lambda _: None, WAYS["tiles"]))
    assert any("input_layernorm" in name for name in wanted)
    assert_near(got, wanted)


def test_tiles_are_cut_as_configured_and_recomputed_once() -> None:
    model = adapted_model(config=EVERYWHERE, num_layers=2).train()
    tiled(8, num_kept=0)(model)
    calls: list[tuple[int, str, int]] = []
    for index, layer in enumerate(layers_of(model)):
        assert isinstance(layer.input_layernorm, Tiled)
        for part in ("self_attn.q_proj", "mlp.act_fn"):
            layer.get_submodule(part).register_forward_pre_hook(
                lambda _, args, call=(index, part[-4:]): calls.append((*call, args[0].shape[1]))
            )
    tokens = token_ids(2, 9)
    CausalLMLoss(model, 5)(Batch.of(tokens, input_ids=tokens)).backward()
    tiles = [3, 3, 3]
    runs = [[(index, "proj", 9), *((index, "t_fn", size) for size in tiles)] for index in range(2)]
    assert calls == runs[0] + runs[1] + runs[1] + runs[0]


def test_without_gradients_and_without_adapters() -> None:
    tokens = token_ids(2, 9)
    plain, cut = (adapted_model(config=EVERYWHERE, num_layers=3).eval() for _ in range(2))
    tiled(4)(cut)
    with torch.inference_mode():
        torch.testing.assert_close(cut(tokens).logits, plain(tokens).logits)
    with disabled_adapters(plain), disabled_adapters(cut):
        torch.testing.assert_close(cut(tokens).logits, plain(tokens).logits)
    # One token at a time needs no tiles.
    generated = [m.generate(tokens, max_new_tokens=4, do_sample=False) for m in (plain, cut)]
    assert torch.equal(*generated)


def test_the_mlps_of_the_decoders_of_transformers() -> None:
    from transformers import AutoConfig

    untiled = {}
    for model_type in TESTED:
        settings = bare_config(model_type)
        settings.pop("model_type")
        layers = decoder_layers(empty_model(AutoConfig.for_model(model_type, **settings)))
        if left := untiled_layers(layers):
            untiled[model_type] = len(left) / len(layers)
        for layer in layers.values():
            assert find_mlp(layer) in ("mlp", None)
    # Of experts, but for OPT, whose layers multiply by themselves; a first layer of GLM-4.5 has none.
    experts = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "gpt_oss", "granitemoe")
    assert untiled == {**dict.fromkeys(experts, 1.0), "glm4_moe": 0.75, "opt": 1.0}
