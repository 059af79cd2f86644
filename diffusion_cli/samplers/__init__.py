"""Samplers: solvers that generate images from noise in steps."""

from diffusion_cli.samplers.base import (
    Advance,
    NoiseFn,
    Sampler,
    integrate,
    reporting,
    start_grid_at,
    unreported,
)
from diffusion_cli.samplers.ddim import DDIM, invert
from diffusion_cli.samplers.ddpm import DDPM
from diffusion_cli.samplers.dpm_solver import DPMSolver2S, DPMSolverMultistep, DPMSolverSDE, UniPC
from diffusion_cli.samplers.few_step import ConsistencySampler
from diffusion_cli.samplers.multistep import DEIS, LMS, PLMS
from diffusion_cli.samplers.ode import ODE
from diffusion_cli.samplers.sde import PC, EulerMaruyama, ReverseDiffusion
from diffusion_cli.samplers.second_order import DPM2, EDMSampler, Heun

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "DPM2",
    "LMS",
    "ODE",
    "PC",
    "PLMS",
    "Advance",
    "ConsistencySampler",
    "DPMSolver2S",
    "DPMSolverMultistep",
    "DPMSolverSDE",
    "EDMSampler",
    "EulerMaruyama",
    "Heun",
    "NoiseFn",
    "ReverseDiffusion",
    "Sampler",
    "UniPC",
    "integrate",
    "invert",
    "reporting",
    "start_grid_at",
    "unreported",
]  # fmt: skip
