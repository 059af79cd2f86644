"""Distributions of training times, each a function of uniform random numbers."""

from abc import ABC, abstractmethod
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from diffusion_cli.diffusion.schedules import Discrete, Schedule
from diffusion_cli.errors import UsageError
from diffusion_cli.networks.layers import float64_device


class TimeBatch(NamedTuple):
    """Times of a training batch, each [B]."""

    t: Tensor
    """Times in [t_min, 1], float64."""
    weight: Tensor
    """Weight of the loss: uniform density / sampling density, or 1."""
    quantile: Tensor
    """Quantile of t in its distribution, in [0, 1], increasing with t."""
    bins: Tensor | None = None
    """Bin of t in adaptive distributions, int64, or None."""


class Times(nn.Module, ABC):
    """Base class of distributions of training times."""

    uniform = False
    """Whether the weighted mean of a loss estimates its mean over uniform times, or over the timesteps."""

    def check(self, schedule: Schedule) -> None:
        """Raise UsageError if the distribution does not apply to the schedule."""

    @abstractmethod
    def forward(self, schedule: Schedule, u: Tensor) -> TimeBatch:
        """Convert independent uniform numbers u in [0, 1), [B], for the batch over all processes, to times."""

    def observe(self, bins: Tensor, loss: Tensor) -> None:
        """Adapt to the unweighted losses [B] of a training step in bins [B]."""


class Uniform(Times):
    """Uniform in t, or over the timesteps of a discrete schedule (Ho et al. 2020, Alg. 1)."""

    uniform = True

    def forward(self, schedule: Schedule, u: Tensor) -> TimeBatch:
        return TimeBatch(schedule.time(u), torch.ones_like(u), u)


class Stratified(Times):
    """Stratified uniform, one time in each of B equal intervals, for less variance (Kingma et al. 2021, App. I.1)."""

    uniform = True

    def forward(self, schedule: Schedule, u: Tensor) -> TimeBatch:
        quantile = (torch.arange(len(u), device=u.device) + u.double()) / len(u)
        return TimeBatch(schedule.time(quantile), torch.ones_like(u), quantile)


class LogNormal(Times):
    """log(sigma / alpha) is normal, clipped to the range of the schedule (Karras et al. 2022, Table 1).

    Args:
        mean: mean of log(sigma / alpha).
        std: standard deviation of log(sigma / alpha).
    """

    def __init__(self, *, mean: float = -1.2, std: PositiveFloat = 1.2) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, schedule: Schedule, u: Tensor) -> TimeBatch:
        log_ratio = self.mean + self.std * _normal(u)
        return TimeBatch(schedule.time_of(-2 * log_ratio).clamp(min=schedule.t_min), torch.ones_like(u), u)


class LogitNormal(Times):
    """log(t / (1 - t)) is normal, for rectified flows (Esser et al. 2024, Eq. 19).

    Args:
        mean: mean of log(t / (1 - t)).
        std: standard deviation of log(t / (1 - t)).
    """

    def __init__(self, *, mean: float = 0.0, std: PositiveFloat = 1.0) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, schedule: Schedule, u: Tensor) -> TimeBatch:
        t = torch.sigmoid(self.mean + self.std * _normal(u))
        return TimeBatch(t.clamp(min=schedule.t_min), torch.ones_like(u), u)


class LossSecondMoment(Times):
    """Importance sampling of times proportional to sqrt(E[loss^2]) (Nichol and Dhariwal 2021, Eq. 18).

    The loss is divided by the probability. Each bin of times keeps its last losses in the checkpoint; times are
    uniform until all bins are full.

    Args:
        bins: number of bins; at most the number of timesteps of a discrete schedule.
        memory: losses per bin.
        uniform_share: fraction of times that are always uniform, in (0, 1].
    """

    uniform = True
    history: Tensor
    count: Tensor

    def __init__(
        self,
        *,
        bins: PositiveInt = 1000,
        memory: PositiveInt = 10,
        uniform_share: Annotated[float, Field(gt=0, le=1)] = 0.001,
    ) -> None:
        super().__init__()
        self.bins, self.memory, self.uniform_share = bins, memory, uniform_share
        self.register_buffer("history", torch.zeros(bins, memory))
        self.register_buffer("count", torch.zeros(bins, dtype=torch.int64))

    def check(self, schedule: Schedule) -> None:
        if isinstance(schedule, Discrete) and self.bins > schedule.num_timesteps:
            raise UsageError(
                "time_sampling.bins",
                self.bins,
                "some bins would stay empty",
                f"use {schedule.num_timesteps}, the number of timesteps, or fewer",
            )

    def probabilities(self) -> Tensor:
        """Return the probability of each bin, float64 [bins]."""
        device = float64_device(self.history.device)
        uniform = torch.full((self.bins,), 1 / self.bins, dtype=torch.float64, device=device)
        moments = self.history.to(device).double().square().mean(1).sqrt()
        learned = moments / moments.sum() * (1 - self.uniform_share) + uniform * self.uniform_share
        # No branch on the host, which would synchronize with a GPU.
        return torch.where((self.count >= self.memory).all().to(device), learned, uniform)

    def forward(self, schedule: Schedule, u: Tensor) -> TimeBatch:
        p = self.probabilities()
        cumulative = p.cumsum(0)
        u = u.double() * cumulative[-1]
        chosen = torch.searchsorted(cumulative, u, right=True).clamp(max=self.bins - 1)
        within = ((u - (cumulative - p)[chosen]) / p[chosen]).clamp(0, 1 - 1e-9)
        weight = 1 / (self.bins * p[chosen])
        return TimeBatch(schedule.time((chosen + within) / self.bins), weight.float(), u, chosen)

    def observe(self, bins: Tensor, loss: Tensor) -> None:
        """Store the losses, each in place of the oldest of its bin."""
        bins = bins.to(self.count.device)
        same = bins[:, None] == bins
        earlier, later = same.tril(-1).sum(1), same.triu(1).sum(1)  # number in the same bin in this batch
        places = (self.count[bins] + earlier) % self.memory
        # Only the last `memory` losses of a bin are stored: no place is written twice; others go to a spare row.
        rows = torch.where(later < self.memory, bins, self.bins)
        history = torch.cat([self.history, self.history[:1]])
        history[rows, places] = loss.detach().to(history)
        self.history.copy_(history[:-1])
        self.count.index_add_(0, bins, torch.ones_like(bins))


def _normal(u: Tensor) -> Tensor:
    """Return standard normal numbers, float64, increasing with u in [0, 1)."""
    return torch.special.ndtri(u.double().clamp(1e-9, 1 - 1e-9))
