"""A small network that predicts the attributes of images, trained on the dataset."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from diffusion_cli.conditions import AttributeDescription, Conditions
from diffusion_cli.conditions.condition import LABEL
from diffusion_cli.data import FEW_VAL, Batch, Dataset, Images
from diffusion_cli.data.sources import ColumnSource
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics.features.base import FeatureBatch, Features, check_pixels
from diffusion_cli.metrics.features.classifier import FORMAT, cache_file, cached
from diffusion_cli.metrics.features.classifier_training import Recipe
from diffusion_cli.metrics.features.heads import AttributeErrors, AttributeHeads
from diffusion_cli.metrics.features.shipped import Weights
from diffusion_cli.system.tensors import digest


class AttributeJudge(Features):
    """Predictions of attributes, or classes, by the network of `features=classifier`, trained on the training images.

    `prepare` trains the network once and caches it by images, values and settings.

    Args:
        dataset: dataset with attributes or classes, and 8-bit images.
        cache_dir: folder of the cache.
        device: device of the network.
        recipe: settings of network and training; its number of outputs and its flips are replaced.

    Raises:
        UsageError: the dataset has neither attributes nor classes, or is not 8-bit.
    """

    name = "judge"
    resize = "none"

    def __init__(self, dataset: Dataset, cache_dir: Path, device: torch.device, recipe: Recipe) -> None:
        attributes = attributes_of(dataset)
        if not attributes:
            raise UsageError(
                "metric",
                "label_error",
                f"{dataset.name} has neither attributes nor classes",
                "choose columns with dataset.label=, or leave this metric out",
            )
        train, val = dataset.load("train"), dataset.load("val")
        check_pixels(train[torch.zeros(1, dtype=torch.int64, device=train.device)])
        self.heads = AttributeHeads.fitted(attributes, values_of(attributes, train))
        self.dim, self.classes = recipe.dim, self.heads.outputs
        self.cache_dir, self.device, self.dataset_name = cache_dir, device, dataset.name
        self.recipe = replace(recipe, classes=self.heads.outputs, flip=dataset.flip)
        self.network = self.recipe.initial(dataset.shape[0]).to(device).eval()
        self.real = AttributeErrors(self.heads)
        """Errors on the real validation images, once prepared."""
        self._splits: tuple[Images, Images] | None = train, val

    def prepare(self) -> Self:
        if self._splits is None:
            return self
        train, val = self._splits
        values = values_of(self.heads.attributes, train)
        facts = {
            "format": FORMAT, **asdict(self.recipe), "data": [train.pixel_digest(), digest(values)],
            "attributes": [attribute.model_dump() for attribute in self.heads.attributes],
        }  # fmt: skip
        path = cache_file(self.cache_dir, f"judge-{self.dataset_name}", facts)
        weights = cached(path, self.network, lambda: self._trained(train, values), "the judge of attributes")
        self.network.load_state_dict(weights.state)
        self.digest = digest(self.network.state_dict())
        self._measure(val)
        few = f"; its own errors are those of only {len(val)} images" if len(val) < FEW_VAL else ""
        self.note = (
            f"attributes are judged by a network of {self.dataset_name}/train (weights {self.digest[:12]}{few}); "
            "compare only values with the same weights"
        )
        self._splits = None
        return self

    def extract(self, images: Tensor) -> FeatureBatch:
        return FeatureBatch(*self.network(images.float() / 127.5 - 1))

    def _trained(self, train: Images, values: Mapping[str, Tensor]) -> Weights:
        values = {name: value.to(self.device) for name, value in values.items()}

        def loss(outputs: Tensor, batch: Batch) -> Tensor:
            return self.heads.loss(outputs, _rows(values, batch.index))

        network = self.recipe.train(train, self.device, loss, "judge of attributes")
        return Weights(network.state_dict(), None)

    def _measure(self, val: Images) -> None:
        """Add the errors on the real validation images."""
        values = values_of(self.heads.attributes, val)
        for rows in torch.arange(len(val)).split(self.chunk):
            outputs = self(val[rows.to(val.device)]).logits
            assert outputs is not None
            self.real.update(outputs, _rows(values, rows))


def attributes_of(dataset: Dataset) -> tuple[AttributeDescription, ...]:
    """Return the attributes of a dataset; without any, its classes as the attribute `label`, or nothing."""
    if dataset.attributes or dataset.class_names is None:
        return dataset.attributes
    return Conditions.of_classes(dataset.class_names).attributes


def values_of(attributes: tuple[AttributeDescription, ...], images: Images) -> dict[str, Tensor]:
    """Return the values of attributes of all images of a split, [N] by name, on the CPU."""
    found = {}
    for attribute in attributes:
        source = images.conditions.get(attribute.name)
        if isinstance(source, ColumnSource):
            found[attribute.name] = source.numbers.cpu()
        else:
            assert attribute.name == LABEL
            assert images.labels is not None
            found[attribute.name] = images.labels.cpu()
    return found


def _rows(values: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: value[rows.to(value.device)] for name, value in values.items()}
