"""Captions of image files: text files beside them, tables, and columns of other datasets."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from diffusion_cli.data import HuggingFace
from diffusion_cli.data.base import Split
from diffusion_cli.data.captions import LONGEST, CaptionTable, cleaned, table_rows
from diffusion_cli.data.folder import Folder
from diffusion_cli.errors import FormatError, UsageError
from helpers.data import folder, write_images, zipped

SPLITS: tuple[Split, ...] = ("train", "val")


@pytest.fixture
def images(tmp_path) -> Path:
    """The images a/0.png, a/2.png, b/1.png and b/3.png."""
    return write_images(tmp_path / "set", 4)


def captions_of(dataset: Folder | HuggingFace, split: Split = "train") -> CaptionTable:
    captions = dataset.load(split).captions
    assert captions is not None
    return captions


def texts(dataset: Folder | HuggingFace, split: Split = "train") -> list[tuple[str, ...]]:
    return [*captions_of(dataset, split).texts]


def refusal(dataset: Folder | HuggingFace) -> str:
    with pytest.raises(UsageError) as error:
        texts(dataset)
    return str(error.value)


def remarks(dataset: Folder) -> list[str]:
    return [line.partition(": ")[2] for line in captions_of(dataset).remarks()]


def write_table(path: Path, rows: list[dict], name: str = "metadata.jsonl") -> None:
    (path / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def test_each_line_of_a_text_file_is_a_caption_of_the_image_beside_it(images, tmp_path):
    (images / "a/0.txt").write_bytes("\ufeffa cat\r\n\r\n  two   blanks \n".encode())
    (images / "a/2.TXT").write_text("café", encoding="utf-8")
    (images / "b/1.txt").write_text(" \n")
    expected = [("a cat", "two blanks"), ("café",), (), ()]
    for source in (images, zipped(images, tmp_path / "set.zip")):
        dataset = folder(source)
        assert dataset.captions
        assert texts(dataset) == expected
        assert remarks(dataset) == ["2 images without a caption: 'b/1.png', 'b/3.png'"]


def test_a_text_file_without_an_image_is_a_remark(images):
    for name in ("a/0.txt", "a/9.txt", "README.txt"):
        (images / name).write_text("a dog")
    assert "1 .txt file without an image: 'a/9.txt'" in remarks(folder(images))


@pytest.mark.parametrize("columns", [("file_name", "text"), ("file", "caption")])
def test_tables_name_images_relative_to_their_folder(images, columns):
    """Several rows of an image are several captions; so is a list in JSON."""
    file, caption = columns
    (images / "metadata.csv").write_text(
        f'{file},size,{caption}\na/0.png,3,"a red, big cat"\nb/3.png,1,x\na/0.png,2,again\nb/1.png,2,\n'
    )
    rows = [{file: "2.png", caption: ["one", "two\nlines"]}, {file: "0.png", caption: None}]
    write_table(images / "a", rows)
    (images / "a/0.txt").write_text("not used")
    expected = [("a red, big cat", "again"), ("one", "two lines"), (), ("x",)]
    assert texts(folder(images)) == texts(folder(images, captions="table")) == expected
    assert texts(folder(images, captions="txt")) == [("not used",), (), (), ()]
    none = folder(images, captions="none")
    assert (none.captions, none.load("train").captions) == (False, None)
    assert none.missing_captions == "dataset.captions=none ignores them"


def test_a_table_without_captions_leaves_text_files(images):
    """The table of classes has none."""
    rows = "".join(f"{name},c\n" for name in ("a/0.png", "a/2.png", "b/1.png", "b/3.png"))
    (images / "labels.csv").write_text(f"file,label\n{rows}")
    dataset = folder(images)
    assert refusal(dataset) == (
        "dataset.captions=auto: labels.csv has no captions: it needs a column file or file_name, and text or caption; "
        "write a .txt file beside each image, or a table metadata.csv with the columns file_name and text"
    )
    (images / "a/0.txt").write_text("a cat")
    assert texts(folder(images))[0] == ("a cat",)
    assert refusal(folder(images, captions="table")).startswith("dataset.captions=table: labels.csv has no")


def test_names_are_compared_in_one_unicode_form(images):
    (images / "a/0.png").rename(images / "cafe\u0301.png")
    write_table(images, [{"file_name": "caf\xe9.png", "text": "coffee"}])
    assert ("coffee",) in texts(folder(images))


def test_names_that_differ_in_case_alone_have_captions_of_their_own(images):
    for name in ("Cat", "cat", "DOG"):
        shutil.copy(images / "a/0.png", images / f"{name}.png")
    for name in ("Cat", "cat", "dog"):
        (images / f"{name}.txt").write_text(f"a {name}")
    dataset = folder(images)
    found = dict(zip(dataset.files, texts(dataset), strict=True))
    assert [found[f"{name}.png"] for name in ("Cat", "cat", "DOG")] == [("a Cat",), ("a cat",), ("a dog",)]
    (images / "Cat.txt").unlink()  # cat.txt is that of cat.png alone
    dataset = folder(images)
    found = dict(zip(dataset.files, texts(dataset), strict=True))
    assert [found[f"{name}.png"] for name in ("Cat", "cat")] == [(), ("a cat",)]


def test_names_of_text_files_are_compared_in_one_unicode_form(images):
    (images / "a/0.png").rename(images / "cafe\u0301.png")
    (images / "caf\xe9.txt").write_text("coffee")
    assert ("coffee",) in texts(folder(images))


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_tables_have_the_bound_of_text_files(images, name):
    def write(length: int, *, times: int = 1) -> None:
        rows = [("a/0.png", "x" * length)] * times
        lines = (
            ["file_name,text", *(f"{file},{text}" for file, text in rows)]
            if name.endswith("csv")
            else [json.dumps({"file_name": file, "text": text}) for file, text in rows]
        )
        (images / name).write_text("\n".join(lines))

    write(LONGEST)
    assert texts(folder(images))[0] == ("x" * LONGEST,)
    write(LONGEST // 2 + 1, times=2)
    assert f"{name} has captions of more than {LONGEST} bytes for a/0.png; shorten them" in refusal(
        folder(images)
    )


def test_rows_without_an_image_are_a_remark(images):
    write_table(images, [{"file_name": "a/0.png", "text": "x"}, {"file_name": "a/7.png", "text": "y"}])
    assert remarks(folder(images))[1] == "1 row of the table without an image: 'a/7.png'"
    write_table(images, [{"file_name": "0.png", "text": "x"}])
    assert "no image has a caption; 1 row of the table without an image: '0.png'" in refusal(folder(images))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a/0.txt", b"caf\xe9", "a/0.txt is not UTF-8 (line 1: unexpected end of data)"),
        (
            "a/0.txt",
            b"x" * (LONGEST + 1),
            f"a/0.txt is larger than {LONGEST} bytes; shorten it; an image may have 256 KiB of captions",
        ),
        ("a/0.txt", b"\n\n", "no image has a caption"),
        ("metadata.csv", b"file_name,text\na/0.png,one,two\n", "has more fields than its header in 'a/0.png,one,two'"),
        ("metadata.csv", b'file_name,text\na/0.png,"one\n', "metadata.csv is not valid CSV (line 2: "),
        ("metadata.csv", b"text,text,file\n", "metadata.csv has more than one column 'text'; rename"),
        ("metadata.csv", b"text,file\nx,\n", "metadata.csv has a row without the name of an image, but ''"),
        ("metadata.jsonl", b'{"file_name": "a/0.png", "text": "x"}\n{', "has a line 2 that is not JSON ("),
        ("metadata.jsonl", b"[1]", "metadata.jsonl has no object in line 1; write"),
        ("metadata.jsonl", b'{"file": "a/0.png", "text": 3}', "has the caption '3', which is no text and no list"),
        ("metadata.jsonl", b'{"file": 3, "text": "x"}', "has a row without the name of an image, but '3'"),
        ("metadata.jsonl", b'{"file": "a/0.png", "text": "\\ud800"}', "has an invalid letter in line 1; repair it"),
    ],
)  # fmt: skip
def test_captions_that_cannot_be_read_are_one_line(images, name, content, problem):
    """They are read at their first use: a model without texts is trained all the same."""
    (images / name).write_bytes(content)
    dataset = folder(images)
    assert len(dataset.load("train")) == 4
    line = refusal(dataset)
    assert line.startswith("dataset.captions=auto: ")
    assert problem in line
    assert "\n" not in line


def test_images_without_captions_give_the_reason(images):
    reasons = {
        captions: folder(images, captions=captions).missing_captions for captions in ("auto", "txt", "table")
    }
    assert reasons == {
        "auto": "there are no .txt files beside the images and there is no metadata.csv or metadata.jsonl",
        "txt": "there are no .txt files beside the images",
        "table": "there is no metadata.csv or metadata.jsonl",
    }
    assert not folder(images).captions


def test_a_long_caption_is_read_whole(images):
    long = " ".join(["word"] * 10_000)
    (images / "a/0.txt").write_text(long)
    assert texts(folder(images))[0] == (long,)


def test_captions_stay_with_their_images(images):
    for name in ("a/0", "a/2", "b/1", "b/3"):
        (images / f"{name}.txt").write_text(name)
    digests = {}
    for in_memory in (True, False):
        dataset = folder(images, val_fraction=0.5, in_memory=in_memory)
        for split in SPLITS:
            names = dataset.stream(split).names
            assert texts(dataset, split) == [(name.removesuffix(".png"),) for name in names]
            sent = pickle.loads(pickle.dumps(dataset.load(split)))
            digests[split] = captions_of(dataset, split).digest()
            assert sent.captions.digest() == digests[split]
    assert digests["train"] != digests["val"]
    (images / "a/0.txt").write_text("other")
    changed = folder(images, val_fraction=0.5)
    assert {split: captions_of(changed, split).digest() for split in SPLITS} != digests


def test_captions_of_some_images():
    table = CaptionTable.of([("a",), (), ("b", "c")])
    assert [*table.rows(torch.tensor([2, 0])).rows(torch.tensor([1, 0])).texts] == [("a",), ("b", "c")]
    assert table.digest() != CaptionTable.of([("a",), ("b",), ("c",)]).digest()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b""),
        ("a.csv", b"\n\n"),
        ("a.csv", b"file,label\nx,1\n"),
        ("a.jsonl", b""),
        ("a.jsonl", b"{}"),
        ("a.jsonl", b'{"text": "x"}'),
    ],
)
def test_a_table_may_have_no_captions(name, content):
    assert table_rows(content, name) is None


def test_a_row_in_json_may_leave_out_its_caption():
    rows = b'{"file": "a"}\n{"file": "b", "text": "x"}'
    assert table_rows(rows, "a.jsonl") == [("a", None), ("b", "x")]


@pytest.mark.parametrize("value", [3, {"a": 1}, ["a", None], [["a"]]])
def test_a_caption_is_a_text(value):
    with pytest.raises(FormatError, match="which is no text and no list of texts"):
        cleaned(value)


def test_a_wrong_caption_of_a_table_is_named_by_its_row(images):
    write_table(images, [{"file": "a/0.png", "text": "a cat"}, {"file": "a/2.png", "text": 3}])
    assert refusal(folder(images)) == (
        "dataset.captions=auto: metadata.jsonl in the row of 'a/2.png' has the caption '3', which is no text and no "
        "list of texts; repair it"
    )


# --- Datasets of the library datasets -------------------------------------------------


def hub(path: Path, rows: dict[str, list], **changes) -> HuggingFace:
    """A saved table of images with further columns."""
    library = pytest.importorskip("datasets")
    from PIL import Image

    count = len(next(iter(rows.values())))
    pixels = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(count)]
    images = library.Features({"image": library.Image()})
    table = library.Dataset.from_dict({"image": pixels}, features=images)
    for name, values in rows.items():
        table = table.add_column(name, values)
    table.save_to_disk(path)
    settings = {"data_dir": "", "resolution": 8, "flip": False, "val_fraction": 0.0, "num_workers": 0}
    return HuggingFace(path=str(path), **(settings | changes))


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_column_of_texts_has_the_captions(tmp_path, in_memory):
    rows = {"words": ["a", " ", None, "d"], "caption": [["a", "b"], [], ["c"], ["d"]], "number": [1, 2, 3, 4]}
    dataset = hub(tmp_path, rows, in_memory=in_memory)
    assert texts(dataset) == [("a", "b"), (), ("c",), ("d",)]
    words = hub(tmp_path / "words", rows, caption="words", val_fraction=0.5, in_memory=in_memory)
    found = {split: texts(words, split) for split in SPLITS}
    assert sorted([*found["train"], *found["val"]]) == [(), (), ("a",), ("d",)]
    for split in SPLITS:  # the first channel of an image is its row
        first = words.load(split)[torch.arange(2)][:, 0, 0, 0].tolist()
        assert found[split] == [(("a",), (), (), ("d",))[row] for row in first]
    assert captions_of(words).remarks() == [
        "dataset.caption=words: 2 images without a caption, such as image 1"
    ]


@pytest.mark.parametrize(
    ("caption", "line"),
    [
        ("wrods", "dataset.caption=wrods: no such column; choose from image, words, number, text"),
        ("number", "dataset.caption=number: has no texts; choose from words"),
        ("empty", "dataset.caption=empty: no image has a caption; choose another column"),
    ],
)
def test_a_column_without_captions_is_one_line(tmp_path, caption, line):
    rows = {"words": ["a", "b"], "number": [1, 2]} | {caption if caption == "empty" else "text": ["", ""]}
    with pytest.raises(UsageError) as error:
        texts(hub(tmp_path, rows, caption=caption))
    assert str(error.value).startswith(line)


def test_a_table_without_texts_gives_the_reason(tmp_path):
    dataset = hub(tmp_path, {"text": [1, 2]})
    assert not dataset.captions
    assert dataset.missing_captions == "it has no column text or caption with texts"
