"""Runs in W&B, MLflow and Trackio, read back by their own libraries after a kill and a resume."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import TINY
from helpers.training import kill_training
from helpers.wandb_files import config, history, run_id

pytest.importorskip("wandb")
pytest.importorskip("mlflow")
pytest.importorskip("trackio")
pytestmark = pytest.mark.slow

WORDS = [
    *(word for word in TINY if not word.startswith(("logger=", "preview_every=", "validate_every="))),
    "logger=[csv,tensorboard,wandb,mlflow,trackio]", "logger.wandb.mode=offline", "preview_every=10",
    "preview_steps=2", "validate_every=10", "eval_every=10", "eval_samples=16", "eval_steps=2", "features=classifier",
]  # fmt: skip
READ_TRACKIO = """
import json
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("diffuse")
config, logs = SQLiteStorage.get_run_config("diffuse", run), SQLiteStorage.get_logs("diffuse", run)
print(json.dumps([run, config, logs], default=str))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a run that was killed and continued for 20 steps, and with the database of Trackio.

    W&B writes an offline run every 15 s, so the kill comes after a write with the loss of step 15.
    """
    folder = tmp_path_factory.mktemp("tracked")
    words, env = [*WORDS, f"output_dir={folder}"], environment(folder)
    reached = kill_training(
        [*words, "max_steps=5000"], folder / "tiny", folder / "log", env=env,
        ready=lambda: any(
            "loss" in row and row["trainer/global_step"] >= 15
            for file in folder.glob("tiny/wandb/offline-run-*/*.wandb")
            for row in history(file)
        ),
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "diffusion_cli", *words, f"max_steps={10 * (reached // 10) + 20}"],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "training continues without it" not in done.stderr
    assert "diffuse: logger=wandb: to upload this run: wandb sync " in done.stderr
    assert 'diffuse: logger=trackio: trackio show --project "diffuse"\n' in done.stderr
    assert "Run summary" not in done.stderr
    assert "* " not in done.stderr + done.stdout
    return folder


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {
        "TRACKIO_DIR": f"{folder}/trackio", "WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def stored(place: Path) -> dict[str, Any]:
    return yaml.safe_load((place / "tiny" / "config.yaml").read_text())


def test_wandb_continues_one_run(place):
    files = sorted(place.glob("tiny/wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    identity = (place / "tiny" / "tracking_id").read_text()
    assert {run_id(file) for file in files} == {identity}
    seen = config(files[1])
    now = stored(place)
    assert seen["batch_size"] == 16
    assert seen["max_steps"] == now["max_steps"]
    before, after = map(history, files)
    assert [row["trainer/global_step"] for row in before if "loss" in row][:4] == [1, 5, 10, 15]
    for kind in ("preview", "frechet_classifier", "val_loss", "loss"):
        for rows in (before, after):
            steps = [row["trainer/global_step"] for row in rows if kind in row or f"{kind}._type" in row]
            assert len(steps) == len(set(steps)), kind
            assert steps, kind
        assert steps[-1] == now["max_steps"]
    tables = sorted(place.glob("tiny/wandb/*/files/media/table/evaluation*.json"))
    (row,) = json.loads(tables[0].read_text())["data"]
    assert row[1] == "frechet_classifier"
    assert json.loads(row[4])["samples"] == 16
    assert list(place.glob("tiny/wandb/*/files/media/images/preview*.png"))


def test_values_that_a_resumed_run_logs_again_are_equal(place):
    rows = [row for file in sorted(place.glob("tiny/wandb/*/*.wandb")) for row in history(file)]
    for name in ("frechet_classifier", "val_loss", "loss"):
        values: dict[int, set[float]] = {}
        for row in rows:
            if name in row:
                values.setdefault(row["trainer/global_step"], set()).add(row[name])
        assert all(len(found) == 1 for found in values.values()), (name, values)


def test_mlflow_continues_one_run(place):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{place}/tiny/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("diffuse")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "tiny"
    assert run.data.params["batch_size"] == "16"
    now = stored(place)
    steps = {metric.step for metric in client.get_metric_history(run.info.run_id, "loss")}
    assert steps == {1, *range(5, now["max_steps"] + 1, 5)}
    names = [f"step_{step:08d}" for step in range(10, now["max_steps"] + 1, 10)]
    pictures = [Path(file.path).stem for file in client.list_artifacts(run.info.run_id, "preview")]
    assert set(names) <= set(pictures)
    assert len(set(pictures)) == len(pictures)
    folder = place / "tiny" / "mlflow" / "artifacts" / run.info.run_id / "artifacts"
    assert yaml.safe_load((folder / "config.yaml").read_text()) == now
    assert [file.stem for file in sorted((folder / "evaluation").iterdir())] == names
    report = json.loads((folder / "evaluation" / f"{names[0]}.json").read_text())
    assert report["results"][0]["protocol"]["samples"] == 16


def test_trackio_continues_one_run(place):
    done = subprocess.run(
        [sys.executable, "-c", READ_TRACKIO],
        env=environment(place),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    name, settings, logs = json.loads(done.stdout.splitlines()[-1])
    identity = (place / "tiny" / "tracking_id").read_text()
    assert name == f"tiny-{identity[:4]}"
    assert settings["batch_size"] == 16
    steps = {row["step"] for row in logs if "loss" in row}
    end = stored(place)["max_steps"]
    assert steps == {1, *range(5, end + 1, 5)}
    assert any(row["preview"]["_type"] == "trackio.image" for row in logs if "preview" in row)
    texts = [row["evaluation"]["_value"] for row in logs if "evaluation" in row]
    assert '"samples": 16' in texts[0]


def test_metrics_csv_and_tensorboard_have_each_step_once(place):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(f"{place}/tiny/tensorboard", size_guidance={"images": 0}).Reload()
    end = stored(place)["max_steps"]
    assert [event.step for event in events.Scalars("loss")] == [1, *range(5, end + 1, 5)]
    pictures = [event.step for event in events.Images("preview")]
    assert pictures == sorted(set(pictures))
    rows = (place / "tiny" / "metrics.csv").read_text().splitlines()
    assert len([row for row in rows if row.startswith(f"{end},")]) == 3  # loss, val_loss, evaluation


def test_no_environment_variable_of_a_service_is_stored(place):
    assert "WANDB" not in (place / "tiny" / "config.yaml").read_text()
