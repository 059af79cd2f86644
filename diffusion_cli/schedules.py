"""Noise schedules: how much signal and how much noise there is at each time.

Everywhere `x_t = alpha_t x_0 + sigma_t eps`, with t = 0 the data and t = 1 the noise.
"""

import math
from abc import ABC, abstractmethod
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

Spacing = Literal["leading", "trailing", "linspace", "quadratic"]


class Schedule(ABC):
    """A map from time to the amounts of signal and noise; all of it is computed in float64."""

    @abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return float64 `(alpha_t, sigma_t)` for times t in [0, 1] of any shape, on the device of t."""

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """Return float64 `log(alpha_t^2 / sigma_t^2)`, which falls strictly with t; +inf at t = 0."""

    @abstractmethod
    def time(self, u: Tensor) -> Tensor:
        """Map uniform numbers u in [0, 1) to the times that training draws, float64."""

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """Return the number that the network is told for time t."""

    @abstractmethod
    def grid(self, steps: int, spacing: Spacing) -> Tensor:
        """Return steps + 1 falling times, the last of them 0; ValueError where there is no such grid."""

    def transition(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(a, v)` of `q(x_t | x_s) = N(a x_s, v)` for s < t.

        a = alpha_t / alpha_s and v = sigma_t^2 - a^2 sigma_s^2, the latter written with the ratio of the two
        signal-to-noise ratios, so that neighbours do not cancel.
        """
        (alpha_t, sigma_t), (alpha_s, _) = self(t), self(s)
        return alpha_t / alpha_s, -(sigma_t**2) * torch.expm1(self.log_snr(t) - self.log_snr(s))


class Discrete(Schedule):
    """The variance-preserving process with T steps, given by its betas (Ho et al. 2020, Eq. 2-4).

    A table of log alpha_bar at t = i/T for i = 0..T, with alpha_bar_0 = 1; linear in log alpha_bar between
    entries, so that on the table it is the published process exactly. Entry i is the level that DDPM's code
    numbers i - 1.
    """

    def __init__(self, betas: Tensor) -> None:
        if not (betas.gt(0).all() and betas.lt(1).all()):
            raise ValueError(
                f"schedule.num_timesteps={len(betas)}: beta leaves (0, 1), it runs from {betas.min():.3g} to "
                f"{betas.max():.3g}; take more timesteps or smaller betas"
            )
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas.double(), 0)])
        self.num_timesteps = len(betas)
        self._log_alpha_bar = {torch.device("cpu"): alpha_bar.log()}

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        """Return float64 `log alpha_bar_t` on the device of t."""
        if t.device not in self._log_alpha_bar:
            self._log_alpha_bar[t.device] = self._log_alpha_bar[torch.device("cpu")].to(t.device)
        table = self._log_alpha_bar[t.device]
        position = t.double() * self.num_timesteps
        below = position.floor().clamp(0, self.num_timesteps - 1)
        left, right = table[below.long()], table[below.long() + 1]
        return left + (position - below) * (right - left)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha_bar = self.log_alpha_bar(t)
        return torch.exp(log_alpha_bar / 2), torch.sqrt(-torch.expm1(log_alpha_bar))

    def log_snr(self, t: Tensor) -> Tensor:
        log_alpha_bar = self.log_alpha_bar(t)
        return log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))

    def time(self, u: Tensor) -> Tensor:
        return ((u.double() * self.num_timesteps).floor() + 1) / self.num_timesteps

    def timestep(self, t: Tensor) -> Tensor:
        return t * self.num_timesteps - 1

    def grid(self, steps: int, spacing: Spacing) -> Tensor:
        """Return the times of the T-step process that `steps` steps visit, then 0.

        With entries numbered 1..T: `leading` is 1 + k floor(T/steps) (DDIM's "uniform"; it starts short of the
        noise unless steps divides T), `trailing` T - k T/steps, `linspace` spans 1..T evenly, `quadratic`
        squares an even grid that ends at 0.8 T (Song et al. 2021a, D.3). A single step always starts at T,
        because that is where pure noise lives. ValueError unless 1 <= steps <= T.
        """
        T = self.num_timesteps
        if not 1 <= steps <= T:
            raise ValueError(f"steps={steps}: the schedule has {T} timesteps; give a number from 1 to {T}")
        k = torch.arange(steps, dtype=torch.float64)
        if steps == 1:
            entries = torch.tensor([T], dtype=torch.float64)
        elif spacing == "leading":
            entries = 1 + k * (T // steps)
        elif spacing == "trailing":
            entries = torch.round(T - k * (T / steps)).flip(0)
        elif spacing == "linspace":
            entries = 1 + torch.round(k * ((T - 1) / (steps - 1)))
        else:
            squares = 1 + torch.floor((k * (math.sqrt(0.8 * T) / (steps - 1))) ** 2)
            # Near the data the squares fall together: each entry moves up until all are different.
            entries = torch.cummax(squares - k, 0).values + k
        return torch.cat([entries.flip(0) / T, torch.zeros(1, dtype=torch.float64)])


class Linear(Discrete):
    """Betas that rise linearly (Ho et al. 2020, Sec. 4), their range stated for 1,000 steps."""

    def __init__(
        self, *, num_timesteps: PositiveInt, beta_start: PositiveFloat, beta_end: PositiveFloat
    ) -> None:
        scale = 1000 / num_timesteps
        super().__init__(
            torch.linspace(scale * beta_start, scale * beta_end, num_timesteps, dtype=torch.float64)
        )


class ScaledLinear(Discrete):
    """Betas whose square roots rise linearly (the latent-diffusion code's "linear"), range for 1,000 steps."""

    def __init__(
        self, *, num_timesteps: PositiveInt, beta_start: PositiveFloat, beta_end: PositiveFloat
    ) -> None:
        scale = 1000 / num_timesteps
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64)
        super().__init__(scale * roots**2)


class Cosine(Discrete):
    """alpha_bar is a squared cosine (Nichol & Dhariwal 2021, Eq. 17), each beta at most max_beta."""

    def __init__(
        self,
        *,
        num_timesteps: PositiveInt,
        offset: PositiveFloat,
        max_beta: Annotated[float, Field(gt=0, lt=1)],
    ) -> None:
        t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        alpha_bar = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
        super().__init__((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta))
