"""Signed distances of meshes, and the surfaces of signed distances."""

import numpy as np
import pytest
import trimesh
from scipy.spatial import KDTree

from diffusion_cli.data.solids import (
    SOLIDS,
    box_distance,
    capsule_distance,
    cone_distance,
    cylinder_distance,
    solid_distances,
    torus_distance,
)
from diffusion_cli.errors import FormatError
from diffusion_cli.formats import mesh_distance
from diffusion_cli.formats.mesh import Triangles
from diffusion_cli.formats.mesh_distance import closed, signed_distances
from diffusion_cli.formats.surface import marching_cubes
from helpers.meshes import as_trimesh, grid, in_voxels, joined, rotated, rotation

SIZE = 24
HALF = np.array([8.0, 5.0, 3.3])


def distances(mesh: Triangles, truncation: float = 3.0) -> np.ndarray:
    return signed_distances(closed(mesh), SIZE, truncation)


# --- From meshes to distances -----------------


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_distances_of_a_box_are_the_closed_form(seed):
    box = trimesh.creation.box(2 * HALF)
    points = grid(SIZE)
    if seed is not None:
        box, points = rotated(box, seed), points @ rotation(seed)
    found = distances(in_voxels(box, SIZE))
    np.testing.assert_allclose(found, box_distance(points, HALF).clip(-3, 3), atol=1e-5)


def test_distances_of_a_torus_are_the_closed_form():
    torus = trimesh.creation.torus(7, 2.6, major_sections=128, minor_sections=64)
    found = distances(in_voxels(torus, SIZE))
    np.testing.assert_allclose(found, torus_distance(grid(SIZE), 7, 2.6).clip(-3, 3), atol=0.01)  # chords


@pytest.mark.parametrize("name", ["capsule", "cone", "cylinder", "sphere"])
def test_closed_forms_of_solids_are_those_of_their_meshes(name):
    round_ = {"sections": 96}
    mesh, exact = {
        "capsule": (
            trimesh.creation.capsule(height=8, radius=4, count=[96, 96]).apply_translation([0, 0, -4]),
            capsule_distance(grid(SIZE), 4, 4),
        ),
        "cone": (
            trimesh.creation.cone(6, 14, **round_).apply_translation([0, 0, -7]),
            cone_distance(grid(SIZE), 7, 6),
        ),
        "cylinder": (trimesh.creation.cylinder(5, 12, **round_), cylinder_distance(grid(SIZE), 6, 5)),
        "sphere": (
            trimesh.creation.icosphere(4, radius=8),
            np.linalg.norm(grid(SIZE), axis=-1) - 8,
        ),
    }[name]
    mesh.vertices -= (mesh.vertices.min(0) + mesh.vertices.max(0)) / 2
    np.testing.assert_allclose(distances(in_voxels(mesh, SIZE)), exact.clip(-3, 3), atol=0.02)


@pytest.mark.parametrize("number", range(len(SOLIDS)))
def test_built_in_solids_have_distances(number):
    """A distance has slope 1 where it is smooth, and the solid has the size that it names."""
    values = solid_distances(number, SIZE, SIZE / 2 - 2)
    slope = np.linalg.norm(np.stack([*np.gradient(values)]), axis=0)[1:-1, 1:-1, 1:-1]
    assert np.median(slope) == pytest.approx(1, abs=0.02)
    assert max(np.abs(np.diff(values, axis=axis)).max() for axis in range(3)) < 1 + 1e-9
    np.testing.assert_array_equal(values, solid_distances(number, SIZE, SIZE / 2 - 2))
    inside = np.linalg.norm(grid(SIZE), axis=-1)[values < 0]
    assert 0.6 * 10 - 1.8 < inside.max() <= 10
    other = solid_distances(number + len(SOLIDS), SIZE, SIZE / 2 - 2)
    assert np.abs(other - values).max() > 0.1


def test_a_cavity_is_outside_and_an_overlap_inside():
    box, small = trimesh.creation.box([14.0] * 3), trimesh.creation.box([6.0] * 3)
    small.invert()
    hollow = joined(box, small)
    expected = np.maximum(
        box_distance(grid(SIZE), np.full(3, 7.0)), -box_distance(grid(SIZE), np.full(3, 3.0))
    )
    np.testing.assert_allclose(distances(in_voxels(hollow, SIZE)), expected.clip(-3, 3), atol=1e-5)
    left, right = (trimesh.creation.box([8.0, 6, 6]).apply_translation([side, 0, 0]) for side in (-2.2, 2.2))
    both = distances(in_voxels(joined(left, right), SIZE))
    whole = box_distance(grid(SIZE), np.array([6.2, 3, 3]))
    np.testing.assert_array_equal(both < 0, whole < 0)


