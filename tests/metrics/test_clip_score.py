"""CLIP score: samples are judged by the texts by which they were made."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion_cli.conditions.condition import TEXT
from diffusion_cli.data import ExternalImages, NoDataset
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics import (
    CLIPScore,
    FeatureBatch,
    FeatureExtractors,
    GivenReference,
    GivenSamples,
    evaluate,
)
from diffusion_cli.metrics.features.clip import CLIPFeatures
from diffusion_cli.metrics.repeats import parts
from helpers.metrics import CPU

ANGLES = {"east": 0.0, "north": math.pi / 2, "a photo of a north": 0.5}
"""Direction of the embedding of each text."""
TEXTS = ["east", "north", None, "north", "east", "", "east"]


class Directions(CLIPFeatures):
    """A network whose embedding of an image is east, turned by the angle of its grey value."""

    name, resize, note, device, dim, digest = "clip", "none", "", CPU, 2, "0" * 64

    def __init__(self) -> None:
        self.asked: list[str] = []

    def extract(self, images: Tensor) -> FeatureBatch:
        angle = images[:, 0, 0, 0].float() / 255
        return FeatureBatch(torch.stack([angle.cos(), angle.sin()], 1), None)

    def text(self, prompts: list[str]) -> Tensor:
        self.asked += prompts
        return torch.tensor([[math.cos(ANGLES[text]), math.sin(ANGLES[text])] for text in prompts])


class Score(CLIPScore):
    """CLIP score by such a network."""

    def __init__(self) -> None:
        super().__init__()
        self.directions = Directions()

    def network(self, networks: FeatureExtractors) -> Directions:
        return self.directions


GREY = torch.arange(7, dtype=torch.uint8) * 30
DATASET = NoDataset("grey", (1, 8, 8))


def samples(texts: Sequence[str | None] | None, labels: Tensor | None = None) -> GivenSamples:
    images = MemoryImages(GREY.view(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone(), labels)
    names = None if labels is None else ("east", "north")
    rows = None if texts is None else [{} if text is None else {TEXT: text} for text in texts]
    return GivenSamples(ExternalImages(images, names), names, {}, "samples", rows=rows)


def measured(given, folder: Path, metric: CLIPScore, batch_size: int = 3):
    networks = FeatureExtractors({}, DATASET, folder, CPU)
    reference = GivenReference(DATASET, path="none")
    (result,) = evaluate(
        {"clip_score": metric}, networks, given, reference, batch_size=batch_size
    ).report.results
    return result


def expected(texts: Sequence[str | None]) -> Tensor:
    return torch.tensor(
        [
            max(100 * math.cos(float(grey) / 255 - ANGLES[text]), 0)
            for grey, text in zip(GREY, texts, strict=True)
            if text
        ]
    ).double()


@pytest.mark.parametrize("batch_size", [1, 3, 7])
@pytest.mark.parametrize("labels", [None, torch.ones(7, dtype=torch.int64)])
def test_samples_are_judged_by_their_own_prompts(tmp_path, batch_size, labels):
    metric = Score()
    result = measured(samples(TEXTS, labels), tmp_path, metric, batch_size)
    scores = expected(TEXTS)
    assert result.value == pytest.approx(float(scores.mean()), rel=1e-5)
    assert result.details["images"] == 5
    assert result.details["standard_error"] == pytest.approx(float(scores.std() / 5**0.5), rel=1e-4)
    assert result.protocol["prompt"] == "that of each sample"
    assert {*metric.directions.asked} == {"east", "north"}


def test_samples_of_classes_are_judged_by_the_names_of_their_classes(tmp_path):
    ANGLES["a photo of a east"] = 0.2
    labels = torch.tensor([0, 1, 0, 1, -1, 0, 1])
    result = measured(samples(None, labels), tmp_path, Score())
    texts = [None if label < 0 else f"a photo of a {('east', 'north')[label]}" for label in labels.tolist()]
    assert result.value == pytest.approx(float(expected(texts).mean()), rel=1e-5)
    assert result.protocol["prompt"] == "a photo of a {}"


def test_repeats_have_the_prompts_of_their_samples(tmp_path):
    second = parts(samples(["north"] * 3 + ["east"] * 4), 2)[1]
    assert second.texts_of(range(3)) == ["east"] * 3
    metric = Score()
    measured(second, tmp_path, metric)
    assert {*metric.directions.asked} == {"east"}


def test_samples_with_neither_prompts_nor_classes_are_refused(tmp_path):
    with pytest.raises(
        UsageError, match=r"^metric=clip_score: the samples have neither prompts nor classes; use"
    ):
        measured(samples([None] * 7), tmp_path, Score())
