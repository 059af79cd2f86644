"""Rows of conditions: plain data and their tensors."""

import math

import pytest
import torch

from diffusion_cli.conditions import AttributeDescription, Conditions, TextDescription
from diffusion_cli.conditions.rows import are_rows, encoded_rows, row_name, spread_rows

SPECIES = AttributeDescription(name="species", kind="category", values=("cat", "frog", "newt"))
GLASSES = AttributeDescription(name="glasses", kind="yes_no", values=("no", "yes"))
AGE = AttributeDescription(name="age", kind="number", low=10.0, high=90.0)
ALL = (SPECIES, GLASSES, AGE)


def letters(texts):
    """The first three letters of texts as numbers, padded with -1."""
    return torch.tensor([[*map(ord, text[:3]), *[-1] * (3 - len(text))] for text in texts])


def test_rows_have_their_values_and_others_are_missing():
    conditions = Conditions(attributes=ALL, text=TextDescription(length=3, vocabulary=256))
    rows = [
        {"species": "frog", "age": 40.0, "text": "ab"},
        {"glasses": "yes"},
        {"text": "abc", "glasses": "no"},
    ]
    found = encoded_rows(rows, conditions, letters)
    assert found.values["species"].tolist() == [1, -1, -1]
    assert found.values["glasses"].tolist() == [-1, 1, 0]
    assert found.values["age"].dtype == torch.float32
    assert found.values["age"][0] == 40
    assert found.values["age"][1:].isnan().all()
    assert found.values["text"].tolist() == [[97, 98, -1], [-1, -1, -1], [97, 98, 99]]


def test_features_of_missing_texts_are_missing():
    conditions = Conditions(text=TextDescription(length=3, features=2))
    found = encoded_rows([{"text": "ab"}, {}], conditions, lambda texts: torch.ones(len(texts), 3, 2))
    assert found.values["text"][0].eq(1).all()
    assert found.values["text"][1].isnan().all()


def test_spread_rows_have_each_category_in_turn_and_numbers_evenly():
    rows = spread_rows((AGE, SPECIES, GLASSES))
    assert len(rows) % 3 == 0
    assert len(rows) >= 100
    assert [row["species"] for row in rows[:6]] == [*SPECIES.values] * 2
    for some in (rows, rows[:60], [row for row in rows if row["species"] == "cat"]):
        ages = torch.tensor([row["age"] for row in some])
        assert 10 <= ages.min() < 18
        assert 82 < ages.max() <= 90
        assert ages.mean() == pytest.approx(50, abs=4)
        assert torch.tensor([row["glasses"] == "yes" for row in some]).float().mean() == pytest.approx(
            0.5, abs=0.1
        )
    young = [row for row in rows if row["age"] < 50]
    assert 0.4 < sum(row["glasses"] == "yes" for row in young) / len(young) < 0.6
    assert spread_rows((SPECIES,)) == [{"species": name} for name in SPECIES.values]


@pytest.mark.parametrize("others", [(AGE,), (AGE, GLASSES)])
def test_every_category_has_the_whole_range_of_other_attributes(others):
    for count in (*range(2, 151), 1000):
        names = tuple(map(str, range(count)))
        rows = spread_rows((AttributeDescription(name="kind", kind="category", values=names), *others))
        assert len(rows) == count * max(8, -(-100 // count))
        ages = torch.tensor([row["age"] for row in rows]).view(-1, count)
        spans = ages.amax(0) - ages.amin(0)
        assert spans.min() > 0.7 * (90 - 10), count
        assert ages.mean() == pytest.approx(50, abs=3)
        assert len(others) == 1 or all(
            {row["glasses"] for row in rows[kind::count]} == {"no", "yes"} for kind in range(count)
        ), count


def test_a_category_of_very_many_values_has_a_row_for_each():
    many = AttributeDescription(name="kind", kind="category", values=tuple(map(str, range(40_000))))
    assert len(spread_rows((many, AGE))) == 40_000


def test_a_row_is_named_by_its_values():
    assert row_name({"age": 40.0, "species": "frog", "glasses": "no"}, ALL) == "frog, no glasses, age 40"
    assert row_name({"glasses": "yes", "text": "a red seven"}, ALL) == "glasses, a red seven"
    assert row_name({"text": "a red seven above a blue three"}, ()) == "a red seven above a blue..."
    assert row_name({}, ALL) == "none"


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        [1],
        [{"a": None}],
        [{"a": math.nan}],
        [{"a": [1]}],
        [{1: 2.0}],
        [{"a": 10**400}],
        [{"a": -math.inf}],
    ],
)
def test_other_data_are_no_rows(value):
    assert not are_rows(value)
    assert are_rows([{}, {"a": 1, "b": "x"}])
