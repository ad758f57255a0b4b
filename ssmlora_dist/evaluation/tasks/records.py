"""Items made of records by templates: multiple-choice and generation tasks whose data are files or hub rows.

Training reads the same records by the same readers, under the same names and with the same settings, so that
a model is asked as it was trained: questions with choices and their labels by `multiple_choice`, those that
are answered in free words by `open_questions`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ssmlora_dist.errors import DataError
from ssmlora_dist.evaluation.items import ChoiceItem, FailedItem, GenerationItem, Item
from ssmlora_dist.multiple_choice import QuestionReader
from ssmlora_dist.open_questions import OpenReader
from ssmlora_dist.records import Paths, Record, UnusedFields

ItemFormat = Callable[[Record, str], Item]
"""Of a record and the id of its item. Raises DataError for a record that does not fit."""

Preparation = Callable[[Record], Iterable[Record]]
"""Of a record as it was read to one for each of its items."""


class ChoiceFormat(QuestionReader):
    """Records to questions with answers to choose from."""

    def __call__(self, record: Record, id: str) -> ChoiceItem:
        question = self.read(record)
        return ChoiceItem(id, question.prompt, question.choices, question.position)


class GenerationFormat(OpenReader):
    """Records to questions that are answered in the model's own words.

    Args:
        prompt: template of the prompt, by default the format's; spaces at its end go to the answer.
        answer: template of the answer, by default the format's.
        max_new_tokens: where the answer is cut off.
        stop: texts before which the answer ends.
        fields: the names that the format or the templates use, to paths in the records.
        format: one of `OPEN_FORMATS`, as in training.

    Raises:
        DataError: as of `OpenReader`.
    """

    def __init__(
        self,
        prompt: str | None = None,
        answer: str | None = None,
        *,
        max_new_tokens: int,
        stop: Sequence[str] = ("\n",),
        fields: Mapping[str, Paths] | None = None,
        format: str = "generation",
    ) -> None:
        super().__init__(format, prompt, answer, fields)
        self._max_new_tokens, self._stop = max_new_tokens, tuple(stop)

    def __call__(self, record: Record, id: str) -> GenerationItem:
        question = self.read(record)
        references = tuple(map(str.strip, question.answers))
        if not all(references):
            raise DataError(f"{question.where}: an answer is empty; give the question one, or remove it")
        return GenerationItem(id, question.prompt.rstrip(" "), references, self._max_new_tokens, self._stop)


def items_of_records(
    records: Iterable[Record],
    format: ItemFormat,
    name: str,
    prepare: Preparation | None = None,
    limit: int | None = None,
    unused: UnusedFields | None = None,
) -> Iterator[Item | FailedItem]:
    """The items of records, in order; one that cannot be used comes as a `FailedItem` with its place.

    An item's id is the number of its record, counted from 0, and for records of several items their number
    after a dash.

    Args:
        records: what a source yields.
        format: makes an item of a record.
        name: the task's, for messages.
        prepare: makes of a record one for each of its items; without it a record is one item.
        limit: the most items, failed ones included.
        unused: told the records whose items can be used.

    Raises:
        DataError: there is not one usable record; one message, with the reason of the first. Up to the first
            usable record nothing is yielded, so that settings which fit no record do not fail item by item.
    """
    held: list[FailedItem] = []
    has_usable = False
    for item in itertools.islice(_attempts(records, format, prepare, unused), limit):
        if isinstance(item, FailedItem) and not has_usable:
            held.append(item)
            continue
        if not has_usable:
            yield from held
            has_usable = True
        yield item
    if not has_usable:
        reason = f"none of {len(held)} can be used; the first: {held[0].error}" if held else "there are none"
        raise DataError(f"records of the task {name!r}: {reason}")


def _attempts(
    records: Iterable[Record],
    format: ItemFormat,
    prepare: Preparation | None,
    unused: UnusedFields | None,
) -> Iterator[Item | FailedItem]:
    for number, record in enumerate(records):
        made: list[Item | FailedItem] = []
        try:
            parts = [record] if prepare is None else list(prepare(record))
        except DataError as error:
            yield FailedItem(str(number), str(error))
            continue
        for part_number, part in enumerate(parts):
            id = str(number) if len(parts) == 1 else f"{number}-{part_number}"
            try:
                made.append(format(part, id))
            except DataError as error:
                made.append(FailedItem(id, str(error)))
        # What is wrong with an item kept its other fields from being read.
        if unused is not None and not any(isinstance(item, FailedItem) for item in made):
            unused.add(record)
        yield from made
