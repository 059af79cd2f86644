"""metric=classification_accuracy_score: classifiers trained on samples, tested on real images."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_cli.data import Dataset, ExternalImages, Images
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics import (
    ClassificationAccuracyScore,
    DatasetReference,
    FeatureBatch,
    GivenReference,
    GivenSamples,
    Reference,
    Report,
    evaluate,
    history_table,
)
from diffusion_cli.metrics.classification_accuracy import JoinedImages
from diffusion_cli.metrics.features.classifier_training import accuracy
from helpers.metrics import CPU, DATA, Projection, Through, measured, pixels

NAMES = ("dark", "middle", "bright")
NAME = "classification_accuracy_score"
QUICK = {"width": 4, "dim": 8, "steps": 60, "batch_size": 32, "learning_rate": 0.01, "num_seeds": 1}


def shaded(count: int, seed: int) -> MemoryImages:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    noise = torch.randint(60, (count, 1, 4, 4), generator=generator)
    return MemoryImages((60 * labels.view(-1, 1, 1, 1) + noise).to(torch.uint8), labels)


class ShadedClasses(Dataset):
    """Gray images with their shade as the class."""

    def __init__(self, train: int = 150, val: int = 60) -> None:
        super().__init__("")
        self.name, self.flip, self.shape, self.class_names = "shaded", False, (1, 4, 4), NAMES
        self.splits = {"train": shaded(train, 0), "val": shaded(val, 1)}

    def load(self, split) -> Images:
        return self.splits[split]


class Averages(Projection):
    """A linear map of images of 4 x 4 pixels."""

    def extract(self, images: Tensor) -> FeatureBatch:
        values = images.flatten(1).float() @ self.matrix[:16]
        return FeatureBatch(values[:, : self.dim], None)


def scored(
    images: Tensor,
    labels: Tensor | None,
    cache_dir: Path,
    dataset: Dataset | None = None,
    reference: Reference | None = None,
    **settings,
) -> Report:
    dataset = dataset or ShadedClasses()
    given = ExternalImages(MemoryImages(images, labels), dataset.class_names if labels is not None else None)
    return evaluate(
        {NAME: ClassificationAccuracyScore(**QUICK | settings)},
        Through(Averages(), dataset, cache_dir),
        GivenSamples(given, dataset.class_names, {}, "samples"),
        reference or DatasetReference(dataset),
        batch_size=33,
    ).report


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache in which the classifiers of real images stay."""
    return tmp_path_factory.mktemp("cache")


def test_copies_of_the_training_images_have_the_score_of_real_images_and_are_called_copies(cache) -> None:
    """Equal images, recipe and seeds give the same classifiers."""
    train = ShadedClasses().load("train")
    assert isinstance(train, MemoryImages)
    (result,) = scored(train.pixels, train.labels, cache).results
    details = result.details
    assert result.value == details["trained_on_real"] > 0.9
    assert details["memorized"] == 1
    assert details["copies"] == details["nearer"] == details["labelled"] == 150
    assert details["median_distance_ratio"] == 0


def test_new_images_of_the_classes_teach_them_and_wrong_labels_teach_others(cache) -> None:
    new = shaded(120, 7)
    assert new.labels is not None
    (right,) = scored(new.pixels, new.labels, cache).results
    assert right.value > 0.9
    assert right.details["copies"] == 0
    (wrong,) = scored(new.pixels, (new.labels + 1) % 3, cache).results
    assert wrong.value < 0.1
    assert wrong.details["trained_on_real"] == right.details["trained_on_real"]
    assert wrong.details["gain_of_samples"] < -0.1


