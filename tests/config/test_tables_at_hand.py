"""The number and size of images in tables and tars, for the values that `auto` stands for."""

import io
import tarfile
from pathlib import Path

import pytest

from diffusion_cli.config import tables_at_hand
from diffusion_cli.config.at_hand import OwnImages, own_images
from helpers.recipes import picture, train_config

pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
TARGET = "diffusion_cli.data.HuggingFace"


def image_table():
    """Five images as the library `datasets` stores them, between other columns."""
    images = [{"bytes": picture(20 + number, 60), "path": None} for number in range(5)]
    return pyarrow.table({"n": range(5), "image": images, "label": [{"a": 1}] * 5})


def as_parquet(folder: Path) -> Path:
    parquet.write_table(image_table(), folder / "train.parquet", row_group_size=2)
    return folder / "train.parquet"


def as_saved(folder: Path) -> Path:
    """Two splits, and what the library caches beside one."""
    for name in ("train/data-00000-of-00001.arrow", "train/cache-0.arrow", "test/data-00000-of-00001.arrow"):
        (folder / name).parent.mkdir(exist_ok=True)
        with pyarrow.ipc.new_stream(folder / name, image_table().schema) as file:
            file.write_table(image_table(), max_chunksize=2)
    return folder


def tar(path: Path, images: list[bytes]) -> None:
    """An archive with a text beside each image."""
    with tarfile.open(path, "w") as file:
        for number, image in enumerate(images):
            for name, data in ((f"{number}.png", image), (f"{number}.cls", b"1")):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                file.addfile(entry, io.BytesIO(data))


def as_tars(folder: Path) -> Path:
    tar(folder / "a.tar", [picture(20, 60), picture(21, 60)])
    tar(folder / "b.tar", [picture(22, 60), picture(23, 60), picture(24, 60)])
    return folder / "*.tar"


@pytest.mark.parametrize("write", [as_parquet, as_saved, as_tars])
def test_tables_and_tars_are_counted_and_measured(tmp_path, write, on_gpu):
    path = str(write(tmp_path))
    node = {"_target_": TARGET, "path": path, "split": "train[:50%]"}
    assert own_images(node) == OwnImages(5, 22)
    assert own_images(node | {"max_images": 3}) == OwnImages(3, 22)
    assert own_images({"path": path}) is None  # of a folder of images
    assert train_config("dataset=huggingface", f"dataset.path={path}").dataset["resolution"] == 16
    for file in tmp_path.rglob("*.[apt]*[rtw]"):
        file.write_bytes(b"damaged")
    assert own_images(node) is None


def test_the_images_of_a_long_tar_are_estimated(tmp_path, monkeypatch):
    tar(tmp_path / "a.tar", [picture(20, 60) + bytes(10_000)] * 30)
    monkeypatch.setattr(tables_at_hand, "MOST_MEMBERS", 10)
    found = own_images({"_target_": TARGET, "path": str(tmp_path / "a.tar")})
    assert found is not None
    assert found.number == pytest.approx(30, rel=0.1)
    assert found.size == 20
