"""The U-Net against published counts and independent formulas, and the laws of its parts."""

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.functional import (
    avg_pool2d,
    conv2d,
    group_norm,
    interpolate,
    linear,
    pad,
    pixel_unshuffle,
    scaled_dot_product_attention,
    silu,
)

import diffusion_cli as diffuse
from diffusion_cli.networks import Classifier, UNet
from diffusion_cli.networks.layers import (
    CONV,
    Attention,
    Conv,
    Downsample,
    Dropout,
    Pointwise,
    ProgressiveInput,
    ResBlock,
    Upsample,
    attend,
    double,
    fourier_embedding,
    from_patches,
    halve,
    residual_sum,
    timestep_embedding,
    to_patches,
    zero_init,
)

OPTIONS = [
    file
    for file in sorted((Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))
    if re.search(r"networks\.(UNet|Classifier)\n", file.read_text())
]
UNETS = [file for file in OPTIONS if "UNet" in file.read_text()]
SMALL = {
    "channels": 8,
    "channel_mult": [1, 2],
    "attention_resolutions": [4],
    "num_heads": 2,
    "head_channels": None,
    "norm_groups": 4,
}


NCSNPP: dict = {
    "time_embedding": "additive",
    "embedding_layout": "fourier",
    "fourier_scale": 0.01,
    "resample": "block_proj",
    "fir": True,
    "progressive_input": "residual",
    "up_attention": "last",
    "skip_rescale": True,
}


def option(name: str, **changes) -> dict:
    path = next(path for path in OPTIONS if path.stem == name)
    arguments = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(arguments, dict)
    return {str(key): value for key, value in arguments.items() if key != "_target_"} | changes


def randomised(module, seed: int = 0):
    """Weights of a trained kind: nothing is zero any more."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def small(image_size: int = 8, num_classes: int | None = None, **changes) -> UNet:
    torch.manual_seed(0)
    return randomised(UNet((2, image_size, image_size), num_classes, **(SMALL | changes))).double().eval()


def inputs(batch: int = 3, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 2, height, width, generator=generator, dtype=torch.float64)
    return x, torch.linspace(3, 700, batch, dtype=torch.float64)


def along(*sizes: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Inputs of any number of dimensions."""
    x = torch.randn(batch, 2, *sizes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.linspace(3, 700, batch, dtype=torch.float64)


def network_in(shape: tuple[int, ...], **changes) -> UNet:
    torch.manual_seed(0)
    return randomised(UNet((2, *shape), None, **(SMALL | changes))).double().eval()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "changes", "count"),
    [
        # Ho et al. 2020, Appendix B: 35.7 million; diffusers' UNet2DModel of google/ddpm-cifar10-32 has as many.
        ("unet_cifar10", {}, 35_746_307),
        # openai/improved-diffusion with --num_channels 128 --num_res_blocks 3 --image_size 32; --learn_sigma True
        # makes 3 further output maps of 128 * 9 weights and a bias each.
        ("unet_iddpm_cifar10", {}, 52_542_979),
        ("unet_iddpm_cifar10", {"learn_variance": True}, 52_542_979 + 3 * (128 * 9 + 1)),
    ],
)
def test_published_parameter_counts(name, changes, count):
    with torch.device("meta"):
        network = UNet((3, 32, 32), None, **option(name, **changes))
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def census(widths: list[int], blocks: int, attended: set[int], features: int, pyramid: bool) -> int:
    """Parameters of DDPM++ and NCSN++ for RGB images, as the code of Song et al. 2021b lists the layers."""
    emb = 4 * 128

    def res(i: int, o: int, resample: bool = False) -> int:
        beside = i * o + o if i != o or resample else 0
        return 2 * i + (9 * i + 1) * o + (emb + 1) * o + 2 * o + (9 * o + 1) * o + beside

    def attention(level: int) -> int:
        return 2 * widths[level] + 4 * (widths[level] + 1) * widths[level]

    last = len(widths) - 1
    total = (features + 1) * emb + (emb + 1) * emb + (9 * 3 + 1) * 128
    total += 2 * res(widths[last], widths[last]) + attention(last)
    for level, (before, width) in enumerate(pairwise([128, *widths])):
        after = widths[min(level + 1, last)]
        total += res(before, width) + (blocks - 1) * res(width, width)
        total += (blocks + 1) * attention(level) if level in attended else 0
        # On the way up: the level's own skip connections, and at the end the one that came from the level above.
        total += res(after + width, width) + (blocks - 1) * res(2 * width, width) + res(width + before, width)
        if level < last:
            total += res(width, width, resample=True) + res(after, after, resample=True)
            total += (9 * (widths[level - 1] if level else 3) + 1) * width if pyramid else 0
    return total + 2 * widths[0] + (9 * widths[0] + 1) * 3


