"""An image file of any kind becomes an image of one shape, a volume float32 [C, D, H, W]."""

import math
from dataclasses import fields, is_dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_cli.errors import FormatError, UsageError
from diffusion_cli.formats import (
    HighDepthImage,
    Range,
    RangedImage,
    SampleFormat,
    Shape,
    Uint8Image,
    Volume,
    image_form,
)
from diffusion_cli.formats.dicom import dicom_form, is_dicom
from diffusion_cli.formats.files import DECODING, flattened, is_turned, parsed, upright
from diffusion_cli.formats.pixel_readers import depth_of, is_cmyk, mode_with_opacity
from diffusion_cli.formats.volume import read_volume

SPARE = 2  # times the size, from which the Lanczos filter takes what it needs
BYTES_A_PIXEL = 4  # of a decoded image, with opacity
ADDED_FIELDS = {("Decoder", "srgb"): False, ("Raster", "mode"): None}
"""Fields that older versions lacked, each with the value that stands for their behaviour."""
KEY_NAMES = {
    "ImageDecoder": "Decoder", "HighDepthDecoder": "DeepDecoder", "NoResize": "Exact", "Uint8Image": "Picture",
    "HighDepthImage": "Raster", "RangedImage": "Ranged", "PointCloud": "PointSet",
}  # fmt: skip
"""Names of classes in keys of cached latents: those of older versions, so that their keys stay valid."""


class FileDecoder(Protocol):
    """What makes an array of the bytes of a file; FormatError if it cannot."""

    @property
    def shape(self) -> Shape:
        """Of what it returns."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Of what it returns."""
        ...

    def __call__(self, data: bytes) -> np.ndarray: ...


def key_text(decoder: Any) -> str:
    """Return the text that identifies a decoder or format in the keys of cached latents.

    It lists the fields, as `Exact(form=Picture(), shape=(1, 8, 8))`. A field of `ADDED_FIELDS` with the value of older
    versions is omitted, so that keys of older versions stay valid.
    """
    if hasattr(decoder, "_asdict"):
        values = decoder._asdict()
    elif is_dataclass(decoder):
        values = {field.name: getattr(decoder, field.name) for field in fields(decoder)}
    else:
        return repr(decoder)
    kind = KEY_NAMES.get(type(decoder).__name__, type(decoder).__name__)
    parts = [
        f"{name}={key_text(value)}"
        for name, value in values.items()
        if (kind, name) not in ADDED_FIELDS or value != ADDED_FIELDS[kind, name]
    ]
    return f"{kind}({', '.join(parts)})"


class ImageDecoder(NamedTuple):
    """Decodes image files to uint8 of a `shape`, 1 or 3 channels, height and width.

    In this order: EXIF orientation applied; 16-bit gray v becomes round(v / 257); transparency laid on `background`;
    with `srgb`, colours converted to sRGB from the file's profile; gray (ITU-R 601 luma) or RGB; the largest centred
    part of the shape's aspect, resized by an antialiased Lanczos filter: of a square, that is resizing the short side
    and cropping the centre. An image of the right size is untouched. Deeper files than of 8 bits are refused but with
    `reduced`.

    A JPEG of at least 2 SPARE times the size is decoded at 1/2, 1/4 or 1/8 of its own, to no less than SPARE
    times the size, and resized from there: in a half to a quarter of the time, and of photographs within one
    gray value of 255 on average, less than from one good filter to another.
    """

    shape: tuple[int, int, int]
    background: Literal["white", "black"]
    reduced: bool
    srgb: bool = True

    @property
    def dtype(self) -> np.dtype:
        """Bytes."""
        return np.dtype(np.uint8)

    def size(self, data: bytes) -> tuple[int, ...]:
        """Return the height and width of a file's image."""
        image = parsed(data)
        return image.size if is_turned(image) else image.size[::-1]

    def __call__(self, data: bytes) -> np.ndarray:
        """Raises FormatError if the file cannot be decoded faithfully."""
        if not self.reduced and (depth := depth_of(data)) != "uint8":
            raise FormatError(
                f"holds {depth}, and the first file bytes; separate them, or set dataset.depth=8"
            )
        channels, *wanted = self.shape
        image = parsed(data)
        size, target = image.size, wanted if is_turned(image) else wanted[::-1]
        drafted = image.draft(None, (SPARE * target[0], SPARE * target[1]))
        with DECODING.hold(BYTES_A_PIXEL * image.width * image.height):
            if drafted is None or image.size == size:
                image = _resized(self._flattened(upright(image)), wanted)
            else:  # turned at the end: where no eighth of the size is whole, the right and the lower edge reach too far
                _, (_, _, width, _) = drafted  # of the file's image, in pixels of this one
                image = upright(_resized(self._flattened(image), target[::-1], size, size[0] / width))
        return np.asarray(image).reshape(*wanted, channels).transpose(2, 0, 1)

    def _flattened(self, image: Image.Image) -> Image.Image:
        return flattened(image, self.shape[0], self.background, self.srgb)


