"""U-Nets with another class embedding or old names, and those that are refused."""

from inspect import signature
from typing import Any

import pytest
import torch

from diffusion_cli.config import build
from diffusion_cli.convert import diffusers_unet as convert
from diffusion_cli.convert.base import Network, Node
from diffusion_cli.convert.diffusers_unet_layers import UNetOptions
from diffusion_cli.errors import FormatError
from diffusion_cli.networks import UNet
from helpers.convert import agree, same_bytes
from helpers.networks import randomised
from helpers.unets import CONDITIONAL, DDPM, IMPROVED, NCSNPP_NARROW, config_of, imported, unet

diffusers = pytest.importorskip("diffusers")

SMALL: Node = {
    "_target_": "diffusion_cli.networks.UNet",
    "channels": 8,
    "channel_mult": [1, 2],
    "attention_resolutions": [4],
    "head_channels": 8,
    "class_conditional": True,
}
OURS = Network(node=SMALL, shape=(3, 8, 8), num_classes=3)
SKIPS: Node = SMALL | {
    "channels": 128,
    "norm_groups": 32,
    "embedding_layout": "fourier",
    "scale_by_sigma": True,
    "resample": "block_proj",
    "fir": True,
    "fir_padding": "zeros",
    "progressive_input": "input_skip",
    "progressive_output": "output_skip",
    "up_attention": "last",
    "skip_rescale": True,
    "class_conditional": False,
}


def exported(network: Network, ours: Any) -> Any:
    """UNet2DModel with the weights of a network here."""
    theirs = diffusers.UNet2DModel.from_config(convert.write(network))
    theirs.load_state_dict(convert.state(network, ours.state_dict()))
    return theirs.eval()


def test_the_options_have_the_defaults_of_the_network():
    parameters = signature(UNet).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
    assert UNetOptions().model_dump() == defaults


def test_the_null_class_is_the_last_class_in_diffusers_and_returns():
    ours = randomised(build(SMALL, OURS.shape, 3)).eval()
    theirs = exported(OURS, ours)
    assert theirs.config.num_class_embeds == 4
    x, timestep = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 30.0])
    with torch.no_grad():
        agree(theirs(x, timestep, torch.tensor([1, 3])).sample, ours(x, timestep, torch.tensor([1, 3])))
    again = convert.read(convert.write(OURS))
    assert (again.num_classes, again.null_class, again.shape) == (3, True, OURS.shape)
    same_bytes(convert.weights(again, theirs.state_dict()), ours.state_dict())


def test_a_model_of_diffusers_has_no_null_class_and_ours_is_zero():
    theirs = unet(CONDITIONAL)
    network = convert.read(config_of(theirs))
    rows = convert.weights(network, theirs.state_dict())["class_embedding.weight"]
    assert (network.num_classes, network.null_class) == (5, False)
    assert rows.shape[0] == 6
    assert not rows[5].any()


def test_an_unconditional_network_of_labelled_data_has_no_classes():
    network = Network(node=SMALL | {"class_conditional": False}, shape=(3, 8, 8), num_classes=3)
    assert convert.write(network)["num_class_embeds"] is None


def test_the_published_network_with_skips_is_exported():
    network = Network(node=SKIPS, shape=(3, 8, 8))
    ours = build(SKIPS, network.shape, None).eval()
    for name, parameter in ours.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.1)
    x, timestep = torch.randn(2, 3, 8, 8), torch.tensor([0.9, 1.1])
    with torch.no_grad():
        agree(exported(network, ours)(x, timestep).sample, ours(x, timestep.log()))


@pytest.mark.parametrize(
    ("old", "new"),
    [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")],
)
def test_old_names_of_attention_layers_are_read(old, new):
    theirs = unet(DDPM)
    renamed = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in theirs.state_dict().items()}
    assert renamed.keys() != theirs.state_dict().keys()
    network = convert.read(config_of(theirs))
    same_bytes(convert.weights(network, renamed), imported(theirs).state_dict())


def test_frequencies_with_two_names_are_read():
    theirs = unet(NCSNPP_NARROW | {"time_embedding_type": "fourier"})
    state, network = dict(theirs.state_dict()), convert.read(config_of(theirs))
    expected = convert.weights(network, state)
    same_bytes(convert.weights(network, state | {"time_proj.W": state["time_proj.weight"]}), expected)
    state["time_proj.W"] = state.pop("time_proj.weight")
    same_bytes(convert.weights(network, state), expected)


