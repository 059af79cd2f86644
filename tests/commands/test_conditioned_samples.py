"""Samples of models with attributes and texts: their conditions, records, tables and captions."""

import csv
import json

import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.commands import sample as sample_command
from diffusion_cli.commands import sample_conditions, trained
from diffusion_cli.commands.samples import ModelSamples
from diffusion_cli.commands.trained import open_run
from diffusion_cli.conditions import Condition, Conditions
from diffusion_cli.config import SampleConfig, load
from diffusion_cli.diffusion.guidance import NoGuidance
from diffusion_cli.images import read_images
from diffusion_cli.runs.checkpoint import LAST
from helpers.conditions import ATTRIBUTES, TEXT, grey_model, letters

COMMON = ["steps=2", "run=told"]


@pytest.fixture
def runs(tmp_path_factory, schedules, monkeypatch):
    """Folder of a run that gives the grey model."""
    folder = tmp_path_factory.mktemp("outputs")
    checkpoint = folder / "told" / LAST
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    monkeypatch.setattr(trained, "load_model", lambda *_: grey_model(schedules["cosine"]))
    monkeypatch.setattr(sample_conditions, "_encoder", lambda *_: letters)
    return folder


def made(runs, output, *words, count=4):
    assert (
        run(["sample", *COMMON, f"output_dir={runs}", f"num_samples={count}", f"output={output}", *words])
        == 0
    )
    settings = json.loads((output / "manifest.json").read_text())["settings"]
    images = read_images(sorted(output.glob("0*.png")))
    return settings, [round(float(image.float().mean() / 127.5 - 1), 2) for image in images]


def test_images_have_the_conditions_in_turn_and_the_record_has_them(runs, tmp_path):
    settings, grey = made(runs, tmp_path, "label.age=[0,40]", "label.species=[frog,cat]")
    assert settings["conditions"] == [
        {"age": age, "species": species} for age in (0.0, 40.0) for species in ("frog", "cat")
    ]
    assert "labels" not in settings
    assert grey == pytest.approx([0.1, 0, 0.5, 0.4], abs=0.01)
    table = list(csv.DictReader((tmp_path / "labels.csv").open()))
    assert table[2] == {"file": "000002.png", "age": "40", "species": "frog"}


def test_texts_go_with_attributes(runs, tmp_path):
    settings, grey = made(runs, tmp_path, "label.age=[0,40]", "prompt=[ab, abc, 'a, b', a]")
    assert [row["text"] for row in settings["conditions"]] == ["ab", "abc", "a, b", "a"]
    assert grey == pytest.approx([-0.2, 0.1, -0.4, 0.3], abs=0.01)
    with (tmp_path / "labels.csv").open() as file:
        assert [row["text"] for row in csv.DictReader(file)] == ["ab", "abc", "a, b", "a"]


def test_many_texts_are_encoded_by_batch(runs, tmp_path, monkeypatch):
    before = made(runs, tmp_path / "few", "prompt=[ab, abc]")
    monkeypatch.setattr(sample_conditions, "AT_HAND", 1)
    assert made(runs, tmp_path / "many", "prompt=[ab, abc]", "batch_size=3") == before


def test_one_text_of_many_rows_is_encoded_once_and_expanded_by_batch(monkeypatch):
    read: list[list[str]] = []

    def encode(texts):
        read.append([*texts])
        return letters(texts)

    conditions = Conditions(attributes=ATTRIBUTES, text=TEXT)
    rows = [{"age": float(age), "text": "ab"} for age in range(9)] + [{"age": 9.0}]
    whole = sample_conditions._condition(rows, conditions, encode)
    assert isinstance(whole, Condition)
    monkeypatch.setattr(sample_conditions, "AT_HAND", 3 * 8 * TEXT.length)
    few = sample_conditions._condition(rows, conditions, encode)
    assert isinstance(few, sample_conditions.NamedRows)
    read.clear()
    for index in torch.arange(10).split(4):
        found, wanted = few.rows(index), whole.rows(index)
        assert torch.equal(found.values["text"], wanted.values["text"])
        assert torch.equal(found.values["age"], wanted.values["age"])
    assert read == []


def test_guidance_leads_away_from_a_negative_prompt(runs, tmp_path):
    words = ["prompt=ab", "guidance=cfg", "guidance.scale=2", "clip_x0=false"]
    _, plain = made(runs, tmp_path / "plain", *words)
    settings, away = made(runs, tmp_path / "away", *words, "negative_prompt=abcd")
    assert plain == pytest.approx([-0.4] * 4, abs=0.01)  # 0 + 2 (-0.2 - 0)
    assert away == pytest.approx([0] * 4, abs=0.01)  # -0.4 + 2 (-0.2 + 0.4)
    assert settings["negative_prompt"] == "abcd"


def test_conditions_have_guidance_scales_of_their_own(runs, tmp_path):
    words = ["prompt=a", "label.age=40", "guidance=cfg", "guidance.scales={age: 2, text: 3}", "clip_x0=false"]
    settings, grey = made(runs, tmp_path, *words)
    assert grey == pytest.approx([2 * 0.4 - 3 * 0.1] * 4, abs=0.01)
    assert settings["guidance"]["scales"] == {"age": 2, "text": 3}


