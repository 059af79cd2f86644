"""A measurement of images."""

from diffusion_cli.editing import LinearMeasurement
from diffusion_cli.editing.base import Shape
from pydantic import PositiveInt
from torch import Tensor


class Example(LinearMeasurement):
    """Differences of pixels and the pixels at a distance on their right.

    A linear measurement y = A x needs only A: its adjoint is the vector-Jacobian product. For others, derive from
    `Measurement`; its `picture` shows y as an image.

    Args:
        shape: shape of the model's images; the program passes it.
        distance: distance of the two pixels
    """

    counts = False  # differences can be negative, so they count no photons

    def __init__(self, shape: Shape, *, distance: PositiveInt = 1) -> None:
        super().__init__(shape)
        self.distance = distance

    def __call__(self, x: Tensor) -> Tensor:
        """Return y for images x [B, C, H, W]; any shape [B, ...]."""
        return x[..., self.distance :] - x[..., : -self.distance]
