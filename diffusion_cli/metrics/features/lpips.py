"""LPIPS, a perceptual distance of images by features of a network trained on ImageNet."""

import re
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from diffusion_cli.errors import UsageError
from diffusion_cli.metrics.features.base import check_pixels, exact_convolutions
from diffusion_cli.metrics.features.weights import content_of, locate, published, read, wrong_weights
from diffusion_cli.system.compat import untrained_lpips
from diffusion_cli.system.downloads import WebFile
from diffusion_cli.system.tensors import digest

PUBLISHED = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}
# Smaller images give empty feature maps, for which the reference implementation fails.
LEAST_SIDE = {"alex": 31, "vgg": 16, "squeeze": 17}
CHUNK = 256


def published_backbone(network: Literal["alex", "vgg", "squeeze"]) -> WebFile:
    """Return the weights of a backbone that torchvision publishes."""
    from torchvision import models  # slow import

    weights = getattr(models, PUBLISHED[network]).DEFAULT
    return published(weights.url, round(weights.meta["_file_size"] * 2**20))


class LPIPSDistance:
    """LPIPS distance of image pairs, at least 0, with torchmetrics' network and linear weights (version 0.1).

    Args:
        network: backbone.
        weights: file of torchvision's backbone weights; only its convolutions are used. None: download the
            published file once to torch's cache.
        device: device of the network.
        key: configuration key of `weights`, for errors.

    Raises:
        UsageError: the file is missing and cannot be downloaded, or is not a file of these weights.

    Source: Zhang et al. 2018, Eq. 1.
    """

    digest: str
    """SHA-256 (hex) of the weights of backbone and linear layers."""

    def __init__(
        self,
        network: Literal["alex", "vgg", "squeeze"],
        weights: str | None,
        device: torch.device,
        key: str = "weights",
    ) -> None:
        instead = "objective.perceptual=gradient" if key.startswith("objective.") else ""
        options = f"metric=lpips metric.lpips.network={network}"
        path = locate(weights, published_backbone(network), key, options, instead)
        self.name, self.device = network, device
        with torch.random.fork_rng(devices=[]):  # initialization draws random numbers
            self.network = untrained_lpips(network)
        self._fill(path, key)
        self.digest = digest(self.network.state_dict())
        self.network.to(device)

    def _fill(self, path: Path, key: str) -> None:
        """Load torchvision's weights into the backbone, which torchmetrics splits into slices."""
        backbone = self.network.net
        saved = read(content_of(path, key), path, key)
        try:
            names = {own: "features." + re.sub(r"^slices?\.?\d+\.", "", own) for own in backbone.state_dict()}
            backbone.load_state_dict({own: saved[name] for own, name in names.items()})
        except (RuntimeError, KeyError, TypeError) as error:
            raise wrong_weights(path, key, error) from error

    @torch.inference_mode()
    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the distances of pairs of uint8 images [B, C, H, W], C 1 or 3: float32 [B].

        Raises UsageError for images of another dtype, or too small for the network.
        """
        for images in (first, second):
            check_pixels(images)
            self.check_shape(tuple(images.shape[1:]))
        with exact_convolutions():
            parts = [
                self.network(self._scaled(a), self._scaled(b)).flatten()
                for a, b in zip(first.split(CHUNK), second.split(CHUNK), strict=True)
            ]
        return torch.cat(parts)

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """Return differentiable distances of pairs of images [B, C, H, W] in about [-1, 1]: float32 [B]."""
        self.network.to(first.device)
        pairs = (images.float().expand(-1, 3, -1, -1) for images in (first, second))
        with torch.autocast(first.device.type, enabled=False):
            return self.network(*pairs).flatten()

    def _scaled(self, images: Tensor) -> Tensor:
        return (images.to(self.device).float() / 127.5 - 1).expand(-1, 3, -1, -1)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise UsageError for an image shape [C, H, W] that the network does not support."""
        channels, height, width = shape
        if channels not in (1, 3):
            raise UsageError("LPIPS", self.name, f"needs images with 1 or 3 channels; these have {channels}")
        if min(height, width) < LEAST_SIDE[self.name]:
            able = [name for name, side in LEAST_SIDE.items() if side <= min(height, width)]
            remedy = f"use {' or '.join(able)}" if able else "no LPIPS network supports such small images"
            raise UsageError(
                "LPIPS",
                self.name,
                f"needs at least {LEAST_SIDE[self.name]} pixels per side; these images are {height}x{width}",
                remedy,
            )
