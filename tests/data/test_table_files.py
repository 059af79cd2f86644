"""A table of images reads only files of its own dataset."""

from pathlib import Path
from zipfile import ZipFile

import pytest

from diffusion_cli.data.table_files import Origin, origin
from diffusion_cli.errors import FormatError


def content(place: Origin, path: Path | str) -> bytes:
    return place.content({"bytes": None, "path": str(path)})


@pytest.fixture
def own(tmp_path) -> Path:
    """A folder of a dataset, beside a private file."""
    (tmp_path / "private.png").write_bytes(b"private")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(b"a")
    (tmp_path / "set" / "images.parquet").touch()
    with ZipFile(tmp_path / "set" / "images.zip", "w") as archive:
        archive.writestr("b.png", b"b")
    return tmp_path / "set"


@pytest.mark.parametrize("path", [".", "images.parquet", "*.parquet", "i*/b/*.png"])
def test_files_of_the_own_folder_are_read_and_no_others(own, monkeypatch, path):
    place, private = origin(f"{own}/{path}", [own.parent / "cache"]), own.parent / "private.png"
    assert content(place, own / "a.png") == b"a"
    assert content(place, f"zip://b.png::{own}/images.zip") == b"b"
    for named in (
        private,
        own / ".." / "private.png",
        f"file://{private}",
        f"file://{own}/../private.png",
        f"zip://b.png::{own}/../private.zip",
        f"filecache://{own}/a.png::{own}/images.zip",
        f"local://{private}",
        f"{own}2/a.png",
        "http://localhost:1/a.png",
        "hf://datasets/owner/name@main/a.png",
    ):
        with pytest.raises(FormatError, match="outside of the dataset; store the images in the table"):
            content(place, named)
    (own / "link").symlink_to(own.parent / "cache")
    with pytest.raises(FileNotFoundError):  # of set/private.png
        content(place, own / "link" / ".." / "private.png")
    monkeypatch.chdir(own.parent)
    with pytest.raises(FormatError, match="outside of the dataset"):
        content(place, "private.png")
    assert content(place, "set/a.png") == b"a"
    assert place.content({"bytes": b"stored", "path": str(private)}) == b"stored"
    for nothing in (None, {"bytes": None, "path": None}):
        with pytest.raises(FormatError, match="has no image"):
            place.content(nothing)


def test_downloaded_and_unpacked_files_are_read(own):
    assert content(origin("owner/name", [own]), own / "a.png") == b"a"


@pytest.mark.parametrize(
    ("path", "mine", "others"),
    [
        (
            "owner/name",
            ["hf://datasets/owner/name@1a/x/a.png", "hf://datasets/owner/name/a.png"],
            [
                "hf://datasets/owner/name2/a.png",
                "hf://datasets/owner/name@1/../../b/a.png",
                "https://h/a.png",
            ],
        ),
        ("mnist", ["hf://datasets/mnist@1/a.png", "hf://datasets/o/mnist@1/a.png"], ["hf://datasets/o/m/a"]),
        ("hf://datasets/o/n@v1/*.zip", ["hf://datasets/o/n@1a/a.png"], ["hf://datasets/o/other@v1/a.png"]),
        (
            "https://host/a/x.zip?b=/c",
            ["https://host/a/b/c.png"],
            [
                "https://host/a/%2e%2e/b.png",
                "https://host/b.png",
                "https://host.org/a/b.png",
                "s3://host/a/b",
            ],
        ),
        ("zip://*.png::s3://bucket/x.zip", ["s3://bucket/x.zip"], ["s3://other/x.zip"]),
        ("https://host", [], ["https://host/a.png", "https://other/a.png"]),
    ],
)
def test_urls_are_those_of_the_own_repository_or_folder(path, mine, others, monkeypatch):
    read = []
    monkeypatch.setattr("fsspec.url_to_fs", read.append)
    for url in mine:
        for written in (url, f"zip://a.png::{url}"):
            with pytest.raises(TypeError):  # of the replaced file system, behind the check
                content(origin(path, []), written)
    assert len(read) == 2 * len(mine)
    for url in others:
        for written in (url, f"zip://a.png::{url}"):
            with pytest.raises(FormatError, match="outside of the dataset"):
                content(origin(path, []), written)
