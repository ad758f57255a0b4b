"""Distributed fine-tuning with SSMLoRA: LoRA whose low-rank adapters are joined across depth by a state."""

from ssmlora_dist.adapters.config import AdapterConfig
from ssmlora_dist.api import add_adapters, load_adapter, save_adapter

__all__ = ["AdapterConfig", "add_adapters", "load_adapter", "save_adapter"]
__version__ = "0.1.0"
