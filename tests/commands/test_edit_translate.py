"""`diffuse edit edit=translate` and `model.edit("translate", ...)` with models of condition images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.commands import edit as edit_command
from diffusion_cli.commands import edit_results
from diffusion_cli.commands.edit import edited
from diffusion_cli.commands.inputs import Input
from diffusion_cli.commands.trained import prepare
from diffusion_cli.conditions import ImageCondition
from diffusion_cli.config import EditConfig, load
from diffusion_cli.data.conditioned import image_conditioned
from diffusion_cli.data.image_sources import DerivedImage
from diffusion_cli.errors import UsageError
from diffusion_cli.generate import SeededNoise
from diffusion_cli.runs.migrate import result_name
from helpers.editing import pixels
from helpers.translation import SHAPE, Shades, model_of


@pytest.fixture
def translated(schedules, tmp_path):
    """A function from condition keys, images as stored and words to results."""

    def translate(condition, images, *words):
        config = load("edit", ["edit=translate", "input=val", "steps=3", *words])
        assert isinstance(config, EditConfig)
        trained = prepare(config.sampling, tmp_path, model_of(schedules["cosine"], **condition))
        given = [Input(f"{number:05d}", image) for number, image in enumerate(images)]
        return edited(config, trained, given, None)[:, 0]

    return translate


@pytest.fixture
def translate(schedules, tmp_path, monkeypatch):
    """A function that runs `diffuse edit edit=translate` with a model of these condition keys."""

    def command(condition, *words, name="translate"):
        model = model_of(schedules["cosine"], **condition)
        monkeypatch.setattr(edit_command, "open_run", lambda settings: prepare(settings, tmp_path, model))
        return run(["edit", f"edit={name}", "steps=3", f"output={tmp_path}/out", *words])

    return command


def random(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(8, 8), (8, 21), (19, 11)])
def test_inputs_of_any_size_are_copied(translated, size):
    images = random(3, 1, *size)
    for words in ([], ["edit.overlap=6", "edit.tiles_per_call=3", "batch_size=2"]):
        assert torch.equal(translated({"of": "noise"}, images, *words), images)


def test_small_inputs_give_results_of_the_models_size(translated):
    small = random(2, 1, 4, 4)
    enlarged = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(translated({"of": "downsample", "factor": 2}, small), enlarged)
    originals = random(2, 1, 8, 8)
    means = originals.float().unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)).round().to(torch.uint8)
    found = translated({"of": "downsample", "factor": 2}, originals, "edit.degrade=true")
    expected = means.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (found.int() - expected.int()).abs().max() <= 1  # means of bytes may lie between two bytes


def test_the_noise_of_a_derived_condition_is_not_that_of_sampling(translated):
    """The model copies its condition image, so results show the noise of this image."""
    gray = torch.full((8, *SHAPE), 128, dtype=torch.uint8)
    given = {"of": "noise", "noise_sigma": 0.3}
    noise = translated(given, gray, "edit.degrade=true").float() - 128
    start = SeededNoise(range(8), SHAPE, torch.device("cpu")).noise()
    together = torch.stack([noise.flatten(), start.flatten()])
    assert abs(torch.corrcoef(together)[0, 1]) < 5 / together.shape[1] ** 0.5


def test_a_derived_condition_depends_on_the_seed_alone(translated):
    images = torch.stack([torch.full(SHAPE, shade, dtype=torch.uint8) for shade in (100, 150)])
    given, words = {"of": "noise"}, ["edit.degrade=true", "variations=2"]
    found = translated(given, images, *words, "seed=3")
    assert not torch.equal(found[0], found[1])
    assert torch.equal(translated(given, images[1:], *words, "seed=5"), found[2:])


def test_each_variation_shows_its_own_derived_condition(translate, tmp_path, monkeypatch):
    Image.fromarray(random(8, 8).numpy()).save(tmp_path / "image.png")
    drawn = []
    monkeypatch.setattr(
        edit_results, "save_rows", lambda rows, file, captions: drawn.append((rows, captions))
    )
    given = f"input={tmp_path}/image.png"
    assert translate({"of": "noise"}, given, "edit.degrade=true", "variations=2") == 0
    assert translate({"of": "blur"}, given, "edit.degrade=true", "variations=2", "output=null") == 0
    ((row,), captions), ((blurred,), other) = drawn
    assert [*captions.columns] == ["original", "condition", "result 1", "condition", "result 2"]
    assert torch.equal(row[1], row[2])  # the model copies its condition image
    assert torch.equal(row[3], row[4])
    assert not torch.equal(row[1], row[3])
    assert [*other.columns] == ["original", "condition", "result 1", "result 2"]
    assert len(blurred) == 4


def test_guidance_leads_away_from_samples_without_the_condition(translated):
    images = torch.full((1, *SHAPE), 100, dtype=torch.uint8)
    guided = translated({"of": "noise"}, images, "guidance=cfg", "guidance.scale=1.5")
    assert torch.equal(guided, torch.full_like(guided, 150))  # 0 + 1.5 (100 - 0)


def test_the_command_writes_results_of_the_inputs_size_and_pictures(translate, tmp_path, capsys):
    for number in range(3):
        Image.fromarray(random(12, 17, seed=number).numpy()).save(tmp_path / f"{number}.png")
    files = ",".join(f"{tmp_path}/{number}.png" for number in range(3))
    assert translate({"of": "noise"}, f"input=[{files}]", "batch_size=2") == 0
    for number in range(3):
        assert (pixels(tmp_path / "out" / f"{number}.png") == random(12, 17, seed=number).numpy()).all()
    assert (tmp_path / "out" / "grid.png").is_file()
    assert len([*(tmp_path / "out" / "before").glob("*.png")]) == 3
    assert "3 results of translate" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["edit"]["tiles_per_call"] == 16


def test_images_of_the_dataset_bring_their_conditions(translate, tmp_path, monkeypatch):
    condition = {"of": "noise", "noise_sigma": 0.3, "noise_augmentation": 0.2}
    dataset = Shades("")
    own = image_conditioned(dataset, ImageCondition(**condition))
    monkeypatch.setattr("diffusion_cli.commands.trained.LoadedModel.dataset", lambda *_: own)
    assert translate(condition, "input=val", "num_images=5") == 0
    images = dataset.load("val")
    rows = torch.tensor([4])
    (given,) = DerivedImage(ImageCondition(**condition)).values(rows, images[rows].float() / 127.5 - 1, None)[
        :, 0
    ]
    expected = ((given + 1) * 127.5).round().clamp(0, 255)
    name, out = result_name("val", 4), tmp_path / "out"
    assert (pixels(out / f"{name}.png") == expected.numpy()).all()
    assert (pixels(out / "before" / f"{name}.0.png") == 80).all()  # the original, which a user may compare
    assert (pixels(out / "before" / f"{name}.1.png") == expected.numpy()).all()


def test_only_the_hidden_part_changes(translate, tmp_path):
    image, mask = random(12, 8).numpy(), np.zeros((12, 8), dtype=np.uint8)
    mask[2:7, 1:4] = 255
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert translate({"of": "mask"}, f"input={tmp_path}/image.png", f"edit.mask={tmp_path}/mask.png") == 0
    result = pixels(tmp_path / "out" / "image.png")
    assert (result[mask == 0] == image[mask == 0]).all()
    assert (abs(result[mask > 0] - 127.5) < 1).all()  # the copied condition is 0 there


@pytest.mark.parametrize(
    ("condition", "sizes", "words", "message"),
    [
        ({"of": "noise"}, (8, 7), [], "is 7 x 8 gray, but must be 8 x 8 gray or larger; convert it, or set fit=true"),
        ({"of": "downsample", "factor": 4}, (1, 2), [], "is 2 x 1 gray, but must be 2 x 2 gray or larger"),
        ({"of": "noise"}, (9, 9), ["edit.overlap=8"], "edit.overlap=8: must be less than the 8 pixels"),
        ({"of": "noise"}, (8, 8), ["edit.mask=centre"], "edit.mask=centre: applies only to a model trained"),
        ({"of": "mask"}, (8, 8), [], "edit.mask=null: needed, because the model fills a hidden part"),
        ({}, (8, 8), ["edit.degrade=true"], "edit.degrade=true: the model is conditioned on images of its"),
        ({"of": "noise"}, (8, 8), ["restoration=dps"], "restoration: not used by edit=translate"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_refused_in_one_line(translate, tmp_path, capsys, condition, sizes, words, message):
    Image.fromarray(random(*sizes).numpy()).save(tmp_path / "image.png")
    assert translate(condition, f"input={tmp_path}/image.png", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(("words", "needed"), [([], "condition images"), (["edit.degrade=true"], "images")])
def test_a_missing_input_names_what_to_give(translate, capsys, words, needed):
    assert translate({"of": "noise"}, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"input=null: edit=translate needs {needed}; give a file, a folder, or val" in line


def test_fit_gives_larger_inputs_the_size_of_the_model(translate, tmp_path):
    Image.fromarray(random(9, 16).numpy()).save(tmp_path / "image.png")
    assert translate({"of": "noise"}, f"input={tmp_path}/image.png", "fit=true") == 0
    assert pixels(tmp_path / "out" / "image.png").shape == (8, 8)


def test_models_without_condition_images_are_refused(edit_runs, capsys):
    assert run(["edit", "edit=translate", "run=plain", f"output_dir={edit_runs}", "input=val"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "edit=translate: the model has no condition image; use a run trained with condition=image"
    )


def test_other_edits_need_training_without_the_condition_image(translate, translated, tmp_path, capsys):
    Image.fromarray(random(8, 8).numpy()).save(tmp_path / "image.png")
    image = f"input={tmp_path}/image.png"
    assert translate({"of": "noise", "label_dropout": 0.0}, image, name="img2img") == 2
    assert "edit=img2img: the model was never trained without a condition image" in capsys.readouterr().err
    assert translate({"of": "noise"}, image, name="img2img") == 0
    with pytest.raises(UsageError, match=r"images=.*must have shape .*\(1, 8, 8\) or larger"):
        translated({"of": "noise"}, random(1, 1, 7, 8))
