"""Laws of all samplers: convergence, moments, independence of the batch, every process."""

from itertools import pairwise
from typing import Literal, get_args

import pytest
import torch
import yaml
from torch import nn

from diffusion_cli.config import CONF, build
from diffusion_cli.diffusion.denoiser import Denoiser, Prediction
from diffusion_cli.diffusion.parameterizations import Eps
from diffusion_cli.diffusion.schedules import VP, EDMSchedule, Spacing
from diffusion_cli.errors import UsageError
from diffusion_cli.samplers import (
    DDIM,
    DDPM,
    ODE,
    PC,
    ConsistencySampler,
    EDMSampler,
    integrate,
    invert,
    reporting,
)
from helpers.samplers import states_of_run

F64 = torch.float64
SAMPLERS = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(CONF.glob("sampler/*.yaml"))}
SAMPLERS |= {
    "dpmpp_3m taylor": SAMPLERS["dpmpp_3m"] | {"solver_type": "taylor"},
    "unipc bh1": SAMPLERS["unipc"] | {"variant": "bh1"},
    "deis 2": SAMPLERS["deis"] | {"order": 2},
    "lms 3": SAMPLERS["lms"] | {"order": 3},
    "edm still": SAMPLERS["edm"] | {"s_churn": 0.0},
    "ddpm large": SAMPLERS["ddpm"] | {"variance": "large"},
    "dpm2 ancestral": SAMPLERS["dpm2"] | {"eta": 1.0},
    "dpmpp_2s ancestral": SAMPLERS["dpmpp_2s"] | {"eta": 1.0},
    "dpmpp_3m sde": SAMPLERS["dpmpp_3m"] | {"eta": 1.0},
    "edm euler": SAMPLERS["edm"] | {"solver": "euler"},
    "pc ald": SAMPLERS["pc"] | {"corrector": "ald", "predictor": "ddpm"},
}
DETERMINISTIC = [
    "ddim", "euler", "heun", "edm still", "dpm2", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "dpmpp_3m taylor", "unipc",
    "unipc bh1", "deis", "deis 2", "lms", "lms 3", "plms",
]  # fmt: skip
STOCHASTIC = sorted({*SAMPLERS} - {*DETERMINISTIC, "ode", "consistency"})


def no_noise():
    raise AssertionError("a deterministic sampler asked for noise")


@pytest.fixture(scope="module")
def flow_end(reference, schedules, exact):
    """Where the exact probability flow of VP leads from the stored noise, at the smallest time of its grids."""
    schedule = schedules["vp"]
    ode = ODE(schedule, rtol=1e-12, atol=1e-12, max_steps=10_000)
    ends = ode.grid(1)[:2]
    return ode.step(exact(schedule), reference("noise")["x_T"], ends[0], ends[1], no_noise, None)[0]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_converges_at_the_declared_order(reference, schedules, exact, flow_end, name):
    schedule = schedules["vp"]
    sampler = build(SAMPLERS[name], schedule)
    steps = (256, 512)
    errors = []
    for n in steps:
        times = schedule.grid(n + 1, "log_snr")[:-1]
        *_, end = integrate(sampler, exact(schedule), reference("noise")["x_T"], times, no_noise)
        errors.append((end - flow_end).abs().max())
    logs = torch.stack(errors).log2()
    places = torch.log2(torch.tensor(steps, dtype=F64))
    order = -((places - places.mean()) @ (logs - logs.mean())) / (places - places.mean()).square().sum()
    assert abs(order - sampler.order) < 0.2, f"{order:.3f}, declared {sampler.order}"


MEAN = torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=F64)
FACTOR = torch.tensor(
    [[0.6, 0, 0, 0], [0.2, 0.5, 0, 0], [-0.3, 0.1, 0.4, 0], [0.1, 0.2, -0.1, 0.7]], dtype=F64
)
COVARIANCE = FACTOR @ FACTOR.T


def gaussian(schedule):
    """The perfect denoiser of images of four pixels from N(MEAN, COVARIANCE), which is affine in x_t."""

    def denoise(x_t, t):
        alpha, sigma = schedule(t)
        gain = (
            alpha * COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(4, dtype=F64))
        )
        x0 = (MEAN + (x_t.flatten(1) - alpha * MEAN) @ gain.T).view_as(x_t)
        return Prediction(x0, (x_t - alpha * x0) / sigma, sigma)

    return denoise


