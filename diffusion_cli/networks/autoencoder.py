"""Autoencoders of latent diffusion models."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from diffusion_cli.errors import UsageError
from diffusion_cli.networks.group_norm import GroupNorm, channels_last
from diffusion_cli.networks.layers import (
    NORM_EPS,
    Checkpointed,
    Downsample,
    Pointwise,
    Upsample,
    attend,
)

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
"""Convolutions by number of axes; how they print is a part of the keys of cached latents."""
LOG_VARIANCE = (-30.0, 20.0)
"""Limits of the log variance of latents, as published."""


class ImageAutoencoder(nn.Module, ABC):
    """Base class of convolutional autoencoders of images or volumes, with latents [L, *sizes / factor].

    Level l works at sizes / 2^l with channels * channel_mult[l] feature maps, and factor = 2^(levels - 1). Encoder and
    decoder have self-attention at the lowest resolution. State dicts have the names of diffusers, and for images its
    shapes.

    Args:
        shape: shape of an image [C, H, W], or of a volume [C, D, H, W].
        latent_channels: channels L of the latents.
        encoded: channels of the encoder's output.
        decoded: channels of the decoder's input.
        channels: see `AutoencoderKL`, likewise the others.

    Raises:
        UsageError: arguments contradict each other, or `factor` does not divide the image size.
    """

    task = "autoencoder"
    outer_layers = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out")
    """Names of the input and output layers, which `optimizer=muon` leaves to AdamW."""

    def __init__(
        self,
        shape: tuple[int, ...],
        latent_channels: int,
        *,
        encoded: int,
        decoded: int,
        channels: PositiveInt,
        channel_mult: Sequence[PositiveInt],
        num_res_blocks: PositiveInt,
        norm_groups: PositiveInt,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        if len(shape) not in (3, 4):
            raise UsageError(
                "model",
                type(self).__name__,
                f"needs images [C, H, W] or volumes [C, D, H, W], not shape {list(shape)}",
                "use a dataset of images or volumes",
            )
        if not channel_mult:
            raise UsageError("channel_mult", "[]", "must have at least one level", "use for example [1,2]")
        if channels % norm_groups:
            raise UsageError(
                "norm_groups", norm_groups, f"does not divide channels={channels}", "use a divisor"
            )
        self.latent_channels = latent_channels
        self.factor = 2 ** (len(channel_mult) - 1)
        """Pixels per latent along each side."""
        self.latent_shape(shape)  # validates the image size
        widths = [mult * channels for mult in channel_mult]
        self.ndim = len(shape) - 1
        parts = (widths, num_res_blocks, norm_groups, gradient_checkpointing)
        self.encoder = Encoder(shape[0], encoded, *parts, ndim=self.ndim)
        self.decoder = Decoder(decoded, shape[0], *parts, ndim=self.ndim)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the latent shape [L, *sizes / factor] of images; UsageError if `factor` does not divide the sizes."""
        if any(side % self.factor for side in shape[1:]):
            sides = "x".join(str(side) for side in shape[1:])
            raise UsageError(
                "model",
                type(self).__name__,
                f"image sizes must be multiples of {self.factor}, but images are {sides}",
                "use fewer levels in model.channel_mult, or images of another size",
            )
        return (self.latent_channels, *(side // self.factor for side in shape[1:]))

    @abstractmethod
    def moments(self, x: Tensor) -> Tensor:
        """Return mean and log variance of the latents, [B, 2L, *latent sizes], of images x [B, C, *sizes]."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Return images [B, C, *sizes] of latents z [B, L, *latent sizes], not clipped to [-1, 1]."""

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return reconstructions of images x, both [B, C, *sizes], from mean latents."""
        return self.decode(self.moments(x).chunk(2, dim=1)[0])


class AutoencoderKL(ImageAutoencoder):
    """Convolutional variational autoencoder with encoder `q(z | x) = N(mean, variance)` and decoder p(x | z).

    Level l works at sizes / 2^l with channels * channel_mult[l] feature maps. Encoder and decoder have self-attention
    at the lowest resolution. Latents have the shape [latent_channels, *sizes / factor] with factor = 2^(levels - 1).
    The state dict has the names of AutoencoderKL in diffusers, and for images its shapes.

    Args:
        shape: shape of an image [C, H, W], or of a volume [C, D, H, W].
        num_classes: unused.
        channels: feature maps of the first level.
        channel_mult: multiplier of `channels` per level.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
        latent_channels: channels L of the latents.
        norm_groups: groups of the group norms, a divisor of `channels`.
        quant_conv: whether to apply 1x1 convolutions before and after the latents.
        gradient_checkpointing: whether to recompute activations in the backward pass to save memory.

    Raises:
        UsageError: arguments contradict each other, or `factor` does not divide the image size.

    Source: Rombach et al. 2022, Sec. 3.1 and Appendix G; Esser et al. 2021.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int | None,
        *,
        channels: PositiveInt = 16,
        channel_mult: Sequence[PositiveInt] = (1, 2, 4),
        num_res_blocks: PositiveInt = 1,
        latent_channels: PositiveInt = 4,
        norm_groups: PositiveInt = 8,
        quant_conv: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            shape, latent_channels, encoded=2 * latent_channels, decoded=latent_channels, channels=channels,
            channel_mult=channel_mult, num_res_blocks=num_res_blocks, norm_groups=norm_groups,
            gradient_checkpointing=gradient_checkpointing,
        )  # fmt: skip
        self.quant_conv = self.post_quant_conv = None
        if quant_conv:
            self.quant_conv = CONV[self.ndim](2 * latent_channels, 2 * latent_channels, 1)
            self.post_quant_conv = CONV[self.ndim](latent_channels, latent_channels, 1)

    def moments(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        mean, log_variance = (h if self.quant_conv is None else self.quant_conv(h)).chunk(2, dim=1)
        return torch.cat([mean, log_variance.clamp(*LOG_VARIANCE)], dim=1).to(x.dtype)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z)).to(z.dtype)

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Return reconstructions from `z = mean + exp(log_variance / 2) eps`, and the moments.

        Args:
            x: images [B, C, *sizes].
            eps: standard normal noise [B, L, *latent sizes], or zeros for z = mean.
        """
        moments = self.moments(x)
        return self.decode(drawn(moments, eps)), moments

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile all but the decoder's last layer: its gradients determine the weight of the discriminator."""
        self.encoder.compile(*args, **kwargs)
        for block in (self.decoder.mid_block, *self.decoder.up_blocks):
            block.compile(*args, **kwargs)


