"""Training objectives of denoisers and classifiers."""

from abc import ABC, abstractmethod
from typing import Annotated, Generic, Literal, TypeVar

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn.functional import nll_loss

from diffusion_cli.conditions import Condition
from diffusion_cli.conditions.condition import LABEL
from diffusion_cli.diffusion.denoiser import Denoiser, NoiseConditioned, NoisyClassifier, noised, per_image
from diffusion_cli.diffusion.posterior import bound_term
from diffusion_cli.diffusion.schedules import Discrete, Schedule
from diffusion_cli.diffusion.time_sampling import Times
from diffusion_cli.errors import UsageError

Dropout = Annotated[float, Field(ge=0, lt=1)]
Model = TypeVar("Model", bound=NoiseConditioned, contravariant=True)


class Objective(ABC, Generic[Model]):
    """Base class of objectives: the loss of a network on noisy images."""

    trains: type[NoiseConditioned] = Denoiser
    label_dropout: float = 0.0
    """Probability of dropping all conditions of an image in training (Ho and Salimans 2022, Alg. 1)."""
    single_dropout: float = 0.0
    """With several conditions: probability of dropping each one alone."""
    compares_to_zero: bool = True
    """Whether the loss of a trained network is well below that of predicting zero.

    False for objectives with most of their weight at low noise, where no network can predict much.
    """

    @abstractmethod
    def __call__(self, model: Model, x0: Tensor, y: Condition | None, t: Tensor, eps: Tensor) -> Tensor:
        """Noise x0 [B, C, H, W] with eps to times t [B], and return the loss of each image, [B]."""

    @abstractmethod
    def check(self, model: Model, times: Times) -> None:
        """Raise UsageError if the objective cannot train the model at these times, or would leave a part untrained."""


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


class VLB(Objective[Denoiser]):
    """T times a term of the variational bound, in bits per dimension: L_vlb (Nichol and Dhariwal 2021, Eq. 4).

    Its mean over uniform times is the bound without the constant prior term.

    Args:
        variance: variance of the reverse process.
        label_dropout: probability of dropping all conditions of an image.
        single_dropout: with several conditions, probability of dropping each one alone.
    """

    compares_to_zero = False

    def __init__(
        self,
        *,
        variance: Literal["learned", "small", "large"] = "small",
        label_dropout: Dropout = 0.1,
        single_dropout: Dropout = 0.1,
    ) -> None:
        self.variance: Literal["learned", "small", "large"] = variance
        self.label_dropout, self.single_dropout = label_dropout, single_dropout

    def check(self, model: Denoiser, times: Times) -> None:
        _check_bound(self, model, times)
        if model.learns_variance != (self.variance == "learned"):
            raise UsageError(
                "objective.variance",
                self.variance,
                f"needs model.learn_variance={str(self.variance == 'learned').lower()}",
                "change one of them",
            )

    def __call__(self, model: Denoiser, x0: Tensor, y: Condition | None, t: Tensor, eps: Tensor) -> Tensor:
        schedule = model.schedule
        assert isinstance(schedule, Discrete)
        x_t = noised(schedule, x0, t, eps)
        return schedule.num_timesteps * bound_term(schedule, model(x_t, t, y), x0, x_t, t, self.variance)


class Hybrid(Objective[Denoiser]):
    """`L_simple + vlb_weight L_vlb`, where the bound trains only the variance (Nichol and Dhariwal 2021, Eq. 16).

    Args:
        vlb_weight: weight of the bound.
        label_dropout: probability of dropping all conditions of an image.
        single_dropout: with several conditions, probability of dropping each one alone.
    """

    def __init__(
        self,
        *,
        vlb_weight: PositiveFloat = 0.001,
        label_dropout: Dropout = 0.1,
        single_dropout: Dropout = 0.1,
    ) -> None:
        self.vlb_weight, self.label_dropout, self.single_dropout = vlb_weight, label_dropout, single_dropout

    def check(self, model: Denoiser, times: Times) -> None:
        _check_bound(self, model, times)
        if not model.learns_variance:
            raise UsageError(
                "objective",
                "hybrid",
                "trains the variance head",
                "set model.learn_variance=true, or use simple",
            )

    def __call__(self, model: Denoiser, x0: Tensor, y: Condition | None, t: Tensor, eps: Tensor) -> Tensor:
        schedule = model.schedule
        assert isinstance(schedule, Discrete)
        x_t = noised(schedule, x0, t, eps)
        prediction = model(x_t, t, y)
        simple = (prediction.eps - eps).square().flatten(1).mean(1)
        frozen = prediction.detach()._replace(variance=prediction.variance)
        bound = bound_term(schedule, frozen, x0, x_t, t, "learned")
        return simple + self.vlb_weight * schedule.num_timesteps * bound


class CrossEntropy(Objective[NoisyClassifier]):
    """Cross-entropy `-log p(y | x_t)` in nats, for classifiers of noisy images (Dhariwal and Nichol 2021, Sec. 4).

    Args:
        label_smoothing: fraction of the target distribution shared equally among all K classes, in [0, 1).
    """

    trains = NoisyClassifier

    def __init__(self, *, label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def check(self, model: NoisyClassifier, times: Times) -> None:
        pass  # any classifier and any times

    def __call__(
        self, model: NoisyClassifier, x0: Tensor, y: Condition | None, t: Tensor, eps: Tensor
    ) -> Tensor:
        labels = Condition.of(y).get(LABEL)
        assert labels is not None
        log_p = model(noised(model.schedule, x0, t, eps), t)
        loss = nll_loss(log_p, labels, reduction="none")
        return (1 - self.label_smoothing) * loss - self.label_smoothing * log_p.mean(dim=1)


def _check_bound(objective: Objective, denoiser: Denoiser, times: Times) -> None:
    if not isinstance(denoiser.schedule, Discrete):
        raise UsageError(
            "objective",
            type(objective).__name__.lower(),
            f"the bound is a sum over timesteps, but the {denoiser.schedule.name} schedule is continuous",
            "use linear, scaled_linear, cosine or sigmoid",
        )
    if not times.uniform:
        name = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(times).__name__).strip("_")
        raise UsageError(
            "time_sampling",
            name,
            "the bound is a mean over uniform timesteps",
            "use uniform, stratified or loss_second_moment",
        )
