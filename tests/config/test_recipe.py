"""Recipes: what `auto` stands for, and the warnings about a training that goes wrong or takes days."""

import io
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.commands import train_checks
from diffusion_cli.config import CONF, TrainConfig, at_hand, build, load, options, recipe
from diffusion_cli.config.at_hand import OwnImages, own_images
from diffusion_cli.config.continued import with_values
from diffusion_cli.config.recipe import budget, ema_decay, learning_rate, network_width, warm_up_steps
from diffusion_cli.data import Batch
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.diffusion.time_sampling import Uniform
from diffusion_cli.runs.checkpoint import LAST
from diffusion_cli.training import callbacks, duration, loss_check
from diffusion_cli.training.loss_check import LossCheck, ZeroNetwork
from diffusion_cli.training.module import DenoisingModule


def train_config(*words: str) -> TrainConfig:
    config = load("train", words)
    assert isinstance(config, TrainConfig)
    return config


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(recipe, "gpu", lambda accelerator: True)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(recipe, "gpu", lambda accelerator: False)


def picture(height: int, width: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height), (10, 20, 30)).save(data, "PNG")
    return data.getvalue()


def photos(folder: Path, *sizes: tuple[int, int]) -> Path:
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        (folder / f"{number}.png").write_bytes(picture(*size))
    return folder


# --- The numbers --------------------


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


# --- Own images --------------------


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
    assert config.max_steps == config.optimizer["decay_steps"] == 5000
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


def test_scans_and_volumes_are_counted(tmp_path):
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


# --- A run keeps its recipe --------------------


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
    assert (before.optimizer["warm_up_steps"], before.ema.decay) == (1, 0.9)
    after = train_config(*words, "max_steps=2400")
    assert after.name == before.name
    assert (after.optimizer["warm_up_steps"], after.ema.decay, after.optimizer["lr"]) == (100, 0.998, 0.003)
    assert after.optimizer["decay_steps"] == 2400
    again = with_values(before.model_dump(), {"max_steps": 2400})  # as `diffuse train run=` does
    assert again == after.model_dump()


def test_what_equals_a_derived_value_by_chance_stays(tmp_path):
    stated = ["ema.decay=0.998", "optimizer.warm_up_steps=100"]  # as derived from 2,400 steps
    before, words = begin(tmp_path, *stated)
    after = with_values(before.model_dump(), {"max_steps": 24_000})
    assert (after["optimizer"]["warm_up_steps"], after["ema"]["decay"]) == (100, 0.998)
    assert after == train_config(*words, "max_steps=24000").model_dump()
    preset = train_config("experiment=ddpm_cifar10").model_dump()
    epochs = with_values(preset, {"max_steps": None, "max_epochs": 3000})
    assert (epochs["optimizer"]["warm_up_steps"], epochs["ema"]["decay"]) == (5000, 0.9999)


@pytest.mark.parametrize(("optimizer", "falls"), [("adam", None), ("adamw", 300)])
def test_a_budget_in_steps_after_one_in_epochs_keeps_the_kind_of_schedule(optimizer, falls):
    before = train_config(f"optimizer={optimizer}", "max_steps=null", "max_epochs=50").model_dump()
    assert with_values(before, {"max_steps": 300})["optimizer"]["decay_steps"] == falls


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
    _, words = begin(tmp_path, "max_steps=24", "ema.decay=0.5", "optimizer.warm_up_steps=7", "name=mine")
    after = train_config(*words[3:], "max_steps=2400")  # not repeated
    assert (after.optimizer["warm_up_steps"], after.ema.decay) == (7, 0.5)


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
    then = ["dataset.resolution=64", "max_steps=100000", "optimizer.lr=0.003", "optimizer.warm_up_steps=100"]
    words = ["dataset=folder", f"dataset.path={folder}"]
    before = train_config(*words, "model=unet_small", *then, "ema.decay=0.9999")
    short = train_config(*words).name
    store(before, tmp_path / "runs" / str(short), recorded=False)
    stated = ["model=unet_small", "dataset.resolution=64", "optimizer.lr=0.003", "max_steps=200000"]
    for said in ([], stated[:1], stated[1:3], stated):
        after = train_config(*words, *said, f"output_dir={tmp_path / 'runs'}")
        assert after.name == short
        for key in ("model", "dataset", "optimizer", "ema", "max_steps"):
            if key not in ("optimizer", "max_steps") or said != stated:
                assert getattr(after, key) == getattr(before, key), key
    assert train_config(*words, "optimizer.lr=0.001", f"output_dir={tmp_path / 'runs'}").name != short


