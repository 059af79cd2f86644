"""Training: runs continue to the last bit, nothing is lost, and mistakes are caught."""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from diffusion_cli.cli import run
from diffusion_cli.data import Batch, ResolutionSchedule
from diffusion_cli.data.progressive import Stage
from diffusion_cli.diffusion.denoiser import Denoiser, NoisyClassifier
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.diffusion.objectives import Objective, Simple, Target, drop_labels
from diffusion_cli.diffusion.parameterizations import X0
from diffusion_cli.diffusion.schedules import Rectified
from diffusion_cli.diffusion.time_sampling import TimeBatch, Times, Uniform
from diffusion_cli.formats import Uint8Image
from diffusion_cli.metrics import EvaluationCancelled
from diffusion_cli.runs.checkpoint import BEST, LAST, read
from diffusion_cli.runs.load import load_model
from diffusion_cli.samplers import DDIM
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.locks import run_lock
from diffusion_cli.system.signals import UNFINISHED
from diffusion_cli.training import evaluation
from diffusion_cli.training.callbacks import GracefulStop, Preview, ValidationAccuracy, ValidationLoss
from diffusion_cli.training.ema import EMA
from diffusion_cli.training.module import DenoisingModule, LevelMeter
from diffusion_cli.training.optimizers import Adam, AdamW
from helpers import TINY, assert_same, checkpoint_info, state, train

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.mark.parametrize(
    "extra", [[], ["accumulate_grad_batches=2", "model.dropout=0.1", "dataset.flip=true"]]
)
def test_a_run_taken_up_again_equals_one_without_a_stop(tmp_path, extra):
    assert train(tmp_path / "whole", "max_steps=14", *extra) == 0
    assert train(tmp_path / "parts", "max_steps=5", *extra) == 0
    assert train(tmp_path / "parts", "max_steps=14", *extra) == 0
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole["global_step"] == 14
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(whole[key], parts[key], key)
    assert_same(whole["callbacks"]["EMA"], parts["callbacks"]["EMA"])


ON_THE_WAY = [
    "eval_every=4", "eval_samples=70", "eval_steps=2", "metric=[fid,classifier]", "features=classifier",
    "features.steps=20",
]  # fmt: skip


def test_evaluating_on_the_way_changes_no_weight_and_keeps_the_best(tmp_path):
    words = ["max_steps=14", "model.class_conditional=true"]
    assert train(tmp_path / "plain", *words) == 0
    extra = [*ON_THE_WAY, f"cache_dir={tmp_path}/cache", "keep_best=fid"]
    assert train(tmp_path / "watched", *words, *extra) == 0
    assert_same(state(tmp_path / "plain")["state_dict"], state(tmp_path / "watched")["state_dict"])
    with (tmp_path / "watched" / "tiny" / "metrics.csv").open(newline="") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file) if row.get("frechet_classifier")}
    assert sorted(rows) == [4, 8, 12]
    distances = {step: float(row["frechet_classifier"]) for step, row in rows.items()}
    assert all(0 <= float(row["class_accuracy"]) <= 1 for row in rows.values())
    best = min(distances, key=lambda step: distances[step])
    model = load_model(tmp_path / "watched" / "tiny", "ema", torch.device("cpu"), "best")
    assert model.step == best
    assert read(tmp_path / "watched" / "tiny" / BEST).state["callbacks"]["Evaluation"]["best"] == (
        best,
        distances[best],
    )


def test_the_best_of_a_run_taken_up_again_is_that_of_one_without_a_stop(tmp_path):
    extra = [*ON_THE_WAY, f"cache_dir={tmp_path}/cache", "keep_best=fid"]
    assert train(tmp_path / "whole", "max_steps=13", *extra) == 0
    for steps in (5, 9, 13):
        assert train(tmp_path / "parts", f"max_steps={steps}", *extra) == 0
    whole, parts = (read(tmp_path / name / "tiny" / BEST).state for name in ("whole", "parts"))
    assert whole["callbacks"]["Evaluation"] == parts["callbacks"]["Evaluation"]
    assert_same(whole["callbacks"]["EMA"], parts["callbacks"]["EMA"])


def test_the_best_by_another_metric_is_sought_anew(tmp_path):
    extra = [*ON_THE_WAY, f"cache_dir={tmp_path}/cache", "metric=[fid,is]", "metric.is.splits=2"]
    assert train(tmp_path, "max_steps=5", *extra, "keep_best=fid") == 0
    assert train(tmp_path, "max_steps=9", *extra, "keep_best=is") == 0
    step, value = read(tmp_path / "tiny" / BEST).state["callbacks"]["Evaluation"]["best"]
    assert step == 8  # not the distance of step 4, which is a larger number
    assert 1 <= value <= 10


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["keep_best=fid"], "keep_best=fid: no evaluations during training; set eval_every"),
        (["eval_every=5", "keep_best=kid"], "keep_best=kid: not in metric=[fid]; add it to metric"),
        (
            ["eval_every=5", "metric=kid"],
            "metric.kid.subset_size=1000: must be at least 2 and at most 500",
        ),
        (["eval_every=5", "metric=bound"], "metric=bound: measures no samples"),
        (
            ["eval_every=5", "task=classifier", "model=classifier_tiny"],
            "eval_every=5: a classifier makes no samples",
        ),
        (["eval_every=5", "eval_steps=2000"], "eval_steps=2000: "),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_before_training(tmp_path, capsys, words, line):
    quick = ["features=classifier", "features.steps=2", f"cache_dir={tmp_path}/cache"]
    assert run(["train", "name=tiny", f"output_dir={tmp_path}/o", "max_steps=5", *quick, *words]) == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "o" / "tiny").exists()


