"""Volumes: read and written in the numbers of their files, trained on and sampled."""

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.commands.inputs import read_input
from diffusion_cli.data import Folder
from diffusion_cli.errors import UsageError
from diffusion_cli.formats import Volume, form_of
from diffusion_cli.formats.volume import read_volume

nib = pytest.importorskip("nibabel")
OPTIONS: dict = {
    "masks": None,
    "channels": 1, "range": [-1000, 1000], "depth": "auto", "labels": "none", "background": "white", "flip": False,
    "val_fraction": 0, "in_memory": True, "num_workers": 0,
}  # fmt: skip


def nifti(values, slope=2.0, inter=-1000.0, spacing=(1, 2, 3)) -> bytes:
    """An int16 NIfTI of the values [W, H, D], with voxels of 1, 2 and 3 mm."""
    image = nib.Nifti1Image(((values - inter) / slope).round().astype(np.int16), np.diag([*spacing, 1.0]))
    image.header.set_slope_inter(slope, inter)
    return image.to_bytes()


def folder(tmp_path, sizes=(10, 8, 6), count=3):
    random = np.random.RandomState(0)
    for number in range(count):
        data = nifti(random.uniform(-900, 900, sizes))
        (tmp_path / f"{number}.nii.gz").write_bytes(gzip.compress(data))
    return tmp_path


def test_values_pass_through_a_file_in_its_numbers(tmp_path):
    data = Folder("", path=str(folder(tmp_path)), resolution=[6, 8, 10], **OPTIONS)
    images = data.load("train")[torch.arange(3)]
    given = nib.load(tmp_path / "1.nii.gz").get_fdata()
    torch.testing.assert_close(images[1, 0], torch.from_numpy(given.T.copy() / 1000).float())
    assert torch.equal(data.form.quantize(images), images)
    data.form.write(images[1], tmp_path / "out")
    back = nib.Nifti1Image.from_bytes(gzip.decompress((tmp_path / "out").read_bytes()))
    assert back.get_data_dtype() == np.int16
    assert back.header.get_zooms() == (1.0, 2.0, 3.0)
    np.testing.assert_array_equal(back.get_fdata(), given)
    assert torch.equal(data.form.read((tmp_path / "out").read_bytes(), data.shape), images[1])
    assert form_of(json.loads(json.dumps(data.form.to_dict()))) == data.form


def test_volumes_are_cropped_and_shrunk_without_aliasing(tmp_path):
    plane = np.add.outer(np.add.outer(np.arange(24.0), 10 * np.arange(16.0)), 20 * np.arange(16.0))
    (tmp_path / "a.nii").write_bytes(nifti(plane - 300, slope=1.0, inter=0.0))
    data = Folder("", path=str(tmp_path), resolution=[8, 8, 8], **OPTIONS)
    assert isinstance(data.form, Volume)
    # Twice as large voxels; the first lies in the middle of two, four of the 24 along W being cut off at either side.
    assert data.form.affine == [[2.0, 0, 0, 4.5], [0, 4.0, 0, 1.0], [0, 0, 6.0, 1.5]]
    values = 1000 * data.load("train")[torch.arange(1)][0, 0]
    x = torch.arange(8.0)
    expected = (4.5 + 2 * x) + 10 * (0.5 + 2 * x)[:, None] + 20 * (0.5 + 2 * x)[:, None, None] - 300
    torch.testing.assert_close(values[1:-1, 1:-1, :], expected[1:-1, 1:-1, :], rtol=0, atol=1e-3)


