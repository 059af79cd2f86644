"""CLIP score: agreement of samples with a prompt of their class name."""

import math

from torch import Tensor

from diffusion_cli.errors import UsageError
from diffusion_cli.metrics.base import FeatureView, Metric, MetricState, MetricValue, SampleBatch
from diffusion_cli.metrics.features.base import Features
from diffusion_cli.metrics.features.clip import CLIPFeatures
from diffusion_cli.metrics.features.registry import FeatureExtractors
from diffusion_cli.system import pretrained


class CLIPScore(Metric):
    """Mean CLIP score of samples, max(100 cos, 0), with the standard error of the mean.

    cos is the cosine similarity of the CLIP embeddings of a sample and of its prompt.

    Args:
        weights: CLIP weights, a folder or a name on the Hugging Face hub.
        prompt: prompt with `{}` for the class name, in which underscores become spaces.

    Raises:
        UsageError: the samples have no classes, or the prompt has no `{}`.

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
        if seen.samples.class_names is None or not seen.samples.labelled:
            raise UsageError(
                "metric",
                "clip_score",
                "the samples have no classes",
                "use a class-conditional model, or sort the images into class folders",
            )
        if count < 2:
            raise UsageError("num_samples", count, "metric=clip_score needs at least 2", "raise num_samples")
        return []

    def init_state(self, seen: FeatureView) -> MetricState:
        assert isinstance(seen.network, CLIPFeatures)
        assert seen.samples.class_names is not None
        names = [name.replace("_", " ") for name in seen.samples.class_names]
        return CLIPScoreState(
            seen.network.text([self.prompt.replace("{}", name) for name in names]), self.prompt
        )


class CLIPScoreState(MetricState):
    def __init__(self, prompts: Tensor, prompt: str) -> None:
        self.prompts, self.prompt = prompts, prompt
        self.count = 0
        self.total = self.squares = 0.0

    def update(self, batch: SampleBatch) -> None:
        if batch.labels is None:
            return
        labels = batch.labels.to(self.prompts.device)
        there = labels >= 0
        wanted = self.prompts[labels[there]]
        scores = (100 * (batch.seen.features[there] * wanted).sum(1)).clamp(min=0).double()
        self.count += len(scores)
        self.total += float(scores.sum())
        self.squares += float(scores.square().sum())

    def compute(self) -> list[MetricValue]:
        if self.count < 2:
            return [MetricValue("clip_score", None, notes=("clip_score: fewer than 2 samples have labels",))]
        mean = self.total / self.count
        variance = max(self.squares / self.count - mean**2, 0.0) * self.count / (self.count - 1)
        details = {"standard_error": math.sqrt(variance / self.count), "images": self.count}
        return [MetricValue("clip_score", mean, details, {"prompt": self.prompt}, higher_is_better=True)]
