"""Conditions of a network in training: what its dataset has, and what the network and its task can use."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from diffusion_cli.conditions import Conditions, ImageCondition, TextDescription
from diffusion_cli.conditions.condition import AUGMENTATION
from diffusion_cli.config import TrainConfig, build
from diffusion_cli.config.validate import target
from diffusion_cli.data import Dataset, EDMAugmentation, Images
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
    augmentation = augmentation_size(config, dataset, trains)
    attributes = dataset.attributes
    if (channels, text, augmentation) != (None, None, None) and not attributes and dataset.class_names:
        attributes = Conditions.of_classes(dataset.class_names).attributes
    conditions = Conditions(attributes=attributes, image=channels, text=text, augmentation=augmentation)
    if conditions.only_classes:
        return dataset.num_classes if augmentation is None else conditions
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


def augmentation_size(config: TrainConfig, dataset: Dataset, trains: type[Any]) -> int | None:
    """Return the number of parameters of the augmentation, an input of the network; None without augmentation.

    Raises UsageError for a task, a network or images without such transforms, and if images would be flipped twice.
    """
    augmentation = build(config.augmentation)
    if not isinstance(augmentation, EDMAugmentation):
        return None
    network = target(config.model)
    reasons = [
        (trains is not Denoiser, f"does not apply to task={trains.task}"),
        (config.latent.key, f"{config.latent.key} trains on latents, which cannot be transformed as images"),
        (config.coupling == "ot", "coupling=ot would let the noise depend on the transforms"),
        (
            isinstance(build(config.condition), ImageCondition),
            "condition=image would need the same transforms",
        ),
        (len(dataset.shape) != 3 or not dataset.form.ordered, "applies to images alone"),
        (dataset.has_masks, "the labels of dataset.masks cannot be interpolated"),
        (
            not getattr(network, "takes_augmentation", False),
            f"{network.__name__} has no input for the transforms",
        ),
        (AUGMENTATION in (each.name for each in dataset.attributes), "an attribute has the same name"),
    ]
    for reason in (reason for applies, reason in reasons if applies):
        raise UsageError("augmentation", "edm", reason, "set augmentation=none")
    if augmentation.x_flip and augmentation.probability > 0 and dataset.flip:
        problem = "flips images that augmentation.x_flip=true flips too"
        remedy = "set it to false for samples like the images, or set augmentation.x_flip=false for mirrored ones too"
        raise UsageError("dataset.flip", True, problem, remedy)
    return augmentation.size


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
    """Return the conditions of a network for its checkpoints; None for classes alone, and without conditions.

    The augmentation is stored apart, because samples do not have it.
    """
    conditions: Conditions | None = getattr(network, "conditions", None)
    if conditions is None or conditions.only_classes:
        return None
    return conditions.model_copy(update={"augmentation": None})