@pytest.mark.parametrize(
    "said", [["ema.decay=0.998"], ["optimizer.warm_up_steps=100"], ["optimizer.lr=0.001"]]
)
def test_a_run_of_an_earlier_version_is_found_by_any_of_its_values(tmp_path, said):
    then = ["optimizer.lr=0.001", "ema.decay=0.998", "optimizer.warm_up_steps=100"]
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


# --- Warnings --------------------


def check(**optimizer: float) -> LossCheck:
    model = {"channels": 64, "channel_mult": [1, 2, 2, 3]}
    return LossCheck({"optimizer": {"lr": 0.003, **optimizer}, "model": model, "batch_size": 64})


def test_a_stuck_loss_is_named_once_with_a_remedy():
    warnings = [check_.warning(1.0, step, 1.0) for check_ in [check()] for step in range(50, 500, 50)]
    assert [line is not None for line in warnings] == [False] * 3 + [True] + [False] * 5
    assert warnings[3] == (
        "loss 1.00 at step 200: no better than predicting zero (1.00); stop (Ctrl-C) and train again with "
        "optimizer.lr=0.00036 name=NEW"
    )
    line = check(lr=0.0003).warning(1.0, 200, 1.0)
    assert line is not None
    assert "with optimizer.lr=3e-05" in line


def test_a_rising_loss_is_named_once():
    losses = {50: 0.12, 75: 0.08, 100: 0.56, 125: 0.7}
    warnings = [check_.warning(loss, step, 1.0) for check_ in [check()] for step, loss in losses.items()]
    assert [line is not None for line in warnings] == [False, False, True, False]
    assert str(warnings[2]).startswith(
        "loss 0.56 at step 100: diverging, from 0.08 at step 75; stop (Ctrl-C) and train again with optimizer.lr="
    )


def test_a_loss_that_falls_with_noise_is_not_named():
    generator = np.random.default_rng(0)
    losses = 0.05 + np.exp(-np.arange(100) / 5) * generator.uniform(0.5, 1.5, 100)
    check_ = check()
    assert [check_.warning(loss, 10 * step, 1.0) for step, loss in enumerate(losses)] == [None] * 100


@pytest.mark.parametrize("name", ["eps", "x0", "v", "flow", "score"])
def test_the_loss_of_zero_is_the_mean_square_of_the_target(name):
    """Of eps it is 1, of x_0 the mean square of the images, of v between the two."""
    schedule = build(yaml.safe_load((CONF / "schedule" / "cosine.yaml").read_text()))
    parameterization = build(yaml.safe_load((CONF / "parameterization" / f"{name}.yaml").read_text()))
    objective = build(yaml.safe_load((CONF / "objective" / "target.yaml").read_text()))
    model = Denoiser(ZeroNetwork(False), schedule, parameterization)
    module = DenoisingModule(model, objective, Uniform(), Pixels((1, 16, 16)), None, seed=0, info=None)  # pyright: ignore
    images = torch.full((16, 1, 16, 16), 0.5)
    images[::2] = -0.25
    zero = module.loss_of_zero(Batch(0, images, None, torch.arange(16)))
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    times = Uniform()(schedule, u).t
    c_skip, c_out, _, _ = parameterization(schedule, times)
    alpha, sigma = schedule(times)
    of_image, of_noise = (1 - alpha * c_skip) / c_out, sigma * c_skip / c_out
    square = images.double().square().mean()
    exact = (of_image**2 * square + of_noise**2).mean().item()
    assert zero == pytest.approx(exact, rel=0.05)


def test_objectives_of_low_noise_have_no_loss_of_zero():
    schedule = build(yaml.safe_load((CONF / "schedule" / "cosine.yaml").read_text()))
    eps = build(yaml.safe_load((CONF / "parameterization" / "eps.yaml").read_text()))
    objective = build(yaml.safe_load((CONF / "objective" / "likelihood.yaml").read_text()))
    model = Denoiser(ZeroNetwork(False), schedule, eps)
    module = DenoisingModule(model, objective, Uniform(), Pixels((1, 4, 4)), None, seed=0, info=None)  # pyright: ignore
    assert module.loss_of_zero(Batch(0, torch.zeros(2, 1, 4, 4), None, torch.arange(2))) is None


