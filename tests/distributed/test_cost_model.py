from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ssmlora_dist import AdapterConfig, add_adapters
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.adapters.tiling import tile_layers
from ssmlora_dist.batches import Batch
from ssmlora_dist.distributed.cost_model import (
    AdapterShape,
    ModelCosts,
    Workload,
    bytes_per_weight,
    model_costs,
)
from ssmlora_dist.distributed.schedule import Recompute
from ssmlora_dist.models import decoder_layers, empty_model, load_config, structure_of
from ssmlora_dist.models.loss import CausalLMLoss, checkpoint_layers
from ssmlora_dist.quantization import expert_weights, quantize_experts, quantize_linear
from ssmlora_dist.sizes import DecoderShape

from ..tiny import QV_AND_MLP, tiny_model

BATCH, TOKENS, SUPERVISED, CHUNK = 2, 32, 5, 4
# Non-reentrant checkpointing ends a layer's recompute once its last saved tensor is there, one product early.
RECOMPUTE_TOLERANCE = 0.03
# Rotary tables, adapter codes and the norms' scales are left out of the estimate; all are small.
SAVED_TOLERANCE = 0.06
BYTES = {torch.float32: 4, torch.bfloat16: 2}


def adapted(num_layers: int, config: AdapterConfig = QV_AND_MLP, **changes: Any) -> Any:
    return add_adapters(tiny_model(num_layers=num_layers, **changes), config).train()


def costs_of(
    model: Any,
    recompute: Recompute,
    dtype: torch.dtype = torch.float32,
    bytes_per_linear_weight: float | None = None,
    **spared: Any,
) -> ModelCosts:
    config = model.config
    parameters = [0] * config.num_hidden_layers
    for name, parameter in adapter_parameters(model).items():
        parameters[int(name.split("layers.")[1].split(".")[0])] += parameter.numel()
    shape = structure_of(model).shape
    return model_costs(
        shape,
        AdapterShape(tuple(parameters), num_axes=2, rank=4, state_dtype_bytes=BYTES[dtype]),
        Workload(TOKENS, BATCH, 4, SUPERVISED, CHUNK, recompute, **spared),
        bytes_per_linear_weight=bytes_per_linear_weight or BYTES[dtype],
        compute_dtype_bytes=BYTES[dtype],
    )


def state_flops(num_products: int, z_BSR: torch.Size) -> int:
    return num_products * 2 * z_BSR.numel() * z_BSR[-1]


# Products that torch does not count by itself. The state, worked out again for its gradient, does not count.
FLOPS_OF_ADAPTERS: dict[Any, Any] = {
    torch.ops.aten.addmm_: lambda _, left, right, **__: 2 * left.numel() * right[1],
    torch.ops.ssmlora.state_forward: lambda z, *_, **__: state_flops(2, z),
    torch.ops.ssmlora.state_backward: lambda d_u, *_, **__: state_flops(4, d_u),
}


def counted_flops(model: Any, checkpointing: bool) -> tuple[int, int]:
    """Matrix products of a forward and of a backward pass, counted by torch."""
    if checkpointing:
        checkpoint_layers(model)
    input_ids = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % model.config.vocab_size
    labels = torch.full_like(input_ids, -100)
    labels[:, -SUPERVISED:] = input_ids[:, -SUPERVISED:]
    module = CausalLMLoss(model, CHUNK)
    with FlopCounterMode(display=False, custom_mapping=FLOPS_OF_ADAPTERS) as counter:
        loss = module(Batch.of(labels, input_ids=input_ids))
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_are_those_of_a_real_model(checkpointing: bool) -> None:
    """Four layers less two. Eager attention computes what the mask then hides: twice the part in S^2."""
    recompute: Recompute = "on_gradient" if checkpointing else "none"
    models = [adapted(num_layers) for num_layers in (2, 4)]
    for model in models:
        model.set_attn_implementation("eager")
    two, four = (counted_flops(model, checkpointing) for model in models)
    costs = costs_of(models[1], recompute)
    hidden_by_mask = 2 * (2 * BATCH * TOKENS * TOKENS * 16)
    forward = sum(layer.forward_flops for layer in costs.layers[2:]) + hidden_by_mask
    backward = sum(layer.backward_flops for layer in costs.layers[2:]) + 2 * hidden_by_mask
    assert four[0] - two[0] == forward
    if checkpointing:
        again = sum(layer.recompute_flops for layer in costs.layers[2:]) + hidden_by_mask
        assert again == forward
        assert four[1] - two[1] == pytest.approx(backward + again, rel=RECOMPUTE_TOLERANCE)
    else:
        assert four[1] - two[1] == backward
        assert {layer.recompute_flops for layer in costs.layers} == {0}
    layers = sum(layer.forward_flops for layer in costs.layers) + 2 * hidden_by_mask
    assert four[0] == layers + costs.head.forward_flops
    assert costs.head.backward_flops == 2 * costs.head.forward_flops


