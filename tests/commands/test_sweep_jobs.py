"""Sweeps by Hydra's sweepers and launchers: jobs, objectives, failures, and the table at the end."""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from diffusion_cli.cli import run
from diffusion_cli.config import TrainConfig
from diffusion_cli.errors import MachineError, UsageError
from diffusion_cli.system.signals import UNFINISHED
from helpers import TINY

SEARCH = ["hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=0"]
LR = "optimizer.lr=tag(log,interval(1e-4,1e-2))"
BEST_RATE = 1e-3


def val_loss(rate: float) -> float:
    """The validation loss of a training that is not run."""
    return abs(math.log10(rate / BEST_RATE))


@pytest.fixture
def trained(monkeypatch, tmp_path) -> list[TrainConfig]:
    """The configurations that were trained; each training is replaced by writing its metrics.csv."""
    configs: list[TrainConfig] = []

    def write(config: TrainConfig) -> int:
        configs.append(config)
        folder = Path(config.output_dir, str(config.name))
        folder.mkdir(parents=True, exist_ok=True)
        rate = config.optimizer["lr"]
        (folder / "metrics.csv").write_text(f"step,loss,val_loss\n5,2,9\n10,1,{val_loss(rate)}\n11,0.5,\n")
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusion_cli.commands.train.run", write)
    return configs


def failing(monkeypatch, fails: Callable[[TrainConfig], Exception | int | None]) -> None:
    """Let some of the trainings fail: by an exception, or an exit code."""
    from diffusion_cli.commands import train

    write = train.run

    def run_or_fail(config: TrainConfig) -> int:
        failure = fails(config)
        if isinstance(failure, Exception):
            raise failure
        return failure or write(config)

    monkeypatch.setattr(train, "run", run_or_fail)


def rows(out: str) -> list[list[str]]:
    """The cells of the table at the end of a sweep."""
    lines = out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("job  "))
    last = next((n for n, line in enumerate(lines) if n > first and not line), len(lines))
    return [re.split(" {2,}", line) for line in lines[first:last]]


# --- Searches ------------------------------------------------------------


def test_a_search_ends_with_the_best_value_and_its_command(trained, capsys):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = [*SEARCH, LR, "hydra.sweeper.n_trials=3", "hydra.sweeper.direction=minimize", "batch_size=8"]
    assert run(["train", "-m", *words]) == 0
    out = capsys.readouterr().out
    heading, *jobs = rows(out)
    assert heading == ["job", "optimizer.lr", "val_loss", "result", "folder"]
    assert [(job[0], job[3]) for job in jobs] == [(str(number), "done") for number in range(3)]
    rates = [config.optimizer["lr"] for config in trained]
    assert [float(job[1]) for job in jobs] == rates
    assert [float(job[2]) for job in jobs] == pytest.approx([val_loss(rate) for rate in rates], rel=1e-4)
    best = min(rates, key=val_loss)
    assert f"Best val_loss: {val_loss(best):.5g} by diffuse train optimizer.lr={best} batch_size=8\n" in out
    assert out.endswith("Best values: outputs/optimization_results.yaml\n")
    stored = yaml.safe_load(Path("outputs/optimization_results.yaml").read_text())
    assert stored == {"name": "optuna", "best_params": {"optimizer.lr": best}, "best_value": val_loss(best)}
    assert all(config.batch_size == 8 for config in trained)


@pytest.mark.slow
def test_the_best_values_of_an_earlier_search_are_kept(trained):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    Path("outputs").mkdir()
    Path("outputs/optimization_results.yaml").write_text("mine")
    assert run(["train", "-m", *SEARCH, LR, "hydra.sweeper.n_trials=1"]) == 0
    assert Path("outputs/optimization_results.1.yaml").read_text() == "mine"


@pytest.mark.slow
def test_a_search_takes_options_choices_and_several_objectives(trained, capsys):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = ["schedule=linear,cosine", "sampler=glob(dd*)", "hydra.sweeper.n_trials=2", "seed=range(0,3)"]
    words += ["objective_metric=[val_loss,loss]", "hydra.sweeper.direction=[minimize,maximize]"]
    assert run(["train", "-m", *SEARCH, *words]) == 0
    heading, *jobs = rows(capsys.readouterr().out)
    assert heading[:6] == ["job", "schedule", "sampler", "seed", "val_loss", "loss"]
    assert {job[5] for job in jobs} == {"0.5"}
    assert {job[1] for job in jobs} <= {"linear", "cosine"}
    assert yaml.safe_load(Path("outputs/optimization_results.yaml").read_text())["solutions"]


