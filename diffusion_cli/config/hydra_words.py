"""Words of a command line that set keys and groups of Hydra: each has an effect, or one line with a remedy."""

from collections.abc import Iterable, Sequence

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
    found = next((entry for other, entry in REFUSED.items() if _within(name, [other])), None)
    return Problem(
        shown, NO_VALUE, *(found or ("a setting of Hydra that has no effect here", "leave it out"))
    )


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
