"""The name of a run, and the keys that identify it."""

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from diffusion_cli.config.averages import OF_PROFILE
from diffusion_cli.config.catalogue import brought_by, defaults, options
from diffusion_cli.errors import format_value
from diffusion_cli.runs.migrate import as_of_format_4, key_of_format_4

# Budgets, costs and places: a run may continue with other values of these keys.
NOT_IDENTITY = frozenset(
    [
        "name",
        "run",
        "derived",
        "max_steps",
        "max_epochs",
        "max_time",
        "checkpoint_every",
        "checkpoint_period",
        "keep_last",
        "log_every",
        "validate_every",
        "preview_every",
        "preview_real",
        "preview_steps",
        "eval_every",
        "eval_samples",
        "eval_steps",
        "keep_best",
        "objective_metric",
        "metric",
        "features",
        "reference",
        "cache_dir",
        "compile",
        "data_dir",
        "output_dir",
        "sampler",
        "trainer",
        "logger",
        "callback",
    ]
)


WITHOUT = {
    "condition": "diffusion_cli.conditions.NoImage",
    "text": "diffusion_cli.data.NoText",
    "augmentation": "diffusion_cli.data.NoAugmentation",
}
"""Options that stand for no condition and no augmentation, by group."""
BEFORE = {
    "init.weights": "ema",
    "lora.targets": "auto",
    "ema.profile": "exponential",
    "ema.lengths": OF_PROFILE["power"]["lengths"],
}
"""Values of keys that stand for what versions without these keys did."""
LONGEST = 120
"""Letters in the longest name of a run."""


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a training configuration that identifies a run, as flat dotted keys."""
    flat = flatten({key: value for key, value in config.items() if key not in NOT_IDENTITY})
    # A budget too: a larger one stretches the learning-rate schedule over all its steps.
    flat.pop("lr_schedule.decay_steps", None)
    flat.pop("dataset.unreadable", None)  # earlier versions lacked it; the images themselves are compared
    for key, default in BEFORE.items():
        if flat.get(key) == default:
            del flat[key]  # earlier versions lacked it
    flat.pop("ema.snapshot_every", None)  # an interval
    if flat.get("ema.profile") == "power":
        for key in OF_PROFILE["exponential"]:
            flat.pop(f"ema.{key}", None)
    for group, none in WITHOUT.items():
        if flat.get(f"{group}._target_") == none:
            del flat[f"{group}._target_"]  # earlier versions lacked the group
    # Keys that trade time for memory and change only rounding: a run that lacks memory must be able to change them.
    for key in (
        "accumulate_grad_batches",
        "model.gradient_checkpointing",
        "dataset.num_workers",
        "dataset.in_memory",
    ):
        flat.pop(key, None)
    return flat


def run_folders(root: Path) -> list[Path]:
    """Return the folders of the runs in a folder, sorted by name."""
    return sorted(
        {
            path.parent.parent
            for path in root.glob("*/checkpoints/*.ckpt")
            if checkpoints_of(path.parent.parent)
        }
    )


def checkpoints_of(run: Path) -> list[Path]:
    """Return the checkpoints that a run can resume from."""
    folder = run / "checkpoints"
    return [file for file in (folder / "last.ckpt", *folder.glob("step_*.ckpt")) if file.is_file()]


def file_in_place_of_run(path: Path, step_key: str | None) -> tuple[str, str]:
    """Return the problem and the remedy for a file that is named as a run.

    Args:
        path: the file, a checkpoint or another one.
        step_key: the key that chooses a checkpoint of the run; None without one.
    """
    folder = next((parent for parent in path.parents if checkpoints_of(parent)), None)
    if folder is None:
        return "is a file", "give the run's folder"
    number = re.fullmatch(r"step_0*(\d+)\.ckpt", path.name)
    step = number[1] if number else "best" if path.name == "best.ckpt" else None
    chosen = f", and {step_key}={step}" if step_key and step else ""
    return "is a file", f"give the run's folder, {folder}{chosen}"


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the keys that have other values in two flat mappings, or are in one of them only, sorted."""
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def replaced(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a configuration with other values of some dotted keys."""
    changed = copy.deepcopy(dict(config))
    for key, value in values.items():
        *parents, name = key.split(".")
        node = changed
        for parent in parents:
            node = node[parent]
        node[name] = value
    return changed


def fingerprint(node: Mapping[str, Any]) -> str:
    """Eight hex digits that follow from a configuration's keys and values, the same in all versions."""
    return hashlib.sha256(json.dumps(as_of_format_4(node), sort_keys=True).encode()).hexdigest()[:8]


def usual_options(choices: Mapping[str, Any], dirs: Sequence[Path]) -> dict[str, Any]:
    """Return the option of each group that the choices of dataset, task, optimizer and experiment bring, or default."""
    usual: dict[str, Any] = {**defaults("train")}
    for group in ("dataset", "task", "optimizer"):
        usual |= brought_by(options(group, dirs)[choices[group]])
    if choices.get("experiment"):
        brought = brought_by(options("experiment", dirs)[choices["experiment"]])
        usual |= {"lr_schedule": brought.get("lr_schedule", usual["lr_schedule"])}
    return usual


def run_names(
    config: Mapping[str, Any], implied: Mapping[str, Any], choices: Mapping[str, Any], dirs: Sequence[Path]
) -> tuple[str, str]:
    """Folder names that follow from the configuration: its main choices, then all that they do not imply.

    The first has four digits of long numbers, as a search proposes them; the second, of earlier versions, has all.

    Args:
        config: configuration of a training.
        implied: the configuration that the `choices` alone make.
        choices: the option of each group.
        dirs: the user's folders of options, besides those of plugins.
    """
    dataset = str(choices["dataset"])
    usual = usual_options(choices, dirs)
    words = [dataset] + [str(option) for option in (choices["schedule"],) if option is not None]
    words += [
        str(option)
        for group, option in choices.items()
        if group not in NOT_IDENTITY | {"dataset", "schedule"} and option != usual[group]
    ]
    before, now = identity(implied), identity(config)
    former = {key: key_of_format_4(key) for key in now}
    changed = {
        key if former[key] in now else former[key]: now[key]  # a plugin may have the key of format 4 too
        for key in now
        if before.get(key, ...) != now[key]
    }
    # Last parts of keys and paths only: the folder's config.yaml distinguishes runs with equal names.
    named = [(key.rpartition(".")[2], value) for key, value in sorted(changed.items())]
    exact, rounded = (
        re.sub(
            r"[^\w.+-]+",
            "_",
            "-".join([*words, *(f"{key}_{Path(write(value)).name}" for key, value in named)]),
        )
        for write in (format_value, _rounded)
    )
    digest = hashlib.sha256(exact.encode()).hexdigest()
    full = exact if len(exact) <= LONGEST else f"{exact[:100]}-{digest[:10]}"
    if rounded == exact:
        return full, full
    short = f"{rounded}-{digest[:6]}"
    return short if len(short) <= LONGEST else f"{rounded[:100]}-{digest[:10]}", full


def _rounded(value: Any) -> str:
    """A value in the syntax of the command line, with four digits if it is a number with more than six."""
    many = isinstance(value, float) and len(Decimal(repr(value)).as_tuple().digits) > 6
    return f"{value:.4g}" if many else format_value(value)
