"""Loggers that send a run to a service: Weights & Biases, MLflow and Trackio.

Their libraries are imported when the first value is logged.
"""

import logging
import os
import re
import secrets
import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from json import dumps
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from diffusion_cli.config.runs import flatten
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.progress import ProgressBar
from diffusion_cli.system.untrusted import printable
from diffusion_cli.training.logs import LoggerConfig, RunLogger

PROJECT = "diffuse"
"""Default name of the project, or of the experiment of MLflow."""
ID_FILE = "tracking_id"
"""File of a run's folder with the identity of the run in all services, so that a resumed run continues there."""
FINISH_SECONDS = 120.0
"""Longest time to upload pending data at the end; W&B keeps the rest on disk for `wandb sync`."""
STEP = "trainer/global_step"
"""Name of the step in Lightning's logger for W&B, the axis of all curves."""
RETRIES = "3"
"""Number of repeated requests to an MLflow server, about 12 s in total, instead of several minutes."""
PLACE = re.compile(r"https?://|trackio show")
"""An address or a command for the curves, in what Trackio prints; it has no setting for less output."""
STYLE = re.compile(r"\x1b\[[\d;]*m")
"""Colours and fonts of a terminal."""
TAG = "diffuse.tracking_id"
"""Tag that identifies a run in MLflow."""


def tracking_id(run: Path) -> str:
    """Return the identity of a run in all services; the first call creates it."""
    path = run / ID_FILE
    if path.is_file() and re.fullmatch(
        r"[0-9a-f]{12}", text := path.read_text(errors="replace")[:20].strip()
    ):
        return text
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(identity := secrets.token_hex(6))
    return identity


class WandB(LoggerConfig):
    """Weights & Biases; an offline run is in the folder `wandb` of the run."""

    package = "wandb"

    def __init__(
        self,
        *,
        project: str | None = None,
        entity: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
    ) -> None:
        self.project = project
        self.settings: dict[str, Any] = {"entity": entity, "mode": mode, "group": group, "job_type": job_type}
        self.settings |= {"tags": tags, "notes": notes}

    def logger(self, run: Path, step: int) -> Logger:
        return RunLogger(
            "wandb", lambda: self._open(run), "without a connection, use logger.wandb.mode=offline"
        )

    def _open(self, run: Path) -> Logger:
        import wandb

        started = wandb.init(
            name=run.resolve().name,
            dir=run,
            id=tracking_id(run),
            resume="allow",
            project=self.project or os.environ.get("WANDB_PROJECT", PROJECT),
            settings=wandb.Settings(console="off", quiet=True, finish_timeout=FINISH_SECONDS),
            **self.settings,
        )
        started.define_metric(STEP)
        started.define_metric("*", step_metric=STEP)
        return WandBRun(experiment=started)


class WandBRun(WandbLogger):
    """Lightning's logger, with evaluations as a table, and an end with the training."""

    def log_evaluation(self, report: Mapping[str, Any], step: int) -> None:
        """Add a table of the results with their protocols."""
        rows = [
            [step, item["name"], item["value"], dumps(item["details"]), dumps(item["protocol"])]
            for item in report["results"]
        ]
        self.log_table("evaluation", ["step", "metric", "value", "details", "protocol"], rows, step=step)

    def finalize(self, status: str) -> None:
        """End the run, so that another run of this process is not added to it."""
        super().finalize(status)
        run = self.experiment
        run.finish(exit_code=0 if status == "success" else 1)
        if run.offline:  # a quiet run does not print it
            _show("wandb", f"to upload this run: wandb sync {shlex.quote(run.sync_dir)}")


def _show(logger: str, line: str) -> None:
    """Print a line of a service above the progress bars."""
    ProgressBar.write(f"diffuse: logger={logger}: {printable(line)}", file=sys.stderr)


