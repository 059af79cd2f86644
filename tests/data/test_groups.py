"""Groups of images, such as patients, that lie on one side of the split."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.data import Folder
from diffusion_cli.data.base import Split, named_mask
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics.neighbours import nearest
from diffusion_cli.metrics.rows import Rows
from diffusion_cli.system.seeding import mix
from helpers.data import array, folder, save, zipped
from helpers.formats import dicom

PATIENTS, VISITS = 40, 5
NAMES = [f"patient{number:03d}" for number in range(PATIENTS)]
SPLITS: tuple[Split, ...] = "train", "val"
FIRST_FOLDER, PREFIX = "([^/]+)/", r"^([^_/]+)_"


def near_copies() -> tuple[np.ndarray, list[str]]:
    """Images [N, 8, 8] of patients in turn, each with several that differ by little noise; and their patients."""
    draw = np.random.default_rng(0)
    anatomy = draw.integers(20, 236, (PATIENTS, 1, 8, 8))
    images = anatomy + draw.integers(-4, 5, (PATIENTS, VISITS, 8, 8))
    return images.reshape(-1, 8, 8).astype(np.uint8), [name for name in NAMES for _ in range(VISITS)]


def written(path: Path, name: str) -> Path:
    """The images as files, named by patient and visit."""
    for number, (image, patient) in enumerate(zip(*near_copies(), strict=True)):
        save(path / name.format(patient=patient, visit=number % VISITS), image)
    return path


def sides(dataset: Folder, of: Callable[[str], Any]) -> tuple[set, set]:
    """What `of` finds in the names of the training files, and of the validation files."""
    return {of(name) for name in dataset.stream("train").names}, {
        of(name) for name in dataset.stream("val").names
    }


def chosen(names: list[str], val_fraction: float) -> set[str]:
    """The groups whose hash is below the threshold."""
    return {name for name, is_val in zip(names, named_mask(names, val_fraction), strict=True) if is_val}


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("{patient}/slice_{visit}.png", FIRST_FOLDER),
        ("{patient}_slice{visit}.png", PREFIX),
        ("visit{visit}/{patient}.png", r"(patient\d+)"),
    ],
)
def test_a_pattern_keeps_the_files_of_a_group_together(tmp_path, kind, name, group):
    path = written(tmp_path / "x", name)
    path = path if kind == "folder" else zipped(path, tmp_path / "x.zip")
    dataset = folder(path, labels="none", val_fraction=0.2, group=group)
    start = name.index("{patient}") if name.startswith("{") else len("visit0/")
    train, val = sides(dataset, lambda file: file[start : start + len(NAMES[0])])
    assert val == chosen(NAMES, 0.2)
    assert train == {*NAMES} - val
    assert dataset.num_groups == {"train": len(train), "val": len(val)}
    assert dataset.remarks() == []


def test_groups_stay_where_they_are_when_files_come(tmp_path):
    path = written(tmp_path, "{patient}/{visit}.png")
    before = sides(folder(path, group=FIRST_FOLDER, val_fraction=0.2), lambda name: name[:10])
    for patient in (NAMES[3], "other"):
        save(path / patient / "new.png", np.zeros((8, 8), np.uint8))
    after = sides(folder(path, group=FIRST_FOLDER, val_fraction=0.2), lambda name: name[:10])
    assert [{*old} - {*new} for old, new in zip(before, after, strict=True)] == [set(), set()]


@pytest.mark.parametrize("table", ["labels.csv", "metadata.jsonl"])
def test_a_column_names_the_groups(tmp_path, table):
    numbers = range(60)
    for number in numbers:
        save(tmp_path / f"{number}.png", np.full((8, 8), number, np.uint8))
    rows = [f"{number}.png,{number % 20},{number % 2}" for number in numbers]
    objects = [f'{{"file": "{n}.png", "patient": {n % 20}, "label": "{n % 2}"}}' for n in numbers]
    lines = ["file,patient,label", *rows] if table.endswith("csv") else objects
    (tmp_path / table).write_text("\n".join(lines))
    dataset = folder(tmp_path, label="label", val_fraction=0.2, group="patient")
    train, val = sides(dataset, lambda name: str(int(name[:-4]) % 20))
    assert val == chosen([*map(str, range(20))], 0.2)
    assert not train & val
    # A run does not continue after a patient has moved to the other side.
    before = dataset.stream("train").fingerprint()
    one = next(iter(val))
    (tmp_path / table).write_text(
        "\n".join(lines).replace(f",{one},", ",new,").replace(f": {one},", ': "new",')
    )
    after = folder(tmp_path, label="label", val_fraction=0.2, group="patient").stream("train").fingerprint()
    assert after != before


def test_files_that_cannot_be_decoded_are_left_out_with_their_groups(tmp_path):
    path = written(tmp_path / "x", "{patient}/{visit}.png")
    for patient in NAMES[::2]:
        (path / patient / "1.png").write_bytes(b"none")
    settings = {"data_dir": str(tmp_path / "data"), "unreadable": "skip", "val_fraction": 0.2}
    dataset = folder(path, group=FIRST_FOLDER, **settings)
    assert sides(dataset, lambda name: name[:10]) == ({*NAMES} - chosen(NAMES, 0.2), chosen(NAMES, 0.2))
    assert len(dataset.load("train")) + len(dataset.load("val")) == PATIENTS * VISITS - PATIENTS // 2


def siblings(dataset: Folder) -> float:
    """Share of validation images whose nearest training image is of the same patient."""
    train, val = (dataset.stream(split) for split in SPLITS)
    pixels = [Rows(part[torch.arange(len(part))].flatten(1).float().numpy()) for part in (val, train)]
    _, which = nearest(pixels[0], pixels[1], 1, torch.device("cpu"), "")
    pairs = zip(val.names, which[:, 0].tolist(), strict=True)
    return float(np.mean([name[:10] == train.names[row][:10] for name, row in pairs]))


def test_without_groups_the_nearest_training_image_is_a_sibling(tmp_path):
    path = written(tmp_path, "{patient}/{visit}.png")
    assert siblings(folder(path, labels="none", val_fraction=0.2)) == 1
    assert siblings(folder(path, labels="none", val_fraction=0.2, group=FIRST_FOLDER)) == 0


def scans(path: Path, patients: list[str]) -> Path:
    path.mkdir()
    for number, patient in enumerate(patients):
        values = np.full((8, 8), number, np.int16)
        (path / f"{number}.dcm").write_bytes(dicom(values, PatientID=patient))
    return path


def test_patients_of_dicom_files_stay_together(tmp_path):
    ids = [f"P{number % 10}" for number in range(40)]
    path = scans(tmp_path / "ct", ids)
    settings = {"channels": 1, "val_fraction": 0.2, "range": [0, 100]}
    (line,) = (line for line in folder(path, **settings).remarks() if "by PatientID" in line)
    assert line.startswith(f"dataset.path={path}: ")
    assert line.endswith(
        " in both splits, by PatientID; dataset.group=PatientID keeps patients of a new run together"
    )
    dataset = folder(path, group="PatientID", **settings)
    train, val = sides(dataset, lambda name: ids[int(name[:-4])])
    assert val == chosen(sorted({*ids}), 0.2)
    assert not train & val
    assert not any("by PatientID" in line for line in dataset.remarks())
    one = scans(tmp_path / "anonymous", ["NONE"] * 40)
    assert not any("by PatientID" in line for line in folder(one, **settings).remarks())
    with pytest.raises(
        UsageError, match=r"^dataset\.group=PatientID: all 40 images are in one group, 'NONE'"
    ):
        folder(one, group="PatientID", **settings)
    some = scans(tmp_path / "some", ["A", "B", "", "A"])
    remedy = r"1 image without a group: '2\.dcm'; use a pattern of their names, such as '\(\[\^/\]\+\)/'"
    with pytest.raises(UsageError, match=rf"^dataset\.group=PatientID: {remedy}"):
        folder(some, group="PatientID", **settings)


def test_series_of_a_patient_stay_together(tmp_path):
    pytest.importorskip("nibabel")
    place = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [1, 1]}
    for number in range(12):
        series = tmp_path / f"ct/s{number:02d}"
        series.mkdir(parents=True)
        for depth in range(4):
            own = {"SeriesInstanceUID": f"1.2.{number}", "PatientID": f"P{number // 3}"}
            data = dicom(
                np.full((4, 4), number, np.int16), **place, **own, ImagePositionPatient=[0, 0, depth]
            )
            (series / f"{depth}.dcm").write_bytes(data)
    settings = {
        "resolution": [4, 4, 4], "channels": 1, "range": [0, 20], "val_fraction": 0.4,
        "data_dir": str(tmp_path / "data"),
    }  # fmt: skip
    assert any("by PatientID" in line for line in folder(tmp_path / "ct", **settings).remarks())
    dataset = folder(tmp_path / "ct", group="PatientID", **settings)
    train, val = sides(dataset, lambda name: int(name[1:]) // 3)
    assert len(train) + len(val) == 4
    assert train
    assert val
    assert sides(folder(tmp_path / "ct", group=r"^(s\d)", **settings), lambda name: name[:2]) in (
        ({"s0"}, {"s1"}),
        ({"s1"}, {"s0"}),
    )


@pytest.mark.parametrize(
    ("group", "line"),
    [
        ("(p", "not a regular expression (missing ), unterminated subpattern at position 0); correct it"),
        ("(p)(a)", "has 2 parts in parentheses, not 1; put the name of the group into ( and ), others into (?: and )"),
        ("(p{99999999999999999999})", "not a regular expression (the repetition number is too large); correct it"),
        (r"\(p", "has 0 parts in parentheses, not 1; put the name of the group into ( and ), others into (?: and )"),
        ("(b)", "2 images without a group: 'p1/0.png', 'p1/1.png'; correct the pattern, or move them away"),
        ("(x*)", "2 images without a group: 'p1/0.png', 'p1/1.png'; correct the pattern, or move them away"),
        ("(p1)", "all 2 images are in one group, 'p1', which cannot be split; choose other groups, or set "
                 "dataset.val_fraction=0"),
        ("patient", "no such column in labels.csv; choose from label, visit; or use a pattern such as '([^/]+)/' for "
                    "the first folder"),
        ("visit", "1 image without a group: 'p1/1.png'; complete the column"),
    ],
)  # fmt: skip
def test_wrong_groups_have_one_line(tmp_path, group, line):
    for name in ("0", "1"):
        save(tmp_path / f"p1/{name}.png", np.zeros((8, 8), np.uint8))
    (tmp_path / "labels.csv").write_text("file,label,visit\np1/0.png,a,x\np1/1.png,b,NA\n")
    with pytest.raises(UsageError) as caught:
        folder(tmp_path, val_fraction=0.5, group=group)
    assert str(caught.value) == f"dataset.group={group}: {line}"


def test_a_share_far_from_the_fraction_is_stated(tmp_path):
    large = min("abc", key=lambda name: mix("held_out", name))  # the only one for validation
    for name in "abc":
        for number in range(50 if name == large else 2):
            save(tmp_path / f"{name}/{number}.png", np.full((8, 8), number, np.uint8))
    (line,) = folder(tmp_path, labels="none", val_fraction=0.1, group=FIRST_FOLDER).remarks()
    assert line == (
        "dataset.group=([^/]+)/: 1 of 3 groups are for validation, with 0.926 of the images, not 0.1; groups are few "
        "or unequal, and another dataset.val_fraction chooses others"
    )
    (line,) = folder(tmp_path, labels="none", val_fraction=0.1, group="(.*)").remarks()
    assert line == "dataset.group=(.*): each of the 54 images is a group of its own"


@pytest.mark.parametrize(("names", "alike"), [
    (["p7", "p007", "p70"], "'p007' and 'p7'"), (["Ann", "bob", "ANN"], "'ANN' and 'Ann'"), (["p10", "p100", "p1"], ""),
])  # fmt: skip
def test_names_that_may_be_of_one_group_are_named(tmp_path, names, alike):
    for place, name in enumerate(names):
        for number in range(2):
            save(tmp_path / f"{name}_{place}{number}.png", np.zeros((8, 8), np.uint8))
    lines = folder(tmp_path, labels="none", val_fraction=0.4, group=PREFIX).remarks()
    found = [line for line in lines if "different groups" in line]
    line = f"dataset.group={PREFIX}: {alike} are different groups; if they are one, name them alike"
    assert found == [line] * bool(alike)


def arrays(path: Path, **changes: Any) -> Path:
    images, patients = near_copies()
    np.savez(path, **{"images": images, "patient": np.array(patients), **changes})
    return path


def test_an_array_names_the_groups_of_rows(tmp_path):
    images, patients = near_copies()
    path = arrays(tmp_path / "x.npz")
    dataset = array(path, val_fraction=0.2, group="patient")
    is_val = np.isin(patients, [*chosen(NAMES, 0.2)])
    for split, rows in zip(SPLITS, (~is_val, is_val), strict=True):
        part = dataset.load(split)
        np.testing.assert_array_equal(part[torch.arange(len(part))].numpy(), images[rows][:, None])
    assert dataset.num_groups == {"train": 40 - len(chosen(NAMES, 0.2)), "val": len(chosen(NAMES, 0.2))}


@pytest.mark.parametrize(
    ("changes", "settings", "line"),
    [
        ({}, {"group": "patients"}, "dataset.group=patients: no such column in x.npz; did you mean patient?"),
        (
            {"val": np.arange(200) < 9}, {"group": "patient", "val_fraction": None},
            "dataset.group=patient: conflicts with the validation images that x.npz marks; leave it out, or set "
            "dataset.val_fraction to split anew",
        ),
        (
            {"patient": np.where(np.arange(200) == 7, "", "a")}, {"group": "patient"},
            "dataset.group=patient: 1 image without a group: 'image 7'; complete the column",
        ),
        ({"patient": np.zeros(200)}, {"group": "patient"},
         "dataset.group=patient: all 200 images are in one group, '0.0', which cannot be split; choose other groups, "
         "or set dataset.val_fraction=0"),
    ],
)  # fmt: skip
def test_wrong_groups_of_an_array_have_one_line(tmp_path, changes, settings, line):
    with pytest.raises(UsageError) as caught:
        array(arrays(tmp_path / "x.npz", **changes), **({"val_fraction": 0.2} | settings))
    assert str(caught.value) == line


def test_fetch_counts_images_and_groups(tmp_path, capsys):
    path = written(tmp_path / "mri", "{patient}/{visit}.png")
    words = ["dataset=folder", f"dataset.path={path}", "dataset.labels=none", "dataset.val_fraction=0.2"]
    assert run(["data", "fetch", *words, f"dataset.group={FIRST_FOLDER}"]) == 0
    val = len(chosen(NAMES, 0.2))
    line = f"mri: {5 * (40 - val)} images of {40 - val} groups for training, {5 * val} of {val} groups for validation"
    assert line in capsys.readouterr().out
