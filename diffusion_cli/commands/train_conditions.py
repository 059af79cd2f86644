"""Conditions of a network in training: what its dataset has, and what the network and its task can use."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from diffusion_cli.conditions import Conditions, ImageCondition, TextDescription
from diffusion_cli.config import TrainConfig, build
from diffusion_cli.config.validate import target
from diffusion_cli.data import Dataset, Images
from diffusion_cli.data.attributes import KEY
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.errors import NO_VALUE, UsageError


def described(
    config: TrainConfig, dataset: Dataset, trains: type[Any], text: TextDescription | None = None
) -> Conditions | int | None:
    """Return what a network is built with: its conditions, or the number of classes if it has no others.

    Args:
        config: configuration of the training.
        dataset: dataset of the images.
        trains: class of the model in training, such as a denoiser.
        text: form of the encoded captions; None without texts.

    Raises:
        UsageError: there are conditions that the network or the task cannot use.
    """
    channels = image_channels(config, dataset, trains)
    attributes = dataset.attributes
    if (channels, text) != (None, None) and not attributes and dataset.class_names:
        attributes = Conditions.of_classes(dataset.class_names).attributes
    conditions = Conditions(attributes=attributes, image=channels, text=text)
    if conditions.only_classes:
        return dataset.num_classes
    names = f"[{','.join(conditions.names)}]"
    if trains is not Denoiser:
        problem = f"a model of task={trains.task} learns from classes alone"
        raise UsageError(KEY, names, problem, "choose one column of classes, or leave it out")
    if not getattr(target(config.model), "takes_conditions", False):
        problem = f"{target(config.model).__name__} takes class labels alone"
        if channels is not None:
            raise UsageError("condition", "image", problem, "set condition=none, or choose another model=")
        raise UsageError(KEY, names, problem, "choose one column of classes, or another model=")
    return conditions


def refuse_missing_classes(config: TrainConfig, splits: Sequence[Images]) -> None:
    """Raise UsageError if images to train a classifier on have no class."""
    labels = [images.labels for images in splits if images.labels is not None]
    missing = sum(int((each < 0).sum()) for each in labels)
    if missing:
        problem = f"{missing} of {sum(map(len, labels))} images have no class, which task=classifier needs"
        shown = config.dataset.get("label") or NO_VALUE
        raise UsageError(KEY, shown, problem, "complete the column, or remove these images")


def image_channels(config: TrainConfig, dataset: Dataset, trains: type[Any]) -> int | None:
    """Return the channels of the condition image; None without one.

    Raises UsageError for a task without condition images, and as `ImageCondition.channels`.
    """
    condition = build(config.condition)
    if not isinstance(condition, ImageCondition):
        return None
    if trains is not Denoiser:
        problem = f"does not apply to task={trains.task}"
        raise UsageError("condition", "image", problem, "set condition=none")
    return condition.channels(dataset.shape, dataset.condition_channels, dataset.has_masks)


def mirrored_conditions(dataset: Dataset, network: nn.Module) -> list[str]:
    """Return a remark if training mirrors images whose attributes or captions may name left and right."""
    conditions = stored_conditions(network)
    if not dataset.flip or conditions is None or not (conditions.attributes or conditions.text):
        return []
    return [
        "dataset.flip=true: half of the images are mirrored, but not their attributes and captions; set "
        "dataset.flip=false if these name left or right"
    ]


def stored_conditions(network: nn.Module) -> Conditions | None:
    """Return the conditions of a network for its checkpoints; None for classes alone, and without conditions."""
    conditions: Conditions | None = getattr(network, "conditions", None)
    return None if conditions is None or conditions.only_classes else conditions
