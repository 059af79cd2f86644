"""Hydra's flags and keys: each does what it does in Hydra, or is refused in one line with a remedy."""

import shlex

import pytest
import yaml

from diffusion_cli.cli import run
from diffusion_cli.config import plan_sweep
from diffusion_cli.errors import UsageError

REFUSED = {
    "train +extra=1": "+extra=1: keys cannot be added or removed; write extra=1",
    "train ~seed": "~seed: keys cannot be added or removed; leave it out",
    "train ++nowhere=1": "nowhere=1: unknown key; see diffuse train --help",
    "train -m sweeper=optuna seed=0,1": "sweeper=optuna: unknown key; did you mean hydra/sweeper=optuna?",
    "train sweeper.n_trials=3": "sweeper.n_trials=3: unknown key; did you mean hydra.sweeper.n_trials?",
    "train --cfg": "--cfg: no value; choose from job, hydra, all",
    "train --cfg jobs": "--cfg jobs: unknown value; did you mean job?",
    "train --info list": "--info list: unknown value; choose from all, config, defaults, defaults-tree, plugins, "
    "searchpath",
    "train --resolve": "--resolve: applies only with --cfg; add --cfg job",
    "train -p model": "--package: applies only with --cfg; add --cfg job",
    "train --cfg job -p modle": "--package modle: not in the configuration; did you mean model?",
    "train -cn mine": "-cn mine: the command names its configuration; use --config-dir DIR for options of your own",
    "train --config-path x": "--config-path x: the command names its configuration; use --config-dir DIR for "
    "options of your own",
    "train --run": "--run: a command runs without it; leave it out",
    "train hydra.run.dir=x": "hydra.run.dir=x: a run is in output_dir/name; use output_dir= and name=",
    "train -m hydra.sweep.dir=x": "hydra.sweep.dir=x: a sweep is in output_dir; use output_dir=",
    "train -m hydra.sweep.subdir=x": "hydra.sweep.subdir=x: a job is in output_dir/name; use name=, such as "
    "'name=x_${seed}'",
    "train hydra.job.chdir=true": "hydra.job.chdir=true: jobs stay in the working folder; use output_dir= for the "
    "place of results",
    "train hydra.job.name=x": "hydra.job.name=x: jobs have the names of their runs; use name=",
    "train hydra.output_subdir=x": "hydra.output_subdir=x: a run has its configuration in config.yaml; leave it out",
    "train hydra.verbose=true": "hydra.verbose=true: there is no log of messages; use DIFFUSE_TRACEBACK=1 for the "
    "traceback of an error",
    "train hydra.searchpath=[x]": "hydra.searchpath=[x]: options of your own have a flag; use --config-dir DIR",
    "train hydra/output=x": "hydra/output=x: a setting of Hydra that has no effect here; leave it out",
    "train hydra/sweeper=optuna": "hydra/sweeper=optuna: applies to sweeps only; add -m",
    "train hydra.job.env_set.X=1": "hydra.job.env_set.X=1: applies to sweeps only; add -m",
    "train -m hydra.job.env_copy=[NOWHERE_SET]": "hydra.job.env_copy=NOWHERE_SET: not set in this environment; "
    "export NOWHERE_SET",
    "train -m hydra.mode=RUN": "hydra.mode=RUN: selects no sweep; leave it out, and -m too",
    "plot hydra/sweeper=basic": "hydra/sweeper=basic: applies to sweeps only; leave it out",
    "train -m hydra/sweeper=nowhere": "hydra/sweeper=nowhere: unknown option; choose from basic",
    "train -m hydra.sweeper.n_trials=3": "hydra.sweeper.n_trials: unknown key; choose from max_batch_size, params",
    "train -m launcher=submitit_slurm": "launcher=submitit_slurm: requeues no jobs; use launcher=slurm",
}
ONE_VALUE = {
    "train seed=choice(1,2)": "seed=choice(1,2): several values; give one, or add -m for one run per value",
    "train seed=range(1,3)": "seed=range(1,3): several values; give one, or add -m for one run per value",
    "train seed=shuffle(1,2)": "seed=shuffle(1,2): several values; give one, or add -m for one run per value",
    "train seed=sort(2,1)": "seed=sort(2,1): several values; give one, or add -m for one run per value",
    "train sampler=glob(dd*)": "sampler=glob(dd*): several values; give one, or add -m for one run per value",
    "train optimizer.lr=interval(1e-4,1)": "optimizer.lr=interval(1e-4,1): several values; give one, or add -m "
    "hydra/sweeper=optuna",
    "train optimizer.lr=tag(log,interval(1e-4,1))": "optimizer.lr=tag(log,interval(1e-4,1)): several values; give "
    "one, or add -m hydra/sweeper=optuna",
    "train seed=choice()": "seed=choice(): not a list of values; write seed=1,2,3 or seed=range(1,4)",
    "train seed=choise(1,2)": "seed=choise(1,2): unknown function choise; did you mean choice?",
    "train -m seed=rnage(3)": "seed=rnage(3): unknown function rnage; did you mean range?",
    "train name=choices(a,b)": "name=choices(a,b): unknown function choices; did you mean choice?",
    "eval steps=Choice(5,10)": "steps=Choice(5,10): unknown function Choice; did you mean choice?",
    "train progressive=range(8,17,8)": "progressive=range(8,17,8): several values; write progressive=[8,16]",
    "plot image=range(3)": "image=range(3): several values; write image=[0,1,2]",
    "plot schedule=glob(c*)": "schedule=glob(c*): several values; write schedule=[cosine]",
    "eval metric=choice(fid,is)": "metric=choice(fid,is): several values; write metric=[fid,is]",
}


