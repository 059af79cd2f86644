"""The conditions of some images of a split, by row, for samples and previews."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_cli.conditions import AttributeDescription, Condition
from diffusion_cli.conditions.condition import IMAGE, LABEL
from diffusion_cli.conditions.rows import TEXT, Row, attribute_rows
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
        places = self.places[index].to(self.images.device)
        found = self.images.condition(places, to_model_range(self.images[places]))
        return Condition() if found is None else found

    def values(self, attributes: Sequence[AttributeDescription]) -> list[Row]:
        """Return the attributes and texts of all rows as plain data, as `encoded_rows` takes them."""
        columns = {attribute.name: self.get(attribute.name) for attribute in attributes}
        condition = Condition({name: column for name, column in columns.items() if column is not None})
        texts = self.texts(torch.arange(len(self))) or [None] * len(self)
        rows = attribute_rows(condition, attributes) if attributes else [{} for _ in texts]
        return [row if text is None else {**row, TEXT: text} for row, text in zip(rows, texts, strict=True)]


def image_rows(images: Images, count: int) -> ImageRows:
    """Return the conditions of `count` evenly spaced images, of all if there are fewer."""
    return ImageRows(images, spread(len(images), min(len(images), count)))
