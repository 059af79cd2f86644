"""The interface of samplers, and the loop that runs them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from diffusion_cli.diffusion.denoiser import Denoise, Denoiser, Prediction
from diffusion_cli.diffusion.schedules import Discrete, Schedule, Spacing

NoiseFn = Callable[[], Tensor]
"""Returns the next standard normal noise, in the shape of the images."""


class Sampler(ABC):
    """A rule for one step from time t to the next smaller time s."""

    order: int  # of convergence to the exact solution, in the largest step
    stochastic = False  # whether steps add noise
    per_image = False  # whether images of a batch would depend on each other
    omits_cleanest = (
        False  # whether the grids `leading` and `linspace` omit the visited time next to the data
    )

    def __init__(self, schedule: Schedule, *, spacing: Spacing = "trailing") -> None:
        self.schedule = schedule
        self.spacing: Spacing = spacing

    @abstractmethod
    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, draw: NoiseFn, state: Any
    ) -> tuple[Tensor, Any]:
        """Take x from t to s < t (0-d float64 times on the CPU) and return it with the solver's state.

        All randomness comes from `draw`, and the number of its calls does not depend on x. The step to the data, s = 0,
        adds no noise. `state` is what `start` or the last step returned.
        """

    def check(self, denoiser: Denoiser) -> None:  # noqa: B027
        """Raise UsageError if the denoiser lacks what the sampler needs."""

    def start(self, times: Tensor) -> Any:
        """Return the solver's state before a run through falling times."""
        return None

    def grid(self, steps: int) -> Tensor:
        """Return the falling times of a run of `steps` steps; UsageError if there is no such grid.

        If it `shortens` the grid, this is the grid of steps + 1 steps without its last time above 0, as in diffusers.
        """
        if not self.shortens(steps):
            return self.schedule.grid(steps, self.spacing)
        times = self.schedule.grid(steps + 1, self.spacing)
        return torch.cat([times[:-2], times[-1:]])

    def shortens(self, steps: int) -> bool:
        """Whether the grid of `steps` steps omits the visited time next to the data.

        A table of exactly `steps` timesteps is visited whole.
        """
        whole = isinstance(self.schedule, Discrete) and steps >= self.schedule.num_timesteps
        return self.omits_cleanest and self.spacing in ("leading", "linspace") and steps >= 2 and not whole

    def grid_settings(self, steps: int) -> dict[str, str]:
        """Return the settings that the grid adds to those of the images: one if it `shortens` the grid, else none.

        Earlier versions visited the whole grid and recorded nothing about it.
        """
        return {"grid": "omits the time next to the data"} if self.shortens(steps) else {}

    def half_log_snr(self, t: Tensor) -> Tensor:
        """`lambda = log(alpha / sigma)`, the time variable of the DPM-Solvers."""
        return self.schedule.log_snr(t) / 2

    def ratio(self, t: Tensor) -> Tensor:
        """`sigma / alpha`, the time variable in which x / alpha moves along eps (Song et al. 2021a, Eq. 14)."""
        alpha, sigma = self.schedule(t)
        return sigma / alpha

    def euler_step(self, prediction: Prediction, s: Tensor) -> Tensor:
        """`alpha_s x_0 + sigma_s eps`, Euler's step to time s."""
        alpha, sigma = self.schedule(s)
        return alpha * prediction.x0 + sigma * prediction.eps


class AncestralSampler(Sampler):
    """A sampler that adds a share `eta` of fresh noise at each step: 0 none, 1 that of an ancestral step."""

    def __init__(
        self, schedule: Schedule, *, eta: NonNegativeFloat = 0.0, spacing: Spacing = "trailing"
    ) -> None:
        super().__init__(schedule, spacing=spacing)
        self.eta = eta
        self.stochastic = eta > 0

    def ancestral(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Split sigma_s into kept and fresh noise: `sigma_s^2 = kept^2 + fresh^2`.

        fresh = eta sigma_s sqrt(1 - SNR_t / SNR_s), at most sigma_s: with eta 1 that of DDPM's small variance
        (Song et al. 2021a, Eq. 16).
        """
        _, sigma_s = self.schedule(s)
        gap = -torch.expm1(self.schedule.log_snr(t) - self.schedule.log_snr(s))
        share = (self.eta**2 * gap).clamp(max=1)
        return sigma_s * (1 - share).sqrt(), sigma_s * share.sqrt()


def start_grid_at(times: Tensor, t: float) -> Tensor:
    """Return the falling times from t down; from times[0] if that is smaller."""
    first = min(t, float(times[0]))
    return torch.cat([times.new_full((1,), first), times[times < first - 1e-9]])


def integrate(
    sampler: Sampler, denoise: Denoise, x: Tensor, times: Tensor, draw: NoiseFn
) -> Iterator[Tensor]:
    """Step x through the falling `times` and yield the state after each step."""
    times = times.double().cpu()
    state = sampler.start(times)
    for t, s in pairwise(times):
        x, state = sampler.step(denoise, x, t, s, draw, state)
        yield x