@pytest.mark.parametrize("fields", [CONDITIONAL, IMPROVED], ids=["conditional", "improved"])
def test_shapes_alone_are_enough(fields):
    theirs = unet(fields)
    network = convert.read(config_of(theirs))
    found = convert.weights(
        network, {name: tensor.to("meta") for name, tensor in theirs.state_dict().items()}
    )
    with torch.device("meta"):
        expected = build(network.node, network.shape, network.num_classes).state_dict()
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("conv_in.bias"), "conv_in.bias is missing"),
        (
            lambda state: state.pop("mid_block.attentions.0.to_k.weight"),
            "attentions.0.to_k.weight is missing",
        ),
        (lambda state: state.update(extra=torch.zeros(1)), "extra is not part of the network"),
        (
            lambda state: state.update({"mid_block.attentions.0.to_v.bias": torch.zeros(3)}),
            "mid_block.attentions.0: the shapes of to_q, to_k, to_v differ",
        ),
        (
            lambda state: state.update(
                {f"mid_block.attentions.0.to_{name}.bias": torch.zeros(()) for name in "qkv"}
            ),
            "mid_block.attentions.0: the shapes of .* are empty",
        ),
        (
            lambda state: state.update({"class_embedding.weight": torch.zeros(())}),
            "class_embedding.weight has no",
        ),
    ],
)
def test_other_tensors_are_refused(change, words):
    theirs = unet(CONDITIONAL)
    state = dict(theirs.state_dict())
    change(state)
    with pytest.raises(FormatError, match=words):
        convert.weights(convert.read(config_of(theirs)), state)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "_class_name=UNet2DConditionModel: must be 'UNet2DModel'"),
        ({"sample_size": None}, "sample_size is missing"),
        ({"sample_size": 12}, r"sample_size=\[12, 12\]: sizes must be multiples of 8 for 4 levels"),
        ({"sample_size": 2**40}, "sample_size.0=1099511627776: must be less than"),
        ({"out_channels": 4}, "out_channels=4: must be 3, or 6 with a learned variance"),
        (
            {"center_input_sample": True},
            "center_input_sample=true: has no equivalent with time_embedding_type=pos",
        ),
        (
            {"time_embedding_type": "learned"},
            "time_embedding_type=learned: must be 'positional' or 'fourier'",
        ),
        ({"time_embedding_dim": 16}, "time_embedding_dim=16: must be 4 x 8 = 32"),
        ({"freq_shift": 2}, "freq_shift=2: must be 0 or 1"),
        (
            {"down_block_types": ["DownBlock2D"]},
            r"down_block_types=.*: must have 4 blocks, as block_out_channels",
        ),
        (
            {"down_block_types": ["KDownBlock2D"] * 4},
            "down_block_types.0=KDownBlock2D: must be 'DownBlock2D'",
        ),
        (
            {"down_block_types": ["DownBlock2D"] * 4},
            "up_block_types=.*: must have attention at the levels of",
        ),
        (
            {"down_block_types": ["SkipDownBlock2D"] * 4},
            "no equivalent if only some blocks are those of NCSN",
        ),
        ({"downsample_type": "resnet"}, r"must resample all by convolutions or all .*downsample_type=resnet"),
        ({"mid_block_type": None}, "mid_block_type=null: must be 'UNetMidBlock2D'"),
        ({"block_out_channels": [8, 12, 16, 16]}, "block_out_channels=.*: must be multiples of the first"),
        ({"block_out_channels": [2**40] * 4}, r"block_out_channels.0=.*: must be less than"),
        ({"layers_per_block": 10**9}, "layers_per_block=1000000000: must be less than"),
        ({"layers_per_block": "2"}, "layers_per_block=2: must be a valid integer"),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor=2.*: must be 1, as in the other blocks"),
        ({"mid_block_scale_factor": float("nan")}, "mid_block_scale_factor=nan: must be a finite number"),
        ({"downsample_padding": 2}, "downsample_padding=2: must be 0 or 1"),
        ({"act_fn": "gelu"}, "act_fn=gelu: must be 'silu' or 'swish'"),
        ({"attention_head_dim": 5}, "attention_head_dim=5: does not divide the 16 channels"),
        ({"norm_num_groups": None}, "norm_num_groups=null: must be a number"),
        ({"norm_num_groups": 3}, "norm_num_groups=3: does not divide 8 channels"),
        ({"attn_norm_num_groups": 2}, "attn_norm_num_groups=2: the attention of the middle block"),
        (
            {"resnet_time_scale_shift": "scale_shift"},
            "attn_norm_num_groups=null: the attention of the middle",
        ),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift=spatial: must be"),
        ({"class_embed_type": "timestep"}, "class_embed_type=timestep: must be None"),
        ({"num_class_embeds": 2**40}, "num_class_embeds=1099511627776: must be less than"),
        ({"_null_class": True}, "num_class_embeds=null: must be at least 2 with _null_class=true"),
    ],
)
def test_other_networks_are_refused(changes, words):
    with pytest.raises(FormatError, match=words):
        convert.read({"_class_name": "UNet2DModel", **DDPM, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"block_out_channels": [64, 128]},
            "block_out_channels=.*: blocks of NCSN.. with fewer than 128 channels",
        ),
        ({"in_channels": 1, "out_channels": 1}, "in_channels=1: must be 3 with the blocks of NCSN"),
        ({"norm_num_groups": 16}, "norm_num_groups=16: must be 32 with the blocks of NCSN"),
        ({"mid_block_scale_factor": 1}, r"mid_block_scale_factor=1.*: must be sqrt\(2\)"),
        ({"out_channels": 6, "time_embedding_type": "fourier"}, "out_channels=6: "),
    ],
)
def test_other_networks_with_skips_are_refused(changes, words):
    with pytest.raises(FormatError, match=words):
        convert.read({"_class_name": "UNet2DModel", **NCSNPP_NARROW, **changes})


