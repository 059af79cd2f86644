"""Runs of a sampler on the exact denoiser."""

from itertools import pairwise
from typing import Any

import torch

from diffusion_cli.diffusion import schedules as processes
from diffusion_cli.samplers import DPMSolverMultistep, integrate

S = "karras"  # for samplers that are given their times
# A process without scaling, x = x_0 + sigma eps, wide enough for every list of sigmas.
SIGMAS = processes.EDMSchedule(sigma_min=1e-3, sigma_max=1e6)


def multistep(order: Any, eta: float = 0.0, solver_type: Any = "midpoint"):
    return lambda s, order=order: DPMSolverMultistep(
        s, order=order, eta=eta, solver_type=solver_type, spacing=S
    )


def adams(kind, order):
    return lambda s, order=order: kind(s, order=order, spacing=S)


def one(kind, **arguments):
    return lambda s, order=None: kind(s, spacing=S, **arguments)


def times_of(schedule, sigmas):
    """Times at which sigma / alpha has the given values; 0 stays 0."""
    return torch.where(sigmas > 0, schedule.time_of(-2 * sigmas.log()), 0.0)


def run(make, schedule, denoise, x, times, draws, orders=None):
    """All states of a run, the sampler of order orders[i] in step i where that is given."""
    states, state = [], make(schedule).start(times)
    for i, (t, s) in enumerate(pairwise(times)):
        sampler = make(schedule, orders[i]) if orders else make(schedule)
        x, state = sampler.step(denoise, x, t, s, lambda: next(draws), state)
        states.append(x)
    return torch.stack(states)


F64 = torch.float64


def states_of_run(sampler, denoise, noise, times, dtype=F64):
    """All states of a run from the stored start, with the stored noise."""
    draws = iter(noise["noise"].to(dtype))
    return torch.stack(list(integrate(sampler, denoise, noise["x_T"].to(dtype), times, lambda: next(draws))))
