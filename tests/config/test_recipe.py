"""The values that `auto` stands for."""

import zipfile

import numpy as np
import pytest
import yaml

from diffusion_cli.config import at_hand, load, options, recipe
from diffusion_cli.config.at_hand import OwnImages, own_images
from diffusion_cli.config.recipe import budget, ema_decay, learning_rate, network_width, warm_up_steps
from helpers.formats import dicom
from helpers.recipes import photos, picture, train_config

# --- The numbers ------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "batch_size", "rate"),
    [
        (64, 64, 3e-3),  # docs/results/time_to_quality.md
        (256, 128, 2e-4),  # Ho et al. 2020
        (384, 256, 1e-4),  # Peebles & Xie 2023: every size
        (1152, 256, 1e-4),
        (64, 16, 1.5e-3),  # the square root of a quarter of the batch
        (256, 16, 1e-4),
    ],
)
def test_the_learning_rate_meets_published_ones(width, batch_size, rate):
    assert learning_rate(width, batch_size) == pytest.approx(rate, rel=0.03)


def test_the_learning_rate_falls_as_a_network_widens():
    rates = [learning_rate(width, 64) for width in (16, 32, 64, 96, 128, 192, 256, 384, 512, 1152)]
    assert rates == sorted(rates, reverse=True)


def test_warm_up_and_average_follow_the_budget():
    assert (warm_up_steps(2400), ema_decay(2400)) == (100, 0.998)
    assert (warm_up_steps(800_000), ema_decay(800_000)) == (5000, 0.9999)  # Ho et al. 2020
    assert (warm_up_steps(None), ema_decay(None)) == (100, 0.999)
    assert 0 < ema_decay(1) < 1


def test_own_images_are_passed_a_thousand_times_within_bounds():
    assert budget(OwnImages(60, 64), 64, on_gpu=True) == 5000
    assert budget(OwnImages(1000, 64), 64, on_gpu=True) == 15_625
    assert budget(OwnImages(10_000, 64), 64, on_gpu=True) == 100_000
    assert budget(OwnImages(10_000, 64), 64, on_gpu=False) == 20_000
    assert budget(None, 64, on_gpu=True) == 100_000


@pytest.mark.parametrize("name", ["unet_tiny", "unet_small", "dit_b_2", "classifier_cifar10", "kl_f8"])
def test_no_network_inherits_the_rate_of_another(name, on_cpu):
    node = yaml.safe_load(options("model")[name].read_text())
    task = {"Classifier": "classifier", "AutoencoderKL": "autoencoder"}
    config = train_config(
        f"model={name}", f"task={task.get(node['_target_'].rpartition('.')[2], 'diffusion')}"
    )
    assert config.optimizer["lr"] == learning_rate(network_width(node), config.batch_size)


def test_a_widened_network_leaves_the_rate_of_a_narrow_one(on_cpu):
    assert train_config("model.channels=128").optimizer["lr"] == learning_rate(256, 64) == 2e-4


@pytest.mark.parametrize("name", ["ddpm_cifar10", "edm_cifar10", "score_sde_vp_cifar10"])
def test_a_preset_keeps_its_recipe_on_other_data(name, tmp_path, on_gpu):
    own = f"dataset.path={photos(tmp_path / 'photos', (40, 50))}"
    published, moved = (train_config(f"experiment={name}", *words) for words in ([], ["dataset=folder", own]))
    for key in (
        "model",
        "optimizer",
        "batch_size",
        "max_steps",
        "ema",
        "schedule",
        "objective",
        "time_sampling",
    ):
        assert getattr(moved, key) == getattr(published, key), key


# --- Own images ------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "gpu", "expected", "channels"),
    [
        ((300, 200), True, 64, 64),
        ((300, 200), False, 32, 32),
        ((32, 32), True, 32, 64),
        ((30, 45), True, 24, 64),
        ((16, 16), False, 16, 32),
        ((5, 5), True, 8, 32),
    ],
)
def test_own_photos_choose_size_network_and_budget(size, gpu, expected, channels, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "gpu", lambda accelerator: gpu)
    config = train_config("dataset=folder", f"dataset.path={photos(tmp_path / 'p', size, size)}")
    assert config.dataset["resolution"] == expected
    assert config.model["channels"] == channels
    assert config.model["patch_size"] == (2 if expected == 32 and not gpu else 1)
    assert config.max_steps == config.lr_schedule["decay_steps"] == 5000
    assert config.optimizer["lr"] == learning_rate(network_width(config.model), 64)


