"""Masks and inputs of `diffuse edit`: cropped alike, matched by name, of images and of volumes."""

import gzip
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from diffusion_cli.commands.inputs import Input, read_input
from diffusion_cli.commands.masks import read_masks
from diffusion_cli.data import Folder, resized_region
from diffusion_cli.errors import UsageError
from diffusion_cli.formats import HighDepthImage, PointCloud, Uint8Image, Volume
from diffusion_cli.system.tensors import digest
from helpers.data import zipped
from helpers.editing import edit, pixels

GRAY, GRAY_SHAPE = Uint8Image(), (1, 8, 8)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)
    return path


def marked(shape, *rows_and_columns):
    """A black mask, white at some pixels."""
    mask = np.zeros(shape, np.uint8)
    for at in rows_and_columns:
        mask[at] = 255
    return mask


def regions(mask, *files, fit=True, form=GRAY, shape=GRAY_SHAPE):
    given = read_input([str(file) for file in files], [shape], fit, None, form)
    return read_masks(str(mask), given, shape[1:])


@pytest.mark.parametrize("form", [GRAY, HighDepthImage("uint8", [0.0], [200.0], "png")])
def test_a_mask_of_the_photo_is_cropped_and_resized_as_the_photo(tmp_path, form):
    """Of 24 rows, 4 to 19 remain; a pixel of the result is painted if one of its four pixels is."""
    photo = save(tmp_path / "photo.png", np.zeros((24, 16), np.uint8))
    mask = marked((24, 16), (slice(4, 8), slice(0, 4)), (19, 15), (2, 8))
    (region,) = regions(save(tmp_path / "mask.png", mask), photo, form=form)[:, 0]
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:2, :2] = expected[7, 7] = True
    assert torch.equal(region, expected)


@pytest.mark.parametrize("size", [(30, 20), (20, 30), (5, 7), (100, 9), (8, 8)])
def test_the_crop_of_masks_is_that_of_fitted_photos(tmp_path, size):
    """A photo that is its own mask is painted where it is white after nearest-neighbour resizing, at least."""
    image = np.random.default_rng(0).choice([0, 255], size).astype(np.uint8)
    file = save(tmp_path / "photo.png", image)
    (item,) = read_input(str(file), [GRAY_SHAPE], True, None, GRAY)
    own = np.array(ImageOps.fit(Image.fromarray(image), (8, 8), Image.Resampling.LANCZOS))
    assert (item.pixels[0].numpy() == own).all()
    nearest = np.array(ImageOps.fit(Image.fromarray(image), (8, 8), Image.Resampling.NEAREST)) > 0
    region = read_masks(str(file), [item], [8, 8])[0, 0].numpy()
    assert (region | ~nearest).all()
    assert item.grid is not None
    assert (item.grid.part is None) == (size == (8, 8))
    unmarked = torch.zeros(size, dtype=torch.bool)
    assert item.grid.part is None or not resized_region(unmarked, item.grid.part, [8, 8]).any()


def test_a_turned_photo_and_its_upright_mask(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    photo = save(tmp_path / "photo.jpg", np.zeros((16, 32), np.uint8), exif=exif)
    mask = save(tmp_path / "mask.png", marked((32, 16), (slice(8, 16), slice(0, 8))))
    (region,) = regions(mask, photo)[:, 0]
    assert region.sum() == 16
    assert region[:4, :4].all()


def test_a_mask_of_the_size_of_the_model_marks_its_pixels(tmp_path):
    photo = save(tmp_path / "photo.png", np.zeros((24, 16), np.uint8))
    mask = save(tmp_path / "mask.png", marked((8, 8), (2, 3)))
    assert regions(mask, photo).nonzero().tolist() == [[0, 0, 2, 3]]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (marked((5, 5), (1, 1)), "has 5 x 5 pixels, but the images have 8 x 8, and the file "),
        (marked((24, 16), (0, 0)), "has its white pixel outside the central part that fit=true keeps"),
        (marked((24, 16)), "has no white pixel, so there is nothing to generate"),
    ],
)
def test_a_mask_that_marks_nothing_of_the_photo_is_refused(tmp_path, mask, expected):
    photo = save(tmp_path / "photo.png", np.zeros((24, 16), np.uint8))
    with pytest.raises(UsageError, match=re.escape(f"mask.png: {expected}")):
        regions(save(tmp_path / "mask.png", mask), photo)


