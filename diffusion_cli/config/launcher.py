"""The launcher of a sweep: its option in `hydra/launcher`, its settings, and the resources of the jobs."""

import math
import shutil
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffusion_cli.config import plugins
from diffusion_cli.config.catalogue import content, did_you_mean, options
from diffusion_cli.config.compose import parse
from diffusion_cli.config.overrides import LAUNCHER
from diffusion_cli.config.schema import Config, SlurmConfig, TrainConfig, seconds
from diffusion_cli.config.typed import quoted
from diffusion_cli.config.validate import validate
from diffusion_cli.errors import NO_VALUE, Problem, UsageError

LAUNCHERS = "hydra/launcher"
OF_JOBS = {"nodes": "trainer.num_nodes", "tasks_per_node": "trainer.devices"}
"""Keys of a training that decide the value of a key of the launcher."""
PACKAGES = {"joblib": "sweep", "submitit_local": "slurm"}
"""Extras with launchers, by the option that each adds."""


def search_path(dirs: Sequence[Path]) -> list[str]:
    """Return Hydra's word for the folders of options of plugins and of the user."""
    folders = (f"file://{folder.resolve()}" for folder in (*plugins.folders(), *dirs))
    listed = ",".join(map(quoted, folders))
    return [f"hydra.searchpath=[{listed}]"] if listed else []


def split_launcher(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split overrides into those of the launcher, as `launcher=` and `launcher.key=`, and the others."""
    words = [LAUNCHER.sub("launcher", text) for text in overrides if LAUNCHER.match(text)]
    return words, [text for text in overrides if not LAUNCHER.match(text)]


def launch(words: Sequence[str], jobs: Sequence[Config], dirs: Sequence[Path] = ()) -> list[str]:
    """Return Hydra's overrides for the launcher of these jobs; raises UsageError for invalid words."""
    name, given = _parsed(words)
    files = options(LAUNCHERS, dirs)
    if name not in files and name not in (known := launchers(dirs)):
        raise UsageError.several([_unknown(name, known)])
    checked: SlurmConfig | None = None
    if name == "slurm":
        checked, mistakes = validate(SlurmConfig, _keys(files[name]) | given, "launcher")
        mistakes = mistakes or _missing()
    else:
        mistakes = _unknown_keys(name, given, dirs)
    if mistakes:
        raise UsageError.several(mistakes)
    settings = [f"hydra.{text}" for text in words if not text.startswith("launcher=")]
    if checked is None:
        return [f"{LAUNCHERS}={name}", *settings]
    limit = f"hydra.launcher.timeout_min={_minutes(checked.timeout_min)}"  # Hydra takes minutes only
    settings = [limit if text.startswith("hydra.launcher.timeout_min=") else text for text in settings]
    return [f"{LAUNCHERS}={name}", *_resources(jobs, given), *settings]


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
            name = {"basic": "local"}.get(str(item.value()), str(item.value()))
        else:
            given[item.key_or_group.removeprefix("launcher.")] = item.value()
    return name, given


def launchers(dirs: Sequence[Path] = ()) -> list[str]:
    """Return the options of the launcher: files, and installed plugins of Hydra."""
    from diffusion_cli.config.hydra_jobs import installed

    return sorted({*options(LAUNCHERS, dirs), *installed(LAUNCHERS)} - {"basic", "submitit_slurm"})


def _unknown(name: str, known: Sequence[str]) -> Problem:
    """The problem of an option that is no launcher, is not installed, or stands behind one of `diffuse`."""
    if name == "submitit_slurm":
        return Problem("launcher", name, "requeues no jobs", "use launcher=slurm")
    if name in PACKAGES:
        return Problem("launcher", name, "is not installed", f"pip install 'diffuse-cli[{PACKAGES[name]}]'")
    return Problem("launcher", name, "unknown option", did_you_mean(name, known))


def _unknown_keys(name: str, given: dict[str, Any], dirs: Sequence[Path]) -> list[Problem]:
    """The problems of keys that a launcher does not have."""
    known = launcher_keys(name, dirs) if given else []
    unknown = {key: value for key, value in given.items() if key.partition(".")[0] not in known}
    settings = {other: launcher_keys(other, dirs) for other in launchers(dirs)} if unknown else {}
    return [
        Problem(f"launcher.{key}", value, *_unknown_key(name, key, settings))
        for key, value in unknown.items()
    ]


def _unknown_key(name: str, key: str, settings: Mapping[str, Sequence[str]]) -> tuple[str, str]:
    """The problem and the remedy of a key that a launcher lacks; `settings`: the keys of each launcher."""
    if key in OF_JOBS:
        return "follows from the jobs", f"set {OF_JOBS[key]} of train, or processes of other commands"
    if having := [other for other, keys in settings.items() if key in keys]:
        several = len(having) > 1
        remedy = "choose one of them" if several else f"add launcher={having[0]}"
        return f"applies only to {' or '.join(f'launcher={other}' for other in having)}", remedy
    if settings[name]:
        return "unknown key", did_you_mean(key, settings[name])
    near = get_close_matches(key, dict.fromkeys(key for keys in settings.values() for key in keys), n=1)
    if not near:
        return f"launcher={name} has no keys", "leave it out, or choose another launcher"
    of = " or ".join(f"launcher={other}" for other, keys in settings.items() if near[0] in keys)
    return "unknown key", f"did you mean launcher.{near[0]} of {of}?"


def launcher_keys(name: str, dirs: Sequence[Path] = ()) -> list[str]:
    """Return the keys of an option of the launcher."""
    from diffusion_cli.config.hydra_jobs import hydra_config

    if name == "slurm":
        return [*SlurmConfig.model_fields]
    words = [f"{LAUNCHERS}={name}", *search_path(dirs)]
    return [str(key) for key in hydra_config(None, words).hydra.launcher if key != "_target_"]


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
