from __future__ import annotations

import math

import pytest

from ssmlora_dist.distributed.roofline import Ceilings, step_limit
from ssmlora_dist.models import empty_model, load_config, structure_of
from ssmlora_dist.models.shapes import SHAPES

LLAMA_2_7B = structure_of(empty_model(load_config(config=SHAPES["llama2-7b"]))).shape
LINEAR_WEIGHTS = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
ENDLESS = math.inf
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
}


def test_each_part_alone_is_its_count_over_its_ceiling() -> None:
    limit = step_limit(
        LLAMA_2_7B,
        Ceilings(1.0, 2.0, 4.0),
        sequence_length=1024,
        micro_batch_size=2,
        supervised_tokens=100,
        bytes_per_linear_weight=0.5,
    )
    products = 2 * 2048 * (3 * LINEAR_WEIGHTS - 32 * 4096 * 11008) + 6 * 200 * 4096 * 32000
    assert limit.matmul_seconds == pytest.approx(products / 1e12)
    # 2 FLOPs x 2 products x half the positions, forward, again, and 2.5 times backward.
    assert limit.attention_seconds == pytest.approx(4.5 * 32 * 2048 * 2 * 1024 * 4096 / 2e12)
    assert limit.dequantization_seconds == pytest.approx(2 * LINEAR_WEIGHTS * 2.5 / 4e9)
    parts = limit.matmul_seconds + limit.attention_seconds + limit.dequantization_seconds
    assert limit.tokens_per_second == pytest.approx(2048 / parts)


def test_without_checkpointing_no_product_is_repeated() -> None:
    ceilings = Ceilings(1.0, ENDLESS, ENDLESS)
    more = step_limit(LLAMA_2_7B, ceilings, sequence_length=64, supervised_tokens=0)
    less = step_limit(LLAMA_2_7B, ceilings, sequence_length=64, supervised_tokens=0, checkpointing=False)
    last_products = 32 * 4096 * 11008
    assert less.seconds == pytest.approx(
        more.seconds * 2 * LINEAR_WEIGHTS / (3 * LINEAR_WEIGHTS - last_products)
    )
    assert less.dequantization_seconds == 0.0


def test_the_design_s_figure_for_one_h100() -> None:
    """Llama-2-7B, 4,096 tokens, 790 TFLOP/s everywhere and no dequantisation: about 19,000 tokens/s."""
    limit = step_limit(LLAMA_2_7B, Ceilings(790.0, 790.0, ENDLESS), sequence_length=4096)
    assert 17_500 < limit.tokens_per_second < 19_500


def test_of_a_mixture_active_weights_are_multiplied_and_all_dequantised() -> None:
    limit = step_limit(
        structure_of(empty_model(load_config(config=QWEN3_30B_A3B))).shape,
        Ceilings(1.0, 2.0, 4.0),
        sequence_length=1024,
        supervised_tokens=0,
        bytes_per_linear_weight=0.5,
    )
    attention, expert, router = 2 * 2048 * (4096 + 512), 3 * 2048 * 768, 2048 * 128
    assert limit.matmul_seconds == pytest.approx(2 * 1024 * 3 * 48 * (attention + 8 * expert + router) / 1e12)
    # Experts' weights do not live from the recompute to the backward pass.
    dequantized = 48 * (2 * attention + 3 * 128 * expert)
    assert limit.dequantization_seconds == pytest.approx(dequantized * 2.5 / 4e9)
