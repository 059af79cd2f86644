"""Magnitude-preserving layers: outputs have unit variance where inputs have."""

import math

import torch
from torch import Tensor, nn

from diffusion_cli.networks.layers import widened


class FourierFeatures(nn.Module):
    """Random Fourier features of unit variance, `sqrt(2) cos(2 pi (w c + p))`, [B] to [B, channels].

    Frequencies w are normal, phases p uniform. Source: Karras et al. 2024, Eq. 75; Tancik et al. 2020.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, channels: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(channels, generator=generator))
        self.register_buffer("phases", torch.rand(channels, generator=generator))

    def forward(self, c: Tensor) -> Tensor:
        c = widened(c)
        turns = c[:, None] * self.frequencies.to(c.dtype) + self.phases.to(c.dtype)
        return (math.sqrt(2) * torch.cos(2 * math.pi * turns)).to(self.frequencies.dtype)