def test_flops_are_those_of_the_metrics() -> None:
    model = adapted(6)
    costs = costs_of(model, "none")
    trained = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    whole = sum(layer.forward_flops + layer.backward_flops for layer in costs.layers)
    tokens = BATCH * TOKENS
    assert whole - 6 * tokens * trained == tokens * structure_of(model).shape.flops_per_token(TOKENS)


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_weights_are_those_of_a_real_model(tied: bool) -> None:
    model = adapted(5, dtype=torch.bfloat16, tie_word_embeddings=tied)
    costs = costs_of(model, "on_gradient", torch.bfloat16)
    trained = {parameter.data_ptr() for parameter in adapter_parameters(model).values()}
    frozen = sum(p.nbytes for p in model.parameters() if p.data_ptr() not in trained)
    parts = (costs.embedding, *costs.layers, costs.head)
    assert sum(part.frozen_bytes for part in parts) - costs.shared_bytes == frozen
    adapters = sum(parameter.nbytes for parameter in adapter_parameters(model).values())
    assert sum(part.adapter_bytes for part in parts) == 4 * adapters
    assert (costs.shared_bytes > 0) == tied


@pytest.mark.parametrize("layers_per_checkpoint", [1, 2])
def test_flops_of_tiles_are_those_of_a_real_model(layers_per_checkpoint: int) -> None:
    """Four layers less two; of two layers that share a checkpoint, one MLP is computed once more."""
    models = [adapted(num_layers) for num_layers in (2, 4)]
    for model in models:
        model.set_attn_implementation("eager")
        checkpoint_layers(model, layers_per_checkpoint=layers_per_checkpoint)
        tile_layers(decoder_layers(model), 16)
    two, four = (counted_flops(model, checkpointing=False) for model in models)
    spared = {"mlp_tile_size": 16, "layers_per_checkpoint": layers_per_checkpoint}
    costs = costs_of(models[1], "on_gradient", **spared)
    hidden_by_mask = 2 * (2 * BATCH * TOKENS * TOKENS * 16)
    expected = sum(layer.backward_flops + layer.recompute_flops for layer in costs.layers[2:])
    assert four[1] - two[1] == pytest.approx(expected + 3 * hidden_by_mask, rel=RECOMPUTE_TOLERANCE)


def test_dequantised_weights_are_in_the_compute_dtype() -> None:
    # The last one's weight is not there by then.
    weights = 16 * (2 * 16 + 2 * 8 + 2 * 24)
    for bytes_per_linear_weight, expected in ((0.5, 4 * weights), (1.0, 4 * weights), (4.0, 0)):
        costs = costs_of(adapted(3), "on_gradient", bytes_per_linear_weight=bytes_per_linear_weight)
        assert {layer.dequantized_bytes for layer in costs.layers} == {expected}
    assert costs.head.dequantized_bytes == costs.embedding.dequantized_bytes == 0


def test_the_input_of_a_layer_is_what_crosses_a_stage_boundary() -> None:
    costs = costs_of(adapted(3), "on_gradient")
    assert {layer.input_bytes for layer in costs.layers} == {BATCH * TOKENS * (16 + 2 * 4) * 4}


@pytest.mark.parametrize(
    ("mode", "double", "num_bytes"),
    [
        # Codes, scales of 64 weights, scales of 256 scales: as bitsandbytes stores 512 x 512 weights.
        ("nf4", True, 131_072 + 4_096 + 64),
        ("fp4", False, 131_072 + 16_384),
        ("int8", True, 262_144),
        ("none", True, 524_288),
    ],
)
def test_bytes_per_weight(mode: Any, double: bool, num_bytes: int) -> None:
    per_weight = bytes_per_weight(mode, double_quantization=double, compute_dtype_bytes=2)
    assert per_weight * 512 * 512 == num_bytes


def decoder(
    hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int, **more: Any
) -> DecoderShape:
    config = load_config(
        config={
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "vocab_size": 1,
            "bos_token_id": None,
            "eos_token_id": None,
            **more,
        }
    )
    return structure_of(empty_model(config)).shape


LLAMA_2_7B = decoder(4096, 11008, 32, 32, 32)
LLAMA_2_70B = decoder(8192, 28672, 80, 64, 8)
# Heads that together are wider than the hidden size.
QWEN3_0_6B = decoder(1024, 3072, 28, 16, 8, head_dim=128, model_type="qwen3")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # 4 x 4096^2 + 3 x 4096 x 11008 in each of 32 layers.
        (LLAMA_2_7B, 32 * (67_108_864 + 135_266_304)),
        # q and o 8192^2, k and v 8192 x 1024, 3 x 8192 x 28672 in each of 80 layers.
        (LLAMA_2_70B, 80 * (134_217_728 + 16_777_216 + 704_643_072)),
        # q and o 1024 x 2048, k and v 1024 x 1024, 3 x 1024 x 3072 in each of 28 layers.
        (QWEN3_0_6B, 28 * (4_194_304 + 2_097_152 + 9_437_184)),
    ],
)
def test_weights_that_multiply_each_token(shape: DecoderShape, expected: int) -> None:
    assert sum(layer.multiplied_weights for layer in shape.layers) == expected


