"""The U-Net of diffusers, UNet2DModel, with the blocks of DDPM, improved DDPM and NCSN++.

This module imports torch only to change tensors. diffusers separates queries, keys and values, and names each level.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from diffusion_cli.convert.base import Network, Node, UnknownSize, Weights, parse
from diffusion_cli.convert.diffusers_names import present_name
from diffusion_cli.convert.diffusers_unet_layers import UNetOptions, layers_of
from diffusion_cli.errors import FormatError, format_value

if TYPE_CHECKING:
    from torch import Tensor

UNET = "diffusion_cli.networks.UNet"
NULL_CLASS = "_null_class"
"""Own field of config.json: the last class is the null class. diffusers ignores names with an underscore."""
FREQUENCIES = ("time_proj.weight", "time_proj.W")
"""Names of the Fourier frequencies; early versions of diffusers stored both."""
CLASSES = "class_embedding.weight"
PROJECTIONS = ("to_q", "to_k", "to_v")
KINDS = ("weight", "bias")
SKIP_GROUPS = 32
"""Groups of the group norms of NCSN++ at each level of at least `SKIP_WIDTH` channels."""
SKIP_WIDTH = 128
SQRT_2 = math.sqrt(2)
LAYOUTS = {
    "cos_sin": (True, 0),
    "sin_cos": (False, 1),
    "cos_sin_inclusive": (True, 1),
    "sin_cos_exclusive": (False, 0),
}
"""Layouts of the timestep features, by their `flip_sin_to_cos` and `freq_shift`."""
PLAIN: dict[str, Any] = {
    "fir": False,
    "progressive_input": "none",
    "progressive_output": "none",
    "up_attention": "all",
    "skip_rescale": False,
}
"""Options of the blocks of DDPM and improved DDPM."""
SKIPS: dict[str, Any] = {
    "resample": "block_proj",
    "fir": True,
    "fir_padding": "zeros",
    "progressive_input": "input_skip",
    "progressive_output": "output_skip",
    "up_attention": "last",
    "skip_rescale": True,
}
"""Options of the blocks of NCSN++."""


Kind = Literal["conv", "resnet", "skip"]


class _Level(NamedTuple):
    """Blocks of a level."""

    kind: Kind | None
    """Resampling by convolutions, in residual blocks, or as NCSN++; None: by `downsample_type`, `upsample_type`."""
    attended: bool


DOWN = {
    "DownBlock2D": _Level("conv", False),
    "AttnDownBlock2D": _Level(None, True),
    "ResnetDownsampleBlock2D": _Level("resnet", False),
    "SkipDownBlock2D": _Level("skip", False),
    "AttnSkipDownBlock2D": _Level("skip", True),
}
UP = {
    "UpBlock2D": _Level("conv", False),
    "AttnUpBlock2D": _Level(None, True),
    "ResnetUpsampleBlock2D": _Level("resnet", False),
    "SkipUpBlock2D": _Level("skip", False),
    "AttnSkipUpBlock2D": _Level("skip", True),
}

Count = Annotated[int, Field(gt=0, le=64)]

Width = Annotated[int, Field(gt=0, le=2**14)]

Sides = Annotated[
    list[Width],
    Field(min_length=2, max_length=2),
    BeforeValidator(lambda value: [value, value] if isinstance(value, int) else value),
]

Probability = Annotated[float, Field(ge=0, lt=1)]

Epsilon = Annotated[float, Field(gt=0, lt=1)]

DownType = Literal[
    "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D"
]

UpType = Literal["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D"]


class _Config(BaseModel):
    """Fields of config.json that the network depends on, with the defaults of diffusers."""

    model_config = ConfigDict(strict=True, extra="ignore")
    class_name: Literal["UNet2DModel"] = Field(alias="_class_name")
    sample_size: Sides
    in_channels: Width = 3
    out_channels: Width = 3
    center_input_sample: bool = False
    time_embedding_type: Literal["positional", "fourier"] = "positional"
    time_embedding_dim: Width | None = None
    freq_shift: Literal[0, 1] = 0
    flip_sin_to_cos: bool = True
    down_block_types: list[DownType] = [
        "DownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
    ]
    mid_block_type: Literal["UNetMidBlock2D"] = "UNetMidBlock2D"
    up_block_types: list[UpType] = ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"]
    block_out_channels: Annotated[list[Width], Field(min_length=1, max_length=10)] = [224, 448, 672, 896]
    layers_per_block: Count = 2
    mid_block_scale_factor: Annotated[float, Field(allow_inf_nan=False)] = 1
    downsample_padding: Literal[0, 1] = 1
    downsample_type: Literal["conv", "resnet"] = "conv"
    upsample_type: Literal["conv", "resnet"] = "conv"
    dropout: Probability = 0.0
    act_fn: Literal["silu", "swish"] = "silu"
    attention_head_dim: Width | None = 8
    norm_num_groups: Width | None = 32
    attn_norm_num_groups: Width | None = None
    norm_eps: Epsilon = 1e-5
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    add_attention: bool = True
    class_embed_type: None = None
    num_class_embeds: Annotated[int, Field(gt=0, le=2**20)] | None = None
    null_class: bool = Field(False, alias=NULL_CLASS)


def read(config: Node) -> Network:
    """Return the network of a config.json; FormatError, naming the key, for one without an equivalent.

    UnknownSize is raised for one without a size of images, which diffusers does not require.
    With Fourier features, c_noise is the logarithm of the timestep of UNet2DModel, and both divide the output by it.
    With `center_input_sample`, for data in [0, 1], the network is for data x in [-1, 1] and twice the sigma, so that
    UNet2DModel((x + 1) / 2, sigma / 2) / 2 is its output.
    """
    if config.get("sample_size") is None:
        raise UnknownSize("sample_size is missing")
    fields = parse(_Config, config)
    widths, levels = fields.block_out_channels, len(fields.block_out_channels)
    _check(fields)
    kind, attended, height = _kind(fields), _attended(fields), fields.sample_size[0]
    options = UNetOptions(
        channels=widths[0],
        channel_mult=[width // widths[0] for width in widths],
        num_res_blocks=fields.layers_per_block,
        attention_resolutions=[height >> level for level in range(levels) if attended[level]],
        num_heads=1 if fields.attention_head_dim is None else None,
        head_channels=fields.attention_head_dim,
        norm_groups=_groups(fields, kind),
        norm_eps=fields.norm_eps,
        time_embedding="additive" if fields.resnet_time_scale_shift == "default" else "scale_shift",
        embedding_layout=_layout(fields),
        scale_by_sigma=fields.time_embedding_type == "fourier",
        centered=not fields.center_input_sample,
        middle_attention=fields.add_attention,
        dropout=fields.dropout,
        class_conditional=fields.num_class_embeds is not None,
        learn_variance=fields.out_channels != fields.in_channels,
        **_blocks(kind, fields.downsample_padding),
    )
    head = fields.attention_head_dim or 1
    if wrong := [width for width in options.attention_widths(height) if width % head]:
        _refuse(
            "attention_head_dim", head, f"does not divide the {min(wrong)} channels of an attention layer"
        )
    classes = fields.num_class_embeds
    if fields.null_class:
        if classes is None or classes < 2:
            _refuse("num_class_embeds", classes, f"must be at least 2 with {NULL_CLASS}=true")
        classes -= 1
    return Network(
        node={"_target_": UNET, **options.model_dump()},
        shape=(fields.in_channels, *fields.sample_size),
        num_classes=classes,
        null_class=classes is None or fields.null_class,
    )


def weights(network: Network, state: Weights) -> Weights:
    """Return the weights of a file by the names of the network; FormatError for other tensors than its own.

    The embedding of a null class that the file does not have is zero. Only shapes are needed: tensors may lie on the
    meta device.
    """
    import torch

    left = {present_name(name): tensor for name, tensor in state.items()}

    def take(name: str) -> "Tensor":
        if name not in left:
            raise FormatError(f"{name} is missing")
        return left.pop(name)

    layers = layers_of(parse(UNetOptions, network.node), network.shape[1])
    found = {f"{ours}.{kind}": take(f"{theirs}.{kind}") for ours, theirs in layers.equal for kind in KINDS}
    for ours, theirs in layers.attentions:
        for kind in KINDS:
            parts = [take(f"{theirs}.{name}.{kind}") for name in PROJECTIONS]
            if len({part.shape for part in parts}) > 1 or not parts[0].ndim:
                raise FormatError(f"{theirs}: the shapes of {', '.join(PROJECTIONS)} differ or are empty")
            found[f"{ours}.{kind}"] = torch.cat(parts)
    if layers.fourier:
        stored = [left.pop(name) for name in FREQUENCIES if name in left]
        found["frequencies"] = stored[0] if stored else take(FREQUENCIES[0])
    if layers.classes:
        rows = take(CLASSES)
        if not rows.ndim:
            raise FormatError(f"{CLASSES} has no rows")
        found[CLASSES] = rows if network.null_class else torch.cat([rows, torch.zeros_like(rows[:1])])
    for name in left:
        raise FormatError(f"{name} is not part of the network")
    return found


def write(network: Network) -> Node:
    """Return the config.json of a network; FormatError, with the reason, for one that diffusers cannot express."""
    options = parse(UNetOptions, network.node)
    channels, *sides = network.shape
    if len(sides) != 2:
        _refuse("shape", list(network.shape), "UNet2DModel needs images")
    widths, skips = options.widths, options.skips
    _check_sides("shape", sides, len(widths))
    _check_expressible(options, channels, attended=any(options.attended(sides[0])))
    classes = network.num_classes if options.class_conditional else None
    null_class = classes is not None and network.null_class
    if skips:
        down, up, resnet = "SkipDownBlock2D", "SkipUpBlock2D", False
    elif resnet := options.resample == "block":
        down, up = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    else:
        down, up = "DownBlock2D", "UpBlock2D"
    attended_down, attended_up = (f"Attn{'Skip' if skips else ''}{way}Block2D" for way in ("Down", "Up"))
    attended = options.attended(sides[0])
    scale_shift = options.time_embedding == "scale_shift"
    flip_sin_to_cos, freq_shift = LAYOUTS.get(options.embedding_layout, (True, 0))
    return {
        "_class_name": "UNet2DModel",
        "sample_size": sides[0] if sides[0] == sides[1] else sides,
        "in_channels": channels,
        "out_channels": (2 if options.learn_variance else 1) * channels,
        "center_input_sample": not options.centered,
        "time_embedding_type": "fourier" if options.embedding_layout == "fourier" else "positional",
        "time_embedding_dim": None,
        "freq_shift": freq_shift,
        "flip_sin_to_cos": flip_sin_to_cos,
        "down_block_types": [attended_down if each else down for each in attended],
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": [attended_up if each else up for each in reversed(attended)],
        "block_out_channels": widths,
        "layers_per_block": options.num_res_blocks,
        "mid_block_scale_factor": SQRT_2 if skips else 1,
        "downsample_padding": 0 if options.resample == "conv_same" else 1,
        "downsample_type": "resnet" if resnet else "conv",
        "upsample_type": "resnet" if resnet else "conv",
        "dropout": options.dropout,
        "act_fn": "silu",
        "attention_head_dim": _head_dim(options, sides[0]),
        "norm_num_groups": options.norm_groups,
        "attn_norm_num_groups": options.norm_groups if scale_shift else None,
        "norm_eps": options.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "add_attention": options.middle_attention,
        "class_embed_type": None,
        "num_class_embeds": classes + null_class if classes is not None else None,
        "num_train_timesteps": None,
    } | ({NULL_CLASS: True} if null_class else {})


def state(network: Network, weights: Weights) -> Weights:
    """Return weights by the names of diffusers, without common memory, as safetensors requires it."""
    layers = layers_of(parse(UNetOptions, network.node), network.shape[1])
    written = {
        f"{theirs}.{kind}": weights[f"{ours}.{kind}"] for ours, theirs in layers.equal for kind in KINDS
    }
    for ours, theirs in layers.attentions:
        for kind in KINDS:
            parts = weights[f"{ours}.{kind}"].chunk(3)
            written |= {
                f"{theirs}.{name}.{kind}": part.clone() for name, part in zip(PROJECTIONS, parts, strict=True)
            }
    if layers.fourier:
        written[FREQUENCIES[0]] = weights["frequencies"]
    if layers.classes:
        rows = weights[CLASSES]
        written[CLASSES] = rows if network.null_class else rows[:-1].clone()
    return written


def _check(fields: _Config) -> None:
    """Raise FormatError for sizes that contradict each other or have no equivalent."""
    widths, channels, levels = fields.block_out_channels, fields.in_channels, len(fields.block_out_channels)
    for name in ("down_block_types", "up_block_types"):
        if len(getattr(fields, name)) != levels:
            _refuse(name, getattr(fields, name), f"must have {levels} blocks, as block_out_channels")
    if any(width % widths[0] for width in widths):
        _refuse("block_out_channels", widths, "must be multiples of the first")
    if fields.time_embedding_dim not in (None, 4 * widths[0]):
        _refuse("time_embedding_dim", fields.time_embedding_dim, f"must be 4 x {widths[0]} = {4 * widths[0]}")
    if fields.out_channels not in (channels, 2 * channels):
        reason = f"must be {channels}, or {2 * channels} with a learned variance"
        _refuse("out_channels", fields.out_channels, reason)
    _check_sides("sample_size", fields.sample_size, levels)


def _blocks(kind: Kind, downsample_padding: int) -> dict[str, Any]:
    """Return the options of the blocks of a kind."""
    if kind == "skip":
        return SKIPS
    return PLAIN | {
        "resample": "block" if kind == "resnet" else "conv" if downsample_padding else "conv_same"
    }


def _kind(fields: _Config) -> Kind:
    """Return how the network changes the resolution, which must be the same at all levels."""
    down = [DOWN[name] for name in fields.down_block_types]
    up = [UP[name] for name in fields.up_block_types]
    if len({level.kind == "skip" for level in (*down, *up)}) > 1:
        reason = "have no equivalent if only some blocks are those of NCSN++"
        _refuse("down_block_types", fields.down_block_types, reason)
    # The last block of each path keeps the resolution.
    kinds: set[Kind] = {level.kind or fields.downsample_type for level in down[:-1]}
    kinds |= {level.kind or fields.upsample_type for level in up[:-1]}
    if len(kinds) > 1:
        types = f"downsample_type={fields.downsample_type}, upsample_type={fields.upsample_type}"
        reason = f"must resample all by convolutions or all in residual blocks (with {types})"
        _refuse("down_block_types", fields.down_block_types, reason)
    return kinds.pop() if kinds else down[0].kind or fields.downsample_type


def _attended(fields: _Config) -> list[bool]:
    """Return for each level whether it has attention, which must be the same on the way down and up."""
    attended = [DOWN[name].attended for name in fields.down_block_types]
    if [UP[name].attended for name in reversed(fields.up_block_types)] != attended:
        reason = "must have attention at the levels of down_block_types"
        _refuse("up_block_types", fields.up_block_types, reason)
    return attended


def _groups(fields: _Config, kind: str) -> int:
    """Return the groups of all group norms, which must be as many at all levels."""
    widths, groups = fields.block_out_channels, fields.norm_num_groups
    if kind == "skip":
        if min(widths) < SKIP_WIDTH:
            reason = f"blocks of NCSN++ with fewer than {SKIP_WIDTH} channels have other group norms than the others"
            _refuse("block_out_channels", widths, reason)
        for name in ("in_channels", "out_channels"):
            if getattr(fields, name) != 3:
                _refuse(name, getattr(fields, name), "must be 3 with the blocks of NCSN++")
        if groups not in (None, SKIP_GROUPS):
            _refuse("norm_num_groups", groups, f"must be {SKIP_GROUPS} with the blocks of NCSN++")
        groups = SKIP_GROUPS
    if groups is None:
        _refuse("norm_num_groups", groups, "must be a number without the blocks of NCSN++")
    if widths[0] % groups:
        _refuse("norm_num_groups", groups, f"does not divide {widths[0]} channels")
    scale, factor = (SQRT_2, "sqrt(2)") if kind == "skip" else (1, "1")
    if abs(fields.mid_block_scale_factor - scale) > 1e-6:
        _refuse(
            "mid_block_scale_factor",
            fields.mid_block_scale_factor,
            f"must be {factor}, as in the other blocks",
        )
    middle = fields.attn_norm_num_groups
    if middle is None and fields.resnet_time_scale_shift == "default":
        middle = groups
    if fields.add_attention and middle != groups:
        reason = f"the attention of the middle block must have group norm with {groups} groups, as the others"
        _refuse("attn_norm_num_groups", middle, reason)
    return groups


def _layout(fields: _Config) -> str:
    """Return the layout of the timestep features."""
    if fields.time_embedding_type == "fourier":
        if fields.out_channels != fields.in_channels:
            _refuse(
                "out_channels",
                fields.out_channels,
                "a learned variance has no equivalent with Fourier features",
            )
        return "fourier"
    if fields.center_input_sample:
        _refuse("center_input_sample", True, "has no equivalent with time_embedding_type=positional")
    return next(name for name, each in LAYOUTS.items() if each == (fields.flip_sin_to_cos, fields.freq_shift))


def _check_sides(key: str, sides: Sequence[int], levels: int) -> None:
    if any(side % 2 ** (levels - 1) for side in sides):
        _refuse(key, list(sides), f"sizes must be multiples of {2 ** (levels - 1)} for {levels} levels")


def _check_expressible(options: UNetOptions, channels: int, *, attended: bool) -> None:
    """Raise FormatError for options that UNet2DModel lacks."""
    if options.channel_mult[0] != 1:
        _refuse("channel_mult", list(options.channel_mult), "must begin with 1 in UNet2DModel")
    if options.embedding_channels not in (None, options.channels):
        reason = f"must be {options.channels}, as the channels, in UNet2DModel"
        _refuse("embedding_channels", options.embedding_channels, reason)
    if options.patch_size != 1:
        _refuse("patch_size", options.patch_size, "must be 1 in UNet2DModel")
    if options.window is not None:
        _refuse("window", options.window, "must be null in UNet2DModel")
    fourier = options.embedding_layout == "fourier"
    needed = {"scale_by_sigma": fourier} | (SKIPS if options.skips else PLAIN)
    if options.skips:
        needed |= {"norm_groups": SKIP_GROUPS, "learn_variance": False}
        if channels != 3:
            _refuse("shape", channels, "with progressive_output=output_skip, UNet2DModel needs 3 channels")
        if min(options.widths) < SKIP_WIDTH:
            reason = (
                f"with progressive_output=output_skip, UNet2DModel needs {SKIP_WIDTH} channels at each level"
            )
            _refuse("channels", options.channels, reason)
    for key, value in needed.items():
        if (found := getattr(options, key)) != value and (attended or key != "up_attention"):
            beside = "embedding_layout" if key == "scale_by_sigma" else "progressive_output"
            reason = f"with {beside}={getattr(options, beside)}, UNet2DModel has {key}={format_value(value)}"
            _refuse(key, found, reason)
    if not options.skips and options.resample == "block_proj":
        _refuse("resample", "block_proj", "UNet2DModel has resample=conv, conv_same or block")


def _head_dim(options: UNetOptions, height: int) -> int | None:
    """Return the channels per head of all attention layers; None for one head."""
    if options.head_channels is not None or options.num_heads == 1:
        return options.head_channels
    found = {width // (options.num_heads or 1) for width in options.attention_widths(height)}
    if len(found) > 1:
        reason = "UNet2DModel has the same channels per head in all attention layers"
        _refuse("num_heads", options.num_heads, f"{reason}, not {sorted(found)}")
    return next(iter(found), None)


def _refuse(key: str, value: Any, reason: str) -> NoReturn:
    raise FormatError(f"{key}={format_value(value)}: {reason}")
