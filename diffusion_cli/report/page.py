"""The page about one run or several: one HTML file that holds all it shows and asks no network."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from diffusion_cli import __version__
from diffusion_cli.config import flatten
from diffusion_cli.errors import format_value
from diffusion_cli.metrics import Report, Result, unlike
from diffusion_cli.report import charts
from diffusion_cli.report.record import Record, measured
from diffusion_cli.system.untrusted import regular

MARK = '<meta name="generator" content="diffuse '
ABSENT = "–"


class Row(NamedTuple):
    """A key with its value in each run, and whether the runs differ in it."""

    key: str
    values: list[str]
    differs: bool


class Comparable(NamedTuple):
    """The newest result of one name in each run, or None; and the keys of the protocol in which they are unlike."""

    name: str
    results: list[Result | None]
    unlike: list[str]

    @property
    def protocols(self) -> list[dict[str, Any] | None]:
        """By which each was measured, with dotted keys."""
        return [None if result is None else flatten(result.protocol) for result in self.results]


def is_ours(path: Path) -> bool:
    """Whether a file is a page that `page` made, of any version; ValueError for a pipe or a device."""
    regular(path)
    with path.open("rb") as file:
        return MARK.encode() in file.read(1000)


def page(records: Sequence[Record]) -> str:
    """The HTML about runs, side by side if there are several; every text of theirs is escaped."""
    environment = Environment(
        loader=PackageLoader("diffusion_cli.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "sampler": _sampler}
    environment.tests["numeric"] = _is_numeric
    environment.globals |= {"side_by_side": side_by_side, "measured": measured}
    return environment.get_template("template.html").render(
        title=" · ".join(record.name for record in records),
        runs=records,
        steps=sorted({step for record in records for step in record.previews}),
        results=comparable([record.reports for record in records]),
        notes=list(dict.fromkeys(note for record in records for note in _notes(record.reports))),
        charts=charts.charts({record.name: record.curves for record in records}),
        drawing=charts,
        version=__version__,
        now=f"torch {torch.__version__} and Python {platform.python_version()} on {platform.system()}",
    )


def side_by_side(columns: Sequence[Mapping[str, Any] | None]) -> list[Row]:
    """The keys of several mappings with their values as on the command line, those that differ first.

    A column that is None is empty, and differs from none.
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
    """The newest result of each name, the newest first, of runs whose reports come oldest first."""
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
    """The notes of the reports that hold the newest result of some name."""
    seen: set[str] = set()
    notes: list[str] = []
    for report in reversed(reports):
        names = {result.name for result in report.results}
        notes += [] if names <= seen else report.notes
        seen |= names
    return notes


def _number(value: Any) -> str:
    """A number in five digits, as `diffuse eval` prints it."""
    return f"{value:.5g}" if isinstance(value, float) else format_value(value)


def _sampler(result: Result) -> str:
    """How the samples of a result were made, in a few words; none if none were."""
    about = measured(result)
    if not isinstance(about.get("sampler"), Mapping):
        return ""
    words = [_class(about["sampler"]), f"{format_value(about.get('steps'))} steps"]
    guidance = about.get("guidance")
    if isinstance(guidance, Mapping) and guidance.get("scale") is not None:
        words.append(f"{_class(guidance)} of scale {format_value(guidance.get('scale'))}")
    return ", ".join(words)


def _class(node: Mapping[str, Any]) -> str:
    return str(node.get("_target_")).rpartition(".")[2]


def _is_numeric(text: str) -> bool:
    """Whether a cell of a table holds a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
