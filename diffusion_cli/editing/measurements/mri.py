"""Magnetic resonance imaging with an incomplete k-space."""

from abc import abstractmethod
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from diffusion_cli.conditions.operators import LinearMeasurement, Shape
from diffusion_cli.errors import UsageError


class KSpace(LinearMeasurement):
    """Base class of samples of the orthonormal Fourier transform of images, or of the slices of volumes.

    Images of one channel are real, those of two channels are real and imaginary parts. The measurement has shape
    [B, 1, *depth, samples, 2], with real and imaginary parts.

    Args:
        shape: shape of the images, [C, *sizes].

    Raises:
        UsageError: the images have neither one nor two channels.
    """

    least_axes = 2
    counts = False

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        if shape[0] not in (1, 2):
            problem = f"needs images with 1 channel, or 2 for complex values, but the model's have {shape[0]}"
            raise UsageError("measurement", type(self).__name__, problem, "use another measurement")
        height, width = shape[-2:]
        self.sampled = torch.fft.ifftshift(self._sampled(height, width))
        """Measured frequencies, bool [H, W], in the order of `torch.fft`."""

    @abstractmethod
    def _sampled(self, height: int, width: int) -> Tensor:
        """Return the measured frequencies, bool [H, W], with frequency 0 at [H // 2, W // 2]."""

    def __call__(self, x: Tensor) -> Tensor:
        values = x if self.shape[0] == 1 else torch.view_as_complex(x.movedim(1, -1).contiguous())[:, None]
        spectrum = torch.fft.fft2(values, norm="ortho")
        return torch.view_as_real(spectrum[..., self.sampled.to(x.device)])

    def picture(self, y: Tensor) -> Tensor:
        return self.adjoint(y)


class MRI(KSpace):
    """K-space with whole measured columns: the lowest frequencies, and others at random.

    Args:
        shape: shape of the images, [C, *sizes].
        acceleration: number of columns divided by the number of measured ones.
        centre: share of the columns that are measured for their low frequency.
        seed: seed of the other columns.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        acceleration: Annotated[float, Field(ge=1)] = 4.0,
        centre: Annotated[float, Field(ge=0, le=1)] = 0.08,
        seed: NonNegativeInt = 0,
    ) -> None:
        self.acceleration, self.centre, self.seed = acceleration, centre, seed
        super().__init__(shape)

    def _sampled(self, height: int, width: int) -> Tensor:
        count = max(1, round(width / self.acceleration))
        low = min(count, round(self.centre * width))
        order = torch.randperm(width, generator=torch.Generator().manual_seed(self.seed))
        frequency = (torch.arange(width) - width // 2).abs()
        near = frequency.argsort(stable=True)[:low]
        others = [place for place in order.tolist() if place not in near.tolist()]
        columns = torch.zeros(width, dtype=torch.bool)
        columns[[*near.tolist(), *others[: count - low]]] = True
        return columns.expand(height, width)


class RadialMRI(KSpace):
    """K-space that is measured along lines through its centre, at equal angles; each sample is the nearest frequency.

    Args:
        shape: shape of the images, [C, *sizes].
        spokes: number of lines.
    """

    def __init__(self, shape: Shape, *, spokes: PositiveInt = 16) -> None:
        self.spokes = spokes
        super().__init__(shape)

    def _sampled(self, height: int, width: int) -> Tensor:
        turn = torch.pi * torch.arange(self.spokes, dtype=torch.float64)[:, None] / self.spokes
        along = torch.linspace(-0.5, 0.5, 4 * max(height, width) + 1, dtype=torch.float64)
        rows, columns = ((direction * along) for direction in (turn.sin(), turn.cos()))
        sampled = torch.zeros(height, width, dtype=torch.bool)
        rows = (height // 2 + height * rows).round().long().clamp(0, height - 1)
        columns = (width // 2 + width * columns).round().long().clamp(0, width - 1)
        sampled[rows, columns] = True
        return sampled