def _resized(
    image: Image.Image,
    wanted: list[int],
    size: tuple[int, int] | None = None,
    scale: float = 1.0,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """The centred part of an image that may be smaller, by `scale`, than what has a `size` in the file.

    It has the aspect of the height and width that are wanted, and is resized to these.
    """
    (width, height), (rows, columns) = size or image.size, wanted
    across = min(width, max(1, height * columns // rows))
    down = min(height, max(1, width * rows // columns))
    left, top = (width - across) // 2, (height - down) // 2
    part = (left, top, left + across, top + down)
    if (across, down) == (columns, rows):
        return image.crop(part)
    box = (part[0] / scale, part[1] / scale, part[2] / scale, part[3] / scale)
    return image.resize((columns, rows), resample, box=box)


class HighDepthDecoder(NamedTuple):
    """Decodes files of a numeric format to float32 in [-1, 1], cropped and resized as by `ImageDecoder`."""

    form: RangedImage
    shape: Shape

    @property
    def dtype(self) -> np.dtype:
        """Real numbers."""
        return np.dtype(np.float32)

    def size(self, data: bytes) -> tuple[int, ...]:
        """Return the height and width of a file's image."""
        return tuple(self.form.decode(data).shape[1:])

    def __call__(self, data: bytes) -> np.ndarray:
        """Raises FormatError as `RangedImage.decode`, and for another number of channels."""
        sample = self.form.decode(data)
        if len(sample) != self.shape[0]:
            raise FormatError(f"has {len(sample)} channels, not {self.shape[0]}")
        return center_crop_resize(sample, self.form, self.shape).numpy()


def center_crop_resize(
    sample: Tensor, form: RangedImage, shape: Shape, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Tensor:
    """An image [C, h, w] as stored, resized to the height and width of a shape if it has others.

    Colours with opacity are averaged in proportion to it, so that invisible colours do not bleed into edges.
    """
    _, *wanted = shape
    if list(sample.shape[1:]) == wanted:
        return sample

    def resized(channels: Tensor) -> Tensor:
        images = [_resized(Image.fromarray(each), wanted, resample=resample) for each in channels.numpy()]
        return torch.from_numpy(np.stack([np.asarray(image) for image in images]))

    if not (isinstance(form, HighDepthImage) and form.mode):
        return form.quantize(resized(sample))
    colours, opacity = sample[:-1], (sample[-1:] + 1) / 2
    weights = resized(opacity)
    colours = torch.where(weights > 0, resized(colours * opacity) / weights, resized(colours))
    return form.quantize(torch.cat([colours, 2 * weights - 1]))


def form_of_files(
    first: bytes,
    channels: int,
    given: Range | list[Range] | Literal["window"] | None,
    depth: Literal["auto", 8],
    rules: int,
) -> SampleFormat:
    """The format of images like the first one; UsageError about the settings or the file if there is none.

    The first version of the rules has no modes with opacity, and takes CMYK for any four channels.

    A file that cannot be read passes for one of bytes: what is wrong is told with what is wrong with the others.
    """
    if depth == 8:
        if given is not None or channels not in (1, 3):
            raise UsageError(
                "dataset.depth", 8, "is for gray or colour images, and without dataset.range", "leave one out"
            )
        return Uint8Image()
    if is_dicom(first):
        if channels != 1:
            raise UsageError("dataset.channels", channels, "DICOM images are gray", "set dataset.channels=1")
        return dicom_form(first, given)
    if given == "window":
        raise UsageError("dataset.range", "window", "is of DICOM files", "give [low,high]")
    mode = None
    if rules > 1:
        mode = mode_with_opacity(first, channels)
        if channels == 4 and is_cmyk(first):
            raise UsageError(
                "dataset.channels",
                4,
                "the first image is in CMYK",
                "convert it to RGBA, or set dataset.channels=3",
            )
    form = image_form(depth_of(first), channels, given, mode)
    found = _channels(form, first) if isinstance(form, RangedImage) else None
    if found not in (None, channels):
        raise UsageError(
            "dataset.channels", channels, f"the images have {found}", f"set dataset.channels={found}"
        )
    return form


def _channels(form: RangedImage, data: bytes) -> int | None:
    try:
        return len(form.decode(data))
    except ValueError:
        return None


class VolumeDecoder(NamedTuple):
    """Decodes NIfTI and .npy to float32 [channels, *sizes] in [-1, 1], as the format maps values.

    The largest centred block of the proportions of `sizes`, resized by an antialiased trilinear filter: a triangle as
    wide as two voxels of the result or of the file, whichever are larger. One of the right size is untouched.
    """

    form: Volume
    shape: Shape
    spacing: list[float] | None
    """Of the voxels of all files along W, H and D, or None: those of .npy are of no size."""
    dtype = np.dtype(np.float32)

    def __call__(self, data: bytes) -> np.ndarray:
        """Raises FormatError if the file cannot be decoded, or has other channels, or voxels of another size by 1 %."""
        held = read_volume(data)
        if self.spacing and held.spacing and not np.allclose(held.spacing, self.spacing, rtol=0.01, atol=0):
            found, wanted = (
                " x ".join(f"{side:.4g}" for side in each) for each in (held.spacing, self.spacing)
            )
            raise FormatError(
                f"has voxels of {found}, and the first file of {wanted}; resample them to one spacing"
            )
        values = torch.from_numpy(held.values)
        channels, *sizes = self.shape
        if len(values) != channels:
            raise FormatError(f"has {len(values)} channels; set dataset.channels to that")
        factor = _voxels_each(values.shape[1:], sizes)
        for axis, size in enumerate(sizes, start=1):
            matrix = _triangles(values.shape[axis], size, factor)
            values = (values.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
        return self.form.scaled(values).numpy()


def resized_affine(affine: list[list[float]], given: Shape, sizes: list[int]) -> list[list[float]]:
    """Where the voxels of a file of `given` sizes lie once `VolumeDecoder` has resized it, as `Volume.affine`."""
    matrix, factor = np.array(affine), _voxels_each(given, sizes)
    first = [_first(have, want, factor) for have, want in zip(given, sizes, strict=True)]
    origin = matrix @ [*reversed(first), 1.0]
    return np.column_stack([factor * matrix[:, :3], origin]).tolist()


def _voxels_each(given: Shape, sizes: Shape | list[int]) -> float:
    """Voxels of a file's volume along each side of one of the result."""
    return min(have / want for have, want in zip(given, sizes, strict=True))


def _first(given: int, wanted: int, factor: float) -> float:
    """Where along an axis of a file the first voxel of the result has its centre."""
    return math.floor((given - wanted * factor) / 2) + factor / 2 - 0.5


def _triangles(given: int, wanted: int, factor: float) -> Tensor:
    """The weights [wanted, given] of the values along an axis."""
    centres = _first(given, wanted, factor) + factor * torch.arange(wanted, dtype=torch.float64)[:, None]
    weights = (1 - (torch.arange(given) - centres).abs() / max(factor, 1.0)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


class NoResize(NamedTuple):
    """Reads files of one format and shape, neither cropped nor resized; FormatError as `SampleFormat.read`."""

    form: SampleFormat
    shape: Shape

    @property
    def dtype(self) -> np.dtype:
        """Bytes, or real numbers."""
        return np.dtype(np.uint8 if isinstance(self.form, Uint8Image) else np.float32)

    def __call__(self, data: bytes) -> np.ndarray:
        return self.form.read(data, self.shape).numpy()
