"""Restoration methods, which modify the state between the steps of any sampler."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from diffusion_cli.conditions.operators import LinearOperator, Measurement
from diffusion_cli.diffusion.denoiser import Prediction, noised
from diffusion_cli.editing.base import EditProcess, RestorationMethod
from diffusion_cli.samplers import reporting


class Replacement(RestorationMethod):
    """Replacement: after each step, replaces the known part by the measurement noised to the same time.

    `x_s + A^+ A (x'_s - x_s)` with `x'_s = alpha_s A^+ y + sigma_s z` (Song et al. 2021b, App. I; Choi et al. 2021).
    """

    num_resamples = 1
    jump_length = 1

    def restore(self, process: EditProcess, operator: LinearOperator, y: Tensor) -> Iterator[Tensor]:
        sampler, times, draw = process.sampler, process.times, process.draw
        denoise = reporting(process.denoise(), times, process.advance)
        known, schedule = operator.pseudo_inverse(y), sampler.schedule

        def replaced(x: Tensor, s: Tensor) -> Tensor:
            if s == 0:  # the edit projects the final image
                return x
            return operator.project(x, operator(noised(schedule, known, s, draw())))

        x = replaced(process.start(), times[0])
        state = sampler.start(times)
        for first in range(0, len(times) - 1, self.jump_length):
            run = times[first : first + self.jump_length + 1]
            for again in range(self.num_resamples):
                if again:
                    x = operator.project(x, y) if run[-1] == 0 else x
                    a, v = schedule.transition(run[0], run[-1])
                    x = a * x + v.sqrt() * draw()
                    state = sampler.start(times)  # multistep history of another path is invalid
                for t, s in pairwise(run):
                    x, state = sampler.step(denoise, x, t, s, draw, state)
                    x = replaced(x, s)
            yield x


class RePaint(Replacement):
    """RePaint: replacement that repeats stretches of steps after noising the image again (Lugmayr et al. 2022, Alg. 1).

    This harmonizes the unknown part with the known one. Multistep solvers restart after each jump, and have order 1
    for `jump_length` 1.

    Args:
        num_resamples: number of times each stretch is run.
        jump_length: steps per stretch.
    """

    def __init__(self, *, num_resamples: PositiveInt = 5, jump_length: PositiveInt = 1) -> None:
        self.num_resamples, self.jump_length = num_resamples, jump_length


class DPS(RestorationMethod):
    """Diffusion posterior sampling: after each step, descends the gradient of the predicted image's residual.

    `x_s - scale * grad_{x_t} |y - A x_0(x_t)|`, with the norm per image. Steps with several network calls use the first
    prediction. Needs gradients through the network.

    Args:
        scale: step size.

    Source: Chung et al. 2023, Alg. 1 and code.
    """

    differentiates = True
    takes = Measurement

    def __init__(self, *, scale: PositiveFloat = 1.0) -> None:
        self.scale = scale

    def restore(self, process: EditProcess, operator: Measurement, y: Tensor) -> Iterator[Tensor]:
        sampler, x = process.sampler, process.start()
        denoise = reporting(process.denoise(), process.times, process.advance)
        state = sampler.start(process.times)
        for t, s in pairwise(process.times):
            gradients: list[Tensor] = []

            def asked(x: Tensor, t: Tensor, gradients: list[Tensor] = gradients) -> Prediction:
                if gradients:
                    return denoise(x, t)
                with torch.enable_grad():
                    x = x.detach().requires_grad_()
                    prediction = denoise(x, t)
                    residual = torch.linalg.vector_norm((y - operator(prediction.x0)).flatten(1), dim=1)
                    gradients.append(torch.autograd.grad(residual.sum(), x)[0])
                return prediction.detach()

            x, state = sampler.step(asked, x, t, s, process.draw, state)
            x = x - self.scale * gradients[0]
            yield x
