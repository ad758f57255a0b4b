"""Loss and scores in chunks against transformers' own loss and against a direct computation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssmlora_dist.batches import IGNORED_LABEL, Batch
from ssmlora_dist.models import load_config
from ssmlora_dist.models.loading import build_skeleton
from ssmlora_dist.models.loss import CausalLMLoss, Scores, checkpoint_layers
from tests.tiny import (
    FAMILY_NAMES,
    VOCAB_SIZE,
    adapted_model,
    layers_of,
    tiny_config,
    tiny_model,
    token_ids,
)

SEED = 17
# Float32: sums of some twenty losses of order 5, and their gradients, in another order.
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5
BATCH, LENGTH = 3, 9


def batch() -> dict[str, Tensor]:
    """Rows with 5, 0 and 8 targets: a prompt before an answer, nothing to learn, everything."""
    input_ids = token_ids(BATCH, LENGTH, SEED)
    labels = input_ids.clone()
    labels[0, :4] = IGNORED_LABEL
    labels[1] = IGNORED_LABEL
    return {"input_ids": input_ids, "labels": labels}


NUM_TARGETS = [5, 0, 8]  # the first token of a row is never predicted


def gradients(total: Tensor, model: Any) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(total, list(trained.values())), strict=True))


def assert_near(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Relative to the largest gradient of all."""
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        error = ((got[name] - gradient).abs().max() / largest).item()
        assert error <= GRADIENT_TOLERANCE, f"{name}: {error:.1e}"


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_the_loss_and_its_gradient_are_those_of_transformers(model_type: str) -> None:
    model = adapted_model(model_type)
    inputs = batch()
    total = CausalLMLoss(model, chunk_size=4)(Batch.of(**inputs))
    expected = model(**inputs, use_cache=False).loss * sum(NUM_TARGETS)
    assert total.dtype == torch.float32
    assert total.shape == ()
    torch.testing.assert_close(total, expected, rtol=LOSS_TOLERANCE, atol=0)
    assert_near(gradients(total, model), gradients(expected, model))


def test_the_cap_of_gemma_2_is_in_the_loss() -> None:
    """With logits as large as these it changes the loss by far more than the tolerance."""
    model = adapted_model("gemma2")
    capped = CausalLMLoss(model, chunk_size=4)(Batch.of(**batch()))
    model.config.final_logit_softcapping = None
    assert (CausalLMLoss(model, chunk_size=4)(Batch.of(**batch())) - capped).abs() > 0.1


def test_the_weight_of_the_head_keeps_its_one_name() -> None:
    model = adapted_model()
    names = {name for name, _ in CausalLMLoss(model, chunk_size=4).named_parameters(remove_duplicate=False)}
    assert names == {f"model.{name}" for name, _ in model.named_parameters()}


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 12, 14, 1000])
def test_the_chunk_size_does_not_show(chunk_size: int) -> None:
    model = adapted_model()
    expected = CausalLMLoss(model, chunk_size=13)(Batch.of(**batch()))  # all targets at once
    total = CausalLMLoss(model, chunk_size)(Batch.of(**batch()))
    torch.testing.assert_close(total, expected, rtol=LOSS_TOLERANCE, atol=0)
    assert_near(gradients(total, model), gradients(expected, model))


def in_training(module: CausalLMLoss, inputs: dict[str, Tensor]) -> Any:
    total = module(Batch.of(**inputs))
    total.backward()
    return total


def in_scoring(module: CausalLMLoss, inputs: dict[str, Tensor]) -> Any:
    return module(Batch.of(scored=inputs["labels"] != IGNORED_LABEL, **inputs))


