"""Image files with 8 bits per channel, read by Pillow, and DICOM in colour."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from threading import Condition
from typing import IO, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diffusion_cli.errors import FormatError
from diffusion_cli.formats.dicom_reader import MAGIC, colour_image, is_dicom
from diffusion_cli.formats.profiles import to_srgb
from diffusion_cli.system.untrusted import IMAGE_FORMATS, reason

# Large images get an error of this package. Set here because filters must not be changed in threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
FIRST_FORMATS = {"PNG": (".png",), "JPEG": (".jpg", ".jpeg"), "WEBP": (".webp",), "TIFF": (".tif", ".tiff")}
"""Formats and suffixes that version 1 of the data rules reads."""
FIRST_SUFFIXES = tuple(suffix for suffixes in FIRST_FORMATS.values() for suffix in suffixes)
SUFFIXES = tuple(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # EXIF tag, and its values that exchange width and height


class Room:
    """Memory budget shared by threads: each waits until its request fits beside the others, or until it is alone.

    Args:
        limit: number of bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0
        self._changed = Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Reserve `size` bytes within the context."""
        with self._changed:
            self._changed.wait_for(lambda: not self.taken or self.taken + size <= self.limit)
            self.taken += size
        try:
            yield
        finally:
            with self._changed:
                self.taken -= size
                self._changed.notify_all()


DECODING = Room(2**29)
"""Bytes of images that the threads of a process decode at once: a few kilobytes of WebP may be 360 MB of pixels."""


def is_gray(image: Image.Image) -> bool:
    """Return whether an image has one channel and no transparency."""
    return image.mode.startswith(("1", "L", "I", "F")) and "A" not in image.mode


def has_gray_palette(image: Image.Image) -> bool:
    """Return whether all palette colours are opaque grays; FormatError if the image is damaged."""
    try:
        if image.mode != "P" or image.has_transparency_data:
            return False
        colours = image.getpalette("RGB") or []
    except Exception as error:  # as in `parsed`: reading the palette decodes the pixels
        raise FormatError(reason(error)) from error
    return colours[::3] == colours[1::3] == colours[2::3]


def opened(data: bytes) -> Image.Image:
    """Return the first frame of an image file, upright by its EXIF orientation.

    It is in one of IMAGE_FORMATS, or in colour in a DICOM file.

    Raises FormatError if it is malformed, or has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    return upright(parsed(data))


def parsed(data: bytes | IO[bytes]) -> Image.Image:
    """Return the image like `opened`, but not upright and, except for DICOM in colour, without decoding pixels."""
    file = BytesIO(data) if isinstance(data, bytes) else data
    start = file.read(MAGIC)
    if is_dicom(start):
        return colour_image(start + file.read())
    file.seek(0)
    try:
        image = Image.open(file, formats=list(IMAGE_FORMATS))
    except UnidentifiedImageError as error:  # its text contains a memory address
        raise FormatError(f"is not an image in {', '.join(IMAGE_FORMATS)}") from error
    except Exception as error:  # decoders raise errors of many types for broken data
        raise FormatError(reason(error)) from error
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise FormatError(f"{image.width} x {image.height} pixels exceed Pillow's limit of {limit}")
    return image


def is_turned(image: Image.Image) -> bool:
    """Return whether the EXIF orientation exchanges width and height."""
    try:
        return image.getexif().get(ORIENTATION) in TURNED
    except Exception as error:  # as in `parsed`
        raise FormatError(reason(error)) from error


def upright(image: Image.Image) -> Image.Image:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # as in `parsed`: this decodes the pixels
        raise FormatError(reason(error)) from error
    return image


def flattened(
    image: Image.Image, channels: int, background: Literal["white", "black"], srgb: bool = True
) -> Image.Image:
    """Convert an image to 8-bit gray or RGB without transparency; FormatError if that is impossible.

    With `srgb`, colours are converted from the image's ICC profile to sRGB.
    """
    try:
        return _flattened(image, channels, background, srgb)
    except Exception as error:  # some colour modes cannot be converted
        raise FormatError(reason(error)) from error


def _flattened(
    image: Image.Image, channels: int, background: Literal["white", "black"], srgb: bool
) -> Image.Image:
    profile = image.info.get("icc_profile") if srgb else None
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise FormatError("has 32-bit pixels; convert it to 8 or 16 bits")
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise FormatError("has floating-point pixels; convert it to 8 or 16 bits")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    mode = "L" if channels == 1 else "RGB"
    image.load()  # fails here for truncated files
    if profile:
        image = to_srgb(image, profile)
    return image if image.mode == mode else image.convert(mode)
