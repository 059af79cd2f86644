"""The command line: help, mistakes, completion, sweeps; all of it without torch where it can be."""

import subprocess
import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from diffusion_cli import config
from diffusion_cli.cli import run
from diffusion_cli.config import complete

HEAVY = ("torch", "lightning", "torchvision", "numpy", "scipy", "sklearn", "matplotlib")


def mistakes(capsys, *words: str) -> list[str]:
    """The lines that a wrong command line is answered with."""
    assert run(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_an_invalid_option_that_the_mode_does_not_use_either_is_a_mistake(capsys, tmp_path):
    (tmp_path / "sampler").mkdir()
    text = (config.CONF / "sampler" / "ddim.yaml").read_text()
    (tmp_path / "sampler" / "mine.yaml").write_text(f"{text}etta: 0.3\n")
    lines = mistakes(capsys, "eval", "--config-dir", str(tmp_path), "samples=x", "sampler=mine")
    assert "diffuse: sampler.etta=0.3: unknown key; did you mean eta?" in lines
    lines = mistakes(capsys, "eval", "samples=x", "sampler._target_=3")
    assert any(line.startswith("diffuse: sampler._target_=3: not a class") for line in lines)


def test_every_mistake_at_once_one_line_each(capsys):
    lines = mistakes(
        capsys, "train", "scheduel=cosine", "schedule=cosin", "batch_size=many", "max_step=5", "optimizer.lr=-1",
        "sampler.spacing=trailin", "ema.decay=1.5", "dataset.flip=3", "logger=[csv,tensorbord]",
    )  # fmt: skip
    assert sorted(lines) == sorted(
        [
            "diffuse: scheduel=cosine: unknown key; did you mean schedule?",
            "diffuse: schedule=cosin: unknown option; did you mean cosine?",
            "diffuse: logger=tensorbord: unknown option; did you mean tensorboard?",
            "diffuse: batch_size=many: must be an integer",
            "diffuse: max_step=5: unknown key; did you mean max_steps?",
            "diffuse: optimizer.lr=-1: must be greater than 0 or auto",
            "diffuse: sampler.spacing=trailin: must be leading, trailing, linspace, quadratic, karras, "
            "log_snr or time; did you mean trailing?",
            "diffuse: ema.decay=1.5: must be less than 1, auto or null",
            "diffuse: dataset.flip=3: must be true or false",
        ]
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], "trian: unknown command; did you mean train?"),
        (["train", "--hlep"], "--hlep: unknown flag; did you mean --help?"),
        (["train", "--config-dir", "/nowhere"], "--config-dir /nowhere: no such folder"),
        (["train", "dataset=folder"], "dataset.path: missing; add dataset.path=<value>"),
        (
            ["train", "batch_size=10", "accumulate_grad_batches=3"],
            "accumulate_grad_batches=3: does not divide batch_size=10; use a divisor",
        ),
        (
            ["train", "accumulate=2"],
            "accumulate=2: renamed to accumulate_grad_batches; use accumulate_grad_batches=2",
        ),
        (
            ["train", "-m", "accumulate=2"],
            "accumulate=2: renamed to accumulate_grad_batches; use accumulate_grad_batches=2",
        ),
        (["sample", "accumulate=2"], "accumulate=2: unknown key"),
        (["edit", "method=dps"], "method=dps: renamed to restoration; use restoration=dps"),
        (["edit", "method.scale=2"], "method.scale=2: renamed to restoration; use restoration.scale=2"),
        (
            ["train", "dataset.held_out=0"],
            "dataset.held_out=0: renamed to val_fraction; use dataset.val_fraction=0",
        ),
        (["edit", "input=held_out"], "input=held_out: renamed to val; use input=val"),
        (
            ["eval", "run=ae", "metric=reconstruction", "metric.reconstruction.split=held_out"],
            "metric.reconstruction.split=held_out: renamed to val; use metric.reconstruction.split=val",
        ),
        (
            ["compare", "reference.split=[held_out]"],
            "reference.split=held_out: renamed to val; use reference.split=val",
        ),
        (["train", "times=uniform"], "times=uniform: renamed to time_sampling; use time_sampling=uniform"),
        (["train", "times.bins=4"], "times.bins=4: renamed to time_sampling; use time_sampling.bins=4"),
        (["train", "max_steps=null"], "max_steps: no budget; set max_steps, max_epochs or max_time"),
        (["train", "max_time=5x"], "max_time=5x: must be a duration (90s"),
        (["train", "name=../x"], "name=../x: must be a folder name of letters"),
        (["train", "+extra=1"], "+extra=1: keys cannot be added or removed"),
        (["train", "seed=0,1"], "seed=0,1: several values; give one, or add -m for one run per value"),
        (["eval", "metric=[]"], "metric: missing; add metric=<value>"),
        (["train", "no equals"], "no equals: not key=value"),
        (["train", "lr=1"], "lr=1: unknown key; did you mean optimizer.lr?"),
        (["train", "-m", "seed=0,x"], "seed=x: must be an integer"),
        (["train", "-m", "seed"], "seed: no value; write seed=<value>"),
        (["train", "launcher=slurm"], "launcher=slurm: applies to sweeps only; add -m"),
        (["train", "hydra/launcher=slurm"], "hydra/launcher=slurm: applies to sweeps only; add -m"),
        (["train", "-m", "launcher=slrm"], "launcher=slrm: unknown option; did you mean slurm?"),
        (
            ["train", "-m", "launcher=slurm,local"],
            "launcher=slurm,local: several values; choose one launcher",
        ),
        (
            ["train", "-m", "launcher.partition=gpu"],
            "launcher.partition=gpu: applies only to launcher=slurm; add launcher=slurm",
        ),
        (
            ["train", "-m", "launcher.nodes=2"],
            "launcher.nodes=2: follows from the jobs; set trainer.num_nodes of train, or processes of other commands",
        ),
        (
            ["train", "-m", "hydra/launcher=slurm", "hydra.launcher.partitoin=gpu"],
            "launcher.partitoin=gpu: unknown key; did you mean partition?",
        ),
        (
            ["train", "-m", "launcher=slurm", "launcher.time=2h"],
            "launcher.time=2h: unknown key; did you mean timeout_min?",
        ),
        (
            ["train", "-m", "launcher=slurm", "launcher.timeout_min=2x"],
            "launcher.timeout_min=2x: must be an integer or a duration (90s, 45m, 2h30m, 1d)",
        ),
        (["eval", "metric=[fid,iss]"], "metric=iss: unknown option; did you mean is?"),
        (
            ["sample", "guidance.scale=2"],
            "guidance.scale=2: applies only to guidance=auto or guidance=cfg or guidance=class",
        ),
        (
            ["edit", "edit=img2img", "edit.mask=x.png"],
            "edit.mask=x.png: applies only to edit=inpaint or edit=translate; choose one of them",
        ),
        (
            ["sample", "label=[[a]]"],
            "label=[['a']]: must be an integer, text, a mapping {key: value} or null",
        ),
        (["sample", "guidance=null"], "guidance=null: unknown option; choose from auto, cfg"),
        (["completion", "tcsh"], "completion tcsh: unknown shell; choose from bash, zsh, fish"),
    ],
)
def test_a_mistake_says_what_to_do(capsys, words, expected):
    (line,) = mistakes(capsys, *words)
    assert line.startswith(f"diffuse: {expected}")


