"""Results of evaluations with their protocols, and their comparison."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from diffusion_cli.config import flatten
from diffusion_cli.errors import NO_VALUE, FormatError, UsageError, class_name, format_value
from diffusion_cli.runs.migrate import migrated
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.locks import locked
from diffusion_cli.system.temporary_files import remove_abandoned
from diffusion_cli.system.untrusted import escaped, read_json

SOMETIMES = (
    "ema_length",
    "label_shares",
    "conditions",
    "negative_prompt",
    "lossy",
    "repeats",
)  # sampling settings that are recorded only if they apply


@dataclass(frozen=True)
class Result:
    """A value of a report."""

    name: str
    value: float
    details: dict[str, float]
    """Additional values by name."""
    protocol: dict[str, Any]
    """All settings that the value depends on, as plain data; `sampling`: the samples, `environment`: the software."""


@dataclass(frozen=True)
class Report:
    """Results of an evaluation, with notes for its readers."""

    results: list[Result]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Create a report from the data of `to_dict`; LookupError, TypeError or AttributeError for other data."""
        report = cls([Result(**result) for result in data["results"]], list(data["notes"]))
        for result in report.results:
            if not isinstance(result.name, str) or not isinstance(result.protocol, dict):
                raise TypeError(f"name and protocol of {result.name} must be a string and an object")
            if not all(isinstance(value, int | float) for value in (result.value, *result.details.values())):
                raise TypeError(f"value and details of {result.name} must be numbers")
        if not all(isinstance(note, str) for note in report.notes):
            raise TypeError("notes must be strings")
        return report

    def table(self) -> str:
        """Return the values one per line, with indented details, followed by the notes."""
        rows: list[tuple[str, float]] = []
        for result in self.results:
            rows.append((result.name, result.value))
            rows += [(f"  {name}", value) for name, value in result.details.items()]
        width = max((len(name) for name, _ in rows), default=0)
        lines = [f"{name:<{width}}  {_shown(value):>10}" for name, value in rows]
        return "\n".join(map(escaped, [*lines, *(f"note: {note}" for note in self.notes)]))


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.5g}"


def unlike(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return the keys in which two protocols differ, except what they are meant to compare (model, machine)."""
    keys = dict.fromkeys([*first, *second])
    measured = ("sampling", "model", "environment")
    differing = [key for key in keys if key not in measured and first.get(key) != second.get(key)]
    one, other = (_distribution(protocol) for protocol in (first, second))
    return differing + [key for key in one if key in other and one[key] != other[key]]


def _distribution(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded settings that change the distribution of samples but rarely are the subject of comparison."""
    found: dict[str, Any] = {}
    for part in ("sampling", "model"):
        facts = protocol.get(part)
        facts = facts if isinstance(facts, Mapping) else {}
        stated = ("weights", "labels", "conditions", "negative_prompt", "precision", "clip_x0")
        keys = [key for key in stated if facts.get(key) is not None]
        keys += ["label_shares"] if "labels" in keys else []
        keys += ["ema_length"] if "weights" in keys else []
        found |= {f"{part}.{key}": facts.get(key) for key in keys}
    return found


def sampling_differences(results: Mapping[str, Mapping[str, Result]]) -> dict[str, list[str]]:
    """Return the sampling settings in which results of one name differ, each with a text per run.

    `results` are those of each run by name. A run with results from several settings has all of them in its text.
    """
    settings = {
        (run, name): _sampling(result.protocol)
        for run, named in results.items()
        for name, result in named.items()
    }
    columns: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for facts in settings.values() for key in facts):
        texts: dict[str, dict[str, str]] = {}
        for (run, name), facts in settings.items():
            if key in facts or (facts and key.partition(".")[0] in SOMETIMES):
                texts.setdefault(name, {})[run] = facts.get(key, "none")
        differing = [by_run for by_run in texts.values() if len(set(by_run.values())) > 1]
        if differing:
            columns[key] = [
                " / ".join(dict.fromkeys(by_run[run] for by_run in differing if run in by_run))
                for run in results
            ]
    return columns


def _sampling(protocol: Mapping[str, Any]) -> dict[str, str]:
    """Return the sampling settings, without those of the model, as texts by dotted keys."""
    facts = protocol.get("sampling")
    flat = flatten(facts) if isinstance(facts, Mapping) else {}
    texts = {key.removesuffix("._target_"): value for key, value in flat.items() if not _is_of_model(key)}
    return {
        key: _brief(class_name({"_target_": value}) if f"{key}._target_" in flat else format_value(value))
        for key, value in texts.items()
    }


def _is_of_model(key: str) -> bool:
    return key.endswith("sha256") or key.partition(".")[0] in ("run", "step", "ema", "init", "samples")


