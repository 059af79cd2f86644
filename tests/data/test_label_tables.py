"""Tables of values beside image files."""

import json
from pathlib import Path

import pytest

from diffusion_cli.data.attributes import kinds_of
from diffusion_cli.data.file_names import file_names
from diffusion_cli.data.label_tables import file_columns
from diffusion_cli.errors import UsageError

FILES = ("a/0.png", "a/1.png", "b/2.png")
CSV = "file,age,species\nb/2.png,30,frog\na/0.png,10,cat\na/1.png,,ant\n"
OBJECTS = [
    {"file": "b/2.png", "age": 30, "species": "frog"},
    {"file": "a/0.png", "age": 10, "species": "cat"},
    {"species": "ant", "file": "a/1.png"},
]


def lines(*objects: dict) -> str:
    return "\n".join(map(json.dumps, objects))


def cells(path: Path, *names: str) -> dict[str, list]:
    found = file_columns(path, [*file_names(path), *FILES], [*FILES], kinds_of([*names]))
    return {name: [*column.cells] for name, column in found.items()}


def test_values_of_csv_follow_the_images(tmp_path):
    (tmp_path / "labels.csv").write_text(CSV)
    assert cells(tmp_path, "species", "age") == {"species": ["cat", "ant", "frog"], "age": ["10", "", "30"]}


def test_values_of_json_lines_keep_their_types(tmp_path):
    (tmp_path / "labels.jsonl").write_text("\ufeff" + lines(*OBJECTS) + "\n\n")
    assert cells(tmp_path, "age", "species") == {"age": [10, None, 30], "species": ["cat", "ant", "frog"]}


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_the_tables_of_image_folders_of_hugging_face(tmp_path, name):
    text = CSV if name.endswith("csv") else lines(*OBJECTS)
    (tmp_path / name).write_text(text.replace("file", "file_name"))
    assert cells(tmp_path, "species") == {"species": ["cat", "ant", "frog"]}


def test_the_first_table_is_used(tmp_path):
    (tmp_path / "labels.csv").write_text(CSV)
    (tmp_path / "metadata.jsonl").write_text("{}")
    assert cells(tmp_path, "species") == {"species": ["cat", "ant", "frog"]}


def test_class_folders_are_the_label_unless_the_table_has_one(tmp_path):
    assert cells(tmp_path, "label") == {"label": ["a", "a", "b"]}
    (tmp_path / "labels.csv").write_text(CSV)
    assert cells(tmp_path, "label", "age") == {"label": ["a", "a", "b"], "age": ["10", "", "30"]}
    (tmp_path / "labels.csv").write_text(CSV.replace("species", "label"))
    assert cells(tmp_path, "label") == {"label": ["cat", "ant", "frog"]}


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        (
            "labels.csv", CSV,
            "dataset.label=weight: no such column in labels.csv; choose from label, age, species",
        ),
        (
            "other.csv", CSV,
            "dataset.label=weight: no labels.csv, labels.jsonl, metadata.csv or metadata.jsonl at the top of {}; "
            "create one with the columns file and weight",
        ),
        ("labels.csv", "age\n1", "dataset.path={}: labels.csv has no column file or file_name, and begins with 'age'"),
        (
            "labels.csv", "file,weight,weight\n",
            "dataset.path={}: labels.csv has more than one column 'weight'; rename them",
        ),
        (
            "labels.csv", CSV + "a/0.png,1,x\n",
            "dataset.path={}: labels.csv has more than one row for 'a/0.png'; keep one row per image",
        ),
        (
            "metadata.csv", CSV.replace("b/2", "b/3"),
            "dataset.path={}: metadata.csv names files that do not exist: 'b/3.png'; remove these rows, or name images "
            "relative to the folder of metadata.csv, with /",
        ),
        (
            "labels.jsonl", lines(*OBJECTS[:2]),
            "dataset.path={}: labels.jsonl has no row for 'a/1.png'; add rows for them, or remove the images",
        ),
        ("labels.jsonl", "{}\n[1", "dataset.path={}: labels.jsonl has a line 2 that is not JSON"),
        ("labels.jsonl", "\n1", "dataset.path={}: labels.jsonl has no object in line 2; write one object"),
        ("labels.jsonl", '{"file": 3}', "dataset.path={}: labels.jsonl has a row without the name of an image"),
        ("labels.jsonl", "", "dataset.path={}: labels.jsonl is empty; write a row for each image, or remove it"),
        ("labels.jsonl", b"\n\xff", "dataset.path={}: labels.jsonl is not UTF-8 (line 2: invalid start byte)"),
    ],
)  # fmt: skip
def test_wrong_tables_have_one_line(tmp_path, name, text, line):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as caught:
        cells(tmp_path, "weight")
    assert str(caught.value).startswith(line.format(tmp_path))
    assert len(caught.value.lines) == 1


def test_a_table_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "labels.csv").write_text("file,age\n" + "x" * 2**16)
    with pytest.raises(UsageError, match=r"labels\.csv cannot be read \(is larger than 32768 bytes\)"):
        cells(tmp_path, "age")
