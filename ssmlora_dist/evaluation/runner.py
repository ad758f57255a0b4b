"""From items to scored rows: batches, ranks, what is done already, what goes wrong.

Every item gives one row, `error` in place of its scores where it failed. Which items share a batch is a
function of the task's items and the token budget alone, not of the ranks, nor of what is done already: a
batch that a kill cut short is computed whole again. So the result file is the same, byte by byte, however
often an evaluation was stopped and on however many ranks it went on, as far as a batch computed twice gives
the same numbers. Which rank computes a batch follows from the batches' tokens, those of the tasks before it
included: many tasks of few batches are shared evenly too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ssmlora_dist.errors import CheckpointError, DataError, SSMLoRAError
from ssmlora_dist.evaluation.batching import Size, deal_out, padded_tokens, plan_batches
from ssmlora_dist.evaluation.choices import choice_log_likelihoods
from ssmlora_dist.evaluation.encoding import EncodedChoices, PromptEncoder
from ssmlora_dist.evaluation.generation import EncodedPrompt, generate
from ssmlora_dist.evaluation.item_rows import Key, PartFile, Row, key_of, read_parts, write_results
from ssmlora_dist.evaluation.items import (
    Answer,
    ChoiceAnswer,
    ChoiceItem,
    FailedItem,
    GenerationAnswer,
    Item,
    Task,
)
from ssmlora_dist.progress import counted, progress

Encoded = EncodedChoices | EncodedPrompt


def run(
    tasks: Sequence[Task],
    model: Any,
    tokenizer: Any,
    *,
    max_batch_tokens: int,
    max_length: int | None = None,
    directory: Path | None = None,
    digests: Mapping[str, str] | None = None,
    rank: int = 0,
    size: int = 1,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
    label: str = "",
) -> list[Row]:
    """Evaluates a model on every item of every task.

    A row holds `task`, `id` and `metadata`; then `prediction` (the index of the likeliest choice, or the text
    written), `label` and `log_likelihoods`, or `references`, and `scores`; or, in place of these, `error`.

    Args:
        tasks: each with a name of its own.
        model: a causal language model of transformers, adapted or not; its mode is put back at the end.
        tokenizer: its tokenizer.
        max_batch_tokens: rows of a batch times their tokens, padding and answers included.
        max_length: tokens that the model takes; None where it has no limit.
        directory: where rows are kept as they are finished, and `results.jsonl` is written at the end, in the
            order of tasks and items; an evaluation started again does what is missing, and tries again what
            failed. None keeps nothing.
        digests: by task, what decides its rows beside the items themselves: model, adapter, precision.
        rank: of this process.
        size: number of processes, which share the batches.
        gather: every process' value, by rank, on all of them.
        label: says whose answers these are, where progress is shown.

    Returns:
        The rows in the order of tasks and items, on every rank.

    Raises:
        CheckpointError: `directory` holds rows of another evaluation, or cannot be written.
        DataError: two tasks of one name, or two items of one id in a task.
    """
    _check_names(tasks)
    encoder = PromptEncoder(tokenizer, max_length, model.get_input_embeddings().num_embeddings)
    # All ranks have read before any of them writes.
    parts = gather(read_parts(directory) if directory is not None else [])
    known = {key_of(row): row for part in parts for row in part}
    own: list[Row] = []
    outline: dict[Key, Row | None] = {}
    loads = [0] * size
    with _evaluation_mode(model), PartFile(directory, rank) if directory else nullcontext() as file:
        for task in tasks:
            description = f"{label}: {task.name}" if label else task.name
            plan = _prepare(task, encoder, (digests or {}).get(task.name, ""), max_batch_tokens)
            outline |= {plan.key(index): plan.failed.get(index) for index in range(len(plan.items))}
            share = _share(plan, _pending(plan, known), loads)[rank]
            for rows in _evaluated(plan, share, model, tokenizer, description):
                if file is not None:
                    file.append(row for row in rows if "error" not in row)
                own += rows
    known |= {key_of(row): row for rows in gather(own) for row in rows}
    results = [_without_digest(known[key] if row is None else row) for key, row in outline.items()]
    if directory is not None and rank == 0:
        write_results(directory, results)
    return results


_Pending = tuple[list[int], list[int]]
"""A batch, and those of its items that have no row yet."""


def _check_names(tasks: Sequence[Task]) -> None:
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"evaluation: two tasks are called {name!r}; give each a name of its own")


@dataclass(frozen=True)
class _Plan:
    """A task's items; by their index what is asked of the model, or why it is not."""

    task: Task
    items: list[Item | FailedItem]
    digests: dict[int, str]
    encoded: dict[int, Encoded]
    failed: dict[int, Row]
    batches: list[list[int]]

    def key(self, index: int) -> Key:
        return self.task.name, self.items[index].id


def _prepare(task: Task, encoder: PromptEncoder, digest: str, max_batch_tokens: int) -> _Plan:
    items = list(counted(task.items(), f"making items of {task.name}", unit="items"))
    plan = _Plan(task, items, {}, {}, {}, [])
    seen: set[str] = set()
    for index, item in enumerate(counted(items, f"encoding items of {task.name}", len(items))):
        if item.id in seen:
            raise DataError(f"evaluation: task {task.name!r} has two items with the id {item.id!r}")
        seen.add(item.id)
        if isinstance(item, FailedItem):
            plan.failed[index] = {"task": task.name, "id": item.id, "metadata": {}, "error": item.error}
            continue
        try:
            plan.encoded[index] = _encode(item, encoder)
        # Whatever one item's text does to a tokenizer, the others are evaluated.
        except Exception as error:
            plan.failed[index] = {**_heading(task, item), "error": _reason(error)}
        plan.digests[index] = hashlib.sha256(f"{digest}\n{item!r}".encode()).hexdigest()[:16]
    for kind in (EncodedChoices, EncodedPrompt):
        indices = [index for index, encoded in plan.encoded.items() if isinstance(encoded, kind)]
        sizes = [_size(plan.encoded[index]) for index in indices]
        plan.batches.extend([indices[i] for i in batch] for batch in plan_batches(sizes, max_batch_tokens))
    return plan


