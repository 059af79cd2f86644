"""Small random networks of published features."""

from pathlib import Path

import torch
from torch import Tensor

from diffusion_cli.data import Digits
from diffusion_cli.metrics import CLIPFeatures, DINOv2Features

CPU = torch.device("cpu")
DIGITS = Digits("", val_fraction=0.2, flip=False)
NETWORKS = {"dinov2": DINOv2Features, "clip": CLIPFeatures}


def pixels(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def made(name: str, folder: Path | str) -> DINOv2Features | CLIPFeatures:
    return NETWORKS[name](DIGITS, Path(), CPU, weights=str(folder))
