"""Classification accuracy score: accuracy on real images of classifiers that are trained on samples."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from math import prod
from statistics import fmean, stdev

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from diffusion_cli.data import Images
from diffusion_cli.errors import UsageError, counted, examples
from diffusion_cli.metrics.base import FeatureView, Metric, MetricState, MetricValue, SampleBatch
from diffusion_cli.metrics.features.classifier import ClassifierFeatures
from diffusion_cli.metrics.features.classifier_training import Recipe, accuracy
from diffusion_cli.metrics.memorization import Memorization
from diffusion_cli.metrics.reference import DatasetReference
from diffusion_cli.metrics.rows import GrowingRows, Rows

NAME = "classification_accuracy_score"


class ClassificationAccuracyScore(Metric):
    """Accuracy on real validation images, 0 to 1, of a classifier trained on labelled samples.

    The classifier is that of `features=classifier`. The value is a mean over `num_seeds` classifiers. Details:

    - `standard_deviation_over_seeds`: spread of the value between these classifiers.
    - `trained_on_real`: mean accuracy after the same number of steps on the real training images.
    - `trained_on_both`: the same for real training images and samples together, in proportion to their numbers.
    - `gain_of_samples`: mean of `trained_on_both - trained_on_real` for equal seeds, and its `gain_standard_deviation`.
    - `memorized`, `copies`, `nearer` and `median_distance_ratio`: those of `Memorization`, with the features of the
      evaluation. Copies of training images reach the accuracy of real images, and add nothing to them.

    Source: Ravuri & Vinyals 2019.

    Args:
        num_seeds: number of classifiers for each set of training images, with seeds `seed`, `seed + 1`, ...
        dim: number of features of a classifier.
        width: channels of its first convolution.
        steps: its training steps, the same for each set of training images.
        batch_size: its training batch size.
        learning_rate: its peak learning rate of AdamW.
        shift: largest random shift of its training images, in pixels.
        seed: seed of the first classifier: its weights, batches and shifts.

    Raises:
        UsageError: the dataset has no classes or no labelled validation images, the samples have no labels of its
            classes, or the reference is not its training split.
    """

    keeps_rows = True

    def __init__(
        self,
        *,
        num_seeds: PositiveInt = 3,
        dim: PositiveInt = 64,
        width: PositiveInt = 32,
        steps: PositiveInt = 500,
        batch_size: PositiveInt = 128,
        learning_rate: PositiveFloat = 0.002,
        shift: NonNegativeInt = 1,
        seed: NonNegativeInt = 0,
    ) -> None:
        self.num_seeds = num_seeds
        self.recipe = Recipe(
            dim=dim, width=width, classes=0, steps=steps, batch_size=batch_size, learning_rate=learning_rate,
            shift=shift, seed=seed, flip=False,
        )  # fmt: skip
        self.memorization = Memorization()

    def check(self, count: int, seen: FeatureView, force: bool) -> list[str]:
        dataset, reference = seen.dataset, seen.real.reference
        if dataset.class_names is None:
            raise UsageError("metric", NAME, f"{dataset.name} has no classes", "use a dataset with classes")
        if not seen.samples.labelled or seen.samples.class_names != dataset.class_names:
            raise UsageError(
                "metric",
                NAME,
                f"the samples have no labels of {dataset.name}",
                "use a class-conditional model, or images with these labels",
            )
        if not isinstance(reference, DatasetReference) or reference.split != "train":
            raise UsageError(
                "metric",
                NAME,
                f"trains on the training images of {dataset.name}, and {reference.name} has none",
                "leave reference out",
            )
        if _labelled(reference.images) == 0:
            raise UsageError("metric", NAME, f"{reference.name} has no images with a class")
        if reference.other is None or _labelled(reference.other) == 0:
            raise UsageError(
                "metric",
                NAME,
                f"{reference.other_name} has no images with a class to test classifiers",
                "set dataset.val_fraction=0.1",
            )
        return self.memorization.check(count, seen, force)

    def init_state(self, seen: FeatureView) -> MetricState:
        names = seen.dataset.class_names
        assert names is not None
        recipe = replace(self.recipe, classes=len(names), flip=seen.dataset.flip)
        seeds = range(recipe.seed, recipe.seed + self.num_seeds)
        recipes = [replace(recipe, seed=seed) for seed in seeds]
        return ClassificationAccuracyState(seen, recipes, self.memorization.init_state(seen))


class ClassificationAccuracyState(MetricState):
    def __init__(self, seen: FeatureView, recipes: Sequence[Recipe], memorization: MetricState) -> None:
        self.seen, self.recipes, self.memorization = seen, recipes, memorization
        self.train, self.val = seen.real.images(), seen.real.images("other")
        self.pixels = GrowingRows(prod(seen.samples.shape), seen.cache_dir, torch.uint8)
        self.labels: list[Tensor] = []

    def update(self, batch: SampleBatch) -> None:
        assert batch.labels is not None
        self.pixels.append(batch.images.flatten(1))
        self.labels.append(batch.labels)

    def compute(self) -> list[MetricValue]:
        samples = StoredSamples(self.pixels, self.seen.samples.shape, torch.cat(self.labels))
        labelled = _labelled(samples)
        if not labelled:
            return [MetricValue(NAME, None, notes=(f"no {NAME}: no sample has a class",))]
        real = [self._of_real(recipe) for recipe in self.recipes]
        scores = [self._trained(recipe, samples, "samples") for recipe in self.recipes]
        union = JoinedImages(self.train, samples)
        both = [self._trained(recipe, union, "real images and samples") for recipe in self.recipes]
        gains = [one - other for one, other in zip(both, real, strict=True)]
        details = {
            **_spread("standard_deviation_over_seeds", scores),
            "trained_on_real": fmean(real), **_spread("trained_on_real_deviation", real),
            "trained_on_both": fmean(both), **_spread("trained_on_both_deviation", both),
            "gain_of_samples": fmean(gains), **_spread("gain_standard_deviation", gains),
            "labelled": labelled,
        }  # fmt: skip
        (copies,) = self.memorization.compute()
        assert copies.value is not None
        details |= {"memorized": copies.value}
        details |= {key: value for key, value in copies.details.items() if key != "images"}
        return [
            MetricValue(
                NAME,
                fmean(scores),
                details,
                {**copies.protocol, **self._protocol()},
                (*self._notes(samples), *copies.notes),
                copies.pictures,
                higher_is_better=True,
            )
        ]

    def _of_real(self, recipe: Recipe) -> float:
        """Return the accuracy of a classifier of the real training images, which is cached."""
        settings = {key: value for key, value in asdict(recipe).items() if key not in ("classes", "flip")}
        seen = self.seen
        features = ClassifierFeatures(seen.dataset, seen.cache_dir, seen.network.device, **settings).prepare()
        assert features.val_accuracy is not None
        return features.val_accuracy

    def _trained(self, recipe: Recipe, images: Images, named: str) -> float:
        """Train a classifier on images, and return its accuracy on the validation images."""
        device = self.seen.network.device
        network = recipe.train(images, device, task=f"classifier of {named}, seed {recipe.seed}")
        found = accuracy(network, self.val, device)
        assert found is not None
        return found

    def _protocol(self) -> dict[str, object]:
        """Return the settings of the classifiers, and digests of the real images with their labels."""
        classifier = asdict(self.recipes[0]) | {"num_seeds": len(self.recipes)}
        return {
            "classifier": classifier, "train_sha256": self.train.digest(), "val_sha256": self.val.digest()
        }  # fmt: skip

    def _notes(self, samples: Images) -> list[str]:
        names = self.seen.dataset.class_names
        assert names is not None
        assert samples.labels is not None
        reference = self.seen.real.reference
        notes = [
            f"{NAME}: {counted(len(self.recipes), 'classifier')} for each set of training images, tested on "
            f"{counted(len(self.val), 'image')} of {reference.other_name}"
        ]
        there = set(samples.labels.tolist())
        if absent := [name for label, name in enumerate(names) if label not in there]:
            notes.append(
                f"{NAME}: no samples of {examples(absent)}; a classifier of samples misses these classes"
            )
        return notes


class StoredSamples(Images):
    """Labelled samples in a temporary file.

    Args:
        rows: their pixels, uint8 [N, C H W].
        shape: shape of an image, [C, H, W].
        labels: their classes, int64 [N], -1 for a missing one.
    """

    def __init__(self, rows: Rows, shape: tuple[int, ...], labels: Tensor) -> None:
        self.rows, self.shape, self.labels = rows, shape, labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.rows[index.numpy()].view(-1, *self.shape)


class JoinedImages(Images):
    """Labelled images of one set, then those of another with the same shape and classes, read on the CPU."""

    def __init__(self, first: Images, second: Images) -> None:
        assert first.labels is not None
        assert second.labels is not None
        self.first, self.second, self.shape = first, second, first.shape
        self.labels = torch.cat([first.labels.cpu(), second.labels.cpu()])

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, index: Tensor) -> Tensor:
        start = len(self.first)
        found = torch.empty(len(index), *self.shape, dtype=torch.uint8)
        for images, mine, offset in ((self.first, index < start, 0), (self.second, index >= start, start)):
            found[mine] = images[(index[mine] - offset).to(images.device)].cpu()
        return found


def _labelled(images: Images) -> int:
    """Return the number of images with a class."""
    return 0 if images.labels is None else int((images.labels >= 0).sum())


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the standard deviation of values by name; nothing for a single value."""
    return {name: stdev(values)} if len(values) > 1 else {}
