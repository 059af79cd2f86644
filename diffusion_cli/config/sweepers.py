"""The sweeper of a sweep, and the plan of its jobs."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from omegaconf import DictConfig

from diffusion_cli.config.catalogue import did_you_mean, options
from diffusion_cli.config.experiments import experiment_problems
from diffusion_cli.config.hydra_words import hydra_in_files, split_hydra
from diffusion_cli.config.launcher import launch, search_path, split_launcher
from diffusion_cli.config.objectives import objective_problems
from diffusion_cli.config.own_options import composition_problems
from diffusion_cli.config.runs import flatten
from diffusion_cli.config.schema import Config
from diffusion_cli.config.searches import OPTUNA, is_grid, search_problems
from diffusion_cli.config.sweeps import Sweep, expand, load_sweep
from diffusion_cli.config.typed import as_shown, as_typed, quoted, readable
from diffusion_cli.errors import NO_VALUE, Problem, UsageError

SWEEPERS = "hydra/sweeper"
BASIC = "basic"
"""Hydra's sweeper of all combinations of values."""
PACKAGES = {
    OPTUNA: "diffuse-cli[sweep]",
    "ax": "hydra-ax-sweeper",
    "nevergrad": "hydra-nevergrad-sweeper",
    "orion": "hydra-orion-sweeper",
}
"""Packages with sweepers, by the option that each adds."""


class SweepPlan(NamedTuple):
    """A checked sweep."""

    command: str
    dirs: Sequence[Path]
    swept: Sweep
    checked: list[Config]
    """Configurations of `swept.variants`."""
    hydra: "DictConfig"
    """Hydra's settings of the sweeper and the launcher."""

    @property
    def sweeper(self) -> str:
        return self.hydra.hydra.runtime.choices[SWEEPERS]

    @property
    def launcher(self) -> str:
        return self.hydra.hydra.runtime.choices["hydra/launcher"]

    @property
    def searches(self) -> bool:
        """Whether the sweeper chooses values by the objectives of earlier jobs."""
        return self.sweeper != BASIC

    @property
    def jobs(self) -> list[list[str]] | None:
        """The overrides of each job, if the sweeper does not choose them."""
        return None if self.searches else self.swept.jobs

    @property
    def maximizes(self) -> list[bool] | None:
        """Whether the sweeper maximizes each of its objectives; None if it has no direction."""
        direction = self.hydra.hydra.sweeper.get("direction")
        if direction is None:
            return None
        several = (
            [direction] if isinstance(direction, str) or not isinstance(direction, Iterable) else direction
        )
        return [str(getattr(item, "name", item)) == "maximize" for item in several]


def plan_sweep(command: str, overrides: Sequence[str], dirs: Sequence[Path] = ()) -> SweepPlan:
    """Check a sweep as far as it is known before its first job.

    Raises:
        UsageError: with the problems of the sweeper, of the jobs, or of the launcher.
    """
    words, others = split_launcher(overrides)
    own, others = split_hydra(command, others, sweeping=True)
    own = [text if readable(text) else as_typed(command, [text], dirs)[0] for text in own]
    own += search_path(dirs)
    settings = [text for text in others if _is_experiment(text)]
    for problems_in in (experiment_problems, hydra_in_files):
        if wrong := problems_in(command, settings, dirs):
            raise UsageError.several(wrong)
    sweeper, node = _sweeper(command, own, settings, dirs)
    given = node.get("params") or {}
    others = [*(f"{key}={value}" for key, value in given.items()), *others]
    if sweeper == OPTUNA and (wrong := search_problems(node, others)):
        raise UsageError.several(wrong)
    searches = sweeper != BASIC and not (sweeper == OPTUNA and is_grid(node))
    swept = expand(command, others, dirs, intervals=searches, closed_ranges=sweeper == OPTUNA)
    if sweeper != BASIC and not swept.keys and not node.get("custom_search_space"):
        remedy = "add values to a key, such as 'optimizer.lr=interval(1e-4,1e-2)'"
        raise UsageError("hydra/sweeper", sweeper, "has no values to search", remedy)
    checked = load_sweep(swept, dirs)
    plan_launcher = launch(as_typed(command, words, dirs), checked, dirs)
    fixed = fixed_words(checked[0])
    words = [*own, *settings, *plan_launcher, *fixed]
    plan = SweepPlan(command, dirs, swept, checked, _composed(command, words, dirs))
    if sweeper != BASIC and (problems := objective_problems(checked, plan.maximizes)):
        raise UsageError.several(problems)
    return plan


