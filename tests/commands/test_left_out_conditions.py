"""A line about conditions that are left out, although the network always got them together with the others."""

import pytest

from diffusion_cli.commands import sample_conditions
from diffusion_cli.commands.edit_checks import with_condition_image
from diffusion_cli.commands.trained import prepare
from diffusion_cli.conditions import Conditions
from diffusion_cli.config import EditConfig, EvalConfig, SampleConfig, build, load
from diffusion_cli.diffusion.schedules import Cosine
from helpers.conditions import AGE, GLASSES, TEXT, grey_model, letters

SCHEDULE = Cosine(num_timesteps=20)
LINE = "left out, but in training all conditions came together (objective.single_dropout=0); the samples are"


@pytest.fixture
def lines(tmp_path, monkeypatch, capsys):
    """A function from words of a command to the lines about conditions that are left out."""
    monkeypatch.setattr(sample_conditions, "_encoder", lambda *_: letters)

    def printed(*words, command="sample", conditions=None, single_dropout=0.0, missing=()):
        config = load(command, ["steps=2", *words])
        assert isinstance(config, SampleConfig | EditConfig | EvalConfig)
        model = grey_model(SCHEDULE, conditions, single_dropout=single_dropout, missing=missing)
        capsys.readouterr()
        trained = prepare(config.sampling, tmp_path, model)
        if isinstance(config, EditConfig):
            edit, of_images = build(config.edit, model.shape), config.sampling.of_images
            with_condition_image(edit, trained, config.edit_name, of_images=of_images)
        return [line for line in capsys.readouterr().err.splitlines() if "left out" in line]

    return printed


def test_an_attribute_that_is_left_out_alone_is_named(lines):
    (line,) = lines("label={age: 40, species: frog}", "prompt=ab")
    assert line == f"diffuse: label.glasses: {LINE} arbitrary"
    (line,) = lines("label.age=[20,null]", "label.species=frog", "label.glasses=yes")
    assert line.startswith(f"diffuse: label.age, prompt: {LINE}")
    (line,) = lines("label=all")
    assert line.startswith(f"diffuse: prompt: {LINE}")
    (line,) = lines("prompt=ab")
    assert line.startswith(f"diffuse: label.species, label.glasses, label.age: {LINE}")


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["label={age: 40, species: frog, glasses: no}", "prompt=ab"], {}),
        (["label=none"], {}),
        (["label={age: 40}"], {"single_dropout": 0.1}),
        (["label={age: 40, species: frog}", "prompt=ab"], {"missing": ("glasses",)}),
        (["label={age: 40}"], {"conditions": Conditions(attributes=(AGE,))}),
        (["run=told"], {"command": "eval"}),  # samples get the conditions of images
        (["edit=reconstruct", "input=val"], {"command": "edit"}),
    ],
)
def test_what_the_network_learned_has_no_line(lines, words, settings):
    assert lines(*words, **settings) == []


def test_translations_leave_out_what_they_do_not_name(lines):
    conditions = Conditions(attributes=(AGE, GLASSES), image=1, text=TEXT)
    words = ["edit=translate", "input=a.png"]
    (line,) = lines(*words, command="edit", conditions=conditions)
    assert line.startswith(f"diffuse: label.age, label.glasses, prompt: {LINE}")
    (line,) = lines(*words, "prompt=ab", command="edit", conditions=conditions)
    assert line.startswith(f"diffuse: label.age, label.glasses: {LINE}")
    words = ["edit=translate", "input=val"]  # images of the dataset have conditions
    assert lines(*words, command="edit", conditions=conditions) == []
