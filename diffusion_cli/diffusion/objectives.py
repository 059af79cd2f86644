"""Training objectives: the losses of denoisers and classifiers, at the times of `time_sampling`."""

from abc import ABC, abstractmethod
from typing import Annotated, Generic, Literal, TypeVar

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn.functional import nll_loss

from diffusion_cli.diffusion.denoiser import Denoiser, NoiseConditioned, NoisyClassifier, noised, per_image
from diffusion_cli.diffusion.posterior import bound_term
from diffusion_cli.diffusion.schedules import Discrete, Schedule
from diffusion_cli.diffusion.time_sampling import Times
from diffusion_cli.errors import UsageError

Dropout = Annotated[float, Field(ge=0, lt=1)]
Model = TypeVar("Model", bound=NoiseConditioned, contravariant=True)


class Objective(ABC, Generic[Model]):
    """The error of a network on noised images."""

    trains: type[NoiseConditioned] = Denoiser
    label_dropout: float = 0.0
    """Probability of dropping a label of a class-conditional denoiser in training (Ho & Salimans 2022, Alg. 1)."""
    compares_to_zero: bool = True
    """Whether a trained network's loss lies well below that of predicting zero.

    Not where nearly all of the weight is on low noise, of which no network finds much.
    """

    @abstractmethod
    def __call__(self, model: Model, x0: Tensor, y: Tensor | None, t: Tensor, eps: Tensor) -> Tensor:
        """Noise x0 [B, C, H, W] with eps to the times t [B], and return the loss of each image, [B]."""

    @abstractmethod
    def check(self, model: Model, times: Times) -> None:
        """Raise UsageError if the model cannot be trained by it at such times, or has a part left untrained."""


def drop_labels(y: Tensor, num_classes: int, share: float, u: Tensor) -> Tensor:
    """The labels y [B], those with uniform numbers u [B] below `share` turned into the null class `num_classes`."""
    return torch.where(u < share, num_classes, y)


