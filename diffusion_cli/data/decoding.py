"""Decoders from the bytes of an image or volume file to an array of fixed shape."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_cli.errors import FormatError, UsageError
from diffusion_cli.formats import (
    HighDepthImage,
    Original,
    Range,
    RangedImage,
    SampleFormat,
    Shape,
    Uint8Image,
    image_form,
)
from diffusion_cli.formats.dicom import dicom_form
from diffusion_cli.formats.dicom_reader import is_dicom, is_gray_dicom
from diffusion_cli.formats.files import DECODING, flattened, is_turned, parsed, upright
from diffusion_cli.formats.pixel_readers import depth_of, is_cmyk, mode_with_opacity

SPARE = 2  # least factor by which a JPEG's draft is larger than the target, for the Lanczos filter
BYTES_A_PIXEL = 4  # of a decoded image with opacity
OVERLAP = 1e-6  # least overlap of two pixels along an axis, above rounding errors
ADDED_FIELDS = {("Decoder", "srgb"): False, ("Raster", "mode"): None, ("VolumeDecoder", "target"): None}
"""Fields that older versions lacked, each with the value that reproduces their behaviour."""
KEY_NAMES = {
    "ImageDecoder": "Decoder", "HighDepthDecoder": "DeepDecoder", "NoResize": "Exact", "Uint8Image": "Picture",
    "HighDepthImage": "Raster", "RangedImage": "Ranged", "PointCloud": "PointSet",
}  # fmt: skip
"""Class names in the keys of cached latents: those of older versions, so that existing keys stay valid."""


class FileDecoder(Protocol):
    """Callable from the bytes of a file to an array; raises FormatError for a file that it cannot decode."""

    @property
    def shape(self) -> Shape:
        """Shape of the arrays."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the arrays."""
        ...

    def __call__(self, data: bytes) -> np.ndarray: ...


def key_text(decoder: Any) -> str:
    """Return the text that identifies a decoder or format in the keys of cached latents.

    It lists the fields, as in `Exact(form=Picture(), shape=(1, 8, 8))`. A field of `ADDED_FIELDS` with the value of
    older versions is omitted, so that keys of older versions stay valid.
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
    """Decodes image files to uint8 [C, H, W] with 1 or 3 channels.

    The steps, in order: apply the EXIF orientation; convert 16-bit gray v to round(v / 257); composite transparency
    over `background`; with `srgb`, convert colours from the file's ICC profile to sRGB; convert to gray (ITU-R 601
    luma) or RGB; crop the largest central part with the aspect of `shape`; resize it with an antialiased Lanczos
    filter. An image of the right size is unchanged.

    A JPEG of at least 2 SPARE times the target size is decoded at 1/2, 1/4 or 1/8 scale, but to at least SPARE times
    the target, and resized from there. This takes a quarter to half of the time, and changes photographs by less
    than one gray value of 255 on average, less than a change of the filter.

    Args:
        shape: [C, H, W] of the result.
        background: colour behind transparent pixels.
        reduced: whether to reduce files of more than 8 bits to 8 bits; otherwise they raise FormatError.
        srgb: whether to convert colours to sRGB.
    """

    shape: tuple[int, int, int]
    background: Literal["white", "black"]
    reduced: bool
    srgb: bool = True

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the arrays, uint8."""
        return np.dtype(np.uint8)

    def size(self, data: bytes) -> tuple[int, ...]:
        """Return height and width of the upright image of a file."""
        image = parsed(data)
        return image.size if is_turned(image) else image.size[::-1]

    def __call__(self, data: bytes) -> np.ndarray:
        """Return the decoded image; FormatError if the file cannot be decoded or would lose precision."""
        if not self.reduced and (depth := depth_of(data)) != "uint8":
            raise FormatError(
                f"has {depth} pixels, and the first file uint8; separate them, or set dataset.depth=8"
            )
        channels, *wanted = self.shape
        image = parsed(data)
        size, target = image.size, wanted if is_turned(image) else wanted[::-1]
        drafted = image.draft(None, (SPARE * target[0], SPARE * target[1]))
        with DECODING.hold(BYTES_A_PIXEL * image.width * image.height):
            if drafted is None or image.size == size:
                image = _resized(self._flattened(upright(image)), wanted)
            else:  # rotate last: if no eighth of the size is whole, the draft is padded at its right and lower edge
                _, (_, _, width, _) = drafted  # width of the original in pixels of the draft
                image = upright(_resized(self._flattened(image), target[::-1], size, size[0] / width))
        return np.asarray(image).reshape(*wanted, channels).transpose(2, 0, 1)

    def picture(self, image: Image.Image) -> np.ndarray:
        """Return an upright image of Pillow decoded; FormatError if its colours cannot be converted."""
        channels, *wanted = self.shape
        pixels = np.asarray(_resized(self._flattened(image), wanted))
        return pixels.reshape(*wanted, channels).transpose(2, 0, 1)

    def _flattened(self, image: Image.Image) -> Image.Image:
        return flattened(image, self.shape[0], self.background, self.srgb)


