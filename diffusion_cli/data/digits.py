"""A small dataset of real images that needs no download."""

from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from diffusion_cli.data.base import Dataset, Split, shuffled_mask, split_rows
from diffusion_cli.data.memory import MemoryImages


class Digits(Dataset):
    """1,797 handwritten digits, 8x8 gray: scikit-learn's copy of the UCI dataset (Alpaydin and Kaynak 1998).

    The 17 gray values v in 0..16 become the bytes round(255 v / 16).

    Args:
        data_dir: unused.
        val_fraction: fraction of the images for validation, in [0, 1).
        flip: whether training may flip images horizontally.
    """

    name = "digits"
    shape = (1, 8, 8)
    class_names = tuple("0123456789")

    def __init__(
        self, data_dir: str, *, val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2, flip: bool = False
    ) -> None:
        super().__init__(data_dir)
        self.val_fraction = val_fraction
        self.flip = flip

    def load(self, split: Split) -> MemoryImages:
        from sklearn.datasets import load_digits  # slow import

        values, labels = load_digits(return_X_y=True)
        rows = split_rows(shuffled_mask(len(values), self.val_fraction), self.val_fraction, split)
        pixels = torch.from_numpy(np.rint(values * (255 / 16)).astype(np.uint8)).reshape(-1, *self.shape)
        return MemoryImages(pixels[rows], torch.from_numpy(labels.astype(np.int64))[rows])
