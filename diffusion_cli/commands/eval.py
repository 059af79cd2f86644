"""`diffuse eval`: measure samples, of a model or of anyone, against real images; or ask a model about these."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from diffusion_cli import __version__
from diffusion_cli.batch_size import advise_batch_size
from diffusion_cli.commands.inputs import show_remarks
from diffusion_cli.commands.outputs import claim, keep_labels, keep_seeds
from diffusion_cli.commands.sample import samples_folder
from diffusion_cli.commands.samples import ModelSamples, about, given_samples, in_shares_of, run_of
from diffusion_cli.commands.trained import LoadedModel, dataset_of, open_run
from diffusion_cli.config import CONF, EvalConfig, build, fingerprint
from diffusion_cli.data import Dataset, NoDataset, pictured
from diffusion_cli.data.base import Split
from diffusion_cli.diffusion.guidance import NoGuidance
from diffusion_cli.errors import NO_VALUE, UsageError, format_value
from diffusion_cli.generate import uncompiled
from diffusion_cli.images import save_rows
from diffusion_cli.metrics import (
    DatasetReference,
    EvaluatedModel,
    Evaluation,
    FeatureExtractors,
    FrechetDistance,
    Metric,
    ModelMetric,
    ReconstructedSamples,
    Reference,
    Report,
    Samples,
    append_history,
    averaged,
    cache_folder,
    evaluate,
    evaluate_model,
    history_table,
    notes_on_seeds,
    parts,
    read_history,
    require,
)
from diffusion_cli.networks import AutoencoderKL
from diffusion_cli.runs.find import find_run, task_of
from diffusion_cli.runs.load import LoadedDenoiser, load_autoencoder
from diffusion_cli.system.distributed import Distributed, launch
from diffusion_cli.system.own_folder import own_folder
from diffusion_cli.system.precision import device_of

SHOWN = 250  # images at a time to the metrics, where batch_size=auto finds fewer for the sampler
EXACT = "fp32"  # of metrics of the model itself, whose small differences and solvers no shorter format serves
Kinds = dict[str, Metric | ModelMetric]
"""Metrics of both kinds, by their names in the configuration."""


def run(config: EvalConfig) -> None:
    """Measure every metric, those of samples in one pass; print them and add them to a metrics.json."""
    if config.compare is not None:
        if config.samples is not None:
            raise UsageError("samples", config.samples, "compare= measures nothing", "leave one of them out")
        histories = {name: read_history(_history(name, config.output_dir)) for name in config.compare}
        print(history_table(histories, config.force))
    else:
        launch(measure, config, processes=config.processes)


def _history(name: str, output_dir: str) -> Path:
    """The metrics.json of a run or of evaluated samples, by its folder or name; ValueError if there is none."""
    root = Path(output_dir)
    for folder in (Path(name), root / name, root / "evaluations" / name):
        if (folder / "metrics.json").is_file():
            return folder / "metrics.json"
    raise UsageError(
        "compare", name, "has no metrics.json", "measure it first, with diffuse eval run= or samples="
    )


class EvaluationPlan(NamedTuple):
    """What is measured, and where the numbers go."""

    folder: Path
    """Of metrics.json: the run's, or one for these samples."""
    dataset: Dataset
    trained: LoadedModel | None
    samples: Samples | None
    """None where only the model itself is asked."""
    networks: FeatureExtractors
    reference: Reference
    metrics: dict[str, Metric]
    """Of samples."""
    of_model: list[ModelMetric]
    notes: tuple[str, ...] = ()
    """Facts about the samples that a reader of the numbers needs."""


def measure(config: EvalConfig) -> None:
    """Carry out an evaluation, add its numbers to the history and print them."""
    with advise_batch_size(config.batch_size, config.device):
        scene = look_at(config)
        history = scene.folder / "metrics.json"
        earlier = read_history(history)  # a damaged one is refused before anything is measured
        reports = assess(config, scene)
    if not Distributed().is_main:
        return
    for report in reports:
        report.notes.extend(notes_on_seeds(earlier, report))
    results = [report for report in reports if report.results]
    try:
        for report in results:
            append_history(history, report.to_dict())
    finally:  # the terminal shows the numbers even if the history cannot be written
        if scene.samples is not None:
            print(_described(config, scene, scene.samples))
        for report in reports:
            print(report.table())
    if results:
        print(f"With their protocol in {history}")


