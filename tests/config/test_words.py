"""Mistakes in writing words of a command line: each is one plain line with the word to write, without torch."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_cli.cli import run
from diffusion_cli.config import load

FOLDER = ("train", "dataset=folder")

MISTAKES = {
    "trian": "trian: unknown command; did you mean train?",
    "train schedule cosine": "schedule cosine: no = between key and value; write schedule=cosine",
    "train scheduel Cosine": "scheduel Cosine: no = between key and value; write schedule=cosine",
    "train --schedule cosine": "--schedule cosine: unknown flag; write schedule=cosine",
    "train --schedule=cosine": "--schedule=cosine: unknown flag; write schedule=cosine",
    "train -m schedule cosine": "schedule cosine: no = between key and value; write schedule=cosine",
    "train --batch-size 8": "--batch-size 8: unknown flag; write batch_size=8",
    "train --version": "--version: unknown flag; choose from --help, --cfg, --resolve, --package, --info, "
    "--config-dir, --multirun, -h, -m",
    "train cosine": "cosine: not key=value; write schedule=cosine or lr_schedule=cosine",
    "train seed": "seed: no value; write seed=<value>",
    "train task": "task: no value; write task=<option>, one of autoencoder, classifier, diffusion",
    "train x": "x: not key=value; see diffuse train --help",
    "train steps = 10": "steps = 10: spaces around =; write max_steps=10",
    "sample steps = 10": "steps = 10: spaces around =; write steps=10",
    "sample steps =10": "steps =10: spaces around =; write steps=10",
    "sample steps= 10": "steps= 10: spaces around =; write steps=10",
    "sample steps:10": "steps:10: no = between key and value; write steps=10",
    "sample =10": "=10: no key before =; write key=value",
    "sample ''": "'': empty word; leave it out",
    "sample steps=10,": "steps=10,: misplaced comma; write steps=10",
    "train -m seed=0,,1": "seed=0,,1: misplaced comma; write seed=0,1",
    "train -m 'seed=range(3'": "seed=range(3: not a list of values; write seed=1,2,3 or seed=range(1,4)",
    "sample 'steps=10;'": "steps=10;: must be an integer",
    "sample steps=ten": "steps=ten: must be an integer",
    "sample steps=0": "steps=0: must be greater than 0",
    "sample seed=-1": "seed=-1: must be at least 0",
    "sample batch_size=big": "batch_size=big: must be an integer or auto",
    "sample step=last": "step=last: must be an integer, best or null",
    "sample sampler=DDIM": "sampler=DDIM: unknown option; did you mean ddim?",
    "sample sampler=dpm++": "sampler=dpm++: unknown option; did you mean dpmpp_2m?",
    "sample sampler=DPM++2M": "sampler=DPM++2M: unknown option; did you mean dpmpp_2m?",
    "sample sampler=k_euler": "sampler=k_euler: unknown option; did you mean euler?",
    "sample sampler=euler_a": "sampler=euler_a: unknown option; did you mean euler_ancestral?",
    "sample sampler=DDIMScheduler": "sampler=DDIMScheduler: unknown option; did you mean ddim?",
    "sample sampler.eta=2": "sampler.eta=2: must be at most 1",
    "sample scheduler=euler": "scheduler=euler: unknown key; did you mean sampler?",
    "sample scheduler euler": "scheduler euler: no = between key and value; write sampler=euler",
    "train scheduler=ddim": "scheduler=ddim: unknown key; did you mean sampler?",
    "train scheduler=cosine": "scheduler=cosine: unknown key; did you mean schedule?",
    "train gpus=2": "gpus=2: unknown key; did you mean trainer.devices?",
    "sample gpus=2": "gpus=2: unknown key; did you mean processes?",
    "eval trainer.devices=2": "trainer.devices=2: unknown key; did you mean processes?",
    "train dataset=photos": "dataset=photos: unknown option; did you mean folder?",
    "sample device=tpu": "device=tpu: must be auto, cpu or cuda; did you mean cpu?",
    "sample @steps=10": "@steps=10: @ in a key is not supported; write key=value",
    "sample +steps=10": "+steps=10: keys cannot be added or removed; write steps=10",
    "sample 'steps=${x}'": "steps=${x}: invalid reference ${...}; use the name of a key, such as ${seed}",
    "sample 'batch_size=[a'": (
        "batch_size=[a: unmatched bracket or quote; write batch_size=[a,b] for a list, 'batch_size=\"[a\"' for text"
    ),
    "eval metric=FID": "metric=FID: unknown option; did you mean fid?",
    "eval metric=fid,kid": "metric=fid,kid: several values; write metric=[fid,kid]",
    "train progressive=8,16": "progressive=8,16: several values; write progressive=[8,16]",
    "train progressive=8": "progressive=8: must be a list or null; write progressive=[8]",
    "train seed=0,1": "seed=0,1: several values; give one, or add -m for one run per value",
    "train 'name=été à la mer'": (
        "name=été à la mer: must be a folder name of letters, digits and _ . + - or null; write name=été_à_la_mer"
    ),
    "train max_time=10": "max_time=10: must be a duration (90s, 45m, 2h30m, 1d) or null",
    "train max_epochs=x": "max_epochs=x: must be an integer or null",
    "train condition=image condition.of=blur condition.blur_sigma=0": (
        "condition.blur_sigma=0: must be a number greater than 0, such as 1, or null"
    ),
    "train condition=image condition.of=mask condition.ratio=1": (
        "condition.ratio=1: must be a number greater than 0 and less than 1, such as 0.5, or null"
    ),
    "train optimizer.lr=": "optimizer.lr=: no value; must be a number or auto",
    "train optimizer.lr=fast": "optimizer.lr=fast: must be a number or auto",
    "edit edit=attribute edit.to.age=40": "edit.to.age=40: unknown key; write edit.to={age: 40}",
    "sample guidance=cfg guidance.scales.age=2": (
        "guidance.scales.age=2: unknown key; write guidance.scales={age: 2}"
    ),
    "edit edit=attribute 'edit.to={age: [30,40]}'": (
        "edit.to.age=[30, 40]: must be one value, not a list; write edit.to={age: 30}"
    ),
    "sample scale=2": "scale=2: unknown key; did you mean guidance.scale?",
    "sample guidance=cfg scale=2": "scale=2: unknown key; did you mean guidance.scale?",
    "sample cfg_scale=2": "cfg_scale=2: unknown key; did you mean guidance.scale?",
    "sample -n 10": "-n 10: unknown flag; write num_samples=10",
    "sample -n=10": "-n=10: unknown flag; write num_samples=10",
    "sample demo": "demo: not key=value; did you mean run=demo?",
    "report 'my run'": "my run: not key=value; did you mean 'run=my run'?",
    "sample guidance=5": "guidance=5: unknown option; write guidance=cfg guidance.scale=5",
    "sample guidance=1.5": "guidance=1.5: unknown option; write guidance=cfg guidance.scale=1.5",
    "sample n=4": "n=4: unknown key; did you mean num_samples?",
    "sample sampler=heun sampler.foo=2": "sampler.foo=2: unknown key; choose from sampler.spacing",
    "sample sampler=heun sampler.spacng=2": "sampler.spacng=2: unknown key; did you mean sampler.spacing?",
    "train max_steps=0": "max_steps=0: must be greater than 0, auto or null",
    "train max_steps=ten": "max_steps=ten: must be an integer, auto or null",
    "train dataset=a.zip": "dataset=a.zip: unknown option; write dataset=folder dataset.path=a.zip",
    "train dataset=foldr dataset.path=a": "dataset=foldr: unknown option; did you mean folder?",
    "train dataset=folder dataset.pth=a": "dataset.pth=a: unknown key; did you mean dataset.path?",
    "train dataset=folder +dataset.path=a": (
        "+dataset.path=a: keys cannot be added or removed; write dataset.path=a"
    ),
    "eval run=a metric=[fid,iss] metric.fid.bootstrap=9": "metric=iss: unknown option; did you mean is?",
    "train dataset=./a.npy": "dataset=./a.npy: unknown option; write dataset=array dataset.path=./a.npy",
    "train model=kl_tiny": "model=kl_tiny: is for task=autoencoder; set task=autoencoder, or choose another model",
    "train objective=cross_entropy": (
        "objective=cross_entropy: is for task=classifier; set task=classifier, or choose another objective"
    ),
    "train task=classifier model=unet_tiny objective=cross_entropy": (
        "model=unet_tiny: is for task=diffusion; set task=diffusion, or choose another model"
    ),
    "train model=kl_tiny objective=autoencoder": (
        "model=kl_tiny: is for task=autoencoder; set task=autoencoder, or choose another model"
    ),
    "train task=autoencoder model=unet_tiny objective=simple": (
        "model=unet_tiny: is for task=diffusion; set task=diffusion, or choose another model"
    ),
    "train task=classifier experiment=ddpm_cifar10": (
        "model=unet_cifar10: is for task=diffusion; set task=diffusion, or choose another model"
    ),
    "train learning_rate=1e-4": "learning_rate=1e-4: unknown key; did you mean optimizer.lr?",
    "train optimizer.learning_rate=1e-4": "optimizer.learning_rate=1e-4: unknown key; did you mean optimizer.lr?",
    "train compile=maybe": "compile=maybe: must be auto, true or false",
    "train ema=0.99": (
        "ema=0.99: not a single value; set ema.profile or ema.decay or ema.warm_up or ema.lengths or ema.snapshot_every"
    ),
    "train dataset=folder dataset.path=/a,b": (
        "dataset.path=/a,b: several values; write 'dataset.path=\"/a,b\"' for a path with a comma, "
        "or add -m for one run per value"
    ),
}


@pytest.mark.parametrize(("words", "expected"), MISTAKES.items())
def test_a_mistake_is_one_line_with_the_word_to_write(capsys, words, expected):
    assert run(shlex.split(words)) == 2
    assert capsys.readouterr() == ("", f"diffuse: {expected}\n")


def test_mistakes_in_writing_import_no_torch():
    code = (
        "import shlex, sys; from diffusion_cli.cli import run; "
        "[run(shlex.split(words)) for words in sys.argv[1:]]; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, *MISTAKES], capture_output=True, check=True)


@pytest.mark.parametrize(
    "path",
    [
        "/a b/c",
        "/a=b/c",
        "/a (1)/c",
        "/a:b/c",
        "/a[1]/c",
        "/a{1}/c",
        "/it's/c",
        '/a"b/c',
        "/é/c",
        "/a;b",
        "C:\\a(b)\\",
    ],
)
def test_a_path_is_read_as_it_is_typed(path):
    assert load("sample", [f"output={path}", f"run={path}"]).model_dump()["output"] == path
    config = load(*FOLDER[:1], [*FOLDER[1:], f"dataset.path={path}"])
    assert config.model_dump()["dataset"]["path"] == path


def test_the_remedy_for_a_path_with_a_comma_is_accepted(capsys):
    assert run([*FOLDER, "dataset.path=/a,b"]) == 2
    word = capsys.readouterr().err.partition("write ")[2].partition(" for")[0]
    config = load("train", ["dataset=folder", *shlex.split(word)])
    assert config.model_dump()["dataset"]["path"] == "/a,b"


def test_a_tilde_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ö")
    assert os.path.expanduser("~") == "/home/ö"  # noqa: PTH111
    assert load("sample", ["output=~/x.png"]).model_dump()["output"] == "/home/ö/x.png"
    assert load("report", ["run=[~/a,b]"]).model_dump()["run"] == ["/home/ö/a", "b"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("schedule cosine", "schedule cosine: no = between key and value; write schedule=cosine"),
        ("modle=dit_tiny", "modle=dit_tiny: unknown key; did you mean model?"),
        ("model=dit_tin", "model=dit_tin: unknown option; did you mean dit_tiny?"),
        ("metric=[fid,kdi]", "metric=kdi: unknown option; did you mean kid?"),
        (
            "model=dit_tiny model.hiden_size=3",
            "model.hiden_size=3: unknown key; did you mean model.hidden_size?",
        ),
        ("times=uniform", "times=uniform: renamed to time_sampling; use time_sampling=uniform"),
        ("model=dit_tiny model.hidden_size=3 ema.decay=1 metric=[] seed=0,1 -m launcher=slurm", None),
        ("sampler=glob(dd*) hydra/sweeper=optuna experiment=null", None),
    ],
)
def test_help_is_shown_whatever_the_other_words_are_and_names_the_wrong_ones(capsys, words, line):
    assert run(["train", "--help", *words.split()]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("diffuse train: ")
    assert err == (f"diffuse: {line}\n" if line else "")


def test_help_of_a_group_names_the_wrong_words(capsys):
    assert run(["eval", "sampler=help", "stps=3", "dataset.path=x"]) == 0
    assert capsys.readouterr().err == "diffuse: stps=3: unknown key; did you mean steps?\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "a: [",
            "not valid YAML at line 1: expected the node content, but found '<stream end>'; correct the file",
        ),
        ("- a", "not a mapping; write one key: value per line"),
    ],
)
def test_an_option_file_that_is_not_yaml_is_named(capsys, tmp_path, text, problem):
    file = Path(tmp_path, "sampler", "mine.yaml")
    file.parent.mkdir()
    file.write_text(text)
    assert run(["sample", "--config-dir", str(tmp_path), "sampler=mine"]) == 2
    assert capsys.readouterr().err == f"diffuse: {file}: {problem}\n"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("train trainer.accelerator=gpu", "gpu"),
        ("train -m trainer.accelerator=gpu", "gpu"),
        ("sample device=gpu", "cuda"),
    ],
)
def test_gpu_is_a_device(line, name, capsys):
    command, *words = line.split()
    assert run([command, *words, "--cfg", "job"]) == 0
    assert re.search(rf"(accelerator|device): {name}$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("group", "text", "problem"),
    [
        ("sampler", "", "is empty; write one key: value per line"),
        ("experiment", "# @package _global_\n", "is empty; write one key: value per line"),
        (
            "sampler",
            "eta: 1",
            "has no _target_; name the class, as _target_: diffusion_cli.samplers.ConsistencySampler",
        ),
        ("sampler", "defaults: 3", "defaults is not a list; write defaults: [name]"),
        (
            "sampler",
            "_target_: x\na: 2\na: 3",
            "not valid YAML at line 3: found duplicate key a; correct the file",
        ),
        ("sampler", "defaults: [x]\n_target_: y", "Could not load 'sampler/x'; correct its defaults"),
        (
            "experiment",
            "# @package _global_\ndefaults: [override /modl: x]",
            "defaults: modl: unknown group; did you mean model?",
        ),
    ],
)
def test_an_option_file_that_cannot_be_used_is_named(capsys, tmp_path, group, text, problem):
    file = Path(tmp_path, group, "mine.yaml")
    file.parent.mkdir()
    file.write_text(text)
    assert run(["train", "--config-dir", str(tmp_path), f"{group}=mine"]) == 2
    assert capsys.readouterr().err == f"diffuse: {file}: {problem}\n"


def test_a_reference_to_no_key_names_the_key_that_has_it(capsys, tmp_path):
    file = Path(tmp_path, "sampler", "mine.yaml")
    file.parent.mkdir()
    file.write_text("_target_: diffusion_cli.samplers.DDIM\neta: ${nowhere}\n")
    assert run(["sample", "--config-dir", str(tmp_path), "sampler=mine"]) == 2
    line = "sampler.eta: Interpolation key 'nowhere' not found; use the name of a key, such as ${seed}"
    assert capsys.readouterr().err == f"diffuse: {line}\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "train -m seed=0 seed=1",
            "seed=0: ignored, because seed=1 follows; for both with -m write seed=0,1",
        ),
        (
            "train logger=csv logger=[wandb]",
            "logger=csv: ignored, because logger=[wandb] follows; for both write logger=[csv,wandb]",
        ),
        ("compare steps=5 steps=9", "steps=5: ignored, because steps=9 follows; for both write steps=[5,9]"),
        ("train seed=1 seed=1", None),
    ],
)
def test_a_value_that_another_one_replaces_is_named(capsys, words, line):
    assert run([*words.split(), "--cfg", "job"]) == 0
    assert capsys.readouterr().err == (f"diffuse: {line}\n" if line else "")
