"""Invariants I6 and I9: what is trained does not depend on ZeRO stage, offload, ranks or micro-batches."""

from __future__ import annotations

import json

import pytest
import torch

from ssmlora_dist.precision import machine_dtype

from .conftest import WORLD_SIZES, Results
from .jobs import (
    DROPOUT,
    DROPPING,
    EVALUATED,
    HALF,
    MICRO_BATCHES,
    PACKED,
    QUANTIZED,
    RATES,
    REFERENCE,
    TIED,
    TOPOLOGIES,
    fits,
)

# Float32 sums over a few hundred tokens in another order: at most 6e-7 in the loss, 2e-7 of the norm and 4e-7
# in the adapters were seen. A mistake of scale (ranks or micro-batches counted twice) is 100,000 times that.
LOSS_TOLERANCE = 5e-6
NORM_TOLERANCE = 5e-6
ADAPTER_TOLERANCE = 1e-5
# In bfloat16 one float32 rounding of an adapter may flip one of its bfloat16 copy, 2^-8 of its value: 5e-5 in
# the loss, 1e-3 of the norm and 5e-4 in the adapters were seen. Four steps move an adapter by 3e-2.
BFLOAT16_LOSS_TOLERANCE = 1e-3
BFLOAT16_NORM_TOLERANCE = 1e-2
BFLOAT16_ADAPTER_TOLERANCE = 5e-3
# float16 has three bits more.
FLOAT16_LOSS_TOLERANCE = BFLOAT16_LOSS_TOLERANCE / 8
FLOAT16_NORM_TOLERANCE = BFLOAT16_NORM_TOLERANCE / 8
FLOAT16_ADAPTER_TOLERANCE = BFLOAT16_ADAPTER_TOLERANCE / 8

RANKS_AND_TOPOLOGIES = [(ranks, job) for ranks in WORLD_SIZES for job in TOPOLOGIES]


def assert_same_training(
    results: Results,
    job: tuple[str, int],
    reference: tuple[str, int],
    loss_tolerance: float = LOSS_TOLERANCE,
    norm_tolerance: float = NORM_TOLERANCE,
    adapter_tolerance: float = ADAPTER_TOLERANCE,
) -> None:
    """Compares losses and norms of every step, and the adapters at the end."""
    rows, expected = results.rows(*job), results.rows(*reference)
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [1, 2, 3, 4]
    for row, wanted in zip(rows, expected, strict=True):
        step = f"step {row['step']}"
        assert abs(row["loss"] - wanted["loss"]) <= loss_tolerance, f"{step}: {row['loss']} {wanted['loss']}"
        error = abs(row["grad_norm"] / wanted["grad_norm"] - 1)
        assert error <= norm_tolerance, f"{step}: gradient norm differs by {error:.1e}"
    adapter, wanted_adapter = results.adapter(*job), results.adapter(*reference)
    assert adapter.keys() == wanted_adapter.keys()
    for name, tensor in adapter.items():
        error = (tensor - wanted_adapter[name]).abs().max().item()
        assert error <= adapter_tolerance, f"{name} differs by {error:.1e}"


@pytest.mark.parametrize(("num_ranks", "job"), RANKS_AND_TOPOLOGIES)
def test_every_topology_trains_the_same(results: Results, num_ranks: int, job: str) -> None:
    assert_same_training(results, (job, num_ranks), (REFERENCE, 1))


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
@pytest.mark.parametrize("job", EVALUATED)
def test_evaluation_in_between_changes_no_bit(results: Results, num_ranks: int, job: str) -> None:
    without = job.removesuffix(", evaluated")
    for row, expected in zip(results.rows(job, num_ranks), results.rows(without, num_ranks), strict=True):
        assert row["loss"] == expected["loss"]
        assert row["grad_norm"] == expected["grad_norm"]
    adapter, expected_adapter = results.adapter(job, num_ranks), results.adapter(without, num_ranks)
    assert all(torch.equal(adapter[name], tensor) for name, tensor in expected_adapter.items())


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
@pytest.mark.parametrize("job", EVALUATED)
def test_every_evaluation_is_logged_and_counts_each_example_once(
    results: Results, num_ranks: int, job: str
) -> None:
    rows = [row for row in results.all_rows(job, num_ranks) if "validation_loss" in row]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    if not job.startswith(DROPOUT):
        reference = [
            row for row in results.all_rows(f"{REFERENCE}, evaluated", 1) if "validation_loss" in row
        ]
        for row, expected in zip(rows, reference, strict=True):
            assert row["validation_loss"] == pytest.approx(expected["validation_loss"], abs=LOSS_TOLERANCE)
        without = [row for row in results.all_rows(job, num_ranks) if "state_worth" in row]
        wanted = [row for row in results.all_rows(f"{REFERENCE}, evaluated", 1) if "state_worth" in row]
        assert [row["step"] for row in without] == [4]
        for key in ("validation_loss_without_states", "state_worth"):
            assert without[0][key] == pytest.approx(wanted[0][key], abs=LOSS_TOLERANCE)
    assert results.summary(job, num_ranks)["evaluation"]["after"]["all"]["num_examples"] == 3


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_dropout_acts(results: Results, num_ranks: int) -> None:
    first, *later = zip(results.rows(DROPOUT, num_ranks), results.rows(REFERENCE, num_ranks), strict=True)
    # `lora_B` is zero in the first step, so that nothing that an adapter does is seen.
    assert first[0]["loss"] == first[1]["loss"]
    assert all(abs(dropped["loss"] - kept["loss"]) > LOSS_TOLERANCE for dropped, kept in later)


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
@pytest.mark.parametrize("job", DROPPING)
def test_a_sample_drops_the_same_on_every_topology(results: Results, num_ranks: int, job: str) -> None:
    assert_same_training(results, (job, num_ranks), (DROPOUT, 1))


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
@pytest.mark.parametrize("job", PACKED)
def test_packed_rows_train_the_same(results: Results, num_ranks: int, job: str) -> None:
    assert_same_training(results, (job, num_ranks), (f"packed, {REFERENCE}", 1))


