"""Features of images."""

import hashlib
from pathlib import Path

import torch
from diffusion_cli.data import Dataset
from diffusion_cli.metrics.features.base import FeatureBatch, Features
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d


class Example(Features):
    """Pixels of images that are averaged to a small size.

    A feature network is fixed. Values of metrics name its weights by `digest`, so that only equal ones are compared.

    Args:
        dataset: dataset of the evaluation; the program passes it.
        cache_dir: folder of downloaded weights; the program passes it.
        device: device of the network; the program passes it.
        size: height and width to which images are averaged
    """

    name = "example"
    resize = "none"
    note = "features are averaged pixels; compare only values with the same size"
    classes = 0

    def __init__(
        self, dataset: Dataset, cache_dir: Path, device: torch.device, *, size: PositiveInt = 4
    ) -> None:
        self.size, self.device = size, device
        self.dim = dataset.shape[0] * size**2
        self.digest = hashlib.sha256(f"averages of {size}x{size}".encode()).hexdigest()

    def extract(self, images: Tensor) -> FeatureBatch:
        """Return the features, float32 [B, dim], of uint8 images [B, C, H, W], and class scores or None."""
        pixels = images.float() / 255
        return FeatureBatch(adaptive_avg_pool2d(pixels, self.size).flatten(1), None)
