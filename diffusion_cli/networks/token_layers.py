"""Layers of networks of tokens: linear maps, attention and MLPs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion_cli.networks.dropout import Dropout
from diffusion_cli.networks.group_norm import GroupNorm
from diffusion_cli.networks.layers import NORM_EPS, attend, zero_init

OCTAVES = 6
"""Number of frequencies of a number, each twice the one before."""
FOURIER_FEATURES = 1 + 2 * OCTAVES


def fourier_features(s: Tensor) -> Tensor:
    """Return s, sin(2^k pi s / 2) and cos(2^k pi s / 2) for k = 0..5: [*] to [*, 13], distinct for all s in [-1, 1].

    Source: Tancik et al. 2020, Section 5, with fixed frequencies.
    """
    frequencies = math.pi / 2 * 2.0 ** torch.arange(OCTAVES, device=s.device, dtype=s.dtype)
    angles = s[..., None] * frequencies
    return torch.cat([s[..., None], angles.sin(), angles.cos()], dim=-1)


def pixel_positions(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Return the Fourier features of the coordinates of pixels in row-major order, float32 [N, 13 * axes].

    A coordinate is that of the pixel's centre, from -1 to 1 over the image.
    """
    axes = [(2 * torch.arange(size, device=device) + 1) / size - 1 for size in sizes]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return fourier_features(grid).flatten(-2).flatten(0, -2)


class XavierLinear(nn.Linear):
    """Linear layer with Xavier initialization (Glorot and Bengio 2010) and zero bias."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class SelfAttention(nn.Module):
    """Self-attention over all tokens, at cost O(N^2): [B, N, width] to the same shape.

    `given` [B, N] excludes tokens from being attended to, at most N - 1 of each row; None includes all.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = XavierLinear(width, 3 * width)
        self.proj = XavierLinear(width, width)

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).transpose(1, 3)  # [B, heads, 3, N, d]
        with torch.autocast(x.device.type, enabled=False):
            out = attend(*qkv.unbind(2), given=given)
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention from tokens x [B, N, width] to others [B, M, others_width]: [B, N, width].

    `given` [B, M] excludes others, at most M - 1 of each row; None includes all.
    """

    def __init__(self, width: int, num_heads: int, others_width: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = XavierLinear(width, width)
        self.kv = XavierLinear(width if others_width is None else others_width, 2 * width)
        self.proj = XavierLinear(width, width)

    def forward(self, x: Tensor, others: Tensor, given: Tensor | None = None) -> Tensor:
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, N, d]
        kv = self.kv(others).unflatten(2, (2, self.num_heads, -1)).transpose(1, 3)  # [B, heads, 2, M, d]
        with torch.autocast(x.device.type, enabled=False):
            out = attend(q, *kv.unbind(2), given=given)
        return self.proj(out.transpose(1, 2).flatten(2))


class PixelCrossAttention(nn.Module):
    """Attention from pixels to tokens with residual connection, for [B, C, *sizes]: `x + attend(norm(x) + p, tokens)`.

    p is a linear map of the pixel's position: convolutions know it only by the padding of the border, and words such
    as "left of" need it. The last layer is initially zero. Tokens are [B, L, width], and `given` [B, L] excludes some.

    Source: Rombach et al. 2022, Section 3.3, there without positions.
    """

    outer_layers = ("position",)
    """Names of the input layers, which `optimizer=muon` leaves to AdamW."""

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        ndim: int,
        num_heads: int,
        norm_groups: int,
        norm_eps: float = NORM_EPS,
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, eps=norm_eps)
        self.position = nn.Linear(ndim * FOURIER_FEATURES, channels, bias=False)
        self.attn = CrossAttention(channels, num_heads, width)
        zero_init(self.attn.proj)

    def forward(self, x: Tensor, tokens: Tensor, given: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [B, N, C]
        pixels = pixels + self.position(pixel_positions(x.shape[2:], x.device).to(pixels.dtype))
        return x + self.attn(pixels, tokens, given).transpose(1, 2).unflatten(2, x.shape[2:])


class MLP(nn.Module):
    """Two linear layers with a GELU (tanh approximation) in between, applied per token."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = XavierLinear(width, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.dropout = Dropout(dropout)
        self.fc2 = XavierLinear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(self.act(self.fc1(x))))
