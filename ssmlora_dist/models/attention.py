"""Attention that keeps the samples of packed rows apart and, causal throughout, is told so without a mask.

transformers' masks of padded or packed rows are [B,1,S,S], cost a synchronisation with the device and rule
out the fast kernels. Here a mask is what it says: of which samples the rows are made and how far back a layer
looks. The functions are registered with transformers under names of their own; outside of `rows_of`, as in
cached generation, they are transformers' own.

Shapes: B rows, H heads, S tokens, L tokens of a sample.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ssmlora_dist.batches import Batch, Lengths, upload
from ssmlora_dist.errors import ModelError
from ssmlora_dist.models.structure import decoder_layers, empty_model, structure_of
from ssmlora_dist.quantization import expert_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

EXCHANGE = "sequence_exchange"
"""Attribute of a model whose rows are shared among ranks: `SequenceGroup.attend`."""
SEGMENTED = {"sdpa": "segmented_sdpa", "eager": "segmented_eager"}
"""By the name of transformers' function, that of ours."""

_Function = Callable[..., tuple[Tensor, Any]]


class SegmentMask(NamedTuple):
    """In the place of a mask: every token sees those of its sample before it.

    Attributes:
        lengths: of each row's samples; None: each row is one, padded behind.
        window: how many tokens a token sees at most, itself among them; None: all.
        exchange: attends over whole rows where ranks have parts of them: see `SequenceGroup.attend`.
    """

    lengths: Lengths | None
    window: int | None
    exchange: Callable[..., Tensor] | None = None


class _Running(threading.local):
    """The rows that run in this thread.

    Attributes:
        rows: their mask, but for the window; None outside of `rows_of`.
        num_seen: how often attention was computed on them.
    """

    rows: SegmentMask | None = None
    num_seen = 0


_running = _Running()


