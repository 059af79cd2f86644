"""Samplers: ways from noise to an image, one step at a time."""

from diffusion_cli.samplers.base import Sampler, integrate
from diffusion_cli.samplers.ddim import DDIM
from diffusion_cli.samplers.ddpm import DDPM

__all__ = ["DDIM", "DDPM", "Sampler", "integrate"]
