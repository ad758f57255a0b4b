"""A family that nobody has seen, with names of its own, is adapted without a change in the package."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ssmlora_dist import AdapterConfig, add_adapters, load_adapter, save_adapter
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.batches import Batch
from ssmlora_dist.errors import ModelError
from ssmlora_dist.models import load_model, structure_of
from ssmlora_dist.models.loss import CausalLMLoss, checkpoint_layers
from ssmlora_dist.models.stage import PipelineStage, StageLayers, cut_to_stage
from ssmlora_dist.quantization import is_quantized
from tests.tiny import SEED, randomize_adapters, token_ids

ADAPTER = AdapterConfig(rank=2, alternate=("mix_in", "widen"), every_layer=r".*\.(mix_out|narrow)")


class MadeUpConfig(PreTrainedConfig):
    """Few of the usual names."""

    model_type = "made_up"
    vocab_size: int = 67
    hidden_size: int = 16
    num_hidden_layers: int = 4
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    initializer_range: float = 0.3


class Loudness(nn.Module):
    """A norm that nothing calls one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(size))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.gain * hidden / hidden.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()


class Block(GradientCheckpointingLayer):
    """Causal means of what came before, and an MLP."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.loud = Loudness(size)
        self.mixing = nn.ModuleDict(
            {"mix_in": nn.Linear(size, 2 * size), "mix_out": nn.Linear(2 * size, size)}
        )
        self.feeding = nn.ModuleDict(
            {"widen": nn.Linear(size, 3 * size), "narrow": nn.Linear(3 * size, size)}
        )

    def forward(self, hidden: Tensor, weights: Tensor, **_: Any) -> Tensor:
        hidden = hidden + self.mixing["mix_out"](weights @ self.mixing["mix_in"](self.loud(hidden)))
        return hidden + self.feeding["narrow"](F.gelu(self.feeding["widen"](self.loud(hidden))))


class MadeUp(PreTrainedModel):
    """What both models share."""

    config_class = MadeUpConfig
    base_model_prefix = "trunk"
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Loudness):
            nn.init.constant_(module.gain, 1.5)


class Trunk(MadeUp):
    """The decoder: what it does before and after its blocks is its own affair."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(64, config.hidden_size)
        self.blocks = nn.ModuleList([Block(config.hidden_size) for _ in range(config.num_hidden_layers)])
        self.last = Loudness(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **keywords: Any,
    ) -> BaseModelOutputWithPast:
        hidden: Any = self.words(input_ids) if inputs_embeds is None else inputs_embeds
        length = hidden.shape[1]
        if position_ids is None:
            position_ids = torch.arange(length, device=hidden.device)[None]
        hidden = 3 * (hidden + self.places(position_ids))
        weights = torch.ones(length, length, device=hidden.device, dtype=hidden.dtype).tril()
        weights = weights / weights.sum(-1, keepdim=True)
        for block in self.blocks:
            hidden = block(hidden, weights, **keywords)
        return BaseModelOutputWithPast(last_hidden_state=self.last(hidden))


class MadeUpForCausalLM(MadeUp):
    """With a head that does more than multiply."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.trunk = Trunk(config)
        self.speak = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.words

    def get_output_embeddings(self) -> nn.Module:
        return self.speak

    def forward(
        self, input_ids: Tensor | None = None, logits_to_keep: Any = 0, **inputs: Any
    ) -> CausalLMOutputWithPast:
        hidden = self.trunk(input_ids=input_ids, **inputs).last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(logits=self.speak(hidden[:, kept]) / math.pi)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """As a user's own model is made known to transformers."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    AutoConfig.register("made_up", MadeUpConfig)
    AutoModelForCausalLM.register(MadeUpConfig, MadeUpForCausalLM)
    yield
    CONFIG_MAPPING._extra_content.pop("made_up")
    MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(MadeUpConfig)


