"""Settings and values of a search by Optuna, checked before its first job."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from diffusion_cli.config.catalogue import did_you_mean
from diffusion_cli.config.compose import parse
from diffusion_cli.config.typed import SWEEPS
from diffusion_cli.errors import NO_VALUE, Problem, UsageError, class_name

OPTUNA = "optuna"
"""Option of `hydra/sweeper`."""
DIRECTIONS = ("minimize", "maximize")


def is_grid(sweeper: Mapping[str, Any]) -> bool:
    """Return whether a search tries all combinations of lists; `sweeper`: the settings of Optuna's sweeper."""
    sampler = sweeper.get("sampler")
    return isinstance(sampler, Mapping) and class_name(sampler) == "GridSampler"


def search_problems(sweeper: Mapping[str, Any], words: Sequence[str]) -> list[Problem]:
    """Return the problems of a search by Optuna.

    Args:
        sweeper: settings of the sweeper.
        words: overrides of the jobs.
    """
    grid = is_grid(sweeper)
    texts = [text for text in words if text.partition("=")[2].startswith(SWEEPS)]
    return [*_of_settings(sweeper), *(problem for text in texts for problem in _of_values(text, grid))]


def tag_problem(text: str, tags: Collection[str], *, interval: bool) -> Problem:
    """Return the problem of values with tags that have no effect; `interval`: they lie in an interval."""
    remedy = "write tag(log,interval(...)) or no tag" if interval else "leave it out"
    return Problem(text, NO_VALUE, f"tag {','.join(sorted(tags))} has no effect", remedy)


def _of_settings(sweeper: Mapping[str, Any]) -> Iterator[Problem]:
    """The problems of the settings of the sweeper."""
    if problem := _storage_problem(sweeper.get("storage")):
        yield problem
    for name in ("n_trials", "n_jobs"):
        if isinstance(number := sweeper.get(name), int) and number < 1:
            yield Problem(f"hydra.sweeper.{name}", number, "must be at least 1")
    rate = sweeper.get("max_failure_rate")
    if isinstance(rate, float) and not 0 <= rate <= 1:
        yield Problem("hydra.sweeper.max_failure_rate", rate, "must be between 0 and 1")
    given = sweeper.get("direction")
    for direction in given if isinstance(given, list) else [given]:
        name = str(getattr(direction, "name", direction))
        if name not in DIRECTIONS:
            yield Problem("hydra.sweeper.direction", name, "unknown value", did_you_mean(name, DIRECTIONS))


def _of_values(text: str, grid: bool) -> Iterator[Problem]:
    """The problems of a word with several values; `grid`: the search tries all of them."""
    try:
        item = parse(text)
    except UsageError:  # `expand` reports it
        return
    value: Any = item.value()
    tags, interval = getattr(value, "tags", set()), item.is_interval_sweep()
    if unused := tags - ({"log"} if interval else set()):
        yield tag_problem(text, unused, interval=interval)
    if item.is_range_sweep() and value.step < 0 and not (value.shuffle or grid):
        yield Problem(text, NO_VALUE, "a search needs a range that counts up", "give a start below the end")
    if not interval:
        return
    start, end = f"{value.start:g}", f"{value.end:g}"
    if grid:
        remedy = f"write {item.key_or_group}={start},{end}, or choose another hydra/sweeper/sampler"
        yield Problem(text, NO_VALUE, "hydra/sweeper/sampler=grid takes lists of values", remedy)
    elif value.start > value.end:
        yield Problem(text, NO_VALUE, "its start is above its end", f"write interval({end},{start})")
    elif "log" in tags and value.start <= 0:
        yield Problem(
            text, NO_VALUE, "tag log needs a start above 0", "raise the start, or leave tag(log,...) out"
        )


def _storage_problem(storage: Any) -> Problem | None:
    """The problem of a database for the study, which Optuna 2 cannot use by SQLAlchemy 2."""
    if not isinstance(storage, str) or int(version("optuna").partition(".")[0]) > 2:
        return None
    if storage.startswith("redis") or int(version("sqlalchemy").partition(".")[0]) < 2:
        return None
    problem = f"Optuna {version('optuna')} has no databases with SQLAlchemy {version('sqlalchemy')}"
    return Problem("hydra.sweeper.storage", storage, problem, "leave it out")
