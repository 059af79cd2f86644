"""Tiles of larger images: weights that sum to 1, and predictions averaged over them."""

from itertools import pairwise

import pytest
import torch
import yaml

from diffusion_cli.config import CONF, build
from diffusion_cli.diffusion.denoiser import Prediction
from diffusion_cli.editing.tiles import Tiles, tiled
from diffusion_cli.samplers import DDIM, integrate
from helpers.editing import F64, noise, shrinking

SAMPLERS = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(CONF.glob("sampler/*.yaml"))}
CASES = [
    ((8, 8), (8, 8), 4),
    ((13, 8), (8, 8), 2),
    ((21, 30), (8, 8), 3),
    ((21, 9), (8, 6), 0),
    ((20, 20), (8, 8), 7),
    ((9, 13, 10), (6, 8, 6), 2),
    ((5,), (2,), 1),
]


@pytest.mark.parametrize(("image", "tile", "overlap"), CASES)
def test_tiles_cover_the_image_with_at_least_the_overlap(image, tile, overlap):
    tiles = Tiles(image, tile, [overlap] * len(tile))
    for starts, whole, part in zip(tiles.starts, image, tile, strict=True):
        assert starts[0] == 0
        assert starts[-1] == whole - part
        steps = [after - before for before, after in pairwise(starts)]
        assert all(0 < step <= part - overlap for step in steps)
        if len(starts) > 1:  # one tile fewer would leave less overlap
            assert (len(starts) - 2) * (part - overlap) < whole - part


@pytest.mark.parametrize(("image", "tile", "overlap"), CASES)
def test_weights_sum_to_one_so_that_cut_tiles_give_the_image_back(image, tile, overlap):
    tiles = Tiles(image, tile, [overlap] * len(tile))
    assert tiles.weights.min() > 0
    images = noise(2, 3, *image)
    cut = tiles.cut(images)
    assert cut.shape == (2 * len(tiles), 3, *tile)
    assert torch.equal(cut[len(tiles)], images[(1, slice(None), *tiles.places[0])])
    assert torch.allclose(tiles.join(cut), images, atol=1e-12)
    constant = torch.full((1, 1, *image), 0.7, dtype=F64)
    assert torch.allclose(tiles.join(tiles.cut(constant)), constant, atol=1e-12)


@pytest.mark.parametrize("overlap", [4, 8, 12])
def test_tiles_that_disagree_blend_in_even_steps(overlap):
    tiles = Tiles((32 - overlap,), (16,), [overlap])
    assert len(tiles) == 2
    line = tiles.join(torch.tensor([0.0, 1.0], dtype=F64)[:, None, None].expand(2, 1, 16))[0, 0]
    assert line[: 16 - overlap].abs().max() == 0
    assert (line[16:] - 1).abs().max() < 1e-12
    steps = line[16 - overlap : 16].diff()
    assert torch.allclose(steps, steps.new_full((), 1 / overlap), atol=1e-12)


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
