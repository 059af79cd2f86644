"""Networks that see a window of an image at a time, with its position."""

from itertools import product

import pytest
import torch

from diffusion_cli.conditions import Condition, Conditions
from diffusion_cli.errors import UsageError
from diffusion_cli.networks import UNet
from diffusion_cli.networks.tiles import coordinates, position, windows
from helpers.networks import NCSNPP, SKIPS, SMALL, close, randomised


def network_of(shape, window, conditions=None, **changes) -> UNet:
    torch.manual_seed(0)
    options = SMALL | {"window": window, "window_overlap": 2} | changes
    return randomised(UNet(shape, conditions, **options)).double().eval()


def noised(*shape) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.linspace(3, 700, shape[0], dtype=torch.float64)


def test_coordinates_are_those_of_the_centres_of_pixels():
    whole = coordinates(position((4, 10), (0, 0), (4, 10))[None].double(), (4, 10))
    close(whole[0, 0, :, 3], torch.tensor([-0.75, -0.25, 0.25, 0.75], dtype=torch.float64), 1e-6)
    close(whole[0, 1, 2], torch.linspace(-0.9, 0.9, 10, dtype=torch.float64), 1e-6)
    part = coordinates(position((4, 10), (1, 6), (2, 3))[None].double(), (2, 3))
    close(part, whole[..., 1:3, 6:9], 1e-6)


@pytest.mark.parametrize("changes", [{}, {"patch_size": 2}, NCSNPP, SKIPS, {"learn_variance": True}], ids=str)
def test_the_output_is_the_weighted_mean_of_those_of_single_windows(changes):
    network = network_of((2, 16, 20), [8, 8], **changes)
    x, c_noise = noised(2, 2, 16, 20)
    tiles = windows((16, 20), (8, 8), 2)
    assert len(tiles) > 6
    expected = torch.zeros(())
    for place, (rows, columns) in zip(tiles.places, product(*tiles.ramps), strict=True):
        weight = torch.outer(rows, columns)
        where = position((16, 20), [part.start for part in place], (8, 8)).expand(2, -1)
        of_window = network(x[(..., *place)], c_noise, Condition({"position": where}))
        whole = torch.zeros(2, of_window.shape[1], 16, 20, dtype=torch.float64)
        whole[(..., *place)] = weight * of_window
        expected = expected + whole
    close(network(x, c_noise), expected)
    moved = network(x, c_noise, Condition({"position": torch.zeros(2, 4)}))
    assert not torch.allclose(moved, network(x, c_noise), atol=1e-3)


def test_conditions_reach_each_window():
    conditions = Conditions.of(3).model_copy(update={"image": 1})
    network = network_of((2, 12, 8), [8, 8], conditions, class_conditional=True)
    x, c_noise = noised(2, 2, 12, 8)
    image, label = torch.rand(2, 1, 12, 8, dtype=torch.float64), torch.tensor([0, 2])
    given = Condition({"image": image, "label": label})
    y = network(x, c_noise, given)
    far = image.clone()
    far[:, :, :4] = -1  # outside the second window, which alone reaches the last rows
    changed = network(x, c_noise, given.replaced({"image": far}))
    close(changed[:, :, 8:], y[:, :, 8:])
    assert not torch.allclose(changed[:, :, :4], y[:, :, :4], atol=1e-3)
    assert not torch.allclose(network(x, c_noise, given.replaced({"label": 1 - label})), y, atol=1e-3)


def test_other_sizes_and_volumes_have_windows_too():
    network = network_of((2, 12, 12, 12), [8, 8, 8], attention_resolutions=[])
    for sizes in [(12, 12, 12), (8, 8, 8), (20, 9, 8)]:
        x, c_noise = noised(1, 2, *sizes)
        assert network(x, c_noise).shape == x.shape


def test_a_window_larger_than_the_image_sees_it_whole():
    whole, limited = network_of((2, 8, 12), [8, 16]), network_of((2, 8, 12), [8, 12])
    x, c_noise = noised(2, 2, 8, 12)
    close(whole(x, c_noise), limited(x, c_noise))


def test_gradients_reach_the_whole_image():
    network = network_of((2, 16, 16), [8, 8])
    x, c_noise = noised(1, 2, 16, 16)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(network(x, c_noise).square().sum(), x)
    assert (gradient != 0).all()


@pytest.mark.parametrize(
    ("window", "overlap", "key"),
    [
        ([8], 2, "window"),
        ([8, 8, 8], 2, "window"),
        ([8, 8], 8, "window_overlap"),
        ([8, 4], 4, "window_overlap"),
    ],
)
def test_wrong_windows_are_named(window, overlap, key):
    with pytest.raises(UsageError, match=f"^{key}="):
        UNet((2, 16, 16), None, **(SMALL | {"window": window, "window_overlap": overlap}))
