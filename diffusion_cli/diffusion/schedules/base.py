"""Base class of noise schedules."""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from diffusion_cli.errors import UsageError

Spacing = Literal["leading", "trailing", "linspace", "quadratic", "karras", "log_snr", "time"]
RHO = 7.0  # exponent of the karras grid (Karras et al. 2022, App. D.1)
# sigma / alpha above which the signal is negligible: DDPM's last timestep has 157, that of the cosine schedule 20,000;
# Karras et al. 2022 (App. C.3) also leave out levels above 80.
NO_SIGNAL = 160.0


class Schedule(ABC):
    """Base class of schedules, which map times in [0, 1] of any shape to alpha and sigma in float64.

    Results are on the device of t.
    """

    t_min: float
    """Smallest time of training and likelihoods, in (0, 1)."""
    grid_t_min: float
    """Smallest positive time of a sampling grid, at least t_min."""

    @abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, sigma_t), float64."""

    @abstractmethod
    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (d alpha / dt, d sigma / dt) at t > 0, float64; at kinks the derivative from the left."""

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """Return `log(alpha_t^2 / sigma_t^2)`, float64, strictly decreasing in t; +inf at t = 0."""

    @abstractmethod
    def time_of(self, log_snr: Tensor) -> Tensor:
        """Return the time in [0, 1] with this log signal-to-noise ratio, float64: the inverse of `log_snr`."""

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """Return the noise level that the network gets at time t."""

    @property
    def name(self) -> str:
        """Name of the schedule in messages."""
        return type(self).__name__.removesuffix("Schedule")

    def equals(self, other: "Schedule") -> bool:
        """Return whether another schedule is of the same class and has the same settings, by the noise they give."""
        t = torch.linspace(self.t_min, 1, 501, dtype=torch.float64)
        return (
            type(self) is type(other)
            and (self.t_min, self.grid_t_min) == (other.t_min, other.grid_t_min)
            and torch.equal(self.log_snr(t), other.log_snr(t))
        )

    def with_signal(self, t: Tensor) -> Tensor:
        """Return times t, but at most the time with sigma / alpha = NO_SIGNAL, float64."""
        return torch.minimum(t, self.time_of(torch.full_like(t, -2 * math.log(NO_SIGNAL))))

    def time(self, u: Tensor) -> Tensor:
        """Map uniform numbers u in [0, 1) to uniform training times in [t_min, 1], float64."""
        return self.t_min + (1 - self.t_min) * u.double()

    def sde(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return f and g^2 of the SDE `dx = f x dt + g dw` at t > 0, float64.

        f = alpha' / alpha and g^2 = 2 sigma (sigma' - f sigma), infinite where alpha = 0.

        Source: Kingma et al. 2021, Eq. 10-11; Song et al. 2021b, App. B for VP, sub-VP and VE.
        """
        (alpha, sigma), (d_alpha, d_sigma) = self(t), self.derivatives(t)
        f = d_alpha / alpha
        return f, 2 * sigma * (d_sigma - f * sigma)

    def prior_std(self, t: Tensor) -> Tensor:
        """Return the standard deviation of the initial noise of sampling from time t: max(1, sigma_t).

        It is 1 for variance-preserving processes, and sigma for variance-exploding ones.
        """
        return self(t)[1].clamp(min=1)

    def transition(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return (a, v) of `q(x_t | x_s) = N(a x_s, v)` for s < t.

        a = alpha_t / alpha_s and v = sigma_t^2 - a^2 sigma_s^2, computed from the ratio of the signal-to-noise ratios
        to avoid cancellation for close times.
        """
        (alpha_t, sigma_t), (alpha_s, _) = self(t), self(s)
        return alpha_t / alpha_s, -(sigma_t**2) * torch.expm1(self.log_snr(t) - self.log_snr(s))

    def grid(self, steps: int, spacing: Spacing) -> Tensor:
        """Return the steps + 1 decreasing times of a sampling grid, from about 1 to grid_t_min, and then 0.

        With k = 0..steps - 1, the spacings `leading`, `trailing`, `linspace` and `quadratic` are the limits of
        `Discrete.grid` for many timesteps: k / steps, 1 - k / steps, uniform, and uniform squared, on [grid_t_min, 1].
        `time` is uniform in t, `log_snr` in log(alpha / sigma), and `karras` in (sigma / alpha)^(1/7) (Karras et al.
        2022, Eq. 5); the latter two start at most at sigma / alpha = NO_SIGNAL. A single step always starts at 1.

        Raises:
            UsageError: there is no such grid.
        """
        if steps < 1:
            raise UsageError("steps", steps, "must be positive", "use 1 or more")
        k = torch.arange(steps, dtype=torch.float64)
        share = k / max(1, steps - 1)
        if steps == 1:
            times = torch.ones_like(k)
        elif spacing in ("log_snr", "karras"):
            times = self._even_in_noise(share, spacing)
        elif spacing == "leading":
            times = (self.grid_t_min + k / steps * (1 - self.grid_t_min)).flip(0)
        elif spacing == "trailing":
            times = 1 - k / steps * (1 - self.grid_t_min)
        else:
            rising = share**2 if spacing == "quadratic" else share
            times = (self.grid_t_min + (1 - self.grid_t_min) * rising).flip(0)
        return torch.cat([times, torch.zeros(1, dtype=torch.float64)])

    def _even_in_noise(self, share: Tensor, spacing: Spacing) -> Tensor:
        """Return times down to grid_t_min, uniform in the logarithm or the root of sigma / alpha."""
        ends = torch.tensor([1.0, self.grid_t_min], dtype=torch.float64)
        noisiest, cleanest = self.log_snr(ends).clamp(min=-2 * math.log(NO_SIGNAL))
        if spacing == "log_snr":
            log_snr = noisiest + share * (cleanest - noisiest)
        else:
            first, last = torch.exp(-noisiest / (2 * RHO)), torch.exp(-cleanest / (2 * RHO))
            log_snr = -2 * RHO * torch.log(first + share * (last - first))
        times = self.time_of(log_snr)
        times[-1] = ends[1]
        return times
