"""Samplers against k-diffusion, EDM and the code of DPM-Solver's authors."""

from itertools import pairwise

import pytest
import torch

from diffusion_cli.diffusion import schedules as processes
from diffusion_cli.samplers import DDIM, DDPM, DPM2, LMS, DPMSolver2S, DPMSolverSDE, EDMSampler, Heun, invert
from helpers.samplers import SIGMAS, adams, multistep, one, run, times_of

F64 = torch.float64
S = "karras"  # for samplers that are given their times


# --- k-diffusion and EDM ------------------------------------------------------------

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


# --- the DPM-Solver code of its authors ------------------------------------------------------------


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


# --- guided-diffusion's inversion ------------------------------------------------------------


@pytest.mark.parametrize("tag", ["linear", "cosine"])
@pytest.mark.parametrize(("which", "steps"), [("ddim50", 50), ("all", 1000)])
def test_inversion_equals_guided_diffusion(reference, schedules, exact, agree, tag, which, steps):
    arrays, noise, schedule = reference("samplers_ddim"), reference("noise"), schedules[tag]
    times = schedule.grid(steps, "leading")
    states = torch.stack(list(invert(schedule, exact(schedule), noise["x0_data"], times[:-1])))
    kept = [0, 1, steps // 2, steps - 2]  # their next step leaves the process, for alpha_bar = 0
    name = f"gd_encode_{tag}_{which}_f64"
    agree(f"samplers_ddim/{name}", states[kept], arrays[name][:4], 1e-10 if tag == "linear" else 1e-9)


# --- azula and smalldiffusion ------------------------------------------------------------


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
