"""Keys of cached latents: those of runs that an older version began are still valid."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_cli.data import Folder
from diffusion_cli.data.decoding import HighDepthDecoder, ImageDecoder, key_text
from diffusion_cli.formats import HighDepthImage
from diffusion_cli.training.latent_data import LatentDataset

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000040000000408000000008c9ac1a20000001c49444154789c6314e6e0e060b1e3e0e06071e2e0"
    "e060bcc8c1c101000e8401cfd66f046b0000000049454e44ae426082"
)
"""A gray image of 4 x 4 pixels."""
OLD_KEY = "0a6f07969215b44d"
"""The key of the version without `Decoder.srgb` and `Raster.mode` for two such images, and `Identity`."""
OLD_KEYS = [
    ({}, OLD_KEY),
    ({"range": [0, 300]}, "e27f50d190908a8f"),
    ({"masks": "masks"}, "a5d3d79f6d1a6ff1"),
]


class Identity(torch.nn.Module):
    """An autoencoder with a known digest."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))


def moments(images: Tensor) -> Tensor:
    return torch.cat([images, torch.zeros_like(images)], 1)


def dataset(place: Path, cache: Path, key: str, name: str = "images", **changes: Any) -> LatentDataset:
    for folder in (name, "masks"):
        (place / folder).mkdir(exist_ok=True)
        for number in range(2):
            (place / folder / f"{number}.png").write_bytes(PNG)
    if "masks" in changes:
        changes["masks"] = str(place / changes["masks"])
    arguments: dict[str, Any] = {
        "masks": None, "resolution": 4, "channels": 1, "range": None, "depth": "auto", "labels": "none",
        "background": "white", "flip": False, "val_fraction": 0.0, "in_memory": False, "num_workers": 0,
    }  # fmt: skip
    source = Folder("", 1, path=str(place / name), **(arguments | changes))
    space: Any = SimpleNamespace(
        autoencoder=Identity(), shape=source.shape, device=torch.device("cpu"), moments=moments
    )
    return LatentDataset(source, space, cache, {"train": key})


@pytest.mark.parametrize(("changes", "key"), OLD_KEYS, ids=["bytes", "numbers", "masks"])
def test_latents_that_an_older_version_keyed_are_encoded_again_if_missing(tmp_path, changes, key):
    latents = dataset(tmp_path, tmp_path / "cache", key, **changes)
    assert len(latents.load("train")) == 2


@pytest.mark.parametrize("word", ["faces", "faces.v1", "another"])
def test_cached_latents_are_found_by_their_key_under_any_name(tmp_path, word):
    cache = tmp_path / "cache"
    dataset(tmp_path, cache, OLD_KEY).load("train")
    (cache / f"latents-images-{OLD_KEY}").rename(cache / f"latents-{word}-{OLD_KEY}")
    found = dataset(tmp_path, cache, OLD_KEY, "faces.v1")
    assert len(found.load("train")) == 2
    assert [path.name for path in cache.iterdir()] == [f"latents-{word}-{OLD_KEY}"]


def test_new_behaviour_changes_the_key():
    shape = (1, 4, 4)
    texts = [key_text(ImageDecoder(shape, "white", False, srgb)) for srgb in (False, True)]
    assert texts[0] == "Decoder(shape=(1, 4, 4), background='white', reduced=False)"
    assert texts[1] == "Decoder(shape=(1, 4, 4), background='white', reduced=False, srgb=True)"
    form = HighDepthImage("uint8", [0.0], [255.0], "png", "LA")
    assert key_text(HighDepthDecoder(form, (2, 4, 4))) == (
        "DeepDecoder(form=Raster(dtype='uint8', low=[0.0], high=[255.0], file='png', mode='LA'), shape=(2, 4, 4))"
    )
