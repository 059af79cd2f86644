"""Attributes predicted by one linear layer: their loss, their units and their errors."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from diffusion_cli.conditions import AttributeDescription
from diffusion_cli.metrics.features.heads import AttributeErrors, AttributeHeads

SPECIES = AttributeDescription(name="species", kind="category", values=("cat", "dog", "frog"))
GLASSES = AttributeDescription(name="glasses", kind="yes_no", values=("no", "yes"))
AGE = AttributeDescription(name="age", kind="number", low=0, high=96)
ALL = (SPECIES, AGE, GLASSES)
NAN = float("nan")


@pytest.fixture
def targets() -> dict[str, Tensor]:
    return {
        "species": torch.tensor([0, 2, -1, 1]),
        "age": torch.tensor([20.0, NAN, 40.0, 90.0]),
        "glasses": torch.tensor([1, -1, 0, 1]),
    }


@pytest.fixture
def outputs() -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def test_the_loss_is_the_sum_of_those_of_each_attribute_over_its_own_values(targets, outputs):
    heads = AttributeHeads.fitted(ALL, targets)
    assert heads.outputs == 6
    ages = torch.tensor([20.0, 40.0, 90.0])
    standard = (ages - ages.mean()) / ages.std(correction=0)
    expected = (
        cross_entropy(outputs[[0, 1, 3], :3], torch.tensor([0, 2, 1]))
        + (standard - outputs[[0, 2, 3], 3]).square().mean() / 2
        + cross_entropy(outputs[[0, 2, 3], 4:], torch.tensor([1, 0, 1]))
    )
    assert float(heads.loss(outputs, targets)) == pytest.approx(float(expected), rel=1e-6)


def test_a_missing_value_teaches_nothing(targets, outputs):
    outputs.requires_grad_()
    AttributeHeads.fitted(ALL, targets).loss(outputs, targets).backward()
    gradient = outputs.grad
    assert gradient is not None
    missing = torch.zeros(4, 6, dtype=torch.bool)
    missing[2, :3] = missing[1, 3] = missing[1, 4:] = True
    assert torch.equal(gradient == 0, missing)


def test_a_batch_without_any_value_has_a_loss_of_zero_and_no_gradient(outputs):
    missing = {"species": torch.full((4,), -1), "age": torch.full((4,), NAN), "glasses": torch.full((4,), -1)}
    outputs.requires_grad_()
    loss = AttributeHeads.fitted(ALL, missing).loss(outputs, missing)
    loss.backward()
    assert loss.item() == 0
    assert outputs.grad is not None
    assert not outputs.grad.any()


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_the_unit_of_a_number_changes_its_predictions_and_nothing_else(targets, outputs, unit):
    heads = AttributeHeads.fitted(ALL, targets)
    other = targets | {"age": unit * targets["age"] + 273 * unit}
    scaled = AttributeHeads.fitted(ALL, other)
    assert float(scaled.loss(outputs, other)) == pytest.approx(float(heads.loss(outputs, targets)), rel=1e-5)
    expected = unit * (heads.predicted(outputs)["age"] + 273)
    assert torch.allclose(scaled.predicted(outputs)["age"], expected, rtol=1e-6)
    assert torch.equal(scaled.predicted(outputs)["species"], heads.predicted(outputs)["species"])


def test_outputs_of_the_wanted_values_have_no_error_and_others_have_theirs(targets):
    heads = AttributeHeads.fitted(ALL, targets)
    mean, spread = heads.scales["age"]
    exact = torch.zeros(4, 6)
    exact[[0, 1, 3], [0, 2, 1]] = exact[[0, 2, 3], [5, 4, 5]] = 9.0
    exact[:, 3] = (targets["age"].nan_to_num() - mean) / spread
    errors = AttributeErrors(heads)
    for rows in ([0], [1, 2], [3]):
        errors.update(exact[rows], {name: value[rows] for name, value in targets.items()})
    assert [errors.mean(name) for name in targets] == pytest.approx([0, 0, 0], abs=1e-4)
    assert errors.counts == {"species": 3, "age": 3, "glasses": 3}

    other = AttributeErrors(heads)
    other.update(exact, {"species": torch.tensor([1, 2, 2, 1]), "age": torch.tensor([21.0, 1, 37, NAN])})
    assert other.mean("species") == 0.5
    assert other.mean("age") == pytest.approx((1 + 1 + 3) / 3, rel=1e-5)
    assert other.bias("age") == pytest.approx((-1 - 1 + 3) / 3, rel=1e-4)
    assert other.mean("glasses") is None
    assert other.counts["glasses"] == 0


def test_equal_numbers_do_not_divide_by_zero(outputs):
    same = {"age": torch.full((4,), 30.0)}
    heads = AttributeHeads.fitted((AGE,), same)
    assert math.isfinite(float(heads.loss(outputs[:, :1], same)))
    assert heads.predicted(torch.zeros(1, 1))["age"].tolist() == [30]
