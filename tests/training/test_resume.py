"""Stopped runs continue to the same weights; other settings and data are refused."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.commands.train_report import finished
from diffusion_cli.runs.checkpoint import LAST
from diffusion_cli.system.locks import run_lock
from diffusion_cli.training.callbacks import GracefulStop
from helpers import TINY, assert_same, state, train

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


def test_a_budget_that_is_already_spent_names_a_larger_one(tmp_path, capsys):
    assert train(tmp_path, "max_steps=3") == 0
    for words, said in (
        (["max_steps=3"], "finished at step 3; to continue, raise the budget, for example max_steps=6"),
        (
            ["max_steps=2"],
            "is already past step 2, at step 3; to continue, raise the budget, for example max_steps=6",
        ),
    ):
        capsys.readouterr()
        assert train(tmp_path, *words) == 0
        assert said in capsys.readouterr().out


def test_the_budget_of_the_last_start_is_suggested():
    folder = Path("outputs/demo")
    assert finished(folder, 1855, 1000, 2400).endswith("for example max_steps=2400")
    assert finished(folder, 2400, 2400, 2400).endswith("for example max_steps=4800")
    assert finished(folder, 2400, 2400, None).endswith("for example max_steps=4800")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["lr_schedule=cosine"], "the learning-rate schedule and the EMA follow"),
        ([], "the EMA follows"),
        (["ema.decay=0.9"], None),
    ],
)
def test_another_budget_is_named_if_the_weights_depend_on_it(tmp_path, capsys, words, what):
    assert train(tmp_path, "max_steps=2", *words) == 0
    assert train(tmp_path, "max_steps=3000", "max_time=1s", *words) == 0
    said = capsys.readouterr().err
    effect = "the weights differ from those of one uninterrupted run"
    line = f"diffuse: max_steps 2 -> 3000: {what} the new budget, so {effect}"
    assert (line in said) == ("max_steps 2 ->" in said) == (what is not None)


def test_options_of_another_run_are_one_line_each(tmp_path, capsys):
    run = tmp_path / "tiny"
    assert train(tmp_path, "max_steps=1") == 0
    for words, lines in (
        (["schedule=linear"], [f"schedule=linear: the run in {run} has schedule=cosine"]),
        (["schedule=linear", "schedule.beta_end=0.03"], [f"schedule=linear: the run in {run} has schedule=cosine"]),
        (["schedule.offset=0.01"], [f"schedule.offset=0.01: the run in {run} has 0.008"]),
        (["objective=min_snr", "seed=3"], [
            f"objective=min_snr: the run in {run} has objective=simple", f"seed=3: the run in {run} has 0",
        ]),
    ):  # fmt: skip
        capsys.readouterr()
        assert train(tmp_path, "max_steps=2", *words) == 2
        *said, remedy = capsys.readouterr().err.splitlines()
        assert said == [f"diffuse: {line}" for line in lines]
        assert "name=tiny: this run has another configuration; continue with: " in remedy


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
    assert [int(row["step"]) for row in rows if row["loss"]] == [1, 5, 10, 15, 20]
    assert float(rows[-1]["loss"]) > 0


def test_time_is_a_budget_over_all_starts(tmp_path, capsys):
    assert train(tmp_path, "max_steps=null", "max_time=1s") == 0
    first = state(tmp_path)
    assert first["callbacks"]["Stop"]["elapsed"] >= 1
    elapsed = first["callbacks"]["Stop"]["elapsed"]
    remedy = f"raise the budget, for example max_time={2 * int(elapsed)}s"
    stopped = f"Stopped by max_time at step {first['global_step']}; to continue, {remedy}"
    assert f"\n{stopped}\nNext: " in capsys.readouterr().out
    assert train(tmp_path, "max_steps=null", "max_time=1s") == 0
    step = first["global_step"]
    assert capsys.readouterr().out == (
        f"{tmp_path}/tiny finished at step {step}, because earlier starts took {elapsed:.0f} s and max_time=1s; to "
        f"continue, {remedy}\n"
    )
    assert state(tmp_path)["global_step"] == step
    assert train(tmp_path, f"max_steps={step + 1}", "max_time=1h") == 0
    assert state(tmp_path)["global_step"] == step + 1


def test_previews_may_be_turned_off_and_on_again(tmp_path):
    assert train(tmp_path, "max_steps=2", "preview_every=null") == 0
    assert not [*(tmp_path / "tiny" / "previews").glob("step_*")]
    assert train(tmp_path, "max_steps=4", "preview_every=1", "preview_steps=1") == 0
    assert [*(tmp_path / "tiny" / "previews").glob("step_*")]
    assert train(tmp_path, "max_steps=6", "preview_every=null") == 0


def test_a_smaller_time_budget_names_the_time_that_was_spent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(GracefulStop, "state_dict", lambda stop: {"elapsed": 67.4})
    assert train(tmp_path, "max_steps=1") == 0
    capsys.readouterr()
    assert train(tmp_path, "max_steps=2", "max_time=1s") == 0
    line = "because earlier starts took 67 s and max_time=1s; to continue, raise the budget, for example max_time=134s"
    assert capsys.readouterr().out == f"{tmp_path}/tiny finished at step 1, {line}\n"


def test_a_larger_budget_goes_on_with_the_run_as_it_says(tmp_path):
    """Though the default learning rate falls over the budget."""
    words = ["lr_schedule=cosine"]
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
    np.save(tmp_path / "images.npy", np.zeros((40, 8, 8), np.uint16))
    assert train(tmp_path, *words, "max_steps=6") == 2
    printed = capsys.readouterr().err
    assert re.search(r"kind=raster: the images of the run in .* have kind=picture; restore the data", printed)


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


# --- Pieces ------------------------------------------------------------


def test_a_classifier_goes_on_to_the_last_bit(tmp_path):
    words = ["task=classifier", "validate_every=5"]
    train(tmp_path / "whole", *words, "max_steps=10")
    train(tmp_path / "parts", *words, "max_steps=5")
    train(tmp_path / "parts", *words, "max_steps=10")
    assert_same(state(tmp_path / "whole")["state_dict"], state(tmp_path / "parts")["state_dict"])


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