def _brief(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def notes_on_seeds(history: Sequence[Mapping[str, Any]], report: Report) -> list[str]:
    """Return a note if an earlier evaluation with the same settings shares some samples with this one, but not all.

    The difference of two such values underestimates their variation between seeds.
    """
    now = _seeds(report.results[0].protocol) if report.results else None
    if now is None:
        return []
    for entry in reversed(history):
        earlier = [_seeds(result["protocol"]) for result in entry["results"]]
        for seeds, settings in (found for found in earlier if found is not None):
            shared = len(now[0]) - abs(seeds.start - now[0].start)
            if settings == now[1] and len(seeds) == len(now[0]) and 0 < shared < len(seeds):
                return [
                    f"seeds: {shared} of the {len(seeds)} samples are also in the evaluation of seeds {seeds[0]} to "
                    f"{seeds[-1]}; set seed={seeds.stop} for other samples, or repeats= for a standard deviation"
                ]
    return []


def _seeds(protocol: Mapping[str, Any]) -> tuple[range, dict[str, Any]] | None:
    """Return the seeds of samples and their other settings; None if no seeds are recorded."""
    sampling = protocol.get("sampling")
    seeds = sampling.get("seeds") if isinstance(sampling, Mapping) else None
    if not isinstance(sampling, Mapping) or not isinstance(seeds, list) or [*map(type, seeds)] != [int, int]:
        return None
    apart = ("seeds", "repeats", "pixels_sha256", "network_calls")
    return range(seeds[0], seeds[1] + 1), {key: sampling[key] for key in sampling if key not in apart}


def newest(history: Sequence[Mapping[str, Any]]) -> dict[str, Result]:
    """Return the newest result of each name in a history."""
    reports = [Report.from_dict(entry) for entry in history]
    return {result.name: result for report in reports for result in report.results}


def history_table(histories: Mapping[str, Sequence[Mapping[str, Any]]], force: bool) -> str:
    """Return the newest results of several runs as a Markdown table, one row per run.

    Sampling settings in which they differ have a column each. Raises UsageError if the protocols of a metric differ;
    with `force`, such values are marked by `*` instead.
    """
    found = {run: newest(history) for run, history in histories.items()}
    names = list(dict.fromkeys(name for results in found.values() for name in results))
    if not names:
        raise UsageError(
            "compare", ",".join(found), "have no results", "evaluate them with diffuse eval run=NAME"
        )
    mistakes, marked = [], set()
    for name in names:
        having = [(run, results[name]) for run, results in found.items() if name in results]
        (first, wanted), *others = having
        for run, result in others:
            keys = unlike(wanted.protocol, result.protocol)
            if keys:
                marked.add((run, name))
                mistakes.append(f"{name} of {first} and {run}: {', '.join(keys)}")
    if mistakes and not force:
        raise UsageError(
            "compare",
            ",".join(found),
            f"measured with different protocols ({'; '.join(mistakes)})",
            "measure them alike, or set force=true",
        )
    differences = sampling_differences(found)
    heads = ["run", *differences, *names]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row, (run, results) in enumerate(found.items()):
        cells = [texts[row] for texts in differences.values()]
        cells += [
            f"{_shown(results[name].value)}{'*' if (run, name) in marked else ''}" if name in results else ""
            for name in names
        ]
        lines.append(f"| {run} | {' | '.join(cells)} |")
    lines += [f"(*) protocol differs from the first run: {line}" for line in mistakes]
    return "\n".join(map(escaped, lines))


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a metrics.json, oldest first; empty if the file is missing.

    Raises UsageError if the file is not a JSON list of results.
    """
    if not path.exists():
        return []
    try:
        history = migrated(read_json(path))
    except FormatError as error:
        raise UsageError(path, NO_VALUE, str(error), "repair it or move it away") from error
    try:
        if not isinstance(history, list):
            raise TypeError(f"found {type(history).__name__}")
        for entry in history:
            Report.from_dict(entry)
    except (LookupError, TypeError, AttributeError) as error:
        raise UsageError(
            path, NO_VALUE, f"is not a list of results ({error})", "repair it or move it away"
        ) from error
    return history


def append_history(path: Path, entry: Mapping[str, Any]) -> None:
    """Append an entry of plain data to a metrics.json, atomically.

    Raises UsageError, leaving the file unchanged, if it is not a list of results.
    """
    remove_abandoned(path.parent)
    with locked(path):  # evaluations may run at the same time
        history: Sequence[Mapping[str, Any]] = [*read_history(path), entry]
        text = json.dumps(history, indent=2, allow_nan=False)
        with atomic_write(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
