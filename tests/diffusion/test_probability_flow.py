"""Paths of the probability flow ODE."""

import pytest
import torch

from diffusion_cli.diffusion.probability_flow import angle, scale, solve, velocity
from diffusion_cli.samplers import ODE
from helpers.few_steps import F64, PROCESSES, Exact, batch, consistent, expected


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("level", [0.02, 0.1, 1.0])
def test_paths_that_begin_anywhere_end_at_the_data(process, level):
    """The solver tries a first step beyond the end of a path that begins close to the data."""
    schedule, _ = PROCESSES[process]
    t = schedule.time_of(-2 * torch.tensor(level, dtype=F64).log())
    alpha, sigma = schedule(t)
    x0, eps = batch()
    x_t = alpha * x0 + sigma * eps
    field = velocity(schedule, Exact(process, expected), F64)
    last = torch.tensor(schedule.grid_t_min, dtype=F64)
    ends = angle(schedule, torch.stack([t, last]))
    tolerances = ODE(schedule, rtol=1e-8, atol=1e-9)
    (z,) = solve(lambda phi, state: (field(phi, state[0]),), (x_t / scale(schedule, t),), ends, tolerances)
    found = consistent(z * scale(schedule, last), *schedule(last))
    torch.testing.assert_close(found, consistent(x_t, alpha, sigma), rtol=1e-6, atol=1e-6)
