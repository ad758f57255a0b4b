"""I13: one adapted model called from several threads computes what it does when called from one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmlora_dist import AdapterConfig
from ssmlora_dist.batches import Batch
from ssmlora_dist.errors import AdapterError
from ssmlora_dist.models.loss import CausalLMLoss, checkpoint_layers
from tests.tiny import adapted_model, dropout_seeds, layers_of, token_ids

NUM_LAYERS = 3
TIMEOUT_SECONDS = 60
# Batches of different shapes, one for each thread.
SHAPES = ((2, 9), (3, 5))
EVERYWHERE = ("k_proj", "v_proj", "gate_proj", "up_proj")
CONFIGS = {
    "lora": AdapterConfig(rank=4, method="lora", alternate=(), every_layer=("q_proj", *EVERYWHERE)),
    "dropped_lora": AdapterConfig(rank=4, method="lora", dropout=0.3, every_layer=("up_proj",)),
    "ssmlora": AdapterConfig(
        rank=4, dropout=0.3, alternate=("q_proj", "down_proj"), every_layer=EVERYWHERE
    ).model_copy(update={"every_layer_method": "ssmlora"}),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
# Dropout is nothing to a model that is not in training.
evaluated = pytest.mark.parametrize("config", [CONFIGS["lora"], CONFIGS["ssmlora"]], ids=["lora", "ssmlora"])
storages = pytest.mark.parametrize("storage", ["none", "nf4"])


def model_of(config: AdapterConfig, storage: str = "none") -> Any:
    return adapted_model(config=config, quantization=storage, num_layers=NUM_LAYERS)


def in_threads(model: Any, work: Callable[[int], Any]) -> list[Any]:
    """`work(0)` and `work(1)`, of which neither enters the MLP of a layer before the other has come to it."""
    barrier = threading.Barrier(2, timeout=TIMEOUT_SECONDS)

    def meet(*_: Any) -> None:
        barrier.wait()

    hooks = [layer.mlp.register_forward_pre_hook(meet) for layer in layers_of(model)]

    def run(index: int) -> Any:
        try:
            return work(index)
        except BaseException:
            # The other need not wait for this one.
            barrier.abort()
            raise

    try:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run, range(2)))
    finally:
        for hook in hooks:
            hook.remove()


def assert_all_equal(got: list[Any], wanted: list[Any]) -> None:
    for index, (some, other) in enumerate(zip(got, wanted, strict=True)):
        different = [i for i, (a, b) in enumerate(zip(some, other, strict=True)) if not torch.equal(a, b)]
        assert different == [], f"thread {index}: results {different}"


def gradients(model: Any, index: int) -> list[Tensor]:
    """The loss of a thread's batch, and its gradients, without touching what the threads share."""
    tokens = token_ids(*SHAPES[index], seed=index)
    seeds = dropout_seeds([10 * index + row for row in range(len(tokens))], tokens.shape[1])
    loss = CausalLMLoss(model, chunk_size=4)(Batch.of(tokens, input_ids=tokens, dropout_seeds=seeds))
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


@storages
@evaluated
@pytest.mark.parametrize("grad", [False, True])
def test_i13_forward_passes(config: AdapterConfig, storage: str, grad: bool) -> None:
    model = model_of(config, storage)

    def logits(index: int) -> tuple[Tensor]:
        with torch.set_grad_enabled(grad):
            return (model(token_ids(*SHAPES[index], seed=index), use_cache=False).logits.detach(),)

    expected = [logits(index) for index in range(2)]
    assert_all_equal(in_threads(model, logits), expected)


@storages
@configs
def test_i13_training_passes(config: AdapterConfig, storage: str) -> None:
    model = model_of(config, storage).train()
    expected = [gradients(model, index) for index in range(2)]
    assert_all_equal(in_threads(model, lambda index: gradients(model, index)), expected)
    # Now each layer runs twice, in both threads.
    checkpoint_layers(model)
    assert_all_equal(in_threads(model, lambda index: gradients(model, index)), expected)


@storages
@evaluated
def test_i13_generation(config: AdapterConfig, storage: str) -> None:
    model = model_of(config, storage)

    def generated(index: int) -> tuple[Tensor]:
        return (model.generate(token_ids(*SHAPES[index]), max_new_tokens=3, do_sample=False),)

    expected = [generated(index) for index in range(2)]
    assert_all_equal(in_threads(model, generated), expected)


@configs
def test_a_recompute_may_run_in_another_thread(config: AdapterConfig) -> None:
    """As it does on CUDA, where autograd has threads of its own."""
    model = model_of(config).train()
    expected = gradients(model, 0)
    checkpoint_layers(model)
    tokens = token_ids(*SHAPES[0], seed=0)
    loss = CausalLMLoss(model, chunk_size=4)(
        Batch.of(tokens, input_ids=tokens, dropout_seeds=dropout_seeds(range(len(tokens)), tokens.shape[1]))
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(torch.autograd.grad, loss, parameters).result()
    assert_all_equal([[loss.detach(), *got]], [expected])


def test_i13_a_loss_is_made_while_another_thread_calls_the_model() -> None:
    """The comparison of heads must not put others into the model that both use."""
    model = model_of(CONFIGS["lora"])
    inputs = token_ids(*SHAPES[0])
    with torch.no_grad():
        expected = model(inputs, use_cache=False).logits
    inside: list[Tensor] = []

    def call_meanwhile(*_: Any) -> None:
        hook.remove()
        inside.append(model(inputs, use_cache=False).logits)

    # The comparison calls the model's forward, whose hooks run in the middle of it.
    hook = model.register_forward_pre_hook(call_meanwhile)
    CausalLMLoss(model, chunk_size=4)
    assert_all_equal([inside], [[expected]])


@evaluated
def test_a_pass_within_a_layer_leaves_the_layer_its_own(config: AdapterConfig) -> None:
    model = model_of(config)
    inputs = token_ids(*SHAPES[0])
    with torch.no_grad():
        expected = model(inputs, use_cache=False).logits
        inside: list[bool] = []

        def run_within(*_: Any) -> None:
            if not inside:
                inside.append(True)
                model(token_ids(*SHAPES[1]), use_cache=False)

        layers_of(model)[1].mlp.register_forward_pre_hook(run_within)
        assert torch.equal(model(inputs, use_cache=False).logits, expected)


@evaluated
def test_replicas_in_threads_are_refused(config: AdapterConfig) -> None:
    """Of `DataParallel`, which makes one for each device at every call: here, the first step of that."""
    with pytest.raises(AdapterError, match=r"DataParallel cannot.*one process for each device"):
        [module._replicate_for_data_parallel() for module in model_of(config).modules()]


@pytest.mark.parametrize("config", [CONFIGS["dropped_lora"], CONFIGS["ssmlora"]], ids=["lora", "ssmlora"])
def test_a_recompute_draws_nothing(config: AdapterConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpointing restores torch's generator, which threads share: what another one draws would show."""
    model = model_of(config).train()
    checkpoint_layers(model)
    tokens = token_ids(*SHAPES[0])
    draws: list[Any] = []

    def draw(*arguments: Any, **settings: Any) -> Tensor:
        draws.append(arguments)
        return randint(*arguments, **settings)

    randint = torch.randint
    monkeypatch.setattr(torch, "randint", draw)
    CausalLMLoss(model, chunk_size=4)(Batch.of(tokens, input_ids=tokens)).backward()
    assert len(draws) == NUM_LAYERS
