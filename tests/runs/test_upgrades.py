"""Runs of earlier versions are sampled, edited, evaluated and trained on, with the results of then."""

import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from diffusion_cli.cli import run
from diffusion_cli.config import CONF, TrainConfig, load
from diffusion_cli.data import Array
from diffusion_cli.errors import UsageError
from diffusion_cli.runs.checkpoint import read, save
from diffusion_cli.runs.curves import read_curves
from diffusion_cli.runs.migrate import (
    ADDED_OPTIONS,
    FORMAT,
    MIGRATIONS,
    MODULES_OF_FORMAT_4,
    as_of_format_4,
    migrated,
)
from diffusion_cli.training.logs import CSVFile

STORED = Path(__file__).parents[1] / "stored_runs"
"""How they were made is in the README.md there."""
DIGITS, FID = {"_target_": "diffusion_cli.data.Digits"}, {"_target_": "diffusion_cli.metrics.FID"}
FAST = ["steps=3", "precision=fp32", "device=cpu"]
BEGUN = [
    "trainer=cpu", "precision=fp32", "batch_size=8", "log_every=3", "validate_every=100", "preview_every=100",
    "checkpoint_every=100", "keep_last=1", "lr_schedule.warm_up_steps=2", "lr_schedule=constant",
    "ema.decay=0.9", "logger=csv",
]  # fmt: skip
UNET = [
    "model.channels=4", "model.channel_mult=[1]", "model.num_res_blocks=1", "model.norm_groups=2",
    "model.num_heads=1", "model.head_channels=null", "model.attention_resolutions=[]",
]  # fmt: skip
COMMANDS = {
    "denoiser": UNET,
    "class_conditional": [*UNET, "model.class_conditional=true", "parameterization=v"],
    "classifier": [
        "task=classifier", "model.channels=4", "model.channel_mult=[1]", "model.norm_groups=2", "model.head_channels=4",
    ],
    "autoencoder": [
        "task=autoencoder", "model.channels=4", "model.channel_mult=[1,1]", "model.norm_groups=2",
        "model.latent_channels=2",
    ],
    "latents": [*UNET, "latent.run=outputs/autoencoder"],
    "points": [
        "dataset=points", "dataset.num_points=16", "dataset.size=40", "model=set_tiny", "model.hidden_size=8",
        "model.depth=1", "model.num_heads=1", "model.inducing_points=2",
    ],
}  # fmt: skip
"""The words that started each run, beside BEGUN."""


@pytest.fixture(scope="session", params=["format_4"])
def unpacked(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    with zipfile.ZipFile(STORED / f"{request.param}.zip") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def stored(unpacked, tmp_path, monkeypatch, one_thread) -> Path:
    """A copy of the stored runs, which is the current folder."""
    shutil.copytree(unpacked, tmp_path / "stored")
    monkeypatch.chdir(tmp_path / "stored")
    return tmp_path / "stored"


def images(folder: Path) -> dict[str, np.ndarray]:
    """The images or point clouds of a folder by name; a grid is none of them."""
    files = [
        file for file in sorted(folder.iterdir()) if file.suffix in (".png", ".ply") and file.stem != "grid"
    ]
    return {
        file.name: np.asarray(Image.open(file)).astype(int)
        if file.suffix == ".png"
        else np.frombuffer(file.read_bytes().partition(b"end_header\n")[2], "<f4")
        for file in files
    }


def assert_equal(found: Path, then: Path) -> None:
    """The same files with the same numbers, but for the rounding of another CPU."""
    mine, theirs = images(found), images(then)
    assert mine.keys() == theirs.keys()
    assert mine
    for name, image in theirs.items():
        assert np.abs(mine[name] - image).max() <= (1 if name.endswith(".png") else 1e-4), name


@pytest.mark.parametrize("name", ["denoiser", "class_conditional", "latents", "points"])
def test_the_same_samples(stored, name):
    words = ["label=[0,1]", "guidance=cfg", "guidance.scale=2"] if name == "class_conditional" else []
    assert run(["sample", f"run=outputs/{name}", "num_samples=4", "output=now", *FAST, *words]) == 0
    assert_equal(stored / "now", stored / "samples" / name)


def test_the_same_edits(stored):
    words = ["edit=inpaint", "input=val", "num_images=2", "output=now"]
    assert run(["edit", "run=outputs/denoiser", *words, *FAST]) == 0
    assert_equal(stored / "now", stored / "samples" / "edit")


def test_a_stored_classifier_guides(stored):
    words = [
        "guidance=classifier",
        "guidance.run=outputs/classifier",
        "guidance.scale=1",
        "label=3",
        "num_samples=2",
    ]
    assert run(["sample", "run=outputs/denoiser", *words, "output=now", *FAST]) == 0
    assert len(images(stored / "now")) == 2


def test_a_stored_autoencoder_is_evaluated(stored, capsys):
    assert run(["eval", "run=outputs/autoencoder", "metric=reconstruction", "device=cpu"]) == 0
    value = re.search(r"psnr +([0-9.]+)", capsys.readouterr().out)
    assert value is not None
    assert float(value[1]) == pytest.approx(9.8196, abs=1e-3)


def test_the_same_weights_after_more_steps(stored):
    words = [*COMMANDS["denoiser"], *BEGUN, "name=denoiser", "max_steps=9"]
    assert run(["train", *words]) == 0
    weights = read(stored / "outputs" / "denoiser" / "checkpoints" / "last.ckpt").state["state_dict"]
    then = load_file(stored / "denoiser_step_9.safetensors")
    assert weights.keys() == then.keys()
    for name, tensor in then.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"denoiser"}))
