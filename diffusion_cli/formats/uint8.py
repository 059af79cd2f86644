"""Images in bytes."""

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
from diffusion_cli.formats.range_check import disagreement


@dataclass(frozen=True, config=STRICT)
class Uint8Image(SampleFormat):
    """Gray or RGB images in bytes, as PNG; -1 is 0 and 1 is 255."""

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
        """Return the pixels of any kind of image file in bytes; gray becomes RGB where that is wanted."""
        image, (channels, height, width) = opened(data), shape
        if (image.height, image.width) != (height, width):
            raise FormatError(f"is {image.width} x {image.height}, not {width} x {height} pixels")
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
        remedy = "give dataset.range=[low,high] of all images if this is not intended"
        return f"dataset.range=null: bytes have the range [0,255], and {found}; {remedy}"

    def to_rgb(self, samples: Tensor) -> Tensor:
        return samples

    def picture_shape(self, shape: Shape) -> tuple[int, int, int]:
        channels, height, width = shape
        return channels, height, width


def to_bytes(images: Tensor) -> Tensor:
    """Quantise [-1, 1] to uint8 as a saved PNG has it: the nearest of the 256 values, ties to even."""
    return images.float().add(1).mul(127.5).clamp(0, 255).round().to(torch.uint8)
