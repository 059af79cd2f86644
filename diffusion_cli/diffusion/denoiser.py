"""Networks conditioned on the noise level: the denoiser, its wrappers, and the classifier of noised images.

Division by alpha or sigma happens here and nowhere else.
"""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from diffusion_cli.diffusion.parameterizations import Coefficients, Parameterization
from diffusion_cli.diffusion.schedules import Schedule
from diffusion_cli.errors import UsageError


class Prediction(NamedTuple):
    """What a denoiser says of x_t: the image and the noise in it, and the variance head's output if any."""

    x0: Tensor
    eps: Tensor
    sigma: Tensor
    """The level of the noise, one for all (0-d, float64) or [B, 1, 1, 1]."""
    variance: Tensor | None = None

    @property
    def score(self) -> Tensor:
        """The gradient of log p_t at x_t, `-eps / sigma` (Vincent 2011; Song et al. 2021b)."""
        return -self.eps / self.sigma

    def detach(self) -> "Prediction":
        """Return the same numbers, through which no gradient flows."""
        variance = None if self.variance is None else self.variance.detach()
        return Prediction(self.x0.detach(), self.eps.detach(), self.sigma, variance)


Denoise = Callable[[Tensor, Tensor], Prediction]


def per_image(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient of one time, or of one time an image, in the type and with the dimensions of images x.

    That of one time stays on the CPU: as a number it meets images on any device, and none waits for a copy.
    """
    return coefficient.to(x).view(-1, *[1] * (x.ndim - 1)) if coefficient.ndim else coefficient


def noised(schedule: Schedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """`x_t = alpha_t x_0 + sigma_t eps`."""
    alpha, sigma = (per_image(level, x0) for level in schedule(t))
    return alpha * x0 + sigma * eps


class NoiseConditioned(nn.Module):
    """A network and its diffusion process; UsageError if the parameterization is undefined for the schedule.

    It sees `c_in x_t` and c_noise.
    """

    task: str
    """The word for what it is in configurations and checkpoints."""

    def __init__(self, network: nn.Module, schedule: Schedule, parameterization: Parameterization) -> None:
        super().__init__()
        parameterization.check(schedule)
        made_for = getattr(network, "task", Denoiser.task)
        if made_for != self.task:
            raise UsageError(
                "model",
                type(network).__name__,
                f"is for task={made_for}",
                f"take one for task={self.task}, or an objective that goes with it",
            )
        self.network = network
        self.schedule = schedule
        self.parameterization = parameterization
        self.evaluations = 0
        """Images that went through the network so far."""

    def with_network(self, network: nn.Module) -> Self:
        """The same with another network."""
        return type(self)(network, self.schedule, self.parameterization)

    def show(self, x_t: Tensor, t: Tensor, *labels: Tensor | None) -> tuple[Tensor, Coefficients]:
        """Return what the network makes of x_t [B, C, H, W] at times t, one or [B], and the map that reads it."""
        self.evaluations += len(x_t)
        coefficients = self.parameterization(self.schedule, t)
        c_noise = coefficients.c_noise
        c_noise = c_noise.to(x_t) if c_noise.ndim else x_t.new_full((len(x_t),), c_noise.item())
        output = self.network(per_image(coefficients.c_in, x_t) * x_t, c_noise, *labels)
        return output.to(x_t.dtype), coefficients


class Denoiser(NoiseConditioned):
    """A network read as an estimate of x_0 and eps."""

    task = "diffusion"

    @property
    def learns_variance(self) -> bool:
        """Whether the network has a head for the variance of a step."""
        return bool(getattr(self.network, "learn_variance", False))

    @property
    def num_classes(self) -> int | None:
        """Number of classes K, where label K means no class; None for an unconditional network."""
        return getattr(self.network, "num_classes", None)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        """Estimate x_0 and eps from x_t [B, C, H, W] at times t in (0, 1], one for all or one an image.

        `y` holds int64 labels [B], or None for the unconditional estimate.
        """
        return self.read(x_t, t, *self.output(x_t, t, y))

    def output(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None, Coefficients]:
        """Return the network's F [B, C, H, W], its variance values if it has any, and the map that reads it."""
        output, coefficients = self.show(x_t, t, y)
        variance = None
        if output.shape[1] == 2 * x_t.shape[1]:
            output, variance = output.chunk(2, dim=1)
        return output, variance, coefficients

    def read(
        self, x_t: Tensor, t: Tensor, output: Tensor, variance: Tensor | None, coefficients: Coefficients
    ) -> Prediction:
        """Return what an output F says: `x_0 = c_skip x_t + c_out F` and `eps = (x_t - alpha x_0) / sigma`.

        The two coefficients of eps are combined in float64 before they meet an image, so that eps loses no digits
        where sigma is small.
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
    """A network read as log-probabilities of classes given a noised image (Dhariwal & Nichol 2021, Sec. 4)."""

    task = "classifier"

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return log p(y | x_t) in nats, float [B, K], of x_t [B, C, H, W] at times t, one for all or [B]."""
        return self.show(x_t, t)[0].log_softmax(dim=1)

    def gradient(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the gradient of log p(y | x_t) by x_t, [B, C, H, W], for labels y [B]; in any gradient mode."""
        with torch.inference_mode(False), torch.enable_grad():
            x = x_t.detach().clone().requires_grad_()
            chosen = self(x, t.clone()).gather(1, y.clone()[:, None])
            return torch.autograd.grad(chosen.sum(), x)[0]


def with_x0(prediction: Prediction, x0: Tensor, schedule: Schedule, x_t: Tensor, t: Tensor) -> Prediction:
    """A prediction with another x_0, and the eps that agrees with it."""
    alpha, sigma = (per_image(level, x_t) for level in schedule(t))
    return prediction._replace(x0=x0, eps=(x_t - alpha * x0) / sigma)


def clip_x0(denoise: Denoise, schedule: Schedule) -> Denoise:
    """Wrap a denoiser so that x_0 stays in [-1, 1] and eps agrees with it (Ho et al. 2020's sampling code)."""

    def clipped(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = denoise(x_t, t)
        return with_x0(prediction, prediction.x0.clamp(-1, 1), schedule, x_t, t)

    return clipped


def threshold_x0(denoise: Denoise, schedule: Schedule, quantile: float, largest: float) -> Denoise:
    """Wrap a denoiser so that x_0 is clipped to [-s, s] and divided by s, image by image, and eps agrees with it.

    s is the `quantile` of |x_0| over the image's pixels, kept within 1..largest: dynamic thresholding
    (Saharia et al. 2022, Sec. 2.3), of which `clip_x0` is the case largest = 1.
    """

    def thresholded(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = denoise(x_t, t)
        # Image by image, because quantile takes at most 2^24 numbers.
        s = torch.stack([image.abs().quantile(quantile) for image in prediction.x0])
        s = per_image(s.clamp(1, largest), x_t)
        return with_x0(prediction, prediction.x0.clamp(-s, s) / s, schedule, x_t, t)

    return thresholded


def add_score(prediction: Prediction, gradient: Tensor, schedule: Schedule, t: Tensor) -> Prediction:
    """Add the gradient of some log-density by x_t to the score of a prediction.

    `eps - sigma g` and `x_0 + sigma^2 / alpha g`; without signal (alpha = 0) x_t says nothing of the image, and the
    prediction stays as it is.
    """
    alpha, sigma = schedule(t)
    gain = torch.where(alpha > 0, sigma**2 / alpha, 0.0)
    return prediction._replace(
        x0=prediction.x0 + per_image(gain, gradient) * gradient,
        eps=prediction.eps - per_image(torch.where(alpha > 0, sigma, 0.0), gradient) * gradient,
    )
