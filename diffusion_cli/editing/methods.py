"""Restoration methods, which modify the state between the steps of any sampler."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from diffusion_cli.conditions.operators import LinearMeasurement, LinearOperator, Measurement
from diffusion_cli.diffusion.denoiser import Prediction, add_score, noised, with_x0
from diffusion_cli.editing.base import EditProcess, RestorationMethod
from diffusion_cli.errors import UsageError
from diffusion_cli.samplers import Sampler, integrate, reporting


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


class PiGDM(RestorationMethod):
    """Pseudoinverse guidance: adds the gradient of the log-likelihood of the measurement to the score.

    With x_0 ~ N(x_0(x_t), r^2 1), this gradient is `J^T A^T (r^2 A A^T + sigma_y^2 1)^-1 (y - A x_0(x_t))`, where J is
    the Jacobian of the prediction and `r^2 = d^2 s^2 / (d^2 + s^2)` with s = sigma_t / alpha_t. It is exact for images
    N(m, d^2 1). Needs gradients through the network.

    Args:
        data_std: standard deviation d of the images; the source has 1.
        scale: factor of the gradient; 1 is the formula.

    Source: Song et al. 2023, Eq. 7 and Alg. 1.
    """

    differentiates = True
    takes = LinearMeasurement

    def __init__(self, *, data_std: PositiveFloat = 1.0, scale: PositiveFloat = 1.0) -> None:
        self.data_std, self.scale = data_std, scale

    def restore(self, process: EditProcess, operator: LinearMeasurement, y: Tensor) -> Iterator[Tensor]:
        sampler, times = process.sampler, process.times
        denoise = reporting(process.denoise(), times, process.advance)

        def guided(x: Tensor, t: Tensor) -> Prediction:
            alpha, sigma = sampler.schedule(t)
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                prediction = denoise(x, t)
            variance = float(self.data_std**2 * sigma**2 / (alpha**2 * self.data_std**2 + sigma**2))
            residual = y - operator(prediction.x0.detach())
            v = operator.regularized_inverse(residual, variance, process.sigma_y**2)
            (gradient,) = torch.autograd.grad(prediction.x0, x, v)
            return add_score(prediction.detach(), self.scale * gradient, sampler.schedule, t)

        yield from integrate(sampler, guided, process.start(), times, process.draw)


class DiffPIR(RestorationMethod):
    """DiffPIR: moves each predicted image towards the measurement, and renews a part of the noise after each step.

    The predicted image x_0 becomes the minimum of `|y - A x|^2 / sigma_y^2 + prior_weight / s^2 |x - x_0|^2` with
    s = sigma_t / alpha_t. Then the sampler steps, and the noise eps of the state becomes
    `sqrt(1 - zeta) eps + sqrt(zeta) z`. Multistep solvers restart with the new noise, and have order 1 for zeta > 0.

    Args:
        prior_weight: weight lambda of the predicted image.
        zeta: renewed part of the noise, 0 to 1; above 0 for deterministic samplers alone, since others add noise too.

    Source: Zhu et al. 2023, Alg. 1.
    """

    takes = LinearMeasurement

    def check(self, sampler: Sampler) -> None:
        if self.zeta and sampler.stochastic:
            problem = "the sampler adds noise already"
            raise UsageError("restoration.zeta", self.zeta, problem, "set 0, or use a sampler such as ddim")

    def __init__(
        self, *, prior_weight: PositiveFloat = 1.0, zeta: Annotated[float, Field(ge=0, le=1)] = 0.3
    ) -> None:
        self.prior_weight, self.zeta = prior_weight, zeta

    def restore(self, process: EditProcess, operator: LinearMeasurement, y: Tensor) -> Iterator[Tensor]:
        sampler, draw, x = process.sampler, process.draw, process.start()
        denoise = reporting(process.denoise(), process.times, process.advance)
        state = sampler.start(process.times)
        noise: list[Tensor] = []

        def nearer(x: Tensor, t: Tensor) -> Prediction:
            prediction = denoise(x, t)
            alpha, sigma = sampler.schedule(t)
            level = self.prior_weight * float(alpha / sigma) ** 2 * process.sigma_y**2
            residual = y - operator(prediction.x0)
            x0 = prediction.x0 + operator.regularized_inverse(residual, 1.0, level)
            prediction = with_x0(prediction, x0, sampler.schedule, x, t)
            noise.append(prediction.eps)
            return prediction

        for t, s in pairwise(process.times):
            noise.clear()
            x, state = sampler.step(nearer, x, t, s, draw, state)
            if self.zeta and s > 0:
                _, sigma = sampler.schedule(s)
                renewed = ((1 - self.zeta) ** 0.5 - 1) * noise[0] + self.zeta**0.5 * draw()
                x = x + sigma * renewed
                state = sampler.start(process.times)  # multistep history of other noise is invalid
            yield x
