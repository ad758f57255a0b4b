"""What may change when a run is continued."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.config.resume import RULES, leaves, markdown_table, resume_problems, rule_of
from ssmlora_dist.config.schema import RunConfig

from .conftest import Change, changed


def problems(then: list[Change], now: list[Change]) -> list[str]:
    saved = RunConfig.model_validate(changed(*then)).model_dump(mode="json", by_alias=True)
    return resume_problems(saved, RunConfig.model_validate(changed(*now)))


def test_every_field_has_its_row_and_every_row_its_fields() -> None:
    used = {rule_of(field).fields for field in leaves()}
    assert used == {rule.fields for rule in RULES}
    assert len(used) == len(RULES)


def test_a_field_that_no_row_speaks_of_is_noticed() -> None:
    for field in ("training.new", "model.new", "new.field", "data.new"):
        with pytest.raises(StopIteration):
            rule_of(field)


def test_the_nearest_row_speaks() -> None:
    assert rule_of("data.train.task.lengths").fields == "data.train.*"
    assert rule_of("training.betas").fields == "training.betas"
    assert rule_of("deepspeed").fields == "deepspeed"


FREE: list[Change] = [
    ("$schema", "./schema.json"),
    ("run.name", "another"),
    ("run.output_dir", "elsewhere"),
    ("model.tokenizer", "org/model"),
    ("model.attention", "eager"),
    ("training.max_steps", 200),
    ("training.micro_batch_size", 1),
    ("training.learning_rate", 1e-3),
    ("training.weight_decay", 0.1),
    ("training.lora_b_learning_rate_ratio", 16),
    ("training.state_learning_rate_ratio", 0.5),
    ("training.schedule", "linear"),
    ("training.warmup_steps", 5),
    ("training.max_grad_norm", None),
    ("training.gradient_checkpointing", False),
    ("training.layers_per_checkpoint", 4),
    ("training.offload_checkpoints", True),
    ("training.compile", True),
    ("training.mlp_tile_size", 64),
    ("training.loss_chunk_size", 64),
    ("training.max_nonfinite_steps", 1),
    ("parallel", {"zero_stage": 3, "offload_parameters": True, "timeout_seconds": 60}),
    ("parallel", {"pipeline_stages": 2, "stage_boundaries": [0, 1]}),
    ("checkpoint", {"every_steps": 3, "keep": 1, "keep_best": False, "grace_seconds": 5}),
    ("evaluation", {"every_steps": 3, "num_examples": 1, "micro_batch_size": 2}),
    ("tracking", {"tracker": "none", "every_steps": 9}),
    ("data.validation", {"format": "text", "path": "a.txt"}),
    ("data.validation", None),
    ("deepspeed", {"wall_clock_breakdown": True}),
]
FIXED: list[tuple[str, Any, str]] = [
    ("run.seed", 1, "1 given, 0 in the checkpoint"),
    ("model.config", {"model_type": "llama", "hidden_size": 8}, '"hidden_size": 8'),
    ("model.compute_dtype", "float32", '"float32" given, "bfloat16" in the checkpoint'),
    ("quantization.mode", "int8", '"int8" given, "nf4" in the checkpoint'),
    ("quantization.double_quantization", False, "false given, true in the checkpoint"),
    ("adapter.layers", "0:2", '"0:2" given, null in the checkpoint'),
    ("adapter.rslora", True, "true given, false in the checkpoint"),
    ("adapter.rank", 4, "4 given, 8 in the checkpoint"),
    ("adapter.alternate", ["k_proj"], '["k_proj"] given, ["q_proj", "v_proj"] in the checkpoint'),
    ("adapter.dropout", 0.5, "0.5 given, 0.0 in the checkpoint"),
    ("data.train.task.lengths", [256], "[256] given, [512] in the checkpoint"),
    ("data.max_length", 4096, "4096 given, 2048 in the checkpoint"),
    ("data.too_long", "refuse", '"refuse" given, "drop" in the checkpoint'),
    ("training.global_batch_size", 16, "16 given, 8 in the checkpoint"),
    ("training.optimizer", "paged_adamw", '"paged_adamw" given, "adamw" in the checkpoint'),
    ("training.betas", [0.9, 0.99], "[0.9, 0.99] given, [0.9, 0.999] in the checkpoint"),
    ("training.epsilon", 1e-6, "1e-06 given, 1e-08 in the checkpoint"),
]


def test_nothing_changed() -> None:
    assert problems([], []) == []


@pytest.mark.parametrize("change", FREE, ids=lambda change: str(change[0]))
def test_what_may_change(change: Change) -> None:
    assert problems([], [change]) == []
    assert problems([change], []) == []


@pytest.mark.parametrize(("field", "value", "values"), FIXED, ids=[field for field, *_ in FIXED])
def test_what_may_not_change(field: str, value: Any, values: str) -> None:
    [line] = problems([], [(field, value)])
    assert line.startswith(f"{field}: ")
    assert values in line
    assert rule_of(field).reason in line
    assert line.endswith("set it back, or begin anew under another run.name")
    [back] = problems([(field, value)], [])
    assert back.startswith(f"{field}: ")


def test_another_rope_is_refused() -> None:
    linear = {"rope_type": "linear", "factor": 4}
    then: list[Change] = [("model.rope_parameters", linear)]
    [line] = problems(then, [("model.rope_parameters", linear | {"factor": 8})])
    assert line.startswith("model.rope_parameters.factor: 8.0 given, 4.0 in the checkpoint;")
    fields = [line.partition(":")[0] for line in problems(then, [])]
    assert fields == ["model.rope_parameters.rope_type", "model.rope_parameters.factor"]


def test_a_moved_model_is_left_to_its_fingerprint() -> None:
    here: list[Change] = [("model", {"path": "here", "revision": "main", "compute_dtype": "bfloat16"})]
    assert problems(here, [("model", {"path": "there", "compute_dtype": "bfloat16"})]) == []
    random = {line.partition(":")[0] for line in problems(here, [])}
    assert random == {"model.init", "model.config"}


def test_all_changes_are_named_at_once() -> None:
    lines = problems([], [("adapter.rank", 4), ("run.seed", 1), ("training.max_steps", 7)])
    assert [line.partition(":")[0] for line in lines] == ["run.seed", "adapter.rank"]


def test_other_data_of_another_format() -> None:
    lines = problems([], [("data.train", {"format": "text", "path": ["a.txt", "b.txt"]})])
    fields = {line.partition(":")[0] for line in lines}
    assert {"data.train.format", "data.train.task.lengths"} <= fields
    # Where the records lie is no matter: they are compared themselves.
    assert "data.train.path" not in fields


def test_defaults_that_are_written_out_are_no_change() -> None:
    assert problems([("data.validation", None)], [("data.validation", None), ("adapter", {"rank": 8})]) == []


def test_a_field_that_an_older_release_did_not_have_had_its_default() -> None:
    config = RunConfig.model_validate(changed())
    saved = config.model_dump(mode="json", by_alias=True)
    del saved["checkpoint"], saved["adapter"]["carry"]
    assert resume_problems(saved, config) == []


def test_a_configuration_that_is_none_of_this_release() -> None:
    config = RunConfig.model_validate(changed())
    saved = config.model_dump(mode="json", by_alias=True) | {"sparsity": {"mode": "2:4"}}
    [line] = resume_problems(saved, config)
    assert line.startswith("sparsity: ")
    assert "continue with the release that wrote it" in line


def test_the_table_has_a_row_per_rule() -> None:
    rows = markdown_table().splitlines()
    assert len(rows) == 2 + len(RULES)
    assert all(row.count("|") == 4 for row in rows)
    command = [sys.executable, "-m", "ssmlora_dist.config.resume"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert printed == markdown_table() + "\n"


def test_the_readme_holds_the_table() -> None:
    readme = Path("README.md").read_text(encoding="utf-8")
    shown = readme.partition("<!-- resume:begin -->\n")[2].partition("<!-- resume:end -->")[0]
    assert shown == markdown_table() + "\n", "run `python -m ssmlora_dist.config.resume` and paste it"


def test_what_places_were_chosen_by_is_no_matter() -> None:
    places = ["0.q_proj", "3.up_proj"]
    probed: list[Change] = [
        (
            "adapter",
            {
                "placement": "probe",
                "probe_parameters": 999,
                "layers": "0:4",
                "alternate": ["k_proj"],
                "every_layer": ["o_proj"],
                "every_layer_method": "ssmlora",
                "places": places,
            },
        )
    ]
    copied: list[Change] = [("adapter", {"places": places})]
    assert problems(probed, copied) == problems(copied, probed) == []
    [line] = problems(probed, [("adapter", {"places": places[:1]})])
    assert line.startswith('adapter.places: ["0.q_proj"] given, ["0.q_proj", "3.up_proj"] in the checkpoint')
    # Where one side has none, the pattern is all that it has.
    for old, new in (([], copied), (copied, [])):
        assert [line.partition(":")[0] for line in problems(old, new)] == ["adapter.places"]
    pattern: list[Change] = [("adapter", {"every_layer": ["o_proj"], "layers": "0:4"})]
    assert {line.partition(":")[0] for line in problems(pattern, copied)} == {
        "adapter.every_layer",
        "adapter.layers",
        "adapter.places",
    }
