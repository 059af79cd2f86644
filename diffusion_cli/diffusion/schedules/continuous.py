"""Schedules in continuous time."""

import math
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from diffusion_cli.diffusion.schedules.base import RHO, Schedule
from diffusion_cli.errors import UsageError

Fraction = Annotated[float, Field(gt=0, lt=1)]
# Smallest time of training; published samplers stop earlier (Song et al. 2021b, App. C).
TRAINING_T_MIN = 1e-5
# Networks made for the timesteps 0..999 of DDPM get 999 t.
LAST_TIMESTEP = 999


def _integral(t: Tensor, beta_min: float, beta_max: float) -> Tensor:
    """Return the integral B(t) of beta = beta_min + t (beta_max - beta_min) from 0 to t, float64."""
    t = t.double()
    return t * (beta_min + t * ((beta_max - beta_min) / 2))


def _time_of_integral(B: Tensor, beta_min: float, beta_max: float) -> Tensor:
    """Return the time in [0, 1] at which the integral of beta is B, in a form without cancellation."""
    B = B.clamp(max=(beta_min + beta_max) / 2)
    return 2 * B / (beta_min + torch.sqrt(beta_min**2 + 2 * (beta_max - beta_min) * B))


class _LinearBeta(Schedule):
    """Base class of VP and sub-VP: alpha = exp(-B / 2) with a linear beta."""

    def __init__(
        self, *, beta_min: PositiveFloat = 0.1, beta_max: PositiveFloat = 20.0, grid_t_min: Fraction = 0.001
    ) -> None:
        if beta_min >= beta_max:
            raise UsageError("schedule.beta_min", beta_min, f"must be less than schedule.beta_max={beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max
        self.t_min, self.grid_t_min = min(TRAINING_T_MIN, grid_t_min), grid_t_min

    def _integrated_beta(self, t: Tensor) -> Tensor:
        return _integral(t, self.beta_min, self.beta_max)

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t.double() * (self.beta_max - self.beta_min)

    def timestep(self, t: Tensor) -> Tensor:
        return LAST_TIMESTEP * t


class VP(_LinearBeta):
    """Variance-preserving SDE: `alpha = exp(-B / 2), sigma^2 = 1 - exp(-B)` (Song et al. 2021b, Eq. 29-33).

    B is the integral of beta(t) = beta_min + t (beta_max - beta_min).

    Args:
        beta_min: beta at t = 0.
        beta_max: beta at t = 1.
        grid_t_min: smallest positive time of a sampling grid, in (0, 1).
    """

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        B = self._integrated_beta(t)
        return torch.exp(-B / 2), torch.sqrt(-torch.expm1(-B))

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self(t)
        d_alpha = -self._beta(t) / 2 * alpha
        return d_alpha, -alpha * d_alpha / sigma

    def log_snr(self, t: Tensor) -> Tensor:
        return -torch.log(torch.expm1(self._integrated_beta(t)))

    def time_of(self, log_snr: Tensor) -> Tensor:
        B = torch.log1p(torch.exp(-log_snr.double()))
        return _time_of_integral(B, self.beta_min, self.beta_max)


class SubVP(_LinearBeta):
    """Sub-VP SDE: `alpha = exp(-B / 2), sigma = 1 - exp(-B)` (Song et al. 2021b, Eq. 27-29); arguments as `VP`."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        B = self._integrated_beta(t)
        return torch.exp(-B / 2), -torch.expm1(-B)

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, _ = self(t)
        beta = self._beta(t)
        return -beta / 2 * alpha, beta * alpha**2

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * torch.log(2 * torch.sinh(self._integrated_beta(t) / 2))

    def time_of(self, log_snr: Tensor) -> Tensor:
        B = 2 * torch.asinh(torch.exp(-log_snr.double() / 2) / 2)
        return _time_of_integral(B, self.beta_min, self.beta_max)


class VE(Schedule):
    """Variance-exploding SDE: alpha = 1, `sigma = sigma_min (sigma_max / sigma_min)^t` for t > 0, sigma_0 = 0.

    The network gets log sigma.

    Args:
        sigma_min: limit of sigma for t -> 0.
        sigma_max: sigma at t = 1, more than sigma_min.
        grid_t_min: smallest positive time of a sampling grid, in (0, 1).

    Source: Song et al. 2021b, Eq. 30-31 and App. C.
    """

    def __init__(
        self,
        *,
        sigma_min: PositiveFloat = 0.01,
        sigma_max: PositiveFloat = 50.0,
        grid_t_min: Fraction = 1e-05,
    ) -> None:
        if sigma_min >= sigma_max:
            raise UsageError(
                "schedule.sigma_min", sigma_min, f"must be less than schedule.sigma_max={sigma_max}"
            )
        self.log_min, self.log_rise = math.log(sigma_min), math.log(sigma_max / sigma_min)
        self.t_min, self.grid_t_min = min(TRAINING_T_MIN, grid_t_min), grid_t_min

    def _log_sigma(self, t: Tensor) -> Tensor:
        return torch.where(t > 0, self.log_min + self.log_rise * t.double(), -math.inf)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t, dtype=torch.float64), torch.exp(self._log_sigma(t))

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t, dtype=torch.float64), self.log_rise * self(t)[1]

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * self._log_sigma(t)

    def time_of(self, log_snr: Tensor) -> Tensor:
        return ((-log_snr.double() / 2 - self.log_min) / self.log_rise).clamp(0, 1)

    def timestep(self, t: Tensor) -> Tensor:
        return self._log_sigma(t)


class EDMSchedule(Schedule):
    """EDM: alpha = 1, `sigma = sigma_max t^7` (Karras et al. 2022).

    The paper uses sigma as time; this time makes its grid uniform and changes neither training nor sampling. The
    network gets log(sigma) / 4.

    Args:
        sigma_min: smallest positive noise level of training and sampling grids.
        sigma_max: sigma at t = 1, more than sigma_min.
    """

    def __init__(self, *, sigma_min: PositiveFloat = 0.002, sigma_max: PositiveFloat = 80.0) -> None:
        if sigma_min >= sigma_max:
            raise UsageError(
                "schedule.sigma_min", sigma_min, f"must be less than schedule.sigma_max={sigma_max}"
            )
        self.sigma_max = sigma_max
        self.t_min = self.grid_t_min = (sigma_min / sigma_max) ** (1 / RHO)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t, dtype=torch.float64), self.sigma_max * t.double() ** RHO

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t, dtype=torch.float64), RHO * self.sigma_max * t.double() ** (RHO - 1)

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * (math.log(self.sigma_max) + RHO * torch.log(t.double()))

    def time_of(self, log_snr: Tensor) -> Tensor:
        return torch.exp((-log_snr.double() / 2 - math.log(self.sigma_max)) / RHO).clamp(0, 1)

    def timestep(self, t: Tensor) -> Tensor:
        return -self.log_snr(t) / 8


class Rectified(Schedule):
    """Straight paths from data to noise: `alpha = 1 - t, sigma = t` (Liu et al. 2023; Lipman et al. 2023).

    Args:
        grid_t_min: smallest positive time of a sampling grid, in (0, 1).
    """

    def __init__(self, *, grid_t_min: Fraction = 0.001) -> None:
        self.t_min, self.grid_t_min = min(TRAINING_T_MIN, grid_t_min), grid_t_min

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t.double(), t.double()

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        ones = torch.ones_like(t, dtype=torch.float64)
        return -ones, ones

    def log_snr(self, t: Tensor) -> Tensor:
        t = t.double()
        return 2 * (torch.log1p(-t) - torch.log(t))

    def time_of(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr.double() / 2)

    def timestep(self, t: Tensor) -> Tensor:
        return LAST_TIMESTEP * t


class FlowMatching(Rectified):
    """The schedule `Rectified` with other timesteps: the network gets num_timesteps t, as those of diffusers.

    Args:
        num_timesteps: timestep of the network at t = 1.
        grid_t_min: smallest positive time of a sampling grid, in (0, 1).
    """

    def __init__(self, *, num_timesteps: PositiveInt = 1000, grid_t_min: Fraction = 0.001) -> None:
        super().__init__(grid_t_min=grid_t_min)
        self.num_timesteps = num_timesteps

    def timestep(self, t: Tensor) -> Tensor:
        return self.num_timesteps * t
