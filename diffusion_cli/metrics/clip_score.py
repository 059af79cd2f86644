"""Whether samples show what their class is called, to a network that sees and reads."""

import math

from torch import Tensor

from diffusion_cli.errors import UsageError
from diffusion_cli.metrics.base import FeatureView, Metric, MetricState, MetricValue, SampleBatch
from diffusion_cli.metrics.features.base import Features
from diffusion_cli.metrics.features.clip import CLIPFeatures
from diffusion_cli.metrics.features.registry import FeatureExtractors


class CLIPScore(Metric):
    """The mean over samples of max(100 cos, 0), cos that of the embeddings of a sample and of its class's prompt.

    `prompt` has `{}` where the name of the class goes, underscores as spaces. With the standard error of the mean.
    Raises UsageError for samples without classes. Source: Hessel et al. 2021, with the factor of torchmetrics.
    """

    def __init__(
        self, *, weights: str = "openai/clip-vit-large-patch14-336", prompt: str = "a photo of a {}"
    ) -> None:
        if "{}" not in prompt:
            raise UsageError(
                "metric.clip_score.prompt", prompt, "has no {} for the name of the class", "put it in"
            )
        self.weights, self.prompt = weights, prompt

    def network(self, networks: FeatureExtractors) -> Features:
        return networks.option("clip", weights=self.weights)

    def check(self, count: int, seen: FeatureView, force: bool) -> list[str]:
        if seen.samples.class_names is None or not seen.samples.labelled:
            raise UsageError(
                "metric",
                "clip_score",
                "the samples have no classes to ask for",
                "take a class-conditional model, or put the images into class folders",
            )
        if count < 2:
            raise UsageError("num_samples", count, "metric=clip_score needs 2 samples", "raise num_samples")
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
        wanted = self.prompts[batch.labels.to(self.prompts.device)]
        scores = (100 * (batch.seen.features * wanted).sum(1)).clamp(min=0).double()
        self.count += len(scores)
        self.total += float(scores.sum())
        self.squares += float(scores.square().sum())

    def compute(self) -> list[MetricValue]:
        if self.count < 2:
            return [
                MetricValue(
                    "clip_score", None, notes=("clip_score: fewer than two of the samples have labels",)
                )
            ]
        mean = self.total / self.count
        variance = max(self.squares / self.count - mean**2, 0.0) * self.count / (self.count - 1)
        details = {"standard_error": math.sqrt(variance / self.count), "images": self.count}
        return [MetricValue("clip_score", mean, details, {"prompt": self.prompt}, higher_is_better=True)]
