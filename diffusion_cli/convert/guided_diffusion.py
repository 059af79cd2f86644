"""U-Nets of improved-diffusion and guided-diffusion: a file of weights, and the flags of its published command.

This module imports torch only to read and change tensors. Both programs have the same names of tensors.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from pydantic import Field, PositiveFloat, PositiveInt

from diffusion_cli.convert.base import Network, Node, PretrainedModel, Process, Weights
from diffusion_cli.convert.diffusers_unet import UNET
from diffusion_cli.convert.diffusers_unet_layers import UNetOptions, layers_of
from diffusion_cli.errors import FormatError, UsageError, format_value
from diffusion_cli.system.tensors import read_state_dict

if TYPE_CHECKING:
    from torch import Tensor

KIND = "UNetModel of improved-diffusion or guided-diffusion"
MULTIPLES: dict[int, list[float]] = {
    32: [1, 2, 2, 2],
    64: [1, 2, 3, 4],
    128: [1, 1, 2, 3, 4],
    256: [1, 1, 2, 2, 4, 4],
    512: [0.5, 1, 1, 2, 2, 4, 4],
}
"""Published `channel_mult` by `image_size`."""
GROUPS = 32
"""Groups of each group norm."""
NORM_EPS = 1e-5
"""Constant that each group norm adds to the variance."""
CLASSES = "label_emb.weight"
POOLING = "out.2.positional_embedding"
"""Tensor of the published classifiers only."""
OUTER = {
    "stem": "input_blocks.0.0",
    "time_mlp.0": "time_embed.0",
    "time_mlp.2": "time_embed.2",
    "out_norm": "out.0",
    "out_conv": "out.2",
}
"""Layers outside the blocks, here and there."""
PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "emb": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
    "norm": "norm",
    "qkv": "qkv",
    "proj": "proj_out",
}
"""Layers of residual and attention blocks, here and there."""
RESAMPLING = {"down": "op", "up": "conv"}
"""Convolutions of the layers that only change the resolution."""
KINDS = ("weight", "bias")


class GuidedDiffusion:
    """Published flags of a U-Net of improved-diffusion or guided-diffusion, with the defaults of the latter.

    Args:
        image_size: height and width of the images, in pixels.
        num_channels: feature maps of a level with multiplier 1, and features of the time embedding.
        channel_mult: multiplier of `num_channels` per level; None: as published for this `image_size`.
        num_res_blocks: residual blocks per level of the encoder.
        attention_resolutions: heights of the levels with attention; other heights have no effect.
        num_heads: attention heads, unless `num_head_channels` is set.
        num_head_channels: channels per attention head; None: by `num_heads`.
        use_new_attention_order: whether queries, keys and values are ordered before heads.
        use_scale_shift_norm: whether the time embedding scales and shifts group norms.
        resblock_updown: whether residual blocks change the resolution.
        dropout: dropout probability in residual blocks.
        class_cond: whether the network is class-conditional.
        learn_sigma: whether it predicts the variance.
        sigma_small: whether a fixed variance is the posterior's, not that of the forward process.
        diffusion_steps: number of timesteps T.
        noise_schedule: schedule of the noise.
        predict_xstart: whether it predicts x_0, not eps.
        use_kl: whether it was trained by the variational bound.
        rescale_timesteps: whether it gets timesteps times 1000 / T.
        rescale_learned_sigmas: whether the weight of the bound in the hybrid loss is 0.001, not 1 / T.

    Raises:
        UsageError: a flag has no equivalent.

    Source: Nichol and Dhariwal 2021; Dhariwal and Nichol 2021; their code.
    """

    def __init__(
        self,
        *,
        image_size: Annotated[int, Field(gt=0, le=4096)] = 64,
        num_channels: Annotated[int, Field(gt=0, le=2**14)] = 128,
        channel_mult: Annotated[list[PositiveFloat], Field(min_length=1, max_length=10)] | None = None,
        num_res_blocks: Annotated[int, Field(gt=0, le=64)] = 2,
        attention_resolutions: Sequence[PositiveInt] = (16, 8),
        num_heads: PositiveInt = 4,
        num_head_channels: PositiveInt | None = None,
        use_new_attention_order: bool = False,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = False,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        class_cond: bool = False,
        learn_sigma: bool = False,
        sigma_small: bool = False,
        diffusion_steps: Annotated[int, Field(gt=0, le=10**5)] = 1000,
        noise_schedule: Literal["linear", "cosine"] = "linear",
        predict_xstart: bool = False,
        use_kl: bool = False,
        rescale_timesteps: bool = False,
        rescale_learned_sigmas: bool = False,
    ) -> None:
        multiples = MULTIPLES.get(image_size) if channel_mult is None else channel_mult
        if multiples is None:
            problem = (
                f"is null, but only image_size={', '.join(map(str, MULTIPLES))} have published multiples"
            )
            _refuse("channel_mult", channel_mult, problem, "set it, such as [1,2,3,4]")
        if image_size % 2 ** (len(multiples) - 1):
            problem = f"must be a multiple of {2 ** (len(multiples) - 1)} for {len(multiples)} levels"
            _refuse("image_size", image_size, problem)
        first, *others = widths = [int(multiple * num_channels) for multiple in multiples]
        if first == 0 or first % GROUPS:
            _refuse(
                "num_channels", num_channels, f"must give the first level a multiple of {GROUPS} channels"
            )
        if any(width % first for width in others):
            problem = f"gives {_shown(widths)} channels, which are not multiples of the first"
            _refuse("channel_mult", _shown(multiples), problem)
        self.channel_mult = multiples
        self.image_size = image_size
        self.use_new_attention_order = use_new_attention_order
        self.noise = (noise_schedule, diffusion_steps, rescale_timesteps)
        self.loss = (predict_xstart, use_kl, rescale_learned_sigmas)
        self.fixed_variance = "small" if sigma_small else "large"
        # Published networks ignore resolutions that no level has.
        strides = {image_size // resolution for resolution in attention_resolutions}
        self.options = UNetOptions(
            channels=first,
            channel_mult=[width // first for width in widths],
            embedding_channels=None if first == num_channels else num_channels,
            num_res_blocks=num_res_blocks,
            attention_resolutions=[
                image_size >> level for level in range(len(multiples)) if 2**level in strides
            ],
            num_heads=num_heads if num_head_channels is None else None,
            head_channels=num_head_channels,
            norm_groups=GROUPS,
            norm_eps=NORM_EPS,
            time_embedding="scale_shift" if use_scale_shift_norm else "additive",
            resample="block" if resblock_updown else "conv",
            dropout=dropout,
            class_conditional=class_cond,
            learn_variance=learn_sigma,
        )
        flag, heads = (
            ("num_heads", num_heads)
            if num_head_channels is None
            else ("num_head_channels", num_head_channels)
        )
        if wrong := [width for width in self.options.attention_widths(image_size) if width % heads]:
            _refuse(flag, heads, f"does not divide the {min(wrong)} channels of an attention layer")

    def read(self, path: Path) -> PretrainedModel:
        """Return the model with the weights of a file, a state dict of torch.save or safetensors.

        Raises:
            UsageError: a flag contradicts the weights.
            FormatError: the file has no weights of such a network.
            OSError: the file cannot be read.
        """
        state = read_state_dict(path)
        network = self.network(state)
        return PretrainedModel(
            kind=KIND,
            network=network,
            weights=lambda: self.weights(network, state),
            process=self.process(),
            files={path.name: path},
        )

    def network(self, state: Weights) -> Network:
        """Return the network of the flags, with the number of classes of the weights; errors as `read`."""
        if any(name.startswith("down_blocks.") for name in state):
            remedy = "load it in diffusers, save it there with save_pretrained, and give that folder without preset="
            raise FormatError("has the tensor names of diffusers", remedy)
        if POOLING in state:
            raise FormatError(
                "is a classifier with attention pooling, but task=classifier has average pooling"
            )
        rows, channels = _size(state, "out.2.weight", 0), _size(state, "input_blocks.0.0.weight", 1)
        if rows not in (channels, 2 * channels):
            raise FormatError(
                f"has {channels} input channels and {rows} output channels, as a network that upsamples images"
            )
        self._check(state, rows == 2 * channels)
        return Network(
            node={"_target_": UNET, **self.options.model_dump()},
            shape=(channels, self.image_size, self.image_size),
            num_classes=_size(state, CLASSES, 0) if self.options.class_conditional else None,
            null_class=not self.options.class_conditional,
        )

    def _check(self, state: Weights, learns_sigma: bool) -> None:
        """Raise UsageError for the first flag that contradicts the weights."""
        options, multiples = self.options, self.channel_mult
        features = options.embedding_channels or options.channels
        first, modulated = (f"input_blocks.1.0.{layer}.weight" for layer in ("in_layers.2", "emb_layers.1"))
        scaled = _size(state, modulated, 0) == 2 * _size(state, first, 0)
        op = next((name for name in state if name.endswith(".op.weight")), None)
        facts = [
            ("num_channels", features, _size(state, "time_embed.0.weight", 1), "time_embed.0.weight"),
            ("class_cond", options.class_conditional, CLASSES in state, CLASSES),
            ("learn_sigma", options.learn_variance, learns_sigma, "out.2.weight"),
            ("use_scale_shift_norm", options.time_embedding == "scale_shift", scaled, modulated),
        ]
        if len(multiples) > 1:
            name = op or "input_blocks.*.op.weight"
            facts.append(("resblock_updown", options.resample == "block", op is None, name))
        for flag, given, found, tensor in facts:
            if given != found:
                _contradict(flag, given, found, tensor)
        widths = _encoder_widths(options)
        blocks = len({name.split(".")[1] for name in state if name.startswith("input_blocks.")})
        if len(widths) + 1 != blocks:
            given = f"{options.num_res_blocks}, preset.channel_mult={_shown(multiples)}"
            problem = f"would have {len(widths) + 1} input_blocks, but the weights have {blocks}"
            _refuse("num_res_blocks", given, problem)
        for block, width in enumerate(widths, start=1):
            resampling = f"input_blocks.{block}.0.op.weight"
            tensor = resampling if resampling in state else f"input_blocks.{block}.0.in_layers.2.weight"
            if (found := _size(state, tensor, 0)) != width:
                problem = f"gives {tensor} {width} channels, but it has {found}"
                _refuse("channel_mult", _shown(multiples), problem)
        self._check_attention(state)

    def _check_attention(self, state: Weights) -> None:
        """Raise UsageError unless the levels of the encoder with attention are those of the weights."""
        stride = self.options.num_res_blocks + 1
        sides = [self.image_size >> level for level in range(len(self.channel_mult))]
        tensors = [f"input_blocks.{stride * level + 1}.1.qkv.weight" for level in range(len(sides))]
        found = [side for side, tensor in zip(sides, tensors, strict=True) if tensor in state]
        if (given := list(self.options.attention_resolutions)) != found:
            differing = next(
                tensor
                for side, tensor in zip(sides, tensors, strict=True)
                if (side in given) != (side in found)
            )
            _contradict("attention_resolutions", given, found, differing)

    def weights(self, network: Network, state: Weights) -> Weights:
        """Return the weights by the names of the network; FormatError for other tensors than its own.

        The embedding of the null class, which the networks do not have, is zero.
        """
        import torch

        left = dict(state)

        def take(name: str) -> "Tensor":
            if name not in left:
                raise FormatError(f"{name} is missing")
            return left.pop(name)

        layers = layers_of(self.options, self.image_size)
        found: Weights = {}
        for ours, _ in (*layers.equal, *layers.attentions):
            theirs = published_name(ours)
            found |= {f"{ours}.{kind}": take(f"{theirs}.{kind}") for kind in KINDS}
            if theirs.endswith((".qkv", ".proj_out")):
                found[f"{ours}.weight"] = _matrix(theirs, found[f"{ours}.weight"])
            if theirs.endswith(".qkv"):
                found |= {f"{ours}.{kind}": self._ordered(found[f"{ours}.{kind}"]) for kind in KINDS}
        if layers.classes:
            rows = take(CLASSES)
            found["class_embedding.weight"] = torch.cat([rows, torch.zeros_like(rows[:1])])
        for name in left:
            raise FormatError(f"{name} is not part of the network")
        return found

    def _ordered(self, rows: "Tensor") -> "Tensor":
        """Return rows of queries, keys and values with the heads within each, instead of them within each head."""
        count = rows.shape[0] if rows.dim() else 0
        heads = self.options.num_heads or count // (3 * (self.options.head_channels or 1))
        if self.use_new_attention_order or not count or not heads or count % (3 * heads):
            return rows  # a wrong shape is refused with that of the network
        return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)

    def process(self) -> Process:
        """Return the noise process, the loss of the training, and the published sampler with all timesteps."""
        noise, timesteps, rescales = self.noise
        predicts_image, bound, rescales_sigmas = self.loss
        ends: Node = {"beta_start": 0.0001, "beta_end": 0.02}
        if noise == "cosine":
            ends = {"offset": 0.008, "max_beta": 0.999}
        objectives = "diffusion_cli.diffusion.objectives"
        variance = "learned" if self.options.learn_variance else self.fixed_variance
        if bound:
            loss: Node = {"_target_": f"{objectives}.VLB", "variance": variance}
        elif self.options.learn_variance:
            weight = 0.001 if rescales_sigmas else 1 / timesteps
            loss = {"_target_": f"{objectives}.Hybrid", "vlb_weight": weight}
        else:
            kind = "Target" if predicts_image else "Simple"
            loss = {"_target_": f"{objectives}.{kind}", "huber_delta": None}
        return Process(
            schedule={
                "_target_": f"diffusion_cli.diffusion.schedules.{noise.capitalize()}",
                "num_timesteps": timesteps,
                **ends,
                "zero_terminal_snr": False,
                "rescale_timesteps": rescales,
            },
            parameterization={
                "_target_": f"diffusion_cli.diffusion.parameterizations.{'X0' if predicts_image else 'Eps'}"
            },
            objective=loss | {"label_dropout": 0.0, "single_dropout": 0.0},
            sampler={
                "_target_": "diffusion_cli.samplers.DDPM",
                "variance": variance,
                "spacing": "linspace",
            },
        )


def published_name(layer: str) -> str:
    """Return the published name of a layer of the U-Net of this package."""
    if layer in OUTER:
        return OUTER[layer]
    path, *places = layer.split(".")
    if path == "middle":
        place, part = places
        return f"middle_block.{place}.{PARTS[part]}"
    block, place, *part = places
    folder, number = ("input_blocks", int(block) + 1) if path == "down" else ("output_blocks", int(block))
    return f"{folder}.{number}.{place}.{PARTS[part[0]] if part else RESAMPLING[path]}"


def _encoder_widths(options: UNetOptions) -> list[int]:
    """Return the output channels of all blocks of the encoder, except the first convolution."""
    # Each level but the last has one more block, which halves the resolution.
    return [width for width in options.widths for _ in range(options.num_res_blocks + 1)][:-1]


def _size(state: Weights, name: str, axis: int) -> int:
    """Return a size of a tensor of weights; FormatError if it is missing or has another number of dimensions."""
    if name not in state:
        raise FormatError(f"{name} is missing, so it has no weights of a {KIND}")
    if state[name].dim() < 2:
        raise FormatError(f"{name} has shape {list(state[name].shape)}")
    return state[name].shape[axis]


def _matrix(layer: str, weight: "Tensor") -> "Tensor":
    """Return the matrix of a convolution of size 1 over a sequence."""
    if weight.dim() != 3 or weight.shape[2] != 1:
        raise FormatError(
            f"{layer}.weight has shape {list(weight.shape)}, not that of a convolution of size 1"
        )
    return weight.squeeze(2)


def _contradict(flag: str, given: Any, found: Any, tensor: str) -> NoReturn:
    shown = _shown(found)
    problem = f"the weights have {flag}={shown}, by {tensor}"
    raise UsageError(f"preset.{flag}", _shown(given), problem, f"set preset.{flag}={shown}")


def _shown(value: Any) -> str:
    """Return a value in the syntax of the command line, as one word."""
    return format_value(value).replace(", ", ",")


def _refuse(
    flag: str, value: Any, problem: str, remedy: str = "give the flags of its published command"
) -> NoReturn:
    raise UsageError(f"preset.{flag}", value, problem, remedy)
