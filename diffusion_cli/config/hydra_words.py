"""Keys and groups of Hydra, on a command line or in a file: each has an effect, or one line with a remedy."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from diffusion_cli.config.catalogue import CONF, brought_by, chosen, content, lineage, options
from diffusion_cli.config.runs import flatten
from diffusion_cli.config.schema import UNSWEPT
from diffusion_cli.config.typed import as_shown
from diffusion_cli.errors import NO_VALUE, Problem, UsageError

OF_SWEEPS = ("sweeper", "launcher", "job.env_set", "job.env_copy", "mode")
"""Keys and groups of Hydra that a sweep uses, without their prefix."""
REFUSED = {
    "run": ("a run is in output_dir/name", "use output_dir= and name="),
    "sweep.dir": ("a sweep is in output_dir", "use output_dir="),
    "sweep.subdir": ("a job is in output_dir/name", "use name=, such as 'name=x_${seed}'"),
    "sweep": ("a sweep is in output_dir", "use output_dir="),
    "job.chdir": ("jobs stay in the working folder", "use output_dir= for the place of results"),
    "job.name": ("jobs have the names of their runs", "use name="),
    "output_subdir": ("a run has its configuration in config.yaml", "leave it out"),
    "searchpath": ("options of your own have a flag", "use --config-dir DIR"),
    "verbose": ("there is no log of messages", "use DIFFUSE_TRACEBACK=1 for the traceback of an error"),
    "job_logging": ("there is no log of messages", "use logger= for the curves of training"),
    "hydra_logging": ("there is no log of messages", "use logger= for the curves of training"),
}
"""Other keys and groups of Hydra: what takes their place, and the remedy; the first that fits."""


def split_hydra(command: str, overrides: Sequence[str], *, sweeping: bool) -> tuple[list[str], list[str]]:
    """Split overrides into those of Hydra and those of the jobs.

    Raises:
        UsageError: for keys of Hydra that have no effect in this program, or none without a sweep.
    """
    own = [text for text in overrides if is_of_hydra(text)]
    problems = [problem for text in own if (problem := hydra_problem(command, text, sweeping=sweeping))]
    if problems:
        raise UsageError.several(problems)
    own = [text for text in own if not text.lstrip("+").startswith("hydra.mode=")]
    return [_addable(text) for text in own], [text for text in overrides if not is_of_hydra(text)]


def hydra_problem(command: str, text: str, *, sweeping: bool) -> Problem | None:
    """Return the problem of a word that sets a key or a group of Hydra; None for one that has an effect."""
    shown, (key, _, value) = as_shown(text), text.partition("=")
    name = key.lstrip("+~").removeprefix("hydra")[1:]
    if text.startswith("~"):
        return Problem(shown, NO_VALUE, "keys cannot be added or removed", "leave it out")
    if name == "mode" and value != "MULTIRUN":
        return Problem(
            shown, NO_VALUE, "selects no sweep", "leave it out, and -m too" if sweeping else "leave it out"
        )
    if _within(name, OF_SWEEPS):
        remedy = "leave it out" if command in UNSWEPT else "add -m"
        return None if sweeping else Problem(shown, NO_VALUE, "applies to sweeps only", remedy)
    return Problem(shown, NO_VALUE, *_refused(name))


def hydra_in_files(command: str, overrides: Sequence[str], dirs: Sequence[Path]) -> list[Problem]:
    """Return the problems of settings of Hydra in chosen option files of the user: those that have no effect.

    Only an experiment may have settings of Hydra. Those of a sweep apply with `-m`, and are left out without it.

    Args:
        command: name of the command.
        overrides: words of the command line.
        dirs: the user's folders of options, besides those of plugins.
    """
    found = [
        (group, file, name)
        for group, option in chosen(command, overrides, dirs).items()
        for choice in (option if isinstance(option, list) else [option])
        if (file := options(group, dirs).get(str(choice))) is not None and not file.is_relative_to(CONF)
        for name in _hydra_in(file)
    ]
    return [
        Problem(file, NO_VALUE, f"{name}: {problem[0]}", problem[1])
        for group, file, name in found
        if (problem := _problem_in_file(group, name)) is not None
    ]


def _hydra_in(file: Path) -> list[str]:
    """The groups and the keys of Hydra in an option file, to three parts: `hydra.callbacks.mine`."""
    groups = [group for group in brought_by(file) if group.startswith("hydra/")]
    keys = [key for part in lineage(file) for key in flatten(content(part)) if key.startswith("hydra.")]
    return [*dict.fromkeys([*groups, *(".".join(key.split(".")[:3]) for key in keys)])]


def _problem_in_file(group: str, name: str) -> tuple[str, str] | None:
    """The problem and the remedy of a key or a group of Hydra in an option file of a group."""
    name = name.removeprefix("hydra")[1:]
    if group != "experiment":
        return "applies in an experiment only", "move it to a file in experiment/"
    if name == "mode":
        return "a file starts no sweep", "leave it out, and add -m"
    return None if _within(name, OF_SWEEPS) else _refused(name)


def _refused(name: str) -> tuple[str, str]:
    """The problem and the remedy of a key or a group of Hydra that this program does not use."""
    found = next((entry for other, entry in REFUSED.items() if _within(name, [other])), None)
    return found or ("a setting of Hydra that has no effect here", "leave it out")


def _addable(text: str) -> str:
    """Return a word that may set a key of Hydra's open mappings, such as an environment variable."""
    is_open = text.startswith(("hydra.job.env_set.", "hydra.sweeper.params."))
    return f"++{text}" if is_open else text


def _within(name: str, others: Iterable[str]) -> bool:
    """Return whether a name is one of others, or a key or a group within one."""
    return any(name == other or name.startswith((f"{other}.", f"{other}/")) for other in others)


def is_of_hydra(text: str) -> bool:
    """Return whether a word sets a key or a group of Hydra."""
    return text.lstrip("+~").startswith(("hydra.", "hydra/"))