class VQModel(ImageAutoencoder):
    """Autoencoder whose decoder replaces each latent vector by the nearest vector of a codebook.

    A denoiser works on the vectors before this step. The codebook is not trained here: only imported models have this
    network.

    Args:
        shape: shape of an image [C, H, W], or of a volume [C, D, H, W].
        num_classes: unused.
        channels: feature maps of the first level.
        channel_mult: multiplier of `channels` per level.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
        latent_channels: channels L of the latents and of the codebook.
        feature_channels: channels of the encoder's output and the decoder's input, which 1x1 convolutions map to L.
        codebook_size: number of vectors in the codebook.
        norm_groups: groups of the group norms, a divisor of `channels`.
        gradient_checkpointing: whether to recompute activations in the backward pass to save memory.

    Raises:
        UsageError: arguments contradict each other, or `factor` does not divide the image size.

    Source: van den Oord et al. 2017; Rombach et al. 2022, Sec. 3.1.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int | None,
        *,
        channels: PositiveInt = 128,
        channel_mult: Sequence[PositiveInt] = (1, 2, 4),
        num_res_blocks: PositiveInt = 2,
        latent_channels: PositiveInt = 3,
        feature_channels: PositiveInt = 3,
        codebook_size: PositiveInt = 8192,
        norm_groups: PositiveInt = 32,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            shape, latent_channels, encoded=feature_channels, decoded=feature_channels, channels=channels,
            channel_mult=channel_mult, num_res_blocks=num_res_blocks, norm_groups=norm_groups,
            gradient_checkpointing=gradient_checkpointing,
        )  # fmt: skip
        self.quant_conv = CONV[self.ndim](feature_channels, latent_channels, 1)
        self.quantize = Codebook(codebook_size, latent_channels)
        self.post_quant_conv = CONV[self.ndim](latent_channels, feature_channels, 1)

    def moments(self, x: Tensor) -> Tensor:
        """Return the latents, which are not random: their log variance is the least."""
        mean = self.quant_conv(self.encoder(x))
        return torch.cat([mean, torch.full_like(mean, LOG_VARIANCE[0])], dim=1).to(x.dtype)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(self.quantize(z))).to(z.dtype)


class Codebook(nn.Module):
    """Replaces vectors z [B, L, *sizes] by the nearest of `size` vectors; gradients pass as through the identity."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, channels)

    def forward(self, z: Tensor) -> Tensor:
        # Image by image, because the distances to all vectors need much memory.
        nearest = [
            torch.cdist(image.flatten(1).T, self.embedding.weight).argmin(dim=1) for image in z.detach()
        ]
        codes = self.embedding(torch.stack(nearest)).transpose(1, 2).view_as(z)
        return z + (codes - z).detach()


