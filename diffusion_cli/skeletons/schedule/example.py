"""A trigonometric schedule."""

import math
from typing import Annotated

import torch
from diffusion_cli.diffusion.schedules import Schedule
from pydantic import Field
from torch import Tensor


class Example(Schedule):
    """alpha = cos(a t), sigma = sin(a t), with the angle a = end pi / 2.

    A schedule maps times t in [0, 1] of any shape to alpha and sigma of `x_t = alpha x_0 + sigma eps`, in float64.

    Args:
        end: share of a quarter turn at t = 1; 1 would leave no signal, which eps needs
    """

    t_min = 1e-5
    grid_t_min = 1e-3

    def __init__(self, *, end: Annotated[float, Field(gt=0, lt=1)] = 0.99) -> None:
        self.angle = end * math.pi / 2

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma."""
        angle = self.angle * t.double()
        return torch.cos(angle), torch.sin(angle)

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the derivatives of alpha and sigma by t."""
        alpha, sigma = self(t)
        return -self.angle * sigma, self.angle * alpha

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(alpha^2 / sigma^2), which must decrease in t."""
        return -2 * torch.log(torch.tan(self.angle * t.double()))

    def time_of(self, log_snr: Tensor) -> Tensor:
        """Return the time with a log-SNR: the inverse of `log_snr`."""
        return (torch.atan(torch.exp(-log_snr.double() / 2)) / self.angle).clamp(max=1)

    def timestep(self, t: Tensor) -> Tensor:
        """Return the noise level that the network gets; networks expect 0 to 999."""
        return 999 * t
