"""The recurrence of SSMLoRA, written down once, plainly: the truth for every faster path.

Shapes: B batch, S tokens, D in-features, O out-features, R rank. A suffix names a tensor's axes. Every
function works on any leading axes; B and S stand for them. Equations: Yu et al., NAACL 2025,
arXiv 2502.04958, in the row-vector form of README.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmlora_dist.ops.form import state_dtype

# Added to the spread before dividing (the paper's epsilon).
EPSILON = 1e-8
# A row whose spread (minmax) or root mean square (rms) is below this carries no information: its normalised
# state is 0 and so is its gradient, which would otherwise grow as 1 / spread.
MIN_SPREAD = 1e-5


def state_step(h_prev_BSR: Tensor, z_BSR: Tensor, transition_RR: Tensor, input_RR: Tensor) -> Tensor:
    """One Euler step of the state along depth: h = h_prev + h_prev W_c + z W_d.

    Args:
        h_prev_BSR: state received from the previous time module on the axis (zeros at the first).
        z_BSR: down-projected input, x W_a.
        transition_RR: W_c.
        input_RR: W_d.

    Returns:
        h [B,S,R] in float32 (float64 for float64 inputs); differentiable in all four arguments.
    """
    dtype = state_dtype(z_BSR.dtype)
    h_prev_BSR, z_BSR = h_prev_BSR.to(dtype), z_BSR.to(dtype)
    return h_prev_BSR + h_prev_BSR @ transition_RR.to(dtype) + z_BSR @ input_RR.to(dtype)


def normalize_minmax(h_BSR: Tensor) -> Tensor:
    """n = (h - min h) / (max h - min h + eps), min and max over R, per token.

    Ties go to the first arg-min and arg-max, so the gradient is deterministic. Rows with
    max - min < MIN_SPREAD have n = 0 and zero gradient.

    Deviation: the paper applies LeakyReLU to n; n >= 0, so it does nothing and is left out.
    """
    low_BS1 = h_BSR.gather(-1, h_BSR.argmin(-1, keepdim=True))
    high_BS1 = h_BSR.gather(-1, h_BSR.argmax(-1, keepdim=True))
    spread_BS1 = high_BS1 - low_BS1
    alive_BS1 = spread_BS1 >= MIN_SPREAD
    # The inner where keeps a dead row's division, and so its gradient, finite; the outer one cuts it off.
    divisor_BS1 = torch.where(alive_BS1, spread_BS1 + EPSILON, 1.0)
    return torch.where(alive_BS1, (h_BSR - low_BS1) / divisor_BS1, 0.0)


def normalize_rms(h_BSR: Tensor) -> Tensor:
    """n = h / sqrt(mean h^2), the mean over R, per token; rows with a root under MIN_SPREAD have n = 0."""
    mean_square_BS1 = h_BSR.square().mean(-1, keepdim=True)
    alive_BS1 = mean_square_BS1 >= MIN_SPREAD**2
    divisor_BS1 = torch.where(alive_BS1, mean_square_BS1, 1.0).sqrt()
    return torch.where(alive_BS1, h_BSR / divisor_BS1, 0.0)


def normalize(h_BSR: Tensor, normalization: str) -> Tensor:
    """Normalised state n [B,S,R] by `minmax` (the paper's), `rms` or `none`.

    Raises:
        ValueError: for any other name.
    """
    if normalization == "minmax":
        return normalize_minmax(h_BSR)
    if normalization == "rms":
        return normalize_rms(h_BSR)
    if normalization == "none":
        return h_BSR
    raise ValueError(f"normalization is {normalization!r}; allowed: minmax, rms, none")


def time_module(
    x_BSD: Tensor,
    base_BSO: Tensor,
    h_prev_BSR: Tensor,
    lora_A_RD: Tensor,
    lora_B_OR: Tensor,
    transition_RR: Tensor,
    input_RR: Tensor,
    *,
    scaling: float,
    normalization: str = "minmax",
    carry: str = "normalized",
    detach_state: bool = False,
    dropout_mask_BSR: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One time module of SSMLoRA on a frozen linear layer.

        z = x W_a
        h = h_prev + h_prev W_c + z W_d
        n = normalize(h)
        y = x W_0 + scaling (z + K n) W_b

    Products with W_a and W_b run in the dtype of x, the state in float32 (float64 for float64 inputs).

    Args:
        x_BSD: input of the frozen layer.
        base_BSO: the frozen layer's output, x W_0 (plus its bias).
        h_prev_BSR: state received from the previous time module on the axis; zeros at the first.
        lora_A_RD: W_a transposed, as `torch.nn.Linear` stores it.
        lora_B_OR: W_b transposed.
        transition_RR: W_c.
        input_RR: W_d.
        scaling: of the adapter's output.
        normalization: `minmax`, `rms` or `none`.
        carry: what is handed on: `normalized` (n) or `raw` (h).
        detach_state: stops gradients through h_prev, hence into earlier modules.
        dropout_mask_BSR: K, the keep mask divided by 1 - p; None keeps everything.

    Returns:
        y [B,S,O] in the dtype of `base_BSO`, and the carried state [B,S,R] in the state's dtype.
        Differentiable in x, base, the four matrices and (unless detached) h_prev.
    """
    if detach_state:
        h_prev_BSR = h_prev_BSR.detach()
    z_BSR = F.linear(x_BSD, lora_A_RD.to(x_BSD.dtype))
    h_BSR = state_step(h_prev_BSR, z_BSR, transition_RR, input_RR)
    n_BSR = normalize(h_BSR, normalization)
    kept_BSR = n_BSR if dropout_mask_BSR is None else n_BSR * dropout_mask_BSR
    u_BSR = (z_BSR + kept_BSR).to(x_BSD.dtype)
    delta_BSO = F.linear(u_BSR, lora_B_OR.to(x_BSD.dtype)) * scaling
    if carry not in ("normalized", "raw"):
        raise ValueError(f"carry is {carry!r}; allowed: normalized, raw")
    return base_BSO + delta_BSO.to(base_BSO.dtype), n_BSR if carry == "normalized" else h_BSR
