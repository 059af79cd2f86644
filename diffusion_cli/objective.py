"""Training objectives: a distribution over times and a weighting of the errors, over any denoiser."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from diffusion_cli.denoiser import Denoiser, Prediction


class Loss(NamedTuple):
    """The loss of each image [B], and the time [B] at which it was taken."""

    value: Tensor
    t: Tensor


class Objective(ABC):
    """The expected error of a denoiser over noised images."""

    @abstractmethod
    def error(self, prediction: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
        """Return the weighted error of each image, [B]."""

    def __call__(self, denoiser: Denoiser, x0: Tensor, y: Tensor | None, u: Tensor, eps: Tensor) -> Loss:
        """Noise x0 [B, C, H, W] with eps at the times that u [B] in [0, 1) picks, and score the denoiser."""
        t = denoiser.schedule.time(u)
        alpha, sigma = (level.to(x0).view(-1, *[1] * (x0.ndim - 1)) for level in denoiser.schedule(t))
        return Loss(self.error(denoiser(alpha * x0 + sigma * eps, t, y), x0, eps), t)


class Simple(Objective):
    """The mean squared error on eps at uniform times, `L_simple` (Ho et al. 2020, Eq. 14)."""

    def error(self, prediction: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
        return (prediction.eps - eps).square().flatten(1).mean(1)
