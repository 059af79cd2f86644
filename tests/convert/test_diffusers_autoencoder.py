"""Autoencoders of diffusers, both ways."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_cli.config.validate import check_node
from diffusion_cli.convert import diffusers_autoencoder as convert
from diffusion_cli.convert.base import Network
from diffusion_cli.convert.diffusers_folder import read_folder
from diffusion_cli.diffusion.latents import Latents
from diffusion_cli.errors import FormatError
from helpers.convert import agree, autoencoder_of, built, same_bytes
from helpers.networks import randomised

diffusers = pytest.importorskip("diffusers")

LAYOUTS: list[dict[str, Any]] = [
    {"block_out_channels": [8, 16], "layers_per_block": 1, "latent_channels": 3},
    {
        "block_out_channels": [8],
        "layers_per_block": 2,
        "latent_channels": 1,
        "in_channels": 1,
        "out_channels": 1,
    },
    {"block_out_channels": [4, 8, 8], "layers_per_block": 1, "latent_channels": 4, "quant_conv": False},
]


def kl(block_out_channels: list[int], quant_conv: bool = True, **options: Any) -> Any:
    levels = len(block_out_channels)
    network = diffusers.AutoencoderKL(
        block_out_channels=block_out_channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        norm_num_groups=4,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
        **options,
    )
    return randomised(network).eval().requires_grad_(False)


def vq(block_out_channels: list[int], **options: Any) -> Any:
    levels = len(block_out_channels)
    network = diffusers.VQModel(
        block_out_channels=block_out_channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        norm_num_groups=4,
        **options,
    )
    return randomised(network).eval().requires_grad_(False)


def config_of(network: Any) -> dict[str, Any]:
    return dict(network.config) | {"_class_name": type(network).__name__}


def examples(network: Any) -> tuple[Tensor, Tensor]:
    """Random images and latents."""
    side = 4 * 2 ** (len(network.config.block_out_channels) - 1)
    return (
        torch.randn(2, network.config.in_channels, side, 2 * side),
        torch.randn(2, network.config.latent_channels, 4, 8),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_encodes_and_decodes_as_diffusers(layout, tmp_path):
    theirs = kl(**layout)
    theirs.save_pretrained(tmp_path)
    network = autoencoder_of(tmp_path)
    x, z = examples(theirs)
    with torch.no_grad():
        agree(network.moments(x), theirs.encode(x).latent_dist.parameters)
        agree(network.decode(z), theirs.decode(z).sample)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_returns_to_diffusers_unchanged(layout):
    theirs = kl(**layout)
    network = convert.read(config_of(theirs))
    written = convert.write(network, 0.18215)
    assert config_of(theirs) | written == config_of(theirs)
    assert convert.read(written) == network
    state = convert.state(network, convert.weights(network, theirs.state_dict()))
    diffusers.AutoencoderKL.from_config(written).load_state_dict(state)
    same_bytes(state, theirs.state_dict())


@pytest.mark.parametrize(
    ("size", "sides"), [(24, (24, 24)), ([16, 24], (16, 24)), (None, (4, 4)), (30, (4, 4))]
)
def test_images_have_the_stated_size_or_the_smallest(size, sides):
    config = config_of(kl([4, 8, 8])) | {"sample_size": size}
    network = convert.read(config)
    assert network.shape == (3, *sides)
    assert convert.read(convert.write(network)) == network


def test_old_names_of_attention_layers_are_renamed():
    network, new = Network(node={}, shape=(1,)), "encoder.mid_block.attentions.0.{}.weight"
    for old, name in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
        tensor = torch.zeros(1)
        assert convert.weights(network, {new.format(old): tensor}) == {new.format(name): tensor}


# --- VQModel ---

CODEBOOKS: list[dict[str, Any]] = [
    {"block_out_channels": [8, 16], "num_vq_embeddings": 20, "vq_embed_dim": 3},
    {"block_out_channels": [8], "num_vq_embeddings": 5, "latent_channels": 4, "vq_embed_dim": 2},
]


@pytest.mark.parametrize("layout", CODEBOOKS)
def test_a_codebook_encodes_and_decodes_as_in_diffusers(layout, tmp_path):
    theirs = vq(**layout)
    theirs.save_pretrained(tmp_path / "vqvae")
    network = autoencoder_of(tmp_path)
    side = 4 * network.factor
    x, z = torch.randn(2, 3, side, 2 * side), torch.randn(2, layout["vq_embed_dim"], 4, 8)
    with torch.no_grad():
        mean, log_variance = network.moments(x).chunk(2, dim=1)
        agree(mean, theirs.encode(x).latents)
        agree(network.decode(z), theirs.decode(z).sample)
    assert log_variance.unique().tolist() == [-30]


@pytest.mark.parametrize("layout", CODEBOOKS)
def test_a_codebook_returns_to_diffusers_unchanged(layout):
    theirs = vq(**layout)
    network = convert.read(config_of(theirs))
    written = convert.write(network, 0.18215)
    assert config_of(theirs) | written == config_of(theirs)
    assert convert.read(written) == network
    same_bytes(convert.state(network, convert.weights(network, theirs.state_dict())), theirs.state_dict())


def test_a_codebook_has_one_factor_of_its_latents():
    theirs = vq(**CODEBOOKS[0], scaling_factor=0.5)
    network = convert.read(config_of(theirs))
    assert convert.statistics(config_of(theirs)) == ((0.0, 0.0, 0.0), (2.0, 2.0, 2.0))
    assert convert.normalized(network, theirs.state_dict(), [0.0] * 3, [2.0] * 3).scaling_factor == 0.5
    for mean, std in (([1.0, 1.0, 1.0], [2.0, 2.0, 2.0]), ([0.0, 0.0, 0.0], [1.0, 1.0, 2.0])):
        with pytest.raises(FormatError, match="a VQModel in diffusers has one factor"):
            convert.normalized(network, theirs.state_dict(), mean, std)


def test_the_codebook_of_a_pipeline_decodes_the_latents_of_its_denoiser(tmp_path):
    theirs = vq(**CODEBOOKS[0], scaling_factor=0.5)
    unet = diffusers.UNet2DModel(
        4, 3, 3, block_out_channels=[8], norm_num_groups=4,
        down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"], add_attention=False,
    )  # fmt: skip
    diffusers.LDMPipeline(vqvae=theirs, unet=unet, scheduler=diffusers.DDIMScheduler()).save_pretrained(
        tmp_path
    )
    found = read_folder(tmp_path).autoencoder
    assert found is not None
    assert found.network.shape == (3, 8, 8)
    space = Latents(built(found.network, found.weights()), found.network.shape, found.mean, found.std)
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        agree(space.decode(x), theirs.decode(x / 0.5).sample)


def test_runs_may_have_an_imported_codebook():
    network = convert.read(config_of(vq(**CODEBOOKS[0])))
    assert check_node("model", network.node) == []


# --- statistics of the latents ---


@pytest.mark.parametrize(
    ("fields", "mean", "std"),
    [
        ({}, (0.0, 0.0), (1 / 0.18215, 1 / 0.18215)),
        ({"scaling_factor": 0.5, "shift_factor": 0.25}, (0.25, 0.25), (2.0, 2.0)),
        (
            {"scaling_factor": 0.5, "latents_mean": [1.0, 2.0], "latents_std": [3.0, 4.0]},
            (1.0, 2.0),
            (6.0, 8.0),
        ),
    ],
)
def test_statistics_of_latents(fields, mean, std):
    assert convert.statistics({"_class_name": "AutoencoderKL", "latent_channels": 2, **fields}) == (mean, std)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folded_statistics_encode_and_decode_the_latents_of_the_denoiser(layout):
    theirs = kl(**layout)
    network = convert.read(config_of(theirs))
    channels = network.node["latent_channels"]
    mean, std = [0.5 * c - 0.3 for c in range(channels)], [0.25 + 0.5 * c for c in range(channels)]
    folded = convert.normalized(network, theirs.state_dict(), mean, std)
    assert folded.scaling_factor == 1
    exported = diffusers.AutoencoderKL.from_config(convert.write(folded.network, folded.scaling_factor))
    exported.load_state_dict(folded.weights)
    centre, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
    (x, states), before = examples(theirs), built(network, theirs.state_dict())
    with torch.no_grad():
        moments, posterior = before.moments(x), exported.eval().encode(x).latent_dist
        centres, log_variance = moments.chunk(2, dim=1)
        agree(posterior.mean, (centres - centre) / scale)
        agree(posterior.std, torch.exp(0.5 * log_variance) / scale)
        agree(exported.decode(states).sample, before.decode(states * scale + centre))


def test_a_common_scale_leaves_the_weights_unchanged():
    theirs = kl(**LAYOUTS[2])
    network = convert.read(config_of(theirs))
    for scale in (1.0, 4.0):
        found = convert.normalized(network, theirs.state_dict(), [0.0] * 4, [scale] * 4)
        assert (found.network, found.scaling_factor) == (network, 1 / scale)
        same_bytes(found.weights, theirs.state_dict())


# --- refusals ---


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"_class_name": "UNet2DModel"}, "_class_name=UNet2DModel: must be 'AutoencoderKL' or 'VQModel'"),
        ({"_class_name": "VQModel", "norm_type": "spatial"}, "norm_type=spatial: must be 'group'"),
        (
            {"_class_name": "VQModel", "num_vq_embeddings": 10**9},
            "num_vq_embeddings=1000000000: must be less",
        ),
        ({"act_fn": "gelu"}, "act_fn=gelu: must be 'silu'"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention=false: must be True"),
        ({"use_quant_conv": False}, "use_post_quant_conv=true contradicts"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "must be 'DownEncoderBlock2D'"),
        ({"down_block_types": ["DownEncoderBlock2D"] * 2}, "down_block_types=.* contradicts"),
        ({"block_out_channels": [8, 12]}, "contradicts|multiples of the first"),
        ({"norm_num_groups": 3}, "norm_num_groups=3 does not divide 64"),
        ({"layers_per_block": 10**9}, "layers_per_block=1000000000: must be less than"),
        ({"latent_channels": "4"}, "latent_channels=4: must be a valid integer"),
        ({"sample_size": 2**40}, "sample_size.*: must be less than"),
        ({"sample_size": [8, 8, 8]}, "sample_size=.*: .* at most 2 items"),
        ({"block_out_channels": [2**40]}, r"block_out_channels\.0=.*: must be less than"),
    ],
)
def test_other_networks_are_refused(fields, words):
    with pytest.raises(FormatError, match=words):
        convert.read({"_class_name": "AutoencoderKL", **fields})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"latents_std": [1.0]}, "latents_std has 1 values for 4 latent channels"),
        ({"latents_std": [1.0, 1.0, 1.0, 0.0]}, r"latents_std\.3=0.0: must be greater than 0"),
        ({"scaling_factor": 0.0}, "scaling_factor=0.0: must be greater than 0"),
    ],
)
def test_invalid_statistics_are_refused(fields, words):
    with pytest.raises(FormatError, match=words):
        convert.statistics({"_class_name": "AutoencoderKL", **fields})
