"""An image file of any kind becomes bytes [C, R, R]."""

import warnings
from io import BytesIO
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diffusion_cli.foreign import reason

# Such images are refused with a word of our own. Here, for filters must not be set in threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
SPARE = 2  # times the resolution, from which the Lanczos filter takes what it needs
FORMATS = {"PNG": (".png",), "JPEG": (".jpg", ".jpeg"), "WEBP": (".webp",), "TIFF": (".tif", ".tiff")}


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

    def __call__(self, data: bytes) -> np.ndarray:
        """Raises ValueError if the file cannot be decoded faithfully."""
        image = _parsed(data)
        size = image.size
        drafted = image.draft(None, (SPARE * self.resolution, SPARE * self.resolution))
        if drafted is None or image.size == size:
            image = self._resized(self._flattened(_upright(image)), size=None)
        else:  # turned at the end: where no eighth of the size is whole, the right and the lower edge reach too far
            _, (_, _, width, _) = drafted  # of the file's image, in pixels of this one
            image = _upright(self._resized(self._flattened(image), size, size[0] / width))
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


class Exact(NamedTuple):
    """Decodes images that have exactly one size, as they are, not cropped or resized; gray becomes RGB where asked.

    The call raises ValueError for another size, colours where `channels` is 1, and as `Decoder`.
    """

    channels: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what it returns."""
        return self.channels, self.height, self.width

    def __call__(self, data: bytes) -> np.ndarray:
        image = opened(data)
        if (image.height, image.width) != (self.height, self.width):
            raise ValueError(f"is {image.width} x {image.height}, not {self.width} x {self.height} pixels")
        if self.channels == 1 and not is_gray(image):
            raise ValueError("is in colour, not gray")
        pixels = np.asarray(flattened(image, self.channels, "white"))
        return pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)


def is_gray(image: Image.Image) -> bool:
    """Whether an image has one channel and no transparency."""
    return image.mode.startswith(("1", "L", "I", "F")) and "A" not in image.mode


def opened(data: bytes) -> Image.Image:
    """An image file of one of the FORMATS, upright by its EXIF orientation, its first frame.

    Raises ValueError if it is none, is damaged, or has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    return _upright(_parsed(data))


def _parsed(data: bytes) -> Image.Image:
    """As `opened`, before pixels are read."""
    try:
        image = Image.open(BytesIO(data), formats=list(FORMATS))
    except UnidentifiedImageError as error:  # whose text names a memory address
        raise ValueError(f"is not an image in {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders meet broken data with errors of every type
        raise ValueError(reason(error)) from error
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(f"{image.width} x {image.height} pixels exceed Pillow's limit of {limit}")
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # as above, for only now are pixels read
        raise ValueError(reason(error)) from error
    return image


def flattened(image: Image.Image, channels: int, background: Literal["white", "black"]) -> Image.Image:
    """The image in 8 bits, without transparency, in gray or RGB; ValueError if it cannot be had so."""
    try:
        return _flattened(image, channels, background)
    except Exception as error:  # a few kinds of colours cannot be converted
        raise ValueError(reason(error)) from error


def _flattened(image: Image.Image, channels: int, background: Literal["white", "black"]) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow's own conversion clips at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("has 32-bit pixels; convert it to 8 or 16 bits")
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("has floating-point pixels; convert it to 8 or 16 bits")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    mode = "L" if channels == 1 else "RGB"
    image.load()  # where only the header was read, it fails here
    return image if image.mode == mode else image.convert(mode)
