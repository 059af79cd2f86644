"""The learning rate of `example` rises and falls as it says."""

import diffusion_cli as diffuse

diffuse.allow_plugins("example_package")


def test_the_rate_is_halved_in_each_half_life() -> None:
    schedule = diffuse.option("lr_schedule", "example", warm_up_steps=0, half_life=50)
    assert [schedule.factor(step) for step in (0, 50, 100)] == [1, 0.5, 0.25]


def test_the_rate_rises_during_warm_up() -> None:
    schedule = diffuse.option("lr_schedule", "example", warm_up_steps=10, half_life=10**9)
    assert abs(schedule.factor(4) - 0.5) < 1e-6
    assert abs(schedule.factor(9) - 1) < 1e-6
