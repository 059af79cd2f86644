"""The convolutional U-Net of DDPM, improved-diffusion and their relatives."""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion_cli.networks.layers import Attention, Downsample, ResBlock, Upsample, timestep_embedding, zero_init, NORM_EPS


class Block(nn.ModuleList):
    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
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
        embedding_layout: Literal["sin_cos", "cos_sin"],
        resample: Literal["conv", "conv_same", "block"],
        dropout: Annotated[float, Field(ge=0, lt=1)],
        class_conditional: bool,
        learn_variance: bool,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes if class_conditional else None
        self.channels = channels
        self.embedding_layout = embedding_layout
        self.gradient_checkpointing = gradient_checkpointing
        self.multiple = 2 ** (len(channel_mult) - 1)
        self.memory_format = torch.channels_last
        padded = -(-image_size // self.multiple) * self.multiple
        emb_channels = 4 * channels

        def res(c_in, c_out, rs=None):
            return ResBlock(c_in, c_out, emb_channels, norm_groups=norm_groups, dropout=dropout,
                            scale_shift=time_embedding == "scale_shift", resample=rs)

        def attn(c):
            return Attention(c, num_heads or c // head_channels, norm_groups)

        self.time_mlp = nn.Sequential(nn.Linear(channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels))
        self.class_embedding = nn.Embedding(num_classes + 1, emb_channels) if class_conditional else None
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        skips = [channels]
        width = channels
        self.down = nn.ModuleList()
        for level, mult in enumerate(channel_mult):
            at = padded >> level in attention_resolutions
            for _ in range(num_res_blocks):
                self.down.append(Block([res(width, mult * channels)] + ([attn(mult * channels)] if at else [])))
                width = mult * channels
                skips.append(width)
            if level < len(channel_mult) - 1:
                self.down.append(Block([res(width, width, "down") if resample == "block" else Downsample(width, resample == "conv_same")]))
                skips.append(width)
        self.middle = Block([res(width, width), attn(width), res(width, width)])
        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            at = padded >> level in attention_resolutions
            for i in range(num_res_blocks + 1):
                b = Block([res(width + skips.pop(), mult * channels)] + ([attn(mult * channels)] if at else []))
                width = mult * channels
                if level and i == num_res_blocks:
                    b.append(res(width, width, "up") if resample == "block" else Upsample(width))
                self.up.append(b)
        self.out_norm = nn.GroupNorm(norm_groups, width, eps=NORM_EPS)
        self.out_conv = nn.Conv2d(width, in_channels * (2 if learn_variance else 1), 3, padding=1)
        zero_init(self.out_conv)

    def forward(self, x: Tensor, c_noise: Tensor, y: Tensor | None = None) -> Tensor:
        height, width = x.shape[2:]
        h = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate") if (-width % self.multiple or -height % self.multiple) else x
        emb = self._embed(c_noise, y)
        h = self.stem(h).contiguous(memory_format=self.memory_format)
        skips = [h]
        for block in self.down:
            h = self._run(block, h, emb)
            skips.append(h)
        h = self._run(self.middle, h, emb)
        for block in self.up:
            h = self._run(block, h, emb, skips.pop())
        h = self.out_conv(F.silu(self.out_norm(h)))
        return h[..., :height, :width].to(x.dtype, memory_format=torch.contiguous_format)

    def _embed(self, c_noise, y):
        with torch.autocast(c_noise.device.type, enabled=False):
            features = timestep_embedding(c_noise, self.channels, self.embedding_layout)
            emb = self.time_mlp(features.to(self.time_mlp[0].weight.dtype))
            if self.class_embedding is not None:
                if y is None:
                    y = c_noise.new_full(c_noise.shape, self.num_classes, dtype=torch.int64)
                emb = emb + self.class_embedding(y)
            return F.silu(emb)

    def _run(self, block, *a):
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *a, use_reentrant=False)
        return block(*a)
