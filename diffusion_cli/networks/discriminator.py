"""The discriminator that an autoencoder's images are shown to in training."""

from torch import Tensor, nn

from diffusion_cli.errors import UsageError

NORM_GROUPS = 8
INITIAL_STD = 0.02  # of the weights, as published


class PatchDiscriminator(nn.Module):
    """How real each patch of an image looks, a number without bounds: [B, C, H, W] to [B, 1, h, w].

    4x4 convolutions with leaky ReLUs: `layers` of stride 2 and twice the maps each, up to 8 * channels, then two of
    stride 1. Norms are of groups: those of batches, as published, would depend on how a batch is shared out.

    Raises UsageError for images smaller than its patches need, or channels that groups of 8 do not divide.
    Source: Isola et al. 2017, Sec. 3.2.2 and Appendix 6.1.2.
    """

    def __init__(self, shape: tuple[int, ...], *, channels: int, layers: int) -> None:
        if channels % NORM_GROUPS:
            raise UsageError(
                "objective.discriminator_channels", channels, f"is no multiple of {NORM_GROUPS}", "take one"
            )
        least = 3 * 2**layers
        if min(shape[1:]) < least:
            sides = "x".join(str(side) for side in shape[1:])
            raise UsageError(
                "objective.discriminator_layers",
                layers,
                f"needs images of {least} pixels a side, and these have {sides}",
                "take fewer",
            )
        super().__init__()
        widths = [min(2**level, 8) * channels for level in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(shape[0], widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, layers + 1):
            stride = 2 if level < layers else 1
            parts += [
                nn.Conv2d(widths[level - 1], widths[level], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(NORM_GROUPS, widths[level]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, INITIAL_STD)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
