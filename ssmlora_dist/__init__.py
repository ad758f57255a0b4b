"""Distributed fine-tuning with SSMLoRA: LoRA whose low-rank adapters are joined across depth by a state."""

from ssmlora_dist.adapted_model import save_adapter
from ssmlora_dist.adapters.config import AdapterConfig
from ssmlora_dist.adapters.state import disabled_adapters
from ssmlora_dist.api import add_adapters, load_adapter, remove_adapters, set_adapter
from ssmlora_dist.ops.form import Form
from ssmlora_dist.ops.registry import register_form
from ssmlora_dist.parameter_counts import trainable_parameters

__all__ = [
    "AdapterConfig",
    "Form",
    "add_adapters",
    "disabled_adapters",
    "load_adapter",
    "register_form",
    "remove_adapters",
    "save_adapter",
    "set_adapter",
    "trainable_parameters",
]
__version__ = "0.1.0"
