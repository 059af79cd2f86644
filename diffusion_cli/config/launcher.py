"""The launcher of a sweep: its option in `hydra/launcher`, its settings, and the resources of the jobs."""

import math
import os
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffusion_cli.config.catalogue import CONF, content, did_you_mean, options
from diffusion_cli.config.compose import LAUNCHER, parse
from diffusion_cli.config.schema import Config, SlurmConfig, TrainConfig, seconds
from diffusion_cli.config.validate import validate
from diffusion_cli.errors import NO_VALUE, Problem, UsageError

LAUNCHERS = "hydra/launcher"


def split_launcher(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split overrides into those of the launcher, as `launcher=` and `launcher.key=`, and the others."""
    words = [LAUNCHER.sub("launcher", text) for text in overrides if LAUNCHER.match(text)]
    return words, [text for text in overrides if not LAUNCHER.match(text)]


def launch(words: Sequence[str], jobs: Sequence[Config], dirs: Sequence[Path] = ()) -> list[str]:
    """Return Hydra's overrides for the launcher of these jobs; raises UsageError for invalid words."""
    name, given = _parsed(words)
    files = options(LAUNCHERS, dirs)
    if name not in files:
        raise UsageError("launcher", name, "unknown option", did_you_mean(name, list(files)))
    keys = {option: _keys(file) for option, file in files.items()}
    checked: SlurmConfig | None = None
    if name == "slurm":
        checked, mistakes = validate(SlurmConfig, keys[name] | given, "launcher")
        mistakes = mistakes or _missing()
    else:
        having = {
            key: [option for option in keys if key in keys[option]] for key in given.keys() - keys[name]
        }
        mistakes = [
            Problem(
                f"launcher.{key}",
                given[key],
                f"applies only to launcher={' or '.join(names)}",
                f"add launcher={names[0]}",
            )
            if names
            else Problem(f"launcher.{key}", given[key], "unknown key")
            for key, names in having.items()
        ]
    if mistakes:
        raise UsageError.several(mistakes)
    settings = [f"hydra.{text}" for text in words if not text.startswith("launcher=")]
    if checked is None:
        return [f"{LAUNCHERS}={name}", *settings]
    limit = f"hydra.launcher.timeout_min={_minutes(checked.timeout_min)}"  # Hydra takes minutes only
    settings = [limit if text.startswith("hydra.launcher.timeout_min=") else text for text in settings]
    return [f"{LAUNCHERS}={name}", *_resources(jobs, given), *settings]


def run_hydra(command: str, work: Callable[[Any], object]) -> None:
    """Let Hydra compose the configuration of `sys.argv`, and call a function for each job."""
    import hydra

    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions of jobs propagate unchanged
    hydra.main(config_path=str(CONF), config_name=command, version_base="1.3")(work)()


def job_number() -> int:
    """Return the number of the job that Hydra has started, and let this process compose configurations again."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    (number,) = (text.partition("=")[2] for text in HydraConfig.get().overrides.task if "job=" in text)
    GlobalHydra.instance().clear()
    return int(number)


def _minutes(limit: int | str) -> int:
    """Minutes of a time limit, rounded up."""
    return limit if isinstance(limit, int) else math.ceil((seconds(limit) or 0) / 60)


def submission_problem(messages: str, jobs: Sequence[Config]) -> Problem:
    """Return the problem of jobs that sbatch refused, with its last message."""
    reason = (messages.strip().splitlines() or ["sbatch failed without a message"])[-1]
    if "Invalid generic resource" in reason:
        on_cpu = "trainer=cpu" if isinstance(jobs[0], TrainConfig) else "device=cpu"
        remedy = f"set launcher.gpus_per_node=0 or {on_cpu} if the nodes have no GPUs"
    elif "configuration" in reason:
        remedy = "sbatch cannot find a SLURM cluster; set SLURM_CONF, or run the command on a login node"
    else:
        remedy = "sbatch has refused the jobs; see diffuse train launcher=slurm --help for its settings"
    return Problem("launcher", "slurm", reason, remedy)


def _parsed(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The option that the words choose, and the values of its keys."""
    name, given = "local", {}
    for text, item in ((text, parse(text)) for text in words):
        if item.is_sweep_override():
            raise UsageError(text, NO_VALUE, "several values", "choose one launcher for the sweep")
        if item.key_or_group == "launcher":
            name = str(item.value())
        else:
            given[item.key_or_group.removeprefix("launcher.")] = item.value()
    return name, given


def _keys(file: Path) -> dict[str, Any]:
    return {key: value for key, value in content(file).items() if key != "defaults"}


def _missing() -> list[Problem]:
    """The problems that keep this machine from submitting jobs to SLURM."""
    packages = ("hydra_plugins", "hydra_plugins.hydra_submitit_launcher")  # the first may be missing too
    if any(find_spec(name) is None for name in packages):
        return [
            Problem("launcher", "slurm", "needs hydra-submitit-launcher", "pip install 'diffuse-cli[slurm]'")
        ]
    if shutil.which("srun") is None:
        return [Problem("launcher", "slurm", "srun not found", "run the command on a SLURM login node")]
    return []


def _resources(jobs: Sequence[Config], given: dict[str, Any]) -> list[str]:
    """Hydra's overrides for the nodes, tasks and GPUs of the jobs; raises UsageError if the jobs differ."""
    asked = {_resources_of(job) for job in jobs}
    if len(asked) > 1:
        shapes = " and ".join(f"{nodes} x {tasks}" for nodes, tasks, _ in sorted(asked))
        raise UsageError(
            "launcher",
            "slurm",
            f"all jobs of an array need the same nodes x processes and device, not {shapes}",
            "run one sweep for each",
        )
    ((nodes, tasks, gpu),) = asked
    words = [f"hydra.launcher.nodes={nodes}", f"hydra.launcher.tasks_per_node={tasks}"]
    gpus = gpu and given.get("gpus_per_node") is None
    return [*words, f"hydra.launcher.gpus_per_node={tasks}"] if gpus else words


def _resources_of(job: Config) -> tuple[int, int, bool]:
    """The number of nodes, the processes per node, and whether each process uses a GPU."""
    if isinstance(job, TrainConfig):
        trainer = job.trainer
        return trainer["num_nodes"] or 1, trainer["devices"] or 1, trainer["accelerator"] != "cpu"
    return 1, getattr(job, "processes", None) or 1, getattr(job, "device", "cpu") != "cpu"
