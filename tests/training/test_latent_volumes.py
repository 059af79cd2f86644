"""Autoencoders of volumes, and diffusion in their latents."""

from itertools import permutations
from typing import TypeVar

import numpy as np
import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.conditions.operators import Mask
from diffusion_cli.diffusion.latents import Latents
from diffusion_cli.editing.latent import known_of
from diffusion_cli.networks import AutoencoderKL, PatchDiscriminator
from diffusion_cli.runs.load import load_model
from diffusion_cli.training.autoencoder_loss import gradient_distance
from helpers import TINY
from helpers.autoencoders import PUBLISHED, SMALL
from helpers.networks import close, randomised

pytestmark = pytest.mark.usefixtures("one_thread")


Network = TypeVar("Network", bound=torch.nn.Module)


def turned(network: Network, axes: tuple[int, ...]) -> Network:
    """The network with the axes of its kernels in another order."""
    order = (0, 1, *(2 + axis for axis in axes))
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim == 5:
                weight.copy_(weight.permute(order).clone())
    return network


@pytest.mark.parametrize("axes", [*permutations(range(3))])
def test_all_axes_are_treated_alike(axes):
    def made() -> AutoencoderKL:
        torch.manual_seed(0)
        return randomised(AutoencoderKL((1, 8, 12, 4), None, **SMALL)).double().eval()

    generator, order = torch.Generator().manual_seed(1), (0, 1, *(2 + axis for axis in axes))
    x = torch.randn(2, 1, 8, 12, 4, generator=generator, dtype=torch.float64)
    moments = made().moments(x)
    assert moments.shape == (2, 6, 4, 6, 2)
    close(turned(made(), axes).moments(x.permute(order)), moments.permute(order))
    z = moments[:, :3]
    close(turned(made(), axes).decode(z.permute(order)), made().decode(z).permute(order))


def test_losses_treat_all_axes_alike_and_see_each():
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 1, 2, 12, 16, 20, generator=generator)[:, :, None, 0]
    order = (0, 1, 4, 2, 3)
    found = gradient_distance(x, other)
    close(gradient_distance(x.permute(order), other.permute(order)), found, 1e-6)
    ramp = torch.arange(8.0)
    for axis in range(2, 5):
        volume = ramp.view(*(-1 if axis == other else 1 for other in range(5))).expand(1, 1, 8, 8, 8)
        expected = torch.tensor([(1 + 2 + 4) / 9])  # slopes of three scales, along one of three axes
        close(gradient_distance(volume, 0 * volume), expected, 1e-6)

    def logits(axes: tuple[int, ...], volume: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return turned(PatchDiscriminator((1, 12, 16, 20), channels=8, layers=1), axes)(volume)

    close(logits((2, 0, 1), x.permute(order)), logits((0, 1, 2), x).permute(order), 1e-5)


def test_a_latent_voxel_is_known_if_all_its_voxels_are():
    space = Latents(AutoencoderKL((1, 8, 8, 8), None, **SMALL), (1, 8, 8, 8), [0.0] * 3, [1.0] * 3)
    known = torch.ones(1, 1, 8, 8, 8, dtype=torch.bool)
    known[..., 5, 2, 7] = False
    x = torch.randn(1, 1, 8, 8, 8)
    operator, y = known_of(space, Mask(known), x * known)
    assert isinstance(operator, Mask)
    assert operator.known.shape[2:] == (4, 4, 4)
    assert (~operator.known).nonzero()[:, 2:].tolist() == [[2, 1, 3]]
    assert torch.equal(y != 0, operator.known.expand_as(y))


@pytest.mark.slow
def test_volumes_are_sampled_edited_and_measured_in_latents(tmp_path, capsys):
    places = np.indices((8, 8, 8)) - 3.5
    centres = np.random.RandomState(0).uniform(-2, 2, (24, 3, 1, 1, 1))
    balls = (((places - centres) ** 2).sum(1) < 6).astype(np.uint8) * 200
    (tmp_path / "balls").mkdir()
    for number, ball in enumerate(balls):
        np.save(tmp_path / "balls" / f"{number}.npy", ball)
    words = [
        *TINY, "dataset=folder", f"dataset.path={tmp_path}/balls", "dataset.channels=1", "dataset.resolution=[8,8,8]",
        "dataset.range=[0,255]", f"output_dir={tmp_path}/o", f"cache_dir={tmp_path}/c", "max_steps=4",
    ]  # fmt: skip
    alone = [word for word in words if not word.startswith(("model.num_heads", "model.head", "name="))]
    assert run([
        *alone, "task=autoencoder", "model=kl3d_tiny", "model.channel_mult=[1,2]", "name=ae",
        "objective.perceptual=gradient", "objective.discriminator_start=1", "objective.discriminator_channels=8",
        "objective.discriminator_layers=1",
    ]) == 0  # fmt: skip
    assert run([*words, "model=unet3d_tiny", "model.channel_mult=[1,2]", "latent.run=ae", "name=a"]) == 0
    model = load_model(tmp_path / "o" / "a", "ema", torch.device("cpu"))
    assert model.space.shape == (4, 4, 4, 4)
    call = [f"output_dir={tmp_path}/o", "precision=fp32", "steps=2"]
    assert run(["sample", "run=a", *call, "num_samples=3", f"output={tmp_path}/s"]) == 0
    assert np.load(tmp_path / "s" / "000002.npy").shape == (8, 8, 8)
    mask = ["edit=inpaint", "edit.mask=[2,2,2,6,6,6]", "input=val", "num_images=1"]
    assert run(["edit", "run=a", *call, *mask, f"output={tmp_path}/e"]) == 0
    measured = ["metric=reconstruction", "metric.reconstruction.split=train"]
    assert run(["eval", "run=ae", f"output_dir={tmp_path}/o", *measured]) == 0
    capsys.readouterr()
    assert run([*words, f"latent.pretrained={PUBLISHED}", "name=b"]) == 2
    assert (
        "encodes images, but balls has the shape [1, 8, 8, 8]; train an autoencoder"
        in capsys.readouterr().err
    )
    exported = ["format=diffusers", f"output={tmp_path}/d"]
    assert run(["export", "run=ae", f"output_dir={tmp_path}/o", *exported]) == 2
    assert "autoencoders of diffusers need images" in capsys.readouterr().err