def _encode(item: Item, encoder: PromptEncoder) -> Encoded:
    if isinstance(item, ChoiceItem):
        return encoder.choices(item.prompt, item.choices)
    return EncodedPrompt(encoder.prompt(item.prompt, item.max_new_tokens), item.max_new_tokens, item.stop)


def _size(encoded: Encoded) -> Size:
    if isinstance(encoded, EncodedChoices):
        return Size(len(encoded.prompt), encoded.num_extra)
    return Size(len(encoded.prompt), encoded.max_new_tokens)


def _pending(plan: _Plan, known: Mapping[Key, Row]) -> list[_Pending]:
    """The batches that lack rows, each with the indices of the items that have none.

    Raises:
        CheckpointError: an item has a row of another evaluation.
    """
    for index, digest in plan.digests.items():
        row = known.get(plan.key(index))
        if row is not None and row["digest"] != digest:
            raise CheckpointError(
                f"evaluation: the output directory holds rows of task {plan.task.name!r} for another model, "
                f"adapter or setting (item {row['id']!r} differs); choose another (--out), or remove it"
            )
    pending = [(batch, [i for i in batch if plan.key(i) not in known]) for batch in plan.batches]
    return [(batch, missing) for batch, missing in pending if missing]


def _share(plan: _Plan, pending: Sequence[_Pending], loads: list[int]) -> list[list[_Pending]]:
    """Every rank's batches; `loads`, each rank's tokens in this start, is brought up to date."""
    costs = [padded_tokens([_size(plan.encoded[index]) for index in batch]) for batch, _ in pending]
    shares = deal_out(costs, loads)
    for rank, share in enumerate(shares):
        loads[rank] += sum(costs[index] for index in share)
    return [[pending[index] for index in share] for share in shares]


def _evaluated(
    plan: _Plan, share: Sequence[_Pending], model: Any, tokenizer: Any, description: str
) -> Iterator[list[Row]]:
    """The rows that each batch lacks; all of it is computed."""
    done, total = 0, sum(len(missing) for _, missing in share)
    with progress(description, total) as shown:
        for batch, missing in share:
            answers = _answers(model, tokenizer, [plan.encoded[index] for index in batch])
            answered = dict(zip(batch, answers, strict=True))
            yield [_scored(plan, index, answered[index]) for index in missing]
            # Not before they have been taken, and written.
            done += len(missing)
            shown.update(done)


def _answers(model: Any, tokenizer: Any, encoded: Sequence[Encoded]) -> list[Answer | str]:
    """Of one batch of one kind; in place of an answer, why there is none."""
    try:
        return _answers_at_once(model, tokenizer, encoded)
    except torch.OutOfMemoryError:
        pass
    # Not in the handler, where the error still holds what the attempt had allocated.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(encoded) == 1:
        num_tokens = sum(_size(encoded[0]))
        return [f"the device's memory does not hold it alone ({num_tokens} tokens); evaluate on a larger one"]
    middle = len(encoded) // 2
    return [
        answer for half in (encoded[:middle], encoded[middle:]) for answer in _answers(model, tokenizer, half)
    ]


def _answers_at_once(model: Any, tokenizer: Any, encoded: Sequence[Encoded]) -> list[Answer | str]:
    choices = [item for item in encoded if isinstance(item, EncodedChoices)]
    prompts = [item for item in encoded if isinstance(item, EncodedPrompt)]
    answers: list[Answer | str] = []
    if choices:
        for values in choice_log_likelihoods(model, choices):
            finite = all(map(math.isfinite, values))
            answers.append(ChoiceAnswer(values) if finite else f"log-likelihoods are not finite: {values}")
    if prompts:
        for text in generate(model, tokenizer, prompts):
            answers.append("a logit is not a number" if text is None else GenerationAnswer(text))
    return answers


def _scored(plan: _Plan, index: int, answer: Answer | str) -> Row:
    """The row of an item, with its digest."""
    item = plan.items[index]
    assert not isinstance(item, FailedItem)
    row = {**_heading(plan.task, item), "digest": plan.digests[index]}
    if isinstance(answer, str):
        return {**row, "error": answer}
    if isinstance(item, ChoiceItem):
        assert isinstance(answer, ChoiceAnswer)
        values = answer.log_likelihoods
        row |= {"prediction": values.index(max(values)), "label": item.label, "log_likelihoods": list(values)}
    else:
        assert isinstance(answer, GenerationAnswer)
        row |= {"prediction": answer.text, "references": list(item.references)}
    try:
        scores = {name: float(value) for name, value in plan.task.score(item, answer).items()}
        if not all(map(math.isfinite, scores.values())):
            raise ValueError(f"scores are not finite: {scores}")
    # One item that a scorer cannot deal with must not end the others' evaluation.
    except Exception as error:
        return {**row, "error": _reason(error)}
    return {**row, "scores": scores}


def _without_digest(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "digest"}


def _heading(task: Task, item: Item) -> Row:
    return {"task": task.name, "id": item.id, "metadata": dict(item.metadata)}


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, SSMLoRAError) else f"{type(error).__name__}: {text}"


@contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
