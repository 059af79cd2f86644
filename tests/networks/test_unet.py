"""The U-Net: published counts, attention, labels, sizes and data types."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from diffusion_cli.conditions import Condition
from diffusion_cli.networks import UNet
from diffusion_cli.networks.layers import Attention, ResBlock, zero_init
from helpers.networks import NCSNPP, OPTIONS, SMALL, close, inputs, option, randomised, small

UNETS = [file for file in OPTIONS if "UNet" in file.read_text()]


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
    sizes = {"unet_tiny": (8, 8), "unet_small": (64, 64), "unet3d_base": (16, 16, 16)}.get(
        path.stem, (32, 32)
    )
    options = option(path.stem, class_conditional=True, learn_variance=True)
    network = UNet((3, *sizes), 10, **options).eval()
    with torch.no_grad():
        out = network(torch.randn(1, 3, *sizes), torch.tensor([500.0]), torch.tensor([3]))
    assert torch.equal(out, torch.zeros(1, 6, *sizes))


@pytest.mark.parametrize("name", ["unet_tiny", "ddpmpp_tiny", "ncsnpp_tiny"])
@pytest.mark.parametrize("size", [8, 16, 28, 32])
def test_tiny_networks_serve_every_small_size(name, size):
    network = randomised(UNet((1, size, size), None, **option(name)))
    x = torch.randn(1, 1, size, size)
    assert network(x, torch.tensor([5.0])).std() > 0


def test_branches_start_as_nothing():
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 5)
    res = ResBlock(8, 8, emb_channels=5, norm_groups=4, dropout=0.0, scale_shift=True)
    assert torch.equal(res(x, emb), x)
    assert torch.equal(Attention(8, num_heads=2, norm_groups=4)(x), x)


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


def test_a_missing_label_is_the_null_class():
    network, (x, c_noise) = small(num_classes=3, class_conditional=True), inputs()
    null = network(x, c_noise)
    assert torch.equal(null, network(x, c_noise, torch.full((3,), 3)))
    assert torch.equal(null, network(x, c_noise, Condition.of(torch.tensor([0, 1, 2])).dropped()))


def test_unconditional_network_takes_no_notice_of_labels():
    network, (x, c_noise) = small(num_classes=3), inputs()
    assert network.num_classes is None
    assert torch.equal(network(x, c_noise), network(x, c_noise, torch.tensor([0, 1, 2])))


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


class WithoutNorm(nn.Module):
    """Identity that replaces a group norm, because a norm connects every pixel with all others."""

    def forward(self, x, **_):
        return x


@pytest.mark.parametrize("named", [[], [32]])
def test_attention_joins_what_convolutions_do_not(named):
    network = small(64, channels=4, attention_resolutions=named).float()
    zero_init(network.middle.get_submodule("1.proj"))
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, WithoutNorm())
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
        (
            {"scale_by_sigma": True},
            "scale_by_sigma=true: needs the noise level .* use embedding_layout=fourier",
        ),
        (
            {"centered": False},
            "centered=false: needs the noise level .* embedding_layout=fourier or centered=true",
        ),
        (
            {"embedding_layout": "fourier", "scale_by_sigma": True, "learn_variance": True},
            "scale_by_sigma=true: would divide the learned variance too",
        ),
    ],
)
def test_arguments_that_do_not_go_together_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        UNet((2, 8, 8), None, **(SMALL | changes))


def test_the_output_divided_by_sigma_is_a_score():
    x, c_noise = inputs()[0], torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    plain, score = (small(**NCSNPP, scale_by_sigma=scaled)(x, c_noise) for scaled in (False, True))
    close(score * c_noise.exp()[:, None, None, None], plain)


def test_sigma_of_data_between_0_and_1_is_half_of_that_between_minus_1_and_1():
    x, c_noise = inputs()[0], torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    shifted = small(**NCSNPP, centered=False)(x, c_noise)
    close(shifted, small(**NCSNPP)(x, c_noise - math.log(2)))


@pytest.mark.parametrize("layout", ["cos_sin", "fourier"])
def test_the_time_embedding_is_as_wide_as_asked(layout):
    network = small(embedding_channels=6, embedding_layout=layout)
    assert [layer.in_features for layer in network.time_mlp[::2]] == [6 if layout == "cos_sin" else 12, 24]
    assert network(*inputs()).shape == inputs()[0].shape


def test_every_norm_has_the_constant_of_the_option():
    network = small(norm_eps=0.5, progressive_output="output_skip")
    assert {module.eps for module in network.modules() if isinstance(module, nn.GroupNorm)} == {0.5}


def test_the_middle_block_has_attention_on_request():
    kinds = [[type(layer) for layer in small(middle_attention=wanted).middle] for wanted in (True, False)]
    assert kinds == [[ResBlock, Attention, ResBlock], [ResBlock, ResBlock]]


def test_head_channels_and_num_heads_say_the_same():
    by_number, by_size = small(num_heads=4), small(num_heads=None, head_channels=4)
    close(by_number(*inputs()), by_size(*inputs()))
    other = small(num_heads=2)(*inputs())
    assert (by_number(*inputs()) - other).abs().max() > 1e-6
