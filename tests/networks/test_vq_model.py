"""The autoencoder with a codebook."""

import pytest
import torch

from diffusion_cli.diffusion.latents import Latents
from diffusion_cli.errors import UsageError
from diffusion_cli.networks import VQModel
from helpers.networks import randomised

SMALL = {
    "channels": 8,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "latent_channels": 2,
    "feature_channels": 3,
    "codebook_size": 5,
    "norm_groups": 4,
}


def small() -> VQModel:
    return randomised(VQModel((1, 8, 12), None, **SMALL)).eval()


def test_each_latent_becomes_the_nearest_vector_of_the_codebook():
    quantize = small().quantize
    z = torch.randn(3, 2, 4, 6)
    vectors = quantize.embedding.weight
    distances = (z[:, None] - vectors[None, :, :, None, None]).square().sum(2)  # [B, size, h, w]
    expected = vectors[distances.argmin(1)].movedim(3, 1)
    torch.testing.assert_close(quantize(z), expected)
    torch.testing.assert_close(quantize(expected), expected)


def test_gradients_pass_the_codebook_as_the_identity():
    z = torch.randn(1, 2, 4, 6, requires_grad=True)
    weights = torch.randn(1, 2, 4, 6)
    (small().quantize(z) * weights).sum().backward()
    assert z.grad is not None
    assert z.grad.equal(weights)


def test_latents_are_not_random():
    network, x = small(), torch.randn(2, 1, 8, 12)
    latents = Latents(network, (1, 8, 12), [0.5, -1.0], [2.0, 3.0])
    assert latents.shape == (2, 4, 6)
    states = latents.encode(x)
    torch.testing.assert_close(latents.states(latents.moments(x), torch.randn), states, rtol=0, atol=1e-5)
    z = network.moments(x).chunk(2, dim=1)[0]
    torch.testing.assert_close(latents.decode(states), network.decode(z))


def test_images_that_the_latents_do_not_divide_are_refused():
    with pytest.raises(UsageError, match="model=VQModel: image sizes must be multiples of 2"):
        VQModel((1, 8, 9), None, **SMALL)
