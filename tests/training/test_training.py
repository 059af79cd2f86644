"""A training run: evaluations, checkpoints, averages, previews and divergence."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.diffusion.objectives import Simple
from diffusion_cli.runs.checkpoint import BEST, LAST, read
from diffusion_cli.runs.load import load_model
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.signals import UNFINISHED
from diffusion_cli.training.module import DenoisingModule
from helpers import TINY, assert_same, state, train

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
ON_THE_WAY = [
    "eval_every=4", "eval_samples=70", "eval_steps=2", "metric=[fid,classifier]", "features=classifier",
]  # fmt: skip


@pytest.fixture(scope="module")
def evaluating(tmp_path_factory) -> list[str]:
    """Words of trainings with evaluations, and one cache of the reference features."""
    return [*ON_THE_WAY, f"cache_dir={tmp_path_factory.mktemp('cache')}"]


def test_evaluating_on_the_way_changes_no_weight_and_keeps_the_best(tmp_path, evaluating):
    words = ["max_steps=14", "model.class_conditional=true"]
    assert train(tmp_path / "plain", *words) == 0
    extra = [*evaluating, "keep_best=fid"]
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


def test_the_best_of_a_run_taken_up_again_is_that_of_one_without_a_stop(tmp_path, evaluating):
    extra = [*evaluating, "keep_best=fid"]
    assert train(tmp_path / "whole", "max_steps=13", *extra) == 0
    for steps in (5, 9, 13):
        assert train(tmp_path / "parts", f"max_steps={steps}", *extra) == 0
    whole, parts = (read(tmp_path / name / "tiny" / BEST).state for name in ("whole", "parts"))
    assert whole["callbacks"]["Evaluation"] == parts["callbacks"]["Evaluation"]
    assert_same(whole["callbacks"]["EMA"], parts["callbacks"]["EMA"])


def test_the_best_by_another_metric_is_sought_anew(tmp_path, evaluating):
    extra = [*evaluating, "metric=[fid,is]", "metric.is.splits=2"]
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


def test_weights_that_left_the_numbers_are_not_saved(tmp_path, capsys, monkeypatch):
    train(tmp_path, "max_steps=5")

    def overflow(self, *arguments, **named):
        for weight in self.parameters():
            weight.grad.fill_(torch.inf)

    monkeypatch.setattr(DenoisingModule, "configure_gradient_clipping", overflow)
    assert train(tmp_path, "max_steps=6", "checkpoint_every=1") == 2
    assert "weights: not a finite number at step 6" in capsys.readouterr().err
    assert not (tmp_path / "tiny" / "checkpoints" / "step_00000006.ckpt").exists()


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


def test_a_signal_between_the_parts_of_a_batch_waits_for_the_whole(tmp_path, monkeypatch):
    words = ["max_steps=8", "accumulate_grad_batches=4", "checkpoint_every=5"]
    loss = DenoisingModule.loss
    for part in (1, 2, 3):

        def interrupted(self, batch, share, number=4 * (2 * part - 1) + part):
            if batch.number == number:
                signal.raise_signal(signal.SIGTERM)
            return loss(self, batch, share)

        with monkeypatch.context() as patch:
            patch.setattr(DenoisingModule, "loss", interrupted)
            assert train(tmp_path / "parts", *words) == UNFINISHED
        assert state(tmp_path / "parts")["global_step"] == 2 * part
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


def test_a_signal_saves_and_says_how_to_go_on(tmp_path):
    """SIGUSR1; the test above sends SIGINT, and test_signals.py raises all."""
    process = start(tmp_path, "max_steps=100000", "checkpoint_every=5")
    wait_for(tmp_path / "tiny" / LAST, process)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == UNFINISHED, err
    assert "the same command continues the run" in out
    assert "Traceback" not in err
    step = state(tmp_path)["global_step"]
    assert f"at step {step}" in out


# --- Pieces ------------------------------------------------------------


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


def test_a_classifier_is_measured_at_its_end(tmp_path, capsys):
    assert train(tmp_path, "task=classifier", "max_steps=4", "validate_every=3") == 0
    assert "validation accuracy 0." in capsys.readouterr().out
    with (tmp_path / "tiny" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val_accuracy"]]
    assert [row["step"] for row in rows] == ["3", "4"]
