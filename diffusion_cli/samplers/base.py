"""Base class of samplers, and the sampling loop."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from diffusion_cli.diffusion.denoiser import Denoise, Denoiser, Prediction
from diffusion_cli.diffusion.schedules import Discrete, Schedule, Spacing

NoiseFn = Callable[[], Tensor]
"""Returns the next standard normal noise in the shape of the images."""
Share = Annotated[float, Field(ge=0, le=1)]
"""Share of the fresh noise of an ancestral step."""
Advance = Callable[[float], object]
"""Takes each share of the work that is done."""


class Sampler(ABC):
    """Base class of samplers, which define a step from time t to the next smaller time s.

    Args:
        schedule: noise schedule.
        spacing: spacing of the times, see `Schedule.grid`.
    """

    order: int  # order of convergence to the exact solution
    stochastic = False  # whether steps add noise
    per_image = False  # whether images must be generated one by one to be independent
    omits_cleanest = False  # whether the grids `leading` and `linspace` omit their smallest positive time

    def __init__(self, schedule: Schedule, *, spacing: Spacing = "trailing") -> None:
        self.schedule = schedule
        self.spacing: Spacing = spacing

    @abstractmethod
    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, draw: NoiseFn, state: Any
    ) -> tuple[Tensor, Any]:
        """Step x from time t to s < t.

        A step to s = 0 adds no noise. The number of calls of `draw` does not depend on x.

        Args:
            denoise: denoiser.
            x: states [B, C, H, W] at time t.
            t: current time, 0-d float64 on the CPU.
            s: next time, likewise.
            draw: returns noise of the shape of x, the only source of randomness.
            state: solver state, returned by `start` or the previous step.

        Returns:
            The states at time s, and the new solver state.
        """

    def check(self, denoiser: Denoiser) -> None:  # noqa: B027
        """Raise UsageError if the denoiser lacks an output that the sampler needs."""

    def start(self, times: Tensor) -> Any:
        """Return the initial solver state for decreasing `times`."""
        return None

    def grid(self, steps: int) -> Tensor:
        """Return the decreasing times of `steps` steps; UsageError if there is no such grid.

        If `shortens(steps)`, this is the grid of steps + 1 steps without its smallest positive time, as in diffusers.
        """
        if not self.shortens(steps):
            return self.schedule.grid(steps, self.spacing)
        times = self.schedule.grid(steps + 1, self.spacing)
        return torch.cat([times[:-2], times[-1:]])

    def shortens(self, steps: int) -> bool:
        """Return whether the grid of `steps` steps omits its smallest positive time.

        A grid of all timesteps of a discrete schedule is never shortened.
        """
        whole = isinstance(self.schedule, Discrete) and steps >= self.schedule.num_timesteps
        return self.omits_cleanest and self.spacing in ("leading", "linspace") and steps >= 2 and not whole

    def grid_settings(self, steps: int) -> dict[str, str]:
        """Return the entry that describes a shortened grid in the settings of images; empty for other grids.

        Older versions never shortened grids, and recorded nothing.
        """
        return {"grid": "omits the time next to the data"} if self.shortens(steps) else {}

    def half_log_snr(self, t: Tensor) -> Tensor:
        """Return `lambda = log(alpha / sigma)`, the time variable of DPM-Solver."""
        return self.schedule.log_snr(t) / 2

    def ratio(self, t: Tensor) -> Tensor:
        """Return sigma / alpha, the time in which eps is the velocity of x / alpha (Song et al. 2021a, Eq. 14)."""
        alpha, sigma = self.schedule(t)
        return sigma / alpha

    def euler_step(self, prediction: Prediction, s: Tensor) -> Tensor:
        """Return `alpha_s x_0 + sigma_s eps`, the Euler step to time s."""
        alpha, sigma = self.schedule(s)
        return alpha * prediction.x0 + sigma * prediction.eps


class AncestralSampler(Sampler):
    """Base class of samplers that add fresh noise at each step.

    Args:
        schedule: noise schedule.
        eta: share of fresh noise, 0 to 1; 0: none, 1: an ancestral step.
        spacing: spacing of the times, see `Schedule.grid`.
    """

    def __init__(self, schedule: Schedule, *, eta: Share = 0.0, spacing: Spacing = "trailing") -> None:
        super().__init__(schedule, spacing=spacing)
        self.eta = eta
        self.stochastic = eta > 0

    def ancestral(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Split sigma_s into kept and fresh noise, `sigma_s^2 = kept^2 + fresh^2`.

        `fresh = eta sigma_s sqrt(1 - SNR_t / SNR_s)`, at most sigma_s; eta = 1 gives DDPM's small variance (Song et al.
        2021a, Eq. 16).
        """
        _, sigma_s = self.schedule(s)
        gap = -torch.expm1(self.schedule.log_snr(t) - self.schedule.log_snr(s))
        share = (self.eta**2 * gap).clamp(max=1)
        return sigma_s * (1 - share).sqrt(), sigma_s * share.sqrt()


def start_grid_at(times: Tensor, t: float) -> Tensor:
    """Return the times of a grid that are below t, starting at min(t, times[0])."""
    first = min(t, float(times[0]))
    return torch.cat([times.new_full((1,), first), times[times < first - 1e-9]])


def unreported(share: float) -> None:
    """Take a share of the work, and do nothing."""


def reporting(denoise: Denoise, times: Tensor, advance: Advance) -> Denoise:
    """Wrap a denoiser to report the progress of a pass through `times` at each of its calls.

    Args:
        denoise: denoiser.
        times: increasing or decreasing times; each step counts as an equal share.
        advance: takes each share of the pass that is done. The shares never sum to more than 1.
    """
    sign = 1 if times[-1] > times[0] else -1
    grid = (sign * times.double().cpu()).tolist()
    done = 0.0

    def reported(x: Tensor, t: Tensor) -> Prediction:
        nonlocal done
        time = sign * float(t.reshape(-1)[0])
        step = min(max(bisect_right(grid, time) - 1, 0), len(grid) - 2)
        part = (time - grid[step]) / (grid[step + 1] - grid[step])
        share = (step + min(max(part, 0.0), 1.0)) / (len(grid) - 1)
        if share > done:
            advance(share - done)
            done = share
        return denoise(x, t)

    return reported


def integrate(
    sampler: Sampler, denoise: Denoise, x: Tensor, times: Tensor, draw: NoiseFn
) -> Iterator[Tensor]:
    """Step x through decreasing `times`, and yield the state after each step.

    Args:
        sampler: the sampler.
        denoise: denoiser, may be guided.
        x: noise [B, C, H, W] at times[0].
        times: decreasing times.
        draw: returns noise of the shape of x.
    """
    times = times.double().cpu()
    state = sampler.start(times)
    for t, s in pairwise(times):
        x, state = sampler.step(denoise, x, t, s, draw, state)
        yield x
