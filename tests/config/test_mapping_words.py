"""Mappings on a command line: `label={age: 40}`, `label.age=[0,20]`, and sentences in `prompt=`."""

import pytest

from diffusion_cli.config import as_typed, load, load_grid
from diffusion_cli.config.mapping_words import decoded, with_mappings
from diffusion_cli.errors import UsageError
from diffusion_cli.system.compat import parse_override


def value_of(command, *words, name="label"):
    return load(command, words).model_dump()[name]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["label={species: frog, age: 40}"], {"species": "frog", "age": "40"}),
        (["label={species:frog,age:40}"], {"species": "frog", "age": "40"}),
        (["label={age: [0, 20], species: null}"], {"age": ["0", "20"], "species": None}),
        (["label={größe: 3, hair colour: 'red, dark'}"], {"größe": "3", "hair colour": "red, dark"}),
        (["label={'a: b': x}"], {"a: b": "x"}),
        (["label={name: it's}"], {"name": "it's"}),
        (["label=[{species: frog}, {species: cat, age: 1}]"], [{"species": "frog"}, {"species": "cat", "age": "1"}]),
        (["label=[frog, {species: cat}]"], ["frog", {"species": "cat"}]),
        (["label.age=40"], {"age": "40"}),
        (["label.age=[0,20]", "label.a=[frog,'red, cat']"], {"age": ["0", "20"], "a": ["frog", "red, cat"]}),
        (["label.age=null"], {"age": "null"}),
        (["label={species: frog, age: 1}", "label.age=2"], {"species": "frog", "age": "2"}),
        (["label={}"], {}),
        (["label=frog"], "frog"),
        (["label=[0,1]"], ["0", "1"]),
        (["label=a{1}b"], "a{1}b"),
    ],
)  # fmt: skip
def test_a_label_is_read_as_a_mapping_of_its_names(words, expected):
    assert value_of("sample", *words) == expected
    typed = as_typed("sample", words)
    assert as_typed("sample", typed) == typed


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["label={age"], "label={age: not a mapping of names to values; write label={name: value}"),
        (["label={age}"], "label={age}: not a mapping of names to values; write label={name: value}"),
        (["label={age: 1, age: 2}"], "label={age: 1, age: 2}: contains age twice; leave one out"),
        (["label=frog", "label.age=2"], "label.age: conflicts with label=frog; leave one of them out"),
        (["label.age=1,2"], "label.age=1,2: several values; write label.age=[1,2]"),
        (["prompt=x", "prompts=a.txt"], "prompts=a.txt: conflicts with prompt=; leave one of them out"),
        (["prompt=''"], "prompt: contains an empty text; leave it out for no text"),
    ],
)
def test_a_wrong_word_is_one_line(words, line):
    with pytest.raises(UsageError) as error:
        load("sample", words)
    assert str(error.value) == line


def test_a_comparison_has_a_row_for_each_value_of_an_attribute():
    found = load_grid("compare", ["label.age=[0,2.5]", "label={species: frog}"])
    assert [values for values, _ in found] == [{"label.age": 0}, {"label.age": 2.5}]
    assert [config.model_dump()["label"] for _, config in found] == [
        {"species": "frog", "age": "0"},
        {"species": "frog", "age": "2.5"},
    ]


def test_a_comparison_has_a_row_for_each_prompt():
    found = load_grid("compare", ["prompt=[a seven, 'a red, big seven']"])
    assert [values for values, _ in found] == [{"prompt": "a seven"}, {"prompt": "a red, big seven"}]
    assert [config.model_dump()["prompt"] for _, config in found] == ["a seven", "a red, big seven"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("prompt=a red seven", "a red seven"),
        ("prompt=a red, big seven", "a red, big seven"),
        ('prompt="a red, big seven"', "a red, big seven"),
        ("prompt=[a seven, 'a red, big three']", ["a seven", "a red, big three"]),
        ("prompt=it's (very) big; or: x=1", "it's (very) big; or: x=1"),
        ("prompt=7", "7"),
        ('prompt=json:{"a": 1}', 'json:{"a": 1}'),
        ('output=json:{"a": 1}', 'json:{"a": 1}'),
        ("prompt=null", None),
    ],
)
def test_a_prompt_is_read_as_it_is_typed(word, expected):
    assert value_of("sample", word, name=word.partition("=")[0]) == expected


def test_the_values_of_a_mapping_outside_the_label_have_their_own_types():
    word = with_mappings("guidance.scales", "{age: 2, text: 5.5, glasses: true, name: 'a, b'}", as_text=False)
    expected = {"age": 2, "text": 5.5, "glasses": True, "name": "a, b"}
    assert decoded(parse_override(f"guidance.scales={word}").value()) == expected


@pytest.mark.parametrize(
    ("command", "words", "line"),
    [
        (
            "train",
            ["dataset=folder", "dataset.path=x", "dataset.label={age: numbr, glasses: yes_no}"],
            "dataset.label.age=numbr: must be category, yes_no or number; did you mean number?",
        ),
        (
            "sample",
            ["guidance=cfg", "guidance.scales={age: x}"],
            "guidance.scales.age=x: must be a number",
        ),
        ("sample", ["seed={a: true}"], "seed={a: true}: must be an integer"),
    ],
)
def test_a_wrong_value_in_a_mapping_is_named(command, words, line):
    with pytest.raises(UsageError) as error:
        load(command, words)
    assert str(error.value) == line
