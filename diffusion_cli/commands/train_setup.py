"""Build the model, data and objective of `diffuse train` from its configuration."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from diffusion_cli.commands.first_weights import read_weights
from diffusion_cli.commands.inputs import show_remarks
from diffusion_cli.commands.plugin_checks import check_attributes, check_images, check_network
from diffusion_cli.commands.train_checks import check_data, check_shares
from diffusion_cli.commands.train_conditions import (
    described,
    refuse_missing_classes,
    stored_conditions,
)
from diffusion_cli.commands.train_texts import text_encoder, text_remarks
from diffusion_cli.conditions import ImageCondition, TextDescription
from diffusion_cli.conditions.condition import LABEL
from diffusion_cli.config import TrainConfig, build
from diffusion_cli.config.validate import validate
from diffusion_cli.data import Dataset, Images, ResolutionSchedule, with_image_condition, with_rules
from diffusion_cli.data.conditioned import with_captions
from diffusion_cli.data.sources import conditions_digest
from diffusion_cli.diffusion.denoiser import Denoiser, NoiseConditioned, NoisyClassifier
from diffusion_cli.diffusion.latents import Pixels, Space
from diffusion_cli.diffusion.objectives import Objective
from diffusion_cli.diffusion.time_sampling import Times
from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.metrics import cache_folder
from diffusion_cli.networks import AutoencoderKL
from diffusion_cli.runs.find import find_run
from diffusion_cli.runs.lora import BASE, read_base
from diffusion_cli.runs.schema import CheckpointInfo, InitInfo, LatentInfo, LoraInfo, StageInfo
from diffusion_cli.samplers import Sampler
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.precision import NumberFormat, resolve
from diffusion_cli.system.seeding import mix
from diffusion_cli.training.autoencoder_loss import Autoencoding, ReconstructionLoss
from diffusion_cli.training.autoencoding import AutoencodingModule
from diffusion_cli.training.device import Device
from diffusion_cli.training.initialization import freeze
from diffusion_cli.training.latent_data import (
    LatentDataset,
    LatentSource,
    bundled_latents,
    pretrained_latents,
    resumed_latents,
    run_latents,
)
from diffusion_cli.training.lora import add_adapters
from diffusion_cli.training.module import DenoisingModule, TrainingModule
from diffusion_cli.training.optimizers import Optimization


class DenoisingTask(NamedTuple):
    """Model, objective, time distribution and sampler of a denoiser or noisy classifier."""

    model: NoiseConditioned
    objective: Objective[Any]
    times: Times
    sampler: Sampler


class AutoencoderTask(NamedTuple):
    """Model and objective of an autoencoder."""

    model: Autoencoding
    objective: ReconstructionLoss


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """The objects built from a training configuration, and the information stored in checkpoints."""

    config: TrainConfig
    """The configuration, with the values that follow from the data."""
    dataset: Dataset
    train_data: Dataset
    """Dataset of the network's inputs: the images, or their latents."""
    latent: LatentSource | None
    task: DenoisingTask | AutoencoderTask
    optimization: Optimization
    device: Device
    stages: ResolutionSchedule
    images: Images
    """Training images, or latents."""
    val_images: Images
    precision: NumberFormat
    max_steps: int | None
    """Optimizer steps, or None without a limit."""
    info: CheckpointInfo

    @property
    def space(self) -> Space:
        """Pixel space or latent space of the network."""
        return Pixels(self.dataset.shape) if self.latent is None else self.latent.latents

    @property
    def label_counts(self) -> list[int] | None:
        """Training images of each class; None if the model is trained without labels."""
        conditional = getattr(self.task.model, "num_classes", None) is not None
        return self.info.class_counts if conditional else None


