"""Texts of a training: the encoder of its captions, and the encoded captions of its images."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from diffusion_cli.config import TrainConfig, build
from diffusion_cli.config.catalogue import option_of
from diffusion_cli.config.validate import target
from diffusion_cli.data import Dataset, Images, NoText, TextCondition, TextEncoder
from diffusion_cli.data.base import Split
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.errors import NO_VALUE, UsageError, counted
from diffusion_cli.runs.schema import CheckpointInfo
from diffusion_cli.runs.texts import load_text_encoder


def has_texts(config: TrainConfig) -> bool:
    """Return whether a model is trained on captions."""
    return config.text is not None and not isinstance(build(config.text), NoText)


def text_encoder(
    config: TrainConfig,
    dataset: Dataset,
    trains: type[Any],
    device: torch.device,
    before: CheckpointInfo | None,
    load: Callable[[Split], Images],
) -> TextEncoder | None:
    """Return the encoder of a run's texts: that of its checkpoint, or one for the training captions; None without.

    All processes must call this together.

    Args:
        config: configuration of the training.
        dataset: dataset of the images.
        trains: class of the model in training, such as a denoiser.
        device: device of a frozen encoder.
        before: `diffuse` entry of the last checkpoint; None for a new run.
        load: returns the images of a split with their captions.

    Raises:
        UsageError: the dataset, the network or the task has no use for texts, or as `TextCondition.fitted`.
    """
    if not has_texts(config):
        return None
    text: TextCondition = build(config.text)
    option = option_of("text", config.text or {}) or NO_VALUE
    if trains is not Denoiser:
        raise UsageError("text", option, f"a model of task={trains.task} has no texts", "use text=none")
    if not getattr(target(config.model), "takes_conditions", False):
        problem = f"{target(config.model).__name__} takes class labels alone"
        raise UsageError("text", option, problem, "use text=none, or another model=")
    if not dataset.captions:
        problem = f"the images have no captions: {dataset.missing_captions}"
        raise UsageError("text", option, problem, "use a dataset with captions, or text=none")
    if before is not None:
        return load_text_encoder(before, device, None)
    encoder = text.fitted(_captions(load("train")), device)
    assert encoder is not None
    return encoder


def text_remarks(images: Images, encoder: TextEncoder) -> list[str]:
    """Return remarks about the captions of the training images, one line each."""
    remarks = [] if images.captions is None else images.captions.remarks()
    if cut := encoder.cut(_captions(images)):
        length = encoder.description.length
        remarks.append(f"text.length={length}: the ends of {counted(cut, 'longer caption')} are cut")
    return remarks


def _captions(images: Images) -> Iterator[str]:
    """Yield the captions of images."""
    if images.captions is not None:
        for texts in images.captions.texts:
            yield from texts
