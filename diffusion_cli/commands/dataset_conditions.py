"""Conditions of samples from the images of a dataset, for evaluations of models with attributes, texts or images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from diffusion_cli.commands.trained import LoadedModel
from diffusion_cli.conditions import Conditions
from diffusion_cli.conditions.condition import IMAGE, LABEL, TEXT
from diffusion_cli.data import Dataset, Images
from diffusion_cli.data.conditioned import lacking, with_captions
from diffusion_cli.data.image_rows import ImageRows
from diffusion_cli.data.sources import conditions_digest
from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.runs.texts import load_text_encoder


def with_conditions_of(dataset: Dataset, trained: LoadedModel, cache_dir: Path) -> tuple[LoadedModel, str]:
    """Return the model with the conditions of a dataset's images, and a note about them.

    They are those of validation images in a fixed random order, or of training images if there are no others. Samples
    of a model with condition images need validation images. Without the attributes, those of `label=all` stay.

    Args:
        dataset: dataset of the images.
        trained: the model.
        cache_dir: folder for the features of captions.

    Raises:
        UsageError: the images have no captions or condition images, but the model is conditioned on them.
    """
    conditions = trained.model.info.conditions
    assert conditions is not None
    split = "val"
    images = dataset.stream(split)
    if not len(images) and conditions.image is None:
        split = "train"
        images = dataset.stream(split)
    name = f"{dataset.name}/{split}"
    if not len(images):
        raise UsageError("dataset", dataset.name, "has no validation images", "set dataset.val_fraction=0.1")
    encoder = None
    if images.captions is not None:
        encoder = load_text_encoder(trained.model.info, trained.device, trained.folder)
    if encoder is not None:
        with_captions(images, encoder, cache_dir)
    lacks = lacking(conditions, dataset, images)
    if set(lacks) & {TEXT, IMAGE}:
        kind = "condition images" if IMAGE in lacks else "captions"
        remedy = "use the dataset of the run" if IMAGE in lacks else "describe the samples with prompt="
        raise UsageError(
            "dataset", dataset.name, f"has no {kind}, but the model is conditioned on them", remedy
        )
    if lacks:
        return trained, f"conditions: spread evenly, because {name} has no {' or '.join(lacks)} of the model"
    places = torch.from_numpy(np.random.RandomState(0).permutation(len(images)))
    record = trained.record | {"conditions": {"images": name, **_identity(images, conditions)}}
    rows = ImageRows(images, places)
    return replace(trained, condition=rows, rows=None, record=record), f"conditions: those of {name}"


def refuse_chosen(trained: LoadedModel) -> None:
    """Raise UsageError if a command names conditions of a model with condition images."""
    conditions = trained.model.info.conditions
    if conditions is not None and conditions.image is not None and trained.chosen:
        problem = (
            "the model is conditioned on images, so that samples have all conditions of a dataset's images"
        )
        raise UsageError("label", NO_VALUE, problem, "leave label= and prompt= out")


def _identity(images: Images, conditions: Conditions) -> dict[str, str | None]:
    """Return digests of the conditions of images, and of the images if condition images come with them."""
    used = {name: source for name, source in images.conditions.items() if name in conditions.names}
    labels = images.labels if LABEL in conditions.names and LABEL not in used else None
    of_images = {} if conditions.image is None else {"images_sha256": images.fingerprint()}
    return {"sha256": conditions_digest(labels, used), **of_images}
