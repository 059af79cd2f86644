"""The inputs of a network besides noised images."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

LABEL = "label"
"""Name of the class label."""
IMAGE = "image"
"""Name of the condition image."""
TEXT = "text"
"""Name of the text among the values of a condition."""
AUGMENTATION = "augmentation"
"""Name of the parameters of the augmentation in training."""
POSITION = "position"
"""Name of the position of a window in training."""


@dataclass(frozen=True, eq=False)
class Condition:
    """Named values of B images, inputs of a network besides the noised images.

    A missing value is NaN in tensors of floating-point numbers, and -1 in those of integers. A condition that is
    dropped in training has only missing values, and so has that of the unconditional prediction in classifier-free
    guidance.

    Args:
        values: tensors [B, ...] by name: "label" (class, int64 [B]), an attribute (float32 or int64 [B]), "image"
            (float32 [B, C, *sizes] in [-1, 1]), "text" (tokens, int64 [B, L], or features, float32 [B, L, D]), and
            in training alone "augmentation" (float32 [B, N]) and "position" (float32 [B, 2 ndim]).
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, y: "Condition | Tensor | None") -> "Condition":
        """Return a condition as it is, or one of class labels y, int64 [B]; None has no values."""
        if isinstance(y, Condition):
            return y
        return cls({} if y is None else {LABEL: y})

    def __len__(self) -> int:
        """Return the number of images B; 0 without values."""
        return next((len(value) for value in self.values.values()), 0)

    def get(self, name: str) -> Tensor | None:
        """Return the values of a name, or None."""
        return self.values.get(name)

    def rows(self, index: Tensor) -> "Condition":
        """Return the condition of the images at positions `index`, int64 [N]."""
        return self._mapped(lambda value: value.index_select(0, index.to(value.device)))

    def repeat_interleave(self, count: int) -> "Condition":
        """Return the condition with each image repeated `count` times in a row."""
        return self._mapped(lambda value: value.repeat_interleave(count, 0))

    def to(self, device: torch.device | str) -> "Condition":
        """Return the condition on a device."""
        return self._mapped(lambda value: value.to(device, non_blocking=True))

    def replaced(self, values: Mapping[str, Tensor]) -> "Condition":
        """Return the condition with the values of some names replaced or added."""
        return Condition({**self.values, **values})

    def dropped(self, names: Iterable[str] | None = None, where: Tensor | None = None) -> "Condition":
        """Return the condition without some values, as in training with label dropout (Ho and Salimans 2022).

        A position stays: without it, the network does not know what it sees.

        Args:
            names: names of the values to drop; None: all.
            where: images that lose the values, bool [B]; None: all.
        """
        dropped = set(self.values if names is None else names) - {POSITION}
        return Condition(
            {
                name: _without(value, where) if name in dropped else value
                for name, value in self.values.items()
            }
        )

    @staticmethod
    def cat(conditions: "Sequence[Condition]") -> "Condition":
        """Join conditions with the same names; texts of different lengths are padded with missing values."""
        return Condition(
            {
                name: torch.cat(_padded([condition.values[name] for condition in conditions]))
                for name in conditions[0].values
            }
        )

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> "Condition":
        return Condition({name: function(value) for name, value in self.values.items()})


def missing_value(value: Tensor) -> float:
    """Return the number that stands for a missing value in tensors of this dtype."""
    return float("nan") if value.is_floating_point() else -1


def is_missing(value: Tensor) -> Tensor:
    """Return where values are missing, bool in the shape of `value`."""
    return value.isnan() if value.is_floating_point() else value < 0


def _without(value: Tensor, where: Tensor | None) -> Tensor:
    missing = missing_value(value)
    if where is None:
        return torch.full_like(value, missing)
    return value.masked_fill(where.view(-1, *[1] * (value.ndim - 1)), missing)


def _padded(values: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors [B, L, ...] padded to the longest L; others unchanged."""
    if len({value.shape[1:2] for value in values}) == 1:
        return [*values]
    longest = max(value.shape[1] for value in values)
    return [
        pad(value, (*[0, 0] * (value.ndim - 2), 0, longest - value.shape[1]), value=missing_value(value))
        for value in values
    ]
