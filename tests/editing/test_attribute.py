"""edit=attribute on Gaussians with a mean that depends on an attribute: the exact change is a shift."""

import pytest
import torch

from diffusion_cli.conditions import Condition
from diffusion_cli.diffusion.denoiser import Prediction
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.editing import Attribute, EditProcess
from diffusion_cli.samplers import DDIM, Heun
from helpers.editing import F64, noise

SHAPE = (1, 2, 2)
SLOPE = torch.tensor([[0.3, -0.2], [0.1, 0.5]], dtype=F64)
OFFSET = torch.tensor([[0.1, 0.0], [-0.2, 0.05]], dtype=F64)
STD = 0.4
PRIOR_MEAN, PRIOR_STD = 0.5, 1.5
"""Mean and standard deviation of the attribute."""


def denoiser(schedule, y):
    """The denoiser of pixels N(OFFSET + SLOPE a, STD^2) for an attribute a; of their marginal where a is missing."""
    slope = SLOPE.flatten()
    marginal = STD**2 * torch.eye(4, dtype=F64) + PRIOR_STD**2 * torch.outer(slope, slope)

    def denoise(x, t):
        alpha, sigma = schedule(t)
        a = torch.full((len(x),), torch.nan, dtype=F64) if y is None else y.get("a")
        flat, told = x.flatten(1), ~a.isnan()
        mean = OFFSET.flatten() + slope * torch.where(told, a, PRIOR_MEAN)[:, None]
        covariance = torch.where(told[:, None, None], STD**2 * torch.eye(4, dtype=F64), marginal)
        gain = (
            alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(4, dtype=F64))
        )
        x0 = (mean + (gain @ (flat - alpha * mean)[..., None])[..., 0]).view_as(x)
        return Prediction(x0, (x - alpha * x0) / sigma, sigma)

    return denoise


def extrapolated(schedule, images, given, wanted):
    """The result in the limit of many steps, as the inversion has an error of first order."""
    sampler = Heun(schedule, spacing="log_snr")
    coarse, fine = (changed(schedule, sampler, images, given, wanted, steps=steps) for steps in (80, 160))
    return 2 * fine - coarse


def changed(schedule, sampler, images, given, wanted, strength=1.0, steps=50):
    process = EditProcess(
        sampler, sampler.grid(steps), wanted, lambda y: denoiser(schedule, y),
        lambda y: denoiser(schedule, y), None, lambda: noise(*images.shape), Pixels(()),
    )  # fmt: skip
    return Attribute(SHAPE, strength=strength).of_inputs(given)(images, process).images[:, 0]


def told(*values):
    return Condition({"a": torch.tensor(values, dtype=F64)})


@pytest.mark.parametrize("tag", ["cosine", "vp", "ve", "edm", "rectified"])
def test_the_change_is_that_of_the_mean(schedules, tag):
    """Of each image by its own attribute; the same attribute gives the image back.

    At the first time T the states still depend on the mean, by alpha_T over the ratio of the standard deviations.
    """
    schedule = schedules[tag]
    before, after = told(0.0, -1.0, 2.0), told(1.0, 1.5, 2.0)
    images = OFFSET + SLOPE * before.values["a"].view(3, 1, 1, 1) + STD * noise(3, *SHAPE)
    result = extrapolated(schedule, images, before, after)
    alpha, sigma = schedule(schedule.grid(80, "log_snr")[0])
    ratio = (alpha**2 * STD**2 + sigma**2).sqrt() / STD
    shift = SLOPE * (after.values["a"] - before.values["a"]).view(3, 1, 1, 1)
    expected = images + (1 - alpha / ratio) * shift
    assert torch.allclose(result, expected, atol=0.01)


def test_a_change_from_a_missing_attribute_is_the_optimal_transport_between_the_gaussians(schedules):
    """Along the slope the deviation shrinks by the ratio of the standard deviations; across, nothing changes."""
    schedule = schedules["edm"]
    missing, after = told(*[torch.nan] * 3), told(1.0, -0.5, 0.5)
    images = noise(3, *SHAPE)
    result = extrapolated(schedule, images, missing, after)
    slope = SLOPE.flatten()
    along = slope / slope.norm()
    spread = (STD**2 + PRIOR_STD**2 * slope.square().sum()).sqrt()
    deviation = (images - OFFSET - SLOPE * PRIOR_MEAN).flatten(1)
    shrunk = deviation + (STD / spread - 1) * (deviation @ along)[:, None] * along
    expected = (OFFSET + SLOPE * after.values["a"].view(3, 1, 1, 1)).flatten(1) + shrunk
    assert torch.allclose(result.flatten(1), expected, atol=0.01)
    unconditional = extrapolated(schedule, images, None, after)
    assert torch.equal(unconditional, result)


def test_a_lower_strength_changes_less(schedules):
    schedule = schedules["rectified"]
    before, after = told(0.0), told(1.0)
    images = OFFSET + STD * noise(1, *SHAPE)
    shifts = [
        float((changed(schedule, DDIM(schedule), images, before, after, strength) - images).norm())
        for strength in (0.2, 0.5, 0.8, 1.0)
    ]
    assert shifts == sorted(shifts)
    assert shifts[0] < 0.5 * shifts[-1]
    assert shifts[-1] == pytest.approx(float(SLOPE.norm()), rel=0.05)
