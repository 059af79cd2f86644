"""Sets of points: their files, their pictures, the surfaces of formulas, and the way through every command."""

import re
import zipfile

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from diffusion_cli.cli import run
from diffusion_cli.data import Points
from diffusion_cli.data.shapes import SHAPES
from diffusion_cli.formats import PointCloud, form_of
from diffusion_cli.formats.ply import read_ply, write_ply
from diffusion_cli.formats.point_cloud import AZIMUTH, ELEVATION, SIDE, projected
from helpers.data import damaged

POINTS = np.random.RandomState(0).uniform(-3, 5, (40, 3))


def points(path=None, **changes) -> Points:
    options = {"num_points": 16, "radius": None, "labels": "auto", "size": 60, "val_fraction": 0.25}
    return Points("", path=None if path is None else str(path), **(options | changes))


def ply(body: bytes, header: str = "format ascii 1.0\nelement vertex 2\n", axes: str = "xyz") -> bytes:
    properties = "".join(f"property float {axis}\n" for axis in axes)
    return f"ply\n{header}{properties}end_header\n".encode() + body


# --- PLY --------------------------------------


def test_written_points_are_read(tmp_path):
    write_ply(POINTS, tmp_path / "a.ply")
    np.testing.assert_array_equal(read_ply((tmp_path / "a.ply").read_bytes()), POINTS.astype(np.float32))


@pytest.mark.parametrize("order", ["little", "big"])
def test_binary_vertices_have_what_else_they_like(order):
    vertex = np.dtype([("u", "u1"), ("z", "f8"), ("x", "f4"), ("n", "i2"), ("y", "f8")])
    rows = np.zeros(len(POINTS), vertex.newbyteorder("<" if order == "little" else ">"))
    rows["x"], rows["y"], rows["z"], rows["u"], rows["n"] = *POINTS.T, 7, -3
    header = (
        f"ply\r\nformat binary_{order}_endian 1.0\r\ncomment by hand\r\nelement vertex 40\r\n"
        "property uchar u\r\nproperty double z\r\nproperty float32 x\r\nobj_info none\r\nproperty short n\r\n"
        "property double y\r\nelement face 3\r\nproperty list uchar int vertex_indices\r\nend_header\r\n"
    )
    found = read_ply(header.encode() + rows.tobytes() + b"faces")
    np.testing.assert_allclose(found, POINTS, rtol=1e-7)
    np.testing.assert_array_equal(found[:, 1:], POINTS[:, 1:])


def test_text_vertices():
    found = read_ply(ply(b"1 2.5 -3e-1 255\n 4 5 6 0\n3 0 1 0\n", axes="xyzr"))
    np.testing.assert_array_equal(found, [[1, 2.5, -0.3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"solid", "is not a PLY file"),
        (b"ply\n" + b"x" * 10**5, "is not a PLY file"),
        (ply(b"1 2 3 4 5"), "ends before its 2 vertices"),
        (ply(b"1 2 3\n4 5 oh my\n"), "vertices"),
        (ply(b"1 2 3\n4 5 nan\n"), "not finite"),
        (ply(b"1 2\n4 5\n", axes="xy"), "expected one x, y and z"),
        (ply(b"1 2 3 4\n5 6 7 8\n", axes="xyzz"), "two vertex properties with the same name"),
        (ply(b"", "format ascii 1.0\nelement vertex 99999999999999\n"), "ends before its 99999999999999"),
        (ply(b"", "format binary_little_endian 1.0\nelement vertex 99999999999999\n"), "ends before its"),
        (ply(b"", "format ascii 1.0\nelement vertex -2\n"), "does not start with"),
        (ply(b"", "format ascii 1.0\nelement face 1\nproperty list uchar int v\nelement vertex 1\n"), "start with"),
        (ply(b"", "format ascii 1.0\nelement vertex 1\nproperty list uchar int v\n"), "'property list uchar int v'"),
    ],
)  # fmt: skip
def test_what_is_no_set_of_points_is_refused(data, what):
    with pytest.raises(ValueError, match=re.escape(what)):
        read_ply(data)