class Logits(TorchDispatchMode):
    """Rows of every tensor with a column for each word, the head's weight aside; those of products apart."""

    def __init__(self, head: Tensor) -> None:
        super().__init__()
        self.head = head.untyped_storage().data_ptr()
        self.rows: list[int] = []
        self.product_rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._is_logits(output):
            self.rows.append(output.numel() // VOCAB_SIZE)
            if func is torch.ops.aten.mm.default:
                self.product_rows.append(len(output))
        return output

    def _is_logits(self, output: Any) -> bool:
        if not isinstance(output, Tensor) or output.dim() < 2 or output.shape[-1] != VOCAB_SIZE:
            return False
        return output.untyped_storage().data_ptr() != self.head


@pytest.mark.parametrize("run", [in_training, in_scoring])
@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
def test_the_logits_of_a_chunk_are_all_that_exists(
    run: Callable[[CausalLMLoss, dict[str, Tensor]], Any], chunk_size: int
) -> None:
    model = adapted_model()
    with Logits(model.lm_head.weight) as logits:
        run(CausalLMLoss(model, chunk_size), batch())
    assert max(logits.rows) == min(chunk_size, sum(NUM_TARGETS))
    # Supervised tokens alone; in training once more in the backward pass.
    assert sum(logits.product_rows) == sum(NUM_TARGETS) * (2 if run is in_training else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_without_targets_gives_0_with_a_graph(dtype: torch.dtype) -> None:
    """Every rank takes part in the backward pass, whatever its rows hold."""
    model = adapted_model(dtype=dtype)
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED_LABEL)
    inputs["labels"][:, 0] = 5  # nothing comes before it to predict it from
    total = CausalLMLoss(model, chunk_size=4)(Batch.of(**inputs))
    assert total.dtype == torch.float32
    assert total == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(total, model).values())
    scores = CausalLMLoss(model, chunk_size=4)(
        Batch.of(scored=torch.ones_like(inputs["labels"], dtype=torch.bool), **inputs)
    )
    assert scores.loss_sums.tolist() == [0.0, 0.0, 0.0]
    assert scores.num_targets.tolist() == [0, 0, 0]


def greedy_labels(model: Any) -> dict[str, Tensor]:
    """A batch whose targets are mostly what the model predicts: row 0 misses one, row 2 none."""
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED_LABEL)
    with torch.no_grad():
        best = model(input_ids=inputs["input_ids"], use_cache=False).logits.argmax(-1)
    inputs["labels"][0, 5:] = best[0, 4:-1]
    inputs["labels"][2, 1:] = best[2, :-1]
    inputs["labels"][0, 7] = (best[0, 6] + 1) % VOCAB_SIZE
    return inputs


@pytest.mark.parametrize("chunk_size", [1, 3, 1000])
@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_scores_are_those_computed_directly(model_type: str, chunk_size: int) -> None:
    model = adapted_model(model_type)
    inputs = greedy_labels(model)
    labels = inputs["labels"]
    scored = labels != IGNORED_LABEL
    scores = CausalLMLoss(model, chunk_size)(Batch.of(scored=scored, **inputs))
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(
        logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED_LABEL, reduction="none"
    ).sum(1)
    assert isinstance(scores, Scores)
    assert scores.loss_sums.dtype == torch.float32
    assert not scores.loss_sums.requires_grad
    torch.testing.assert_close(scores.loss_sums, losses, rtol=LOSS_TOLERANCE, atol=LOSS_TOLERANCE)
    assert scores.num_targets.tolist() == [4, 0, 8]
    assert scores.exact.tolist() == [False, True, True]
    total = CausalLMLoss(model, chunk_size)(Batch.of(**inputs))
    torch.testing.assert_close(scores.loss_sums.sum(), total, rtol=LOSS_TOLERANCE, atol=0)


def test_only_scored_tokens_count_for_the_exact_match() -> None:
    model = adapted_model()
    inputs = greedy_labels(model)
    everything = inputs["labels"] != IGNORED_LABEL
    without_the_miss = everything.clone()
    without_the_miss[0, 7] = False
    module = CausalLMLoss(model, chunk_size=3)
    whole, partly = (module(Batch.of(scored=scored, **inputs)) for scored in (everything, without_the_miss))
    assert whole.exact.tolist() == [False, True, True]
    assert partly.exact.tolist() == [True, True, True]
    assert torch.equal(whole.loss_sums, partly.loss_sums)
    assert torch.equal(whole.num_targets, partly.num_targets)


