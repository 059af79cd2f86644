"""Discriminator for the training of autoencoders."""

from torch import Tensor, nn

from diffusion_cli.errors import UsageError

NORM_GROUPS = 8
INITIAL_STD = 0.02  # of the initial weights, as published


class PatchDiscriminator(nn.Module):
    """Patch discriminator: logits of how real the patches of images or volumes [B, C, *sizes] look.

    Has convolutions of size 4 with leaky ReLU. Group norm replaces the published batch norm, which would depend on the
    number of devices.

    Args:
        shape: shape of an image [C, H, W], or of a volume [C, D, H, W].
        channels: feature maps of the first convolution, a multiple of 8; doubled per layer up to a factor of 8.
        layers: convolutions of stride 2; two of stride 1 follow.

    Raises:
        UsageError: the images are too small for the patches, or `channels` is invalid.

    Source: Isola et al. 2017, Sec. 3.2.2 and Appendix 6.1.2.
    """

    def __init__(self, shape: tuple[int, ...], *, channels: int, layers: int) -> None:
        if channels % NORM_GROUPS:
            raise UsageError(
                "objective.discriminator_channels",
                channels,
                f"must be a multiple of {NORM_GROUPS}",
                f"use for example {-(-channels // NORM_GROUPS) * NORM_GROUPS}",
            )
        least = 3 * 2**layers
        if min(shape[1:]) < least:
            sides = "x".join(str(side) for side in shape[1:])
            raise UsageError(
                "objective.discriminator_layers",
                layers,
                f"needs at least {least} pixels per side, but images are {sides}",
                "use fewer layers",
            )
        super().__init__()
        conv = nn.Conv2d if len(shape) == 3 else nn.Conv3d
        widths = [min(2**level, 8) * channels for level in range(layers + 1)]
        parts: list[nn.Module] = [conv(shape[0], widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, layers + 1):
            stride = 2 if level < layers else 1
            parts += [
                conv(widths[level - 1], widths[level], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(NORM_GROUPS, widths[level]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*parts, conv(widths[-1], 1, 4, padding=1))
        self.outer_layers = ("layers.0", f"layers.{len(self.layers) - 1}")  # as `UNet.outer_layers`
        for layer in self.layers:
            if isinstance(layer, conv):
                nn.init.normal_(layer.weight, 0.0, INITIAL_STD)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, 1, ...] of x [B, C, *sizes]."""
        return self.layers(x)
