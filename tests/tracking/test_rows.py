from __future__ import annotations

import json
from pathlib import Path

from ssmlora_dist.tracking.rows import append_row


def test_every_row_is_a_line_with_its_environment(tmp_path: Path) -> None:
    path = tmp_path / "results" / "rows.jsonl"
    append_row(path, {"step_seconds": 1.5})
    append_row(path, {"step_seconds": 2.5})
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["step_seconds"] for row in rows] == [1.5, 2.5]
    assert all(row["environment"]["packages"]["torch"] for row in rows)
    assert all(row["time"].endswith("+00:00") for row in rows)
