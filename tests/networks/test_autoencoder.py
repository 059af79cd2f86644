"""The autoencoder against that of diffusers, whose folders it reads."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_cli.config import CONF
from diffusion_cli.convert.diffusers_folder import WEIGHTS
from diffusion_cli.networks import AutoencoderKL
from helpers import assert_same
from helpers.autoencoders import PUBLISHED, SMALL, small
from helpers.convert import autoencoder_of


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the published one, to be changed."""
    return Path(shutil.copytree(PUBLISHED, tmp_path / "vae"))


def option(name: str) -> dict:
    node = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())
    return {key: value for key, value in node.items() if key != "_target_"}


def test_encodes_and_decodes_as_diffusers_does():
    network, expected = autoencoder_of(PUBLISHED), np.load(PUBLISHED / "expected.npz")
    moments = network.moments(torch.from_numpy(expected["x"]))
    decoded = network.decode(torch.from_numpy(expected["z"]))
    np.testing.assert_allclose(moments.numpy(), expected["moments"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(decoded.numpy(), expected["decoded"], rtol=0, atol=1e-5)


def test_its_weights_have_the_names_of_diffusers_so_that_they_go_back_as_they_came():
    network, published = autoencoder_of(PUBLISHED), load_file(PUBLISHED / WEIGHTS)
    assert {name: tensor.shape for name, tensor in network.state_dict().items()} == {
        name: tensor.shape for name, tensor in published.items()
    }
    assert all(torch.equal(tensor, published[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(("name", "parameters"), [("kl_f4", 55_312_063), ("kl_f8", 83_653_863)])
def test_the_published_sizes_have_the_published_number_of_parameters(name, parameters):
    # The second is the one of Stable Diffusion; both counted in diffusers too.
    with torch.device("meta"):
        network = AutoencoderKL((3, 256, 256), None, **option(name))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_the_autoencoder_of_a_pipeline_is_found(folder, tmp_path):
    folder.rename(tmp_path / "vae")
    found, given = (autoencoder_of(path).state_dict() for path in (tmp_path, PUBLISHED))
    assert_same(found, given, "weights")


def test_without_convolutions_beside_the_latents(folder):
    change(folder, use_quant_conv=False, use_post_quant_conv=False)
    state = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if "quant_conv" not in name}
    save_file(state, folder / WEIGHTS)
    network, with_them = (autoencoder_of(path) for path in (folder, PUBLISHED))
    x = torch.randn(1, 2, 8, 8)
    inner = with_them.encoder(x)
    assert torch.equal(network.encoder(x), inner)
    assert torch.equal(
        network.moments(x), inner
    )  # random weights: nothing reaches the ends of the log variance


def change(folder: Path, **fields: object) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | fields))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"act_fn": "gelu"}, "config.json: act_fn=gelu: must be 'silu'"),
        ({"block_out_channels": [8, 12]}, "must be multiples of the first"),
        ({"block_out_channels": [8, 32]}, r"has shape \[\d+.*\], not \["),
        ({"layers_per_block": 2}, "is missing"),
        ({"layers_per_block": 10**9}, "layers_per_block=1000000000: must be less than"),
    ],
)
def test_another_network_is_refused_in_a_line(folder, fields, words):
    change(folder, **fields)
    with pytest.raises(ValueError, match=rf"^latent.pretrained=[^;]*{words}[^;]*; choose another model$"):
        autoencoder_of(folder, "latent.pretrained")


def test_damaged_missing_and_pickled_weights_are_refused_in_a_line(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: .*; copy or download it again$"):
        autoencoder_of(folder)
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"\.bin is pickled and could run code; save .* safe_serialization=True"
    ):
        autoencoder_of(folder)
    with pytest.raises(ValueError, match=r"^key=nowhere: does not exist; give a folder"):
        autoencoder_of("nowhere")


def test_the_log_variance_stays_within_its_published_bounds():
    network = small(quant_conv=True)
    with torch.no_grad():
        network.get_parameter("quant_conv.weight").zero_()
        network.get_parameter("quant_conv.bias").copy_(torch.tensor([-50.0, 0, 50, -50, 0, 50]))
    mean, log_variance = network.moments(torch.zeros(1, 1, 8, 12)).chunk(2, dim=1)
    assert mean[0, :, 0, 0].tolist() == [-50, 0, 50]
    assert log_variance[0, :, 0, 0].tolist() == [-30, 0, 20]


def test_what_is_decoded_is_drawn_from_the_moments():
    network, x, eps = small(), torch.randn(2, 1, 8, 12), torch.randn(2, 3, 4, 6)
    mean, log_variance = network.moments(x).chunk(2, dim=1)
    images, moments = network(x, eps)
    assert torch.equal(moments, torch.cat([mean, log_variance], dim=1))
    torch.testing.assert_close(images, network.decode(mean + log_variance.exp().sqrt() * eps))


def test_recomputing_activations_changes_no_gradient():
    def gradients(recompute: bool) -> list[Tensor]:
        network = small(gradient_checkpointing=recompute)
        images, moments = network(torch.ones(1, 1, 8, 12), torch.ones(1, 3, 4, 6))
        (images.square().mean() + moments.square().mean()).backward()
        return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]

    assert len(gradients(True)) == len(list(small().parameters()))
    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


def test_images_that_the_latents_do_not_divide_are_refused_at_construction():
    with pytest.raises(
        ValueError, match=r"image sizes must be multiples of 2, but images are 8x9; use fewer levels"
    ):
        AutoencoderKL((1, 8, 9), None, **SMALL)
    assert small().factor == 2
    assert small().latent_shape((1, 8, 12)) == (3, 4, 6)


pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