def residual(
    denoiser: Denoiser, x0: Tensor, y: Tensor | None, t: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """The network's output less its target `(x_0 - c_skip x_t) / c_out`, and c_out.

    The target's coefficients of x_0 and eps are combined in float64 first: no digits are lost where c_out is small.
    """
    output, _, (c_skip, c_out, _, _) = denoiser.output(noised(denoiser.schedule, x0, t, eps), t, y)
    alpha, sigma = denoiser.schedule(t)
    target = per_image((1 - alpha * c_skip) / c_out, x0) * x0 - per_image(sigma * c_skip / c_out, x0) * eps
    return output - target, c_out


class Weighted(Objective[Denoiser]):
    """The squared error of the network's output, weighted: `w(t) c_out^2 |F - F_target|^2 = w(t) |x_0 - x_0hat|^2`.

    With `huber_delta` the square r^2 of each pixel's error gives way to the pseudo-Huber distance
    `2 delta^2 (sqrt(1 + (r / delta)^2) - 1)`, which grows like |r| for outliers. A weighting is a function of the
    signal-to-noise ratio, in terms of the error of x_0; the mean is over pixels.
    """

    def __init__(self, *, huber_delta: PositiveFloat | None = None, label_dropout: Dropout = 0.1) -> None:
        self.huber_delta, self.label_dropout = huber_delta, label_dropout

    @abstractmethod
    def weight(self, schedule: Schedule, t: Tensor) -> Tensor | None:
        """Return w(t) float64 [B], for the squared error of x_0; None for 1 / c_out^2."""

    def check(self, model: Denoiser, times: Times) -> None:
        if model.learns_variance:
            raise UsageError(
                "model.learn_variance",
                True,
                "this objective does not train the variance",
                "take objective=hybrid or vlb, or model.learn_variance=false",
            )

    def __call__(self, model: Denoiser, x0: Tensor, y: Tensor | None, t: Tensor, eps: Tensor) -> Tensor:
        error, c_out = residual(model, x0, y, t, eps)
        if self.huber_delta is None:
            distance = error.square()
        else:
            distance = 2 * self.huber_delta**2 * (torch.sqrt(1 + (error / self.huber_delta) ** 2) - 1)
        loss = distance.flatten(1).mean(1)
        weight = self.weight(model.schedule, t)
        return loss if weight is None else (weight * c_out**2).to(loss) * loss


class Simple(Weighted):
    """The error of eps, `w = alpha^2 / sigma^2`: L_simple (Ho et al. 2020, Eq. 14)."""

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        return torch.exp(schedule.log_snr(t))


class Target(Weighted):
    """The error of the network's own output, `w = 1 / c_out^2`.

    That is L_simple for eps, the v-loss for v, flow matching for flow (Lipman et al. 2023, Eq. 14) and EDM's loss for
    edm (Karras et al. 2022, Eq. 8).
    """

    def weight(self, schedule: Schedule, t: Tensor) -> None:
        return None


class Likelihood(Weighted):
    """`w = -d SNR / dt`, that is g^2 for the error of the score: a bound on the likelihood, at uniform times.

    Source: Song et al. 2021c, Eq. 7; Kingma et al. 2021, Eq. 17.
    """

    compares_to_zero = False

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        (alpha, sigma), (d_alpha, d_sigma) = schedule(t), schedule.derivatives(t)
        return 2 * alpha * (alpha * d_sigma - sigma * d_alpha) / sigma**3


class MinSNR(Weighted):
    """`w = min(SNR, gamma)`: no level counts for more than its share (Hang et al. 2023, Eq. 10)."""

    def __init__(
        self,
        *,
        gamma: PositiveFloat = 5.0,
        huber_delta: PositiveFloat | None = None,
        label_dropout: Dropout = 0.1,
    ) -> None:
        super().__init__(huber_delta=huber_delta, label_dropout=label_dropout)
        self.gamma = gamma

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        return torch.exp(schedule.log_snr(t)).clamp(max=self.gamma)


class EDMObjective(Weighted):
    """`w = SNR + 1 / sigma_data^2`, so that every level starts with the same loss (Karras et al. 2022, Table 1)."""

    def __init__(
        self,
        *,
        sigma_data: PositiveFloat = 0.5,
        huber_delta: PositiveFloat | None = None,
        label_dropout: Dropout = 0.1,
    ) -> None:
        super().__init__(huber_delta=huber_delta, label_dropout=label_dropout)
        self.sigma_data = sigma_data

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        return torch.exp(schedule.log_snr(t)) + 1 / self.sigma_data**2


class VLB(Objective[Denoiser]):
    """T times the term of the variational bound, in bits per dimension: L_vlb (Nichol & Dhariwal 2021, Eq. 4).

    Its mean over uniform times is the bound, less the constant prior term.
    """

    compares_to_zero = False

    def __init__(
        self, *, variance: Literal["learned", "small", "large"] = "small", label_dropout: Dropout = 0.1
    ) -> None:
        self.variance: Literal["learned", "small", "large"] = variance
        self.label_dropout = label_dropout

    def check(self, model: Denoiser, times: Times) -> None:
        _check_bound(self, model, times)
        if model.learns_variance != (self.variance == "learned"):
            raise UsageError(
                "objective.variance",
                self.variance,
                f"goes with model.learn_variance={str(self.variance == 'learned').lower()}",
                "change one of them",
            )

    def __call__(self, model: Denoiser, x0: Tensor, y: Tensor | None, t: Tensor, eps: Tensor) -> Tensor:
        schedule = model.schedule
        assert isinstance(schedule, Discrete)
        x_t = noised(schedule, x0, t, eps)
        return schedule.num_timesteps * bound_term(schedule, model(x_t, t, y), x0, x_t, t, self.variance)


class Hybrid(Objective[Denoiser]):
    """`L_simple + vlb_weight L_vlb`, the bound training only the variance (Nichol & Dhariwal 2021, Eq. 16)."""

    def __init__(self, *, vlb_weight: PositiveFloat = 0.001, label_dropout: Dropout = 0.1) -> None:
        self.vlb_weight, self.label_dropout = vlb_weight, label_dropout

    def check(self, model: Denoiser, times: Times) -> None:
        _check_bound(self, model, times)
        if not model.learns_variance:
            raise UsageError(
                "objective", "hybrid", "trains a variance", "set model.learn_variance=true, or take simple"
            )

    def __call__(self, model: Denoiser, x0: Tensor, y: Tensor | None, t: Tensor, eps: Tensor) -> Tensor:
        schedule = model.schedule
        assert isinstance(schedule, Discrete)
        x_t = noised(schedule, x0, t, eps)
        prediction = model(x_t, t, y)
        simple = (prediction.eps - eps).square().flatten(1).mean(1)
        frozen = prediction.detach()._replace(variance=prediction.variance)
        bound = bound_term(schedule, frozen, x0, x_t, t, "learned")
        return simple + self.vlb_weight * schedule.num_timesteps * bound


class CrossEntropy(Objective[NoisyClassifier]):
    """`-log p(y | x_t)` in nats: what a classifier of noised images is trained by (Dhariwal & Nichol 2021, Sec. 4).

    With `label_smoothing` e the target is 1 - e for the label and e shared among all K classes.
    """

    trains = NoisyClassifier

    def __init__(self, *, label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def check(self, model: NoisyClassifier, times: Times) -> None:
        pass  # any classifier, at any times

    def __call__(
        self, model: NoisyClassifier, x0: Tensor, y: Tensor | None, t: Tensor, eps: Tensor
    ) -> Tensor:
        assert y is not None
        log_p = model(noised(model.schedule, x0, t, eps), t)
        loss = nll_loss(log_p, y, reduction="none")
        return (1 - self.label_smoothing) * loss - self.label_smoothing * log_p.mean(dim=1)


def _check_bound(objective: Objective, denoiser: Denoiser, times: Times) -> None:
    if not isinstance(denoiser.schedule, Discrete):
        raise UsageError(
            "objective",
            type(objective).__name__.lower(),
            f"the bound is a sum over timesteps, and the {denoiser.schedule.name} schedule has none",
            "take linear, scaled_linear, cosine or sigmoid",
        )
    if not times.uniform:
        name = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(times).__name__).strip("_")
        raise UsageError(
            "time_sampling",
            name,
            "the bound is a mean over the timesteps",
            "take uniform, stratified or loss_second_moment",
        )
