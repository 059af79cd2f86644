"""What images are compared by: the activations and class scores of a fixed network."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import NamedTuple, Self

import torch
from torch import Tensor

from diffusion_cli.data import Dataset
from diffusion_cli.errors import NO_VALUE, UsageError


class FeatureBatch(NamedTuple):
    """What a feature network says of B images, on the network's device."""

    features: Tensor
    """float32 [B, dim], the last activations before the class scores."""
    logits: Tensor | None
    """float32 [B, classes], class scores before the softmax; None of a network that knows no classes."""
    spatial: Tensor | None = None
    """float32 [B, spatial_dim], where things are: a few channels of an early map; None of most networks."""

    def cpu(self) -> "FeatureBatch":
        """The same on the CPU."""
        logits, spatial = (None if stream is None else stream.cpu() for stream in self[1:])
        return FeatureBatch(self.features.cpu(), logits, spatial)


class Features(ABC):
    """A fixed network that maps uint8 images [B, C, H, W] to features and class scores.

    The call raises UsageError for images that are not uint8, or have channels that the network cannot take.
    """

    name: str
    """The word for the network in tables and protocols."""
    dim: int
    """Numbers in a feature vector."""
    classes: int
    """Number of class scores, 0 of a network that knows no classes."""
    spatial_dim: int = 0
    """Numbers in a spatial feature vector, 0 of a network without."""
    digest: str
    """SHA-256, in hex, of the weights."""
    resize: str
    """How images are brought to the size of the network, with the filter."""
    precision: str = "fp32"
    """In which the network calculates."""
    note: str
    """What a reader of the numbers must know of the network; may be empty."""
    device: torch.device
    knows_labels: bool = False
    """Whether class k of the scores is class k of the dataset."""
    val_accuracy: float | None = None
    """For a network that knows the labels: its accuracy on the real validation images, where there are any."""
    chunk: int = 1024
    """Images that go through the network at a time."""

    def prepare(self) -> Self:
        """Load or train the weights, where that takes long, and return the network; its digest and note come with them.

        An evaluation calls this once it is known to be possible, before the network sees an image.
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
        """The name of a metric in these features: as published of Inception's, else with the network's name."""
        return metric if self.name == "inception" else f"{metric}_{self.name}"

    @abstractmethod
    def extract(self, images: Tensor) -> FeatureBatch:
        """The features of a few uint8 images on the network's device."""


def check_channels(name: str, dataset: Dataset) -> None:
    """Raise UsageError for a dataset whose images a network for colour photographs cannot take."""
    channels = dataset.shape[0]
    if channels not in (1, 3):
        raise UsageError(
            "features", name, "takes 1 or 3 channels", f"images of {dataset.name} have {channels}"
        )


def check_pixels(images: Tensor) -> None:
    """Raise UsageError for images that are not bytes, as a saved PNG has them."""
    if images.dtype != torch.uint8:
        raise UsageError(
            "features",
            NO_VALUE,
            f"the images are {images.dtype}, and features are taken of uint8 pixels",
            "a dataset of real numbers has no image metrics",
        )


def exact_convolutions() -> AbstractContextManager[None]:
    """A context in which a GPU convolves in full float32, the same way every time, as the CPU does."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
