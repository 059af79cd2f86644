"""Layers against independent formulas."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import (
    avg_pool2d,
    group_norm,
    linear,
    pad,
    pixel_unshuffle,
    scaled_dot_product_attention,
    silu,
)

from diffusion_cli.networks import UNet
from diffusion_cli.networks.dropout import Dropout
from diffusion_cli.networks.layers import (
    CONV,
    Attention,
    Conv,
    Pointwise,
    ResBlock,
    attend,
    double,
    fourier_embedding,
    from_patches,
    halve,
    timestep_embedding,
    to_patches,
)
from helpers.networks import NCSNPP, SMALL, close, inputs, randomised, small


@pytest.mark.parametrize(
    ("layout", "published"), [("cos_sin_inclusive", "sin_cos"), ("sin_cos_exclusive", "cos_sin")]
)
def test_timestep_embedding_has_the_published_frequencies_in_both_orders(layout, published):
    c_noise = torch.tensor([0.0, 3.0, 999.0])
    other, features = timestep_embedding(c_noise, 8, layout), timestep_embedding(c_noise, 8, published)
    assert torch.equal(other, torch.cat([features[:, 4:], features[:, :4]], dim=1))


@pytest.mark.parametrize(("layout", "source"), [("cos_sin", "guided"), ("sin_cos", "scoresde")])
@pytest.mark.parametrize("dim", [32, 33, 128])
def test_timestep_embedding_equals_published(reference, layout, source, dim):
    arrays = reference("timestep_embedding")
    expected = arrays[f"{source}_d{dim}_f64"]
    close(timestep_embedding(arrays["t"], dim, layout), expected, 1e-12)
    close(timestep_embedding(arrays["t"].float(), dim, layout), expected, 1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        close(timestep_embedding(arrays["t"], dim, layout), expected, 1e-12)


def test_inner_products_of_fourier_features_are_the_gaussian_kernel():
    a, b = torch.tensor([0.3], dtype=torch.float64), torch.linspace(-1, 2, 31, dtype=torch.float64)
    scale, n = 0.4, 200_000
    frequencies = scale * torch.randn(n, generator=torch.Generator().manual_seed(0))
    products = fourier_embedding(a, frequencies) @ fourier_embedding(b, frequencies).T / n
    close(products, torch.exp(-2 * (math.pi * scale * (a - b)) ** 2)[None], 0.01)


def test_fourier_features_stand_in_the_published_order():
    c_noise, w = torch.tensor([0.25, -2.0], dtype=torch.float64), torch.tensor([1.0, 0.5, 3.0])
    close(
        fourier_embedding(c_noise[:1], w), torch.tensor([[1.0, 0.5**0.5, -1, 0, 0.5**0.5, 0]]).double(), 1e-7
    )
    expected = torch.polar(torch.ones(2, 3).double(), 2 * math.pi * c_noise[:, None] * w)
    close(fourier_embedding(c_noise, w), torch.cat([expected.imag, expected.real], 1))


def test_fourier_frequencies_are_state_and_not_trained():
    arguments: dict = SMALL | NCSNPP | {"channels": 64}
    one, other = (UNet((2, 8, 8), None, **arguments) for _ in range(2))
    assert "frequencies" in one.state_dict()
    assert "frequencies" not in dict(one.named_parameters())
    assert not torch.equal(one.frequencies, other.frequencies)
    assert 0.006 < one.frequencies.std() < 0.014
    before = one.frequencies.clone()
    optimizer = torch.optim.AdamW(one.parameters(), 0.1, weight_decay=0.1)
    x, c_noise = (tensor.float() for tensor in inputs())
    one(x, c_noise).square().sum().backward()
    optimizer.step()
    assert torch.equal(one.frequencies, before)
    randomised(one)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.eval()(x, c_noise), other.eval()(x, c_noise))


def test_no_frequencies_without_fourier():
    changes = {key: value for key, value in NCSNPP.items() if key != "embedding_layout"}
    assert not list(small(**changes).buffers())


@pytest.mark.parametrize("changes", [{}, NCSNPP])
def test_time_reaches_the_blocks_unrounded_under_autocast(changes):
    network, (x, c_noise) = small(**changes).float(), inputs()
    seen = []
    network.time_mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    network(x.float(), c_noise)
    with torch.autocast("cpu", torch.bfloat16):
        network(x.float(), c_noise)
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(("ndim", "layer"), [(1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)])
def test_convolutions_start_with_the_draws_of_torchs(ndim, layer):
    torch.manual_seed(0)
    ours = Conv(6, 4, ndim=ndim)
    torch.manual_seed(0)
    theirs = layer(6, 4, 3, padding=1)
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    x = torch.randn(2, 6, *[5] * ndim)
    assert torch.equal(ours(x), theirs(x))


def test_attention_equals_its_formula():
    layer = randomised(Attention(8, num_heads=2, norm_groups=4)).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    pixels = group_norm(x, 4, layer.norm.weight, layer.norm.bias, 1e-6).flatten(2).mT
    q, k, v = layer.qkv(pixels).chunk(3, dim=-1)
    heads = [
        torch.softmax(q[..., d] @ k[..., d].mT / 4**0.5, dim=-1) @ v[..., d] for d in (slice(4), slice(4, 8))
    ]
    expected = x + layer.proj(torch.cat(heads, dim=-1)).mT.reshape(x.shape)
    close(layer(x), expected)


def test_attention_in_bfloat16_is_about_as_near_to_the_exact_one_as_torchs():
    q, k, v = (torch.randn(3, 2, 64, 8, dtype=torch.float64) for _ in range(3))
    exact = torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v
    of_torch, ours = (
        (f(q.bfloat16(), k.bfloat16(), v.bfloat16()).double() - exact).norm() / exact.norm()
        for f in (scaled_dot_product_attention, attend)
    )
    assert ours < 2 * of_torch < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_dropout_keeps_the_mean_and_drops_its_share(share, dtype):
    x = torch.ones(10, 101, 101, dtype=dtype, requires_grad=True)  # no multiple of 4 numbers
    y = Dropout(share)(x)
    dropped = (y == 0).double().mean().item()
    assert dropped == pytest.approx(share, abs=5 * (share * (1 - share) / y.numel()) ** 0.5)
    close(y[y != 0].detach().double(), torch.full_like(y[y != 0], 1 / (1 - share)).double(), 1e-2)
    y.sum().backward()
    close(x.grad, y)  # pyright: ignore[reportArgumentType]
    assert not torch.equal(Dropout(share)(x), y)
    assert torch.equal(Dropout(share).eval()(x), x)


def test_dropout_draws_by_the_seed():
    x = torch.ones(4, 8, 8)
    torch.manual_seed(3)
    first = Dropout(0.3)(x)
    torch.manual_seed(3)
    assert torch.equal(Dropout(0.3)(x), first)


@pytest.mark.parametrize("share", [1e-7, 1 - 1e-7])
def test_dropout_of_nearly_nothing_and_nearly_all_is_finite(share):
    assert Dropout(share)(torch.ones(64, 64)).isfinite().all()


@pytest.mark.parametrize("size", [(7,), (300,), (5, 7), (16, 17), (2, 3, 4), (4, 8, 9)])
def test_pointwise_is_a_convolution(size):
    ndim = len(size)
    layer = Pointwise(6, 4, ndim=ndim).double()
    x = torch.randn(3, 6, *size, dtype=torch.float64, requires_grad=True)
    weights = [x, layer.weight, layer.bias]
    ours, plain = layer(x), CONV[ndim](x, layer.weight, layer.bias)
    close(ours, plain)
    g = torch.randn_like(plain)
    for one, other in zip(
        torch.autograd.grad(ours, weights, g), torch.autograd.grad(plain, weights, g), strict=True
    ):
        close(one, other)


@pytest.mark.parametrize(("size", "sizes"), [(3, (6,)), (2, (4, 6)), (3, (3, 6)), (2, (2, 4, 6))])
def test_patches_are_taken_apart_and_put_together(size, sizes):
    x = torch.randn(2, 3, *sizes)
    patches = to_patches(x, size)
    if len(sizes) == 2:
        assert torch.equal(patches, pixel_unshuffle(x, size))
    places = [()]
    for _ in sizes:
        places = [(*place, offset) for place in places for offset in range(size)]
    for place, pixel in zip(places, patches.unflatten(1, (3, -1)).unbind(2), strict=True):
        assert torch.equal(pixel, x[(..., *(slice(offset, None, size) for offset in place))])
    assert torch.equal(from_patches(patches, size), x)


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_patches_are_channels_of_one_pixel(size):
    changes: dict = {"attention_resolutions": [], "class_conditional": True, "learn_variance": True}
    patched = small(8, 10, patch_size=2, **changes)
    plain = UNet((8, 4, 4), 10, **(SMALL | changes)).double().eval()
    plain.load_state_dict(patched.state_dict())
    (x, c_noise), y = inputs(2, *size), torch.tensor([1, 4])
    height, width = (-(-side // 4) * 4 for side in size)
    extended = pad(x, (0, width - size[1], 0, height - size[0]), mode="replicate")
    places = [(i, j) for i in (0, 1) for j in (0, 1)]
    patches = torch.stack([extended[:, :, i::2, j::2] for i, j in places], 2).flatten(1, 2)
    out = plain(patches, c_noise, y).unflatten(1, (4, 4))
    expected = torch.zeros(2, 4, height, width, dtype=torch.float64)
    for k, (i, j) in enumerate(places):
        expected[:, :, i::2, j::2] = out[:, :, k]
    close(patched(x, c_noise, y), expected[..., : size[0], : size[1]])


@pytest.mark.parametrize("scale_shift", [False, True])
def test_residual_block_equals_its_formula(scale_shift):
    block = randomised(ResBlock(8, 4, emb_channels=5, norm_groups=4, dropout=0.5, scale_shift=scale_shift))
    block = block.double().eval()
    x, emb = torch.randn(2, 8, 4, 4, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    h = block.conv1(silu(group_norm(x, 4, block.norm1.weight, block.norm1.bias, 1e-6)))
    told = linear(emb, block.emb.weight, block.emb.bias)[:, :, None, None]
    norm2 = lambda h: group_norm(h, 4, block.norm2.weight, block.norm2.bias, 1e-6)  # noqa: E731
    h = norm2(h) * (1 + told[:, :4]) + told[:, 4:] if scale_shift else norm2(h + told)
    close(block(x, emb), block.skip(x) + block.conv2(silu(h)))


@pytest.mark.parametrize("direction", ["down", "up"])
def test_resampling_block_starts_as_plain_resampling(direction):
    block = ResBlock(4, 4, emb_channels=5, norm_groups=2, dropout=0.0, scale_shift=True, resample=direction)
    x = torch.randn(1, 4, 6, 6)
    plain = avg_pool2d(x, 2) if direction == "down" else x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(block(x, torch.randn(1, 5)), plain)


@pytest.mark.parametrize("fir", [False, True])
@pytest.mark.parametrize("direction", ["down", "up"])
def test_projected_resampling_block_starts_as_resampling_then_a_linear_map(direction, fir):
    block = ResBlock(
        4, 4, emb_channels=5, norm_groups=2, dropout=0.0, scale_shift=True, resample=direction, fir=fir,
        project=True,
    )  # fmt: skip
    x = torch.randn(1, 4, 6, 6)
    resampled = halve(x, fir=fir) if direction == "down" else double(x, fir=fir)
    assert isinstance(block.skip, Pointwise)
    mixed = torch.einsum("oi,bihw->bohw", block.skip.weight[..., 0, 0], resampled)
    assert block.skip.bias is not None
    close(block(x, torch.randn(1, 5)), mixed + block.skip.bias[:, None, None], 1e-5)
