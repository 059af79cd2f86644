"""Probability flow ODE of any schedule, in variables that are always finite.

With phi = atan2(sigma, alpha), from 0 at the data to pi/2 at noise, and z = x / sqrt(alpha^2 + sigma^2), the ODE is
`dz / dphi = cos(phi) eps - sin(phi) x_0` for every schedule. This is Song et al. 2021b, Eq. 13, with scale and time of
Karras et al. 2022, Eq. 4 chosen accordingly.
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
    """Tolerances and step limit of an adaptive solver."""

    rtol: float
    atol: float
    max_steps: int


def angle(schedule: Schedule, t: Tensor) -> Tensor:
    """Return phi at times t, float64."""
    alpha, sigma = schedule(t)
    return torch.atan2(sigma, alpha)


def scale(schedule: Schedule, t: Tensor) -> Tensor:
    """Return `sqrt(alpha^2 + sigma^2)` at times t, float64."""
    alpha, sigma = schedule(t)
    return torch.sqrt(alpha**2 + sigma**2)


def velocity(schedule: Schedule, denoise: Denoise, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """Return dz / dphi as a function of (phi, z [B, C, H, W]); the denoiser is evaluated in `dtype`."""

    def field(phi: Tensor, z: Tensor) -> Tensor:
        # The first step that a solver tries may end beyond the data.
        phi = phi.cpu().double().clamp(0, math.pi / 2)
        t = schedule.time_of(-2 * torch.log(torch.tan(phi)).clamp(min=-40))
        prediction = denoise((z * scale(schedule, t)).to(dtype), t)
        return (torch.cos(phi) * prediction.eps - torch.sin(phi) * prediction.x0).to(z)

    return field


def solve(
    field: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]],
    state: tuple[Tensor, ...],
    ends: Tensor,
    tolerances: Tolerances,
) -> tuple[Tensor, ...]:
    """Integrate float64 tensors from ends[0] to ends[1] with Dormand-Prince 5(4).

    Raises UsageError if the tolerances need more than max_steps steps.
    """
    from torchdiffeq import odeint

    ends = ends.to(state[0])
    # End a step exactly at the last time: the default steps beyond it, where the process may be undefined.
    options = {"max_num_steps": tolerances.max_steps, "step_t": ends[1:]}
    try:
        path = odeint(
            field, state, ends, rtol=tolerances.rtol, atol=tolerances.atol, method="dopri5", options=options
        )
    except AssertionError as error:
        raise UsageError(
            "max_steps",
            tolerances.max_steps,
            f"more steps are needed, or rtol={tolerances.rtol} and atol={tolerances.atol} cannot be met ("
            f"{error})",
            "raise them, and use precision=fp32",
        ) from error
    return tuple(part[-1] for part in path)