def test_a_failed_job_ends_a_search_unless_it_may_fail(trained, monkeypatch, capsys):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    failing(monkeypatch, lambda config: UsageError("loss", 1, "not finite") if trained else None)
    assert run(["train", "-m", *SEARCH, LR, "hydra.sweeper.n_trials=3"]) == 2
    out, err = capsys.readouterr()
    assert [job[-2] for job in rows(out)[1:]] == ["done", "failed"]
    assert err.splitlines()[-1] == "diffuse: job 1: loss=1: not finite"
    assert "Traceback" not in err
    assert "Error executing" not in err


def test_a_search_goes_on_after_failures_that_it_allows(trained, monkeypatch, capsys):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    failing(monkeypatch, lambda config: MachineError("no memory") if len(trained) == 1 else None)
    words = [*SEARCH, LR, "hydra.sweeper.n_trials=3", "hydra.sweeper.max_failure_rate=1"]
    assert run(["train", "-m", *words]) == 0
    out, err = capsys.readouterr()
    results = [job[-2] for job in rows(out)[1:]]
    assert results == ["done", "failed", "failed"]
    assert err.count(": no memory") == 4  # when it fails, and at the end


@pytest.mark.parametrize("text", ["nan", "inf"])
def test_an_objective_that_is_not_finite_fails_its_job(trained, monkeypatch, capsys, text):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    monkeypatch.setattr(f"{__name__}.val_loss", lambda rate: text)
    assert run(["train", "-m", *SEARCH, LR, "hydra.sweeper.n_trials=1"]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == f"diffuse: job 0: objective_metric=val_loss: is {text} at the end"


def test_a_column_that_is_missing_is_named_with_those_there_are(trained, capsys):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = [*SEARCH, LR, "objective_metric=val_accuracy", "hydra.sweeper.n_trials=1"]
    assert run(["train", "-m", *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"diffuse: job 0: objective_metric=val_accuracy: not in outputs/.*/metrics.csv; choose from loss, val_loss",
        line,
    )


def test_an_error_of_the_sweeper_is_one_line(trained, capsys):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=nsgaii", "hydra.sweeper.sampler.mutation_prob=2"]
    assert run(["train", "-m", *words, LR]) == 2
    problem = "`mutation_prob` must be None or a float value within the range [0.0, 1.0]."
    remedy = "DIFFUSE_TRACEBACK=1 shows the place"
    assert capsys.readouterr().err == f"diffuse: hydra/sweeper=optuna: {problem}; {remedy}\n"


@pytest.mark.slow
def test_an_evaluation_returns_its_first_metric_or_the_one_named(monkeypatch, tmp_path, capsys):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "diffusion_cli.commands.eval.run",
        lambda config: {"fid_inception": config.guidance["scale"], "precision_inception": 0.5},
    )
    words = ["guidance=cfg", "guidance.scale=interval(1,4)", "hydra.sweeper.n_trials=2"]
    assert run(["eval", "-m", *SEARCH, *words, "run=x"]) == 0
    heading, *jobs = rows(capsys.readouterr().out)
    assert heading == ["job", "guidance.scale", "fid", "result"]
    assert all(float(job[1]) == pytest.approx(float(job[2]), rel=1e-4) for job in jobs)
    named = ["objective_metric=precision", "hydra.sweeper.direction=maximize"]
    assert run(["eval", "-m", *SEARCH, *words, "run=x", *named]) == 0
    assert "Best precision: 0.5 by diffuse eval" in capsys.readouterr().out


# --- All combinations ------------------------------------------------------------


def test_all_jobs_run_although_one_fails(trained, monkeypatch, capsys):
    failing(monkeypatch, lambda config: UsageError("seed", 0, "is unlucky") if config.seed == 0 else None)
    assert run(["train", "-m", "seed=0,1,2", "optimizer.lr=1e-3", "hydra/sweeper=basic"]) == 2
    out, err = capsys.readouterr()
    heading, *jobs = rows(out)
    assert heading == ["job", "seed", "val_loss", "result", "folder"]
    assert [job[1] for job in jobs] == ["0", "1", "2"]
    assert ["failed" in job for job in jobs] == [True, False, False]
    assert err.splitlines() == ["diffuse: seed=0: is unlucky", "diffuse: job 0: seed=0: is unlucky"]
    assert "Best val_loss: 0 by diffuse train seed=1 optimizer.lr=1e-3\n" in out


def test_trial_runs_have_no_folders(trained, capsys):
    Path("metrics.csv").write_text("step,loss,val_loss\n1,2,3\n")  # of no job
    assert run(["train", "-m", "seed=0,1", "trainer.fast_dev_run=true"]) == 0
    assert rows(capsys.readouterr().out) == [
        ["job", "seed", "result"], ["0", "0", "done"], ["1", "1", "done"],
    ]  # fmt: skip


def test_a_bug_in_a_job_has_its_traceback_and_exit_code(trained, monkeypatch, capsys):
    failing(monkeypatch, lambda config: ZeroDivisionError("oh") if config.seed == 0 else None)
    assert run(["train", "-m", "seed=0,1"]) == 1
    out, err = capsys.readouterr()
    assert "Traceback" in err
    assert err.splitlines()[-1] == "diffuse: job 0: ZeroDivisionError: oh"
    assert rows(out)[2][1:2] == ["1"]


def test_a_signal_ends_a_sweep(trained, monkeypatch, capsys):
    failing(monkeypatch, lambda config: UNFINISHED if config.seed == 1 else None)
    with pytest.raises(SystemExit) as ended:
        run(["train", "-m", "seed=0,1,2"])
    assert ended.value.code == UNFINISHED
    results = [
        [cell for cell in job if cell in ("done", "stopped", "not started")]
        for job in rows(capsys.readouterr().out)
    ]
    assert results[1:] == [["done"], ["stopped"], ["not started"]]


@pytest.mark.slow
def test_words_of_jobs_reach_them_as_they_are_typed(trained):
    words = ["data_dir=a b,'c, d'", "optimizer.lr=1e-3", "seed=shuffle(1,2)", "batch_size=sort(16,8)"]
    assert run(["train", "-m", *words]) == 0
    jobs = [(config.data_dir, config.seed, config.batch_size) for config in trained]
    assert sorted(jobs) == [
        (text, seed, size) for text in ("a b", "c, d") for seed in (1, 2) for size in (8, 16)
    ]
    assert [size for _, _, size in jobs] == [8, 16] * 4


def test_environment_variables_of_jobs_are_set(trained, monkeypatch):
    seen = []
    failing(monkeypatch, lambda config: seen.append(os.environ.get("MINE")))
    assert run(["train", "-m", "seed=0,1", "hydra.job.env_set.MINE=yes"]) == 0
    assert seen == ["yes", "yes"]
    assert "MINE" not in os.environ


@pytest.mark.slow
def test_an_experiment_may_choose_the_sweeper(trained, tmp_path, capsys):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "search.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /hydra/sweeper: optuna\nhydra:\n  sweeper:\n    n_trials: 2\n"
        "    n_jobs: 1\n    params:\n      optimizer.lr: interval(1e-4,1e-2)\n"
    )
    assert run(["train", "-m", "--config-dir", "mine", "experiment=search", "seed=3"]) == 0
    heading, *jobs = rows(capsys.readouterr().out)
    assert heading[1] == "optimizer.lr"
    assert len(jobs) == 2
    assert {config.seed for config in trained} == {3}