def test_orientation_does_not_matter():
    box = trimesh.creation.box(2 * HALF)
    right = distances(in_voxels(box, SIZE))
    mixed = np.asarray(box.faces).copy()
    mixed[::3] = mixed[::3, ::-1]
    for faces in (np.asarray(box.faces)[:, ::-1], mixed):
        turned = trimesh.Trimesh(box.vertices, faces, process=False)
        np.testing.assert_array_equal(distances(in_voxels(turned, SIZE)), right)


def test_vertices_of_a_soup_are_merged_and_needless_triangles_left_out():
    box = trimesh.creation.box(2 * HALF)
    right = distances(in_voxels(box, SIZE))
    corners = np.asarray(box.vertices)[np.asarray(box.faces)].reshape(-1, 3)
    faces = np.arange(len(corners)).reshape(-1, 3)
    faces = np.concatenate([faces, faces[:2], [[0, 0, 1]]])
    soup = Triangles(corners + (SIZE - 1) / 2, faces)
    np.testing.assert_array_equal(distances(soup), right)


def test_open_and_tiny_meshes_are_refused(monkeypatch):
    box = in_voxels(trimesh.creation.box(2 * HALF), SIZE)
    with pytest.raises(
        FormatError, match=r"is not watertight \(3 of 18 edges do not belong to two triangles\)"
    ):
        closed(Triangles(box.vertices, box.faces[1:]))
    with pytest.raises(FormatError, match="has no triangles with an area"):
        closed(Triangles(box.vertices, np.zeros((4, 3), int)))
    monkeypatch.setattr(mesh_distance, "MOST_PIECES", 100)
    with pytest.raises(FormatError, match="too many or too large triangles; simplify it"):
        distances(box)


# --- From distances to meshes -----------------


@pytest.mark.parametrize("radius", [4.0, 6.3, 9.0])
def test_the_surface_of_a_sphere_has_its_volume_and_area(radius):
    values = np.linalg.norm(grid(SIZE), axis=-1) - radius
    triangles, normals = marching_cubes(values)
    mesh = as_trimesh(triangles)
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    # Chords of a cell lie h^2 / 8 r below the sphere, for diagonals h^2 <= 3.
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=1.2 / radius**2)
    assert mesh.area == pytest.approx(4 * np.pi * radius**2, rel=1.2 / radius**2)
    outwards = triangles.vertices - (SIZE - 1) / 2
    assert np.abs(np.linalg.norm(outwards, axis=1) - radius).max() < 1 / (4 * radius)
    assert ((outwards / radius) * normals).sum(1).min() > 0.98


def test_a_surface_at_voxels_or_cut_by_the_border_is_closed():
    flat = np.abs(grid(SIZE)).max(-1) - 5.5  # 0 at voxels
    cut = np.linalg.norm(grid(SIZE) - [0, 0, SIZE / 2], axis=-1) - 6
    noise = np.random.RandomState(0).standard_normal((SIZE,) * 3)
    for values in (flat, cut, np.full((SIZE,) * 3, -1.0), noise, (9 * noise).clip(-1, 1)):
        mesh = as_trimesh(marching_cubes(values).triangles)
        assert mesh.is_watertight
        assert mesh.volume > 0
        assert mesh.area_faces.min() > 0
    assert len(marching_cubes(np.ones((SIZE,) * 3)).triangles.faces) == 0


@pytest.mark.parametrize("name", ["torus", "cylinder", "box"])
def test_a_round_trip_moves_the_surface_by_less_than_half_a_voxel(name):
    solid = {
        "torus": trimesh.creation.torus(6.5, 2.5),
        "cylinder": trimesh.creation.cylinder(5, 12),
        "box": trimesh.creation.box(2 * HALF),
    }[name]
    first = in_voxels(rotated(solid), SIZE)
    second = marching_cubes(distances(first)).triangles
    clouds = [trimesh.sample.sample_surface(as_trimesh(mesh), 10000, seed=0)[0] for mesh in (first, second)]
    for one, other in (clouds, clouds[::-1]):
        moved = KDTree(one).query(other)[0]
        assert np.quantile(moved, 0.99) < 0.5
        assert moved.mean() < 0.2
    assert KDTree(clouds[0]).query(clouds[1])[0].max() < 0.5
