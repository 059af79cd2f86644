"""The sampler of consistency models."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from pydantic import PositiveFloat
from torch import Tensor

from diffusion_cli.diffusion.denoiser import Denoise
from diffusion_cli.diffusion.schedules import Schedule, Spacing
from diffusion_cli.errors import UsageError, counted
from diffusion_cli.samplers.base import NoiseFn, Sampler


class ConsistencySampler(Sampler):
    """Sampler of consistency models: each step predicts an image, and adds noise of the next level to it.

    `x_s = alpha_s x_0(x_t, t) + sigma_s z`. One step is one network call.

    Args:
        schedule: noise schedule.
        levels: sigma / alpha at the start of each step after the first, decreasing; None: by `spacing`.
        spacing: spacing of the times, see `Schedule.grid`. Grids start at most at sigma / alpha = NO_SIGNAL.

    Raises:
        UsageError: the levels do not decrease, are not one fewer than the steps, or are outside those of the schedule.

    Source: Song et al. 2023, Alg. 1.
    """

    order = 1
    stochastic = True

    def __init__(
        self,
        schedule: Schedule,
        *,
        levels: Sequence[PositiveFloat] | None = None,
        spacing: Spacing = "trailing",
    ) -> None:
        super().__init__(schedule, spacing=spacing)
        if levels is not None and any(low >= high for high, low in pairwise(levels)):
            raise UsageError("sampler.levels", list(levels), "must decrease", "use for example [2.0,0.5]")
        self.levels = levels

    def grid(self, steps: int) -> Tensor:
        if self.levels is None:
            return self.schedule.with_signal(super().grid(steps))
        if len(self.levels) != steps - 1:
            problem = f"has {counted(len(self.levels), 'level')}, but steps={steps} needs {steps - 1}"
            raise UsageError(
                "sampler.levels", list(self.levels), problem, "give one for each step but the first"
            )
        inner = self.schedule.time_of(-2 * torch.tensor(self.levels, dtype=torch.float64).log())
        first = self.schedule.with_signal(torch.ones(1, dtype=torch.float64))
        times = torch.cat([first, inner, torch.zeros(1, dtype=torch.float64)])
        if (times.diff() >= 0).any() or times[-2] < self.schedule.t_min:
            highest, lowest = (self.ratio(t).item() for t in (times[0], torch.tensor(self.schedule.t_min)))
            problem = f"are not all between {lowest:.3g} and {highest:.3g}, the levels of the schedule"
            raise UsageError("sampler.levels", list(self.levels), problem, "use for example [2.0,0.5]")
        return times

    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, draw: NoiseFn, state: Any
    ) -> tuple[Tensor, Any]:
        x0 = denoise(x, t).x0
        if s == 0:
            return x0, None
        alpha, sigma = self.schedule(s)
        return alpha * x0 + sigma * draw(), None
