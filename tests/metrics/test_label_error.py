"""metric=label_error: attributes of samples, judged by a network of the dataset."""

import pytest
import torch
from torch import Tensor

from diffusion_cli.conditions import AttributeDescription, Condition
from diffusion_cli.data import Dataset, ExternalImages, Images
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.data.sources import ColumnSource
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics import (
    DatasetReference,
    FeatureExtractors,
    GivenSamples,
    LabelError,
    Report,
    evaluate,
)
from diffusion_cli.metrics.features.classifier_training import Recipe
from helpers.metrics import CPU, DATA

NAMES = ("dark", "middle", "bright")
QUICK = LabelError(width=4, dim=8, steps=60, batch_size=64, learning_rate=0.01)


class Shaded(Dataset):
    """Gray images with their shade as the class."""

    def __init__(self) -> None:
        super().__init__("")
        self.name, self.flip, self.shape, self.class_names = "shaded", False, (1, 8, 8), NAMES

    def load(self, split) -> Images:
        return shaded(*((300, 0) if split == "train" else (90, 1)))


def shaded(count: int, seed: int) -> MemoryImages:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    noise = torch.randint(40, (count, 1, 8, 8), generator=generator)
    return MemoryImages((80 * labels.view(-1, 1, 1, 1) + noise).to(torch.uint8), labels)


class Labelled(GivenSamples):
    """Images with the conditions that they were made with."""

    def __init__(
        self, images: Tensor, condition: Condition, attributes: tuple[AttributeDescription, ...]
    ) -> None:
        super().__init__(ExternalImages(MemoryImages(images, None), None), None, {}, "samples")
        self.condition, self.attributes = condition, attributes

    def condition_of(self, numbers):
        return self.condition.rows(torch.tensor(list(numbers)))


def judged(samples: GivenSamples, dataset: Dataset, cache_dir) -> Report:
    networks = FeatureExtractors({}, dataset, cache_dir, CPU)
    reference = DatasetReference(dataset, split="train", stats=None)
    return evaluate({"label_error": QUICK}, networks, samples, reference, batch_size=32).report


def of_classes(images: MemoryImages, labels: Tensor, names: tuple[str, ...] | None = NAMES) -> GivenSamples:
    given = ExternalImages(MemoryImages(images.pixels, labels), names)
    return GivenSamples(given, names, {}, "samples")


def test_real_images_have_the_accuracy_of_the_judge_and_wrong_labels_the_rest(tmp_path):
    real = shaded(90, 1)
    assert real.labels is not None
    (right,) = judged(of_classes(real, real.labels), Shaded(), tmp_path).results
    assert right.name == "label_accuracy_label"
    assert right.value == right.details["on_real_val"] > 0.95
    assert right.details["images"] == 90
    wrong = real.labels.clone()
    wrong[:30] = (wrong[:30] + 1) % 3
    (result,) = judged(of_classes(real, wrong), Shaded(), tmp_path).results
    assert result.value == pytest.approx(right.value * 2 / 3, abs=0.05)
    assert result.details["on_real_val"] == right.value
    assert result.protocol["features"]["digest"] == right.protocol["features"]["digest"]


def test_the_judge_is_trained_once_for_each_data_and_settings(tmp_path, monkeypatch):
    asked = []
    train = Recipe.train

    def counted(recipe: Recipe, *arguments):
        asked.append(recipe)
        return train(recipe, *arguments)

    monkeypatch.setattr(Recipe, "train", counted)
    real, dataset = shaded(90, 1), Shaded()
    assert real.labels is not None
    for _ in range(2):
        judged(of_classes(real, real.labels), dataset, tmp_path)
    assert len(asked) == 1

    changed = shaded(300, 0)
    assert changed.labels is not None
    changed.labels[0] = (changed.labels[0] + 1) % 3
    monkeypatch.setattr(dataset, "load", lambda split: changed if split == "train" else real)
    judged(of_classes(real, real.labels), dataset, tmp_path)
    assert len(asked) == 2
    assert len(list(tmp_path.glob("judge-shaded-*.pt"))) == 2


