"""The denoiser: network, schedule and parameterization together, and the denoisers that wrap one.

Division by alpha or sigma happens here and nowhere else.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from diffusion_cli.parameterizations import Coefficients, Parameterization
from diffusion_cli.schedules import Schedule


class Prediction(NamedTuple):
    """What a denoiser says of x_t: the image and the noise in it, and the variance head's output if any."""

    x0: Tensor
    eps: Tensor
    sigma: Tensor
    """The level of the noise, one for all or [B, 1, 1, 1]."""
    variance: Tensor | None = None

    @property
    def score(self) -> Tensor:
        """The gradient of log p_t at x_t, `-eps / sigma` (Vincent 2011; Song et al. 2021b)."""
        return -self.eps / self.sigma


Denoise = Callable[[Tensor, Tensor], Prediction]


def per_image(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient of one time, or of one time an image, in the type and with the dimensions of images x."""
    coefficient = coefficient.to(x)
    return coefficient.view(-1, *[1] * (x.ndim - 1)) if coefficient.ndim else coefficient


def noised(schedule: Schedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """`x_t = alpha_t x_0 + sigma_t eps`."""
    alpha, sigma = (per_image(level, x0) for level in schedule(t))
    return alpha * x0 + sigma * eps


class Denoiser(nn.Module):
    """A network read as an estimate of x_0 and eps; ValueError if the parameterization has no meaning here."""

    def __init__(self, network: nn.Module, schedule: Schedule, parameterization: Parameterization) -> None:
        super().__init__()
        parameterization.check(schedule)
        self.network = network
        self.schedule = schedule
        self.parameterization = parameterization

    @property
    def learns_variance(self) -> bool:
        """Whether the network has a head for the variance of a step."""
        return bool(getattr(self.network, "learn_variance", False))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        """Estimate x_0 and eps from x_t [B, C, H, W] at times t in (0, 1], one for all or one an image.

        `y` holds int64 labels [B], or None for the unconditional estimate. With
        `x_0 = c_skip x_t + c_out F`, the noise is `eps = (x_t - alpha x_0) / sigma`; its two coefficients are
        combined in float64 before they meet an image, so that eps loses no digits where sigma is small.
        """
        output, variance, (c_skip, c_out, _, _) = self.output(x_t, t, y)
        alpha, sigma = self.schedule(t)
        x0 = per_image(c_skip, x_t) * x_t + per_image(c_out, x_t) * output
        eps = (
            per_image((1 - alpha * c_skip) / sigma, x_t) * x_t
            - per_image(alpha * c_out / sigma, x_t) * output
        )
        return Prediction(x0, eps, per_image(sigma, x_t), variance)

    def output(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None, Coefficients]:
        """Return the network's F [B, C, H, W], its variance values if it has any, and the map that reads it."""
        coefficients = self.parameterization(self.schedule, t)
        c_noise = coefficients.c_noise.to(x_t).expand(len(x_t))
        output = self.network(per_image(coefficients.c_in, x_t) * x_t, c_noise, y).to(x_t.dtype)
        if output.shape[1] == 2 * x_t.shape[1]:
            return *output.chunk(2, dim=1), coefficients
        return output, None, coefficients


def clip_x0(denoise: Denoise, schedule: Schedule) -> Denoise:
    """Wrap a denoiser so that x_0 stays in [-1, 1] and eps agrees with it (Ho et al. 2020's sampling code)."""

    def clipped(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = denoise(x_t, t)
        alpha, sigma = (per_image(level, x_t) for level in schedule(t))
        x0 = prediction.x0.clamp(-1, 1)
        return prediction._replace(x0=x0, eps=(x_t - alpha * x0) / sigma)

    return clipped