def moments(sampler, schedule, times):
    """The exact mean and covariance of samples, for a sampler that is affine in x and its noise.

    The images of one batch are sampled from no noise at all, and from each unit of the noise of each draw alone: one
    draw for the start and at most two a step.
    """
    count, draws = 1 + 8 * len(times), 0

    def unit():
        nonlocal draws
        noise = torch.zeros(count, 4, dtype=F64)
        noise[1 + 4 * draws : 5 + 4 * draws] = torch.eye(4, dtype=F64)
        draws += 1
        return noise.view(count, 1, 2, 2)

    *_, samples = integrate(sampler, gaussian(schedule), schedule.prior_std(times[0]) * unit(), times, unit)
    mean, *responses = samples.flatten(1)
    response = torch.stack(responses) - mean
    return mean, response.T @ response


def drawn_moments(sampler, denoise, schedule, times, count):
    """The mean and covariance of `count` samples."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(count, 1, 2, 2, dtype=F64, generator=generator)  # noqa: E731
    *_, samples = integrate(sampler, denoise, schedule.prior_std(times[0]) * draw(), times, draw)
    samples = samples.flatten(1)
    return samples.mean(0), samples.T.cov()


def errors(mean, covariance):
    """The largest errors of a mean and a covariance."""
    return torch.stack([(mean - MEAN).abs().max(), (covariance - COVARIANCE).abs().max()])


NONLINEAR = [name for name in SAMPLERS if name.split()[0] in ("pc", "ode")]
"""Samplers with steps that depend on the norm of x."""


@pytest.mark.parametrize("name", sorted({*STOCHASTIC} - {*NONLINEAR}))
def test_stochastic_samples_have_the_moments_of_the_data(schedules, name):
    """Twice the steps leave at most 0.8 of the error of the distribution."""
    schedule = schedules["vp"]
    sampler = build(SAMPLERS[name], schedule)
    coarse, fine = (errors(*moments(sampler, schedule, sampler.grid(steps))) for steps in (50, 100))
    assert fine.max() < 0.8 * coarse.max()
    assert fine.max() < 0.11


@pytest.fixture
def mean_norm(monkeypatch):
    """PC with the mean norm of the batch: an image's own differs from it by 1 / sqrt(2 d), much for four pixels."""
    monkeypatch.setattr(PC, "norm", staticmethod(lambda x: x.flatten(1).norm(dim=1).mean()))


@pytest.mark.parametrize("name", sorted({*NONLINEAR} - {"ode"}))
def test_corrected_samples_have_the_moments_of_the_data(schedules, mean_norm, name):
    schedule = schedules["vp"]
    sampler = build(SAMPLERS[name], schedule)
    assert errors(*drawn_moments(sampler, gaussian(schedule), schedule, sampler.grid(200), 8000)).max() < 0.03


@pytest.mark.parametrize("name", SAMPLERS)
def test_signals_and_volumes_are_sampled_as_images_of_as_many_pixels(schedules, name):
    schedule = schedules["vp"]
    sampler = build(SAMPLERS[name], schedule)
    times = sampler.grid(8)

    def denoise(x_t, t):  # exact for pixels of variance 1/4
        alpha, sigma = schedule(t)
        x0 = alpha / (alpha**2 + 4 * sigma**2) * x_t
        return Prediction(x0, (x_t - alpha * x0) / sigma, sigma)

    def sampled(*sizes):
        generator = torch.Generator().manual_seed(0)

        def draw():
            return torch.randn(3, 24, generator=generator, dtype=F64).view(3, *sizes)

        *_, x = integrate(sampler, denoise, draw(), times, draw)
        return x.flatten(1)

    expected = sampled(2, 3, 4)
    torch.testing.assert_close(sampled(2, 12), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(sampled(1, 2, 3, 4), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "ode"])
def test_no_image_depends_on_its_batch(schedules, exact, name):
    schedule = schedules["vp"]
    sampler = build(SAMPLERS[name], schedule)
    times = sampler.grid(8)
    noise = torch.randn(100, 3, 1, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))

    def sampled(images):
        draws = iter(noise[:, images])
        *_, x = integrate(sampler, exact(schedule), next(draws), times, lambda: next(draws))
        return x

    alone = torch.cat([sampled(slice(i, i + 1)) for i in range(3)])
    torch.testing.assert_close(sampled(slice(3)), alone, rtol=0, atol=1e-12)


