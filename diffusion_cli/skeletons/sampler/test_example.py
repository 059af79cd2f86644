"""The sampler `example` on data with a perfect denoiser: the normal distribution with variance 1/4."""

from collections import deque
from typing import Any

import diffusion_cli as diffuse
import torch
from diffusion_cli.diffusion.denoiser import Prediction
from diffusion_cli.samplers.base import integrate
from torch import Tensor

diffuse.allow_plugins("example_package")
SCHEDULE: Any = diffuse.option("schedule", "rectified")


def denoise(x: Tensor, t: Tensor) -> Prediction:
    alpha, sigma = SCHEDULE(t)
    x0 = 0.25 * alpha * x / (0.25 * alpha**2 + sigma**2)
    return Prediction(x0, (x - alpha * x0) / sigma, sigma)


def end(name: str, steps: int, **settings: float) -> float:
    """The image that the sampler makes of noise 1; that of the exact solution is 1/2."""
    sampler = diffuse.option("sampler", name, SCHEDULE, **settings)
    noise = torch.ones(1, dtype=torch.float64)
    (x,) = deque(integrate(sampler, denoise, noise, sampler.grid(steps), lambda: noise), maxlen=1)
    return x.item()


def test_gamma_1_is_ddim() -> None:
    assert end("example", 10, gamma=1.0) == end("ddim", 10)


def test_it_converges_and_is_nearer_than_ddim() -> None:
    errors = [abs(end("example", steps) - 0.5) for steps in (10, 20, 40)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < abs(end("ddim", 40) - 0.5)
