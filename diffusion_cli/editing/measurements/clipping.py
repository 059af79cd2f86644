"""Overexposed images."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from diffusion_cli.conditions.operators import Measurement, Shape


class Clipping(Measurement):
    """Overexposed images `y = clip(gain x, -1, 1)`, which is not linear.

    Args:
        shape: shape of the images, [C, *sizes].
        gain: contrast before the values are clipped, at least 1.
    """

    def __init__(self, shape: Shape, *, gain: Annotated[float, Field(ge=1)] = 2.0) -> None:
        super().__init__(shape)
        self.gain = gain

    def __call__(self, x: Tensor) -> Tensor:
        return (self.gain * x).clamp(-1, 1)

    def picture(self, y: Tensor) -> Tensor:
        return y