def test_each_input_has_the_mask_of_its_name(edit_runs, tmp_path):
    """Masks lie in a folder inside that of the inputs, of two sizes; or both lie in archives."""
    random = np.random.default_rng(0)
    for name, size in (("a", (24, 16)), ("b/c", (8, 8))):
        save(tmp_path / "in" / f"{name}.png", random.integers(0, 256, size, np.uint8))
    save(tmp_path / "in" / "masks" / "a.png", marked((24, 16), (slice(4, 8), slice(0, 4))))
    save(tmp_path / "in" / "masks" / "b" / "c.png", marked((8, 8), (slice(6, 8), slice(5, 8))))
    words = ["fit=true", "restoration=replacement"]
    inside = [f"input={tmp_path}/in", f"edit.mask={tmp_path}/in/masks", f"output={tmp_path}/out"]
    assert edit(edit_runs, *words, *inside) == 0
    for name, part in (("a", (slice(0, 2), slice(0, 2))), ("c", (slice(6, 8), slice(5, 8)))):
        before = pixels(tmp_path / "in" / ("b/c.png" if name == "c" else "a.png"))
        fitted = ImageOps.fit(Image.fromarray(before.astype(np.uint8)), (8, 8), Image.Resampling.LANCZOS)
        change = pixels(tmp_path / "out" / f"{name}.png") != np.array(fitted)
        assert change[part].any()
        change[part] = False
        assert not change.any()
    masks = zipped(tmp_path / "in" / "masks", tmp_path / "masks.zip")
    (tmp_path / "in" / "masks").rename(tmp_path / "elsewhere")
    packed = [f"input={zipped(tmp_path / 'in', tmp_path / 'in.zip')}", f"edit.mask={masks}"]
    assert edit(edit_runs, *words, *packed, f"output={tmp_path}/packed") == 0
    for name in ("a.png", "c.png"):
        assert (pixels(tmp_path / "packed" / name) == pixels(tmp_path / "out" / name)).all()


def test_masks_of_a_folder_need_inputs_of_their_names(tmp_path):
    photo = save(tmp_path / "photo.png", np.zeros((8, 8), np.uint8))
    save(tmp_path / "masks" / "other.png", marked((8, 8), (0, 0)))
    with pytest.raises(UsageError, match=r"masks: has no mask for '.*'; give each image one mask"):
        regions(tmp_path / "masks", photo)
    with pytest.raises(UsageError, match="masks of a folder are matched with input files by name"):
        read_masks(str(tmp_path / "masks"), [Input("val_0", torch.zeros(GRAY_SHAPE))], [8, 8])


def test_a_photo_is_its_own_mask_where_it_is_erased(tmp_path, capsys):
    erased = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    erased[..., 3] = 255
    erased[4:8, 4:8, 3] = 0
    for name in "ab":
        save(tmp_path / "in" / f"{name}.png", erased)
    given = read_input(str(tmp_path / "in"), [(3, 8, 8)], True, None, GRAY, mask_path=str(tmp_path / "in"))
    (region,) = read_masks(str(tmp_path / "in"), given, [8, 8])[:, 0]
    assert region.nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]
    said = capsys.readouterr().err
    assert "the transparent part is painted, whatever its colours (2 masks)" in said
    assert "become white" not in said
    read_input(str(tmp_path / "in" / "a.png"), [(3, 8, 8)], True, None, GRAY)
    said = capsys.readouterr().err
    assert f"input: transparent parts become white in {tmp_path}/in/a.png; edit=inpaint edit.mask=" in said


def test_an_edit_with_one_mask_is_continued_by_later_versions(edit_runs, tmp_path):
    """Its digest in the manifest is that of the known pixels, bool [1, 1, H, W], as it always was."""
    mask = save(tmp_path / "mask.png", marked((8, 8), (2, 3)))
    assert edit(edit_runs, f"input={edit_runs}/images", f"edit.mask={mask}", f"output={tmp_path}/out") == 0
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    known = torch.from_numpy(marked((8, 8), (2, 3)) == 0)[None, None]
    assert settings["read_sha256"] == {"mask": digest({"mask": known})}


# Volumes. A model of 4 x 5 x 6 voxels [D, H, W], trained on files of 16 x 10 x 8 [W, H, D], twice as fine.
SIZES, MODEL = (16, 10, 8), (1, 4, 5, 6)


