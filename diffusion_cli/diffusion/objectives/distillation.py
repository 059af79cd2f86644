"""Progressive distillation: the loss of a student that takes one DDIM step for two of its teacher."""

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from diffusion_cli.conditions import Condition
from diffusion_cli.diffusion.denoiser import Denoiser, noised, per_image
from diffusion_cli.diffusion.objectives.base import Dropout, require_uniform
from diffusion_cli.diffusion.objectives.few_step import FewStep, ddim_step, guided
from diffusion_cli.diffusion.schedules import Schedule
from diffusion_cli.diffusion.time_sampling import Times
from diffusion_cli.errors import UsageError


class ProgressiveDistillation(FewStep):
    """Error of x_0, `max(SNR, 1) |f(x_t, t) - x*|^2`, mean over pixels, of a student with half of its teacher's steps.

    x* is the x_0 with which one DDIM step from t to s gives the result of two of the teacher, from t to (t + s) / 2
    to s. At each stage the student has half of the steps of the stage before, and becomes the next teacher; the first
    teacher is the initial network. Times are those of the grid of `sampler=ddim` with `spacing=trailing`.

    Unlike Alg. 2, one learning-rate schedule spans all stages. The next teacher has the weights themselves, not their
    average.

    Args:
        steps: steps of the student at the first stage, a power of two; the last stage has one step.
        stage_steps: optimizer steps of each stage; the last one continues to the end.
        guidance_scale: classifier-free guidance of the first teacher; 1: none.
        label_dropout: probability of dropping all conditions of an image.
        single_dropout: with several conditions, probability of dropping each one alone.

    Raises:
        UsageError: `steps` is no power of two.

    Source: Salimans and Ho 2022, Alg. 2 and Eq. 8-9; Meng et al. 2023 for guidance.
    """

    has_teacher = True

    def __init__(
        self,
        *,
        steps: PositiveInt = 8,
        stage_steps: PositiveInt = 500,
        guidance_scale: PositiveFloat = 1.0,
        label_dropout: Dropout = 0.0,
        single_dropout: Dropout = 0.0,
    ) -> None:
        if steps & (steps - 1):
            raise UsageError("objective.steps", steps, "is no power of two", "use for example 8")
        self.steps, self.stages, self.guidance_scale = steps, steps.bit_length(), guidance_scale
        self.stage_steps = stage_steps
        self.label_dropout, self.single_dropout = label_dropout, single_dropout

    def check(self, model: Denoiser, times: Times) -> None:
        super().check(model, times)
        require_uniform(times, "the step of the grid is drawn uniformly", "use uniform or stratified")
        try:
            model.schedule.grid(2 * self.steps, "trailing")
        except UsageError:
            problem = f"the first teacher has {2 * self.steps} steps, more than the schedule has timesteps"
            raise UsageError("objective.steps", self.steps, problem, "use fewer steps") from None

    def renews_teacher(self, step: int) -> bool:
        return step == 0 or self.stage(step) != self.stage(step - 1)

    def __call__(self, model: Denoiser, x0: Tensor, y: Condition | None, t: Tensor, eps: Tensor) -> Tensor:
        assert self.teacher is not None
        schedule, stage = model.schedule, self.stage(self.step)
        t, middle, s = self.two_steps(schedule, t, self.steps >> stage)
        x_t = noised(schedule, x0, t, eps)
        with torch.no_grad():
            scale = self.guidance_scale if stage == 0 else 1.0
            x = x_t
            for start, end in ((t, middle), (middle, s)):
                x = ddim_step(guided(self.teacher, x, start, y, scale), schedule, end)
            (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
            ratio = sigma_s / sigma_t
            target = (x - per_image(ratio, x) * x_t) / per_image(alpha_s - ratio * alpha_t, x)
        error = (model(x_t, t, y).x0 - target).square().flatten(1).mean(1)
        return torch.exp(schedule.log_snr(t)).clamp(min=1).to(error) * error

    def two_steps(self, schedule: Schedule, t: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the start of the step of a grid that contains t, its middle and its end, float64 [B] each."""
        grid = schedule.grid(2 * steps, "trailing").to(t.device)
        step = ((1 - t) * steps).floor().long().clamp(0, steps - 1)
        return grid[2 * step], grid[2 * step + 1], grid[2 * step + 2]
