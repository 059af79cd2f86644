"""The table of super-resolution: kept results follow from their settings, with steps and network calls."""

import sys
from typing import Any

import torch

import compare_super_resolution
from compare_super_resolution import Task, held_out, kept, samplings

TASK = Task(["dataset=digits"], "data", 2, 7)


class Denoiser(torch.nn.Linear):
    evaluations = 0


class Reducer:
    """A model whose samples are their originals plus the number of its edits; each takes two calls a step."""

    def __init__(self) -> None:
        self.denoiser, self.edits = Denoiser(2, 2), 0

    def edit(self, name: str, images: torch.Tensor, *, steps: int, **settings) -> torch.Tensor:
        self.edits += 1
        self.denoiser.evaluations += 2 * steps * len(images)
        return images + self.edits


def test_results_are_made_again_only_for_other_weights_settings_or_originals(tmp_path):
    model: Any = Reducer()
    originals = held_out(TASK, 6)
    sampling = samplings(TASK, 10)["unconditional, DPS"]
    images, calls = kept(tmp_path, sampling, model, originals, 0)
    assert calls == 20
    assert torch.equal(kept(tmp_path, sampling, model, originals, 0)[0], images)
    assert model.edits == 1
    kept(tmp_path, sampling, model, originals, 6)
    kept(tmp_path, sampling, model, originals[:5], 0)
    assert kept(tmp_path, sampling._replace(steps=20), model, originals, 0)[1] == 40
    kept(tmp_path, sampling._replace(overrides=("edit.factor=4",)), model, originals, 0)
    assert model.edits == 5
    torch.nn.init.zeros_(model.denoiser.bias)
    kept(tmp_path, sampling, model, originals, 0)
    assert model.edits == 6


def test_both_models_have_a_mean_and_their_network_calls(monkeypatch, capsys, tmp_path):
    models = {"conditional": Reducer(), "unconditional": Reducer()}
    monkeypatch.setattr(compare_super_resolution, "train", lambda *words: None)
    monkeypatch.setattr("diffusion_cli.load", lambda run: models[run.name])
    monkeypatch.setattr(compare_super_resolution, "RESAMPLES", 20)
    (tmp_path / "digits").mkdir()
    words = ["--count", "40", "--samples", "3", "--steps", "10", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["compare_super_resolution.py", *words])
    compare_super_resolution.main()
    _, _, *lines = capsys.readouterr().out.splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[:4] for row in table] == [
        ["bicubic", "", "", ""],
        ["conditional", "ddim", "50", "100"],
        ["conditional, mean of 3", "ddim", "50", "300"],
        ["unconditional, DPS", "ddim", "10", "20"],
        ["unconditional, DPS, mean of 3", "ddim", "10", "60"],
        ["originals", "", "", ""],
    ]
    for row in table:
        distance, error = map(float, row[6].split(" ± "))
        assert distance >= 0
        assert error > 0
    assert [cell == "" for cell in table[-1][4:]] == [True, True, False]
    assert (tmp_path / "digits" / "comparison.png").stat().st_size > 1000
