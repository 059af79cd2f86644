"""Searches by Optuna: settings and values are checked before the first job."""

import pytest

from diffusion_cli.config import expand, plan_sweep
from diffusion_cli.errors import UsageError

SEARCH = "hydra/sweeper=optuna"
GRID = "hydra/sweeper/sampler=grid"
LR = "optimizer.lr="


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("hydra.sweeper.direction=max", "hydra.sweeper.direction=max: unknown value; did you mean maximize?"),
        (
            "hydra.sweeper.direction=[maximize,mini]",
            "hydra.sweeper.direction=mini: unknown value; did you mean minimize?",
        ),
        (
            "trainer.fast_dev_run=true",
            "trainer.fast_dev_run=true: measures no objective, because nothing is kept; use hydra/sweeper=basic",
        ),
        ("hydra.sweeper.n_trials=0", "hydra.sweeper.n_trials=0: must be at least 1"),
        ("hydra.sweeper.n_jobs=-1", "hydra.sweeper.n_jobs=-1: must be at least 1"),
        ("hydra.sweeper.max_failure_rate=2", "hydra.sweeper.max_failure_rate=2.0: must be between 0 and 1"),
        (
            f"{GRID} {LR}interval(1e-4,1e-2)",
            f"{LR}interval(1e-4,1e-2): {GRID} takes lists of values; write {LR}0.0001,0.01, or choose another "
            "hydra/sweeper/sampler",
        ),
        (
            f"{LR}interval(1e-2,1e-4)",
            f"{LR}interval(1e-2,1e-4): its start is above its end; write interval(0.0001,0.01)",
        ),
        (
            f"{LR}tag(log,interval(0,1e-2))",
            f"{LR}tag(log,interval(0,1e-2)): tag log needs a start above 0; raise the start, or leave tag(log,...) out",
        ),
        (
            f"{LR}tag(lgo,interval(1e-4,1e-2))",
            f"{LR}tag(lgo,interval(1e-4,1e-2)): tag lgo has no effect; write tag(log,interval(...)) or no tag",
        ),
        (
            "batch_size=tag(log,choice(8,16))",
            "batch_size=tag(log,choice(8,16)): tag log has no effect; leave it out",
        ),
        (
            "batch_size=range(5,1,-1)",
            "batch_size=range(5,1,-1): a search needs a range that counts up; give a start below the end",
        ),
        ("batch_size=range(3,1)", "batch_size=range(3,1): has no values; give a start below the end"),
        ("ema.decay=range(0.5,1.0,0.25)", "ema.decay=1.0: must be less than 1, auto or null"),
    ],
)
def test_a_search_that_optuna_would_refuse_or_read_otherwise_is_one_line(words, line):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    with pytest.raises(UsageError) as error:
        plan_sweep("train", [SEARCH, "seed=0,1", *words.split()])
    assert error.value.lines == (line,)


@pytest.mark.filterwarnings("ignore:The distribution is specified")
@pytest.mark.parametrize("text", ["range(1,10,3)", "range(0.1,0.5,0.1)", "range(0.1,0.45,0.1)", "range(2,3)"])
def test_the_ends_of_a_range_are_those_of_optuna(text):
    sweeper = pytest.importorskip("hydra_plugins.hydra_optuna_sweeper._impl")
    spaces, _ = sweeper.create_params_from_overrides([f"ema.warm_up={text}"])
    low, high = (getattr(spaces["ema.warm_up"], name) for name in ("low", "high"))
    (values,) = expand("plot", [f"ema.warm_up={text}"], intervals=True, closed_ranges=True).words
    assert [float(value.partition("=")[2]) for value in values] == pytest.approx([low, high])


def test_a_grid_has_the_values_of_a_range_as_other_sweeps_do():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    plan = plan_sweep("train", [SEARCH, GRID, "seed=range(0,7,3)", "schedule=glob(l*)"])
    assert plan.swept.asked == ["seed=0,3,6", "schedule=linear"]


def test_a_tag_without_a_search_is_refused():
    with pytest.raises(UsageError, match=r"^seed=tag\(a,range\(3\)\): tag a has no effect; leave it out$"):
        plan_sweep("train", ["seed=tag(a,range(3))"])
