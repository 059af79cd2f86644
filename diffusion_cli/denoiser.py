"""The denoiser: network, schedule and parameterization together, and the denoisers that wrap one.

Division by alpha or sigma happens here and nowhere else.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from diffusion_cli.parameterizations import Parameterization
from diffusion_cli.schedules import Schedule


class Prediction(NamedTuple):
    """What a denoiser says of x_t: the image and the noise in it, and the variance head's output if any."""

    x0: Tensor
    eps: Tensor
    variance: Tensor | None = None


Denoise = Callable[[Tensor, Tensor], Prediction]


class Denoiser(nn.Module):
    """A network read as an estimate of x_0 and eps."""

    def __init__(self, network: nn.Module, schedule: Schedule, parameterization: Parameterization) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.parameterization = parameterization

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        """Estimate x_0 and eps from x_t [B, C, H, W] at times t in (0, 1], one for all or one an image.

        `y` holds int64 labels [B], or None for the unconditional estimate. With
        `x_0 = c_skip x_t + c_out F`, the noise is `eps = (x_t - alpha x_0) / sigma`; its two coefficients are
        combined in float64 before they meet an image, so that eps loses no digits where sigma is small.
        """
        c_skip, c_out, c_in, c_noise = self.parameterization(self.schedule, t)
        alpha, sigma = self.schedule(t)

        def image(coefficient: Tensor) -> Tensor:
            return coefficient.to(x_t).view(-1, *[1] * (x_t.ndim - 1)) if t.ndim else coefficient.to(x_t)

        output = self.network(image(c_in) * x_t, c_noise.to(x_t).expand(len(x_t)), y).to(x_t.dtype)
        variance = None
        if output.shape[1] == 2 * x_t.shape[1]:
            output, variance = output.chunk(2, dim=1)
        x0 = image(c_skip) * x_t + image(c_out) * output
        eps = image((1 - alpha * c_skip) / sigma) * x_t - image(alpha * c_out / sigma) * output
        return Prediction(x0, eps, variance)


def clip_x0(denoise: Denoise, schedule: Schedule) -> Denoise:
    """Wrap a denoiser so that x_0 stays in [-1, 1] and eps agrees with it (Ho et al. 2020's sampling code)."""

    def clipped(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = denoise(x_t, t)
        alpha, sigma = schedule(t)
        x0 = prediction.x0.clamp(-1, 1)
        return prediction._replace(x0=x0, eps=(x_t - alpha * x0) / sigma)

    return clipped
