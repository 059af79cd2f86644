"""The way down of the U-Nets, and what both ways are put together from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from diffusion_cli.errors import NO_VALUE, UsageError, format_value
from diffusion_cli.networks.layers import (
    CONV,
    Attention,
    Checkpointed,
    Conv,
    Downsample,
    ProgressiveInput,
    ResBlock,
    Upsample,
    fourier_embedding,
    pad_to_multiple,
    timestep_embedding,
    to_patches,
)


class Block(nn.ModuleList):
    """Layers at work between two skip connections, one after the other; `skip` joins as further channels."""

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNetEncoder(Checkpointed):
    """What a U-Net and a classifier share: the embedding of time and class, the way down, the middle."""

    frequencies: Tensor

    def __init__(
        self,
        in_channels: int,
        parts: "EncoderParts",
        num_classes: int | None,
        *,
        embedding_layout: Literal["sin_cos", "cos_sin", "fourier"],
        fourier_scale: float,
        progressive_input: Literal["none", "residual"],
        gradient_checkpointing: bool,
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        in_channels *= patch_size**parts.ndim
        self.num_classes = num_classes
        self.channels = channels = parts.channels
        self.embedding_layout: Literal["sin_cos", "cos_sin", "fourier"] = embedding_layout
        self.gradient_checkpointing = gradient_checkpointing
        self.patch_size = patch_size
        self.multiple = patch_size * 2 ** (len(parts.widths) - 1)
        features = channels
        if embedding_layout == "fourier":
            features = 2 * channels
            self.register_buffer("frequencies", fourier_scale * torch.randn(channels))
        self.time_mlp = nn.Sequential(
            nn.Linear(features, 4 * channels), nn.SiLU(), nn.Linear(4 * channels, 4 * channels)
        )
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes + 1, 4 * channels)
        self.stem = Conv(in_channels, channels, ndim=parts.ndim)
        self.down, self.skip_widths = parts.down_path(
            in_channels if progressive_input == "residual" else None
        )
        self.middle = parts.middle()

    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """Return the features of every skip connection, and of the middle last."""
        pyramid = self._patches(pad_to_multiple(x, self.multiple))
        h = self.stem(pyramid)
        skips = [h]
        for block in self.down:
            if isinstance(block, ProgressiveInput):
                h = skips[-1] = pyramid = self.run(block, h, pyramid)
            else:
                h = self.run(block, h, emb)
                skips.append(h)
        return [*skips, self.run(self.middle, h, emb)]

    def embed(self, c_noise: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the features of time and class, [B, 4 channels]."""
        # Not in bfloat16: its 8 bits would take neighbouring timesteps for one.
        with torch.autocast(c_noise.device.type, enabled=False):
            if self.embedding_layout == "fourier":
                features = fourier_embedding(c_noise, self.frequencies)
            else:
                features = timestep_embedding(c_noise, self.channels, self.embedding_layout)
            emb = self.time_mlp(features.to(self.stem.weight.dtype))
            if self.num_classes is not None:
                if y is None:
                    y = torch.full_like(c_noise, self.num_classes, dtype=torch.int64)
                emb = emb + self.class_embedding(y)
            return silu(emb)

    def _patches(self, x: Tensor) -> Tensor:
        return to_patches(x, self.patch_size) if self.patch_size > 1 else x


