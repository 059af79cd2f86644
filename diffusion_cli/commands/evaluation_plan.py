"""Load and check everything that a mode of `diffuse eval` needs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from diffusion_cli.commands.dataset_conditions import refuse_chosen, with_conditions_of
from diffusion_cli.commands.inputs import show_remarks
from diffusion_cli.commands.outputs import claim
from diffusion_cli.commands.sample import samples_folder
from diffusion_cli.commands.samples import ModelSamples, given_samples, in_shares_of, run_of, weights_record
from diffusion_cli.commands.trained import dataset_of, open_run, with_condition_images
from diffusion_cli.config import (
    EXACT,
    EvalConfig,
    HistoryComparison,
    Measuring,
    ModelEvaluation,
    ReconstructionEvaluation,
    SampleFilesEvaluation,
    SamplesEvaluation,
    build,
    fingerprint,
)
from diffusion_cli.data import Dataset, NoDataset, pictured
from diffusion_cli.data.base import Split
from diffusion_cli.data.conditioned import text_conditioned
from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.metrics import (
    DatasetReference,
    EvaluatedModel,
    FeatureExtractors,
    FrechetDistance,
    Metric,
    ModelMetric,
    ReconstructedSamples,
    Reference,
    Samples,
    cache_folder,
)
from diffusion_cli.networks import AutoencoderKL
from diffusion_cli.runs.find import find_run, task_of
from diffusion_cli.runs.load import LoadedAutoencoder, LoadedDenoiser, load_autoencoder, load_model
from diffusion_cli.runs.texts import load_text_encoder
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.precision import device_of

EvaluationMode = ModelEvaluation | SamplesEvaluation | SampleFilesEvaluation | ReconstructionEvaluation


class MetricSetup(NamedTuple):
    """The metrics of an evaluation, with their feature networks and reference images."""

    networks: FeatureExtractors
    reference: Reference
    sample_metrics: dict[str, Metric]
    """Metrics of samples, by name."""
    model_metrics: list[ModelMetric]
    """Metrics of the model itself."""


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What to measure, with which metrics, and where to write the results."""

    mode: EvaluationMode
    folder: Path
    """Folder of metrics.json: the run folder, or a folder for these samples."""
    source: str
    """Description of the evaluated model or files."""
    dataset: Dataset
    metrics: MetricSetup
    samples: Samples | None = None
    """None if only the model itself is evaluated."""
    repeats: int = 1
    """Number of evaluations that share the samples."""
    model: EvaluatedModel | None = None
    """None if only samples are evaluated."""
    model_record: dict[str, Any] = field(default_factory=dict)
    """Weights and precision of the model, as plain data for the protocol."""
    notes: tuple[str, ...] = ()
    """Notes about the samples for the report."""


def mode_of(config: EvalConfig) -> EvaluationMode | HistoryComparison:
    """Return the mode of a configuration, which depends on the task of its run; UsageError as `Mode.of`."""
    if config.run is not None and config.samples is None and config.compare is None:
        task = task_of(find_run(config.run, config.output_dir))
        if task == AutoencoderKL.task:
            return ReconstructionEvaluation.of(config)
    return config.mode()


def plan_of(
    mode: EvaluationMode, model: LoadedDenoiser | None = None, images: Tensor | None = None
) -> EvaluationPlan:
    """Load and check what a mode measures; UsageError if its parts are incompatible.

    Args:
        mode: mode of an evaluation.
        model: model of the run, if it is loaded already.
        images: samples, uint8 [N, C, H, W], instead of those in files.
    """
    world = Distributed().world
    if world > 1 and not mode.makes_samples:
        raise UsageError(
            "processes",
            world,
            f"applies only to samples, and metric={','.join(mode.metric)} uses none",
            "use one process",
        )
    match mode:
        case SampleFilesEvaluation():
            return _of_files(mode, images)
        case ReconstructionEvaluation():
            return _of_autoencoder(mode)
        case SamplesEvaluation():
            return _of_samples(mode, model)
        case ModelEvaluation():
            return _of_model(mode, model)