def test_the_optimizer_steps_once_a_batch_whatever_the_parts(tmp_path):
    assert train(tmp_path / "one", "max_steps=4") == 0
    assert train(tmp_path / "two", "max_steps=4", "accumulate_grad_batches=2") == 0
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    assert one["global_step"] == two["global_step"] == 4
    assert one["callbacks"]["EMA"]["updates"] == two["callbacks"]["EMA"]["updates"] == 4
    for key, weight in one["state_dict"].items():  # and its noise is that of the whole batch
        torch.testing.assert_close(weight, two["state_dict"][key], rtol=1e-4, atol=1e-6)


def test_a_run_goes_on_in_more_parts_where_memory_is_short(tmp_path):
    words = ["dataset.flip=true", "time_sampling=stratified"]
    assert train(tmp_path / "whole", "max_steps=6", *words) == 0
    assert train(tmp_path / "parts", "max_steps=3", *words) == 0
    assert train(tmp_path / "parts", "max_steps=6", *words, "accumulate_grad_batches=4") == 0
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    for key, weight in whole["state_dict"].items():
        torch.testing.assert_close(weight, parts["state_dict"][key], rtol=1e-4, atol=1e-5)


def test_automatic_precision_stays_that_of_the_start(tmp_path, monkeypatch):
    words = [word for word in TINY if not word.startswith("precision")]
    for steps, fast in ((2, False), (4, True)):
        monkeypatch.setattr("diffusion_cli.system.precision.has_fast_bf16", lambda device, fast=fast: fast)
        assert run([*words, f"output_dir={tmp_path}", f"max_steps={steps}"]) == 0
    assert state(tmp_path)["diffuse"]["precision"] == "fp32"


def test_a_complete_run_is_left_alone(tmp_path, capsys):
    train(tmp_path, "max_steps=5")
    before = (tmp_path / "tiny" / LAST).stat().st_mtime_ns
    assert train(tmp_path, "max_steps=5") == 0
    assert "finished at step 5" in capsys.readouterr().out
    assert (tmp_path / "tiny" / LAST).stat().st_mtime_ns == before


def test_another_configuration_in_the_folder_is_refused(tmp_path, capsys):
    train(tmp_path, "max_steps=5")
    assert train(tmp_path, "max_steps=9", "optimizer.lr=0.5", "seed=3") == 2
    err = capsys.readouterr().err
    assert "optimizer.lr=0.5: the run in" in err
    assert "has 0.001" in err
    assert "seed=3" in err
    assert "max_steps" not in err
    assert state(tmp_path)["global_step"] == 5


def test_a_run_needs_no_log(tmp_path):
    assert train(tmp_path, "max_steps=5", "logger=[]") == 0
    assert not (tmp_path / "tiny" / "metrics.csv").exists()


def test_a_run_that_could_not_start_leaves_no_claim(tmp_path, capsys):
    assert train(tmp_path, "dataset=array", f"dataset.path={tmp_path}/none.npy", "max_steps=5") == 2
    assert "none.npy" in capsys.readouterr().err
    assert train(tmp_path, "max_steps=5") == 0


def test_a_damaged_configuration_file_is_written_anew(tmp_path):
    train(tmp_path, "max_steps=5")
    path = tmp_path / "tiny" / "config.yaml"
    path.write_text("a: [")
    assert train(tmp_path, "max_steps=9") == 0
    assert yaml.safe_load(path.read_text())["max_steps"] == 9


def test_a_run_that_saved_nothing_gives_way_to_another_configuration(tmp_path):
    """As where memory ran out in the first step."""
    train(tmp_path, "max_steps=5")
    (tmp_path / "tiny" / LAST).unlink()
    for file in (tmp_path / "tiny" / "checkpoints").iterdir():
        file.unlink()
    assert train(tmp_path, "max_steps=5", "accumulate_grad_batches=2") == 0


