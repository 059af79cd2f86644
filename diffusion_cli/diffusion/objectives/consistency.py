"""Consistency training and distillation: the loss of models that sample in one or a few network calls."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from diffusion_cli.conditions import Condition
from diffusion_cli.diffusion.denoiser import Denoiser, noised, per_image
from diffusion_cli.diffusion.objectives.base import Dropout
from diffusion_cli.diffusion.objectives.few_step import (
    FewStep,
    ddim_step,
    guided,
    pseudo_huber,
    same_random_numbers,
)
from diffusion_cli.diffusion.schedules import Schedule
from diffusion_cli.diffusion.time_sampling import Times
from diffusion_cli.errors import UsageError

MOST_DIVISIONS = 6
"""Largest decimal logarithm of the factor by which the gap shrinks; the difference of the times is then exact."""
Weighting = Literal["edm", "inverse_gap", "uniform"]


class Consistency(FewStep):
    """Distance of the predictions of x_0 at two times of one path, `w(t) d(f(x_t, t), f(x_r, r))` with r < t.

    A network f that gives the same x_0 on a whole path of the probability flow samples in one call, see
    `samplers.Consistency`. The target f(x_r, r) has no gradient; at r = 0 it is x_0. With `target=current` it has
    the same dropout masks; the averaged weights have none.

    In terms of tau = sigma / alpha, `tau_r = tau_t (1 - (1 + k sigmoid(-b tau_t)) / q^(stage + 1))`, at least 0: the
    gap shrinks by q at each of the stages. Validation uses the last one.

    d is the norm `sqrt(|f - target|^2 + huber_c^2) - huber_c` over an image, divided by the root of its number of
    values.

    Args:
        q: factor by which the gap shrinks at each stage.
        k: additional gap at low noise.
        b: decrease of the additional gap with tau.
        stages: number of stages.
        stage_steps: optimizer steps of each stage; the last one continues to the end.
        weighting: w(t): `edm` is 1 / tau^2 + 1 / sigma_data^2, `inverse_gap` is 1 / (tau_t - tau_r).
        huber_c: constant of the pseudo-Huber distance, in units of the root of the number of values; 0: the norm.
        sigma_data: standard deviation of the data.
        target: network of the target: `current` weights, or their `ema`.
        guidance_scale: None: x_r is made from x_0 and eps, as consistency training does. A number: x_r is a DDIM step
            of the initial network from x_t with this classifier-free guidance, as consistency distillation does.
        label_dropout: probability of dropping all conditions of an image.
        single_dropout: with several conditions, probability of dropping each one alone.

    Raises:
        UsageError: q^stages is above 10^6, where the two times are almost equal.

    Source: Song et al. 2023, Eq. 7-10 and Alg. 2-3; Song and Dhariwal 2024, Table 1, for `inverse_gap` and the
    distance; Geng et al. 2025, Eq. 10 and App. A, for the mapping and `edm`; Luo et al. 2023, Eq. 14, for guidance.
    """

    def __init__(
        self,
        *,
        q: Annotated[float, Field(gt=1)] = 4.0,
        k: NonNegativeFloat = 8.0,
        b: NonNegativeFloat = 1.0,
        stages: PositiveInt = 4,
        stage_steps: PositiveInt = 500,
        weighting: Weighting = "edm",
        huber_c: NonNegativeFloat = 0.0,
        sigma_data: PositiveFloat = 0.5,
        target: Literal["current", "ema"] = "current",
        guidance_scale: PositiveFloat | None = None,
        label_dropout: Dropout = 0.0,
        single_dropout: Dropout = 0.0,
    ) -> None:
        if stages * math.log10(q) > MOST_DIVISIONS + 1e-9:
            problem = f"the power q^stages with stages={stages} is above 1e{MOST_DIVISIONS}"
            raise UsageError("objective.q", q, problem, "lower objective.q or objective.stages")
        self.q, self.k, self.b, self.stages, self.stage_steps = q, k, b, stages, stage_steps
        self.weighting: Weighting = weighting
        self.huber_c, self.sigma_data = huber_c, sigma_data
        self.guidance_scale, self.has_teacher = guidance_scale, guidance_scale is not None
        self.uses_average = target == "ema"
        self.label_dropout, self.single_dropout = label_dropout, single_dropout

    def check(self, model: Denoiser, times: Times) -> None:
        super().check(model, times)
        t = torch.tensor(1e-8, dtype=torch.float64)
        c_skip, c_out, _, _ = model.parameterization(model.schedule, t)
        if abs(c_skip - 1) + abs(c_out) > 0.1:
            name = type(model.parameterization).__name__.lower()
            problem = "the prediction of a clean image is not that image, as it is for consistency models"
            raise UsageError("parameterization", name, problem, "use v, edm or flow")

    def __call__(self, model: Denoiser, x0: Tensor, y: Condition | None, t: Tensor, eps: Tensor) -> Tensor:
        schedule = model.schedule
        t = schedule.with_signal(t)
        r = self.earlier(schedule, t)
        x_t = noised(schedule, x0, t, eps)
        x_r = noised(schedule, x0, r, eps) if self.teacher is None else self._step(self.teacher, x_t, t, r, y)
        # Both calls draw the same dropout masks. The one with gradients is first: autocast reuses its casts.
        with same_random_numbers(x0.device):
            predicted = model(x_t, t, y).x0
        with torch.no_grad():
            by = model if self.average is None else self.average
            target = by(x_r, r.clamp(min=schedule.t_min), y).x0
            target = torch.where(per_image(r, x0) > 0, target, x_r)
        distance = pseudo_huber(predicted, target, self.huber_c)
        return self.weight(schedule, t, r).to(distance) * distance

    def earlier(self, schedule: Schedule, t: Tensor) -> Tensor:
        """Return the times r of the targets for times t [B], float64; 0 in place of times below t_min."""
        tau = torch.exp(-schedule.log_snr(t) / 2)
        tau_r = tau * (
            1 - (1 + self.k * torch.sigmoid(-self.b * tau)) / self.q ** (self.stage(self.step) + 1)
        )
        r = schedule.time_of(-2 * tau_r.clamp(min=1e-12).log())
        return torch.where((tau_r > 0) & (r >= schedule.t_min), torch.minimum(r, t), 0.0)

    def weight(self, schedule: Schedule, t: Tensor, r: Tensor) -> Tensor:
        """Return w(t), float64 [B]."""
        if self.weighting == "uniform":
            return torch.ones_like(t)
        tau = torch.exp(-schedule.log_snr(t) / 2)
        if self.weighting == "edm":
            return tau**-2 + self.sigma_data**-2
        return 1 / (tau - torch.where(r > 0, torch.exp(-schedule.log_snr(r) / 2), 0.0))

    @torch.no_grad()
    def _step(self, teacher: Denoiser, x_t: Tensor, t: Tensor, r: Tensor, y: Condition | None) -> Tensor:
        """Return x_r by a DDIM step of the guided teacher."""
        assert self.guidance_scale is not None
        return ddim_step(guided(teacher, x_t, t, y, self.guidance_scale), teacher.schedule, r)
