"""Features of a small classifier trained on the dataset, for images unlike those of ImageNet."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from diffusion_cli.data import FEW_VAL, Dataset, Images
from diffusion_cli.errors import FormatError, UsageError
from diffusion_cli.metrics.features.base import FeatureBatch, Features, check_pixels
from diffusion_cli.metrics.features.classifier_training import FeatureClassifier, Recipe, accuracy
from diffusion_cli.metrics.features.shipped import Weights, shipped
from diffusion_cli.runs.migrate import migrated
from diffusion_cli.system.cache import optional, report_damage
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.tensors import digest, load_checked
from diffusion_cli.system.terminal import report
from diffusion_cli.system.untrusted import check_tensors

FORMAT = 2  # weights of format 1 depended on the number of threads


class ClassifierFeatures(Features):
    """Penultimate activations of a small network trained to classify the real training images.

    If the package ships weights for exactly these training images and settings, `prepare` loads them. Otherwise it
    trains the network once and caches it by images and settings. Values from different weights are not comparable;
    `digest` identifies the weights.

    Args:
        dataset: dataset with classes and 8-bit images.
        cache_dir: folder of the cache.
        device: device of the network.
        dim: number of features.
        width: channels of the first convolution.
        steps: training steps.
        batch_size: training batch size.
        learning_rate: peak learning rate of AdamW.
        shift: largest random shift of training images, in pixels.
        seed: seed of weights, batches and shifts.

    Raises:
        UsageError: the dataset has no classes, or is not 8-bit.
    """

    name = "classifier"
    resize = "none"
    knows_labels = True

    def __init__(
        self,
        dataset: Dataset,
        cache_dir: Path,
        device: torch.device,
        *,
        dim: PositiveInt = 64,
        width: PositiveInt = 32,
        steps: PositiveInt = 500,
        batch_size: PositiveInt = 128,
        learning_rate: PositiveFloat = 0.002,
        shift: NonNegativeInt = 1,
        seed: NonNegativeInt = 0,
    ) -> None:
        if dataset.num_classes is None:
            raise UsageError(
                "features", "classifier", f"{dataset.name} has no classes", "use features=inception"
            )
        self.dim, self.classes, self.device = dim, dataset.num_classes, device
        self.cache_dir, self.dataset_name = cache_dir, dataset.name
        self.choice = ""
        """Reason for the choice of the network, the start of its note."""
        self.recipe = Recipe(
            dim=dim, width=width, classes=dataset.num_classes, steps=steps, batch_size=batch_size,
            learning_rate=learning_rate, shift=shift, seed=seed, flip=dataset.flip,
        )  # fmt: skip
        train, val = dataset.load("train"), dataset.load("val")
        check_pixels(train[torch.zeros(1, dtype=torch.int64, device=train.device)])
        self.network = self.recipe.initial(dataset.shape[0]).to(device).eval()
        self._splits: tuple[Images, Images] | None = train, val

    def prepare(self) -> Self:
        if self._splits is None:
            return self
        train, val = self._splits
        weights, origin = shipped(self.recipe, train.digest(), val.digest()), "shipped with diffuse"
        if weights is None:
            weights, origin = self._cached(train, val), "trained here"
        self.network.load_state_dict(weights.state)
        self.val_accuracy = weights.val_accuracy
        if self.val_accuracy is None:
            self.val_accuracy = accuracy(self.network, val, self.device)
        self.digest = digest(self.network.state_dict())
        known = "" if self.val_accuracy is None else f"; validation accuracy {self.val_accuracy:.4f}"
        if known and len(val) < FEW_VAL:
            known += f" of only {len(val)} images"
        self.note = (
            f"{self.choice}features are those of a classifier of {self.dataset_name}/train, {origin} (weights "
            f"{self.digest[:12]}{known}), not of Inception; compare only values with the same weights"
        )
        self._splits = None
        return self

    def extract(self, images: Tensor) -> FeatureBatch:
        return FeatureBatch(*self.network(images.float() / 127.5 - 1))

    def _cached(self, train: Images, val: Images) -> Weights:
        """Return the cached weights; train the network and cache it if there are none."""
        facts = {"format": FORMAT, **asdict(self.recipe), "data": [train.digest(), val.digest()]}

        def made() -> Weights:
            network = self.recipe.train(train, self.device)
            return Weights(network.state_dict(), accuracy(network, val, self.device))

        path = cache_file(self.cache_dir, f"classifier-{self.dataset_name}", facts)
        return cached(path, self.network, made, "the feature classifier")


def cache_file(cache_dir: Path, name: str, facts: Mapping[str, Any]) -> Path:
    """Return the file of the cache for weights that depend on these facts, plain data."""
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cache_dir / f"{name}-{key[:16]}.pt"


def cached(path: Path, network: FeatureClassifier, make: Callable[[], Weights], named: str) -> Weights:
    """Return the weights in a file of the cache for a network like `network`; else make and save them.

    `named` names the network in the line for an interrupted training.
    """
    found = restored(path, network)
    if found is None:
        try:
            found = make()
        except KeyboardInterrupt:
            report(f"{named} is saved once it is trained; its training starts again")
            raise
        save(path, found)
    return found


def save(path: Path, weights: Weights) -> None:
    """Write weights with digest and accuracy to a file of the cache, atomically."""
    state = {key: value.cpu() for key, value in weights.state.items()}
    with optional(), atomic_write(path) as temporary:
        about = {"digest": digest(state), "val_accuracy": weights.val_accuracy}
        torch.save({"state": state, **about}, temporary)


def restored(path: Path, network: FeatureClassifier) -> Weights | None:
    """Return the weights in `path` for a network like `network`; None if the file is missing or damaged."""
    if not path.is_file():
        return None
    try:
        check_tensors(path)
        saved = load_checked(path)
        state, wanted = saved["state"], network.state_dict()
        # Shapes first: a short file can declare a tensor of any size.
        if {key: value.shape for key, value in state.items()} != {
            key: value.shape for key, value in wanted.items()
        }:
            raise FormatError("the weights are those of another network")
        if digest(state) != saved["digest"]:
            raise FormatError("the weights do not match their digest")
        share = migrated({key: value for key, value in saved.items() if key != "state"})["val_accuracy"]
        if not isinstance(share, float | None):
            raise FormatError("the accuracy is not a number")
    except Exception as error:  # the parsers of ZIP and pickle raise errors of many types
        report_damage(path, error)
        return None
    return Weights(state, share)
