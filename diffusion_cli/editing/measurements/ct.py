"""Computed tomography."""

import math
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn.functional import grid_sample

from diffusion_cli.conditions.operators import LinearMeasurement, Shape


class CT(LinearMeasurement):
    """Parallel-beam projections (Radon transform) of images, or of the slices of volumes.

    The image is rotated by bilinear interpolation, and its columns are summed (as `radon` of scikit-image with
    `circle=False`). Sums are divided by the longer side in pixels, so that they lie in about the range of the images.
    The measurement has shape [B, C * D, angles, bins], where the bins cover the diagonal.

    Args:
        shape: shape of the images, [C, *sizes].
        angles: number of angles, `arc n / angles` for n = 0, ..., angles - 1.
        arc: covered arc in degrees; 180 is complete.
    """

    least_axes = 2

    def __init__(
        self, shape: Shape, *, angles: PositiveInt = 30, arc: Annotated[float, Field(gt=0, le=180)] = 180.0
    ) -> None:
        super().__init__(shape)
        height, width = shape[-2:]
        bins = math.ceil(math.hypot(height, width))
        turn = torch.deg2rad(arc / angles * torch.arange(angles, dtype=torch.float64))[:, None, None]
        across = torch.arange(bins, dtype=torch.float64) - bins // 2
        along = across[:, None]
        columns = width // 2 + turn.cos() * across + turn.sin() * along
        rows = height // 2 - turn.sin() * across + turn.cos() * along
        self.grid = torch.stack([_normalized(columns, width), _normalized(rows, height)], -1)
        """Places of the samples in the image, [angles, bins, bins, 2], in the convention of `grid_sample`."""

    def __call__(self, x: Tensor) -> Tensor:
        slices = x.reshape(1, -1, *x.shape[-2:]).expand(len(self.grid), -1, -1, -1)
        # Slices are channels, so that all share the places of an angle.
        rotated = grid_sample(slices, self.grid.to(x), align_corners=True)
        sums = rotated.sum(-2) / max(x.shape[-2:])
        return sums.transpose(0, 1).reshape(len(x), -1, *sums.shape[::2])


def _normalized(places: Tensor, size: int) -> Tensor:
    """Return places in pixels, from -1 at the centre of the first pixel to 1 at that of the last one."""
    return 2 * places / (size - 1) - 1
