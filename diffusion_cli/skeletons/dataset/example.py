"""Images of bright squares."""

import torch
from diffusion_cli.data import Dataset
from diffusion_cli.data.base import Split
from diffusion_cli.data.memory import MemoryImages
from pydantic import PositiveInt


class Example(Dataset):
    """16x16 gray images of a bright square, 2 classes: its sizes.

    A dataset has a name, a shape [C, H, W], class names or None, and `load`, which returns the images of a split.

    Args:
        data_dir: folder of downloaded files; the program passes it.
        count: training images; a quarter as many validation images
        flip: mirror half of the training images left to right
    """

    name = "example"
    shape = (1, 16, 16)
    class_names = ("small", "large")

    def __init__(self, data_dir: str, *, count: PositiveInt = 2000, flip: bool = True) -> None:
        super().__init__(data_dir)
        self.count, self.flip = count, flip

    def load(self, split: Split) -> MemoryImages:
        """Return images, uint8 [N, C, H, W], and classes, int64 [N]; the splits must be disjoint."""
        count, seed = (self.count, 0) if split == "train" else (max(self.count // 4, 1), 1)
        random = torch.Generator().manual_seed(seed)
        images = torch.randint(64, (count, *self.shape), generator=random, dtype=torch.uint8)
        labels = torch.arange(count) % 2
        corners = torch.randint(8, (count, 2), generator=random).tolist()
        for image, label, (top, left) in zip(images, labels.tolist(), corners, strict=True):
            size = (4, 8)[label]
            image[:, top : top + size, left : left + size] = 255
        return MemoryImages(images, labels)
