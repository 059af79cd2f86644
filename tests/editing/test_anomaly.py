"""Maps of anomalies by the optimal denoiser of Gaussian pixels, whose reconstructions are known."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from diffusion_cli.diffusion.denoiser import Prediction
from diffusion_cli.editing import Anomaly, GaussianFilter
from diffusion_cli.metrics.detection import detection
from diffusion_cli.samplers import DDIM, DDPM, start_grid_at
from helpers.editing import F64, noise, plain, process

SHAPE = (2, 40, 50)
MEAN, STD = 0.1, 0.15
STRENGTH = 0.4


def pixels_of(schedule, mean=MEAN):
    """The denoiser of independent pixels N(mean, STD^2)."""

    def denoise(x, t):
        alpha, sigma = schedule(t)
        x0 = mean + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * mean)
        return Prediction(x0, (x - alpha * x0) / sigma, sigma)

    return denoise


def at(schedule):
    """alpha and sigma of the noised image, and its standard deviation."""
    alpha, sigma = map(float, schedule(torch.tensor(STRENGTH, dtype=F64)))
    return alpha, sigma, math.sqrt(alpha**2 * STD**2 + sigma**2)


@pytest.mark.parametrize("tag", ["linear", "vp", "rectified", "edm"])
def test_a_deterministic_sampler_shrinks_the_noised_image_towards_the_mean(schedules, tag):
    """By the product of its steps, whose limit is STD over the standard deviation of the noised image."""
    schedule, z = schedules[tag], noise(1, *SHAPE)
    sampler = DDIM(schedule)
    images = MEAN + STD * noise(1, *SHAPE, seed=1)
    given = plain(sampler, pixels_of(schedule), 200, lambda: z)
    factor = 1.0
    for t, s in pairwise(start_grid_at(sampler.grid(200), STRENGTH)):
        (alpha, sigma), (alpha_s, sigma_s) = schedule(t), schedule(s)
        shrunk = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        factor *= float(alpha_s * shrunk + sigma_s * (1 - alpha * shrunk) / sigma)
    alpha, sigma, std = at(schedule)
    assert factor == pytest.approx(STD / std, rel=0.08)
    edited = Anomaly(SHAPE, strength=STRENGTH)(images, given)
    expected = MEAN + factor * (alpha * (images - MEAN) + sigma * z)
    torch.testing.assert_close(edited.images[:, 0], expected, rtol=0, atol=1e-9)
    assert edited.maps is not None
    torch.testing.assert_close(edited.maps, (images - expected).abs().mean(1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("stochastic", [False, True])
def test_the_map_of_an_anomaly_has_the_mean_of_a_folded_normal(schedules, stochastic):
    """For an anomaly of b, `x - x'` is normal: its mean is the part of b that the model removes."""
    schedule = schedules["linear"]
    alpha, sigma, std = at(schedule)
    kept = alpha * STD / std
    variance = (STD * sigma / std) ** 2
    if (
        stochastic
    ):  # samples of the posterior: its mean moves with the noise, and it has a variance of its own
        variance += (kept * STD * sigma / std) ** 2
        kept = kept**2
    sampler = DDPM(schedule) if stochastic else DDIM(schedule)
    for b in (0.0, 3 * STD):
        images = torch.full((2, *SHAPE), MEAN + b, dtype=F64)
        given = process(schedule, sampler, pixels_of(schedule), SHAPE, steps=1000)
        edited = Anomaly(SHAPE, strength=STRENGTH)(images, given)
        away = (1 - kept) * b
        spread = (images - edited.images[:, 0]).std()
        assert float((images - edited.images[:, 0]).mean()) == pytest.approx(away, abs=0.004)
        assert float(spread) == pytest.approx(math.sqrt(variance), rel=0.04)
        folded = math.sqrt(2 * variance / math.pi) * math.exp(-(away**2) / (2 * variance))
        folded += away * math.erf(away / math.sqrt(2 * variance))
        assert edited.maps is not None
        assert float(edited.maps.mean()) == pytest.approx(folded, rel=0.04)


def test_planted_anomalies_score_above_normal_pixels(schedules):
    """Means over two channels, of images with an anomaly of 5 standard deviations."""
    schedule = schedules["linear"]
    truth = torch.zeros(2, *SHAPE[1:], dtype=torch.bool)
    truth[0, 3:6, 10:14] = truth[1, 20:22, 40:45] = True
    images = MEAN + STD * noise(2, *SHAPE) + 5 * STD * truth[:, None]
    given = process(schedule, DDIM(schedule), pixels_of(schedule), SHAPE, steps=50)
    plain_map = Anomaly(SHAPE, strength=0.6)(images, given).maps
    assert plain_map is not None
    assert detection(plain_map, truth).auroc > 0.95
    assert detection(plain_map, truth).best_dice > 0.5
    again = process(schedule, DDIM(schedule), pixels_of(schedule), SHAPE, steps=50)
    blurred = Anomaly(SHAPE, strength=0.6, blur=0.8)(images, again).maps
    expected = GaussianFilter((1, *SHAPE[1:]), sigma=0.8)(plain_map[:, None])[:, 0]
    assert blurred is not None
    torch.testing.assert_close(blurred, expected)
    assert (blurred - plain_map).abs().max() > 0.1


def test_an_inversion_maps_what_the_condition_changes(schedules):
    """Encoded about one mean and decoded about another, an image moves by a part of their difference."""
    schedule, there = schedules["linear"], MEAN - 0.3
    sampler = DDIM(schedule)
    images = MEAN + STD * noise(2, *SHAPE)
    given = plain(sampler, pixels_of(schedule), 400, lambda: noise(2, *SHAPE, seed=7))
    edit = Anomaly(SHAPE, strength=STRENGTH, invert=True)
    same, other = edit(images, given), replace(given, guided=lambda y: pixels_of(schedule, there))
    assert same.maps is not None
    assert same.maps.max() < 0.02
    alpha, _, std = at(schedule)
    moved = edit(images, other).maps
    assert moved is not None
    torch.testing.assert_close(
        moved, torch.full_like(moved, (1 - alpha * STD / std) * 0.3), rtol=0, atol=0.02
    )