def _of_model(mode: ModelEvaluation, model: LoadedDenoiser | None) -> EvaluationPlan:
    """Plan the evaluation of a denoiser on real images."""
    folder = find_run(mode.run, mode.output_dir)
    if model is None:
        model = load_model(folder, mode.weights, device_of(mode.device), mode.step, mode.ema_length)
    dataset = _dataset(mode, folder, model)
    return EvaluationPlan(
        mode=mode, folder=folder, source=_named(folder, model), dataset=dataset, metrics=_metrics(mode, dataset),
        **_evaluated(mode, folder, model, dataset),
    )  # fmt: skip


def _of_samples(mode: SamplesEvaluation, model: LoadedDenoiser | None) -> EvaluationPlan:
    """Plan the evaluation of a denoiser's samples, and of the denoiser itself if a metric needs it."""
    trained = open_run(mode.sampling, model)
    dataset = _dataset(mode, trained.folder, trained.model)
    trained.check()  # invalid steps fail before the long evaluation
    metrics, notes = _metrics(mode, dataset), ()
    refuse_chosen(trained)
    if not trained.chosen and trained.model.info.conditions is not None:
        trained, note = with_conditions_of(dataset, trained, cache_folder(mode.cache_dir))
        notes = (note,)
    elif not trained.chosen and trained.labels is not None:
        trained, note = in_shares_of(trained, metrics.reference)
        notes = (note,)
    folder = samples_folder(trained) if mode.keep else None
    if folder is not None:
        Distributed().main_first(lambda: claim(folder, trained.record, trained.model))
    model_fields = _evaluated(mode, trained.folder, trained.model, dataset) if metrics.model_metrics else {}
    return EvaluationPlan(
        mode=mode, folder=trained.folder, source=_named(trained.folder, trained.model), dataset=dataset,
        metrics=metrics, samples=ModelSamples(trained, mode.seeds, folder), repeats=mode.repeats, notes=notes,
        **model_fields,
    )  # fmt: skip


def _of_autoencoder(mode: ReconstructionEvaluation) -> EvaluationPlan:
    """Plan the evaluation of an autoencoder's reconstructions of one split of a dataset."""
    folder = find_run(mode.run, mode.output_dir)
    trained = load_autoencoder(folder, device_of(mode.device), mode.weights, mode.step, mode.ema_length)
    dataset = _dataset(mode, folder, trained)
    if isinstance(dataset, NoDataset):
        problem = f"{folder.name} was imported without images to reconstruct"
        raise UsageError(
            "dataset", NO_VALUE, problem, "choose some, such as dataset=folder dataset.path=photos"
        )
    if dataset.shape != trained.shape:
        raise UsageError(
            "dataset",
            dataset.name,
            f"its images have shape {dataset.shape}, but the autoencoder expects {trained.shape}",
            "use the dataset that it was trained on"
            if trained.info.origin is None
            else f"set dataset.resolution={trained.shape[1]}, or import it again with this dataset",
        )
    metric = next(iter(mode.metric))
    split = mode.splits[metric]
    images = dataset.stream(split)
    if not len(images):
        raise UsageError(f"metric.{metric}.split", split, "has no images", "use the other split")
    record = weights_record(folder, trained, mode.weights) | {
        "dataset": dataset.name, "split": split, "precision": EXACT, "form": dataset.form.to_dict(),
    }  # fmt: skip
    return EvaluationPlan(
        mode=mode, folder=folder, source=_named(folder, trained), dataset=dataset,
        metrics=_metrics(mode, dataset, split),
        samples=ReconstructedSamples(trained.network, images, dataset.form, record),
    )  # fmt: skip


