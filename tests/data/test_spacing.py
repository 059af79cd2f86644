"""Volumes of any spacing, resampled to one: places, values, fields of view and wrong settings."""

import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.commands.inputs import read_input, real_images
from diffusion_cli.commands.masks import read_masks
from diffusion_cli.data import Folder, VolumeDecoder
from diffusion_cli.data.decoding import key_text
from diffusion_cli.data.resampling import Placement, Spacing, resampled, spacing_of
from diffusion_cli.errors import UsageError
from diffusion_cli.formats import Volume
from helpers import TINY
from helpers.formats import folder

nib = pytest.importorskip("nibabel")
pytest.importorskip("SimpleITK")
SIDES, SIZES = (2.5, 0.7, 0.9), (12, 30, 26)
"""Sides of the voxels of files along D, H and W, and their numbers."""
TURN = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)) + 4 * np.eye(3))[0]
"""An oblique orientation, near to that of the axes."""
PLANE = np.array([1.5, -2.0, 3.0])
"""Change of a ramp per mm, to the right, to the front and upwards."""


def oblique(sides=SIDES, origin=(-20.0, 15.0, 40.0)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = TURN * np.sign(np.diag(TURN)) * sides[::-1]
    affine[:3, 3] = origin
    return affine


def ramp(affine: np.ndarray, sizes=SIZES) -> np.ndarray:
    """Values [D, H, W] that are linear in the place."""
    d, h, w = np.indices(sizes)
    voxels = np.stack([w, h, d, np.ones(sizes)], -1)
    return (voxels @ np.array(affine)[:3].T) @ PLANE


def save(path: Path, values: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(exist_ok=True)
    nib.Nifti1Image(values.T, affine).to_filename(path)
    return path


def volumes(path: Path, **changes: Any) -> Folder:
    return folder(path, **({"resolution": [16, 12, 10], "range": [-1000, 1000], "spacing": 1.5} | changes))


def inside(place: Placement, sizes=SIZES, margin=3) -> np.ndarray:
    """The voxels of the result at least `margin` voxels of the file inside it."""
    along = [
        (first + step * np.arange(size) >= margin) & (first + step * np.arange(size) <= have - 1 - margin)
        for first, step, size, have in zip(place.first, place.step, place.sizes, sizes, strict=True)
    ]
    return along[0][:, None, None] & along[1][:, None] & along[2]


@pytest.mark.parametrize("spacing", [1.5, 0.6, [2.5, 0.7, 0.9], [5, 1, 0.5]])
def test_a_ramp_keeps_its_values_at_the_places_of_the_voxels(tmp_path, spacing):
    """The affine of samples gives the place of each voxel, and the ramp its value there."""
    affine = oblique()
    save(tmp_path / "a.nii", ramp(affine), affine)
    data = volumes(tmp_path, spacing=spacing)
    assert isinstance(data.form, Volume)
    sides = np.linalg.norm(np.array(data.form.affine)[:, :3], axis=0)
    np.testing.assert_allclose(sides, np.broadcast_to(spacing, 3)[::-1], rtol=1e-6)
    values = data.form.values(data.load("train")[torch.tensor([0])])[0, 0]
    d, h, w = (side / own for side, own in zip(np.broadcast_to(spacing, 3), SIDES, strict=True))
    within = inside(Placement.central(SIZES, (16, 12, 10), (d, h, w)))
    assert within.sum() > 100
    np.testing.assert_allclose(
        values[within], ramp(np.array(data.form.affine), (16, 12, 10))[within], atol=1e-2
    )


def test_files_of_other_spacing_and_axes_are_the_same_volume(tmp_path):
    """One ramp around one centre, in voxels of three sides and in three orders of axes."""
    centre = np.array([3.0, -4, 5])
    for number, (sides, sizes) in enumerate([((1, 1, 1), (20, 20, 20)), ((2, 0.5, 1), (10, 40, 20))]):
        affine = oblique(sides)
        affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(sizes[::-1]) - 1) / 2)
        save(tmp_path / f"{number}.nii", ramp(affine, sizes), affine)
    turn = nib.orientations.axcodes2ornt(("L", "S", "A"))
    to_turn = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], turn)
    turned = nib.load(tmp_path / "1.nii").as_reoriented(to_turn)
    turned.to_filename(tmp_path / "2.nii")
    data = volumes(tmp_path, resolution=[8, 8, 8], spacing=1)
    first, *others = data.load("train")[torch.arange(3)]
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-5)