def test_volumes_keep_their_places_however_their_axes_run(tmp_path):
    """One volume with its axes in three orders and directions is read the same, and written where it was."""
    random = np.random.RandomState(0)
    values, affine = random.randint(-900, 900, (10, 8, 6)), np.diag([1.0, 2, 3, 1])
    affine[:3, 3] = -40, 12.5, 7
    affine[0, 1] = 0.1  # sheared a little
    given = nib.Nifti1Image(values.astype(np.int16), affine)
    (tmp_path / "a.nii").write_bytes(given.to_bytes())
    for name, axes in (("b", "LPS"), ("c", "SAL")):
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(axes))
        )
        turned = given.as_reoriented(turn)
        assert "".join(nib.aff2axcodes(turned.affine)) == axes
        (tmp_path / f"{name}.nii").write_bytes(turned.to_bytes())
    for first in ("a", "b", "c"):
        (tmp_path / "a.nii").write_bytes((tmp_path / f"{first}.nii").read_bytes())
        data = Folder("", path=str(tmp_path), resolution=[6, 8, 10], **OPTIONS)
        images = data.load("train")[torch.arange(3)]
        assert torch.equal(images, images[:1].expand(3, -1, -1, -1, -1))
        data.form.write(images[0], tmp_path / "out")
        back = nib.Nifti1Image.from_bytes((tmp_path / "out").read_bytes())
        np.testing.assert_allclose(back.affine, affine, atol=1e-5)
        np.testing.assert_array_equal(back.get_fdata(), values)


def test_volumes_of_other_voxels_than_the_first_are_refused_by_name(tmp_path):
    """By 1 %, in their own sizes, before they are resized; numbers in .npy have none."""
    for name, spacing in (("a", (1, 2, 3)), ("b", (1, 2.015, 2.985)), ("c", (1, 2, 3.1)), ("d", (2, 4, 6))):
        (tmp_path / f"{name}.nii").write_bytes(nifti(np.zeros((8, 8, 8)), spacing=spacing))
    np.save(tmp_path / "e.npy", np.zeros((8, 8, 8)))
    told = (
        r"use 2 of the volumes; .* c\.nii \(has a voxel spacing of 1 x 2 x 3\.1, and the first file of 1 x 2 x 3; "
        r"resample them to one spacing, as dataset\.spacing of dataset=folder does\); d\.nii \("
    )
    with pytest.raises(ValueError, match=told):
        Folder("", path=str(tmp_path), resolution=[4, 4, 4], **OPTIONS).load("train")


@pytest.mark.parametrize(("unit", "scale"), [("meter", 1e-3), ("mm", 1), ("micron", 1e3), ("unknown", 1)])
def test_places_of_voxels_are_in_mm_whatever_the_unit_of_the_file(tmp_path, unit, scale):
    affine = np.array([[0.4, -0.3, 0, 5], [0.3, 0.4, 0, -7], [0, 0, 3, 9], [0, 0, 0, 1]])
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([scale, scale, scale, 1]) @ affine)
    image.header.set_xyzt_units(unit, "sec")
    held = read_volume(image.to_bytes())
    assert held.spacing is not None
    np.testing.assert_allclose(held.spacing, [0.5, 0.5, 3], rtol=1e-6)
    np.testing.assert_allclose(held.header.affine, affine[:3], rtol=1e-6)
    image.to_filename(tmp_path / "a.nii")
    form = Folder("", path=str(tmp_path), resolution=[6, 5, 4], **OPTIONS).form
    assert isinstance(form, Volume)
    form.write(torch.zeros(1, 6, 5, 4), tmp_path / "b.nii")
    np.testing.assert_allclose(nib.load(tmp_path / "b.nii").affine, affine, rtol=1e-5)
    # Earlier versions stored the numbers of the file; their runs continue.
    assert form.difference(replace(form, affine=(np.array(form.affine) * scale).tolist())) is None
    assert form.difference(replace(form, affine=(np.array(form.affine) * 2).tolist())) is not None


@pytest.mark.parametrize("flip", [None, False, True])
def test_what_has_a_left_and_a_right_is_mirrored_only_if_asked(tmp_path, flip):
    options: dict = OPTIONS | {"flip": flip}
    assert Folder("", path=str(folder(tmp_path)), resolution=[6, 8, 10], **options).flip == bool(flip)


def test_a_volume_that_lies_nowhere_is_refused():
    data = bytearray(nifti(np.zeros((2, 2, 2))))
    data[254:256], data[280:328] = b"\1\0", bytes(48)  # sform_code, and the rows of the affine
    with pytest.raises(ValueError, match="has an affine that is singular"):
        read_volume(bytes(data))


