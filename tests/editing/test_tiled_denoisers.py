"""Predictions averaged over tiles of larger images."""

import pytest
import torch
import yaml

from diffusion_cli.config import CONF, build
from diffusion_cli.diffusion.denoiser import Prediction
from diffusion_cli.editing.tiles import tiled
from diffusion_cli.networks.tiles import Tiles
from diffusion_cli.samplers import DDIM, integrate
from helpers.editing import F64, noise, shrinking

SAMPLERS = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(CONF.glob("sampler/*.yaml"))}


@pytest.mark.parametrize("name", SAMPLERS)
def test_tiles_of_independent_pixels_sample_what_the_whole_image_samples(schedules, name):
    schedule = schedules["linear"]
    sampler = build(SAMPLERS[name], schedule)
    tiles = Tiles((11, 9), (6, 6), [2, 2])
    denoise, times = shrinking(schedule), sampler.grid(6)
    x = noise(2, 1, 11, 9)

    def sampled(denoiser):
        draws = iter(range(1000))
        return list(integrate(sampler, denoiser, x, times, lambda: noise(2, 1, 11, 9, seed=next(draws))))[-1]

    assert len(tiles) == 6
    parts = tiled(tiles, [denoise] * 3, 4)  # 12 tiles in 3 network calls
    assert torch.allclose(sampled(parts), sampled(denoise), atol=1e-9)


def test_a_prediction_of_tiles_is_consistent_and_has_the_variance_head(schedules):
    schedule, tiles = schedules["vp"], Tiles((9, 6), (6, 6), [2, 2])
    t = torch.tensor(0.5, dtype=F64)

    def disagreeing(x, t):  # each tile has another mean, as a network with a view of its tile alone
        alpha, sigma = schedule(t)
        x0 = torch.tanh(x.mean((1, 2, 3), keepdim=True) + x)
        return Prediction(x0, (x - alpha * x0) / sigma, sigma, x0**2)

    x = noise(3, 1, 9, 6)
    found = tiled(tiles, [disagreeing], 6)(x, t)
    alpha, sigma = schedule(t)
    assert torch.allclose(alpha * found.x0 + sigma * found.eps, x, atol=1e-12)
    assert found.variance is not None
    assert found.variance.shape == x.shape
    assert not torch.allclose(found.x0, disagreeing(x, t).x0, atol=1e-3)


def test_one_tile_is_the_whole_image_to_the_bit(schedules):
    schedule, tiles = schedules["linear"], Tiles((6, 6), (6, 6), [2, 2])
    denoise, sampler = shrinking(schedule), DDIM(schedule)
    x = noise(2, 1, 6, 6).float()
    whole, parts = (
        list(integrate(sampler, each, x, sampler.grid(4), lambda: x))[-1]
        for each in (denoise, tiled(tiles, [denoise], 64))
    )
    assert torch.equal(whole, parts)