def test_the_log_keeps_earlier_rows_and_drops_those_after_the_checkpoint(tmp_path):
    train(tmp_path, "max_steps=10", "checkpoint_every=10")
    log = tmp_path / "tiny" / "metrics.csv"
    lines = log.read_text().splitlines()
    # As if the run had been killed at step 15, after logging and before the next checkpoint.
    log.write_text("\n".join([*lines, lines[-1].replace("10", "15", 1)]) + "\n")
    train(tmp_path, "max_steps=20")
    rows = list(csv.DictReader(log.open()))
    assert [int(row["step"]) for row in rows if row["loss"]] == [5, 10, 15, 20]
    assert float(rows[-1]["loss"]) > 0


def test_checkpoints_are_few_and_plain(tmp_path):
    train(tmp_path, "max_steps=20", "keep_last=2")
    folder = tmp_path / "tiny" / "checkpoints"
    assert sorted(file.name for file in folder.iterdir()) == [
        "last.ckpt",
        "step_00000015.ckpt",
        "step_00000020.ckpt",
    ]
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    assert (
        checkpoint["diffuse"]["config"]["schedule"]["_target_"] == "diffusion_cli.diffusion.schedules.Cosine"
    )
    assert yaml.safe_load((tmp_path / "tiny" / "config.yaml").read_text())["batch_size"] == 16


def test_averaged_and_raw_weights_are_both_there(tmp_path):
    train(tmp_path, "max_steps=10")
    cpu = torch.device("cpu")
    averaged, raw = (load_model(tmp_path / "tiny", kind, cpu) for kind in ("ema", "raw"))
    assert averaged.digest != raw.digest
    expected = state(tmp_path)["state_dict"]
    assert_same(
        {f"model.network.{k}": v for k, v in raw.denoiser.network.state_dict().items()}, dict(expected)
    )


def test_the_loss_falls(tmp_path):
    train(tmp_path, "max_steps=120", "log_every=20", "optimizer.lr=0.003", "checkpoint_every=120")
    losses = [
        float(row["loss"])
        for row in csv.DictReader((tmp_path / "tiny" / "metrics.csv").open())
        if row["loss"]
    ]
    assert losses[0] > 0.6
    assert losses[-1] < 0.4


def test_previews_and_val_loss(tmp_path):
    train(tmp_path, "max_steps=10", "preview_every=10", "validate_every=5", "preview_steps=2")
    assert (tmp_path / "tiny" / "previews" / "step_00000010.png").is_file()
    rows = list(csv.DictReader((tmp_path / "tiny" / "metrics.csv").open()))
    val = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    assert len(val) == 2
    assert val[1] < val[0]


def test_watching_a_run_does_not_change_it(tmp_path):
    train(tmp_path / "plain", "max_steps=10")
    train(
        tmp_path / "watched",
        "max_steps=10",
        "preview_every=3",
        "validate_every=2",
        "preview_steps=2",
        "log_every=1",
    )
    assert_same(state(tmp_path / "plain")["state_dict"], state(tmp_path / "watched")["state_dict"])


def test_divergence_stops_with_step_rate_and_checkpoint(tmp_path, capsys, monkeypatch):
    assert train(tmp_path, "max_steps=5") == 0
    last = tmp_path / "tiny" / LAST
    before = last.read_bytes()
    monkeypatch.setattr(Simple, "weight", lambda self, schedule, t: torch.full_like(t, torch.nan))
    assert train(tmp_path, "max_steps=20") == 2
    err = capsys.readouterr().err
    assert "not a finite number at step 5, learning rate 0.001" in err
    assert f"the last good checkpoint is {last}; try a smaller optimizer.lr" in err
    assert "precision=fp32 with another name=\n" in err  # for this one is of a run with these settings
    assert last.read_bytes() == before


def test_time_is_a_budget_over_all_starts(tmp_path):
    assert train(tmp_path, "max_steps=null", "max_time=1s") == 0
    first = state(tmp_path)
    assert first["callbacks"]["Stop"]["elapsed"] >= 1
    assert train(tmp_path, "max_steps=null", "max_time=1s") == 0
    assert state(tmp_path)["global_step"] <= first["global_step"] + 1


def test_weights_that_left_the_numbers_are_not_saved(tmp_path, capsys, monkeypatch):
    train(tmp_path, "max_steps=5")

    def overflow(self, *arguments, **named):
        for weight in self.parameters():
            weight.grad.fill_(torch.inf)

    monkeypatch.setattr(DenoisingModule, "configure_gradient_clipping", overflow)
    assert train(tmp_path, "max_steps=6", "checkpoint_every=1") == 2
    assert "weights: not a finite number at step 6" in capsys.readouterr().err
    assert not (tmp_path / "tiny" / "checkpoints" / "step_00000006.ckpt").exists()


def test_a_larger_budget_goes_on_with_the_run_as_it_says(tmp_path):
    """Though the default learning rate falls over the budget."""
    words = ["optimizer.decay_steps=${max_steps}"]
    assert train(tmp_path, "max_steps=3", *words) == 0
    assert train(tmp_path, "max_steps=6", *words) == 0
    assert state(tmp_path)["global_step"] == 6


