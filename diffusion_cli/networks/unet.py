"""The convolutional U-Net of DDPM, improved-diffusion, score-based SDEs and their kin."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import pad, silu
from torch.utils.checkpoint import checkpoint

from diffusion_cli.networks.layers import (
    NORM_EPS,
    Attention,
    Downsample,
    ProgressiveInput,
    ResBlock,
    Upsample,
    fourier_embedding,
    timestep_embedding,
    zero_init,
)


class Block(nn.ModuleList):
    """Layers at work between two skip connections, one after the other; `skip` joins as further channels."""

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """F(x, c_noise, y) as a U-Net of residual blocks with self-attention.

    Level l works at image_size / 2^l with channels * channel_mult[l] feature maps: `num_res_blocks` residual
    blocks down, one more up, each fed by the skip connection of its partner. Attention follows the residual
    blocks of the levels named in `attention_resolutions`, on the way up all of them or the `last` of a level,
    and stands in the middle always. The last layer of every branch and of the network starts at zero, so that
    F = 0 before training.

    The time enters by a sinusoidal embedding of `channels` features, or with embedding_layout=fourier by
    2 * channels features of random frequencies w ~ N(0, fourier_scale^2), drawn once and kept in the state.
    `skip_rescale` divides all residual sums by sqrt(2), `fir` filters where blocks change the resolution, and
    the progressive input adds the downsampled image to the features of each coarser level.

    A class-conditional network knows the classes 0 .. num_classes - 1 and the null class num_classes, which
    stands for "no label"; otherwise its `num_classes` is None.

    Raises ValueError where two arguments do not go together.
    Sources: Ho et al. 2020, Appendix B; Nichol & Dhariwal 2021, Section 3 and Appendix A; Song et al. 2021b,
    Appendix H (NCSN++ and DDPM++); Karras et al. 2022, Appendix F.
    """

    frequencies: Tensor

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        num_classes: int | None,
        *,
        channels: PositiveInt,
        channel_mult: list[PositiveInt],
        num_res_blocks: PositiveInt,
        attention_resolutions: list[PositiveInt],
        num_heads: PositiveInt | None,
        head_channels: PositiveInt | None,
        norm_groups: PositiveInt,
        time_embedding: Literal["additive", "scale_shift"],
        embedding_layout: Literal["sin_cos", "cos_sin", "fourier"],
        fourier_scale: PositiveFloat,
        resample: Literal["conv", "conv_same", "block", "block_proj"],
        fir: bool,
        progressive_input: Literal["none", "residual"],
        up_attention: Literal["all", "last"],
        skip_rescale: bool,
        dropout: Annotated[float, Field(ge=0, lt=1)],
        class_conditional: bool,
        learn_variance: bool,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        if not channel_mult:
            raise ValueError("channel_mult=[]: the network needs a level; name a multiplier, as [1, 2]")
        if channels % norm_groups:
            raise ValueError(f"norm_groups={norm_groups}: does not divide channels={channels}; use a divisor")
        if class_conditional and num_classes is None:
            raise ValueError(
                "class_conditional=true: the data set has no classes; use class_conditional=false"
            )
        if fir and not resample.startswith("block"):
            raise ValueError(
                f"fir=true: filters inside blocks, not with resample={resample}; "
                "use resample=block or block_proj, or fir=false"
            )
        self.num_classes = num_classes if class_conditional else None
        self.channels = channels
        self.learn_variance = learn_variance
        self.embedding_layout: Literal["sin_cos", "cos_sin", "fourier"] = embedding_layout
        self.gradient_checkpointing = gradient_checkpointing
        self.multiple = 2 ** (len(channel_mult) - 1)
        emb_channels = 4 * channels
        parts = _Parts(
            widths=[mult * channels for mult in channel_mult],
            num_res_blocks=num_res_blocks,
            attended=_attended_levels(image_size, len(channel_mult), attention_resolutions),
            heads=partial(_heads, num_heads=num_heads, head_channels=head_channels),
            norm_groups=norm_groups,
            resample=resample,
            fir=fir,
            skip_rescale=skip_rescale,
            up_attention=up_attention,
            res=partial(
                ResBlock,
                emb_channels=emb_channels,
                norm_groups=norm_groups,
                dropout=dropout,
                scale_shift=time_embedding == "scale_shift",
                skip_rescale=skip_rescale,
            ),
        )
        features = channels
        if embedding_layout == "fourier":
            features = 2 * channels
            self.register_buffer("frequencies", fourier_scale * torch.randn(channels))
        self.time_mlp = nn.Sequential(
            nn.Linear(features, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if self.num_classes is not None:
            self.class_embedding = nn.Embedding(self.num_classes + 1, emb_channels)
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down, skips = parts.down_path(channels, in_channels if progressive_input == "residual" else None)
        self.middle = parts.middle()
        self.up = parts.up_path(skips)
        self.out_norm = nn.GroupNorm(norm_groups, parts.widths[0], eps=NORM_EPS)
        self.out_conv = nn.Conv2d(parts.widths[0], (2 if learn_variance else 1) * in_channels, 3, padding=1)
        zero_init(self.out_conv)

    def forward(self, x: Tensor, c_noise: Tensor, y: Tensor | None = None) -> Tensor:
        """Return F [B, C, H, W], or [B, 2C, H, W] with the variance values last, in the dtype of x.

        x: [B, C, H, W] of any size, extended within to what the depth divides; c_noise: [B], the timestep
        number or what else the parameterization names; y: int64 [B], or None for the null class. An
        unconditional network takes no notice of y.
        """
        height, width = x.shape[2:]
        emb = self._embed(c_noise, y)
        pyramid = self._extend(x)
        h = self.stem(pyramid)
        skips = [h]
        for block in self.down:
            if isinstance(block, ProgressiveInput):
                h = skips[-1] = pyramid = self._run(block, h, pyramid)
            else:
                h = self._run(block, h, emb)
                skips.append(h)
        h = self._run(self.middle, h, emb)
        for block in self.up:
            h = self._run(block, h, emb, skips.pop())
        h = self.out_conv(silu(self.out_norm(h)))
        return h[..., :height, :width].to(x.dtype)

    def check_labels(self, y: Tensor) -> None:
        """Raise ValueError if the network does not know a label of y [B]; on a GPU this waits for y."""
        if self.num_classes is None:
            raise ValueError("labels were given, but the network was trained with class_conditional=false")
        unknown = sorted({int(label) for label in y.flatten().tolist() if not 0 <= label <= self.num_classes})
        if unknown:
            raise ValueError(
                f"unknown labels {unknown}: the classes are 0..{self.num_classes - 1}, "
                f"and {self.num_classes} stands for no label"
            )

    def _embed(self, c_noise: Tensor, y: Tensor | None) -> Tensor:
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

    def _extend(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        below, right = -height % self.multiple, -width % self.multiple
        return pad(x, (0, right, 0, below), mode="replicate") if below or right else x

    def _run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


@dataclass(frozen=True)
class _Parts:
    """What the two paths of a U-Net are put together from."""

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

    def down_path(self, width: int, pyramid: int | None) -> tuple[nn.ModuleList, list[int]]:
        """Return the blocks and the widths of the skip connections, of which the stem's `width` is first.

        `pyramid` is the number of maps that a progressive input starts with, None without one.
        """
        blocks, skips = nn.ModuleList(), [width]
        for level, width in enumerate(self.widths):
            for _ in range(self.num_res_blocks):
                blocks.append(self._stage(skips[-1], level, attended=level in self.attended))
                skips.append(width)
            if level < len(self.widths) - 1:
                blocks.append(Block([self._resampling(width, "down")]))
                skips.append(width)
                if pyramid is not None:
                    join = ProgressiveInput(pyramid, width, fir=self.fir, skip_rescale=self.skip_rescale)
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
        return Upsample(width) if direction == "up" else Downsample(width, same=self.resample == "conv_same")


def _attended_levels(image_size: int, levels: int, attention_resolutions: list[int]) -> set[int]:
    finest = image_size + -image_size % 2 ** (levels - 1)
    resolutions = [finest >> level for level in range(levels)]
    unreached = [r for r in attention_resolutions if r not in resolutions]
    if unreached:
        raise ValueError(
            f"attention_resolutions={attention_resolutions}: not reached: {unreached}; "
            f"{levels} levels at image size {image_size} work at {resolutions}, choose among these"
        )
    return {resolutions.index(r) for r in attention_resolutions}


def _heads(width: int, num_heads: int | None, head_channels: int | None) -> int:
    if (num_heads is None) == (head_channels is None):
        raise ValueError(
            f"num_heads={num_heads}, head_channels={head_channels}: set one of them, the other null"
        )
    key, value = ("num_heads", num_heads) if head_channels is None else ("head_channels", head_channels)
    assert value is not None
    if width % value:
        raise ValueError(
            f"{key}={value}: does not divide the {width} channels of an attention layer; use a divisor"
        )
    return value if head_channels is None else width // value
