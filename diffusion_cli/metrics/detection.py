"""How well scores detect anomalies: areas under curves, and the best Dice coefficient."""

from typing import NamedTuple

import torch
from torch import Tensor


class Detection(NamedTuple):
    """Agreement of scores with the truth over all thresholds; a score of at least the threshold is a detection."""

    auroc: float
    """Area under the receiver operating characteristic."""
    average_precision: float
    best_dice: float
    """Largest Dice coefficient of all thresholds."""
    best_threshold: float
    """Largest threshold with this coefficient."""
    anomalous: float
    """Share of the elements that are anomalous."""


def detection(scores: Tensor, truth: Tensor) -> Detection:
    """Compare scores with the truth at each threshold that is one of the scores; equal scores are one step.

    With true positives TP, false positives FP and P anomalous of N elements, at threshold k: the area is
    `P(s_a > s_n) + P(s_a = s_n) / 2` for an anomalous and a normal element, average precision is
    `sum_k (TP_k - TP_(k-1)) / P * TP_k / (TP_k + FP_k)`, and Dice is `2 TP_k / (TP_k + FP_k + P)`.

    Args:
        scores: finite scores, larger for anomalies, of any shape.
        truth: whether each element is anomalous, bool in the same shape; some, but not all.

    Raises:
        ValueError: all elements are anomalous, or none.

    Source: Fawcett 2006, Alg. 1 and 2 (ties).
    """
    scores, truth = scores.flatten(), truth.flatten()
    if truth.all() or not truth.any():
        raise ValueError("some elements must be anomalous, and some must not")
    ordered, order = scores.sort(descending=True)
    last = torch.ones_like(truth)
    last[:-1] = ordered[:-1] > ordered[1:]
    found = truth[order].cumsum(0)[last].double()
    detected = last.nonzero()[:, 0].double() + 1
    anomalous, count = found[-1], detected[-1]
    false = detected - found
    new, more_false = (torch.diff(counts, prepend=counts.new_zeros(1)) for counts in (found, false))
    area = (more_false * (found - new / 2)).sum() / (anomalous * (count - anomalous))
    dice = 2 * found / (detected + anomalous)
    best = int(dice.argmax())
    return Detection(
        float(area),
        float((new / anomalous * found / detected).sum()),
        float(dice[best]),
        float(ordered[last][best]),
        float(anomalous / count),
    )
