"""Optimal transport of noise to the images of a batch."""

from itertools import permutations

import pytest
import torch

from diffusion_cli.conditions import Condition
from diffusion_cli.diffusion.coupling import equal_conditions, optimal_noise

NAN = float("nan")


def batch(count, *shape, seed=0):
    return torch.randn(2, count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cost(x0, eps):
    return (x0 - eps).square().sum()


def test_no_order_of_the_noise_is_nearer_to_the_images():
    x0, eps = batch(6, 1, 3, 3)
    best = min(cost(x0, eps[list(order)]) for order in permutations(range(6)))
    assert cost(x0, optimal_noise(x0, eps, None)) == pytest.approx(float(best))


def test_single_values_are_paired_in_order():
    x0, eps = batch(50, 1)
    coupled = optimal_noise(x0, eps, None)
    torch.testing.assert_close(coupled[x0[:, 0].argsort()], eps.sort(dim=0).values)


def test_the_order_is_the_same_under_autocast():
    x0, eps = batch(20, 1, 3, 3)
    x0, eps = x0.float(), eps.float()
    with torch.autocast("cpu", torch.bfloat16):
        coupled = optimal_noise(x0, eps, None)
    assert torch.equal(coupled, optimal_noise(x0, eps, None))


def test_only_images_with_equal_conditions_exchange_noise():
    x0, eps = batch(40, 1, 2, 2)
    condition = Condition({"label": torch.arange(40) % 4, "age": torch.tensor([1.0, NAN]).repeat(20)})
    groups = equal_conditions(condition, 40)
    assert len(groups.unique()) == 4  # the class says whether the age is missing
    coupled = optimal_noise(x0, eps, condition)
    assert not torch.equal(coupled, eps)
    for group in groups.unique():
        mine = groups == group
        assert torch.equal(
            coupled[mine].flatten(1).sort(dim=0).values, eps[mine].flatten(1).sort(dim=0).values
        )
        assert torch.equal(coupled[mine], optimal_noise(x0[mine], eps[mine], None))


def test_conditions_are_equal_only_if_all_their_values_are():
    label, age = torch.tensor([0, 0, 0, -1, -1, 0]), torch.tensor([1.0, 2.0, NAN, NAN, 0.0, 1.0])
    image = torch.zeros(6, 1, 2, 2)
    image[5, 0, 1, 1] = 0.5
    groups = equal_conditions(Condition({"label": label, "age": age}), 6)
    assert groups[0] == groups[5]
    assert len(groups.unique()) == 5
    assert len(equal_conditions(Condition({"label": label, "age": age, "image": image}), 6).unique()) == 6
    assert equal_conditions(None, 3).tolist() == [0, 0, 0]


def test_texts_of_other_lengths_and_masks_are_compared_whole():
    text = torch.tensor([[5, 6, -1], [5, 6, 7], [5, 6, -1], [-1, -1, -1]])
    groups = equal_conditions(Condition({"text": text}), 4)
    assert groups[0] == groups[2]
    assert len(groups.unique()) == 3
