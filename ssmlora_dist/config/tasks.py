"""Tasks of the evaluation from their sections: the known ones by name, and a user's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ssmlora_dist import prose
from ssmlora_dist.config.schema import RunConfig, TaskSection
from ssmlora_dist.data import Partition, Row, Segment
from ssmlora_dist.data.contents import source_digest
from ssmlora_dist.data.sources import find_files, read_records
from ssmlora_dist.errors import DataError
from ssmlora_dist.evaluation.items import FailedItem, GenerationItem, Item, Task
from ssmlora_dist.evaluation.metrics import (
    BABILONG_LABELS,
    SCORERS,
    all_scores,
    babilong_match,
    choice_accuracy,
    string_match_all,
)
from ssmlora_dist.evaluation.tasks.babilong import babilong
from ssmlora_dist.evaluation.tasks.common_words import common_words
from ssmlora_dist.evaluation.tasks.frequent_words import frequent_words
from ssmlora_dist.evaluation.tasks.needles import NEEDLE_VARIANTS, needles
from ssmlora_dist.evaluation.tasks.passkey import passkey
from ssmlora_dist.evaluation.tasks.records import (
    ChoiceFormat,
    GenerationFormat,
    items_of_records,
)
from ssmlora_dist.evaluation.tasks.standard import STANDARD, StandardTask, items_of
from ssmlora_dist.evaluation.tasks.variable_tracking import variable_tracking
from ssmlora_dist.open_questions import OPEN_FORMATS
from ssmlora_dist.records import RecordView, UnusedFields, nearest_name

DEFAULT_LENGTHS = (1024,)
DEFAULT_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
DEFAULT_NUM_EXAMPLES = 100
DEFAULT_METRICS = ("f1", "exact_match")
DEFAULT_MAX_NEW_TOKENS = 64
DEFAULT_STOP = ("\n",)

# Those whose one fact has a depth, and those without.
DEEP: Mapping[str, Callable[..., Iterator[GenerationItem]]] = {
    "passkey": passkey,
    **{f"niah_{name}": partial(needles, variant=variant) for name, variant in NEEDLE_VARIANTS.items()},
}
FLAT: Mapping[str, Callable[..., Iterator[GenerationItem]]] = {
    "variable_tracking": variable_tracking,
    "common_words": common_words,
    "frequent_words": frequent_words,
}
WITHOUT_BACKGROUND = ("common_words", "frequent_words")
BABILONG = tuple(f"babilong_{name}" for name in BABILONG_LABELS)
GENERATED = (*DEEP, *FLAT, *BABILONG)
OWN = ("multiple_choice", *OPEN_FORMATS)
KNOWN = (*GENERATED, *STANDARD, *OWN)
WITH_SETTINGS = (*BABILONG, *OWN)

_RECORDS = ("path", "hub", "subset", "split")
_OWN_KEYS = {
    "multiple_choice": ("fields", "prompt", "choices", "labels"),
    **dict.fromkeys(OPEN_FORMATS, ("fields", "prompt", "answer", "max_new_tokens", "stop", "metrics")),
}
_WITHOUT_DEFAULT = ("task", "name", "num_examples")


def keys_of(task: str) -> tuple[str, ...]:
    """The settings that a known task takes beside its name and number of examples."""
    if task in DEEP:
        return ("lengths", "background", "depths", "seed")
    if task in WITHOUT_BACKGROUND:
        return ("lengths", "seed")
    if task in FLAT:
        return ("lengths", "background", "seed")
    if task in BABILONG:
        return ("lengths", "background", "path", "seed")
    return (*_RECORDS, *_OWN_KEYS.get(task, ()))


def surplus_keys(section: TaskSection) -> list[str]:
    """Settings given that the task has no use for."""
    takes = {*_WITHOUT_DEFAULT, *keys_of(section.task)}
    return [key for key in section.model_fields_set if key not in takes and getattr(section, key)]


def build_tasks(
    config: RunConfig, tokenizer: Any, names: Sequence[str] = (), lengths: Sequence[int] = ()
) -> list[Task]:
    """The tasks of `evaluation.tasks`.

    Args:
        config: of the run.
        tokenizer: of the model.
        names: those to take, in this order: of the section, or known tasks that need no settings; by default
            all of the section.
        lengths: in place of those in the section, for generated tasks.

    Raises:
        DataError: a name that does not exist or needs settings, nothing to do, or lengths for tasks that have
            none.
    """
    sections = {section.name or section.task: section for section in config.evaluation.tasks}
    known = [*sections, *(name for name in KNOWN if name not in WITH_SETTINGS and name not in sections)]
    for name in names:
        if name in sections:
            continue
        if name in WITH_SETTINGS:
            raise DataError(
                f"--tasks {name}: needs settings, its path among them; add it to evaluation.tasks"
            )
        if name not in known:
            raise DataError(
                f"--tasks {name}: no task of evaluation.tasks and none that is known"
                f"{nearest_name(name, known)}; known are: {', '.join(known)}"
            )
        sections[name] = TaskSection(task=name)
    chosen = [sections[name] for name in dict.fromkeys(names)] or list(sections.values())
    if not chosen:
        raise DataError(
            "nothing to evaluate: evaluation.tasks is empty; name tasks there or with --tasks; known are: "
            f"{', '.join(known)}"
        )
    if lengths and not any("lengths" in keys_of(section.task) for section in chosen):
        raise DataError(
            "--lengths: no task is generated, the others' inputs are as long as they are; leave it out"
        )
    return [build_task(section, tokenizer, config.run.seed, lengths) for section in chosen]


def build_task(section: TaskSection, tokenizer: Any, seed: int, lengths: Sequence[int] = ()) -> Task:
    """One task.

    Args:
        section: of a known task.
        tokenizer: of the model.
        seed: of generated items, unless the section has its own.
        lengths: in place of the section's, for generated tasks.

    Raises:
        DataError: its data or settings cannot be used.
    """
    name, kind = section.name or section.task, section.task
    if kind in GENERATED:
        drawn = partial(_generated, section, tokenizer, seed, "test", tuple(lengths))
        if kind in BABILONG:
            return Task(name, drawn, babilong_match(BABILONG_LABELS[_babi(kind)]), "babilong")
        return Task(name, drawn, string_match_all, "string_match_all")
    unused = UnusedFields()
    if kind in STANDARD:
        task = STANDARD[kind]
        return Task(name, partial(_standard, section, task, unused), task.score, task.metric, unused)
    items = partial(_own, section, name, own_format(section), unused)
    if kind == "multiple_choice":
        return Task(name, items, choice_accuracy, "acc", unused)
    metrics = section.metrics or DEFAULT_METRICS
    return Task(name, items, all_scores(*(SCORERS[metric] for metric in metrics)), metrics[0], unused)


def task_rows(section: TaskSection, tokenizer: Any, seed: int, partition: Partition) -> Iterator[Row]:
    """A split of a generated task as rows of text: the prompts that evaluation asks, with their answers.

    Evaluation asks the split `test`. The splits draw other random numbers, and share no key, value or word
    (`prose.split_of`); what they share is the wording and the text that facts are hidden in. The questions of
    bAbI are those of its file, for each split another one.

    Args:
        section: of one of `GENERATED`.
        tokenizer: of the model.
        seed: of what is drawn, unless the section has its own.
        partition: the split.

    Raises:
        DataError: the settings ask for what cannot be.
    """
    name = section.name or section.task
    for item in _generated(section, tokenizer, seed, partition):
        segments = (Segment(item.prompt), Segment(item.answer, is_target=True))
        yield Row(f"{name} {item.id}", segments, metadata=item.metadata)


def task_contents(section: TaskSection) -> str:
    """A digest of all that a generated task is made of beside its settings."""
    files = [] if section.path is None else [Path(str(section.path))]
    if section.background is not None:
        named = section.background
        files += find_files([named] if isinstance(named, str) else named)
    return source_digest(files, prose.sentences())


def output_directory(config: RunConfig, adapter: Path | None) -> Path:
    """Where results go by default: a directory of its own for every adapter and every base model alone.

    | evaluated | directory |
    | --- | --- |
    | `RUN/adapter` | `RUN/evaluation` |
    | `RUN/checkpoints/STEP` | `RUN/evaluation-STEP` |
    | another adapter, `DIR` | `DIR-evaluation` |
    | the base model alone | `NAME-MODEL-evaluation` beside the run (without a path `NAME-evaluation`) |

    The last is not in the run's directory, which a training of that name must find free.
    """
    if adapter is None:
        path = config.model.path
        model = [] if path is None else [Path(path).resolve().name]
        return config.run.output_dir / "-".join([config.run.name, *model, "evaluation"])
    # Behind links and dots, where names say what it is.
    directory = adapter.resolve()
    if directory.name == "adapter":
        found = directory.with_name("evaluation")
    elif directory.parent.name == "checkpoints":
        found = directory.parent.with_name(f"evaluation-{directory.name}")
    else:
        found = directory.with_name(f"{directory.name}-evaluation")
    return found if adapter.is_absolute() else Path(os.path.relpath(found))


def own_format(section: TaskSection) -> ChoiceFormat | GenerationFormat:
    """What makes items of the records of a user's own task.

    Raises:
        DataError: its templates or fields are malformed.
    """
    if section.task == "multiple_choice":
        return ChoiceFormat(section.prompt, section.choices, section.fields, section.labels)
    return GenerationFormat(
        section.prompt,
        section.answer,
        format=section.task,
        max_new_tokens=section.max_new_tokens or DEFAULT_MAX_NEW_TOKENS,
        stop=DEFAULT_STOP if section.stop is None else section.stop,
        fields=section.fields,
    )


def _generated(
    section: TaskSection, tokenizer: Any, seed: int, split: str, lengths: tuple[int, ...] = ()
) -> Iterator[GenerationItem]:
    try:
        yield from _drawn(section, tokenizer, seed, split, lengths)
    except DataError as error:
        # Several tasks can be made by one generator.
        raise DataError(f"task {section.name or section.task!r}: {error}") from error


def _drawn(
    section: TaskSection, tokenizer: Any, seed: int, split: str, lengths: tuple[int, ...]
) -> Iterator[GenerationItem]:
    kind = section.task
    settings: dict[str, Any] = {
        "lengths": lengths or section.lengths or DEFAULT_LENGTHS,
        "num_examples": section.num_examples or DEFAULT_NUM_EXAMPLES,
        "split": split,
        "seed": seed if section.seed is None else section.seed,
    }
    if section.background is not None:
        settings["text"] = _background(section.background)
    if kind in BABILONG:
        return babilong(tokenizer, path=Path(str(section.path)), task=_babi(kind), **settings)
    if kind in FLAT:
        return FLAT[kind](tokenizer, **settings)
    return DEEP[kind](tokenizer, depths=section.depths or DEFAULT_DEPTHS, **settings)


def _standard(section: TaskSection, task: StandardTask, unused: UnusedFields) -> Iterator[Item | FailedItem]:
    records = _records(section, task.hub, task.subset, task.split)
    return items_of(task, records, section.num_examples, unused)


def _own(
    section: TaskSection, name: str, format: ChoiceFormat | GenerationFormat, unused: UnusedFields
) -> Iterator[Item | FailedItem]:
    records = _records(section, None, None, "validation")
    prepare = format.singles if isinstance(format, GenerationFormat) else None
    return items_of_records(records, format, name, prepare, section.num_examples, unused)


def _records(section: TaskSection, hub: str | None, subset: str | None, split: str) -> Iterator[Any]:
    """Of the section's files or data set, else of the task's own data set."""
    if section.path is not None:
        return read_records(path=section.path)
    if section.hub is not None:
        return read_records(hub=section.hub, subset=section.subset, split=section.split or split)
    return read_records(hub=hub, subset=section.subset or subset, split=section.split or split)


def _background(names: str | Sequence[str]) -> str:
    return "\n\n".join(RecordView(record, {}).text("text") for record in read_records(path=names))


def _babi(kind: str) -> str:
    return kind.removeprefix("babilong_")