def test_labels_of_other_classes_and_no_labels_are_refused(tmp_path):
    real = shaded(9, 1)
    assert real.labels is not None
    unlabelled = GivenSamples(ExternalImages(MemoryImages(real.pixels, None), None), None, {}, "samples")
    for samples in (of_classes(real, real.labels, ("a", "b", "c")), unlabelled):
        with pytest.raises(
            UsageError, match=r"^metric=label_error: the samples have no labels of shaded; use a model with"
        ):
            judged(samples, Shaded(), tmp_path)
    with pytest.raises(
        UsageError, match=r"^metric=label_error: held has neither attributes nor classes; choose columns"
    ):
        judged(unlabelled, DATA, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_samples_without_a_value_are_left_out(tmp_path):
    """Also samples whose attribute has the name of that of the dataset, but other values."""
    real = shaded(90, 1)
    assert real.labels is not None
    label = AttributeDescription(name="label", kind="category", values=NAMES)
    labels = real.labels.clone()
    labels[:60] = -1
    (result,) = judged(Labelled(real.pixels, Condition.of(labels), (label,)), Shaded(), tmp_path).results
    assert result.details["images"] == 30
    assert result.value > 0.9

    nothing = judged(Labelled(real.pixels, Condition.of(torch.full((90,), -1)), (label,)), Shaded(), tmp_path)
    assert nothing.results == []
    assert "no label_accuracy_label: no sample has a value of label" in nothing.notes

    other = label.model_copy(update={"values": NAMES[::-1]})
    with pytest.raises(UsageError, match="the samples have no labels of shaded"):
        judged(Labelled(real.pixels, Condition.of(labels), (other,)), Shaded(), tmp_path)


def test_numbers_are_judged_in_their_unit_and_yes_no_beside_them(tmp_path):
    """Wanted values that are off by a constant give this constant as the mean difference."""
    dataset = Measured()
    val = dataset.load("val")
    wanted = val.condition(torch.arange(90), val.pixels)
    assert wanted is not None
    right = {
        r.name: r for r in judged(Labelled(val.pixels, wanted, dataset.attributes), dataset, tmp_path).results
    }
    assert list(right) == ["label_error_weight", "label_accuracy_striped"]
    weight, striped = right.values()
    assert weight.value == pytest.approx(weight.details["on_real_val"], rel=1e-6)
    assert weight.details["ratio"] == pytest.approx(1, rel=1e-6)
    assert weight.value < 40  # of a range of 1000 kg
    assert striped.value == striped.details["on_real_val"] > 0.95
    assert weight.details["images"] == 90 - 9
    assert striped.details["images"] == 90

    off = wanted.replaced({"weight": wanted.values["weight"] - 300})
    found = {
        r.name: r for r in judged(Labelled(val.pixels, off, dataset.attributes), dataset, tmp_path).results
    }
    difference = found["label_error_weight"].details["mean_difference"]
    assert difference == pytest.approx(300 + weight.details["mean_difference"], abs=0.01)
    assert found["label_error_weight"].value == pytest.approx(300, abs=45)
    assert found["label_accuracy_striped"].value == striped.value


WEIGHT = AttributeDescription(name="weight", kind="number", low=0, high=1000)
STRIPED = AttributeDescription(name="striped", kind="yes_no", values=("no", "yes"))


class Measured(Dataset):
    """Images with a shade that is a weight in kg, which some lack, and with or without stripes."""

    def __init__(self) -> None:
        super().__init__("")
        self.name, self.flip, self.shape, self.class_names = "measured", False, (1, 8, 8), None
        self.attributes = WEIGHT, STRIPED

    def load(self, split) -> MemoryImages:
        count, seed = (300, 0) if split == "train" else (90, 1)
        generator = torch.Generator().manual_seed(seed)
        weight, striped = torch.rand(count, generator=generator), torch.arange(count) % 2
        stripes = 50 * (torch.arange(8) % 2) * striped.view(-1, 1, 1, 1)
        pixels = (200 * weight.view(-1, 1, 1, 1) + stripes).expand(-1, 1, 8, 8)
        numbers = 1000 * weight
        numbers[::10] = torch.nan
        sources = {"weight": ColumnSource(numbers), "striped": ColumnSource(striped)}
        return MemoryImages(pixels.to(torch.uint8), None).with_conditions(sources)