@pytest.mark.parametrize(
    ("name", "layers", "count"),
    [
        ("ddpmpp_cifar10", ([128, 256, 256, 256], 4, {1}, 128, False), 61_804_419),
        ("ncsnpp_cifar10", ([128, 256, 256, 256], 4, {1}, 256, True), 62_758_787),
        # Karras et al. 2022: 55.7 million; their code adds 9 * 128 weights for labels of augmentations.
        ("ddpmpp_edm_cifar10", ([256, 256, 256], 4, {1}, 128, False), 55_732_739),
    ],
)
def test_parameter_counts_of_song(name, layers, count):
    with torch.device("meta"):
        network = UNet((3, 32, 32), None, **option(name))
    assert sum(parameter.numel() for parameter in network.parameters()) == count == census(*layers)


@pytest.mark.parametrize("path", UNETS, ids=lambda path: path.stem)
def test_every_option_starts_at_zero(path):
    size = {"unet_tiny": 8, "unet_small": 64}.get(path.stem, 32)
    network = UNet(
        (3, size, size), 10, **option(path.stem, class_conditional=True, learn_variance=True)
    ).eval()
    with torch.no_grad():
        out = network(torch.randn(1, 3, size, size), torch.tensor([500.0]), torch.tensor([3]))
    assert torch.equal(out, torch.zeros(1, 6, size, size))


@pytest.mark.parametrize("name", ["unet_tiny", "ddpmpp_tiny", "ncsnpp_tiny"])
@pytest.mark.parametrize("size", [8, 16, 28, 32])
def test_tiny_networks_serve_every_small_size(name, size):
    network = randomised(UNet((1, size, size), None, **option(name)))
    x = torch.randn(1, 1, size, size)
    assert network(x, torch.tensor([5.0])).std() > 0


@pytest.mark.parametrize("sizes", [(16,), (16, 16, 16)])
def test_signals_and_volumes_start_at_zero_too(sizes):
    network = UNet((1, *sizes), None, **option("unet3d_tiny", attention_resolutions=[8]))
    out = network(torch.randn(2, 1, *sizes), torch.tensor([5.0, 500.0]))
    assert torch.equal(out, torch.zeros(2, 1, *sizes))


RESAMPLING: list[dict] = [
    {"resample": "conv"},
    {"resample": "conv_same"},
    {"resample": "block"},
    {"resample": "block_proj", "learn_variance": True},
    NCSNPP,
]