def test_volumes_in_the_voxels_of_the_model_are_cropped_and_filled_without_a_change(tmp_path):
    values = np.random.default_rng(0).integers(-900, 900, (7, 9, 6)).astype(np.int16)
    save(tmp_path / "a.nii", values, np.diag([1, 1, 1.0005, 1]))
    for fill, low in ((None, -1.0), (500.0, 0.5)):
        data = volumes(tmp_path, resolution=[4, 4, 10], spacing=1, fill=fill)
        (found,) = data.load("train")[torch.tensor([0])][0]
        assert torch.equal(found[:, :, 2:8], torch.from_numpy(values[1:5, 2:6] / 1000).float())
        assert (found[:, :, [0, 1, 8, 9]] == low).all()
    assert isinstance(data.form, Volume)
    np.testing.assert_allclose(np.array(data.form.affine)[:, 3], [-2, 2, 1.0005])


def test_finer_detail_than_the_voxels_of_the_model_is_removed():
    """A sampled cosine of 2.5 voxels would appear with another wavelength in voxels of 2."""
    wave = np.cos(2 * np.pi * np.arange(64) / 2.5) * np.ones((1, 1, 1, 64))
    place = Placement.central((1, 1, 64), (1, 1, 32), (1, 1, 2))
    found = resampled(wave, place, 0.0)[0, 0, 0, 4:-4]
    # The discrete Gaussian of variance t has the gain exp(-t (1 - cos(2 pi f))); the mean of two voxels cos(pi f).
    gain = np.exp(-3 / (8 * np.log(2)) * (1 - np.cos(2 * np.pi / 2.5))) * np.cos(np.pi / 2.5)
    assert np.abs(found).max() == pytest.approx(gain, rel=0.01)


def test_a_placement_and_its_inverse_cancel():
    place = Placement.central((12, 30, 26), (16, 12, 10), (0.6, 2.0, 1.3))
    back = place.inverse((12, 30, 26)).inverse((16, 12, 10))
    np.testing.assert_allclose([*back.first, *back.step], [*place.first, *place.step])
    assert place.kept((12, 30, 26)) == pytest.approx(9.6 / 12 * 24 / 30 * 13 / 26)


