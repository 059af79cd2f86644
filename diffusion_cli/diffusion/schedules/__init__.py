"""Noise schedules: how much signal and how much noise there is at each time.

Everywhere `x_t = alpha_t x_0 + sigma_t eps`, with t = 0 the data and t = 1 the noise.
"""

from diffusion_cli.diffusion.schedules.base import NO_SIGNAL, Schedule, Spacing
from diffusion_cli.diffusion.schedules.continuous import VE, VP, EDMSchedule, Rectified, SubVP
from diffusion_cli.diffusion.schedules.discrete import Cosine, Discrete, Linear, ScaledLinear, Sigmoid

__all__ = [
    "NO_SIGNAL",
    "VE",
    "VP",
    "Cosine",
    "Discrete",
    "EDMSchedule",
    "Linear",
    "Rectified",
    "ScaledLinear",
    "Schedule",
    "Sigmoid",
    "Spacing",
    "SubVP",
]  # fmt: skip
