"""An optimizer of torch."""

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveFloat
from torch import nn


class Example(torch.optim.Optimizer):
    """The sign of an average of the gradient (Signum; Bernstein et al. 2018, Alg. 2).

    An optimizer updates the weights in `step`. Its `state` is stored in checkpoints, so that a run continues exactly.

    Args:
        params: weights; the program passes them.
        lr: peak learning rate
        momentum: decay rate of the average of the gradient
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: PositiveFloat = 3e-4,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the weights; `closure` computes the gradients and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                average = state.setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                weight.sub_(average.sign(), alpha=group["lr"])
        return loss
