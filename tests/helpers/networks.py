"""Small networks with random weights."""

import re
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from diffusion_cli.networks import UNet

OPTIONS = [
    file
    for file in sorted((Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))
    if re.search(r"networks\.(UNet|Classifier)\n", file.read_text())
]
SMALL: dict = {
    "channels": 8,
    "channel_mult": [1, 2],
    "attention_resolutions": [4],
    "num_heads": 2,
    "head_channels": None,
    "norm_groups": 4,
}


NCSNPP: dict = {
    "time_embedding": "additive",
    "embedding_layout": "fourier",
    "fourier_scale": 0.01,
    "resample": "block_proj",
    "fir": True,
    "progressive_input": "residual",
    "up_attention": "last",
    "skip_rescale": True,
}
SKIPS: dict = NCSNPP | {
    "progressive_input": "input_skip",
    "progressive_output": "output_skip",
    "fir_padding": "zeros",
}


def option(name: str, **changes) -> dict:
    path = next(path for path in OPTIONS if path.stem == name)
    arguments = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(arguments, dict)
    return {str(key): value for key, value in arguments.items() if key != "_target_"} | changes


def randomised(module, seed: int = 0):
    """Weights of a trained kind: nothing is zero any more."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def small(image_size: int = 8, num_classes: int | None = None, **changes) -> UNet:
    torch.manual_seed(0)
    return randomised(UNet((2, image_size, image_size), num_classes, **(SMALL | changes))).double().eval()


def inputs(batch: int = 3, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 2, height, width, generator=generator, dtype=torch.float64)
    return x, torch.linspace(3, 700, batch, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
