"""The interface of sample formats: a file, its numbers, and its picture."""

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
"""Channels, then the sizes in space: [C, H, W] for images."""
STRICT = ConfigDict(strict=True, extra="forbid")
KINDS: "dict[str, type[SampleFormat]]" = {}


class SampleFormat(ABC):
    """How samples x in [-1, 1] are stored and shown, as a frozen dataclass; `to_dict` and `form_of` store it.

    Samples "as stored" are uint8 where a file holds bytes, and elsewhere float32 in [-1, 1], each number one that the
    file can hold.
    """

    kind: ClassVar[str]
    ordered: ClassVar[bool] = True
    """Whether neighbours in the array are neighbours in space: true of pixels, not of point clouds."""

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:
            KINDS[cls.kind] = cls

    def to_dict(self) -> dict[str, Any]:
        """Return the format as plain data."""
        return {"kind": self.kind, **asdict(self)}  # pyright: ignore[reportArgumentType]

    @property
    @abstractmethod
    def suffix(self) -> str:
        """Of its files, as .png."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the files that it reads."""
        return (self.suffix,)

    @property
    @abstractmethod
    def half_range(self) -> float:
        """What a difference of 1 in x is in the numbers of a file: 127.5 for bytes."""

    @abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """Return samples around [-1, 1], float [B, *shape], as stored: the nearest that files can hold."""

    @abstractmethod
    def write(self, sample: Tensor, path: Path) -> None:
        """Write one sample as stored, [*shape]."""

    @abstractmethod
    def read(self, data: bytes, shape: Shape) -> Tensor:
        """Return the sample as stored that a file holds; FormatError if it is none, or of another shape."""

    def lossy(self, data: bytes) -> str | None:
        """Return the name of a file's lossy compression; None for a lossless file, or one that cannot be read."""
        return None

    def of(self, data: bytes) -> Self:
        """Return the format for a result made from a file: this one, with the file's position in space."""
        return self

    def remark(self, images: Sequence[np.ndarray]) -> str | None:
        """Return a line where the numbers of files [C, H, W] disagree with the range that they are read by."""
        return None

    @abstractmethod
    def to_rgb(self, samples: Tensor) -> Tensor:
        """Return samples as stored, [B, *shape], as images to look at and to measure, uint8 [B, 1 or 3, H, W]."""

    def frames(self, samples: Tensor) -> Tensor:
        """Return samples as films to look through, uint8 [B, F, 1 or 3, H, W]; of one frame where nothing moves."""
        return self.to_rgb(samples)[:, None]

    @abstractmethod
    def picture_shape(self, shape: Shape) -> tuple[int, int, int]:
        """Return the shape of the picture of a sample."""

    @property
    def note(self) -> str:
        """What metrics of the pictures have to say of them; nothing where a picture is the whole sample."""
        return ""


def form_of(stored: Mapping[str, Any]) -> SampleFormat:
    """Return the format that `stored` describes; UsageError if there is no such format."""
    values = dict(stored)
    kind = KINDS.get(str(values.pop("kind", None)))
    if kind is None:
        raise UsageError(
            "form.kind", str(stored.get("kind"))[:40], "is no form", f"there are {', '.join(KINDS)}"
        )
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"form.{where}", NO_VALUE, reason(ValueError(first["msg"]))) from error
