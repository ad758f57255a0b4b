from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.config.problems import field_paths
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.config.topology import (
    RULES,
    gradient_accumulation_steps,
    markdown_table,
    topology_problems,
)
from ssmlora_dist.errors import ConfigError

from .conftest import Change, changed

CPU = {"device_type": "cpu"}
CUDA = {"device_type": "cuda", "flash_attention_installed": True}

# Overrides, where it runs, and the place of the one line about it (None: it may run).
CASES: list[tuple[list[Change], dict[str, Any], str | None]] = [
    ([], CPU, None),
    ([("training.global_batch_size", 24)], {"world_size": 4}, None),
    ([("training.global_batch_size", 24)], {"world_size": 5}, "training.global_batch_size"),
    ([("parallel", {"zero_stage": 0, "offload_optimizer": True})], CPU, "parallel.offload_optimizer"),
    ([("training.compile", True), ("parallel.zero_stage", 2)], CPU, None),
    ([("training.compile", True), ("parallel.zero_stage", 3)], CPU, "training.compile"),
    ([("parallel", {"zero_stage": 1, "offload_optimizer": True})], CPU, None),
    ([("parallel", {"zero_stage": 2, "offload_parameters": True})], CPU, "parallel.offload_parameters"),
    ([("parallel", {"zero_stage": 3, "offload_parameters": True, "offload_optimizer": True})], CPU, None),
    ([("quantization.mode", "int8"), ("parallel.zero_stage", 3)], CPU, None),
    ([("parallel", {"pipeline_stages": 2, "zero_stage": 1})], {"world_size": 4}, None),
    ([("parallel.pipeline_stages", 2)], {"world_size": 3}, "parallel.pipeline_stages"),
    ([("parallel", {"pipeline_stages": 2, "zero_stage": 2})], {"world_size": 2}, "parallel.zero_stage"),
    (
        [("parallel", {"pipeline_stages": 2, "stage_boundaries": [0, 1, 2]})],
        {"world_size": 2},
        "parallel.stage_boundaries",
    ),
    ([("parallel", {"sequence_parallel": 2, "zero_stage": 3})], {"world_size": 4}, None),
    ([("parallel.sequence_parallel", 2)], {"world_size": 3}, "parallel.sequence_parallel"),
    ([("parallel.sequence_parallel", 4), ("training.global_batch_size", 2)], {"world_size": 4}, None),
    (
        [("parallel", {"sequence_parallel": 2, "pipeline_stages": 2})],
        {"world_size": 4},
        "parallel.sequence_parallel",
    ),
    ([("parallel.sequence_parallel", 2), ("data.max_length", 65)], {"world_size": 2}, "data.max_length"),
    ([("adapter.placement", "probe"), ("parallel.zero_stage", 2)], {"world_size": 2}, None),
    ([("adapter.placement", "probe"), ("parallel.zero_stage", 3)], {"world_size": 2}, "adapter.placement"),
    (
        [("adapter.placement", "probe"), ("parallel.pipeline_stages", 2)],
        {"world_size": 2},
        "adapter.placement",
    ),
    (
        [
            ("adapter", {"placement": "probe", "places": ["0.q_proj", "1.q_proj"]}),
            ("parallel.pipeline_stages", 2),
        ],
        {"world_size": 2},
        None,
    ),
    (
        [("parallel.pipeline_stages", 2), ("adapter.state_dtype", "float16")],
        {"world_size": 2},
        "adapter.state_dtype",
    ),
    (
        [("quantization.mode", "nf4"), ("parallel.zero_stage", 3), ("model.compute_dtype", "float32")],
        CPU,
        None,
    ),
    ([("training.optimizer", "adamw_8bit")], CPU, "training.optimizer"),
    ([("training.optimizer", "adamw_8bit")], CUDA, None),
    ([("training.optimizer", "adamw_8bit"), ("parallel.zero_stage", 3)], CUDA, "training.optimizer"),
    ([("training.optimizer", "paged_adamw"), ("parallel.zero_stage", 3)], CUDA, None),
    ([("training.optimizer", "paged_adamw")], {"device_type": None}, None),
    (
        [("training.optimizer", "paged_adamw"), ("parallel", {"zero_stage": 2, "offload_optimizer": True})],
        CUDA,
        "training.optimizer",
    ),
    (
        [("evaluation.tasks_every_steps", 2), ("parallel.pipeline_stages", 2)],
        {"world_size": 2},
        "evaluation.tasks_every_steps",
    ),
    (
        [("evaluation.tasks_every_steps", 2), ("parallel.zero_stage", 3)],
        {},
        "evaluation.tasks_every_steps",
    ),
    ([("evaluation.tasks_every_steps", 2), ("parallel.zero_stage", 2)], {}, None),
    ([("model.attention", "flash_attention_2")], CPU, "model.attention"),
    ([("model.attention", "flash_attention_2")], CUDA, None),
    (
        [("model.attention", "flash_attention_2")],
        {"device_type": "cuda", "flash_attention_installed": False},
        "model.attention",
    ),
    (
        [("model.attention", "flash_attention_2"), ("model.compute_dtype", "float32")],
        CUDA,
        "model.attention",
    ),
    ([("model.attention", "flash_attention_2"), ("model.compute_dtype", "float16")], CUDA, None),
    ([("model.attention", "flash_attention_2"), ("model.compute_dtype", "auto")], CUDA, None),
    (
        [
            ("parallel.pipeline_stages", 2),
            ("adapter.state_dtype", "float16"),
            ("model.compute_dtype", "auto"),
        ],
        {"world_size": 2},
        None,
    ),
]


