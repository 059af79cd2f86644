"""Summaries of runs from their small files, without reading checkpoints and without torch."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from diffusion_cli.config.catalogue import option_of
from diffusion_cli.config.continued import IMPORTED
from diffusion_cli.config.runs import checkpoints_of, run_folders
from diffusion_cli.config.tasks import task_of_classes
from diffusion_cli.errors import UsageError, class_name, option_name
from diffusion_cli.runs.curves import read_curves
from diffusion_cli.runs.migrate import migrated
from diffusion_cli.system.untrusted import read_json, read_yaml


@dataclass(frozen=True)
class RunSummary:
    """What the files of a run show; None for facts that no readable file has."""

    name: str
    dataset: str | None
    """Option of `dataset=`, with the path of the user's own data; or the source of an imported model."""
    task: str | None
    step: int | None
    """Optimizer steps of the newest checkpoint."""
    max_steps: int | None
    results: dict[str, float]
    """Newest value of each metric of `metrics.json`."""
    result_steps: dict[str, int]
    """Step of the model of each result, where it is recorded."""
    bytes: int
    """Size of all files in the folder."""
    date: str
    """Local time of the newest checkpoint, to the second, in ISO format."""


def summaries(root: Path) -> list[RunSummary]:
    """Return summaries of the runs in a folder, the newest first."""
    dates = {folder: max(map(_changed, checkpoints_of(folder))) for folder in run_folders(root)}
    return [
        _summary(folder, dates[folder]) for folder in sorted(dates, key=lambda run: (-dates[run], run.name))
    ]


def _changed(path: Path) -> float:
    """Time of a file's last change; 0 if it has just been removed."""
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _summary(folder: Path, date: float) -> RunSummary:
    config: Any = {}
    with suppress(OSError, ValueError):
        config = migrated(read_yaml(folder / "config.yaml"))
    config = config if isinstance(config, Mapping) else {}
    results = _results(folder / "metrics.json")
    return RunSummary(
        name=folder.name,
        dataset=_dataset(config.get("dataset")) or _origin(config),
        task=_task(config),
        step=0 if _origin(config) else _step(folder),
        max_steps=number if type(number := config.get("max_steps")) is int else None,
        results={name: value for name, (value, _) in results.items()},
        result_steps={name: step for name, (_, step) in results.items() if step is not None},
        bytes=_size(folder),
        date=datetime.fromtimestamp(date).isoformat(timespec="seconds"),
    )


def data_name(dataset: Mapping[str, Any]) -> str:
    """Return the name of a `dataset` node as a user writes it: of its file or folder, or its option."""
    return Path(str(dataset["path"])).name if dataset.get("path") else _option(str(dataset["_target_"]))


def _dataset(node: Any) -> str | None:
    """Return the option of a dataset's class, and the path in its node."""
    target = node.get("_target_") if isinstance(node, Mapping) else None
    if not isinstance(target, str):
        return None
    path = node.get("path")
    return _option(target) if path is None else f"{_option(target)} {path}"


def _origin(config: Mapping[str, Any]) -> str | None:
    """Return the source of an imported model; None for a training."""
    return f"imported {config[IMPORTED]}" if isinstance(config.get(IMPORTED), str) else None


@cache
def _option(target: str) -> str:
    """Return the option of `dataset=` for a class; for a class without one, its name in the style of options."""
    node = {"_target_": target}
    with suppress(UsageError):  # an option file that is not YAML
        if option := option_of("dataset", node):
            return option
    return option_name(class_name(node))


def _task(config: Mapping[str, Any]) -> str | None:
    """Return the task of the classes of model and objective."""
    nodes = [config.get(key) for key in ("model", "objective")]
    targets = [str(node["_target_"]) for node in nodes if isinstance(node, Mapping) and "_target_" in node]
    return task_of_classes(targets) if targets else None


def _step(folder: Path) -> int | None:
    """Return the step of the newest numbered checkpoint, or the last one in `metrics.csv`."""
    names = [path.stem.removeprefix("step_") for path in checkpoints_of(folder)]
    steps = [float(name) for name in names if name.isdecimal()]
    if not steps:
        with suppress(OSError, ValueError):
            curves = read_curves(folder / "metrics.csv")
            steps = [step for points in curves.values() for step, _ in points]
    return int(max(steps)) if steps else None


def _results(path: Path) -> dict[str, tuple[float, int | None]]:
    """Return the newest value of each metric with its step if known; none for a missing or damaged file."""
    found: dict[str, tuple[float, int | None]] = {}
    with suppress(OSError, ValueError, LookupError, TypeError):
        for report in migrated(read_json(path)):
            for result in report["results"]:
                if isinstance(result["name"], str) and isinstance(result["value"], int | float):
                    found[result["name"]] = result["value"], _step_of(result.get("protocol"))
    return found


def _step_of(protocol: Any) -> int | None:
    """Return the step of the model in the protocol of a result."""
    if not isinstance(protocol, Mapping):
        return None
    parts = (protocol.get(key) for key in ("sampling", "model"))
    steps = (part.get("step") for part in parts if isinstance(part, Mapping))
    return next((step for step in steps if type(step) is int), None)


def _size(folder: Path) -> int:
    """Return the bytes of all files in a folder; links are not followed."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += Path(place, name).lstat().st_size
    return total
