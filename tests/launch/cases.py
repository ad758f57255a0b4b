"""Command lines of the scripts in a directory made by `materials.prepare`, and what comes of them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .materials import CONFIG_FILE, READ_ONLY


@dataclass(frozen=True)
class Case:
    """Arguments of a script, and what its message must hold."""

    arguments: tuple[str, ...]
    fragments: tuple[str, ...]


def overriding(*overrides: str, says: tuple[str, ...]) -> Case:
    return Case(("--config", CONFIG_FILE, "--set", *overrides), says)


def training_on(file: str, *overrides: str, says: tuple[str, ...], form: str = "instruction") -> Case:
    return overriding(f"data.train.path={file}", f"data.train.format={form}", *overrides, says=says)


BAD: dict[str, Case] = {
    # The command line and the configuration
    "no-config": Case((), ("usage:", "--config")),
    "unknown-option": Case(("--config", CONFIG_FILE, "--sett", "a=1"), ("usage:", "--sett")),
    "config-missing": Case(("--config", "rum.json"), ("rum.json", "no such file", "did you mean run.json?")),
    "config-broken": Case(("--config", "broken.json"), ("broken.json:3:1", "not JSON", "comma")),
    "section-missing": Case(("--config", "no_data.json"), ("data: missing", 'add "data"')),
    "override-malformed": overriding(
        "training.max_steps", says=("--set training.max_steps", "section.key=value")
    ),
    "unknown-key": overriding(
        "training.learning_rte=1", says=("training.learning_rte: unknown key", "training.learning_rate?")
    ),
    "wrong-type": overriding(
        'training.max_steps="8"', says=('training.max_steps: "8" given', "write 8 without quotes")
    ),
    "out-of-range": overriding(
        "adapter.rank=0", says=("adapter.rank: 0 given", "a whole number >= 1", "default is 8")
    ),
    "unknown-name": overriding(
        "training.schedule=cosin", says=("training.schedule:", 'did you mean "cosine"?')
    ),
    "no-end": overriding("training.max_steps=null", says=("training.max_steps:", '"num_epochs"')),
    "unknown-projection": overriding(
        'adapter.alternate=["q_prj"]',
        says=("adapter: the model's layers have no projection 'q_prj'", "did you mean q_proj?"),
    ),
    "two-problems": overriding(
        "training.max_stps=3",
        "adapter.alpha=-1",
        says=("2 problems", "training.max_stps: unknown key", "adapter.alpha: -1 given"),
    ),
    # Topology
    "indivisible-batch": overriding(
        "training.global_batch_size=3",
        "training.micro_batch_size=2",
        says=("training.global_batch_size: 3 given", "2 or 4 would fit"),
    ),
    "parameters-offloaded": overriding(
        "parallel.offload_parameters=true",
        "parallel.zero_stage=2",
        says=("parallel.offload_parameters: true given with zero_stage 2", "set parallel.zero_stage to 3"),
    ),
    "optimizer-offloaded": overriding(
        "parallel.offload_optimizer=true", says=("parallel.offload_optimizer:", "zero_stage to 1 or higher")
    ),
    "optimizer-on-cpu": overriding(
        "training.optimizer=adamw_8bit", says=("training.optimizer:", 'set training.optimizer to "adamw"')
    ),
    "attention-on-cpu": overriding(
        "model.attention=flash_attention_2", says=("model.attention:", 'set model.attention to "auto"')
    ),
    "decided-elsewhere": overriding(
        "deepspeed.train_batch_size=8",
        says=("deepspeed.train_batch_size: 8 given", "set training.global_batch_size"),
    ),
    # The model
    "model-missing": overriding(
        "model.path=./modle", says=("model.path:", "an existing directory", "did you mean model?")
    ),
    "model-on-no-hub": overriding(
        "model.path=nobody/nothing",
        says=("model.path: nobody/nothing is no directory here", "check the connection, or give the path"),
    ),
    "model-pickled": overriding(
        "model.path=pickled", says=("pickled/pytorch_model.bin", "pickle are refused", "save_pretrained")
    ),
    "model-truncated": overriding(
        "model.path=truncated", says=("truncated/model.safetensors: cannot be read", "download it again")
    ),
    "model-without-weights": overriding(
        "model.path=without_weights", says=("without_weights: holds no safetensors", "name a directory")
    ),
    "model-incomplete": overriding(
        "model.path=incomplete",
        says=("incomplete: the weights lack model.layers.1.", "a part of it was not downloaded"),
    ),
    "model-of-two": overriding(
        "model.path=of_two_models", says=("of_two_models/model.safetensors:", "are not of one model")
    ),
    "model-unsupported": overriding(
        "model.path=unsupported",
        says=("gpt2 models cannot be adapted: its decoder layers hold no linear layers", "name a decoder"),
    ),
    "model-config-damaged": overriding(
        "model.path=damaged", says=("damaged/config.json: cannot be read as JSON", "fetch the file again")
    ),
    "model-config-missing": overriding(
        "model.path=without_configuration",
        says=("without_configuration: holds no config.json", "it is not a model's directory"),
    ),
    "model-of-odd-size": overriding(
        'model={"init":"random","tokenizer":"bytes","compute_dtype":"float32","config":{"model_type":"llama",'
        '"hidden_size":6,"intermediate_size":7,"num_attention_heads":1,"num_key_value_heads":1,'
        '"num_hidden_layers":2,"vocab_size":259}}',
        says=("quantization.mode: a layer of", 'use mode "none"'),
    ),
    "model-config-invalid": overriding(
        "model.path=heads", says=("heads/config.json: not a valid llama configuration", "heads")
    ),
    "model-key-unknown": overriding(
        'model={"init":"random","tokenizer":"bytes","config":{"model_type":"llama","hiden_size":8}}',
        says=("model.config: a llama configuration has no key hiden_size", "did you mean `hidden_size`?"),
    ),
    "tokenizer-missing": overriding(
        "model.tokenizer=model", says=("model.tokenizer: no tokenizer can be read from model", 'or "bytes"')
    ),
    "tokenizer-of-more-tokens": overriding(
        "model.tokenizer=more_tokens",
        says=("model.tokenizer: the tokenizer of more_tokens has ids up to 259", "259 rows", "<|im_start|>"),
    ),
    "tokenizer-of-more-tokens-in-a-dry-run": Case(
        ("--config", CONFIG_FILE, "--dry-run", "--set", "model.tokenizer=more_tokens"),
        ("model.tokenizer: the tokenizer of more_tokens has ids up to 259", "name the model's own tokenizer"),
    ),
    "rows-longer-than-positions": overriding(
        "data.max_length=257", says=("data.max_length: 257 given; allowed: at most 256", "lower it")
    ),
    "rows-longer-than-positions-in-a-dry-run": Case(
        ("--config", CONFIG_FILE, "--dry-run", "--set", "data.max_length=257"),
        ("data.max_length: 257 given; allowed: at most 256", "rope_parameters"),
    ),
    # The data
    "file-missing": training_on(
        "row.jsonl", says=("data.train.path: row.jsonl: no such file", "nearest: rows.jsonl")
    ),
    "file-empty": training_on("empty.jsonl", says=("empty.jsonl: holds no records", "take it out")),
    "file-of-unknown-kind": training_on("rows.csv", says=("rows.csv: unknown kind of file", ".jsonl")),
    "line-corrupt": training_on(
        "corrupt.jsonl", says=("corrupt.jsonl:2: is not valid JSON", "mend or remove the line")
    ),
    "line-no-object": training_on(
        "list.jsonl", says=("list.jsonl:2: holds a list", "mend or remove the line")
    ),
    "line-not-unicode": training_on(
        "latin1.jsonl", says=("latin1.jsonl:1: is not valid UTF-8", "convert the file to UTF-8")
    ),
    "parquet-corrupt": training_on(
        "broken.parquet", says=("broken.parquet: is not a readable Parquet file", "write it again")
    ),
    "field-missing": training_on(
        "no_output.jsonl",
        says=("no_output.jsonl:3: the record has no field 'output'", "nearest: ouput", "mend the record"),
    ),
    "field-null": training_on(
        "null.jsonl", says=("null.jsonl:1: field 'output' is null", "remove the record")
    ),
    "field-no-text": training_on(
        "nested.jsonl", says=("nested.jsonl:1: field 'output' holds a", "map `fields.output`")
    ),
    "template-names-nothing": training_on(
        "rows.jsonl",
        'data.train.prompt="Q: {question}"',
        says=("rows.jsonl:1: the record has no field 'question'", "name the right field in `fields`"),
    ),
    "label-out-of-range": training_on(
        "choices.jsonl",
        form="multiple_choice",
        says=("choices.jsonl:2: field 'label' holds 2, which is none of its 2 choices", "from 0 to 1"),
    ),
    "label-no-number": training_on(
        "no_label.jsonl",
        form="multiple_choice",
        says=("no_label.jsonl:1: field 'label' holds 'maybe'", "mend the record", "set `labels`"),
    ),
    "message-without-role": training_on(
        "no_role.jsonl", form="chat", says=("no_role.jsonl:2: messages[0]", "'role'", "mend the record")
    ),
    "chat-without-template": training_on(
        "chat.jsonl",
        "model.tokenizer=no_chat_template",
        form="chat",
        says=("the tokenizer has no chat template", "or the format 'instruction'"),
    ),
    "no-targets": training_on(
        "no_targets.jsonl", says=("no_targets.jsonl: nothing is left of 2 rows", "check `fields`")
    ),
    "all-too-long": training_on(
        "all_long.jsonl", says=("all_long.jsonl: nothing is left of 3 rows", "raise `data.max_length`")
    ),
    "too-long-refused": training_on(
        "long.jsonl", "data.too_long=refuse", says=("long.jsonl:2:", "more than max_length 128", "'drop'")
    ),
    "too-short-for-the-task": overriding(
        'data.train={"format":"task","task":{"task":"passkey","lengths":[64]}}',
        says=("passkey", "64", "length"),
    ),
    "validation-broken": overriding(
        'data.validation={"format":"instruction","path":"corrupt.jsonl"}', says=("corrupt.jsonl:2:", "mend")
    ),
    "found-before-the-weights-are-read": training_on(
        "corrupt.jsonl", "model.path=truncated", says=("corrupt.jsonl:2: is not valid JSON", "mend or remove")
    ),
    "data-on-no-hub": overriding(
        'data.train={"format":"instruction","hub":"nobody/nothing"}',
        says=("nobody/nothing: cannot be loaded", "check the connection", "name it in `path`"),
    ),
    "found-by-a-dry-run": Case(
        ("--config", CONFIG_FILE, "--dry-run", "--set", "data.train.path=corrupt.jsonl"),
        ("corrupt.jsonl:2: is not valid JSON", "mend or remove the line"),
    ),
    # The place
    "output-in-a-file": overriding(
        "run.output_dir=rows.jsonl/runs",
        says=("rows.jsonl/runs", "is a file", "name another directory"),
    ),
}

# Their directories exist before and stay as they are.
TAKEN: dict[str, Case] = {
    "taken": overriding(says=("runs/taken: holds a run already", "choose another run.name")),
    "notes": overriding(
        says=("runs/notes: exists, is not empty and holds no run", "choose another run.name")
    ),
}


def named(name: str, case: Case) -> list[str]:
    """A case's arguments with its own run name."""
    if "--set" in case.arguments:
        return [*case.arguments, f"run.name={name}"]
    return list(case.arguments)


