"""Pixel values of image files in their own bit depth."""

import logging
import math
import re
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING, Literal

import numpy as np

from diffusion_cli.errors import FormatError
from diffusion_cli.formats.files import ORIENTATION, has_gray_palette, parsed, upright
from diffusion_cli.formats.profiles import to_srgb
from diffusion_cli.system.untrusted import LARGEST, reason

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage

PNG = b"\x89PNG\r\n\x1a\n"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
COLOURS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # Pillow modes that convert to RGBA without loss
DEFLATE = (8, 32946)  # TIFF compression methods
PNM = re.compile(rb"P[2356]" + rb"(?:\s|#[^\n]*\n)+(\d+)" * 3)  # width, height and largest value
JPEG2000 = b"\xff\x4f\xff\x51"  # marker of the sample description
BOUNDED = (
    1,
    5,
    32773,
    *DEFLATE,
)  # none, LZW and PackBits (low expansion), and deflate, which is measured first
MOST_PAGES = 1000
MOST_NUMBERS = 2**26  # values per image: 8192 x 8192 gray pixels

# tifffile logs to stderr for broken files, which get an error of this package.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


def depth_of(data: bytes) -> str:
    """Return the dtype name of an image file by its header; "uint8" if the header is unreadable."""
    if data[:8] == PNG:
        return "uint16" if data[24:25] == b"\x10" else "uint8"
    if data[:4] in TIFF:
        from tifffile import TiffFile

        try:
            with TiffFile(BytesIO(data)) as file:
                name = np.dtype(file.pages.first.dtype).name
        except Exception:  # reported where pixels are read
            return "uint8"
        return "uint8" if name == "bool" else name
    return "uint8" if _largest(data) < 256 else "uint16"


def _largest(data: bytes) -> int:
    """Return the largest value that a PNM or JPEG 2000 file declares; 255 for other formats."""
    if found := PNM.match(data[:4096]):
        return int(found[3])
    if data[:4] == JPEG2000 or data[4:8] == b"jP  ":
        at = data.find(JPEG2000) + 40
        channels = int.from_bytes(data[at : at + 2])
        return (
            2 ** max((1 + (depth & 127) for depth in data[at + 2 : at + 2 + 3 * channels : 3]), default=8) - 1
        )
    return 255


def read_numbers(data: bytes) -> np.ndarray:
    """Return the pixel values [C, H, W] of an image file, with TIFF pages as channels.

    Palette images give palette indices, except GIF, which gives colours. White-is-zero images are inverted. The EXIF
    orientation is applied to 8-bit images; a rotated TIFF is refused. Raises FormatError for malformed and too large
    files.
    """
    try:
        if data[:4] in TIFF:
            return _tiff(data)
        if (largest := _largest(data)) != 255:  # Pillow would rescale these values
            raise FormatError(f"has a maximum value of {largest} instead of 255; save it as PNG or TIFF")
        image = parsed(data)
        if depth_of(data) == "uint16" and image.mode != "I;16":  # Pillow reduces 16-bit colour to 8 bits
            return _deep_png(data)
        image = upright(image)
        if image.mode == "1" or (has_gray_palette(image) and image.format == "GIF"):
            image = image.convert("L")
        elif image.mode == "P" and image.format == "GIF":  # palette order is arbitrary in GIF
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        numbers = np.asarray(image)
    except Exception as error:  # decoders raise errors of many types for broken data
        raise FormatError(reason(error)) from error
    return np.atleast_3d(numbers).transpose(2, 0, 1)


def mode_with_opacity(data: bytes, channels: int) -> Literal["LA", "RGBA"] | None:
    """Return the mode, LA or RGBA, of an image file with opacity; None if `channels` means something else.

    Opaque 8-bit colours count as RGBA if 4 channels are wanted, except in TIFF, where channels have any meaning.
    """
    if channels not in (2, 4):
        return None
    mode = "LA" if channels == 2 else "RGBA"
    if data[:4] in TIFF:
        return mode if _tiff_has_opacity(data) else None
    if depth_of(data) != "uint8":
        return mode if data[:8] == PNG and data[25] in (4, 6) else None
    try:
        image = parsed(data)
    except ValueError:  # reported where pixels are read
        return None
    if image.mode in ("P", "RGB", "RGBA", "PA"):
        return mode if channels == 4 else None
    return mode if image.mode in COLOURS and image.has_transparency_data else None


def is_cmyk(data: bytes) -> bool:
    """Return whether an image file has CMYK colours."""
    try:
        return parsed(data).mode == "CMYK"
    except ValueError:
        return False


def _tiff_has_opacity(data: bytes) -> bool:
    from tifffile import TiffFile

    try:
        with TiffFile(BytesIO(data)) as file:
            page = file.pages.first
            return page.photometric in (1, 2) and tuple(page.extrasamples) == (2,)
    except Exception:  # reported where pixels are read
        return False


