"""Samples of signed distance volumes: their files, meshes and previews."""

import math
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
import trimesh

from diffusion_cli.data import given_images
from diffusion_cli.errors import FormatError, UsageError
from diffusion_cli.formats import SignedDistance, form_of, surface
from diffusion_cli.formats.mesh import read_triangles
from diffusion_cli.formats.signed_distance import MARGIN, TURNS
from diffusion_cli.formats.surface import FITS, SIDE
from diffusion_cli.images import read_stored, save_stored
from helpers.meshes import as_trimesh, exported, grid

SIZE = 16
SHAPE = (1, SIZE, SIZE, SIZE)
FORM = SignedDistance(truncation=3.0, half_side=None)


def ball(radius: float, centre: tuple[float, ...] = (0, 0, 0), form: SignedDistance = FORM) -> torch.Tensor:
    distances = np.linalg.norm(grid(SIZE) - centre, axis=-1) - radius
    return form.quantize(torch.from_numpy(distances / form.truncation))[None]


def test_a_form_is_known_by_what_it_says():
    for half_side in (None, 2.5):
        form = SignedDistance(truncation=2.0, half_side=half_side)
        assert form_of(form.to_dict()) == form
    for key, value in (("truncation", 0.0), ("half_side", -1.0), ("half_side", float("inf"))):
        with pytest.raises(ValueError, match=rf"form\.{key}"):
            form_of(FORM.to_dict() | {key: value})


def test_files_keep_what_is_stored(tmp_path):
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    stored = FORM.quantize(x)
    assert (stored - x.clamp(-1, 1)).abs().max() <= 2**-12
    assert torch.equal(FORM.quantize(stored), stored)
    save_stored(stored[0], tmp_path / "000000.npy", FORM)
    data = (tmp_path / "000000.npy").read_bytes()
    assert torch.equal(FORM.read(data, SHAPE), stored[0])
    assert np.load(tmp_path / "000000.npy").dtype == np.float16
    with pytest.raises(FormatError, match="has shape"):
        FORM.read(data, (1, 8, 8, 8))
    np.save(tmp_path / "far.npy", np.full(SHAPE, 2.0))
    with pytest.raises(FormatError, match=r"has values outside \[-1, 1\]"):
        FORM.read((tmp_path / "far.npy").read_bytes(), SHAPE)
    with pytest.raises(FormatError, match="is not a mesh in OBJ, PLY, STL, OFF or GLB"):
        FORM.read(b"nothing", SHAPE)


def test_a_sample_has_its_mesh_beside_it_and_counts_once(tmp_path):
    save_stored(ball(5), tmp_path / "a.npy", FORM)
    save_stored(ball(4), tmp_path / "b.npy", FORM)
    (tmp_path / "c.glb").write_bytes((tmp_path / "b.glb").read_bytes())
    given = given_images(tmp_path, "samples", SHAPE, FORM).images
    assert len(given) == 3
    assert torch.equal(given[torch.arange(2)], torch.stack([ball(5), ball(4)]))
    assert given[torch.tensor([2])].min() < -0.9


@pytest.mark.parametrize("half_side", [None, 40.0])
def test_other_programs_read_the_mesh_in_its_units(half_side):
    form = SignedDistance(truncation=3.0, half_side=half_side)
    centre = (1.0, 0.0, -2.0)
    data = form.beside(ball(4, centre, form))[".glb"]
    scene: Any = trimesh.load_scene(BytesIO(data), file_type="glb", process=False)
    (found,) = scene.geometry.values()
    normals = np.asarray(found.vertex_normals)  # before others are computed
    scale = (half_side or 1.0) / (SIZE / 2 - MARGIN)
    outwards = np.asarray(found.vertices) - np.array(centre) * scale
    assert np.abs(np.linalg.norm(outwards, axis=1) - 4 * scale).max() < 0.1 * scale
    assert found.is_watertight
    assert found.volume > 0
    np.testing.assert_allclose(normals, form.surface(ball(4, centre, form)).normals, atol=1e-6)
    assert (normals * outwards).sum(1).min() > 0.9 * 4 * scale
    assert len(read_triangles(data).faces) == len(found.faces)