def set_up(config: TrainConfig, folder: Path, before: CheckpointInfo | None) -> TrainingSetup:
    """Build the objects of a training configuration.

    Args:
        config: validated configuration.
        folder: run folder.
        before: `diffuse` entry of the last checkpoint; None for a new run.

    Raises:
        UsageError: if two parts are incompatible, or the data differ from those of the checkpoint.
    """
    dataset: Dataset = build(
        with_rules(config.dataset, before.data_rules) if before else config.dataset, config.data_dir
    )
    check_attributes(config.dataset, dataset)
    device: Device = build(config.trainer)
    objective: Objective[Any] | ReconstructionLoss = build(config.objective)
    latent = _latents(config, dataset, device.torch_device, folder, before)
    train_data = dataset
    if latent is not None:
        train_data = LatentDataset(dataset, latent.latents, cache_folder(config.cache_dir), latent.keys)
    trains = Autoencoding if isinstance(objective, ReconstructionLoss) else objective.trains
    source = None if before else read_weights(config, trains.task)
    if source is not None:
        config = source.with_its_levels(config, train_data.shape)
    load = cache(train_data.load)  # before the network only for its texts
    load_captions = load if latent is None else dataset.stream
    encoder = text_encoder(config, dataset, trains, device.torch_device, before, load_captions)
    network = _network(config, dataset, train_data, trains, None if encoder is None else encoder.description)
    check_network(config.model, network, train_data.shape)
    if isinstance(objective, ReconstructionLoss):
        task = _autoencoder_task(config, network, objective, dataset)
    else:
        task = _denoising_task(config, network, objective)
    text_state = None if encoder is None else encoder.state
    init = before.init if before else source and source.fill(config, network, train_data, text_state)
    if config.init.freeze is not None:
        freeze(network, config.init.freeze)
        _check_last_layer(task)
    lora = None if config.lora.rank is None else _add_adapters(config, network, init, folder, before)
    # A resumed run uses the stages and the precision of its start, even if the budget or the machine has changed.
    stages = (before and before.resolution_schedule) or resolution_schedule(config, train_data)
    stored_precision = before.precision if before and config.precision == "auto" else None
    precision = stored_precision or resolve(config.precision, device.torch_device)
    check_shares(stages, config.accumulate_grad_batches, Distributed().world)
    splits = [load("train"), load("val")]
    if latent is None:
        check_images(config.dataset, dataset, splits)
    if trains is NoisyClassifier:
        refuse_missing_classes(config, splits)
    image = build(config.condition)
    images, val_images = (with_image_condition(split, image) for split in splits)
    if encoder is not None:
        for split in (images, val_images):
            with_captions(split, encoder, cache_folder(config.cache_dir))
        if before is None and Distributed().is_main:
            show_remarks(text_remarks(images, encoder))
    entries = _data_info(dataset, images, val_images) | {
        "task": task.model.task,
        "conditions": stored_conditions(network),
        "text": text_state,
        "config": config.model_dump(),
        "latent": _latent_info(latent, train_data),
        "stages": [StageInfo(**stage._asdict()) for stage in stages.all] if stages.grow else None,
        "precision": precision,
        "init": init,
        "lora": lora,
    }
    info, problems = validate(CheckpointInfo, entries)
    if problems:
        raise UsageError.several(problems)
    if before:
        check_data(folder, info, before)
    return TrainingSetup(
        config=config,
        dataset=dataset,
        train_data=train_data,
        latent=latent,
        task=task,
        optimization=Optimization(config.optimizer, config.lr_schedule, config.clip_norm),
        device=device,
        stages=stages,
        images=images,
        val_images=val_images,
        precision=precision,
        max_steps=_max_steps(config, stages, len(images)),
        info=info,
    )


def training_module(setup: TrainingSetup, seed: int) -> TrainingModule:
    """Return the LightningModule of the task."""
    if isinstance(setup.task, AutoencoderTask):
        return AutoencodingModule(*setup.task, setup.optimization, seed, setup.info)
    model, objective, times, _ = setup.task
    return DenoisingModule(
        model, objective, times, setup.space, setup.optimization, seed=seed, info=setup.info
    )


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


def _network(
    config: TrainConfig,
    dataset: Dataset,
    train_data: Dataset,
    trains: type[Any],
    text: TextDescription | None,
) -> nn.Module:
    """Build the network with initial weights from the seed; UsageError if it is incompatible with the data."""
    classifies = trains is NoisyClassifier
    conditional = config.model.get("class_conditional") and not dataset.attributes
    if dataset.missing_classes and (classifies or conditional):
        key = "task=classifier" if classifies else "model.class_conditional=true"
        problem = f"the dataset has no classes: {dataset.missing_classes}"
        raise UsageError(key, NO_VALUE, problem, "use a dataset with classes, or train without them")
    conditions = described(config, dataset, trains, text)
    torch.manual_seed(mix(config.seed, "weights"))
    network = build(config.model, train_data.shape, conditions)
    if getattr(network, "ordered", True) and not train_data.form.ordered:
        raise UsageError(
            "model",
            NO_VALUE,
            "this network is not permutation invariant, so it cannot model point clouds",
            "use model=set_tiny with task=diffusion",
        )
    return network


