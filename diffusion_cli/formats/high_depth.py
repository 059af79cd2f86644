"""PNG and TIFF images of 8 or 16 bits or floating-point values."""

from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from PIL import Image
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffusion_cli.errors import FormatError, UsageError
from diffusion_cli.formats.base import STRICT, Original, SampleFormat, Shape
from diffusion_cli.formats.files import SUFFIXES
from diffusion_cli.formats.lossy import lossy_format
from diffusion_cli.formats.pixel_readers import read_numbers, read_with_opacity
from diffusion_cli.formats.ranged import Dtype, Finite, Range, RangedImage, ranges
from diffusion_cli.formats.uint8 import Uint8Image, to_bytes


@dataclass(frozen=True, config=STRICT)
class HighDepthImage(RangedImage):
    """PNG or TIFF images of any depth and number of channels, with a stated value range.

    Args:
        dtype: dtype of the values in files.
        low: value that becomes -1, one for all channels or one per channel.
        high: value that becomes 1, likewise.
        file: file type of samples.
        mode: LA for gray and opacity, RGBA for colour and opacity; previews are composited over white. None for
            other channels.
    """

    kind: ClassVar[str] = "raster"
    dtype: Dtype
    low: list[Finite]
    high: list[Finite]
    file: Literal["png", "tiff"]
    mode: Literal["LA", "RGBA"] | None = None

    def __post_init__(self) -> None:
        self.check_range()

    def to_dict(self) -> dict[str, Any]:
        """Return the format as plain data, without `mode` if None, as older versions wrote it."""
        return {key: value for key, value in super().to_dict().items() if key != "mode" or value}

    @property
    def suffix(self) -> str:
        return {"png": ".png", "tiff": ".tif"}[self.file]

    @property
    def suffixes(self) -> tuple[str, ...]:
        return SUFFIXES

    def to_numbers(self, values: np.ndarray) -> np.ndarray:
        if self.dtype == "float32":
            return values.astype(np.float32)
        limits = np.iinfo(self.dtype)
        return np.rint(values).clip(limits.min, limits.max).astype(self.dtype)

    def to_values(self, numbers: np.ndarray) -> np.ndarray:
        return numbers

    def decode(self, data: bytes) -> Tensor:
        return self.samples(self.held(data))

    def original(self, data: bytes) -> Original:
        return Original(self.held(data).astype(np.float64), {})

    def held(self, data: bytes) -> np.ndarray:
        """Return the values [C, H, W] of a file; FormatError if it is malformed, or of another dtype."""
        numbers = read_with_opacity(data, self.mode) if self.mode else read_numbers(data)
        if numbers.dtype.name != self.dtype:
            raise FormatError(f"has dtype {numbers.dtype}; expected {self.dtype}")
        return numbers

    def lossy(self, data: bytes) -> str | None:
        return lossy_format(data)

    def write_values(self, values: np.ndarray, path: Path) -> None:
        numbers = np.ascontiguousarray(self.to_numbers(values).transpose(1, 2, 0))
        channels = numbers.shape[2]
        numbers = numbers.squeeze(2) if channels == 1 else numbers
        if self.file == "png":
            Image.fromarray(numbers).save(path, format="PNG")
            return
        import tifffile

        tifffile.imwrite(
            path, numbers, photometric="rgb" if channels == 3 or self.mode == "RGBA" else "minisblack",
            planarconfig=None if channels == 1 else "contig", metadata=None, software=False,
            extrasamples=["unassalpha"] if self.mode else None,
        )  # fmt: skip

    def to_rgb(self, samples: Tensor) -> Tensor:
        if self.mode is None:
            return super().to_rgb(samples)
        opacity = (samples[:, -1:].float() + 1) / 2
        return to_bytes(samples[:, :-1] * opacity + (1 - opacity))

    def picture_shape(self, shape: Shape) -> tuple[int, int, int]:
        return super().picture_shape((shape[0] - (self.mode is not None), *shape[1:]))

    @property
    def note(self) -> str:
        return (
            "previews with 256 values over the stated range, composited over white"
            if self.mode
            else super().note
        )


def has_own_numbers(form: SampleFormat) -> bool:
    """Return whether pixels are arbitrary values rather than colours."""
    return not isinstance(form, Uint8Image) and not (
        isinstance(form, HighDepthImage) and form.mode is not None
    )


def image_form(
    dtype: str, channels: int, given: Range | list[Range] | None, mode: Literal["LA", "RGBA"] | None = None
) -> SampleFormat:
    """Return the format of images with a dtype and range; without a range, the whole range of an integer dtype.

    8-bit gray and RGB without a range is `Uint8Image`. With a range it is stored as PNG, as are 16-bit gray and 8-bit
    images with opacity (`mode`); everything else is stored as TIFF.

    Raises UsageError or FormatError for an invalid range or dtype.
    """
    if dtype not in get_args(Dtype):
        raise FormatError(f"has dtype {dtype}; supported are {', '.join(get_args(Dtype))}")
    if given is None and dtype == "float32":
        raise UsageError("dataset.range", None, "floating-point images need a range", "give [low,high]")
    if given is None and dtype == "uint8" and channels in (1, 3):
        return Uint8Image()
    if given is None:
        limits = np.iinfo(dtype)
        given = [float(limits.min), float(limits.max)]
    low, high = ranges(given, channels)
    png = (dtype, channels) in (("uint8", 1), ("uint8", 3), ("uint16", 1)) or (dtype == "uint8" and mode)
    return HighDepthImage(dtype, low, high, "png" if png else "tiff", mode)  # pyright: ignore[reportArgumentType]
