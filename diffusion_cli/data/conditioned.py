"""Datasets with the conditions of a model: its condition images, and its texts for their captions."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from diffusion_cli.conditions import AttributeDescription, Conditions, ImageCondition, NoImage
from diffusion_cli.conditions.condition import IMAGE, LABEL, TEXT
from diffusion_cli.data.base import Dataset, Images, NoDataset, Split
from diffusion_cli.data.image_sources import with_image_condition
from diffusion_cli.data.text import TextEncoder
from diffusion_cli.system.downloads import PublishedFile


def image_conditioned(dataset: Dataset, condition: ImageCondition | NoImage | None) -> Dataset:
    """Return a dataset whose splits have the condition images of a model, as `with_image_condition`."""
    unchanged = not isinstance(condition, ImageCondition) and dataset.condition_channels is None
    change = partial(with_image_condition, condition=condition)
    return dataset if unchanged or isinstance(dataset, NoDataset) else _Conditioned(dataset, change)


def text_conditioned(dataset: Dataset, encoder: TextEncoder | None) -> Dataset:
    """Return a dataset whose splits have their captions as texts of a model, encoded when they are read.

    Splits without captions have no texts.

    Args:
        dataset: dataset of the images.
        encoder: encoder of the model; None for a model without texts.
    """
    if encoder is None:
        return dataset
    return _Conditioned(dataset, partial(with_captions, encoder=encoder, cache_dir=None))


def with_captions(images: Images, encoder: TextEncoder, cache_dir: Path | None) -> Images:
    """Set the encoded captions of images as their texts, if they have captions, and return these images.

    All processes must call this together, unless `cache_dir` is None.

    Args:
        images: images of a split.
        encoder: encoder of the texts.
        cache_dir: see `CaptionSource`.
    """
    if images.captions is None:
        return images
    return images.with_conditions(
        {**images.conditions, TEXT: encoder.source(images.captions.texts, cache_dir)}
    )


def lacking(conditions: Conditions, dataset: Dataset, images: Images) -> list[str]:
    """Return the conditions of a model that images lack, or have with other categories.

    Args:
        conditions: the conditions of the model.
        dataset: dataset of the images, which describes their attributes.
        images: images of a split.
    """
    theirs: dict[str, AttributeDescription] = {attribute.name: attribute for attribute in dataset.attributes}
    if LABEL not in theirs and dataset.class_names is not None:
        theirs[LABEL] = Conditions.of_classes(dataset.class_names).attributes[0]
    alike = {
        own.name
        for own in conditions.attributes
        if own.name in theirs and (theirs[own.name].kind, theirs[own.name].values) == (own.kind, own.values)
    }
    there = {*images.conditions} | ({LABEL} if images.labels is not None else set())
    return [name for name in conditions.names if name not in there or name not in alike | {TEXT, IMAGE}]


class _Conditioned(Dataset):
    def __init__(self, dataset: Dataset, change: Callable[[Images], Images]) -> None:
        self.dataset, self.change, self.data_dir = dataset, change, dataset.data_dir
        for name in Dataset.__annotations__:
            setattr(self, name, getattr(dataset, name))

    def load(self, split: Split) -> Images:
        return self.change(self.dataset.load(split))

    def stream(self, split: Split) -> Images:
        return self.change(self.dataset.stream(split))

    def downloads(self) -> Sequence[PublishedFile]:
        return self.dataset.downloads()

    def remarks(self) -> list[str]:
        return self.dataset.remarks()
