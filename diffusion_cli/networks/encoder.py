"""Encoder and configuration of U-Nets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from diffusion_cli.conditions import Condition, Conditions
from diffusion_cli.errors import NO_VALUE, UsageError, format_value
from diffusion_cli.networks.condition_embedding import ConditionEmbedding, TextTokens, with_image
from diffusion_cli.networks.group_norm import channels_last
from diffusion_cli.networks.layers import (
    CONV,
    NORM_EPS,
    Attention,
    Checkpointed,
    Conv,
    Downsample,
    FirPadding,
    InputSkip,
    OutputSkip,
    ProgressiveInput,
    ResBlock,
    SinusoidalLayout,
    Upsample,
    class_rows,
    fourier_embedding,
    halve,
    pad_to_multiple,
    timestep_embedding,
    to_patches,
    widened,
)
from diffusion_cli.networks.token_layers import PixelCrossAttention

EmbeddingLayout = SinusoidalLayout | Literal["fourier"]
ProgressiveIn = Literal["none", "residual", "input_skip"]
ProgressiveOut = Literal["none", "output_skip"]
Resample = Literal["conv", "conv_same", "block", "block_proj"]


class Block(nn.ModuleList):
    """Sequential layers between two skip connections; `skip` is concatenated to the input.

    The layer that attends to a text has the name "text" and no number, so that networks with and without it have the
    same names of all other layers.
    """

    def append(self, module: nn.Module) -> Self:
        numbered = sum(name != "text" for name, _ in self.named_children())
        self.add_module("text" if isinstance(module, PixelCrossAttention) else str(numbered), module)
        return self

    def forward(
        self, x: Tensor, emb: Tensor, skip: Tensor | None = None, text: TextTokens | None = None
    ) -> Tensor:
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, PixelCrossAttention):
                assert text is not None
                x = layer(x, *text)
            else:
                x = layer(x)
        return x


class UNetEncoder(Checkpointed):
    """Common part of U-Nets and classifiers: embedding of time and condition, encoder and middle block."""

    frequencies: Tensor

    def __init__(self, config: "UNetConfig", conditions: Conditions, *, coordinates: bool = False) -> None:
        super().__init__()
        in_channels = config.shape[0] * config.patch_size**config.ndim
        given = 0 if conditions.image is None else conditions.image + 1
        given = (given + config.ndim * coordinates) * config.patch_size**config.ndim
        self.conditions = conditions
        self.pyramid_channels = in_channels
        self.num_classes = num_classes = conditions.num_classes
        self.embedding_channels = width = config.embedding_width
        self.embedding_layout: EmbeddingLayout = config.embedding_layout
        self.gradient_checkpointing = config.gradient_checkpointing
        self.patch_size = config.patch_size
        self.multiple = config.patch_size * 2 ** (len(config.widths) - 1)
        features = width
        if self.embedding_layout == "fourier":
            features = 2 * width
            self.register_buffer("frequencies", config.fourier_scale * torch.randn(width))
        self.time_mlp = nn.Sequential(
            nn.Linear(features, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width)
        )
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes + 1, 4 * width)
        self.stem = Conv(in_channels + given, config.channels, ndim=config.ndim)
        self.fir = config.fir
        self.fir_padding: FirPadding = config.fir_padding
        self.noise_shift = 0.0 if config.centered else -math.log(2)
        self.down, self.skip_widths = config.down_path(in_channels)
        self.middle = config.middle()
        self.condition_embedding = ConditionEmbedding.of(conditions, 4 * width)

    def encode(
        self, x: Tensor, emb: Tensor, image: Tensor | None = None, text: TextTokens | None = None
    ) -> list[Tensor]:
        """Return the features of all skip connections, followed by those of the middle block.

        Args:
            x: noised images [B, C, *sizes], followed by the coordinates of the pixels, if the network has them.
            emb: embedding of time and condition.
            image: condition image [B, channels, *sizes], for networks that are conditioned on one; None: missing.
            text: tokens of a text, likewise.
        """
        if self.conditions.image is not None:
            x = with_image(x, image, self.conditions.image)
        pyramid = self._patches(pad_to_multiple(x, self.multiple))
        h = channels_last(self.stem(pyramid))
        if pyramid.shape[1] > self.pyramid_channels:
            pyramid = pyramid[:, : self.pyramid_channels]  # progressive input is the noised image alone
        skips = [h]
        for block in self.down:
            if isinstance(block, ProgressiveInput):
                h = skips[-1] = pyramid = self.run(block, h, pyramid)
            elif isinstance(block, InputSkip):
                pyramid = halve(pyramid, fir=self.fir, padding=self.fir_padding)
                h = skips[-1] = self.run(block, h, pyramid)
            else:
                h = self.run(block, h, emb, None, text)
                skips.append(h)
        return [*skips, self.run(self.middle, h, emb, None, text)]

    def embed(self, c_noise: Tensor, y: Condition | Tensor | None = None) -> tuple[Tensor, TextTokens | None]:
        """Return the embedding of time and condition, [B, 4 embedding_channels], and the tokens of the text."""
        # Not in bfloat16: its 8 bits do not distinguish neighbouring timesteps.
        with torch.autocast(c_noise.device.type, enabled=False):
            if self.embedding_layout == "fourier":
                features = fourier_embedding(widened(c_noise) + self.noise_shift, self.frequencies)
            else:
                features = timestep_embedding(c_noise, self.embedding_channels, self.embedding_layout)
            emb = self.time_mlp(features.to(self.stem.weight.dtype))
            if self.num_classes is not None:
                emb = emb + self.class_embedding(class_rows(y, self.num_classes, c_noise))
            text = None
            if self.condition_embedding is not None:
                vector, text = self.condition_embedding(Condition.of(y), c_noise)
                emb = emb + vector
            return silu(emb), text

    def _patches(self, x: Tensor) -> Tensor:
        return to_patches(x, self.patch_size) if self.patch_size > 1 else x


def level_sizes(height: int, levels: int) -> list[int]:
    """Return the first size of each level of a U-Net, from that of the data in patches, which is padded."""
    finest = height + -height % 2 ** (levels - 1)
    return [finest >> level for level in range(levels)]


def check_levels(
    shape: Sequence[int], channel_mult: Sequence[int], **attended: Sequence[int]
) -> Sequence[int]:
    """Return the first size of each level of a U-Net for data of a shape [C, *sizes] in patches.

    Args:
        shape: shape of the data, in patches.
        channel_mult: multiplier of the channels per level.
        attended: sizes of levels with attention, by their key.

    Raises:
        UsageError: the data do not have one to three dimensions, there is no level, or none of an attended size.
    """
    if len(shape) - 1 not in CONV:
        problem = f"a U-Net needs data with 1 to 3 dimensions beside the channels, not {len(shape) - 1}"
        raise UsageError("model", NO_VALUE, problem, "use another model")
    if not channel_mult:
        raise UsageError("channel_mult", "[]", "must have at least one level", "use for example [1,2]")
    sizes = level_sizes(shape[1], len(channel_mult))
    for key, given in attended.items():
        if unreached := [size for size in given if size not in sizes]:
            raise UsageError(
                key,
                given,
                f"{unreached} not among the resolutions",
                f"{len(sizes)} levels at image size {shape[1]} have the resolutions {sizes}, use some of these",
            )
    return sizes


def attention_at_levels(
    resolutions: Sequence[int], before: tuple[int, int], now: tuple[int, int]
) -> list[int]:
    """Return the `attention_resolutions` of a U-Net that has attention at the same levels as another one.

    Args:
        resolutions: `attention_resolutions` of the other U-Net.
        before: first size of its data in patches, and its number of levels.
        now: the same of the U-Net; attention at levels that it lacks is left out.
    """
    sizes = zip(level_sizes(*before), level_sizes(*now), strict=False)
    return [size for former, size in sizes if former in resolutions]


@dataclass(frozen=True)
class UNetConfig:
    """Configuration of a U-Net for data of a shape [C, *sizes], and its layers; see `UNet` for the fields.

    Raises:
        UsageError: fields contradict each other, or the data do not have one to three dimensions.
    """

    shape: tuple[int, ...]
    channels: int
    channel_mult: Sequence[int]
    num_res_blocks: int
    attention_resolutions: Sequence[int]
    num_heads: int | None
    head_channels: int | None
    norm_groups: int
    time_embedding: Literal["additive", "scale_shift"]
    embedding_layout: EmbeddingLayout
    fourier_scale: float
    resample: Resample
    dropout: float
    gradient_checkpointing: bool
    fir: bool = False
    fir_padding: FirPadding = "edge"
    progressive_input: ProgressiveIn = "none"
    progressive_output: ProgressiveOut = "none"
    embedding_channels: int | None = None
    up_attention: Literal["all", "last"] = "all"
    middle_attention: bool = True
    norm_eps: float = NORM_EPS
    scale_by_sigma: bool = False
    centered: bool = True
    skip_rescale: bool = False
    patch_size: int = 1
    cross_attention_resolutions: Sequence[int] | None = None
    text_width: int | None = None
    """Features of the tokens of texts; None without texts."""

    def __post_init__(self) -> None:
        check_levels(
            (self.shape[0], *(-(-size // self.patch_size) for size in self.shape[1:])),
            self.channel_mult,
            attention_resolutions=self.attention_resolutions,
            cross_attention_resolutions=self.cross_attention_resolutions or (),
        )
        if self.channels % self.norm_groups:
            raise UsageError(
                "norm_groups", self.norm_groups, f"does not divide channels={self.channels}", "use a divisor"
            )
        if self.fir and not self.resample.startswith("block"):
            raise UsageError(
                "fir",
                True,
                f"needs resampling in blocks, not resample={self.resample}",
                "use resample=block or block_proj, or fir=false",
            )
        for key, value in (("scale_by_sigma", self.scale_by_sigma), ("centered", not self.centered)):
            if value and self.embedding_layout != "fourier":
                raise UsageError(
                    key,
                    getattr(self, key),
                    f"needs the noise level log sigma, not embedding_layout={self.embedding_layout}",
                    f"use embedding_layout=fourier or {key}={format_value(not getattr(self, key))}",
                )

    @property
    def ndim(self) -> int:
        """Number of dimensions beside the channels."""
        return len(self.shape) - 1

    @property
    def widths(self) -> list[int]:
        """Feature maps per level."""
        return [mult * self.channels for mult in self.channel_mult]

    @property
    def embedding_width(self) -> int:
        """Features of the time embedding."""
        return self.channels if self.embedding_channels is None else self.embedding_channels

    @property
    def height(self) -> int:
        """First size of the data in patches."""
        return -(-self.shape[1] // self.patch_size)

    @property
    def resolutions(self) -> list[int]:
        """First size per level."""
        return level_sizes(self.height, len(self.channel_mult))

    def down_path(self, in_channels: int) -> tuple[nn.ModuleList, list[int]]:
        """Return the encoder blocks and the widths of the skip connections, starting with that of the stem.

        `in_channels` is the number of channels of the image, for progressive input.
        """
        blocks, skips, pyramid = nn.ModuleList(), [self.channels], in_channels
        for level, width in enumerate(self.widths):
            for _ in range(self.num_res_blocks):
                blocks.append(self._stage(skips[-1], level, attends=True))
                skips.append(width)
            if level < len(self.widths) - 1:
                blocks.append(Block([self._resampling(width, "down")]))
                skips.append(width)
                if self.progressive_input == "residual":
                    join = ProgressiveInput(
                        pyramid, width, fir=self.fir, fir_padding=self.fir_padding,
                        skip_rescale=self.skip_rescale, ndim=self.ndim,
                    )  # fmt: skip
                    blocks.append(join)
                    pyramid = width
                elif self.progressive_input == "input_skip":
                    blocks.append(InputSkip(pyramid, width, ndim=self.ndim))
        return blocks, skips

    def middle(self) -> Block:
        width = self.widths[-1]
        block = Block([self._res(width, width)])
        if self.middle_attention:
            block.append(self._attention(width))
        if self.text_width is not None:
            block.append(self._text_attention(width, self.text_width))
        block.append(self._res(width, width))
        return block

    def up_path(self, skips: list[int], out_channels: int) -> nn.ModuleList:
        """Return the decoder blocks for skip connections of these widths.

        `out_channels` is the number of channels of the output, for progressive output.
        """
        blocks, width = nn.ModuleList(), self.widths[-1]
        for level in reversed(range(len(self.widths))):
            for i in range(self.num_res_blocks + 1):
                last = i == self.num_res_blocks
                attends = last or self.up_attention == "all"
                block = self._stage(width + skips.pop(), level, attends=attends)
                width = self.widths[level]
                if level and last and self.progressive_output == "none":
                    block.append(self._resampling(width, "up"))
                blocks.append(block)
            if level and self.progressive_output == "output_skip":
                skip = OutputSkip(
                    width, out_channels, up=Block([self._resampling(width, "up")]),
                    norm_groups=self.norm_groups, norm_eps=self.norm_eps, ndim=self.ndim,
                )  # fmt: skip
                blocks.append(skip)
        return blocks

    def _stage(self, in_channels: int, level: int, *, attends: bool) -> Block:
        width, resolution = self.widths[level], self.resolutions[level]
        block = Block([self._res(in_channels, width)])
        if attends and resolution in self.attention_resolutions:
            block.append(self._attention(width))
        crossed = self.cross_attention_resolutions
        crossed = self.attention_resolutions if crossed is None else crossed
        if attends and resolution in crossed and self.text_width is not None:
            block.append(self._text_attention(width, self.text_width))
        return block

    def _res(self, in_channels: int, out_channels: int, **resampling: Any) -> ResBlock:
        return ResBlock(
            in_channels, out_channels, emb_channels=4 * self.embedding_width, norm_groups=self.norm_groups,
            norm_eps=self.norm_eps, dropout=self.dropout, scale_shift=self.time_embedding == "scale_shift",
            skip_rescale=self.skip_rescale, ndim=self.ndim, **resampling,
        )  # fmt: skip

    def _attention(self, width: int) -> Attention:
        return Attention(
            width, num_heads=self._heads(width), norm_groups=self.norm_groups, norm_eps=self.norm_eps,
            skip_rescale=self.skip_rescale,
        )  # fmt: skip

    def _text_attention(self, width: int, text_width: int) -> PixelCrossAttention:
        return PixelCrossAttention(
            width,
            text_width,
            ndim=self.ndim,
            num_heads=self._heads(width),
            norm_groups=self.norm_groups,
            norm_eps=self.norm_eps,
        )

    def _heads(self, width: int) -> int:
        """Return the number of attention heads for a number of feature maps."""
        if (self.num_heads is None) == (self.head_channels is None):
            raise UsageError(
                f"num_heads={format_value(self.num_heads)}, head_channels",
                self.head_channels,
                "exactly one of them must be set",
            )
        key = "num_heads" if self.head_channels is None else "head_channels"
        value = getattr(self, key)
        if width % value:
            raise UsageError(
                key, value, f"does not divide the {width} channels of an attention layer", "use a divisor"
            )
        return value if self.head_channels is None else width // value

    def _resampling(self, width: int, direction: Literal["up", "down"]) -> nn.Module:
        if self.resample in ("block", "block_proj"):
            project = self.resample == "block_proj"
            return self._res(
                width, width, resample=direction, fir=self.fir, fir_padding=self.fir_padding, project=project
            )
        if direction == "up":
            return Upsample(width, ndim=self.ndim)
        return Downsample(width, same=self.resample == "conv_same", ndim=self.ndim)
