"""Reports: groups, baselines beside every score, intervals, items that failed, names for a tracker."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.evaluation.items import ChoiceItem, FailedItem, GenerationItem, Task
from ssmlora_dist.evaluation.metrics import choice_accuracy, string_match_all
from ssmlora_dist.evaluation.report import (
    HEADING,
    TaskReport,
    build_reports,
    draw,
    markdown_table,
    metrics_of,
    plain,
)
from ssmlora_dist.evaluation.statistics import Baseline, estimate

LENGTHS, DEPTHS, FAILED = (512, 1024), (0.0, 0.5), "1024/3"
# Answers of the generated task by id: `7` three times of six scored ones, of the shorter three two.
ANSWERS = {
    "512/0": "7",
    "512/1": "7",
    "512/2": "2",
    "512/3": "3",
    "1024/0": "7",
    "1024/1": "5",
    "1024/2": "4",
    FAILED: "4",
}


def generated() -> Task:
    """Eight items of two lengths and two depths."""
    items = [
        GenerationItem(
            id,
            "Q:",
            (answer,),
            4,
            metadata={"length": int(id.split("/")[0]), "depth": DEPTHS[int(id[-1]) % 2]},
        )
        for id, answer in ANSWERS.items()
    ]
    return Task("keys", lambda: iter(items), string_match_all, "string_match_all")


def choices() -> Task:
    """Five items without lengths, one of which cannot be used and one of which is too long."""
    items = [
        *(ChoiceItem(str(i), "Q:", (" no", " yes"), int(i < 2)) for i in range(3)),
        FailedItem("3", "line 4: no label"),
        ChoiceItem("4", "Q:" * 99, (" no", " yes"), 0),
    ]
    return Task("boolq", lambda: iter(items), choice_accuracy, "acc")


def rows_of(task: Task, scores: Mapping[str, float]) -> list[dict[str, Any]]:
    """As the runner writes them; items without a score failed."""
    rows = []
    for item in task.items():
        metadata = {} if isinstance(item, FailedItem) else dict(item.metadata)
        row: dict[str, Any] = {"task": task.name, "id": item.id, "metadata": metadata}
        if item.id in scores:
            row |= {"prediction": 0, "scores": {task.metric: scores[item.id], "other": 1.0}}
        else:
            row |= {"error": "too long"}
        rows.append(row)
    return rows


def scored(*good: str) -> dict[str, float]:
    return {id: float(id in good) for id in ANSWERS if id != FAILED}


BASE_SCORES, ADAPTER_SCORES = scored("512/0"), scored("512/0", "512/1", "512/2", "1024/0", "1024/1")


@pytest.fixture
def reports() -> list[TaskReport]:
    """Base and adapter on both tasks; the adapter failed on one item more."""
    rows = {
        "base": rows_of(generated(), BASE_SCORES) + rows_of(choices(), {"0": 1.0, "1": 0.0, "2": 1.0}),
        "adapter": rows_of(generated(), ADAPTER_SCORES) + rows_of(choices(), {"0": 1.0, "1": 1.0}),
    }
    return build_reports([generated(), choices()], rows)


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def percent(scores: Sequence[float]) -> str:
    found = estimate(scores)
    return f"{100 * found.mean:.1f}% [{100 * found.lower:.1f}, {100 * found.upper:.1f}]"


def test_the_table_has_everything_side_by_side(reports: list[TaskReport]) -> None:
    heading, rule, *lines = cells(markdown_table(reports))
    assert heading == [*HEADING, "base", "adapter"]
    assert all(set(cell) == {"-"} for cell in rule)
    of_512, of_1024 = ([id for id in BASE_SCORES if id.startswith(f"{length}/")] for length in LENGTHS)

    def shown(ids: Sequence[str]) -> list[str]:
        return [percent([scores[id] for id in ids]) for scores in (BASE_SCORES, ADAPTER_SCORES)]

    assert lines == [
        # Of the seven that have a score, three have the answer `7`.
        ["keys", "all", "7", "1", "string_match_all", "42.9%", *shown(list(BASE_SCORES))],
        ["keys", "512", "4", "0", "string_match_all", "50.0%", *shown(of_512)],
        ["keys", "1,024", "3", "1", "string_match_all", "33.3%", *shown(of_1024)],
        # Items that only one model answered are told apart; the majority is `yes` of the three with a score.
        ["boolq", "all", "3/2", "2/3", "acc", "66.7%", percent([1, 0, 1]), percent([1, 1])],
    ]
    widths = {len(line) for line in markdown_table(reports).splitlines()}
    assert len(widths) == 1, "columns are aligned"


def test_groups(reports: list[TaskReport]) -> None:
    keys, boolq = reports
    assert (keys.lengths, boolq.lengths) == ([512, 1024], [])
    cell = keys.summary("adapter", length=1024, depth=0.0)
    assert cell is not None
    assert (cell.num_items, cell.num_failed, cell.metrics["string_match_all"].mean) == (2, 0, 0.5)
    deepest = keys.summary("base", length=1024, depth=0.5)
    assert deepest is not None
    assert (deepest.num_items, deepest.num_failed) == (1, 1)
    assert keys.summary("base", length=2048) is None
    assert {metric for summary in keys.models["base"] for metric in summary.metrics} == {
        "string_match_all",
        "other",
    }


def test_majorities_are_of_the_items_that_have_a_score(reports: list[TaskReport]) -> None:
    keys, boolq = reports
    assert keys.majority == Baseline(pytest.approx(3 / 7), "7")
    assert keys.majority_by_length == {512: Baseline(0.5, "7"), 1024: Baseline(pytest.approx(1 / 3), "7")}
    assert boolq.majority == Baseline(pytest.approx(2 / 3), "yes")
    assert boolq.majority_by_length == {}
    [without] = build_reports([choices()], {"base": rows_of(choices(), {"0": 1.0})}, with_majority=False)
    assert (without.majority, without.majority_by_length) == (None, {})


def test_names_for_a_tracker(reports: list[TaskReport]) -> None:
    assert metrics_of(reports) == pytest.approx(
        {
            "base/keys": 1 / 7,
            "base/keys/512": 1 / 4,
            "base/keys/1024": 0.0,
            "base/keys/num_failed": 1,
            "adapter/keys": 5 / 7,
            "adapter/keys/512": 3 / 4,
            "adapter/keys/1024": 2 / 3,
            "adapter/keys/num_failed": 1,
            "base/boolq": 2 / 3,
            "base/boolq/num_failed": 2,
            "adapter/boolq": 1.0,
            "adapter/boolq/num_failed": 3,
        }
    )


def test_a_task_of_which_every_item_failed(tmp_path: Path) -> None:
    reports = build_reports(
        [generated(), choices()], {"base": rows_of(generated(), {}) + rows_of(choices(), {})}
    )
    _, _, *lines = cells(markdown_table(reports))
    assert lines == [
        ["keys", "all", "0", "8", "string_match_all", "-", "-"],
        ["keys", "512", "0", "4", "string_match_all", "-", "-"],
        ["keys", "1,024", "0", "4", "string_match_all", "-", "-"],
        ["boolq", "all", "0", "5", "acc", "-", "-"],
    ]
    assert metrics_of(reports) == {"base/keys/num_failed": 8, "base/boolq/num_failed": 5}
    assert draw(reports, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_length_of_which_every_item_failed_under_one_model(tmp_path: Path) -> None:
    rows = {
        "base": rows_of(generated(), BASE_SCORES),
        "adapter": rows_of(generated(), {"512/0": 1.0}),
    }
    [report] = build_reports([generated()], rows)
    _, _, overall, short, long = cells(markdown_table([report]))
    assert [line[2:4] for line in (overall, short, long)] == [["7/1", "1/7"], ["4/1", "0/3"], ["3/0", "1/4"]]
    assert long[-1] == "-"
    assert "adapter/keys/1024" not in metrics_of([report])
    assert len(draw([report], tmp_path)) == 2


def test_in_json_types(reports: list[TaskReport]) -> None:
    written = json.loads(json.dumps(plain(reports)))
    assert [report["task"] for report in written] == ["keys", "boolq"]
    keys = written[0]
    assert keys["majority_by_length"]["512"] == {"score": 0.5, "answer": "7"}
    overall, *groups = keys["models"]["adapter"]
    found = estimate(list(ADAPTER_SCORES.values()))
    assert overall == {
        "group": {},
        "num_items": 7,
        "num_failed": 1,
        "metrics": {
            "string_match_all": {"mean": found.mean, "lower": found.lower, "upper": found.upper},
            "other": overall["metrics"]["other"],
        },
    }
    # By length, by depth, and by both.
    assert [sorted(group["group"]) for group in groups] == [
        *[["length"]] * 2,
        *[["depth"]] * 2,
        *[["depth", "length"]] * 4,
    ]


def test_plots_of_tasks_with_lengths_alone(reports: list[TaskReport], tmp_path: Path) -> None:
    written = draw(reports, tmp_path / "plots")
    assert [path.name for path in written] == ["keys_by_length.png", "keys_heat_map.png"]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(p.name for p in written)
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in written)


def test_what_is_drawn_is_what_is_reported(
    reports: list[TaskReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    for name in ("plot_heat_maps", "plot_by_length"):
        monkeypatch.setattr(
            f"ssmlora_dist.evaluation.report.{name}",
            lambda panels, title, path, name=name: drawn.__setitem__(name, panels),
        )
    draw(reports, tmp_path)
    assert drawn["plot_heat_maps"] == {
        "base": {(512, 0.0): 0.5, (512, 0.5): 0.0, (1024, 0.0): 0.0, (1024, 0.5): 0.0},
        "adapter": {(512, 0.0): 1.0, (512, 0.5): 0.5, (1024, 0.0): 0.5, (1024, 0.5): 1.0},
    }
    interval = estimate([1.0, 1.0, 1.0, 0.0])
    assert drawn["plot_by_length"]["adapter"][512] == (0.75, interval.lower, interval.upper)


def test_a_task_without_depths_has_no_heat_map(tmp_path: Path) -> None:
    items = [GenerationItem(str(i), "Q:", ("a",), 4, metadata={"length": 512}) for i in range(3)]
    task = Task("words", lambda: iter(items), string_match_all, "string_match_all")
    reports = build_reports([task], {"base": rows_of(task, {"0": 1.0, "1": 0.5, "2": 0.0})})
    assert [path.name for path in draw(reports, tmp_path)] == ["words_by_length.png"]
    table = markdown_table(reports)
    assert len(re.findall(r"words +\| (?:all|512)", table)) == 2


def test_no_tasks() -> None:
    assert markdown_table([]).splitlines()[0].startswith("| task")
    assert metrics_of([]) == {}
