"""Where things are in a decoder, found in the model itself: no list of model types.

transformers' interfaces name the decoder, the embedding and the head; the list of decoder layers is the one
that holds as many modules as the configuration says. What else the decoder holds belongs where the model's
own plan for pipeline stages puts it, or to every stage.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ssmlora_dist.adapters.projections import EXPERTS, linear_layers, named_by
from ssmlora_dist.adapters.tiling import find_mlp
from ssmlora_dist.errors import AdapterError, ModelError
from ssmlora_dist.sizes import DecoderShape, LayerSizes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_ATTRIBUTE = "ssmlora_structure"


@dataclass(frozen=True)
class Structure:
    """A decoder's parts by their path in the model, and its sizes.

    Attributes:
        decoder: the module that runs the layers.
        layers: the list of decoder layers.
        embedding: the token embedding.
        output_head: the output head.
        before: other parts with weights that only the first pipeline stage needs.
        after: those that only the last stage needs, such as the final norm.
        everywhere: those that every stage holds.
        tied: whether the head's weight is the embedding's.
        linears: of each decoder layer, the paths in it of the linear layers.
        savable: paths in the model of the modules that may be trained whole.
        shape: the sizes.
    """

    decoder: str
    layers: str
    embedding: str
    output_head: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    everywhere: tuple[str, ...]
    tied: bool
    linears: tuple[tuple[str, ...], ...]
    savable: tuple[str, ...]
    shape: DecoderShape

    @property
    def list_name(self) -> str:
        """Name of the list of layers in the decoder."""
        return self.layers.rpartition(".")[2]

    @property
    def num_layers(self) -> int:
        """Decoder layers of the whole model."""
        return len(self.linears)


def structure_of(model: PreTrainedModel) -> Structure:
    """The structure of a model; of a pipeline stage, that of the whole model.

    Raises:
        ModelError: the model is no causal language model with one list of decoder layers, with the reason.
    """
    from transformers import PreTrainedModel

    is_whole = isinstance(model, PreTrainedModel)
    known = getattr(model, _ATTRIBUTE, None)
    if is_whole and isinstance(known, Structure):
        return known
    if not is_whole or model.get_output_embeddings() is None:
        raise ModelError(
            f"a {type(model).__name__} is no causal language model of transformers by itself; pass it as "
            "`load_model` or `AutoModelForCausalLM` gives it, with nothing around it and nothing taken off"
        )
    return _discover(model)


def keep_structure(model: PreTrainedModel) -> Structure:
    """Notes the structure on a whole model, for the time when parts of it are gone or sharded."""
    structure = structure_of(model)
    setattr(model, _ATTRIBUTE, structure)
    return structure


def decoder_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The decoder layers that a model holds, by their index: all, or those of a pipeline stage.

    Raises:
        ModelError: the model has no list of decoder layers.
    """
    known = getattr(model, _ATTRIBUTE, None)
    path = known.layers if isinstance(known, Structure) else _layer_list(model)
    return {int(index): layer for index, layer in model.get_submodule(path).named_children()}


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of transformers' causal language models for a configuration.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoModelForCausalLM

    try:
        found = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError as error:
        raise ModelError(
            f"model: transformers has no causal language model of the type {config.model_type!r}; name a "
            "decoder that generates text"
        ) from error
    return cast("type[PreTrainedModel]", found)


