"""Optimizers with learning-rate schedules and gradient clipping."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn, optim
from torch.optim.lr_scheduler import LambdaLR

from diffusion_cli.errors import UsageError


class OptimizerConfig(ABC):
    """Settings of an optimizer, its learning-rate schedule and gradient clipping."""

    lr: float
    warm_up_steps: int
    decay_steps: int | None
    clip_norm: float | None

    @abstractmethod
    def optimizer(self, parameters: Iterable[nn.Parameter], fused: bool) -> optim.Optimizer:
        """Return the optimizer of the given parameters; `fused` runs its step in one kernel."""

    def factor(self, step: int) -> float:
        """Return the learning rate at a step over lr: linear warm-up times an optional cosine decay to 0."""
        warm_up = min(1.0, (step + 1) / max(1, self.warm_up_steps))
        if self.decay_steps is None:
            return warm_up
        progress = min(1.0, step / self.decay_steps)
        return warm_up * 0.5 * (1 + math.cos(math.pi * progress))

    def scheduler(self, optimizer: optim.Optimizer) -> LambdaLR:
        """Return the scheduler, which updates the learning rate each step."""
        return LambdaLR(optimizer, self.factor)


class Adam(OptimizerConfig):
    """Adam (Kingma and Ba 2015)."""

    def __init__(
        self,
        *,
        lr: PositiveFloat,
        betas: Sequence[float] = (0.9, 0.999),
        eps: PositiveFloat = 1e-08,
        warm_up_steps: NonNegativeInt = 0,
        decay_steps: PositiveInt | None = None,
        clip_norm: PositiveFloat | None = 1.0,
    ) -> None:
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise UsageError("optimizer.betas", betas, "must be two numbers in [0, 1)", "use [0.9,0.999]")
        self.lr, self.betas, self.eps = lr, (betas[0], betas[1]), eps
        self.warm_up_steps, self.decay_steps, self.clip_norm = warm_up_steps, decay_steps, clip_norm

    def optimizer(self, parameters: Iterable[nn.Parameter], fused: bool) -> optim.Optimizer:
        return optim.Adam(parameters, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    def __init__(
        self,
        *,
        lr: PositiveFloat,
        betas: Sequence[float] = (0.9, 0.99),
        eps: PositiveFloat = 1e-08,
        weight_decay: NonNegativeFloat = 0.0,
        warm_up_steps: NonNegativeInt = 0,
        decay_steps: PositiveInt | None = None,
        clip_norm: PositiveFloat | None = 1.0,
    ) -> None:
        super().__init__(
            lr=lr,
            betas=betas,
            eps=eps,
            warm_up_steps=warm_up_steps,
            decay_steps=decay_steps,
            clip_norm=clip_norm,
        )
        self.weight_decay = weight_decay

    def optimizer(self, parameters: Iterable[nn.Parameter], fused: bool) -> optim.Optimizer:
        return optim.AdamW(
            parameters,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=fused,
        )
