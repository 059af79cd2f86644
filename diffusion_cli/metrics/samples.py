"""Where the samples to be measured come from."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from diffusion_cli.data import ExternalImages, relabelled, spread
from diffusion_cli.errors import UsageError


class Samples(ABC):
    """Pictures to be measured, by number: made when they are asked for, or read."""

    shape: tuple[int, ...]
    """Channels, height and width."""
    class_names: tuple[str, ...] | None
    """Of the classes that they were made as, or None."""
    labelled: bool
    """Whether it is known which class each was made as."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of samples."""

    @abstractmethod
    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Samples uint8 [B, C, H, W] by number, and the classes (int64 [B]) they were made as, if they were."""

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """How they were made, as plain data; complete when all have been asked for."""

    def notes(self) -> list[str]:
        """Return what a reader of the numbers should consider about the samples."""
        return []


class GivenSamples(Samples):
    """Images in files, `count` of them evenly spread (null: all), for files may be sorted by class.

    `class_names` are those of the dataset: where the images' own classes are among these they are numbered so.
    """

    def __init__(
        self,
        given: ExternalImages,
        class_names: tuple[str, ...] | None,
        made: dict[str, Any],
        key: str,
        count: int | None = None,
    ) -> None:
        self.images, self.made = given.images, made
        self.shape = given.images.shape
        labels = relabelled(given, class_names)
        self.labels = given.images.labels if labels is None else labels
        self.class_names = given.class_names if labels is None else class_names
        self.labelled = self.labels is not None
        self.rows = spread(len(given.images), len(given.images) if count is None else count)
        if len(self.rows) > len(given.images):
            raise UsageError(
                "num_samples", count, f"{key} holds {len(given.images)} images", "give more, or take fewer"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        rows = self.rows[list(numbers)]
        return self.images[rows], None if self.labels is None else self.labels[rows]

    @cached_property
    def _lossy(self) -> dict[str, int]:
        """The number of samples in files of each lossy format."""
        return self.images.lossy(self.rows)

    def protocol(self) -> dict[str, Any]:
        return self.made | ({"lossy": self._lossy} if self._lossy else {})

    def notes(self) -> list[str]:
        return [
            f"samples: {count} of {len(self)} are {name} files; the numbers include the loss of that compression"
            for name, count in self._lossy.items()
        ]
