"""Quantised experts: what their own class computes with the dequantised weights, to the last bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ssmlora_dist.batches import Batch
from ssmlora_dist.errors import ModelError
from ssmlora_dist.models.loss import CausalLMLoss
from ssmlora_dist.quantization import (
    QuantizationMode,
    QuantizedExperts,
    dequantized_weight,
    expert_weights,
    is_quantized,
    keep_weights_of_recompute,
    quantize_experts,
    quantize_linear,
    stored_as,
)
from ssmlora_dist.quantization import experts as experts_module
from ssmlora_dist.quantization.experts import ExpertWeights

MODES = get_args(QuantizationMode)
IMPLEMENTATIONS = ("eager", "grouped_mm")
FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "gpt_oss")
EXPERTS, TOP_K, NUM_TOKENS, VOCABULARY = 6, 2, 7, 67
SEED = 20


def tiny_config(model_type: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": VOCABULARY,
        "num_experts": EXPERTS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return AutoConfig.for_model(model_type, **sizes | changes)


def tiny_model(
    model_type: str,
    implementation: str = "grouped_mm",
    dtype: torch.dtype = torch.bfloat16,
    **changes: Any,
) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    print(f"seed {SEED}")
    model = AutoModelForCausalLM.from_config(
        tiny_config(model_type, **changes),
        dtype=dtype,
        experts_implementation=implementation,
        attn_implementation="eager",
    )
    return model.requires_grad_(False)


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    return {
        path: module
        for path, module in model.named_modules()
        if is_quantized(module) or expert_weights(module)
    }


def quantized_and_dense(model: Any, mode: Any, **settings: Any) -> tuple[Any, Any]:
    """The model with quantised experts, and a dense one whose experts have the dequantised weights."""
    quantized, dense = copy.deepcopy(model), model
    for path, experts in experts_of(dense).items():
        replaced = quantize_experts(experts, mode=mode, compute_dtype=model.dtype, **settings)
        quantized.set_submodule(path, replaced)
        for name in expert_weights(experts):
            getattr(experts, name).data = dequantized_weight(replaced, name)
    return quantized, dense


def tiny_experts(
    family: str = "qwen3_moe",
    dtype: torch.dtype = torch.bfloat16,
    hidden_size: int = 32,
    intermediate_size: int = 48,
    implementation: str = "grouped_mm",
) -> Any:
    """One dense module of experts."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
    model = tiny_model(family, implementation, dtype, moe_intermediate_size=intermediate_size, **sizes)
    return next(iter(experts_of(model).values()))


def routed(hit: tuple[int, ...] = tuple(range(EXPERTS))) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, and for each two of the experts `hit` with their weights."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(NUM_TOKENS, 32, generator=generator).bfloat16()
    index = torch.tensor([[hit[i % len(hit)], hit[(i + 1) % len(hit)]] for i in range(NUM_TOKENS)])
    return x, index, torch.rand(NUM_TOKENS, TOP_K, generator=generator).bfloat16()


def output(experts: nn.Module) -> tuple[Tensor, Tensor]:
    """For hidden states in bfloat16, and its gradient to them."""
    x, index, routing = routed()
    y = experts(x.requires_grad_(), index, routing)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    return y.detach(), x.grad


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.uint8)


def logits_and_gradient(model: Any, checkpointed: bool = False) -> tuple[Tensor, Tensor]:
    """Of two rows of tokens, and the gradient of the loss at the embeddings' output."""
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.randint(0, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(SEED))
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten()).backward()
    return logits.detach(), embedded.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_dequantised_experts(
    family: str, mode: Any, implementation: str, checkpointed: bool, dtype: torch.dtype
) -> None:
    quantized, dense = quantized_and_dense(tiny_model(family, implementation, dtype), mode)
    assert len(experts_of(quantized)) == 2
    logits, gradient = logits_and_gradient(quantized.train(), checkpointed)
    expected_logits, expected_gradient = logits_and_gradient(dense.train(), checkpointed)
    assert torch.equal(logits, expected_logits)
    assert torch.equal(gradient, expected_gradient)
    assert gradient.abs().max() > 0


