"""U-Net of DDPM, improved diffusion, score-based SDEs and related models."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from diffusion_cli.conditions import Condition, Conditions
from diffusion_cli.conditions.condition import IMAGE, POSITION
from diffusion_cli.errors import UsageError, counted
from diffusion_cli.networks.encoder import (
    EmbeddingLayout,
    ProgressiveIn,
    ProgressiveOut,
    Resample,
    UNetConfig,
    UNetEncoder,
)
from diffusion_cli.networks.group_norm import GroupNorm
from diffusion_cli.networks.layers import (
    NORM_EPS,
    Conv,
    FirPadding,
    OutputSkip,
    crop,
    double,
    from_patches,
    used_conditions,
    zero_init,
)
from diffusion_cli.networks.tiles import coordinates, position, windows


class UNet(UNetEncoder):
    """U-Net F(x, c_noise, y) of residual blocks with self-attention, for signals, images and volumes.

    Level l works at 1 / (patch_size 2^l) of each size. The last layer of each branch and of the network is initially
    zero, so that F = 0 before training.

    A class-conditional network has classes 0..num_classes - 1 and the null class num_classes; otherwise its
    attribute `num_classes` is None.

    With a window, the network sees a window at a time, with the coordinates of its pixels as further channels: its
    output for an image is the weighted mean of those for overlapping windows (Bar-Tal et al. 2023, Eq. 5), so that
    memory does not grow with the image. Training is on single windows (Wang et al. 2023, "Patch diffusion").

    Args:
        shape: data shape: signals [C, L], images [C, H, W] or volumes [C, D, H, W].
        conditions: classes and other conditions that the data offer, or a number of classes, or None.
        channels: feature maps of the first level.
        channel_mult: multiplier of `channels` per level.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
        attention_resolutions: levels with attention after the residual blocks, by their first size (height).
        cross_attention_resolutions: levels with attention to the tokens of a text, likewise; None: those of
            `attention_resolutions`. Networks with text have it in the middle block, too.
        num_heads: attention heads; None: by `head_channels`.
        head_channels: channels per attention head; None: by `num_heads`.
        norm_groups: groups of the group norms, a divisor of `channels`.
        time_embedding: `additive`, or `scale_shift` modulation of group norms.
        embedding_layout: time embedding: sinusoidal with `channels` features, see `timestep_embedding`, or `fourier`
            with 2 * channels random Fourier features.
        embedding_channels: features of the time embedding, in place of `channels`; its width is four times as many.
        fourier_scale: standard deviation of the random frequencies.
        resample: resampling by convolutions (`conv`, `conv_same`) or in residual blocks (`block`, `block_proj`).
        fir: whether resampling in blocks uses an anti-aliasing filter.
        fir_padding: pixels beyond the border for this filter: those of the `edge` again, or `zeros`.
        progressive_input: adds the downsampled input to each coarser level: `residual` with the features of the
            level above, `input_skip` without them.
        progressive_output: `output_skip` sums an output of each level, upsampled to the resolution of the input.
        up_attention: whether `all` residual blocks of a level of the decoder have attention, or only the `last`.
        middle_attention: whether the middle block has attention.
        norm_eps: constant that group norms add to the variance.
        skip_rescale: whether to divide residual sums by sqrt(2).
        scale_by_sigma: whether to divide the output by sigma = exp(c_noise), so that it is a score.
        centered: whether sigma refers to data in [-1, 1]; false: in [0, 1], and the time embedding gets sigma / 2.
        dropout: dropout probability in residual blocks.
        class_conditional: whether to condition on classes and attributes.
        learn_variance: whether to also predict the variance of a step.
        gradient_checkpointing: whether to recompute activations in the backward pass to save memory.
        patch_size: pixels per side of a patch that becomes channels (Luhman and Luhman 2022).
        window: sizes of a window, one per axis; an axis that is shorter is seen whole; None: the whole image.
        window_overlap: least overlap of neighbouring windows in pixels, less than each size of a window.

    Raises:
        UsageError: arguments contradict each other.

    Source: Ho et al. 2020, Appendix B; Nichol and Dhariwal 2021, Section 3 and Appendix A; Song et al. 2021b,
    Appendix H and code (NCSN++ and DDPM++); Karras et al. 2022, Appendix F.
    """

    outer_layers = ("stem", "out_conv")
    """Names of the input and output layers, which `optimizer=muon` leaves to AdamW."""

    takes_conditions = takes_augmentation = True

    def __init__(
        self,
        shape: tuple[int, ...],
        conditions: Conditions | int | None,
        *,
        channels: PositiveInt = 32,
        channel_mult: Sequence[PositiveInt] = (1, 2, 2),
        num_res_blocks: PositiveInt = 1,
        attention_resolutions: Sequence[PositiveInt] = (),
        cross_attention_resolutions: Sequence[PositiveInt] | None = None,
        num_heads: PositiveInt | None = None,
        head_channels: PositiveInt | None = 32,
        norm_groups: PositiveInt = 8,
        time_embedding: Literal["additive", "scale_shift"] = "scale_shift",
        embedding_layout: EmbeddingLayout = "cos_sin",
        embedding_channels: PositiveInt | None = None,
        fourier_scale: PositiveFloat = 16.0,
        resample: Resample = "conv",
        fir: bool = False,
        fir_padding: FirPadding = "edge",
        progressive_input: ProgressiveIn = "none",
        progressive_output: ProgressiveOut = "none",
        up_attention: Literal["all", "last"] = "all",
        middle_attention: bool = True,
        norm_eps: PositiveFloat = NORM_EPS,
        skip_rescale: bool = False,
        scale_by_sigma: bool = False,
        centered: bool = True,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        class_conditional: bool = False,
        learn_variance: bool = False,
        gradient_checkpointing: bool = False,
        patch_size: PositiveInt = 1,
        window: Sequence[PositiveInt] | None = None,
        window_overlap: NonNegativeInt = 8,
    ) -> None:
        used = used_conditions(conditions, class_conditional)
        if window is not None:
            _check_window(shape, window, window_overlap)
        seen = shape if window is None else (shape[0], *map(min, zip(shape[1:], window, strict=True)))
        config = UNetConfig(
            seen, channels=channels, channel_mult=channel_mult, num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions, num_heads=num_heads, head_channels=head_channels,
            norm_groups=norm_groups, time_embedding=time_embedding, embedding_layout=embedding_layout,
            embedding_channels=embedding_channels, fourier_scale=fourier_scale, resample=resample, dropout=dropout,
            gradient_checkpointing=gradient_checkpointing, fir=fir, fir_padding=fir_padding,
            progressive_input=progressive_input, progressive_output=progressive_output, up_attention=up_attention,
            middle_attention=middle_attention, norm_eps=norm_eps, skip_rescale=skip_rescale,
            scale_by_sigma=scale_by_sigma, centered=centered, patch_size=patch_size,
            cross_attention_resolutions=cross_attention_resolutions, text_width=used.text and used.text.width,
        )  # fmt: skip
        if scale_by_sigma and learn_variance:
            raise UsageError(
                "scale_by_sigma", True, "would divide the learned variance too", "use learn_variance=false"
            )
        super().__init__(config, used, coordinates=window is not None)
        self.window = None if window is None else tuple(window)
        self.window_overlap = window_overlap
        self.learn_variance = learn_variance
        self.scale_by_sigma = scale_by_sigma
        out_channels = (2 if learn_variance else 1) * shape[0] * patch_size**config.ndim
        self.up = config.up_path(self.skip_widths, out_channels)
        self.out_norm = GroupNorm(norm_groups, config.widths[0], eps=norm_eps)
        self.out_conv = Conv(config.widths[0], out_channels, ndim=config.ndim)
        zero_init(self.out_conv)

    @property
    def output_layers(self) -> tuple[str, ...]:
        """Names of the layers with a row for each output: the last one, and those of progressive output."""
        skips = (f"up.{i}.conv" for i, block in enumerate(self.up) if isinstance(block, OutputSkip))
        return (*skips, "out_conv")

    def forward(self, x: Tensor, c_noise: Tensor, y: Condition | Tensor | None = None) -> Tensor:
        """Return F [B, C, *sizes], or [B, 2C, *sizes] with the variance output last, in the dtype of x.

        Args:
            x: input [B, C, *sizes] of any sizes, padded to multiples that the levels need.
            c_noise: noise levels [B], as defined by the parameterization.
            y: condition, or labels, int64 [B]; None: all values are missing. Ignored by unconditional networks. With a
                position, x are single windows.
        """
        if self.window is None:
            return self._whole(x, c_noise, y)
        condition, sizes = Condition.of(y), tuple(x.shape[2:])
        where = condition.get(POSITION)
        if where is not None:
            return self._whole(torch.cat([x, coordinates(where.to(x), sizes)], 1), c_noise, condition)
        image = condition.get(IMAGE)

        def of_window(place: tuple[slice, ...]) -> Tensor:
            corner, tile = [part.start for part in place], [part.stop - part.start for part in place]
            own = (
                position(sizes, corner, tile).to(x).expand(x.shape[0], -1)
            )  # len() would fix the batch of exported programs
            seen = condition if image is None else condition.replaced({IMAGE: image[(..., *place)]})
            return self._whole(torch.cat([x[(..., *place)], coordinates(own, tile)], 1), c_noise, seen)

        return windows(sizes, self.window, self.window_overlap).mean(of_window)

    def _whole(self, x: Tensor, c_noise: Tensor, y: Condition | Tensor | None) -> Tensor:
        """Return F for images that the network sees at once."""
        emb, text = self.embed(c_noise, y)
        *skips, h = self.encode(x, emb, Condition.of(y).get(IMAGE), text)
        coarser = None
        for block in self.up:
            if isinstance(block, OutputSkip):
                coarser = self._add_doubled(self.run(block, h), coarser)
                h = self.run(block.up, h, emb)
            else:
                h = self.run(block, h, emb, skips.pop(), text)
        h = self._add_doubled(self.out_conv(self.out_norm(h, activation=True)), coarser)
        if self.patch_size > 1:
            h = from_patches(h, self.patch_size)
        # Contiguous, although features may be in channels-last format.
        h = crop(h, x.shape[2:]).to(x.dtype, memory_format=torch.contiguous_format)
        return h / c_noise.exp().to(h.dtype).view(-1, *[1] * (h.dim() - 1)) if self.scale_by_sigma else h

    def _add_doubled(self, image: Tensor, coarser: Tensor | None) -> Tensor:
        return image if coarser is None else image + double(coarser, fir=self.fir, padding=self.fir_padding)


def _check_window(shape: tuple[int, ...], window: Sequence[int], overlap: int) -> None:
    """Raise UsageError for a window with other axes than the data, or not above its overlap."""
    if len(window) != len(shape) - 1:
        problem = f"must be {counted(len(shape) - 1, 'size')}, one for each axis of the data"
        raise UsageError("window", list(window), problem, f"use for example {[32] * (len(shape) - 1)}")
    if overlap >= min(window):
        raise UsageError(
            "window_overlap",
            overlap,
            f"must be less than each size of window={[*window]}",
            "use a smaller one",
        )
