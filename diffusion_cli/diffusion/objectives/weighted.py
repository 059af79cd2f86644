"""Weighted squared errors of denoisers."""

from abc import abstractmethod

import torch
from pydantic import PositiveFloat
from torch import Tensor

from diffusion_cli.conditions import Condition
from diffusion_cli.diffusion.denoiser import Denoiser, noised, per_image
from diffusion_cli.diffusion.objectives.base import Dropout, Objective
from diffusion_cli.diffusion.schedules import Schedule
from diffusion_cli.diffusion.time_sampling import Times
from diffusion_cli.errors import UsageError


def residual(
    denoiser: Denoiser, x0: Tensor, y: Condition | None, t: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """Return F - F_target and c_out, where `F_target = (x_0 - c_skip x_t) / c_out`.

    The target's coefficients of x_0 and eps are combined in float64 first, which is accurate for small c_out.
    """
    output, _, (c_skip, c_out, _, _) = denoiser.output(noised(denoiser.schedule, x0, t, eps), t, y)
    alpha, sigma = denoiser.schedule(t)
    target = per_image((1 - alpha * c_skip) / c_out, x0) * x0 - per_image(sigma * c_skip / c_out, x0) * eps
    return output - target, c_out


class Weighted(Objective[Denoiser]):
    """Base class of weighted squared errors, `w(t) |x_0 - x_0hat|^2 = w(t) c_out^2 |F - F_target|^2`, mean over pixels.

    Args:
        huber_delta: replaces the square r^2 of a pixel's error in F by the pseudo-Huber distance
            `2 delta^2 (sqrt(1 + (r / delta)^2) - 1)`, which grows like |r| for outliers; None: squares.
        label_dropout: probability of dropping all conditions of an image.
        single_dropout: with several conditions, probability of dropping each one alone.
    """

    def __init__(
        self,
        *,
        huber_delta: PositiveFloat | None = None,
        label_dropout: Dropout = 0.1,
        single_dropout: Dropout = 0.1,
    ) -> None:
        self.huber_delta, self.label_dropout, self.single_dropout = huber_delta, label_dropout, single_dropout

    @abstractmethod
    def weight(self, schedule: Schedule, t: Tensor) -> Tensor | None:
        """Return w(t), float64 [B], for the squared error of x_0; None for 1 / c_out^2."""

    def check(self, model: Denoiser, times: Times) -> None:
        if model.learns_variance:
            raise UsageError(
                "model.learn_variance",
                True,
                "this objective does not train the variance head",
                "use objective=hybrid or vlb, or set model.learn_variance=false",
            )

    def __call__(self, model: Denoiser, x0: Tensor, y: Condition | None, t: Tensor, eps: Tensor) -> Tensor:
        error, c_out = residual(model, x0, y, t, eps)
        if self.huber_delta is None:
            distance = error.square()
        else:
            distance = 2 * self.huber_delta**2 * (torch.sqrt(1 + (error / self.huber_delta) ** 2) - 1)
        loss = distance.flatten(1).mean(1)
        weight = self.weight(model.schedule, t)
        return loss if weight is None else (weight * c_out**2).to(loss) * loss


class Simple(Weighted):
    """Error of eps, `w = alpha^2 / sigma^2`: L_simple (Ho et al. 2020, Eq. 14); see `Weighted` for the arguments."""

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        return torch.exp(schedule.log_snr(t))


class Target(Weighted):
    """Error of the network output, `w = 1 / c_out^2`; see `Weighted` for the arguments.

    This is L_simple for eps, the v-loss for v, flow matching for flow (Lipman et al. 2023, Eq. 14) and EDM's loss for
    edm (Karras et al. 2022, Eq. 8).
    """

    def weight(self, schedule: Schedule, t: Tensor) -> None:
        return None


class Likelihood(Weighted):
    """Likelihood weighting, `w = -d SNR / dt`, that is g^2 for the error of the score; see `Weighted`.

    With uniform times this is a bound on the likelihood. Source: Song et al. 2021c, Eq. 7; Kingma et al. 2021, Eq. 17.
    """

    compares_to_zero = False

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        (alpha, sigma), (d_alpha, d_sigma) = schedule(t), schedule.derivatives(t)
        return 2 * alpha * (alpha * d_sigma - sigma * d_alpha) / sigma**3


class MinSNR(Weighted):
    """Min-SNR weighting, `w = min(SNR, gamma)` (Hang et al. 2023, Eq. 10); see `Weighted` for the other arguments.

    Args:
        gamma: largest weight.
        huber_delta: see `Weighted`.
        label_dropout: see `Weighted`.
        single_dropout: see `Weighted`.
    """

    def __init__(
        self,
        *,
        gamma: PositiveFloat = 5.0,
        huber_delta: PositiveFloat | None = None,
        label_dropout: Dropout = 0.1,
        single_dropout: Dropout = 0.1,
    ) -> None:
        super().__init__(huber_delta=huber_delta, label_dropout=label_dropout, single_dropout=single_dropout)
        self.gamma = gamma

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        return torch.exp(schedule.log_snr(t)).clamp(max=self.gamma)


class EDMObjective(Weighted):
    """EDM weighting, `w = SNR + 1 / sigma_data^2`, which equalizes initial losses (Karras et al. 2022, Table 1).

    Args:
        sigma_data: standard deviation of the data.
        huber_delta: see `Weighted`.
        label_dropout: see `Weighted`.
        single_dropout: see `Weighted`.
    """

    def __init__(
        self,
        *,
        sigma_data: PositiveFloat = 0.5,
        huber_delta: PositiveFloat | None = None,
        label_dropout: Dropout = 0.1,
        single_dropout: Dropout = 0.1,
    ) -> None:
        super().__init__(huber_delta=huber_delta, label_dropout=label_dropout, single_dropout=single_dropout)
        self.sigma_data = sigma_data

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        return torch.exp(schedule.log_snr(t)) + 1 / self.sigma_data**2