def test_every_kind_trains_on(stored, name, capsys):
    words = [*COMMANDS[name], *BEGUN, f"name={name}", "cache_dir=cache", "max_steps=9"]
    assert run(["train", *words]) == 0
    assert f"Continuing outputs/{name}" in capsys.readouterr().err
    assert read(stored / "outputs" / name / "checkpoints" / "last.ckpt").state["global_step"] == 9


@pytest.mark.parametrize("by_name", [False, True])
def test_a_run_named_by_its_configuration_keeps_the_defaults_of_then(stored, capsys, by_name):
    (folder,) = (stored / "outputs").glob("digits-cosine-*")
    words = [*UNET, "batch_size=8", "precision=fp32", "trainer=cpu", "logger=csv", "keep_last=1"]
    assert run(["train", *([f"run={folder}"] if by_name else words), "max_steps=48"]) == 0
    assert "Continuing outputs/digits-cosine-" in capsys.readouterr().err.replace(f"{stored}/", "")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    schedule = config["lr_schedule"]
    assert (config["optimizer"]["lr"], schedule["warm_up_steps"], config["ema"]["decay"]) == (
        0.003,
        100,
        0.998,
    )
    assert schedule["decay_steps"] == 48


def test_samples_are_continued_in_the_folder_of_then(stored):
    words = ["num_samples=2", "sampler=edm", *FAST]
    assert run(["sample", "run=outputs/denoiser", *words]) == 0
    assert [folder.name for folder in (stored / "outputs" / "denoiser" / "samples").iterdir()] == [
        "edm-3-8c1cf83e"
    ]


def test_an_option_file_of_then_still_names_its_class(tmp_path):
    (tmp_path / "guidance").mkdir()
    (tmp_path / "guidance" / "mine.yaml").write_text("_target_: diffusion_cli.guidance.Unguided\n")
    config = load("sample", ["guidance=mine"], [tmp_path])
    assert config.model_dump()["guidance"] == {"_target_": "diffusion_cli.diffusion.guidance.NoGuidance"}


