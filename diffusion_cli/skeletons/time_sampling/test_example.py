"""The times of `example` have their distribution."""

import diffusion_cli as diffuse
import torch

diffuse.allow_plugins("example_package")
U = torch.linspace(0, 0.99, 100, dtype=torch.float64)


def test_power_1_is_uniform() -> None:
    schedule = diffuse.option("schedule", "vp")
    times = diffuse.option("time_sampling", "example", power=1.0)(schedule, U)
    torch.testing.assert_close(times.t, diffuse.option("time_sampling", "uniform")(schedule, U).t)


def test_times_increase_with_their_quantile_and_stay_in_the_range() -> None:
    schedule = diffuse.option("schedule", "vp")
    times = diffuse.option("time_sampling", "example")(schedule, U)
    assert (times.t.diff() >= 0).all()
    assert schedule.t_min <= times.t.min() <= times.t.max() <= 1
    torch.testing.assert_close(times.quantile, U)
