"""Ancestral sampling."""

from typing import Any, Literal

from torch import Tensor

from diffusion_cli.denoiser import Denoise
from diffusion_cli.samplers.base import Sampler
from diffusion_cli.schedules import Schedule


class DDPM(Sampler):
    """Draw from the posterior `q(x_s | x_t, x_0)` at the predicted x_0 (Ho et al. 2020, Alg. 2, Eq. 6-7).

    With a and v of the transition from s to t, the mean is
    `a sigma_s^2 / sigma_t^2 x_t + alpha_s v / sigma_t^2 x_0`, the variance `v sigma_s^2 / sigma_t^2`
    ("small", exact for data that is one point) or `v` ("large", exact for standard normal data).
    """

    order = 1

    def __init__(
        self,
        schedule: Schedule,
        *,
        variance: Literal["small", "large"],
        spacing: Literal["leading", "trailing", "linspace", "quadratic"],
    ) -> None:
        super().__init__(schedule)
        self.variance = variance
        self.spacing = spacing

    @property
    def stochastic(self) -> bool:
        return True

    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, noise: Tensor | None, state: Any
    ) -> tuple[Tensor, Any]:
        a, v = self.schedule.transition(t, s)
        _, sigma_t = self.schedule(t)
        alpha_s, sigma_s = self.schedule(s)
        mean = a * sigma_s**2 / sigma_t**2 * x + alpha_s * v / sigma_t**2 * denoise(x, t).x0
        if noise is None:
            return mean, None
        variance = v if self.variance == "large" else v * sigma_s**2 / sigma_t**2
        return mean + variance.sqrt() * noise, None