def test_the_checkpoint_tells_which_run_it_is_without_its_configuration_file(tmp_path, capsys):
    train(tmp_path, "max_steps=3")
    (tmp_path / "tiny" / "config.yaml").unlink()
    assert train(tmp_path, "max_steps=6", "seed=9") == 2
    assert "seed=9: the run in" in capsys.readouterr().err


def test_a_run_begun_on_other_data_is_refused(tmp_path, capsys):
    np.save(tmp_path / "images.npy", np.zeros((40, 8, 8), np.uint8))
    words = ["dataset=array", f"dataset.path={tmp_path}/images.npy", "max_steps=3"]
    assert train(tmp_path, *words) == 0
    np.save(tmp_path / "images.npy", np.zeros((60, 8, 8), np.uint8))
    assert train(tmp_path, *words, "max_steps=6") == 2
    assert "num_images=54: the run in" in capsys.readouterr().err


def test_two_processes_do_not_train_in_one_folder(tmp_path, capsys):
    with run_lock(tmp_path / "tiny"):
        assert train(tmp_path, "max_steps=3") == 2
    assert "name=tiny: is being trained by process" in capsys.readouterr().err
    assert train(tmp_path, "max_steps=3") == 0


def test_importance_sampling_is_taken_up_again_too(tmp_path):
    words = ["time_sampling=loss_second_moment", "time_sampling.bins=4", "time_sampling.memory=3"]
    assert train(tmp_path / "whole", "max_steps=8", *words) == 0
    assert train(tmp_path / "parts", "max_steps=5", *words) == 0
    assert train(tmp_path / "parts", "max_steps=8", *words) == 0
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole["state_dict"]["times.count"].sum() == 8 * 16
    assert_same(whole["state_dict"], parts["state_dict"])


def test_epochs_are_a_budget(tmp_path):
    assert train(tmp_path, "max_steps=null", "max_epochs=1", "batch_size=256", "checkpoint_every=100") == 0
    assert state(tmp_path)["global_step"] == 6  # 1,438 images / 256, rounded up


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """End the processes of a test that failed while they trained."""
    yield
    for process in STARTED:
        process.kill()
        process.wait()
    STARTED.clear()


def start(folder: Path, *words: str, start_new_session: bool = False) -> subprocess.Popen:
    command = "import sys; from diffusion_cli.cli import main; main()"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", command, *TINY, f"output_dir={folder}", *words],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=start_new_session,
    )  # fmt: skip
    STARTED.append(process)
    return process


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_a_signal_between_the_parts_of_a_batch_waits_for_the_whole(tmp_path):
    words = ["max_steps=40", "accumulate_grad_batches=4", "checkpoint_every=5"]
    process = start(tmp_path / "parts", *words)
    wait_for(tmp_path / "parts" / "tiny" / LAST, process)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        process = start(tmp_path / "parts", *words)
        time.sleep(0.3)
    process.communicate(timeout=60)
    assert train(tmp_path / "parts", *words) == 0
    assert train(tmp_path / "whole", *words) == 0
    assert_same(state(tmp_path / "whole")["state_dict"], state(tmp_path / "parts")["state_dict"])


