"""`diffuse train init.run=RUN lora.rank=R`: checkpoints, resume, and the commands that load such a run."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.commands.train_setup import TrainingSetup, set_up
from diffusion_cli.runs.checkpoint import LAST, Checkpoint, read
from diffusion_cli.runs.load import load_model
from diffusion_cli.runs.lora import BASE, merged, read_base
from diffusion_cli.runs.weights import save_weights
from diffusion_cli.system.tensors import read_tensors
from helpers import TINY, assert_same, distance
from helpers.latents import refused
from helpers.recipes import train_config

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
CHOSEN = ("name=", "model.", "optimizer.lr", "lr_schedule.warm", "checkpoint_every")
WORDS = [word for word in TINY if not word.startswith(CHOSEN)] + [
    "init.run=tiny", "name=tuned", "lora.rank=2", "lora.alpha=6", "optimizer.lr=0.01", "lr_schedule.warm_up_steps=0",
    "checkpoint_every=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a run `tiny`, and `tuned` with adapters of four steps."""
    folder = tmp_path_factory.mktemp("made")
    assert run([*TINY, f"output_dir={folder}", "max_steps=5"]) == 0
    assert run([*WORDS, f"output_dir={folder}", "max_steps=4"]) == 0
    return folder


@pytest.fixture
def runs(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def train(runs: Path, *words: str) -> int:
    return run([*WORDS, f"output_dir={runs}", *words])


def start(runs: Path, *words: str) -> TrainingSetup:
    config = train_config(*WORDS[1:], f"output_dir={runs}", "name=new", *words)
    return set_up(config, runs / "new", None)


def checkpoint(runs: Path, name: str = "tuned") -> Checkpoint:
    return read(runs / name / LAST)


def test_the_command_prints_the_share_that_is_trained(runs, capsys):
    assert train(runs, "name=new", "max_steps=1") == 0
    stored = checkpoint(runs, "new")
    assert stored.info.lora is not None
    small = sum(weight.numel() for weight in stored.weights("ema").values())
    line = f"lora: {small:,} of {small + stored.info.lora.frozen:,} parameters trained"
    assert line in capsys.readouterr().err.splitlines()


def test_checkpoints_have_only_what_is_trained(made):
    stored, source = checkpoint(made), checkpoint(made, "tiny")
    small = stored.weights("raw")
    assert small.keys() == stored.weights("ema").keys()
    assert all(".lora_" in name for name in small)
    (optimizer,) = stored.state["optimizer_states"]
    assert len(optimizer["state"]) == len(small)
    numbers = [sum(weight.numel() for weight in of.weights("raw").values()) for of in (stored, source)]
    overhead = source.size - 4 * 4 * numbers[1]  # raw, average, and two of Adam, in float32
    assert stored.size < 4 * 4 * numbers[0] + 2 * overhead
    assert stored.size < source.size / 4


def test_the_frozen_weights_are_those_of_the_source(made):
    assert_same(read_tensors(made / "tuned" / BASE), dict(checkpoint(made, "tiny").weights("ema")))


def test_a_killed_run_ends_with_the_same_bits_and_without_its_source(made, runs):
    whole = checkpoint(made)
    folder = runs / "tuned" / "checkpoints"
    # As if the run had been killed at step 3.
    shutil.copyfile(folder / "step_00000002.ckpt", runs / "tuned" / LAST)
    (folder / "step_00000004.ckpt").unlink()
    shutil.rmtree(runs / "tiny")
    assert train(runs, "max_steps=4") == 0
    assert checkpoint(runs).step == 4
    for entry in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(checkpoint(runs).state[entry], whole.state[entry])
    assert_same(checkpoint(runs).state["callbacks"]["EMA"], whole.state["callbacks"]["EMA"])
    assert run(["train", f"run={runs}/tuned", "max_steps=5"]) == 0
    assert checkpoint(runs).step == 5


def test_the_report_counts_what_is_trained(runs):
    assert run(["report", f"run={runs}/tuned"]) == 0
    stored = checkpoint(runs)
    assert stored.info.lora is not None
    small = sum(weight.numel() for weight in stored.weights("ema").values())
    whole = (small + stored.info.lora.frozen) / 1e6
    assert f"{small:,} trained of {whole:.2f}M" in (runs / "tuned" / "report.html").read_text()


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_run_is_loaded_with_merged_weights_and_without_peft(runs, weights, monkeypatch):
    shutil.rmtree(runs / "tiny")
    monkeypatch.setitem(sys.modules, "peft", None)
    stored = checkpoint(runs)
    assert stored.info.lora is not None
    expected = merged(stored.weights(weights), read_base(runs / "tuned", stored.info.lora), stored.info.lora)
    network = load_model(runs / "tuned", weights, CPU).denoiser.network
    assert_same(dict(network.state_dict()), expected)
    assert distance(expected, read_tensors(runs / "tuned" / BASE)) > 1e-3
    assert run(["sample", f"run={runs}/tuned", "num_samples=1", "steps=2", f"output={runs}/images"]) == 0


def test_training_may_start_from_merged_weights(runs):
    words = [word for word in WORDS[1:] if not word.startswith(("lora.", "init."))]
    config = train_config(*words, f"output_dir={runs}", "init.run=tuned", "name=new")
    setup = set_up(config, runs / "new", None)
    network = load_model(runs / "tuned", "ema", CPU).denoiser.network
    assert_same(dict(setup.task.model.network.state_dict()), dict(network.state_dict()))
    assert setup.info.lora is None


def test_layers_that_the_source_lacks_are_trained_whole(runs):
    setup = start(runs, "model.class_conditional=true")
    state = setup.task.model.network.state_dict()
    assert {name for name in state if ".lora_" not in name} == {"class_embedding.weight"}


def test_layers_of_other_channels_are_trained_whole(runs):
    np.save(runs / "colour.npy", np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
    setup = start(runs, "dataset=array", f"dataset.path={runs}/colour.npy")
    state = setup.task.model.network.state_dict()
    assert {name for name in state if ".lora_" not in name} == {
        "stem.weight",
        "out_conv.weight",
        "out_conv.bias",
    }


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def replaced(path: Path) -> None:
    save_weights({name: weight + 1 for name, weight in read_tensors(path).items()}, path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (Path.unlink, "cannot be read (No such file or directory); restore it"),
        (damaged, BASE),
        (replaced, "has other weights than those that the run was trained with"),
    ],
)
def test_frozen_weights_that_are_missing_or_others_are_one_line(runs, change, why, capsys):
    change(runs / "tuned" / BASE)
    line = f"{runs}/tuned/{BASE}: the frozen weights of the run cannot be read ("
    assert train(runs, "max_steps=6") == 2
    refused(capsys, line)
    assert run(["sample", f"run={runs}/tuned", "num_samples=1", f"output={runs}/images"]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert why in said
    assert said.count("\n") == 1


def test_adapters_that_lack_a_part_are_one_line(made, runs, capsys):
    stored = checkpoint(made)
    (name, *_) = (name for name in stored.weights("ema") if ".lora_A." in name)
    del stored.state["callbacks"]["EMA"]["network"][name]
    torch.save(stored.state, runs / "tuned" / LAST)
    assert run(["sample", f"run={runs}/tuned", "num_samples=1", f"output={runs}/images"]) == 2
    layer = name.partition(".lora_")[0]
    refused(capsys, f"its model cannot be built (the adapter of {layer} is incomplete, or has no layer)")
    assert train(runs, "max_steps=6") == 2
    refused(capsys, f"{LAST.name}: is not a training state of this run")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["init.freeze=[stem,down]"], "init.freeze=[stem,down]: conflicts with lora.rank"),
        (["task=autoencoder", "init.run=null"], "lora.rank=2: adapters change trained weights"),
        (["trainer.strategy=fsdp"], "trainer.strategy=fsdp: not supported with lora.rank"),
        (["lora.targets=[stem]"], "lora.targets=stem: matches no linear layer"),
        (["lora.rank=64"], "lora.rank=64: is larger than the rank of each layer; use at most 32"),
    ],
)
def test_what_adapters_do_not_fit_is_one_line(runs, words, line, capsys):
    assert train(runs, "name=new", *words) == 2
    refused(capsys, line)
    assert not (runs / "new" / "config.yaml").exists()


def test_another_rank_is_another_run(runs, capsys):
    assert train(runs, "lora.rank=3", "max_steps=6") == 2
    refused(capsys, f"lora.rank=3: the run in {runs}/tuned has 2")


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_adapters_do_not_depend_on_the_number_of_processes(runs, monkeypatch):
    monkeypatch.setattr("diffusion_cli.system.machine.usable_cores", lambda: 4)
    assert train(runs, "name=two", "max_steps=4", "trainer.devices=2") == 0
    for kind in ("raw", "ema"):
        assert distance(checkpoint(runs).weights(kind), checkpoint(runs, "two").weights(kind)) < 1e-5
