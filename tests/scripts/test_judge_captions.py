"""The judge of captioned digits: the parts of a prompt that a sample shows, and the table of their shares."""

import sys

import pytest
import torch

import judge_captions
from diffusion_cli.data import CaptionedDigits
from diffusion_cli.data.captioned_digits import DigitPictures, Draws, Scene, parse
from judge_captions import Agreement, prompts, rendered, train


@pytest.mark.parametrize(
    ("found", "parts"),
    [
        ("a red seven above a blue three", (True, True, True, True)),
        ("a blue three below a red seven", (True, True, True, True)),
        ("a blue seven above a red three", (True, True, True, False)),
        ("a blue three above a red seven", (True, True, False, False)),
        ("a red seven left of a blue three", (True, True, False, False)),
        ("a red seven above a blue two", (False, True, True, False)),
        ("a red seven above a red three", (True, False, True, False)),
        ("a red seven", (False, False, False, False)),
    ],
)
def test_parts_of_a_prompt_count_alone(found, parts):
    assert Agreement.of(parse(found), parse("a red seven above a blue three")) == parts


def test_prompts_ask_for_one_held_out_combination_or_none():
    for held_out in (False, True):
        asked = prompts(50, held_out, seed=0)
        assert all(parse(prompt).is_held_out == held_out for prompt in asked)
        assert asked[:20] == prompts(20, held_out, seed=0)
        assert len(set(asked)) > 40


class Renderer:
    """A model that shows the digits of its prompts; without guidance those of a column are exchanged."""

    def __init__(self) -> None:
        self.scenes: dict[bytes, Scene] = {}

    def sample(self, count: int, *, prompt: list[str], guidance_scale: float, **settings) -> torch.Tensor:
        assert settings["guidance"] == "cfg"
        pictures, images = DigitPictures("val"), []
        for text, draws in zip(prompt, Draws.of(count, 0), strict=True):
            arrangement, items = parse(text)
            swap = guidance_scale == 1 and arrangement == "column"
            scene = Scene(arrangement, items[::-1] if swap else items)
            images.append(torch.from_numpy(pictures.render(scene, draws)))
            self.scenes[images[-1].numpy().tobytes()] = scene
        return torch.stack(images)


class Known:
    """A judge without errors: it remembers the scene of each image."""

    def __init__(self, model: Renderer) -> None:
        pixels, scenes = rendered(CaptionedDigits("", size=1, val_size=40, seed=2), "val")
        self.model, self.real = (
            model,
            dict(zip((image.numpy().tobytes() for image in pixels), scenes, strict=True)),
        )

    def scenes(self, pixels: torch.Tensor) -> list[Scene]:
        return [(self.real | self.model.scenes)[image.numpy().tobytes()] for image in pixels]


def test_the_table_has_the_shares_of_each_scale(monkeypatch, capsys, tmp_path):
    model = Renderer()
    monkeypatch.setattr(judge_captions, "train", lambda steps: Known(model))
    monkeypatch.setattr("diffusion_cli.load", lambda run: model)
    words = [
        "x",
        "--prompts",
        "60",
        "--real",
        "40",
        "--scales",
        "1",
        "2",
        "--picture",
        str(tmp_path / "a/b.png"),
    ]
    monkeypatch.setattr(sys, "argv", ["judge_captions.py", *words])
    judge_captions.main()
    table = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in table[1:]] == [
        ["combinations in training", "1"],
        ["combinations in training", "2"],
        ["held-out combinations", "1"],
        ["held-out combinations", "2"],
    ]
    assert table[0] == ["real, other handwriting", "", "1.000", "1.000", "1.000", "1.000"]
    for row in table[1:]:
        everything, digits, colours, places = map(float, row[2:])
        assert (digits, colours) == (1, 1)
        assert everything == places
        assert places == 1 if row[1] == "2" else 0.5 < places < 0.8  # a third of the prompts has columns
    assert (tmp_path / "a/b.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_short_training_finds_most_scenes_of_other_handwriting():
    judge = train(120, batch=32)
    pixels, scenes = rendered(CaptionedDigits("", size=1, val_size=300, seed=2), "val")
    agreements = [Agreement.of(*pair) for pair in zip(judge.scenes(pixels), scenes, strict=True)]
    digits, colours, places, everything = (sum(part) / 300 for part in zip(*agreements, strict=True))
    assert places > 0.99
    assert colours > 0.98
    assert digits > 0.7
    assert everything > 0.7
