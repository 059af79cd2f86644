"""Group norm in one pass on CPUs, against its formula in float64."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.functional import group_norm, silu

from diffusion_cli.networks import UNet
from diffusion_cli.networks import group_norm as group_norm_module
from diffusion_cli.networks.dropout import Dropout
from diffusion_cli.networks.group_norm import CHANNELS_LAST, GroupNorm, channels_last, is_fused
from diffusion_cli.networks.layers import Conv
from helpers.networks import SMALL, close, randomised

fused = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
ROUNDING = 2.0**-8  # largest relative error of a bfloat16
MARGINS = {torch.bfloat16: ROUNDING / 2, torch.float32: 2.0**-22}


def published(norm, x, *, added=None, scale_shift=None, activation):
    ones = [1] * (x.dim() - 2)
    if added is not None:
        x = x + added.reshape(*added.shape, *ones)
    x = group_norm(x, norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)
    if scale_shift is not None:
        scale, shift = scale_shift.reshape(*scale_shift.shape, *ones).chunk(2, dim=1)
        x = x * (1 + scale) + shift
    return silu(x) if activation else x


def error(value, expected):
    return ((value.double() - expected).norm() / expected.norm()).item()


def example(shape, modulation, groups=3, dtype=torch.bfloat16):
    """Return a norm, features, an embedding for a modulation or None, and gradients of the output."""
    draw = torch.Generator().manual_seed(0)

    def normal(*sizes):
        return torch.randn(*sizes, generator=draw)

    norm = GroupNorm(groups, shape[1], eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * normal(shape[1]))
        norm.bias.copy_(normal(shape[1]))
    x = (3 * normal(*shape) + 5 * normal(1, shape[1], *[1] * (len(shape) - 2))).to(dtype)
    width = {None: 0, "added": shape[1], "scale_shift": 2 * shape[1]}[modulation]
    emb = normal(shape[0], width).to(dtype) if modulation else None
    return norm, x, emb, normal(*shape).to(dtype)


@fused
@pytest.mark.parametrize("dtype", MARGINS, ids=str)
@pytest.mark.parametrize("modulation", [None, "added", "scale_shift"])
@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("shape", [(5, 12, 8, 8), (2, 48, 3, 5), (3, 6, 2, 4, 3), (3, 6, 1, 1)], ids=str)
def test_fused_norm_is_rounded_once_and_as_exact_as_that_of_torch(
    shape, modulation, activation, dtype, monkeypatch
):
    norm, x, emb, dy = example(shape, modulation, dtype=dtype)
    inputs = [x, norm.weight, norm.bias] + ([] if emb is None else [emb])
    inputs = [part.detach().requires_grad_() for part in inputs]

    def results(layer, of, gradient):
        layer.weight, layer.bias = nn.Parameter(of[1]), nn.Parameter(of[2])
        y = layer(of[0], **({modulation: of[3]} if modulation else {}), activation=activation)
        return [y, *torch.autograd.grad(y, [of[0], layer.weight, layer.bias, *of[3:]], gradient)]

    found = results(norm, inputs, dy)
    wide = [part.detach().double().requires_grad_() for part in inputs]
    expected = results(copy.deepcopy(norm).double(), wide, dy.double())
    monkeypatch.setattr(group_norm_module, "_functions", lambda _: None)
    of_torch = results(norm, inputs, dy)

    given = {modulation: wide[3]} if modulation else {}
    close(expected[0], published(norm, wide[0], activation=activation, **given), 1e-12)
    if dtype == torch.bfloat16:
        assert error(found[0], expected[0]) < ROUNDING
    for mine, theirs, exact in zip(found, of_torch, expected, strict=True):
        assert error(mine, exact) < error(theirs, exact) + MARGINS[dtype]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_c_code_is_compiled_where_there_is_a_compiler():
    assert is_fused(torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16))


@fused
def test_fused_norm_of_an_image_and_its_gradient_depend_on_neither_the_batch_nor_the_threads():
    norm, x, emb, dy = example((5, 72, 8, 8), "scale_shift", groups=9)
    assert emb is not None

    def results(of_x, of_emb, of_dy):
        of_x = of_x.clone().requires_grad_()
        torch.manual_seed(0)
        y = norm(of_x, scale_shift=of_emb, activation=True, dropout=Dropout(0.5))
        (gradient,) = torch.autograd.grad(y, of_x, of_dy)
        return torch.cat([y, gradient], dim=1)

    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 20):
            torch.set_num_threads(threads)
            outputs += [results(x, emb, dy)[:count] for count in (1, 5)] + [results(x[:1], emb[:1], dy[:1])]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(output, outputs[1][: len(output)]) for output in outputs)


@fused
def test_fused_norm_sums_many_pixels_exactly():
    norm = GroupNorm(1, 1, eps=1e-12)
    x = torch.full((1, 1, 2048, 2048), 0.3008, dtype=torch.bfloat16)
    x[..., ::2] += 0.0625
    y = norm(x)
    assert error(y, published(norm, x.double(), activation=False)) < ROUNDING / 2


@fused
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"input": torch.zeros(2, 9, 4, 4)}, "weight"),
        ({"input": torch.zeros(2, 9, 4, 4), "added": torch.zeros(2, 9)}, "weight"),
        ({"scale_shift": torch.zeros(2, 6)}, "size"),
        ({"added": torch.zeros(2, 5)}, "size"),
        ({"added": torch.zeros(2, 6, device="meta")}, "meta"),
    ],
    ids=["channels", "channels_added", "scale", "added", "meta"],
)
def test_inputs_that_do_not_fit_have_the_errors_of_torch(changes, problem):
    given = {"input": torch.zeros(2, 6, 4, 4), **changes}
    with pytest.raises(RuntimeError, match=problem):
        GroupNorm(3, 6)(**{name: value.bfloat16() for name, value in given.items()})


@fused
def test_an_embedding_for_all_images_and_strided_weights_give_what_torch_gives(monkeypatch):
    norm, x, _, _ = example((4, 6, 4, 4), None)
    emb = torch.linspace(-1, 1, 6).bfloat16()[None]
    norm.weight = nn.Parameter(torch.linspace(0, 2, 12)[::2])
    fused_values = norm(x), norm(x, added=emb)
    monkeypatch.setattr(group_norm_module, "_functions", lambda _: None)
    for mine, theirs in zip(fused_values, (norm(x), norm(x, added=emb)), strict=True):
        close(mine, theirs, 0.06)


@fused
def test_tensors_that_were_saved_in_another_order_give_the_same_gradients():
    norm, x, emb, dy = example((4, 6, 4, 4), "scale_shift")
    x.requires_grad_()
    (expected,) = torch.autograd.grad(norm(x, scale_shift=emb, activation=True), x, dy)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.contiguous(), lambda saved: saved):
        (gradient,) = torch.autograd.grad(norm(x, scale_shift=emb, activation=True), x, dy)
    assert torch.equal(gradient, expected)


@fused
def test_fused_norm_keeps_nan_in_its_image_and_extreme_values_finite():
    norm, x, _, _ = example((2, 6, 4, 4), None)
    x[0, 0, 0, 0] = torch.nan
    y = norm(x, activation=True)
    assert y[0, :2].isnan().all()  # its group
    assert y[0, 2:].isfinite().all()
    assert y[1].isfinite().all()
    for weight in (norm.weight, norm.bias):  # bits of a NaN that would round to zero
        with torch.no_grad():
            before = weight[5].item()
            weight[5:].view(torch.int32).fill_(0x7FFFFFFF)
        y = norm(x, activation=True)
        assert y[:, 5].isnan().all()
        assert y[1, :5].isfinite().all()
        with torch.no_grad():
            weight[5] = before
    assert norm(torch.full_like(x, 1e30) * torch.randn_like(x)).isnan().all()  # its squares are infinite
    with torch.no_grad():
        norm.weight.fill_(1e6)
    y, expected = norm(x[1:], activation=True), published(norm, x[1:].double(), activation=True)
    assert error(y, expected) < ROUNDING
    assert (y[expected < 0].abs() <= 1e-30).all()


def dropped(p, seed, shape=(4, 32, 16, 16), groups=8):
    """Return the output and the gradient of a norm of random features with dropout, and the output without."""
    torch.manual_seed(seed)
    norm, x, _, _ = example(shape, None, groups)
    x.requires_grad_()
    y = norm(x, activation=True, dropout=Dropout(p))
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), gradient, norm(x, activation=True).detach()


@fused
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_fused_dropout_keeps_its_share_of_features_enlarged(p):
    y, _, whole = dropped(p, 0)
    kept = y != 0
    assert abs(kept.double().mean() - (1 - p)) < 4 * (p * (1 - p) / kept.numel()) ** 0.5
    assert error(y[kept], whole[kept].double() / (1 - p)) < ROUNDING


@fused
def test_fused_dropout_masks_are_independent_of_each_other_and_within():
    masks = [(dropped(0.5, seed)[0] != 0).double() - 0.5 for seed in (0, 1)]
    one = masks[0]
    pairs = [masks, *((one, one.roll(1, axis)) for axis in range(4)), (one, one.roll((1, 1), (1, 3)))]
    for left, right in pairs:
        assert abs((left * right).mean()) < 4 * 0.25 / one.numel() ** 0.5
    # A mean over any axis has the variance of independent masks.
    for axis in range(4):
        others = [other for other in range(4) if other != axis]
        count = one.numel() / one.shape[axis]
        assert one.mean(others).square().max() < 16 * 0.25 / count


@fused
def test_fused_dropout_is_a_function_of_the_seed_and_its_gradient_has_the_same_mask():
    y, gradient, _ = dropped(0.5, 0)
    again, same, _ = dropped(0.5, 0)
    assert torch.equal(y, again)
    assert torch.equal(gradient, same)
    assert not torch.equal(y, dropped(0.5, 1)[0])
    norm, x, _, _ = example((4, 32, 16, 16), None, 8)
    x = x.double().requires_grad_()
    whole = published(norm, x, activation=True)
    (expected,) = torch.autograd.grad(whole, x, (y != 0).double() / 0.5)
    assert error(gradient, expected) < 2 * ROUNDING


@fused
def test_layers_draw_masks_of_their_own_and_recomputed_ones_again():
    network = randomised(UNet((3, 8, 8), None, **SMALL, dropout=0.5)).train()
    checkpointed = copy.deepcopy(network)
    checkpointed.gradient_checkpointing = True
    masks, gradients = [], []
    for layer in network.modules():
        if isinstance(layer, Conv):  # the second convolutions get features after dropout
            layer.register_forward_pre_hook(lambda _, inputs: masks.append(inputs[0] == 0))
    for model in (network, checkpointed):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(2, 3, 8, 8), torch.ones(2)).square().sum().backward()
        gradients.append([weight.grad for weight in model.parameters()])
    masks = [mask for mask in masks if mask.double().mean() > 0.3]
    assert len(masks) > 4
    for i, mask in enumerate(masks):
        same = [other for other in masks[:i] if other.shape == mask.shape]
        assert all((mask == other).double().mean() < 0.7 for other in same)
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@fused
def test_fused_dropout_of_nearly_all_features_is_finite():
    assert dropped(1 - 1e-9, 0)[0].isfinite().all()


@fused
def test_fused_dropout_is_off_in_evaluation():
    norm, x, _, _ = example((2, 6, 4, 4), None)
    assert torch.equal(norm(x, dropout=Dropout(0.5).eval()), norm(x))
    assert torch.equal(norm(x, dropout=Dropout(0.0)), norm(x))


def test_norm_in_float64_is_that_of_torch_exactly():
    norm, x, emb, _ = example((2, 6, 4, 4), "scale_shift", dtype=torch.float64)
    assert emb is not None
    norm = norm.double()
    scale, shift = emb[..., None, None].chunk(2, dim=1)
    plain = group_norm(x, 3, norm.weight, norm.bias, norm.eps)
    assert torch.equal(norm(x), plain)
    assert torch.equal(
        norm(x, scale_shift=emb, activation=True), silu(torch.addcmul(shift, plain, 1 + scale))
    )


@fused
@pytest.mark.parametrize("modulation", ["added", "scale_shift"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_second_derivatives_are_those_of_the_formula(modulation, p):
    norm, x, emb, dy = example((3, 6, 4, 4), modulation, dtype=torch.float32)
    assert emb is not None
    torch.manual_seed(0)
    y = norm(torch.ones_like(x), dropout=Dropout(p))  # 0 where features are dropped

    def second(layer, mask):
        inputs = [part.to(layer.weight.dtype).requires_grad_() for part in (x, emb, dy)]
        torch.manual_seed(0)
        drop = Dropout(p) if mask is None else None
        y = layer(inputs[0], **{modulation: inputs[1]}, activation=True, dropout=drop)
        gradient = inputs[2] if mask is None else inputs[2] * mask / (1 - p)
        first = torch.autograd.grad(y, [*inputs[:2], layer.weight], gradient, create_graph=True)
        return torch.autograd.grad([part.sin().sum() for part in first], [*inputs, layer.weight])

    found, expected = second(norm, None), second(copy.deepcopy(norm).double(), (y != 0).double())
    assert (y != 0).double().mean() == pytest.approx(1 - p, abs=0.1)
    for mine, exact in zip(found, expected, strict=True):
        assert error(mine, exact) < 2e-4


@fused
def test_transforms_of_torch_work():
    norm, x, _, dy = example((3, 6, 4, 4), None, dtype=torch.float32)
    of_one = torch.func.vmap(lambda image: norm(image[None], activation=True)[0])
    close(of_one(x), norm(x, activation=True), 1e-5)
    step = 1e-6
    wide = copy.deepcopy(norm).double()
    expected = (wide(x.double() + step * dy) - wide(x.double() - step * dy)) / (2 * step)
    close(torch.func.jvp(norm, (x,), (dy,))[1].double(), expected, 1e-4)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(norm(forward_ad.make_dual(x, dy)))
    assert dual.tangent is not None
    close(dual.tangent.double(), expected, 1e-4)


@pytest.mark.parametrize("part", ["added", "scale_shift", "weight"])
def test_tangents_of_other_inputs_in_forward_mode(part):
    norm, x = GroupNorm(2, 4), torch.randn(3, 4, 6, 6)
    given = {"added": torch.randn(3, 4), "scale_shift": torch.randn(3, 8), "weight": torch.rand(4)}
    tangent = torch.randn_like(given[part])

    def output(value):
        state = {"weight": value} if part == "weight" else {}
        return torch.func.functional_call(norm, state, (x,), {} if state else {part: value})

    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(output(forward_ad.make_dual(given[part], tangent)))
    assert dual.tangent is not None
    norm, x, step = norm.double(), x.double(), 1e-6
    ahead, behind = (output(given[part].double() + sign * step * tangent.double()) for sign in (1, -1))
    close(dual.tangent.double(), (ahead - behind) / (2 * step), 1e-4)


@fused
def test_network_without_a_compiler_agrees(monkeypatch):
    network = randomised(UNet((3, 8, 8), None, **SMALL))
    x, c_noise = (
        torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([3.0, 500.0]),
    )
    exact = network(x, c_noise)
    with torch.autocast("cpu", torch.bfloat16):
        fused = network(x, c_noise)
        monkeypatch.setattr(group_norm_module, "_functions", lambda _: None)
        plain = network(x, c_noise)
    assert not torch.equal(fused, plain)
    assert error(fused, exact.double()) < 0.03
    assert error(plain, exact.double()) < 0.03


@fused
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_features_of_a_network_stay_in_channels_last_order(channels, bf16):
    network = UNet((channels, 8, 8), None, **{**SMALL, "attention_resolutions": [4]})
    seen = []
    for layer in network.modules():
        if isinstance(layer, GroupNorm):
            layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        network(torch.randn(2, channels, 8, 8), torch.ones(2))
    assert len(seen) > 10
    assert all(x.is_contiguous(memory_format=CHANNELS_LAST[4]) for x in seen)


@fused
def test_gradients_have_the_order_of_their_weights_without_a_copy():
    network = randomised(UNet((1, 8, 8), None, **{**SMALL, "attention_resolutions": [4]}))
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.randn(2, 1, 8, 8), torch.ones(2)).square().sum().backward()
    for name, weight in network.named_parameters():
        assert weight.grad is not None
        assert weight.grad.stride() == weight.stride(), name


@fused
def test_network_in_float32_agrees_without_a_compiler(monkeypatch):
    network = randomised(UNet((3, 8, 8), None, **{**SMALL, "attention_resolutions": [4]}))
    draw = torch.Generator().manual_seed(0)
    x, c_noise = torch.randn(2, 3, 8, 8, generator=draw), torch.tensor([3.0, 500.0])
    fused_values = network(x, c_noise)
    monkeypatch.setattr(group_norm_module, "_functions", lambda _: None)
    plain = network(x, c_noise)
    assert not torch.equal(fused_values, plain)
    close(fused_values, plain, 1e-5)


def test_other_features_keep_their_order(monkeypatch):
    assert not is_fused(torch.zeros(2, 3, 4, dtype=torch.bfloat16))  # signals
    monkeypatch.setattr(group_norm_module, "_prefers_channels_last", lambda: False)
    x = torch.randn(2, 3, 4, 4)
    assert channels_last(x) is x
