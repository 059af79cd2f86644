"""Real images to compare samples with."""

from functools import cached_property

import torch
from diffusion_cli.data import Dataset, ExternalImages, Images
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.metrics import Reference
from pydantic import PositiveInt


class Example(Reference):
    """The first training images of the dataset, and all validation images to show what a perfect model reaches.

    Args:
        dataset: dataset of the evaluation; the program passes it.
        count: training images, at most all of them
    """

    stats = None

    def __init__(self, dataset: Dataset, *, count: PositiveInt = 1000) -> None:
        self.dataset, self.count = dataset, count
        self.name, self.other_name = f"{dataset.name}/train[:{count}]", f"{dataset.name}/val"

    @cached_property
    def images(self) -> Images:
        """The real images."""
        images = self.dataset.load("train")
        rows = torch.arange(min(self.count, len(images)), device=images.device)
        return MemoryImages(images[rows], None if images.labels is None else images.labels[rows])

    @cached_property
    def other(self) -> Images | None:
        """Other real images, or None."""
        images = self.dataset.load("val")
        return images if len(images) else None

    def given(self) -> ExternalImages | None:
        """Return the images with the names of their classes; None without classes."""
        names = self.dataset.class_names
        return None if names is None else ExternalImages(self.images, names)
