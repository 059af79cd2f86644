"""Resampling, its filters, and the skip connections and pyramids of NCSN++."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, interpolate, pad

from diffusion_cli.networks.layers import (
    CONV,
    Attention,
    Downsample,
    InputSkip,
    OutputSkip,
    ProgressiveInput,
    ResBlock,
    Upsample,
    double,
    halve,
    residual_sum,
    zero_init,
)
from helpers.networks import NCSNPP, SKIPS, close, inputs, randomised, small


@pytest.mark.parametrize("sizes", [(5,), (3, 5), (2, 3, 4)])
def test_upsample_is_nearest_neighbour_then_convolution(sizes):
    ndim = len(sizes)
    layer = randomised(Upsample(6, ndim=ndim)).double()
    assert set(layer.state_dict()) == {"weight", "bias"}
    x = torch.randn(2, 6, *sizes, dtype=torch.float64, requires_grad=True)
    expected = CONV[ndim](interpolate(x, scale_factor=2.0), layer.weight, layer.bias, padding=1)
    close(layer(x), expected)
    pull = torch.randn_like(expected)
    wrt = [x, *layer.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad(layer(x), wrt, pull), torch.autograd.grad(expected, wrt, pull), strict=True
    ):
        close(mine, theirs)


@pytest.mark.parametrize(("same", "first"), [(True, 1), (False, 0)])
@pytest.mark.parametrize("sizes", [(8,), (6, 8), (2, 4, 6)])
def test_downsample_centres_on_the_published_pixels(same, first, sizes):
    layer = Downsample(1, same=same, ndim=len(sizes))
    zero_init(layer)
    nn.init.dirac_(layer.weight)
    x = torch.randn(1, 1, *sizes)
    assert torch.equal(layer(x), x[(..., *[slice(first, None, 2)] * len(sizes))])


SIZES = [
    (6,),
    (8, 8),
    (2, 6),
    (34, 40),
    (2, 4, 6),
    (8, 6, 10),
]  # (34, 40), (8, 6, 10): too large for one product
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fir", [False, True])
def test_resampling_keeps_constants_and_is_adjoint(fir, size):
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 3, *(side // 2 for side in size), dtype=torch.float64)
    close(halve(torch.ones_like(x), fir=fir), torch.ones_like(y))
    close(double(torch.ones_like(y), fir=fir), torch.ones_like(x))
    ratio = 2 ** len(size)
    close((halve(x, fir=fir) * y).sum() * ratio, (x * double(y, fir=fir)).sum())
    (gradient,) = torch.autograd.grad(halve(x, fir=fir), x, y)
    close(ratio * gradient, double(y, fir=fir))


@pytest.mark.parametrize("size", SIZES)
def test_filtered_resampling_equals_convolution_and_linear_interpolation(size):
    x = torch.randn(2, 1, *size, dtype=torch.float64)
    taps = torch.tensor([1.0, 3, 3, 1], dtype=torch.float64) / 8
    ndim = len(size)
    kernel = taps
    for _ in range(ndim - 1):
        kernel = kernel[..., None] * taps
    extended = pad(x, (1, 1) * ndim, mode="replicate")
    close(halve(x, fir=True), CONV[ndim](extended, kernel[None, None], stride=2))
    close(double(x, fir=True), interpolate(x, scale_factor=2.0, mode=LINEAR[ndim]))


@pytest.mark.parametrize("size", SIZES)
def test_the_filter_of_the_published_code_sees_zeros_beyond_the_border(size):
    x = torch.randn(2, 1, *size, dtype=torch.float64, requires_grad=True)
    ndim, taps = len(size), torch.tensor([1.0, 3, 3, 1], dtype=torch.float64) / 8
    kernel = taps
    for _ in range(ndim - 1):
        kernel = kernel[..., None] * taps
    half = halve(x, fir=True, padding="zeros")
    close(half, CONV[ndim](x, kernel[None, None], stride=2, padding=1))
    y = torch.randn_like(half)
    (gradient,) = torch.autograd.grad(half, x, y)
    close(double(y, fir=True, padding="zeros"), 2**ndim * gradient)


@pytest.mark.parametrize("axis", [2, 3])
def test_filter_does_not_alias(axis):
    pixels = torch.arange(32, dtype=torch.float64)
    for frequency, limit in [(1.0, 1e-12), (0.9, 0.004), (0.8, 0.03)]:  # in units of Nyquist's
        wave = torch.cos(math.pi * frequency * pixels).view(1, 1, *([32, 1] if axis == 2 else [1, 32]))
        wave = wave.expand(1, 1, 32, 32)
        inside = halve(wave, fir=True).narrow(axis, 1, 14)
        assert inside.abs().max() < limit
        # A mean lets the cube root of it through.
        close(inside.abs().max() ** (1 / 3), halve(wave, fir=False).narrow(axis, 1, 14).abs().max(), 0.02)
    board = torch.cos(math.pi * (pixels[:, None] + pixels)).view(1, 1, 32, 32)
    assert halve(board, fir=True)[..., 1:-1, 1:-1].abs().max() < 1e-12
    assert double(board[..., ::2, :], fir=True).abs().max() < 2  # and no ringing


def test_filter_moves_nothing():
    ramp = torch.arange(16, dtype=torch.float64).expand(1, 1, 16, 16)
    close(halve(ramp, fir=True)[..., 1:-1], halve(ramp, fir=False)[..., 1:-1])
    again = double(halve(ramp, fir=True), fir=True)
    close(again[..., 3:-3], ramp[..., 3:-3])


def test_residual_sums_keep_the_variance():
    generator = torch.Generator().manual_seed(0)
    x, branch = torch.randn(2, 100_000, generator=generator).unbind()
    assert 0.98 < residual_sum(x, branch, rescale=True).var() < 1.02
    assert 1.96 < residual_sum(x, branch, rescale=False).var() < 2.04


@pytest.mark.parametrize(("rescale", "low", "high"), [(True, 0.7, 1.4), (False, 10, 30)])
def test_a_deep_stack_keeps_its_variance_with_skip_rescale(rescale, low, high):
    torch.manual_seed(0)
    h, emb = torch.randn(4, 32, 8, 8), torch.zeros(4, 5)
    for _ in range(16):
        block = ResBlock(
            32, 32, emb_channels=5, norm_groups=8, dropout=0.0, scale_shift=True, skip_rescale=rescale
        )
        branch = block.conv2.weight  # 1 out for silu(normal), which has a mean square of 0.36
        nn.init.normal_(branch, std=(0.36 * branch[0].numel()) ** -0.5)
        with torch.no_grad():
            h = block(h, emb)
    assert low < h.var() < high


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (lambda r: ResBlock(4, 8, emb_channels=5, norm_groups=2, dropout=0.0, scale_shift=False, skip_rescale=r),
         [(2, 4, 6, 6), (2, 5)]),
        (lambda r: Attention(4, num_heads=2, norm_groups=2, skip_rescale=r), [(2, 4, 6, 6)]),
        (lambda r: ProgressiveInput(3, 4, fir=True, skip_rescale=r), [(2, 4, 6, 6), (2, 3, 12, 12)]),
    ],
    ids=["block", "attention", "input"],
)  # fmt: skip
def test_every_residual_sum_is_rescaled(make, arguments):
    plain, rescaled = (randomised(make(rescale)).double() for rescale in (False, True))
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in arguments]
    close(rescaled(*tensors) * 2**0.5, plain(*tensors))


@pytest.mark.parametrize("fir", [False, True])
def test_progressive_input_equals_its_formula(fir):
    layer = randomised(ProgressiveInput(2, 3, fir=fir, skip_rescale=False)).double()
    h, image = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 2, 8, 8).double()
    taps = torch.tensor([1.0, 3, 3, 1] if fir else [0.0, 1, 1, 0], dtype=torch.float64)
    kernel = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
    shrunk = conv2d(pad(image, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None], kernel, stride=2)
    expected = h + conv2d(shrunk.view(2, 2, 4, 4), layer.conv.weight, layer.conv.bias, padding=1)
    close(layer(h, image), expected)


def images(network: nn.Module, kind: type[nn.Module]) -> list:
    """The images that a network's layers of a kind read or write, in their order."""
    seen = []
    for module in network.modules():
        if isinstance(module, InputSkip) and kind is InputSkip:
            module.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
        elif isinstance(module, OutputSkip) and kind is OutputSkip:
            module.register_forward_hook(lambda module, args, output: seen.append(output))
    return seen


