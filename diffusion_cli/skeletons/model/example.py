"""A small convolutional network."""

import torch
from diffusion_cli.networks.layers import timestep_embedding, zero_init
from pydantic import PositiveInt
from torch import Tensor, nn


class Example(nn.Module):
    """A stack of residual 3x3 convolutions; unconditional.

    A network maps noisy images and their noise levels to a tensor of the shape of the images. Its last layer starts at
    zero, so that training starts at the loss of predicting zero.

    Args:
        shape: shape of an image, [C, H, W]; the program passes it.
        num_classes: number of classes, or None; the program passes it.
        width: channels of each layer
        depth: residual blocks
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int | None,
        *,
        width: PositiveInt = 32,
        depth: PositiveInt = 4,
    ) -> None:
        super().__init__()
        self.num_classes = None  # number of classes that `y` may have; None for an unconditional network
        self.width = width
        self.first = nn.Conv2d(shape[0], width, 3, padding=1)
        self.noise = nn.Linear(width, width)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.last = nn.Conv2d(width, shape[0], 3, padding=1)
        zero_init(self.last)

    def forward(self, x: Tensor, c_noise: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the output [B, C, H, W] for images x, noise levels c_noise [B] and classes y, int64 [B] or None."""
        noise = self.noise(timestep_embedding(c_noise, self.width, "cos_sin").to(x))
        h = self.first(x) + noise[:, :, None, None]
        for block in self.blocks:
            h = h + block(torch.relu(h))
        return self.last(torch.relu(h))
