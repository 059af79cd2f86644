"""Which training images are mirrored: none by default if attributes or captions may name left and right."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffusion_cli.commands.train_setup import TrainingSetup, set_up
from diffusion_cli.commands.trained import dataset_of
from diffusion_cli.data.file_names import RULES
from diffusion_cli.runs.schema import CheckpointInfo
from helpers import TINY
from helpers.data import write_images
from helpers.recipes import train_config

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = ["text=learned", "text.width=16", "text.depth=1", "text.heads=2", "text.length=12"]
SIDE = ["dataset.label=[side,angle]", "model.class_conditional=true"]
REMARK = "dataset.flip=true: half of the images are mirrored"


@pytest.fixture
def images(tmp_path) -> Path:
    """Eight images with a column `side` and captions."""
    path = write_images(tmp_path / "set", 8)
    files = sorted(path.rglob("*.png"))
    rows = [
        {"file": str(file.relative_to(path)), "side": side, "angle": number, "text": f"a {side} hand"}
        for number, (file, side) in enumerate(zip(files, ["left", "right"] * 4, strict=True))
    ]
    (path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def prepared(images: Path, *words: str, before: CheckpointInfo | None = None) -> TrainingSetup:
    given = [
        *TINY[1:],
        "dataset=folder",
        f"dataset.path={images}",
        "dataset.resolution=8",
        "batch_size=4",
        *words,
    ]
    return set_up(train_config(*given, f"output_dir={images.parent}", "name=a"), images.parent / "a", before)


def test_images_of_classes_are_mirrored(images, capsys):
    assert prepared(images).dataset.flip
    assert prepared(images, "model.class_conditional=true").dataset.flip
    assert prepared(images, "dataset.label=side").dataset.flip
    assert REMARK not in capsys.readouterr().err


@pytest.mark.parametrize("words", [TEXT, SIDE, [*TEXT, *SIDE]])
def test_images_of_attributes_and_captions_are_mirrored_only_if_the_user_wants_it(images, words, capsys):
    assert not prepared(images, *words).dataset.flip
    assert REMARK not in capsys.readouterr().err
    assert prepared(images, *words, "dataset.flip=true").dataset.flip
    assert REMARK in capsys.readouterr().err


@pytest.mark.parametrize("words", [TEXT, SIDE])
def test_a_run_of_an_earlier_version_is_mirrored_as_before(images, words):
    info = prepared(images, *words).info
    assert info.data_rules == RULES
    before = info.model_copy(update={"data_rules": 3})
    assert prepared(images, *words, before=before).dataset.flip
    assert not prepared(images, *words, before=info).dataset.flip


def test_evaluations_have_the_dataset_of_the_training(images):
    """A judge that they train mirrors the same images."""
    for words in (TEXT, [*TEXT, "dataset.flip=true"], []):
        setup = prepared(images, *words)
        trained: Any = SimpleNamespace(info=setup.info, shape=(3, 8, 8), step=0)
        dataset = dataset_of(images.parent / "a", trained, "data", {"path": str(images)})
        assert dataset.flip == setup.dataset.flip


def test_pairs_are_mirrored_as_their_targets(images):
    words = ["dataset=pairs", f"dataset.source={images}", "condition=image"]
    assert prepared(images, *words).dataset.flip
    assert not prepared(images, *words, *TEXT).dataset.flip
    assert not prepared(images, *words, *SIDE).dataset.flip
