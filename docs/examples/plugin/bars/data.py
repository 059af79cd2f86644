"""Images of horizontal and vertical bars."""

from typing import Literal

import torch
from pydantic import PositiveInt

from diffusion_cli.data import Dataset
from diffusion_cli.data.base import Split
from diffusion_cli.data.memory import MemoryImages


class Bars(Dataset):
    """8x8 images with one bar; the class is its direction."""

    name = "bars"
    shape = (1, 8, 8)
    class_names = ("row", "column")

    def __init__(
        self,
        data_dir: str,
        *,
        count: PositiveInt = 400,
        ink: Literal["white", "gray"] = "white",
        flip: bool = False,
    ) -> None:
        super().__init__(data_dir)
        self.count, self.ink, self.flip = count, ink, flip

    def load(self, split: Split) -> MemoryImages:
        """Return images, uint8 [N, 1, 8, 8], and labels of a split."""
        generator = torch.Generator().manual_seed({"train": 0, "val": 1}[split])
        images = torch.zeros(self.count, 1, 8, 8, dtype=torch.uint8)
        labels = torch.arange(self.count) % 2
        places = torch.randint(8, (self.count,), generator=generator)
        for image, label, place in zip(images, labels, places, strict=True):
            (image.mT if label else image)[0, place] = {"white": 255, "gray": 128}[self.ink]
        return MemoryImages(images, labels)
