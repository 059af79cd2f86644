"""Layers of the convolutional networks: timestep features, residual block, attention, resampling."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(c_noise: Tensor, dim: int, layout: Literal["sin_cos", "cos_sin"]) -> Tensor:
    """Sinusoidal features of the timestep number, in float64 whatever the precision around it.

    angle[b, i] = c_noise[b] * 10000^(-i / n) for i = 0 .. dim // 2 - 1, with
    `sin_cos`: [sin | cos], n = dim // 2 - 1 (Ho et al. 2020) and
    `cos_sin`: [cos | sin], n = dim // 2 (Nichol & Dhariwal 2021). An odd `dim` ends in a zero.

    c_noise: [B], 0..T-1, fractions welcome. Returns [B, dim], in -1..1.
    """
    dtype = torch.float32 if c_noise.device.type == "mps" else torch.float64  # MPS has no float64
    half = dim // 2
    steps = half if layout == "cos_sin" else max(half - 1, 1)
    exponents = torch.arange(half, device=c_noise.device, dtype=dtype) / steps
    angles = c_noise.to(dtype)[:, None] * torch.exp(-math.log(10000.0) * exponents)
    pair = (angles.sin(), angles.cos())
    return F.pad(torch.cat(pair if layout == "sin_cos" else pair[::-1], dim=1), (0, dim % 2))


class Downsample(nn.Conv2d):
    """Halves height and width by a 3x3 convolution of stride 2.

    `same`: zeros on the right and bottom only, as TensorFlow's "SAME" (Ho et al. 2020); otherwise on
    all sides (Nichol & Dhariwal 2021). [B, C, H, W], H and W even, to [B, C, H/2, W/2].
    """

    def __init__(self, channels: int, same: bool) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=0 if same else 1)
        self.same = same

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)) if self.same else x)


class Upsample(nn.Conv2d):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution. [B, C, H, W] to [B, C, 2H, 2W].

    Computed as the one 4x4 transposed convolution that equals the two: 4/9 of the multiplications, and no
    enlarged copy of the input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)
        taps = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])  # the flipped kernel * [1, 1]
        self.register_buffer("taps", torch.kron(taps, taps).T, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight.transpose(0, 1).flatten(2) @ self.taps).unflatten(2, (4, 4))
        return F.conv_transpose2d(x, weight, self.bias, stride=2, padding=1)


class Attention(nn.Module):
    """Self-attention among all pixels, added to its input: x + proj(softmax(q k^T / sqrt(d)) v).

    [B, C, H, W] to the same shape; `num_heads` divides C (Ho et al. 2020, Appendix B).
    """

    def __init__(self, channels: int, num_heads: int, norm_groups: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(norm_groups, channels, eps=NORM_EPS)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        zero_init(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        qkv = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1)).transpose(1, 3)  # [B, heads, 3, HW, d]
        out = F.scaled_dot_product_attention(*qkv.unbind(2))
        out = self.proj(out.transpose(1, 2).flatten(2))
        return x + out.transpose(1, 2).unflatten(2, x.shape[2:])


class ResBlock(nn.Module):
    """Residual block steered by the time embedding: skip(x) + conv(silu(norm(conv(silu(norm(x)))))).

    `scale_shift`: norm(h) * (1 + scale) + shift (Nichol & Dhariwal 2021); otherwise norm(h + shift)
    (Ho et al. 2020). `resample` changes the resolution inside, by averaging or nearest neighbour, of
    both branches (Dhariwal & Nichol 2021).

    x: [B, in_channels, H, W]; emb: [B, emb_channels], already through silu (all blocks share it).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        norm_groups: int,
        dropout: float,
        scale_shift: bool,
        resample: Literal["up", "down"] | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_channels, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        zero_init(self.conv2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = F.silu(self.norm1(x))
        if self.resample is not None:
            h, x = self._resample(h), self._resample(x)
        h = self.conv1(h)
        emb = self.emb(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + emb)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))

    def _resample(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.resample == "down" else F.interpolate(x, scale_factor=2.0)


NORM_EPS = 1e-6


def zero_init(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
