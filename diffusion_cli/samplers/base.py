"""What a sampler is, and the one loop that drives all of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from torch import Tensor

from diffusion_cli.denoiser import Denoise
from diffusion_cli.schedules import Schedule, Spacing


class Sampler(ABC):
    """A rule for one step from time t to the next smaller time s."""

    order: int  # of convergence to the exact solution, in the largest step
    spacing: Spacing

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    @property
    @abstractmethod
    def stochastic(self) -> bool:
        """Whether steps use their noise."""

    @abstractmethod
    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, noise: Tensor | None, state: Any
    ) -> tuple[Tensor, Any]:
        """Take x from t to s < t (0-d float64 times on the CPU) and return it with the solver's state.

        `noise` is standard normal of x's shape for a stochastic sampler, else None: the step is a function
        of it. `state` is None at the first step, and then what the step before returned.
        """

    def grid(self, steps: int) -> Tensor:
        """Return the falling times of a run of `steps` steps."""
        return self.schedule.grid(steps, self.spacing)


def integrate(
    sampler: Sampler, denoise: Denoise, x: Tensor, times: Tensor, draw: Callable[[], Tensor]
) -> Iterator[Tensor]:
    """Step x through the falling `times` and yield the state after each step.

    `draw()` returns the next standard normal noise of x's shape; it is called once before each step of a
    stochastic sampler, except a step onto the data at time 0, which takes none.
    """
    state = None
    for t, s in pairwise(times.double().cpu()):
        noise = draw() if sampler.stochastic and s > 0 else None
        x, state = sampler.step(denoise, x, t, s, noise, state)
        yield x
