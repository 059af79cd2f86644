"""Samplers against score_sde."""

import pytest
import torch

from diffusion_cli.diffusion.denoiser import Prediction
from diffusion_cli.diffusion.schedules import Discrete, Schedule
from diffusion_cli.samplers import DDPM, ODE, PC, EulerMaruyama, ReverseDiffusion, integrate

F64 = torch.float64


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
