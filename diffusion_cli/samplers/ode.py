"""Adaptive solution of the probability flow ODE."""

from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from diffusion_cli.diffusion.denoiser import Denoise
from diffusion_cli.diffusion.probability_flow import angle, scale, solve, velocity
from diffusion_cli.diffusion.schedules import Schedule
from diffusion_cli.networks.layers import widened
from diffusion_cli.samplers.base import NoiseFn, Sampler


class ODE(Sampler):
    """Probability flow ODE by Dormand-Prince 5(4) with adaptive steps.

    Solves the ODE in the variables of `probability_flow` down to the schedule's grid_t_min, followed by an Euler step.
    Images are generated one by one, because the images of a batch would share steps.

    Args:
        schedule: noise schedule.
        rtol: relative tolerance.
        atol: absolute tolerance.
        max_steps: maximum number of solver steps.

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
        """Return 1, grid_t_min and 0 for any number of steps; the solver chooses its own steps."""
        return torch.tensor([1.0, self.schedule.grid_t_min, 0.0], dtype=torch.float64)

    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, draw: NoiseFn, state: Any
    ) -> tuple[Tensor, Any]:
        if s == 0:
            return self.euler_step(denoise(x, t), s), None
        ends = angle(self.schedule, torch.stack([t, s]))
        field = velocity(self.schedule, denoise, x.dtype)
        (z,) = solve(lambda phi, z: (field(phi, z[0]),), (widened(x) / scale(self.schedule, t),), ends, self)
        return (z * scale(self.schedule, s)).to(x), None
