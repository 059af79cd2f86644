"""Likelihood of images: the variational bound, and the log-density under the probability flow ODE."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_cli.diffusion.denoiser import Denoise, noised
from diffusion_cli.diffusion.posterior import Variance, bound_term, normal_kl
from diffusion_cli.diffusion.probability_flow import Tolerances, angle, scale, solve, velocity
from diffusion_cli.diffusion.schedules import Discrete, Schedule


def prior_term(schedule: Schedule, x_0: Tensor) -> Tensor:
    """Return the prior term of the bound, `KL(q(x_1 | x_0) || N(0, I))`, in bits per dimension, [B]."""
    alpha, sigma = schedule(torch.ones((), dtype=torch.float64))
    zero = x_0.new_zeros(())
    kl = normal_kl(alpha * x_0, 2 * sigma.log().to(x_0), zero, zero)
    return kl.flatten(1).mean(1) / math.log(2)


def bound_terms(
    schedule: Discrete,
    denoise: Denoise,
    x_0: Tensor,
    draw: Callable[[], Tensor],
    variances: Sequence[Variance],
    exact_cdf: bool = False,
) -> Iterator[Tensor]:
    """Yield the terms of the variational bound for t = T..1 in bits per dimension, [V, B] for V variances.

    Their sum plus `prior_term` is an upper bound on the bits per dimension of 8-bit images.

    Args:
        schedule: discrete schedule with T timesteps.
        denoise: denoiser.
        x_0: images [B, C, H, W].
        draw: returns new noise of the shape of x_0, called once per term.
        variances: variances of the reverse process.
        exact_cdf: whether to use the exact normal distribution function; see `discretised_log_likelihood`.

    Source: Ho et al. 2020, Eq. 5; Nichol and Dhariwal 2021.
    """
    for entry in range(schedule.num_timesteps, 0, -1):
        t = torch.full((len(x_0),), entry / schedule.num_timesteps, dtype=torch.float64, device=x_0.device)
        x_t = noised(schedule, x_0, t, draw())
        prediction = denoise(x_t, t)
        terms = [
            bound_term(schedule, prediction, x_0, x_t, t, each, exact_cdf=exact_cdf) for each in variances
        ]
        yield torch.stack(terms)


class LogLikelihood(NamedTuple):
    """Likelihood of images under the probability flow ODE."""

    log_p: Tensor
    """Log-density in nats, float64 [B]."""
    latents: Tensor
    """Images transported to t = 1, float64 [B, C, H, W]."""
    calls: int
    """Network calls, each followed by one backward pass per probe or pixel."""


def flow_likelihood(
    schedule: Schedule, denoise: Denoise, x: Tensor, probes: Tensor | None, tolerances: Tolerances
) -> LogLikelihood:
    """Return the log-density of images under the probability flow ODE, starting at t_min.

    `log p(x) = log p_1(x_1) + int div dz/dphi dphi - d log scale(t_min)`, in the variables of `probability_flow`, with
    a Gaussian p_1. The images of a batch share solver steps.

    Args:
        schedule: noise schedule.
        denoise: denoiser.
        x: images [B, C, H, W].
        probes: probe vectors e [K, B, C, H, W] with mean 0 and covariance I, for the unbiased estimate e^T J e of the
            divergence (Hutchinson); None: exact trace, one backward pass per pixel.
        tolerances: tolerances of the solver.

    Source: Song et al. 2021b, Eq. 39-40.
    """
    calls = 0
    ends = torch.tensor([schedule.t_min, 1.0], dtype=torch.float64)
    first, last = scale(schedule, ends)
    dims = x[0].numel()
    if probes is None:
        pixels = torch.eye(dims, dtype=torch.float64, device=x.device)
        vectors = pixels.view(dims, 1, *x.shape[1:]).expand(-1, len(x), *x.shape[1:])
        share = 1.0
    else:
        vectors, share = probes.double(), 1 / len(probes)
    flow = velocity(schedule, denoise, x.dtype)

    def field(phi: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        with torch.enable_grad():
            z = state[0].detach().requires_grad_()
            dz = flow(phi, z)
            divergence = torch.zeros_like(state[1])
            for i, e in enumerate(vectors):
                (gradient,) = torch.autograd.grad(dz, z, e, retain_graph=i + 1 < len(vectors))
                divergence = divergence + share * (gradient * e).flatten(1).sum(1)
        return dz.detach(), divergence

    start = (x.double() / first, torch.zeros(len(x), dtype=torch.float64, device=x.device))
    z, gained = solve(field, start, angle(schedule, ends), tolerances)
    std = schedule.prior_std(ends[1]) / last
    log_prior = -(z / std).square().flatten(1).sum(1) / 2 - dims * torch.log(std * math.sqrt(2 * math.pi))
    return LogLikelihood(log_prior + gained - dims * first.log(), z * last, calls)
