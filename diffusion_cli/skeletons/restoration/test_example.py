"""The method `example` finds images with the measurement."""

from collections import deque
from typing import Any

import diffusion_cli as diffuse
import torch
from diffusion_cli.diffusion.denoiser import Prediction
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.editing import EditProcess, Mask
from torch import Tensor

diffuse.allow_plugins("example_package")
SCHEDULE: Any = diffuse.option("schedule", "rectified")
SHAPE = (1, 8, 8)


def denoise(x: Tensor, t: Tensor) -> Prediction:
    """The denoiser of data that are zero."""
    _, sigma = SCHEDULE(t)
    return Prediction(torch.zeros_like(x), x / sigma, sigma)


def test_the_known_pixels_are_kept_and_the_others_sampled() -> None:
    operator = Mask(torch.arange(8).expand(1, 1, 8, 8) < 4)
    measured = operator(torch.rand(2, *SHAPE, dtype=torch.float64))
    sampler = diffuse.option("sampler", "ddim", SCHEDULE)
    process = EditProcess(
        sampler, sampler.grid(8), None, lambda y: denoise, lambda label: denoise, None,
        lambda: torch.randn_like(measured), Pixels(SHAPE),
    )  # fmt: skip
    (x,) = deque(diffuse.option("restoration", "example").restore(process, operator, measured), maxlen=1)
    torch.testing.assert_close(x, measured)
