"""The cached features of real images."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_cli.data import Dataset
from diffusion_cli.metrics import DatasetReference, Features, GrowingRows, KernelDistance, RealImages, Rows
from diffusion_cli.system.files import writing
from helpers.metrics import DATA, METRICS, Held, Projection, measured, pixels

CPU = torch.device("cpu")


def real_images(features: Features, cache_dir: Path, dataset: Dataset = DATA) -> RealImages:
    return RealImages(DatasetReference(dataset, split="train", stats=None), features, cache_dir)


@pytest.mark.parametrize("share", [0, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["moments", "features"])
def test_damaged_statistics_are_made_anew_with_one_line(tmp_path, capsys, kind, share) -> None:
    def known() -> Tensor:
        real = real_images(features, tmp_path)
        return real.moments().covariance if kind == "moments" else real.rows()[:]

    features = Projection()
    expected = known()
    (file,) = tmp_path.glob(f"{kind}-*.np[yz]") if kind == "moments" else tmp_path.glob("features-*.npy")
    content = bytearray(file.read_bytes())
    content[int(share * len(content))] ^= 1
    file.write_bytes(content)
    again = known()
    assert capsys.readouterr().err.startswith(f"diffuse: {file}: is damaged (")
    assert torch.equal(again, expected)
    seen = features.seen
    known()
    assert features.seen == seen


def test_features_of_an_earlier_version_are_used_and_checked_from_then_on(tmp_path, capsys) -> None:
    features = Projection()
    expected = real_images(features, tmp_path).rows()[:]
    (sums,) = tmp_path.glob("*.crc32")
    sums.unlink()
    assert torch.equal(real_images(features, tmp_path).rows()[:], expected)
    assert (features.seen, capsys.readouterr().err) == (200, "")
    content = bytearray((file := next(tmp_path.glob("features-*.npy"))).read_bytes())
    content[-2] ^= 64
    file.write_bytes(content)
    assert torch.equal(real_images(features, tmp_path).rows()[:], expected)
    assert "differs from its checksum" in capsys.readouterr().err


@pytest.mark.parametrize("room", [0, 3000])
def test_a_full_cache_changes_no_number_and_stops_nothing(tmp_path, capsys, monkeypatch, room) -> None:
    samples = pixels(50, 2)
    metrics = {"fid": METRICS["fid"], "kid": KernelDistance(subsets=3, subset_size=20, seed=0)}
    wanted = measured(metrics, Projection(), samples, DATA, tmp_path / "room")
    left = room

    class Disk(FileIO):
        def __init__(self, **_) -> None:
            super().__init__(tmp_path / "file", "w+")

        def write(self, data) -> int:
            nonlocal left
            taken = min(left, len(data))
            if not taken:
                raise OSError(errno.ENOSPC, "No space left on device")
            left -= taken
            return super().write(data[:taken])

    monkeypatch.setattr("diffusion_cli.metrics.rows.tempfile.TemporaryFile", Disk)
    monkeypatch.setattr("diffusion_cli.system.cache.atomic_write", refused)
    monkeypatch.setattr("diffusion_cli.metrics.rows.atomic_write", refused)
    monkeypatch.setattr("diffusion_cli.metrics.moments.atomic_write", refused)
    found = measured(metrics, Projection(), samples, DATA, tmp_path / "cache")
    assert found.results == wanted.results
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("diffuse: ") and "No space left on device" in line for line in lines)


@contextmanager
def refused(path: Path) -> Iterator[Path]:
    with writing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    yield path


def test_features_of_an_earlier_version_are_found_by_their_content(tmp_path) -> None:
    reference, again = DatasetReference(DATA, split="val", stats=None), Projection()
    RealImages(reference, Projection(), tmp_path).moments()
    (file,) = tmp_path.iterdir()
    file.rename(tmp_path / file.name.replace("-val-", "-held_out-"))
    assert "-held_out-" in next(tmp_path.iterdir()).name
    RealImages(reference, again, tmp_path).moments()
    assert again.seen == 0


def test_statistics_are_kept_apart_by_images_weights_and_precision(tmp_path) -> None:
    features = Projection()
    real_images(features, tmp_path).moments()
    real_images(features, tmp_path, Held(pixels(200, 7), pixels(40, 1))).moments()
    assert features.seen == 400
    real_images(features, tmp_path, Held(pixels(200, 7), pixels(40, 1), classes=2)).moments()
    assert features.seen == 400  # labels are not looked at
    features.digest = "1" * 64
    real_images(features, tmp_path).moments()
    assert features.seen == 600
    features.precision = "bf16"
    real_images(features, tmp_path).moments()
    assert features.seen == 800


def test_rows_come_back_in_the_order_they_were_taken_in(tmp_path) -> None:
    values = torch.randn(9000, 3, generator=torch.Generator().manual_seed(0))
    rows = GrowingRows(3, tmp_path)
    for part in values.split([1, 4999, 4000]):
        rows.append(part.double())
    assert list(tmp_path.iterdir()) == []  # the file has no name, and goes with the object
    order = np.random.RandomState(0).permutation(9000)
    assert torch.equal(torch.cat(list(rows.blocks())), values)
    assert torch.equal(torch.cat(list(rows.blocks(order))), values[order])
    rows.save(tmp_path / "rows.npy")
    assert torch.equal(Rows(np.load(tmp_path / "rows.npy", mmap_mode="r"))[:], values)


def test_rows_of_pixels_stay_bytes(tmp_path) -> None:
    rows = GrowingRows(64, tmp_path, torch.uint8)
    for part in pixels(30, 0).flatten(1).split(7):
        rows.append(part)
    assert rows[:].dtype == torch.uint8
    assert torch.equal(rows[np.array([29, 0])], pixels(30, 0).flatten(1)[[29, 0]])
    rows.save(tmp_path / "rows.npy")
    assert np.array_equal(np.load(tmp_path / "rows.npy"), rows.array)
