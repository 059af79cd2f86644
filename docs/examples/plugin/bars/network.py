"""A small convolutional network."""

import torch
from pydantic import PositiveInt
from torch import Tensor, nn


class Convolutions(nn.Module):
    """Two convolutions of the image and its noise level; unconditional."""

    num_classes = None

    def __init__(self, shape: tuple[int, ...], num_classes: int | None, *, width: PositiveInt = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(shape[0] + 1, width, 3, padding=1)
        self.last = nn.Conv2d(width, shape[0], 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, c_noise: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the output for images x [B, C, H, W] with noise levels c_noise [B]."""
        noise = (c_noise / 1000).to(x).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        return self.last(torch.relu(self.first(torch.cat([x, noise], dim=1))))
