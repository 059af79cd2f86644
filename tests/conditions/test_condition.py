"""Values that a network is told: rows, missing values, joining; and their description."""

import math
from typing import Any

import pytest
import torch

from diffusion_cli.conditions import AttributeDescription, Condition, Conditions, TextDescription

MIXED = {
    "label": torch.tensor([1, 2]),
    "age": torch.tensor([1.0, 2.0]),
    "image": torch.ones(2, 1, 2, 2),
    "text": torch.tensor([[1, 2], [3, -1]]),
}


def same(one: Condition, other: Condition) -> bool:
    equal = all(
        torch.equal(one.values[name].nan_to_num(9), other.values[name].nan_to_num(9)) for name in one.values
    )
    return list(one.values) == list(other.values) and equal


def test_a_dropped_value_is_missing_in_every_kind_of_tensor() -> None:
    condition = Condition(MIXED)
    dropped = condition.dropped(where=torch.tensor([False, True]))
    assert same(dropped.rows(torch.tensor([0])), condition.rows(torch.tensor([0])))
    assert same(dropped.rows(torch.tensor([1])), condition.dropped().rows(torch.tensor([1])))
    assert dropped.values["label"].tolist() == [1, -1]
    assert dropped.values["age"].isnan().tolist() == [False, True]
    assert dropped.values["image"][1].isnan().all()


def test_only_the_named_values_are_dropped() -> None:
    dropped = Condition(MIXED).dropped(["age"])
    assert dropped.values["age"].isnan().all()
    assert all(dropped.values[name] is MIXED[name] for name in ("label", "image", "text"))


def test_rows_of_a_joined_condition_are_its_parts() -> None:
    short = Condition({name: value[:1] for name, value in MIXED.items()} | {"text": torch.tensor([[7]])})
    joined = Condition.cat([Condition(MIXED), short])
    assert same(joined.rows(torch.arange(2)), Condition(MIXED))
    assert joined.values["text"].tolist() == [[1, 2], [3, -1], [7, -1]]
    assert len(joined) == 3


def test_labels_are_a_condition() -> None:
    labels = torch.tensor([3, 0])
    assert Condition.of(labels).get("label") is labels
    assert len(Condition.of(None)) == 0
    condition = Condition(MIXED)
    assert Condition.of(condition) is condition


@pytest.mark.parametrize("conditions", [
    Conditions.of(3),
    Conditions(attributes=(AttributeDescription(name="age", kind="number", low=0.0, high=96.0),), image=1),
    Conditions(text=TextDescription(length=8, vocabulary=50)),
])  # fmt: skip
def test_a_stored_description_is_the_same(conditions: Conditions) -> None:
    assert Conditions(**conditions.model_dump()) == conditions


def test_a_description_of_labels_alone_has_only_classes() -> None:
    assert Conditions.of(3).num_classes == 3
    assert Conditions.of(3).only_classes
    assert Conditions.of(None).only_classes
    age = AttributeDescription(name="age", kind="number", low=0.0, high=96.0)
    assert not Conditions(attributes=(age,)).only_classes
    assert not Conditions(image=1).only_classes
    assert not Conditions(
        attributes=(AttributeDescription(name="label", kind="number", low=0.0, high=1.0),)
    ).only_classes
    assert Conditions(attributes=(age,), image=1).names == ("age", "image")


AGE = {"name": "age", "kind": "number", "low": 0.0, "high": 96.0}


@pytest.mark.parametrize(
    ("stored", "problem"),
    [
        ({"attributes": [{"name": "species", "kind": "category"}]}, "0 values do not fit the kind category"),
        (
            {"attributes": [{"name": "old", "kind": "yes_no", "values": ["no"]}]},
            "1 values do not fit the kind",
        ),
        ({"attributes": [{**AGE, "values": ["a"]}]}, "1 values do not fit the kind number"),
        ({"attributes": [AGE, AGE]}, "two attributes have the same name"),
        ({"attributes": [{**AGE, "name": "image"}]}, "an attribute cannot have the name image"),
        ({"attributes": [{**AGE, "name": "text"}]}, "an attribute cannot have the name text"),
        ({"attributes": [{**AGE, "low": math.nan}]}, "attributes.0.low"),
        ({"attributes": [{**AGE, "high": math.inf}]}, "attributes.0.high"),
        ({"attributes": [{**AGE, "low": 97.0}]}, "low is above high"),
        ({"text": {"length": 4}}, "either a vocabulary or features"),
        ({"text": {"length": 4, "vocabulary": 9, "features": 3}}, "either a vocabulary or features"),
    ],
)
def test_a_contradictory_description_is_refused(stored: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Conditions(**stored)
