"""Denoising diffusion implicit models."""

from typing import Any, Literal

from pydantic import NonNegativeFloat
from torch import Tensor

from diffusion_cli.denoiser import Denoise
from diffusion_cli.samplers.base import Sampler
from diffusion_cli.schedules import Schedule


class DDIM(Sampler):
    """`x_s = alpha_s x_0 + sqrt(sigma_s^2 - sigma_eta^2) eps + sigma_eta z` (Song et al. 2021a, Eq. 12).

    `sigma_eta^2 = eta^2 v sigma_s^2 / sigma_t^2` (their Eq. 16): eta 0 is deterministic, eta 1 is DDPM with
    the small variance.
    """

    order = 1

    def __init__(
        self,
        schedule: Schedule,
        *,
        eta: NonNegativeFloat,
        spacing: Literal["leading", "trailing", "linspace", "quadratic"],
    ) -> None:
        super().__init__(schedule)
        self.eta = eta
        self.spacing = spacing

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, noise: Tensor | None, state: Any
    ) -> tuple[Tensor, Any]:
        prediction = denoise(x, t)
        alpha_s, sigma_s = self.schedule(s)
        if noise is None:
            return alpha_s * prediction.x0 + sigma_s * prediction.eps, None
        _, v = self.schedule.transition(t, s)
        _, sigma_t = self.schedule(t)
        variance = (self.eta**2 * v * sigma_s**2 / sigma_t**2).clamp(max=sigma_s**2)
        x_s = alpha_s * prediction.x0 + (sigma_s**2 - variance).sqrt() * prediction.eps
        return x_s + variance.sqrt() * noise, None
