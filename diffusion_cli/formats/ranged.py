"""Base class of image formats with a stated value range."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from diffusion_cli.errors import FormatError, UsageError
from diffusion_cli.formats.base import Shape, ValueFormat
from diffusion_cli.formats.range_check import INTENDED, disagreement
from diffusion_cli.formats.uint8 import to_bytes

Dtype = Literal["uint8", "uint16", "int16", "float32"]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Range = Annotated[list[Finite], Field(min_length=2, max_length=2)]
"""[low, high]: the values that become -1 and 1."""


class RangedImage(ValueFormat):
    """Images with any number of channels; their value range [low, high] becomes [-1, 1].

    `x = 2 (v - low) / (high - low) - 1`. Values outside the range are clipped; values that are not finite are refused.
    In float32, x represents each of 2^16 values exactly. The range is one pair for all channels, or one per channel.
    """

    dtype: Dtype
    """NumPy dtype name of the values in files."""
    low: list[float]
    high: list[float]

    @property
    def half_range(self) -> float:
        """Factor from a difference in x to one in file values; 1 if channels differ in their range."""
        return (self.high[0] - self.low[0]) / 2 if len(self.low) == 1 else 1.0

    @property
    def note(self) -> str:
        return "previews with 256 gray values over the stated range, with non-colour channels side by side"

    def check_range(self) -> None:
        """Raise FormatError unless every pair is increasing."""
        if not self.low or len(self.low) != len(self.high):
            raise FormatError("a range must be [low, high], or one such pair per channel")
        if not all(low < high for low, high in zip(self.low, self.high, strict=True)):
            raise FormatError("a range must increase from low to high")

    def samples(self, values: np.ndarray) -> Tensor:
        """Return values [..., C, H, W] as stored samples; FormatError if one is not finite."""
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise FormatError("has values that are not finite")
        low, half = self._scale(values.shape[-3])
        x = values.astype(np.float64)
        for step, by in ((np.subtract, low), (np.divide, half), (np.subtract, 1)):
            step(x, by, out=x)  # in place to save memory
        return torch.from_numpy(x.clip(-1, 1, out=x).astype(np.float32))

    def values(self, samples: Tensor) -> np.ndarray:
        """Return the values, float64, of samples in about [-1, 1], [..., C, H, W]."""
        low, half = self._scale(samples.shape[-3])
        return (samples.double().cpu().numpy().clip(-1, 1) + 1) * half + low

    def beyond(self, values: np.ndarray) -> np.ndarray:
        low, half = self._scale(len(values))
        return np.maximum(np.abs(values - low - half) - half, 0)

    def rounded(self, values: np.ndarray) -> np.ndarray:
        return self.to_values(self.to_numbers(values))

    def _scale(self, channels: int) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.array(self.low[:channels]), np.array(self.high[:channels])
        return low[:, None, None], (high - low)[:, None, None] / 2

    def remark(self, images: Sequence[np.ndarray]) -> str | None:
        channels = len(images[0])
        found = disagreement(images, self.low[:channels], self.high[:channels])
        if found is None:
            return None
        pairs = [f"[{low:g},{high:g}]" for low, high in zip(self.low, self.high, strict=True)]
        shown = pairs[0] if len(pairs) == 1 else f"[{','.join(pairs)}]"
        return f"dataset.range={shown}: {found}; {INTENDED}"

    @abstractmethod
    def to_numbers(self, values: np.ndarray) -> np.ndarray:
        """Return the numbers in files, [..., C, H, W], nearest to values."""

    @abstractmethod
    def to_values(self, numbers: np.ndarray) -> np.ndarray:
        """Return the values of numbers in files, float64 [..., C, H, W]."""

    def numbers(self, samples: Tensor) -> np.ndarray:
        """Return the numbers in files nearest to samples in about [-1, 1], [..., C, H, W]."""
        return self.to_numbers(self.values(samples))

    def from_numbers(self, numbers: np.ndarray) -> Tensor:
        """Return numbers in files, [..., C, H, W], as stored samples."""
        return self.samples(self.to_values(numbers))

    @abstractmethod
    def decode(self, data: bytes) -> Tensor:
        """Return the image of a file, of any size and number of channels, as stored; FormatError if malformed."""

    def quantize(self, x: Tensor) -> Tensor:
        return self.from_numbers(self.numbers(x)).to(x.device)

    def read(self, data: bytes, shape: Shape) -> Tensor:
        sample = self.decode(data)
        if tuple(sample.shape) != tuple(shape):
            raise FormatError(f"has shape {tuple(sample.shape)} (channels, height, width); expected {shape}")
        return sample

    def to_rgb(self, samples: Tensor) -> Tensor:
        pixels = to_bytes(samples)
        count, channels, height, width = pixels.shape
        if channels in (1, 3):
            return pixels
        return pixels.transpose(1, 2).reshape(count, 1, height, channels * width)

    def picture_shape(self, shape: Shape) -> tuple[int, int, int]:
        channels, height, width = shape
        return (channels, height, width) if channels in (1, 3) else (1, height, channels * width)


def ranges(given: Range | list[Range], channels: int) -> tuple[list[float], list[float]]:
    """Return lows and highs of one range for all channels, or one per channel; UsageError about `dataset.range`."""
    pairs = [pair for pair in given if isinstance(pair, list)] or [[float(end) for end in given]]  # pyright: ignore
    shown = str(given).replace(" ", "")
    if len(pairs) not in (1, channels):
        raise UsageError(
            "dataset.range",
            shown,
            f"has {len(pairs)} pairs, but the images have {channels} channels",
            "give one pair, or one per channel",
        )
    if not all(low < high for low, high in pairs):
        raise UsageError("dataset.range", shown, "must increase", "give [low,high] with low less than high")
    return [float(low) for low, _ in pairs], [float(high) for _, high in pairs]