if os.geteuid() != 0:  # root may write anywhere
    BAD["output-read-only"] = overriding(
        f"run.output_dir={READ_ONLY}/runs",
        says=(f"{READ_ONLY}/runs", "no permission to write", "choose another run.output_dir"),
    )

# One refused run again under the same name, with the cause mended. Not more than one: DeepSpeed keeps process
# groups in globals, so a process can join and train once.
MENDED = "model-truncated"
ADAPTER = f"runs/{MENDED}/adapter"

UNFIT: dict[str, Case] = {
    "another-base": Case(
        ("--adapter", ADAPTER, "--model", "another_model"),
        (f"{ADAPTER}: was trained on another base model (model,", "load that base model"),
    ),
    "no-adapter": Case(
        ("--adapter", "runs/nowhere"), ("runs/nowhere: no such adapter directory", "train one")
    ),
    "base-gone": Case(
        ("--adapter", ADAPTER, "--model", "./gone"), ("there is no directory ./gone", "name an existing one")
    ),
    "prompt-too-long": Case(
        ("--adapter", ADAPTER, "--prompt", "hi " * 100), ("--prompt: 300 tokens", "256 in all", "shorten")
    ),
}
"""Arguments of `generate.py` that are refused."""

GENERATE = ("--adapter", ADAPTER, "--prompt", "Instruction: Say hi.\nAnswer:", "--max-new-tokens", "4")
HELP = ("--help",)
DRY_RUN = (
    "--config",
    CONFIG_FILE,
    "--dry-run",
    "--set",
    "run.name=dry",
    "training.max_steps=3",
    "adapter.rank=4",
)
DRY_RUN_COUNTS = (
    *("--config", CONFIG_FILE, "--dry-run", "--set", "data.train.path=long.jsonl"),
    "data.validation.path=no_targets_among.jsonl",
    "data.validation.format=instruction",
)


def arguments_of(name: str, case: Case) -> list[str]:
    """A case's arguments, with a run name of its own."""
    if "--set" in case.arguments:
        return [*case.arguments, f"run.name={name}"]
    return list(case.arguments)