# --- Processes ------------------------------------------------------------

QUICK = [*TINY[2:], "max_steps=6", "validate_every=3", "preview_every=null", "preview_real=false"]


def diffuse(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "diffusion_cli", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.mark.slow
def test_three_trainings_by_optuna_end_with_the_best(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    quick = [word for word in QUICK if not word.startswith("optimizer.lr=")]
    words = [*SEARCH, "optimizer.lr=interval(1e-4,1e-2)", "hydra.sweeper.n_trials=3"]
    done = diffuse(tmp_path, "train", "-m", *quick, *words)
    assert done.returncode == 0, done.stderr
    _, *jobs = rows(done.stdout)
    assert [job[3] for job in jobs] == ["done"] * 3
    stored = yaml.safe_load((tmp_path / "outputs/optimization_results.yaml").read_text())
    assert min(float(job[2]) for job in jobs) == pytest.approx(stored["best_value"], rel=1e-4)
    assert f"by diffuse train optimizer.lr={stored['best_params']['optimizer.lr']} " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_jobs_of_an_installed_launcher_return_their_results(tmp_path, launcher):
    package = "joblib" if launcher == "joblib" else "submitit"
    pytest.importorskip(f"hydra_plugins.hydra_{package}_launcher")
    at_once = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    seeds = [0, 1] if launcher == "joblib" else [0]  # submitit starts a process for each job
    words = [
        *QUICK,
        f"hydra/launcher={launcher}",
        *at_once,
        "latent.run=null,none",
        "seed=" + ",".join(map(str, seeds)),
    ]
    done = diffuse(tmp_path, "train", "-m", *words)
    assert done.returncode == 2, done.stderr
    heading, *jobs = rows(done.stdout)
    assert heading == ["job", "latent.run", *["seed"] * (len(seeds) > 1), "val_loss", "result", "folder"]
    assert ["done" in job for job in jobs] == [True] * len(seeds) + [False] * len(seeds)
    assert all(Path(tmp_path, job[-1], "config.yaml").is_file() for job in jobs if "done" in job)
    lines = [line for line in done.stderr.splitlines() if line.startswith("diffuse: job ")]
    assert [line.split(": ")[1] for line in lines] == [
        f"job {len(seeds) + number}" for number, _ in enumerate(seeds)
    ]
