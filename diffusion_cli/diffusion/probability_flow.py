"""The probability-flow ODE of any process, in variables in which nothing is infinite.

With `phi = atan2(sigma, alpha)`, from 0 at the data to pi/2 at pure noise, and `z = x / sqrt(alpha^2 + sigma^2)`, it is
`dz / dphi = cos(phi) eps - sin(phi) x_0`, for every schedule (Song et al. 2021b, Eq. 13, with the scale and the time
of Karras et al. 2022, Eq. 4 so chosen).
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from diffusion_cli.diffusion.denoiser import Denoise
from diffusion_cli.diffusion.schedules import Schedule
from diffusion_cli.errors import UsageError


class Tolerances(Protocol):
    """What an adaptive solver is held to."""

    rtol: float
    atol: float
    max_steps: int


def angle(schedule: Schedule, t: Tensor) -> Tensor:
    """`phi` at times t, float64."""
    alpha, sigma = schedule(t)
    return torch.atan2(sigma, alpha)


def scale(schedule: Schedule, t: Tensor) -> Tensor:
    """`sqrt(alpha^2 + sigma^2)` at times t, float64."""
    alpha, sigma = schedule(t)
    return torch.sqrt(alpha**2 + sigma**2)


def velocity(schedule: Schedule, denoise: Denoise, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """`dz / dphi` as a function of (phi, z [B, C, H, W]), the denoiser asked in `dtype`."""

    def field(phi: Tensor, z: Tensor) -> Tensor:
        phi = phi.double().cpu()
        t = schedule.time_of(-2 * torch.log(torch.tan(phi.clamp(max=math.pi / 2))).clamp(max=80))
        prediction = denoise((z * scale(schedule, t)).to(dtype), t)
        return (torch.cos(phi) * prediction.eps - torch.sin(phi) * prediction.x0).to(z)

    return field


def solve(
    field: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]],
    state: tuple[Tensor, ...],
    ends: Tensor,
    tolerances: Tolerances,
) -> tuple[Tensor, ...]:
    """Integrate float64 tensors from ends[0] to ends[1] by Dormand-Prince 5(4).

    UsageError if the tolerances take more than max_steps steps.
    """
    from torchdiffeq import odeint

    ends = ends.to(state[0].device)
    # Left alone it steps over the end and interpolates; beyond the end there may be no process.
    options = {"max_num_steps": tolerances.max_steps, "step_t": ends[1:]}
    try:
        path = odeint(
            field, state, ends, rtol=tolerances.rtol, atol=tolerances.atol, method="dopri5", options=options
        )
    except AssertionError as error:
        raise UsageError(
            "max_steps",
            tolerances.max_steps,
            f"the solver needs more, or cannot meet rtol={tolerances.rtol} and atol={tolerances.atol} ("
            f"{error})",
            "raise them, and take precision=fp32",
        ) from error
    return tuple(part[-1] for part in path)
