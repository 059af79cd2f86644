"""Linear measurements of images, and projections onto them, for conditions and for restoration."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

FARTHEST = 1000.0  # bound of the shift of an image, in units of the measurement
WILDEST = 100.0  # pixel values are clipped to this
HALVINGS = 40
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's gray


class LinearOperator(ABC):
    """Base class of measurements y = A x with `A A^+ = 1`, so that A^+ A is a projection."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Return A x for images x [B, C, *sizes]."""

    @abstractmethod
    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """Return A^+ y, the image [B, C, *sizes] of least norm with measurement y."""

    def picture(self, y: Tensor) -> Tensor:
        """Return images [B, C, *sizes] that visualize the measurement."""
        return self.pseudo_inverse(y)

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """Return `x + A^+ (y - A x)`, the nearest image to x with measurement y."""
        return x + self.pseudo_inverse(y - self(x))

    def nearest_image(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the nearest image to x with measurement y and values in [-1, 1].

        This is `clip(x + A^+ l)`, with l found by bisection; each element of l affects different pixels.
        """
        x = x.clamp(-WILDEST, WILDEST)
        low, high = torch.full_like(y, -FARTHEST), torch.full_like(y, FARTHEST)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            below = self((x + self.pseudo_inverse(middle)).clamp(-1, 1)) < y
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (x + self.pseudo_inverse((low + high) / 2)).clamp(-1, 1)


class Mask(LinearOperator):
    """Keeps the pixels where `known` (bool, [1, 1, *sizes]) is true, and sets the others to 0."""

    def __init__(self, known: Tensor) -> None:
        self.known = known

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.known

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return y * self.known

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(self.known, y, x)  # exact, unlike a sum

    def nearest_image(self, x: Tensor, y: Tensor) -> Tensor:
        return self.project(x.clamp(-1, 1), y)


class Luma(LinearOperator):
    """Gray image [B, 1, *sizes] of a colour image, with Pillow's weights w; `A^+ y = w y / |w|^2`."""

    def __call__(self, x: Tensor) -> Tensor:
        return (x * self._weights(x)).sum(1, keepdim=True)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        weights = self._weights(y)
        return y * weights / weights.square().sum()

    def picture(self, y: Tensor) -> Tensor:
        return y.expand(-1, 3, *y.shape[2:])

    def _weights(self, like: Tensor) -> Tensor:
        return torch.tensor(LUMA, device=like.device, dtype=like.dtype).view(3, *[1] * (like.dim() - 2))


class BlockMean(LinearOperator):
    """Means of blocks with `factor` pixels per axis, [B, C, *sizes / factor]; A^+ repeats each mean."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        return interpolate(x, [size // self.factor for size in x.shape[2:]], mode="area")

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return interpolate(y, scale_factor=float(self.factor), mode="nearest")


def middle_half(sizes: Sequence[int]) -> list[slice]:
    """Return the middle half of each axis."""
    return [slice(size // 4, size - size // 4) for size in sizes]