def test_a_signal_to_the_whole_group_spares_the_workers_until_all_is_saved(tmp_path):
    for i in range(20):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    words = ["dataset=folder", f"dataset.path={tmp_path}", "dataset.resolution=8", "dataset.in_memory=false",
             "dataset.num_workers=2", "model=unet_tiny", "batch_size=4", "max_steps=100000"]  # fmt: skip
    process = start(tmp_path, *words, start_new_session=True)
    wait_for(tmp_path / "tiny" / LAST, process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == UNFINISHED, err
    assert "the same command continues the run" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number):
    process = start(tmp_path, "max_steps=100000", "checkpoint_every=5")
    wait_for(tmp_path / "tiny" / LAST, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == UNFINISHED, err
    assert "the same command continues the run" in out
    assert "Traceback" not in err
    step = state(tmp_path)["global_step"]
    assert f"at step {step}" in out


# --- One step ------------------------------------------------------------


class Constant(nn.Module):
    """A network with its one weight as output everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor, c_noise: Tensor, y: Tensor | None) -> Tensor:
        return self.weight.expand(x.shape)


class Recorded(Objective):
    """A loss of 1, 2, ... for the images of a batch; it keeps what each call draws."""

    def __init__(self) -> None:
        self.times: list[Tensor] = []
        self.noise: list[Tensor] = []
        self.labels: list[Tensor | None] = []
        self.masks: list[Tensor] = []

    def __call__(self, model, x0, y, t, eps):
        self.times.append(t)
        self.noise.append(eps)
        self.labels.append(y)
        self.masks.append(nn.functional.dropout(torch.ones(64), 0.5))
        return torch.arange(1.0, len(x0) + 1)

    def check(self, model, times):
        pass


class Weighing(Times):
    """Uniform times with the weights 1, 2, 3, ... and a bin an image; it keeps the losses that it is shown."""

    def forward(self, schedule, u):
        self.observed: list[tuple[Tensor, Tensor]] = []
        return TimeBatch(schedule.time(u), torch.arange(1.0, len(u) + 1), u, torch.arange(len(u)))

    def observe(self, bins, loss):
        self.observed.append((bins, loss))


def optimizer(**changes) -> Adam:
    plain = {"lr": 1.0, "betas": [0.9, 0.999], "eps": 1e-8, "warm_up_steps": 0, "decay_steps": None}
    return Adam(**{**plain, "clip_norm": None, **changes})


def step_of(objective: Objective, times: Times, seed: int = 0, **place: int) -> DenoisingModule:
    """A module in the place of a process, as Lightning would have it; its images are 1 x 2 x 2."""
    denoiser = Denoiser(Constant(0.0), Rectified(), X0())
    module = DenoisingModule(
        denoiser, objective, times, Pixels((1, 2, 2)), optimizer(), seed=seed, info=checkpoint_info((1, 2, 2))
    )
    alone = {"accumulate_grad_batches": 1, "world_size": 1, "global_rank": 0, "global_step": 0}
    module.trainer = SimpleNamespace(**{**alone, **place})  # pyright: ignore[reportAttributeAccessIssue]
    return module


def batch(number: int, count: int = 8) -> Batch:
    return Batch(number, torch.zeros(count, 1, 2, 2), None, torch.arange(count))


def test_noise_and_times_are_a_function_of_seed_and_step():
    """Equal for equal seeds and steps, whatever was drawn before; unlike for others."""
    objective = Recorded()
    for seed, number in ((0, 3), (0, 3), (0, 4), (1, 3)):
        torch.rand(seed + number)
        step_of(objective, Uniform(), seed).training_step(batch(number), 0)
    for first, again, *others in (objective.times, objective.noise, objective.masks):
        assert torch.equal(first, again)
        assert not any(torch.equal(first, other) for other in others)
    assert len(objective.times[0].unique()) == len(objective.noise[0].flatten(1).unique(dim=0)) == 8


@pytest.mark.parametrize("place", ["process", "part"])
def test_processes_and_parts_share_one_draw_and_have_their_own_dropout(place):
    whole, shares = Recorded(), Recorded()
    step_of(whole, Uniform()).training_step(batch(5), 0)
    for n in range(2):
        if place == "process":
            step_of(shares, Uniform(), world_size=2, global_rank=n).training_step(batch(5, 4), 0)
        else:
            step_of(shares, Uniform(), accumulate_grad_batches=2).training_step(batch(10 + n, 4), 0)
    assert torch.equal(torch.cat(shares.times), whole.times[0])
    assert torch.equal(torch.cat(shares.noise), whole.noise[0])
    assert not torch.equal(*shares.masks)


def test_processes_have_their_own_dropout_at_each_step():
    objective = Recorded()
    for rank in range(3):
        for number in (0, 1):
            step_of(objective, Uniform(), world_size=3, global_rank=rank).training_step(batch(number), 0)
    assert len(torch.stack(objective.masks).unique(dim=0)) == 6


def test_labels_are_withheld_at_the_share_of_the_objective():
    objective = Recorded()
    module = step_of(objective, Uniform())
    module.model.network.num_classes = 3  # pyright: ignore[reportArgumentType]
    given = torch.arange(2000) % 3
    for share in (0.0, 0.3):
        objective.label_dropout = share
        module.training_step(batch(0, 2000)._replace(labels=given), 0)
    kept, withheld = objective.labels
    assert kept is not None
    assert withheld is not None
    assert torch.equal(kept, given)
    assert abs((withheld == 3).float().mean().item() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 2000)
    assert torch.equal(withheld[withheld < 3], given[withheld < 3])


def test_the_loss_is_the_weighted_mean_and_times_learn_from_the_unweighted_losses():
    times = Weighing()
    module = step_of(Recorded(), times)
    loss = module.training_step(batch(0, 4), 0)
    assert loss.item() == (1 * 1 + 2 * 2 + 3 * 3 + 4 * 4) / 4
    assert module.meter.read()["loss"] == loss.item()
    ((bins, seen),) = times.observed
    assert (bins.tolist(), seen.tolist()) == ([0, 1, 2, 3], [1.0, 2.0, 3.0, 4.0])


def test_gradients_are_scaled_down_to_the_norm():
    module = step_of(Recorded(), Uniform())
    module.model.network.bias = nn.Parameter(torch.zeros(()))
    for clip_norm, expected in ((1.0, (0.6, 0.8)), (10.0, (3.0, 4.0)), (None, (3.0, 4.0))):
        module.optimizer_config = optimizer(clip_norm=clip_norm)
        for weight, gradient in zip(module.model.parameters(), (3.0, 4.0), strict=True):
            weight.grad = torch.tensor(gradient)
        module.configure_gradient_clipping(torch.optim.SGD(module.parameters(), 1.0))
        found = [weight.grad.item() for weight in module.model.parameters() if weight.grad is not None]
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_run_clips_and_warms_up(tmp_path):
    """Adam undoes any scale of gradients but one that its eps drowns: then no weight moves by a millionth."""
    weights = {}
    for clip_norm in ("null", "1e-12"):
        folder = tmp_path / clip_norm
        assert train(folder, "max_steps=3", "log_every=1", f"optimizer.clip_norm={clip_norm}") == 0
        weights[clip_norm] = state(folder)
    rates = [float(row["lr"]) for row in csv.DictReader((tmp_path / "null" / "tiny" / "metrics.csv").open())]
    assert rates == pytest.approx([0.001 * share for share in (2 / 3, 1, 1)])  # of the steps that come next
    moved = {}
    for clip_norm, found in weights.items():
        average = found["callbacks"]["EMA"]["network"]
        moved[clip_norm] = max(
            (weight - average[key.removeprefix("model.network.")]).abs().max().item()
            for key, weight in found["state_dict"].items()
        )
    assert moved["1e-12"] < 1e-6 < 1e-4 < moved["null"]


@pytest.mark.parametrize(
    ("warm_up_steps", "decay_steps", "factors"),
    [
        (0, None, {0: 1, 1: 1, 1000: 1}),
        (4, None, {0: 1 / 4, 1: 2 / 4, 2: 3 / 4, 3: 1, 4: 1, 99: 1}),
        (0, 8, {0: 1, 2: (2 + 2**0.5) / 4, 4: 1 / 2, 6: (2 - 2**0.5) / 4, 8: 0, 9: 0, 99: 0}),
        (4, 8, {0: 1 / 4, 2: 3 / 4 * (2 + 2**0.5) / 4, 4: 1 / 2, 8: 0}),
    ],
)
def test_the_learning_rate_at_each_step(warm_up_steps, decay_steps, factors):
    config = optimizer(lr=2.0, warm_up_steps=warm_up_steps, decay_steps=decay_steps)
    assert {step: config.factor(step) for step in factors} == pytest.approx(factors, abs=1e-15)
    steps = config.optimizer([nn.Parameter(torch.zeros(1))], fused=False)
    scheduler = config.scheduler(steps)
    for step in range(max(factors) + 1):
        if step in factors:
            assert steps.param_groups[0]["lr"] == pytest.approx(2 * factors[step], abs=1e-15)
        steps.step()
        scheduler.step()


def test_adam_and_adamw_make_their_first_step():
    """Of size lr along the sign of the gradient; with decoupled decay the weight shrinks by lr * decay before."""
    settings = {
        "lr": 0.1,
        "betas": [0.9, 0.99],
        "eps": 1e-12,
        "warm_up_steps": 0,
        "decay_steps": None,
        "clip_norm": None,
    }
    for config, expected in ((Adam(**settings), 1.9), (AdamW(**settings, weight_decay=0.5), 1.8)):
        weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        weight.grad = torch.tensor([7.0], dtype=torch.float64)
        config.optimizer([weight], fused=False).step()
        assert weight.item() == pytest.approx(expected)


class Guess(nn.Module):
    """A classifier with its weights as scores, for any image."""

    task = "classifier"

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(scores))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.scores.expand(len(x), -1)


class Log:
    """A logger and trainer in one."""

    is_global_zero = True
    precision_plugin = SimpleNamespace(forward_context=nullcontext)

    def __init__(self) -> None:
        self.loggers, self.values = [self], {}

    def log_metrics(self, values, step):
        self.values |= values


def averaged(module: DenoisingModule, network: nn.Module) -> EMA:
    """The average of a module's network, which has another network now."""
    ema = EMA(module.model.network, decay=0.9, warm_up=False)
    module.model.network = network
    return ema


def test_the_val_loss_and_previews_are_those_of_the_averaged_weights(tmp_path):
    module = step_of(Target(label_dropout=0.0), Uniform())
    log, stop, ema = Log(), GracefulStop(None, None), averaged(module, Constant(1.0))
    images = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    val = [Batch(0, images[:4], None, torch.arange(4)), Batch(1, images[4:], None, torch.arange(2))]
    ValidationLoss(1, lambda step: val, ema, stop).run(log, module, 1)  # pyright: ignore[reportArgumentType]
    assert log.values == {"val_loss": pytest.approx(images.square().mean().item(), rel=1e-5)}
    sampler = DDIM(module.model.schedule, eta=0.0, spacing="time")
    preview = Preview(
        1, ema, stop, run=tmp_path, sampler=sampler, steps=2, stages=ResolutionSchedule([Stage(0, (1, 2, 2), 1)]),
        space=Pixels((1, 2, 2)), form=Uint8Image(),
    )  # fmt: skip
    preview.run(log, module, 1)  # pyright: ignore[reportArgumentType]
    with Image.open(tmp_path / "previews" / "step_00000001.png") as picture:
        assert picture.getpixel((1, 1)) == 128  # of the value 0; the network of now makes 255


def test_samples_on_the_way_are_those_of_the_averaged_weights(tmp_path, monkeypatch):
    seen: list[Tensor] = []

    def evaluate(metrics, networks, samples, *others, **options):
        seen.append(samples.batch([0, 1])[0])
        raise EvaluationCancelled

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    module, shape = step_of(Recorded(), Uniform()), (1, 2, 2)
    log, ema = Log(), averaged(module, Constant(1.0))
    sampler = DDIM(module.model.schedule, eta=0.0, spacing="time")
    data: Any = SimpleNamespace(dataset=SimpleNamespace(name="some", shape=shape), cache_dir=tmp_path)
    watcher = evaluation.EvaluationCallback(
        1,
        {},
        data,
        data,
        evaluation.TrainingSamples(
            2, sampler, 2, shape, Pixels(shape), form=Uint8Image(), names=None, labels=None
        ),
        ResolutionSchedule([Stage(0, shape, 1)]),
        run=tmp_path,
        ema=ema,
        stop=GracefulStop(None, None),
        batch_size=2,
        keep_best=None,
        identity="",
    )
    assert not watcher.run(log, module, 1)  # pyright: ignore[reportArgumentType]
    assert seen[0].unique().tolist() == [128]  # of the value 0; the network of now makes 255


def test_the_val_accuracy_is_that_of_the_averaged_weights():
    module = step_of(Recorded(), Uniform())
    classifier = NoisyClassifier(Guess([0.0, 1.0, 0.0]), module.model.schedule, X0())
    module.model = classifier  # pyright: ignore[reportAttributeAccessIssue]
    log, ema = Log(), averaged(module, Guess([1.0, 0.0, 0.0]))
    val = [batch(0, 4)._replace(labels=torch.tensor([0, 1, 2, 1]))]
    watcher = ValidationAccuracy(1, lambda step: val, ema, GracefulStop(None, None))
    watcher.run(log, module, 1)  # pyright: ignore[reportArgumentType]
    assert log.values["val_accuracy"] == 0.5


def test_validation_images_meet_the_same_noise_at_spread_times_whenever_they_are_measured():
    objective = Recorded()
    for seed, number in ((0, 7), (0, 900), (1, 7)):
        module = step_of(objective, Uniform(), seed)
        list(module.val_losses(module.model, [batch(number), batch(number + 1)]))
    (first, second, again, _, other, _), noise = objective.times, objective.noise
    assert torch.equal(first, again)
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(first, second)
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(first, other)
    assert (first * 8).floor().tolist() == list(range(8))  # one in each of 8 equal intervals,
    assert (first * 8).frac().std() > 0.1  # anywhere in it


# --- Pieces ------------------------------------------------------------


def test_ema_decay_equals_score_sde(reference):
    arrays = reference("ema")
    ema = EMA(torch.nn.Linear(1, 1), decay=0.9999, warm_up=True)
    mine = torch.tensor([ema.decay_at(int(n)) for n in arrays["steps"]], dtype=torch.float64)
    torch.testing.assert_close(mine, arrays["scoresde"], rtol=1e-12, atol=0)


def test_ema_is_the_weighted_sum_of_the_past():
    network = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(network, decay=0.9, warm_up=False)
    start = network.weight.item()
    expected = start
    for value in (1.0, -2.0, 5.0):
        with torch.no_grad():
            network.weight.fill_(value)
            ema.update(network)
        expected = 0.9 * expected + 0.1 * value
    (weight,) = ema.network.parameters()
    assert weight.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert not weight.requires_grad


def test_ema_has_the_buffers_of_the_network():
    network = nn.BatchNorm1d(2)
    ema = EMA(network, decay=0.9, warm_up=False)
    network.running_mean = torch.tensor([3.0, 4.0])
    ema.update(network)
    for found in (ema.network, network):
        assert dict(found.named_buffers())["running_mean"].tolist() == [3.0, 4.0]


def test_ema_moves_once_an_optimizer_step():
    """However many parts a batch has: the EMA is called after each."""
    module = step_of(Recorded(), Uniform())
    ema, updates = EMA(module.model.network, decay=0.9, warm_up=False), []
    for step in (0, 0, 1, 1, 1, 2):
        module.trainer.global_step = step  # pyright: ignore[reportAttributeAccessIssue]
        ema.on_train_batch_end(module.trainer, module, None, None, 0)
        updates.append(ema.updates)
    assert updates == [0, 0, 1, 1, 1, 2]


def test_meter_separates_noise_levels_and_finds_the_first_bad_step():
    meter = LevelMeter()
    quantile = torch.tensor([0.0, 0.24, 0.26, 0.74, 1.0], dtype=torch.float64)
    meter.add(torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0]), quantile, step=0)
    assert meter.read() == {"loss": 3.6, "loss_q1": 1.5, "loss_q2": 3.0, "loss_q3": 5.0, "loss_q4": 7.0}
    assert meter.first_bad_step() is None
    for step in (4, 5):
        meter.add(torch.tensor([float("nan")]), torch.tensor([0.5]), step=step)
    assert meter.first_bad_step() == 4


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ValueError, match=r"last\.ckpt: invalid or damaged checkpoint"):
        read(path)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"diffuse": Evil()}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="damaged checkpoint"):
        read(tmp_path / "last.ckpt")
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_builds_only_our_classes(tmp_path):
    train(tmp_path, "max_steps=5")
    path = tmp_path / "tiny" / LAST
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["diffuse"]["config"]["model"] = {"_target_": "os.mkdir", "path": str(tmp_path / "owned")}
    torch.save(checkpoint, path)
    why = r"model\._target_=os\.mkdir: not a class of diffusion_cli for model"
    with pytest.raises(ValueError, match=rf"cannot build its model \({why}\); choose another run, or [^;]*$"):
        load_model(tmp_path / "tiny", "ema", torch.device("cpu"))


