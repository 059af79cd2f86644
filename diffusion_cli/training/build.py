"""From a configuration to the parts of a training: what is trained on what, what watches, and the Trainer."""

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from diffusion_cli.config import TrainConfig, build, fingerprint
from diffusion_cli.data import (
    Batch,
    Dataset,
    Images,
    ResolutionSchedule,
    as_begun,
    pictured,
    reduced,
    spread,
    to_device,
    to_model_range,
)
from diffusion_cli.data.class_shares import label_settings, labels_in_turn
from diffusion_cli.diffusion.denoiser import Denoiser, NoiseConditioned, NoisyClassifier
from diffusion_cli.diffusion.latents import Pixels, Space
from diffusion_cli.diffusion.objectives import Objective
from diffusion_cli.diffusion.time_sampling import Times
from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.metrics import FeatureExtractors, Metric, Reference, cache_folder
from diffusion_cli.runs.schema import CheckpointInfo
from diffusion_cli.samplers import Sampler
from diffusion_cli.system.compat import keep_signal_handlers
from diffusion_cli.system.seeding import mix
from diffusion_cli.training.autoencoder_loss import Autoencoding, ReconstructionLoss
from diffusion_cli.training.autoencoding import AutoencodingModule, ReconstructionPreview
from diffusion_cli.training.callbacks import (
    GracefulStop,
    Preview,
    ValidationAccuracy,
    ValidationLoss,
    WholeFileIO,
)
from diffusion_cli.training.device import Device
from diffusion_cli.training.ema import EMA
from diffusion_cli.training.evaluation import EvaluationCallback, TrainingSamples
from diffusion_cli.training.latent_data import LatentDataset, LatentSource, chosen_latents
from diffusion_cli.training.module import DenoisingModule, TrainingModule
from diffusion_cli.training.optimizers import OptimizerConfig

PICTURES = 32
"""Images whose reconstructions are shown."""


class DenoisingTask(NamedTuple):
    """What a denoiser or classifier learns of noised images."""

    model: NoiseConditioned
    objective: Objective[Any]
    times: Times
    sampler: Sampler


class AutoencoderTask(NamedTuple):
    """What an autoencoder learns by."""

    model: Autoencoding
    objective: ReconstructionLoss


class TrainingSetup(NamedTuple):
    """What a configuration is made of."""

    dataset: Dataset
    train_data: Dataset
    """What the network sees of it: the images themselves, or their latents."""
    latent: LatentSource | None
    task: DenoisingTask | AutoencoderTask
    optimizer: OptimizerConfig
    device: Device

    @property
    def conditional(self) -> bool:
        """Whether the model is trained with labels."""
        return getattr(self.task.model, "num_classes", None) is not None

    @property
    def space(self) -> Space:
        """Where the network works."""
        return Pixels(self.dataset.shape) if self.latent is None else self.latent.latents


def assemble(config: TrainConfig, folder: Path, before: CheckpointInfo | None) -> TrainingSetup:
    """Build everything but the images; ValueError where two parts do not go together.

    `before` is what the checkpoint in the run's `folder` says of itself, None at its beginning.
    """
    node = config.dataset if before is None else as_begun(config.dataset, before.data_rules)
    dataset: Dataset = build(node, config.data_dir)
    device: Device = build(config.trainer)
    objective = build(config.objective)
    noised = config.schedule is not None
    if isinstance(objective, ReconstructionLoss) == noised:
        if noised:
            raise UsageError(
                "objective", "autoencoder", "adds no noise", "leave it out, or take task=autoencoder"
            )
        raise UsageError(
            "objective",
            type(objective).__name__,
            "adds noise, and an autoencoder's images have none",
            "leave it out, or take task=diffusion",
        )
    latent = chosen_latents(config, dataset, device.torch_device, folder, before)
    shown = dataset
    if latent is not None:
        shown = LatentDataset(dataset, latent.latents, cache_folder(config.cache_dir), latent.keys)
    classifies = getattr(objective, "trains", None) is NoisyClassifier
    if dataset.missing_classes and (classifies or config.model.get("class_conditional")):
        key = "task=classifier" if classifies else "model.class_conditional=true"
        raise UsageError(key, NO_VALUE, f"the data set has no classes to learn: {dataset.missing_classes}")
    torch.manual_seed(mix(config.seed, "weights"))
    network = build(config.model, shown.shape, dataset.num_classes)
    if getattr(network, "ordered", True) and not shown.form.ordered:
        raise UsageError(
            "model",
            type(network).__name__,
            "goes by the order of points, and those of a set have none",
            "take model=set_tiny, for task=diffusion",
        )
    task = _process(config, network, objective) if noised else _encoding(config, network, objective, dataset)
    return TrainingSetup(dataset, shown, latent, task, build(config.optimizer), device)