@pytest.mark.parametrize("fir", [False, True])
def test_input_skips_see_the_image_in_each_size(fir):
    network = small(channel_mult=[1, 1, 2], **SKIPS | {"fir": fir})
    seen = images(network, InputSkip)
    x, c_noise = inputs()
    network(x, c_noise)
    half = halve(x, fir=fir, padding="zeros")
    close(seen[0], half)
    close(seen[1], halve(half, fir=fir, padding="zeros"))


@pytest.mark.parametrize("fir", [False, True])
def test_output_skips_add_up_in_the_size_of_the_image(fir):
    network = small(channel_mult=[1, 1, 2], **SKIPS | {"fir": fir})
    levels = images(network, OutputSkip)
    network.out_conv.register_forward_hook(lambda module, args, output: levels.append(output))
    x, c_noise = inputs()
    out = network(x, c_noise)
    assert [level.shape[-1] for level in levels] == [2, 4, 8]
    total = torch.zeros_like(levels[0][..., ::2, ::2])
    for level in levels:
        total = level + double(total, fir=fir, padding="zeros")
    close(out, total)


def test_output_skips_stop_no_gradient():
    network = small(channel_mult=[1, 1, 2], **SKIPS).train()
    thrifty = small(channel_mult=[1, 1, 2], gradient_checkpointing=True, **SKIPS).train()
    x, c_noise = inputs()
    plain, recomputed = (
        torch.autograd.grad(each(x, c_noise).square().sum(), list(each.parameters()))
        for each in (network, thrifty)
    )
    assert all(gradient.any() for gradient in plain)
    assert all(map(torch.equal, plain, recomputed))


