"""`diffuse compare`: evaluate every combination of settings, and write a table and a plot."""

import csv
import json
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_cli.batch_size import advise_batch_size
from diffusion_cli.charts import Curve, Panel, save_panels
from diffusion_cli.commands.eval import assess, versions
from diffusion_cli.commands.evaluation_plan import EvaluationMode, EvaluationPlan, mode_of, plan_of
from diffusion_cli.commands.outputs import named_folder
from diffusion_cli.commands.samples import ModelSamples, model_record
from diffusion_cli.config import (
    CompareConfig,
    EvalConfig,
    HistoryComparison,
    Value,
    Variant,
    fingerprint,
    shared_seeds,
)
from diffusion_cli.config.values import Step
from diffusion_cli.errors import NO_VALUE, FormatError, Problem, UsageError, counted, format_value
from diffusion_cli.metrics import DEVIATION, Report, Result, conditions_of, parts, require, unlike
from diffusion_cli.metrics.frechet import IMAGES_NEEDED
from diffusion_cli.runs.find import find_run
from diffusion_cli.runs.load import find_checkpoint
from diffusion_cli.runs.migrate import migrated
from diffusion_cli.runs.snapshots import StoredAverages
from diffusion_cli.system import cache
from diffusion_cli.system.distributed import Distributed, launch
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.own_folder import own_folder
from diffusion_cli.system.precision import device_of, resolve
from diffusion_cli.system.temporary_files import is_temporary, remove_abandoned
from diffusion_cli.system.untrusted import LONGEST_TEXT, escaped, read

# Keys that do not change the results.
ELSEWHERE = {"output", "run", "processes", "device", "force", "data_dir", "cache_dir", "output_dir"}
CALLS, SECONDS = "network calls", "seconds an image"
SPREAD = " (std)"  # suffix of the columns of standard deviations over repeats
MARK = "comparison.json"
FEW_SAMPLES = 1000
"""Samples below which a note says that differences may be noise."""

Point = dict[str, Any]
"""A row of the table: the settings, the results and their cost."""


class RealDistance(NamedTuple):
    """A distance of real images from the reference, and the number of these images."""

    value: float
    images: int


class ComparisonJob(NamedTuple):
    """One combination of settings."""

    values: dict[str, Value]
    """Value on each axis, by key."""
    config: EvalConfig
    """Configuration of its evaluation."""
    mode: EvaluationMode


def run(variants: list[Variant]) -> None:
    """Evaluate each variant without stored results, and write the table and the plot of all variants."""
    configs = [config for _, config in variants if isinstance(config, CompareConfig)]
    first, axes = configs[0], variants[0].values
    wrong = [key for key in axes if key in ELSEWHERE - {"run"}]
    if wrong:
        raise UsageError.several(
            Problem(key, NO_VALUE, "does not change the results", "give one value, not a list")
            for key in wrong
        )
    shared = shared_seeds(configs)
    if shared:
        raise UsageError.several(shared)
    if not axes and isinstance(first.label, list):
        problem = "the samples get its values in turn, so there is nothing to compare"
        remedy = "write label.<name>=[<values>] for one row per value, of classes label.label=[<values>]"
        raise UsageError("label", NO_VALUE, problem, remedy)
    if not axes:
        raise UsageError(
            "compare",
            NO_VALUE,
            "nothing to compare",
            "give lists of values, for example sampler=[ddpm,ddim] steps=[10,50]",
        )
    jobs = [_job(values, config) for (values, _), config in zip(variants, configs, strict=True)]
    _check_lengths([job.config for job in jobs])
    folder, store = _folders(jobs, first.output)
    _claim(folder)
    remove_abandoned(folder, store)
    launch(compare, jobs, folder, store, processes=first.processes, device=first.device)


def _job(values: dict[str, Value], config: CompareConfig) -> ComparisonJob:
    """Return the evaluation of one combination, with its run and precision resolved."""
    shared = config.model_dump(exclude={"output"})
    own = {
        "run": str(find_run(config.run, config.output_dir)),
        "samples": None,
        "compare": None,
        "keep": False,
        "objective_metric": None,
    }
    asked = EvalConfig(**shared | own)
    mode = mode_of(asked)
    assert not isinstance(mode, HistoryComparison)
    precision = resolve(config.precision, device_of(config.device))
    return ComparisonJob(values, asked.model_copy(update={"precision": precision}), mode)


