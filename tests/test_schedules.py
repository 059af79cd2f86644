"""Schedules against independent implementations, and the laws that any schedule obeys."""

import pytest
import torch

from diffusion_cli.schedules import Cosine, Linear

SPACINGS = ["leading", "trailing", "linspace", "quadratic"]


def named(tag: str, T: int):
    if tag == "linear":
        return Linear(num_timesteps=T, beta_start=1e-4, beta_end=0.02, zero_terminal_snr=False)
    return Cosine(num_timesteps=T, offset=0.008, max_beta=0.999, zero_terminal_snr=False)


@pytest.mark.parametrize("tag", ["linear", "cosine"])
@pytest.mark.parametrize("T", [100, 1000])
def test_table_and_posterior_equal_guided_diffusion(reference, tag, T):
    arrays, schedule = reference("schedules"), named(tag, T)
    get = lambda key: arrays[f"gd_{tag}_T{T}_{key}"]  # noqa: E731
    t = torch.arange(1, T + 1, dtype=torch.float64) / T
    s = torch.arange(T, dtype=torch.float64) / T
    alpha, sigma = schedule(t)
    alpha_s, sigma_s = schedule(s)
    a, v = schedule.transition(t, s)
    close = lambda mine, theirs: torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-300)  # noqa: E731
    close(alpha**2, get("alphas_cumprod"))
    # The published coefficients subtract alpha_bar from 1, which loses up to four of their sixteen digits.
    loose = lambda mine, theirs: torch.testing.assert_close(mine, theirs, rtol=4e-12, atol=1e-300)  # noqa: E731
    loose(v, get("betas"))
    loose(alpha_s * v / sigma**2, get("post_mean_coef1"))
    loose(a * sigma_s**2 / sigma**2, get("post_mean_coef2"))
    loose(v * sigma_s**2 / sigma**2, get("post_var"))


@pytest.mark.parametrize(
    ("tag", "key"),
    [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")],
)
def test_alpha_bar_equals_diffusers(reference, schedules, tag, key):
    theirs = reference("schedules_diffusers")[f"df_{key}_T1000_alphas_cumprod"]
    alpha, _ = schedules[tag](torch.arange(1, 1001, dtype=torch.float64) / 1000)
    torch.testing.assert_close(alpha**2, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tag", ["linear", "scaled_linear", "cosine"])
def test_laws(schedules, tag):
    schedule = schedules[tag]
    t = torch.linspace(0, 1, 4567, dtype=torch.float64)
    alpha, sigma = schedule(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=1e-14, atol=0)
    assert (alpha[0], sigma[0]) == (1, 0)
    log_snr = schedule.log_snr(t)
    assert log_snr[0] == torch.inf
    assert (log_snr.diff() < 0).all()
    torch.testing.assert_close(log_snr[1:], 2 * (alpha / sigma)[1:].log(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tag", ["linear", "scaled_linear", "cosine"])
def test_transitions_compose(schedules, tag):
    """q(x_t | x_r) is q(x_t | x_s) after q(x_s | x_r), for any r < s < t, on the table or off it."""
    schedule = schedules[tag]
    r, s, t = torch.tensor(
        [[0.0, 0.2, 0.5], [0.013, 0.3141, 0.99], [0.5, 0.5004, 1.0]], dtype=torch.float64
    ).T
    (a_tr, v_tr), (a_ts, v_ts), (a_sr, v_sr) = (
        schedule.transition(*pair) for pair in ((t, r), (t, s), (s, r))
    )
    torch.testing.assert_close(a_tr, a_ts * a_sr, rtol=1e-12, atol=0)
    torch.testing.assert_close(v_tr, a_ts**2 * v_sr + v_ts, rtol=1e-12, atol=0)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [10, 50])
def test_grids_equal_diffusers(reference, schedules, spacing, steps):
    theirs = reference("schedules_diffusers")[f"ts_DDIMScheduler_{spacing}_{steps}"]
    schedule = schedules["linear"]
    mine = schedule.timestep(schedule.grid(steps, spacing)[:-1])
    torch.testing.assert_close(mine, theirs.double(), rtol=0, atol=1e-9)


def test_quadratic_grid_equals_ddim(schedules):
    """Song et al.'s code: `int(s) for s in linspace(0, sqrt(0.8 T), steps) ** 2` where those are distinct."""
    schedule = schedules["linear"]
    theirs = torch.linspace(0, 800**0.5, 20, dtype=torch.float64).square().floor().flip(0)
    mine = schedule.timestep(schedule.grid(20, "quadratic")[:-1])
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("T", [1, 2, 7, 100])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps_has_a_falling_grid_on_the_table(T, spacing):
    schedule = named("cosine", T)
    for steps in range(1, T + 1):
        grid = schedule.grid(steps, spacing)
        assert len(grid) == steps + 1
        assert (grid.diff() < 0).all()
        assert grid[0] <= 1
        assert grid[-1] == 0
        entries = grid * T
        torch.testing.assert_close(entries, entries.round(), rtol=0, atol=1e-9)
        if spacing in ("trailing", "linspace") or steps == 1:
            assert grid[0] == 1


@pytest.mark.parametrize("steps", [0, 101])
def test_impossible_grid_is_refused(steps):
    with pytest.raises(ValueError, match=rf"steps={steps}: .*give a number from 1"):
        named("cosine", 100).grid(steps, "trailing")


def test_betas_outside_the_unit_interval_are_refused():
    with pytest.raises(ValueError, match="num_timesteps=10: beta leaves"):
        named("linear", 10)


def test_training_times_are_the_table(schedules):
    schedule = schedules["linear"]
    assert schedule.time(torch.tensor([0.0, 1 - 1e-9], dtype=torch.float64)).tolist() == [1 / 1000, 1.0]
    times = schedule.time(torch.arange(1000, dtype=torch.float64) / 1000 + 1e-6)
    torch.testing.assert_close(
        schedule.timestep(times), torch.arange(1000.0, dtype=torch.float64), rtol=0, atol=1e-9
    )