@contextmanager
def rows_of(batch: Batch, model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """What a decoder is given for a batch, in whose body it is called.

    Args:
        batch: on the device of the decoder.
        model: which has it; see `segment_attention`.

    Raises:
        ModelError: samples of packed rows were not kept apart, or parts of rows not joined.
    """
    implementation = model.config._attn_implementation or ""
    if implementation not in SEGMENTED.values():
        if _needs_segments(batch) and (batch.num_shards > 1 or "flash" not in implementation):
            raise _not_segmented()
        yield {**batch.inputs, **_cumulative(batch)}
        return
    exchange = getattr(model, EXCHANGE, None) if batch.num_shards > 1 else None
    _running.rows, _running.num_seen = SegmentMask(batch.lengths, None, exchange), 0
    first = next(iter(batch.inputs.values()))
    try:
        # With a mask at hand transformers does not look for packed rows in the positions. Its values matter
        # to models alone that make their masks themselves, and are true for those.
        mask_BS = torch.ones(batch.shape, dtype=torch.bool, device=first.device)
        yield {**batch.inputs, "attention_mask": mask_BS}
    finally:
        _running.rows = None
    if _needs_segments(batch) and not _running.num_seen:
        raise _not_segmented()


def _needs_segments(batch: Batch) -> bool:
    return batch.lengths is not None or batch.num_shards > 1


def _not_segmented() -> ModelError:
    return ModelError(
        "model: its attention neither keeps packed samples apart nor works on parts of rows; set "
        "data.packing to false and parallel.sequence_parallel to 1"
    )


def _cumulative(batch: Batch) -> dict[str, Any]:
    """Where samples begin and end among all tokens, as flash-attention wants it; padding is a sample."""
    if batch.lengths is None:
        return {}
    tokens = batch.shape[1]
    filled = [[*lengths, tokens - sum(lengths)] for lengths in batch.lengths]
    flat = [length for lengths in filled for length in lengths if length]
    ends = torch.tensor([0, *flat], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    on_device = upload(ends, next(iter(batch.inputs.values())).device)
    longest = max(flat)
    return {
        "cu_seq_lens_q": on_device,
        "cu_seq_lens_k": on_device,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def segment_attention(model: PreTrainedModel) -> None:
    """Has a model attend by the functions of this module, in place, where it looks attention up by name."""
    name = SEGMENTED.get(model.config._attn_implementation or "")
    if name is None or not hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS"):
        return
    _register()
    for module in model.modules():
        # A decoder that was cut has a copy of its own.
        if getattr(getattr(module, "config", None), "_attn_implementation", None) in SEGMENTED:
            module.config._attn_implementation = name  # type: ignore[union-attr]


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

    functions: dict[str, tuple[Callable[[nn.Module], _Function], Any, bool]] = {
        "sdpa": (lambda _: sdpa_attention_forward, sdpa_mask, True),
        "eager": (_eager_of, eager_mask, False),
    }
    for name, (core_of, mask, knows_causal) in functions.items():
        AttentionInterface.register(SEGMENTED[name], functools.partial(_attend, core_of, knows_causal))
        AttentionMaskInterface.register(SEGMENTED[name], functools.partial(_mask, mask))


def _eager_of(module: nn.Module) -> _Function:
    """What transformers takes for `eager`: the function beside the attention's class."""
    for kind in type(module).__mro__:
        function = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if function is not None:
            found: _Function = function
            return found
    raise ModelError(f"model: {type(module).__name__} has no eager attention; choose another model.attention")


def _mask(make: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """A `SegmentMask` for the rows that run, where the layer's mask is causal, with or without a window."""
    rows, window = _running.rows, settings.get("local_size")
    if rows is not None and _is_causal(settings["mask_function"], window):
        return rows._replace(window=window)
    if rows is not None and (rows.lengths is not None or rows.exchange is not None):
        raise _not_segmented()
    return make(*args, **settings)


def _is_causal(mask_function: Callable[..., Any], window: int | None) -> bool:
    """Whether a token sees those before it, at most `window` with itself; looked at where it matters."""
    reach = window or 64
    query = 3 * reach
    keys = sorted({0, 1, query - reach - 1, query - reach, query - reach + 1, query - 1, query, query + 1})
    for key in keys:
        expected = key <= query and (window is None or key > query - window)
        at = (torch.tensor(number) for number in (0, 0, query, key))
        try:
            if bool(mask_function(*at)) != expected:
                return False
        # One that reads more than positions is none.
        except Exception:
            return False
    return True


def _attend(
    core_of: Callable[[nn.Module], _Function],
    knows_causal: bool,
    module: nn.Module,
    query_BHSD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    attention_mask: Any,
    **settings: Any,
) -> tuple[Tensor, Any]:
    """Attention as transformers' functions compute it; see there for the rest of the arguments."""
    core = core_of(module)
    if not isinstance(attention_mask, SegmentMask):
        return core(module, query_BHSD, key_BHSD, value_BHSD, attention_mask, **settings)
    _running.num_seen += 1
    if query_BHSD.is_meta:
        shape = (*query_BHSD.shape[:-1], value_BHSD.shape[-1])
        return query_BHSD.new_empty(shape).transpose(1, 2), None
    attend = functools.partial(_causal, core, knows_causal, module, attention_mask.window, settings)
    if attention_mask.lengths is not None:
        attend = functools.partial(_by_sample, attend, attention_mask.lengths)
    if attention_mask.exchange is not None:
        attend = functools.partial(attention_mask.exchange, attend, module)
    return attend(query_BHSD, key_BHSD, value_BHSD), None


def _by_sample(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], rows: Lengths, *tensors_BHSD: Tensor
) -> Tensor:
    """[B,S,H,D] of rows of several samples, each by itself; what pads a row is a sample too."""
    num_tokens = tensors_BHSD[0].shape[2]
    outputs = []
    for row, lengths in enumerate(rows):
        sizes = [*lengths, num_tokens - sum(lengths)]
        parts = zip(*(tensor[row : row + 1].split(sizes, dim=2) for tensor in tensors_BHSD), strict=True)
        outputs.append(torch.cat([attend(*part) for part in parts if part[0].shape[2]], dim=1))
    return torch.cat(outputs)


def _causal(
    core: _Function,
    knows_causal: bool,
    module: nn.Module,
    window: int | None,
    settings: dict[str, Any],
    query_BHLD: Tensor,
    key_BHLD: Tensor,
    value_BHLD: Tensor,
) -> Tensor:
    """[B,L,H,D] of rows that are one sample each; behind a window, a block of as many queries at a time."""
    length = query_BHLD.shape[2]
    if knows_causal and (window is None or length <= window):
        return core(module, query_BHLD, key_BHLD, value_BHLD, None, **settings)[0]
    step = length if window is None else window
    outputs = []
    for begin in range(0, length, step):
        end, first = min(begin + step, length), 0 if window is None else max(0, begin - window + 1)
        mask = _band(begin, end, first, window, query_BHLD)
        keys, values = key_BHLD[:, :, first:end], value_BHLD[:, :, first:end]
        given = (
            mask
            if knows_causal
            else torch.zeros_like(mask, dtype=query_BHLD.dtype).masked_fill_(
                ~mask, torch.finfo(query_BHLD.dtype).min
            )
        )
        outputs.append(core(module, query_BHLD[:, :, begin:end], keys, values, given, **settings)[0])
    return torch.cat(outputs, dim=1)


def _band(begin: int, end: int, first: int, window: int | None, like: Tensor) -> Tensor:
    """[1,1,Q,K] bool: which of the keys from `first` to `end` the queries from `begin` to `end` see."""
    queries = torch.arange(begin, end, device=like.device)[:, None]
    keys = torch.arange(first, end, device=like.device)[None]
    seen = keys <= queries
    return (seen if window is None else seen & (keys > queries - window))[None, None]


def packing_obstacle(config: PreTrainedConfig, implementation: str) -> str | None:
    """Why a model's attention cannot keep packed samples apart; None if it does.

    Args:
        config: of the model.
        implementation: of attention, by transformers' name.
    """
    # flash-attention has a path of its own for samples of several lengths.
    if implementation not in SEGMENTED:
        return None
    model = empty_model(config, attn_implementation=implementation)
    segment_attention(model)
    for module in model.modules():
        if expert_weights(module):
            # Which experts a token goes to, nothing without storage can say.
            module.forward = lambda hidden, *_, **__: hidden  # type: ignore[method-assign]
    tokens = torch.zeros(1, 4, dtype=torch.long, device="meta")
    none = tokens[0, :0]
    inputs = {"input_ids": tokens, "position_ids": tokens}
    batch = Batch(inputs, none, none, none, none, lengths=((2, 2),))
    decoder: Any = model.get_submodule(structure_of(model).decoder)
    try:
        with rows_of(batch, model) as given:
            decoder(**given, use_cache=False)
    except ModelError:
        return "its attention is not made of transformers' attention functions"
    except Exception as error:
        return f"its attention cannot be looked at without weights ({type(error).__name__})"
    if _running.num_seen != len(decoder_layers(model)):
        return "not all of its layers attend by transformers' attention functions under a causal mask"
    return None
