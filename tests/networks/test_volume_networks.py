"""Networks of signals and volumes."""

import pytest
import torch
from torch import Tensor

from diffusion_cli.networks import Classifier, UNet
from helpers.networks import NCSNPP, SMALL, close, option, randomised


def along(*sizes: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Inputs of any number of dimensions."""
    x = torch.randn(batch, 2, *sizes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.linspace(3, 700, batch, dtype=torch.float64)


def network_in(shape: tuple[int, ...], **changes) -> UNet:
    torch.manual_seed(0)
    return randomised(UNet((2, *shape), None, **(SMALL | changes))).double().eval()


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
