"""Couplings of images and noise in training."""

from typing import Literal

import torch
from torch import Tensor

from diffusion_cli.conditions import Condition
from diffusion_cli.conditions.condition import is_missing

Coupling = Literal["none", "ot"]
"""How training pairs images with noise: `none` independently, `ot` by optimal transport within a batch."""


def optimal_noise(x0: Tensor, eps: Tensor, condition: Condition | None) -> Tensor:
    """Return eps in the order with the least `sum |x_0 - eps|^2`, among images with equal conditions.

    Only images with equal conditions exchange their noise, so that it stays standard normal given a condition. The
    paths are straighter, which needs fewer steps of deterministic samplers; those that add noise assume
    independence.

    Args:
        x0: images [B, C, *sizes].
        eps: independent standard normal noise of the same shape.
        condition: their conditions, with missing values where they are dropped; None: unconditional.

    Source: Tong et al. 2024, Section 4.1; Pooladian et al. 2023, Section 3.2.
    """
    from scipy.optimize import linear_sum_assignment

    # The squares of the norms are the same in each order. NumPy has no bfloat16, which autocast would return.
    with torch.autocast(x0.device.type, enabled=False):
        cost = -(x0.flatten(1).float() @ eps.flatten(1).float().T).cpu()
    order = torch.arange(len(x0))
    groups = equal_conditions(condition, len(x0)).cpu()
    for group in groups.unique():
        (images,) = torch.nonzero(groups == group, as_tuple=True)
        _, chosen = linear_sum_assignment(cost[images][:, images].numpy())
        order[images] = images[torch.as_tensor(chosen)]
    return eps[order.to(eps.device)]


def equal_conditions(condition: Condition | None, count: int) -> Tensor:
    """Return a number for each of `count` images, int64 [B], equal where all their conditions are."""
    groups = torch.zeros(count, dtype=torch.int64)
    for value in () if condition is None else condition.values.values():
        missing = is_missing(value)
        parts = value.masked_fill(missing, 0), missing  # NaN would differ from itself
        rows = torch.cat([part.reshape(count, -1).double() for part in parts], 1)
        _, numbers = rows.unique(dim=0, return_inverse=True)
        _, groups = (groups * count + numbers.cpu()).unique(return_inverse=True)
    return groups