def test_a_step_without_a_checkpoint_is_named_with_those_there_are(tmp_path):
    with pytest.raises(
        ValueError, match=r"step=3: .* has no checkpoints of earlier steps; leave step out for"
    ):
        load_model(tmp_path, "ema", torch.device("cpu"), 3)
    (tmp_path / LAST).parent.mkdir()
    (tmp_path / LAST).with_name("step_00000002.ckpt").touch()
    with pytest.raises(ValueError, match=r"step=3: .* has no such checkpoint; choose a step from: 2$"):
        load_model(tmp_path, "ema", torch.device("cpu"), 3)


@pytest.mark.parametrize(("dropout", "untouched"), [(0.0, slice(10, 11)), (0.999999, slice(0, 10))])
def test_labels_are_withheld_as_often_as_asked(tmp_path, dropout, untouched):
    """With every label withheld only the embedding of the null class learns, with none withheld all others."""
    words = ["model.class_conditional=true", f"objective.label_dropout={dropout}"]
    for place, steps in (("short", 1), ("long", 12)):
        assert train(tmp_path / place, *words, f"max_steps={steps}") == 0
    key = "model.network.class_embedding.weight"
    one, other = (state(tmp_path / place)["state_dict"][key] for place in ("short", "long"))
    same = (one == other).all(dim=1)
    assert same[untouched].all()
    assert not same.all()


