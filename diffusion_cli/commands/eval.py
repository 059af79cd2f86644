"""`diffuse eval`: evaluate samples, or the model itself, against real images."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_cli import __version__
from diffusion_cli.batch_size import advise_batch_size
from diffusion_cli.captions import Captions
from diffusion_cli.commands.evaluation_plan import EvaluationMode, EvaluationPlan, mode_of, plan_of
from diffusion_cli.commands.outputs import claim, keep_labels, keep_seeds
from diffusion_cli.commands.sample_files import SampleFiles
from diffusion_cli.commands.samples import ModelSamples
from diffusion_cli.config import EvalConfig, HistoryComparison
from diffusion_cli.errors import UsageError, counted
from diffusion_cli.generate import uncompiled
from diffusion_cli.images import save_png, stacked
from diffusion_cli.metrics import (
    Evaluation,
    GivenSamples,
    Report,
    Samples,
    append_history,
    averaged,
    evaluate,
    evaluate_model,
    history_table,
    notes_on_seeds,
    parts,
    read_history,
    require,
)
from diffusion_cli.metrics.base import MetricPicture
from diffusion_cli.runs.load import named_weights
from diffusion_cli.system.distributed import Distributed, launch
from diffusion_cli.system.own_folder import own_folder
from diffusion_cli.system.precision import device_of

SHOWN = 250  # smallest batch of the metrics with batch_size=auto


def run(config: EvalConfig) -> dict[str, float]:
    """Compute every metric, print the results and append them to metrics.json; return the values by name."""
    mode = mode_of(config)
    if isinstance(mode, HistoryComparison):
        histories = {name: read_history(_history(name, mode.output_dir)) for name in mode.compare}
        print(history_table(histories, mode.force))
        return {}
    values = launch(measure, mode, processes=mode.processes, device=mode.device)
    return values if isinstance(values, dict) else {}


def _history(name: str, output_dir: str) -> Path:
    """Return the metrics.json of a run or of evaluated samples, by folder or name; UsageError if none exists."""
    root = Path(output_dir)
    for folder in (Path(name), root / name, root / "evaluations" / name):
        if (folder / "metrics.json").is_file():
            return folder / "metrics.json"
    raise UsageError(
        "compare", name, "has no metrics.json", "evaluate it first: diffuse eval run= or samples="
    )


def measure(mode: EvaluationMode) -> dict[str, float]:
    """Run an evaluation, append its results to the history and print them; rank 0 returns the values by name."""
    with advise_batch_size(mode.batch_size, mode.device):
        plan = plan_of(mode)
        history = plan.folder / "metrics.json"
        earlier = read_history(history)  # a damaged history fails before the long evaluation
        reports = assess(plan)
    if not Distributed().is_main:
        return {}
    for report in reports:
        report.notes.extend(notes_on_seeds(earlier, report))
    results = [report for report in reports if report.results]
    try:
        for report in results:
            append_history(history, report.to_dict())
    finally:  # print the results even if the history cannot be written
        if plan.samples is not None:
            print(_described(plan, plan.samples))
        for report in reports:
            print(report.table())
    if results:
        print(f"Results and protocol: {history}")
    return {result.name: result.value for report in results for result in report.results}


def assess(plan: EvaluationPlan) -> list[Report]:
    """Return the reports of an evaluation; they are complete on rank 0 only."""
    environment = {"device": device_of(plan.mode.device).type, "versions": versions()}
    metrics, reports = plan.metrics, []
    if metrics.model_metrics and plan.samples is not None:
        # Invalid sample metrics fail before the long evaluation of the model.
        first = parts(plan.samples, plan.repeats)[0]
        require(metrics.sample_metrics, metrics.networks, first, metrics.reference, plan.mode.force)
    if plan.model is not None and Distributed().is_main:
        with uncompiled(plan.model.model):
            reports.append(evaluate_model(metrics.model_metrics, plan.model, plan.model_record, environment))
    if plan.samples is not None:
        reports.append(_of_samples(plan, plan.samples, environment))
    return reports


def _of_samples(plan: EvaluationPlan, samples: Samples, environment: dict[str, Any]) -> Report:
    """Compute the metrics of samples in one pass, and save their pictures."""
    size, metrics = plan.mode.batch_size, plan.metrics
    if size == "auto":  # batch of samples; feature networks limit their own memory
        size = max(SHOWN, samples.batch_size) if isinstance(samples, ModelSamples) else SHOWN
    with samples.writer if isinstance(samples, ModelSamples) else nullcontext():
        evaluations = [
            evaluate(
                metrics.sample_metrics, metrics.networks, part, metrics.reference,
                batch_size=size, force=plan.mode.force, environment=environment,
            )
            for part in parts(samples, plan.repeats)
        ]  # fmt: skip
    Distributed().all_gather(None)  # wait until the other processes have written their samples
    report = averaged([evaluation.report for evaluation in evaluations])
    if not Distributed().is_main:
        return report
    form = plan.dataset.form
    if form.note and any(each.uses_previews(form) for each in metrics.sample_metrics.values()):
        report.notes.append(f"metrics use {form.note}")
    report.notes.extend(plan.notes)
    if isinstance(samples, ModelSamples):
        _keep_record(samples, report)
    for evaluation in evaluations:
        _keep_pictures(evaluation, plan.folder, report)
    return report


def _keep_record(samples: ModelSamples, report: Report) -> None:
    """Record the saved samples in their manifest, and note unknown network calls in a report."""
    model = samples.trained.model
    if samples.folder is not None:
        with _noting(report):
            claim(samples.folder, samples.trained.record, model)
            keep_seeds(samples.folder, samples.seeds)
            files = SampleFiles(samples.folder, model.info.form.suffix)
            keep_labels(files, samples.class_names or (), samples.values_of_images)
    if samples.calls is None:
        report.notes.append(
            "network calls: unknown, because an interrupted run made the samples without recording them"
        )


def _keep_pictures(evaluation: Evaluation, folder: Path, report: Report) -> None:
    """Write the pictures of an evaluation to `pictures` in a folder, and note their paths in a report."""
    for name, picture in evaluation.pictures.items():
        digest = evaluation.report.results[0].protocol["sampling"]["pixels_sha256"]
        path = own_folder(folder, "pictures") / f"{name}-{digest[:8]}.png"
        with _noting(report):
            save_png(_drawn(picture), path)
            report.notes.append(f"{name}: picture in {path}")


def _drawn(picture: MetricPicture) -> Tensor:
    """Return a figure of a metric with its words."""
    each = max(len(picture.names), 1)
    groups = [picture.rows[at : at + each] for at in range(0, len(picture.rows), each)]
    words = picture.columns or [()] * len(groups)
    return stacked(
        [
            (group, Captions(picture.names, columns, title="" if number else picture.title))
            for number, (group, columns) in enumerate(zip(groups, words, strict=True))
        ]
    )


@contextmanager
def _noting(report: Report) -> Iterator[None]:
    """Turn a write error into a note of the report, so that a long evaluation is not lost."""
    try:
        yield
    except OSError as error:
        report.notes.append(str(error))


def _described(plan: EvaluationPlan, samples: Samples) -> str:
    """Return a line that describes the evaluated samples."""
    if isinstance(samples, GivenSamples):
        return f"{counted(len(samples), 'image')} of {plan.source}"
    protocol = samples.protocol()
    weights = named_weights(protocol["weights"], protocol.get("ema_length"))
    if not isinstance(samples, ModelSamples):
        return (
            f"{plan.source}, reconstructions of {len(samples)} images of "
            f"{protocol['dataset']}/{protocol['split']}, {weights} weights"
        )
    repeats = f"{plan.repeats} repeats of " if plan.repeats > 1 else ""
    calls = (
        "an unknown number of network calls"
        if samples.calls is None
        else counted(samples.calls, "network call")
    )
    sampler = type(samples.trained.sampler).__name__
    return (
        f"{plan.source}, {repeats}{counted(len(samples) // plan.repeats, 'sample')} by {sampler} in {calls} each, "
        f"{weights} weights"
    )


def versions() -> dict[str, str]:
    """Return the versions of the packages that the results may depend on."""
    names = ("torch", "torchvision", "torch-fidelity", "torchmetrics", "numpy", "pillow", "transformers")
    found = {name: version(name) for name in names if name != "transformers" or find_spec(name)}
    return {"diffuse": __version__, "python": platform.python_version(), **found}
