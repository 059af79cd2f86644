"""Layers of the convolutional networks: timestep features, resampling, attention, residual block."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    avg_pool2d,
    conv_transpose2d,
    interpolate,
    pad,
    scaled_dot_product_attention,
    silu,
)

NORM_EPS = 1e-6  # Ho et al. 2020


def timestep_embedding(c_noise: Tensor, dim: int, layout: Literal["sin_cos", "cos_sin"]) -> Tensor:
    """Sinusoidal features of the timestep number, in float64 whatever the precision around it.

    angle[b, i] = c_noise[b] * 10000^(-i / n) for i = 0 .. dim // 2 - 1, with
    `sin_cos`: [sin | cos], n = dim // 2 - 1 (Ho et al. 2020's code) and
    `cos_sin`: [cos | sin], n = dim // 2 (Nichol & Dhariwal 2021's code). An odd `dim` ends in a zero.

    c_noise: [B], usually 0..T-1, fractions welcome. Returns [B, dim], in -1..1.
    """
    dtype = torch.float32 if c_noise.device.type == "mps" else torch.float64  # MPS has no float64
    half = dim // 2
    n = half if layout == "cos_sin" else max(half - 1, 1)
    exponents = torch.arange(half, device=c_noise.device, dtype=dtype) / n
    angles = c_noise.to(dtype)[:, None] * torch.exp(-math.log(10000.0) * exponents)
    halves = (angles.sin(), angles.cos()) if layout == "sin_cos" else (angles.cos(), angles.sin())
    return pad(torch.cat(halves, dim=1), (0, dim % 2))


class FourierFeatures(nn.Module):
    """Features at random frequencies, `[sin(2 pi w c) | cos(2 pi w c)]` with w ~ N(0, scale^2), drawn once and kept.

    c_noise: [B], such as log sigma. Returns float64 [B, 2 * count].
    Source: Tancik et al. 2020; Song et al. 2021b, App. C.
    """

    frequencies: Tensor

    def __init__(self, count: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(count))

    def forward(self, c_noise: Tensor) -> Tensor:
        dtype = torch.float32 if c_noise.device.type == "mps" else torch.float64
        angles = 2 * math.pi * c_noise.to(dtype)[:, None] * self.frequencies.to(dtype)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def fir_resample(x: Tensor, direction: Literal["up", "down"]) -> Tensor:
    """Halve or double height and width through the low-pass filter [1, 3, 3, 1] along both axes.

    Both keep a constant, zeros beyond the edges apart; they are each other's transpose, up to a factor of 4.
    Source: Zhang 2019; Karras et al. 2020 (StyleGAN2).
    """
    for axis in (-2, -1):
        x = x.transpose(axis, -1)
        edged = pad(x, (1, 1))
        if direction == "down":
            x = (edged[..., :-2:2] + edged[..., 3::2]) / 8 + (x[..., ::2] + x[..., 1::2]) * (3 / 8)
        else:
            left, right = (edged[..., :-2] + 3 * x) / 4, (3 * x + edged[..., 2:]) / 4
            x = torch.stack([left, right], -1).flatten(-2)
        x = x.transpose(axis, -1)
    return x


def resampled(x: Tensor, direction: Literal["up", "down"], fir: bool) -> Tensor:
    """Halve or double height and width, filtered, or else by 2x2 means or nearest neighbour."""
    if fir:
        return fir_resample(x, direction)
    return avg_pool2d(x, 2) if direction == "down" else interpolate(x, scale_factor=2.0)


def zero_init(layer: nn.Module) -> None:
    """Set all parameters to zero, so that the branch that ends in the layer starts as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class Downsample(nn.Conv2d):
    """Halves height and width by a 3x3 convolution of stride 2: [B, C, H, W] to [B, C, H/2, W/2].

    `same`: zeros right and below only, as TensorFlow's "SAME" (Ho et al. 2020); otherwise on all sides
    (Nichol & Dhariwal 2021). H and W are even.
    """

    def __init__(self, channels: int, *, same: bool) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=0 if same else 1)
        self.same = same

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(pad(input, (0, 1, 0, 1)) if self.same else input)


class Upsample(nn.Conv2d):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution. [B, C, H, W] to [B, C, 2H, 2W].

    Computed as the one transposed 4x4 convolution that equals the two: 4/9 of the multiplications and no
    enlarged copy of the input, about twice as fast.
    """

    taps: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)
        # Along one axis a kernel (a, b, c) turns into (c, b + c, a + b, a): flipped, then summed in pairs.
        axis = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        self.register_buffer("taps", torch.kron(axis, axis).T, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        weight = (self.weight.transpose(0, 1).flatten(2) @ self.taps).unflatten(2, (4, 4))
        return conv_transpose2d(input, weight, self.bias, stride=2, padding=1)


class Attention(nn.Module):
    """Self-attention among all pixels, added to its input: (x + proj(softmax(q k^T / sqrt(d)) v)) * gain.

    q, k, v are linear in norm(x); d = channels / num_heads. [B, C, H, W] to the same shape.
    Source: Ho et al. 2020, Appendix B.
    """

    def __init__(self, channels: int, *, num_heads: int, norm_groups: int, gain: float = 1.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.gain = gain
        self.norm = nn.GroupNorm(norm_groups, channels, eps=NORM_EPS)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        zero_init(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        qkv = self.qkv(pixels).unflatten(2, (3, self.num_heads, -1)).transpose(1, 3)  # [B, heads, 3, HW, d]
        # On a CPU the bfloat16 kernel takes twice to four times as long as the float32 one for so few pixels.
        if x.device.type == "cpu" and qkv.shape[3] < 256:
            qkv = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            out = scaled_dot_product_attention(*qkv.unbind(2)).to(x.dtype)
        out = self.proj(out.transpose(1, 2).flatten(2))
        return scaled(x + out.transpose(1, 2).unflatten(2, x.shape[2:]), self.gain)


class ResBlock(nn.Module):
    """Residual block steered by the time embedding: (skip(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))) * gain.

    The embedding enters at norm2: norm2(h) * (1 + scale) + shift with `scale_shift` (Nichol & Dhariwal 2021),
    norm2(h + shift) without (Ho et al. 2020). `resample` changes the resolution of both branches inside
    the block, by 2x2 means or nearest neighbour (Dhariwal & Nichol 2021), or with `fir` filtered (Song et al. 2021b).
    A gain of 1 / sqrt(2) keeps the variance of the sum of two.

    x: [B, in_channels, H, W]; emb: [B, emb_channels], already through silu, which all blocks share.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        emb_channels: int,
        norm_groups: int,
        dropout: float,
        scale_shift: bool,
        resample: Literal["up", "down"] | None = None,
        fir: bool = False,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample: Literal["up", "down"] | None = resample
        self.fir, self.gain = fir, gain
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_channels, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        zero_init(self.conv2)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = silu(self.norm1(x))
        if self.resample is not None:
            h, x = resampled(h, self.resample, self.fir), resampled(x, self.resample, self.fir)
        h = self.conv1(h)
        emb = self.emb(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + emb)
        return scaled(self.skip(x) + self.conv2(self.dropout(silu(h))), self.gain)


def scaled(x: Tensor, gain: float) -> Tensor:
    """gain * x, at no cost where that is x."""
    return x if gain == 1 else gain * x
