"""Plain LoRA.

    z = K x W_a
    u = z
    y = x W_0 + scaling u W_b

Shapes: x [B,S,D], z and u [B,S,R], y [B,S,O]; K, the dropout mask / (1 - p), [B,S,D]. B batch, S tokens,
D in-features, O out-features, R rank.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def lora(
    x_BSD: Tensor,
    base_BSO: Tensor,
    lora_A_RD: Tensor,
    lora_B_OR: Tensor,
    *,
    scaling: float,
    dropout_mask_BSD: Tensor | None = None,
) -> Tensor:
    """y [B,S,O] in the dtype of `base_BSO`; differentiable in x, base and both matrices.

    Args:
        x_BSD: input of the frozen layer.
        base_BSO: the frozen layer's output, x W_0 (plus its bias).
        lora_A_RD: W_a transposed, as `torch.nn.Linear` stores it.
        lora_B_OR: W_b transposed.
        scaling: of the adapter's output.
        dropout_mask_BSD: K; None keeps everything.
    """
    read_BSD = x_BSD if dropout_mask_BSD is None else x_BSD * dropout_mask_BSD.to(x_BSD.dtype)
    z_BSR = F.linear(read_BSD, lora_A_RD.to(x_BSD.dtype))
    delta_BSO = F.linear(z_BSR, lora_B_OR.to(x_BSD.dtype)) * scaling
    return base_BSO + delta_BSO.to(base_BSO.dtype)
