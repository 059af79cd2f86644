"""The edit `example` mixes an image with a sample."""

from typing import Any

import diffusion_cli as diffuse
import torch
from diffusion_cli.diffusion.denoiser import Prediction
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.editing import EditProcess
from torch import Tensor

diffuse.allow_plugins("example_package")
SCHEDULE: Any = diffuse.option("schedule", "rectified")
SHAPE = (1, 8, 8)


def denoise(x: Tensor, t: Tensor) -> Prediction:
    """The denoiser of data that are zero."""
    _, sigma = SCHEDULE(t)
    return Prediction(torch.zeros_like(x), x / sigma, sigma)


def edited(images: Tensor, **settings: float) -> Tensor:
    sampler = diffuse.option("sampler", "ddim", SCHEDULE)
    process = EditProcess(
        sampler, sampler.grid(4), None, lambda y: denoise, lambda label: denoise, None,
        lambda: torch.randn_like(images), Pixels(SHAPE),
    )  # fmt: skip
    return diffuse.option("edit", "example", SHAPE, **settings)(images, process).images


def test_the_result_is_between_the_image_and_the_sample() -> None:
    images = torch.rand(2, *SHAPE, dtype=torch.float64)
    for keep in (0.0, 0.25, 1.0):
        torch.testing.assert_close(edited(images, keep=keep), keep * images[:, None])
