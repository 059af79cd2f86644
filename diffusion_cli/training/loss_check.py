"""Warnings about a loss that rises, or that is no better than the loss of predicting zero."""

import torch
from torch import Tensor, nn

from diffusion_cli.config.recipe import usual_rate
from diffusion_cli.config.values import Node

PATIENCE = 200
"""Steps before which no loss counts as stuck."""
USELESS = 0.97
"""A loss is stuck from this share of the loss of predicting zero."""
RISE = 4.0
"""A loss diverges from this multiple of its lowest value."""


class ZeroNetwork(nn.Module):
    """A denoising network with an output of zero everywhere."""

    def __init__(self, learn_variance: bool) -> None:
        super().__init__()
        self.learn_variance = learn_variance

    def forward(self, x: Tensor, c_noise: Tensor, y: Tensor | None = None) -> Tensor:
        """Return zeros in the shape of x [B, C, ...], in twice the channels with `learn_variance`."""
        return torch.cat([torch.zeros_like(x)] * (1 + self.learn_variance), dim=1)


class LossCheck:
    """Finds a training loss that diverges or is stuck, once each.

    Args:
        config: the configuration of the training.
    """

    def __init__(self, config: Node) -> None:
        self.config = config
        self._lowest: tuple[float, int] | None = None
        self._stuck = self._rose = False

    def warning(self, loss: float, step: int, zero: float) -> str | None:
        """Return a line about the mean loss of the latest steps, or None.

        Args:
            loss: the mean since the step before.
            step: the optimizer step.
            zero: the loss of predicting zero.
        """
        lowest = self._lowest
        if lowest is None or loss < lowest[0]:
            self._lowest = lowest = (loss, step)
        stuck = step >= PATIENCE and loss >= USELESS * zero
        rose = loss > RISE * lowest[0] and loss > zero / 4
        if stuck and not self._stuck:
            self._stuck = self._rose = True
            return f"loss {loss:.2f} at step {step}: no better than predicting zero ({zero:.2f}); {self._remedy()}"
        if rose and not self._rose:
            self._rose = True
            low, earlier = lowest
            return f"loss {loss:.2f} at step {step}: diverging, from {low:.2f} at step {earlier}; {self._remedy()}"
        return None

    def _remedy(self) -> str:
        recipe = usual_rate(self.config)
        rate = self.config["optimizer"].get("lr", recipe)
        better = rate / 10 if recipe / 10 < rate < 1.5 * recipe else recipe
        return f"stop (Ctrl-C) and train again with optimizer.lr={better:.2g} name=NEW"
