"""Edits of files with values of a range: known values come back as they were, and names stay those of the files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.formats import HighDepthImage, Original
from diffusion_cli.images import rows
from helpers import TINY

nib = pytest.importorskip("nibabel")
SIZE, BOX = 8, (slice(1, 4),) * 3
EDIT = ["edit", "run=t", "steps=2", "device=cpu", "restoration=replacement"]
MASK = "edit.mask=[1,1,1,4,4,4]"


def scan(seed=0, dtype=np.int16):
    """Values [W, H, D], of which many lie outside [-1000, 1000]."""
    return np.random.default_rng(seed).normal(0, 1000, (SIZE,) * 3).astype(dtype)


def save(path, values, slope=None):
    image = nib.Nifti1Image(values, np.diag([1.0, 2, 3, 1]))
    if slope is not None:
        image.header.set_slope_inter(slope, -3.0)
    image.to_filename(path)
    return nib.load(path).get_fdata()


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A folder with the run `t`, trained on the volumes in `scans` for one step."""
    root = tmp_path_factory.mktemp("volumes")
    (root / "scans").mkdir()
    for number in range(10):
        save(root / "scans" / f"patient {number}.nii.gz", scan(number))
    words = [
        "dataset=folder", f"dataset.path={root}/scans", "dataset.channels=1", "dataset.resolution=[8,8,8]",
        "dataset.range=[-1000,1000]", "model=unet3d_tiny", "batch_size=2", "max_steps=1", "name=t",
        "preview_real=false",
    ]  # fmt: skip
    assert run([*TINY, *words, f"output_dir={root}/outputs"]) == 0
    return root


@pytest.fixture(autouse=True)
def here(scans, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").symlink_to(scans / "outputs")
    return tmp_path


def changed(path, given):
    """The voxels of a result that differ from those of its input; none outside the box."""
    different = nib.load(path).get_fdata() != given
    assert different[BOX].mean() > 0.5
    different[BOX] = False
    return int(different.sum())


def test_known_voxels_outside_the_range_come_back_as_they_were(scans, capsys):
    given = nib.load(scans / "scans" / "patient 0.nii.gz").get_fdata()
    assert (np.abs(given) > 1000).mean() > 0.2
    words = [f"input={scans}/scans", MASK, "num_images=2", "variations=2", "output=out"]
    assert run([*EDIT, "edit=inpaint", *words]) == 0
    for name in ("patient 0_0", "patient 0_1"):
        assert changed(f"out/{name}.nii.gz", given) == 0
    said = capsys.readouterr().out
    assert "Error on the known values: root mean square 0, at most 0 of 2000" in said
    assert "clipped" not in said
    assert run([*EDIT, "edit=inpaint", *words]) == 0  # nothing is left to do


def test_a_run_keeps_no_picture_of_training_scans_if_asked(scans):
    assert (scans / "outputs" / "t" / "config.yaml").is_file()
    assert not (scans / "outputs" / "t" / "previews" / "real.png").exists()


def test_a_likelihood_of_one_scan_names_the_keys_that_give_more(capsys):
    assert run(["eval", "run=t", "metric=flow_likelihood", "device=cpu", "cache_dir=cache"]) == 2
    assert (
        "metric.flow_likelihood.split=val: gives 1 image; a standard error needs 2; "
        "set metric.flow_likelihood.split=train" in capsys.readouterr().err
    )


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int32, "scaled"])
def test_known_voxels_keep_the_numbers_of_their_file(dtype):
    """Training had int16 of slope 1, which stores neither fractions nor large numbers."""
    values = np.abs(scan()).astype(np.uint8) if dtype == np.uint8 else scan()
    values = {np.float32: values + 0.3, np.int32: values.astype(np.int32) * 1000}.get(dtype, values)
    stored = np.int16 if dtype == "scaled" else dtype
    given = save("x.nii", values.astype(stored), 0.25 if dtype == "scaled" else None)
    assert run([*EDIT, "edit=inpaint", "input=x.nii", MASK, "output=out"]) == 0
    assert changed("out/x.nii.gz", given) == 0
    assert nib.load("out/x.nii.gz").get_data_dtype() == (np.int16 if dtype == np.uint8 else stored)


