"""Loading a model stage by stage: Hugging Face's numbers, and no more reads than needed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ssmlora_dist.batches import Batch
from ssmlora_dist.errors import ModelError
from ssmlora_dist.models import load_model
from ssmlora_dist.models.safetensors_file import StoredTensor
from ssmlora_dist.models.stage import PipelineStage, StageLayers
from ssmlora_dist.models.weights import SafetensorsWeights
from tests.tiny import FAMILY_NAMES

from .test_loading import WHOLE_ROWS, hugging_face_model

NUM_LAYERS = 3
VOCAB_SIZE = 67
BOUNDARIES = [(0, 1, 3), (0, 2, 3), (0, 1, 2, 3)]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def stages_of(boundaries: tuple[int, ...]) -> list[StageLayers]:
    return [StageLayers(first, stop, NUM_LAYERS) for first, stop in pairwise(boundaries)]


def other_half(directory: Path, stage: StageLayers) -> Callable[[Tensor, Tensor], None]:
    """Stands for the other process: checks what it is sent and sends its half of the table."""
    stored = {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}
    table = stored[EMBEDDING]
    middle = VOCAB_SIZE // 2
    halves = [table[:middle], table[middle:]]

    def swap(own: Tensor, other: Tensor) -> None:
        assert torch.equal(own, halves[stage.is_last].to(own.dtype))
        assert own.is_contiguous()
        assert other.is_contiguous()
        other.copy_(halves[stage.is_first])

    return swap


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Name and number of bytes of every tensor that is read."""
    done: list[tuple[str, int]] = []
    read = StoredTensor.read

    def noted(self: StoredTensor, rows: range | None = None) -> Tensor:
        tensor = read(self, rows)
        done.append((self.name, tensor.nbytes))
        return tensor

    monkeypatch.setattr(StoredTensor, "read", noted)
    return done


@pytest.mark.parametrize(
    ("quantization", "dtype"), [("none", torch.float32), ("nf4", torch.bfloat16), ("int8", torch.float32)]
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_a_chain_of_stages_gives_the_logits_of_hugging_face_bitwise(
    model_type: str,
    tied: bool,
    quantization: Any,
    dtype: torch.dtype,
    save_checkpoint: Callable[..., Path],
    token_ids: Tensor,
) -> None:
    directory = save_checkpoint(
        model_type, num_hidden_layers=NUM_LAYERS, tie_word_embeddings=tied, **WHOLE_ROWS
    )
    inputs = {
        "position_ids": torch.arange(token_ids.shape[1]).expand_as(token_ids),
    }
    boundaries = BOUNDARIES[len(model_type) % len(BOUNDARIES)]
    carried: Tensor | None = None
    for stage in stages_of(boundaries):
        model = load_model(
            str(directory),
            quantization=quantization,
            compute_dtype=dtype,
            stage=stage,
            swap_rows=other_half(directory, stage) if tied else None,
        )
        with torch.no_grad():
            if stage.is_last:
                decoder: Any = model.get_decoder()
                hidden = decoder(inputs_embeds=carried, use_cache=False, **inputs).last_hidden_state
                logits = model.lm_head(hidden)
            else:
                piece = PipelineStage(model, stage, 8)
                carried = piece(carried, Batch.of(token_ids, input_ids=token_ids, **inputs))
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    expected = hugging_face_model(directory, dtype, quantization, model.config._attn_implementation)
    with torch.no_grad():
        assert torch.equal(logits, expected(token_ids, use_cache=False, **inputs).logits)


@pytest.mark.parametrize("boundaries", BOUNDARIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_byte_is_read_by_one_stage(
    tied: bool,
    boundaries: tuple[int, ...],
    save_checkpoint: Callable[..., Path],
    reads: list[tuple[str, int]],
) -> None:
    directory = save_checkpoint("llama", num_hidden_layers=NUM_LAYERS, tie_word_embeddings=tied)
    for stage in stages_of(boundaries):
        load_model(str(directory), stage=stage, swap_rows=other_half(directory, stage))
    total: dict[str, int] = {}
    for name, size in reads:
        total[name] = total.get(name, 0) + size
    stored = {n: t.nbytes for file in directory.glob("*.safetensors") for n, t in load_file(file).items()}
    assert total == stored
    assert len(reads) == len(stored) + tied


def test_a_table_that_nobody_else_reads_is_read_whole(
    save_checkpoint: Callable[..., Path], reads: list[tuple[str, int]]
) -> None:
    directory = save_checkpoint("llama", num_hidden_layers=NUM_LAYERS, tie_word_embeddings=True)

    def refuse(own: Tensor, other: Tensor) -> None:
        raise AssertionError("nobody to swap with")

    whole = StageLayers(0, NUM_LAYERS, NUM_LAYERS)
    for settings in ({"stage": whole, "swap_rows": refuse}, {"stage": StageLayers(0, 1, NUM_LAYERS)}):
        reads.clear()
        load_model(str(directory), **settings)
        assert [size for name, size in reads if name == EMBEDDING] == [4 * 32 * VOCAB_SIZE]
    reads.clear()
    load_model(str(directory), stage=StageLayers(1, 2, NUM_LAYERS), swap_rows=refuse)
    assert not [name for name, _ in reads if name == EMBEDDING]


def test_random_weights_are_drawn_and_not_swapped(save_checkpoint: Callable[..., Path]) -> None:
    directory = save_checkpoint("llama", num_hidden_layers=NUM_LAYERS, tie_word_embeddings=True)

    def refuse(own: Tensor, other: Tensor) -> None:
        raise AssertionError("there is nothing to swap")

    first, last = stages_of((0, 1, NUM_LAYERS))
    tables = [
        load_model(str(directory), init="random", stage=stage, swap_rows=refuse).get_parameter(name).detach()
        for stage, name in ((first, EMBEDDING), (last, HEAD))
    ]
    assert torch.equal(*tables)


@pytest.mark.parametrize("row", [0, VOCAB_SIZE - 1])
def test_tied_tables_that_differ_are_refused_by_the_stage_that_reads_the_row(
    row: int, save_checkpoint: Callable[..., Path], rewrite: Callable[..., None]
) -> None:
    directory = save_checkpoint(
        "llama", max_shard_size="1GB", num_hidden_layers=NUM_LAYERS, tie_word_embeddings=True
    )

    def store_both(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][row] += 1

    rewrite(directory, store_both)
    first, middle, last = stages_of((0, 1, 2, 3))
    refusing = last if row else first
    for stage in (first, middle, last):
        if stage == refusing:
            with pytest.raises(ModelError, match="tie_word_embeddings"):
                load_model(str(directory), stage=stage, swap_rows=other_half(directory, stage))
        else:
            load_model(str(directory), stage=stage, swap_rows=other_half(directory, stage))
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        load_model(str(directory), stage=refusing)


def test_each_part_is_handed_over_before_the_next_is_read(
    save_checkpoint: Callable[..., Path], reads: list[tuple[str, int]]
) -> None:
    directory = save_checkpoint("llama", num_hidden_layers=NUM_LAYERS)
    handed_over: list[tuple[int, int]] = []

    def on_part(part: nn.Module) -> None:
        assert not any(parameter.is_meta for parameter in part.parameters())
        handed_over.append((len(list(part.parameters())), len(reads)))

    load_model(str(directory), on_part=on_part)
    in_layer = 9
    assert handed_over == [(1, 1), (in_layer, 10), (in_layer, 19), (in_layer, 28), (1, 29), (1, 30)]
    assert len(SafetensorsWeights(directory).names) == 30