@pytest.mark.parametrize(
    "target",
    [
        *(f"{module}.Name" for module in MODULES_OF_FORMAT_4),
        "guidance.Auto", "guidance.ByClassifier", "guidance.Unguided", "objective.EDM", "parameterizations.EDM",
        "schedules.EDM", "samplers.EDM", "reconstruction.Reconstruction", "networks.UNet", "data.Digits",
    ],
)  # fmt: skip
def test_names_of_classes_come_forward_and_go_back(target):
    node = {
        "part": [{"_target_": f"diffusion_cli.{target}", "value": 1}],
        "other": {"_target_": "mine.Class"},
    }
    forward = migrated(node)
    assert migrated(forward) == forward
    assert as_of_format_4(forward) == node


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({"accumulate": 2}, {"accumulate_grad_batches": 2}),
        ({"method": {"_target_": "DPS"}}, {"restoration": {"_target_": "DPS"}}),
        (DIGITS | {"held_out": 0.2}, DIGITS | {"val_fraction": 0.2, "label": None}),
        ({"split": "held_out"}, {"split": "val"}),
        ({"reference": {"name": "digits/held_out"}}, {"reference": {"name": "digits/val"}}),
        ({"name": "held_out"}, {"name": "held_out"}),
        ({"cache": {"train": "a", "held_out": "b"}}, {"cache": {"train": "a", "val": "b"}}),
        ({"details": {"on_real_held_out": 0.9}}, {"details": {"on_real_val": 0.9}}),
        (
            {"details": {"floor": 0.5, "ratio_to_floor": 2.0}},
            {"details": {"reference_distance": 0.5, "ratio_to_reference": 2.0}},
        ),
        (FID | {"floor": True}, FID | {"reference_distance": True}),
        ({"times": None}, {"time_sampling": None}),
        ({"times": {"_target_": "Uniform"}}, {"time_sampling": {"_target_": "Uniform"}}),
    ],
)
def test_keys_of_format_5_come_forward_and_go_back(then, now):
    assert migrated({"config": then}, 5) == migrated({"config": then}) == {"config": now}
    assert migrated({"config": now}) == {"config": now}
    assert as_of_format_4({"config": now}) == {"config": then}


def test_a_file_of_the_user_may_have_the_name_of_a_key():
    results = {"results": {"accumulate": {"residual": 0.5}}}
    assert migrated(results) == results


@pytest.mark.parametrize(
    "option", ["model/unet_tiny", "model/dit_tiny", "schedule/linear", "schedule/cosine"]
)
@pytest.mark.parametrize("written", [7, FORMAT])
def test_parts_of_then_have_the_later_options_with_the_values_of_then(option, written):
    group = option.partition("/")[0]
    node = yaml.safe_load((CONF / f"{option}.yaml").read_text())
    added = ADDED_OPTIONS[node["_target_"]]
    then = {key: value for key, value in node.items() if key not in added}
    assert migrated({group: then}, written) == {group: node}
    changed = {group: node | dict.fromkeys(added, "other")}
    assert migrated(changed, written) == changed


def test_a_checkpoint_of_format_5_is_read(stored):
    path = stored / "outputs" / "denoiser" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["diffuse"] = {**MIGRATIONS[4](checkpoint["diffuse"]), "format": 5}
    assert checkpoint["diffuse"]["config"]["accumulate"] == 1
    save(checkpoint, path)
    info = read(path).info
    assert info.format == FORMAT
    config = info.config.model_dump()
    assert config["accumulate_grad_batches"] == 1
    assert "accumulate" not in config


def test_a_checkpoint_of_this_format_without_a_later_option_is_read(stored):
    path = stored / "outputs" / "denoiser" / "checkpoints" / "last.ckpt"
    state, info = read(path).state, read(path).info.model_dump(mode="json")
    del info["config"]["model"]["embedding_channels"]
    state["diffuse"] = info
    assert info["format"] == FORMAT
    save(state, path)
    assert read(path).info.config.model["embedding_channels"] is None


def test_an_earlier_key_in_an_option_file_gives_its_new_name(tmp_path):
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text("# @package _global_\naccumulate: 2\ntimes:\n  bins: 4\n")
    with pytest.raises(UsageError) as error:
        load("train", ["experiment=mine"], [tmp_path])
    assert error.value.lines == (
        f"{file}: accumulate=2: renamed to accumulate_grad_batches; use accumulate_grad_batches=2",
        f"{file}: times.bins=4: renamed to time_sampling; use time_sampling.bins=4",
    )


