"""Schedules against independent implementations, and the laws that any schedule obeys."""

import math
import pickle

import pytest
import torch

from diffusion_cli.diffusion.posterior import posterior
from diffusion_cli.diffusion.schedules import (
    VE,
    VP,
    Betas,
    Cosine,
    EDMSchedule,
    FlowMatching,
    Linear,
    ScaledLinear,
    Sigmoid,
    Spacing,
)
from diffusion_cli.errors import UsageError

SPACINGS = ["leading", "trailing", "linspace", "quadratic"]


def named(tag: str, T: int):
    if tag == "linear":
        return Linear(num_timesteps=T)
    return Cosine(num_timesteps=T)


@pytest.mark.parametrize("tag", ["linear", "cosine"])
@pytest.mark.parametrize("T", [100, 1000])
def test_table_and_posterior_equal_guided_diffusion(reference, tag, T):
    arrays, schedule = reference("schedules"), named(tag, T)
    get = lambda key: arrays[f"gd_{tag}_T{T}_{key}"]  # noqa: E731
    t = torch.arange(1, T + 1, dtype=torch.float64) / T
    s = torch.arange(T, dtype=torch.float64) / T
    step = posterior(schedule, t, s)
    close = lambda mine, theirs: torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-300)  # noqa: E731
    close(schedule(t)[0] ** 2, get("alphas_cumprod"))
    # The published coefficients subtract alpha_bar from 1, which loses up to four of their sixteen digits.
    loose = lambda mine, theirs: torch.testing.assert_close(mine, theirs, rtol=4e-12, atol=1e-300)  # noqa: E731
    loose(step.large, get("betas"))
    loose(step.c_0, get("post_mean_coef1"))
    loose(step.c_t, get("post_mean_coef2"))
    loose(step.small, get("post_var"))


