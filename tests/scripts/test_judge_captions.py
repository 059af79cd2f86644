"""The judge of captioned digits: the parts of a prompt that a sample shows, and the table of their shares."""

import sys

import pytest
import torch
from scipy.stats import binomtest

import judge_captions
from diffusion_cli.data import CaptionedDigits
from diffusion_cli.data.captioned_digits import DigitPictures, Draws, Scene, parse
from judge_captions import HEADS, Agreement, Judged, crowded, only_digits, prompts, rendered, train, wilson


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
    digits, colours, places, everything = parts
    number = " a " in found[1:]  # two digits
    agreement = Agreement.of(Judged(parse(found), True), parse("a red seven above a blue three"))
    assert agreement == (digits, colours, places, number, everything)


def test_a_sample_with_a_further_digit_is_not_right():
    scene = parse("a red seven above a blue three")
    assert Agreement.of(Judged(scene, False), scene) == (True, True, True, False, False)


def test_real_images_have_only_their_digits():
    pixels, scenes = rendered(CaptionedDigits("", size=1, val_size=400, seed=2), "val")
    assert all(map(only_digits, pixels, scenes))
    # A few further digits lie on top of a digit of their colour.
    assert sum(map(only_digits, crowded(pixels, 0), scenes)) < 0.03 * len(pixels)
    assert not any(map(only_digits, torch.zeros_like(pixels), scenes))


def test_noise_is_no_further_digit_but_an_empty_place_counts():
    pixels, scenes = rendered(CaptionedDigits("", size=1, val_size=60, seed=2), "val")
    noise = torch.randint(20, pixels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert all(map(only_digits, pixels.clamp(max=235) + noise, scenes))
    columns = [number for number, scene in enumerate(scenes) if scene.arrangement == "column"]
    assert columns
    for number in columns:
        image = pixels[number].clone()
        image[:, 12:] = 0
        assert not only_digits(image, scenes[number])


@pytest.mark.parametrize(("right", "count"), [(0, 50), (1, 50), (37, 50), (184, 200), (200, 200)])
def test_intervals_are_those_of_scipy(right, count):
    theirs = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson(right, count) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


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

    def judged(self, pixels: torch.Tensor) -> list[Judged]:
        scenes = self.real | self.model.scenes
        found = [scenes.get(image.numpy().tobytes(), parse("a red one")) for image in pixels]
        return [Judged(scene, only_digits(image, scene)) for image, scene in zip(pixels, found, strict=True)]


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
    heads, _, *lines = capsys.readouterr().out.splitlines()
    assert heads == f"| {' | '.join(HEADS)} |"
    table = [line.strip("| ").split(" | ") for line in lines]
    assert [row[:2] for row in table[2:]] == [
        ["combinations in training", "1"],
        ["combinations in training", "2"],
        ["held-out combinations", "1"],
        ["held-out combinations", "2"],
    ]
    assert table[0] == ["real, other handwriting", "", *["1.000 [0.912, 1.000]"] * 5]
    assert table[1][0] == "real, with a further digit"
    assert float(table[1][2].partition(" ")[0]) < 0.1
    for row in table[2:]:
        everything, digits, colours, places, number = (float(cell.partition(" ")[0]) for cell in row[2:])
        assert (digits, colours, number) == (1, 1, 1)
        assert everything == places
        assert places == 1 if row[1] == "2" else 0.5 < places < 0.8  # a third of the prompts has columns
    assert (tmp_path / "a/b.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_short_training_finds_most_scenes_of_other_handwriting():
    judge = train(120, batch=32)
    pixels, scenes = rendered(CaptionedDigits("", size=1, val_size=300, seed=2), "val")
    agreements = [Agreement.of(*pair) for pair in zip(judge.judged(pixels), scenes, strict=True)]
    digits, colours, places, number, everything = (sum(part) / 300 for part in zip(*agreements, strict=True))
    assert places > 0.99
    assert colours > 0.98
    assert number > 0.98
    assert digits > 0.7
    assert everything > 0.7
