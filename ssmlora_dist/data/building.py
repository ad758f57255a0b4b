"""One entry for every kind of data: settings in, examples out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ssmlora_dist.data.examples import Dataset, DatasetReport, Example
from ssmlora_dist.data.formats import make_renderer
from ssmlora_dist.data.records import Paths
from ssmlora_dist.data.retrieval import generate_retrieval
from ssmlora_dist.data.rows import RowEncoder
from ssmlora_dist.data.sources import read_records
from ssmlora_dist.data.tokenization import TextEncoder
from ssmlora_dist.errors import DataError


def build_dataset(
    *,
    format: str,
    tokenizer: Any,
    max_length: int,
    partition: Literal["train", "validation", "test"],
    too_long: Literal["drop", "truncate", "refuse"] = "drop",
    seed: int = 0,
    path: str | Sequence[str] | None = None,
    hub: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    fields: Mapping[str, Paths] | None = None,
    prompt: str | None = None,
    answer: str | None = None,
    choices: Sequence[str] | None = None,
    limit: int | None = None,
    retrieval: Mapping[str, Any] | None = None,
) -> Dataset:
    """Reads or generates the examples of one source.

    Args:
        format: `retrieval`, or a format of `formats.FORMATS`.
        tokenizer: a transformers tokenizer.
        max_length: the most tokens of an example.
        partition: what the data are for; the hub's split by that name is read unless `split` says otherwise,
            and retrieval gives each its own keys and values.
        too_long: what happens to longer rows (see `RowEncoder`).
        seed: of generated data.
        path: files or globs.
        hub: the name of a hub data set, instead of `path`.
        subset: its configuration.
        split: its split.
        fields: the format's names to paths in the records.
        prompt: template of the prompt.
        answer: template of the answer.
        choices: templates of the choices.
        limit: the most records to read.
        retrieval: the arguments of `generate_retrieval` but for tokenizer, split and seed.

    Returns:
        The examples, at least one, and what became of the rows.

    Raises:
        DataError: anything that keeps the data from being used, with file and line.
    """
    if format == "retrieval":
        if retrieval is None:
            raise DataError(f"{partition} data: the format 'retrieval' needs its settings; add `retrieval`")
        return _generate(tokenizer, max_length, partition, seed, retrieval)
    if (path is None) == (hub is None):
        raise DataError(
            f"{partition} data: the format {format!r} needs either `path` (files) or `hub` (a name)"
        )
    render = make_renderer(format, tokenizer, fields, prompt, answer, choices)
    encoder = RowEncoder(TextEncoder(tokenizer), max_length, too_long)
    records = read_records(path=path, hub=hub, subset=subset, split=split or partition, limit=limit)
    examples: list[Example] = []
    num_rows = 0
    for record in records:
        num_rows += 1
        for row in render(record):
            examples.extend(encoder.encode(row))
    report = encoder.report(num_rows, len(examples))
    if not examples:
        source = hub or (path if isinstance(path, str) else ", ".join(path or ()))
        raise DataError(_nothing_left(source, report, max_length))
    return Dataset(examples, report)


def _generate(
    tokenizer: Any, max_length: int, partition: str, seed: int, settings: Mapping[str, Any]
) -> Dataset:
    too_long = [length for length in settings["lengths"] if length > max_length]
    if too_long:
        raise DataError(
            f"retrieval.lengths: {too_long[0]} is more than max_length {max_length}; "
            "raise `data.max_length` or generate shorter examples"
        )
    examples = generate_retrieval(tokenizer, partition, seed=seed, **settings)
    return Dataset(examples, DatasetReport(len(examples), len(examples)))


def _nothing_left(source: str, report: DatasetReport, max_length: int) -> str:
    if report.num_dropped_too_long == 0:
        return (
            f"{source}: none of {report.num_rows} rows has target tokens, so there is nothing to train on; "
            "every answer is empty: check `fields` and `answer`"
        )
    return (
        f"{source}: nothing is left of {report.num_rows} rows: {report.num_dropped_too_long} are longer than "
        f"max_length {max_length} tokens, {report.num_without_target} have no target tokens; raise "
        "`data.max_length` or set `data.too_long` to 'truncate'"
    )