@pytest.fixture
def volumes(tmp_path):
    """A folder of two volumes, the format and the images that training reads."""
    nib = pytest.importorskip("nibabel")
    random, affine = np.random.default_rng(0), np.diag([1.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = -40, 12, 7
    for name in ("p001", "p002"):
        values = random.integers(-900, 900, SIZES).astype(np.int16)
        data = nib.Nifti1Image(values, affine).to_bytes()
        (tmp_path / "scans").mkdir(exist_ok=True)
        (tmp_path / "scans" / f"{name}.nii.gz").write_bytes(gzip.compress(data))
    dataset = Folder(
        "",
        path=str(tmp_path / "scans"),
        resolution=[*MODEL[1:]],
        channels=1,
        range=[-1000, 1000],
        val_fraction=0,
    )
    assert isinstance(dataset.form, Volume)
    return tmp_path / "scans", dataset.form, dataset.load("train")[torch.arange(2)], affine


def labels(path, voxels, affine, axes="RAS"):
    """Write labels [W, H, D] as a NIfTI whose axes run in other directions."""
    nib = pytest.importorskip("nibabel")
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(axes))
    )
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(nib.Nifti1Image(voxels, affine).as_reoriented(turn).to_bytes())
    return path


def test_a_file_of_training_is_an_input_as_training_saw_it(volumes):
    scans, form, seen, _ = volumes
    given = read_input(str(scans), [MODEL], True, None, form)
    assert torch.equal(torch.stack([item.pixels for item in given]), form.quantize(seen))
    assert given[0].form == form  # the place of the first file, cropped and resized
    with pytest.raises(UsageError, match=r"is 16 x 10 x 8 gray, but must be 6 x 5 x 4 gray; .* set fit=true"):
        read_input(str(scans), [MODEL], False, None, form)


def test_voxels_of_other_proportions_than_those_of_training_are_refused(volumes):
    scans, form, _, affine = volumes
    labels(scans / "wide.nii", np.zeros(SIZES, np.int16), affine @ np.diag([1, 1, 2, 1]))
    with pytest.raises(
        UsageError, match=r"voxel spacing of 1 x 2 x 6, which is not proportional to 2 x 4 x 6"
    ):
        read_input(str(scans / "wide.nii"), [MODEL], True, None, form)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAL"])
def test_labels_of_a_volume_mark_its_voxels_however_their_axes_run(volumes, tmp_path, axes):
    """Of 16 x 10 x 8 voxels, 12 x 10 x 8 from the third along W remain, and are halved."""
    scans, form, _, affine = volumes
    voxels = np.zeros(SIZES, np.int16)
    voxels[2:4, 2:4, 6:8] = 1
    voxels[13, 9, 0] = 3
    mask = labels(tmp_path / "mask.nii", voxels, affine, axes)
    (region,) = regions(mask, *sorted(scans.iterdir()), form=form, shape=MODEL)[:, 0]
    assert region.nonzero().tolist() == [[0, 4, 5], [3, 1, 0]]


def test_volumes_have_masks_by_name_and_images_mark_every_slice(volumes, tmp_path):
    scans, form, _, affine = volumes
    for number, name in enumerate(("p001", "p002")):
        voxels = np.zeros(SIZES, np.int16)
        voxels[2 + 2 * number, 0, 0] = 1
        labels(tmp_path / "masks" / f"{name}.nii", voxels, affine)
    given = read_input(str(scans), [MODEL], True, None, form)
    found = read_masks(str(tmp_path / "masks"), given, MODEL[1:])
    assert found[:, 0].nonzero().tolist() == [[0, 0, 0, 0], [1, 0, 0, 1]]
    for size, at in (((10, 16), (4, 6)), ((5, 6), (2, 2))):  # of the files, and of the model
        found = read_masks(str(save(tmp_path / "slice.png", marked(size, at))), given, MODEL[1:])
        assert found.nonzero().tolist() == [[0, 0, depth, 2, 2] for depth in range(4)]


def test_labels_that_lie_elsewhere_than_their_volume_are_refused(volumes, tmp_path):
    scans, form, _, affine = volumes
    moved = affine.copy()
    moved[0, 3] += 5
    mask = labels(tmp_path / "mask.nii", np.ones(SIZES, np.int16), moved)
    with pytest.raises(
        UsageError, match=r"mask\.nii: lies up to 5 voxels away from its volume by its affine"
    ):
        regions(mask, *scans.iterdir(), form=form, shape=MODEL)


def test_inputs_of_point_clouds_are_their_files(tmp_path):
    form, points = PointCloud(1.0), torch.rand(3, 16)
    stored = form.quantize(points[None])[0]
    form.write(stored, tmp_path / "a.ply")
    (item,) = read_input(str(tmp_path), [(3, 16)], False, None, form)
    assert torch.equal(item.pixels, stored)
