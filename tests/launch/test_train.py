"""`launch/train.py` under its launchers: what a run shows and leaves, and how it ends when it fails."""

from __future__ import annotations

import json
import math
import re
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ssmlora_dist import AdapterConfig
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.config.build import load_trained
from ssmlora_dist.config.loading import load_config

from .processes import DEBUG_TINY, ON_CPU, Finished, finish, launched, train_command

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="the launchers give every rank a GPU of its own, and there is one"
)

NUM_STEPS, GLOBAL_BATCH_SIZE, LENGTH = 4, 4, 224
SHORT = (f"training.max_steps={NUM_STEPS}", f"training.global_batch_size={GLOBAL_BATCH_SIZE}")
# After one step of this size the weights are so large that the next forward pass overflows.
DIVERGING = (
    *("training.learning_rate=1e36", "training.warmup_steps=0", "training.max_nonfinite_steps=2"),
    *("training.max_steps=9", f"training.global_batch_size={GLOBAL_BATCH_SIZE}", "data.validation=null"),
    "evaluation.every_steps=null",
)
# Float32 sums over ranks in another order; see the tests of the topologies for what is seen.
LOSS_TOLERANCE = 5e-6

# The launchers' own lines, before and after those of the ranks, which no script can silence.
LAUNCHER_LINE = re.compile(r"^\[[-\d]+ [:,\d]+\] \[\w+\] \[(real_accelerator|runner|launch)\.py:\d+:\w+\] ")
PROGRESS_LINE = re.compile(r"^training (\d+)/4 \(\d+%\), loss [\d.]+, [\d,]+ tokens/s, [\d:?]+ left$")


def overriding(*overrides: str) -> tuple[str, ...]:
    return ("--config", str(DEBUG_TINY), "--set", *overrides)