def test_an_earlier_group_in_an_option_file_gives_its_new_name(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "times").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text("# @package _global_\ndefaults:\n  - override /times: stratified\n")
    with pytest.raises(UsageError) as error:
        load("train", ["experiment=mine"], [tmp_path])
    assert error.value.lines == (
        f"{tmp_path / 'times'}: renamed to time_sampling; rename the folder to time_sampling",
        f"{file}: times is renamed to time_sampling; write override /time_sampling: stratified",
    )


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (
            ["time_sampling=loss_second_moment", "time_sampling.bins=4", "time_sampling.memory=3", "seed=3"],
            "digits-cosine-loss_second_moment-seed_3-bins_4-memory_3",
        ),
        (["dataset.val_fraction=0.3", "dataset.flip=true"], "digits-cosine-flip_true-held_out_0.3"),
    ],
)
def test_the_name_of_a_run_has_the_words_of_then(words, name):
    config = load("train", words)
    assert isinstance(config, TrainConfig)
    assert config.name == name


def test_a_log_of_then_is_continued_and_drawn_with_the_words_of_now(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,held_out_loss,held_out_accuracy_q1\n1,2,4,0.5\n")
    assert read_curves(path) == {"loss": [(1, 2)], "val_loss": [(1, 4)], "val_accuracy_q1": [(1, 0.5)]}
    CSVFile(path, 1).log_metrics({"val_loss": 3.0}, 2)
    assert path.read_text().splitlines() == [
        "step,loss,val_loss,val_accuracy_q1",
        "1,2,4,0.5",
        "2,,3.0,",
    ]


def test_a_numpy_file_of_then_marks_its_validation_images(tmp_path):
    marks = np.array([False, True, False, True])
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 8, 8), np.uint8), held_out=marks)
    dataset = Array("", path=str(tmp_path / "x.npz"))
    assert (len(dataset.load("train")), len(dataset.load("val"))) == (2, 2)


def test_a_checkpoint_of_a_newer_version_asks_for_an_upgrade(stored, capsys):
    path = stored / "outputs" / "denoiser" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["diffuse"]["format"] = FORMAT + 1
    save(checkpoint, path)
    assert run(["sample", "run=outputs/denoiser"]) == 2
    assert (
        f"is from a newer version of diffuse (format {FORMAT + 1}, not {FORMAT}); upgrade"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("sampler", "then", "now"),
    [
        ("ddim", {"eta": 1.5}, {"eta": 1.0}),
        ("edm", {"s_min": 60.0, "s_churn": 40.0}, {"s_min": 60.0, "s_churn": 0.0}),
    ],
)
def test_a_run_with_a_sampler_of_a_former_range_is_continued(tmp_path, one_thread, sampler, then, now):
    words = ["train", "name=old", f"output_dir={tmp_path}", *BEGUN, *UNET, f"sampler={sampler}"]
    assert run([*words, "max_steps=1"]) == 0
    folder = tmp_path / "old"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["sampler"] |= then
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for path in (folder / "checkpoints").glob("*.ckpt"):
        state = read(path).state
        state["diffuse"]["config"]["sampler"] |= then
        save(state, path)
    assert run(["train", f"run={folder}", "max_steps=2"]) == 0
    assert run([*words, *(f"sampler.{key}={value}" for key, value in now.items()), "max_steps=3"]) == 0
    last = read(folder / "checkpoints" / "last.ckpt")
    assert last.step == 3
    assert last.info.config.model_dump()["sampler"].items() >= now.items()


def test_a_run_of_then_without_a_name_is_found_by_its_new_words(stored, capsys):
    """Its name has no word of a schedule, because none of its keys was part of the name."""
    words = [*UNET, "batch_size=8", "precision=fp32", "trainer=cpu", "logger=csv"]
    (folder,) = (stored / "outputs").glob("digits-cosine-*")
    for path in [folder / "config.yaml"]:
        config = yaml.safe_load(path.read_text())
        config["optimizer"]["decay_steps"] = None
        path.write_text(yaml.safe_dump(config))
    config = load("train", [*words, "lr_schedule=constant"])
    assert isinstance(config, TrainConfig)
    assert config.name == folder.name
    other = load("train", [*words, "lr_schedule=linear"])
    assert isinstance(other, TrainConfig)
    assert other.name != folder.name
