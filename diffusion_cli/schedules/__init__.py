"""Noise schedules: how much signal and how much noise there is at each time.

Everywhere `x_t = alpha_t x_0 + sigma_t eps`, with t = 0 the data and t = 1 the noise.
"""

from diffusion_cli.schedules.base import NO_SIGNAL, Schedule, Spacing
from diffusion_cli.schedules.continuous import EDM, VE, VP, Rectified, SubVP
from diffusion_cli.schedules.discrete import Cosine, Discrete, Linear, ScaledLinear, Sigmoid

__all__ = [
    "EDM", "NO_SIGNAL", "VE", "VP", "Cosine", "Discrete", "Linear", "Rectified", "ScaledLinear", "Schedule", "Sigmoid",
    "Spacing", "SubVP",
]  # fmt: skip
