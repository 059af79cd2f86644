"""A run keeps its recipe on other machines and with a larger budget."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from diffusion_cli.cli import run
from diffusion_cli.config import TrainConfig, recipe
from diffusion_cli.config.continued import with_values
from diffusion_cli.runs.checkpoint import LAST
from helpers.recipes import photos, picture, train_config


def begin(folder: Path, *words: str) -> tuple[TrainConfig, list[str]]:
    """A run's configuration, stored as training stores it."""
    words = (*words, f"output_dir={folder / 'runs'}")
    config = train_config(*words)
    store(config, folder / "runs" / str(config.name))
    return config, list(words)


def store(config: TrainConfig, run: Path, checkpoint: bool = True, recorded: bool = True) -> None:
    """Write a configuration as training does, or, not `recorded`, as versions without `auto` did."""
    (run / "checkpoints").mkdir(parents=True)
    content = config.model_dump() if recorded else config.model_dump(exclude={"derived"})
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    if checkpoint:
        (run / LAST).touch()


def test_what_follows_from_the_budget_follows_from_a_larger_one(tmp_path):
    before, words = begin(tmp_path, "max_steps=24")
    assert (before.lr_schedule["warm_up_steps"], before.ema.decay) == (1, 0.9)
    after = train_config(*words, "max_steps=2400")
    assert after.name == before.name
    assert (after.lr_schedule["warm_up_steps"], after.ema.decay, after.optimizer["lr"]) == (100, 0.998, 0.003)
    assert after.lr_schedule["decay_steps"] == 2400
    again = with_values(before.model_dump(), {"max_steps": 2400})  # as `diffuse train run=` does
    assert again == after.model_dump()


def test_what_equals_a_derived_value_by_chance_stays(tmp_path):
    stated = ["ema.decay=0.998", "lr_schedule.warm_up_steps=100"]  # as derived from 2,400 steps
    before, words = begin(tmp_path, *stated)
    after = with_values(before.model_dump(), {"max_steps": 24_000})
    assert (after["lr_schedule"]["warm_up_steps"], after["ema"]["decay"]) == (100, 0.998)
    assert after == train_config(*words, "max_steps=24000").model_dump()
    preset = train_config("experiment=ddpm_cifar10").model_dump()
    epochs = with_values(preset, {"max_steps": None, "max_epochs": 3000})
    assert (epochs["lr_schedule"]["warm_up_steps"], epochs["ema"]["decay"]) == (5000, 0.9999)


@pytest.mark.parametrize(("optimizer", "falls"), [("adam", None), ("adamw", 300)])
def test_a_budget_in_steps_after_one_in_epochs_keeps_the_kind_of_schedule(optimizer, falls):
    before = train_config(f"optimizer={optimizer}", "max_steps=null", "max_epochs=50").model_dump()
    assert with_values(before, {"max_steps": 300})["lr_schedule"].get("decay_steps") == falls


def test_a_begun_run_keeps_its_budget_on_another_machine(tmp_path, monkeypatch):
    np.save(tmp_path / "many.npy", np.zeros((10_000, 16, 16), np.uint8))
    monkeypatch.setattr(recipe, "gpu", lambda accelerator: True)
    before, words = begin(tmp_path, "dataset=array", f"dataset.path={tmp_path / 'many.npy'}")
    assert before.max_steps == 100_000
    monkeypatch.setattr(recipe, "gpu", lambda accelerator: False)
    assert train_config(*words) == before


@pytest.mark.parametrize(
    ("size", "first", "stated"),
    [
        (16, True, ["model.patch_size=2"]),
        (90, True, ["model.dropout=0.1"]),
        (90, False, ["model.channels=64"]),
        (90, False, ["model.dropout=0.3"]),
    ],
)
def test_the_same_command_is_the_same_run_on_every_machine(tmp_path, monkeypatch, stated, first, size):
    own = ["dataset=folder", f"dataset.path={photos(tmp_path / 'p', (size, size))}", *stated]
    monkeypatch.setattr(recipe, "gpu", lambda accelerator: first)
    before, words = begin(tmp_path, *own)
    assert train_config(*words) == before
    monkeypatch.setattr(recipe, "gpu", lambda accelerator: not first)
    assert train_config(*words, "model.gradient_checkpointing=true").name == before.name
    assert train_config(*words) == before


def test_what_the_user_set_stays_with_a_larger_budget(tmp_path):
    _, words = begin(tmp_path, "max_steps=24", "ema.decay=0.5", "lr_schedule.warm_up_steps=7", "name=mine")
    after = train_config(*words[3:], "max_steps=2400")  # not repeated
    assert (after.lr_schedule["warm_up_steps"], after.ema.decay) == (7, 0.5)


def test_a_folder_without_a_checkpoint_hands_on_no_recipe(tmp_path):
    other = train_config("model=dit_b_2", "batch_size=8", "max_steps=50")
    store(other, tmp_path / "x", checkpoint=False)
    words = ["name=x", f"output_dir={tmp_path}"]
    assert train_config(*words).optimizer == train_config().optimizer


def test_a_run_keeps_its_network_on_another_machine_and_with_more_images(tmp_path, monkeypatch):
    folder = photos(tmp_path / "p", (90, 90))
    words = ["dataset=folder", f"dataset.path={folder}", "model.class_conditional=true"]
    monkeypatch.setattr(recipe, "gpu", lambda accelerator: True)
    before, words = begin(tmp_path, *words)
    monkeypatch.setattr(recipe, "gpu", lambda accelerator: False)
    (folder / "more.png").write_bytes(picture(8, 8))
    assert train_config(*words) == before


