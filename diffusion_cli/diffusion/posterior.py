"""Posterior of a diffusion step, learned variances, and terms of the variational bound."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffusion_cli.diffusion.denoiser import Prediction, per_image
from diffusion_cli.diffusion.schedules import Discrete, Schedule
from diffusion_cli.errors import UsageError

Variance = Literal["small", "large", "learned"]
BIN = 1 / 255  # half the distance of neighbouring 8-bit values in [-1, 1]


class Posterior(NamedTuple):
    """`q(x_s | x_t, x_0) = N(c_t x_t + c_0 x_0, small)` for s < t, float64, of the shape of the times."""

    c_t: Tensor
    c_0: Tensor
    small: Tensor
    """Posterior variance `v sigma_s^2 / sigma_t^2`, the smallest of a reverse step; exact for data of one point."""
    large: Tensor
    """Forward variance v, the largest of a reverse step; exact for standard normal data."""


def posterior(schedule: Schedule, t: Tensor, s: Tensor) -> Posterior:
    """Return the posterior: `c_t = a sigma_s^2 / sigma_t^2`, `c_0 = alpha_s v / sigma_t^2`, with a, v of `transition`.

    Source: Ho et al. 2020, Eq. 6-7, for neighbouring timesteps.
    """
    a, v = schedule.transition(t, s)
    (_, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    shrink = (sigma_s / sigma_t) ** 2
    return Posterior(a * shrink, alpha_s * v / sigma_t**2, v * shrink, v)


def learned_log_variance(values: Tensor, log_small: Tensor, log_large: Tensor) -> Tensor:
    """Interpolate log variances by the variance head's output in [-1, 1] (Nichol and Dhariwal 2021, Eq. 15)."""
    share = (values + 1) / 2
    return share * log_large + (1 - share) * log_small


def bound_term(
    schedule: Discrete,
    prediction: Prediction,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    variance: Variance,
    *,
    exact_cdf: bool = False,
) -> Tensor:
    """Return the term of the variational bound at timesteps t [B], in bits per dimension, [B].

    It is `KL(q(x_s | x_t, x_0) || p(x_s | x_t))` with s the previous timestep; at the first timestep it is
    `-log p(x_0 | x_t)` over the 256 values of a pixel, with the variance of the second timestep instead of 0.

    Args:
        schedule: discrete schedule.
        prediction: prediction at x_t.
        x_0: images [B, C, H, W].
        x_t: noisy images [B, C, H, W].
        t: times i / T, float64 [B].
        variance: variance of the reverse process.
        exact_cdf: see `discretised_log_likelihood`.

    Source: Ho et al. 2020, Sec. 3.3 and code; Nichol and Dhariwal 2021, Sec. 2.2.
    """
    entry = (t * schedule.num_timesteps).round()
    first = entry == 1
    step = posterior(schedule, t, (entry - 1) / schedule.num_timesteps)
    second = torch.full_like(t, min(2, schedule.num_timesteps) / schedule.num_timesteps)
    least = posterior(schedule, second, torch.full_like(t, 1 / schedule.num_timesteps)).small
    log_small = per_image(torch.where(first, least, step.small).log(), x_t)
    if variance == "learned":
        if prediction.variance is None:
            raise UsageError("variance", "learned", "the network has no variance head", "use small or large")
        log_variance = learned_log_variance(prediction.variance, log_small, per_image(step.large.log(), x_t))
    elif variance == "large":
        log_variance = per_image(torch.where(first, least, step.large).log(), x_t)
    else:
        log_variance = log_small
    c_t, c_0 = per_image(step.c_t, x_t), per_image(step.c_0, x_t)
    mean = c_t * x_t + c_0 * prediction.x0
    kl = normal_kl(c_t * x_t + c_0 * x_0, log_small, mean, log_variance)
    decoder = -discretised_log_likelihood(x_0, mean, log_variance / 2, exact_cdf)
    return torch.where(per_image(first.to(x_t), x_t) > 0, decoder, kl).flatten(1).mean(1) / math.log(2)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Return `KL(N(mean1, e^log_variance1) || N(mean2, e^log_variance2))` in nats, elementwise."""
    difference = log_variance1 - log_variance2
    return (torch.expm1(difference) - difference + (mean1 - mean2) ** 2 * torch.exp(-log_variance2)) / 2


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor, exact_cdf: bool = False) -> Tensor:
    """Return the log-probability, in nats, of the bin of pixel values x in [-1, 1] under a Gaussian, elementwise.

    The 256 bins are centred on -1, -1 + 2/255, ..., 1; the outer two are unbounded. Probabilities are at least 1e-12.

    Args:
        x: pixel values.
        mean: mean of the Gaussian.
        log_std: log of its standard deviation.
        exact_cdf: whether to use the exact normal distribution function instead of the published approximation
            `(1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2`.

    Source: Ho et al. 2020, Eq. 13.
    """

    scale = torch.exp(-log_std)
    above, below = scale * (x - mean + BIN), scale * (x - mean - BIN)
    if exact_cdf:
        # Differences are taken in the lower tail, where they are accurate.
        flip = x > mean
        inner = _cdf(torch.where(flip, -below, above)) - _cdf(torch.where(flip, -above, below))
        first, last = _cdf(above), _cdf(-below)
    else:
        first, last = _tanh_cdf(above), 1 - _tanh_cdf(below)
        inner = first - _tanh_cdf(below)
    probability = torch.where(x < -0.999, first, torch.where(x > 0.999, last, inner))
    return probability.clamp(min=1e-12).log()


def _cdf(z: Tensor) -> Tensor:
    return torch.erfc(-z / math.sqrt(2)) / 2  # torch.special.ndtr has no relative accuracy in the lower tail


def _tanh_cdf(z: Tensor) -> Tensor:
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2