@pytest.mark.parametrize(
    ("node", "shape", "words"),
    [
        (SMALL, (3, 8), r"shape=\[3, 8\]: UNet2DModel needs images"),
        (SMALL, (3, 9, 8), r"shape=\[9, 8\]: sizes must be multiples of 2 for 2 levels"),
        (SMALL | {"channel_mult": [2, 2]}, (3, 8, 8), r"channel_mult=\[2, 2\]: must begin with 1 in UNet2DModel"),
        (SMALL | {"patch_size": 2}, (3, 8, 8), "patch_size=2: must be 1 in UNet2DModel"),
        (SMALL | {"embedding_channels": 7}, (3, 8, 8), "embedding_channels=7: must be 8, as the channels"),
        (SMALL | {"skip_rescale": True}, (3, 8, 8), "skip_rescale=true: with progressive_output=none"),
        (SMALL | {"resample": "block", "fir": True}, (3, 8, 8), "fir=true: .*UNet2DModel has fir=false"),
        (SMALL | {"resample": "block_proj"}, (3, 8, 8), "resample=block_proj: UNet2DModel has resample=conv"),
        (SMALL | {"progressive_input": "residual"}, (3, 8, 8), "progressive_input=residual: .*input=none"),
        (SMALL | {"up_attention": "last"}, (3, 8, 8), "up_attention=last: .*up_attention=all"),
        (
            SMALL | {"embedding_layout": "fourier"},
            (3, 8, 8),
            "scale_by_sigma=false: with embedding_layout=fourier, UNet2DModel has scale_by_sigma=true",
        ),
        (
            SMALL | {"num_heads": 2, "head_channels": None, "attention_resolutions": [8, 4]},
            (3, 8, 8),
            r"num_heads=2: .* the same channels per head in all attention layers, not \[4, 8\]",
        ),
        (SKIPS | {"channels": 64}, (3, 8, 8), "channels=64: .* needs 128 channels at each level"),
        (SKIPS, (1, 8, 8), "shape=1: .* needs 3 channels"),
        (SKIPS | {"fir_padding": "edge"}, (3, 8, 8), "fir_padding=edge: .* has fir_padding=zeros"),
        (SKIPS | {"progressive_input": "none"}, (3, 8, 8), "progressive_input=none: .*_input=input_skip"),
        (SKIPS | {"norm_groups": 16}, (3, 8, 8), "norm_groups=16: .* has norm_groups=32"),
    ],
)  # fmt: skip
def test_networks_that_diffusers_cannot_express_are_refused(node, shape, words):
    with pytest.raises(FormatError, match=words):
        convert.write(Network(node=node, shape=shape))


def test_heads_of_one_width_are_expressible():
    network = Network(node=SMALL | {"num_heads": 2, "head_channels": None}, shape=(3, 8, 8))
    assert convert.write(network)["attention_head_dim"] == 8