@dataclass(frozen=True)
class Runs:
    """What the commands left in their working directory."""

    directory: Path
    finished: dict[str, Finished]

    def path(self, name: str) -> Path:
        return self.directory / "runs" / name

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path(name) / "metrics.jsonl").read_text().splitlines()]

    def summary(self, name: str) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.path(name) / "summary.json").read_text())
        return summary

    def tracked(self, query: str) -> list[tuple[Any, ...]]:
        """Rows of MLflow's store."""
        with sqlite3.connect(self.directory / "runs" / "mlflow.db") as store:
            return store.execute(query).fetchall()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs all commands, some side by side: most of their time they import or wait.

    Of those only one is tracked, and the first one makes MLflow's store, which takes long on a busy machine.
    """
    directory = tmp_path_factory.mktemp("train")
    finished: dict[str, Finished] = {}

    def run_side_by_side(commands: dict[str, list[str]], **variables: str) -> None:
        ended = finish(list(commands.values()), directory, [variables] * len(commands))
        finished.update(zip(commands, ended, strict=True))

    run_side_by_side(
        {"diverging_alone": train_command(*overriding("run.name=diverging_alone", *DIVERGING))}, **ON_CPU
    )
    run_side_by_side(
        {
            "debug_tiny": launched(
                "deepspeed", 2, "--config", str(DEBUG_TINY), "--set", "parallel.zero_stage=3", *SHORT
            ),
            "torchrun": launched(
                "torchrun", 2, *overriding("run.name=torchrun", "tracking.tracker=none", *SHORT)
            ),
        }
    )
    run_side_by_side(
        {
            "diverging": launched(
                "deepspeed", 2, *overriding("run.name=diverging", "parallel.zero_stage=2", *DIVERGING)
            ),
            "refused": launched("deepspeed", 2, *overriding("run.name=refused", "training.max_stps=1")),
        }
    )
    return Runs(directory, finished)


def own_lines(text: str) -> list[str]:
    """What the ranks wrote."""
    return [line for line in text.splitlines() if not LAUNCHER_LINE.match(line)]


def test_a_run_of_two_ranks_ends_well(runs: Runs) -> None:
    finished = runs.finished["debug_tiny"]
    assert finished.exit_code == 0, finished.stderr


def test_progress_is_shown_once_and_nobody_chatters(runs: Runs) -> None:
    lines = own_lines(runs.finished["debug_tiny"].stderr)
    steps = [match[1] for line in lines if (match := PROGRESS_LINE.match(line))]
    assert len(steps) == len(lines), lines
    assert steps == ["1", "2", "3", "4"]


def test_the_end_shows_a_table_and_where_everything_is(runs: Runs) -> None:
    lines = own_lines(runs.finished["debug_tiny"].stdout)
    assert "ranks        2, ZeRO stage 3" in lines
    begin = next(number for number, line in enumerate(lines) if line.lstrip().startswith("length"))
    heading, rule, *table = lines[begin:]
    assert heading.split()[:2] == ["length", "examples"]
    assert set(rule) == {"-"}
    rows, where = [line.split() for line in table[:3]], [line.split() for line in table[4:]]
    evaluation = runs.summary("debug_tiny")["evaluation"]
    assert [row[0] for row in rows] == ["224", "288", "all"]
    for row in rows:
        assert row[1] == str(evaluation["after"][row[0]]["num_examples"])
        assert row[2] == f"{evaluation['before'][row[0]]['loss']:.4f}"
        assert row[3] == f"{evaluation['after'][row[0]]['loss']:.4f}"
    averaged = evaluation["without_states"]["all"]
    assert table[3].split()[:5] == ["states", "averaged", rows[2][1], "-", f"{averaged['loss']:.4f}"]
    assert averaged["loss"] != evaluation["after"]["all"]["loss"]
    assert [line[0] for line in where] == ["run", "adapter", "curves", "try"]
    assert where[0][1:] == ["runs/debug_tiny"]
    assert where[1][1:] == ["runs/debug_tiny/adapter"]
    assert str(runs.directory / "runs" / "mlflow.db") in where[2][-1]


def test_the_summary_has_speed_and_the_memory_of_each_rank(runs: Runs) -> None:
    summary = runs.summary("debug_tiny")
    assert summary["num_steps"] == NUM_STEPS
    assert summary["skipped_steps"] == 0
    # Of prompts within a word of their length, and answers that do not use up their budget.
    assert 0.9 < summary["num_tokens"] / (NUM_STEPS * GLOBAL_BATCH_SIZE * LENGTH) < 1
    assert len(summary["peak_memory_gib"]) == 2
    # On a CPU all of a process, on a GPU the little that the model takes.
    for loaded, peak in zip(summary["loaded_memory_gib"], summary["peak_memory_gib"], strict=True):
        assert 0 < loaded <= peak < 8
    assert summary["tokens_per_second_per_device"] == pytest.approx(summary["tokens_per_second"] / 2)
    # The steps take nearly all of the time between evaluations.
    assert summary["num_tokens"] / summary["training_seconds"] <= summary["tokens_per_second"]
    assert summary["training_seconds"] <= summary["wall_seconds"]
    rows = [row for row in runs.rows("debug_tiny") if "loss" in row]
    assert (summary["first_loss"], summary["last_loss"]) == (rows[0]["loss"], rows[-1]["loss"])
    assert summary["num_trainable_parameters"] == num_trained()
    assert summary["data"]["train"]["num_examples"] == 288
    assert summary["environment"]["packages"]["deepspeed"]


def num_trained() -> int:
    """Of debug_tiny by hand: rank 4, in turn q_proj (32 -> 32) and v_proj (32 -> 16) in six layers."""
    return 3 * (4 * (32 + 32) + 2 * 16) + 3 * (4 * (32 + 16) + 2 * 16)


def test_every_step_and_evaluation_has_its_row(runs: Runs) -> None:
    rows = runs.rows("debug_tiny")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    # Before and after; every sixth step is none of four.
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 4]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
    steps = [row for row in rows if "loss" in row]
    num_tokens = sum(row["tokens_per_second"] * row["step_seconds"] for row in steps)
    assert num_tokens == pytest.approx(runs.summary("debug_tiny")["num_tokens"])
    for row in steps:
        assert row["tokens_per_second_per_device"] == pytest.approx(row["tokens_per_second"] / 2)


def test_the_resolved_configuration_is_kept_and_loads(runs: Runs) -> None:
    kept = load_config(runs.path("debug_tiny") / "config.json", world_size=2)
    assert kept == load_config(DEBUG_TINY, ["parallel.zero_stage=3", *SHORT], world_size=2)
    assert (kept.parallel.zero_stage, kept.training.max_steps) == (3, NUM_STEPS)


def test_the_adapter_loads_on_its_base_model(runs: Runs) -> None:
    directory = runs.path("debug_tiny") / "adapter"
    saved = load_file(directory / "adapter_model.safetensors")
    model, tokenizer = load_trained(directory)
    parameters = adapter_parameters(model)
    assert {f"base_model.model.{name}" for name in parameters} == set(saved)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, saved[f"base_model.model.{name}"])
    assert sum(tensor.numel() for tensor in saved.values()) == num_trained()
    assert model.ssmlora_config == AdapterConfig(rank=4, alpha=8)
    assert tokenizer.vocab_size == 256


def test_mlflow_has_one_run_of_each_tracked_command(runs: Runs) -> None:
    assert sorted(runs.tracked("select name, status from runs")) == [
        ("debug_tiny", "FINISHED"),
        ("diverging", "FAILED"),
        ("diverging_alone", "FAILED"),
    ]


def test_mlflow_has_parameters_curves_and_artifacts(runs: Runs) -> None:
    [(run_id,)] = runs.tracked("select run_uuid from runs where name = 'debug_tiny'")
    parameters = dict(runs.tracked(f"select key, value from params where run_uuid = '{run_id}'"))
    assert parameters["parallel.zero_stage"] == "3"
    assert parameters["training.max_steps"] == str(NUM_STEPS)
    curve = runs.tracked(
        f"select step, value from metrics where run_uuid = '{run_id}' and key = 'loss' order by step"
    )
    assert curve == [(row["step"], row["loss"]) for row in runs.rows("debug_tiny") if "loss" in row]
    artifacts = runs.directory / "runs" / "mlartifacts" / run_id / "artifacts"
    for file in ("adapter/adapter_model.safetensors", "plots/curves.png", "summary.json"):
        assert (artifacts / file).stat().st_size > 0


def test_torchrun_and_zero_0_train_the_same(runs: Runs) -> None:
    finished = runs.finished["torchrun"]
    assert finished.exit_code == 0, finished.stderr
    for row, expected in zip(runs.rows("torchrun"), runs.rows("debug_tiny"), strict=True):
        for key in {"loss", "validation_loss"} & row.keys():
            assert row[key] == pytest.approx(expected[key], abs=LOSS_TOLERANCE)


@pytest.mark.parametrize("name", ["diverging", "diverging_alone"])
def test_training_that_diverges_ends_with_3(runs: Runs, name: str) -> None:
    """One good step, then as many skipped ones as allowed; nothing is called a result."""
    finished = runs.finished[name]
    assert finished.exit_code == 3, finished.stderr
    [error] = [line for line in own_lines(finished.stderr) if line.startswith("error")]
    assert error.startswith("error: step 3: loss or gradients were not finite in 2 steps in a row (loss nan")
    assert "Lower training.learning_rate" in error
    assert error.endswith("; no checkpoint has been saved")
    assert "Traceback" not in finished.stderr
    rows = runs.rows(name)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 2]
    assert [row["loss"] is None for row in rows] == [False, True, True]
    assert not (runs.path(name) / "adapter").exists()
    assert not (runs.path(name) / "summary.json").exists()
    lines = own_lines(finished.stdout)
    assert lines[0].startswith("device")
    assert not [line for line in lines if line.startswith(("length", "run "))]


def test_bad_input_under_the_launcher_ends_with_2_and_one_message(runs: Runs) -> None:
    finished = runs.finished["refused"]
    assert finished.exit_code == 2, finished.stderr
    lines = own_lines(finished.stderr)
    assert lines[0] == f"error: {DEBUG_TINY}: 1 problem"
    assert [line.count("training.max_stps: unknown key") for line in lines[1:]] == [1]
    assert not runs.path("refused").exists()