def _encoding(
    config: TrainConfig, network: nn.Module, objective: ReconstructionLoss, dataset: Dataset
) -> AutoencoderTask:
    if config.eval_every is not None:
        raise UsageError("eval_every", config.eval_every, "an autoencoder makes no samples", "leave it out")
    if config.progressive is not None:
        raise UsageError(
            "progressive", config.progressive, "is for what noised images are shown to", "leave it out"
        )
    return AutoencoderTask(objective.model(network, dataset.shape), objective)


def _process(config: TrainConfig, network: nn.Module, objective: Objective[Any]) -> DenoisingTask:
    schedule = build(config.schedule)
    sampler: Sampler = build(config.sampler, schedule)
    model = objective.trains(network, schedule, build(config.parameterization))
    times: Times = build(config.time_sampling)
    times.check(schedule)
    objective.check(model, times)
    if isinstance(model, Denoiser):
        try:  # refused now rather than at the first preview
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


def module_of(config: TrainConfig, parts: TrainingSetup, info: CheckpointInfo) -> TrainingModule:
    """The LightningModule of a task."""
    if isinstance(parts.task, AutoencoderTask):
        return AutoencodingModule(*parts.task, parts.optimizer, config.seed, info)
    model, objective, times, _ = parts.task
    return DenoisingModule(model, objective, times, parts.space, parts.optimizer, seed=config.seed, info=info)


