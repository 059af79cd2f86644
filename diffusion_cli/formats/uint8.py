"""8-bit images."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffusion_cli.errors import FormatError
from diffusion_cli.formats.base import STRICT, SampleFormat, Shape
from diffusion_cli.formats.files import SUFFIXES, flattened, has_gray_palette, is_gray, opened
from diffusion_cli.formats.lossy import lossy_format
from diffusion_cli.formats.range_check import INTENDED, disagreement


@dataclass(frozen=True, config=STRICT)
class Uint8Image(SampleFormat):
    """8-bit gray or RGB images, stored as PNG; 0 and 255 become -1 and 1."""

    kind: ClassVar[str] = "picture"

    @property
    def suffix(self) -> str:
        return ".png"

    @property
    def suffixes(self) -> tuple[str, ...]:
        return SUFFIXES

    @property
    def half_range(self) -> float:
        return 127.5

    def quantize(self, x: Tensor) -> Tensor:
        return to_bytes(x)

    def write(self, sample: Tensor, path: Path) -> None:
        Image.fromarray(sample.permute(1, 2, 0).squeeze(2).contiguous().numpy()).save(path, format="PNG")

    def read(self, data: bytes, shape: Shape) -> Tensor:
        """Return the pixels of an image file of any supported type; gray becomes RGB if `shape` has three channels."""
        image, (channels, height, width) = opened(data), shape
        if (image.height, image.width) != (height, width):
            raise FormatError(f"has {image.width} x {image.height} pixels; expected {width} x {height}")
        if channels == 1 and not (is_gray(image) or has_gray_palette(image)):
            raise FormatError("is in colour, not gray")
        pixels = torch.from_numpy(np.array(flattened(image, channels, "white")))
        return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)

    def lossy(self, data: bytes) -> str | None:
        return lossy_format(data)

    def remark(self, images: Sequence[np.ndarray]) -> str | None:
        found = disagreement(images, [0.0], [255.0])
        if found is None:
            return None
        return f"dataset.range=null: bytes have the range [0,255], and {found}; {INTENDED}"

    def to_rgb(self, samples: Tensor) -> Tensor:
        return samples

    def picture_shape(self, shape: Shape) -> tuple[int, int, int]:
        channels, height, width = shape
        return channels, height, width


def to_bytes(images: Tensor) -> Tensor:
    """Round [-1, 1] to uint8 as in a saved PNG: the nearest of 256 values, ties to even."""
    return images.float().add(1).mul(127.5).clamp(0, 255).round().to(torch.uint8)
