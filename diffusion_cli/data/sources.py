"""Sources of the conditions of a dataset's images: where the values of a condition come from."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Self

import torch
from torch import Tensor

from diffusion_cli.conditions.condition import is_missing
from diffusion_cli.system.seeding import mix
from diffusion_cli.system.tensors import digest


class ConditionSource(ABC):
    """Values of one condition for the rows of a split, such as a column of a table."""

    beside: Any = None
    """`Images` of the same rows and sizes, which are read and flipped with the images; None without any."""

    @abstractmethod
    def values(self, rows: Tensor, images: Tensor, draw: int | None) -> Tensor:
        """Return the values of rows, [B, ...] on the device of the images; see `Condition`.

        Args:
            rows: row numbers, int64 [B].
            images: the images of these rows, float32 [B, C, *sizes] in [-1, 1], as the network gets them.
            draw: number of the random choices of a training step, such as one of several captions, for
                `row_uniform`; None: the same choices at every call.
        """

    def values_of(self, beside: Tensor, rows: Tensor, draw: int | None) -> Tensor:
        """Return the values of rows from their images of `beside`, float32 [B, C, *sizes] in [-1, 1]."""
        raise NotImplementedError

    @abstractmethod
    def digest(self) -> str:
        """Return the SHA-256 (hex) of all values, or of what they are derived from."""

    def has_missing(self) -> bool:
        """Return whether some rows have no value."""
        return False

    def to(self, device: torch.device) -> Self:
        """Return the source with its tensors on a device."""
        return self


def conditions_digest(labels: Tensor | None, sources: Mapping[str, ConditionSource]) -> str | None:
    """Return a SHA-256 (hex) of class labels and of the sources of other conditions; None without any.

    That of class labels alone is the same in all versions.

    Args:
        labels: class of each image, int64 [N]; None without classes.
        sources: sources of other conditions, by name.
    """
    of_labels = None if labels is None else digest({"labels": labels.cpu()})
    if not sources:
        return of_labels
    of_sources = {name: source.digest() for name, source in sorted(sources.items())}
    return sha256(json.dumps([of_labels, of_sources]).encode()).hexdigest()


def row_uniform(rows: Tensor, draw: int | None, count: int = 1) -> Tensor:
    """Return uniform numbers in [0, 1), float64 [B, count], on the CPU, as a hash of row number and draw alone.

    A row has the same numbers in every batch, process and part of a batch. The hash is SplitMix64.
    """
    places = rows.cpu()[:, None] * count + torch.arange(count)
    state = places * _signed(0x9E3779B97F4A7C15) + mix("condition", draw or 0)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ _shifted(state, shift)) * _signed(factor)
    return _shifted(state ^ _shifted(state, 31), 11).double() / 2**53


def _signed(number: int) -> int:
    """Return the int64 with the bits of an unsigned number."""
    return number - 2**64 if number >= 2**63 else number


def _shifted(state: Tensor, shift: int) -> Tensor:
    """Return unsigned 64-bit integers, stored as int64, shifted right."""
    return (state >> shift) & ((1 << (64 - shift)) - 1)


class ColumnSource(ConditionSource):
    """A column of a table of values.

    Args:
        numbers: value of each row, int64 or float32 [N].
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    def values(self, rows: Tensor, images: Tensor, draw: int | None) -> Tensor:
        return self.numbers[rows.to(self.numbers.device)].to(images.device, non_blocking=True)

    def digest(self) -> str:
        return sha256(self.numbers.cpu().numpy().tobytes()).hexdigest()

    def has_missing(self) -> bool:
        return bool(is_missing(self.numbers).any())

    def to(self, device: torch.device) -> Self:
        return type(self)(self.numbers.to(device))
