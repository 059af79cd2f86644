"""The Inception score: how sure the classes of samples are, and how evenly spread."""

from itertools import pairwise
from typing import Any

import numpy as np
from pydantic import PositiveInt
from torch import Tensor

from diffusion_cli.errors import UsageError
from diffusion_cli.metrics.base import FeatureView, Metric, MetricState, MetricValue
from diffusion_cli.metrics.rows import Rows

SHUFFLE_SEED = 2020  # of torch-fidelity, whose numbers these are


def inception_score(logits: Rows | Tensor, splits: int) -> tuple[float, float]:
    """Mean and standard deviation over `splits` of exp E_x KL(p(y|x) || p(y)), each from 1 to K.

    `logits` [N, K] are shuffled with torch-fidelity's seed; split i is the rows i N // splits to (i + 1) N // splits,
    p(y) its mean, and the deviation that of the population (N, not N - 1). It is the number of torch-fidelity, a split
    at a time, so that float64 is needed for one split only.

    Raises UsageError if there are fewer rows than splits. Source: Salimans et al. 2016, Eq. 1.
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
    """Raise UsageError if there are fewer samples than parts to split them into."""
    if count < splits:
        raise UsageError("metric.is.splits", splits, f"is more than the {count} samples", "take fewer splits")


class InceptionScore(Metric):
    """The Inception score of samples, by the class scores of the feature network.

    It looks at no real image. The mean over `splits` parts is reported, as is usual, with their deviation.

    Raises UsageError for fewer samples than splits, and a network without class scores. Source: Salimans et al. 2016.
    """

    def __init__(self, *, splits: PositiveInt = 10) -> None:
        self.splits = splits

    def check(self, count: int, seen: FeatureView, force: bool) -> list[str]:
        if not seen.network.classes:
            raise UsageError(
                "metric",
                "is",
                f"needs class scores, and features={seen.network.name} gives none",
                "take features=inception",
            )
        require_splits(count, self.splits)
        return []

    def init_state(self, seen: FeatureView) -> MetricState:
        return InceptionScoreState(seen, self.splits)


class InceptionScoreState(MetricState):
    """The class scores of all samples: their shuffle depends on their number."""

    def __init__(self, seen: FeatureView, splits: int) -> None:
        self.network, self.splits, self.logits = seen.network, splits, seen.logits()

    def compute(self) -> list[MetricValue]:
        mean, deviation = inception_score(self.logits, self.splits)
        protocol: dict[str, Any] = {"splits": self.splits, "shuffle_seed": SHUFFLE_SEED}
        return [
            MetricValue(self.network.named("is"), mean, {"std": deviation}, protocol, higher_is_better=True)
        ]
