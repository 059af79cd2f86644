"""What a schedule is."""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from diffusion_cli.errors import UsageError

Spacing = Literal["leading", "trailing", "linspace", "quadratic", "karras", "log_snr", "time"]
RHO = 7.0  # of the karras grid (Karras et al. 2022, App. D.1)
# sigma / alpha beyond which there is no signal to speak of: above that of DDPM's last timestep, 157, and far below that
# of the cosine schedule's, 20,000, of which Karras et al. 2022 (App. C.3) too leave out what lies above 80.
NO_SIGNAL = 160.0


class Schedule(ABC):
    """A map from time to the amounts of signal and noise; all of it is computed in float64.

    Functions of t take times in [0, 1] of any shape, and return on the device of t.
    """

    t_min: float
    """The smallest time that training and likelihoods visit, in (0, 1)."""
    grid_t_min: float
    """The smallest positive time of a sampling grid, at least t_min."""

    @abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return float64 `(alpha_t, sigma_t)`."""

    @abstractmethod
    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return float64 `(d alpha / dt, d sigma / dt)` at t > 0; the slope from the left where it jumps."""

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """Return float64 `log(alpha_t^2 / sigma_t^2)`, which falls strictly with t; +inf at t = 0."""

    @abstractmethod
    def time_of(self, log_snr: Tensor) -> Tensor:
        """Return the float64 time of a log signal-to-noise ratio, the inverse of `log_snr`, within [0, 1]."""

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """Return the noise level number that the network gets for time t."""

    @property
    def name(self) -> str:
        """Name in messages."""
        return type(self).__name__.removesuffix("Schedule")

    def equals(self, other: "Schedule") -> bool:
        """Return whether another schedule is of the same class and has the same settings, by the noise they give."""
        t = torch.linspace(self.t_min, 1, 501, dtype=torch.float64)
        return (
            type(self) is type(other)
            and (self.t_min, self.grid_t_min) == (other.t_min, other.grid_t_min)
            and torch.equal(self.log_snr(t), other.log_snr(t))
        )

    def time(self, u: Tensor) -> Tensor:
        """Map uniform numbers u in [0, 1) to uniform training times, float64 in [t_min, 1]."""
        return self.t_min + (1 - self.t_min) * u.double()

    def sde(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return f and g^2 of the process `dx = f x dt + g dw`, float64, at t > 0.

        f = alpha' / alpha and g^2 = 2 sigma (sigma' - f sigma); both are infinite where alpha = 0.
        Source: Kingma et al. 2021, Eq. 10-11; Song et al. 2021b, App. B for VP, sub-VP and VE.
        """
        (alpha, sigma), (d_alpha, d_sigma) = self(t), self.derivatives(t)
        f = d_alpha / alpha
        return f, 2 * sigma * (d_sigma - f * sigma)

    def prior_std(self, t: Tensor) -> Tensor:
        """Return the standard deviation of the Gaussian that sampling starts from at time t: max(1, sigma_t).

        That is 1 for processes that keep the variance of data, and sigma where the noise outgrows the data.
        """
        return self(t)[1].clamp(min=1)

    def transition(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(a, v)` of `q(x_t | x_s) = N(a x_s, v)` for s < t.

        a = alpha_t / alpha_s and v = sigma_t^2 - a^2 sigma_s^2, the latter written with the ratio of the two
        signal-to-noise ratios, so that neighbours do not cancel.
        """
        (alpha_t, sigma_t), (alpha_s, _) = self(t), self(s)
        return alpha_t / alpha_s, -(sigma_t**2) * torch.expm1(self.log_snr(t) - self.log_snr(s))

    def grid(self, steps: int, spacing: Spacing) -> Tensor:
        """Return steps + 1 falling times, from 1 or somewhat below to grid_t_min, then 0.

        With k = 0..steps - 1: `leading`, `trailing`, `linspace` and `quadratic` are the published lists of the
        T-step process, on its table (`Discrete.grid`), or their limits for large T on [grid_t_min, 1]: k / steps,
        1 - k / steps, an even grid, an even grid squared. Off the table: `time` is even in t, `log_snr` in
        log(alpha / sigma), `karras` in (sigma / alpha)^(1/7) (Karras et al. 2022, Eq. 5), these two from where
        sigma / alpha is NO_SIGNAL if it goes beyond. A single step always starts at 1, because that is where pure noise
        lives. UsageError where there is no such grid.
        """
        if steps < 1:
            raise UsageError("steps", steps, "give a number from 1")
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
        """Times to grid_t_min, even in the logarithm or a root of sigma / alpha."""
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
