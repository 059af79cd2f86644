"""Class accuracy and class entropy of samples by a classifier of the dataset."""

import math

import torch
from torch import Tensor

from diffusion_cli.metrics.base import FeatureView, Metric, MetricState, MetricValue, SampleBatch
from diffusion_cli.metrics.features.base import Features
from diffusion_cli.metrics.features.registry import FeatureExtractors


class ClassifierScore(Metric):
    """Class accuracy and class entropies of samples, by a classifier.

    Values:

    - `class_accuracy`: fraction of samples, 0 to 1, that are classified as their label.
    - `class_entropy`: mean entropy of p(y|x) in nats; 0 for a certain classifier. Its detail `entropy_of_classes` is
      the entropy of the mean of p(y|x), log K if all K classes are equally frequent.

    The classifier is the evaluation's feature network if it was trained on the dataset's classes, else
    `features=classifier`.
    """

    def network(self, networks: FeatureExtractors) -> Features:
        return networks.classifier()

    def check(self, count: int, seen: FeatureView, force: bool) -> list[str]:
        return []

    def init_state(self, seen: FeatureView) -> MetricState:
        return ClassifierScoreState(seen)


class ClassifierScoreState(MetricState):
    def __init__(self, seen: FeatureView) -> None:
        self.network = seen.network
        self.comparable = seen.samples.class_names == seen.class_names
        self.correct = self.labelled = self.count = 0
        self.entropy = 0.0
        self.mean = torch.zeros(seen.network.classes, dtype=torch.float64)

    def update(self, batch: SampleBatch) -> None:
        logits, labels = batch.seen.logits, batch.labels
        assert logits is not None
        if labels is not None and self.comparable:
            # A missing label, -1, equals no class.
            self.correct += int((logits.argmax(1) == labels.to(logits.device)).sum())
            self.labelled += int((labels >= 0).sum())
        log_p = logits.double().log_softmax(1)
        self.entropy += float(-(log_p.exp() * log_p).sum())
        self.mean += log_p.exp().sum(0).cpu()
        self.count += len(logits)

    def compute(self) -> list[MetricValue]:
        findings = []
        if self.labelled:
            accuracy = self.network.val_accuracy
            real = {} if accuracy is None else {"on_real_val": accuracy}
            details = {"labelled": self.labelled, **real}
            share = self.correct / self.labelled
            findings.append(MetricValue("class_accuracy", share, details, higher_is_better=True))
        else:
            why = "are not labelled" if self.comparable else "have other classes than the dataset"
            findings.append(
                MetricValue("class_accuracy", None, notes=(f"no class_accuracy: the samples {why}",))
            )
        mean = self.mean / self.count
        details = {"entropy_of_classes": _entropy(mean), "most": math.log(len(mean))}
        return [*findings, MetricValue("class_entropy", self.entropy / self.count, details)]


def _entropy(p: Tensor) -> float:
    return float(torch.special.entr(p).sum())
