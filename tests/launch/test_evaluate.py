"""`launch/evaluate.py`: what it writes and shows, how it goes on after a kill, what it refuses."""

from __future__ import annotations

import json
import random
import re
import signal
import sqlite3
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.evaluation.item_rows import PARTS_DIRECTORY, RESULTS_FILE
from ssmlora_dist.evaluation.statistics import estimate
from ssmlora_dist.tracking import RunDirectory

from .evaluation_cases import (
    BAD,
    CAPITALS,
    CONFIG_FILE,
    DEPTHS,
    EVALUATE_SCRIPT,
    LENGTHS,
    LONG,
    NUM_EXAMPLES,
    NUM_LETTERS_FAILED,
    QUESTIONS,
    prepare,
)
from .evaluation_worker import BEFORE, KILLED
from .processes import ON_CPU, Finished, finish, free_port
from .test_bad_input import assert_refused

BASE, ADAPTER = MODELS = ("base", "adapter")
TASKS = ("passkey", "letters", "capitals")
NUM_ITEMS = len(LENGTHS) * NUM_EXAMPLES + len(QUESTIONS) + len(CAPITALS)
# Of both models together, but for the last two.
MOST_BATCHES = 28
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Evaluations:
    """What the commands left in a directory; `two` are the ranks of one evaluation."""

    directory: Path
    finished: dict[str, Finished]
    two: list[Finished]

    def rows(self, out: str, model: str) -> list[dict[str, Any]]:
        content = (self.directory / out / model / RESULTS_FILE).read_text()
        return [json.loads(line) for line in content.splitlines()]

    def results(self, out: str) -> dict[str, bytes]:
        """The result files by model."""
        return {
            file.parent.name: file.read_bytes() for file in (self.directory / out).glob(f"*/{RESULTS_FILE}")
        }

    def parts(self, out: str) -> dict[str, bytes]:
        """Every rank's own file, by its path."""
        found = self.directory / out
        return {
            str(file.relative_to(found)): file.read_bytes() for file in found.glob(f"*/{PARTS_DIRECTORY}/*")
        }

    def table(self, out: str) -> list[list[str]]:
        """The cells of table.md, its heading first."""
        heading, _, *lines = (self.directory / out / "table.md").read_text().splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in (heading, *lines)]


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> Evaluations:
    """Runs all commands: most over forked processes, one on two ranks in processes of their own."""
    directory, aside = tmp_path_factory.mktemp("evaluate"), tmp_path_factory.mktemp("aside")
    prepare(directory)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    worker = ["-m", "tests.launch.evaluation_worker", str(aside / "results.json")]
    worker += [str(draw.randint(1, MOST_BATCHES)), str(draw.random())]
    tracked = [sys.executable, str(EVALUATE_SCRIPT), "--config", CONFIG_FILE, "--adapter", "first/adapter"]
    tracked += ["--out", "two", "--set", "tracking.tracker=mlflow", "tracking.experiment=evaluations"]
    # So that a rank which is aborted says where it was.
    launch = {
        **ON_CPU,
        "PYTHONFAULTHANDLER": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    ranks = [{**launch, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    told, *two = finish([worker, tracked, tracked], directory, [ON_CPU, *ranks])
    assert told.exit_code == 0, told.stderr
    found = json.loads((aside / "results.json").read_text())
    finished = {
        name: Finished(rank["exit_code"], rank["stdout"], rank["stderr"]) for name, rank in found.items()
    }
    return Evaluations(directory, finished, two)


@pytest.mark.parametrize("name", ["one", "base", "chosen", "all failed", "beside", "resumed", "again", "dry"])
def test_it_ends_well(evaluations: Evaluations, name: str) -> None:
    finished = evaluations.finished[name]
    assert finished.exit_code == 0, finished.stderr
    assert "Traceback" not in finished.stderr


def test_every_item_has_its_row(evaluations: Evaluations) -> None:
    for model in MODELS:
        rows = evaluations.rows("one", model)
        assert Counter(row["task"] for row in rows) == {
            "passkey": len(LENGTHS) * NUM_EXAMPLES,
            "letters": len(QUESTIONS),
            "capitals": len(CAPITALS),
        }
        for row in (row for row in rows if row["task"] == "passkey"):
            assert row["scores"] == {"string_match_all": float(row["references"][0] in row["prediction"])}
            assert row["metadata"]["length"] in LENGTHS
            assert row["metadata"]["depth"] in DEPTHS
        for row, record in zip((row for row in rows if row["task"] == "letters"), QUESTIONS, strict=True):
            if "error" in row:
                continue
            assert row["label"] == record["label"]
            likeliest = row["log_likelihoods"].index(max(row["log_likelihoods"]))
            assert row["prediction"] == likeliest
            assert row["scores"]["acc"] == float(likeliest == record["label"])
        for row, city in zip((r for r in rows if r["task"] == "capitals"), CAPITALS.values(), strict=True):
            assert row["references"] == [city]
            assert set(row["scores"]) == {"exact_match", "f1"}


def test_base_and_adapter_answer_differently_and_each_as_alone(evaluations: Evaluations) -> None:
    one = evaluations.results("one")
    assert set(one) == set(MODELS)
    assert one[BASE] != one[ADAPTER]
    assert evaluations.results("runs/run-evaluation") == {BASE: one[BASE]}
    beside = evaluations.rows("second/evaluation", BASE)
    assert beside == [row for row in evaluations.rows("one", BASE) if row["task"] == "capitals"]


def test_a_run_can_still_be_trained_after_its_base_was_evaluated(evaluations: Evaluations) -> None:
    assert (evaluations.directory / "runs" / "run-evaluation" / "table.md").exists()
    RunDirectory.check_free(evaluations.directory / "runs" / "run")


def test_items_that_cannot_be_used_or_are_too_long_are_reported_and_not_scored(
    evaluations: Evaluations,
) -> None:
    rows = [row for row in evaluations.rows("one", ADAPTER) if "error" in row]
    assert [(row["task"], row["id"]) for row in rows] == [("letters", "24"), ("letters", "25")]
    assert "letters.jsonl:25: field 'label' holds 'true'" in rows[0]["error"]
    assert re.search(
        r"the prompt and its longest choice are \d+ tokens; the model takes 384", rows[1]["error"]
    )
    assert len(LONG) > 384
    assert not any("scores" in row or "prediction" in row for row in rows)
    [line] = [line for line in evaluations.table("one") if line[0] == "letters"]
    assert line[2:4] == [str(len(QUESTIONS) - NUM_LETTERS_FAILED), str(NUM_LETTERS_FAILED)]
    [warning] = [line for line in evaluations.finished["one"].stderr.splitlines() if "warning" in line]
    assert warning.startswith("warning: letters: 2 of 26 items failed and count in no score; the first, 24: ")


def percent(scores: list[float]) -> str:
    found = estimate(scores)
    return f"{100 * sum(scores) / len(scores):.1f}% [{100 * found.lower:.1f}, {100 * found.upper:.1f}]"


def test_the_table_is_what_the_rows_say(evaluations: Evaluations) -> None:
    heading, *lines = evaluations.table("one")
    assert heading == ["task", "length", "items", "failed", "metric", "majority", *MODELS]
    expected = []
    metrics = {"passkey": "string_match_all", "letters": "acc", "capitals": "exact_match"}
    for task, metric in metrics.items():
        for length in (None, *LENGTHS) if task == "passkey" else (None,):
            cells: list[str] = []
            for model in MODELS:
                scored = [
                    row
                    for row in evaluations.rows("one", model)
                    if row["task"] == task
                    and "scores" in row
                    and length in (None, row["metadata"].get("length"))
                ]
                cells.append(percent([row["scores"][metric] for row in scored]))
            answers = Counter(row["label"] if task == "letters" else row["references"][0] for row in scored)
            majority = f"{100 * answers.most_common(1)[0][1] / len(scored):.1f}%"
            failed = str(NUM_LETTERS_FAILED if task == "letters" else 0)
            shown = "all" if length is None else str(length)
            expected.append([task, shown, str(len(scored)), failed, metric, majority, *cells])
    assert lines == expected
    base, adapter = next(line[-2:] for line in lines if line[0] == "letters")
    assert base != adapter, "the columns are told apart"
    assert (evaluations.directory / "one" / "table.md").read_text() in evaluations.finished["one"].stdout


def test_the_summary_has_groups_metrics_and_versions(evaluations: Evaluations) -> None:
    summary = json.loads((evaluations.directory / "one" / "summary.json").read_text())
    assert [task["task"] for task in summary["tasks"]] == list(TASKS)
    passkey = summary["tasks"][0]["models"][ADAPTER]
    # All, by length, by depth, by both.
    assert len(passkey) == 1 + len(LENGTHS) + len(DEPTHS) + len(LENGTHS) * len(DEPTHS)
    assert sum(group["num_items"] for group in passkey[-4:]) == len(LENGTHS) * NUM_EXAMPLES
    assert set(summary["tasks"][1]["models"][BASE][0]["metrics"]) == {"acc", "acc_norm"}
    assert summary["environment"]["packages"]["torch"]


def test_plots_are_drawn_of_tasks_with_lengths(evaluations: Evaluations) -> None:
    plots = evaluations.directory / "one" / "plots"
    names = {"passkey_by_length.png", "passkey_heat_map.png"}
    assert {file.name for file in plots.iterdir()} == names
    assert all((plots / name).read_bytes().startswith(PNG) for name in names)


def test_the_console_shows_facts_table_and_place(evaluations: Evaluations) -> None:
    finished = evaluations.finished["one"]
    header, heading, table = finished.stdout.partition("| task")
    assert header == evaluations.finished["dry"].stdout.replace("../dry", "../one")
    assert heading
    where = table.splitlines()[-1]
    assert where == "../one: summary.json, table.md, plots/ and every item's row"


def test_two_ranks_write_the_files_of_one(evaluations: Evaluations) -> None:
    assert [rank.exit_code for rank in evaluations.two] == [0, 0], evaluations.two
    assert evaluations.results("two") == evaluations.results("one")
    one, two = (evaluations.directory / name for name in ("one", "two"))
    assert (two / "table.md").read_bytes() == (one / "table.md").read_bytes()
    shares = [content.count(b"\n") for name, content in evaluations.parts("two").items() if BASE in name]
    assert len(shares) == 2
    assert min(shares) > NUM_ITEMS / 4, "the ranks share the items"
    assert (evaluations.two[1].stdout, evaluations.two[1].stderr) == ("", ""), "rank 0 speaks alone"


def test_mlflow_has_one_run_with_metrics_and_files(evaluations: Evaluations) -> None:
    runs = evaluations.directory / "runs"
    with sqlite3.connect(runs / "mlflow.db") as store:
        [(run_id, name, status)] = store.execute("select run_uuid, name, status from runs").fetchall()
        metrics = dict(store.execute("select key, value from metrics").fetchall())
        parameters = dict(store.execute("select key, value from params").fetchall())
        experiments = [name for (name,) in store.execute("select name from experiments").fetchall()]
    assert (name, status) == ("run-evaluation", "FINISHED")
    assert "evaluations" in experiments
    lengths = [f"passkey/{length}" for length in LENGTHS]
    names = [f"{model}/{task}" for model in MODELS for task in (*TASKS, *lengths, "letters/num_failed")]
    assert set(metrics) == set(names)
    for model in MODELS:
        rows = [row for row in evaluations.rows("two", model) if row["task"] == "letters" and "scores" in row]
        mean = sum(row["scores"]["acc"] for row in rows) / len(rows)
        assert metrics[f"{model}/letters"] == pytest.approx(mean)
        assert metrics[f"{model}/letters/num_failed"] == NUM_LETTERS_FAILED
    assert parameters["model.compute_dtype"] == "float32"
    kept = runs / "mlartifacts" / run_id / "artifacts" / "evaluation"
    assert {str(file.relative_to(kept)) for file in kept.rglob("*") if file.is_file()} == {
        "summary.json",
        "table.md",
        "plots/passkey_by_length.png",
        "plots/passkey_heat_map.png",
        f"{BASE}/{RESULTS_FILE}",
        f"{ADAPTER}/{RESULTS_FILE}",
    }
    assert (kept / ADAPTER / RESULTS_FILE).read_bytes() == evaluations.results("two")[ADAPTER]


def test_killed_and_started_again_it_writes_the_same_files(evaluations: Evaluations) -> None:
    assert evaluations.finished[KILLED].exit_code == -signal.SIGKILL, evaluations.finished[KILLED].stderr
    assert ADAPTER not in evaluations.results(BEFORE["killed"])
    assert evaluations.results("killed") == evaluations.results("one")
    for name, before in evaluations.parts(BEFORE["killed"]).items():
        kept = before[: before.rfind(b"\n") + 1]
        assert evaluations.parts("killed")[name].startswith(kept), "what was written is kept as it was"
    rows = b"".join(evaluations.parts("killed").values()).splitlines()
    assert len(rows) == 2 * (NUM_ITEMS - NUM_LETTERS_FAILED), "and no item is written twice"


def test_started_again_when_all_is_done_nothing_is_computed(evaluations: Evaluations) -> None:
    finished = evaluations.finished["again"]
    assert finished.stdout == evaluations.finished["one"].stdout
    assert evaluations.parts("one") == evaluations.parts(BEFORE["one"])
    assert evaluations.results("one") == evaluations.results(BEFORE["one"])


@pytest.mark.parametrize("name", ["other adapter", "other scale"])
def test_another_adapter_is_refused_where_one_has_answered(evaluations: Evaluations, name: str) -> None:
    """The second of them has the same weights, and another alpha in its settings."""
    finished = evaluations.finished[name]
    assert finished.exit_code == 2, finished.stderr
    [error] = [line for line in finished.stderr.splitlines() if line.startswith("error")]
    assert "rows of task 'passkey' for another model, adapter or setting" in error
    assert "choose another (--out), or remove it" in error
    assert "Traceback" not in finished.stderr
    assert evaluations.parts("one") == evaluations.parts(BEFORE["one"])


def test_tasks_and_lengths_of_the_command_line(evaluations: Evaluations) -> None:
    assert set(evaluations.results("chosen")) == {ADAPTER}
    rows = evaluations.rows("chosen", ADAPTER)
    # The configured number of examples, of the length named.
    assert [row["id"] for row in rows] == [f"288/{number}" for number in range(NUM_EXAMPLES)]
    heading, overall, by_length = evaluations.table("chosen")
    assert heading[-1] == ADAPTER
    assert [line[:4] for line in (overall, by_length)] == [
        ["passkey", "all", "6", "0"],
        ["passkey", "288", "6", "0"],
    ]


def test_a_task_of_which_every_item_fails_is_no_score_and_no_error(evaluations: Evaluations) -> None:
    """512 tokens are more than the model takes."""
    _, *lines = evaluations.table("failed")
    assert lines == [
        ["passkey", length, "0", str(NUM_EXAMPLES), "string_match_all", "-", "-"] for length in ("all", "512")
    ]
    [warning] = evaluations.finished["all failed"].stderr.splitlines()
    assert warning.startswith(
        "warning: passkey: 6 of 6 items failed and count in no score; the first, 512/0: "
    )
    assert "shorten the item, choose a model that takes more or, where it has a RoPE, set " in warning
    assert evaluations.finished["all failed"].stdout.endswith("table.md and every item's row\n")
    assert not (evaluations.directory / "failed" / "plots").exists()


def test_a_dry_run_counts_the_items_and_leaves_nothing(evaluations: Evaluations) -> None:
    finished = evaluations.finished["dry"]
    device, *lines = finished.stdout.splitlines()
    assert device.startswith("device       cpu, ")
    assert lines[:7] == [
        "ranks        1, each with the whole model",
        "model        random weights (llama)",
        "computes in  float32, attention sdpa",
        "quantised    nf4 of the projections, scales in 8 bits too",
        "adapter      ../first/adapter",
        "passkey: 12 items, 0 that cannot be used",
        "letters: 25 items, 1 that cannot be used",
    ]
    assert "letters.jsonl:25: field 'label' holds 'true'" in lines[7]
    assert lines[8:] == [
        "capitals: 4 items, 0 that cannot be used",
        "writes to    ../dry",
        "recorded     in its own files alone",
    ]
    assert finished.stderr == ""
    assert not (evaluations.directory / "dry").joinpath("base").exists()


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(evaluations: Evaluations, name: str) -> None:
    assert_refused(evaluations.finished[f"bad {name}"], BAD[name].fragments)
    left = {file.name for file in (evaluations.directory / f"bad_{name.replace(' ', '_')}").iterdir()}
    assert left == {"0.stdout", "0.stderr"}
