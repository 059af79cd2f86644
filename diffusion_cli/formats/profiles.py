"""Conversion from ICC colour profiles to sRGB."""

from functools import lru_cache
from io import BytesIO
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageCms

LARGEST_PROFILE = 2**22  # bytes
NEAR = 3  # gray values of 255; profiles that change colours by no more are approximations of sRGB
SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}  # profile colour space of each Pillow mode


class Conversion(NamedTuple):
    """Conversion of the colours of images with one profile."""

    kind: Literal["none", "broken", "converted"]
    name: str = ""
    """Description in the profile."""
    transform: ImageCms.ImageCmsTransform | None = None
    """Transform from RGB or CMYK to sRGB."""
    table: bytes | None = None
    """Lookup table for gray values."""


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert an 8-bit image from its ICC profile to sRGB with relative colorimetric intent.

    sRGB profiles, damaged profiles and profiles of another colour space change nothing. Opacity is kept.
    """
    opacity = image.getchannel("A") if image.mode in ("RGBA", "LA") else None
    mode = {"P": "RGB", "RGBA": "RGB", "LA": "L"}.get(image.mode, image.mode)
    found = conversion(profile, mode)
    if found.kind != "converted":
        return image
    colours = image if image.mode == mode else image.convert(mode)
    if found.table is not None:
        colours = colours.point(found.table)
    else:
        assert found.transform is not None
        colours = ImageCms.applyTransform(colours, found.transform)
        assert colours is not None
    if opacity is not None:
        colours.putalpha(opacity)
    return colours


@lru_cache(16)
def conversion(profile: bytes, mode: str) -> Conversion:
    """Return the conversion of a Pillow mode from an ICC profile."""
    if mode not in SPACES or len(profile) > LARGEST_PROFILE:
        return Conversion("none" if mode not in SPACES else "broken")
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if source.profile.xcolor_space.strip() != SPACES[mode]:  # pyright: ignore[reportAttributeAccessIssue]
            return Conversion("none")
        srgb = ImageCms.createProfile("sRGB")
        name = ImageCms.getProfileDescription(source).strip()
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
        if mode == "L":  # exact, because it becomes a table
            flags |= ImageCms.Flags.NOOPTIMIZE
        transform = ImageCms.buildTransform(
            source, srgb, mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, flags
        )
        before = _colours(mode)
        after = ImageCms.applyTransform(before, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, ImportError):
        return Conversion("broken")
    assert after is not None
    if mode == "CMYK":
        return Conversion("converted", name, transform)
    difference = np.asarray(before.convert("RGB")).astype(int) - np.asarray(after)
    if np.abs(difference).max() <= NEAR:
        return Conversion("none")
    if mode == "L":
        return Conversion("converted", name, table=after.getchannel("G").tobytes())
    return Conversion("converted", name, transform)


def _colours(mode: str) -> Image.Image:
    """Return an image of all grays, or of a regular grid of colours."""
    if mode == "L":
        return Image.frombytes("L", (256, 1), bytes(range(256)))
    steps = product(range(0, 256, 51), repeat=len(mode))
    return Image.fromarray(np.array([*steps], np.uint8)[None], mode)