def test_keys_of_cached_latents_stay_those_of_earlier_versions(tmp_path):
    save(tmp_path / "a.nii", np.zeros(SIZES), np.eye(4))
    decoder = volumes(tmp_path, spacing=None).decoder
    assert isinstance(decoder, VolumeDecoder)
    assert key_text(decoder).endswith("shape=(1, 16, 12, 10), spacing=[1.0, 1.0, 1.0])")
    assert "target=Spacing(" in key_text(decoder._replace(target=Spacing((1, 1, 1), 0)))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"resolution": [8, 8]},
            "dataset.spacing=1.5: applies to volumes; set dataset.resolution=[depth,height,width]",
        ),
        ({"spacing": None, "fill": 0}, "dataset.fill=0: has no effect without dataset.spacing; leave it out"),
        (
            {"fill": -2000},
            "dataset.fill=-2000: lies outside dataset.range=[-1000,1000], to which values are clipped; "
            "use a value in the range",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused(tmp_path, changes, line):
    save(tmp_path / "a.nii", np.zeros(SIZES), np.eye(4))
    with pytest.raises(UsageError) as error:
        volumes(tmp_path, **changes)
    assert str(error.value) == line


def test_arrays_have_no_spacing(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(SIZES))
    line = r"dataset\.spacing=1\.5: a\.npy has no voxel spacing, which dataset\.spacing needs; convert it to NIfTI"
    with pytest.raises(UsageError, match=line):
        volumes(tmp_path)
    save(tmp_path / "A.nii", np.zeros(SIZES), np.eye(4))
    with pytest.raises(UsageError, match=r"remove a\.npy \(has no voxel spacing"):
        volumes(tmp_path).load("train")


def test_files_without_a_spacing_are_skipped_with_the_unreadable_ones(tmp_path):
    path, skip = tmp_path / "x", {"unreadable": "skip", "data_dir": str(tmp_path / "data")}
    path.mkdir()
    (path / "0.nii").write_bytes(b"none")
    np.save(path / "1.npy", np.zeros(SIZES))
    with pytest.raises(UsageError, match=r"dataset\.path=.*: 0\.nii: "):
        volumes(path, **skip)
    save(path / "2.nii", np.zeros(SIZES), np.eye(4))
    assert volumes(path, **skip).files == ["2.nii"]
    (path / "0.nii").unlink()
    (path / "2.nii").unlink()
    with pytest.raises(UsageError, match=r"dataset\.spacing=1\.5: 1\.npy has no voxel spacing"):
        volumes(path, **skip)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    save(tmp_path / "a.nii", np.zeros(SIZES), np.eye(4))
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(
        UsageError, match=r"needs SimpleITK; install it: pip install 'diffuse-cli\[medical\]'"
    ):
        volumes(tmp_path)
    assert volumes(tmp_path, spacing=None).form.to_dict()


def test_a_field_that_leaves_out_most_of_a_volume_is_remarked_on(tmp_path):
    save(tmp_path / "a.nii", np.zeros((16, 16, 16)), np.eye(4))
    for spacing, said in ((0.5, "keeps 12 % of the first volume"), (1, "")):
        lines = volumes(tmp_path, resolution=[16, 16, 16], spacing=spacing).remarks()
        kept = [line for line in lines if "keeps" in line]
        assert [said in line for line in kept] == [True] * bool(said)


def test_inputs_of_an_edit_are_resampled(tmp_path):
    affine = oblique()
    save(tmp_path / "x" / "a.nii", ramp(affine), affine)
    data = volumes(tmp_path / "x")
    assert isinstance(data.form, Volume)
    (found,) = read_input(
        str(tmp_path / "x" / "a.nii"), [data.shape], True, None, data.form, spacing=spacing_of(1.5, -1000)
    )
    assert torch.equal(found.pixels, data.form.quantize(data.load("train")[torch.tensor([0])])[0])
    assert found.form == data.form
    save(tmp_path / "b.nii", np.zeros((16, 12, 10)), affine)
    line = r"b\.nii: has a voxel spacing of 0\.9 x 0\.7 x 2\.5, and the model of 1\.5 x 1\.5 x 1\.5; set fit=true"
    with pytest.raises(UsageError, match=line):
        read_input(
            str(tmp_path / "b.nii"), [data.shape], False, None, data.form, spacing=spacing_of(1.5, -1000)
        )


@pytest.mark.parametrize(
    ("side", "place"), [(1.0, [2, 2, 2]), (2.0, [0, 0, 0]), ([1.0, 2.0, 2.0], [2, 0, 0])]
)
def test_masks_of_inputs_with_as_many_voxels_as_the_model_are_resampled(tmp_path, side, place):
    """8 voxels of 1 mm are the middle 4 of 8 voxels of 2 mm."""
    affine = np.diag([*np.broadcast_to(side, 3)[::-1], 1.0])
    mask = np.zeros((8, 8, 8), np.int16)
    mask[0, 0, 0] = 1
    values = np.random.default_rng(0).integers(-900, 900, (8, 8, 8)).astype(np.int16)
    scan, marks = save(tmp_path / "x" / "a.nii", values, affine), save(tmp_path / "m.nii", mask, affine)
    data = volumes(tmp_path / "x", resolution=[8, 8, 8], spacing=2, val_fraction=0)
    assert isinstance(data.form, Volume)
    items = read_input(str(scan), [data.shape], True, None, data.form, spacing=spacing_of(2.0, -1000))
    region = read_masks(str(marks), items, (8, 8, 8))
    assert region[0, 0].nonzero().tolist() == [place]
    # Known voxels of a resampled volume are not those of the file in the same place.
    items += real_images(data, "train", None)
    assert [item.original for item in items] == [None, None]
    assert torch.equal(items[0].pixels, items[1].pixels)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_resampling_works_in_a_forked_process():
    place = Placement.central((4, 4, 4), (4, 4, 4), (0.5, 1, 2))
    resampled(np.ones((1, 4, 4, 4)), place, 0.0)
    child = os.fork()
    if child == 0:
        os._exit(0 if resampled(np.ones((1, 4, 4, 4)), place, 1.0).all() else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.slow
def test_samples_have_the_spacing_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, sides in enumerate([(1, 1, 1), (2, 0.5, 1), (1, 2, 3)]):
        save(Path("mri", f"{number}.nii.gz"), np.full((9, 9, 9), 100, np.int16), np.diag([*sides[::-1], 1]))
    words = [
        "dataset=folder", "dataset.path=mri", "dataset.channels=1", "dataset.resolution=[8,8,8]",
        "dataset.range=[-1000,1000]", "dataset.spacing=[3,2,1.5]", "dataset.val_fraction=0", "model=unet3d_tiny",
        "batch_size=2", "max_steps=1", "name=t",
    ]  # fmt: skip
    assert run([*TINY, *words]) == 0
    assert run(["sample", "run=t", "num_samples=1", "steps=2", "device=cpu", "output=out"]) == 0
    image = nib.Nifti1Image.from_bytes(gzip.decompress(Path("out/000000.nii.gz").read_bytes()))
    assert (image.shape, image.header.get_zooms()) == ((8, 8, 8), (1.5, 2.0, 3.0))
    assert json.loads(Path("out/manifest.json").read_text())["model"]["dataset"]["spacing"] == [3, 2, 1.5]
