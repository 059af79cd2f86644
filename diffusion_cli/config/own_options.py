"""Option files of a user: an error names the file."""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from diffusion_cli.config.catalogue import (
    CONF,
    chosen,
    content,
    defaults,
    did_you_mean,
    invalid_yaml,
    lineage,
    options,
)
from diffusion_cli.config.runs import flatten
from diffusion_cli.errors import NO_VALUE, Problem, first_line

OF_SETTINGS = ("experiment", "task")
"""Groups of settings: an option of the others names a class."""


def incomplete_files(command: str, overrides: Sequence[str], dirs: Sequence[Path]) -> list[Problem]:
    """Return the problems of chosen options of the user that are empty, or do not name a class as their group does.

    Args:
        command: name of the command.
        overrides: words of the command line.
        dirs: the user's folders of options, besides those of plugins.

    Raises:
        UsageError: for a file that is not a mapping in YAML.
    """
    files = [
        (group, file)
        for group, option in chosen(command, overrides, dirs).items()
        for name in (option if isinstance(option, list) else [option])
        if (file := options(group, dirs).get(str(name))) is not None and not file.is_relative_to(CONF)
    ]
    several = {group for group, option in defaults(command).items() if isinstance(option, list)}
    return [
        Problem(file, NO_VALUE, *problem)
        for group, file in files
        if (problem := _incomplete(group, file, group in several)) is not None
    ]


def _incomplete(group: str, file: Path, named: bool) -> tuple[str, str] | None:
    """Return the problem and the remedy of an option file; `named`: its group takes several options, each by name."""
    contents = [content(part) for part in lineage(file) if part.is_file()]
    if not any(contents):
        return "is empty", "write one key: value per line"
    if group in OF_SETTINGS:
        return None
    if not any(key.rpartition(".")[2] == "_target_" for found in contents for key in flatten(found)):
        return "has no _target_", f"name the class, as _target_: {_example(group)}"
    if named and any("_target_" in found for found in contents):
        return (
            "has no name above its _target_",
            f"write {file.stem}: in a line above, and indent the other lines",
        )
    return None


def _example(group: str) -> str:
    """The class of the first option of a group."""
    values = (flatten(content(file)) for file in options(group).values())
    targets = (
        value for found in values for key, value in found.items() if key.rpartition(".")[2] == "_target_"
    )
    return next(targets)


def composition_problems(
    command: str, overrides: Sequence[str], dirs: Sequence[Path], error: Exception
) -> list[Problem]:
    """Return the problems behind an error of Hydra: in the files of the user, or in overrides.

    Args:
        command: name of the command.
        overrides: words of the command line.
        dirs: the user's folders of options.
        error: what Hydra raised.
    """
    reason = first_line(error)
    place = re.match(r"In '([\w/]+)/([^/']+)':? (.*)", reason)
    file = options(place[1], dirs).get(place[2]) if place else None
    if place and file:
        return [Problem(file, NO_VALUE, *_problem_in_file(error, place[3]))]
    references = [text for text in overrides if "${" in text]
    reference = "use the name of a key, such as ${seed}"
    if references:
        return [Problem(text, NO_VALUE, "invalid reference ${...}", reference) for text in references]
    mark = getattr(error, "problem_mark", None)
    if isinstance(error, yaml.YAMLError) and mark is not None:
        return list(invalid_yaml(mark.name, error).problems)
    if key := getattr(error, "full_key", None):
        return [Problem(key, NO_VALUE, reason, reference)]
    return [Problem(command, NO_VALUE, f"cannot compose the configuration: {reason}")]


def _problem_in_file(error: Exception, reason: str) -> tuple[str, str]:
    """The problem and the remedy of an option file that Hydra refuses: for one of its keys, or its defaults."""
    from omegaconf.errors import ConfigKeyError

    cause = error.__context__
    if cause is None or not (key := getattr(cause, "full_key", None)):
        return reason.rstrip("."), "correct its defaults"
    if not isinstance(cause, ConfigKeyError):
        return f"{key}: {first_line(cause)}", "correct it"
    known = [str(name) for name in cause.parent_node if name not in ("_target_", "defaults")]
    return f"{key}: unknown key", did_you_mean(key.rpartition(".")[2], known)
