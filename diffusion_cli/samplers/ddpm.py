"""DDPM ancestral sampling."""

from typing import Any, Literal

from torch import Tensor

from diffusion_cli.diffusion.denoiser import Denoise, Denoiser
from diffusion_cli.diffusion.posterior import learned_log_variance, posterior
from diffusion_cli.diffusion.schedules import Schedule, Spacing
from diffusion_cli.errors import UsageError
from diffusion_cli.samplers.base import NoiseFn, Sampler


class DDPM(Sampler):
    """DDPM: samples the posterior `q(x_s | x_t, x_0)` at the predicted x_0 (Ho et al. 2020, Alg. 2, Eq. 6-7).

    With a and v of the transition from s to t, the mean is `a sigma_s^2 / sigma_t^2 x_t + alpha_s v / sigma_t^2 x_0`.

    Args:
        schedule: noise schedule.
        variance: `small` is `v sigma_s^2 / sigma_t^2`, exact for data of one point; `large` is v, exact for standard
            normal data; `learned` is the model's interpolation (Nichol and Dhariwal 2021, Eq. 15).
        spacing: spacing of the times, see `Schedule.grid`.
    """

    order = 1
    stochastic = True

    def __init__(
        self,
        schedule: Schedule,
        *,
        variance: Literal["small", "large", "learned"] = "small",
        spacing: Spacing = "trailing",
    ) -> None:
        super().__init__(schedule, spacing=spacing)
        self.variance = variance

    def check(self, denoiser: Denoiser) -> None:
        if self.variance == "learned" and not denoiser.learns_variance:
            raise UsageError(
                "sampler.variance",
                "learned",
                "the model has no variance head (model.learn_variance=false)",
                "use small or large",
            )

    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, draw: NoiseFn, state: Any
    ) -> tuple[Tensor, Any]:
        step = posterior(self.schedule, t, s)
        prediction = denoise(x, t)
        mean = step.c_t * x + step.c_0 * prediction.x0
        if s == 0:
            return mean, None
        if self.variance != "learned":
            return mean + (step.small if self.variance == "small" else step.large).sqrt() * draw(), None
        assert prediction.variance is not None
        log_variance = learned_log_variance(prediction.variance, step.small.log(), step.large.log())
        return mean + (log_variance / 2).exp() * draw(), None