def test_what_the_user_states_stays(tmp_path, on_cpu):
    own = f"dataset.path={photos(tmp_path / 'p', (90, 90))}"
    config = train_config(
        "dataset=folder", own, "dataset.resolution=[16,48]", "max_steps=7", "optimizer.lr=0.5"
    )
    assert (config.dataset["resolution"], config.max_steps, config.optimizer["lr"]) == ([16, 48], 7, 0.5)
    config = train_config("dataset=folder", own, "model=unet_small", "model.dropout=0.2")
    assert (config.model["channels"], config.model["dropout"]) == (64, 0.2)
    config = train_config("dataset=folder", own, "model.class_conditional=true")
    assert (config.model["patch_size"], config.model["class_conditional"]) == (2, True)
    config = train_config("dataset=folder", own, "dataset.resolution=[8,16,16]")
    assert config.model["head_channels"] == 16  # unet3d_tiny


def test_other_commands_read_own_images_alike_on_every_machine(tmp_path, on_cpu):
    own = f"dataset.path={photos(tmp_path / 'p', (90, 90))}"
    for command in ("eval", "data"):
        dataset = load(command, ["dataset=folder", own]).model_dump()["dataset"]
        assert dataset["resolution"] == 64


def test_archives_and_arrays_are_counted_and_measured(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for number in range(5):
            file.writestr(f"x/{number}.png", picture(20, 30))
        file.writestr("x/labels.csv", "file,label\n")
    assert own_images({"path": str(tmp_path / "a.zip")}) == OwnImages(5, 20)
    np.save(tmp_path / "b.npy", np.zeros((7, 12, 9, 3), np.uint8))
    assert own_images({"path": str(tmp_path / "b.npy")}) == OwnImages(7, 9)
    np.savez(tmp_path / "c.npz", images=np.zeros((7, 1, 12, 9), np.uint8))
    assert own_images({"path": str(tmp_path / "c.npz")}) == OwnImages(7, 9)
    np.savez_compressed(tmp_path / "d.npz", arr_0=np.zeros((4, 28, 28), np.uint8))
    assert own_images({"path": str(tmp_path / "d.npz")}) == OwnImages(4, 28)


def test_the_targets_of_a_table_of_pairs_are_counted_and_measured(tmp_path, on_cpu):
    photos(tmp_path / "photos", (16, 20), (16, 16))
    photos(tmp_path / "sketches", (40, 50))
    table = tmp_path / "pairs.csv"
    rows = "sketches/0.png, photos/0.png\nsketches/0.png,photos/1.png\n"
    table.write_text(f"\ufeffsource,target\n{rows}", "utf-8")
    assert own_images({"path": str(table)}) == OwnImages(2, 16)
    assert train_config("dataset=pairs", f"dataset.path={table}").dataset["resolution"] == 16
    for broken in ("source,photo\n", "", "target\n" + "x" * 200_000):
        table.write_text(broken)
        assert own_images({"path": str(table)}) is None


@pytest.mark.parametrize("suffix", [".dcm", ""])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_scans_are_counted_and_measured(tmp_path, suffix, kind):
    with zipfile.ZipFile(tmp_path / "scans.zip", "w") as file:
        for number in range(3):
            file.writestr(f"IM{number}{suffix}", dicom(np.zeros((40, 50), np.int16)))
    zipfile.ZipFile(tmp_path / "scans.zip").extractall(tmp_path / "scans")
    path = tmp_path / ("scans.zip" if kind == "zip" else "scans")
    assert own_images({"path": str(path)}) == OwnImages(3, 40)


def test_volumes_are_counted(tmp_path):
    for name in ("a.dcm", "b.nii.gz", "c.NPY", ".hidden.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert own_images({"path": str(tmp_path)}) == OwnImages(3, None)


def test_what_cannot_be_read_is_left_to_the_data_set(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    for path in ("missing", "empty", "bad.npz"):
        assert own_images({"path": str(tmp_path / path)}) is None
    assert own_images({}) is None


def test_counting_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(at_hand, "MOST_COUNTED", 3)
    assert own_images({"path": str(photos(tmp_path / "p", *[(8, 8)] * 5))}) == OwnImages(3, 8)
