"""The times at which training looks: distributions over noise levels, each a function of uniform numbers."""

from abc import ABC, abstractmethod
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from diffusion_cli.diffusion.schedules import Discrete, Schedule
from diffusion_cli.errors import UsageError


class TimeBatch(NamedTuple):
    """Times for a batch, each [B]."""

    t: Tensor
    """float64, in [t_min, 1]."""
    weight: Tensor
    """What the loss at that time counts for: the uniform density over the one it was drawn from, or 1."""
    quantile: Tensor
    """Where t stands in the distribution, in [0, 1]: rising with t."""
    bins: Tensor | None = None
    """Where a distribution that learns wants to remember the losses, int64."""


class Times(nn.Module, ABC):
    """A distribution over times."""

    uniform = False
    """Whether the weighted mean of a loss is its mean over uniform times, or over the timesteps."""

    def check(self, schedule: Schedule) -> None:
        """Raise UsageError if it cannot draw times of the schedule."""

    @abstractmethod
    def forward(self, schedule: Schedule, u: Tensor) -> TimeBatch:
        """Turn independent uniform numbers u in [0, 1), [B], for the batch of all processes, into times."""

    def observe(self, bins: Tensor, loss: Tensor) -> None:
        """Learn from the unweighted losses [B] of a training step, at the bins [B] that were drawn."""


class Uniform(Times):
    """Uniform in t, or over the entries of a table (Ho et al. 2020, Alg. 1)."""

    uniform = True

    def forward(self, schedule: Schedule, u: Tensor) -> TimeBatch:
        return TimeBatch(schedule.time(u), torch.ones_like(u), u)


class Stratified(Times):
    """Uniform, one time in each of B equal intervals: the same mean, less noise (Kingma et al. 2021, App. I.1)."""

    uniform = True

    def forward(self, schedule: Schedule, u: Tensor) -> TimeBatch:
        quantile = (torch.arange(len(u), device=u.device) + u.double()) / len(u)
        return TimeBatch(schedule.time(quantile), torch.ones_like(u), quantile)


class LogNormal(Times):
    """log(sigma / alpha) is normal, its ends cut to the schedule's (Karras et al. 2022, Table 1)."""

    def __init__(self, *, mean: float = -1.2, std: PositiveFloat = 1.2) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, schedule: Schedule, u: Tensor) -> TimeBatch:
        log_ratio = self.mean + self.std * _normal(u)
        return TimeBatch(schedule.time_of(-2 * log_ratio).clamp(min=schedule.t_min), torch.ones_like(u), u)


class LogitNormal(Times):
    """log(t / (1 - t)) is normal, for straight paths (Esser et al. 2024, Eq. 19)."""

    def __init__(self, *, mean: float = 0.0, std: PositiveFloat = 1.0) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, schedule: Schedule, u: Tensor) -> TimeBatch:
        t = torch.sigmoid(self.mean + self.std * _normal(u))
        return TimeBatch(t.clamp(min=schedule.t_min), torch.ones_like(u), u)


class LossSecondMoment(Times):
    """Times in proportion to sqrt(E[loss^2]), the loss divided by that proportion (Nichol & Dhariwal 2021, Eq. 18).

    The times that training draws are cut into `bins` alike, one an entry for a table of as many; each remembers its
    last `memory` losses, in the checkpoint. Times are uniform until every bin is full. A share `uniform_share` always
    stays uniform.
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
                "some would stay empty",
                f"take {schedule.num_timesteps}, the number of timesteps, or fewer",
            )

    def probabilities(self) -> Tensor:
        """The probability of each bin, float64 [bins]."""
        uniform = torch.full((self.bins,), 1 / self.bins, dtype=torch.float64, device=self.history.device)
        moments = self.history.double().square().mean(1).sqrt()
        learned = moments / moments.sum() * (1 - self.uniform_share) + uniform * self.uniform_share
        # No branch on the host: a GPU would have to wait for it.
        return torch.where((self.count >= self.memory).all(), learned, uniform)

    def forward(self, schedule: Schedule, u: Tensor) -> TimeBatch:
        p = self.probabilities()
        cumulative = p.cumsum(0)
        u = u.double() * cumulative[-1]
        chosen = torch.searchsorted(cumulative, u, right=True).clamp(max=self.bins - 1)
        within = ((u - (cumulative - p)[chosen]) / p[chosen]).clamp(0, 1 - 1e-9)
        weight = 1 / (self.bins * p[chosen])
        return TimeBatch(schedule.time((chosen + within) / self.bins), weight.float(), u, chosen)

    def observe(self, bins: Tensor, loss: Tensor) -> None:
        """Remember the losses, each in the place of its bin's oldest."""
        same = bins[:, None] == bins
        earlier, later = same.tril(-1).sum(1), same.triu(1).sum(1)  # of the same bin in this batch
        places = (self.count[bins] + earlier) % self.memory
        # Of more than a bin can hold only the last count, so that no place is written twice; the others go to a spare.
        rows = torch.where(later < self.memory, bins, self.bins)
        history = torch.cat([self.history, self.history[:1]])
        history[rows, places] = loss.detach().to(history)
        self.history.copy_(history[:-1])
        self.count.index_add_(0, bins, torch.ones_like(bins))


def _normal(u: Tensor) -> Tensor:
    """Standard normal numbers, float64, rising with u in [0, 1)."""
    return torch.special.ndtri(u.double().clamp(1e-9, 1 - 1e-9))
