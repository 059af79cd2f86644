"""Parameterizations of the network output F: `x_0 = c_skip x_t + c_out F(c_in x_t, c_noise)`."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from pydantic import PositiveFloat
from torch import Tensor

from diffusion_cli.diffusion.schedules import Schedule
from diffusion_cli.errors import UsageError

# Upper limit of EDM's c_noise = log(sigma / alpha) / 4, which would be infinite at alpha = 0.
MAX_C_NOISE = 3.0


class Coefficients(NamedTuple):
    """Coefficients of the parameterization, float64, of the shape of the times."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class Parameterization(ABC):
    """Base class of parameterizations, which define x_0 as a function of the network output."""

    @abstractmethod
    def __call__(self, schedule: Schedule, t: Tensor) -> Coefficients:
        """Return the coefficients at times t in [t_min, 1]."""

    def check(self, schedule: Schedule) -> None:  # noqa: B027
        """Raise UsageError if the parameterization is undefined at some time of the schedule."""


class _NeedsSignal(Parameterization):
    """Parameterization that divides by alpha, undefined for alpha = 0."""

    def check(self, schedule: Schedule) -> None:
        alpha, _ = schedule(torch.ones(1, dtype=torch.float64))
        if alpha == 0:
            name = type(self).__name__.lower()
            raise UsageError(
                "parameterization",
                name,
                "undefined where alpha = 0: x_0 is (x_t - sigma eps) / alpha, and alpha is 0 at t = 1 of the "
                f"{schedule.name} schedule",
                "use v, x0, flow or edm",
            )


class Eps(_NeedsSignal):
    """F is the noise eps: `x_0 = (x_t - sigma F) / alpha` (Ho et al. 2020, Eq. 15)."""

    def __call__(self, schedule: Schedule, t: Tensor) -> Coefficients:
        alpha, sigma = schedule(t)
        return Coefficients(1 / alpha, -sigma / alpha, torch.ones_like(alpha), schedule.timestep(t))


class Score(_NeedsSignal):
    """F is the score -eps / sigma: `x_0 = (x_t + sigma^2 F) / alpha` (Song et al. 2021b, Eq. 7)."""

    def __call__(self, schedule: Schedule, t: Tensor) -> Coefficients:
        alpha, sigma = schedule(t)
        return Coefficients(1 / alpha, sigma**2 / alpha, torch.ones_like(alpha), schedule.timestep(t))


class X0(Parameterization):
    """F is the image x_0."""

    def __call__(self, schedule: Schedule, t: Tensor) -> Coefficients:
        alpha, _ = schedule(t)
        ones = torch.ones_like(alpha)
        return Coefficients(torch.zeros_like(alpha), ones, ones, schedule.timestep(t))


class V(Parameterization):
    """F is `v = alpha eps - sigma x_0`, for alpha^2 + sigma^2 = 1 (Salimans and Ho 2022, App. D).

    In general `x_0 = (alpha x_t - sigma F) / (alpha^2 + sigma^2)`, with the same v.
    """

    def __call__(self, schedule: Schedule, t: Tensor) -> Coefficients:
        alpha, sigma = schedule(t)
        square = alpha**2 + sigma**2
        return Coefficients(alpha / square, -sigma / square, torch.ones_like(alpha), schedule.timestep(t))


class Flow(Parameterization):
    """F is the velocity `alpha' x_0 + sigma' eps` of the path; eps - x_0 for the rectified schedule.

    `x_0 = (sigma' x_t - sigma F) / (alpha sigma' - sigma alpha')`. Source: Lipman et al. 2023, Eq. 13-14.
    """

    def __call__(self, schedule: Schedule, t: Tensor) -> Coefficients:
        (alpha, sigma), (d_alpha, d_sigma) = schedule(t), schedule.derivatives(t)
        turn = alpha * d_sigma - sigma * d_alpha
        return Coefficients(d_sigma / turn, -sigma / turn, torch.ones_like(alpha), schedule.timestep(t))


def edm_noise_level(schedule: Schedule, t: Tensor) -> Tensor:
    """Return EDM's noise level `log(sigma / alpha) / 4`, at most MAX_C_NOISE (Karras et al. 2022, Table 1)."""
    return (-schedule.log_snr(t) / 8).clamp(max=MAX_C_NOISE)


class EDMPreconditioning(Parameterization):
    """EDM preconditioning: inputs and targets of the network have unit variance (Karras et al. 2022, Table 1).

    With `D = alpha^2 sigma_data^2 + sigma^2`: `c_skip = alpha sigma_data^2 / D`, `c_out = sigma sigma_data / sqrt(D)`,
    `c_in = 1 / sqrt(D)`, and `c_noise = log(sigma / alpha) / 4`, at most MAX_C_NOISE.

    Args:
        sigma_data: standard deviation of the data.
    """

    def __init__(self, *, sigma_data: PositiveFloat = 0.5) -> None:
        self.sigma_data = sigma_data

    def __call__(self, schedule: Schedule, t: Tensor) -> Coefficients:
        alpha, sigma = schedule(t)
        D = (alpha * self.sigma_data) ** 2 + sigma**2
        return Coefficients(
            alpha * self.sigma_data**2 / D,
            sigma * self.sigma_data / D.sqrt(),
            1 / D.sqrt(),
            edm_noise_level(schedule, t),
        )
