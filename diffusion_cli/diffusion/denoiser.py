"""Noise-conditioned networks: denoisers, their wrappers, and classifiers of noisy images.

Only this module divides by alpha or sigma.
"""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from diffusion_cli.conditions import Condition, Conditions
from diffusion_cli.conditions.condition import LABEL
from diffusion_cli.diffusion.parameterizations import Coefficients, Parameterization
from diffusion_cli.diffusion.schedules import Schedule
from diffusion_cli.errors import UsageError, option_name


class Prediction(NamedTuple):
    """Output of a denoiser at x_t: estimates of x_0 and eps, and the output of the variance head if any."""

    x0: Tensor
    eps: Tensor
    sigma: Tensor
    """Noise level sigma_t, 0-d (float64) if common to all images, else [B, 1, 1, 1]."""
    variance: Tensor | None = None

    @property
    def score(self) -> Tensor:
        """Score, the gradient of log p_t at x_t: `-eps / sigma` (Vincent 2011; Song et al. 2021b)."""
        return -self.eps / self.sigma

    def detach(self) -> "Prediction":
        """Return the prediction detached from the autograd graph."""
        variance = None if self.variance is None else self.variance.detach()
        return Prediction(self.x0.detach(), self.eps.detach(), self.sigma, variance)


Denoise = Callable[[Tensor, Tensor], Prediction]


def per_image(coefficient: Tensor, x: Tensor) -> Tensor:
    """Return a coefficient of one time, or of one time per image, broadcastable to images x in their dtype.

    A 0-d coefficient stays on the CPU: it combines with tensors on any device without a copy.
    """
    return coefficient.to(x).view(-1, *[1] * (x.ndim - 1)) if coefficient.ndim else coefficient


