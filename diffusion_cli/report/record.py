"""The content of a run folder, for its report."""

import base64
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from diffusion_cli.charts import Points
from diffusion_cli.config import flatten
from diffusion_cli.errors import UsageError
from diffusion_cli.formats.files import opened
from diffusion_cli.metrics import Report, read_history
from diffusion_cli.runs.checkpoint import LAST, Checkpoint
from diffusion_cli.runs.curves import read_curves
from diffusion_cli.runs.find import newest
from diffusion_cli.runs.manifest import merge, read_records
from diffusion_cli.runs.overview import data_name
from diffusion_cli.runs.schema import CheckpointInfo
from diffusion_cli.system.seeding import seed_ranges
from diffusion_cli.system.untrusted import LONGEST_MANIFEST, MOST_IN_MANIFEST, read_csv, read_json, reason
from diffusion_cli.system.untrusted import read as read_file

MOST_PREVIEWS = 50  # embedded in a page
MOST_EDITS = 10  # embedded in a page

Content = TypeVar("Content")


class SampleRecord(NamedTuple):
    """A grid of samples, their denoising if it was drawn, and their settings."""

    name: str
    picture: str
    settings: dict[str, Any]
    strip: str | None = None


class EditRecord(NamedTuple):
    """The picture of before and after of an edit."""

    name: str
    picture: str


class Comparison(NamedTuple):
    """The table, header first, and the plot of a comparison; either may be missing."""

    name: str
    table: list[list[str]]
    plot: str | None


@dataclass(frozen=True)
class Record:
    """The content of a run folder; pictures are data URIs, and settings have dotted keys."""

    name: str
    facts: dict[str, str]
    config: dict[str, Any]
    environment: dict[str, str]
    curves: Mapping[str, Points]
    """Curves by column of metrics.csv."""
    previews: dict[int, str]
    """Preview grids by step."""
    samples: SampleRecord | None
    """The newest samples."""
    real: str | None
    """Training images."""
    edits: list[EditRecord]
    """Edits, newest first."""
    reports: list[Report]
    """Reports of metrics.json, oldest first."""
    comparisons: list[Comparison]
    remarks: list[str]
    """Sentences about omitted content."""


def read_record(folder: Path, name: str) -> Record:
    """Return the record of a run folder with its newest valid checkpoint; other damaged files are left out.

    Raises UsageError if no checkpoint is valid, or metrics.json is damaged.
    """
    found = newest(folder)
    if found is None:
        raise UsageError("run", folder, f"has no {LAST}", "choose another run")
    checkpoint = found.checkpoint
    reports = _reports(folder / "metrics.json")
    reading = _Reading(folder, [] if found.remark is None else [f"{found.remark}."])
    return Record(
        name,
        _facts(folder, checkpoint),
        flatten(checkpoint.info.config.model_dump()),
        _environment(checkpoint, reports),
        reading.tried(read_curves, folder / "metrics.csv") or {},
        _previews(reading),
        _samples(reading),
        reading.tried(_data_uri, folder / "previews" / "real.png"),
        _edits(reading),
        reports,
        list(_comparisons(reading)),
        reading.remarks,
    )


@dataclass
class _Reading:
    """A folder; damaged files in it are skipped with a remark."""

    folder: Path
    remarks: list[str] = field(default_factory=list)

    def tried(self, content: Callable[[Path], Content], path: Path) -> Content | None:
        """Return the content of a file; None if it is missing or damaged."""
        if not path.is_file():
            return None
        try:
            return content(path)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            self.remarks.append(
                f"{path.relative_to(self.folder)} cannot be read ({reason(error)}) and is left out."
            )
            return None


def _facts(folder: Path, checkpoint: Checkpoint) -> dict[str, str]:
    info = checkpoint.info
    budget = f" of {info.config.max_steps:,}" if info.config.max_steps else ""
    # Includes the buffers, which are few.
    weights = sum(tensor.numel() for tensor in checkpoint.weights("ema").values())
    number = f"{weights / 1e6:.2f}M"
    if info.lora is not None:
        number = f"{weights:,} trained of {(weights + info.lora.frozen) / 1e6:.2f}M"
    facts = {
        "step": f"{checkpoint.step:,}{budget}",
        "task": info.task,
        "shape": " × ".join(str(size) for size in info.shape),
        "parameters": number,
        "trained on": _data(info),
    }
    return (
        facts
        | ({} if info.init is None else {"first weights": str(info.init)})
        | ({"classes": ", ".join(info.class_names)} if info.class_names else {})
        | {"folder": str(folder)}
    )