def assess(config: EvalConfig, scene: EvaluationPlan) -> list[Report]:
    """The numbers, if this is the first of the processes that share the work."""
    environment = {"device": device_of(config.device).type, "versions": versions()}
    reports = []
    if scene.of_model and scene.samples is not None:  # refused before the model is measured, which takes long
        first = parts(scene.samples, config.repeats)[0]
        require(scene.metrics, scene.networks, first, scene.reference, config.force)
    if scene.trained is not None and scene.of_model and Distributed().is_main:
        assert config.batch_size != "auto"
        subject = EvaluatedModel(
            scene.trained.model, scene.dataset, scene.folder, scene.trained.device, config.seed, config.batch_size,
            config.clip_x0, EXACT,
        )  # fmt: skip
        keys = ("run", "step", "ema", "weights", "weights_sha256")
        known = {key: about(scene.trained)[key] for key in keys} | {"precision": EXACT}
        with uncompiled(scene.trained.model):
            reports.append(evaluate_model(scene.of_model, subject, known, environment))
    if scene.samples is not None:
        reports.append(_of_samples(config, scene, scene.samples, environment))
    return reports


def identity(config: EvalConfig, scene: EvaluationPlan) -> dict[str, Any]:
    """All that the numbers of an evaluation depend on, by content: nothing that is measured, nothing left to names.

    Raises ValueError where the evaluation itself would, before any sample is made.
    """
    about_samples = {} if scene.samples is None else scene.samples.protocol() | {"network_calls": None}
    seen = {}
    if scene.samples is not None:
        first = parts(scene.samples, config.repeats)[0]
        views, _ = require(scene.metrics, scene.networks, first, scene.reference, config.force)
        seen = {
            name: [view.network.name, view.network.digest, view.network.resize, view.network.precision]
            for name, view in views.items()
        }
    return {
        "metric": config.metric, "count": config.num_samples, "seed": config.seed, "samples": about_samples,
        "model": about(scene.trained) if scene.trained else None, "networks": seen, "force": config.force,
        "reference": scene.reference.identity(), "batch_size": config.batch_size, "processes": Distributed().world,
        "compile": config.compile, "device": device_of(config.device).type, "versions": versions(),
    }  # fmt: skip


def look_at(config: EvalConfig, model: LoadedDenoiser | None = None) -> EvaluationPlan:
    """What an evaluation is of, with `model` for that of the run; UsageError where its parts do not go together."""
    kinds: Kinds = {name: build(node) for name, node in config.metric.items()}
    of_model = [name for name, metric in kinds.items() if isinstance(metric, ModelMetric)]
    if of_model and config.batch_size == "auto":
        raise UsageError(
            "batch_size",
            "auto",
            f"is found for samples, and metric={','.join(of_model)} measures the model itself",
            "give a number",
        )
    if Distributed().world > 1 and len(of_model) == len(kinds):
        raise UsageError(
            "processes",
            Distributed().world,
            f"share samples, and metric={','.join(kinds)} makes none",
            "take one process",
        )
    stats = config.reference.get("stats")
    if stats is not None and not any(isinstance(metric, FrechetDistance) for metric in kinds.values()):
        raise UsageError("reference.stats", stats, "serves fid, sfid and fd_dinov2 only", "leave it out")
    splits: dict[str, Split] = {
        name: metric.split
        for name, metric in kinds.items()
        if isinstance(metric, Metric) and metric.split is not None
    }
    folder = None
    if config.samples is None and config.run is not None:
        folder = find_run(config.run, config.output_dir)
    if folder is not None and task_of(folder) == AutoencoderKL.task:
        return _autoencoder_scene(config, folder, kinds, splits)
    if splits:
        raise UsageError(
            "metric",
            ",".join(splits),
            "measures what an autoencoder makes of real images",
            "name a run of task=autoencoder by run=",
        )
    if config.samples is None:
        return _model_scene(config, kinds, len(of_model) < len(kinds), model)
    return _given_scene(config, kinds, of_model)