def test_maps_of_anomalies_have_the_geometry_of_their_volumes(scans, capsys):
    """Means of two variations in the units of the files; the image of the truth applies to every slice."""
    turned = np.diag([-1.0, -2, 3, 1])  # width and height run to the left and to the back
    nib.Nifti1Image(scan().clip(-1000, 1000), turned).to_filename("x.nii")
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[2:4, 5:] = 255
    Image.fromarray(mask).save("truth.png")
    words = ["edit=anomaly", "input=x.nii", "edit.truth=truth.png", "variations=2", "output=out"]
    assert run(["edit", "run=t", "steps=2", "device=cpu", *words]) == 0
    given, found = nib.load("x.nii"), nib.load("out/maps/x.nii.gz")
    np.testing.assert_array_equal(found.affine, given.affine)
    assert found.get_data_dtype() == np.float32
    made = [nib.load(f"out/x_{number}.nii.gz").get_fdata() for number in range(2)]
    apart = np.mean([np.abs(given.get_fdata() - one) for one in made], 0)
    np.testing.assert_allclose(found.get_fdata(), apart, atol=0.51)
    assert json.loads(Path("out/scores.json").read_text())["pixels"]["anomalous"] == 6 / 64
    assert "Scores of voxels: AUROC 0." in capsys.readouterr().out


def test_validation_volumes_come_back_as_they_were(scans, capsys):
    words = ["input=val", "num_images=7", MASK, "output=out"]
    assert run([*EDIT, "edit=inpaint", *words]) == 0
    (number,) = [
        number
        for number in range(10)
        if (nib.load("out/held_out_00000.nii.gz").get_fdata() == scan(number))[4:].all()
    ]
    assert changed("out/held_out_00000.nii.gz", scan(number)) == 0
    assert "num_images=7: input=val has only 1" in capsys.readouterr().err


def test_the_known_part_of_a_larger_result_comes_back(capsys):
    given = save("x.nii", scan())
    words = ["edit=outpaint", "input=x.nii", "output=out"]
    assert run([*EDIT, *words, "edit.left=2", "edit.top=1"]) == 0
    assert np.array_equal(nib.load("out/x.nii.gz").get_fdata()[2:, 1:], given)
    assert "at most 0 of 2000" in capsys.readouterr().out


def test_clipped_values_of_resized_inputs_are_counted(capsys):
    double = scan().repeat(2, 0).repeat(2, 1).repeat(2, 2)
    save("x.nii", double)
    outside = int((np.abs(double) > 1000).sum())
    most = np.abs(double.astype(int)).max() - 1000
    said = (
        f"\n{outside} values of the inputs lie outside dataset.range and were clipped (by at most {most:.3g})"
    )
    assert run([*EDIT, "edit=inpaint", "input=x.nii", MASK, "output=out", "fit=true"]) == 0
    assert said in capsys.readouterr().out
    save("x.nii", scan())
    words = ["edit=super_resolution", "input=x.nii", "output=larger"]
    assert run([*EDIT, *words]) == 0  # it changes every voxel
    assert "values of the inputs lie outside dataset.range" in capsys.readouterr().out


def test_images_of_a_range_keep_their_values(tmp_path):
    """A part of the photo outside the range, of a result with more channels than one."""
    form = HighDepthImage("uint16", [100.0, 0.0], [200.0, 10.0], "tiff")
    original = Original(np.stack([np.arange(16.0).reshape(4, 4) * 30, np.full((4, 4), 7.0)]), {})
    known = torch.ones(1, 4, 4, dtype=torch.bool)
    known[0, 1, 1] = False
    result = form.completed(torch.zeros(2, 4, 4), original, known)
    expected = original.values.copy()
    expected[:, 1, 1] = 150, 5
    result.write(tmp_path / "x.tif")
    np.testing.assert_array_equal(form.held((tmp_path / "x.tif").read_bytes()), expected)
    assert not result.errors.any()
    assert form.beyond(original.values)[0, 0].tolist() == [100, 70, 40, 10]
    assert not form.beyond(original.values)[1].any()