def noised(schedule: Schedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Return `x_t = alpha_t x_0 + sigma_t eps`."""
    alpha, sigma = (per_image(level, x0) for level in schedule(t))
    return alpha * x0 + sigma * eps


class NoiseConditioned(nn.Module):
    """A network with its schedule and parameterization, called with c_in x_t and c_noise.

    Args:
        network: module from (c_in x_t, c_noise, labels) to F.
        schedule: noise schedule.
        parameterization: meaning of F.

    Raises:
        UsageError: the parameterization is undefined for the schedule, or the network is for another task or needs
            other noise levels.
    """

    task: str
    """Name of the task in configurations and checkpoints."""

    def __init__(self, network: nn.Module, schedule: Schedule, parameterization: Parameterization) -> None:
        super().__init__()
        parameterization.check(schedule)
        made_for = getattr(network, "task", Denoiser.task)
        if made_for != self.task:
            raise UsageError(
                "model",
                type(network).__name__,
                f"is for task={made_for}",
                f"use one for task={self.task}, or another objective",
            )
        if getattr(network, "scale_by_sigma", False):
            _check_gets_sigma(schedule, parameterization)
        if (largest := getattr(network, "largest_c_noise", None)) is not None:
            _check_noise_levels(schedule, parameterization, largest)
        self.network = network
        self.schedule = schedule
        self.parameterization = parameterization
        self.evaluations = 0
        """Number of images evaluated so far."""

    def with_network(self, network: nn.Module) -> Self:
        """Return the same with another network."""
        return type(self)(network, self.schedule, self.parameterization)

    def show(self, x_t: Tensor, t: Tensor, *given: Condition | Tensor | None) -> tuple[Tensor, Coefficients]:
        """Return the network's output for x_t [B, C, H, W] at times t, 0-d or [B], and the coefficients.

        The network also gets what is `given`.
        """
        if (
            not torch.compiler.is_exporting()
        ):  # an exported program has no counter, and len() would fix its batch size
            self.evaluations += len(x_t)
        coefficients = self.parameterization(self.schedule, t)
        c_noise = coefficients.c_noise
        c_noise = c_noise.to(x_t) if c_noise.ndim else x_t.new_full((len(x_t),), c_noise.item())
        output = self.network(per_image(coefficients.c_in, x_t) * x_t, c_noise, *given)
        return output.to(x_t.dtype), coefficients


def _check_gets_sigma(schedule: Schedule, parameterization: Parameterization) -> None:
    """Raise UsageError if the network does not get log sigma, with which it divides by sigma."""
    t = torch.tensor([0.5, 1.0], dtype=torch.float64)
    _, sigma = schedule(t)
    if not torch.allclose(parameterization(schedule, t).c_noise, sigma.log()):
        raise UsageError(
            "model.scale_by_sigma",
            True,
            f"the network gets log sigma neither from the {schedule.name} schedule nor from "
            f"the parameterization {type(parameterization).__name__}",
            "use schedule=ve and parameterization=score, or model.scale_by_sigma=false",
        )


def _check_noise_levels(schedule: Schedule, parameterization: Parameterization, largest: float) -> None:
    """Raise UsageError if the network gets noise levels that it cannot distinguish from their neighbours."""
    t = torch.tensor([schedule.t_min, 1.0], dtype=torch.float64)
    given = parameterization(schedule, t).c_noise.abs().max().item()
    if given > largest:
        name = option_name(type(parameterization).__name__)
        problem = f"gives the network timesteps up to {given:.0f}, and it reads logarithms of noise levels"
        raise UsageError("parameterization", name, problem, "use parameterization=edm, or another model=")


class Denoiser(NoiseConditioned):
    """A network as an estimate of x_0 and eps; see `NoiseConditioned` for the arguments."""

    task = "diffusion"

    @property
    def learns_variance(self) -> bool:
        """Whether the network predicts the variance of a step."""
        return bool(getattr(self.network, "learn_variance", False))

    @property
    def num_classes(self) -> int | None:
        """Number of classes K, where label K is the null class; None for an unconditional network."""
        return getattr(self.network, "num_classes", None)

    @property
    def conditions(self) -> Conditions:
        """The conditions of the network."""
        return getattr(self.network, "conditions", Conditions.of(self.num_classes))

    def forward(self, x_t: Tensor, t: Tensor, y: Condition | Tensor | None = None) -> Prediction:
        """Estimate x_0 and eps.

        Args:
            x_t: noisy images [B, C, H, W].
            t: times in (0, 1], 0-d or [B].
            y: condition, or class labels, int64 [B]; None: unconditional.
        """
        return self.read(x_t, t, *self.output(x_t, t, y))

    def output(
        self, x_t: Tensor, t: Tensor, y: Condition | Tensor | None
    ) -> tuple[Tensor, Tensor | None, Coefficients]:
        """Return the network output F [B, C, H, W], the output of the variance head or None, and the coefficients."""
        output, coefficients = self.show(x_t, t, self._given(y))
        variance = None
        if output.shape[1] == 2 * x_t.shape[1]:
            output, variance = output.chunk(2, dim=1)
        return output, variance, coefficients

    def _given(self, y: Condition | Tensor | None) -> Condition | Tensor | None:
        """Return what the network gets: the condition, or class labels if it takes no conditions."""
        if y is None or getattr(self.network, "takes_conditions", False):
            return None if y is None else Condition.of(y)
        labels = Condition.of(y).get(LABEL)
        if labels is None or self.num_classes is None:
            return labels
        return torch.where(labels < 0, self.num_classes, labels)

    def read(
        self, x_t: Tensor, t: Tensor, output: Tensor, variance: Tensor | None, coefficients: Coefficients
    ) -> Prediction:
        """Convert F to a prediction: `x_0 = c_skip x_t + c_out F` and `eps = (x_t - alpha x_0) / sigma`.

        The coefficients of eps are combined in float64 first, so that eps is accurate for small sigma.
        """
        c_skip, c_out, _, _ = coefficients
        alpha, sigma = self.schedule(t)
        x0 = per_image(c_skip, x_t) * x_t + per_image(c_out, x_t) * output
        eps = (
            per_image((1 - alpha * c_skip) / sigma, x_t) * x_t
            - per_image(alpha * c_out / sigma, x_t) * output
        )
        return Prediction(x0, eps, per_image(sigma, x_t), variance)


class NoisyClassifier(NoiseConditioned):
    """A network as a classifier of noisy images (Dhariwal and Nichol 2021, Sec. 4); see `NoiseConditioned`."""

    task = "classifier"

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return log p(y | x_t) in nats, [B, K], for x_t [B, C, H, W] at times t, 0-d or [B]."""
        return self.show(x_t, t)[0].log_softmax(dim=1)

    def gradient(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the gradient of log p(y | x_t) at x_t, [B, C, H, W], for labels y [B]; 0 for a missing label.

        It works in any grad mode.
        """
        with torch.inference_mode(False), torch.enable_grad():
            x = x_t.detach().clone().requires_grad_()
            chosen = self(x, t.clone()).gather(1, y.clamp(min=0)[:, None])[:, 0]
            chosen = torch.where(y.clone() >= 0, chosen, 0.0)
            return torch.autograd.grad(chosen.sum(), x)[0]


def with_x0(prediction: Prediction, x0: Tensor, schedule: Schedule, x_t: Tensor, t: Tensor) -> Prediction:
    """Return a prediction with another x_0, and eps consistent with it."""
    alpha, sigma = (per_image(level, x_t) for level in schedule(t))
    return prediction._replace(x0=x0, eps=(x_t - alpha * x0) / sigma)


def clip_x0(denoise: Denoise, schedule: Schedule, *, keep_eps: bool = False) -> Denoise:
    """Wrap a denoiser to clip x_0 to [-1, 1], with eps consistent (as in the code of Ho et al. 2020).

    With `keep_eps`, eps is that of the network, as in the code of Song et al. 2021a and in diffusers by default.
    """

    def clipped(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = denoise(x_t, t)
        x0 = prediction.x0.clamp(-1, 1)
        return prediction._replace(x0=x0) if keep_eps else with_x0(prediction, x0, schedule, x_t, t)

    return clipped


def threshold_x0(denoise: Denoise, schedule: Schedule, quantile: float, largest: float) -> Denoise:
    """Wrap a denoiser with dynamic thresholding: clip x_0 to [-s, s] and divide by s, with eps consistent.

    s is the `quantile` of |x_0| over each image, limited to [1, largest]. `largest` = 1 gives `clip_x0`.

    Source: Saharia et al. 2022, Sec. 2.3.
    """

    def thresholded(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = denoise(x_t, t)
        # Per image, because torch.quantile is limited to 2^24 elements.
        s = torch.stack([image.abs().quantile(quantile) for image in prediction.x0])
        s = per_image(s.clamp(1, largest), x_t)
        return with_x0(prediction, prediction.x0.clamp(-s, s) / s, schedule, x_t, t)

    return thresholded


def add_score(prediction: Prediction, gradient: Tensor, schedule: Schedule, t: Tensor) -> Prediction:
    """Add the gradient g of a log-density at x_t to the score of a prediction.

    The result has eps - sigma g and x_0 + sigma^2 / alpha g. If alpha = 0, x_t contains no signal, and the prediction
    is unchanged.
    """
    alpha, sigma = schedule(t)
    gain = torch.where(alpha > 0, sigma**2 / alpha, 0.0)
    return prediction._replace(
        x0=prediction.x0 + per_image(gain, gradient) * gradient,
        eps=prediction.eps - per_image(torch.where(alpha > 0, sigma, 0.0), gradient) * gradient,
    )
