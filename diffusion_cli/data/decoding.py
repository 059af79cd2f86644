"""An image file of any kind becomes bytes [C, R, R], a volume float32 [C, D, H, W]."""

import math
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_cli.forms import Form, Picture, Shape, Volume
from diffusion_cli.forms.files import flattened, parsed, upright
from diffusion_cli.forms.volume import read_volume

SPARE = 2  # times the resolution, from which the Lanczos filter takes what it needs


class FileDecoder(Protocol):
    """What makes an array of the bytes of a file; ValueError if it cannot."""

    @property
    def shape(self) -> Shape:
        """Of what it returns."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Of what it returns."""
        ...

    def __call__(self, data: bytes) -> np.ndarray: ...


class Decoder(NamedTuple):
    """Decodes PNG, JPEG, WebP and TIFF to uint8 [channels, resolution, resolution].

    In this order: EXIF orientation applied; 16-bit gray v becomes round(v / 257); transparency laid on
    `background`; gray (ITU-R 601 luma) or RGB; the largest centred square, resized by an antialiased Lanczos
    filter, which is resizing the short side and cropping the centre. A square of the right size is untouched.

    A JPEG of at least 2 SPARE times the resolution is decoded at 1/2, 1/4 or 1/8 of its size, to no less than SPARE
    times the resolution, and resized from there: in a half to a quarter of the time, and of photographs within one
    gray value of 255 on average, less than from one good filter to another.
    """

    resolution: int
    channels: int
    background: Literal["white", "black"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what it returns."""
        return self.channels, self.resolution, self.resolution

    @property
    def dtype(self) -> np.dtype:
        """Bytes."""
        return np.dtype(np.uint8)

    def __call__(self, data: bytes) -> np.ndarray:
        """Raises ValueError if the file cannot be decoded faithfully."""
        image = parsed(data)
        size = image.size
        drafted = image.draft(None, (SPARE * self.resolution, SPARE * self.resolution))
        if drafted is None or image.size == size:
            image = self._resized(self._flattened(upright(image)), size=None)
        else:  # turned at the end: where no eighth of the size is whole, the right and the lower edge reach too far
            _, (_, _, width, _) = drafted  # of the file's image, in pixels of this one
            image = upright(self._resized(self._flattened(image), size, size[0] / width))
        return np.asarray(image).reshape(self.resolution, self.resolution, self.channels).transpose(2, 0, 1)

    def _flattened(self, image: Image.Image) -> Image.Image:
        return flattened(image, self.channels, self.background)

    def _resized(self, image: Image.Image, size: tuple[int, int] | None, scale: float = 1.0) -> Image.Image:
        """The centred square of an image that may be smaller, by `scale`, than what has a `size` in the file."""
        width, height = size or image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        square = (left, top, left + side, top + side)
        if side == self.resolution:
            return image.crop(square)
        box = (left / scale, top / scale, (left + side) / scale, (top + side) / scale)
        return image.resize((self.resolution, self.resolution), Image.Resampling.LANCZOS, box=box)


class VolumeDecoder(NamedTuple):
    """Decodes NIfTI and .npy to float32 [channels, *sizes] in [-1, 1], as the form maps values.

    The largest centred block of the proportions of `sizes`, resized by an antialiased trilinear filter: a triangle as
    wide as two voxels of the result or of the file, whichever are larger. One of the right size is untouched.
    """

    form: Volume
    shape: Shape
    dtype = np.dtype(np.float32)

    def __call__(self, data: bytes) -> np.ndarray:
        """Raises ValueError if the file cannot be decoded, or has other channels."""
        values = torch.from_numpy(read_volume(data).values)
        channels, *sizes = self.shape
        if len(values) != channels:
            raise ValueError(f"has {len(values)} channels; set dataset.channels to that")
        factor = voxels_each(values.shape[1:], sizes)
        for axis, size in enumerate(sizes, start=1):
            matrix = _triangles(values.shape[axis], size, factor)
            values = (values.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
        return self.form.scaled(values).numpy()


def voxels_each(given: Shape, sizes: Shape | list[int]) -> float:
    """Voxels of a file's volume along each side of one of the result."""
    return min(have / want for have, want in zip(given, sizes, strict=True))


def _triangles(given: int, wanted: int, factor: float) -> Tensor:
    """The weights [wanted, given] of the values along an axis."""
    start = math.floor((given - wanted * factor) / 2)
    centres = start + (torch.arange(wanted, dtype=torch.float64)[:, None] + 0.5) * factor - 0.5
    weights = (1 - (torch.arange(given) - centres).abs() / max(factor, 1.0)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


class Exact(NamedTuple):
    """Reads files of one form and shape, as they are, not cropped or resized; ValueError as `Form.read`."""

    form: Form
    shape: Shape

    @property
    def dtype(self) -> np.dtype:
        """Bytes, or real numbers."""
        return np.dtype(np.uint8 if isinstance(self.form, Picture) else np.float32)

    def __call__(self, data: bytes) -> np.ndarray:
        return self.form.read(data, self.shape).numpy()
