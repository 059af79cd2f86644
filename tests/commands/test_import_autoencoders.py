"""`diffuse import` of an autoencoder without a denoiser: a run of task=autoencoder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.export import Diffusers
from diffusion_cli.runs.find import task_of
from diffusion_cli.runs.load import load_autoencoder, load_model
from helpers.exports import KL, VQ, autoencoder, imported
from helpers.networks import randomised

CPU = torch.device("cpu")
TRAIN = ["max_steps=1", "batch_size=4", "preview_every=null", "logger=csv", "trainer=cpu", "dataset=digits"]
MODELS = {
    "square": lambda: autoencoder(),
    "oblong": lambda: autoencoder((3, 8, 12), KL | {"quant_conv": False}),
    "codebook": lambda: autoencoder((1, 8, 8), VQ),
}


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys: Any, *words: str) -> str:
    """The one line that a command prints before it fails."""
    capsys.readouterr()
    assert run([*words]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    return line.removeprefix("diffuse: ")


@pytest.mark.parametrize("kind", MODELS)
def test_an_imported_autoencoder_is_exported_with_the_same_bytes(kind):
    model = MODELS[kind]()
    folder = imported(model)
    assert task_of(folder) == "autoencoder"
    loaded = load_autoencoder(folder, CPU)
    assert loaded.shape == model.shape
    images = torch.randn(2, *model.shape)
    assert torch.equal(loaded.network.reconstruct(images), model.network.reconstruct(images))
    assert run(["export", "run=x", "output=out"]) == 0
    assert "ReconstructionLoss" not in Path("out/README.md").read_text()  # its training is unknown
    written = [path for path in Path("out").iterdir() if path.name != "README.md"]
    assert len(written) == 2
    for path in written:
        assert path.read_bytes() == Path("sources", "x", path.name).read_bytes()


def test_an_autoencoder_of_diffusers_reconstructs_as_there(capsys):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKL(
        block_out_channels=[8, 16], down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=4, sample_size=16,
        up_block_types=["UpDecoderBlock2D"] * 2, latents_mean=[0.1] * 4, latents_std=[2.0] * 4,
    )  # fmt: skip
    randomised(theirs).eval().requires_grad_(False).save_pretrained("vae")
    assert run(["import", "source=vae"]) == 0
    shown = capsys.readouterr().out
    assert "outputs/vae: AutoencoderKL of diffusers, images 3x16x16\n" in shown
    assert "diffuse eval run=vae 'metric=[reconstruction,rfid]' dataset=<option>" in shown
    assert "diffuse train latent.run=vae dataset=<option> name=<new>" in shown
    x = torch.randn(2, 3, 16, 16)
    ours = load_autoencoder(Path("outputs/vae"), CPU).network.reconstruct(x)
    torch.testing.assert_close(ours, theirs(x).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["square", "codebook"])
def test_reconstructions_are_measured_and_reported(kind, capsys):
    folder = imported(MODELS[kind]())
    small = ["metric=[reconstruction]", "cache_dir=cache", "device=cpu"]
    line = refused(capsys, "eval", "run=x", *small)
    assert line.startswith("dataset: x was imported without images to reconstruct; choose some, such as")
    assert run(["eval", "run=x", "dataset=digits", *small]) == 0
    (report,) = json.loads((folder / "metrics.json").read_text())
    assert report["results"][0]["name"] == "psnr"
    assert report["results"][0]["protocol"]["sampling"]["origin"]["source"] == "sources/x"
    assert run(["report", "run=x"]) == 0
    assert run(["runs"]) == 0
    assert "x    imported sources/x  autoencoder  0" in capsys.readouterr().out


def test_trainings_start_from_an_imported_autoencoder_and_use_its_latents():
    imported(autoencoder())
    assert run(["train", "init.run=x", "task=autoencoder", "name=y", *TRAIN]) == 0
    init = load_autoencoder(Path("outputs/y"), CPU).info.init
    assert init is not None
    assert init.taken == init.total
    words = ["model=dit_tiny", "model.hidden_size=16", "model.num_heads=2", "model.depth=1"]
    assert run(["train", "latent.run=x", "name=z", *words, *TRAIN]) == 0
    space: Any = load_model(Path("outputs/z"), "ema", CPU).space
    weights = load_autoencoder(Path("outputs/x"), CPU).network.state_dict()
    for name, tensor in space.autoencoder.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_the_size_of_the_images_is_that_of_the_dataset():
    folder = Path("kl")
    folder.mkdir()
    Diffusers().write(autoencoder((1, 16, 16)), folder)
    assert run(["import", "source=kl", "dataset=digits"]) == 0
    assert load_autoencoder(Path("outputs/kl"), CPU).shape == (1, 8, 8)
    assert run(["eval", "run=kl", "metric=reconstruction", "cache_dir=cache", "device=cpu"]) == 0


def test_what_an_imported_autoencoder_cannot_do_is_one_line(capsys):
    imported(autoencoder((1, 16, 16), VQ))
    line = refused(capsys, "train", "init.run=x", "task=autoencoder", "name=y", *TRAIN)
    assert line.startswith("model=VQModel: has a codebook, which is not trained here; use model=kl_tiny")
    line = refused(capsys, "eval", "run=x", "metric=reconstruction", "dataset=digits", "device=cpu")
    assert line.endswith("set dataset.resolution=16, or import it again with this dataset")
    line = refused(capsys, "import", "source=sources/x", "name=y", "schedule=cosine")
    assert line == "schedule=cosine: is for denoisers, and sources/x is an autoencoder; leave it out"
    line = refused(capsys, "import", "source=sources/x", "name=y", "dataset=cifar10")
    assert "the autoencoder takes 1 channel, and sizes that are multiples of 2" in line
    imported(autoencoder(), "z")
    line = refused(capsys, "train", "run=z")
    assert line.startswith("run=z: was imported from sources/z, so it has no training to continue")
    assert [path.name for path in Path("outputs").iterdir()] in (["x", "z"], ["z", "x"])
