"""Autoencoders of diffusers, AutoencoderKL and VQModel. This module imports torch only to change tensors."""

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from diffusion_cli.convert.base import Network, Node, Weights, parse
from diffusion_cli.convert.diffusers_names import present_name
from diffusion_cli.errors import FormatError, format_value

KL = "diffusion_cli.networks.AutoencoderKL"
VQ = "diffusion_cli.networks.VQModel"

Width = Annotated[int, Field(gt=0, le=2**14)]

Sides = Annotated[
    list[Width],
    Field(min_length=2, max_length=2),
    BeforeValidator(lambda value: [value, value] if isinstance(value, int) else value),
]

Count = Annotated[int, Field(gt=0, le=64)]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Config(BaseModel):
    """Fields of both kinds of config.json that the network depends on, with the defaults of diffusers."""

    model_config = ConfigDict(strict=True, extra="ignore")
    class_name: Literal["AutoencoderKL", "VQModel"] = Field(alias="_class_name")
    in_channels: Count = 3
    out_channels: Count = 3
    sample_size: Sides | None = [32, 32]
    down_block_types: list[Literal["DownEncoderBlock2D"]] = ["DownEncoderBlock2D"]
    up_block_types: list[Literal["UpDecoderBlock2D"]] = ["UpDecoderBlock2D"]
    block_out_channels: Annotated[list[Width], Field(min_length=1, max_length=10)] = [64]
    layers_per_block: Count = 1
    act_fn: Literal["silu"] = "silu"
    norm_num_groups: Width = 32
    mid_block_add_attention: Literal[True] = True
    scaling_factor: Positive = 0.18215


class _KLConfig(_Config):
    latent_channels: Count = 4
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    shift_factor: Finite | None = None
    latents_mean: list[Finite] | None = None
    latents_std: list[Positive] | None = None


class _VQConfig(_Config):
    latent_channels: Count = 3
    vq_embed_dim: Count | None = None
    num_vq_embeddings: Annotated[int, Field(gt=0, le=2**20)] = 256
    norm_type: Literal["group"] = "group"


def _parsed(config: Node) -> _KLConfig | _VQConfig:
    return parse(_VQConfig if config.get("_class_name") == "VQModel" else _KLConfig, config)


def read(config: Node) -> Network:
    """Return the network of a config.json; FormatError, naming the key, for one without an equivalent.

    Its images have `sample_size`, or the smallest size if that is unknown or no multiple of `factor`.
    """
    fields = _parsed(config)
    widths = fields.block_out_channels
    same = {
        "out_channels": fields.in_channels,
        **({"use_post_quant_conv": fields.use_quant_conv} if isinstance(fields, _KLConfig) else {}),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }
    for name, value in same.items():
        if (found := getattr(fields, name)) != value:
            raise FormatError(f"{name}={format_value(found)} contradicts the other fields")
    if any(width % widths[0] for width in widths):
        raise FormatError(f"block_out_channels={widths} must be multiples of the first")
    if widths[0] % fields.norm_num_groups:
        raise FormatError(f"norm_num_groups={fields.norm_num_groups} does not divide {widths[0]} channels")
    common = {
        "channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": fields.layers_per_block,
        "norm_groups": fields.norm_num_groups,
        "gradient_checkpointing": False,
    }
    if isinstance(fields, _VQConfig):
        node = {
            "_target_": VQ,
            **common,
            "latent_channels": fields.vq_embed_dim or fields.latent_channels,
            "feature_channels": fields.latent_channels,
            "codebook_size": fields.num_vq_embeddings,
        }
    else:
        node = {
            "_target_": KL,
            **common,
            "latent_channels": fields.latent_channels,
            "quant_conv": fields.use_quant_conv,
        }
    sides, least = fields.sample_size, factor(node)
    if sides is None or any(side % least for side in sides):
        sides = [least, least]
    return Network(node=node, shape=(fields.in_channels, *sides))


def factor(node: Node) -> int:
    """Return the number of pixels per latent along each side."""
    return 2 ** (len(node["channel_mult"]) - 1)


