"""Words in the margins of grids of images, in a font that has their letters."""

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST, LARGEST = 11, 40  # pixels of the font
ROWS = 14  # heights of the font in an image, where the limits permit
LONGEST = 28  # characters of the name of a row
GAP = 4  # pixels beside a word
WIDEST = 4  # times that an image may be enlarged for the name of its column


class Captions(NamedTuple):
    """Words beside the rows of a grid, above its columns, and above all of it; empty ones take no space."""

    rows: Sequence[str] = ()
    """Name of each row, left of it."""
    columns: Sequence[str] = ()
    """Name of each column, above it."""
    corner: str = ""
    """Quantity that the columns show, left of their names."""
    title: str = ""


def enlargement(columns: Sequence[str], width: int, height: int) -> int:
    """Return the factor by which images of a size must be enlarged to be as wide as the names of their columns."""
    widest = max((_width(word, _size(height)) for word in columns), default=0) + GAP
    return min(math.ceil(widest / width), WIDEST)


def captioned(picture: Tensor, captions: Captions, cell: tuple[int, int]) -> Tensor:
    """Return a grid of images with its captions in margins at the left and at the top; the images do not change.

    Args:
        picture: the grid, uint8 [C, H, W] with 1 or 3 channels.
        captions: the words.
        cell: height and width of a cell of the grid.
    """
    height, width = cell
    size = _size(height)
    names = [_cut_in_the_middle(name, LONGEST) for name in captions.rows]
    left = max((_width(name, size) + 2 * GAP for name in [*names, captions.corner] if name), default=0)
    lines = _wrapped(captions.title, size, left + picture.shape[2] - 2 * GAP)
    line = size + GAP
    header = line if captions.columns or captions.corner else 0
    top = header + line * len(lines)
    margins = picture.new_full((picture.shape[0], top + picture.shape[1], left + picture.shape[2]), 255)
    margins[:, top:, left:] = picture
    canvas = Image.fromarray(margins.permute(1, 2, 0).squeeze(2).numpy())
    draw = ImageDraw.Draw(canvas)

    def write(x: float, y: float, text: str, anchor: str) -> None:
        draw.text(
            (x, y), text, fill=0 if canvas.mode == "L" else (0, 0, 0), font=_font(text, size), anchor=anchor
        )

    for number, text in enumerate(lines):
        write(GAP, number * line + line / 2, text, "lm")
    if captions.corner:
        write(left - GAP, top - line / 2, readable(captions.corner), "rm")
    for number, text in enumerate(captions.columns):
        write(left + (number + 0.5) * width, top - line / 2, _fitted(text, size, width - 2), "mm")
    for number, text in enumerate(names):
        write(left - GAP, top + (number + 0.5) * height, text, "rm")
    drawn = torch.from_numpy(np.array(canvas)).view(*margins.shape[1:], -1).permute(2, 0, 1)
    drawn[:, top:, left:] = picture
    return drawn


def class_name(label: int, names: Sequence[str] | None) -> str:
    """Return the name of a class, or its number if it has no name that a font can show."""
    if names is None or font_file(names[label]) is None:
        return f"class {label}"
    return names[label]


def readable(text: str) -> str:
    """Return a text with letters that no font has as escapes, such as \\u732b."""
    if font_file(text) is not None:
        return text
    known = _letters(dejavu())
    return "".join(
        letter if ord(letter) in known else letter.encode("unicode_escape").decode() for letter in text
    )


@lru_cache(1000)
def font_file(text: str) -> Path | None:
    """Return the file of a font with all letters of a text: DejaVu Sans, or one of this machine; None if none has."""
    letters = set(map(ord, text))
    if letters <= _letters(dejavu()):
        return dejavu()
    if not text.isprintable():
        return None
    from matplotlib.font_manager import fontManager

    installed = sorted({entry.fname for entry in fontManager.ttflist})
    return next((Path(file) for file in installed if letters <= _letters(Path(file))), None)


@cache
def dejavu() -> Path:
    """Return the file of DejaVu Sans, which is a part of matplotlib."""
    import matplotlib

    return Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


@cache
def _letters(font: Path) -> frozenset[int]:
    """Return the Unicode code points of a font; none if the file cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(str(font)).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def _font(text: str, size: int) -> ImageFont.FreeTypeFont:
    return _face(font_file(text) or dejavu(), size)


@cache
def _face(file: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(file), size)


def _size(height: int) -> int:
    """Return the font size for images of a height."""
    return min(max(height // ROWS, SMALLEST), LARGEST)


def _width(text: str, size: int) -> int:
    text = readable(text)
    return math.ceil(_font(text, size).getlength(text))


def _cut(text: str, most: int) -> str:
    """Return a readable text of at most `most` letters."""
    text = readable(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _cut_in_the_middle(text: str, most: int) -> str:
    """Return a readable text of at most `most` letters with its beginning and its end, which tell files apart."""
    text = readable(text)
    end = (most - 1) // 2
    return text if len(text) <= most else f"{text[: most - 1 - end]}…{text[-end:]}"


def _fitted(text: str, size: int, width: int) -> str:
    """Return the beginning of a text that is at most `width` pixels wide."""
    most = len(text := readable(text))
    while most > 1 and _width(_cut(text, most), size) > width:
        most -= 1
    return _cut(text, most)


def _wrapped(text: str, size: int, width: int) -> list[str]:
    """Return the lines of a text that are at most `width` pixels wide."""
    lines: list[str] = []
    for word in readable(text).split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(_fitted(word, size, width))
    return lines
