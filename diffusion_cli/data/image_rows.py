"""The conditions of some images of a split, by row, for samples and previews."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_cli.conditions import AttributeDescription, Condition
from diffusion_cli.conditions.condition import IMAGE, LABEL, TEXT
from diffusion_cli.conditions.rows import (
    ConditionRows,
    Row,
    attribute_rows,
    attributes_of,
    in_turn,
    texts_of_rows,
)
from diffusion_cli.data.base import Images, spread
from diffusion_cli.data.batches import to_model_range
from diffusion_cli.data.text import CaptionSource


class ImageRows:
    """Conditions of images of a dataset.

    Args:
        images: the images of a split, with the sources of their conditions.
        places: row of the image of each condition, int64 [K].
    """

    def __init__(self, images: Images, places: Tensor) -> None:
        self.images, self.places = images, places

    def __len__(self) -> int:
        return len(self.places)

    def get(self, name: str) -> Tensor | None:
        """Return the values of an attribute in all rows, or None for other names."""
        images, places = self.images, self.places
        if name in images.conditions and name not in (TEXT, IMAGE):
            return images.conditions[name].values(places, torch.empty(0), None)
        labels = images.labels
        return None if labels is None or name != LABEL else labels[places.to(labels.device)].cpu()

    def texts(self, index: Tensor) -> list[str | None] | None:
        """Return the captions of rows, int64 [B], None for a missing one; None if the images have no texts."""
        source = self.images.conditions.get(TEXT)
        return source.texts_of(self.places[index]) if isinstance(source, CaptionSource) else None

    def rows(self, index: Tensor) -> Condition:
        """Return the condition of rows, int64 [B]."""
        images = self.images
        places = self.places[index].to(images.device)
        # Only condition images depend on pixels; to read files takes long, and may fail.
        pixels = torch.empty(0, device=images.device)
        if IMAGE in images.conditions:
            pixels = to_model_range(images[places])
        found = images.condition(places, pixels)
        return Condition() if found is None else found

    def values(self, index: Tensor, attributes: Sequence[AttributeDescription]) -> list[Row]:
        """Return the attributes and texts of rows, int64 [B], as plain data, as `encoded_rows` takes them."""
        texts = self.texts(index) or [None] * len(index)
        rows = [{} for _ in texts]
        if attributes:
            rows = attribute_rows(attributes_of(self, index, attributes), attributes)
        return [row if text is None else {**row, TEXT: text} for row, text in zip(rows, texts, strict=True)]


def texts_of(
    condition: ConditionRows | None, rows: Sequence[Row] | None, numbers: Sequence[int]
) -> list[str | None] | None:
    """Return the texts of samples with conditions in turn, None for one without; None without texts.

    Args:
        condition: conditions of consecutive samples.
        rows: their plain data; None if the conditions are those of images.
        numbers: numbers of the samples, such as their seeds.
    """
    if isinstance(condition, ImageRows):
        return condition.texts(in_turn(numbers, len(condition)))
    return None if rows is None else texts_of_rows([rows[number % len(rows)] for number in numbers])


def image_rows(images: Images, count: int) -> ImageRows:
    """Return the conditions of `count` evenly spaced images, of all if there are fewer."""
    return ImageRows(images, spread(len(images), min(len(images), count)))
