"""What `import ssmlora_dist` costs and brings along, each measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

IMPORT_BUDGET_SECONDS = 0.5  # over importing torch: what the project promises
NUM_ROUNDS = 3  # the least of several runs is nearly free of what else the machine was doing


def _run(code: str) -> str:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_brings_no_heavy_library() -> None:
    heavy = ("deepspeed", "mlflow", "datasets")
    loaded = _run(f"import sys, ssmlora_dist; print([name for name in {heavy!r} if name in sys.modules])")
    assert loaded == "[]"


def test_import_touches_no_gpu() -> None:
    assert _run("import ssmlora_dist, torch; print(torch.cuda.is_initialized())") == "False"


def test_import_is_quick() -> None:
    # Of the process, as other tests run beside this one.
    code = (
        "import torch; from time import process_time as now; "
        "begin = now(); import ssmlora_dist; print(now() - begin)"
    )
    seconds = [float(_run(code)) for _ in range(NUM_ROUNDS)]
    assert min(seconds) <= IMPORT_BUDGET_SECONDS, f"seconds over importing torch, each round: {seconds}"