@pytest.mark.parametrize("words", [*REFUSED, *ONE_VALUE])
def test_a_word_that_has_no_effect_is_refused_with_a_remedy(capsys, words):
    assert run(shlex.split(words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"diffuse: {(REFUSED | ONE_VALUE)[words]}")


@pytest.mark.parametrize("flag", [[], ["-m"]])
@pytest.mark.parametrize(
    ("group", "text", "problem"),
    [
        ("experiment", "hydra: {callbacks: {x: {_target_: y, z: 1}}}", "hydra.callbacks.x: a setting of Hydra that "
        "has no effect here; leave it out"),
        ("experiment", "defaults: [override /hydra/job_logging: none]", "hydra/job_logging: there is no log of "
        "messages; use logger= for the curves of training"),
        ("experiment", "hydra: {job: {chdir: true}}", "hydra.job.chdir: jobs stay in the working folder; use "
        "output_dir= for the place of results"),
        ("experiment", "hydra: {mode: MULTIRUN}", "hydra.mode: a file starts no sweep; leave it out, and add -m"),
        ("experiment", "hydra: {sweeper: {parms: {seed: 1}}}", "hydra.sweeper.parms: unknown key; did you mean "
        "params?"),
        ("experiment", "hydra: {sweeper: {max_batch_size: x}}", "hydra.sweeper.max_batch_size: Value 'x' of type "
        "'str' could not be converted to Integer; correct it"),
        ("sampler", "sampler: {_target_: diffusion_cli.samplers.DDIM}\nhydra: {sweeper: {params: {seed: 1}}}",
        "hydra.sweeper.params: applies in an experiment only; move it to a file in experiment/"),
    ],
)  # fmt: skip
def test_a_setting_of_hydra_in_a_file_that_has_no_effect_is_refused(
    capsys, tmp_path, flag, group, text, problem
):
    file = tmp_path / group / "mine.yaml"
    file.parent.mkdir()
    file.write_text(f"# @package _global_\n{text}\n")
    assert run(["train", *flag, "--config-dir", str(tmp_path), f"{group}=mine"]) == 2
    assert capsys.readouterr().err == f"diffuse: {file}: {problem}\n"


def test_an_experiment_with_settings_of_a_sweep_also_trains_one_run(capsys, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nseed: 5\nhydra: {sweeper: {params: {batch_size: '8,16'}}, job: {env_set: {A: b}}}\n"
    )
    words = f"--config-dir {tmp_path} experiment=mine --cfg job -p"
    assert shown(capsys, f"train {words} seed") == "5\n"
    assert shown(capsys, f"train -m {words} batch_size") == "8\n---\n16\n"


def shown(capsys, words: str) -> str:
    assert run(shlex.split(words)) == 0
    return capsys.readouterr().out


def test_text_that_resembles_a_function_is_text(capsys):
    assert shown(capsys, "train 'data_dir=ranger(1)' --cfg job -p data_dir") == "ranger(1)\n"


def test_two_plus_signs_set_a_key(capsys):
    assert shown(capsys, "train ++seed=3 --cfg job -p seed") == "3\n"
    assert shown(capsys, "train -m ++seed=3,4 --cfg job -p seed") == "3\n---\n4\n"


def test_references_are_shown_unless_they_are_resolved(capsys):
    words = "train max_steps=120 'name=x_${seed}' seed=7 --cfg job"
    unresolved, resolved = (yaml.safe_load(shown(capsys, f"{words}{flag}")) for flag in ("", " --resolve"))
    assert (unresolved["name"], resolved["name"]) == ("x_${seed}", "x_7")
    references = {"name", *(key for key, value in unresolved.items() if value != resolved[key])}
    assert all("${" in str(unresolved[key]) for key in references)
    assert "${" not in str(resolved)


def test_an_earlier_key_of_an_option_file_is_shown_in_place_of_a_reference(capsys, tmp_path):
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text("# @package _global_\nmax_steps: 500\noptimizer: {decay_steps: 200}\n")
    words = f"train --config-dir {tmp_path} experiment=mine --cfg job -p lr_schedule.decay_steps"
    assert shown(capsys, words) == "200\n"


def test_a_part_of_the_configuration_is_shown_with_its_package(capsys):
    assert shown(capsys, "train --cfg job -p ema").startswith("# @package ema\nprofile: ")
    assert shown(capsys, "train --cfg job --package=batch_size") == "64\n"
    whole = yaml.safe_load(shown(capsys, "train --cfg job -p _global_"))
    assert whole["ema"]["warm_up"] is True


def test_the_settings_of_hydra_are_shown(capsys):
    assert yaml.safe_load(shown(capsys, "train --cfg hydra output_dir=x"))["hydra"]["sweep"] == {
        "dir": "x",
        "subdir": ".",
    }
    both = yaml.safe_load(shown(capsys, "sample --cfg all steps=7"))
    assert both["steps"] == 7
    assert both["hydra"]["output_subdir"] is None
    sweep = shown(capsys, "train -m seed=0,1 hydra.mode=MULTIRUN --cfg hydra")
    assert yaml.safe_load(sweep)["hydra"]["overrides"]["task"] == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--info defaults", "| sampler/ddim "),
        ("--info defaults-tree model=dit_tiny", "    model: dit_tiny\n"),
        ("--info searchpath", "| main     | file://"),
        ("--info plugins", "Installed Hydra Plugins\n"),
        ("--info=config batch_size=7", "batch_size: 7\n"),
        ("-i", "batch_size: 64\n"),
    ],
)
def test_what_hydra_composes_is_printed(capsys, words, expected):
    assert expected in shown(capsys, f"train {words}")


