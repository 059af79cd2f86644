"""Sweeps, their launchers and lists of values."""

import pytest
import yaml

from diffusion_cli import config
from diffusion_cli.cli import run
from diffusion_cli.config import CONF, launcher, load, load_grid
from diffusion_cli.config.schema import SlurmConfig
from diffusion_cli.errors import UsageError

# --- Defaults of constructors ------------------------------------------------------------


def test_sweeps_are_checked_value_by_value():
    sweep = config.expand("train", ["seed=0,1", "schedule=linear,cosine", "batch_size=8"])
    assert sweep.variants == [
        ["seed=0", "schedule=linear", "batch_size=8"],
        ["seed=1", "schedule=linear", "batch_size=8"],
        ["seed=0", "schedule=cosine", "batch_size=8"],
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("seed=glob(1*)", "seed=glob(1*): glob lists options of a group only; write seed=1,2,3"),
        ("seed=range(3,1)", "seed=range(3,1): has no values; give a start below the end"),
        ("task=glob(z*)", "task=glob(z*): matches no option; choose from autoencoder, classifier, diffusion"),
        (
            "optimizer.lr=interval(1e-4,1e-3)",
            "optimizer.lr=interval(1e-4,1e-3): an interval is not a list of values; add hydra/sweeper=optuna, or write "
            "optimizer.lr=0.0001,0.001",
        ),
        (
            "seed=0,1 schedule=[linear,cosine]",
            "schedule=[linear,cosine]: takes one option; with -m write schedule=linear,cosine",
        ),
        ("schedule=[linear]", "schedule=[linear]: takes one option; write schedule=linear"),
        ("schedule=[]", "schedule=[]: takes one option; write schedule=<option>"),
        (
            "seed=0,1 name=x",
            "name=x: jobs with other values of seed would train in the same folder; leave it out, and each job has "
            "its own, or write 'name=x_${seed}'",
        ),
        (
            "schedule=ve,edm name=x",
            "name=x: jobs with other values of schedule would train in the same folder; leave it out, and each job "
            "has its own",
        ),
        (
            "seed=0,1 name=a,b",
            "name=a,b: jobs with other values of seed would train in the same folder; leave it out, and each job has "
            "its own",
        ),
    ],
)
def test_a_sweep_that_cannot_run_is_one_line(capsys, words, expected):
    assert run(["train", "-m", *words.split()]) == 2
    assert capsys.readouterr().err == f"diffuse: {expected}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "run=a,b output=same",
            "output=same: images of other values of run would be in the same folder; leave it out, and each job has "
            "its own, or write 'output=same_${run}'",
        ),
        (
            "sampler=ddim,ddpm output=same",
            "output=same: images of other values of sampler would be in the same folder; leave it out, and each job "
            "has its own",
        ),
    ],
)
def test_a_folder_of_samples_of_several_models_is_refused_before_the_first_job(capsys, words, expected):
    assert run(["sample", "-m", *words.split()]) == 2
    assert capsys.readouterr().err == f"diffuse: {expected}\n"


@pytest.mark.parametrize("words", ["run=a,b output=x_${run}", "seed=0,64 output=x", "run=a,b output=null"])
def test_folders_that_distinguish_the_samples_are_accepted(words):
    config.load_sweep(config.expand("sample", words.split()))


@pytest.mark.parametrize(
    "words", ["name=x max_steps=1,2", "name=x_${seed} seed=0,1", "name=null seed=0,1", "name=2023,2024"]
)
def test_names_that_distinguish_the_jobs_are_accepted(words):
    config.load_sweep(config.expand("train", words.split()))


@pytest.mark.parametrize(
    ("words", "key", "values"),
    [
        ("seed=choice(1,2)", "seed", [1, 2]),
        ("seed=range(3)", "seed", [0, 1, 2]),
        ("name=x_${seed} seed=3,4", "name", ["x_3", "x_4"]),
        ("output_dir=2024_05,a", "output_dir", ["2024_05", "a"]),
    ],
)
def test_the_configurations_of_a_sweep_are_shown(capsys, words, key, values):
    assert run(["train", "-m", *words.split(), "--cfg", "job", "--resolve"]) == 0
    assert [shown[key] for shown in yaml.safe_load_all(capsys.readouterr().out)] == values


