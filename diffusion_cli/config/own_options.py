"""Option files of a user: an error names the file."""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from diffusion_cli.config.catalogue import chosen, content, invalid_yaml, lineage, options
from diffusion_cli.config.runs import flatten
from diffusion_cli.errors import NO_VALUE, Problem, first_line

OF_SETTINGS = ("experiment", "task")
"""Groups of settings: an option of the others names a class."""


def incomplete_files(command: str, overrides: Sequence[str], dirs: Sequence[Path]) -> list[Problem]:
    """Return the problems of chosen options of the user that are empty, or name no class.

    Args:
        command: name of the command.
        overrides: words of the command line.
        dirs: the user's folders of options.

    Raises:
        UsageError: for a file that is not a mapping in YAML.
    """
    problems = []
    for group, option in chosen(command, overrides, dirs).items() if dirs else ():
        for name in option if isinstance(option, list) else [option]:
            file = options(group, dirs).get(str(name))
            if file is None or not any(file.is_relative_to(root) for root in dirs):
                continue
            contents = [content(part) for part in lineage(file) if part.is_file()]
            names_class = any(
                key.rpartition(".")[2] == "_target_" for found in contents for key in flatten(found)
            )
            if not any(contents):
                problems.append(Problem(file, NO_VALUE, "is empty", "write one key: value per line"))
            elif group not in OF_SETTINGS and not names_class:
                remedy = f"name the class, as _target_: {_example(group)}"
                problems.append(Problem(file, NO_VALUE, "has no _target_", remedy))
    return problems


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
    references = [text for text in overrides if "${" in text]
    reference = "use the name of a key, such as ${seed}"
    if references:
        return [Problem(text, NO_VALUE, "invalid reference ${...}", reference) for text in references]
    mark = getattr(error, "problem_mark", None)
    if isinstance(error, yaml.YAMLError) and mark is not None:
        return list(invalid_yaml(mark.name, error).problems)
    reason = first_line(error)
    if key := getattr(error, "full_key", None):
        return [Problem(key, NO_VALUE, reason, reference)]
    place = re.match(r"In '([\w/]+)/([^/']+)':? (.*)", reason)
    file = options(place[1], dirs).get(place[2]) if place else None
    if place and file:
        return [Problem(file, NO_VALUE, place[3].rstrip("."), "correct its defaults")]
    return [Problem(command, NO_VALUE, f"cannot compose the configuration: {reason}")]
