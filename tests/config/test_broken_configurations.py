"""Every way to get a configuration wrong: exit code 2, and one line that says where and how to mend it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.config.arguments import run_command
from ssmlora_dist.config.loading import load_config
from ssmlora_dist.errors import EXIT_BAD_INPUT

from .conftest import REMOVED, Change, Problems, changed

RECORDS: list[Change] = [("data.train", {"format": "instruction", "hub": "org/set"})]
PRETRAINED: list[Change] = [("model", {"path": "org/model"})]

# Changes to a working configuration, and what one line about them must hold: its place first.
BROKEN: dict[str, tuple[list[Change], tuple[str, ...]]] = {
    # Keys
    "unknown key": (
        [("training.learning_rte", 1e-3)],
        ("training.learning_rte: unknown key", "0.001", "learning_rate?"),
    ),
    "unknown section": ([("modle", {"path": "x"})], ("modle: unknown key", "did you mean model?")),
    "key in the wrong section": (
        [("training.zero_stage", 1)],
        ("training.zero_stage:", "parallel.zero_stage?"),
    ),
    "key at the top": ([("learning_rate", 1)], ("learning_rate: unknown key", "training.learning_rate?")),
    "unknown adapter key": ([("adapter.rnk", 4)], ("adapter.rnk: unknown key", "did you mean adapter.rank?")),
    "unknown nested key": (
        [("data.train.task.lenghts", [512])],
        ("data.train.task.lenghts: unknown key", "data.train.task.lengths?"),
    ),
    "missing section": ([("model", REMOVED)], ("model: missing", 'add "model" at the top level')),
    "missing key": ([("run.name", REMOVED)], ("run.name: missing", 'add "name" to run')),
    # Types
    "quoted number": (
        [("training.max_steps", "8")],
        ("training.max_steps:", '"8" given', "write 8 without quotes"),
    ),
    "quoted truth value": (
        [("training.gradient_checkpointing", "true")],
        ("training.gradient_checkpointing:", "write true without quotes"),
    ),
    "truth value for a number": (
        [("training.micro_batch_size", True)],
        ("training.micro_batch_size: true given", ">= 1"),
    ),
    "truth value for a stage": (
        [("parallel.zero_stage", True)],
        ("parallel.zero_stage: true given", "whole number"),
    ),
    "fraction for a whole number": ([("adapter.rank", 8.0)], ("adapter.rank: 8.0 given", "write 8")),
    "layers that share no checkpoint": (
        [("training.gradient_checkpointing", False), ("training.layers_per_checkpoint", 4)],
        ("training.layers_per_checkpoint: 4 given without training.gradient_checkpointing", "allowed: 1"),
    ),
    "offloaded checkpoints that are not there": (
        [("training.gradient_checkpointing", False), ("training.offload_checkpoints", True)],
        ("training.offload_checkpoints: true given without", "set training.gradient_checkpointing to true"),
    ),
    "no layer to a checkpoint": (
        [("training.layers_per_checkpoint", 0)],
        ("training.layers_per_checkpoint: 0 given", '>= 1 or "auto"', "default is 1"),
    ),
    "neither tiles nor a word for them": (
        [("training.mlp_tile_size", "outo")],
        ('training.mlp_tile_size: "outo" given', '>= 1 or "auto" or null', 'did you mean "auto"?'),
    ),
    "tiles within compiled layers": (
        [("training.compile", True), ("training.mlp_tile_size", 1024)],
        ("training.compile: true given with training.mlp_tile_size 1024", "set one of them to its default"),
    ),
    "compiled for every pack": (
        [("training.compile", True), ("data.packing", True)],
        ("training.compile: true given with data.packing true", "set one of them to false"),
    ),
    "tiles of nothing": ([("training.mlp_tile_size", 0)], ("training.mlp_tile_size: 0 given", ">= 1")),
    "no checkpoint kept": ([("checkpoint.keep", 0)], ("checkpoint.keep: 0 given", ">= 1", "default is 2")),
    "no steps between checkpoints": (
        [("checkpoint.every_steps", 0)],
        ("checkpoint.every_steps: 0 given", ">= 1 or null"),
    ),
    "grace of no time": (
        [("checkpoint.grace_seconds", 0.5)],
        ("checkpoint.grace_seconds: 0.5 given", "whole"),
    ),
    "unknown checkpoint key": (
        [("checkpoint.keep_last", 3)],
        ("checkpoint.keep_last: unknown key", "checkpoint.keep_best?"),
    ),
    "number for text": ([("tracking.uri", 5)], ("tracking.uri: 5 given", 'write it in quotes: "5"')),
    "text for a list": (
        [("adapter.alternate", "q_proj, v_proj")],
        ("adapter.alternate:", 'write a list: ["q_proj", "v_proj"]'),
    ),
    "number in a list of files": (
        [*RECORDS, ("data.train.path", ["a", 5])],
        ("data.train.path.1: 5 given", '"5"'),
    ),
    "list of the wrong size": ([("training.betas", [0.9])], ("training.betas: [0.9] given", "a list of 2")),
    "value for a section": (
        [("quantization", "nf4")],
        ('quantization: "nf4" given', "a section with the keys mode"),
    ),
    "null": (
        [("training.learning_rate", None)],
        ("training.learning_rate: null given", "take the default 0.0002"),
    ),
    # Ranges and names
    "number out of range": (
        [("adapter.rank", 0)],
        ("adapter.rank: 0 given", ">= 1 and <= 1024", "default is 8"),
    ),
    "infinite number": ([("training.learning_rate", 1e999)], ("not JSON", "Infinity")),
    "wrong name": (
        [("training.optimizer", "adam")],
        ('training.optimizer: "adam" given', 'did you mean "adamw"?'),
    ),
    "wrong case": ([("quantization.mode", "NF4")], ('quantization.mode: "NF4" given', 'did you mean "nf4"?')),
    "bad run name": ([("run.name", "my run/1")], ('run.name: "my run/1" given', 'write "my-run-1"')),
    "empty list": ([("data.train.task.lengths", [])], ("data.train.task.lengths:", "at least 1")),
    # Adapter
    "no module": ([("adapter.alternate", [])], ("adapter: names no module", "list projections")),
    "module twice": ([("adapter.every_layer", ["q_proj"])], ("adapter: names q_proj more than once",)),
    "bad expression": (
        [("adapter.every_layer", "(q_proj")],
        ("adapter: `every_layer` is no regular expression", "list names"),
    ),
    # Training
    "a rate for a state that is none": (
        [("training.state_learning_rate_ratio", 0.5), ("adapter.method", "lora")],
        (
            'training.state_learning_rate_ratio: 0.5 given; allowed: only 1 with adapters of the form "lora"',
            "remove it, or set adapter.method",
        ),
    ),
    "no end": ([("training.max_steps", None)], ("training.max_steps:", "exactly one", "num_epochs")),
    "two ends": ([("training.num_epochs", 1)], ("training.max_steps: 100 given beside", "set it to null")),
    "all warm-up": (
        [("training.warmup_steps", 100)],
        ("training.warmup_steps: 100", "fewer", "train longer"),
    ),
    "nothing to evaluate": (
        [("data.validation", None), ("evaluation.every_steps", 5)],
        ("evaluation.every_steps: 5 given", "add data.validation"),
    ),
    # Model
    "no model": ([("model", {})], ("model.path: missing", "directory or hub name")),
    "shapes for a pretrained model": (
        [*PRETRAINED, ("model.config", {"model_type": "llama"})],
        ("model.config:", 'only with model.init "random"'),
    ),
    "no shapes": (
        [("model", {"init": "random", "tokenizer": "bytes"})],
        ("model.config: missing", "model.path"),
    ),
    "shapes twice": ([("model.path", "org/model")], ("model.config:", "exactly one", "remove one")),
    "no tokenizer": ([("model.tokenizer", REMOVED)], ("model.tokenizer: missing", '"bytes"')),
    "no family": ([("model.config", {"hidden_size": 8})], ("model.config.model_type: null given", '"llama"')),
    "no model directory": (
        [("model", {"path": "./nowhere"})],
        ('model.path: "./nowhere" given', "existing directory"),
    ),
    "model is a file": (
        [("model", {"path": __file__})],
        ("model.path:", "is a file", "the one that holds it"),
    ),
    "an unknown RoPE": (
        [("model.rope_parameters", {"rope_type": "yarm", "factor": 4})],
        (
            'model.rope_parameters.rope_type: "yarm" given',
            '"linear", "yarn", "llama3"',
            'did you mean "yarn"?',
        ),
    ),
    "a RoPE without its factor": (
        [("model.rope_parameters", {"rope_type": "yarn"})],
        ("model.rope_parameters.factor: missing",),
    ),
    "a RoPE that remembers": (
        [("model.rope_parameters", {"rope_type": "dynamic", "factor": 4})],
        ('model.rope_parameters.rope_type: "dynamic" given', "before and beside it", 'choose "yarn"'),
    ),
    "a key that no RoPE has": (
        [("model.rope_parameters", {"rope_type": "yarn", "factr": 4, "factor": 4})],
        ("model.rope_parameters.factr: unknown key", "did you mean model.rope_parameters.factor?"),
    ),
    "a RoPE that does not read it": (
        [
            (
                "model.rope_parameters",
                {"rope_type": "llama3", "factor": 4, "beta_fast": 8, "low_freq_factor": 1},
            )
        ],
        (
            'model.rope_parameters: `beta_fast` 8.0 given, which "llama3" does not',
            "`high_freq_factor` is missing",
        ),
    ),
    # Data
    "unknown format": (
        [("data.train.format", "jsonl")],
        ('data.train.format: "jsonl" given', '"instruction"'),
    ),
    "no records": (
        [("data.train", {"format": "text"})],
        ("data.train.path: neither it nor data.train.hub", "name the"),
    ),
    "two places of records": (
        [*RECORDS, ("data.train.path", "a.jsonl")],
        ("data.train.path:", "remove one of them"),
    ),
    "file missing": (
        [("data.validation", {"format": "text", "path": "nowhere.txt"})],
        ("data.validation.path: nowhere.txt", "no such file"),
    ),
    "split without hub": (
        [("data.train", {"format": "text", "path": __file__, "split": "train"})],
        ('data.train.split: "train" given', "name data.train.hub"),
    ),
    "epochs of a stream": (
        [
            ("data.train", {"format": "text", "path": __file__, "streaming": True}),
            ("training.max_steps", None),
            ("training.num_epochs", 2.0),
        ],
        ("training.num_epochs: 2 given", "set training.max_steps instead"),
    ),
    "a stream to evaluate on without end": (
        [("data.validation", {"format": "text", "hub": "org/set", "streaming": True})],
        ("data.validation.limit: missing", "set it, or evaluation.num_examples"),
    ),
    "slice of a stream": (
        [("data.train", {"format": "text", "hub": "org/set", "split": "train[:9]", "streaming": True})],
        ('data.train.split: "train[:9]" given', "set data.train.limit"),
    ),
    "streaming for generated data": (
        [("data.train.streaming", True)],
        ("data.train.streaming: true given", "a task is generated"),
    ),
    "records for generated data": (
        [("data.train.path", "a.jsonl")],
        ("data.train.path:", "a task is generated"),
    ),
    "generated settings for records": (
        [*RECORDS, ("data.train.task", {"task": "passkey"})],
        ("data.train.task:", 'only with format "task"'),
    ),
    "a task to train on that is not named": (
        [("data.train", {"format": "task"})],
        ("data.train.task: missing", '{"task": "passkey"}'),
    ),
    "a task to train on that is unknown": (
        [("data.train.task.task", "niah_multikey2")],
        ('data.train.task.task: "niah_multikey2" given', 'did you mean "niah_multikey_2"?'),
    ),
    "a task to train on that is not generated": (
        [("data.train.task.task", "boolq")],
        ('data.train.task.task: "boolq" given', "train on records"),
    ),
    "a setting that the trained task does not have": (
        [("data.train.task.metrics", ["f1"])],
        ('data.train.task.metrics: ["f1"] given', "takes lengths, background, depths, seed; remove it"),
    ),
    "questions trained and asked": (
        [
            ("data.train.task", {"task": "babilong_qa1", "path": __file__}),
            ("evaluation.tasks", [{"task": "babilong_qa1", "path": __file__}]),
        ],
        ("data.train.task.path:", "as in evaluation.tasks.0", "files of the two splits"),
    ),
    "length over the limit": (
        [("data.max_length", 700)],
        ("data.validation.task.lengths: 1024 given", "set data.max_length to 1024"),
    ),
    "malformed template": (
        [*RECORDS, ("data.train.prompt", "{question")],
        ("data.train.prompt:", "write {name}"),
    ),
    "labels without choices": (
        [*RECORDS, ("data.train.labels", {"no": 0})],
        ("data.train.labels:", "remove it"),
    ),
    "a label for no choice of the training data": (
        [
            *RECORDS,
            ("data.train.format", "multiple_choice"),
            ("data.train.choices", [" a", " b"]),
            ("data.train.labels", {"c": 2}),
        ],
        ("data.train.labels.c: 2 given", "from 0 to 1"),
    ),
    "a list of choices beside templates of them": (
        [
            *RECORDS,
            ("data.train.format", "multiple_choice"),
            ("data.train.choices", [" a", " b"]),
            ("data.train.fields", {"choices": "options"}),
        ],
        ("data.train.fields.choices: neither",),
    ),
    "template of another format": (
        [*RECORDS, ("data.train.choices", ["a", "b"])],
        ("data.train.choices:", "remove it"),
    ),
    "field that nobody uses": (
        [*RECORDS, ("data.train.fields", {"ouput": "reply"})],
        ("data.train.fields.ouput:", 'did you mean "output"?'),
    ),
    # Tasks
    "unknown task": (
        [("evaluation.tasks", [{"task": "niah_singel_1"}])],
        ('evaluation.tasks.0.task: "niah_singel_1" given', 'did you mean "niah_single_1"?'),
    ),
    "unknown task setting": (
        [("evaluation.tasks", [{"task": "passkey", "depth": [0.5]}])],
        ("evaluation.tasks.0.depth: unknown key", "evaluation.tasks.0.depths?"),
    ),
    "setting of another task": (
        [("evaluation.tasks", [{"task": "passkey"}, {"task": "boolq", "depths": [0.5]}])],
        ("evaluation.tasks.1.depths: [0.5] given", 'the task "boolq" takes path, hub', "remove it"),
    ),
    "settings of records for a generated task": (
        [("evaluation.tasks", [{"task": "passkey", "path": "rows.jsonl"}])],
        ('evaluation.tasks.0.path: "rows.jsonl" given', "takes lengths, background, depths"),
    ),
    "two tasks of one name": (
        [("evaluation.tasks", [{"task": "passkey"}, {"task": "passkey", "lengths": [2048]}])],
        ('evaluation.tasks.1.name: "passkey" is the name of evaluation.tasks.0 too', "set name"),
    ),
    "task name that no file can have": (
        [("evaluation.tasks", [{"task": "passkey", "name": "a/b | c"}])],
        ('evaluation.tasks.0.name: "a/b | c" given', 'write "a-b-c"'),
    ),
    "own task without records": (
        [("evaluation.tasks", [{"task": "generation"}])],
        ("evaluation.tasks.0.path: missing", "evaluation.tasks.0.hub; add one"),
    ),
    "own task with two places of records": (
        [("evaluation.tasks", [{"task": "generation", "path": __file__, "hub": "org/set"}])],
        ("evaluation.tasks.0.path:", "allowed: one; remove one"),
    ),
    "split of files for a task": (
        [("evaluation.tasks", [{"task": "boolq", "path": "x.jsonl", "split": "test"}])],
        ('evaluation.tasks.0.split: "test" given beside evaluation.tasks.0.path', "remove it"),
    ),
    "records of a task missing": (
        [("evaluation.tasks", [{"task": "boolq", "path": "nowhere.jsonl"}])],
        ("evaluation.tasks.0.path: nowhere.jsonl: no such file",),
    ),
    "background of a task missing": (
        [("evaluation.tasks", [{"task": "passkey", "background": ["nowhere.txt"]}])],
        ("evaluation.tasks.0.background: nowhere.txt: no such file",),
    ),
    "bAbI file not named": (
        [("evaluation.tasks", [{"task": "babilong_qa1"}])],
        ("evaluation.tasks.0.path: missing", "the bAbI file"),
    ),
    "bAbI file missing": (
        [("evaluation.tasks", [{"task": "babilong_qa1", "path": "nowhere.txt"}])],
        ("evaluation.tasks.0.path: nowhere.txt: no such file", "name the bAbI file"),
    ),
    "two bAbI files": (
        [("evaluation.tasks", [{"task": "babilong_qa1", "path": [__file__, __file__]}])],
        ("evaluation.tasks.0.path:", "one bAbI file"),
    ),
    "one choice": (
        [("evaluation.tasks", [{"task": "multiple_choice", "path": __file__, "choices": [" yes"]}])],
        ('evaluation.tasks.0.choices: [" yes"] given', "at least 2"),
    ),
    "malformed template of a task": (
        [("evaluation.tasks", [{"task": "generation", "path": __file__, "prompt": "{question"}])],
        ("evaluation.tasks.0.prompt:", "write {name}"),
    ),
    "label for no choice": (
        [
            (
                "evaluation.tasks",
                [{"task": "multiple_choice", "path": __file__, "choices": [" a", " b"], "labels": {"c": 2}}],
            )
        ],
        ("evaluation.tasks.0.labels.c: 2 given", "from 0 to 1"),
    ),
    "text for a label's position": (
        [("evaluation.tasks", [{"task": "multiple_choice", "path": __file__, "labels": {"true": "1"}}])],
        ('evaluation.tasks.0.labels.true: "1" given', "write 1 without quotes"),
    ),
    "field of a task that nobody uses": (
        [("evaluation.tasks", [{"task": "generation", "path": __file__, "fields": {"reference": "a"}}])],
        ("evaluation.tasks.0.fields.reference:", "(nearest: references)"),
    ),
    "unknown metric": (
        [("evaluation.tasks", [{"task": "generation", "path": __file__, "metrics": ["rouge"]}])],
        ('evaluation.tasks.0.metrics.0: "rouge" given', 'did you mean "rouge_l"?'),
    ),
    "length too small for any task": (
        [("evaluation.tasks", [{"task": "passkey", "lengths": [16]}])],
        ("evaluation.tasks.0.lengths.0: 16 given", ">= 64"),
    ),
    "steps without tasks": (
        [("evaluation.tasks_every_steps", 5)],
        ("evaluation.tasks_every_steps: 5 given without evaluation.tasks", "add some or remove it"),
    ),
    "tasks on parts of a model": (
        [
            ("evaluation", {"tasks": [{"task": "passkey"}], "tasks_every_steps": 5}),
            ("parallel.zero_stage", 3),
        ],
        ("evaluation.tasks_every_steps: 5 given", "zero_stage 3", "launch/evaluate.py"),
    ),
    # DeepSpeed's own keys
    "decided DeepSpeed key": (
        [("deepspeed.train_batch_size", 8)],
        ("deepspeed.train_batch_size: 8 given", "set training.global_batch_size"),
    ),
    "decided ZeRO key": (
        [("deepspeed.zero_optimization", {"stage": 2})],
        ("deepspeed.zero_optimization.stage: 2 given", "set parallel.zero_stage"),
    ),
    "misspelt decided key": (
        [("deepspeed.gradient_cliping", 1)],
        ("deepspeed.gradient_cliping:", "training.max_grad_norm"),
    ),
    "unknown DeepSpeed key": (
        [("deepspeed.step_per_print", 1)],
        ("deepspeed.step_per_print:", '"steps_per_print"?'),
    ),
    # Topology
    "indivisible batch": (
        [("training.global_batch_size", 7)],
        ("training.global_batch_size: 7 given with micro_batch_size 2 and 1 rank", "6 or 8 would fit"),
    ),
    "offload without ZeRO": (
        [("parallel.offload_optimizer", True)],
        ("parallel.offload_optimizer:", "to 1 or higher"),
    ),
}

BROKEN_FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "trailing comma": ('{\n  "run": {},\n}', (":3:1:", "line 3, column 1: not JSON", "trailing commas")),
    "empty": ("", (":1:1:", "not JSON")),
    "no object": ("[1, 2]", ("[1, 2] given", "one JSON object")),
    "key twice": ('{"run": {"name": "a", "name": "b"}}', ("run.name: given twice", "remove one", '"b"')),
    "not a number": ('{"run": {"seed": NaN}}', ("NaN is not a number",)),
    "half a character": ('{"run": {"name": "\\ud800"}}', ("not valid Unicode", "name")),
}


def exit_code_and_message(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    def main() -> None:
        load_config(path, world_size=1)

    exit_code = run_command(main)
    return exit_code, capsys.readouterr().err


@pytest.mark.parametrize("name", BROKEN)
def test_one_line_names_place_and_remedy(
    name: str, write: Callable[[Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    changes, fragments = BROKEN[name]
    exit_code, message = exit_code_and_message(write(changed(*changes)), capsys)
    assert exit_code == EXIT_BAD_INPUT
    assert "Traceback" not in message
    matching = [line for line in message.splitlines() if fragments[0] in line]
    assert matching, message
    assert all(fragment in matching[0] for fragment in fragments), matching[0]


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_file_that_is_no_configuration(
    name: str, write: Callable[[Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text, fragments = BROKEN_FILES[name]
    exit_code, message = exit_code_and_message(write(text), capsys)
    assert exit_code == EXIT_BAD_INPUT
    assert "Traceback" not in message
    assert all(fragment in message for fragment in fragments), message


def test_a_missing_file_names_the_nearest(
    write: Callable[[Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write({})
    exit_code, message = exit_code_and_message(path.with_name("runs.json"), capsys)
    assert exit_code == EXIT_BAD_INPUT
    assert "no such file" in message
    assert f"did you mean {path}?" in message


def test_bytes_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b'{"run": "\xff"}')
    exit_code, message = exit_code_and_message(path, capsys)
    assert exit_code == EXIT_BAD_INPUT
    assert "byte 9 is not UTF-8" in message


def test_a_directory_instead_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exit_code, message = exit_code_and_message(tmp_path, capsys)
    assert exit_code == EXIT_BAD_INPUT
    assert "cannot be read" in message


def test_in_a_process_of_its_own(write: Callable[[Any], Path]) -> None:
    script = (
        "import sys\n"
        "from ssmlora_dist.config.arguments import build_parser, run_command\n"
        "from ssmlora_dist.config.loading import load_config\n"
        "def main():\n"
        "    arguments = build_parser('test').parse_args()\n"
        "    load_config(arguments.config, arguments.overrides)\n"
        "sys.exit(run_command(main))\n"
    )
    path = write(changed(("training.learning_rte", 1)))
    command = [sys.executable, "-c", script, "--config", str(path), "--set", "run.seed=abc"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == EXIT_BAD_INPUT, finished.stderr
    assert finished.stderr.splitlines()[0] == f"error: {path}: 2 problems"
    assert 'run.seed: "abc" given' in finished.stderr
    assert "training.learning_rte: unknown key" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_all_kinds_are_shown_at_once(problems: Problems) -> None:
    lines = problems(
        ("run.seed", "1"),
        ("training.learning_rte", 1),
        ("adapter.rank", 0),
        ("data.train.format", "json"),
        ("data.max_length", 600),
        ("parallel", {"zero_stage": 3, "zero": 1}),
        ("training.warmup_steps", 200),
        ("training.micro_batch_size", 3),
        ("deepspeed.bf16", {"enabled": True}),
        overrides=["training.max_steps", "evaluation.every_steps=x"],
    )
    paths = [line.partition(":")[0] for line in lines]
    assert paths == [
        "--set training.max_steps",
        "run.seed",
        "adapter.rank",
        "data.train.format",
        "training.learning_rte",
        "parallel.zero",
        "evaluation.every_steps",
        "training.warmup_steps",
        "deepspeed.bf16",
        "data.validation.task.lengths",
        "training.global_batch_size",
    ]


def test_no_rule_judges_by_a_value_that_is_wrong_itself(problems: Problems) -> None:
    # The default of max_steps (none) and of global_batch_size (16) would break a rule each.
    lines = problems(
        ("training", {"max_steps": "100", "global_batch_size": 0, "micro_batch_size": 3, "warmup_steps": 200})
    )
    assert [line.partition(":")[0] for line in lines] == ["training.max_steps", "training.global_batch_size"]


def test_a_misspelt_field_is_not_also_missing(problems: Problems) -> None:
    lines = problems(("training", {"max_step": 100}))
    assert len(lines) == 1
    assert "did you mean training.max_steps?" in lines[0]


def test_checks_over_several_adapter_fields_wait_only_for_those(problems: Problems) -> None:
    paths = [line.partition(":")[0] for line in problems(("adapter", {"rank": 0, "alternate": []}))]
    assert paths == ["adapter.rank", "adapter"]
    paths = [
        line.partition(":")[0] for line in problems(("adapter", {"alternate": 5, "every_layer": ["q_proj"]}))
    ]
    assert paths == ["adapter.alternate"]


def test_a_wrong_value_in_a_task_leaves_the_other_rules_unjudged(problems: Problems) -> None:
    lines = problems(
        ("evaluation", {"tasks": [{"task": "passkey", "lengths": ["512"]}], "tasks_every_steps": 5})
    )
    assert [line.partition(":")[0] for line in lines] == ["evaluation.tasks.0.lengths.0"]


def test_all_problems_of_the_tasks_are_shown_at_once(problems: Problems) -> None:
    tasks = [
        {"task": "paskey"},
        {"task": "boolq", "labels": {"yes": 1}, "lengths": [512]},
        {"task": "generation"},
    ]
    paths = [line.partition(":")[0] for line in problems(("evaluation.tasks", tasks))]
    assert sorted(paths) == [
        "evaluation.tasks.0.task",
        "evaluation.tasks.1.labels",
        "evaluation.tasks.1.lengths",
        "evaluation.tasks.2.path",
    ]
