"""Inception score."""

from itertools import pairwise
from typing import Any

import numpy as np
from pydantic import PositiveInt
from torch import Tensor

from diffusion_cli.errors import UsageError
from diffusion_cli.metrics.base import FeatureView, Metric, MetricState, MetricValue
from diffusion_cli.metrics.rows import Rows

SHUFFLE_SEED = 2020  # as in torch-fidelity


def inception_score(logits: Rows | Tensor, splits: int) -> tuple[float, float]:
    """Return mean and standard deviation of `exp E_x KL(p(y|x) || p(y))`, each in [1, K], over `splits` parts.

    Identical to torch-fidelity: the rows are shuffled with its seed; part i is rows i N // splits to
    (i + 1) N // splits; p(y) is the mean over a part; the standard deviation is that of the population (N).

    Args:
        logits: class scores [N, K].
        splits: number of parts, at most N.

    Raises:
        UsageError: there are fewer rows than parts.

    Source: Salimans et al. 2016, Eq. 1.
    """
    count = len(logits)
    require_splits(count, splits)
    order = np.random.RandomState(SHUFFLE_SEED).permutation(count)
    bounds = [i * count // splits for i in range(splits + 1)]
    scores = []
    for first, last in pairwise(bounds):
        log_p = logits[order[first:last]].double().log_softmax(1)
        log_marginal = log_p.logsumexp(0) - np.log(last - first)
        scores.append(float((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def require_splits(count: int, splits: int) -> None:
    """Raise UsageError if there are fewer samples than splits."""
    if count < splits:
        raise UsageError("metric.is.splits", splits, f"exceeds the {count} samples", "use fewer splits")


class InceptionScore(Metric):
    """Inception score of samples, by the class scores of the feature network; needs no real images.

    Reports the mean over parts of the samples, and the standard deviation.

    Args:
        splits: number of parts.

    Raises:
        UsageError: there are fewer samples than splits, or the network has no class scores.

    Source: Salimans et al. 2016.
    """

    def __init__(self, *, splits: PositiveInt = 10) -> None:
        self.splits = splits

    def check(self, count: int, seen: FeatureView, force: bool) -> list[str]:
        if not seen.network.classes:
            raise UsageError(
                "metric",
                "is",
                f"needs class scores; features={seen.network.name} has none",
                "use features=inception",
            )
        require_splits(count, self.splits)
        return []

    def init_state(self, seen: FeatureView) -> MetricState:
        return InceptionScoreState(seen, self.splits)


class InceptionScoreState(MetricState):
    """Class scores of all samples, kept because their shuffle depends on their number."""

    def __init__(self, seen: FeatureView, splits: int) -> None:
        self.network, self.splits, self.logits = seen.network, splits, seen.logits()

    def compute(self) -> list[MetricValue]:
        mean, deviation = inception_score(self.logits, self.splits)
        protocol: dict[str, Any] = {"splits": self.splits, "shuffle_seed": SHUFFLE_SEED}
        return [
            MetricValue(self.network.named("is"), mean, {"std": deviation}, protocol, higher_is_better=True)
        ]
