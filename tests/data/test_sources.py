"""Sources of conditions: the rows of tables, and random choices by row."""

import torch

from diffusion_cli.data.batches import Batches
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.data.sources import ColumnSource, conditions_digest, row_uniform
from diffusion_cli.system.tensors import digest


def test_batches_have_the_values_of_their_rows():
    images = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).repeat(1, 1, 2, 2)
    ages = torch.arange(20).float() / 2
    data = MemoryImages(images, torch.arange(20) % 3).with_conditions({"age": ColumnSource(ages)})
    for _, batch in zip(range(4), Batches(data, 8, seed=3, flip=True), strict=False):
        assert batch.condition is not None
        assert torch.equal(batch.condition.values["age"], ages[batch.index])
        assert torch.equal(batch.condition.values["label"], batch.index % 3)
        part = batch.part(torch.tensor([5, 1]))
        assert part.condition is not None
        assert torch.equal(part.condition.values["age"], ages[batch.index[[5, 1]]])


def test_random_numbers_of_a_row_depend_on_row_and_draw_alone():
    rows = torch.tensor([7, 0, 12345])
    numbers = row_uniform(rows, 5, 3)
    assert torch.equal(row_uniform(rows.flip(0), 5, 3), numbers.flip(0))
    assert torch.equal(row_uniform(rows[1:2], 5, 3), numbers[1:2])
    assert not torch.equal(row_uniform(rows, 6, 3), numbers)
    assert torch.equal(row_uniform(rows, None, 3), row_uniform(rows, 0, 3))


def test_random_numbers_are_uniform_and_uncorrelated():
    count = 20000
    numbers = torch.cat([row_uniform(torch.arange(count), draw, 2) for draw in (1, 2)], dim=1)
    assert ((numbers >= 0) & (numbers < 1)).all()
    bins = (numbers * 10).long()
    for column in bins.T:
        assert (column.bincount(minlength=10) - count / 10).abs().max() < 5 * (count * 0.09) ** 0.5
    correlations = torch.corrcoef(torch.cat([numbers, numbers.roll(1, 0)], dim=1).T)
    assert (correlations - torch.eye(8)).abs().max() < 5 / count**0.5


def test_a_number_named_label_is_a_condition_and_no_class():
    images = torch.zeros(12, 1, 2, 2, dtype=torch.uint8)
    numbers = torch.arange(12) + 0.5
    data = MemoryImages(images, torch.arange(12) % 3).with_conditions({"label": ColumnSource(numbers)})
    batch = next(iter(Batches(data, 8, seed=3, flip=False)))
    assert batch.condition is not None
    assert torch.equal(batch.condition.values["label"], numbers[batch.index])
    for share in (batch, batch.part(torch.tensor([5, 1]))):
        assert share.labels is not None
        assert torch.equal(share.labels, share.index % 3)


def test_the_hash_of_classes_is_that_of_earlier_versions_and_others_change_it():
    labels, ages = torch.tensor([0, 1]), torch.tensor([1.0, 2.0])
    assert conditions_digest(labels, {}) == digest({"labels": labels})
    assert conditions_digest(None, {}) is None
    with_ages = conditions_digest(labels, {"age": ColumnSource(ages)})
    assert with_ages not in (
        conditions_digest(labels, {}),
        conditions_digest(labels, {"size": ColumnSource(ages)}),
    )
    assert with_ages != conditions_digest(labels, {"age": ColumnSource(ages + 1)})
    assert with_ages == conditions_digest(labels, {"age": ColumnSource(ages.clone())})
