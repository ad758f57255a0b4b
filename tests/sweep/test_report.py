"""The report as a whole: what is read and written, the same bytes each time, and bad input."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ssmlora_dist.errors import CheckpointError, DataError
from ssmlora_dist.sweep.report import read_sweep, write_report
from ssmlora_dist.sweep.rows import PointResult
from tests.sweep.results import full_sweep, lost, result, write_rows

ROOT = Path(__file__).parents[2]
SEED = 17
PLOTS = [
    "keys_by_length.png",
    "validation_exact_match_after_by_length.png",
    "keys_heat_map.png",
    "tokens_per_second_by_length.png",
    "peak_memory_gib_by_length.png",
    "validation_exact_match_after_by_parameters.png",
    "keys_by_parameters.png",
    "efficiency.png",
]


def sweep_directory(directory: Path, *, shuffled: bool = False) -> Path:
    rows = full_sweep()
    if shuffled:
        print(f"seed {SEED}")
        random.Random(SEED).shuffle(rows)
    directory.mkdir(parents=True)
    (directory / "sweep.json").write_text(json.dumps({"name": "trial", "baseline": "lora", "grid": {}}))
    write_rows(directory / "points.jsonl", rows)
    return directory


def content(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_what_is_written(tmp_path: Path) -> None:
    sweep = sweep_directory(tmp_path / "trial")
    report = sweep / "report"
    written = write_report(sweep)
    assert written == [
        report / "report.html",
        report / "report.md",
        *(report / "plots" / name for name in PLOTS),
    ]
    assert sorted(content(report)) == sorted(path.relative_to(report).as_posix() for path in written)
    text = (report / "report.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        "Not counted",
        "Losses and scores",
        "Speed and memory",
        "Differences to the baseline",
        "Scores by length",
        "Scores by depth and length",
        "Speed and memory by length",
        "Parameters and scores",
        "Efficiency by topology",
        "All points",
    ]
    assert "- 24 points: 21 finished, 3 out of memory." in text
    assert all((report / place).is_file() for place in re.findall(r"\]\((plots/.*?)\)", text))


def test_the_same_bytes_again_in_any_order_and_any_process(tmp_path: Path) -> None:
    first = sweep_directory(tmp_path / "one" / "trial")
    second = sweep_directory(tmp_path / "two" / "trial", shuffled=True)
    write_report(first)
    expected = content(first / "report")
    write_report(first)
    assert content(first / "report") == expected
    command = [sys.executable, "launch/report.py", "--sweep", str(second), "--out", str(tmp_path / "out")]
    # Another order of sets, another matplotlib start.
    environment = os.environ | {"PYTHONHASHSEED": "3", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "out" / name) for name in ("report.html", "report.md")]
    assert content(tmp_path / "out") == expected


def test_nothing_of_the_machine_or_the_day(tmp_path: Path) -> None:
    sweep = sweep_directory(tmp_path / "trial")
    write_report(sweep)
    everything = b"".join(content(sweep / "report").values())
    assert str(tmp_path).encode() not in everything
    assert b"Software" not in everything
    assert b"matplotlib" not in everything.lower()


def test_rows_made_elsewhere(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "elsewhere.jsonl", [result("lora", 0, {"final_loss": 2.0}), "{", lost("b")])
    page, text = write_report(path)
    assert page.parent == tmp_path / "report"
    assert "Sweep elsewhere" in page.read_text()
    notes = text.read_text()
    assert "- Broken rows, which are no points: 1; what is wrong" in notes
    assert "| broken row | no JSON" in notes
    assert "| line 2 |" in notes
    assert "- No baseline is named" in notes
    assert "Differences" not in notes


def test_no_rows_yet(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "points.jsonl", ["", ""])
    with pytest.raises(DataError, match=r"points\.jsonl: holds no rows; run the sweep, or name a file"):
        write_report(path)


def test_only_broken_rows(tmp_path: Path) -> None:
    text = write_report(write_rows(tmp_path / "points.jsonl", ["{"]))[1].read_text()
    assert "- 0 points." in text
    assert text.count("| line 1 |") == 2


def test_plots_that_are_no_more_are_removed_and_nothing_else(tmp_path: Path) -> None:
    sweep = sweep_directory(tmp_path / "trial")
    write_report(sweep)
    plots = sweep / "report" / "plots"
    (plots / "mine.png").write_text("")
    write_rows(sweep / "points.jsonl", [result("lora", 0, {"peak_memory_gib": 1.0}, {"data.max_length": 8})])
    write_report(sweep)
    assert sorted(path.name for path in plots.iterdir()) == ["mine.png", "peak_memory_gib_by_length.png"]


def test_repeated_seeds_are_said(tmp_path: Path) -> None:
    rows = [result("lora", 0, {"final_loss": loss}, name=f"run {loss}") for loss in (2.0, 3.0)]
    text = write_report(write_rows(tmp_path / "points.jsonl", rows))[1].read_text()
    assert "- Points that repeat group, setting and seed of another: 1; those of a seed count once" in text


@pytest.mark.parametrize(
    "row",
    [
        result("lora", 0, overrides={"model.path": "a\ud800"}),
        result("\u200b\x00" * 500, 0, {f"task/{'x' * 300}": 0.5, "num_trainable_parameters": 5.0}),
        result("lora", 0, {"final_loss": 1e200, "tokens_per_second": 1.7e308}, {"data.max_length": 10**400}),
        result("lora", 0, {"task/keys/0": 0.5, "tokens_per_second": -5.0}, {"data.max_length": 0}),
    ],
)
def test_rows_that_are_odd(row: PointResult, tmp_path: Path) -> None:
    others = [result("b", seed, row.metrics, {"model.path": "b" + "1" * 5000}) for seed in (1, 2)]
    page, text = write_report(write_rows(tmp_path / "points.jsonl", [row, *others]))[:2]
    assert "- 3 points: 3 finished." in text.read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8").endswith("</html>\n")


def test_only_failures(tmp_path: Path) -> None:
    write_rows(tmp_path / "points.jsonl", [lost("lora", seed) for seed in (0, 1)])
    text = write_report(tmp_path, baseline="lora")[1].read_text()
    assert text.count("CUDA out of memory") == 4, "of both points, where they are named and among all"


def test_the_baseline_named_wins(tmp_path: Path) -> None:
    sweep = sweep_directory(tmp_path / "trial")
    assert read_sweep(sweep).baseline == "lora"
    assert read_sweep(sweep, "ssmlora").baseline == "ssmlora"
    with pytest.raises(
        DataError, match=r"--baseline ssmlor: no point is of this group \(nearest: ssmlora\); there are: lora"
    ):
        read_sweep(sweep, "ssmlor")


def test_a_planned_baseline_without_points(tmp_path: Path) -> None:
    sweep = sweep_directory(tmp_path / "trial")
    (sweep / "sweep.json").write_text(json.dumps({"name": "trial", "baseline": "full"}))
    text = write_report(sweep)[1].read_text()
    assert "- No point is of the baseline, full." in text
    assert "full has no point of this setting" in text


@pytest.mark.parametrize("broken", ["{", "[]", '{"name": 7}', '{"name": "a", "baseline": []}', "\udcff"])
def test_a_broken_sweep_file(broken: str, tmp_path: Path) -> None:
    sweep = sweep_directory(tmp_path / "trial")
    (sweep / "sweep.json").write_text(broken, errors="surrogateescape")
    with pytest.raises(DataError, match=r"sweep.json: no sweep file .*; mend it, or report on points.jsonl"):
        write_report(sweep)
    assert len(read_sweep(sweep / "points.jsonl").points) == 24


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    sweep = sweep_directory(tmp_path / "trial")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written: .* choose another --out"):
        write_report(sweep, tmp_path / "file" / "report")


def test_no_sweep_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"points\.jsonl: cannot be read"):
        write_report(tmp_path)
