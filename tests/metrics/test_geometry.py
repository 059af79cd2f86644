"""Distances between surfaces, by exact cases and sets of known relation."""

import json

import numpy as np
import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.data.shapes import shape_points
from diffusion_cli.formats import PointCloud, SignedDistance
from diffusion_cli.metrics import chamfer_distances, neighbour_accuracy
from diffusion_cli.metrics.geometry import shape_values
from helpers.meshes import grid

SIZE = 24


def clouds(numbers: range, count: int = 128) -> list[torch.Tensor]:
    return [torch.from_numpy(shape_points(number, count)).float() for number in numbers]


def accuracy(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    within = (chamfer_distances(first, first), chamfer_distances(second, second))
    return neighbour_accuracy(*within, chamfer_distances(first, second))


def test_chamfer_distances_of_translated_copies():
    """A shift below half the least distance of points leaves each its own copy as the nearest."""
    cloud = torch.stack(torch.meshgrid(*[torch.arange(4.0)] * 3, indexing="ij"), -1).reshape(-1, 3)
    shift = torch.tensor([0.3, -0.2, 0.1])
    found = chamfer_distances([cloud, cloud + shift], [cloud + shift, cloud[:10], cloud[:0]])
    assert found[0, 0] == pytest.approx(2 * 0.14, rel=1e-5)
    assert found[1, 0] == pytest.approx(0, abs=1e-6)
    assert found[:, 2].isinf().all()
    naive = [(one[:, None] - cloud[None, :10]).square().sum(-1) for one in (cloud, cloud + shift)]
    expected = torch.stack([near.amin(1).mean() + near.amin(0).mean() for near in naive])
    torch.testing.assert_close(found[:, 1], expected.double(), rtol=1e-4, atol=1e-6)


def test_two_halves_of_a_set_are_not_told_apart_and_two_kinds_are():
    assert accuracy(clouds(range(0, 120, 2)), clouds(range(1, 120, 2))) == pytest.approx(0.5, abs=0.13)
    spheres, tori = clouds(range(3, 150, 5)), clouds(range(4, 150, 5))
    assert accuracy(spheres, tori) > 0.97
    empty = [torch.empty(0, 3)] * 5
    assert accuracy(spheres, empty) == 1.0
    assert accuracy(spheres, spheres) <= 0.5


def test_points_are_uniform_on_the_surface_and_the_volume_is_right():
    form = SignedDistance(truncation=3.0, half_side=7.0)
    distances = np.linalg.norm(grid(SIZE), axis=-1) - 8
    sample = form.quantize(torch.from_numpy(distances / 3))[None]
    found = form.surface_points(sample, 4000, 1)
    radius = 8 / (SIZE / 2 - 2)
    assert (found.points.norm(dim=1) - radius).abs().max() < 0.02
    assert found.watertight
    assert found.volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.02)
    assert found.points.mean(0).abs().max() < 5 * radius / 3**0.5 / 4000**0.5
    assert float(found.points[:, 2].abs().mean()) == pytest.approx(radius / 2, abs=0.03)  # Archimedes
    assert torch.equal(form.surface_points(sample, 4000, 1).points, found.points)
    assert not torch.equal(form.surface_points(sample, 4000, 2).points, found.points)
    nothing = form.surface_points(torch.ones_like(sample), 10, 0)
    assert (len(nothing.points), nothing.volume, nothing.watertight) == (0, 0.0, False)
    cloud = PointCloud(radius=1.0).surface_points(torch.rand(3, 50), 20, 0)
    assert cloud.points.shape == (20, 3)
    assert cloud.watertight is None


def test_values_of_single_points():
    """The Chamfer distance of single points is twice their squared distance."""
    samples, shapes = (
        [torch.tensor([[x, 0.0, 0.0]]) for x in each] for each in ([0, 0.04, 10], [0.1, 1.2, 1.3])
    )
    values = shape_values(samples, shapes)
    assert values["chamfer"] == pytest.approx(2 * (0.1**2 + 0.06**2 + 8.7**2) / 3)
    assert values["minimum_matching_distance"] == pytest.approx(
        2 * (0.06**2 + 1.16**2 + 1.26**2) / 3, rel=1e-5
    )
    assert values["shape_coverage"] == pytest.approx(2 / 3)
    # Nearest neighbours: 0.04 of 0, 0 of 0.04, 1.3 of 10; 0.04 of 0.1, 1.3 of 1.2, 1.2 of 1.3.
    assert values["nearest_neighbour_accuracy"] == pytest.approx(4 / 6)
    nothing = shape_values([torch.empty(0, 3)] * 3, shapes)
    assert nothing["chamfer"] is nothing["minimum_matching_distance"] is None
    assert nothing["shape_coverage"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["points", "meshes"])
def test_geometry_of_a_run_and_of_its_files(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = {
        "points": ["dataset.num_points=32", "model.hidden_size=16", "model.depth=1"],
        "meshes": [
            "dataset.resolution=8",
            "model.channels=8",
            "model.channel_mult=[1]",
            "model.head_channels=8",
        ],
    }[kind]
    steps = ["max_steps=2", "batch_size=2", "preview_every=null", "trainer=cpu", "logger=csv", "name=a"]
    assert run(["train", f"dataset={kind}", "dataset.size=40", *model, *steps]) == 0
    common = ["metric=geometry", "metric.geometry.points=32", "metric.geometry.shapes=4"]
    assert run(["eval", "run=a", *common, "num_samples=6", "steps=2", "keep=true"]) == 0
    stored = json.loads((tmp_path / "outputs" / "a" / "metrics.json").read_text())
    names = {"chamfer", "minimum_matching_distance", "shape_coverage", "nearest_neighbour_accuracy"}
    names |= {"watertight", "volume"} if kind == "meshes" else set()
    text = json.dumps(stored)
    assert '"shapes": 4' in text  # of 6 samples and more real shapes
    assert all(f'"{name}"' in text for name in names)
    assert ('"watertight"' in text) == (kind == "meshes")
    assert run(["eval", "run=a", "metric=geometry", "num_samples=1", "steps=2"]) == 2
    assert "needs 2 samples and 2 real shapes" in capsys.readouterr().err


def test_images_have_no_surfaces(tmp_path, capsys):
    from PIL import Image

    for number in range(3):
        Image.new("L", (8, 8), number).save(tmp_path / f"{number}.png")
    assert (
        run(["eval", f"samples={tmp_path}", "dataset=digits", "metric=geometry", f"output_dir={tmp_path}"])
        == 2
    )
    assert (
        "metric=geometry: applies to point clouds and meshes; use dataset=points" in capsys.readouterr().err
    )
