from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.errors import ConfigError
from ssmlora_dist.sweep.plan import PlannedPoint, estimate_seconds, plan_sweep, sweep_state_of
from ssmlora_dist.sweep.schema import SCHEMA_PATH, schema_text
from ssmlora_dist.sweep.table import plan_text

from .sweeps import GRID, plan_of, write_sweep

CONFIGS = sorted(path for path in SCHEMA_PATH.parent.glob("*.json") if path.stem != "schema")
ROOT = SCHEMA_PATH.parents[2]


def problems(directory: Path, *, devices: tuple[str, ...] = (), **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        plan_sweep(str(write_sweep(directory, **changes)), devices=devices)
    return caught.value.problems


def named(points: Any) -> list[str]:
    return [point.name for point in points]


def test_a_grid_is_every_combination_with_every_seed_in_the_order_of_the_file(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, seeds=[0, 7])
    assert named(plan.points) == [
        f"{method}_rank-{rank}_seed-{seed}"
        for seed in (0, 7)
        for method in ("ssmlora", "lora")
        for rank in (2, 4)
    ]
    last = plan.points[-1]
    assert last.point.group == "lora_rank-4"
    assert last.point.overrides == {"adapter.method": "lora", "adapter.rank": 4}
    assert (last.config.adapter.method, last.config.adapter.rank, last.config.run.seed) == ("lora", 4, 7)
    assert last.config.run.name == last.name
    assert last.config.run.output_dir == tmp_path / "sweeps" / "sweep" / "runs"
    assert plan_of(tmp_path, seeds=[0, 7]).points == plan.points


def test_a_point_is_run_again_on_a_machine_that_computes_in_another_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(native: str, asked: str) -> PlannedPoint:
        monkeypatch.setattr("ssmlora_dist.sweep.plan.machine_dtype", lambda device_type: native)
        return plan_of(tmp_path, overrides={"model.compute_dtype": asked}).points[0]

    here, there = planned("bfloat16", "auto"), planned("float32", "auto")
    assert [point.config.model.compute_dtype for point in (here, there)] == ["bfloat16", "float32"]
    assert here.digest != there.digest
    assert planned("float32", "bfloat16").digest == here.digest


def test_the_list_stands_beside_the_grid_with_seeds_of_its_own(tmp_path: Path) -> None:
    listed = [{"name": "hot", "overrides": {"training.learning_rate": 1}, "seeds": [3]}, {"name": "plain"}]
    plan = plan_of(tmp_path, grid={"adapter.rank": [2]}, list=listed, seeds=[0, 1])
    assert named(plan.points) == [
        "rank-2_seed-0",
        "rank-2_seed-1",
        "hot_seed-3",
        "plain_seed-0",
        "plain_seed-1",
    ]
    assert plan.points[2].point.group == "hot"
    assert plan.points[2].config.training.learning_rate == 1


def test_what_all_points_share_gives_way_to_what_a_point_sets(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, overrides={"adapter.rank": 16, "training.max_steps": 9}, list=[{"name": "own"}])
    assert [planned.config.adapter.rank for planned in plan.points] == [2, 4, 2, 4, 16]
    assert {planned.config.training.max_steps for planned in plan.points} == {9}
    assert "training.max_steps" not in plan.points[0].point.overrides


def test_points_are_grouped_by_the_axes_named(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, group_by=["method"], baseline="lora")
    assert [planned.point.group for planned in plan.points] == ["ssmlora", "ssmlora", "lora", "lora"]


@pytest.mark.parametrize(
    ("axis", "values", "names"),
    [
        (
            "adapter.alternate",
            [["q_proj"], ["q_proj", "v_proj"]],
            ["alternate-q_proj", "alternate-q_proj-v_proj"],
        ),
        ("training.learning_rate", [0.001, 1e-05], ["learning_rate-0.001", "learning_rate-1e-05"]),
        ("length", {"256": {"data.max_length": 256}, "long": {}}, ["length-256", "long"]),
        ("checkpoint.every_steps", [None, 5], ["every_steps-null", "every_steps-5"]),
    ],
)
def test_names_are_readable_and_fit_for_a_directory(
    tmp_path: Path, axis: str, values: Any, names: list[str]
) -> None:
    plan = plan_of(tmp_path, grid={axis: values})
    assert named(plan.points) == [f"{name}_seed-0" for name in names]


def test_ranks_may_differ_from_point_to_point(tmp_path: Path) -> None:
    grid = {"launcher.ranks": [1, 2], "parallel.pipeline_stages": [1, 2]}
    exclude = [{"launcher.ranks": 1, "parallel.pipeline_stages": 2}]
    plan = plan_of(tmp_path, grid=grid, exclude=exclude)
    assert [(one.point.ranks, one.config.parallel.pipeline_stages) for one in plan.points] == [
        (1, 1),
        (2, 1),
        (2, 2),
    ]
    assert plan.points[1].point.overrides["launcher.ranks"] == 2


def test_combinations_are_left_out_by_axis_and_by_key(tmp_path: Path) -> None:
    exclude = [{"method": "ssmlora", "adapter.rank": 4}, {"adapter.method": "lora", "adapter.rank": 2}]
    assert named(plan_of(tmp_path, exclude=exclude).points) == ["ssmlora_rank-2_seed-0", "lora_rank-4_seed-0"]


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"grid": {}}, ("grid: empty", "add one")),
        ({"grid": {"adapter.rank": []}}, ("grid.adapter.rank: empty", "add one")),
        ({"grid": {"adapter.rnk": [1]}}, ("adapter.rnk: unknown key", "did you mean adapter.rank?")),
        ({"grid": {"adapter.rank": [0, 2]}}, ("adapter.rank: 0 given", "(point rank-0_seed-0)")),
        (
            {"grid": {"a": {"x y": {}, "x-y": {}}}},
            ("x-y_seed-0: the name of two points", "names of their own"),
        ),
        ({"list": [{"name": "one"}, {"name": "One"}]}, ("One_seed-0: the name of two points",)),
        ({"seeds": [1, 1]}, ("ssmlora_rank-2_seed-1: the name of two points", "one of two equal seeds")),
        ({"overrides": {"a=b": 1}}, ('overrides: "a=b" given', "a dotted key")),
        ({"overrides": {"adapter..rank": 1}}, ('overrides: "adapter..rank" given', "a dotted key")),
        (
            {"overrides": {"data.max_length.x": 1}},
            ("data.max_length.x=1: data.max_length is 256", "set it whole: data"),
        ),
        ({"baseline": "lora_rank-22"}, ("baseline: lora_rank-22 given", "did you mean lora_rank-2?")),
        ({"group_by": ["methd"]}, ("group_by: methd given", "did you mean method?")),
        ({"exclude": [{"methd": "lora"}]}, ("exclude.0.methd: no axis", "did you mean method?")),
        ({"exclude": [{"method": "peft"}]}, ("exclude.0:", "no point has these values")),
        ({"exclude": [{"adapter.rank": 2}, {"adapter.rank": 4}]}, ("exclude: leaves no point",)),
        ({"overrides": {"run.seed": 1}}, ("overrides.run.seed: 1 given", "`seeds`")),
        ({"overrides": {"launcher.rank": 1}}, ("overrides.launcher.rank: unknown key", "launcher.ranks")),
        ({"overrides": {"launcher.ranks": 0}}, ("overrides.launcher.ranks: 0 given", ">= 1")),
        (
            {"grid": {**GRID, "rank": {"big": {"adapter": {"rank": 9}}}}},
            ("grid.rank: sets adapter", "grid.adapter.rank sets adapter.rank", "one axis"),
        ),
        ({"launcher": {"ranks": 3}}, ("training.global_batch_size: 4 given", "(all points)")),
        ({"evaluate_tasks": True}, ("evaluate_tasks: true given", "evaluation.tasks is empty")),
        ({"nam": "x"}, ("nam: unknown key", "did you mean name?")),
        ({"launcher": {"rank": 1}}, ("launcher.rank: unknown key", "did you mean ranks?")),
        ({"name": "a b"}, ('name: "a b" given', "allowed:")),
        ({"seeds": []}, ("seeds: [] given", "at least 1")),
        ({"base": "nowhere.json"}, ("base: nowhere.json: no such file", "name an existing file")),
        ({"grid": {"z": {"y" * 200: {}}}}, ("a name of 207 characters",)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_wrong_is_named_and_refused(
    tmp_path: Path, changes: dict[str, Any], fragments: tuple[str, ...]
) -> None:
    found = problems(tmp_path, **changes)
    assert any(all(fragment in line for fragment in fragments) for line in found), found
    assert not (tmp_path / "sweeps").exists()


def test_all_problems_of_all_points_are_shown_at_once_and_each_of_them_once(tmp_path: Path) -> None:
    grid = {"adapter.rank": [0, 2], "training.max_stps": [1]}
    found = problems(tmp_path, grid=grid, seeds=[0, 1, 2, 3, 4])
    assert len(found) == 2
    assert found[0].startswith("adapter.rank: 0 given")
    assert found[0].endswith("and 2 more)")
    assert found[1].startswith("training.max_stps: unknown key")
    assert found[1].endswith("(all points)")


def test_more_ranks_than_devices_are_refused(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, devices=("0", "1"), launcher={"ranks": 4})
    assert found.startswith("launcher.ranks: 4 given; allowed: at most 2")


def test_devices_that_the_launcher_cannot_name_are_refused_for_several_ranks(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, devices=("GPU-1a", "GPU-2b"), launcher={"ranks": 2})
    assert "CUDA_VISIBLE_DEVICES calls a device GPU-1a" in found
    assert len(plan_sweep(str(write_sweep(tmp_path)), devices=("GPU-1a",)).points) == 4


def test_by_default_a_group_is_all_but_the_length(tmp_path: Path) -> None:
    length = {str(long): {"data.max_length": long} for long in (256, 512)}
    grid = {"length": length, **GRID}
    plan = plan_of(tmp_path, grid=grid, baseline="lora_rank-2")
    assert {planned.point.group for planned in plan.points} == {
        f"{method}_rank-{rank}" for method in ("ssmlora", "lora") for rank in (2, 4)
    }
    assert plan.points[0].name == "length-256_ssmlora_rank-2_seed-0"
    alone = plan_of(tmp_path, grid={"data.max_length": [256, 512]})
    assert [planned.point.group for planned in alone.points] == ["max_length-256", "max_length-512"]


def test_a_section_of_a_point_takes_the_place_of_shared_keys_in_it(tmp_path: Path) -> None:
    shared = {"data.train": {"format": "text", "hub": "x"}, "data.train.limit": 5}
    own = {"data.train": {"format": "task", "task": {"task": "passkey", "lengths": [64]}}}
    plan = plan_of(tmp_path, overrides=shared, grid={}, list=[{"name": "own", "overrides": own}])
    assert plan.points[0].config.data.train.limit is None


def digest(directory: Path, **changes: Any) -> str:
    return plan_of(directory, grid={"adapter.rank": [2]}, **changes).points[0].digest


def test_the_digest_changes_with_what_decides_results_alone(tmp_path: Path) -> None:
    tasks = {"evaluation.tasks": [{"task": "passkey"}]}
    before = digest(tmp_path)
    for same in (
        {"name": "other"},
        {"timeout_seconds": 3.0},
        {"overrides": {"checkpoint.keep": 1}},
        {"overrides": {"tracking.experiment": "other"}},
        {"overrides": tasks},
        {"launcher": {"points_at_once": 3}},
    ):
        assert digest(tmp_path, **same) == before, same
    for other in (
        {"overrides": {"training.max_steps": 5}},
        {"seeds": [1]},
        {"launcher": {"ranks": 2}},
        {"overrides": {**tasks, "evaluation.tasks_every_steps": 2}},
    ):
        assert digest(tmp_path, **other) != before, other
    with_tasks = digest(tmp_path, overrides=tasks, evaluate_tasks=True)
    others = digest(
        tmp_path, overrides={"evaluation.tasks": [{"task": "variable_tracking"}]}, evaluate_tasks=True
    )
    assert with_tasks != others
    assert with_tasks.partition("+")[0] == others.partition("+")[0] == before


def test_points_without_an_outcome_of_their_digest_are_to_be_run(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    first, second, third, fourth = plan.points
    recorded = [
        first.row(outcome="finished", wall_seconds=4.0),
        second.row(outcome="out_of_memory"),
        third.row(outcome="stopped", wall_seconds=1.0),
    ]
    changed = PlannedPoint(fourth.point, fourth.config, "another").row(outcome="finished")
    gone = PlannedPoint(fourth.point, fourth.config, "d").row(outcome="failed")
    rows = {row.point: row for row in [*recorded, changed]} | {"gone": gone}
    found = sweep_state_of(plan, rows)
    assert [one.name for one in found.pending] == [third.name, fourth.name]
    assert list(found.rows) == named(plan.points)
    assert [row.outcome for row in found.rows.values()] == ["finished", "out_of_memory", "stopped", "not_run"]
    assert found.replaced == [gone, changed]
    again = sweep_state_of(plan, rows, retry_failed=True)
    assert [one.name for one in again.pending] == [second.name, third.name, fourth.name]


def test_the_time_is_that_of_points_alike(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, group_by=["method"], seeds=[0, 1])
    points = {planned.name: planned for planned in plan.points}
    rows = [
        points["ssmlora_rank-2_seed-0"].row(outcome="finished", wall_seconds=10.0),
        points["ssmlora_rank-4_seed-0"].row(outcome="finished", wall_seconds=20.0),
        points["lora_rank-2_seed-0"].row(outcome="failed", wall_seconds=500.0),
    ]
    recorded = {row.point: row for row in rows}

    def seconds(name: str) -> float | None:
        return estimate_seconds([points[name]], recorded)

    assert seconds("ssmlora_rank-4_seed-1") == 20.0
    assert seconds("lora_rank-4_seed-1") == 15.0
    assert estimate_seconds(plan.points, {}) is None
    text = plan_text(plan, sweep_state_of(plan, recorded), 2)
    # Of what is left, 10 and 20 of ssmlora and three times their mean of lora, on two places.
    assert text.splitlines()[-1] == "8 points, 5 to run, 2 at once; estimated time: 0:38"
    assert "estimated time: unknown" in plan_text(plan, sweep_state_of(plan, {}), 1)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_sweep_in_configs_can_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = plan_sweep(str(path), devices=tuple("01234567"))
    assert plan.sweep.name == path.stem
    assert plan.sweep.schema_ == "./schema.json"
    assert plan.sweep.baseline is not None


def test_the_quick_sweep_has_two_methods_three_lengths_two_seeds_and_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    plan = plan_sweep("configs/sweeps/quick_cpu.json")
    found = {(one.point.group, one.config.data.max_length, one.point.seed) for one in plan.points[:-1]}
    assert found == {
        (method, length, seed)
        for method in ("ssmlora", "lora")
        for length in (224, 288, 352)
        for seed in (0, 1)
    }
    assert plan.points[-1].point.group == "made_to_diverge"


def test_placements_are_compared_at_equal_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    counts = {}
    for planned in plan_sweep("configs/sweeps/placement.json").points:
        adapter = planned.config.adapter
        # Llama-2-7B: 32 layers, and all four projections of attention from 4,096 to 4,096.
        each = 2 * 4096 * adapter.rank
        state = 2 * adapter.rank**2 if adapter.method == "ssmlora" else 0
        in_turn = each + state if adapter.alternate else 0
        counts[planned.point.group] = 32 * (in_turn + each * len(adapter.every_layer))
    assert counts["lora_q_v"] == 4_194_304
    assert all(abs(count / 4_194_304 - 1) < 0.005 for count in counts.values()), counts


def test_the_schema_beside_the_sweeps_is_fresh() -> None:
    text = SCHEMA_PATH.read_text(encoding="utf-8")
    assert text == schema_text(), "run: python -m ssmlora_dist.sweep.schema"


def test_overrides_are_those_of_the_file(tmp_path: Path) -> None:
    grid = {"adapter.alternate": [["q_proj"], ["k_proj"]]}
    row = plan_of(tmp_path, grid=grid).points[0].row()
    assert json.loads(json.dumps(row.overrides)) == {"adapter.alternate": ["q_proj"]}
