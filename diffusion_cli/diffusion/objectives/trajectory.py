"""Trajectory distillation: the loss of a student that predicts the end of its teacher's sampling paths."""

import math
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from diffusion_cli.conditions import Condition
from diffusion_cli.diffusion.denoiser import Denoiser, Prediction
from diffusion_cli.diffusion.objectives.base import require_uniform
from diffusion_cli.diffusion.objectives.few_step import FewStep, guided, pseudo_huber
from diffusion_cli.diffusion.schedules import Schedule
from diffusion_cli.diffusion.time_sampling import Times

GOLDEN = (math.sqrt(5) - 1) / 2
"""Its multiples are spread evenly over [0, 1), modulo 1, however many there are."""


class Paths(NamedTuple):
    """Sampling paths of a batch, N steps from noise to images."""

    times: Tensor
    """Times of the states that are not the last, float64 [N]."""
    states: Tensor
    """States, [N + 1, B, C, H, W]; the last are the images."""


class TrajectoryDistillation(FewStep):
    """Distance of the prediction of x_0 to the end of the teacher's path through x_t, `d(f(x_t, t), x*)`.

    The paths are those of the probability flow of the initial network, from the noise of the batch to images x* in
    `steps` steps of a solver. f is then the consistency function of the teacher, for `samplers.Consistency`. Unlike
    consistency distillation, the targets do not depend on the student.

    The images and the noise of a batch stay the same for `steps` optimizer steps, so that the paths are solved once;
    each optimizer step takes the state of another random time from the path of each image. The times between the first
    and the last one differ from batch to batch. Only the conditions of the data are used, not their images.

    d is the pseudo-Huber distance of `Consistency`.

    Args:
        steps: steps of the solver, network calls for each path.
        guidance_scale: classifier-free guidance of the teacher; 1: none.
        huber_c: constant of the pseudo-Huber distance, in units of the root of the number of values; 0: the norm.

    Source: Luhman and Luhman 2021, for the first state of a path; Song et al. 2023, Def. 1, for all of them.
    """

    has_teacher = True
    most_val_images = 1000  # each needs `steps` calls of the teacher

    def __init__(
        self,
        *,
        steps: Annotated[int, Field(ge=2)] = 10,
        guidance_scale: PositiveFloat = 1.0,
        huber_c: NonNegativeFloat = 0.03,
    ) -> None:
        self.steps, self.guidance_scale, self.huber_c = steps, guidance_scale, huber_c
        self.repeats = steps
        self._solved: tuple[int | None, dict[int, Paths]] = (None, {})
        """Index of a batch, and the paths of each of its parts."""

    def check(self, model: Denoiser, times: Times) -> None:
        super().check(model, times)
        require_uniform(times, "the state of a path is drawn uniformly", "use uniform or stratified")

    def __call__(self, model: Denoiser, x0: Tensor, y: Condition | None, t: Tensor, eps: Tensor) -> Tensor:
        times, states = self._paths(y, eps)
        state = ((1 - t) * self.steps).floor().long().clamp(0, self.steps - 1)
        of_images = torch.arange(len(eps), device=eps.device)
        x_t = states[state.to(eps.device), of_images]
        predicted = model(x_t, times.to(t.device)[state], y).x0
        return pseudo_huber(predicted, states[-1], self.huber_c)

    def _paths(self, y: Condition | None, eps: Tensor) -> Paths:
        """Return the paths from the noise of a batch; in training, they are solved once for its repetitions."""
        assert self.teacher is not None
        if self.step is None:
            return self._solve(self.teacher, y, eps, 0.0)
        number = self.step // self.repeats
        if self._solved[0] != number:
            self._solved = (number, {})
        paths = self._solved[1]
        if self.part not in paths:
            paths[self.part] = self._solve(self.teacher, y, eps, number * GOLDEN % 1 - 0.5)
        return paths[self.part]

    @torch.no_grad()
    def _solve(self, teacher: Denoiser, y: Condition | None, eps: Tensor, shift: float) -> Paths:
        assert self.solver is not None
        times = self.grid(teacher.schedule, shift)
        _, sigma = teacher.schedule(times[0])
        noise = sigma.to(eps) * eps

        def denoise(x: Tensor, t: Tensor) -> Prediction:
            return guided(teacher, x, t, y, self.guidance_scale)

        return Paths(times[:-1], torch.stack([noise, *self.solver(denoise, noise, times)]))

    def grid(self, schedule: Schedule, shift: float) -> Tensor:
        """Return the decreasing times of a path, float64 [steps + 1]: the last time with a signal, others, and 0.

        The others are the shares `((k + shift) / steps)^1.5` of the way from the smallest time to the first,
        k = steps - 1, ..., 1: denser at low noise, because the last step of a solver gives the mean of x_0.

        Args:
            schedule: noise schedule.
            shift: shift of the other times, -1/2 to 1/2.
        """
        last = schedule.with_signal(torch.ones(1, dtype=torch.float64))
        shares = (torch.arange(self.steps - 1, 0, -1, dtype=torch.float64) + shift) / self.steps
        others = schedule.t_min + (last - schedule.t_min) * shares**1.5
        return torch.cat([last, others, torch.zeros(1, dtype=torch.float64)])
