"""A learning-rate schedule."""

from diffusion_cli.training import LRSchedule
from pydantic import NonNegativeInt, PositiveInt


class Example(LRSchedule):
    """Exponential decay after a linear warm-up.

    A schedule returns the learning rate of each step as a share of `optimizer.lr`.

    Args:
        warm_up_steps: steps of linear warm-up
        half_life: steps in which the learning rate falls to a half
    """

    def __init__(self, *, warm_up_steps: NonNegativeInt = 100, half_life: PositiveInt = 1000) -> None:
        super().__init__(warm_up_steps=warm_up_steps)
        self.half_life = half_life

    def decay(self, step: int) -> float:
        """Return the factor of step 0, 1, ... besides the warm-up, at most 1."""
        return 0.5 ** (step / self.half_life)
