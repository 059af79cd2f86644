"""Training with condition images: what is stored, resumed, previewed and refused."""

import pytest
import torch
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.commands.train_setup import set_up
from diffusion_cli.conditions import ImageCondition
from diffusion_cli.config import load
from diffusion_cli.data import Batches, Digits
from diffusion_cli.data.conditioned import image_conditioned
from diffusion_cli.metrics.base import EvaluatedModel
from diffusion_cli.runs.checkpoint import LAST, read
from diffusion_cli.runs.load import load_model
from helpers import TINY, assert_same, state, train
from helpers.data import take
from helpers.pairs import write_pairs

GRAY = ["condition=image", "condition.of=downsample", "condition.factor=2"]


def refused(capsys, *words: str) -> str:
    """The lines of a training that is refused."""
    assert run([*TINY, *words]) == 2
    return capsys.readouterr().err


def test_a_network_gets_the_channels_of_its_condition_image(tmp_path):
    words = [*TINY[1:], *GRAY, "condition.noise_augmentation=0.1", f"output_dir={tmp_path}", "max_steps=1"]
    setup = set_up(load("train", words), tmp_path, None)  # pyright: ignore[reportArgumentType]
    assert setup.info.conditions is not None
    assert (setup.info.conditions.names, setup.info.conditions.image) == (("image",), 2)
    assert setup.info.num_classes == 10
    (batch,) = take(Batches(setup.images, 4, 0, flip=False), 1)
    assert batch.condition is not None
    assert batch.condition.values["image"].shape == (4, 2, 8, 8)


def test_labels_and_condition_images_combine(tmp_path):
    words = [*TINY[1:], *GRAY, "model.class_conditional=true", f"output_dir={tmp_path}", "max_steps=1"]
    setup = set_up(load("train", words), tmp_path, None)  # pyright: ignore[reportArgumentType]
    assert setup.info.conditions is not None
    assert setup.info.conditions.names == ("label", "image")
    assert setup.info.conditions.num_classes == 10


def test_a_network_of_pairs_has_the_channels_of_the_sources(tmp_path):
    root = write_pairs(tmp_path)
    words = [
        *TINY[1:], "dataset=pairs", f"dataset.path={root}/targets", f"dataset.source={root}/sources", "max_steps=1",
        "dataset.source_channels=1", "dataset.resolution=8", "dataset.val_fraction=0.3", f"output_dir={tmp_path}/o",
    ]  # fmt: skip
    setup = set_up(load("train", words), tmp_path, None)  # pyright: ignore[reportArgumentType]
    assert setup.info.conditions is not None
    assert setup.info.conditions.image == 1
    (batch,) = take(Batches(setup.images, 2, 0, flip=True), 1)
    assert batch.condition is not None
    torch.testing.assert_close(batch.condition.values["image"][:, 0], batch.images[:, 0])
    plain = set_up(load("train", [*words, "condition=none"]), tmp_path, None)  # pyright: ignore[reportArgumentType]
    assert plain.info.conditions is None
    assert "image" not in plain.images.conditions


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["condition=image"],
            "condition=image: the dataset has no condition images; use dataset=pairs, or set",
        ),
        (
            ["condition=image", "condition.of=gray"],
            "condition.of=gray: needs colour images, and these have 1 channel",
        ),
        (
            ["condition=image", "condition.of=blur", "condition.factor=2"],
            "condition.factor=2: applies only with",
        ),
        (["condition=image", "condition.of=sepia"], "condition.of=sepia: must be "),
        (
            [*GRAY, "task=classifier"],
            "condition=image: does not apply to task=classifier; set condition=none",
        ),
        (
            [*GRAY, "latent.run=ae"],
            "condition=image: needs pixels, and latent.run=ae trains on latents; leave one",
        ),
        (
            [*GRAY, "progressive=[4,8]", "stage_steps=[1]"],
            "progressive=[4, 8]: not supported with condition=image, because masks and noise cannot be averaged",
        ),
        (["condition=picture"], "condition=picture: unknown"),
    ],
)
def test_what_condition_images_cannot_do_is_refused_in_one_line(tmp_path, capsys, words, line):
    lines = refused(capsys, *words, f"output_dir={tmp_path}", "max_steps=1")
    assert line in lines
    assert len(lines.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_resumed_training_equals_one_without_a_stop(tmp_path):
    words = [*GRAY, "condition.noise_augmentation=0.2", "preview_every=4", "preview_steps=2"]
    assert train(tmp_path / "parts", *words, "max_steps=2") == 0
    assert train(tmp_path / "parts", *words, "max_steps=4") == 0
    assert train(tmp_path / "whole", *words, "max_steps=4") == 0
    for key in ("state_dict", "optimizer_states"):
        assert_same(state(tmp_path / "parts")[key], state(tmp_path / "whole")[key], key)
    info = read(tmp_path / "whole" / "tiny" / LAST).info
    assert info.conditions is not None
    assert info.conditions.image == 2
    model = load_model(tmp_path / "whole" / "tiny", "ema", torch.device("cpu"))
    assert model.denoiser.conditions == info.conditions
    told = image_conditioned(Digits(""), ImageCondition(of="downsample", factor=2, noise_augmentation=0.2))
    subject = EvaluatedModel(model, told, tmp_path, torch.device("cpu"), 0, 4, False, "fp32")
    pixels, y = subject.batch(told.load("val"), torch.arange(4))
    assert y is not None
    expected = ImageCondition(of="downsample", factor=2).derived(pixels / 127.5 - 1, [0] * 4)
    assert torch.equal(y.values["image"][:, :1], expected)
    with Image.open(tmp_path / "whole" / "tiny" / "previews" / "step_00000004.png") as preview:
        assert preview.height > 12 * 32  # four groups of condition images, samples and originals


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_run_keeps_its_condition(tmp_path, capsys):
    assert train(tmp_path, *GRAY, "max_steps=1") == 0
    assert train(tmp_path, "condition=image", "condition.of=blur", "max_steps=2") == 2
    assert "condition" in capsys.readouterr().err
    assert train(tmp_path, "condition=none", "max_steps=2") == 2
