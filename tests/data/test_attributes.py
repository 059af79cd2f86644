"""Types and values of attributes, from the cells of columns."""

import math
from datetime import date
from typing import Any

import pytest
import torch

from diffusion_cli.conditions import AttributeDescription
from diffusion_cli.data.attributes import Attributes, Column, Kind, attributes, chosen_columns, kinds_of
from diffusion_cli.errors import UsageError


def of(
    columns: dict[str, list[Any]], train: list[int] | None = None, stated: dict[str, Kind] | None = None
) -> Attributes:
    """The attributes of columns, with images named 0.png, 1.png, ...; `stated`: types by column."""
    count = len(next(iter(columns.values())))
    rows = torch.arange(count) if train is None else torch.tensor(train)
    kinds: dict[str, Kind | None] = dict.fromkeys(columns)
    kinds |= stated or {}
    return attributes({name: Column(cells) for name, cells in columns.items()}, kinds, rows, "{}.png".format)


def plain(values: torch.Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def test_types_are_inferred_and_shown():
    found = of({
        "age": ["7", "8.5", "", "1e1", "-3"],
        "species": ["cat", "frog", "cat", "NA", "ant"],
        "glasses": ["yes", "No", "null", "TRUE", "false"],
        "code": [0, 1, 1, None, 0],
        "flag": [True, False, None, True, True],
    })  # fmt: skip
    assert [str(each) for each in found.descriptions] == [
        "age: number, -3 to 10", "species: 3 classes", "glasses: yes/no", "code: number, 0 to 1", "flag: yes/no",
    ]  # fmt: skip
    assert found.descriptions[1].values == ("ant", "cat", "frog")
    assert found.descriptions[2].values == ("no", "yes")
    assert plain(found.values["age"]) == [7, 8.5, None, 10, -3]
    assert found.values["species"].tolist() == [1, 2, 1, -1, 0]
    assert found.values["glasses"].tolist() == [1, 0, -1, 1, 0]
    assert found.values["flag"].tolist() == [1, 0, -1, 1, 1]
    assert found.remarks == (
        "dataset.label: age: number, -3 to 10 (1 missing); species: 3 classes (1 missing); "
        "glasses: yes/no (1 missing); code: number, 0 to 1 (1 missing); flag: yes/no (1 missing)",
    )


def test_dtypes_are_those_of_conditions():
    found = of({"age": [1, 2], "species": ["a", "b"], "glasses": ["no", "yes"]})
    assert [value.dtype for value in found.values.values()] == [torch.float32, torch.int64, torch.int64]


@pytest.mark.parametrize("missing", ["", "  ", "NA", "n/a", "NaN", "null", None, float("nan")])
def test_each_word_for_a_missing_value(missing: Any):
    found = of({"age": [1, missing, 2], "species": ["a", missing, "b"]})
    assert plain(found.values["age"]) == [1, None, 2]
    assert found.values["species"].tolist() == [0, -1, 1]


def test_numbers_are_classes_only_if_stated_and_then_in_numeric_order():
    cells = ["10", "9", "0.5", "10"]
    assert of({"size": cells}).descriptions[0].kind == "number"
    stated = of({"size": cells, "other": [1, 2, 3, 4]}, stated={"size": "category"})
    assert stated.descriptions[0].values == ("0.5", "9", "10")
    assert stated.values["size"].tolist() == [2, 1, 0, 2]


def test_zero_and_one_are_yes_and_no_only_if_stated():
    assert of({"glasses": ["0", "1"]}).descriptions[0].kind == "number"
    stated = of({"glasses": ["0", "1.0", 1, True]}, stated={"glasses": "yes_no"})
    assert stated.values["glasses"].tolist() == [0, 1, 1, 1]


def test_the_range_is_that_of_the_training_images():
    found = of({"age": ["5", "100", "7", "-4"]}, train=[0, 2])
    assert (found.descriptions[0].low, found.descriptions[0].high) == (5, 7)
    assert plain(found.values["age"]) == [5, 100, 7, -4]


def test_one_category_alone_is_the_class():
    found = of({"species": ["b", "a", "NA"]})
    assert found.descriptions == (AttributeDescription(name="label", kind="category", values=("a", "b")),)
    assert found.class_names == ("a", "b")
    assert found.labels is not None
    assert found.labels.tolist() == [1, 0, -1]
    assert found.values == {}


@pytest.mark.parametrize(
    ("columns", "chief"),
    [
        ({"age": [1, 2], "place": ["x", "y"], "species": ["a", "b"]}, ("x", "y")),
        ({"place": ["x", "y"], "label": ["a", "b"]}, ("a", "b")),
        ({"place": ["x", "y"], "label": [1, 2]}, ("x", "y")),
        ({"age": [1, 2], "glasses": ["no", "yes"]}, None),
    ],
)
def test_metrics_use_the_column_label_or_the_first_category(columns: dict, chief: tuple[str, ...] | None):
    found = of(columns)
    assert found.class_names == chief
    assert (found.labels is None) == (chief is None)
    assert [each.name for each in found.descriptions] == [*columns]


def test_the_label_of_several_columns_is_kept_once():
    found = of({"label": ["a", "b"], "age": [1, 2]})
    assert [*found.values] == ["age"]
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1]


