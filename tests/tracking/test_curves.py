from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

from ssmlora_dist.tracking import plot_curves
from ssmlora_dist.tracking.curves import PANELS

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def height(path: Path) -> int:
    content = path.read_bytes()
    assert content.startswith(PNG_SIGNATURE)
    return int.from_bytes(content[20:24], "big")


def test_a_panel_for_each_quantity_that_the_rows_hold(tmp_path: Path) -> None:
    rows = [
        {"step": step, "loss": 1 / step, "grad_norm": None if step == 3 else 1.0, "learning_rate": 1e-3}
        for step in range(1, 31)
    ]
    evaluations = [{"step": step, "validation_loss": 0.5, "validation_exact_match": 0.1} for step in (10, 20)]
    assert plot_curves(rows[:1], tmp_path / "plots" / "one.png")
    assert plot_curves([*rows, *evaluations, {"note": "no step"}], tmp_path / "plots" / "all.png")
    one_panel = tmp_path / "plots" / "loss.png"
    assert plot_curves(rows, one_panel, panels=PANELS[:1])
    assert height(tmp_path / "plots" / "all.png") == len(PANELS) * height(one_panel)
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"one.png", "all.png", "loss.png"}


def test_nothing_to_draw(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": None}, {"step": 3}]
    assert not plot_curves(rows, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not plot_curves([{"step": 1, "loss": 1.0}], tmp_path / "curves.png")
