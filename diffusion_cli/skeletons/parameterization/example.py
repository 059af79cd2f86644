"""A parameterization with inputs and targets of unit variance."""

import torch
from diffusion_cli.diffusion.parameterizations import Coefficients, Parameterization
from diffusion_cli.diffusion.schedules import Schedule
from pydantic import PositiveFloat
from torch import Tensor


class Example(Parameterization):
    """F is the error of the best linear estimate of x_0, in units of its standard deviation.

    A parameterization gives the coefficients of `x_0 = c_skip x_t + c_out F(c_in x_t, c_noise)` at times t.

    Args:
        data_std: standard deviation of the data
    """

    def __init__(self, *, data_std: PositiveFloat = 0.5) -> None:
        self.data_std = data_std

    def __call__(self, schedule: Schedule, t: Tensor) -> Coefficients:
        """Return c_skip, c_out, c_in and c_noise, float64, of the shape of t."""
        alpha, sigma = schedule(t)
        variance = alpha**2 * self.data_std**2 + sigma**2  # of x_t
        std = torch.sqrt(variance)
        c_skip = alpha * self.data_std**2 / variance
        return Coefficients(c_skip, sigma * self.data_std / std, 1 / std, schedule.timestep(t))