def test_results_have_the_names_of_compressed_files(scans):
    words = ["edit=inpaint", f"input={scans}/scans/patient 0.nii.gz", MASK, "output=out"]
    assert run([*EDIT, *words]) == 0
    assert sorted(file.name for file in Path("out").glob("[!.]*")) == [
        "before", "grid.png", "manifest.json", "patient 0.nii.gz",
    ]  # fmt: skip
    assert json.loads(Path("out/manifest.json").read_text())["settings"]["inputs"][0][0] == "patient 0"


@pytest.mark.parametrize("output", [["output=out"], []])
def test_results_of_earlier_names_continue(scans, monkeypatch, output):
    """Earlier versions took only .gz from a name."""
    words = ["edit=inpaint", f"input={scans}/scans", MASK, "num_images=2", f"seed={len(output)}", *output]
    with monkeypatch.context() as earlier:
        earlier.setattr("diffusion_cli.commands.inputs.stem", lambda path: path.stem)
        assert run([*EDIT, *words]) == 0
    (folder,) = [
        manifest.parent
        for manifest in [*Path().glob("out/manifest.json"), *(scans / "outputs").rglob("manifest.json")]
        if (manifest.parent / "patient 0.nii.nii.gz").exists()
    ]
    before = sorted(folder.rglob("*"))
    (folder / "patient 1.nii.nii.gz").unlink()
    assert run([*EDIT, *words]) == 0
    assert sorted(folder.rglob("*")) == before


def test_results_of_an_earlier_geometry_continue(monkeypatch):
    """Earlier versions wrote results in RAS+ axes and in the size of the model."""
    given = nib.Nifti1Image(scan().repeat(2, 0).repeat(2, 1).repeat(2, 2), np.diag([-1.0, 2, 3, 1]))
    for name in "xy":
        given.to_filename(f"{name}.nii")
    words = ["edit=inpaint", "input=[x.nii,y.nii]", MASK, "fit=true", "output=out"]
    with monkeypatch.context() as earlier:
        earlier.setattr("diffusion_cli.commands.inputs.InputVolume.of", lambda *_: None)
        assert run([*EDIT, *words]) == 0
    Path("out/y.nii.gz").unlink()
    assert run([*EDIT, *words]) == 0
    assert [nib.load(f"out/{name}.nii.gz").shape for name in "xy"] == [(SIZE,) * 3] * 2
    words[-1] = "output=new"
    assert run([*EDIT, *words]) == 0
    image = nib.load("new/x.nii.gz")
    np.testing.assert_array_equal(image.affine, given.affine)
    different = image.get_fdata() != given.get_fdata()
    inside = slice(2 * 1 - 2, 2 * 4 + 2)  # the mask, and the voxels that it touches
    assert not different[:, :, inside.stop :].any()
    assert different.any()


def test_the_picture_shows_the_slices_through_the_painted_region(scans):
    """The box covers the voxels from 0 to 2 of 8: the middle slices miss it."""
    words = ["edit=inpaint", f"input={scans}/scans/patient 0.nii.gz", "output=out", "captions=false"]
    assert run([*EDIT, *words, "edit.mask=[0,0,0,3,3,3]"]) == 0
    given, result = (
        np.clip(nib.load(file).get_fdata()[..., 1].T / 1000, -1, 1)
        for file in (words[1][6:], "out/patient 0.nii.gz")
    )
    grid = np.array(Image.open("out/grid.png")).astype(int)
    scale = 32 // SIZE
    cells = [
        grid[1:-1:scale, 1 + at : 1 + at + 8 * scale : scale]
        for at in range(0, grid.shape[1], 24 * scale + 2)
    ]
    for cell, values in ((cells[0], given), (cells[2], result)):
        np.testing.assert_allclose(cell, 127.5 * (values + 1), atol=0.51)
    assert (cells[1][:3, :3] == 128).all()


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((8, 8), (34, 34)),
        ((20, 20), (42, 42)),
        ((20, 60), (42, 122)),
        ((32, 32), (34, 34)),
        ((2, 400), (4, 402)),
    ],
)
def test_small_images_are_enlarged_by_their_short_side(shape, size):
    assert rows([torch.zeros(1, 1, *shape, dtype=torch.uint8)]).shape[1:] == size