def in_plane(weights: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network's weights for one with a further first axis, along which no kernel reaches."""
    lifted = {}
    for name, wanted in like.items():
        weight = weights[name]
        if weight.dim() < wanted.dim():
            wanted = torch.zeros_like(wanted)
            wanted.select(2, wanted.shape[2] // 2).copy_(weight)
            weight = wanted
        lifted[name] = weight
    return lifted


@pytest.mark.parametrize("changes", RESAMPLING)
@pytest.mark.parametrize("sizes", [(8,), (7, 5), (8, 8)])
def test_a_stack_of_equal_slices_is_done_as_one_slice(sizes, changes):
    changes = {"channel_mult": [1, 1, 2]} | changes
    flat, deep = network_in((8,) * len(sizes), **changes), network_in((8, *(8,) * len(sizes)), **changes)
    deep.load_state_dict(in_plane(flat.state_dict(), deep.state_dict()))
    x, c_noise = along(*sizes)
    expected = flat(x, c_noise)
    close(
        deep(x[:, :, None].expand(-1, -1, 6, *sizes), c_noise), expected[:, :, None].expand(-1, -1, 6, *sizes)
    )


@pytest.mark.parametrize("changes", RESAMPLING)
def test_no_axis_of_a_volume_is_preferred(changes):
    network = network_in((8, 8, 8), **changes)
    (x, c_noise), turn = along(8, 6, 5), (2, 0, 1)
    axes = (0, 1, *(axis + 2 for axis in turn))
    expected = network(x, c_noise).permute(axes)
    turned = {k: w.permute(axes).clone() if w.dim() == 5 else w for k, w in network.state_dict().items()}
    assert (network(x.permute(axes), c_noise) - expected).abs().max() > 1e-3
    network.load_state_dict(turned)
    close(network(x.permute(axes), c_noise), expected)


@pytest.mark.parametrize("sizes", [(8,), (5,), (4, 8, 6), (3, 5, 7)])
@pytest.mark.parametrize(
    "changes", [{"patch_size": 2, "attention_resolutions": []}, NCSNPP | {"channel_mult": [1, 1, 2]}]
)
def test_other_sizes_of_signals_and_volumes_are_extended_by_their_edge(sizes, changes):
    network = network_in((8,) * len(sizes), **changes)
    x, c_noise = along(*sizes)
    extended = x
    for axis, size in enumerate(sizes, start=2):
        last = extended.narrow(axis, size - 1, 1)
        extended = torch.cat([extended, *[last] * (-size % 4)], axis)
    out = network(extended, c_noise)
    close(network(x, c_noise), out[(..., *(slice(size) for size in sizes))])


@pytest.mark.parametrize("changes", RESAMPLING)
def test_gradient_checkpointing_of_volumes_changes_nothing(changes):
    plain = network_in((4, 4, 4), **changes).train()
    thrifty = network_in((4, 4, 4), **changes, gradient_checkpointing=True).train()
    x, c_noise = along(4, 4, 4)
    for network in (plain, thrifty):
        network(x, c_noise).square().sum().backward()
    for mine, theirs in zip(thrifty.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("sizes", [(), (4, 4, 4, 4)])
def test_other_numbers_of_dimensions_are_refused(sizes):
    with pytest.raises(
        ValueError, match=f"model: a U-Net needs data with 1 to 3 dimensions .* not {len(sizes)}"
    ):
        network_in(sizes)


def test_a_classifier_of_volumes_scores_a_stack_of_equal_slices_as_one_slice():
    flat, deep = (
        randomised(Classifier((2, *sizes), 3, **option("classifier_tiny"))).double().eval()
        for sizes in ((8, 8), (8, 8, 8))
    )
    deep.load_state_dict(in_plane(flat.state_dict(), deep.state_dict()))
    x, c_noise = along(8, 8)
    close(deep(x[:, :, None].expand(-1, -1, 4, -1, -1), c_noise), flat(x, c_noise))


def test_branches_start_as_nothing():
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 5)
    res = ResBlock(8, 8, emb_channels=5, norm_groups=4, dropout=0.0, scale_shift=True)
    assert torch.equal(res(x, emb), x)
    assert torch.equal(Attention(8, num_heads=2, norm_groups=4)(x), x)


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


@pytest.mark.parametrize("resample", ["conv", "block"])
@pytest.mark.parametrize("progressive_input", ["none", "residual"])
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
    reached = progressive_input == "residual"
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


def test_last_up_attention_leaves_one_a_level_on_the_way_up():
    def counts(**changes) -> list[int]:
        network = small(
            32, channel_mult=[1, 1, 2], num_res_blocks=3, attention_resolutions=[16, 8], **changes
        )
        paths = (network.down, network.middle, network.up)
        return [sum(isinstance(module, Attention) for module in path.modules()) for path in paths]

    assert counts() == [6, 1, 8]
    assert counts(up_attention="last") == [6, 1, 2]


def test_last_up_attention_comes_before_the_level_is_left():
    network = small(channel_mult=[1, 2], up_attention="last", resample="block")
    kinds = [[type(layer) for layer in block] for block in network.up]  # pyright: ignore[reportGeneralTypeIssues]
    assert kinds == [[ResBlock], [ResBlock, Attention, ResBlock], [ResBlock], [ResBlock]]


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


@pytest.mark.parametrize(
    "changes",
    [
        {"resample": "conv"},
        {"resample": "conv_same"},
        {"resample": "block"},
        {"resample": "block_proj"},
        NCSNPP,
    ],
    ids=lambda changes: "ncsnpp" if changes is NCSNPP else changes["resample"],
)
@pytest.mark.parametrize("time_embedding", ["additive", "scale_shift"])
def test_output_depends_on_time_and_class(changes, time_embedding):
    changes = changes | {"time_embedding": time_embedding}
    network = small(num_classes=3, class_conditional=True, **changes)
    x, c_noise = inputs()
    labels = torch.tensor([0, 1, 2])
    out = network(x, c_noise, labels)
    assert ((out - network(x, c_noise + 0.5, labels)).abs().amax((1, 2, 3)) > 1e-4).all()
    assert ((out - network(x, c_noise, labels.roll(1))).abs().amax((1, 2, 3)) > 1e-4).all()
    assert ((out - network(x, c_noise)).abs().amax((1, 2, 3)) > 1e-4).all()


def test_no_label_is_the_null_class():
    network, (x, c_noise) = small(num_classes=3, class_conditional=True), inputs()
    assert torch.equal(network(x, c_noise), network(x, c_noise, torch.full((3,), 3)))


def test_unconditional_network_takes_no_notice_of_labels():
    network, (x, c_noise) = small(num_classes=3), inputs()
    assert network.num_classes is None
    assert torch.equal(network(x, c_noise), network(x, c_noise, torch.tensor([0, 1, 2])))


def test_labels_are_checked_on_request():
    network = small(num_classes=3, class_conditional=True)
    network.check_labels(torch.tensor([0, 2, 3]))
    with pytest.raises(ValueError, match=r"unknown labels \[-1, 4\]: the classes are 0\.\.2, and 3 is"):
        network.check_labels(torch.tensor([0, 4, -1, 4]))
    with pytest.raises(ValueError, match="class_conditional=false"):
        small(num_classes=3).check_labels(torch.tensor([0]))


@pytest.mark.parametrize("changes", [{"resample": "conv"}, {"resample": "block"}, NCSNPP])
def test_gradient_checkpointing_changes_nothing(changes):
    changes = changes | {"dropout": 0.3}
    plain = small(**changes).train()
    thrifty = small(**changes, gradient_checkpointing=True).train()
    x, c_noise = inputs()

    def run(network: UNet, seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        out = network(x, c_noise)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), list(network.parameters()))]

    recomputed = []
    thrifty.middle[0].register_forward_hook(lambda *_: recomputed.append(1))
    for mine, theirs in zip(run(thrifty, 0), run(plain, 0), strict=True):
        assert torch.equal(mine, theirs)
    assert len(recomputed) == 2
    assert not torch.equal(run(plain, 0)[0], run(plain, 1)[0])