def test_damaged_files_are_refused_in_a_line(tmp_path):
    write_ply(POINTS[:3], tmp_path / "a.ply")
    np.save(tmp_path / "b.npy", POINTS[:3])
    draw = np.random.RandomState(0)
    decoder = points(num_points=3).decoder
    for file in ("a.ply", "b.npy"):
        good = (tmp_path / file).read_bytes()
        for _ in range(300):
            data = damaged(good, draw)
            try:
                found = decoder(data)
            except ValueError as error:
                assert "\n" not in str(error)  # noqa: PT017
            else:
                assert found.shape == (3, 3)


# --- Their form -------------------------------


@pytest.mark.parametrize("radius", [1.0, 37.3, 1e-3])
def test_files_keep_what_is_stored(tmp_path, radius):
    form = PointCloud(radius=radius)
    x = torch.randn(2, 3, 500, generator=torch.Generator().manual_seed(0))
    stored = form.quantize(x)
    assert (stored - x.clamp(-1, 1)).abs().max() <= 2**-21
    assert torch.equal(form.quantize(stored), stored)
    form.write(stored[0], tmp_path / "a.ply")
    data = (tmp_path / "a.ply").read_bytes()
    assert torch.equal(form.read(data, (3, 500)), stored[0])
    np.testing.assert_allclose(read_ply(data).T, stored[0].double() * form.half_range, rtol=1e-6)
    with pytest.raises(ValueError, match="has 500 points; expected 499"):
        form.read(data, (3, 499))
    with pytest.raises(ValueError, match="has points outside"):
        PointCloud(radius=radius / 2).read(data, (3, 500))


def test_a_form_is_known_by_what_it_says():
    assert form_of(PointCloud(radius=2.5).to_dict()) == PointCloud(radius=2.5)
    for radius in (0.0, -1.0, float("inf"), float("nan"), "1"):
        with pytest.raises(ValueError, match=r"form\.radius"):
            form_of({"kind": "points", "radius": radius})


def test_the_eye_turns_and_does_not_distort():
    axes = torch.stack(projected(torch.eye(3)[None]), 1)[0].double()
    torch.testing.assert_close(axes @ axes.T, torch.eye(3).double(), rtol=0, atol=1e-6)
    assert torch.linalg.det(axes) > 0.99  # right, up, to the front: no mirror
    assert axes[1].argmax() == 2
    eye = torch.tensor([np.cos(AZIMUTH), np.sin(AZIMUTH), np.tan(ELEVATION)])
    right, up, near = projected(eye.view(1, 3, 1).float())
    assert max(abs(right), abs(up)) < 1e-6 < near


def test_pictures_show_the_nearest_darkest_and_in_its_place():
    def seen(*points: list[float]) -> torch.Tensor:
        return PointCloud(radius=1.0).to_rgb(torch.tensor(points).T[None])[0].int()

    middle, front = seen([0.0, 0.0, 0.0]), [float(np.cos(AZIMUTH)), float(np.sin(AZIMUTH)), 0.0]
    ink = (middle < 255).any(0).nonzero().double().mean(0)
    assert (ink - SIDE / 2).abs().max() <= 0.5
    assert (middle < 255).any(0).sum() == 5
    near, far = seen([0.8 * side for side in front]), seen([-0.8 * side for side in front])
    assert near.min() < middle.min() < far.min()
    above = (seen([0.0, 0.0, 0.9]) < 255).any(0).nonzero().double().mean(0)
    assert above[0] < ink[0] - 20
    assert abs(above[1] - ink[1]) <= 0.5
    both = [[0.9 * np.cos(ELEVATION) * x for x in front], [-0.9 * np.cos(ELEVATION) * x for x in front]]
    for point, sign in zip(both, (1, -1), strict=True):  # one behind the other, as the eye sees them
        point[2] = 0.9 * sign * float(np.sin(ELEVATION))
    assert torch.equal(seen(*both), seen(*both[::-1]))
    assert torch.equal(seen(*both), seen(both[0]))
    assert (seen([1.0, 1.0, 1.0], [-1.0, 1.0, -1.0]) <= 255).all()  # outside is not seen, and breaks nothing