def empty_model(config: PreTrainedConfig, **settings: Any) -> PreTrainedModel:
    """The model with parameters and buffers that have shapes but no storage.

    Args:
        config: of the model.
        settings: for transformers' `from_config`.

    Raises:
        ModelError: transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM

    model_class(config)
    try:
        with torch.device("meta"):
            return cast("PreTrainedModel", AutoModelForCausalLM.from_config(config, **settings))
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"model: transformers cannot build this {config.model_type} model: {reason}"
        ) from error


class _SeenLayerError(Exception):
    """Ends a pass once the first layer has run."""


def check_layers(model: PreTrainedModel) -> None:
    """Looks what the first decoder layer is given and returns, in a pass over tensors without storage.

    Args:
        model: as `empty_model` makes it, not adapted.

    Raises:
        ModelError: not hidden states, and hidden states alone; or no keywords reach the layers.
    """
    structure = structure_of(model)
    decoder, [layer, *_] = model.get_submodule(structure.decoder), decoder_layers(model).values()
    reason: str | None = None

    def look(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        nonlocal reason
        if not args or not isinstance(args[0], Tensor):
            reason = "its decoder layers are not given the hidden states as their first argument"
        elif not isinstance(output, Tensor) or output.shape != args[0].shape:
            reason = f"its decoder layers return a {type(output).__name__}, and not the hidden states alone"
        elif "dropout_seeds" not in keywords:
            reason = (
                "its decoder does not hand keywords on to its layers, so dropout cannot be told its seeds"
            )
        raise _SeenLayerError

    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, 2, 2, dtype=model.dtype, device="meta")
    hook = layer.register_forward_hook(look, with_kwargs=True)
    try:
        # A mask made already and positions keep most models from looking into tensors; some take neither.
        for given in ({"attention_mask": mask, "position_ids": tokens}, {}):
            try:
                decoder(input_ids=tokens, use_cache=False, dropout_seeds=tokens[:, 0], **given)
            except _SeenLayerError:
                break
            # What cannot run without storage tells nothing.
            except Exception:
                continue
    finally:
        hook.remove()
    if reason is not None:
        raise _unlike(model, reason)


def _discover(model: PreTrainedModel) -> Structure:
    paths = {id(module): path for path, module in model.named_modules()}
    layers = _layer_list(model)
    decoder_path, _, list_name = layers.rpartition(".")
    decoder: Any = model.get_submodule(decoder_path)
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if id(head) not in paths or id(embedding) not in paths:
        raise _unlike(model, "it has no output head and token embedding of its own")
    embedding_path, head_path = paths[id(embedding)], paths[id(head)]
    owned = (layers, embedding_path, head_path)
    rest = list(_other_parts(model, owned))
    plan = list(decoder.config.base_model_pp_plan or ())
    order = {name: plan.index(name) - plan.index(list_name) for name in plan} if list_name in plan else {}
    where = {path: order.get(path.removeprefix(f"{decoder_path}."), 0) for path in rest}
    children = list(model.get_submodule(layers).children())
    linears = tuple(tuple(linear_layers(layer)) for layer in children)
    if not any(linears):
        raise _unlike(model, "its decoder layers hold no linear layers (torch.nn.Linear)")
    tied = head.weight is embedding.weight
    return Structure(
        decoder=decoder_path,
        layers=layers,
        embedding=embedding_path,
        output_head=head_path,
        before=tuple(path for path in rest if where[path] < 0),
        after=tuple(path for path in rest if where[path] > 0),
        everywhere=tuple(path for path in rest if where[path] == 0),
        tied=tied,
        linears=linears,
        savable=tuple(
            _savable(
                model,
                {f"{layers}.{i}.{path}" for i, own in enumerate(linears) for path in own}
                | ({head_path} if tied else set()),
            )
        ),
        shape=DecoderShape(
            hidden_size=decoder.config.hidden_size,
            vocab_size=embedding.num_embeddings,
            tied_embeddings=tied,
            layers=tuple(_sizes(layer, decoder.config) for layer in children),
        ),
    )


def _savable(model: nn.Module, others: set[str]) -> Iterator[str]:
    """Paths of the modules with parameters and no modules inside, `others` and experts aside."""
    for path, module in model.named_modules():
        is_leaf = not module._modules and any(value is not None for value in module._parameters.values())
        if is_leaf and path not in others and path.rpartition(".")[2] != EXPERTS:
            yield path


def modules_named(structure: Structure, names: Sequence[str]) -> tuple[str, ...]:
    """Paths of the modules that `AdapterConfig.modules_to_save` stands for, in the order of the model.

    Raises:
        AdapterError: a name that stands for none, or for linear layers of decoder layers, experts or a head
            that is tied to the embedding.
    """
    for name in names:
        if named_by(name, structure.savable):
            continue
        said = f"adapter: `modules_to_save` names {name!r}"
        if structure.tied and named_by(name, [structure.output_head]):
            raise AdapterError(
                f"{said}, which is tied to {structure.embedding} and has no weight of its own; name that, of "
                "which a copy is trained while the head stays as it is, or leave it out"
            )
        if any(named_by(name, own) for own in structure.linears):
            raise AdapterError(
                f"{said}, a linear layer of the decoder layers, which may be quantised; adapt it, in "
                "`alternate` or `every_layer`"
            )
        known = list(dict.fromkeys(path.rpartition(".")[2] for path in structure.savable))
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise AdapterError(
            f"{said}, which is no module that can be trained whole{hint}; the model has {', '.join(known)}"
        )
    return tuple(path for path in structure.savable if any(named_by(name, [path]) for name in names))


def _layer_list(model: PreTrainedModel) -> str:
    """Path of the list of decoder layers."""
    paths = {id(module): path for path, module in model.named_modules()}
    try:
        decoder: Any = model.get_decoder()
    except (AttributeError, NotImplementedError) as error:
        raise _unlike(model, "it has no decoder (`get_decoder`)") from error
    number = getattr(getattr(decoder, "config", None), "num_hidden_layers", None)
    lists = [
        name
        for name, child in decoder.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == number and number
    ]
    if len(lists) != 1 or id(decoder) not in paths or decoder is model:
        found = f"{len(lists)} lists" if lists else "no list"
        raise _unlike(model, f"its decoder holds {found} of `num_hidden_layers` ({number}) modules")
    return f"{paths[id(decoder)]}.{lists[0]}"


def _other_parts(model: nn.Module, owned: tuple[str, ...], path: str = "") -> list[str]:
    """The largest modules that hold tensors of their own and none of `owned`."""
    found: list[str] = []
    for name, child in model.named_children():
        here = f"{path}.{name}" if path else name
        if here in owned:
            continue
        if any(each.startswith(f"{here}.") for each in owned):
            if own := [*child._parameters, *child._buffers.keys() - child._non_persistent_buffers_set]:
                raise ModelError(
                    f"model: {here} holds {own[0]} beside its decoder layers, outside of a module of its "
                    "own, which is not read part by part; name a model without it"
                )
            found += _other_parts(child, owned, here)
        elif stored_tensors_of(child):
            found.append(here)
    return found


def stored_tensors_of(module: nn.Module) -> list[str]:
    """Names of the parameters and buffers that a checkpoint holds."""
    return [
        f"{path}.{name}" if path else name
        for path, child in module.named_modules()
        for name in (*child._parameters, *child._buffers)
        if name not in child._non_persistent_buffers_set and getattr(child, name) is not None
    ]


def _sizes(layer: nn.Module, config: Any) -> LayerSizes:
    projections = linear_layers(layer)
    linears = list(projections.values())
    hidden = config.hidden_size
    experts = [
        parameter
        for path, module in layer.named_modules()
        if path.rpartition(".")[2] == EXPERTS
        for parameter in module.parameters()
    ]
    weights = [module.in_features * module.out_features for module in linears]
    # Per token: what an expert's weight takes in or gives out besides the hidden states.
    widths = [_width(hidden, module.out_features, module.in_features) for module in linears]
    # Of every expert that a token goes through its output stays, for the gradient of its share.
    active, router, num_through = 0, 0, 0
    for path, module in layer.named_modules():
        parent = layer.get_submodule(path.rpartition(".")[0])
        weight = getattr(module, "weight", None)
        if hasattr(parent, EXPERTS) and path not in projections and isinstance(weight, Tensor):
            router += weight.numel() if weight.dim() == 2 else 0
    for parameter in experts:
        share = min(len(parameter), getattr(config, "num_experts_per_tok", None) or len(parameter))
        active += share * parameter[0].numel()
        if parameter.dim() == 3:
            widths.append(share * _width(hidden, *parameter.shape[1:]))
            num_through = share
    if experts:
        widths.append(num_through * hidden)
    expert_weights = sum(parameter.numel() for parameter in experts)
    mlp_weights = mlp_size = 0
    if (mlp := find_mlp(layer)) is not None:
        for module in linear_layers(layer.get_submodule(mlp)).values():
            mlp_weights += module.in_features * module.out_features
            mlp_size += _width(hidden, module.out_features, module.in_features)
    return LayerSizes(
        linear_weights=sum(weights),
        expert_weights=expert_weights,
        active_expert_weights=active,
        largest_expert_weights=max((parameter.numel() for parameter in experts), default=0),
        router_weights=router,
        other_weights=sum(p.numel() for p in layer.parameters()) - sum(weights) - expert_weights,
        last_weights=weights[-1] if weights and not experts else 0,
        attention_size=_attention_size(layer, config),
        activation_size=sum(widths) + hidden,
        mlp_weights=mlp_weights,
        mlp_activation_size=mlp_size,
    )


def _width(hidden: int, num_out: int, num_in: int) -> int:
    return num_out + num_in - hidden if hidden in (num_out, num_in) else num_out


def _attention_size(layer: nn.Module, config: Any) -> int:
    num_heads = getattr(config, "num_attention_heads", None)
    widths = [width for m in layer.modules() if isinstance(width := getattr(m, "head_dim", None), int)]
    if num_heads and widths:
        return int(num_heads * widths[0])
    # Where layers are of several kinds, one without heads has no attention.
    return config.hidden_size if getattr(config, "layer_types", None) is None else 0


def _unlike(model: PreTrainedModel, reason: str) -> ModelError:
    return ModelError(
        f"model: {model.config.model_type} models cannot be adapted: {reason}; name a decoder that "
        "transformers builds of one list of layers"
    )