def _check_lengths(configs: Sequence[EvalConfig]) -> None:
    """Raise UsageError if a run does not give the average of a length, before the first evaluation."""
    by_checkpoint: dict[tuple[str | None, Step], list[float]] = {}
    for config in configs:
        if config.ema_length is not None:
            by_checkpoint.setdefault((config.run, config.step), []).append(config.ema_length)
    for (run, step), lengths in by_checkpoint.items():
        folder = Path(str(run))
        averages = StoredAverages(folder, find_checkpoint(folder, step)[1])
        for length in lengths:
            averages.check(length)


def _claim(folder: Path) -> None:
    """Raise UsageError if a folder exists, is not empty and was not written by a comparison."""
    if not folder.exists() or (folder / MARK).is_file():
        return
    if not folder.is_dir() or not all(map(is_temporary, folder.iterdir())):
        raise UsageError(
            "output", folder, "is not empty and not written by diffuse compare", "choose another folder"
        )


def compare(jobs: list[ComparisonJob], folder: Path, store: Path) -> None:
    """Run a comparison as one of several processes; rank 0 writes the table and the plot."""
    entries: list[dict[str, Any]] = []
    for number, job in enumerate(jobs, start=1):
        with advise_batch_size(job.mode.batch_size, job.mode.device):
            entry = _entry(f"[{number}/{len(jobs)}]", job, store)
        if entry is not None:
            entries.append(entry)
    if not Distributed().is_main:
        return
    points = [job.values | entry["row"] for job, entry in zip(jobs, entries, strict=True)]
    notes = [*dict.fromkeys(note for entry in entries for note in _notes(entry)), *_on_noise(jobs, entries)]
    marks = _marks(jobs, entries)
    unlike_lines = [f"(*) {line}" for line in dict.fromkeys(marks.values())]
    lines = [
        *_markdown(points, marks),
        *unlike_lines,
        "",
        *(f"note: {note}" for note in notes),
    ]
    text = "\n".join(map(escaped, lines))
    _write(folder / MARK, json.dumps({"compared": [job.values for job in jobs]}))
    _write(folder / "table.md", text + "\n")
    with (
        atomic_write(folder / "table.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, _columns(points), restval="")
        writer.writeheader()
        writer.writerows(points)
    distances = [
        {
            result["name"]: _distance_of_real(result["details"])
            for report in entry["reports"]
            for result in report["results"]
        }
        for entry in entries
    ]
    # Metrics of the model itself have no sampling cost for the x axis.
    panels = [
        panel._replace(y_label=f"{panel.y_label}*") if panel.y_label in {name for _, name in marks} else panel
        for panel in _panels(points, distances, list(jobs[0].values))
        if panel.curves
    ]
    if panels:
        save_panels(panels, folder / "plot.png")
    print(f"{text}\n{'Table and plot' if panels else 'Table'}: {folder}")


def _notes(entry: Mapping[str, Any]) -> Iterator[str]:
    """Yield the notes of a combination, without those about details, which the table does not show."""
    for report in entry["reports"]:
        details = {name for result in report["results"] for name in result["details"]}
        for note in report["notes"]:
            subject = note.partition(":")[0].replace(" ", "_")
            if not any(name.startswith(subject) for name in details):
                yield note


def _on_noise(jobs: Sequence[ComparisonJob], entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a note if distances are of few samples without a measure of their noise."""
    counts = [
        result["protocol"].get("samples")
        for job, entry in zip(jobs, entries, strict=True)
        if job.config.repeats == 1
        for report in entry["reports"]
        for result in report["results"]
    ]
    fewest = min((count for count in counts if isinstance(count, int)), default=FEW_SAMPLES)
    if fewest >= FEW_SAMPLES:
        return []
    return [
        f"small differences may be noise with {counted(fewest, 'sample')}; raise num_samples, or set repeats=5 for "
        "standard deviations"
    ]


def _distance_of_real(details: Mapping[str, Any]) -> RealDistance | None:
    """Return the distance of real images for as many as there are samples, else for all; None without one."""
    for distance, images in (
        ("equal_size_reference", "equal_size_images"),
        ("reference_distance", "reference_distance_images"),
    ):
        if distance in details and images in details:
            return RealDistance(details[distance], details[images])
    return None


def _entry(place: str, job: ComparisonJob, store: Path) -> dict[str, Any] | None:
    """Return the results of a combination, stored or measured now; None on other ranks than 0."""
    plan = plan_of(job.mode)
    facts = json.loads(json.dumps(_facts(job.config, plan)))
    path = store / f"{fingerprint(facts)}.json"
    entry = _stored(path, facts) if Distributed().is_main else None
    if Distributed().broadcast(entry is None):
        words = " ".join(f"{key}={format_value(value)}" for key, value in job.values.items())
        if Distributed().is_main:
            print(f"{place} {words}", file=sys.stderr, flush=True)
        entry = _measure(plan, facts, path)
    return entry


def _facts(config: EvalConfig, plan: EvaluationPlan) -> dict[str, Any]:
    """Return everything that the results of an evaluation depend on, identified by content.

    Raises UsageError for an evaluation that would fail, before samples are made.
    """
    metrics, samples, seen = plan.metrics, plan.samples, {}
    if samples is not None:
        first = parts(samples, plan.repeats)[0]
        views, _ = require(
            metrics.sample_metrics, metrics.networks, first, metrics.reference, plan.mode.force
        )
        seen = {
            name: [view.network.name, view.network.digest, view.network.resize, view.network.precision]
            for name, view in views.items()
        }
    model = model_record(samples.trained) if isinstance(samples, ModelSamples) else plan.model_record
    return ({} if plan.model is None else conditions_of(metrics.model_metrics, plan.model)) | {
        "metric": config.metric, "count": config.num_samples, "seed": config.seed,
        "samples": {} if samples is None else samples.protocol() | {"network_calls": None},
        "model": model | {"clip_x0": config.clip_x0} if model else None, "networks": seen, "force": config.force,
        "reference": metrics.reference.identity(), "batch_size": config.batch_size,
        "processes": Distributed().world, "compile": config.compile, "device": device_of(config.device).type,
        "versions": versions(),
    }  # fmt: skip


def _marks(jobs: Sequence[ComparisonJob], entries: Sequence[dict[str, Any]]) -> dict[tuple[int, str], str]:
    """Return the results, by row and name, that are biased, or unlike those of the first run with the same settings.

    Each value describes the bias, or the difference of the protocols. Protocols differ between runs if their datasets
    differ, because the reference images and feature classifiers differ. Differences between other settings are columns
    of the table.
    """
    first: dict[tuple[str, str], tuple[str, Result]] = {}
    marks: dict[tuple[int, str], str] = {}
    for row, (job, entry) in enumerate(zip(jobs, entries, strict=True)):
        settings = json.dumps({key: value for key, value in job.values.items() if key != "run"})
        run = str(job.values.get("run"))
        for result in (result for report in entry["reports"] for result in Report.from_dict(report).results):
            other, wanted = first.setdefault((settings, result.name), (run, result))
            keys = unlike(wanted.protocol, result.protocol)
            if IMAGES_NEEDED in result.details:
                needed = f"{result.details[IMAGES_NEEDED]:.0f} samples and real images"
                marks[row, result.name] = f"{result.name}: biased, because it needs at least {needed}"
            elif keys:
                marks[row, result.name] = (
                    f"{result.name}: the protocols of run={run} and run={other} differ in {', '.join(keys)}"
                )
    return marks


def _stored(path: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """Return the stored results of a combination; None if the file is missing, damaged or for other `facts`.

    Files of earlier versions do not contain the facts.
    """
    if not path.is_file():
        return None
    try:
        entry = migrated(cache.parse_json(read(path, LONGEST_TEXT)))
        results = [result for report in entry["reports"] for result in Report.from_dict(report).results]
        row: Point = entry["row"]
        if not all(isinstance(number, int | float | None) for number in row.values()):
            raise TypeError("the row must contain numbers")
        if {key: row[key] for key in row if key not in (CALLS, SECONDS)} != _values(results):
            raise FormatError("the row differs from its reports")
        measured = {_weights(result.protocol) for result in results}
        if entry.get("facts", facts) != facts or not measured <= {_weights(facts)}:
            raise FormatError("the results are for other weights or settings")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        cache.report_damage(path, error)
        return None
    return entry


def _values(results: Sequence[Result]) -> Point:
    """Return the results of a row, each with its standard deviation if it has one."""
    values: Point = {}
    for result in results:
        values[result.name] = result.value
        if DEVIATION in result.details:
            values[result.name + SPREAD] = result.details[DEVIATION]
    return values


def _weights(facts: Mapping[str, Any]) -> str | None:
    """Return the SHA-256 of the weights in facts or in the protocol of a result, or None."""
    parts = (facts.get(key) or {} for key in ("model", "samples", "sampling"))
    found = [
        part["weights_sha256"] for part in parts if isinstance(part, Mapping) and "weights_sha256" in part
    ]
    return found[0] if found else None


def _folders(jobs: Sequence[ComparisonJob], output: str | None) -> tuple[Path, Path]:
    """Return the folder of the table and the plot, and the folder of the stored results."""
    first = jobs[0].config
    runs = sorted({str(job.config.run) for job in jobs})
    root = Path(runs[0]) if len(runs) == 1 else Path(first.output_dir)
    identity = {"jobs": [job.config.model_dump(exclude=ELSEWHERE) for job in jobs], "runs": runs}
    name = f"{'-'.join(jobs[0].values)}-{fingerprint(identity)}"
    return named_folder(output) if output else own_folder(root, "comparisons", name), own_folder(
        root, "compared"
    )


def _measure(plan: EvaluationPlan, facts: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """Measure a combination and store its results; return None on other ranks than 0."""
    if isinstance(plan.samples, ModelSamples):
        plan.samples.warm_up()
    reports = assess(plan)
    if not Distributed().is_main:
        return None
    row = _values([result for report in reports for result in report.results])
    if isinstance(plan.samples, ModelSamples):
        row |= {CALLS: plan.samples.calls, SECONDS: plan.samples.seconds_per_image}
    entry = {"facts": facts, "row": row, "reports": [report.to_dict() for report in reports]}
    with cache.optional():
        cache.write_json(path, entry)
    return entry


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _columns(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(key for point in points for key in point))


def _markdown(points: Sequence[Point], marks: Container[tuple[int, str]]) -> list[str]:
    """Return the lines of the table, with a * after each result that has its row and column in `marks`."""
    columns = _columns(points)
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row, point in enumerate(points):
        cells = [_cell(point.get(column, "")) + ("*" if (row, column) in marks else "") for column in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else format_value(value)


def _panels(
    points: Sequence[Point], distances: Sequence[Mapping[str, RealDistance | None]], axes: Sequence[str]
) -> list[Panel]:
    """Return plots of each result against its cost if steps differ, else against the last numeric axis."""
    numbers = [axis for axis in axes if all(isinstance(point[axis], int | float) for point in points)]
    names = [
        name for name in _columns(points) if name not in (*axes, CALLS, SECONDS) and not name.endswith(SPREAD)
    ]
    costs = [CALLS, SECONDS] if "steps" in numbers or not numbers else [numbers[-1]]
    apart = [axis for axis in axes if axis not in ("steps", *costs)]
    real = {name: {found for each in distances if (found := each.get(name)) is not None} for name in names}
    return [_panel(points, name, x, apart, real[name]) for name in names for x in costs]


def _panel(
    points: Sequence[Point], name: str, x: str, apart: Sequence[str], distances: set[RealDistance]
) -> Panel:
    """Return a curve for each combination of the axes `apart`, and a line for a common reference distance."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if point.get(name) is not None and point.get(x) is not None:
            label = ", ".join(format_value(point[axis]) for axis in apart) or name
            lines.setdefault(label, []).append((point[x], point[name]))
    curves = [Curve(label, sorted(line)) for label, line in lines.items()]
    places = [place for curve in curves for place in curve.x]
    if len(distances) == 1 and places:
        (real,) = distances
        ends = [(place, real.value) for place in (min(places), max(places))]
        curves.append(Curve(counted(real.images, "real image"), ends))
    values = [value for curve in curves for value in curve.y]
    spans = bool(values) and min(values) > 0 and max(values) > 3 * min(values)
    return Panel(x, name, curves, log_x=x in (CALLS, SECONDS), log_y=spans)
