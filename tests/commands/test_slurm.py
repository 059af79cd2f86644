"""Batch jobs on a SLURM of two nodes that the tests start: sweeps as arrays, requeues to the last bit, dependencies."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.runs.checkpoint import LAST, read
from diffusion_cli.system.signals import UNFINISHED
from helpers import distance

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts" / "slurm"
DAEMONS = [
    name
    for name in ("munged", "slurmctld", "slurmd")
    if not shutil.which(name, path=os.defpath + ":/usr/sbin")
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(os, "geteuid") or os.geteuid() != 0, reason="SLURM's daemons are started as root"
    ),
    pytest.mark.skipif(bool(DAEMONS), reason=f"not installed: {', '.join(DAEMONS)}"),
]
TINY = [
    "model.channels=8", "model.norm_groups=4", "model.num_heads=1", "model.head_channels=null", "batch_size=16",
    "lr_schedule=constant", "optimizer.lr=0.001", "lr_schedule.warm_up_steps=3", "precision=fp32", "trainer=cpu",
    "logger=csv", "log_every=10", "checkpoint_every=10", "preview_every=1000", "validate_every=1000",
]  # fmt: skip
LONG = "max_steps=250"  # enough to be met in the middle
PATIENCE = 120.0  # seconds until something that never comes fails a test


def until(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.1)


@dataclass
class Cluster:
    """SLURM's commands, in an environment in which jobs find this interpreter as `diffuse`."""

    folder: Path
    env: dict[str, str]

    def __call__(self, *words: str) -> str:
        done = subprocess.run(words, cwd=self.folder, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def diffuse(self, *words: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            ["diffuse", *words], cwd=self.folder, env=self.env, stdout=pipe, stderr=pipe, text=True
        )

    def submit(self, file: str, *words: str, options: tuple[str, ...] = ()) -> str:
        return self("sbatch", "--parsable", *options, str(SCRIPTS / file), *words)

    def about(self, job: str, key: str) -> str:
        """A field of each task of a job, as `scontrol show job` has it."""
        return " ".join(re.findall(rf"\b{key}=(\S+)", self("scontrol", "show", "job", job)))

    def ended(self, job: str) -> bool:
        states = self.about(job, "JobState").split()
        return all(state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") for state in states)

    def wait(self, job: str) -> None:
        until(lambda: self.ended(job), f"the end of job {job}")
        assert set(self.about(job, "JobState").split()) == {"COMPLETED"}, self.log(job)

    def restart(self, job: str) -> None:
        """Start a job at once that is queued again, which SLURM would do after two minutes."""
        until(lambda: self.about(job, "JobState") == "PENDING", f"job {job} in the queue again")
        time.sleep(
            2
        )  # in the second in which it ended, SLURM takes the new start for the old one and refuses it
        self("scontrol", "update", f"JobId={job}", "StartTime=now")
        until(lambda: self.about(job, "JobState") == "RUNNING", f"the restart of job {job}")

    def log(self, job: str) -> str:
        return "".join(path.read_text() for path in self.folder.glob(f"*-{job}*.log"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    folder, bin_ = tmp_path_factory.mktemp("slurm"), tmp_path_factory.mktemp("bin")
    diffuse = bin_ / "diffuse"
    diffuse.write_text(f"#!{sys.executable}\nfrom diffusion_cli.cli import main\n\nmain()\n")
    diffuse.chmod(0o755)
    script = [str(SCRIPTS / "local_cluster.sh")]
    try:
        started = subprocess.run([*script, "start", str(folder)], capture_output=True, text=True)
        assert started.returncode == 0, started.stderr
        conf = started.stdout.strip().removeprefix("export SLURM_CONF=")
        yield Cluster(
            folder,
            os.environ
            | {
                "SLURM_CONF": conf,
                "PATH": f"{bin_}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                "PYTHONSAFEPATH": "1",
                "OMP_NUM_THREADS": "1",
            },
        )
    finally:
        subprocess.run([*script, "stop", str(folder)], check=True)


def state(run_folder: Path) -> dict:
    return read(run_folder / LAST).state


def steps(run_folder: Path) -> int:
    """The newest step that a run has saved."""
    return max((int(path.stem[5:]) for path in run_folder.glob("checkpoints/step_*.ckpt")), default=0)


def submitted(output_dir: Path) -> list[str]:
    """The jobs and arrays that sweeps have submitted, once there is one."""
    folder = output_dir / ".submitit"
    until(lambda: any(path.name.isdigit() for path in folder.glob("*")), "a job")
    return [path.name for path in folder.iterdir() if path.name.isdigit()]


def train_here(*words: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the jobs
    assert run(["train", *words]) == 0
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """What an uninterrupted run of LONG ends with."""
    folder = tmp_path_factory.mktemp("whole")
    train_here(*TINY, LONG, "name=run", f"output_dir={folder}")
    return state(folder / "run")


def assert_same_weights(one: dict, other: dict) -> None:
    assert one["global_step"] == other["global_step"]
    for mine, theirs in (
        (one["state_dict"], other["state_dict"]),
        (one["callbacks"]["EMA"]["network"], other["callbacks"]["EMA"]["network"]),
    ):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_sweep_is_one_array_and_its_runs_those_of_this_machine(cluster, tmp_path):
    words = ["train", "-m", "hydra/launcher=slurm", "launcher.name=two", *TINY, "max_steps=4", "seed=0,1"]
    sweep = cluster.diffuse(*words, "name=run${seed}", f"output_dir={tmp_path}", "trainer.num_nodes=2")
    _, said = sweep.communicate()
    assert sweep.returncode == 0, said
    (array,) = submitted(tmp_path)
    assert cluster.about(array, "ArrayTaskId") == "1 0"
    assert set(cluster.about(array, "JobName").split()) == {"two"}
    train_here(*TINY, "max_steps=4", "seed=1", "name=here", f"output_dir={tmp_path}")
    assert distance(state(tmp_path / "run1")["state_dict"], state(tmp_path / "here")["state_dict"]) < 1e-5
    assert steps(tmp_path / "run0") == 4


def test_a_job_that_fails_is_one_line_of_the_sweep(cluster, tmp_path):
    words = [
        *TINY,
        "max_steps=4",
        "preview_steps=2000,25",
        "name=p${preview_steps}",
        f"output_dir={tmp_path}",
    ]
    sweep = cluster.diffuse("train", "-m", "launcher=slurm", *words)
    out, said = sweep.communicate()
    assert sweep.returncode == 2
    (line,) = (line for line in said.splitlines() if line.startswith("diffuse: job "))
    assert re.match(
        r"diffuse: job \d+_0: preview_steps=2000: exceeds the 1000 timesteps of the schedule", line
    )
    assert not any(words in said for words in ("Traceback", "Error executing", "Bypassing"))
    (array,) = submitted(tmp_path)
    assert f"Submitted as job {array}; logs: {tmp_path}/.submitit/{array}_*\n" in out
    assert [line.split()[2:] for line in out.splitlines()[-2:]] == [
        ["failed", f"{tmp_path}/p2000"],
        ["done", f"{tmp_path}/p25"],
    ]
    assert said.count("sacct fails (Slurm accounting storage is disabled)") == 1
    assert steps(tmp_path / "p25") == 4  # the others are not touched by it


def test_a_sweep_may_stop_waiting_for_its_jobs(cluster, tmp_path):
    sweep = cluster.diffuse(
        "train", "-m", "launcher=slurm", *TINY, "max_steps=4", "name=run", f"output_dir={tmp_path}"
    )
    (job,) = submitted(tmp_path)
    sweep.send_signal(signal.SIGINT)
    _, said = sweep.communicate()
    assert sweep.returncode == UNFINISHED, said
    assert said.splitlines()[-1].startswith("diffuse: stopped waiting; the jobs continue: squeue lists them")
    assert cluster.about(job, "JobState") in ("PENDING", "RUNNING")
    cluster("scancel", job)


def test_a_job_of_a_sweep_that_is_preempted_or_runs_out_of_time_saves_and_goes_on(cluster, tmp_path, whole):
    words = [*TINY, LONG, "name=run", f"output_dir={tmp_path}"]
    sweep = cluster.diffuse("train", "-m", "launcher=slurm", *words)
    (job,) = submitted(tmp_path)
    preempt = ["scontrol", "requeue", job]
    end_of_time = [
        "scancel",
        "--signal=USR2",
        job,
    ]  # as SLURM does signal_delay_s before the end of timeout_min
    for order in (preempt, end_of_time):
        before = steps(tmp_path / "run")
        until(lambda before=before: steps(tmp_path / "run") > before, "another checkpoint")
        if order is end_of_time:  # it runs now
            again = cluster.diffuse("train", "-m", "launcher=slurm", *words)
            _, refusal = again.communicate()
            problem = f"name=run: is being trained by job {job}; wait for it, or scancel {job}"
            assert (again.returncode, refusal) == (2, f"diffuse: {problem}\n")
        cluster(*order)
        cluster.restart(job)
    assert 0 < steps(tmp_path / "run") < 250
    _, said = sweep.communicate()
    assert sweep.returncode == 0, said
    assert cluster.about(job, "Restarts") == "2"
    assert_same_weights(state(tmp_path / "run"), whole)


def test_training_preempted_twice_ends_with_the_same_bits(cluster, tmp_path, whole):
    folder = tmp_path / "run"
    job = cluster.submit("train.sbatch", *TINY, LONG, "name=run", f"output_dir={tmp_path}")
    for _ in range(2):
        before = steps(folder)
        until(lambda before=before: steps(folder) > before, "another checkpoint")
        cluster("scontrol", "requeue", job)
        cluster.restart(job)
    cluster.wait(job)
    assert cluster.about(job, "Restarts") == "2"
    log = cluster.log(job)  # of all starts
    assert (log.count("Training "), log.count("Continuing "), log.count("Trained 250 steps")) == (1, 2, 1)
    assert log.count("saved ") == 2
    assert_same_weights(state(folder), whole)


@pytest.mark.usefixtures("forked")
def test_training_on_two_nodes_that_runs_out_of_time_is_queued_again(cluster, tmp_path):
    words = [*TINY, LONG, "name=run", f"output_dir={tmp_path}", "trainer.num_nodes=2"]
    job = cluster.submit("train.sbatch", *words, options=("--nodes=2",))
    until(lambda: steps(tmp_path / "run"), "a checkpoint")
    cluster("scancel", "--signal=USR1", job)  # as --signal does 120 s before the end of --time
    cluster.restart(job)
    cluster.wait(job)
    assert cluster.about(job, "Restarts") == "1"
    log = cluster.log(job)
    assert "2 x cpu on 2 nodes" in log
    assert (log.count("Continuing "), log.count("SIGUSR1: saved "), log.count("Trained 250 steps")) == (
        1,
        1,
        1,
    )
    train_here(*TINY, LONG, "name=here", f"output_dir={tmp_path}", "trainer.devices=2")
    assert_same_weights(state(tmp_path / "run"), state(tmp_path / "here"))


def test_a_cancelled_job_leaves_a_run_that_can_be_taken_up(cluster, tmp_path, whole):
    words = [*TINY, LONG, "name=run", f"output_dir={tmp_path}"]
    job = cluster.submit("train.sbatch", *words)
    until(lambda: steps(tmp_path / "run"), "a checkpoint")
    cluster("scancel", job)
    until(lambda: cluster("squeue", "-h", "-j", job) == "", "the end of a cancelled job")
    assert cluster.about(job, "JobState") == "CANCELLED"
    assert steps(tmp_path / "run") < 250
    assert "saved " in cluster.log(job)
    train_here(*words)
    assert_same_weights(state(tmp_path / "run"), whole)


def test_an_array_samples_into_one_folder_and_evaluation_waits_for_training(cluster, tmp_path):
    train = cluster.submit("train.sbatch", *TINY, "max_steps=4", "name=run", f"output_dir={tmp_path}")
    after = (f"--dependency=afterok:{train}",)
    of_run = ["run=run", f"output_dir={tmp_path}", "steps=2"]
    array = (*after, "--array=0-1")
    sample = cluster.submit("sample.sbatch", "5", *of_run, f"output={tmp_path}/samples", options=array)
    quick = ["num_samples=70", f"cache_dir={tmp_path}/cache"]
    evaluate = cluster.submit("evaluate.sbatch", *of_run, *quick, options=(*after, "--ntasks=2"))
    assert cluster.about(evaluate, "Reason") == "Dependency"
    for job in (train, sample, evaluate):
        cluster.wait(job)
    made = {path.name for path in (tmp_path / "samples").iterdir()}
    assert {f"{seed:06d}.png" for seed in range(10)} <= made
    assert json.loads((tmp_path / "samples" / "manifest.json").read_text())["seeds"] == [[0, 9]]
    assert (tmp_path / "run" / "metrics.json").is_file()
