"""CLIP score: agreement of samples with their prompts, or with a prompt of their class name."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusion_cli.errors import UsageError
from diffusion_cli.metrics.base import FeatureView, Metric, MetricState, MetricValue, SampleBatch
from diffusion_cli.metrics.features.base import Features
from diffusion_cli.metrics.features.clip import CLIPFeatures
from diffusion_cli.metrics.features.registry import FeatureExtractors
from diffusion_cli.system import pretrained

OWN = "that of each sample"
"""Setting of the protocol for prompts by which the samples were made; the sampling settings identify these."""


class CLIPScore(Metric):
    """Mean CLIP score of samples, max(100 cos, 0), with the standard error of the mean.

    cos is the cosine similarity of the CLIP embeddings of a sample and its prompt. CLIP reads at most 77 tokens of a
    prompt. Samples without prompts have one of their class name.

    Args:
        weights: CLIP weights, a folder or a name on the Hugging Face hub.
        prompt: prompt of samples without prompts of their own, with `{}` for the class name, in which underscores
            become spaces.

    Raises:
        UsageError: the samples have neither prompts nor classes, or the prompt has no `{}`.

    Source: Hessel et al. 2021, with the factor of torchmetrics.
    """

    def __init__(
        self, *, weights: str = "openai/clip-vit-large-patch14-336", prompt: str = "a photo of a {}"
    ) -> None:
        if "{}" not in prompt:
            raise UsageError(
                "metric.clip_score.prompt",
                prompt,
                "has no placeholder for the class name",
                "add {}",
            )
        self.weights, self.prompt = weights, prompt

    def network(self, networks: FeatureExtractors) -> Features:
        return networks.of_metric("clip_score", "clip", self.weights)

    def downloads(self) -> list[pretrained.HubFile]:
        return pretrained.files(
            self.weights, (*pretrained.NETWORK, *pretrained.TOKENIZER), pretrained.OPTIONAL
        )

    def check(self, count: int, seen: FeatureView, force: bool) -> list[str]:
        samples = seen.samples
        if not samples.has_texts and (samples.class_names is None or not samples.labelled):
            raise UsageError(
                "metric",
                "clip_score",
                "the samples have neither prompts nor classes",
                "use a model of texts or classes, or sort the images into class folders",
            )
        if count < 2:
            raise UsageError("num_samples", count, "metric=clip_score needs at least 2", "raise num_samples")
        return []

    def init_state(self, seen: FeatureView) -> MetricState:
        assert isinstance(seen.network, CLIPFeatures)
        if seen.samples.has_texts:
            return CLIPScoreState(partial(prompts_of_samples, seen.network.text), {"prompt": OWN})
        assert seen.samples.class_names is not None
        names = [name.replace("_", " ") for name in seen.samples.class_names]
        prompts = seen.network.text([self.prompt.replace("{}", name) for name in names])
        return CLIPScoreState(partial(prompts_of_classes, prompts), {"prompt": self.prompt})


class CLIPScoreState(MetricState):
    """State of a CLIP score.

    Args:
        wanted: function from a batch to which of its samples have a prompt, bool [B], and the embeddings of these
            prompts, [N, D].
        protocol: what identifies the prompts.
    """

    def __init__(
        self, wanted: Callable[[SampleBatch], tuple[Tensor, Tensor]], protocol: dict[str, Any]
    ) -> None:
        self.wanted, self.protocol = wanted, protocol
        self.count = 0
        self.total = self.squares = 0.0

    def update(self, batch: SampleBatch) -> None:
        there, prompts = self.wanted(batch)
        features = batch.seen.features[there.to(batch.seen.features.device)]
        scores = (100 * (features * prompts.to(features.device)).sum(1)).clamp(min=0).double()
        self.count += len(scores)
        self.total += float(scores.sum())
        self.squares += float(scores.square().sum())

    def compute(self) -> list[MetricValue]:
        if self.count < 2:
            return [MetricValue("clip_score", None, notes=("clip_score: fewer than 2 samples have prompts",))]
        mean = self.total / self.count
        variance = max(self.squares / self.count - mean**2, 0.0) * self.count / (self.count - 1)
        details = {"standard_error": math.sqrt(variance / self.count), "images": self.count}
        return [MetricValue("clip_score", mean, details, self.protocol, higher_is_better=True)]


def prompts_of_samples(encode: Callable[[list[str]], Tensor], batch: SampleBatch) -> tuple[Tensor, Tensor]:
    """Return which samples have a text of their own, bool [B], and the embeddings of these texts, [N, D]."""
    texts = [None] * len(batch.images) if batch.texts is None else batch.texts
    given = [text for text in texts if text]
    there = torch.tensor([bool(text) for text in texts])
    if not given:
        return there, torch.zeros(0, batch.seen.features.shape[1])
    unique = [*dict.fromkeys(given)]
    embeddings = encode(unique)
    return there, embeddings[[unique.index(text) for text in given]]


def prompts_of_classes(prompts: Tensor, batch: SampleBatch) -> tuple[Tensor, Tensor]:
    """Return which samples have a class, bool [B], and the embeddings [N, D] of its prompt, of `prompts` [K, D]."""
    if batch.labels is None:
        return torch.zeros(len(batch.images), dtype=torch.bool), prompts[:0]
    labels = batch.labels.to(prompts.device)
    return labels >= 0, prompts[labels[labels >= 0]]