def _of_files(mode: SampleFilesEvaluation, images: Tensor | None) -> EvaluationPlan:
    """Plan the evaluation of samples in files.

    The reference dataset is the one of the configuration, or the one of the run that contains the files.
    """
    path = Path(mode.samples).expanduser()
    dataset = _dataset_of_files(mode, path)
    samples = given_samples(path, dataset, mode.num_samples, images)
    # Two folders with the same name can contain different samples.
    name = f"{path.name}-{fingerprint({'path': str(path.resolve())})[:4]}"
    dataset = dataset or NoDataset(path.name, samples.shape)
    return EvaluationPlan(
        mode=mode, folder=Path(mode.output_dir, "evaluations", name), source=mode.samples, dataset=dataset,
        metrics=_metrics(mode, dataset), samples=samples,
    )  # fmt: skip


def _dataset_of_files(mode: SampleFilesEvaluation, path: Path) -> Dataset | None:
    """Return the dataset of the configuration, of its run, or of the run that contains the samples, or None."""
    if mode.other_dataset is not None:
        dataset: Dataset = build(mode.other_dataset, mode.data_dir)
        show_remarks(dataset.remarks())
        return dataset
    run = find_run(mode.run, mode.output_dir) if mode.run else run_of(path)
    if run is not None:
        return _dataset(mode, run, load_model(run, "ema", device_of(mode.device)))
    for key, value in mode.data_paths.items():
        raise UsageError(
            f"dataset.{key}", value, "no dataset is chosen", "choose one, for example dataset=folder"
        )
    return None


def _dataset(mode: Measuring, folder: Path, model: LoadedDenoiser | LoadedAutoencoder) -> Dataset:
    """Return the dataset of the configuration, or else the training dataset of a run."""
    if mode.other_dataset is not None:
        return with_condition_images(build(mode.other_dataset, mode.data_dir), model)
    if model.info.config.dataset is None and not mode.data_paths:
        remedy = "set dataset=, or import it again with dataset="
        missing = UsageError(folder, NO_VALUE, "was imported without a dataset", remedy)
        return NoDataset(folder.name, model.shape, missing)
    return dataset_of(folder, model, mode.data_dir, mode.data_paths)


def _metrics(mode: EvaluationMode, dataset: Dataset, split: Split | None = None) -> MetricSetup:
    """Build the metrics of a mode, with its reference or a split of the dataset as reference.

    Raises UsageError if no metric uses the reference statistics.
    """
    kinds: dict[str, Metric | ModelMetric] = {name: build(node) for name, node in mode.metric.items()}
    pictures = pictured(dataset)
    if isinstance(mode, ReconstructionEvaluation):
        assert split is not None
        reference: Reference = DatasetReference(pictures, split=split, stats=None)
    else:
        stats = mode.reference.get("stats")
        if stats is not None and not any(isinstance(metric, FrechetDistance) for metric in kinds.values()):
            raise UsageError("reference.stats", stats, "used only by fid, sfid and fd_dinov2", "leave it out")
        reference = build(mode.reference, pictures)
    return MetricSetup(
        FeatureExtractors(mode.features, pictures, cache_folder(mode.cache_dir), device_of(mode.device)),
        reference,
        {name: metric for name, metric in kinds.items() if isinstance(metric, Metric)},
        [metric for metric in kinds.values() if isinstance(metric, ModelMetric)],
    )


def _named(folder: Path, model: LoadedDenoiser | LoadedAutoencoder) -> str:
    """Return the name of a run with the step of its weights."""
    return f"{folder.name} at step {model.step}"


def _evaluated(
    mode: ModelEvaluation | SamplesEvaluation, folder: Path, model: LoadedDenoiser, dataset: Dataset
) -> dict[str, Any]:
    """Return the fields of a plan that describe the evaluated model."""
    assert mode.batch_size != "auto"
    device = device_of(mode.device)
    conditioned = text_conditioned(dataset, load_text_encoder(model.info, device, folder))
    return {
        "model": EvaluatedModel(
            model, conditioned, folder, device, mode.seed, mode.batch_size, mode.clip_x0, EXACT
        ),
        "model_record": weights_record(folder, model, mode.weights) | {"precision": EXACT},
    }