def _model_scene(
    config: EvalConfig, kinds: Kinds, sampled: bool, model: LoadedDenoiser | None
) -> EvaluationPlan:
    """A run's model, and its samples if any metric looks at samples."""
    trained = open_run(config.sampling, model)
    dataset = (
        trained.dataset(config.data_dir, config.data_paths)
        if config.other_dataset is None
        else build(config.other_dataset, config.data_dir)
    )
    if not sampled:
        _refuse_sampling(config, trained)
        if config.precision not in ("auto", EXACT):
            raise UsageError(
                "precision",
                config.precision,
                f"is of samples, and metric={','.join(config.metric)} makes none and is computed in {EXACT}",
                "leave it out",
            )
        return EvaluationPlan(trained.folder, dataset, trained, None, *_judges(config, dataset, kinds))
    trained.check()  # refused before anything is measured
    judges, notes = _judges(config, dataset, kinds), ()
    if not trained.chosen_labels and trained.labels is not None:
        trained, note = in_shares_of(trained, judges[1])
        notes = (note,)
    folder = samples_folder(trained) if config.keep else None
    if folder is not None:
        Distributed().main_first(lambda: claim(folder, trained.record, trained.model))
    samples = ModelSamples(trained, config.seeds, folder)
    return EvaluationPlan(trained.folder, dataset, trained, samples, *judges, notes)


def _refuse_sampling(config: EvalConfig, trained: LoadedModel) -> None:
    """Raise ValueError for a setting of samples, where no metric measures samples."""
    usual = yaml.safe_load((CONF / "sampler" / "ddim.yaml").read_text())
    given = [
        *([("label", format_value(config.label))] if trained.chosen_labels else []),
        *([] if config.sampler == usual else [("sampler", _class_name(config.sampler))]),
        *([] if isinstance(trained.guidance, NoGuidance) else [("guidance", _class_name(config.guidance))]),
        *([("keep", "true")] if config.keep else []),
        *_changed(config, "num_samples", "steps", "repeats", "compile"),
    ]
    images = [f"metric.{name}.num_images" for name, node in config.metric.items() if "num_images" in node]
    for key, value in given:
        remedy = f", or set {' and '.join(images)}" if key == "num_samples" and images else ""
        raise UsageError(
            key,
            value,
            f"applies to samples, and metric={','.join(config.metric)} makes none",
            f"leave it out{remedy}",
        )


def _class_name(node: dict[str, Any]) -> str:
    """The name of the class of a node of the configuration."""
    return node["_target_"].rpartition(".")[2]