def test_a_sample_without_a_surface_has_an_empty_scene():
    data = FORM.beside(torch.ones(SHAPE))[".glb"]
    assert data[:4] == b"glTF"
    assert len(data) == int.from_bytes(data[8:12], "little")
    with pytest.raises(FormatError):
        read_triangles(data)
    assert (FORM.to_rgb(torch.ones(1, *SHAPE)) == 255).all()


@pytest.mark.parametrize("kind", ["obj", "ply", "stl", "off", "glb"])
def test_meshes_of_every_kind_are_read(kind):
    sphere = trimesh.creation.icosphere(3, radius=2)
    sphere.apply_translation([3, 0, 0])
    radius = SIZE / 2 - MARGIN
    found = FORM.read(exported(kind, sphere), SHAPE)
    assert (found - ball(radius)).abs().max() < 0.02
    large = SignedDistance(truncation=3.0, half_side=5.0)
    placed = large.read(exported(kind, sphere), SHAPE)
    again = as_trimesh(large.surface(placed).triangles)
    np.testing.assert_allclose(again.centroid, [3, 0, 0], atol=0.05)
    small = SignedDistance(truncation=3.0, half_side=4.9)
    with pytest.raises(
        FormatError, match=r"coordinates up to 5, beyond dataset\.half_side=4\.9; increase it, or"
    ):
        small.read(exported(kind, sphere), SHAPE)


def test_polygons_are_divided_and_a_file_declares_no_more_than_it_contains():
    corners = [f"{x} {y} {z}" for x in (0, 1) for y in (0, 1) for z in (0, 1)]
    faces = ["0 1 3 2", "4 6 7 5", "0 4 5 1", "2 3 7 6", "0 2 6 4", "1 5 7 3"]
    header = "ply\nformat ascii 1.0\nelement vertex 8\n" + "".join(
        f"property float {axis}\n" for axis in "xyz"
    )
    header += "element face {}\nproperty list uchar int vertex_indices\nend_header\n"
    body = "\n".join([*corners, *(f"4 {face}" for face in faces)]) + "\n"
    found = FORM.read((header.format(6) + body).encode(), SHAPE)
    assert int((found < 0).sum()) == (SIZE - 2 * MARGIN) ** 3
    with pytest.raises(FormatError, match="declares more elements than it contains"):
        FORM.read((header.format(10**9) + body).encode(), SHAPE)
    with pytest.raises(FormatError, match="has 0 triangles"):
        FORM.read((header.format(0) + "\n".join(corners) + "\n").encode(), SHAPE)


def test_previews_show_the_surface_from_its_side():
    (picture,) = FORM.to_rgb(ball(6)[None])
    assert tuple(picture.shape) == FORM.picture_shape(SHAPE)
    ink = (picture < 255).any(0)
    radius = 6 / (SIZE / 2) / FITS * SIDE / 2
    assert float(ink.sum()) == pytest.approx(math.pi * radius**2, rel=0.05)
    assert (ink.nonzero().double().mean(0) + 0.5 - SIDE / 2).abs().max() < 0.5
    assert picture[:, SIDE // 2 - 12].sum() > picture[:, SIDE // 2 + 12].sum()  # light from above
    views = FORM.frames(ball(3, (4, 0, 0))[None])
    assert tuple(views.shape) == (1, TURNS, *FORM.picture_shape(SHAPE))
    places = [(view < 255).any(0).nonzero().double().mean(0)[1] for view in views[0]]
    first, opposite = torch.stack(places).split(TURNS // 2)
    torch.testing.assert_close(first + opposite, torch.full_like(first, SIDE - 1.0), rtol=0, atol=1.0)
    assert torch.equal(views[0, 0], FORM.to_rgb(ball(3, (4, 0, 0))[None])[0])


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(surface, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"meshes need scikit-image; install it: pip install 'diffuse-cli\[meshes\]'"
    ):
        FORM.beside(ball(5))


def test_read_stored_names_a_file_of_another_kind(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"a\.npy: is not a mesh"):
        read_stored([tmp_path / "a.npy"], FORM, SHAPE)