def test_packed_rows_hold_several_examples_and_little_padding(results: Results) -> None:
    one_by_one, packed = results.summary(DROPOUT, 1), results.summary(f"packed, {REFERENCE}", 1)
    assert packed["num_target_tokens"] > 1.5 * one_by_one["num_target_tokens"]
    assert packed["padding_share"] == one_by_one["padding_share"] == 0, "a micro-batch is one row"
    in_twos = results.summary("packed, micro-batch 2", 1)
    assert 0 < in_twos["padding_share"] < results.summary("dropout, micro-batch 2", 1)["padding_share"]


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
@pytest.mark.parametrize("job", QUANTIZED)
def test_a_quantised_backbone_trains_the_same(results: Results, num_ranks: int, job: str) -> None:
    reference = f"{job.partition(',')[0]}, {REFERENCE}"
    assert_same_training(
        results,
        (job, num_ranks),
        (reference, 1),
        BFLOAT16_LOSS_TOLERANCE,
        BFLOAT16_NORM_TOLERANCE,
        BFLOAT16_ADAPTER_TOLERANCE,
    )


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
@pytest.mark.parametrize("job", HALF)
def test_float16_trains_the_same(results: Results, num_ranks: int, job: str) -> None:
    """With gradients of the scaled loss, on a backbone in float16."""
    reference = (f"float16, {REFERENCE}", 1)
    assert_same_training(
        results,
        (job, num_ranks),
        reference,
        FLOAT16_LOSS_TOLERANCE,
        FLOAT16_NORM_TOLERANCE,
        FLOAT16_ADAPTER_TOLERANCE,
    )
    rows = results.rows(job, num_ranks)
    assert [row["loss_scale"] for row in rows] == [row["loss_scale"] for row in results.rows(*reference)]
    # Norms of an unscaled loss, near those of the float32 backbone.
    for row, wanted in zip(rows, results.rows(f"micro-batch 1, {REFERENCE}", 1), strict=True):
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.05)


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_what_auto_stood_for_is_recorded(results: Results, num_ranks: int) -> None:
    expected = machine_dtype("cpu")
    assert results.summary("auto", num_ranks)["compute_dtype"] == expected
    assert results.config("auto", num_ranks)["model"]["compute_dtype"] == expected
    assert results.base("auto", num_ranks)["compute_dtype"] == expected


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
@pytest.mark.parametrize("job", RATES)
def test_learning_rates_of_their_own_train_the_same(results: Results, num_ranks: int, job: str) -> None:
    assert_same_training(results, (job, num_ranks), (f"rates, {REFERENCE}", 1))
    with_one_rate = results.adapter(REFERENCE, num_ranks)
    for name, tensor in results.adapter(job, num_ranks).items():
        if name.endswith("lora_B.weight"):
            moved, before = tensor.abs().max().item(), with_one_rate[name].abs().max().item()
            assert 2 < moved / before < 6, f"{name}: {moved:.1e} and {before:.1e} at a fourth of the rate"


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
@pytest.mark.parametrize("job", TIED)
def test_tied_weights_train_the_same(results: Results, num_ranks: int, job: str) -> None:
    assert_same_training(results, (job, num_ranks), (f"tied, {REFERENCE}", 1))


@pytest.mark.parametrize(
    ("num_ranks", "job"), [(n, job) for n in WORLD_SIZES for job in MICRO_BATCHES if fits(job, n)]
)
def test_every_cut_of_the_batch_trains_the_same(results: Results, num_ranks: int, job: str) -> None:
    assert_same_training(results, (job, num_ranks), (f"micro-batch 1, {REFERENCE}", 1))


@pytest.mark.parametrize("job", [REFERENCE, *QUANTIZED, f"micro-batch 1, {REFERENCE}"])
def test_all_of_the_adapter_is_trained(results: Results, job: str) -> None:
    """Otherwise equal results would say little."""
    adapter = results.adapter(job, 1)
    first_on_an_axis = ("layers.0.", "layers.1.")
    for name, tensor in adapter.items():
        if name.endswith("state_transition") and any(layer in name for layer in first_on_an_axis):
            assert not tensor.any(), f"{name}: gets zeros, so it has no gradient"
        elif name.endswith("state_input"):
            assert not torch.equal(tensor, 0.1 * torch.eye(len(tensor))), name
        else:
            assert tensor.any(), name
    losses = [row["loss"] for row in results.rows(job, 1)]
    assert len(set(losses)) == len(losses)


def test_rows_of_a_batch_have_different_numbers_of_targets(results: Results) -> None:
    """Otherwise a mean of means would pass for the mean over the global batch."""
    rates = [
        row["target_tokens_per_second"] * row["step_seconds"]
        for row in results.rows(f"micro-batch 1, {REFERENCE}", 1)
    ]
    assert len({round(rate) for rate in rates}) > 1, json.dumps(rates)
