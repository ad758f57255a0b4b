"""What is wrong with tasks, evaluated or trained: one line each, judged before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ssmlora_dist.config.paths import refusal
from ssmlora_dist.config.problems import Doubtful, did_you_mean
from ssmlora_dist.config.schema import RunConfig, TaskSection
from ssmlora_dist.config.shown import shown
from ssmlora_dist.errors import DataError

# Of files, metrics and cells of a table.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def task_problems(config: RunConfig, doubtful: Doubtful, *, check_files: bool) -> Iterator[str]:
    """Lines about the tasks; their files are looked for with `check_files`."""
    tasks, every_steps = config.evaluation.tasks, config.evaluation.tasks_every_steps
    if not _is_clear("evaluation.tasks", doubtful):
        return
    if every_steps is not None and not tasks and doubtful.clear_of("evaluation.tasks_every_steps"):
        yield (
            f"evaluation.tasks_every_steps: {every_steps} given without evaluation.tasks; allowed: only with "
            "tasks to evaluate on; add some or remove it"
        )
    names = [section.name or section.task for section in tasks]
    for index, section in enumerate(tasks):
        where = f"evaluation.tasks.{index}"
        if names.index(names[index]) < index:
            yield (
                f"{where}.name: {shown(names[index])} is the name of evaluation.tasks."
                f"{names.index(names[index])} too; needed: a name of its own; set name"
            )
        if section.name is not None and not NAME.fullmatch(section.name):
            mended = re.sub(r"[^A-Za-z0-9._-]+", "-", section.name).strip("-.") or section.task
            yield (
                f"{where}.name: {shown(section.name)} given; allowed: letters, digits, `_`, `-` and (not "
                f'first) `.`, as files are called by it; write "{mended}"'
            )
        yield from _task(where, section, check_files)


def trained_task_problems(
    where: str, section: TaskSection | None, config: RunConfig, doubtful: Doubtful, *, check_files: bool
) -> Iterator[str]:
    """Lines about the task of a source of `data` whose format is `task`."""
    # Brings torch.
    from ssmlora_dist.config.tasks import BABILONG, DEFAULT_LENGTHS, GENERATED, KNOWN

    if not _is_clear(where, doubtful):
        return
    if section is None:
        yield f'{where}: missing; needed: a task of evaluation, such as {{"task": "passkey"}}; add it'
        return
    if section.task in KNOWN and section.task not in GENERATED:
        yield (
            f"{where}.task: {shown(section.task)} given; allowed: {', '.join(GENERATED)}, which are "
            "generated; train on records with another format"
        )
        return
    yield from _task(where, section, check_files, GENERATED)
    limit, longest = config.data.max_length, max(section.lengths or DEFAULT_LENGTHS)
    if longest > limit and doubtful.clear_of("data.max_length"):
        yield (
            f"{where}.lengths: {longest} given; allowed: at most data.max_length {limit}; shorten it or set "
            f"data.max_length to {longest}"
        )
    others = {f"evaluation.tasks.{index}": task for index, task in enumerate(config.evaluation.tasks)}
    validation = config.data.validation
    if where == "data.train.task" and validation is not None and validation.task is not None:
        others["data.validation.task"] = validation.task
    for other, task in others.items() if section.task in BABILONG else ():
        if task.task in BABILONG and task.path == section.path is not None:
            yield (
                f"{where}.path: {shown(section.path)} given, as in {other}; allowed: a file of other "
                "questions, so that what is trained is not asked; name bAbI's files of the two splits"
            )


def _is_clear(where: str, doubtful: Doubtful) -> bool:
    """Whether nothing within is wrong: of a list with one wrong value in it, all is left out."""
    return doubtful.clear_of(where) and not any(field.startswith(f"{where}.") for field in doubtful.fields)


def _task(where: str, section: TaskSection, check_files: bool, known: Sequence[str] = ()) -> Iterator[str]:
    # Brings torch.
    from ssmlora_dist.config.tasks import BABILONG, KNOWN, OWN, keys_of, own_format, surplus_keys
    from ssmlora_dist.data.sources import find_files

    known = known or KNOWN
    if section.task not in known:
        yield (
            f"{where}.task: {shown(section.task)} given; allowed: {', '.join(known)}; "
            f"{did_you_mean(section.task, known)}"
        )
        return
    for key in surplus_keys(section):
        yield (
            f"{where}.{key}: {shown(getattr(section, key))} given; allowed: the task {shown(section.task)} "
            f"takes {', '.join(keys_of(section.task))}; remove it"
        )
    if section.path is not None and section.hub is not None:
        yield f"{where}.path: {shown(section.path)} given beside {where}.hub; allowed: one; remove one"
    for key in ("subset", "split"):
        if section.path is not None and key in keys_of(section.task) and getattr(section, key) is not None:
            yield (
                f"{where}.{key}: {shown(getattr(section, key))} given beside {where}.path; allowed: only for "
                "a hub data set; remove it"
            )
    if section.task in OWN and section.path is None and section.hub is None:
        yield f"{where}.path: missing; needed: files of records, or {where}.hub; add one"
    if section.task in BABILONG and section.path is None:
        yield f"{where}.path: missing; needed: the bAbI file with its questions; add it"
    elif section.task in BABILONG and not isinstance(section.path, str):
        yield f"{where}.path: {shown(section.path)} given; allowed: one bAbI file; name one"
    if section.task in OWN:
        try:
            own_format(section)
        except DataError as error:
            yield f"{where}.{error}"
    if not check_files:
        return
    for key in ("path", "background"):
        names = getattr(section, key)
        for name in (names,) if isinstance(names, str) else names or ():
            if key == "path" and section.task in BABILONG:
                # Of any suffix.
                if (reason := refusal(name)) is not None:
                    yield f"{where}.path: {shown(name)} given; {reason}; name another file"
                elif not Path(name).is_file():
                    yield f"{where}.path: {name}: no such file; name the bAbI file with its questions"
                continue
            try:
                find_files([name])
            except DataError as error:
                yield f"{where}.{key}: {error}"
