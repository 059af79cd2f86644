"""Magnitude-preserving layers: outputs have unit variance where inputs have, at every step of a training.

Source: Karras et al. 2024, Sec. 2 and App. B.
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from diffusion_cli.networks.dropout import Dropout
from diffusion_cli.networks.layers import CONV, attend, double, halve, widened

SILU_SCALE = 0.596
"""Root mean square of silu(x) for normal x (Karras et al. 2024, Eq. 81)."""
RESIDUAL_SHARE = 0.3
"""Weight t of a residual branch, or of an attention, in `mp_sum` (Karras et al. 2024, Table 6)."""
LARGEST_ACTIVATION = 256.0
"""Limit of the activations between blocks, far from those of a trained network, so that float16 has no overflow."""
NORM_EPS = 1e-4
"""Constant that the normalization of activations adds to their root mean square."""

SMALLEST_NORM = 1e-12
"""Smallest norm of weights by which they are divided."""


def mp_silu(x: Tensor) -> Tensor:
    """Return silu(x), divided by its root mean square for normal x."""
    return silu(x) / SILU_SCALE


def mp_sum(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Return `((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)` (Karras et al. 2024, Eq. 88)."""
    norm = math.hypot(1 - t, t)
    return a * ((1 - t) / norm) + b * (t / norm)


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    """Return the channels of a [B, N_a, ...] and b [B, N_b, ...], scaled so that both contribute equally.

    The factors are `sqrt((N_a + N_b) / (2 N))` for N channels (Karras et al. 2024, Eq. 103).
    """
    total = a.shape[1] + b.shape[1]
    return torch.cat([part * math.sqrt(total / (2 * part.shape[1])) for part in (a, b)], dim=1)


def normalized(x: Tensor, dim: int) -> Tensor:
    """Return activations divided by their root mean square along a dimension (Karras et al. 2024, Eq. 30)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide) / math.sqrt(x.shape[dim])
    return x / (norm + NORM_EPS).to(x.dtype)


class NormalizedLayer(nn.Module):
    """Layer without bias, with weights w / |w| for each output: the length of a row of w has no effect.

    `normalize_weights` sets the root mean square of each row to 1, so that the learning rate is the relative change of
    a weight in a step, in every layer alike (Karras et al. 2024, Eq. 47 and 66).

    Args:
        shape: shape of w, [outputs, inputs, ...].
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))
        with torch.no_grad():
            self.weight.mul_(math.sqrt(self.weight[0].numel()) / self.norm())

    def norm(self) -> Tensor:
        """Return |w| of each output, [outputs, 1, ...]."""
        weight = self.weight
        norm = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim())), keepdim=True)
        return norm.clamp(min=SMALLEST_NORM)

    def unit_weight(self) -> Tensor:
        """Return w / |w|."""
        return self.weight / self.norm()


class MPConv(NormalizedLayer):
    """Convolution with normalized weights, with a kernel of length `size` in `ndim` dimensions, keeping all sizes."""

    def __init__(self, in_channels: int, out_channels: int, size: int = 3, *, ndim: int = 2) -> None:
        super().__init__(out_channels, in_channels, *[size] * ndim)
        self.ndim, self.padding = ndim, size // 2

    def forward(self, x: Tensor) -> Tensor:
        return CONV[self.ndim](x, self.unit_weight(), None, 1, self.padding)


