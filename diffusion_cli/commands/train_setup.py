"""Build the model, data and objective of `diffuse train` from its configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_cli.commands.first_weights import check_copy, check_teacher, read_weights
from diffusion_cli.commands.inputs import show_remarks
from diffusion_cli.commands.train_checks import check_data, check_shares
from diffusion_cli.commands.train_conditions import mirrored_conditions
from diffusion_cli.commands.train_data import TrainingData, data_info, resolution_schedule
from diffusion_cli.commands.train_network import add_lora, network_of
from diffusion_cli.commands.train_tasks import (
    AutoencoderTask,
    Loss,
    Task,
    check_frozen,
    model_info,
    task_of,
    trained_class,
)
from diffusion_cli.commands.train_texts import text_encoder
from diffusion_cli.config import TrainConfig, build
from diffusion_cli.config.validate import validate
from diffusion_cli.data import Dataset, EDMAugmentation, Images, ResolutionSchedule
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.latents import Pixels, Space
from diffusion_cli.diffusion.objectives import FewStep
from diffusion_cli.errors import UsageError
from diffusion_cli.runs.schema import CheckpointInfo, StageInfo
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.precision import NumberFormat, resolve
from diffusion_cli.training.autoencoding import AutoencodingModule
from diffusion_cli.training.device import Device
from diffusion_cli.training.initialization import freeze
from diffusion_cli.training.latent_data import LatentSource
from diffusion_cli.training.module import DenoisingModule, TrainingModule
from diffusion_cli.training.optimizers import Optimization


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """The objects built from a training configuration, and the information stored in checkpoints."""

    config: TrainConfig
    """The configuration, with the values that follow from the data."""
    dataset: Dataset
    """Dataset of the images."""
    latent: LatentSource | None
    """Source of the latents; None for pixel space."""
    task: Task
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
    def augmentation(self) -> EDMAugmentation | None:
        """Augmentation of the training images; None without."""
        augmentation = build(self.config.augmentation)
        return augmentation if isinstance(augmentation, EDMAugmentation) else None

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
    device: Device = build(config.trainer)
    objective: Loss = build(config.objective)
    data = TrainingData.of(config, device.torch_device, folder, before)
    trains = trained_class(objective)
    source = None if before else read_weights(config, trains.task)
    distils = before is None and isinstance(objective, FewStep) and objective.has_teacher
    if distils:
        check_teacher(source, config)
    if source is not None:
        config = source.with_its_levels(config, data.train_data.shape)
    encoder = text_encoder(config, data.dataset, trains, device.torch_device, before, data.captioned)
    network = network_of(config, data, trains, encoder)
    if before is None and Distributed().is_main:
        show_remarks(mirrored_conditions(data.dataset, network))
    task = task_of(config, network, objective, data.dataset)
    text_state = None if encoder is None else encoder.state
    init = before.init if before else source and source.fill(config, network, data.train_data, text_state)
    if distils and source is not None and init is not None and isinstance(task.model, Denoiser):
        check_copy(source, config, init, task.model.conditions)
    if config.init.freeze is not None:
        freeze(network, config.init.freeze)
        if before is None:  # else the weights are not read yet
            check_frozen(task)
    lora = None if config.lora.rank is None else add_lora(config, network, init, folder, before)
    stages, precision = _stages_and_precision(config, data.train_data, device, before)
    images, val_images = data.splits(config, trains, encoder, is_new=before is None)
    entries = data_info(data, images, val_images) | model_info(task, network) | {
        "config": config.model_dump(), "text": text_state, "precision": precision, "init": init, "lora": lora,
        "stages": [StageInfo(**stage._asdict()) for stage in stages.all] if stages.grow else None,
    }  # fmt: skip
    return TrainingSetup(
        config=config,
        dataset=data.dataset,
        latent=data.latent,
        task=task,
        optimization=Optimization(config.optimizer, config.lr_schedule, config.clip_norm),
        device=device,
        stages=stages,
        images=images,
        val_images=val_images,
        precision=precision,
        max_steps=_max_steps(config, stages, len(images)),
        info=_info(entries, folder, before),
    )


def _stages_and_precision(
    config: TrainConfig, train_data: Dataset, device: Device, before: CheckpointInfo | None
) -> tuple[ResolutionSchedule, NumberFormat]:
    """Return the resolution stages and the number format of a run.

    A resumed run uses those of its start, even if the budget or the machine has changed.
    """
    stages = (before and before.resolution_schedule) or resolution_schedule(config, train_data)
    stored = before.precision if before and config.precision == "auto" else None
    precision = stored or resolve(config.precision, device.torch_device)
    check_shares(stages, config.accumulate_grad_batches, Distributed().world)
    return stages, precision


def _info(entries: Mapping[str, Any], folder: Path, before: CheckpointInfo | None) -> CheckpointInfo:
    """Return the `diffuse` entry of checkpoints; UsageError if the data differ from those of the last one."""
    info, problems = validate(CheckpointInfo, entries)
    if problems:
        raise UsageError.several(problems)
    if before:
        check_data(folder, info, before)
    return info


def training_module(setup: TrainingSetup, seed: int) -> TrainingModule:
    """Return the LightningModule of the task."""
    if isinstance(setup.task, AutoencoderTask):
        return AutoencodingModule(*setup.task, setup.optimization, seed, setup.info)
    model, objective, times, _ = setup.task
    return DenoisingModule(
        model,
        objective,
        times,
        setup.space,
        setup.optimization,
        seed=seed,
        info=setup.info,
        coupling=setup.config.coupling,
        augmentation=setup.augmentation,
    )


def _max_steps(config: TrainConfig, stages: ResolutionSchedule, num_images: int) -> int | None:
    limits = [config.max_steps] if config.max_steps else []
    limits += [stages.steps(config.max_epochs * num_images)] if config.max_epochs else []
    return min(limits, default=None)
