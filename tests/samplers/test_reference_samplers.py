"""Samplers against the states that independent implementations pass through; see tests/reference/README.md."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import yaml

from diffusion_cli.config import CONF, build
from diffusion_cli.diffusion import schedules as processes
from diffusion_cli.diffusion.denoiser import Prediction
from diffusion_cli.diffusion.schedules import Discrete, Schedule
from diffusion_cli.samplers import (
    DDIM,
    DDPM,
    DEIS,
    DPM2,
    LMS,
    ODE,
    PC,
    PLMS,
    DPMSolver2S,
    DPMSolverMultistep,
    DPMSolverSDE,
    EDMSampler,
    EulerMaruyama,
    Heun,
    ReverseDiffusion,
    UniPC,
    integrate,
    invert,
)

F64 = torch.float64
S = "karras"  # for samplers that are given their times
# A process without scaling, x = x_0 + sigma eps, wide enough for every list of sigmas.
SIGMAS = processes.EDMSchedule(sigma_min=1e-3, sigma_max=1e6)


def multistep(order: Any, eta: float = 0.0, solver_type: Any = "midpoint"):
    return lambda s, order=order: DPMSolverMultistep(
        s, order=order, eta=eta, solver_type=solver_type, spacing=S
    )


def unipc(order, variant):
    return lambda s, order=order: UniPC(s, order=order, variant=variant, spacing=S)


def adams(kind, order):
    return lambda s, order=order: kind(s, order=order, spacing=S)


def one(kind, **arguments):
    return lambda s, order=None: kind(s, spacing=S, **arguments)


def times_of(schedule, sigmas):
    """Times at which sigma / alpha has the given values; 0 stays 0."""
    return torch.where(sigmas > 0, schedule.time_of(-2 * sigmas.log()), 0.0)


def run(make, schedule, denoise, x, times, draws, orders=None):
    """All states of a run, the sampler of order orders[i] in step i where that is given."""
    states, state = [], make(schedule).start(times)
    for i, (t, s) in enumerate(pairwise(times)):
        sampler = make(schedule, orders[i]) if orders else make(schedule)
        x, state = sampler.step(denoise, x, t, s, lambda: next(draws), state)
        states.append(x)
    return torch.stack(states)


def falling_orders(order, steps):
    """The order of each step where it is lowered to what is left of the run."""
    return [min(order, steps - i) for i in range(steps)]


# --- diffusers --------------------

DIFFUSERS = {
    "dpmpp1": multistep(1),
    "dpmpp2m": multistep(2),
    "dpmpp2mheun": multistep(2, solver_type="heun"),
    "dpmpp3m": multistep(3),
    "sde_dpmpp1": multistep(1, 1.0),
    "sde_dpmpp2m": multistep(2, 1.0),
    "sde_dpmpp2mheun": multistep(2, 1.0, "heun"),
    "unipc2bh2": unipc(2, "bh2"),
    "unipc2": unipc(2, "bh2"),
    "unipc3bh2": unipc(3, "bh2"),
    "unipc2bh1": unipc(2, "bh1"),
    "deis2": adams(DEIS, 2),
    "deis3": adams(DEIS, 3),
    "plms": one(PLMS),
    "plms_default": one(PLMS),
    "euler": one(DDIM, eta=0.0),
    "eulera": one(DDIM, eta=1.0),
    "heun": one(Heun),
    "lms": adams(LMS, 4),
    "kdpm2": one(DPM2, eta=0.0),
}
RUNS = [
    "dpmpp1_lin_10",
    "dpmpp2m_lin_10",
    "dpmpp2m_lin_20",
    "dpmpp2mheun_lin_10",
    "dpmpp3m_lin_10",
    "dpmpp3m_lin_20",
    "sde_dpmpp1_lin_10",
    "sde_dpmpp2m_lin_20",
    "sde_dpmpp2mheun_lin_10",
    "unipc2bh2_lin_10",
    "unipc2bh2_lin_20",
    "unipc3bh2_lin_20",
    "unipc2bh1_lin_10",
    "deis2_lin_10",
    "deis2_lin_20",
    "deis3_lin_20",
    "plms_lin_20",
    "plms_default_lin_10",
    "euler_lin_20",
    "eulera_lin_20",
    "heun_lin_20",
    "lms_lin_20",
    "kdpm2_lin_10",
    "dpmpp2m_trailing_lin_10",
    "euler_trailing_lin_10",
    "dpmpp2m_leading_lin_10",
    "euler_leading_lin_10",
    "dpmpp2m_sigmin_lin_10",
    "dpmpp2m_karras_lin_10",
    "unipc2_karras_lin_10",
    "euler_karras_lin_10",
    "heun_karras_lin_10",
    "lms_karras_lin_10",
    "dpmpp2m_lu_lin_10",
    "dpmpp1_cos_10",
    "dpmpp2m_cos_10",
    "dpmpp2m_cos_20",
    "dpmpp2mheun_cos_10",
    "dpmpp3m_cos_10",
    "dpmpp3m_cos_20",
    "sde_dpmpp1_cos_10",
    "sde_dpmpp2m_cos_20",
    "sde_dpmpp2mheun_cos_10",
    "unipc2bh2_cos_10",
    "unipc2bh2_cos_20",
    "unipc3bh2_cos_20",
    "unipc2bh1_cos_10",
    "deis2_cos_10",
    "deis2_cos_20",
    "deis3_cos_20",
    "plms_cos_20",
    "plms_default_cos_10",
    "edm_euler_10",
    "edm_dpmpp2m_10",
    "edm_dpmpp2m_20",
    "edm_sde_dpmpp2m_20",
]


def kind_of(name):
    words = name.removeprefix("edm_").split("_")
    known = [n for n in range(len(words), 0, -1) if "_".join(words[:n]) in DIFFUSERS]
    return "_".join(words[: known[0]])


@pytest.mark.parametrize("name", RUNS)
def test_equals_diffusers(reference, schedules, exact, agree, name):
    arrays, noise = reference("samplers_diffusers"), reference("noise")
    kind, make = kind_of(name), DIFFUSERS[kind_of(name)]
    sigmas, theirs = arrays[f"{name}_sigmas"], arrays[f"{name}_f64"]
    calls = len(sigmas)
    two = kind in ("heun", "kdpm2")
    sigmas = sigmas[::2] if kind == "kdpm2" else torch.unique(sigmas).flip(0)
    steps = len(sigmas)
    schedule = schedules["linear" if "_lin" in name else "cosine"]
    clean = schedule(torch.tensor(1 / 1000, dtype=F64))
    last = float(clean[1] / clean[0])  # the level of their timestep 0
    stops = kind.startswith(("deis", "unipc2bh1", "plms_default")) or "sigmin" in name
    sigmas = torch.cat([sigmas, torch.tensor([last if stops else 0.0], dtype=F64)])
    if kind in ("euler", "eulera", "heun", "lms", "kdpm2") or name.startswith("edm_"):
        schedule, scale = SIGMAS, sigmas[0]
        if "leading" in name:
            scale = torch.sqrt(1 + scale**2)
    else:
        scale = 1.0
    orders = None
    if kind.startswith("unipc"):  # lowers the order towards the end always
        orders = falling_orders(int(kind[5]), steps)
    elif kind[:4] in ("dpmp", "deis") and kind[-2:] != "un" and steps < 15:  # in short runs
        order = int(kind.removeprefix("deis").removeprefix("dpmpp")[0])
        orders = falling_orders(order, steps)
    mine = run(make, schedule, exact(schedule), scale * noise["x_T"], times_of(schedule, sigmas),
               iter(noise["noise"]), orders)  # fmt: skip
    kept = range(calls) if len(theirs) == calls else _kept(calls)
    pairs = [
        (step, place) for place, i in enumerate(kept) if (step := _step_of(i, calls, steps, two)) is not None
    ]
    tolerance = 1e-9 if "_cos" not in name else 2e-9
    agree(f"samplers_diffusers/{name}", mine[[s for s, _ in pairs]], theirs[[p for _, p in pairs]], tolerance)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("dpmpp2m_leading_lin_10", "dpmpp_2m"),
        ("dpmpp2m_lin_10", "dpmpp_2m"),
        ("dpmpp3m_cos_20", "dpmpp_3m"),
        ("sde_dpmpp2m_lin_20", "dpmpp_2m_sde"),
        ("unipc2bh2_lin_20", "unipc"),
        ("deis2_cos_10", "deis"),
        ("euler_leading_lin_10", "euler"),
    ],
)
def test_leading_and_linspace_are_the_grids_that_diffusers_has_for_a_sampler(
    reference, schedules, name, sampler
):
    sigmas, schedule = (
        reference("samplers_diffusers")[f"{name}_sigmas"],
        schedules["linear" if "_lin" in name else "cosine"],
    )
    node = yaml.safe_load((CONF / "sampler" / f"{sampler}.yaml").read_text())
    spacing = "leading" if "leading" in name else "linspace"
    *times, end = build(node | {"spacing": spacing}, schedule).grid(len(sigmas))
    alpha, sigma = schedule(torch.stack(times))
    torch.testing.assert_close(sigma / alpha, sigmas, rtol=1e-6, atol=0)
    assert end == 0


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_as_many_steps_as_timesteps_visit_all_of_them(schedules, spacing):
    sampler = DPMSolverMultistep(
        schedules["linear"], order=2, eta=0.0, solver_type="midpoint", spacing=spacing
    )
    torch.testing.assert_close(sampler.grid(1000), torch.arange(1000, -1, -1, dtype=F64) / 1000)
    assert len(sampler.grid(999)) == 1000
    assert float(sampler.grid(1)[0]) == 1


@pytest.mark.parametrize(
    "name", ["ddim", "euler", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc", "deis"]
)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "karras"])
def test_the_settings_of_images_name_their_grid_only_where_it_has_changed(schedules, name, spacing):
    schedule = schedules["linear"]
    node = yaml.safe_load((CONF / "sampler" / f"{name}.yaml").read_text())
    sampler = build(node | {"spacing": spacing}, schedule)
    for steps in (1, 2, 10, 1000):
        before = schedule.grid(steps, spacing)
        assert bool(sampler.grid_settings(steps)) == (not torch.equal(sampler.grid(steps), before))


def _kept(calls):
    """The iterations that a long run stores."""
    half = {20: 10, 19: 9, 39: 19, 21: 10, 11: 5}[calls]
    return [0, 1, 2, half, calls - 2, calls - 1]


def _step_of(iteration, calls, steps, two):
    """The step that an iteration, of one network call, completes, or None."""
    if two:
        return steps - 1 if iteration == calls - 1 else iteration // 2 if iteration % 2 else None
    return iteration - (calls - steps) if iteration >= calls - steps else None


@pytest.mark.parametrize("tag", ["lin", "cos"])
@pytest.mark.parametrize("steps", [10, 20])
def test_singlestep_equals_diffusers(reference, schedules, exact, agree, tag, steps):
    """Their odd steps are the middle of our step, which may lie anywhere."""
    arrays, noise = reference("samplers_diffusers"), reference("noise")
    name, schedule = f"dpmpp2s_{tag}_{steps}", schedules["linear" if tag == "lin" else "cosine"]
    times = times_of(schedule, torch.cat([arrays[f"{name}_sigmas"], torch.zeros(1, dtype=F64)]))
    denoise, sampler, x = exact(schedule), DPMSolver2S(schedule, eta=0.0, spacing=S), noise["x_T"]
    states = []
    for i in range(0, steps - 2, 2):
        t, middle, s = times[i : i + 3]
        states += [
            sampler.euler_step(denoise(x, t), middle),
            sampler.through(denoise, x, t, middle, *schedule(s)),
        ]
        x = states[-1]
    for t, s in pairwise(times[-3:]):  # two steps of first order end it
        x = sampler.euler_step(denoise(x, t), s)
        states.append(x)
    theirs = arrays[f"{name}_f64"]
    kept = range(steps) if len(theirs) == steps else _kept(steps)
    agree(f"samplers_diffusers/{name}", torch.stack(states)[list(kept)], theirs, 1e-9)


# --- k-diffusion and EDM --------------------

K_DIFFUSION = {
    "euler": one(DDIM, eta=0.0),
    "heun": one(Heun),
    "dpm_2": one(DPM2, eta=0.0),
    "lms": adams(LMS, 4),
    "lms2": adams(LMS, 2),
    "dpmpp_2m": multistep(2),
    "dpmpp_2s_eta0": one(DPMSolver2S, eta=0.0),
    "dpmpp_2s_a": one(DPMSolver2S, eta=1.0),
    "euler_a": one(DDIM, eta=1.0),
    "euler_a_eta0.5": one(DDIM, eta=0.5),
    "dpm_2_a": one(DPM2, eta=1.0),
    "dpmpp_sde": one(DPMSolverSDE, eta=1.0),
    "dpmpp_2m_sde_mid": multistep(2, 1.0),
    "dpmpp_2m_sde_heun": multistep(2, 1.0, "heun"),
    "dpmpp_2m_sde_mid_eta0.5": multistep(2, 0.5),
    "dpmpp_2m_sde_eta0": multistep(2),
    "dpmpp_3m_sde": multistep(3, 1.0, "heun"),
    "dpmpp_3m_sde_eta0": multistep(3, 0.0, "heun"),
}
GRIDS = {"karras10": range(11), "karras25": [0, 1, 2, 13, 23, 24, 25], "exp12": [0, 1, 2, 6, 10, 11, 12]}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", K_DIFFUSION)
def test_equals_k_diffusion(reference, exact, agree, kind, grid):
    arrays, noise = reference("samplers_kdiff_edm"), reference("noise")
    sigmas = arrays[f"sigmas_{grid}"]
    x = noise["x_T"] * sigmas[0]
    states = run(K_DIFFUSION[kind], SIGMAS, exact(SIGMAS), x, times_of(SIGMAS, sigmas), iter(noise["noise"]))
    states = torch.cat([x[None], states])[list(GRIDS[grid])]
    agree(f"samplers_kdiff_edm/kd_{kind}_{grid}", states, arrays[f"kd_{kind}_{grid}"], 1e-9)


def churned(schedule, denoise, sampler, noise, times):
    """A run with noise[i] in step i, whether it is asked for or not."""
    x, state = noise["x_T"] * sampler.ratio(times[0]), sampler.start(times)
    for i, (t, s) in enumerate(pairwise(times)):
        x, state = sampler.step(denoise, x, t, s, lambda i=i: noise["noise"][i], state)
    return x


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_churn_equals_k_diffusion(reference, exact, agree, solver, grid):
    arrays, noise = reference("samplers_kdiff_edm"), reference("noise")
    sampler = EDMSampler(
        SIGMAS, s_churn=10.0, s_min=0.05, s_max=50.0, s_noise=1.003, solver=solver, spacing=S
    )
    end = churned(SIGMAS, exact(SIGMAS), sampler, noise, times_of(SIGMAS, arrays[f"sigmas_{grid}"]))
    name = f"kd_{solver}_churn_{grid}"
    agree(f"samplers_kdiff_edm/{name}", end, arrays[name][-1], 1e-9)


@pytest.mark.parametrize(
    ("name", "steps", "low", "high", "rho", "churn"),
    [
        ("edm_heun18", 18, 0.002, 80.0, 7, (0.0, 0.05, 50.0, 1.0)),
        ("edm_churn18", 18, 0.002, 80.0, 7, (10.0, 0.05, 50.0, 1.003)),
        ("edm_churn40", 40, 0.002, 80.0, 7, (40.0, 0.05, 50.0, 1.003)),
        ("edm_churn_sat", 12, 0.01, 50.0, 5, (30.0, 0.0, 1e9, 1.01)),
    ],
)
def test_equals_edm(reference, exact, agree, name, steps, low, high, rho, churn):
    arrays, noise = reference("samplers_kdiff_edm"), reference("noise")
    if rho == 7:
        times = processes.EDMSchedule(sigma_min=low, sigma_max=high).grid(steps, "karras") * (
            high / SIGMAS.sigma_max
        ) ** (1 / 7)
    else:
        ramp = torch.linspace(0, 1, steps, dtype=F64)
        sigmas = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        times = times_of(SIGMAS, torch.cat([sigmas, torch.zeros(1, dtype=F64)]))
    s_churn, s_min, s_max, s_noise = churn
    sampler = EDMSampler(
        SIGMAS, s_churn=s_churn, s_min=s_min, s_max=s_max, s_noise=s_noise, solver="heun", spacing=S
    )
    agree(
        f"samplers_kdiff_edm/{name}",
        churned(SIGMAS, exact(SIGMAS), sampler, noise, times),
        arrays[name],
        1e-9,
    )


def test_noise_is_added_no_further_than_the_schedule_goes(reference, exact):
    schedule, noise = processes.EDMSchedule(sigma_min=0.002, sigma_max=80.0), reference("noise")
    sampler = EDMSampler(schedule, s_churn=1e3, s_min=0.0, s_max=1e9, s_noise=1.0, solver="heun", spacing=S)
    assert churned(schedule, exact(schedule), sampler, noise, schedule.grid(8, "karras")).isfinite().all()


# --- the DPM-Solver code of its authors --------------------


@pytest.mark.parametrize(
    ("name", "make", "steps", "spacing"),
    [
        ("multistep2_time_uniform_20", multistep(2), 21, "time"),
        ("multistep3_logSNR_20", multistep(3), 21, "log_snr"),
        ("singlestep2_logSNR_20", one(DPMSolver2S, eta=0.0), 11, "log_snr"),
        ("singlestep_fixed2_logSNR_20", one(DPMSolver2S, eta=0.0), 11, "log_snr"),
        ("multistep2_denoise_to_zero_20", multistep(2), 21, "time"),
    ],
)
def test_equals_dpm_solver(reference, schedules, exact, agree, name, make, steps, spacing):
    arrays, noise, schedule = reference("samplers_kdiff_edm"), reference("noise"), schedules["linear"]
    times = schedule.grid(steps, spacing)
    if "zero" not in name:
        times = times[:-1]
    end = run(make, schedule, exact(schedule), noise["x_T"], times, iter(()))[-1]
    agree(f"samplers_kdiff_edm/lu_dpmsolver++_{name}", end, arrays[f"lu_dpmsolver++_{name}"], 1e-9)


# --- guided-diffusion's inversion --------------------


@pytest.mark.parametrize("tag", ["linear", "cosine"])
@pytest.mark.parametrize(("which", "steps"), [("ddim50", 50), ("all", 1000)])
def test_inversion_equals_guided_diffusion(reference, schedules, exact, agree, tag, which, steps):
    arrays, noise, schedule = reference("samplers_ddim"), reference("noise"), schedules[tag]
    times = schedule.grid(steps, "leading")
    states = torch.stack(list(invert(schedule, exact(schedule), noise["x0_data"], times[:-1])))
    kept = [0, 1, steps // 2, steps - 2]  # their next step leaves the process, for alpha_bar = 0
    name = f"gd_encode_{tag}_{which}_f64"
    agree(f"samplers_ddim/{name}", states[kept], arrays[name][:4], 1e-10 if tag == "linear" else 1e-9)


# --- score_sde --------------------


class Steps(Schedule):
    """A schedule with lists as levels and transitions: their samplers mix those of two processes."""

    derivatives = log_snr = time_of = timestep = None  # pyright: ignore[reportAssignmentType]

    def __init__(self, levels, transitions):
        self.levels, self.transitions = levels, transitions

    def __call__(self, t):
        return tuple(level[int(t)] for level in self.levels)

    def transition(self, t, s):
        return tuple(value[int(t)] for value in self.transitions)


def score_sde(schedules, kind, N):
    """Times of their loop, the process, the transitions of its discretisation in their order."""
    schedule = schedules[kind]
    times = torch.linspace(1, 1e-5 if kind == "ve" else 1e-3, N, dtype=F64)
    index = (times * (N - 1)).long()
    if kind == "ve":
        sigmas = torch.linspace(0.01, 50.0, 2, dtype=F64).log()
        sigmas = torch.exp(torch.linspace(sigmas[0], sigmas[1], N, dtype=F64))
        before = torch.where(index > 0, sigmas[(index - 1).clamp(min=0)], 0.0)
        transitions = (torch.ones_like(times), sigmas[index] ** 2 - before**2)
    else:
        betas = torch.linspace(0.1 / N, 20 / N, N, dtype=F64)[index]
        transitions = ((1 - betas).sqrt(), betas)
    return schedule, times, transitions


def exact_score(mixture, schedule, times):
    """The perfect score at the i-th of their times, as a denoiser."""

    def denoise(x, i):
        alpha, sigma = schedule(times[int(i)])
        return Prediction(x, -sigma * mixture.score(x, alpha, sigma), sigma)

    return denoise


@pytest.mark.parametrize(("kind", "N"), [("vp", 500), ("vp", 1000), ("subvp", 400), ("ve", 1000)])
def test_euler_maruyama_equals_score_sde(reference, schedules, mixture, agree, kind, N):
    noise, (schedule, times, _) = reference("noise"), score_sde(schedules, kind, N)
    sampler = EulerMaruyama(schedule, spacing="time")
    score = exact_score(mixture, schedule, times)
    x = noise["x_T"] * schedule.prior_std(times[0])
    for i, t in enumerate(times):  # their steps are 1/N long, wherever the next time lies
        z = noise["noise"][i] if i < N - 1 else torch.zeros_like(x)
        x, _ = sampler.step(lambda x, t, i=i: score(x, i), x, t, t - 1 / N, lambda z=z: z, None)
    name = f"{kind}_euler_maruyama_none_N{N}_f64"
    agree(f"samplers_sde/{name}", x, reference("samplers_sde")[name], 1e-9)


def batch_norm(x):
    """Their norm: the mean over the batch."""
    return x.flatten(1).norm(dim=1).mean()


@pytest.mark.parametrize(
    ("kind", "N", "predictor", "corrector", "snr"),
    [
        ("vp", 200, "reverse_diffusion", None, None),
        ("vp", 400, "reverse_diffusion", "langevin", 0.16),
        ("vp", 200, "euler_maruyama", "langevin", 0.01),
        ("vp", 100, None, "ald", 0.17),
        ("ve", 500, "reverse_diffusion", None, None),
        ("ve", 400, "reverse_diffusion", "langevin", 0.16),
        ("ve", 200, None, "ald", 0.17),
    ],
)
def test_predictor_corrector_equals_score_sde(
    reference, schedules, mixture, agree, monkeypatch, kind, N, predictor, corrector, snr
):
    monkeypatch.setattr(PC, "norm", staticmethod(batch_norm))
    noise, (schedule, times, transitions) = reference("noise"), score_sde(schedules, kind, N)
    stub = Steps(schedule(times), transitions)
    denoise, draws = exact_score(mixture, schedule, times), iter(noise["noise"])
    draw = lambda: next(draws)  # noqa: E731
    reverse = ReverseDiffusion(stub, spacing="time")
    maruyama = EulerMaruyama(schedule, spacing="time")
    pc = PC(
        stub,
        predictor="none",
        corrector=corrector or "ald",
        corrector_steps=1,
        snr=snr or 1.0,
        spacing="time",
    )
    x = noise["x_T"] * schedule.prior_std(times[0])
    for i in range(N):
        place = torch.tensor(i)
        if corrector:
            x, _ = pc.step(denoise, x, place, place, draw, None)
        end = torch.tensor(0.0 if i == N - 1 else 1.0)
        if predictor == "reverse_diffusion":
            x, _ = reverse.step(denoise, x, place, end, draw, None)
        elif predictor:
            x, _ = maruyama.step(lambda x, t, i=i: denoise(x, i), x, times[i], times[i] - 1 / N, draw, None)
    name = f"{kind}_{predictor or 'none'}_{corrector or 'none'}_N{N}_f64"
    agree(f"samplers_sde/{name}", x, reference("samplers_sde")[name], 1e-9)


def test_ancestral_sampling_equals_score_sde(reference, schedules, mixture, agree):
    noise = reference("noise")
    for kind, N in (("vp", 1000), ("ve", 300)):
        schedule, times, _ = score_sde(schedules, kind, N)
        index = (times * (N - 1)).long()
        score = exact_score(mixture, schedule, times)
        if kind == "vp":
            steps = Discrete(torch.linspace(0.1 / N, 20 / N, N, dtype=F64), False)
            places = [((i + 1) / N, i / N) for i in index.tolist()]
        else:
            steps = schedule
            places = [
                (max(i / (N - 1), 1e-300), max(i - 1, 1e-300) / (N - 1) if i else 0.0) for i in index.tolist()
            ]
        sampler = DDPM(steps, variance="large" if kind == "vp" else "small", spacing="time")
        x = noise["x_T"] * schedule.prior_std(times[0])
        for i, (t, s) in enumerate(torch.tensor(places, dtype=F64)):

            def denoise(x, t, i=i, steps=steps, score=score):
                alpha, sigma = steps(t)
                given = score(x, i).score
                return Prediction((x + sigma**2 * given) / alpha, -sigma * given, sigma)

            z = noise["noise"][i] if i < N - 1 else torch.zeros_like(x)
            x, _ = sampler.step(denoise, x, t, s, lambda z=z: z, None)
        name = f"{kind}_ancestral_sampling_none_N{N}_f64"
        agree(f"samplers_sde/{name}", x, reference("samplers_sde")[name], 1e-9)


@pytest.mark.parametrize("kind", ["vp", "subvp", "ve"])
def test_ode_equals_score_sde(reference, schedules, exact, agree, kind):
    arrays, schedule = reference("samplers_sde"), schedules[kind]
    sampler = ODE(schedule, rtol=1e-5, atol=1e-5, max_steps=1000)
    times = sampler.grid(1)
    x = schedule.prior_std(times[0]) * reference("noise")["x_T"]
    end, denoised = integrate(sampler, exact(schedule), x, times, lambda: x)
    agree(f"samplers_sde/{kind}_ode_exact", end, arrays[f"{kind}_ode_exact"], 2e-4)
    agree(f"samplers_sde/{kind}_ode_denoise_f64", denoised, arrays[f"{kind}_ode_denoise_f64"], 2e-4)


# --- azula and smalldiffusion --------------------


@pytest.mark.parametrize("process", ["vp", "rectified", "cosine"])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("ddpm", one(DDPM, variance="small")),
        ("ddim", one(DDIM, eta=0.0)),
        ("ddim_eta.36", one(DDIM, eta=0.6)),
        ("xeab2", multistep(2, solver_type="heun")),
    ],
)
def test_equals_azula(reference, exact, agree, process, name, make):
    arrays, noise = reference("samplers_azula_small"), reference("noise")
    alpha, sigma = arrays[f"{process}_alpha"], arrays[f"{process}_sigma"]
    order = (sigma / alpha).argsort(descending=True)
    alpha, sigma = alpha[order], sigma[order]
    x = noise["x_T"] * torch.sqrt(alpha[0] ** 2 + sigma[0] ** 2) / alpha[0]
    end = run(make, SIGMAS, exact(SIGMAS), x, times_of(SIGMAS, sigma / alpha), iter(noise["noise"]))[-1]
    agree(f"samplers_azula_small/az_{process}_{name}", alpha[-1] * end, arrays[f"az_{process}_{name}"], 1e-9)


@pytest.mark.parametrize("process", ["loglinear", "ddpm"])
@pytest.mark.parametrize(("name", "eta"), [("ddim", 0.0), ("ddpm", 1.0)])
def test_equals_smalldiffusion(reference, exact, agree, process, name, eta):
    arrays, noise = reference("samplers_azula_small"), reference("noise")
    sigmas = arrays[f"small_{process}_sigmas"]
    states = run(one(DDIM, eta=eta), SIGMAS, exact(SIGMAS), noise["x_T"] * sigmas[0],
                 times_of(SIGMAS, sigmas), iter(noise["noise"]))  # fmt: skip
    key = f"small_{process}_{name}"
    agree(f"samplers_azula_small/{key}", states[[0, len(states) // 2, -1]], arrays[key], 1e-9)


# --- errors against the exact flow --------------------


FLOWS = {
    "dpmpp1": multistep(1),
    "dpmpp2m": multistep(2),
    "dpmpp2m_heun": multistep(2, solver_type="heun"),
    "dpmpp3m": multistep(3),
    "unipc2": unipc(2, "bh2"),
    "unipc3": unipc(3, "bh2"),
    "deis1": adams(DEIS, 1),
    "deis2": adams(DEIS, 2),
    "deis3": adams(DEIS, 3),
}
FLOW_RUNS = [("linear", name) for name in FLOWS]
FLOW_RUNS += [("cosine", name) for name in ("dpmpp1", "dpmpp2m", "unipc2", "deis2", "deis3")]


@pytest.mark.parametrize(("tag", "name"), FLOW_RUNS)
def test_errors_against_the_exact_flow_equal_those_of_diffusers(
    reference, schedules, exact, agree, tag, name
):
    arrays, noise, schedule, make = reference("convergence"), reference("noise"), schedules[tag], FLOWS[name]
    end = next(value for key, value in arrays.items() if key.startswith(f"{tag}_exact_end_vp"))
    errors = []
    for steps in arrays["steps"].tolist():
        entries = torch.linspace(0, 999, steps + 1, dtype=F64).round().flip(0)[:-1]
        tail = 1 / 1000 if name.startswith("deis") else 0.0
        times = torch.cat([(entries + 1) / 1000, torch.tensor([tail], dtype=F64)])
        order = 1 if name == "dpmpp1" else int(name.replace("_heun", "").rstrip("m")[-1])
        lowered = name.startswith("unipc") or steps < 15
        orders = falling_orders(order, steps) if lowered else None
        mine = run(make, schedule, exact(schedule), noise["x_T"], times, iter(()), orders)[-1]
        errors.append((mine - end).abs().max())
    agree(f"convergence/{tag}_{name}_err", torch.stack(errors), arrays[f"{tag}_{name}_err"], 1e-9)
