"""Loggers: what each writes, what a resumed run adds, and training without a logger that fails."""

import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.loggers import Logger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusion_cli.cli import run
from diffusion_cli.errors import UsageError
from diffusion_cli.training import logs
from diffusion_cli.training.logs import RunLogger, TensorBoard, make_loggers
from diffusion_cli.training.trackers import _experiment, tracking_id
from helpers import TINY

WORDS = [word for word in TINY if not word.startswith("logger=")]
REPORT = {
    "results": [{"name": "fid", "value": 2.5, "details": {"low": 2.0}, "protocol": {"samples": 16}}],
    "notes": [],
}


class Recorder(Logger):
    """A logger that records calls, and raises `error` at the call number `fails`."""

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> str:
        return ""

    def __init__(self, fails: int = -1, error: Exception | None = None) -> None:
        self.calls, self.fails, self.error = [], fails, error

    def log_metrics(self, metrics, step=None) -> None:
        self.calls.append((step, metrics))
        if len(self.calls) == self.fails:
            assert self.error is not None
            raise self.error

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        self.calls.append(params)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time of the loggers in seconds, as a list of one number."""
    now = [0.0]
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_logger_that_fails_is_left_out_until_it_works(capsys, clock):
    inner = Recorder(2, RuntimeError("the service\nhas gone [SQL: INSERT]"))
    log = RunLogger("mine", lambda: inner, "use logger.mine.mode=offline")
    for step, clock[0] in enumerate((0, 30, 60, 89, 90, 100)):
        log.log_metrics({"loss": 1.0}, step)
    log.finalize("success")
    assert [step for step, _ in inner.calls] == [0, 1, 4, 5]
    assert capsys.readouterr().err == (
        "diffuse: logger=mine: RuntimeError: the service has gone; training continues without it until it works; "
        "use logger.mine.mode=offline\n"
        "diffuse: logger=mine: works again; values of 01:00 are missing\n"
    )


def test_a_logger_that_cannot_start_gets_the_configuration_later(capsys, clock):
    inner, tried = Recorder(), []

    def start() -> Logger:
        tried.append(clock[0])
        if len(tried) < 5:
            raise OSError(101, "Network is unreachable")
        return inner

    log = RunLogger("mine", start)
    log.log_hyperparams({"seed": 0})
    assert log.experiment is None
    for clock[0] in range(0, 4000, 10):
        log.log_metrics({"loss": 1.0}, clock[0])
    assert tried == [0, 60, 360, 2160, 3960]
    assert inner.calls[:2] == [{"seed": 0}, (3960, {"loss": 1.0})]
    assert capsys.readouterr().err == (
        "diffuse: logger=mine: Network is unreachable; training continues without it until it works\n"
        "diffuse: logger=mine: works again; values of 1:06:00 are missing\n"
    )


def test_a_service_without_an_answer_takes_one_percent_of_the_time(clock):
    tried = []

    def hang() -> Logger:
        tried.append(clock[0])
        clock[0] += 90
        raise TimeoutError

    log = RunLogger("mine", hang)
    for clock[0] in (0, 9089, 9091):
        log.log_metrics({"loss": 1.0}, 1)
    assert tried == [0, 9091]


def test_jobs_that_start_together_make_one_experiment():
    class Client:
        """A client of MLflow; another job creates the experiment between its calls."""

        asked = 0

        def get_experiment_by_name(self, name):
            self.asked += 1
            return SimpleNamespace(experiment_id="7") if self.asked > 1 else None

        def create_experiment(self, name, artifacts):
            raise ValueError(f"{name} already exists")

    assert _experiment(Client(), "diffuse", None) == "7"


def test_errors_of_threads_have_one_handler(tmp_path, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    TensorBoard().logger(tmp_path, 0)
    handler = threading.excepthook
    TensorBoard().logger(tmp_path, 0)
    assert threading.excepthook is handler


def test_a_password_in_the_error_of_a_logger_is_hidden(capsys):
    log = RunLogger("mine", lambda: Recorder(1, ValueError("request to https://me:s3cret@host/api failed")))
    log.log_metrics({"loss": 1.0}, 0)
    assert "ValueError: request to https://***@host/api failed;" in capsys.readouterr().err


def test_a_logger_without_images_gets_metrics_and_configuration_only(tmp_path):
    inner = Recorder()
    log = RunLogger("mine", lambda: inner)
    log.log_hyperparams({"seed": 0})
    log.log_image("preview", tmp_path / "none.png", 1)
    log.log_evaluation(REPORT, 1)
    log.log_metrics({"loss": 1.0}, 1)
    assert inner.calls == [{"seed": 0}, (1, {"loss": 1.0})]


def test_tensorboard_gets_curves_images_evaluations_and_hyperparameters(tmp_path):
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(picture).save(tmp_path / "step.png")
    log = TensorBoard().logger(tmp_path, 0)
    assert isinstance(log, RunLogger)
    log.log_hyperparams({"seed": 3, "ema": {"decay": 0.9}, "name": None})
    log.log_metrics({"loss": 0.5}, 4)
    log.log_image("preview", tmp_path / "step.png", 4)
    log.log_evaluation(REPORT, 4)
    log.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(4, 0.5)]
    (image,) = events.Images("preview")
    assert (image.step, image.width, image.height) == (4, 4, 4)
    (text,) = events.Tensors("evaluation/text_summary")
    assert json.loads(text.tensor_proto.string_val[0].decode().split("```")[1].removeprefix("json")) == REPORT
    plugin = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"ema.decay" in plugin
    assert b"seed" in plugin


def test_tensorboard_shows_repeated_steps_of_a_resumed_run_once(tmp_path):
    for start, steps in ((0, range(1, 9)), (4, range(5, 7))):
        log = TensorBoard().logger(tmp_path, start)
        for step in steps:
            log.log_metrics({"loss": float(start)}, step)
        log.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("loss")] == [0, 0, 0, 0, 4, 4]


def test_the_identity_of_a_run_is_kept_and_a_damaged_one_replaced(tmp_path):
    identity = tracking_id(tmp_path / "run")
    assert tracking_id(tmp_path / "run") == identity != tracking_id(tmp_path / "other")
    (tmp_path / "run" / "tracking_id").write_bytes(b"\xff../..")
    assert tracking_id(tmp_path / "run") != identity


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (
            ["logger=mlflow", "logger.mlflow.tracking_uri=https://me:key@host/"],
            ["logger.mlflow.tracking_uri: contains a password, which config.yaml would store; set the variable "
             "of its library"],
        ),
        (
            ["logger=wandb", "logger.wandb.mode=ofline"],
            ["logger.wandb.mode=ofline: must be online, offline, disabled or null; did you mean offline?"],
        ),
    ],
)  # fmt: skip
def test_values_of_loggers_are_refused(tmp_path, capsys, words, lines):
    assert run([*WORDS, *words, f"output_dir={tmp_path}"]) == 2
    assert capsys.readouterr().err.splitlines() == [f"diffuse: {line}" for line in lines]
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_missing_package_is_named_with_its_extra_before_training(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr("diffusion_cli.training.logs.find_spec", lambda package: None)
    assert run([*WORDS, f"logger={name}", "max_steps=1", f"output_dir={tmp_path}"]) == 2
    assert capsys.readouterr().err == (
        f"diffuse: logger.{name}: needs {name}; install it: pip install 'diffuse-cli[{name}]'\n"
    )
    assert not (tmp_path / "tiny").exists()


def test_a_secret_is_neither_stored_nor_shown(tmp_path, capsys):
    (tmp_path / "conf" / "logger").mkdir(parents=True)
    (tmp_path / "conf" / "logger" / "mine.yaml").write_text(
        "mine:\n  _target_: lightning.pytorch.loggers.CometLogger\n  api_key: s3cret\n"
    )
    words = ["--config-dir", str(tmp_path / "conf"), "logger=mine", f"output_dir={tmp_path}/o"]
    assert run([*WORDS, *words]) == 2
    assert capsys.readouterr().err == (
        "diffuse: logger.mine.api_key: a secret, which config.yaml would store; set the variable of its library\n"
    )
    assert not (tmp_path / "o").exists()


def test_a_logger_of_a_library_is_built_once_and_its_error_is_one_line(tmp_path, monkeypatch):
    made = []

    def init(self, save_dir: str) -> None:
        made.append(save_dir)
        if save_dir == "bad":
            raise ValueError("no such folder")

    monkeypatch.setattr("lightning.pytorch.loggers.CSVLogger.__init__", init)
    node = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "good"}
    (log,) = make_loggers({"mine": node}, tmp_path, 0)
    for _ in range(3):
        log.save()
    assert made == ["good"]
    with pytest.raises(
        UsageError, match=r"logger\.mine: ValueError: no such folder; correct its values, or leave"
    ):
        make_loggers({"mine": {**node, "save_dir": "bad"}}, tmp_path, 0)


@pytest.mark.slow
def test_a_logger_of_lightning_gets_metrics_and_configuration(tmp_path):
    (tmp_path / "conf" / "logger").mkdir(parents=True)
    (tmp_path / "conf" / "logger" / "mine.yaml").write_text(
        f"mine:\n  _target_: lightning.pytorch.loggers.CSVLogger\n  save_dir: {tmp_path}\n  name: logs\n"
    )
    words = ["--config-dir", str(tmp_path / "conf"), "logger=mine", "max_steps=5", f"output_dir={tmp_path}/o"]
    assert run([*WORDS, *words]) == 0
    folder = tmp_path / "logs" / "version_0"
    assert "loss" in (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "batch_size: 16" in (folder / "hparams.yaml").read_text()
