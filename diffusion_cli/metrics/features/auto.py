"""Automatic choice of the feature network."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from diffusion_cli.data import Dataset
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics.features.base import Features
from diffusion_cli.metrics.features.classifier import ClassifierFeatures
from diffusion_cli.metrics.features.inception import InceptionFeatures, Resize


def auto_features(
    dataset: Dataset,
    cache_dir: Path,
    device: torch.device,
    *,
    weights: str | None = None,
    resize: Resize = "tensorflow",
    precision: Literal["fp32", "bf16"] = "fp32",
    dim: PositiveInt = 64,
    width: PositiveInt = 32,
    steps: PositiveInt = 500,
    batch_size: PositiveInt = 128,
    learning_rate: PositiveFloat = 0.002,
    shift: NonNegativeInt = 1,
    seed: NonNegativeInt = 0,
) -> Features:
    """Return `InceptionFeatures` for three channels, else `ClassifierFeatures`; see these for the arguments.

    Raises:
        UsageError: the images have one channel and no classes, or the network cannot be used.
    """
    channels = dataset.shape[0]
    if channels == 3:
        return InceptionFeatures(
            dataset, cache_dir, device, weights=weights, resize=resize, precision=precision
        )
    if dataset.num_classes is None:
        raise UsageError(
            "features",
            "auto",
            f"{dataset.name} has {channels} channel(s) and no classes, so no network fits",
            "use features=inception, which repeats one channel to three",
        )
    features = ClassifierFeatures(
        dataset,
        cache_dir,
        device,
        dim=dim,
        width=width,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        shift=shift,
        seed=seed,
    )
    features.choice = f"features=auto uses the classifier because images have {channels} channel(s); "
    return features
