"""The U-Net against published counts and independent formulas, and the laws of its parts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, group_norm, interpolate, linear, pad, silu

from diffusion_cli.networks import UNet
from diffusion_cli.networks.layers import (
    Attention,
    Downsample,
    FourierFeatures,
    ResBlock,
    Upsample,
    fir_resample,
    timestep_embedding,
    zero_init,
)

OPTIONS = sorted((Path(__file__).parents[1] / "conf" / "model").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "channels": 8,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [4],
    "num_heads": 2,
    "head_channels": None,
    "norm_groups": 4,
    "time_embedding": "scale_shift",
    "embedding_layout": "cos_sin",
    "fourier_scale": 16.0,
    "resample": "conv",
    "fir": False,
    "skip_rescale": False,
    "progressive_input": "none",
    "dropout": 0.0,
    "class_conditional": False,
    "learn_variance": False,
    "gradient_checkpointing": False,
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
    return randomised(UNet(2, image_size, num_classes, **(SMALL | changes))).double().eval()


def inputs(batch: int = 3, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 2, height, width, generator=generator, dtype=torch.float64)
    return x, torch.linspace(3, 700, batch, dtype=torch.float64)


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
        network = UNet(3, 32, None, **option(name, **changes))
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.stem)
def test_every_option_starts_at_zero(path):
    size = 8 if "tiny" in path.stem else 64 if path.stem == "unet_small" else 32
    network = UNet(3, size, 10, **option(path.stem, class_conditional=True, learn_variance=True)).eval()
    with torch.no_grad():
        out = network(torch.randn(1, 3, size, size), torch.tensor([500.0]), torch.tensor([3]))
    assert torch.equal(out, torch.zeros(1, 6, size, size))


@pytest.mark.parametrize("size", [8, 16, 28, 32])
def test_default_network_serves_every_small_size(size):
    network = randomised(UNet(1, size, None, **option("unet_tiny")))
    x = torch.randn(1, 1, size, size)
    assert network(x, torch.tensor([5.0])).std() > 0


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


def test_time_reaches_the_blocks_unrounded_under_autocast():
    network, (x, c_noise) = small().float(), inputs()
    seen = []
    network.time_mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    network(x.float(), c_noise)
    with torch.autocast("cpu", torch.bfloat16):
        network(x.float(), c_noise)
    assert torch.equal(seen[0], seen[1])


def test_upsample_is_nearest_neighbour_then_convolution():
    layer = randomised(Upsample(6)).double()
    assert set(layer.state_dict()) == {"weight", "bias"}
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64, requires_grad=True)
    expected = conv2d(interpolate(x, scale_factor=2.0), layer.weight, layer.bias, padding=1)
    close(layer(x), expected)
    pull = torch.randn_like(expected)
    wrt = [x, *layer.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad(layer(x), wrt, pull), torch.autograd.grad(expected, wrt, pull), strict=True
    ):
        close(mine, theirs)


@pytest.mark.parametrize(("same", "first"), [(True, 1), (False, 0)])
def test_downsample_centres_on_the_published_pixels(same, first):
    layer = Downsample(1, same=same)
    zero_init(layer)
    nn.init.dirac_(layer.weight)
    x = torch.randn(1, 1, 6, 8)
    assert torch.equal(layer(x), x[..., first::2, first::2])


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


@pytest.mark.parametrize("resample", ["conv", "conv_same", "block"])
@pytest.mark.parametrize("time_embedding", ["additive", "scale_shift"])
def test_output_depends_on_time_and_class(resample, time_embedding):
    network = small(num_classes=3, class_conditional=True, resample=resample, time_embedding=time_embedding)
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
    with pytest.raises(ValueError, match=r"unknown labels \[-1, 4\]: the classes are 0\.\.2, and 3 stands"):
        network.check_labels(torch.tensor([0, 4, -1, 4]))
    with pytest.raises(ValueError, match="class_conditional=false"):
        small(num_classes=3).check_labels(torch.tensor([0]))


@pytest.mark.parametrize("resample", ["conv", "block"])
def test_gradient_checkpointing_changes_nothing(resample):
    changes = {"dropout": 0.3, "resample": resample}
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


@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 3), (10, 4), (8, 9)])
def test_other_sizes_are_extended_by_their_edge(height, width):
    network = small(channel_mult=[1, 1, 2])
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


def test_an_image_does_not_depend_on_its_batch():
    network = small(num_classes=3, class_conditional=True)
    x, c_noise = inputs(4)
    y = torch.tensor([0, 1, 2, 3])
    together = network(x, c_noise, y)
    for i in range(4):
        close(network(x[i : i + 1], c_noise[i : i + 1], y[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize("time_embedding", ["additive", "scale_shift"])
def test_bfloat16_autocast_stays_close(time_embedding):
    network = UNet(2, 8, None, **SMALL | {"time_embedding": time_embedding, "channels": 16})
    torch.manual_seed(0)
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
        ({"num_heads": 2, "head_channels": 4}, "num_heads=2, head_channels=4: set one"),
        ({"num_heads": None}, "num_heads=None, head_channels=None: set one"),
        ({"attention_resolutions": [4, 16, 3]}, r"\[4, 16, 3\]: not reached: \[16, 3\]; .* work at \[8, 4\]"),
        ({"fir": True}, "fir=true: filters what resamples in a block, not resample=conv"),
        ({"class_conditional": True}, "class_conditional=true: the data set has no classes"),
    ],
)
def test_arguments_that_do_not_go_together_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        UNet(2, 8, None, **(SMALL | changes))


def test_head_channels_and_num_heads_say_the_same():
    by_number, by_size = small(num_heads=4), small(num_heads=None, head_channels=4)
    close(by_number(*inputs()), by_size(*inputs()))
    other = small(num_heads=2)(*inputs())
    assert (by_number(*inputs()) - other).abs().max() > 1e-6


# --- NCSN++ and DDPM++ --------------------

NCSNPP: dict[str, Any] = {
    "embedding_layout": "fourier",
    "resample": "block",
    "fir": True,
    "skip_rescale": True,
    "progressive_input": "residual",
}


def test_filtered_resampling_keeps_constants_and_removes_the_finest_pattern():
    x = torch.full((1, 2, 8, 8), 3.0, dtype=torch.float64)
    close(fir_resample(x, "down")[..., 1:-1, 1:-1], torch.full((1, 2, 2, 2), 3.0, dtype=torch.float64))
    close(fir_resample(x, "up")[..., 2:-2, 2:-2], torch.full((1, 2, 12, 12), 3.0, dtype=torch.float64))
    checkered = (-1.0) ** torch.arange(8, dtype=torch.float64).expand(1, 1, 8, 8)
    close(fir_resample(checkered, "down")[..., 1:-1], torch.zeros(1, 1, 4, 2, dtype=torch.float64))


def test_filtered_resampling_is_centred_on_nearest_neighbour():
    """A slope keeps its place: the new pixels are where the old ones' halves or pairs were."""
    slope = torch.arange(8, dtype=torch.float64).expand(1, 1, 8, 8)
    close(fir_resample(slope, "down")[..., 1:-1, 1:-1], avg_pool2d(slope, 2)[..., 1:-1, 1:-1])
    place = (torch.arange(16, dtype=torch.float64) - 0.5) / 2
    close(fir_resample(slope, "up")[..., 2:-2, 2:-2], place.expand(1, 1, 16, 16)[..., 2:-2, 2:-2])


