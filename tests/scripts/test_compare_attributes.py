"""The table of digits by class and stroke width: exact errors of widths, and those of other real digits."""

import sys

import pytest
import torch

import compare_attributes
from compare_attributes import HEADS, LabelledDigits, closest, differences, others
from diffusion_cli.data import Digits
from diffusion_cli.data.digits import STROKE_WIDTH


def labelled(classes: list[int], widths: list[float]) -> LabelledDigits:
    pixels = torch.zeros(len(classes), 1, 8, 8, dtype=torch.uint8)
    return LabelledDigits(pixels, torch.tensor(classes), torch.tensor(widths))


def test_widths_are_the_attributes_of_the_dataset():
    digits = LabelledDigits.of("val")
    images = Digits("", label=["label", STROKE_WIDTH]).load("val")
    condition = images.condition(torch.arange(len(images)), images.pixels)
    assert condition is not None
    assert torch.equal(digits.widths, condition.values[STROKE_WIDTH])
    assert torch.equal(digits.classes, condition.values["label"])
    assert digits.rows()[3] == {"label": str(int(digits.classes[3])), STROKE_WIDTH: float(digits.widths[3])}


def test_a_real_digit_has_no_error_at_its_own_width_and_an_empty_image_all_of_it():
    digits = LabelledDigits.of("val")
    assert not differences(digits.pixels, digits.widths).any()
    assert torch.equal(differences(torch.zeros_like(digits.pixels), digits.widths), -digits.widths)


def test_other_digits_are_those_of_the_same_class():
    held_out, train = labelled([3, 3, 5, 3], [1.0, 1.5, 9.0, 2.0]), labelled([3, 3, 5], [1.25, 1.75, 2.0])
    assert closest(held_out, train).tolist() == [0.25, -0.25, -7.0, -0.25]
    assert sorted(others(held_out).tolist()) == [-1.0, -0.5, -0.5, 0.5, 0.5, 1.0]


class Copier:
    """A model whose samples are held-out digits; without guidance, of the class alone."""

    def sample(self, count: int, *, label: list[dict], guidance: str = "none", **settings) -> torch.Tensor:
        digits = LabelledDigits.of("val")
        images = []
        for row in (label[number % len(label)] for number in range(count)):
            same = digits.classes == int(row["label"])
            gaps = (digits.widths - row[STROKE_WIDTH]).abs().masked_fill(~same, torch.inf)
            images.append(digits.pixels[int(gaps.argmin() if guidance == "cfg" else same.int().argmax())])
        return torch.stack(images)


def test_the_table_has_samples_beside_real_digits(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(compare_attributes, "trained", lambda folder, minutes, words: Copier())
    words = ["--scales", "1", "2", "--samples", "400", "--picture", str(tmp_path / "a.png")]
    monkeypatch.setattr(sys, "argv", ["compare_attributes.py", *words])
    compare_attributes.main()
    heads, _, *lines = capsys.readouterr().out.splitlines()
    assert heads == f"| {' | '.join(HEADS)} |"
    table = {cells[0]: cells[1:] for cells in (line[2:-2].split(" | ") for line in lines)}
    error = {name: float(cells[0]) for name, cells in table.items()}
    assert error["guidance scale 2"] == error["held-out digits"] == 0
    assert 0 < error["closest training digit of the class"] < 0.02
    assert error["guidance scale 1"] == pytest.approx(error["other held-out digits of the class"], rel=0.5)
    assert all(float(table[name][3]) > 0.98 for name in ("guidance scale 2", "held-out digits"))
    assert (tmp_path / "a.png").stat().st_size > 1000
