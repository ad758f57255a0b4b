"""Dynamic loss scaling, for float16.

In float16 gradients of activations below 6e-8 are zero, above 65504 infinite. The loss is multiplied by a
power of two, as large as leaves the gradients finite, and the gradients of what is trained, in float32, are
divided by it before anything else looks at them: there a power of two leaves every digit as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

INITIAL = 2.0**16
LEAST, LARGEST = 1.0, 2.0**32
# After which the scale is doubled: a step lost now and then costs less than gradients that vanish.
STEADY_STEPS = 500


@dataclass
class LossScale:
    """What the loss is multiplied with, the same on all ranks: they change it by what all of them know.

    Attributes:
        value: the scale, a power of two.
        steady_steps: steps since it changed in which all gradients were finite.
    """

    value: float = INITIAL
    steady_steps: int = 0

    def update(self, loss: float, grad_norm: float) -> bool:
        """Halves the scale when gradients have overflowed, doubles it when they have not for long.

        Args:
            loss: of the step, unscaled. Where it is not finite itself, no scale mends it.
            grad_norm: of the step.

        Returns:
            Whether it was halved: the step was lost to the scale, and the next one has a smaller one.
        """
        if not math.isfinite(loss):
            return False
        if not math.isfinite(grad_norm):
            halved = self.value > LEAST
            self.value, self.steady_steps = max(self.value / 2, LEAST), 0
            return halved
        self.steady_steps += 1
        if self.steady_steps == STEADY_STEPS:
            self.value, self.steady_steps = min(self.value * 2, LARGEST), 0
        return False