def folder_of_sweep(config: Config) -> str:
    """Return the folder of a sweep, by the configuration of a job; the working folder for a command without one."""
    return getattr(config, "output_dir", ".")


def fixed_words(config: Config) -> list[str]:
    """Return Hydra's words for its files and its log, which are those of this program."""
    return [
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
        "hydra.output_subdir=null",
        f"hydra.sweep.dir={quoted(folder_of_sweep(config))}",
        "hydra.sweep.subdir=.",
    ]


def sweeper_keys(overrides: Sequence[str], dirs: Sequence[Path]) -> list[str]:
    """Return the keys of the sweeper that a command line chooses; UsageError for an unknown option."""
    own = [text for text in overrides if text.startswith(SWEEPERS)]
    settings = _plain(_composed("train", [*own, *search_path(dirs)], dirs).hydra.sweeper)
    return [key for key in flatten(settings) if not key.endswith("_target_")]


def _sweeper(
    command: str, own: Sequence[str], settings: Sequence[str], dirs: Sequence[Path]
) -> tuple[str, Mapping[str, Any]]:
    """Return the option of the sweeper, and its settings; UsageError for an unknown option or key."""
    from omegaconf import OmegaConf

    from diffusion_cli.config.hydra_jobs import installed

    chosen = {text.partition("=")[0]: text.partition("=")[2] for text in own}
    for group in (text for text in chosen if text.startswith(SWEEPERS)):
        name, known = chosen[group], [*installed(group), *options(group, dirs)]
        if name not in known:
            raise UsageError.several([_unknown(group, name, known)])
    groups = [text for text in own if "/" in text.partition("=")[0] or text.startswith("hydra.searchpath=")]
    base = _composed(command, [*groups, *settings], dirs)
    keys = flatten(_plain(base.hydra.sweeper))
    problems = []
    for key in (text.lstrip("+") for text in chosen if text.lstrip("+").startswith("hydra.sweeper.")):
        name = key.removeprefix("hydra.sweeper.")
        if name.partition(".")[0] not in {other.partition(".")[0] for other in keys}:
            usual = [other for other in keys if not other.endswith("_target_")]
            problems.append(Problem(key, NO_VALUE, "unknown key", did_you_mean(name, usual)))
    if problems:
        raise UsageError.several(problems)
    node = OmegaConf.to_container(_composed(command, [*own, *settings], dirs).hydra.sweeper)
    assert isinstance(node, dict)
    return base.hydra.runtime.choices[SWEEPERS], {str(key): value for key, value in node.items()}


def _plain(node: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    found = OmegaConf.to_container(node)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def _unknown(group: str, name: str, known: Sequence[str]) -> Problem:
    """The problem of an option of the sweeper that is not installed, or is none."""
    if group == SWEEPERS and name in PACKAGES:
        return Problem(group, name, "is not installed", f"pip install '{PACKAGES[name]}'")
    if not known:
        return Problem(group, name, "no such group", f"use {SWEEPERS}=")
    return Problem(group, name, "unknown option", did_you_mean(name, known))


def _composed(command: str, words: Sequence[str], dirs: Sequence[Path]) -> "DictConfig":
    """Compose Hydra's settings; UsageError for words that it refuses."""
    from diffusion_cli.config.hydra_jobs import hydra_config

    missing = [
        name
        for text in words
        if text.startswith("hydra.job.env_copy=")
        for name in text.partition("=")[2].strip("[]").split(",")
        if name.strip() and name.strip() not in os.environ
    ]
    if missing:
        raise UsageError(
            "hydra.job.env_copy", missing[0], "not set in this environment", f"export {missing[0]}"
        )
    try:
        # The configuration of the command matters only to an experiment, which may have settings of Hydra.
        return hydra_config(command if any(map(_is_experiment, words)) else None, words)
    except Exception as error:  # Hydra and OmegaConf have no common base class
        if type(error).__module__.partition(".")[0] not in ("hydra", "omegaconf", "antlr4", "yaml"):
            raise
        cause = error.__cause__ or error
        key = getattr(cause, "full_key", None)
        text = next((text for text in words if key and text.lstrip("+").startswith(f"{key}=")), None)
        if text is None:
            raise UsageError.several(composition_problems(command, words, dirs, error)) from error
        raise UsageError(as_shown(text).lstrip("+"), NO_VALUE, str(cause).splitlines()[0]) from error


def _is_experiment(text: str) -> bool:
    return text.startswith("experiment=") and text != "experiment=null"
