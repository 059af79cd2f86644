"""Noise schedules: alpha and sigma in `x_t = alpha_t x_0 + sigma_t eps`, from the data (t = 0) to noise (t = 1)."""

from diffusion_cli.diffusion.schedules.base import NO_SIGNAL, Schedule, Spacing
from diffusion_cli.diffusion.schedules.continuous import VE, VP, EDMSchedule, FlowMatching, Rectified, SubVP
from diffusion_cli.diffusion.schedules.discrete import Betas, Cosine, Discrete, Linear, ScaledLinear, Sigmoid

__all__ = [
    "NO_SIGNAL",
    "VE",
    "VP",
    "Betas",
    "Cosine",
    "Discrete",
    "EDMSchedule",
    "FlowMatching",
    "Linear",
    "Rectified",
    "ScaledLinear",
    "Schedule",
    "Sigmoid",
    "Spacing",
    "SubVP",
]  # fmt: skip
