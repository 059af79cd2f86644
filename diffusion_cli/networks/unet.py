"""The convolutional U-Net of DDPM, improved-diffusion, score-based SDEs and their kin."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import silu

from diffusion_cli.networks.encoder import EmbeddingLayout, Resample, UNetConfig, UNetEncoder
from diffusion_cli.networks.layers import NORM_EPS, Conv, conditioning_classes, crop, from_patches, zero_init


class UNet(UNetEncoder):
    """F(x, c_noise, y) as a U-Net of residual blocks with self-attention.

    `shape` is that of a signal [C, L], an image [C, H, W] or a volume [C, D, H, W]: one network in 1, 2 and 3
    dimensions. Level l works at 1 / (patch_size 2^l) of each size with channels * channel_mult[l] feature maps:
    `num_res_blocks` residual blocks down, one more up, each fed by the skip connection of its partner.
    Attention follows the residual blocks of the levels whose first size (of images the height) is named in
    `attention_resolutions`, on the way up all of them or the `last` of a level, and stands in the middle always. The
    last layer of every branch and of the network starts at zero, so that F = 0 before training.

    The time enters by a sinusoidal embedding of `channels` features, or with embedding_layout=fourier by
    2 * channels features of random frequencies w ~ N(0, fourier_scale^2), drawn once and kept in the state.
    `skip_rescale` divides all residual sums by sqrt(2), `fir` filters where blocks change the resolution, and
    the progressive input adds the downsampled image to the features of each coarser level. With patch_size p the
    p x p pixels of a patch (p^ndim in ndim dimensions) are the channels of one: 1 / p^2 of the work, and less detail
    (Luhman & Luhman 2022).

    A class-conditional network knows the classes 0 .. num_classes - 1 and the null class num_classes, which
    stands for "no label"; otherwise its `num_classes` is None.

    Raises UsageError where two arguments do not go together.
    Sources: Ho et al. 2020, Appendix B; Nichol & Dhariwal 2021, Section 3 and Appendix A; Song et al. 2021b,
    Appendix H (NCSN++ and DDPM++); Karras et al. 2022, Appendix F.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int | None,
        *,
        channels: PositiveInt = 32,
        channel_mult: Sequence[PositiveInt] = (1, 2, 2),
        num_res_blocks: PositiveInt = 1,
        attention_resolutions: Sequence[PositiveInt] = (),
        num_heads: PositiveInt | None = None,
        head_channels: PositiveInt | None = 32,
        norm_groups: PositiveInt = 8,
        time_embedding: Literal["additive", "scale_shift"] = "scale_shift",
        embedding_layout: EmbeddingLayout = "cos_sin",
        fourier_scale: PositiveFloat = 16.0,
        resample: Resample = "conv",
        fir: bool = False,
        progressive_input: Literal["none", "residual"] = "none",
        up_attention: Literal["all", "last"] = "all",
        skip_rescale: bool = False,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        class_conditional: bool = False,
        learn_variance: bool = False,
        gradient_checkpointing: bool = False,
        patch_size: PositiveInt = 1,
    ) -> None:
        num_classes = conditioning_classes(num_classes, class_conditional)
        config = UNetConfig(
            shape, channels=channels, channel_mult=channel_mult, num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions, num_heads=num_heads, head_channels=head_channels,
            norm_groups=norm_groups, time_embedding=time_embedding, embedding_layout=embedding_layout,
            fourier_scale=fourier_scale, resample=resample, dropout=dropout,
            gradient_checkpointing=gradient_checkpointing, fir=fir, progressive_input=progressive_input,
            up_attention=up_attention, skip_rescale=skip_rescale, patch_size=patch_size,
        )  # fmt: skip
        super().__init__(config, num_classes)
        self.learn_variance = learn_variance
        self.up = config.up_path(self.skip_widths)
        self.out_norm = nn.GroupNorm(norm_groups, config.widths[0], eps=NORM_EPS)
        out_channels = (2 if learn_variance else 1) * shape[0] * patch_size**config.ndim
        self.out_conv = Conv(config.widths[0], out_channels, ndim=config.ndim)
        zero_init(self.out_conv)

    def forward(self, x: Tensor, c_noise: Tensor, y: Tensor | None = None) -> Tensor:
        """Return F [B, C, *sizes], or [B, 2C, *sizes] with the variance values last, in the dtype of x.

        x: [B, C, *sizes] of any sizes, padded to multiples of what the depth needs; c_noise: [B], the timestep
        number or what else the parameterization names; y: int64 [B], or None for the null class. An
        unconditional network takes no notice of y.
        """
        emb = self.embed(c_noise, y)
        *skips, h = self.encode(x, emb)
        for block in self.up:
            h = self.run(block, h, emb, skips.pop())
        h = self.out_conv(silu(self.out_norm(h)))
        if self.patch_size > 1:
            h = from_patches(h, self.patch_size)
        return crop(h, x.shape[2:]).to(x.dtype)

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
