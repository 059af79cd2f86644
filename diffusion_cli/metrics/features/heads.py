"""Prediction of attributes by one linear layer, and its errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor
from torch.nn.functional import cross_entropy

from diffusion_cli.conditions import AttributeDescription
from diffusion_cli.conditions.condition import is_missing


@dataclass(frozen=True)
class AttributeHeads:
    """The outputs of a linear layer as predictions of attributes, in the order of their descriptions.

    A category or yes/no has a class score per value. A number has one output u and the prediction `m + s u`, where m
    and s are the mean and the standard deviation of the training values.
    """

    attributes: tuple[AttributeDescription, ...]
    scales: Mapping[str, tuple[float, float]]
    """Mean m and standard deviation s of each number."""

    @classmethod
    def fitted(cls, attributes: Sequence[AttributeDescription], targets: Mapping[str, Tensor]) -> Self:
        """Return heads with the scales of training values, [N] by name; missing values are left out."""
        scales = {}
        for attribute in attributes:
            if attribute.kind == "number":
                values = targets[attribute.name].double()
                given = values[~is_missing(values)]
                spread = float(given.std(correction=0)) if len(given) else 0.0
                scales[attribute.name] = (float(given.mean()) if len(given) else 0.0, spread or 1.0)
        return cls(tuple(attributes), scales)

    @property
    def outputs(self) -> int:
        """Number of outputs of the layer."""
        return sum(self._sizes())

    def loss(self, outputs: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Return the training loss of outputs [B, outputs] for values [B] by name, 0-d.

        The sum over attributes of the mean over images with a value: cross-entropy, or half the squared error in
        standard deviations.
        """
        total = outputs.sum() * 0
        for attribute, part in zip(self.attributes, outputs.split(self._sizes(), 1), strict=True):
            values = targets[attribute.name]
            given = ~is_missing(values)
            if not given.any():
                continue
            if attribute.kind == "number":
                mean, spread = self.scales[attribute.name]
                total = (
                    total + ((values[given].to(part) - mean) / spread - part[given, 0]).square().mean() / 2
                )
            else:
                total = total + cross_entropy(part[given], values[given])
        return total

    def predicted(self, outputs: Tensor) -> dict[str, Tensor]:
        """Return the predictions of outputs [B, outputs] by name, [B]: numbers in their unit, and numbers of values."""
        found = {}
        for attribute, part in zip(self.attributes, outputs.split(self._sizes(), 1), strict=True):
            if attribute.kind == "number":
                mean, spread = self.scales[attribute.name]
                found[attribute.name] = mean + spread * part[:, 0].double()
            else:
                found[attribute.name] = part.argmax(1)
        return found

    def _sizes(self) -> list[int]:
        return [1 if attribute.kind == "number" else len(attribute.values) for attribute in self.attributes]


class AttributeErrors:
    """Sums of the errors of predicted attributes: absolute errors of numbers, mistakes of the others.

    Images without a value are left out.
    """

    def __init__(self, heads: AttributeHeads) -> None:
        self.heads = heads
        self._sums = {attribute.name: 0.0 for attribute in heads.attributes}
        self._biases = dict(self._sums)
        self.counts = {attribute.name: 0 for attribute in heads.attributes}
        """Number of images with a value of each attribute."""

    def update(self, outputs: Tensor, wanted: Mapping[str, Tensor]) -> None:
        """Add outputs [B, outputs] for the wanted values, [B] by name; attributes may be absent."""
        for name, found in self.heads.predicted(outputs).items():
            values = wanted.get(name)
            if values is None:
                continue
            given = ~is_missing(values)
            found, values = found.cpu()[given.cpu()], values[given].cpu()
            self.counts[name] += len(values)
            if values.is_floating_point():
                self._sums[name] += float((found - values).abs().sum())
                self._biases[name] += float((found - values).sum())
            else:
                self._sums[name] += int((found != values).sum())

    def mean(self, name: str) -> float | None:
        """Return the mean absolute error of a number, or the share of mistakes; None without values."""
        return self._sums[name] / self.counts[name] if self.counts[name] else None

    def bias(self, name: str) -> float | None:
        """Return the mean of prediction minus value of a number; None without values."""
        return self._biases[name] / self.counts[name] if self.counts[name] else None