def test_layers_are_checkpointed_in_training_only() -> None:
    model = adapted_model()
    checkpoint_layers(model)
    calls = dict.fromkeys(range(len(layers_of(model))), 0)

    def count(layer_idx: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[layer_idx] += 1

        return hook

    for layer_idx, layer in enumerate(layers_of(model)):
        layer.mlp.register_forward_pre_hook(count(layer_idx))
    module = CausalLMLoss(model, chunk_size=4)
    module.eval()(Batch.of(**batch())).backward()
    assert set(calls.values()) == {1}
    module.train()(Batch.of(**batch())).backward()
    assert set(calls.values()) == {1 + 2}


def scaled_forward(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model of a family multiplies its logits by 3 from now on."""
    owner = type(tiny_model(model_type, num_layers=1))
    forward = owner.forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = 3 * output.logits
        return output

    monkeypatch.setattr(owner, "forward", scaled)


def scale_one_forward(model: Any) -> None:
    forward = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits / 3
        return output

    model.forward = scaled


class ScaledLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def scale_the_head(model: Any) -> None:
    model.lm_head.__class__ = ScaledLinear


def hook_the_head(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: output - output.mean(-1, True).exp())


def assert_loss_is_the_models_own(model: Any, module: CausalLMLoss) -> None:
    inputs = batch()
    total = module(Batch.of(**inputs))
    seen = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    logits, targets = model(**seen, use_cache=False).logits[:, :-1], inputs["labels"][:, 1:]
    expected = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED_LABEL, reduction="sum")
    torch.testing.assert_close(total, expected, rtol=LOSS_TOLERANCE, atol=0)
    assert_near(gradients(total, model), gradients(expected, model))
    scores = module(Batch.of(scored=inputs["labels"] != IGNORED_LABEL, **inputs))
    torch.testing.assert_close(scores.loss_sums.sum(), total, rtol=LOSS_TOLERANCE, atol=0)
    assert scores.num_targets.tolist() == NUM_TARGETS


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_a_family_that_does_more_to_its_logits(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = adapted_model(model_type)
    assert not CausalLMLoss(plain, chunk_size=4).uses_own_logits
    scaled_forward(model_type, monkeypatch)
    model = adapted_model(model_type)
    module = CausalLMLoss(model, chunk_size=4)
    assert module.uses_own_logits
    assert_loss_is_the_models_own(model, module)


@pytest.mark.parametrize("change", [scale_one_forward, scale_the_head, hook_the_head])
def test_a_model_that_does_more_to_its_logits(change: Callable[[Any], None]) -> None:
    model = adapted_model()
    change(model)
    module = CausalLMLoss(model, chunk_size=4)
    assert module.uses_own_logits
    assert_loss_is_the_models_own(model, module)


@pytest.mark.parametrize(
    ("model_type", "scale"), [("granite", {"logits_scaling": 4.0}), ("cohere2", {"logit_scale": 0.25})]
)
def test_families_that_scale_their_logits(model_type: str, scale: dict[str, float]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(SEED)
    for changes, uses_own_logits in ((scale, True), (dict.fromkeys(scale, 1.0), False)):
        config = AutoConfig.for_model(**tiny_config(model_type, num_layers=2, layer_types=None, **changes))
        model = AutoModelForCausalLM.from_config(config).eval()
        model.get_input_embeddings().requires_grad_(model.config.tie_word_embeddings)
        module = CausalLMLoss(model, chunk_size=4)
        assert module.uses_own_logits == uses_own_logits
        assert_loss_is_the_models_own(model, module)


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_the_comparison_of_heads_leaves_no_trace(model_type: str) -> None:
    """Neither in random numbers nor in the model, of which it needs no weight."""
    config = load_config(config=tiny_config(model_type))
    model = build_skeleton(config, torch.bfloat16, "eager", torch.device("cpu"))
    modules, random = dict(model.named_modules()), torch.get_rng_state()
    assert not CausalLMLoss(model, chunk_size=4).uses_own_logits
    assert dict(model.named_modules()) == modules
    assert torch.equal(torch.get_rng_state(), random)


def test_own_logits_without_targets() -> None:
    model = adapted_model()
    scale_one_forward(model)
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED_LABEL)
    total = CausalLMLoss(model, chunk_size=4)(Batch.of(**inputs))
    assert total == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(total, model).values())


class Waits(TorchDispatchMode):
    """Operators whose result has a size or value that the host must learn from the device."""

    _NAMES = ("nonzero", "_local_scalar_dense", "masked_select", "unique", "bincount", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        if by_mask or any(name.startswith(waiting) for waiting in self._NAMES):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("run", [in_training, in_scoring])
@pytest.mark.parametrize("lengths", [None, ((4, 5), (9,), (2, 3, 4))], ids=["padded", "packed"])
@pytest.mark.parametrize("is_scaled", [False, True])
def test_nothing_of_a_step_waits_for_the_device(
    run: Callable[[CausalLMLoss, Batch], Any],
    lengths: Any,
    is_scaled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted_model()
    if is_scaled:
        scale_one_forward(model)
    module = CausalLMLoss(model, chunk_size=4).train()
    # Numbers on the host, by which a mask is known to be causal.
    monkeypatch.setattr("ssmlora_dist.models.attention._is_causal", lambda *_: True)
    inputs = batch()
    given = Batch.of(lengths=lengths, position_ids=torch.arange(LENGTH).expand(BATCH, LENGTH), **inputs)
    if run is in_scoring:
        given = replace(given, scored=torch.ones_like(given.targets, dtype=torch.bool))
    with Waits() as waits:
        total = module(given)
        if run is in_training:
            total.backward()
    assert waits.seen == []