def test_a_run_of_an_earlier_version_keeps_what_it_has(tmp_path, on_cpu):
    """Before `auto`, a folder's network was unet_small at 64x64 with a learning rate of 0.003 and 100,000 steps."""
    folder = photos(tmp_path / "p", (90, 90))
    then = [
        "dataset.resolution=64",
        "max_steps=100000",
        "optimizer.lr=0.003",
        "lr_schedule.warm_up_steps=100",
    ]
    words = ["dataset=folder", f"dataset.path={folder}"]
    before = train_config(*words, "model=unet_small", *then, "ema.decay=0.9999")
    short = train_config(*words).name
    store(before, tmp_path / "runs" / str(short), recorded=False)
    stated = ["model=unet_small", "dataset.resolution=64", "optimizer.lr=0.003", "max_steps=200000"]
    for said in ([], stated[:1], stated[1:3], stated):
        after = train_config(*words, *said, f"output_dir={tmp_path / 'runs'}")
        assert after.name == short
        for key in ("model", "dataset", "optimizer", "lr_schedule", "ema", "max_steps"):
            if key not in ("optimizer", "lr_schedule", "max_steps") or said != stated:
                assert getattr(after, key) == getattr(before, key), key
    assert train_config(*words, "optimizer.lr=0.001", f"output_dir={tmp_path / 'runs'}").name != short


@pytest.mark.parametrize(
    "said", [["ema.decay=0.998"], ["lr_schedule.warm_up_steps=100"], ["optimizer.lr=0.001"]]
)
def test_a_run_of_an_earlier_version_is_found_by_any_of_its_values(tmp_path, said):
    then = ["optimizer.lr=0.001", "ema.decay=0.998", "lr_schedule.warm_up_steps=100"]
    store(train_config(*then), tmp_path / "digits-cosine-lr_0.001", recorded=False)
    words = [*dict.fromkeys(["optimizer.lr=0.001", *said]), f"output_dir={tmp_path}"]
    assert train_config(*words).name == "digits-cosine-lr_0.001"
    assert train_config(*words, "ema.decay=0.9").name != "digits-cosine-lr_0.001"


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_run_without_a_record_keeps_the_network_that_it_has(tmp_path, monkeypatch, on_gpu):
    own = [
        "dataset=folder",
        f"dataset.path={photos(tmp_path / 'p', (90, 90))}",
        f"output_dir={tmp_path / 'runs'}",
    ]
    monkeypatch.setattr(recipe, "gpu", lambda accelerator: on_gpu)
    before = train_config(*own)
    store(before, tmp_path / "runs" / str(before.name), recorded=False)
    monkeypatch.setattr(recipe, "gpu", lambda accelerator: not on_gpu)
    after = train_config(*own)
    assert (after.name, after.model, after.max_steps) == (before.name, before.model, before.max_steps)


def test_the_record_is_the_same_in_every_process():
    derived = train_config("dataset=folder", "dataset.path=nowhere").derived
    assert derived == sorted(derived)
    assert len(derived) == 7


def test_another_network_has_another_name(tmp_path, on_cpu):
    folder = photos(tmp_path / "p", (90, 90))
    _, words = begin(tmp_path, "dataset=folder", f"dataset.path={folder}")
    names = {train_config(*words, *said).name for said in ([], ["model=unet_patch2"], ["model=unet_small"])}
    assert names == {f"folder-cosine-path_{folder.name}", f"folder-cosine-unet_small-path_{folder.name}"}


def test_mistakes_stay_readable(capsys):
    assert run(["train", "batch_size=many", "max_steps=-3", "model.channels=wide"]) == 2
    err = capsys.readouterr().err
    assert "batch_size=many: must be an integer" in err
    assert "max_steps=-3: must be greater than 0, auto or null" in err
    assert "model.channels=wide: must be an integer" in err
    assert err.count("auto") == 1


LONG = "optimizer.lr=0.0034210987654321"


def test_long_numbers_have_four_digits_in_a_name_that_stays_unique():
    names = [train_config(LONG).name, train_config(LONG.replace("54321", "54322")).name]
    assert all(re.fullmatch(r"digits-cosine-lr_0\.003421-[0-9a-f]{6}", str(name)) for name in names)
    assert names[0] != names[1]
    assert names[0] == train_config(LONG).name
    assert train_config("optimizer.lr=0.00342109").name == "digits-cosine-lr_0.00342109"
    longest = [f"{key}={1 / 3}" for key in ("ema.decay", "dataset.val_fraction", "optimizer.lr", "clip_norm")]
    name = str(train_config("experiment=iddpm_digits", "dataset.flip=true", "seed=123456789", *longest).name)
    assert len(name) <= 120


def test_a_run_with_all_digits_in_its_name_is_found(tmp_path):
    before, words = train_config(LONG), [LONG, f"output_dir={tmp_path}"]
    assert train_config(*words).name == before.name
    store(before, tmp_path / "digits-cosine-lr_0.0034210987654321", recorded=True)
    assert train_config(*words).name == "digits-cosine-lr_0.0034210987654321"
    store(before, tmp_path / str(before.name), recorded=True)
    assert train_config(*words).name == before.name