def drawn(moments: Tensor, eps: Tensor) -> Tensor:
    """Return latents mean + exp(log_variance / 2) eps, [B, L, *sizes], of moments [B, 2L, *sizes]."""
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * log_variance) * eps


class Encoder(Checkpointed):
    """Encoder from images or volumes to features, halving the resolution per level."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: list[int],
        num_res_blocks: int,
        norm_groups: int,
        gradient_checkpointing: bool,
        *,
        ndim: int,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.conv_in = CONV[ndim](in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        before = widths[0]
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            resample = {} if last else {"downsamplers": Downsample(width, same=True, ndim=ndim)}
            self.down_blocks.append(Level(before, width, num_res_blocks, norm_groups, resample, ndim=ndim))
            before = width
        self.mid_block = Middle(before, norm_groups, ndim=ndim)
        self.conv_norm_out = GroupNorm(norm_groups, before, eps=NORM_EPS)
        self.conv_out = CONV[ndim](before, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = channels_last(self.conv_in(x))
        for block in (*self.down_blocks, self.mid_block):
            h = self.run(block, h)
        return self.conv_out(self.conv_norm_out(h, activation=True)).contiguous()


class Decoder(Checkpointed):
    """Decoder from latents to images or volumes, doubling the resolution per level."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: list[int],
        num_res_blocks: int,
        norm_groups: int,
        gradient_checkpointing: bool,
        *,
        ndim: int,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.conv_in = CONV[ndim](in_channels, widths[-1], 3, padding=1)
        self.mid_block = Middle(widths[-1], norm_groups, ndim=ndim)
        self.up_blocks = nn.ModuleList()
        before = widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            resample = {"upsamplers": Upsample(width, ndim=ndim)} if level else {}
            self.up_blocks.append(Level(before, width, num_res_blocks + 1, norm_groups, resample, ndim=ndim))
            before = width
        self.conv_norm_out = GroupNorm(norm_groups, before, eps=NORM_EPS)
        self.conv_out = CONV[ndim](before, out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = channels_last(self.conv_in(z))
        for block in (self.mid_block, *self.up_blocks):
            h = self.run(block, h)
        return self.conv_out(self.conv_norm_out(h, activation=True)).contiguous()


class Level(nn.Module):
    """Residual blocks of one resolution, followed by `resample`, layers by their name in the state dict."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        num_res_blocks: int,
        norm_groups: int,
        resample: Mapping[str, nn.Module],
        *,
        ndim: int,
    ) -> None:
        super().__init__()
        before = [in_channels] + [width] * (num_res_blocks - 1)
        self.resnets = nn.ModuleList(Residual(channels, width, norm_groups, ndim=ndim) for channels in before)
        for name, layer in resample.items():
            self.add_module(name, nn.ModuleList([Named(conv=layer)]))

    def forward(self, h: Tensor) -> Tensor:
        for layers in self.children():
            assert isinstance(layers, nn.ModuleList)
            for layer in layers:
                h = layer(h)
        return h


class Named(nn.Sequential):
    """Sequential module with named layers."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__(OrderedDict(layers))


class Middle(nn.Module):
    """Residual block, self-attention and residual block."""

    def __init__(self, width: int, norm_groups: int, *, ndim: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([MiddleAttention(width, norm_groups)])
        self.resnets = nn.ModuleList(Residual(width, width, norm_groups, ndim=ndim) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](h)))


class Residual(nn.Module):
    """Residual block: `skip(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))`.

    Maps [B, in_channels, *sizes] to [B, out_channels, *sizes]; `skip` is a convolution of size 1 if these differ.
    """

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int, *, ndim: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(norm_groups, in_channels, eps=NORM_EPS)
        self.conv1 = CONV[ndim](in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(norm_groups, out_channels, eps=NORM_EPS)
        self.conv2 = CONV[ndim](out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            None if in_channels == out_channels else Pointwise(in_channels, out_channels, ndim=ndim)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x, activation=True))
        h = self.conv2(self.norm2(h, activation=True))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class MiddleAttention(nn.Module):
    """Single-head self-attention over pixels, `x + out(softmax(q k^T / sqrt(C)) v)`, for x [B, C, *sizes]."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(norm_groups, channels, eps=NORM_EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, N, C]
        q, k, v = (linear(pixels)[:, None] for linear in (self.to_q, self.to_k, self.to_v))
        with torch.autocast(x.device.type, enabled=False):
            out = attend(q, k, v)[:, 0]
        return x + self.to_out[0](out).transpose(1, 2).unflatten(2, x.shape[2:])