# --- Shapes -----------------------------------


def bodies(name: str, count: int = 4000):
    return SHAPES[name](np.random.RandomState(0), count)


def test_points_lie_uniformly_on_their_surfaces():
    # By Archimedes the height on a sphere is uniform; so is that on a cylinder's side.
    assert kstest(bodies("sphere")[:, 2], "uniform", (-1, 2)).pvalue > 1e-3
    np.testing.assert_allclose(np.linalg.norm(bodies("sphere"), axis=1), 1)
    cube = bodies("cube")
    np.testing.assert_array_equal(np.abs(cube).max(1), 1)
    faces = np.array([(cube[:, axis] == sign).sum() for axis in range(3) for sign in (-1, 1)])
    assert np.abs(faces - 4000 / 6).max() < 5 * (4000 * 5 / 36) ** 0.5
    cylinder, rim = bodies("cylinder"), np.linalg.norm(bodies("cylinder")[:, :2], axis=1)
    height = 2 * cylinder[:, 2].max()
    side = np.isclose(rim, 1) & (np.abs(cylinder[:, 2]) < height / 2 - 1e-9)
    assert side.mean() == pytest.approx(height / (height + 1), abs=0.04)
    assert kstest(cylinder[side, 2], "uniform", (-height / 2, height)).pvalue > 1e-3
    assert kstest(rim[~side] ** 2, "uniform").pvalue > 1e-3
    cone, rim = bodies("cone"), np.linalg.norm(bodies("cone")[:, :2], axis=1)
    low, tall = cone[:, 2].min(), -2 * cone[:, 2].min()
    side = cone[:, 2] > low + 1e-9
    np.testing.assert_allclose(cone[side, 2], tall * (0.5 - rim[side]), atol=1e-9)
    slope = np.hypot(1, tall)
    assert side.mean() == pytest.approx(slope / (slope + 1), abs=0.04)
    assert kstest(rim**2, "uniform").pvalue > 1e-3
    torus = bodies("torus")
    ring = np.linalg.norm(torus[:, :2], axis=1) - 1
    tube = np.hypot(ring, torus[:, 2])
    np.testing.assert_allclose(tube, tube[0])
    # The mean of cos(angle) under 1 + a cos(angle) is a / 2.
    assert (ring / tube[0]).mean() == pytest.approx(tube[0] / 2, abs=5 * 0.71 / 4000**0.5)


def test_built_in_sets_are_balanced_split_and_always_the_same():
    dataset = points(num_points=64, radius=1.0)
    train, val = dataset.load("train"), dataset.load("val")
    assert len(train) + len(val) == 60
    assert 5 < len(val) < 25
    assert dataset.class_names == ("cone", "cube", "cylinder", "sphere", "torus")
    assert train.labels is not None
    assert val.labels is not None
    assert torch.bincount(torch.cat([train.labels, val.labels])).tolist() == 5 * [12]
    assert torch.equal(points(num_points=64, radius=1.0).load("train").pixels, train.pixels)
    reach = train.pixels.norm(dim=1).amax(1)
    assert 0.5 <= reach.min() < 0.6 < 0.9 < reach.max() <= 1
    assert train.pixels.dtype == torch.float32
    assert points(labels="none").class_names is None
    with pytest.raises(ValueError, match=r"dataset.labels=csv: applies to files; use auto or none"):
        points(labels="csv")


# --- Files ------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name in ("chairs/a.ply", "chairs/b.npy", "tables/c.PLY", "tables/.d.ply", "readme.txt"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npy":
            np.save(path, POINTS)
        else:
            write_ply(POINTS, path)
    return tmp_path / "in"


def test_files_of_all_kinds_are_one_set(folder):
    images = points(folder, num_points=40, val_fraction=0.0).load("train")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1]
    middle = (POINTS.min(0) + POINTS.max(0)) / 2
    expected = (POINTS - middle) / np.linalg.norm(POINTS - middle, axis=1).max()
    for found in images.pixels.double().numpy():  # in any order
        rows = [np.abs(expected - point).max(1).argmin() for point in found.T]
        assert sorted(rows) == [*range(40)]
        np.testing.assert_allclose(found.T, expected[rows], atol=1e-6)


