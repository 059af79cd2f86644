"""A distribution of training times."""

import torch
from diffusion_cli.diffusion.schedules import Schedule
from diffusion_cli.diffusion.time_sampling import TimeBatch, Times
from pydantic import PositiveFloat
from torch import Tensor


class Example(Times):
    """t = u^power for uniform u: more times near the data for a power above 1.

    A distribution converts uniform random numbers to times, with the weight of the loss and the quantile of each time.

    Args:
        power: exponent; 1 is uniform
    """

    def __init__(self, *, power: PositiveFloat = 2.0) -> None:
        super().__init__()
        self.power = power

    def forward(self, schedule: Schedule, u: Tensor) -> TimeBatch:
        """Return the times of independent uniform numbers u in [0, 1), [B]."""
        return TimeBatch(schedule.time(u.double() ** self.power), torch.ones_like(u), u)
