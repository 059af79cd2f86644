"""Training objectives of denoisers and classifiers."""

from diffusion_cli.diffusion.objectives.base import Dropout, Objective
from diffusion_cli.diffusion.objectives.bound import VLB, Hybrid
from diffusion_cli.diffusion.objectives.classifier import CrossEntropy
from diffusion_cli.diffusion.objectives.consistency import Consistency
from diffusion_cli.diffusion.objectives.distillation import ProgressiveDistillation
from diffusion_cli.diffusion.objectives.few_step import FewStep
from diffusion_cli.diffusion.objectives.trajectory import TrajectoryDistillation
from diffusion_cli.diffusion.objectives.uncertainty import EDM2Objective
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
    "Consistency",
    "CrossEntropy",
    "Dropout",
    "EDM2Objective",
    "EDMObjective",
    "FewStep",
    "Hybrid",
    "Likelihood",
    "MinSNR",
    "Objective",
    "ProgressiveDistillation",
    "Simple",
    "Target",
    "TrajectoryDistillation",
    "Weighted",
    "residual",
]
