"""`label=` of models with attributes, and prompts: the rows of values that they ask for."""

import re

import pytest

from diffusion_cli.commands import condition_values
from diffusion_cli.commands.condition_values import (
    is_class,
    outside_of_training,
    read_prompts,
    rows_of_label,
    rows_of_word,
    with_prompts,
)
from diffusion_cli.conditions import AttributeDescription
from diffusion_cli.errors import UsageError

SPECIES = AttributeDescription(name="species", kind="category", values=("cat", "frog"))
CLASS = SPECIES.model_copy(update={"name": "label"})
GLASSES = AttributeDescription(name="glasses", kind="yes_no", values=("no", "yes"))
AGE = AttributeDescription(name="age", kind="number", low=0.0, high=96.0)
ALL = (SPECIES, GLASSES, AGE)


@pytest.mark.parametrize(
    ("label", "rows"),
    [
        ({"species": "frog", "age": "40"}, [{"species": "frog", "age": 40.0}]),
        ({"species": 1, "glasses": True}, [{"species": "frog", "glasses": "yes"}]),
        ({"glasses": "False"}, [{"glasses": "no"}]),
        ({"age": "null", "species": None}, [{}]),
        ({}, [{}]),
        (
            {"age": ["0", 20], "species": ["frog", "cat"]},
            [{"age": age, "species": species} for age in (0.0, 20.0) for species in ("frog", "cat")],
        ),
        ([{"age": [1, 2]}, {"species": "cat"}], [{"age": 1.0}, {"age": 2.0}, {"species": "cat"}]),
        ("none", []),
        ([], []),
    ],
)
def test_a_label_gives_rows(label, rows):
    assert rows_of_label(label, ALL) == rows


def test_a_value_without_a_name_is_the_class_or_the_only_attribute():
    assert rows_of_label(["frog", {"age": 3}], (AGE, CLASS)) == [{"label": "frog"}, {"age": 3.0}]
    assert rows_of_label("40", (AGE,)) == [{"age": 40.0}]
    assert rows_of_label(["0", "20"], (AGE,)) == [{"age": 0.0}, {"age": 20.0}]


def test_all_spreads_the_values():
    rows = rows_of_label("all", ALL)
    assert {row["species"] for row in rows} == {"cat", "frog"}
    assert min(row["age"] for row in rows) < 10 < 86 < max(row["age"] for row in rows)


@pytest.mark.parametrize("others", [(), (AGE,)])
def test_a_class_has_priority_over_a_word(others):
    words = CLASS.model_copy(update={"values": ("none", "all", "cat", "null")})
    for word in words.values:
        assert rows_of_label(word, (*others, words)) == [{"label": word}]
        assert is_class(word, (*others, words))
    assert len(rows_of_word("all", (*others, words))) >= 4
    assert rows_of_word("none", (*others, words)) == []


def test_a_word_is_no_class_of_another_attribute():
    words = SPECIES.model_copy(update={"values": ("none", "all")})
    assert rows_of_label("none", (words, AGE)) == []
    assert len(rows_of_label("all", (words, AGE))) == 100
    assert not is_class(None, (words,))


@pytest.mark.parametrize(
    ("label", "line"),
    [
        ({"agee": 1}, "label.agee: the model has no such attribute; did you mean age?"),
        ({"species": "dog"}, "label.species=dog: unknown class; choose from cat, frog"),
        ({"species": "frgo"}, "label.species=frgo: unknown class; did you mean frog?"),
        ({"glasses": "maybe"}, "label.glasses=maybe: must be yes or no"),
        ({"age": "old"}, "label.age=old: must be a number"),
        ({"age": "nan"}, "label.age=nan: must be a number"),
        ({"age": "1e99"}, "label.age=1e99: must be a number from -1e37 to 1e37"),
        ({"age": 10**400}, f"label.age={10**400}: must be a number from -1e37 to 1e37"),
        ({"age": True}, "label.age=true: must be a number"),
        ({"age": []}, "label.age=[]: has no values; give one, or leave it out"),
        (
            {"age": [0] * 400, "species": ["cat"] * 400},
            "label: gives more than 100000 rows; use fewer values",
        ),
        (
            "frog",
            "label=frog: the model has the attributes species, glasses, age; write label={species: frog}",
        ),
        ("yes", "label=yes: the model has the attributes species, glasses, age; write label={glasses: yes}"),
        ("40", "label=40: the model has the attributes species, glasses, age; write label={age: 40}"),
        (
            "dog",
            "label=dog: the model has the attributes species, glasses, age; write label={species: <value>}",
        ),
    ],
)
def test_a_wrong_label_is_one_line(label, line):
    with pytest.raises(UsageError, match=f"^{re.escape(line)}$"):
        rows_of_label(label, ALL)


def test_numbers_outside_of_the_training_range_are_named():
    assert outside_of_training(rows_of_label({"age": [0, 96]}, ALL), ALL) == []
    assert outside_of_training(rows_of_label({"age": [120, 50, -1]}, ALL), ALL) == [
        "label.age=-1, 120: outside the range of the training images, 0 to 96; the samples are arbitrary"
    ]


def test_prompts_and_rows_take_turns():
    rows = [{"age": 1.0}, {"age": 2.0}]
    assert with_prompts([], ["a"]) == [{"text": "a"}]
    assert with_prompts(rows, []) == rows
    assert with_prompts(rows, ["a"]) == [{"age": 1.0, "text": "a"}, {"age": 2.0, "text": "a"}]
    assert [row["age"] for row in with_prompts(rows, list("abcd"))] == [1, 2, 1, 2]
    with pytest.raises(
        UsageError, match=r"^prompt: 3 prompts for 2 rows of label=; make one number a multiple"
    ):
        with_prompts(rows, list("abc"))


def test_a_file_of_prompts_has_one_in_each_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red, big seven\n\n  été \r\n".encode())
    assert read_prompts(str(file)) == ["a red, big seven", "été"]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "has no text; write one prompt in each line"),
        (b"a\n\xff\n", "not UTF-8 in line 2; save it as UTF-8"),
        (b"x" * 100_001, "has a line of more than 100000 characters; shorten it"),
        (b"a\n" * 4, "has more than 3 prompts; split it into several files"),
        (None, "No such file or directory; give a text file with one prompt in each line"),
    ],
)
def test_a_wrong_file_of_prompts_is_one_line(tmp_path, monkeypatch, content, line):
    monkeypatch.setattr(condition_values, "MOST_ROWS", 3)
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=f"^prompts={re.escape(f'{file}: {line}')}$"):
        read_prompts(str(file))
