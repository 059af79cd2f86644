"""Denoisers and calls of `diffuse edit`."""

import math

import numpy as np
import torch
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.diffusion.denoiser import Prediction
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.editing import EditProcess

F64 = torch.float64
GRAY = (1, 8, 8)


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def plain(sampler, denoise, steps, draw, method=None):
    """Sampling without labels by one denoiser."""
    return EditProcess(
        sampler, sampler.grid(steps), None, lambda y: denoise, lambda label: denoise, method, draw, Pixels(())
    )


def denoiser_of(mixture, schedule):
    def denoise(x, t):
        alpha, sigma = schedule(t)
        x0 = mixture.denoise(x, alpha, sigma)
        return Prediction(x0, (x - alpha * x0) / sigma, sigma)

    return denoise


def process(schedule, sampler, denoise, shape, method=None, steps=8, count=2):
    generator = torch.Generator().manual_seed(3)

    def draw():
        return torch.randn(count, *shape, dtype=F64, generator=generator)

    return plain(sampler, denoise, steps, draw, method)


def shrinking(schedule):
    """A denoiser of standard normal pixels."""

    def denoise(x, t):
        alpha, sigma = schedule(t)
        x0 = alpha * x / (alpha**2 + sigma**2)
        return Prediction(x0, (x - alpha * x0) / sigma, sigma)

    return denoise


def edit(edit_runs, *words):
    return run(["edit", f"output_dir={edit_runs}", "run=told", "steps=4", "device=cpu", *words])


def pixels(file):
    return np.array(Image.open(file)).astype(int)


def matrix_of(operator, shape):
    """The matrix [measured values, pixels] of a linear measurement of images of a shape."""
    pixels = torch.eye(math.prod(shape), dtype=F64).view(-1, *shape)
    return operator(pixels).flatten(1).T