def packed_elsewhere(weight: Tensor, mode: str, double_quantization: bool) -> Tensor:
    """One expert's weight, quantised and dequantised as the weight of a linear layer."""
    # In one row: on CPUs bitsandbytes 0.50.2 mixes up the scales of 4-bit rows that end within a block.
    rows, columns = weight.shape if mode == "int8" else (1, weight.numel())
    linear = nn.Linear(columns, rows, bias=False, dtype=weight.dtype)
    linear.weight.data = weight.reshape(rows, columns)
    settings = {"double_quantization": double_quantization, "compute_dtype": weight.dtype}
    return dequantized_weight(quantize_linear(linear, mode=mode, **settings)).view(weight.shape)


# The second size fills neither blocks of weights nor, within an expert, blocks of scales.
@pytest.mark.parametrize("sizes", [(32, 48), (20, 38)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quantization", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_each_expert_is_quantised_by_itself(
    family: str, mode: Any, double_quantization: bool, dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    experts = tiny_experts(family, dtype, *sizes)
    # So different that any scale they shared would show.
    experts.down_proj.data *= torch.logspace(-3, 3, EXPERTS, dtype=dtype).view(-1, 1, 1)
    settings = {"double_quantization": double_quantization, "compute_dtype": dtype}
    quantized = quantize_experts(experts, mode=mode, **settings)
    for name in expert_weights(experts):
        weights = getattr(experts, name)
        found = dequantized_weight(quantized, name)
        assert found.shape == weights.shape
        for index, weight in enumerate(weights):
            assert torch.equal(found[index], packed_elsewhere(weight, mode, double_quantization)), index
            alone = quantized.dequantize(name, getattr(quantized, name), index)
            assert torch.equal(alone, found[index])


@pytest.mark.parametrize("mode", MODES)
def test_large_weights_are_dequantised_in_parts(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = quantize_experts(tiny_experts(), mode=mode)
    whole = dequantized_weight(quantized, "gate_up_proj")
    # Room for four experts of six.
    monkeypatch.setattr(experts_module, "MAX_WEIGHTS_AT_ONCE", 4 * whole[0].numel() + 1)
    assert torch.equal(dequantized_weight(quantized, "gate_up_proj"), whole)


class TestOneModule:
    """What the module is to torch and to whoever shards, copies and moves it."""

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    @pytest.mark.parametrize("mode", MODES)
    def test_the_graph_holds_no_dequantised_weight(self, mode: Any, implementation: str) -> None:
        experts = tiny_experts(implementation=implementation)
        quantized, saved = quantize_experts(experts, mode=mode).train(), []
        keep_weights_of_recompute(quantized)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            output(quantized)[0]
        packed = {getattr(quantized, name).data_ptr() for name in quantized.shapes}
        assert packed < {tensor.data_ptr() for tensor in saved}
        largest_activation = NUM_TOKENS * TOP_K * 2 * 48
        others = [tensor for tensor in saved if tensor.data_ptr() not in packed]
        assert (
            max(tensor.numel() for tensor in others) <= largest_activation < experts.gate_up_proj[0].numel()
        )

    @pytest.mark.parametrize("mode", MODES)
    def test_eager_dequantises_what_is_hit_one_at_a_time(
        self, mode: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        quantized = quantize_experts(tiny_experts(implementation="eager"), mode=mode)
        asked: list[tuple[str, int | None]] = []
        alive: list[StorageWeakRef] = []
        dequantize = QuantizedExperts.dequantize

        def watched(self: Any, name: str, packed: Tensor, expert: int | None = None) -> Tensor:
            asked.append((name, expert))
            assert all(reference.expired() for reference in alive)
            weight = dequantize(self, name, packed, expert)
            alive[:] = [StorageWeakRef(weight.untyped_storage())]
            return weight

        monkeypatch.setattr(QuantizedExperts, "dequantize", watched)
        x, index, routing = routed(hit=(1, 4))
        y = quantized(x.requires_grad_(), index, routing)
        forward = [(name, expert) for expert in (1, 4) for name in ("gate_up_proj", "down_proj")]
        assert asked == forward
        y.sum().backward()
        assert sorted(asked[4:]) == sorted(forward)

    @pytest.mark.parametrize("mode", MODES)
    def test_single_tokens_of_a_generation_are_multiplied_in_batches(self, mode: Any) -> None:
        # What transformers' `generate` takes on GPUs for all but the prompt.
        grouped, batched = tiny_experts(), tiny_experts(implementation="batched_mm")
        quantized = quantize_experts(batched, mode=mode)
        with torch.no_grad():
            for name in quantized.shapes:
                getattr(batched, name).data = dequantized_weight(quantized, name)
            assert torch.equal(quantized(*routed()), batched(*routed()))
        assert expert_weights(grouped) == tuple(quantized.shapes)

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    @pytest.mark.parametrize("mode", MODES)
    def test_an_evaluation_changes_neither_gradients_nor_weights(
        self, mode: Any, implementation: str
    ) -> None:
        quantized = quantize_experts(tiny_experts(implementation=implementation), mode=mode).train()
        before = {name: bytes_of(tensor).clone() for name, tensor in tensors_of(quantized).items()}
        expected = output(quantized)
        quantized.eval()
        with torch.inference_mode():
            evaluated = quantized(*routed())
        found = output(quantized.train())
        assert torch.equal(evaluated, expected[0])
        assert all(map(torch.equal, found, expected))
        for name, tensor in tensors_of(quantized).items():
            assert torch.equal(bytes_of(tensor), before[name]), name

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    @pytest.mark.parametrize("mode", MODES)
    def test_weights_may_be_emptied_between_forward_and_backward(
        self, mode: Any, implementation: str
    ) -> None:
        quantized = quantize_experts(tiny_experts(implementation=implementation), mode=mode)
        expected = output(quantized)
        full = {name: getattr(quantized, name).data for name in quantized.shapes}

        def fill(empty: bool) -> None:
            # As ZeRO 3: the parameters have their data during passes only.
            for name, data in full.items():
                getattr(quantized, name).data = data.new_empty(0) if empty else data.clone()

        fill(empty=False)
        x, index, routing = routed()
        x.requires_grad_()
        y = quantized(x, index, routing)
        fill(empty=True)
        fill(empty=False)
        y.backward(torch.ones_like(y))
        assert torch.equal(y, expected[0])
        assert torch.equal(x.grad, expected[1])

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
    @pytest.mark.parametrize("mode", MODES)
    def test_copies_are_independent_and_equal(self, mode: Any, copied: Callable[[Any], Any]) -> None:
        quantized = quantize_experts(tiny_experts("gpt_oss"), mode=mode)
        expected = output(quantized)
        other = copied(quantized)
        with torch.no_grad():
            for tensor in tensors_of(quantized).values():
                tensor.zero_()
        assert all(map(torch.equal, output(other), expected))

    @pytest.mark.parametrize("cast", [nn.Module.float, nn.Module.half, nn.Module.double])
    @pytest.mark.parametrize("mode", MODES)
    def test_casting_leaves_every_bit(self, mode: Any, cast: Callable[[Any], Any]) -> None:
        quantized = quantize_experts(tiny_experts("gpt_oss"), mode=mode)
        expected = output(quantized)
        dtypes = {name: tensor.dtype for name, tensor in tensors_of(quantized).items()}
        cast(nn.Sequential(quantized))
        assert {name: tensor.dtype for name, tensor in tensors_of(quantized).items()} == dtypes
        assert all(map(torch.equal, output(quantized), expected))

    @pytest.mark.parametrize("mode", MODES)
    def test_moving_takes_the_scales_along(self, mode: Any) -> None:
        moved = nn.Sequential(quantize_experts(tiny_experts("gpt_oss"), mode=mode)).to("meta")[0]
        assert {tensor.device.type for tensor in tensors_of(moved).values()} == {"meta"}

    @pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
    @pytest.mark.parametrize("mode", MODES)
    def test_storage_does_not_show_in_any_number(self, mode: Any, storage: torch.dtype) -> None:
        experts = tiny_experts()
        quantized = quantize_experts(experts, mode=mode)
        other = quantize_experts(experts, mode=mode, quant_storage=storage)
        assert {p.dtype for p in quantized.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in other.parameters()} == {storage}
        assert all(map(torch.equal, output(other), output(quantized)))

    @pytest.mark.parametrize("mode", MODES)
    def test_it_keeps_names_and_says_how_it_is_stored(self, mode: Any) -> None:
        experts = tiny_experts("gpt_oss")
        quantized = quantize_experts(experts, mode=mode, double_quantization=False)
        assert dict(quantized.named_parameters()).keys() == dict(experts.named_parameters()).keys()
        assert not any(parameter.requires_grad for parameter in quantized.parameters())
        assert is_quantized(quantized)
        assert not is_quantized(experts)
        assert stored_as(experts) == {"quantization": "none"}
        nested = {} if mode == "int8" else {"double_quantization": False}
        assert stored_as(quantized) == {"quantization": mode, **nested}
        assert mode in repr(quantized)
        assert torch.equal(dequantized_weight(experts, "down_proj"), experts.down_proj)
        assert torch.equal(quantized.down_proj_bias, experts.down_proj_bias)

    def test_tensors_are_read_once_and_one_at_a_time(self) -> None:
        experts, alive, names = tiny_experts(), [], []
        with torch.device("meta"):
            empty = type(experts)(experts.config)

        def read(name: str, shape: torch.Size) -> Tensor:
            assert all(reference.expired() for reference in alive)
            tensor = getattr(experts, name).detach().clone()
            assert tensor.shape == shape
            names.append(name)
            alive.append(StorageWeakRef(tensor.untyped_storage()))
            return tensor

        quantized = quantize_experts(empty, read, mode="nf4")
        assert names == ["gate_up_proj", "down_proj"]
        assert all(map(torch.equal, output(quantized), output(quantize_experts(experts, mode="nf4"))))

    def test_other_operations_are_refused(self) -> None:
        quantized = quantize_experts(tiny_experts(), mode="nf4")
        weights = ExpertWeights(quantized, "down_proj", quantized.down_proj)
        with pytest.raises(ModelError, match=r"applies bmm to .*set_experts_implementation"):
            torch.bmm(torch.ones(1, 1, 1), weights)


def test_layouts_that_are_not_known_are_refused_without_weights() -> None:
    from transformers import AutoModelForCausalLM, Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    with torch.device("meta"):
        known = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"))
        unknown = nn.Module()
        unknown.num_experts, unknown.w1 = EXPERTS, nn.Parameter(torch.empty(EXPERTS, 8, 8))
        spread = nn.Module()
        spread.scale = nn.Parameter(torch.empty(1, 1, 8))
        of_a_family = Llama4TextExperts(Llama4TextConfig(hidden_size=8, intermediate_size=8))
    assert len(experts_of(known)) == 2
    for module in (spread, nn.Conv1d(8, 8, 4, groups=4), nn.Linear(2, 2)):
        assert expert_weights(module) == ()
    with pytest.raises(ModelError, match=r"Llama4TextExperts holds weights \(gate_up_proj \[16, 8, 16\]"):
        expert_weights(of_a_family)
    with pytest.raises(ModelError, match=r'w1 \[6, 8, 8\].* set the mode to "none"'):
        expert_weights(unknown)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_load_balancing_loss_stays_out_of_our_loss(family: str) -> None:
    model = tiny_model(family)
    tokens = torch.randint(1, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(SEED))
    loss = CausalLMLoss(model, chunk_size=5)(Batch.of(tokens, input_ids=tokens))
    model.config.output_router_logits = True
    assert torch.equal(CausalLMLoss(model, chunk_size=5)(Batch.of(tokens, input_ids=tokens)), loss)
