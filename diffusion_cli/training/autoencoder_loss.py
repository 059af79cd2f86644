"""The training objective of autoencoders: reconstruction, KL and adversarial losses."""

from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import avg_pool2d, avg_pool3d, relu

from diffusion_cli.metrics import LPIPSDistance
from diffusion_cli.networks import AutoencoderKL, PatchDiscriminator
from diffusion_cli.system.distributed import Distributed

AVERAGE = {4: avg_pool2d, 5: avg_pool3d}
"""Means of neighbouring pixels, by number of dimensions of images [B, C, *sizes]."""
SCALES = 3  # of the gradient loss; each halves the resolution
LARGEST_RATIO = 1e4  # as published, for distances summed over the D numbers of an image
LIFT = 2**8  # scales gradients of means over many pixels, so that they do not underflow in half precision


class Autoencoding(nn.Module):
    """An autoencoder in training, with its discriminator if any."""

    task = AutoencoderKL.task

    def __init__(self, network: AutoencoderKL, discriminator: PatchDiscriminator | None) -> None:
        super().__init__()
        self.network = network
        self.discriminator = discriminator

    def with_network(self, network: nn.Module) -> "Autoencoding":
        """Return a copy with another autoencoder."""
        assert isinstance(network, AutoencoderKL)
        return Autoencoding(network, self.discriminator)


class AutoencoderLosses(NamedTuple):
    """The losses of a batch."""

    total: Tensor
    """The loss to minimise, 0-d."""
    terms: dict[str, Tensor]
    """Its terms, each [B]; `loss` is the loss of the autoencoder without the adversarial term."""


class ReconstructionLoss:
    """The loss `distance + perceptual_weight P + kl_weight KL / D` of images with D numbers, and a GAN loss.

    The distance is the mean absolute or squared error. KL is the divergence of q(z | x) from a standard
    normal, in nats. P is LPIPS or, with `perceptual=gradient`, the L1 distance of image gradients at 3
    scales. Division by D keeps the published meaning of kl_weight, which weighs KL against a sum over pixels,
    for images of any size.

    From optimizer step `discriminator_start` (null: never) the loss includes
    `-discriminator_weight w mean F(images)`. The discriminator F is trained with the hinge loss. w is the
    ratio of the gradient norms of the two losses at the decoder's last layer, at most 10^4 / D, over all
    processes. One backward pass gives both gradients, because the weights of F are constants in this term.

    Raises UsageError for images that LPIPS or the discriminator does not support.
    Source: Rombach et al. 2022, Appendix G; Esser et al. 2021, Eq. 5 to 7, with the learned scale of the
    distance at 1.
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

    def model(self, network: AutoencoderKL, shape: tuple[int, ...]) -> Autoencoding:
        """Return the model to train for images of a shape; UsageError if unsuitable."""
        if self.lpips is not None:
            self.lpips.check_shape(shape)
        discriminator = None if self.start is None else PatchDiscriminator(shape, **self.discriminator)
        return Autoencoding(network, discriminator)

    def __call__(self, model: Autoencoding, x: Tensor, eps: Tensor, step: int) -> AutoencoderLosses:
        """Return the losses of images x [B, C, *sizes] at a step; eps [B, L, *latent sizes] draws latents."""
        images, moments = model.network(x, eps)
        terms = self.terms(images, moments, x)
        total = terms["loss"].mean()
        if model.discriminator is None or self.start is None:
            return AutoencoderLosses(total, terms)
        if step < self.start:
            # DDP expects a gradient for each weight at every step.
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
        """Return the terms [B] for x [B, C, *sizes] of its reconstructions and moments of latents."""
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
    """Return the mean [B] over all dimensions but the first, in float32."""
    return values.float().flatten(1).mean(1)


def divergence(moments: Tensor) -> Tensor:
    """Return `KL(N(mean, variance) || N(0, 1))` in nats, [B], of moments [B, 2L, *sizes]."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


def gradient_distance(images: Tensor, x: Tensor) -> Tensor:
    """Return the mean absolute error [B] of image gradients, over 3 scales of images [B, C, *sizes].

    It penalises blurred edges more than the error of pixels does.
    """
    error, distances = images - x, []
    for _ in range(SCALES):
        if min(error.shape[2:]) < 2:
            break
        distances += [per_image_mean(error.diff(dim=axis).abs()) for axis in range(2, error.ndim)]
        error = AVERAGE[error.ndim](error, 2)
    return torch.stack(distances).mean(0)


def gradient_ratio(loss: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """Return `|d loss / d weight| / (|d other / d weight| + 1e-4)`, 0-d, gradients averaged over processes.

    Source: Esser et al. 2021, Eq. 7.
    """
    norms = []
    for value in (loss, other):
        (gradient,) = torch.autograd.grad(LIFT * value, weight, retain_graph=True)
        norms.append(Distributed().concatenated(gradient.float()[None] / LIFT).mean(0).norm())
    return norms[0] / (norms[1] + 1e-4)