@pytest.mark.parametrize("changes", [{}, NCSNPP])
@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 3), (10, 4), (8, 9)])
def test_other_sizes_are_extended_by_their_edge(height, width, changes):
    network = small(channel_mult=[1, 1, 2], **changes)
    x, c_noise = inputs(2, height, width)
    extended = pad(x, (0, -width % 4, 0, -height % 4), mode="replicate")
    close(network(x, c_noise), network(extended, c_noise)[..., :height, :width])


def test_sizes_that_the_depth_divides_are_not_extended():
    network, seen = small(), []
    network.stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x, c_noise = inputs(1, 6, 10)
    network(x, c_noise)
    assert seen[0] is x


@pytest.mark.parametrize(
    ("size", "levels", "named", "attended"),
    [(32, 4, [16], {16, 4}), (32, 3, [32, 8], {32, 8}), (28, 3, [14], {14, 7}), (28, 4, [16], {16, 4})],
)
def test_attention_stands_at_the_named_resolutions_and_in_the_middle(size, levels, named, attended):
    network = small(size, channel_mult=[1] * levels, attention_resolutions=named)
    seen = set()
    for module in network.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(lambda module, args: seen.add(args[0].shape[-1]))
    network(*inputs(1, size, size))
    assert seen == attended


@pytest.mark.parametrize("named", [[], [32]])
def test_attention_joins_what_convolutions_do_not(named):
    network = small(64, channels=4, attention_resolutions=named).float()
    zero_init(network.middle.get_submodule("1.proj"))
    for module in network.modules():  # normalisation, too, would carry a pixel to all others
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    x = torch.randn(1, 2, 64, 64, requires_grad=True)
    out = network(0.01 * x, torch.tensor([100.0]))
    (grad,) = torch.autograd.grad(out[0, 0, -1, -1], x)
    assert (grad[0, :, 0, 0] != 0).all() == bool(named)
    assert (grad[0, :, -1, -1] != 0).all()


