"""What sections must agree on, and names that the schema cannot check: pure functions giving lines.

Everything here is judged from the configuration alone, except whether the files that it names exist. The data
package is imported where it is needed: it brings torch, and most mistakes are found without.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ssmlora_dist.config.deepspeed_keys import deepspeed_problems
from ssmlora_dist.config.paths import directory_refusal, refusal
from ssmlora_dist.config.problems import NONE_DOUBTFUL, Doubtful, did_you_mean, nearest
from ssmlora_dist.config.schema import RunConfig, SourceSection
from ssmlora_dist.config.shown import shown
from ssmlora_dist.config.task_rules import task_problems, trained_task_problems
from ssmlora_dist.errors import DataError

_TEMPLATES = ("prompt", "answer", "choices")
# What a generated source has no use for.
_RECORD_KEYS = (
    *("path", "hub", "subset", "split", "revision", "fields", *_TEMPLATES, "labels", "limit", "streaming"),
)


def rule_problems(
    config: RunConfig,
    doubtful: Doubtful = NONE_DOUBTFUL,
    *,
    check_files: bool = True,
    for_training: bool = True,
) -> list[str]:
    """All lines about a configuration whose fields are each valid.

    Args:
        config: the configuration.
        doubtful: fields that hold a stand-in; rules that read one of them are left out.
        check_files: whether the files and directories it names must exist.
        for_training: false leaves out the files of training and validation data.
    """
    lines = [
        *_end_of_training(config, doubtful),
        *_state_learning_rate(config, doubtful),
        *_checkpointing(config, doubtful),
        *_compiling(config, doubtful),
        *_model(config, doubtful),
        *_evaluation(config, doubtful),
        *task_problems(config, doubtful, check_files=check_files),
        *deepspeed_problems(config.deepspeed),
    ]
    for where, source in _sources(config):
        lines += _source(where, source, doubtful)
        lines += _streaming(where, source, config, doubtful)
        lines += _task(where, source, config, doubtful, check_files=check_files and for_training)
    if check_files:
        lines += _run_directory(config, doubtful)
        lines += _model_files(config)
    if check_files and for_training:
        for where, source in _sources(config):
            lines += _data_files(where, source)
    return lines


def _sources(config: RunConfig) -> list[tuple[str, SourceSection]]:
    sources = [("data.train", config.data.train), ("data.validation", config.data.validation)]
    return [(where, source) for where, source in sources if source is not None]


def _end_of_training(config: RunConfig, doubtful: Doubtful) -> Iterator[str]:
    training = config.training
    if doubtful.clear_of("training.max_steps", "training.num_epochs"):
        if training.max_steps is None and training.num_epochs is None:
            yield (
                "training.max_steps: neither it nor training.num_epochs is given; allowed: exactly one; "
                'add "max_steps" (optimiser steps) or "num_epochs" (passes over the data) to training'
            )
        if training.max_steps is not None and training.num_epochs is not None:
            yield (
                f"training.max_steps: {training.max_steps} given beside training.num_epochs "
                f"{training.num_epochs:g}; allowed: exactly one; remove the other or set it to null"
            )
    too_long = training.max_steps is not None and training.warmup_steps >= training.max_steps
    if too_long and doubtful.clear_of("training.max_steps", "training.warmup_steps"):
        yield (
            f"training.warmup_steps: {training.warmup_steps} given; allowed: fewer than training.max_steps "
            f"{training.max_steps}; lower it or train longer"
        )


def _state_learning_rate(config: RunConfig, doubtful: Doubtful) -> Iterator[str]:
    adapter, ratio = config.adapter, config.training.state_learning_rate_ratio
    names = ("method", "alternate", "every_layer", "every_layer_method", "placement", "places")
    fields = ("training.state_learning_rate_ratio", *(f"adapter.{name}" for name in names))
    if ratio == 1 or not doubtful.clear_of(*fields):
        return
    if not any(adapter.form(name).start_values() for name in adapter.methods):
        yield (
            f"training.state_learning_rate_ratio: {ratio:g} given; allowed: only 1 with adapters of the form "
            f"{' and '.join(map(shown, adapter.methods))}, which has no parameters of a state; remove it, or "
            "set adapter.method to a form that has"
        )


def _checkpointing(config: RunConfig, doubtful: Doubtful) -> Iterator[str]:
    training = config.training
    if training.gradient_checkpointing or not doubtful.clear_of("training.gradient_checkpointing"):
        return
    for key, without in (("layers_per_checkpoint", 1), ("offload_checkpoints", False)):
        value = getattr(training, key)
        if value != without and doubtful.clear_of(f"training.{key}"):
            yield (
                f"training.{key}: {shown(value)} given without training.gradient_checkpointing; allowed: "
                f"{shown(without)}, as there are no checkpoints; remove it or set "
                "training.gradient_checkpointing to true"
            )


def _compiling(config: RunConfig, doubtful: Doubtful) -> Iterator[str]:
    training = config.training
    if not training.compile or not doubtful.clear_of("training.compile"):
        return
    if config.data.packing and doubtful.clear_of("data.packing"):
        yield (
            "training.compile: true given with data.packing true; allowed: false, as it would compile "
            "anew for all lengths that are packed together; set one of them to false"
        )
    if training.mlp_tile_size is not None and doubtful.clear_of("training.mlp_tile_size"):
        yield (
            f"training.compile: true given with training.mlp_tile_size {training.mlp_tile_size}; allowed: "
            "false, as tiles are recomputed one by one within a decoder layer, which is compiled whole; "
            "set one of them to its default, false or null"
        )


def _model(config: RunConfig, doubtful: Doubtful) -> Iterator[str]:
    model = config.model
    if not doubtful.clear_of("model.path", "model.init", "model.config"):
        return
    if model.init == "pretrained":
        if model.path is None:
            yield (
                "model.path: missing; needed: the directory or hub name of the model; add it, or set "
                'model.init to "random" and give model.config'
            )
        if model.config is not None:
            yield (
                f'model.config: {shown(model.config)} given; allowed: only with model.init "random", because '
                "a pretrained model has its own; remove it or set model.init"
            )
        return
    if model.path is None and model.config is None:
        yield (
            'model.config: missing; needed: model.init "random" takes the shapes from model.config or from '
            'model.path; add one, such as "config": {"model_type": "llama", "hidden_size": 32, ...}'
        )
    if model.path is not None and model.config is not None:
        yield (
            f"model.config: {shown(model.config)} given beside model.path {shown(model.path)}; allowed: "
            "exactly one gives the shapes; remove one (model.tokenizer names a tokenizer)"
        )
    if model.path is None and model.tokenizer is None and doubtful.clear_of("model.tokenizer"):
        yield (
            "model.tokenizer: missing; needed: there is no model.path to take it from; add a directory, a "
            'hub name or "bytes"'
        )
    if model.config is not None and not isinstance(model.config.get("model_type"), str):
        yield (
            f"model.config.model_type: {shown(model.config.get('model_type'))} given; needed: the family's "
            'name, such as "llama"; add it to model.config'
        )


def _evaluation(config: RunConfig, doubtful: Doubtful) -> Iterator[str]:
    every_steps = config.evaluation.every_steps
    if every_steps is not None and config.data.validation is None and doubtful.clear_of("data.validation"):
        yield (
            f"evaluation.every_steps: {every_steps} given without data.validation; allowed: only with "
            "something to evaluate on; add data.validation or remove it"
        )


def _source(where: str, source: SourceSection, doubtful: Doubtful) -> Iterator[str]:
    """Rules for a source of records."""
    malformed, template_names = _templates(where, source)
    yield from malformed
    if not doubtful.clear_of(f"{where}.format"):
        return
    if source.task is not None and source.format != "task":
        yield (
            f'{where}.task: given with format "{source.format}"; allowed: only with format "task"; '
            f"remove it or set {where}.format"
        )
    if source.format == "task":
        return
    yield from _format_settings(where, source)
    if not malformed and doubtful.clear_of(*(f"{where}.{key}" for key in (*_TEMPLATES, "labels"))):
        if source.format == "multiple_choice":
            yield from _question(where, source)
        else:
            yield from _field_names(where, source, template_names)
    if not doubtful.clear_of(f"{where}.path", f"{where}.hub"):
        return
    if (source.path is None) == (source.hub is None):
        given = "neither it nor" if source.path is None else f"{shown(source.path)} given beside"
        remedy = "name the files or the hub data set" if source.path is None else "remove one of them"
        yield f"{where}.path: {given} {where}.hub; allowed: exactly one; {remedy}"
    for key in ("subset", "split", "revision"):
        value = getattr(source, key)
        if value is not None and source.hub is None:
            yield (
                f"{where}.{key}: {shown(value)} given without {where}.hub; allowed: only for a "
                f"hub data set; remove it or name {where}.hub"
            )


def _streaming(where: str, source: SourceSection, config: RunConfig, doubtful: Doubtful) -> Iterator[str]:
    """Rules for a source that is read as training goes on."""
    if not source.streaming or not doubtful.clear_of(f"{where}.streaming"):
        return
    num_epochs = config.training.num_epochs
    if where == "data.train" and num_epochs is not None and doubtful.clear_of("training.num_epochs"):
        yield (
            f"training.num_epochs: {num_epochs:g} given with data.train.streaming; allowed: only with all "
            "records at hand, as the length of a stream is known at its end; set training.max_steps instead"
        )
    limits = (source.limit, config.evaluation.num_examples)
    names = (f"{where}.limit", "evaluation.num_examples")
    if where == "data.validation" and limits == (None, None) and doubtful.clear_of(*names):
        yield (
            f"{where}.limit: missing; needed with {where}.streaming, as every evaluation is of the same "
            "examples, which are kept; set it, or evaluation.num_examples"
        )
    if source.split is not None and "[" in source.split and doubtful.clear_of(f"{where}.split"):
        yield (
            f"{where}.split: {shown(source.split)} given with {where}.streaming; allowed: the name of a "
            f"split, as a slice is taken of what is downloaded; set {where}.limit for the first records"
        )


def _format_settings(where: str, source: SourceSection) -> Iterator[str]:
    """Templates and labels that the format has no use for."""
    from ssmlora_dist.data.formats import FORMATS

    _, settings = FORMATS[source.format]
    takes = f"only {' and '.join(settings)}" if settings else "no templates"
    for key in (*_TEMPLATES, "labels"):
        given = getattr(source, key)
        if given is not None and key not in settings:
            yield (
                f'{where}.{key}: {shown(given)} given; allowed: format "{source.format}" takes {takes}; '
                f"remove it or set {where}.format"
            )


def _question(where: str, source: SourceSection) -> Iterator[str]:
    """What cannot be in the settings of multiple-choice questions."""
    from ssmlora_dist.multiple_choice import QuestionReader

    try:
        QuestionReader(source.prompt, source.choices, source.fields, source.labels)
    except DataError as error:
        yield f"{where}.{error}"


def _field_names(where: str, source: SourceSection, template_names: set[str]) -> Iterator[str]:
    """Names in `fields` that neither the format nor a template looks up."""
    from ssmlora_dist.data.formats import FORMATS

    allowed = sorted({*FORMATS[source.format][0], *template_names})
    for name in source.fields:
        if name not in allowed:
            yield (
                f'{where}.fields.{name}: no name that format "{source.format}" or a template uses; allowed: '
                f"{', '.join(allowed)}; {did_you_mean(name, allowed)}"
            )


def _task(
    where: str, source: SourceSection, config: RunConfig, doubtful: Doubtful, *, check_files: bool
) -> Iterator[str]:
    """Rules for a generated source."""
    if source.format != "task" or not doubtful.clear_of(f"{where}.format"):
        return
    for key in _RECORD_KEYS:
        value = getattr(source, key)
        if value:
            yield (
                f'{where}.{key}: {shown(value)} given with format "task"; allowed: only for records, and a '
                "task is generated; remove it"
            )
    yield from trained_task_problems(f"{where}.task", source.task, config, doubtful, check_files=check_files)


def _templates(where: str, source: SourceSection) -> tuple[list[str], set[str]]:
    """Lines about malformed templates, and the names that the others look up."""
    from ssmlora_dist.records import Template

    lines: list[str] = []
    names: set[str] = set()
    for key in _TEMPLATES:
        for template in _each(getattr(source, key)):
            try:
                names.update(Template(template, f"{where}.{key}").names)
            except DataError as error:
                lines.append(str(error))
    return lines, names


def _each(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names or ()


def _run_directory(config: RunConfig, doubtful: Doubtful) -> Iterator[str]:
    output_dir = config.run.output_dir
    reason = directory_refusal(output_dir) if doubtful.clear_of("run.output_dir") else None
    if reason is not None:
        yield f"run.output_dir: {shown(str(output_dir))} given; {reason}; name another directory"


def _model_files(config: RunConfig) -> Iterator[str]:
    for key in ("path", "tokenizer"):
        name = getattr(config.model, key)
        if name is None or (key == "tokenizer" and name == "bytes"):
            continue
        path = Path(name)
        if (reason := refusal(path)) is not None:
            yield f"model.{key}: {shown(name)} given; {reason}; name another directory"
        elif path.is_file():
            yield f"model.{key}: {shown(name)} is a file; needed: a directory; name the one that holds it"
        elif not path.exists() and _looks_like_path(name):
            yield (
                f"model.{key}: {shown(name)} given; needed: an existing directory (from {Path.cwd()}) or a "
                f"hub name of the form organisation/model; {_mend_path(path)}"
            )


def _data_files(where: str, source: SourceSection) -> Iterator[str]:
    from ssmlora_dist.data.sources import find_files

    for pattern in _each(source.path):
        try:
            find_files([pattern])
        except DataError as error:
            yield f"{where}.path: {error}"


def _looks_like_path(name: str) -> bool:
    """Whether a name can only mean a directory: hub names are `organisation/model`, and no folder here."""
    hub_name = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?", name)
    return hub_name is None or ("/" in name and Path(name).parts[0] != name and Path(name).parent.is_dir())


def _mend_path(path: Path) -> str:
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else None
    if beside is None:
        return f"there is no directory {path.parent}"
    near = nearest(path.name, beside)
    return f"did you mean {path.with_name(near)}?" if near else "correct the name"