PROCESSES = ["linear", "cosine", "sigmoid", "zero_snr", "vp", "subvp", "ve", "edm", "rectified"]
NO_DRIFT = [(name, process) for name in ("euler_maruyama",) for process in ("zero_snr", "rectified")]


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "consistency"])
def test_every_sampler_samples_every_process(schedules, mean_norm, name, process):
    """On its own grid: in distribution, as near as its order lets it come in fifty steps."""
    schedule = schedules[process]
    sampler = build(SAMPLERS[name], schedule)
    steps = 400 if name == "euler_maruyama" else 50
    if (name, process) in NO_DRIFT:
        with pytest.raises(ValueError, match="infinite drift"):
            sampler.grid(steps)
    elif name in NONLINEAR:
        found = drawn_moments(sampler, gaussian(schedule), schedule, sampler.grid(steps), 2000)
        assert errors(*found).max() < 0.15
    else:
        found = moments(sampler, schedule, sampler.grid(steps))
        assert errors(*found).max() < (0.02 if name in DETERMINISTIC and sampler.order > 1 else 0.15)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("steps", "levels"), [(1, None), (2, [0.8]), (4, [3.0, 1.0, 0.3]), (5, None)])
def test_consistency_models_are_sampled_exactly_in_any_number_of_steps(schedules, process, steps, levels):
    """With the exact consistency function of Gaussian data, from noise that the sampler takes for the noised data."""
    schedule = schedules[process]
    factor = torch.linalg.cholesky(COVARIANCE)
    values, vectors = torch.linalg.eigh(COVARIANCE)

    def ends(
        x_t, t
    ):  # of the probability flow: in each principal direction, the standard deviation is scaled
        alpha, sigma = schedule(t)
        scale = (values / (alpha**2 * values + sigma**2)).sqrt()
        x0 = MEAN + (x_t.flatten(1) - alpha * MEAN) @ (vectors * scale) @ vectors.T
        return Prediction(x0.view_as(x_t), x_t, sigma)

    sampler = ConsistencySampler(schedule, levels=levels)
    times = sampler.grid(steps)
    assert len(times) == steps + 1
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(20000, 1, 2, 2, dtype=F64, generator=generator)  # noqa: E731
    alpha, sigma = schedule(times[0])
    x_t = alpha * (MEAN + draw().flatten(1) @ factor.T).view(-1, 1, 2, 2) + sigma * draw()
    *_, samples = integrate(sampler, ends, x_t, times, draw)
    samples = samples.flatten(1)
    assert errors(samples.mean(0), samples.T.cov()).max() < 0.02


@pytest.mark.parametrize("level", [500.0, 1e-6])
def test_levels_that_the_schedule_lacks_are_refused(level):
    with pytest.raises(
        UsageError, match=r"sampler.levels=\[.*\]: are not all between .* levels of the schedule"
    ):
        ConsistencySampler(EDMSchedule(), levels=[level]).grid(2)


def test_levels_that_do_not_decrease_are_refused():
    with pytest.raises(
        UsageError, match=r"sampler.levels=\[0.5, 2.0\]: must decrease; use for example \[2.0,0.5\]"
    ):
        ConsistencySampler(VP(), levels=[0.5, 2.0])


@pytest.mark.parametrize("spacing", get_args(Spacing))
@pytest.mark.parametrize("process", PROCESSES)
def test_every_grid_leads_from_noise_to_data(schedules, process, spacing):
    schedule = schedules[process]
    sampler = DDIM(schedule, eta=0.0, spacing=spacing)
    times = sampler.grid(200)
    assert (times.diff() < 0).all()
    assert times[0] <= 1
    assert times[-1] == 0
    assert times[-2] >= schedule.grid_t_min - 1e-12
    assert errors(*moments(sampler, schedule, times)).max() < (0.1 if spacing == "quadratic" else 0.02)


