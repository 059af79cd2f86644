"""Samplers on a problem that is known in closed form: against independent code, and against exact laws."""

from itertools import pairwise
from typing import Literal, get_args

import pytest
import torch
import yaml
from torch import nn

from diffusion_cli.config import CONF, build
from diffusion_cli.diffusion.denoiser import Denoiser, Prediction, clip_x0
from diffusion_cli.diffusion.parameterizations import Eps
from diffusion_cli.diffusion.schedules import Spacing
from diffusion_cli.samplers import DDIM, DDPM, ODE, PC, integrate, invert

F64 = torch.float64


def run(sampler, denoise, noise, times, dtype=F64):
    """All states of a run from the stored start, with the stored noise."""
    draws = iter(noise["noise"].to(dtype))
    return torch.stack(list(integrate(sampler, denoise, noise["x_T"].to(dtype), times, lambda: next(draws))))


def times_of(schedule, timesteps):
    """Falling times that visit the given rising timesteps (DDPM numbering from 0)."""
    return torch.cat(
        [(timesteps.double().sort(descending=True).values + 1) / 1000, torch.zeros(1, dtype=F64)]
    )


@pytest.mark.parametrize("tag", ["linear", "cosine"])
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_full_chain_equals_guided_diffusion(reference, schedules, exact, tag, variance, clip):
    arrays, noise, schedule = reference("samplers_ddpm"), reference("noise"), schedules[tag]
    denoise = exact(schedule, gain=0.97 if clip else 1.0)
    sampler = DDPM(schedule, variance=variance, spacing="trailing")
    states = run(sampler, clip_x0(denoise, schedule) if clip else denoise, noise, sampler.grid(1000))
    theirs = arrays[f"{tag}_FIXED_{variance.upper()}_{'clip' if clip else 'noclip'}_f64"]
    error = (states[arrays["keep_1000"]] - theirs).abs().max()
    assert error < (1e-10 if tag == "linear" else 1e-9)


@pytest.mark.parametrize("tag", ["linear", "cosine"])
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("steps", [10, 50])
def test_ddpm_respaced_equals_guided_diffusion(reference, schedules, exact, tag, variance, steps):
    arrays, noise, schedule = reference("samplers_ddpm"), reference("noise"), schedules[tag]
    sampler = DDPM(schedule, variance=variance, spacing="linspace")
    times = sampler.grid(steps)
    torch.testing.assert_close(times, times_of(schedule, arrays[f"ts_respace{steps}"]), rtol=0, atol=1e-12)
    states = run(sampler, exact(schedule), noise, times)
    theirs = arrays[f"{tag}_FIXED_{variance.upper()}_respace{steps}_f64"]
    assert (states - theirs).abs().max() < (1e-10 if tag == "linear" else 1e-9)


@pytest.mark.parametrize("name", ["df_linear50lead_small", "df_linear50trail_large"])
def test_ddpm_equals_diffusers(reference, schedules, exact, name):
    arrays, noise, schedule = reference("samplers_ddpm"), reference("noise"), schedules["linear"]
    spacing = "leading" if "lead" in name else "trailing"
    sampler = DDPM(schedule, variance=name.rsplit("_", 1)[-1], spacing=spacing)
    states = run(sampler, exact(schedule), noise, sampler.grid(50))
    theirs = arrays[f"{name}_f64"]
    if name.endswith("large"):
        # Their last step, onto the data, adds noise unless its timestep is 0; ours never does.
        states, theirs = states[:-1], theirs[:-1]
    assert (states - theirs).abs().max() < 1e-10