@pytest.mark.parametrize("changes", [{}, NCSNPP])
def test_an_image_does_not_depend_on_its_batch(changes):
    network = small(num_classes=3, class_conditional=True, **changes)
    x, c_noise = inputs(4)
    y = torch.tensor([0, 1, 2, 3])
    together = network(x, c_noise, y)
    for i in range(4):
        close(network(x[i : i + 1], c_noise[i : i + 1], y[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize(
    "changes", [{"time_embedding": "additive"}, {"time_embedding": "scale_shift"}, NCSNPP]
)
def test_bfloat16_autocast_stays_close(changes):
    torch.manual_seed(0)
    network = UNet((2, 8, 8), None, **SMALL | changes | {"channels": 16})
    for parameter in network.parameters():  # only what starts at zero, so that activations keep their size
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    x, c_noise = (tensor.float() for tensor in inputs(16))

    def run(enabled: bool) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = network(x, c_noise)
        grads = torch.autograd.grad((out - x).square().mean(), list(network.parameters()))
        return out, torch.cat([grad.flatten() for grad in grads])

    (out, grad), (coarse, coarse_grad) = run(False), run(True)
    assert coarse.dtype == torch.float32
    assert 0 < (coarse - out).norm() < 0.02 * out.norm()
    assert (coarse_grad - grad).norm() < 0.05 * grad.norm()


def test_bfloat16_weights_work_too():
    network, (x, c_noise) = small(), inputs()
    expected = network(x, c_noise)
    out = network.bfloat16()(x.bfloat16(), c_noise)
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_mult": []}, r"channel_mult=\[\]: "),
        ({"norm_groups": 3}, "norm_groups=3: does not divide channels=8"),
        ({"num_heads": 3}, "num_heads=3: does not divide the 16 channels"),
        ({"num_heads": None, "head_channels": 5}, "head_channels=5: does not divide the 16 channels"),
        ({"num_heads": 2, "head_channels": 4}, "num_heads=2, head_channels=4: exactly one"),
        ({"num_heads": None}, "num_heads=null, head_channels=null: exactly one"),
        (
            {"attention_resolutions": [4, 16, 3]},
            r"\[16, 3\] not among the resolutions; .* resolutions \[8, 4\]",
        ),
        ({"fir": True}, "fir=true: .* resample=conv; use resample=block or block_proj, or fir=false"),
        ({"fir": True, "resample": "conv_same"}, "fir=true: .* resample=conv_same; use resample=block"),
        ({"class_conditional": True}, "class_conditional=true: the dataset has no classes"),
    ],
)
def test_arguments_that_do_not_go_together_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        UNet((2, 8, 8), None, **(SMALL | changes))


def test_head_channels_and_num_heads_say_the_same():
    by_number, by_size = small(num_heads=4), small(num_heads=None, head_channels=4)
    close(by_number(*inputs()), by_size(*inputs()))
    other = small(num_heads=2)(*inputs())
    assert (by_number(*inputs()) - other).abs().max() > 1e-6


# --- Compilation ------------------------------

COMPILED: dict[str, dict[str, Any]] = {
    "unet_cifar10": {"channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4},
    "ncsnpp_tiny": {"num_res_blocks": 1},
    "unet3d_tiny": {"num_res_blocks": 1},
    "dit_tiny": {"depth": 1, "dropout": 0.1},
    "set_tiny": {"depth": 1},
    "classifier_tiny": {"num_res_blocks": 1},
    "kl_tiny": {},
}
"""Networks of all kinds with few layers, those of published names with their dropout."""


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_every_kind_of_network_compiles_as_one_graph(name):
    torch._dynamo.reset()
    shape = {"set_tiny": (3, 16), "unet3d_tiny": (1, 8, 8, 8)}.get(name, (1, 16, 16))
    classes = 10 if name == "classifier_tiny" else None
    network = diffuse.option("model", name, shape, classes, **COMPILED[name]).train()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    if name == "kl_tiny":
        output = compiled(x, torch.zeros(2, *network.latent_shape(shape)))
    else:
        output = (
            compiled(x, torch.tensor([1.0, 500.0]), None) if classes is None else compiled(x, torch.ones(2))
        )
    for part in output if isinstance(output, tuple) else [output]:
        part.square().sum().backward(retain_graph=True)
    assert all(weight.grad is not None for weight in network.parameters())
