"""Runs with random transforms of the images that their samples do not have."""

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion_cli as diffuse
from diffusion_cli.cli import run
from diffusion_cli.runs.load import load_weights
from helpers import assert_same, state, train

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
WEIGHT = "condition_embedding.augmentation.weight"
FLIPS = ["augmentation=edm", "augmentation.y_flip=false", "augmentation.rotation=0", "augmentation.translation=0",
         "augmentation.scale=0", "augmentation.anisotropy=0"]  # fmt: skip


@pytest.fixture(scope="module")
def one_sided(tmp_path_factory) -> str:
    """A file of images with a bright left half and a dark right half."""
    path, noise = tmp_path_factory.mktemp("data") / "sides.npy", np.random.RandomState(0)
    images = noise.randint(0, 60, (256, 8, 8)).astype(np.uint8)
    images[:, :, :4] += 190
    np.save(path, images)
    return str(path)


@pytest.mark.parametrize(
    ("words", "bright_right"), [([*FLIPS, "dataset.flip=false"], 0), (["dataset.flip=true"], 0.5)]
)
def test_samples_of_one_sided_images_are_one_sided(one_sided, tmp_path, words, bright_right):
    """With flips as an input of the network; without this input, half of the samples are flipped."""
    data = ["dataset=array", f"dataset.path={one_sided}", "model=unet_tiny"]
    training = ["schedule=rectified", "parameterization=flow", "objective=target", "ema.decay=0.9"]
    training += ["optimizer.lr=0.005", "max_steps=150"]
    assert train(tmp_path, *data, *training, *words) == 0
    samples = diffuse.load(str(tmp_path / "tiny")).sample(64, steps=10).float()
    flipped = samples[..., 4:].mean((1, 2, 3)) > samples[..., :4].mean((1, 2, 3))
    assert flipped.double().mean().item() == pytest.approx(bright_right, abs=0.25 if bright_right else 0.01)


def test_a_run_that_resumes_is_one_that_did_not_stop(tmp_path):
    words = ["augmentation=edm", "augmentation.probability=0.5", "model.class_conditional=true"]
    assert train(tmp_path / "one", *words, "max_steps=8") == 0
    for steps in (5, 8):
        assert train(tmp_path / "two", *words, f"max_steps={steps}") == 0
    assert_same(state(tmp_path / "one")["state_dict"], state(tmp_path / "two")["state_dict"])


def test_runs_start_from_runs_with_and_without_augmentation(tmp_path, capsys):
    assert train(tmp_path, "name=plain", "max_steps=2") == 0
    capsys.readouterr()
    assert train(tmp_path, "name=augmented", "init.run=plain", "augmentation=edm", "max_steps=6") == 0
    assert f"; new: {WEIGHT}\n" in capsys.readouterr().err
    frozen = ["augmentation=edm", "init.freeze=[condition_embedding]"]
    assert train(tmp_path, "name=frozen", "init.run=plain", *frozen) == 2
    problem = "init.freeze=condition_embedding.augmentation: augmentation=edm adds this layer, and samples would have"
    assert problem in capsys.readouterr().err
    for steps in (1, 2):
        assert train(tmp_path, "name=frozen", "init.run=augmented", *frozen, f"max_steps={steps}") == 0
    capsys.readouterr()
    again = ["name=again", "init.run=augmented", "max_steps=1"]
    assert train(tmp_path, *again, "augmentation=edm") == 0
    assert "; new" not in capsys.readouterr().err
    assert train(tmp_path, *again, "name=without") == 0
    assert "; new" not in capsys.readouterr().err
    assert WEIGHT in load_weights(tmp_path / "augmented", "ema", None, "diffusion").state
    assert WEIGHT not in load_weights(tmp_path / "without", "ema", None, "diffusion").state
    pictures = [
        Image.open(tmp_path / "augmented" / "previews" / f"{name}.png") for name in ("real", "augmented")
    ]
    assert pictures[0].size == pictures[1].size
    assert pictures[0].tobytes() != pictures[1].tobytes()


def test_a_run_is_used_without_its_augmentation(tmp_path):
    """Its network has no input for transforms, so that exports need none."""
    assert train(tmp_path, "max_steps=6", "augmentation=edm", "augmentation.probability=1") == 0
    model = diffuse.load(str(tmp_path / "tiny"))
    assert WEIGHT not in dict(model.denoiser.network.named_parameters())
    assert state(tmp_path / "tiny" / "..")["state_dict"][f"model.network.{WEIGHT}"].any()
    assert (
        run(["export", "run=tiny", f"output_dir={tmp_path}", f"output={tmp_path}/x", "format=safetensors"])
        == 0
    )
    assert run(["import", f"source={tmp_path}/x", "name=y", f"output_dir={tmp_path}"]) == 0
    assert torch.equal(diffuse.load(str(tmp_path / "y")).sample(4, steps=3), model.sample(4, steps=3))


def test_a_distilled_student_gets_no_transforms(tmp_path, capsys):
    assert train(tmp_path, "name=teacher", "parameterization=v", "max_steps=1") == 0
    words = ["init.run=teacher", "experiment=progressive_distillation", "name=student", "augmentation=edm"]
    assert train(tmp_path, *words) == 2
    assert (
        "augmentation: a student learns from its teacher, not from transformed images"
        in capsys.readouterr().err
    )