def test_a_radius_is_one_scale_for_all_and_comes_back(folder):
    dataset = points(folder, num_points=40, radius=8.0, val_fraction=0.0)
    x = dataset.load("train").pixels
    np.testing.assert_allclose(np.sort(x[0].flatten().numpy()), np.sort(POINTS.flatten() / 8), atol=1e-6)
    assert dataset.form == PointCloud(radius=8.0)
    with pytest.raises(
        ValueError,
        match=r"a\.ply, .*\.PLY \(has coordinates up to 4\.\d+, beyond dataset\.radius=2; increase it",
    ):
        points(folder, radius=2.0, val_fraction=0.0).load("train")


def test_points_drawn_depend_on_the_file_alone(folder, tmp_path):
    few = points(folder, num_points=10, val_fraction=0.0)
    with zipfile.ZipFile(tmp_path / "same.zip", "w") as archive:
        for file in ("chairs/b.npy", "tables/c.PLY"):
            archive.write(folder / file, file)
    packed = points(tmp_path / "same.zip", num_points=10, val_fraction=0.0)
    assert torch.equal(packed.load("train").pixels, few.load("train").pixels[1:])
    every = points(folder, num_points=40, val_fraction=0.0).load("train").pixels
    assert torch.equal(few.load("train").pixels, every[:, :, :10])


def test_files_that_cannot_be_used_are_named(folder):
    (folder / "chairs" / "e.ply").write_bytes(b"no")
    np.save(folder / "chairs" / "f.npy", POINTS[:, :2])
    np.save(folder / "chairs" / "g.npy", POINTS[:5])
    np.save(folder / "chairs" / "h.npy", np.full((40, 3), np.inf))
    with pytest.raises(ValueError, match="cannot use 4 of the point clouds") as caught:
        points(folder, val_fraction=0.0).load("train")
    for words in [
        "chairs/e.ply (", "f.npy (has shape (40, 2); expected (N, 3))",
        "g.npy (has 5 points, fewer than dataset.num_points=16)", "h.npy (has coordinates that are not finite",
    ]:  # fmt: skip
        assert words in str(caught.value)
    (folder.parent / "none").mkdir()
    with pytest.raises(ValueError, match=r"has no point clouds; expected files with \.npy \.ply"):
        points(folder.parent / "none")


# --- From a folder to samples -----------------


@pytest.mark.parametrize(
    "words", [["model=dit_tiny"], ["model=unet_tiny"], ["task=classifier", "model=classifier_tiny"]]
)
def test_networks_that_go_by_an_order_are_refused(tmp_path, capsys, words):
    data = ["dataset=points", "dataset.num_points=32", "dataset.size=60", "max_steps=1", "batch_size=4"]
    rest = ["trainer=cpu", "logger=csv", "name=a", f"output_dir={tmp_path}"]
    assert run(["train", *words, *data, *rest]) == 2
    said = "model: this network is not permutation invariant, so it cannot model point clouds; use model=set_tiny"
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_points_are_trained_on_and_sampled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["dataset=points", "dataset.num_points=32", "dataset.size=60", "dataset.radius=2", "batch_size=8"]
    network = ["model.hidden_size=16", "model.depth=1", "model.class_conditional=true"]
    steps = [
        "max_steps=4",
        "validate_every=4",
        "preview_every=4",
        "preview_steps=2",
        "trainer=cpu",
        "logger=csv",
    ]
    assert run(["train", *data, *network, *steps, "name=a"]) == 0
    assert list((tmp_path / "outputs" / "a" / "previews").glob("*.png"))
    assert run(["sample", "num_samples=5", "steps=2", "label=torus", "output=made"]) == 0
    files = sorted((tmp_path / "made").glob("*.ply"))
    assert len(files) == 5
    made = read_ply(files[0].read_bytes())
    assert made.shape == (32, 3)
    assert 0.5 < np.abs(made).max() <= 2
    assert (tmp_path / "made" / "grid.png").is_file()