def test_mistakes_found_at_work_are_lines_too(capsys, tmp_path):
    (line,) = mistakes(capsys, "sample", f"output_dir={tmp_path}")
    assert line == f"diffuse: output_dir={tmp_path}: contains no runs; train one with: diffuse train"
    (line,) = mistakes(capsys, "train", f"output_dir={tmp_path}", "preview_steps=2000")
    assert "steps=2000: exceeds the 1000 timesteps of the schedule" in line


def test_help_and_mistakes_import_nothing_heavy():
    commands = [
        "",
        "--help",
        "train --help",
        "train schedule=cosin x=1",
        "train --cfg job",
        "eval --cfg job",
        "plot loss --help",
        "train model=help",
        "plot schedule=[linear,cosin]",
    ]
    code = (
        "import sys; from diffusion_cli.cli import run\n"
        "for words in sys.argv[1:]:\n"
        "    run(words.split())\n"
        f"    if found := [name for name in {HEAVY} if name in sys.modules]:\n"
        "        sys.exit(f'diffuse {words} imports {found}')"
    )
    done = subprocess.run([sys.executable, "-c", code, *commands], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_sampling_and_evaluation_do_without_lightning():
    heavy = ("lightning", "torchvision", "matplotlib", "torch_fidelity", "torchmetrics.metric", "sklearn")
    code = (
        "import sys, diffusion_cli.commands.sample, diffusion_cli.commands.eval; "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_cfg_job_prints_the_configuration(capsys):
    import yaml

    assert run(["train", "--cfg", "job", "schedule=linear", "seed=7"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["seed"] == 7
    assert shown["schedule"]["_target_"] == "diffusion_cli.diffusion.schedules.Linear"


def test_users_own_options_are_found_and_checked(capsys, tmp_path):
    (tmp_path / "schedule").mkdir()
    mine = tmp_path / "schedule" / "mine.yaml"
    text = (
        "_target_: diffusion_cli.diffusion.schedules.Cosine\nnum_timesteps: 50\noffset: 0.01\nmax_beta: 0.9\n"
    )
    text += "zero_terminal_snr: false\n"
    mine.write_text(text)
    assert run(["train", "--config-dir", str(tmp_path), "schedule=mine", "--cfg", "job"]) == 0
    assert "num_timesteps: 50" in capsys.readouterr().out
    mine.write_text(text + "max_betta: 1\n")
    (line,) = mistakes(capsys, "train", "--config-dir", str(tmp_path), "schedule=mine")
    assert line == "diffuse: schedule.max_betta=1: unknown key; did you mean max_beta?"
    mine.write_text("_target_: os.system\ncommand: ls\n")
    (line,) = mistakes(capsys, "train", "--config-dir", str(tmp_path), "schedule=mine")
    assert line.startswith("diffuse: schedule._target_=os.system: not a class of diffusion_cli")


@pytest.mark.parametrize(
    ("words", "some"),
    [
        (["tr"], "train"),
        (["train", "sched"], "schedule="),
        (["train", "schedule=c"], "schedule=cosine"),
        (["train", "optimizer.l"], "optimizer.lr="),
        (["train", "max_s"], "max_steps="),
        (["sample", "sampler=dd"], "sampler=ddim"),
        (["train", "--c"], "--cfg"),
        (["completion", "z"], "zsh"),
        (["train", "launcher=sl"], "launcher=slurm"),
        (["plot", "lo"], "loss"),
        (["plot", "figure=lo"], "figure=loss"),
        (["data", "pa"], "pack"),
        (["data", "pack", "dataset=fo"], "dataset=folder"),
    ],
)
def test_completion(words, some):
    assert some in complete(words)
    assert all(word.startswith(words[-1]) for word in complete(words))


def test_completion_has_help(capsys):
    assert run(["completion", "--help"]) == 0
    assert 'eval "$(diffuse completion bash)"' in capsys.readouterr().out


def test_bash_completion_script_works():
    script = (
        'eval "$(diffuse completion bash)"; COMP_LINE="diffuse train schedule=co"; COMP_POINT=${#COMP_LINE}; '
        '_diffuse; echo "${COMPREPLY[@]}"'
    )
    shim = f'diffuse() {{ "{sys.executable}" -c "from diffusion_cli.cli import main; main()" "$@"; }}; '
    done = subprocess.run(["bash", "-c", shim + script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "cosine"


def test_a_flag_without_its_folder_starts_nothing(capsys):
    (line,) = mistakes(capsys, "train", "--config-dir")
    assert line.startswith("diffuse: --config-dir: no folder given")


def test_seeds_that_would_come_round_again_are_refused(capsys):
    (line,) = mistakes(capsys, "sample", "seed=4294967295", "num_samples=2")
    assert "seed=4294967295: the last image's seed exceeds 4294967295" in line


def test_choices_among_numbers_are_named(capsys):
    (line,) = mistakes(capsys, "train", "sampler=dpmpp_2m", "sampler.order=5")
    assert line == "diffuse: sampler.order=5: must be 1, 2 or 3"


def test_a_command_over_a_grid_gets_all_its_points(monkeypatch, capsys):
    import yaml

    given = []
    monkeypatch.setattr("diffusion_cli.commands.plot.run", given.append)
    assert run(["plot", "image=[1,2]", "schedule=[linear,ve]"]) == 0
    (variants,) = given
    assert [variant.values for variant in variants][1] == {"image": 1, "schedule": "ve"}
    assert run(["plot", "image=[1,2]", "--cfg", "job"]) == 0
    assert [shown["image"] for shown in yaml.safe_load_all(capsys.readouterr().out)] == [1, 2]


def test_a_command_over_a_grid_takes_lists_not_sweeps(capsys):
    (line,) = mistakes(capsys, "plot", "-m", "image=1,2")
    assert line == "diffuse: --multirun: plot takes lists of values; leave it out and write key=[...]"
    (line,) = mistakes(capsys, "plot", "image=1,2")
    assert line == "diffuse: image=1,2: several values; write image=[1,2]"


def test_a_bare_first_word_chooses_an_option(capsys):
    import yaml

    assert run(["plot", "loss", "figure.log=false", "--cfg", "job"]) == 0
    figure = yaml.safe_load(capsys.readouterr().out)["figure"]
    assert figure == {"_target_": "diffusion_cli.figures.Losses", "log": False}
    (line,) = mistakes(capsys, "plot", "lss")
    assert line == "diffuse: figure=lss: unknown option; did you mean loss?"
    (line,) = mistakes(capsys, "plot", "run=x", "loss")
    assert line.startswith("diffuse: loss: not key=value; write figure=loss")


def test_what_a_file_is_called_and_holds_does_not_command_the_terminal(capsys, tmp_path):
    checkpoints = tmp_path / "\x1b]0;owned\x07\u202e" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "last.ckpt").touch()
    (line,) = mistakes(capsys, "sample", "run=x", f"output_dir={tmp_path}")
    assert line.endswith(r"are: \x1b]0;owned\x07\u202e")
    (line,) = mistakes(capsys, "report", f"output_dir={tmp_path}")
    assert r"/\x1b]0;owned\x07\u202e/checkpoints/last.ckpt: damaged checkpoint" in line


def test_a_line_is_not_too_long_and_has_its_remedy(capsys, tmp_path):
    folder = tmp_path / ("d" * 200)
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}{'x' * 200}.png").touch()
    words = [
        f"dataset.path={folder}",
        "dataset.resolution=8",
        "model=unet_tiny",
        f"output_dir={tmp_path}/o",
    ]
    assert run(["train", "dataset=folder", "dataset.labels=none", "dataset.val_fraction=0", *words]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("diffuse: "))
    assert len(line) == len("diffuse: ") + 1000
    assert f"dataset.path={folder}: cannot use 10 of the images; repair or remove 0x" in line
    assert line.endswith(")")


def test_torchrun_gets_the_line_for_its_report(monkeypatch, tmp_path):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert run(["train", "max_steps=0"]) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    assert failure.message == "diffuse: max_steps=0: must be greater than 0, auto or null"


@pytest.mark.slow
def test_a_sweep_ends_with_a_table_of_its_jobs(tmp_path):
    folder = tmp_path / "it's [a], b"
    folder.mkdir()
    words = [
        "-m",
        "schedule=ve,edm",
        "schedule.sigma_max=20",
        "parameterization=score",
        "max_steps=1",
        "batch_size=4",
    ]
    words += [
        "preview_steps=1",
        "trainer=cpu",
        "model.channels=8",
        "model.norm_groups=4",
        "model.num_heads=1",
        "model.head_channels=null",
        "output_dir='it\\'s, too'",
    ]
    command = [sys.executable, "-m", "diffusion_cli", "train", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    (*_, heading, first, second) = done.stdout.splitlines()
    assert heading == "job  schedule  result  folder"
    assert [line.split()[:3] for line in (first, second)] == [["0", "ve", "done"], ["1", "edm", "done"]]
    run = folder / first[first.index("it's") :]
    assert (run / "config.yaml").is_file()
    failed = subprocess.run([*command, "latent.run=none"], capture_output=True, text=True, cwd=folder)
    assert failed.returncode == 2
    assert [line.split()[2:4] for line in failed.stdout.splitlines()[-2:]] == [["failed", "it's,"]] * 2
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["data", "pack", "dataset=digits", "output=a/x"],
            "output=a/x: cannot be used (File exists: a); use a path of which no part is a file",
        ),
        (
            ["train", "-m", "seed=0,1", "output_dir=a"],
            "output_dir=a: cannot be used (File exists); use a path of which no part is a file",
        ),
        (
            ["train", "-m", "seed=0,1", "output_dir=a/b"],
            "output_dir=a/b: cannot be used (Not a directory); use a path of which no part is a file",
        ),
    ],
)
def test_an_error_of_the_system_names_key_and_remedy(capsys, monkeypatch, tmp_path, words, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").touch()
    assert run(words) == 2
    assert capsys.readouterr().err == f"diffuse: {line}\n"