def test_inversion_returns_at_first_order(reference, schedules, exact):
    schedule, x = schedules["vp"], reference("noise")["x0_data"]
    errors = []
    for n in (50, 100, 200, 400):
        times = schedule.grid(n, "log_snr")
        *_, noise = invert(schedule, exact(schedule), x, times)
        *_, back = integrate(
            DDIM(schedule, eta=0.0, spacing="log_snr"), exact(schedule), noise, times[:-1], no_noise
        )
        errors.append((back - x).abs().max())
    orders = [torch.log2(coarse / fine).item() for coarse, fine in pairwise(errors)]
    assert all(abs(order - 1) < 0.2 for order in orders), orders


def test_learned_variance_lies_where_it_is_told(schedules, reference, exact):
    """-1 is the small variance, 1 the large one."""
    schedule, noise = schedules["linear"], reference("noise")
    denoise = exact(schedule)
    cases: list[tuple[float, Literal["small", "large"]]] = [(-1.0, "small"), (1.0, "large")]
    for value, variance in cases:
        told = lambda x, t, value=value: denoise(x, t)._replace(variance=torch.full_like(x, value))  # noqa: E731
        learned = states_of_run(
            DDPM(schedule, variance="learned", spacing="trailing"), told, noise, schedule.grid(50, "trailing")
        )
        fixed = states_of_run(
            DDPM(schedule, variance=variance, spacing="trailing"),
            denoise,
            noise,
            schedule.grid(50, "trailing"),
        )
        torch.testing.assert_close(learned, fixed, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=r"sampler.variance=learned: the model has no variance head"):
        DDPM(schedule, variance="learned", spacing="trailing").check(Denoiser(nn.Identity(), schedule, Eps()))


@pytest.mark.parametrize(
    "name", ["heun", "edm still", "dpm2", "plms", "deis", "lms", "dpmpp_2m", "dpmpp_2s", "unipc"]
)
def test_higher_orders_bear_a_start_without_signal(schedules, exact, mixture, name):
    """The cosine schedule's last step takes sigma / alpha from 20,000 to 32: no slope reaches that far."""
    schedule = schedules["cosine"]
    denoise = exact(schedule)

    def wrong(x, t):  # by as much as a trained network is
        prediction = denoise(x, t)
        eps = prediction.eps + 1e-3 * torch.sin(7 * x)
        alpha, sigma = schedule(t)
        return prediction._replace(eps=eps, x0=((x - sigma * eps) / alpha).clamp(-1, 1))

    sampler = build(SAMPLERS[name] | {"spacing": "trailing"}, schedule)
    mean, covariance = drawn_moments(sampler, wrong, schedule, sampler.grid(50), 2000)
    torch.testing.assert_close(mean, mixture.mean().flatten(), rtol=0, atol=0.1)
    torch.testing.assert_close(covariance, mixture.covariance(), rtol=0, atol=0.1)


def test_a_range_of_churn_without_any_time_is_refused():
    with pytest.raises(
        UsageError, match=r"sampler.s_min=60.0: exceeds s_max=50.0, so no step adds noise; lower it"
    ):
        EDMSampler(VP(), s_min=60.0)
    EDMSampler(VP(), s_min=60.0, s_churn=0.0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_network_call_reports_the_share_that_is_done(schedules, exact, name):
    schedule = schedules["vp"]
    sampler, shares = build(SAMPLERS[name], schedule), []
    times, calls = sampler.grid(4), 0
    plain = exact(schedule)

    def counted(x, t):
        nonlocal calls
        calls += 1
        return plain(x, t)

    x = torch.randn(1, 1, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    denoise = reporting(counted, times, shares.append)
    for done, _ in enumerate(integrate(sampler, denoise, x, times, lambda: torch.zeros_like(x)), 1):
        assert (done - 1.5) / (len(times) - 1) <= sum(shares)  # a sampler may go back to more noise first
    assert min(shares) > 0
    assert len(shares) <= calls
    assert 1 - 1.5 / (len(times) - 1) <= sum(shares) <= 1


def test_a_pass_towards_noise_reports_as_well(schedules):
    schedule, shares = schedules["vp"], []
    times = DDIM(schedule).grid(5)
    denoise = reporting(lambda x, t: Prediction(x, x, t), times.flip(0), shares.append)
    assert len(list(invert(schedule, denoise, torch.zeros(1, 1, 2, 2, dtype=F64), times))) == 5
    assert shares == pytest.approx([0.2] * 4)
