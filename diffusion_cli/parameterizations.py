"""What the network's output F means: one linear map, `x_0 = c_skip x_t + c_out F(c_in x_t, c_noise)`."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_cli.schedules import Schedule


class Coefficients(NamedTuple):
    """The four numbers of the map, float64, each of the shape of the times that they belong to."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class Parameterization(ABC):
    """A row of the table that says how x_0 is read off the network's output."""

    @abstractmethod
    def __call__(self, schedule: Schedule, t: Tensor) -> Coefficients:
        """Return the coefficients at times t in (0, 1]."""


class Eps(Parameterization):
    """F is the noise: `x_0 = (x_t - sigma F) / alpha` (Ho et al. 2020, Eq. 15)."""

    def __call__(self, schedule: Schedule, t: Tensor) -> Coefficients:
        alpha, sigma = schedule(t)
        return Coefficients(1 / alpha, -sigma / alpha, torch.ones_like(alpha), schedule.timestep(t))
