"""Base class of objectives of models that sample in few network calls."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from diffusion_cli.conditions import Condition
from diffusion_cli.diffusion.denoiser import Denoise, Denoiser, Prediction, per_image
from diffusion_cli.diffusion.objectives.base import Objective
from diffusion_cli.diffusion.parameterizations import V
from diffusion_cli.diffusion.schedules import Schedule
from diffusion_cli.diffusion.time_sampling import Times
from diffusion_cli.errors import UsageError

Solver = Callable[[Denoise, Tensor, Tensor], Iterable[Tensor]]
"""Yields the state after each step from noise [B, C, H, W] through decreasing times [N + 1], for a denoiser."""
MOST_GAIN = 20.0
"""Largest derivative of a predicted x_0 by the output of the network, at the noisiest time."""


class FewStep(Objective[Denoiser]):
    """Base class of objectives with predictions as targets: of the model itself, or of a frozen teacher."""

    compares_to_zero = False
    has_teacher = False
    """Whether the targets need a frozen teacher."""
    uses_average = False
    """Whether the targets are predictions of the averaged weights."""
    teacher: Denoiser | None = None
    """Frozen denoiser, set by training."""
    average: Denoiser | None = None
    """Denoiser with averaged weights, set by training."""
    solver: Solver | None = None
    """Solver of the teacher's paths, set by training."""
    stages: int = 1
    """Number of stages."""
    stage_steps: int = 1
    """Optimizer steps of each stage; the last one continues to the end."""

    def stage(self, step: int | None) -> int:
        """Return the stage of an optimizer step, from 0; None: the last one."""
        last = self.stages - 1
        return last if step is None else min(step // self.stage_steps, last)

    def renews_teacher(self, step: int) -> bool:
        """Return whether the teacher takes the weights of the network before an optimizer step."""
        return self.has_teacher and step == 0

    def check(self, model: Denoiser, times: Times) -> None:
        if model.learns_variance:
            raise UsageError(
                "model.learn_variance",
                True,
                "this objective does not train the variance head",
                "distil a run without one" if self.has_teacher else "set model.learn_variance=false",
            )
        t = model.schedule.with_signal(torch.ones((), dtype=torch.float64))
        alpha, sigma = model.schedule(t)
        preserving = math.isclose(alpha**2 + sigma**2, 1, abs_tol=1e-6)
        if isinstance(model.parameterization, V) and not preserving:
            problem = f"has another scale where alpha^2 + sigma^2 is {alpha**2 + sigma**2:.3g} instead of 1"
            start = "distil a run with" if self.has_teacher else "use"
            raise UsageError("parameterization", "v", problem, f"{start} parameterization=edm")
        _, c_out, _, _ = model.parameterization(model.schedule, t)
        if abs(c_out) > MOST_GAIN:
            name = type(model.parameterization).__name__.lower()
            other = f"parameterization={'v' if preserving else 'edm'}"
            raise UsageError(
                "parameterization",
                name,
                f"multiplies an error of the network by {abs(c_out):.3g} in the image of the first step",
                f"distil a run with {other}"
                if self.has_teacher
                else f"use {other}, also with the weights of init.run",
            )


def guided(teacher: Denoiser, x_t: Tensor, t: Tensor, y: Condition | None, scale: float) -> Prediction:
    """Return the prediction of a teacher with classifier-free guidance, at a time for each image.

    Source: Ho and Salimans 2022, Eq. 6, where the scale is smaller by 1.
    """
    strong = teacher(x_t, t, y)
    if scale == 1 or y is None:
        return strong
    weak = teacher(x_t, t, y.dropped())
    x0, eps = (weak + scale * (strong - weak) for weak, strong in zip(weak[:2], strong[:2], strict=True))
    return strong._replace(x0=x0, eps=eps)


def ddim_step(prediction: Prediction, schedule: Schedule, s: Tensor) -> Tensor:
    """Return `alpha_s x_0 + sigma_s eps` at times s [B]."""
    alpha, sigma = (per_image(level, prediction.x0) for level in schedule(s))
    return alpha * prediction.x0 + sigma * prediction.eps


def pseudo_huber(predicted: Tensor, target: Tensor, c: float) -> Tensor:
    """Return `sqrt(|predicted - target|^2 + c^2) - c` of images, [B], with the mean of squares in place of their sum.

    Source: Song and Dhariwal 2024, Eq. 8.
    """
    square = (predicted - target).square().flatten(1).mean(1)
    # The derivative of the root at 0 is infinite.
    return (square + max(c**2, 1e-12)).sqrt() - c


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Restore the state of the random generators afterwards, so that the next draws repeat those of the block."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type):
        yield
