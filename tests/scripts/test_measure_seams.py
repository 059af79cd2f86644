"""Seams of samples from windows of a random field."""

import torch

import measure_seams
from diffusion_cli.diffusion.schedules import Cosine
from diffusion_cli.networks.tiles import windows
from measure_seams import ROUGH, Field, sampled, seam_ratio


def test_the_denoiser_of_a_window_is_the_conditional_mean():
    field, sizes = Field((3, 4), 1.5), (3, 4)
    places = torch.cartesian_prod(*map(torch.arange, sizes)).float()
    distance = torch.cdist(places, places)
    covariance = (1 - ROUGH**2) * torch.exp(-0.5 * (distance / 1.5) ** 2) + ROUGH**2 * torch.eye(12)
    x_t = torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    gain = 0.8 * covariance @ torch.linalg.inv(0.64 * covariance + 0.36 * torch.eye(12))
    expected = (gain @ x_t.flatten()).view_as(x_t)
    torch.testing.assert_close(field.denoised(x_t, 0.8, 0.6), expected, rtol=0, atol=1e-5)


def samples(length, overlap, window=(8, 8)):
    tiles = windows((24, 24), window, overlap)
    generator = torch.Generator().manual_seed(0)
    return sampled(Cosine(), tiles, Field(tiles.tile, length), 20, generator), tiles


def test_windows_of_independent_pixels_make_no_difference():
    whole, tiles = samples(1e-3, 0, (24, 24))
    assert seam_ratio(whole, tiles) is None
    assert torch.allclose(samples(1e-3, 2)[0], whole, atol=1e-4)


def test_seams_vanish_where_windows_overlap():
    without, with_overlap = (seam_ratio(*samples(2.0, overlap)) for overlap in (0, 4))
    assert without is not None
    assert with_overlap is not None
    assert without > 4
    assert with_overlap < 1.5


def test_the_table_has_a_row_for_the_whole_and_for_each_overlap(capsys, monkeypatch):
    words = "measure_seams.py --size 16 --window 8 --steps 3 --overlaps 0 4"
    monkeypatch.setattr("sys.argv", words.split())
    measure_seams.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["| whole", "| 0", "| 4"]
    assert rows[0][2] == ""
    assert float(rows[1][2]) > float(rows[2][2])
