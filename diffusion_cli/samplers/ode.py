"""The probability-flow ODE, by an adaptive solver."""

from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from diffusion_cli.diffusion.denoiser import Denoise
from diffusion_cli.diffusion.probability_flow import angle, scale, solve, velocity
from diffusion_cli.diffusion.schedules import Schedule
from diffusion_cli.samplers.base import NoiseFn, Sampler


class ODE(Sampler):
    """The probability flow from noise to data by Dormand-Prince 5(4), steps chosen to meet the tolerances.

    It runs in the variables of `probability_flow` down to the schedule's grid_t_min; the rest is one Euler
    step, x_0. The images of a batch share their steps, so images are generated one by one.
    Source: Song et al. 2021b, Sec. 4.3.
    """

    order = 5
    per_image = True

    def __init__(
        self,
        schedule: Schedule,
        *,
        rtol: PositiveFloat = 0.001,
        atol: PositiveFloat = 0.001,
        max_steps: PositiveInt = 1000,
    ) -> None:
        super().__init__(schedule, spacing="time")
        self.rtol, self.atol, self.max_steps = rtol, atol, max_steps

    def grid(self, steps: int) -> Tensor:
        """Return 1, grid_t_min and 0, whatever the number of steps: the solver has its own."""
        return torch.tensor([1.0, self.schedule.grid_t_min, 0.0], dtype=torch.float64)

    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, draw: NoiseFn, state: Any
    ) -> tuple[Tensor, Any]:
        if s == 0:
            return self.euler_step(denoise(x, t), s), None
        ends = angle(self.schedule, torch.stack([t, s]))
        field = velocity(self.schedule, denoise, x.dtype)
        (z,) = solve(lambda phi, z: (field(phi, z[0]),), (x.double() / scale(self.schedule, t),), ends, self)
        return (z * scale(self.schedule, s)).to(x), None