def stages_of(config: TrainConfig, dataset: Dataset) -> ResolutionSchedule:
    """The sizes of a run's images; UsageError for point clouds and masks, and as `ResolutionSchedule.from_sizes`."""
    sizes, steps = config.progressive, config.stage_steps
    if sizes is not None and not dataset.form.ordered:
        raise UsageError(
            "progressive", sizes, "points lie in no order in which to take their means", "leave it out"
        )
    if sizes is not None and config.dataset.get("masks") is not None:
        raise UsageError(
            "progressive",
            sizes,
            "the mean of two labels of dataset.masks is a third",
            "leave one of them out",
        )
    if steps is None and sizes is not None:
        assert config.max_steps is not None
        steps = [config.max_steps // len(sizes)] * (len(sizes) - 1)
    return ResolutionSchedule.from_sizes(
        dataset.shape, config.batch_size, sizes, steps or [], config.stage_batch
    )


def periodic_callbacks(
    config: TrainConfig,
    folder: Path,
    parts: TrainingSetup,
    stages: ResolutionSchedule,
    *,
    ema: EMA,
    stop: GracefulStop,
    val: Images,
    class_counts: list[int] | None,
) -> list[Callback]:
    """What looks at the averaged weights on the way: their loss on validation images, and what the model is for.

    `class_counts` are the training images of each class, None without classes.
    """
    part = config.batch_size // config.accumulate_grad_batches
    watchers: list[Callback] = []
    if val:
        once = _once(val, part, parts.device.torch_device, stages)
        watchers.append(ValidationLoss(config.validate_every, once, ema, stop))
        if isinstance(parts.task.model, NoisyClassifier):
            watchers.append(ValidationAccuracy(config.validate_every, once, ema, stop))
    if isinstance(parts.task, AutoencoderTask):
        images = val or parts.dataset.load("train")
        shown = images[spread(len(images), min(len(images), PICTURES)).to(images.device)].cpu()
        watchers.append(
            ReconstructionPreview(
                config.preview_every,
                ema,
                stop,
                run=folder,
                images=to_model_range(shown),
                form=parts.dataset.form,
            )
        )
        return watchers
    if config.eval_every is not None and not isinstance(parts.task.model, Denoiser):
        raise UsageError("eval_every", config.eval_every, "a classifier makes no samples", "leave it out")
    if isinstance(parts.task.model, Denoiser):
        sampler = parts.task.sampler
        counts = class_counts if parts.conditional else None
        if config.eval_every is not None:
            watchers.append(
                _evaluation(
                    config,
                    config.eval_every,
                    folder,
                    parts,
                    stages,
                    sampler=sampler,
                    ema=ema,
                    stop=stop,
                    class_counts=counts,
                )
            )
        watchers.append(
            Preview(
                config.preview_every,
                ema,
                stop,
                run=folder,
                sampler=sampler,
                steps=config.preview_steps,
                stages=stages,
                space=parts.space,
                form=parts.dataset.form,
                labels=None
                if counts is None
                else label_settings([min(count, 1) for count in counts])["labels"],
            )
        )
    return watchers


def _evaluation(
    config: TrainConfig,
    every: int,
    folder: Path,
    parts: TrainingSetup,
    stages: ResolutionSchedule,
    *,
    sampler: Sampler,
    ema: EMA,
    stop: GracefulStop,
    class_counts: list[int] | None,
) -> EvaluationCallback:
    """What measures samples on the way; ValueError where that cannot be done."""
    metrics = {name: build(node) for name, node in config.metric.items()}
    for name, metric in metrics.items():
        if not isinstance(metric, Metric) or metric.split is not None:
            raise UsageError(
                "metric", name, "measures no samples", "on the way there are the metrics of samples only"
            )
    dataset = parts.dataset
    seen = pictured(dataset)
    reference: Reference = build(config.reference, seen)
    names = dataset.class_names if class_counts is not None else None
    labels = {} if names is None or class_counts is None else _labels(reference, names, class_counts)
    samples = TrainingSamples(
        config.eval_samples, sampler, config.eval_steps, dataset.shape, parts.space,
        form=dataset.form, names=names, labels=labels_in_turn(labels),
    )  # fmt: skip
    cache_dir = cache_folder(config.cache_dir)
    networks = FeatureExtractors(config.features, seen, cache_dir, parts.device.torch_device)
    measured = config.model_dump(
        include={"metric", "features", "reference", "sampler", "eval_samples", "eval_steps", "keep_best"}
    )
    measured |= {key: shares for key, shares in labels.items() if key == "label_shares"}
    measured |= sampler.grid_settings(config.eval_steps)
    return EvaluationCallback(
        every, metrics, networks, reference, samples, stages,
        run=folder, ema=ema, stop=stop, batch_size=1 if sampler.per_image else config.batch_size,
        keep_best=config.keep_best, identity=fingerprint(measured),
    )  # fmt: skip


def _labels(reference: Reference, names: tuple[str, ...], class_counts: list[int]) -> dict[str, list[int]]:
    """The label settings of samples in the reference's shares of the classes, in equal shares where it has none.

    Classes without training images are left out.
    """
    trained = [min(count, 1) for count in class_counts]
    counts = reference.class_counts(names) or trained
    shares = [count * there for count, there in zip(counts, trained, strict=True)]
    return label_settings(shares if any(shares) else trained)


def _once(
    images: Images, batch_size: int, device: torch.device, stages: ResolutionSchedule
) -> Callable[[int], Iterator[Batch]]:
    """A maker of one pass over images, in order and unaugmented, at the size that weights of some steps come from."""
    held = to_device(images, device)

    def batches(steps: int) -> Iterator[Batch]:
        shape = stages.after(steps).shape
        for number, rows in enumerate(torch.arange(len(held), device=held.device).split(batch_size)):
            labels = None if held.labels is None else held.labels[rows].to(device)
            yield Batch(number, reduced(to_model_range(held[rows].to(device)), shape), labels, rows)

    return batches


def trainer_of(
    config: TrainConfig,
    device: Device,
    precision: str,
    folder: Path,
    *,
    done: int,
    max_steps: int | None,
    callbacks: list[Callback],
) -> Trainer:
    """Lightning's Trainer, with all that the run's own callbacks do switched off, and its advice kept to itself."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    trainer = Trainer(
        max_epochs=-1,
        max_steps=max_steps or -1,
        accumulate_grad_batches=config.accumulate_grad_batches,
        callbacks=callbacks,
        logger=[build(node).logger(folder, done) for node in config.logger.values()],
        plugins=[WholeFileIO(), *device.plugins(precision)],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=config.log_every,
        **device.trainer_arguments(),
    )
    keep_signal_handlers(trainer)  # GracefulStop handles them
    return trainer
