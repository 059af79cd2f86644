"""Placeholder network of metrics without features."""

import torch
from torch import Tensor

from diffusion_cli.metrics.features.base import FeatureBatch, Features


class RawPixels(Features):
    """No features and no class scores, for metrics that use the images themselves.

    Args:
        device: device of the evaluation.
    """

    name = "pixels"
    dim = classes = 0
    digest = note = ""
    resize = "none"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def extract(self, images: Tensor) -> FeatureBatch:
        return FeatureBatch(torch.empty(len(images), 0), None)