class Statistics(NamedTuple):
    """Mean and standard deviation per channel of latents z, where a denoiser works on (z - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def statistics(config: Node) -> Statistics:
    """Return the statistics of the latents in a config.json; FormatError for invalid ones.

    `(z - latents_mean) / latents_std * scaling_factor`, or `(z - shift_factor) * scaling_factor`, is the input of the
    denoiser.
    """
    fields = _parsed(config)
    if isinstance(fields, _VQConfig):
        channels = fields.vq_embed_dim or fields.latent_channels
        return Statistics((0.0,) * channels, (1 / fields.scaling_factor,) * channels)
    channels = fields.latent_channels
    mean = fields.latents_mean or [fields.shift_factor or 0.0] * channels
    std = fields.latents_std or [1.0] * channels
    for name, values in {"latents_mean": mean, "latents_std": std}.items():
        if len(values) != channels:
            raise FormatError(f"{name} has {len(values)} values for {channels} latent channels")
    return Statistics(tuple(mean), tuple(value / fields.scaling_factor for value in std))


def shifts(config: Node) -> list[str]:
    """Return the settings in a config.json that change latents by more than one factor."""
    fields = _parsed(config)
    if isinstance(fields, _VQConfig):
        return []
    std = fields.latents_std or [1.0]
    changes = {
        "shift_factor": bool(fields.shift_factor) and not fields.latents_mean,
        "latents_mean": any(fields.latents_mean or ()),
        "latents_std": any(value != 1 for value in std),
    }
    return [name for name, changed in changes.items() if changed]


def weights(network: Network, state: Weights) -> Weights:
    """Return the weights of a file by the names of the network, which are the present ones of diffusers."""
    return {present_name(name): tensor for name, tensor in state.items()}


def write(network: Network, scaling_factor: float = 1.0) -> Node:
    """Return the config.json of a network, for latents that the denoiser multiplies by `scaling_factor`.

    Raises:
        FormatError: the network is for volumes.
    """
    node, levels = network.node, len(network.node["channel_mult"])
    if len(network.shape) != 3:
        raise FormatError(f"shape={format_value(list(network.shape))}: autoencoders of diffusers need images")
    height, width = network.shape[1:]
    if node["_target_"] == VQ:
        own = {
            "_class_name": "VQModel",
            "latent_channels": node["feature_channels"],
            "vq_embed_dim": node["latent_channels"],
            "num_vq_embeddings": node["codebook_size"],
            "norm_type": "group",
        }
    else:
        own = {
            "_class_name": "AutoencoderKL",
            "latent_channels": node["latent_channels"],
            "use_quant_conv": node["quant_conv"],
            "use_post_quant_conv": node["quant_conv"],
        }
    return own | {
        "in_channels": network.shape[0],
        "out_channels": network.shape[0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [mult * node["channels"] for mult in node["channel_mult"]],
        "layers_per_block": node["num_res_blocks"],
        "act_fn": "silu",
        "norm_num_groups": node["norm_groups"],
        "sample_size": height if height == width else [height, width],
        "scaling_factor": scaling_factor,
        "mid_block_add_attention": True,
    }


def state(network: Network, weights: Weights) -> Weights:
    """Return weights by the names of diffusers, which are those of the network."""
    return dict(weights)


class Normalized(NamedTuple):
    """An autoencoder with the latents of a denoiser, up to a factor."""

    network: Network
    weights: Weights
    scaling_factor: float
    """Factor between its latents and those of the denoiser."""


def normalized(network: Network, weights: Weights, mean: Sequence[float], std: Sequence[float]) -> Normalized:
    """Return an autoencoder with latents (z - mean) / std, where z are the latents of `network`.

    A common factor 1 / std is returned as `scaling_factor`, and the weights are unchanged. Other statistics change the
    1x1 convolutions beside the latents, which are added if there are none: in the encoder

        mean' = (mean_z - mean) / std,  log_variance' = log_variance_z - 2 log(std),

    and in the decoder z = std x + mean. This is exact up to rounding, and to the limits of the log variance.

    Args:
        network: an autoencoder with L latent channels.
        weights: its weights.
        mean: mean of each channel of z, [L].
        std: standard deviation of each channel of z, [L].

    Raises:
        FormatError: a VQModel has other statistics than a common factor.
    """
    import torch

    if not any(mean) and len(set(std)) == 1:
        return Normalized(network, dict(weights), 1 / std[0])
    if network.node["_target_"] == VQ:
        raise FormatError("a VQModel in diffusers has one factor for all latents, without a mean")
    centre, scale = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
    (dtype,) = {tensor.dtype for name, tensor in weights.items() if name.endswith("conv_in.weight")}
    convolutions = {}
    for name, channels in {"quant_conv": 2 * len(centre), "post_quant_conv": len(centre)}.items():
        identity = torch.eye(channels, dtype=torch.float64)[:, :, None, None]
        convolutions[f"{name}.weight"] = weights.get(f"{name}.weight", identity).double()
        convolutions[f"{name}.bias"] = weights.get(f"{name}.bias", torch.zeros(channels)).double()
    rows = torch.cat([1 / scale, torch.ones_like(scale)])
    offset = torch.cat([-centre / scale, -2 * scale.log()])
    inward, outward = convolutions["quant_conv.weight"], convolutions["post_quant_conv.weight"]
    folded = {
        "quant_conv.weight": rows[:, None, None, None] * inward,
        "quant_conv.bias": rows * convolutions["quant_conv.bias"] + offset,
        "post_quant_conv.weight": outward * scale[None, :, None, None],
        "post_quant_conv.bias": convolutions["post_quant_conv.bias"] + outward[:, :, 0, 0] @ centre,
    }
    changed = {name: tensor.to(dtype) for name, tensor in folded.items()}
    return Normalized(
        Network(node=network.node | {"quant_conv": True}, shape=network.shape), weights | changed, 1.0
    )
