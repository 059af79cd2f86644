"""Data of `diffuse train`: latents, training images with their conditions, and what checkpoints store of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from diffusion_cli.commands.inputs import show_remarks
from diffusion_cli.commands.plugin_checks import check_attributes, check_images
from diffusion_cli.commands.train_conditions import refuse_missing_classes
from diffusion_cli.commands.train_texts import has_texts, text_remarks
from diffusion_cli.conditions import ImageCondition
from diffusion_cli.conditions.condition import LABEL
from diffusion_cli.config import TrainConfig, build
from diffusion_cli.data import (
    Dataset,
    Images,
    ResolutionSchedule,
    TextEncoder,
    with_image_condition,
    with_rules,
)
from diffusion_cli.data.base import Split
from diffusion_cli.data.conditioned import with_captions
from diffusion_cli.data.sources import conditions_digest
from diffusion_cli.diffusion.denoiser import NoisyClassifier
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics import cache_folder
from diffusion_cli.runs.find import find_run
from diffusion_cli.runs.schema import CheckpointInfo
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.training.latent_data import (
    LatentDataset,
    LatentSource,
    bundled_latents,
    pretrained_latents,
    resumed_latents,
    run_latents,
)


@dataclass(frozen=True, eq=False)
class TrainingData:
    """The dataset of a training, and the latents of its images.

    It keeps the splits that it has loaded, so it lives only until the training is set up.
    """

    dataset: Dataset
    train_data: Dataset
    """Dataset of the network's inputs: the images, or their latents."""
    latent: LatentSource | None
    """None for pixel space."""

    @classmethod
    def of(
        cls, config: TrainConfig, device: torch.device, folder: Path, before: CheckpointInfo | None
    ) -> "TrainingData":
        """Return the data of a configuration, by the rules of the last checkpoint; UsageError for wrong ones."""
        node = with_rules(config.dataset, before.data_rules) if before else config.dataset
        dataset: Dataset = build(node, config.data_dir)
        check_attributes(config.dataset, dataset)
        if has_texts(config):
            dataset.serve_captions()
        latent = _latents(config, dataset, device, folder, before)
        if latent is None:
            return cls(dataset, dataset, None)
        cache_dir = cache_folder(config.cache_dir)
        return cls(dataset, LatentDataset(dataset, latent.latents, cache_dir, latent.keys), latent)

    @cached_property
    def load(self) -> Callable[[Split], Images]:
        """Function that returns a split of the network's inputs, read once."""
        return cache(self.train_data.load)

    @property
    def captioned(self) -> Callable[[Split], Images]:
        """Function that returns a split with its captions."""
        return self.load if self.latent is None else self.dataset.stream

    def splits(
        self, config: TrainConfig, trains: type[Any], encoder: TextEncoder | None, *, is_new: bool
    ) -> tuple[Images, Images]:
        """Return the training and validation images, or latents, with the conditions of the network.

        All processes must call this together.

        Args:
            config: configuration of the training.
            trains: class of the model in training, such as a denoiser.
            encoder: encoder of the captions; None without.
            is_new: whether the run is new, so that remarks about its captions are printed.

        Raises:
            UsageError: the images cannot be used, or lack classes that the model needs.
        """
        splits = [self.load("train"), self.load("val")]
        if self.latent is None:
            check_images(config.dataset, self.dataset, splits)
        if trains is NoisyClassifier:
            refuse_missing_classes(config, splits)
        return _with_conditions(config, splits, encoder, is_new)


def _latents(
    config: TrainConfig, dataset: Dataset, device: torch.device, folder: Path, before: CheckpointInfo | None
) -> LatentSource | None:
    """Return the latents of the checkpoint, or else of the configuration; None for pixel space."""
    if config.latent.key is None:
        return None
    if before is not None:
        return resumed_latents(folder, before, device)
    if config.latent.pretrained is not None and config.latent.pretrained == config.init.pretrained:
        return bundled_latents(config.latent.pretrained, dataset, device)
    if config.latent.pretrained is not None:
        return pretrained_latents(config.latent.pretrained, dataset, device)
    run = find_run(config.latent.run, config.output_dir, "latent.run")
    try:
        return run_latents(run, str(config.latent.run), dataset, device)
    except UsageError as error:
        raise error.renamed({run: f"latent.run={config.latent.run}"}) from error


def _with_conditions(
    config: TrainConfig, splits: Sequence[Images], encoder: TextEncoder | None, is_new: bool
) -> tuple[Images, Images]:
    """Return the images of the splits with their condition images and encoded captions."""
    image = build(config.condition)
    images, val_images = (with_image_condition(split, image) for split in splits)
    if encoder is not None:
        for split in (images, val_images):
            with_captions(split, encoder, cache_folder(config.cache_dir))
        if is_new and Distributed().is_main:
            show_remarks(text_remarks(images, encoder))
    return images, val_images


def resolution_schedule(config: TrainConfig, dataset: Dataset) -> ResolutionSchedule:
    """Return the resolution stages of a run.

    Raises UsageError for progressive resolution of point clouds, masks or condition images, and as
    `ResolutionSchedule.from_sizes`.
    """
    sizes, steps = config.progressive, config.stage_steps
    if sizes is not None and not dataset.form.ordered:
        raise UsageError("progressive", sizes, "not supported for point clouds", "leave it out")
    if sizes is not None and dataset.has_masks:
        raise UsageError(
            "progressive",
            sizes,
            "not supported for images with masks, because labels cannot be averaged",
            "leave it out, or train on images without masks",
        )
    if sizes is not None and isinstance(build(config.condition), ImageCondition):
        problem = "not supported with condition=image, because masks and noise cannot be averaged"
        raise UsageError("progressive", sizes, problem, "leave one of them out")
    if steps is None and sizes is not None:
        assert config.max_steps is not None
        steps = [config.max_steps // len(sizes)] * (len(sizes) - 1)
    return ResolutionSchedule.from_sizes(
        dataset.shape, config.batch_size, sizes, steps or [], config.stage_batch
    )


def data_info(data: TrainingData, images: Images, val_images: Images) -> dict[str, Any]:
    """Return the entries of a checkpoint that identify the data."""
    dataset, latents = data.dataset, data.train_data
    labels = None if images.labels is None else images.labels.cpu()
    fingerprints = f"{images.fingerprint()} {val_images.fingerprint()}"
    return {
        "num_images": len(images),
        "shape": dataset.shape,
        "form": dataset.form,
        "num_classes": dataset.num_classes,
        "class_names": tuple(dataset.class_names) if dataset.class_names else None,
        "class_counts": None
        if labels is None
        else labels[labels >= 0].bincount(minlength=dataset.num_classes or 0).tolist(),
        "data_rules": dataset.rules,
        "data_sha256": Distributed().broadcast(sha256(fingerprints.encode()).hexdigest()),
        "labels_sha256": conditions_digest(labels, images.conditions),
        "missing_conditions": tuple(sorted(_missing(images))),
        "latent": data.latent.info(latents) if data.latent and isinstance(latents, LatentDataset) else None,
    }


def _missing(images: Images) -> Iterator[str]:
    """Yield the names of the conditions that some images lack."""
    if images.labels is not None and bool((images.labels < 0).any()):
        yield LABEL
    yield from (name for name, source in images.conditions.items() if source.has_missing())
