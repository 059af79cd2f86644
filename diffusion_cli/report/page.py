"""The report about one or several runs: one self-contained HTML file without network access."""

import base64
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from diffusion_cli import __version__
from diffusion_cli.charts import COLOURS, FEW, Curve, Panel, Points, line_style, svg
from diffusion_cli.config import flatten
from diffusion_cli.errors import class_name, format_value
from diffusion_cli.metrics import Report, Result, unlike
from diffusion_cli.report.explanations import explained
from diffusion_cli.report.record import Record
from diffusion_cli.system.untrusted import regular

MARK = '<meta name="generator" content="diffuse '
ABSENT = "–"


class Row(NamedTuple):
    """A key, its value in each run, and whether the values differ."""

    key: str
    values: list[str]
    differs: bool


class MeasuredModel(NamedTuple):
    """Step, weights and sampler of a result's model; empty if unknown."""

    step: Any
    weights: Any
    sampler: str


class Comparable(NamedTuple):
    """The newest result of a metric in each run (None if missing), and the protocol keys that differ."""

    name: str
    results: list[Result | None]
    unlike: list[str]

    @property
    def protocols(self) -> list[dict[str, Any] | None]:
        """Protocol of each result, with dotted keys."""
        return [None if result is None else flatten(result.protocol) for result in self.results]


def is_ours(path: Path) -> bool:
    """Return whether a file is a report of any version of `page`; FormatError for a pipe or a device."""
    regular(path)
    with path.open("rb") as file:
        return MARK.encode() in file.read(1000)


def page(records: Sequence[Record]) -> str:
    """Return the HTML about runs, side by side if several; all text is escaped."""
    environment = Environment(
        loader=PackageLoader("diffusion_cli.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "cell": _cell, "svg": _svg, "line_style": line_style}
    environment.tests["numeric"] = _is_numeric
    environment.globals |= {
        "side_by_side": side_by_side,
        "measured_model": measured_model,
        "explained": explained,
        "few": FEW,
    }
    return environment.get_template("template.html").render(
        title=" · ".join(record.name for record in records),
        runs=records,
        steps=sorted({step for record in records for step in record.previews}),
        results=comparable([record.reports for record in records]),
        notes=list(dict.fromkeys(note for record in records for note in _notes(record.reports))),
        panels=panels({record.name: record.curves for record in records}),
        version=__version__,
        now=f"torch {torch.__version__} and Python {platform.python_version()} on {platform.system()}",
    )


def panels(runs: Mapping[str, Mapping[str, Points]]) -> list[Panel]:
    """Return the curves of runs, given by run and column, in panels of related columns.

    For one run each column has a colour. For several runs each run has a colour, and a family of more than
    two columns gets one panel per column.
    """
    families: dict[str, list[str]] = {}
    for column in dict.fromkeys(column for curves in runs.values() for column in curves):
        families.setdefault(_family(column), []).append(column)
    found = []
    for title, columns in families.items():
        if len(columns) == 1 or (len(runs) > 1 and len(columns) > 2):
            found += [_panel(column, [column], runs) for column in columns]
        else:
            found.append(_panel(title, columns, runs))
    return found


def _family(column: str) -> str:
    """Return the common title of a column, its `val_` counterpart and its quartiles."""
    name = column.removeprefix("val_")
    by_level = re.fullmatch(r"(.+)_q[1-4]", name)
    return f"{by_level[1]} by noise level" if by_level else name


def _panel(title: str, columns: Sequence[str], runs: Mapping[str, Mapping[str, Points]]) -> Panel:
    several = len(runs) > 1
    curves = []
    for number, (run, points) in enumerate(runs.items()):
        for place, column in enumerate(columns):
            if column in points:
                label = column if not several else run if len(columns) == 1 else f"{run}: {column}"
                style = number % len(COLOURS) + place * len(COLOURS) if several else place
                curves.append(Curve(label, points[column], style))
    lowest = min(min(curve.y) for curve in curves)
    log = "loss" in title and lowest > 0
    return Panel("", "", curves, title, log_y=log, x_min=0, y_min=None if log or lowest < 0 else 0)


def side_by_side(columns: Sequence[Mapping[str, Any] | None]) -> list[Row]:
    """Return the keys of several mappings with their values as on the command line, different ones first.

    A None column is empty, and does not count as a difference.
    """
    present = [column for column in columns if column is not None]
    rows = [
        Row(
            key,
            [
                format_value(column[key]) if column is not None and key in column else ABSENT
                for column in columns
            ],
            any(column.get(key, ...) != present[0].get(key, ...) for column in present),
        )
        for key in dict.fromkeys(key for column in present for key in column)
    ]
    return sorted(rows, key=lambda row: not row.differs)


def comparable(histories: Sequence[Sequence[Report]]) -> list[Comparable]:
    """Return the newest result of each metric, newest first, from the reports of each run, oldest first."""
    newest: list[dict[str, Result]] = [{} for _ in histories]
    for found, reports in zip(newest, histories, strict=True):
        for report in reversed(reports):
            for result in report.results:
                found.setdefault(result.name, result)
    rows = []
    for name in dict.fromkeys(name for found in newest for name in found):
        results = [found.get(name) for found in newest]
        first, *others = (result.protocol for result in results if result is not None)
        keys = dict.fromkeys(key for other in others for key in unlike(first, other))
        rows.append(Comparable(name, results, list(keys)))
    return rows


def _notes(reports: Sequence[Report]) -> list[str]:
    """Return the notes of the reports that have the newest result of any metric."""
    seen: set[str] = set()
    notes: list[str] = []
    for report in reversed(reports):
        names = {result.name for result in report.results}
        notes += [] if names <= seen else report.notes
        seen |= names
    return notes


def number(value: Any) -> str:
    """Return a number with five significant digits, as `diffuse eval` prints it."""
    return f"{value:.5g}" if isinstance(value, float) else format_value(value)


def _cell(text: str) -> str:
    """Return a cell of a table, rounded as `diffuse compare` prints it."""
    return f"{float(text):.4g}" if _is_numeric(text) and "." in text else text


def _svg(panel: Panel) -> str:
    """Return a panel as the data URI of an image, in which SVG cannot run scripts."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg(panel).encode()).decode()}"


def measured_model(result: Result) -> MeasuredModel:
    """Return the model and its sampler from the protocol of a result."""
    part = result.protocol.get("sampling") or result.protocol.get("model")
    part = part if isinstance(part, Mapping) else {}
    sampler, guidance = part.get("sampler"), part.get("guidance")
    words = []
    if isinstance(sampler, Mapping):
        words = [class_name(sampler), f"{format_value(part.get('steps'))} steps"]
        if isinstance(guidance, Mapping) and guidance.get("scale") is not None:
            words.append(f"{class_name(guidance)} of scale {format_value(guidance['scale'])}")
    return MeasuredModel(part.get("step", ""), part.get("weights", ""), ", ".join(words))


def _is_numeric(text: str) -> bool:
    """Return whether a cell of a table is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
