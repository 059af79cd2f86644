"""Networks of the class UNet2DModel of diffusers, as published but narrow."""

import json
from importlib import import_module
from typing import Any

import torch
from torch import nn

from diffusion_cli.convert import diffusers_unet as convert
from diffusion_cli.convert.base import Node
from helpers.convert import built

DDPM: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": [8, 16, 16, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 4,
}
LSUN = {
    "sample_size": 256,
    "block_out_channels": [4, 4, 8, 8, 16, 16],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 4,
}
IMPROVED = {
    "sample_size": 16,
    "block_out_channels": [8, 16, 16],
    "layers_per_block": 1,
    "out_channels": 6,
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "attn_norm_num_groups": 4,
    "dropout": 0.3,
}
CONDITIONAL = {
    "sample_size": [8, 16],
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "num_class_embeds": 5,
    "flip_sin_to_cos": False,
}
FOURIER = CONDITIONAL | {
    "num_class_embeds": None,
    "add_attention": False,
    "flip_sin_to_cos": True,
    "time_embedding_type": "fourier",
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
}
ONE_LEVEL = {
    "sample_size": 8,
    "block_out_channels": [8],
    "layers_per_block": 1,
    "down_block_types": ["AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D"],
    "norm_num_groups": 2,
    "freq_shift": 1,
}
NCSNPP = {
    "sample_size": 256,
    "block_out_channels": [128] * 7,
    "layers_per_block": 1,
    "down_block_types": [*["SkipDownBlock2D"] * 4, "AttnSkipDownBlock2D", *["SkipDownBlock2D"] * 2],
    "up_block_types": [*["SkipUpBlock2D"] * 2, "AttnSkipUpBlock2D", *["SkipUpBlock2D"] * 4],
    "attention_head_dim": None,
    "norm_num_groups": None,
    "norm_eps": 1e-6,
    "time_embedding_type": "fourier",
    "mid_block_scale_factor": 1.41421356237,
    "center_input_sample": True,
}
NCSNPP_NARROW = NCSNPP | {
    "sample_size": 8,
    "block_out_channels": [128, 256],
    "down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D"],
    "up_block_types": ["AttnSkipUpBlock2D", "SkipUpBlock2D"],
    "attention_head_dim": 64,
    "norm_num_groups": 32,
    "time_embedding_type": "positional",
    "center_input_sample": False,
}
ALL = {
    "ddpm": DDPM,
    "lsun": LSUN,
    "improved": IMPROVED,
    "conditional": CONDITIONAL,
    "fourier": FOURIER,
    "one_level": ONE_LEVEL,
    "ncsnpp": NCSNPP,
    "ncsnpp_narrow": NCSNPP_NARROW,
}


def unet(fields: dict[str, Any]) -> Any:
    """A UNet2DModel with random weights, none of them zero."""
    torch.manual_seed(0)
    network = import_module("diffusers").UNet2DModel(**fields)
    for name, parameter in network.named_parameters():
        # Small frequencies, because angles of diffusers are rounded to float32.
        nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.1)
    return network.eval().requires_grad_(False)


def config_of(theirs: Any) -> Node:
    """The content of config.json."""
    return json.loads(theirs.to_json_string())


def imported(theirs: Any) -> Any:
    """The network here with the weights of theirs."""
    network = convert.read(config_of(theirs))
    return built(network, convert.weights(network, theirs.state_dict()))
