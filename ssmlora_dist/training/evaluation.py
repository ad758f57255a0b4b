"""Evaluation on a data set, spread over the ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmlora_dist.data import IGNORE_INDEX, Dataset, Example, evaluation_batches
from ssmlora_dist.distributed.process_group import ProcessGroup
from ssmlora_dist.evaluation.teacher_forced import ExampleScore, Score, summarize


def evaluate(
    module: nn.Module, dataset: Dataset, *, micro_batch_size: int, pad_token_id: int, group: ProcessGroup
) -> dict[str, Score]:
    """Loss and teacher-forced exact match by input length and over all; every rank must call it.

    Args:
        module: a `models.loss.CausalLMLoss`; left in evaluation mode.
        dataset: the same on every rank.
        micro_batch_size: rows of one forward pass.
        pad_token_id: fills shorter rows.
        group: this run's processes.
    """
    module.eval()
    scores: list[ExampleScore] = []
    for batch in evaluation_batches(dataset, micro_batch_size, group.rank, group.world_size, pad_token_id):
        tensors = {name: tensor.to(group.device) for name, tensor in batch.tensors.items()}
        examples = [dataset[index] if index is not None else None for index in batch.indices]
        result = module(scored=_scored(tensors["labels"], examples), **tensors)
        rows = zip(examples, *(values.tolist() for values in result), strict=True)
        scores += [
            ExampleScore(_group(example), loss, n, exact) for example, loss, n, exact in rows if example
        ]
    groups = sorted({_group(example) for example in dataset.examples}, key=int)
    return summarize(scores, groups, group.sum)


def _scored(labels_BS: Tensor, examples: list[Example | None]) -> Tensor:
    """[B,S] bool: the first `num_scored` target tokens of each row, or all of them."""
    is_target_BS = labels_BS != IGNORE_INDEX
    limits = [e.num_scored if e and e.num_scored is not None else labels_BS.shape[1] for e in examples]
    limit_B1 = torch.tensor(limits, device=labels_BS.device).unsqueeze(1)
    return is_target_BS & (is_target_BS.cumsum(1) <= limit_B1)


def _group(example: Example) -> str:
    return str(example.metadata["length"])