class MLflow(LoggerConfig):
    """MLflow; by default a database and files in the folder `mlflow` of the run."""

    package = "mlflow"

    def __init__(
        self,
        *,
        tracking_uri: str | None = None,
        experiment: str = PROJECT,
        artifact_location: str | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        self.tracking_uri, self.experiment = tracking_uri, experiment
        self.artifact_location, self.tags = artifact_location, tags or {}

    def logger(self, run: Path, step: int) -> Logger:
        return RunLogger(
            "mlflow", lambda: self._open(run), "check the server, or leave logger.mlflow.tracking_uri null"
        )

    def _open(self, run: Path) -> Logger:
        import mlflow  # noqa: F401 - sets the levels of its log, so it comes before ours

        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", RETRIES)
        for library in ("mlflow", "alembic"):
            logging.getLogger(library).setLevel(logging.WARNING)
        uri, artifacts = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"), self.artifact_location
        if uri is None:
            folder = (run / "mlflow").resolve()
            folder.mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{folder}/mlflow.db"
            artifacts = artifacts or (folder / "artifacts").as_uri()
        return MLflowRun(uri, artifacts, self.experiment, run, dict(self.tags))


class MLflowRun(MLFlowLogger):
    """Lightning's logger for the run with the tag of a run's identity, which is continued if it exists."""

    def __init__(
        self, uri: str, artifacts: str | None, experiment: str, run: Path, tags: dict[str, str]
    ) -> None:
        from mlflow.tracking import MlflowClient

        client, identity = MlflowClient(uri), tracking_id(run)
        experiment_id, place = _experiment(client, experiment, artifacts), f"tags.`{TAG}` = '{identity}'"
        found = client.search_runs([experiment_id], place, max_results=1)
        run_id = found[0].info.run_id if found else None
        super().__init__(
            experiment,
            run.resolve().name,
            uri,
            tags={**tags, TAG: identity},
            artifact_location=artifacts,
            run_id=run_id,
        )
        if run_id is not None:
            client.update_run(run_id, status="RUNNING")

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Log the parameters that the run has not yet; `config.yaml` has their present values.

        MLflow refuses another value of a parameter, such as a larger max_steps.
        """
        nested = vars(params) if isinstance(params, Namespace) else params
        logged = self.experiment.get_run(str(self.run_id)).data.params
        super().log_hyperparams({key: value for key, value in flatten(nested).items() if key not in logged})
        self.experiment.log_dict(str(self.run_id), nested, "config.yaml")

    def log_image(self, key: str, images: list[str], step: int) -> None:
        """Add PNG files; one of a repeated step replaces the former one."""
        for path in images:
            self.experiment.log_artifact(str(self.run_id), path, key)

    def log_evaluation(self, report: Mapping[str, Any], step: int) -> None:
        """Add the report as a file; one of a repeated step replaces the former one."""
        self.experiment.log_dict(str(self.run_id), dict(report), f"evaluation/step_{step:08d}.json")


def _experiment(client: Any, name: str, artifacts: str | None) -> str:
    """Return the identity of an experiment of MLflow, which is created if there is none."""
    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    try:
        return client.create_experiment(name, artifacts)
    except Exception:
        if found := client.get_experiment_by_name(name):  # of a job that started at the same time
            return found.experiment_id
        raise


class Trackio(LoggerConfig):
    """Trackio; by default a local database in its own folder, TRACKIO_DIR, for all runs of a project."""

    package = "trackio"

    def __init__(
        self,
        *,
        project: str = PROJECT,
        space_id: str | None = None,
        private: bool | None = None,
        group: str | None = None,
    ) -> None:
        self.project = project
        self.settings = {"space_id": space_id, "private": private, "group": group}

    def logger(self, run: Path, step: int) -> Logger:
        return RunLogger(
            "trackio",
            lambda: TrackioRun(f"{run.resolve().name}-{tracking_id(run)[:4]}", self.project, self.settings),
            "without a connection, leave logger.trackio.space_id null",
        )


class TrackioRun(Logger):
    """A run of Trackio, which identifies a run by its name."""

    def __init__(self, name: str, project: str, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self._name, self._project, self._settings = name, project, settings
        self._run: Any = None

    @property
    def name(self) -> str:
        """Part of Lightning's interface."""
        return self._project

    @property
    def version(self) -> str:
        """Part of Lightning's interface."""
        return self._name

    @property
    def experiment(self) -> Any:
        """The run; the first use starts or continues it."""
        return self._run or self._start({})

    def _start(self, config: dict[str, Any]) -> Any:
        import trackio

        with redirect_stdout(StringIO()) as printed:
            self._run = trackio.init(
                self._project, self._name, config=config, resume="allow", embed=False, **self._settings
            )
        for line in printed.getvalue().splitlines():
            if PLACE.search(line):
                _show("trackio", STYLE.sub("", line).removeprefix("* "))
        return self._run

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Start or continue the run with this configuration."""
        self._start(flatten(vars(params) if isinstance(params, Namespace) else params))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a point to each curve."""
        self.experiment.log(dict(metrics), step)

    def log_image(self, key: str, images: list[str], step: int) -> None:
        """Add PNG files."""
        import trackio

        for path in images:
            self.experiment.log({key: trackio.Image(path, caption=f"step {step}")}, step)

    def log_evaluation(self, report: Mapping[str, Any], step: int) -> None:
        """Add the report as text."""
        import trackio

        text = f"```json\n{dumps(report, indent=1)}\n```"
        self.experiment.log({"evaluation": trackio.Markdown(text)}, step)

    def finalize(self, status: str) -> None:
        """Write pending points, and end the run."""
        import trackio

        with redirect_stdout(StringIO()):
            trackio.finish()