def test_folders_of_options_are_in_the_search_path(capsys, tmp_path):
    assert str(tmp_path) in shown(capsys, f"train --config-dir {tmp_path} --info searchpath")


SEARCH = "hydra/sweeper=optuna"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("optimizer.lr=interval(-1,1e-2)", "optimizer.lr=-1.0: must be greater than 0 or auto"),
        ("batch_size=interval(8.0,64.0)", "batch_size=26.666666666666668: must be an integer"),
        ("hydra.sweeper.n_trails=3", "hydra.sweeper.n_trails: unknown key; did you mean n_trials?"),
        (
            "hydra.sweeper.n_trials=x",
            "hydra.sweeper.n_trials=x: Value 'x' of type 'str' could not be converted to Integer",
        ),
        ("hydra/sweeper/sampler=rand", "hydra/sweeper/sampler=rand: unknown option; did you mean random?"),
        ("logger=tensorboard", "logger=tensorboard: the objective is read from metrics.csv; add csv"),
        ("objective_metric=val_los", "objective_metric=val_los: unknown metric; did you mean val_loss?"),
        ("objective_metric=fid", "objective_metric=fid: no evaluations during training; set eval_every"),
        ("max_steps=20", "validate_every=500: no validation within max_steps=20; use validate_every=20"),
        (
            "dataset.val_fraction=0",
            "objective_metric=val_loss: dataset.val_fraction=0 leaves no validation images; use loss",
        ),
        (
            "hydra.sweeper.direction=[minimize,maximize]",
            "objective_metric=[val_loss]: the sweeper needs 2; give as many metrics as hydra.sweeper.direction has "
            "entries",
        ),
    ],
)
def test_a_search_is_checked_before_its_first_job(words, line):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    with pytest.raises(UsageError) as error:
        plan_sweep("train", [SEARCH, "seed=0,1", *words.split()])
    assert error.value.lines[0] == line


