"""Condition images of a dataset's rows: derived from the images, or read beside them."""

import json
from collections.abc import Callable
from functools import cached_property
from hashlib import sha256
from typing import Self

import torch
from torch import Tensor

from diffusion_cli.conditions import ImageCondition, NoImage
from diffusion_cli.conditions.condition import IMAGE
from diffusion_cli.data.base import Images
from diffusion_cli.data.batches import to_model_range
from diffusion_cli.data.memory import to_device
from diffusion_cli.data.sources import ConditionSource
from diffusion_cli.system.seeding import mix


class DerivedImage(ConditionSource):
    """Condition images that are derived from the images, such as gray ones.

    Random choices and the noise augmentation of training depend on the draw and the row alone.

    Args:
        condition: what derives them.
    """

    def __init__(self, condition: ImageCondition) -> None:
        self.condition = condition

    def values(self, rows: Tensor, images: Tensor, draw: int | None) -> Tensor:
        derived = self.condition.derived(images, _seeds(rows, draw, "derived image"))
        return augmented(self.condition, derived, rows, draw)

    def digest(self) -> str:
        return sha256(json.dumps(self.condition.derivation, sort_keys=True).encode()).hexdigest()


class PairedImages(ConditionSource):
    """Condition images that are read beside the images.

    Args:
        given: the condition images, with the rows and sizes of the images; or a function that returns them, for example
            decoded in memory, and is called at their first use. It can be pickled.
        condition: their noise augmentation; None: none.
    """

    def __init__(self, given: Images | Callable[[], Images], condition: ImageCondition | None = None) -> None:
        self.given, self.condition = given, condition

    @cached_property
    def beside(self) -> Images:  # pyright: ignore[reportIncompatibleVariableOverride]  # read-only
        return self.given if isinstance(self.given, Images) else self.given()

    def values(self, rows: Tensor, images: Tensor, draw: int | None) -> Tensor:
        read = self.beside[rows.to(self.beside.device)].to(images.device)
        return self.values_of(to_model_range(read), rows, draw)

    def values_of(self, beside: Tensor, rows: Tensor, draw: int | None) -> Tensor:
        return beside if self.condition is None else augmented(self.condition, beside, rows, draw)

    def digest(self) -> str:
        return self.beside.fingerprint()

    def to(self, device: torch.device) -> Self:
        return type(self)(to_device(self.beside, device), self.condition)


def with_image_condition(images: Images, condition: ImageCondition | NoImage | None) -> Images:
    """Set the source of the condition images of a model, and return these images.

    Args:
        images: images of a split; their dataset may have condition images.
        condition: the image condition of the model; its condition images replace those of the dataset.
    """
    sources = {name: source for name, source in images.conditions.items() if name != IMAGE}
    if isinstance(condition, ImageCondition):
        paired = images.conditions.get(IMAGE)
        if condition.degradation is None and paired is not None:
            sources[IMAGE] = PairedImages(paired.beside, condition)
        else:
            sources[IMAGE] = DerivedImage(condition)
    return images.with_conditions(sources)


def augmented(condition: ImageCondition, images: Tensor, rows: Tensor, draw: int | None) -> Tensor:
    """Return condition images with the noise augmentation of a training step; clean ones without a draw."""
    return condition.augmented(images, None if draw is None else _seeds(rows, draw, "augmentation"))


def _seeds(rows: Tensor, draw: int | None, use: str) -> list[int]:
    return [mix(draw or 0, use, row) for row in rows.tolist()]
