from __future__ import annotations

from ssmlora_dist.config.deepspeed_keys import DECIDED_BY, PASSED_ON
from ssmlora_dist.config.problems import field_paths
from ssmlora_dist.config.rules import rule_problems

from .conftest import Load


def test_what_decides_a_deepspeed_key_exists() -> None:
    known = {".".join(map(str, path)) for path in field_paths()}
    named = {name for fields in DECIDED_BY.values() for name in fields.replace(" and ", ", ").split(", ")}
    assert named <= known
    assert not set(DECIDED_BY) & set(PASSED_ON)


def test_native_deepspeed_keys_pass(load: Load) -> None:
    native = {"wall_clock_breakdown": True, "zero_optimization": {"overlap_comm": False}}
    assert load(("deepspeed", native)).deepspeed == native


def test_names_in_templates_may_be_mapped(load: Load) -> None:
    source = {
        "format": "multiple_choice",
        "hub": "google/boolq",
        "fields": {"label": "answer", "context": "passage"},
        "prompt": "{context}\n{question}",
        "choices": [" no", " yes"],
    }
    assert rule_problems(load(("data.train", source))) == []
