"""`diffuse sample layout=imagefolder`: a folder for each class."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from diffusion_cli.cli import run
from diffusion_cli.commands.sample_files import folder_names
from diffusion_cli.commands.samples import given_samples
from diffusion_cli.data import Digits, Folder, Images


def sample(edit_runs, output, *words: str) -> int:
    made = ["run=told", "steps=1", "num_samples=23", f"output_dir={edit_runs}", f"output={output}"]
    return run(["sample", *made, *words])


@pytest.fixture(scope="module")
def folders(edit_runs, tmp_path_factory):
    """Samples of all classes in class folders."""
    output = tmp_path_factory.mktemp("samples") / "out"
    assert sample(edit_runs, output, "layout=imagefolder") == 0
    return output


def files_of(output) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in output.rglob("0*.png")}


def labels_of(images: Images) -> list[int]:
    assert images.labels is not None
    return images.labels.tolist()


def test_each_image_lies_in_the_folder_of_its_class_as_torchvision_reads_them(folders):
    images = ImageFolder(folders / "images")
    assert images.classes == [str(digit) for digit in range(10)]
    seeds = [int(path.rpartition("/")[2][:6]) for path, _ in images.samples]
    assert sorted(seeds) == [*range(23)]
    assert [label for _, label in images.samples] == [seed % 10 for seed in seeds]
    assert Counter(label for _, label in images.samples) == {k: 3 if k < 3 else 2 for k in range(10)}


@pytest.mark.parametrize("place", [".", "images"])
def test_dataset_folder_reads_classes_and_images_at_once(folders, place):
    dataset = Folder("", path=str(folders / place), resolution=8, channels=1, flip=False, val_fraction=0)
    assert dataset.class_names == tuple(str(digit) for digit in range(10))
    images = dataset.load("train")
    assert len(images) == 23
    assert Counter(labels_of(images)) == {k: 3 if k < 3 else 2 for k in range(10)}


def test_the_layout_changes_no_image_and_a_stopped_command_continues(edit_runs, folders, tmp_path, capsys):
    flat, parts = tmp_path / "flat", tmp_path / "parts"
    assert sample(edit_runs, flat) == 0
    assert files_of(flat) == files_of(folders)
    assert sample(edit_runs, parts, "layout=imagefolder", "num_samples=12") == 0
    kept = parts / "images" / "1" / "000011.png"
    before = kept.stat().st_mtime_ns
    (parts / "images" / "2" / "000002.png").unlink()
    capsys.readouterr()
    assert sample(edit_runs, parts, "layout=imagefolder") == 0
    assert "has 11 of 23 images; generating the rest" in capsys.readouterr().err
    assert kept.stat().st_mtime_ns == before
    for name, content in files_of(parts).items():
        (whole,) = folders.rglob(name)
        one, other = (
            np.array(Image.open(path)).astype(int)
            for path in (whole, parts / "images" / whole.parent.name / name)
        )
        assert abs(one - other).max() <= 1, content
    for name in ("labels.csv", "manifest.json"):
        assert (parts / name).read_text() == (folders / name).read_text()
    assert (folders / "labels.csv").read_text().splitlines()[:2] == ["file,label", "images/0/000000.png,0"]


def test_another_layout_in_the_folder_is_refused(edit_runs, folders, tmp_path, capsys):
    before = sorted(folders.rglob("*"))
    assert sample(edit_runs, folders) == 2
    line = f"diffuse: layout=flat: the images in {folders} were made with imagefolder\n"
    assert line in capsys.readouterr().err
    assert sorted(folders.rglob("*")) == before
    assert sample(edit_runs, tmp_path / "flat", "num_samples=1") == 0
    assert sample(edit_runs, tmp_path / "flat", "num_samples=1", "layout=imagefolder") == 2
    assert "layout=imagefolder: the images in" in capsys.readouterr().err


def test_samples_without_classes_are_refused_in_one_line(edit_runs, tmp_path, capsys):
    cases = {
        (
            "run=plain",
        ): "layout=imagefolder: the model has no classes; use a class-conditional model, or leave layout out",
        ("run=told", "label=none"): "label: layout=imagefolder needs a class for each image; use label=all",
    }
    for words, line in cases.items():
        command = ["sample", f"output_dir={edit_runs}", f"output={tmp_path / 'out'}", "layout=imagefolder"]
        assert run([*command, *words]) == 2
        assert capsys.readouterr().err == f"diffuse: {line}\n"
    assert not (tmp_path / "out").exists()


def test_an_evaluation_of_class_folders_knows_their_settings_and_classes(folders):
    samples = given_samples(folders, Digits("", val_fraction=0.2, flip=False), None)
    assert samples.labels is not None
    assert torch.bincount(samples.labels).tolist() == [3] * 3 + [2] * 7
    made = samples.protocol()
    assert made["layout"] == "imagefolder"
    assert made["steps"] == 1
    assert made["step"] == 20


def test_folders_of_classes_are_different_on_every_file_system():
    names = [
        "cat",
        "Cat",
        "Cat-1",
        "a/b",
        "a\\b",
        "..",
        ".hidden",
        "con",
        "NUL.txt",
        "x" * 300,
        "x" * 301,
        " ",
        "é",
    ]
    folders = folder_names(names)
    assert folders[0] == "cat"
    assert folders[-1] == "é"
    assert len({folder.casefold() for folder in folders}) == len(names)
    for folder in folders:
        assert 0 < len(folder.encode()) <= 255
        assert not set('/\\:*?"<>|\0') & set(folder)
        assert folder[0] not in ". "
        assert folder[-1] not in ". "
        assert folder.split(".")[0].lower() not in ("con", "nul")
    assert folder_names(names) == folders
    assert folder_names(["plain name", "tail.", "a. ."]) == ["plain name", "tail", "a"]
