"""A small dataset of real images that needs no download."""

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from diffusion_cli.conditions.condition import LABEL
from diffusion_cli.data.attributes import Attributes, Chosen, Column, attributes, chosen_columns, kinds_of
from diffusion_cli.data.base import Dataset, Split, shuffled_mask, split_rows
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.system.compat import sklearn_digits

STROKE_WIDTH = "stroke_width"


class Digits(Dataset):
    """1,797 handwritten digits, 8x8 gray: scikit-learn's copy of the UCI dataset (Alpaydin and Kaynak 1998).

    The 17 gray values v in 0..16 become the bytes round(255 v / 16). Attributes are `label`, the digit, and
    `stroke_width`, see `stroke_widths`.

    Args:
        data_dir: unused.
        label: attributes that a model is conditioned on: names, or types by name; None: the digit is the class.
        val_fraction: fraction of the images for validation, in [0, 1).
        flip: whether training may flip images horizontally.

    Raises:
        UsageError: `label` has another name, or a type that contradicts its values.
    """

    name = "digits"
    shape = (1, 8, 8)
    class_names: tuple[str, ...] | None = tuple("0123456789")

    def __init__(
        self,
        data_dir: str,
        *,
        label: Chosen = None,
        val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2,
        flip: bool = False,
    ) -> None:
        super().__init__(data_dir)
        self.val_fraction = val_fraction
        self.flip = flip
        self.chosen: Attributes | None = None
        if label is not None:
            kinds, (pixels, digits) = kinds_of(label), _digits()
            table = {
                LABEL: Column(digits.tolist(), type(self).class_names),
                STROKE_WIDTH: Column(stroke_widths(pixels).tolist()),
            }
            columns, train = chosen_columns(table, kinds, "digits"), self._rows("train", len(pixels))
            self.chosen = attributes(columns, kinds, train, "image {}".format)
            self.class_names, self.attributes = self.chosen.class_names, self.chosen.descriptions
            self.missing_classes = self.chosen.missing_classes

    def load(self, split: Split) -> MemoryImages:
        pixels, digits = _digits()
        rows = self._rows(split, len(pixels))
        if self.chosen is None:
            return MemoryImages(pixels[rows], digits[rows])
        return MemoryImages(pixels[rows], self.chosen.labels_of(rows)).with_conditions(
            self.chosen.sources(rows)
        )

    def remarks(self) -> list[str]:
        return [] if self.chosen is None else [*self.chosen.remarks]

    def _rows(self, split: Split, count: int) -> Tensor:
        return split_rows(shuffled_mask(count, self.val_fraction), self.val_fraction, split)


def stroke_widths(images: Tensor) -> Tensor:
    """Return the mean stroke width of images of strokes, in pixels, float32 [N]; NaN for an image without ink.

    width = 2 A / P, with the area A = sum of the ink v in [0, 1], and the perimeter P = sum of |grad v| by forward
    differences. A straight stroke of width w and length L has A = w L and, without its ends, P = 2 L.

    Args:
        images: uint8 [N, 1, H, W], 255 is full ink.
    """
    ink = pad(images[:, 0].float() / 255, (1, 1, 1, 1))
    down, right = ink[:, 1:, :-1] - ink[:, :-1, :-1], ink[:, :-1, 1:] - ink[:, :-1, :-1]
    return 2 * ink.sum((1, 2)) / (down.square() + right.square()).sqrt().sum((1, 2))


def _digits() -> tuple[Tensor, Tensor]:
    """Return the images, uint8 [N, 1, 8, 8], and the digits, int64 [N]."""
    rows = sklearn_digits()
    pixels = torch.from_numpy(np.rint(rows[:, :-1] * (255 / 16)).astype(np.uint8)).reshape(-1, *Digits.shape)
    return pixels, torch.from_numpy(rows[:, -1].astype(np.int64))
