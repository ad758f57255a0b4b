"""What is wrong with `evaluation.tasks`: one line each, judged before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from ssmlora_dist.config.problems import Doubtful, did_you_mean, shown
from ssmlora_dist.config.schema import RunConfig, TaskSection
from ssmlora_dist.errors import DataError


def task_problems(config: RunConfig, doubtful: Doubtful, *, check_files: bool) -> Iterator[str]:
    """Lines about the tasks; their files are looked for with `check_files`."""
    tasks, every_steps = config.evaluation.tasks, config.evaluation.tasks_every_steps
    if not doubtful.clear_of("evaluation.tasks"):
        return
    if every_steps is not None and not tasks and doubtful.clear_of("evaluation.tasks_every_steps"):
        yield (
            f"evaluation.tasks_every_steps: {every_steps} given without evaluation.tasks; allowed: only with "
            "tasks to evaluate on; add some or remove it"
        )
    names = [section.name or section.task for section in tasks]
    for index, section in enumerate(tasks):
        place = f"evaluation.tasks.{index}"
        if names.index(names[index]) < index:
            yield (
                f"{place}.name: {shown(names[index])} is the name of evaluation.tasks."
                f"{names.index(names[index])} too; needed: a name of its own; set name"
            )
        yield from _task(place, section, check_files)


def _task(place: str, section: TaskSection, check_files: bool) -> Iterator[str]:
    # Brings torch.
    from ssmlora_dist.config.tasks import BABILONG, KNOWN, OWN, keys_of, own_format, surplus_keys
    from ssmlora_dist.data.sources import find_files

    if section.task not in KNOWN:
        yield (
            f"{place}.task: {shown(section.task)} given; allowed: {', '.join(KNOWN)}; "
            f"{did_you_mean(section.task, KNOWN)}"
        )
        return
    for key in surplus_keys(section):
        yield (
            f"{place}.{key}: {shown(getattr(section, key))} given; allowed: the task {shown(section.task)} "
            f"takes {', '.join(keys_of(section.task))}; remove it"
        )
    if section.path is not None and section.hub is not None:
        yield f"{place}.path: {shown(section.path)} given beside {place}.hub; allowed: one; remove one"
    if section.task in OWN and section.path is None and section.hub is None:
        yield f"{place}.path: missing; needed: files of records, or {place}.hub; add one"
    if section.task in BABILONG and section.path is None:
        yield f"{place}.path: missing; needed: the bAbI file with its questions; add it"
    if section.task in OWN:
        try:
            own_format(section)
        except DataError as error:
            yield f"{place}.{error}"
    if not check_files:
        return
    for key in ("path", "background"):
        names = getattr(section, key)
        for name in (names,) if isinstance(names, str) else names or ():
            try:
                if section.task not in BABILONG or key != "path":
                    find_files([name])
            except DataError as error:
                yield f"{place}.{key}: {error}"
