"""Tiles of larger images: they cover the image with weights that sum to 1."""

from itertools import pairwise

import pytest
import torch

from diffusion_cli.networks.tiles import Tiles
from helpers.editing import F64, noise

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
    assert all(ramp.min() > 0 for ramp in tiles.ramps)
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