@dataclass(frozen=True)
class EncoderParts:
    """What the two paths of a U-Net are put together from."""

    ndim: int  # of the images
    channels: int  # feature maps of the stem
    widths: list[int]  # feature maps of each level
    num_res_blocks: int
    attended: set[int]  # levels with attention
    heads: Callable[[int], int]  # by number of feature maps
    norm_groups: int
    resample: Literal["conv", "conv_same", "block", "block_proj"]
    fir: bool
    skip_rescale: bool
    up_attention: Literal["all", "last"]
    res: Callable[..., ResBlock]

    @classmethod
    def of(
        cls,
        sizes: tuple[int, ...],
        *,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        num_heads: int | None,
        head_channels: int | None,
        norm_groups: int,
        time_embedding: str,
        resample: Literal["conv", "conv_same", "block", "block_proj"],
        fir: bool,
        up_attention: Literal["all", "last"],
        skip_rescale: bool,
        dropout: float,
    ) -> Self:
        """Return the parts that a network's options mean for images of some `sizes`.

        Raises ValueError where two do not go together, or images have no or more than three dimensions.
        """
        if len(sizes) not in CONV:
            raise UsageError(
                "model",
                NO_VALUE,
                f"a U-Net takes 1 to 3 dimensions beside the channels, not {len(sizes)}",
                "choose another model",
            )
        if not channel_mult:
            raise UsageError(
                "channel_mult", "[]", "the network needs a level", "name a multiplier, as [1, 2]"
            )
        if channels % norm_groups:
            raise UsageError(
                "norm_groups", norm_groups, f"does not divide channels={channels}", "use a divisor"
            )
        if fir and not resample.startswith("block"):
            raise UsageError(
                "fir",
                True,
                f"filters inside blocks, not with resample={resample}",
                "use resample=block or block_proj, or fir=false",
            )
        return cls(
            ndim=len(sizes),
            channels=channels,
            widths=[mult * channels for mult in channel_mult],
            num_res_blocks=num_res_blocks,
            attended=_attended_levels(sizes[0], len(channel_mult), attention_resolutions),
            heads=partial(_heads, num_heads=num_heads, head_channels=head_channels),
            norm_groups=norm_groups,
            resample=resample,
            fir=fir,
            skip_rescale=skip_rescale,
            up_attention=up_attention,
            res=partial(
                ResBlock,
                emb_channels=4 * channels,
                norm_groups=norm_groups,
                dropout=dropout,
                scale_shift=time_embedding == "scale_shift",
                skip_rescale=skip_rescale,
                ndim=len(sizes),
            ),
        )

    def down_path(self, pyramid: int | None) -> tuple[nn.ModuleList, list[int]]:
        """Return the blocks and the widths of the skip connections, of which the stem's is first.

        `pyramid` is the number of maps that a progressive input starts with, None without one.
        """
        blocks, skips = nn.ModuleList(), [self.channels]
        for level, width in enumerate(self.widths):
            for _ in range(self.num_res_blocks):
                blocks.append(self._stage(skips[-1], level, attended=level in self.attended))
                skips.append(width)
            if level < len(self.widths) - 1:
                blocks.append(Block([self._resampling(width, "down")]))
                skips.append(width)
                if pyramid is not None:
                    join = ProgressiveInput(
                        pyramid, width, fir=self.fir, skip_rescale=self.skip_rescale, ndim=self.ndim
                    )
                    blocks.append(join)
                    pyramid = width
        return blocks, skips

    def middle(self) -> Block:
        width = self.widths[-1]
        return Block([self.res(width, width), self._attention(width), self.res(width, width)])

    def up_path(self, skips: list[int]) -> nn.ModuleList:
        blocks, width = nn.ModuleList(), self.widths[-1]
        for level in reversed(range(len(self.widths))):
            for i in range(self.num_res_blocks + 1):
                last = i == self.num_res_blocks
                attended = level in self.attended and (last or self.up_attention == "all")
                block = self._stage(width + skips.pop(), level, attended=attended)
                width = self.widths[level]
                if level and last:
                    block.append(self._resampling(width, "up"))
                blocks.append(block)
        return blocks

    def _stage(self, in_channels: int, level: int, *, attended: bool) -> Block:
        block = Block([self.res(in_channels, self.widths[level])])
        if attended:
            block.append(self._attention(self.widths[level]))
        return block

    def _attention(self, width: int) -> Attention:
        return Attention(
            width, num_heads=self.heads(width), norm_groups=self.norm_groups, skip_rescale=self.skip_rescale
        )

    def _resampling(self, width: int, direction: Literal["up", "down"]) -> nn.Module:
        if self.resample in ("block", "block_proj"):
            project = self.resample == "block_proj"
            return self.res(width, width, resample=direction, fir=self.fir, project=project)
        if direction == "up":
            return Upsample(width, ndim=self.ndim)
        return Downsample(width, same=self.resample == "conv_same", ndim=self.ndim)


def _attended_levels(image_size: int, levels: int, attention_resolutions: Sequence[int]) -> set[int]:
    finest = image_size + -image_size % 2 ** (levels - 1)
    resolutions = [finest >> level for level in range(levels)]
    unreached = [r for r in attention_resolutions if r not in resolutions]
    if unreached:
        raise UsageError(
            "attention_resolutions",
            attention_resolutions,
            f"not reached: {unreached}",
            f"{levels} levels at image size {image_size} work at {resolutions}, choose among these",
        )
    return {resolutions.index(r) for r in attention_resolutions}


def _heads(width: int, num_heads: int | None, head_channels: int | None) -> int:
    if (num_heads is None) == (head_channels is None):
        raise UsageError(
            f"num_heads={format_value(num_heads)}, head_channels",
            head_channels,
            "set one of them, the other null",
        )
    key, value = ("num_heads", num_heads) if head_channels is None else ("head_channels", head_channels)
    assert value is not None
    if width % value:
        raise UsageError(
            key, value, f"does not divide the {width} channels of an attention layer", "use a divisor"
        )
    return value if head_channels is None else width // value