def test_options_are_listed_by_a_pattern():
    sweep = config.expand("train", ["task=glob(*i*)", "seed=0,1"])
    assert [job[0] for job in sweep.jobs] == ["task=classifier"] * 2 + ["task=diffusion"] * 2
    assert sweep.keys == ["task", "seed"]
    assert sweep.values_of(sweep.jobs[1]) == ["classifier", "1"]


# --- What runs the jobs of a sweep ------------------------------------------------------------


@pytest.fixture
def slurm(monkeypatch):
    """A machine that can submit."""
    monkeypatch.setattr(launcher, "_missing", list)


def told(words: list[str], *jobs: list[str], command: str = "train") -> list[str]:
    return launcher.launch(words, [load(command, job) for job in jobs])


def test_the_launcher_has_its_own_words_in_hydras_spelling_too():
    words, others = config.split_launcher(
        ["seed=0", "launcher=slurm", "hydra.launcher.qos=q", "hydra/launcher=local", "launchers=1"]
    )
    assert words == ["launcher=slurm", "launcher.qos=q", "launcher=local"]
    assert others == ["seed=0", "launchers=1"]
    assert told([], []) == ["hydra/launcher=local"]


def test_the_processes_of_a_job_are_tasks_and_gpus_of_slurm(slurm):
    words = ["launcher=slurm", "launcher.partition=gpu"]
    asked = ["hydra.launcher.nodes=1", "hydra.launcher.tasks_per_node=1"]
    gpu, chosen = "hydra.launcher.gpus_per_node=1", "hydra.launcher.partition=gpu"
    assert told(words, ["trainer=gpu"]) == ["hydra/launcher=slurm", *asked, gpu, chosen]
    assert told(words, ["trainer=cpu"]) == ["hydra/launcher=slurm", *asked, chosen]
    nodes = told(words, ["trainer=gpu", "trainer.num_nodes=2", "trainer.devices=8"])
    assert nodes[1:4] == [
        f"hydra.launcher.{key}" for key in ("nodes=2", "tasks_per_node=8", "gpus_per_node=8")
    ]
    mine = [*words, "launcher.gpus_per_node=4"]
    assert gpu not in told(mine, ["trainer=gpu"])
    four = told(words, ["processes=4", "device=cpu"], command="eval")
    assert "hydra.launcher.tasks_per_node=4" in four


@pytest.mark.parametrize(("limit", "minutes"), [("90", 90), ("4h", 240), ("1d2h", 1560), ("61s", 2)])
def test_time_limits_are_minutes_or_durations(slurm, limit, minutes):
    asked = told(["launcher=slurm", f"launcher.timeout_min={limit}"], ["trainer=cpu"])
    assert asked[-1] == f"hydra.launcher.timeout_min={minutes}"


@pytest.mark.parametrize(
    ("messages", "line"),
    [
        (
            "sbatch: error: Invalid generic resource (gres) specification",
            "sbatch: error: Invalid generic resource (gres) specification; set launcher.gpus_per_node=0 or trainer=cpu "
            "if the nodes have no GPUs",
        ),
        (
            "sbatch: error: Unknown host\nsbatch: fatal: Could not establish a configuration source\n",
            "sbatch: fatal: Could not establish a configuration source; sbatch cannot find a SLURM cluster; set "
            "SLURM_CONF, or run the command on a login node",
        ),
    ],
)
def test_jobs_that_sbatch_refuses_have_a_remedy(messages, line):
    assert str(launcher.submission_problem(messages, [load("train", [])])) == f"launcher=slurm: {line}"


def test_the_jobs_of_one_array_take_the_same(slurm):
    with pytest.raises(UsageError, match="all jobs of an array need the same nodes x processes"):
        told(["launcher=slurm"], ["processes=1"], ["processes=2"], command="eval")


def test_what_submitting_needs_is_said_before_anything_is_submitted(monkeypatch):
    monkeypatch.setattr(launcher.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="launcher=slurm: srun not found"):
        told(["launcher=slurm"], [])
    monkeypatch.setattr(launcher, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'diffuse-cli\[slurm\]'"):
        told(["launcher=slurm"], [])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "launcher.njobs=2",
            "launcher.njobs=2: unknown key; did you mean launcher.n_jobs of launcher=joblib?",
        ),
        ("launcher=joblib launcher.njobs=2", "launcher.njobs=2: unknown key; did you mean n_jobs?"),
        (
            "hydra.launcher.n_jobs=2",
            "launcher.n_jobs=2: applies only to launcher=joblib; add launcher=joblib",
        ),
        (
            "launcher.x=1",
            "launcher.x=1: launcher=local has no keys; leave it out, or choose another launcher",
        ),
    ],
)
def test_a_key_that_the_launcher_lacks_is_one_line_with_a_remedy(words, line):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    with pytest.raises(UsageError) as error:
        config.plan_sweep("train", ["seed=0,1", *words.split()])
    assert error.value.lines == (line,)


