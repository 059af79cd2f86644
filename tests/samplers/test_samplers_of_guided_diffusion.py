"""DDPM and DDIM against guided-diffusion."""

import pytest
import torch

from diffusion_cli.diffusion.denoiser import clip_x0
from diffusion_cli.samplers import DDIM, DDPM
from helpers.samplers import states_of_run

F64 = torch.float64


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
    states = states_of_run(
        sampler, clip_x0(denoise, schedule) if clip else denoise, noise, sampler.grid(1000)
    )
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
    states = states_of_run(sampler, exact(schedule), noise, times)
    theirs = arrays[f"{tag}_FIXED_{variance.upper()}_respace{steps}_f64"]
    assert (states - theirs).abs().max() < (1e-10 if tag == "linear" else 1e-9)


@pytest.mark.parametrize("name", ["df_linear50lead_small", "df_linear50trail_large"])
def test_ddpm_equals_diffusers(reference, schedules, exact, name):
    arrays, noise, schedule = reference("samplers_ddpm"), reference("noise"), schedules["linear"]
    spacing = "leading" if "lead" in name else "trailing"
    sampler = DDPM(schedule, variance=name.rsplit("_", 1)[-1], spacing=spacing)
    states = states_of_run(sampler, exact(schedule), noise, sampler.grid(50))
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
    states = states_of_run(sampler, exact(schedule), noise, times)
    theirs = arrays[f"gd_{tag}_ddim{steps}_eta{eta}_f64"]
    assert (states - theirs).abs().max() < (1e-10 if tag == "linear" else 1e-9)


@pytest.mark.parametrize("tag", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_clipped_equals_guided_diffusion(reference, schedules, exact, tag, steps):
    arrays, noise, schedule = reference("samplers_ddim"), reference("noise"), schedules[tag]
    sampler = DDIM(schedule, eta=0.0, spacing="leading")
    denoise = clip_x0(exact(schedule, gain=0.9), schedule)
    states = states_of_run(sampler, denoise, noise, sampler.grid(steps))
    theirs = arrays[f"gd_{tag}_ddim{steps}_eta0.0_clip_f64"]
    assert (states - theirs).abs().max() < (1e-10 if tag == "linear" else 1e-9)


@pytest.mark.parametrize("tag", ["linear", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_all_steps_equals_guided_diffusion(reference, schedules, exact, tag, eta):
    arrays, noise, schedule = reference("samplers_ddim"), reference("noise"), schedules[tag]
    keep = reference("samplers_ddpm")["keep_1000"]
    sampler = DDIM(schedule, eta=eta, spacing="trailing")
    states = states_of_run(sampler, exact(schedule), noise, sampler.grid(1000))
    theirs = arrays[f"gd_{tag}_1000_eta{eta}_f64"]
    assert (states[keep] - theirs).abs().max() < (1e-10 if tag == "linear" else 1e-9)


@pytest.mark.parametrize(("tag", "key"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [10, 30, 50])
def test_ddim_spacings_equal_guided_diffusion(reference, schedules, exact, tag, key, spacing, steps):
    arrays, noise, schedule = reference("samplers_ddim"), reference("noise"), schedules[tag]
    sampler = DDIM(schedule, eta=0.0, spacing=spacing)
    states = states_of_run(sampler, exact(schedule), noise, sampler.grid(steps))
    theirs = arrays[f"gdlist_{key}_{spacing}_{steps}_eta0.0_f64"]
    assert (states[-1] - theirs).abs().max() < (1e-10 if tag == "linear" else 1e-9)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_float32_stays_close(reference, schedules, exact, eta):
    noise, schedule = reference("noise"), schedules["linear"]
    sampler = DDIM(schedule, eta=eta, spacing="trailing")
    denoise = exact(schedule)

    def rounded(x, t):
        return type(wide := denoise(x.double(), t))(wide.x0.float(), wide.eps.float(), wide.sigma)

    wide = states_of_run(sampler, denoise, noise, sampler.grid(50))
    narrow = states_of_run(sampler, rounded, noise, sampler.grid(50), torch.float32)
    assert narrow.dtype == torch.float32
    assert (wide - narrow).abs().max() < 1e-5


def test_ddim_eta_one_is_ddpm(reference, schedules, exact):
    noise, schedule = reference("noise"), schedules["cosine"]
    grid = schedule.grid(40, "trailing")
    ddim = states_of_run(DDIM(schedule, eta=1.0, spacing="trailing"), exact(schedule), noise, grid)
    ddpm = states_of_run(DDPM(schedule, variance="small", spacing="trailing"), exact(schedule), noise, grid)
    torch.testing.assert_close(ddim, ddpm, rtol=0, atol=1e-10)