def test_names_of_classes_keep_their_order():
    columns = {"label": Column([2, 0, -1, None], ("z", "y", "x")), "age": Column([1, 2, 3, 4])}
    found = attributes(columns, {"label": None, "age": None}, torch.arange(4), str)
    assert found.class_names == ("z", "y", "x")
    assert found.labels is not None
    assert found.labels.tolist() == [2, 0, -1, -1]


def test_two_forms_of_a_letter_are_one_class():
    found = of({"species": ["\u00e9", "e\u0301", "f"], "age": [1, 2, 3]})
    assert found.values["species"].tolist() == [1, 1, 0]


def test_many_classes_with_few_images_have_a_remark():
    found = of({"name": [f"person {number}" for number in range(12)]})
    assert "12 classes for 12 images are too many to learn" in found.remarks[1]


@pytest.mark.parametrize(
    ("cells", "stated", "line"),
    [
        (
            ["1", "2", "old", "3", "4", "new"], None,
            "dataset.label=age: 2 rows are not numbers: 'old' in 2.png, 'new' in 5.png, unlike the others; correct "
            "them, or state dataset.label={age: category}",
        ),
        (
            ["a", "7", "b"], None,
            "dataset.label=age: 1 row is a number: '7' in 1.png, unlike the others; correct them, or state "
            "dataset.label={age: category}",
        ),
        (
            ["1", "a", "b", "c", "d"], "number",
            "dataset.label={age: number}: 4 rows are not numbers: 'a' in 1.png, 'b' in 2.png, 'c' in 3.png and 1 more; "
            "correct them, or state another type",
        ),
        (
            ["yes", "no", "maybe"], "yes_no",
            "dataset.label={age: yes_no}: 1 row is neither yes nor no: 'maybe' in 2.png; correct them, or state "
            "another type",
        ),
        ([True, False], "number", "dataset.label={age: number}: 2 rows are not numbers: 'True' in 0.png"),
        (["1e39", "1"], "number", "dataset.label={age: number}: 1 row is not a number: '1e39' in 0.png"),
        ([10**400, 1], "number", "dataset.label={age: number}: 1 row is not a number: '1000"),
        ([[1], "a"], None, "dataset.label=age: 1 row is neither text nor number: '[1]' in 0.png; correct them"),
        (
            ["1,5", "2,5"], None,
            "dataset.label=age: has a decimal comma in '1,5', '2,5'; write numbers with a point, or state "
            "dataset.label={age: category}",
        ),
        (
            ["2024-01-31", "2023-12-24 08:00", "NA"], None,
            "dataset.label=age: has dates such as '2024-01-31'; write numbers, such as years, or days since the first "
            "date, or state dataset.label={age: category}",
        ),
        (
            ["3", "31.1.2024"], None, "dataset.label=age: has dates such as '31.1.2024'; write numbers, such as years",
        ),
        ([date(2024, 1, 31)], None, "dataset.label=age: has dates such as '2024-01-31'; write numbers, such as years"),
        (
            ["20240131", "20240102", "5", "16777217.0"], None,
            "dataset.label=age: 2 rows are integers that float32 rounds: '20240131' in 0.png, '16777217.0' in 3.png; "
            "subtract or divide, so that they are smaller, or state dataset.label={age: category}",
        ),
        ([2**60 + 1, 0], "number", "dataset.label=age: 1 row is an integer that float32 rounds: '1152921504606846977'"),
        ([-16777217.0, 0], None, "dataset.label=age: 1 row is an integer that float32 rounds: '-16777217.0' in 0.png"),
        (
            ["", "NA", None], None,
            "dataset.label=age: all values are missing; complete the column, or leave it out",
        ),
        (["3", "3.0", ""], None, "dataset.label=age: has one value only, '3'; leave it out"),
        (["x", "x"], None, "dataset.label=age: has one value only, 'x'; leave it out"),
    ],
)  # fmt: skip
def test_wrong_cells_have_one_line(cells: list[Any], stated: Kind | None, line: str):
    with pytest.raises(UsageError) as caught:
        of({"age": cells}, stated=None if stated is None else {"age": stated})
    assert str(caught.value).startswith(line)
    assert len(caught.value.lines) == 1