def test_values_are_those_of_classifiers_of_each_set_with_equal_steps_and_seeds(cache) -> None:
    new, dataset = shaded(80, 7), ShadedClasses()
    assert new.labels is not None
    (result,) = scored(new.pixels, new.labels, cache, seed=5, steps=15, num_seeds=2).results
    train, val = dataset.splits["train"], dataset.splits["val"]
    assert train.labels is not None
    union = MemoryImages(torch.cat([train.pixels, new.pixels]), torch.cat([train.labels, new.labels]))
    recipe = replace(ClassificationAccuracyScore(**QUICK).recipe, classes=3, steps=15)
    found = {
        name: [
            accuracy(replace(recipe, seed=seed).train(images, CPU), val, CPU) or 0 for seed in (5, 6)
        ]
        for name, images in (("real", train), ("samples", new), ("both", union))
    }  # fmt: skip
    gains = [one - other for one, other in zip(found["both"], found["real"], strict=True)]
    expected = {
        "standard_deviation_over_seeds": stdev(found["samples"]),
        "trained_on_real": fmean(found["real"]),
        "trained_on_real_deviation": stdev(found["real"]),
        "trained_on_both": fmean(found["both"]),
        "trained_on_both_deviation": stdev(found["both"]),
        "gain_of_samples": fmean(gains),
        "gain_standard_deviation": stdev(gains),
    }
    assert result.value == fmean(found["samples"])
    assert {key: result.details[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    single = scored(new.pixels, new.labels, cache, seed=5, steps=15).results[0]
    assert single.value == found["samples"][0]
    assert not any("deviation" in key for key in single.details)


def test_joined_images_are_those_of_both_sets_in_any_order() -> None:
    first, second = shaded(5, 0), shaded(7, 1)
    joined, index = JoinedImages(first, second), torch.tensor([11, 0, 5, 4, 5])
    assert len(joined) == 12
    assert joined.labels is not None
    assert torch.equal(joined[index], torch.cat([first.pixels, second.pixels])[index])
    assert first.labels is not None
    assert second.labels is not None
    assert joined.labels.tolist() == [*first.labels.tolist(), *second.labels.tolist()]


def test_samples_without_a_class_teach_nothing_and_absent_classes_are_named(cache) -> None:
    new = shaded(80, 7)
    assert new.labels is not None
    labels = torch.where(new.labels == 2, -1, new.labels)
    report = scored(new.pixels, labels, cache)
    assert report.results[0].details["labelled"] == int((labels >= 0).sum())
    assert any(f"{NAME}: no samples of 'bright';" in note for note in report.notes)
    nothing = scored(new.pixels, torch.full((80,), -1), cache)
    assert nothing.results == []
    assert f"no {NAME}: no sample has a class" in nothing.notes


@pytest.mark.parametrize("change", ["steps", "num_seeds", "val labels", "train labels"])
def test_scores_that_are_measured_differently_are_not_compared(cache, change) -> None:
    new, dataset = shaded(40, 7), ShadedClasses()
    settings: dict[str, Any] = {"steps": 3, "num_seeds": 1}
    first = scored(new.pixels, new.labels, cache, dataset, **settings)
    same = scored(new.pixels.flip(0), new.labels, cache, dataset, **settings)
    table = history_table({"a": [first.to_dict()], "b": [same.to_dict()]}, force=False)
    assert table.count("\n") == 3
    if change in settings:
        settings[change] += 1
    else:
        split = dataset.splits[change.split()[0]]
        assert split.labels is not None
        split.labels[0] = (split.labels[0] + 1) % 3
    other = scored(new.pixels, new.labels, cache, dataset, **settings)
    with pytest.raises(UsageError, match="measured with different protocols"):
        history_table({"a": [first.to_dict()], "b": [other.to_dict()]}, force=False)


def test_a_score_without_labels_classes_or_real_images_is_refused_before_the_first_sample(tmp_path) -> None:
    new, dataset = shaded(40, 7), ShadedClasses()
    start = rf"^metric={NAME}: "
    with pytest.raises(UsageError, match=f"{start}held has no classes; use a dataset with classes"):
        measured({NAME: ClassificationAccuracyScore()}, Projection(), pixels(9, 0), DATA, tmp_path)
    with pytest.raises(UsageError, match=f"{start}the samples have no labels of shaded; use a class-"):
        scored(new.pixels, None, tmp_path)
    with pytest.raises(UsageError, match=f"{start}shaded/val has no images with a class to test classifiers"):
        scored(new.pixels, new.labels, tmp_path, ShadedClasses(val=0))
    with pytest.raises(UsageError, match=f"{start}trains on the training images of shaded, and shaded/val"):
        scored(new.pixels, new.labels, tmp_path, dataset, DatasetReference(dataset, split="val"))
    torch.save({}, tmp_path / "other.npz")
    other = GivenReference(dataset, path=str(tmp_path / "other.npz"))
    with pytest.raises(
        UsageError, match=f"{start}trains on the training images of shaded, and other.npz has"
    ):
        scored(new.pixels, new.labels, tmp_path, dataset, other)
