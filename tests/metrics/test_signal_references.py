"""Signals of the user as reference, and as training images of the feature classifier."""

import numpy as np
import pytest
import torch

from diffusion_cli.data import PicturedImages, Signals, pictured, shows_signals
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics import GivenReference
from diffusion_cli.metrics.features.classifier_training import shifted

RNG = np.random.default_rng(0)
VALUES = RNG.uniform(-2, 2, (6, 2, 16)).astype(np.float32)


@pytest.fixture
def dataset(tmp_path):
    np.save(tmp_path / "data.npy", RNG.uniform(-2, 2, (9, 2, 16)).astype(np.float32))
    return pictured(Signals("", path=str(tmp_path / "data.npy"), range=[-2, 2]))


@pytest.fixture(params=["folder", "npy", "npz"])
def path(request, tmp_path):
    place = tmp_path / f"in.{request.param}"
    if request.param == "folder":
        place.mkdir()
        for number, values in enumerate(VALUES):
            np.save(place / f"{number}.npy", values)
    elif request.param == "npy":
        np.save(place, VALUES)
    else:
        np.savez(place, signals=VALUES, labels=[0, 1, 0, 1, 1, 0])
    return place


def test_signals_of_a_path_are_a_reference(dataset, path):
    reference = GivenReference(dataset, path=str(path))
    assert isinstance(reference.images, PicturedImages)
    assert shows_signals(reference.images)
    rows = torch.arange(len(reference.images))
    torch.testing.assert_close(reference.images.stored(rows), torch.from_numpy(VALUES) / 2)
    torch.testing.assert_close(
        reference.images[rows][:, 0] / 127.5 - 1, torch.from_numpy(VALUES) / 2, atol=0.005, rtol=0
    )
    assert (reference.images.labels is None) == (path.suffix != ".npz")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (VALUES[:, :, :15], "has images of shape (2, 15); expected (2, 16)"),
        (VALUES.astype(np.int16), "has int16 values; expected float32, as in the dataset"),
        (VALUES.astype(np.uint8), "has uint8 of shape (6, 2, 16); signals are [N,L] or [N,C,L] of float32"),
    ],
    ids=["length", "integers", "bytes"],
)  # fmt: skip
def test_other_arrays_are_refused_in_a_line(dataset, tmp_path, values, line):
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(UsageError) as caught:
        _ = GivenReference(dataset, path=str(tmp_path / "x.npy")).images
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_channels_of_signals_are_not_shifted():
    images = torch.arange(5 * 3 * 20).view(5, 1, 3, 20).float()
    moved = shifted(images, 2, 0, rows=False)
    assert torch.equal(moved[:, :, :, 5:15] // 20, images[:, :, :, 5:15] // 20)  # each value is in its row
    assert not torch.equal(moved, images)
    by = (moved - images)[:, 0, :, 10]
    assert (by == by[:, :1]).all()
    assert torch.equal(shifted(images, 2, 0).diff(dim=3), moved.diff(dim=3))  # the same way along the rows
