"""UNet2DModel of diffusers, both ways."""

import json
from typing import Any

import pytest
import torch

from diffusion_cli.convert import diffusers_unet as convert
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.parameterizations import Score
from diffusion_cli.diffusion.schedules import VE
from helpers.convert import agree, same_bytes
from helpers.unets import ALL, CONDITIONAL, NCSNPP_NARROW, config_of, imported, unet

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module", params=ALL)
def theirs(request) -> Any:
    return unet(ALL[request.param])


def test_output_equals_that_of_diffusers(theirs):
    fields, ours = theirs.config, imported(theirs)
    sizes = [min(size, 64) for size in convert.read(config_of(theirs)).shape[1:]]
    x = torch.randn(2, fields.in_channels, *sizes)
    timestep = torch.tensor([0.5, 40.0])
    labels = torch.tensor([0, 4]) if fields.num_class_embeds else None
    with torch.no_grad():
        if fields.time_embedding_type == "positional":
            agree(ours(x, timestep, labels), theirs(x, timestep, labels).sample)
        elif fields.center_input_sample:  # data in [0, 1], and half the sigma
            expected = theirs((x + 1) / 2, timestep / 2, labels).sample / 2
            agree(ours(x, timestep.log(), labels), expected)
        else:
            agree(ours(x, timestep.log(), labels), theirs(x, timestep, labels).sample)


def test_returns_to_diffusers_unchanged(theirs):
    config, before = config_of(theirs), theirs.state_dict()
    network = convert.read(config)
    written = convert.write(network)
    scale = pytest.approx(config["mid_block_scale_factor"], abs=1e-9)
    groups = config["norm_num_groups"] or 32  # the blocks of NCSN++ without a number have 32
    same = config | {"mid_block_scale_factor": scale, "norm_num_groups": groups}
    assert written == {name: same[name] for name in written}
    assert convert.read(written) == network
    state = convert.state(network, convert.weights(network, before))
    same_bytes(state, before)


def test_diffusers_loads_what_is_written(tmp_path):
    from safetensors.torch import save_file

    theirs = unet(CONDITIONAL)
    network = convert.read(config_of(theirs))
    (tmp_path / "config.json").write_text(json.dumps(convert.write(network)))
    state = convert.state(network, convert.weights(network, theirs.state_dict()))
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = diffusers.UNet2DModel.from_pretrained(tmp_path).eval()
    x, labels = torch.randn(2, 1, 8, 16), torch.tensor([0, 4])
    with torch.no_grad():
        assert torch.equal(loaded(x, 3, labels).sample, theirs(x, 3, labels).sample)


def test_a_model_of_data_between_0_and_1_denoises_data_between_minus_1_and_1():
    fields = NCSNPP_NARROW | {"time_embedding_type": "fourier", "center_input_sample": True}
    theirs = unet(fields)
    denoiser = Denoiser(imported(theirs), VE(sigma_min=0.02, sigma_max=20.0), Score())
    t = torch.tensor([0.3, 0.5], dtype=torch.float64)
    sigma = denoiser.schedule(t)[1].float()[:, None, None, None]
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        score = theirs((x + 1) / 2, sigma.flatten() / 2).sample
        expected = (x + 1) / 2 + (sigma / 2) ** 2 * score
        agree(denoiser(x, t).x0, 2 * expected - 1)
