"""A weighted loss."""

import torch
from diffusion_cli.diffusion.objectives import Dropout, Weighted
from diffusion_cli.diffusion.schedules import Schedule
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor


class Example(Weighted):
    """P2 weighting of the error of eps, `1 / (k + SNR)^gamma` (Choi et al. 2022, Eq. 8).

    `Weighted` computes the squared error of x_0, and `weight` its factor at each time. Derive from `Objective` for
    another loss.

    Args:
        k: constant that limits the weight at high noise
        gamma: strength of the weighting; 0 is L_simple
        label_dropout: probability of training without the label, for classifier-free guidance
    """

    def __init__(
        self, *, k: PositiveFloat = 1.0, gamma: NonNegativeFloat = 1.0, label_dropout: Dropout = 0.1
    ) -> None:
        super().__init__(label_dropout=label_dropout)
        self.k, self.gamma = k, gamma

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        """Return the weight of the squared error of x_0, float64 [B]; that of the error of eps is `weight / SNR`."""
        snr = torch.exp(schedule.log_snr(t))
        return snr / (self.k + snr) ** self.gamma
