"""Stands in for launch/train.py: what a point's processes do is in FAKES, JSON by the point's name.

Every start is a line in `starts` beside the run directories. A step is a tick; it goes on after the last one
that was written, so that steps done twice show in `metrics.jsonl`. `until` names a file of the sweep that it
waits for.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

arguments = sys.argv[1:]
config = json.loads(Path(arguments[arguments.index("--config") + 1]).read_text())
assert arguments[arguments.index("--resume") + 1] == "auto"
name, runs = config["run"]["name"], Path(config["run"]["output_dir"])
fake = json.loads(os.environ["FAKES"]).get(name, {})
told: list[int] = []
signal.signal(signal.SIGTERM, lambda signum, frame: told.append(signum))

with (runs.parent / "starts").open("a") as file:
    threads, devices = os.environ.get("OMP_NUM_THREADS"), os.environ.get("CUDA_VISIBLE_DEVICES")
    file.write(json.dumps({"point": name, "at": time.time(), "threads": threads, "devices": devices}) + "\n")
run = runs / name
run.mkdir(exist_ok=True)
print("hello from", name, flush=True)
if "says" in fake:
    print(fake["says"], file=sys.stderr, flush=True)
if "kills_itself" in fake:
    os.kill(os.getpid(), fake["kills_itself"])
deadline = time.monotonic() + 60
while "until" in fake and not (runs.parent / fake["until"]).exists():
    assert time.monotonic() < deadline
    time.sleep(0.02)
metrics = run / "metrics.jsonl"
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
num_steps = fake.get("steps", 1)
for step in range(done + 1, num_steps + 1):
    with metrics.open("a") as file:
        file.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
    time.sleep(fake.get("step_seconds", 0))
    if told:
        print(
            f"stopped: by SIGTERM after step {step} of {num_steps}; go on with --resume auto", file=sys.stderr
        )
        sys.exit(128 + told[0])
if "exit_code" in fake:
    sys.exit(fake["exit_code"])
score = {"num_examples": 2, "loss": 0.5, "exact_match": 0.25}
summary = {
    "num_steps": num_steps,
    "last_loss": 1 / num_steps + config["run"]["seed"],
    "training_seconds": 3.0,
    "wall_seconds": 0.01,
    "tokens_per_second": 200.0,
    "tokens_per_second_per_device": 100.0,
    "target_tokens_per_second": None,
    "peak_memory_gib": [1.0, 2.0],
    "num_trainable_parameters": 7,
    "evaluation": {"before": None, "after": {"all": score, "64": {**score, "loss": None}}},
}
(run / "summary.json").write_text(json.dumps(summary))
