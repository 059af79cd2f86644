"""The reader of CSV and JSON Lines: line breaks, missing cells, and bounds of memory."""

import tracemalloc

import pytest

from diffusion_cli.data import text_tables
from diffusion_cli.data.text_tables import read_table
from diffusion_cli.errors import FormatError

SEPARATORS = "\u2028\u2029\x85"
"""Letters at which Python splits lines, and which CSV and JSON allow in texts."""


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("a.jsonl", '{"file": "a", "text": "x@y"}\r\n\n{"file": "b", "text": "z"}'),
        ("a.csv", "file,text\r\na,x@y\r\n\r\nb,z\r\n"),
    ],
)
@pytest.mark.parametrize("separator", SEPARATORS)
def test_only_line_breaks_end_a_line(name, table, separator):
    found = read_table(table.replace("@", separator).encode(), name, ("file", "text"))
    assert found.files() == ["a", "b"]
    assert found.columns["text"] == [f"x{separator}y", "z"]


def test_each_line_break_of_csv_ends_a_row():
    found = read_table(b'\xef\xbb\xbffile,text\ra, "1\r2"\rb,3\n\nc\r\n', "a.csv", ("file", "text"))
    assert found.columns == {"file": ["a", "b", "c"], "text": ["1\r2", "3", ""]}


def test_only_kept_columns_stay():
    found = read_table(b'{"a": 1}\n{"b": [{}], "c": ["x"]}\n{"c": null}', "a.jsonl", ("c", "d"))
    assert found == (["a", "b", "c"], {"c": [None, ["x"], None]})
    assert read_table(b"a,a,c\n1,2,3", "a.csv", ("c",)) == (["a", "a", "c"], {"c": ["3"]})


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("a.jsonl", "\n".join(f'{{"{number}": 0}}' for number in range(20_000))),
        ("a.csv", "a," * 20_000 + "\n0" * 20_000),
    ],
)
def test_tables_of_few_bytes_and_many_cells_are_refused(name, table):
    """Each has less than 300 kB, and 400 million cells."""
    tracemalloc.start()
    with pytest.raises(FormatError, match=r"^has more than 10000 columns; remove those that are not used$"):
        read_table(table.encode(), name, ("5",))
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("a.jsonl", '{"a": 1, "b": 1, "c": 1}\n' * 4),
        ("a.jsonl", '{"a": 1}\n' * 7 + '{"b": 1}'),
        ("a.jsonl", '{"a": ["x", "x", "x"]}\n' * 3),
        ("a.csv", "a,b,c\n" + "1,2,3\n" * 4),
    ],
)
def test_the_cells_in_memory_are_bounded(monkeypatch, name, table):
    monkeypatch.setattr(text_tables, "MOST_CELLS", 11)
    line = "^has more than 11 cells in the columns to read; choose fewer columns$"
    with pytest.raises(FormatError, match=line):
        read_table(table.encode(), name, ("a", "b", "c"))
    assert read_table(table.encode(), name, ("b",))


def test_long_lines_are_refused(monkeypatch):
    monkeypatch.setattr(text_tables, "LONGEST_TEXT", 8)
    for name in ("a.csv", "a.jsonl"):
        with pytest.raises(FormatError, match=r"^has a line 2 of more than 8 bytes; split it$"):
            read_table(b"\n" + b"x" * 9, name, ("a",))


@pytest.mark.parametrize("row", [r'{"a": "\uD83d"}', r'{"\ud800": 1}'])
def test_half_of_a_surrogate_pair_is_refused(row):
    with pytest.raises(FormatError, match=r"^has an invalid letter in line 1; repair it$"):
        read_table(row.encode(), "a.jsonl", ("a",))
    assert read_table(rb'{"a": "\ud83d\ude00"}', "a.jsonl", ("a",)).columns == {"a": ["\U0001f600"]}


@pytest.mark.parametrize("value", ['{"x": 1}', "[1]", '[["x"]]'])
def test_nested_values_are_refused(value):
    with pytest.raises(FormatError, match=r"^has .* in line 1, which is no text, number or list of texts"):
        read_table(f'{{"a": {value}}}'.encode(), "a.jsonl", ("a",))
