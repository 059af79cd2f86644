"""Base class of storage formats: the files, values and previews of samples."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from pydantic import ConfigDict, ValidationError
from torch import Tensor

from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.system.untrusted import reason

Shape = tuple[int, ...]
"""Channels, then spatial sizes: [C, H, W] for images."""
STRICT = ConfigDict(strict=True, extra="forbid")
KINDS: "dict[str, type[SampleFormat]]" = {}


class SurfacePoints(NamedTuple):
    """Points on the surface of a sample, and properties of its mesh."""

    points: Tensor
    """Points, float32 [N, 3] in about [-1, 1]; none without a surface."""
    volume: float | None = None
    """Volume inside, of 8 of the whole cube; None for point clouds."""
    watertight: bool | None = None
    """Whether each edge of the mesh has two triangles; None for point clouds."""


class SampleFormat(ABC):
    """Base class of formats in which samples x in [-1, 1] are stored and shown.

    Formats are frozen dataclasses; `to_dict` and `form_of` serialize them. "Stored" samples are uint8 for 8-bit
    files, else float32 in [-1, 1] restricted to values that a file can represent.
    """

    kind: ClassVar[str]
    ordered: ClassVar[bool] = True
    """Whether neighbours in the array are neighbours in space: true for pixels, false for point clouds."""

    suffixes_beside: ClassVar[tuple[str, ...]] = ()
    """Suffixes of the further files of a sample, see `beside`."""

    has_surface: ClassVar[bool] = False
    """Whether samples are surfaces in three dimensions, see `surface_points`."""

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:
            KINDS[cls.kind] = cls

    def to_dict(self) -> dict[str, Any]:
        """Return the format as plain data, the input of `form_of`."""
        return {"kind": self.kind, **asdict(self)}  # pyright: ignore[reportArgumentType]

    def difference(self, other: "SampleFormat", besides: Collection[str] = ()) -> tuple[str, Any, Any] | None:
        """Return the first key of `to_dict` with another value in `other`, and both values; None if equal.

        Args:
            other: another format.
            besides: keys that may differ.
        """
        ours, theirs = self.to_dict(), other.to_dict()
        return next(
            (
                (key, ours.get(key), theirs.get(key))
                for key in {**ours, **theirs}
                if key not in besides and ours.get(key) != theirs.get(key)
            ),
            None,
        )

    @property
    @abstractmethod
    def suffix(self) -> str:
        """Suffix of written files, such as .png."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of readable files."""
        return (self.suffix,)

    @property
    @abstractmethod
    def half_range(self) -> float:
        """Factor from a difference in x to one in file values: 127.5 for 8-bit files."""

    @abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """Round samples in about [-1, 1], float [B, *shape], to the nearest stored samples."""

    @abstractmethod
    def write(self, sample: Tensor, path: Path) -> None:
        """Write one stored sample [*shape] to a file."""

    def beside(self, sample: Tensor) -> Mapping[str, bytes]:
        """Return further files of a stored sample [*shape], by suffix, such as its mesh; none by default."""
        return {}

    @abstractmethod
    def read(self, data: bytes, shape: Shape) -> Tensor:
        """Return the stored sample in the bytes of a file; FormatError if malformed or of another shape."""

    def lossy(self, data: bytes) -> str | None:
        """Return the name of a file's lossy compression; None if it is lossless or unreadable."""
        return None

    def remark(self, images: Sequence[np.ndarray]) -> str | None:
        """Return a remark if the values of images [C, H, W] do not fit the value range of the format, else None."""
        return None

    @abstractmethod
    def to_rgb(self, samples: Tensor) -> Tensor:
        """Return previews of stored samples [B, *shape], uint8 [B, 1 or 3, H, W]."""

    def surface_points(self, sample: Tensor, count: int, seed: int) -> SurfacePoints:
        """Return at most `count` random points on the surface of a stored sample, for formats with `has_surface`."""
        raise NotImplementedError

    def frames(self, samples: Tensor) -> Tensor:
        """Return animated previews of stored samples, uint8 [B, F, 1 or 3, H, W]; one frame for still images."""
        return self.to_rgb(samples)[:, None]

    def slices(self, samples: Tensor, place: Sequence[int] | None) -> Tensor:
        """Return previews like `to_rgb`; those of volumes show the slices through a place along each axis, if given."""
        return self.to_rgb(samples)

    @abstractmethod
    def picture_shape(self, shape: Shape) -> tuple[int, int, int]:
        """Return the shape of the preview of a sample."""

    def measured(self, samples: Tensor) -> Tensor:
        """Return 8-bit images of stored samples for metrics, uint8 [B, 1 or 3, H, W]: their previews by default."""
        return self.to_rgb(samples)

    def measured_shape(self, shape: Shape) -> tuple[int, int, int]:
        """Return the shape of the 8-bit image of a sample for metrics."""
        return self.picture_shape(shape)

    @property
    def note(self) -> str:
        """Description of the 8-bit images for metrics; empty if such an image is the whole sample."""
        return ""