def made_up(quantization: Any = "none") -> Any:
    config = {"model_type": "made_up"}
    return load_model(
        init="random", config=config, quantization=quantization, compute_dtype=torch.float32, seed=SEED
    )


def adapted() -> Any:
    model = add_adapters(made_up(), ADAPTER)
    randomize_adapters(model)
    return model.train()


INPUTS = {
    "input_ids": token_ids(2, 7),
    "attention_mask": torch.ones(2, 7, dtype=torch.long),
    "position_ids": torch.arange(7).expand(2, 7),
}


def trained(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss = CausalLMLoss(model, 4)(Batch.of(INPUTS["input_ids"], **INPUTS))
    loss.backward()
    return loss.detach(), {
        name: p.grad for name, p in adapter_parameters(model).items() if p.grad is not None
    }


def test_its_structure_is_found() -> None:
    structure = structure_of(made_up())
    assert (structure.layers, structure.embedding, structure.output_head) == (
        "trunk.blocks",
        "trunk.words",
        "speak",
    )
    assert structure.everywhere == ("trunk.places", "trunk.last")
    assert structure.linears[0] == ("mixing.mix_in", "mixing.mix_out", "feeding.widen", "feeding.narrow")


def test_random_weights_start_as_its_own_code_says() -> None:
    assert torch.equal(made_up().trunk.blocks[2].loud.gain, torch.full((16,), 1.5))


def test_it_is_adapted_quantised_saved_and_loaded(tmp_path: Path) -> None:
    base = made_up("nf4")
    assert sum(map(is_quantized, base.modules())) == 4 * 4
    model = add_adapters(made_up("nf4"), ADAPTER)
    assert torch.equal(model(**INPUTS).logits, base(**INPUTS).logits)
    randomize_adapters(model)
    save_adapter(model, tmp_path)
    again = load_adapter(made_up("nf4"), tmp_path)
    assert torch.equal(again(**INPUTS).logits, model(**INPUTS).logits)
    assert not torch.equal(again(**INPUTS).logits, base(**INPUTS).logits)


def test_its_loss_is_the_one_of_its_own_logits() -> None:
    model = adapted()
    module = CausalLMLoss(model, 4)
    assert module.uses_own_logits
    own, labels = model(**INPUTS).logits, INPUTS["input_ids"]
    wanted = F.cross_entropy(own[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(module(Batch.of(labels, **INPUTS)), wanted, rtol=1e-6, atol=0)


def test_checkpointing_changes_nothing() -> None:
    loss, expected = trained(adapted())
    model = adapted()
    checkpoint_layers(model)
    again, found = trained(model)
    assert torch.equal(again, loss)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    model.trunk.blocks[1] = nn.Identity()
    with pytest.raises(
        ModelError, match=r"made_up models are not made to be recomputed.*gradient_checkpointing"
    ):
        checkpoint_layers(model)


def test_two_stages_are_one() -> None:
    loss, expected = trained(adapted())
    found: dict[str, Tensor] = {}
    models = [adapted(), adapted()]
    for model, stage in zip(models, (StageLayers(0, 3, 4), StageLayers(3, 4, 4)), strict=True):
        cut_to_stage(model, stage)
    first = PipelineStage(models[0], StageLayers(0, 3, 4), 4, num_ahead=1)
    last = PipelineStage(models[1], StageLayers(3, 4, 4), 4)
    sent = first(None, Batch.of(INPUTS["input_ids"], **INPUTS))
    received = sent.detach().requires_grad_()
    staged = last(received, Batch.of(INPUTS["input_ids"], **INPUTS))
    staged.backward()
    sent.backward(received.grad)
    for model in models:
        found |= {name: p.grad for name, p in adapter_parameters(model).items() if p.grad is not None}
    assert torch.equal(staged.detach(), loss)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_its_stored_weights_are_read(tmp_path: Path) -> None:
    made_up().save_pretrained(tmp_path)
    found = load_model(str(tmp_path), quantization="none", compute_dtype=torch.float32).state_dict()
    expected = made_up().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
