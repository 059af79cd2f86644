"""Base class of feature networks."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from diffusion_cli.data import Dataset
from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.system.downloads import PublishedFile


class FeatureBatch(NamedTuple):
    """Output of a feature network for B images, on its device."""

    features: Tensor
    """Penultimate activations, float32 [B, dim]."""
    logits: Tensor | None
    """Class scores before the softmax, float32 [B, classes], or None."""
    spatial: Tensor | None = None
    """Spatial features of an early layer, float32 [B, spatial_dim], or None."""

    def cpu(self) -> "FeatureBatch":
        """Return the same on the CPU."""
        logits, spatial = (None if stream is None else stream.cpu() for stream in self[1:])
        return FeatureBatch(self.features.cpu(), logits, spatial)


class Features(ABC):
    """Base class of fixed networks from uint8 images [B, C, H, W] to features and class scores.

    Calling it raises UsageError for images of another dtype, or with an unsupported number of channels.
    """

    name: str
    """Name of the network in tables and protocols."""
    dim: int
    """Number of features."""
    classes: int
    """Number of class scores; 0 if there are none."""
    spatial_dim: int = 0
    """Number of spatial features; 0 if there are none."""
    digest: str
    """SHA-256 (hex) of the weights."""
    resize: str
    """Description of the resizing of images to the input size."""
    precision: str = "fp32"
    """Floating-point precision of the network."""
    note: str
    """Note for readers of the results; may be empty."""
    device: torch.device
    knows_labels: bool = False
    """Whether class k of the scores is class k of the dataset."""
    val_accuracy: float | None = None
    """Accuracy on the real validation images if `knows_labels`, else None."""
    chunk: int = 1024
    """Images per forward pass."""

    @classmethod
    def downloads(cls, settings: Mapping[str, Any]) -> Sequence[PublishedFile]:
        """Return the published files that a network with these settings of its option needs."""
        return []

    def prepare(self) -> Self:
        """Load or train the weights if that takes long; sets `digest` and `note`, and returns the network.

        Called after all checks of an evaluation, and before the first image.
        """
        return self

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> FeatureBatch:
        check_pixels(images)
        with exact_convolutions():
            parts = [self.extract(part.to(self.device)) for part in images.split(self.chunk)]
        features, *others = zip(*parts, strict=True)
        logits, spatial = (None if tensors[0] is None else torch.cat(tensors) for tensors in others)
        return FeatureBatch(torch.cat(features), logits, spatial)

    def named(self, metric: str) -> str:
        """Return the name of a metric with these features: as published for Inception, else with the network's name."""
        return metric if self.name == "inception" else f"{metric}_{self.name}"

    @abstractmethod
    def extract(self, images: Tensor) -> FeatureBatch:
        """Return the features of a chunk of uint8 images on the network's device."""


def check_channels(name: str, dataset: Dataset) -> None:
    """Raise UsageError unless the images of a dataset have 1 or 3 channels."""
    channels = dataset.shape[0]
    if channels not in (1, 3):
        raise UsageError(
            "features",
            name,
            f"needs images with 1 or 3 channels; those of {dataset.name} have {channels}",
        )


def check_pixels(images: Tensor) -> None:
    """Raise UsageError unless images are uint8."""
    if images.dtype != torch.uint8:
        raise UsageError(
            "features",
            NO_VALUE,
            f"need uint8 images, not {images.dtype}",
            "metrics of images do not apply to real-valued datasets",
        )


def exact_convolutions() -> AbstractContextManager[None]:
    """Return a context with deterministic float32 convolutions on GPUs, without TF32."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