@pytest.mark.parametrize("sqlalchemy", ["1.4.54", "2.1.0"])
def test_a_study_in_a_database_is_refused_where_optuna_cannot_open_it(monkeypatch, sqlalchemy):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    versions = {"optuna": "2.10.1", "sqlalchemy": sqlalchemy}
    monkeypatch.setattr("diffusion_cli.config.searches.version", versions.__getitem__)
    words = [SEARCH, "seed=range(0,3)", "hydra.sweeper.storage=sqlite:///study.db"]
    if sqlalchemy.startswith("1"):
        plan_sweep("train", words)
        return
    with pytest.raises(
        UsageError, match=r"storage=sqlite:///study.db: Optuna 2.10.1 has no databases with SQLAlchemy 2"
    ):
        plan_sweep("train", words)


def test_a_command_without_an_objective_is_not_searched():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    with pytest.raises(
        UsageError, match="needs an objective, which train and eval have; use hydra/sweeper=basic"
    ):
        plan_sweep("sample", [SEARCH, "seed=interval(0,9)"])


def test_a_value_that_is_best_near_that_of_real_data_is_not_searched():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = [SEARCH, "guidance=cfg", "guidance.scale=interval(1,4)", "run=x"]
    for name in ("volume", "nearest_neighbour"):
        with pytest.raises(UsageError, match=f"objective_metric={name}: neither its lowest nor its highest"):
            plan_sweep("eval", [*words, "metric=geometry", f"objective_metric={name}"])
    assert plan_sweep("eval", [*words, "metric=geometry", "objective_metric=chamfer"])


@pytest.mark.parametrize(
    ("name", "package"), [("optuna", r"diffuse-cli\[sweep\]"), ("ax", "hydra-ax-sweeper")]
)
def test_a_sweeper_that_is_not_installed_names_its_package(monkeypatch, name, package):
    monkeypatch.setattr("diffusion_cli.config.hydra_jobs.installed", lambda group: {"basic": {}})
    with pytest.raises(UsageError, match=f"hydra/sweeper={name}: is not installed; pip install '{package}'"):
        plan_sweep("train", [f"hydra/sweeper={name}", "seed=0,1"])


def test_installed_launchers_are_suggested():
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    with pytest.raises(UsageError, match="launcher=joblob: unknown option; did you mean joblib"):
        plan_sweep("train", ["launcher=joblob"])


def test_the_objective_is_no_part_of_a_run():
    from diffusion_cli.config import identity, load

    default, other = (load("train", words) for words in ([], ["objective_metric=[loss,fid]"]))
    assert identity(default.model_dump()) == identity(other.model_dump())
    assert default.model_dump()["name"] == other.model_dump()["name"]


def test_a_search_without_values_is_refused(capsys):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    assert run(["train", "-m", "hydra/sweeper=optuna", "seed=1"]) == 2
    assert capsys.readouterr().err == (
        "diffuse: hydra/sweeper=optuna: has no values to search; add values to a key, such as "
        "'optimizer.lr=interval(1e-4,1e-2)'\n"
    )


def test_the_help_shows_references_as_they_are_written(capsys):
    assert run(["--help"]) == 0
    assert "references ${...}" in capsys.readouterr().out
