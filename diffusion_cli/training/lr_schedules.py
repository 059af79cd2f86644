"""Learning-rate schedules: a linear warm-up times a decay."""

import math
from abc import ABC, abstractmethod
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt


class LRSchedule(ABC):
    """Learning rate of each step: `lr min(1, (n + 1) / warm_up_steps) decay(n)` at step n, from 0.

    Args:
        warm_up_steps: steps of linear warm-up.
    """

    def __init__(self, *, warm_up_steps: NonNegativeInt = 0) -> None:
        self.warm_up_steps = warm_up_steps

    def factor(self, step: int) -> float:
        """Return the learning rate at a step over lr."""
        return min(1.0, (step + 1) / max(1, self.warm_up_steps)) * self.decay(step)

    @abstractmethod
    def decay(self, step: int) -> float:
        """Return the factor after warm-up, at most 1."""


class ConstantRate(LRSchedule):
    """A constant rate after warm-up."""

    def decay(self, step: int) -> float:
        return 1.0


class Decaying(LRSchedule):
    """A rate that falls to zero at step `decay_steps`, and stays there; without `decay_steps` it is constant.

    Args:
        warm_up_steps: steps of linear warm-up.
        decay_steps: step of the rate 0; None: no decay.
    """

    def __init__(self, *, warm_up_steps: NonNegativeInt = 0, decay_steps: PositiveInt | None = None) -> None:
        super().__init__(warm_up_steps=warm_up_steps)
        self.decay_steps = decay_steps

    def decay(self, step: int) -> float:
        return 1.0 if self.decay_steps is None else self.falling(min(1.0, step / self.decay_steps))

    @abstractmethod
    def falling(self, progress: float) -> float:
        """Return the factor at a share of `decay_steps`, in [0, 1]: 1 at 0, and 0 at 1."""


class CosineDecay(Decaying):
    """Cosine decay `(1 + cos(pi n / decay_steps)) / 2` (Loshchilov and Hutter 2017, Eq. 5, without restarts)."""

    def falling(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


class LinearDecay(Decaying):
    """Linear decay `1 - n / decay_steps`."""

    def falling(self, progress: float) -> float:
        return 1 - progress


class WarmUpStableDecay(Decaying):
    """A constant rate, then `1 - sqrt(share of the decay)` (Hu et al. 2024; form of Hägele et al. 2024, Eq. 1).

    Args:
        warm_up_steps: steps of linear warm-up.
        decay_steps: step of the rate 0; None: no decay.
        decay_fraction: last share of `decay_steps` in which the rate falls, in (0, 1].
    """

    def __init__(
        self,
        *,
        warm_up_steps: NonNegativeInt = 0,
        decay_steps: PositiveInt | None = None,
        decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2,
    ) -> None:
        super().__init__(warm_up_steps=warm_up_steps, decay_steps=decay_steps)
        self.decay_fraction = decay_fraction

    def falling(self, progress: float) -> float:
        start = 1 - self.decay_fraction
        return 1.0 if progress <= start else 1 - math.sqrt((progress - start) / self.decay_fraction)


class InverseSqrtDecay(LRSchedule):
    """Decay `sqrt(m / max(n + 1, m))` from step m (Vaswani et al. 2017, Eq. 3; Karras et al. 2024, Eq. 67).

    Args:
        warm_up_steps: steps of linear warm-up.
        constant_steps: m, the steps before the decay; None: `warm_up_steps`.
    """

    def __init__(
        self, *, warm_up_steps: NonNegativeInt = 0, constant_steps: PositiveInt | None = None
    ) -> None:
        super().__init__(warm_up_steps=warm_up_steps)
        self.constant_steps = constant_steps

    def decay(self, step: int) -> float:
        start = max(1, self.constant_steps or self.warm_up_steps)
        return math.sqrt(start / max(step + 1, start))