# Qwen3-30B-A3B: 30.5 billion weights with 0.6 of embedding and head, of which 3.3 multiply a token.
QWEN3_30B_A3B = decoder(
    2048,
    6144,
    48,
    32,
    4,
    head_dim=128,
    moe_intermediate_size=768,
    num_experts=128,
    num_experts_per_tok=8,
    model_type="qwen3_moe",
)


def test_of_experts_all_take_memory_and_a_few_take_time() -> None:
    shape, layer = QWEN3_30B_A3B, QWEN3_30B_A3B.layers[0]
    attention, expert, router = 2 * 2048 * (4096 + 512), 3 * 2048 * 768, 2048 * 128
    assert layer.linear_weights + layer.expert_weights == attention + 128 * expert
    assert layer.multiplied_weights == attention + 8 * expert + router
    assert shape.flops_per_token(0) == 48 * 4 * layer.multiplied_weights
    assert 48 * (layer.linear_weights + layer.expert_weights) == 29_896_998_912
    assert 48 * layer.multiplied_weights == 2_730_491_904


def mixture(num_layers: int = 2) -> Any:
    """A dense model of experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 176, "num_attention_heads": 4, "vocab_size": 67}
    experts = {"num_key_value_heads": 2, "num_local_experts": 6, "num_experts_per_tok": 3}
    config = AutoConfig.for_model("mixtral", num_hidden_layers=num_layers, **sizes, **experts)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation="eager", experts_implementation="eager"
    )
    return model.requires_grad_(False).train()


def mixture_costs(model: Any) -> ModelCosts:
    return model_costs(
        structure_of(model).shape,
        AdapterShape((0,) * model.config.num_hidden_layers, num_axes=0, rank=4, state_dtype_bytes=2),
        Workload(TOKENS, BATCH, 4, SUPERVISED, CHUNK, "none"),
        bytes_per_linear_weight=2,
        compute_dtype_bytes=2,
    )


def test_a_mixture_s_flops_and_bytes_are_those_of_a_real_model() -> None:
    model = mixture()
    costs, frozen = mixture_costs(model), sum(p.nbytes for p in model.parameters())
    assert sum(part.frozen_bytes for part in (costs.embedding, *costs.layers, costs.head)) == frozen
    embedded = torch.randn(BATCH, TOKENS, 128, dtype=torch.bfloat16).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(inputs_embeds=embedded).last_hidden_state
        forward = counter.get_total_flops()
        hidden.sum().backward()
    hidden_by_mask = 2 * (2 * BATCH * TOKENS * TOKENS * 128)
    assert forward == sum(layer.forward_flops for layer in costs.layers) + hidden_by_mask
    backward = sum(layer.backward_flops for layer in costs.layers) + 2 * hidden_by_mask
    assert counter.get_total_flops() - forward == backward


def saved_bytes(model: Any, layer: Any, **inputs: Tensor) -> int:
    """What autograd keeps of a layer's forward pass, without parameters."""
    saved: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    original = layer.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            return original(*args, **kwargs)

    layer.forward = watched
    model.model(**inputs, use_cache=False)
    return sum(saved.values())


def test_saved_bytes_of_a_mixture_are_near_those_of_a_real_layer() -> None:
    model = mixture()
    model.set_attn_implementation("sdpa")
    model.set_experts_implementation("grouped_mm")
    layer, estimate = model.model.layers[1], mixture_costs(model).layers[1].saved_bytes
    for path, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            layer.set_submodule(path, quantize_linear(module, mode="nf4"))
        elif expert_weights(module):
            layer.set_submodule(path, quantize_experts(module, mode="nf4"))
    embedded = torch.randn(BATCH, TOKENS, 128, dtype=torch.bfloat16).requires_grad_()
    found = saved_bytes(model, layer, inputs_embeds=embedded)
    assert found == pytest.approx(estimate, rel=SAVED_TOLERANCE)


def test_flops_of_llama_2_7b() -> None:
    """4 N, and in each layer 2 products of half of 4,096 x 4,096 scores forward and twice that backward."""
    shape = LLAMA_2_7B
    assert shape.flops_per_token(0) == 4 * 6_476_005_376
    attention_forward = 32 * 2 * 2 * (4096 / 2) * 4096
    assert shape.flops_per_token(4096) == 4 * 6_476_005_376 + 3 * attention_forward
