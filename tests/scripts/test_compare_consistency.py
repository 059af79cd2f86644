"""The comparison of consistency functions on a mixture of Gaussians."""

import sys

import pytest
from torch import nn

import compare_consistency
from diffusion_cli.data import GaussianMixture
from diffusion_cli.diffusion.schedules import Cosine


class Oracle(nn.Module):
    """A model with the optimal denoiser of the mixture."""

    def __init__(self):
        super().__init__()
        self.schedule, self.mixture = Cosine(), GaussianMixture("")

    @property
    def denoiser(self):
        return self

    def denoise(self, x_t, t):
        return compare_consistency.exact(self.mixture, self.schedule, x_t, t)

    forward = denoise


def test_the_optimal_denoiser_has_exact_paths_but_is_no_consistency_function(monkeypatch, capsys):
    monkeypatch.setattr(compare_consistency, "trained", lambda folder, name, steps, words: Oracle())
    monkeypatch.setattr(sys, "argv", ["compare_consistency.py", "--count", "50"])
    compare_consistency.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [float(level) for level in rows[0][1:]] == list(compare_consistency.LEVELS)
    errors = {name: [float(error) for error in row] for name, *row in rows[2:]}
    assert max(errors["the teacher's paths"]) < 1e-3
    assert errors["the teacher's x_0"] == sorted(errors["the teacher's x_0"])
    # From noise, the end of a path differs from the mean by the deviation of the data.
    assert errors["the teacher's x_0"][-1] == pytest.approx(1, abs=0.3)
    assert errors["trajectory distillation"] == errors["the teacher's x_0"]