def read_with_opacity(data: bytes, mode: Literal["LA", "RGBA"]) -> np.ndarray:
    """Return the values [C, H, W] of gray or colours with opacity; images without opacity are opaque.

    Raises FormatError as `read_numbers`, and for other colour modes such as CMYK.
    """
    if data[:4] in TIFF or depth_of(data) != "uint8":
        return read_numbers(data)
    image = parsed(data)
    if image.mode not in COLOURS:
        raise FormatError(f"is {image.mode}; convert it to {mode}")
    if mode == "LA" and not (image.mode in ("1", "L", "LA") or has_gray_palette(image)):
        raise FormatError("is in colour, not gray")
    try:
        profile = image.info.get("icc_profile")
        colours = upright(image).convert(mode)
        numbers = np.asarray(to_srgb(colours, profile) if profile else colours)
    except Exception as error:  # decoders raise errors of many types for broken data
        raise FormatError(reason(error)) from error
    return numbers.transpose(2, 0, 1)


def _deep_png(data: bytes) -> np.ndarray:
    """Return the values [C, H, W] of a 16-bit colour PNG, from two 8-bit images of its high and low bytes.

    PNG filters combine each byte of a pixel with the same byte of its neighbours, so they work on each image alone.
    """
    width, height, _, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    channels = {2: 3, 4: 2, 6: 4}[colour]
    size = height * (1 + 2 * channels * width)
    if interlaced or size > 2 * MOST_NUMBERS:
        raise FormatError(f"is interlaced, or has more than {MOST_NUMBERS} values; save it as TIFF")
    content = zlib.decompressobj().decompress(b"".join(_parts(data)), size)
    if len(content) < size:
        raise FormatError("is truncated")
    rows = np.frombuffer(content, np.uint8).reshape(height, -1)
    halves = rows[:, 1:].reshape(height, channels * width, 2)
    high, low = (
        np.asarray(parsed(_png(width, height, colour, np.hstack([rows[:, :1], halves[..., half]]))))
        for half in (0, 1)
    )
    return (high.astype(np.uint16) << 8 | low).transpose(2, 0, 1)


def _parts(data: bytes) -> Iterator[bytes]:
    """Yield the pixel chunks of a PNG."""
    at = len(PNG)
    while at + 8 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            yield data[at + 8 : at + 8 + length]
        at += 12 + length


def _png(width: int, height: int, colour: int, rows: np.ndarray) -> bytes:
    """Return an 8-bit PNG of filtered rows, uint8 [height, 1 + ...]."""
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 0)), (b"IEND", b"")
    return PNG + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def _tiff(data: bytes) -> np.ndarray:
    from tifffile import TiffFile

    with TiffFile(BytesIO(data)) as file:
        _check(file, len(data))
        if (orientation := file.pages.first.tags.valueof(ORIENTATION, default=1)) != 1:
            raise FormatError(f"has orientation {orientation}; save it upright")
        series = file.series[0]
        numbers, others = series.asarray(maxworkers=1), series.axes.replace("Y", "").replace("X", "")
        if "Y" not in series.axes or "X" not in series.axes or len(others) > 1:
            raise FormatError(
                f"has axes {series.axes} of {series.shape}; expected height, width and optionally channels"
            )
        if others:
            numbers = np.moveaxis(numbers, series.axes.index(others), 0)
        white_is_low = file.pages.first.photometric == 0
    numbers = numbers if others else numbers[None]
    if numbers.dtype == np.bool_:
        numbers = numbers.astype(np.uint8) * 255
    return np.iinfo(numbers.dtype).max - numbers if white_is_low and numbers.dtype.kind == "u" else numbers


def _check(file: "TiffFile", size: int) -> None:
    """Raise FormatError unless the first series is complete and its images need bounded memory."""
    if len(file.pages) > MOST_PAGES:
        raise FormatError(f"has more than {MOST_PAGES} pages")
    series = file.series[0]
    if series.dtype is None or math.prod(series.shape) > MOST_NUMBERS:
        raise FormatError(
            f"has {series.dtype} of {series.shape}; at most {MOST_NUMBERS} values are supported"
        )
    for page in series.pages:
        if page is not None:
            _check_page(file, page.aspage(), size)


def _check_page(file: "TiffFile", page: "TiffPage", size: int) -> None:
    if page.compression not in BOUNDED:
        raise FormatError(
            f"has compression {page.compression:d}; supported are none, LZW, PackBits and deflate"
        )
    segment = math.prod(page.chunks) * (page.dtype or np.dtype("u1")).itemsize
    if segment > LARGEST:
        raise FormatError(f"has segments of {page.chunks}, larger than {LARGEST} bytes")
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if count == 0 or offset + count > size:
            raise FormatError(f"has {size} bytes, fewer than it declares")
        if page.compression in DEFLATE:
            file.filehandle.seek(offset)
            if len(zlib.decompressobj().decompress(file.filehandle.read(count), segment + 1)) > segment:
                raise FormatError("inflates to more than it declares")