def test_large_numbers_that_float32_has_are_kept():
    cells = [2**24, 20240132, "33554432", "1e11", 2.0**60, 123456789.5]
    expected = torch.tensor([2**24, 20240132, 33554432, 1e11, 2.0**60, 123456789.5], dtype=torch.float32)
    assert torch.equal(of({"size": cells}).values["size"], expected)


def test_dates_are_classes_if_this_is_stated():
    stated = of({"day": ["2024-01-31", "2023-12-24"], "size": [1, 2]}, stated={"day": "category"})
    assert stated.descriptions[0].values == ("2023-12-24", "2024-01-31")


@pytest.mark.parametrize(
    ("train", "found"), [([0], "one value only, 1"), ([2], "no value")], ids=["one", "none"]
)
def test_training_images_need_two_numbers(train: list[int], found: str):
    with pytest.raises(UsageError, match=rf"^dataset\.label=age: has {found} in the training images"):
        of({"age": ["1", "2", ""]}, train=train)


def test_each_wrong_column_has_its_line():
    with pytest.raises(UsageError) as caught:
        of({"age": ["1", "a"], "species": ["", ""], "size": ["1", "2"]})
    assert [problem.value for problem in caught.value.problems] == ["age", "species"]


def test_a_stated_type_that_contradicts_class_names_is_refused():
    with pytest.raises(UsageError, match=r"^dataset\.label=label: has class names such as 'a'.*not number"):
        attributes({"label": Column([0, 1], ("a", "b"))}, {"label": "number"}, torch.arange(2), str)


def test_the_value_of_the_key():
    assert kinds_of("age") == {"age": None}
    assert kinds_of(["age", "species"]) == {"age": None, "species": None}
    assert kinds_of({"age": "category"}) == {"age": "category"}


@pytest.mark.parametrize(
    ("chosen", "line"),
    [
        ([], r"dataset\.label=\[\]: names no column; name a column, or set null"),
        ({}, r"dataset\.label=\{\}: names no column; name a column, or set null"),
        (["age", "age"], r"dataset\.label=age: is named twice; name it once"),
        (["text"], r"dataset\.label=text: is the name of another condition; rename the column"),
    ],
)
def test_wrong_values_of_the_key(chosen: list[str], line: str):
    with pytest.raises(UsageError, match=f"^{line}$"):
        kinds_of(chosen)


def test_missing_columns_are_named():
    columns = {"species": Column([]), "age": Column([])}
    assert [*chosen_columns(columns, {"age": None}, "labels.csv")] == ["age"]
    with pytest.raises(UsageError) as caught:
        chosen_columns(columns, {"specie": None, "weight": None}, "labels.csv")
    assert caught.value.lines == (
        "dataset.label=specie: no such column in labels.csv; did you mean species?",
        "dataset.label=weight: no such column in labels.csv; choose from species, age",
    )