def _autoencoder_scene(
    config: EvalConfig, folder: Path, kinds: Kinds, splits: dict[str, Split]
) -> EvaluationPlan:
    """An autoencoder's reconstructions of one split of a dataset, beside that split."""
    others = [name for name in kinds if name not in splits]
    if others:
        raise UsageError(
            "metric",
            ",".join(others),
            f"is not of an autoencoder, which {folder.name} is",
            "take reconstruction and rfid",
        )
    if len(set(splits.values())) > 1:
        named = ", ".join(f"{name}.split={split}" for name, split in splits.items())
        raise UsageError("metric", NO_VALUE, named, "one evaluation is of one split")
    usual = yaml.safe_load((CONF / "reference" / "dataset.yaml").read_text())
    wrong = _changed(config, "steps", "seed", "clip_x0", "label", "num_samples", "repeats", "compile")
    wrong += [("keep", "true")] if config.keep else []
    wrong += [("reference", config.reference)] if config.reference != usual else []
    wrong += [("precision", config.precision)] if config.precision not in ("auto", EXACT) else []
    for key, value in wrong:
        raise UsageError(
            key,
            value,
            f"is of samples of a denoiser, and {folder.name} is an autoencoder, whose images are compared "
            f"with their originals in {EXACT}",
            "leave it out",
        )
    device = device_of(config.device)
    trained = load_autoencoder(folder, device, config.weights, config.step)
    dataset = (
        dataset_of(folder, trained, config.data_dir, config.data_paths)
        if config.other_dataset is None
        else build(config.other_dataset, config.data_dir)
    )
    if dataset.shape != trained.shape:
        raise UsageError(
            "dataset",
            dataset.name,
            f"its images are {dataset.shape}, and the autoencoder's {trained.shape}",
            "take the dataset that it was trained on",
        )
    (split,) = set(splits.values())
    images = dataset.stream(split)
    if not len(images):
        raise UsageError(f"metric.{next(iter(splits))}.split", split, "has no images", "take the other split")
    made = {
        "run": folder.name, "step": trained.step, "ema": trained.config["ema"], "weights": config.weights,
        "weights_sha256": trained.digest, "dataset": dataset.name, "split": split, "precision": EXACT,
        "form": dataset.form.about(),
    }  # fmt: skip
    samples = ReconstructedSamples(trained.network, images, dataset.form, made)
    pictures = pictured(dataset)
    networks = FeatureExtractors(config.features, pictures, cache_folder(config.cache_dir), device)
    reference = DatasetReference(pictures, split=split, stats=None)
    metrics = {name: metric for name, metric in kinds.items() if isinstance(metric, Metric)}
    return EvaluationPlan(folder, dataset, None, samples, networks, reference, metrics, [])


def _given_scene(config: EvalConfig, kinds: Kinds, of_model: list[str]) -> EvaluationPlan:
    """Images of anyone, and the dataset that they are compared with, if one is named or they lie in a run's folder."""
    assert config.samples is not None
    path = Path(config.samples).expanduser()
    for key, wrong in (
        ("metric", ",".join(of_model)),
        ("label", None if config.label == "null" else config.label),
        ("keep", config.keep),
        ("compile", format_value(config.compile) if config.compile else None),
        ("batch_size", "auto" if config.batch_size == "auto" else None),
        ("guidance.scale", config.guidance.get("scale")),
        *_changed(config, "step", "steps", "seed", "weights", "clip_x0", "precision", "repeats"),
        ("run", config.run if config.other_dataset is not None else None),
    ):
        if wrong:
            raise UsageError(
                key, wrong, f"is for samples made of a model, not for samples={path}", "leave it out"
            )
    run = None
    if config.other_dataset is None:
        run = find_run(config.run, config.output_dir) if config.run else run_of(path)
    if run is not None:
        trained = open_run(replace(config.sampling, run=str(run)))
        dataset = trained.dataset(config.data_dir, config.data_paths)
    else:
        for key, value in config.data_paths.items():
            raise UsageError(
                f"dataset.{key}", value, "is for a run's dataset", "name the dataset, as dataset=folder"
            )
        dataset = build(config.other_dataset, config.data_dir)
    if config.other_dataset is not None and dataset is not None:
        show_remarks(dataset.remarks())
    samples = given_samples(path, dataset, config.num_samples)
    # Of the same name in two places are not the same samples.
    folder = (
        Path(config.output_dir)
        / "evaluations"
        / f"{path.name}-{fingerprint({'path': str(path.resolve())})[:4]}"
    )
    dataset = dataset or NoDataset(path.name, samples.shape)
    return EvaluationPlan(folder, dataset, None, samples, *_judges(config, dataset, kinds))


def _judges(
    config: EvalConfig, dataset: Dataset, kinds: Kinds
) -> tuple[FeatureExtractors, Reference, dict[str, Metric], list[ModelMetric]]:
    dataset = pictured(dataset)
    networks = FeatureExtractors(
        config.features, dataset, cache_folder(config.cache_dir), device_of(config.device)
    )
    of_samples = {name: metric for name, metric in kinds.items() if isinstance(metric, Metric)}
    of_model = [metric for metric in kinds.values() if isinstance(metric, ModelMetric)]
    return networks, build(config.reference, dataset), of_samples, of_model


