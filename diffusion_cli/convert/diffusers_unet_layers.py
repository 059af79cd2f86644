"""Layers of a U-Net by their names here and in UNet2DModel of diffusers. This module does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

from pydantic import BaseModel, ConfigDict

RES = {"norm1": "norm1", "conv1": "conv1", "emb": "time_emb_proj", "norm2": "norm2", "conv2": "conv2"}
"""Layers of a residual block, here and in diffusers."""
ATTENTION = {"norm": "group_norm", "proj": "to_out.0"}
"""Layers of an attention block, here and in diffusers, except for queries, keys and values."""
OUTER = {
    "stem": "conv_in",
    "time_mlp.0": "time_embedding.linear_1",
    "time_mlp.2": "time_embedding.linear_2",
    "out_norm": "conv_norm_out",
    "out_conv": "conv_out",
}


class UNetOptions(BaseModel):
    """Options of a UNet of this package, with its defaults for those that older runs lack."""

    model_config = ConfigDict(extra="ignore")
    channels: int = 32
    channel_mult: Sequence[int] = (1, 2, 2)
    num_res_blocks: int = 1
    attention_resolutions: Sequence[int] = ()
    cross_attention_resolutions: Sequence[int] | None = None
    num_heads: int | None = None
    head_channels: int | None = 32
    norm_groups: int = 8
    time_embedding: str = "scale_shift"
    embedding_layout: str = "cos_sin"
    embedding_channels: int | None = None
    fourier_scale: float = 16.0
    resample: str = "conv"
    fir: bool = False
    fir_padding: str = "edge"
    progressive_input: str = "none"
    progressive_output: str = "none"
    up_attention: str = "all"
    middle_attention: bool = True
    norm_eps: float = 1e-6
    skip_rescale: bool = False
    scale_by_sigma: bool = False
    centered: bool = True
    dropout: float = 0.0
    class_conditional: bool = False
    learn_variance: bool = False
    gradient_checkpointing: bool = False
    patch_size: int = 1
    window: Sequence[int] | None = None
    window_overlap: int = 8

    @property
    def skips(self) -> bool:
        """Whether it has the skips of NCSN++, between the image and each level."""
        return self.progressive_output == "output_skip"

    @property
    def widths(self) -> list[int]:
        """Channels per level."""
        return [mult * self.channels for mult in self.channel_mult]

    def attended(self, height: int) -> list[bool]:
        """Return for each level whether it has attention, for inputs of this height."""
        return [height >> level in self.attention_resolutions for level in range(len(self.channel_mult))]

    def attention_widths(self, height: int) -> set[int]:
        """Return the channels of all attention layers."""
        found = {
            width for width, attended in zip(self.widths, self.attended(height), strict=True) if attended
        }
        return found | {self.widths[-1]} if self.middle_attention else found


@dataclass
class Layers:
    """Layers by their names here and in diffusers, each with a weight and a bias."""

    fourier: bool
    """Whether the network has Fourier frequencies."""
    classes: bool
    """Whether the network has a class embedding."""
    equal: list[tuple[str, str]] = field(default_factory=lambda: [*OUTER.items()])
    """Layers with the same tensors."""
    attentions: list[tuple[str, str]] = field(default_factory=list)
    """Layers of queries, keys and values here, and attention blocks in diffusers."""

    def add_res(self, ours: str, theirs: str, *, shortcut: bool) -> None:
        """Add a residual block."""
        self.equal += [(f"{ours}.{here}", f"{theirs}.{there}") for here, there in RES.items()]
        if shortcut:
            self.equal.append((f"{ours}.skip", f"{theirs}.conv_shortcut"))

    def add_attention(self, ours: str, theirs: str) -> None:
        """Add an attention block."""
        self.equal += [(f"{ours}.{here}", f"{theirs}.{there}") for here, there in ATTENTION.items()]
        self.attentions.append((f"{ours}.qkv", theirs))


def layers_of(options: UNetOptions, height: int) -> Layers:
    """Return the layers of a U-Net for inputs of this height."""
    layers = Layers(options.embedding_layout == "fourier", options.class_conditional)
    attended = options.attended(height)
    skips = _add_encoder(layers, options, attended)
    _add_middle(layers, options)
    _add_decoder(layers, options, attended, skips)
    return layers


def _add_encoder(layers: Layers, options: UNetOptions, attended: Sequence[bool]) -> list[int]:
    """Add the layers of the encoder and return the channels of its skip connections."""
    skips, number = [options.channels], count()
    for level, width in enumerate(options.widths):
        theirs = f"down_blocks.{level}"
        for i in range(options.num_res_blocks):
            ours = f"down.{next(number)}"
            layers.add_res(f"{ours}.0", f"{theirs}.resnets.{i}", shortcut=skips[-1] != width)
            if attended[level]:
                layers.add_attention(f"{ours}.1", f"{theirs}.attentions.{i}")
            skips.append(width)
        if level < len(options.widths) - 1:
            _add_resampling(layers, options, f"down.{next(number)}.0", theirs, "down")
            skips.append(width)
            if options.skips:
                layers.equal.append((f"down.{next(number)}.conv", f"{theirs}.skip_conv"))
    return skips


def _add_middle(layers: Layers, options: UNetOptions) -> None:
    layers.add_res("middle.0", "mid_block.resnets.0", shortcut=False)
    if options.middle_attention:
        layers.add_attention("middle.1", "mid_block.attentions.0")
    layers.add_res(f"middle.{1 + options.middle_attention}", "mid_block.resnets.1", shortcut=False)


def _add_decoder(layers: Layers, options: UNetOptions, attended: Sequence[bool], skips: list[int]) -> None:
    width, number, last = options.widths[-1], count(), options.num_res_blocks
    for step, level in enumerate(reversed(range(len(options.widths)))):
        theirs, ours, attends = f"up_blocks.{step}", "", False
        for i in range(last + 1):
            ours = f"up.{next(number)}"
            shortcut = width + skips.pop() != options.widths[level]
            layers.add_res(f"{ours}.0", f"{theirs}.resnets.{i}", shortcut=shortcut)
            attends = attended[level] and (i == last or options.up_attention == "all")
            if attends:
                block = 0 if options.up_attention == "last" else i
                layers.add_attention(f"{ours}.1", f"{theirs}.attentions.{block}")
            width = options.widths[level]
        if level and options.skips:
            ours = f"up.{next(number)}"
            layers.equal += [(f"{ours}.norm", f"{theirs}.skip_norm"), (f"{ours}.conv", f"{theirs}.skip_conv")]
            _add_resampling(layers, options, f"{ours}.up.0", theirs, "up")
        elif level:
            _add_resampling(layers, options, f"{ours}.{1 + attends}", theirs, "up")


def _add_resampling(
    layers: Layers, options: UNetOptions, ours: str, theirs: str, direction: Literal["down", "up"]
) -> None:
    if options.resample == "block_proj":
        layers.add_res(ours, f"{theirs}.resnet_{direction}", shortcut=True)
    elif options.resample == "block":
        layers.add_res(ours, f"{theirs}.{direction}samplers.0", shortcut=False)
    else:
        layers.equal.append((ours, f"{theirs}.{direction}samplers.0.conv"))