class Original(NamedTuple):
    """Values of a file, before they were clipped to the range of a format and rounded."""

    values: np.ndarray
    """Values in the units of the file, float64 [C, *sizes]."""
    numbers: dict[str, Any]
    """Fields of the format by which the file stores its values, such as the dtype and the slope."""
    resampled: bool = False
    """Whether an image of the same size as the file was resampled nevertheless."""


class ValueFormat(SampleFormat):
    """Base class of formats that clip the values of files to a stated range [low, high]."""

    @abstractmethod
    def original(self, data: bytes) -> Original:
        """Return the values of a file as they are; FormatError if it is malformed."""

    @abstractmethod
    def values(self, samples: Tensor) -> np.ndarray:
        """Return the values, float64, of samples in about [-1, 1], clipped to the range."""

    @abstractmethod
    def beyond(self, values: np.ndarray) -> np.ndarray:
        """Return how far values [C, *sizes] lie outside the range; 0 inside."""

    @abstractmethod
    def rounded(self, values: np.ndarray) -> np.ndarray:
        """Return the nearest values, in the range or not, that a file can store."""

    @abstractmethod
    def write_values(self, values: np.ndarray, path: Path) -> None:
        """Write values [C, *sizes], in the range or not, to a file."""

    def write(self, sample: Tensor, path: Path) -> None:
        self.write_values(self.values(sample), path)

    def completed(self, sample: Tensor, original: Original, known: Tensor) -> "Completed":
        """Return the values of a sample, with those of a file where they are known.

        Their format is this one, or the same with the numbers of the file if this one cannot store the known values.

        Args:
            sample: sample in about [-1, 1], [C, *sizes].
            original: values of the file: as many as the sample has, or as many as are known.
            known: region of the known values, bool [1, *sizes].
        """
        values, region = self.values(sample), known.expand(sample.shape).numpy()
        whole = original.values.shape == values.shape
        wanted = original.values[region] if whole else original.values.ravel()
        values[region] = wanted
        form, stored = self, self.rounded(values)
        if not np.array_equal(stored[region], wanted):
            form = replace(self, **original.numbers)  # pyright: ignore[reportArgumentType]
            stored = form.rounded(values)
        return Completed(form, stored, np.where(region, stored - values, 0.0))


class Completed(NamedTuple):
    """Result with the known values of its input."""

    form: ValueFormat
    """Format to write them."""
    values: np.ndarray
    """Values in the units of the file, as the format stores them, float64 [C, *sizes]."""
    errors: np.ndarray
    """Differences from the known values, and 0 elsewhere, [C, *sizes]."""

    def write(self, path: Path) -> None:
        """Write the values to a file."""
        self.form.write_values(self.values, path)


def form_of(stored: Mapping[str, Any]) -> SampleFormat:
    """Return the format that `stored` describes; UsageError if it is unknown or malformed."""
    values = dict(stored)
    kind = KINDS.get(str(values.pop("kind", None)))
    if kind is None:
        raise UsageError(
            "form.kind", str(stored.get("kind"))[:40], "no such format", f"use one of {', '.join(KINDS)}"
        )
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"form.{where}", NO_VALUE, reason(ValueError(first["msg"]))) from error