@pytest.mark.parametrize("file", sorted(CONF.glob("hydra/launcher/*.yaml")), ids=lambda file: file.stem)
def test_every_key_of_a_launcher_is_explained_and_checked(file):
    documented = {key: comment for key, _, comment in config.documented(file)}
    assert all(documented.values())
    assert config.summary(file)
    if file.stem == "slurm":
        assert set(documented) == set(SlurmConfig.model_fields)


# --- Lists of values ------------------------------------------------------------


def test_lists_for_keys_that_take_one_value_make_a_grid_in_the_order_written():
    variants = load_grid("sample", ["sampler=[ddpm,ddim]", "label=[1,2]", "steps=[10,20]", "seed=3"])
    assert [variant.values for variant in variants] == [
        {"sampler": "ddpm", "steps": 10},
        {"sampler": "ddpm", "steps": 20},
        {"sampler": "ddim", "steps": 10},
        {"sampler": "ddim", "steps": 20},
    ]
    words = ["sampler=ddpm", "label=[1,2]", "steps=20", "seed=3"]
    assert variants[1].config == load("sample", words)


@pytest.mark.parametrize(
    ("command", "words", "values"),
    [
        ("eval", ["metric=[fid,is]"], [{}]),
        ("train", ["logger=[csv,tensorboard]"], [{}]),
        ("edit", ["input=[a.png,b.png]", "edit.mask=[0,0,4,4]"], [{}]),
        ("sample", ["guidance=cfg", "guidance.interval=[0.3,3]"], [{}]),
        ("eval", ["metric=bits_per_dim", "metric.bound.num_shards=[1]"], [{"metric.bound.num_shards": 1}]),
        ("eval", ["run=[a,'b c']"], [{"run": "a"}, {"run": "b c"}]),
        (
            "edit",
            ["edit=inpaint", "restoration.num_resamples=[2]"],
            [{"restoration.num_resamples": 2}],
        ),  # brought
        ("sample", ["run=[null,x]"], [{"run": None}, {"run": "x"}]),
    ],
)
def test_a_list_is_a_value_where_the_key_takes_one(command, words, values):
    assert [variant.values for variant in load_grid(command, words)] == values


def test_the_mistakes_of_all_points_of_a_grid_at_once_each_said_once():
    words = [
        "sampler=[ddim,ddmi]",
        "steps=[5,0]",
        "batch_size=[9,9]",
        "seed=[]",
        "guidance.scale=[1,2]",
        "x=[1,2]",
    ]
    with pytest.raises(UsageError) as mistakes:
        load_grid("sample", [*words, "device=[cpu]", "device=cuda"])
    assert sorted(mistakes.value.lines) == [
        "batch_size=[9,9]: contains 9 twice; leave one out",
        "device=cuda: device is given twice; write one list",
        "guidance.scale=[1,2]: applies only to guidance=auto or guidance=cfg or guidance=classifier; "
        "choose one of them",
        "sampler=ddmi: unknown option; did you mean ddpm?",
        "seed=[]: is empty; give at least one value",
        "steps=0: must be greater than 0",
        "x=[1,2]: unknown key; see diffuse sample --help",
    ]


def test_a_file_takes_over_the_keys_and_groups_of_another(tmp_path):
    (tmp_path / "eval.yaml").write_text(
        "defaults:\n  - _self_\n  - metric: [fid]\n\nsteps: 50  # many\nseed: 0  # one\n"
    )
    mine = tmp_path / "compare.yaml"
    mine.write_text(
        "defaults: [eval, override metric: [is], _self_]\n\nseed: 1  # mine\nchart: true  # drawn\n"
    )
    assert config.brought_by(mine) == {"metric": ["is"]}
    assert list(config.documented(mine)) == [
        ("steps", "50", "many"),
        ("seed", "1", "mine"),
        ("chart", "true", "drawn"),
    ]
