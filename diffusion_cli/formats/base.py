"""Base class of storage formats: the files, values and previews of samples."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import ConfigDict, ValidationError
from torch import Tensor

from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.system.untrusted import reason

Shape = tuple[int, ...]
"""Channels, then spatial sizes: [C, H, W] for images."""
STRICT = ConfigDict(strict=True, extra="forbid")
KINDS: "dict[str, type[SampleFormat]]" = {}


class SampleFormat(ABC):
    """Base class of formats in which samples x in [-1, 1] are stored and shown.

    Formats are frozen dataclasses; `to_dict` and `form_of` serialize them. "Stored" samples are uint8 for 8-bit
    files, else float32 in [-1, 1] restricted to values that a file can represent.
    """

    kind: ClassVar[str]
    ordered: ClassVar[bool] = True
    """Whether neighbours in the array are neighbours in space: true for pixels, false for point clouds."""

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:
            KINDS[cls.kind] = cls

    def to_dict(self) -> dict[str, Any]:
        """Return the format as plain data, the input of `form_of`."""
        return {"kind": self.kind, **asdict(self)}  # pyright: ignore[reportArgumentType]

    def difference(self, other: "SampleFormat") -> tuple[str, Any, Any] | None:
        """Return the first key of `to_dict` with another value in `other`, and both values; None if equal."""
        ours, theirs = self.to_dict(), other.to_dict()
        return next(
            (
                (key, ours.get(key), theirs.get(key))
                for key in {**ours, **theirs}
                if ours.get(key) != theirs.get(key)
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

    @abstractmethod
    def read(self, data: bytes, shape: Shape) -> Tensor:
        """Return the stored sample in the bytes of a file; FormatError if malformed or of another shape."""

    def lossy(self, data: bytes) -> str | None:
        """Return the name of a file's lossy compression; None if it is lossless or unreadable."""
        return None

    def of(self, data: bytes) -> Self:
        """Return the format for a result made from a file: this one, with the file's spatial position."""
        return self

    def remark(self, images: Sequence[np.ndarray]) -> str | None:
        """Return a remark if the values of images [C, H, W] do not fit the value range of the format, else None."""
        return None

    @abstractmethod
    def to_rgb(self, samples: Tensor) -> Tensor:
        """Return previews of stored samples [B, *shape], to view and to measure: uint8 [B, 1 or 3, H, W]."""

    def frames(self, samples: Tensor) -> Tensor:
        """Return animated previews of stored samples, uint8 [B, F, 1 or 3, H, W]; one frame for still images."""
        return self.to_rgb(samples)[:, None]

    @abstractmethod
    def picture_shape(self, shape: Shape) -> tuple[int, int, int]:
        """Return the shape of the preview of a sample."""

    @property
    def note(self) -> str:
        """Description of the previews for metrics of them; empty if a preview is the whole sample."""
        return ""


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