@pytest.mark.parametrize(
    ("tag", "key"),
    [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")],
)
def test_alpha_bar_equals_diffusers(reference, schedules, tag, key):
    theirs = reference("schedules_diffusers")[f"df_{key}_T1000_alphas_cumprod"]
    alpha, _ = schedules[tag](torch.arange(1, 1001, dtype=torch.float64) / 1000)
    torch.testing.assert_close(alpha**2, theirs, rtol=1e-12, atol=0)


PRESERVING = ["linear", "scaled_linear", "cosine", "sigmoid", "zero_snr", "vp"]
ALL = [*PRESERVING, "subvp", "ve", "edm", "rectified"]


@pytest.mark.parametrize("tag", ALL)
def test_laws(schedules, tag):
    schedule = schedules[tag]
    t = torch.linspace(0, 1, 4567, dtype=torch.float64)
    alpha, sigma = schedule(t)
    if tag in PRESERVING:
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=1e-14, atol=0)
    assert (alpha[0], sigma[0]) == (1, 0)
    assert 0 < schedule.t_min <= schedule.grid_t_min < 1
    log_snr = schedule.log_snr(t)
    assert log_snr[0] == torch.inf
    assert (log_snr.diff() < 0).all()
    torch.testing.assert_close(log_snr[1:], 2 * (alpha / sigma)[1:].log(), rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("kind", [Linear, Cosine])
def test_rescaled_timesteps_are_those_of_1000(kind):
    t = torch.arange(1, 4001, dtype=torch.float64) / 4000
    plain, rescaled = kind(num_timesteps=4000), kind(num_timesteps=4000, rescale_timesteps=True)
    torch.testing.assert_close(rescaled.timestep(t), plain.timestep(t) / 4, rtol=1e-15, atol=0)
    assert rescaled.equals(plain)


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
    with pytest.raises(ValueError, match=rf"steps={steps}: .*use 1"):
        named("cosine", 100).grid(steps, "trailing")


def test_betas_outside_the_unit_interval_are_refused():
    with pytest.raises(ValueError, match="num_timesteps=10: betas must be in"):
        named("linear", 10)


def test_training_times_are_the_table(schedules):
    schedule = schedules["linear"]
    assert schedule.time(torch.tensor([0.0, 1 - 1e-9], dtype=torch.float64)).tolist() == [1 / 1000, 1.0]
    times = schedule.time(torch.arange(1000, dtype=torch.float64) / 1000 + 1e-6)
    torch.testing.assert_close(
        schedule.timestep(times), torch.arange(1000.0, dtype=torch.float64), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("tag", ALL)
def test_derivatives_equal_autograd(schedules, tag):
    schedule = schedules[tag]
    t = torch.linspace(0.01234, 0.98765, 91, dtype=torch.float64, requires_grad=True)
    for level, derivative in zip(schedule(t), schedule.derivatives(t), strict=True):
        if level.requires_grad:
            (expected,) = torch.autograd.grad(level.sum(), t, retain_graph=True)
        else:
            expected = torch.zeros_like(t)  # alpha = 1
        torch.testing.assert_close(derivative, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tag", ALL)
def test_time_of_inverts_log_snr(schedules, tag):
    schedule = schedules[tag]
    t = torch.linspace(schedule.t_min, 1, 1237, dtype=torch.float64)
    torch.testing.assert_close(schedule.time_of(schedule.log_snr(t)), t, rtol=0, atol=1e-12)
    ends = schedule.time_of(torch.tensor([torch.inf, -torch.inf], dtype=torch.float64))
    assert ends.tolist() == [0, 1]


@pytest.mark.parametrize("tag", ALL)
def test_sde_moves_the_levels(schedules, tag):
    """Mean and variance of dx = f x dt + g dw are those of x_t: alpha' = f alpha, (sigma^2)' = 2 f sigma^2 + g^2."""
    schedule = schedules[tag]
    t = torch.tensor([0.2004, 0.5504, 0.9204], dtype=torch.float64)
    (alpha, sigma), (d_alpha, d_sigma), (f, g2) = schedule(t), schedule.derivatives(t), schedule.sde(t)
    torch.testing.assert_close(f * alpha, d_alpha, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(2 * f * sigma**2 + g2, 2 * sigma * d_sigma, rtol=1e-11, atol=1e-14)
    assert (g2 > 0).all()


@pytest.mark.parametrize("tag", ["linear", "scaled_linear"])
def test_zero_terminal_snr_equals_diffusers(reference, agree, tag):
    kind, start, end = {"linear": (Linear, 1e-4, 0.02), "scaled_linear": (ScaledLinear, 0.00085, 0.012)}[tag]
    schedule = kind(num_timesteps=1000, beta_start=start, beta_end=end, zero_terminal_snr=True)
    alpha, _ = schedule(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    name = f"df_{tag}_zsnr_T1000_alphas_cumprod"
    theirs = reference("schedules_diffusers")[name]
    agree(f"schedules_diffusers/{name}", alpha[:-1] ** 2, theirs[:-1], 1e-11, relative=True)
    assert alpha[-1] == theirs[-1] == 0


@pytest.mark.parametrize(
    ("name", "T", "start", "tau"),
    [
        ("lucid_sigmoid_T1000", 1000, -3.0, 1.0),
        ("lucid_sigmoid_T100", 100, -3.0, 1.0),
        ("lucid_sigmoid_alt", 1000, 0.0, 0.9),
    ],
)
def test_sigmoid_equals_denoising_diffusion_pytorch(reference, agree, name, T, start, tau):
    schedule = Sigmoid(num_timesteps=T, start=start, tau=tau)
    alpha, _ = schedule(torch.arange(1, T + 1, dtype=torch.float64) / T)
    theirs = torch.cumprod(1 - reference("schedules_diffusers")[f"{name}_betas"], 0)
    # Their logistic constants are rounded to float32.
    agree(f"schedules_diffusers/{name}_betas", alpha**2, theirs, 1e-7)


@pytest.mark.parametrize(("steps", "low", "high"), [(10, 0.002, 80.0), (50, 0.01, 50.0)])
def test_karras_and_log_snr_grids_equal_k_diffusion(reference, agree, steps, low, high):
    arrays, schedule = reference("schedules_diffusers"), EDMSchedule(sigma_min=low, sigma_max=high)
    names: dict[Spacing, str] = {"karras": "karras", "log_snr": "exponential"}
    for spacing, name in names.items():
        _, sigmas = schedule(schedule.grid(steps, spacing))
        theirs = arrays[f"kd_{name}_n{steps}"]
        agree(f"schedules_diffusers/kd_{name}_n{steps}", sigmas[:-1], theirs[:-1], 1e-12, relative=True)


def test_time_grid_equals_k_diffusion(reference, agree):
    schedule = VP()
    alpha, sigma = schedule(schedule.grid(12, "time")[:-1])
    theirs = reference("schedules_diffusers")["kd_vp_n12"][:-1]
    agree("schedules_diffusers/kd_vp_n12", sigma / alpha, theirs, 1e-11, relative=True)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [10, 30, 50])
def test_grids_visit_the_sigmas_of_diffusers(reference, schedules, agree, steps, spacing):
    """Their Euler sampler interpolates sigmas, and spreads linspace over fractions of timesteps, as our `time`."""
    name = f"sig_EulerDiscreteScheduler_{spacing}_{steps}"
    grid = schedules["linear"].grid(steps, "time" if spacing == "linspace" else spacing)[:-1]
    alpha, sigma = schedules["linear"](grid)
    whole = (grid * 1000 - (grid * 1000).round()).abs() < 1e-6
    theirs = reference("schedules_diffusers")[name][:-1]
    agree(f"schedules_diffusers/{name}", (sigma / alpha)[whole], theirs[whole], 1e-11, relative=True)
    assert whole.sum() >= 2


def test_grids_of_continuous_processes_are_the_limits_of_the_published_lists(schedules):
    least = 1e-3
    expected = {
        "leading": [least + (1 - least) * share for share in (3 / 4, 2 / 4, 1 / 4, 0)],
        "trailing": [1 - (1 - least) * share for share in (0, 1 / 4, 2 / 4, 3 / 4)],
        "linspace": [least + (1 - least) * share for share in (1, 2 / 3, 1 / 3, 0)],
        "quadratic": [least + (1 - least) * share for share in (1, 4 / 9, 1 / 9, 0)],
    }
    for spacing, times in expected.items():
        for tag in ("vp", "rectified"):
            assert schedules[tag].grid(4, spacing).tolist() == pytest.approx([*times, 0], abs=1e-15)


def test_networks_are_given_the_published_number_of_each_process(schedules):
    t = torch.tensor([0.25, 1.0], dtype=torch.float64)
    expected = {
        "linear": [249, 999], "cosine": [249, 999], "vp": [249.75, 999], "subvp": [249.75, 999],
        "rectified": [249.75, 999], "ve": [math.log(0.01 * 5000**0.25), math.log(50)],
        "edm": [math.log(80 * 0.25**7) / 4, math.log(80) / 4],
    }  # fmt: skip
    for tag, numbers in expected.items():
        assert schedules[tag].timestep(t).tolist() == pytest.approx(numbers, rel=1e-9), tag


@pytest.mark.parametrize("tag", ["vp", "subvp", "ve"])
def test_coefficients_equal_score_sde(reference, schedules, agree, tag):
    arrays, schedule = reference("sde_likelihood"), schedules[tag]
    t = arrays["coef_t"]
    alpha, sigma = schedule(t)
    f, g2 = schedule.sde(t)
    agree(
        f"sde_likelihood/coef_{tag}_mean_coef", alpha, arrays[f"coef_{tag}_mean_coef"], 1e-12, relative=True
    )
    # theirs is sqrt(1 - exp(.)), which loses digits near 0
    agree(f"sde_likelihood/coef_{tag}_std", sigma, arrays[f"coef_{tag}_std"], 1e-12)
    agree(f"sde_likelihood/coef_{tag}_drift", f, arrays[f"coef_{tag}_drift"], 1e-12 * 20)
    agree(
        f"sde_likelihood/coef_{tag}_diffusion",
        g2.sqrt(),
        arrays[f"coef_{tag}_diffusion"],
        1e-9,
        relative=True,
    )


def test_times_between_entries_equal_dpm_solver(reference, schedules, agree):
    arrays, schedule = reference("samplers_kdiff_edm"), schedules["linear"]
    t = arrays["lu_interp_t"]
    alpha, _ = schedule(t)
    inside = t >= 1 / 1000
    agree(
        "samplers_kdiff_edm/lu_interp_logalpha",
        alpha.log()[inside],
        arrays["lu_interp_logalpha"][inside],
        1e-12,
    )
    agree(
        "samplers_kdiff_edm/lu_interp_lambda",
        schedule.log_snr(t)[inside] / 2,
        arrays["lu_interp_lambda"][inside],
        1e-11,
    )


def test_ends_that_cross_are_refused():
    with pytest.raises(ValueError, match=r"schedule.sigma_min=2.0: must be less than schedule.sigma_max=1.0"):
        VE(sigma_min=2.0, sigma_max=1.0)
    with pytest.raises(ValueError, match=r"schedule.sigma_min=2.0: must be less than"):
        EDMSchedule(sigma_min=2.0, sigma_max=1.0)
    with pytest.raises(ValueError, match=r"schedule.beta_min=2.0: must be less than"):
        VP(beta_min=2.0, beta_max=1.0)
    with pytest.raises(ValueError, match=r"schedule.start=3.0: must be less than"):
        Sigmoid(num_timesteps=10, start=3.0, end=3.0)
    with pytest.raises(ValueError, match="zero_terminal_snr=true: needs at least 2"):
        Cosine(num_timesteps=1, zero_terminal_snr=True)


def test_levels_of_one_time_are_those_of_many_and_serve_gradients_later(schedules):
    times = torch.linspace(0.01, 1, 37, dtype=torch.float64)
    for name, schedule in schedules.items():
        alphas, sigmas = schedule(times)
        with torch.inference_mode():
            kept = [schedule(t) for t in times]
        for t, alpha, sigma, (first, _) in zip(times, alphas, sigmas, kept, strict=True):
            assert schedule(t) == (alpha, sigma), name
            assert first == alpha, name
        x = torch.ones(2, requires_grad=True)
        (gradient,) = torch.autograd.grad((schedule(times[-1])[1] * x).square().sum(), x)
        assert torch.allclose(gradient, (2 * sigmas[-1] ** 2).float()), name


def test_a_table_travels_and_hands_out_levels_of_its_own():
    schedule = Linear(num_timesteps=100)
    t = torch.tensor(0.3, dtype=torch.float64)
    before = schedule.log_alpha_bar(t).item()
    schedule.log_alpha_bar(t).add_(1)
    assert schedule.log_alpha_bar(t).item() == before
    assert pickle.loads(pickle.dumps(schedule)).log_alpha_bar(t).item() == before


def test_given_betas_are_those_of_the_schedule(schedules):
    linear = schedules["linear"]
    given = Betas(betas=torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist())
    t = torch.linspace(0.001, 1, 777, dtype=torch.float64)
    assert torch.equal(given.log_snr(t), linear.log_snr(t))
    for betas, terminal in (([0.1, 1.0], False), ([1.0, 0.1], True)):
        with pytest.raises(UsageError, match=r"schedule\.betas=1: only the last beta may be 1"):
            Betas(betas=betas, zero_terminal_snr=terminal)


def test_networks_of_flow_matching_get_timesteps_up_to_their_number(schedules):
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert FlowMatching(num_timesteps=50).timestep(t).tolist() == [0, 12.5, 25, 37.5, 50]
    assert torch.equal(FlowMatching().log_snr(t), schedules["rectified"].log_snr(t))
