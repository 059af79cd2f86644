"""Vertices of meshes as point clouds."""

import json
import struct

import numpy as np
import pytest
import trimesh

from diffusion_cli.data import Points
from diffusion_cli.errors import FormatError
from diffusion_cli.formats import mesh
from diffusion_cli.formats.mesh import mesh_type, read_mesh
from helpers.data import damaged

SOLID = trimesh.creation.icosphere(subdivisions=2)
SOLID.vertices = (
    np.random.RandomState(0).permutation(3 * len(SOLID.vertices)).reshape(-1, 3) / 64
)  # exact in text
CORNERS = np.unique(SOLID.vertices, axis=0)


def exported(kind: str, scene: trimesh.Scene | trimesh.Trimesh = SOLID) -> bytes:
    data = scene.export(file_type=kind)
    assert data is not None
    return data.encode() if isinstance(data, str) else bytes(data)  # pyright: ignore[reportArgumentType]


FILES = {kind: exported(kind) for kind in ("obj", "stl", "stl_ascii", "off", "glb")}
MODELNET = exported("off").replace(b"OFF\n", b"OFF")  # of which some files lack the line break


def points(path, rules: int = 3) -> Points:
    return Points("", rules, path=str(path), num_points=100, val_fraction=0.0)


@pytest.mark.parametrize("kind", [*FILES, "modelnet"])
def test_vertices_are_read_once_each(kind):
    data = MODELNET if kind == "modelnet" else FILES[kind]
    found = mesh_type(data)
    assert found == {"stl_ascii": "stl", "modelnet": "off"}.get(kind, kind)
    assert found is not None
    np.testing.assert_array_equal(read_mesh(data, found), CORNERS)


def test_a_scene_places_its_meshes():
    scene = trimesh.Scene([SOLID])
    scene.add_geometry(SOLID, transform=trimesh.transformations.translation_matrix([50, 0, 0]))
    found = read_mesh(exported("glb", scene), "glb")
    np.testing.assert_array_equal(found, [*CORNERS, *(CORNERS + np.array([50, 0, 0]))])


def test_meshes_are_a_dataset_of_new_runs_only(tmp_path):
    for kind in ("obj", "stl", "off", "glb"):
        (tmp_path / f"a.{kind.upper()}").write_bytes(FILES[kind])
    (tmp_path / "b.ply").write_bytes(exported("ply"))
    dataset = points(tmp_path)
    assert (len(dataset.files), dataset.remarks()) == (5, [])
    assert dataset.load("train").pixels.shape == (5, 3, 100)
    assert points(tmp_path, rules=2).files == ["b.ply"]


@pytest.mark.parametrize("rules", [1, 2, 3])
@pytest.mark.parametrize("start", [b"\nv ", b"\nv\t"])
def test_an_array_with_the_bytes_of_a_mesh_is_an_array(tmp_path, rules, start):
    cloud = np.random.RandomState(0).randn(100, 3)
    cloud[50, :1] = np.frombuffer(start.ljust(8, b"?"))  # 0.0005
    np.save(tmp_path / "a.npy", cloud)
    assert start in (tmp_path / "a.npy").read_bytes()
    assert points(tmp_path, rules).load("train").pixels.shape == (1, 3, 100)


def test_materials_and_files_that_a_mesh_names_are_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.mtl").write_text("newmtl a\n")
    data = b"mtllib secret.mtl\nusemtl a\n" + FILES["obj"]
    assert len(read_mesh(data, "obj")) == len(CORNERS)
    with pytest.raises(FormatError, match="is not a readable GLB file"):
        read_mesh(changed(lambda scene: scene["buffers"][0].update(uri="secret.mtl")), "glb")


def changed(change) -> bytes:
    """The GLB file with a change of its description."""
    data = FILES["glb"]
    (length,) = struct.unpack_from("<I", data, 12)
    scene = json.loads(data[20 : 20 + length])
    change(scene)
    text = json.dumps(scene).encode()
    text += b" " * (-len(text) % 4)
    rest = data[20 + length :]
    return data[:8] + struct.pack("<II", 20 + len(text) + len(rest), len(text)) + data[16:20] + text + rest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scene: scene["accessors"][0].pop("bufferView"), "compressed or sparse"),
        (lambda scene: scene["accessors"][0].update(sparse={}), "compressed or sparse"),
        (
            lambda scene: scene.update(extensionsRequired=["KHR_draco_mesh_compression"]),
            "compressed or sparse",
        ),
        (lambda scene: scene["accessors"][0].update(count=10**9), "declares more numbers than it contains"),
        (lambda scene: scene["nodes"].extend([{"mesh": 0}] * 100), "repeats them; export it as binary PLY"),
        (lambda scene: scene["meshes"].extend(scene["meshes"] * 100), "repeats them"),
        (lambda scene: scene.update(nodes=[{}] * 10001), "has 10001 nodes; at most 10000"),
        (lambda scene: scene["nodes"].append({"mesh": 7}), "has a malformed scene"),
        (lambda scene: scene.update(meshes=3), "has a malformed scene"),
    ],
)
def test_a_scene_declares_no_more_than_it_contains(change, message):
    with pytest.raises(FormatError, match=message):
        read_mesh(changed(change), "glb")


def test_text_is_bounded(monkeypatch):
    monkeypatch.setattr(mesh, "LONGEST_TEXT", 1000)
    for kind in ("obj", "off"):
        with pytest.raises(FormatError, match="has more than 1000 bytes of text; convert it to binary PLY"):
            read_mesh(FILES[kind], kind)
    assert len(read_mesh(FILES["stl"], "stl")) == len(CORNERS)


def test_damaged_meshes_are_refused_in_a_line(tmp_path):
    draw = np.random.RandomState(0)
    decoder = points(tmp_path).decoder if (tmp_path / "a.stl").write_bytes(FILES["stl"]) else None
    assert decoder is not None
    for good in FILES.values():
        for _ in range(40):
            data = damaged(good, draw)
            try:
                found = decoder(data)
            except ValueError as error:
                assert "\n" not in str(error)  # noqa: PT017
            else:
                assert found.shape == (3, 100)
