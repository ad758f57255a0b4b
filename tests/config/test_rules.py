from __future__ import annotations

from typing import Any

import pytest

from ssmlora_dist.config.deepspeed_keys import DECIDED_BY, PASSED_ON
from ssmlora_dist.config.problems import field_paths
from ssmlora_dist.config.rules import rule_problems

from .conftest import Load, Problems


def test_what_decides_a_deepspeed_key_exists() -> None:
    known = {".".join(map(str, path)) for path in field_paths()}
    named = {name for fields in DECIDED_BY.values() for name in fields.replace(" and ", ", ").split(", ")}
    assert named <= known
    assert not set(DECIDED_BY) & set(PASSED_ON)


def test_native_deepspeed_keys_pass(load: Load) -> None:
    native = {"wall_clock_breakdown": True, "zero_optimization": {"overlap_comm": False}}
    assert load(("deepspeed", native)).deepspeed == native


@pytest.mark.parametrize(
    ("adapter", "is_refused"),
    [
        ({}, False),
        ({"alternate": [], "every_layer": ["q_proj"]}, True),
        ({"alternate": [], "every_layer": ["q_proj"], "placement": "probe"}, False),
        ({"method": "lora", "placement": "probe"}, True),
        ({"method": "lora", "places": ["0.q_proj"]}, True),
        ({"places": ["0.q_proj"], "carry": "none"}, False),
        # One vector in the state's place, which is trained.
        ({"method": "constant"}, False),
    ],
)
def test_a_rate_of_the_state_needs_parameters_of_one(
    adapter: dict[str, Any], is_refused: bool, load: Load, problems: Problems
) -> None:
    changes = [("adapter", adapter), ("training.state_learning_rate_ratio", 0.5)]
    if is_refused:
        [line] = problems(*changes)
        assert line.startswith("training.state_learning_rate_ratio: 0.5 given; allowed: only 1 with")
        changes = [("adapter", adapter), ("training.state_learning_rate_ratio", 1.0)]
    load(*changes)


def test_names_in_templates_may_be_mapped(load: Load) -> None:
    source = {
        "format": "multiple_choice",
        "hub": "google/boolq",
        "fields": {"label": "answer", "context": "passage"},
        "prompt": "{context}\n{question}",
        "choices": [" no", " yes"],
    }
    assert rule_problems(load(("data.train", source))) == []
