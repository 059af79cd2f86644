"""DINOv2 features: their Frechet distance agrees better with human judgement than Inception's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_cli.data import Dataset
from diffusion_cli.metrics.features import hub
from diffusion_cli.metrics.features.base import FeatureBatch, Features, check_channels
from diffusion_cli.system import pretrained
from diffusion_cli.system.tensors import digest

SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
OFFSET = 0.1


class DINOv2Features(Features):
    """Class token of DINOv2 after its last layer norm, as in FD-DINOv2: 1024 features for ViT-L/14.

    One channel is repeated to three.

    Args:
        dataset: dataset with the shape of the images.
        cache_dir: unused.
        device: device of the network.
        weights: a folder or a name on the Hugging Face hub.

    Raises:
        UsageError: transformers or the weights are missing, or images have neither 1 nor 3 channels.

    Source: Oquab et al. 2023 (DINOv2); Stein et al. 2023 (FD-DINOv2).
    """

    name = "dinov2"
    classes = 0
    resize = f"PIL bicubic to {SIZE}x{SIZE}, antialiased, 8 bits"
    note = ""
    chunk = 32

    def __init__(
        self,
        dataset: Dataset,
        cache_dir: Path,
        device: torch.device,
        *,
        weights: str = "facebook/dinov2-large",
    ) -> None:
        check_channels(self.name, dataset)
        network = hub.weights_of(self.name, weights).network("Dinov2Model")
        self.digest = digest(network.state_dict())
        self.dim = network.config.hidden_size
        embeddings = network.embeddings
        places = resampled(embeddings.position_embeddings, SIZE // network.config.patch_size)
        embeddings.position_embeddings = nn.Parameter(places, requires_grad=False)
        self.device = device
        self.network = network.to(device, torch.float32)

    @classmethod
    def downloads(cls, settings: Mapping[str, Any]) -> list[pretrained.HubFile]:
        return pretrained.files(settings["weights"], pretrained.NETWORK)

    def extract(self, images: Tensor) -> FeatureBatch:
        states = self.network(hub.prepared(images, SIZE, MEAN, STD, crop=False)).last_hidden_state
        return FeatureBatch(states[:, 0], None)


def resampled(embeddings: Tensor, side: int) -> Tensor:
    """Resample position embeddings [1, 1 + n^2, dim], class token first, to [1, 1 + side^2, dim].

    Scales the grid by (side + 0.1) / n, as the published DINOv2, but not transformers, does. A grid of the right size
    is unchanged.
    """
    first, grid = embeddings[:, :1], embeddings[:, 1:]
    before = round(grid.shape[1] ** 0.5)
    if before == side:
        return embeddings
    maps = grid.reshape(1, before, before, -1).permute(0, 3, 1, 2)
    scale = (side + OFFSET) / before
    maps = nn.functional.interpolate(maps.float(), scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([first, maps.flatten(2).mT], dim=1)