def test_inputs_of_an_edit_are_volumes(tmp_path):
    data = Folder("", path=str(folder(tmp_path)), resolution=[6, 8, 10], **OPTIONS)
    given = data.load("train")[torch.arange(3)]
    found = read_input(str(tmp_path), [data.shape], False, None, data.form)
    assert torch.equal(torch.stack([item.pixels for item in found]), given)
    with pytest.raises(
        UsageError,
        match=r"0\.nii\.gz: is 10 x 8 x 6 gray, but must be 4 x 4 x 4 gray; convert it, or set fit=true",
    ):
        read_input(str(tmp_path), [(1, 4, 4, 4)], False, None, data.form)


def test_a_resolution_in_the_opposite_order_is_named(tmp_path):
    path = str(folder(tmp_path, sizes=(16, 8, 4)))
    remarks = Folder("", path=path, resolution=[16, 8, 4], **OPTIONS).remarks()
    said = "dataset.resolution=[16,8,4]: keeps 2 % of the first volume, 4 x 8 x 16 (depth x height x width); "
    assert remarks == [said + "[4,8,16] keeps 100 %"]
    for right in ([4, 8, 16], [2, 4, 8], [4, 4, 4]):
        assert not Folder("", path=path, resolution=right, **OPTIONS).remarks()


def test_wrong_volumes_are_named(tmp_path):
    options: dict = OPTIONS | {"range": None}
    with pytest.raises(ValueError, match=r"dataset.range=null: volumes need the values \[low,high\]"):
        Folder("", path=str(folder(tmp_path)), resolution=[6, 8, 10], **options)
    options = OPTIONS | {"depth": 8}
    with pytest.raises(ValueError, match=r"dataset.depth=8: not supported for volumes; leave it out"):
        Folder("", path=str(tmp_path), resolution=[6, 8, 10], **options)
    data = nifti(np.zeros((4, 4, 4)))
    for damaged in (
        data[:-10],
        data[:100],
        gzip.compress(data)[:-4],
        gzip.compress(bytes(2**28 + 1)),
        b"",
        b"\x93NUMPY",
    ):
        with pytest.raises(ValueError, match=r"."):
            read_volume(damaged)


@pytest.mark.slow
def test_volumes_are_trained_on_and_sampled(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    files = folder(tmp_path / "data", (8, 8, 8), 6)
    words = [
        "dataset=folder",
        f"dataset.path={files}",
        "dataset.resolution=[8,8,8]",
        "dataset.range=[-1000,1000]",
    ]
    words += [
        "dataset.channels=1",
        "dataset.val_fraction=0.3",
        "model=unet3d_tiny",
        "model.channels=8",
        "model.head_channels=8",
    ]
    words += [
        "max_steps=2",
        "batch_size=2",
        "preview_every=2",
        "trainer=cpu",
        "output_dir=.",
        "name=run",
        "precision=fp32",
    ]
    assert run(["train", *words]) == 0
    assert run(["sample", "run=run", "num_samples=2", "steps=2", "sampler=ddim", "output=out"]) == 0
    image = nib.load("out/000001.nii.gz")
    assert image.shape == (8, 8, 8)
    assert image.get_data_dtype() == np.int16
    assert image.header.get_zooms() == (1.0, 2.0, 3.0)
    assert (tmp_path / "out" / "grid.gif").is_file()
    moved = np.diag([1.0, 2, 3, 1])
    moved[:3, 3] = 70, -30, 5
    for name, axes in (("x", "RAS"), ("y", "LPS")):
        given = nib.Nifti1Image(np.full((8, 8, 8), 100, np.int16), moved)
        turn = nib.orientations.axcodes2ornt(tuple(axes))
        nib.save(
            given.as_reoriented(nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], turn)),
            f"{name}.nii",
        )
    edit = [
        "edit",
        "run=run",
        "steps=2",
        "sampler=ddim",
        "edit=inpaint",
        "restoration=replacement",
        "input=[x.nii,y.nii]",
    ]
    assert run([*edit, "output=edits"]) == 0
    for name in ("x", "y"):
        edited, given = nib.load(f"edits/{name}.nii.gz"), nib.load(f"{name}.nii")
        np.testing.assert_array_equal(edited.affine, given.affine)
    nib.save(nib.Nifti1Image(np.full((8, 8, 8), 100, np.int16), np.diag([1.0, 2, 3, 1])), "x.nii")
    assert run([*edit, "output=edits"]) == 2
    assert "forms.x.affine=" in capsys.readouterr().err  # the same numbers at another place are another input
