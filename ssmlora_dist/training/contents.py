"""What a run works on, by its contents: kept in checkpoints, compared when it goes on.

began          when it first started: the date that chat templates print
tokenizer      digests of its parts
revisions      by source: what a hub data set's revision was called, and the commit that it stood for
train          counts and digest of the examples in memory; of a stream, its position has them
validation     digest of the examples evaluated on
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ssmlora_dist.config.build import build_tokenizer
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.data import Dataset, ExampleStream, resolve_revision
from ssmlora_dist.errors import CheckpointError, DataError
from ssmlora_dist.models import fix_date, tokenizer_digests
from ssmlora_dist.training.resume_point import ResumePoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCES = ("train", "validation")
_OTHERWISE = "or begin anew under another run.name"


def tokenizer_of(
    config: RunConfig, resume_point: ResumePoint, began: str, warn: Callable[[str], object]
) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """The tokenizer, whose chat templates print the date of the run's first start, and its contents.

    Args:
        config: of the run.
        resume_point: where the run goes on.
        began: `first_start`, of rank 0.
        warn: told what was replaced in the tokenizer.

    Raises:
        ModelError: there is none.
        CheckpointError: it is not that of the checkpoint; says what is other.
    """
    tokenizer = build_tokenizer(config.model, warn)
    digests = tokenizer_digests(tokenizer)
    check_tokenizer(resume_point, digests)
    fix_date(tokenizer, datetime.fromisoformat(began))
    return tokenizer, {"began": began, "tokenizer": digests}


def first_start(resume_point: ResumePoint) -> str:
    """When the run began that goes on, in ISO's format; now, where none does."""
    contents = _contents(resume_point)
    return str(contents["began"]) if contents else datetime.now().isoformat()


def check_tokenizer(resume_point: ResumePoint, digests: Mapping[str, str]) -> None:
    """Checks that the tokenizer is that of the checkpoint.

    Raises:
        CheckpointError: parts of it are not; says which.
    """
    contents = _contents(resume_point)
    then = contents["tokenizer"] if contents else digests
    changed = [name for name, digest in digests.items() if then[name] != digest]
    if changed:
        raise CheckpointError(
            f"{resume_point.path}: was trained with another tokenizer than that of model.tokenizer: other "
            f"{' and '.join(changed)}; restore it, wherever it lies, {_OTHERWISE}"
        )


def revisions(config: RunConfig, resume_point: ResumePoint) -> dict[str, dict[str, str | None]]:
    """The commits of the hub data sets, by source; of a run that goes on, those that it has been using.

    Raises:
        DataError: a revision cannot be found.
    """
    contents = _contents(resume_point)
    then = contents["revisions"] if contents else {}
    found = {}
    for name in SOURCES:
        source = getattr(config.data, name)
        if source is None or source.hub is None:
            continue
        asked = {"hub": source.hub, "revision": source.revision}
        before = then.get(name, {})
        same = before.get("commit") is not None and all(before[key] == value for key, value in asked.items())
        commit = resolve_revision(source.hub, source.subset, before["commit"] if same else source.revision)
        found[name] = {**asked, "commit": commit}
    return found


def pinned(config: RunConfig, commits: Mapping[str, Mapping[str, str | None]]) -> RunConfig:
    """The configuration with the commits in place of branches and tags."""
    sources = {
        name: getattr(config.data, name).model_copy(update={"revision": of_source["commit"]})
        for name, of_source in commits.items()
    }
    return config.model_copy(update={"data": config.data.model_copy(update=sources)})


def train_contents(train: Dataset | ExampleStream) -> dict[str, Any] | None:
    """Of the training data, as far as they are in memory."""
    if isinstance(train, ExampleStream):
        return None
    return {
        "num_records": train.report.num_rows,
        "num_examples": len(train),
        "sha256": train.sha256,
    }


def check_ranks(found: list[Any]) -> None:
    """Checks that all ranks have read the same.

    Args:
        found: `train_contents` of every rank.

    Raises:
        DataError: a rank has not.
    """
    for rank, contents in enumerate(found):
        if contents != found[0]:
            raise DataError(
                f"data.train: rank {rank} has read {_counted(contents)}, rank 0 {_counted(found[0])} of "
                "other contents; give every machine the same files"
            )


def check_train(resume_point: ResumePoint, now: Mapping[str, Any] | None, is_generated: bool) -> None:
    """Checks that training data in memory are those of the checkpoint.

    Raises:
        CheckpointError: they are not; says how many there are here and there.
    """
    contents = _contents(resume_point)
    then = contents["train"] if contents else now
    # Whether it is a stream may not change, and is compared with the settings.
    if now is None or then is None or then["sha256"] == now["sha256"]:
        return
    here = f"{_counted(now)} given here"
    if _counted(then) == _counted(now):
        here = "as many given here, but of other contents"
    generated = " (generated from a text that comes with Python: use the version it was begun with)"
    raise CheckpointError(
        f"{resume_point.path}: was trained on other data than data.train: {_counted(then)} in the "
        f"checkpoint, {here}{generated if is_generated else ''}; restore the data, wherever they lie, "
        f"{_OTHERWISE}"
    )


def same_validation(resume_point: ResumePoint, now: str | None, warn: Callable[[str], object]) -> bool:
    """Whether losses on the validation data can be compared with those in the checkpoint."""
    contents = _contents(resume_point)
    if contents is None or contents["validation"] == now:
        return True
    warn(
        "data.validation: not the examples evaluated on before; the losses before are not compared with: the "
        "best checkpoint is sought anew, and the summary has no evaluation before training"
    )
    return False


def _counted(contents: Mapping[str, Any]) -> str:
    return f"{contents['num_examples']:,} examples of {contents['num_records']:,} records"


def _contents(resume_point: ResumePoint) -> Mapping[str, Any] | None:
    return resume_point.checkpoint.contents if resume_point.checkpoint else None
