"""`diffuse compare`: evaluations of a model by every combination of settings, as a table and a plot."""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffusion_cli.checkpoint import find_run, load_model, whole_file
from diffusion_cli.commands.eval import assess, look_at
from diffusion_cli.commands.samples import ModelSamples
from diffusion_cli.config import CompareConfig, Mistakes, Value, Variant, fingerprint, shown
from diffusion_cli.figures import Curve, Panel, save_panels
from diffusion_cli.ranks import Ranks, run_in_processes

# What does not change a number, or is told apart by the weights.
ELSEWHERE = {"output", "run", "processes", "device", "force", "data_dir", "cache_dir", "output_dir", "keep"}
CALLS, SECONDS = "network calls", "seconds an image"

Point = dict[str, Any]
"""A row of the table: the values on the axes, the numbers, and what they cost."""


class Job(NamedTuple):
    """One combination."""

    values: dict[str, Value]
    """On each axis, by key."""
    config: CompareConfig


def run(variants: list[Variant]) -> None:
    """Evaluate each variant that has not been, and write the table and the plot of all."""
    jobs = [Job(values, config) for values, config in variants if isinstance(config, CompareConfig)]
    first = jobs[0]
    for key, given in (("samples", first.config.samples), ("compare", first.config.compare)):
        if given is not None:
            raise Mistakes(f"{key}={shown(given)}: compare makes samples of runs; leave it out")
    if not first.values:
        raise Mistakes("compare: nothing to compare; give a list, as sampler=[ddpm,ddim] steps=[10,50]")
    if first.config.processes > 1:
        run_in_processes(first.config.processes, compare, jobs)
    else:
        compare(jobs)


def compare(jobs: list[Job]) -> None:
    """Carry out a comparison, as one of the processes that share it."""
    folder, store = _folders(jobs)
    points: list[Point] = []
    for number, (values, config) in enumerate(jobs, start=1):
        path = store / f"{_identity(config)}.json"
        if Ranks().agree(not path.is_file()):
            words = " ".join(f"{key}={shown(value)}" for key, value in values.items())
            if Ranks().first:
                print(f"[{number}/{len(jobs)}] {words}", file=sys.stderr, flush=True)
            _measure(config, path)
        if Ranks().first:
            points.append(values | json.loads(path.read_text(encoding="utf-8"))["row"])
    if not Ranks().first:
        return
    table = _markdown(points)
    _write(folder / "table.md", table + "\n")
    with (
        whole_file(folder / "table.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, _columns(points), restval="")
        writer.writeheader()
        writer.writerows(points)
    save_panels(_panels(points, list(jobs[0].values)), folder / "plot.png")
    print(f"{table}\nTable and plot: {folder}")


def _folders(jobs: Sequence[Job]) -> tuple[Path, Path]:
    """Where the table and the plot go, and where the numbers of each combination are kept."""
    first = jobs[0].config
    runs = {job.config.run for job in jobs}
    root = find_run(first.run, first.output_dir) if len(runs) == 1 else Path(first.output_dir)
    about = {
        "jobs": [job.config.model_dump(exclude=ELSEWHERE) for job in jobs],
        "runs": sorted(map(str, runs)),
    }
    name = f"{'-'.join(jobs[0].values)}-{fingerprint(about)}"
    return Path(first.output) if first.output else root / "comparisons" / name, root / "compared"


def _identity(config: CompareConfig) -> str:
    """What the numbers of a variant are kept under: the weights, and all settings that count."""
    folder = find_run(config.run, config.output_dir)
    digest = load_model(folder, config.weights, torch.device("cpu"), config.step).digest
    return fingerprint(config.model_dump(exclude=ELSEWHERE) | {"weights_sha256": digest})


def _measure(config: CompareConfig, path: Path) -> None:
    scene = look_at(config)
    reports = assess(config, scene)
    if not Ranks().first:
        return
    row: Point = {result.name: result.value for report in reports for result in report.results}
    if isinstance(scene.samples, ModelSamples):
        row |= {CALLS: scene.samples.calls, SECONDS: scene.samples.seconds_per_image}
    floors = [
        result.details["floor"]
        for report in reports
        for result in report.results
        if "floor" in result.details
    ]
    row |= {"floor": floors[0]} if floors else {}
    entry = {"row": row, "reports": [report.to_dict() for report in reports]}
    _write(path, json.dumps(entry, indent=2, allow_nan=False))


def _write(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _columns(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(key for point in points for key in point))


def _markdown(points: Sequence[Point]) -> str:
    columns = _columns(points)
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(_cell(point.get(column, '')) for column in columns)} |" for point in points]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else shown(value)


def _panels(points: Sequence[Point], axes: Sequence[str]) -> list[Panel]:
    """Each number against what it costs where the steps differ, else against the last axis of numbers."""
    numbers = [axis for axis in axes if all(isinstance(point[axis], int | float) for point in points)]
    names = [name for name in _columns(points) if name not in (*axes, CALLS, SECONDS, "floor")]
    costs = [CALLS, SECONDS] if "steps" in numbers or not numbers else [numbers[-1]]
    apart = [axis for axis in axes if axis not in ("steps", *costs)]
    return [_panel(points, name, x, apart) for name in names[:3] for x in costs]


def _panel(points: Sequence[Point], name: str, x: str, apart: Sequence[str]) -> Panel:
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if point.get(name) is not None and point.get(x) is not None:
            label = ", ".join(shown(point[axis]) for axis in apart) or name
            lines.setdefault(label, []).append((point[x], point[name]))
    curves = [Curve(label, *map(list, zip(*sorted(line), strict=True))) for label, line in lines.items()]
    places = [place for curve in curves for place in curve.x]
    floor = next((point["floor"] for point in points if "floor" in point), None)
    if (
        floor is not None
        and places
        and not name.startswith(("is", "class", "precision", "recall", "density", "cov"))
    ):
        curves.append(Curve("real images", [min(places), max(places)], [floor, floor]))
    values = [value for curve in curves for value in curve.y]
    costly = x in (CALLS, SECONDS)
    return Panel(
        x, name, curves, log_x=costly, log_y=bool(values) and min(values) > 0 and name.startswith(("f", "k"))
    )
