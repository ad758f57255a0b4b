"""The models that `adapter_overhead.py` times: adapted in different ways, on one backbone's tensors."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ssmlora_dist import AdapterConfig, add_adapters
from ssmlora_dist.adapters.layers import LoRALinear
from ssmlora_dist.batches import Batch
from ssmlora_dist.models.loss import CausalLMLoss, checkpoint_layers
from ssmlora_dist.ops.ssmlora import SSMLoRA, reference
from ssmlora_dist.quantization.linear import QuantizedLinear

RANK, ALPHA = 8, 16
# The last throws away, in every layer, the dequantised weights that `ssmlora` keeps for the backward pass.
VARIANTS = ("frozen", "ssmlora", "lora", "peft", "eager", "redequantizing")


class EagerTimeModule(LoRALinear):
    """The recurrence as its reference writes it, tensor by tensor."""

    def step(self, x_BSD: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert isinstance(self.form, SSMLoRA)
        assert state is not None
        mask_BSR = None
        if self.training and self.dropout > 0:
            mask_BSR = nn.functional.dropout(torch.ones_like(state, dtype=torch.float32), self.dropout)
        return reference.time_module(
            x_BSD,
            self.base_layer(x_BSD),
            state,
            self.lora_A.weight,
            self.lora_B.weight,
            *self.form_parameters.values(),
            scaling=self.scaling,
            normalization=self.form.normalization,
            carry=self.form.carry,
            detach_state=self.detach_state,
            dropout_mask_BSR=mask_BSR,
        )


class Variant:
    """One adapted model: its loss, what it trains, how its step goes.

    Args:
        name: one of `VARIANTS`.
        backbone: whose tensors it shares.
        dropout: of the adapters.
        checkpointing: recompute the layers.
    """

    def __init__(self, name: str, backbone: Any, dropout: float, checkpointing: bool) -> None:
        self.name = name
        model = _sharing_copy(backbone)
        self.autocast = name == "peft"
        if name == "frozen":
            # The embeddings' output is where gradients end.
            model.get_input_embeddings().register_forward_hook(lambda *given: given[-1].requires_grad_())
        elif name == "peft":
            model = _with_peft(model, dropout)
        else:
            add_adapters(model, _adapter_config("lora" if name == "lora" else "ssmlora", dropout))
        if name == "eager":
            for module in model.modules():
                if isinstance(module, LoRALinear):
                    module.__class__ = EagerTimeModule
        if checkpointing:
            checkpoint_layers(model)
        if name == "redequantizing":
            for module in model.modules():
                if isinstance(module, QuantizedLinear):
                    module.is_recomputed = False
        self.model = model
        self.loss = CausalLMLoss(model, chunk_size=1024).train()
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        _set_equal(self.trained)
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-6) if self.trained else None

    @property
    def num_adapted(self) -> int:
        """Linear layers with an adapter."""
        return sum("lora_A" in name for name in self.trained)

    def forward(self, batch: Batch) -> Tensor:
        dtype = self.model.dtype
        enabled = self.autocast and dtype != torch.float32
        with torch.autocast(batch.targets.device.type, dtype, enabled=enabled):
            loss: Tensor = self.loss(batch)
        return loss / batch.num_tokens

    def step(self, batch: Batch) -> None:
        self.forward(batch).backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def gradients(self, batch: Batch) -> tuple[float, dict[str, Tensor]]:
        """Loss, and gradients by a name that is the same in all models."""
        loss = self.forward(batch)
        loss.backward()
        found = {_plain_name(n): p.grad.clone() for n, p in self.trained.items() if p.grad is not None}
        for parameter in self.trained.values():
            parameter.grad = None
        return float(loss.detach()), found


def _adapter_config(method: str, dropout: float) -> AdapterConfig:
    return AdapterConfig(
        method=method,
        rank=RANK,
        alpha=ALPHA,
        dropout=dropout,
        alternate=("q_proj", "v_proj") if method == "ssmlora" else (),
        every_layer=("q_proj", "v_proj") if method == "lora" else (),
    )


def _with_peft(model: Any, dropout: float) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=dropout,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config).base_model.model


def _sharing_copy(backbone: Any) -> Any:
    """A model of its own modules, and of the backbone's tensors."""
    memo: dict[int, Any] = {}
    for tensor in (*backbone.parameters(), *backbone.buffers()):
        memo[id(tensor)] = tensor
    for module in backbone.modules():
        state = getattr(module, "quant_state", None)
        if state is not None:
            memo[id(state)] = state
    return copy.deepcopy(backbone, memo)


def _plain_name(name: str) -> str:
    return name.replace("base_model.model.", "").replace(".default", "")


def _set_equal(trained: dict[str, nn.Parameter]) -> None:
    """Values that follow from the name and the shape alone, so that models can be compared; none is zero."""
    for name, parameter in sorted(trained.items()):
        if parameter.dim() == 2 and "state_" not in name:
            seed = sum(map(ord, _plain_name(name)))
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                parameter.copy_(drawn / parameter.shape[1] ** 0.5 * (0.1 if "lora_B" in name else 1.0))
