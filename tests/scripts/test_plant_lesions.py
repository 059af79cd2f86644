"""Planted lesions lie in their masks, and intensities alone detect them as computed."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

import plant_lesions
from diffusion_cli.data import Digits


@pytest.mark.parametrize("kind", ["digits", "volumes"])
def test_inputs_differ_from_healthy_ones_in_their_masks_alone(kind, tmp_path, monkeypatch, capsys):
    pytest.importorskip("nibabel")
    words = ["plant", kind, "--count", "4", "--healthy", "3", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    plant_lesions.main()
    assert "4 inputs in " in capsys.readouterr().out
    planted = plant_lesions.digits(4, 0) if kind == "digits" else plant_lesions.volumes(4, 3, 0)
    if kind == "digits":
        healthy = Digits("").stream("val")[torch.arange(4)][:, 0].numpy()
        written = [np.array(Image.open(tmp_path / "out" / "inputs" / f"{n:03d}.png")) for n in range(4)]
        assert (np.stack(written) == planted.inputs).all()
        apart = np.abs(planted.inputs.astype(int) - healthy)
        assert (apart[planted.truth] >= 127).all()
    else:
        draws = [plant_lesions._stream(0, number) for number in range(4)]
        healthy = np.stack([plant_lesions.ellipsoid(draw) for draw in draws])
        apart = np.abs(planted.inputs.astype(int) - healthy)
        assert np.median(apart[planted.truth]) > 400
        assert len(planted.healthy) == len(list((tmp_path / "out" / "healthy").glob("*.nii.gz"))) == 3
    assert not apart[~planted.truth].any()
    assert planted.truth.reshape(4, -1).any(1).tolist() == [False, True, False, True]
