"""Numbers with what they mean: the protocol by which each was measured is written next to it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from diffusion_cli.config import flatten
from diffusion_cli.errors import NO_VALUE, FormatError, UsageError, format_value
from diffusion_cli.runs.migrate import migrated
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.locks import locked
from diffusion_cli.system.temporary_files import remove_abandoned
from diffusion_cli.system.untrusted import escaped, read_json

SOMETIMES = (
    "label_shares",
    "lossy",
    "repeats",
)  # settings of sampling that are on record only where they apply


@dataclass(frozen=True)
class Result:
    """One number of a report."""

    name: str
    value: float
    details: dict[str, float]
    """Numbers that belong to it, by name."""
    protocol: dict[str, Any]
    """All that it depends on, as plain data; `sampling` is how the samples were made, `environment` with what."""


@dataclass(frozen=True)
class Report:
    """The results of one evaluation, and what a reader must know of them."""

    results: list[Result]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The report that `to_dict` gave the data of; LookupError, TypeError or AttributeError for other data."""
        report = cls([Result(**result) for result in data["results"]], list(data["notes"]))
        for result in report.results:
            if not isinstance(result.name, str) or not isinstance(result.protocol, dict):
                raise TypeError(f"name and protocol of {result.name} should be a text and an object")
            if not all(isinstance(value, int | float) for value in (result.value, *result.details.values())):
                raise TypeError(f"value and details of {result.name} should be numbers")
        if not all(isinstance(note, str) for note in report.notes):
            raise TypeError("notes should be texts")
        return report

    def table(self) -> str:
        """The numbers one a line, details indented below theirs, and then the notes."""
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
    """The keys in which two protocols measure differently; what is measured, and on what machine, does not count."""
    keys = dict.fromkeys([*first, *second])
    measured = ("sampling", "model", "environment")
    differing = [key for key in keys if key not in measured and first.get(key) != second.get(key)]
    one, other = (_distribution(protocol) for protocol in (first, second))
    return differing + [key for key in one if key in other and one[key] != other[key]]


def _distribution(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The settings on record that change the numbers of a model and its sampler, and are rarely what is compared."""
    found: dict[str, Any] = {}
    for part in ("sampling", "model"):
        facts = protocol.get(part)
        facts = facts if isinstance(facts, Mapping) else {}
        keys = [key for key in ("weights", "labels", "precision", "clip_x0") if facts.get(key) is not None]
        keys += ["label_shares"] if "labels" in keys else []
        found |= {f"{part}.{key}": facts.get(key) for key in keys}
    return found


def sampling_differences(results: Mapping[str, Mapping[str, Result]]) -> dict[str, list[str]]:
    """The settings of sampling in which results of one name differ, each with its text for every run.

    `results` are those of each run by name. A run whose results were sampled in several ways has all of their texts.
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
    """How samples were made, as texts by dotted keys; not of which model."""
    facts = protocol.get("sampling")
    flat = flatten(facts) if isinstance(facts, Mapping) else {}
    texts = {key.removesuffix("._target_"): value for key, value in flat.items() if not _is_of_model(key)}
    return {
        key: _brief(str(value).rpartition(".")[2] if f"{key}._target_" in flat else format_value(value))
        for key, value in texts.items()
    }


def _is_of_model(key: str) -> bool:
    return key.endswith("sha256") or key.partition(".")[0] in ("run", "step", "ema", "samples")


def _brief(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def notes_on_seeds(history: Sequence[Mapping[str, Any]], report: Report) -> list[str]:
    """A note where an earlier evaluation of as many samples, made alike, shares some of them, but not all.

    The difference of two such numbers says little about how much they vary from seeds to seeds.
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
                    f"{seeds[-1]}; take seed={seeds.stop} for other samples, or repeats= for a standard deviation"
                ]
    return []


def _seeds(protocol: Mapping[str, Any]) -> tuple[range, dict[str, Any]] | None:
    """The seeds of samples, and the other settings that they were made by; None without seeds on record."""
    sampling = protocol.get("sampling")
    seeds = sampling.get("seeds") if isinstance(sampling, Mapping) else None
    if not isinstance(sampling, Mapping) or not isinstance(seeds, list) or [*map(type, seeds)] != [int, int]:
        return None
    apart = ("seeds", "repeats", "pixels_sha256", "network_calls")
    return range(seeds[0], seeds[1] + 1), {key: sampling[key] for key in sampling if key not in apart}


def newest(history: Sequence[Mapping[str, Any]]) -> dict[str, Result]:
    """The newest result of each name in a history."""
    reports = [Report.from_dict(entry) for entry in history]
    return {result.name: result for report in reports for result in report.results}


def history_table(histories: Mapping[str, Sequence[Mapping[str, Any]]], force: bool) -> str:
    """The newest numbers of several runs by name, a row a run, as a Markdown table.

    Settings of sampling in which they differ have a column each. Raises UsageError where the protocols of two numbers
    of one name are unlike, or with `force` marks them by a `*`.
    """
    found = {run: newest(history) for run, history in histories.items()}
    names = list(dict.fromkeys(name for results in found.values() for name in results))
    if not names:
        raise UsageError(
            "compare", ",".join(found), "no numbers there", "measure some with diffuse eval run=NAME"
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
            f"measured by unlike protocols ({'; '.join(mistakes)})",
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
    lines += [f"(*) not by the protocol of the first: {line}" for line in mistakes]
    return "\n".join(map(escaped, lines))


def read_history(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.json, oldest first; none if there is no such file.

    Raises UsageError if it is not a JSON list of objects.
    """
    if not path.exists():
        return []
    try:
        history = migrated(read_json(path))
    except FormatError as error:
        raise UsageError(path, NO_VALUE, str(error), "move it away or mend it") from error
    try:
        if not isinstance(history, list):
            raise TypeError(f"but {type(history).__name__}")
        for entry in history:
            Report.from_dict(entry)
    except (LookupError, TypeError, AttributeError) as error:
        raise UsageError(
            path, NO_VALUE, f"is not a list of results ({error})", "move it away or mend it"
        ) from error
    return history


def append_history(path: Path, entry: Mapping[str, Any]) -> None:
    """Add an entry of plain data to a metrics.json, which is replaced in one move.

    Raises UsageError, and leaves the file as it is, if that is not a list of entries.
    """
    remove_abandoned(path.parent)
    with locked(path):  # two evaluations may end at the same time
        history: Sequence[Mapping[str, Any]] = [*read_history(path), entry]
        text = json.dumps(history, indent=2, allow_nan=False)
        with atomic_write(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
