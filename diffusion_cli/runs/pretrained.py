"""Load pretrained autoencoders in the folder format of diffusers."""

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field

from diffusion_cli.config.validate import validate
from diffusion_cli.errors import FormatError, UsageError, format_value
from diffusion_cli.networks import AutoencoderKL
from diffusion_cli.runs.weights import check_fit, read_weights
from diffusion_cli.system.untrusted import read_json, reason

WEIGHTS = "diffusion_pytorch_model.safetensors"

Width = Annotated[int, Field(gt=0, le=2**14)]

Count = Annotated[int, Field(gt=0, le=64)]


class _DiffusersConfig(BaseModel):
    """Fields of config.json that the network depends on, with the defaults of diffusers."""

    model_config = ConfigDict(strict=True, extra="ignore")
    class_name: Literal["AutoencoderKL"] = Field(alias="_class_name")
    in_channels: Count = 3
    out_channels: Count = 3
    down_block_types: list[Literal["DownEncoderBlock2D"]] = ["DownEncoderBlock2D"]
    up_block_types: list[Literal["UpDecoderBlock2D"]] = ["UpDecoderBlock2D"]
    block_out_channels: Annotated[list[Width], Field(min_length=1, max_length=10)] = [64]
    layers_per_block: Count = 1
    act_fn: Literal["silu"] = "silu"
    latent_channels: Count = 4
    norm_num_groups: Width = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: Literal[True] = True


class Pretrained(NamedTuple):
    """An autoencoder with its weights, and the options to build it."""

    network: AutoencoderKL
    in_channels: int
    options: dict[str, Any]


def from_diffusers(folder: Path, key: str) -> Pretrained:
    """Load an autoencoder from a folder of diffusers, in evaluation mode on the CPU.

    The folder, or its subfolder `vae` in a pipeline, contains config.json and diffusion_pytorch_model.safetensors.
    Scaling factors of the latents are ignored.

    Raises UsageError, about the option `key`, for another network, for missing or damaged files, and for pickled
    weights, which could run code.
    """
    try:
        folder = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
        options = _options(_read_config(folder / "config.json"))
        channels = options.pop("in_channels")
        shape = (channels, *[2 ** (len(options["channel_mult"]) - 1)] * 2)
        state = read_weights(folder / WEIGHTS)
        # Check the size on the meta device first, because an untrusted config.json can ask for any size.
        with torch.device("meta"):
            check_fit(folder / WEIGHTS, AutoencoderKL(shape, None, **options), state)
    except (OSError, ValueError) as error:
        raise UsageError(
            key,
            folder,
            f"contains no readable AutoencoderKL ({reason(error)})",
            "give a folder written by AutoencoderKL.save_pretrained of diffusers, with safe_serialization=True",
        ) from error
    network = AutoencoderKL(shape, None, **options)
    network.load_state_dict(state)
    return Pretrained(network.eval().requires_grad_(False), channels, options)


def _read_config(path: Path) -> _DiffusersConfig:
    value = read_json(path)
    if not isinstance(value, dict):
        raise FormatError(f"{path.name} is not a JSON object")
    config, problems = validate(_DiffusersConfig, value)
    if problems:
        raise FormatError(f"{path.name}: {problems[0].cause}")
    return config


def _options(config: _DiffusersConfig) -> dict[str, Any]:
    """Return the arguments of our network and `in_channels`; FormatError for an unsupported configuration."""
    widths = config.block_out_channels
    same = {
        "out_channels": config.in_channels,
        "use_post_quant_conv": config.use_quant_conv,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }
    wrong = [name for name, value in same.items() if getattr(config, name) != value]
    if wrong:
        found = format_value(getattr(config, wrong[0]))
        raise FormatError(f"config.json: {wrong[0]}={found} contradicts the other fields")
    if any(width % widths[0] for width in widths):
        raise FormatError(f"config.json: block_out_channels={widths} must be multiples of the first")
    return {
        "in_channels": config.in_channels,
        "channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_groups": config.norm_num_groups,
        "quant_conv": config.use_quant_conv,
        "gradient_checkpointing": False,
    }