def _add_adapters(
    config: TrainConfig,
    network: nn.Module,
    init: InitInfo | None,
    folder: Path,
    before: CheckpointInfo | None,
) -> LoraInfo:
    """Add low-rank adapters to a network; a resumed run gets its frozen weights.

    Raises UsageError if the frozen weights cannot be read, and as `add_adapters`.
    """
    rank, alpha, targets = config.lora.rank, config.lora.alpha, config.lora.targets
    assert rank is not None
    assert init is not None
    if before is not None and before.lora is not None:
        with suppress(RuntimeError):  # of other shapes, which the comparison below finds
            network.load_state_dict(read_base(folder, before.lora), strict=False)
    torch.manual_seed(mix(config.seed, "lora"))
    lora = add_adapters(network, rank, alpha, targets, init.new)
    if before is not None and before.lora != lora:
        problem = "has other frozen weights than this run"
        raise UsageError(folder / BASE, NO_VALUE, problem, "restore it, or start again with another name=")
    return lora


def _check_last_layer(task: DenoisingTask | AutoencoderTask) -> None:
    """Raise UsageError if a discriminator needs gradients of a layer that `init.freeze` leaves unchanged."""
    if isinstance(task, DenoisingTask) or task.model.discriminator is None:
        return
    if not task.model.network.decoder.conv_out.weight.requires_grad:
        problem = "objective.discriminator_start needs gradients of this layer"
        raise UsageError("init.freeze", "decoder.conv_out", problem, "do not freeze it")


def _autoencoder_task(
    config: TrainConfig, network: nn.Module, objective: ReconstructionLoss, dataset: Dataset
) -> AutoencoderTask:
    if config.eval_every is not None:
        raise UsageError("eval_every", config.eval_every, "an autoencoder makes no samples", "leave it out")
    if config.progressive is not None:
        raise UsageError(
            "progressive", config.progressive, "not supported for task=autoencoder", "leave it out"
        )
    if not isinstance(network, AutoencoderKL):
        problem = "has a codebook, which is not trained here"
        raise UsageError(
            "model", type(network).__name__, problem, "use model=kl_tiny, or another AutoencoderKL"
        )
    return AutoencoderTask(objective.model(network, dataset.shape), objective)


def _denoising_task(config: TrainConfig, network: nn.Module, objective: Objective[Any]) -> DenoisingTask:
    schedule = build(config.schedule)
    sampler: Sampler = build(config.sampler, schedule)
    model = objective.trains(network, schedule, build(config.parameterization))
    times: Times = build(config.time_sampling)
    times.check(schedule)
    objective.check(model, times)
    if isinstance(model, Denoiser):
        try:  # fail now instead of at the first preview
            sampler.grid(config.preview_steps)
        except UsageError as error:
            raise error.renamed({"steps": "preview_steps"}) from error
        if config.eval_every is not None:
            try:
                sampler.grid(config.eval_steps)
            except UsageError as error:
                raise error.renamed({"steps": "eval_steps"}) from error
        sampler.check(model)
    return DenoisingTask(model, objective, times, sampler)


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


def _max_steps(config: TrainConfig, stages: ResolutionSchedule, num_images: int) -> int | None:
    limits = [config.max_steps] if config.max_steps else []
    limits += [stages.steps(config.max_epochs * num_images)] if config.max_epochs else []
    return min(limits, default=None)


def _latent_info(latent: LatentSource | None, train_data: Dataset) -> LatentInfo | None:
    if latent is None:
        return None
    assert isinstance(train_data, LatentDataset)
    return latent.info(train_data)


def _data_info(dataset: Dataset, images: Images, val_images: Images) -> dict[str, Any]:
    """Return the entries of a checkpoint that identify the data."""
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
    }


def _missing(images: Images) -> Iterator[str]:
    """Yield the names of the conditions that some images lack."""
    if images.labels is not None and bool((images.labels < 0).any()):
        yield LABEL
    yield from (name for name, source in images.conditions.items() if source.has_missing())
