"""Training objectives of denoisers and classifiers."""

from diffusion_cli.diffusion.objectives.base import Dropout, Objective
from diffusion_cli.diffusion.objectives.bound import VLB, Hybrid
from diffusion_cli.diffusion.objectives.classifier import CrossEntropy
from diffusion_cli.diffusion.objectives.weighted import (
    EDMObjective,
    Likelihood,
    MinSNR,
    Simple,
    Target,
    Weighted,
    residual,
)

__all__ = [
    "VLB",
    "CrossEntropy",
    "Dropout",
    "EDMObjective",
    "Hybrid",
    "Likelihood",
    "MinSNR",
    "Objective",
    "Simple",
    "Target",
    "Weighted",
    "residual",
]
