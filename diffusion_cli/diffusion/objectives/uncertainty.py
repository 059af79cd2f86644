"""Uncertainty weighting: a learned variance of the error at each noise level."""

import math

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from diffusion_cli.diffusion.objectives.base import Dropout
from diffusion_cli.diffusion.objectives.weighted import EDMObjective
from diffusion_cli.diffusion.parameterizations import edm_noise_level
from diffusion_cli.diffusion.schedules import Schedule
from diffusion_cli.networks.magnitude import FourierFeatures


class EDM2Objective(EDMObjective):
    """EDM's loss L divided by a learned variance of each noise level: training minimizes `L(t) / exp(u(t)) + u(t)`.

    At the optimum `u(t) = log E[L | t]`, so that all noise levels have gradients of equal size. u is zero at first.
    `loss` and `val_loss` in the logs are EDM's, without u, so that they compare to those of other runs.

    Args:
        sigma_data: standard deviation of the data.
        channels: number of Fourier features of the noise level; u is a linear function of them.
        huber_delta: see `Weighted`.
        label_dropout: see `Weighted`.
        single_dropout: see `Weighted`.

    Source: Karras et al. 2024, Eq. 21; Kendall et al. 2018.
    """

    def __init__(
        self,
        *,
        sigma_data: PositiveFloat = 0.5,
        channels: PositiveInt = 128,
        huber_delta: PositiveFloat | None = None,
        label_dropout: Dropout = 0.1,
        single_dropout: Dropout = 0.1,
    ) -> None:
        super().__init__(
            sigma_data=sigma_data,
            huber_delta=huber_delta,
            label_dropout=label_dropout,
            single_dropout=single_dropout,
        )
        self.log_variance = LogVariance(channels)

    @property
    def learned(self) -> "LogVariance":
        return self.log_variance

    def minimized(self, loss: Tensor, schedule: Schedule, t: Tensor) -> Tensor:
        u = self.log_variance(edm_noise_level(schedule, t))
        return loss / u.exp() + u


class LogVariance(nn.Module):
    """Log variance u [B] of noise levels `log(sigma / alpha) / 4` [B], a linear layer of Fourier features.

    It is zero at first. The weights are not normalized, unlike in the published code, with which u cannot be zero.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        # A separate generator, so that the initial weights of the network are the same with every objective.
        self.features = FourierFeatures(channels, torch.Generator().manual_seed(0))
        self.readout = nn.Parameter(torch.zeros(channels))

    def forward(self, level: Tensor) -> Tensor:
        features = self.features(level.to(self.readout))
        return (features * self.readout).sum(1) / math.sqrt(len(self.readout))
