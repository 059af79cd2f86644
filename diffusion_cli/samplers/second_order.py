"""Two-stage methods in x / alpha and sigma / alpha, in which the probability flow ODE is dx = eps dsigma."""

import math
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from diffusion_cli.diffusion.denoiser import Denoise, Prediction
from diffusion_cli.diffusion.schedules import NO_SIGNAL, Schedule, Spacing
from diffusion_cli.errors import UsageError
from diffusion_cli.samplers.base import AncestralSampler, NoiseFn, Sampler


class Heun(Sampler):
    """Heun's method: two network calls per step, one in the last step.

    Uses the mean of eps at both ends of a step. Steps that start without signal (NO_SIGNAL) are Euler steps. See
    `Sampler` for the arguments. Source: Karras et al. 2022, Alg. 1.
    """

    order = 2

    def __init__(self, schedule: Schedule, *, spacing: Spacing = "karras") -> None:
        super().__init__(schedule, spacing=spacing)

    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, draw: NoiseFn, state: Any
    ) -> tuple[Tensor, Any]:
        return self.corrected(denoise, x, t, s, denoise(x, t)), None

    def corrected(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, first: Prediction) -> Tensor:
        """Step x from t, where `first` was predicted, to s."""
        x_s = self.euler_step(first, s)
        if s == 0 or self.ratio(t) > NO_SIGNAL:
            return x_s
        second = denoise(x_s, s)
        alpha_s, _ = self.schedule(s)
        return x_s + alpha_s * (self.ratio(s) - self.ratio(t)) * (second.eps - first.eps) / 2


class EDMSampler(Heun):
    """Heun's method with churn: adds noise before each step (Karras et al. 2022, Alg. 2).

    If sigma / alpha is in [s_min, s_max], the step starts from (1 + gamma) sigma / alpha with
    `gamma = min(s_churn / steps, sqrt(2) - 1)`, at most from the schedule's noisiest time.

    Args:
        schedule: noise schedule.
        s_churn: total amount of churn.
        s_min: smallest sigma / alpha with churn.
        s_max: largest sigma / alpha with churn, at least s_min.
        s_noise: factor of the standard deviation of the added noise.
        solver: `heun`, or `euler` without the correction.
        spacing: spacing of the times, see `Schedule.grid`.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        s_churn: NonNegativeFloat = 40.0,
        s_min: NonNegativeFloat = 0.05,
        s_max: PositiveFloat = 50.0,
        s_noise: PositiveFloat = 1.003,
        solver: Literal["heun", "euler"] = "heun",
        spacing: Spacing = "karras",
    ) -> None:
        if s_churn and s_min > s_max:
            raise UsageError(
                "sampler.s_min", s_min, f"exceeds s_max={s_max}, so no step adds noise", "lower it"
            )
        super().__init__(schedule, spacing=spacing)
        self.s_churn, self.s_min, self.s_max, self.s_noise = s_churn, s_min, s_max, s_noise
        self.solver = solver
        self.stochastic = s_churn > 0
        self.order = 2 if solver == "heun" else 1

    def start(self, times: Tensor) -> float:
        """Return gamma, which depends on the number of steps."""
        return min(self.s_churn / (len(times) - 1), math.sqrt(2) - 1)

    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, draw: NoiseFn, state: float
    ) -> tuple[Tensor, float]:
        ratio = self.ratio(t)
        if state > 0 and self.s_min <= ratio <= self.s_max:
            x, t = self._churn(x, t, ratio * (1 + state), draw)
        first = denoise(x, t)
        return self.euler_step(first, s) if self.solver == "euler" else self.corrected(
            denoise, x, t, s, first
        ), state

    def _churn(self, x: Tensor, t: Tensor, target: Tensor, draw: NoiseFn) -> tuple[Tensor, Tensor]:
        """Add noise to x until sigma / alpha is `target`, at most the noisiest time; return x and its time."""
        hat = torch.maximum(self.schedule.time_of(-2 * target.log()), t)
        a, v = self.schedule.transition(hat, t)
        return a * x + self.s_noise * v.clamp(min=0).sqrt() * draw(), hat


class DPM2(AncestralSampler):
    """Midpoint method with the midpoint in log(sigma / alpha): two network calls per step, one in the last step.

    With eta > 0, the ancestral variant. See `AncestralSampler` for the arguments. Source: DPM-Solver-2 of Karras et
    al. 2022 as in k-diffusion; Lu et al. 2022a, Alg. 1, up to the exponential weights.
    """

    order = 2

    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, draw: NoiseFn, state: Any
    ) -> tuple[Tensor, Any]:
        first = denoise(x, t)
        (alpha_t, sigma_t), (alpha_s, _) = self.schedule(t), self.schedule(s)
        kept, fresh = self.ancestral(t, s)
        noise = fresh * draw() if self.eta > 0 and s > 0 else 0.0
        if kept == 0 or self.ratio(t) > NO_SIGNAL:
            return alpha_s * first.x0 + kept * first.eps + noise, None
        start, end = sigma_t / alpha_t, kept / alpha_s
        middle = self.schedule.time_of(-(start.log() + end.log()))
        second = denoise(self.euler_step(first, middle), middle)
        return alpha_s / alpha_t * x + alpha_s * (end - start) * second.eps + noise, None