def test_withheld_labels_are_a_share_of_them():
    y, u = torch.arange(10).repeat(100), torch.rand(1000, generator=torch.Generator().manual_seed(0))
    mixed = drop_labels(y, 10, 0.3, u)
    assert abs((mixed == 10).float().mean().item() - 0.3) < 0.05
    assert torch.equal(mixed[u >= 0.3], y[u >= 0.3])


def test_a_classifier_goes_on_to_the_last_bit(tmp_path):
    words = ["task=classifier", "validate_every=5"]
    train(tmp_path / "whole", *words, "max_steps=10")
    train(tmp_path / "parts", *words, "max_steps=5")
    train(tmp_path / "parts", *words, "max_steps=10")
    assert_same(state(tmp_path / "whole")["state_dict"], state(tmp_path / "parts")["state_dict"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=classifier_tiny"], "model=classifier_tiny: is for task=classifier; set task=classifier"),
        (["objective=cross_entropy"], "objective=cross_entropy: is for task=classifier; set task=classifier"),
        (["task=classifier", "objective=simple"], "objective=simple: is for task=diffusion"),
    ],
)
def test_what_a_task_needs_is_said(tmp_path, capsys, words, message):
    plain = [word for word in TINY if not word.startswith("model.")]
    assert run([*plain, f"output_dir={tmp_path}", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_run_is_not_gone_on_with_on_other_labels(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.fromarray(np.full((8, 8), 30 * i, dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    words = ["dataset=folder", f"dataset.path={tmp_path}/images", "dataset.resolution=8", "dataset.channels=1",
             "dataset.val_fraction=0", "model=unet_tiny", "batch_size=4"]  # fmt: skip

    def label(first: str, second: str) -> None:
        rows = [f"{i}.png,{first if i < 4 else second}" for i in range(8)]
        (tmp_path / "images" / "labels.csv").write_text("file,label\n" + "\n".join(rows))

    label("ant", "bee")
    assert train(tmp_path, *words, "max_steps=2") == 0
    label("bee", "ant")
    assert train(tmp_path, *words, "max_steps=4") == 2
    assert "labels: differ from those that the run started with" in capsys.readouterr().err


def test_a_classifier_is_measured_at_its_end(tmp_path, capsys):
    assert train(tmp_path, "task=classifier", "max_steps=4", "validate_every=3") == 0
    assert "validation accuracy 0." in capsys.readouterr().out
    with (tmp_path / "tiny" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val_accuracy"]]
    assert [row["step"] for row in rows] == ["3", "4"]