@pytest.mark.parametrize("resample", ["conv", "block"])
@pytest.mark.parametrize("progressive_input", ["none", "residual", "input_skip"])
def test_progressive_input_takes_the_image_past_the_stem_to_every_coarser_level(progressive_input, resample):
    network = small(channel_mult=[1, 1, 2], progressive_input=progressive_input, resample=resample)
    zero_init(network.stem)
    seen = []
    for module in [*network.down, network.middle]:
        module.register_forward_hook(lambda module, args, output: seen.append(output))
    x, c_noise = inputs(2)
    outputs = [network(image, c_noise[:2]) for image in (x, x.flip(0))]
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    levels = {a.shape[-1] for a, b in zip(first, second, strict=True) if (a - b).abs().max() > 1e-6}
    reached = progressive_input != "none"
    assert levels == ({4, 2} if reached else set())
    assert ((outputs[0] - outputs[1]).abs().max() > 1e-6) == reached


def test_what_joined_the_image_goes_on_as_skip_connection_and_pyramid():
    network = small(channel_mult=[1, 1, 2], **NCSNPP)
    joined, pyramids, skips = [], [], []
    for module in network.down:
        if isinstance(module, ProgressiveInput):
            module.register_forward_hook(lambda module, args, output: joined.append(output))
            module.register_forward_pre_hook(lambda module, args: pyramids.append(args[1]))
    for module in network.up:
        module.register_forward_pre_hook(lambda module, args: skips.append(args[2]))
    x, c_noise = inputs()
    network(x, c_noise)
    assert len(joined) == 2
    assert pyramids[0] is x
    assert pyramids[1] is joined[0]
    assert all(any(skip is each for skip in skips) for each in joined)


@pytest.mark.parametrize("wanted", [False, True])
def test_all_sums_are_rescaled_and_all_resamplings_filtered_or_none(wanted):
    network = small(channel_mult=[1, 1, 2], **NCSNPP | {"skip_rescale": wanted, "fir": wanted})
    sums = [m for m in network.modules() if isinstance(m, ResBlock | Attention | ProgressiveInput)]
    resampling = [m for m in sums if isinstance(m, ProgressiveInput) or getattr(m, "resample", None)]
    assert {module.skip_rescale for module in sums} == {wanted}
    assert [module.fir for module in resampling] == 6 * [wanted]