def test_a_file_gives_the_prompts(runs, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nab\n")
    settings, grey = made(runs, tmp_path / "out", f"prompts={tmp_path / 'prompts.txt'}")
    assert settings["conditions"] == [{"text": "a"}, {"text": "ab"}]
    assert grey == pytest.approx([-0.1, -0.2] * 2, abs=0.01)


def test_without_a_label_attributes_are_spread_and_none_leaves_them_out(runs, tmp_path):
    settings, _ = made(runs, tmp_path / "all", count=1)
    assert len(settings["conditions"]) == 100
    assert {row["species"] for row in settings["conditions"]} == {"cat", "frog"}
    settings, grey = made(runs, tmp_path / "none", "label=none")
    assert settings["conditions"] is None
    assert grey == pytest.approx([0] * 4, abs=0.01)
    assert not (tmp_path / "none" / "labels.csv").exists()


def test_other_conditions_in_a_folder_are_refused(runs, tmp_path, capsys):
    made(runs, tmp_path, "label.age=20")
    words = [*COMMON, f"output_dir={runs}", f"output={tmp_path}", "label.age=30"]
    assert run(["sample", *words]) == 2
    assert "conditions=[{'age': 30.0}]: the images in" in capsys.readouterr().err


def test_a_grid_has_a_named_row_for_each_condition(runs, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        sample_command, "save_rows", lambda rows, path, captions: seen.append((rows, captions))
    )
    made(runs, tmp_path, "label.age=[0,40]", "label.species=frog", "label.glasses=no")
    ((rows, captions),) = seen
    assert [len(row) for row in rows] == [2, 2]
    assert captions.rows == ["frog, no glasses, age 0", "frog, no glasses, age 40"]


def test_samples_know_their_conditions(runs):
    words = [*COMMON, f"output_dir={runs}", "label.age=[0,40]", "prompt=[ab, b]", "num_samples=4"]
    config = load("sample", words)
    assert isinstance(config, SampleConfig)
    samples = ModelSamples(open_run(config.sampling), range(1, 5), None)
    assert samples.attributes == ATTRIBUTES
    found = samples.condition_of([0, 1])
    assert found is not None
    assert found.values["age"].tolist() == [40, 0]
    assert found.values["species"].tolist() == [-1, -1]
    assert samples.texts_of([0, 1, 2]) == ["b", "ab", "b"]
    _, labels = samples.batch([0])
    assert labels is None


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["prompt=a", "negative_prompt=b"],
            "negative_prompt: applies only to classifier-free guidance with a scale",
        ),
        (
            ["prompt=a", "negative_prompt=b", "guidance=cfg", "guidance.scale=1"],
            "negative_prompt: applies only to classifier-free guidance with a scale other than 1; add guidance=cfg",
        ),
        (
            ["prompt=a", "negative_prompt=b", "guidance=cfg", "guidance.scales={text: 1}"],
            "guidance with a scale other than 1; set guidance.scales.text=4",
        ),
        (
            ["prompt=a", "guidance=cfg", "guidance.scales={size: 2}"],
            "guidance.scales.size=2: the model has no",
        ),
        (["label.agee=3"], "label.agee: the model has no such attribute; did you mean age?"),
        (
            ["label=frog"],
            "label=frog: the model has the attributes species, glasses, age; write label={species: frog}",
        ),
        (
            ["label.age=[1,2]", "prompt=[a,b,c]"],
            "prompt: 3 prompts for 2 rows of label=; make one number a multiple",
        ),
    ],
)
def test_wrong_conditions_are_one_line(runs, tmp_path, capsys, words, line):
    assert run(["sample", *COMMON, f"output_dir={runs}", f"output={tmp_path / 'out'}", *words]) == 2
    assert line in capsys.readouterr().err


def test_values_outside_the_range_are_a_warning(runs, tmp_path, capsys):
    made(runs, tmp_path, "label.age=120")
    assert (
        "diffuse: label.age=120: outside the range of the training images, 0 to 80;"
        in capsys.readouterr().err
    )


def test_a_model_never_trained_without_conditions_needs_one(runs, schedules, monkeypatch, tmp_path, capsys):
    only = Conditions(attributes=ATTRIBUTES)
    monkeypatch.setattr(
        trained, "load_model", lambda *_: grey_model(schedules["cosine"], only, label_dropout=0)
    )
    words = [*COMMON, f"output_dir={runs}", f"output={tmp_path / 'out'}"]
    assert run(["sample", *words, "label=none"]) == 2
    assert "label=null: unconditional sampling needs a model trained with" in capsys.readouterr().err
    assert run(["sample", *words, "prompt=a"]) == 2
    assert "prompt: the model has no text condition; train one with text=learned" in capsys.readouterr().err


def test_guidance_that_checks_the_arguments_of_earlier_versions_is_refused(
    runs, monkeypatch, tmp_path, capsys
):
    def check(self, denoiser, label_dropout, labelled):
        raise AssertionError

    monkeypatch.setattr(NoGuidance, "check", check)
    assert run(["sample", *COMMON, f"output_dir={runs}", f"output={tmp_path / 'out'}"]) == 2
    assert (
        "NoGuidance: its check takes label_dropout and labelled, as in earlier versions; "
        "define check(self, denoiser, dropouts, given) as in Guidance" in capsys.readouterr().err
    )