def _changed(config: EvalConfig, *keys: str) -> list[tuple[str, Any]]:
    """Those of the keys that do not have the value of the YAML file, with a text of their own."""
    usual = yaml.safe_load((CONF / "evaluation.yaml").read_text())
    now = config.model_dump()
    return [(key, format_value(now[key])) for key in keys if now[key] != usual[key]]


def _of_samples(
    config: EvalConfig, scene: EvaluationPlan, samples: Samples, environment: dict[str, Any]
) -> Report:
    """Show the samples to every metric, and keep the pictures that come of it."""
    size = config.batch_size
    if size == "auto":  # of samples; the metrics' networks see to their own memory
        size = max(SHOWN, samples.batch_size) if isinstance(samples, ModelSamples) else SHOWN
    with samples.writer if isinstance(samples, ModelSamples) else nullcontext():
        evaluations = [
            evaluate(
                scene.metrics, scene.networks, part, scene.reference,
                batch_size=size, force=config.force, environment=environment,
            )
            for part in parts(samples, config.repeats)
        ]  # fmt: skip
    Distributed().all_gather(None)  # the samples of the others are there too
    report = averaged([evaluation.report for evaluation in evaluations])
    if not Distributed().is_main:
        return report
    if scene.dataset.form.note:
        report.notes.append(f"the numbers are {scene.dataset.form.note}")
    report.notes.extend(scene.notes)
    if isinstance(samples, ModelSamples) and scene.trained is not None:
        if samples.folder is not None:
            with _noting(report):
                claim(samples.folder, scene.trained.record, scene.trained.model)
                keep_seeds(samples.folder, samples.seeds)
                keep_labels(samples.folder, samples.class_names or (), scene.trained.model.form.suffix)
        if samples.calls is None:
            report.notes.append(
                "network calls: unknown, for an earlier start made the samples and ended before it recorded them"
            )
    for evaluation in evaluations:
        _keep_pictures(evaluation, scene.folder, report)
    return report


def _keep_pictures(evaluation: Evaluation, folder: Path, report: Report) -> None:
    """Write the pictures of an evaluation into a folder's `pictures`, and note in a report where they are."""
    for name, picture in evaluation.pictures.items():
        digest = evaluation.report.results[0].protocol["sampling"]["pixels_sha256"]
        path = own_folder(folder, "pictures") / f"{name}-{digest[:8]}.png"
        with _noting(report):
            save_rows(picture, path)
            report.notes.append(f"{name}: its picture is {path}")


@contextmanager
def _noting(report: Report) -> Iterator[None]:
    """Turn a file that cannot be written into a note: it must not cost the numbers of a long evaluation."""
    try:
        yield
    except OSError as error:
        report.notes.append(str(error))


def _described(config: EvalConfig, scene: EvaluationPlan, samples: Samples) -> str:
    """What the numbers are of, in a line."""
    if isinstance(samples, ReconstructedSamples):
        about = samples.protocol()
        return (
            f"{about['run']} at step {about['step']}, its reconstructions of {len(samples)} images of "
            f"{scene.dataset.name}/{about['split']}, {about['weights']} weights"
        )
    if scene.trained is None or not isinstance(samples, ModelSamples):
        return f"{len(samples)} images of {config.samples}"
    sampler = _class_name(config.sampler)
    repeats = f"{config.repeats} repeats of " if config.repeats > 1 else ""
    number = f"{repeats}{len(samples) // config.repeats}"
    calls = "an unknown number of" if samples.calls is None else samples.calls
    return (
        f"{scene.trained.folder.name} at step {scene.trained.model.step}, {number} samples by {sampler} in "
        f"{calls} network calls each, {config.weights} weights"
    )


def versions() -> dict[str, str]:
    """Of what numbers may depend on."""
    names = ("torch", "torchvision", "torch-fidelity", "torchmetrics", "numpy", "pillow", "transformers")
    found = {name: version(name) for name in names if name != "transformers" or find_spec(name)}
    return {"diffuse": __version__, "python": platform.python_version(), **found}