@pytest.mark.parametrize(("changes", "where", "place"), CASES)
def test_what_may_run_where(changes: list[Change], where: dict[str, Any], place: str | None) -> None:
    config = RunConfig.model_validate(changed(*changes))
    lines = topology_problems(config, **{"world_size": 1, **where})
    assert [line.partition(":")[0] for line in lines] == ([] if place is None else [place])


def test_every_rule_can_be_broken() -> None:
    everything: list[Change] = [
        ("training", {"global_batch_size": 7, "optimizer": "paged_adamw_8bit"}),
        ("model", {"attention": "flash_attention_2", "compute_dtype": "float32"}),
        ("parallel", {"offload_optimizer": True, "offload_parameters": True}),
    ]
    sharded: list[Change] = [("training.optimizer", "adamw_8bit"), ("parallel.zero_stage", 1)]
    pipeline: list[Change] = [
        (
            "parallel",
            {"pipeline_stages": 3, "sequence_parallel": 3, "zero_stage": 2, "stage_boundaries": [0, 1]},
        ),
        ("data.max_length", 65),
        ("adapter", {"state_dtype": "float16", "placement": "probe"}),
        ("evaluation.tasks_every_steps", 2),
        ("training.compile", True),
    ]
    lines = [
        line
        for changes in (everything, pipeline, sharded)
        for line in topology_problems(
            RunConfig.model_validate(changed(*changes)),
            world_size=2,
            device_type="cpu",
            flash_attention_installed=False,
        )
    ]
    for rule in RULES:
        assert any(
            line.startswith(f"{rule.fields[0]}: ") and rule.condition in line and line.endswith(rule.remedy)
            for line in lines
        ), rule.condition


def test_rules_read_fields_that_exist() -> None:
    known = {".".join(map(str, path)) for path in field_paths()}
    assert {field for rule in RULES for field in rule.fields} <= known


@pytest.mark.parametrize(("world_size", "steps"), [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)])
def test_gradient_accumulation_follows(world_size: int, steps: int) -> None:
    config = RunConfig.model_validate(changed(("training.global_batch_size", 24)))
    assert gradient_accumulation_steps(config, world_size) == steps


def test_gradient_accumulation_refuses_what_does_not_divide() -> None:
    config = RunConfig.model_validate(changed(("training.global_batch_size", 24)))
    with pytest.raises(
        ConfigError, match=re.escape("24 given with micro_batch_size 2 and 5 ranks (20 or 30")
    ):
        gradient_accumulation_steps(config, 5)


def test_the_table_has_a_row_per_rule() -> None:
    rows = markdown_table().splitlines()
    assert len(rows) == 2 + len(RULES)
    assert all(row.count("|") == 5 for row in rows)
    command = [sys.executable, "-m", "ssmlora_dist.config.topology"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert printed == markdown_table() + "\n"


def test_the_readme_holds_the_table() -> None:
    readme = Path("README.md").read_text(encoding="utf-8")
    shown = readme.partition("<!-- topology:begin -->\n")[2].partition("<!-- topology:end -->")[0]
    assert shown == markdown_table().strip() + "\n", (
        "run `python -m ssmlora_dist.config.topology` and paste it"
    )
