"""Gaps and forecasts of signals of a Gaussian process, whose posterior is known in closed form."""

from collections import deque

import pytest
import torch
from torch import Tensor

from diffusion_cli.diffusion.denoiser import Prediction
from diffusion_cli.diffusion.schedules import VP
from diffusion_cli.editing import Inpaint, RePaint
from diffusion_cli.samplers import DDPM
from helpers.editing import F64, plain

LENGTH, COUNT = 24, 600
TIMES = torch.arange(LENGTH, dtype=F64)
APART = (TIMES[:, None] - TIMES).abs()
COVARIANCE = 0.25 * (0.8 * torch.exp(-APART / 6) * torch.cos(APART / 2) + 0.2 * (APART == 0))
"""Covariance of a damped oscillation with noise, times 1/4, so that few values are beyond 1."""


def posterior(values: Tensor, unknown: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the unknown values, given the others."""
    between, known = COVARIANCE[unknown][:, ~unknown], COVARIANCE[~unknown][:, ~unknown]
    gain = torch.linalg.solve(known, between.T).T
    return gain @ values[~unknown], COVARIANCE[unknown][:, unknown] - gain @ between.T


@pytest.mark.parametrize("box", [[8, 14], [18, 24]], ids=["gap", "forecast"])
def test_unknown_values_have_the_posterior_of_the_process(box):
    schedule = VP()
    generator = torch.Generator().manual_seed(0)
    values = torch.linalg.cholesky(COVARIANCE) @ torch.randn(LENGTH, dtype=F64, generator=generator)
    edit = Inpaint((1, LENGTH), mask=box)
    operator, y = edit.measure(values.expand(COUNT, 1, LENGTH))

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = schedule(t)
        spread = alpha**2 * COVARIANCE + sigma**2 * torch.eye(LENGTH, dtype=F64)
        x0 = x @ torch.linalg.solve(spread, alpha * COVARIANCE)
        return Prediction(x0, (x - alpha * x0) / sigma, sigma)

    def draw() -> Tensor:
        return torch.randn(COUNT, 1, LENGTH, dtype=F64, generator=generator)

    method = RePaint(num_resamples=6, jump_length=5)
    process = plain(DDPM(schedule, variance="large"), denoise, 200, draw, method)
    (x,) = deque(method.restore(process, operator, y), maxlen=1)
    x = operator.project(x, y)[:, 0]
    unknown = torch.zeros(LENGTH, dtype=torch.bool)
    unknown[slice(*box)] = True
    assert torch.equal(x[:, ~unknown], values[~unknown].expand(COUNT, -1))
    mean, covariance = posterior(values, unknown)
    deviation = covariance.diagonal().sqrt()
    # Without the known values, the first forecast is off by 0.9 deviations, and its deviation by 0.3.
    assert ((x[:, unknown].mean(0) - mean).abs() / deviation).max() < 0.25
    assert (x[:, unknown].std(0) / deviation - 1).abs().max() < 0.1
