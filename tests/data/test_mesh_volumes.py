"""Meshes as signed distance volumes: files, built-in solids, and the way through the commands."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from diffusion_cli.cli import run
from diffusion_cli.data import Meshes
from diffusion_cli.data.solids import SOLIDS
from diffusion_cli.errors import UsageError
from diffusion_cli.formats import signed_distance
from diffusion_cli.formats.mesh import read_triangles
from helpers.data import damaged
from helpers.meshes import as_trimesh, exported

BALL = trimesh.creation.icosphere(2, radius=2)
BOX = trimesh.creation.box([1.0, 2, 3])
OPEN = trimesh.Trimesh(BOX.vertices, np.asarray(BOX.faces)[1:], process=False)


def meshes(data_dir: Path, path: Path | None = None, **changes) -> Meshes:
    options = {"resolution": 12, "size": 60, "val_fraction": 0.0}
    return Meshes(str(data_dir), path=None if path is None else str(path), **(options | changes))


def volumes(dataset: Meshes) -> torch.Tensor:
    images = dataset.load("train")
    return images[torch.arange(len(images))]


@pytest.fixture
def folder(tmp_path):
    for name, solid in {
        "balls/a.obj": BALL,
        "balls/b.STL": BALL,
        "boxes/c.glb": BOX,
        "boxes/.d.ply": BOX,
    }.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(exported(path.suffix[1:].lower(), solid))
    (tmp_path / "in" / "readme.txt").write_text("balls and boxes")
    return tmp_path / "in"


def test_files_of_all_kinds_are_one_set_in_a_folder_or_archive(folder, tmp_path):
    dataset = meshes(tmp_path / "data", folder)
    assert dataset.class_names == ("balls", "boxes")
    assert dataset.load("train").labels.tolist() == [0, 0, 1]  # pyright: ignore[reportOptionalMemberAccess]
    assert dataset.remarks() == []
    found = volumes(dataset)
    assert found.shape == (3, 1, 12, 12, 12)
    assert (found[0] - found[1]).abs().max() < 1e-3
    # A box of 1 x 2 x 3 becomes one of 8/3 x 16/3 x 8 voxels.
    assert (found[2, 0] < 0).sum(0).amax().item() == 2
    with zipfile.ZipFile(tmp_path / "same.zip", "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder))
    assert torch.equal(volumes(meshes(tmp_path / "data", tmp_path / "same.zip")), found)
    assert torch.equal(
        next(iter(meshes(tmp_path / "data", folder).stream("train")[torch.tensor([2])])), found[2]
    )


def test_a_mesh_is_converted_once(folder, tmp_path, monkeypatch):
    first = volumes(meshes(tmp_path / "data", folder))
    kept = sorted((tmp_path / "data" / "volumes").iterdir())
    assert len(kept) == 3
    kept[0].write_bytes(b"damaged")
    assert torch.equal(volumes(meshes(tmp_path / "data", folder)), first)
    monkeypatch.setattr(signed_distance, "read_triangles", None)
    assert torch.equal(volumes(meshes(tmp_path / "data", folder)), first)
    monkeypatch.undo()
    assert not torch.equal(volumes(meshes(tmp_path / "data", folder, truncation=2.0)), first)
    assert len([*(tmp_path / "data" / "volumes").iterdir()]) == 6


def test_meshes_without_a_voxel_inside_are_refused(folder, tmp_path):
    sheet = trimesh.creation.box([3.0, 3.0, 0.001])
    (folder / "boxes" / "sheet.ply").write_bytes(exported("ply", sheet))
    with pytest.raises(ValueError, match=r"boxes/sheet\.ply .*is so thin that no voxel is inside"):
        volumes(meshes(tmp_path / "data", folder))
    assert len(volumes(meshes(tmp_path / "data", folder, unreadable="skip"))) == 3


def test_built_in_solids_beyond_the_memory_are_refused_before_any_is_made(tmp_path):
    with pytest.raises(UsageError, match=r"dataset\.size=100000: that many volumes of 256\^3 voxels take"):
        meshes(tmp_path, resolution=256, size=100_000)


def test_meshes_that_are_not_watertight_are_named_or_skipped(folder, tmp_path):
    for name in ("balls/open.stl", "boxes/open.ply"):
        (folder / name).write_bytes(exported(name[-3:], OPEN))
    (folder / "boxes" / "e.obj").write_bytes(b"v 0 0 0\n")
    with pytest.raises(ValueError, match="cannot use 3 of the volumes") as caught:
        volumes(meshes(tmp_path / "data", folder))
    assert "balls/open.stl, boxes/open.ply (is not watertight (3 of 18 edges do not belong" in str(
        caught.value
    )
    assert "boxes/e.obj (" in str(caught.value)
    assert "\n" not in str(caught.value)
    dataset = meshes(tmp_path / "data", folder, unreadable="skip")
    assert len(volumes(dataset)) == 3
    assert "3 files are unreadable and skipped" in dataset.remarks()[0]
    for name in ("balls/a.obj", "balls/b.STL", "boxes/c.glb"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"none of the 3 meshes is usable \(is not watertight"):
        meshes(tmp_path / "data", folder, unreadable="skip")


def test_damaged_meshes_are_refused_in_a_line(folder, tmp_path):
    draw = np.random.RandomState(0)
    decoder = meshes(tmp_path / "data", folder).decoder
    for file in sorted(folder.rglob("*.*")):
        if file.suffix == ".txt":
            continue
        for _ in range(20):
            data = damaged(file.read_bytes(), draw)
            try:
                found = decoder(data)
            except ValueError as error:
                assert "\n" not in str(error)  # noqa: PT017
            else:
                assert found.shape == (1, 12, 12, 12)


def test_settings_that_do_not_fit_are_refused(folder, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"has no meshes; expected files with \.ply \.obj \.stl \.off \.glb"):
        meshes(tmp_path, tmp_path / "none")
    with pytest.raises(ValueError, match=r"dataset.labels=csv: applies to files; use auto or none"):
        meshes(tmp_path, labels="csv")
    with pytest.raises(ValueError, match=r"coordinates up to 2, beyond dataset\.half_side=1\.9; increase it"):
        volumes(meshes(tmp_path / "data", folder, half_side=1.9))


def test_built_in_solids_are_balanced_split_and_always_the_same(tmp_path):
    dataset = meshes(tmp_path, val_fraction=0.25)
    train, val = dataset.load("train"), dataset.load("val")
    assert len(train) + len(val) == 60
    assert 5 < len(val) < 25
    assert dataset.class_names == tuple(SOLIDS) == ("box", "capsule", "cone", "cylinder", "sphere", "torus")
    assert train.labels is not None
    assert val.labels is not None
    assert torch.bincount(torch.cat([train.labels, val.labels])).tolist() == 6 * [10]
    rows = torch.arange(len(train))
    assert torch.equal(meshes(tmp_path, val_fraction=0.25).load("train")[rows], train[rows])
    assert torch.equal(dataset.form.quantize(train[rows]), train[rows])
    border = torch.ones(12, 12, 12, dtype=torch.bool)
    border[1:-1, 1:-1, 1:-1] = False
    assert train[rows][:, 0, border].min() > 0
    assert (train[rows].amin((1, 2, 3, 4)) < 0).all()
    assert meshes(tmp_path, labels="none").class_names is None


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_meshes_are_trained_on_and_sampled(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["dataset=meshes", f"dataset.path={folder}", "dataset.resolution=16", "dataset.half_side=4"]
    network = ["model.channels=8", "model.channel_mult=[1]", "model.norm_groups=1", "model.head_channels=8"]
    steps = ["max_steps=4", "batch_size=2", "preview_steps=2", "trainer=cpu", "logger=csv", "name=a"]
    assert run(["train", *data, *network, *steps, "dataset.val_fraction=0"]) == 0
    assert (tmp_path / "outputs" / "a" / "previews" / "real.png").is_file()
    assert run(["sample", "num_samples=3", "steps=2", "output=made"]) == 0
    assert len([*(tmp_path / "made").glob("*.npy")]) == 3
    for file in (tmp_path / "made").glob("*.glb"):
        triangles = read_triangles(file.read_bytes())
        assert as_trimesh(triangles).is_watertight
        assert 3 < np.abs(triangles.vertices).max() < 4 * 8 / 6 + 1e-3
    assert (tmp_path / "made" / "grid.png").is_file()
    assert (tmp_path / "made" / "grid.gif").is_file()
    assert json.loads((tmp_path / "made" / "manifest.json").read_text())["settings"]
