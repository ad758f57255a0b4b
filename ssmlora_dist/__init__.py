"""Distributed fine-tuning with SSMLoRA: LoRA whose low-rank adapters are joined across depth by a state."""

from ssmlora_dist.adapters.config import AdapterConfig
from ssmlora_dist.api import add_adapters, load_adapter, save_adapter
from ssmlora_dist.ops.form import Form
from ssmlora_dist.ops.registry import register_form

__all__ = ["AdapterConfig", "Form", "add_adapters", "load_adapter", "register_form", "save_adapter"]
__version__ = "0.1.0"