class MPLinear(NormalizedLayer):
    """Linear layer with normalized weights, [..., inputs] to [..., outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(outputs, inputs)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.unit_weight())


def normalized_layers(network: nn.Module) -> list[NormalizedLayer]:
    """Return the layers of a network with normalized weights that are trained."""
    layers = (module for module in network.modules() if isinstance(module, NormalizedLayer))
    return [layer for layer in layers if layer.weight.requires_grad]


@torch.no_grad()
def normalize_weights(layers: Iterable[NormalizedLayer]) -> None:
    """Set the root mean square of each row of the weights to 1, which does not change the outputs."""
    for layer in layers:
        layer.weight.mul_(math.sqrt(layer.weight[0].numel()) / layer.norm())


class FourierFeatures(nn.Module):
    """Random Fourier features of unit variance, `sqrt(2) cos(2 pi (w c + p))`, [B] to [B, channels].

    Frequencies w are normal, phases p uniform. Source: Karras et al. 2024, Eq. 75; Tancik et al. 2020.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, channels: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(channels, generator=generator))
        self.register_buffer("phases", torch.rand(channels, generator=generator))

    def forward(self, c: Tensor) -> Tensor:
        c = widened(c)
        turns = c[:, None] * self.frequencies.to(c.dtype) + self.phases.to(c.dtype)
        return (math.sqrt(2) * torch.cos(2 * math.pi * turns)).to(self.frequencies.dtype)


class CosineAttention(nn.Module):
    """Self-attention over pixels, with q, k and v of unit root mean square over the channels of a head.

    Maps [B, C, *sizes] to the same shape; the residual connection is a `mp_sum`.
    """

    def __init__(self, channels: int, num_heads: int, *, ndim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = MPConv(channels, 3 * channels, 1, ndim=ndim)
        self.proj = MPConv(channels, channels, 1, ndim=ndim)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).flatten(2).unflatten(1, (3, self.num_heads, -1)).transpose(3, 4)
        with torch.autocast(x.device.type, enabled=False):
            out = attend(*normalized(heads, dim=4).unbind(1))  # [B, heads, N, d]
        out = self.proj(out.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:]))
        return mp_sum(x, out, RESIDUAL_SHARE)


class MPBlock(nn.Module):
    """Residual block of EDM2, conditioned on an embedding, with optional attention (Karras et al. 2024, Fig. 21).

    The branch is `conv2(silu((1 + gain emb) conv1(silu(x))))`, with a gain that is zero at first. Blocks of the
    encoder normalize x to unit variance at each pixel.

    Args:
        in_channels: channels of the input x.
        out_channels: channels of the output.
        emb_channels: features of the embedding, [B, emb_channels].
        part: `encoder` or `decoder`.
        skip_channels: channels of a skip connection, which are concatenated to x; 0 without one.
        dropout: dropout probability in the branch.
        num_heads: attention heads; None without attention.
        resample: whether the block doubles or halves the resolution.
        ndim: number of dimensions beside the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        emb_channels: int,
        part: Literal["encoder", "decoder"],
        dropout: float,
        skip_channels: int = 0,
        num_heads: int | None = None,
        resample: Literal["up", "down"] | None = None,
        ndim: int = 2,
    ) -> None:
        super().__init__()
        self.part: Literal["encoder", "decoder"] = part
        self.skip_channels, self.resample = skip_channels, resample
        in_channels += skip_channels
        same = in_channels == out_channels
        self.project = nn.Identity() if same else MPConv(in_channels, out_channels, 1, ndim=ndim)
        self.conv1 = MPConv(out_channels if part == "encoder" else in_channels, out_channels, ndim=ndim)
        self.emb = MPLinear(emb_channels, out_channels)
        self.emb_gain = nn.Parameter(torch.zeros(1))
        self.dropout = Dropout(dropout)
        self.conv2 = MPConv(out_channels, out_channels, ndim=ndim)
        attends = num_heads is not None
        self.attention = CosineAttention(out_channels, num_heads, ndim=ndim) if attends else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = mp_cat(x, skip)
        if self.resample is not None:
            x = double(x, fir=False) if self.resample == "up" else halve(x, fir=False)
        if self.part == "encoder":
            x = normalized(self.project(x), dim=1)
        h = self.conv1(mp_silu(x))
        scale = 1 + self.emb_gain * self.emb(emb)
        h = mp_silu(h * scale.unflatten(1, (-1, *[1] * (x.dim() - 2))).to(h.dtype))
        h = self.conv2(self.dropout(h))
        x = mp_sum(self.project(x) if self.part == "decoder" else x, h, RESIDUAL_SHARE)
        return self.attention(x).clamp(-LARGEST_ACTIVATION, LARGEST_ACTIVATION)
