"""Samplers against the schedulers of diffusers."""

from itertools import pairwise

import pytest
import torch
import yaml

from diffusion_cli.config import CONF, build
from diffusion_cli.samplers import DDIM, DEIS, DPM2, LMS, PLMS, DPMSolver2S, DPMSolverMultistep, Heun, UniPC
from helpers.samplers import SIGMAS, adams, multistep, one, run, times_of

F64 = torch.float64
S = "karras"  # for samplers that are given their times


def unipc(order, variant):
    return lambda s, order=order: UniPC(s, order=order, variant=variant, spacing=S)


def falling_orders(order, steps):
    """The order of each step where it is lowered to what is left of the run."""
    return [min(order, steps - i) for i in range(steps)]


# --- diffusers ------------------------------------------------------------

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


# --- errors against the exact flow ------------------------------------------------------------

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
    errors, counts = [], [steps for steps in arrays["steps"].tolist() if steps <= 160]
    for steps in counts:
        entries = torch.linspace(0, 999, steps + 1, dtype=F64).round().flip(0)[:-1]
        tail = 1 / 1000 if name.startswith("deis") else 0.0
        times = torch.cat([(entries + 1) / 1000, torch.tensor([tail], dtype=F64)])
        order = 1 if name == "dpmpp1" else int(name.replace("_heun", "").rstrip("m")[-1])
        lowered = name.startswith("unipc") or steps < 15
        orders = falling_orders(order, steps) if lowered else None
        mine = run(make, schedule, exact(schedule), noise["x_T"], times, iter(()), orders)[-1]
        errors.append((mine - end).abs().max())
    theirs = arrays[f"{tag}_{name}_err"][: len(counts)]
    agree(f"convergence/{tag}_{name}_err", torch.stack(errors), theirs, 1e-9)