def _data(info: CheckpointInfo) -> str:
    """Return the data that a model was trained on, or the source that it was imported from."""
    if info.origin is not None:
        licence = f", licence {info.origin.licence}" if info.origin.licence else ""
        commit = f" at commit {info.origin.commit}" if info.origin.commit else ""
        return f"unknown data; imported from {info.origin.source}{commit}: {info.origin.kind}{licence}"
    assert info.config.dataset is not None
    return f"{info.num_images:,} images of {data_name(info.config.dataset)}"


def _environment(checkpoint: Checkpoint, reports: list[Report]) -> dict[str, str]:
    """Return the recorded versions and devices, newest first."""
    evaluated = []
    for result in (result for report in reversed(reports) for result in report.results):
        environment = result.protocol.get("environment")
        environment = environment if isinstance(environment, Mapping) else {}
        versions = environment.get("versions")
        named = versions.items() if isinstance(versions, Mapping) else ()
        words = [*(f"{name} {version}" for name, version in named), environment.get("device")]
        evaluated.append(", ".join(str(word) for word in words if word))
    return {
        "trained with": f"lightning {checkpoint.lightning_version}",
        "evaluated with": "; ".join(dict.fromkeys(filter(None, evaluated))) or "unknown",
    }


def _previews(reading: _Reading) -> dict[int, str]:
    """Return the preview grids by step: all, or MOST_PREVIEWS from the first to the last."""
    found = {
        int(match[1]): path
        for path in reading.folder.glob("previews/*.png")
        if (match := re.fullmatch(r"step_(\d+)", path.stem))
    }
    steps = sorted(found)
    if len(steps) > MOST_PREVIEWS:
        reading.remarks.append(f"{MOST_PREVIEWS} of the {len(steps)} pictures in previews are shown.")
        steps = [steps[place * (len(steps) - 1) // (MOST_PREVIEWS - 1)] for place in range(MOST_PREVIEWS)]
    pictures = {step: reading.tried(_data_uri, found[step]) for step in steps}
    return {step: picture for step, picture in pictures.items() if picture is not None}


def _samples(reading: _Reading) -> SampleRecord | None:
    grids = sorted(reading.folder.glob("samples/*/grid.png"), key=lambda path: path.stat().st_mtime)
    if not grids:
        return None
    settings = reading.tried(_settings, grids[-1].with_name("manifest.json"))
    picture = reading.tried(_data_uri, grids[-1])
    strip = reading.tried(_data_uri, grids[-1].with_name("strip.png"))
    return None if picture is None else SampleRecord(grids[-1].parent.name, picture, settings or {}, strip)


def _edits(reading: _Reading) -> list[EditRecord]:
    grids = sorted(reading.folder.glob("edits/*/grid.png"), key=lambda path: path.stat().st_mtime)[::-1]
    if len(grids) > MOST_EDITS:
        reading.remarks.append(f"The newest {MOST_EDITS} of the {len(grids)} edits are shown.")
    pictures = {grid: reading.tried(_data_uri, grid) for grid in grids[:MOST_EDITS]}
    return [
        EditRecord(grid.parent.name, picture) for grid, picture in pictures.items() if picture is not None
    ]


def _settings(path: Path) -> dict[str, Any]:
    """Return the sampling settings in a manifest."""
    manifest = read_json(path, LONGEST_MANIFEST, MOST_IN_MANIFEST)
    manifest = merge(manifest, *read_records(path.parent).values())
    images = {"images": sum(map(len, seed_ranges(manifest["seeds"])))} if "seeds" in manifest else {}
    return (
        images
        | {"step": manifest["step"]}
        | flatten(manifest["settings"] | {"versions": manifest["versions"]})
    )


def _reports(path: Path) -> list[Report]:
    return [Report.from_dict(entry) for entry in read_history(path)]


def _comparisons(reading: _Reading) -> Iterator[Comparison]:
    for folder in sorted(reading.folder.glob("comparisons/*/")):
        table = reading.tried(read_csv, folder / "table.csv")
        plot = reading.tried(_data_uri, folder / "plot.png")
        if table or plot:
            yield Comparison(folder.name, table or [], plot)


def _data_uri(path: Path) -> str:
    """Return a picture as a data URI; only images are read, even through a link to another file."""
    data = read_file(path)
    opened(data)
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
