"""The overrides of a command line: those that choose options, those that set keys, and mistakes in the others."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

from diffusion_cli.config.catalogue import defaults, options
from diffusion_cli.config.compose import parse
from diffusion_cli.config.hydra_words import hydra_problem, is_of_hydra
from diffusion_cli.config.key_types import takes_list
from diffusion_cli.config.renamed import renamed_key, renamed_split
from diffusion_cli.config.runs import flatten
from diffusion_cli.config.schema import GRIDS, UNSWEPT
from diffusion_cli.config.typed import as_shown, as_text
from diffusion_cli.config.unknown import unknown_key, unknown_option
from diffusion_cli.config.values import Node
from diffusion_cli.config.words import accepted
from diffusion_cli.errors import NO_VALUE, Problem, UsageError

# What runs the jobs of a sweep: `launcher=slurm`, or as Hydra spells it.
LAUNCHER = re.compile(r"(hydra[/.])?launcher(?=[.=])")
OF_RUNS = ("eval", "compare")
"""The commands that read the dataset of a run unless they name another."""
RUN_DATA = ("dataset.path", "dataset.masks", "dataset.source", "dataset.factory")
"""The keys with the places of a run's own dataset."""


def sorted_overrides(
    command: str, overrides: Sequence[str], dirs: Sequence[Path]
) -> tuple[list[str], dict[str, str], list[Problem]]:
    """Return the overrides that choose an option, those that set a key (text by key), and mistakes in the others."""
    groups = defaults(command)
    choosing: list[str] = []
    setting: dict[str, str] = {}
    mistakes: list[Problem] = []
    for text in overrides:
        try:
            item = parse(text)
        except UsageError as mistake:
            mistakes += mistake.problems
            continue
        key, shown = item.key_or_group, as_shown(text)
        if is_of_hydra(text) and not LAUNCHER.match(text):
            mistakes += filter(None, [hydra_problem(command, text, sweeping=False)])
            continue
        renamed = None if item.is_sweep_override() else renamed_split(key, item.value())
        if renamed is not None:
            mistakes.append(renamed)
        elif item.is_force_add() or item.is_add() or item.is_delete():
            remedy = "leave it out" if item.is_delete() else f"write {shown.lstrip('+')}"
            mistakes.append(Problem(shown, NO_VALUE, "keys cannot be added or removed", remedy))
        elif item.package is not None:
            mistakes.append(Problem(shown, NO_VALUE, "@ in a key is not supported", "write key=value"))
        elif item.is_sweep_override():
            as_list = takes_list(command, key, overrides, dirs)
            remedy = _one_value(command, shown, _listed_values(item, dirs), as_list)
            mistakes.append(Problem(shown, NO_VALUE, "several values", remedy))
        elif key in groups and isinstance(item.value(), list) and not isinstance(groups[key], list):
            mistakes.append(Problem(shown, NO_VALUE, "takes one option", _listed_options(item)))
        elif key in groups:
            value = item.value()
            names = value if isinstance(value, list) else [value]
            known = options(key, dirs)
            wrong = ["null" if name is None else str(name) for name in names if str(name) not in known]
            mistakes += [unknown_option(command, key, name, dirs) for name in wrong]
            choosing += [] if wrong else [text]
        else:
            setting[key] = f"{key}={ours}" if (ours := accepted(key, item.value())) else text
    return choosing, setting, mistakes


def _listed_options(item: "Override") -> str:
    """The remedy for a list of options of a group that takes one."""
    key, listed = item.key_or_group, item.get_value_element_as_str()[1:-1]
    return f"{'with -m ' if ',' in listed else ''}write {key}={listed or '<option>'}"


def _listed_values(item: "Override", dirs: Sequence[Path]) -> str:
    """The values of an override with several, separated by commas; empty for an interval."""
    from hydra.core.override_parser.types import Glob

    value = item.value()
    if isinstance(value, Glob):
        return ",".join(value.filter([*options(item.key_or_group, dirs)]))
    words = () if item.is_interval_sweep() else item.sweep_string_iterator()
    return as_shown(f"=[{','.join(words)}]")[2:-1]


def _one_value(command: str, text: str, listed: str, as_list: bool) -> str:
    """The remedy for several values of a key; `listed` has the values that a list can have."""
    key, _, value = text.partition("=")
    if command in GRIDS or as_list:
        return f"write {key}=[{listed or '<value>'}]"
    if not listed:
        return "give one, or add -m" + " hydra/sweeper=optuna" * ("interval(" in value)
    if "/" in value:
        return f"write {as_text(key, value)} for a path with a comma, or add -m for one run per value"
    return "give one, or add -m for one run per value"


def known_keys(command: str, setting: Mapping[str, str], implied: Node) -> tuple[list[str], list[Problem]]:
    """Return the overrides of keys that the chosen options have, and a problem for each of the others."""
    keys = [*flatten(implied), *defaults(command)]
    if command in OF_RUNS and implied.get("dataset") is None:
        keys += RUN_DATA
    known, unknown = [], []
    for key, text in setting.items():
        shown = as_shown(text)
        if LAUNCHER.match(text) and command not in UNSWEPT:
            unknown.append(Problem(shown, NO_VALUE, "applies to sweeps only", "add -m"))
            continue
        if any(other == key or other.startswith(f"{key}.") for other in keys):
            known.append(text)
            continue
        if renamed := renamed_key(command, key, parse(text).value()):
            unknown.append(renamed)
            continue
        unknown.append(unknown_key(command, shown, keys))
    return known, unknown