TINY = ["model.channels=8", "model.norm_groups=4", "model.num_heads=1", "model.head_channels=null"]


def test_training_names_a_stuck_loss(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loss_check, "PATIENCE", 4)
    monkeypatch.setattr(loss_check, "USELESS", 0.8)  # four steps of sixteen images measure no more exactly
    words = [
        "train",
        *TINY,
        "max_steps=4",
        "log_every=2",
        "batch_size=16",
        "preview_every=100",
        "trainer=cpu",
    ]
    words += ["logger=csv", f"output_dir={tmp_path}", "precision=fp32"]
    assert run([*words, "optimizer.lr=1e-9", "name=stuck"]) == 0
    err = capsys.readouterr().err
    assert "diffuse: loss " in err
    assert "at step 4: no better than predicting zero (" in err
    assert "train again with optimizer.lr=0.0015 name=NEW" in err
    header, *rows = (tmp_path / "stuck" / "metrics.csv").read_text().splitlines()
    relative = [dict(zip(header.split(","), row.split(","), strict=True))["relative_loss"] for row in rows]
    assert [math.isclose(float(value), 1, abs_tol=0.2) for value in relative] == [True, True]


def test_training_names_a_time_of_days(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(duration, "LONG", 0.0)
    monkeypatch.setattr(callbacks.Progress, "MEASURED", 0.0)
    words = ["train", *TINY, "max_steps=5", "batch_size=16", "preview_every=100", "trainer=cpu", "logger=csv"]
    assert run([*words, f"output_dir={tmp_path}", "precision=fp32"]) == 0
    assert capsys.readouterr().err.count("s per step without a GPU: 2 steps take about 0 hours; ") == 1


def test_the_time_of_a_training():
    config = {
        "schedule": {},
        "dataset": {"resolution": 64},
        "model": {"_target_": "x.UNet", "channels": 64, "channel_mult": [1, 3]},
    }
    assert duration.warning(config, 0.5, 20_000) is None
    assert duration.warning(config, 17.0, 100_000) == (
        "17.0 s per step without a GPU: 100,000 steps take about 20 days; stop (Ctrl-C) and train with "
        "model=unet_patch2 dataset.resolution=32 max_steps=20000 name=NEW"
    )
    small = {"schedule": {}, "dataset": {"resolution": 16}, "model": {"_target_": "x.UNet", "channels": 32}}
    assert duration.warning(small, 17.0, 5000) == (
        "17.0 s per step without a GPU: 5,000 steps take about 24 hours; add max_time=1h to stop after an hour"
    )
    points = {
        "schedule": {},
        "dataset": {"num_points": 9},
        "model": {"_target_": "x.SetTransformer", "hidden_size": 512},
    }
    assert "unet_patch2" not in str(duration.warning(points, 17.0, 100_000))


# --- What the machine has --------------------


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, True),
        ("0", True),
        ("1,2", True),
        ("GPU-8932f937", True),
        ("", False),
        ("-1", False),
        ("NoDevFiles", False),
    ],
)
def test_a_gpu_that_is_hidden_is_none(visible, expected, monkeypatch):
    monkeypatch.setattr(at_hand.os.path, "exists", lambda path: path == "/dev/dxg")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert at_hand.gpu("auto") == expected
    assert (at_hand.gpu("cuda"), at_hand.gpu("cpu")) == (True, False)


def test_a_value_for_a_group_is_a_mistake(capsys):
    assert run(["train", "ema=0.99"]) == 2
    assert "ema=0.99: not a single value; set ema.decay or ema.warm_up" in capsys.readouterr().err


def test_a_recipe_for_another_machine_than_torch_finds_is_named(tmp_path, monkeypatch):
    own = train_config("dataset=folder", f"dataset.path={photos(tmp_path / 'p', (20, 20))}")
    for assumed, there, line in [
        (True, False, "trainer=cpu"),
        (False, True, "trainer=gpu"),
        (True, True, None),
    ]:
        monkeypatch.setattr(train_checks, "gpu", lambda accelerator, assumed=assumed: assumed)
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        remark = train_checks.remark_on_machine(own)
        assert remark is None if line is None else line in str(remark)
        assert (
            train_checks.remark_on_machine(train_config()) is None
        )  # the recipe of digits is the same everywhere
