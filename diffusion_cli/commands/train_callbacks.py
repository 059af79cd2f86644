"""Build the callbacks of `diffuse train` that average the weights, and validate, evaluate and preview the averages."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from diffusion_cli.captions import Captions, class_name
from diffusion_cli.commands.train_setup import TrainingSetup
from diffusion_cli.commands.train_tasks import AutoencoderTask, DenoisingTask
from diffusion_cli.conditions.condition import IMAGE
from diffusion_cli.conditions.rows import in_turn, row_name
from diffusion_cli.config import EMAConfig, TrainConfig, build, fingerprint
from diffusion_cli.data import (
    Batch,
    Images,
    PicturedImages,
    ResolutionSchedule,
    UnreadableError,
    at_size,
    pictured,
    spread,
    to_device,
    to_model_range,
)
from diffusion_cli.data.class_shares import label_settings, labels_in_turn
from diffusion_cli.data.image_rows import image_rows
from diffusion_cli.diffusion.denoiser import Denoiser, NoisyClassifier
from diffusion_cli.errors import UsageError
from diffusion_cli.generate import class_condition, rows_in_turn
from diffusion_cli.images import PLAIN, save_rows
from diffusion_cli.metrics import FeatureExtractors, Metric, Reference, cache_folder
from diffusion_cli.runs.snapshots import state_key
from diffusion_cli.training.autoencoding import ReconstructionPreview
from diffusion_cli.training.callbacks import GracefulStop, PeriodicCallback
from diffusion_cli.training.ema import EMA, ExponentialAverage, PowerAverage
from diffusion_cli.training.evaluation import EvaluationCallback, TrainingSamples
from diffusion_cli.training.previews import Preview
from diffusion_cli.training.snapshots import AverageSnapshots
from diffusion_cli.training.validation import ValidationAccuracy, ValidationLoss

PICTURES = 32
"""Number of reconstructions in a preview."""
REAL_IMAGES = 36
"""Number of real images in the picture of a run."""


def weight_averages(config: EMAConfig, network: nn.Module, offload: bool) -> list[EMA]:
    """Return the averages of the weights of a network; the first is the one to validate, sample and evaluate."""
    if config.profile == "exponential":
        assert config.decay is not None
        return [EMA(network, ExponentialAverage(config.decay, config.warm_up), offload)]
    return [
        EMA(network, PowerAverage(length), offload, key=state_key(config.lengths, number))
        for number, length in enumerate(config.lengths)
    ]


def snapshots(config: EMAConfig, averages: Sequence[EMA], folder: Path) -> list[AverageSnapshots]:
    """Return the callback that stores snapshots of power averages; none for another profile."""
    if config.snapshot_every is None:
        return []
    by_length = dict(zip(config.lengths, averages, strict=True))
    return [AverageSnapshots(config.snapshot_every, folder, by_length)]


def periodic_callbacks(
    config: TrainConfig, setup: TrainingSetup, folder: Path, *, ema: EMA, stop: GracefulStop
) -> list[PeriodicCallback]:
    """Return the callbacks that validate, evaluate and preview a run, in the order in which they run.

    Raises:
        UsageError: if `eval_every` is set for a classifier, or a metric does not measure samples.
    """
    callbacks = [*_validation(config, setup, ema, stop)]
    if isinstance(setup.task, AutoencoderTask):
        return [*callbacks, *_reconstructions(config, setup, folder, ema, stop)]
    if not isinstance(setup.task.model, Denoiser):
        if config.eval_every is not None:
            raise UsageError("eval_every", config.eval_every, "a classifier makes no samples", "leave it out")
        return callbacks
    if config.eval_every is not None:
        callbacks.append(_evaluation(config, setup, setup.task, folder, ema, stop))
    return [*callbacks, *_preview(config, setup, setup.task, folder, ema, stop)]


def _validation(
    config: TrainConfig, setup: TrainingSetup, ema: EMA, stop: GracefulStop
) -> Iterator[PeriodicCallback]:
    """Yield the validation loss, and the validation accuracy of a classifier, if there are validation images."""
    if not setup.val_images:
        return
    batches = validation_batches(config, setup)
    yield ValidationLoss(config.validate_every, batches, ema, stop)
    if isinstance(setup.task.model, NoisyClassifier):
        yield ValidationAccuracy(config.validate_every, batches, ema, stop)


def validation_batches(config: TrainConfig, setup: TrainingSetup) -> Callable[[int], Iterator[Batch]]:
    """Return a function that yields the validation images once, in the resolution at a given step.

    For an objective with a largest number of validation images, they are that many, evenly spread.
    """
    part = config.batch_size // config.accumulate_grad_batches
    most = setup.task.objective.most_val_images if isinstance(setup.task, DenoisingTask) else None
    count = len(setup.val_images)
    rows = spread(count, count if most is None else min(count, most))
    return _one_pass(setup.val_images, rows, part, setup.device.torch_device, setup.stages)


def _reconstructions(
    config: TrainConfig, setup: TrainingSetup, folder: Path, ema: EMA, stop: GracefulStop
) -> Iterator[ReconstructionPreview]:
    """Yield the preview callback of an autoencoder, unless there are no previews."""
    if config.preview_every is None:
        return
    images = setup.val_images or setup.images
    shown = images[spread(len(images), min(len(images), PICTURES)).to(images.device)].cpu()
    yield ReconstructionPreview(
        config.preview_every,
        ema,
        stop,
        run=folder,
        images=to_model_range(shown),
        form=setup.dataset.form,
    )


def save_real_images(setup: TrainingSetup, folder: Path) -> None:
    """Write training images as `previews/real.png`, in rows as the previews; once per run.

    With an augmentation, `previews/augmented.png` has the same images with random transforms, as in training. An image
    that cannot be read leaves out the picture, because training itself names such an image.
    """
    path = folder / "previews" / "real.png"
    if isinstance(setup.task, AutoencoderTask) or path.is_file():
        return
    images = setup.images if setup.latent is None else setup.dataset.stream("train")
    groups = _real_rows(images, setup.label_counts)
    if groups is None:
        evenly = spread(len(images), min(len(images), REAL_IMAGES))
        chosen, captions = [*evenly.split(math.isqrt(REAL_IMAGES))], PLAIN
    else:
        names = setup.dataset.class_names
        chosen, captions = [*groups.values()], Captions([class_name(label, names) for label in groups])
    shown = PicturedImages(images, setup.dataset.form)
    with suppress(UnreadableError):
        save_rows([shown[rows.to(images.device)] for rows in chosen], path, captions)
        if setup.augmentation is not None:
            generator, form = torch.Generator().manual_seed(setup.config.seed), setup.dataset.form
            augmented = [
                setup.augmentation(
                    to_model_range(images[rows.to(images.device)]),
                    setup.augmentation.draw(len(rows), generator),
                )
                for rows in chosen
            ]
            pictures = [form.to_rgb(form.quantize(group)) for group in augmented]
            save_rows(pictures, path.with_name("augmented.png"), captions)


def _real_rows(images: Images, counts: list[int] | None) -> dict[int, torch.Tensor] | None:
    """Return some images of each class; None without classes, or with too many."""
    labels = [] if counts is None else [label for label, count in enumerate(counts) if count]
    if images.labels is None or not 0 < 2 * len(labels) <= REAL_IMAGES:
        return None
    found = {label: (images.labels == label).nonzero().flatten().cpu() for label in labels}
    each = REAL_IMAGES // len(labels)
    return {label: rows[spread(len(rows), min(len(rows), each))] for label, rows in found.items()}


def _preview(
    config: TrainConfig, setup: TrainingSetup, task: DenoisingTask, folder: Path, ema: EMA, stop: GracefulStop
) -> Iterator[Preview]:
    """Yield the preview callback of a denoiser, unless there are no previews.

    It shows the classes that have training images; with other conditions, those of evenly spread validation images.
    """
    if config.preview_every is None:
        return
    counts, conditions = setup.label_counts, setup.info.conditions
    condition, originals, titles = None, None, ()
    if _has_condition_images(task):
        rows = image_rows(setup.val_images or setup.images, Preview.PAIRS)
        condition = rows.rows(torch.arange(len(rows))).to("cpu")
        originals = to_model_range(rows.images[rows.places.to(rows.images.device)]).cpu()
    elif conditions is not None:
        rows = image_rows(setup.val_images or setup.images, Preview.ROWS)
        condition = rows_in_turn(range(Preview.ROWS), rows, torch.device("cpu"))
        assert condition is not None
        shown = in_turn(range(Preview.ROWS), len(rows))
        titles = [row_name(row, conditions.attributes) for row in rows.values(shown, conditions.attributes)]
        condition = condition.repeat_interleave(len(Preview.SEEDS) // Preview.ROWS)
    elif counts is not None:
        condition = class_condition(label_settings([min(count, 1) for count in counts])["labels"])
    yield Preview(
        config.preview_every,
        ema,
        stop,
        run=folder,
        sampler=task.sampler,
        steps=config.preview_steps,
        stages=setup.stages,
        space=setup.space,
        form=setup.dataset.form,
        batch_size=config.batch_size,
        condition=condition,
        originals=originals,
        names=setup.dataset.class_names,
        titles=titles,
    )


def _has_condition_images(task: DenoisingTask) -> bool:
    return isinstance(task.model, Denoiser) and IMAGE in task.model.conditions.names


def _evaluation(
    config: TrainConfig, setup: TrainingSetup, task: DenoisingTask, folder: Path, ema: EMA, stop: GracefulStop
) -> EvaluationCallback:
    """Return the evaluation callback; UsageError for a metric that does not measure samples."""
    assert config.eval_every is not None
    metrics = {name: build(node) for name, node in config.metric.items()}
    for name, metric in metrics.items():
        if not isinstance(metric, Metric) or metric.split is not None:
            raise UsageError(
                "metric", name, "measures no samples", "during training, choose metrics of samples"
            )
    dataset, sampler, counts = setup.dataset, task.sampler, setup.label_counts
    seen = pictured(dataset)
    reference: Reference = build(config.reference, seen)
    names = dataset.class_names if counts is not None else None
    conditions, labels, originals = setup.info.conditions, {}, None
    if conditions is not None:
        # Rows are read when they are needed: images and features of texts may need much memory.
        condition = image_rows(setup.val_images or setup.images, config.eval_samples)
        if _has_condition_images(task):
            originals = (PicturedImages(condition.images, dataset.form), condition.places)
    else:
        labels = {} if names is None or counts is None else _labels(reference, names, counts)
        condition = class_condition(labels_in_turn(labels))
    samples = TrainingSamples(
        config.eval_samples, sampler, config.eval_steps, dataset.shape, setup.space,
        form=dataset.form, names=names, condition=condition, originals=originals,
        attributes=() if conditions is None else conditions.attributes,
    )  # fmt: skip
    cache_dir = cache_folder(config.cache_dir)
    networks = FeatureExtractors(config.features, seen, cache_dir, setup.device.torch_device)
    measured = config.model_dump(
        include={"metric", "features", "reference", "sampler", "eval_samples", "eval_steps", "keep_best"}
    )
    measured |= {key: shares for key, shares in labels.items() if key == "label_shares"}
    measured |= sampler.grid_settings(config.eval_steps)
    return EvaluationCallback(
        config.eval_every, metrics, networks, reference, samples, setup.stages,
        run=folder, ema=ema, stop=stop, batch_size=1 if sampler.per_image else config.batch_size,
        keep_best=config.keep_best, identity=fingerprint(measured),
    )  # fmt: skip


def _labels(reference: Reference, names: tuple[str, ...], class_counts: list[int]) -> dict[str, list[int]]:
    """Return the label settings with the class shares of the reference, or equal shares if it has no labels.

    Classes without training images are left out.
    """
    trained = [min(count, 1) for count in class_counts]
    counts = reference.class_counts(names) or trained
    shares = [count * there for count, there in zip(counts, trained, strict=True)]
    return label_settings(shares if any(shares) else trained)


def _one_pass(
    images: Images, rows: torch.Tensor, batch_size: int, device: torch.device, stages: ResolutionSchedule
) -> Callable[[int], Iterator[Batch]]:
    """Return a function that yields some images once, not augmented, in the resolution at a given step."""
    held = to_device(images, device)

    def batches(steps: int) -> Iterator[Batch]:
        shape = stages.after(steps).shape
        for number, part in enumerate(rows.to(held.device).split(batch_size)):
            images = to_model_range(held[part].to(device))
            condition, labels = held.condition(part, images), held.labels_of(part, images.device)
            yield at_size(Batch(number, images, condition, part, labels), shape)

    return batches