@pytest.mark.parametrize("tag", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_equals_guided_diffusion(reference, schedules, exact, tag, steps, eta):
    arrays, noise, schedule = reference("samplers_ddim"), reference("noise"), schedules[tag]
    sampler = DDIM(schedule, eta=eta, spacing="leading")
    times = sampler.grid(steps)
    torch.testing.assert_close(times, times_of(schedule, arrays[f"ts_ddim{steps}"]), rtol=0, atol=1e-12)
    states = run(sampler, exact(schedule), noise, times)
    theirs = arrays[f"gd_{tag}_ddim{steps}_eta{eta}_f64"]
    assert (states - theirs).abs().max() < (1e-10 if tag == "linear" else 1e-9)


@pytest.mark.parametrize("tag", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_clipped_equals_guided_diffusion(reference, schedules, exact, tag, steps):
    arrays, noise, schedule = reference("samplers_ddim"), reference("noise"), schedules[tag]
    sampler = DDIM(schedule, eta=0.0, spacing="leading")
    denoise = clip_x0(exact(schedule, gain=0.9), schedule)
    states = run(sampler, denoise, noise, sampler.grid(steps))
    theirs = arrays[f"gd_{tag}_ddim{steps}_eta0.0_clip_f64"]
    assert (states - theirs).abs().max() < (1e-10 if tag == "linear" else 1e-9)


@pytest.mark.parametrize("tag", ["linear", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_all_steps_equals_guided_diffusion(reference, schedules, exact, tag, eta):
    arrays, noise, schedule = reference("samplers_ddim"), reference("noise"), schedules[tag]
    keep = reference("samplers_ddpm")["keep_1000"]
    sampler = DDIM(schedule, eta=eta, spacing="trailing")
    states = run(sampler, exact(schedule), noise, sampler.grid(1000))
    theirs = arrays[f"gd_{tag}_1000_eta{eta}_f64"]
    assert (states[keep] - theirs).abs().max() < (1e-10 if tag == "linear" else 1e-9)


@pytest.mark.parametrize(("tag", "key"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [10, 30, 50])
def test_ddim_spacings_equal_guided_diffusion(reference, schedules, exact, tag, key, spacing, steps):
    arrays, noise, schedule = reference("samplers_ddim"), reference("noise"), schedules[tag]
    sampler = DDIM(schedule, eta=0.0, spacing=spacing)
    states = run(sampler, exact(schedule), noise, sampler.grid(steps))
    theirs = arrays[f"gdlist_{key}_{spacing}_{steps}_eta0.0_f64"]
    assert (states[-1] - theirs).abs().max() < (1e-10 if tag == "linear" else 1e-9)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_float32_stays_close(reference, schedules, exact, eta):
    noise, schedule = reference("noise"), schedules["linear"]
    sampler = DDIM(schedule, eta=eta, spacing="trailing")
    denoise = exact(schedule)

    def rounded(x, t):
        return type(wide := denoise(x.double(), t))(wide.x0.float(), wide.eps.float(), wide.sigma)

    wide = run(sampler, denoise, noise, sampler.grid(50))
    narrow = run(sampler, rounded, noise, sampler.grid(50), torch.float32)
    assert narrow.dtype == torch.float32
    assert (wide - narrow).abs().max() < 1e-5


def test_ddim_eta_one_is_ddpm(reference, schedules, exact):
    noise, schedule = reference("noise"), schedules["cosine"]
    grid = schedule.grid(40, "trailing")
    ddim = run(DDIM(schedule, eta=1.0, spacing="trailing"), exact(schedule), noise, grid)
    ddpm = run(DDPM(schedule, variance="small", spacing="trailing"), exact(schedule), noise, grid)
    torch.testing.assert_close(ddim, ddpm, rtol=0, atol=1e-10)


# --- Laws, for every sampler there is a file of --------------------

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
STOCHASTIC = sorted({*SAMPLERS} - {*DETERMINISTIC, "ode"})


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
    steps = (128, 256, 512, 1024)
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

    The images of one batch are sampled from no noise at all, and from each unit of the noise of each draw alone.
    """
    draws = 0

    def counted():
        nonlocal draws
        draws += 1
        return torch.zeros(1, 1, 2, 2, dtype=F64)

    def unit():
        nonlocal draws
        noise = torch.zeros(count, 4, dtype=F64)
        noise[1 + 4 * draws : 5 + 4 * draws] = torch.eye(4, dtype=F64)
        draws += 1
        return noise.view(count, 1, 2, 2)

    list(integrate(sampler, gaussian(schedule), counted(), times, counted))
    count, draws = 1 + 4 * draws, 0
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
@pytest.mark.parametrize("name", SAMPLERS)
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
        learned = run(
            DDPM(schedule, variance="learned", spacing="trailing"), told, noise, schedule.grid(50, "trailing")
        )
        fixed = run(
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
