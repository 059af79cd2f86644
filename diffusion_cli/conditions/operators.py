"""Measurements of images, and projections onto them, for conditions and for restoration."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion_cli.errors import UsageError, option_name

FARTHEST = 1000.0  # bound of the shift of an image, in units of the measurement
WILDEST = 100.0  # pixel values are clipped to this
HALVINGS = 40
ITERATIONS = 100  # most steps of conjugate gradients
TOLERANCE = 50  # relative residual at which conjugate gradients stop, in roundings of the dtype
SMOOTHING = 0.01  # of pictures of measurements
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's gray

Shape = tuple[int, ...]


class Measurement(ABC):
    """Base class of measurements y = A(x), which are differentiable in x.

    Args:
        shape: shape of the images, [C, *sizes].

    Raises:
        UsageError: the images have too few axes.
    """

    counts = True
    """Whether A(x) - A(-1) is never negative for images in [-1, 1], so that it can be an expected number of photons."""

    least_axes = 1
    """Least number of axes of the images beside the channels."""

    def __init__(self, shape: Shape) -> None:
        if len(shape) - 1 < self.least_axes:
            name = option_name(type(self).__name__)
            raise UsageError("measurement", name, "needs images or volumes", "use another measurement")
        self.shape = shape

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Return A(x) for images x [B, C, *sizes]."""

    @abstractmethod
    def picture(self, y: Tensor) -> Tensor:
        """Return images [B, C, *sizes] that visualize the measurement."""


class LinearMeasurement(Measurement):
    """Base class of linear measurements y = A x, with their adjoint A^T."""

    def adjoint(self, y: Tensor) -> Tensor:
        """Return A^T y, images [B, C, *sizes]; by default the vector-Jacobian product of A."""
        with torch.enable_grad():
            x = self._no_image(y).requires_grad_()
            return torch.autograd.grad(self(x), x, y)[0]

    def _no_image(self, y: Tensor) -> Tensor:
        """Return zeros in the shape of the images of a measurement."""
        return y.new_zeros(len(y), *self.shape)

    def regularized_inverse(self, y: Tensor, prior: float | Tensor, noise: float | Tensor) -> Tensor:
        """Return the images `A^T (prior A A^T + noise 1)^-1 y`, by conjugate gradients.

        They solve `(prior A^T A + noise 1) x = A^T y`, whose right side lies in the range of the matrix also where the
        noise of y is not in the range of A. Each image stops by itself, at a residual near rounding of |A^T y|, so that
        it does not depend on the others.

        Args:
            y: measurements [B, ...].
            prior: variance of the images, 0-d or one per image [B, 1, ...].
            noise: variance of the noise of the measurement, likewise.
        """
        b = self.adjoint(y)
        prior, noise = (torch.as_tensor(level).to(b) for level in (prior, noise))
        x, residual, direction, norm = torch.zeros_like(b), b, b, _squares(b)
        enough = (TOLERANCE * torch.finfo(b.dtype).eps) ** 2 * norm
        for _ in range(ITERATIONS):
            active = norm > enough
            if not active.any():
                break
            image = prior * self.adjoint(self(direction)) + noise * direction
            step = torch.where(active, norm / _dots(direction, image), 0.0)
            x, residual = x + step * direction, residual - step * image
            before, norm = norm, _squares(residual)
            ratio = torch.where(active, norm / before, 0.0)
            direction = torch.where(active, residual + ratio * direction, direction)
        return x

    def picture(self, y: Tensor) -> Tensor:
        """Return `A^T (A A^T + r 1)^-1 y`, the regularized image of least squares, with r = `SMOOTHING`."""
        return self.regularized_inverse(y, 1.0, SMOOTHING)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each image, [B, 1, ...]."""
    return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.dim() - 1))


def _squares(a: Tensor) -> Tensor:
    return _dots(a, a)


class LinearOperator(LinearMeasurement):
    """Base class of linear measurements with `A A^+ = 1`, so that A^+ A is a projection."""

    def __init__(self) -> None:
        """Take no shape: `pseudo_inverse` shows that of the images."""

    def _no_image(self, y: Tensor) -> Tensor:
        return torch.zeros_like(self.pseudo_inverse(y))

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