def _resized(
    image: Image.Image,
    wanted: list[int],
    size: tuple[int, int] | None = None,
    scale: float = 1.0,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """Crop the largest central part with the aspect of `wanted` (height, width), and resize it to `wanted`.

    `image` may be a draft, smaller than the file's `size` (width, height) by the factor `scale`.
    """
    width, height = size or image.size
    (top, down), (left, across) = central_part((height, width), wanted)
    rows, columns = wanted
    part = (left, top, left + across, top + down)
    if (across, down) == (columns, rows):
        return image.crop(part)
    box = (part[0] / scale, part[1] / scale, part[2] / scale, part[3] / scale)
    return image.resize((columns, rows), resample, box=box)


def central_part(given: Sequence[int], wanted: Sequence[int]) -> list[tuple[int, int]]:
    """Return start and length, by rows and by columns, of the largest central part with the aspect of `wanted`.

    Args:
        given: height and width of an image.
        wanted: height and width after resizing.
    """
    (height, width), (rows, columns) = given, wanted
    down, across = min(height, max(1, width * rows // columns)), min(width, max(1, height * columns // rows))
    return [((height - down) // 2, down), ((width - across) // 2, across)]


def resized_region(region: Tensor, part: Sequence[tuple[float, float]], wanted: Sequence[int]) -> Tensor:
    """Return a region after cropping and resizing: the pixels or voxels of which some part is in the region.

    Args:
        region: bool [*sizes].
        part: start and length of the crop along each axis.
        wanted: sizes of the result.

    Returns:
        The resized region, bool [*wanted].
    """
    inside = region.double()
    for axis, ((start, length), size) in enumerate(zip(part, wanted, strict=True)):
        low = start + length / size * torch.arange(size, dtype=torch.float64)[:, None]
        first = torch.arange(inside.shape[axis])
        overlaps = torch.minimum(low + length / size, first + 1) - torch.maximum(low, first) > OVERLAP
        inside = (inside.movedim(axis, -1) @ overlaps.double().T).movedim(-1, axis)
    return inside > 0


class HighDepthDecoder(NamedTuple):
    """Decodes files with values of a stated range to float32 in [-1, 1], cropped and resized as by `ImageDecoder`."""

    form: RangedImage
    shape: Shape

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the arrays, float32."""
        return np.dtype(np.float32)

    def size(self, data: bytes) -> tuple[int, ...]:
        """Return height and width of the image of a file."""
        return tuple(self.form.decode(data).shape[1:])

    def __call__(self, data: bytes) -> np.ndarray:
        """Return the decoded image; FormatError as `RangedImage.decode`, or for a wrong number of channels."""
        sample = self.form.decode(data)
        if len(sample) != self.shape[0]:
            raise FormatError(f"has {len(sample)} channels; expected {self.shape[0]}")
        return center_crop_resize(sample, self.form, self.shape).numpy()

    def original(self, data: bytes) -> Original:
        """Return the values of a file before clipping and resizing."""
        return self.form.original(data)


def center_crop_resize(
    sample: Tensor, form: RangedImage, shape: Shape, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Tensor:
    """Return an image [C, h, w], as stored, cropped and resized to the height and width of `shape`.

    Colours with opacity are averaged with opacity as weight, so that invisible colours do not bleed into edges.
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
    """Return the format for images like the file `first`; UsageError if the settings do not fit it.

    Version 1 of the rules has no modes with opacity, and accepts CMYK as four channels. An unreadable file counts as
    8-bit: its error is reported together with those of all other files.
    """
    if depth == 8:
        if given is not None or channels not in (1, 3):
            raise UsageError(
                "dataset.depth",
                8,
                "applies to gray or colour images without dataset.range",
                "leave one of them out",
            )
        return Uint8Image()
    if is_dicom(first) and (channels != 3 or is_gray_dicom(first)):
        if channels != 1:
            problem, remedy = "the first DICOM image is grayscale", "set dataset.channels=1"
            raise UsageError("dataset.channels", channels, problem, remedy)
        return dicom_form(first, given)
    if given == "window":
        raise UsageError("dataset.range", "window", "applies to DICOM files only", "give [low,high]")
    mode = None
    if rules > 1:
        mode = mode_with_opacity(first, channels)
        if channels == 4 and is_cmyk(first):
            raise UsageError(
                "dataset.channels",
                4,
                "the first image is CMYK",
                "convert it to RGBA, or set dataset.channels=3",
            )
    form = image_form(depth_of(first), channels, given, mode)
    found = _channels(form, first) if isinstance(form, RangedImage) else None
    if found not in (None, channels):
        raise UsageError(
            "dataset.channels", channels, f"the images have {found}", f"set dataset.channels={found}"
        )
    return form


def image_decoder(
    first: bytes,
    shape: tuple[int, int, int],
    given: Range | list[Range] | Literal["window"] | None,
    depth: Literal["auto", 8],
    background: Literal["white", "black"],
    rules: int,
) -> ImageDecoder | HighDepthDecoder:
    """Return the decoder to `shape` of images like the file `first`; UsageError or FormatError as `form_of_files`."""
    form = form_of_files(first, shape[0], given, depth, rules)
    if isinstance(form, RangedImage):
        return HighDepthDecoder(form, shape)
    return ImageDecoder(shape, background, reduced=depth == 8, srgb=rules > 1)


def _channels(form: RangedImage, data: bytes) -> int | None:
    try:
        return len(form.decode(data))
    except ValueError:
        return None


class NoResize(NamedTuple):
    """Reads files of one format and exact shape, without cropping or resizing; FormatError as `SampleFormat.read`."""

    form: SampleFormat
    shape: Shape

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the arrays: uint8 or float32."""
        return np.dtype(np.uint8 if isinstance(self.form, Uint8Image) else np.float32)

    def __call__(self, data: bytes) -> np.ndarray:
        return self.form.read(data, self.shape).numpy()
