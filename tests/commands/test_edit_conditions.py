"""Edits by DDIM inversion get the conditions of the images that they invert."""

import json

import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.commands import edit as edit_command
from diffusion_cli.commands import edit_inputs, sample_conditions
from diffusion_cli.commands.trained import prepare
from diffusion_cli.conditions import Condition, Conditions, ImageCondition
from diffusion_cli.data.conditioned import image_conditioned
from diffusion_cli.diffusion.schedules import Cosine
from helpers.conditions import AGE, TEXT, Captioned, LetterEncoder, grey_model, letters
from helpers.translation import Shades, model_of

AGES = Captioned.ages.nan_to_num(-9).tolist()
SCHEDULE = Cosine(num_timesteps=20)


@pytest.fixture
def edit(tmp_path, monkeypatch):
    """A function from a model, its dataset and words to the exit code of an edit, and what its network was told."""

    def command(model, dataset, *words) -> tuple[int, list[Condition | None]]:
        told: list[Condition | None] = []
        monkeypatch.setattr(edit_command, "open_run", lambda settings: prepare(settings, tmp_path, model))
        monkeypatch.setattr(edit_inputs, "load_text_encoder", lambda *_: LetterEncoder())
        monkeypatch.setattr(sample_conditions, "_encoder", lambda *_: letters)
        monkeypatch.setattr("diffusion_cli.commands.trained.LoadedModel.dataset", lambda *_: dataset)
        hook = model.denoiser.network.register_forward_pre_hook(lambda _, given: told.append(given[2]))
        code = run(["edit", "steps=2", "input=val", f"output={tmp_path}/out", *words])
        hook.remove()
        return code, told

    return command


def captioned(label_dropout: float = 0.1):
    return grey_model(SCHEDULE, Conditions(attributes=(AGE,), text=TEXT), label_dropout)


def texts(condition: Condition) -> list[list[int]]:
    return condition.values["text"].tolist()


def test_a_reconstruction_has_the_conditions_of_its_inputs(edit):
    code, told = edit(captioned(), Captioned(), "edit=reconstruct")
    assert code == 0
    assert len(told) > 2
    for condition in told:
        assert condition is not None
        assert condition.values["age"].nan_to_num(-9).tolist() == AGES
        assert texts(condition)[0] in letters(["a", "frog"]).tolist()
        assert texts(condition)[1:] == letters(["dog", "", "it's", "me"]).tolist()


def test_a_reconstruction_by_named_conditions_has_these(edit):
    code, told = edit(captioned(), Captioned(), "edit=reconstruct", "label.age=7")
    assert code == 0
    assert all(each is not None and each.values["age"].tolist() == [7] * 5 for each in told)
    code, told = edit(captioned(), Captioned(), "edit=reconstruct", "label=none", "output=null")
    assert code == 0
    assert {*told} == {None}


def test_other_ages_of_the_inputs_are_another_reconstruction(edit, tmp_path, capsys):
    assert edit(captioned(), Captioned(), "edit=reconstruct")[0] == 0
    assert edit(captioned(), Captioned(), "edit=reconstruct")[0] == 0
    assert edit(captioned(), Captioned(1, 2, 3, 4, 5), "edit=reconstruct")[0] == 2
    assert "contains images made with other settings" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert len(manifest["settings"]["conditions"]["sha256"]) == 64


def test_a_change_of_an_attribute_keeps_the_text(edit):
    code, told = edit(captioned(), Captioned(), "edit=attribute", "edit.to={age: 60}")
    assert code == 0
    ages = []
    for condition in told:
        assert condition is not None
        ages.append(condition.values["age"].nan_to_num(-9).tolist())
        assert texts(condition)[1:] == letters(["dog", "", "it's", "me"]).tolist()
    assert ages[0] == AGES  # the inversion
    assert ages[-1] == [60] * 5


def test_a_reconstruction_has_the_condition_images_of_its_inputs(edit):
    condition = {"of": "noise", "noise_sigma": 0.2}
    dataset = image_conditioned(Shades(""), ImageCondition(**condition))
    code, told = edit(model_of(SCHEDULE, **condition), dataset, "edit=reconstruct", "num_images=10")
    assert code == 0
    images, rows = dataset.load("val"), torch.arange(10)
    expected = images.condition(rows, images[rows] / 127.5 - 1)
    assert expected is not None
    assert all(
        each is not None and torch.equal(each.values["image"], expected.values["image"]) for each in told
    )


def everything():
    """A model of ages, texts and condition images, and its dataset."""
    conditions = Conditions(attributes=(AGE,), text=TEXT, image=1)
    return grey_model(SCHEDULE, conditions), image_conditioned(Captioned(), ImageCondition(of="noise"))


@pytest.mark.parametrize("words", [[], ["guidance=cfg", "guidance.scales={age: 2, image: 3}"]])
def test_a_translation_of_a_split_has_all_conditions_of_its_inputs(edit, tmp_path, words):
    code, told = edit(*everything(), "edit=translate", *words)
    assert code == 0
    condition = told[-1].rows(torch.arange(5))
    assert condition.values["age"].nan_to_num(-9).tolist() == AGES
    assert texts(condition)[1:] == letters(["dog", "", "it's", "me"]).tolist()
    assert not condition.values["image"].isnan().any()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert len(manifest["settings"]["conditions"]["sha256"]) == 64


def test_a_translation_by_named_conditions_has_these_and_the_image(edit):
    code, told = edit(*everything(), "edit=translate", "label.age=7")
    assert code == 0
    assert told[-1].values["age"].tolist() == [7] * 5
    assert (told[-1].values["text"] == -1).all()
    assert not told[-1].values["image"].isnan().any()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["edit=img2img", "guidance=cfg"], "label: guidance=cfg needs a value of age or image or text"),
        (
            ["edit=img2img", "label.age=4", "guidance=cfg", "guidance.scales={image: 2}"],
            "guidance.scales.image=2: no value of image is given",
        ),
        (
            ["edit=translate", "label=none", "guidance=cfg", "guidance.scales={age: 2}"],
            "guidance.scales.age=2: no value of age is given",
        ),
        (["edit=reconstruct", "guidance=cfg"], "label: guidance=cfg needs a value of age or image or text"),
        (
            ["edit=attribute", "edit.to={age: 9}", "guidance=cfg", "guidance.scales={text: 2}"],
            "guidance.scales.text=2: no value of text is given",
        ),
    ],
)
def test_guidance_needs_a_value_that_the_edit_has(edit, tmp_path, capsys, words, line):
    from PIL import Image

    Image.new("L", (8, 8), 90).save(tmp_path / "a.png")
    assert edit(*everything(), f"input={tmp_path}/a.png", *words)[0] == 2
    assert line in capsys.readouterr().err


def test_files_without_known_conditions_need_training_without_conditions(edit, tmp_path, capsys):
    from PIL import Image

    Image.new("L", (8, 8), 90).save(tmp_path / "a.png")
    given = f"input={tmp_path}/a.png"
    code, told = edit(captioned(), Captioned(), "edit=reconstruct", given)
    assert code == 0
    assert {*told} == {None}
    assert edit(captioned(0.0), Captioned(), "edit=reconstruct", given)[0] == 2
    line = "label=null: unconditional sampling needs a model trained with objective.label_dropout > 0; give a condition"
    assert line in capsys.readouterr().err