def test_filtered_resampling_up_is_the_transpose_of_down():
    generator = torch.Generator().manual_seed(0)
    fine = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=generator)
    coarse = torch.randn(1, 3, 4, 4, dtype=torch.float64, generator=generator)
    close((fir_resample(fine, "down") * coarse).sum(), (fine * fir_resample(coarse, "up")).sum() / 4)


def test_fourier_features_equal_their_formula_and_are_kept_not_trained():
    torch.manual_seed(3)
    layer, other = FourierFeatures(400, 16.0), FourierFeatures(400, 16.0)
    assert list(layer.parameters()) == []
    assert abs(layer.frequencies.std() - 16) < 2
    c_noise = torch.tensor([0.3, -1.2], dtype=torch.float64)
    angles = 2 * torch.pi * c_noise[:, None] * layer.frequencies.double()
    close(layer(c_noise), torch.cat([angles.sin(), angles.cos()], 1))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(c_noise), layer(c_noise))


def test_rescaled_sums_are_halved_in_variance_in_every_block():
    x, emb = torch.randn(2, 8, 4, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    plain = randomised(ResBlock(8, 8, emb_channels=4, norm_groups=4, dropout=0.0, scale_shift=False)).double()
    halved = ResBlock(8, 8, emb_channels=4, norm_groups=4, dropout=0.0, scale_shift=False, gain=0.5**0.5)
    halved.double().load_state_dict(plain.state_dict())
    close(halved(x, emb), plain(x, emb) / 2**0.5)
    network = small(skip_rescale=True)
    gains = [m.gain for m in network.modules() if isinstance(m, ResBlock | Attention)]
    assert len(gains) > 5
    assert set(gains) == {0.5**0.5}


def test_progressive_input_carries_the_image_past_the_first_level():
    """With the stem at nothing, only the image on its own way can be seen below."""
    for progressive, seen in (("none", False), ("residual", True)):
        arguments: dict[str, Any] = SMALL | NCSNPP | {"progressive_input": progressive}
        network = UNet(2, 8, None, **arguments)
        network = randomised(network).double().eval()
        for parameter in network.stem.parameters():
            nn.init.zeros_(parameter)
        x, c_noise = inputs()
        changed = (network(x, c_noise) - network(-x, c_noise)).abs().max() > 1e-6
        assert changed == seen


def test_ncsnpp_serves_odd_sizes_and_half_precision():
    network = randomised(UNet(2, 7, None, **(SMALL | NCSNPP))).double().eval()
    x, c_noise = inputs(height=7, width=7)
    assert network(x, c_noise).shape == x.shape
    with torch.autocast("cpu", torch.bfloat16):
        assert network.float()(x.float(), c_noise.float()).isfinite().all()
