"""The training objective of autoencoders: what their images lack, and a discriminator that learns to tell them."""

from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import avg_pool2d, relu

from diffusion_cli.errors import UsageError
from diffusion_cli.metrics import LPIPSDistance
from diffusion_cli.networks import AutoencoderKL, PatchDiscriminator
from diffusion_cli.system.distributed import Distributed

SCALES = 3  # of gradients, each half as fine as the one before
LARGEST_RATIO = 1e4  # as published, where distances are summed over the D numbers of an image
LIFT = 2**8  # of gradients of means over many pixels, so that half precision can tell them from zero


class Autoencoding(nn.Module):
    """An autoencoder in training, with the discriminator that its images are shown to, if any."""

    task = AutoencoderKL.task

    def __init__(self, network: AutoencoderKL, discriminator: PatchDiscriminator | None) -> None:
        super().__init__()
        self.network = network
        self.discriminator = discriminator

    def with_network(self, network: nn.Module) -> "Autoencoding":
        """The same with another autoencoder."""
        assert isinstance(network, AutoencoderKL)
        return Autoencoding(network, self.discriminator)


class AutoencoderLosses(NamedTuple):
    """What a batch is trained by."""

    total: Tensor
    """The number to descend, 0-d."""
    terms: dict[str, Tensor]
    """What it is made of, each [B]; `loss` is that of the autoencoder alone, which validation images have too."""


class ReconstructionLoss:
    """`distance + perceptual_weight P + kl_weight KL / D`, means over the D numbers of an image, and a discriminator.

    The distance is L1 or the squared error; KL is that of q(z | x) from a standard normal, in nats, so that kl_weight
    weighs it against the sum over pixels, as published, while the loss does not grow with the size of images.
    P is LPIPS, or with `perceptual=gradient` the L1 distance of neighbouring pixels' differences, at 3 scales.

    From optimizer step `discriminator_start` on (null: never) `-d w mean D(images)` is added, and the discriminator D
    learns by the hinge loss. w is the published ratio of the gradients' norms of both at the decoder's last layer, at
    most 10^4 over the numbers of an image, over all processes, of one part of an accumulated batch. The discriminator
    that the images are shown to is a constant: in one backward pass each of the two gets the gradient of its own loss.

    Raises UsageError for another network, and for images that LPIPS or the discriminator cannot take.
    Source: Rombach et al. 2022, Appendix G; Esser et al. 2021, Eq. 5 to 7; their learned scale of the distance is 1.
    """

    def __init__(
        self,
        *,
        distance: Literal["l1", "mse"] = "l1",
        kl_weight: NonNegativeFloat = 1e-06,
        perceptual: Literal["none", "gradient", "lpips"] = "none",
        perceptual_weight: PositiveFloat = 1.0,
        lpips_weights: str | None = None,
        discriminator_start: NonNegativeInt | None = None,
        discriminator_weight: PositiveFloat = 0.5,
        discriminator_channels: PositiveInt = 64,
        discriminator_layers: Annotated[int, Field(ge=1, le=8)] = 3,
    ) -> None:
        self.distance, self.kl_weight = distance, kl_weight
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight
        self.lpips = None
        if perceptual == "lpips":
            self.lpips = LPIPSDistance("vgg", lpips_weights, torch.device("cpu"), "objective.lpips_weights")
        self.start, self.weight = discriminator_start, discriminator_weight
        self.discriminator = {"channels": discriminator_channels, "layers": discriminator_layers}

    def model(self, network: nn.Module, shape: tuple[int, ...]) -> Autoencoding:
        """What is trained for a network of images of a shape; UsageError if it cannot be."""
        if not isinstance(network, AutoencoderKL):
            raise UsageError(
                "model",
                type(network).__name__,
                "is not an autoencoder",
                "use model=kl_tiny, kl_f4 or kl_f8, or another task",
            )
        if self.lpips is not None:
            self.lpips.check_shape(shape)
        discriminator = None if self.start is None else PatchDiscriminator(shape, **self.discriminator)
        return Autoencoding(network, discriminator)

    def __call__(self, model: Autoencoding, x: Tensor, eps: Tensor, step: int) -> AutoencoderLosses:
        """The losses of images x [B, C, H, W], their latents drawn with eps [B, L, h, w], at an optimizer step."""
        images, moments = model.network(x, eps)
        terms = self.terms(images, moments, x)
        total = terms["loss"].mean()
        if model.discriminator is None or self.start is None:
            return AutoencoderLosses(total, terms)
        if step < self.start:
            # Each weight has a gradient at every step, as processes that train together expect.
            return AutoencoderLosses(
                total + 0 * sum(weight.sum() for weight in model.discriminator.parameters()), terms
            )
        frozen = {name: weight.detach() for name, weight in model.discriminator.named_parameters()}
        generator = -per_image_mean(functional_call(model.discriminator, frozen, images))
        most = LARGEST_RATIO / x[0].numel()
        ratio = gradient_ratio(total, generator.mean(), model.network.decoder.conv_out.weight).clamp(max=most)
        real, fake = model.discriminator(x), model.discriminator(images.detach())
        hinge = 0.5 * (per_image_mean(relu(1 - real.float())) + per_image_mean(relu(1 + fake.float())))
        terms |= {"generator": generator, "discriminator": hinge, "generator_weight": ratio.expand(len(x))}
        return AutoencoderLosses(total + self.weight * ratio * generator.mean() + hinge.mean(), terms)

    def terms(self, images: Tensor, moments: Tensor, x: Tensor) -> dict[str, Tensor]:
        """The terms [B] of images [B, C, H, W] decoded from moments [B, 2L, h, w], for x; their sum is `loss`."""
        error = images - x
        distance = per_image_mean(error.abs() if self.distance == "l1" else error.square())
        kl = divergence(moments) / x[0].numel()
        terms = {"distance": distance, "kl": kl}
        loss = distance + self.kl_weight * kl
        if self.perceptual != "none":
            terms["perceptual"] = (
                gradient_distance(images, x) if self.lpips is None else self.lpips.between(images, x)
            )
            loss = loss + self.perceptual_weight * terms["perceptual"]
        return {"loss": loss, **terms}


def per_image_mean(values: Tensor) -> Tensor:
    """The mean [B] over all but the first dimension, in float32."""
    return values.float().flatten(1).mean(1)


def divergence(moments: Tensor) -> Tensor:
    """`KL(N(mean, variance) || N(0, 1))` in nats, [B], of moments [B, 2L, h, w]."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


def gradient_distance(images: Tensor, x: Tensor) -> Tensor:
    """The mean absolute error [B] of the differences of neighbouring pixels, over 3 scales of images [B, C, H, W].

    A blurred edge costs what its differences lack, wherever the pixels' own error is small.
    """
    error, distances = images - x, []
    for _ in range(SCALES):
        if min(error.shape[2:]) < 2:
            break
        distances += [per_image_mean(error.diff(dim=axis).abs()) for axis in (2, 3)]
        error = avg_pool2d(error, 2)
    return torch.stack(distances).mean(0)


def gradient_ratio(loss: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """`|d loss / d weight| / (|d other / d weight| + 1e-4)`, 0-d, of means over the images of all processes.

    Source: Esser et al. 2021, Eq. 7.
    """
    norms = []
    for value in (loss, other):
        (gradient,) = torch.autograd.grad(LIFT * value, weight, retain_graph=True)
        norms.append(Distributed().concatenated(gradient.float()[None] / LIFT).mean(0).norm())
    return norms[0] / (norms[1] + 1e-4)
