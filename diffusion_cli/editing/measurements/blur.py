"""Blurred images."""

import math

import torch
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn.functional import conv2d, pad

from diffusion_cli.conditions.degradations import GaussianBlur
from diffusion_cli.conditions.operators import LinearMeasurement, Shape

POINTS = 32  # per pixel of the path of a motion


class GaussianFilter(LinearMeasurement):
    """Images after a Gaussian filter along each axis; pixels beyond the border equal those at the border.

    Args:
        shape: shape of the images, [C, *sizes].
        sigma: standard deviation of the filter in pixels.
    """

    def __init__(self, shape: Shape, *, sigma: PositiveFloat = 2.0) -> None:
        super().__init__(shape)
        self.blur = GaussianBlur(sigma)

    def __call__(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.blur(x, [])

    def picture(self, y: Tensor) -> Tensor:
        return y


class MotionFilter(LinearMeasurement):
    """Images, or the slices of volumes, after a uniform motion along a line during the exposure.

    Pixels beyond the border equal those at the border.

    Args:
        shape: shape of the images, [C, *sizes].
        length: length of the path in pixels.
        angle: direction of the path in degrees, counterclockwise from the rows.
    """

    least_axes = 2

    def __init__(self, shape: Shape, *, length: PositiveFloat = 9.0, angle: float = 45.0) -> None:
        super().__init__(shape)
        radius = math.ceil(length / 2)
        along = torch.linspace(-length / 2, length / 2, math.ceil(POINTS * length) + 1, dtype=torch.float64)
        turn = math.radians(angle)
        places = torch.stack([-along * math.sin(turn), along * math.cos(turn)], 1)
        pixels = torch.arange(-radius, radius + 1, dtype=torch.float64)
        rows, columns = ((1 - (place[:, None] - pixels).abs()).clamp(min=0) for place in places.unbind(1))
        self.kernel = rows.T @ columns / len(along)
        """Weights [n, n], which sum to 1."""

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 1, *x.shape[-2:])
        radius = len(self.kernel) // 2
        with torch.autocast(x.device.type, enabled=False):
            padded = pad(flat, [radius] * 4, mode="replicate")
            return conv2d(padded, self.kernel.to(x)[None, None]).view(x.shape)

    def picture(self, y: Tensor) -> Tensor:
        return y
