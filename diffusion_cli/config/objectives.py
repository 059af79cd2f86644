"""The metric that a sweep minimizes or maximizes."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches

from diffusion_cli.config.catalogue import options
from diffusion_cli.config.evaluation import EvalConfig
from diffusion_cli.config.schema import Config, TrainConfig
from diffusion_cli.errors import NO_VALUE, Problem

VALIDATION = "val_"
"""Begins the columns that need validation images."""
HIGHER_IS_BETTER_OF_SAMPLES = (
    "class_accuracy",
    "classification_accuracy_score",
    "clip_score",
    "coverage",
    "density",
    "is",
    "precision",
    "psnr",
    "recall",
    "shape_coverage",
    "ssim",
    "watertight",
)
"""Values that evaluations measure and a sweep maximizes, without the name of a feature network."""
HIGHER_IS_BETTER = ("accuracy", *HIGHER_IS_BETTER_OF_SAMPLES)
"""All values that a sweep maximizes: also the accuracy of a classifier, which training itself measures."""

BEST_AS_REAL = ("nearest_neighbour_accuracy", "volume")
"""Values that are neither best if low nor if high: 0.5, or the value of real data, is best."""


def objectives(config: Config) -> tuple[str, ...]:
    """Return the names of the values that a job of a sweep returns; none for a command without an objective."""
    named = getattr(config, "objective_metric", None)
    return tuple(named) if isinstance(named, list) else () if named is None else (named,)


def higher_is_better(name: str) -> bool:
    """Return whether the highest value of a metric is the best."""
    plain = name.removeprefix(VALIDATION)
    return any(plain == other or plain.startswith(f"{other}_") for other in HIGHER_IS_BETTER)


def has_best(name: str) -> bool:
    """Return whether the lowest or the highest value of a metric is the best; names can be shortened at a `_`."""
    plain = name.removeprefix(VALIDATION)
    return not any(other == plain or other.startswith(f"{plain}_") for other in BEST_AS_REAL)


def named_value(name: str, names: Sequence[str]) -> str | None:
    """Return the name that stands for a metric: itself, or the only one that begins with it."""
    longer = [other for other in names if other.startswith(f"{name}_")]
    return name if name in names else longer[0] if len(longer) == 1 else None


def objective_problems(configs: Sequence[Config], maximizes: Sequence[bool] | None) -> list[Problem]:
    """Return the problems of jobs that would return no objective to a sweeper.

    Args:
        configs: configurations of jobs.
        maximizes: a direction for each objective; None for a sweeper without directions.
    """
    problems = [problem for config in configs for problem in _problems(config)]
    wanted = 1 if maximizes is None else len(maximizes)
    given = {
        1 if isinstance(config, EvalConfig) and not objectives(config) else len(objectives(config))
        for config in configs
    }
    if not problems and given != {wanted}:
        named = ",".join(objectives(configs[0]))
        remedy = "give as many metrics as hydra.sweeper.direction has entries"
        problems.append(Problem("objective_metric", f"[{named}]", f"the sweeper needs {wanted}", remedy))
    return list(dict.fromkeys(problems))


def _problems(config: Config) -> Iterator[Problem]:
    """Yield the problems of the objective of one job."""
    if isinstance(config, EvalConfig):
        if config.compare is not None:
            yield Problem(
                "compare", ",".join(config.compare), "measures nothing", "evaluate run= or samples="
            )
        yield from _without_best(config)
        return
    if not isinstance(config, TrainConfig):
        yield Problem(
            "hydra/sweeper",
            NO_VALUE,
            "needs an objective, which train and eval have",
            "use hydra/sweeper=basic",
        )
        return
    if config.trainer["fast_dev_run"]:
        problem = "measures no objective, because nothing is kept"
        yield Problem("trainer.fast_dev_run", True, problem, "use hydra/sweeper=basic")
    if "csv" not in config.logger:
        yield Problem(
            "logger", ",".join(config.logger) or None, "the objective is read from metrics.csv", "add csv"
        )
    yield from _without_best(config)
    for name in objectives(config):
        if near := _meant(name, config):
            yield Problem("objective_metric", name, "unknown metric", f"did you mean {near}?")
        else:
            yield from _training_problems(config, name)


def _without_best(config: Config) -> Iterator[Problem]:
    """Yield the problems of objectives without a best direction."""
    for name in objectives(config):
        if not has_best(name):
            problem = "neither its lowest nor its highest value is the best"
            yield Problem("objective_metric", name, problem, "use another metric, such as chamfer")


def _meant(name: str, config: TrainConfig) -> str | None:
    """Return the column that a misspelt name means; None for others, which a metric of a plugin may add."""
    columns = ["loss", "val_loss", "val_accuracy", *config.metric]
    if name in columns or any(name.startswith(f"{column}_") for column in columns):
        return None
    return next(iter(get_close_matches(name, columns, n=1, cutoff=0.8)), None)


def _training_problems(config: TrainConfig, name: str) -> Iterator[Problem]:
    every, last = config.validate_every, config.max_steps
    if name.startswith(VALIDATION):
        if config.dataset.get("val_fraction") == 0:
            yield Problem(
                "objective_metric", name, "dataset.val_fraction=0 leaves no validation images", "use loss"
            )
        elif last is not None and every > last:
            problem = f"no validation within max_steps={last}"
            yield Problem("validate_every", every, problem, f"use validate_every={last}")
    elif any(
        name == option or name.startswith(f"{option}_")
        for option in (*options("metric"), *HIGHER_IS_BETTER_OF_SAMPLES)
    ):
        every = config.eval_every
        if every is None:
            yield Problem("objective_metric", name, "no evaluations during training", "set eval_every")
        elif last is not None and every > last:
            yield Problem(
                "eval_every", every, f"no evaluation within max_steps={last}", f"use eval_every={last}"
            )
