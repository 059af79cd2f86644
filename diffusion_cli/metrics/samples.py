"""Sources of the samples to evaluate."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from diffusion_cli.conditions import AttributeDescription, Condition, Conditions
from diffusion_cli.conditions.rows import Row, encoded_rows, texts_of_rows
from diffusion_cli.data import ExternalImages, PicturedImages, relabelled, spread
from diffusion_cli.errors import UsageError
from diffusion_cli.formats import SampleFormat
from diffusion_cli.samplers import Advance, unreported


class Samples(ABC):
    """Base class of samples to evaluate, as 8-bit previews by index: generated on access, or read from files."""

    shape: tuple[int, ...]
    """Shape [C, H, W]."""
    class_names: tuple[str, ...] | None
    """Names of the classes, or None."""
    labelled: bool
    """Whether samples have class labels."""
    has_texts: bool = False
    """Whether samples have texts, see `texts_of`."""
    form: SampleFormat | None = None
    """Storage format; None if only previews are known."""
    latest: Tensor | None = None
    """Stored samples [B, *shape] of the last batch; None if only previews are known."""
    attributes: tuple[AttributeDescription, ...] = ()
    """Meaning of the values of `condition_of`; empty if they are only class labels."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    @abstractmethod
    def batch(self, numbers: Sequence[int], advance: Advance = unreported) -> tuple[Tensor, Tensor | None]:
        """Return samples by index, uint8 [B, C, H, W], and their labels, int64 [B], or None.

        `advance` takes each share of the work that is done, if it takes long.
        """

    def condition_of(self, numbers: Sequence[int]) -> Condition | None:
        """Return the conditions by which samples were made, by index; None for only class labels, or none."""
        return None

    def originals(self, numbers: Sequence[int]) -> Tensor | None:
        """Return what each sample shall resemble, as stored by `form` [B, *shape]; None if samples have no originals.

        Without a form, these are 8-bit images.
        """
        return None

    def texts_of(self, numbers: Sequence[int]) -> list[str | None] | None:
        """Return the texts by which samples were made, by index, None for one without; None without texts."""
        return None

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """Return how the samples were made, as plain data; complete after all have been accessed."""

    def notes(self) -> list[str]:
        """Return notes for readers of the results."""
        return []


class GivenSamples(Samples):
    """Evenly spaced images from files.

    Args:
        given: the images.
        class_names: classes of the dataset; labels are converted to them if the classes match.
        made: description for the protocol.
        key: configuration key of the images, for errors.
        count: number of images; None: all.
        rows: values by which each image was made; None if they are not known.
        attributes: descriptions of these values.
    """

    def __init__(
        self,
        given: ExternalImages,
        class_names: tuple[str, ...] | None,
        made: dict[str, Any],
        key: str,
        count: int | None = None,
        *,
        rows: Sequence[Row] | None = None,
        attributes: tuple[AttributeDescription, ...] = (),
    ) -> None:
        self.values, self.attributes = rows, () if rows is None else attributes
        self.has_texts = rows is not None and texts_of_rows(rows) is not None
        self.images, self.made = given.images, made
        self.form = given.images.form if isinstance(given.images, PicturedImages) else None
        self.shape = given.images.shape
        labels = relabelled(given, class_names)
        self.labels = given.images.labels if labels is None else labels
        self.class_names = given.class_names if labels is None else class_names
        self.labelled = self.labels is not None
        self.rows = spread(len(given.images), len(given.images) if count is None else count)
        if len(self.rows) > len(given.images):
            raise UsageError(
                "num_samples", count, f"{key} has only {len(given.images)} images", "use fewer, or give more"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, numbers: Sequence[int], advance: Advance = unreported) -> tuple[Tensor, Tensor | None]:
        rows = self.rows[list(numbers)]
        if isinstance(self.images, PicturedImages):
            self.latest = self.images.stored(rows)
            return self.images.form.measured(self.latest), None if self.labels is None else self.labels[rows]
        return self.images[rows], None if self.labels is None else self.labels[rows]

    def condition_of(self, numbers: Sequence[int]) -> Condition | None:
        if self.values is None or not self.attributes:
            return None
        return encoded_rows(self._values_of(numbers), Conditions(attributes=self.attributes))

    def texts_of(self, numbers: Sequence[int]) -> list[str | None] | None:
        return None if self.values is None else texts_of_rows(self._values_of(numbers))

    def _values_of(self, numbers: Sequence[int]) -> list[Row]:
        assert self.values is not None
        return [self.values[row] for row in self.rows[list(numbers)].tolist()]

    @cached_property
    def _lossy(self) -> dict[str, int]:
        """Number of samples in files of each lossy format."""
        return self.images.lossy(self.rows)

    def protocol(self) -> dict[str, Any]:
        return self.made | ({"lossy": self._lossy} if self._lossy else {})

    def notes(self) -> list[str]:
        return [
            f"samples: {count} of {len(self)} are {name} files; values include the effect of this compression"
            for name, count in self._lossy.items()
        ]
